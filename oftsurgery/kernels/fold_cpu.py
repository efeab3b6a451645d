"""Drive the fused CPU kernel (:mod:`oftsurgery.kernels.cpu`): addresses, tiles and threads."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from oftsurgery import codecs
from oftsurgery.codecs import EncodedWeight, WeightFormat

from . import blockwise, cpu
from .pool import run

__all__ = ["blocks", "fold", "largest_angle"]

#: of block matrices that stay in the second-level cache while rows pass by
_MATRIX_BYTES = 512 << 10
_CHUNK_WEIGHTS = 1 << 19
_MAX_SCRATCH = 48 << 20
_MAX_BLOCK = 512

_DENSE = {torch.float32: cpu.F32, torch.float16: cpu.F16, torch.bfloat16: cpu.BF16}
_local = threading.local()


def _scratch(count: int) -> int:
    """Address of ``count`` float32 of this thread's own, 64-byte aligned, kept for the next tile."""
    held: tuple[int, int, np.ndarray] | None = getattr(_local, "scratch", None)
    if held is None or held[0] < count:
        room = np.zeros(4 * count + 64, dtype=np.uint8)
        held = _local.scratch = count, (room.ctypes.data + 63) & ~63, room
    return held[1]


@dataclass(frozen=True)
class _Side:
    """One side's storage as the kernel takes it."""

    kind: int
    blocksize: int = 1
    flat: bool = False  # 4-bit blocks straddle rows


def _side(f: WeightFormat) -> _Side | None:
    if f.codec == "int8":
        return _Side(cpu.INT8)
    if f.codec == "dense":
        kind = _DENSE.get(f.dtype)
        return None if kind is None or (kind == cpu.F16 and not cpu.HAS_F16) else _Side(kind)
    if f.blocksize < cpu.LANES or f.blocksize % cpu.LANES:
        return None
    return _Side(cpu.FOUR_BIT, f.blocksize, f.shape[1] % f.blocksize != 0)


