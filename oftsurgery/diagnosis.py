"""Find and explain what is wrong with a checkpoint, an adapter or a live model: :func:`doctor`.

Everything is read tensor by tensor, and nothing is changed. What other functions refuse one by one is collected here,
together with damage that is valid data and therefore loads without a word: weights that peft merged wrongly, adapters
that newer peft loads as the identity, settings that readers ignore.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import codecs, configs, files, measures, peft_live, rotations
from .adapter import OFTAdapter, Rotation, parse_adapter
from .checkpoint import plan_checkpoint
from .codecs import EncodedWeight, WeightFormat
from .dtypes import DTYPES
from .errors import (
    AdapterError,
    CheckpointError,
    DialectError,
    FormatError,
    IntegrityError,
    MatchError,
    MissingDependencyError,
    NonFiniteError,
    OFTSurgeryError,
    ShapeError,
    StateError,
    printable,
)
from .folder_store import FolderStore, load_weight
from .formats import FORMATS, companion_names, of_names, owner_of
from .formats.four_bit import unpack_state
from .layers import Layer
from .live_store import LiveStore
from .model import modules_of, record_of
from .plan import plan_changes
from .record import ENOUGH, FoldRecord
from .shards import CONFIG, INDEX, SINGLE, Checkpoint, TensorEntry, inside, open_checkpoint, read_header, read_json
from .weight import relative_error, rotate_chain

__all__ = ["Finding", "doctor"]

Severity = Literal["error", "warning", "note"]
_ORDER: Mapping[str, int] = {"error": 0, "warning": 1, "note": 2}

FOLD, UNFOLD = "oftsurgery fold BASE ADAPTER OUTPUT", "oftsurgery unfold FOLDED OUTPUT --adapter ADAPTER"

Numbers = dict[str, float | int | str | None]


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
        object.__setattr__(self, "evidence", MappingProxyType(dict(self.evidence)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "evidence": dict(self.evidence),
            "others": list(self.others),
        }

    def __str__(self) -> str:
        more = f" and {len(self.others)} more" if self.others else ""
        lines = [f"{self.severity}: {self.code}: {self.subject}{more}", f"  {self.message}"]
        numbers = [
            f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
            for k, v in self.evidence.items()
        ]
        lines += ["  " + ", ".join(numbers)] * bool(numbers)
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
    loaded = adapter if isinstance(adapter, OFTAdapter) or adapter is None else _load(adapter)
    found: list[Finding] = []
    if isinstance(path_or_model, nn.Module):
        found += _live(path_or_model, base, loaded)
    else:
        folder = files.find_checkpoint(path_or_model)
        is_adapter = (folder / files.CONFIG).exists() or (folder / files.TENSORS).exists()
        if is_adapter and not (folder / SINGLE).exists() and not (folder / INDEX).exists():
            found += _adapter_folder(folder, base)
        else:
            found += _checkpoint_folder(folder, base, loaded)
    return sorted(_grouped(found), key=lambda f: _ORDER[f.severity])


def _load(adapter: str | PathLike[str]) -> OFTAdapter:
    config, tensors, sha256 = files.read_adapter(files.find_adapter(adapter))
    return parse_adapter(config, tensors, source=str(adapter), sha256=sha256)


def _grouped(findings: Iterable[Finding]) -> list[Finding]:
    """One finding a trouble: the first (the callers put the worst first) with the names of the others."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding.message), []).append(finding)
    return [replace(g[0], others=(*g[0].others, *dict.fromkeys(f.subject for f in g[1:]))) for g in groups.values()]


# --- errors as findings -----------------------------------------------------------------------------------------------

_CODES: tuple[tuple[type[OFTSurgeryError], str], ...] = (
    (NonFiniteError, "non-finite"),
    (DialectError, "dialect"),
    (AdapterError, "adapter-files"),
    (MatchError, "no-match"),
    (ShapeError, "shape"),
    (FormatError, "format"),
    (StateError, "state"),
    (IntegrityError, "hash"),
    (CheckpointError, "checkpoint-files"),
    (MissingDependencyError, "dependency"),
)


def _of_error(error: OFTSurgeryError, subject: str = "") -> Finding:
    code = next((code for cls, code in _CODES if isinstance(error, cls)), "refused")
    evidence: Numbers = {}
    if error.shape is not None:
        evidence["shape"] = "×".join(map(str, error.shape))
    if error.expected is not None:
        evidence["expected_shape"] = "×".join(map(str, error.expected))
    where = subject or error.module or error.tensor or (Path(error.path).name if error.path else "")
    return Finding("error", code, printable(error.message, 1000), printable(where), evidence, error.remedy or "")


