"""A :class:`Target` says in which format a fold stores each tensor, in memory and on disk alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from oftsurgery.dtypes import DENSE, FLOATS
from oftsurgery.errors import StateError, printable
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.formats.encoded_weight import WeightFormat

Format = Literal["same", "bnb", "fp32", "fp16", "bf16", "nf4", "fp4", "int8"]
LiveFormat = Literal["same", "fp32", "fp16", "bf16", "nf4", "fp4", "int8"]
QUANTISED = tuple(name for name, kind in FORMATS.items() if kind.quantised)
FOUR_BIT = tuple(name for name in QUANTISED if FORMATS[name].codes_per_element == 2)


@dataclass(frozen=True)
class Target:
    """The formats that a fold writes.

    >>> Target("bf16").weight(WeightFormat("nf4", (4, 64), blocksize=64)).label
    'bfloat16'

    Attributes:
        format: ``"same"``; or a name of :data:`~oftsurgery.dtypes.DENSE`, for all tensors of floats; or a name of
            :data:`QUANTISED`, for the weights that are quantised, or that loading would quantise in a plain model.
        double_quant: whether the statistics of 4-bit weights are quantised too.
        dtype: the model's dtype, to which 4-bit weights dequantise that were int8.
    """

    format: str = "same"
    double_quant: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def dense(self) -> torch.dtype | None:
        """The dtype of all tensors of floats, or None."""
        return DENSE.get(self.format)

    @property
    def codec(self) -> str | None:
        """The format of all quantised weights, or None."""
        return self.format if self.format in QUANTISED else None

    def weight(self, home: WeightFormat, *, quantises: bool = False) -> WeightFormat:
        """The format in which a weight is stored that was stored as ``home``; ``quantises`` tells whether a plain weight becomes
        quantised.
        """
        if self.dense is not None:
            return WeightFormat("dense", home.shape, self.dense)
        if self.codec is None or not (home.quantised or quantises):
            return home
        dtype = home.dtype if home.kind.own_dtype is None else self.dtype
        return FORMATS[self.codec].in_place_of(
            home, dtype if dtype in DENSE.values() else torch.float32, self.double_quant
        )

    def plain(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a plain tensor that has ``dtype``."""
        return self.dense if self.dense is not None and dtype in FLOATS else dtype


def check_format(format: str, *, double_quant: bool = False, others: tuple[str, ...] = ("same",)) -> None:
    """Refuse a format that is not known, and double quantisation where the format has no 4-bit statistics.

    Args:
        others: the formats that are known beside those of :data:`~oftsurgery.dtypes.DENSE` and :data:`QUANTISED`.
    """
    known = (*others, *DENSE, *QUANTISED)
    if format not in known:
        remedy = f"choose one of {', '.join(known)} (--format)"
        raise StateError(f"the format {printable(format)!r} is not known", remedy=remedy)
    if double_quant and format not in FOUR_BIT:
        message = f"double quantisation was asked for, but the format {format} does not quantise the statistics of 4-bit weights"
        remedy = "choose format='nf4' or 'fp4', or leave out double_quant"
        raise StateError(message, remedy=remedy)
