"""Parts of the 4-bit encoders. They take 16 blocks at a time if float32 holds all intermediate values, and else one block, carefully."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import float32, float64, int32, int64, types

from .codes import BY_CELLS, BY_RANKS, FOUR, SIX, Codes
from .compiling import part
from .lanes import (
    absolute,
    add,
    add64,
    add_product,
    div,
    f32x,
    f64x,
    fill,
    fill64,
    fma,
    greater,
    least,
    load,
    load64,
    load_double,
    load_one,
    max_bits,
    mul,
    no_bits,
    store,
    store64,
    store_double,
    store_ints,
    store_one,
    sub,
    top_bits,
    tops,
    total,
    totals,
    weigh,
    zeros,
)
from .layout import (
    ASIDE,
    CHANGE,
    CLIP,
    ERROR,
    HELD,
    LANES,
    MANY,
    NORM,
    OWN_SCALES,
    PARTIAL,
    PEAKS,
    SHARES,
    SQUARE,
    TINY,
    TOP,
    UNITS,
)


@part(int64(int64, int64))
def parts_of(count, each):
    """The number of parts of ``each`` that hold ``count``; the last part may be smaller. A kernel has no ``range`` with a
    variable step, because such a range can raise an error.
    """
    return (count + each - 1) // each


@part(types.void(int64, int64, float64))
def count_up(sums, which, value):
    """Add to one of a pass's sums."""
    store_double(sums + which, load_double(sums + which) + value)


@part(types.void(int64, int64, f32x, f64x))
def add_up(sums, which, value, weight):
    """Add ``value · weight`` to one of a pass's sums, by lanes."""
    store64(sums + which, weigh(value, weight, load64(sums + which)))


@part(types.void(int64, f64x, f64x, f64x, f64x))
def add_four(sums, norm, error, change, held):
    """Add to the sums of these names, by lanes."""
    store64(sums + NORM, add64(norm, load64(sums + NORM)))
    store64(sums + ERROR, add64(error, load64(sums + ERROR)))
    store64(sums + CHANGE, add64(change, load64(sums + CHANGE)))
    store64(sums + HELD, add64(held, load64(sums + HELD)))


@part(int64(int64, f32x, f32x, f32x, f32x, float32))
def add_squares(sums, norm, error, change, held, unit):
    """As :func:`add_four`, in float32 and in units of the square of ``unit``, if all sums are finite. Returns whether they are."""
    if not total(add(norm, add(error, change))) < float32(1e30):
        return 0
    none, weight = fill64(0.0), fill64(float64(unit) * float64(unit))
    add_four(
        sums,
        weigh(norm, weight, none),
        weigh(error, weight, none),
        weigh(change, weight, none),
        weigh(held, weight, none),
    )
    return 1


@part(int32(int64, int64, int64, int64, int64))
def peaks(x, count, size, work, sums):
    """The largest magnitudes of at most 16 blocks of ``size`` of ``count`` values, by lanes at PEAKS; the bits of the largest
    of all are given, and noted in ``sums``.
    """
    at = work + PARTIAL
    for k in range(MANY):
        bits = no_bits()
        for i in range(k * size, min(k * size + size, count), LANES):
            bits = max_bits(bits, load(x + 4 * i))
        store_ints(at + 64 * k, bits)
    each = tops(at)
    store_ints(work + PEAKS, each)
    top = top_bits(each)
    store_double(sums + TOP, max(load_double(sums + TOP), float64(top)))
    return top


@part(types.void(f32x, int64, int64, int64))
def put(values, to, blocks, work):
    """Store the first ``blocks`` of 16 values."""
    if blocks == MANY:
        store(to, values)
    else:
        store(work + ASIDE, values)
        for k in range(blocks):
            store_one(to + 4 * k, load_one(work + ASIDE + 4 * k))


@part(f32x(int64, int64, int64))
def get(from_, blocks, work):
    """The first ``blocks`` of 16 values, and the first for the others."""
    if blocks == MANY:
        return load(from_)
    store(work + ASIDE, fill(load_one(from_)))
    for k in range(blocks):
        store_one(work + ASIDE + 4 * k, load_one(from_ + 4 * k))
    return load(work + ASIDE)


