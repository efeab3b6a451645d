"""The executors that functions are given, by name or as they are. This file needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Literal


@contextmanager
def opened_executor(executor: Executor | Literal["ray"] | None) -> Iterator[Executor | None]:
    """The executor that a function was given; for ``"ray"`` a :class:`~oftsurgery.RayExecutor`, which is closed at the end."""
    if executor != "ray":
        yield executor
        return
    from oftsurgery.ray_executor import RayExecutor

    with RayExecutor() as made:
        yield made
