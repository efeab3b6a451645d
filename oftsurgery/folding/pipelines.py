"""A pipeline of diffusers on disk: plans of several of its models run into one folder, which one rename then makes the destination.
Each folded model's folder has the record, the card and the hashes that the model alone would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oftsurgery.errors import UndoError
from oftsurgery.files.carried import never_copied
from oftsurgery.files.layout import PIPELINE
from oftsurgery.files.pipeline import Pipeline
from oftsurgery.files.remote_staging import staging_at
from oftsurgery.files.staging import Below, Staging, check_apart
from oftsurgery.progress import Progress
from oftsurgery.records.record import FoldRecord, joined

from .disk_plan import CheckpointPlan
from .disk_run import WriteShards, check_destination, fingerprint, write_plan
from .folder_writer import warn_of_lost
from .undo_reader import open_undos
from .undo_writer import join_undos


@dataclass(frozen=True, eq=False)
class PipelinePlan:
    """Everything that a fold or an unfold of a pipeline does.

    Attributes:
        source: the pipeline that is read.
        models: ``{component: the plan of its model}``; the other components are copied.
    """

    source: Pipeline
    models: Mapping[str, CheckpointPlan]

    @property
    def carried(self) -> dict[str, Path]:
        """``{name: file}`` of the files that are copied."""
        files = (name for name in self.source.files(but=self.models) if not never_copied(name))
        return {name: self.source.folder / name for name in files}

    def to_dict(self) -> dict[str, Any]:
        """The plans of the models as plain values, which ``oftsurgery plan --json`` prints."""
        return {
            "base": str(self.source.folder),
            "models": {name: plan.to_dict() for name, plan in self.models.items()},
            "carried": list(self.carried),
        }


def run_pipeline(
    plan: PipelinePlan,
    destination: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    writer_of: Callable[[str], WriteShards] | None = None,
) -> FoldRecord | None:
    """Carry out ``plan``; the destination appears whole, by one rename. ``writer_of`` gives what writes the shards of a model
    in place of this process.

    Returns:
        the records of the new models as one, whose modules have the components' names in front; None where no model carries a
        fold.

    Raises:
        OFTSurgeryError: as for a single checkpoint.
    """
    for model in plan.models.values():
        check_destination(model, destination, resume=resume, force=force)
    check_apart(destination, "source", [plan.source.folder])
    carried = plan.carried
    sizes = {name: path.stat().st_size for name, path in carried.items()}
    facts = {"models": {name: fingerprint(model) for name, model in plan.models.items()}, "carried": sizes}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    needed = sum(model.nbytes for model in plan.models.values()) + sum(sizes.values())
    total = sum(job.nbytes for model in plan.models.values() for job in model.jobs)
    records: dict[str, FoldRecord] = {}
    before = 0
    with staging_at(destination, key, needed=needed, resume=resume, force=force) as staging:
        models, undo, parts = _with_own_undos(plan.models, staging)
        for name, model in models.items():
            record = write_plan(
                model,
                Below(staging, name),
                device=device,
                resume=resume,
                force=force,
                progress=None if progress is None else _shifted(progress, before, total, name),
                write_shards=None if writer_of is None else writer_of(name),
            )
            before += sum(job.nbytes for job in model.jobs)
            if record is not None:
                records[name] = record
            if name in parts:
                staging.finish(parts[name].name, {})
        if undo is not None:
            staging.settle()
            join_undos(undo, parts, force=force or (resume and _is_of(undo, records)))
            for part in parts.values():
                staging.drop(part.name)
        warn_of_lost(plan.source.lost)
        for name, path in carried.items():
            staging.copy(path, name)
        staging.publish(last=PIPELINE)
    return joined(records) if records else None


def _with_own_undos(
    models: Mapping[str, CheckpointPlan], staging: Staging
) -> tuple[Mapping[str, CheckpointPlan], Path | None, dict[str, Path]]:
    """``(plans, the pipeline's undo record, {component: file of its own record})``: where several models have an undo record, each
    writes its own in the unfinished output, and these are joined at the end.
    """
    undo = next((model.undo for model in models.values() if model.undo is not None), None)
    if undo is None or len(models) == 1:
        return models, None, {}
    parts = {name: staging.folder / f"undo-{name}" for name in models}
    return {name: replace(model, undo=parts[name]) for name, model in models.items()}, undo, parts


def _is_of(undo: Path, records: Mapping[str, FoldRecord]) -> bool:
    """Whether the file is the undo record of these folds: of a run that was killed after it had written the record."""
    with suppress(UndoError):
        found = open_undos(undo)
        return found.keys() == records.keys() and all(found[name].is_of(fold) for name, fold in records.items())
    return False


def _shifted(progress: Progress, before: int, total: int, component: str) -> Progress:
    """The progress of one model within the progress of all."""
    return lambda done, _, what: progress(before + done, total, f"{component}.{what}")
