"""Coordinate descent on what a calibration makes least: ``tr(Δ H Δᵀ)`` with Δ = stored - exact, over codes and scales.

With all other weights of a row fixed, the error is a parabola in one weight v_j, whose lowest point is

    v_j - (Δ H)_j / H_jj.

The level nearest to this point is the best level, so a step never raises the error; a sweep visits each column once. With
all levels ℓ of a row fixed, the error is a quadratic in the scales s of the row's blocks, which is least where

    A s = r,    A_bc = Σ_{j∈b, k∈c} ℓ_j H_jk ℓ_k,    r_b = Σ_{j∈b} ℓ_j (w H)_j.

The functions are pure and use no random number: equal inputs give equal codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oftsurgery.formats.encoded_weight import EncodedWeight

from .sweep import GROUP, Rows, in_weight_order, order_of, sweep

#: number of rows whose systems of equations are in memory at once
_ROWS = 256


def descend(rows: Rows, hessian: Tensor, numbers: Tensor, *, sweeps: int = 2) -> tuple[Tensor, Tensor]:
    """The numbers of the levels after ``sweeps`` sweeps from ``numbers``, or after fewer where nothing changes any more; and
    ``Δ H`` then, ``(out, in)``.

    Args:
        hessian: ``(in, in)`` float32, positive semidefinite, damped.
        numbers: ``(out, in)``.
        sweeps: the most sweeps over the columns.
    """
    order = order_of(hessian)
    h = hessian[order][:, order]
    size = h.diagonal().unsqueeze(1)
    scales, exact, stored = (t[:, order].t().contiguous() for t in (rows.scales, rows.exact, rows.values(numbers)))
    chosen = numbers.t()[order].contiguous()  # (in, out), as the other matrices are: a column is contiguous
    gradient = h @ (stored - exact)
    for _ in range(sweeps):
        before = chosen.clone()
        for begin in range(0, len(order), GROUP):
            group = slice(begin, begin + GROUP)
            own = size[group]
            points = torch.where(own > 0, stored[group] - gradient[group] / own, stored[group])
            moves = torch.where(own.t() > 0, -h[group, group] / own.t(), 0.0)  # of later points by a change of a column
            chosen[group] = sweep(rows.grid, points, scales[group], moves, stored[group])
            gradient.addmm_(h[:, group], points)  # the points have become changes
            stored[group] += points
        if torch.equal(chosen, before):
            break
    return in_weight_order(chosen, order), in_weight_order(gradient, order)


def error_of(rows: Rows, numbers: Tensor, gradient: Tensor) -> float:
    """The error ``tr(Δ H Δᵀ)``, where ``gradient`` is ``Δ H``."""
    return float((gradient.to(torch.float64) * (rows.values(numbers) - rows.exact)).sum())


def refit(start: EncodedWeight, rows: Rows, hessian: Tensor, numbers: Tensor, gradient: Tensor) -> EncodedWeight:
    """``start`` with the scales that err least for the levels ``numbers``, all scales of a row together.

    Double quantisation rounds the new scales, so the error can become larger: the caller compares. The scales of a weight
    whose 4-bit blocks lie on two rows stay.
    """
    f, old = start.format, rows.grid.scales
    features = f.shape[1]
    if features % rows.grid.blocksize:
        return start
    scales = old.reshape(len(rows.exact), -1).clone()
    levels = rows.grid.levels[numbers].contiguous()
    missing = -_block_sums(gradient * levels, scales.shape[1])  # r - A s of the old scales
    for begin in range(0, len(scales), _ROWS):
        part = slice(begin, begin + _ROWS)
        scales[part] = _best_scales(levels[part], scales[part], missing[part], hessian)
    return EncodedWeight(f, {**start.tensors, **f.kind.statistics(scales.reshape(-1), f)})


def _best_scales(levels: Tensor, scales: Tensor, missing: Tensor, hessian: Tensor) -> Tensor:
    """The scales s with ``A s = r``, ``(rows, blocks)``; a row keeps its ``scales`` if a solution is not positive.

    Args:
        missing: ``r - A s`` of the given scales, ``(rows, blocks)``.
    """
    rows, blocks = scales.shape
    size = levels.shape[1] // blocks
    a = missing.new_empty(rows, blocks, blocks)
    for b in range(blocks):
        own, later = slice(b * size, (b + 1) * size), slice(b * size, None)
        a[:, b, b:] = _block_sums((levels[:, own] @ hessian[own, later]).mul_(levels[:, later]), blocks - b)
        a[:, b:, b] = a[:, b, b:]
    # the small part of the diagonal decides where the codes of a block are all zero: its scale stays
    a.diagonal(dim1=1, dim2=2).add_(1e-6 * a.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
    new = (scales.to(torch.float64) + torch.linalg.solve(a, missing)).to(scales.dtype)
    good = (torch.isfinite(new) & ((new > 0) | (scales == 0))).all(1, keepdim=True)
    return torch.where(good, new, scales)


def _block_sums(products: Tensor, blocks: int) -> Tensor:
    """The sum over each block of each row, ``(rows, blocks)`` float64."""
    return products.reshape(len(products), blocks, -1).sum(2).to(torch.float64)
