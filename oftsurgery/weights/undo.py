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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.adapter import Rotation
from oftsurgery.dtypes import NAMED, name_of
from oftsurgery.errors import FormatError, IntegrityError, NonFiniteError, UndoError
from oftsurgery.formats.base import in_blocks
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.hashing import hash_bytes, hash_tensors

from . import preserve
from .fold import _in_weight_order

__told_ = ["UndoEntry", "decode_tensor", "decode_weight", "encode_tensor", "encode_weight", "evidence", "read_format"]


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


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Whatever default device and grad mode the caller is in."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        yield


# --- streams ----------------------------------------------------------------------------------------------------------

# LZMA's literal coder is an adaptive binary range coder: without its contexts (lc, lp, pb) it spends on packed bits what
# their entropy says, to a few per cent. The filters are fixed here, so a file cannot ask for memory.
_CONTEXTS = {"lc": 0, "lp": 0, "pb": 0}
_SEARCH = {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC4, "nice_len": 273, "depth": 4}
_FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, **_CONTEXTS, **_SEARCH}]
_STORED = 1 << 31  # no stream is as long: chunks are of a few million values

Array = np.ndarray[Any, np.dtype[Any]]


def damaged(path: object | None = None) -> UndoError:
    """What is raised where a record, at ``path``, says nonsense."""
    return UndoError("the undo record is damaged", path=path, remedy="restore the file, or unfold with base=…")


def changed(message: str, **where: Any) -> IntegrityError:
    """What is raised where the model is not what the fold left."""
    remedy = "take out later folds first, the last one first; or unfold with base=…"
    return IntegrityError(message, **where, remedy=remedy)


