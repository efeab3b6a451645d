"""Drive the CPU's kernel of calibrated rounding: a sweep over a few columns."""

from __future__ import annotations

import torch
from torch import Tensor

from oftsurgery.formats.codecs import Grid
from oftsurgery.weights.cpu_kernels.compiled import kernel
from oftsurgery.weights.cpu_kernels.layout import LANES

from .addresses import scratch_at, word
from .pool import run, threads


def sweep(grid: Grid, points: Tensor, scales: Tensor, matrix: Tensor, stored: Tensor) -> Tensor | None:
    """:func:`oftsurgery.weights.sweep.sweep`; None for a number of rows that the kernel does not take."""
    columns, rows = points.shape
    if rows % LANES:
        return None
    table = torch.cat([grid.levels, grid.bounds])
    chosen = torch.empty_like(points)
    given = [t.contiguous() for t in (stored, scales, matrix)]
    head = [word(t) for t in (points, *given, table, len(grid.levels), chosen, columns, rows)]
    each = -(-rows // (LANES * threads())) * LANES
    apply = kernel("sweep")

    def task(i: int) -> None:
        apply(*head, i * each, min(i * each + each, rows), scratch_at(4 * LANES * (columns + 2)))

    run(task, -(-rows // each))
    return chosen.to(torch.int32)
