"""Block rotations of a weight's rows, as image tools train them: kohya's ``networks.oft`` and ``networks.oft_flux``, LyCORIS'
diag-oft, and the finished matrices of LyCORIS 2.0.

A file holds matrices ``B``, whose ``B - Bᵀ`` (not half of it) is the generator ``Q``, before the limit of the tool. The live
layer computes ``rows(W') = g ⊙ blockdiag(K(Q)) rows(W)`` with the exact Cayley map ``K`` and the trained scale ``g``, if any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, NonFiniteError

from .rotation import Rotation
from .steps import Blocks, Scale, Step, StepMap, Stepped, cayley_blocks, mixed
from .weight_map import ANGLE, LINEAR, WeightMap, check_rows, no_angle

#: the tools add this number to a norm before they divide by it
_EPS = 1e-8


def limited_by_lycoris(q: Tensor, limit: float) -> Tensor:
    """LyCORIS' limit: one norm over all blocks ``q``; a limit of 0 is none. ComfyUI computes so too, with a limit of its own."""
    norm = float(torch.linalg.vector_norm(q)) + _EPS
    return q * (limit / norm) if 0 < limit < norm else q


def limited_by_kohya(q: Tensor, limit: float) -> Tensor:
    """kohya's limit: one norm over all blocks ``q``; a limit of 0 turns the rotation off."""
    norm = float(torch.linalg.vector_norm(q))
    return q * ((min(norm, limit) + _EPS) / (norm + _EPS))


def skew_of(b: Tensor) -> Tensor:
    """``B - Bᵀ`` in float64, ``(…, b, b)``."""
    b = b.detach().to("cpu", torch.float64)
    return b - b.mT


def checked_scale(scale: Tensor | None) -> Tensor | None:
    """A trained scale as ``(out,)`` float64."""
    return None if scale is None else scale.detach().to("cpu", torch.float64).reshape(-1)


def powered_scale(scale: Tensor | None, exponent: float) -> Tensor | None:
    """The scale to the power ``exponent``.

    Raises:
        AdapterError: a factor is not positive.
    """
    if scale is not None and bool((scale <= 0).any()):
        message = "the trained scale holds values that are not positive, and such values have no powers"
        raise AdapterError(message, tensor="rescale", remedy="choose strength_mode='linear', or strength 1")
    return None if scale is None else scale**exponent


@dataclass(frozen=True, eq=False)
class OutputBlocks(WeightMap):
    """A rotation of rows by LyCORIS' diag-oft or kohya's ``networks.oft``.

    Attributes:
        blocks: ``(n, b, b)`` as stored.
        alpha: the limit as stored; None where the adapter has no limit.
        tool: ``"lycoris"`` or ``"kohya"``, whose limits differ.
        scale: the trained scale of the rows, as stored; or None.
    """

    blocks: Tensor
    alpha: float | None
    tool: str
    scale: Tensor | None = None
    turns_bias: bool = False

    side = "output"
    family = "diag-oft"

    @property
    def modes(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.tool, "webui", "comfyui")

    @property
    def rows(self) -> int:
        """The number of rows that the blocks cover."""
        return self.blocks.shape[0] * self.blocks.shape[1]

    @property
    def block_size(self) -> int:
        return self.blocks.shape[-1]

    @property
    def defect(self) -> float:
        return self.resolved().defect

    @property
    def angle(self) -> float:
        return self.resolved().angle

    def generator(self, by: str = "") -> Tensor:
        """The limited ``Q: (n, b, b)`` float64, by the adapter's own tool or another tool."""
        q, alpha, by = skew_of(self.blocks), self.alpha, by or self.tool
        if by == "comfyui":  # which forgets the number of outputs
            return limited_by_lycoris(q, alpha or 0.0)
        if by == "kohya" and alpha is not None:
            return limited_by_kohya(q, alpha * self.rows)
        if by == "webui":  # kohya's limit, but 0 means none
            return limited_by_kohya(q, alpha * self.rows) if alpha else q
        return limited_by_lycoris(q, (alpha or 0.0) * self.rows)

    def _rotation(self, q: Tensor, scale: Tensor | None) -> Rotation:
        # the rotation on the output side folds to Rᵀ W, and K(-Q)ᵀ = K(Q)
        return Rotation(
            rotations.vector(-q), side="output", scale=scale, shared=False, whole=True, turns_bias=self.turns_bias
        )

    def resolved(self) -> WeightMap:
        scale = checked_scale(self.scale)
        if self.block_size == 1:  # a block of one row has no angle
            return StepMap(self, () if scale is None else (Scale(scale),), "")
        return self._rotation(self.generator(), scale)

    def fold_into(self, weight: Tensor) -> Tensor:
        return self.resolved().fold_into(weight)

    def unfold_from(self, weight: Tensor) -> Tensor:
        return self.resolved().unfold_from(weight)

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        n, b, _ = self.blocks.shape
        check_rows(n * b, f"{n} blocks of size {b}", shape, module)
        if self.scale is not None:
            check_rows(self.scale.numel(), "the factors of the scale", shape, module)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"oft_blocks": self.blocks} | ({} if self.scale is None else {"rescale": self.scale})

    def settings(self) -> str:
        return f"{super().settings()}\0{self.tool}\0{self.alpha!r}"

    def facts(self) -> dict[str, Any]:
        limit = None if self.alpha is None else self.alpha * self.rows
        return super().facts() | {"blocks": len(self.blocks), "limit": limit, "scale": self.scale is not None}

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode not in (ANGLE, LINEAR, *self.modes):
            raise self.no_mode(mode)
        scale = checked_scale(self.scale)
        if strength == 1 and mode not in ("comfyui", "webui"):
            return self
        if mode == ANGLE:
            scale = powered_scale(scale, strength)
            if self.block_size == 1:
                return StepMap(self, () if scale is None else (Scale(scale),), f"{strength!r} {mode}")
            return self._rotation(rotations.power_of(self.generator(), strength), scale)
        how = f"{strength!r} {mode}"
        factor = strength**2 if mode == "comfyui" else strength  # ComfyUI multiplies twice
        own = mode if mode in ("comfyui", "webui") else self.tool
        rotation: tuple[Step, ...] = (cayley_blocks(0, self.generator(own)),)
        scaled: tuple[Step, ...] = () if scale is None else (Scale(scale),)
        if mode in (LINEAR, "webui"):
            return replace(mixed(self, rotation + scaled, strength), how=how)
        mix = mixed(self, rotation, factor).made
        return StepMap(self, mix if mode == "comfyui" else mix + scaled, how)  # ComfyUI ignores the scale of diag-oft