@cache
def _tables(codec: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels by code, sorted levels, bounds between them, codes of the sorted levels: (16,) each."""
    device = torch.device("cpu")
    if codec not in ("nf4", "fp4"):
        unused = torch.zeros(16, dtype=torch.float32, device=device)
        return unused, unused, unused, unused.to(torch.int32)
    levels = codecs._levels(codec, device)
    bounds, order = codecs._bounds(codec, device)
    return levels, levels[order].contiguous(), torch.cat([bounds, bounds[-1:]]), order.to(torch.int32)


@cache
def _cells(codec: str) -> tuple[bool, np.ndarray]:
    """Whether :func:`oftsurgery.kernels.cpu.rank_by_cell` serves the codec's levels, and its table: 32 int32, 32
    float32.
    """
    _, _, bounds, order = (t.numpy() for t in _tables(codec))
    bounds = bounds[:15]
    # a value's cell grows with it, so one in a higher cell than a bound is above it; no bound is at the edge of its own,
    # where the kernel's rounding would matter
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


#: scales, in units of absmax, between which the kernel's search for the best begins: the farther from the usual best,
#: the farther apart they may be
_RATIOS = (
    0.65, 0.72, 0.77, 0.82, 0.86, 0.9, 0.94, 0.97, 1.0, 1.035, 1.07, 1.11, 1.155, 1.21, 1.275, 1.35, 1.45, 1.58, 1.76, 2.05, 2.5,
    3.3, 5.0, 9.0,
)  # fmt: skip
_FARTHER = {"nf4": (), "fp4": (20.0, 70.0)}


@cache
def _search(codec: str, rounding: str) -> np.ndarray:
    """What the kernel looks scales up in: see :func:`oftsurgery.kernels.cpu._try_ratios`."""
    _, levels, bounds, _ = (t.numpy().astype(np.float64) for t in _tables(codec))
    bounds = bounds[:15]
    mirrored = bool((levels == -levels[::-1]).all())  # the signs apart, half as many levels
    if mirrored:
        levels, bounds = levels[8:], bounds[8:]
    # cells of 1/16, or of 1/32 of the magnitudes; 1 is in the last
    factor, shift = (32 * (1 - 1e-5), 0.0) if mirrored else (16 * (1 - 1e-5), 16.0)
    ratios = np.array(codecs.GRID if rounding == "grid" else (*_RATIOS, *_FARTHER[codec]))
    count = len(ratios)
    nothing = 1.01 / np.abs(bounds).min()  # from here on all codes are zero
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
    place(
        cpu.META,
        np.array([factor, shift, mirrored, count, list(ratios).index(1.0), 1.25 * (rounding == "mse"), ends[-1]]),
    )
    edges = (np.arange(33) - shift) / factor
    for j, ratio in enumerate(ratios):
        at = cpu.CELL_TABLES + 64 * j
        for cell in range(32):
            inside = [k for k, bound in enumerate(bounds) if edges[cell] <= bound * ratio < edges[cell + 1]]
            assert len(inside) < 2, (codec, ratio)  # noqa: S101 - of the table above
            if inside:  # the level on either side of the bound
                middle, half = bounds[inside[0]], (levels[inside[0] + 1] - levels[inside[0]]) / 2
            else:
                middle, half = levels[(bounds * ratio < edges[cell]).sum()], 0.0
            table[at + cell], table[at + 32 + cell] = middle * ratio, half * ratio
    return table


@dataclass(frozen=True)
class _Tiles:
    group: int
    panel: int
    row_step: int
    column_step: int
    x_stride: int
    y_stride: int


def _tiles(shape: tuple[int, int], b: int, old: _Side, new: _Side) -> _Tiles | None:
    """How the weight is cut; None where its blocks make the scratch too large."""
    rows, features = shape
    whole = old.flat or new.flat or new.kind == cpu.INT8
    inner = math.lcm(b, 1 if old.flat else old.blocksize)
    outer = inner if whole else math.lcm(inner, new.blocksize)
    wanted = max(1, _MATRIX_BYTES // (4 * b))
    panel = features if old.flat else min(features, max(1, wanted // inner) * inner)
    columns = features if whole else min(features, max(1, wanted // outer) * outer)
    if not whole:
        panel = columns
    group = cpu.ROWS
    for side in (old, new):
        if side.flat:
            group = math.lcm(group, side.blocksize // math.gcd(features, side.blocksize))
    pad = cpu.LANES  # rows at a power of two from each other would share their lines of the cache
    x_stride = 4 * (panel if old.flat else panel + pad)
    y_stride = 4 * (columns if new.flat else columns + pad)
    if group * (x_stride + y_stride) > _MAX_SCRATCH:
        return None
    # not a matter of the threads: sums are added tile by tile, and the recorded error is to be the same on any number
    # of them
    row_step = max(1, min(_CHUNK_WEIGHTS // columns, -(-rows // 8)) // group) * group
    return _Tiles(group, panel, row_step, columns, x_stride, y_stride)


def fold(
    encoded: EncodedWeight, into: WeightFormat, matrices: Tensor, scale: Tensor | None, rounding: str
) -> tuple[EncodedWeight, blockwise.Cost] | None:
    """``scale · (W · blockdiag(matrices))`` stored as ``into``, and what that cost.

    Args:
        encoded: on the CPU.
        matrices: ``(n, b, b)`` float32, or ``(1, b, b)`` for one that all blocks share.
        scale: ``(out,)`` or None.

    Returns:
        None where the kernel does not take these shapes or formats, or met NaN or infinity: the reference has the
        answer, or the error.
    """
    f = encoded.format
    old, new = _side(f), _side(into)
    b = matrices.shape[-1]
    if old is None or new is None or b % cpu.LANES or b > _MAX_BLOCK or f.shape[1] % b:
        return None
    rows, features = f.shape
    tiles = _tiles((rows, features), b, old, new)
    source = blockwise.source(encoded)
    if tiles is None or source is None:
        return None
    weight, scales = source
    result, new_scales, moments = blockwise.allocate(into, weight.device)
    old_levels = _tables(f.codec)[0]
    _, levels, bounds, order = _tables(into.codec)
    by_cell, cells = _cells(into.codec)
    matrices = matrices.contiguous()
    factors = None if scale is None else scale.to(torch.float32).contiguous()
    places = [(r, c) for c in range(0, features, tiles.column_step) for r in range(0, rows, tiles.row_step)]
    best = codecs.rounding_of(into, rounding) != "nearest"
    search = _search(into.codec, rounding).ctypes.data if best else 0
    plain = torch.empty_like(new_scales) if best and moments is not None else None
    first = (
        old.kind, weight.data_ptr(), scales.data_ptr(), old.blocksize, old_levels.data_ptr(),
        new.kind, result.data_ptr(),
    )  # fmt: skip
    then = (
        new.blocksize, levels.data_ptr(), bounds.data_ptr(), order.data_ptr(),
        by_cell, cells.ctypes.data, 0 if moments is None else moments.data_ptr(),
        matrices.data_ptr(), b, matrices.shape[0] == 1, 0 if factors is None else factors.data_ptr(), rows, features,
    )  # fmt: skip

    def passed(mode: int, new_scales: Tensor) -> np.ndarray:
        sums = np.zeros((len(places), 5))

        def task(i: int) -> None:
            row, column = places[i]
            x = _scratch(tiles.group * (tiles.x_stride + tiles.y_stride) // 4 + 32 + (cpu.WORK if best else 0))
            y = (x + tiles.group * tiles.x_stride + 63) & ~63
            work = (y + tiles.group * tiles.y_stride + 63) & ~63
            cpu.fold_tile(
                *first, new_scales.data_ptr(), *then,
                row, min(row + tiles.row_step, rows), column, min(column + tiles.column_step, features),
                tiles.group, tiles.panel, old.flat, new.flat, x, tiles.x_stride, y, tiles.y_stride,
                mode, search, 0 if plain is None else plain.data_ptr(), work, sums[i],
            )  # fmt: skip

        run(task, len(places))
        total: np.ndarray = sums.sum(0)
        total[2] = sums[:, 2].max(initial=0)
        return total

    mode = cpu.NEAREST if not best else cpu.BEST if moments is None else cpu.SCALES
    norm, error, top, nearest, change = map(float, passed(mode, new_scales))
    if top >= blockwise.NOT_FINITE:
        return None
    if new.kind != cpu.FOUR_BIT:
        return blockwise.finish(into, result, new_scales, None, norm, error, change)
    statistics = codecs._encode_absmax(new_scales, into)
    if not best:
        error += 0.0 if moments is None else _nested_error(into, new_scales, statistics, moments)
        nearest = error
    elif plain is not None and moments is not None:
        # codes for the scales that the reader will see
        seen = codecs._decode_absmax(EncodedWeight(into, statistics)).contiguous()
        error = float(passed(cpu.GIVEN, seen)[1])
        nearest += _nested_error(into, plain, codecs._encode_absmax(plain, into), moments)
    return blockwise.finish_best(into, result, statistics, norm, error, nearest, change)


def _nested_error(into: WeightFormat, scales: Tensor, statistics: dict[str, Tensor], moments: Tensor) -> float:
    """:func:`oftsurgery.kernels.blockwise.nested_error` in one pass, without temporaries."""
    codes, nested, levels, offset = (
        statistics[name] for name in ("absmax", "nested_absmax", "nested_quant_map", "nested_offset")
    )
    return float(
        cpu.nested_error(
            scales.numpy(), codes.reshape(-1).numpy(), levels.numpy(), nested.reshape(-1).numpy(),
            np.float32(offset.item()), into.nested_blocksize, moments.numpy(),
        )
    )  # fmt: skip


# --- block rotations --------------------------------------------------------------------------------------------------

_SOLVE_TOLERANCE = 1e-10
_LANCZOS_STEPS = 160
#: the size of blocks up to which two products are cheaper than to look for the largest angle
_BOUNDED = 32
#: work that is worth a task of its own, in multiplications
_TASK_PRODUCTS = 1 << 19


def blocks(generator: Tensor, b: int, wide: int, power: int, weight: float) -> Tensor | None:
    """``(n·b/wide, wide, wide)`` float64: the rotations of ``generator: (n, b(b-1)/2)``, ``wide/b`` on each diagonal
    (one for a single, shared one).

    Args:
        power: 0 for the exact Cayley map, else of the series ``I + 2ΣQᵏ (k < power) + weight · Q^power``.

    Returns:
        None where the solve is not right.
    """
    v = _rows(generator)
    count = max(1, v.shape[0] * b // wide)
    out = np.empty((count, wide, wide))
    each = max(1, _TASK_PRODUCTS // wide**3)
    residuals = np.zeros(-(-count // each))

    def task(i: int) -> None:
        scratch = np.empty((3, wide, wide))
        residuals[i] = cpu.rotation_blocks(v, b, i * each, min(i * each + each, count), power, weight, scratch, out)

    run(task, len(residuals))
    return torch.from_numpy(out) if bool((residuals <= _SOLVE_TOLERANCE).all()) else None  # NaN compares false


def largest_angle(generator: Tensor, b: int, wide: int) -> float:
    """The largest θ with ±iθ an eigenvalue of a generator's block."""
    v = _rows(generator)
    count = max(1, v.shape[0] * b // wide)
    each = max(1, _TASK_PRODUCTS // wide**3)
    steps = min(wide, _LANCZOS_STEPS) + 2
    tasks = -(-count // each)
    if count > 1 and wide <= _BOUNDED:
        bounds = np.empty(count)

        def bound(i: int) -> None:
            cpu.angle_bounds(v, b, wide, i * each, min(i * each + each, count), np.empty((3, wide, wide)), bounds)

        run(bound, tasks)
        # the likeliest first: few of the others can be larger
        q, basis, best = np.empty((wide, wide)), np.empty((steps, wide)), 0.0
        for index in np.argsort(-bounds):
            if bounds[index] * (1 + 1e-9) < best:
                break
            best = cpu.largest_angle(v, b, wide, index, index + 1, best, q, basis)
        return best
    found = np.zeros(tasks)

    def task(i: int) -> None:
        q, basis = np.empty((wide, wide)), np.empty((steps, wide))
        found[i] = cpu.largest_angle(v, b, wide, i * each, min(i * each + each, count), 0.0, q, basis)

    run(task, tasks)
    return float(found.max())


def _rows(generator: Tensor) -> np.ndarray:
    v = generator.detach().contiguous()
    return (v.numpy() if v.dtype in (torch.float32, torch.float64) else v.to(torch.float32).numpy()).astype(np.float64)
