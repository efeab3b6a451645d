"""Weights in 8-bit floats with scales beside them, as DeepSeek, Qwen, Mistral and transformers write them: ``w = code · scale`` with
a scale for the tensor, for a row, or for a block of rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .stored import Entries, Grid, Quantiser, Shape, Source, Stored, damaged, unknown

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
#: ends of a scale's name after the weight's name, and after the module's
_AFTER = ("_scale_inv", "_scale")
_BESIDE = ("qscale_weight", "scale")
#: settings of activations and of the cache, which a dense model has not
IDLE = (
    ".input_scale", ".activation_scale", ".weight_activation_scale", ".input_scale_ub", ".output_scale", ".k_scale",
    ".v_scale", ".kv_scale", ".q_scale", ".qscale_act",
)  # fmt: skip


def weights(source: Source) -> dict[str, Stored]:
    """``{name of a weight: the stored weight}``; experts that transformers holds in one tensor have three dimensions."""
    block = source.settings.get("weight_block_size")
    if block is not None and not (isinstance(block, (list, tuple)) and is_block(block)):
        unknown("weight_block_size", block, "fp8", "restore the config.json that was saved with the weights")
    powers = source.settings.get("scale_fmt") == "ue8m0"
    found = {}
    for name, (dtype, shape) in source.entries.items():
        if dtype in CODES and (len(shape) >= 2 or name.endswith("weight")):
            scale = scale_of(name, source.entries)
            if scale is None:
                damaged("the weight in 8-bit floats has no scale beside it", name, "fp8")
            # transformers' dequantisation gives the config's dtype
            size = None if block is None else tuple(block)
            found[name] = stored(source.entries, name, scale, size, source.dtype, partial(_statistics, powers=powers))
    return found


def is_block(sizes: Sequence[object]) -> bool:
    """Whether ``sizes`` are the rows and columns of a block."""
    return len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes)


def scale_of(name: str, entries: Entries) -> str | None:
    """The name of the scale of the weight ``name``; None without a scale."""
    path, dot, local = name.rpartition(".")
    beside = [f"{path}{dot}{end}" for end in _BESIDE] if local == "weight" else []
    return next((n for n in (*(name + end for end in _AFTER), *beside) if n in entries), None)


def stored(
    entries: Entries, name: str, scale: str, block: Shape | None, dtype: torch.dtype, statistics: Statistics
) -> Stored:
    """The weight ``name`` with its scale.

    Args:
        block: the rows and columns that share a scale; None for what the shapes say.
        statistics: the package's choice of scales.
    """
    shape = entries[name][1]
    grid = _grid(entries, name, scale, block)
    what = "one scale" if grid == shape[-2:] else f"blocks of {grid[0]} × {grid[1]}"
    what = "a scale for each row" if grid == (1, shape[-1]) else what
    if entries[scale][0] not in _SCALES:
        damaged(f"the scale has the dtype {entries[scale][0]}, which oftsurgery does not read", scale, "fp8")
    quantiser = None
    if entries[name][0] == torch.float8_e4m3fn and len(shape) == 2:  # no package writes the other dtype
        quantiser = _Quantiser(shape, grid, *entries[scale], statistics)
    tensors, decode = {"weight": name, "scale": scale}, partial(_decode, grid=grid, dtype=dtype)
    return Stored(tensors, shape, dtype, f"fp8, {what}", decode, quantiser)


def _grid(entries: Entries, name: str, scale: str, block: Shape | None) -> Shape:
    """The rows and columns that share a scale."""
    shape = entries[name][1]
    if len(shape) < 2 or 0 in shape:
        damaged("the quantised weight is no matrix", name, "fp8", shape=shape)
    *before, rows, columns = shape
    of = entries[scale][1]
    if len(of) > 1 and of[:-2] != tuple(before):
        damaged("the scales do not fit the weight", scale, "fp8", shape=of, expected=(*before, rows, columns))
    if of in ((), (1,)) or of[-2:] == (1, 1):
        return rows, columns
    if of == (rows,):
        return 1, columns
    across, along = of[-2:] if len(of) > 1 else (0, 0)
    if block is not None and (across, along) == (-(-rows // block[0]), -(-columns // block[1])):
        return tuple(block)
    if len(of) < 2 or not across or not along or rows % across or columns % along:
        damaged("the scales do not fit the weight", scale, "fp8", shape=of, expected=(rows, columns))
    return rows // across, columns // along


def _decode(tensors: Mapping[str, Tensor], *, grid: Shape, dtype: torch.dtype) -> Tensor:
    weight = tensors["weight"].to(torch.float32)
    return (weight * _spread(tensors["scale"], weight.shape, grid)).to(dtype)


def _spread(scale: Tensor, shape: Shape, grid: Shape) -> Tensor:
    """The scale of each value of a weight, as float32 that broadcasts to ``shape``."""
    *_, rows, columns = shape
    scale = scale.to(torch.float32)
    if scale.ndim < 2:
        scale = scale.reshape(-1, 1)
    if grid[0] < rows:
        scale = scale.repeat_interleave(grid[0], -2)[..., :rows, :]
    if grid[1] < columns:
        scale = scale.repeat_interleave(grid[1], -1)[..., :columns]
    return scale


# --- quantising -------------------------------------------------------------------------------------------------------

_MOST = torch.finfo(torch.float8_e4m3fn).max
#: function from the largest sizes of the blocks and the dtype of the scales to the scales, and the factors that values are multiplied
#: by; None for values that are divided by the stored scales
Statistics = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class _Quantiser(Quantiser):
    """Attributes:
    weight: ``(out, in)``.
    block: the rows and columns that share a scale.
    dtype, shape: of the scales.
    statistics: the package's choice of scales.
    """

    weight: Shape
    block: Shape
    dtype: torch.dtype
    shape: Shape
    statistics: Statistics
    bits = 8
    bounds = None

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        rows, columns = values.shape
        down, along = (min(size, whole) for size, whole in zip(self.block, values.shape, strict=True))
        padded = torch.nn.functional.pad(values.abs(), (0, -columns % along, 0, -rows % down))
        most = padded.reshape(len(padded) // down, down, -1, along).amax((1, 3))  # (blocks of rows, blocks of columns)
        scale, factor = self.statistics(most, self.dtype)
        made = {"scale": scale.to(self.dtype).reshape(self.shape)}
        if factor is None:
            return {"weight": self.stored(self.grid(made).nearest(values)), **made}
        steps = values * _spread(factor, values.shape, self.block)
        return {"weight": self.stored(steps.clamp_(-_MOST, _MOST)), **made}

    def grid(self, tensors: Mapping[str, Tensor]) -> Grid:
        return Grid(_spread(tensors["scale"], self.weight, self.block), None, None)

    def stored(self, numbers: Tensor) -> Tensor:
        return numbers.to(torch.float8_e4m3fn)


def _statistics(most: Tensor, dtype: torch.dtype, *, powers: bool) -> tuple[Tensor, Tensor | None]:
    """transformers' choice: the reciprocal of the factor that takes the largest value to the largest code; with ``powers``, the power of
    two above.
    """
    factor = torch.where(most > 0, _MOST / torch.where(most > 0, most, 1.0), 1.0)
    scale = 1.0 / factor
    if powers:
        scale = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=torch.finfo(torch.float32).tiny))))
    return scale, factor if dtype == torch.float32 and not powers else None


def of_compressed(most: Tensor, _: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """compressed-tensors' choice."""
    scale = most / _MOST
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale), None
