"""The scale of a 4-bit block that errs least.

In units of the block's absmax, E(s) = W - 2s·α(s), with W = Σx² and α(s) = max over all codes of Σxc - s/2·Σc²: a maximum of
lines in s, hence convex, and below its chord between any two scales. So E is known to be nowhere between two scales less than
:func:`chord` says of its values there. The kernel measures E at fixed ratios, looks up the codes' changes, one by one, in the
intervals that may hold the least one, and leaves the rest. See docs/rounding.md.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64, types

from .codes import BY_CELLS, BY_RANKS, errors_of_32, rank
from .compiling import part
from .lanes import (
    absolute,
    add,
    add_up_to,
    as_bits,
    as_float,
    bits_in,
    choose_less,
    div,
    fill,
    first_bit,
    fma,
    greater,
    least,
    lesser,
    load,
    load_one,
    mul,
    pick,
    store,
    store_one,
    store_some,
    sub,
    total,
    which_below,
    which_differ,
    zeros,
)
from .layout import (
    BEST,
    BOUND,
    CELL_ROWS,
    COUNT,
    CROSSINGS,
    CURVE,
    EACH,
    ERRORS,
    INTERVALS,
    LANES,
    LARGEST,
    LAST,
    LEFT,
    LEVEL,
    ONE,
    OWN_SCALES,
    PARTIAL,
    PEAKS,
    PLAIN_ERRORS,
    RATIOS,
    RIGHT,
    ROWS_APART,
    VALUES,
    WIDEST,
)
from .search import place, searcher

#: code changes that are looked at together
_MOST = 64
_STRIDE = 4 * (_MOST + LANES)


@part(float32(int64, float32, int64, int64))
def _measure(n, s, levels, work):
    """The squared error of n VALUES with their nearest codes for scale s."""
    values, bounds = load(levels + LEVEL), load(levels + BOUND)
    factor, scale = fill(float32(1.0) / s), fill(-s)
    error = zeros()
    for at in range(work + VALUES, work + VALUES + 4 * n, 4 * LANES):
        v = load(at)
        miss = fma(pick(values, rank(mul(v, factor), bounds)), scale, v)
        error = fma(miss, miss, error)
    return total(error)


@part(float32(float32, float32, float32, float32, float32))
def chord(a, b, error_a, error_b, power):
    """A bound under the error at all scales from a to b, from the errors there and Σx²."""
    d = error_b - error_a
    curve = (b - a) * ((b - a) * power - b * error_a + a * error_b) / (a * b)
    if not abs(d) < curve:
        return min(error_a, error_b)
    return float32(0.5) * (error_a + error_b) - float32(0.25) * (curve + d * d / curve)


@part(float32(float32, float32))
def _enough(best, power):
    """The error below which no scale can gain more than float32's own rounding."""
    return best * float32(1.0 - 1e-6) - power * float32(1e-8)


