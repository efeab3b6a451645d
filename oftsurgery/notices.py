"""A notice is one line about work that makes a task slower than usual. The task's progress shows the notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: the notice of a first start: numba's cache keeps what it compiles
COMPILING = "compiling kernels, once"

_told: ContextVar[Callable[[str], None] | None] = ContextVar("oftsurgery_notices", default=None)


def notice(text: str) -> None:
    """Give a notice to the progress of the task that runs, if the task shows its progress."""
    tell = _told.get()
    if tell is not None:
        tell(text)


@contextmanager
def notices_to(tell: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, notices go to ``tell``."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)
