"""Save a live model, quantised or not, as a safetensors checkpoint that ``from_pretrained`` loads: transformers 5
itself raises on folded bitsandbytes models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtypes import FORMAT_OF, NAMED
from oftsurgery.errors import GATHER_MODEL, FormatError, SourceWarning, StateError, not_gathered, printable, warn_caller
from oftsurgery.files.finding import loaded_commit
from oftsurgery.files.layout import CONFIG, layout_for
from oftsurgery.files.staging import Staging
from oftsurgery.formats import codecs
from oftsurgery.formats.checkpoint_tensors import checkpoint_shapes
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import public_place, public_record
from oftsurgery.stores import configs
from oftsurgery.stores.conversion import Saving
from oftsurgery.stores.folder import Quantization
from oftsurgery.stores.image_models import is_of_diffusers
from oftsurgery.stores.layers import Layer, offloaded
from oftsurgery.stores.live_model import record_of
from oftsurgery.stores.modules import inner_model, modules_of
from oftsurgery.stores.quantised_loading import loadable_config
from oftsurgery.stores.ties import ties_of

from .beside import beside_model
from .folder_writer import Item, Outputs, into_shards, nbytes_of, write_other_files, write_shard
from .target import LiveFormat


def save_model(
    model: nn.Module,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int,
    tokenizer: Any = None,
    force: bool = False,
) -> FoldRecord | None:
    """:func:`oftsurgery.export_safetensors`."""
    model = inner_model(model)
    items = _items(model, dtype)
    jsons = config_files(model, dtype)
    layout = layout_for(jsons.get(CONFIG, {}))
    shards = into_shards([item.outputs for item in items], max_shard_bytes, layout)
    own, home = record_of(model), source_of(model)
    record = None if own is None else public_record(own)
    metadata = {"format": "pt"} | ({} if record is None else {"oftsurgery": record.header(format=format_named(dtype))})
    needed = sum(nbytes_of(item.outputs) for item in items)
    if CONFIG in jsons:
        written = {name: output for item in items for name, output in item.outputs.items()}
        jsons[CONFIG] = loadable_config(jsons[CONFIG], written)
    with (
        beside_model(home, own, tokenizer, getattr(model, "config", None)) as carried,
        Staging(destination, "live model", needed=needed, resume=False, force=force, resumable=False) as staging,
    ):
        for shard in shards:
            write_shard(staging, shard.file, [items[i] for i in shard.items], metadata)
            staging.finish(shard.file, {})
        files = [shard.file for shard in shards]
        record = write_other_files(
            staging,
            files,
            record,
            source=home,
            jsons=jsons,
            carried=carried,
            exact=dtype is None and not _converted_by(own),
            layout=layout,
        )
        staging.publish()
    return record


def format_named(dtype: torch.dtype | None) -> LiveFormat:
    """The format of an export in ``dtype``: ``"same"`` for None.

    Raises:
        StateError: the dtype is of no format.
    """
    if dtype is not None and dtype not in FORMAT_OF:
        raise StateError(
            f"the dtype {dtype} is not one of {', '.join(map(str, FORMAT_OF))}",
            remedy="choose one of these dtypes, or None to keep the model's formats",
        )
    found: Any = "same" if dtype is None else FORMAT_OF[dtype]
    return found  # type: ignore[no-any-return]


def _converted_by(record: FoldRecord | None) -> bool:
    """Whether the fold has changed formats."""
    return record is not None and "format" in record.base


# --- what is saved ----------------------------------------------------------------------------------------------------


def _items(model: nn.Module, dtype: torch.dtype | None) -> list[Item]:
    saving = Saving(model)
    ties = ties_of(model)
    items, seen = [], set()
    together: dict[str, list[Item]] = {}
    split_up = set()
    for path, module in modules_of(model).items():
        for local, tensor in _own_tensors(module).items():
            name = f"{path}.{local}".lstrip(".")
            again = id(tensor) in seen  # transformers ties it again as it loads
            seen.add(id(tensor))
            if again and ties.flag and name in ties.flagged:
                continue
            unit = saving.unit(name)
            if unit is None:
                items.append(_item(module, path, local, tensor, saving.name(name), dtype))
            else:
                together.setdefault(unit, []).append(_item(module, path, local, tensor, name, dtype))
                if dtype is None and local == "weight" and Layer(path, module).quantised:
                    split_up.add(unit)
    for unit, members in together.items():
        # a tensor that transformers converts cannot hold a quantised weight; transformers also loads by the model's names
        items += members if unit in split_up else [_converted(saving, members)]
    return items


def _converted(saving: Saving, members: Sequence[Item]) -> Item:
    """One item of tensors that transformers converts when it saves."""
    plain = {name: output for item in members for name, output in item.outputs.items()}
    dtype = next(iter(plain.values()))[0]
    found = saving.store({n: torch.empty(shape or (), dtype=dtype, device="meta") for n, (_, shape) in plain.items()})
    outputs = {name: (dtype, tuple(t.shape)) for name, t in found.items()}

    def read() -> dict[str, Tensor]:
        return saving.store({name: t for item in members for name, t in item.load().items()})

    return _item_of(members[0].name, outputs, read)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return {n: t for n, t in {**module._parameters, **kept}.items() if t is not None}


def _item(module: nn.Module, path: str, local: str, tensor: Tensor, name: str, dtype: torch.dtype | None) -> Item:
    layer = Layer(path, module)
    if tensor.numel() == 0 and local in ("weight", "bias"):
        raise not_gathered(StateError, "the model's tensor", GATHER_MODEL, tensor=name)
    if local == "weight" and layer.quantised:
        _, home = layer.read()
        into = home if dtype is None else WeightFormat("dense", home.shape, dtype)
        outputs = checkpoint_shapes(name, into)
        conv1d = dtype is not None and getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
        if conv1d:
            # bitsandbytes holds GPT-2's weights (out, in), and GPT-2's own class holds them (in, out)
            outputs = {name: (into.dtype, into.shape[::-1])}
        return _item_of(name, outputs, lambda: _read_quantised(layer, name, into, transpose=conv1d))
    stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if stored not in NAMED.values():
        message = f"a tensor of {stored} cannot be saved as safetensors"
        raise FormatError(message, tensor=name, remedy="convert the tensor to another dtype first")
    plain = {name: (stored, tuple(tensor.shape))}

    def read() -> dict[str, Tensor]:
        value = offloaded(module, local) if tensor.is_meta else tensor
        return {name: value.detach().to(stored)}

    return _item_of(name, plain, read)


def _item_of(name: str, outputs: Outputs, read: Callable[[], Mapping[str, Tensor]]) -> Item:
    return Item(name, outputs, nbytes_of(outputs), read, lambda made: made)


def _read_quantised(layer: Layer, name: str, into: WeightFormat, *, transpose: bool) -> Mapping[str, Tensor]:
    encoded, _ = layer.read()
    if not into.quantised:
        weight = codecs.encode(codecs.decode(encoded), into).tensors["weight"]
        return {name: weight.t() if transpose else weight}
    return into.kind.to_checkpoint(name, into.kind.change_storage(encoded, into))


def source_of(model: nn.Module) -> Path | None:
    """The folder that transformers loaded the model from: a local folder or the Hub's cache; None where it is unknown."""
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    if os.path.isdir(name):  # noqa: PTH112 - any name
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        commit = loaded_commit(config, name)
        found = try_to_load_from_cache(name, CONFIG, revision=commit)
    except HFValidationError:
        return None
    if commit is None and isinstance(found, str):
        warn_caller(
            f"the Hub's cache holds several commits of {printable(name)}, and transformers does not say which commit the model was loaded "
            "from; the files beside the weights come from the main branch. Load the model from a local folder to get the files of "
            "another revision: huggingface_hub.snapshot_download(…, revision=…)",
            SourceWarning,
        )
    return Path(found).parent if isinstance(found, str) else None


