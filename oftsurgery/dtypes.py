"""One table of torch's dtypes under the names of :mod:`~oftsurgery.dtype_names`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from .dtype_names import SAFETENSORS, SHORT, name_of
from .errors import StateError, printable

#: safetensors' name → dtype, for every dtype that oftsurgery reads
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({name: getattr(torch, own) for name, own in SAFETENSORS.items()})
#: dtype → safetensors' name
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

#: dtypes of plain weights
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: dtype → the command line's name of a dense format
FORMAT_OF: Mapping[torch.dtype, str] = MappingProxyType({getattr(torch, own): name for own, name in SHORT.items()})
#: the command line's name of a dense format → dtype
DENSE: Mapping[str, torch.dtype] = MappingProxyType({name: dtype for dtype, name in FORMAT_OF.items()})

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
