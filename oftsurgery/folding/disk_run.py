""":func:`run_plan` runs a plan on disk one weight at a time, and never loads the model. The run writes into a folder beside the
destination, which one rename then makes the destination.

The output is a function of the inputs alone, so a run that was killed and resumed writes the same bytes as an
uninterrupted run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftsurgery.errors import StateError, UndoError
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.finding import commit_of
from oftsurgery.files.remote import url_path
from oftsurgery.files.remote_staging import staging_at
from oftsurgery.files.shard_writer import ShardWriter
from oftsurgery.files.staging import Staging, check_apart, place_in_full
from oftsurgery.formats import checkpoint_tensors, codecs
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.formats.packages.package_format import PackageFormat
from oftsurgery.progress import Progress
from oftsurgery.records.record import FoldRecord, ModuleRecord, versions
from oftsurgery.records.record_file import public_info
from oftsurgery.stores import configs
from oftsurgery.stores.dequantised import DequantisedCheckpoint, config_as_stored
from oftsurgery.stores.folder import canonical, load_weight
from oftsurgery.weights.calibrate import InputsOf
from oftsurgery.weights.fold import fold_encoded

from . import engine
from .disk_jobs import Job, Part
from .disk_plan import CheckpointPlan
from .folder_writer import Item, Shard, write_items, write_other_files
from .quantised_first import facts_of_quantization
from .single_file_writer import check_single_destination, publish_single_file, with_sizes
from .undo_reader import UndoRecord, open_undo
from .undo_writer import UndoCollector, UndoWriter, check_place, tensor_as_json

#: function that writes shards of a run into an unfinished output, and gives the run the facts of each
WriteShards = Callable[["Run", Sequence[Shard], Staging], None]
#: function from an unfinished output to the context in which a calibration gives the layers' inputs
Calibrate = Callable[[Staging], contextlib.AbstractContextManager[InputsOf]]


def run_plan(
    plan: CheckpointPlan,
    destination: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    calibrate: Calibrate | None = None,
    write_shards: WriteShards | None = None,
) -> FoldRecord | None:
    """Carry out ``plan``; the rounding is calibrated where ``calibrate`` gives the function from a layer's path to its inputs.

    Everything is written into ``.<name>.oftsurgery`` beside ``destination``; after all warnings, one rename makes this
    folder the destination. After an error or a kill the folder stays, and ``resume=True`` continues after the last whole
    shard in the folder, whose hash is checked. ``write_shards`` writes the shards in place of this process.

    Returns:
        the record of the new checkpoint, as in its ``oftsurgery.json``; None where the checkpoint carries no fold.

    Raises:
        DiskError: the disk is full or read-only, or another run writes to this destination.
        StateError: the destination exists and ``force`` is not set, or unfinished work is there and neither ``resume``
            nor ``force`` is set.
        OFTSurgeryError: as for a fold in memory.
    """
    check_destination(plan, destination, resume=resume, force=force)
    key = fingerprint(plan)
    with staging_at(destination, key, needed=plan.nbytes, resume=resume, force=force) as staging:
        record = write_plan(
            plan,
            staging,
            device=device,
            resume=resume,
            force=force,
            progress=progress,
            calibrate=calibrate,
            write_shards=write_shards,
        )
        return publish(plan, staging, record)


def publish(plan: CheckpointPlan, staging: Staging, record: FoldRecord | None) -> FoldRecord | None:
    """Make the finished output the destination; return the record as it is there."""
    if plan.source.single:
        return publish_single_file(staging, plan.shards[0].file, record)
    staging.publish(last=plan.shards[0].file if len(plan.shards) == 1 else plan.source.layout.output.index)
    return record


def write_plan(
    plan: CheckpointPlan,
    staging: Staging,
    *,
    device: str,
    resume: bool,
    force: bool,
    progress: Progress | None,
    calibrate: Calibrate | None = None,
    write_shards: WriteShards | None = None,
) -> FoldRecord | None:
    """Write everything of ``plan`` into the unfinished output ``staging``, which the caller publishes."""
    with contextlib.nullcontext() if calibrate is None else calibrate(staging) as inputs_of:
        run = Run(plan, torch.device(device), progress, inputs_of)
        left = begin_run(run, staging, resume=resume)
        if write_shards is not None:
            write_shards(run, left, staging)
        else:
            for shard in left:
                run.shard(shard, staging)
    return finish_run(run, staging, force=force)


def begin_run(run: Run, staging: Staging, *, resume: bool) -> list[Shard]:
    """The shards that are left to write."""
    undo = run.plan.undo
    if resume and undo is not None and undo.is_file():
        with contextlib.suppress(UndoError):  # the run was killed between its undo record and the last rename
            run.written = open_undo(undo)
    return [shard for shard in run.plan.shards if not run.take_finished(shard, staging)]


def finish_run(run: Run, staging: Staging, *, force: bool) -> FoldRecord | None:
    """Warn, and write what lies beside the shards, which are all written."""
    plan = run.plan
    staging.settle()  # the headers of all shards are read now, and behind a URL the last shard is on its way
    record = run.record()
    if not plan.unfolds and record is not None:
        engine.finish_fold(record, plan.changes, plan.store.ties, on_disk=True)
    elif plan.changes.rotate:
        engine.finish_unfold(plan.changes, run.modules, plan.store.record)
    if plan.undo is not None and record is not None:
        run.write_undo(plan.undo, record, staging, force=force)
    # an unfolded checkpoint keeps the sizes in the earlier fold's record
    before = None if plan.unfolds else plan.source.nbytes
    if plan.source.single:
        return record if record is None or before is None else with_sizes(staging, plan.shards[0].file, record, before)
    return write_other_files(
        staging,
        [shard.file for shard in plan.shards],
        record,
        source=plan.source.folder,
        jsons={"config.json": plan.config},
        carried=plan.carried,
        exact=not plan.converts,
        before=before,
        layout=plan.source.layout.output,
    )


def check_destination(plan: CheckpointPlan, destination: Path, *, resume: bool, force: bool) -> None:
    """Refuse a destination whose writing would change or remove the folders that are read, and a place of the undo record where
    something is.
    """
    stores = [plan.store, *(j.origin for j in plan.jobs)]
    sources = {s.source.path for s in stores if s is not None}
    adapters = [Path(a.source) for a in plan.changes.adapters if a.source is not None]
    check_apart(destination, "source", sources)
    if plan.source.single:
        check_single_destination(destination, force=force)
    check_apart(destination, "adapter", [path for path in adapters if url_path(path) is not None or path.is_dir()])
    if plan.undo is not None and place_in_full(plan.undo).is_relative_to(place_in_full(destination)):
        raise StateError(
            "the undo record would be inside the destination",
            path=plan.undo,
            remedy="name a file outside the destination: undo=… (--undo)",
        )
    if plan.undo is not None and not (resume and plan.undo.is_file()):
        check_place(plan.undo, force=force)


def fingerprint(plan: CheckpointPlan) -> str:
    """Hash of everything that decides the output: unfinished work with another fingerprint is not resumed."""
    facts = {
        "source": plan.source.identity,
        "adapters": [a.fingerprint for a in plan.changes.adapters],
        "target": str(plan.target),
        "quantization": str(plan.store.quantization),
        "fold_into": plan.fold_into,
        "shards": [[s.file, [list(plan.jobs[i].outputs) for i in s.items]] for s in plan.shards],
        "config": dict(plan.config),
        "unfolds": plan.unfolds,
        "rounding": plan.rounding,
        "calibration": dict(plan.calibration),
        "versions": versions(),
        "undo": plan.undo is not None,
        "undone": None if plan.undone is None else plan.undone.identity,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(eq=False)
class Run:
    """One run of a plan, with its progress and the records of the folded modules."""

    plan: CheckpointPlan
    device: torch.device
    progress: Progress | None
    inputs_of: InputsOf | None

    def __post_init__(self) -> None:
        self.done = 0
        self.total = sum(job.nbytes for job in self.plan.jobs)
        self.facts: dict[str, Mapping[str, Any]] = {}  # of the written shards
        #: name of a part → names of the replaced tensors whose values the part holds
        self.named: dict[str, list[str]] = {}
        held, changes = {part.name for part in self.plan.parts}, self.plan.changes
        for name in (name for change in changes.replace for name in changes.recorded(change)):
            at = name if name in held else self.plan.store.architecture.tied.get(name, name)
            self.named.setdefault(at, []).append(name)
        self.written: UndoRecord | None = None

    def step(self, name: str, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total, name)

    def take_finished(self, shard: Shard, staging: Staging) -> bool:
        """Take over the facts of a shard that an earlier run has finished; False for a shard that is to be written."""
        finished = staging.finished(shard.file)
        lost = self.plan.undo is not None and self.written is None and staging.finished(undo_part(shard)) is None
        if finished is not None and lost:  # the shard's part of the undo record
            staging.drop(shard.file)
            finished = None
        if finished is None:
            return False
        self.facts[shard.file] = finished
        for job in (self.plan.jobs[i] for i in shard.items):
            self.step(label(job), job.nbytes)
        return True

    @property
    def modules(self) -> dict[str, ModuleRecord]:
        """The records of the folded modules, in the order of the plan."""
        found = [self.facts.get(shard.file, {}).get("modules", {}) for shard in self.plan.shards]
        return {path: ModuleRecord.from_dict(m) for modules in found for path, m in modules.items()}

    @property
    def saved(self) -> dict[str, str | None]:
        found = [self.facts.get(shard.file, {}).get("saved", {}) for shard in self.plan.shards]
        return {name: before for saved in found for name, before in saved.items()}

    def shard(self, shard: Shard, staging: Staging) -> None:
        """Write a shard."""
        with self.opened(shard, staging) as (operation, writer):
            items = self.items(operation, [self.plan.jobs[i] for i in shard.items])
            write_items(writer, items, lambda item: self.step(item.name, item.nbytes))

    @contextlib.contextmanager
    def opened(self, shard: Shard, staging: Staging) -> Iterator[tuple[engine.Operation, ShardWriter]]:
        """The writer of a shard, which is whole at the end of the body, and the operation that makes the shard's tensors."""
        staging.drop_parts(shard.file, unfinished=True)
        outputs = {name: output for i in shard.items for name, output in self.plan.jobs[i].outputs.items()}
        operation = self.operation()
        with contextlib.ExitStack() as stack:
            if self.plan.undo is not None:
                place = stack.enter_context(staging.writing(undo_part(shard)))
                operation.undo = UndoCollector(stack.enter_context(place.open("wb")))
            path = stack.enter_context(staging.writing(shard.file))
            yield operation, stack.enter_context(ShardWriter(path, outputs, self.metadata))
        if operation.undo is not None:
            staging.finish(undo_part(shard), {"undo": operation.undo.facts})
        self.facts[shard.file] = facts_of(operation)
        staging.finish(shard.file, self.facts[shard.file])

    def operation(self) -> engine.Operation:
        return engine.Operation(self.plan.changes, self.plan.rounding, self.inputs_of, sibling=self._sibling)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of the files of weights."""
        record = self.record()
        own = {} if record is None else {"oftsurgery": record.header(format=self.plan.format)}
        return {**self.plan.source.metadata, **own}

    def items(self, operation: engine.Operation, jobs: Sequence[Job]) -> list[Item]:
        """What reads, computes and writes ``jobs``."""
        return [
            Item(label(job), job.outputs, job.nbytes, partial(self.load, job), partial(self._make, operation, job))
            for job in jobs
        ]

    def write_undo(self, path: Path, record: FoldRecord, staging: Staging, *, force: bool) -> None:
        """Join the shards' parts to the undo record at ``path``, unless a killed run has already written the record."""
        plan = self.plan
        staging.settle()
        if self.written is None or not self.written.is_of(record):
            with UndoWriter(path, force=force) as writer:
                for shard in plan.shards:
                    facts = staging.finished(undo_part(shard))
                    if facts is None:
                        raise StateError(
                            "the file holds the undo record of another fold, and this fold's undo data are lost",
                            path=path,
                            remedy="start again with another file for the undo record (--undo FILE) and force=True (--force)",
                        )
                    writer.append(facts["undo"], staging.chunks(undo_part(shard)))
                tied = plan.store.architecture.tied
                config = plan.source.config
                if plan.format == "same":
                    config = config_as_stored(plan.source, config)
                else:
                    config = configs.output_config(config, plan.format, plan.store.quantization, untied=False)
                writer.finish(
                    record,
                    # the checkpoint keeps the other tensors, which the source held by themselves
                    ties=[
                        [next(n for n in group if n not in tied), *(n for n in group if n in tied)]
                        for group in plan.changes.apart
                    ],
                    tie_word_embeddings=plan.store.ties.flag,
                    config=config,
                )
        for shard in plan.shards:
            staging.drop(undo_part(shard))

    # --- one job ---

    def load(self, job: Job) -> Any:
        store = job.origin or self.plan.store
        if job.copied is not None:
            return job.copied.chunks(job.name)
        if job.values is not None:
            return [codecs.dense(job.values)]
        if job.unit is not None:
            made, tied = store.read_unit(job.unit), store.architecture.tied
            return [codecs.dense(made[tied.get(part.name, part.name)]) for part in job.parts]
        if isinstance(job.parts[0].home, PackageFormat) and isinstance(store.source, DequantisedCheckpoint):
            return [store.source.stored(job.name)]
        if job.parts[0].matrix:
            return [load_weight(store.source, job.name, transposed=job.transposed)]
        return [codecs.dense(store.source.read(job.name))]

    def _make(self, operation: engine.Operation, job: Job, loaded: Any) -> Mapping[str, Any]:
        if not job.parts:
            return {job.name: loaded}
        new = [self._changed(operation, job, part, stored) for part, stored in zip(job.parts, loaded, strict=True)]
        if job.unit is not None and set(job.outputs) == set(job.unit.stored):
            plain = {part.name: encoded.tensors["weight"] for part, encoded in zip(job.parts, new, strict=True)}
            return {name: tensor.to(job.outputs[name][0]) for name, tensor in job.unit.store(plain).items()}
        made: dict[str, Tensor] = {}
        for part, encoded in zip(job.parts, new, strict=True):
            if job.transposed and not encoded.format.quantised:
                encoded = codecs.dense(encoded.tensors["weight"].t())
            made |= {**encoded.format.kind.to_checkpoint(part.output, encoded), **part.beside}
        return {n: made[n] if shape is None else made[n].reshape(shape) for n, (_, shape) in job.outputs.items()}

    def _changed(self, operation: engine.Operation, job: Job, part: Part, stored: EncodedWeight) -> EncodedWeight:
        """The changed tensor of one part."""
        before = self._before(part, stored)
        if part.check is not None:
            part.check(before, stored)
        if part.restore is not None:
            return part.restore(before)
        new = before if part.values is None else self._replaced(operation, job, part, part.values, before)
        if part.rotate is not None:
            as_stored = part.base is None and job.unit is None and part.output == job.name
            as_stored = as_stored and not isinstance(part.into, PackageFormat)
            beside = _beside(self.plan.source, job.name, before) if as_stored and operation.undo is not None else None
            return operation.rotate(part.rotate, new, part.into, before, beside)
        if new.format == part.into:
            return new
        if part.matrix:
            return fold_encoded(new, (), part.into, "nearest").encoded
        return codecs.encode(new.tensors["weight"], part.into)

    def _before(self, part: Part, stored: EncodedWeight) -> EncodedWeight:
        """A part as loading has it, on the device."""
        before = EncodedWeight(stored.format, {k: t.to(self.device) for k, t in stored.tensors.items()})
        return before if part.base is None else codecs.as_loaded(before, part.base)

    def _sibling(self, name: str) -> EncodedWeight:
        """The weight ``name`` before the fold, which another weight's rotation needs."""
        job, i = next((job, i) for job in self.plan.jobs for i, part in enumerate(job.parts) if part.name == name)
        return self._before(job.parts[i], self.load(job)[i])

    def _replaced(
        self, operation: engine.Operation, job: Job, part: Part, own: Tensor, before: EncodedWeight
    ) -> EncodedWeight:
        values = own.to(self.device, part.into.dtype if part.rotate is None else before.format.dtype)
        old: Any = before if before.format.quantised else before.tensors["weight"]
        if job.unit is None and isinstance(old, Tensor):  # in the stored shape
            old = old.t() if job.transposed else old.reshape(self.plan.source.entries[job.name].shape)
        for name in self.named.get(part.name, ()):
            operation.replaced(name, old, values)
        return canonical(values, transposed=job.transposed) if part.matrix else codecs.dense(values)

    # --- the record ---

    def record(self) -> FoldRecord | None:
        plan = self.plan
        before = plan.store.record
        if plan.unfolds:
            return engine.earlier_record(before if before is not None or plan.undone is None else plan.undone.fold)
        record = engine.fold_record(plan.changes, before, self.modules, self.saved, plan.rounding)
        return replace(
            record,
            adapters=tuple(map(public_info, record.adapters)),
            added=tuple(plan.store.added),
            calibrated_on=plan.calibration,
            base={
                "fold_into": plan.rotates,
                **({"format": plan.format} if plan.converts else {}),
                **(plan.trained_on.facts if plan.trained_on is not None else {}),
                **facts_of_quantization(plan.store.quantization),
                **({} if plan.source.stored_as is None else {"stored_as": plan.source.stored_as}),
                **_facts_of_revision(plan.source),
            },
        )