@part(int64(int64, float32, float32, float32, int64, int64))
def _changes(n, low, high, limit, levels, work):
    """Try the best scale of each set of codes between scales ``low`` and ``high``, close enough for every weight to
    change its code once at most; better ones go to BEST.

    Returns:
        whether the number of changes was small enough.
    """
    values, bounds = load(levels + LEVEL), load(levels + BOUND)
    own, factor, other = fill(-low), fill(float32(1.0) / low), fill(float32(1.0) / high)
    each, at = work + EACH, work + CROSSINGS
    errors, crosses, powers = zeros(), zeros(), zeros()
    count = 0
    for x in range(work + VALUES, work + VALUES + 4 * n, 4 * LANES):
        v = load(x)
        code, code_after = rank(mul(v, factor), bounds), rank(mul(v, other), bounds)
        outer = pick(values, code)
        miss = fma(outer, own, v)
        errors, crosses, powers = fma(miss, miss, errors), fma(outer, miss, crosses), fma(outer, outer, powers)
        bits = which_differ(code, code_after)
        if bits != 0:
            if count > _MOST - LANES:
                return 0
            inner = pick(values, code_after)
            after = fma(inner, own, v)
            to = at + 4 * count
            store_some(to, div(add(v, v), add(outer, inner)), bits)  # the scale at which v is midway
            store_some(to + _STRIDE, sub(mul(after, after), mul(miss, miss)), bits)
            store_some(to + 2 * _STRIDE, sub(mul(inner, after), mul(outer, miss)), bits)
            store_some(to + 3 * _STRIDE, sub(mul(inner, inner), mul(outer, outer)), bits)
            count += bits_in(bits)
    error, cross, power = total(errors), total(crosses), total(powers)
    best = load_one(work + BEST)
    if power > float32(1e-5):
        scale = low + cross / power
        if error - cross * cross / power < best and scale > 0 and scale <= limit:
            best = error - cross * cross / power
            store_one(work + BEST + 4, scale)
    store(at + 4 * count, fill(float32(np.inf)))
    huge = fill(float32(1e30))
    for first in range(0, count, LANES):
        mine = load(at + 4 * first)
        errors, crosses, powers = fill(error), fill(cross), fill(power)
        for i in range(at, at + 4 * count, 4):
            s = fill(load_one(i))
            errors = add_up_to(s, mine, fill(load_one(i + _STRIDE)), errors)
            crosses = add_up_to(s, mine, fill(load_one(i + 2 * _STRIDE)), crosses)
            powers = add_up_to(s, mine, fill(load_one(i + 3 * _STRIDE)), powers)
        shift = div(crosses, powers)
        scales = add(shift, fill(low))
        found = sub(errors, mul(shift, crosses))
        found = choose_less(fill(float32(1e-5)), powers, found, huge)
        found = choose_less(zeros(), scales, found, huge)
        found = choose_less(scales, fill(limit), found, huge)
        one = least(found)
        if one < best:
            best = one
            store(each, scales)
            lane = first_bit(which_below(found, fill(as_float(as_bits(one) + int32(1)) if one > 0 else float32(1e-30))))
            store_one(work + BEST + 4, load_one(each + 4 * lane))
    store_one(work + BEST, best)
    return 1


@part(types.void(int64, *[float32] * 6, int64, int64, int64))
def _refine(n, low, high, error_low, error_high, power, limit, table, levels, work):
    """:func:`_changes` of an interval in as many parts as needed, except parts that cannot hold the least error.
    ``low`` may be 0.
    """
    widest = load_one(table + WIDEST)
    stack = work + INTERVALS
    store_one(stack, low)
    store_one(stack + 4, high)
    store_one(stack + 8, error_low)
    store_one(stack + 12, error_high)
    depth = 1
    while depth > 0:
        depth -= 1
        at = stack + 16 * depth
        a, b, error_a, error_b = load_one(at), load_one(at + 4), load_one(at + 8), load_one(at + 12)
        if a > 0:
            bound = chord(a, b, error_a, error_b, power)
        else:  # smaller scales clip more
            edge, clipped = fill(b), zeros()
            for x in range(work + VALUES, work + VALUES + 4 * n, 4 * LANES):
                over = greater(sub(absolute(load(x)), edge), zeros())
                clipped = fma(over, over, clipped)
            bound = total(clipped)
        if bound >= _enough(load_one(work + BEST), power):
            continue
        if a > 0 and b <= a * widest and _changes(n, a, b, limit, levels, work):
            continue
        if (a > 0 and b < a * float32(1.0002)) or depth > 60:
            continue
        middle = float32(0.5) * (a + b)
        error = _measure(n, middle, levels, work)
        for k in range(2):
            store_one(at, a if k == 0 else middle)
            store_one(at + 4, middle if k == 0 else b)
            store_one(at + 8, error_a if k == 0 else error)
            store_one(at + 12, error if k == 0 else error_b)
            at += 16
        depth += 2


