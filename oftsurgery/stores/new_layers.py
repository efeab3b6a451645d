"""A layer of another class takes the place of a layer whose class cannot hold the new format of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oftsurgery.errors import FormatError, needs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat

from .layers import Layer, hooks_of
from .model_copy import compile_like

#: parts of the names under which torch keeps the hooks of a module's calls
_CALLS = ("_forward_", "_backward_")


@dataclass(frozen=True)
class LayerSettings:
    """Settings of bitsandbytes' layers that no weight states.

    Attributes:
        compute_dtype: of 4-bit layers.
        threshold: of 8-bit layers; transformers' own is 6.
    """

    compute_dtype: torch.dtype = torch.float32
    threshold: float = 6.0


def holds(layer: Layer, f: WeightFormat) -> bool:
    """Whether the layer's class holds weights in the format ``f``."""
    return f.kind.holds_module(layer.module) if f.quantised else not layer.quantised


def layer_with(layer: Layer, encoded: EncodedWeight, settings: LayerSettings) -> nn.Module:
    """A layer that holds ``encoded``, with the bias, the hooks and the training flag of ``layer``.

    Raises:
        FormatError: the layer is a quantised embedding, which takes another quantised format.
    """
    old: Any = layer.module
    source = getattr(old, "source_cls", type(old))
    conv1d = source.__name__ == "Conv1D" and source.__module__.startswith("transformers.")
    new: Any = _empty(layer, encoded.format, settings, conv1d=conv1d)
    if encoded.format.quantised:
        new._parameters["weight"] = encoded.format.kind.parameter_of(encoded, new.weight, new)
        if hasattr(new, "quant_state"):
            new.quant_state = new.weight.quant_state
        new.source_cls = source
    else:
        weight = encoded.tensors["weight"]
        weight = weight.t().contiguous() if conv1d else weight
        new._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if "bias" in old._parameters:
        new._parameters["bias"] = old._parameters["bias"]
    behave_like(old, new)
    return new  # type: ignore[no-any-return]


def _empty(layer: Layer, f: WeightFormat, settings: LayerSettings, *, conv1d: bool) -> nn.Module:
    """A layer without values for a weight in ``f``."""
    if layer.kind == "embedding":
        if f.quantised:
            message = "an embedding of bitsandbytes keeps its format or becomes plain"
            raise FormatError(
                message, module=layer.path, format=f.label, remedy="choose format='bf16', 'fp16' or 'fp32'"
            )
        old: Any = layer.module
        kept: Any = {
            n: getattr(old, n) for n in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        }
        return nn.Embedding(f.shape[0], f.shape[1], device="meta", dtype=f.dtype, **kept)
    if conv1d and not f.quantised:
        with needs("transformers", "pip install 'oftsurgery[peft]'"):
            from transformers.pytorch_utils import Conv1D
        with torch.device("meta"):
            return Conv1D(*f.shape)  # type: ignore[no-any-return]
    return f.kind.new_linear(f, settings.compute_dtype, settings.threshold)


def behave_like(old: Any, new: Any) -> None:
    """Give ``new`` the training flag, the hooks (accelerate's too) and the compilation of ``old``."""
    new.training = old.training
    new.__dict__ |= {n: h for n, h in old.__dict__.items() if any(part in n for part in _CALLS)}
    hook = getattr(old, "_hf_hook", None)
    if hook is not None and any(h is not None for h in hooks_of(old)):
        from accelerate.hooks import add_hook_to_module

        held, new._parameters = new._parameters, {}  # the hook would move parameters, which are in their places
        add_hook_to_module(new, hook)
        new._parameters = held
    if old._compiled_call_impl is not None:
        compile_like(old, new)
