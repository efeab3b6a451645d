"""Drive the fused CUDA kernels (:mod:`oftsurgery.weights.kernels.gpu`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.four_bit import FourBit
from oftsurgery.formats.scales import GRID
from oftsurgery.weights import preserve

from . import blockwise, gpu, tiled

#: the largest number of columns of a program
_MAX_BLOCK = 256
#: the largest number of scales of a program
_MAX_SCALES = 4096


def fold(
    encoded: EncodedWeight, into: WeightFormat, matrices: Tensor, scale: Tensor | None, rounding: str
) -> blockwise.FoldedWeight | None:
    """As :func:`oftsurgery.weights.kernels.fold_cpu.fold`, on the weight's own device; also None for ``rounding="mse"``."""
    f = encoded.format
    kind, new_kind = (getattr(gpu, side.kind.kernel_name(side), None) for side in (f, into))
    b = math.lcm(matrices.shape[-1], *(side.blocksize for side in (f, into) if side.blocksize))
    # Triton's tiles are powers of two
    if kind is None or new_kind is None or b > _MAX_BLOCK or b & (b - 1) or f.shape[1] % b or 0 in f.shape:
        return None
    source = None if rounding == "mse" else f.kind.kernel_operands(encoded)
    if source is None:
        return None
    matrices = rotations.block_diagonal(matrices, b, shared=len(matrices) == 1).contiguous()
    scale = None if scale is None else scale.to(device=source[0].device, dtype=torch.float32).contiguous()
    way = _FourBitFold if new_kind == gpu.FOUR_BIT else _RowsFold
    # Triton launches on the current device
    with torch.cuda.device(source[0].device) if source[0].is_cuda else nullcontext():
        return way(encoded, into, kind, new_kind, *source, matrices, scale).run(rounding)


def tile_of(b: int) -> tuple[int, int]:
    """The rows and the warps of a program with b columns. On an H200 the 4-bit kernels with 64 columns take 1.5 to 1.7 times as
    long with 32 rows and 8 warps; the other kernels take the same time.
    """
    return 16, 8 if b > 64 else 4


@cache
def _ratios(device: torch.device) -> Tensor:
    return torch.tensor((1.0, *GRID), dtype=torch.float32, device=device)


