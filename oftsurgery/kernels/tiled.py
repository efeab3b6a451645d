"""The tiled path: the reference's own functions on a few rows at a time, on any device, for what the fused kernels do
not take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oftsurgery import codecs, preserve, rotations
from oftsurgery.adapter import Rotation
from oftsurgery.codecs import EncodedWeight, WeightFormat

from .blockwise import Cost, Sums

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
        rounding, inverse: as for :func:`oftsurgery.kernels.fold`.

    Returns:
        None for a weight of one tile, for blocks that would make tiles too large, and where NaN or infinity came up:
        the reference has the answer, or the error.
    """
    rows, features = encoded.format.shape
    chain = [r for r, _ in ordered]
    step = math.lcm(preserve.whole_rows(encoded.format, chain), preserve.whole_rows(into))
    step *= max(1, _TILE_WEIGHTS // (step * features))
    if step >= rows or step * features > _MOST_WEIGHTS:
        return None
    run = _Fold(_single(encoded), into, ordered, step, inverse=inverse)
    if rounding == "preserve":
        if preserve.applies(encoded.format, into):
            kept = run.keep(encoded)
            if kept is not None or not run.finite:
                return kept
        rounding = codecs.rounding_of(into, "grid")
    return run.round(rounding)


class _Fold:
    """One fold of a weight, some rows at a time."""

    def __init__(
        self,
        old: EncodedWeight,
        into: WeightFormat,
        ordered: Sequence[tuple[Rotation, Tensor]],
        step: int,
        *,
        inverse: bool,
    ) -> None:
        self.old, self.into, self.ordered, self.step, self.inverse = old, into, ordered, step, inverse
        self.rows, self.features = old.format.shape
        self.single = replace(into, nested_blocksize=0, storage=torch.uint8)
        self.finite = True
        self.norm = self.error = self.nearest = self.change = self.held = 0.0

    def exact(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of the weight before and after the rotation."""
        base = weight = codecs.decode(_rows(self.old, start, stop))
        for rotation, blocks in self.ordered:
            weight = _rotate(weight, rotation, blocks, start, inverse=self.inverse)
        return base, weight

    def _tiles(self) -> Iterator[tuple[int, int]]:
        return ((start, min(start + self.step, self.rows)) for start in range(0, self.rows, self.step))

    def _form(self, weight: Tensor) -> WeightFormat:
        return replace(self.single, shape=(weight.shape[0], weight.shape[1]))

    def _measure(self, base: Tensor, weight: Tensor) -> None:
        self.norm += _square(weight)
        self.change += _square(weight - base)
        self.finite = self.finite and math.isfinite(self.norm)

    def _store(self, base: Tensor, weight: Tensor, part: EncodedWeight) -> None:
        miss = codecs.decode(part).to(weight.dtype) - weight
        self.error += _square(miss)
        self.held += float((miss.to(torch.float64) * (weight - base)).sum())

    def _done(
        self, new: dict[str, Tensor], rounding: str, nearest: float | None, relaxation: float = 1.0
    ) -> tuple[EncodedWeight, Cost]:
        if self.into.blocksize:
            new["weight"] = codecs.as_storage(new["weight"], self.into)
        sums = Sums(self.norm, self.error, nearest, self.change, self.held)
        return EncodedWeight(self.into, new), sums.cost(self.into, rounding, relaxation)

    def keep(self, encoded: EncodedWeight) -> tuple[EncodedWeight, Cost] | None:
        """The base's own scales, and the change over-relaxed: see :mod:`oftsurgery.preserve`."""
        into, own = self.into, preserve.scales_of(encoded, self.into)
        size = into.blocksize or self.features
        unit = preserve.whole_rows(into, [r for r, _ in self.ordered])
        parts = []
        for start, stop in preserve.sample_of(self.rows, self.features, unit):
            base, weight = self.exact(start, stop)
            parts.append((base, weight, own.values[_slice(start, stop, self.features, size)]))
        if not all(math.isfinite(_square(weight)) for _, weight, _ in parts):
            self.finite = False
            return None
        steps = preserve.relaxation(parts, into)
        if steps is None:
            return None
        new: dict[str, Tensor] = {}
        scales = torch.empty_like(own.values if own.codes is None else own.codes)
        for start, stop in self._tiles():
            base, weight = self.exact(start, stop)
            self._measure(base, weight)
            here = _slice(start, stop, self.features, size)
            form = self._form(weight)
            stored = preserve.encode_rows(base, weight, own, here.start, steps, form) if self.finite else None
            if stored is None:
                return None
            codes, scales[here], seen = stored
            part = preserve.stored_as(form, codes, seen)
            self._store(base, weight, part)
            _place(new, part, start, self.rows, self.features)
        if into.blocksize:
            new["quant_map"] = codecs.levels_of(into.codec, scales.device).clone()
        new |= preserve.put_scales(own, into, scales)
        return self._done(new, "preserve", None, preserve.relaxation_of(steps))

    def round(self, rounding: str) -> tuple[EncodedWeight, Cost] | None:
        """Every block scaled by its own values."""
        self.norm = self.error = self.nearest = self.change = self.held = 0.0
        new: dict[str, Tensor] = {}
        plain_absmax: list[Tensor] = []
        best, into, features = rounding != "nearest", self.into, self.features
        for start, stop in self._tiles():
            base, weight = self.exact(start, stop)
            self._measure(base, weight)
            if not self.finite:
                return None
            part = codecs.encode(weight, self._form(weight), rounding)
            if not into.nested_blocksize:
                self._store(base, weight, part)
                if best:
                    self.nearest += _square(codecs.decode(codecs.encode(weight, part.format)) - weight)
            elif best:
                plain_absmax.append(codecs.encode(weight, part.format).tensors["absmax"])
            _place(new, part, start, self.rows, features)
        if into.blocksize:
            new |= codecs.encode_absmax(new.pop("absmax"), into)
        if into.nested_blocksize:
            # for the statistics that the reader will see: the error, and with the best scales the codes
            seen = codecs.decode_absmax(EncodedWeight(into, new))
            plain_seen = None
            if best:
                plain = codecs.encode_absmax(torch.cat(plain_absmax), into)
                plain_seen = codecs.decode_absmax(EncodedWeight(into, plain))
            for start, stop in self._tiles():
                self._nested(new, seen, plain_seen, start, stop)
        return self._done(new, rounding, self.nearest if best else self.error)

    def _nested(self, new: dict[str, Tensor], seen: Tensor, plain_seen: Tensor | None, start: int, stop: int) -> None:
        """The rows' codes and error with double quantisation's scales."""
        base, weight = self.exact(start, stop)
        form = self._form(weight)
        of, here = _slice(start, stop, self.features, form.blocksize), _slice(start, stop, self.features, 2)
        if plain_seen is not None:
            new["weight"][here] = codecs.scaled_codes(weight.to(torch.float32).reshape(-1), seen[of], form)
            plain = preserve.stored_as(form, codecs.encode(weight, form).tensors["weight"], plain_seen[of])
            self.nearest += _square(codecs.decode(plain) - weight)
        self._store(base, weight, preserve.stored_as(form, new["weight"][here], seen[of]))


def _slice(start: int, stop: int, features: int, size: int) -> slice:
    """Of rows ``start`` to ``stop``, where one entry is of ``size`` weights."""
    return slice(start * features // size, -(-stop * features // size))


def _single(encoded: EncodedWeight) -> EncodedWeight:
    """With absmax un-nested and packed codes as bytes, which rows can be cut from."""
    f, t = encoded.format, encoded.tensors
    if "absmax" not in t:
        return encoded
    packed = t["weight"].detach().contiguous().reshape(-1).view(torch.uint8)
    absmax = codecs.decode_absmax(encoded)
    codecs.check_4bit(encoded, packed, absmax)
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
