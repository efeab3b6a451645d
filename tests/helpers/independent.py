"""What the tests hold oftsurgery against: bitsandbytes layers, and the live layer in float64 with a decoder, maps and
dense matrices of our own.

Nothing here calls oftsurgery's arithmetic. `live_weight` is written from the formulas of formats.md, one line a
dialect.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
from torch import Tensor, nn

import oftsurgery
from oftsurgery.adapters.from_peft import parse_adapter

# --- stored weights ---------------------------------------------------------------------------------------------------


def seeded(*what: object) -> torch.Generator:
    """A generator that depends on the case alone, so that a case can be run by itself."""
    return torch.Generator().manual_seed(sum((i + 1) * ord(c) for i, c in enumerate(repr(what))))


def make_layer(
    codec: str,
    in_features: int,
    out_features: int = 64,
    *,
    nested: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A layer as bitsandbytes quantises it from a weight of ``dtype``: ``codec`` nf4, fp4 or int8 (or dense)."""
    g = generator or seeded(codec, in_features, out_features)
    weight = (torch.randn(out_features, in_features, generator=g) / math.sqrt(in_features)).to(dtype)
    layer: Any
    if codec == "dense":
        layer = nn.Linear(in_features, out_features, bias=bias)
        layer.weight = nn.Parameter(weight)
    elif codec == "int8":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            in_features, out_features, bias=bias, compress_statistics=nested, quant_type=codec, quant_storage=storage
        )
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=nested,
            quant_type=codec,
            quant_storage=storage,
            blocksize=blocksize,
            module=layer,
        )
    if bias:
        layer.bias = nn.Parameter(torch.randn(out_features, generator=g).to(dtype))
    return layer.to("cpu")


