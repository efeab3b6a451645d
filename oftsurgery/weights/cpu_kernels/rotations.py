"""Block rotations of skew-symmetric generators, in float64, and their angles.

``v`` is the address of rows of float64, each the upper triangle of a block of size b. Blocks of ``wide`` (a multiple of 16 and
b) hold wide/b of them on the diagonal.
"""

from __future__ import annotations

import numpy as np
from numba import float32, float64, int64, types

from .compiling import part
from .lanes import (
    BLOCK_LANES,
    BLOCK_ROWS,
    add64,
    fill64,
    fma64,
    load64,
    load_double,
    product64,
    store64,
    store_double,
    store_one,
    total64,
)
from .layout import LANES


@part(types.void(*[int64] * 6))
def _skew(v, rows, index, b, wide, q):
    """The skew-symmetric block ``index`` of ``wide``, at q: (wide, wide)."""
    stride = 8 * wide
    for at in range(q, q + wide * stride, 8 * LANES):
        store64(at, fill64(0.0))
    each, length = wide // b, 4 * b * (b - 1)
    for e in range(each):
        at = v + (index * each + e) % rows * length
        corner = q + e * b * (stride + 8)
        for left in range(b - 1, 0, -1):
            below = corner + stride
            for right in range(corner + 8, corner + 8 + 8 * left, 8):
                value = load_double(at)
                store_double(right, value)
                store_double(below, -value)
                at += 8
                below += stride
            corner += stride + 8


@part(types.void(int64, int64, int64, int64))
def _multiply(x, y, out, wide):
    """out = x · y, all (wide, wide)."""
    stride = 8 * wide
    for r in range(0, wide, BLOCK_ROWS):
        for c in range(0, wide, BLOCK_LANES):  # two registers of float64
            product64(x + r * stride, stride, y + 8 * c, stride, out + r * stride + 8 * c, stride, wide)


@part(types.void(int64, int64, float64, int64))
def _scaled(to, x, factor, wide):
    """``to = factor · x``, vectors."""
    for at in range(0, 8 * wide, 8 * LANES):
        store64(to + at, fma64(load64(x + at), fill64(factor), fill64(0.0)))


@part(types.void(int64, int64, int64))
def _invert(a, factors, wide):
    """Gauss-Jordan in place. The symmetric part of I + Q is I, so every pivot is at least 1 and none need be sought.
    ``factors``: address of ``wide`` float64.
    """
    stride = 8 * wide
    for k in range(wide):
        row = a + stride * k
        for i in range(wide):
            store_double(factors + 8 * i, -load_double(a + stride * i + 8 * k))
        pivot = 1.0 / load_double(row + 8 * k)
        store_double(factors + 8 * k, 0.0)
        store_double(row + 8 * k, 1.0)
        _scaled(row, row, pivot, wide)
        # one more, so that what stands in the column is taken off with the rest
        store_double(row + 8 * k, pivot + 1.0)
        for c in range(0, stride, 8 * LANES):
            own = load64(row + c)
            for i in range(wide):
                at = a + stride * i + c
                store64(at, fma64(own, fill64(load_double(factors + 8 * i)), load64(at)))
        store_double(row + 8 * k, pivot)


@part(types.void(int64, int64, float64, float64, int64))
def _combine(to, x, factor, one, wide):
    """``to += factor · x``, and ``one`` on the diagonal: (wide, wide)."""
    for at in range(0, 8 * wide * wide, 8 * LANES):
        store64(to + at, fma64(load64(x + at), fill64(factor), load64(to + at)))
    for k in range(wide):
        i = to + 8 * k * (wide + 1)
        store_double(i, load_double(i) + one)


@part(float64(int64, int64, int64, int64))
def _residual(product, q, r, wide):
    """‖product - (I - Q)‖ relative to the operands' norms, with ``q`` the address of Q - I; NaN where one is not finite."""
    miss, size_q, size_r = fill64(0.0), fill64(0.0), fill64(0.0)
    for at in range(0, 8 * wide * wide, 8 * LANES):
        own, turned = load64(q + at), load64(r + at)
        d = add64(load64(product + at), own)
        miss, size_q, size_r = fma64(d, d, miss), fma64(own, own, size_q), fma64(turned, turned, size_r)
    return np.sqrt(total64(miss)) / (np.sqrt(total64(size_q)) * (1.0 + np.sqrt(total64(size_r))))