@part(int64(int64, int64, float32, float32))
def _open(errors, table, power, enough):
    """A bit for each of 16 intervals whose :func:`chord` is below ``enough``."""
    a, b = load(errors), load(errors + 4)
    d = sub(b, a)
    sides = sub(mul(load(table + LEFT), a), mul(load(table + RIGHT), b))
    curve = sub(mul(load(table + CURVE), fill(power)), sides)
    inside = sub(mul(add(a, b), fill(float32(0.5))), mul(add(curve, div(mul(d, d), curve)), fill(float32(0.25))))
    return which_below(choose_less(absolute(d), curve, inside, lesser(a, b)), fill(enough))


@part(float32(int64, int64, float32, float32, int64, int64, int64))
def _best_ratio(n, j, power, limit, table, levels, work):
    """The scale that errs least of n VALUES, where ratio j is the best of the table's, with their ERRORS."""
    count = int64(load_one(table + COUNT))
    errors, ratios = work + ERRORS, table + RATIOS
    store_one(work + BEST, load_one(errors + 4 * j))
    store_one(work + BEST + 4, load_one(ratios + 4 * j))
    store_one(errors + 4 * count, power)  # from the last ratio on all codes are zero
    # the search begins around the best of these scales, because a small error there excludes other intervals
    widest = load_one(table + WIDEST)
    done = int64(0)
    if j > 0:
        low, high = load_one(ratios + 4 * j - 4), load_one(ratios + 4 * j + 4)
        if high <= low * widest and _changes(n, low, high, limit, levels, work):
            done = int64(3) << (j - 1)
    enough = _enough(load_one(work + BEST), power)
    bits = _open(errors, table, power, enough) | (_open(errors + 64, table + 64, power, enough) << 16)
    bits &= ((int64(1) << count) - 1) & ~done
    while bits != 0:
        k = 4 * first_bit(bits)
        bits &= bits - 1
        low, high = load_one(ratios + k), load_one(ratios + k + 4)
        if not (high <= low * widest and _changes(n, low, high, limit, levels, work)):
            error_low, error_high = load_one(errors + k), load_one(errors + k + 4)
            _refine(n, low, high, error_low, error_high, power, limit, table, levels, work)
    low = load_one(ratios)
    if (float32(1.0) - low) * (float32(1.0) - low) < load_one(work + BEST):
        _refine(n, float32(0.0), low, power, load_one(errors), power, limit, table, levels, work)
    return load_one(work + BEST + 4)


@part(int64(float32, int64, int64))
def _choose(absmax, table, work):
    """The number of the ratio with the least of 32 ERRORS, of equal ones the first, but 1 before all."""
    first, more = load(work + ERRORS), load(work + ERRORS + 64)
    j = int64(load_one(table + ONE))
    if LARGEST / absmax > load_one(table + LAST):
        lowest = least(lesser(first, more))
        if lowest < load_one(work + ERRORS + 4 * j):
            edge = fill(as_float(as_bits(lowest) + int32(1)))
            j = first_bit(which_below(first, edge) | (which_below(more, edge) << 16))
    return j


@part(types.void(*[int64] * 7))
def _best_ratios(x, size, here, blocks, table, levels, work):
    """As :func:`.search._grid_ratios`, with all ratios of the table."""
    one = int64(load_one(table + ONE))
    store(work + OWN_SCALES, zeros())
    for k in range(blocks):
        absmax, n, squares = load_one(work + PEAKS + 4 * k), min(size, here - k * size), work + PARTIAL + 64 * k
        if absmax > 0:
            place(x + 4 * k * size, n, absmax, 1, squares, work + VALUES)
            errors_of_32(work + VALUES, work + VALUES + ROWS_APART, n, table + CELL_ROWS, work + ERRORS)
            store_one(work + PLAIN_ERRORS + 4 * k, load_one(work + ERRORS + 4 * one))
            j, limit = _choose(absmax, table, work), LARGEST / absmax
            ratio = _best_ratio(n, j, total(load(squares)), limit, table, levels, work)
            store_one(work + OWN_SCALES + 4 * k, ratio * absmax)


# for the codes of the best scale, the fitted scale is the best scale itself, to the last bits
best_by_cells, best_by_ranks = searcher(BY_CELLS, _best_ratios), searcher(BY_RANKS, _best_ratios)
