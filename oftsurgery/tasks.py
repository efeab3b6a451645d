""":class:`Tasks` gives tasks to a ``concurrent.futures.Executor``, and gives a task again where its worker is lost."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pickle
import queue
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import EngineError, StateError, printable

T = TypeVar("T")

#: how often in a row a task may be lost while no other task finishes
_MOST = 4


#: a task reads at most 1/64 of all bytes, but not less and not more than this, in bytes
SHARE, LEAST, MOST = 64, 32 << 20, 1 << 30


def slices(sizes: Sequence[int], whole: int | None = None) -> list[range]:
    """Things of ``sizes`` bytes, by their numbers, in tasks; a task has at least one thing. ``whole``: the bytes of all tasks, where
    the things are a part of them.
    """
    return cut(sizes, min(max((sum(sizes) if whole is None else whole) // SHARE, LEAST), MOST))


def cut(sizes: Sequence[int], limit: float) -> list[range]:
    """Things of ``sizes``, by their numbers, in runs of at most ``limit``; a run has at least one thing.

    >>> cut([3, 3, 3, 9], 6)
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    ends, held = [], 0
    for i, size in enumerate(sizes):
        if held and held + size > limit:
            ends.append(i)
            held = 0
        held += size
    return [range(a, b) for a, b in itertools.pairwise([0, *ends, len(sizes)]) if a < b]


@dataclass(frozen=True)
class Failure:
    """The error of a task, as a value: what the executor itself raises is then never an error of the task."""

    error: BaseException
    log: str


class TaskLog(Exception):
    """The traceback of a task, as text: the cause of the error that the task raised."""


# the kernels of a process use all its threads for one weight, so a process works on one task at a time
_ONE_AT_A_TIME = threading.Lock()


@functools.cache
def _end_with_parent() -> None:
    """End this worker when the process that has started it is killed: the worker would wait for tasks for ever."""
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def attempt(function: Callable[..., Any], *arguments: Any) -> bytes:
    """The pickled result of a task, or its :class:`Failure`; workers call this function. A queue of multiprocessing would send
    tensors as places in the worker's memory, which a dead worker no longer has.
    """
    with _ONE_AT_A_TIME:
        _end_with_parent()
        try:
            return pickle.dumps(function(*arguments))
        except Exception as error:  # of any kind: the process that gave the task raises it
            log = traceback.format_exc()
            try:
                pickle.loads(pickle.dumps(error))  # noqa: S301 - the error of this process
            except Exception:  # an error of another package need not survive pickling
                error = RuntimeError(f"{type(error).__name__}: {error}")
            return pickle.dumps(Failure(error, log))


@functools.lru_cache(maxsize=1)
def again(make: bytes) -> Any:
    """What the pickled function ``make`` makes; a worker keeps the last thing, and warns of nothing, since the process that gave
    the task has warned.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pickle.loads(make)()  # noqa: S301 - the executor brings it with the task itself


@dataclass(eq=False)
class _Task:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    then: Callable[[Any], None]
    others_finished: int = 0
    losses: int = 0


class Tasks:
    """Tasks for an executor, in a context that ends the workers which have taken the place of broken ones. A task must be idempotent:
    a worker that seems lost may still be at work.

    Args:
        executor: any ``concurrent.futures.Executor``.

    Raises:
        StateError: the object is no executor, or its workers start with ``fork``.
    """

    def __init__(self, executor: Executor) -> None:
        if not isinstance(executor, Executor):
            message = f"an executor is a concurrent.futures.Executor, not a {type(executor).__name__}"
            raise StateError(message, remedy="give a ProcessPoolExecutor, Dask's client.get_executor(), …")
        context = getattr(executor, "_mp_context", None) if isinstance(executor, ProcessPoolExecutor) else None
        if context is not None and context.get_start_method() == "fork":
            raise StateError(
                "the executor's workers start with fork, and torch can hang in a forked process",
                remedy="ProcessPoolExecutor(n, mp_context=multiprocessing.get_context('spawn'))",
            )
        self._executor = executor
        self._own: list[Executor] = []
        self._ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._waiting: dict[Future[Any], tuple[_Task, Executor]] = {}
        self._finished = 0

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        for executor in self._own:
            executor.shutdown(cancel_futures=True)

    def give(self, function: Callable[..., Any], *arguments: Any, then: Callable[[Any], None]) -> None:
        """Give a task to the executor; :meth:`run` calls ``then`` with its result."""
        self._submit(_Task(function, arguments, then))

    def run(self) -> None:
        """Wait until all tasks are done, those too that ``then`` has given. Further tasks may then be given.

        Raises:
            EngineError: the executor has lost a task again and again, or takes no tasks.
            Exception: the first error of a task; no task is at work afterwards.
        """
        try:
            while self._waiting:
                future = self._ended.get()
                task, executor = self._waiting.pop(future)
                outcome = _outcome(future)
                if isinstance(outcome, _Lost):
                    self._again(task, executor, outcome.error)
                    continue
                if isinstance(outcome, Failure):
                    raise outcome.error from TaskLog(outcome.log)
                self._finished += 1
                task.then(outcome)
        finally:
            for future in self._waiting:
                future.cancel()
            wait([future for future in self._waiting if not future.cancelled()])

    def _submit(self, task: _Task) -> None:
        task.others_finished = self._finished
        try:
            future = self._executor.submit(attempt, task.function, *task.arguments)
        except BrokenExecutor as error:
            self._renew(error)
            future = self._executor.submit(attempt, task.function, *task.arguments)
        except RuntimeError as error:
            message = f"the executor takes no tasks: {printable(error)}"
            raise EngineError(message, remedy="give an executor that is open; resume=True goes on") from error
        self._waiting[future] = (task, self._executor)
        future.add_done_callback(self._ended.put)

    def _again(self, task: _Task, executor: Executor, error: BaseException) -> None:
        """Give a lost task again."""
        task.losses = task.losses + 1 if self._finished == task.others_finished else 1
        if task.losses >= _MOST:
            raise EngineError(
                f"the executor has lost a task {_MOST} times in a row: {printable(f'{type(error).__name__}: {error}', 500)}",
                remedy="look why the workers end (memory, time limits), and go on with resume=True (--resume)",
            ) from error
        if isinstance(error, BrokenExecutor) and executor is self._executor:
            self._renew(error)
        self._submit(task)

    def _renew(self, error: BrokenExecutor) -> None:
        """Replace a broken executor by a fresh one of the same settings."""
        if not isinstance(self._executor, ProcessPoolExecutor):
            message = f"the executor is broken: {printable(error)}"
            raise EngineError(message, remedy="go on with resume=True (--resume) and a new executor") from error
        old: Any = self._executor
        self._executor = ProcessPoolExecutor(
            old._max_workers, mp_context=old._mp_context, initializer=old._initializer, initargs=old._initargs
        )
        self._own.append(self._executor)


@dataclass(frozen=True)
class _Lost:
    error: BaseException


def _outcome(future: Future[Any]) -> Any:
    try:
        return pickle.loads(future.result())  # noqa: S301 - the result of our own task
    except (Exception, CancelledError) as error:
        return _Lost(error)


def mapped(executor: Executor | None, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    """The results of the function for each of ``arguments``, in their order; without an executor, this process computes them."""
    if executor is None:
        return [function(*given) for given in arguments]
    found: dict[int, T] = {}
    with Tasks(executor) as tasks:
        for i, given in enumerate(arguments):
            tasks.give(function, *given, then=functools.partial(found.__setitem__, i))
        tasks.run()
    return [found[i] for i in range(len(arguments))]
