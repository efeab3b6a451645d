"""What the drivers of the fused kernels share: a weight's codes and scales, room for the new ones, and the end of
double quantisation.
"""

from __future__ import annotations

import ctypes
import math
import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oftsurgery import codecs
from oftsurgery.codecs import EncodedWeight, WeightFormat

__all__ = ["NOT_FINITE", "Cost", "allocate", "finish", "source", "widen"]

#: bits of infinity: of |value| as integers, from here on not finite
NOT_FINITE = 0x7F800000


class Cost(NamedTuple):
    """What storing a rotated weight cost.

    Attributes:
        error: ``‖stored - exact‖ / ‖exact‖`` (Frobenius).
        nearest: the same with plain rounding.
        rho: ``‖stored - exact‖ / ‖exact - base‖``; None where the rotation changed nothing.
    """

    error: float
    nearest: float | None = None
    rho: float | None = None


def source(encoded: EncodedWeight) -> tuple[Tensor, Tensor] | None:
    """The codes and their scales, contiguous; None where something is missing or does not fit (the reference says
    what).
    """
    f, t = encoded.format, encoded.tensors
    weight = t.get("weight")
    if weight is None:
        return None
    weight = weight.detach()
    if f.codec == "int8":
        scb = t.get("SCB")
        if (
            scb is None
            or weight.dtype != torch.int8
            or tuple(weight.shape) != f.shape
            or scb.numel() != f.shape[0]
            or not weight.is_contiguous()
        ):
            return None
        return weight, scb.detach().reshape(-1).to(torch.float32) / 127.0
    if f.codec == "dense":
        return (
            (weight, weight)
            if weight.dtype == f.dtype and tuple(weight.shape) == f.shape and weight.is_contiguous()
            else None
        )
    packed = weight.contiguous().reshape(-1).view(torch.uint8)
    absmax = codecs._decode_absmax(encoded)
    codecs._check_4bit(encoded, packed, absmax)
    return packed, absmax.contiguous()


def allocate(into: WeightFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for the new codes, their scales, and with double quantisation two moments a block."""
    n = math.prod(into.shape)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        # both named: the caller may have set defaults of their own
        return _large_pages(torch.empty(shape, dtype=dtype, device=device))

    if into.codec == "int8":
        return room(*into.shape, dtype=torch.int8), room(into.shape[0]), None
    if into.codec == "dense":
        return room(*into.shape, dtype=into.dtype), room(0), None
    blocks = -(-n // into.blocksize)
    moments = room(blocks, 2) if into.nested_blocksize else None
    return room(n // 2, 1, dtype=torch.uint8), room(blocks), moments


_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def _large_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages under a tensor of the CPU that is about to be filled: the first touch of each page costs more
    than the fold of what is in it.
    """
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE if tensor.device.type == "cpu" else 0
    length = (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE
    if start and length > 0 and _madvise() is not None:
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # refused, it changes nothing
    return tensor


def _tensors(
    into: WeightFormat, result: Tensor, scales: Tensor, moments: Tensor | None
) -> tuple[dict[str, Tensor], float]:
    """The new weight's tensors, and what double quantisation of the absmax adds to the squared error."""
    if into.codec == "dense":
        return {"weight": result}, 0.0
    if into.codec == "int8":
        return {"weight": result, "SCB": scales}, 0.0
    tensors = {
        "weight": codecs._as_storage(result, into),
        "quant_map": codecs._levels(into.codec, scales.device).clone(),
    }
    tensors |= codecs._encode_absmax(scales, into)
    return tensors, 0.0 if moments is None else nested_error(into, scales, tensors, moments)


def nested_error(into: WeightFormat, scales: Tensor, statistics: dict[str, Tensor], moments: Tensor) -> float:
    """What double quantisation of the absmax ``scales`` adds to the squared error of codes that were chosen without."""
    # stored - exact = A'c - As = A(c - s) + δc, with δ = A' - A; the kernel has summed the first part
    seen = codecs._decode_absmax(EncodedWeight(into, statistics))
    wide = scales.to(torch.float64)
    delta = seen.to(torch.float64).sub_(wide)
    cross, power = moments.unbind(1)
    return float(wide.mul_(cross).mul_(2).addcmul_(delta, power.to(torch.float64)).dot(delta))


def finish(
    into: WeightFormat,
    result: Tensor,
    scales: Tensor,
    moments: Tensor | None,
    norm: float,
    error: float,
    change: float,
) -> tuple[EncodedWeight, Cost]:
    """The new weight and its cost, from the sums of squares of the exact weight, of what storing it changed, and of
    what the rotation did.
    """
    tensors, more = _tensors(into, result, scales, moments)
    return EncodedWeight(into, tensors), _cost(into, norm, error + more, error + more, change)


def _cost(into: WeightFormat, norm: float, error: float, nearest: float, change: float) -> Cost:
    # quantised weights are compared in units of their scale, which rounds itself: below that there is no error to speak
    # of
    least = norm * 2**-44 if into.quantised else 0.0
    error, nearest = (0.0 if e < least else max(0.0, e) for e in (error, nearest))
    rho = math.sqrt(error / change) if change else None
    return Cost(math.sqrt(error / (norm or 1.0)), math.sqrt(nearest / (norm or 1.0)), rho)


def finish_best(
    into: WeightFormat,
    result: Tensor,
    statistics: dict[str, Tensor],
    norm: float,
    error: float,
    nearest: float,
    change: float,
) -> tuple[EncodedWeight, Cost]:
    """As :func:`finish`, for 4-bit weights whose statistics are known; ``nearest``: ``error`` with plain rounding."""
    tensors = {
        "weight": codecs._as_storage(result, into),
        "quant_map": codecs._levels(into.codec, result.device).clone(),
        **statistics,
    }
    return EncodedWeight(into, tensors), _cost(into, norm, error, nearest, change)


def widen(m: Tensor, b: int) -> Tensor:
    """Blocks ``(n, a, a)`` as blocks ``(n·a/b, b, b)`` that hold b/a of them on the diagonal (``(1, b, b)`` for a
    single, shared one).
    """
    n, a, _ = m.shape
    if a == b:
        return m
    each = b // a
    m = m.expand(each, a, a) if n == 1 else m
    wide = m.new_zeros(m.shape[0] // each, each, a, each, a)
    for i in range(each):
        wide[:, i, :, i, :] = m[i::each]
    return wide.reshape(-1, b, b)
