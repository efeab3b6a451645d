"""The fused kernel for CUDA, in Triton: decode → rotate → scale → absmax → encode → pack for one tile.

A program takes some rows of one block of columns that holds whole rotations and whole 4-bit blocks, so only codes and
statistics touch memory. Int8 needs a row's absmax first, hence two passes. On the CPU it runs in Triton's interpreter
(``TRITON_INTERPRET=1``), which tests it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BF16", "F16", "F32", "FOUR_BIT", "INT8", "fold_tile"]

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
    """(ROWS, B) float32."""
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
    codes, scales, levels, new_codes, new_scales, new_levels, bounds, order, moments, matrices, factors, sums, top, rows, features,
    KIND: tl.constexpr, SIZE: tl.constexpr, NEW_KIND: tl.constexpr, NEW_SIZE: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SHARED: tl.constexpr, SCALED: tl.constexpr, NESTED: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """``sums``: (programs, 3) float64, Σ exact², Σ (stored - exact)² and Σ (exact - base)²; ``top``: integer bits of the
    largest \\|value\\|.

    Int8: with MEASURE the rows' absmax goes to ``new_scales`` as integer bits; without, they are there.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * B
    inside = row < rows
    y = _rotated(
        codes, scales, levels, matrices, factors, row, column, features, inside, KIND, SIZE, B, ROWS, STEP, SHARED, SCALED
    )  # fmt: skip
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(inside[:, None], bits, 0)
    tl.atomic_max(top, tl.max(bits))
    flat = row[:, None].to(tl.int64) * features + column + tl.arange(0, B)[None, :]
    base = _decoded(codes, scales, levels, row, flat, inside, KIND, SIZE)
    moved = tl.where(inside[:, None], y - base, 0.0).to(tl.float64)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if NEW_KIND == 0:
        count: tl.constexpr = B // NEW_SIZE
        absmax = tl.max(tl.reshape(bits, (ROWS, count, NEW_SIZE)), axis=2).to(tl.float32, bitcast=True)
        bounded = tl.maximum(absmax, tl.full((ROWS, count), 1e-38, tl.float32))  # a bare 1e-38 would be float64
        factor = tl.div_rn(tl.full((ROWS, count), 1.0, tl.float32), bounded)
        s = tl.reshape(y, (ROWS, count, NEW_SIZE)) * factor[:, :, None]
        index = tl.zeros((ROWS, count, NEW_SIZE), dtype=tl.int32)
        for i in tl.static_range(15):
            index += (s > tl.load(bounds + i)).to(tl.int32)
        c = tl.load(new_levels + index) * tl.div_rn(absmax, bounded)[:, :, None]
        c = tl.where(inside[:, None, None], c, 0.0)
        s = tl.where(inside[:, None, None], s, 0.0)
        high, low = tl.split(tl.reshape(tl.load(order + index), (ROWS, B // 2, 2)))
        half = row[:, None].to(tl.int64) * (features // 2) + column // 2 + tl.arange(0, B // 2)[None, :]
        tl.store(new_codes + half, ((high << 4) | low).to(tl.uint8), mask=inside[:, None])
        block = row[:, None].to(tl.int64) * (features // NEW_SIZE) + column // NEW_SIZE + tl.arange(0, count)[None, :]
        tl.store(new_scales + block, absmax, mask=inside[:, None])
        weight = bounded.to(tl.float64) * bounded.to(tl.float64)
        miss = c - s
        norm = tl.sum(tl.sum(s * s, axis=2).to(tl.float64) * weight)
        error = tl.sum(tl.sum(miss * miss, axis=2).to(tl.float64) * weight)
        if NESTED:
            tl.store(moments + 2 * block, tl.sum(c * miss, axis=2), mask=inside[:, None])
            tl.store(moments + 2 * block + 1, tl.sum(c * c, axis=2), mask=inside[:, None])
    elif NEW_KIND == 1:
        if MEASURE:
            tl.atomic_max(new_scales + row, tl.max(bits, axis=1), mask=inside)
            norm, error = 0.0, 0.0
        else:
            scb = tl.load(new_scales + row, mask=inside, other=0).to(tl.float32, bitcast=True)
            factor = tl.where(scb > 0, tl.div_rn(tl.full((ROWS,), 127.0, tl.float32), tl.where(scb > 0, scb, 1.0)), 0.0)
            divisor = tl.broadcast_to(tl.where(scb > 0, scb, 1.0)[:, None], (ROWS, B))
            # where 127/scb overflows, divide first
            s = tl.where((factor < float("inf"))[:, None], y * factor[:, None], tl.div_rn(y, divisor) * 127.0)
            # rounds to even: there are no bits left for a fraction
            whole = tl.where(
                tl.abs(s) < 127.5, (s + 12582912.0) - 12582912.0, tl.where(s > 0, 127.0, tl.where(s < 0, -127.0, 0.0))
            )
            whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
            tl.store(new_codes + flat, whole.to(tl.int8), mask=inside[:, None])
            exact = tl.where(inside[:, None], y, 0.0).to(tl.float64)
            miss = (
                whole.to(tl.float64) * tl.div_rn(scb, tl.full((ROWS,), 127.0, tl.float32)).to(tl.float64)[:, None]
                - exact
            )
            norm, error = tl.sum(exact * exact), tl.sum(tl.where(inside[:, None], miss * miss, 0.0))
    else:
        stored = y.to(new_codes.dtype.element_ty)
        tl.store(new_codes + flat, stored, mask=inside[:, None])
        wide = stored.to(tl.float32)
        tl.atomic_max(top, tl.max(tl.where(inside[:, None], wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)))
        exact = tl.where(inside[:, None], y, 0.0).to(tl.float64)
        miss = tl.where(inside[:, None], wide, 0.0).to(tl.float64) - exact
        norm, error = tl.sum(exact * exact), tl.sum(miss * miss)
    tl.store(sums + 3 * program, norm)
    tl.store(sums + 3 * program + 1, error)
    tl.store(sums + 3 * program + 2, tl.sum(moved * moved))
