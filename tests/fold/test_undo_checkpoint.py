"""Undo records of folds on disk: every byte of every tensor comes back, or nothing is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODELS, adapted, bnb_config, build, differing, file_bytes, linearised, load, quiet_fold, tensors
from checkpoints import quiet_transformers as quiet
from safetensors.torch import load_file, save_file
from snapshots import contents

import oftsurgery
from oftsurgery import IntegrityError, MatchError, StateError, UndoError
from oftsurgery.cli import main as cli


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"quantization_config": bnb_config("nf4")},
    "nf4 double": {"quantization_config": bnb_config("nf4", double=True)},
    "fp4": {"quantization_config": bnb_config("fp4")},
    "int8": {"quantization_config": bnb_config("int8")},
}


class Sources:
    """Checkpoints that transformers saved and adapters that peft saved, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.adapter = cache(self._base), cache(self._adapter)

    def _base(self, name: str, kind: str = "plain", **changes: Any) -> Path:
        plain = self.folder / f"{name} plain {changes}"
        if kind == "plain":
            build(name, **changes).save_pretrained(plain)
            return plain
        folder = self.folder / f"{name} {kind}"
        load(self.base(name), MODELS[name][0], **KINDS[kind]).save_pretrained(folder)
        return folder

    def _adapter(
        self,
        name: str,
        targets: tuple[str, ...] = (),
        *,
        seed: int = 0,
        save_embedding_layers: Any = "auto",
        **config: Any,
    ) -> Path:
        folder = self.folder / f"{name} adapter {targets} {seed} {save_embedding_layers} {config}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft about tied embeddings
            wrapped = adapted(linearised(build(name)), list(targets) or MODELS[name][2], seed=seed, **config)
            with torch.no_grad():
                for key, parameter in wrapped.named_parameters():
                    if parameter.requires_grad and "oft_" not in key:  # biases and heads as if they had been trained
                        parameter.add_(0.01)
            wrapped.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
        return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_every_byte_of_every_tensor_comes_back(name: str, kind: str, sources: Sources, tmp_path: Path) -> None:
    base, adapter = sources.base(name, kind), sources.adapter(name)
    quiet_fold(base, adapter, tmp_path / "folded", undo=tmp_path / "fold.undo")
    assert differing(tensors(base), tensors(tmp_path / "folded"))
    assert not [p for p in (tmp_path / "folded").iterdir() if p.name.endswith(".undo")]
    record = oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "back", undo=tmp_path / "fold.undo")
    assert record is None
    assert differing(tensors(base), tensors(tmp_path / "back")) == []
    assert config_of(base) == config_of(tmp_path / "back")
    assert sorted(p.name for p in base.iterdir()) == sorted(p.name for p in (tmp_path / "back").iterdir())


@pytest.mark.parametrize("shards", ["5GB", "50KB"])
def test_folds_unwind_in_order(shards: str, sources: Sources, tmp_path: Path) -> None:
    base = sources.base("llama", "nf4 double")
    folders = [base]
    for i in range(3):
        folders.append(tmp_path / str(i))
        adapter = sources.adapter("llama", ("q_proj", "up_proj"), seed=i)
        quiet_fold(folders[-2], adapter, folders[-1], undo=tmp_path / f"{i}.undo", max_shard_size=shards)
    now = folders[-1]
    for i in (2, 1, 0):
        for other in range(i):  # not the last one
            with pytest.raises(
                StateError, match=r"is not the last fold: \d later folds .* were made after it"
            ) as caught:
                oftsurgery.unfold_checkpoint(now, tmp_path / "wrong", undo=tmp_path / f"{other}.undo")
            assert "take the later folds out first" in str(caught.value)
            assert not (tmp_path / "wrong").exists()
        oftsurgery.unfold_checkpoint(now, tmp_path / f"back{i}", undo=tmp_path / f"{i}.undo", max_shard_size=shards)
        now = tmp_path / f"back{i}"
        assert differing(tensors(folders[i]), tensors(now)) == []
        if i:  # the very files, where oftsurgery wrote both
            ours, theirs = file_bytes(now), file_bytes(folders[i])
            assert {n: ours[n] for n in ours if "safetensors" in n} == {
                n: theirs[n] for n in theirs if "safetensors" in n
            }


