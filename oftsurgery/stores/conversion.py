"""Tensors that transformers splits, merges, turns or permutes while it loads a checkpoint, by its own conversion tables.

A :class:`Unit` holds the tensors that one entry of those tables reads and gives. When the checkpoint's names are
resolved, each unit is tried on the meta device: a unit whose tensors do not come back unchanged cannot be written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oftsurgery.errors import FormatError, printable

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Unit:
    """Tensors of a checkpoint that become other tensors of the model.

    Attributes:
        stored: ``{name in the checkpoint: shape}``.
        model: ``{name in the model: shape}``; empty where transformers' table does not apply to these tensors.
        reversible: whether the model's tensors can be converted back to the stored tensors.
    """

    stored: Mapping[str, Shape]
    model: Mapping[str, Shape]
    reversible: bool
    _converter: Any
    _keys: Mapping[str, tuple[str, str]]  # stored name → (name after renaming, first name in the model)
    _skeleton: Any

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, from the stored tensors."""
        return _run(copy.deepcopy(self._converter), tensors, self._keys, self._skeleton)

    def store(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors, from the model's tensors: the mirror of :meth:`load`."""
        from transformers.core_model_loading import rename_source_key

        back = self._converter.reverse_transform()
        first = {name: rename_source_key(name, [], [back]) for name in tensors}
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
    """The tensors that transformers' ``converter`` makes of ``tensors``."""
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
        state: the tensors of ``skeleton``, the model on the meta device.
    """
    stored = {name: shapes[name] for name in keys}
    unit = Unit(stored, {}, False, converter, keys, skeleton)
    nothing = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    found = _tried(unit.load, nothing)
    if not found or any(n not in state or state[n].shape != t.shape for n, t in found.items()):
        return unit
    back = _tried(unit.store, found)
    reversible = {n: tuple(t.shape) for n, t in back.items()} == stored
    return replace(unit, model={name: tuple(t.shape) for name, t in found.items()}, reversible=reversible)


def _tried(
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The result of a conversion; nothing if the conversion fails."""
    try:
        return convert(tensors)
    except Exception:  # a conversion may raise any error; the unit is then unknown, and a change of the unit is refused
        return {}


#: attribute in which transformers keeps the conversions of the files that it loaded last into a model
CONVERSIONS = "_weight_conversions"


def of_adapter(conversions: Sequence[Any] | None) -> bool:
    """Whether ``conversions`` belong to the files of an adapter; such conversions say nothing about the model's own tensors."""
    return any(source.startswith("base_model.model.") for c in conversions or () for source in c.source_patterns)


class Saving:
    """The names and forms that transformers gives a live model's tensors in files."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
            return
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
        except ImportError:
            return
        found = getattr(model, CONVERSIONS, None)
        if found is None or of_adapter(found):
            known = get_model_conversion_mapping(model, add_legacy=False)
            found = [t for t in known if not isinstance(t, PrefixChange)]
        own = [t for t in map(_without_quantiser, found[::-1]) if t is not None]
        back = [t.reverse_transform() for t in own]
        self._renamings = [t for t in back if isinstance(t, WeightRenaming)]
        self._converters = [t for t in back if isinstance(t, WeightConverter)]

    def name(self, name: str) -> str:
        """The name in files of a tensor that is not converted."""
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    def unit(self, name: str) -> str | None:
        """A key that all tensors of one conversion share; None for a tensor that is not converted."""
        return self._matched(name)[1]

    def _matched(self, name: str) -> tuple[Any, str | None, str | None]:
        """``(converter, first name in the file, pattern)`` for a tensor that is converted; else three times None."""
        for converter in self._converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return converter, target, pattern
        return None, None, None

    def store(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, from all of the model's tensors that share a unit.

        Raises:
            FormatError: the conversion fails.
        """
        converter = copy.deepcopy(self._matched(next(iter(tensors)))[0])
        matched = {name: self._matched(name) for name in tensors}
        keys = {name: (name, str(target)) for name, (_, target, _) in matched.items()}
        try:
            found = _run(converter, tensors, keys, self._model, {name: p for name, (_, _, p) in matched.items()})
        except Exception as error:  # a conversion may raise any error
            raise FormatError(
                f"transformers splits or merges this tensor when it saves, and the conversion failed ({printable(error)})",
                tensor=next(iter(tensors)),
                remedy="fold the checkpoint on disk instead: oftsurgery.fold_checkpoint",
            ) from error
        return {self.name(name): tensor for name, tensor in found.items()}


def _without_quantiser(transform: Any) -> Any:
    """A transform without the operations that dequantise a package's tensors, which have no reverse for a plain weight; None where
    nothing else is left. The operations of models lie in transformers' own loading, and those of packages in its integrations.
    """
    operations = getattr(transform, "operations", ())
    left = [o for o in operations if not type(o).__module__.startswith("transformers.integrations.")]
    if len(left) == len(operations):
        return transform
    if not left:
        return None
    # a quantiser also collects the scales beside each weight, and the weight comes first
    sources = transform._original_source_patterns
    end = sources[0].rpartition(".")[2]
    sources = [source for source in sources if source.rpartition(".")[2] == end]
    return transform.copy(sources, list(transform._original_target_patterns), operations=left)


def check_known(unit: Unit, path: str, *, back: bool) -> None:
    """Raise FormatError for a weight of an unknown unit, or of a unit that must be written ``back`` and is not reversible."""
    if not unit.model or (back and not unit.reversible):
        first, *rest = map(printable, unit.stored)
        more = f" and {len(rest)} other tensors" if rest else ""
        raise FormatError(
            f"transformers makes this weight from {first}{more} of the checkpoint by a conversion that cannot be "
            + ("reversed" if unit.model else "followed"),
            module=path,
            remedy="load the model with transformers, fold it in memory, and save it with save_pretrained",
        )
