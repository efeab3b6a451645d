"""These functions find by names which tensors of a checkpoint are one weight, and in which format a weight is stored."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .all_formats import FORMATS
from .base import Format, Layout, Names, Read, Shape
from .encoded_weight import EncodedWeight, WeightFormat


def format_by_names(weight: str, names: Collection[str], dtype: torch.dtype) -> Format:
    """The format of a stored weight, from the names of the tensors beside it and the dtype of its own tensor."""
    return next((kind for kind in FORMATS.values() if kind.recognises(weight, names, dtype)), FORMATS["dense"])


def read_weight(weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> EncodedWeight:
    """The stored weight, from its tensors: the mirror of :meth:`Format.to_checkpoint`.

    Args:
        weight: name of the weight's tensor.
        names: names of all tensors of the checkpoint.
        read: function from a name to the tensor.
        shape, dtype: shape and dtype of the stored tensor ``weight``.

    Raises:
        FormatError: tensors that belong to the weight are missing or wrong.
    """
    return format_by_names(weight, names, dtype).from_checkpoint(weight, names, read, shape, dtype)


def stored_format(weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> WeightFormat:
    """The format in which :func:`read_weight` finds a weight. Only a 4-bit state's JSON is read."""
    mark = format_by_names(weight, names, dtype).tensor_names(weight).get("")
    return read_weight(weight, names, lambda n: read(n) if n == mark else torch.empty(0), shape, dtype).format


def checkpoint_shapes(weight: str, f: WeightFormat) -> Layout:
    """``{name: (dtype, shape)}`` of the tensors that :meth:`Format.to_checkpoint` will give; a shape that depends on the
    values (the JSON of a 4-bit state) is None.
    """
    layout = f.kind.layout(f)
    return {name: layout[local] for local, name in f.kind.tensor_names(weight).items() if local in layout}


def companion_names(weight: str, names: Collection[str]) -> tuple[str, ...]:
    """All names among ``names`` that belong to ``weight`` (a name that ends in ``weight``), with ``weight`` first."""
    candidates = dict.fromkeys(name for kind in FORMATS.values() for name in kind.tensor_names(weight).values())
    return (weight, *(n for n in candidates if n in names and n != weight))


#: ends of the names of tensors that belong to a weight, which follow the module's path
_ENDS = tuple({n: None for k in FORMATS.values() for n in k.tensor_names(".weight").values() if n != ".weight"})


def owner_of(name: str) -> str | None:
    """The weight that the tensor ``name`` belongs to, or None.

    >>> owner_of("a.weight.absmax"), owner_of("a.SCB"), owner_of("a.bias")
    ('a.weight', 'a.weight', None)
    """
    return next((name.removesuffix(end) + ".weight" for end in _ENDS if name.endswith(end)), None)


def is_companion(name: str, names: Collection[str]) -> bool:
    """Whether a tensor belongs to a weight that is among ``names``."""
    return owner_of(name) in names
