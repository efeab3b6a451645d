"""The protocol by which a fold sees a model, in memory or on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from oftsurgery.adapters.targets import Adaptable
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.records.record import FoldRecord

from .meaning import Meaning
from .ties import Ties
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class LayerInfo:
    """The facts about a layer that the planner needs.

    Attributes:
        kind: kind of the module; None if the kind is unknown, or the layer is idle.
        format: format in which the weight is rotated.
        identity: number that is equal for two paths to one module.
        idle: whether the owner reads the weight and never calls the layer.
        kernel: ``(kh, kw)`` of a convolution, else empty.
    """

    kind: Literal["linear", "embedding", "conv"] | None
    format: WeightFormat
    identity: int
    idle: bool = False
    kernel: tuple[int, ...] = ()


class Store(Protocol):
    """A model as named weights, in memory or on disk."""

    @property
    def what(self) -> str:
        """``"model"`` or ``"checkpoint"``, for messages."""

    @property
    def record(self) -> FoldRecord | None:
        """The record of what is folded in already, or None."""

    @property
    def ties(self) -> Ties:
        """The names that stand for one tensor."""

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
        """``{name in an adapter: name of the model's tensor}``, without names that the model lacks."""

    def meanings(self, names: Iterable[str]) -> Mapping[str, Meaning]:
        """``{module's name in an image tool's adapter: what the name means in the model}``, without names that mean nothing there."""

    def layer(self, name: str) -> LayerInfo:
        """The facts about the module whose weight is the tensor ``name``. Raises FormatError if it cannot be folded."""

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor is a weight that is stored in 4 or 8 bits."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def vocabulary(self, brought: Mapping[str, tuple[int, ...]]) -> Vocabulary | None:
        """The number of tokens by which the model's tensors have the shapes that an adapter brings, ``{name: shape}``; None if the
        model has this number already, or if no number gives the shapes.
        """

    def weight(self, name: str, home: WeightFormat) -> EncodedWeight | None:
        """A stored weight, or None. A plain weight is quantised to ``home`` if ``home`` is a quantised format."""

    def tensor(self, name: str) -> Tensor | None:
        """A plain tensor, or None."""
