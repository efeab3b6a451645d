"""The CPU's threads: a few tasks side by side, on as many threads as torch uses."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def threads() -> int:
    """Threads that a fold uses: torch's own number, at most one a processor that this process may run on."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), processors))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="oftsurgery")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def run(task: Callable[[int], None], count: int) -> None:
    """``task(0) … task(count - 1)``, on :func:`threads` threads with this one; the first error is raised."""
    workers = min(threads(), count)
    left = itertools.count()

    def work() -> None:
        while (i := next(left)) < count:
            task(i)

    others = [_pool(workers - 1).submit(work) for _ in range(workers - 1)] if workers > 1 else []
    try:
        work()
    finally:
        for _ in range(count if others else 0):  # after an error: nothing more is begun
            next(left)
        for other in others:
            if not other.cancel():  # one that has not begun would only find that nothing is left
                other.result()


def start(work: Callable[[], T]) -> Callable[[], T]:
    """Begin ``work`` on another thread, in this one's context. Returns a function that gives its result, or raises its
    error; what no thread has begun by then is done there.
    """
    if threads() == 1:
        return work
    waiting = _pool(threads() - 1).submit(copy_context().run, work)
    return lambda: work() if waiting.cancel() else waiting.result()
