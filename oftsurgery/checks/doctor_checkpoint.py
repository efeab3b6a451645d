""":func:`examine_checkpoint` finds what is wrong with a checkpoint's folder: its index, shards, settings and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import CheckpointError, OFTSurgeryError, printable
from oftsurgery.files.carried import carried_from
from oftsurgery.files.checkpoint import Checkpoint, open_checkpoint, open_single_file
from oftsurgery.files.layout import CONFIG, LAYOUTS, is_of_variant, layout_of
from oftsurgery.files.reading import TensorEntry, inside, read_header, read_json
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.records.record_file import RECORD, record_beside
from oftsurgery.stores import configs
from oftsurgery.stores.dequantised import dequantised, method_of
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.modules import tensors_in

from .doctor_folds import examine_folds
from .doctor_weights import examine_weights
from .findings import FOLD, Finding, Model, Numbers, noting, of_error, shape_text


def examine_checkpoint(folder: Path, base: Model | None, adapter: OFTAdapter | None) -> list[Finding]:
    """What is wrong with the checkpoint in a folder or in a single file."""
    found: list[Finding] = []
    if folder.is_file():
        with noting(found):
            found += _examine(open_single_file(folder), base, adapter)
        return found
    checkpoint = _open_or_recover(folder, found)
    if checkpoint is None:
        return found
    if not any(f.code == "index" for f in found):  # a wrong index leaves out shards that belong to the checkpoint
        found += _stray_shards(checkpoint)
    with noting(found):
        carried_from(folder)  # refuses links and indexes that leave the folder
    if checkpoint.wrapped:
        message = "the tensors' names hold segments of wrappers: transformers finds no tensor, and fills the model with random numbers"
        remedy = f"fold an adapter, which writes the plain names: {FOLD}; or save the model without its wrapper"
        found.append(
            Finding("error", "wrapped-names", message, folder.name, {"tensors": len(checkpoint.entries)}, remedy)
        )
    found += _unread_rope_settings(checkpoint.config)
    found += _stale_config(checkpoint)
    return found + _examine(checkpoint, base, adapter)


def _examine(checkpoint: Checkpoint, base: Model | None, adapter: OFTAdapter | None) -> list[Finding]:
    """What is wrong with the weights and the folds of a checkpoint."""
    try:
        checkpoint = dequantised(checkpoint)
    except OFTSurgeryError as error:
        return [of_error(error)]
    found = list(examine_weights(checkpoint))
    store = record = None
    with noting(found):
        store = FolderStore(checkpoint)
    with noting(found, RECORD):
        record = record_beside(checkpoint)
    if store is None:
        return found
    return [*found, *_other_shapes(store), *examine_folds(store, record, base, adapter)]


def _open_or_recover(folder: Path, found: list[Finding]) -> Checkpoint | None:
    """The checkpoint, or its readable shards where the index and the shards disagree."""
    index = (layout_of(folder) or LAYOUTS[0]).index
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        readable = _by_its_shards(folder, folder / index, found)
        if readable is None:
            found.append(of_error(error))
        return readable
    if len(checkpoint.files) > 1:
        metadata = read_json(folder / index).get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        held = sum(e.nbytes for e in checkpoint.entries.values())
        if isinstance(stated, (int, float)) and stated != held:
            message = "the total size in the index is not the size of the shards' tensors"
            remedy = f'set "total_size" to {held} in {index}'
            sizes: Numbers = {"stated_bytes": stated, "held_bytes": held}
            found.append(Finding("note", "index-size", message, index, sizes, remedy))
    return checkpoint


def _by_its_shards(folder: Path, index: Path, found: list[Finding]) -> Checkpoint | None:
    """A checkpoint of the tensors in the shards, with a finding on the index; None where the index is not the trouble."""
    try:
        weight_map = read_json(inside(index.parent, index.name)).get("weight_map")
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
            header, _ = read_header(inside(index.parent, file))
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
    message = "the index and its shards disagree: transformers fills missing tensors with random numbers, or cannot load the checkpoint"
    remedy = "download the checkpoint again, or restore the index that belongs to these shards"
    counts = {"shards": len(shards), "tensors_listed": len(weight_map)} | {k: len(v) for k, v in troubles.items()}
    found.append(Finding("error", "index", message, wrong[0], counts, remedy, tuple(wrong[1:])))
    files = tuple(sorted({e.file for e in entries.values()}))
    return Checkpoint(folder, index.parent, entries, files, config, layout=layout_of(folder) or LAYOUTS[0])


def _stray_shards(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Notes on files of weights beside the checkpoint that no index names."""
    message = "the file of weights is not a part of the checkpoint, and nothing reads the file"
    remedy = "remove the file, or restore the index where the index is wrong"
    own = {checkpoint.weights / file for file in checkpoint.files}
    patterns = [layout.shards.format(suffix="*") for layout in LAYOUTS]
    for path in sorted(path for pattern in patterns for path in checkpoint.folder.glob(pattern)):
        if path not in own and path.is_file() and not is_of_variant(path.name):
            yield Finding("note", "stray-shard", message, path.name, {"bytes": path.stat().st_size}, remedy)


