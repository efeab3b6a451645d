"""The tiled path: the reference's own functions on a few rows at a time, on any device, for weights that the fused kernels
do not take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.weights import preserve

from .blockwise import Fold, FoldedWeight, Sums

_TILE_WEIGHTS = 1 << 18
_MOST_WEIGHTS = 1 << 22


def fold(
    encoded: EncodedWeight,
    into: WeightFormat,
    ordered: Sequence[tuple[Rotation, Tensor]],
    rounding: str,
    *,
    inverse: bool,
) -> FoldedWeight | None:
    """The reference's result and its cost, with temporaries of a tile's size.

    Args:
        ordered: rotations and their blocks, in the order in which they touch the weight.
        rounding, inverse: as for :func:`oftsurgery.weights.kernels.fold`.

    Returns:
        the weight; None for a weight of one tile, for blocks that would make tiles too large, and after NaN or infinity:
        the reference then gives the answer, or the error.
    """
    rows, features = encoded.format.shape
    chain = [r for r, _ in ordered]
    step = math.lcm(preserve.whole_rows(encoded.format, chain), preserve.whole_rows(into))
    step *= max(1, _TILE_WEIGHTS // (step * features))
    if step >= rows or step * features > _MOST_WEIGHTS:
        return None
    return _Fold(encoded, into, ordered, step, inverse).run(rounding)


@dataclass(eq=False)
class _Fold(Fold):
    """One fold of a weight, some rows at a time."""

    ordered: Sequence[tuple[Rotation, Tensor]]
    step: int
    inverse: bool

    def __post_init__(self) -> None:
        self.old, self.sums = self.encoded.single(), Sums()
        self.rows, self.features = self.encoded.format.shape

    def exact(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of the weight before and after the rotation."""
        base = weight = codecs.decode(rows_of(self.old, (start, stop)))
        for rotation, blocks in self.ordered:
            weight = _rotate(weight, rotation, blocks, start, inverse=self.inverse)
        return base, weight

    def _tiles(self) -> Iterator[tuple[int, int]]:
        return ((start, min(start + self.step, self.rows)) for start in range(0, self.rows, self.step))

    def _form(self, weight: Tensor) -> WeightFormat:
        return replace(self.into.single, shape=(weight.shape[0], weight.shape[1]))

    def _measure(self, base: Tensor, weight: Tensor) -> None:
        self.sums.norm += _square(weight)
        self.sums.change += _square(weight - base)
        self.finite = self.finite and math.isfinite(self.sums.norm)

    def _store(self, base: Tensor, weight: Tensor, part: EncodedWeight) -> None:
        miss = codecs.decode(part).to(weight.dtype) - weight
        self.sums.error += _square(miss)
        self.sums.held += float((miss.to(torch.float64) * (weight - base)).sum())

    def _sample(self, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        base, weight = (torch.cat(rows) for rows in zip(*(self.exact(*r) for r in ranges), strict=True))
        self.finite = self.finite and math.isfinite(_square(weight))
        return base, weight

    def keep(self) -> FoldedWeight | None:
        into, own = self.into, preserve.scales_of(self.encoded, self.into)
        steps = preserve.relaxation(self._sample, own, into, [r for r, _ in self.ordered])
        if steps is None:
            return None
        new: dict[str, Tensor] = {}
        scales = torch.empty_like(own.values if own.codes is None else own.codes)
        for start, stop in self._tiles():
            base, weight = self.exact(start, stop)
            self._measure(base, weight)
            here = preserve.span(start, stop, self.features, into.block)
            form = self._form(weight)
            stored = preserve.encode_rows(base, weight, own, here.start, steps, form) if self.finite else None
            if stored is None:
                return None
            codes, scales[here], seen = stored
            part = preserve.stored_as(form, codes, seen)
            self._store(base, weight, part)
            _place(new, part, start, self.rows)
        statistics = preserve.put_scales(own, into, scales)
        folded = into.kind.assemble(into, new["weight"], statistics)
        return self.sums.folded(folded, "preserve", preserve.relaxation_of(steps))

    def round(self, rounding: str) -> FoldedWeight | None:
        self.sums, nearest_error = Sums(), 0.0
        new: dict[str, Tensor] = {}
        plain: list[Tensor] = []
        best, into, kind = rounding != "nearest", self.into, self.into.kind
        for start, stop in self._tiles():
            base, weight = self.exact(start, stop)
            self._measure(base, weight)
            if not self.finite:
                return None
            part = codecs.encode(weight, self._form(weight), rounding)
            if not into.nested_blocksize:
                self._store(base, weight, part)
            if best:
                nearest = codecs.encode(weight, part.format)
                if into.nested_blocksize:
                    plain.append(nearest.tensors[kind.scales_name])
                else:
                    nearest_error += _square(codecs.decode(nearest) - weight)
            _place(new, part, start, self.rows)
        codes = new.pop("weight")
        statistics = kind.statistics(new[kind.scales_name], into) if into.quantised else {}
        if into.nested_blocksize:
            # the error is that with the statistics that a reader will see
            seen = EncodedWeight(into, statistics).scales
            plain_seen = EncodedWeight(into, kind.statistics(torch.cat(plain), into)).scales if best else None
            for start, stop in self._tiles():
                nearest_error += self._nested(codes, seen, plain_seen, start, stop)
        self.sums.nearest = nearest_error if best else self.sums.error
        return self.sums.folded(kind.assemble(into, codes, statistics), rounding)

    def _nested(self, codes: Tensor, seen: Tensor, plain_seen: Tensor | None, start: int, stop: int) -> float:
        """Compute the rows' error with double quantisation's scales. Returns the squared error of plain rounding with the scales
        of plain rounding.
        """
        base, weight = self.exact(start, stop)
        form = self._form(weight)
        kind, nearest = form.kind, 0.0
        of, here = (preserve.span(start, stop, self.features, size) for size in (form.block, kind.codes_per_element))
        if plain_seen is not None:
            plain = preserve.stored_as(form, codecs.encode(weight, form).tensors["weight"], plain_seen[of])
            nearest = _square(codecs.decode(plain) - weight)
        self._store(base, weight, preserve.stored_as(form, codes[here], seen[of]))
        return nearest


def rows_of(encoded: EncodedWeight, *ranges: tuple[int, int]) -> EncodedWeight:
    """Some ranges of rows of a weight from :meth:`EncodedWeight.single`, one after the other."""
    features = encoded.format.shape[1]
    f = replace(encoded.format, shape=(sum(stop - start for start, stop in ranges), features))

    def rows(tensor: Tensor, weights: int) -> Tensor:
        parts = [tensor[preserve.span(start, stop, features, weights)] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return EncodedWeight(f, {n: rows(encoded.tensors[n], k) for n, k in f.kind.weights_per_entry(f).items()})


def _place(new: dict[str, Tensor], part: EncodedWeight, start: int, rows: int) -> None:
    """Put the tensors of the rows from ``start`` on into the tensors of all ``rows``, without tensors that weights share."""
    features = part.format.shape[1]
    for name, weights in part.format.kind.weights_per_entry(part.format).items():
        tensor = part.tensors[name]
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
    if scale is not None and inverse:
        weight = weight / scale
    rotated = rotations.rotate_weight(weight, blocks, rotation.side, inverse=inverse)
    return rotated if scale is None or inverse else rotated * scale


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
