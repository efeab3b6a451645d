"""The fused kernels for CUDA, in Triton: decode → rotate → scale → round → pack for one tile.

A program takes some rows of one block of columns that holds whole rotations and whole 4-bit blocks, so only codes and
statistics touch memory. Int8 needs a row's absmax first, hence two passes, but one pass for the base's own scales. On the
CPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which the tests use; a test also compiles the kernels
for GPUs, which needs no GPU.

No product is fused with a sum, except in the rotation (``enable_fp_fusion=False`` at each launch): a fused product has no
rounding of its own, and codes would then differ from the reference's.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: kinds of storage
FOUR_BIT, INT8, F32, F16, BF16 = range(5)
#: what :func:`fold_four_bit` does: round with the absmax; round with better scales; keep given scales except those of strong
#: blocks
NEAREST, GRID, KEEP = range(3)
#: columns of ``sums``, one row a program; the last two are a largest value, not a sum
SUMS = ("norm", "error", "nearest", "change", "held", "top", "misfits")
COLUMNS = 8


@triton.jit
def _decoded(codes, scales, levels, row, flat, inside, KIND: tl.constexpr, SIZE: tl.constexpr):
    """The old weights at flat indices ``flat`` of rows ``row``; 0 outside."""
    if KIND == 0:
        octet = tl.load(codes + flat // 2, mask=inside[:, None], other=0).to(tl.int32)
        code = tl.where(flat % 2 == 0, octet >> 4, octet & 15)
        x = tl.load(levels + code) * tl.load(scales + flat // SIZE, mask=inside[:, None], other=0.0)
    elif KIND == 1:
        x = (
            tl.load(codes + flat, mask=inside[:, None], other=0).to(tl.float32)
            * tl.load(scales + row, mask=inside, other=0.0)[:, None]
        )
    else:
        x = tl.load(codes + flat, mask=inside[:, None], other=0.0).to(tl.float32)
    return x


@triton.jit
def _rotated(
    codes, scales, levels, matrices, factors, row, column, features, inside,
    KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The rotated values, (ROWS, B) float32; rows outside are zeros."""
    lanes = tl.arange(0, B)
    total = tl.zeros((ROWS, B), dtype=tl.float32)
    at = matrices if SHARED else matrices + (column // B).to(tl.int64) * B * B
    for k in range(0, B, STEP):
        steps = k + tl.arange(0, STEP)
        flat = row[:, None].to(tl.int64) * features + column + steps[None, :]
        x = _decoded(codes, scales, levels, row, flat, inside, KIND, SIZE)
        m = tl.load(at + steps[:, None] * B + lanes[None, :])
        total = tl.dot(x, m, total, input_precision="ieee")
    if SCALED:
        total = total * tl.load(factors + row, mask=inside, other=0.0)[:, None]
    return total


@triton.jit
def _bits(x):
    """The integer bits of \\|x\\|, which grow with \\|x\\|; those of NaN are the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quotient(x, y):
    """x / y, rounded once, for y of fewer dimensions."""
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def _reciprocal(y):
    return tl.div_rn(tl.full(y.shape, 1.0, tl.float32), y)


@triton.jit
def _level(t, levels, bounds):
    """The levels that are nearest to ``t``."""
    found = tl.zeros_like(t) + tl.load(levels)
    for i in tl.static_range(15):
        found = tl.where(t > tl.load(bounds + i), tl.load(levels + i + 1), found)
    return found


@triton.jit
def _rank(t, bounds):
    """The numbers of the levels that are nearest to ``t``."""
    found = tl.zeros(t.shape, dtype=tl.int32)
    for i in tl.static_range(15):
        found += (t > tl.load(bounds + i)).to(tl.int32)
    return found


@triton.jit
def _in_units(x, scale):
    """x: (rows, blocks, size) in units of the blocks' scales; 0 where the scale is 0."""
    unit = tl.where(scale != 0, scale, 1.0)
    tiny = tl.abs(unit) < tl.full(unit.shape, 1e-38, tl.float32)
    t = x * _reciprocal(tl.where(tiny, 1.0, unit))[:, :, None]
    if tl.max(tiny.to(tl.int32)) > 0:  # 1/unit may overflow
        t = tl.where(tiny[:, :, None], _quotient(x, unit[:, :, None]), t)
    return tl.where((scale != 0)[:, :, None], t, 0.0)


@triton.jit
def _grid_scales(w, largest, levels, bounds, ratios, RATIOS: tl.constexpr):
    """:func:`oftsurgery.formats.scales.grid_scales` of blocks w: (rows, blocks, size) with absmax ``largest``."""
    x = _in_units(w, largest)
    usable = largest < 3.4028234663852886e38 / 1.35
    best = tl.zeros(largest.shape, dtype=tl.float32)
    least = tl.full(largest.shape, float("inf"), tl.float32)
    for j in range(RATIOS):  # the first is 1, so that the absmax wins a tie
        ratio = tl.load(ratios + j)
        c = _level(tl.div_rn(x, tl.zeros_like(x) + ratio), levels, bounds)
        miss = c * ratio - x
        error, power, cross = tl.sum(miss * miss, axis=2), tl.sum(c * c, axis=2), tl.sum(c * x, axis=2)
        better = (error < least) & (usable | (j == 0))
        best = tl.where(better, tl.div_rn(cross, tl.where(power > 0, power, 1.0)), best)
        least = tl.where(better, error, least)
    return tl.where(largest > 0, tl.minimum(best * largest, 3.4028234663852886e38), 0.0)


@triton.jit
def _held_scales(wanted, block, inside, levels, middles, order, factors, offset, size):
    """The scales nearest to ``wanted`` that the base's double quantisation can hold, and the codes of the scales."""
    more = tl.load(offset)
    factor = tl.load(factors + block // size, mask=inside, other=0.0)
    scaled = tl.where(factor != 0, tl.div_rn(wanted - more, tl.where(factor != 0, factor, 1.0)), 0.0)
    index = tl.zeros(wanted.shape, dtype=tl.int32)
    step = 128
    for _ in tl.static_range(8):
        index = tl.where(scaled > tl.load(middles + index + step - 1), index + step, index)
        step = step // 2
    return tl.load(levels + index) * factor + more, tl.load(order + index)


@triton.jit
def _put_sums(sums, norm, error, nearest, moved, held, top, misfits):
    change = moved.to(tl.float64)
    at = sums + 8 * (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    tl.store(at, norm)
    tl.store(at + 1, error)
    tl.store(at + 2, nearest)
    tl.store(at + 3, tl.sum(change * change))
    tl.store(at + 4, held)
    tl.store(at + 5, top)
    tl.store(at + 6, misfits)


@triton.jit
def fold_four_bit(
    codes, scales, levels, matrices, factors, new_codes, new_scales, new_levels, bounds, order, ratios, given, moments, plain_moments,
    held_levels, held_middles, held_order, held_factors, held_codes, offset, sums, omega, square, clip, misfit, held_size, rows, features,
    KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr,
    NEW_SIZE: tl.constexpr, MODE: tl.constexpr, RATIOS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """``new_scales`` gets the scales, with KEEP those of strong blocks alone, and ``given`` has the base's own.

    With NESTED, NEAREST and GRID leave Σ c(c - s), Σ c² and Σ c(s - v) of each block's levels c and its weights before (v)
    and after the rotation (s), in units of the scale, in ``moments``. GRID leaves the first two of plain rounding in
    ``plain_moments``, and the absmax in ``given``. KEEP leaves the codes of the strong blocks' scales in ``held_codes``.

    With KEEP, the change is multiplied by ``omega``. A block is strong, see :func:`oftsurgery.weights.preserve.is_strong`, if
    its sum of squares exceeds ``square`` or its largest value ``clip``.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * B
    inside = row < rows
    y = _rotated(
        codes, scales, levels, matrices, factors, row, column, features, inside, KIND, SIZE, B, ROWS, STEP, SHARED, SCALED
    )  # fmt: skip
    bits = tl.where(inside[:, None], _bits(y), 0)
    flat = row[:, None].to(tl.int64) * features + column + tl.arange(0, B)[None, :]
    base = _decoded(codes, scales, levels, row, flat, inside, KIND, SIZE)
    moved = y - base
    count: tl.constexpr = B // NEW_SIZE
    here = inside[:, None]
    block = row[:, None].to(tl.int64) * (features // NEW_SIZE) + column // NEW_SIZE + tl.arange(0, count)[None, :]
    largest = tl.max(tl.reshape(bits, (ROWS, count, NEW_SIZE)), axis=2).to(tl.float32, bitcast=True)
    w, delta = tl.reshape(y, (ROWS, count, NEW_SIZE)), tl.reshape(moved, (ROWS, count, NEW_SIZE))
    plain_unit = tl.maximum(largest, tl.full((ROWS, count), 1e-38, tl.float32))  # a bare 1e-38 would be float64
    nearest = 0.0
    misfits = 0
    if MODE == 0:  # NEAREST
        scale, t = largest, w * _reciprocal(plain_unit)[:, :, None]
        tl.store(new_scales + block, scale, mask=here)
    elif MODE == 1:  # GRID
        s = w * _reciprocal(plain_unit)[:, :, None]
        level = _level(s, new_levels, bounds)
        miss = level * tl.div_rn(largest, plain_unit)[:, :, None] - s
        wide = plain_unit.to(tl.float64)
        nearest = tl.sum(tl.sum(miss * miss, axis=2).to(tl.float64) * wide * wide)
        if NESTED:
            tl.store(given + block, largest, mask=here)
            tl.store(plain_moments + 3 * block, tl.sum(level * miss, axis=2), mask=here)
            tl.store(plain_moments + 3 * block + 1, tl.sum(level * level, axis=2), mask=here)
        scale = _grid_scales(w, largest, new_levels, bounds, ratios, RATIOS)
        t = _in_units(w, scale)
        tl.store(new_scales + block, scale, mask=here)
    else:
        own = tl.load(given + block, mask=here, other=0.0)
        own_unit = tl.maximum(tl.abs(own), tl.full((ROWS, count), 1e-38, tl.float32))
        d = _quotient(delta, own_unit[:, :, None])
        strong = (tl.sum(d * d, axis=2) > square) | (largest > clip * tl.abs(own))
        scale = own
        clipped = tl.zeros((ROWS, count), dtype=tl.int32)
        if tl.max(strong.to(tl.int32)) > 0:
            seen = _grid_scales(w, largest, new_levels, bounds, ratios, RATIOS)
            if NESTED:
                wanted = seen
                seen, code = _held_scales(
                    wanted, block, here, held_levels, held_middles, held_order, held_factors, offset, held_size
                )  # fmt: skip
                usual = tl.maximum(tl.abs(seen), tl.load(offset))
                clipped = (strong & (tl.minimum(wanted, largest) - tl.abs(seen) > misfit * usual)).to(tl.int32)
                tl.store(held_codes + block, code.to(tl.uint8), mask=here & strong)
            tl.store(new_scales + block, seen, mask=here & strong)
            scale = tl.where(strong, seen, own)
        misfits = tl.max(clipped)
        target = tl.where(strong[:, :, None], w, tl.reshape(base, (ROWS, count, NEW_SIZE)) + delta * omega)
        t = _in_units(target, scale)
    index = _rank(t, bounds)
    high, low = tl.split(tl.reshape(tl.load(order + index), (ROWS, B // 2, 2)))
    half = row[:, None].to(tl.int64) * (features // 2) + column // 2 + tl.arange(0, B // 2)[None, :]
    tl.store(new_codes + half, ((high << 4) | low).to(tl.uint8), mask=here)
    # the cost, in units in which no square overflows
    unit = tl.maximum(tl.abs(scale), plain_unit)
    c = tl.load(new_levels + index)
    s = w * _reciprocal(unit)[:, :, None]
    miss = c * tl.div_rn(scale, unit)[:, :, None] - s
    wide = unit.to(tl.float64)
    norm = tl.sum(tl.sum(s * s, axis=2).to(tl.float64) * wide * wide)
    error = tl.sum(tl.sum(miss * miss, axis=2).to(tl.float64) * wide * wide)
    held = tl.sum(tl.sum(miss * delta, axis=2).to(tl.float64) * wide)
    if NESTED and MODE != 2:
        divisor = tl.where(scale != 0, scale, 1.0)
        tl.store(moments + 3 * block, tl.sum(c * miss, axis=2) * tl.div_rn(unit, divisor), mask=here)
        tl.store(moments + 3 * block + 1, tl.sum(c * c, axis=2), mask=here)
        tl.store(moments + 3 * block + 2, tl.div_rn(tl.sum(c * delta, axis=2), divisor), mask=here)
    _put_sums(sums, norm, error, nearest, moved, held, tl.max(bits), misfits)


@triton.jit
def fold_rows(
    codes, scales, levels, matrices, factors, new_codes, new_scales, omegas, moments, sums, rows, features,
    KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr,
    NEW_KIND: tl.constexpr, KEEP: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """Int8 and plain formats. Int8's ``new_scales`` are integer bits: a pass with MEASURE writes the rows' absmax there, a
    pass without MEASURE reads the bits.

    With KEEP, each row's change is multiplied by the row's ``omegas``; ``moments`` gets Σ (exact - base)², in units of the
    scale, and the largest \\|exact\\| of each row's B values, which show the strong rows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * B
    inside = row < rows
    y = _rotated(
        codes, scales, levels, matrices, factors, row, column, features, inside, KIND, SIZE, B, ROWS, STEP, SHARED, SCALED
    )  # fmt: skip
    bits = tl.where(inside[:, None], _bits(y), 0)
    if MEASURE:
        tl.atomic_max(new_scales + row, tl.max(bits, axis=1), mask=inside)
        return
    top = tl.max(bits)
    flat = row[:, None].to(tl.int64) * features + column + tl.arange(0, B)[None, :]
    base = _decoded(codes, scales, levels, row, flat, inside, KIND, SIZE)
    moved = y - base
    exact = y.to(tl.float64)
    if NEW_KIND == 1:
        scb = tl.load(new_scales + row, mask=inside, other=0).to(tl.float32, bitcast=True)
        unit = tl.where(scb > 0, scb, 1.0)
        target = y
        if KEEP:
            target = base + moved * tl.load(omegas + row, mask=inside, other=0.0)[:, None]
            d = _quotient(moved, tl.maximum(tl.abs(scb), tl.full((ROWS,), 1e-38, tl.float32))[:, None])
            at = moments + 2 * (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))
            tl.store(at, tl.sum(d * d, axis=1), mask=inside)
            tl.store(at + 1, tl.max(bits, axis=1).to(tl.float32, bitcast=True), mask=inside)
        # torch divides a number by a tensor as the tensor's reciprocal times the number
        factor = tl.where(scb > 0, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), unit) * 127.0, 0.0)
        s = target * tl.where(factor < float("inf"), factor, 1.0)[:, None]
        if tl.max((factor == float("inf")).to(tl.int32)) > 0:  # 127/scb overflows: divide first
            s = tl.where((factor < float("inf"))[:, None], s, _quotient(target, unit[:, None]) * 127.0)
        # the sum rounds to even, because no bits are left for a fraction
        whole = tl.where(
            tl.abs(s) < 127.5, (s + 12582912.0) - 12582912.0, tl.where(s > 0, 127.0, tl.where(s < 0, -127.0, 0.0))
        )
        whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
        tl.store(new_codes + flat, whole.to(tl.int8), mask=inside[:, None])
        step = tl.div_rn(scb, tl.full((ROWS,), 127.0, tl.float32)).to(tl.float64)
        miss = whole.to(tl.float64) * step[:, None] - exact
    else:
        stored = y.to(new_codes.dtype.element_ty)
        tl.store(new_codes + flat, stored, mask=inside[:, None])
        wide = stored.to(tl.float32)
        top = tl.maximum(top, tl.max(tl.where(inside[:, None], _bits(wide), 0)))
        miss = wide.to(tl.float64) - exact
    _put_sums(
        sums, tl.sum(exact * exact), tl.sum(miss * miss), 0.0, moved, tl.sum(miss * moved.to(tl.float64)), top, 0
    )  # fmt: skip


@triton.jit
def quantise_scales(scales, offset, values, steps, codes, factors, moments, sums, count, SIZE: tl.constexpr):
    """Double quantisation of ``count`` scales, SIZE a program, less ``offset``.

    Args:
        values: what each code stands for, (256,).
        steps: the values from which on the code is higher, (255,).
        sums: (programs, 3) float64: what the scales that a reader will see add to Σ (stored - exact)² and to Σ (stored - exact)
            (exact - base), see :func:`.blockwise.nested_error`; and 1 where a reciprocal overflows.
    """
    block = tl.program_id(0)
    at = block * SIZE + tl.arange(0, SIZE)
    inside = at < count
    more = tl.load(offset)
    scale = tl.load(scales + at, mask=inside, other=0.0)
    centred = tl.where(inside, scale - more, 0.0)
    top = tl.max(tl.abs(centred))
    factor = tl.div_rn(1.0, tl.where(top > 0, top, 1.0))
    value = centred * factor
    index = tl.zeros((SIZE,), dtype=tl.int32)
    step = 128
    for _ in tl.static_range(8):
        index = tl.where(value >= tl.load(steps + index + step - 1), index + step, index)
        step = step // 2
    index = tl.where(top > 0, index, 0)
    given = tl.load(values + index) * top + more
    tl.store(codes + at, index.to(tl.uint8), mask=inside)
    tl.store(factors + block, top)
    cross = tl.load(moments + 3 * at, mask=inside, other=0.0).to(tl.float64)
    power = tl.load(moments + 3 * at + 1, mask=inside, other=0.0).to(tl.float64)
    along = tl.load(moments + 3 * at + 2, mask=inside, other=0.0).to(tl.float64)
    wide = scale.to(tl.float64)
    change = tl.where(inside, given.to(tl.float64) - wide, 0.0)
    tl.store(sums + 3 * block, tl.sum(change * (2 * wide * cross + change * power)))
    tl.store(sums + 3 * block + 1, tl.sum(change * wide * along))
    tl.store(sums + 3 * block + 2, tl.where(factor < float("inf"), 0.0, 1.0))


@triton.jit
def sweep(
    points, stored, scales, matrix, levels, bounds, chosen, columns, rows, COUNT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Round the columns at ``points`` one after the other, ROWS rows a program: :func:`oftsurgery.weights.sweep.sweep`.

    Args:
        points, stored, scales, chosen: ``(columns, rows)``; the points become the changes of the columns.
        matrix: ``(columns, columns)``.
        levels, bounds: ``(COUNT,)`` and ``(COUNT - 1,)``; 255 levels are those of int8.
        COLUMNS: a power of two, at least ``columns``.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    inside = row < rows
    at = lane[:, None].to(tl.int64) * rows + row[None, :]
    here = (lane < columns)[:, None] & inside[None, :]
    held = tl.load(points + at, mask=here, other=0.0)
    for i in range(COLUMNS):
        own, present = i * rows + row, inside & (i < columns)
        point = tl.sum(tl.where((lane == i)[:, None], held, 0.0), axis=0)
        scale = tl.load(scales + own, mask=present, other=0.0)
        t = tl.where(scale != 0, tl.div_rn(point, tl.where(scale != 0, scale, 1.0)), 0.0)
        if COUNT == 255:
            t = tl.minimum(tl.maximum(t * 127.0, -127.0), 127.0)
            whole = (t + 12582912.0) - 12582912.0  # rounds to even, because no bits are left for a fraction
            level = tl.div_rn(whole, tl.full((ROWS,), 127.0, tl.float32))
            number = (whole + 127.0).to(tl.int32)
        else:
            number = tl.zeros((ROWS,), dtype=tl.int32)
            for k in tl.static_range(COUNT - 1):
                number += (t > tl.load(bounds + k)).to(tl.int32)
            level = tl.load(levels + number)
        change = level * scale - tl.load(stored + own, mask=present, other=0.0)
        tl.store(chosen + own, number, mask=present)
        tl.store(points + own, change, mask=present)
        later = tl.load(matrix + i * columns + lane, mask=(lane > i) & (lane < columns), other=0.0)
        held = tl.fma(later[:, None] + tl.zeros_like(held), change[None, :] + tl.zeros_like(held), held)
