""":func:`plan_checkpoint` plans a fold on disk from headers and JSON alone; the plan holds every step of the fold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.reading import homes_of
from oftsurgery.adapters.trained_on import TrainedOn
from oftsurgery.dtypes import DENSE, NAMED
from oftsurgery.errors import FormatError, StateError, printable
from oftsurgery.files.carried import Carried, carried_from
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.tokenizer_files import choose_tokenizer
from oftsurgery.formats import codecs
from oftsurgery.formats.packages.package_format import PackageFormat
from oftsurgery.records import card
from oftsurgery.records.record import AdapterInfo
from oftsurgery.stores import configs
from oftsurgery.stores.dequantised import DequantisedCheckpoint, config_as_stored
from oftsurgery.stores.folder import (
    FolderStore,
    Quantization,
    has_quantised_weights,
    holds_quantised_weights,
    load_dtype,
)
from oftsurgery.stores.new_head import new_head
from oftsurgery.stores.quantised_loading import loadable_config

from . import engine
from .beside import rows_of
from .disk_jobs import Job, JobBuilder, Part, not_written
from .folder_writer import Shard, into_shards, nbytes_of
from .plan import FoldPlan, plan_changes
from .target import QUANTISED, Format, Target, check_format
from .undo_reader import UndoRecord

# what docs/speed.md measured on two CPU cores: rotating in memory, then reading and writing; and the memory of the libraries
_WEIGHTS_PER_SECOND, _BYTES_PER_SECOND, _LIBRARIES = 0.7e9, 0.34e9, 100_000_000


@dataclass(frozen=True, eq=False)
class CheckpointPlan:
    """Everything that a fold or an unfold on disk does.

    Attributes:
        store: the checkpoint that is read.
        jobs: the jobs in the destination's order.
        shards: the destination's files.
        config: the new ``config.json``.
        carried: the files that are copied beside the weights.
        changes: the changes of the model.
        target: the formats that are written.
        fold_into: whether the ``"quantized"`` or the ``"original"`` weights of a plain source are rotated.
        unfolds: whether the plan takes the last fold out.
        rounding: the rounding of the quantised weights that are rotated.
        calibration: what decides a calibration, as the record has it; empty without one.
        trained_on: what the adapter was trained on, where somebody says it.
        undo: the undo record that is written.
        undone: the undo record that is used.
    """

    store: FolderStore
    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    carried: Carried
    changes: FoldPlan = field(default_factory=FoldPlan)
    target: Target = field(default_factory=Target)
    fold_into: str = "quantized"
    unfolds: bool = True
    rounding: str = "nearest"
    calibration: Mapping[str, Any] = field(default_factory=dict)
    trained_on: TrainedOn | None = None
    undo: Path | None = None
    undone: UndoRecord | None = None

    @property
    def source(self) -> Checkpoint:
        return self.store.source

    @property
    def format(self) -> str:
        """The name of the format that is written."""
        return self.target.format

    @property
    def converts(self) -> bool:
        """Whether a tensor is written in another format than the base has after loading."""
        dequantised = self.source.stored_as is not None and self.format != "same"
        return dequantised or any(part.converts for part in self.parts)

    @property
    def rotates(self) -> str:
        """Which weights are rotated: ``"quantized"`` or ``"original"``."""
        quantised = self.store.quantization is not None or holds_quantised_weights(self.source)
        return self.fold_into if quantised else "original"

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for job in self.jobs for part in job.parts)

    @property
    def nbytes(self) -> int:
        """The bytes to write, with an estimate of the undo record's bytes."""
        rotated = sum(job.nbytes for job in self.jobs if any(p.rotate for p in job.parts))
        undo = rotated // 4 if self.undo is not None else 0
        return sum(nbytes_of(job.outputs) for job in self.jobs) + self.carried.nbytes + undo

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, which ``oftsurgery plan --json`` prints."""
        q = self.store.quantization
        # in float32, since the memory that a fold needs grows with the largest weight
        largest = max((4 * math.prod(p.into.shape) for p in self.parts if p.matrix), default=0)
        # a package's quantiser works with whole tensors: 12 to 15 of them were measured at 3072 × 3072
        copies = max(
            (15 if isinstance(p.into, PackageFormat) else 3 for p in self.parts if p.rotate is not None), default=3
        )
        rotated = sum(math.prod(p.into.shape) for p in self.parts if p.rotate is not None)
        labels = self.source.labels
        return {
            "base": str(self.source.folder),
            "source": {"files": list(self.source.files), "tensors": len(self.source.entries)},
            "adapters": [AdapterInfo.of(a).to_dict() for a in self.changes.adapters],
            "format": self.format,
            "quantize": None if q is None else {**asdict(q), "compute_dtype": str(q.compute_dtype)},
            "trained_on": None
            if self.trained_on is None
            else {"name": self.trained_on.name, "source": self.trained_on.source},
            "stored_as": self.source.stored_as,
            "fold_into": self.rotates,
            "rounding": self.rounding,
            "class": self.store.architecture.name,
            "folds": [
                {
                    "module": part.rotate.path,
                    "tensor": part.name,
                    "from": labels.get(self.store.holder(part.name))
                    or (part.base or self.store.stored(part.name)).label,
                    "to": part.into.label,
                    "shape": list(part.into.shape),
                    "block_size": [r.block_size for r in part.rotate.chain],
                }
                for part in self.parts
                if part.rotate is not None
            ],
            "converts": sum(bool(j.parts) and not any(p.changes for p in j.parts) for j in self.jobs),
            "copies": sum(not j.parts for j in self.jobs),
            "adds": list(self.store.added),
            "replaces": [p.output for p in self.parts if p.values is not None and p.rotate is None],
            "idle": list(self.changes.idle),
            "missing": list(self.changes.missing),
            "vocabulary": self.changes.recorded_vocabulary,
            "revision": self.source.revision,
            "shards": [
                {"file": s.file, "bytes": sum(nbytes_of(self.jobs[i].outputs) for i in s.items)} for s in self.shards
            ],
            "carried": list(self.carried.files),
            "code": list(self.carried.code),
            "left_out": list(self.carried.left_out),
            "lost": dict(self.carried.lost),
            "tokenizer": self.carried.tokenizer,
            "chat_template": self.carried.chat_template,
            "bytes": self.nbytes,
            "largest_weight_bytes": largest,
            "memory_bytes": copies * largest + _LIBRARIES,
            "seconds": rotated / _WEIGHTS_PER_SECOND + self.nbytes / _BYTES_PER_SECOND,
        }


def plan_checkpoint(
    source: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    format: Format = "same",
    double_quant: bool = False,
    quantization: Quantization | None = None,
    compute_dtype: torch.dtype | None = None,
    fold_into: Literal["quantized", "original"] = "quantized",
    rounding: str = "nearest",
    undo: Path | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    partial: bool = False,
) -> CheckpointPlan:
    """Plan a fold on disk from headers and JSON alone (and the few bytes of JSON inside 4-bit weights' states).

    Args:
        double_quant: whether the 4-bit ``format`` has double quantisation; where ``quantization`` names the same format, its
            own ``double_quant`` decides.
        quantization: how a plain source is quantised before the fold; None for the quantisation that ``format`` names.
        compute_dtype: compute dtype in the config of a quantised source that takes another format.

    Raises:
        AdapterError: an adapter lacks modules which its own config targets, and ``partial`` is not set.
        MatchError: an adapter's module or tensor matches nothing in the checkpoint.
        ShapeError, FormatError: a rotation or tensor does not fit, or a weight's format is not known.
        StateError: the formats contradict each other, or the adapter is folded in already.
        CheckpointError: the checkpoint cannot be used.
    """
    codecs.check_rounding(rounding)
    if quantization is None and format in QUANTISED and not has_quantised_weights(source):
        quantization = Quantization(format, double_quant)
    store = FolderStore(source, quantization)
    _check_formats(store, format, fold_into)
    target = _target(store, format, double_quant)
    if undo is not None and (target.dense is not None or (fold_into != "quantized" and source.stored_as is None)):
        raise engine.no_undo(format)
    head = new_head(store, adapters)
    if head is not None:
        store = FolderStore(source, quantization, head)
    changes = plan_changes(store, adapters, partial=partial) if adapters else FoldPlan()
    if undo is not None:
        engine.check_undo(changes, store.added)
    jobs = JobBuilder(store, changes, target, fold_into).jobs()
    kept = store.quantization is None and not any(part.converts for job in jobs for part in job.parts)
    written = None if kept else _written_quantization(store, target, compute_dtype)
    vocabulary = changes.vocabulary
    config = store.config if vocabulary is None else vocabulary.in_config(store.config)
    if target.format == "same":
        config = config_as_stored(source, config)
    config = configs.output_config(config, target.format, written, untied=changes.clears_flag)
    carried = carried_of(source)
    if not source.single:
        before = None if vocabulary is None else vocabulary.before
        carried = choose_tokenizer(carried, homes_of(adapters), tokenizer, rows_of(config), before)
    plan = make_plan(store, jobs, config, max_shard_bytes, carried)
    if undo is not None and plan.converts:
        raise engine.no_undo(format)
    return replace(
        plan, changes=changes, target=target, fold_into=fold_into, rounding=rounding, undo=undo, unfolds=False
    )


def _target(store: FolderStore, format: str, double_quant: bool) -> Target:
    q, dtype = store.quantization, load_dtype(store.source)
    kept = "same" if q is None else q.codec
    written = kept if format == "bnb" else format
    if q is not None and q.codec == written:
        double_quant = q.double_quant
    return Target(written, double_quant, q.dtype if q is not None and q.dtype is not None else dtype)


def _written_quantization(store: FolderStore, target: Target, compute_dtype: torch.dtype | None) -> Quantization | None:
    """The quantisation that the output's config names; None for the source's own."""
    q = store.quantization
    if target.codec is None:
        return q
    if q is not None:
        return replace(q, codec=target.codec, double_quant=target.double_quant)
    old = store.source.config.get("quantization_config") or {}
    if compute_dtype is None and old.get("load_in_4bit"):
        compute_dtype = NAMED.get(str(old.get("bnb_4bit_compute_dtype")))
    if compute_dtype is None and target.dtype in DENSE.values():
        compute_dtype = target.dtype
    return Quantization(target.codec, target.double_quant, compute_dtype)


def carried_of(source: Checkpoint) -> Carried:
    """The files beside a checkpoint that belong to it; a single file has none."""
    return Carried() if source.single else carried_from(source.folder, source.shards)


def make_plan(
    store: FolderStore, jobs: Sequence[Job], config: Mapping[str, Any], max_shard_bytes: int, carried: Carried
) -> CheckpointPlan:
    """A plan of ``jobs`` with the fields that all plans share."""
    outputs = {name: output for job in jobs for name, output in job.outputs.items()}
    config = loadable_config(config, outputs)
    if not store.source.single:
        card.own_card(store.source.folder)  # a card that cannot be read is refused now
    else:
        max_shard_bytes = sum(map(nbytes_of, (job.outputs for job in jobs))) + 1
    return CheckpointPlan(
        store,
        tuple(jobs),
        into_shards([job.outputs for job in jobs], max_shard_bytes, store.source.layout.output),
        config,
        carried,
    )


def _check_formats(store: FolderStore, format: str, fold_into: str) -> None:
    """Refuse a source that another library quantised, and an unknown ``format`` or ``fold_into``."""
    _check_not_fp8(store.source)
    settings = store.source.config.get("quantization_config")
    if settings is not None and not isinstance(settings, Mapping):
        message = f"`quantization_config` in config.json must be a JSON object, but is a {type(settings).__name__}"
        raise FormatError(message, path=store.source.folder, remedy="restore the config.json of these weights")
    method = (settings or {}).get("quant_method")
    if method not in (None, "bitsandbytes"):
        raise FormatError(
            "another library quantised the checkpoint; oftsurgery reads bitsandbytes' formats and plain weights",
            format=printable(method),
            path=store.source.folder,
            remedy="dequantise the checkpoint with that library first",
        )
    if isinstance(store.source, DequantisedCheckpoint) and format == "bnb":
        if all(held.quantiser is None for held in store.source.held.values()):
            raise not_written(format, None, store.source)
        message = f"the format bnb writes bitsandbytes' formats, but the base is stored as {store.source.stored_as}"
        remedy = "choose format='same' (--format same) to keep the base's own format, or format='nf4' or 'int8' (--format nf4)"
        raise StateError(message, format=format, path=store.source.folder, remedy=remedy)
    if format == "bnb" and method is None and store.quantization is None:
        raise StateError(
            "the format bnb writes the format that the adapter was trained on, but the base is plain, and nothing says that the adapter was "
            "trained on a quantised base",
            path=store.source.folder,
            remedy="where a BitsAndBytesConfig quantised the base in training, name it, as in trained_on='nf4-double' (--trained-on nf4-double); "
            "else choose format='bf16' (--format bf16) or format='nf4' (--format nf4)",
        )
    check_format(format, others=("same", "bnb"))
    if fold_into not in ("quantized", "original"):
        message = f"the value {printable(fold_into)!r} of fold_into is not known"
        raise StateError(message, remedy="choose 'quantized' or 'original' (--fold-into)")
    if fold_into == "original" and has_quantised_weights(store.source):
        raise StateError(
            "the source is stored quantised, and does not hold the original weights that fold_into='original' rotates",
            path=store.source.folder,
            remedy="leave out fold_into='original' (--fold-into original), or give the plain base",
        )
    if store.quantization is not None:
        _check_quantised_first(store, store.quantization.codec, format, fold_into)


def _check_not_fp8(source: Checkpoint) -> None:
    """Refuse weights in 8-bit floats, whose scales the tools name and apply in different ways."""
    marks = (".scale_weight", ".weight_scale", "scaled_fp8")
    fp8 = next((n for n, e in source.entries.items() if e.dtype.startswith("F8_") and len(e.shape) > 1), None)
    if fp8 is not None:
        scaled = any(name.endswith(marks) for name in source.entries)
        raise FormatError(
            f"the checkpoint is stored in fp8{', with scales beside the weights' if scaled else ''}, which oftsurgery does not fold",
            tensor=fp8,
            format=source.entries[fp8].dtype,
            path=source.path,
            remedy="give the same model in bf16, fp16 or fp32, and convert the folded model to fp8 again with the tool that you use",
        )


def _check_quantised_first(store: FolderStore, codec: str, format: str, fold_into: str) -> None:
    """Refuse a quantisation of the source that the source or the output format excludes."""
    if has_quantised_weights(store.source):
        raise StateError(
            "the checkpoint is quantised already, and cannot be quantised once more before the fold",
            format=format,
            path=store.source.folder,
            remedy="leave out quantize=… (--quantize): format 'same' keeps the formats, and the other formats replace them (--format)",
        )
    if codec not in QUANTISED:
        message = f"the quantisation {printable(codec)!r} is not known"
        raise StateError(message, remedy=f"choose one of {', '.join(QUANTISED)} (--quantize)")
    if format == "same":
        message = f"format 'same' keeps plain weights plain, but the quantisation {codec} was asked for too"
        raise StateError(message, remedy=f"choose format='{codec}' (--format {codec}), or one of fp16, bf16, fp32")
    if format in QUANTISED and format != codec and fold_into == "original":
        message = f"the base is to be quantised to {codec} first, but fold_into='original' rotates the original weights and writes {format}"
        raise StateError(
            message,
            remedy="leave out quantize=… (--quantize), or leave out fold_into='original' (--fold-into original)",
        )
    if store.source.single:
        raise StateError(
            "a single file has no class that says which of its modules bitsandbytes quantises",
            path=store.source.path,
            remedy="fold the same model as a folder of diffusers (from_single_file(…).save_pretrained(…)); or choose format='bf16' "
            "(--format bf16) and trained_on='plain' (--trained-on plain)",
        )
    if store.architecture.linears is None:
        raise StateError(
            "the model's class decides which modules bitsandbytes loading quantises, and its library (transformers or diffusers) does not "
            "know the class or is not installed",
            path=store.source.folder,
            remedy="pip install 'oftsurgery[peft]', or 'oftsurgery[diffusers]' for a model of diffusers; or quantise the model with its library first",
        )
