"""The names that safetensors, configs and the command line have for dtypes. This file needs no torch; :mod:`~oftsurgery.dtypes`
has torch's dtypes under these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: safetensors' name → torch's name, for every dtype that oftsurgery reads
SAFETENSORS: Mapping[str, str] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "C64": "complex64",
        "U64": "uint64",
        "I64": "int64",
        "U32": "uint32",
        "I32": "int32",
        "U16": "uint16",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
    }
)

#: torch's name → the command line's name of a dense format
SHORT: Mapping[str, str] = MappingProxyType({"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"})


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in configs and records.

    >>> import torch
    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
