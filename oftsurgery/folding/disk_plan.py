""":func:`plan_checkpoint` plans a fold on disk from headers and JSON alone; the plan holds every step of the fold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.reading import homes_of
from oftsurgery.adapters.trained_on import TrainedOn
from oftsurgery.dtypes import DENSE, name_of
from oftsurgery.errors import FormatError, StateError, printable
from oftsurgery.files.carried import Carried, carried_from
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.tokenizer_files import choose_tokenizer
from oftsurgery.formats import codecs
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.records import card
from oftsurgery.records.record import AdapterInfo, FoldRecord
from oftsurgery.stores import configs
from oftsurgery.stores.folder import FolderStore, Quantization, holds_quantised_weights
from oftsurgery.stores.new_head import new_head
from oftsurgery.stores.quantised_loading import loadable_config

from .beside import rows_of
from .disk_jobs import Job, JobBuilder, Part
from .engine import check_undo
from .folder_writer import Shard, into_shards, nbytes_of
from .plan import FoldPlan, plan_changes
from .undo_reader import UndoRecord

Format = Literal["same", "bnb", "fp32", "fp16", "bf16", "nf4", "fp4", "int8"]
QUANTISED = tuple(name for name, kind in FORMATS.items() if kind.quantised)

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
        format: the format that is written.
        fold_into: whether the ``"quantized"`` or the ``"original"`` weights of a plain source are rotated.
        unfolds: whether the plan takes the last fold out.
        rounding: the rounding of the quantised weights that are rotated.
        calibration: content hash of the calibration's batches, or None.
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
    format: str = "same"
    fold_into: str = "quantized"
    unfolds: bool = True
    rounding: str = "nearest"
    calibration: str | None = None
    trained_on: TrainedOn | None = None
    undo: Path | None = None
    undone: UndoRecord | None = None

    @property
    def source(self) -> Checkpoint:
        return self.store.source

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
        rotated = sum(math.prod(p.into.shape) for p in self.parts if p.rotate is not None)
        return {
            "base": str(self.source.folder),
            "source": {"files": list(self.source.files), "tensors": len(self.source.entries)},
            "adapters": [AdapterInfo.of(a).to_dict() for a in self.changes.adapters],
            "format": self.format,
            "quantize": None if q is None else {**asdict(q), "compute_dtype": str(q.compute_dtype)},
            "trained_on": None
            if self.trained_on is None
            else {"name": self.trained_on.name, "source": self.trained_on.source},
            "fold_into": self.rotates,
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
            "memory_bytes": 3 * largest + _LIBRARIES,
            "seconds": rotated / _WEIGHTS_PER_SECOND + self.nbytes / _BYTES_PER_SECOND,
        }


def plan_checkpoint(
    source: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    format: Format = "same",
    quantization: Quantization | None = None,
    fold_into: Literal["quantized", "original"] = "quantized",
    rounding: str = "nearest",
    undo: Path | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    partial: bool = False,
) -> CheckpointPlan:
    """Plan a fold on disk from headers and JSON alone (and the few bytes of JSON inside 4-bit weights' states).

    Raises:
        AdapterError: an adapter lacks modules which its own config targets, and ``partial`` is not set.
        MatchError: an adapter's module or tensor matches nothing in the checkpoint.
        ShapeError, FormatError: a rotation or tensor does not fit, or a weight's format is not known.
        StateError: the formats contradict each other, or the adapter is folded in already.
        CheckpointError: the checkpoint cannot be used.
    """
    codecs.check_rounding(rounding)
    if quantization is None and format in QUANTISED:
        quantization = Quantization(format)
    store = FolderStore(source, quantization)
    _check_formats(store, format, fold_into)
    written: str = format
    if format == "bnb":
        written = "same" if quantization is None else quantization.codec
    if undo is not None and (format in DENSE or fold_into != "quantized"):
        raise StateError(
            "an undo record restores the bytes that a fold changes, and this fold also changes the weights' formats",
            format=format,
            remedy="choose format='same' or a quantised format and fold_into='quantized' (--format, --fold-into), or leave out the undo "
            "record (--undo), keep the base, and unfold with base=… (--base)",
        )
    head = new_head(store, adapters)
    if head is not None:
        store = FolderStore(source, quantization, head)
    changes = plan_changes(store, adapters, partial=partial) if adapters else FoldPlan()
    if undo is not None:
        check_undo(changes, store.added)
    jobs = JobBuilder(store, changes, written, fold_into).jobs()
    vocabulary = changes.vocabulary
    config = store.config if vocabulary is None else vocabulary.in_config(store.config)
    config = configs.output_config(config, written, store.quantization, untied=changes.clears_flag)
    carried = carried_from(source.folder, source.shards)
    before = None if vocabulary is None else vocabulary.before
    carried = choose_tokenizer(carried, homes_of(adapters), tokenizer, rows_of(config), before)
    plan = make_plan(store, jobs, config, max_shard_bytes, carried)
    return replace(
        plan, changes=changes, format=written, fold_into=fold_into, rounding=rounding, undo=undo, unfolds=False
    )


def make_plan(
    store: FolderStore, jobs: Sequence[Job], config: Mapping[str, Any], max_shard_bytes: int, carried: Carried
) -> CheckpointPlan:
    """A plan of ``jobs`` with the fields that all plans share."""
    outputs = {name: output for job in jobs for name, output in job.outputs.items()}
    config = loadable_config(config, outputs)
    card.own_card(store.source.folder)  # a card that cannot be read is refused now
    return CheckpointPlan(
        store, tuple(jobs), into_shards([job.outputs for job in jobs], max_shard_bytes), config, carried
    )


def _check_formats(store: FolderStore, format: str, fold_into: str) -> None:
    """Refuse a source that another library quantised, and an unknown ``format`` or ``fold_into``."""
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
    if format == "bnb" and method is None and store.quantization is None:
        raise StateError(
            "the format bnb keeps bitsandbytes' formats, but the base is plain, and its quantisation in training was not given",
            path=store.source.folder,
            remedy="say what the adapter was trained on: trained_on='nf4-double' (--trained-on nf4-double); or choose format='bf16' (--format bf16)",
        )
    if format not in ("same", "bnb", *DENSE, *QUANTISED):
        raise StateError(
            f"the format {printable(format)!r} is not known",
            remedy=f"choose one of same, bnb, {', '.join((*DENSE, *QUANTISED))} (--format)",
        )
    if fold_into not in ("quantized", "original"):
        message = f"the value {printable(fold_into)!r} of fold_into is not known"
        raise StateError(message, remedy="choose 'quantized' or 'original' (--fold-into)")
    if store.quantization is not None:
        _check_quantised_first(store, store.quantization.codec, format)


def _check_quantised_first(store: FolderStore, codec: str, format: str) -> None:
    """Refuse a quantisation of the source that the source or the output format excludes."""
    if any(map(store.holds_quantised, store.source.entries)):
        raise StateError(
            "the checkpoint is quantised already, and cannot be quantised once more",
            format=format,
            path=store.source.folder,
            remedy="leave out the quantisation (--quantize): format 'same' keeps the formats, 'fp16', 'bf16' and 'fp32' dequantise (--format)",
        )
    if codec not in QUANTISED:
        message = f"the quantisation {printable(codec)!r} is not known"
        raise StateError(message, remedy=f"choose one of {', '.join(QUANTISED)} (--quantize)")
    if format == "same":
        message = f"format 'same' keeps plain weights plain, but the quantisation {codec} was asked for too"
        raise StateError(message, remedy=f"choose --format {codec} (format='{codec}') or one of fp16, bf16, fp32")
    if format in QUANTISED and format != codec:
        message = f"the weights are to be quantised to {codec}, but the format to write is {format}"
        raise StateError(message, remedy="give --quantize and --format the same value, or leave out one of the two")
    if store.architecture.linears is None:
        raise StateError(
            "the model's class decides which modules bitsandbytes loading quantises, and transformers does not know the class or is not installed",
            path=store.source.folder,
            remedy="pip install 'oftsurgery[peft]', or quantise the model with transformers first",
        )


def recorded_quantization(record: FoldRecord, config: Mapping[str, Any]) -> Quantization | None:
    """The quantisation of a plain base before its fold, from the record or else the config; None where there was none."""
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


def facts_of_quantization(q: Quantization | None) -> dict[str, str | None]:
    """The mirror of :func:`recorded_quantization`."""
    if q is None:
        return {"quantize": None}
    return {
        "quantize": q.codec,
        "double_quant": json.dumps(q.double_quant),
        "skip_modules": None if q.skip is None else json.dumps(q.skip),
        "dtype": None if q.dtype is None else name_of(q.dtype),
    }
