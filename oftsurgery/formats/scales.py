"""These functions find the scales of 4-bit blocks that err least, by the levels that their codes stand for."""

from __future__ import annotations

import torch
from torch import Tensor

#: bitsandbytes' bound under absmax
TINY = 1e-38

#: scales that :func:`grid_scales` tries, in units of absmax: of all choices of eight about the one that errs least
GRID = (0.84, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.35)

_SCAN_WEIGHTS = 1 << 16


def grid_scales(blocks: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """A good scale of each 4-bit block: of :data:`GRID` the one that errs least, and then the best for its codes, S/Q.

    Args and result as of :func:`best_scales`; never worse than the absmax.
    """
    absmax = blocks.abs().amax(-1, keepdim=True)
    x = torch.where(absmax >= TINY, blocks * (1.0 / absmax), blocks / absmax).nan_to_num(0.0)
    usable = absmax < torch.finfo(torch.float32).max / GRID[-1]
    best, best_error = absmax, torch.full_like(absmax, torch.inf)
    for ratio in (1.0, *GRID):  # the absmax itself where two are as good
        codes = levels[torch.bucketize(x / ratio, bounds)]
        error = (codes * ratio - x).square().sum(-1, keepdim=True)
        power = codes.square().sum(-1, keepdim=True)
        scale = (codes * x).sum(-1, keepdim=True) / power
        better = (error < best_error) & (usable | (ratio == 1.0))
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    scales = (best * absmax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(absmax > 0, scales, 0.0).squeeze(-1)


def best_scales(blocks: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """The positive scale of each 4-bit block that makes its squared error least, exactly. 0 for a block of zeros.

    With the codes fixed, the best scale is S/Q and takes S²/Q off Σw², where S = Σwc and Q = Σc² over the levels c. The
    nearest codes change only where a weight crosses a threshold t between two levels, at s = w/t: the best of all
    scales is the S/Q of one of the states between these breakpoints, and all of them are looked at, in order.

    Args:
        blocks: ``(n, blocksize)`` float32, padded with zeros.
        levels, bounds: in order, ``(16,)`` and ``(15,)``.

    Returns:
        ``(n,)`` float32.
    """
    step = max(1, _SCAN_WEIGHTS // blocks.shape[1])
    return torch.cat([_scan(part, levels, bounds) for part in torch.split(blocks, step)])


def _scan(blocks: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """``(k, blocksize)`` to ``(k,)``: see :func:`best_scales`."""
    w, levels = blocks.to(torch.float64), levels.to(torch.float64)
    # a bound below zero is crossed by negative weights alone, and the level farther from zero is the one before it; FP4
    # has two zeros, with none between them
    real = bounds != 0
    t, low, high = bounds[real].to(torch.float64), levels[:-1][real], levels[1:][real]
    outer, inner = torch.where(t > 0, high, low), torch.where(t > 0, low, high)
    crossing = (w.unsqueeze(-1) / t).flatten(1)
    crossing[crossing <= 0] = torch.inf
    crossing, at = crossing.sort(-1)
    # from the smallest scales, where each weight has its outermost level, on
    first = torch.where(w > 0, levels[-1], torch.where(w < 0, levels[0], 0.0))
    never = crossing == torch.inf
    s_change = (w.unsqueeze(-1) * (inner - outer)).flatten(1).gather(-1, at).masked_fill(never, 0.0)
    q_change = (inner.square() - outer.square()).expand(*w.shape, -1).flatten(1).gather(-1, at).masked_fill(never, 0.0)
    s = torch.cat([(w * first).sum(-1, keepdim=True), s_change], -1).cumsum(-1)
    q = torch.cat([first.square().sum(-1, keepdim=True), q_change], -1).cumsum(-1)
    # past the last crossing all codes are zero: what is left there is what the sums were rounded by
    scale = s / q
    usable = (q > levels.abs()[levels != 0].min() ** 2 / 2) & (scale <= torch.finfo(torch.float32).max)
    gain = torch.where(usable, s * scale, 0.0)
    best = gain.argmax(-1, keepdim=True)
    return torch.where(gain.gather(-1, best) > 0, scale.gather(-1, best), 0.0).squeeze(-1).to(torch.float32)
