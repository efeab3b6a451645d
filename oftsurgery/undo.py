"""Undo records: what it takes to give a folded weight its original bytes back, in far fewer bits than the weight.

The folded weight, rotated back, lies within its own rounding error of the original. So the original codes are *predicted*:
rotate back, requantise against the original statistics. The record holds those statistics and the prediction's errors,
and because most predictions are right, both compress well. Nothing of this is an estimate: a record is decoded and
compared by content hash when it is written, and compared again when it is used.

**Why the prediction is the same everywhere.** A sum of floats depends on its order, which differs between machines,
thread counts and BLAS libraries. Here every product is of integers held in float64: weights rounded to ``p`` bits,
rotations to ``f``, with ``p + f`` chosen so that every partial sum of any order stays below 2⁵³. Such sums are exact, so
order and fused multiply-adds do not matter. What is left is elementwise IEEE arithmetic (multiplication by powers of two,
rounding, division, comparison), the same on every machine. All of it runs on the CPU.

The rotation itself is in the record, as the quantised generator of a Cayley map whose inverse is evaluated by Newton's
iteration in the same exact products, or where that does not fit (rotations that are not orthogonal, half turns) as a
quantised matrix. It needs to be only as fine as the folded weight's rounding.

Pure: tensors in, facts (JSON-able) and bytes out, and back. ``docs/undo.md`` describes the format.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import codecs, preserve, rotations
from .adapter import Rotation
from .codecs import EncodedWeight, WeightFormat
from .errors import IntegrityError, NonFiniteError, UndoError
from .formats import FORMATS
from .hashing import hash_tensors
from .weight import _in_weight_order

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    P = ParamSpec("P")
T = TypeVar("T")

__all__ = ["UndoEntry", "decode_tensor", "decode_weight", "encode_tensor", "encode_weight", "evidence", "read_format"]


@dataclass(frozen=True, eq=False)
class UndoEntry:
    """What undoes the change of one weight or tensor.

    Attributes:
        facts: JSON-able: how ``data`` is to be read, and the hashes that prove it.
        data: the compressed streams.
        tables: ``{content hash: bytes}`` of small tensors that many weights share (the codecs' tables of levels), which
            a file holds once.
    """

    facts: Mapping[str, Any]
    data: bytes
    tables: Mapping[str, bytes]


DTYPES: Mapping[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_the_cpu(function: Callable[P, T]) -> Callable[P, T]:
    """Whatever default device and grad mode the caller is in."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


# --- streams ----------------------------------------------------------------------------------------------------------

# LZMA's literal coder is an adaptive binary range coder: without its contexts (lc, lp, pb) it spends on packed bits what
# their entropy says, to a few per cent. The filters are fixed here, so a file cannot ask for memory.
_FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "dict_size": 1 << 16,
        "lc": 0,
        "lp": 0,
        "pb": 0,
        "mode": lzma.MODE_NORMAL,
        "mf": lzma.MF_HC4,
        "nice_len": 273,
        "depth": 4,
    }
]
_STORED = 1 << 31  # no stream is as long: chunks are of a few million values

Array = np.ndarray[Any, np.dtype[Any]]

_PLANES = 3


def _damaged() -> UndoError:
    return UndoError("the undo record is damaged", remedy="restore the file, or unfold with base=…")


