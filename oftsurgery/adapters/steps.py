"""A :class:`Stepped` map is a sequence of simple steps on a weight: block-diagonal products, permutations, scales.

Each family of adapters that is no :class:`~oftsurgery.Rotation` states its steps; how the steps change a weight, and how they
lead back, stands here alone. All matrices are float64; a weight is changed in float32 or better.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import NonFiniteError

from .weight_map import LINEAR, MapOf, WeightMap


class Step(Protocol):
    """One step on a weight of two dimensions."""

    def apply(self, w: Tensor) -> Tensor:
        """The weight after the step."""

    def inverse(self) -> Step:
        """The step that leads back.

        Raises:
            NonFiniteError: no step leads back.
        """


@dataclass(frozen=True, eq=False)
class Blocks:
    """``blockdiag(matrices) · w`` over the rows from ``start`` on (``dim`` 0), or ``w · blockdiag(matrices)`` over the columns.

    Attributes:
        dim: 0 for rows, 1 for columns.
        matrices: ``(n, b, b)`` float64; over columns one matrix serves all columns.
        start: the first row.
        generator: the ``Q: (n, b, b)`` of which ``matrices`` are the Cayley map, or that map mixed with the identity; None for other
            matrices.
        mix: the strength of the mix with the identity.
    """

    dim: int
    matrices: Tensor
    start: int = 0
    generator: Tensor | None = None
    mix: float = 1.0

    def apply(self, w: Tensor) -> Tensor:
        m = self.matrices.to(w)
        if self.dim == 1:
            return rotations.apply_blocks(w, m)
        n, b, _ = m.shape
        end = self.start + n * b
        turned = torch.bmm(m, w[self.start : end].reshape(n, b, -1)).reshape(n * b, -1)
        return torch.cat([w[: self.start], turned, w[end:]]) if n * b < len(w) else turned

    def inverse(self) -> Blocks:
        return replace(self, matrices=rotations.inverse_blocks(self.matrices), generator=None)

    def mixed(self, strength: float) -> Blocks:
        """``(1 - strength) I + strength · matrices``."""
        eye = torch.eye(self.matrices.shape[-1], dtype=torch.float64)
        made = (1 - strength) * eye + strength * self.matrices
        return replace(self, matrices=made, mix=strength, generator=self.generator if self.mix == 1 else None)

    def figures(self) -> tuple[float, float]:
        """The largest ``‖RᵀR - I‖₂`` and the largest angle of a block."""
        if self.generator is not None:
            return mixed_figures(rotations.largest_angle(self.generator), self.mix)
        m = self.matrices
        eye = torch.eye(m.shape[-1], dtype=m.dtype)
        defect = float(torch.linalg.matrix_norm(m.mT @ m - eye, ord=2).max())
        return defect, float(torch.linalg.eigvals(m).angle().abs().max())


def cayley_blocks(dim: int, q: Tensor, start: int = 0) -> Blocks:
    """The blocks of the Cayley map of ``q: (n, b, b)``."""
    return Blocks(dim, rotations.cayley(q), start, q)


def mixed_figures(angle: float, strength: float) -> tuple[float, float]:
    """The defect and the angle of ``(1 - strength) I + strength · R`` for a rotation ``R`` by ``angle``."""
    s = strength
    defect = abs(2 * s * (1 - s)) * (1 - math.cos(angle))
    return defect, abs(math.atan2(s * math.sin(angle), 1 - s + s * math.cos(angle)))


@dataclass(frozen=True, eq=False)
class Permute:
    """The rows (``dim`` 0) or columns (1) in another order: ``new[i] = old[index[i]]``."""

    dim: int
    index: Tensor

    def apply(self, w: Tensor) -> Tensor:
        return w.index_select(self.dim, self.index.to(w.device))

    def inverse(self) -> Permute:
        return replace(self, index=torch.argsort(self.index))


@dataclass(frozen=True, eq=False)
class Scale:
    """Each row (``dim`` 0) or column (1) times its factor."""

    factors: Tensor
    dim: int = 0

    def apply(self, w: Tensor) -> Tensor:
        return w * self.factors.to(w).unsqueeze(1 - self.dim)

    def inverse(self) -> Scale:
        if bool((self.factors == 0).any()):
            message = "a scale of the adapter holds a zero, which no inverse undoes"
            raise NonFiniteError(message, remedy="restore from the base model instead")
        return replace(self, factors=1 / self.factors.to(torch.float64))


@dataclass(frozen=True, eq=False)
class Reflect:
    """The reflection ``w · (I - 2 U Uᵀ)`` of the columns, for orthonormal columns of ``u: (columns, k)``."""

    u: Tensor

    def apply(self, w: Tensor) -> Tensor:
        u = self.u.to(w)
        return w - 2 * (w @ u) @ u.t()

    def inverse(self) -> Reflect:
        return self


@dataclass(frozen=True, eq=False)
class Relaid:
    """Steps on the same values laid out as ``(columns, rows)``, without transposing: as peft ≤ 0.13 reshapes a convolution."""

    steps: tuple[Step, ...]

    def apply(self, w: Tensor) -> Tensor:
        return apply_all(self.steps, w.reshape(w.shape[1], w.shape[0])).reshape(w.shape)

    def inverse(self) -> Relaid:
        return Relaid(inverse_all(self.steps))


@dataclass(frozen=True, eq=False)
class Mixed:
    """``w + strength · (steps(w) - w)``.

    Attributes:
        dim: the side of the weight that the steps are on; None where the steps are on both.
    """

    steps: tuple[Step, ...]
    strength: float
    dim: int | None

    def apply(self, w: Tensor) -> Tensor:
        return w + self.strength * (apply_all(self.steps, w) - w)

    def inverse(self) -> Step:
        if self.dim is None:
            message = "a linear mix of a weight and of its rotated and scaled form has no inverse of its own"
            raise NonFiniteError(message, remedy="restore from the base model, or with the fold's undo record")
        return _Solved(self, self.dim)


@dataclass(frozen=True, eq=False)
class _Solved:
    """The inverse of a step on one side, by the step's whole matrix."""

    step: Step
    dim: int

    def apply(self, w: Tensor) -> Tensor:
        matrix = self.step.apply(torch.eye(w.shape[self.dim], dtype=torch.float64, device=w.device))
        inverse = rotations.inverse_blocks(matrix.unsqueeze(0))[0].to(w)
        return inverse @ w if self.dim == 0 else w @ inverse

    def inverse(self) -> Step:
        return self.step


