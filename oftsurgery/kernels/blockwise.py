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

__all__ = ["NOT_FINITE", "Cost", "Sums", "allocate", "nested_error", "source", "statistics_of", "tensors_of", "widen"]

#: bits of infinity: of |value| as integers, from here on not finite
NOT_FINITE = 0x7F800000


class Cost(NamedTuple):
    """What storing a rotated weight cost.

    Attributes:
        error: ``‖stored - exact‖ / ‖exact‖`` (Frobenius).
        nearest: the same with plain rounding.
        rho: ``‖stored - exact‖ / ‖exact - base‖``; None where the rotation changed nothing.
        kept: ``⟨stored - base, exact - base⟩ / ‖exact - base‖²``; None where the rotation changed nothing.
        change: ``‖exact - base‖``.
        rounding: how the weight was rounded.
        relaxation: ω of :mod:`oftsurgery.preserve`; 1 where the change was not over-relaxed.
    """

    error: float
    nearest: float | None = None
    rho: float | None = None
    kept: float | None = None
    change: float | None = None
    rounding: str = "nearest"
    relaxation: float = 1.0


class Sums(NamedTuple):
    """What a pass over a weight sums up: ``Σ exact²``, ``Σ (stored - exact)²``, the same with plain rounding (None: not
    measured), ``Σ (exact - base)²`` and ``Σ (stored - exact) (exact - base)``.
    """

    norm: float
    error: float
    nearest: float | None
    change: float
    held: float

    def cost(self, into: WeightFormat, rounding: str, relaxation: float = 1.0) -> Cost:
        """The :class:`Cost` of storing the weight as ``into``."""
        # quantised weights are compared in units of their scale, which rounds itself: below that there is no error to
        # speak of
        least = self.norm * 2**-44 if into.quantised else 0.0
        error, nearest = (None if e is None else 0.0 if e < least else max(0.0, e) for e in (self.error, self.nearest))
        assert error is not None  # noqa: S101 - only plain rounding may be unmeasured
        rho = math.sqrt(error / self.change) if self.change else None
        kept = 1 + self.held / self.change if self.change else None
        if kept is not None and not math.isfinite(kept):
            kept = None
        size = self.norm or 1.0
        plain = None if nearest is None else math.sqrt(nearest / size)
        return Cost(math.sqrt(error / size), plain, rho, kept, math.sqrt(self.change), rounding, relaxation)


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
    absmax = codecs.decode_absmax(encoded)
    codecs.check_4bit(encoded, packed, absmax)
    return packed, absmax.contiguous()


def allocate(into: WeightFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for the new codes, their scales, and with double quantisation three moments a block."""
    n = math.prod(into.shape)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        # both named: the caller may have set defaults of their own
        return _large_pages(torch.empty(shape, dtype=dtype, device=device))

    if into.codec == "int8":
        return room(*into.shape, dtype=torch.int8), room(into.shape[0]), None
    if into.codec == "dense":
        return room(*into.shape, dtype=into.dtype), room(0), None
    blocks = -(-n // into.blocksize)
    moments = room(blocks, 3) if into.nested_blocksize else None
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


def tensors_of(into: WeightFormat, result: Tensor, statistics: dict[str, Tensor]) -> EncodedWeight:
    """The new weight from its codes and statistics."""
    if into.codec in ("dense", "int8"):
        return EncodedWeight(into, {"weight": result, **statistics})
    levels = codecs.levels_of(into.codec, result.device).clone()
    return EncodedWeight(into, {"weight": codecs.as_storage(result, into), "quant_map": levels, **statistics})


def statistics_of(into: WeightFormat, scales: Tensor) -> dict[str, Tensor]:
    """The statistics that hold new scales."""
    if into.codec == "dense":
        return {}
    return {"SCB": scales} if into.codec == "int8" else codecs.encode_absmax(scales, into)


def nested_error(
    into: WeightFormat, scales: Tensor, statistics: dict[str, Tensor], moments: Tensor
) -> tuple[float, float]:
    """What double quantisation of the absmax ``scales`` adds to ``Σ (stored - exact)²`` and to ``Σ (stored - exact)
    (exact - base)`` of codes that were chosen without.
    """
    # stored - exact = A'c - As = A(c - s) + δc, with δ = A' - A; the kernel has summed the first part
    seen = codecs.decode_absmax(EncodedWeight(into, statistics))
    wide = scales.to(torch.float64)
    delta = seen.to(torch.float64).sub_(wide)
    cross, power, along = moments.to(torch.float64).unbind(1)
    kept = float((wide * along).dot(delta))
    return float(wide.mul_(cross).mul_(2).addcmul_(delta, power).dot(delta)), kept


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
