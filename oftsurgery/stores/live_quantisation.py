"""What a transformers model in memory says of its quantisation: its config, and attributes that transformers, peft and accelerate read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .configs import bnb_config
from .folder import Quantization
from .layers import Undo
from .modules import inner_model, modules_of
from .new_layers import LayerSettings

#: attributes that transformers sets in models that it loads quantised
_FLAGS = (
    "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable", "is_quantized",
    "quantization_method",
)  # fmt: skip


def settings_in(model: nn.Module) -> Mapping[str, Any]:
    """The config's ``quantization_config`` as plain values; empty without one."""
    found: Any = getattr(getattr(inner_model(model), "config", None), "quantization_config", None)
    values = found.to_dict() if hasattr(found, "to_dict") else found
    return values if isinstance(values, Mapping) else {}


def layer_settings(model: nn.Module, dtype: torch.dtype) -> LayerSettings:
    """The settings of new layers: those of the model's config, or else transformers' own in a model of ``dtype``."""
    return settings_from(settings_in(model), dtype)


def settings_from(said: Mapping[str, Any], dtype: torch.dtype) -> LayerSettings:
    """The settings that a ``quantization_config`` says; ``dtype`` where it names no compute dtype."""
    compute = getattr(torch, str(said.get("bnb_4bit_compute_dtype")), None) if said.get("load_in_4bit") else None
    threshold = said.get("llm_int8_threshold")
    return LayerSettings(
        compute if isinstance(compute, torch.dtype) else dtype,
        float(threshold) if isinstance(threshold, (int, float)) else LayerSettings.threshold,
    )


def state_quantisation(model: nn.Module, quantization: Quantization | None, journal: list[Undo]) -> None:
    """Make a transformers model say that it is quantised as ``quantization`` says, or plain (None)."""
    inner: Any = inner_model(model)
    if not hasattr(getattr(inner, "config", None), "to_json_string"):
        return
    said = settings_in(model)
    held: list[Any] = [getattr(m, "config", None) for m in modules_of(inner).values()]
    configs = {id(config): config for config in held if hasattr(config, "to_json_string")}
    holders = (inner, *configs.values())
    journal.extend(partial(_restore, holder.__dict__, dict(holder.__dict__)) for holder in holders)
    for name in _FLAGS:
        inner.__dict__.pop(name, None)
    for config in configs.values():
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)
        if quantization is not None:
            config._is_quantized = True
    if quantization is not None:
        _say(inner, bnb_config(quantization, said))


def _say(model: Any, settings: Mapping[str, Any]) -> None:
    """Set the attributes that transformers' loading with these settings sets."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    four = bool(settings["load_in_4bit"])
    config = BitsAndBytesConfig.from_dict({k: v for k, v in settings.items() if not k.startswith("_load")})
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    setattr(model, "is_loaded_in_4bit" if four else "is_loaded_in_8bit", True)


def state_dtype(model: nn.Module, dtype: torch.dtype, journal: list[Undo]) -> None:
    """Make the model's config name the dtype of the weights."""
    config: Any = getattr(inner_model(model), "config", None)
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    for part in parts:
        if hasattr(part, "to_json_string") and (part is config or "dtype" in part.__dict__):
            journal.append(partial(_restore, part.__dict__, dict(part.__dict__)))
            part.dtype = dtype


def _restore(attributes: dict[str, Any], before: Mapping[str, Any]) -> None:
    attributes.clear()
    attributes.update(before)
