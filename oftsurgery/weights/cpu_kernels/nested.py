"""Double quantisation: the scales of 4-bit blocks in 8 bits, and what that does to the weights."""

from __future__ import annotations

import numpy as np
from numba import float32, float64, int64, types

from .blocks import count_up
from .compiling import part
from .lanes import (
    absolute,
    add64,
    as_bits,
    as_float,
    fill,
    fma64,
    load,
    load64,
    load_byte,
    load_one,
    max_bits,
    mul64,
    no_bits,
    store64,
    store_byte,
    store_one,
    sub,
    sub64,
    top_bits,
    unsigned,
    wide,
)
from .layout import DYNAMIC_MAP, DYNAMIC_START, DYNAMIC_STEPS, ERROR, HELD, LANES, MISFITS


@part(float32(int64, int64, int64, float32))
def _largest(scales, begin, end, offset):
    """The largest magnitude of scales ``begin`` to ``end``, less the offset."""
    whole = begin + (end - begin) // LANES * LANES
    bits, off = no_bits(), fill(offset)
    for i in range(begin, whole, LANES):
        bits = max_bits(bits, absolute(sub(load(scales + 4 * i), off)))
    top = as_float(top_bits(bits))
    for i in range(whole, end):
        top = max(top, abs(load_one(scales + 4 * i) - offset))
    return top


@part(types.void(int64, int64, int64, int64, int64, int64))
def _add_errors(scales, given, count, moments, plane, sums):
    """Add to ERROR and HELD what ``count`` scales, given as they are seen, change in them."""
    error, held = load64(sums + ERROR), load64(sums + HELD)
    whole = 4 * (count // LANES * LANES)
    for at in range(0, whole, 4 * LANES):
        scale = wide(load(scales + at))
        delta = sub64(wide(load(given + at)), scale)
        cross, power, along = moments + at, moments + plane + at, moments + 2 * plane + at
        both = fma64(delta, wide(load(power)), mul64(add64(scale, scale), wide(load(cross))))
        error, held = fma64(delta, both, error), fma64(mul64(delta, scale), wide(load(along)), held)
    store64(sums + ERROR, error)
    store64(sums + HELD, held)
    for at in range(whole, 4 * count, 4):
        one = float64(load_one(scales + at))
        change = float64(load_one(given + at)) - one
        crossed, squares = float64(load_one(moments + at)), float64(load_one(moments + plane + at))
        count_up(sums, ERROR, change * (2.0 * one * crossed + change * squares))
        count_up(sums, HELD, change * one * float64(load_one(moments + 2 * plane + at)))


def quantise_scales(table, scales, count, size, first, last, codes, factors, seen, moments, plane, sums):
    """Quantise blocks ``first`` to ``last`` of ``count`` float32 scales, ``size`` a block, less the table's offset.

    A code is the number of the steps that a value has passed. The upper half of its bits says how many it has passed at least,
    most often all but one.

    Args:
        codes: address of a byte a scale.
        factors: address of a float32 a block, the largest magnitude.
        seen: address of the scales that a reader will see.
        moments: 0, or address of three planes of ``plane`` bytes, Σ c(c - s), Σ c² and Σ c(s - v) of each scale's weights: what
            the reader's scales add to Σ (stored - exact)² and Σ (stored - exact)(exact - base) is added to ``sums``.
    """
    offset, map_, steps, start = load_one(table), table + DYNAMIC_MAP, table + DYNAMIC_STEPS, table + DYNAMIC_START
    for block in range(first, last):
        begin, end = block * size, min(block * size + size, count)
        top = _largest(scales, begin, end, offset)
        store_one(factors + 4 * block, top)
        factor = float32(1.0) / top if top > 0 else float32(0.0)
        if not factor < np.inf:
            count_up(sums, MISFITS, 1.0)  # a reciprocal beyond float32
            return
        for i in range(begin, end):
            value = (load_one(scales + 4 * i) - offset) * factor
            code = load_byte(start + (unsigned(as_bits(value)) >> 16))
            code += value >= load_one(steps + 4 * code)
            while value >= load_one(steps + 4 * code):
                code += 1
            code = code if top > 0 else int64(0)
            store_byte(codes + i, code)
            store_one(seen + 4 * i, float32(load_one(map_ + 4 * code) * top) + offset)
        if moments != 0:
            _add_errors(scales + 4 * begin, seen + 4 * begin, end - begin, moments + 4 * begin, plane, sums)


def read_scales(codes, map_, factors, offset, size, first, last, out):
    """Scales ``first`` to ``last`` as a reader sees them, float32 at ``out``, of blocks of ``size``.

    Args:
        codes, map_, factors, offset: addresses of a byte a scale, of the 256 float32 that the bytes stand for, of what each
            block's are multiplied by, and of what is added to all.
    """
    more = load_one(offset)
    for i in range(first, last):
        value = float32(load_one(map_ + 4 * load_byte(codes + i)) * load_one(factors + 4 * (i // size)))
        store_one(out + 4 * i, value + more)
