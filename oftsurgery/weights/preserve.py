"""Rounding that keeps a rotation's change of a weight, without calibration data.

The base's weights v lie on the levels of their format. A small rotation moves each weight by a fraction of a step,
δ = w - v, and nearest rounding puts nearly all weights back: the error is then the adapter itself. Of all roundings q
that keep the projection on the change,

    Σ (q - v) δ = Σ δ²,

the rounding of least squared error ``Σ (q - w)²`` is, with a Lagrange multiplier λ,

    q = the nearest level to w + λ δ = v + ω δ,    ω = 1 + λ:

so the change is over-relaxed by one factor ω and rounded to nearest. ω is 1 if nearest rounding keeps enough.
The blocks keep the base's own scales, so that their unchanged weights stay exactly where they were. docs/rounding.md has
the derivation and the measurements.

The functions are pure, and the readable reference. ω is 2^(k/2048) with an integer k, so that all backends agree on ω.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.formats.base import in_blocks
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.packages.package_format import OfPackage
from oftsurgery.formats.packages.stored import Grid

#: ω is 2 ** (k / STEPS) for a k from 0 to MOST
STEPS = 2048
MOST = 16 * STEPS
#: a block is strong if the rotation moves its weights by more than ``Format.strong_change`` (root mean square, in units of
#: the scale; about half a step between the levels near zero): nearest rounding then keeps 96 to 98 % of the change, and a
#: scale that fits the rotated block errs less. A block is also strong if its largest weight exceeds the base's scale by
#: more than this factor
CLIP = 1.1
#: about the largest number of weights from which ω is found; of a larger weight, some rows of each part are taken
SAMPLE = 1 << 19
#: the same where the sample gives an ω beyond 2 ** (WEAK / STEPS): the smaller the change, the fewer weights leave their levels, and
#: the more weights it takes for some hundred that do
LARGE_SAMPLE, WEAK = 1 << 22, 4 * STEPS
#: the rows of a sample come in units of this number
ROWS = 16
#: the largest rotation of rows for which some rows at a time are rotated
MOST_ROWS = 64
#: the least number of units, however wide the rows
_FEWEST = 8
#: the base's statistics of double quantisation may not hold the scale that a strong block should have, so that the block's
#: largest weights are clipped. If any is clipped by more than this part, the whole weight gets statistics of its own.
MISFIT = 0.25


def applies(base: WeightFormat, into: WeightFormat) -> bool:
    """Whether the scales of ``base`` can be kept in ``into``, double quantisation aside."""
    return into.quantised and (base.codec, base.blocksize, base.shape) == (into.codec, into.blocksize, into.shape)


def relaxation_of(steps: int) -> float:
    """The ω of a number of steps."""
    return math.pow(2.0, steps / STEPS)


# --- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of a weight's blocks, and the other scales that its statistics can hold.

    Attributes:
        values: the scales, ``(blocks,)`` float32, as a reader sees them; for int8, one per row.
        codes: the scales' codes of double quantisation, ``(blocks,)`` uint8, else None.
        nested: ``nested_quant_map`` ``(256,)``, the value of each code, ``nested_absmax`` ``(⌈blocks/size⌉,)``, the factor
            of these values, and ``nested_offset`` ``()``, which is added; empty without double quantisation.
        size: blocks per entry of ``nested_absmax``.
    """

    values: Tensor
    codes: Tensor | None
    nested: Mapping[str, Tensor]
    size: int

    def in_order(self) -> tuple[Tensor, Tensor]:
        """The table in ascending order, and the code of each of its values."""
        table = self.nested["nested_quant_map"]
        order = torch.argsort(table, stable=True)
        return table[order].to(torch.float32).contiguous(), order

    def nearest(self, wanted: Tensor, block: Tensor) -> tuple[Tensor | None, Tensor]:
        """Codes and values, ``(n,)``, of the scales nearest to ``wanted`` that the blocks with numbers ``block`` can have."""
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

    If ``into`` has double quantisation and the weight does not (a CPU forward of bitsandbytes drops it), the scales are
    quantised anew. The new scales differ from the base's by some thousandths, which is little beside a step.
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


Ranges = Sequence[tuple[int, int]]


def from_samples(f: WeightFormat, chain: Sequence[WeightMap], steps_of: Callable[[Ranges], int | None]) -> int | None:
    """The steps of ω from a sample, or from a larger one where the change is weak.

    Args:
        chain: the weight's rotations, as for :func:`whole_rows`.
        steps_of: function that gives the steps of ω from ranges of rows, or None.
    """
    rows, features = f.shape
    small, large = (sample_of(rows, features, whole_rows(f, chain), most) for most in (SAMPLE, LARGE_SAMPLE))
    steps = steps_of(small)
    return steps if steps is None or steps <= WEAK or small == large else steps_of(large)


