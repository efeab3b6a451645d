"""HQQ's layout, as the package hqq and transformers save it: ``w = (code − zero) · scale`` over groups of a flat weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .stored import Entries, Grid, Quantiser, Source, Stored, check, damaged, groups_of

#: ``{packing: (codes in a word, bits of a code, dtype of a word)}``; the codes of a word lie far apart, in equal parts of the rows
_PACKING = {
    "8bit_u8": (1, 8, torch.uint8),
    "4bit_u8": (2, 4, torch.uint8),
    "3bit_32": (10, 3, torch.int32),
    "2bit_u8": (4, 2, torch.uint8),
    "1bit_u8": (8, 1, torch.uint8),
}
_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
#: tensors beside ``W_q`` that say how the weight is stored
_FACTS = ("shape", "nbits", "group_size", "axis", "packing", "compute_dtype")
_MORE = (
    "quant_zero", "quant_scale", "view_as_float", "unpack_view_dtype", "offload_meta", "encoded_state_dict", "channel_wise", "optimize",
    "round_zero", "stores_quant_config",
)  # fmt: skip
_MOST = 64  # entries of a tensor of facts


def weights(source: Source) -> dict[str, Stored]:
    """``{name of a weight: the stored weight}``."""
    found = {}
    for path, tensors in groups_of(source.entries, "W_q", ("scale", "zero", *_FACTS), "hqq"):
        more = {local: f"{path}.{local}" for local in _MORE if f"{path}.{local}" in source.entries}
        large = next(
            (n for n in (*more.values(), *(tensors[f] for f in _FACTS)) if _size(source.entries, n) > _MOST), None
        )
        if large is not None:
            damaged("a tensor that says how the weight is stored is too large", large, "hqq")
        facts = {
            local: source.read(n) for local, n in (tensors | more).items() if local not in ("W_q", "scale", "zero")
        }
        codes = {"weight": tensors.pop("W_q")}
        found[f"{path}.weight"] = _stored(source.entries, codes | tensors | more, facts)
    return found


def _size(entries: Entries, name: str) -> int:
    return math.prod(entries[name][1])


def _stored(entries: Entries, tensors: Mapping[str, str], facts: Mapping[str, Tensor]) -> Stored:
    name = tensors["weight"]
    for fact in ("quant_zero", "quant_scale"):
        if fact in facts and bool(facts[fact].any()):
            damaged("the scales or zeros are quantised too, which hqq's own files cannot hold", tensors[fact], "hqq")
    packing, compute = (_text(facts[fact]) for fact in ("packing", "compute_dtype"))
    group, axis, nbits = (_number(facts[fact]) for fact in ("group_size", "axis", "nbits"))
    group, axis = int(group), int(axis)
    shape: Any = tuple(facts["shape"].reshape(-1).tolist())
    per_word, bits, word = _PACKING.get(packing, (0, 0, torch.uint8))
    n = math.prod(shape)
    if (
        not per_word
        or compute not in _DTYPES
        or axis not in (0, 1)
        or len(shape) != 2
        or min(shape) <= 0
        or group <= 0
        or n % group
    ):
        damaged("the tensors beside the weight do not say a layout of hqq", name, "hqq")
    dtype = _DTYPES[compute]
    label = f"hqq, {nbits:g} bits, groups of {group} along axis {axis}"
    matrix = (group, n // group) if axis == 0 else (n // group, group)
    stored = (-(-matrix[0] // per_word), matrix[1])
    if matrix[0] % per_word and bits != 3:
        damaged("the codes do not fill the words", name, label, shape=matrix)
    if "view_as_float" in facts and bool(facts["view_as_float"].any()):
        itemsize = entries[name][0].itemsize
        if math.prod(entries[name][1]) * itemsize != math.prod(stored) * word.itemsize:
            damaged("the codes do not have the size that the layout says", name, label)
    else:
        check(entries, name, (word,), stored, label)
    for local in ("scale", "zero"):
        # without channel_wise, one scale stands for the whole weight
        one = _size(entries, tensors[local]) == 1
        scales = (1, matrix[1]) if axis == 0 else (matrix[0], 1)
        check(entries, tensors[local], (dtype,), entries[tensors[local]][1] if one else scales, label)
    layout = _Layout(packing, matrix, stored, shape, dtype, axis, round(2**nbits - 1), facts)
    quantiser = None
    if layout.flag("channel_wise", default=True):
        quantiser = _Quantiser(layout, bits)
    return Stored(tensors, shape, dtype, label, partial(_decode, layout), quantiser)


def _number(fact: Tensor) -> float:
    """The number in a tensor; 0 for a tensor without a finite number."""
    number = float(fact.reshape(-1)[0]) if fact.numel() else 0.0
    return number if math.isfinite(number) else 0.0


def _text(codes: Tensor) -> str:
    return bytes(codes.reshape(-1).to(torch.uint8).tolist()).decode("ascii", "replace")


@dataclass(frozen=True, eq=False)
class _Layout:
    """How one weight is stored.

    Attributes:
        packing: key of ``_PACKING``.
        matrix: rows and columns of the codes before they are packed; a column (``axis`` 0) or a row (1) is a group.
        stored: rows and columns of the words.
        shape: ``(out, in)`` of the weight.
        dtype: dtype of the scales, the zeros and the dequantised values.
        top: the largest code.
        facts: the tensors that say all this.
    """

    packing: str
    matrix: tuple[int, int]
    stored: tuple[int, int]
    shape: tuple[int, int]
    dtype: torch.dtype
    axis: int
    top: int
    facts: Mapping[str, Tensor]

    def flag(self, name: str, *, default: bool) -> bool:
        return bool(self.facts[name].any()) if name in self.facts else default


def _decode(layout: _Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    per_word, bits, word = _PACKING[layout.packing]
    words = tensors["weight"].contiguous().view(word).reshape(layout.stored)
    shifts = [bits * (per_word - 1 - i) for i in range(per_word)]
    codes = torch.cat([words >> shift & ((1 << bits) - 1) for shift in shifts])[: layout.matrix[0]]
    # hqq computes in its dtype, and so rounds twice
    return ((codes.to(layout.dtype) - tensors["zero"]) * tensors["scale"]).reshape(layout.shape)


# --- quantising -------------------------------------------------------------------------------------------------------

# hqq's own settings of its search for the zeros
_NORM, _BETA, _STEPS = 0.7, 10.0, 20
_LEAST_RANGE, _MOST_FACTOR = 1e-4, 2e4


@dataclass(frozen=True, eq=False)
class _Quantiser(Quantiser):
    layout: _Layout
    bits: int

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The range of a group gives its scale, and a search that needs no data gives its zero."""
        layout = self.layout
        w = values.reshape(layout.matrix)
        low, high = w.amin(layout.axis, keepdim=True), w.amax(layout.axis, keepdim=True)
        span = high - low
        factor = torch.where(span.abs() <= _LEAST_RANGE, 1.0, layout.top / span).clamp(max=_MOST_FACTOR)
        zero = -low * factor
        zero = torch.round(zero) if layout.flag("round_zero", default=layout.top == 15) else zero
        if layout.flag("optimize", default=True):
            zero = _best_zero(w, factor, zero, layout)
        numbers = torch.round(w * factor + zero).clamp_(0, layout.top)
        statistics = {"scale": (1.0 / factor).to(layout.dtype), "zero": zero.to(layout.dtype)}
        return {"weight": self.stored(numbers), **statistics, **layout.facts}

    @property
    def bounds(self) -> tuple[int, int]:  # type: ignore[override]  # of a field of the parent
        return 0, self.layout.top

    def grid(self, tensors: Mapping[str, Tensor]) -> Grid:
        layout = self.layout
        scale, zero = (
            tensors[n].to(torch.float32).expand(layout.matrix).reshape(layout.shape) for n in ("scale", "zero")
        )
        return Grid(scale, zero, self.bounds)

    def stored(self, numbers: Tensor) -> Tensor:
        return _pack(numbers.reshape(self.layout.matrix), self.layout)


