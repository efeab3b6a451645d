"""Drive the fused CUDA kernel (:mod:`oftsurgery.weights.kernels.gpu`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.weights import preserve

from . import blockwise, gpu, tiled

#: the largest number of columns of a program
_MAX_BLOCK = 256


def fold(
    encoded: EncodedWeight, into: WeightFormat, matrices: Tensor, scale: Tensor | None, rounding: str
) -> blockwise.FoldedWeight | None:
    """As :func:`oftsurgery.weights.kernels.fold_cpu.fold`, on the weight's own device; also None if scales other than absmax
    must be found.
    """
    f = encoded.format
    kind, new_kind = (getattr(gpu, side.kind.kernel_name(side), None) for side in (f, into))
    rows, features = f.shape
    b = math.lcm(matrices.shape[-1], *(side.blocksize for side in (f, into) if side.blocksize))
    # Triton's tiles are powers of two
    if kind is None or new_kind is None or b > _MAX_BLOCK or b & (b - 1) or features % b:
        return None
    source = f.kind.kernel_operands(encoded)
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
    matrices = rotations.block_diagonal(matrices, b, shared=len(matrices) == 1).contiguous()
    size = into.blocksize or b
    result, new_scales, room = blockwise.allocate(into if own is None else into.single, device)
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
    levels = blockwise.tables(f.codec, device)[0]
    _, new_levels, bounds, order = blockwise.tables(into.codec, device)
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
        statistics = into.kind.statistics(new_scales, into)
        if room is not None:
            more, more_held = blockwise.nested_error(into, new_scales, statistics, room)
            error, held = error + more, held + more_held
        nearest = error
    sums_ = blockwise.Sums(norm, error, nearest, change, held)
    return sums_.folded(into.kind.assemble(into, result, statistics), rounding, omega)


def _steps(encoded: EncodedWeight, into: WeightFormat, matrices: Tensor, scale: Tensor | None) -> int | None:
    """:func:`oftsurgery.weights.preserve.relaxation` of this weight."""
    single = encoded.single()

    def rows_of(start: int, stop: int) -> tuple[Tensor, Tensor]:
        base = codecs.decode(tiled.rows_of(single, start, stop))
        exact = rotations.apply_blocks(base, matrices)
        return base, exact if scale is None else exact.mul_(scale[start:stop].unsqueeze(-1))

    return preserve.relaxation(rows_of, preserve.scales_of(encoded, into), into)


def _any_strong(moments: Tensor, scales: Tensor, into: WeightFormat) -> bool:
    """Whether :func:`oftsurgery.weights.preserve.is_strong` holds for any block; the kernel takes an int8 row in parts."""
    square, most = preserve.limits(into)
    moved, largest = moments.reshape(scales.numel(), -1, 2).unbind(-1)
    strong = moved.sum(-1) > square * into.block * scales.square()
    strong |= largest.amax(-1) > most * scales.abs()
    strong |= (scales < 0) if not into.kind.either_sign else False
    return bool(strong.any())
