"""Runs of a calibration's batches by the tasks of an executor. A task runs the batches of one chunk through a part of a block, or
folds a layer.

The workers make the plan again, and read the blocks from the checkpoint. What passes between tasks lies in files beside the
unfinished output: the hidden values between blocks, the sums of inputs and the folded weights. A file's name says what decides
its contents, so a task that is given twice writes the same bytes.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftsurgery.files.staging import Staging
from oftsurgery.files.writing import Replacement, disk_errors
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.disk_run import fingerprint
from oftsurgery.folding.disk_tasks import Engine, mark, plan_again
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.tasks import Tasks, again
from oftsurgery.weights.calibrate import LayerInputs, fold_calibrated
from oftsurgery.weights.kernels.blockwise import FoldedWeight

from .batch_runs import Batches, BatchRuns, BlockWeights, Step
from .block_folds import RunsOf
from .block_sources import Job, LiveBlocks, StoredBlocks
from .blocks import Call, block_paths, first_call, run_batch, running
from .checkpoint_model import calibrated_jobs, stored_blocks
from .hidden_values import HiddenValues
from .input_sums import InputSums

#: folder of the files in the unfinished output
FOLDER = ".calibration"


@dataclass(frozen=True)
class Work:
    """What all tasks of one calibration share.

    Attributes:
        planner: the pickled function that makes the plan of the fold.
        key: the plan's fingerprint, without the calibration.
        device: where the arithmetic runs.
        folder: where the files lie.
    """

    planner: bytes
    key: str
    device: str
    folder: str

    def put(self, name: str, value: Any) -> None:
        """Write a file of tensors, in dicts and lists."""
        path = Path(self.folder, f"{name}.pt")
        with disk_errors(path), Replacement(path, mark()) as new:
            with new.beside.open("wb") as file:  # torch's own file would not say that the disk is full
                torch.save(value, file)
            new.put()

    def get(self, name: str) -> Any:
        return torch.load(Path(self.folder, f"{name}.pt"), map_location=self.device, weights_only=True)

    def opened(self) -> _Opened:
        opened: _Opened = again(pickle.dumps(partial(_open, self)))
        return opened


@dataclass(frozen=True, eq=False)
class _Opened:
    """The checkpoint in a worker."""

    work: Work
    source: StoredBlocks
    jobs: Mapping[str, Job]
    blocks: Sequence[str]
    batches: Batches

    @contextmanager
    def running(self, number: int, chunk: int, folded: Sequence[str]) -> Iterator[tuple[BatchRuns, BlockWeights]]:
        """The runs of a chunk that stand before a block, and the block's weights, of which some are ``folded``."""
        at = self.blocks[number]
        with running(self.source.model), self.source.loaded(at):
            runs = BatchRuns.of(self.source, self.blocks, self.batches, [self.batches.chunks[chunk]], lambda: None)
            assert runs is not None  # noqa: S101 - the process that gave the task has looked at all batches
            if number:
                runs.live, runs.own = (HiddenValues(self.work.get(f"{n}-{number}-{chunk}")) for n in ("live", "own"))
            paths = [path for path in self.jobs if path.startswith(f"{at}.")]
            stored = {path: folded_weight(self.work, path, self.jobs[path]) for path in folded}
            yield runs, BlockWeights(self.source, self.jobs, paths, runs.dtype, stored)


def _open(work: Work) -> _Opened:
    plan = plan_again(work.planner, work.key, "")
    jobs = calibrated_jobs(plan)
    source = stored_blocks(plan, jobs, work.device)
    assert source is not None  # noqa: S101 - the process that gave the task has opened the same blocks
    return _Opened(work, source, jobs, block_paths(source.modules, jobs), Batches.from_plain(work.get("batches")))


def folded_weight(work: Work, path: str, job: Job) -> EncodedWeight:
    return EncodedWeight(job[1], work.get(f"folded-{path}"))


def sums_name(step: Step, chunk: int, share: bool) -> str:
    return f"sums-{step.block}-{len(step.later)}-{'shared' if share else 'apart'}-{chunk}"


# --- the tasks --------------------------------------------------------------------------------------------------------


def gather_chunk(work: Work, step: Step, folded: Sequence[str], chunk: int, share: bool) -> None:
    """Write the sums of a group's inputs over a chunk; for a block's last group, write the live model's hidden values too."""
    with work.opened().running(step.block, chunk, folded) as (runs, weights):
        (found,) = runs.gather(step, weights, share=share)
        if not step.later:
            work.put(f"live-{step.block + 1}-{chunk}", list(runs.after))
    work.put(sums_name(step, chunk, share), found.as_plain())


