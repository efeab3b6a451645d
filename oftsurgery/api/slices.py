"""A fold on disk in slices, which the command line runs: one process for each slice, and one that finishes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from oftsurgery.errors import StateError, printable
from oftsurgery.files.remote import is_url_path, located
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.disk_slices import finish_slices, run_slice, slices_of
from oftsurgery.folding.pipelines import PipelinePlan
from oftsurgery.progress import Progress, shown
from oftsurgery.records.record import FoldRecord

from .arguments import AdapterLike, usable_device
from .checkpoints import plan_fold
from .fold_settings import FoldSettings


def slice_of(text: str) -> tuple[int, int]:
    """The numbers of ``"i/N"``.

    Raises:
        StateError: the text is something else.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        message = f"a slice is i/N, such as 3/16, and not {printable(text)!r}"
        raise StateError(message, remedy="name the slice and the number of slices (--slice 3/16)")
    return int(number), int(count)


def plan_slices(
    source: str | PathLike[str] | None,
    adapter: AdapterLike | Sequence[AdapterLike],
    count: int,
    settings: FoldSettings,
) -> list[dict[str, Any]]:
    """What each of ``count`` slices writes: the number of parts, the bytes that are read, and the files."""
    plan = _plan(source, adapter, settings)
    return [
        {
            "slice": f"{i}/{count}",
            "parts": len(parts),
            "bytes": sum(part.nbytes for part in parts),
            "files": sorted({plan.shards[part.shard].file for part in parts}),
        }
        for i, parts in enumerate(slices_of(plan, count), start=1)
    ]


def fold_slice(
    source: str | PathLike[str] | None,
    adapter: AdapterLike | Sequence[AdapterLike],
    destination: str | PathLike[str],
    slice_: tuple[int, int],
    settings: FoldSettings,
    *,
    device: str = "cpu",
    force: bool = False,
    progress: bool | Progress = False,
) -> int:
    """Write one slice of a fold, and return the number of its parts."""
    plan = _plan(source, adapter, settings)
    usable_device(device)
    with shown(progress, f"slice {slice_[0]}/{slice_[1]}") as step:
        return run_slice(plan, _on_disk(destination), *slice_, device=device, force=force, progress=step)


def finish_fold(
    source: str | PathLike[str] | None,
    adapter: AdapterLike | Sequence[AdapterLike],
    destination: str | PathLike[str],
    settings: FoldSettings,
    *,
    force: bool = False,
    progress: bool | Progress = False,
) -> FoldRecord:
    """Complete and publish a fold whose slices are all written."""
    plan = _plan(source, adapter, settings)
    with shown(progress, "finish") as step:
        record = finish_slices(plan, _on_disk(destination), force=force, progress=step)
    assert record is not None  # noqa: S101 - a fold has one
    return record


def _on_disk(destination: str | PathLike[str]) -> Path:
    """The destination of slices, which write parts of one file.

    Raises:
        StateError: the destination is behind a URL, where no file has parts.
    """
    path = located(destination)
    if is_url_path(path):
        raise StateError(
            "slices write parts of one file, which a place behind a URL does not take",
            path=str(destination),
            remedy="name a folder that all slices see, and copy it; or fold to the URL in one process, with executor=… (--ray) if need be",
        )
    return path


def _plan(
    source: str | PathLike[str] | None, adapter: AdapterLike | Sequence[AdapterLike], settings: FoldSettings
) -> CheckpointPlan:
    if settings.rounding == "calibrated":
        raise StateError(
            "a calibration runs the model block by block in one process, and cannot be cut into slices",
            remedy="leave out the slices, or the calibration (--calibration)",
        )
    plan = plan_fold(source, adapter, settings)
    if isinstance(plan, PipelinePlan):
        raise StateError(
            "slices are of one model, and the source is a pipeline of diffusers",
            path=plan.source.folder,
            remedy="fold the pipeline in one process, or give the folder of one of its models",
        )
    return plan
