"""A :class:`WeightMap` is what an adapter does to one module's weight; the fold, the records and the undo know only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, ShapeError

#: the modes of ``strength`` that every kind of map has
ANGLE, LINEAR = "angle", "linear"

TRAINED_ON = "use the base model that the adapter was trained on (its `base_model_name_or_path`)"


class WeightMap(ABC):
    """What an adapter does to one module's weight.

    >>> quarter = oftsurgery.Rotation(generator=torch.tensor([[-1.0]]))       # one kind of map
    >>> isinstance(quarter, oftsurgery.WeightMap), quarter.fold_into(torch.tensor([[3.0, 4.0]])).tolist()
    (True, [[4.0, -3.0]])

    The map is linear in the weight's canonical form ``rows(W): (out, rest)``: the kernel of a convolution
    ``(out, in, kh, kw)`` is flattened to ``(out, in·kh·kw)``.

    Attributes:
        side: the side of the weight that the map is on.
        turns_bias: whether the live layer turns the bias with the rows of the weight.
        family: the kind of the map, in words.
        modes: the modes of ``strength`` beside ``"angle"`` and ``"linear"`` that some tool has for this kind of map.
    """

    side: rotations.Side
    turns_bias: bool
    family: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ()

    # --- what the map is ---

    @property
    def scales_rows(self) -> bool:
        """Whether a map of the inputs also scales the rows, so that the map does not commute with maps of the outputs."""
        return False

    @property
    def asks_layer(self) -> bool:
        """Whether the map is another one on a convolution than on a linear layer, and the layer is not known."""
        return False

    @property
    @abstractmethod
    def block_size(self) -> int:
        """The size of the blocks."""

    @property
    @abstractmethod
    def defect(self) -> float:
        """How far the map is from a rotation: the largest ``‖RᵀR - I‖₂`` of a block."""

    @property
    @abstractmethod
    def angle(self) -> float:
        """The largest angle of a block in radians, 0 to π."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that decide the map, by name; equal maps of one family have equal tensors and :meth:`settings`."""

    def settings(self) -> str:
        """The settings that decide the map beside its tensors, as a text."""
        return f"{self.family}\0{self.side}\0{self.turns_bias}"

    def facts(self) -> dict[str, Any]:
        """Facts about the map, as plain values."""
        return {"map": self.family, "side": self.side, "block_size": self.block_size}

    @property
    def first_on_weight(self) -> bool:
        """Whether, of several maps of the inputs, the weight meets the first one first (``W·Ra·Rb``), and not the last (the live
        chain ``x·Ra·Rb``).
        """
        return False

    # --- where the map fits ---

    @abstractmethod
    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        """Raise :class:`ShapeError` unless the map fits a weight whose canonical shape is ``shape`` = ``(out, rest)``."""

    def for_layer(self, kernel: tuple[int, ...], module: str) -> WeightMap:  # noqa: ARG002 - most maps do not ask
        """The map as the layer at ``module`` has it; ``kernel`` is ``(kh, kw)`` for a convolution, else empty.

        Raises:
            FormatError: the live layer of such a module computes something that no weight computes.
        """
        return self

    def resolved(self) -> WeightMap:
        """The same map as the simplest kind: as a :class:`~oftsurgery.Rotation` where it is exactly one."""
        return self

    # --- what the map does ---

    @abstractmethod
    def fold_into(self, weight: Tensor) -> Tensor:
        """The weight with which a plain layer computes what the live layer computes with ``weight: (out, rest)``, in float32 or
        better.
        """

    @abstractmethod
    def unfold_from(self, weight: Tensor) -> Tensor:
        """The true inverse of :meth:`fold_into`.

        Raises:
            NonFiniteError: the map has no inverse.
        """

    def fold_bias(self, bias: Tensor) -> Tensor:
        """The bias of the plain layer; ``bias: (out,)`` itself unless the live layer turns the bias with the rows."""
        return self.fold_into(bias.unsqueeze(-1)).squeeze(-1) if self.turns_bias else bias

    def unfold_bias(self, bias: Tensor) -> Tensor:
        """The inverse of :meth:`fold_bias`."""
        return self.unfold_from(bias.unsqueeze(-1)).squeeze(-1) if self.turns_bias else bias

    # --- strength ---

    @abstractmethod
    def at_strength(self, strength: float, mode: str) -> WeightMap:
        """The map at another strength, by a mode of ``"angle"``, ``"linear"`` and :attr:`modes`.

        Raises:
            AdapterError: the map has no such mode, or the mode has no result for this map.
        """

    def no_mode(self, mode: str) -> AdapterError:
        """The error for a mode of strength that no tool has for this kind of map."""
        known = ", ".join(map(repr, (ANGLE, LINEAR, *self.modes)))
        message = f"the strength mode {mode!r} has no meaning for this kind of adapter ({self.family})"
        return AdapterError(message, remedy=f"choose one of {known} (strength_mode=…, --strength-mode)")


@dataclass(frozen=True, eq=False)
class MapOf(WeightMap):
    """A map that is made of another map, on the same side and in the same blocks.

    Attributes:
        of: the other map.
    """

    of: WeightMap

    @property
    def side(self) -> rotations.Side:  # type: ignore[override]
        return self.of.side

    @property
    def turns_bias(self) -> bool:  # type: ignore[override]
        return self.of.turns_bias

    @property
    def scales_rows(self) -> bool:
        return self.of.scales_rows

    @property
    def asks_layer(self) -> bool:
        return self.of.asks_layer

    @property
    def first_on_weight(self) -> bool:
        return self.of.first_on_weight

    @property
    def block_size(self) -> int:
        return self.of.block_size

    def tensors(self) -> Mapping[str, Tensor]:
        return self.of.tensors()

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        self.of.check_fits(shape, module)


def no_angle(family: str, why: str) -> AdapterError:
    """The error for a map that has no power."""
    message = f"the map ({family}) has no part of its angle: {why}"
    return AdapterError(message, remedy="choose strength_mode='linear' (--strength-mode linear), or strength 1")


def check_rows(rows: int, what: str, shape: tuple[int, int], module: str, *, dim: int = 0) -> None:
    """Raise :class:`ShapeError` unless a map of ``rows`` features fits the outputs (``dim`` 0) or inputs of a weight."""
    if shape[dim] != rows:
        over = ("output features", "input features")[dim]
        message = f"{what} cover {rows} {over}, but the weight has {shape[dim]}"
        raise ShapeError(message, module=module, shape=shape, remedy=TRAINED_ON)