@contextmanager
def _noting(found: list[Finding], subject: str = "") -> Iterator[None]:
    """An error of the body becomes a finding."""
    try:
        yield
    except OFTSurgeryError as error:
        found.append(_of_error(error, subject))


def _not_finite(name: str, count: int, total: int) -> Finding:
    message = "the tensor holds NaN or infinity: all that it takes part in is NaN"
    remedy = "restore it from the checkpoint that it was made from; it cannot be folded"
    return Finding("error", "non-finite", message, printable(name), {"values": count, "of": total}, remedy)


def _bad_values(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    return int((~torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float())).sum())


# --- a checkpoint's folder --------------------------------------------------------------------------------------------


def _checkpoint_folder(
    folder: Path, base: str | PathLike[str] | nn.Module | None, adapter: OFTAdapter | None
) -> list[Finding]:
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
    store = None
    with _noting(found):
        store = FolderStore(checkpoint)
    record = None
    with _noting(found, configs.RECORD):
        record = configs.record_in(folder)
    if store is None:
        return found
    stored = partial(_stored, store)
    if record is not None:
        found += _record(record, stored, adapter if base is None else None)
    if adapter is not None:
        found += _convolutions(adapter, store)
        if base is None:
            if record is None or adapter.fingerprint not in record.fingerprints():
                with _noting(found):
                    plan_checkpoint(checkpoint, [adapter])
        else:
            read, _ = _reader(base)
            found += _folded(adapter, read, stored, record)
    return found


def _open(folder: Path, found: list[Finding]) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        damage = _index(folder) if (folder / INDEX).is_file() else None
        if damage is None:
            found.append(_of_error(error))
            return None
        finding, checkpoint = damage
        found.append(finding)
        return checkpoint
    if len(checkpoint.files) > 1:
        metadata = read_json(folder / INDEX).get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        held = sum(e.nbytes for e in checkpoint.entries.values())
        if isinstance(stated, (int, float)) and stated != held:
            message, remedy = (
                "the index states another total size than its shards hold",
                f'set "total_size" to {held} in {INDEX}',
            )
            sizes: Numbers = {"stated_bytes": stated, "held_bytes": held}
            found.append(Finding("note", "index-size", message, INDEX, sizes, remedy))
    return checkpoint


def _index(folder: Path) -> tuple[Finding, Checkpoint] | None:
    """How an index and its shards disagree, and a checkpoint of what can be read; None where the trouble is another."""
    try:
        weight_map = read_json(inside(folder, INDEX)).get("weight_map")
    except CheckpointError:
        return None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        return None
    entries: dict[str, TensorEntry] = {}
    lost: list[str] = []
    twice: list[str] = []
    for file in sorted(set(weight_map.values())):
        try:
            header, _ = read_header(inside(folder, file))
        except CheckpointError:
            lost.append(file)
            continue
        twice += [e.name for e in header if e.name in entries]
        entries |= {e.name: e for e in header}
    absent = [n for n, file in weight_map.items() if n not in entries and file not in lost]
    elsewhere = [n for n, file in weight_map.items() if n in entries and entries[n].file != file]
    unlisted = [n for n in entries if n not in weight_map]
    wrong = lost + absent + elsewhere + unlisted + twice
    if not wrong:
        return None
    finding = Finding(
        "error",
        "index",
        "the index and its shards disagree: transformers fills what it does not find with random numbers, or does not load at all",
        printable(wrong[0]),
        {
            "shards": len(set(weight_map.values())),
            "shards_missing_or_damaged": len(lost),
            "tensors_listed": len(weight_map),
            "absent_from_their_shard": len(absent),
            "in_another_shard": len(elsewhere),
            "not_listed": len(unlisted),
            "in_two_shards": len(twice),
        },
        "download the checkpoint again, or restore the index that belongs to these shards",
        tuple(map(printable, wrong[1:])),
    )
    names = tuple(sorted({e.file for e in entries.values()}))
    try:
        config = read_json(inside(folder, CONFIG)) if (folder / CONFIG).exists() else {}
    except CheckpointError:
        return None
    return finding, Checkpoint(folder, MappingProxyType(entries), names, MappingProxyType(config), MappingProxyType({}))


