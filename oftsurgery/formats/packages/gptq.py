"""GPTQ's layout, as AutoGPTQ, GPTQModel and optimum write it: ``w = scales[g] · (code − zero[g])`` with the group g of an input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .stored import Entries, Settings, Source, Stored, by_groups, check, damaged, groups_of, matrix, unknown, unpacked

_BITS = (2, 3, 4, 8)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def weights(source: Source) -> dict[str, Stored]:
    """``{name of a weight: the stored weight}``.

    The tensors of a linear with ``i`` inputs and ``o`` outputs are ``qweight (i·bits/32, o)`` and
    ``qzeros (groups, o·bits/32)`` int32, ``scales (groups, o)``, and ``g_idx (i,)``, the group of each input. Files of the
    first version (``checkpoint_format: gptq``, and files without this field) hold the zeros less one.
    """
    version = source.settings.get("checkpoint_format") or source.settings.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        unknown("checkpoint_format", version, "gptq", "save the model in the format gptq or gptq_v2 with GPTQModel")
    found = {}
    for path, tensors in groups_of(source.entries, "qweight", ("qzeros", "scales"), "gptq"):
        index = f"{path}.g_idx"
        if index in source.entries:
            tensors["g_idx"] = index
        found[f"{path}.weight"] = _stored(source.entries, tensors, source.settings, first=version == "gptq")
    return found


def _stored(entries: Entries, tensors: Mapping[str, str], settings: Settings, *, first: bool) -> Stored:
    (words, out), said = matrix(entries, tensors["qweight"], "gptq"), settings.get("bits")
    groups, _ = matrix(entries, tensors["scales"], "gptq")
    inputs = words * 32 // (said if said in _BITS else 4)
    if "g_idx" in tensors:
        inputs = math.prod(entries[tensors["g_idx"]][1])
    # `dynamic` gives modules other bits than the config's
    bits = next((b for b in _BITS if -(-inputs * b // 32) == words), None)
    if bits is None or (bits != said and not settings.get("dynamic")):
        damaged(f"the codes are not stored in {said} bits, as the config says", tensors["qweight"], "gptq")
    said = settings.get("group_size", -1)
    size = said if type(said) is int and said > 0 else inputs
    label = f"gptq, {bits} bits"
    check(entries, tensors["qweight"], (torch.int32,), (-(-inputs * bits // 32), out), label)
    check(entries, tensors["scales"], _SCALES, (groups, out), label)
    check(entries, tensors["qzeros"], (torch.int32,), (groups, -(-out * bits // 32)), label)
    if "g_idx" in tensors:
        check(entries, tensors["g_idx"], (torch.int32, torch.int64), (inputs,), label)
    elif settings.get("desc_act") or groups != -(-inputs // size):
        damaged("the group of each input is missing", tensors["qweight"].removesuffix("qweight") + "g_idx", label)
    label += f", groups of {size}"
    decode = partial(_decode, bits=bits, inputs=inputs, size=size, name=tensors["qweight"], first=first)
    return Stored(tensors, (out, inputs), entries[tensors["scales"]][0], label, decode)


def _decode(tensors: Mapping[str, Tensor], *, bits: int, inputs: int, size: int, name: str, first: bool) -> Tensor:
    scales = tensors["scales"]  # (groups, out)
    out = scales.shape[1]
    codes = unpacked(tensors["qweight"].t().contiguous(), bits, inputs)  # (out, in)
    zeros = _zeros(tensors["qzeros"], bits, out, first=first)
    index = name.removesuffix("qweight") + "g_idx"
    return by_groups(codes, zeros.t(), scales.t(), tensors.get("g_idx"), size, index)


def _zeros(packed: Tensor, bits: int, out: int, *, first: bool) -> Tensor:
    """The zeros ``(groups, out)`` int16. GPTQModel adds the first version's one to the packed words, where a carry goes into the next
    code; with 3 bits, whose codes straddle words, the package adds one to each code.
    """
    if first and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        packed = ((packed.to(torch.int64) + ones + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)
    zeros = unpacked(packed, bits, out).to(torch.int16)
    return (zeros + 1) % 8 if first and bits == 3 else zeros
