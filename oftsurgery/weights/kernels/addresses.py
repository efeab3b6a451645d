"""Addresses, which the CPU kernels take for memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from torch import Tensor

_local = threading.local()


def scratch_at(nbytes: int) -> int:
    """The 64-byte aligned address of this thread's own ``nbytes`` bytes, which are kept for the next tile."""
    held: tuple[int, int, np.ndarray] | None = getattr(_local, "scratch", None)
    if held is None or held[0] < nbytes:
        room = np.zeros(nbytes + 64, dtype=np.uint8)
        held = _local.scratch = nbytes, (room.ctypes.data + 63) & ~63, room
    return held[1]


def word(value: Any) -> int:
    """A number, or the address of a tensor or an array."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value.__array_interface__["data"][0] if isinstance(value, np.ndarray) else int(value or 0)
