"""Rounding that compensates: the codes are chosen for the least error of a layer's outputs, not of its weight.

On inputs X, the squared error of a stored weight's outputs is ``‖X Δᵀ‖² = tr(Δ H Δᵀ)``, with Δ = stored - exact and H =
XᵀX. So the columns that are still to be rounded can compensate for an error in one input's column, as in Optimal Brain
Surgeon (Hassibi & Stork 1993) and GPTQ (Frantar et al. 2023).

1. A sweep over the columns, the strongest inputs first, rounds each column and moves the later columns.
2. Coordinate descent moves single codes until little changes.
3. The scales are solved for the least error of these codes, and descent goes on, where that is better.

A 4-bit block lies along the flat weight: its columns are far apart in the order of the sweep. So the scales are fixed while
codes are chosen. H is damped by a part of its mean diagonal, which other inputs choose.

The functions are pure and use no random number: equal inputs give equal codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import ShapeError
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat

from .descent import descend, error_of, refit
from .fold import fold_encoded, measured, relative_error, rotate_chain
from .kernels.blockwise import FoldedWeight
from .sweep import Rows, compensate, damp

#: an embedding is looked up, and the owner of an idle layer only reads its weight, so a live adapter does nothing there
_UNCALLED = "the model never multiplies inputs by this weight on the calibration"

#: parts of the mean diagonal of H that may be added to the diagonal: fewer tokens give a less certain H, which needs more
DAMPINGS = (0.0005, 0.002, 0.01, 0.05, 0.2)
#: the same, where the drift of the inputs moves the weight that is to be stored
DRIFT_DAMPING = 0.05
#: the share of the drift that a layer makes up for
SHARE = 0.3

#: number of rows on which dampings are tried
_TRIED_ROWS = 128


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The inputs of a layer over the calibration.

    Attributes:
        hessian: ``XᵀX`` of the inputs X, ``(in, in)`` float32.
        tokens: number of rows of X.
        held_out: other inputs, ``(n, in)`` float32, which are not in X.
        drift: ``(Y - X)ᵀ X``, ``(in, in)``, where Y are the same inputs in the live model, and X the inputs in the model whose
            earlier blocks are folded; None where X are the inputs in the live model.
        live: ``held_out`` in the live model; None where ``drift`` is None.
    """

    hessian: Tensor
    tokens: int
    held_out: Tensor
    drift: Tensor | None = None
    live: Tensor | None = None

    @property
    def held_out_live(self) -> Tensor:
        """The held-out inputs in the live model."""
        return self.held_out if self.live is None else self.live

    def on(self, device: torch.device) -> LayerInputs:
        drift, live = (None if t is None else t.to(device) for t in (self.drift, self.live))
        return LayerInputs(self.hessian.to(device), self.tokens, self.held_out.to(device), drift, live)


@dataclass(frozen=True, eq=False)
class FoldedAlready:
    """A weight that a calibration has folded itself, because the inputs of later layers depend on it.

    Attributes:
        before: the fingerprint of the weight before the fold.
        folded: the folded weight.
        again: function that gives the layer's inputs, for another weight.
    """

    before: str
    folded: FoldedWeight
    again: Callable[[], LayerInputs | None]


#: function from a layer's path to its inputs or to the folded weight, or None for a layer without inputs
InputsOf = Callable[[str], LayerInputs | FoldedAlready | None]