@dataclass(eq=False)
class _Fold(blockwise.Fold):
    """One fold of a weight: what all passes have in common."""

    kind: int
    new_kind: int
    weight: Tensor
    scales: Tensor
    matrices: Tensor
    factors: Tensor | None

    def __post_init__(self) -> None:
        f, b = self.encoded.format, self.matrices.shape[-1]
        self.rows, self.features = f.shape
        self.device = self.weight.device
        self.tile, self.warps = tile_of(b)
        self.grid = (-(-self.rows // self.tile), self.features // b)
        self.old = (self.weight, self.scales, blockwise.tables(f.codec, self.device)[0], self.matrices)
        self.shape: dict[str, Any] = {
            "KIND": self.kind,
            "SIZE": max(f.blocksize, 1),
            "B": b,
            "ROWS": self.tile,
            "STEP": min(b, 32),
            "SHARED": self.matrices.shape[0] == 1,
            "SCALED": self.factors is not None,
            "num_warps": self.warps,
            "enable_fp_fusion": False,
        }

    def launch(self, kernel: Any, *args: Any, **more: Any) -> Tensor:
        """Run a kernel over the whole weight; its sums, which are not there yet."""
        sums = torch.zeros(self.grid[0] * self.grid[1], gpu.COLUMNS, dtype=torch.float64, device=self.device)
        factors = self.matrices if self.factors is None else self.factors
        args = (*self.old, factors, *args[:-1], sums, *args[-1])
        kernel[self.grid](*args, self.rows, self.features, **self.shape, **more)
        return sums

    def read(self, sums: Tensor, *others: Tensor) -> tuple[dict[str, float], list[float]]:
        """The sums, and other float64 numbers, read in one transfer: the processor waits for the device here."""
        last = len(gpu.SUMS) - 2
        parts = [sums[:, :last].sum(0), sums[:, last:].amax(0), *others]
        found = torch.cat(parts).tolist()
        total = dict(zip(gpu.SUMS, found, strict=False))
        self.finite = self.finite and total["top"] < blockwise.NOT_FINITE
        return total, found[gpu.COLUMNS :]

    def steps(self, own: preserve.Scales) -> int | None:
        """:func:`oftsurgery.weights.preserve.relaxation` of this weight."""
        single = self.encoded.single()

        def rows_of(ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            rows = tiled.rows_of(single, *ranges)  # together, because many small launches would take most of the time
            base = rows.format.kind.decode(rows)  # the kernel looks for NaN and infinity
            exact = rotations.apply_blocks(base, self.matrices)
            if self.factors is not None:
                exact.mul_(torch.cat([self.factors[start:stop] for start, stop in ranges]).unsqueeze(-1))
            return base, exact

        return preserve.relaxation(rows_of, own, self.into)


@dataclass(eq=False)
class _FourBitFold(_Fold):
    """A fold into a 4-bit format."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.result, self.new_scales, self.moments = blockwise.allocate(self.into, self.device)

    def pass_(
        self,
        mode: int,
        given: Tensor,
        *held: Tensor,
        over: tuple[float, ...] = (1.0,) * 4,
        size: int = 1,
        plain_moments: Tensor | None = None,
    ) -> Tensor:
        """The sums of a pass in a mode of :mod:`.gpu`; ``held`` are the tables of the base's double quantisation, if there are any."""
        _, *tables = blockwise.tables(self.into.codec, self.device)
        moments = given if self.moments is None else self.moments
        more = (given, moments, given if plain_moments is None else plain_moments)
        return self.launch(
            gpu.fold_four_bit, self.result, self.new_scales, *tables, _ratios(self.device), *more, *(held or (given,) * 6), (*over, size),
            NEW_SIZE=self.into.blocksize, MODE=mode, RATIOS=1 + len(GRID), NESTED=self.moments is not None,
        )  # fmt: skip

    def round(self, rounding: str) -> blockwise.FoldedWeight | None:
        mode = gpu.NEAREST if rounding == "nearest" else gpu.GRID
        if self.moments is None:
            sums, _ = self.read(self.pass_(mode, self.new_scales))
            return self.folded(sums, {"absmax": self.new_scales}, rounding) if self.finite else None
        absmax, plain_moments = self.new_scales, None
        if mode == gpu.GRID:
            absmax, plain_moments = torch.empty_like(absmax), torch.zeros_like(self.moments)
        launched = self.pass_(mode, absmax, plain_moments=plain_moments)
        costs = [_Nested(self.new_scales, self.into, self.moments)]
        if plain_moments is not None:
            costs.append(_Nested(absmax, self.into, plain_moments))
        sums, numbers = self.read(launched, *(cost.numbers for cost in costs))
        if not self.finite:
            return None
        count = len(costs[0].numbers)
        for k, cost in enumerate(costs):
            error, held = cost.read(numbers[k * count : (k + 1) * count])
            if k:
                sums["nearest"] += error
            else:
                sums["error"], sums["held"] = sums["error"] + error, sums["held"] + held
        return self.folded(sums, costs[0].statistics, rounding)

    def folded(
        self, sums: dict[str, float], statistics: dict[str, Tensor], rounding: str, omega: float = 1.0
    ) -> blockwise.FoldedWeight:
        nearest = {"nearest": sums["error"], "preserve": None}.get(rounding, sums["nearest"])
        cost = blockwise.Sums(sums["norm"], sums["error"], nearest, sums["change"], sums["held"])
        return cost.folded(self.into.kind.assemble(self.into, self.result, statistics), rounding, omega)

    def keep(self) -> blockwise.FoldedWeight | None:
        into = self.into
        own = preserve.scales_of(self.encoded, into)
        steps = self.steps(own)
        if steps is None:
            return None
        square, clip = preserve.limits(into)
        omega = preserve.relaxation_of(steps)
        held: tuple[Tensor, ...] = ()
        stated = self.new_scales = own.values.detach().clone()
        if own.codes is not None:
            ordered, order = own.in_order()
            factors = own.nested["nested_absmax"].reshape(-1).to(torch.float32).contiguous()
            offset = own.nested["nested_offset"].to(device=self.device, dtype=torch.float32)
            stated = own.codes.detach().clone()
            held = (ordered, (ordered[1:] + ordered[:-1]) / 2, order.to(torch.int32), factors, stated, offset)
        over = (omega, square * into.blocksize, clip, preserve.MISFIT)
        values = own.values.contiguous()
        sums, _ = self.read(self.pass_(gpu.KEEP, values, *held, over=over, size=max(own.size, 1)))
        if not self.finite or sums["misfits"]:
            return None
        return self.folded(sums, preserve.put_scales(own, into, stated), "preserve", omega)


@dataclass(eq=False)
class _RowsFold(_Fold):
    """A fold into int8 or a plain format."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.result, self.new_scales, _ = blockwise.allocate(self.into, self.device)

    def pass_(
        self, scales: Tensor, omegas: Tensor | None = None, moments: Tensor | None = None, *, measure: bool = False
    ) -> Tensor:
        unused = self.matrices
        bits = scales.view(torch.int32) if self.new_kind == gpu.INT8 else unused
        return self.launch(
            gpu.fold_rows, self.result, bits, unused if omegas is None else omegas, unused if moments is None else moments, (),
            NEW_KIND=self.new_kind, KEEP=omegas is not None, MEASURE=measure,
        )  # fmt: skip

    def round(self, rounding: str) -> blockwise.FoldedWeight | None:
        if self.new_kind == gpu.INT8:
            self.pass_(self.new_scales.zero_(), measure=True)
        return self.folded(self.pass_(self.new_scales), self.into.kind.statistics(self.new_scales, self.into), rounding)

    def keep(self) -> blockwise.FoldedWeight | None:
        own = preserve.scales_of(self.encoded, self.into)
        steps = self.steps(own)
        if steps is None:
            return None
        omega = preserve.relaxation_of(steps)
        scales, omegas = (
            own.values.contiguous(),
            torch.full((self.rows,), omega, dtype=torch.float32, device=self.device),
        )
        moments = torch.empty(self.rows, self.grid[1], 2, dtype=torch.float32, device=self.device)
        sums = self.pass_(scales, omegas, moments)
        square, clip = preserve.limits(self.into)
        moved, largest = moments[..., 0].sum(-1), moments[..., 1].amax(-1)
        strong = (moved > square * self.features) | (largest > clip * scales.abs()) | (scales < 0)
        if bool(strong.any()):
            scales, omegas = torch.where(strong, largest, scales), torch.where(strong, 1.0, omegas)
            sums = self.pass_(scales, omegas, moments)
        statistics = preserve.put_scales(own, self.into, scales.clone())
        return self.folded(sums, statistics, "preserve", omega)

    def folded(
        self, launched: Tensor, statistics: dict[str, Tensor], rounding: str, omega: float = 1.0
    ) -> blockwise.FoldedWeight | None:
        sums, _ = self.read(launched)
        if not self.finite:
            return None
        nearest = None if rounding == "preserve" else sums["error"]
        cost = blockwise.Sums(sums["norm"], sums["error"], nearest, sums["change"], sums["held"])
        return cost.folded(self.into.kind.assemble(self.into, self.result, statistics), rounding, omega)


class _Nested:
    """Double quantisation of ``scales`` on the device.

    Attributes:
        statistics: the tensors that hold the scales.
        numbers: what :meth:`read` needs, float64, still on the device.
    """

    def __init__(self, scales: Tensor, into: WeightFormat, moments: Tensor) -> None:
        assert isinstance(into.kind, FourBit)  # noqa: S101 - no other format has double quantisation
        self.scales, self.into, self.moments = scales, into, moments
        count, size = len(scales), into.nested_blocksize
        if size & (size - 1) or size > _MAX_SCALES:  # no tile of the kernel's
            self.numbers = torch.empty(0, dtype=torch.float64, device=scales.device)
            self._by_library()
            return
        device, blocks = scales.device, -(-count // size)
        values, steps = blockwise.dynamic_steps(device)
        offset = scales.mean()
        codes = torch.empty(count, dtype=torch.uint8, device=device)
        factors = torch.empty(blocks, dtype=torch.float32, device=device)
        sums = torch.zeros(blocks, 3, dtype=torch.float64, device=device)
        gpu.quantise_scales[(blocks,)](
            scales, offset, values, steps, codes, factors, moments, sums, count, SIZE=size, enable_fp_fusion=False
        )
        nested = {"nested_absmax": factors, "nested_quant_map": values.clone(), "nested_offset": offset}
        self.statistics = {"absmax": codes, **nested}
        self.numbers = torch.cat([sums.sum(0), offset.to(torch.float64).reshape(1)])

    def _by_library(self) -> None:
        self.statistics = self.into.kind.statistics(self.scales, self.into)

    def read(self, numbers: list[float]) -> tuple[float, float]:
        """What double quantisation adds to Σ (stored - exact)² and to Σ (stored - exact) (exact - base); ``numbers`` on the
        processor.
        """
        if numbers:
            error, held, overflows, offset = numbers
            if not overflows and math.isfinite(offset):
                return error, held
            # a reciprocal overflows, because the scales differ so little: bitsandbytes decides the codes, or the mean is refused
            self._by_library()
        return blockwise.nested_error(self.into, self.scales, self.statistics, self.moments)
