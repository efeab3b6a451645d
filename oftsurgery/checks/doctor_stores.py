"""A model that :func:`oftsurgery.doctor` looks into, live or in a folder, as a store, and its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from oftsurgery.files import finding as files
from oftsurgery.files.shards import open_checkpoint
from oftsurgery.folding.memory import modules_of
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.stores import peft_live
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.store import Store

from .findings import Model

__all__ = ["is_cpu_packed", "open_store", "plain_paths", "quant_state_of", "weight_at"]


def open_store(base: Model) -> Store:
    if isinstance(base, nn.Module):
        return LiveStore(base, plain_paths(base))
    return FolderStore(open_checkpoint(files.find_checkpoint(base)))


def weight_at(store: Store, path: str) -> EncodedWeight | None:
    """The weight of the module at ``path`` as it is stored; None where there is none."""
    name: str | None = f"{path}.weight"
    if isinstance(store, FolderStore):
        name = store.locate([f"{path}.weight"]).get(f"{path}.weight")
    return None if name is None else store.weight(name, WeightFormat("dense", ()))


def plain_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the paths of the base model: peft's live layers are left out, what they wrap stands in their place."""
    prefix = "base_model.model." if peft_live.base_of(model) is not model else ""
    named = {path.removeprefix(prefix): m for path, m in modules_of(model).items()}
    return {path.removesuffix(".base_layer"): m for path, m in named.items() if f"{path}.base_layer" not in named}


def quant_state_of(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None) or module.__dict__.get("quant_state")


def is_cpu_packed(module: nn.Module) -> bool:
    return bool(getattr(quant_state_of(module), "packing_format_for_cpu", False))