def _unread_rope_settings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings that transformers 5 writes in ``rope_parameters`` alone, where transformers 4 does not look."""
    message = "only `rope_parameters` holds the rope settings: transformers 4 ignores this field silently and uses its default settings"
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
            remedy = f"add {add} to config.json; `oftsurgery fold` and `oftsurgery export` write both forms"
            yield Finding("warning", "rope", message, where, numbers, remedy)
        elif nested and "rope_theta" not in part:
            numbers = {f"{printable(k)}.rope_theta": v.get("rope_theta") for k, v in nested.items()}
            remedy = (
                "use transformers ≥ 5 for this checkpoint, or add the fields that transformers 4 reads for its class"
            )
            yield Finding("warning", "rope", message, where, numbers, remedy)


def _other_shapes(store: FolderStore) -> Iterator[Finding]:
    """Errors on plain tensors whose shapes are not the shapes that config.json gives to the model."""
    stated = tensors_in(store.architecture.modules)
    for name, target in store.architecture.renamed.items():
        held = store.entries[name].shape if name in store.entries else ()
        if target not in stated or name in store.architecture.units or store.holds_quantised(name):
            continue
        if held != tuple(stated[target].shape):
            message = "the tensor has another shape than config.json gives to the model, so transformers cannot load the checkpoint"
            numbers: Numbers = {"shape": shape_text(held), "config_says": shape_text(stated[target].shape)}
            remedy = "restore the config.json that was saved with these weights; of another number of tokens, correct `vocab_size`"
            yield Finding("error", "other-shape", message, target, numbers, remedy)


def _default_theta(model_type: object) -> float:
    """``rope_theta`` of a model type's class where the config has none."""
    with suppress(ImportError, KeyError, TypeError):
        from transformers import CONFIG_MAPPING

        return float(getattr(CONFIG_MAPPING[str(model_type)], "default_theta", 10_000.0))
    return 10_000.0


def _stale_config(checkpoint: Checkpoint) -> list[Finding]:
    """Findings where ``quantization_config`` and the stored weights disagree."""
    settings = checkpoint.config.get("quantization_config")
    if settings is not None and not isinstance(settings, Mapping):
        message, remedy = "`quantization_config` is not a JSON object", "restore the config.json of these weights"
        return [Finding("error", "stale-config", message, CONFIG, remedy=remedy)]
    if method_of(settings) not in (None, "bitsandbytes"):
        return []  # the package's tensors are examined with the weights
    kinds = [kind for kind in FORMATS.values() if kind.quantised]
    held = {kind.width: sum(kind.name_part in n for n in checkpoint.entries) for kind in kinds}
    asked = (kind.width for kind in kinds if settings is not None and settings.get(next(iter(kind.config_fields), "")))
    stated = next(asked, None)
    remedy = "restore the config.json that was saved with these weights"
    if settings is not None and not any(held.values()):
        message = "the config says that bitsandbytes quantised the weights, but all weights are plain: from_pretrained fails or quantises the weights"
        remedy = 'remove "quantization_config" from config.json'
    elif settings is None and any(held.values()) and checkpoint.config:
        message = "bitsandbytes quantised the weights, but the config has no `quantization_config`: from_pretrained reads codes as values, or fails"
    elif stated is not None and not held[stated]:
        message = "the config names a quantisation that the weights do not have"
    else:
        return []
    evidence: Numbers = {f"{width}_weights": n for width, n in held.items()} | {"config_says": stated}
    return [Finding("error", "stale-config", message, CONFIG, evidence, remedy)]
