"""The tiled path: the reference's own functions on a few rows at a time, on any device, for what the fused kernels do
not take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oftsurgery import codecs, rotations
from oftsurgery.adapter import Rotation
from oftsurgery.codecs import EncodedWeight, WeightFormat

from .blockwise import Cost

__all__ = ["fold"]

_TILE_WEIGHTS = 1 << 18
_MOST_WEIGHTS = 1 << 22


def fold(
    encoded: EncodedWeight,
    into: WeightFormat,
    ordered: Sequence[tuple[Rotation, Tensor]],
    rounding: str,
    *,
    inverse: bool,
) -> tuple[EncodedWeight, Cost] | None:
    """The reference's result and its cost, with temporaries of a tile's size.

    Args:
        ordered: rotations and their blocks, in the order in which they touch the weight.
        rounding: as for :func:`oftsurgery.codecs.encode`.

    Returns:
        None for a weight of one tile, for blocks that would make tiles too large, and where NaN or infinity came up:
        the reference has the answer, or the error.
    """
    rows, features = encoded.format.shape
    step = _step(encoded.format, into, [r for r, _ in ordered])
    step *= max(1, _TILE_WEIGHTS // (step * features))
    if step >= rows or step * features > _MOST_WEIGHTS:
        return None
    old = _single(encoded)
    starts = range(0, rows, step)

    def exact(start: int) -> tuple[Tensor, Tensor]:
        base = weight = codecs.decode(_rows(old, start, min(start + step, rows)))
        for rotation, blocks in ordered:
            weight = _rotate(weight, rotation, blocks, start, inverse=inverse)
        return base, weight

    new: dict[str, Tensor] = {}
    plain_absmax: list[Tensor] = []
    norm = change = error = nearest = 0.0
    best = rounding != "nearest"
    single = replace(into, nested_blocksize=0, storage=torch.uint8)
    for start in starts:
        base, weight = exact(start)
        norm += _square(weight)
        change += _square(weight - base)
        if not math.isfinite(norm):
            return None
        part = codecs.encode(weight, replace(single, shape=tuple(weight.shape)), rounding)
        if not into.nested_blocksize:
            error += _square(codecs.decode(part).to(weight.dtype) - weight)
            if best:
                plain = codecs.encode(weight, part.format)
                nearest += _square(codecs.decode(plain) - weight)
        elif best:
            plain_absmax.append(codecs.encode(weight, part.format).tensors["absmax"])
        _place(new, part, start, rows, features)
    if into.quantised and into.codec != "int8":
        absmax = new.pop("absmax")
        new |= codecs._encode_absmax(absmax, into)
    if into.nested_blocksize:
        # for the statistics that the reader will see: the error, and with the best scales the codes
        seen = codecs._decode_absmax(EncodedWeight(into, new))
        plain_seen = (
            codecs._decode_absmax(EncodedWeight(into, codecs._encode_absmax(torch.cat(plain_absmax), into)))
            if best
            else None
        )
        for start in starts:
            stop = min(start + step, rows)
            weight = exact(start)[1]
            form = replace(single, shape=tuple(weight.shape))
            own = seen[_slice(start, stop, features, into.blocksize)]
            here = _slice(start, stop, features, 2)
            if plain_seen is not None:
                packed = codecs.scaled_codes(weight.to(torch.float32).reshape(-1), own, form)
                new["weight"][here] = packed
                other = plain_seen[_slice(start, stop, features, into.blocksize)]
                plain_codes = codecs.encode(weight, form).tensors["weight"]
                plain = EncodedWeight(form, {"weight": plain_codes, "absmax": other})
                nearest += _square(codecs.decode(plain) - weight)
            stored = EncodedWeight(form, {"weight": new["weight"][here], "absmax": own})
            error += _square(codecs.decode(stored) - weight)
    if into.codec not in ("dense", "int8"):
        new["weight"] = codecs._as_storage(new["weight"], into)
    error, nearest, norm, change = (math.sqrt(x) for x in (error, nearest if best else error, norm, change))
    return EncodedWeight(into, new), Cost(
        error / (norm or 1.0), nearest / (norm or 1.0), error / change if change else None
    )


def _slice(start: int, stop: int, features: int, size: int) -> slice:
    """Of rows ``start`` to ``stop``, where one entry is of ``size`` weights."""
    return slice(start * features // size, -(-stop * features // size))


def _step(old: WeightFormat, new: WeightFormat, chain: Sequence[Rotation]) -> int:
    """The fewest rows that hold whole bytes, whole 4-bit blocks and, for rotations of the rows themselves, whole
    rotations.
    """
    features = old.shape[1]
    sizes = [f.blocksize for f in (old, new) if f.blocksize]
    step = math.lcm(*(size // math.gcd(features, size) for size in sizes), 2 if sizes and features % 2 else 1)
    return math.lcm(step, *(r.block_size for r in chain if r.side == "output"))


def _single(encoded: EncodedWeight) -> EncodedWeight:
    """With absmax un-nested and packed codes as bytes, which rows can be cut from."""
    f, t = encoded.format, encoded.tensors
    if "absmax" not in t:
        return encoded
    packed = t["weight"].detach().contiguous().reshape(-1).view(torch.uint8)
    absmax = codecs._decode_absmax(encoded)
    codecs._check_4bit(encoded, packed, absmax)
    return EncodedWeight(replace(f, nested_blocksize=0, storage=torch.uint8), {"weight": packed, "absmax": absmax})


def _rows(encoded: EncodedWeight, start: int, stop: int) -> EncodedWeight:
    f, t = encoded.format, encoded.tensors
    features = f.shape[1]
    part = replace(f, shape=(stop - start, features))
    if "absmax" not in t:
        return EncodedWeight(part, {name: tensor[start:stop] for name, tensor in t.items()})
    packed = t["weight"][_slice(start, stop, features, 2)]
    absmax = t["absmax"][_slice(start, stop, features, f.blocksize)]
    return EncodedWeight(part, {"weight": packed, "absmax": absmax})


def _place(new: dict[str, Tensor], part: EncodedWeight, start: int, rows: int, features: int) -> None:
    f = part.format
    four_bit = "absmax" in part.tensors
    for name, tensor in part.tensors.items():
        if name == "quant_map":
            new[name] = tensor
            continue
        weights = {"weight": 2, "absmax": f.blocksize}[name] if four_bit else features
        if name not in new:
            new[name] = tensor.new_empty(-(-rows * features // weights), *tensor.shape[1:])
        first = start * features // weights
        new[name][first : first + tensor.shape[0]] = tensor


def _rotate(weight: Tensor, rotation: Rotation, blocks: Tensor, start: int, *, inverse: bool) -> Tensor:
    scale = rotation.scale
    if scale is not None:
        scale = scale[start : start + weight.shape[0]].to(weight).unsqueeze(-1)
    if rotation.side == "output" and blocks.shape[0] > 1:
        b = rotation.block_size
        blocks = blocks[start // b : -(-(start + weight.shape[0]) // b)]
    if inverse:
        return rotations.unrotate_weight(weight if scale is None else weight / scale, blocks, rotation.side)
    rotated = rotations.rotate_weight(weight, blocks, rotation.side)
    return rotated if scale is None else rotated * scale


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