def fold_calibrated(
    encoded: EncodedWeight,
    chain: Sequence[WeightMap],
    into: WeightFormat,
    inputs: LayerInputs | FoldedAlready | None,
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
    if isinstance(inputs, FoldedAlready):
        if inputs.before == encoded.fingerprint and inputs.folded.encoded.format == into:
            return inputs.folded
        inputs = inputs.again()
    plain = fold_encoded(encoded, chain, into, "preserve")
    if not into.quantised:
        return plain
    if inputs is None:
        return replace(plain, uncalibrated=_UNCALLED)
    device = encoded.tensors["weight"].device
    with rotations.full_precision(device.type):
        return _calibrated(plain, codecs.decode(encoded).to(torch.float32), chain, inputs.on(device))


def _calibrated(plain: FoldedWeight, base: Tensor, chain: Sequence[WeightMap], inputs: LayerInputs) -> FoldedWeight:
    """The weight ``base``, turned by ``chain``, with codes for ``inputs``; or ``plain``, with the reason."""
    exact = rotate_chain(base, chain).to(torch.float32)
    reference = inputs.held_out_live @ exact.t()
    if not bool(reference.any()):
        return replace(
            plain, uncalibrated="there are no held-out inputs to judge the weight by, or their outputs are zero"
        )

    def error(candidate: EncodedWeight) -> float:
        return relative_error(inputs.held_out @ codecs.decode(candidate).t(), reference)

    before = error(plain.encoded)
    nearest = before if plain.rounding == "nearest" else error(codecs.encode(exact, plain.encoded.format))
    plain = replace(plain, output_error=before, output_nearest=nearest)
    aim = exact if inputs.drift is None else make_up_for(exact, inputs.hessian, inputs.drift)
    new = make_least(aim, plain.encoded, inputs.hessian, inputs.held_out, reference)
    if new is None:
        return replace(plain, uncalibrated="the Hessian of the inputs cannot be factorised")
    after = error(new)
    if not after < before:
        why = f"the error on held-out inputs is worse, {after:.2e} instead of {before:.2e}"
        return replace(plain, uncalibrated=why)
    made = replace(plain, encoded=new, rounding="calibrated", relaxation=1.0, output_error=after)
    kept = _kept(inputs.held_out, codecs.decode(new), base, exact)
    return replace(measured(made, base, exact), output_kept=kept)


def _kept(x: Tensor, stored: Tensor, base: Tensor, exact: Tensor) -> float | None:
    """The part of the outputs' change from ``X baseᵀ`` to ``X exactᵀ`` that ``X storedᵀ`` holds."""
    change, got = (x @ (weight.to(base.dtype) - base).t() for weight in (exact, stored))
    size = float(change.to(torch.float64).square().sum())
    return float((got.to(torch.float64) * change).sum()) / size if size else None


def make_least(
    exact: Tensor, start: EncodedWeight, hessian: Tensor, held_out: Tensor, reference: Tensor
) -> EncodedWeight | None:
    """``start`` with codes and scales that make the error of the outputs small.

    Args:
        exact: the weight to be stored, ``(out, in)`` float32.
        start: the weight as it is stored: a quantised format and its statistics.
        hessian: ``XᵀX`` of the layer's inputs, ``(in, in)``.
        held_out: other inputs, ``(n, in)``, which choose the damping.
        reference: the outputs that the layer should have for these inputs, ``(n, out)``.

    Returns:
        the weight; None if the damped Hessian is not positive definite in float64 either (inputs that are all zero …).

    Raises:
        ShapeError: the shapes do not fit.
    """
    rows, features = exact.shape
    if tuple(hessian.shape) != (features, features) or start.format.shape != (rows, features):
        raise ShapeError(
            "the Hessian or the stored weight does not fit the weight",
            shape=tuple(hessian.shape),
            expected=(features, features),
            remedy="give XᵀX of this layer's own inputs",
        )
    values = Rows.of(start, exact)
    damping = best_damping(values, hessian, held_out, reference)
    if damping is None:
        return None
    damped = damp(hessian, damping)
    numbers = compensate(values, damped)
    assert numbers is not None  # noqa: S101 - the choice of the damping has swept with this Hessian
    numbers, gradient = descend(values, damped, numbers)
    refitted = refit(start, values, damped, numbers, gradient)
    refitted_values = Rows.of(refitted, exact)
    again, gradient_again = descend(refitted_values, damped, numbers)
    if error_of(refitted_values, again, gradient_again) < error_of(values, numbers, gradient):
        start, numbers = refitted, again
    return codecs.with_levels(start, numbers)


def make_up_for(exact: Tensor, hessian: Tensor, drift: Tensor) -> Tensor:
    """The weight W* that takes the place of the exact weight W where the inputs X have drifted from the live inputs Y.

    ``‖X Vᵀ - (X + a (Y - X)) Wᵀ‖²`` is least at ``W* = W + a W (Y - X)ᵀX (XᵀX)⁻¹``, which makes up for a share a of the
    drift. With the whole drift as the aim, or less damping, W* would follow the calibration's own texts too closely.
    """
    factor, failed = torch.linalg.cholesky_ex(damp(hessian, DRIFT_DAMPING))
    if int(failed):
        return exact
    return exact + SHARE * torch.cholesky_solve((exact @ drift).t(), factor).t()


def best_damping(rows: Rows, hessian: Tensor, held_out: Tensor, reference: Tensor) -> float | None:
    """The damping with the least error of some rows' outputs on the held-out inputs; None if no Hessian can be factorised.

    The search begins at the middle of the list, and goes to the better neighbour until no neighbour is better.
    """
    count = min(_TRIED_ROWS, len(rows.exact))
    which = torch.linspace(0, len(rows.exact) - 1, count, device=hessian.device).to(torch.int64)
    tried, outputs = rows.some(which), reference[:, which]

    @cache
    def error(i: int) -> float:
        numbers = compensate(tried, damp(hessian, DAMPINGS[i])) if 0 <= i < len(DAMPINGS) else None
        return math.inf if numbers is None else float((held_out @ tried.values(numbers).t() - outputs).square().sum())

    at = len(DAMPINGS) // 2
    while (better := min((at, at - 1, at + 1), key=error)) != at:
        at = better
    return DAMPINGS[at] if math.isfinite(error(at)) else None
