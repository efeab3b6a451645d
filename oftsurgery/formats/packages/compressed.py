"""compressed-tensors' layouts, as llm-compressor writes them: ``w = (code − zero) · scale``, with packed or plain integers or 8-bit
floats, and a scale for the tensor, a row, a group of inputs or a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import fp8
from .stored import (
    Entries,
    Grid,
    Quantiser,
    Read,
    Shape,
    Source,
    Stored,
    by_groups,
    check,
    damaged,
    matrix,
    packed,
    unknown,
    unpacked,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_SCALES = (torch.bfloat16, torch.float16, torch.float32)
_NAME = "compressed-tensors"
_REMEDY = f"save the model in one of the formats {', '.join(_FORMATS[:3])} with llm-compressor"


def weights(source: Source) -> dict[str, Stored]:
    """``{name of a weight: the stored weight}``.

    ====================  ==========================  ============================  =========================================
    layout                codes                       ``weight_scale``              further tensors
    ====================  ==========================  ============================  =========================================
    ``pack-quantized``    ``weight_packed`` int32     ``(out, groups)``             ``weight_shape``, ``weight_zero_point``
                                                                                    packed along the rows, ``weight_g_idx``
    ``int-quantized``     ``weight`` int8             ``()``, ``(out, 1)``,         ``weight_zero_point`` int8
                                                      ``(out, groups)``
    ``float-quantized``   ``weight`` 8-bit floats     as above, or blocks
    ====================  ==========================  ============================  =========================================
    """
    groups = source.settings.get("config_groups")
    schemes = [s for s in groups.values() if isinstance(s, Mapping)] if isinstance(groups, Mapping) else []
    for name in (source.settings.get("format") or "dense", *(s.get("format") for s in schemes)):
        if name is not None and name not in _FORMATS:
            unknown("format", name, _NAME, _REMEDY)
    if source.settings.get("transform_config"):
        unknown(
            "transform_config", "…", _NAME, "quantise the model without transforms, which rotate the activations too"
        )
    said: list[Any] = [s.get("weights") for s in schemes]
    blocks = [s.get("block_structure") for s in said if isinstance(s, Mapping)]
    block = next((tuple(b) for b in blocks if isinstance(b, (list, tuple)) and fp8.is_block(b)), None)
    found = {}
    for name, (dtype, _) in source.entries.items():
        path, _, local = name.rpartition(".")
        scale = f"{path}.weight_scale"
        if local == "weight_packed":
            found[f"{path}.weight"] = _packed(source.entries, path, said, source.read)
        elif local == "weight" and dtype in fp8.CODES:
            if scale not in source.entries:
                damaged("the weight in 8-bit floats has no scale beside it", name, _NAME)
            found[name] = fp8.stored(source.entries, name, scale, block, source.entries[scale][0], fp8.of_compressed)
        elif local == "weight" and dtype == torch.int8:
            found[name] = _plain(source.entries, path, scale, said)
    return found


def _scales(entries: Entries, name: str, shape: Shape, label: str) -> Shape:
    """``(rows or 1, groups)`` of the scales of a weight ``(out, in)``."""
    if name not in entries:
        damaged("a tensor of the quantised weight is missing", name, label)
    of = entries[name][1]
    of = (1, 1) if of in ((), (1,)) else of
    fits = len(of) == 2 and of[0] in (1, shape[0]) and of[1] > 0 and shape[1] % of[1] == 0
    if not fits or entries[name][0] not in _SCALES:
        damaged("the scales do not fit the weight", name, label, shape=entries[name][1], expected=(shape[0], "groups"))
    return of


def _packed(entries: Entries, path: str, said: list[Any], read: Read) -> Stored:
    tensors = {"weight": f"{path}.weight_packed", "scale": f"{path}.weight_scale", "shape": f"{path}.weight_shape"}
    for local in ("zero_point", "g_idx"):
        if f"{path}.weight_{local}" in entries:
            tensors[local] = f"{path}.weight_{local}"
    if tensors["shape"] not in entries or entries[tensors["shape"]][1] != (2,):
        damaged("a tensor of the quantised weight is missing", tensors["shape"], _NAME)
    shape = read(tensors["shape"])
    out, inputs = (int(n) for n in shape)
    dtype, stored = entries[tensors["weight"]][0], matrix(entries, tensors["weight"], _NAME)
    known = [s["num_bits"] for s in said if isinstance(s, Mapping) and type(s.get("num_bits")) is int]
    bits = next((b for b in known if 1 <= b <= 8 and stored == (out, -(-inputs * b // 32))), None)
    if dtype != torch.int32 or bits is None:
        damaged(f"the codes are not packed in {known} bits without padding", tensors["weight"], _NAME, shape=stored)
    label = f"compressed-tensors, {bits} bits"
    _, groups = of = _scales(entries, tensors["scale"], (out, inputs), label)
    if "zero_point" in tensors:
        words = entries[tensors["zero_point"]][0] == torch.int32
        rows = -(-of[0] * bits // 32) if words else of[0]
        check(entries, tensors["zero_point"], (torch.int32, torch.int8), (rows, groups), label)
    if "g_idx" in tensors:
        check(entries, tensors["g_idx"], (torch.int32, torch.int64), (inputs,), label)
    decode = partial(_decode_packed, bits=bits, shape=(out, inputs), name=path)
    quantiser = _quantiser(
        _Layout(bits, of, (out, inputs), {n: entries[full] for n, full in tensors.items()}, shape), said
    )
    dtype = entries[tensors["scale"]][0]
    return Stored(tensors, (out, inputs), dtype, label + _grouping(of, inputs), decode, quantiser)


def _grouping(of: Shape, inputs: int) -> str:
    if of[1] > 1:
        return f", groups of {inputs // of[1]}"
    return ", one scale" if of[0] == 1 else ", a scale for each row"


def _decode_packed(tensors: Mapping[str, Tensor], *, bits: int, shape: Shape, name: str) -> Tensor:
    middle = 1 << (bits - 1)
    scale = tensors["scale"].reshape(-1, tensors["scale"].shape[-1] if tensors["scale"].ndim == 2 else 1)
    codes = unpacked(tensors["weight"], bits, shape[1])
    zero = torch.full_like(scale, middle, dtype=torch.int16)
    if "zero_point" in tensors:
        zero = tensors["zero_point"].to(torch.int16) + middle  # as older releases write it
        if tensors["zero_point"].dtype == torch.int32:
            zero = unpacked(tensors["zero_point"].t().contiguous(), bits, len(scale)).t()
    return _values(codes, scale, zero, tensors.get("g_idx"), name)


def _plain(entries: Entries, path: str, scale: str, said: list[Any]) -> Stored:
    tensors = {"weight": f"{path}.weight", "scale": scale}
    shape = entries[tensors["weight"]][1]
    label = "compressed-tensors, 8 bits"
    matrix(entries, tensors["weight"], label)
    of = _scales(entries, scale, shape, label)
    for local in ("zero_point", "g_idx"):
        if f"{path}.weight_{local}" in entries:
            tensors[local] = f"{path}.weight_{local}"
    if "zero_point" in tensors:
        check(entries, tensors["zero_point"], (torch.int8,), entries[scale][1], label)
    if "g_idx" in tensors:
        check(entries, tensors["g_idx"], (torch.int32, torch.int64), (shape[1],), label)
    quantiser = _quantiser(_Layout(8, of, shape, {n: entries[full] for n, full in tensors.items()}), said)
    decode = partial(_decode_plain, name=path)
    return Stored(tensors, shape, entries[scale][0], label + _grouping(of, shape[1]), decode, quantiser)


def _decode_plain(tensors: Mapping[str, Tensor], *, name: str) -> Tensor:
    width = tensors["scale"].shape[-1] if tensors["scale"].ndim == 2 else 1
    scale, zero = tensors["scale"].reshape(-1, width), tensors.get("zero_point")
    zero = None if zero is None else zero.to(torch.int16).reshape(-1, width)
    return _values(tensors["weight"], scale, zero, tensors.get("g_idx"), name)


def _values(codes: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor | None, name: str) -> Tensor:
    """``(code − zero) · scale`` of codes ``(out, in)`` and of scales and zeros ``(out or 1, groups)``."""
    return by_groups(codes, zero, scale, index, codes.shape[1] // scale.shape[1], f"{name}.weight_g_idx")


def idle(entries: Entries) -> Iterator[str]:
    """Names of tensors that only quantised activations need."""
    return (name for name in entries if name.endswith((*fp8.IDLE, ".input_zero_point", ".output_zero_point")))


# --- quantising -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Layout:
    """How the integers of one weight are stored.

    Attributes:
        bits: bits of a code.
        of: ``(rows or 1, groups)`` of the scales.
        weight: ``(out, in)``.
        entries: ``{local name: (dtype, shape)}``.
        shape: the tensor ``weight_shape`` of packed codes; None for codes that are not packed.
    """

    bits: int
    of: Shape
    weight: Shape
    entries: Entries
    shape: Tensor | None = None


def _quantiser(layout: _Layout, said: list[Any]) -> Quantiser | None:
    """The package's quantiser; None for layouts that compressed-tensors 0.20 reads no longer, or whose scales are rounded further."""
    schemes = [s for s in said if isinstance(s, Mapping) and s.get("num_bits") == layout.bits]
    symmetric = {bool(s.get("symmetric", True)) for s in schemes}
    zeros, of = layout.entries.get("zero_point"), layout.of
    old = "g_idx" in layout.entries or (layout.shape is not None and zeros is not None and zeros[0] != torch.int32)
    unclear = (zeros is not None and len(symmetric) != 1) or (of[0] != layout.weight[0] and of != (1, 1))
    if old or unclear or not schemes or any(s.get("scale_dtype") for s in schemes):
        return None
    return _Quantiser(layout, centred=zeros is None or True in symmetric)


