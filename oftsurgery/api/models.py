"""The public functions on models in memory: fold, unfold, wrap, extract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.calibrate.batches import Batch, read_batches
from oftsurgery.calibrate.layer_inputs import Calibration
from oftsurgery.checks.extract_adapters import ExtractedAdapter, extract_from_models
from oftsurgery.errors import StateError
from oftsurgery.folding.memory import fold_model, restore_model, undo_model, unfold_model
from oftsurgery.folding.plan import FoldPlan
from oftsurgery.folding.undo_reader import open_undo
from oftsurgery.folding.undo_writer import UndoWriter
from oftsurgery.formats.codecs import Rounding, check_rounding
from oftsurgery.live.wrapped_model import live_layers, original_hashes, read_live
from oftsurgery.live.wrapping import strip, unwrap, wrap_model
from oftsurgery.progress import shown
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.live_model import LiveStore, record_of
from oftsurgery.stores.ties import inner_model
from oftsurgery.weights.calibrate import InputsOf

from .arguments import (
    AdapterLike,
    check_is_model,
    check_one_way_back,
    load_adapter,
    loaded_adapters,
    opened_base,
    rounding_mode,
)

M = TypeVar("M", bound=nn.Module)


def fold(
    model: M,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    rounding: Rounding | Literal["calibrated"] | None = None,
    calibration: Any = None,
    undo: str | PathLike[str] | None = None,
    partial: bool = False,
    inplace: bool = False,
    progress: bool = False,
) -> M:
    """Merge an OFT adapter into a model's weights, in the formats that they have.

    Each targeted weight is dequantised exactly, rotated by blocks in float32, and stored again as it was: NF4, FP4
    (double quantisation and ``quant_storage`` kept), int8 or a float dtype. The result computes what the live adapter
    computes, up to the rounding of that storage, which is measured for each module and stated in one
    :class:`~oftsurgery.RoundingWarning`. After any error the model is as it was.

    Args:
        model: a torch or transformers model, plain or over bitsandbytes layers, compiled or spread by accelerate; or a
            ``PeftModel`` whose live adapters are to be folded, which gives the plain base model.
        adapter: an :class:`~oftsurgery.OFTAdapter` or what :func:`load_adapter` takes; several are the live chain ``x ·
            Ra · Rb``, as peft's active adapters ``[a, b]``. For a model with live adapters: None for the active ones,
            or names.
        rounding: of quantised weights; the format stays as it is. ``"preserve"``: what the adapter changed is kept, where
            nearest rounding would put most weights back to where they were; a weight that the adapter moves by more than
            half a step is rounded as by ``"grid"`` (int8: to nearest). ``"nearest"``: as bitsandbytes rounds, bit for
            bit. ``"mse"``: each 4-bit block is scaled by what makes its squared error least, in place of its absmax;
            ``"grid"``: by nearly that, found in half the time; int8 is rounded to nearest in both.
            ``"calibrated"``: the codes make up for each other's errors on the layer's own inputs, in 4 bits and in
            int8; needs ``calibration``, and is implied by it. Where that is not better on held-out inputs, the layer is
            as with ``"preserve"``, and a :class:`~oftsurgery.CalibrationWarning` names it.
            None: ``"calibrated"`` with a calibration, else ``"preserve"``.
        calibration: inputs of the kind that the model is for: an iterable of batches as its forward takes them (tensors,
            tuples of arguments, or mappings of keyword arguments, with ``attention_mask`` where there is padding), 100
            to 500 texts in all. Read once and held in memory.
        undo: a file to write, from which :func:`unfold` gives every byte back that the fold changes, some tenths of a
            bit a weight. It appears when the fold is done, and is not written over.
        partial: fold an adapter that lacks modules which its own config targets (one rank's part of a training that was
            spread over several); they stay as they are, and are in the record.
        inplace: change ``model`` itself, layer by layer on its device. Replaced weights wait in CPU memory until the
            last layer is done. Otherwise the result is a new model that shares every tensor that it did not change, and
            ``model`` stays as it is.
        progress: show a bar.

    Returns:
        the folded model; its ``oftsurgery`` attribute is the :class:`~oftsurgery.FoldRecord`.

    Raises:
        AdapterError, DialectError: the adapter cannot be used, or lacks modules which its own config targets.
        MatchError: an adapter's module or tensor matches nothing in the model, or two match one.
        ShapeError: it does not fit.
        StateError: the model carries this adapter already, is merged by peft, not loaded, not quantised yet …
        FormatError: a targeted layer is of a kind that cannot be folded.
        NonFiniteError: NaN or infinity, in the adapter, the base or the result.
        CalibrationError: the calibration is empty, text, or not what the model takes.
    """
    mode = rounding_mode(rounding, calibration)
    check_is_model(model)
    batches = read_batches(calibration) if mode == "calibrated" else None
    with (
        _prepared_fold(model, adapter, inplace=inplace, incomplete=partial) as fold_prepared,
        nullcontext() if undo is None else UndoWriter(Path(undo).expanduser()) as writer,
        shown(progress, "fold", "layer") as step,
        _calibrator(batches, progress) as calibrate,
    ):
        return fold_prepared(rounding=mode, calibrate=calibrate, undo=writer, progress=step)  # type: ignore[return-value]


@contextmanager
def _prepared_fold(
    model: nn.Module, adapter: Any, *, inplace: bool, incomplete: bool
) -> Iterator[Callable[..., nn.Module]]:
    """``fold_model`` of a model and what is to be folded into it: of one that :func:`wrap` gave, the active adapters as
    they are trained now, into the plain model.
    """
    if not live_layers(model):
        names, adapters = _names_or_adapters(model, adapter)
        yield partial(fold_model, model, adapters, names=names, partial_adapters=incomplete, inplace=inplace)
        return
    if adapter is not None:
        raise StateError(
            "the model carries live adapters, and an adapter to fold was given too",
            remedy="fold(wrapped) folds its active adapters; load the plain base model to fold files into it",
        )
    trained, already = read_live(model), original_hashes(model)
    base = model if inplace else unwrap(model)
    stripped = strip(inner_model(model)) if inplace else []
    try:
        yield partial(fold_model, base, trained, already=already, inplace=True)
    except BaseException:
        for step_back in reversed(stripped):
            step_back()
        raise


@contextmanager
def _calibrator(
    batches: Sequence[Batch] | None, progress: bool
) -> Iterator[Callable[[nn.Module, FoldPlan], InputsOf] | None]:
    """What gathers the inputs of a model's layers over ``batches``, with a bar of its own."""
    if batches is None:
        yield None
        return
    with shown(progress, "calibrate", "batch") as step:

        def calibrate(model: nn.Module, plan: FoldPlan) -> InputsOf:
            paths = [r.path for r in plan.rotate if r.takes_inputs(r.format)]
            return Calibration(model, plan.adapters, paths, batches, progress=step)

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
    """Take the last fold out of a model again. After any error the model is as it was.

    Args:
        folded: a model that :func:`fold` gave, or one that holds the same weights.
        adapter: what was folded: rotates back by the true inverse and rounds once more, so quantised weights come back
            inexactly; an :class:`~oftsurgery.UnfoldWarning` states the error.
        base: the model that was folded, or the folder of its checkpoint: restores its bytes exactly, checked against
            the record's hashes.
        undo: the file that ``fold(…, undo=…)`` wrote: restores exactly what that fold changed, checked against the
            hashes in it. Works on a model that was saved and loaded again too.
        rounding: of quantised weights that are rotated back, as for :func:`fold`.
        inplace: change ``folded`` itself.
        progress: show a bar.

    Raises:
        StateError: none or several given, or another fold than the last one.
        IntegrityError: ``base`` is not the model that was folded, or ``folded`` not what the fold left.
        UndoError: ``undo`` is no undo record, or a damaged one.
        OFTSurgeryError: as :func:`fold`.
    """
    check_rounding(rounding)
    check_is_model(folded)
    check_one_way_back(
        (adapter, base, undo),
        "unfold(model, adapter) rotates back, unfold(model, base=…) and unfold(model, undo=…) restore exactly",
    )
    if undo is not None:
        record = open_undo(Path(undo).expanduser())
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
    model: M, adapter: AdapterLike, *, adapter_name: str = "default", partial: bool = False, inplace: bool = False
) -> M:
    """Put an adapter on a model unmerged: live layers that rotate their input, train, and merge or unmerge one by one.

    Args:
        model: as for :func:`fold`, or one that is wrapped already: a further adapter by another name.
        adapter: an :class:`~oftsurgery.OFTAdapter` or what :func:`load_adapter` takes.
        adapter_name: under which it is active.
        partial: as for :func:`fold`.
        inplace: wrap ``model`` itself; otherwise the result shares its tensors.

    Returns:
        the model with the targeted layers replaced by those of :mod:`oftsurgery.live.wrap`.

    Raises:
        OFTSurgeryError: as :func:`fold`; after any error the model is as it was.
    """
    loaded = adapter if isinstance(adapter, OFTAdapter) else load_adapter(adapter)
    return wrap_model(model, loaded, adapter_name=adapter_name, incomplete=partial, inplace=inplace)  # type: ignore[return-value]


