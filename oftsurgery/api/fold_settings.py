"""The settings of a fold on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal

from oftsurgery.adapters.strength import StrengthMode
from oftsurgery.adapters.trained_on import TrainedOn
from oftsurgery.dtypes import float_dtype
from oftsurgery.errors import StateError
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.folding.target import FOUR_BIT, QUANTISED, Format
from oftsurgery.formats.codecs import Rounding
from oftsurgery.stores.folder import Quantization, has_quantised_weights


@dataclass(frozen=True)
class FoldSettings:
    """The arguments of :func:`fold_checkpoint` that decide the output."""

    format: Format = "same"
    quantize: str | None = None
    double_quant: bool = False
    compute_dtype: str | None = None
    load_dtype: str | None = None
    skip_modules: Sequence[str] | None = None
    fold_into: Literal["quantized", "original"] = "quantized"
    rounding: Rounding | Literal["calibrated"] | None = None
    undo: str | PathLike[str] | None = None
    max_shard_size: int | str = "5GB"
    tokenizer: Literal["adapter", "base"] | str | PathLike[str] | None = None
    revision: str | None = None
    partial: bool = False
    trained_on: str | PathLike[str] | None = None
    component: str | None = None
    variant: str | None = None
    strength: float | Sequence[float] = 1.0
    strength_mode: StrengthMode = "angle"

    def quantization(self, source: Checkpoint, trained: TrainedOn | None) -> Quantization | None:
        """The quantisation of a plain source before the fold, or None; ``double_quant`` is then of the output alone where
        ``trained`` says the base's own.

        Raises:
            StateError: double quantisation is asked for without a quantisation, or a dtype is not known.
        """
        if self.double_quant and not {self.quantize, self.format} & {*FOUR_BIT}:
            message = "double quantisation was asked for, but nothing is to be quantised to 4 bits"
            remedy = "name the 4-bit type too: format='nf4' (--format nf4) or quantize='nf4' (--quantize nf4)"
            raise StateError(message, remedy=remedy)
        plain = not has_quantised_weights(source)
        if not plain and (self.skip_modules is not None or self.load_dtype is not None):
            message = "the base is stored quantised, so nothing is left to say of how its plain weights are loaded and quantised"
            remedy = "leave out skip_modules=… (--skip-modules) and load_dtype=… (--load-dtype): modules that are plain in the base stay plain"
            raise StateError(message, path=source.folder, remedy=remedy)
        codec = self.quantize or (self.format if self.format in QUANTISED and plain else None)
        if codec is not None:
            double = self.double_quant if trained is None or trained.format is None else trained.double_quant
            skip = tuple(self.skip_modules) if self.skip_modules is not None else None
            compute, load = (d if d is None else float_dtype(d) for d in (self.compute_dtype, self.load_dtype))
            return Quantization(codec, double and codec in FOUR_BIT, compute, skip, load)
        return None


@dataclass(frozen=True)
class SettingsOfOne(FoldSettings):
    """The settings of one model of a pipeline that has plain and quantised models.

    Attributes:
        as_stored: the ``trained_on`` that says of each model that the adapter was trained on it as it is stored; for messages.
    """

    as_stored: str = ""