def _stray_shards(checkpoint: Checkpoint) -> list[Finding]:
    stray = sorted(p for p in checkpoint.folder.glob("model*.safetensors") if p.name not in checkpoint.files)
    message = "a file of weights that is no part of the checkpoint: nothing reads it"
    remedy = "remove it, unless the index is the wrong one"
    return [
        Finding("note", "stray-shard", message, printable(p.name), {"bytes": p.stat().st_size}, remedy)
        for p in stray
        if p.is_file()
    ]


def _rope(config: Mapping[str, Any]) -> list[Finding]:
    """Settings that transformers 5 writes in ``rope_parameters`` alone, where transformers 4 does not look."""
    text = config.get("text_config")
    found = []
    for where, part in (("config.json", config), ("config.json: text_config", text)):
        rope = part.get("rope_parameters") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(rope, Mapping):
            continue
        readable = dict(part)
        configs.readable_rope(readable)
        default = _default_theta(part.get("model_type", config.get("model_type")))
        missing = {k: v for k, v in readable.items() if k not in part}
        missing = {k: v for k, v in missing.items() if k != "rope_theta" or v != default}
        nested = {k: v for k, v in rope.items() if isinstance(v, Mapping)}
        if missing:
            add = printable(json.dumps(missing, sort_keys=True), 500)
            numbers: Numbers = {
                "rope_theta": rope.get("rope_theta"),
                "transformers_4_uses": part.get("rope_theta", default),
            }
            if "rope_scaling" in missing:
                numbers["rope_type"] = printable(rope.get("rope_type"))
            remedy = f"add {add} to it; oftsurgery fold and export write both"
        elif nested and "rope_theta" not in part:
            numbers = {f"{printable(k)}.rope_theta": v.get("rope_theta") for k, v in nested.items()}
            remedy = "use transformers ≥ 5 for this checkpoint, or add the fields that its class has in transformers 4"
        else:
            continue
        message = "rope settings stand in `rope_parameters` alone: transformers 4 ignores them silently and rotates positions by its defaults"
        found.append(Finding("warning", "rope", message, where, numbers, remedy))
    return found


def _default_theta(model_type: object) -> float:
    """``rope_theta`` of a model type's class where the config has none."""
    try:
        from transformers import CONFIG_MAPPING

        default = getattr(CONFIG_MAPPING[str(model_type)], "default_theta", 10_000.0)
    except (ImportError, KeyError):
        return 10_000.0
    return float(default) if isinstance(default, (int, float)) else 10_000.0


def _stale_config(checkpoint: Checkpoint) -> list[Finding]:
    settings = checkpoint.config.get("quantization_config")
    if settings is not None and not isinstance(settings, Mapping):
        message, remedy = "`quantization_config` is no JSON object", "restore the config.json that was saved"
        return [Finding("error", "stale-config", message, "config.json", remedy=remedy)]
    method = "bitsandbytes" if settings is None else settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        message = "the config says that another library quantised the weights: oftsurgery knows bitsandbytes' formats and plain ones"
        found = {"config_says": printable(method)}
        return [
            Finding("error", "other-quantiser", message, "config.json", found, "dequantise it with that library first")
        ]
    kinds = [kind for kind in FORMATS.values() if kind.quantised]
    held = {kind.width: sum(kind.evidence_in in n for n in checkpoint.entries) for kind in kinds}
    asked = (kind.width for kind in kinds if settings is not None and settings.get(next(iter(kind.loading))))
    stated = next(asked, None)
    evidence: Numbers = {f"{width}_weights": n for width, n in held.items()} | {"config_says": stated}
    if settings is not None and not any(held.values()):
        message = "the config says that bitsandbytes quantised the weights, but all are plain: from_pretrained fails, or quantises them once more"
        remedy = 'remove "quantization_config" from config.json'
    elif settings is None and any(held.values()) and checkpoint.config:
        message = "the weights are bitsandbytes', but the config has no `quantization_config`: from_pretrained takes the codes for values, or fails"
        remedy = "restore the config.json that was saved with these weights"
    elif stated is not None and not held[stated]:
        message = "the config names another quantisation than the weights have"
        remedy = "restore the config.json that was saved with these weights"
    else:
        return []
    return [Finding("error", "stale-config", message, "config.json", evidence, remedy)]


# --- stored weights ---------------------------------------------------------------------------------------------------


