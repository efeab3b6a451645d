"""torchao's layouts, as transformers saves them in safetensors: the header says of each weight which class of tensor holds it, and
``module._weight_qdata``, ``module._weight_scale`` … are the parts of the tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .fp8 import CODES
from .stored import Entries, Shape, Source, Stored, check, damaged, unknown

#: ``{class of tensor: (dtypes of the codes, parts beside the codes)}``
_CLASSES: Mapping[str, tuple[tuple[torch.dtype, ...], tuple[str, ...]]] = {
    "Int8Tensor": ((torch.int8,), ("scale", "zero_point")),
    "IntxUnpackedToInt8Tensor": ((torch.int8,), ("scale", "zero_point")),
    "Float8Tensor": (CODES, ("scale",)),
}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_REMEDY = (
    "quantise the model with Int8WeightOnlyConfig, Float8WeightOnlyConfig or IntxWeightOnlyConfig: torchao holds the codes of other configs "
    "in the order of a kernel, or cannot dequantise them"
)


def weights(source: Source) -> dict[str, Stored]:
    """``{name of a weight: the stored weight}``."""
    found = {}
    for name, text in source.metadata.items():
        facts = _facts(text)
        if facts is None or facts.get("_type") == "Tensor":
            continue
        kind = str(facts.get("_type"))
        if kind not in _CLASSES:
            unknown("tensor class", kind, "torchao", _REMEDY)
        found[name] = _stored(source.entries, name, kind, facts)
    return found


def _facts(text: str) -> Mapping[str, Any] | None:
    """The JSON object of a tensor in the header; None for other texts."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "_type" in found else None


def _stored(entries: Entries, name: str, kind: str, facts: Mapping[str, Any]) -> Stored:
    path, _, local = name.rpartition(".")
    codes, beside = _CLASSES[kind]
    data, parts = facts.get("_data"), facts.get("_tensor_data_names")
    if not isinstance(data, dict) or not isinstance(parts, list) or not {"qdata", "scale"} <= {*map(str, parts)}:
        damaged("the header does not say how the weight is stored", name, "torchao")
    more = next((str(part) for part in parts if part not in ("qdata", *beside)), None)
    if more is not None:
        unknown("part of a weight", more, "torchao", _REMEDY)
    tensors = {str(part): f"{path}._{local}_{part}" for part in parts}
    lost = next((own for own in tensors.values() if own not in entries), None)
    if lost is not None:
        damaged("a tensor of the quantised weight is missing", lost, "torchao")
    said = data.get("dtype")
    dtype = _DTYPES.get(str(said.get("_data") if isinstance(said, dict) else None))
    block, shape = data.get("block_size"), entries[tensors["qdata"]][1]
    fits = isinstance(block, list) and len(block) == len(shape) and all(type(n) is int and n > 0 for n in block)
    if dtype is None or not fits or any(n % b for n, b in zip(shape, block or (), strict=False)):
        damaged("the header does not say the dtype and the blocks of the weight", name, "torchao")
    grid = tuple(n // b for n, b in zip(shape, block or (), strict=True))
    check(entries, tensors["qdata"], codes, shape, kind)
    for part in beside:
        if part in tensors and math.prod(entries[tensors[part]][1]) != math.prod(grid):
            damaged(
                "the tensor does not fit the blocks",
                tensors[part],
                kind,
                shape=entries[tensors[part]][1],
                expected=grid,
            )
    label = f"torchao, {kind}, blocks of {' × '.join(map(str, block or ()))}"
    decode = partial(_decode, dtype=dtype, grid=grid, float8=kind == "Float8Tensor")
    return Stored(tensors, shape, dtype, label, decode)


def _decode(tensors: Mapping[str, Tensor], *, dtype: torch.dtype, grid: Shape, float8: bool) -> Tensor:
    """torchao computes with integers in the weight's own dtype and rounds again after the scale; with 8-bit floats in float32."""
    codes, zero = tensors["qdata"], tensors.get("zero_point")
    sizes = [n for whole, parts in zip(codes.shape, grid, strict=True) for n in (parts, whole // parts)]
    ones = [n for parts in grid for n in (parts, 1)]
    steps = codes.to(torch.float32 if float8 else dtype).reshape(sizes)
    if zero is not None:
        steps = steps - zero.to(steps.dtype).reshape(ones)
    return (steps * tensors["scale"].reshape(ones)).to(dtype).reshape(codes.shape)
