"""Drive the fused CPU kernel (:mod:`oftsurgery.weights.kernels.cpu`): addresses, tiles and threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.four_bit import FourBit
from oftsurgery.formats.scales import GRID
from oftsurgery.weights import preserve

from . import blockwise, cpu
from .pool import run

#: bytes of block matrices that stay in the second-level cache while rows pass by
_MATRIX_BYTES = 512 << 10
_CHUNK_WEIGHTS = 1 << 19
_MAX_SCRATCH = 48 << 20
_MAX_BLOCK = 512

_local = threading.local()


def _scratch(count: int) -> int:
    """The 64-byte aligned address of this thread's own ``count`` float32, which are kept for the next tile."""
    held: tuple[int, int, np.ndarray] | None = getattr(_local, "scratch", None)
    if held is None or held[0] < count:
        room = np.zeros(4 * count + 64, dtype=np.uint8)
        held = _local.scratch = count, (room.ctypes.data + 63) & ~63, room
    return held[1]


@dataclass(frozen=True)
class _Side:
    """The storage of the old or the new weight, as the kernel takes it."""

    kind: int
    blocksize: int = 1
    flat: bool = False  # whether 4-bit blocks straddle rows


def _side(f: WeightFormat) -> _Side | None:
    kind = getattr(cpu, f.kind.kernel_name(f), None)
    if kind is None or (kind == cpu.F16 and not cpu.HAS_F16) or f.blocksize % cpu.LANES:
        return None
    return _Side(kind, f.blocksize or 1, bool(f.blocksize and f.shape[1] % f.blocksize))


_CPU = torch.device("cpu")


@cache
def _cells(codec: str) -> tuple[bool, np.ndarray]:
    """Whether :func:`oftsurgery.weights.kernels.cpu.rank_by_cell` serves the codec's levels, and its table: 32 int32, 32
    float32.
    """
    _, _, bounds, order = (t.numpy() for t in blockwise.tables(codec, _CPU))
    bounds = bounds[:15]
    # cells grow with the values, so a value in a higher cell than a bound is above that bound; no bound is at the edge of
    # its own cell, where the kernel's rounding would matter
    positions = bounds.astype(np.float64) * cpu.CELL_FACTOR + 16
    own = positions.astype(np.int32)
    table = np.zeros((2, 32), dtype=np.int32)
    sure = len(set(own)) == 15 and bool((np.abs(positions - positions.round()) > 1e-4).all())
    if not cpu.CELLS or not sure or (order != np.arange(16)).any():
        return False, table
    table[0] = [(own < cell).sum() for cell in range(32)]
    table[1] = np.full(32, np.inf, dtype=np.float32).view(np.int32)
    table[1, own] = bounds.view(np.int32)
    return True, table


#: scales, in units of absmax, between which the kernel's search for the best scale begins: far from the usual best scale
#: they may be farther apart
_RATIOS = (
    0.65, 0.72, 0.77, 0.82, 0.86, 0.9, 0.94, 0.97, 1.0, 1.035, 1.07, 1.11, 1.155, 1.21, 1.275, 1.35, 1.45, 1.58, 1.76, 2.05, 2.5,
    3.3, 5.0, 9.0,
)  # fmt: skip


@cache
def _search(kind: FourBit, rounding: str) -> np.ndarray:
    """The kernel's table for the search of scales: see :func:`oftsurgery.weights.kernels.cpu._try_ratios`."""
    codec = kind.name
    _, levels, bounds, _ = (t.numpy().astype(np.float64) for t in blockwise.tables(codec, _CPU))
    bounds = bounds[:15]
    mirrored = bool((levels == -levels[::-1]).all())  # signs are kept apart, so half as many levels do
    if mirrored:
        levels, bounds = levels[8:], bounds[8:]
    # cells of 1/16, or of 1/32 of the magnitudes; 1 is in the last cell
    factor, shift = (32 * (1 - 1e-5), 0.0) if mirrored else (16 * (1 - 1e-5), 16.0)
    ratios = np.array(GRID if rounding == "grid" else (*_RATIOS, *kind.farther))
    count = len(ratios)
    nothing = 1.01 / np.abs(bounds).min()  # from this ratio on all codes are zero
    table = np.zeros(cpu.CELL_TABLES + 64 * count, dtype=np.float32)

    def place(offset: int, values: np.ndarray) -> None:
        table[offset : offset + len(values)] = values

    ends = np.append(ratios, nothing)
    steps, low, high = np.diff(ends), ends[:-1], ends[1:]
    place(cpu.RATIOS, ends)
    place(cpu.CURVE, steps**2 / (low * high))
    place(cpu.LEFT, steps / low)
    place(cpu.RIGHT, steps / high)
    table[cpu.UNUSED : cpu.UNUSED + 32] = 1e30
    table[cpu.UNUSED : cpu.UNUSED + count] = 0
    place(cpu.LEVELS, np.append(levels, np.full(16 - len(levels), levels[-1])))
    place(cpu.BOUNDS, np.append(bounds, np.full(16 - len(bounds), np.inf)))
    one, step = list(ratios).index(1.0), 1.25 * (rounding == "mse")
    place(cpu.META, np.array([factor, shift, mirrored, count, one, step, ends[-1]]))
    edges = (np.arange(33) - shift) / factor
    for j, ratio in enumerate(ratios):
        at = cpu.CELL_TABLES + 64 * j
        below = np.searchsorted(bounds * ratio, edges)  # the number of bounds below each edge
        inside, k = np.diff(below) > 0, below[:-1]
        assert (np.diff(below) < 2).all(), (codec, ratio)  # noqa: S101 - the table above holds this
        # the levels on both sides of the cell's bound (its middle and half their distance), or the cell's only level
        place(at, np.where(inside, np.append(bounds, 0.0)[k], levels[k]) * ratio)
        place(at + 32, np.where(inside, np.append(np.diff(levels), 0.0)[k] / 2, 0.0) * ratio)
    return table


