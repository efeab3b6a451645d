"""Operations with 4-bit codes: from codes to levels, and from values in units of a scale to the nearest codes.

Each is an operation over 64 values, or over a block of them: see :mod:`.lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import float32, int32, int64, types

from . import processor
from .lanes import (
    BYTE,
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LONG,
    NOTHING,
    call,
    constant,
    emit_absolute,
    emit_fill,
    emit_fma,
    emit_greater,
    emit_lesser,
    emit_load,
    emit_pick,
    emit_rounded,
    emit_store,
    f32x,
    further,
    i32x,
    loop,
    operation,
    shuffle,
)
from .layout import BOUND, CELL_BASE, CELL_BOUND, LANES, LEVEL, ORDER

#: cells a unit, a little less than 16: 1 and what rounds to a bit more is in the last of 32
CELL_FACTOR = 15.9999

#: a format's levels: in order, the bounds between them, their codes
RANKS = types.Tuple((f32x, f32x, i32x))
#: … and where they lie in the order of their codes, one to a cell: the levels, the bounds below a cell, the cell's own bound
CELLS = types.Tuple((f32x, i32x, i32x, f32x, f32x))
#: Σ s², Σ (c - s)², Σ (c - s)(s - v) and Σ (s - v)² of values s, their levels c and the base's v, in units of a scale
FOUR = types.UniTuple(f32x, 4)
#: … and Σ s (c - s) and Σ s (s - v)
SIX = types.UniTuple(f32x, 6)
TWO = types.UniTuple(f32x, 2)


def emit_rank(b: Any, x: Any, bounds: Any) -> Any:
    """How many of 15 ascending ``bounds`` (the 16th lane is not read) are below x: ``torch.bucketize``, ties to the lower
    side.
    """
    index = constant(0, INTS)
    for step in (8, 4, 2, 1):
        bound = emit_pick(b, bounds, b.add(index, constant(step - 1, INTS)))
        index = b.select(b.fcmp_ordered(">", x, bound), b.add(index, constant(step, INTS)), index)
    return index


def _number_by_cell(b: Any, x: Any, base_low: Any, base_high: Any, bounds_low: Any, bounds_high: Any) -> Any:
    """:func:`emit_rank`, where each of 32 cells of [-1, 1] holds at most one bound: how many are in cells below, and whether
    the cell's own is below x.
    """
    if not processor.AVX512:
        return constant(0, INTS)  # never called
    cell = b.fptosi(emit_fma(b, x, constant(CELL_FACTOR), constant(16.0)), INTS)
    base = call(b, "llvm.x86.avx512.vpermi2var.d.512", INTS, base_low, cell, base_high)
    bound = call(b, "llvm.x86.avx512.vpermi2var.ps.512", FLOATS, bounds_low, cell, bounds_high)
    # by the sign of a difference: a comparison's bits would first have to be made lanes
    return b.sub(base, b.ashr(b.bitcast(b.fsub(bound, x), INTS), constant(31, INTS)))


def _within_one(b: Any, x: Any) -> Any:
    """x clamped to ±1."""
    if processor.HAS_RANGE:  # the lesser magnitude, with the sign of x
        mask, here = ir.Constant(ir.IntType(16), -1), ir.Constant(INT, 4)
        more = constant(0.0), mask, here
        return call(b, "llvm.x86.avx512.mask.range.ps.512", FLOATS, x, constant(1.0), ir.Constant(INT, 2), *more)
    return emit_greater(b, emit_lesser(b, x, constant(1.0)), constant(-1.0))


def _pairs(b: Any, codes: Any, octets: ir.Type) -> Any:
    """Pairs of lanes as a byte each, or as a byte for each byte of a lane."""
    pairs = ir.VectorType(LONG, 8)
    pair = b.bitcast(codes, pairs)  # the first code in the low half
    return b.trunc(b.or_(b.shl(pair, constant(4, pairs)), b.lshr(pair, constant(32, pairs))), octets)


def _store_codes(b: Any, address: Any, codes: Sequence[Any]) -> Any:
    """Store one vector of codes, or four one after the other: two codes a byte, the first in the high nibble."""
    if len(codes) == 1:
        return emit_store(b, address, _pairs(b, codes[0], ir.VectorType(BYTE, 8)))
    all_ = codes[0]
    for i in range(1, 4):  # a byte of each lane to each vector
        all_ = b.or_(all_, b.shl(codes[i], constant(8 * i, INTS)))
    octets = b.bitcast(_pairs(b, all_, ir.VectorType(INT, 8)), ir.VectorType(BYTE, 32))
    return emit_store(b, address, shuffle(b, octets, [4 * lane + vector for vector in range(4) for lane in range(8)]))


@operation(i32x(int64))
def load_codes(b, address):
    """16 codes from 8 bytes, the first in the high nibble."""
    octets = ir.VectorType(BYTE, 8)
    packed = emit_load(b, address, octets)
    high, low = b.lshr(packed, constant(4, octets)), b.and_(packed, constant(15, octets))
    return b.zext(shuffle(b, high, [i // 2 + 8 * (i % 2) for i in range(16)], low), INTS)


rank = operation(i32x(f32x, f32x))(emit_rank)


class Codes(NamedTuple):
    """The operations with a format's levels.

    Attributes:
        levels: the type of its levels.
        load_levels: them, from a table as :mod:`.layout` has it.
        encode_one: ``(t, levels, to)``: store the codes nearest to 16 values; gives their levels.
        encode: ``(x, base, factor, levels, to, sums: FOUR)``: of 64 values at ``x`` within ±1 in units of their scale.
        encode_moments: the same with ``sums: SIX``.
        encode_over: ``(x, base, factor, over, levels, to, sums: FOUR)``: of any values, the change times 1 + ``over``.
        encode_any: ``(x, base, factor, levels, to, sums: FOUR)``: of any values.
        encode_any_moments: the same with ``sums: SIX``.
        fit: ``(x, n, factor, levels)``: Σ c s and Σ c² of a block of n values.
        project: ``(base, change, n, omega, levels)``: Σ change (c - base) of a block, with c nearest to base + ω change.
    """

    levels: Any
    load_levels: Any
    encode_one: Any
    encode: Any
    encode_moments: Any
    encode_over: Any
    encode_any: Any
    encode_any_moments: Any
    fit: Any
    project: Any


def _codes(levels: Any, by_cells: bool) -> Codes:
    def number(b: Any, t: Any, of: Any) -> Any:
        if by_cells:
            return _number_by_cell(b, _within_one(b, t), *(b.extract_value(of, i) for i in range(1, 5)))
        return emit_rank(b, t, b.extract_value(of, 1))

    def level(b: Any, index: Any, of: Any) -> Any:
        return emit_pick(b, b.extract_value(of, 0), index)

    def put(b: Any, to: Any, indices: Sequence[Any], of: Any) -> None:
        codes = indices if by_cells else [emit_pick(b, b.extract_value(of, 2), index) for index in indices]
        _store_codes(b, to, codes)

    def load_levels(b: Any, table: Any) -> list[Any]:
        def at(offset: int, type_: ir.Type) -> Any:
            return emit_load(b, further(b, table, offset), type_)

        if not by_cells:
            return [at(LEVEL, FLOATS), at(BOUND, FLOATS), at(ORDER, INTS)]
        bases, bounds = (CELL_BASE, CELL_BASE + 64), (CELL_BOUND, CELL_BOUND + 64)
        return [at(LEVEL, FLOATS), *(at(o, INTS) for o in bases), *(at(o, FLOATS) for o in bounds)]

    def encode_one(b: Any, t: Any, of: Any, to: Any) -> Any:
        index = number(b, t, of)
        put(b, to, [index], of)
        return level(b, index, of)

    def encoder(count: int, over: Any = None, *, within: bool = False) -> Callable[..., list[Any]]:
        def encode(b: Any, x: Any, base: Any, factor: Any, of: Any, to: Any, begin: Any) -> list[Any]:
            sums = [b.extract_value(begin, i) for i in range(count)]
            indices = []
            for at in range(0, 256, 64):
                s = b.fmul(emit_load(b, further(b, x, at)), factor)
                moved = emit_fma(b, emit_load(b, further(b, base, at)), b.fneg(factor), s)
                if within and by_cells:
                    index = _number_by_cell(b, s, *(b.extract_value(of, i) for i in range(1, 5)))
                else:
                    index = number(b, s if over is None else emit_fma(b, moved, over, s), of)
                indices.append(index)
                miss = b.fsub(level(b, index, of), s)
                products = [(s, s), (miss, miss), (miss, moved), (moved, moved), (s, miss), (s, moved)]
                sums = [emit_fma(b, *pair, sum_) for pair, sum_ in zip(products, sums, strict=False)]
            put(b, to, indices, of)
            return sums

        return encode

    def encode_over(b: Any, x: Any, base: Any, factor: Any, over: Any, *more: Any) -> list[Any]:
        return encoder(4, over)(b, x, base, factor, *more)

    def fit(b: Any, x: Any, n: Any, factor: Any, of: Any) -> list[Any]:
        def step(i: Any, *sums: Any) -> list[Any]:
            s = b.fmul(emit_load(b, b.add(x, b.shl(i, ir.Constant(LONG, 2)))), factor)
            c = level(b, number(b, s, of), of)
            return [emit_fma(b, c, s, sums[0]), emit_fma(b, c, c, sums[1])]

        return loop(b, n, LANES, [constant(0.0)] * 2, step)

    def project(b: Any, base: Any, change: Any, n: Any, omega: Any, of: Any) -> Any:
        def step(i: Any, sum_: Any) -> list[Any]:
            at = b.shl(i, ir.Constant(LONG, 2))
            v, moved = emit_load(b, b.add(base, at)), emit_load(b, b.add(change, at))
            c = level(b, number(b, emit_fma(b, moved, omega, v), of), of)
            return [emit_fma(b, b.fsub(c, v), moved, sum_)]

        return loop(b, n, LANES, [constant(0.0)], step)[0]

    places = (int64, int64, f32x)
    return Codes(
        levels,
        operation(levels(int64))(load_levels),
        operation(f32x(f32x, levels, int64))(encode_one),
        operation(FOUR(*places, levels, int64, FOUR))(encoder(4, within=True)),
        operation(SIX(*places, levels, int64, SIX))(encoder(6, within=True)),
        operation(FOUR(*places, f32x, levels, int64, FOUR))(encode_over),
        operation(FOUR(*places, levels, int64, FOUR))(encoder(4)),
        operation(SIX(*places, levels, int64, SIX))(encoder(6)),
        operation(TWO(int64, int64, f32x, levels))(fit),
        operation(f32x(int64, int64, int64, f32x, levels))(project),
    )


BY_CELLS = _codes(CELLS, by_cells=True)
BY_RANKS = _codes(RANKS, by_cells=False)


@operation(f32x(int64, int64, int64, f32x, RANKS))
def project_on_int8(b, base, change, n, omega, _levels):
    """:attr:`Codes.project` for int8, whose levels are the 127ths."""

    def step(i: Any, sum_: Any) -> list[Any]:
        at = b.shl(i, ir.Constant(LONG, 2))
        v, moved = emit_load(b, b.add(base, at)), emit_load(b, b.add(change, at))
        t = b.fmul(_within_one(b, emit_fma(b, moved, omega, v)), constant(127.0))
        c = b.fmul(emit_rounded(b, t), constant(1 / 127))
        return [emit_fma(b, b.fsub(c, v), moved, sum_)]

    return loop(b, n, LANES, [constant(0.0)], step)[0]


# --- the errors with many scales --------------------------------------------------------------------------------------


def _errors(b: Any, lanes: int, vectors: int, values: Any, rows: Any, n: Any, table: Any, out: Any) -> Any:
    """At ``out`` the squared error of n values (a multiple of 4) with each of ``lanes · vectors`` scales. ``rows``: int32 a
    value, the row of ``table`` for the cell that it lies in: for each scale the middle between the two levels on either
    side, and half their distance (0 where there is one level alone).
    """
    vector = ir.VectorType(FLOAT, lanes)
    nbytes = 4 * lanes

    def step(i: Any, *sums: Any) -> list[Any]:
        new = []
        for k in range(4):
            at = b.shl(b.add(i, ir.Constant(LONG, k)), ir.Constant(LONG, 2))
            v = emit_fill(b, emit_load(b, b.add(values, at), FLOAT), lanes)
            row = b.add(table, b.zext(emit_load(b, b.add(rows, at), INT), LONG))
            for j in range(vectors):
                middle = emit_load(b, further(b, row, nbytes * j), vector)
                half = emit_load(b, further(b, row, nbytes * (vectors + j)), vector)
                miss = b.fsub(emit_absolute(b, b.fsub(v, middle)), half)
                new.append(emit_fma(b, miss, miss, sums[k * vectors + j]))
        return new

    sums = loop(b, n, 4, [constant(0.0, vector)] * (4 * vectors), step)
    for j in range(vectors):
        one, two, three, four = sums[j::vectors]
        emit_store(b, further(b, out, nbytes * j), b.fadd(b.fadd(one, two), b.fadd(three, four)))
    return NOTHING


errors_of_8 = operation(int32(*[int64] * 5))(lambda b, *args: _errors(b, 8, 1, *args))
errors_of_32 = operation(int32(*[int64] * 5))(lambda b, *args: _errors(b, LANES, 2, *args))


@operation(int64(int64, float32))
def least_of_8(b, address, limit):
    """The number of the least of 8 values, of equal ones the first, if it is below ``limit``; else 8."""
    vector = ir.VectorType(FLOAT, 8)
    values = emit_load(b, address, vector)
    least = values
    for half in (4, 2, 1):
        other = shuffle(b, least, [(lane + half) % 8 for lane in range(8)])
        least = emit_lesser(b, least, other)
    found = b.zext(b.bitcast(b.fcmp_ordered("==", values, least), BYTE), LONG)
    number = b.cttz(found, ir.Constant(ir.IntType(1), 1))
    below = b.fcmp_ordered("<", b.extract_element(least, ir.Constant(INT, 0)), limit)
    return b.select(below, number, ir.Constant(LONG, 8))


def _rows_of(b: Any, x: Any, factor: Any, shift: Any, bits: int) -> Any:
    """The cells of x, ``x · factor + shift`` rounded down, as the offsets of rows of ``1 << bits`` bytes."""
    return b.shl(b.fptosi(emit_fma(b, x, factor, shift), INTS), constant(bits, INTS))


rows_of_64 = operation(i32x(f32x, f32x, f32x))(lambda b, x, factor, shift: _rows_of(b, x, factor, shift, 6))
rows_of_256 = operation(i32x(f32x, f32x, f32x))(lambda b, x, factor, shift: _rows_of(b, x, factor, shift, 8))
