"""An adapter's exact change of a model's weights, and how much of the change another model holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import oftsurgery
from oftsurgery.formats import codecs
from oftsurgery.stores.layers import Layer
from oftsurgery.weights.fold import rotate_chain


def compute_in_float32(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights for bfloat16 arithmetic at the next CPU forward, as bitsandbytes
    does on AVX512-BF16 machines.

    The demo measures every model through this same forward, so that only the weights differ.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def weight(model: nn.Module, path: str) -> Tensor:
    """A layer's stored weight, dequantised to float32."""
    return codecs.decode(Layer(path, model.get_submodule(path)).read()[0])


@dataclass(frozen=True)
class Change:
    """An adapter's exact change of a base's weights, before any rounding; both fields are ``{path: weight}``."""

    base: dict[str, Tensor]
    exact: dict[str, Tensor]

    @classmethod
    def of(cls, base: nn.Module, adapter: Path) -> Change:
        modules = oftsurgery.load_adapter(adapter).modules
        before = {path: weight(base, path) for path in modules}
        return cls(before, {path: rotate_chain(before[path], [rotation]) for path, rotation in modules.items()})

    @property
    def moved(self) -> float:
        """How far the adapter moves the weights: ``‖exact - base‖ / ‖base‖`` over all weights."""
        return math.sqrt(self._square() / math.fsum(float(w.square().sum()) for w in self.base.values()))

    def kept(self, model: nn.Module) -> float:
        """The share of the change that a model's weights hold: ``⟨weight - base, exact - base⟩ / ‖exact - base‖²``."""
        there = (((weight(model, path) - self.base[path]) * d).sum() for path, d in self._differences())
        return math.fsum(map(float, there)) / self._square()

    def _differences(self) -> Iterator[tuple[str, Tensor]]:
        return ((path, self.exact[path] - self.base[path]) for path in self.base)

    def _square(self) -> float:
        return math.fsum(float(d.square().sum()) for _, d in self._differences())
