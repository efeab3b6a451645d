"""The 16 levels of NF4 and of FP4, by code and in ascending order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

# the levels as bitsandbytes' kernels hold them, not yet divided by the largest: `get_4bit_type` of 0.41 to 0.50
LEVELS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "nf4": (
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ),
        "fp4": (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0),
    }
)  # fmt: skip


def quotient(x: Tensor, number: float) -> Tensor:
    """``x / number``, rounded once on every device: on a GPU torch multiplies by the reciprocal of a plain number."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


@cache
def levels_of(codec: str, device: torch.device) -> Tensor:
    """The 16 levels, (16,) float32 in [-1, 1], by code."""
    levels = torch.tensor(LEVELS[codec], dtype=torch.float32, device=device)
    return levels / levels.abs().max()


@cache
def sorted_levels(codec: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The levels in order (16,), the midpoints between them (15,), and their codes (16,) uint8."""
    levels = levels_of(codec, torch.device("cpu"))
    order = torch.argsort(levels)  # sorted on the CPU, because a GPU may put the two zeros of FP4 in another order
    levels = levels[order]
    bounds = (levels[:-1] + levels[1:]) / 2
    return levels.to(device), bounds.to(device), order.to(device, torch.uint8)


@cache
def levels_of_bytes(codec: str, device: torch.device) -> Tensor:
    """The two levels of each packed byte, (256, 2) float32; the first code is in the high nibble."""
    byte = torch.arange(256, device=device)
    levels = levels_of(codec, device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=-1)