def apply_all(steps: Sequence[Step], w: Tensor) -> Tensor:
    """The weight after all steps."""
    for step in steps:
        w = step.apply(w)
    return w


def inverse_all(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps that lead back."""
    return tuple(step.inverse() for step in reversed(steps))


class Stepped(WeightMap, ABC):
    """A map that is a sequence of steps."""

    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """The steps of the map, computed anew."""

    def resolved(self) -> StepMap:
        """The map with its steps, which are large: an adapter does not keep the steps of its modules."""
        with rotations.full_precision("cpu"):
            return StepMap(self, self.steps(), "")

    def fold_into(self, weight: Tensor) -> Tensor:
        return self.resolved().fold_into(weight)

    def unfold_from(self, weight: Tensor) -> Tensor:
        return self.resolved().unfold_from(weight)

    @cached_property
    def _figures(self) -> tuple[float, float]:
        return figures_of(self.steps())

    @property
    def defect(self) -> float:
        return self._figures[0]

    @property
    def angle(self) -> float:
        return self._figures[1]

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode != LINEAR:
            raise self.no_mode(mode)
        return self if strength == 1 else mixed(self, self.steps(), strength)


def figures_of(steps: Sequence[Step]) -> tuple[float, float]:
    """The largest ``‖RᵀR - I‖₂`` and the largest angle of the blocks in ``steps``. Of a mix, whose blocks are no rotations, the
    figures are bounds by the sum of its factors' angles.
    """
    defect = angle = 0.0
    for step in steps:
        if isinstance(step, Blocks):
            own = step.figures()
            defect, angle = max(defect, own[0]), max(angle, own[1])
        elif isinstance(step, Reflect):
            angle = math.pi
        elif isinstance(step, Relaid):
            inner = figures_of(step.steps)
            defect, angle = max(defect, inner[0]), max(angle, inner[1])
        elif isinstance(step, Mixed):
            inner = figures_of(step.steps)
            whole = min(math.pi, sum(figures_of([s])[1] for s in step.steps))
            own = mixed_figures(whole, step.strength)
            defect, angle = max(defect, inner[0], own[0]), max(angle, own[1])
    return defect, angle


@dataclass(frozen=True, eq=False)
class StepMap(MapOf, Stepped):
    """A map that is given by its steps: another map at a strength by which it is no rotation.

    Attributes:
        of: the map at strength 1.
        made: the steps.
        how: the strength and its mode, in words.
    """

    made: tuple[Step, ...] = field(repr=False)
    how: str

    family = "steps"

    def steps(self) -> tuple[Step, ...]:
        return self.made

    def resolved(self) -> StepMap:
        return self

    def fold_into(self, weight: Tensor) -> Tensor:
        return apply_all(self.made, weight.to(torch.promote_types(weight.dtype, torch.float32)))

    def unfold_from(self, weight: Tensor) -> Tensor:
        return apply_all(self.back(), weight.to(torch.promote_types(weight.dtype, torch.float32)))

    def back(self) -> tuple[Step, ...]:
        """The steps of :meth:`unfold_from`.

        Raises:
            NonFiniteError: no steps lead back.
        """
        with rotations.full_precision("cpu"):
            return inverse_all(self.made)

    def settings(self) -> str:
        return f"{self.of.settings()}\0{self.how}"

    def facts(self) -> dict[str, Any]:
        return self.of.facts() | {"strength": self.how}


def mixed(of: WeightMap, steps: Sequence[Step], strength: float) -> StepMap:
    """``W + strength · (steps(W) - W)`` of the map ``of``, block by block where the steps are one block-diagonal matrix."""
    how = f"{strength!r} {LINEAR}"
    one = block_matrix(steps)
    if one is not None:
        return StepMap(of, (one.mixed(strength),), how)
    return StepMap(of, (Mixed(tuple(steps), strength, dim_of(steps)),), how)


def block_matrix(steps: Sequence[Step]) -> Blocks | None:
    """The one block-diagonal matrix that the steps are: blocks, whose rows may be scaled; else None."""
    blocks, *rest = steps or (None,)
    if not isinstance(blocks, Blocks) or blocks.start != 0:
        return None
    if not rest:
        return blocks
    scale = rest[0]
    if len(rest) == 1 and isinstance(scale, Scale):
        n, b, _ = blocks.matrices.shape
        if blocks.dim == scale.dim == 0 and len(scale.factors) == n * b:
            return replace(
                blocks, matrices=scale.factors.to(torch.float64).reshape(n, b, 1) * blocks.matrices, generator=None
            )
    return None


def dim_of(steps: Sequence[Step]) -> int | None:
    """The side of the weight that all steps are on; None where they are on both."""
    dims = {1 if isinstance(step, Reflect) else getattr(step, "dim", None) for step in steps}
    return dims.pop() if len(dims) == 1 else None
