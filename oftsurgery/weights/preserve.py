"""Rounding that keeps what a rotation did to a weight, without data.

The base's weights v lie on the levels of their format. A small rotation moves each by a fraction of a step, δ = w - v,
and nearest rounding puts nearly all of them back: the error is the adapter itself. Of all roundings q that keep the
projection on the change,

    Σ (q - v) δ = Σ δ²,

the one of least squared error ``Σ (q - w)²`` is, with a Lagrange multiplier λ,

    q = the nearest level to w + λ δ = v + ω δ,    ω = 1 + λ:

the change, over-relaxed by one factor ω, rounded to nearest. ω is 1 where nearest rounding keeps enough.
The blocks keep the base's own scales, so that their unchanged weights stay exactly where they were. docs/rounding.md has
the derivation and what was measured.

Pure functions of tensors, the readable reference. ω is 2^(k/2048), k an integer, so that all backends agree on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oftsurgery.adapters.rotation import Rotation
from oftsurgery.formats.base import in_blocks
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat

#: ω is 2 ** (k / STEPS) for a k from 0 to MOST
STEPS = 2048
MOST = 16 * STEPS
#: a block is strong where the rotation moves its weights by more than its format says (``Format.strong_change``: their root mean
#: square, in units of the scale; about half a step between the levels near zero): there nearest rounding keeps 96 to 98 %
#: of the change, and a scale that fits the rotated block errs less
#: … or where its largest weight exceeds the base's scale by more than this factor
CLIP = 1.1
#: the most weights that ω is found from, about: of larger ones, some rows of each part
SAMPLE = 1 << 19
#: the rows of a sample come in units of so many
ROWS = 16
#: the least number of units, however wide the rows
_FEWEST = 8
#: double quantisation's statistics of the base may not hold the scale that a strong block should have: its largest weights
#: are clipped then. Where one is clipped by more than this, the whole weight is rounded with statistics of its own.
MISFIT = 0.25


def applies(base: WeightFormat, into: WeightFormat) -> bool:
    """Whether the scales of ``base`` can be kept in ``into``, double quantisation aside."""
    return into.quantised and (base.codec, base.blocksize, base.shape) == (into.codec, into.blocksize, into.shape)


def relaxation_of(steps: int) -> float:
    """ω of a number of steps."""
    return math.pow(2.0, steps / STEPS)


# --- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of a weight's blocks, and which others its statistics can hold.

    Attributes:
        values: ``(blocks,)`` float32, as the reader sees them: of int8, one a row.
        codes: ``(blocks,)`` uint8 that stand for them with double quantisation, else None.
        nested: ``nested_quant_map`` ``(256,)``, what a code is before it is scaled, ``nested_absmax`` ``(⌈blocks/size⌉,)``,
            what that is scaled by, and ``nested_offset`` ``()``, what is added; empty without double quantisation.
        size: blocks an entry of ``nested_absmax``.
    """

    values: Tensor
    codes: Tensor | None
    nested: Mapping[str, Tensor]
    size: int

    def in_order(self) -> tuple[Tensor, Tensor]:
        """The table in order, and the code of each of its values."""
        table = self.nested["nested_quant_map"]
        order = torch.argsort(table, stable=True)
        return table[order].to(torch.float32).contiguous(), order

    def nearest(self, wanted: Tensor, block: Tensor) -> tuple[Tensor | None, Tensor]:
        """Codes and values of the scales nearest to ``wanted`` that blocks number ``block`` can have, both ``(n,)``."""
        if not self.nested:
            return None, wanted
        ordered, order = self.in_order()
        offset = self.nested["nested_offset"].to(torch.float32)
        factor = self.nested["nested_absmax"].reshape(-1)[block // self.size].to(torch.float32)
        scaled = torch.where(factor != 0, (wanted - offset) / factor, 0.0)
        at = torch.bucketize(scaled, (ordered[1:] + ordered[:-1]) / 2)
        return order[at].to(torch.uint8), ordered[at] * factor + offset


def scales_of(encoded: EncodedWeight, into: WeightFormat, values: Tensor | None = None) -> Scales:
    """The :class:`Scales` of a quantised weight that is to be stored as ``into``; ``values`` where they are known already.

    Where ``into`` has double quantisation and the weight has not (a CPU forward of bitsandbytes drops it), the scales are
    quantised anew. They differ from the base's by some thousandths then, which is little beside a step.
    """
    same = encoded.format.nested_blocksize == into.nested_blocksize
    restated = encoded if same else into.kind.change_storage(encoded, into)
    t, values = restated.tensors, restated.scales if values is None or not same else values
    if not into.nested_blocksize:
        return Scales(values, None, {}, 0)
    nested = {name: t[name] for name in ("nested_quant_map", "nested_absmax", "nested_offset")}
    return Scales(values, t["absmax"].reshape(-1), nested, into.nested_blocksize)


def put_scales(own: Scales, into: WeightFormat, stated: Tensor) -> dict[str, Tensor]:
    """The statistics of ``own`` with other scales, or codes of scales: tensors under their local names."""
    return {into.kind.scales_name: stated, **{name: tensor.detach().clone() for name, tensor in own.nested.items()}}


# --- the relaxation ---------------------------------------------------------------------------------------------------


def sample_of(rows: int, features: int, unit: int) -> list[tuple[int, int]]:
    """Ranges of rows from which ω is found: all of a small weight, else a unit of each of as many parts, at places in
    them that follow no period (rows of attention heads do).

    Args:
        unit: rows that are only taken together; a multiple of :data:`ROWS` of them is.
    """
    unit = math.lcm(unit, ROWS)
    units = -(-rows // unit)
    apart = max(1, min(rows * features // SAMPLE, units // _FEWEST))
    golden = (math.sqrt(5) - 1) / 2
    chosen = (start + int(start // apart * golden % 1 * min(apart, units - start)) for start in range(0, units, apart))
    return [(i * unit, min(i * unit + unit, rows)) for i in chosen]


def limits(f: WeightFormat) -> tuple[float, float]:
    """(the largest mean square of δ, the largest |w|) of a weak block, in units of its scale."""
    return f.kind.strong_change**2, CLIP


def span(start: int, stop: int, features: int, size: int) -> slice:
    """Of rows ``start`` to ``stop``, where one entry is of ``size`` weights."""
    return slice(start * features // size, -(-stop * features // size))


def whole_rows(f: WeightFormat, chain: Sequence[Rotation] = ()) -> int:
    """The fewest rows that hold whole bytes, whole 4-bit blocks and, for rotations of the rows, whole rotations."""
    features = f.shape[1]
    rows = f.blocksize // math.gcd(features, f.blocksize) if f.blocksize else 1
    rows = math.lcm(rows, 2 if f.blocksize and features % 2 else 1)
    return math.lcm(rows, *(r.block_size for r in chain if r.side == "output"))


def is_strong(base: Tensor, exact: Tensor, scales: Tensor, n: int, f: WeightFormat) -> Tensor:
    """Which blocks are to be scaled anew and rounded to nearest: ``(blocks,)`` bool.

    Args:
        base, exact: ``(blocks, blocksize)`` float32, padded with zeros.
        scales: ``(blocks,)``.
        n: weights without the padding.
        f: of the weight.
    """
    square, most = limits(f)
    count = torch.full(scales.shape, float(base.shape[1]), device=scales.device)
    count[-1] -= base.numel() - n
    unit = scales.abs().clamp(min=1e-38)
    moved = ((exact - base) / unit.unsqueeze(-1)).square().sum(-1)
    strong = (moved > square * count) | (exact.abs().amax(-1) > most * scales.abs())
    return strong if f.kind.either_sign else strong | (scales < 0)


def relaxation(
    rows_of: Callable[[int, int], tuple[Tensor, Tensor]], own: Scales, f: WeightFormat, chain: Sequence[Rotation] = ()
) -> int | None:
    """The steps of the ω that keeps the change of the weak blocks of a sample; None where most of its blocks are strong.

    Each evaluation takes the nearest levels of the whole sample, as the encoding does.

    Args:
        rows_of: gives ``(base, exact)``, both ``(rows, in)`` float32, of a range of rows.
        own: the scales of the whole weight.
        f: of the weight.
        chain: what rotates it.
    """
    values, moves, powers = [], [], []
    strong_blocks = blocks = 0
    for start, stop in sample_of(f.shape[0], f.shape[1], whole_rows(f, chain)):
        base, exact = rows_of(start, stop)
        scales = own.values[span(start, stop, f.shape[1], f.block)]
        v, w = in_blocks(base.reshape(-1), f.block), in_blocks(exact.reshape(-1), f.block)
        strong = is_strong(v, w, scales, base.numel(), f)
        strong_blocks, blocks = strong_blocks + int(strong.sum()), blocks + strong.numel()
        weak = ~strong & (scales != 0)
        s = scales[weak].unsqueeze(-1)
        values.append(v[weak] / s)
        moves.append((w[weak] - v[weak]) / s)
        powers.append(s.to(torch.float64).square().expand_as(values[-1]))
    if 2 * strong_blocks > blocks:
        return None
    v, d, power = (torch.cat([x.reshape(-1) for x in parts_]) for parts_ in (values, moves, powers))
    weight = d.to(torch.float64) * power
    need = float((weight * d).sum())
    if not need > 0:
        return 0

    def kept(steps: int) -> float:
        levels = f.kind.nearest_levels(v + d * relaxation_of(steps))
        return float((weight * (levels - v)).sum()) / need

    return solve(lambda steps: [kept(k) for k in steps])


def solve(kept: Callable[[Sequence[int]], Sequence[float]]) -> int:
    """The k from 0 to MOST for which ``kept``, which grows with k, is nearest to 1, or 0 where it is more there.

    Args:
        kept: gives its values for several k at once.
    """
    low, at_low, high, at_high = -1, 0.0, MOST + 1, 1.0

    def evaluate(points: Sequence[int]) -> None:
        nonlocal low, at_low, high, at_high
        for k, at in zip(points, kept(points), strict=True):
            if at >= 1:
                high, at_high = k, at
                return
            low, at_low = k, at

    octaves = range(0, MOST + 1, STEPS)
    while high > MOST and low < MOST:  # ω = 1, 2, 4, 8, …
        evaluate(octaves[(low + 1) // STEPS + (low >= 0) :][:4])
    if high == 0 or low == MOST:
        return max(low, 0)
    while high - low > 1:  # where a straight line from low to high would be 1, and on either side
        near = low + round((1 - at_low) / (at_high - at_low) * (high - low))
        aside = max(1, (high - low) // 32)
        between = [k for k in (near - aside, near, near + aside) if low < k < high]
        evaluate(between or [(low + high) // 2])
    return low if 1 - at_low <= abs(at_high - 1) else high


# --- the codes --------------------------------------------------------------------------------------------------------


def encode_rows(
    base: Tensor, exact: Tensor, scales: Scales, first: int, steps: int, f: WeightFormat
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Some rows of a weight with the change in their weak blocks over-relaxed, and their strong blocks scaled anew.

    Args:
        base, exact: ``(rows, in)``, whole blocks.
        scales: of the whole weight, ``first`` the number of the first of these rows' blocks.
        steps: of ω.
        f: of these rows, double quantisation left out.

    Returns:
        the stored codes (packed, or int8), what stands for the scales of these rows' blocks (codes of them with double
        quantisation), and those scales; None where the base's statistics would clip a strong block.
    """
    size, n = f.block, base.numel()
    v, w = in_blocks(base.reshape(-1), size), in_blocks(exact.reshape(-1), size)
    here = slice(first, first + v.shape[0])
    seen = scales.values[here].clone()
    stated = seen if scales.codes is None else scales.codes[here].clone()
    strong = is_strong(v, w, seen, n, f)
    at = strong.nonzero().squeeze(-1)
    if at.numel():
        wanted = f.kind.good_scales(w[at])
        codes, seen[at] = scales.nearest(wanted, first + at)
        # the best scale may itself clip, or be larger than the largest weight; beside the other blocks' scales, what a
        # block of nearly zeros loses is nothing
        needed = torch.minimum(wanted, w[at].abs().amax(-1)) - seen[at].abs()
        usual = seen[at].abs().clamp(min=float(scales.nested.get("nested_offset", 0.0)))
        if bool((needed > MISFIT * usual).any()):
            return None
        if codes is not None:
            stated[at] = codes
    factor = torch.where(strong, 1.0, relaxation_of(steps)).unsqueeze(-1)
    target = torch.where(strong.unsqueeze(-1), w, v + (w - v) * factor).reshape(-1)[:n].to(torch.float32)
    return f.kind.codes_at(target, seen, f), stated, seen


def stored_as(f: WeightFormat, codes: Tensor, scales: Tensor) -> EncodedWeight:
    """Codes and the scales of their blocks as a weight without double quantisation."""
    return EncodedWeight(f, {"weight": codes, f.kind.scales_name: scales})
