"""Save a live model, quantised or not, as a safetensors checkpoint that ``from_pretrained`` loads: transformers 5
itself raises on folded bitsandbytes models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import card, codecs, companions, configs, peft_live
from .checkpoint import DENSE, RECORD, Quantization
from .codecs import EncodedWeight, WeightFormat
from .errors import FormatError, StateError
from .layers import Layer, offloaded
from .model import inner_model, modules_of, record_of
from .record import FoldRecord
from .shards import INDEX, SINGLE, ShardWriter
from .staging import Staging

__all__ = ["config_files", "save_model"]

_FORMAT_OF = {dtype: name for name, dtype in DENSE.items()}


@dataclass(frozen=True, eq=False)
class _Item:
    """One parameter or buffer to save: what tensors it becomes, and how to get them."""

    outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]]
    read: Callable[[], Mapping[str, Tensor]]
    nbytes: int


def save_model(
    model: nn.Module, destination: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int, force: bool = False
) -> FoldRecord | None:
    """:func:`oftsurgery.export_safetensors`."""
    model = inner_model(model)
    if peft_live.has_live_layers(model):
        raise StateError(
            "the model carries live peft adapters",
            remedy="fold them first: oftsurgery.export_safetensors(oftsurgery.fold(model), …)",
        )
    if dtype is not None and dtype not in _FORMAT_OF:
        raise StateError(
            f"unknown dtype {dtype}",
            remedy="torch.float32, torch.float16 or torch.bfloat16; None keeps what the model has",
        )
    items = _items(model, dtype)
    groups = _groups(items, max_shard_bytes)
    record = record_of(model)
    if record is not None:
        record = configs.public_record(record)
    metadata = {"format": "pt"} | ({} if record is None else {"oftsurgery": record.header(format=_format(dtype))})
    needed = sum(item.nbytes for item in items)
    plain = config_files(model, dtype)
    with Staging(destination, "live model", needed=needed, resume=False, force=force, resumable=False) as staging:
        for file, group in groups.items():
            _write(staging, file, group, metadata)
        if len(groups) > 1:
            weight_map = {name: file for file, group in groups.items() for item in group for name in item.outputs}
            staging.put_json(
                INDEX, {"metadata": {"total_size": needed}, "weight_map": dict(sorted(weight_map.items()))}
            )
        for name, value in plain.items():
            staging.put_json(name, value)
        text = card.written_card(
            _source(model), record, plain.get("config.json", {}), staging.names(), exact=dtype is None
        )
        if text is not None:
            staging.put_text(card.CARD, text)
        if record is not None:
            record = replace(record, files=staging.hashes(but=configs.NOT_HASHED))
            staging.put_json(RECORD, record.to_dict())
        staging.publish()
    return record


def _write(staging: Staging, file: str, group: list[_Item], metadata: dict[str, str]) -> None:
    with staging.writing(file) as path:
        writer = ShardWriter(path, {name: o for item in group for name, o in item.outputs.items()}, metadata)
        try:
            for item in group:
                for name, tensor in item.read().items():
                    writer.write(name, tensor)
            writer.close()
        except BaseException:
            writer.abort()
            raise


def _format(dtype: torch.dtype | None) -> str:
    return _FORMAT_OF[dtype] if dtype is not None else "same"


def _groups(items: list[_Item], limit: int) -> dict[str, list[_Item]]:
    groups: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, start=1)}


# --- what is saved ----------------------------------------------------------------------------------------------------


def _items(model: nn.Module, dtype: torch.dtype | None) -> list[_Item]:
    names = _file_names(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    seen: dict[int, str] = {}
    items = []
    for path, module in modules_of(model).items():
        for local, tensor in _own_tensors(module).items():
            name = f"{path}.{local}".lstrip(".")
            first = seen.setdefault(id(tensor), name)
            if first != name and name in tied:
                continue  # transformers ties it again as it loads
            items.append(_item(module, path, local, tensor, names(name), dtype))
    return items


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return {n: t for n, t in {**module._parameters, **kept}.items() if t is not None}


def _item(module: nn.Module, path: str, local: str, tensor: Tensor, name: str, dtype: torch.dtype | None) -> _Item:
    layer = Layer(path, module)
    if local == "weight" and layer.quantised:
        _, home = layer.read()
        into = home if dtype is None else WeightFormat("dense", home.shape, dtype)
        outputs = companions.spread_shapes(name, into)
        conv1d = dtype is not None and getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
        if conv1d:
            # bitsandbytes holds GPT-2's weights (out, in), its own class (in, out)
            outputs = {name: (into.dtype, into.shape[::-1])}
        return _Item(outputs, lambda: _read_quantised(layer, name, into, transpose=conv1d), _size(outputs))
    stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if stored not in _SAVEABLE:
        raise FormatError(f"a tensor of {stored} cannot be saved", tensor=name, remedy="convert it first")
    plain = {name: (stored, tuple(tensor.shape))}

    def read() -> dict[str, Tensor]:
        value = offloaded(module, local) if tensor.is_meta else tensor
        return {name: value.detach().to(stored)}

    return _Item(plain, read, _size(plain))


_SAVEABLE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


def _size(outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]]) -> int:
    return sum(d.itemsize * torch.Size(s).numel() if s is not None else 256 for d, s in outputs.values())


def _read_quantised(layer: Layer, name: str, into: WeightFormat, *, transpose: bool) -> Mapping[str, Tensor]:
    encoded, _ = layer.read()
    if into.codec == "dense":
        weight = codecs.encode(codecs.decode(encoded), into).tensors["weight"]
        return {name: weight.t() if transpose else weight}
    return companions.spread(name, EncodedWeight(into, codecs.restate(encoded, into)))


def _file_names(model: nn.Module) -> Callable[[str], str]:
    """How transformers names the tensors of this model in files, where that is not how the model names them."""
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    # how transformers 5 read bitsandbytes' own tensors has no way back, and renames nothing
    found = [t for t in found if not any("bitsandbytes" in type(o).__module__ for o in getattr(t, "operations", ()))]
    back = [t.reverse_transform() for t in found[::-1]]
    renamings = [t for t in back if isinstance(t, WeightRenaming)]
    converters = [t for t in back if isinstance(t, WeightConverter)]

    def name_of(name: str) -> str:
        renamed, pattern = rename_source_key(name, renamings, converters, reverse=True)
        if pattern is not None:
            raise FormatError(
                "transformers splits or merges this tensor when it saves, which is not done here",
                tensor=name,
                remedy="fold the checkpoint on disk instead: oftsurgery.fold_checkpoint",
            )
        return str(renamed)

    return name_of


def _source(model: nn.Module) -> Path | None:
    """The folder that transformers loaded the model from, if it was one."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if isinstance(name, str) and name and os.path.isdir(name) else None  # noqa: PTH112 - any name


# --- the files beside the weights -------------------------------------------------------------------------------------


def config_files(model: nn.Module, dtype: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``generation_config.json`` of a model saved in ``dtype``, none for what has no config."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return {}
    plain = json.loads(config.to_json_string(use_diff=False))
    plain["architectures"] = [type(model).__name__]
    found = next((Layer(p, m) for p, m in modules_of(model).items() if Layer(p, m).quantised), None)
    quantization = None
    if dtype is None and found is not None and not plain.get("quantization_config"):
        quantization = _quantization_of(model, found)
    if dtype is None and found is None:
        plain.pop("quantization_config", None)
    files = {"config.json": configs.output_config(plain, _format(dtype), quantization, untied=False)}
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        files["generation_config.json"] = json.loads(generation.to_json_string())
    return files


def _quantization_of(model: nn.Module, layer: Layer) -> Quantization:
    """The settings with which transformers loads a model whose layers were replaced by hand."""
    home = layer.read()[1]
    plain = tuple(p for p, m in modules_of(model).items() if type(m) is nn.Linear)
    compute = getattr(layer.module, "compute_dtype", None) or torch.float32
    return Quantization(home.codec, bool(home.nested_blocksize), compute, plain)
