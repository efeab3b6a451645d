"""Drive the CUDA kernel of calibrated rounding: a sweep over a few columns."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from oftsurgery.formats.codecs import Grid

from . import gpu

#: rows of a program, which holds all columns of these rows in registers
_ROWS = 16


def sweep(grid: Grid, points: Tensor, scales: Tensor, matrix: Tensor, stored: Tensor) -> Tensor:
    """:func:`oftsurgery.weights.sweep.sweep` on the tensors' own device."""
    columns, rows = points.shape
    chosen = torch.empty(points.shape, dtype=torch.int32, device=points.device)
    given = (t.contiguous() for t in (stored, scales, matrix))
    sizes = {"COUNT": len(grid.levels), "COLUMNS": 1 << (columns - 1).bit_length(), "ROWS": _ROWS}
    # Triton launches on the current device
    with torch.cuda.device(points.device) if points.is_cuda else nullcontext():
        gpu.sweep[(-(-rows // _ROWS),)](
            points, *given, grid.levels, grid.bounds, chosen, columns, rows, **sizes, enable_fp_fusion=False
        )
    return chosen
