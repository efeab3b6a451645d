"""The kernel of a tile of a weight, row by row: decode, rotate, and the encoder that the job names."""

from __future__ import annotations

from numba import int64, types

from .blocks import parts_of
from .codes import load_codes
from .compiling import part
from .lanes import (
    BLOCK_LANES,
    BLOCK_ROWS,
    call_five,
    call_nine,
    fill,
    load,
    load_bf16,
    load_f16,
    load_i8,
    load_one,
    load_word,
    mul,
    pick,
    prefetch,
    prefetch_to_write,
    product_one,
    product_two,
    store,
)
from .layout import (
    BF16,
    BLOCK,
    BLOCKSIZE,
    CODES,
    DECODE,
    ENCODE,
    F32,
    FACTORS,
    FEATURES,
    FLAT,
    FOUR_BIT,
    GIVEN,
    GROUP,
    INT8,
    KIND,
    LANES,
    LEVELS,
    MATRICES,
    NEW_FLAT,
    NEW_KIND,
    ROWS,
    SCALES,
    STEP,
    SUMS,
    THEN,
    X_STRIDE,
    Y_STRIDE,
)


@part(types.void(*[int64] * 5))
def _ask(kind, codes, first, count, write):
    """Ask for the cache lines of ``count`` weights from ``first`` on, while the kernel computes something else: each row
    is on pages of its own, which the processor would not guess.
    """
    halves = 1 if kind == FOUR_BIT else 2 if kind == INT8 else 8 if kind == F32 else 4
    for at in range(codes + first * halves // 2, codes + (first + count) * halves // 2, 64):
        if write:
            prefetch_to_write(at)
        else:
            prefetch(at)


@part(types.void(*[int64] * 9))
def _rotate(x, x_stride, y, y_stride, columns, b, matrices, step, first_block):
    """ROWS rows of ``columns`` values, rotated by blocks: y = x · blockdiag(matrices[first_block:]); strides in bytes."""
    wide = 2 * BLOCK_LANES
    for k in range(columns // b):
        c, m = k * b, matrices + (first_block + k) * step
        for r in range(0, ROWS, BLOCK_ROWS):
            x_at, y_at = x + r * x_stride + 4 * c, y + r * y_stride + 4 * c
            done = 0
            while done + wide <= b:
                product_two(x_at, x_stride, m + 4 * done, 4 * b, y_at + 4 * done, y_stride, b)
                done += wide
            while done < b:
                product_one(x_at, x_stride, m + 4 * done, 4 * b, y_at + 4 * done, y_stride, b)
                done += BLOCK_LANES


@part(types.void(*[int64] * 3))
def _copy(given, y, columns):
    """A row of values that were rotated before."""
    for i in range(0, columns, LANES):
        store(y + 4 * i, load(given + 4 * i))


def tile(job, result, first_row, last_row, first_column, last_column, scratch, sums):
    """Fold rows ``first_row`` to ``last_row`` of columns ``first_column`` to ``last_column`` of a job.

    GROUP rows (a multiple of ROWS) are done at a time: decoded to the scratch, float32, and rotated into the scratch behind
    it, or copied there where the job gives the rotated values. Where 4-bit blocks straddle rows, the columns are all of the
    row, the strides are the row's, and groups begin with a block.

    Args:
        job: address of int64, see :mod:`.layout`.
        result: address of the new codes, or of a sample's planes.
        scratch: address, 64-byte aligned, of a group twice and WORK values.
        sums: address of two times SUMS bytes, which are added to; the second half is of an encoder that another follows.
    """
    features, group = load_word(job + FEATURES), load_word(job + GROUP)
    x_stride, y_stride = load_word(job + X_STRIDE), load_word(job + Y_STRIDE)
    flat, new_flat = load_word(job + FLAT), load_word(job + NEW_FLAT)
    kind, new_kind = load_word(job + KIND), load_word(job + NEW_KIND)
    codes, factors, b = load_word(job + CODES), load_word(job + FACTORS), load_word(job + BLOCK)
    given = load_word(job + GIVEN)
    decode, encode, then = load_word(job + DECODE), load_word(job + ENCODE), load_word(job + THEN)
    x = scratch
    y = (x + group * x_stride + 63) & ~63
    work = (y + group * y_stride + 63) & ~63
    columns = last_column - first_column
    first_sums = sums + SUMS if then != 0 else sums
    for number in range(parts_of(last_row - first_row, group)):
        row = first_row + number * group
        rows = min(group, last_row - row)
        if flat:
            call_five(decode, job, row * features, rows * features, x, row)
        else:
            for r in range(rows):
                first = (row + r) * features + first_column
                _ask(kind, codes, first + group * features, columns, 0)
                _ask(new_kind, result, first, columns, 1)
                call_five(decode, job, first, columns, x + r * x_stride, row + r)
        if given != 0:
            for r in range(rows):
                _copy(given + 4 * ((row + r) * features + first_column), y + r * y_stride, columns)
        for r in range(0, 0 if given != 0 else rows, ROWS):
            x_at, y_at = x + r * x_stride, y + r * y_stride
            step = load_word(job + STEP)
            _rotate(x_at, x_stride, y_at, y_stride, columns, b, load_word(job + MATRICES), step, first_column // b)
        if factors != 0:
            for r in range(rows):
                scale = fill(load_one(factors + 4 * (row + r)))
                for at in range(y + r * y_stride, y + r * y_stride + 4 * columns, 4 * LANES):
                    store(at, mul(load(at), scale))
        for r in range(1 if new_flat else rows):
            base, at, first = x + r * x_stride, y + r * y_stride, (row + r) * features + first_column
            count = rows * features if new_flat else columns
            call_nine(encode, job, base, at, first, count, row + r, result, work, first_sums)
            if then != 0:
                call_nine(then, job, base, at, first, count, row + r, result, work, sums)


def decode_4bit(job, first, count, out, row):
    """``count`` weights from flat index ``first`` on, a block's first, to float32 at ``out``."""
    codes, scales = load_word(job + CODES), load_word(job + SCALES)
    size, levels = load_word(job + BLOCKSIZE), load(load_word(job + LEVELS))
    for block in range(parts_of(count, size)):
        done = block * size
        scale = fill(load_one(scales + 4 * ((first + done) // size)))
        for i in range(done, min(done + size, count), LANES):
            store(out + 4 * i, mul(pick(levels, load_codes(codes + (first + i) // 2)), scale))


def decode_int8(job, first, count, out, row):
    """As :func:`decode_4bit`, of one row."""
    codes, scale = load_word(job + CODES), fill(load_one(load_word(job + SCALES) + 4 * row))
    for i in range(0, count, LANES):
        store(out + 4 * i, mul(load_i8(codes + first + i), scale))


def decode_dense(job, first, count, out, row):
    """As :func:`decode_4bit`, of plain values."""
    codes, kind = load_word(job + CODES), load_word(job + KIND)
    if kind == F32:
        for i in range(0, count, LANES):
            store(out + 4 * i, load(codes + 4 * (first + i)))
    else:
        for i in range(0, count, LANES):
            at = codes + 2 * (first + i)
            store(out + 4 * i, load_bf16(at) if kind == BF16 else load_f16(at))
