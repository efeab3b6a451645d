"""Rounding that compensates: the codes are chosen for the least error of a layer's outputs, not of its weight.

On inputs X, the squared error of a stored weight's outputs is ``‖X Δᵀ‖² = tr(Δ H Δᵀ)``, with Δ = stored - exact and H =
XᵀX. So the columns that are still to be rounded can compensate for an error in one input's column, by the second-order
step of Optimal Brain Surgeon (Hassibi & Stork 1993). The sweep takes one column at a time, in one order for all rows,
and reads all steps off one Cholesky factor of H⁻¹ (GPTQ: Frantar et al. 2023). The columns with the strongest inputs
come first; H is damped by a part of its mean diagonal.

A 4-bit block lies along the flat weight: its columns are far apart in that order and may lie on two rows. So the scales
are fixed before the first column, and only codes are chosen here: the format, its layout and its statistics are those
of the weight from which the sweep starts.

The functions are pure and use no random number: equal inputs give equal codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import ShapeError
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat

from .fold import fold_encoded, measured, relative_error, rotate_chain
from .kernels.blockwise import FoldedWeight

#: an embedding is looked up, and the owner of an idle layer only reads its weight, so a live adapter does nothing there
_UNCALLED = "the model never multiplies inputs by this weight on the calibration"

#: parts of the mean diagonal of H; the part is larger with few tokens, which give a less certain H
DAMPING, DAMPING_OF_FEW, FEW_TOKENS = 0.05, 0.1, 1000

#: number of columns whose errors one matrix product carries to the later columns
_GROUP = 128


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The inputs of a layer over the calibration.

    Attributes:
        hessian: ``XᵀX`` of the inputs X, ``(in, in)`` float32.
        tokens: number of rows of X.
        held_out: other inputs, ``(n, in)`` float32, which are not in X.
    """

    hessian: Tensor
    tokens: int
    held_out: Tensor

    @property
    def damping(self) -> float:
        return DAMPING if self.tokens >= FEW_TOKENS else DAMPING_OF_FEW


#: function from a layer's path to its inputs, or None for a layer without inputs
InputsOf = Callable[[str], LayerInputs | None]


def fold_calibrated(
    encoded: EncodedWeight, chain: Sequence[WeightMap], into: WeightFormat, inputs: LayerInputs | None
) -> FoldedWeight:
    """:func:`~oftsurgery.weights.fold.fold_encoded` with codes that compensate for each other's errors on ``inputs``.

    The sweep starts from the codes of ``rounding="preserve"``. The new codes are kept only if the layer's outputs on the
    held-out inputs come nearer to the exact outputs; otherwise the result has the first codes, and says why.

    Args:
        encoded: the weight to rotate, ``(out, in)``.
        chain: rotations in the live order.
        into: format of the result; a dense format has no codes to choose.
        inputs: inputs of this layer, without the rotation; None for a layer without inputs.
    """
    plain = fold_encoded(encoded, chain, into, "preserve")
    if not into.quantised:
        return plain
    if inputs is None:
        return replace(plain, uncalibrated=_UNCALLED)
    device = encoded.tensors["weight"].device
    with rotations.full_precision(device.type):
        base = codecs.decode(encoded)
        exact = rotate_chain(base, chain).to(torch.float32)
        held_out = inputs.held_out.to(device)
        reference = held_out @ exact.t()
        if not bool(reference.any()):
            return replace(
                plain, uncalibrated="there are no held-out inputs to judge the weight by, or their outputs are zero"
            )

        def judge(candidate: EncodedWeight) -> float:
            return relative_error(held_out @ codecs.decode(candidate).t(), reference)

        before = judge(plain.encoded)
        nearest = before if plain.rounding == "nearest" else judge(codecs.encode(exact, into))
        plain = replace(plain, output_error=before, output_nearest=nearest)
        new = compensate(exact, plain.encoded, inputs.hessian.to(device), damping=inputs.damping)
        if new is None:
            return replace(plain, uncalibrated="the Hessian of the inputs cannot be factorised")
        after = judge(new)
        if not after < before:
            why = f"the error on held-out inputs is worse, {after:.2e} instead of {before:.2e}"
            return replace(plain, uncalibrated=why)
        made = replace(plain, encoded=new, rounding="calibrated", relaxation=1.0, output_error=after)
        return replace(measured(made, base, exact), output_kept=_kept(held_out, new, base, reference))


def _kept(held_out: Tensor, new: EncodedWeight, base: Tensor, reference: Tensor) -> float | None:
    """The part of the outputs' change from ``X baseᵀ`` to ``X exactᵀ`` that ``X storedᵀ`` holds."""
    before = held_out @ base.to(torch.float32).t()
    change = (reference - before).to(torch.float64)
    size = float(change.square().sum())
    got = (held_out @ codecs.decode(new).t() - before).to(torch.float64)
    return float((got * change).sum()) / size if size else None


def compensate(exact: Tensor, start: EncodedWeight, hessian: Tensor, *, damping: float) -> EncodedWeight | None:
    """``start`` with the codes that GPTQ's sweep gives for ``exact``; its scales stay.

    Args:
        exact: ``(out, in)`` float32.
        start: ``exact`` as it is stored: a quantised format and its statistics.
        hessian: ``XᵀX`` of the layer's inputs, ``(in, in)``.
        damping: part of the diagonal's mean that is added to the diagonal.

    Returns:
        the weight; None if the damped Hessian is not positive definite in float64 either (inputs that are all zero …).

    Raises:
        ShapeError: the three shapes do not fit.
    """
    rows, features = exact.shape
    if tuple(hessian.shape) != (features, features) or start.format.shape != (rows, features):
        raise ShapeError(
            "the Hessian or the stored weight does not fit the weight",
            shape=tuple(hessian.shape),
            expected=(features, features),
            remedy="give XᵀX of this layer's own inputs",
        )
    grid = codecs.grid_of(start)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian, order, damping)
    if factor is None:
        return None
    first_of_row = torch.arange(rows, device=exact.device) * features
    left = exact[:, order].t().contiguous()  # (in, out), the columns that are still to be rounded
    chosen = torch.empty(left.shape, dtype=torch.uint8, device=left.device)  # level numbers
    for begin in range(0, features, _GROUP):
        end = min(begin + _GROUP, features)
        errors = torch.empty_like(left[begin:end])
        for i in range(begin, end):
            scale = grid.scales[(first_of_row + order[i]) // grid.blocksize]
            level = grid.nearest(left[i], scale)
            chosen[i] = level
            errors[i - begin] = (left[i] - grid.levels[level] * scale) / factor[i, i]
            left[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin], alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    levels = torch.empty((rows, features), dtype=torch.uint8, device=exact.device)
    levels[:, order] = chosen.t()
    return codecs.with_levels(start, levels)


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """Upper triangular U with ``UᵀU = (H + damping · mean(diag H) · I)⁻¹``, rows and columns in ``order``; float32.

    The computation is in float32, and in float64 if float32 fails; the result is None if float64 fails too.
    """
    back = order.flip(0)  # H = R Rᵀ with R upper is Cholesky's H = L Lᵀ from the other end; then U = R⁻¹
    for dtype in (torch.float32, torch.float64):
        h = hessian[back][:, back].to(dtype)
        h.diagonal().add_(damping * h.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(h)
        del h
        if int(failed):
            continue
        eye = torch.eye(len(back), dtype=dtype, device=hessian.device)
        factor: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).to(torch.float32)
        if bool(torch.isfinite(factor).all() and (factor.diagonal() > 0).all()):
            return factor
    return None
