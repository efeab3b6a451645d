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
    held: np.ndarray | None = getattr(_local, "scratch", None)
    if held is None or held.nbytes < 4 * count + 64:
        held = _local.scratch = np.zeros(4 * count + 64, dtype=np.uint8)
    return int(held.ctypes.data + 63) & ~63


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
    # as the kernel finds a value's cell, in float32: it grows with the value, so one in a higher cell than a bound is
    # above it
    own = np.minimum(bounds * np.float32(16) + np.float32(16), np.float32(31)).astype(np.int32)
    table = np.zeros((2, 32), dtype=np.int32)
    if not cpu.CELLS or len(set(own)) < 15 or (order != np.arange(16)).any():
        return False, table
    table[0] = [(own < cell).sum() for cell in range(32)]
    table[1] = np.full(32, np.inf, dtype=np.float32).view(np.int32)
    table[1, own] = bounds.view(np.int32)
    return True, table


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
    if codecs.rounding_of(into, rounding) != "nearest":
        return None
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
    sums = np.zeros((len(places), 3))

    first = (
        old.kind, weight.data_ptr(), scales.data_ptr(), old.blocksize, old_levels.data_ptr(),
        new.kind, result.data_ptr(), new_scales.data_ptr(), new.blocksize, levels.data_ptr(), bounds.data_ptr(), order.data_ptr(),
        by_cell, cells.ctypes.data, 0 if moments is None else moments.data_ptr(),
        matrices.data_ptr(), b, matrices.shape[0] == 1, 0 if factors is None else factors.data_ptr(), rows, features,
    )  # fmt: skip

    def task(i: int) -> None:
        row, column = places[i]
        x = _scratch(tiles.group * (tiles.x_stride + tiles.y_stride) // 4 + 16)
        y = (x + tiles.group * tiles.x_stride + 63) & ~63
        cpu.fold_tile(
            *first, row, min(row + tiles.row_step, rows), column, min(column + tiles.column_step, features),
            tiles.group, tiles.panel, old.flat, new.flat, x, tiles.x_stride, y, tiles.y_stride, sums[i],
        )  # fmt: skip

    run(task, len(places))
    if sums[:, 2].max(initial=0) >= blockwise.NOT_FINITE:
        return None
    norm, error = float(sums[:, 0].sum()), float(sums[:, 1].sum())
    return blockwise.finish(into, result, new_scales, moments, norm, error)


# --- block rotations --------------------------------------------------------------------------------------------------

_SOLVE_TOLERANCE = 1e-10
_LANCZOS_STEPS = 160
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
    found = np.zeros(-(-count // each))

    def task(i: int) -> None:
        q, basis = np.empty((wide, wide)), np.empty((min(wide, _LANCZOS_STEPS) + 2, wide))
        found[i] = cpu.largest_angle(v, b, wide, i * each, min(i * each + each, count), 0.0, q, basis)

    run(task, len(found))
    return float(found.max())


def _rows(generator: Tensor) -> np.ndarray:
    v = generator.detach().contiguous()
    return (v.numpy() if v.dtype in (torch.float32, torch.float64) else v.to(torch.float32).numpy()).astype(np.float64)
