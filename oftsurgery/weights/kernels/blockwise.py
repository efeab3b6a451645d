"""Code that the drivers of the kernels share: the course and the cost of a fold, tables of levels, memory for the new
codes and scales, and the end of double quantisation.
"""

from __future__ import annotations

import ctypes
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.levels import LEVELS, levels_of, sorted_levels
from oftsurgery.weights import preserve

#: bits of infinity: a value is not finite if the integer bits of |value| are not below this
NOT_FINITE = 0x7F800000


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """A folded (or unfolded) weight, and the cost of storing it.

    Attributes:
        encoded: the new weight.
        error: ``‖stored - exact‖ / ‖exact‖`` (Frobenius), where exact is the rotated weight before the storing; 0 for
            float32.
        backend: the backend that computed the weight, a key of :func:`oftsurgery.backends`.
        rounding: the rounding of the weight: ``"nearest"`` if the format does not know the rounding that was asked for.
        nearest: the ``error`` with plain rounding; None if it was not measured.
        rho: ``‖stored - exact‖ / ‖exact - base‖``, where base is the weight before the rotation; None if the rotation
            changed nothing.
        kept: ``⟨stored - base, exact - base⟩ / ‖exact - base‖²``, the part of the change that is kept; None as for rho.
        change: ``‖exact - base‖``; None if it was not measured.
        relaxation: the factor by which the change was over-relaxed before the rounding.
        output_error, output_nearest, output_kept, uncalibrated: as in :class:`~oftsurgery.ModuleRecord`.
    """

    encoded: EncodedWeight
    error: float
    backend: str = "reference"
    rounding: str = "nearest"
    nearest: float | None = None
    rho: float | None = None
    kept: float | None = None
    change: float | None = None
    relaxation: float = 1.0
    output_error: float | None = None
    output_nearest: float | None = None
    output_kept: float | None = None
    uncalibrated: str | None = None

    @property
    def kept_scales(self) -> float | None:
        """The relaxation, if the weight has kept its scales; else None."""
        return self.relaxation if self.rounding == "preserve" else None


@dataclass
class Sums:
    """The sums of a pass over a weight: ``Σ exact²``, ``Σ (stored - exact)²``, the same with plain rounding (None: not
    measured), ``Σ (exact - base)²`` and ``Σ (stored - exact) (exact - base)``.
    """

    norm: float = 0.0
    error: float = 0.0
    nearest: float | None = None
    change: float = 0.0
    held: float = 0.0

    def folded(self, stored: EncodedWeight, rounding: str, relaxation: float = 1.0) -> FoldedWeight:
        """``stored`` with its cost."""
        # quantised weights are compared in units of their scale, which has a rounding error: a smaller error or change counts as 0
        least = self.norm * 2**-44 if stored.format.quantised else 0.0
        change = 0.0 if self.change < least else self.change
        error, nearest = (None if e is None else 0.0 if e < least else max(0.0, e) for e in (self.error, self.nearest))
        assert error is not None  # noqa: S101 - only plain rounding may be unmeasured
        rho = math.sqrt(error / change) if change else None
        kept = 1 + self.held / change if change else None
        if kept is not None and not math.isfinite(kept):
            kept = None
        size = self.norm or 1.0
        return FoldedWeight(
            stored,
            math.sqrt(error / size),
            rounding=rounding,
            nearest=None if nearest is None else math.sqrt(nearest / size),
            rho=rho,
            kept=kept,
            change=math.sqrt(change),
            relaxation=relaxation,
        )


@dataclass(eq=False)
class Fold(ABC):
    """One fold of a weight, by a path that goes over the weight in passes.

    Attributes:
        encoded: the weight.
        into: the format in which the weight is stored.
        finite: whether all values so far are finite.
    """

    encoded: EncodedWeight
    into: WeightFormat
    finite: bool = field(default=True, init=False)

    def run(self, rounding: str) -> FoldedWeight | None:
        """The folded weight; None if NaN or infinity came up."""
        if rounding == "preserve":
            kept = self.keep() if preserve.applies(self.encoded.format, self.into) else None
            if kept is not None or not self.finite:
                return kept
            rounding = codecs.rounding_of(self.into, "grid")
        return self.round(rounding)

    @abstractmethod
    def keep(self) -> FoldedWeight | None:
        """The weight with the base's own scales and an over-relaxed change, see :mod:`oftsurgery.weights.preserve`. None if most
        blocks are strong, or if the base's statistics do not hold the scales that strong blocks need.
        """

    @abstractmethod
    def round(self, rounding: str) -> FoldedWeight | None:
        """The weight with every block scaled by its own values."""