def _search_for(into: WeightFormat, rounding: str) -> np.ndarray | None:
    return _search(into.kind, rounding) if isinstance(into.kind, FourBit) else None


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
    whole = old.flat or new.flat or new.kind == cpu.INT8
    inner = math.lcm(b, 1 if old.flat else old.blocksize)
    outer = inner if whole else math.lcm(inner, new.blocksize)
    wanted = max(1, _MATRIX_BYTES // (4 * b))
    columns = features if whole else min(features, max(1, wanted // outer) * outer)
    group = cpu.ROWS
    for side in (old, new):
        if side.flat:
            group = math.lcm(group, side.blocksize // math.gcd(features, side.blocksize))
    pad = cpu.LANES  # rows at distances of a power of two would share lines of the cache
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
    if old is None or new is None or b % cpu.LANES or b > _MAX_BLOCK or f.shape[1] % b or 0 in f.shape:
        return None
    tiles = _tiles((f.shape[0], f.shape[1]), b, old, new)
    source = f.kind.kernel_operands(encoded)
    if tiles is None or source is None:
        return None
    factors = None if scale is None else scale.to(torch.float32).contiguous()
    return _Fold(encoded, into, old, new, tiles, *source, matrices.contiguous(), factors).run(rounding)


def _levels(codec: str) -> tuple[int, int, int, bool, int]:
    """The kernel's arguments for the new levels."""
    _, levels, bounds, order = (t.data_ptr() for t in blockwise.tables(codec, _CPU))
    by_cell, cells = _cells(codec)
    return levels, bounds, order, by_cell, cells.ctypes.data


@dataclass(eq=False)
class _Fold(blockwise.Fold):
    """One fold of a weight: its tiles, and the passes over them."""

    old: _Side
    new: _Side
    tiles: _Tiles
    weight: Tensor
    scales: Tensor
    matrices: Tensor
    factors: Tensor | None

    def _pass(
        self,
        mode: int,
        places: Sequence[tuple[int, int, int]],
        result: Sequence[int],
        scales: Tensor,
        *,
        search: np.ndarray | None = None,
        moments: Tensor | None = None,
        plain: Tensor | None = None,
        keep: np.ndarray | None = None,
    ) -> np.ndarray:
        """The sums ``(SUMS,)`` of one pass over ``places``, each (first row, end, first column) with an address in
        ``result``.
        """
        old, new, tiles, matrices = self.old, self.new, self.tiles, self.matrices
        rows, features = self.encoded.format.shape
        old_levels = blockwise.tables(self.encoded.format.codec, _CPU)[0]
        first = (
            old.kind, self.weight.data_ptr(), self.scales.data_ptr(), old.blocksize, old_levels.data_ptr(), new.kind,
        )  # fmt: skip
        search_at, keep_at = (0 if table is None else table.ctypes.data for table in (search, keep))
        moments_at, plain_at, factors_at = (0 if t is None else t.data_ptr() for t in (moments, plain, self.factors))
        then = (
            scales.data_ptr(), new.blocksize, *_levels(self.into.codec), moments_at,
            matrices.data_ptr(), matrices.shape[-1], matrices.shape[0] == 1, factors_at, rows, features,
        )  # fmt: skip
        sums = np.zeros((len(places), cpu.SUMS))

        def task(i: int) -> None:
            row, end, column = places[i]
            x = _scratch(tiles.scratch // 4 + 32 + cpu.WORK)
            y = (x + tiles.group * tiles.x_stride + 63) & ~63
            work = (y + tiles.group * tiles.y_stride + 63) & ~63
            cpu.fold_tile(
                *first, result[i], *then,
                row, end, column, min(column + tiles.column_step, features),
                tiles.group, old.flat, new.flat, x, tiles.x_stride, y, tiles.y_stride,
                mode, search_at, plain_at, work, keep_at, sums[i],
            )  # fmt: skip

        run(task, len(places))
        total: np.ndarray = sums.sum(0)
        total[2] = sums[:, 2].max(initial=0)
        self.finite = self.finite and total[2] < blockwise.NOT_FINITE
        return total

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
        places = self._places(0, into.shape[0])
        to = [result.data_ptr()] * len(places)
        best = rounding != "nearest"
        search = _search_for(into, rounding) if best else None
        plain = torch.empty_like(scales) if best and moments is not None else None
        mode = cpu.NEAREST if not best else cpu.BEST if moments is None else cpu.SCALES
        total = self._pass(mode, places, to, scales, search=search, moments=moments, plain=plain)
        if not self.finite:
            return None
        norm, error, _, nearest, change, held, _, _ = map(float, total)
        statistics = into.kind.statistics(scales, into)
        if not best:
            if moments is not None:
                more, more_held = _nested_error(into, scales, statistics, moments)
                error, held = error + more, held + more_held
            nearest = error
        elif plain is not None and moments is not None:
            # codes for the scales that a reader will see
            seen = EncodedWeight(into, statistics).scales.contiguous()
            again = self._pass(cpu.GIVEN, places, to, seen, search=search)
            error, held = float(again[1]), float(again[5])
            nearest += _nested_error(into, plain, into.kind.statistics(plain, into), moments)[0]
        sums = blockwise.Sums(norm, error, nearest, change, held)
        return sums.folded(into.kind.assemble(into, result, statistics), rounding)

    def keep(self) -> blockwise.FoldedWeight | None:
        into, rows = self.into, self.into.shape[0]
        own = preserve.scales_of(self.encoded, into)
        options = _Keep(own, into)
        steps = self._steps(options)
        if steps is None:
            return None
        result, scales, _ = blockwise.allocate(into.single, _CPU)
        places = self._places(0, rows)
        options.numbers[0] = preserve.relaxation_of(steps) - 1
        total = self._pass(
            cpu.KEEP, places, [result.data_ptr()] * len(places), scales,
            search=_search_for(into, "grid"), keep=options.table,
        )  # fmt: skip
        norm, error, _, _, change, held, _, misfits = map(float, total)
        if not self.finite or misfits:
            return None
        statistics = preserve.put_scales(own, into, scales if options.codes is None else options.codes)
        sums = blockwise.Sums(norm, error, None, change, held)
        return sums.folded(into.kind.assemble(into, result, statistics), "preserve", preserve.relaxation_of(steps))

    def _steps(self, options: _Keep) -> int | None:
        """:func:`oftsurgery.weights.preserve.relaxation` of this weight."""
        rows, features = self.into.shape
        ranges = preserve.sample_of(rows, features, preserve.whole_rows(self.into))
        planes = np.empty((3, sum(end - begin for begin, end in ranges) * features), np.float32)
        options.table[cpu.PLANE] = planes.strides[0]
        places, to, at = [], [], planes.ctypes.data
        for begin, end in ranges:
            here = self._places(begin, end)
            places += here
            to += [at + 4 * (row - begin) * features for row, _, _ in here]
            at += 4 * (end - begin) * features
        total = self._pass(cpu.SAMPLE, places, to, options.own.values, keep=options.table)
        blocks = -(-planes.shape[1] // self.into.block)
        if not self.finite or 2 * total[6] > blocks:
            return None
        if not total[0] > 0:
            return 0
        chunk = 1 << 14

        def kept(steps: Sequence[int]) -> list[float]:
            relaxations = np.array([preserve.relaxation_of(k) for k in steps])
            sums = np.zeros((-(-planes.shape[1] // chunk), len(steps)))

            def task(i: int) -> None:
                cpu.projections(
                    planes.ctypes.data, planes.strides[0], i * chunk, min(i * chunk + chunk, planes.shape[1]),
                    self.new.kind == cpu.INT8, *_levels(self.into.codec), relaxations, sums[i],
                )  # fmt: skip

            run(task, len(sums))
            return [float(x) for x in sums.sum(0) / total[0]]

        return preserve.solve(kept)


def _nested_error(
    into: WeightFormat, scales: Tensor, statistics: dict[str, Tensor], moments: Tensor
) -> tuple[float, float]:
    """:func:`oftsurgery.weights.kernels.blockwise.nested_error` in one pass, without temporaries."""
    codes, nested, levels, offset = (
        statistics[name] for name in ("absmax", "nested_absmax", "nested_quant_map", "nested_offset")
    )
    error, kept = cpu.nested_error(
        scales.numpy(), codes.reshape(-1).numpy(), levels.numpy(), nested.reshape(-1).numpy(),
        np.float32(offset.item()), into.nested_blocksize, moments.numpy(),
    )  # fmt: skip
    return float(error), float(kept)


class _Keep:
    """The table that :func:`oftsurgery.weights.kernels.cpu.fold_tile` takes for KEEP and SAMPLE, and the arrays behind it."""

    def __init__(self, own: preserve.Scales, into: WeightFormat) -> None:
        self.own = own
        self._values = own.values.contiguous()
        square, clip = preserve.limits(into)
        largest = float(self._values.abs().max())
        offset = float(own.nested.get("nested_offset", 0.0))
        self.numbers = np.array([0, square, clip, offset, preserve.MISFIT, largest or 1], np.float32)
        self.table = np.zeros(8, np.int64)
        self.table[cpu.OWN], self.table[cpu.NUMBERS] = self._values.data_ptr(), self.numbers.ctypes.data
        self.codes: Tensor | None = None
        if own.codes is not None:
            ordered, order = (t.numpy() for t in own.in_order())
            middles = (ordered[1:] + ordered[:-1]) / 2
            self._ordered = np.concatenate([ordered, middles, [np.inf]]).astype(np.float32)
            self._order = order.astype(np.float32)
            self._factors = own.nested["nested_absmax"].reshape(-1).to(torch.float32).contiguous()
            self.codes = own.codes.detach().clone()
            self.table[cpu.TABLE], self.table[cpu.TABLE_CODES] = self._ordered.ctypes.data, self._order.ctypes.data
            self.table[cpu.FACTORS], self.table[cpu.FACTOR_SIZE] = self._factors.data_ptr(), own.size
            self.table[cpu.SCALE_CODES] = self.codes.data_ptr()


# --- block rotations --------------------------------------------------------------------------------------------------

_SOLVE_TOLERANCE = 1e-10
_LANCZOS_STEPS = 160
#: the size of blocks up to which two products are cheaper than a search for the largest angle
_BOUNDED = 32
#: work that is worth a task of its own, in multiplications
_TASK_PRODUCTS = 1 << 19


def blocks(generator: Tensor, b: int, wide: int, power: int, weight: float) -> Tensor | None:
    """``(n·b/wide, wide, wide)`` float64: the rotations of ``generator: (n, b(b-1)/2)``, ``wide/b`` on each diagonal
    (one for a single, shared one).

    Args:
        power: 0 for the exact Cayley map, else the power of the series ``I + 2ΣQᵏ (k < power) + weight · Q^power``.

    Returns:
        the blocks; None if the solve is not right.
    """
    v, parts, count = _parted(generator, b, wide)
    out = np.empty((count, wide, wide))
    residuals = np.zeros(len(parts))

    def task(i: int) -> None:
        residuals[i] = cpu.rotation_blocks(v, b, *parts[i], power, weight, np.empty((3, wide, wide)), out)

    run(task, len(parts))
    return torch.from_numpy(out) if bool((residuals <= _SOLVE_TOLERANCE).all()) else None  # NaN compares false


def largest_angle(generator: Tensor, b: int, wide: int) -> float:
    """The largest θ for which ±iθ is an eigenvalue of a generator's block."""
    v, parts, count = _parted(generator, b, wide)
    steps = min(wide, _LANCZOS_STEPS) + 2
    if count > 1 and wide <= _BOUNDED:
        bounds = np.empty(count)

        def bound(i: int) -> None:
            cpu.angle_bounds(v, b, wide, *parts[i], np.empty((3, wide, wide)), bounds)

        run(bound, len(parts))
        # the block with the largest bound comes first: few of the other blocks can be larger
        q, basis, best = np.empty((wide, wide)), np.empty((steps, wide)), 0.0
        for index in np.argsort(-bounds):
            if bounds[index] * (1 + 1e-9) < best:
                break
            best = cpu.largest_angle(v, b, wide, index, index + 1, best, q, basis)
        return best
    found = np.zeros(len(parts))

    def task(i: int) -> None:
        found[i] = cpu.largest_angle(v, b, wide, *parts[i], 0.0, np.empty((wide, wide)), np.empty((steps, wide)))

    run(task, len(parts))
    return float(found.max())


def _parted(generator: Tensor, b: int, wide: int) -> tuple[np.ndarray, list[tuple[int, int]], int]:
    """A generator's rows in float64, the ranges of its blocks of ``wide`` (one task each), and the number of blocks."""
    v = generator.detach().contiguous()
    rows = (v if v.dtype in (torch.float32, torch.float64) else v.to(torch.float32)).numpy().astype(np.float64)
    count = max(1, len(rows) * b // wide)
    each = max(1, _TASK_PRODUCTS // wide**3)
    return rows, [(i, min(i + each, count)) for i in range(0, count, each)], count
