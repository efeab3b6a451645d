"""The plans in this file take the last fold out of a checkpoint on disk: by rotating back, from the base, or by an undo
record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.dtypes import DTYPES
from oftsurgery.errors import IntegrityError, LeftOutWarning, StateError, warn_caller
from oftsurgery.files.carried import Carried
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.tokenizer_files import restore_tokenizer
from oftsurgery.formats import checkpoint_tensors, codecs
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import RECORD, record_beside
from oftsurgery.stores import configs
from oftsurgery.stores.dequantised import config_as_stored
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.ties import FLAG

from . import engine
from .disk_jobs import Check, Job, JobBuilder, Part, copy_job
from .disk_plan import CheckpointPlan, carried_of, make_plan
from .plan import FoldPlan, plan_changes
from .quantised_first import recorded_quantization
from .undo_reader import UndoRecord


def plan_unfold(
    folded: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    rounding: str = "nearest",
    max_shard_bytes: int = 5_000_000_000,
) -> CheckpointPlan:
    """Plan to take the last fold out of a checkpoint by rotating back; the formats stay. The result is not exact for
    quantised or half-precision weights.

    Raises:
        StateError: the checkpoint's record names other adapters.
        OFTSurgeryError: as for :func:`~oftsurgery.folding.disk_plan.plan_checkpoint`.
    """
    codecs.check_rounding(rounding)
    store = FolderStore(folded)
    changes = plan_changes(store, adapters, inverse=True)
    jobs = JobBuilder(store, replace(changes, replace=changes.turned)).jobs()
    plan = make_plan(store, jobs, config_as_stored(folded, folded.config), max_shard_bytes, _carried(folded))
    return replace(plan, changes=changes, rounding=rounding)


def plan_restore(folded: Checkpoint, base: Checkpoint, *, max_shard_bytes: int = 5_000_000_000) -> CheckpointPlan:
    """Plan to take the last fold out of a checkpoint exactly.

    The changed tensors come from ``base`` (quantised again where the fold quantised the base), and are checked against
    the record's hashes.

    Raises:
        StateError: the folded checkpoint has no record, or another format than the base had.
        MatchError: the base lacks a tensor that was folded.
    """
    record = record_beside(folded)
    if record is None:
        message = f"the checkpoint has no {RECORD}"
        remedy = "give the adapter in place of the base: adapter=… (--adapter) rotates back"
        raise StateError(message, path=folded.folder, remedy=remedy)
    if "format" in record.base:
        raise engine.other_format("checkpoint", path=folded.folder)
    quantization = recorded_quantization(record, folded.config)
    origin = FolderStore(base, quantization)
    store = FolderStore(folded)
    wanted: dict[str, list[engine.Original]] = {}
    for original in engine.originals(record, origin):
        wanted.setdefault(origin.architecture.tied.get(original.at, original.at), []).append(original)
    touched = {name: any(o.weight for o in found) for name, found in wanted.items()}
    jobs = []
    for job in JobBuilder(origin, FoldPlan(), touched=touched).jobs():
        _check_same_format(job, folded, touched)
        if any(part.name in wanted for part in job.parts):
            parts = tuple(replace(p, check=_original_check(p.name, wanted.get(p.name, ()), store)) for p in job.parts)
            jobs.append(replace(job, parts=parts, origin=origin))
        elif all(n in folded.as_stored.entries and n not in record.added for n in job.outputs):
            # untouched by the fold: the folded checkpoint's own bytes
            jobs += [copy_job(folded.as_stored, n) for n in job.outputs]
        else:
            jobs.append(replace(job, origin=origin))
    shapes = {o.name: origin.shape(o.at) for found in wanted.values() for o in found}
    vocabulary = store.vocabulary({store.locate([n]).get(n, n): shape for n, shape in shapes.items()})
    config = configs.restored_config(folded.config, base.config, head=bool(record.added), vocabulary=vocabulary)
    config = config_as_stored(folded, config)
    carried = carried_of(folded)
    if _brought(record):
        carried = restore_tokenizer(carried, carried_of(base))
    return make_plan(store, jobs, config, max_shard_bytes, carried)


def _carried(folded: Checkpoint) -> Carried:
    """The files beside the weights of a folded checkpoint without its base; one :class:`LeftOutWarning` names the files that
    stay the adapter's.
    """
    brought = _brought(record_beside(folded))
    if brought:
        warn_caller(
            f"the output has the {' and the '.join(brought)} that the fold brought, not the base's: unfold with base=… (--base), or copy the "
            "base's files",
            LeftOutWarning,
        )
    return carried_of(folded)


def _brought(record: FoldRecord | None) -> list[str]:
    """The names, "tokenizer" and "chat template", of the parts that the last fold brought in place of the base's parts."""
    whose = {} if record is None else {"tokenizer": record.tokenizer, "chat template": record.chat_template}
    return [what for what, name in whose.items() if name not in (None, "base")]


