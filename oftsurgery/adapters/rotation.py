"""One module's rotation: its generator, the map from the generator to the rotation, and the weights that it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, FormatError, NonFiniteError, ShapeError

from .steps import Blocks, Mixed, Scale, Step, StepMap, mixed
from .weight_map import ANGLE, LINEAR, TRAINED_ON, WeightMap


@dataclass(frozen=True)
class Cayley:
    """The map that takes the generator ``Q`` to ``R``.

    >>> oftsurgery.Cayley().exact, oftsurgery.Cayley(terms=5).exact
    (True, False)

    Attributes:
        terms: None for the exact map ``(I-Q)(I+Q)⁻¹``, else the number of terms of the truncated Neumann series (of the
            inverse: mind the sign).
        since_0_18: the series of peft ≥ 0.18 rather than the series of 0.16 and 0.17.
    """

    terms: int | None = None
    since_0_18: bool = True

    @property
    def exact(self) -> bool:
        return self.terms is None

    def __call__(self, q: Tensor) -> Tensor:
        """``R: (n, b, b)`` from skew-symmetric ``q: (n, b, b)``; differentiable."""
        if self.terms is None:
            return rotations.cayley(q)
        return rotations.neumann(q, self.terms, since_0_18=self.since_0_18)


@dataclass(frozen=True, eq=False)
class Rotation(WeightMap):
    """One module's rotation.

    >>> quarter = oftsurgery.Rotation(generator=torch.tensor([[-1.0]]))       # one block, 2 × 2: a quarter turn
    >>> quarter.blocks.tolist(), round(quarter.angle, 4)
    ([[[0.0, 1.0], [-1.0, 0.0]]], 1.5708)

    Attributes:
        generator: ``(n, b(b-1)/2)``, the upper triangles of the skew-symmetric generators, COFT's clamp applied.
        cayley: the map from generator to rotation.
        side: ``"input"``, ``"output"`` (peft ≤ 0.13) or ``"embedding"``; :mod:`oftsurgery.rotations` says what each side
            folds to.
        scale: ``(out,)``, the ``oft_s`` of peft 0.14 and 0.15, which multiplies the outputs before the bias; or None.
        shared: whether a single row serves all blocks (peft's ``block_share``); if not, the one block of a single row must
            cover the features alone.
        whole: on the output side, whether a last block that reaches beyond the outputs is refused. peft ≤ 0.13 crops
            such a block; a cropped block is not a rotation, and its products and powers are not cropped blocks.
        turns_bias: on the output side, whether the live layer turns the bias with the rows of the weight.
    """

    generator: Tensor
    cayley: Cayley = Cayley()
    side: rotations.Side = "input"
    scale: Tensor | None = None
    shared: bool = True
    whole: bool = False
    turns_bias: bool = False

    family = "block rotation"

    @property
    def block_size(self) -> int:
        return rotations.block_size_of(self.generator.shape[-1])

    @property
    def blocks(self) -> Tensor:
        """``(n, b, b)`` float64: the live layer computes ``x' = x · blockdiag(blocks)``. Each access computes the blocks anew.

        Raises:
            NonFiniteError: the map has no finite result.
        """
        q = rotations.skew(self.generator.detach().to(torch.float64))
        with rotations.full_precision(q.device.type):
            return self.cayley(q)

    @cached_property
    def _eigenvalues(self) -> Tensor:
        """Half of the eigenvalues of the blocks, complex128; the other half are their conjugates."""
        theta = rotations.eigen_angles(rotations.skew(self.generator.detach().to(torch.float64)))
        return self.cayley((1j * theta).reshape(-1, 1, 1)).reshape(-1)

    @property
    def defect(self) -> float:
        """Largest ``‖RᵀR - I‖₂`` over the blocks; 0 (to rounding) for the exact map."""
        return 0.0 if self._large else float((self._eigenvalues.abs() ** 2 - 1).abs().max())

    @property
    def angle(self) -> float:
        """Largest rotation angle of a block in radians, 0 to π."""
        if self._large:
            return rotations.largest_angle(rotations.skew(self.generator.detach().to("cpu", torch.float64)))
        return float(self._eigenvalues.angle().abs().max())

    @property
    def _large(self) -> bool:
        """Whether the map is exact, of blocks whose eigenvalues would take long."""
        return self.cayley.exact and self.block_size > rotations.LANCZOS_FROM

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        """Raise :class:`ShapeError` unless this rotation fits a weight of ``shape`` = ``(out, in)``, or ``(tokens,
        features)`` for an embedding.
        """
        n, b, shared = self.generator.shape[0], self.block_size, self._one_for_all
        check_blocks(n, b, self.side, shape, module, shared=shared, whole=self.whole)
        if self.scale is not None and self.scale.shape != shape[:1]:
            message, found = "oft_s does not fit the output features", tuple(self.scale.shape)
            raise ShapeError(message, module=module, tensor="oft_s", shape=found, expected=shape[:1], remedy=TRAINED_ON)

    def for_layer(self, kernel: tuple[int, ...], module: str) -> Rotation:
        """This rotation, which a convolution with a larger kernel than 1×1 does not take, unless whole blocks of its outputs turn."""
        if kernel not in ((), (1, 1)) and not (self.side == "output" and self.whole):
            raise FormatError(
                f"a {kernel[0]}×{kernel[1]} convolution cannot be folded: peft 0.16 to 0.21's live layer overlaps its patches, "
                "so no weight computes the same",
                module=module,
                remedy="train the adapter without this convolution (`exclude_modules`); 1×1 convolutions are fine",
            )
        return self

    def fold_into(self, weight: Tensor) -> Tensor:
        """The weight with which a plain layer computes what the live layer computes with ``weight: (out, in)`` (or
        ``(tokens, features)``), in float32 or better.
        """
        rotated = rotations.rotate_weight(weight, self.blocks.to(weight.device), self.side)
        return rotated if self.scale is None else rotated * self.scale.to(rotated).unsqueeze(-1)

    def unfold_from(self, weight: Tensor) -> Tensor:
        """The true inverse of :meth:`fold_into`.

        Raises:
            NonFiniteError: a scale is zero, or the rotation is singular.
        """
        if self.scale is not None:
            if bool((self.scale == 0).any()):
                message = "oft_s holds a zero, which no inverse undoes"
                raise NonFiniteError(message, tensor="oft_s", remedy="restore from the base model instead")
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight = weight / self.scale.to(weight).unsqueeze(-1)
        return rotations.rotate_weight(weight, self.blocks.to(weight.device), self.side, inverse=True)

    # --- as a weight map ---

    @property
    def scales_rows(self) -> bool:
        return self.side != "output" and self.scale is not None

    def tensors(self) -> Mapping[str, Tensor]:
        return {"generator": self.generator} | ({} if self.scale is None else {"scale": self.scale})

    def settings(self) -> str:
        return f"{super().settings()}\0{self.cayley}\0{self.shared}\0{self.whole}"

    def facts(self) -> dict[str, Any]:
        return {
            "side": self.side,
            "blocks": self.generator.shape[0],
            "block_size": self.block_size,
            "shared": self._one_for_all,
            "map": "exact Cayley" if self.cayley.exact else f"Neumann, {self.cayley.terms} terms",
            "scale": self.scale is not None,
        }

    def at_strength(self, strength: float, mode: str) -> WeightMap:
        if mode == ANGLE:
            from .algebra import weighted_mean

            return self if strength == 1 else weighted_mean([(self.exact()[0], strength)])
        if mode != LINEAR:
            raise self.no_mode(mode)
        if strength == 1:
            return self
        if self.side == "output" and not (self.whole and not self._one_for_all):
            step = Mixed((_Whole(self),), strength, 0)  # the number of rows decides the blocks
            return StepMap(self, (step,), f"{strength!r} {mode}")
        dim, turned = (0, True) if self.side == "output" else (1, self.side == "input")
        blocks = self.blocks.cpu()
        steps: list[Step] = [Blocks(dim, blocks.mT.contiguous() if turned else blocks)]
        if self.scale is not None:
            steps.append(Scale(self.scale.detach().cpu().to(torch.float64)))
        return mixed(self, steps, strength)

    # --- algebra, in float64 ---

    def exact(self) -> tuple[Rotation, float]:
        """The nearest rotation under the exact Cayley map, and its distance: the largest ``‖R - nearest‖₂`` of a block.

        An exact rotation is its own nearest rotation, at distance 0. A truncated series ``R = f(Q)`` is not orthogonal:
        its nearest rotation (the polar factor) keeps the angles of its eigenvalues ``f(±iθ)``, and the distance is how
        far the moduli of these eigenvalues are from 1.

        Raises:
            AdapterError: ``R`` is singular and has no nearest rotation, or the rotation is too near to π for an exact
                generator.
        """
        if self.cayley.exact:
            return self, 0.0
        remedy = "retrain with a smaller learning rate: the generator's norm is far too large for the series"
        nearest, residual = nearest_and_distance(self.blocks, "the truncated series is singular", remedy)
        return replace(self, generator=bounded_generator(nearest), cayley=Cayley()), residual

    @property
    def _one_for_all(self) -> bool:
        return self.shared and self.generator.shape[0] == 1

    def _generators(self, size: int) -> Tensor:
        """The generators of an exact rotation, ``(n, size, size)`` float64, in larger blocks."""
        q = rotations.skew(self.generator.detach().to("cpu", torch.float64))
        return rotations.block_diagonal(q, size, shared=self._one_for_all)


@dataclass(frozen=True, eq=False)
class _Whole:
    """A rotation as one step."""

    rotation: Rotation
    back: bool = False

    def apply(self, w: Tensor) -> Tensor:
        return self.rotation.unfold_from(w) if self.back else self.rotation.fold_into(w)

    def inverse(self) -> _Whole:
        return replace(self, back=not self.back)


def check_blocks(
    n: int,
    b: int,
    side: rotations.Side,
    shape: tuple[int, int],
    module: str,
    *,
    shared: bool,
    whole: bool = False,
) -> None:
    """Raise :class:`ShapeError` unless ``n`` blocks of size ``b`` (one for all, if ``shared``) fit a weight of ``shape``."""
    out, features = shape
    if side == "output":
        r = -(-out // b) if shared else n
        fits = b == -(-out // r)  # r blocks of size ⌈out/r⌉; the last blocks may lie outside
        if fits and whole and r * b != out:
            message = (
                f"{r} blocks of size {b} reach beyond the {out} outputs, and a cropped block has no products or powers"
            )
            remedy = (
                "fold the adapters themselves, one after the other, instead of an adapter that was computed from them"
            )
            raise ShapeError(message, module=module, shape=shape, remedy=remedy)
        rotated, width = "output features", out
    else:
        fits = features % b == 0 and (shared or n == features // b)
        rotated, width = "features" if side == "embedding" else "input features", features
    if not fits:
        message = f"{n} blocks of size {b} do not cover the {width} {rotated}"
        raise ShapeError(message, module=module, shape=shape, remedy=TRAINED_ON)


def nearest_and_distance(r: Tensor, singular: str, remedy: str) -> tuple[Tensor, float]:
    """The rotations that are nearest to ``r: (n, b, b)``, and the largest of their distances."""
    nearest, values = rotations.nearest_rotation(r)
    if float(values.min()) < 1e-6:  # smaller singular values have no sure direction
        raise AdapterError(f"{singular}: there is no nearest rotation", remedy=remedy)
    return nearest, float(torch.linalg.matrix_norm(r - nearest, ord=2).max())


def bounded_generator(r: Tensor) -> Tensor:
    """The generators ``(n, b(b-1)/2)`` of rotations ``r: (n, b, b)``; a rotation too near to π is refused."""
    norm = float(rotations.generator_norm(r).max())
    if not norm <= rotations.MAX_NORM:
        rotation = f"the result is a rotation by {2 * math.atan(norm):.4f} rad, too close to π"
        message = f"{rotation}: its exact Cayley generator has a norm of {norm:.3g}, more than {rotations.MAX_NORM:.0f}"
        raise AdapterError(message, remedy="scale the adapters down first (scaled), or fold them one after the other")
    return rotations.vector(rotations.generator_of(r))
