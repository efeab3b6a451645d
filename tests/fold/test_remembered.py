"""What transformers has said of a checkpoint is noted, and a later fold by the note writes the same bytes as a fold by the class."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODELS, adapted, bnb_config, build, file_bytes, linearised, load, quiet_fold

from oftsurgery.errors import MatchError
from oftsurgery.folding import remembered
from oftsurgery.stores import skeleton

#: case → (model, changes of its config, adapter's settings, whether the class leaves the plan by names as it is)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "llama": ("llama", {}, {}, True),
    "qwen3": ("qwen3", {}, {}, True),
    "gpt2": ("gpt2", {}, {}, True),
    "bert": ("bert", {}, {}, True),
    "t5": ("t5", {}, {}, True),
    "tied": ("llama", {"tie_word_embeddings": True}, {}, True),
    "a head that comes apart": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}, False),
    "a layer that nobody calls": ("mamba", {}, {}, False),
}
MAMBA = {"vocab_size": 64, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 16}


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the notes, which this process writes and reads as if transformers were not loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_loaded", bool)
    return tmp_path / "cache" / "oftsurgery" / "plans"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model types whose class is built."""
    found: list[str] = []
    classes = skeleton._classes

    def build(config: dict[str, object]) -> object:
        found.append(str(config["model_type"]))
        return classes(config)

    monkeypatch.setattr(skeleton, "_classes", build)
    return found


def write(folder: Path, case: str) -> Path:
    """BASE, quantised and saved by transformers, and ADAPTER."""
    name, changes, settings, _ = CASES[case]
    cls, _, targets = MODELS[name]
    model = linearised(build(name, **changes)) if name == "gpt2" else build(name, **changes)
    adapted(model, targets, **settings).save_pretrained(folder / "ADAPTER")
    build(name, **changes).save_pretrained(folder / "PLAIN")
    quantised = load(folder / "PLAIN", cls, quantization_config=bnb_config("nf4", double=True), dtype=torch.float32)
    quantised.save_pretrained(folder / "BASE")
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::oftsurgery.IdleWarning", "ignore:Model has `tie_word_embeddings=True`")
def test_a_fold_by_a_note_writes_the_bytes_of_a_fold_by_the_class(
    case: str, tmp_path: Path, notes: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "mamba", ("MambaForCausalLM", MAMBA, ["in_proj", "dt_proj"]))
    folder, confirmed = write(tmp_path, case), CASES[case][-1]
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "_loaded", lambda: True)
        quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "class")
    assert not notes.exists()
    for out in ("first", "second"):
        asked.clear()
        quiet_fold(folder / "BASE", folder / "ADAPTER", folder / out)
        assert file_bytes(folder / out) == file_bytes(folder / "class")
    assert (not asked, notes.exists()) == (confirmed, confirmed)


def changed_config(folder: Path) -> None:
    path = folder / "BASE" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


def other_adapter(folder: Path) -> None:
    path = folder / "ADAPTER" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exclude_modules": "nothing"}))


def edited(note: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = (folder / "cache" / "oftsurgery" / "plans").glob("*")
        path.write_text(json.dumps(note(json.loads(path.read_text()))))

    return change


def other_stamp(note: dict[str, object]) -> object:
    files = note["files"]
    assert isinstance(files, dict)
    assert any(name.endswith("modeling_llama.py") for name in files)
    return note | {"files": files | {next(iter(files)): [1, 2]}}


CHANGES: dict[str, Callable[[Path], None]] = {
    "the config": changed_config,
    "the adapter's config": other_adapter,
    "a file of transformers": edited(other_stamp),
    "the plan": edited(lambda note: note | {"plan": "0" * 64}),
    "no files in the note": edited(lambda note: note | {"files": {}}),
    "a note of another form": edited(lambda _: []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_any_change_the_class_is_asked_again(change: str, tmp_path: Path, notes: Path, asked: list[str]) -> None:
    folder = write(tmp_path, "llama")
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "first")
    CHANGES[change](folder)
    asked.clear()
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "second")
    assert asked
    assert file_bytes(folder / "second").keys() == file_bytes(folder / "first").keys()


def test_other_sources_of_this_package_ask_the_class_again(
    tmp_path: Path, notes: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A developer's change of a rule leaves the version as it is."""
    folder = write(tmp_path, "llama")
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "first")
    asked.clear()
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "second")
    assert not asked
    monkeypatch.setattr(remembered, "_SOURCES", folder)
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "third")
    assert asked


def test_an_error_is_not_noted_and_comes_again(tmp_path: Path, notes: Path) -> None:
    folder = write(tmp_path, "llama")
    adapted(build("llama", num_hidden_layers=3), ["q_proj"]).save_pretrained(folder / "OTHER")
    for _ in range(2):
        with pytest.raises(MatchError, match=r"model\.layers\.2\.self_attn\.q_proj"):
            quiet_fold(folder / "BASE", folder / "OTHER", folder / "out")
    assert not notes.exists()


def test_a_plain_base_and_an_undo_record_ask_the_class(tmp_path: Path, notes: Path) -> None:
    folder = write(tmp_path, "llama")
    quiet_fold(folder / "PLAIN", folder / "ADAPTER", folder / "plain")
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "undoable", undo=folder / "undo")
    assert not notes.exists()


def test_the_cache_keeps_a_hundred_notes_and_may_be_read_only(tmp_path: Path, notes: Path) -> None:
    folder = write(tmp_path, "llama")
    notes.mkdir(parents=True)
    for i in range(120):
        (notes / f"{i}.json").write_text("{}")
        os.utime(notes / f"{i}.json", (i, i))
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "first")
    assert {path.name for path in notes.glob("*")} >= {"119.json", "21.json"}
    assert len(list(notes.glob("*"))) == 100
    other_adapter(folder)
    for path in notes.glob("*"):
        path.unlink()
    notes.rmdir()
    notes.write_text("a file in the place of the folder")
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "second")
