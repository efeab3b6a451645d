"""The public functions on models in memory fold, unfold, wrap and extract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.base_revision import warn_of_another_commit
from oftsurgery.adapters.strength import StrengthMode
from oftsurgery.calibrate.layer_inputs import Calibration, check_wanted
from oftsurgery.calibrate.sources import Source, source_of
from oftsurgery.checks.extract_adapters import ExtractedAdapter, extract_from_models
from oftsurgery.errors import StateError
from oftsurgery.folding.memory import fold_model, restore_model, undo_model, unfold_model
from oftsurgery.folding.plan import FoldPlan
from oftsurgery.folding.target import LiveFormat, check_format
from oftsurgery.folding.undo_reader import open_undo
from oftsurgery.folding.undo_writer import UndoWriter
from oftsurgery.formats.codecs import Rounding, check_rounding
from oftsurgery.live.wrapped_model import live_layers, original_hashes, read_live
from oftsurgery.live.wrapping import strip, unwrap, wrap_model
from oftsurgery.progress import shown
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.live_model import LiveStore, record_of
from oftsurgery.stores.modules import inner_model
from oftsurgery.weights.calibrate import InputsOf

from .arguments import (
    AdapterLike,
    at_strengths,
    check_is_model,
    check_one_way_back,
    load_adapter,
    loaded_adapters,
    opened_base,
    rounding_mode,
)
from .trained_on import checked_live

M = TypeVar("M", bound=nn.Module)


def fold(
    model: M,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    format: LiveFormat = "same",
    double_quant: bool = False,
    rounding: Rounding | Literal["calibrated"] | None = None,
    calibration: Any = None,
    undo: str | PathLike[str] | None = None,
    partial: bool = False,
    trained_on: str | PathLike[str] | None = None,
    strength: float | Sequence[float] = 1.0,
    strength_mode: StrengthMode = "angle",
    inplace: bool = False,
    progress: bool = False,
) -> M:
    """Merge an OFT adapter into a model's weights, in the formats that the weights have or in another format.

    >>> folded = oftsurgery.fold(model, "ADAPTER")               # a new model; `model` stays as it is
    >>> folded.oftsurgery.adapters[0].dialect                    # the record of the fold
    'peft-0.21'
    >>> path, module = folded.oftsurgery.worst                   # what rounding cost, module by module
    >>> module.format, module.error < 0.15, module.kept > 0.9
    ('nf4 (double quantisation)', True, True)
    >>> plain = oftsurgery.fold(live)                            # a PeftModel's own adapter, into its plain base model
    >>> half = oftsurgery.fold(live, format="bf16")              # 16 bits from 4 bits, without a second rounding to 4 bits
    >>> type(half.get_submodule(path)).__name__, half.dtype, half.oftsurgery.worst[1].error < 0.005
    ('Linear', torch.bfloat16, True)

    Each targeted weight is dequantised exactly, rotated by blocks in float32, and stored once, in its own format or in
    ``format``: NF4, FP4 (double quantisation and ``quant_storage`` are kept), int8 or a float dtype. The result computes what
    the live adapter computes, up to the rounding of that format. The fold measures the rounding of each module and states the
    total in one :class:`~oftsurgery.RoundingWarning`. After any error the model is as it was.

    Args:
        model: a torch or transformers model, plain or over bitsandbytes layers, compiled or spread by accelerate; or a
            ``PeftModel``, whose live adapters are folded into its plain base model. With another ``format`` than ``"same"`` also a
            model over layers of GPTQ, AWQ, HQQ, compressed-tensors, torchao or FP8; plain layers take their places.
        adapter: an :class:`~oftsurgery.OFTAdapter`, or an argument of :func:`load_adapter`; several adapters are the live
            chain ``x · Ra · Rb`` of peft's active adapters ``[a, b]``. For a model with live adapters: None for the active
            ones, or names.
        format: the format of the result. ``"same"``: each weight keeps its format. ``"bf16"``, ``"fp16"`` or ``"fp32"``: all
            parameters and persistent buffers of floats take this dtype, and plain layers take the place of bitsandbytes'
            layers. ``"nf4"``, ``"fp4"`` or ``"int8"``: every quantised weight takes this format; in a model without a quantised
            weight, these are the modules that transformers' loading would quantise. The config and the flags of a
            transformers model follow, so that ``save_pretrained`` and ``from_pretrained`` work. Where a format changes, the
            record's ``base`` names the format, and the base and undo records cannot restore the model.
        double_quant: quantise the statistics of ``format="nf4"`` or ``"fp4"`` too.
        rounding: how quantised weights are rounded in their format. ``"preserve"`` keeps the adapter's change, where
            nearest rounding would put most weights back; a weight that the adapter moves by more than half a step is
            rounded as by ``"grid"`` (int8: to nearest). ``"nearest"`` rounds as bitsandbytes does, bit for bit.
            ``"mse"`` scales each 4-bit block by the factor that makes its squared error least, in place of its absmax;
            ``"grid"`` finds nearly that factor in half the time; both round int8 to nearest. ``"calibrated"`` chooses
            codes that make up for each other's errors on the layer's own inputs, in 4 bits and in int8; this mode needs
            ``calibration``. A layer that calibration does not improve on held-out inputs is rounded as by ``"preserve"``,
            and a :class:`~oftsurgery.CalibrationWarning` names the layer.
            None: ``"calibrated"`` with a calibration, else ``"preserve"``.
        calibration: inputs of the kind that the model is for: an iterable of batches as the model's forward takes them
            (tensors, tuples of arguments, or mappings of keyword arguments, with ``attention_mask`` where there is
            padding), 100 to 500 texts in all. The batches are read once and held in memory. ``"self"`` needs no data: a language
            model writes 64 texts of 256 tokens with the adapter live, from a fixed seed, and another text model reads texts that
            are built in. The name of a file ``oftsurgery_calibration.json`` stands for the texts that such a fold on disk wrote.
        undo: a file to write, from which :func:`unfold` restores every byte that the fold changes; its size is some tenths
            of a bit a weight. The file appears when the fold is done; an existing file is refused.
        partial: fold an adapter that lacks modules which its own config targets (one rank's part of a training that was
            spread over several ranks). These modules stay as they are, and the record names them.
        trained_on: what the adapter was trained on, as for :func:`fold_checkpoint`; the model must be it. None: a plain model
            must be what the files of the trainer beside the adapter say, where they say it.
        strength: how strongly the adapter is folded: 1 as it was trained; for several adapters, one strength or one for each.
        strength_mode: what a strength s other than 1 means, a key of :data:`oftsurgery.STRENGTH_MODES`. ``"angle"``: each
            rotation by s times its angles, which stays a rotation. ``"linear"``: ``W + s·(W' - W)``. The others are what an
            image tool computes: ``"kohya"``, ``"lycoris"``, ``"lycoris-2"``, ``"webui"``, ``"comfyui"``, ``"oftv2-node"``; the last
            three also do at strength 1 what the tool does there.
        inplace: change ``model`` itself, layer by layer on its device. Replaced weights wait in CPU memory until the
            last layer is done. Otherwise the result is a new model that shares every unchanged tensor with ``model``.
        progress: show a bar.

    Returns:
        the folded model; its ``oftsurgery`` attribute is the :class:`~oftsurgery.FoldRecord`.

    Raises:
        AdapterError, DialectError: the adapter cannot be used, or lacks modules which its own config targets.
        MatchError: an adapter's module or tensor matches nothing in the model, or two of them match one.
        ShapeError: a rotation does not fit its weight.
        StateError: the model carries this adapter already, is merged by peft, is not loaded or not quantised yet, or cannot
            take ``format`` …
        FormatError: a targeted layer is of a kind that cannot be folded.
        NonFiniteError: the adapter, the base or the result holds NaN or infinity.
        CalibrationError: the calibration is empty, holds text, or does not fit the model's forward.
    Warns:
        RoundingWarning, WeakAdapterWarning, UntieWarning, IdleWarning, CalibrationWarning: at most one of each, when the
            fold is done.
    """
    mode = rounding_mode(rounding, calibration)
    check_is_model(model)
    check_format(format, double_quant=double_quant)
    source = source_of(calibration) if mode == "calibrated" else None
    with (
        _prepared_fold(
            model,
            adapter,
            trained_on,
            inplace=inplace,
            incomplete=partial,
            strength=strength,
            strength_mode=strength_mode,
        ) as fold_prepared,
        nullcontext() if undo is None else UndoWriter(Path(undo).expanduser()) as writer,
        shown(progress, "fold", "layer") as step,
        _calibrator(source, progress) as calibrate,
    ):
        return fold_prepared(  # type: ignore[return-value]
            format=format,
            double_quant=double_quant,
            rounding=mode,
            calibrate=calibrate,
            calibration={} if source is None else source.facts,
            undo=writer,
            base_at_hand=not inplace,
            progress=step,
        )


@contextmanager
def _prepared_fold(
    model: nn.Module,
    adapter: Any,
    trained_on: Any = None,
    *,
    inplace: bool,
    incomplete: bool,
    strength: Any,
    strength_mode: StrengthMode,
) -> Iterator[Callable[..., nn.Module]]:
    """``fold_model`` for a model and its adapters; a model that :func:`wrap` gave is unwrapped, and its active adapters are
    folded in their present state.
    """
    if not live_layers(model):
        names, adapters = _names_or_adapters(model, adapter)
        if adapters is None:
            _check_whole(strength, strength_mode)
        else:
            adapters = at_strengths(adapters, strength, strength_mode)
        warn_of_another_commit(getattr(inner_model(model), "config", None), adapters or ())
        on = checked_live(model, adapters, trained_on)
        yield partial(
            fold_model, model, adapters, names=names, partial_adapters=incomplete, trained_on=on, inplace=inplace
        )
        return
    if adapter is not None:
        raise StateError(
            "the model carries live adapters, and an adapter to fold was given too",
            remedy="call fold(wrapped) to fold the active adapters, or load the plain base model to fold an adapter from files",
        )
    checked_live(model, None, trained_on)
    _check_whole(strength, strength_mode)
    trained, already = read_live(model), original_hashes(model)
    base = model if inplace else unwrap(model)
    stripped = strip(inner_model(model)) if inplace else []
    try:
        yield partial(fold_model, base, trained, already=already, inplace=True)
    except BaseException:
        for step_back in reversed(stripped):
            step_back()
        raise


def _check_whole(strength: Any, mode: str) -> None:
    """Refuse a strength for live adapters.

    Raises:
        StateError: as said.
    """
    if strength != 1 or mode != "angle":
        raise StateError(
            "the model carries live adapters, which compute at strength 1, and another strength was given",
            remedy="load the plain base model, and fold the adapter's files: fold(base, adapter, strength=…)",
        )


@contextmanager
def _calibrator(source: Source | None, progress: bool) -> Iterator[Callable[[nn.Module, FoldPlan], InputsOf] | None]:
    """A function that gathers the inputs of a model's layers over a calibration, with its own progress bar."""
    if source is None:
        yield None
        return
    with shown(progress, "calibrate", "batch") as step:

        def calibrate(model: nn.Module, plan: FoldPlan) -> InputsOf:
            jobs = {r.path: (r.chain, r.format) for r in plan.rotate if r.takes_inputs(r.format)}
            check_wanted(jobs)
            return Calibration(model, plan.adapters, list(jobs), source.batches, progress=step, jobs=jobs)

        yield calibrate


def unfold(
    folded: M,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    base: nn.Module | str | PathLike[str] | None = None,
    undo: str | PathLike[str] | None = None,
    rounding: Rounding = "preserve",
    inplace: bool = False,
    progress: bool = False,
) -> M:
    """Take the last fold out of a model again.

    >>> folded = oftsurgery.fold(model, "ADAPTER", undo="fold.undo")
    >>> base = oftsurgery.unfold(folded, base=model)             # exact, checked by hash
    >>> base = oftsurgery.unfold(folded, undo="fold.undo")       # exact, without the base
    >>> base = oftsurgery.unfold(folded, "ADAPTER")              # rotated back, rounded once more

    After any error the model is as it was.

    Args:
        folded: a model that :func:`fold` gave, or a model that holds the same weights.
        adapter: the adapter that was folded. Its true inverse rotates the weights back, and quantised weights are rounded
            once more: they come back inexactly, and an :class:`~oftsurgery.UnfoldWarning` states the error.
        base: the model that was folded, or the folder of its checkpoint: its bytes are restored exactly, and checked
            against the record's hashes.
        undo: the file that ``fold(…, undo=…)`` wrote: the bytes that the fold changed are restored exactly, and checked
            against the hashes in the file. A model that was saved and loaded again can be unfolded too.
        rounding: how quantised weights that are rotated back are rounded, as for :func:`fold`.
        inplace: change ``folded`` itself.
        progress: show a bar.

    Returns:
        the model without the fold; its ``oftsurgery`` attribute is the record of the folds that remain, or None.

    Raises:
        StateError: not exactly one of ``adapter``, ``base`` and ``undo`` is given, or the last fold is another one.
        IntegrityError: ``base`` is not the model that was folded, or ``folded`` is not what the fold left.
        UndoError: the file ``undo`` is damaged, or not an undo record.
        OFTSurgeryError: as :func:`fold`.
    Warns:
        UnfoldWarning: the result differs from the base by rounding.
    """
    check_rounding(rounding)
    check_is_model(folded)
    check_one_way_back(
        (adapter, base, undo),
        "call unfold(model, adapter), which rotates back, or unfold(model, base=…) or unfold(model, undo=…), which restore exactly",
    )
    if undo is not None:
        record = open_undo(Path(undo).expanduser(), record_of(folded))
        return undo_model(folded, record, inplace=inplace)  # type: ignore[return-value]
    if base is not None:
        source = LiveStore(base) if isinstance(base, nn.Module) else FolderStore(opened_base(base, record_of(folded)))
        return restore_model(folded, source, inplace=inplace)  # type: ignore[return-value]
    _, adapters = _names_or_adapters(folded, adapter)
    with shown(progress, "unfold", "layer") as step:
        return unfold_model(  # type: ignore[return-value]
            folded, adapters or [], rounding=rounding, inplace=inplace, progress=step
        )


def wrap(
    model: M,
    adapter: AdapterLike,
    *,
    adapter_name: str = "default",
    partial: bool = False,
    trained_on: str | PathLike[str] | None = None,
    inplace: bool = False,
) -> M:
    """Put an adapter on a model unmerged: live layers that rotate their input, train, and merge or unmerge one by one.

    >>> wrapped = oftsurgery.wrap(model, "ADAPTER")
    >>> layer = wrapped.get_submodule("model.layers.0.self_attn.q_proj")
    >>> error = layer.merge()                                    # this layer alone, in its own format
    >>> layer.unmerge()                                          # byte for byte as before
    >>> folded = oftsurgery.fold(wrapped)                        # all layers, as they are trained now

    Args:
        model: as for :func:`fold`, or a wrapped model, which gets a further adapter by another name.
        adapter: an :class:`~oftsurgery.OFTAdapter`, or an argument of :func:`load_adapter`.
        adapter_name: the name under which the adapter is active.
        partial, trained_on: as for :func:`fold`.
        inplace: wrap ``model`` itself; otherwise the result is a new model that shares the tensors of ``model``.

    Returns:
        the model with the targeted layers replaced by those of :mod:`oftsurgery.live`.

    Raises:
        OFTSurgeryError: as :func:`fold`; after any error the model is as it was.
    """
    loaded = adapter if isinstance(adapter, OFTAdapter) else load_adapter(adapter)
    warn_of_another_commit(getattr(inner_model(model), "config", None), [loaded])
    checked_live(model, [loaded], trained_on)
    return wrap_model(model, loaded, adapter_name=adapter_name, incomplete=partial, inplace=inplace)  # type: ignore[return-value]


def extract(
    base: nn.Module,
    merged: nn.Module,
    block_size: int | None = None,
    *,
    side: Literal["input", "output"] | None = None,
    progress: bool = False,
) -> ExtractedAdapter:
    """Get an OFT adapter back out of a model that the adapter was merged into.

    >>> found = oftsurgery.extract(plain, oftsurgery.fold(plain, "ADAPTER"))
    >>> found.explained > 0.999                                  # of the difference of the two models
    True
    >>> errors = found.save("EXTRACTED")                         # as peft's current release loads it

    Args:
        base: the model without the adapter, plain or over bitsandbytes layers.
        merged: the same model with the adapter in its weights, in any format.
        block_size: the rotations' block size; None to detect one for each width of layer. A given block size yields the
            best rotations of that size for any difference (a full fine-tune, a LoRA merge).
        side: whether the inputs or the outputs of the layers are rotated (kohya, LyCORIS, peft ≤ 0.13); None: the inputs, or else the
            outputs where rotations of these predict the difference and those of the inputs do not.
        progress: show a bar.

    Returns:
        an :class:`~oftsurgery.ExtractedAdapter` with the exact Cayley map; ``save_for("lycoris", file)`` writes rotations of outputs.
        Its ``report`` has each module's residual,
        explained fraction and estimated error. Weights without a rotation are left out.

    Raises:
        ExtractionError: nothing is rotated, or the weights do not tell the block size.
        MatchError: the models have different layers.
        ShapeError: ``block_size`` does not divide a layer's features.
        StateError, FormatError, NonFiniteError: as :func:`fold`.
    Warns:
        ExtractionWarning: rotations do not explain all of the difference.
    """
    for model in (base, merged):
        check_is_model(model)
    with shown(progress, "extract", "layer") as step:
        return extract_from_models(base, merged, block_size, side=side, progress=step)


def _names_or_adapters(
    model: nn.Module, adapter: AdapterLike | Sequence[AdapterLike] | None
) -> tuple[list[str] | None, list[OFTAdapter] | None]:
    """(names of live adapters, None) or (None, loaded adapters)."""
    given = [] if adapter is None else list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    configs_of_peft = getattr(inner_model(model), "peft_config", {})
    if isinstance(configs_of_peft, Mapping) and configs_of_peft and all(isinstance(a, str) for a in given):
        return [str(a) for a in given] or None, None
    return None, None if adapter is None else loaded_adapters(adapter)
