"""AWQ's layouts, as AutoAWQ writes them: ``w = scale · (code − zero)`` with 4-bit codes and groups of inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .stored import Entries, Source, Stored, check, damaged, groups_of, matrix, scaled, unknown, unpacked

_PACKED = 8  # codes in a word
_SCALES = (torch.float16, torch.bfloat16)


def weights(source: Source) -> dict[str, Stored]:
    """``{name of a weight: the stored weight}``.

    ==============  ===============================  ==============================  ===============================
    ``version``     ``qweight``                      ``qzeros``                      ``scales``
    ==============  ===============================  ==============================  ===============================
    ``gemm``        ``(in, out/8)`` int32            ``(groups, out/8)`` int32       ``(groups, out)``
    ``gemv``        ``(out, in/8)`` int32            ``(out, width)`` int32          ``(out, 8·width)``
    ``gemv_fast``   ``(out/4, in)`` int16            ``(8·width, out)`` −scale·zero  ``(8·width, out)``
    ==============  ===============================  ==============================  ===============================
    """
    version = str(source.settings.get("version") or source.settings.get("format") or "gemm").lower()
    bits = source.settings.get("bits", source.settings.get("w_bit", 4))
    if version not in LAYOUTS:
        unknown("version", version, "awq", f"save the model in one of the layouts {', '.join(LAYOUTS)} with AutoAWQ")
    if bits != 4:
        unknown("bits", bits, "awq", "quantise the model in 4 bits, as AutoAWQ does")
    turned = next((name for name in source.entries if name.endswith(".act.scales")), None)
    if turned is not None:
        damaged("AWQ scales this activation too, and a dense model has no place for the scale", turned, "awq")
    size = source.settings.get("group_size", source.settings.get("q_group_size", 128))
    found = {}
    for path, tensors in groups_of(source.entries, "qweight", ("qzeros", "scales"), "awq"):
        found[f"{path}.weight"] = LAYOUTS[version](source.entries, tensors, size)
    return found


def _group(size: object, inputs: int, name: str) -> int:
    """The inputs of a group; -1 in the config stands for all inputs."""
    group = inputs if size == -1 else size
    if not isinstance(group, int) or group <= 0 or inputs % group:
        damaged(f"{inputs} inputs do not make groups of {size}, as the config says", name, "awq")
    return group


def _gemm(entries: Entries, tensors: Mapping[str, str], size: object) -> Stored:
    inputs, words = matrix(entries, tensors["qweight"], "awq")
    out, group = words * _PACKED, _group(size, inputs, tensors["qweight"])
    label = f"awq, gemm, groups of {group}"
    check(entries, tensors["qweight"], (torch.int32,), (inputs, words), label)
    check(entries, tensors["qzeros"], (torch.int32,), (inputs // group, words), label)
    check(entries, tensors["scales"], _SCALES, (inputs // group, out), label)
    return Stored(tensors, (out, inputs), entries[tensors["scales"]][0], label, partial(_decode_gemm, group=group))


def _decode_gemm(tensors: Mapping[str, Tensor], *, group: int) -> Tensor:
    codes, zeros = (_in_order(tensors[name]) for name in ("qweight", "qzeros"))
    grouped = codes.reshape(-1, group, codes.shape[1])
    return scaled(grouped, zeros.unsqueeze(1), tensors["scales"].unsqueeze(1)).flatten(0, 1).t().contiguous()


def _in_order(packed: Tensor) -> Tensor:
    """The codes ``(rows, 8·words)`` in the order of the outputs; a word holds the even ones of eight first."""
    codes = unpacked(packed, 4, packed.shape[1] * _PACKED)
    return codes.reshape(len(codes), -1, 2, _PACKED // 2).transpose(2, 3).flatten(1)


def _width(inputs: int, group: int) -> int:
    """The words in a row of zeros, which the kernels of the layouts gemv read in wider units for small groups."""
    unit = max(1, 128 // group)
    return math.ceil(math.ceil(inputs // group / _PACKED) / unit) * unit


def _gemv(entries: Entries, tensors: Mapping[str, str], size: object) -> Stored:
    out, words = matrix(entries, tensors["qweight"], "awq")
    inputs = words * _PACKED
    group = _group(size, inputs, tensors["qweight"])
    label, width = f"awq, gemv, groups of {group}", _width(inputs, group)
    check(entries, tensors["qweight"], (torch.int32,), (out, words), label)
    check(entries, tensors["qzeros"], (torch.int32,), (out, width), label)
    check(entries, tensors["scales"], _SCALES, (out, width * _PACKED), label)
    return Stored(tensors, (out, inputs), entries[tensors["scales"]][0], label, partial(_decode_gemv, group=group))


def _decode_gemv(tensors: Mapping[str, Tensor], *, group: int) -> Tensor:
    packed = tensors["qweight"]
    out, inputs = packed.shape[0], packed.shape[1] * _PACKED
    codes = unpacked(packed, 4, inputs).reshape(out, -1, group)
    zeros = unpacked(tensors["qzeros"], 4, inputs // group).unsqueeze(-1)
    return scaled(codes, zeros, tensors["scales"][:, : inputs // group].unsqueeze(-1)).flatten(1)


def _gemv_fast(entries: Entries, tensors: Mapping[str, str], size: object) -> Stored:
    quarter, inputs = matrix(entries, tensors["qweight"], "awq")
    out, group = 4 * quarter, _group(size, inputs, tensors["qweight"])
    label, rows = f"awq, gemv_fast, groups of {group}", _width(inputs, group) * _PACKED
    if inputs % 64:
        damaged("the layout gemv_fast holds inputs in units of 64", tensors["qweight"], label)
    check(entries, tensors["qweight"], (torch.int16,), (quarter, inputs), label)
    check(entries, tensors["qzeros"], _SCALES, (rows, out), label)
    check(entries, tensors["scales"], _SCALES, (rows, out), label)
    decode = partial(_decode_gemv_fast, group=group)
    return Stored(tensors, (out, inputs), entries[tensors["scales"]][0], label, decode)


def _decode_gemv_fast(tensors: Mapping[str, Tensor], *, group: int) -> Tensor:
    """A word of 16 bits holds four neighbours along a row of a matrix ``(4 outputs · 64 inputs)``; in each 32 inputs, the pairs of four
    groups of eight take turns, and each eight has its even places first.
    """
    words = tensors["qweight"].to(torch.int32) & 0xFFFF
    quarter, inputs = words.shape
    codes = torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)], dim=-1).to(torch.int16)
    codes = codes.reshape(quarter, inputs // 64, 4, 64).transpose(1, 2).reshape(4 * quarter, inputs // 32, 4, 2, 4)
    codes = codes.transpose(3, 4)  # (out, 32s, 4, 4, 2): the even places stood before the odd ones
    codes = codes.transpose(2, 3).reshape(4 * quarter, -1, group)
    scales, zeros = (tensors[n][: inputs // group].t().to(torch.float32).unsqueeze(-1) for n in ("scales", "qzeros"))
    return (codes.to(torch.float32) * scales + zeros).to(tensors["scales"].dtype).flatten(1)


LAYOUTS = {"gemm": _gemm, "gemv": _gemv, "gemv_fast": _gemv_fast}
