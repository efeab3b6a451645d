"""4-bit encoders: by the absmax of each block, and by given scales."""

from __future__ import annotations

from collections.abc import Callable

from numba import float32

from .blocks import CELL_PARTS, RANK_PARTS, Parts, get, parts_of, peaks, put, put_moments, reciprocals, weigh_many
from .lanes import as_float, load, load_one, load_word, store, store_one
from .layout import (
    ABSMAX,
    FEATURES,
    MANY,
    MOMENT_PLANE,
    MOMENTS,
    NEW_BLOCKSIZE,
    NEW_LEVELS,
    NEW_SCALES,
    NOT_FINITE,
    OUT,
    OWN_SCALES,
    PARTIAL,
    PEAKS,
    TINY,
)


def _nearest(parts: Parts) -> Callable[..., None]:
    load_levels, careful, by_peaks = parts.codes.load_levels, parts.careful, parts.by_peaks

    def nearest(job, base, x, first, count, row, result, work, sums):
        """Encode ``count`` values at ``x`` as the flat weights ``first`` and on, a block's first, each block by its absmax.

        Args:
            base: address of their values before the rotation.
            row: of the weight.
            result: address of the new codes.
        """
        size, scales = load_word(job + NEW_BLOCKSIZE), load_word(job + ABSMAX)
        moments, plane = load_word(job + MOMENTS), load_word(job + MOMENT_PLANE)
        length = load_word(job + OUT) * load_word(job + FEATURES)
        levels = load_levels(load_word(job + NEW_LEVELS))
        block = first // size
        for group in range(parts_of(count, MANY * size)):
            done = group * MANY * size
            here = min(MANY * size, count - done)
            blocks = (here + size - 1) // size
            x_at, base_at, to = x + 4 * done, base + 4 * done, result + (first + done) // 2
            top = peaks(x_at, here, size, work, sums)
            of_moments = 0 if moments == 0 else moments + 4 * block
            put(load(work + PEAKS), scales + 4 * block, blocks, work)
            added = 0
            if size % 64 == 0 and here % size == 0 and top < NOT_FINITE and as_float(top) > float32(1e-18):
                added = by_peaks(x_at, base_at, size, blocks, as_float(top), to, levels, work, sums, of_moments, plane)
            if not added:
                for k in range(blocks):
                    absmax = load_one(scales + 4 * (block + k))
                    bounded = max(absmax, TINY)
                    n = min(size, here - k * size)
                    # in a short last block bitsandbytes bounds the absmax itself, and divides by it
                    short = first + done + k * size + size > length
                    if short:
                        store_one(scales + 4 * (block + k), bounded)
                    careful(
                        x_at + 4 * k * size, base_at + 4 * k * size, n, bounded if short else absmax, bounded, short,
                        float32(0.0), to + k * size // 2, levels, sums,
                        0 if of_moments == 0 else of_moments + 4 * k, plane,
                    )  # fmt: skip
            block += blocks

    return nearest


def _given(parts: Parts) -> Callable[..., None]:
    load_levels, careful, any_many = parts.codes.load_levels, parts.careful, parts.any_many

    def given(job, base, x, first, count, row, result, work, sums):
        """As :func:`nearest`, by the scales at NEW_SCALES."""
        size, scales = load_word(job + NEW_BLOCKSIZE), load_word(job + NEW_SCALES)
        moments, plane = load_word(job + MOMENTS), load_word(job + MOMENT_PLANE)
        levels = load_levels(load_word(job + NEW_LEVELS))
        block = first // size
        for group in range(parts_of(count, MANY * size)):
            done = group * MANY * size
            here = min(MANY * size, count - done)
            blocks = (here + size - 1) // size
            x_at, base_at, to = x + 4 * done, base + 4 * done, result + (first + done) // 2
            store(work + OWN_SCALES, get(scales + 4 * block, blocks, work))
            unit = reciprocals(size, work)
            added = 0
            of_moments = 0 if moments == 0 else moments + 4 * block
            if here % size == 0 and unit > 0:
                any_many(x_at, base_at, size, blocks, to, levels, work, moments)
                if moments != 0:
                    put_moments(work + PARTIAL + 4096, of_moments, plane, blocks, work)
                added = weigh_many(blocks, 0, unit, work, sums)
            if not added:
                for k in range(blocks):
                    scale, n, at = load_one(scales + 4 * (block + k)), min(size, here - k * size), 4 * k * size
                    careful(
                        x_at + at, base_at + at, n, scale, scale, abs(scale) < TINY, float32(0.0), to + at // 8, levels,
                        sums, 0 if of_moments == 0 else of_moments + 4 * k, plane,
                    )  # fmt: skip
            block += blocks

    return given


nearest_by_cells, nearest_by_ranks = _nearest(CELL_PARTS), _nearest(RANK_PARTS)
given_by_cells, given_by_ranks = _given(CELL_PARTS), _given(RANK_PARTS)