@dataclass(frozen=True, eq=False)
class FluxParts(Stepped):
    """kohya's ``networks.oft_flux``: part i of the rows of a fused weight has blocks and a limit of its own.

    Attributes:
        parts: the blocks of the parts, ``(n, bᵢ, bᵢ)`` as stored.
        alpha: the limit as stored; the limit of a part is ``alpha`` times the rows of the part.
    """

    parts: tuple[Tensor, ...]
    alpha: float
    turns_bias: bool = False

    side = "output"
    family = "diag-oft of parts"
    modes = ("kohya",)

    @property
    def rows(self) -> int:
        return sum(len(part) * part.shape[-1] for part in self.parts)

    @property
    def block_size(self) -> int:
        return max(part.shape[-1] for part in self.parts)

    def generators(self) -> list[tuple[int, Tensor]]:
        """``(first row, limited Q)`` of each part."""
        found, start = [], 0
        for part in self.parts:
            rows = len(part) * part.shape[-1]
            found.append((start, limited_by_kohya(skew_of(part), self.alpha * rows)))
            start += rows
        return found

    def steps(self) -> tuple[Step, ...]:
        return tuple(cayley_blocks(0, q, start) for start, q in self.generators())

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        check_rows(self.rows, f"{len(self.parts)} parts", shape, module)

    def tensors(self) -> Mapping[str, Tensor]:
        return {f"oft_blocks.{i}": part for i, part in enumerate(self.parts)}

    def settings(self) -> str:
        return f"{super().settings()}\0{self.alpha!r}"

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode not in (ANGLE, LINEAR, *self.modes):
            raise self.no_mode(mode)
        if strength == 1:
            return self
        how = f"{strength!r} {mode}"
        made = []
        for start, q in self.generators():
            if mode == ANGLE:
                made.append(cayley_blocks(0, rotations.power_of(q, strength), start))
            else:
                made.append(cayley_blocks(0, q, start).mixed(strength))
        return StepMap(self, tuple(made), how)


@dataclass(frozen=True, eq=False)
class FinishedBlocks(Stepped):
    """LyCORIS 2.0: the finished matrices ``A`` with the scale in them; ``rows(W') = blockdiag(Aᵀ) rows(W)``.

    Attributes:
        matrices: ``(n, b, b)`` as stored.
    """

    matrices: Tensor
    turns_bias: bool = False

    side = "output"
    family = "finished diag-oft"
    modes = ("lycoris", "webui")

    @property
    def block_size(self) -> int:
        return self.matrices.shape[-1]

    def steps(self) -> tuple[Step, ...]:
        return (Blocks(0, self.matrices.detach().to("cpu", torch.float64).mT.contiguous()),)

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        n, b, _ = self.matrices.shape
        check_rows(n * b, f"{n} blocks of size {b}", shape, module)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"oft_diag": self.matrices}

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode in (LINEAR, *self.modes):
            return self if strength == 1 else replace(mixed(self, self.steps(), strength), how=f"{strength!r} {mode}")
        if mode != ANGLE:
            raise self.no_mode(mode)
        return self if strength == 1 else self._powered(strength)

    def _powered(self, strength: float) -> WeightMap:
        """The rows are scaled first and then rotated; both have powers."""
        m = self.matrices.detach().to("cpu", torch.float64).mT
        scale = torch.linalg.vector_norm(m, dim=-2)
        if bool((scale == 0).any()):
            raise no_angle(self.family, "a column of a block is zero")
        turned = m / scale.unsqueeze(-2)
        eye = torch.eye(m.shape[-1], dtype=torch.float64)
        if float((turned.mT @ turned - eye).abs().max()) > 1e-2:  # beyond what 16 bits round
            raise no_angle(self.family, "a block is no scaled rotation")
        try:
            nearest, _ = rotations.nearest_rotation(turned)
            q = rotations.power_of(rotations.generator_of(nearest), strength)
        except NonFiniteError as error:
            raise no_angle(self.family, error.message) from error
        steps = (Scale(scale.reshape(-1) ** strength), cayley_blocks(0, q))
        return StepMap(self, steps, f"{strength!r} {ANGLE}")