def test_a_plain_source_that_was_quantised_comes_back_quantised(sources: Sources, tmp_path: Path) -> None:
    base, adapter = sources.base("llama"), sources.adapter("llama")
    quiet_fold(base, adapter, tmp_path / "folded", format="nf4", double_quant=True, undo=tmp_path / "fold.undo")
    oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "undone", undo=tmp_path / "fold.undo")
    oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "restored", base=base)
    assert differing(tensors(tmp_path / "undone"), tensors(tmp_path / "restored")) == []
    assert config_of(tmp_path / "undone") == config_of(tmp_path / "restored")
    back = load(tmp_path / "undone", MODELS["llama"][0])
    quantised = load(base, MODELS["llama"][0], quantization_config=bnb_config("nf4", double=True))
    assert contents(back) == contents(quantised)


@pytest.mark.parametrize(
    "targets", [("embed_tokens",), ("lm_head", "q_proj"), ("embed_tokens", "lm_head")], ids=lambda t: "+".join(t)
)
@pytest.mark.parametrize("embeddings", [True, False], ids=["saved too", "alone"])
def test_tied_weights_are_one_again(
    targets: tuple[str, ...], embeddings: bool, sources: Sources, tmp_path: Path
) -> None:
    base = sources.base("llama", tie_word_embeddings=True)
    adapter = sources.adapter("llama", targets, save_embedding_layers=embeddings)
    quiet_fold(base, adapter, tmp_path / "folded", undo=tmp_path / "fold.undo")
    assert "lm_head.weight" in tensors(tmp_path / "folded")
    oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "back", undo=tmp_path / "fold.undo")
    assert differing(tensors(base), tensors(tmp_path / "back")) == []
    assert config_of(base) == config_of(tmp_path / "back")
    if targets == ("embed_tokens",) and not embeddings:  # the head holds the original still
        assert (tmp_path / "fold.undo").stat().st_size < 3000
    # and in memory, by the record that was made on disk
    folded = load(tmp_path / "folded", MODELS["llama"][0])
    back = oftsurgery.unfold(folded, undo=tmp_path / "fold.undo")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert back.config.tie_word_embeddings is True
    assert contents(back) == contents(load(base, MODELS["llama"][0]))


@pytest.mark.parametrize("kind", ["plain", "nf4 double", "int8"])
def test_biases_and_saved_modules_come_back(kind: str, sources: Sources, tmp_path: Path) -> None:
    base = sources.base("bert", kind)
    more = {"modules_to_save": ("classifier",)} if kind == "plain" else {}
    adapter = sources.adapter("bert", ("query", "dense"), bias="all", **more)
    record = quiet_fold(base, adapter, tmp_path / "folded", undo=tmp_path / "fold.undo")
    assert ("classifier.weight" in record.saved) == (kind == "plain")
    assert any("bias" in name for name in record.saved)
    oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "back", undo=tmp_path / "fold.undo")
    assert differing(tensors(base), tensors(tmp_path / "back")) == []


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_one_record_serves_in_memory_and_on_disk(kind: str, sources: Sources, tmp_path: Path) -> None:
    base, adapter = sources.base("llama", kind), sources.adapter("llama")
    cls = MODELS["llama"][0]
    quiet_fold(base, adapter, tmp_path / "folded", undo=tmp_path / "disk.undo")
    # made on disk, used on the model that transformers loads
    reloaded = load(tmp_path / "folded", cls)
    original = load(base, cls)
    assert contents(oftsurgery.unfold(reloaded, undo=tmp_path / "disk.undo")) == contents(original)
    # made in memory, used on the checkpoint that was saved from there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        folded = oftsurgery.fold(original, adapter, undo=tmp_path / "memory.undo")
    oftsurgery.export_safetensors(folded, tmp_path / "exported")
    oftsurgery.unfold_checkpoint(tmp_path / "exported", tmp_path / "back", undo=tmp_path / "memory.undo")
    assert differing(tensors(base), tensors(tmp_path / "back")) == []


