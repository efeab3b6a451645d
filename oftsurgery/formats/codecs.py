"""These pure functions of tensors serve every storage format; the code of one format alone is in the format's class.

``decode`` gives the exact float32 weight that the stored tensors stand for, not rounded to a compute dtype. ``encode``
gives the same tensors as bitsandbytes' own quantiser, or with ``rounding="mse"`` the weight of least error that the
4-bit format can hold. Tensor names are local: in a checkpoint they follow ``<module>.`` or ``<module>.weight.``, and
only the planner knows module paths. These functions are the readable reference, where correctness comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from oftsurgery.errors import NonFiniteError, ShapeError, StateError, printable

from .encoded_weight import EncodedWeight, WeightFormat

#: how quantised weights are rounded: ``preserve`` keeps the rotation's change, ``nearest`` rounds as bitsandbytes does,
#: ``grid`` and ``mse`` look for a scale of each 4-bit block with less or the least error
Rounding = Literal["preserve", "nearest", "grid", "mse"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that each element of a quantised weight can take, for given statistics.

    Attributes:
        levels: ascending, ``(16,)`` or ``(255,)`` float32 in [-1, 1].
        bounds: the bounds between neighbouring levels.
        scales: the factors of the levels, one per block of the flat weight, float32.
        blocksize: elements per block.
    """

    levels: Tensor
    bounds: Tensor
    scales: Tensor
    blocksize: int

    def nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        """The numbers, int32, of the levels that are nearest to ``values``, each value with its own ``scale``."""
        return torch.bucketize(torch.where(scale != 0, values / scale, 0.0), self.bounds, out_int32=True)


def dense(weight: Tensor) -> EncodedWeight:
    """A plain tensor as an :class:`EncodedWeight`."""
    return EncodedWeight(WeightFormat("dense", tuple(weight.shape), weight.dtype), {"weight": weight})


def decode(encoded: EncodedWeight) -> Tensor:
    """The exact weight that ``encoded`` stands for, as a new tensor of ``format.shape``.

    Returns:
        float32 (float64 for a float64 dense weight), on the device of the stored tensors.

    Raises:
        FormatError: tensors are missing, or do not agree with the format.
        NonFiniteError: a value is NaN or infinite.
    """
    weight = encoded.format.kind.decode(encoded)
    if not bool(torch.isfinite(weight).all()):
        remedy = "reload the base model: its file or memory is damaged"
        raise NonFiniteError("the stored weight holds NaN or infinity", format=encoded.format.label, remedy=remedy)
    return weight


def check_rounding(rounding: str) -> None:
    """Raise StateError unless ``rounding`` is one of :data:`ROUNDINGS`."""
    if rounding not in ROUNDINGS:
        raise StateError(f"unknown rounding {printable(rounding)!r}", remedy=f"use {' or '.join(map(repr, ROUNDINGS))}")


def rounding_of(format: WeightFormat, rounding: str) -> str:
    """``rounding``, or ``"nearest"`` if ``format`` does not know ``rounding``: only the 4-bit formats know ``"grid"`` and
    ``"mse"``, and int8 also knows ``"preserve"``.
    """
    return rounding if rounding in format.kind.roundings else "nearest"


def encode(weight: Tensor, format: WeightFormat, rounding: str = "nearest") -> EncodedWeight:
    """``weight`` stored in ``format``.

    Args:
        weight: of ``format.shape``, floating point; the quantised formats read it as float32.
        rounding: ``"nearest"`` gives the codes and statistics of bitsandbytes' own quantiser. ``"mse"`` gives each 4-bit
            block the scale of least squared error, in place of its absmax; ``"grid"`` finds nearly that scale faster.
            ``"preserve"`` needs the weight before a rotation, and is ``"grid"`` here. The other formats round to
            nearest.

    Raises:
        StateError: the rounding is unknown.
        ShapeError: ``weight`` is not of ``format.shape``.
        NonFiniteError: the weight, or its dense narrowing (float16 overflow), is not finite.
    """
    if tuple(weight.shape) != format.shape:
        message = "the weight does not have its format's shape"
        remedy = "reshape the weight, or give the format of this weight"
        raise ShapeError(message, shape=tuple(weight.shape), expected=format.shape, format=format.label, remedy=remedy)
    check_rounding(rounding)
    return format.kind.encode(weight, format, rounding)


def as_loaded(plain: EncodedWeight, into: WeightFormat) -> EncodedWeight:
    """A plain weight as bitsandbytes' loading held it in training: rounded to ``into.dtype``, in which the model was loaded,
    then to the dtype from which the format is quantised, and quantised.
    """
    # loading makes a weight contiguous, and the fast kernels need a contiguous weight
    weight = plain.tensors["weight"].contiguous()
    loaded = encode(weight, WeightFormat("dense", into.shape, into.dtype))
    if not into.quantised:
        return loaded
    home = into.kind.once_quantised(into)
    return encode(loaded.tensors["weight"].to(home.dtype), home)


def grid_of(encoded: EncodedWeight) -> Grid:
    """The :class:`Grid` of a quantised weight, with the scales that a reader sees (double quantisation included)."""
    levels, bounds, _ = encoded.format.kind.levels(encoded.tensors["weight"].device)
    return Grid(levels, bounds, encoded.scales, encoded.format.block)


def with_levels(encoded: EncodedWeight, levels: Tensor) -> EncodedWeight:
    """``encoded`` with other codes and the same statistics.

    Args:
        encoded: a quantised weight.
        levels: numbers of the levels of :func:`grid_of`, in the weight's shape.
    """
    f, device = encoded.format, encoded.tensors["weight"].device
    codes = f.kind.levels(device)[2][levels.to(torch.int64)]
    return EncodedWeight(f, {**encoded.tensors, "weight": f.kind.pack(codes, f)})
