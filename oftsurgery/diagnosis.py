"""Find and explain what is wrong with a checkpoint, an adapter or a live model: :func:`doctor`.

Everything is read tensor by tensor, and nothing is changed. What other functions refuse one by one is collected here,
together with damage that is valid data and therefore loads without a word: weights that peft merged wrongly, adapters
that newer peft loads as the identity, settings that readers ignore.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import codecs, configs, errors, files, measures, peft_live, rotations
from .adapter import OFTAdapter, Rotation, parse_adapter
from .checkpoint import plan_checkpoint
from .codecs import EncodedWeight, WeightFormat
from .dtypes import DTYPES
from .errors import CheckpointError, MatchError, OFTSurgeryError, printable
from .folder_store import FolderStore, load_weight
from .formats import FORMATS, companion_names, of_names, owner_of
from .formats.four_bit import unpack_cpu_layout, unpack_state
from .layers import Layer
from .live_store import LiveStore
from .model import modules_of
from .plan import Store, plan_changes
from .record import ENOUGH, FoldRecord, plain, versions
from .shards import CONFIG, INDEX, SINGLE, Checkpoint, TensorEntry, inside, open_checkpoint, read_header, read_json
from .ties import tensors_in
from .weight import relative_error, rotate_chain

__all__ = ["Finding", "doctor"]

Severity = Literal["error", "warning", "note"]  # the worst first

FOLD, UNFOLD = "oftsurgery fold BASE ADAPTER OUTPUT", "oftsurgery unfold FOLDED OUTPUT --adapter ADAPTER"

Numbers = dict[str, float | int | str | None]
Model = str | PathLike[str] | nn.Module


@dataclass(frozen=True)
class Finding:
    """One trouble, told once however many tensors have it.

    Attributes:
        severity: ``"error"``: it computes something wrong, or does not load; ``"warning"``: it does so for some
            readers; ``"note"``: worth knowing.
        code: short and stable, for programs: ``"cpu-packed"``, ``"unrotated"`` …
        message: what it is and what it does.
        subject: module, tensor or file; the worst where several have it.
        evidence: numbers that were measured, of the subject.
        remedy: what to do, with a command where there is one.
        others: further modules, tensors or files with the same trouble.
    """

    severity: Severity
    code: str
    message: str
    subject: str
    evidence: Mapping[str, float | int | str | None] = field(default_factory=dict)
    remedy: str = ""
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # names from files never reach the terminal raw
        evidence = {k: printable(v) if isinstance(v, str) else v for k, v in self.evidence.items()}
        object.__setattr__(self, "evidence", MappingProxyType(evidence))
        object.__setattr__(self, "subject", printable(self.subject))
        object.__setattr__(self, "others", tuple(map(printable, self.others)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(plain(self))

    def __str__(self) -> str:
        more = f" and {len(self.others)} more" if self.others else ""
        lines = [f"{self.severity}: {self.code}: {self.subject}{more}", f"  {self.message}"]
        shown = {k.replace("_", " "): f"{v:.3g}" if isinstance(v, float) else v for k, v in self.evidence.items()}
        lines += ["  " + ", ".join(f"{k} {v}" for k, v in shown.items())] * bool(shown)
        return "\n".join(lines + [f"  remedy: {self.remedy}"] * bool(self.remedy))


def doctor(
    path_or_model: str | PathLike[str] | nn.Module,
    *,
    base: str | PathLike[str] | nn.Module | None = None,
    adapter: OFTAdapter | str | PathLike[str] | None = None,
) -> list[Finding]:
    """Examine a checkpoint's folder, an adapter's folder (or a Hub id of either), or a live model.

    Args:
        path_or_model: what to examine.
        base: what it was folded from, or what an adapter is for. With ``adapter`` each folded weight is held against
            the base's, rotated anew.
        adapter: that is folded in (with ``base``), or that is to be.

    Returns:
        what was found, worst first; an empty list where nothing is wrong. With ``base`` and ``adapter`` also, as a note or
        a warning, how much of what the adapter changes is in the weights.

    Raises:
        CheckpointError: ``path_or_model`` or ``base`` does not exist.
        AdapterError: ``adapter`` is given and cannot be used (give it alone to have it examined).
    """
    if adapter is not None and not isinstance(adapter, OFTAdapter):
        config, tensors, sha256 = files.read_adapter(files.find_adapter(adapter))
        adapter = parse_adapter(config, tensors, source=str(adapter), sha256=sha256)
    if isinstance(path_or_model, nn.Module):
        found = _live(path_or_model, base, adapter)
    else:
        folder = files.find_checkpoint(path_or_model)
        is_adapter = (folder / files.CONFIG).exists() or (folder / files.TENSORS).exists()
        if is_adapter and not (folder / SINGLE).exists() and not (folder / INDEX).exists():
            found = _adapter_folder(folder, base)
        else:
            found = _checkpoint_folder(folder, base, adapter)
    return sorted(_grouped(found), key=lambda f: get_args(Severity).index(f.severity))


def _grouped(findings: Iterable[Finding]) -> list[Finding]:
    """One finding a trouble: the first (the callers put the worst first) with the names of the others."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding.message), []).append(finding)
    return [replace(g[0], others=(*g[0].others, *dict.fromkeys(f.subject for f in g[1:]))) for g in groups.values()]


