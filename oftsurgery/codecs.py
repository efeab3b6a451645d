"""Storage formats of weights: dense, NF4, FP4 and int8, as pure functions of tensors.

Each codec is a pair of mirrored functions in :data:`CODECS`: ``decode`` gives the exact float32 weight that the stored
tensors stand for (not rounded to a compute dtype), ``encode`` gives what bitsandbytes' own quantiser gives for the same
float32 weight, or with ``rounding="mse"`` what errs least of all that the 4-bit format can hold. Tensor names are
local, as behind a checkpoint's ``<module>.``/``<module>.weight.`` prefix; only the planner knows module paths. These
are the readable reference: correctness first.

4-bit (Dettmers et al. 2023, "QLoRA"): flat blocks of ``blocksize`` over the row-major weight, so that a block straddles
rows where ``in`` is no multiple; two codes a byte, the first in the high nibble; each block scaled by its absmax.
Double quantisation stores the absmax itself as uint8 in blocks of 256 around their mean. Int8 (Dettmers et al. 2022,
"LLM.int8()"): one scale a row, ``W = weight · SCB / 127``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import FormatError, NonFiniteError, ShapeError, StateError, printable
from .hashing import hash_tensors

__all__ = [
    "CODECS",
    "ROUNDINGS",
    "Codec",
    "EncodedWeight",
    "Rounding",
    "WeightFormat",
    "check_4bit",
    "check_rounding",
    "decode",
    "decode_absmax",
    "dense",
    "encode",
    "restate",
    "rounding_of",
    "unpack_cpu_layout",
]


#: how quantised weights are rounded: so that what a rotation did is kept, as bitsandbytes does, or with a scale of each
#: 4-bit block that errs less or least
Rounding = Literal["preserve", "nearest", "grid", "mse"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

_RELOAD = "reload the model: part of its quantisation state is damaged"


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored.

    Attributes:
        codec: key of :data:`CODECS`: ``"dense"``, ``"nf4"``, ``"fp4"``, ``"int8"``.
        shape: logical shape, ``(out, in)`` for a linear.
        dtype: of the stored values (dense), or that bitsandbytes dequantises to (``quant_state.dtype``; float16 for
            int8).
        blocksize: weights a 4-bit block; 0 elsewhere.
        nested_blocksize: absmax values a block of the double quantisation; 0 where there is none.
        storage: dtype in which the packed 4-bit bytes are held (``quant_storage``; FSDP wants a float one).
    """

    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    blocksize: int = 0
    nested_blocksize: int = 0
    storage: torch.dtype = torch.uint8

    @property
    def quantised(self) -> bool:
        return self.codec != "dense"

    @property
    def label(self) -> str:
        """``"nf4"``, ``"nf4 (double quantisation)"``, ``"int8"``, ``"float16"`` …"""
        if self.codec == "dense":
            return str(self.dtype).removeprefix("torch.")
        return f"{self.codec} (double quantisation)" if self.nested_blocksize else self.codec


@dataclass(frozen=True, eq=False)
class EncodedWeight:
    """A weight as stored: its format and its tensors under their local names.

    ======  =====================================================================================================================================
    codec   tensors
    ======  =====================================================================================================================================
    dense   ``weight`` of ``shape``
    4-bit   ``weight`` (packed codes, ``(⌈n/2⌉, 1)`` uint8 or as ``storage``), ``absmax`` (one a block: float32, or uint8 with double quantisation),
            ``quant_map`` (16,), and with double quantisation ``nested_absmax``, ``nested_quant_map`` (256,),
            ``nested_offset`` ()
    int8    ``weight`` ``(out, in)`` int8, ``SCB`` ``(out,)`` float32
    ======  =====================================================================================================================================
    """

    format: WeightFormat
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @property
    def fingerprint(self) -> str:
        """Content hash of the tensors, :func:`~oftsurgery.hashing.hash_tensors`."""
        return hash_tensors(self.tensors)


@dataclass(frozen=True)
class Codec:
    """A storage format's two directions and the names of its tensors."""

    decode: Callable[[EncodedWeight], Tensor]
    encode: Callable[[Tensor, WeightFormat, str], dict[str, Tensor]]


