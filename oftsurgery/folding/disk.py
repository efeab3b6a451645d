"""Fold adapters into checkpoints on disk: a plan from headers and JSON alone, then one weight at a time, never the
model.

:func:`plan_checkpoint` says everything that will happen; :func:`run_plan` does it, into a folder beside the destination
that becomes it by one rename. Whatever is written is a function of the inputs alone, so a run that was killed and
resumed gives the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.dtypes import DENSE, DTYPES, FLOATS, name_of
from oftsurgery.errors import FormatError, IntegrityError, MatchError, StateError, UndoError, printable
from oftsurgery.files.shards import Checkpoint, ShardWriter
from oftsurgery.files.staging import Staging, check_apart
from oftsurgery.formats import checkpoint_tensors, codecs
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.progress import Progress
from oftsurgery.records import card
from oftsurgery.records.record import AdapterInfo, FoldRecord, ModuleRecord, versions
from oftsurgery.stores import configs
from oftsurgery.stores.conversion import Unit, check_known
from oftsurgery.stores.folder import FolderStore, Quantization, canonical, load_weight
from oftsurgery.stores.ties import FLAG
from oftsurgery.weights.calibrate import InputsOf
from oftsurgery.weights.fold import fold_encoded

from . import engine
from .folder_writer import Item, Outputs, Shard, size_of, split, write_rest, write_shard
from .plan import FoldPlan, Rotate, plan_changes, takes_no_values
from .undo_file import UndoParts, UndoRecord, UndoWriter, check_free, described, open_undo

__all__ = ["CheckpointPlan", "Quantization", "plan_checkpoint", "plan_restore", "plan_undo", "plan_unfold", "run_plan"]

Format = Literal["same", "fp32", "fp16", "bf16", "nf4", "fp4", "int8"]
QUANTISED = tuple(name for name, kind in FORMATS.items() if kind.quantised)

#: raises where a tensor, as loading has it and as it is stored, is not what it must be
Check = Callable[[EncodedWeight, EncodedWeight], None]


@dataclass(frozen=True, eq=False)
class Part:
    """What becomes of one tensor of the model.

    Attributes:
        name: of the tensor.
        output: that it is written as.
        into: format that is written.
        base: format in which loading has a plain tensor before it changes; None for the stored one.
        matrix: it is a weight, handled in its canonical shape; other tensors are as they are.
        values: an adapter's own, in place of the stored ones.
        rotate: the rotations, after that.
        check: of what is read.
        restore: what is there becomes this instead (an undo record's doing).
        beside: ``{output: tensor}`` to write in place of what follows from the restored weight.
    """

    name: str
    output: str
    into: WeightFormat
    base: WeightFormat | None = None
    matrix: bool = True
    values: Tensor | None = None
    rotate: Rotate | None = None
    check: Check | None = None
    restore: Callable[[EncodedWeight], EncodedWeight] | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        return self.values is not None or self.rotate is not None or self.restore is not None


@dataclass(frozen=True, eq=False)
class Job:
    """What becomes of one stored weight or tensor, or of a unit of them.

    Attributes:
        name: of the first of them.
        outputs: ``{name: (dtype, shape)}``.
        nbytes: that are read, for progress.
        parts: of the model; none where the bytes are copied.
        transposed: a plain weight is held ``(in, out)``.
        unit: that the tensors are of, or None.
        origin: what is read, where it is not the plan's store.
    """

    name: str
    outputs: Outputs
    nbytes: int
    parts: tuple[Part, ...] = ()
    transposed: bool = False
    unit: Unit | None = None
    origin: FolderStore | None = None


@dataclass(frozen=True, eq=False)
class CheckpointPlan:
    """All that a fold on disk does.

    Attributes:
        store: the checkpoint that is read.
        jobs: in the order of the destination.
        shards: the destination's files.
        config: the new ``config.json``.
        carried: other files that are copied.
        changes: of the model.
        format: what is written.
        fold_into: ``"quantized"`` or ``"original"`` weights of a plain source that is quantised.
        unfolds: the last fold is taken out instead of another one put in.
        rounding: of the quantised weights that are rotated.
        calibration: content hash of what they are calibrated on, or None.
        undo: the undo record that is written.
        undone: the one that is used.
    """

    store: FolderStore
    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    carried: tuple[str, ...]
    changes: FoldPlan = field(default_factory=FoldPlan)
    format: str = "same"
    fold_into: str = "quantized"
    unfolds: bool = True
    rounding: str = "nearest"
    calibration: str | None = None
    undo: Path | None = None
    undone: UndoRecord | None = None

    @property
    def source(self) -> Checkpoint:
        return self.store.source

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for job in self.jobs for part in job.parts)

    @property
    def nbytes(self) -> int:
        """That will be written, a guess at the undo record's among them."""
        carried = sum((self.source.folder / name).stat().st_size for name in self.carried)
        rotated = sum(job.nbytes for job in self.jobs if any(p.rotate for p in job.parts))
        return sum(size_of(job.outputs) for job in self.jobs) + carried + (rotated // 4 if self.undo is not None else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what ``oftsurgery plan --json`` prints."""
        q = self.store.quantization
        # in float32: what the memory that is needed grows with
        largest = max((4 * math.prod(p.into.shape) for p in self.parts if p.matrix), default=0)
        return {
            "source": {"files": list(self.source.files), "tensors": len(self.source.entries)},
            "adapters": [AdapterInfo.of(a).to_dict() for a in self.changes.adapters],
            "format": self.format,
            "quantize": None if q is None else {**asdict(q), "compute_dtype": str(q.compute_dtype)},
            "fold_into": self.fold_into,
            "rounding": self.rounding,
            "class": self.store.architecture.name,
            "folds": [
                {
                    "module": part.rotate.path,
                    "tensor": part.name,
                    "from": (part.base or self.store.stored(part.name)).label,
                    "to": part.into.label,
                    "shape": list(part.into.shape),
                    "block_size": [r.block_size for r in part.rotate.chain],
                }
                for part in self.parts
                if part.rotate is not None
            ],
            "converts": sum(bool(j.parts) and not any(p.changes for p in j.parts) for j in self.jobs),
            "copies": sum(not j.parts for j in self.jobs),
            "replaces": [p.output for p in self.parts if p.values is not None and p.rotate is None],
            "idle": list(self.changes.idle),
            "shards": [
                {"file": s.file, "bytes": sum(size_of(self.jobs[i].outputs) for i in s.items)} for s in self.shards
            ],
            "carried": list(self.carried),
            "bytes": self.nbytes,
            "largest_weight_bytes": largest,
        }


# --- planning ---------------------------------------------------------------------------------------------------------


def plan_checkpoint(
    source: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    format: Format = "same",
    quantization: Quantization | None = None,
    fold_into: Literal["quantized", "original"] = "quantized",
    rounding: str = "nearest",
    undo: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> CheckpointPlan:
    """Plan a fold on disk from headers and JSON alone (and the few bytes of JSON inside 4-bit weights' states).

    Raises:
        MatchError: an adapter's module or tensor matches nothing in the checkpoint.
        ShapeError, FormatError: it does not fit, or a weight is stored in a way that is not known.
        StateError: formats that make no sense together, or the adapter is folded in already.
        CheckpointError: the checkpoint cannot be used.
    """
    codecs.check_rounding(rounding)
    if quantization is None and format in QUANTISED:
        quantization = Quantization(format)
    store = FolderStore(source, quantization)
    _check_formats(store, format, fold_into)
    if undo is not None and (format in DENSE or fold_into != "quantized"):
        raise StateError(
            "an undo record gives the bytes back that a fold changes; this one changes the weights' formats too",
            format=format,
            remedy="format='same' or a quantised one, fold_into='quantized'; or keep the base, and unfold with base=…",
        )
    changes = plan_changes(store, adapters) if adapters else FoldPlan()
    jobs = _Builder(store, changes, format, fold_into).jobs()
    config = configs.output_config(source.config, format, quantization, untied=changes.clears_flag)
    plan = _planned(store, jobs, config, max_shard_bytes)
    return replace(
        plan, changes=changes, format=format, fold_into=fold_into, rounding=rounding, undo=undo, unfolds=False
    )


def plan_unfold(
    folded: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    rounding: str = "nearest",
    max_shard_bytes: int = 5_000_000_000,
) -> CheckpointPlan:
    """Plan to rotate the last fold back out of a checkpoint, in the formats that it has. Not exact for quantised or
    half-precision weights.

    Raises:
        StateError: the checkpoint's record names other adapters than these.
        and those of :func:`plan_checkpoint`.
    """
    codecs.check_rounding(rounding)
    store = FolderStore(folded)
    changes = plan_changes(store, adapters, inverse=True)
    jobs = _Builder(store, replace(changes, replace=()), "same").jobs()
    plan = _planned(store, jobs, dict(folded.config), max_shard_bytes)
    return replace(plan, changes=changes, rounding=rounding)


def plan_restore(folded: Checkpoint, base: Checkpoint, *, max_shard_bytes: int = 5_000_000_000) -> CheckpointPlan:
    """Plan to take the last fold out of a checkpoint exactly.

    What it changed comes from ``base`` (quantised again where the fold did), checked against the record's hashes.

    Raises:
        StateError: the folded checkpoint has no record, or is in another format than the base was.
        MatchError: the base lacks what was folded.
    """
    record = configs.record_in(folded.folder)
    if record is None:
        raise StateError(
            f"the checkpoint has no {configs.RECORD}",
            path=folded.folder,
            remedy="give the adapter instead: it is then rotated back",
        )
    quantization = _recorded_quantization(record, folded.config)
    origin = FolderStore(base, quantization)
    written = "same" if quantization is None else quantization.codec
    store = FolderStore(folded)
    wanted: dict[str, list[engine.Original]] = {}
    for original in engine.originals(record, origin):
        wanted.setdefault(origin.architecture.tied.get(original.at, original.at), []).append(original)
    touched = {name: any(o.weight for o in found) for name, found in wanted.items()}
    jobs = []
    for job in _Builder(origin, FoldPlan(), written, touched=touched).jobs():
        if any(part.name in wanted for part in job.parts):
            _check_same_format(job, folded, touched)
            parts = tuple(replace(p, check=_check_of(p.name, wanted.get(p.name, ()), store)) for p in job.parts)
            jobs.append(replace(job, parts=parts, origin=origin))
        elif all(n in folded.entries for n in job.outputs):
            jobs += [_copy(folded, n) for n in job.outputs]  # untouched by the fold: the folded checkpoint's own bytes
        else:
            jobs.append(replace(job, origin=origin))
    config = configs.restored_config(folded.config, base.config)
    return _planned(store, jobs, config, max_shard_bytes)


def _check_of(name: str, wanted: Sequence[engine.Original], folded: FolderStore) -> Check:
    """What checks a tensor of the base: by the record's hash, or where it only shares a unit with one that the fold
    changed, by what the folded checkpoint has.
    """

    def check(found: EncodedWeight, stored: EncodedWeight) -> None:
        for original in wanted:
            original.check(found, stored)
        if wanted:
            return
        there = folded.weight(name, found.format)
        if there is None or there.fingerprint != found.fingerprint:
            raise IntegrityError(
                "the base differs from the folded checkpoint in a tensor that the fold did not touch",
                tensor=name,
                remedy="give the very checkpoint that was folded",
            )

    return check


def plan_undo(folded: Checkpoint, undo: UndoRecord, *, max_shard_bytes: int = 5_000_000_000) -> CheckpointPlan:
    """Plan to take the last fold out of a checkpoint exactly, by its undo record.

    Raises:
        StateError: the record's fold is not the checkpoint's last one.
        MatchError: the checkpoint lacks what the record restores.
        UndoError: the record is damaged.
    """
    store = FolderStore(folded)
    back = engine.undone(undo, store)
    named = store.locate([*back, *(n for group in undo.ties for n in group)])
    restored = {named[name]: (name, read) for name, read in back.items()}
    # of tensors that were one, a checkpoint holds the first
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
    for job in _Builder(store, FoldPlan(), "same", touched=touched | dict.fromkeys(checks, True)).jobs():
        if ({p.name for p in job.parts} or {store.architecture.renamed[job.name]}) <= dropped:
            continue
        for part in job.parts:
            if part.name in restored:
                job = _undone(job, part, undo, *restored[part.name])
            elif part.name in checks:
                job = _with(job, replace(part, check=checks[part.name]))
        jobs.append(job)
    config = dict(undo.config or folded.config)
    if not undo.config and undo.tie_word_embeddings is not None:
        config = configs.restored_config(config, {FLAG: undo.tie_word_embeddings})
    return replace(_planned(store, jobs, config, max_shard_bytes), undone=undo)


def _check_shared(undo: UndoRecord, path: str, found: EncodedWeight, _: EncodedWeight) -> None:
    undo.check_shared(path, found)


def _with(job: Job, part: Part) -> Job:
    """``job`` with ``part`` in place of that of the same name."""
    return replace(job, parts=tuple(part if p.name == part.name else p for p in job.parts))


def _undone(job: Job, part: Part, undo: UndoRecord, name: str, read: Callable[[EncodedWeight], EncodedWeight]) -> Job:
    """``job``, whose ``part`` holds the folded tensor ``name``, with its original instead."""
    path = name.removesuffix(".weight")
    if job.unit is not None or path not in undo.weights or undo.shared_with(path) is not None:
        return _with(job, replace(part, restore=read))
    before = undo.format(path, part.into.shape)
    outputs = dict(checkpoint_tensors.checkpoint_shapes(part.output, before) if before.quantised else job.outputs)
    beside = {}
    for suffix, tensor in undo.files(path).items():
        output = part.output.removesuffix("weight") + suffix
        if tensor is None:
            outputs.pop(output, None)
        else:
            outputs[output], beside[output] = (tensor.dtype, tuple(tensor.shape)), tensor
    return replace(job, outputs=outputs, parts=(replace(part, into=before, restore=read, beside=beside),))


def _recorded_quantization(record: FoldRecord, config: Mapping[str, Any]) -> Quantization | None:
    """How a plain base was quantised before it was folded: by the record, else by the config. None where it was not."""
    base = record.base
    codec = base.get("quantize") if base.get("fold_into") == "quantized" else None
    if codec is None:
        return None
    if "double_quant" in base:
        double, skip = base["double_quant"] == "true", json.loads(base.get("skip_modules") or "null")
    else:
        settings = config.get("quantization_config") or {}
        double, skip = bool(settings.get("bnb_4bit_use_double_quant")), settings.get("llm_int8_skip_modules")
    dtype = getattr(torch, base.get("dtype") or "", None)
    return Quantization(codec, double, skip=None if skip is None else tuple(map(str, skip)), dtype=dtype)


def _recorded(q: Quantization | None) -> dict[str, str | None]:
    """Mirror of :func:`_recorded_quantization`."""
    if q is None:
        return {"quantize": None}
    return {
        "quantize": q.codec,
        "double_quant": json.dumps(q.double_quant),
        "skip_modules": None if q.skip is None else json.dumps(q.skip),
        "dtype": None if q.dtype is None else name_of(q.dtype),
    }


def _check_same_format(job: Job, folded: Checkpoint, weights: Mapping[str, bool]) -> None:
    for part in job.parts:
        name = part.output if part.output in job.outputs else next(iter(job.outputs))
        there = folded.entries.get(name)
        dtype, shape = job.outputs[name]
        if weights.get(part.name) and (there is None or there.shape != shape or DTYPES[there.dtype] != dtype):
            raise StateError(
                "the folded checkpoint is in another format than its base: there is nothing to restore but the base itself",
                tensor=name,
                remedy="use the base checkpoint, or rotate back with the adapter",
            )


def _planned(
    store: FolderStore, jobs: Sequence[Job], config: Mapping[str, Any], max_shard_bytes: int
) -> CheckpointPlan:
    carried = configs.carried_files(store.source.folder)
    card.own_card(store.source.folder)  # is refused now where it cannot be read
    return CheckpointPlan(store, tuple(jobs), split([job.outputs for job in jobs], max_shard_bytes), config, carried)


def _check_formats(store: FolderStore, format: str, fold_into: str) -> None:
    settings = store.source.config.get("quantization_config")
    if settings is not None and not isinstance(settings, Mapping):
        raise FormatError(
            "`quantization_config` is no JSON object",
            tensor="config.json",
            remedy="restore the config.json that was saved",
        )
    method = (settings or {}).get("quant_method")
    if method not in (None, "bitsandbytes"):
        raise FormatError(
            "the checkpoint is quantised by another library",
            format=printable(method),
            remedy="dequantise it first; oftsurgery knows bitsandbytes and plain",
        )
    if format not in ("same", *DENSE, *QUANTISED):
        raise StateError(
            f"unknown format {printable(format)!r}", remedy=f"one of same, {', '.join((*DENSE, *QUANTISED))}"
        )
    if fold_into not in ("quantized", "original"):
        raise StateError(f"unknown fold_into {printable(fold_into)!r}", remedy="'quantized' or 'original'")
    if store.quantization is not None:
        _check_quantised_first(store, store.quantization.codec, format)


def _check_quantised_first(store: FolderStore, codec: str, format: str) -> None:
    if any(map(store.is_quantised, store.source.entries)):
        raise StateError(
            "the checkpoint is quantised already",
            format=format,
            remedy="leave the quantisation out: format 'same' keeps what it has, 'fp16', 'bf16' and 'fp32' dequantise",
        )
    if codec not in QUANTISED:
        raise StateError(f"unknown quantisation {printable(codec)!r}", remedy=f"one of {', '.join(QUANTISED)}")
    if format == "same":
        raise StateError(
            "a plain checkpoint is to be quantised, and to stay as it is",
            remedy=f"format='{codec}' to write it so, or 'fp16', 'bf16', 'fp32'",
        )
    if format in QUANTISED and format != codec:
        raise StateError(f"quantised to {codec}, but written as {format}", remedy="name one of the two")
    if store.architecture.linears is None:
        raise StateError(
            "which modules bitsandbytes loading quantises is known from the model's class alone, and transformers does not know it, or is absent",
            remedy="pip install 'oftsurgery[peft]', or quantise the model with transformers first",
        )


def _copy(source: Checkpoint, name: str) -> Job:
    entry = source.entries[name]
    return Job(name, {name: (DTYPES[entry.dtype], entry.shape)}, entry.nbytes)


@dataclass(eq=False)
class _Builder:
    """Makes the jobs that turn what ``store`` holds into what a folder holds after ``changes``.

    Attributes:
        format: that is written.
        fold_into: ``"original"``: rotated weights are not quantised first.
        touched: ``{name of a tensor that is to be a part, whether it changes or not: it is a weight}``.
    """

    store: FolderStore
    changes: FoldPlan
    format: str
    fold_into: str = "quantized"
    touched: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries = self.store.source.entries
        self.architecture = self.store.architecture
        self.rotate = {change.name: change for change in self.changes.rotate}
        self.values = {place: change.values for change in self.changes.replace for place in change.places}
        self.touched = {**dict.fromkeys(self.values, False), **self.touched, **dict.fromkeys(self.rotate, True)}

    def jobs(self) -> list[Job]:
        made: list[Job] = []
        done: set[str] = set()
        for name in self.entries:
            if name in done:
                continue
            unit = self.architecture.units.get(name)
            target = name if unit is not None and name in self.touched else self.architecture.renamed[name]
            if unit is not None and self._touches(unit):
                done.update(unit.stored)
                made.append(self._of_unit(unit))
            elif not checkpoint_tensors.is_companion(name, self.entries):  # that comes with its weight
                group = checkpoint_tensors.companion_names(name, self.entries) if name.endswith("weight") else (name,)
                done.update(group)
                if target in self.touched or self._converts(target, name):
                    made.append(self._of_tensor(target, name, name, group))
                else:
                    made += [self._plain(n) for n in group]
        made += [self._untied(name) for name in self._to_untie()]
        return made

    def _touches(self, unit: Unit) -> bool:
        made = any(name in self.touched or self.store.quantises(name) for name in unit.model)
        own = next((name for name in unit.stored if name in self.touched), None)
        if own is not None and made:
            raise MatchError(
                "the fold would change both the checkpoint's own tensor and what transformers makes of it as it loads",
                tensor=own,
                remedy="name the model's modules in the adapter, as the class has them: "
                + ", ".join(printable(name.removesuffix(".weight")) for name in unit.model),
            )
        return made

    def _converts(self, target: str, name: str) -> bool:
        """Whether a weight changes its codec without any rotation."""
        return self.store.quantises(target) or (self.format in DENSE and self.store.is_quantised(name))

    # --- one job of a kind ---

    def _plain(self, name: str, target: str = "", output: str = "") -> Job:
        """A stored tensor as it is, but for its dtype and an adapter's own values; as the model's ``target``, where that
        is to be a part.
        """
        entry, stored = self.entries[name], self.store.dtype(name)
        part = self._cast(target or name, output or name, WeightFormat("dense", entry.shape, stored))
        if not target and stored == part.into.dtype == (part.base or part.into).dtype:
            return _copy(self.store.source, name)
        return Job(name, {part.output: (part.into.dtype, entry.shape)}, entry.nbytes, (part,))

    def _cast(self, name: str, output: str, stored: WeightFormat) -> Part:
        """A tensor as it is, but for its dtype and an adapter's own values."""
        loaded, into = None, stored
        if stored.dtype in FLOATS:
            loaded = self.store.loaded_dtype(name)
            into = replace(stored, dtype=DENSE.get(self.format, loaded or stored.dtype))
        base = None if loaded is None else replace(stored, dtype=loaded)
        return Part(name, output, into, base, matrix=False, values=self.values.get(name))

    def _of_tensor(self, target: str, name: str, output: str, group: Sequence[str], *, untied: bool = False) -> Job:
        """The model's tensor ``target`` from the stored one ``name``."""
        entry = self.entries[name]
        if target in self.values and DTYPES[entry.dtype] not in FLOATS:
            raise takes_no_values(target, entry.dtype)
        converts = self._converts(target, name) and target not in self.values
        if not (self.touched.get(target) or converts or len(group) > 1):
            return self._plain(name, target, output)
        part = self._weight(target, output, untied=untied)
        outputs = checkpoint_tensors.checkpoint_shapes(output, part.into)
        transposed = name in self.architecture.transposed
        if not part.into.quantised:
            shape = entry.shape if len(entry.shape) == 4 else part.into.shape[::-1] if transposed else part.into.shape
            outputs = {output: (part.into.dtype, shape)}
        return Job(name, outputs, sum(self.entries[n].nbytes for n in group), (part,), transposed)

    def _weight(self, name: str, output: str, *, untied: bool = False) -> Part:
        stored = self.store.stored(name)
        loaded = self.store.loaded(name)
        if untied:  # an output head, which loading leaves as it is
            loaded = replace(stored, dtype=self.store.loaded_dtype(name) or stored.dtype)
        base = None if loaded == stored else loaded
        into = loaded.kind.once_quantised(loaded)
        if self.format in DENSE:
            into = WeightFormat("dense", stored.shape, DENSE[self.format])
        if self.fold_into == "original" and name in self.rotate:
            base = None
        return Part(name, output, into, base, values=self.values.get(name), rotate=self.rotate.get(name))

    def _of_unit(self, unit: Unit) -> Job:
        """Tensors that transformers converts: written as they are stored, or where loading quantises one of them, by the
        model's names.
        """
        split_up = self.format not in DENSE and any(self.store.quantises(name) for name in unit.model)
        path = next((n for n in unit.model if n in self.touched), next(iter(unit.model), next(iter(unit.stored))))
        check_known(unit, path.removesuffix(".weight"), back=not split_up)
        parts = [self._made(name) for name in unit.model]
        as_stored = {name: (parts[0].into.dtype, shape) for name, shape in unit.stored.items()}
        return self._unit_job(unit, parts, None if split_up else as_stored)

    def _made(self, name: str, *, untied: bool = False) -> Part:
        """A tensor that a unit makes, or one that is tied to such a tensor."""
        if self.touched.get(name) or (self.store.quantises(name) and not untied):
            return self._weight(name, name, untied=untied)
        return self._cast(name, name, self.store.stored(name))

    def _unit_job(self, unit: Unit, parts: Sequence[Part], outputs: Outputs | None = None) -> Job:
        nbytes = sum(self.entries[name].nbytes for name in unit.stored)
        if outputs is None:
            outputs = {n: o for p in parts for n, o in checkpoint_tensors.checkpoint_shapes(p.output, p.into).items()}
        return Job(next(iter(unit.stored)), outputs, nbytes, tuple(parts), unit=unit)

    def _to_untie(self) -> list[str]:
        """Names that the checkpoint lacks, since they were tied, and that the destination holds."""
        flagged = self.store.ties.flagged
        for group in self.changes.apart:
            if not flagged.issuperset(group):
                raise FormatError(
                    "the model's class holds one module in several places, and no checkpoint can hold two for it",
                    tensor=group[0],
                    remedy="load the model and fold it in memory; it cannot be saved and loaded again",
                )
        names = [n for group in self.changes.apart for n in group if n in self.architecture.tied]
        if self.changes.clears_flag:
            return names
        # nothing but what differs from the one that it was tied to
        return [n for n in names if {n, self.architecture.tied[n]} & self.changes.changed]

    def _untied(self, name: str) -> Job:
        unit = self.store.unit(name)
        if unit is not None:
            return self._unit_job(unit, [self._made(name, untied=True)])
        holder = self.store.holder(name)
        return self._of_tensor(name, holder, name, (holder,), untied=True)


# --- running ----------------------------------------------------------------------------------------------------------


def run_plan(
    plan: CheckpointPlan,
    destination: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    inputs_of: InputsOf | None = None,
) -> FoldRecord | None:
    """Do what ``plan`` says, calibrated where ``inputs_of`` gives the inputs of the layer at a path.

    Everything is written into ``.<name>.oftsurgery`` beside ``destination`` and appears by one rename, after all has
    been said that is to be warned of. After an error or a kill that folder stays, and ``resume=True`` goes on from the
    last whole shard in it, checked by hash.

    Returns:
        the record of the new checkpoint, as in its ``oftsurgery.json``; None where nothing is folded into it any more.

    Raises:
        DiskError: the disk is full, read-only, or another run is at work on this destination.
        StateError: the destination exists and ``force`` is not set; unfinished work is there and neither ``resume`` nor
            ``force`` is set. and those of a fold in memory.
    """
    _check_apart(plan, destination)
    if plan.undo is not None and not (resume and plan.undo.is_file()):
        check_free(plan.undo, force=force)
    key = _fingerprint(plan)
    with Staging(destination, key, needed=plan.nbytes, resume=resume, force=force) as staging:
        run = _Run(plan, torch.device(device), progress, inputs_of)
        if resume and plan.undo is not None and plan.undo.is_file():
            with contextlib.suppress(UndoError):  # one that was killed between its undo record and the last rename
                run.written = open_undo(plan.undo)
        for shard in plan.shards:
            run.shard(shard, staging)
        record = run.record()
        if not plan.unfolds and record is not None:
            engine.finish_fold(record, plan.changes, plan.store.ties)
        elif plan.changes.rotate:
            engine.finish_unfold(plan.changes, run.modules, plan.store.record)
        if plan.undo is not None and record is not None:
            run.write_undo(plan.undo, record, staging, force=force)
        record = write_rest(
            staging,
            [shard.file for shard in plan.shards],
            record,
            source=plan.source.folder,
            jsons={"config.json": plan.config},
            carried=[plan.source.folder / name for name in plan.carried],
            exact=plan.format in ("same", *QUANTISED),
            # unfolded: the earlier fold's
            before=None if plan.unfolds else sum(e.nbytes for e in plan.source.entries.values()),
        )
        staging.publish()
    return record


def _check_apart(plan: CheckpointPlan, destination: Path) -> None:
    """Refuse a destination whose making would change or remove what is read."""
    there = destination.resolve()
    stores = [plan.store, *(j.origin for j in plan.jobs)]
    sources = {s.source.folder.resolve() for s in stores if s is not None}
    adapters = [Path(a.source) for a in plan.changes.adapters if a.source is not None]
    check_apart(destination, "source", sources)
    check_apart(destination, "adapter", filter(Path.is_dir, adapters))
    if plan.undo is not None and plan.undo.resolve().is_relative_to(there):
        raise StateError(
            "the undo record would be inside the destination", path=plan.undo, remedy="write it beside the folder"
        )
    if any(there.is_relative_to(f) for f in sources):
        raise StateError("the destination is inside the source", path=destination, remedy="name one outside it")


def _fingerprint(plan: CheckpointPlan) -> str:
    """Of all that decides the output: unfinished work of another fingerprint is not resumed."""
    facts = {
        "source": plan.source.identity,
        "adapters": [a.fingerprint for a in plan.changes.adapters],
        "format": plan.format,
        "quantization": str(plan.store.quantization),
        "fold_into": plan.fold_into,
        "shards": [[s.file, [list(plan.jobs[i].outputs) for i in s.items]] for s in plan.shards],
        "config": dict(plan.config),
        "unfolds": plan.unfolds,
        "rounding": plan.rounding,
        "calibration": plan.calibration,
        "versions": versions(),
        "undo": plan.undo is not None,
        "undone": None if plan.undone is None else plan.undone.identity,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(eq=False)
class _Run:
    """One run: its progress, and the records of what was folded."""

    plan: CheckpointPlan
    device: torch.device
    progress: Progress | None
    inputs_of: InputsOf | None

    def __post_init__(self) -> None:
        self.done = 0
        self.total = sum(job.nbytes for job in self.plan.jobs)
        self.modules: dict[str, ModuleRecord] = {}
        self.saved: dict[str, str | None] = {}
        #: name of a part → names of the replaced tensors whose values it holds
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

    def shard(self, shard: Shard, staging: Staging) -> None:
        jobs = [self.plan.jobs[i] for i in shard.items]
        finished = staging.finished(shard.file)
        if self.plan.undo is not None and self.written is None and staging.finished(_part(shard)) is None:
            finished = None
        if finished is not None:
            self.modules |= {path: ModuleRecord.from_dict(m) for path, m in finished.get("modules", {}).items()}
            self.saved |= finished.get("saved", {})
            for job in jobs:
                self.step(_label(job), job.nbytes)
            return
        operation = engine.Operation(self.plan.changes, self.plan.rounding, self.inputs_of)
        if self.plan.undo is None:
            self._write(shard.file, jobs, operation, staging)
        else:
            with staging.writing(_part(shard)) as path, path.open("wb") as file:
                operation.undo = UndoParts(file)
                self._write(shard.file, jobs, operation, staging)
            staging.finish(_part(shard), {"undo": operation.undo.facts})
        modules = {path: module.to_dict() for path, module in operation.modules.items()}
        staging.finish(shard.file, {"modules": modules, "saved": operation.saved})
        self.modules |= operation.modules
        self.saved |= operation.saved

    def _write(self, file: str, jobs: Sequence[Job], operation: engine.Operation, staging: Staging) -> None:
        record = self.record()
        metadata = {"format": "pt"} | ({} if record is None else {"oftsurgery": record.header(format=self.plan.format)})
        items = [
            Item(_label(job), job.outputs, job.nbytes, partial(self._load, job), partial(self._make, operation, job))
            for job in jobs
        ]
        write_shard(staging, file, items, metadata, lambda item: self.step(item.name, item.nbytes))

    def write_undo(self, path: Path, record: FoldRecord, staging: Staging, *, force: bool) -> None:
        """Join the shards' parts to the undo record at ``path``, unless a run that was killed has done it already."""
        plan = self.plan
        if self.written is None or not self.written.is_of(record):
            with UndoWriter(path, force=force) as writer:
                for shard in plan.shards:
                    facts = staging.finished(_part(shard))
                    if facts is None:
                        raise StateError(
                            "the undo record that is there is of another fold, and this one's is gone",
                            path=path,
                            remedy="start anew with another file: force=True (--force)",
                        )
                    writer.append(facts["undo"], staging.chunks(_part(shard)))
                tied = plan.store.architecture.tied
                config = plan.source.config
                if plan.format != "same":
                    config = configs.output_config(config, plan.format, plan.store.quantization, untied=False)
                writer.finish(
                    record,
                    # others that the source held by themselves stay
                    ties=[
                        [next(n for n in group if n not in tied), *(n for n in group if n in tied)]
                        for group in plan.changes.apart
                    ],
                    tie_word_embeddings=plan.store.ties.flag,
                    config=config,
                )
        for shard in plan.shards:
            staging.drop(_part(shard))

    # --- one job ---

    def _load(self, job: Job) -> Any:
        store = job.origin or self.plan.store
        if not job.parts:
            return store.source.chunks(job.name)
        if job.unit is not None:
            made, tied = store.read_unit(job.unit), store.architecture.tied
            return [codecs.dense(made[tied.get(part.name, part.name)]) for part in job.parts]
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
        """What becomes of one of the model's tensors."""
        before = EncodedWeight(stored.format, {k: t.to(self.device) for k, t in stored.tensors.items()})
        if part.base is not None:
            before = codecs.as_loaded(before, part.base)
        if part.check is not None:
            part.check(before, stored)
        if part.restore is not None:
            return part.restore(before)
        new = before if part.values is None else self._replaced(operation, job, part, part.values, before)
        if part.rotate is not None:
            as_stored = part.base is None and job.unit is None and part.output == job.name
            beside = _beside(self.plan.source, job.name, before) if as_stored and operation.undo is not None else None
            return operation.rotate(part.rotate, new, part.into, before, beside)
        if new.format == part.into:
            return new
        if part.matrix:
            return fold_encoded(new, (), part.into, "nearest").encoded
        return codecs.encode(new.tensors["weight"], part.into)

    def _replaced(
        self, operation: engine.Operation, job: Job, part: Part, own: Tensor, before: EncodedWeight
    ) -> EncodedWeight:
        values = own.to(self.device, part.into.dtype if part.rotate is None else before.format.dtype)
        old = before.tensors["weight"]
        if job.unit is None:  # as it is stored
            old = old.t() if job.transposed else old.reshape(self.plan.source.entries[job.name].shape)
        for name in self.named.get(part.name, ()):
            operation.replaced(name, old, values)
        return canonical(values, transposed=job.transposed) if part.matrix else codecs.dense(values)

    # --- what is left of it ---

    def record(self) -> FoldRecord | None:
        plan = self.plan
        before = plan.store.record
        if plan.unfolds:
            return engine.earlier_record(before if before is not None or plan.undone is None else plan.undone.fold)
        record = engine.fold_record(plan.changes, before, self.modules, self.saved, plan.rounding)
        return replace(
            record,
            adapters=tuple(map(configs.public_info, record.adapters)),
            base={"fold_into": plan.fold_into, **_recorded(plan.store.quantization)},
        )


def _label(job: Job) -> str:
    """What messages and bars call a job: the module that is rotated, or the tensor."""
    return next((p.rotate.path for p in job.parts if p.rotate is not None), job.name)


def _part(shard: Shard) -> str:
    return f"{shard.file}.undo"


def _beside(source: Checkpoint, name: str, weight: EncodedWeight) -> dict[str, Any]:
    """What :func:`~oftsurgery.folding.undo_file.described` gives of small tensors beside a weight that are not what
    :meth:`~oftsurgery.formats.base.Format.to_checkpoint` makes of it, by the ends of their names.
    """
    usual = weight.format.kind.to_checkpoint(name, weight)
    there = checkpoint_tensors.companion_names(name, source.entries)
    found = {}
    for n in {*usual, *there} - {name}:
        stored = source.read(n) if n in there and source.entries[n].nbytes <= ShardWriter.LATE_BYTES else None
        if n not in there or (stored is not None and (n not in usual or described(stored) != described(usual[n]))):
            found[n.removeprefix(name.removesuffix("weight"))] = described(stored)
    return found
