"""Scales of 4-bit blocks that err less than the absmax: first the best of some ratios to the absmax, then the best for its codes.

The errors at all ratios are taken side by side, a lane each: a value lies in one of 64 cells of [-1, 1], and for each ratio a
row of the job's table has the middle between the two levels on either side of the cell's bound, if it has one, and half their
distance. docs/rounding.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import float32, float64, int64, types

from .blocks import count_up, parts_of, peaks, put
from .codes import BY_CELLS, BY_RANKS, Codes, errors_of_8, least_of_8, rows_of_64, rows_of_256
from .compiling import part
from .lanes import (
    choose_less,
    div,
    fill,
    fma,
    lesser,
    load,
    load_one,
    load_word,
    mul,
    store,
    store_ints,
    store_one,
    sub,
    total,
    totals,
    zeros,
)
from .layout import (
    ABSMAX,
    ASIDE,
    CELL_ROWS,
    CELLS,
    ERRORS,
    LANES,
    LARGEST,
    LAST,
    MANY,
    MOMENT_PLANE,
    MOMENTS,
    MOST_BLOCK,
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
    PLAIN_ERRORS,
    RATIOS,
    ROWS_APART,
    SEARCH,
    TINY,
    VALUES,
)

_FACTOR, _SHIFT = float(CELLS / 2 * (1 - 1e-5)), float(CELLS / 2)  # 1 is in the last cell
_MORE = 1e20


@part(types.void(int64, int64, float32, int64, int64, int64))
def place(x, n, absmax, many, squares, values):
    """Leave n values in units of their absmax > 0 at ``values``, behind them the rows that they lie in (of ``many`` ratios, or 8),
    and their squares, by lanes, at ``squares``.
    """
    small = absmax < TINY
    unit = fill(absmax if small else float32(1.0) / absmax)
    factor, shift, power = fill(float32(_FACTOR)), fill(float32(_SHIFT)), zeros()
    for i in range(0, 4 * n, 4 * LANES):
        v = load(x + i)
        v = div(v, unit) if small else mul(v, unit)
        store(values + i, v)
        store_ints(values + ROWS_APART + i, rows_of_256(v, factor, shift) if many else rows_of_64(v, factor, shift))
        power = fma(v, v, power)
    store(squares, power)


def searcher(codes: Codes, best_ratios: Any) -> Callable[..., None]:
    """The kernel that finds scales: the best scales for the codes at the scales that ``best_ratios`` leaves."""
    load_levels, fit = codes.load_levels, codes.fit

    @part(types.void(int64, int64, int64, int64, codes.levels, int64))
    def fit_many(x, size, here, blocks, levels, work):
        for k in range(blocks):
            scale, n, at = load_one(work + OWN_SCALES + 4 * k), min(size, here - k * size), x + 4 * k * size
            if 0 < scale < TINY:  # its reciprocal is beyond float32
                for i in range(0, 4 * n, 4 * LANES):
                    store(work + VALUES + i, mul(load(at + i), fill(float32(_MORE))))
                at = work + VALUES
                scale = scale * float32(_MORE)
            cross, power = fit(at, n, fill(float32(1.0) / scale if scale > 0 else float32(0.0)), levels)
            store(work + PARTIAL + 64 * k, cross)
            store(work + PARTIAL + 1024 + 64 * k, power)
        scales = load(work + OWN_SCALES)
        fitted = mul(div(totals(work + PARTIAL), totals(work + PARTIAL + 1024)), scales)
        fitted = choose_less(zeros(), scales, lesser(fitted, fill(LARGEST)), zeros())
        store(work + OWN_SCALES, fitted)

    @part(float64(int64, int64, float32, float32, codes.levels))
    def bounded_error(x, n, absmax, power, levels):
        """The squared error of plain rounding, in units of absmax², if bitsandbytes' bound of absmax decides the codes."""
        cross, squares = fit(x, n, fill(float32(1.0) / TINY), levels)
        ratio = float64(TINY) / float64(absmax)
        return max(0.0, float64(power) + float64(total(squares)) - 2.0 * ratio * float64(total(cross)))

    @part(types.void(int64, int64, int64, int64, codes.levels, int64, int64, int64))
    def plain_moments(x, size, here, blocks, levels, to, plane, work):
        """Σ c(c - s) and Σ c² of blocks with plain rounding, in units of their absmax, which has no moments below TINY."""
        for k in range(blocks):
            absmax, n = load_one(work + PEAKS + 4 * k), min(size, here - k * size)
            unit = float32(1.0) / absmax if absmax >= TINY else float32(0.0)
            cross, power = fit(x + 4 * k * size, n, fill(unit), levels)
            store(work + PARTIAL + 64 * k, cross)
            store(work + PARTIAL + 1024 + 64 * k, power)
        power = totals(work + PARTIAL + 1024)
        put(sub(power, totals(work + PARTIAL)), to, blocks, work)
        put(power, to + plane, blocks, work)

    def find(job, base, x, first, count, row, result, work, sums):
        """Find a scale for each block of ``count`` values at ``x``, the flat weights ``first`` and on, a block's first.

        ``base``, ``row`` and ``result`` are what an encoder takes.
        """
        size, scales, table = load_word(job + NEW_BLOCKSIZE), load_word(job + NEW_SCALES), load_word(job + SEARCH)
        plain_scales, moments, plane = load_word(job + ABSMAX), load_word(job + MOMENTS), load_word(job + MOMENT_PLANE)
        levels = load_levels(load_word(job + NEW_LEVELS))
        block = first // size
        for group in range(parts_of(count, MANY * size)):
            done = group * MANY * size
            here, at = min(MANY * size, count - done), x + 4 * done
            blocks = (here + size - 1) // size
            if peaks(at, here, size, work, sums) >= NOT_FINITE:
                return
            best_ratios(at, size, here, blocks, table, load_word(job + NEW_LEVELS), work)
            store(work + ASIDE, totals(work + PARTIAL))
            norm = error = 0.0
            for k in range(blocks):
                absmax, power = load_one(work + PEAKS + 4 * k), load_one(work + ASIDE + 4 * k)
                if absmax > 0:
                    square = float64(absmax) * float64(absmax)
                    plain = float64(load_one(work + PLAIN_ERRORS + 4 * k))
                    if absmax < TINY:
                        plain = bounded_error(at + 4 * k * size, min(size, here - k * size), absmax, power, levels)
                    norm += square * float64(power)
                    error += square * plain
            count_up(sums, NORM, norm)
            count_up(sums, NEAREST, error)
            if moments != 0:
                put(load(work + PEAKS), plain_scales + 4 * block, blocks, work)
                plain_moments(at, size, here, blocks, levels, moments + 3 * plane + 4 * block, plane, work)
            fit_many(at, size, here, blocks, levels, work)
            put(load(work + OWN_SCALES), scales + 4 * block, blocks, work)
            block += blocks

    return find