def dense(weight: Tensor) -> EncodedWeight:
    """A plain tensor as an :class:`EncodedWeight`."""
    return EncodedWeight(WeightFormat("dense", tuple(weight.shape), weight.dtype), {"weight": weight})


def decode(encoded: EncodedWeight) -> Tensor:
    """The exact weight that ``encoded`` stands for, as a new tensor of ``format.shape``.

    Returns:
        float32 (float64 for a float64 dense weight), on the device of the stored tensors.

    Raises:
        FormatError: tensors are missing, or do not agree with the format.
        NonFiniteError: a value is NaN or infinite.
    """
    weight = _codec(encoded.format).decode(encoded)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            "the stored weight holds NaN or infinity",
            format=encoded.format.label,
            remedy="reload the base model: its file or memory is damaged",
        )
    return weight


def check_rounding(rounding: str) -> None:
    """
    Raises:
        StateError: ``rounding`` is none of :data:`ROUNDINGS`.
    """
    if rounding not in ROUNDINGS:
        raise StateError(f"unknown rounding {printable(rounding)!r}", remedy=" or ".join(map(repr, ROUNDINGS)))


def rounding_of(format: WeightFormat, rounding: str) -> str:
    """``rounding``, or ``"nearest"`` where it has no part in ``format``: ``"grid"`` and ``"mse"`` are of the 4-bit formats,
    ``"preserve"`` of int8 too.
    """
    if not format.quantised or (format.codec == "int8" and rounding != "preserve"):
        return "nearest"
    return rounding


def encode(weight: Tensor, format: WeightFormat, rounding: str = "nearest") -> EncodedWeight:
    """``weight`` stored in ``format``.

    Args:
        weight: of ``format.shape``, floating point; read as float32 (dense: as it is).
        rounding: ``"nearest"``: the codes and statistics of bitsandbytes' own quantiser. ``"mse"``: each 4-bit block is
            scaled by what makes its squared error least, in place of its absmax; ``"grid"``: by nearly that, found
            faster; ``"preserve"``, which needs the weight before a rotation, is that too. The other formats round to
            nearest.

    Raises:
        StateError: an unknown rounding.
        ShapeError: ``weight`` is not of ``format.shape``.
        NonFiniteError: the weight, or its dense narrowing (float16 overflow), is not finite.
    """
    if tuple(weight.shape) != format.shape:
        raise ShapeError(
            "the weight does not have its format's shape",
            shape=tuple(weight.shape),
            expected=format.shape,
            format=format.label,
            remedy="reshape it, or give the format of this weight",
        )
    check_rounding(rounding)
    tensors = _codec(format).encode(weight, format, rounding)
    return EncodedWeight(format, tensors)


def _codec(format: WeightFormat) -> Codec:
    try:
        return CODECS[format.codec]
    except KeyError:
        raise FormatError(
            f"unknown storage format; known are {', '.join(CODECS)}", format=format.codec, remedy="use one of those"
        ) from None


def _require(encoded: EncodedWeight, *names: str) -> list[Tensor]:
    missing = [n for n in names if n not in encoded.tensors]
    if missing:
        raise FormatError(f"the stored weight lacks {', '.join(missing)}", format=encoded.format.label, remedy=_RELOAD)
    return [encoded.tensors[n] for n in names]


def _finite(weight: Tensor, what: str, format: WeightFormat) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            what, format=format.label, remedy="fold into a wider format, or check the adapter with a smaller scale"
        )


# --- dense ------------------------------------------------------------------------------------------------------------


def _decode_dense(encoded: EncodedWeight) -> Tensor:
    (weight,) = _require(encoded, "weight")
    if not weight.is_floating_point():
        raise FormatError(
            f"a dense weight must be floating point, this is {weight.dtype}", remedy="dequantise it first"
        )
    if tuple(weight.shape) != encoded.format.shape:
        raise ShapeError(
            "the stored weight does not have its format's shape",
            shape=tuple(weight.shape),
            expected=encoded.format.shape,
            remedy=_RELOAD,
        )
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _encode_dense(weight: Tensor, format: WeightFormat, _rounding: str) -> dict[str, Tensor]:
    stored = weight.to(format.dtype)
    _finite(stored, f"the weight is not finite in {format.label}", format)
    return {"weight": stored}