@part(types.void(int64, int64, int64, int64))
def _narrow(r, out, wide, turned):
    """r: (wide, wide) in float32, or its transpose."""
    for i in range(wide):
        for j in range(wide):
            at = j * wide + i if turned else i * wide + j
            store_one(out + 4 * at, float32(load_double(r + 8 * (i * wide + j))))


def rotation_blocks(v, rows, b, wide, first, last, power, weight, scratch, out, single, turned, residual):
    """Blocks ``first`` to ``last`` of rotations.

    Args:
        power: 0: the exact Cayley map; else ``I + 2ΣQᵏ (k < power) + weight · Q^power``.
        weight: address of the float64.
        scratch: address of (4, wide, wide).
        out: 0, or address of (n, wide, wide) float64.
        single: 0, or address of the same in float32, each transposed where ``turned``.
        residual: address of a float64, the largest ‖R(I+Q) - (I-Q)‖ relative to the operands' norms (NaN where one is not finite);
            0 for a series.
    """
    nbytes = 8 * wide * wide
    q, p, t = scratch, scratch + nbytes, scratch + 2 * nbytes
    last_weight, worst = load_double(weight), 0.0
    for index in range(first, last):
        r = scratch + 3 * nbytes if out == 0 else out + index * nbytes
        _skew(v, rows, index, b, wide, q)
        for at in range(0, nbytes, 8 * LANES):
            store64(r + at, fill64(0.0))
            store64(p + at, load64(q + at))
        if power == 0:
            _combine(r, q, 1.0, 1.0, wide)
            _combine(p, q, 0.0, 1.0, wide)
            _invert(r, t, wide)
            _combine(r, r, 1.0, -1.0, wide)
            _combine(q, q, 0.0, -1.0, wide)
            _multiply(r, p, t, wide)
            found = _residual(t, q, r, wide)
            if not found <= worst:
                worst = found
        else:
            _combine(r, q, last_weight if power == 1 else 2.0, 1.0, wide)
            for k in range(2, power + 1):
                _multiply(p, q, t, wide)
                p, t = t, p
                _combine(r, p, last_weight if k == power else 2.0, 0.0, wide)
        if worst != worst:
            break
        if single != 0:
            _narrow(r, single + index * (nbytes // 2), wide, turned)
    store_double(residual, worst)


# --- angles -----------------------------------------------------------------------------------------------------------


@part(float64(int64, int64))
def _squares(x, wide):
    """The sum of squares of x: (wide, wide)."""
    square = fill64(0.0)
    for at in range(x, x + 8 * wide * wide, 8 * LANES):
        value = load64(at)
        square = fma64(value, value, square)
    return total64(square)


@part(float64(*[int64] * 6))
def _angle_bound(v, rows, index, b, wide, scratch):
    """A bound above the largest θ of a generator: with eigenvalues ±iθ, ‖Q⁴‖² = Σθ⁸ over all of them, so twice the largest's.
    ``scratch``: address of (3, wide, wide).
    """
    nbytes = 8 * wide * wide
    q, p, t = scratch, scratch + nbytes, scratch + 2 * nbytes
    _skew(v, rows, index, b, wide, q)
    size = np.sqrt(_squares(q, wide))
    if not size > 0.0:
        return size
    for at in range(q, q + nbytes, 8 * LANES):
        store64(at, fma64(load64(at), fill64(1.0 / size), fill64(0.0)))
    _multiply(q, q, p, wide)
    _multiply(p, p, t, wide)
    return size * np.sqrt(np.sqrt(np.sqrt(0.5 * _squares(t, wide))))


@part(int64(int64, int64, float64))
def _above(beta, count, x):
    """Whether the symmetric tridiagonal matrix with a zero diagonal and ``count`` off-diagonals has an eigenvalue above x > 0
    (a Sturm sequence).
    """
    d = -x
    for at in range(beta, beta + 8 * count, 8):
        if d >= 0.0:
            return 1
        d = -x - load_double(at) * load_double(at) / d
    return d >= 0.0


@part(float64(int64, int64, float64))
def _top(beta, count, floor):
    """The largest eigenvalue of that matrix, or ``floor`` if it has none above it."""
    if not _above(beta, count, floor if floor > 0.0 else 1e-300):
        return floor
    low, high = floor, 0.0
    for i in range(count):
        high = max(high, load_double(beta + 8 * i) + (load_double(beta + 8 * i + 8) if i + 1 < count else 0.0))
    for _ in range(60):
        middle = 0.5 * (low + high)
        if middle <= low or middle >= high:
            break
        if _above(beta, count, middle):
            low = middle
        else:
            high = middle
    return high


@part(float64(int64, int64, int64))
def _product_of(x, y, wide):
    """Σ x·y of two vectors."""
    sum_ = fill64(0.0)
    for at in range(0, 8 * wide, 8 * LANES):
        sum_ = fma64(load64(x + at), load64(y + at), sum_)
    return total64(sum_)


@part(types.void(*[int64] * 4))
def _times(x, q, to, wide):
    """``to = x · Q``, vectors."""
    for c in range(0, 8 * wide, 8 * LANES):
        sum_ = fill64(0.0)
        for k in range(wide):
            sum_ = fma64(load64(q + 8 * k * wide + c), fill64(load_double(x + 8 * k)), sum_)
        store64(to + c, sum_)


@part(types.void(int64, int64, float64, int64))
def _add_multiple(to, x, factor, wide):
    """``to += factor · x``, vectors."""
    for at in range(0, 8 * wide, 8 * LANES):
        store64(to + at, fma64(load64(x + at), fill64(factor), load64(to + at)))


@part(float64(*[int64] * 7, float64))
def _angle(v, rows, index, b, wide, steps, scratch, floor):
    """The largest θ of a generator, or ``floor`` if that is larger.

    Lanczos with full reorthogonalisation (it makes Q tridiagonal: exact after ``wide`` steps, and the end of the spectrum is
    there much before), then bisection.
    """
    stride = 8 * wide
    q, basis = scratch, scratch + wide * stride
    beta = basis + (steps + 2) * stride
    _skew(v, rows, index, b, wide, q)
    scale = 0.0
    for at in range(q, q + wide * stride, 8):
        scale = max(scale, load_double(at))
    if scale == 0.0:
        return floor
    # a fixed start with a part in every eigenvector, as random numbers have
    seed = int64(12345)
    for at in range(basis, basis + stride, 8):
        seed = (seed * 1103515245 + 12345) % 2147483648
        store_double(at, float64(seed) / 2147483648.0 - 0.5)
    _scaled(basis, basis, 1.0 / np.sqrt(_product_of(basis, basis, wide)), wide)
    count, reached = int64(0), 0.0
    for step in range(steps):
        own, after = basis + step * stride, basis + (step + 1) * stride
        _times(own, q, after, wide)
        for earlier in range(step + 1):
            other = basis + earlier * stride
            _add_multiple(after, other, -_product_of(after, other, wide), wide)
        norm = np.sqrt(_product_of(after, after, wide))
        if not norm > 1e-13 * scale:
            break
        store_double(beta + 8 * count, norm)
        count += 1
        # all of the basis is rarely needed: further steps find nothing larger once the end of the spectrum is there
        if count % 16 == 8 and count > 16:
            top = _top(beta, count, reached)
            if top <= reached * (1 + 1e-14):
                break
            reached = top
        _scaled(after, after, 1.0 / norm, wide)
    return _top(beta, count, floor) if count > 0 else floor


def largest_angle(v, rows, b, wide, count, steps, bounds, scratch, best):
    """The largest θ, with ±iθ an eigenvalue of one of ``count`` generators.

    Args:
        steps: of Lanczos's method, at most, at least 2.
        bounds: 0, or address of ``count`` float64 of scratch: the generators are looked at in the order of a bound above their θ
            then, as long as one may be larger.
        scratch: address of (wide + steps + 3, wide) float64, three times (wide, wide) at least.
        best: address of the float64 that it is put in.
    """
    found = 0.0
    if bounds != 0:
        for index in range(count):
            store_double(bounds + 8 * index, _angle_bound(v, rows, index, b, wide, scratch))
    for number in range(count):
        index, bound = number, np.inf
        if bounds != 0:
            bound = -1.0
            for other in range(count):
                if not load_double(bounds + 8 * other) <= bound:
                    index, bound = other, load_double(bounds + 8 * other)
            if bound * (1 + 1e-9) < found:
                break
            store_double(bounds + 8 * index, -1.0)
        found = _angle(v, rows, index, b, wide, steps, scratch, found)
    store_double(best, found)