def _original_check(name: str, wanted: Sequence[engine.Original], folded: FolderStore) -> Check:
    """The check of a tensor of the base: by the record's hash, or, for a tensor that only shares a unit with a changed
    tensor, by the folded checkpoint's tensor.
    """

    def check(found: EncodedWeight, stored: EncodedWeight) -> None:
        for original in wanted:
            original.check(found, stored)
        if wanted:
            return
        there = folded.weight(name, found.format)
        if there is None or there.fingerprint != found.fingerprint:
            message = "the base differs from the folded checkpoint in a tensor that the fold did not touch"
            raise IntegrityError(message, tensor=name, remedy="give exactly the checkpoint that was folded (--base)")

    return check


def _check_same_format(job: Job, folded: Checkpoint, weights: Mapping[str, bool]) -> None:
    """Refuse a folded checkpoint whose formats differ from the base's."""
    if not any(weights.get(part.name) for part in job.parts):
        return
    for name, (dtype, shape) in job.outputs.items():
        there = folded.as_stored.entries.get(name)
        alike = there is not None and shape in (None, there.shape) and DTYPES[there.dtype] == dtype
        if not alike:
            raise engine.other_format("checkpoint", tensor=name)


def plan_undo(folded: Checkpoint, undo: UndoRecord, *, max_shard_bytes: int = 5_000_000_000) -> CheckpointPlan:
    """Plan to take the last fold out of a checkpoint exactly, by its undo record.

    Raises:
        StateError: the record's fold is not the checkpoint's last fold.
        MatchError: the checkpoint lacks a tensor that the record restores.
        UndoError: the record is damaged.
    """
    store = FolderStore(folded)
    back = engine.undone(undo, store)
    named = store.locate([*back, *(n for group in undo.ties for n in group)])
    tied = store.architecture.tied
    restored = {tied.get(named[name], named[name]): (name, read) for name, read in back.items()}
    # a checkpoint holds only the first of tensors that were tied
    dropped: set[str] = set()
    checks: dict[str, Check] = {}
    for group in undo.ties:
        first, *others = (named[n] for n in group if n in named)
        dropped |= set(others) - {first}
        for other in others:
            path = restored[other][0].removesuffix(".weight") if other in restored else ""
            if path in undo.weights and first not in restored:
                checks[first] = partial(_check_shared, undo, path)
    touched = {name: given.removesuffix(".weight") in undo.weights for name, (given, _) in restored.items()}
    jobs = []
    for job in JobBuilder(store, FoldPlan(), touched=touched | dict.fromkeys(checks, True)).jobs():
        if ({p.name for p in job.parts} or {store.architecture.renamed.get(job.name, job.name)}) <= dropped:
            continue
        for part in job.parts:
            if part.name in restored:
                job = _undone_job(job, part, undo, *restored[part.name])
            elif part.name in checks:
                job = _with_part(job, replace(part, check=checks[part.name]))
        jobs.append(job)
    config = config_as_stored(folded, undo.config or folded.config)
    if not undo.config and undo.tie_word_embeddings is not None:
        config = configs.restored_config(config, {FLAG: undo.tie_word_embeddings})
    return replace(make_plan(store, jobs, config, max_shard_bytes, _carried(folded)), undone=undo)


def _check_shared(undo: UndoRecord, path: str, found: EncodedWeight, _: EncodedWeight) -> None:
    undo.check_shared(path, found)


def _with_part(job: Job, part: Part) -> Job:
    """``job`` with ``part`` in place of the part of the same name."""
    return replace(job, parts=tuple(part if p.name == part.name else p for p in job.parts))


def _undone_job(
    job: Job, part: Part, undo: UndoRecord, name: str, read: Callable[[EncodedWeight], EncodedWeight]
) -> Job:
    """``job`` with the original in place of the folded tensor ``name``, which ``part`` holds."""
    path = name.removesuffix(".weight")
    if job.unit is None and name in undo.tensors:
        dtype, _ = job.outputs[part.output]
        job = replace(job, outputs={part.output: (dtype, undo.shape(name, part.into.shape))})
    if job.unit is not None or path not in undo.weights or undo.shared_with(path) is not None:
        return _with_part(job, replace(part, restore=read))
    before = undo.format(path, part.into)
    outputs = dict(checkpoint_tensors.checkpoint_shapes(part.output, before) if before.quantised else job.outputs)
    beside = {}
    for suffix, tensor in undo.files(path).items():
        output = part.output.removesuffix("weight") + suffix
        if tensor is None:
            outputs.pop(output, None)
        else:
            outputs[output], beside[output] = (tensor.dtype, tuple(tensor.shape)), tensor
    return replace(job, outputs=outputs, parts=(replace(part, into=before, restore=read, beside=beside),))
