""":class:`AdapterEffects` states, for the checks, how adapters change the tensors of a base in the live model. The planner decides the
same by other code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import MatchError

from .loaded import LoadedCheckpoint
from .row_groups import RowGroups
from .tool_names import Rows


class AdapterEffects:
    """The changes that adapters make to the base's tensors in peft's live model.

    Attributes:
        chains: ``{name: (path in the adapter, rotations in the live order)}``; a rotation acts only on this name and not
            on tensors that are tied to it.
        values: ``{name: the adapter's own values}``: peft copies a module of ``modules_to_save``, so these values count
            only at this name; other trained values count at every name that is tied to this name.
        sums: ``{name: what the adapters add to the tensor}``.
        biases: ``{name of a bias: maps in the live order}`` of the biases that the live layers turn.
        groups: the weights that are rotated together or in parts.
    """

    def __init__(
        self, base: LoadedCheckpoint, adapters: Sequence[OFTAdapter], idle: Callable[[Any, str], bool] | None
    ) -> None:
        self.chains: dict[str, tuple[str, list[WeightMap]]] = {}
        self.values: dict[str, Tensor] = {}
        steps: list[tuple[Rows, WeightMap]] = []
        for adapter in adapters:
            for path, rotation in adapter.modules.items():
                rows = _rows_of(base, path, adapter)
                steps.append((rows, rotation))
                for module in rows.paths:
                    if idle is None or base.model is None or not idle(base.model, module):
                        self.chains.setdefault(f"{module}.weight", (path, []))[1].append(rotation)
            places = {name: _place_of(base, name, adapter) for name in adapter.saved}
            twice = next((name for name, place in places.items() if place in self.values), None)
            if twice is not None:
                message = "two adapters bring their own values for one tensor"
                raise MatchError(message, tensor=twice, remedy="give only the adapter that was folded")
            order = {place: i for i, place in enumerate(base.sources)}
            for name in sorted(places, key=lambda name: (_in_modules_to_save(name, adapter), order[places[name]])):
                where = {places[name]} if _in_modules_to_save(name, adapter) else base.together(places[name])
                self.values |= dict.fromkeys(where, adapter.saved[name])
        self.groups = RowGroups(steps)
        self.sums: dict[str, Tensor] = {}
        for adapter in adapters:
            for name, values in adapter.sums.items():
                place = _place_of(base, name, adapter)
                added = adapter.strength * values.to("cpu", torch.float64)
                self.sums[place] = self.sums[place] + added if place in self.sums else added
        self.biases = {
            f"{place.rpartition('.')[0]}.bias": chain
            for place, (_, chain) in self.chains.items()
            if any(m.turns_bias for m in chain) or self.groups.turns_bias(place.removesuffix(".weight"))
        }


def _rows_of(base: LoadedCheckpoint, path: str, adapter: OFTAdapter) -> Rows:
    """The base's rows that an adapter's module rotates."""
    rows = base.rows(path)
    if rows is None or rows.plain:
        return Rows((_place_of(base, f"{path}.weight", adapter).removesuffix(".weight"),))
    return rows


def _place_of(base: LoadedCheckpoint, name: str, adapter: OFTAdapter) -> str:
    """The base's name of a tensor that the adapter names."""
    place = base.place(name)
    own = name in adapter.saved  # a head that the base lacks is compared with the adapter alone
    if place is None or (base.sources[place] is None and not own):
        message = "the adapter names a tensor that the base does not have"
        remedy = "give the base that the adapter was trained on, of the same class"
        raise MatchError(message, tensor=name, path=adapter.source, remedy=remedy)
    return place


def _in_modules_to_save(name: str, adapter: OFTAdapter) -> bool:
    """Whether ``modules_to_save`` names the tensor's module; as in peft, a name matches the end of a path."""
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(path.endswith(saved) for path in paths for saved in adapter.config.get("modules_to_save") or ())
