"""The fused kernel for CUDA, in Triton: decode → rotate → scale → absmax → encode → pack for one tile.

A program takes some rows of one block of columns that holds whole rotations and whole 4-bit blocks, so only codes and
statistics touch memory. Int8 needs a row's absmax first, hence two passes, but one pass for the base's own scales. On the
CPU the kernel runs in Triton's interpreter (``TRITON_INTERPRET=1``), which the tests use.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: kinds of storage
FOUR_BIT, INT8, F32, F16, BF16 = range(5)


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
    """The rotated values, (ROWS, B) float32."""
    lanes = tl.arange(0, B)
    total = tl.zeros((ROWS, B), dtype=tl.float32)
    at = matrices if SHARED else matrices + (column // B) * B * B
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
def fold_tile(
    codes, scales, levels, new_codes, new_scales, new_levels, bounds, order, moments, matrices, factors, sums, top, relaxation, rows, features,
    KIND: tl.constexpr, SIZE: tl.constexpr, NEW_KIND: tl.constexpr, NEW_SIZE: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SHARED: tl.constexpr, SCALED: tl.constexpr, NESTED: tl.constexpr, KEEP: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """``sums``: (programs, 4) float64, Σ exact², Σ (stored - exact)², Σ (exact - base)² and Σ (stored - exact) (exact -
    base); ``top``: integer bits of the largest \\|value\\|. ``NEW_SIZE`` is B but for 4-bit.

    Int8's ``new_scales`` are integer bits: a pass with MEASURE writes the rows' absmax there, a pass without reads it.
    With KEEP, ``new_scales`` are the base's own and the change is multiplied by ``relaxation``; ``moments`` gets Σ (exact -
    base)² and the largest \\|exact\\| of each NEW_SIZE values, which show the strong blocks.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * B
    inside = row < rows
    # rows outside are zeros, and stay zeros
    y = _rotated(
        codes, scales, levels, matrices, factors, row, column, features, inside, KIND, SIZE, B, ROWS, STEP, SHARED, SCALED
    )  # fmt: skip
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(inside[:, None], bits, 0)
    tl.atomic_max(top, tl.max(bits))
    flat = row[:, None].to(tl.int64) * features + column + tl.arange(0, B)[None, :]
    base = _decoded(codes, scales, levels, row, flat, inside, KIND, SIZE)
    moved = y - base
    count: tl.constexpr = B // NEW_SIZE
    block = row[:, None].to(tl.int64) * (features // NEW_SIZE) + column // NEW_SIZE + tl.arange(0, count)[None, :]
    largest = tl.max(tl.reshape(bits, (ROWS, count, NEW_SIZE)), axis=2).to(tl.float32, bitcast=True)
    target = y
    if KEEP:
        target = base + moved * relaxation
        square = tl.sum(tl.reshape(moved * moved, (ROWS, count, NEW_SIZE)), axis=2)
        tl.store(moments + 2 * block, square, mask=inside[:, None])
        tl.store(moments + 2 * block + 1, largest, mask=inside[:, None])
    if NEW_KIND == 0:
        s = tl.reshape(y, (ROWS, count, NEW_SIZE))
        if KEEP:
            scale = tl.load(new_scales + block, mask=inside[:, None], other=0.0)
            unit = tl.where(scale != 0, scale, 1.0)
            divisor = tl.broadcast_to(unit[:, :, None], (ROWS, count, NEW_SIZE))
            s = tl.div_rn(s, divisor)
            t = tl.div_rn(tl.reshape(target, (ROWS, count, NEW_SIZE)), divisor)
        else:
            scale = largest
            unit = tl.maximum(scale, tl.full((ROWS, count), 1e-38, tl.float32))  # a bare 1e-38 would be float64
            s = s * tl.div_rn(tl.full((ROWS, count), 1.0, tl.float32), unit)[:, :, None]
            t = s
            tl.store(new_scales + block, scale, mask=inside[:, None])
        index = tl.zeros((ROWS, count, NEW_SIZE), dtype=tl.int32)
        for i in tl.static_range(15):
            index += (t > tl.load(bounds + i)).to(tl.int32)
        c = tl.load(new_levels + index) * tl.div_rn(scale, unit)[:, :, None]
        high, low = tl.split(tl.reshape(tl.load(order + index), (ROWS, B // 2, 2)))
        half = row[:, None].to(tl.int64) * (features // 2) + column // 2 + tl.arange(0, B // 2)[None, :]
        tl.store(new_codes + half, ((high << 4) | low).to(tl.uint8), mask=inside[:, None])
        miss, delta = c - s, tl.reshape(moved, (ROWS, count, NEW_SIZE))
        wide = unit.to(tl.float64)
        norm = tl.sum(tl.sum(s * s, axis=2).to(tl.float64) * wide * wide)
        error = tl.sum(tl.sum(miss * miss, axis=2).to(tl.float64) * wide * wide)
        held = tl.sum(tl.sum(miss * delta, axis=2).to(tl.float64) * wide)
        if NESTED:
            tl.store(moments + 3 * block, tl.sum(c * miss, axis=2), mask=inside[:, None])
            tl.store(moments + 3 * block + 1, tl.sum(c * c, axis=2), mask=inside[:, None])
            tl.store(moments + 3 * block + 2, tl.div_rn(tl.sum(c * delta, axis=2), unit), mask=inside[:, None])
    elif NEW_KIND == 1:
        if MEASURE:
            tl.atomic_max(new_scales + row, tl.max(bits, axis=1), mask=inside)
            norm, error, held = 0.0, 0.0, 0.0
        else:
            scb = tl.load(new_scales + row, mask=inside, other=0).to(tl.float32, bitcast=True)
            factor = tl.where(scb > 0, tl.div_rn(tl.full((ROWS,), 127.0, tl.float32), tl.where(scb > 0, scb, 1.0)), 0.0)
            divisor = tl.broadcast_to(tl.where(scb > 0, scb, 1.0)[:, None], (ROWS, B))
            # where 127/scb overflows, divide first
            s = tl.where((factor < float("inf"))[:, None], target * factor[:, None], tl.div_rn(target, divisor) * 127.0)
            # the sum rounds to even, because no bits are left for a fraction
            whole = tl.where(
                tl.abs(s) < 127.5, (s + 12582912.0) - 12582912.0, tl.where(s > 0, 127.0, tl.where(s < 0, -127.0, 0.0))
            )
            whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
            tl.store(new_codes + flat, whole.to(tl.int8), mask=inside[:, None])
            exact = y.to(tl.float64)
            step = tl.div_rn(scb, tl.full((ROWS,), 127.0, tl.float32)).to(tl.float64)
            miss = whole.to(tl.float64) * step[:, None] - exact
            norm, error, held = tl.sum(exact * exact), tl.sum(miss * miss), tl.sum(miss * moved.to(tl.float64))
    else:
        stored = y.to(new_codes.dtype.element_ty)
        tl.store(new_codes + flat, stored, mask=inside[:, None])
        wide = stored.to(tl.float32)
        tl.atomic_max(top, tl.max(tl.where(inside[:, None], wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)))
        exact = y.to(tl.float64)
        miss = wide.to(tl.float64) - exact
        norm, error, held = tl.sum(exact * exact), tl.sum(miss * miss), tl.sum(miss * moved.to(tl.float64))
    change = moved.to(tl.float64)
    at = sums + 4 * (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    tl.store(at, norm)
    tl.store(at + 1, error)
    tl.store(at + 2, tl.sum(change * change))
    tl.store(at + 3, held)
