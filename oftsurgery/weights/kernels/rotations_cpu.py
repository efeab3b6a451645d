"""Drive the CPU kernels of block rotations: their blocks and their largest angles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from oftsurgery.weights.cpu_kernels.compiled import kernel

from .addresses import scratch_at, word
from .pool import run

_SOLVE_TOLERANCE = 1e-10
_LANCZOS_STEPS = 160
#: the size of blocks up to which two products are cheaper than a search for the largest angle
_BOUNDED = 32
#: work that is worth a task of its own, in multiplications
_TASK_PRODUCTS = 1 << 19


def blocks(
    generator: Tensor, b: int, wide: int, power: int, weight: float, dtype: type = np.float64, *, turned: bool = False
) -> Tensor | None:
    """``(n·b/wide, wide, wide)``: the rotations of ``generator: (n, b(b-1)/2)``, ``wide/b`` on each diagonal (one for a single,
    shared one).

    Args:
        power: 0 for the exact Cayley map, else the power of the series ``I + 2ΣQᵏ (k < power) + weight · Q^power``.
        dtype: float64, or float32, each transposed where ``turned``.

    Returns:
        the blocks; None if the solve is not right.
    """
    v, parts, count = _parted(generator, b, wide)
    out: np.ndarray = np.empty((count, wide, wide), dtype)
    residuals, last = np.zeros(len(parts)), np.array([weight])
    to = [word(out), 0, 0] if dtype is np.float64 else [0, word(out), turned]
    make, head, series = kernel("rotation_blocks"), [word(v), len(v), b, wide], [power, word(last)]

    def task(i: int) -> None:
        make(*head, *parts[i], *series, scratch_at(32 * wide * wide), *to, word(residuals) + 8 * i)

    run(task, len(parts))
    return torch.from_numpy(out) if bool((residuals <= _SOLVE_TOLERANCE).all()) else None  # NaN compares false


def largest_angle(generator: Tensor, b: int, wide: int) -> float:
    """The largest θ for which ±iθ is an eigenvalue of a generator's block."""
    v, _, count = _parted(generator, b, wide)
    steps, best = min(wide, _LANCZOS_STEPS), np.zeros(1)
    bounds = np.empty(count) if count > 1 and wide <= _BOUNDED else None
    scratch = scratch_at(8 * wide * max(3 * wide, wide + steps + 3))
    kernel("largest_angle")(word(v), len(v), b, wide, count, steps, word(bounds), scratch, word(best))
    return float(best[0])


def _parted(generator: Tensor, b: int, wide: int) -> tuple[np.ndarray, list[tuple[int, int]], int]:
    """A generator's rows in float64, the ranges of its blocks of ``wide`` (one task each), and the number of blocks."""
    v = generator.detach().contiguous()
    rows = (v if v.dtype in (torch.float32, torch.float64) else v.to(torch.float32)).numpy().astype(np.float64)
    count = max(1, len(rows) * b // wide)
    each = max(1, _TASK_PRODUCTS // wide**3)
    return rows, [(i, min(i + each, count)) for i in range(0, count, each)], count