class _Streams:
    """Streams of bytes one after the other, each behind its length (4 bytes, little-endian; the top bit: stored as it
    is).

    Written and read by the same code, so that the two mirror each other: every method takes the true values when
    writing and None when reading, and gives them back. A reader knows how many bytes each stream must give.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self.reading = data is not None
        self._data = memoryview(data or b"")
        self._at = 0
        self._parts: list[bytes] = []

    @property
    def data(self) -> bytes:
        return b"".join(self._parts)

    def end(self) -> None:
        """Everything must be read by now."""
        if self._at != len(self._data):
            raise _damaged()

    def raw(self, true: bytes | None, nbytes: int) -> bytes:
        """One stream of ``nbytes`` bytes."""
        if true is None:
            return self._get(nbytes)
        packed = lzma.compress(true, format=lzma.FORMAT_RAW, filters=_FILTERS) if true else true
        stored = len(packed) >= len(true)
        body = true if stored else packed
        self._parts += [(len(body) | _STORED * stored).to_bytes(4, "little"), body]
        return true

    def _get(self, nbytes: int) -> bytes:
        head = int.from_bytes(self._take(4), "little")
        body = bytes(self._take(head & ~_STORED))
        if not head & _STORED:
            try:
                decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_FILTERS)
                body = decoder.decompress(body, max_length=nbytes + 1)
            except lzma.LZMAError as error:
                raise _damaged() from error
        if len(body) != nbytes:
            raise _damaged()
        return body

    def _take(self, nbytes: int) -> memoryview:
        if self._at + nbytes > len(self._data):
            raise _damaged()
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]

    def words(self, true: Array | None, count: int, dtype: str) -> Array:
        """``count`` unsigned integers as planes of bytes, the lowest first."""
        size = np.dtype(dtype).itemsize
        planes = None if true is None else np.ascontiguousarray(true.astype(dtype).view(np.uint8).reshape(-1, size).T)
        read = [self.raw(None if planes is None else planes[i].tobytes(), count) for i in range(size)]
        return np.stack([np.frombuffer(p, np.uint8) for p in read], axis=-1).reshape(-1).view(dtype)

    def symbols(self, true: Array | None, count: int) -> Array:
        """``count`` small integers, mostly 0: whether each is above 0, whether those are above 1, …, eight to the byte;
        then what is left of the few others in 16 bits.
        """
        planes: list[Array] = []
        left = true
        for _ in range(_PLANES):
            bits = self.raw(None if left is None else np.packbits(left > 0).tobytes(), -(-count // 8))
            planes.append(np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool))
            left = None if left is None else left[left > 0] - 1
            count = int(planes[-1].sum())
        symbols = self.words(left, count, "<u2").astype(np.int32)
        for above in reversed(planes):
            whole = np.zeros(above.size, np.int32)
            whole[above] = symbols + 1
            symbols = whole
        return symbols

    def differences(self, true: Array | None, predicted: Array) -> Array:
        """Signed integers of ``predicted``'s dtype as their differences from it, wrapped to its width, with 0, -1, 1, -2,
        2 … as 0, 1, 2, 3, 4 ….
        """
        unsigned = f"<u{predicted.itemsize}"
        folded = None
        if true is not None:
            d = true - predicted
            folded = ((d << 1) ^ (d >> (8 * d.itemsize - 1))).view(unsigned)
        folded = self.words(folded, predicted.size, unsigned)
        d = ((folded >> 1) ^ (0 - (folded & 1))).view(predicted.dtype)
        whole: Array = predicted + d
        return whole


# --- exact rotations --------------------------------------------------------------------------------------------------

# sums of products stay below this many bits in every order: one less than float64 holds exactly
_EXACT_BITS = 52

# what the record's rotation may add to the folded weight's own rounding error, as a part of it
_SHARE = 0.15


@dataclass(frozen=True, eq=False)
class _Stage:
    """One step of rotating back: ``x · blockdiag(matrix) / 2**bits`` over columns (``dim`` 1) or rows (0) from feature
    ``start`` on, or a division of the rows by ``scale``.
    """

    dim: int = 1
    start: int = 0
    matrix: Tensor | None = None  # (n, b, b) integers in float64; one block serves all where n is 1
    bits: int = 0
    scale: Tensor | None = None  # (rows,) float64


def _power(exponent: int) -> float:
    return math.ldexp(1.0, exponent)


def _integers(x: Tensor, bits: int) -> tuple[Tensor, int]:
    """``x`` as integers of at most ``bits`` bits, and the exponent of two that scales them back."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    exponent = math.frexp(largest)[1] - bits if largest else 0
    if exponent < -900:  # 2**-exponent must be a float64
        return torch.zeros_like(x), 0
    return torch.round(x * _power(-exponent)), exponent


def _apply(x: Tensor, stage: _Stage) -> Tensor:
    """One stage on ``x: (rows, columns)`` float64."""
    if stage.scale is not None:
        return x / torch.where(stage.scale == 0, 1.0, stage.scale).unsqueeze(-1)
    m = stage.matrix
    assert m is not None  # noqa: S101 - a stage has one of the two
    turned = x.t() if stage.dim == 0 else x
    features, b = turned.shape[-1], m.shape[-1]
    width = (features - stage.start) // b * b if m.shape[0] == 1 else m.shape[0] * b
    room = _EXACT_BITS - int(m.abs().sum(dim=-2).max()).bit_length()
    part, exponent = _integers(turned[:, stage.start : stage.start + width], room)
    part = rotations.apply_blocks(part, m) * _power(exponent - stage.bits)
    if width < features:
        part = torch.cat([turned[:, : stage.start], part, turned[:, stage.start + width :]], dim=-1)
    return part.t() if stage.dim == 0 else part