@part(int64(int64, int64, int64, float32, int64, float32))
def is_strong(base, x, n, scale, numbers, top):
    """Whether a block of n values is to be scaled anew; ``top``: its largest magnitude."""
    moved = zeros()
    factor = fill(float32(1.0) / max(abs(scale), TINY))
    for i in range(0, 4 * n, 4 * LANES):
        d = mul(sub(load(x + i), load(base + i)), factor)
        moved = fma(d, d, moved)
    clipped = top > load_one(numbers + CLIP) * abs(scale)
    return total(moved) > load_one(numbers + SQUARE) * float32(n) or clipped


class Parts(NamedTuple):
    """Parts with a format's levels.

    Attributes:
        codes: the operations that they are made of.
        careful: ``(x, base, n, scale, divisor, divide, over, to, levels, sums, moments, plane)``: encode a block whose levels are
            multiples of ``scale``, its values divided by ``divisor`` (or times its reciprocal), the change times 1 + ``over``.
        by_peaks: ``(x, base, size, blocks, top, to, levels, work, sums, moments, plane)``: encode blocks by their PEAKS,
            ``top`` the largest of them; gives whether all sums are finite: if not, nothing is added to them.
        over_many: ``(x, base, size, blocks, over, to, levels, work)``: encode blocks by the reciprocals of their scales at
            UNITS, the change times 1 + ``over``; leaves four partial sums of each.
        any_many: ``(x, base, size, blocks, to, levels, work, moments)``: as over_many, without ``over``; leaves moments behind the
            sums if ``moments`` is not 0.
    """

    codes: Codes
    careful: Any
    by_peaks: Any
    over_many: Any
    any_many: Any


@part(types.void(FOUR, int64))
def leave_sums(four, at):
    """Leave a block's sums by lanes at four places, 1024 bytes apart."""
    square, miss, along, moved = four
    store(at, square)
    store(at + 1024, miss)
    store(at + 2048, along)
    store(at + 3072, moved)


@part(types.void(SIX, int64))
def leave_moments(six, at):
    """Leave a block's Σ c(c - s), Σ c² and Σ c(s - v) by lanes at three places, 1024 bytes apart: c is s + (c - s)."""
    square, miss, along, _, crossed, turned = six
    cross = add(crossed, miss)
    store(at, cross)
    store(at + 1024, add(add(square, crossed), cross))
    store(at + 2048, add(turned, along))


@part(types.void(*[int64] * 5))
def put_moments(at, moments, plane, blocks, work):
    """Put what :func:`leave_moments` left for 16 blocks into the three planes."""
    for q in range(3):
        put(totals(at + 1024 * q), moments + q * plane, blocks, work)