@part(types.void(*[int64] * 7))
def _grid_ratios(x, size, here, blocks, table, levels, work):
    """The ratio with the least error, of the table's 8 ratios, for each block: the scales at OWN_SCALES, the blocks' squares, by
    lanes, at PARTIAL, and the errors at their absmax, both in units of its square.
    """
    one = int64(load_one(table + ONE))
    store(work + OWN_SCALES, zeros())
    # all small blocks are stored before the first errors are computed: a load of a value that was just stored would wait
    together = MANY * size <= MOST_BLOCK
    for k in range(blocks):
        absmax, n, values = load_one(work + PEAKS + 4 * k), min(size, here - k * size), work + VALUES
        if together:
            values += 4 * k * size
        if absmax > 0:
            place(x + 4 * k * size, n, absmax, 0, work + PARTIAL + 64 * k, values)
            if not together:
                errors_of_8(values, values + ROWS_APART, n, table + CELL_ROWS, work + ERRORS + 32 * k)
    for k in range(blocks if together else 0):
        n, values = min(size, here - k * size), work + VALUES + 4 * k * size
        if load_one(work + PEAKS + 4 * k) > 0:
            errors_of_8(values, values + ROWS_APART, n, table + CELL_ROWS, work + ERRORS + 32 * k)
    for k in range(blocks):
        absmax, errors = load_one(work + PEAKS + 4 * k), work + ERRORS + 32 * k
        if absmax > 0:
            plain = load_one(errors + 4 * one)
            store_one(work + PLAIN_ERRORS + 4 * k, plain)
            # the first of equal ratios wins, but 1, which lies behind the 8, wins against all
            j = least_of_8(errors, plain) if LARGEST / absmax > load_one(table + LAST) else int64(8)
            store_one(work + OWN_SCALES + 4 * k, load_one(table + RATIOS + 4 * j) * absmax)


grid_by_cells, grid_by_ranks = searcher(BY_CELLS, _grid_ratios), searcher(BY_RANKS, _grid_ratios)
