"""A run on disk in slices: N processes, on any nodes that see the same files, each write a slice, and one process finishes the
output. A slice is a number of the tasks of :mod:`~oftsurgery.folding.disk_tasks`, so nothing but the plan says who writes what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oftsurgery.errors import CheckpointError, StateError
from oftsurgery.files.reading import read_json
from oftsurgery.files.staging import Staging, shared_folder
from oftsurgery.files.writing import Replacement, check_free, write_synced
from oftsurgery.progress import Progress
from oftsurgery.records.record import FoldRecord

from .disk_plan import CheckpointPlan
from .disk_run import Run, check_destination, fingerprint, label, run_plan
from .disk_tasks import Notes, Part, mark, note_sealed, parts_of, sealed_shard, write_part_of
from .folder_writer import Shard


def slices_of(plan: CheckpointPlan, count: int) -> list[list[Part]]:
    """The parts of each of ``count`` slices, which read about as many bytes each; a slice may be empty.

    Raises:
        StateError: ``count`` is not positive.
    """
    if count < 1:
        raise StateError(f"a fold cannot be cut into {count} slices", remedy="choose 1 slice or more")
    parts = parts_of(plan)
    whole = sum(part.nbytes for part in parts) or 1
    found: list[list[Part]] = [[] for _ in range(count)]
    done = 0
    for part in parts:
        found[min((done + part.nbytes // 2) * count // whole, count - 1)].append(part)
        done += part.nbytes
    return found


def run_slice(
    plan: CheckpointPlan,
    destination: Path,
    number: int,
    count: int,
    *,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write slice ``number`` (from 1) of ``count``. A slice that was killed is run again: what the slice has written stays. Files all of
    whose parts are there are completed too.

    Returns:
        the number of parts of the slice.

    Raises:
        StateError: there is no such slice, or unfinished work of other inputs or settings is there.
        OFTSurgeryError: as for :func:`~oftsurgery.folding.disk_run.run_plan`.
    """
    if not 1 <= number <= count:
        message = f"there is no slice {number} of {count}"
        raise StateError(
            message, remedy=f"choose a slice from 1 to {count} (--slice {min(max(number, 1), count)}/{count})"
        )
    check_destination(plan, destination, resume=True, force=force)
    check_free("destination", destination, force=force)
    key = fingerprint(plan)
    folder = shared_folder(destination, key, mark())
    parts = slices_of(plan, count)[number - 1]
    run = Run(plan, torch.device(device), progress, None)
    run.total = sum(part.nbytes for part in parts)
    for part in parts:
        Notes(folder, plan.shards[part.shard].file, key).place.mkdir(parents=True, exist_ok=True)
        write_part_of(run, folder, key, part, run.metadata)
        run.step(label(plan.jobs[part.items[-1]]), part.nbytes)
    every = parts_of(plan)
    for shard in sorted({part.shard for part in parts}):
        own = [part for part in every if part.shard == shard]
        notes = Notes(folder, plan.shards[shard].file, key)
        if all(notes.of(part) is not None for part in own) and _sealed(notes) is None:
            sealed = sealed_shard(run, folder, key, shard, len(own), run.metadata)
            with Replacement(notes.place / _SEALED, mark()) as new:
                write_synced(new.beside, json.dumps({"key": key, **sealed}).encode())
                new.put()
    return len(parts)


#: the note about a shard that a slice has completed
_SEALED = "sealed.json"


def _sealed(notes: Notes) -> dict[str, Any] | None:
    path = notes.place / _SEALED
    try:
        note = read_json(path) if path.is_file() else {}
    except CheckpointError:
        return None
    return note if note.get("key") == notes.key else None


def finish_slices(
    plan: CheckpointPlan, destination: Path, *, force: bool = False, progress: Progress | None = None
) -> FoldRecord | None:
    """Complete and publish the output whose slices are all written.

    Raises:
        StateError: slices are missing.
        OFTSurgeryError: as for :func:`~oftsurgery.folding.disk_run.run_plan`.
    """
    parts = parts_of(plan)

    def finish(run: Run, shards: Sequence[Shard], staging: Staging) -> None:
        key = fingerprint(plan)
        left = [n for n, shard in enumerate(plan.shards) if shard in shards]
        notes = {n: Notes(staging.folder, plan.shards[n].file, key) for n in left}
        wanted = [part for part in parts if part.shard in notes]
        missing = [part for part in wanted if notes[part.shard].of(part) is None]
        if missing:
            raise StateError(
                f"{len(missing)} of {len(parts)} parts of the output are not written",
                path=staging.folder,
                remedy="run the slices that are missing or that have failed (--slice i/N), and then finish again (--finish)",
            )
        for n in left:
            own = [part for part in parts if part.shard == n]
            sealed = _sealed(notes[n]) or sealed_shard(run, staging.folder, key, n, len(own), run.metadata)
            note_sealed(run, staging, n, sealed)
            run.step(plan.shards[n].file, sum(part.nbytes for part in own))

    if not (destination.parent / f".{destination.name}.oftsurgery").is_dir():
        message = "no slice of this output is written"
        raise StateError(message, path=destination, remedy="run the slices first (--slice i/N)")
    return run_plan(plan, destination, resume=True, force=force, progress=progress, write_shards=finish)