def decode_4bit(packed: Tensor, state: Any) -> Tensor:
    """float64 ``state.shape`` from packed bytes and a bitsandbytes QuantState (not a CPU-packed one)."""
    byte = packed.detach().reshape(-1).view(torch.uint8).to(torch.int64)
    n = math.prod(state.shape)
    codes = torch.stack([byte // 16, byte % 16], dim=1).reshape(-1)[:n]
    absmax = decode_absmax(state)
    return (
        bnbf.get_4bit_type(state.quant_type, device="cpu").double()[codes] * absmax[torch.arange(n) // state.blocksize]
    ).reshape(state.shape)


def decode_absmax(state: Any) -> Tensor:
    """float64, one a block."""
    if not state.nested:
        return state.absmax.double()
    second = state.state2
    block = torch.arange(state.absmax.numel()) // second.blocksize
    return second.code.double()[state.absmax.to(torch.int64)] * second.absmax.double()[block] + state.offset.double()


def stored_weight(layer: nn.Module, *, bfloat16_absmax: bool = False) -> Tensor:
    """float64 ``(out, in)`` that a layer stands for; a CPU-packed one is not read, hence call before its first eval
    forward.

    With ``bfloat16_absmax``, what will be left of it after a CPU eval forward.
    """
    weight: Any = layer.weight
    if weight.dtype == torch.int8:
        scb = weight.SCB if weight.SCB is not None else layer.state.SCB  # type: ignore[union-attr]
        return weight.detach().double() * scb.double().unsqueeze(1) / 127
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().double()
    if not bfloat16_absmax:
        return decode_4bit(weight, state)
    rounded = decode_absmax(state).float().bfloat16().float()
    flat = bnbf.QuantState(rounded, shape=state.shape, blocksize=state.blocksize, quant_type=state.quant_type)
    return decode_4bit(weight, flat)


def requantised(exact: Tensor, layer: nn.Module) -> Tensor:
    """float64: ``exact`` as bitsandbytes' own quantiser stores it in the layer's format, decoded by the decoder above."""
    weight: Any = layer.weight
    if weight.dtype == torch.int8:
        codes, scb, _ = bnbf.int8_vectorwise_quant(exact.float())
        return codes.double() * scb.double().unsqueeze(1) / 127
    packed, state = bnbf.quantize_4bit(
        exact.float(),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
    )
    return decode_4bit(packed, state)


# --- adapters ---------------------------------------------------------------------------------------------------------

#: dialect and map → (which `parse_adapter` must detect, config beyond peft_type)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "0.13 output side": ("peft-0.13", {"r": 4}),
    "0.13 output side, cropped": ("peft-0.13", {"r": 6}),
    "0.15 with oft_s": ("peft-0.15", {"oft_block_size": 0, "r": 0}),
    "0.17 Neumann": ("peft-0.17", {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}),
    "0.21 Neumann": (
        "peft-0.21",
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": "0.21.2"},
    ),
    "0.21 exact": ("peft-0.21", {"use_cayley_neumann": False, "peft_version": "0.21.2"}),
}


@dataclass(frozen=True)
class Case:
    """One module's adapter, as the file holds it and as the live layer computes it."""

    adapter: oftsurgery.OFTAdapter
    dense: Tensor  #: float64 (features, features): R
    side: str
    scale: Tensor | None = field(default=None)  #: float64 (out,)

    def live_weight(self, weight: Tensor) -> Tensor:
        """float64 ``(out, in)``: what pushing the identity through the live layer gives, without its bias."""
        eye = torch.eye(weight.shape[1], dtype=torch.float64)
        y = (eye @ weight.T) @ self.dense if self.side == "output" else (eye @ self.dense) @ weight.T
        return (y if self.scale is None else y * self.scale).T


def skew(rows: Tensor, b: int) -> Tensor:
    """float64 (n, b, b), filled element by element as formats.md says."""
    q = torch.zeros(rows.shape[0], b, b, dtype=torch.float64)
    upper = [(i, j) for i in range(b) for j in range(i + 1, b)]
    for k, (i, j) in enumerate(upper):
        q[:, i, j] = rows[:, k].double()
        q[:, j, i] = -rows[:, k].double()
    return q


def cayley(q: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return torch.stack(
        [(eye - m) @ torch.linalg.inv(eye + m) for m in q.double()]
    )  # one by one: the batched solve of torch 2.13 is not to be trusted


@cache
def make_case(
    variant: str, in_features: int, out_features: int, *, path: str = "layer", size: float = 0.03, b: int | None = None
) -> Case:
    """A random adapter of a dialect for one linear, parsed from the keys and config that this dialect's peft writes.

    The elements of its generator have the standard deviation ``size``.
    """
    dialect, config = VARIANTS[variant]
    b = b or {64: 16, 96: 16, 100: 20, 128: 16, 256: 32}[in_features]
    g = seeded(variant, in_features, out_features, size, path)
    config = {"peft_type": "OFT", **config}
    key = f"base_model.model.{path}"
    if dialect in ("peft-0.13", "peft-0.15"):
        r = config["r"] if dialect == "peft-0.13" else in_features // b
        width = -(-out_features // r) if dialect == "peft-0.13" else b
        a = size * 2**0.5 * torch.randn(r, width, width, generator=g)  # the generator is (A - Aᵀ)/2
        tensors = {f"{key}.oft_r": a}
        dense = torch.block_diag(*cayley((a - a.transpose(1, 2)).double() / 2))
        scale = None
        if dialect == "peft-0.13":
            dense, side = dense[:out_features, :out_features], "output"
        else:
            s = 1 + 0.1 * torch.randn(out_features, 1, generator=g)
            tensors[f"{key}.oft_s"], scale, side = s, s.reshape(-1).double(), "input"
        case = Case(parse_adapter(config, tensors), dense, side, scale)
    else:
        v = size * torch.randn(in_features // b, b * (b - 1) // 2, generator=g)
        q = skew(v, b)
        eye = torch.eye(b, dtype=torch.float64)
        if variant == "0.17 Neumann":
            blocks = eye + 2 * (q + q @ q + q @ q @ q + q @ q @ q @ q)
        elif variant == "0.21 Neumann":
            blocks = eye + 2 * (q + q @ q + q @ q @ q) + q @ q @ q @ q
        else:
            blocks = cayley(q)
        case = Case(parse_adapter(config, {f"{key}.oft_R.weight": v}), torch.block_diag(*blocks), "input")
    assert case.adapter.dialect == dialect
    return case


def fold(model: nn.Module, adapter: Any, **options: Any) -> Any:
    """`oftsurgery.fold`, rounding to nearest unless told otherwise, without its warning, which tests of its own cover."""
    if "calibration" not in options:
        options.setdefault("rounding", "nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        return oftsurgery.fold(model, adapter, **options)


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖ (Frobenius, float64)."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
