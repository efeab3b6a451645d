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
    """As :func:`oftsurgery.kernels.fold_cpu.fold`, on the weight's own device; None too where scales other than absmax
    are to be found.
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
    own, omega = None, 1.0
    if rounding == "preserve":
        steps = _steps(encoded, into, matrices, scale) if preserve.applies(f, into) else None
        if steps is None:
            rounding = codecs.rounding_of(into, "grid")
        else:
            own, omega = preserve.scales_of(encoded, into), preserve.relaxation_of(steps)
    if own is None and rounding != "nearest":
        return None
    weight, scales = source
    device = weight.device
    matrices = blockwise.widen(matrices, b).contiguous()
    size = into.blocksize or b
    result, new_scales, room = blockwise.allocate(into if own is None else replace(into, nested_blocksize=0), device)
    top = torch.zeros(1, dtype=torch.int32, device=device)
    moments = top if room is None else room
    if own is not None:
        new_scales = own.values.contiguous()
        moments = torch.empty(rows * features // size, 2, dtype=torch.float32, device=device)
    elif new_kind == gpu.INT8:
        new_scales.zero_()  # the pass that measures takes the maximum
    bits = new_scales.view(torch.int32) if new_kind == gpu.INT8 else new_scales
    factors = matrices if scale is None else scale.to(torch.float32).contiguous()
    tile = 16 if b > 128 else 32
    grid = (-(-rows // tile), features // b)
    sums = torch.zeros(grid[0] * grid[1], 4, dtype=torch.float64, device=device)
    levels = _tables(f.codec, device)[0]
    _, new_levels, bounds, order = _tables(into.codec, device)
    for measure in (True, False) if new_kind == gpu.INT8 and own is None else (False,):
        gpu.fold_tile[grid](
            weight, scales, levels, result, bits, new_levels, bounds, order, moments, matrices, factors, sums, top, omega, rows, features,
            KIND=kind, SIZE=max(f.blocksize, 1), NEW_KIND=new_kind, NEW_SIZE=size, B=b, ROWS=tile, STEP=min(b, 32),
            SHARED=matrices.shape[0] == 1, SCALED=scale is not None, NESTED=room is not None, KEEP=own is not None, MEASURE=measure,
        )  # fmt: skip
    norm, error, change, held = sums.sum(0).tolist()
    if int(top) >= blockwise.NOT_FINITE:
        return None
    nearest: float | None = None
    if own is not None:
        if _any_strong(moments, own.values, into):
            return None
        stated = own.values if own.codes is None else own.codes
        statistics = preserve.put_scales(own, into, stated.detach().clone())
    else:
        statistics = blockwise.statistics_of(into, new_scales)
        if room is not None:
            more, more_held = blockwise.nested_error(into, new_scales, statistics, room)
            error, held = error + more, held + more_held
        nearest = error
    sums_ = blockwise.Sums(norm, error, nearest, change, held)
    return blockwise.tensors_of(into, result, statistics), sums_.cost(into, rounding, omega)


def _steps(encoded: EncodedWeight, into: WeightFormat, matrices: Tensor, scale: Tensor | None) -> int | None:
    """:func:`oftsurgery.preserve.relaxation` of this weight."""
    rows, features = into.shape
    own, single = preserve.scales_of(encoded, into).values, tiled._single(encoded)
    parts = []
    for start, stop in preserve.sample_of(rows, features, preserve.whole_rows(into)):
        base = codecs.decode(tiled._rows(single, start, stop))
        exact = rotations.apply_blocks(base, matrices)
        if scale is not None:
            exact *= scale[start:stop].unsqueeze(-1)
        parts.append((base, exact, own[tiled._slice(start, stop, features, into.blocksize or features)]))
    return preserve.relaxation(parts, into)


def _any_strong(moments: Tensor, scales: Tensor, into: WeightFormat) -> bool:
    """Whether :func:`oftsurgery.preserve.is_strong` holds of any block; the kernel takes an int8 row in parts."""
    square, most = preserve.limits(into.codec)
    moved, largest = moments.reshape(scales.numel(), -1, 2).unbind(-1)
    strong = moved.sum(-1) > square * (into.blocksize or into.shape[1]) * scales.square()
    strong |= (largest.amax(-1) > most * scales.abs()) | ((scales < 0) if into.codec == "int8" else False)
    return bool(strong.any())