class _Streams:
    """Streams of bytes one after the other, each behind its length (4 bytes, little-endian; the top bit: stored as it
    is).

    Written and read by the same code, so that the two mirror each other: every method takes the true values when
    writing and None when reading, and gives them back. A reader knows how many bytes each stream must give.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.data, self._at = bytearray(data), 0

    def end(self) -> None:
        """Everything must be read by now."""
        if self._at != len(self.data):
            raise damaged()

    def raw(self, true: bytes | None, nbytes: int) -> bytes:
        """One stream of ``nbytes`` bytes."""
        if true is not None:
            packed = lzma.compress(true, format=lzma.FORMAT_RAW, filters=_FILTERS)
            stored = len(packed) >= len(true)
            body = true if stored else packed
            self.data += (len(body) | _STORED * stored).to_bytes(4, "little") + body
            return true
        head = int.from_bytes(self._take(4), "little")
        body = self._take(head & ~_STORED)
        if not head & _STORED:
            try:
                decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_FILTERS)
                body = decoder.decompress(body, max_length=nbytes + 1)
            except lzma.LZMAError as error:
                raise damaged() from error
        if len(body) != nbytes:
            raise damaged()
        return body

    def _take(self, nbytes: int) -> bytes:
        self._at += nbytes
        if self._at > len(self.data):
            raise damaged()
        return bytes(self.data[self._at - nbytes : self._at])

    def words(self, true: Array | None, count: int, dtype: str) -> Array:
        """``count`` unsigned integers as planes of bytes, the lowest first."""
        size = np.dtype(dtype).itemsize
        planes = None if true is None else np.ascontiguousarray(true.astype(dtype).view(np.uint8).reshape(-1, size).T)
        read = [self.raw(None if planes is None else planes[i].tobytes(), count) for i in range(size)]
        return np.stack([np.frombuffer(p, np.uint8) for p in read], axis=-1).reshape(-1).view(dtype)

    def symbols(self, true: Array | None, count: int, planes: int = 3) -> Array:
        """``count`` small integers, mostly 0: whether each is above 0, whether those are above 1, …, eight to the byte;
        then what is left of the few others in 16 bits.
        """
        if not planes:
            return self.words(true, count, "<u2").astype(np.int32)
        bits = self.raw(None if true is None else np.packbits(true > 0).tobytes(), -(-count // 8))
        above = np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool)
        whole: Array = np.zeros(count, np.int32)
        whole[above] = 1 + self.symbols(None if true is None else true[above] - 1, int(above.sum()), planes - 1)
        return whole

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


def _apply(x: Tensor, stage: _Stage, first: int = 0) -> Tensor:
    """One stage on rows ``x: (rows, columns)`` float64 of a weight, from its row ``first`` on."""
    if stage.scale is not None:
        scale = stage.scale[first : first + len(x)]
        return x / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    m = stage.matrix
    assert m is not None  # noqa: S101 - a stage has one of the two
    turned = x.t() if stage.dim == 0 else x
    features, b = turned.shape[-1], m.shape[-1]
    width = (features - stage.start) // b * b if m.shape[0] == 1 else m.shape[0] * b
    room = _EXACT_BITS - int(m.abs().sum(dim=-2).max()).bit_length()
    before, part, after = turned.tensor_split([stage.start, stage.start + width], dim=-1)
    part, exponent = _integers(part, room)
    part = rotations.apply_blocks(part, m) * _power(exponent - stage.bits)
    part = torch.cat([before, part, after], dim=-1) if width < features else part
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
    count, rest = divmod(shape[0], blocks.shape[-1])
    body, last = (blocks, blocks) if len(blocks) == 1 else (blocks[:count], blocks[count : count + 1])
    parts = [(0, 0, rotations.inverse_blocks(body))] if count else []
    if rest:
        parts.append((0, shape[0] - rest, rotations.inverse_blocks(last[:, :rest, :rest])))
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
    with suppress(NonFiniteError):  # half turns
        eye = torch.eye(b, dtype=torch.float64)
        generator = (eye - matrix) @ rotations.inverse_blocks(eye + matrix)
        g = torch.round(rotations.vector(generator - generator.transpose(-2, -1)) * _power(bits - 1))
        made = _cayley(g, bits) if float(g.abs().max()) < 1 << 30 else None
        if made is not None:
            error = float(torch.linalg.vector_norm(made[0] * _power(-made[1]) - matrix))
            if error <= max(2 * _SHARE * noise, 1e-5) * math.sqrt(n * b):
                return "generator", bits, g
    return "matrix", bits, torch.round(matrix * _power(bits)).clamp(-(2.0**31) + 1, 2.0**31 - 1)


def _code_blocks(io: _Streams, facts: Mapping[str, Any], true: Tensor | None) -> _Stage:
    """The stage that ``facts`` tell of, its integers written or read."""
    n, b, bits = facts["blocks"], facts["size"], facts["bits"]
    near: Array = np.zeros((n, b * (b - 1) // 2), np.int32)
    if facts["kind"] == "matrix":
        near = np.tile(np.eye(b, dtype=np.int32) << bits, (n, 1, 1))
    found = io.differences(None if true is None else true.numpy().astype(np.int32).reshape(-1), near.reshape(-1))
    whole = torch.from_numpy(found.astype(np.float64).reshape(near.shape))
    made = (whole, bits) if facts["kind"] == "matrix" else _cayley(whole, bits)
    if made is None:
        raise damaged()
    return _Stage(facts["dim"], facts["start"], *made)


def _get_stages(io: _Streams, facts: object, shape: tuple[int, ...]) -> list[_Stage]:
    """Mirror of :func:`_put_stages`, for facts that nobody vouches for."""
    if not isinstance(facts, list) or not all(isinstance(f, dict) for f in facts):
        raise damaged()
    stages = []
    for f in facts:
        if f.get("kind") == "scale":
            scale = np.frombuffer(io.raw(None, 8 * shape[0]), np.float64)
            stages.append(_Stage(scale=torch.from_numpy(scale.copy())))
            continue
        numbers: list[Any] = [f.get(name) for name in ("dim", "start", "blocks", "size", "bits")]
        if f.get("kind") not in ("generator", "matrix") or not all(type(n) is int for n in numbers):
            raise damaged()
        dim, start, n, b, bits = numbers
        fits = dim in (0, 1) and start >= 0 and n >= 1 and b >= 1 and start + n * b <= shape[dim] and 4 <= bits <= 22
        if not fits or (f["kind"] == "generator" and b < 2):
            raise damaged()
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
    f, kind = after.format, after.format.kind
    codes = kind.codes(after).contiguous().reshape(-1)
    if not f.quantised:
        return lambda first, end: codes[first:end].to(torch.float64)
    steps, n = _folded_scales(after) / kind.unit, kind.codes_per_element

    def values(first: int, end: int) -> Tensor:
        numbers = kind.numbers(codes[first // n : -(-end // n)])[: end - first].to(torch.float64)
        here = steps[first // f.block : -(-end // f.block)]
        return (in_blocks(numbers, f.block) * here.unsqueeze(-1)).reshape(-1)[: end - first]

    return values


#: the fraction bits of the relaxation in a record
_RELAXATION_BITS = 20


def _folded_scales(after: EncodedWeight) -> Tensor:
    """The scales of the folded weight's blocks or rows, float64; of 4 bits rounded as in :func:`_folded_values`."""
    kind = after.format.kind
    return kind.prediction_inputs(after)[kind.scales_name].to(torch.float64)


