"""The layers that the benchmark folds: sizes, formats and adapters, and the ways to fold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import compare
import torch
from peft import OFTConfig, get_peft_model
from torch import nn

import oftsurgery

#: the default comes first: it is what users run
MODES = ("preserve", "nearest", "grid", "mse")
#: the modes that int8 knows, and the modes of a short run
SHORT = ("preserve", "nearest")
#: standard deviation of the generators' entries times √b: a trained adapter moves the weights by 3 % (QOFT trainings of this
#: project's demo and notebook move them by 1 to 5 %), a strong adapter by 20 %
TURNS = {"trained": 0.0147, "strong": 0.1}


@dataclass(frozen=True)
class Case:
    """One layer with one adapter, folded in some modes.

    Attributes:
        codec: ``"nf4"``, ``"fp4"`` (with double quantisation: ``"nf4 nested"``), ``"int8"`` or ``"bf16"``.
        shape: ``(out, in)``.
        b: the block size of the adapter.
        adapter: a key of ``TURNS``.
    """

    codec: str
    shape: tuple[int, int]
    b: int = 32
    adapter: str = "trained"
    modes: Sequence[str] = MODES

    @property
    def label(self) -> str:
        return compare.label(self.codec, self.shape, self.b, self.adapter)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


def _square(codec: str, *widths: int, **more: Any) -> list[Case]:
    return [Case(codec, (n, n), **more) for n in widths]


_QUICK = _square("nf4 nested", 1024, 4096)
_DEFAULT = [
    *_square("nf4 nested", 1024, 2048, 4096, 8192),
    *_square("nf4", 1024, 4096),
    *_square("int8", 4096, modes=SHORT),
    *_square("bf16", 4096, modes=("preserve",)),
    *_square("nf4 nested", 4096, b=128),
    *_square("nf4 nested", 4096, adapter="strong"),
]
_MORE = [
    *_square("nf4", 8192),
    Case("nf4 nested", (4096, 11008)),
    *(case for b in (16, 64, 256) for case in _square("nf4 nested", 4096, b=b)),
    *_square("fp4 nested", 4096),
    *_square("int8", 1024, 8192, modes=SHORT),
]
CASES = {
    "quick": _QUICK,
    "default": _DEFAULT,
    "full": [*_DEFAULT, *_MORE],
    # few enough to be compared within a minute, with the same names as in the committed results
    "check": [
        *_square("nf4 nested", 1024, 4096, modes=SHORT),
        *_square("nf4", 1024, modes=SHORT),
        *_square("int8", 4096, modes=SHORT),
    ],
    # of no size that says anything: the tests run them
    "tiny": [*_square("nf4 nested", 128, 256, 384), *_square("nf4", 128), *_square("int8", 128, modes=SHORT)],
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def layer_of(codec: str, rows: int, features: int, device: str = "cpu") -> nn.Module:
    """A linear layer with random normal weights, plain or of bitsandbytes."""
    weight = torch.randn(rows, features, device=device) * 0.02
    if codec == "bf16":
        plain = nn.Linear(features, rows, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
        return plain
    if codec == "int8":
        layer = bnb.nn.Linear8bitLt(features, rows, bias=False, has_fp16_weights=False, device="meta")
        scb = weight.abs().amax(1)
        codes = (weight * (127 / scb).unsqueeze(1)).round().to(torch.int8)
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scb)
        layer.state.CB, layer.state.SCB = codes, scb
        return layer
    kind, nested = codec.removesuffix(" nested"), codec.endswith(" nested")
    layer = bnb.nn.Linear4bit(features, rows, bias=False, quant_type=kind, compress_statistics=nested, device="meta")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=nested, module=layer
    ).to(device)
    return layer


def with_adapter(model: nn.Module, targets: list[str], b: int, adapter: str = "trained") -> Any:
    """``model`` with a live adapter of peft that has random normal generators."""
    live = get_peft_model(model, OFTConfig(target_modules=targets, oft_block_size=b))
    for name, parameter in live.named_parameters():
        if "oft_" in name:
            nn.init.normal_(parameter, std=TURNS[adapter] / b**0.5)
    return live.requires_grad_(False)


def live_case(case: Case, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    return with_adapter(Model(layer_of(case.codec, *case.shape, device)), ["layer"], case.b, case.adapter)


def restorer(layer: Any) -> Callable[[], None]:
    """A function that takes peft's merge back from the live ``layer``, by the tensors from before the merge."""
    base, weight, data = layer.base_layer, layer.base_layer.weight, layer.base_layer.weight.data
    int8 = isinstance(weight, bnb.nn.Int8Params)
    state = (base.state.CB, base.state.SCB) if int8 else None

    def restore() -> None:
        layer.merged_adapters.clear()
        base.weight = weight
        if type(weight) is nn.Parameter:  # of a plain layer peft replaces the data
            weight.data = data
        if state:
            base.state.CB, base.state.SCB = state

    return restore


def library_fold(layer: nn.Module, rotation: oftsurgery.Rotation) -> Any:
    """Plain code for bitsandbytes and torch: dequantise, rotate by blocks, quantise."""
    weight: Any = layer.weight
    blocks = rotation.blocks.to(weight.device, torch.float32)
    n, b, _ = blocks.shape
    int8, four_bit = isinstance(weight, bnb.nn.Int8Params), isinstance(weight, bnb.nn.Params4bit)
    if int8:
        plain = weight.data.float() * (weight.SCB / 127).unsqueeze(1)
    elif four_bit:
        plain = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    else:
        plain = weight.data.float()
    rows = plain.reshape(-1, n, b).transpose(0, 1)
    rotated = torch.bmm(rows, blocks.transpose(1, 2)).transpose(0, 1).reshape(plain.shape)
    if int8:
        return bnb.functional.int8_vectorwise_quant(rotated.half())
    if not four_bit:
        return rotated.to(weight.dtype)
    state = weight.quant_state
    return bnb.functional.quantize_4bit(
        rotated, blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type
    )
