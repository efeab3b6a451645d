"""Maps of one model layout on the weights of another layout: parts of the rows, and swapped halves.

An adapter that was trained on ``to_q``, ``to_k`` and ``to_v`` acts on the row parts of a fused ``qkv``. Some layouts hold the two
halves of a weight in the other order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import MatchError, ShapeError

from .weight_map import TRAINED_ON, MapOf, WeightMap


@dataclass(frozen=True, eq=False)
class RowParts(WeightMap):
    """Maps of consecutive parts of a weight's rows.

    Attributes:
        parts: ``(map, rows)`` of each part in order; None for a part that stays as it is.
    """

    parts: tuple[tuple[WeightMap | None, int], ...]

    family = "row parts"

    def __post_init__(self) -> None:
        if len({m.side for m in self.maps}) != 1:
            sides = ", ".join(sorted({m.side for m in self.maps})) or "none"
            message = f"the parts of a weight need maps of one side, and have: {sides}"
            raise MatchError(message, remedy="fold the adapters one after the other")

    @property
    def maps(self) -> list[WeightMap]:
        """The maps of the parts that change."""
        return [m for m, _ in self.parts if m is not None]

    @property
    def side(self) -> rotations.Side:  # type: ignore[override]
        return self.maps[0].side

    @property
    def turns_bias(self) -> bool:  # type: ignore[override]
        return any(m.turns_bias for m in self.maps)

    @property
    def scales_rows(self) -> bool:
        return any(m.scales_rows for m in self.maps)

    @property
    def asks_layer(self) -> bool:
        return any(m.asks_layer for m in self.maps)

    @property
    def first_on_weight(self) -> bool:
        return all(m.first_on_weight for m in self.maps)

    @property
    def block_size(self) -> int:
        return max(m.block_size for m in self.maps)

    @property
    def defect(self) -> float:
        return max(m.defect for m in self.maps)

    @property
    def angle(self) -> float:
        return max(m.angle for m in self.maps)

    def _each(self, what: str, x: Tensor) -> Tensor:
        pieces = torch.split(x, [rows for _, rows in self.parts])
        wide = torch.promote_types(x.dtype, torch.float32)
        done = [
            piece.to(wide) if m is None else getattr(m, what)(piece)
            for (m, _), piece in zip(self.parts, pieces, strict=True)
        ]
        return torch.cat(done)

    def fold_into(self, weight: Tensor) -> Tensor:
        return self._each("fold_into", weight)

    def unfold_from(self, weight: Tensor) -> Tensor:
        return self._each("unfold_from", weight)

    def fold_bias(self, bias: Tensor) -> Tensor:
        return self._each("fold_bias", bias) if self.turns_bias else bias

    def unfold_bias(self, bias: Tensor) -> Tensor:
        return self._each("unfold_bias", bias) if self.turns_bias else bias

    def resolved(self) -> WeightMap:
        return replace(self, parts=tuple((None if m is None else m.resolved(), rows) for m, rows in self.parts))

    def for_layer(self, kernel: tuple[int, ...], module: str) -> WeightMap:
        bound = tuple((None if m is None else m.for_layer(kernel, module), rows) for m, rows in self.parts)
        return replace(self, parts=bound)

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        if sum(rows for _, rows in self.parts) != shape[0]:
            message = (
                f"the parts have {' + '.join(str(rows) for _, rows in self.parts)} rows, but the weight has {shape[0]}"
            )
            raise ShapeError(message, module=module, shape=shape, remedy=TRAINED_ON)
        for m, rows in self.parts:
            if m is not None:
                m.check_fits((rows, shape[1]), module)

    def tensors(self) -> Mapping[str, Tensor]:
        maps = enumerate(m for m, _ in self.parts)
        return {f"{i}.{name}": t for i, m in maps if m is not None for name, t in m.tensors().items()}

    def settings(self) -> str:
        return "\0".join(f"{rows}\0{'' if m is None else m.settings()}" for m, rows in self.parts)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"parts": [rows for _, rows in self.parts]}

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        weaker = tuple((None if m is None else m.at_strength(strength, mode), rows) for m, rows in self.parts)
        return replace(self, parts=weaker)


@dataclass(frozen=True, eq=False)
class SwappedHalves(MapOf):
    """A map of a weight whose two halves of the rows stand in the other order than in training."""

    family = "swapped halves"

    @property
    def defect(self) -> float:
        return self.of.defect

    @property
    def angle(self) -> float:
        return self.of.angle

    def fold_into(self, weight: Tensor) -> Tensor:
        return swap_halves(self.of.fold_into(swap_halves(weight)))

    def unfold_from(self, weight: Tensor) -> Tensor:
        return swap_halves(self.of.unfold_from(swap_halves(weight)))

    def resolved(self) -> WeightMap:
        return replace(self, of=self.of.resolved())

    def for_layer(self, kernel: tuple[int, ...], module: str) -> WeightMap:
        return replace(self, of=self.of.for_layer(kernel, module))

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        if shape[0] % 2:
            message = f"a weight of {shape[0]} rows has no two halves"
            raise ShapeError(message, module=module, shape=shape, remedy=TRAINED_ON)
        self.of.check_fits(shape, module)

    def settings(self) -> str:
        return f"{self.family}\0{self.of.settings()}"

    def facts(self) -> dict[str, Any]:
        return self.of.facts() | {"swapped_halves": True}

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        return replace(self, of=self.of.at_strength(strength, mode))


def swap_halves(x: Tensor) -> Tensor:
    """The rows' second half before the first half."""
    first, second = x.chunk(2)
    return torch.cat([second, first])


def row_parts(parts: Sequence[tuple[WeightMap | None, int]]) -> WeightMap | None:
    """The map of a weight whose consecutive row parts have maps of their own; None where no part changes."""
    return RowParts(tuple(parts)) if any(m is not None for m, _ in parts) else None
