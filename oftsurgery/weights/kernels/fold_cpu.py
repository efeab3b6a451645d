"""Drive the fused CPU kernels (:mod:`oftsurgery.weights.cpu_kernels`): jobs, tiles and threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.four_bit import FourBit
from oftsurgery.weights import preserve
from oftsurgery.weights.cpu_kernels import OF_EVERY_FOLD, layout, processor, tables
from oftsurgery.weights.cpu_kernels.compiled import kernel
from oftsurgery.weights.cpu_kernels.compiled import prepare as prepare_kernels

from . import blockwise
from .addresses import scratch_at, word
from .pool import run

#: bytes of block matrices that stay in the second-level cache while rows pass by
_MATRIX_BYTES = 512 << 10
_CHUNK_WEIGHTS = 1 << 19
_MAX_SCRATCH = 48 << 20
_MAX_BLOCK = 512
#: scales of one task; values of a sample that are summed up in float32
_SCALES = _SAMPLE_CHUNK = 1 << 14
#: into which the evaluations of a sample are cut
_TASKS = 4

_DECODERS = {layout.FOUR_BIT: "decode_4bit", layout.INT8: "decode_int8"}

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Side:
    """The storage of the old or the new weight, as the kernels take it."""

    kind: int
    blocksize: int = 1
    flat: bool = False  # whether 4-bit blocks straddle rows


def _side(f: WeightFormat) -> _Side | None:
    kind = getattr(layout, f.kind.kernel_name(f), None)
    if kind is None or (kind == layout.F16 and not processor.HAS_F16):
        return None
    if f.blocksize % layout.LANES or f.blocksize > layout.MOST_BLOCK:
        return None
    return _Side(kind, f.blocksize or 1, bool(f.blocksize and f.shape[1] % f.blocksize))


def prepare(f: WeightFormat, into: WeightFormat, rounding: str) -> None:
    """Begin to read or to compile the kernels of a fold, while the caller does other work."""
    old, new = _side(f), _side(into)
    if old is None or new is None:
        return
    by, four_bit = tables.suffix(into.codec), new.kind == layout.FOUR_BIT
    search = [f"best_{by}" if rounding == "mse" else f"grid_{by}"] if four_bit and rounding != "nearest" else []
    if rounding == "preserve" and preserve.applies(f, into):
        encode = [f"keep_{by}", "sample", f"project_{by}"] if four_bit else ["encode_int8", "sample", "project_int8"]
    elif four_bit:
        encode = [f"given_{by}" if search else f"nearest_{by}"]
    else:
        encode = ["encode_int8" if new.kind == layout.INT8 else "encode_dense"]
    nested = ["quantise_scales"] * bool(into.nested_blocksize) + ["read_scales"] * bool(f.nested_blocksize)
    # the first ones are needed first
    decode = _DECODERS.get(old.kind, "decode_dense")
    prepare_kernels([*OF_EVERY_FOLD, *encode, *search, decode, *nested])


@dataclass(frozen=True)
class _Tiles:
    group: int
    row_step: int
    column_step: int
    x_stride: int
    y_stride: int

    @property
    def scratch(self) -> int:
        """Bytes of the base's and the exact values of a group."""
        return self.group * (self.x_stride + self.y_stride)


