"""The folded weight, rotated back and requantised, predicts the original codes; the prediction's errors are coded here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oftsurgery.formats.base import in_blocks
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.packages.package_format import PackageFormat

from . import preserve
from .undo_rotations import Stage, apply_stage, power_of_two
from .undo_streams import Array, Streams, bytes_of, damaged

# number of values that are predicted and coded together, which bounds the memory
_CHUNK = 1 << 21

#: the fraction bits of the relaxation in a record
RELAXATION_BITS = 20

MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def _folded_values(after: EncodedWeight) -> Callable[[int, int], Tensor]:
    """A function of ``(first, end)`` that gives the flat values of the folded weight there, in float64.

    A 4-bit weight's absmax is rounded to bfloat16 first, as bitsandbytes rounds it when a CPU forward repacks a layer:
    the prediction is the same before and after.
    """
    f, kind = after.format, after.format.kind
    if isinstance(f, PackageFormat):
        flat = kind.decode(after).reshape(-1)
        return lambda first, end: flat[first:end].to(torch.float64)
    codes = kind.codes(after).contiguous().reshape(-1)
    if not f.quantised:
        return lambda first, end: codes[first:end].to(torch.float64)
    steps, n = _folded_scales(after) / kind.unit, kind.codes_per_element

    def values(first: int, end: int) -> Tensor:
        numbers = kind.numbers(codes[first // n : -(-end // n)])[: end - first].to(torch.float64)
        here = steps[first // f.block : -(-end // f.block)]
        return (in_blocks(numbers, f.block) * here.unsqueeze(-1)).reshape(-1)[: end - first]

    return values


def _folded_scales(after: EncodedWeight) -> Tensor:
    """The scales of the folded weight's blocks or rows, float64; 4-bit scales are rounded as in :func:`_folded_values`."""
    kind = after.format.kind
    return kind.prediction_inputs(after)[kind.scales_name].to(torch.float64)


