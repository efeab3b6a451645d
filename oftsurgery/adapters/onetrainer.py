"""OneTrainer's OFT: a truncated series of a rotation of the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oftsurgery import rotations

from .rotation import Cayley, Rotation, check_blocks
from .weight_map import LINEAR, WeightMap


@dataclass(frozen=True, eq=False)
class OneTrainerBlocks(WeightMap):
    """``R = I + 2Q + 2Q² + 2Q³ + Q⁴``; linear layers have ``W' = W · blockdiag(R)ᵀ``, convolutions ``rows(W) · blockdiag(R)``.

    Attributes:
        vectors: ``(r, b(b-1)/2)`` as stored, the upper triangles of Q.
        scaled: whether the stored values are divided by ``2√(b-1)`` (``scaled_oft``).
        first_days: the series of OneTrainer's first two days, ``I + 2ΣQᵏ`` for k ≤ 4.
        convolution: whether the module is a convolution; None where the layer is not known.
    """

    vectors: Tensor
    scaled: bool = False
    first_days: bool = False
    convolution: bool | None = None

    side = "input"
    turns_bias = False
    family = "OFT of OneTrainer"
    modes = ("oftv2-node",)

    @property
    def asks_layer(self) -> bool:
        return self.convolution is None

    @property
    def block_size(self) -> int:
        return rotations.block_size_of(self.vectors.shape[-1])

    @property
    def defect(self) -> float:
        return self.resolved().defect

    @property
    def angle(self) -> float:
        return self.resolved().angle

    def for_layer(self, kernel: tuple[int, ...], module: str) -> WeightMap:  # noqa: ARG002 - any kernel will do
        return replace(self, convolution=bool(kernel))

    def resolved(self) -> Rotation:
        v = self.vectors.detach().to("cpu", torch.float64)
        if self.scaled:
            v = v / (2 * math.sqrt(self.block_size - 1))
        # R(Q)ᵀ = R(-Q)
        cayley = Cayley(terms=5, since_0_18=not self.first_days)
        return Rotation(-v if self.convolution else v, cayley, "input", shared=len(v) == 1)

    def fold_into(self, weight: Tensor) -> Tensor:
        return self.resolved().fold_into(weight)

    def unfold_from(self, weight: Tensor) -> Tensor:
        return self.resolved().unfold_from(weight)

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        n = len(self.vectors)
        check_blocks(n, self.block_size, "input", shape, module, shared=n == 1)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"oft_R": self.vectors}

    def settings(self) -> str:
        return f"{super().settings()}\0{self.scaled}\0{self.first_days}\0{bool(self.convolution)}"

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"blocks": len(self.vectors), "scaled_oft": self.scaled}

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode in self.modes:  # the node knows today's series alone
            return replace(self, first_days=False).at_strength(strength, LINEAR)
        return self if strength == 1 else self.resolved().at_strength(strength, mode)