def _tiles(shape: tuple[int, int], b: int, old: _Side, new: _Side) -> _Tiles | None:
    """The tiles of a weight; None if its blocks make the scratch too large."""
    rows, features = shape
    whole = old.flat or new.flat or new.kind == layout.INT8
    inner = math.lcm(b, 1 if old.flat else old.blocksize)
    outer = inner if whole else math.lcm(inner, new.blocksize)
    wanted = max(1, _MATRIX_BYTES // (4 * b))
    columns = features if whole else min(features, max(1, wanted // outer) * outer)
    group = layout.ROWS
    for side in (old, new):
        if side.flat:
            group = math.lcm(group, side.blocksize // math.gcd(features, side.blocksize))
    pad = layout.LANES  # rows at distances of a power of two would share lines of the cache
    x_stride = 4 * (columns if old.flat or new.flat else columns + pad)
    y_stride = 4 * (columns if new.flat else columns + pad)
    # the step does not depend on the threads: sums are added tile by tile, and the recorded error must be the same for any
    # number of threads
    row_step = max(1, min(_CHUNK_WEIGHTS // columns, -(-rows // 8)) // group) * group
    tiles = _Tiles(group, row_step, columns, x_stride, y_stride)
    return tiles if tiles.scratch <= _MAX_SCRATCH else None


def fold(
    encoded: EncodedWeight, into: WeightFormat, matrices: Tensor, scale: Tensor | None, rounding: str
) -> blockwise.FoldedWeight | None:
    """``scale · (W · blockdiag(matrices))`` stored as ``into``, and the cost of storing it.

    Args:
        encoded: a weight on the CPU.
        matrices: ``(n, b, b)`` float32, or ``(1, b, b)`` for a matrix that all blocks share.
        scale: ``(out,)`` or None.
        rounding: as for :func:`oftsurgery.weights.kernels.fold`.

    Returns:
        the weight; None if the kernel does not take these shapes or formats, or met NaN or infinity: the reference then
        gives the answer, or the error.
    """
    f = encoded.format
    old, new = _side(f), _side(into)
    b = matrices.shape[-1]
    if old is None or new is None or b % layout.LANES or b > _MAX_BLOCK or f.shape[1] % b or 0 in f.shape:
        return None
    tiles = _tiles((f.shape[0], f.shape[1]), b, old, new)
    source = f.kind.kernel_operands(_plainly_scaled(encoded))
    if tiles is None or source is None:
        return None
    factors = None if scale is None else scale.to(torch.float32).contiguous()
    return _Fold(encoded, into, old, new, tiles, *source, matrices.contiguous(), factors).run(rounding)


def takes(f: WeightFormat, into: WeightFormat) -> bool:
    """Whether :func:`store` takes a weight of these formats."""
    return _tiles_of_rotated(f, into) is not None


def _tiles_of_rotated(f: WeightFormat, into: WeightFormat) -> tuple[_Side, _Side, _Tiles] | None:
    old, new = _side(f), _side(into)
    if old is None or new is None or f.shape[1] % layout.LANES or 0 in f.shape:
        return None
    tiles = _tiles((f.shape[0], f.shape[1]), layout.LANES, old, new)
    return None if tiles is None else (old, new, tiles)


def store(encoded: EncodedWeight, exact: Tensor, into: WeightFormat, rounding: str) -> blockwise.FoldedWeight | None:
    """The values ``exact``, which are those of ``encoded`` after a rotation, stored as ``into``, and the cost of storing.

    Args:
        encoded: a weight on the CPU.
        exact: ``(out, in)`` float32.
        rounding: as for :func:`oftsurgery.weights.kernels.fold`.

    Returns:
        the weight; None as for :func:`fold`.
    """
    found = _tiles_of_rotated(encoded.format, into)
    source = None if found is None else encoded.format.kind.kernel_operands(_plainly_scaled(encoded))
    if found is None or source is None or exact.dtype != torch.float32:
        return None
    unused = torch.empty(1, layout.LANES, layout.LANES)
    return _Fold(encoded, into, *found, *source, unused, None, exact.contiguous()).run(rounding)


def _plainly_scaled(encoded: EncodedWeight) -> EncodedWeight:
    """The weight without double quantisation. By a kernel: torch would have its threads wait for more, on processors that
    are needed.
    """
    f = encoded.format
    if not f.nested_blocksize:
        return encoded
    names = ("weight", "absmax", "nested_quant_map", "nested_absmax", "nested_offset")
    weight, *parts = encoded.require(*names)
    blocks = -(-math.prod(f.shape) // f.blocksize)
    sizes = (blocks, 256, -(-blocks // f.nested_blocksize), 1)
    if parts[0].dtype != torch.uint8 or any(t.numel() != n for t, n in zip(parts, sizes, strict=True)):
        return encoded  # the reference refuses these tensors
    codes, *numbers = (t.detach().contiguous() for t in parts)
    numbers = [t.to(torch.float32) for t in numbers]
    scales = torch.empty(blocks, dtype=torch.float32, device=_CPU)
    read, head = kernel("read_scales"), [word(t) for t in (codes, *numbers, f.nested_blocksize)]
    each = max(_SCALES, -(-blocks // 8))

    def task(i: int) -> None:
        read(*head, i * each, min(i * each + each, blocks), word(scales))

    run(task, -(-blocks // each))
    others = {name: t for name, t in encoded.tensors.items() if name == "quant_map"}
    return EncodedWeight(replace(f, nested_blocksize=0), {"weight": weight, "absmax": scales, **others})


_Stored = tuple[dict[str, Tensor], blockwise.Sums]


class _Sums(NamedTuple):
    """The sums of a pass, see :mod:`~oftsurgery.weights.cpu_kernels.layout`; ``top`` is no sum and has no meaning here."""

    norm: float
    error: float
    top: float
    nearest: float
    change: float
    held: float
    strong: float
    misfits: float


@dataclass(eq=False)
class _Fold(blockwise.Fold):
    """One fold of a weight: its tiles, and the passes over them; ``given`` are values that were rotated before."""

    old: _Side
    new: _Side
    tiles: _Tiles
    weight: Tensor
    scales: Tensor
    matrices: Tensor
    factors: Tensor | None
    given: Tensor | None = None

    def __post_init__(self) -> None:
        into, tiles, b = self.into, self.tiles, self.matrices.shape[-1]
        rows, features = into.shape
        self.by = tables.suffix(into.codec)
        self.common = np.zeros(layout.JOB // 8, np.int64)
        self._fill(
            self.common,
            decode=kernel(_DECODERS.get(self.old.kind, "decode_dense")).address,
            kind=self.old.kind,
            codes=self.weight,
            scales=self.scales,
            blocksize=self.old.blocksize,
            levels=blockwise.tables(self.encoded.format.codec, _CPU)[0],
            new_kind=self.new.kind,
            new_blocksize=self.new.blocksize,
            new_levels=tables.levels(into.codec),
            matrices=self.matrices,
            block=b,
            step=0 if self.matrices.shape[0] == 1 else 4 * b * b,
            factors=self.factors,
            given=self.given,
            out=rows,
            features=features,
            group=tiles.group,
            flat=self.old.flat,
            new_flat=self.new.flat,
            x_stride=tiles.x_stride,
            y_stride=tiles.y_stride,
        )

    @staticmethod
    def _fill(job: np.ndarray, **values: Any) -> None:
        """Put tensors and numbers into a job, by the names of their places in :mod:`~oftsurgery.weights.cpu_kernels.layout`, in lower case."""
        for name, value in values.items():
            job[getattr(layout, name.upper()) // 8] = word(value)

    def _pass(
        self, places: Sequence[tuple[int, int, int]], result: Sequence[int], encode: str, then: str = "", **more: Any
    ) -> tuple[_Sums, _Sums]:
        """The sums of one pass over ``places``, (first row, end, first column) each; of an encoder that another follows apart.

        Args:
            result: an address for each place.
            encode, then: names of kernels.
            more: of the job, see :meth:`_fill`.
        """
        job = self.common.copy()
        self._fill(job, encode=kernel(encode).address, then=kernel(then).address if then else 0, **more)
        sums = np.zeros((len(places), 2, layout.SUMS // 128, layout.LANES))
        features, step, scratch = self.into.shape[1], self.tiles.column_step, self.tiles.scratch + layout.WORK + 192
        tile, address, at = kernel("tile"), word(job), word(sums)

        def task(i: int) -> None:
            row, end, column = places[i]
            to, sums_at = result[i], at + 2 * layout.SUMS * i
            tile(address, to, row, end, column, min(column + step, features), scratch_at(scratch), sums_at)

        run(task, len(places))
        totals = sums.sum((0, 3))
        tops = sums[:, :, layout.TOP // 128, 0]
        self.finite = self.finite and bool(tops.max() < layout.NOT_FINITE)
        last, first = (_Sums(*each) for each in totals.tolist())
        return last, first

    def _places(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Tiles of the rows from ``begin`` to ``end``."""
        features, step = self.encoded.format.shape[1], self.tiles.row_step
        return [
            (row, min(row + step, end), column)
            for column in range(0, features, self.tiles.column_step)
            for row in range(begin, end, step)
        ]

    def round(self, rounding: str) -> blockwise.FoldedWeight | None:
        into = self.into
        result, scales, moments = blockwise.allocate(into, _CPU)
        room = {
            "absmax": scales,
            "new_scales": scales,
            "moments": None if moments is None else moments.view(3, -1),
            "moment_plane": 4 * len(scales),
        }
        found = self._nearest(result, room) if rounding == "nearest" else self._better(rounding, result, room)
        if found is None:
            return None
        statistics, sums = found
        return sums.folded(into.kind.assemble(into, result, statistics), rounding)

    def _nearest(self, result: Tensor, room: dict[str, Any]) -> _Stored | None:
        """The statistics and sums of plain rounding; the codes go to ``result``."""
        names = {layout.FOUR_BIT: f"nearest_{self.by}", layout.INT8: "encode_int8"}
        sums, _ = self._over_all(result, names.get(self.new.kind, "encode_dense"), **room)
        if not self.finite:
            return None
        statistics, error, held = quantise_scales(room["absmax"], self.into, room["moments"])
        error += sums.error
        return statistics, blockwise.Sums(sums.norm, error, error, sums.change, sums.held + held)

    def _better(self, rounding: str, result: Tensor, room: dict[str, Any]) -> _Stored | None:
        """As :meth:`_nearest`, with scales that err less."""
        assert isinstance(self.into.kind, FourBit)  # noqa: S101 - no other format has such roundings
        scales, find = room["new_scales"], f"{'best' if rounding == 'mse' else 'grid'}_{self.by}"
        room["search"] = tables.search(self.into.kind, rounding)
        plain, nested = torch.empty_like(scales), bool(self.into.nested_blocksize)
        if nested:  # the cost of these scales in double quantisation, and that of plain rounding's
            room |= {"absmax": plain, "moments": torch.zeros(6, len(scales), dtype=torch.float32, device=_CPU)}
        after, search = self._over_all(result, find, f"given_{self.by}", **room)
        if not self.finite:
            return None
        statistics, error, held = quantise_scales(scales, self.into, room["moments"])
        nearest = search.nearest + (quantise_scales(plain, self.into, room["moments"][3:])[1] if nested else 0.0)
        return statistics, blockwise.Sums(after.norm, after.error + error, nearest, after.change, after.held + held)

    def _over_all(self, result: Tensor, encode: str, then: str = "", **more: Any) -> tuple[_Sums, _Sums]:
        """:meth:`_pass` over the whole weight."""
        places = self._places(0, self.into.shape[0])
        return self._pass(places, [result.data_ptr()] * len(places), encode, then, **more)

    def keep(self) -> blockwise.FoldedWeight | None:
        into = self.into
        own = preserve.scales_of(self.encoded, into, None if self.new.kind == layout.INT8 else self.scales)
        kept = _kept(own, into)
        steps = self._steps(kept)
        if steps is None:
            return None
        result, scales, _ = blockwise.allocate(into.single, _CPU)
        kept["numbers"][layout.OVER // 4] = preserve.relaxation_of(steps) - 1
        encode, room = "encode_int8", dict[str, Any](new_scales=scales, keeps=1)
        if self.new.kind != layout.INT8:
            assert isinstance(into.kind, FourBit)  # noqa: S101 - the kernels know only int8 and 4-bit
            find, table = kernel(f"grid_{self.by}").address, tables.search(into.kind, "grid")
            encode, room = f"keep_{self.by}", dict[str, Any](new_scales=scales, find=find, search=table)
        sums, _ = self._over_all(result, encode, **room, **kept)
        if not self.finite or sums.misfits:
            return None
        codes = kept["held_out"]
        statistics = preserve.put_scales(own, into, scales if codes is None else codes)
        folded = blockwise.Sums(sums.norm, sums.error, None, sums.change, sums.held)
        return folded.folded(into.kind.assemble(into, result, statistics), "preserve", preserve.relaxation_of(steps))

    def _steps(self, kept: dict[str, Any]) -> int | None:
        """:func:`oftsurgery.weights.preserve.relaxation` of this weight."""
        return preserve.from_samples(self.into, (), partial(self._steps_of, kept))

    def _steps_of(self, kept: dict[str, Any], ranges: preserve.Ranges) -> int | None:
        into, features, size = self.into, self.into.shape[1], self.into.block
        blocks = [-(-(end - begin) * features // size) for begin, end in ranges]
        planes, weights = np.empty((2, sum(blocks) * size), np.float32), np.zeros(sum(blocks), np.float32)
        planes[:, -size:] = 0  # the last block may be a short one
        at, plane = planes.ctypes.data, planes.strides[0]
        places: list[tuple[int, int, int]] = []
        to: list[int] = []
        for (begin, end), before in zip(ranges, np.cumsum([0, *blocks]).tolist(), strict=False):
            here = self._places(begin, end)
            places += here
            to += [at + 4 * (before * size - begin * features)] * len(here)
        room = dict[str, Any](planes=planes, plane=plane, weights=weights, new_blocksize=size)
        sums, _ = self._pass(places, to, "sample", **room, **kept)
        if not self.finite or 2 * sums.strong > len(weights):
            return None
        if not sums.norm > 0:
            return 0
        project = kernel("project_int8" if self.new.kind == layout.INT8 else f"project_{self.by}")
        each = max(1, _SAMPLE_CHUNK // size)
        parts = -(-len(weights) // each)
        first, levels = [at, plane, word(weights), len(weights), each], word(tables.levels(into.codec))

        def kept_at(steps: Sequence[int]) -> list[float]:
            omegas = np.array([preserve.relaxation_of(k) for k in steps], np.float32)
            found = np.empty((parts, len(steps), layout.LANES), np.float32)
            end = [size, levels, word(omegas), len(steps), word(found)]

            def task(i: int) -> None:
                project(*first, parts * i // _TASKS, parts * (i + 1) // _TASKS, *end)

            run(task, _TASKS)
            return [float(x) for x in found.sum((0, 2), dtype=np.float64) / sums.norm]

        return preserve.solve(kept_at)


def quantise_scales(
    scales: Tensor, into: WeightFormat, moments: Tensor | None = None
) -> tuple[dict[str, Tensor], float, float]:
    """The tensors that hold the ``scales`` of a format, and what their double quantisation costs.

    Args:
        scales: ``(blocks,)`` float32.
        into: the format, with double quantisation or without.
        moments: ``(3, blocks)`` float32: Σ c(c - s), Σ c² and Σ c(s - v) of each block's levels c and its weights before (v)
            and after the rotation (s), in units of its scale; or None.

    Returns:
        the tensors, and from the moments what is added to Σ (stored - exact)² and to Σ (stored - exact)(exact - base).
    """
    if not into.nested_blocksize:
        return into.kind.statistics(scales, into), 0.0, 0.0
    assert isinstance(into.kind, FourBit)  # noqa: S101 - no other format has them
    offset = into.kind.offset_of(scales, into)
    table = tables.dynamic().copy()
    table.view(np.float32)[0] = offset.item()
    count, size = len(scales), into.nested_blocksize
    blocks, each = -(-count // size), max(1, _SCALES // size)
    codes = torch.empty(count, dtype=torch.uint8, device=_CPU)
    factors = torch.empty(blocks, dtype=torch.float32, device=_CPU)
    sums = np.zeros((-(-blocks // each), layout.SUMS // 128, layout.LANES))
    first = [word(x) for x in (table, scales, count, size)]
    seen = torch.empty_like(scales)
    then = [word(x) for x in (codes, factors, seen, moments, 4 * count)]
    quantise, at = kernel("quantise_scales"), sums.ctypes.data

    def task(i: int) -> None:
        quantise(*first, i * each, min(i * each + each, blocks), *then, at + i * layout.SUMS)

    run(task, len(sums))
    error, held, misfits = (float(sums.sum((0, 2))[x // 128]) for x in (layout.ERROR, layout.HELD, layout.MISFITS))
    map_ = table[layout.DYNAMIC_MAP : layout.DYNAMIC_STEPS].view(np.float32).copy()
    nested = {"nested_absmax": factors, "nested_quant_map": torch.from_numpy(map_), "nested_offset": offset}
    statistics = {"absmax": codes, **nested}
    if misfits:  # the reciprocals are infinite, because the scales differ so little: bitsandbytes decides the codes
        statistics = into.kind.statistics(scales, into)
        if moments is not None:
            error, held = blockwise.nested_error(into, scales, statistics, moments[:3].t())
    return statistics, error, held


def _kept(own: preserve.Scales, into: WeightFormat) -> dict[str, Any]:
    """The part of a job for the base's own scales."""
    values = own.values.contiguous()
    square, clip = preserve.limits(into)
    largest = max(float(values.numpy().max()), -float(values.numpy().min())) or 1.0
    offset = float(own.nested.get("nested_offset", 0.0))
    numbers = np.array([0, square, clip, offset, preserve.MISFIT, largest], np.float32)
    if own.codes is None:
        return {"own": values, "numbers": numbers, "held_out": None}
    ordered, order = (t.numpy() for t in own.in_order())
    middles = (ordered[1:] + ordered[:-1]) / 2
    return {
        "own": values,
        "numbers": numbers,
        "held_levels": np.concatenate([ordered, middles, [np.inf]]).astype(np.float32),
        "held_codes": order.astype(np.float32),
        "held_factors": own.nested["nested_absmax"].reshape(-1).to(torch.float32).contiguous(),
        "held_size": own.size,
        "held_out": torch.from_numpy(own.codes.detach().numpy().copy()),
    }