def _cayley(g: Tensor, bits: int) -> tuple[Tensor, int] | None:
    """``(I - G)(I + G)⁻¹`` for ``G = skew(g) / 2**bits``: integers, and their fraction bits; None where G is too large.

    Newton's iteration ``Y ← Y (2I - A Y)`` for the inverse of ``A = I + G``, from ``Y = Aᵀ / (1 + ‖G‖²)``: the
    eigenvalues of ``A Y`` are real then and in (0, 1], whatever skew-symmetric G is. Each product is exact.
    """
    q = rotations.skew(g)
    b = q.shape[-1]
    norm = (int(q.abs().sum(dim=-1).max()) >> bits) + 1  # an integer above the spectral norm
    # |A| has row sums ≤ 1 + norm, |Y| entries ≤ 2; |2I - A Y| entries ≤ 4
    fraction = (_EXACT_BITS - 2 - max((1 + norm).bit_length(), b.bit_length() + 2)) // 2
    if fraction < bits or norm > 1 << 8:
        return None
    one = _power(fraction)
    eye = torch.eye(b, dtype=torch.float64) * one
    g_scaled = q * _power(fraction - bits)
    a = eye + g_scaled
    y = torch.round((eye - g_scaled) / (1 + norm * norm))
    for _ in range((1 + norm * norm).bit_length() + 5):
        y = torch.round((y @ (2 * eye - torch.round((a @ y) / one))) / one)
    return 2 * y - eye, fraction


