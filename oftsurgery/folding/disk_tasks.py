"""A run on disk in tasks: each task writes a part of a shard, in any process that sees the same files.

A part is a few items of one shard, whose places in the file follow from the plan. Beside the shard ``F``, the folder
``F.parts`` holds a note for each part that is written: what the part adds to the record, the hashes of its tensors, and
its part of the undo record. A note makes a task idempotent: a part whose note and bytes are there is not computed again.
When all notes of a shard are there, the shard is sealed: its header is written, and its hash taken.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oftsurgery.errors import CheckpointError, StateError
from oftsurgery.files.reading import read_json, sha256_of
from oftsurgery.files.shard_writer import ShardWriter
from oftsurgery.files.staging import PARTS, Staging
from oftsurgery.files.writing import Replacement, disk_errors, sync_file, write_synced
from oftsurgery.tasks import Tasks, again, slices

from .disk_plan import CheckpointPlan
from .disk_run import Run, facts_of, fingerprint, label, undo_part
from .folder_writer import Outputs, Shard, write_items
from .pipelines import PipelinePlan
from .undo_writer import UndoCollector

#: function that makes the plan of a run once more
Planner = Callable[[], "CheckpointPlan | PipelinePlan"]


@dataclass(frozen=True)
class Part:
    """Some items of one shard.

    Attributes:
        shard: the number of the shard in the plan.
        number: the number of the part in its shard.
        items: the numbers of the plan's jobs.
        nbytes: the bytes that are read.
    """

    shard: int
    number: int
    items: tuple[int, ...]
    nbytes: int


def parts_of(plan: CheckpointPlan) -> list[Part]:
    """The parts of all shards of a plan; they depend on the plan alone."""
    whole = sum(job.nbytes for job in plan.jobs)
    found: list[Part] = []
    for number, shard in enumerate(plan.shards):
        sizes = [plan.jobs[item].nbytes for item in shard.items]
        for i, part in enumerate(slices(sizes, whole)):
            found.append(Part(number, i, tuple(shard.items[k] for k in part), sum(sizes[k] for k in part)))
    return found


@dataclass(frozen=True)
class Work:
    """What all tasks of one plan share; workers make the plan again, so the plan itself is never sent.

    Attributes:
        planner: the pickled :data:`Planner`.
        key: the plan's fingerprint.
        component: the model of a pipeline.
        folder: the folder of the unfinished output.
        device: where the arithmetic runs.
        metadata: the metadata of the files.
    """

    planner: bytes
    key: str
    component: str
    folder: str
    device: str
    metadata: Mapping[str, str]

    def run(self) -> Run:
        return Run(plan_again(self.planner, self.key, self.component), torch.device(self.device), None, None)


def plan_again(planner: bytes, key: str, component: str) -> CheckpointPlan:
    whole = again(planner)
    plan: CheckpointPlan = whole.models[component] if component else whole
    if fingerprint(plan) != key:
        raise StateError(
            "a worker sees other files or has other packages than the process that gave the task",
            path=plan.source.folder,
            remedy="give the workers the same files at the same paths, and the same releases of oftsurgery, torch, transformers and bitsandbytes",
        )
    return plan


@dataclass(frozen=True)
class Notes:
    """The notes about the parts of the shard ``file``."""

    folder: Path
    file: str
    key: str

    @property
    def place(self) -> Path:
        """The folder of the notes, which a worker does not make: a worker that outlives its run finds no place."""
        return self.folder / f"{self.file}{PARTS}"

    def undo(self, number: int) -> Path:
        return self.place / f"{number}.undo"

    def of(self, part: Part) -> dict[str, Any] | None:
        """The note about a part; None where there is none, or one about other items."""
        note = self.read(part.number)
        return note if note is not None and note.get("items") == list(part.items) else None

    def read(self, number: int) -> dict[str, Any] | None:
        """The note about the part of this number; None where there is none of this plan."""
        path = self.place / f"{number}.json"
        if not path.is_file():
            return None
        try:
            note = read_json(path)
        except CheckpointError:
            return None
        sound = all(isinstance(note.get(kind), dict) for kind in ("modules", "saved", "late", "hashes"))
        return note if sound and note.get("key") == self.key else None

    def write(self, number: int, note: Mapping[str, Any]) -> None:
        with Replacement(self.place / f"{number}.json", mark()) as new:
            write_synced(new.beside, json.dumps({"key": self.key, **note}).encode())
            new.put()


def mark() -> str:
    """The end of a temporary file's name, which no other process on any node uses."""
    return f"{platform.node()}-{os.getpid()}.new"


def write_part(work: Work, part: Part) -> None:
    """Write a part of a shard and its note, unless both are there; this function is a task."""
    write_part_of(work.run(), Path(work.folder), work.key, part, work.metadata)


def write_part_of(run: Run, folder: Path, key: str, part: Part, metadata: Mapping[str, str]) -> None:
    """Write a part of a shard of ``run``, whose plan has the fingerprint ``key``, into the unfinished output ``folder``."""
    plan = run.plan
    if not folder.is_dir():
        raise StateError(
            "a worker does not see the folder of the unfinished output",
            path=folder,
            remedy="give the workers the same files at the same paths; where the output is a URL, set TMPDIR to a folder that all of them see",
        )
    shard = plan.shards[part.shard]
    notes = Notes(folder, shard.file, key)
    jobs = [plan.jobs[i] for i in part.items]
    names = [name for job in jobs for name in job.outputs]
    with disk_errors(folder):
        with ShardWriter(folder / shard.file, outputs_of(plan, shard), metadata, part=names) as writer:
            if _is_written(notes, part, writer):
                writer.leave()
                return
            operation = run.operation()
            items = run.items(operation, jobs)
            note: dict[str, Any] = {}
            if plan.undo is None:
                write_items(writer, items)
            else:
                with Replacement(notes.undo(part.number), mark()) as new:
                    with new.beside.open("wb") as file:
                        operation.undo = UndoCollector(file)
                        write_items(writer, items)
                    sync_file(new.beside)
                    note = {"undo": operation.undo.facts, "undo_sha256": sha256_of(new.beside)}
                    new.put()
        late = {name: data.hex() for name, data in writer.late.items()}
        where = {"items": list(part.items), "start": writer.start}
        notes.write(part.number, {**note, **where, **facts_of(operation), "late": late, "hashes": writer.hashes})


