"""A fold writes any format from any format, in memory and on disk: the exact weight is rotated and rounded once."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    adapted,
    bnb_config,
    build,
    decoded,
    differing,
    load,
    outputs,
    quant_state,
    quiet_fold,
    rotations_in,
    stored_as,
    tensors,
    unpacked,
)
from independent import relative
from models import state_bytes
from torch import Tensor

import oftsurgery
from oftsurgery import RoundingWarning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = {"nf4": ("nf4", False), "nf4 double": ("nf4", True), "fp4": ("fp4", False), "fp4 double": ("fp4", True), "int8": ("int8", False)}  # fmt: skip
FORMATS = [*DTYPES, *QUANTISED]
TARGETS = ["q_proj", "down_proj"]
#: pairs that transformers loads again
RELOADED = {
    ("nf4", "bf16"), ("nf4 double", "int8"), ("int8", "nf4 double"), ("bf16", "fp4"), ("fp4 double", "fp16"), ("int8", "fp32"), ("nf4", "nf4 double"),
}  # fmt: skip


class Bases:
    """The base of each format: the model as transformers loads it, the folder that transformers saves, and an adapter."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.model = cache(self._model)
        plain = build("llama", torch.bfloat16, num_hidden_layers=1)
        plain.save_pretrained(place / "bf16")
        adapted(plain, TARGETS).save_pretrained(place / "adapter")
        self.adapter = place / "adapter"

    def _model(self, name: str) -> Any:
        folder = self.place / name
        if name in DTYPES:
            model = load(self.place / "bf16", "LlamaForCausalLM", dtype=DTYPES[name])
        else:
            codec, double = QUANTISED[name]
            config = bnb_config(codec, double=double)
            model = load(self.place / "bf16", "LlamaForCausalLM", dtype=torch.bfloat16, quantization_config=config)
        if not folder.is_dir():
            model.save_pretrained(folder)
        return model

    def folder(self, name: str) -> Path:
        self.model(name)
        return self.place / name


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def wanted(name: str) -> dict[str, Any]:
    codec, double = QUANTISED.get(name, (name, False))
    return {"format": codec, "double_quant": double}


