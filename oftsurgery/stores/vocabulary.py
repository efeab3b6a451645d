"""A model with another number of tokens: an adapter of a model whose embeddings were resized in training brings the resized
tensors, and the model's config must state their number of rows.

transformers' own ``resize_token_embeddings`` says, on the meta device, which tensors and which fields of the config follow the
number of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .skeleton import quiet

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


def resized(
    make: Callable[[Vocabulary | None], Any], held: Callable[[str], Shape | None], rows: int
) -> Vocabulary | None:
    """The vocabulary of ``rows`` tokens in a class of transformers; None where the class or its config has no such vocabulary.

    Args:
        make: function that builds the model on the meta device, with the config's own number of tokens or another vocabulary.
        held: function from a name to the shape of the real model's tensor; None for a tensor that the real model lacks.
    """
    try:
        model = make(None)
        if model is None:
            return None
        shapes, config = _shapes(model), model.config.to_dict()
        before = int(model.get_input_embeddings().weight.shape[0])
        for name in filter(lambda name: name.startswith("_init_added_"), dir(model)):
            setattr(
                model, name, _nothing
            )  # the new rows' values, from the mean of the old rows: there are no values here
        with quiet(), torch.device("meta"):
            model.resize_token_embeddings(rows)
        now = _shapes(model)
        vocabulary = Vocabulary(
            before=before,
            after=rows,
            shapes={name: shape for name, shape in now.items() if shape != shapes.get(name)},
            buffers=frozenset(name for name, _ in model.named_buffers()),
            fields=dict(_changes(config, model.config.to_dict())),
        )
        # the config alone must give these shapes again, in the model that is folded
        if any(held(name) not in (None, shapes.get(name)) for name in vocabulary.shapes):
            return None
        return vocabulary if vocabulary.shapes and _shapes(make(vocabulary)) == now else None
    except (
        Exception
    ):  # a class may refuse the number, resize in its own way or not at all, and raises errors of any kind
        return None


def _nothing(*_: object, **__: object) -> None:
    """Compute nothing."""


def _shapes(model: Any) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """``(path, value)`` of the whole numbers that differ between two configs."""
    for name, value in after.items():
        old, here = before.get(name), f"{path}.{name}".lstrip(".")
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            yield from _changes(old, value, here)
        elif isinstance(value, int) and not isinstance(value, bool) and value != old:
            yield here, value
