"""A quantised weight's tensors under the names that checkpoints give them: the mirror pair :func:`gather` and
:func:`spread`.

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

__all__ = ["companion_names", "gather", "spread", "spread_shapes", "state_name", "unpack_state"]

_QUANT_STATE = ".quant_state.bitsandbytes__"
_PLAIN = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def state_name(weight: str, names: Collection[str]) -> str | None:
    """The name of a 4-bit weight's packed state among ``names``, or None."""
    return next((n for n in (weight + _QUANT_STATE + codec for codec in ("nf4", "fp4")) if n in names), None)


def companion_names(weight: str, names: Collection[str]) -> tuple[str, ...]:
    """All names among ``names`` that belong to ``weight`` (a name that ends in ``weight``), itself first."""
    module = weight.removesuffix("weight")
    candidates = [
        *(f"{weight}.{p}" for p in _PLAIN),
        *(weight + _QUANT_STATE + c for c in ("nf4", "fp4")),
        module + "SCB",
        module + "weight_format",
    ]
    return (weight, *(n for n in candidates if n in names))


def gather(
    weight: str, names: Collection[str], read: Callable[[str], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> EncodedWeight:
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
        return _gather_4bit(weight, state, names, read, shape, dtype)
    if dtype == torch.int8:
        scb = weight.removesuffix("weight") + "SCB"
        if scb not in names:
            raise FormatError(
                "an int8 weight without its SCB statistics",
                tensor=weight,
                format="int8",
                remedy="save the checkpoint again, whole",
            )
        return EncodedWeight(WeightFormat("int8", shape, torch.float16), {"weight": read(weight), "SCB": read(scb)})
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise FormatError(
            f"a weight of {dtype} is stored in a way that oftsurgery does not know",
            tensor=weight,
            remedy="dequantise it first",
        )
    return EncodedWeight(WeightFormat("dense", shape, dtype), {"weight": read(weight)})


def _gather_4bit(
    weight: str,
    state: str,
    names: Collection[str],
    read: Callable[[str], Tensor],
    shape: tuple[int, ...],
    storage: torch.dtype,
) -> EncodedWeight:
    fields = unpack_state(read(state), state)
    codec = str(fields["quant_type"])
    if not state.endswith(codec):
        raise FormatError(
            f"the packed state says {codec}, its name another type", tensor=state, remedy="quantise the model again"
        )
    count = math.prod(fields["shape"])
    if -(-count // 2) != math.prod(shape) * storage.itemsize:
        raise FormatError(
            f"the stored bytes are not those of a weight of {'×'.join(map(str, fields['shape']))}, which its packed state says it is",
            tensor=weight,
            shape=shape,
            format=codec,
            remedy="quantise the model again",
        )
    if len(shape) > 1 and sorted(shape)[-2] != 1:
        raise _cpu_packed(weight, shape, codec)
    missing = [n for n in (f"{weight}.absmax",) if n not in names]
    nested = f"{weight}.nested_absmax" in names
    if nested or "nested_offset" in fields:
        missing += [n for n in (f"{weight}.nested_absmax", f"{weight}.nested_quant_map") if n not in names]
    if missing:
        raise FormatError(
            "a 4-bit weight without its statistics", tensor=missing[0], format=codec, remedy="save it again, whole"
        )
    if nested and ("nested_offset" not in fields or "nested_blocksize" not in fields):
        raise FormatError(
            "the packed state lacks what its nested statistics need",
            tensor=state,
            format=codec,
            remedy="quantise the model again",
        )
    format_ = WeightFormat(
        codec=codec,
        shape=tuple(fields["shape"]),
        dtype=getattr(torch, fields["dtype"]),
        blocksize=fields["blocksize"],
        nested_blocksize=fields["nested_blocksize"] if nested else 0,
        storage=storage,
    )
    tensors = {"weight": read(weight), **{p: read(f"{weight}.{p}") for p in _PLAIN if f"{weight}.{p}" in names}}
    if tensors["absmax"].ndim > 1 and min(tensors["absmax"].shape) > 1:
        raise _cpu_packed(f"{weight}.absmax", tuple(tensors["absmax"].shape), codec)
    if nested:
        tensors["nested_offset"] = torch.tensor(float(fields["nested_offset"]))
    return EncodedWeight(format_, tensors)


def _cpu_packed(tensor: str, shape: tuple[int, ...], codec: str) -> FormatError:
    # bitsandbytes ≥ 0.49: a raw weight is tiled then, and even state_dict() leaves the single absmax (in/blocksize,
    # out), which read flat is noise
    return FormatError(
        "saved in bitsandbytes' packing for CPUs, after an eval forward there: read as a checkpoint it is noise",
        tensor=tensor,
        shape=shape,
        format=codec,
        remedy="start from the base again, with `module.support_avx512bf16_for_cpu = False` on its layers before any CPU forward",
    )


_FIELDS: Mapping[str, type] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_MAX_BLOB = 1 << 12
_BLOCKSIZES = tuple(
    1 << n for n in range(1, 13)
)  # bitsandbytes' own are 32 to 4096; the bound keeps a file from asking for gigabytes of padding


def unpack_state(blob: Tensor, name: str) -> dict[str, Any]:
    """The JSON object in the uint8 tensor ``name``, its fields checked.

    Raises:
        FormatError: no such object, or fields that no bitsandbytes release writes.
    """
    try:
        if blob.dtype != torch.uint8 or blob.numel() > _MAX_BLOB:
            raise ValueError("no blob of JSON")
        fields = json.loads(bytes(blob.numpy()).decode("utf-8"))
        good = isinstance(fields, dict) and all(isinstance(fields[k], t) for k, t in _FIELDS.items())
        good = good and fields["quant_type"] in ("nf4", "fp4") and fields["dtype"] in ("float32", "float16", "bfloat16")
        good = good and fields["shape"] != [] and all(type(n) is int and n > 0 for n in fields["shape"])
        good = good and all(
            type(n) is int and n in _BLOCKSIZES for n in (fields["blocksize"], fields.get("nested_blocksize", 256))
        )
        good = (
            good
            and isinstance(fields.get("nested_offset", 0.0), float)
            and fields.get("nested_dtype", "float32") == "float32"
        )
    except (ValueError, KeyError, RecursionError, TypeError):
        good = False
    if not good:
        raise FormatError(
            "the packed quantisation state is no such thing", tensor=name, remedy="quantise the model again"
        )
    return fields  # type: ignore[no-any-return]


def spread(weight: str, encoded: EncodedWeight) -> dict[str, Tensor]:
    """The tensors of ``encoded`` under their names, byte for byte what bitsandbytes' ``state_dict`` gives."""
    f, t = encoded.format, encoded.tensors
    if f.codec == "dense":
        return {weight: t["weight"]}
    if f.codec == "int8":
        module = weight.removesuffix("weight")
        return {
            weight: t["weight"],
            module + "SCB": t["SCB"],
            module + "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    fields: dict[str, Any] = {
        "quant_type": f.codec,
        "blocksize": f.blocksize,
        "dtype": str(f.dtype).removeprefix("torch."),
        "shape": list(f.shape),
    }
    if f.nested_blocksize:
        fields |= {
            "nested_blocksize": f.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": float(t["nested_offset"]),
        }
    blob = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    return {
        weight: t["weight"],
        **{f"{weight}.{p}": t[p] for p in _PLAIN if p in t},
        weight + _QUANT_STATE + f.codec: blob,
    }


def spread_shapes(weight: str, format_: WeightFormat) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
    """``{name: (dtype, shape)}`` of what :func:`spread` will give; the shape is None where it depends on the values
    (the JSON of a 4-bit state).
    """
    f = format_
    if f.codec == "dense":
        return {weight: (f.dtype, f.shape)}
    if f.codec == "int8":
        module = weight.removesuffix("weight")
        return {
            weight: (torch.int8, f.shape),
            module + "SCB": (torch.float32, f.shape[:1]),
            module + "weight_format": (torch.uint8, ()),
        }
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