@cache
def tables(codec: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tables of 4-bit codes for kernels: levels by code, sorted levels, bounds between them (the last bound twice), and
    codes of the sorted levels; (16,) each. They are zeros for the other formats.
    """
    if codec not in LEVELS:
        unused = torch.zeros(16, dtype=torch.float32, device=device)
        return unused, unused, unused, unused.to(torch.int32)
    ordered, bounds, codes = sorted_levels(codec, device)
    return levels_of(codec, device), ordered, torch.cat([bounds, bounds[-1:]]), codes.to(torch.int32)


def allocate(into: WeightFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Memory for the new codes, their scales, and with double quantisation three moments per block."""
    layout, kind = into.kind.layout(into.single), into.kind

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        # dtype and device are named, because the caller may have set other defaults
        return _large_pages(torch.empty(shape, dtype=dtype, device=device))

    dtype, shape = layout["weight"]
    _, blocks = layout.get(kind.scales_name, (None, None))
    codes, scales = room(dtype, *(shape or ())), room(torch.float32, *(blocks or (0,)))
    return codes, scales, room(torch.float32, len(scales), 3) if into.nested_blocksize else None


_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def _large_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages under a CPU tensor that is about to be filled: the first touch of a small page costs more than
    the fold of its values.
    """
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE if tensor.device.type == "cpu" else 0
    length = (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE
    if start and length > 0 and _madvise() is not None:
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # a refusal changes nothing
    return tensor


@cache
def dynamic_steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """What each code of double quantisation stands for, (256,), and the float32 values from which on the code is higher, (255,):
    read off bitsandbytes' own function on ``device``. Whatever the function does, as long as its codes grow with the values,
    the steps do the same. The functions of two devices differ.
    """
    from bitsandbytes.functional import quantize_blockwise

    # in the order of the values: the bits of positive numbers, below them those of negative ones
    low, high = (np.full(255, np.float32(x).view(np.int32).astype(np.int64)) for x in (1.0, 1.0))
    low = -low
    wanted = np.arange(1, 256)
    while (high - low).max() > 1:
        middle = (low + high) // 2
        given = np.append(_of_order(middle), np.float32(1.0))  # the last is the block's largest
        codes, state = quantize_blockwise(torch.from_numpy(given).to(device), blocksize=256)
        reached = codes.cpu().numpy()[:255] >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    values = state.code.detach().to(device=device, dtype=torch.float32)
    return values, torch.from_numpy(_of_order(high)).to(device)


def _of_order(order: np.ndarray) -> np.ndarray:
    """Float32 values by their order: 0 is zero, 1 the smallest positive value, -1 the smallest negative value."""
    bits = np.where(order >= 0, order, -order | (1 << 31)).astype(np.uint32)
    return bits.view(np.float32)


def nested_error(
    into: WeightFormat, scales: Tensor, statistics: dict[str, Tensor], moments: Tensor
) -> tuple[float, float]:
    """The amounts that double quantisation of the absmax ``scales`` adds to ``Σ (stored - exact)²`` and to ``Σ (stored -
    exact) (exact - base)``, for codes that were chosen before.
    """
    # stored - exact = A'c - As = A(c - s) + δc, with δ = A' - A; the kernel has summed the first part
    seen = EncodedWeight(into, statistics).scales
    wide = scales.to(torch.float64)
    delta = seen.to(torch.float64).sub_(wide)
    cross, power, along = moments.to(torch.float64).unbind(1)
    kept = float((wide * along).dot(delta))
    return float(wide.mul_(cross).mul_(2).addcmul_(delta, power).dot(delta)), kept
