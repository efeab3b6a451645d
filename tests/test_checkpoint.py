"""Folds on disk, read by real clients: transformers loads every format; weights against the fold in memory and against float64, logits against live peft."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from checkpoints import (
    MODELS,
    adapted,
    bnb_config,
    build,
    decoded,
    differing,
    linearised,
    load,
    outputs,
    quiet_fold,
    quiet_transformers,
    rotations_in,
    stored_as,
    tensors,
)
from independent import fold
from peft import PeftModel
from torch import nn

DENSE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODECS = ("nf4", "fp4", "int8")
#: gpt2's Conv1D weights are (in, out) where they are not quantised
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def split(kind: str) -> tuple[str, bool]:
    """("nf4", True) of "nf4 double"."""
    return kind.split()[0], kind.endswith("double")


class Sources:
    """Checkpoints that transformers saved, their adapter and the live model's logits, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = cache(self._plain)
        self.quantised = cache(self._quantised)
        self.live = cache(self._live)

    def _plain(self, name: str) -> tuple[Path, Path]:
        """(model, adapter)."""
        model = build(name)
        model.save_pretrained(self.folder / name)
        adapted(linearised(model), MODELS[name][2]).save_pretrained(self.folder / f"{name} adapter")
        return self.folder / name, self.folder / f"{name} adapter"

    def _quantised(self, name: str, kind: str) -> Path:
        folder = self.folder / f"{name} {kind}"
        self.model(name, kind).save_pretrained(folder)
        return folder

    def base(self, name: str, kind: str) -> Path:
        return self.plain(name)[0] if kind == "plain" else self.quantised(name, kind)

    def model(self, name: str, kind: str) -> Any:
        """As the trainer had it."""
        codec, double = split(kind)
        return load(self.plain(name)[0], MODELS[name][0], **({} if kind == "plain" else {"quantization_config": bnb_config(codec, double=double)}))

    def _live(self, name: str, kind: str) -> torch.Tensor:
        return outputs(PeftModel.from_pretrained(linearised(self.model(name, kind)), self.plain(name)[1]).eval())


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


# --- every format, every model -----------------------------------------------------------------------------------------------------------------------

#: (what the source holds, how it is quantised first, what is written)
WAYS: dict[str, tuple[str, str | None, str]] = {
    **{f"plain to {f}": ("plain", None, f) for f in ("same", "fp16", "bf16")},
    **{f"plain to {kind}": ("plain", kind, split(kind)[0]) for kind in ("nf4 double", "fp4", "int8")},
    "nf4 double to same": ("nf4 double", None, "same"),
    "int8 to same": ("int8", None, "same"),
    "nf4 to fp32": ("nf4", None, "fp32"),
    "int8 to fp16": ("int8", None, "fp16"),
}
#: for one model by default, for all of them in the slow tests
MORE: dict[str, tuple[str, str | None, str]] = {
    "plain to fp32": ("plain", None, "fp32"),
    "plain to nf4": ("plain", "nf4", "nf4"),
    "plain to fp4 double": ("plain", "fp4 double", "fp4"),
    **{f"plain by way of {kind} to {f}": ("plain", kind, f) for kind, f in (("nf4 double", "fp32"), ("int8", "bf16"))},
    **{f"{kind} to {f}": (kind, None, f) for kind in ("nf4", "nf4 double", "fp4", "int8") for f in ("same", "fp32", "fp16", "bf16")},
}
CASES = [
    pytest.param(name, way, id=f"{name}, {way}", marks=() if way in WAYS or name == "llama" else pytest.mark.slow)
    for name in MODELS
    for way in WAYS | MORE
]

#: relative distance of the logits from the live model's; int8 layers quantise the activations too, live and folded, which dense ones do not
LOGITS = {"same": 1e-5, "fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-2, "nf4": 0.6, "fp4": 0.8, "int8": 0.06}


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_format_loads_and_computes_what_the_live_model_does(sources: Sources, tmp_path: Path, name: str, way: str) -> None:
    kind, quantize, format_ = (WAYS | MORE)[way]
    adapter = sources.plain(name)[1]
    codec, double = split(quantize) if quantize else (None, False)
    quiet_fold(sources.base(name, kind), adapter, tmp_path / "out", format=format_, quantize=codec, double_quant=double, max_shard_size="100KB")
    found = tensors(tmp_path / "out")

    reference = in_memory(linearised(sources.model(name, quantize or kind)), adapter, format_)
    if name == "gpt2":  # Conv1D's weights are (in, out) again where they are not quantised
        reference = {n: t.t() if n.endswith(CONV1D) and t.is_floating_point() else t for n, t in reference.items()}
    assert differing(found, {n: reference[n] for n in found}) == []

    base = tensors(sources.base(name, quantize or kind))
    rotations = rotations_in(adapter)
    assert rotations
    for path, rotation in rotations.items():
        weight = f"{path}.weight"
        exact, got = as_linear(name, base, weight) @ rotation.T, as_linear(name, found, weight)
        least = (stored_as(exact, found, weight) - exact).norm()  # what rounding alone costs
        assert (got - exact).norm() <= 1.0001 * least + 1e-6 * exact.norm(), weight

    model = load(tmp_path / "out", MODELS[name][0])
    live = sources.live(name, quantize or kind)
    distance = float((outputs(model) - live).norm() / live.norm())
    storage = split(quantize or kind)[0] if format_ == "same" else format_
    bound = max(LOGITS["same" if storage == "plain" else storage], LOGITS["int8"] if "int8" in (quantize or kind) else 0)
    assert 0 < distance < bound
    assert model.dtype == DENSE.get(format_, torch.float32)


def in_memory(model: Any, adapter: Path, format_: str) -> dict[str, torch.Tensor]:
    """The state dict of `oftsurgery.fold` of the same."""
    if format_ in DENSE:
        dequantise(model)
        return {n: t.to(DENSE[format_]) if t.is_floating_point() else t for n, t in fold(model, adapter).state_dict().items()}
    return dict(fold(model, adapter).state_dict())


def dequantise(model: Any) -> None:
    """Plain linears in place of bitsandbytes', by its own arithmetic, but for the rounding of 1/127 in its int8 one."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            weight = module.weight
            if isinstance(module, bnb.nn.Linear4bit):
                linear.weight = nn.Parameter(bnbf.dequantize_4bit(weight.data, weight.quant_state))
            else:
                linear.weight = nn.Parameter(weight.data.float() * (weight.SCB / 127).unsqueeze(1))
            linear.bias = module.bias
            model.set_submodule(path, linear)


def as_linear(name: str, found: dict[str, torch.Tensor], weight: str) -> torch.Tensor:
    """float64 (out, in)."""
    value = decoded(found, weight)
    dense = found[weight].is_floating_point() and weight + ".absmax" not in found
    return value.t() if name == "gpt2" and dense else value
