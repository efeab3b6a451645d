"""What an adapter was trained on, as the caller or files say it, beside the base that is at hand: the settings of a fold on disk
follow it, and a model in memory must be it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.dialects import PLAIN_ONLY
from oftsurgery.adapters.reading import homes_of
from oftsurgery.adapters.trained_on import TRAINED_ON, TrainedOn, trained_on_base, trained_on_in, trained_on_said
from oftsurgery.dtypes import FORMAT_OF
from oftsurgery.errors import SourceWarning, StateError, printable, warn_caller
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.target import FOUR_BIT, QUANTISED
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.stores.folder import holds_quantised_weights, load_dtype
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.modules import distinct, modules_of

from .fold_settings import FoldSettings, SettingsOfOne


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
    if source.stored_as is not None:
        return _as_dequantised(settings, source, adapters), None
    quantised = holds_quantised_weights(source)
    if settings.trained_on is not None:
        trained = trained_on_said(settings.trained_on)
        if settings.quantize is not None or settings.fold_into != "quantized":
            message = "trained_on=… (--trained-on) says how the base is quantised before the fold, and other arguments say it too"
            remedy = "leave out quantize=… (--quantize) and fold_into=… (--fold-into), or leave out trained_on=… (--trained-on)"
            raise StateError(message, remedy=remedy)
        if quantised:
            return settings, _stored_so([trained], source, settings)
        return _with(settings, trained, source), trained
    if quantised:
        return settings, _stored_so(_in_files(adapters), source, settings)
    if settings.quantize is not None or settings.fold_into != "quantized":
        return settings, None
    found = _found(adapters)
    if found is None:
        return settings, None
    if not found.certain:
        warn_caller(
            f"the adapter was trained on {found.name}, as {found.said_by} says; trained_on=… (--trained-on) says otherwise",
            SourceWarning,
        )
    return _with(settings, found, source), found


def settings_of_each(settings: FoldSettings, models: Mapping[str, Checkpoint]) -> dict[str, FoldSettings]:
    """The settings of a fold of each model of a pipeline: what ``trained_on`` says of the model, and what the other arguments say of
    plain models alone where some of the models are quantised.

    Args:
        models: the models that the fold changes.

    Raises:
        StateError: ``trained_on`` names a model that the adapters do not change.
    """
    said = _said_of_each(settings.trained_on)
    unknown = next((name for name in said or {} if name not in models), None)
    if unknown is not None:
        message = f"trained_on=… (--trained-on) names {printable(unknown)!r}, which is none of the models that the adapters change"
        raise StateError(message, remedy=f"name models of these: {', '.join(map(printable, models))}")
    stored = {
        name: _stored_name(model) if holds_quantised_weights(model) else "plain" for name, model in models.items()
    }
    mixed = len({name == "plain" for name in stored.values()}) == 2
    found: dict[str, FoldSettings] = {}
    for name, kind in stored.items():
        own = settings if said is None else replace(settings, trained_on=said.get(name))
        if mixed:
            given = {f.name: getattr(own, f.name) for f in fields(FoldSettings)}
            own = SettingsOfOne(**given, as_stored=",".join(f"{n}={k}" for n, k in stored.items()))
        if mixed and kind != "plain":
            quantized = None if own.quantize is None else own.quantize + "-double" * own.double_quant
            own = replace(own, fold_into="quantized", skip_modules=None, load_dtype=None)
            if quantized == kind:
                own = replace(own, quantize=None, double_quant=own.double_quant and own.format in FOUR_BIT)
        found[name] = own
    return found


def _said_of_each(said: str | PathLike[str] | None) -> dict[str, str] | None:
    """``{model: what the adapter was trained on}`` of a text ``unet=nf4,text_encoder=plain``; None for anything else."""
    if not isinstance(said, str) or "=" not in said or Path(said).expanduser().is_file():
        return None
    return {name.strip(): kind.strip() for name, _, kind in (part.partition("=") for part in said.split(","))}


def _of_each(settings: FoldSettings) -> str:
    """The remedy of a pipeline with plain and quantised models; empty elsewhere."""
    if not isinstance(settings, SettingsOfOne):
        return ""
    return f"; or say it of each model of the pipeline: trained_on='{settings.as_stored}' (--trained-on {settings.as_stored})"


def _as_dequantised(settings: FoldSettings, source: Checkpoint, adapters: Sequence[OFTAdapter]) -> FoldSettings:
    """The settings of a fold into a base that is read dequantised: the adapter turns the dequantised weights, which are then rounded once.

    Raises:
        StateError: the caller or the trainer's files say that the adapter was trained on bitsandbytes' formats.
    """
    said = [] if settings.trained_on is None else [trained_on_said(settings.trained_on)]
    found = said or _in_files(adapters)
    if settings.quantize is not None or (found and all(one.format is not None for one in found)):
        what = (
            f"in {settings.quantize}"
            if settings.quantize is not None
            else f"on {found[0].name}, as {found[0].said_by} says"
        )
        message = f"the adapter was trained {what}, but the base is stored as {source.stored_as}"
        remedy = (
            "give the base that the adapter was trained on, or its plain weights; or leave out quantize=… (--quantize) and say "
            f"trained_on='plain' (--trained-on plain): the adapter was trained on this base, as {source.stored_as} dequantises it"
        )
        raise StateError(message, path=source.folder, remedy=remedy)
    return replace(settings, fold_into="original")


def checked_live(
    model: nn.Module, adapters: Sequence[OFTAdapter] | None, said: str | PathLike[str] | None
) -> TrainedOn | None:
    """What adapters for a model in memory were trained on, where somebody says it: the caller (``said``), or else files.

    Args:
        adapters: None for the adapters that the model carries.

    Raises:
        StateError: the adapters were trained on weights in another format than the model's; or ``said`` is not known, or the
            files contradict each other.
    """
    if adapters is None:
        if said is not None:
            message = "the model carries live adapters, so its own weights are what the adapters are trained on"
            raise StateError(message, remedy="leave out trained_on")
        return None
    layers = [Layer(path, module) for path, module in distinct(modules_of(model)).items()]
    quantised = [layer for layer in layers if layer.quantised]
    if said is not None:
        found = [trained_on_said(said)]
    elif quantised:
        found = _in_files(adapters)
    else:
        found = [one for one in [_found(adapters)] if one is not None]
    if not found:
        return None
    stored = {_name_of(layer.read()[1]) for layer in quantised} or {"plain"}
    trained = next((one for one in found if one.name in stored), None)
    if trained is None:
        trained, held = found[0], "plain" if stored == {"plain"} else f"in {', '.join(sorted(stored))}"
        message = (
            f"the adapter was trained on {trained.name}, as {trained.said_by} says, but the model's weights are {held}"
        )
        remedy = (
            "load the model with the BitsAndBytesConfig of the training, and choose format='bf16' for a result in 16 bits; or fold the "
            "checkpoint on disk (oftsurgery.fold_checkpoint); trained_on='plain' folds plain weights as they are"
        )
        raise StateError(message, remedy=remedy)
    return trained


def _found(adapters: Sequence[OFTAdapter]) -> TrainedOn | None:
    """What the adapters were trained on by the adapters' files and dialects; None where nothing says it.

    Raises:
        StateError: the files contradict each other.
    """
    found = [TrainedOn("plain", f"its dialect {a.dialect}", certain=True) for a in adapters if a.dialect in PLAIN_ONLY]
    found += _in_files(adapters)
    found += [one for adapter in adapters for one in trained_on_base(adapter.config)]
    if len({(one.name, one.skip) for one in found}) > 1:
        said = ", ".join(f"{one.said_by}: {one.name}" for one in found)
        message = f"the files of the trainer do not agree on what the adapter was trained on ({said})"
        raise StateError(message, remedy="say what it was trained on: trained_on=… (--trained-on)")
    return found[0] if found else None


def _in_files(adapters: Sequence[OFTAdapter]) -> list[TrainedOn]:
    return [one for home in homes_of(adapters) for one in trained_on_in(home)]


def _name_of(stored: WeightFormat) -> str:
    return f"{stored.codec}-double" if stored.nested_blocksize else stored.codec


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
        f"double quantisation, as QLoRA's settings are; the others are {others}{_of_each(settings)}"
    )
    raise StateError(message, path=plan.source.folder, remedy=remedy)


def _with(settings: FoldSettings, trained: TrainedOn, source: Checkpoint) -> FoldSettings:
    """The settings of a fold into a plain source for an adapter that was trained on ``trained``."""
    if trained.format is None:
        return replace(settings, fold_into="original") if settings.format in QUANTISED else settings
    other = settings.format in FOUR_BIT and settings.format != trained.format  # the output's own double quantisation
    if settings.double_quant and not trained.double_quant and not other:
        message = f"double quantisation was asked for, but {trained.said_by} says that the adapter was trained on {trained.name}"
        remedy = "leave out double_quant=True (--double-quant), or say what the adapter was trained on: trained_on=… (--trained-on)"
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


def _stored_name(source: Checkpoint) -> str:
    """The name of the format of a quantised source, by its config."""
    settings = source.config.get("quantization_config") or {}
    stored = "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4"))
    return stored + "-double" * bool(stored != "int8" and settings.get("bnb_4bit_use_double_quant"))


def _stored_so(found: Sequence[TrainedOn], source: Checkpoint, fold: FoldSettings) -> TrainedOn | None:
    """The one of ``found`` that a quantised source is stored as; None where nothing is found.

    Raises:
        StateError: the source is stored in another format than the adapter was trained on.
    """
    settings = source.config.get("quantization_config")
    if not found or not isinstance(settings, dict):
        return None  # without settings, the plan refuses the source
    stored = _stored_name(source)
    so = next((one for one in found if one.name == stored), None)
    if so is None:
        message = (
            f"the adapter was trained on {found[0].name}, as {found[0].said_by} says, but the base is stored as "
            f"{printable(stored)}"
        )
        remedy = "give the base that the adapter was trained on, or its plain weights"
        if stored in TRAINED_ON:
            remedy += (
                f"; or say that the adapter was trained on this base: trained_on='{stored}' (--trained-on {stored})"
            )
        raise StateError(message, path=source.folder, remedy=remedy + _of_each(fold))
    return so
