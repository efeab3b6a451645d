"""Encoders of whole rows: int8, and plain values."""

from __future__ import annotations

from numba import float32, float64

from .blocks import add_four, count_up, is_strong, peaks
from .lanes import (
    add_product,
    as_bits,
    as_float,
    div,
    fill,
    fill64,
    fma,
    load,
    load_double,
    load_one,
    load_word,
    max_bits,
    mul,
    no_bits,
    rounded,
    store,
    store_bf16,
    store_double,
    store_f16,
    store_i8,
    store_one,
    sub,
    to_int8,
    top_bits,
    total64,
    weigh,
    zeros,
)
from .layout import (
    BF16,
    F32,
    KEEPS,
    LANES,
    LARGEST,
    NEW_KIND,
    NEW_SCALES,
    NOT_FINITE,
    NUMBERS,
    OVER,
    OWN,
    STRONG,
    TINY,
    TOP,
)


def encode_int8(job, base, x, first, count, row, result, work, sums):
    """Encode one row of ``count`` values, scaled by its absmax, or by the base's own scale where the job keeps these."""
    bits = peaks(x, count, count, work, sums)
    absmax = as_float(bits)
    scale, over = absmax, float32(0.0)
    if load_word(job + KEEPS) != 0 and bits < NOT_FINITE:
        own, numbers = load_one(load_word(job + OWN) + 4 * row), load_word(job + NUMBERS)
        if own < 0 or is_strong(base, x, count, own, numbers, absmax):
            count_up(sums, STRONG, 1.0)
        else:
            scale, over = own, load_one(numbers + OVER)
    store_one(load_word(job + NEW_SCALES) + 4 * row, scale)
    # torch divides a number by a tensor as the tensor's reciprocal times the number, and values on a midpoint feel the difference
    factor = float32(float32(1.0) / scale) * float32(127.0) if scale > 0 else float32(0.0)
    overflows = as_bits(factor) >= NOT_FINITE
    step = scale / float32(127.0)
    many, few, more, divisor, limit = fill(factor), fill(step), fill(over), fill(scale), fill(float32(127.0))
    # other rows hold zeros or denormals, or changed beyond float32; if 127/scb overflows, the division comes first
    usual = not overflows and step >= TINY and bits < NOT_FINITE
    inside = scale == absmax and over == 0  # no code is beyond 127
    weight = fill64(float64(step) * float64(step))
    while True:
        norm, error, change, held = fill64(0.0), fill64(0.0), fill64(0.0), fill64(0.0)
        for start in range(0, count, 16 * LANES):
            squares, misses, moves, along = zeros(), zeros(), zeros(), zeros()
            for i in range(start, min(start + 16 * LANES, count), LANES):
                w = load(x + 4 * i)
                moved = sub(w, load(base + 4 * i))
                if usual:
                    w, moved = mul(w, many), mul(moved, many)
                    c = rounded(w) if inside else to_int8(fma(moved, more, w))
                    miss = sub(c, w)
                    squares, misses = fma(w, w, squares), fma(miss, miss, misses)
                    moves, along = fma(moved, moved, moves), fma(miss, moved, along)
                else:
                    t = fma(moved, more, w)
                    c = to_int8(mul(div(t, divisor), limit) if overflows else mul(t, many))
                    miss = sub(mul(c, few), w)
                    norm, error = add_product(w, w, norm), add_product(miss, miss, error)
                    change, held = add_product(moved, moved, change), add_product(miss, moved, held)
                store_i8(result + first + i, c)
            if usual:
                norm, error = weigh(squares, weight, norm), weigh(misses, weight, error)
                change, held = weigh(moves, weight, change), weigh(along, weight, held)
        if not usual or total64(change) < float64(LARGEST):
            break
        usual = False
    add_four(sums, norm, error, change, held)


def encode_dense(job, base, x, first, count, row, result, work, sums):
    """Encode ``count`` values. The largest magnitude in the sums includes the stored values."""
    kind = load_word(job + NEW_KIND)
    norm, error, change, held = fill64(0.0), fill64(0.0), fill64(0.0), fill64(0.0)
    bits = no_bits()
    for i in range(0, count, LANES):
        w = load(x + 4 * i)
        moved = sub(w, load(base + 4 * i))
        bits = max_bits(bits, w)
        norm, change = add_product(w, w, norm), add_product(moved, moved, change)
        if kind == F32:
            store(result + 4 * (first + i), w)
        else:
            to = result + 2 * (first + i)
            stored = store_bf16(to, w) if kind == BF16 else store_f16(to, w)
            bits = max_bits(bits, stored)
            miss = sub(stored, w)
            error, held = add_product(miss, miss, error), add_product(miss, moved, held)
    store_double(sums + TOP, max(load_double(sums + TOP), float64(top_bits(bits))))
    add_four(sums, norm, error, change, held)