def _parts(codes: Codes) -> Parts:
    encode_one, encode, encode_moments, encode_over, encode_any, encode_any_moments = codes[2:8]
    levels_type = codes.levels

    @part(types.void(int64, int64, int64, float32, float32, int64, float32, int64, levels_type, int64, int64, int64))
    def careful(x, base, n, scale, divisor, divide, over, to, levels, sums, moments, plane):
        more, stored = fill(over), fill(scale)
        factor = fill(divisor if divide else float32(1.0) / divisor)
        norm, error, change, held = fill64(0.0), fill64(0.0), fill64(0.0), fill64(0.0)
        cross, power, along = zeros(), zeros(), zeros()
        for i in range(0, 4 * n, 4 * LANES):
            w = load(x + i)
            moved = sub(w, load(base + i))
            t = fma(moved, more, w)
            s = zeros() if divisor == 0 else div(t, factor) if divide else mul(t, factor)
            c = encode_one(s, levels, to + i // 8)
            miss = sub(mul(c, stored), w)
            norm, error = add_product(w, w, norm), add_product(miss, miss, error)
            change, held = add_product(moved, moved, change), add_product(miss, moved, held)
            if moments != 0:
                cross, power, along = fma(c, miss, cross), fma(c, c, power), fma(c, moved, along)
        add_four(sums, norm, error, change, held)
        if moments != 0:  # in units of the scale; a scale below TINY has no moments
            unit = float32(1.0) / scale if scale >= TINY else float32(0.0)
            store_one(moments, total(cross) * unit)
            store_one(moments + plane, total(power))
            store_one(moments + 2 * plane, total(along) * unit)

    @part(int64(int64, int64, int64, int64, float32, int64, levels_type, int64, int64, int64, int64))
    def by_peaks(x, base, size, blocks, top, to, levels, work, sums, moments, plane):
        absmax = load(work + PEAKS)
        share = mul(absmax, fill(float32(1.0) / top))
        store(work + SHARES, mul(share, share))
        store(work + UNITS, div(fill(float32(1.0)), greater(absmax, fill(TINY))))
        norm, error, held, change = zeros(), zeros(), zeros(), zeros()
        for k in range(blocks):
            factor, weight = fill(load_one(work + UNITS + 4 * k)), fill(load_one(work + SHARES + 4 * k))
            four = (zeros(), zeros(), zeros(), zeros())
            six = (zeros(), zeros(), zeros(), zeros(), zeros(), zeros())
            for i in range(0, 4 * size, 256):
                if moments == 0:
                    four = encode(x + i, base + i, factor, levels, to, four)
                else:
                    six = encode_moments(x + i, base + i, factor, levels, to, six)
                to += 32
            if moments != 0:
                leave_moments(six, work + PARTIAL + 64 * k)
                four = (six[0], six[1], six[2], six[3])
            square, miss, along, moved = four
            norm, error = fma(square, weight, norm), fma(miss, weight, error)
            held, change = fma(along, weight, held), fma(moved, weight, change)
            x += 4 * size
            base += 4 * size
        if moments != 0:
            put_moments(work + PARTIAL, moments, plane, blocks, work)
        return add_squares(sums, norm, error, change, held, top)

    @part(types.void(int64, int64, int64, int64, float32, int64, levels_type, int64))
    def over_many(x, base, size, blocks, over, to, levels, work):
        more = fill(over)
        for k in range(blocks):
            factor = fill(load_one(work + UNITS + 4 * k))
            four = (zeros(), zeros(), zeros(), zeros())
            for i in range(0, 4 * size, 256):
                four = encode_over(x + i, base + i, factor, more, levels, to, four)
                to += 32
            leave_sums(four, work + PARTIAL + 64 * k)
            x += 4 * size
            base += 4 * size

    @part(types.void(*[int64] * 5, levels_type, int64, int64))
    def any_many(x, base, size, blocks, to, levels, work, moments):
        for k in range(blocks):
            factor, at = fill(load_one(work + UNITS + 4 * k)), work + PARTIAL + 64 * k
            four = (zeros(), zeros(), zeros(), zeros())
            six = (zeros(), zeros(), zeros(), zeros(), zeros(), zeros())
            for i in range(0, 4 * size, 256):
                if moments == 0:
                    four = encode_any(x + i, base + i, factor, levels, to, four)
                else:
                    six = encode_any_moments(x + i, base + i, factor, levels, to, six)
                to += 32
            if moments != 0:
                leave_moments(six, at + 4096)
                four = (six[0], six[1], six[2], six[3])
            leave_sums(four, at)
            x += 4 * size
            base += 4 * size

    return Parts(codes, careful, by_peaks, over_many, any_many)


CELL_PARTS, RANK_PARTS = _parts(BY_CELLS), _parts(BY_RANKS)


@part(float32(int64, int64))
def reciprocals(size, work):
    """Leave the reciprocals of 16 OWN_SCALES at UNITS; gives the largest magnitude of these, or 0 where float32 does not hold
    what comes up with them (or with blocks of ``size``, which are to be whole vectors four by four).
    """
    scales = load(work + OWN_SCALES)
    store(work + UNITS, div(fill(float32(1.0)), scales))
    magnitudes = absolute(scales)
    top = -least(sub(zeros(), magnitudes))
    usual = size % 64 == 0 and least(magnitudes) > float32(1e-18) and top < float32(1e18)
    return top if usual else float32(0.0)


@part(int64(int64, int64, float32, int64, int64))
def weigh_many(blocks, without, unit, work, sums):
    """Add up what ``over_many`` left, but for the blocks with a bit in ``without``; ``unit`` is from :func:`reciprocals`. Gives
    whether all of it is finite; if not, nothing is added.
    """
    share = mul(load(work + OWN_SCALES), fill(float32(1.0) / unit))
    store(work + SHARES, mul(share, share))
    norm, error, held, change = zeros(), zeros(), zeros(), zeros()
    at = work + PARTIAL
    for k in range(blocks):
        if not (without >> k) & 1:
            weight = fill(load_one(work + SHARES + 4 * k))
            norm, error = fma(load(at), weight, norm), fma(load(at + 1024), weight, error)
            held, change = fma(load(at + 2048), weight, held), fma(load(at + 3072), weight, change)
        at += 64
    return add_squares(sums, norm, error, change, held, unit)
