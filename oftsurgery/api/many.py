""":func:`fold_many` folds many adapters into one base, each to an output of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike
from typing import Any

from oftsurgery.errors import StateError, printable
from oftsurgery.files.links import links_followed
from oftsurgery.files.remote import located
from oftsurgery.files.staging import place_in_full
from oftsurgery.folding.disk_many import run_many
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.pipelines import PipelinePlan
from oftsurgery.progress import Progress, shown
from oftsurgery.records.record import FoldRecord

from .arguments import usable_device
from .checkpoints import plan_fold
from .fold_settings import FoldSettings


def fold_many(
    source: str | PathLike[str],
    folds: Sequence[Mapping[str, Any]],
    *,
    follow_links: bool = False,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
    **settings: Any,
) -> dict[str, FoldRecord | Exception]:
    """Fold many adapters into one checkpoint on disk, each to an output of its own; each weight is read once for all of them.

    >>> folds = [{"adapter": "ADAPTER", "output": "MANY/one"}, {"adapter": "ADAPTER", "output": "MANY/half", "format": "bf16"}]
    >>> records = oftsurgery.fold_many("BASE", folds)
    >>> records["MANY/one"].kept > 0.9
    True

    Each output is that of :func:`fold_checkpoint`, byte for byte. The memory holds a weight that is read, the next weight,
    and one result at a time, however many folds there are, and the adapters.

    Args:
        source: as for :func:`fold_checkpoint`, but one model.
        folds: for each fold ``adapter`` and ``output`` (the destination), and any of the ``settings`` that differ.
        settings: the arguments of :func:`fold_checkpoint` that decide the output, for all folds: ``format``, ``quantize``,
            ``rounding``, ``trained_on``, ``max_shard_size``, ``strength`` … A calibration is not among them.
        follow_links, device, resume, force, progress: as for :func:`fold_checkpoint`.

    Returns:
        ``{output: the record, or the error that ended this fold}``, in the order of ``folds``; the error of one fold leaves the
        others alone.

    Raises:
        StateError: a fold lacks its adapter or output, a setting is not known, or two folds have one output.
    Warns:
        RoundingWarning and the others of :func:`fold`, for each fold.
    """
    usable_device(device)
    given = [_checked(fold, settings) for fold in folds]
    outputs = [str(fold["output"]) for fold in given]
    if len({place_in_full(located(output)) for output in outputs}) < len(outputs):
        message = "two folds have one output"
        raise StateError(message, path=max(outputs, key=outputs.count), remedy="name an output for each fold")
    with links_followed(follow_links):
        planned = {output: _plan_or_error(source, fold) for output, fold in zip(outputs, given, strict=True)}
        plans = {located(output): plan for output, plan in planned.items() if isinstance(plan, CheckpointPlan)}
        with shown(progress, "fold") as step:
            run = run_many(plans, device=device, resume=resume, force=force, progress=step)
    return {output: plan if isinstance(plan, Exception) else run[located(output)] for output, plan in planned.items()}


def _plan_or_error(source: str | PathLike[str], fold: Mapping[str, Any]) -> CheckpointPlan | Exception:
    try:
        return _plan(source, fold)
    except Exception as error:  # of any kind, which the caller gets: it ends this fold and no other
        return error


def _checked(fold: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One fold with the settings of all folds."""
    whole = {**settings, **fold}
    known = {field.name for field in fields(FoldSettings)} - {"component"}
    unknown = sorted(map(str, whole.keys() - known - {"adapter", "output"}))
    if unknown:
        message = f"a fold of many has no setting {printable(unknown[0])!r}"
        raise StateError(message, remedy=f"choose from {', '.join(sorted(known))}; fold_checkpoint takes a calibration")
    lacking = [name for name in ("adapter", "output") if not fold.get(name)]
    if lacking:
        message = f"fold {printable(dict(fold))} has no {lacking[0]}"
        raise StateError(message, remedy="give each fold an adapter and an output")
    return whole


def _plan(source: str | PathLike[str], fold: Mapping[str, Any]) -> CheckpointPlan:
    settings = FoldSettings(**{name: value for name, value in fold.items() if name not in ("adapter", "output")})
    if settings.rounding == "calibrated":
        raise StateError(
            "a calibration runs the model for one adapter, and is no part of a fold of many",
            remedy="fold this adapter with fold_checkpoint(…, calibration=…) (oftsurgery fold --calibration)",
        )
    plan = plan_fold(source, fold["adapter"], replace(settings, rounding=settings.rounding or "preserve"))
    if isinstance(plan, PipelinePlan):
        raise StateError(
            "a fold of many folds one model, and the source is a pipeline of diffusers",
            path=plan.source.folder,
            remedy="fold the pipeline adapter by adapter (oftsurgery fold)",
        )
    return plan
