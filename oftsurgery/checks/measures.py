"""These functions measure, for the checks, how far a stored weight is from the expected weight: in float64, from the values
alone, without any code that folds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oftsurgery.adapters.rotation import Rotation
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import NonFiniteError, ShapeError
from oftsurgery.formats import codecs
from oftsurgery.formats.base import in_blocks
from oftsurgery.formats.encoded_weight import EncodedWeight

from .dense_maps import live_weight


def rotation_blocks(rotation: Rotation) -> Tensor:
    """``R: (n, b, b)`` float64 of a live layer's ``x · blockdiag(R)``.

    Exact Cayley: ``(I - Q)(I + Q)⁻¹ = 2(I + Q)⁻¹ - I``, block by block. A truncated series, by Horner's rule:
    ``I + 2ΣQᵏ``, whose last term has the factor 1 in peft ≥ 0.18.

    Raises:
        NonFiniteError: a block has no exact Cayley map.
    """
    rows = rotation.generator.detach().to(torch.float64)
    b = round((1 + (1 + 8 * rows.shape[1]) ** 0.5) / 2)
    q = rows.new_zeros(len(rows), b, b)
    q[:, torch.ones(b, b).triu(1).bool()] = rows
    q, eye, terms = q - q.mT, torch.eye(b, dtype=torch.float64), rotation.cayley.terms
    if terms is None:
        r = torch.stack([2 * torch.linalg.inv(eye + block) - eye for block in q])
        if not float((r @ (eye + q) - (eye - q)).abs().max()) <= 1e-9 * (1 + float(q.abs().max())):  # NaN is not
            message = "a block's generator is too large: the exact Cayley map cannot be computed in float64"
            raise NonFiniteError(message, remedy="use another checkpoint of the adapter's training")
        return r
    once = rotation.cayley.since_0_18 and terms >= 3
    factors = [1.0] + [2.0] * (max(terms - 1, 3) if once else max(terms - 1, 0))
    factors[-1] = 1.0 if once else factors[-1]
    r = torch.zeros_like(q)
    for factor in reversed(factors):
        r = r @ q + factor * eye
    return r


def rotated(
    weight: Tensor, chain: Sequence[WeightMap], module: str = "weight", kernel: tuple[int, ...] | None = None
) -> Tensor:
    """The float64 weight of a live layer over ``weight: (out, in)`` (or ``(tokens, features)``): for ``chain = [a, b]`` the
    layer computes ``y = (x Ra Rb) Wᵀ``, on the output side ``y = (x Wᵀ) Ra Rb``, and for an embedding ``E Ra Rb``.

    Args:
        kernel: ``(kh, kw)`` where ``weight`` is a convolution's, as ``(out, in·kh·kw)``; None: as the shape of ``weight`` has it.

    Raises:
        ShapeError: a rotation does not fit.

    >>> quarter = Rotation(generator=torch.tensor([[-1.0]]))   # Q = [[0, -1], [1, 0]]: a quarter turn
    >>> rotated(torch.tensor([[3.0, 4.0]]), [quarter]).tolist()
    [[4.0, -3.0]]
    """
    if weight.ndim not in (2, 4):
        message = f"a rotation needs a weight of two or four dimensions, and this weight has {weight.ndim}"
        remedy = "give the base model that the adapter was trained on"
        raise ShapeError(message, module=module, shape=weight.shape, remedy=remedy)
    kernel = tuple(weight.shape[2:]) if kernel is None else kernel
    w = weight.reshape(len(weight), -1).to("cpu", torch.float64)
    inputs = [r for r in chain if r.side == "input"]
    # peft's BOFT and HRA multiply the weight by one adapter after the other, and its OFT the inputs
    inputs = inputs if inputs and all(r.first_on_weight for r in inputs) else inputs[::-1]
    for weight_map in [r for r in chain if r.side != "input"] + inputs:
        weight_map.check_fits((w.shape[0], w.shape[1]), module)
        if kernel not in ((), (1, 1)) and isinstance(weight_map, Rotation):
            message = "peft's live layer overlaps the patches of such a convolution, so no weight computes the same"
            remedy = "give the adapter that was folded"
            raise ShapeError(message, module=module, shape=weight.shape, remedy=remedy)
        w = live_weight(w, weight_map, kernel, _rotated_once)
    return w.reshape(weight.shape)


def _rotated_once(w: Tensor, rotation: Rotation) -> Tensor:
    out, features = w.shape
    r = rotation_blocks(rotation)
    b, over = r.shape[-1], out if rotation.side == "output" else features
    count = -(-over // b)
    r = r.expand(count, b, b) if len(r) == 1 else r[:count]
    if rotation.side == "output":  # Rᵀ W; the last block is cropped where it is larger than the outputs left
        padded = torch.nn.functional.pad(w, (0, 0, 0, count * b - out)).reshape(count, b, features)
        w = torch.einsum("nba,nbi->nai", r, padded).reshape(count * b, features)[:out]
    else:
        turn = r if rotation.side == "embedding" else r.mT
        w = torch.einsum("onb,nba->ona", w.reshape(out, count, b), turn).reshape(out, features)
    return w if rotation.scale is None else w * rotation.scale.detach().to(torch.float64).unsqueeze(1)


def rotated_bias(bias: Tensor, chain: Sequence[WeightMap]) -> Tensor:
    """The float64 bias ``(out,)`` of a live layer: maps that turn biases do to the bias what they do to a column of the weight."""
    column = bias.to("cpu", torch.float64).unsqueeze(1)
    for weight_map in chain:
        if weight_map.turns_bias:
            column = live_weight(column, weight_map, (), _rotated_once)
    return column.squeeze(1)


def relative(stored: Tensor, exact: Tensor) -> float:
    """``‖stored - exact‖ / ‖exact‖`` (Frobenius, float64); 0 for two zero weights."""
    norm, difference = float(exact.to(torch.float64).norm()), float((stored.to(torch.float64) - exact).norm())
    return difference / norm if norm else difference


def kept(stored: Tensor, base: Tensor, exact: Tensor) -> float | None:
    """The share of a change that a stored weight holds, ``⟨stored - base, exact - base⟩ / ‖exact - base‖²``: 1 is the
    whole change, 0 is nothing. None where the exact weight is the base.
    """
    change = exact.to(torch.float64) - base.to(torch.float64)
    size = float(change.square().sum())
    return float(((stored.to(torch.float64) - base.to(torch.float64)) * change).sum()) / size if size else None


def step_error(stored: EncodedWeight, exact: Tensor) -> float:
    """The relative error of a weight whose values lie anywhere between two levels of its format: the root of
    ``Σ step² / 12`` over the steps that hold the exact values, at the stored scales. 0 for a dense format.
    """
    if not stored.format.kind.has_levels:
        return stored.format.kind.step_error(stored, exact)
    norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    return float(_steps(stored, exact).square().sum() / 12) ** 0.5 / norm if norm else 0.0


def grain(stored: EncodedWeight, base: Tensor, exact: Tensor) -> float:
    """The largest share of the change from ``base`` to ``exact`` that one element makes where it goes one step: :func:`kept` is no
    finer than this. 0 for formats without levels.
    """
    if not stored.format.kind.has_levels or not stored.format.quantised:
        return 0.0
    change = (exact.to(torch.float64) - base.to(torch.float64)).reshape(-1).abs()
    size = float(change.square().sum())
    return float((_steps(stored, exact) * change).max()) / size if size else 0.0


def _steps(stored: EncodedWeight, exact: Tensor) -> Tensor:
    """The steps between the levels that hold the exact values, flat, at the stored scales."""
    grid = codecs.grid_of(stored)
    levels, scales = grid.levels.to(torch.float64), grid.scales.to(torch.float64).reshape(-1, 1)
    blocks = in_blocks(exact.to(torch.float64).reshape(-1), grid.blocksize)
    above = torch.searchsorted(levels, torch.where(scales != 0, blocks / scales, 0.0)).clamp(1, len(levels) - 1)
    return ((levels[above] - levels[above - 1]) * scales).abs().reshape(-1)[: exact.numel()]
