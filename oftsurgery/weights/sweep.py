"""Round columns one after the other, where the change of each column moves the columns that are still to be rounded.

With Δ = stored - exact, the error is tr(Δ H Δᵀ). Let H = U D Uᵀ with U upper triangular, its diagonal 1, and D diagonal.
Then the error is Σ_k D_k ‖Σ_j Δ_j U_jk‖², where Δ_j is column j. Term k knows only the columns up to k, so column k is
rounded to the level nearest to

    w_k - Σ_{j<k} Δ_j U_jk,

which makes term k least. This is the sweep of GPTQ (Frantar et al. 2023) as QuIP writes it (Chee et al. 2023): U alone
decides, and H is not inverted. A sweep of coordinate descent (:mod:`oftsurgery.weights.descent`) has the same form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oftsurgery.formats import codecs
from oftsurgery.formats.codecs import Grid
from oftsurgery.formats.encoded_weight import EncodedWeight

from . import kernels

#: number of columns of one sweep: a matrix product then carries their changes to all other columns
GROUP = 128


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that are to be rounded.

    Attributes:
        grid: the levels.
        exact: ``(out, in)`` float32.
        scales: the scale of each weight, ``(out, in)``.
    """

    grid: Grid
    exact: Tensor
    scales: Tensor

    @classmethod
    def of(cls, stored: EncodedWeight, exact: Tensor) -> Rows:
        """The rows ``exact`` with the scales of ``stored``, as a reader sees them."""
        grid = codecs.grid_of(stored)
        scales = grid.scales.repeat_interleave(grid.blocksize)[: exact.numel()]
        return cls(grid, exact, scales.reshape(exact.shape))

    def some(self, which: Tensor) -> Rows:
        return Rows(self.grid, self.exact[which], self.scales[which])

    def values(self, numbers: Tensor) -> Tensor:
        """The values of levels with these ``numbers``, ``(out, in)``."""
        return self.grid.levels[numbers] * self.scales

    def numbers(self, stored: EncodedWeight) -> Tensor:
        """The numbers of the levels of ``stored``, ``(out, in)`` int32."""
        return self.grid.nearest(codecs.decode(stored), self.scales)


def damp(hessian: Tensor, part: float) -> Tensor:
    """``hessian`` with a part of its diagonal's mean added to the diagonal."""
    damped = hessian.clone()
    damped.diagonal().add_(part * damped.diagonal().mean())
    return damped


def order_of(hessian: Tensor) -> Tensor:
    """The order of the columns: the strongest inputs come first."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def compensate(rows: Rows, hessian: Tensor) -> Tensor | None:
    """The numbers of the levels ``(out, in)`` that the sweep chooses.

    Args:
        hessian: ``XᵀX`` of the layer's inputs, damped, ``(in, in)``.

    Returns:
        None if the Hessian is not positive definite in float64 either (inputs that are all zero …).
    """
    order = order_of(hessian)
    factor = _unit_factor(hessian, order)
    if factor is None:
        return None
    moves = -factor
    scales, exact = (t[:, order].t().contiguous() for t in (rows.scales, rows.exact))  # (in, out)
    points = exact.clone()
    chosen = torch.empty(exact.shape, dtype=torch.int32, device=exact.device)
    for begin in range(0, len(order), GROUP):
        group, later = slice(begin, begin + GROUP), slice(begin + GROUP, None)
        chosen[group] = sweep(rows.grid, points[group], scales[group], moves[group, group], exact[group])
        points[later].addmm_(moves[group, later].t(), points[group])  # the group's points have become changes
    return in_weight_order(chosen, order)


def in_weight_order(columns: Tensor, order: Tensor) -> Tensor:
    """``(in, out)`` in the order of a sweep as ``(out, in)`` in the weight's order."""
    back = torch.empty_like(columns)
    back[order] = columns
    return back.t().contiguous()


def _unit_factor(hessian: Tensor, order: Tensor) -> Tensor | None:
    """U of ``H = U D Uᵀ``, rows and columns in ``order``; float32.

    The computation is in float32, and in float64 if float32 fails; the result is None if float64 fails too.
    """
    back = order.flip(0)  # H = R Rᵀ with R upper is Cholesky's H = L Lᵀ from the other end
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(hessian[back][:, back].to(dtype))
        if int(failed):
            continue
        factor: Tensor = (lower / lower.diagonal()).flip(0, 1).to(torch.float32)
        if bool(torch.isfinite(factor).all()):
            return factor
    return None


def sweep(grid: Grid, points: Tensor, scales: Tensor, matrix: Tensor, stored: Tensor) -> Tensor:
    """Round ``points`` column by column, and turn them into the changes of the columns.

    Args:
        grid: the levels.
        points: ``(columns, out)`` float32, contiguous, changed in place.
        scales: the scale of each point.
        matrix: ``(columns, columns)``: a change of column i by 1 moves the point of each later column k by ``matrix[i, k]``.
        stored: the values from which the changes count, ``(columns, out)``.

    Returns:
        numbers of the levels, ``(columns, out)`` int32.
    """
    done = kernels.sweep(grid, points, scales, matrix, stored)
    if done is not None:
        return done
    chosen = torch.empty(points.shape, dtype=torch.int32, device=points.device)
    for i in range(len(points)):
        chosen[i] = grid.nearest(points[i], scales[i])
        points[i] = grid.levels[chosen[i]] * scales[i] - stored[i]
        points[i + 1 :].addr_(matrix[i, i + 1 :], points[i])
    return chosen
