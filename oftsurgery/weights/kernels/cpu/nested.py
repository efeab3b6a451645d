"""Double quantisation: the scales of 4-bit blocks in 8 bits, and what that does to the weights."""

from __future__ import annotations

import numpy as np
from numba import float32, float64, int64

from .blocks import count_up
from .lanes import as_bits, load_byte, load_one, store_byte, store_one, unsigned
from .layout import DYNAMIC_MAP, DYNAMIC_START, DYNAMIC_STEPS, ERROR, HELD, MISFITS


def quantise_scales(table, scales, count, size, first, last, codes, factors, seen, moments, plane, sums):
    """Quantise blocks ``first`` to ``last`` of ``count`` float32 scales, ``size`` a block, less the table's offset.

    A code is the number of the steps that a value has passed. The upper half of its bits says how many it has passed at least.

    Args:
        codes: address of a byte a scale.
        factors: address of a float32 a block, the largest magnitude.
        seen: 0, or address of the scales that a reader will see.
        moments: 0, or address of three planes of ``plane`` bytes, Σ c(c - s), Σ c² and Σ c(s - v) of each scale's weights: what
            the reader's scales add to Σ (stored - exact)² and Σ (stored - exact)(exact - base) is added to ``sums``.
    """
    offset, map_, steps, start = load_one(table), table + DYNAMIC_MAP, table + DYNAMIC_STEPS, table + DYNAMIC_START
    error = held = 0.0
    for block in range(first, last):
        begin, end = block * size, min(block * size + size, count)
        top = float32(0.0)
        for i in range(begin, end):
            top = max(top, abs(load_one(scales + 4 * i) - offset))
        store_one(factors + 4 * block, top)
        factor = float32(1.0) / top
        if top > 0 and not factor < np.inf:
            count_up(sums, MISFITS, 1.0)  # a reciprocal beyond float32
            return
        for i in range(begin, end):
            scale = load_one(scales + 4 * i)
            code = int64(0)
            if top > 0:
                value = (scale - offset) * factor
                code = load_byte(start + (unsigned(as_bits(value)) >> 16))
                while value >= load_one(steps + 4 * code):
                    code += 1
            store_byte(codes + i, code)
            given = float32(load_one(map_ + 4 * code) * top) + offset
            if seen != 0:
                store_one(seen + 4 * i, given)
            if moments != 0:
                wide = float64(scale)
                delta = float64(given) - wide
                at = moments + 4 * i
                cross, power, along = load_one(at), load_one(at + plane), load_one(at + 2 * plane)
                error += delta * (2.0 * wide * float64(cross) + delta * float64(power))
                held += delta * wide * float64(along)
    count_up(sums, ERROR, error)
    count_up(sums, HELD, held)
