"""Storage formats of weights. Each is one class in a file of its own, which knows all that is particular about it: how
it decodes and encodes, the names and shapes of its tensors and how they are recognised, how an undo record codes it,
which kernel takes it, what it is in a live model, an ONNX graph and transformers' settings.

A new format is a subclass of :class:`~oftsurgery.formats.base.Format` in a file here, and a row of :data:`FORMATS`. What
is asked of any format goes through :attr:`WeightFormat.kind`, or one of the functions below.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .base import FORMATS, EncodedWeight, Format, Grid, Layout, Read, WeightFormat, blocks_of, bnb_class
from .dense import Dense
from .four_bit import FourBit
from .int8 import Int8

__all__ = [
    "FORMATS", "EncodedWeight", "Format", "Grid", "WeightFormat", "blocks_of", "companion_names", "format_of", "gather",
    "is_companion", "of_names", "of_parameter", "owner_of", "spread_shapes",
]  # fmt: skip

FORMATS |= {
    kind.name: kind
    for kind in (Dense(), FourBit("nf4", strong=1 / 18), FourBit("fp4", strong=1 / 12, farther=(20.0, 70.0)), Int8())
}


def of_names(weight: str, names: Collection[str], dtype: torch.dtype) -> Format:
    """The format of a stored weight, by the names of the tensors beside it and the dtype of its own."""
    return next((kind for kind in FORMATS.values() if kind.shows(weight, names, dtype)), FORMATS["dense"])


def gather(
    weight: str, names: Collection[str], read: Read, shape: tuple[int, ...], dtype: torch.dtype
) -> EncodedWeight:
    """The stored weight from its tensors; the mirror of :meth:`Format.spread`.

    Args:
        weight: its name.
        names: of all tensors there are.
        read: gives the tensor of a name.
        shape, dtype: of the tensor ``weight`` as stored.

    Raises:
        FormatError: companions are missing or say nonsense.
    """
    return of_names(weight, names, dtype).gather(weight, names, read, shape, dtype)


def format_of(
    weight: str, names: Collection[str], read: Read, shape: tuple[int, ...], dtype: torch.dtype
) -> WeightFormat:
    """How :func:`gather` finds a weight stored; reads nothing but a 4-bit state's JSON."""
    mark = of_names(weight, names, dtype).names(weight).get("")
    return gather(weight, names, lambda n: read(n) if n == mark else torch.empty(0), shape, dtype).format


def spread_shapes(weight: str, f: WeightFormat) -> Layout:
    """``{name: (dtype, shape)}`` of what :meth:`Format.spread` will give; the shape is None where it depends on the
    values (the JSON of a 4-bit state).
    """
    layout = f.kind.layout(f)
    return {name: layout[local] for local, name in f.kind.names(weight).items() if local in layout}


def companion_names(weight: str, names: Collection[str]) -> tuple[str, ...]:
    """All names among ``names`` that belong to ``weight`` (a name that ends in ``weight``), itself first."""
    candidates = dict.fromkeys(name for kind in FORMATS.values() for name in kind.names(weight).values())
    return (weight, *(n for n in candidates if n in names and n != weight))


#: ends of the names of tensors that belong to a weight, behind its module's
_ENDS = tuple(dict.fromkeys(n for kind in FORMATS.values() for n in kind.names(".weight").values() if n != ".weight"))


def owner_of(name: str) -> str | None:
    """The weight that a tensor of this name belongs to; None where it belongs to none.

    >>> owner_of("a.weight.absmax"), owner_of("a.SCB"), owner_of("a.bias")
    ('a.weight', 'a.weight', None)
    """
    return next((name.removesuffix(end) + ".weight" for end in _ENDS if name.endswith(end)), None)


def is_companion(name: str, names: Collection[str]) -> bool:
    """Whether a tensor belongs to a weight that is among ``names``."""
    return owner_of(name) in names


def of_parameter(parameter: object) -> Format:
    """The format of which bitsandbytes' class of a parameter is; the plain one for all others."""
    return next((kind for kind in FORMATS.values() if bnb_class(parameter, kind.parameter)), FORMATS["dense"])
