"""A model with another number of tokens: an adapter of a model whose embeddings were resized in training brings the resized
tensors, and the model's config must state their number of rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]

#: the most numbers of tokens that are tried: trainers resize a model once, and an adapter's file may hold tensors of any shapes
_TRIES = 4


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Another number of tokens, and what follows the number.

    Attributes:
        before: the number of tokens that the model has.
        after: the number of tokens that the adapter brings.
        shapes: ``{name of a tensor: its new shape}`` of all tensors that follow the number.
        buffers: the names of those tensors that nobody trains; transformers cuts such a tensor off, or fills it up with zeros.
        fields: ``{path of a field of the config, with dots: its new value}``.
    """

    before: int
    after: int
    shapes: Mapping[str, Shape]
    buffers: frozenset[str]
    fields: Mapping[str, int]

    def in_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the ``config.json`` with the new number of tokens."""
        new = copy.deepcopy(dict(config))
        for path, value in self.fields.items():
            *parts, last = path.split(".")
            part = new
            for name in parts:
                part = part.setdefault(name, {})
            part[last] = value
        return new


def vocabulary_of(
    brought: Mapping[str, Shape], held: Callable[[str], Shape], resized: Callable[[int], Vocabulary | None]
) -> Vocabulary | None:
    """The number of tokens that tensors of other shapes than the model's tell; None where no number explains a shape.

    Args:
        brought: ``{name of the model's tensor: shape of the adapter's values}``.
        held: function from a name to the shape of the model's tensor.
        resized: function from a number of tokens to the vocabulary of the model's class.
    """
    other = {name: shape for name, shape in brought.items() if shape != held(name)}
    rows = {shape[0] for name, shape in other.items() if shape and shape[1:] == held(name)[1:]}
    for number in sorted(rows)[:_TRIES]:
        found = resized(number)
        if found is not None and any(found.shapes.get(name) == shape for name, shape in other.items()):
            return found
    return None
