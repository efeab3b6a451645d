"""Files that are links: which are followed, and who says so. More of them are among the attacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from checkpoints import load, outputs, tensors
from models import live, llama
from safetensors.torch import load_file, save_file
from warned import noted

import oftsurgery
from oftsurgery import AdapterError, CheckpointError, SourceWarning
from oftsurgery.cli import main as cli
from oftsurgery.files.links import links_followed
from oftsurgery.files.reading import inside

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, sharded, adapter, and folded: what the first and the last give."""
    folder = tmp_path_factory.mktemp("links")
    llama().save_pretrained(folder / "base")
    llama().save_pretrained(folder / "sharded", max_shard_size="100KB")
    live(llama()).save_pretrained(folder / "adapter")
    oftsurgery.fold_checkpoint(folder / "base", folder / "adapter", folder / "folded", trained_on="plain")
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    for name in ("base", "sharded", "adapter"):
        shutil.copytree(sound / name, tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def move_away(path: Path, elsewhere: Path) -> None:
    """As the Hub's client before 0.23 laid large files out in a folder of the user's."""
    target = elsewhere / f"{len(list(elsewhere.iterdir())):064x}"
    path.rename(target)
    path.symlink_to(target)


def check_folded(folder: Path, sound: Path) -> None:
    assert torch.equal(outputs(load(folder, "LlamaForCausalLM")), outputs(load(sound / "folded", "LlamaForCausalLM")))
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_the_weights_of_a_folder_of_one_file_may_be_a_link_to_a_file_of_the_users(place: Path, sound: Path) -> None:
    move_away(place / "base" / WEIGHTS, place / "elsewhere")
    move_away(place / "adapter" / "adapter_model.safetensors", place / "elsewhere")
    with noted() as said:
        oftsurgery.fold_checkpoint(place / "base", place / "adapter", place / "out", trained_on="plain")
    texts = [str(w.message) for w in said if w.category is SourceWarning]
    assert len(texts) == 2
    for text, name in zip(texts, ("adapter_model.safetensors", WEIGHTS), strict=True):
        assert f"{name} is a link to {place.resolve() / 'elsewhere'}" in text
        assert "since no file of the folder names the link and the link's target belongs to you" in text
    check_folded(place / "out", sound)


def test_both_files_of_an_adapter_may_be_links_to_files_of_the_users(place: Path, sound: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        move_away(place / "adapter" / name, place / "elsewhere")
    with noted() as said:
        oftsurgery.fold_checkpoint(place / "base", place / "adapter", place / "out", trained_on="plain")
    assert sum("is a link to" in str(w.message) for w in said) == 2
    check_folded(place / "out", sound)


def test_a_link_to_somebody_elses_file_is_in_doubt(place: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move_away(place / "base" / WEIGHTS, place / "elsewhere")
    move_away(place / "adapter" / "adapter_model.safetensors", place / "elsewhere")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    text = r"the file is a link that leaves its folder, to .*which belongs to user \d+, not to you \(12345\).*--follow-links"
    with pytest.raises(AdapterError, match=text):
        oftsurgery.load_adapter(place / "adapter")
    adapter = oftsurgery.load_adapter(place / "adapter", follow_links=True)
    with pytest.raises(CheckpointError, match=text):
        oftsurgery.fold_checkpoint(place / "base", adapter, place / "out", trained_on="plain")
    oftsurgery.fold_checkpoint(place / "base", adapter, place / "out", follow_links=True, trained_on="plain")
    check_folded(place / "out", sound)


def test_shards_and_other_files_that_are_links_are_in_doubt(
    place: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index of somebody else's names the shards, and what is carried is published with the model."""
    (place / "sharded" / "tokenizer.json").write_text('{"a": 1}')
    for path in sorted(place.joinpath("sharded").iterdir()):
        if path.name.startswith("model-"):
            move_away(path, place / "elsewhere")
    words = ["fold", str(place / "sharded"), str(place / "adapter"), str(place / "out"), "--trained-on", "plain"]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "CheckpointError: a file of the checkpoint is a link that leaves its folder, to" in err
    assert "copy the file into the folder; if you trust the link, follow it: --follow-links" in err
    assert cli.main([*words, "--follow-links"]) == 0
    check_folded(place / "out", sound)
    move_away(place / "sharded" / "tokenizer.json", place / "elsewhere")
    assert cli.main([*words[:3], str(place / "out-2"), *words[4:], "--follow-links"]) == 0
    assert (place / "out-2" / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (place / "out-2" / "tokenizer.json").is_symlink()
    both = ["verify", str(place / "out-2"), str(place / "sharded"), str(place / "adapter")]
    assert cli.main(both) == 2
    assert cli.main([*both, "--follow-links"]) == 0
    assert oftsurgery.verify_checkpoint(place / "out-2", place / "sharded", place / "adapter", follow_links=True).ok
    oftsurgery.unfold_checkpoint(place / "out-2", place / "back", base=place / "sharded", follow_links=True)
    assert {n: t.tolist() for n, t in tensors(place / "back").items()} == {
        n: t.tolist() for n, t in tensors(sound / "base").items()
    }


@pytest.fixture
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A snapshot in the user's cache, whose blobs lie on another disk; without the user's files' being the user's."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    repo = place / "hub" / "models--org--base"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "blobs").symlink_to(place / "elsewhere")
    for i, path in enumerate(sorted(place.joinpath("sharded").iterdir())):
        path.rename(place / "elsewhere" / f"{i:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    return snapshot


def test_blobs_of_the_users_own_cache_may_lie_elsewhere(cache: Path, place: Path, sound: Path) -> None:
    with noted() as said:
        oftsurgery.fold_checkpoint("org/base", place / "adapter", place / "out", trained_on="plain")
        oftsurgery.fold_checkpoint(cache, place / "adapter", place / "out-2", trained_on="plain")
    assert not said
    check_folded(place / "out", sound)
    check_folded(place / "out-2", sound)


def test_what_only_looks_like_a_cache_may_not(cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "another"))
    with pytest.raises(CheckpointError, match="a link that leaves its folder"):
        oftsurgery.fold_checkpoint(cache, place / "adapter", place / "out", trained_on="plain")


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/proc/self/environ", "/nowhere"])
def test_links_into_the_system(target: str, place: Path) -> None:
    for folder, name in (
        ("base", WEIGHTS),
        ("adapter", "adapter_model.safetensors"),
        ("adapter", "adapter_config.json"),
    ):
        path = place / folder / name
        path.rename(place / "kept")
        path.symlink_to(target)
        with noted(), pytest.raises((AdapterError, CheckpointError)) as caught:
            oftsurgery.fold_checkpoint(
                place / "base", place / "adapter", place / "out", follow_links=True, trained_on="plain"
            )
        assert "root:" not in str(caught.value)
        path.unlink()
        (place / "kept").rename(path)
    assert not (place / "out").exists()


def test_the_choice_is_the_callers_alone(place: Path) -> None:
    """It ends with the call, and an inner call without it does not take it away."""
    move_away(place / "base" / "config.json", place / "elsewhere")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        inside(place / "base", "config.json")
    with links_followed(True), links_followed(False):
        inside(place / "base", "config.json")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        inside(place / "base", "config.json")


def test_a_link_within_the_folder_needs_no_leave(place: Path, sound: Path) -> None:
    (place / "base" / WEIGHTS).rename(place / "base" / "weights")
    (place / "base" / WEIGHTS).symlink_to("weights")
    save_file(load_file(place / "base" / "weights"), place / "base" / "weights", {"format": "pt"})
    oftsurgery.fold_checkpoint(place / "base", place / "adapter", place / "out", trained_on="plain")
    assert torch.equal(
        outputs(load(place / "out", "LlamaForCausalLM")), outputs(load(sound / "folded", "LlamaForCausalLM"))
    )
