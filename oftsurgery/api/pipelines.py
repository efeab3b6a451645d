"""The functions here do for a pipeline of diffusers what their namesakes do for one checkpoint: model by model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.pipeline_files import compare_files, joined_reports
from oftsurgery.errors import MatchError, StateError, printable
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.pipeline import Pipeline
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.disk_unfold import plan_restore, plan_undo, plan_unfold
from oftsurgery.folding.pipelines import PipelinePlan
from oftsurgery.folding.undo_reader import UndoRecord, open_undo, open_undos
from oftsurgery.records.record_file import record_in
from oftsurgery.stores.components import split_adapters
from oftsurgery.stores.folder import FolderStore

from .fold_settings import FoldSettings
from .trained_on import settings_of_each

_CHOOSE = "name the component: component=… (--component)"


def plan_pipeline(
    pipeline: Pipeline,
    adapters: Sequence[OFTAdapter],
    plan: Callable[[FoldSettings, Checkpoint, Sequence[OFTAdapter]], CheckpointPlan],
    settings: FoldSettings,
) -> PipelinePlan:
    """The fold of a pipeline; ``plan`` plans the fold of one model by its own settings.

    Raises:
        OFTSurgeryError: as for one checkpoint.
    """
    parts = split_adapters(adapters, _stores(pipeline.models), settings.component)
    each = settings_of_each(settings, {name: pipeline.models[name] for name in parts})
    return PipelinePlan(pipeline, {name: plan(each[name], pipeline.models[name], own) for name, own in parts.items()})


def plan_pipeline_back(
    folded: Pipeline,
    *,
    base: Pipeline | None,
    undo: str | PathLike[str] | None,
    adapters: Sequence[OFTAdapter],
    component: str | None,
    rounding: str,
    max_shard_bytes: int,
) -> PipelinePlan:
    """The unfold of a pipeline by one of the three ways; of all models that carry a fold, or of ``component``."""
    models = folded_models(folded, component)
    plans: dict[str, CheckpointPlan] = {}
    if undo is not None:
        for name, record in _undos(Path(undo).expanduser(), models, component).items():
            plans[name] = plan_undo(_same_model(folded, name), record, max_shard_bytes=max_shard_bytes)
    elif base is not None:
        for name, model in models.items():
            plans[name] = plan_restore(model, _same_model(base, name), max_shard_bytes=max_shard_bytes)
    else:
        for name, own_adapters in split_adapters(adapters, _stores(models), component).items():
            plans[name] = plan_unfold(models[name], own_adapters, rounding=rounding, max_shard_bytes=max_shard_bytes)
    return PipelinePlan(folded, plans)


def _undos(path: Path, models: Mapping[str, Checkpoint], component: str | None) -> dict[str, UndoRecord]:
    """``{component: its undo record}`` of the models that an undo record restores: of ``component`` alone where it is given."""
    found = open_undos(path)
    if "" not in found:
        return {name: record for name, record in found.items() if component in (None, name)} or {
            str(component): open_undo(path)  # which raises: the record has no such model
        }
    record = found[""]
    own = [name for name, model in models.items() if (fold := record_in(model.folder)) and record.is_of(fold)]
    return {own[0] if own else next(iter(models)): record}  # where the record is of no model, the plan says so


def compared_models(
    folded: Pipeline, base: Pipeline, adapters: Sequence[OFTAdapter], component: str | None
) -> dict[str, tuple[Checkpoint, Checkpoint, Sequence[OFTAdapter]]]:
    """``{component: (folded model, model of the base, its adapters)}``."""
    parts = split_adapters(adapters, _stores(base.models), component)
    return {name: (_same_model(folded, name), base.models[name], own) for name, own in parts.items()}


def report_of_pipeline(folded: Pipeline, base: Pipeline, reports: Mapping[str, CheckpointReport]) -> CheckpointReport:
    """The reports of a pipeline's models as one. The other files must be those of the base."""
    joined = joined_reports(reports)
    return replace(joined, files={**joined.files, **compare_files(folded, base, reports)})


def differing_models(base: Pipeline, merged: Pipeline, component: str | None) -> tuple[Checkpoint, Checkpoint]:
    """The model ``component`` of two pipelines, or the only model that differs.

    Raises:
        StateError: no model differs, or several do.
    """
    if component is None:
        differ = [
            name for name, model in merged.models.items() if name in base.models and _differ(base.models[name], model)
        ]
        if len(differ) != 1:
            what = f"{len(differ)} models of the pipelines differ: {', '.join(map(printable, differ)) or 'none'}"
            raise StateError(what, path=merged.folder, remedy=f"{_CHOOSE}; an adapter is extracted from one model")
        component = differ[0]
    return _same_model(base, component), _same_model(merged, component)


def folded_models(pipeline: Pipeline, component: str | None) -> dict[str, Checkpoint]:
    """The models of a pipeline that carry a fold, or ``component`` alone.

    Raises:
        StateError: no model carries a fold.
    """
    found = {name: model for name, model in pipeline.models.items() if record_in(model.folder) is not None}
    if component is not None:
        return {component: _same_model(pipeline, component)}
    if not found:
        message = "no model of the pipeline has a record of a fold"
        raise StateError(message, path=pipeline.folder, remedy="give a pipeline that oftsurgery folded")
    return found


def _stores(models: Mapping[str, Checkpoint]) -> dict[str, FolderStore]:
    return {name: FolderStore(model) for name, model in models.items()}


def _same_model(pipeline: Pipeline, name: str) -> Checkpoint:
    if name not in pipeline.models:
        message = f"the pipeline has no model {printable(name)!r}"
        remedy = f"choose one of {', '.join(map(printable, pipeline.models))}, or give the other pipeline"
        raise MatchError(message, path=pipeline.folder, remedy=remedy)
    return pipeline.models[name]


def _differ(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold other tensors, by their bytes."""
    if a.entries.keys() != b.entries.keys():
        return True
    for name, entry in a.entries.items():
        other = b.entries[name]
        if (entry.dtype, entry.shape) != (other.dtype, other.shape):
            return True
        if any(x != y for x, y in zip(a.chunks(name), b.chunks(name), strict=True)):
            return True
    return False