def _is_written(notes: Notes, part: Part, writer: ShardWriter) -> bool:
    note = notes.of(part)
    if note is None or note.get("start") != writer.start or not writer.holds(note["hashes"]):
        return False
    undo = notes.undo(part.number)
    return "undo" not in note or (undo.is_file() and sha256_of(undo) == note["undo_sha256"])


def seal(work: Work, number: int, parts: int) -> dict[str, Any]:
    """Complete a shard whose parts are all written (:func:`sealed_shard`); this function is a task."""
    return sealed_shard(work.run(), Path(work.folder), work.key, number, parts, work.metadata)


def sealed_shard(
    run: Run, folder: Path, key: str, number: int, parts: int, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Complete the shard ``number``, whose ``parts`` are all written.

    Returns:
        the ``facts`` and ``sha256`` of the shard, and ``undo`` with those of its part of the undo record.

    Raises:
        StateError: a part is not written.
    """
    plan = run.plan
    shard = plan.shards[number]
    notes = Notes(folder, shard.file, key)
    found = [note for note in map(notes.read, range(parts)) if note is not None]
    if len(found) < parts:
        message = f"{parts - len(found)} of the {parts} parts of the file are not written"
        raise StateError(
            message, path=folder / shard.file, remedy="run the slices that are missing, or again (--slice)"
        )
    facts = {kind: {n: v for note in found for n, v in note[kind].items()} for kind in ("modules", "saved")}
    sealed: dict[str, Any] = {"facts": facts}
    with disk_errors(folder):
        late = {name: bytes.fromhex(text) for note in found for name, text in note["late"].items()}
        with ShardWriter(folder / shard.file, outputs_of(plan, shard), metadata, part=()) as writer:
            if {note.get("start") for note in found} != {writer.start}:
                message = "the parts of the file were written for headers of different lengths"
                raise StateError(message, path=folder / shard.file, remedy="start again with force=True (--force)")
            writer.seal(late)
        sealed["sha256"] = sha256_of(folder / shard.file)
        if plan.undo is not None:
            with Replacement(folder / undo_part(shard), mark()) as new:
                with new.beside.open("wb") as file:
                    collector = UndoCollector(file)
                    for i, note in enumerate(found):
                        with notes.undo(i).open("rb") as part:
                            collector.join(note["undo"], part)
                sync_file(new.beside)
                sealed["undo"] = {"facts": {"undo": collector.facts}, "sha256": sha256_of(new.beside)}
                new.put()
    return sealed


def outputs_of(plan: CheckpointPlan, shard: Shard) -> Outputs:
    return {name: output for i in shard.items for name, output in plan.jobs[i].outputs.items()}


# --- the process that gives the tasks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """Writes the shards of runs by tasks.

    Attributes:
        executor: the executor, whose workers see the same files.
        planner: function that makes the run's plan once more; it is pickled.
        device: where the workers compute.
    """

    executor: Any
    planner: Planner
    device: str

    def writer(self, component: str = "") -> Callable[[Run, Sequence[Shard], Staging], None]:
        """What writes the shards of the plan, or of the model ``component`` of a pipeline."""
        return functools.partial(self._write, component)

    def _write(self, component: str, run: Run, shards: Sequence[Shard], staging: Staging) -> None:
        plan = run.plan
        folder = str(staging.folder.absolute())
        planner = pickle.dumps(self.planner)
        work = Work(planner, fingerprint(plan), component, folder, self.device, run.metadata)
        for shard in shards:  # a worker that outlives the run finds no place for its notes
            Notes(staging.folder, shard.file, work.key).place.mkdir(parents=True, exist_ok=True)
        wanted = {shard.file for shard in shards}
        parts: dict[int, list[Part]] = {}
        for part in parts_of(plan):
            if plan.shards[part.shard].file in wanted:
                parts.setdefault(part.shard, []).append(part)
        left = {number: len(own) for number, own in parts.items()}

        def written(part: Part, _: None) -> None:
            run.step(label(plan.jobs[part.items[-1]]), part.nbytes)
            left[part.shard] -= 1
            if not left[part.shard]:
                sealed = functools.partial(note_sealed, run, staging, part.shard)
                tasks.give(seal, work, part.shard, len(parts[part.shard]), then=sealed)

        with Tasks(self.executor) as tasks:
            for part in (part for own in parts.values() for part in own):
                tasks.give(write_part, work, part, then=functools.partial(written, part))
            tasks.run()


def note_sealed(run: Run, staging: Staging, number: int, sealed: Mapping[str, Any]) -> None:
    """Note in the unfinished output that a shard is whole, and give the run the shard's facts."""
    shard = run.plan.shards[number]
    if "undo" in sealed:
        staging.note(undo_part(shard), sealed["undo"]["facts"], sealed["undo"]["sha256"])
    staging.note(shard.file, sealed["facts"], sealed["sha256"])
    run.facts[shard.file] = sealed["facts"]