def _inverse_matrices(r: Rotation, shape: tuple[int, ...]) -> list[tuple[int, int, Tensor]]:
    """``(dim, first feature, (n, b, b) float64)`` with which ``x · blockdiag`` takes a rotation out."""
    blocks = r.blocks.cpu()
    if r.side == "embedding":
        return [(1, 0, rotations.inverse_blocks(blocks))]
    if r.side == "input":
        return [(1, 0, rotations.inverse_blocks(blocks).transpose(-2, -1))]
    # W = R⁻ᵀ W', so Wᵀ = W'ᵀ R⁻¹; peft ≤ 0.13 crops the last block where out is no multiple
    out, b = shape[0], blocks.shape[-1]
    whole = out - out % b
    body = blocks if blocks.shape[0] == 1 else blocks[: whole // b]
    last = blocks[:1] if blocks.shape[0] == 1 else blocks[-(-out // b) - 1 : -(-out // b)]
    parts = [(0, 0, rotations.inverse_blocks(body))] if whole else []
    if out > whole:
        parts.append((0, whole, rotations.inverse_blocks(last[:, : out - whole, : out - whole])))
    return parts


def _put_stages(
    io: _Streams, chain: Sequence[Rotation], shape: tuple[int, ...], noise: float
) -> tuple[list[dict[str, Any]], list[_Stage]]:
    """Write the stages that rotate ``chain`` out of a weight, as coarse as ``noise`` (the folded weight's relative
    rounding error) allows.
    """
    facts: list[dict[str, Any]] = []
    stages: list[_Stage] = []
    for r in _in_weight_order(chain, inverse=True):
        if r.scale is not None:
            scale = r.scale.detach().cpu().to(torch.float64)
            facts.append({"kind": "scale"})
            io.raw(scale.numpy().tobytes(), scale.nbytes)
            stages.append(_Stage(scale=scale))
        for dim, start, matrix in _inverse_matrices(r, shape):
            kind, bits, whole = _quantised(matrix, noise)
            n, b, _ = matrix.shape
            facts.append({"kind": kind, "dim": dim, "start": start, "blocks": n, "size": b, "bits": bits})
            stages.append(_code_blocks(io, facts[-1], whole))
    return facts, stages


def _quantised(matrix: Tensor, noise: float) -> tuple[str, int, Tensor]:
    """(kind, fraction bits, integers in float64): a generator's triangles where its Cayley map is the matrix to within
    what ``noise`` allows, else the matrix itself.
    """
    n, b, _ = matrix.shape
    # rounding to steps of 2**-bits errs by 0.29 steps a value, and a generator's error counts twice in its rotation
    steps = 0.58 * math.sqrt(b) / (_SHARE * noise)
    bits = min(max(math.frexp(steps)[1], 4), 22)
    try:
        eye = torch.eye(b, dtype=torch.float64)
        generator = (eye - matrix) @ rotations.inverse_blocks(eye + matrix)
        g = torch.round(rotations.vector(generator - generator.transpose(-2, -1)) * _power(bits - 1))
        made = _cayley(g, bits) if float(g.abs().max()) < 1 << 30 else None
        if made is not None:
            error = float(torch.linalg.vector_norm(made[0] * _power(-made[1]) - matrix))
            if error <= max(2 * _SHARE * noise, 1e-5) * math.sqrt(n * b):
                return "generator", bits, g
    except NonFiniteError:  # half turns
        pass
    return "matrix", bits, torch.round(matrix * _power(bits)).clamp(-(2.0**31) + 1, 2.0**31 - 1)


def _code_blocks(io: _Streams, facts: Mapping[str, Any], true: Tensor | None) -> _Stage:
    """The stage that ``facts`` tell of, its integers written or read."""
    n, b, bits = facts["blocks"], facts["size"], facts["bits"]
    near: Array = np.zeros(n * (b * (b - 1) // 2), np.int32)
    if facts["kind"] == "matrix":
        near = np.tile((np.eye(b) * _power(bits)).astype(np.int32).reshape(-1), n)
    found = io.differences(None if true is None else true.numpy().astype(np.int32).reshape(-1), near)
    whole = torch.from_numpy(found.astype(np.float64))
    if facts["kind"] == "matrix":
        return _Stage(facts["dim"], facts["start"], whole.reshape(n, b, b), bits)
    made = _cayley(whole.reshape(n, -1), bits)
    if made is None:
        raise _damaged()
    return _Stage(facts["dim"], facts["start"], *made)


def _get_stages(io: _Streams, facts: object, shape: tuple[int, ...]) -> list[_Stage]:
    """Mirror of :func:`_put_stages`, for facts that nobody vouches for."""
    stages = []
    for f in _list(facts):
        if f.get("kind") == "scale":
            scale = np.frombuffer(io.raw(None, 8 * shape[0]), np.float64)
            stages.append(_Stage(scale=torch.from_numpy(scale.copy())))
            continue
        numbers: list[Any] = [f.get(name) for name in ("dim", "start", "blocks", "size", "bits")]
        if f.get("kind") not in ("generator", "matrix") or not all(type(n) is int for n in numbers):
            raise _damaged()
        dim, start, n, b, bits = numbers
        fits = dim in (0, 1) and start >= 0 and n >= 1 and b >= 1 and start + n * b <= shape[dim] and 4 <= bits <= 22
        if not fits or (f["kind"] == "generator" and b < 2):
            raise _damaged()
        stages.append(_code_blocks(io, f, None))
    return stages


# --- the prediction ---------------------------------------------------------------------------------------------------

# values that are predicted and coded together: they bound the memory that is needed
_CHUNK = 1 << 21


def _folded_values(after: EncodedWeight) -> Callable[[int, int], Tensor]:
    """``(first, end)`` → the flat values of the folded weight there, float64.

    A 4-bit weight's absmax is rounded to bfloat16 first, as bitsandbytes rounds it when a CPU forward repacks a layer:
    the prediction is the same before and after.
    """
    f, kind, after = after.format, after.format.kind, after.cpu()
    codes = kind.codes(after).contiguous().reshape(-1)
    if not f.quantised:
        return lambda first, end: codes[first:end].to(torch.float64)
    steps, n = _folded_scales(after) / kind.unit, kind.packed

    def values(first: int, end: int) -> Tensor:
        numbers = kind.numbers(codes[first // n : -(-end // n)])[: end - first].to(torch.float64)
        here = steps[first // f.block : -(-end // f.block)]
        return (codecs.blocks_of(numbers, f.block) * here.unsqueeze(-1)).reshape(-1)[: end - first]

    return values


#: the fraction bits of the relaxation in a record
_RELAXATION_BITS = 20


def _folded_scales(after: EncodedWeight) -> Tensor:
    """The scales of the folded weight's blocks or rows, float64; of 4 bits rounded as in :func:`_folded_values`."""
    kind = after.format.kind
    return kind.evidence(after.cpu())[kind.scales_name].to(torch.float64)


def _chunks(
    after: EncodedWeight, stages: Sequence[_Stage], blocksize: int, relaxation: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """``(first, values)``: the folded weight rotated back, flat, float64, some rows at a time; chunks begin where
    4-bit blocks do.

    Where the fold over-relaxed what it changed (:mod:`oftsurgery.preserve`), the way back is over-relaxed too: a weight
    that the fold moved by a step is predicted a step back, and one that stayed is predicted where it is.
    """
    rows, columns = after.format.shape
    values = _folded_values(after)
    unit = max(blocksize, after.format.blocksize, 2)
    unit //= math.gcd(columns, unit)
    step = -(-_CHUNK // (columns * unit)) * unit
    whole = None
    if any(s.dim == 0 for s in stages):  # rows are mixed: all at once
        whole = values(0, rows * columns).reshape(rows, columns)
        for stage in stages:
            whole = _apply(whole, stage)
    for row in range(0, rows, step):
        end = min(row + step, rows)
        y = values(row * columns, end * columns).reshape(-1, columns)
        if whole is not None:
            x = whole[row:end]
        else:
            x = y
            for stage in stages:
                part = _Stage(scale=stage.scale[row:end]) if stage.scale is not None else stage
                x = _apply(x, part)
        if relaxation is not None:
            x = y + (x - y) * (relaxation * _power(-_RELAXATION_BITS))
        # infinities, and their differences, of scales near zero: any number will do, but the same everywhere
        yield row * columns, torch.nan_to_num(x.contiguous().reshape(-1))


def _sorted(io: _Streams, true: Array | None, key: Array) -> Array:
    """Symbols in the order of ``key`` (uint16): like ones together is what an adaptive coder needs."""
    order = np.argsort(key, kind="stable")
    found = io.symbols(None if true is None else true[order], key.size)
    symbols = np.empty_like(found)
    symbols[order] = found
    return symbols


def _ranks(io: _Streams, true: Array | None, near: Tensor, up: Tensor, margin: Tensor) -> Array:
    """True ranks, as how far they are from the nearest one: 0 it is it, 1 the next on the side where the prediction
    lies (``up``), 2 the next on the other, 3 … ``margin``: the distance to the threshold on that side.
    """
    key = torch.clamp(margin, 0, 65535).to(torch.int32).numpy().astype(np.uint16)
    centre = near.to(torch.int32)
    sign = torch.where(up, 1, -1).to(torch.int32)
    symbols = None
    if true is not None:
        d = (torch.from_numpy(true) - centre) * sign
        symbols = torch.where(d > 0, 2 * d - 1, -2 * d).numpy()
    coded = torch.from_numpy(_sorted(io, symbols, key))
    half = (coded + 1) >> 1
    found: Array = (centre + sign * torch.where((coded & 1).bool(), half, -half)).numpy()
    return found


def _statistics(io: _Streams, true: Array | None, predicted: Tensor) -> Array:
    """float32 statistics, by the differences of their bit patterns from the predicted ones."""
    near = predicted.to(torch.float32).numpy().view(np.int32)
    return io.differences(None if true is None else true.view(np.int32), near).view(np.float32)


@dataclass(frozen=True, eq=False)
class _Nested:
    """Double quantisation's statistics: absmax is ``table[code] · scale[block of codes] + offset``, in float32."""

    scale: Array
    table: Array
    offset: float
    blocksize: int

    def code(self, io: _Streams, true: Array | None, peaks: Tensor, first: int) -> tuple[Array, Array]:
        """(codes, absmax) of the blocks from ``first`` on, predicted from the largest values in them."""
        scale = self.scale[(first + np.arange(peaks.numel())) // self.blocksize].astype(np.float64)
        order = np.argsort(self.table, kind="stable")
        table = self.table[order].astype(np.float64)
        wanted = (peaks.numpy() - self.offset) / np.where(scale == 0, 1.0, scale)
        near = order[np.searchsorted((table[1:] + table[:-1]) / 2, wanted)].astype(np.uint8)
        codes = io.differences(None if true is None else true.view(np.int8), near.view(np.int8)).view(np.uint8)
        return codes, self.table[codes].astype(np.float64) * scale + self.offset


def _code_quantised(
    io: _Streams,
    f: WeightFormat,
    after: EncodedWeight,
    stages: Sequence[_Stage],
    ranked: Tensor,
    nested: _Nested | None,
    relaxation: int | None,
    true: Mapping[str, Array] | None,
) -> tuple[Tensor, Array]:
    """The codes (n,) and the scales of a quantised weight; ``ranked``: codes in the order of their levels."""
    kind, order = f.kind, ranked.view(torch.uint8).numpy()
    kept = None if relaxation is None else _folded_scales(after)
    n = math.prod(f.shape)
    ranks = np.zeros(256, np.int32)
    ranks[order] = np.arange(len(order))
    codes = np.empty(n, np.uint8)
    scales = np.empty(-(-n // f.block), np.float32 if nested is None else np.uint8)
    for first, x in _chunks(after, stages, f.blocksize, relaxation):
        here = slice(first, first + x.numel())
        of = slice(first // f.block, -(-here.stop // f.block))
        blocks = codecs.blocks_of(x, f.block)
        peaks = blocks.abs().amax(-1) if kept is None else kept[of]
        given = None if true is None else true[kind.scales_name][of]
        if nested is None:
            scales[of] = seen = _statistics(io, given, peaks)
        else:
            scales[of], seen = nested.code(io, given, peaks, of.start)
        divisors = torch.from_numpy(seen.astype(np.float64))
        numbers = blocks * kind.unit / torch.where(divisors == 0, 1.0, divisors).unsqueeze(-1)
        wanted = None if true is None else ranks[true["codes"][here]]
        found = _ranks(io, wanted, *kind.near(numbers.reshape(-1)[: x.numel()], ranked))
        if found.min() < 0 or found.max() >= len(order):
            raise _damaged()
        codes[here] = order[found]
    return torch.from_numpy(codes).view(ranked.dtype), scales


_MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def _code_dense(io: _Streams, f: WeightFormat, predicted: Iterator[tuple[int, Tensor]], true: Array | None) -> Array:
    """The bit patterns (n,) of a dense float tensor, as signed integers of its width."""
    patterns = np.empty(math.prod(f.shape), f"i{f.dtype.itemsize}")
    for first, x in predicted:
        here = slice(first, first + x.numel())
        narrow = x if f.dtype == torch.float64 else x.to(torch.float32).to(f.dtype)
        near = _monotone(_patterns(narrow))
        # how many units in the last place an error amounts to goes by the exponent
        key = (np.abs(near) >> (_MANTISSA[f.dtype] - 2)).astype(np.uint16)
        order = np.argsort(key, kind="stable")
        wanted = None if true is None else _monotone(true[here])[order]
        found = np.empty_like(near)
        found[order] = io.differences(wanted, near[order])
        patterns[here] = _monotone(found)
    return patterns


def _patterns(values: Tensor) -> Array:
    widths = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return values.detach().cpu().contiguous().reshape(-1).view(widths[values.dtype.itemsize]).numpy()


def _monotone(patterns: Array) -> Array:
    """Sign-and-magnitude bit patterns of floats ↔ integers in the order of their values; its own inverse."""
    width = 8 * patterns.itemsize
    turned: Array = patterns ^ ((patterns >> (width - 1)) & patterns.dtype.type((1 << (width - 1)) - 1))
    return turned


# --- one weight -------------------------------------------------------------------------------------------------------


def evidence(folded: EncodedWeight) -> str:
    """Content hash of what the prediction is made from; the same before and after bitsandbytes repacks a 4-bit weight
    at a CPU forward.
    """
    return hash_tensors(folded.format.kind.evidence(folded.cpu()))


@_on_the_cpu
def encode_weight(
    before: EncodedWeight,
    after: EncodedWeight,
    chain: Sequence[Rotation],
    *,
    noise: float,
    relaxation: float | None = None,
) -> UndoEntry:
    """What gives ``before`` back from ``after``, proved: it is decoded once and compared.

    Args:
        before: the stored weight that was folded.
        after: what the fold stored instead, of the same shape.
        chain: the rotations that were folded, in the live order.
        noise: the relative error that storing ``after`` cost; it decides how finely the rotation is recorded.
        relaxation: the factor by which the fold over-relaxed what it changed, where it kept the scales of ``before``;
            None where it rounded otherwise.

    Raises:
        IntegrityError: the entry does not give ``before`` back.
    """
    before = before.cpu()
    tables = {k: _bytes(before.tensors[k]) for k in before.format.kind.shared if k in before.tensors}
    facts: dict[str, Any] = {
        "format": {
            **asdict(before.format),
            "shape": list(before.format.shape),
            "dtype": _name(before.format.dtype),
            "storage": _name(before.format.storage),
        },
        "before": before.fingerprint,
        "after": evidence(after),
        "tensors": {k: _described(t) for k, t in before.tensors.items()},
    }
    for k, content in tables.items():
        facts["tensors"][k]["table"] = _hash(content)
    io = _Streams()
    stored = [_bytes(t) for k, t in before.tensors.items() if k not in tables]
    if _predictable(before, after):
        if relaxation is not None and preserve.applies(before.format, after.format):
            facts["relaxation"] = round(relaxation * _power(_RELAXATION_BITS))
        try:
            facts["stages"], stages = _put_stages(io, chain, before.format.shape, max(noise, 2.0**-24))
            _code(io, facts, before.format, after, stages, before.tensors, before.tensors)
        except NonFiniteError:  # a rotation without an inverse
            io = _Streams()
    if not io.data or len(io.data) >= sum(map(len, stored)):
        facts.pop("stages", None)
        facts.pop("relaxation", None)
        io = _Streams()
        for raw in stored:
            io.raw(raw, len(raw))
    entry = UndoEntry(facts, io.data, {_hash(t): t for t in tables.values()})
    decode_weight(entry, after)
    return entry


@_on_the_cpu
def decode_weight(entry: UndoEntry, after: EncodedWeight) -> EncodedWeight:
    """The weight that was folded, from what the fold stored instead; on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not what the fold stored, or the result not what was folded.
    """
    facts = entry.facts
    if evidence(after) != facts.get("after"):
        raise IntegrityError(
            "the weight is not the one that this record's fold left: another fold or another change lies on top, or it is of another model",
            format=after.format.label,
            remedy="take out later folds first, the last one first; or unfold with base=…",
        )
    f = read_format(facts.get("format"), after.format.shape)
    described = _described_tensors(facts, f)
    tensors: dict[str, Tensor] = {}
    for name, t in described.items():
        if "table" in t:
            table = entry.tables.get(t["table"])
            if table is None:
                raise _damaged()
            tensors[name] = _tensor(table, t)
    io = _Streams(entry.data)
    if "stages" in facts:
        found = _code(io, facts, f, after, _get_stages(io, facts["stages"], f.shape), tensors, None)
    else:
        found = {name: io.raw(None, _nbytes(t)) for name, t in described.items() if "table" not in t}
    io.end()
    if described.keys() != tensors.keys() | found.keys():
        raise _damaged()
    tensors |= {name: _tensor(raw, described[name]) for name, raw in found.items()}
    before = EncodedWeight(f, {name: tensors[name] for name in described})
    if before.fingerprint != facts.get("before"):
        raise IntegrityError("the restored weight is not the one that was folded", format=f.label, remedy=_REPORT)
    return before


_REPORT = "unfold with base=…, and report this with both models' formats"


def _predictable(before: EncodedWeight, after: EncodedWeight) -> bool:
    """Whether the weight is stored in the way that the prediction knows; what else there may be is stored as it is."""
    f, t = before.format, before.tensors
    if len(f.shape) != 2 or f.shape != after.format.shape or min(f.shape) < 1:
        return False
    # bytes of codes, and of tables that many weights share, may be of any dtype
    wanted = {name: dtype for name, (dtype, _) in f.kind.layout(f).items() if name not in ("", "weight", "quant_map")}
    found = {name: tensor.dtype for name, tensor in t.items() if name not in ("weight", "quant_map")}
    return found == wanted and (f.quantised or f.dtype in _MANTISSA)


def _relaxation(facts: Mapping[str, Any], f: WeightFormat, after: EncodedWeight) -> int | None:
    """The relaxation that facts tell of, in steps of ``2**-_RELAXATION_BITS``."""
    found = facts.get("relaxation")
    if found is None:
        return None
    if type(found) is not int or not 0 < found < 1 << (_RELAXATION_BITS + 17) or not preserve.applies(f, after.format):
        raise _damaged()
    return found


def _code(
    io: _Streams,
    facts: Any,
    f: WeightFormat,
    after: EncodedWeight,
    stages: Sequence[_Stage],
    tables: Mapping[str, Tensor],
    true: Mapping[str, Tensor] | None,
) -> dict[str, bytes]:
    """The tensors' bytes but for ``tables``, predicted; ``facts`` is completed when writing."""
    kind = f.kind
    if not f.quantised:
        chunks = _chunks(after, stages, 0)
        return {"weight": _code_dense(io, f, chunks, None if true is None else _patterns(true["weight"])).tobytes()}
    given = None if true is None else {k: _flat(t) for k, t in true.items()}
    if true is not None and given is not None:
        codes = kind.spell(true["weight"], math.prod(f.shape), facts)
        given["codes"] = codes.view(torch.uint8).numpy()
    ranked = kind.ranks(facts)
    if ranked is None or (f.nested_blocksize and "nested_quant_map" not in tables):
        raise _damaged()
    nested, out = None, {}
    if f.nested_blocksize:
        blocks = -(-math.prod(f.shape) // (f.blocksize * f.nested_blocksize))
        for name, size in (("nested_absmax", 4 * blocks), ("nested_offset", 4)):
            out[name] = io.raw(None if given is None else given[name].tobytes(), size)
        scale, offset = (np.frombuffer(out[name], np.float32) for name in ("nested_absmax", "nested_offset"))
        nested = _Nested(scale, _flat(tables["nested_quant_map"]), float(offset[0]), f.nested_blocksize)
    relaxation = _relaxation(facts, f, after)
    codes, scales = _code_quantised(io, f, after, stages, ranked, nested, relaxation, given)
    return {"weight": _bytes(kind.unspell(codes, facts)), kind.scales_name: scales.tobytes(), **out}


# --- one plain tensor -------------------------------------------------------------------------------------------------


@_on_the_cpu
def encode_tensor(before: Tensor, after: Tensor) -> UndoEntry:
    """What gives the plain tensor ``before`` back from ``after``, which stands in its place (a trained bias or head),
    proved.
    """
    before, after = before.detach().cpu(), after.detach().cpu()
    facts: dict[str, Any] = {"before": _hash_one(before), "after": _hash_one(after), "tensor": _described(before)}
    io = _Streams()
    if before.dtype in _MANTISSA and (before.dtype, before.shape) == (after.dtype, after.shape):
        facts["predicted"] = True
        _code_dense(io, codecs.dense(before).format, _plain_chunks(after), _patterns(before))
    if "predicted" not in facts or len(io.data) >= before.nbytes:
        facts.pop("predicted", None)
        io = _Streams()
        io.raw(_bytes(before), before.nbytes)
    entry = UndoEntry(facts, io.data, {})
    decode_tensor(entry, after)
    return entry


@_on_the_cpu
def decode_tensor(entry: UndoEntry, after: Tensor) -> Tensor:
    """Mirror of :func:`encode_tensor`, on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not what stood in the tensor's place, or the result not what it was.
    """
    facts, after = entry.facts, after.detach().cpu()
    if _hash_one(after) != facts.get("after"):
        raise IntegrityError(
            "the tensor is not the one that this record's fold left",
            shape=tuple(after.shape),
            remedy="take out later folds first, the last one first; or unfold with base=…",
        )
    described = _checked(facts.get("tensor"), limit=16 * after.numel() + 1024)
    io = _Streams(entry.data)
    if facts.get("predicted"):
        f = WeightFormat("dense", tuple(described["shape"]), DTYPES[described["dtype"]])
        if (f.dtype, f.shape) != (after.dtype, tuple(after.shape)):
            raise _damaged()
        raw = _code_dense(io, f, _plain_chunks(after), None).tobytes()
    else:
        raw = io.raw(None, _nbytes(described))
    io.end()
    before = _tensor(raw, described)
    if _hash_one(before) != facts.get("before"):
        raise IntegrityError("the restored tensor is not the one that was replaced", remedy=_REPORT)
    return before


def _plain_chunks(t: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat = t.contiguous().reshape(-1)
    for first in range(0, flat.numel(), _CHUNK):
        yield first, flat[first : first + _CHUNK].to(torch.float64)


def _hash_one(tensor: Tensor) -> str:
    return hash_tensors({"": tensor})


# --- facts ------------------------------------------------------------------------------------------------------------


def _hash(content: bytes) -> str:
    return hash_tensors({"": torch.frombuffer(bytearray(content), dtype=torch.uint8)})


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _flat(t: Tensor) -> Array:
    """Flat; dtypes that numpy lacks as their bytes."""
    flat = t.contiguous().reshape(-1)
    found: Array = (flat if flat.dtype in (torch.float32, torch.int8) else flat.view(torch.uint8)).numpy()
    return found


def _described(t: Tensor) -> dict[str, Any]:
    return {"dtype": _name(t.dtype), "shape": list(t.shape)}


def _nbytes(described: Mapping[str, Any]) -> int:
    return DTYPES[described["dtype"]].itemsize * int(math.prod(described["shape"]))


def _tensor(raw: bytes, described: Mapping[str, Any]) -> Tensor:
    if len(raw) != _nbytes(described):
        raise _damaged()
    dtype, shape = DTYPES[described["dtype"]], described["shape"]
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def _checked(described: Any, *, limit: int) -> dict[str, Any]:
    """What a file says of a tensor, if that is possible and of at most ``limit`` bytes."""
    good = isinstance(described, dict) and described.get("dtype") in DTYPES and isinstance(described.get("shape"), list)
    if not good or not all(type(n) is int and n >= 0 for n in described["shape"]) or _nbytes(described) > limit:
        raise _damaged()
    return described  # type: ignore[no-any-return]


def _list(facts: object) -> list[dict[str, Any]]:
    if not isinstance(facts, list) or not all(isinstance(f, dict) for f in facts):
        raise _damaged()
    return facts


def _described_tensors(facts: Mapping[str, Any], f: WeightFormat) -> dict[str, dict[str, Any]]:
    described = facts.get("tensors")
    if not isinstance(described, dict):
        raise _damaged()
    limit = 8 * math.prod(f.shape) + 4096
    return {str(name): _checked(t, limit=limit) for name, t in described.items()}


def read_format(facts: object, shape: tuple[int, ...]) -> WeightFormat:
    """A format that a file names, for a weight of ``shape``."""
    if not isinstance(facts, dict):
        raise _damaged()
    names = {"codec", "shape", "dtype", "blocksize", "nested_blocksize", "storage"}
    numbers = [facts.get("blocksize"), facts.get("nested_blocksize")]
    good = set(facts) == names and facts["codec"] in FORMATS and facts["shape"] == list(shape)
    good = good and facts["dtype"] in DTYPES and facts["storage"] in DTYPES
    good = good and all(type(n) is int and 0 <= n <= 1 << 16 for n in numbers)
    least = FORMATS[facts["codec"]].least_blocksize if good else 0
    if not good or facts["blocksize"] < least or (facts["nested_blocksize"] and not least):
        raise _damaged()
    return WeightFormat(
        facts["codec"],
        shape,
        DTYPES[facts["dtype"]],
        facts["blocksize"],
        facts["nested_blocksize"],
        DTYPES[facts["storage"]],
    )
