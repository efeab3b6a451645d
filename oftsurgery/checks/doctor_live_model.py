""":func:`examine_model` finds what is wrong with the layers of a live model."""

from __future__ import annotations

from typing import Any

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.formats import codecs
from oftsurgery.records.record import versions
from oftsurgery.stores import peft_live
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.modules import distinct, modules_of, tensors_in

from .doctor_adapter import other_releases
from .doctor_folds import examine_folds, is_cpu_packed, large_kernel, plain_paths, quant_state_of
from .doctor_weights import non_finite
from .findings import FOLD, Finding, Model, Numbers, Severity, noting, shape_text


def examine_model(model: nn.Module, base: Model | None, adapter: OFTAdapter | None) -> list[Finding]:
    store = LiveStore(model, plain_paths(model))
    found = [finding for path, module in store.modules.items() for finding in _layer(path, module)]
    return found + _peft_layers(model) + examine_folds(store, store.record, base, adapter)


def _layer(path: str, module: nn.Module) -> list[Finding]:
    found: list[Finding] = []
    for name, tensor in tensors_in({path: module}).items():
        if not tensor.is_meta:
            found += non_finite(name, tensor.detach())
    layer, weight = Layer(path, module), module._parameters.get("weight")
    if weight is None or found or not (layer.bitsandbytes or quant_state_of(module) is not None):
        return found
    with noting(found, path):
        encoded, _ = layer.read()
        wanted: tuple[Any, Any] = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if None not in wanted and encoded.format.shape == wanted[::-1] and wanted[0] != wanted[1]:
            shapes = {"shape": shape_text(encoded.format.shape), "layer": shape_text(wanted)}
            message = "the weight's shape is its layer's, transposed: peft 0.16 to 0.20 merge OFT adapters into bitsandbytes layers so, without a rotation"
            return [Finding("error", "transposed", message, path, shapes, f"load the base again and fold it: {FOLD}")]
        codecs.decode(encoded)  # raises where a value is not finite or the tensors do not fit together
        if is_cpu_packed(module):
            absmax = shape_text(quant_state_of(module).absmax.shape)
            numbers: Numbers = {"weight_shape": shape_text(weight.shape), "absmax_shape": absmax}
            numbers["rounding_of_absmax"] = 2.0**-9
            message = (
                "a CPU eval forward has repacked the weight for this CPU: the layer computes right, but state_dict() and peft's merge give noise, "
                "and the weight's statistics are rounded to bfloat16"
            )
            remedy = "use oftsurgery.fold and export_safetensors, or load the model again and set `module.support_avx512bf16_for_cpu = False`"
            found.append(Finding("warning", "cpu-packed", message, path, numbers, remedy))
    return found


def _peft_layers(model: nn.Module) -> list[Finding]:
    found: list[Finding] = []
    layers: list[tuple[str, Any]] = [
        (path, m)
        for path, m in distinct(modules_of(peft_live.base_of(model))).items()
        if type(m).__module__.startswith("peft.tuners.oft.") and hasattr(m, "merged_adapters")
    ]
    for path, layer in layers:
        inner = layer.get_base_layer()
        if layer.merged_adapters:
            severity: Severity = "note"
            message = "peft has merged its adapter into this layer, so oftsurgery cannot fold the adapter"
            if Layer(path, inner).bitsandbytes:
                severity = "warning"
                message = (
                    "peft has merged its adapter into this bitsandbytes layer: peft 0.16 to 0.20 store the weight transposed and unrotated, 0.21 stores noise "
                    "after a CPU forward, several adapters are merged in the wrong order, and unmerging does not restore the base"
                )
            remedy = "compare with the base: doctor(model, base=…, adapter=…); or load the base again and call oftsurgery.fold"
            numbers = {"merged_adapters": len(layer.merged_adapters), "peft": versions().get("peft")}
            found.append(Finding(severity, "peft-merged", message, path, numbers, remedy))
        if isinstance(inner, nn.Conv2d) and tuple(inner.kernel_size) != (1, 1):
            found.append(large_kernel(path, inner.kernel_size))
    if layers and not found and any(layer.active_adapters and not layer.disable_adapters for _, layer in layers):
        with noting(found):
            for adapter in peft_live.LiveAdapters(model).read():
                found += other_releases(adapter, adapter.source or "")
    return found
