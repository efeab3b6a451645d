"""glibc keeps memory that was freed, and a process that works through buffers of many sizes grows all the time."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def give_back() -> None:
    """Give freed memory back to the system, where the C library has a function for that."""
    _trim()(0)


@cache
def _trim() -> Callable[[int], Any]:
    if sys.platform == "linux":
        try:
            return ctypes.CDLL("libc.so.6").malloc_trim
        except (OSError, AttributeError):  # another C library
            pass
    return lambda _: None