def test_unusual_companions_come_back_as_they_were(sources: Sources, tmp_path: Path) -> None:
    """Other releases of bitsandbytes write the state's JSON in another way, and no weight_format beside int8 weights."""
    for kind, change in (("nf4", _other_json), ("int8", _no_weight_format)):
        base = tmp_path / kind
        base.mkdir()
        for path in sources.base("llama", kind).iterdir():
            if path.suffix == ".safetensors":
                save_file(change(load_file(path)), base / path.name, metadata={"format": "pt"})
            else:
                (base / path.name).write_bytes(path.read_bytes())
        assert differing(tensors(base), tensors(sources.base("llama", kind)))
        quiet_fold(base, sources.adapter("llama"), tmp_path / f"{kind} folded", undo=tmp_path / f"{kind}.undo")
        oftsurgery.unfold_checkpoint(
            tmp_path / f"{kind} folded", tmp_path / f"{kind} back", undo=tmp_path / f"{kind}.undo"
        )
        assert differing(tensors(base), tensors(tmp_path / f"{kind} back")) == []


def _other_json(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name in [n for n in found if "quant_state" in n]:
        fields = json.loads(bytes(found[name].tolist()))
        text = json.dumps(dict(reversed(fields.items())), separators=(",", ":"))
        found[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return found


def _no_weight_format(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in found.items() if not n.endswith("weight_format")}


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"format": "bf16"}, {"format": "nf4", "fold_into": "original"}], ids=lambda o: o["format"]
)
def test_a_fold_that_changes_formats_has_no_record(options: Any, sources: Sources, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="this fold also changes the weights' formats") as caught:
        oftsurgery.fold_checkpoint(
            sources.base("llama"), sources.adapter("llama"), tmp_path / "out", undo=tmp_path / "u", **options
        )
    assert "keep the base" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_places_where_no_record_can_be_written(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    for undo, message in (
        (tmp_path / "there", "the path for the undo record exists already"),
        (tmp_path / "out" / "fold.undo", "would be inside the destination"),
        (tmp_path / "there" / "fold.undo", "a file is in the place of a folder"),
    ):
        with pytest.raises(StateError, match=message):
            oftsurgery.fold_checkpoint(
                sources.base("llama"), sources.adapter("llama"), tmp_path / "out", undo=undo, trained_on="plain"
            )
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_record_of_another_checkpoint(sources: Sources, tmp_path: Path) -> None:
    quiet_fold(sources.base("llama", "nf4"), sources.adapter("llama"), tmp_path / "a", undo=tmp_path / "a.undo")
    quiet_fold(sources.base("llama", "fp4"), sources.adapter("llama"), tmp_path / "b", undo=tmp_path / "b.undo")
    quiet_fold(sources.base("bert", "nf4"), sources.adapter("bert"), tmp_path / "c", undo=tmp_path / "c.undo")
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(StateError, match="the undo record is of a fold of"):
        oftsurgery.unfold_checkpoint(tmp_path / "a", tmp_path / "out", undo=tmp_path / "b.undo")
    (tmp_path / "a" / "oftsurgery.json").unlink()
    with pytest.raises(IntegrityError, match="not the one that this record's fold left"):
        oftsurgery.unfold_checkpoint(tmp_path / "a", tmp_path / "out", undo=tmp_path / "b.undo")
    with pytest.raises(MatchError, match=r"the checkpoint lacks \d+ of the tensors that the undo record restores"):
        oftsurgery.unfold_checkpoint(tmp_path / "a", tmp_path / "out", undo=tmp_path / "c.undo")
    assert {p.name for p in tmp_path.iterdir()} == before
    # its own record does without oftsurgery.json
    oftsurgery.unfold_checkpoint(tmp_path / "a", tmp_path / "out", undo=tmp_path / "a.undo")
    assert differing(tensors(sources.base("llama", "nf4")), tensors(tmp_path / "out")) == []


def test_damaged_records_write_nothing(sources: Sources, tmp_path: Path) -> None:
    quiet_fold(sources.base("llama", "nf4"), sources.adapter("llama"), tmp_path / "a", undo=tmp_path / "a.undo")
    whole = (tmp_path / "a.undo").read_bytes()
    bad = tmp_path / "bad.undo"
    for content in (b"", whole[:100], whole[:-1], whole[:600] + bytes([whole[600] ^ 1]) + whole[601:]):
        bad.write_bytes(content)
        with pytest.raises(UndoError):
            oftsurgery.unfold_checkpoint(tmp_path / "a", tmp_path / "out", undo=bad)
        assert {p.name for p in tmp_path.iterdir()} == {"a", "a.undo", "bad.undo"}


# --- killed and resumed -----------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(jobs: int) -> Callable[[int, int, str], None]:
    count = 0

    def step(*_: object) -> None:
        nonlocal count
        count += 1
        if count > jobs:
            raise Stop

    return step


def test_an_interrupted_run_resumes_to_the_same_record(sources: Sources, tmp_path: Path) -> None:
    base, adapter = sources.base("llama", "nf4 double"), sources.adapter("llama")
    small: dict[str, Any] = {"max_shard_size": "20KB"}
    quiet_fold(base, adapter, tmp_path / "whole", undo=tmp_path / "whole.undo", **small)
    for jobs in (3, 9, 15):
        out, undo = tmp_path / f"out{jobs}", tmp_path / f"{jobs}.undo"
        with pytest.raises(Stop):
            quiet_fold(base, adapter, out, undo=undo, progress=stop_after(jobs), **small)
        assert not out.exists()
        assert not undo.exists()
        quiet_fold(base, adapter, out, undo=undo, resume=True, **small)
        assert undo.read_bytes() == (tmp_path / "whole.undo").read_bytes()
        assert file_bytes(out) == file_bytes(tmp_path / "whole")


def test_killed_between_the_record_and_the_rename(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oftsurgery.files.staging import Staging

    base, adapter = sources.base("llama", "nf4"), sources.adapter("llama")

    def killed(_: Staging, last: str | None = None) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", killed)
        with pytest.raises(Stop):
            quiet_fold(base, adapter, tmp_path / "out", undo=tmp_path / "u")
    assert (tmp_path / "u").exists()
    assert not (tmp_path / "out").exists()
    record = (tmp_path / "u").read_bytes()
    quiet_fold(base, adapter, tmp_path / "out", undo=tmp_path / "u", resume=True)
    assert (tmp_path / "u").read_bytes() == record
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".undo")]
    oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "back", undo=tmp_path / "u")
    assert differing(tensors(base), tensors(tmp_path / "back")) == []


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = str(sources.base("llama", "int8")), str(sources.adapter("llama"))
    folded, back, undo = str(tmp_path / "folded"), str(tmp_path / "back"), str(tmp_path / "fold.undo")
    assert cli.main(["fold", base, adapter, folded, "--undo", undo, "-q"]) == 0
    assert cli.main(["unfold", folded, back, "--undo", undo]) == 0
    assert capsys.readouterr().out == f"wrote {back}\n"
    assert differing(tensors(Path(base)), tensors(Path(back))) == []
    again = ["export", "--base", base, "--adapter", adapter, "--output", str(tmp_path / "x"), "--undo"]
    assert cli.main([*again, undo]) == 2
    assert "StateError: the path for the undo record exists already" in capsys.readouterr().err
    assert cli.main([*again, str(tmp_path / "x.undo"), "-q"]) == 0
    assert (tmp_path / "x.undo").read_bytes() == Path(undo).read_bytes()
    with pytest.raises(SystemExit):
        cli.main([*again, str(tmp_path / "y.undo"), "--format", "onnx"])
    assert "a graph cannot be unfolded, so --undo belongs to the other formats" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["unfold", folded, back, "--undo", undo, "--base", base])