def _weights(checkpoint: Checkpoint) -> list[Finding]:
    found: list[Finding] = []
    done: set[str] = set()
    entries = checkpoint.entries
    for name in entries:
        if name in done:
            continue
        if name.endswith("weight"):
            group = companion_names(name, entries)
            states = len([n for n in group if ".quant_state." in n])
            if len(group) > 1 or entries[name].dtype in ("U8", "I8"):
                done.update(group)
                found += _quantised(checkpoint, name, states)
                continue
        owner = owner_of(name)
        if owner is not None:
            if owner not in entries:
                found.append(_missing(owner, name, "statistics of a weight that is not there"))
                done.add(name)
            continue  # else with its weight, which may come later
        with _noting(found, name):
            found += _values(name, checkpoint.read(name))
    return found


def _values(name: str, tensor: Tensor) -> list[Finding]:
    bad = _bad_values(tensor)
    return [_not_finite(name, bad, tensor.numel())] if bad else []


def _missing(subject: str, what: str, message: str) -> Finding:
    remedy, evidence = (
        f"save the model again, whole, or start from its base: {FOLD} --quantize nf4",
        {"tensor": printable(what)},
    )
    return Finding(
        "error", "missing-companions", f"{message}: it cannot be loaded", printable(subject), evidence, remedy
    )


def _quantised(checkpoint: Checkpoint, name: str, states: int) -> list[Finding]:
    entries = checkpoint.entries
    if entries[name].dtype == "I8":
        scb = name.removesuffix("weight") + "SCB"
        if scb not in entries:
            return [_missing(name, scb, "an int8 weight without its SCB statistics")]
    elif entries[name].dtype == "U8" or states or f"{name}.absmax" in entries:
        lacks = _lacks(name, entries, states)
        if lacks:
            return [_missing(name, n, "a 4-bit weight without all of its statistics") for n in lacks]
        damage = _cpu_packing(checkpoint, name)
        if damage is not None:
            return [damage]
    found: list[Finding] = []
    with _noting(found, name):
        encoded = load_weight(checkpoint, name, transposed=False)
        for local, tensor in encoded.tensors.items():
            found += _values(name if local == "weight" else f"{name}.{local}", tensor)
        if not found:
            codecs.decode(encoded)
    return found


def _lacks(name: str, entries: Mapping[str, TensorEntry], states: int) -> list[str]:
    wanted = [f"{name}.absmax", f"{name}.quant_map"]
    if f"{name}.absmax" in entries and entries[f"{name}.absmax"].dtype == "U8":
        wanted += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    return [n for n in wanted if n not in entries] + ([f"{name}.quant_state.bitsandbytes__nf4"] if not states else [])