# --- errors as findings -----------------------------------------------------------------------------------------------

# a class of errors without a code of its own has its base's
_CODES: Mapping[type, str] = {
    errors.NonFiniteError: "non-finite",
    errors.DialectError: "dialect",
    errors.AdapterError: "adapter-files",
    errors.MatchError: "no-match",
    errors.ShapeError: "shape",
    errors.FormatError: "format",
    errors.StateError: "state",
    errors.IntegrityError: "hash",
    errors.CheckpointError: "checkpoint-files",
    errors.MissingDependencyError: "dependency",
    errors.OFTSurgeryError: "refused",
}


def _of_error(error: OFTSurgeryError, subject: str = "") -> Finding:
    code = next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)
    shapes = {"shape": error.shape, "expected_shape": error.expected}
    evidence = {name: _times(shape) for name, shape in shapes.items() if shape is not None}
    where = subject or error.module or error.tensor or (Path(error.path).name if error.path else "")
    return Finding("error", code, printable(error.message, 1000), where, evidence, error.remedy or "")


def _times(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


@contextmanager
def _noting(found: list[Finding], subject: str = "") -> Iterator[None]:
    """An error of the body becomes a finding."""
    try:
        yield
    except OFTSurgeryError as error:
        found.append(_of_error(error, subject))


# --- a checkpoint's folder --------------------------------------------------------------------------------------------


def _checkpoint_folder(folder: Path, base: Model | None, adapter: OFTAdapter | None) -> list[Finding]:
    found: list[Finding] = []
    checkpoint = _open(folder, found)
    if checkpoint is None:
        return found
    if not any(f.code == "index" for f in found):  # one that a wrong index leaves out is no stray
        found += _stray_shards(checkpoint)
    with _noting(found):
        configs.carried_files(folder)  # refuses links that leave the folder
    found += _rope(checkpoint.config)
    found += _stale_config(checkpoint)
    found += _weights(checkpoint)
    store = record = None
    with _noting(found):
        store = FolderStore(checkpoint)
    with _noting(found, configs.RECORD):
        record = configs.record_in(folder)
    return found if store is None else found + _folds(store, record, base, adapter)


def _open(folder: Path, found: list[Finding]) -> Checkpoint | None:
    """The checkpoint, or what can be read of one whose index and shards disagree."""
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        readable = _by_its_shards(folder, found)
        if readable is None:
            found.append(_of_error(error))
        return readable
    if len(checkpoint.files) > 1:
        metadata = read_json(folder / INDEX).get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        held = sum(e.nbytes for e in checkpoint.entries.values())
        if isinstance(stated, (int, float)) and stated != held:
            message = "the index states another total size than its shards hold"
            remedy = f'set "total_size" to {held} in {INDEX}'
            sizes: Numbers = {"stated_bytes": stated, "held_bytes": held}
            found.append(Finding("note", "index-size", message, INDEX, sizes, remedy))
    return checkpoint


def _by_its_shards(folder: Path, found: list[Finding]) -> Checkpoint | None:
    """A checkpoint of what its shards hold, and how the index disagrees; None where the trouble is another."""
    try:
        weight_map = read_json(inside(folder, INDEX)).get("weight_map")
        config = read_json(inside(folder, CONFIG)) if (folder / CONFIG).exists() else {}
    except CheckpointError:
        return None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        return None
    entries: dict[str, TensorEntry] = {}
    lost: list[str] = []
    twice: list[str] = []
    shards = sorted(set(weight_map.values()))
    for file in shards:
        try:
            header, _ = read_header(inside(folder, file))
        except CheckpointError:
            lost.append(file)
            continue
        twice += [e.name for e in header if e.name in entries]
        entries |= {e.name: e for e in header}
    troubles = {
        "shards_missing_or_damaged": lost,
        "absent_from_their_shard": [n for n, file in weight_map.items() if n not in entries and file not in lost],
        "in_another_shard": [n for n, file in weight_map.items() if n in entries and entries[n].file != file],
        "not_listed": [n for n in entries if n not in weight_map],
        "in_two_shards": twice,
    }
    wrong = [name for names in troubles.values() for name in names]
    if not wrong:
        return None
    message = "the index and its shards disagree: transformers fills what it does not find with random numbers, or does not load at all"
    remedy = "download the checkpoint again, or restore the index that belongs to these shards"
    counts = {"shards": len(shards), "tensors_listed": len(weight_map)} | {k: len(v) for k, v in troubles.items()}
    found.append(Finding("error", "index", message, wrong[0], counts, remedy, tuple(wrong[1:])))
    return Checkpoint(folder, entries, tuple(sorted({e.file for e in entries.values()})), config, {})


def _stray_shards(checkpoint: Checkpoint) -> Iterator[Finding]:
    message = "a file of weights that is no part of the checkpoint: nothing reads it"
    remedy = "remove it, unless the index is the wrong one"
    for path in sorted(checkpoint.folder.glob("model*.safetensors")):
        if path.name not in checkpoint.files and path.is_file():
            yield Finding("note", "stray-shard", message, path.name, {"bytes": path.stat().st_size}, remedy)


def _rope(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings that transformers 5 writes in ``rope_parameters`` alone, where transformers 4 does not look."""
    message = "rope settings stand in `rope_parameters` alone: transformers 4 ignores them silently and rotates positions by its defaults"
    for where, part in (("config.json", config), ("config.json: text_config", config.get("text_config"))):
        rope = part.get("rope_parameters") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(rope, Mapping):
            continue
        readable = dict(part)
        configs.readable_rope(readable)
        default = _default_theta(part.get("model_type", config.get("model_type")))
        missing = {k: v for k, v in readable.items() if k not in part and (k, v) != ("rope_theta", default)}
        nested = {k: v for k, v in rope.items() if isinstance(v, Mapping)}
        if missing:
            add = printable(json.dumps(missing, sort_keys=True), 500)
            theta = part.get("rope_theta", default)
            numbers: Numbers = {"rope_theta": rope.get("rope_theta"), "transformers_4_uses": theta}
            if "rope_scaling" in missing:
                numbers["rope_type"] = printable(rope.get("rope_type"))
            remedy = f"add {add} to it; oftsurgery fold and export write both"
            yield Finding("warning", "rope", message, where, numbers, remedy)
        elif nested and "rope_theta" not in part:
            numbers = {f"{printable(k)}.rope_theta": v.get("rope_theta") for k, v in nested.items()}
            remedy = "use transformers ≥ 5 for this checkpoint, or add the fields that its class has in transformers 4"
            yield Finding("warning", "rope", message, where, numbers, remedy)


def _default_theta(model_type: object) -> float:
    """``rope_theta`` of a model type's class where the config has none."""
    with suppress(ImportError, KeyError, TypeError):
        from transformers import CONFIG_MAPPING

        return float(getattr(CONFIG_MAPPING[str(model_type)], "default_theta", 10_000.0))
    return 10_000.0


def _stale_config(checkpoint: Checkpoint) -> list[Finding]:
    settings = checkpoint.config.get("quantization_config")
    if settings is not None and not isinstance(settings, Mapping):
        message, remedy = "`quantization_config` is no JSON object", "restore the config.json that was saved"
        return [Finding("error", "stale-config", message, CONFIG, remedy=remedy)]
    method = "bitsandbytes" if settings is None else settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        message = "the config says that another library quantised the weights: oftsurgery knows bitsandbytes' formats and plain ones"
        says, remedy = {"config_says": printable(method)}, "dequantise it with that library first"
        return [Finding("error", "other-quantiser", message, CONFIG, says, remedy)]
    kinds = [kind for kind in FORMATS.values() if kind.quantised]
    held = {kind.width: sum(kind.evidence_in in n for n in checkpoint.entries) for kind in kinds}
    asked = (kind.width for kind in kinds if settings is not None and settings.get(next(iter(kind.loading))))
    stated = next(asked, None)
    remedy = "restore the config.json that was saved with these weights"
    if settings is not None and not any(held.values()):
        message = "the config says that bitsandbytes quantised the weights, but all are plain: from_pretrained fails, or quantises them once more"
        remedy = 'remove "quantization_config" from config.json'
    elif settings is None and any(held.values()) and checkpoint.config:
        message = "the weights are bitsandbytes', but the config has no `quantization_config`: from_pretrained takes the codes for values, or fails"
    elif stated is not None and not held[stated]:
        message = "the config names another quantisation than the weights have"
    else:
        return []
    evidence: Numbers = {f"{width}_weights": n for width, n in held.items()} | {"config_says": stated}
    return [Finding("error", "stale-config", message, CONFIG, evidence, remedy)]


# --- stored weights ---------------------------------------------------------------------------------------------------


def _weights(checkpoint: Checkpoint) -> list[Finding]:
    found: list[Finding] = []
    entries = checkpoint.entries
    groups = {name: companion_names(name, entries) for name in entries if name.endswith("weight")}
    beside = {name for group in groups.values() for name in group[1:]}
    for name, entry in entries.items():
        owner = owner_of(name)
        if name in beside:
            continue  # looked at with its weight
        if owner is not None:
            found.append(_missing(owner, name, "statistics of a weight that is not there"))
        elif name in groups and (len(groups[name]) > 1 or entry.dtype in ("U8", "I8")):
            found += _quantised(checkpoint, name)
        else:
            with _noting(found, name):
                found += _values(name, checkpoint.read(name))
    return found


def _values(name: str, tensor: Tensor) -> Iterator[Finding]:
    if not tensor.is_floating_point():
        return
    bad = int((~torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float())).sum())
    if bad:
        message = "the tensor holds NaN or infinity: all that it takes part in is NaN"
        remedy = "restore it from the checkpoint that it was made from; it cannot be folded"
        yield Finding("error", "non-finite", message, name, {"values": bad, "of": tensor.numel()}, remedy)


def _missing(subject: str, tensor: str, what: str) -> Finding:
    message = f"{what}: it cannot be loaded"
    remedy = f"save the model again, whole, or start from its base: {FOLD} --quantize nf4"
    return Finding("error", "missing-companions", message, subject, {"tensor": tensor}, remedy)


def _quantised(checkpoint: Checkpoint, name: str) -> list[Finding]:
    found = _lost(name, checkpoint.entries) or _cpu_packed(checkpoint, name)
    if found:
        return found
    with _noting(found, name):
        encoded = load_weight(checkpoint, name, transposed=False)
        for local, tensor in encoded.tensors.items():
            found += _values(name if local == "weight" else f"{name}.{local}", tensor)
        if not found:
            codecs.decode(encoded)
    return found


def _lost(name: str, entries: Mapping[str, TensorEntry]) -> list[Finding]:
    """What a quantised weight needs beside it and has not."""
    entry, absmax = entries[name], entries.get(f"{name}.absmax")
    marked = of_names(name, entries, DTYPES[entry.dtype]).quantised
    if entry.dtype == "I8":
        what, kind, wanted = "an int8 weight without its SCB statistics", FORMATS["int8"], ["SCB"]
    elif entry.dtype == "U8" or absmax is not None or marked:
        nested = absmax is not None and absmax.dtype == "U8"
        what, kind = "a 4-bit weight without all of its statistics", FORMATS["nf4"]
        wanted = ["absmax", "quant_map"] + ["nested_absmax", "nested_quant_map"] * nested + [""] * (not marked)
    else:
        return []
    lost = (kind.names(name)[local] for local in wanted)
    return [_missing(name, tensor, what) for tensor in lost if tensor not in entries]


def _cpu_packed(checkpoint: Checkpoint, name: str) -> list[Finding]:
    """A 4-bit weight saved as a CPU forward of bitsandbytes ≥ 0.49 left it: codes tiled ``(out, in/2)``, absmax
    bfloat16 ``(in/blocksize, out)``.
    """
    own, absmax = checkpoint.entries[name], checkpoint.entries.get(f"{name}.absmax")
    if own.dtype != "U8" or absmax is None:
        return []
    state = of_names(name, checkpoint.entries, torch.uint8).names(name)[""]
    try:
        packed = unpack_state(checkpoint.read(state), state)
    except OFTSurgeryError:
        return []  # found when it is decoded
    shape, blocksize = tuple(packed["shape"]), packed["blocksize"]
    format_ = WeightFormat(packed["quant_type"], shape, blocksize=blocksize)
    if len(shape) != 2 or shape[1] % blocksize or absmax.shape != (shape[1] // blocksize, shape[0]):
        return []
    tiled = own.shape == (shape[0], shape[1] // 2) and shape[1] != 2
    what = "its codes are tiled and its absmax is transposed" if tiled else "its absmax is transposed"
    message = f"saved after a CPU eval forward, in bitsandbytes' packing for that CPU: {what}; read as a checkpoint it is noise"
    numbers: Numbers = {
        "weight_shape": _times(own.shape),
        "absmax_shape": _times(absmax.shape),
        "absmax_dtype": absmax.dtype,
        "relative_error": _misread(checkpoint, name, format_, tiled=tiled),
    }
    remedy = (
        "start from the base again, with `module.support_avx512bf16_for_cpu = False` on its layers before any CPU forward, "
        f"or fold on disk: {FOLD} --quantize {packed['quant_type']}"
    )
    return [Finding("error", "cpu-packed" if tiled else "absmax-transposed", message, name, numbers, remedy)]


def _misread(checkpoint: Checkpoint, name: str, format_: WeightFormat, *, tiled: bool) -> float | None:
    """Relative error of reading a CPU-packed weight as a checkpoint's; None where it cannot be read at all."""
    out, features = format_.shape
    try:
        weight, absmax = checkpoint.read(name), checkpoint.read(f"{name}.absmax")
        wrong, right = (weight.reshape(-1, 1), absmax.reshape(-1).float()), (weight, absmax.t().reshape(-1).float())
        if tiled:
            right = unpack_cpu_layout(weight, absmax, (out, features), format_.blocksize)
        both = [EncodedWeight(format_, {"weight": codes, "absmax": scales}) for codes, scales in (wrong, right)]
        return relative_error(*map(codecs.decode, both))
    except OFTSurgeryError:
        return None


# --- what is folded in, and what is to be -----------------------------------------------------------------------------


def _folds(store: Store, record: FoldRecord | None, base: Model | None, adapter: OFTAdapter | None) -> list[Finding]:
    found = [] if record is None else _record(record, store, adapter if base is None else None)
    if adapter is not None and base is not None:
        before = _store(base)
        with _noting(found):
            found += [*_convolutions(adapter, store), *_folded(adapter, before, store, record)]
    elif adapter is not None and (record is None or adapter.fingerprint not in record.fingerprints()):
        found += _fits(adapter, store)
    return found


def _record(record: FoldRecord, store: Store, adapter: OFTAdapter | None) -> list[Finding]:
    found: list[Finding] = []
    folded = [a for r in (*record.earlier, record) for a in r.adapters]
    for fingerprint, times in Counter(a.fingerprint for a in folded).items():
        if times > 1:
            source = next(a.source for a in folded if a.fingerprint == fingerprint)
            message = "the record says that this adapter was folded in more than once"
            remedy = f"take the last fold out: {UNFOLD}"
            found.append(Finding("error", "folded-twice", message, source or fingerprint, {"times": times}, remedy))
    if adapter is not None and adapter.fingerprint in record.fingerprints():
        message = "this adapter is folded in already: folding it again would rotate twice, and is refused"
        remedy, folds = f"use the checkpoint as it is, or take it out: {UNFOLD}", {"adapters_folded": len(folded)}
        subject = adapter.source or adapter.fingerprint
        found.append(Finding("warning", "already-folded", message, subject, folds, remedy))
    for path, module in record.modules.items():
        if isinstance(store, LiveStore) and path in store.modules and _packed(store.modules[path]):
            continue  # a forward on the CPU packs a 4-bit weight and rounds its statistics: that is told of the layer
        with _noting(found, path):
            encoded = _weight(store, path)
            if encoded is None:
                remedy = "restore the record that belongs to the weights"
                raise MatchError("the record names a module that is not there", module=path, remedy=remedy)
            after = encoded.fingerprint
            if after == module.after:
                continue
            message = "the weight is not the one that the record was written for: changed since, or a record of another checkpoint"
            if after == module.before:
                message = "the record says that the weight is folded, but it is the base's"
            hashes = {"recorded": module.after, "found": after, "base": module.before, "format": encoded.format.label}
            found.append(Finding("error", "record", message, path, hashes, f"fold again: {FOLD}"))
    return found


# --- base, adapter and folded weights ---------------------------------------------------------------------------------


def _store(base: Model) -> Store:
    if isinstance(base, nn.Module):
        return LiveStore(base, _plain_paths(base))
    return FolderStore(open_checkpoint(files.find_checkpoint(base)))


def _weight(store: Store, path: str) -> EncodedWeight | None:
    """The weight of the module at ``path`` as it is stored; None where there is none."""
    name: str | None = f"{path}.weight"
    if isinstance(store, FolderStore):
        name = store.locate([f"{path}.weight"]).get(f"{path}.weight")
    return None if name is None else store.weight(name, WeightFormat("dense", ()))


def _convolutions(adapter: OFTAdapter, store: Store) -> Iterator[Finding]:
    names = store.locate([f"{path}.weight" for path in adapter.modules])
    for path in adapter.modules:
        shape = store.shape(names[f"{path}.weight"]) if f"{path}.weight" in names else ()
        if len(shape) == 4 and shape[2:] != (1, 1):
            yield _convolution(path, shape[2:])


def _convolution(path: str, kernel: Iterable[int]) -> Finding:
    message = (
        "the adapter rotates a convolution with a kernel larger than 1: peft 0.16 to 0.21's live layer overlaps its patches, so that no weight "
        "computes the same, and peft's own merge is off by about as much as the weight itself"
    )
    remedy = "train the adapter without this convolution (`exclude_modules`); 1×1 convolutions are fine"
    return Finding("error", "convolution", message, path, {"kernel": _times(kernel)}, remedy)


def _folded(adapter: OFTAdapter, base: Store, folded: Store, record: FoldRecord | None) -> list[Finding]:
    """Each folded weight against the base's: rotated, as it should be; as it was; transposed; rotated twice. And how much
    of the adapter is in all of them: of a weight that ``record`` calls calibrated, what it says of the outputs.
    """
    found: list[Finding] = []
    kept: dict[str, tuple[float, float]] = {}
    recorded = record.modules if record is not None else {}
    outputs = {path: m.output_kept for path, m in recorded.items() if m.output_kept is not None}
    for path, rotation in adapter.modules.items():
        with _noting(found, path):
            before, after = _weight(base, path), _weight(folded, path)
            if before is None or after is None:
                message = f"the adapter's module is not in the {'base' if before is None else 'folded'} model"
                remedy = "give the base and the adapter that it was folded from"
                raise MatchError(message, module=path, remedy=remedy)
            rotation.check_fits((before.format.shape[0], before.format.shape[1]), path)
            finding, part = _judge(path, rotation, before, after)
            found += [] if finding is None else [finding]
            if part is not None:
                kept[path] = (outputs.get(path, part[0]), part[1])
    # worst first: the one that is farthest from the right fold
    found.sort(key=lambda f: -float(f.evidence.get("from_the_right_fold") or math.inf))
    # of a merge that is wrong there is nothing to say of how much it keeps
    wrong = any(f.severity == "error" for f in found)
    return found if wrong else found + _kept(kept, calibrated=not outputs.keys().isdisjoint(kept))


def _kept(parts: Mapping[str, tuple[float, float]], *, calibrated: bool) -> list[Finding]:
    """How much of what the adapter changes is in the merged weights: of each ``(kept, ‖exact - base‖²)``. Calibrated ones
    were judged by their outputs.
    """
    total = math.fsum(change for _, change in parts.values())
    if not total:
        return []
    overall = math.fsum(kept * change for kept, change in parts.values()) / total
    least = min(parts, key=lambda path: parts[path][0])
    evidence: Numbers = {
        "kept": overall,
        "least": parts[least][0],
        "weights": len(parts),
        f"below_{ENOUGH:.0%}": sum(kept < ENOUGH for kept, _ in parts.values()),
    }
    text = f"{round(overall, 2) + 0.0:.0%} of what the adapter changes is in the merged weights"
    if overall >= ENOUGH or calibrated:
        return [Finding("note", "kept", text, least, evidence)]
    text += ": rounding to the format's levels has put the rest back"
    text += ", and the model computes nearly what its base does" if overall < 0.5 else ""
    remedy = 'fold the base again with --rounding preserve (rounding="preserve"), which keeps it in the same format'
    return [Finding("warning", "adapter-lost", text, least, evidence, remedy)]


_TRANSPOSED = (
    "the weight is the base's, transposed and not rotated: peft 0.16 to 0.20 merge OFT adapters into bitsandbytes layers so "
    "(a square one loads, and computes noise)"
)
_COARSE = "the weight is the right fold, but farther from it than its format's rounding: it was stored in a coarser format before"
_OTHER = "the weight is neither the base's nor this adapter's fold of it: it is of another base or adapter, or damaged"
# what a merged weight is nearest to → the finding's code and message
_NEAREST: Mapping[str, tuple[str, str]] = {
    "base": ("unrotated", "the weight is the base's, not rotated: the adapter is not in it, though it should be"),
    "base_transposed": ("transposed", _TRANSPOSED),
    "fold_transposed": ("transposed", "the weight is folded, but transposed"),
    "fold_twice": ("folded-twice", "the adapter is folded into the weight twice"),
    "right_fold": ("coarse-fold", _COARSE),
    "none": ("not-the-fold", _OTHER),
}

# a fold in NF4 is off by about a tenth, in FP4 by a little more
_COARSEST = 0.2


def _judge(
    path: str, rotation: Rotation, before: EncodedWeight, after: EncodedWeight
) -> tuple[Finding | None, tuple[float, float] | None]:
    """What is wrong with a merged weight, and how much of the change it holds, with ``‖exact - base‖²``."""
    device = before.tensors["weight"].device
    with rotations.full_precision(device.type):
        weight = codecs.decode(after).to(device)
        start = _start(before, after, weight, rotation)
        right = rotate_chain(start, [rotation])
        stored = codecs.decode(codecs.encode(right, replace(after.format, shape=tuple(right.shape))))
        rounding, effect = relative_error(stored, right), relative_error(start, right)
        kept = measures.kept(weight, start, right) if weight.shape == right.shape else None
        part = None if kept is None else (kept, float((right - start).square().sum(dtype=torch.float64)))
        if weight.shape == right.shape and relative_error(weight, stored) <= max(rounding / 2, 1e-6):
            return None, part
        far = _distances(weight, start, right, rotation)
    # what storing costs, with room for a base that was itself quantised on the way
    limit = 2 * rounding + 1e-3
    off, nearest = far.get("right_fold", math.inf), min(far, key=lambda k: far[k], default="none")
    if off <= limit and (nearest == "right_fold" or effect <= 1e-6):
        return None, part
    whole = kept is not None and abs(kept - 1) <= measures.WHOLE
    # rounding that keeps the change may err by more than to the nearest level, but no more than the format's steps
    if whole and off <= max(limit, 1.1 * measures.step_error(after, right)):
        return None, part
    if kept is not None and nearest == "base" and far["base"] <= limit and not torch.equal(weight, start):
        # a right merge to the nearest level would have put it back too: that is told of all weights together
        of_nearest = measures.kept(stored, start, right)
        if of_nearest is not None and of_nearest < 1 - measures.WHOLE:
            return None, part
    if far.get(nearest, math.inf) > (_COARSEST if nearest == "right_fold" else limit):
        nearest = "none"
    code, message = _NEAREST[nearest]
    evidence: Numbers = {f"from_the_{k}": v for k, v in far.items()}
    evidence |= {"rounding": rounding, "rotation_effect": effect}
    evidence |= {"shape": _times(weight.shape), "format": after.format.label}
    severity: Severity = "warning" if nearest == "right_fold" else "error"
    return Finding(severity, code, message, path, evidence, f"fold the base again: {FOLD}"), part


def _start(before: EncodedWeight, after: EncodedWeight, weight: Tensor, rotation: Rotation) -> Tensor:
    """The weight that was rotated: the base's, or what quantising a plain base gives, whichever explains the merged one
    better. A QOFT adapter was trained on the quantised base.
    """
    start = codecs.decode(before)
    if before.format.quantised or not after.format.quantised or before.format.shape != after.format.shape:
        return start
    quantised = codecs.decode(codecs.encode(start, after.format))
    return min((start, quantised), key=lambda s: relative_error(weight, rotate_chain(s, [rotation])))


def _distances(weight: Tensor, start: Tensor, right: Tensor, rotation: Rotation) -> dict[str, float]:
    """How far a merged weight is from the base, from the right fold, and from what wrong merges make of them."""
    far: dict[str, float] = {}
    if weight.shape == right.shape:
        far["right_fold"] = relative_error(weight, right)
        far["base"] = relative_error(start, right) and relative_error(weight, start)
        far["fold_twice"] = relative_error(weight, rotate_chain(right, [rotation]))
    if weight.shape == right.shape[::-1]:
        far["base_transposed"] = relative_error(weight.t(), start)
        far["fold_transposed"] = relative_error(weight.t(), right)
    return far


# --- an adapter's folder ----------------------------------------------------------------------------------------------


def _adapter_folder(folder: Path, base: Model | None) -> list[Finding]:
    found: list[Finding] = []
    with _noting(found, folder.name):
        config, tensors, sha256 = files.read_adapter(folder)
        for name, tensor in tensors.items():
            found += _values(name, tensor)
        if found:
            return sorted(found, key=lambda f: -float(f.evidence["values"] or 0))
        with _noting(found):  # its own subject: the tensor or the module
            adapter = parse_adapter(config, tensors, source=str(folder), sha256=sha256)
            found += _dialect(adapter, folder.name)
            if base is not None:
                found += _fits(adapter, _store(base))
    return found


def _fits(adapter: OFTAdapter, store: Store) -> list[Finding]:
    """What keeps an adapter from being folded in."""
    found: list[Finding] = []
    with _noting(found):
        found += _convolutions(adapter, store)
        if found:
            return found
        if isinstance(store, FolderStore):
            plan_checkpoint(store.source, [adapter])
        elif isinstance(store, LiveStore):
            store.record = None  # what is folded in is told of elsewhere
            plan_changes(store, [adapter])
    return found


def _dialect(adapter: OFTAdapter, subject: str) -> list[Finding]:
    """What other releases of peft make of the adapter."""
    modules = adapter.modules.values()
    turns = any(r.angle > 1e-7 or (r.scale is not None and bool((r.scale != 1).any())) for r in modules)
    numbers: Numbers = {
        "modules": len(adapter.modules),
        "largest_angle": max((r.angle for r in modules), default=0.0),
        "dialect": adapter.dialect,
    }
    remedy = f"oftsurgery reads it rightly: {FOLD}"
    if not turns and not adapter.saved:
        terms = next(iter(modules)).cayley.terms
        one = "a Neumann series of one term is the identity, whatever the weights"
        why = one if terms == 1 else "its rotations are all zero: it is untrained"
        numbers["neumann_terms"] = terms
        code, message, remedy = "no-effect", f"the adapter changes nothing: {why}", "train it, or check its config"
    elif adapter.dialect == "peft-0.15":
        code = "loads-as-identity"
        message = (
            "written by peft 0.14 or 0.15: newer peft drops its tensors (oft_r, oft_s) with no more than a warning about missing keys, "
            "and computes the base model"
        )
    elif adapter.dialect == "peft-0.13":
        code = "refused-by-newer-peft"
        message = "written by peft ≤ 0.13: newer peft refuses it and asks to train it again"
    elif adapter.dialect == "peft-0.17":
        apart = {path: _series_apart(r) for path, r in adapter.modules.items()}
        worst = max(apart, key=lambda path: apart[path])
        if apart[worst] <= 1e-6:
            return []
        numbers |= {"worst_module": worst, "largest_difference_of_R": apart[worst]}
        code, remedy = "other-series", f"oftsurgery computes it as trained: {FOLD}"
        message = "written by peft 0.16 or 0.17: newer peft computes it by another Neumann series, after a warning"
    else:
        return []
    return [Finding("warning", code, message, subject, numbers, remedy)]


def _series_apart(r: Rotation) -> float:
    """Largest spectral norm of the difference between what the two Neumann series make of the blocks."""
    if r.cayley.exact:
        return 0.0
    other = replace(r, cayley=replace(r.cayley, since_0_18=not r.cayley.since_0_18))
    return float(torch.linalg.matrix_norm(r.blocks - other.blocks, ord=2).max())


# --- a live model -----------------------------------------------------------------------------------------------------


def _plain_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the paths of the base model: peft's live layers are left out, what they wrap stands in their place."""
    prefix = "base_model.model." if peft_live.base_of(model) is not model else ""
    named = {path.removeprefix(prefix): m for path, m in modules_of(model).items()}
    return {path.removesuffix(".base_layer"): m for path, m in named.items() if f"{path}.base_layer" not in named}


def _live(model: nn.Module, base: Model | None, adapter: OFTAdapter | None) -> list[Finding]:
    store = LiveStore(model, _plain_paths(model))
    found = [finding for path, module in store.modules.items() for finding in _layer(path, module)]
    return found + _peft_layers(model) + _folds(store, store.record, base, adapter)


def _state(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None) or module.__dict__.get("quant_state")


def _packed(module: nn.Module) -> bool:
    return bool(getattr(_state(module), "packing_format_for_cpu", False))


def _layer(path: str, module: nn.Module) -> list[Finding]:
    found: list[Finding] = []
    for name, tensor in tensors_in({path: module}).items():
        if not tensor.is_meta:
            found += _values(name, tensor.detach())
    layer, weight = Layer(path, module), module._parameters.get("weight")
    if weight is None or found or not (layer.bitsandbytes or _state(module) is not None):
        return found
    with _noting(found, path):
        encoded, _ = layer.read()
        wanted: tuple[Any, Any] = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if None not in wanted and encoded.format.shape == wanted[::-1] and wanted[0] != wanted[1]:
            shapes = {"shape": _times(encoded.format.shape), "layer": _times(wanted)}
            message = "the weight has its layer's shape transposed: peft 0.16 to 0.20 merge OFT adapters into bitsandbytes layers so, without rotating them"
            return [Finding("error", "transposed", message, path, shapes, f"load the base again and fold it: {FOLD}")]
        codecs.decode(encoded)  # refuses what is not finite, or does not fit together
        if _packed(module):
            numbers: Numbers = {
                "weight_shape": _times(weight.shape),
                "absmax_shape": _times(_state(module).absmax.shape),
                "rounding_of_absmax": 2.0**-9,
            }
            message = (
                "a CPU eval forward has repacked the weight for this CPU: it computes rightly, but its state_dict() and peft's merge give noise, "
                "and its statistics are rounded to bfloat16"
            )
            remedy = "oftsurgery.fold and export_safetensors read it; for others load it again, with `module.support_avx512bf16_for_cpu = False`"
            found.append(Finding("warning", "cpu-packed", message, path, numbers, remedy))
    return found


def _peft_layers(model: nn.Module) -> list[Finding]:
    found: list[Finding] = []
    layers: list[tuple[str, Any]] = [
        (path, m)
        for path, m in model.named_modules()
        if type(m).__module__.startswith("peft.tuners.oft.") and hasattr(m, "merged_adapters")
    ]
    for path, layer in layers:
        plain_path = path.removeprefix("base_model.model.")
        inner = layer.get_base_layer()
        if layer.merged_adapters:
            severity: Severity = "note"
            message = "peft has merged its adapter into this layer: it can be folded no more"
            if Layer(plain_path, inner).bitsandbytes:
                severity = "warning"
                message = (
                    "peft has merged its adapter into this bitsandbytes layer: 0.16 to 0.20 store it transposed and unrotated, 0.21 stores noise after a "
                    "CPU forward, several adapters are merged in the wrong order, and unmerging does not restore the base"
                )
            remedy = "check it against the base: doctor(model, base=…, adapter=…); or load the base again and oftsurgery.fold it"
            numbers = {"merged_adapters": len(layer.merged_adapters), "peft": versions().get("peft")}
            found.append(Finding(severity, "peft-merged", message, plain_path, numbers, remedy))
        if isinstance(inner, nn.Conv2d) and tuple(inner.kernel_size) != (1, 1):
            found.append(_convolution(plain_path, inner.kernel_size))
    if layers and not found and any(layer.active_adapters and not layer.disable_adapters for _, layer in layers):
        with _noting(found):
            for adapter in peft_live.read_adapters(model):
                found += _dialect(adapter, adapter.source or "")
    return found
