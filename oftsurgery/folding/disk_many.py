""":func:`run_many` runs several folds of one checkpoint together: each weight is read once, and rotated and written for every
adapter, before the next weight. The output of each fold is that of :func:`~oftsurgery.folding.disk_run.run_plan`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oftsurgery.errors import module_in_errors
from oftsurgery.files.remote_staging import staging_at
from oftsurgery.files.shard_writer import ShardWriter
from oftsurgery.files.staging import Staging
from oftsurgery.progress import Progress
from oftsurgery.records.record import FoldRecord

from . import engine
from .disk_jobs import Job
from .disk_plan import CheckpointPlan
from .disk_run import Run, begin_run, check_destination, fingerprint, finish_run, publish
from .folder_writer import Item, Shard


@dataclass(eq=False)
class _Fold:
    """One of the folds, at work.

    Attributes:
        left: the shards that are left to write.
        computed, written: how many items of the first of these shards are computed, and written.
        shard: what is to be closed at the end of the shard that is being written.
        at_work: the operation and the writer of this shard.
    """

    destination: Path
    run: Run
    staging: Staging
    left: list[Shard]
    computed: int = 0
    written: int = 0
    shard: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    at_work: tuple[engine.Operation, ShardWriter] | None = None

    @property
    def between_shards(self) -> bool:
        """Whether all items of the shard are computed, and perhaps not yet written."""
        return self.computed == len(self.left[0].items)

    def make(self, loaded: Any) -> tuple[Item, Mapping[str, Any], ShardWriter]:
        """Compute the next job from what was read for it."""
        shard = self.left[0]
        if self.at_work is None:
            self.at_work = self.shard.enter_context(self.run.opened(shard, self.staging))
        operation, writer = self.at_work
        (item,) = self.run.items(operation, [self.run.plan.jobs[shard.items[self.computed]]])
        self.computed += 1
        with module_in_errors(item.name):
            return item, item.make(loaded), writer

    def put(self) -> None:
        """Finish the records, which keep their weights in memory, and close the shard where its last item is written."""
        if self.at_work is not None:
            self.at_work[0].settle()
        self.written += 1
        if self.left and self.written == len(self.left[0].items):
            self.left.pop(0)
            self.computed = self.written = 0
            self.at_work = None
            self.shard.close()


class _Ends:
    """How the folds have ended, and what is to be closed at their ends."""

    def __init__(self, whole: contextlib.ExitStack) -> None:
        self._whole = whole
        self._open: dict[Path, contextlib.ExitStack] = {}
        self.found: dict[Path, FoldRecord | Exception] = {}

    def opened(self, destination: Path) -> contextlib.ExitStack:
        stack = self._open[destination] = self._whole.enter_context(contextlib.ExitStack())
        return stack

    def failed(self, destination: Path, error: Exception) -> None:
        self.found[destination] = error
        with contextlib.suppress(Exception):  # the first error counts
            self._open[destination].__exit__(type(error), error, error.__traceback__)

    def succeeded(self, destination: Path, record: FoldRecord) -> None:
        self._open[destination].close()
        self.found[destination] = record


def run_many(
    plans: Mapping[Path, CheckpointPlan],
    *,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[Path, FoldRecord | Exception]:
    """Carry out ``{destination: plan}``, all of one checkpoint.

    Returns:
        ``{destination: the record of the fold, or the error that has ended this fold}``; an error of one fold leaves the others
        alone.
    """
    steps = _steps(plans, progress)
    with contextlib.ExitStack() as whole:
        ends, folds = _Ends(whole), list[_Fold]()
        for destination, plan in plans.items():
            stack = ends.opened(destination)
            try:
                check_destination(plan, destination, resume=resume, force=force)
                key = fingerprint(plan)
                staging = stack.enter_context(
                    staging_at(destination, key, needed=plan.nbytes, resume=resume, force=force)
                )
                run = Run(plan, torch.device(device), steps[destination], None)
                fold = _Fold(destination, run, staging, begin_run(run, staging, resume=resume))
                stack.push(fold.shard)
                folds.append(fold)
            except Exception as error:  # of any kind: it ends one fold, and the caller gets it
                ends.failed(destination, error)
        _write_in_turn(folds, ends)
        for fold in folds:
            if fold.destination in ends.found:
                continue
            try:
                record = publish(fold.run.plan, fold.staging, finish_run(fold.run, fold.staging, force=force))
                assert record is not None  # noqa: S101 - a fold has one
                ends.succeeded(fold.destination, record)
            except Exception as error:  # of any kind: it ends one fold, and the caller gets it
                ends.failed(fold.destination, error)
        return {destination: ends.found[destination] for destination in plans}


def _steps(plans: Mapping[Path, CheckpointPlan], progress: Progress | None) -> dict[Path, Progress | None]:
    """The progress of each fold within the progress of all."""
    if progress is None:
        return dict.fromkeys(plans)
    done = dict.fromkeys(plans, 0)
    total = sum(job.nbytes for plan in plans.values() for job in plan.jobs)

    def step(destination: Path, own: int, _: int, what: str) -> None:
        done[destination] = own
        progress(sum(done.values()), total, f"{destination.name}: {what}")

    return {destination: partial(step, destination) for destination in plans}


def _write_in_turn(folds: Sequence[_Fold], ends: _Ends) -> None:
    """Write the shards of all folds, weight by weight. Reading, computing and writing overlap; each holds one weight at a time."""
    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:
        writing = _Writing(ends, writers)
        turns = _turns(folds)
        ahead = [readers.submit(_read, *turn) for turn in itertools.islice(turns, 1)]
        while ahead:
            users, loaded = ahead.pop().result()
            ahead += [readers.submit(_read, *turn) for turn in itertools.islice(turns, 1)]
            for fold in users:
                writing.take(fold, loaded)
            del loaded
        writing.settle()


class _Writing:
    """Computes and writes one result after the other; the last one may still be on its way to the file."""

    def __init__(self, ends: _Ends, writers: ThreadPoolExecutor) -> None:
        self._ends, self._writers = ends, writers
        self._behind: list[tuple[_Fold, Future[None]]] = []

    def settle(self) -> None:
        """Wait for the last result."""
        while self._behind:
            fold, future = self._behind.pop()
            try:
                future.result()
                fold.put()
            except Exception as error:  # of any kind: it ends one fold, and the caller gets it
                self._ends.failed(fold.destination, error)

    def take(self, fold: _Fold, loaded: Any) -> None:
        """Compute the next job of a fold, and give the result to the writer."""
        if fold.left and fold.between_shards:
            self.settle()
        if fold.destination in self._ends.found:
            return
        try:
            if isinstance(loaded, Exception):
                raise loaded
            item, made, writer = fold.make(loaded)
        except Exception as error:  # of any kind: it ends one fold, and the caller gets it
            self.settle()
            self._ends.failed(fold.destination, error)
            return
        self.settle()
        if fold.destination not in self._ends.found:
            self._behind.append((fold, self._writers.submit(_put, fold.run, writer, item, made)))


def _turns(folds: Sequence[_Fold]) -> Iterator[tuple[list[_Fold], Job]]:
    """The jobs of all folds, each once, with the folds that have it. Each fold has its jobs in its own order; a job that a fold has
    later waits for this fold where that is possible.
    """
    jobs = [[fold.run.plan.jobs[i] for shard in fold.left for i in shard.items] for fold in folds]
    keys = [[_key(fold, job) for job in own] for fold, own in zip(folds, jobs, strict=True)]
    places = [{key: i for i, key in enumerate(own)} for own in keys]
    at = [0] * len(folds)
    while any(at[i] < len(keys[i]) for i in range(len(folds))):
        fronts = [keys[i][at[i]] for i in range(len(folds)) if at[i] < len(keys[i])]
        ready = (key for key in fronts if all(p.get(key, -1) <= at[i] for i, p in enumerate(places)))
        key = next(ready, fronts[0])
        users = [i for i in range(len(folds)) if at[i] < len(keys[i]) and keys[i][at[i]] == key]
        yield [folds[i] for i in users], jobs[users[0]][at[users[0]]]
        for i in users:
            at[i] += 1


def _key(fold: _Fold, job: Job) -> tuple[Any, ...]:
    """What decides what is read for a job."""
    first = job.parts[0].matrix if job.parts else None
    unit = None if job.unit is None else tuple(part.name for part in job.parts)
    own = None if job.values is None else id(job)
    return fold.run.plan.source.path, job.name, bool(job.parts), first, job.transposed, unit, own


def _read(users: list[_Fold], job: Job) -> tuple[list[_Fold], Any]:
    """What several folds read for a job, or the error; bytes to copy are given as a tensor, which all of them can write."""
    run = users[0].run
    try:
        shared = job.copied if len(users) > 1 else None
        return users, run.load(job) if shared is None else shared.read(job.name)
    except Exception as error:  # of any kind: it ends one fold, and the caller gets it
        return users, error


def _put(run: Run, writer: ShardWriter, item: Item, made: Mapping[str, Any]) -> None:
    for name, tensor in made.items():
        writer.write(name, tensor)
    run.step(item.name, item.nbytes)