def _cpu_packing(checkpoint: Checkpoint, name: str) -> Finding | None:
    """A 4-bit weight saved as a CPU forward of bitsandbytes ≥ 0.49 left it: codes tiled ``(out, in/2)``, absmax
    bfloat16 ``(in/blocksize, out)``.
    """
    entries = checkpoint.entries
    kind = of_names(name, entries, DTYPES[entries[name].dtype])
    state, absmax = kind.names(name)[""], entries[f"{name}.absmax"]
    try:
        packed = unpack_state(checkpoint.read(state), state)
    except OFTSurgeryError:
        return None  # found when it is decoded
    shape, blocksize = tuple(packed["shape"]), packed["blocksize"]
    if len(shape) != 2 or shape[1] % blocksize or entries[name].dtype != "U8":
        return None
    if absmax.shape != (shape[1] // blocksize, shape[0]):
        return None
    numbers: Numbers = {
        "weight_shape": "×".join(map(str, entries[name].shape)),
        "absmax_shape": "×".join(map(str, absmax.shape)),
        "absmax_dtype": absmax.dtype,
    }
    tiled = entries[name].shape == (shape[0], shape[1] // 2) and shape[1] != 2
    with torch.no_grad():
        stored = (checkpoint.read(name), checkpoint.read(f"{name}.absmax"))
        numbers["relative_error"] = _misread(*stored, packed, tiled=tiled)
    what = "its codes are tiled and its absmax is transposed" if tiled else "its absmax is transposed"
    message = f"saved after a CPU eval forward, in bitsandbytes' packing for that CPU: {what}; read as a checkpoint it is noise"
    remedy = (
        "start from the base again, with `module.support_avx512bf16_for_cpu = False` on its layers before any CPU forward, "
        f"or fold on disk: {FOLD} --quantize {packed['quant_type']}"
    )
    return Finding("error", "cpu-packed" if tiled else "absmax-transposed", message, printable(name), numbers, remedy)


def _misread(weight: Tensor, absmax: Tensor, packed: Mapping[str, Any], *, tiled: bool) -> float | None:
    """Relative error of reading a CPU-packed weight as a checkpoint's."""
    shape, blocksize = tuple(packed["shape"]), packed["blocksize"]
    format_ = WeightFormat(packed["quant_type"], shape, blocksize=blocksize)
    try:
        right = {"weight": weight, "absmax": absmax.t().reshape(-1).float()}
        if tiled:
            right["weight"], right["absmax"] = codecs.unpack_cpu_layout(weight, absmax, shape, blocksize)
        wrong = {"weight": weight.reshape(-1, 1), "absmax": absmax.reshape(-1).float()}
        values = [codecs.decode(EncodedWeight(format_, tensors)) for tensors in (wrong, right)]
    except OFTSurgeryError:
        return None
    return relative_error(*values)


# --- the record -------------------------------------------------------------------------------------------------------


def _record(
    record: FoldRecord, stored: Callable[[str], EncodedWeight | None], adapter: OFTAdapter | None
) -> list[Finding]:
    found: list[Finding] = []
    all_prints = [a.fingerprint for r in (*record.earlier, record) for a in r.adapters]
    for fingerprint in dict.fromkeys(p for p in all_prints if all_prints.count(p) > 1):
        names = [a for r in (*record.earlier, record) for a in r.adapters if a.fingerprint == fingerprint]
        message = "the record says that this adapter was folded in more than once"
        remedy, times = f"take the last fold out: {UNFOLD}", all_prints.count(fingerprint)
        subject = printable(names[0].source or fingerprint)
        found.append(Finding("error", "folded-twice", message, subject, {"times": times}, remedy))
    if adapter is not None and adapter.fingerprint in record.fingerprints():
        message = "this adapter is folded in already: folding it again would rotate twice, and is refused"
        remedy, folds = f"use the checkpoint as it is, or take it out: {UNFOLD}", {"adapters_folded": len(all_prints)}
        subject = printable(adapter.source or adapter.fingerprint)
        found.append(Finding("warning", "already-folded", message, subject, folds, remedy))
    for path, module in record.modules.items():
        with _noting(found, path):
            encoded = stored(path)
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
            found.append(Finding("error", "record", message, printable(path), hashes, f"fold again: {FOLD}"))
    return found


# --- base, adapter and folded weights ---------------------------------------------------------------------------------


def _stored(store: FolderStore, path: str) -> EncodedWeight | None:
    name = store.locate([f"{path}.weight"]).get(f"{path}.weight")
    return None if name is None else store.weight(name, store.stored(name))


def _reader(base: str | PathLike[str] | nn.Module) -> tuple[Callable[[str], EncodedWeight | None], Checkpoint | None]:
    """What gives a base's weight by its module's path."""
    if isinstance(base, nn.Module):
        modules = _plain_paths(base)
        return lambda path: Layer(path, modules[path]).read()[0] if path in modules else None, None
    checkpoint = open_checkpoint(files.find_checkpoint(base))
    return partial(_stored, FolderStore(checkpoint)), checkpoint


def _convolutions(adapter: OFTAdapter, store: FolderStore) -> list[Finding]:
    names = store.locate([f"{path}.weight" for path in adapter.modules])
    shapes = {path: store.shape(names[f"{path}.weight"]) for path in adapter.modules if f"{path}.weight" in names}
    return [_convolution(path, shape[2:]) for path, shape in shapes.items() if len(shape) == 4 and shape[2:] != (1, 1)]


def _convolution(path: str, kernel: Iterable[int]) -> Finding:
    message = (
        "the adapter rotates a convolution with a kernel larger than 1: peft 0.16 to 0.21's live layer overlaps its patches, so that no weight "
        "computes the same, and peft's own merge is off by about as much as the weight itself"
    )
    remedy = "train the adapter without this convolution (`exclude_modules`); 1×1 convolutions are fine"
    return Finding("error", "convolution", message, printable(path), {"kernel": "×".join(map(str, kernel))}, remedy)


def _folded(
    adapter: OFTAdapter,
    base: Callable[[str], EncodedWeight | None],
    folded: Callable[[str], EncodedWeight | None],
    record: FoldRecord | None,
) -> list[Finding]:
    """Each folded weight against the base's: rotated, as it should be; as it was; transposed; rotated twice. And how much
    of the adapter is in all of them: of a weight that ``record`` calls calibrated, what it says of the outputs.
    """
    found: list[Finding] = []
    kept: dict[str, tuple[float, float]] = {}
    calibrated = False
    for path, rotation in adapter.modules.items():
        with _noting(found, path):
            before, after = base(path), folded(path)
            if before is None or after is None:
                raise MatchError(
                    f"the adapter's module is not in the {'base' if before is None else 'folded'} model",
                    module=path,
                    remedy="give the base and the adapter that it was folded from",
                )
            rotation.check_fits((before.format.shape[0], before.format.shape[1]), path)
            finding, part = _judge(path, rotation, before, after)
            found += [] if finding is None else [finding]
            if part is not None:
                known = record.modules.get(path) if record is not None else None
                outputs = known.output_kept if known is not None else None
                kept[path] = part if outputs is None else (outputs, part[1])
                calibrated = calibrated or outputs is not None
    # worst first: the one that is farthest from the right fold
    found.sort(key=lambda f: -float(f.evidence.get("from_the_right_fold") or math.inf))
    # of a merge that is wrong there is nothing to say of how much it keeps
    return found if any(f.severity == "error" for f in found) else found + _kept(kept, calibrated=calibrated)


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
        return [Finding("note", "kept", text, printable(least), evidence)]
    text += ": rounding to the format's levels has put the rest back"
    text += ", and the model computes nearly what its base does" if overall < 0.5 else ""
    remedy = 'fold the base again with --rounding preserve (rounding="preserve"), which keeps it in the same format'
    return [Finding("warning", "adapter-lost", text, printable(least), evidence, remedy)]


_TRANSPOSED = (
    "the weight is the base's, transposed and not rotated: peft 0.16 to 0.20 merge OFT adapters into bitsandbytes layers so "
    "(a square one loads, and computes noise)"
)
_MESSAGES: Mapping[str, tuple[Severity, str, str]] = {
    "base": (
        "error",
        "unrotated",
        "the weight is the base's, not rotated: the adapter is not in it, though it should be",
    ),
    "base_transposed": ("error", "transposed", _TRANSPOSED),
    "fold_transposed": ("error", "transposed", "the weight is folded, but transposed"),
    "fold_twice": ("error", "folded-twice", "the adapter is folded into the weight twice"),
    "right_fold": (
        "warning",
        "coarse-fold",
        "the weight is the right fold, but farther from it than its format's rounding: it was stored in a coarser format before",
    ),
    "none": (
        "error",
        "not-the-fold",
        "the weight is neither the base's nor this adapter's fold of it: it is of another base or adapter, or damaged",
    ),
}


# a fold in NF4 is off by about a tenth, in FP4 by a little more
_COARSEST = 0.2


def _judge(
    path: str, rotation: Rotation, before: EncodedWeight, after: EncodedWeight
) -> tuple[Finding | None, tuple[float, float] | None]:
    """What is wrong with a merged weight, and how much of the change it holds, with ``‖exact - base‖²``."""
    with rotations.full_precision(before.tensors["weight"].device.type):
        weight = codecs.decode(after).to(before.tensors["weight"].device)
        start = _start(before, after, weight, rotation)
        right = rotate_chain(start, [rotation])
        effect = relative_error(start, right)
        stored = codecs.decode(codecs.encode(right, replace(after.format, shape=tuple(right.shape))))
        rounding = relative_error(stored, right)
        part, whole, put_back = _share(weight, start, right, stored)
        if weight.shape == right.shape and relative_error(weight, stored) <= max(rounding / 2, 1e-6):
            return None, part
        far = _distances(weight, start, right, rotation)
    # what storing costs, with room for a base that was itself quantised on the way
    limit = 2 * rounding + 1e-3
    nearest = min(far, key=lambda k: far[k], default="none")
    if nearest == "right_fold" and far[nearest] <= limit:
        return None, part
    if effect <= 1e-6 and far.get("right_fold", math.inf) <= limit:
        return None, part
    # rounding that keeps the change may err by more than to the nearest level, but no more than the format's steps
    if whole and far["right_fold"] <= max(limit, 1.1 * measures.step_error(after, right)):
        return None, part
    if put_back and nearest == "base" and far["base"] <= limit:
        return None, part
    if far.get(nearest, math.inf) > (_COARSEST if nearest == "right_fold" else limit):
        nearest = "none"
    severity, code, message = _MESSAGES[nearest]
    evidence: Numbers = {f"from_the_{k}": v for k, v in far.items()}
    evidence |= {
        "rounding": rounding,
        "rotation_effect": effect,
        "shape": "×".join(map(str, weight.shape)),
        "format": after.format.label,
    }
    return Finding(severity, code, message, printable(path), evidence, f"fold the base again: {FOLD}"), part


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


def _share(
    weight: Tensor, start: Tensor, right: Tensor, stored: Tensor
) -> tuple[tuple[float, float] | None, bool, bool]:
    """How much of the change a merged weight holds, with ``‖exact - base‖²``; whether that is all of it; and whether a
    right merge to the nearest level, ``stored``, would have put it back too (that is told of all weights together).
    """
    if weight.shape != right.shape:
        return None, False, False
    share, of_nearest = measures.kept(weight, start, right), measures.kept(stored, start, right)
    if share is None or of_nearest is None:
        return None, False, False
    size = float((right - start).square().sum(dtype=torch.float64))
    put_back = of_nearest < 1 - measures.WHOLE and not torch.equal(weight, start)
    return (share, size), abs(share - 1) <= measures.WHOLE, put_back


# --- an adapter's folder ----------------------------------------------------------------------------------------------


def _adapter_folder(folder: Path, base: str | PathLike[str] | nn.Module | None) -> list[Finding]:
    found: list[Finding] = []
    with _noting(found, folder.name):
        config, tensors, sha256 = files.read_adapter(folder)
        bad = {name: n for name, t in tensors.items() if (n := _bad_values(t))}
        found += [
            _not_finite(name, n, tensors[name].numel()) for name, n in sorted(bad.items(), key=lambda item: -item[1])
        ]
        if bad:
            return found
        with _noting(found):  # its own subject: the tensor or the module
            adapter = parse_adapter(config, tensors, source=str(folder), sha256=sha256)
            found += _dialect(adapter, folder.name)
            if base is not None:
                found += _fits(adapter, base)
    return found


def _fits(adapter: OFTAdapter, base: str | PathLike[str] | nn.Module) -> list[Finding]:
    found: list[Finding] = []
    with _noting(found):
        if isinstance(base, nn.Module):
            return _fits_model(adapter, base)
        checkpoint = open_checkpoint(files.find_checkpoint(base))
        found += _convolutions(adapter, FolderStore(checkpoint))
        if not found:
            plan_checkpoint(checkpoint, [adapter])
    return found


def _fits_model(adapter: OFTAdapter, model: nn.Module) -> list[Finding]:
    found: list[Finding] = []
    modules = _plain_paths(model)
    for path in adapter.modules:
        module = modules.get(path)
        if isinstance(module, nn.Conv2d) and tuple(module.kernel_size) != (1, 1):
            found.append(_convolution(path, module.kernel_size))
    if not found:
        with _noting(found):
            store = LiveStore(model, modules)
            store.record = None  # what is folded in is told of elsewhere
            plan_changes(store, [adapter])
    return found


def _dialect(adapter: OFTAdapter, subject: str) -> list[Finding]:
    """What other releases of peft make of the adapter."""
    turned = {
        path: r
        for path, r in adapter.modules.items()
        if r.angle > 1e-7 or (r.scale is not None and bool((r.scale != 1).any()))
    }
    largest = max((r.angle for r in adapter.modules.values()), default=0.0)
    numbers: Numbers = {
        "modules": len(adapter.modules),
        "largest_angle": largest,
        "dialect": adapter.dialect,
    }
    read, code = f"oftsurgery reads it rightly: {FOLD}", ""
    if not turned and not adapter.saved:
        terms = next(iter(adapter.modules.values())).cayley.terms
        why = "its rotations are all zero: it is untrained"
        if terms == 1:
            why = "a Neumann series of one term is the identity, whatever the weights"
        numbers["neumann_terms"] = terms
        code, message, read = "no-effect", f"the adapter changes nothing: {why}", "train it, or check its config"
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
        if apart[worst] > 1e-6:
            numbers |= {"worst_module": printable(worst), "largest_difference_of_R": apart[worst]}
            code, read = "other-series", f"oftsurgery computes it as trained: {FOLD}"
            message = "written by peft 0.16 or 0.17: newer peft computes it by another Neumann series, after a warning"
    return [Finding("warning", code, message, printable(subject), numbers, read)] if code else []


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
    inner = {path for path in named if path.endswith(".base_layer")}
    return {path.removesuffix(".base_layer"): m for path, m in named.items() if f"{path}.base_layer" not in inner}


def _live(model: nn.Module, base: str | PathLike[str] | nn.Module | None, adapter: OFTAdapter | None) -> list[Finding]:
    found: list[Finding] = []
    modules = _plain_paths(model)
    for path, module in modules.items():
        found += _layer(path, module)
    found += _peft_layers(model)
    record = record_of(model)

    def stored(path: str) -> EncodedWeight | None:
        return Layer(path, modules[path]).read()[0] if path in modules else None

    if record is not None:
        # a forward on the CPU packs a 4-bit weight and rounds its statistics: that is said above
        packed = {path for path in record.modules if path in modules and _packed(modules[path])}
        checked = replace(record, modules={p: m for p, m in record.modules.items() if p not in packed})
        found += _record(checked, stored, adapter if base is None else None)
    if adapter is not None and base is not None:
        read, _ = _reader(base)
        found += _folded(adapter, read, stored, record)
    elif adapter is not None and (record is None or adapter.fingerprint not in record.fingerprints()):
        found += _fits_model(adapter, model)
    return found


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return (
        (name, t) for holder in (module._parameters, module._buffers) for name, t in holder.items() if t is not None
    )


def _state(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None) or module.__dict__.get("quant_state")


def _packed(module: nn.Module) -> bool:
    return bool(getattr(_state(module), "packing_format_for_cpu", False))


def _layer(path: str, module: nn.Module) -> list[Finding]:
    found: list[Finding] = []
    for name, tensor in _own_tensors(module):
        if not tensor.is_meta:
            found += _values(f"{path}.{name}".lstrip("."), tensor.detach())
    quantised = (
        any(c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__) or _state(module) is not None
    )
    weight = module._parameters.get("weight")
    if not quantised or weight is None or found:
        return found
    with _noting(found, path):
        encoded, _ = Layer(path, module).read()
        wanted = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if None not in wanted and encoded.format.shape == wanted[::-1] and wanted[0] != wanted[1]:
            evidence: Numbers = {"shape": "×".join(map(str, encoded.format.shape)), "layer": f"{wanted[0]}×{wanted[1]}"}
            message = "the weight has its layer's shape transposed: peft 0.16 to 0.20 merge OFT adapters into bitsandbytes layers so, without rotating them"
            remedy = f"load the base again and fold it: {FOLD}"
            return [Finding("error", "transposed", message, printable(path), evidence, remedy)]
        codecs.decode(encoded)  # refuses what is not finite, or does not fit together
        if _packed(module):
            numbers: Numbers = {
                "weight_shape": "×".join(map(str, weight.shape)),
                "absmax_shape": "×".join(map(str, _state(module).absmax.shape)),
                "rounding_of_absmax": 2.0**-9,
            }
            message = (
                "a CPU eval forward has repacked the weight for this CPU: it computes rightly, but its state_dict() and peft's merge give noise, "
                "and its statistics are rounded to bfloat16"
            )
            remedy = "oftsurgery.fold and export_safetensors read it; for others load it again, with `module.support_avx512bf16_for_cpu = False`"
            found.append(Finding("warning", "cpu-packed", message, printable(path), numbers, remedy))
    return found


def _peft_layers(model: nn.Module) -> list[Finding]:
    found: list[Finding] = []
    layers: list[tuple[str, Any]] = [
        (path, m)
        for path, m in model.named_modules()
        if type(m).__module__.startswith("peft.tuners.oft.") and hasattr(m, "merged_adapters")
    ]
    for path, layer in layers:
        plain = path.removeprefix("base_model.model.")
        inner = layer.get_base_layer()
        if layer.merged_adapters:
            quantised = any(c.__module__.startswith("bitsandbytes.") for c in type(inner).__mro__)
            numbers: Numbers = {
                "merged_adapters": len(layer.merged_adapters),
                "peft": _peft_version(),
            }
            message = (
                "peft has merged its adapter into this bitsandbytes layer: 0.16 to 0.20 store it transposed and unrotated, 0.21 stores noise after a "
                "CPU forward, several adapters are merged in the wrong order, and unmerging does not restore the base"
                if quantised
                else "peft has merged its adapter into this layer: it can be folded no more"
            )
            severity: Severity = "warning" if quantised else "note"
            remedy = "check it against the base: doctor(model, base=…, adapter=…); or load the base again and oftsurgery.fold it"
            found.append(Finding(severity, "peft-merged", message, printable(plain), numbers, remedy))
        if isinstance(inner, nn.Conv2d) and tuple(inner.kernel_size) != (1, 1):
            found.append(_convolution(plain, inner.kernel_size))
    if layers and not found and any(layer.active_adapters and not layer.disable_adapters for _, layer in layers):
        with _noting(found):
            for adapter in peft_live.read_adapters(model):
                found += _dialect(adapter, adapter.source or "")
    return found


def _peft_version() -> str:
    from importlib import metadata

    return metadata.version("peft")
