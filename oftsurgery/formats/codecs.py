"""These pure functions of tensors do what is done with a weight in any storage format; a format's class does what is its own.

``decode`` gives the exact float32 weight that the stored tensors stand for (not rounded to a compute dtype), ``encode``
gives what bitsandbytes' own quantiser gives for the same float32 weight, or with ``rounding="mse"`` what errs least of
all that the 4-bit format can hold. Tensor names are local, as behind a checkpoint's ``<module>.``/``<module>.weight.``
prefix; only the planner knows module paths. These are the readable reference: correctness first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from oftsurgery.errors import NonFiniteError, ShapeError, StateError, printable

from .encoded_weight import EncodedWeight, WeightFormat

#: how quantised weights are rounded: so that what a rotation did is kept, as bitsandbytes does, or with a scale of each
#: 4-bit block that errs less or least
Rounding = Literal["preserve", "nearest", "grid", "mse"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that each element of a quantised weight can take, its statistics given.

    Attributes:
        levels: ascending, ``(16,)`` or ``(255,)`` float32 in [-1, 1].
        bounds: between neighbouring levels.
        scales: what the levels are multiplied by: one a block of the flat weight, float32.
        blocksize: elements a block.
    """

    levels: Tensor
    bounds: Tensor
    scales: Tensor
    blocksize: int

    def nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        """Numbers of the levels that are nearest to ``values``, each with its scale, as int32."""
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
    """
    Raises:
        StateError: ``rounding`` is none of :data:`ROUNDINGS`.
    """
    if rounding not in ROUNDINGS:
        raise StateError(f"unknown rounding {printable(rounding)!r}", remedy=" or ".join(map(repr, ROUNDINGS)))


def rounding_of(format: WeightFormat, rounding: str) -> str:
    """``rounding``, or ``"nearest"`` where it has no part in ``format``: ``"grid"`` and ``"mse"`` are of the 4-bit formats,
    ``"preserve"`` of int8 too.
    """
    return rounding if rounding in format.kind.roundings else "nearest"


def encode(weight: Tensor, format: WeightFormat, rounding: str = "nearest") -> EncodedWeight:
    """``weight`` stored in ``format``.

    Args:
        weight: of ``format.shape``, floating point; read as float32 (dense: as it is).
        rounding: ``"nearest"``: the codes and statistics of bitsandbytes' own quantiser. ``"mse"``: each 4-bit block is
            scaled by what makes its squared error least, in place of its absmax; ``"grid"``: by nearly that, found
            faster; ``"preserve"``, which needs the weight before a rotation, is that too. The other formats round to
            nearest.

    Raises:
        StateError: an unknown rounding.
        ShapeError: ``weight`` is not of ``format.shape``.
        NonFiniteError: the weight, or its dense narrowing (float16 overflow), is not finite.
    """
    if tuple(weight.shape) != format.shape:
        message = "the weight does not have its format's shape"
        remedy = "reshape it, or give the format of this weight"
        raise ShapeError(message, shape=tuple(weight.shape), expected=format.shape, format=format.label, remedy=remedy)
    check_rounding(rounding)
    return format.kind.encode(weight, format, rounding)


def as_loaded(plain: EncodedWeight, into: WeightFormat) -> EncodedWeight:
    """A plain weight as the trainer's bitsandbytes loading held it: from its rounding to ``into.dtype``, in which the model
    was loaded, and to the dtype from which the format is quantised.
    """
    # laid out as loading lays it out, which the fast kernels need
    weight = plain.tensors["weight"].contiguous()
    loaded = encode(weight, WeightFormat("dense", into.shape, into.dtype))
    if not into.quantised:
        return loaded
    home = into.kind.once_quantised(into)
    return encode(loaded.tensors["weight"].to(home.dtype), home)


def grid_of(encoded: EncodedWeight) -> Grid:
    """The :class:`Grid` of a quantised weight, scales as its reader sees them (double quantisation included)."""
    levels, bounds, _ = encoded.format.kind.levels(encoded.tensors["weight"].device)
    return Grid(levels, bounds, encoded.scales, encoded.format.block)


def with_levels(encoded: EncodedWeight, levels: Tensor) -> EncodedWeight:
    """``encoded`` with other codes and the same statistics.

    Args:
        encoded: quantised.
        levels: of its shape, numbers of the levels of :func:`grid_of`.
    """
    f, device = encoded.format, encoded.tensors["weight"].device
    codes = f.kind.levels(device)[2][levels.to(torch.int64)]
    return EncodedWeight(f, {**encoded.tensors, "weight": f.kind.pack(codes, f)})