# --- the files beside the weights -------------------------------------------------------------------------------------


def config_files(model: nn.Module, dtype: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``generation_config.json`` of a model saved in ``dtype``; empty for a model without a config."""
    plain = _plain_config(model)
    if not plain:
        return {}
    if plain.get("_name_or_path"):
        plain["_name_or_path"] = public_place(plain["_name_or_path"])
    found = next((Layer(p, m) for p, m in modules_of(model).items() if Layer(p, m).quantised), None)
    quantization = None
    if dtype is None and found is not None and not plain.get("quantization_config"):
        quantization = _quantization_of(model, found)
    if dtype is None and found is None:
        plain.pop("quantization_config", None)
    files = {"config.json": configs.output_config(plain, format_named(dtype), quantization, untied=False)}
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        files["generation_config.json"] = json.loads(generation.to_json_string())
    return files


def _plain_config(model: Any) -> dict[str, Any]:
    """The model's config as JSON holds it; empty for a model without a config of transformers or diffusers."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return {**plain, "architectures": [type(model).__name__]}
    if hasattr(model, "to_json_string") and hasattr(model, "config_name"):  # of diffusers
        found: dict[str, Any] = json.loads(model.to_json_string())
        return found if is_of_diffusers(found) else {}
    return {}


def _quantization_of(model: nn.Module, layer: Layer) -> Quantization:
    """The settings with which transformers loads a model whose layers were replaced by hand."""
    home = layer.read()[1]
    plain = tuple(p for p, m in modules_of(model).items() if type(m) is nn.Linear)
    compute = getattr(layer.module, "compute_dtype", None) or torch.float32
    return Quantization(home.codec, bool(home.nested_blocksize), compute, plain)
