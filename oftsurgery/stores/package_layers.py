"""Layers of a live model whose weights another package than bitsandbytes holds quantised are read, and never written. Plain layers with the
weights that the package's own dequantisation gives take their places.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtypes import FLOATS
from oftsurgery.errors import FormatError, module_in_errors
from oftsurgery.formats.packages import awq, compressed
from oftsurgery.formats.packages.methods import REMEDIES
from oftsurgery.formats.packages.stored import Source
from oftsurgery.other_libraries import is_of

from .modules import distinct, modules_of
from .naming import CONV1D_NAMES
from .new_layers import behave_like
from .skeleton import skeleton

_ON_DISK = (
    "load the model with the backend 'torch' of its package, or fold the checkpoint on disk: oftsurgery.fold_checkpoint"
)


def package_of(module: nn.Module) -> str | None:
    """The package that holds the layer's weight quantised; None for other modules."""
    if is_of("hqq", module, "HQQLinear"):
        return "hqq"
    if is_of("gptqmodel", module, "BaseQuantLinear"):
        return "awq" if is_of("gptqmodel", module, "AWQuantLinear") else "gptq"
    if is_of("awq", module, *_AWQ):
        return "awq"
    if is_of("transformers", module, "FP8Linear"):
        weight = module._parameters.get("weight")
        return "fp8" if weight is not None and weight.element_size() == 1 else None
    if isinstance(module, nn.Linear) and is_of("torchao", module._parameters.get("weight"), "TorchAOBaseTensor"):
        return "torchao"
    if is_of("compressed_tensors", getattr(module, "quantization_scheme", None), "QuantizationScheme"):
        return "compressed-tensors" if isinstance(module, nn.Linear) else None
    if is_of("eetq", module, "EetqLinear"):
        return "eetq"
    return "aqlm" if is_of("aqlm", module, "QuantizedLinear") else None


def plain_layers(modules: Mapping[str, nn.Module]) -> dict[int, nn.Module]:
    """``{id of a layer of another package: a plain layer with its dequantised weight}``.

    Raises:
        FormatError: the layer holds its weight in a layout of a kernel, or its package is not read.
    """
    named = getattr(getattr(modules[""], "config", None), "dtype", None)
    dtype = named if isinstance(named, torch.dtype) else torch.bfloat16
    found = {path: module for path, module in distinct(modules).items() if package_of(module) is not None}
    places = {path: path.removesuffix(".base_layer") for path in found}  # peft's live layers hold the base layers
    turned = _conv1d(modules[""], places.values())
    return {id(module): _plain(path, module, dtype, conv1d=places[path] in turned) for path, module in found.items()}


def _conv1d(model: Any, paths: Collection[str]) -> set[str]:
    """The layers that are ``Conv1D`` in the model's own class."""
    if not any(f"{path}.weight".endswith(CONV1D_NAMES) for path in paths) or not hasattr(model, "config"):
        return set()
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    own = skeleton(config, torch.float32, len(paths))
    return set() if own is None else {p for p, m in modules_of(own).items() if type(m).__name__ == "Conv1D"}


def _plain(path: str, module: Any, dtype: torch.dtype, *, conv1d: bool) -> nn.Module:
    with torch.no_grad(), module_in_errors(path):
        weight = _values(module, dtype)
    bias = getattr(module, "bias", None)
    new: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        new, weight = Conv1D(*weight.shape), weight.t().contiguous()
    new.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if isinstance(bias, Tensor):
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    behave_like(module, new)
    return new  # type: ignore[no-any-return]


def _values(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight ``(out, in)``, by the package's own code where the package has such code; ``dtype`` for 8-bit floats, whose layers name
    no dtype.
    """
    package = package_of(module)
    found: Any = None
    if package == "hqq":
        found = module.dequantize()
    elif package == "torchao":
        # torchao itself cannot dequantise its tensors of 4 bits
        with suppress(RuntimeError, NotImplementedError, ValueError):
            found = module.weight.dequantize()
    elif package == "gptq" and is_of("gptqmodel", module, "TorchLinear"):
        found = module.dequantize_weight().t()
    elif package == "awq" and is_of("gptqmodel", module, "AwqTorchLinear", "AwqGEMMLinear"):
        found = _awq(module, "gemm")
    elif package == "awq" and is_of("awq", module, *_AWQ):
        found = _awq(module, next(version for name, version in _AWQ.items() if is_of("awq", module, name)))
    elif package == "compressed-tensors":
        found = _compressed(module)
    elif package == "fp8":
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        found = Fp8Dequantize(None)._dequantize_one(module.weight, module.weight_scale_inv, output_dtype=dtype)
    if found is None:
        remedy = REMEDIES.get(str(package), _ON_DISK)
        message = f"a {type(module).__name__} holds its weight in a layout that oftsurgery does not read"
        raise FormatError(message, format=package, remedy=remedy)
    return found.contiguous()  # type: ignore[no-any-return]


def _compressed(module: Any) -> Tensor:
    """The weight of a layer that compressed-tensors holds compressed, or has decompressed for its first forward."""
    tensors = {f"x.{name}": tensor.detach().cpu() for name, tensor in module.state_dict().items() if name != "bias"}
    weight = tensors.get("x.weight")
    if weight is not None and weight.dtype in FLOATS:
        return module.weight  # type: ignore[no-any-return]
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    args = module.quantization_scheme.weights
    said = {"num_bits": args.num_bits, "block_structure": args.block_structure}
    source = Source(entries, {"config_groups": {"": {"weights": said}}}, torch.bfloat16, tensors.__getitem__)
    stored = compressed.weights(source).get("x.weight")
    if stored is None:
        raise FormatError(
            "the layer holds its weight in a format of compressed-tensors that oftsurgery does not read",
            remedy="load the model with CompressedTensorsConfig(dequantize=True), or run one forward first",
        )
    values = stored.decode({local: tensors[own] for local, own in stored.tensors.items()})
    return values.to(next(iter(module.parameters())).device)


#: ``{AutoAWQ's class: version of its layout}``
_AWQ = {"WQLinear_GEMM": "gemm", "WQLinear_GEMV": "gemv", "WQLinear_GEMVFast": "gemv_fast"}


def _awq(module: Any, version: str) -> Tensor:
    tensors: dict[str, Tensor] = {name: getattr(module, name).cpu() for name in ("qweight", "qzeros", "scales")}
    entries = {f"x.{name}": (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    names = {name: f"x.{name}" for name in tensors}
    weight = awq.LAYOUTS[version](entries, names, module.group_size).decode(tensors)
    return weight.to(module.scales.device)