# --- 4-bit ------------------------------------------------------------------------------------------------------------

# Levels as bitsandbytes' kernels hold them, before its own scaling by the largest: `get_4bit_type` of 0.41 to 0.50
_LEVELS: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0),
}


#: bitsandbytes' bound under absmax
_TINY = 1e-38


@cache
def levels_of(codec: str, device: torch.device) -> Tensor:
    """The 16 levels, (16,) float32 in [-1, 1], by code."""
    levels = torch.tensor(_LEVELS[codec], dtype=torch.float32, device=device)
    return levels / levels.abs().max()


@cache
def bounds_of(codec: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between the sorted levels (15,), and the code of each sorted level (16,)."""
    levels = levels_of(codec, device)
    order = torch.argsort(levels)
    return (levels[order[:-1]] + levels[order[1:]]) / 2, order


@cache
def _byte_table(codec: str, device: torch.device) -> Tensor:
    """(256, 2) float32: a packed byte to its two levels, first code in the high nibble."""
    byte = torch.arange(256, device=device)
    levels = levels_of(codec, device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=-1)


def blocks_of(flat: Tensor, blocksize: int) -> Tensor:
    """``(n,)`` → ``(⌈n/blocksize⌉, blocksize)``, zero-padded."""
    rest = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat, (0, rest)).reshape(-1, blocksize) if rest else flat.reshape(-1, blocksize)


def decode_absmax(encoded: EncodedWeight) -> Tensor:
    (absmax,) = _require(encoded, "absmax")
    f = encoded.format
    if not f.nested_blocksize:
        if not absmax.is_floating_point():
            raise FormatError(
                "absmax is quantised, but its nested statistics are missing",
                tensor="absmax",
                format=f.label,
                remedy=_RELOAD,
            )
        return absmax.reshape(-1).to(torch.float32)
    nested_absmax, nested_map, offset = _require(encoded, "nested_absmax", "nested_quant_map", "nested_offset")
    for name, tensor, expected in (
        ("nested_quant_map", nested_map, 256),
        ("nested_absmax", nested_absmax, -(-absmax.numel() // f.nested_blocksize)),
    ):
        if tensor.numel() != expected:
            raise ShapeError(
                f"{name} does not hold what absmax needs",
                tensor=name,
                shape=(tensor.numel(),),
                expected=(expected,),
                format=f.label,
                remedy=_RELOAD,
            )
    values = torch.index_select(nested_map.to(torch.float32), 0, absmax.reshape(-1).to(torch.int32))
    scaled = blocks_of(values, f.nested_blocksize) * nested_absmax.reshape(-1, 1).to(torch.float32)
    return scaled.reshape(-1)[: absmax.numel()] + offset.to(device=absmax.device, dtype=torch.float32)


def check_4bit(encoded: EncodedWeight, packed: Tensor, absmax: Tensor) -> None:
    f = encoded.format
    n = math.prod(f.shape)
    if packed.numel() != -(-n // 2):
        raise ShapeError(
            "the packed codes do not hold the weight's elements",
            tensor="weight",
            shape=(packed.numel(),),
            expected=(-(-n // 2),),
            format=f.label,
            remedy=_RELOAD,
        )
    if f.blocksize < 2 or absmax.numel() != -(-n // f.blocksize):
        raise ShapeError(
            f"absmax does not hold one value a block of {f.blocksize}",
            tensor="absmax",
            shape=(absmax.numel(),),
            expected=(-(-n // max(f.blocksize, 1)),),
            format=f.label,
            remedy=_RELOAD,
        )
    quant_map = encoded.tensors.get("quant_map")
    if quant_map is not None:
        levels = levels_of(f.codec, quant_map.device)
        if quant_map.shape != levels.shape or not torch.allclose(
            quant_map.to(torch.float32), levels, rtol=0, atol=1e-3
        ):
            raise FormatError(
                "quant_map is not the format's own; bitsandbytes' kernels ignore it and would decode something else",
                tensor="quant_map",
                format=f.label,
                remedy="quantise the model again with a stock bitsandbytes",
            )


def _decode_4bit(encoded: EncodedWeight) -> Tensor:
    f = encoded.format
    packed, absmax = _require(encoded, "weight", "absmax")
    packed = packed.detach().contiguous().reshape(-1).view(torch.uint8)
    check_4bit(encoded, packed, absmax)
    n = math.prod(f.shape)
    values = _byte_table(f.codec, packed.device)[packed.to(torch.int64)].reshape(-1)[:n]
    # flat, never by rows: a block may straddle them (bitsandbytes 0.50's own CPU kernel gets in = 96 with blocksize 64
    # wrong)
    return (blocks_of(values, f.blocksize) * decode_absmax(encoded).reshape(-1, 1)).reshape(-1)[:n].reshape(f.shape)


def _encode_4bit(weight: Tensor, f: WeightFormat, rounding: str) -> dict[str, Tensor]:
    flat = weight.detach().to(torch.float32).reshape(-1)
    _finite(flat, "the weight to quantise is not finite", f)
    if rounding != "nearest":
        scales = best_scales(flat, f) if rounding == "mse" else grid_scales(flat, f)
        statistics = encode_absmax(scales, f)
        if f.nested_blocksize:  # codes for what the reader will see
            scales = decode_absmax(EncodedWeight(f, statistics))
        return {
            "weight": as_storage(scaled_codes(flat, scales, f), f),
            "quant_map": levels_of(f.codec, flat.device).clone(),
            **statistics,
        }
    n = flat.numel()
    whole = n - n % f.blocksize
    rows = flat[:whole].reshape(-1, f.blocksize)
    absmax = rows.abs().amax(-1)
    scaled = (rows * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(-1)).reshape(-1)
    if whole < n:
        # bitsandbytes treats the short last block a little differently: its absmax itself is bounded, and divides
        last = flat[whole:].abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, last.reshape(1)])
        scaled = torch.cat([scaled, flat[whole:] / last])
    return {
        "weight": as_storage(_packed(scaled, f.codec), f),
        "quant_map": levels_of(f.codec, flat.device).clone(),
        **encode_absmax(absmax, f),
    }


def nearest_levels(scaled: Tensor, codec: str) -> Tensor:
    """The levels nearest to values in units of their scale, in the same units."""
    if codec == "int8":
        return torch.round(scaled * 127.0).clamp(-127, 127) / 127.0
    bounds, order = bounds_of(codec, scaled.device)
    return levels_of(codec, scaled.device)[order][torch.bucketize(scaled.clamp(-1, 1), bounds, out_int32=True)]


def _packed(scaled: Tensor, codec: str) -> Tensor:
    """The nearest codes of ``(n,)`` values in units of their scale, packed ``(⌈n/2⌉, 1)``."""
    bounds, order = bounds_of(codec, scaled.device)
    return _pack(order[torch.bucketize(scaled.clamp(-1, 1), bounds, out_int32=True)].to(torch.uint8), codec)


def _pack(codes: Tensor, codec: str) -> Tensor:
    """``(n,)`` codes two a byte, ``(⌈n/2⌉, 1)``; an odd last one beside that of zero."""
    if codes.numel() % 2:
        bounds, order = bounds_of(codec, codes.device)
        codes = torch.cat([codes, order[torch.bucketize(bounds.new_zeros(1), bounds)].to(torch.uint8)])
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)


def scaled_codes(flat: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
    """Packed codes ``(⌈n/2⌉, 1)`` of float32 weights ``(n,)``: the levels nearest to them when block k is scaled by
    ``scales[k]``, whatever that is.
    """
    rows, s = blocks_of(flat, f.blocksize), scales.unsqueeze(-1)
    scaled = torch.where(s.abs() >= _TINY, rows * (1.0 / s), rows / s)  # where 1/s overflows, divide
    return _packed(torch.where(s != 0, scaled, 0.0).reshape(-1)[: flat.numel()], f.codec)


#: scales that :func:`grid_scales` tries, in units of absmax
GRID = (0.8, 0.84, 0.87, 0.9, 0.93, 0.96, 1.0, 1.03, 1.06, 1.1, 1.15, 1.25, 1.36, 1.42, 1.5)


def grid_scales(flat: Tensor, f: WeightFormat) -> Tensor:
    """A good scale of each 4-bit block: of :data:`GRID` the one that errs least, and then the best for its codes, S/Q.

    Args and result as of :func:`best_scales`; never worse than the absmax.
    """
    blocks = blocks_of(flat, f.blocksize)
    bounds, order = bounds_of(f.codec, flat.device)
    levels = levels_of(f.codec, flat.device)[order]
    absmax = blocks.abs().amax(-1, keepdim=True)
    x = torch.where(absmax >= _TINY, blocks * (1.0 / absmax), blocks / absmax).nan_to_num(0.0)
    usable = absmax < torch.finfo(torch.float32).max / GRID[-1]
    best = best_error = None
    for ratio in (1.0, *GRID):  # the absmax itself where two are as good
        codes = levels[torch.bucketize(x / ratio, bounds)]
        error = (codes * ratio - x).square().sum(-1, keepdim=True)
        power = codes.square().sum(-1, keepdim=True)
        scale = (codes * x).sum(-1, keepdim=True) / power
        if best is None or best_error is None:
            best, best_error = scale, error
        better = usable & (error < best_error)
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    assert best is not None  # noqa: S101 - the grid is not empty
    scales = (best * absmax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(absmax > 0, scales, 0.0).squeeze(-1)


_SCAN_WEIGHTS = 1 << 16


def best_scales(flat: Tensor, f: WeightFormat) -> Tensor:
    """The positive scale of each 4-bit block that makes its squared error least, exactly: ``(n,)`` weights to
    ``(⌈n/blocksize⌉,)``, float32. 0 for a block of zeros.

    With the codes fixed, the best scale is S/Q and takes S²/Q off Σw², where S = Σwc and Q = Σc² over the levels c. The
    nearest codes change only where a weight crosses a threshold t between two levels, at s = w/t: the best of all
    scales is the S/Q of one of the states between these breakpoints, and all of them are looked at, in order.
    """
    blocks = blocks_of(flat, f.blocksize)
    step = max(1, _SCAN_WEIGHTS // f.blocksize)
    return torch.cat([_scan(part, f.codec) for part in torch.split(blocks, step)])


def _scan(blocks: Tensor, codec: str) -> Tensor:
    """``(k, blocksize)`` to ``(k,)``: see :func:`best_scales`."""
    w = blocks.to(torch.float64)
    bounds, order = bounds_of(codec, w.device)
    levels = levels_of(codec, w.device)[order].to(torch.float64)
    # a bound below zero is crossed by negative weights alone, and the level farther from zero is the one before it; FP4
    # has two zeros, with none between them
    real = bounds != 0
    t, low, high = bounds[real].to(torch.float64), levels[:-1][real], levels[1:][real]
    outer, inner = torch.where(t > 0, high, low), torch.where(t > 0, low, high)
    crossing = (w.unsqueeze(-1) / t).flatten(1)
    crossing[crossing <= 0] = torch.inf
    crossing, at = crossing.sort(-1)
    # from the smallest scales, where each weight has its outermost level, on
    first = torch.where(w > 0, levels[-1], torch.where(w < 0, levels[0], 0.0))
    never = crossing == torch.inf
    s_change = (w.unsqueeze(-1) * (inner - outer)).flatten(1).gather(-1, at).masked_fill(never, 0.0)
    q_change = (inner.square() - outer.square()).expand(*w.shape, -1).flatten(1).gather(-1, at).masked_fill(never, 0.0)
    s = torch.cat([(w * first).sum(-1, keepdim=True), s_change], -1).cumsum(-1)
    q = torch.cat([first.square().sum(-1, keepdim=True), q_change], -1).cumsum(-1)
    # past the last crossing all codes are zero: what is left there is what the sums were rounded by
    scale = s / q
    usable = (q > levels.abs()[levels != 0].min() ** 2 / 2) & (scale <= torch.finfo(torch.float32).max)
    gain = torch.where(usable, s * scale, 0.0)
    best = gain.argmax(-1, keepdim=True)
    return torch.where(gain.gather(-1, best) > 0, scale.gather(-1, best), 0.0).squeeze(-1).to(torch.float32)


def as_storage(packed: Tensor, f: WeightFormat) -> Tensor:
    """Packed bytes ``(⌈n/2⌉, 1)`` as the dtype that holds them."""
    if f.storage == torch.uint8:
        return packed
    if packed.numel() % f.storage.itemsize:
        raise FormatError(
            f"{packed.numel()} packed bytes are no whole number of {f.storage}",
            format=f.label,
            remedy="use quant_storage=torch.uint8",
        )
    return packed.reshape(-1).view(f.storage).unsqueeze(1)


def encode_absmax(absmax: Tensor, f: WeightFormat) -> dict[str, Tensor]:
    if not f.nested_blocksize:
        return {"absmax": absmax}
    # bitsandbytes' own function: its CPU kernel looks codes up in a coarse table, one step off the nearest in 0.2 % of
    # the cases
    from bitsandbytes.functional import quantize_blockwise

    offset = absmax.mean()
    _finite(offset, "the mean of absmax, which double quantisation stores, is not finite", f)
    codes, state = quantize_blockwise(absmax - offset, blocksize=f.nested_blocksize)
    return {
        "absmax": codes,
        "nested_absmax": state.absmax,
        "nested_quant_map": state.code.clone(),
        "nested_offset": offset,
    }


def restate(encoded: EncodedWeight, into: WeightFormat) -> dict[str, Tensor]:
    """The tensors of a 4-bit or int8 weight in a format that differs in the storage of its codes and statistics alone:
    no code changes.
    """
    t = dict(encoded.tensors)
    if encoded.format.nested_blocksize != into.nested_blocksize:
        t |= encode_absmax(decode_absmax(encoded), into)
    if into.codec in _LEVELS and encoded.format.storage != into.storage:
        t["weight"] = as_storage(t["weight"].contiguous().reshape(-1).view(torch.uint8).unsqueeze(1), into)
    return t


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that each element of a quantised weight can take, its statistics given.

    Attributes:
        levels: ascending, ``(16,)`` or ``(255,)`` float32 in [-1, 1].
        bounds: between neighbouring levels.
        codes: that stand for the levels as stored, uint8 or int8.
        scales: what the levels are multiplied by: one a block of the flat weight, float32.
        blocksize: elements a block.
    """

    levels: Tensor
    bounds: Tensor
    codes: Tensor
    scales: Tensor
    blocksize: int

    def nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        """Numbers of the levels that are nearest to ``values``, each with its scale, as int32."""
        return torch.bucketize(torch.where(scale != 0, values / scale, 0.0), self.bounds, out_int32=True)


def grid_of(encoded: EncodedWeight) -> Grid:
    """The :class:`Grid` of a quantised weight, scales as its reader sees them (double quantisation included)."""
    f = encoded.format
    device = encoded.tensors["weight"].device
    if f.codec == "int8":
        codes = torch.arange(-127, 128, device=device, dtype=torch.int8)
        bounds = (torch.arange(-127, 127, device=device) + 0.5) / 127
        return Grid(codes.to(torch.float32) / 127, bounds, codes, encoded.tensors["SCB"].to(torch.float32), f.shape[1])
    bounds, order = bounds_of(f.codec, device)
    return Grid(levels_of(f.codec, device)[order], bounds, order.to(torch.uint8), decode_absmax(encoded), f.blocksize)


def with_levels(encoded: EncodedWeight, levels: Tensor) -> EncodedWeight:
    """``encoded`` with other codes and the same statistics.

    Args:
        encoded: quantised.
        levels: of its shape, numbers of the levels of :func:`grid_of`.
    """
    f = encoded.format
    codes = grid_of(encoded).codes[levels.to(torch.int64)]
    weight = codes if f.codec == "int8" else as_storage(_pack(codes.reshape(-1), f.codec), f)
    return EncodedWeight(f, {**encoded.tensors, "weight": weight})


def unpack_cpu_layout(weight: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int) -> tuple[Tensor, Tensor]:
    """Undo the layout into which bitsandbytes ≥ 0.49 repacks a 4-bit weight at its first CPU eval forward on
    AVX512-BF16 machines.

    There, rows are tiled by 32, a byte holds the codes of two rows, and absmax is transposed and rounded to bfloat16.
    The codes come back exactly; the rounding of absmax (2⁻⁹ relative) is lost.

    Args:
        weight: ``(out, in/2)`` uint8, tiled.
        absmax: ``(in/blocksize, out)`` bfloat16.
        shape: ``(out, in)``.
        blocksize: of the 4-bit blocks.

    Returns:
        packed codes ``(out·in/2, 1)`` uint8 in the checkpoint's layout, and absmax ``(out·in/blocksize,)`` float32.
    """
    rows, columns = shape
    if rows % 32 or columns % blocksize or weight.dtype != torch.uint8 or weight.numel() * 2 != rows * columns:
        raise FormatError(
            "a CPU-packed weight of a shape that bitsandbytes cannot pack",
            tensor="weight",
            shape=tuple(weight.shape),
            expected=(rows, columns // 2),
            remedy=_RELOAD,
        )
    tiles = weight.reshape(-1, 32)
    codes = torch.cat([tiles & 15, tiles >> 4], dim=-1).reshape(rows // 32, columns // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax.t().reshape(-1).to(torch.float32)


# --- int8 -------------------------------------------------------------------------------------------------------------


def _decode_int8(encoded: EncodedWeight) -> Tensor:
    weight, scb = _require(encoded, "weight", "SCB")
    if weight.dtype != torch.int8 or tuple(weight.shape) != encoded.format.shape:
        raise ShapeError(
            f"an int8 weight must be int8 of its format's shape, this is {weight.dtype}",
            shape=tuple(weight.shape),
            expected=encoded.format.shape,
            remedy=_RELOAD,
        )
    if scb.numel() != weight.shape[0]:
        raise ShapeError(
            "SCB must hold one value a row",
            tensor="SCB",
            shape=tuple(scb.shape),
            expected=(weight.shape[0],),
            format="int8",
            remedy=_RELOAD,
        )
    return weight.detach().to(torch.float32) * (scb.detach().reshape(-1, 1).to(torch.float32) / 127.0)


def _encode_int8(weight: Tensor, f: WeightFormat, _rounding: str) -> dict[str, Tensor]:
    weight = weight.detach().to(torch.float32)
    _finite(weight, "the weight to quantise is not finite", f)
    scb = weight.abs().amax(-1)
    return {"weight": int8_codes(weight, scb), "SCB": scb}


def int8_codes(weight: Tensor, scb: Tensor) -> Tensor:
    """The int8 codes nearest to a float32 weight ``(out, in)`` whose rows are scaled by ``scb: (out,)``."""
    factor = 127.0 / scb.unsqueeze(-1)
    scaled = weight * factor
    if not bool(torch.isfinite(factor).all()):
        # 127/scb overflows for rows of zeros and near zero, where bitsandbytes' cast of NaN and infinity is undefined:
        # divide first
        scaled = torch.where(torch.isfinite(factor), scaled, weight / scb.unsqueeze(-1).clamp(min=1e-45) * 127.0)
    return torch.round(scaled).clamp(-127, 127).to(torch.int8)


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "dense": Codec(_decode_dense, _encode_dense),
        "nf4": Codec(_decode_4bit, _encode_4bit),
        "fp4": Codec(_decode_4bit, _encode_4bit),
        "int8": Codec(_decode_int8, _encode_int8),
    }
)
