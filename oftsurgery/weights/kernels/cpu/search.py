"""Scales of 4-bit blocks that err less than their absmax: of some ratios to it the best one, then the best for its codes.

The errors at all ratios are taken side by side, a lane each: a value lies in one of 64 cells of [-1, 1], and for each ratio a
row of the job's table has the middle between the two levels on either side of the cell's bound, if it has one, and half their
distance. docs/rounding.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import float32, float64, int32, int64, types

from .blocks import count_up, peaks, put
from .codes import BY_CELLS, BY_RANKS, Codes, errors_of_16, errors_of_32, rows_of
from .compiling import part
from .lanes import (
    as_bits,
    as_float,
    choose_less,
    div,
    fill,
    first_bit,
    fma,
    least,
    lesser,
    load,
    load_one,
    load_word,
    mul,
    store,
    store_ints,
    store_one,
    total,
    totals,
    which_below,
    zeros,
)
from .layout import (
    CELL_ROWS,
    CELLS,
    ERRORS,
    LANES,
    LARGEST,
    LAST,
    MANY,
    NEAREST,
    NEW_BLOCKSIZE,
    NEW_LEVELS,
    NEW_SCALES,
    NORM,
    NOT_FINITE,
    ONE,
    OWN_SCALES,
    PARTIAL,
    PEAKS,
    RATIOS,
    SEARCH,
    TINY,
    VALUE_ROWS,
    VALUES,
)

_FACTOR, _SHIFT = float(CELLS / 2 * (1 - 1e-5)), float(CELLS / 2)  # 1 is in the last cell


@part(float32(int64, int64, float32, int64, int64))
def _place(x, n, absmax, row_bytes, work):
    """Leave n values in units of their absmax > 0 at VALUES, and the rows that they lie in; gives Σ value²."""
    small = absmax < TINY
    unit = fill(absmax if small else float32(1.0) / absmax)
    factor, shift, power = fill(float32(_FACTOR)), fill(float32(_SHIFT)), zeros()
    for i in range(0, 4 * n, 4 * LANES):
        v = load(x + i)
        v = div(v, unit) if small else mul(v, unit)
        store(work + VALUES + i, v)
        store_ints(work + VALUE_ROWS + i, rows_of(v, factor, shift, int32(row_bytes)))
        power = fma(v, v, power)
    return total(power)


@part(int64(float32, int64, int64, int64))
def _choose(absmax, wide, table, work):
    """The number of the ratio with the least error at ERRORS, of equal ones the first, but 1 before all."""
    first = load(work + ERRORS)
    more = load(work + ERRORS + 64) if wide else first
    j = int64(load_one(table + ONE))
    if LARGEST / absmax > load_one(table + LAST):
        lowest = least(lesser(first, more))
        if lowest < load_one(work + ERRORS + 4 * j):
            edge = fill(as_float(as_bits(lowest) + int32(1)))
            j = first_bit(which_below(first, edge) | (which_below(more, edge) << 16))
    return j


def finder(codes: Codes, best_ratio: Any) -> Callable[..., None]:
    """The kernel that finds scales, by the ratios of its table, or by ``best_ratio`` after these."""
    load_levels, fit, exact = codes.load_levels, codes.fit, best_ratio is not None

    def find(job, base, x, first, count, row, result, work, sums):
        """Find a scale for each block of ``count`` values at ``x``, the flat weights ``first`` and on, a block's first.

        ``base``, ``row`` and ``result`` are what an encoder takes.
        """
        size, scales, table = load_word(job + NEW_BLOCKSIZE), load_word(job + NEW_SCALES), load_word(job + SEARCH)
        levels = load_levels(load_word(job + NEW_LEVELS))
        block, one = first // size, int64(load_one(table + ONE))
        for done in range(0, count, MANY * size):
            here = min(MANY * size, count - done)
            blocks = (here + size - 1) // size
            if peaks(x + 4 * done, here, size, work, sums) >= NOT_FINITE:
                return
            norm = error = 0.0
            store(work + OWN_SCALES, zeros())
            for k in range(blocks):
                absmax = load_one(work + PEAKS + 4 * k)
                if absmax > 0:
                    at, n = x + 4 * (done + k * size), min(size, here - k * size)
                    power = _place(at, n, absmax, 256 if exact else 128, work)
                    if exact:
                        errors_of_32(work + VALUES, work + VALUE_ROWS, n, table + CELL_ROWS, work + ERRORS)
                    else:
                        errors_of_16(work + VALUES, work + VALUE_ROWS, n, table + CELL_ROWS, work + ERRORS)
                    square = float64(absmax) * float64(absmax)
                    norm += square * float64(power)
                    if absmax >= TINY:
                        error += square * float64(load_one(work + ERRORS + 4 * one))
                    else:  # plain rounding takes the codes of bitsandbytes' bound under absmax
                        s, q = fit(at, n, fill(float32(1.0) / TINY), levels)
                        both = square * (float64(power) + float64(total(q)))
                        error += max(0.0, both - 2.0 * float64(absmax) * float64(TINY) * float64(total(s)))
                    j = _choose(absmax, exact, table, work)
                    ratio = load_one(table + RATIOS + 4 * j)
                    if exact:
                        ratio = best_ratio(n, j, power, LARGEST / absmax, table, load_word(job + NEW_LEVELS), work)
                    # the best scale for the codes at that one; after the exact search that is the same, to the last bits
                    cross, squares = fit(work + VALUES, n, fill(float32(1.0) / ratio), levels)
                    store(work + PARTIAL + 64 * k, cross)
                    store(work + PARTIAL + 1024 + 64 * k, squares)
                    store_one(work + OWN_SCALES + 4 * k, ratio * absmax)
            count_up(sums, NORM, norm)
            count_up(sums, NEAREST, error)
            found = load(work + OWN_SCALES)
            fitted = mul(div(totals(work + PARTIAL), totals(work + PARTIAL + 1024)), found)
            fitted = choose_less(zeros(), found, lesser(fitted, fill(LARGEST)), zeros())
            put(fitted, scales + 4 * block, blocks, work)
            block += blocks

    return find


grid_by_cells, grid_by_ranks = finder(BY_CELLS, None), finder(BY_RANKS, None)
