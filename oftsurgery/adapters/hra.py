"""peft's HRA: a product of Householder reflections of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .steps import Reflect, Step, Stepped
from .weight_map import ANGLE, WeightMap, check_rows, no_angle


@dataclass(frozen=True, eq=False)
class Householder(Stepped):
    """``rows(W') = rows(W) · H₀H₁ ⋯ H_{r-1}``, ``Hᵢ = I - 2uᵢuᵢᵀ/‖uᵢ‖²``; or with Gram-Schmidt ``I - 2UUᵀ`` at once.

    Attributes:
        u: ``hra_u``, ``(in, r)``.
        orthogonal: whether the columns are made orthonormal first (``apply_GS``).
    """

    u: Tensor
    orthogonal: bool = False

    side = "input"
    turns_bias = False
    family = "HRA"
    first_on_weight = True

    @property
    def block_size(self) -> int:
        return self.u.shape[0]

    def steps(self) -> tuple[Step, ...]:
        columns = self.u.detach().to("cpu", torch.float64).unbind(1)
        units: list[Tensor] = []
        for column in columns:
            for unit in units if self.orthogonal else []:
                column = column - (unit @ column) * unit
            units.append(column / torch.linalg.vector_norm(column))
        if self.orthogonal:
            return (Reflect(torch.stack(units, dim=1)),)
        return tuple(Reflect(unit.unsqueeze(1)) for unit in units)

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        check_rows(self.u.shape[0], "the reflections", shape, module, dim=1)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"hra_u": self.u}

    def settings(self) -> str:
        return f"{super().settings()}\0{self.orthogonal}"

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode == ANGLE and strength != 1:
            raise no_angle(self.family, "a reflection has no angle")
        return self if strength == 1 and mode == ANGLE else super().at_strength(strength, mode)
