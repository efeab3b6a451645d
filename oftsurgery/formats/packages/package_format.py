"""A :class:`PackageFormat` is the format of a weight that stays in another package's layout: each weight has a format of its own, which
:class:`OfPackage` serves as the other storage formats serve theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from oftsurgery.formats.base import Format, Layout, finite
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat

from .stored import Entries, Quantiser, Stored


@dataclass(frozen=True)
class PackageFormat(WeightFormat):
    """How another package stores one weight; ``codec`` is its ``quant_method``.

    Attributes:
        stored: the weight as it is stored.
        entries: ``{local name: (dtype, shape)}``.
    """

    stored: Stored | None = None
    entries: Entries = field(default_factory=lambda: MappingProxyType({}), hash=False)

    @property
    def kind(self) -> OfPackage:
        assert self.stored is not None  # noqa: S101 - each such format has one
        return OfPackage(self.stored, self.entries)

    @property
    def label(self) -> str:
        return "" if self.stored is None else self.stored.label

    @property
    def single(self) -> WeightFormat:
        return self


class OfPackage(Format):
    """The code of one weight's :class:`PackageFormat`. The kernels know no such format."""

    name = "package"
    roundings = ("nearest", "preserve")
    has_levels = False

    def __init__(self, stored: Stored, entries: Entries) -> None:
        self._stored, self._entries = stored, entries

    def layout(self, f: WeightFormat) -> Layout:
        return dict(self._entries)

    def check(self, encoded: EncodedWeight) -> None:
        names = tuple(self._entries)
        for name, tensor in zip(names, encoded.require(*names), strict=True):
            shape = self._entries[name][1]
            if tuple(tensor.shape) != shape:
                raise encoded.misfit("the tensor does not fit the format", name, tuple(tensor.shape), shape)

    def encode(self, weight: Tensor, f: WeightFormat, rounding: str) -> EncodedWeight:
        return self._finite(EncodedWeight(f, self.quantiser.encode(weight.to(torch.float32))))

    def with_numbers(self, base: EncodedWeight, numbers: Tensor) -> EncodedWeight:
        """``base`` with codes for ``numbers``, and with its scales and zeros."""
        return self._finite(EncodedWeight(base.format, {**base.tensors, "weight": self.quantiser.stored(numbers)}))

    def _finite(self, encoded: EncodedWeight) -> EncodedWeight:
        finite(self.decode(encoded), f"the weight is not finite in {encoded.format.label}", encoded.format)
        return encoded

    def decode(self, encoded: EncodedWeight) -> Tensor:
        return self.values(encoded).to(torch.float32)

    def values(self, encoded: EncodedWeight) -> Tensor:
        """The weight in its own dtype, as its package dequantises it."""
        self.check(encoded)
        return self._stored.decode(encoded.tensors).contiguous()

    @property
    def predictable(self) -> bool:
        """Whether the package's quantiser is known."""
        return self._stored.quantiser is not None

    @property
    def quantiser(self) -> Quantiser:
        assert self._stored.quantiser is not None  # noqa: S101 - the plan refuses other weights
        return self._stored.quantiser

    def step_error(self, encoded: EncodedWeight, exact: Tensor) -> float:
        steps = self.quantiser.grid(encoded.tensors).steps(exact.to(torch.float32)).expand(exact.shape)
        norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
        return float(steps.to(torch.float64).square().sum() / 12) ** 0.5 / norm if norm else 0.0

    def hashed(self, encoded: EncodedWeight) -> Mapping[str, Tensor]:
        return {"weight": self.values(encoded)}

    def prediction_inputs(self, encoded: EncodedWeight) -> dict[str, Tensor]:
        return dict(encoded.tensors)

    def tensor_names(self, weight: str) -> dict[str, str]:
        return dict(self._stored.tensors)
