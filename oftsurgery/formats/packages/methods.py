""":data:`METHODS` is the table of the packages whose quantised weights oftsurgery reads, by ``quant_method`` in ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from . import awq, compressed, fp8, gptq, hqq, torchao
from .stored import Entries, Source, Stored

#: function from a checkpoint to ``{name of a weight: the stored weight}``
Finder = Callable[[Source], dict[str, Stored]]

METHODS: Mapping[str, Finder] = MappingProxyType(
    {
        "gptq": gptq.weights,
        "awq": awq.weights,
        "hqq": hqq.weights,
        "compressed-tensors": compressed.weights,
        "torchao": torchao.weights,
        "fp8": fp8.weights,
        "fbgemm_fp8": fp8.weights,
    }
)

#: ``{quant_method: what to do}`` of packages whose weights are not read
REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        "eetq": "eetq dequantises on a GPU alone: fold the plain checkpoint that eetq quantised, which is this model in int8: "
        "format='int8' (--format int8)",
        "aqlm": "aqlm holds codebooks of vectors, and no fold can round to them: dequantise the model on a GPU with "
        "`layer.dequantize()` of the package aqlm, save the model in bf16, and fold this checkpoint",
    }
)


def idle_tensors(method: str, entries: Entries) -> Iterator[str]:
    """Names of tensors that only the package's own kernels need (scales of activations and of the cache)."""
    if method == "compressed-tensors":
        yield from compressed.idle(entries)
    elif METHODS.get(method) is fp8.weights:
        yield from (name for name in entries if name.endswith(fp8.IDLE))