def folded_model(model: Any, adapter: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        return oftsurgery.fold(model, adapter, **{"rounding": "nearest"} | options)


def label_of(found: dict[str, Tensor], name: str) -> str:
    """The label of a stored weight, from its bytes alone."""
    state = quant_state(found, name)
    if state is not None:
        return f"{state.quant_type} (double quantisation)" if state.nested else str(state.quant_type)
    return str(found[name].dtype).removeprefix("torch.")


def label_named(name: str) -> str:
    codec, double = QUANTISED.get(name, ("", False))
    return f"{codec} (double quantisation)" if double else codec or str(DTYPES[name]).removeprefix("torch.")


def is_linear(name: str) -> bool:
    return name.endswith("proj.weight")


def check_values(
    before: dict[str, Tensor], after: dict[str, Tensor], rotations: dict[str, Tensor], target: str
) -> None:
    """Each weight is the rotation of the exact source, rounded once to its format."""
    for name in (n for n in before if n.endswith("weight")):
        exact, turn = decoded(before, name), rotations.get(name.removesuffix(".weight"))
        exact = exact if turn is None else exact @ turn.T
        changed = is_linear(name) or target in DTYPES
        assert label_of(after, name) == (label_named(target) if changed else label_of(before, name))
        once = relative(stored_as(exact, after, name), exact)
        assert relative(decoded(after, name), exact) <= once * 1.001 + 1e-7, name


def check_record(record: Any, after: dict[str, Tensor], source: str, target: str) -> None:
    """The record says what the bytes are."""
    assert len(record.modules) == 2
    assert all(module.format == label_of(after, f"{path}.weight") for path, module in record.modules.items())
    base, codec = record.base, wanted(target)["format"]
    if base:
        assert base.get("format") == (None if source == target else codec)
        assert base["fold_into"] == ("original" if source in DTYPES else "quantized")
        assert base["quantize"] == (codec if source in DTYPES and target in QUANTISED else None)
        assert base.get("double_quant") == (None if base["quantize"] is None else json.dumps(QUANTISED[target][1]))


def check_config(folded: Any, target: str) -> None:
    """The model says what it is, as transformers' loading says it."""
    config = getattr(folded.config, "quantization_config", None)
    if target in DTYPES:
        assert config is None
        assert str(folded.config.dtype).removeprefix("torch.") == label_named(target)
        assert folded.dtype == DTYPES[target]
        assert not any(
            getattr(folded, n, None) for n in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
        )
        return
    codec, double = QUANTISED[target]
    assert config.to_dict() == folded.hf_quantizer.quantization_config.to_dict()
    four = codec != "int8"
    assert (config.load_in_4bit, config.load_in_8bit) == (four, not four)
    assert bool(getattr(folded, "is_loaded_in_4bit", False)) == four
    assert bool(getattr(folded, "is_loaded_in_8bit", False)) != four
    if four:
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (codec, double)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_format_comes_from_every_format(source: str, target: str, bases: Bases, tmp_path: Path) -> None:
    model, folder, rotations = bases.model(source), bases.folder(source), rotations_in(bases.adapter)
    there = state_bytes(model)
    folded = folded_model(model, str(bases.adapter), **wanted(target))
    trained = {"trained_on": "plain"} if source in DTYPES else {}
    record = quiet_fold(folder, bases.adapter, tmp_path / "disk", **wanted(target), **trained)
    oftsurgery.export_safetensors(folded, tmp_path / "memory")
    before, after = tensors(folder), tensors(tmp_path / "disk")
    check_values(before, after, rotations, target)
    assert differing(after, tensors(tmp_path / "memory")) == []
    for of, said in (("disk", record), ("memory", folded.oftsurgery)):
        check_record(said, tensors(tmp_path / of), source, target)
    mine = {path: (m.format, m.before, m.after, m.error) for path, m in folded.oftsurgery.modules.items()}
    assert mine == {path: (m.format, m.before, m.after, m.error) for path, m in record.modules.items()}
    configs = [json.loads((tmp_path / of / "config.json").read_text()) for of in ("disk", "memory")]
    assert configs[0].get("quantization_config") == configs[1].get("quantization_config")
    assert configs[0]["dtype"] == configs[1]["dtype"]
    check_config(folded, target)
    assert oftsurgery.verify_checkpoint(tmp_path / "disk", folder, bases.adapter).ok
    assert state_bytes(model) == there
    if (source, target) in RELOADED:
        check_reload(folded, tmp_path)


def check_reload(folded: Any, tmp_path: Path) -> None:
    """transformers loads what was written, and what it saves itself; the loaded model computes the same and generates."""
    folded.save_pretrained(tmp_path / "saved")
    expected = outputs(unpacked(folded))
    for place in ("disk", "memory", "saved"):
        again = load(tmp_path / place, "LlamaForCausalLM", dtype="auto")
        assert torch.equal(outputs(again), expected)
        assert again.generate(torch.tensor([[1, 5]]), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 4)


@pytest.mark.parametrize(
    ("source", "target", "rounding"),
    [("nf4", "nf4 double", "preserve"), ("nf4 double", "fp4", "grid"), ("int8", "nf4", "grid"), ("nf4", "int8", "nearest"), ("nf4", "bf16", "nearest")],
)  # fmt: skip
def test_the_rounding_follows_the_new_format(
    source: str, target: str, rounding: str, bases: Bases, tmp_path: Path
) -> None:
    """`preserve` keeps the levels of the old format, so only the same codec knows it."""
    with pytest.warns(oftsurgery.ConversionWarning):
        adapter = oftsurgery.load_adapter(bases.adapter).scaled(0.2)  # weights move by less than half a step
    folded = folded_model(bases.model(source), adapter, rounding="preserve", **wanted(target))
    quiet_fold(bases.folder(source), adapter, tmp_path / "disk", rounding="preserve", **wanted(target))
    oftsurgery.export_safetensors(folded, tmp_path / "memory")
    assert differing(tensors(tmp_path / "disk"), tensors(tmp_path / "memory")) == []
    assert {m.rounding for m in folded.oftsurgery.modules.values()} == {rounding}
    assert folded.oftsurgery.kept > 0.9


@pytest.mark.parametrize("trained", ["nf4-double", "fp4", "int8"])
@pytest.mark.parametrize("target", ["nf4 double", "fp4", "int8", "bf16"])
def test_a_plain_base_is_quantised_as_in_training_and_written_in_any_format(
    trained: str, target: str, bases: Bases, tmp_path: Path
) -> None:
    """The rotated weight is that of the format of the training, rounded once to the format that is written."""
    name = trained.replace("-", " ")
    quiet_fold(bases.folder("bf16"), bases.adapter, tmp_path / "out", trained_on=trained, **wanted(target))
    # where the two formats are the same, the base's own double quantisation stays
    into = name if wanted(name)["format"] == wanted(target)["format"] else target
    check_values(tensors(bases.folder(name)), tensors(tmp_path / "out"), rotations_in(bases.adapter), into)
    assert oftsurgery.verify_checkpoint(tmp_path / "out", bases.folder("bf16"), bases.adapter).ok
    load(tmp_path / "out", "LlamaForCausalLM")


def test_a_model_of_which_nothing_is_quantised_is_said_to_stay_plain(tmp_path: Path) -> None:
    """Falcon's linears are of a class of their own, which transformers' bitsandbytes passes by."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    adapted(model, ["query_key_value"]).save_pretrained(tmp_path / "adapter")
    message = r"the output has no weight in nf4.*\(FalconForCausalLM\)"
    with pytest.warns(oftsurgery.SourceWarning, match=message):
        oftsurgery.fold_checkpoint(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format="nf4", trained_on="nf4"
        )