def fold_layer(work: Work, path: str, inputs: str) -> dict[str, Any]:
    """Write the folded weight of a layer, and return the other attributes of the :class:`FoldedWeight`."""
    opened = work.opened()
    chain, into = opened.jobs[path]
    folded = fold_calibrated(opened.source.weight(path), chain, into, LayerInputs(**work.get(inputs)))
    work.put(f"folded-{path}", dict(folded.encoded.tensors))
    return {f.name: getattr(folded, f.name) for f in fields(folded) if f.name != "encoded"}


def advance_chunk(work: Work, step: Step, folded: Sequence[str], chunk: int) -> None:
    """Write the folded model's hidden values after a block."""
    with work.opened().running(step.block, chunk, folded) as (runs, weights):
        work.put(f"own-{step.block + 1}-{chunk}", list(runs.through_folded(step, weights)))


# --- the process that gives the tasks ---------------------------------------------------------------------------------


@dataclass(eq=False)
class TaskRuns:
    """The runs of all batches by the workers of an executor.

    Attributes:
        tasks: the tasks of the executor.
        work: what the tasks share.
        here: the same for this process, which need not have the workers' device.
        batches: the batches.
        passed: function that is called after each batch of a block.
        call, hidden: the call of the first block by the first batch.
    """

    tasks: Tasks
    work: Work
    here: Work
    batches: Batches
    passed: Callable[[], None]
    call: Call
    hidden: Tensor
    block: int = 0

    @property
    def first(self) -> tuple[Call, Tensor]:
        return self.call, self.here.get(f"live-{self.block}-0")[0] if self.block else self.hidden

    def gather(self, step: Step, weights: BlockWeights, *, share: bool) -> Iterator[InputSums]:
        def ended(chunk: range, _: None) -> None:
            if not step.later:
                for _number in chunk:
                    self.passed()

        for i, chunk in enumerate(self.batches.chunks):
            given = (self.work, step, list(weights.folded), i, share)
            self.tasks.give(gather_chunk, *given, then=partial(ended, chunk))
        self.tasks.run()
        for i in range(len(self.batches.chunks)):
            yield InputSums.from_plain(self.here.get(sums_name(step, i, share)))
            self._remove(sums_name(step, i, share))

    def fold(self, step: Step, weights: BlockWeights, found: InputSums) -> dict[str, FoldedWeight | None]:
        folded: dict[str, FoldedWeight | None] = dict.fromkeys(step.paths)

        def ended(path: str, facts: Mapping[str, Any]) -> None:
            folded[path] = FoldedWeight(folded_weight(self.here, path, weights.jobs[path]), **facts)

        names: dict[str, str] = {}
        for path in step.paths:
            own, leader = found.of(path), found.leaders.get(path, path)
            if own is not None:
                inputs = own.inputs(path)
                if leader not in names:
                    names[leader] = f"inputs-{leader}"
                    self.here.put(names[leader], vars(inputs))
                self.tasks.give(fold_layer, self.work, path, names[leader], then=partial(ended, path))
        self.tasks.run()
        for name in names.values():
            self._remove(name)
        return folded

    def advance(self, step: Step, weights: BlockWeights) -> None:
        for i in range(len(self.batches.chunks)):
            self.tasks.give(advance_chunk, self.work, step, list(weights.folded), i, then=lambda _: None)
        self.tasks.run()
        for name in (f"{n}-{self.block}-{i}" for n in ("live", "own") for i in range(len(self.batches.chunks))):
            self._remove(name)
        for path in weights.folded:
            self._remove(f"folded-{path}")
        self.block = step.block + 1

    def _remove(self, name: str) -> None:
        Path(self.work.folder, f"{name}.pt").unlink(missing_ok=True)


@contextmanager
def by_tasks(engine: Engine, plan: CheckpointPlan, staging: Staging, passed: Callable[[], None]) -> Iterator[RunsOf]:
    """The runs of batches by the workers of an engine, whose files lie in the unfinished output while the body runs; ``passed`` is
    called after each batch of a block.
    """
    folder = staging.folder / FOLDER
    work = Work(
        pickle.dumps(engine.planner), fingerprint(replace(plan, calibration={})), engine.device, str(folder.absolute())
    )

    def runs_of(source: LiveBlocks, blocks: Sequence[str], batches: Batches) -> TaskRuns | None:
        first: Call | None = None
        for i, batch in enumerate(batches.batches):
            call = first_call(source.modules[blocks[0]], partial(run_batch, source.model, i, batch))
            if call is None:
                return None
            first = first or call
        assert first is not None  # noqa: S101 - there is a batch
        work.put("batches", batches.as_plain())
        return TaskRuns(tasks, work, replace(work, device="cpu"), batches, passed, first, first.hidden)

    with Tasks(engine.executor) as tasks:
        with disk_errors(folder):
            folder.mkdir()
        try:
            yield runs_of
        finally:
            shutil.rmtree(folder, ignore_errors=True)