def _chunks(
    after: EncodedWeight, stages: Sequence[_Stage], blocksize: int, relaxation: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """``(first, values)``: the folded weight rotated back, flat, float64, some rows at a time; chunks begin where
    4-bit blocks do.

    Where the fold over-relaxed what it changed (:mod:`oftsurgery.weights.preserve`), the way back is over-relaxed too: a weight
    that the fold moved by a step is predicted a step back, and one that stayed is predicted where it is.
    """
    rows, columns = after.format.shape
    values = _folded_values(after)
    unit = max(blocksize, after.format.blocksize, 2)
    unit //= math.gcd(columns, unit)
    step = -(-_CHUNK // (columns * unit)) * unit

    def back(x: Tensor, row: int) -> Tensor:
        for stage in stages:
            x = _apply(x, stage, row)
        return x

    mixed = any(stage.dim == 0 for stage in stages)  # rows with rows: all at once
    whole = back(values(0, rows * columns).reshape(rows, columns), 0) if mixed else None
    for row in range(0, rows, step):
        end = min(row + step, rows)
        y = values(row * columns, end * columns).reshape(-1, columns)
        x = back(y, row) if whole is None else whole[row:end]
        if relaxation is not None:
            x = y + (x - y) * (relaxation * _power(-_RELAXATION_BITS))
        # infinities, and their differences, of scales near zero: any number will do, but the same everywhere
        yield row * columns, torch.nan_to_num(x.contiguous().reshape(-1))


def _code_ranks(io: _Streams, true: Array | None, near: Tensor, up: Tensor, margin: Tensor) -> Array:
    """True ranks, as how far they are from the nearest one: 0 it is it, 1 the next on the side where the prediction
    lies (``up``), 2 the next on the other, 3 … ``margin``: the distance to the threshold on that side; in its order, as
    like ones together are what an adaptive coder needs.
    """
    key = torch.clamp(margin, 0, 65535).to(torch.int32).numpy().astype(np.uint16)
    order = np.argsort(key, kind="stable")
    centre, sign = near.to(torch.int32).numpy(), np.where(up.numpy(), np.int32(1), np.int32(-1))
    symbols = None
    if true is not None:
        d = (true - centre) * sign
        symbols = np.where(d > 0, 2 * d - 1, -2 * d)[order]
    coded = np.empty(key.size, np.int32)
    coded[order] = io.symbols(symbols, key.size)
    half = (coded + 1) >> 1
    found: Array = centre + sign * np.where(coded & 1, half, -half)
    return found


class _Nested(NamedTuple):
    """Double quantisation's statistics: a block's absmax is ``table[code] · factors[block // size] + offset``."""

    table: Array
    factors: Array
    offset: float
    size: int


def _code_scales(
    io: _Streams, true: Array | None, peaks: Tensor, first: int, nested: _Nested | None
) -> tuple[Array, Array]:
    """What is stored for the scales of blocks number ``first`` and on, predicted from the largest values in them, and
    the scales.
    """
    if nested is None:
        bits = peaks.to(torch.float32).numpy().view(np.int32)
        scales = io.differences(None if true is None else true.view(np.int32), bits).view(np.float32)
        return scales, scales
    factors = nested.factors[(first + np.arange(peaks.numel())) // nested.size].astype(np.float64)
    order = np.argsort(nested.table, kind="stable")
    table = nested.table[order].astype(np.float64)
    wanted = (peaks.numpy() - nested.offset) / np.where(factors == 0, 1.0, factors)
    near = order[np.searchsorted((table[1:] + table[:-1]) / 2, wanted)].astype(np.uint8).view(np.int8)
    codes = io.differences(None if true is None else true.view(np.int8), near).view(np.uint8)
    return codes, nested.table[codes].astype(np.float64) * factors + nested.offset


_MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def _code_dense(
    io: _Streams, dtype: torch.dtype, predicted: Iterator[tuple[int, Tensor]], true: Tensor | None
) -> bytes:
    """The bytes of a plain tensor of floats."""
    parts, patterns = [], None if true is None else _monotone(_patterns(true))
    for first, x in predicted:
        near = _monotone(_patterns(x if dtype == torch.float64 else x.to(torch.float32).to(dtype)))
        # how many units in the last place an error amounts to goes by the exponent
        key = (np.abs(near) >> (_MANTISSA[dtype] - 2)).astype(np.uint16)
        order = np.argsort(key, kind="stable")
        wanted = None if patterns is None else patterns[first : first + x.numel()][order]
        found = np.empty_like(near)
        found[order] = io.differences(wanted, near[order])
        parts.append(_monotone(found).tobytes())
    return b"".join(parts)


def _patterns(values: Tensor) -> Array:
    """The bit patterns (n,) of floats, as signed integers of their width."""
    widths = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return values.contiguous().reshape(-1).view(widths[values.dtype.itemsize]).numpy()


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
    return hash_tensors(folded.format.kind.prediction_inputs(folded.cpu()))


@_on_the_cpu()
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
    before, after, f = before.cpu(), after.cpu(), before.format
    tables = {k: bytes_of(before.tensors[k]) for k in f.kind.shared_tensors if k in before.tensors}
    facts: dict[str, Any] = {
        "format": asdict(f) | {"shape": list(f.shape), "dtype": name_of(f.dtype), "storage": name_of(f.storage)},
        "before": before.fingerprint,
        "after": evidence(after),
        "tensors": {k: described(t) for k, t in before.tensors.items()},
    }
    for k, content in tables.items():
        facts["tensors"][k]["table"] = hash_bytes(content)
    io = _Streams()
    stored = [bytes_of(t) for k, t in before.tensors.items() if k not in tables]
    if _predictable(before, after):
        if relaxation is not None and preserve.applies(f, after.format):
            facts["relaxation"] = round(relaxation * _power(_RELAXATION_BITS))
        try:
            facts["stages"], stages = _put_stages(io, chain, f.shape, max(noise, 2.0**-24))
            _code(io, facts, f, after, stages, before.tensors, before.tensors)
        except NonFiniteError:  # a rotation without an inverse
            io = _Streams()
    if not io.data or len(io.data) >= sum(map(len, stored)):
        facts.pop("stages", None)
        facts.pop("relaxation", None)
        io = _Streams()
        for raw in stored:
            io.raw(raw, len(raw))
    entry = UndoEntry(facts, bytes(io.data), {hash_bytes(t): t for t in tables.values()})
    decode_weight(entry, after)
    return entry


@_on_the_cpu()
def decode_weight(entry: UndoEntry, after: EncodedWeight) -> EncodedWeight:
    """The weight that was folded, from what the fold stored instead; on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not what the fold stored, or the result not what was folded.
    """
    facts, after = entry.facts, after.cpu()
    if evidence(after) != facts.get("after"):
        raise changed(
            "the weight is not the one that this record's fold left: another fold or another change lies on top, or it is of another model",
            format=after.format.label,
        )
    f = read_format(facts.get("format"), after.format.shape)
    limit = 8 * math.prod(f.shape) + 4096
    if not isinstance(facts.get("tensors"), dict):
        raise damaged()
    told = {name: _checked(t, limit=limit) for name, t in facts["tensors"].items()}
    own = {name: t for name, t in told.items() if "table" not in t}
    try:
        tables = {name: tensor_of(entry.tables[t["table"]], t) for name, t in told.items() if name not in own}
    except (KeyError, TypeError) as error:
        raise damaged() from error
    io = _Streams(entry.data)
    if "stages" in facts:
        found = _code(io, facts, f, after, _get_stages(io, facts["stages"], f.shape), tables, None)
    else:
        found = {name: io.raw(None, _nbytes(t)) for name, t in own.items()}
    io.end()
    if found.keys() != own.keys():
        raise damaged()
    tensors = tables | {name: tensor_of(raw, own[name]) for name, raw in found.items()}
    before = EncodedWeight(f, {name: tensors[name] for name in told})
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
    if not f.quantised:
        weight = None if true is None else true["weight"]
        return {"weight": _code_dense(io, f.dtype, _chunks(after, stages, 0), weight)}
    kind, n = f.kind, math.prod(f.shape)
    given: dict[str, Array] = {}
    if true is not None:
        given = {
            k: t.contiguous().reshape(-1).numpy() for k, t in true.items() if k not in ("weight", *kind.shared_tensors)
        }
        given["weight"] = kind.unpack_codes(true["weight"], n, facts).view(torch.uint8).numpy()
    ranked, relaxation = kind.codes_by_level(facts), facts.get("relaxation")
    fits = relaxation is None or (
        type(relaxation) is int and 0 < relaxation < 1 << (_RELAXATION_BITS + 17) and preserve.applies(f, after.format)
    )
    if ranked is None or not fits:
        raise damaged()
    kept = None if relaxation is None else _folded_scales(after)
    out: dict[str, bytes] = {}
    nested = None
    if f.nested_blocksize:
        table = tables.get("nested_quant_map")
        if table is None or table.dtype != torch.float32 or table.numel() != 256:
            raise damaged()
        blocks_of_blocks = -(-n // (f.blocksize * f.nested_blocksize))
        for name, nbytes in (("nested_absmax", 4 * blocks_of_blocks), ("nested_offset", 4)):
            out[name] = io.raw(given[name].tobytes() if given else None, nbytes)
        factors, offset = (np.frombuffer(raw, np.float32) for raw in out.values())
        nested = _Nested(table.reshape(-1).numpy(), factors, float(offset[0]), f.nested_blocksize)
    order = ranked.view(torch.uint8).numpy()
    ranks = np.zeros(256, np.int32)
    ranks[order] = np.arange(len(order))
    codes = np.empty(n, np.uint8)
    scales = np.empty(-(-n // f.block), np.uint8 if nested else np.float32)
    for first, x in _chunks(after, stages, f.blocksize, relaxation):
        here = slice(first, first + x.numel())
        of = slice(first // f.block, -(-here.stop // f.block))
        blocks = in_blocks(x, f.block)
        peaks = blocks.abs().amax(-1) if kept is None else kept[of]
        stated = given[kind.scales_name][of] if given else None
        scales[of], seen = _code_scales(io, stated, peaks, of.start, nested)
        divisors = torch.from_numpy(seen.astype(np.float64))
        numbers = blocks * kind.unit / torch.where(divisors == 0, 1.0, divisors).unsqueeze(-1)
        wanted = ranks[given["weight"][here]] if given else None
        found = _code_ranks(io, wanted, *kind.nearest_ranks(numbers.reshape(-1)[: x.numel()], ranked))
        if found.min() < 0 or found.max() >= len(order):
            raise damaged()
        codes[here] = order[found]
    stored = kind.repack_codes(torch.from_numpy(codes).view(ranked.dtype), facts)
    return {"weight": bytes_of(stored), kind.scales_name: scales.tobytes(), **out}


# --- one plain tensor -------------------------------------------------------------------------------------------------


@_on_the_cpu()
def encode_tensor(before: Tensor, after: Tensor) -> UndoEntry:
    """What gives the plain tensor ``before`` back from ``after``, which stands in its place (a trained bias or head),
    proved.
    """
    before, after = before.detach().cpu(), after.detach().cpu()
    facts: dict[str, Any] = {"before": _hash_one(before), "after": _hash_one(after), "tensor": described(before)}
    io = _Streams()
    if before.dtype in _MANTISSA and (before.dtype, before.shape) == (after.dtype, after.shape):
        _code_dense(io, before.dtype, _plain_chunks(after), before)
    if 0 < len(io.data) < before.nbytes:
        facts["predicted"] = True
    else:
        io = _Streams()
        io.raw(bytes_of(before), before.nbytes)
    entry = UndoEntry(facts, bytes(io.data), {})
    decode_tensor(entry, after)
    return entry


@_on_the_cpu()
def decode_tensor(entry: UndoEntry, after: Tensor) -> Tensor:
    """Mirror of :func:`encode_tensor`, on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not what stood in the tensor's place, or the result not what it was.
    """
    facts, after = entry.facts, after.detach().cpu()
    if _hash_one(after) != facts.get("after"):
        raise changed("the tensor is not the one that this record's fold left", shape=tuple(after.shape))
    about = _checked(facts.get("tensor"), limit=16 * after.numel() + 1024)
    io = _Streams(entry.data)
    if facts.get("predicted"):
        if about != described(after) or after.dtype not in _MANTISSA:
            raise damaged()
        raw = _code_dense(io, after.dtype, _plain_chunks(after), None)
    else:
        raw = io.raw(None, _nbytes(about))
    io.end()
    before = tensor_of(raw, about)
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


def bytes_of(t: Tensor) -> bytes:
    """Of a tensor on the CPU, whatever its dtype."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def described(t: Tensor) -> dict[str, Any]:
    """A tensor's dtype and shape as JSON."""
    return {"dtype": name_of(t.dtype), "shape": list(t.shape)}


def tensor_of(raw: bytes, about: Mapping[str, Any]) -> Tensor:
    """Mirror of :func:`bytes_of` and :func:`described`."""
    if len(raw) != _nbytes(about):
        raise damaged()
    dtype, shape = NAMED[about["dtype"]], about["shape"]
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def _nbytes(about: Mapping[str, Any]) -> int:
    return NAMED[about["dtype"]].itemsize * int(math.prod(about["shape"]))


def _checked(about: Any, *, limit: int) -> dict[str, Any]:
    """What a file says of a tensor, if that is possible and of at most ``limit`` bytes."""
    try:
        good = isinstance(about["shape"], list) and all(type(n) is int and n >= 0 for n in about["shape"])
        if not good or _nbytes(about) > limit:
            raise damaged()
    except (KeyError, TypeError) as error:
        raise damaged() from error
    return about  # type: ignore[no-any-return]


def read_format(facts: Any, shape: tuple[int, ...]) -> WeightFormat:
    """A format that a file names, for a weight of ``shape``."""
    try:
        sizes = facts["blocksize"], facts["nested_blocksize"]
        f = WeightFormat(facts["codec"], shape, NAMED[facts["dtype"]], *sizes, NAMED[facts["storage"]])
        least = f.kind.least_blocksize
    except (FormatError, KeyError, TypeError) as error:
        raise damaged() from error
    good = len(facts) == len(fields(f)) and facts["shape"] == list(shape)
    good = good and all(type(n) is int and 0 <= n <= 1 << 16 for n in sizes)
    if not good or f.blocksize < least or (f.nested_blocksize and not least):
        raise damaged()
    return f
