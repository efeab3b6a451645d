"""These functions find the scales of 4-bit blocks with the least error, from the format's levels."""

from __future__ import annotations

import torch
from torch import Tensor

from .levels import quotient

#: bitsandbytes' lower bound of absmax
TINY = 1e-38

#: scales that :func:`grid_scales` tries, in units of absmax: of all choices of eight about the one that errs least
GRID = (0.84, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.35)

_SCAN_WEIGHTS = 1 << 16


def grid_scales(blocks: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """A good scale of each 4-bit block: the best scale S/Q for the codes that the best ratio of :data:`GRID` gives.

    Arguments and result are as in :func:`best_scales`; the error is never larger than with the absmax.
    """
    absmax = blocks.abs().amax(-1, keepdim=True)
    x = torch.where(absmax >= TINY, blocks * (1.0 / absmax), blocks / absmax).nan_to_num(0.0)
    usable = absmax < torch.finfo(torch.float32).max / GRID[-1]
    best, best_error = absmax, torch.full_like(absmax, torch.inf)
    for ratio in (1.0, *GRID):  # 1.0 comes first, so that the absmax wins a tie
        codes = levels[torch.bucketize(quotient(x, ratio), bounds)]
        error = (codes * ratio - x).square().sum(-1, keepdim=True)
        power = codes.square().sum(-1, keepdim=True)
        scale = (codes * x).sum(-1, keepdim=True) / power
        better = (error < best_error) & (usable | (ratio == 1.0))
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    scales = (best * absmax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(absmax > 0, scales, 0.0).squeeze(-1)


def best_scales(blocks: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """The positive scale of each 4-bit block with exactly the least squared error; 0 for a block of zeros.

    With fixed codes, the best scale is S/Q and lowers the error Σw² by S²/Q, where S = Σwc and Q = Σc² over the levels
    c. The nearest codes change only where a weight crosses a threshold t between two levels, at the scale s = w/t. So
    the best scale is the S/Q of one of the intervals between these breakpoints, and the function tries all intervals in
    order.

    Args:
        blocks: ``(n, blocksize)`` float32, padded with zeros.
        levels, bounds: in ascending order, ``(16,)`` and ``(15,)``.

    Returns:
        ``(n,)`` float32.
    """
    step = max(1, _SCAN_WEIGHTS // blocks.shape[1])
    return torch.cat([_scan(part, levels, bounds) for part in torch.split(blocks, step)])


def _scan(blocks: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """The scales ``(k,)`` of blocks ``(k, blocksize)``: see :func:`best_scales`."""
    w, levels = blocks.to(torch.float64), levels.to(torch.float64)
    # only negative weights cross a bound below zero, whose outer level is the lower one; FP4 has two zeros, and the
    # bound between them is no threshold
    real = bounds != 0
    t, low, high = bounds[real].to(torch.float64), levels[:-1][real], levels[1:][real]
    outer, inner = torch.where(t > 0, high, low), torch.where(t > 0, low, high)
    crossing = (w.unsqueeze(-1) / t).flatten(1)
    crossing[crossing <= 0] = torch.inf
    crossing, at = crossing.sort(-1)
    # the scan begins at the smallest scales, where each weight has its outermost level
    first = torch.where(w > 0, levels[-1], torch.where(w < 0, levels[0], 0.0))
    never = crossing == torch.inf
    s_change = (w.unsqueeze(-1) * (inner - outer)).flatten(1).gather(-1, at).masked_fill(never, 0.0)
    q_change = (inner.square() - outer.square()).expand(*w.shape, -1).flatten(1).gather(-1, at).masked_fill(never, 0.0)
    s = torch.cat([(w * first).sum(-1, keepdim=True), s_change], -1).cumsum(-1)
    q = torch.cat([first.square().sum(-1, keepdim=True), q_change], -1).cumsum(-1)
    # past the last crossing all codes are zero, and the sums hold rounding errors alone
    scale = s / q
    usable = (q > levels.abs()[levels != 0].min() ** 2 / 2) & (scale <= torch.finfo(torch.float32).max)
    gain = torch.where(usable, s * scale, 0.0)
    best = gain.argmax(-1, keepdim=True)
    return torch.where(gain.gather(-1, best) > 0, scale.gather(-1, best), 0.0).squeeze(-1).to(torch.float32)
