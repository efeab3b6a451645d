"""The names of a model that stand for one tensor: the single table that folding, unfolding, writing and checking ask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from .modules import inner_model, modules_of, tensors_in

FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Ties:
    """Names of one tensor in several places.

    Attributes:
        groups: names that are one tensor, in the model's order.
        flagged: names that transformers ties while the config's ``tie_word_embeddings`` is set.
        flag: the value of that setting; None for a config without the setting.
        flag_is_read: function that tells whether a module's forward reads the setting, so that clearing it changes the
            result (UMT5), or whether the config class derives other values from it (T5); called if a group comes apart.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    flagged: frozenset[str] = frozenset()
    flag: bool | None = None
    flag_is_read: Callable[[], bool] = field(default=bool, compare=False)

    def group(self, name: str) -> tuple[str, ...]:
        """All names of the tensor ``name``; ``name`` alone if the tensor is not tied."""
        return next((group for group in self.groups if name in group), (name,))

    def apart(self, alone: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """The groups that come apart if the tensors ``alone`` change in their own places only: the groups of these tensors,
        and if the setting must be cleared, all other groups that the setting ties.
        """
        changed = set(alone)
        broken = [group for group in self.groups if changed.intersection(group)]
        if self.clears_flag(broken):
            broken += [g for g in self.groups if g not in broken and self.flagged.intersection(g)]
        return tuple(broken)

    def clears_flag(self, apart: Iterable[Iterable[str]]) -> bool:
        """Whether ``tie_word_embeddings`` must be cleared if these groups come apart: while it is set, transformers 4 would
        tie them again. (Release 5 does not tie tensors that a checkpoint holds with different values.)
        """
        broken = any(self.flagged.intersection(group) for group in apart)
        return bool(self.flag and broken and not self.flag_is_read())


def ties_of(model: nn.Module) -> Ties:
    """The ties of a model, which may be on the meta device."""
    inner: Any = inner_model(model)
    modules = modules_of(inner)
    tied: Mapping[str, str] = getattr(inner, "all_tied_weights_keys", None) or {}
    flagged = frozenset(tied) | frozenset(tied.values())
    config = getattr(inner, "config", None)
    return Ties(
        groups=tuple(tuple(g) for g in _groups(modules).values() if len(g) > 1),
        flagged=flagged,
        flag=getattr(config, FLAG, None),
        flag_is_read=cache(lambda: any(map(_reads_flag, modules.values())) or _means_more(config)),
    )


def _groups(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """``{id of a tensor: its names}``; a module inside a module that stands in two places has one name."""
    groups: dict[int, list[str]] = {}
    places = set()
    for name, tensor in tensors_in(modules).items():
        path, _, local = name.rpartition(".")
        above, _, slot = path.rpartition(".")
        # a parent that stands in two places holds each child in one place
        place = (id(modules[above]) if path else 0, slot, local)
        if place not in places:
            places.add(place)
            groups.setdefault(id(tensor), []).append(name)
    return groups


def _reads_flag(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return FLAG in getattr(code, "co_names", ())


def _means_more(config: Any) -> bool:
    """Whether a config with the setting cleared differs in other fields too, or sets the setting again."""
    if not getattr(config, FLAG, False) or not hasattr(type(config), "from_dict"):
        return False
    try:
        cleared = type(config).from_dict({**config.to_dict(), FLAG: False}).to_dict()
    except Exception:  # a config class may raise any error
        return False
    return bool(cleared != {**config.to_dict(), FLAG: False})