def _best_zero(w: Tensor, factor: Tensor, zero: Tensor, layout: _Layout) -> Tensor:
    """Zeros with which the errors are small in the norm 0.7, by half-quadratic splitting (Badri and Shaji, 2023)."""
    best = math.inf
    for _ in range(_STEPS):
        codes = torch.round(w * factor + zero).clamp_(0, layout.top)
        error = w - (codes - zero) / factor
        size = error.abs()
        # the mean in float64 does not depend on the number of threads
        mean = float(size.mean(dtype=torch.float64).to(torch.float32))
        outliers = (size - (1.0 / _BETA) * size.pow(_NORM - 1)).clamp_min_(0.0) * torch.sign(error)
        zero = torch.mean(codes - (w - outliers) * factor, dim=layout.axis, keepdim=True)
        if mean >= best:
            break
        best = mean
    return zero


def _pack(codes: Tensor, layout: _Layout) -> Tensor:
    per_word, bits, word = _PACKING[layout.packing]
    rows = layout.stored[0]
    whole = torch.nn.functional.pad(codes.to(word), (0, 0, 0, rows * per_word - len(codes)))
    words = torch.zeros(layout.stored, dtype=word, device=codes.device)
    for i, part in enumerate(whole.reshape(per_word, rows, -1)):
        words |= part << bits * (per_word - 1 - i)
    return words.view(layout.dtype) if layout.flag("view_as_float", default=False) else words
