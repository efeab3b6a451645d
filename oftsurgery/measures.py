"""How far a stored weight is from what it should be, for checks: from its values alone, in float64, by none of the code
that folds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import codecs
from .codecs import EncodedWeight

__all__ = ["WHOLE", "kept", "step_error"]

#: a weight that holds a change to within this part holds it: of a weight of few elements and a small change, one element
#: more or less is as much
WHOLE = 0.25


def kept(stored: Tensor, base: Tensor, exact: Tensor) -> float | None:
    """How much of a change is in a stored weight, ``⟨stored - base, exact - base⟩ / ‖exact - base‖²``: 1 all of it, 0
    nothing. None where the exact weight is the base.
    """
    change = exact.to(torch.float64) - base.to(torch.float64)
    size = float(change.square().sum())
    return float(((stored.to(torch.float64) - base.to(torch.float64)) * change).sum()) / size if size else None


def step_error(stored: EncodedWeight, exact: Tensor) -> float:
    """The relative error of a weight that lies anywhere between the levels of its format: the root of ``Σ step² / 12``
    over the steps in which the exact values lie, at the stored scales. 0 for a dense format.
    """
    if not stored.format.quantised:
        return 0.0
    grid = codecs.grid_of(stored)
    levels, scales = grid.levels.to(torch.float64), grid.scales.to(torch.float64)
    size = grid.blocksize
    blocks = codecs.blocks_of(exact.to(torch.float64).reshape(-1), size)
    scales = scales.reshape(-1, 1)
    above = torch.searchsorted(levels, torch.where(scales != 0, blocks / scales, 0.0)).clamp(1, len(levels) - 1)
    steps = ((levels[above] - levels[above - 1]) * scales).reshape(-1)[: exact.numel()]
    norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    return float(steps.square().sum() / 12) ** 0.5 / norm if norm else 0.0