def sample_of(rows: int, features: int, unit: int, most: int = SAMPLE) -> list[tuple[int, int]]:
    """Ranges of rows from which ω is found: all rows of a small weight, else one unit of each part. The units' places in
    the parts follow no period, because the rows of attention heads have a period.

    Args:
        unit: number of rows that must stay together; the units taken are a multiple of this and of :data:`ROWS`.
        most: about the largest number of weights in the ranges.
    """
    unit = math.lcm(unit, ROWS)
    units = -(-rows // unit)
    apart = max(1, min(rows * features // most, units // _FEWEST))
    golden = (math.sqrt(5) - 1) / 2
    chosen = (start + int(start // apart * golden % 1 * min(apart, units - start)) for start in range(0, units, apart))
    return [(i * unit, min(i * unit + unit, rows)) for i in chosen]


def limits(f: WeightFormat) -> tuple[float, float]:
    """(the largest mean square of δ, the largest |w|) of a weak block, in units of its scale."""
    return f.kind.strong_change**2, CLIP


def span(start: int, stop: int, features: int, size: int) -> slice:
    """The entries of rows ``start`` to ``stop``, if one entry stands for ``size`` weights."""
    return slice(start * features // size, -(-stop * features // size))


def whole_rows(f: WeightFormat, chain: Sequence[WeightMap] = ()) -> int:
    """The fewest rows that hold whole bytes, whole 4-bit blocks and, for rotations of the rows, whole rotations. A weight with
    larger rotations of the rows is rotated as a whole, so a sample of its rows need not hold whole rotations.
    """
    features = f.shape[1]
    rows = f.blocksize // math.gcd(features, f.blocksize) if f.blocksize else 1
    rows = math.lcm(rows, 2 if f.blocksize and features % 2 else 1)
    return math.lcm(rows, *(r.block_size for r in chain if r.side == "output" and r.block_size <= MOST_ROWS))


def is_strong(base: Tensor, exact: Tensor, scales: Tensor, n: int, f: WeightFormat) -> Tensor:
    """Whether each block is scaled anew and rounded to nearest: ``(blocks,)`` bool.

    Args:
        base, exact: ``(blocks, blocksize)`` float32, padded with zeros.
        scales: ``(blocks,)``.
        n: number of weights without the padding.
        f: format of the weight.
    """
    square, most = limits(f)
    count = torch.full(scales.shape, float(base.shape[1]), device=scales.device)
    count[-1] -= base.numel() - n
    unit = scales.abs().clamp(min=1e-38)
    moved = ((exact - base) / unit.unsqueeze(-1)).square().sum(-1)
    strong = (moved > square * count) | (exact.abs().amax(-1) > most * scales.abs())
    return strong if f.kind.either_sign else strong | (scales < 0)


def relaxation(
    rows_of: Callable[[Ranges], tuple[Tensor, Tensor]],
    own: Scales,
    f: WeightFormat,
    chain: Sequence[WeightMap] = (),
) -> int | None:
    """The steps of the ω that keeps the change of the weak blocks of a sample; None if most of its blocks are strong.

    Each evaluation takes the nearest levels of the whole sample, as the encoding does.

    Args:
        rows_of: function that gives ``(base, exact)``, both ``(rows, in)`` float32, of ranges of rows, one after the other.
        own: the scales of the whole weight.
        f: format of the weight.
        chain: the weight's rotations.
    """
    return from_samples(f, chain, lambda ranges: _relaxation_of(ranges, *rows_of(ranges), own, f))


def _relaxation_of(ranges: Ranges, base: Tensor, exact: Tensor, own: Scales, f: WeightFormat) -> int | None:
    """:func:`relaxation` from the rows of ``ranges``."""
    scales = torch.cat([own.values[span(start, stop, f.shape[1], f.block)] for start, stop in ranges])
    v, w = in_blocks(base.reshape(-1), f.block), in_blocks(exact.reshape(-1), f.block)
    strong = is_strong(v, w, scales, base.numel(), f)
    if 2 * int(strong.sum()) > strong.numel():
        return None
    # the other blocks' changes count as 0; to leave the blocks out, the processor would wait for a GPU
    weak = (~strong & (scales != 0)).unsqueeze(-1)
    s = torch.where(weak, scales.unsqueeze(-1), 1.0)
    d = torch.where(weak, (w - v) / s, 0.0).reshape(-1)
    power = s.to(torch.float64).square().expand_as(v).reshape(-1)
    v = (v / s).reshape(-1)
    weight = d.to(torch.float64) * power
    need = float((weight * d).sum())
    if not need > 0:
        return 0

    def kept(steps: Sequence[int]) -> list[float]:
        levels = (f.kind.nearest_levels(v + d * relaxation_of(k)) for k in steps)
        # read together: for each reading the processor waits for a GPU
        return [x / need for x in torch.stack([(weight * (level - v)).sum() for level in levels]).tolist()]

    return solve(kept)


def solve(kept: Callable[[Sequence[int]], Sequence[float]]) -> int:
    """The k from 0 to MOST for which ``kept``, which grows with k, is nearest to 1; 0 if ``kept`` is above 1 already at 0.

    Args:
        kept: function that gives its values for several k at once.
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
    """Encode some rows of a weight: the change in weak blocks is over-relaxed, and strong blocks are scaled anew.

    Args:
        base, exact: ``(rows, in)``, whole blocks.
        scales: scales of the whole weight.
        first: number of the first block of these rows.
        steps: steps of ω.
        f: format of these rows, without double quantisation.

    Returns:
        the stored codes (packed, or int8), the stored form of the blocks' scales (codes with double quantisation), and
        the scales; None if the base's statistics would clip a strong block.
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
        # the best scale may itself clip, or be larger than the largest weight; the loss of a block of nearly zeros does
        # not matter beside the other blocks' scales
        needed = torch.minimum(wanted, w[at].abs().amax(-1)) - seen[at].abs()
        usual = seen[at].abs().clamp(min=float(scales.nested.get("nested_offset", 0.0)))
        if bool((needed > MISFIT * usual).any()):
            return None
        if codes is not None:
            stated[at] = codes
    factor = torch.where(strong, 1.0, relaxation_of(steps)).unsqueeze(-1)
    target = torch.where(strong.unsqueeze(-1), w, v + (w - v) * factor).reshape(-1)[:n].to(torch.float32)
    return f.kind.codes_at(target, seen, f), stated, seen


# --- in the layouts of other packages ----------------------------------------------------------------------------------

#: a package's own rounding, which finds new scales, is taken where it keeps at least this share of the change
_WHOLE = 0.98
#: where the change is less than this part of a step (root mean square), a package's own rounding keeps less than half of it
_SMALL = 0.25


def in_package(encoded: EncodedWeight, base: Tensor, exact: Tensor) -> tuple[EncodedWeight, float] | None:
    """The weight that keeps the change with its own scales and zeros, and its ω; None where the package's own rounding keeps enough, or
    no ω keeps the change.

    Args:
        encoded: the weight before the rotation, in the layout of a package whose quantiser is known.
        base, exact: its values before and after the rotation, ``(out, in)`` float32.
    """
    kind = encoded.format.kind
    assert isinstance(kind, OfPackage)  # noqa: S101 - the caller asks for such a weight
    change, grid = exact - base, kind.quantiser.grid(encoded.tensors)
    whole = _sum(change, change)
    if not whole:
        return None
    steps = grid.steps(base).expand(base.shape)
    if whole >= _SMALL**2 * _sum(steps, steps):
        anew = kind.decode(EncodedWeight(encoded.format, kind.quantiser.encode(exact)))
        if abs(_sum(anew.sub_(base), change) / whole - 1) <= 1 - _WHOLE:
            return None
    found = steps_in_package(grid, base, change)
    if found is None:
        return None
    new = kind.with_numbers(encoded, grid.nearest(base + change * relaxation_of(found)))
    return new, relaxation_of(found)


def steps_in_package(grid: Grid, base: Tensor, change: Tensor) -> int | None:
    """The steps of the ω that keeps the change of weights on a grid; None if no ω does."""
    found = _relaxation_of_some(grid, base, change, SAMPLE)
    if found is None or found <= WEAK or base.numel() <= SAMPLE:
        return found
    return _relaxation_of_some(grid, base, change, LARGE_SAMPLE)


def _relaxation_of_some(grid: Grid, base: Tensor, change: Tensor, most: int) -> int | None:
    """:func:`_relaxation` of at most ``most`` weights, which lie apart by the golden section of the whole and follow no period."""
    n = base.numel()
    if n <= most:
        return _relaxation(grid, base, change)
    index = torch.arange(most, device=base.device) * round(n * (math.sqrt(5) - 1) / 2) % n
    return _relaxation(grid.at(index, tuple(base.shape)), base.reshape(-1)[index], change.reshape(-1)[index])


def _relaxation(grid: Grid, base: Tensor, change: Tensor) -> int | None:
    """The least steps of an ω that keeps the whole change; None if there are none."""
    whole = _sum(change, change)

    def keeps(steps: int) -> bool:
        stored = grid.values(grid.nearest(base + change * relaxation_of(steps)))
        return _sum(stored.sub_(base), change) >= whole

    low, high = -1, MOST  # the change is kept from `high` on
    if not keeps(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _sum(a: Tensor, b: Tensor) -> float:
    """``Σ a b`` in float64, the same for any number of threads."""
    rows = (a * b).reshape(-1)
    whole, rest = rows[: len(rows) // _ROW * _ROW].reshape(-1, _ROW), rows[len(rows) // _ROW * _ROW :]
    return float(whole.sum(-1, dtype=torch.float64).cpu().sum() + rest.sum(dtype=torch.float64).cpu())


_ROW = 1 << 12


def stored_as(f: WeightFormat, codes: Tensor, scales: Tensor) -> EncodedWeight:
    """Codes and the scales of their blocks as a weight without double quantisation."""
    return EncodedWeight(f, {"weight": codes, f.kind.scales_name: scales})
