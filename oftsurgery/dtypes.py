"""One table of the names that torch, safetensors, configs and the command line have for dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from .errors import StateError, printable

#: safetensors' name → dtype, for every dtype that oftsurgery reads
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "C64": torch.complex64,
        "U64": torch.uint64,
        "I64": torch.int64,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U16": torch.uint16,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
)
#: dtype → safetensors' name
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

#: dtypes of plain weights
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: the command line's name of a dense format → dtype
DENSE: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)
#: dtype → the command line's name of a dense format
FORMAT_OF: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DENSE.items()})


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in configs and records.

    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


#: torch's name → dtype, for every dtype in which a tensor can be saved
NAMED: Mapping[str, torch.dtype] = MappingProxyType(
    {
        name_of(DTYPES[name]): DTYPES[name]
        for name in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
    }
)


def float_dtype(name: str) -> torch.dtype:
    """The dtype of a dense format, from the dtype's name.

    Raises:
        StateError: ``name`` is not float32, float16 or bfloat16.
    """
    dtype = NAMED.get(name)
    if dtype is None or dtype not in FORMAT_OF:
        raise StateError(f"unknown dtype {printable(name)!r}", remedy="use float32, float16 or bfloat16")
    return dtype
