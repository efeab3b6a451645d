"""Rounding of a few columns one after the other, where each change moves the later columns: calibrated rounding."""

from __future__ import annotations

from numba import float32, int64, types

from .compiling import part
from .lanes import absolute, choose_less, div, fill, fma, load, load_one, mul, store, sub, to_int8, zeros
from .layout import LANES


@part(types.void(int64, int64, int64, int64, int64))
def _nearest(x, table, count, level, number):
    """Store at ``level`` and ``number`` the levels that are nearest to the values at ``x``, and the numbers of these levels."""
    scaled = load(x)
    if count == 255:  # int8
        whole = to_int8(mul(scaled, fill(float32(127.0))))
        store(level, div(whole, fill(float32(127.0))))
        store(number, sub(whole, fill(float32(-127.0))))
        return
    found, at = fill(load_one(table)), zeros()
    for i in range(1, count):
        bound = fill(load_one(table + 4 * (count + i - 1)))
        found = choose_less(bound, scaled, fill(load_one(table + 4 * i)), found)
        at = choose_less(bound, scaled, fill(float32(i)), at)
    store(level, found)
    store(number, at)


def sweep(points, stored, scales, matrix, table, count, chosen, columns, rows, first, last, scratch):
    """Round the columns at ``points``, one after the other, for rows ``first`` to ``last``, multiples of 16.

    Args:
        points, stored, scales: addresses of ``(columns, rows)`` float32. A change counts from ``stored``, and the points
            become the changes.
        matrix: address of ``(columns, columns)`` float32: row i says how a change of column i moves the later points.
        table, count: address of the levels and their bounds, float32, and the number of levels.
        chosen: address of ``(columns, rows)`` float32, the numbers of the levels.
        scratch: address of 64 bytes for each column and 128 bytes more.
    """
    level, number = scratch + 4 * LANES * columns, scratch + 4 * LANES * (columns + 1)
    for r in range(first, last, LANES):
        for i in range(columns):
            store(scratch + 4 * LANES * i, load(points + 4 * (i * rows + r)))
        for i in range(columns):
            at = 4 * (i * rows + r)
            point, scale = load(scratch + 4 * LANES * i), load(scales + at)
            scaled = choose_less(zeros(), absolute(scale), div(point, scale), zeros())
            store(level, scaled)
            _nearest(level, table, count, level, number)
            store(chosen + at, load(number))
            change = sub(mul(load(level), scale), load(stored + at))
            store(points + at, change)
            for k in range(i + 1, columns):
                later = scratch + 4 * LANES * k
                store(later, fma(change, fill(load_one(matrix + 4 * (i * columns + k))), load(later)))
