""":func:`resized` asks transformers' own ``resize_token_embeddings``, on the meta device, which tensors and which fields of the config
follow the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .skeleton import quiet
from .vocabulary import Shape, Vocabulary


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
        # resizing fills new rows from the mean of the old rows, and on the meta device no row has values
        for name in filter(lambda name: name.startswith("_init_added_"), dir(model)):
            setattr(model, name, _nothing)
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
    except Exception:  # a class may refuse the number or resize in its own way, and raises errors of any kind
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
