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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from . import card, codecs, companions, configs
from .adapter import OFTAdapter, Rotation
from .calibration import InputsOf, fold_calibrated
from .codecs import EncodedWeight, WeightFormat
from .errors import FormatError, IntegrityError, MatchError, OFTSurgeryError, StateError, UndoError, printable
from .hashing import hash_tensors
from .naming import Architecture, architecture_of, locate
from .plan import LayerInfo, Target, make_plan
from .record import AdapterInfo, FoldRecord, ModuleRecord, versions
from .shards import INDEX, SINGLE, Checkpoint, ShardWriter, read_header
from .staging import Staging, check_apart
from .undo_file import UndoParts, UndoRecord, UndoWriter, check_free, described, open_undo
from .weight import FoldedWeight, begin_record, fold_encoded, unfold_encoded

__all__ = [
    "CheckpointPlan",
    "Job",
    "Quantization",
    "RunResult",
    "Shard",
    "plan_checkpoint",
    "plan_restore",
    "plan_undo",
    "plan_unfold",
    "run_plan",
]

Format = Literal["same", "fp32", "fp16", "bf16", "nf4", "fp4", "int8"]
DENSE: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)
QUANTISED = ("nf4", "fp4", "int8")

RECORD = "oftsurgery.json"

#: called with (bytes done, bytes in all, what)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Quantization:
    """How a plain source is quantised first, as the trainer's bitsandbytes loading did.

    Attributes:
        codec: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        double_quant: quantise the 4-bit statistics too.
        compute_dtype: of the live 4-bit layers, for the config alone: it changes no stored byte.
        skip: modules to leave unquantised (``llm_int8_skip_modules``, read as transformers reads them) in place of its
            own choice; None for that.
        dtype: in which the model was loaded; None for what its config names, as transformers 5 does by itself.
    """

    codec: str
    double_quant: bool = False
    compute_dtype: torch.dtype = torch.float32
    skip: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What becomes of one weight or tensor.

    Attributes:
        name: of the weight, or of a plain tensor, in the source.
        kind: ``"copy"`` (bytes as they are), ``"cast"`` (a plain tensor to another dtype), ``"weight"`` (decode,
            quantise, rotate, encode as asked), or ``"saved"`` (the adapter's own values instead).
        outputs: ``{name: (dtype, shape)}``; dtype None: as in the source.
        path: of the module, where a rotation is folded.
        chain: rotations in the live order.
        base: format to which a plain source is brought before it is rotated (its dtype that in which it is loaded), or
            None.
        into: format that is written.
        transposed: the source holds ``(in, out)``.
        transpose_out: the output does.
        values: of a saved tensor.
        inverse: rotate back.
        expected: content hash that the weight must have before it is written (a restored base), or None.
        origin: checkpoint that is read, where it is not the plan's source.
        restore: what the stored weight or tensor becomes, instead of all that (an undo record's doing).
        beside: ``{output: tensor}`` to write in place of what follows from the restored weight.
        nbytes: that are read, for progress.
    """

    name: str
    kind: Literal["copy", "cast", "weight", "saved"]
    outputs: Mapping[str, tuple[torch.dtype | str, tuple[int, ...] | None]]
    nbytes: int
    path: str = ""
    chain: tuple[Rotation, ...] = ()
    base: WeightFormat | None = None
    into: WeightFormat | None = None
    transposed: bool = False
    transpose_out: bool = False
    values: Tensor | None = None
    inverse: bool = False
    expected: str | None = None
    origin: Checkpoint | None = None
    restore: Callable[[EncodedWeight], EncodedWeight] | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of the destination and the jobs whose outputs it holds."""

    file: str
    jobs: tuple[Job, ...]


@dataclass(frozen=True, eq=False)
class CheckpointPlan:
    """All that a fold on disk does.

    Attributes:
        source: the checkpoint that is read.
        adapters: in the live order; none for a mere conversion.
        format: what is written.
        quantization: of a plain source, or None.
        fold_into: ``"quantized"`` or ``"original"`` weights of a plain source that is quantised.
        architecture: the model class's names.
        shards: what is written.
        config: the new ``config.json``.
        carried: other files that are copied.
        nbytes: that will be written.
        unfolds: the last fold is taken out instead of another one put in.
        rounding: of the quantised weights that are rotated.
        calibration: content hash of what they are calibrated on, or None.
        undo: the undo record that is written.
        undone: the one that is used.
        names: ``{name of a tensor: that which the adapter gives it}`` of the adapters' own values.
        untied: ``{output: name of the tensor with which the source ties it}``.
    """

    source: Checkpoint
    adapters: tuple[OFTAdapter, ...]
    format: str
    quantization: Quantization | None
    fold_into: str
    architecture: Architecture
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    carried: tuple[str, ...]
    nbytes: int
    unfolds: bool = False
    rounding: str = "nearest"
    calibration: str | None = None
    undo: Path | None = None
    undone: UndoRecord | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def largest(self) -> int:
        """Bytes of the largest weight in float32: what the memory that is needed grows with."""
        return max((4 * math.prod(j.into.shape) for j in self.jobs if j.into is not None), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what ``oftsurgery plan --json`` prints."""
        return {
            "source": {"files": list(self.source.files), "tensors": len(self.source.entries)},
            "adapters": [AdapterInfo.of(a).to_dict() for a in self.adapters],
            "format": self.format,
            "quantize": None
            if self.quantization is None
            else {**asdict(self.quantization), "compute_dtype": str(self.quantization.compute_dtype)},
            "fold_into": self.fold_into,
            "rounding": self.rounding,
            "class": self.architecture.name,
            "folds": [
                {
                    "module": j.path,
                    "tensor": j.name,
                    "from": (j.base or self._stored(j)).label,
                    "to": j.into.label,
                    "shape": list(j.into.shape),
                    "block_size": [r.block_size for r in j.chain],
                }
                for j in self.jobs
                if j.chain and j.into is not None
            ],
            "converts": sum(j.kind in ("weight", "cast") and not j.chain for j in self.jobs),
            "copies": sum(j.kind == "copy" for j in self.jobs),
            "replaces": [name for j in self.jobs if j.kind == "saved" for name in j.outputs],
            "shards": [{"file": s.file, "bytes": sum(map(_job_bytes, s.jobs))} for s in self.shards],
            "carried": list(self.carried),
            "bytes": self.nbytes,
            "largest_weight_bytes": self.largest,
        }

    def _stored(self, job: Job) -> WeightFormat:
        return _format_of(self.source, job.name, self.architecture)


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
    architecture = _architecture(source, quantization)
    _check_formats(source, format, quantization, fold_into, architecture)
    if undo is not None and (format in DENSE or fold_into != "quantized"):
        raise StateError(
            "an undo record gives the bytes back that a fold changes; this one changes the weights' formats too",
            format=format,
            remedy="format='same' or a quantised one, fold_into='quantized'; or keep the base, and unfold with base=…",
        )
    builder = _Builder(source, architecture, format, quantization, fold_into)
    chains, saved = builder.match(adapters)
    jobs = builder.jobs(chains, saved)
    shards = _split(jobs, max_shard_bytes)
    untied = bool(builder.untied)
    config = configs.output_config(source.config, format, quantization, untied=untied)
    carried = configs.carried_files(source.folder)
    card.own_card(source.folder)  # is refused now where it cannot be read
    return CheckpointPlan(
        source=source,
        adapters=tuple(adapters),
        format=format,
        quantization=quantization,
        fold_into=fold_into,
        architecture=architecture,
        shards=shards,
        config=config,
        carried=carried,
        nbytes=sum(map(_job_bytes, jobs))
        + sum((source.folder / name).stat().st_size for name in carried)
        + (sum(job.nbytes for job in jobs if job.chain) // 4 if undo is not None else 0),
        rounding=rounding,
        undo=undo,
        names=builder.own,
        untied=builder.untied,
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
    record = configs.record_in(folded.folder)
    if record is not None and [a.fingerprint for a in record.adapters] != [a.fingerprint for a in adapters]:
        raise StateError(
            f"the checkpoint's last fold is of {', '.join(printable(a.source) for a in record.adapters)}, "
            f"not of {', '.join(printable(a.source) for a in adapters)}",
            remedy="unfold the last fold first, with the same adapters in the same order",
        )
    architecture = _architecture(folded, None)
    builder = _Builder(folded, architecture, "same", None, "quantized")
    chains, _ = builder.match(adapters, again=True)
    jobs = [replace(job, inverse=True) if job.chain else job for job in builder.jobs(chains, {})]
    plan = _finish(folded, adapters, "same", architecture, jobs, dict(folded.config), max_shard_bytes)
    return replace(plan, rounding=rounding)


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
            f"the checkpoint has no {RECORD}",
            path=folded.folder,
            remedy="give the adapter instead: it is then rotated back",
        )
    codec = record.base.get("quantize") if record.base.get("fold_into") == "quantized" else None
    quantization = recorded_quantization(folded, codec)
    architecture = _architecture(base, quantization)
    found = locate([f"{path}.weight" for path in record.modules], architecture)
    weights: dict[str, str] = {}
    for path, module in record.modules.items():
        name = found.get(f"{path}.weight")
        if name is None:
            raise MatchError(
                "the base checkpoint lacks a folded module",
                module=path,
                path=base.folder,
                remedy="give the checkpoint that was folded",
            )
        weights[name] = module.before
    builder = _Builder(base, architecture, codec or "same", quantization, "quantized")
    jobs = []
    for job in builder.jobs({name: Target(name, _format_of(base, name, architecture), ()) for name in weights}, {}):
        if job.kind == "weight" and job.name in weights:
            _check_same_format(job, folded)
            jobs.append(replace(job, origin=base, expected=weights[job.name]))
        elif job.name in record.saved or not all(n in folded.entries for n in job.outputs):
            jobs.append(replace(job, origin=base))
        else:
            # untouched by the fold: the folded checkpoint's own bytes
            jobs += [
                Job(n, "copy", {n: (folded.entries[n].dtype, folded.entries[n].shape)}, folded.entries[n].nbytes)
                for n in job.outputs
            ]
    config = configs.restored_config(folded.config, base.config)
    return _finish(folded, (), "same", architecture, jobs, config, max_shard_bytes)


def plan_undo(folded: Checkpoint, undo: UndoRecord, *, max_shard_bytes: int = 5_000_000_000) -> CheckpointPlan:
    """Plan to take the last fold out of a checkpoint exactly, by its undo record.

    Raises:
        StateError: the record's fold is not the checkpoint's last one.
        MatchError: the checkpoint lacks what the record restores.
        UndoError: the record is damaged.
    """
    undo.check_last(configs.record_in(folded.folder))
    architecture = _architecture(folded, None)
    weights = _located([f"{path}.weight" for path in undo.weights], architecture, undo)
    saved = {name: n for n, name in _located(undo.tensors, architecture, undo).items()}
    # of tensors that were one, a checkpoint holds the first
    expected: dict[str, str] = {}
    dropped: set[str] = set()
    for group in undo.ties:
        first, *others = (_located([n], architecture, undo)[n] for n in group)
        dropped |= set(others) - {first}
        for name, path in weights.items():
            if path in dropped:
                expected[first] = undo.before(name.removesuffix(".weight"))
    paths = {name: n.removesuffix(".weight") for n, name in weights.items() if name not in dropped}
    targets = {name: Target("", _format_of(folded, name, architecture), ()) for name in {*paths, *expected}}
    jobs = []
    for job in _Builder(folded, architecture, "same", None, "quantized").jobs(targets, {}):
        if job.name in paths:
            jobs.append(_undo_weight(job, folded, undo, paths[job.name], architecture))
        elif job.name in saved:
            jobs.append(_undo_tensor(job, undo, saved[job.name]))
        elif job.name not in dropped:
            jobs.append(replace(job, expected=expected.get(job.name)))
    config = (
        dict(undo.config)
        if undo.config
        else configs.restored_config(
            folded.config,
            {} if undo.tie_word_embeddings is None else {"tie_word_embeddings": undo.tie_word_embeddings},
        )
    )
    plan = _finish(folded, (), "same", architecture, jobs, config, max_shard_bytes)
    return replace(plan, undone=undo)


def _located(names: Iterable[str], architecture: Architecture, undo: UndoRecord) -> dict[str, str]:
    wanted = list(names)
    found = locate(wanted, architecture)
    lost = next((n for n in wanted if n not in found), None)
    if lost is not None:
        raise MatchError(
            "the checkpoint lacks a tensor that the undo record restores",
            tensor=lost,
            path=undo.path,
            remedy="give the checkpoint that was folded",
        )
    return found


def _undo_weight(job: Job, folded: Checkpoint, undo: UndoRecord, path: str, architecture: Architecture) -> Job:
    """``job``, which holds a folded weight, with its original instead."""
    assert job.into is not None  # noqa: S101 - by construction
    same = undo.shared_with(path)
    if same is not None:
        other = _located([same], architecture, undo)[same]

        def restore(current: EncodedWeight) -> EncodedWeight:
            before = load_weight(folded, other, transposed=other in architecture.transposed)
            undo.check_shared(path, current, before)
            return before

        return replace(job, path=path, restore=restore)
    before = undo.format(path, job.into.shape)
    outputs = dict(job.outputs) if before.codec == "dense" else companions.spread_shapes(job.name, before)
    beside = {}
    for suffix, tensor in undo.files(path).items():
        name = job.name.removesuffix("weight") + suffix
        if tensor is None:
            outputs.pop(name, None)
        else:
            outputs[name], beside[name] = (tensor.dtype, tuple(tensor.shape)), tensor
    return replace(
        job, path=path, into=before, outputs=outputs, beside=beside, restore=lambda current: undo.weight(path, current)
    )


def _undo_tensor(job: Job, undo: UndoRecord, name: str) -> Job:
    def restore(current: EncodedWeight) -> EncodedWeight:
        return codecs.dense(undo.tensor(name, current.tensors["weight"]))

    return replace(job, kind="cast", base=None, restore=restore)


def recorded_quantization(folded: Checkpoint, codec: str | None) -> Quantization | None:
    """How a plain base was quantised to ``codec`` before it was folded: by the record, else by the config. None for no
    codec.
    """
    if codec is None:
        return None
    record = configs.record_in(folded.folder)
    if record is not None and "double_quant" in record.base:
        skip = json.loads(record.base.get("skip_modules") or "null")
        dtype = getattr(torch, record.base.get("dtype") or "", None)
        return Quantization(
            codec,
            record.base["double_quant"] == "true",
            skip=None if skip is None else tuple(map(str, skip)),
            dtype=dtype,
        )
    settings = folded.config.get("quantization_config") or {}
    skip = settings.get("llm_int8_skip_modules")
    return Quantization(
        codec, bool(settings.get("bnb_4bit_use_double_quant")), skip=None if skip is None else tuple(map(str, skip))
    )


def _recorded(q: Quantization | None) -> dict[str, str | None]:
    """Mirror of :func:`recorded_quantization`."""
    if q is None:
        return {"quantize": None}
    return {
        "quantize": q.codec,
        "double_quant": json.dumps(q.double_quant),
        "skip_modules": None if q.skip is None else json.dumps(q.skip),
        "dtype": None if q.dtype is None else str(q.dtype).removeprefix("torch."),
    }


def _architecture(source: Checkpoint, quantization: Quantization | None) -> Architecture:
    q = quantization
    dtype = q.dtype if q is not None and q.dtype is not None else _load_dtype(source)
    return architecture_of(
        source.config,
        {name: e.shape for name, e in source.entries.items()},
        dtype=dtype,
        skip=q.skip if q is not None else None,
    )


def _load_dtype(source: Checkpoint) -> torch.dtype:
    """In which transformers 5 loads the checkpoint unless told otherwise: as its config says, else as the first float
    tensor is stored.
    """
    named = source.config.get("dtype", source.config.get("torch_dtype"))
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = (_dtype(source, name) for name, entry in source.entries.items() if entry.dtype in _FLOATS)
    return next(stored, torch.float32)


def _check_same_format(job: Job, folded: Checkpoint) -> None:
    name = job.name
    there = folded.entries.get(name)
    planned = job.outputs[name]
    if there is None or there.shape != planned[1] or _dtype(folded, name) != _torch_dtype(planned[0]):
        raise StateError(
            "the folded checkpoint is in another format than its base: there is nothing to restore but the base itself",
            tensor=name,
            remedy="use the base checkpoint, or rotate back with the adapter",
        )


def _finish(
    source: Checkpoint,
    adapters: Sequence[OFTAdapter],
    format: str,
    architecture: Architecture,
    jobs: Sequence[Job],
    config: Mapping[str, Any],
    max_shard_bytes: int,
) -> CheckpointPlan:
    carried = configs.carried_files(source.folder)
    card.own_card(source.folder)  # is refused now where it cannot be read
    return CheckpointPlan(
        source=source,
        adapters=tuple(adapters),
        format=format,
        quantization=None,
        fold_into="quantized",
        architecture=architecture,
        shards=_split(jobs, max_shard_bytes),
        config=config,
        carried=carried,
        nbytes=sum(map(_job_bytes, jobs)) + sum((source.folder / name).stat().st_size for name in carried),
        unfolds=True,
    )


def _check_formats(
    source: Checkpoint, format: str, quantization: Quantization | None, fold_into: str, architecture: Architecture
) -> None:
    stored = source.config.get("quantization_config")
    if stored is not None and not isinstance(stored, Mapping):
        raise FormatError(
            "`quantization_config` is no JSON object",
            tensor="config.json",
            remedy="restore the config.json that was saved",
        )
    method = stored.get("quant_method", "bitsandbytes") if stored is not None else None
    if method not in (None, "bitsandbytes"):
        raise FormatError(
            "the checkpoint is quantised by another library",
            format=printable(method),
            remedy="dequantise it first; oftsurgery knows bitsandbytes and plain",
        )
    quantised = any(
        companions.state_name(n, source.entries) or n.removesuffix("weight") + "SCB" in source.entries
        for n in source.entries
        if n.endswith("weight")
    )
    if format not in ("same", *DENSE, *QUANTISED):
        raise StateError(
            f"unknown format {printable(format)!r}", remedy=f"one of same, {', '.join((*DENSE, *QUANTISED))}"
        )
    if fold_into not in ("quantized", "original"):
        raise StateError(f"unknown fold_into {printable(fold_into)!r}", remedy="'quantized' or 'original'")
    if quantised and (quantization is not None or format in QUANTISED):
        raise StateError(
            "the checkpoint is quantised already",
            format=format,
            remedy="leave the quantisation out: format 'same' keeps what it has, 'fp16', 'bf16' and 'fp32' dequantise",
        )
    if quantization is not None and quantization.codec not in QUANTISED:
        raise StateError(
            f"unknown quantisation {printable(quantization.codec)!r}", remedy=f"one of {', '.join(QUANTISED)}"
        )
    if quantization is not None and format == "same":
        raise StateError(
            "a plain checkpoint is to be quantised, and to stay as it is",
            remedy=f"format='{quantization.codec}' to write it so, or 'fp16', 'bf16', 'fp32'",
        )
    if quantization is not None and format in QUANTISED and format != quantization.codec:
        raise StateError(f"quantised to {quantization.codec}, but written as {format}", remedy="name one of the two")
    if (quantization is not None or format in QUANTISED) and architecture.linears is None:
        raise StateError(
            "which modules bitsandbytes loading quantises is known from the model's class alone, and transformers does not know it, or is absent",
            remedy="pip install 'oftsurgery[peft]', or quantise the model with transformers first",
        )


def _format_of(source: Checkpoint, name: str, architecture: Architecture) -> WeightFormat:
    """A stored weight's format, canonical shape; reads nothing but a 4-bit state's JSON."""
    entry = source.entries[name]
    state = companions.state_name(name, source.entries)
    if state is not None:
        encoded = companions.gather(
            name,
            source.entries,
            lambda n: source.read(n) if n == state else torch.empty(0),
            entry.shape,
            _dtype(source, name),
        )
        return encoded.format
    shape = entry.shape
    if name in architecture.transposed and _dtype(source, name) != torch.int8:
        shape = shape[::-1]
    if len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    return companions.gather(name, source.entries, lambda _: torch.empty(0), shape, _dtype(source, name)).format


def _dtype(source: Checkpoint, name: str) -> torch.dtype:
    from .shards import DTYPES

    entry = source.entries[name]
    if entry.dtype not in DTYPES:
        raise FormatError(f"torch has no dtype for safetensors' {printable(entry.dtype)}", tensor=name)
    return DTYPES[entry.dtype]


class _Builder:
    """Collects the jobs of one plan."""

    def __init__(
        self,
        source: Checkpoint,
        architecture: Architecture,
        format: str,
        quantization: Quantization | None,
        fold_into: str,
    ) -> None:
        self.source = source
        self.architecture = architecture
        self.format = format
        self.quantization = quantization
        self.fold_into = fold_into
        #: output names of weights that the source shares with another module and the destination does not
        self.untied: dict[str, str] = {}
        #: names of tensors that the adapters bring themselves → those by which they bring them
        self.own: dict[str, str] = {}

    # --- matching ---

    def match(
        self, adapters: Sequence[OFTAdapter], *, again: bool = False
    ) -> tuple[dict[str, Target], dict[str, Tensor]]:
        """({checkpoint name, or that of a tied head: Target}, {checkpoint name: the adapter's own values})."""
        if not adapters:
            return {}, {}
        if not again:
            self._check_not_folded(adapters)
        names = [f"{path}.weight" for a in adapters for path in a.modules]
        found = locate(names, self.architecture)
        self._check_not_merged(n.removesuffix(".weight") for n in names if n not in found)
        layers = {
            path: self._info(path, found[f"{path}.weight"], rotation)
            for a in adapters
            for path, rotation in a.modules.items()
            if f"{path}.weight" in found
        }
        own = locate([n for a in adapters for n in a.saved], self.architecture)
        tensors = {n: self._shape(name) for n, name in own.items()}
        known = [n.removesuffix(".weight") for n in self.architecture.renamed.values() if n.endswith(".weight")]
        plan = make_plan(adapters, layers, tensors, known)
        targets: dict[str, Target] = {}
        for target in plan.targets:
            name = found[f"{target.path}.weight"]
            if self._is_tied_head(target.path, name):
                self.untied[self._output_name(target.path)] = name
                targets[self._output_name(target.path)] = target
            else:
                targets[name] = target
                self.untied |= {f"{path}.weight": name for path, of in self.architecture.tied.items() if of == name}
        # not by the name of a head that will have a weight of its own
        self.own = {own[n]: self.architecture.renamed[own[n]] if n in self.untied else n for n in plan.saved}
        return targets, {own[n]: t for n, t in plan.saved.items()}

    def _check_not_merged(self, paths: Iterable[str]) -> None:
        """An adapter on weights that transformers builds from several of the checkpoint's (fused experts) has no single
        tensor to be folded into.
        """
        merged = {self.architecture.renamed[n] for n in self.architecture.converted}
        for path in paths:
            whole = next((m for m in sorted(merged) if path in (m, m.rpartition(".")[0])), None)
            if whole is not None:
                parts = sorted(n for n in self.architecture.converted if self.architecture.renamed[n] == whole)
                raise FormatError(
                    f"the model merges this weight from {len(parts)} tensors of the checkpoint ({printable(parts[0])} …)",
                    module=path,
                    remedy="fold an adapter on those tensors, one by one; or load the model with transformers, fold it in memory, and save it",
                )

    def _check_not_folded(self, adapters: Sequence[OFTAdapter]) -> None:
        record = configs.record_in(self.source.folder)
        again = [a for a in adapters if record is not None and a.fingerprint in record.fingerprints()]
        if again:
            raise StateError(
                "this adapter is folded into the checkpoint already",
                path=again[0].source,
                remedy="fold it into the base checkpoint",
            )

    def _is_tied_head(self, path: str, name: str) -> bool:
        return (
            f"{path}.weight" not in (name, self.architecture.renamed[name])
            and any(of == name for of in self.architecture.tied.values())
            and (path in self.architecture.tied)
        )

    def _output_name(self, path: str) -> str:
        return f"{path}.weight"

    def _info(self, path: str, name: str, rotation: Rotation) -> LayerInfo:
        if name in self.architecture.converted and len(self.source.entries[name].shape) != 2:
            raise FormatError(
                "the checkpoint holds this weight fused with others",
                module=path,
                tensor=name,
                shape=self.source.entries[name].shape,
                remedy="load the model with transformers, fold it in memory, and save it",
            )
        shape = self.source.entries[name].shape
        if len(shape) == 4 and shape[2:] != (1, 1):
            raise FormatError(
                f"a {shape[2]}×{shape[3]} convolution cannot be folded: peft 0.16 to 0.21's live layer overlaps its patches, as no weight does",
                module=path,
                remedy="train the adapter without this convolution (`exclude_modules`); 1×1 convolutions are fine",
            )
        embedding = name in self.architecture.embeddings and path not in self.architecture.tied
        if self.architecture.linears is None:
            embedding = rotation.side == "embedding"
        kind: Literal["embedding", "conv", "linear"] = (
            "embedding" if embedding else "conv" if len(shape) == 4 else "linear"
        )
        return LayerInfo(kind, _format_of(self.source, name, self.architecture), hash((name, embedding)))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.source.entries[name].shape

    # --- jobs ---

    def jobs(self, targets: Mapping[str, Target], saved: Mapping[str, Tensor]) -> list[Job]:
        made: list[Job] = []
        done: set[str] = set()
        for name in self.source.entries:
            if name in done:
                continue
            if name.endswith("weight") or name in targets:
                group = companions.companion_names(name, self.source.entries)
            elif self._is_companion(name):
                continue  # comes with its weight
            else:
                group = (name,)
            done.update(group)
            if name in saved and name not in targets:
                made.append(self._saved(name, saved[name]))
            elif name in targets or self._converts(name):
                made.append(self._weight(name, targets.get(name), saved.get(name), group))
            else:
                made += [self._plain(n) for n in group]
        for output, name in self.untied.items():
            head = targets.get(output)
            made.append(self._weight(name, head, None, (name,), output=output))
        return made

    def _is_companion(self, name: str) -> bool:
        if name.rpartition(".")[2] in ("SCB", "weight_format"):
            return name.rpartition(".")[0] + ".weight" in self.source.entries
        from .naming import split_companion

        weight, suffix = split_companion(name)
        return bool(suffix) and weight in self.source.entries

    def _quantises(self, name: str) -> bool:
        return (
            self.quantization is not None
            and self.architecture.linears is not None
            and name in self.architecture.linears
        )

    def _loaded(self, name: str) -> torch.dtype | None:
        """In which dtype the trainer's bitsandbytes loading held the plain tensor ``name``; None where there was none,
        or it holds no floats.
        """
        if self.quantization is None or self.source.entries[name].dtype not in _FLOATS:
            return None
        return self.architecture.loaded.get(name)

    def _converts(self, name: str) -> bool:
        """Whether a weight changes its codec without any rotation."""
        stored_quantised = companions.state_name(name, self.source.entries) is not None or (
            self.source.entries[name].dtype == "I8" and name.removesuffix("weight") + "SCB" in self.source.entries
        )
        return self._quantises(name) or (stored_quantised and self.format in DENSE)

    def _saved(self, name: str, values: Tensor) -> Job:
        if values.is_floating_point() and self.source.entries[name].dtype not in _FLOATS:
            raise FormatError(
                "the adapter brings its own values for a weight that is stored quantised",
                tensor=name,
                format=self.source.entries[name].dtype,
                remedy="load the model with that module unquantised (llm_int8_skip_modules), as for training",
            )
        dtype = DENSE.get(self.format, self._loaded(name) or _dtype(self.source, name))
        return Job(name, "saved", {name: (dtype, tuple(values.shape))}, values.nbytes, values=values.to(dtype))

    def _plain(self, name: str) -> Job:
        entry = self.source.entries[name]
        if entry.dtype not in _FLOATS:
            return Job(name, "copy", {name: (entry.dtype, entry.shape)}, entry.nbytes)
        stored = _dtype(self.source, name)
        loaded = self._loaded(name) or stored
        into = DENSE.get(self.format, loaded)
        if stored == loaded == into:
            return Job(name, "copy", {name: (entry.dtype, entry.shape)}, entry.nbytes)
        base = WeightFormat("dense", entry.shape, loaded) if loaded != stored else None
        return Job(name, "cast", {name: (into, entry.shape)}, entry.nbytes, base=base)

    def _weight(
        self,
        name: str,
        target: Target | None,
        values: Tensor | None,
        group: Sequence[str],
        *,
        output: str | None = None,
    ) -> Job:
        stored = _format_of(self.source, name, self.architecture)
        base = self._base_format(stored, name, tied=output is not None)
        if self.format == "same":
            into = stored
        elif self.format in DENSE:
            into = WeightFormat("dense", stored.shape, DENSE[self.format])
        else:
            into = stored if base is None else replace(base, dtype=torch.float16) if base.codec == "int8" else base
        transposed = name in self.architecture.transposed
        out = spread = companions.spread_shapes(output or name, into)
        if into.codec == "dense":
            shape = (
                self.source.entries[name].shape
                if len(self.source.entries[name].shape) == 4
                else into.shape[::-1]
                if transposed
                else into.shape
            )
            out = {output or name: (spread[output or name][0], shape)}
        if self.fold_into == "original" and target is not None:
            base = None
        return Job(
            name=name,
            kind="weight",
            outputs=dict(out),
            nbytes=sum(self.source.entries[n].nbytes for n in group),
            path=target.path if target is not None else "",
            chain=target.chain if target is not None else (),
            base=base,
            into=into,
            transposed=transposed and stored.codec == "dense",
            transpose_out=transposed and into.codec == "dense",
            values=values,
        )

    def _base_format(self, stored: WeightFormat, name: str, *, tied: bool) -> WeightFormat | None:
        """What the trainer's loading made of a plain weight, its dtype that in which it was loaded; None where that is
        the stored one.
        """
        q, loaded = self.quantization, self._loaded(name)
        if q is not None and self._quantises(name) and not tied:
            return WeightFormat(
                q.codec,
                stored.shape,
                loaded or stored.dtype,
                *((64, 256 if q.double_quant else 0) if q.codec != "int8" else ()),
            )
        return WeightFormat("dense", stored.shape, loaded) if loaded not in (None, stored.dtype) else None


_FLOATS = ("F64", "F32", "F16", "BF16")
_SIZES: Mapping[str, int] = MappingProxyType({"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2})


def _job_bytes(job: Job) -> int:
    if job.kind == "copy":
        return job.nbytes
    return sum(
        (d.itemsize if isinstance(d, torch.dtype) else _SIZES.get(d, 1)) * math.prod(s) if s is not None else 256
        for d, s in job.outputs.values()
    )


def _split(jobs: Sequence[Job], limit: int) -> tuple[Shard, ...]:
    """Shards of at most ``limit`` bytes (one weight is never split), named as the Hub's tools name them."""
    groups: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        nbytes = _job_bytes(job)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += nbytes
    if len(groups) == 1:
        return (Shard(SINGLE, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for i, g in enumerate(groups, start=1)
    )


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
) -> RunResult:
    """Do what ``plan`` says, calibrated where ``inputs_of`` gives the inputs of the layer at a path.

    Everything is written into ``.<name>.oftsurgery`` beside ``destination`` and appears by one rename. After an error
    or a kill that folder stays, and ``resume=True`` goes on from the last whole shard in it, checked by hash.

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
        if plan.undo is not None and record is not None:
            run.write_undo(plan.undo, record, staging, force=force)
        record = _write_rest(plan, record, staging)
        staging.publish()
    return RunResult(record, {path: float(m["error"]) for path, m in run.modules.items()})


def _check_apart(plan: CheckpointPlan, destination: Path) -> None:
    """Refuse a destination whose making would change or remove what is read."""
    there = destination.resolve()
    sources = {c.folder.resolve() for c in (plan.source, *(j.origin for j in plan.jobs)) if c is not None}
    adapters = {Path(a.source).resolve() for a in plan.adapters if a.source is not None and Path(a.source).is_dir()}
    for what, folders in (("source", sources), ("adapter", adapters)):
        check_apart(destination, what, folders)
    if plan.undo is not None and plan.undo.resolve().is_relative_to(there):
        raise StateError(
            "the undo record would be inside the destination", path=plan.undo, remedy="write it beside the folder"
        )
    if any(there.is_relative_to(f) for f in sources):
        raise StateError("the destination is inside the source", path=destination, remedy="name one outside it")


@dataclass(frozen=True)
class RunResult:
    """What a run gives back.

    Attributes:
        record: of the new checkpoint, as in its ``oftsurgery.json``; None where nothing is folded into it any more.
        errors: ``{module path: relative error of storing its weight}`` of what this run rotated.
    """

    record: FoldRecord | None
    errors: Mapping[str, float]


def _fingerprint(plan: CheckpointPlan) -> str:
    """Of all that decides the output: unfinished work of another fingerprint is not resumed."""
    facts = {
        "source": plan.source.identity,
        "adapters": [a.fingerprint for a in plan.adapters],
        "format": plan.format,
        "quantization": str(plan.quantization),
        "fold_into": plan.fold_into,
        "shards": [[s.file, [j.name for j in s.jobs]] for s in plan.shards],
        "config": dict(plan.config),
        "unfolds": plan.unfolds,
        "rounding": plan.rounding,
        "calibration": plan.calibration,
        "versions": versions(),
        "undo": plan.undo is not None,
        "undone": None if plan.undone is None else plan.undone.identity,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class _Run:
    """The state of one run: progress, and the records of what was folded."""

    def __init__(
        self, plan: CheckpointPlan, device: torch.device, progress: Progress | None, inputs_of: InputsOf | None
    ) -> None:
        self.plan = plan
        self.inputs_of = inputs_of
        self.device = device
        self.progress = progress
        self.done = 0
        self.total = sum(job.nbytes for job in plan.jobs)
        self.modules: dict[str, dict[str, Any]] = {}
        self.saved: dict[str, str] = {}
        self.parts: UndoParts | None = None
        self.written: UndoRecord | None = None

    def step(self, job: Job) -> None:
        self.done += job.nbytes
        if self.progress is not None:
            self.progress(self.done, self.total, job.path or job.name)

    def shard(self, shard: Shard, staging: Staging) -> None:
        finished = staging.finished(shard.file)
        if self.plan.undo is not None and self.written is None and staging.finished(_part(shard)) is None:
            finished = None
        if finished is not None:
            self.modules |= finished.get("modules", {})
            self.saved |= finished.get("saved", {})
            for job in shard.jobs:
                self.step(job)
            return
        modules, saved = self.modules, self.saved
        self.modules, self.saved = {}, {}
        if self.plan.undo is None:
            self._write(shard, staging)
        else:
            with staging.writing(_part(shard)) as path, path.open("wb") as file:
                self.parts = UndoParts(file)
                self._write(shard, staging)
            staging.finish(_part(shard), {"undo": self.parts.facts()})
        staging.finish(shard.file, {"modules": self.modules, "saved": self.saved})
        self.modules, self.saved = modules | self.modules, saved | self.saved

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
                groups: dict[str, list[str]] = {}
                for output, name in plan.untied.items():
                    groups.setdefault(plan.architecture.renamed[name], []).append(output)
                config = plan.source.config
                if plan.format != "same":
                    config = configs.output_config(config, plan.format, plan.quantization, untied=False)
                writer.finish(
                    record,
                    ties=[(name, *outputs) for name, outputs in groups.items()],
                    tie_word_embeddings=plan.source.config.get("tie_word_embeddings"),
                    config=config,
                )
        for shard in plan.shards:
            staging.drop(_part(shard))

    def _write(self, shard: Shard, staging: Staging) -> None:
        outputs = {name: (_torch_dtype(d), s) for job in shard.jobs for name, (d, s) in job.outputs.items()}
        with staging.writing(shard.file) as path:
            writer = ShardWriter(path, outputs, self._metadata())
            try:
                # reading, computing and writing overlap, with one weight in each
                with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:
                    self._pipeline(shard.jobs, writer, readers, writers)
                writer.close()
            except BaseException:
                writer.abort()
                raise

    def _pipeline(
        self, jobs: Sequence[Job], writer: ShardWriter, readers: ThreadPoolExecutor, writers: ThreadPoolExecutor
    ) -> None:
        ahead: Future[EncodedWeight | None] | None = None
        behind: Future[None] | None = None
        for i, job in enumerate(jobs):
            loaded = (ahead or readers.submit(self._load, job)).result()
            ahead = readers.submit(self._load, jobs[i + 1]) if i + 1 < len(jobs) else None
            try:
                outputs = self._compute(job, loaded)
            except OFTSurgeryError as error:
                raise error.within(job.path or job.name) from error.__cause__
            del loaded
            if behind is not None:
                behind.result()
            behind = writers.submit(self._put, writer, job, outputs)
            del outputs
        if behind is not None:
            behind.result()

    def _metadata(self) -> dict[str, str]:
        record = self.record()
        return {"format": "pt"} | ({} if record is None else {"oftsurgery": record.header(format=self.plan.format)})

    # --- one job, in three threads ---

    def _load(self, job: Job) -> EncodedWeight | None:
        source = job.origin or self.plan.source
        if job.kind == "cast":
            return codecs.dense(source.read(job.name))
        if job.kind != "weight":
            return None
        return load_weight(source, job.name, transposed=job.transposed, values=job.values)

    def _compute(self, job: Job, loaded: EncodedWeight | None) -> dict[str, Tensor]:
        if job.kind == "saved":
            return self._save(job)
        if loaded is None:
            return {}
        if job.restore is not None:
            return self._laid_out(job, job.restore(loaded))
        if job.kind == "cast":
            (name,) = job.outputs
            into = replace(loaded.format, dtype=_torch_dtype(job.outputs[name][0]))
            if job.base is not None:
                loaded = codecs.encode(loaded.tensors["weight"], job.base)
            return {name: codecs.encode(loaded.tensors["weight"], into).tensors["weight"]}
        assert job.into is not None  # noqa: S101 - by construction
        into = job.into
        encoded = EncodedWeight(loaded.format, {k: t.to(self.device) for k, t in loaded.tensors.items()})
        if job.base is not None:
            encoded = quantise(encoded, job.base)
        if job.expected is not None and encoded.fingerprint != job.expected:
            raise IntegrityError(
                "the base checkpoint's weight is not the one that was folded",
                tensor=job.name,
                remedy="give the very checkpoint that was folded",
            )
        end = begin_record(encoded, job.chain) if job.chain else None
        folded = self._recode(job, encoded, into) if job.chain or encoded.format != into else None
        new = folded.encoded if folded is not None else encoded
        if end is not None and folded is not None:
            self.modules[job.path] = end(folded).to_dict()
            if self.parts is not None:
                self._keep(self.parts, job, encoded, folded)
        return self._laid_out(job, new)

    def _save(self, job: Job) -> dict[str, Tensor]:
        assert job.values is not None  # noqa: S101 - by construction
        stored = self.plan.source.read(job.name)
        self.saved[job.name] = hash_tensors({job.name: stored})
        if self.parts is not None:
            self.parts.tensor(self.plan.names[job.name], stored.to(job.values.dtype), job.values)
        return {job.name: job.values}

    def _laid_out(self, job: Job, new: EncodedWeight) -> dict[str, Tensor]:
        """The job's outputs, in the shapes that the checkpoint holds them in."""
        if job.kind == "cast":
            return {job.name: new.tensors["weight"]}
        if job.transpose_out or len(next(iter(job.outputs.values()))[1] or ()) == 4:
            weight = new.tensors["weight"]
            return {next(iter(job.outputs)): (weight.t() if job.transpose_out else weight.reshape(*weight.shape, 1, 1))}
        found = companions.spread(next(iter(job.outputs)), new) | dict(job.beside)
        return {name: found[name] for name in job.outputs}

    def _keep(self, parts: UndoParts, job: Job, before: EncodedWeight, folded: FoldedWeight) -> None:
        """Give the undo record what becomes of one rotated weight."""
        output = next(iter(job.outputs))
        source, untied = self.plan.source, self.plan.untied
        changed = {n for j in self.plan.jobs if j.chain or j.kind == "saved" for n in j.outputs}
        ties = [o for o, name in untied.items() if name == job.name and o != output]
        ties += [job.name] if output in untied else []
        same = next((n for n in ties if n not in changed), None)
        if same is not None and job.values is None:
            parts.shared(job.path, self.plan.architecture.renamed.get(same, same), before, folded.encoded)
            return
        if job.values is not None:  # the adapter's own weight, rotated: what the source holds is what comes back
            before = load_weight(source, job.name, transposed=job.transposed)
        beside = {} if job.base is not None or output != job.name else _beside(source, job.name, before)
        parts.weight(job.path, before, folded.encoded, job.chain, folded.error, folded.kept_scales, beside)

    def _recode(self, job: Job, encoded: EncodedWeight, into: WeightFormat) -> FoldedWeight:
        if self.inputs_of is not None and job.chain:
            multiplies = into.quantised and job.chain[0].side != "embedding"
            return fold_calibrated(encoded, job.chain, into, self.inputs_of(job.path) if multiplies else None)
        # what is not rotated is stored as loading it would have stored it
        rounding = self.plan.rounding if job.chain else "nearest"
        return (unfold_encoded if job.inverse else fold_encoded)(encoded, job.chain, into, rounding)

    def _put(self, writer: ShardWriter, job: Job, outputs: Mapping[str, Tensor]) -> None:
        if job.kind == "copy":
            writer.write(job.name, (job.origin or self.plan.source).chunks(job.name))
        for name, tensor in outputs.items():
            writer.write(name, tensor)
        self.step(job)

    def record(self) -> FoldRecord | None:
        before = configs.record_in(self.plan.source.folder)
        if before is None and self.plan.undone is not None:
            before = self.plan.undone.fold
        if self.plan.unfolds:
            return replace(before.earlier[-1], earlier=before.earlier[:-1]) if before and before.earlier else None
        return FoldRecord(
            adapters=tuple(configs.public_info(AdapterInfo.of(a)) for a in self.plan.adapters),
            modules={path: ModuleRecord.from_dict(m) for path, m in self.modules.items()},
            saved=self.saved,
            rounding=self.plan.rounding,
            base={"fold_into": self.plan.fold_into, **_recorded(self.plan.quantization)},
            earlier=(*before.earlier, replace(before, earlier=())) if before else (),
        )


def _part(shard: Shard) -> str:
    return f"{shard.file}.undo"


def _beside(source: Checkpoint, name: str, weight: EncodedWeight) -> dict[str, Any]:
    """What :func:`~oftsurgery.undo_file.described` gives of small tensors beside a weight that are not what
    :func:`~oftsurgery.companions.spread` makes of it, by the ends of their names.
    """
    usual = companions.spread(name, weight)
    there = companions.companion_names(name, source.entries)
    found = {}
    for n in {*usual, *there} - {name}:
        stored = source.read(n) if n in there and source.entries[n].nbytes <= ShardWriter.LATE_BYTES else None
        if n not in there or (stored is not None and (n not in usual or described(stored) != described(usual[n]))):
            found[n.removeprefix(name.removesuffix("weight"))] = described(stored)
    return found


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    from .shards import DTYPES

    return dtype if isinstance(dtype, torch.dtype) else DTYPES[dtype]


def load_weight(source: Checkpoint, name: str, *, transposed: bool, values: Tensor | None = None) -> EncodedWeight:
    """A stored weight with its companions, in the canonical shape ``(out, in)``.

    Args:
        source: that holds it.
        name: of the weight's tensor.
        transposed: a plain weight is held ``(in, out)``.
        values: to use instead of the stored ones (an adapter's own).
    """
    entry, dtype = source.entries[name], _dtype(source, name)

    def read(wanted: str) -> Tensor:
        return values.to(dtype) if values is not None and wanted == name else source.read(wanted)

    encoded = companions.gather(name, source.entries, read, entry.shape, dtype)
    if encoded.format.codec != "dense":
        return encoded
    weight = encoded.tensors["weight"]
    return codecs.dense(
        weight.t() if transposed else weight.reshape(weight.shape[0], -1) if weight.ndim == 4 else weight
    )


def quantise(encoded: EncodedWeight, into: WeightFormat) -> EncodedWeight:
    """A plain weight as the trainer's bitsandbytes loading held it.

    From its rounding to ``into.dtype``, in which the model was loaded; int8 from the float16 rounding of that, as
    ``Int8Params`` does.
    """
    weight = codecs.encode(encoded.tensors["weight"], WeightFormat("dense", into.shape, into.dtype)).tensors["weight"]
    if into.codec == "dense":
        return EncodedWeight(into, {"weight": weight})
    if into.codec == "int8":
        return codecs.encode(weight.to(torch.float16), replace(into, dtype=torch.float16))
    return codecs.encode(weight, into)


def _write_rest(plan: CheckpointPlan, record: FoldRecord | None, staging: Staging) -> FoldRecord | None:
    """Write the files beside the weights; gives the record with all their hashes."""
    # what was written, not what was planned: the JSON of a 4-bit state is of a size known only now
    total = sum(e.nbytes for shard in plan.shards for e in read_header(staging.folder / shard.file)[0])
    if len(plan.shards) > 1:
        weight_map = {name: shard.file for shard in plan.shards for job in shard.jobs for name in job.outputs}
        staging.put_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for name in plan.carried:
        staging.copy(plan.source.folder / name, name)
    if plan.config:
        staging.put_json("config.json", plan.config)
    text = card.written_card(
        plan.source.folder,
        record,
        plan.config,
        staging.names(),
        exact=plan.format in ("same", *QUANTISED),
    )
    if text is not None:
        staging.put_text(card.CARD, text)
    if record is not None:
        before = sum(e.nbytes for e in plan.source.entries.values())
        sizes = record.sizes if plan.unfolds else {"before": before, "after": total}  # unfolded: the earlier fold's
        record = replace(record, files=staging.hashes(but=configs.NOT_HASHED), sizes=sizes)
        staging.put_json(RECORD, record.to_dict())
    return record
