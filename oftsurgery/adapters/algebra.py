"""Products, inverses and weighted means of rotations of one module, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, MatchError, ShapeError

from .rotation import Rotation, bounded_generator, nearest_and_distance


def _common(parts: Sequence[Rotation]) -> tuple[int, bool]:
    """The block size in which all rotations of one module can be written, and whether one block serves the whole row."""
    if len({r.side for r in parts}) > 1:
        message = f"the adapters rotate different sides of one weight: {', '.join(r.side for r in parts)}"
        raise MatchError(message, remedy="fold the adapters one after the other")
    if len({r.turns_bias for r in parts}) > 1:
        message = "one adapter turns the bias with the rows of a weight, and another adapter does not"
        raise MatchError(message, remedy="fold the adapters one after the other")
    widths = {r.generator.shape[0] * r.block_size for r in parts if not r._one_for_all}
    if len(widths) > 1:
        message = f"the adapters have rotations of {' and of '.join(map(str, sorted(widths)))} features"
        raise ShapeError(message, remedy="compose adapters of the same base model")
    size = math.lcm(*(r.block_size for r in parts))
    if any(width % size for width in widths):
        message = f"block sizes {', '.join(str(r.block_size) for r in parts)} have no common multiple that divides the {widths.pop()} features"
        raise ShapeError(message, remedy="fold the adapters one after the other")
    return size, not widths


def product(a: Rotation, b: Rotation) -> tuple[Rotation, float]:
    """The live chain ``x · Ra · Rb`` as one exact rotation, and the distance of this rotation from the chain."""
    size, shared = _common((a, b))
    wide = [rotations.block_diagonal(r.blocks.cpu(), size, shared=r._one_for_all) for r in (a, b)]
    chained = wide[0] @ wide[1]
    residual = 0.0
    if not (a.cayley.exact and b.cayley.exact):
        singular = "the product of truncated series is singular"
        chained, residual = nearest_and_distance(chained, singular, "fold the adapters one after the other")
    scale = a.scale if b.scale is None else b.scale if a.scale is None else a.scale.double() * b.scale.double()
    whole, turns_bias = a.side == "output", a.turns_bias
    generator = bounded_generator(chained)
    return Rotation(generator, side=a.side, scale=scale, shared=shared, whole=whole, turns_bias=turns_bias), residual


def inverse(r: Rotation) -> tuple[Rotation, float]:
    """The exact inverse of the nearest exact rotation, and the distance of ``r`` from that rotation."""
    exact, residual = r.exact()
    if exact.scale is not None and bool((exact.scale == 0).any()):
        message = "oft_s holds a zero, which no inverse undoes"
        raise AdapterError(message, tensor="oft_s", remedy="fold the adapter as it is")
    scale = None if exact.scale is None else 1 / exact.scale.double()
    return replace(exact, generator=-exact.generator, scale=scale, whole=exact.side == "output"), residual


def weighted_mean(parts: Sequence[tuple[Rotation, float]]) -> Rotation:
    """The mean ``exp(Σ wᵢ log Rᵢ)`` of exact rotations, with the weighted geometric mean of their scales."""
    members = [r for r, _ in parts]
    size, shared = _common(members)
    # log R has the eigenvalues -2i·atan λ where Q has iλ; `logs` are -½ log R, which keeps the sign of Q
    logs = [w * rotations.map_eigenvalues(r._generators(size), torch.atan) for r, w in parts]
    half = sum(logs[1:], start=logs[0])  # a shared block is added to every block
    angle = 2 * float(torch.linalg.matrix_norm(half, ord=2).max())
    if angle > 2 * math.atan(rotations.MAX_NORM):
        message = f"the result is a rotation by {angle:.4f} rad: at π and beyond there is no exact Cayley generator"
        raise AdapterError(message, remedy="use smaller weights")
    generator = rotations.vector(rotations.map_eigenvalues(half, torch.tan))
    scales = [(r.scale.double(), w) for r, w in parts if r.scale is not None]
    if any(bool((scale <= 0).any()) for scale, _ in scales):
        message = "oft_s holds values that are not positive, and such values have no powers"
        raise AdapterError(message, tensor="oft_s", remedy="fold the adapter as it is")
    powers = [w * scale.log() for scale, w in scales]
    scale = sum(powers[1:], start=powers[0]).exp() if powers else None
    side, turns_bias = members[0].side, members[0].turns_bias
    return Rotation(generator, side=side, scale=scale, shared=shared, whole=side == "output", turns_bias=turns_bias)
