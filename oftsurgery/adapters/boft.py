"""BOFT: a product of block rotations between permutations (butterflies), by LyCORIS on the rows and by peft on the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError

from .output_blocks import checked_scale, limited_by_kohya, limited_by_lycoris, powered_scale, skew_of
from .steps import Blocks, Mixed, Permute, Relaid, Scale, Step, StepMap, Stepped, cayley_blocks, mixed
from .weight_map import ANGLE, LINEAR, WeightMap, check_rows

#: how a factor is weakened, by the factor's number
Weaken = Callable[[int, Blocks], Blocks]


def _linearly(strength: float) -> Weaken:
    return lambda _, blocks: blocks.mixed(strength)


@dataclass(frozen=True, eq=False)
class LycorisBoft(Stepped):
    """LyCORIS' BOFT: ``rows(W') = g ⊙ F_{m-1} ⋯ F₁F₀ rows(W)`` with ``Fᵢ = Pᵢᵀ blockdiag(K(-Qᵢ)) Pᵢ``: transposed against
    diag-oft. Each Pᵢ interleaves the halves of groups of ``2ⁱ·b`` rows, F₀ too.

    Attributes:
        blocks: ``(m, n, b, b)`` as stored.
        alpha: the limit as stored; None where the adapter has no limit.
        scale: the trained scale of the rows, as stored; or None.
    """

    blocks: Tensor
    alpha: float | None
    scale: Tensor | None = None
    turns_bias: bool = False

    side = "output"
    family = "BOFT"
    modes = ("lycoris", "lycoris-2", "webui", "comfyui")

    @property
    def rows(self) -> int:
        return self.blocks.shape[1] * self.blocks.shape[-1]

    @property
    def block_size(self) -> int:
        return self.blocks.shape[-1]

    def generator(self, by: str = "lycoris") -> Tensor:
        """The limited ``Q: (m, n, b, b)``; one norm over all factors."""
        q, alpha = skew_of(self.blocks), self.alpha or 0.0
        if by == "webui":
            return limited_by_kohya(q, alpha * self.rows) if alpha else q
        return limited_by_lycoris(q, alpha if by == "comfyui" else alpha * self.rows)

    def _factors(self, q: Tensor, weaken: Weaken | None = None) -> tuple[Step, ...]:
        steps: list[Step] = []
        for i, q_i in enumerate(q):
            blocks = cayley_blocks(0, -q_i)
            order = Permute(0, rotations.interleaved(self.rows, 2**i * self.block_size // 2))
            steps += [order, blocks if weaken is None else weaken(i, blocks), order.inverse()]
        return tuple(steps)

    def _scaled(self) -> tuple[Step, ...]:
        scale = checked_scale(self.scale)
        return () if scale is None else (Scale(scale),)

    def steps(self) -> tuple[Step, ...]:
        return self._factors(self.generator()) + self._scaled()

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        m, n, b, _ = self.blocks.shape
        check_rows(n * b, f"{m} factors of {n} blocks of size {b}", shape, module)
        if self.scale is not None:
            check_rows(self.scale.numel(), "the factors of the scale", shape, module)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"oft_blocks": self.blocks} | ({} if self.scale is None else {"rescale": self.scale})

    def settings(self) -> str:
        return f"{super().settings()}\0{self.alpha!r}"

    def facts(self) -> dict[str, Any]:
        limit = None if self.alpha is None else self.alpha * self.rows
        return super().facts() | {"factors": len(self.blocks), "limit": limit, "scale": self.scale is not None}

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode not in (ANGLE, LINEAR, *self.modes):
            raise self.no_mode(mode)
        if strength == 1 and mode not in ("comfyui", "webui"):
            return self
        how = f"{strength!r} {mode}"
        if mode == ANGLE:
            q = torch.stack([rotations.power_of(q_i, strength) for q_i in self.generator()])
            scale = powered_scale(checked_scale(self.scale), strength)
            return replace(self, blocks=q / 2, alpha=0.0, scale=scale)  # skew_of doubles skew matrices
        if mode == "lycoris":
            return StepMap(self, self._factors(self.generator(), _linearly(strength)) + self._scaled(), how)
        if mode == "lycoris-2":  # LyCORIS 2.x weakens the first factor alone

            def first(i: int, blocks: Blocks) -> Blocks:
                return blocks.mixed(strength) if i == 0 else blocks

            return StepMap(self, self._factors(self.generator(), first) + self._scaled(), how)
        if mode == "comfyui":
            if self.alpha is None:
                message = "ComfyUI leaves a BOFT adapter without alpha unapplied, so this strength mode has no result"
                raise AdapterError(message, tensor="alpha", remedy="choose strength_mode='lycoris' (--strength-mode)")
            weaken = None if strength == 1 else _linearly(strength)
            inner = self._factors(self.generator("comfyui"), weaken) + self._scaled()
            return StepMap(self, (Mixed(inner, strength, 0),), how)
        by = "webui" if mode == "webui" else "lycoris"
        return replace(mixed(self, self._factors(self.generator(by)) + self._scaled(), strength), how=how)


@dataclass(frozen=True, eq=False)
class PeftBoft(Stepped):
    """peft's BOFT: ``rows(W') = boft_s ⊙ rows(W) Bᵀ`` with ``B = B_{N-1} ⋯ B₀`` and ``Bᵢ = Pᵢ blockdiag(K(Qᵢ)) Pᵢᵀ``, where Qᵢ is the
    skew part of the stored matrices (half of ``A - Aᵀ``).

    Attributes:
        blocks: ``boft_R``, ``(N, n, b, b)``.
        scale: ``boft_s`` as stored: ``(out, 1)``, or ``(1, out)`` for a convolution.
        relaid: whether the module is a convolution as peft ≤ 0.13 lays it out.
    """

    blocks: Tensor
    scale: Tensor
    relaid: bool = False

    side = "input"
    family = "BOFT of peft"
    turns_bias = False
    scales_rows = True
    first_on_weight = True

    @property
    def features(self) -> int:
        return self.blocks.shape[1] * self.blocks.shape[-1]

    @property
    def block_size(self) -> int:
        return self.blocks.shape[-1]

    def _build(self, exponent: float = 1.0) -> tuple[Step, ...]:
        side, scale = (0, 1) if self.relaid else (1, 0)
        steps: list[Step] = []
        for i, a in enumerate(self.blocks):
            q = skew_of(a) / 2
            q = q if exponent == 1 else rotations.power_of(q, exponent)
            order = torch.arange(self.features)
            if len(self.blocks) > 1:
                order = rotations.even_chunks_first(self.features, self.block_size * 2**i, self.block_size // 2)
            # Bᵢ x over the rows, x Bᵢᵀ over the columns
            turned = cayley_blocks(side, q if side == 0 else -q)
            steps += [Permute(side, torch.argsort(order)), turned, Permute(side, order)]
        factors = powered_scale(checked_scale(self.scale), exponent) if exponent != 1 else checked_scale(self.scale)
        assert factors is not None  # noqa: S101 - the adapter has a scale
        steps.append(Scale(factors, scale))
        return (Relaid(tuple(steps)),) if self.relaid else tuple(steps)

    def steps(self) -> tuple[Step, ...]:
        return self._build()

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        n, b = self.blocks.shape[1:3]
        check_rows(n * b, f"{n} blocks of size {b}", shape, module, dim=1)
        check_rows(self.scale.numel(), "the factors of boft_s", shape, module)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"boft_R": self.blocks, "boft_s": self.scale}

    def settings(self) -> str:
        return f"{super().settings()}\0{self.relaid}"

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"factors": len(self.blocks), "scale": True}

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode == ANGLE and strength != 1:
            return StepMap(self, self._build(strength), f"{strength!r} {mode}")
        return self if mode == ANGLE else super().at_strength(strength, mode)
