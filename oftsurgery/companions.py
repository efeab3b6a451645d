"""A quantised weight's tensors under the names that checkpoints give them: the mirror pair :func:`gather` and :func:`spread`.

======  =======================================================================================================================
codec   names behind ``<module>.``
======  =======================================================================================================================
dense   ``weight``
4-bit   ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4|fp4`` (JSON in a uint8 tensor), and with
        double quantisation ``weight.nested_absmax``, ``weight.nested_quant_map``
int8    ``weight``, ``SCB``, ``weight_format``
======  =======================================================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .codecs import EncodedWeight, WeightFormat
from .errors import FormatError

__all__ = ["companion_names", "gather", "spread", "spread_shapes", "state_name"]

_QUANT_STATE = ".quant_state.bitsandbytes__"
_PLAIN = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def state_name(weight: str, names: Collection[str]) -> str | None:
    """The name of a 4-bit weight's packed state among ``names``, or None."""
    return next((n for n in (weight + _QUANT_STATE + codec for codec in ("nf4", "fp4")) if n in names), None)


def companion_names(weight: str, names: Collection[str]) -> tuple[str, ...]:
    """All names among ``names`` that belong to ``weight`` (a name that ends in ``weight``), itself first."""
    module = weight.removesuffix("weight")
    candidates = [*(f"{weight}.{p}" for p in _PLAIN), *(weight + _QUANT_STATE + c for c in ("nf4", "fp4")), module + "SCB", module + "weight_format"]
    return (weight, *(n for n in candidates if n in names))


def gather(weight: str, names: Collection[str], read: Callable[[str], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> EncodedWeight:
    """The stored weight from its tensors.

    Args:
        weight: its name.
        names: of all tensors there are.
        read: gives the tensor of a name.
        shape, dtype: of the tensor ``weight`` as stored.

    Raises:
        FormatError: companions are missing or say nonsense.
    """
    state = state_name(weight, names)
    if state is not None:
        return _gather_4bit(weight, state, names, read, dtype)
    if dtype == torch.int8:
        scb = weight.removesuffix("weight") + "SCB"
        if scb not in names:
            raise FormatError("an int8 weight without its SCB statistics", tensor=weight, format="int8", remedy="save the checkpoint again, whole")
        return EncodedWeight(WeightFormat("int8", shape, torch.float16), {"weight": read(weight), "SCB": read(scb)})
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise FormatError(f"a weight of {dtype} is stored in a way that oftsurgery does not know", tensor=weight, remedy="dequantise it first")
    return EncodedWeight(WeightFormat("dense", shape, dtype), {"weight": read(weight)})


def _gather_4bit(weight: str, state: str, names: Collection[str], read: Callable[[str], Tensor], storage: torch.dtype) -> EncodedWeight:
    fields = _unpack(read(state), state)
    missing = [n for n in (f"{weight}.absmax",) if n not in names]
    nested = f"{weight}.nested_absmax" in names
    if nested or "nested_offset" in fields:
        missing += [n for n in (f"{weight}.nested_absmax", f"{weight}.nested_quant_map") if n not in names]
    if missing:
        raise FormatError("a 4-bit weight without its statistics", tensor=missing[0], format=str(fields["quant_type"]), remedy="save it again, whole")
    format_ = WeightFormat(
        codec=fields["quant_type"],
        shape=tuple(fields["shape"]),
        dtype=getattr(torch, fields["dtype"]),
        blocksize=fields["blocksize"],
        nested_blocksize=fields["nested_blocksize"] if nested else 0,
        storage=storage,
    )
    tensors = {"weight": read(weight), **{p: read(f"{weight}.{p}") for p in _PLAIN if f"{weight}.{p}" in names}}
    if nested:
        tensors["nested_offset"] = torch.tensor(float(fields["nested_offset"]))
    return EncodedWeight(format_, tensors)


_FIELDS: Mapping[str, type] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}


def _unpack(blob: Tensor, name: str) -> dict[str, Any]:
    """The JSON object in a uint8 tensor, its fields checked."""
    try:
        fields = json.loads(bytes(blob.numpy()).decode("utf-8"))
        good = isinstance(fields, dict) and all(isinstance(fields[k], t) for k, t in _FIELDS.items())
        good = good and fields["quant_type"] in ("nf4", "fp4") and fields["dtype"] in ("float32", "float16", "bfloat16")
        good = good and all(isinstance(n, int) and n > 0 for n in fields["shape"]) and fields["blocksize"] > 1
        good = good and ("nested_offset" not in fields or isinstance(fields["nested_offset"], float))
        good = good and isinstance(fields.get("nested_blocksize", 256), int) and fields.get("nested_blocksize", 256) > 1
    except (ValueError, KeyError, RecursionError, TypeError):
        good = False
    if not good:
        raise FormatError("the packed quantisation state is no such thing", tensor=name, remedy="quantise the model again")
    return fields  # type: ignore[no-any-return]


def spread(weight: str, encoded: EncodedWeight) -> dict[str, Tensor]:
    """The tensors of ``encoded`` under their names, byte for byte what bitsandbytes' ``state_dict`` gives."""
    f, t = encoded.format, encoded.tensors
    if f.codec == "dense":
        return {weight: t["weight"]}
    if f.codec == "int8":
        module = weight.removesuffix("weight")
        return {weight: t["weight"], module + "SCB": t["SCB"], module + "weight_format": torch.tensor(0, dtype=torch.uint8)}
    fields: dict[str, Any] = {"quant_type": f.codec, "blocksize": f.blocksize, "dtype": str(f.dtype).removeprefix("torch."), "shape": list(f.shape)}
    if f.nested_blocksize:
        fields |= {"nested_blocksize": f.nested_blocksize, "nested_dtype": "float32", "nested_offset": float(t["nested_offset"])}
    blob = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    return {weight: t["weight"], **{f"{weight}.{p}": t[p] for p in _PLAIN if p in t}, weight + _QUANT_STATE + f.codec: blob}


def spread_shapes(weight: str, format_: WeightFormat) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
    """``{name: (dtype, shape)}`` of what :func:`spread` will give; the shape is None where it depends on the values (the JSON of a 4-bit state)."""
    f = format_
    if f.codec == "dense":
        return {weight: (f.dtype, f.shape)}
    if f.codec == "int8":
        module = weight.removesuffix("weight")
        return {weight: (torch.int8, f.shape), module + "SCB": (torch.float32, f.shape[:1]), module + "weight_format": (torch.uint8, ())}
    n = math.prod(f.shape)
    blocks = -(-n // f.blocksize)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
        weight: (f.storage, (-(-n // 2) // f.storage.itemsize, 1)),
        f"{weight}.absmax": (torch.uint8 if f.nested_blocksize else torch.float32, (blocks,)),
        f"{weight}.quant_map": (torch.float32, (16,)),
        weight + _QUANT_STATE + f.codec: (torch.uint8, None),
    }
    if f.nested_blocksize:
        shapes |= {
            f"{weight}.nested_absmax": (torch.float32, (-(-blocks // f.nested_blocksize),)),
            f"{weight}.nested_quant_map": (torch.float32, (256,)),
        }
    return shapes
