""":func:`checkpoint_inputs` gathers the inputs of a checkpoint's layers, from the model that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from itertools import count
from typing import Any

from oftsurgery.errors import CalibrationError
from oftsurgery.files.staging import Staging
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.disk_tasks import Engine
from oftsurgery.folding.plan import in_names_of
from oftsurgery.progress import Progress
from oftsurgery.weights.calibrate import FoldedAlready, InputsOf, LayerInputs

from .batches import Batch, batches_on
from .block_folds import BlockFolds, in_this_process
from .checkpoint_model import calibrated_jobs, load_model, stored_blocks
from .layer_inputs import Calibration, live_model
from .run_tasks import by_tasks
from .sources import Source


@contextmanager
def checkpoint_inputs(
    plan: CheckpointPlan,
    source: Source,
    staging: Staging,
    *,
    device: str,
    device_map: str | Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Iterator[InputsOf]:
    """The inputs of the layers of a checkpoint that is to be folded into ``staging``, by the modules' paths in the model.

    Where the model is a chain of blocks whose layers alone are folded, one block at a time is in memory, and the workers of the
    ``engine`` run the batches. Other models are loaded whole by transformers in this process, as the trainer loaded the model,
    with the adapters live, onto the devices that ``device_map`` says. Only transformers' own classes are built.

    Raises:
        CalibrationError: transformers does not know the model's class, or cannot load the checkpoint.
        MissingDependencyError: transformers is not installed.
    """
    jobs = calibrated_jobs(plan)
    adapters = [in_names_of(plan.store, adapter) for adapter in plan.changes.adapters]
    own = device if engine is None else "cpu"  # this process need not have the workers' devices
    where = {"": own} if device_map is None else device_map

    @cache
    def batches() -> Sequence[Batch]:
        return batches_on(source.staged(lambda: live_model(load_model(plan, where), adapters), staging), own)

    @cache
    def whole() -> Calibration:
        model = load_model(plan, where)
        return Calibration(model, adapters, list(jobs), batches(), progress=progress, jobs=jobs)

    def step() -> None:
        folds, done = blocks(), next(steps)
        if progress is not None and folds is not None:
            progress(done, max(done, folds.count * len(batches())), "calibration")

    @cache
    def blocks() -> BlockFolds | None:
        given = batches()  # before the blocks: the model that writes them takes its memory with it
        stored = stored_blocks(plan, jobs, own)
        folds = None
        if stored is None:
            return None
        with suppress(CalibrationError):  # the whole model says what is wrong with a batch
            folds = BlockFolds.of(stored, jobs, given, lambda path: whole().alone(path), runs_of)
        return folds

    def inputs_of(path: str) -> LayerInputs | FoldedAlready | None:
        folds = blocks()
        return whole()(path) if folds is None else folds(path)

    steps = count(1)
    with nullcontext(in_this_process(step)) if engine is None else by_tasks(engine, plan, staging, step) as runs_of:
        yield inputs_of