def _facts_of_revision(source: Checkpoint) -> dict[str, str | None]:
    """The revision that was asked for of a Hub repository, and the commit that was folded; nothing for a local folder."""
    commits = (commit_of(folder) for folder in (source.folder, *source.folder.parents))
    facts = {"revision": source.revision, "commit": next((commit for commit in commits if commit is not None), None)}
    return {name: fact for name, fact in facts.items() if fact is not None}


def label(job: Job) -> str:
    """The name of a job in messages and bars: the module that is rotated, or the tensor."""
    return next((p.rotate.path for p in job.parts if p.rotate is not None), job.name)


def facts_of(operation: engine.Operation) -> dict[str, dict[str, Any]]:
    """The ``modules`` and ``saved`` that an operation has recorded, as plain values."""
    return {
        "modules": {path: module.to_dict() for path, module in operation.modules.items()},
        "saved": dict(operation.saved),
    }


def undo_part(shard: Shard) -> str:
    return f"{shard.file}.undo"


def _beside(source: Checkpoint, name: str, weight: EncodedWeight) -> dict[str, Any]:
    """``{end of the name: tensor as JSON}`` of small tensors beside a weight that differ from those that
    :meth:`~oftsurgery.formats.base.Format.to_checkpoint` makes of the weight.
    """
    usual = weight.format.kind.to_checkpoint(name, weight)
    there = checkpoint_tensors.companion_names(name, source.entries)
    found = {}
    for n in {*usual, *there} - {name}:
        stored = source.read(n) if n in there and source.entries[n].nbytes <= ShardWriter.LATE_BYTES else None
        if n not in there or (
            stored is not None and (n not in usual or tensor_as_json(stored) != tensor_as_json(usual[n]))
        ):
            found[n.removeprefix(name.removesuffix("weight"))] = tensor_as_json(stored)
    return found
