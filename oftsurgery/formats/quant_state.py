"""bitsandbytes keeps a QuantState with a 4-bit weight. These functions read a state's JSON in a checkpoint, copy a live
state, and undo the layout that a CPU forward gives the weight.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor

from oftsurgery.errors import FormatError

from .encoded_weight import RELOAD
from .levels import LEVELS

QUANTISE_AGAIN = "quantise the model again"


def copy_quant_state(state: Any) -> Any:
    """A new QuantState over the same tensors, because bitsandbytes changes states in place (``to``, CPU packing)."""
    new = copy.copy(state)
    if getattr(new, "state2", None) is not None:
        new.state2 = copy.copy(new.state2)
    return new


def unpack_cpu_layout(weight: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int) -> tuple[Tensor, Tensor]:
    """Undo the layout into which bitsandbytes ≥ 0.49 repacks a 4-bit weight at its first CPU eval forward on
    AVX512-BF16 machines.

    In that layout, rows are tiled by 32, a byte holds the codes of two rows, and absmax is transposed and rounded to bfloat16.
    The codes come back exactly; the rounding of absmax (2⁻⁹ relative) is lost.

    Args:
        weight: ``(out, in/2)`` uint8, tiled.
        absmax: ``(in/blocksize, out)`` bfloat16.
        shape: ``(out, in)``.
        blocksize: size of the 4-bit blocks.

    Returns:
        the packed codes ``(out·in/2, 1)`` uint8 in the checkpoint's layout, and absmax ``(out·in/blocksize,)`` float32.
    """
    rows, columns = shape
    if rows % 32 or columns % blocksize or weight.dtype != torch.uint8 or weight.numel() * 2 != rows * columns:
        message, expected = "the CPU-packed weight is of a shape that bitsandbytes cannot pack", (rows, columns // 2)
        raise FormatError(message, tensor="weight", shape=tuple(weight.shape), expected=expected, remedy=RELOAD)
    tiles = weight.reshape(-1, 32)
    codes = torch.cat([tiles & 15, tiles >> 4], dim=-1).reshape(rows // 32, columns // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax.t().reshape(-1).to(torch.float32)


_MAX_BLOB = 1 << 12

# bitsandbytes' own block sizes are 32 to 4096; the bound keeps a file from asking for gigabytes of padding
_BLOCKSIZES = tuple(1 << n for n in range(1, 13))


def unpack_state(blob: Tensor, name: str) -> dict[str, Any]:
    """The JSON object in the uint8 tensor ``name``, its fields checked.

    Raises:
        FormatError: the tensor holds no JSON object, or has fields that no bitsandbytes release writes.
    """
    try:
        if blob.dtype != torch.uint8 or blob.numel() > _MAX_BLOB:
            raise ValueError("the tensor is no blob of JSON")
        fields = json.loads(bytes(blob.numpy()).decode("utf-8"))
        sizes = (fields["blocksize"], fields.get("nested_blocksize", 256))
        good = (
            fields["quant_type"] in LEVELS
            and fields["dtype"] in ("float32", "float16", "bfloat16")
            and isinstance(fields["shape"], list)
            and fields["shape"] != []
            and all(type(n) is int and n > 0 for n in fields["shape"])
            and all(type(n) is int and n in _BLOCKSIZES for n in sizes)
            and isinstance(fields.get("nested_offset", 0.0), float)
            and fields.get("nested_dtype", "float32") == "float32"
        )
    except (ValueError, KeyError, RecursionError, TypeError):
        good = False
    if not good:
        raise FormatError(
            "the packed quantisation state is not one that bitsandbytes writes", tensor=name, remedy=QUANTISE_AGAIN
        )
    return fields  # type: ignore[no-any-return]
