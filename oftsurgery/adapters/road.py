"""peft's RoAd: scaled rotations of pairs of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .steps import Blocks, Permute, Step, StepMap, Stepped
from .weight_map import ANGLE, WeightMap, check_rows, no_angle


@dataclass(frozen=True, eq=False)
class Pairs(Stepped):
    """The outputs j and j + G/2 of each group of G change together, on the weight and the bias:
    ``y_j = c_j x_j - d_j x_{j+G/2}`` and ``y_{j+G/2} = c_{j+G/2} x_{j+G/2} + d_{j+G/2} x_j``, with c = α cos θ, d = α sin θ.

    Attributes:
        theta, alpha: ``road_theta`` and ``road_alpha``, as stored.
        variant: ``"road_1"`` (one value a pair), ``"road_2"`` (one a row) or ``"road_4"`` (two a row).
        group: G, the ``group_size``.
    """

    theta: Tensor
    alpha: Tensor
    variant: str
    group: int

    side = "output"
    turns_bias = True
    family = "RoAd"

    @property
    def rows(self) -> int:
        """The number of rows of the weight."""
        count = self.theta.numel()
        return {"road_1": 2 * count, "road_2": count, "road_4": count // 2}[self.variant]

    @property
    def block_size(self) -> int:
        return 2

    def _coefficients(self, exponent: float = 1.0) -> tuple[Tensor, Tensor]:
        """``(c, d)``, each ``(groups, 2, G/2)``: the first and the second members of the pairs."""
        alpha, theta = (t.detach().to("cpu", torch.float64).reshape(-1) for t in (self.alpha, self.theta))
        if exponent != 1:
            theta = exponent * torch.remainder(theta + torch.pi, 2 * torch.pi) - exponent * torch.pi
            alpha = alpha**exponent
        c, d = alpha * theta.cos(), alpha * theta.sin()
        half = self.group // 2
        if self.variant == "road_1":
            c, d = (x.reshape(-1, 1, half).expand(-1, 2, half) for x in (c, d))
        elif self.variant == "road_2":
            c, d = (x.reshape(-1, 2, half) for x in (c, d))
        else:  # of the 2G values of a group, the first G are for c and the others for d
            c, d = c.reshape(-1, 2, 2, half)[:, 0], d.reshape(-1, 2, 2, half)[:, 1]
        return c, d

    def _build(self, exponent: float = 1.0) -> tuple[Step, ...]:
        c, d = self._coefficients(exponent)
        rows = [torch.stack([c[:, 0], -d[:, 0]], -1), torch.stack([d[:, 1], c[:, 1]], -1)]
        matrices = torch.stack(rows, -2).reshape(-1, 2, 2)
        order = torch.arange(self.rows).reshape(-1, 2, self.group // 2).transpose(1, 2).reshape(-1)
        pairs = Permute(0, order)
        return pairs, Blocks(0, matrices), pairs.inverse()

    def steps(self) -> tuple[Step, ...]:
        return self._build()

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        check_rows(self.rows, f"the pairs in groups of {self.group}", shape, module)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"road_alpha": self.alpha, "road_theta": self.theta}

    def settings(self) -> str:
        return f"{super().settings()}\0{self.variant}\0{self.group}"

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode != ANGLE:
            return super().at_strength(strength, mode)
        if strength == 1:
            return self
        if self.variant != "road_1" or bool((self.alpha <= 0).any()):
            raise no_angle(f"{self.family}, {self.variant}", "its pairs are no scaled rotations")
        return StepMap(self, self._build(strength), f"{strength!r} {mode}")
