"""Content hashes of tensors in memory, by XXH3-128, which is fast enough for every fold. Files have SHA-256 instead."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """``"xxh3:<32 hex digits>"`` of names, dtypes, shapes and bytes; the mapping's order, device and strides have no effect."""
    import xxhash

    h = xxhash.xxh3_128()
    for name in sorted(tensors):
        t = tensors[name].detach()
        h.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        data = t.cpu().contiguous()
        if data.numel():
            h.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return f"xxh3:{h.hexdigest()}"


def hash_bytes(content: bytes) -> str:
    """The hash of bytes, in the form of :func:`hash_tensors`."""
    return hash_tensors({"": torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)})
