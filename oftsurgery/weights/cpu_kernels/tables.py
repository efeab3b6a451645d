"""The tables of the kernels, made once for each format: see :mod:`.layout`."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from oftsurgery.formats.four_bit import FourBit
from oftsurgery.formats.scales import GRID
from oftsurgery.weights.kernels import blockwise

from . import layout, processor

#: scales, in units of absmax, between which the kernel's search for the best scale begins: far from the usual best scale
#: they may be farther apart
_RATIOS = (
    0.65, 0.72, 0.77, 0.82, 0.86, 0.9, 0.94, 0.97, 1.0, 1.035, 1.07, 1.11, 1.155, 1.21, 1.275, 1.35, 1.45, 1.58, 1.76, 2.05, 2.5,
    3.3, 5.0, 9.0,
)  # fmt: skip
#: of an interval that the search goes through code by code: in it each weight changes its code once at most
_WIDEST = 1.25
#: of codes.py: cells a unit
_CELL_FACTOR = 15.9999


def _aligned(nbytes: int) -> np.ndarray:
    """An array of zeros whose address is a multiple of 64."""
    room = np.zeros(nbytes + 64, np.uint8)
    return room[-room.ctypes.data % 64 :][:nbytes]


def _levels_of(codec: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _, levels, bounds, order = (t.numpy() for t in blockwise.tables(codec, torch.device("cpu")))
    return levels, bounds, order


@cache
def levels(codec: str) -> np.ndarray:
    """The table of a format's levels; zeros for other formats than 4-bit ones."""
    values, bounds, order = _levels_of(codec)
    table = _aligned(layout.LEVEL_TABLE)
    for at, part in ((layout.LEVEL, values), (layout.BOUND, bounds), (layout.ORDER, order)):
        table[at : at + 64] = np.ascontiguousarray(part).view(np.uint8)
    # a value's cell grows with it, so one in a higher cell than a bound is above it
    own = (bounds[:15].astype(np.float64) * _CELL_FACTOR + 16).astype(np.int32)
    base = np.array([(own < cell).sum() for cell in range(32)], np.int32)
    bound = np.full(32, np.inf, np.float32)
    bound[own] = bounds[:15]
    table[layout.CELL_BASE : layout.CELL_BASE + 128] = base.view(np.uint8)
    table[layout.CELL_BOUND : layout.CELL_BOUND + 128] = bound.view(np.uint8)
    return table


@cache
def suffix(codec: str) -> str:
    """Which kernels serve the format: ``"by_cells"`` where its levels lie in the order of their codes, one bound to a cell, and
    an instruction looks up tables of 32; else ``"by_ranks"``.
    """
    _, bounds, order = _levels_of(codec)
    # no bound is at the edge of its cell, where the kernel's rounding would matter
    positions = bounds[:15].astype(np.float64) * _CELL_FACTOR + 16
    sure = len(set(positions.astype(np.int32))) == 15 and bool((np.abs(positions - positions.round()) > 1e-4).all())
    return "by_cells" if processor.AVX512 and sure and (order == np.arange(16)).all() else "by_ranks"


@cache
def search(kind: FourBit, rounding: str) -> np.ndarray:
    """The table of :mod:`.search` and :mod:`.search_best`."""
    values, bounds, _ = (part.astype(np.float64) for part in _levels_of(kind.name))
    bounds = bounds[:15]
    apart = np.diff(values) > 0  # FP4 has two zeros
    values, bounds = values[np.append(True, apart)], bounds[apart]
    ratios = np.array(GRID if rounding == "grid" else (*_RATIOS, *kind.farther))
    count = len(ratios)
    lanes = 8 if rounding == "grid" else 2 * layout.LANES
    assert count == 8 if rounding == "grid" else count < lanes  # noqa: S101
    table = _aligned(layout.CELL_ROWS + layout.CELLS * 2 * lanes * 4).view(np.float32)

    def place(at: int, *numbers: float) -> None:
        table[at // 4 : at // 4 + len(numbers)] = numbers

    ends = np.append(ratios, 1.01 / np.abs(bounds).min())  # from there on all codes are zero
    steps, low, high = np.diff(ends), ends[:-1], ends[1:]
    place(layout.RATIOS, *ends)
    place(layout.CURVE, *(steps**2 / (low * high)))
    place(layout.LEFT, *(steps / low))
    place(layout.RIGHT, *(steps / high))
    place(layout.COUNT, count)
    place(layout.ONE, list(ratios).index(1.0))
    place(layout.WIDEST, _WIDEST)
    place(layout.LAST, ends[-1])
    if rounding == "grid":
        place(layout.RATIOS + 4 * count, 1.0)
    edges = np.arange(layout.CELLS + 1) * 2 / layout.CELLS / (1 - 1e-5) - 1 / (1 - 1e-5)
    rows = table[layout.CELL_ROWS // 4 :].reshape(layout.CELLS, 2, lanes)
    rows[:, 0] = 1e10  # an unused column has an error beyond all others
    for j, ratio in enumerate(ratios):
        below = np.searchsorted(bounds * ratio, edges)  # the number of bounds below each edge
        inside, k = np.diff(below) > 0, below[:-1]
        assert (np.diff(below) < 2).all(), (kind.name, ratio)  # noqa: S101 - of the table above
        # the level on either side of the bound, or the cell's only one
        rows[:, 0, j] = np.where(inside, np.append(bounds, 0.0)[k], values[k]) * ratio
        rows[:, 1, j] = np.where(inside, np.append(np.diff(values), 0.0)[k] / 2, 0.0) * ratio
    return table


@cache
def dynamic() -> np.ndarray:
    """The table of double quantisation but for its offset: see :func:`.blockwise.dynamic_steps`."""
    values, ends = (t.numpy() for t in blockwise.dynamic_steps(torch.device("cpu")))
    table = _aligned(layout.DYNAMIC_TABLE)
    steps = np.append(ends, np.float32(np.inf))
    table[layout.DYNAMIC_MAP : layout.DYNAMIC_STEPS] = values.view(np.uint8)
    table[layout.DYNAMIC_STEPS : layout.DYNAMIC_START] = steps.view(np.uint8)
    halves = np.arange(1 << 16, dtype=np.int64) << 16
    lowest = np.where(halves < 1 << 31, halves, halves | 0xFFFF).astype(np.uint32).view(np.float32)
    table[layout.DYNAMIC_START :] = np.searchsorted(steps[:-1], np.nan_to_num(lowest), side="right")
    return table
