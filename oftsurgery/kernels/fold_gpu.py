"""Drive the fused CUDA kernel (:mod:`oftsurgery.kernels.gpu`)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from oftsurgery import codecs, preserve, rotations
from oftsurgery.codecs import EncodedWeight, WeightFormat

from . import blockwise, gpu, tiled

__all__ = ["fold"]

_DENSE = {torch.float32: gpu.F32, torch.float16: gpu.F16, torch.bfloat16: gpu.BF16}
#: columns a program
_MAX_BLOCK = 256


def _kind(f: WeightFormat) -> int | None:
    if f.codec == "dense":
        return _DENSE.get(f.dtype)
    return gpu.INT8 if f.codec == "int8" else gpu.FOUR_BIT


@cache
def _tables(codec: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels by code, sorted levels, bounds between them, codes of the sorted levels."""
    if codec not in ("nf4", "fp4"):
        unused = torch.zeros(16, dtype=torch.float32, device=device)
        return unused, unused, unused, unused.to(torch.int32)
    levels = codecs.levels_of(codec, device)
    bounds, order = codecs.bounds_of(codec, device)
    return levels, levels[order].contiguous(), bounds, order.to(torch.int32)


def fold(
    encoded: EncodedWeight, into: WeightFormat, matrices: Tensor, scale: Tensor | None, rounding: str
) -> tuple[EncodedWeight, blockwise.Cost] | None:
    """As :func:`oftsurgery.kernels.fold_cpu.fold`, on the weight's own device; None too for a weight with strong blocks
    whose others are to be preserved.
    """
    f = encoded.format
    kind, new_kind = _kind(f), _kind(into)
    rows, features = f.shape
    b = math.lcm(matrices.shape[-1], *(side.blocksize for side in (f, into) if side.blocksize))
    # Triton's tiles are powers of two
    if kind is None or new_kind is None or b > _MAX_BLOCK or b & (b - 1) or features % b:
        return None
    source = blockwise.source(encoded)
    if source is None:
        return None
    own = steps = None
    if rounding == "preserve" and preserve.applies(f, into):
        own = preserve.scales_of(encoded, into)
        steps = _steps(encoded, into, own.values, matrices, scale)
    if rounding == "preserve" and steps is None:
        rounding = codecs.rounding_of(into, "grid")
    if rounding not in ("preserve", "nearest"):
        return None
    keep = own is not None and steps is not None
    weight, scales = source
    device = weight.device
    matrices = blockwise.widen(matrices, b).contiguous()
    size = into.blocksize or b
    result, new_scales, moments = blockwise.allocate(replace(into, nested_blocksize=0) if keep else into, device)
    if keep:
        new_scales = own.values.contiguous()
        moments = torch.empty(rows * features // size, 2, dtype=torch.float32, device=device)
    elif new_kind == gpu.INT8:
        new_scales.zero_()  # for the maximum
    factors = matrices if scale is None else scale.to(torch.float32).contiguous()
    tile = 16 if b > 128 else 32
    grid = (-(-rows // tile), features // b)
    sums = torch.zeros(grid[0] * grid[1], 4, dtype=torch.float64, device=device)
    top = torch.zeros(1, dtype=torch.int32, device=device)
    levels = _tables(f.codec, device)[0]
    _, new_levels, bounds, order = _tables(into.codec, device)
    for measure in (True, False) if new_kind == gpu.INT8 and not keep else (False,):
        gpu.fold_tile[grid](
            weight, scales, levels, result, new_scales.view(torch.int32) if new_kind == gpu.INT8 else new_scales, new_levels, bounds, order,
            top if moments is None else moments, matrices, factors, sums, top, preserve.relaxation_of(steps or 0), rows, features,
            KIND=kind, SIZE=max(f.blocksize, 1), NEW_KIND=new_kind, NEW_SIZE=size, B=b, ROWS=tile, STEP=min(b, 32),
            SHARED=matrices.shape[0] == 1, SCALED=scale is not None, NESTED=moments is not None and not keep, KEEP=keep, MEASURE=measure,
        )  # fmt: skip
