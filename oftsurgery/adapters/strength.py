"""Adapters at another strength: the modes of ``strength`` by name, and a map that is computed when a weight is folded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from oftsurgery.errors import StateError, printable

from .weight_map import ANGLE, LINEAR, MapOf, WeightMap

StrengthMode = Literal["angle", "linear", "kohya", "lycoris", "lycoris-2", "webui", "comfyui", "oftv2-node"]

#: mode → what the mode makes of a weight W, of its folded form W′ and of a strength s
STRENGTH_MODES: Mapping[str, str] = MappingProxyType({
    ANGLE: "each rotation by s times its angles, in the same planes (K(Q)ˢ): stays a rotation",
    LINEAR: "W + s·(W′ - W)",
    "kohya": "kohya's sd-scripts: (1-s)·W + s·K W",
    "lycoris": "LyCORIS from 3.0 on: diag-oft g⊙((1-s)·W + s·K W), BOFT with each factor (1-s)·I + s·F, with g in full",
    "lycoris-2": "LyCORIS 2.x: BOFT with the first factor alone weakened, with g in full",
    "webui": "A1111's web UI: W + s·(W′ - W); a limit of 0 is none",
    "comfyui": "ComfyUI to 2025-10: diag-oft W + s²·(K W - W) without g, BOFT W + s·(W′(s) - W); the limit is not multiplied by the outputs",
    "oftv2-node": "the OFTv2 node of ComfyUI: W + s·(W′ - W), for OneTrainer's files",
})  # fmt: skip

#: modes by which a tool computes something else than the trainer even at strength 1
_NOT_AT_ONE = ("webui", "comfyui", "oftv2-node")


def check_strength(strength: float, mode: str) -> None:
    """Refuse a strength that is not finite, or an unknown mode.

    Raises:
        StateError: as said.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        message = f"the strength {printable(strength)!r} is no finite number"
        raise StateError(message, remedy="give a number: strength=0.8 (--strength 0.8)")
    if mode not in STRENGTH_MODES:
        message = f"the strength mode {printable(mode)!r} is not known"
        known = ", ".join(map(repr, STRENGTH_MODES))
        raise StateError(message, remedy=f"choose one of {known} (strength_mode=…, --strength-mode)")


def changes_nothing(strength: float, mode: str) -> bool:
    """Whether the strength and its mode leave each map as it is."""
    return strength == 1 and mode not in _NOT_AT_ONE


@dataclass(frozen=True, eq=False)
class AtStrength(MapOf):
    """A map at another strength; the weaker map is computed when it is needed.

    Attributes:
        of: the map at strength 1.
        strength, mode: as for :func:`oftsurgery.fold`.
    """

    strength: float
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in (ANGLE, LINEAR, *self.of.modes):
            raise self.of.no_mode(self.mode)

    @property
    def family(self) -> str:  # type: ignore[override]  # of a field of the parent
        return f"{self.of.family} at strength {self.strength:g}"

    @property
    def modes(self) -> tuple[str, ...]:  # type: ignore[override]  # of a field of the parent
        return self.of.modes

    @property
    def defect(self) -> float:
        return self.resolved().defect

    @property
    def angle(self) -> float:
        return self.resolved().angle

    def settings(self) -> str:
        return f"{self.of.settings()}\0{self.strength!r}\0{self.mode}"

    def facts(self) -> dict[str, Any]:
        return self.of.facts() | {"strength": self.strength, "strength_mode": self.mode}

    def for_layer(self, kernel: tuple[int, ...], module: str) -> WeightMap:
        return replace(self, of=self.of.for_layer(kernel, module))

    def resolved(self) -> WeightMap:
        return self.of.at_strength(self.strength, self.mode).resolved()

    def fold_into(self, weight: Tensor) -> Tensor:
        return self.resolved().fold_into(weight)

    def unfold_from(self, weight: Tensor) -> Tensor:
        return self.resolved().unfold_from(weight)

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if self.mode == mode == ANGLE:
            return AtStrength(self.of, self.strength * strength, mode)
        if changes_nothing(strength, mode):
            return self
        message = f"the adapter has a strength already ({self.strength:g}, {self.mode})"
        raise StateError(message, remedy="give the strength once, with the adapter as it was read")
