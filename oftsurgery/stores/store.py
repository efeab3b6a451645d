"""What a fold needs to know of a model, wherever it lies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from oftsurgery.adapters.targets import Adaptable
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.records.record import FoldRecord

from .ties import Ties


@dataclass(frozen=True)
class LayerInfo:
    """What the planner needs to know of a layer.

    Attributes:
        kind: of module; None where that is not known, or the layer is idle.
        format: that its weight is rotated in.
        identity: two paths to one module share it.
        idle: its owner reads the weight and never calls the layer.
    """

    kind: Literal["linear", "embedding", "conv"] | None
    format: WeightFormat
    identity: int
    idle: bool = False


class Store(Protocol):
    """A model as named weights, wherever it lies."""

    @property
    def what(self) -> str:
        """``"model"`` or ``"checkpoint"``, for messages."""

    @property
    def record(self) -> FoldRecord | None:
        """Of what is folded in already."""

    @property
    def ties(self) -> Ties:
        """Which of its tensors are one."""

    @property
    def names(self) -> Collection[str]:
        """Paths of all modules, in the model's order."""

    @property
    def tensors(self) -> Collection[str]:
        """Names of all tensors."""

    @property
    def adaptable(self) -> Adaptable:
        """Modules that peft could put an adapter on."""

    def locate(self, names: Iterable[str]) -> Mapping[str, str]:
        """``{name in an adapter: name of the model's tensor}``, without those that there are not."""

    def layer(self, name: str) -> LayerInfo:
        """Of the module whose weight is the tensor ``name``. Raises FormatError where it cannot be folded."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""

    def weight(self, name: str, home: WeightFormat) -> EncodedWeight | None:
        """A stored weight, quantised to ``home`` where it is plain and that is not; None where there is none."""

    def tensor(self, name: str) -> Tensor | None:
        """A plain tensor, or None."""
