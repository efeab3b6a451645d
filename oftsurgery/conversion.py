"""Tensors that transformers splits, merges, turns or permutes while it loads a checkpoint, by its own conversion tables.

A :class:`Unit` is what one entry of those tables takes in and gives out. It is tried on the meta device when the
checkpoint's names are resolved: what does not come back as it was there is no unit that can be written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import FormatError, printable

__all__ = ["Unit", "unit_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Unit:
    """Tensors of a checkpoint that become other tensors of the model.

    Attributes:
        stored: ``{name in the checkpoint: shape}``.
        model: ``{name in the model: shape}``; empty where transformers' table does not apply to these tensors.
        reversible: the model's tensors go back to the stored ones.
    """

    stored: Mapping[str, Shape]
    model: Mapping[str, Shape]
    reversible: bool
    _converter: Any
    _keys: Mapping[str, tuple[str, str]]  # stored name → (name after renaming, first name in the model)
    _skeleton: Any

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors from the stored ones."""
        return _run(copy.deepcopy(self._converter), tensors, self._keys, self._skeleton)

    def store(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mirror of :meth:`load`."""
        from transformers.core_model_loading import apply_converters

        back = self._converter.reverse_transform()
        first = {name: apply_converters(name, [back]) for name in tensors}
        keys = {name: (pattern or name, target) for name, (target, pattern) in first.items()}
        found = _run(back, tensors, keys, self._skeleton, patterns={n: p for n, (_, p) in first.items()})
        prefix = f"{self._skeleton.base_model_prefix}."
        named = {n.removeprefix(prefix): t for n, t in found.items()}
        return {name: named[key.removeprefix(prefix)] for name, (key, _) in self._keys.items()}


def _run(
    converter: Any,
    tensors: Mapping[str, Tensor],
    keys: Mapping[str, tuple[str, str]],
    skeleton: Any,
    patterns: Mapping[str, str | None] | None = None,
) -> dict[str, Tensor]:
    from transformers.core_model_loading import dot_natural_key

    for name in sorted(tensors, key=dot_natural_key):
        key, target = keys[name]
        pattern = patterns[name] if patterns is not None else converter.rename_source_key(key)[1]
        converter.add_tensor(target, name, pattern, tensors[name])
    first = next(iter(keys.values()))[1]
    found = converter.convert(first, model=skeleton, config=skeleton.config)
    return {name: (t[0] if isinstance(t, list) else t).contiguous() for name, t in found.items()}


def unit_of(
    converter: Any,
    keys: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, Shape],
    state: Mapping[str, Tensor],
    skeleton: Any,
) -> Unit:
    """The unit that ``converter`` makes of the stored tensors whose names are in ``keys``.

    Args:
        converter: transformers' ``WeightConverter``.
        keys: ``{stored name: (name after renaming, first name in the model)}``.
        shapes: of the stored tensors.
        state: the model's tensors, on the meta device.
        skeleton: the model on the meta device.
    """
    stored = {name: shapes[name] for name in keys}
    unit = Unit(stored, {}, False, converter, keys, skeleton)
    nothing = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    found = _tried(unit.load, nothing)
    if not found or any(n not in state or state[n].shape != t.shape for n, t in found.items()):
        return unit
    model = {name: tuple(t.shape) for name, t in found.items()}
    back = _tried(unit.store, found)
    reversible = {n: tuple(t.shape) for n, t in back.items()} == stored
    return Unit(stored, model, reversible, converter, keys, skeleton)


def _tried(
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    try:
        return convert(tensors)
    except Exception:
        return {}


def check_known(unit: Unit, path: str, *, back: bool) -> None:
    """
    Raises:
        FormatError: the module's weight is of a unit that is not known, or that must be written and cannot be.
    """
    if not unit.model or (back and not unit.reversible):
        raise FormatError(
            f"transformers makes this weight from {_listed(unit.stored)} of the checkpoint by a conversion that cannot be "
            + ("taken back" if unit.model else "followed"),
            module=path,
            remedy="load the model with transformers, fold it in memory, and save it with save_pretrained",
        )


def _listed(names: Iterable[str]) -> str:
    first, *rest = map(printable, names)
    return f"{first} and {len(rest)} other tensors" if rest else first
