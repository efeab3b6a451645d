"""The settings of a fold on disk, and what they are where the caller leaves open what the adapter was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.dialects import PLAIN_ONLY
from oftsurgery.adapters.reading import homes_of
from oftsurgery.adapters.trained_on import TRAINED_ON, TrainedOn, trained_on_base, trained_on_in, trained_on_said
from oftsurgery.dtypes import FORMAT_OF, float_dtype
from oftsurgery.errors import SourceWarning, StateError, printable, warn_caller
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.target import FOUR_BIT, QUANTISED, Format
from oftsurgery.formats.codecs import Rounding
from oftsurgery.stores.folder import Quantization, has_quantised_weights, holds_quantised_weights, load_dtype


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
            remedy = "leave out skip_modules and load_dtype (--skip-modules, --load-dtype): modules that are plain in the base stay plain"
            raise StateError(message, path=source.folder, remedy=remedy)
        codec = self.quantize or (self.format if self.format in QUANTISED and plain else None)
        if codec is not None:
            double = self.double_quant if trained is None or trained.format is None else trained.double_quant
            skip = tuple(self.skip_modules) if self.skip_modules is not None else None
            compute, load = (d if d is None else float_dtype(d) for d in (self.compute_dtype, self.load_dtype))
            return Quantization(codec, double and codec in FOUR_BIT, compute, skip, load)
        return None


def as_trained(
    settings: FoldSettings, source: Checkpoint, adapters: Sequence[OFTAdapter]
) -> tuple[FoldSettings, TrainedOn | None]:
    """The settings that give the adapter the base that it was trained on, and what that is where somebody says it: the
    caller (``settings.trained_on``), or else the files beside the adapters and the bases that their configs name.

    Raises:
        StateError: ``trained_on`` is not known, or contradicts other settings or the source's own format; or the files
            contradict each other.

    Warns:
        SourceWarning: files say it, and the caller does not.
    """
    quantised = holds_quantised_weights(source)
    if settings.trained_on is not None:
        trained = trained_on_said(settings.trained_on)
        if settings.quantize is not None or settings.fold_into != "quantized":
            message = "trained_on says how the base is quantised before the fold, and other settings say it too"
            remedy = "give trained_on (--trained-on), or else quantize, double_quant and fold_into (--quantize, --double-quant, --fold-into)"
            raise StateError(message, remedy=remedy)
        if quantised:
            _check_stored(trained, source)
            return settings, trained
        return _with(settings, trained, source), trained
    if quantised or settings.quantize is not None or settings.fold_into != "quantized":
        return settings, None
    certain = [TrainedOn("plain", f"its dialect {a.dialect}") for a in adapters if a.dialect in PLAIN_ONLY]
    found = certain + [one for home in homes_of(adapters) for one in trained_on_in(home)]
    found += [one for adapter in adapters for one in trained_on_base(adapter.config)]
    if len({(one.name, one.skip) for one in found}) > 1:
        said = ", ".join(f"{printable(one.source)}: {one.name}" for one in found)
        message = f"the files of the trainer do not agree on what the adapter was trained on ({said})"
        raise StateError(message, remedy="say what it was trained on: trained_on=… (--trained-on)")
    if not found:
        return settings, None
    trained = found[0]
    if not certain:
        warn_caller(
            f"the adapter was trained on {trained.name}, as {printable(trained.source)} says; trained_on=… (--trained-on) says otherwise",
            SourceWarning,
        )
    return _with(settings, trained, source), trained


def check_said(plan: CheckpointPlan, settings: FoldSettings) -> None:
    """Refuse to rotate the original weights where nobody says that the adapter was trained on them.

    Raises:
        StateError: neither the settings nor files say it.
    """
    if plan.trained_on is not None or settings.fold_into == plan.rotates:
        return
    message = (
        "the base is plain, and nobody says what the adapter was trained on: these weights, or these weights in 4 or 8 bits "
        "(QOFT); the results differ"
    )
    others = ", ".join(name for name in TRAINED_ON if name not in ("plain", "nf4-double"))
    remedy = (
        "say trained_on='plain' (--trained-on plain), or trained_on='nf4-double' (--trained-on nf4-double), which is NF4 with "
        f"double quantisation, as QLoRA's settings are; the others are {others}"
    )
    raise StateError(message, path=plan.source.folder, remedy=remedy)


def _with(settings: FoldSettings, trained: TrainedOn, source: Checkpoint) -> FoldSettings:
    """The settings of a fold into a plain source for an adapter that was trained on ``trained``."""
    if trained.format is None:
        return replace(settings, fold_into="original") if settings.format in QUANTISED else settings
    other = settings.format in FOUR_BIT and settings.format != trained.format  # the output's own double quantisation
    if settings.double_quant and not trained.double_quant and not other:
        message = f"double quantisation was asked for, but {printable(trained.source)} says that the adapter was trained on {trained.name}"
        remedy = (
            "leave out the double quantisation (--double-quant), or say what the adapter was trained on (--trained-on)"
        )
        raise StateError(message, remedy=remedy)
    format_: Any = settings.format
    if format_ == "same":  # plain as the source
        if settings.undo is not None:
            message = f"the base of an adapter that was trained on {trained.name} is quantised first, which an undo record does not take back"
            remedy = f"choose format='{trained.format}' (--format {trained.format}), or leave out the undo record (--undo), and keep the base"
            raise StateError(message, remedy=remedy)
        format_ = FORMAT_OF.get(load_dtype(source), "fp32")
    skip = trained.skip if settings.skip_modules is None else settings.skip_modules
    return replace(
        settings,
        format=format_,
        quantize=trained.format,
        double_quant=settings.double_quant if other else trained.double_quant,
        skip_modules=skip,
    )


def _check_stored(trained: TrainedOn, source: Checkpoint) -> None:
    """Refuse a source that is stored in another format than the adapter was trained on."""
    settings = source.config.get("quantization_config")
    if not isinstance(settings, dict):
        return  # the plan refuses it
    stored = "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4"))
    stored += "-double" * bool(stored != "int8" and settings.get("bnb_4bit_use_double_quant"))
    if stored != trained.name:
        message = f"the adapter was trained on {trained.name}, but the base is stored as {printable(stored)}"
        raise StateError(
            message, path=source.folder, remedy="give the base that the adapter was trained on, or its plain weights"
        )
