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

from .stored import Entries, Stored


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
    """The code of one weight's :class:`PackageFormat`. Kernels know no such format, and the weight has one rounding, the package's."""

    name = "package"

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
        assert self._stored.quantiser is not None  # noqa: S101 - the plan refuses other weights
        made = self._stored.quantiser.encode(weight.to(torch.float32))
        encoded = EncodedWeight(f, made)
        finite(self.decode(encoded), f"the weight is not finite in {f.label}", f)
        return encoded

    def decode(self, encoded: EncodedWeight) -> Tensor:
        return self.values(encoded).to(torch.float32)

    def values(self, encoded: EncodedWeight) -> Tensor:
        """The weight in its own dtype, as its package dequantises it."""
        self.check(encoded)
        return self._stored.decode(encoded.tensors).contiguous()

    def nearest_codes(self, values: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor of codes nearest to ``values``, with the scales and zeros in ``tensors``."""
        assert self._stored.quantiser is not None  # noqa: S101 - the plan refuses other weights
        return self._stored.quantiser.codes(values, tensors)

    @property
    def predictable(self) -> bool:
        """Whether :meth:`nearest_codes` knows the codes."""
        return self._stored.quantiser is not None

    @property
    def bits(self) -> int:
        """Bits of a code in the tensor of codes."""
        return 0 if self._stored.quantiser is None else self._stored.quantiser.bits

    def hashed(self, encoded: EncodedWeight) -> Mapping[str, Tensor]:
        return {"weight": self.values(encoded)}

    def prediction_inputs(self, encoded: EncodedWeight) -> dict[str, Tensor]:
        return dict(encoded.tensors)

    def tensor_names(self, weight: str) -> dict[str, str]:
        return dict(self._stored.tensors)
