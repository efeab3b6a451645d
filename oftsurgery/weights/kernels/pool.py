"""A pool of the CPU's threads: it runs tasks side by side, on as many threads as torch uses."""

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
    """The number of threads of a fold: torch's own number, at most one per processor that this process may run on."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), processors))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="oftsurgery")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def run(task: Callable[[int], None], count: int) -> None:
    """Run ``task(0) … task(count - 1)`` on :func:`threads` threads, this thread included; the first error is raised."""
    workers = min(threads(), count)
    left = itertools.count()

    def work() -> None:
        while (i := next(left)) < count:
            task(i)

    others = [_pool(workers - 1).submit(work) for _ in range(workers - 1)] if workers > 1 else []
    try:
        work()
    finally:
        for _ in range(count if others else 0):  # after an error no more tasks are begun
            next(left)
        for other in others:
            if not other.cancel():  # a worker that has not begun would only find that no task is left
                other.result()


def start(work: Callable[[], T]) -> Callable[[], T]:
    """Begin ``work`` on another thread, in this thread's context and on its CUDA stream. Returns a function that gives the result
    of ``work``, or raises its error; if no thread has begun ``work`` by then, that function does the work.
    """
    if threads() == 1:
        return work
    # on a stream of its own, `work` would read a tensor before the caller's kernels have written it
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def on_the_stream() -> T:
        with torch.cuda.stream(stream):
            return work()

    waiting = _pool(threads() - 1).submit(copy_context().run, on_the_stream if stream else work)
    return lambda: work() if waiting.cancel() else waiting.result()
