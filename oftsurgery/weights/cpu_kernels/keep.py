"""The base's own scales, and the change over-relaxed: see :mod:`oftsurgery.weights.preserve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import float32, float64, int64, types

from .blocks import (
    CELL_PARTS,
    RANK_PARTS,
    Parts,
    count_up,
    get,
    is_strong,
    parts_of,
    peaks,
    put,
    reciprocals,
    weigh_many,
)
from .codes import BY_CELLS, BY_RANKS, project_on_int8
from .compiling import part
from .lanes import (
    absolute,
    call_nine,
    div,
    fill,
    fma,
    load,
    load_one,
    load_word,
    mul,
    store,
    store_byte,
    store_one,
    sub,
    totals,
    which_below,
    zeros,
)
from .layout import (
    ASIDE,
    CLIP,
    FIND,
    FINDING,
    HELD_CODES,
    HELD_FACTORS,
    HELD_LEVELS,
    HELD_OUT,
    HELD_SIZE,
    LANES,
    MANY,
    MISFIT,
    MISFITS,
    NEW_BLOCKSIZE,
    NEW_LEVELS,
    NEW_SCALES,
    NORM,
    NOT_FINITE,
    NUMBERS,
    OFFSET,
    OVER,
    OWN,
    OWN_SCALES,
    PARTIAL,
    PEAKS,
    PLANE,
    PLANES,
    SQUARE,
    STRONG,
    TINY,
    UNIT,
    UNITS,
    UNREAD,
    WEIGHTS,
)


@part(float32(float32, float32, int64, int64, int64))
def _held_scale(wanted, top, block, job, sums):
    """The scale nearest to ``wanted`` that the statistics of the base can hold; notes its code, and whether it clips the
    block's largest magnitude ``top``.
    """
    table = load_word(job + HELD_LEVELS)
    if table == 0:
        return wanted
    numbers = load_word(job + NUMBERS)
    factor = load_one(load_word(job + HELD_FACTORS) + 4 * (block // load_word(job + HELD_SIZE)))
    offset = load_one(numbers + OFFSET)
    scaled = (wanted - offset) / factor if factor != 0 else float32(0.0)
    index = int64(0)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        if scaled > load_one(table + 4 * (256 + index + step - 1)):
            index += step
    seen = float32(load_one(table + 4 * index) * factor) + offset
    store_byte(load_word(job + HELD_OUT) + block, int64(load_one(load_word(job + HELD_CODES) + 4 * index)))
    if min(wanted, top) - abs(seen) > load_one(numbers + MISFIT) * max(abs(seen), offset):
        count_up(sums, MISFITS, 1.0)
    return seen


def _keep(parts: Parts) -> Callable[..., None]:
    load_levels, careful, over_many = parts.codes.load_levels, parts.careful, parts.over_many

    @part(types.void(*[int64] * 7, float32, int64, parts.codes.levels, int64, int64))
    def encode_strong(job, base, x, first, n, row, block, top, to, levels, work, sums):
        scale = load_one(load_word(job + OWN) + 4 * block)
        count_up(sums, STRONG, 1.0)
        if top > 0:
            call_nine(load_word(job + FIND), job, base, x, first, n, row, 0, work + FINDING, work + UNREAD)
            scales = load_word(job + NEW_SCALES) + 4 * block
            scale = _held_scale(load_one(scales), top, block, job, sums)
        store_one(load_word(job + NEW_SCALES) + 4 * block, scale)
        careful(x, base, n, scale, scale, abs(scale) < TINY, float32(0.0), to, levels, sums, 0, 0)

    def keep(job, base, x, first, count, row, result, work, sums):
        """As :func:`.encode.nearest_by_cells`, with the base's own scales and the change over-relaxed; strong blocks with
        scales of their own, to nearest.
        """
        size, own, scales = load_word(job + NEW_BLOCKSIZE), load_word(job + OWN), load_word(job + NEW_SCALES)
        numbers = load_word(job + NUMBERS)
        over, square, clip = load_one(numbers + OVER), load_one(numbers + SQUARE), load_one(numbers + CLIP)
        levels = load_levels(load_word(job + NEW_LEVELS))
        block = first // size
        for group in range(parts_of(count, MANY * size)):
            done = group * MANY * size
            here = min(MANY * size, count - done)
            blocks = (here + size - 1) // size
            x_at, base_at, to = x + 4 * done, base + 4 * done, result + (first + done) // 2
            if peaks(x_at, here, size, work, sums) < NOT_FINITE:
                here_scales = get(own + 4 * block, blocks, work)
                store(work + OWN_SCALES, here_scales)
                put(here_scales, scales + 4 * block, blocks, work)
                unit = reciprocals(size, work)
                added, strong = 0, 0
                if here % size == 0 and unit > 0:
                    over_many(x_at, base_at, size, blocks, over, to, levels, work)
                    strong = which_below(fill(square * float32(size)), totals(work + PARTIAL + 3072))
                    strong |= which_below(mul(absolute(here_scales), fill(clip)), load(work + PEAKS))
                    strong &= (1 << blocks) - 1
                    added = weigh_many(blocks, strong, unit, work, sums)
                for k in range(blocks):
                    if added and not strong:
                        break
                    n, at = min(size, here - k * size), 4 * k * size
                    scale, top = load_one(own + 4 * (block + k)), load_one(work + PEAKS + 4 * k)
                    if (strong >> k) & 1 if added else is_strong(base_at + at, x_at + at, n, scale, numbers, top):
                        encode_strong(
                            job, base_at + at, x_at + at, first + done + k * size, n, row, block + k, top, to + at // 8,
                            levels, work, sums,
                        )  # fmt: skip
                    elif not added:
                        careful(
                            x_at + at, base_at + at, n, scale, scale, abs(scale) < TINY, over, to + at // 8, levels, sums,
                            0, 0,
                        )  # fmt: skip
            block += blocks

    return keep


keep_by_cells, keep_by_ranks = _keep(CELL_PARTS), _keep(RANK_PARTS)


# --- the sample of the relaxation ------------------------------------------------------------------------------------


def sample(job, base, x, first, count, row, result, work, sums):
    """Leave the sample that decides the relaxation at ``result``: planes of the base and of the change in units of the scale; the weights
    of the blocks' changes at WEIGHTS, 0 for strong ones. Adds up Σ change², by that weight, and the strong blocks.
    """
    size, own, plane = load_word(job + NEW_BLOCKSIZE), load_word(job + OWN), load_word(job + PLANE)
    numbers = load_word(job + NUMBERS)
    square, clip, unit = load_one(numbers + SQUARE), load_one(numbers + CLIP), load_one(numbers + UNIT)
    for group in range(parts_of(count, MANY * size)):
        done = group * MANY * size
        here = min(MANY * size, count - done)
        blocks = (here + size - 1) // size
        if peaks(x + 4 * done, here, size, work, sums) >= NOT_FINITE:
            continue
        scales = get(own + 4 * ((first + done) // size), blocks, work)
        store(work + OWN_SCALES, scales)
        store(work + UNITS, div(fill(float32(1.0)), scales))
        for k in range(blocks):
            factor, moved_square = fill(load_one(work + UNITS + 4 * k)), zeros()
            i = done + k * size
            for at in range(4 * i, 4 * min(i + size, count), 4 * LANES):
                v, to = load(base + at), result + 4 * first + at
                moved = mul(sub(load(x + at), v), factor)
                store(to, mul(v, factor))
                store(to + plane, moved)
                moved_square = fma(moved, moved, moved_square)
            store(work + PARTIAL + 64 * k, moved_square)
        store(work + ASIDE, totals(work + PARTIAL))
        weights = load_word(job + WEIGHTS) + (result + 4 * (first + done) - load_word(job + PLANES)) // size
        for k in range(blocks):
            scale, moved_sum = load_one(work + OWN_SCALES + 4 * k), load_one(work + ASIDE + 4 * k)
            top, n = load_one(work + PEAKS + 4 * k), min(size, here - k * size)
            at = 4 * (done + k * size)
            hardly = abs(scale) < TINY
            strong = moved_sum > square * float32(n) or top > clip * abs(scale)
            if hardly:
                strong = is_strong(base + at, x + at, n, scale, numbers, top) != 0
            weight = float32(0.0) if hardly or strong else (scale / unit) * (scale / unit)
            if strong:
                count_up(sums, STRONG, 1.0)
            elif not hardly:
                count_up(sums, NORM, float64(weight) * float64(moved_sum))
            store_one(weights + 4 * k, weight)


def _projector(load_levels: Any, project: Any) -> Callable[..., None]:
    def projector(planes, plane, weights, count, each, first, last, size, table, omegas, many, out):
        """For each of ``many`` float32 ω at ``omegas``, and each of the parts ``first`` to ``last`` of ``each`` blocks, the sum over
        the part's blocks of a sample, of ``count`` in all, of weight · change · (level(base + ω change) - base): by 16 lanes in
        float32 at ``out``, (parts, many, 16).
        """
        levels = load_levels(table)
        for number in range(first, last):
            sums = out + 64 * many * number
            for j in range(many):
                store(sums + 64 * j, zeros())
            for k in range(number * each, min(number * each + each, count)):
                weight = load_one(weights + 4 * k)
                if weight > 0:
                    base = planes + 4 * k * size
                    for j in range(many):
                        found = project(base, base + plane, size, fill(load_one(omegas + 4 * j)), levels)
                        store(sums + 64 * j, fma(found, fill(weight), load(sums + 64 * j)))

    return projector


project_by_cells = _projector(BY_CELLS.load_levels, BY_CELLS.project)
project_by_ranks = _projector(BY_RANKS.load_levels, BY_RANKS.project)
project_int8 = _projector(BY_RANKS.load_levels, project_on_int8)