@dataclass(frozen=True, eq=False)
class _Quantiser(Quantiser):
    """Attributes:
    centred: whether the package's scheme is symmetric.
    """

    layout: _Layout
    centred: bool

    @property
    def bits(self) -> int:  # type: ignore[override]  # of a field of the parent
        return 8 if self.layout.shape is None else self.layout.bits

    @property
    def bounds(self) -> tuple[int, int]:  # type: ignore[override]  # of a field of the parent
        half = 1 << (self.layout.bits - 1)
        return -half, half - 1

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The range of each group, in which zero lies, gives its scale and its zero."""
        layout, (bottom, top) = self.layout, self.bounds
        low, high = torch.aminmax(values.reshape(*layout.of, -1), dim=-1)
        low, high = low.clamp(max=0), high.clamp(min=0)  # (out or 1, groups)
        if self.centred:
            scale, zero = torch.maximum(-low, high) / ((top - bottom) / 2), torch.zeros_like(low)
        else:
            scale = (high - low) / (top - bottom)
            zero = torch.round((bottom - low / scale).clamp(bottom, top)).nan_to_num()
        dtype, shape = layout.entries["scale"]
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale).to(dtype)
        made = {"scale": scale.reshape(shape)}
        if "zero_point" in layout.entries:
            made["zero_point"] = self._zero_point(zero.to(torch.int8))
        if layout.shape is not None:
            made["shape"] = layout.shape
        return {"weight": self.stored(self.grid(made).nearest(values)), **made}

    def grid(self, tensors: Mapping[str, Tensor]) -> Grid:
        of, zero = self.layout.of, tensors.get("zero_point")
        if zero is not None and zero.dtype == torch.int32:
            zero = unpacked(zero.t().contiguous(), self.layout.bits, of[0]).t().to(torch.int16) + self.bounds[0]
        size = self.layout.weight[1] // of[1]

        def wide(numbers: Tensor) -> Tensor:  # (out or 1, in)
            return numbers.to(torch.float32).reshape(of).repeat_interleave(size, 1)

        return Grid(wide(tensors["scale"]), None if zero is None else wide(zero), self.bounds)

    def stored(self, numbers: Tensor) -> Tensor:
        return numbers.to(torch.int8) if self.layout.shape is None else packed(numbers - self.bounds[0], self.bits)

    def _zero_point(self, zero: Tensor) -> Tensor:
        dtype, shape = self.layout.entries["zero_point"]
        if dtype != torch.int32:
            return zero.reshape(shape)
        return packed((zero.to(torch.int32) - self.bounds[0]).t(), self.layout.bits).t().contiguous()
