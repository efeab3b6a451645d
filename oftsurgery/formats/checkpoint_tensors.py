"""These functions tell by names which tensors of a checkpoint are one weight, and in which format it is stored."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .all_formats import FORMATS
from .base import Format, Layout, Names, Read, Shape
from .encoded_weight import EncodedWeight, WeightFormat


def format_by_names(weight: str, names: Collection[str], dtype: torch.dtype) -> Format:
    """The format of a stored weight, by the names of the tensors beside it and the dtype of its own."""
    return next((kind for kind in FORMATS.values() if kind.recognises(weight, names, dtype)), FORMATS["dense"])


def read_weight(weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> EncodedWeight:
    """The stored weight from its tensors; the mirror of :meth:`Format.to_checkpoint`.

    Args:
        weight: its name.
        names: of all tensors there are.
        read: gives the tensor of a name.
        shape, dtype: of the tensor ``weight`` as stored.

    Raises:
        FormatError: companions are missing or say nonsense.
    """
    return format_by_names(weight, names, dtype).from_checkpoint(weight, names, read, shape, dtype)


def stored_format(weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> WeightFormat:
    """How :func:`read_weight` finds a weight stored; reads nothing but a 4-bit state's JSON."""
    mark = format_by_names(weight, names, dtype).tensor_names(weight).get("")
    return read_weight(weight, names, lambda n: read(n) if n == mark else torch.empty(0), shape, dtype).format


def checkpoint_shapes(weight: str, f: WeightFormat) -> Layout:
    """``{name: (dtype, shape)}`` of what :meth:`Format.to_checkpoint` will give; the shape is None where it depends on the
    values (the JSON of a 4-bit state).
    """
    layout = f.kind.layout(f)
    return {name: layout[local] for local, name in f.kind.tensor_names(weight).items() if local in layout}


def companion_names(weight: str, names: Collection[str]) -> tuple[str, ...]:
    """All names among ``names`` that belong to ``weight`` (a name that ends in ``weight``), itself first."""
    candidates = dict.fromkeys(name for kind in FORMATS.values() for name in kind.tensor_names(weight).values())
    return (weight, *(n for n in candidates if n in names and n != weight))


#: ends of the names of tensors that belong to a weight, behind its module's
_ENDS = tuple({n: None for k in FORMATS.values() for n in k.tensor_names(".weight").values() if n != ".weight"})


def owner_of(name: str) -> str | None:
    """The weight that a tensor of this name belongs to; None where it belongs to none.

    >>> owner_of("a.weight.absmax"), owner_of("a.SCB"), owner_of("a.bias")
    ('a.weight', 'a.weight', None)
    """
    return next((name.removesuffix(end) + ".weight" for end in _ENDS if name.endswith(end)), None)


def is_companion(name: str, names: Collection[str]) -> bool:
    """Whether a tensor belongs to a weight that is among ``names``."""
    return owner_of(name) in names