def extract(
    base: nn.Module, merged: nn.Module, block_size: int | None = None, *, progress: bool = False
) -> ExtractedAdapter:
    """Get an OFT adapter back out of a model that it was merged into.

    Args:
        base: the model that it was merged into, plain or over bitsandbytes layers.
        merged: the same with the adapter in its weights, in any format.
        block_size: of the rotations; None to detect it, one for each width of layer. Named, it gives the best rotations
            of that size, of whatever the difference is (a full fine-tune, a LoRA merge).
        progress: show a bar.

    Returns:
        an :class:`~oftsurgery.OFTAdapter` with the exact Cayley map, whose ``report`` has each module's residual, explained
        fraction and estimated error. Weights without a rotation are left out.

    Raises:
        ExtractionError: nothing is rotated, or the block size cannot be told.
        MatchError: the models have different layers.
        ShapeError: ``block_size`` does not divide a layer's features.
        StateError, FormatError, NonFiniteError: as :func:`fold`.
    Warns:
        ExtractionWarning: rotations do not explain all of the difference.
    """
    for model in (base, merged):
        check_is_model(model)
    with shown(progress, "extract", "layer") as step:
        return extract_from_models(base, merged, block_size, progress=step)


def _names_or_adapters(
    model: nn.Module, adapter: AdapterLike | Sequence[AdapterLike] | None
) -> tuple[list[str] | None, list[OFTAdapter] | None]:
    """(names of live adapters, None) or (None, loaded adapters)."""
    given = [] if adapter is None else list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    configs_of_peft = getattr(inner_model(model), "peft_config", {})
    if isinstance(configs_of_peft, Mapping) and configs_of_peft and all(isinstance(a, str) for a in given):
        return [str(a) for a in given] or None, None
    return None, None if adapter is None else loaded_adapters(adapter)