def rotated_back(
    after: EncodedWeight, stages: Sequence[Stage], blocksize: int, relaxation: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """``(first, values)``: the folded weight rotated back, flat, float64, some rows at a time; each chunk begins with a
    4-bit block.

    If the fold over-relaxed the change (:mod:`oftsurgery.weights.preserve`), the way back is over-relaxed too: a weight that
    the fold moved by a step is predicted a step back, and a weight that stayed is predicted where it is.
    """
    rows, columns = after.format.shape
    values = _folded_values(after)
    unit = max(blocksize, after.format.blocksize, 2)
    unit //= math.gcd(columns, unit)
    step = -(-_CHUNK // (columns * unit)) * unit

    def back(x: Tensor, row: int) -> Tensor:
        for stage in stages:
            x = apply_stage(x, stage, row)
        return x

    mixed = any(stage.dim == 0 for stage in stages)  # a stage that mixes rows needs all rows at once
    whole = back(values(0, rows * columns).reshape(rows, columns), 0) if mixed else None
    for row in range(0, rows, step):
        end = min(row + step, rows)
        y = values(row * columns, end * columns).reshape(-1, columns)
        x = back(y, row) if whole is None else whole[row:end]
        if relaxation is not None:
            x = y + (x - y) * (relaxation * power_of_two(-RELAXATION_BITS))
        # scales near zero give infinities and their differences: any number will do, if it is the same everywhere
        yield row * columns, torch.nan_to_num(x.contiguous().reshape(-1))


def flat_parts(t: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat = t.contiguous().reshape(-1)
    for first in range(0, flat.numel(), _CHUNK):
        yield first, flat[first : first + _CHUNK].to(torch.float64)


def code_tensors(
    io: Streams,
    facts: Any,
    f: WeightFormat,
    after: EncodedWeight,
    stages: Sequence[Stage],
    tables: Mapping[str, Tensor],
    true: Mapping[str, Tensor] | None,
) -> dict[str, bytes]:
    """The bytes of all tensors except ``tables``, predicted; when writing, the function completes ``facts``."""
    if isinstance(f, PackageFormat):
        return _code_package(io, f, after, rotated_back(after, stages, 0, _relaxation(facts)), true)
    if not f.quantised:
        weight = None if true is None else true["weight"]
        return {"weight": code_floats(io, f.dtype, rotated_back(after, stages, 0), weight)}
    kind, n = f.kind, math.prod(f.shape)
    given: dict[str, Array] = {}
    if true is not None:
        given = {
            k: t.contiguous().reshape(-1).numpy() for k, t in true.items() if k not in ("weight", *kind.shared_tensors)
        }
        given["weight"] = kind.unpack_codes(true["weight"], n, facts).view(torch.uint8).numpy()
    ranked, relaxation = kind.codes_by_level(facts), _relaxation(facts)
    if ranked is None or not (relaxation is None or preserve.applies(f, after.format)):
        raise damaged(why="the facts of its codes or of the relaxation are wrong")
    kept = None if relaxation is None else _folded_scales(after)
    out: dict[str, bytes] = {}
    nested = None
    if f.nested_blocksize:
        table = tables.get("nested_quant_map")
        if table is None or table.dtype != torch.float32 or table.numel() != 256:
            raise damaged(why="nested_quant_map is missing, or does not hold 256 values in float32")
        blocks_of_blocks = -(-n // (f.blocksize * f.nested_blocksize))
        for name, nbytes in (("nested_absmax", 4 * blocks_of_blocks), ("nested_offset", 4)):
            out[name] = io.raw(given[name].tobytes() if given else None, nbytes)
        factors, offset = (np.frombuffer(raw, np.float32) for raw in out.values())
        nested = _Nested(table.reshape(-1).numpy(), factors, float(offset[0]), f.nested_blocksize)
    order = ranked.view(torch.uint8).numpy()
    ranks = np.zeros(256, np.int32)
    ranks[order] = np.arange(len(order))
    codes = np.empty(n, np.uint8)
    scales = np.empty(-(-n // f.block), np.uint8 if nested else np.float32)
    for first, x in rotated_back(after, stages, f.blocksize, relaxation):
        here = slice(first, first + x.numel())
        of = slice(first // f.block, -(-here.stop // f.block))
        blocks = in_blocks(x, f.block)
        peaks = blocks.abs().amax(-1) if kept is None else kept[of]
        stated = given[kind.scales_name][of] if given else None
        scales[of], seen = _code_scales(io, stated, peaks, of.start, nested)
        divisors = torch.from_numpy(seen.astype(np.float64))
        numbers = blocks * kind.unit / torch.where(divisors == 0, 1.0, divisors).unsqueeze(-1)
        wanted = ranks[given["weight"][here]] if given else None
        found = _code_ranks(io, wanted, *kind.nearest_ranks(numbers.reshape(-1)[: x.numel()], ranked))
        if found.min() < 0 or found.max() >= len(order):
            raise damaged(why=f"a code has the rank {found.min()} or {found.max()}, outside 0 to {len(order) - 1}")
        codes[here] = order[found]
    stored = kind.repack_codes(torch.from_numpy(codes).view(ranked.dtype), facts)
    return {"weight": bytes_of(stored), kind.scales_name: scales.tobytes(), **out}


def _relaxation(facts: Any) -> int | None:
    """The relaxation that ``facts`` name, if any."""
    relaxation = facts.get("relaxation")
    if relaxation is None or (type(relaxation) is int and 0 < relaxation < 1 << (RELAXATION_BITS + 17)):
        return relaxation
    raise damaged(why="the facts of the relaxation are wrong")


def _code_package(
    io: Streams,
    f: PackageFormat,
    after: EncodedWeight,
    predicted: Iterator[tuple[int, Tensor]],
    true: Mapping[str, Tensor] | None,
) -> dict[str, bytes]:
    """The bytes of the tensors of a weight in another package's layout: the codes by their differences from those that the original
    scales and zeros give to the prediction, and the other tensors by their differences from those of the folded weight.
    """

    def differing(name: str, near: Array) -> Array:
        own = None if true is None else (np.frombuffer(bytes_of(true[name]), np.uint8) ^ near).tobytes()
        found: Array = near ^ np.frombuffer(io.raw(own, near.size), np.uint8)
        return found

    others = [name for name in f.entries if name != "weight"]
    found = {n: differing(n, np.frombuffer(bytes_of(after.tensors[n]), np.uint8)).tobytes() for n in others}
    beside = {
        name: torch.frombuffer(bytearray(raw), dtype=f.entries[name][0]).reshape(f.entries[name][1])
        for name, raw in found.items()
    }
    values = torch.cat([x for _, x in predicted]).to(torch.float32).reshape(f.shape)
    quantiser = f.kind.quantiser
    near = np.frombuffer(bytes_of(quantiser.stored(quantiser.grid(beside).nearest(values))), np.uint8)
    if 8 % quantiser.bits:  # codes straddle bytes
        return {"weight": differing("weight", near).tobytes(), **found}
    own = None if true is None else np.frombuffer(bytes_of(true["weight"]), np.uint8)
    whole = np.zeros_like(near)
    for shift in range(0, 8, quantiser.bits):
        centre = near >> shift
        wanted = None if own is None else _wrapped((own >> shift) - centre, quantiser.bits)
        read = io.symbols(None if wanted is None else np.where(wanted < 0, -2 * wanted - 1, 2 * wanted), near.size)
        codes = centre + np.where(read & 1, -((read + 1) >> 1), read >> 1)
        whole |= ((codes & ((1 << quantiser.bits) - 1)) << shift).astype(np.uint8)
    return {"weight": whole.tobytes(), **found}


def _wrapped(codes: Array, bits: int) -> Array:
    """Integers of ``bits`` bits, in the lowest bits of ``codes``, with a sign."""
    half = 1 << (bits - 1)
    found: Array = ((codes.astype(np.int32) + half) & ((1 << bits) - 1)) - half
    return found


def _code_ranks(io: Streams, true: Array | None, near: Tensor, up: Tensor, margin: Tensor) -> Array:
    """The true ranks, coded by their place beside the nearest rank: 0 is the nearest rank, 1 the next rank on the side of
    the prediction (``up``), 2 the next rank on the other side, 3 … The codes are in the order of ``margin``, the distance
    to the threshold on that side, because an adaptive coder needs similar codes together.
    """
    key = torch.clamp(margin, 0, 65535).to(torch.int32).numpy().astype(np.uint16)
    order = np.argsort(key, kind="stable")
    centre, sign = near.to(torch.int32).numpy(), np.where(up.numpy(), np.int32(1), np.int32(-1))
    symbols = None
    if true is not None:
        d = (true - centre) * sign
        symbols = np.where(d > 0, 2 * d - 1, -2 * d)[order]
    coded = np.empty(key.size, np.int32)
    coded[order] = io.symbols(symbols, key.size)
    half = (coded + 1) >> 1
    found: Array = centre + sign * np.where(coded & 1, half, -half)
    return found


class _Nested(NamedTuple):
    """Double quantisation's statistics: a block's absmax is ``table[code] · factors[block // size] + offset``."""

    table: Array
    factors: Array
    offset: float
    size: int


def _code_scales(
    io: Streams, true: Array | None, peaks: Tensor, first: int, nested: _Nested | None
) -> tuple[Array, Array]:
    """The stored form of the scales of blocks from number ``first`` on, predicted from the blocks' largest values, and the
    scales.
    """
    if nested is None:
        bits = peaks.to(torch.float32).numpy().view(np.int32)
        scales = io.differences(None if true is None else true.view(np.int32), bits).view(np.float32)
        return scales, scales
    factors = nested.factors[(first + np.arange(peaks.numel())) // nested.size].astype(np.float64)
    order = np.argsort(nested.table, kind="stable")
    table = nested.table[order].astype(np.float64)
    wanted = (peaks.numpy() - nested.offset) / np.where(factors == 0, 1.0, factors)
    near = order[np.searchsorted((table[1:] + table[:-1]) / 2, wanted)].astype(np.uint8).view(np.int8)
    codes = io.differences(None if true is None else true.view(np.int8), near).view(np.uint8)
    return codes, nested.table[codes].astype(np.float64) * factors + nested.offset


def code_floats(io: Streams, dtype: torch.dtype, predicted: Iterator[tuple[int, Tensor]], true: Tensor | None) -> bytes:
    """The bytes of a plain tensor of floats."""
    parts, patterns = [], None if true is None else _monotone(_patterns(true))
    for first, x in predicted:
        near = _monotone(_patterns(x if dtype == torch.float64 else x.to(torch.float32).to(dtype)))
        # the size of an error in units in the last place depends on the exponent
        key = (np.abs(near) >> (MANTISSA[dtype] - 2)).astype(np.uint16)
        order = np.argsort(key, kind="stable")
        wanted = None if patterns is None else patterns[first : first + x.numel()][order]
        found = np.empty_like(near)
        found[order] = io.differences(wanted, near[order])
        parts.append(_monotone(found).tobytes())
    return b"".join(parts)


def _patterns(values: Tensor) -> Array:
    """The bit patterns (n,) of floats, as signed integers of their width."""
    widths = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return values.contiguous().reshape(-1).view(widths[values.dtype.itemsize]).numpy()


def _monotone(patterns: Array) -> Array:
    """Sign-and-magnitude bit patterns of floats ↔ integers in the order of their values; the function is its own inverse."""
    width = 8 * patterns.itemsize
    turned: Array = patterns ^ ((patterns >> (width - 1)) & patterns.dtype.type((1 << (width - 1)) - 1))
    return turned
