"""The public functions: pure parts joined to files, paths accepted as arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from oftsurgery.adapters.adapter import Dialect, OFTAdapter, parse_adapter
from oftsurgery.calibrate import inputs, texts
from oftsurgery.calibrate.inputs import Batch
from oftsurgery.checks import extract_adapters, verify_checkpoints
from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.extract_adapters import ExtractedAdapter
from oftsurgery.checks.verify_models import VerifyReport
from oftsurgery.dtypes import float_dtype
from oftsurgery.errors import AdapterError, StateError, printable
from oftsurgery.files import finding as files
from oftsurgery.files import shards, staging
from oftsurgery.folding import disk as checkpoint
from oftsurgery.folding import export, undo_file
from oftsurgery.folding import memory as live_model
from oftsurgery.folding.disk import CheckpointPlan, Format, Quantization
from oftsurgery.folding.plan import FoldPlan
from oftsurgery.formats import codecs
from oftsurgery.formats.codecs import Rounding
from oftsurgery.live import wrap as live
from oftsurgery.onnx import export as onnx_export
from oftsurgery.onnx.export import OnnxReport
from oftsurgery.progress import Progress, shown
from oftsurgery.records.record import FoldRecord
from oftsurgery.reports import drawing, page
from oftsurgery.stores import configs
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.idle import is_idle
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.ties import modules_of
from oftsurgery.weights.calibrate import InputsOf

__all__ = [
    "FoldSettings",
    "export_onnx",
    "export_safetensors",
    "extract",
    "extract_checkpoint",
    "fold",
    "fold_checkpoint",
    "load_adapter",
    "parse_size",
    "plan_fold",
    "read_record",
    "record_of",
    "report",
    "unfold",
    "unfold_checkpoint",
    "verify_checkpoint",
    "wrap",
]

M = TypeVar("M", bound=nn.Module)

AdapterLike = OFTAdapter | str | PathLike[str]
Mode = Rounding | Literal["calibrated"]
Verified = VerifyReport | CheckpointReport | Mapping[str, Any] | str | PathLike[str]


def load_adapter(
    path_or_repo: str | PathLike[str], *, dialect: Dialect | None = None, revision: str | None = None
) -> OFTAdapter:
    """Read an OFT adapter that any peft release from 0.12 to 0.21 wrote.

    Args:
        path_or_repo: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id.
        dialect: which releases' arithmetic the adapter is of, where its files do not tell (a key of
            :data:`oftsurgery.DIALECTS`).
        revision: of the Hub repository.

    Raises:
        AdapterError: files are missing, damaged, pickles, or not an adapter's.
        DialectError: another kind of adapter, or an OFT one that cannot be told or is not supported.
        ShapeError, NonFiniteError: tensors that no adapter has.
    """
    folder = files.find_adapter(path_or_repo, revision=revision)
    config, tensors, sha256 = files.read_adapter(folder)
    return parse_adapter(config, tensors, dialect=dialect, source=str(path_or_repo), sha256=sha256)


def fold(
    model: M,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    rounding: Rounding | Literal["calibrated"] | None = None,
    calibration: Any = None,
    undo: str | PathLike[str] | None = None,
    inplace: bool = False,
    progress: bool = False,
) -> M:
    """Merge an OFT adapter into a model's weights, in the formats that they have.

    Each targeted weight is dequantised exactly, rotated by blocks in float32, and stored again as it was: NF4, FP4
    (double quantisation and ``quant_storage`` kept), int8 or a float dtype. The result computes what the live adapter
    computes, up to the rounding of that storage, which is measured for each module and stated in one
    :class:`~oftsurgery.RoundingWarning`.

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
        inplace: change ``model`` itself, layer by layer on its device. Replaced weights wait in CPU memory until the
            last layer is done. Otherwise the result is a new model that shares every tensor that it did not change, and
            ``model`` stays as it is.
        progress: show a bar.

    Returns:
        the folded model; its ``oftsurgery`` attribute is the :class:`~oftsurgery.FoldRecord`.

    Raises:
        AdapterError, DialectError: the adapter cannot be used.
        MatchError: an adapter's module or tensor matches nothing in the model, or two match one.
        ShapeError: it does not fit.
        StateError: the model carries this adapter already, is merged by peft, not loaded, not quantised yet …
        FormatError: a targeted layer is of a kind that cannot be folded.
        NonFiniteError: NaN or infinity, in the adapter, the base or the result.
        CalibrationError: the calibration is empty, text, or not what the model takes.
        After any error the model is as it was.
    """
    mode = _rounding(rounding, calibration)
    _check_model(model)
    batches = inputs.read_batches(calibration) if mode == "calibrated" else None
    with (
        _prepared(model, adapter, inplace=inplace) as fold_prepared,
        _undo_writer(undo) as writer,
        shown(progress, "fold", "layer") as step,
        _calibrated(batches, progress) as calibrate,
    ):
        return fold_prepared(rounding=mode, calibrate=calibrate, undo=writer, progress=step)  # type: ignore[return-value]


@contextmanager
def _prepared(model: nn.Module, adapter: Any, *, inplace: bool) -> Iterator[Callable[..., nn.Module]]:
    """``fold_model`` of a model and what is to be folded into it: of one that :func:`wrap` gave, the active adapters as
    they are trained now, into the plain model.
    """
    if not live.live_layers(model):
        names, adapters = _resolve(model, adapter)
        yield partial(live_model.fold_model, model, adapters, names=names, inplace=inplace)
        return
    if adapter is not None:
        raise StateError(
            "the model carries live adapters, and an adapter to fold was given too",
            remedy="fold(wrapped) folds its active adapters; load the plain base model to fold files into it",
        )
    trained, already = live.read_live(model), live.original_hashes(model)
    base = model if inplace else live.unwrap(model)
    stripped = live.strip(live_model.inner_model(model)) if inplace else []
    try:
        yield partial(live_model.fold_model, base, trained, already=already, inplace=True)
    except BaseException:
        for step_back in reversed(stripped):
            step_back()
        raise


def _undo_writer(path: str | PathLike[str] | None) -> AbstractContextManager[undo_file.UndoWriter | None]:
    return nullcontext() if path is None else undo_file.UndoWriter(Path(path).expanduser())


def _rounding(rounding: Mode | None, calibration: object) -> Mode:
    """The mode of a fold.

    Raises:
        StateError: it is unknown, or does not go with what there is to calibrate on.
    """
    if rounding is None:
        return "preserve" if calibration is None else "calibrated"
    if rounding not in (*codecs.ROUNDINGS, "calibrated"):
        known = ", ".join(map(repr, codecs.ROUNDINGS))
        raise StateError(f"unknown rounding {printable(rounding)!r}", remedy=f"{known} or 'calibrated'")
    if (rounding == "calibrated") != (calibration is not None):
        raise StateError(
            f"rounding={rounding!r} {'with nothing to calibrate on' if calibration is None else 'with a calibration'}",
            remedy="give calibration=…, some hundred texts of the kind that the model is for"
            if calibration is None
            else "rounding='calibrated', or leave the calibration out",
        )
    return rounding


@contextmanager
def _calibrated(
    batches: Sequence[Batch] | None, progress: bool
) -> Iterator[Callable[[nn.Module, FoldPlan], InputsOf] | None]:
    """What gathers the inputs of a model's layers over ``batches``, with a bar of its own."""
    if batches is None:
        yield None
        return
    with shown(progress, "calibrate", "batch") as step:

        def calibrate(model: nn.Module, plan: FoldPlan) -> InputsOf:
            paths = [r.path for r in plan.rotate if r.takes_inputs(r.format)]
            return inputs.Calibration(model, plan.adapters, paths, batches, progress=step)

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
        and those of :func:`fold`. After any error the model is as it was.
    """
    codecs.check_rounding(rounding)
    _check_model(folded)
    _check_one(
        (adapter, base, undo),
        "unfold(model, adapter) rotates back, unfold(model, base=…) and unfold(model, undo=…) restore exactly",
    )
    if undo is not None:
        record = undo_file.open_undo(Path(undo).expanduser())
        return live_model.undo_model(folded, record, inplace=inplace)  # type: ignore[return-value]
    if base is not None:
        source = LiveStore(base) if isinstance(base, nn.Module) else FolderStore(_opened(base))
        return live_model.restore_model(folded, source, inplace=inplace)  # type: ignore[return-value]
    _, adapters = _resolve(folded, adapter)
    with shown(progress, "unfold", "layer") as step:
        return live_model.unfold_model(  # type: ignore[return-value]
            folded, adapters or [], rounding=rounding, inplace=inplace, progress=step
        )


def wrap(model: M, adapter: AdapterLike, *, adapter_name: str = "default", inplace: bool = False) -> M:
    """Put an adapter on a model unmerged: live layers that rotate their input, train, and merge or unmerge one by one.

    Args:
        model: as for :func:`fold`, or one that is wrapped already: a further adapter by another name.
        adapter: an :class:`~oftsurgery.OFTAdapter` or what :func:`load_adapter` takes.
        adapter_name: under which it is active.
        inplace: wrap ``model`` itself; otherwise the result shares its tensors.

    Returns:
        the model with the targeted layers replaced by those of :mod:`oftsurgery.live.wrap`.

    Raises:
        as :func:`fold`; after any error the model is as it was.
    """
    loaded = adapter if isinstance(adapter, OFTAdapter) else load_adapter(adapter)
    return live.wrap_model(model, loaded, adapter_name=adapter_name, inplace=inplace)  # type: ignore[return-value]


@dataclass(frozen=True)
class FoldSettings:
    """What :func:`fold_checkpoint` takes that decides what is written."""

    format: Format = "same"
    quantize: str | None = None
    double_quant: bool = False
    compute_dtype: str = "float32"
    load_dtype: str | None = None
    skip_modules: Sequence[str] | None = None
    fold_into: Literal["quantized", "original"] = "quantized"
    rounding: Rounding | Literal["calibrated"] | None = None
    undo: str | PathLike[str] | None = None
    max_shard_size: int | str = "5GB"

    def quantization(self) -> Quantization | None:
        """How a plain source is quantised first.

        Raises:
            StateError: it is not, and double quantisation is asked for; or a dtype is unknown.
        """
        codec = self.quantize or (self.format if self.format in checkpoint.QUANTISED else None)
        if codec is not None:
            skip = tuple(self.skip_modules) if self.skip_modules is not None else None
            dtype = None if self.load_dtype is None else float_dtype(self.load_dtype)
            return Quantization(codec, self.double_quant, float_dtype(self.compute_dtype), skip, dtype)
        if self.double_quant:
            raise StateError(
                "double quantisation of a checkpoint that is not to be quantised",
                remedy="name the 4-bit type too: quantize='nf4'",
            )
        return None


def plan_fold(
    source: str | PathLike[str],
    adapter: AdapterLike | Sequence[AdapterLike],
    settings: FoldSettings = FoldSettings(),
) -> CheckpointPlan:
    """What :func:`fold_checkpoint` would do, from headers and JSON alone; same errors, nothing written."""
    mode: Mode = settings.rounding or "preserve"
    plan = checkpoint.plan_checkpoint(
        _opened(source),
        _loaded(adapter),
        format=settings.format,
        quantization=settings.quantization(),
        fold_into=settings.fold_into,
        rounding="preserve" if mode == "calibrated" else mode,
        undo=None if settings.undo is None else Path(settings.undo).expanduser(),
        max_shard_bytes=parse_size(settings.max_shard_size),
    )
    return replace(plan, rounding=mode)


def fold_checkpoint(
    source: str | PathLike[str],
    adapter: AdapterLike | Sequence[AdapterLike],
    destination: str | PathLike[str],
    *,
    format: Format = "same",
    quantize: str | None = None,
    double_quant: bool = False,
    compute_dtype: str = "float32",
    load_dtype: str | None = None,
    skip_modules: Sequence[str] | None = None,
    fold_into: Literal["quantized", "original"] = "quantized",
    rounding: Rounding | Literal["calibrated"] | None = None,
    calibration: Any = None,
    undo: str | PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> FoldRecord:
    """Fold an adapter into a checkpoint on disk, one weight at a time, without building the model.

    Args:
        source: a folder with ``config.json`` and safetensors shards, plain or bitsandbytes-quantised, or a Hub id.
        adapter: as for :func:`fold`; several are the live chain.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        format: what is written: ``"same"`` as the source, ``"fp32"``, ``"fp16"``, ``"bf16"`` (dequantised), or from a
            plain source ``"nf4"``, ``"fp4"``, ``"int8"``.
        quantize: quantise a plain source to this first, exactly as transformers' bitsandbytes loading did for the
            trainer, so that the adapter meets the base that it was trained on; implied by a quantised ``format``.
        double_quant, compute_dtype, load_dtype, skip_modules: the other settings of that loading
            (``bnb_4bit_use_double_quant``, ``bnb_4bit_compute_dtype``, ``dtype`` of ``from_pretrained`` (None: the
            config's, as transformers 5 does), ``llm_int8_skip_modules``).
        fold_into: rotate the ``"quantized"`` base, or the ``"original"`` plain weights.
        rounding: of the quantised weights that are rotated, as for :func:`fold`.
        calibration: a file of texts (``.txt``: one a line; ``.jsonl``, ``.parquet``: each row's ``text``), a list of
            texts, or batches as for :func:`fold`. Texts go through the checkpoint's own tokenizer, each cut after 512
            tokens. A calibration loads the model through transformers and runs it; nothing else here does.
        undo: a file to write, outside ``destination``, from which :func:`unfold_checkpoint` gives every byte back that
            the fold changes. It needs a fold that keeps the weights' formats (quantising a plain source first is no
            part of the fold, and stays).
        max_shard_size: bytes, or as the Hub's tools write it (``"5GB"``).
        device: where the arithmetic runs.
        resume: go on with the unfinished work of a run that was killed; without any, simply start.
        force: replace what is at ``destination`` (and ``undo``), at the rename and not before.
        progress: show a bar of the bytes read, or a function of (bytes done, bytes in all, what).

    Returns:
        the :class:`~oftsurgery.FoldRecord`, which is ``oftsurgery.json`` in the destination too.

    Raises:
        CheckpointError, AdapterError, MatchError, ShapeError, FormatError, StateError, NonFiniteError: bad input;
        nothing was written.
        CalibrationError: no texts, no tokenizer, or a model that transformers does not know.
        DiskError: the disk is full, read-only or in use; what was finished waits to be resumed.
    """
    mode = _rounding(rounding, calibration)
    settings = FoldSettings(
        format, quantize, double_quant, compute_dtype, load_dtype, skip_modules, fold_into, mode, undo, max_shard_size
    )
    plan = plan_fold(source, adapter, settings)
    batches = None
    if mode == "calibrated":
        batches = _tokenised(calibration, plan)
        plan = replace(plan, calibration=inputs.fingerprint(batches))
    with shown(progress, "fold") as step:
        beside = _Beside(step or (lambda *_: None))
        inputs_of = None
        if batches is not None:
            inputs_of = inputs.of_checkpoint(plan, batches, device=device, progress=beside.batch)
        record = checkpoint.run_plan(
            plan,
            Path(destination),
            device=device,
            resume=resume,
            force=force,
            progress=beside.bytes,
            inputs_of=inputs_of,
        )
    assert record is not None  # noqa: S101 - a fold has one
    return record


def _tokenised(calibration: Any, plan: CheckpointPlan) -> list[Batch]:
    if isinstance(calibration, (str, PathLike)):
        calibration = texts.read_texts(Path(calibration).expanduser())
    if isinstance(calibration, (list, tuple)) and calibration and all(isinstance(t, str) for t in calibration):
        return inputs.tokenise(calibration, plan.source.folder)
    return inputs.read_batches(calibration)


@dataclass
class _Beside:
    """Tells of a calibration's batches within the progress in bytes, which stands still meanwhile."""

    step: Progress
    at: tuple[int, int] = (0, 0)

    def bytes(self, done: int, total: int, what: str) -> None:
        self.at = (done, total)
        self.step(done, total, what)

    def batch(self, done: int, total: int, _: str) -> None:
        self.step(*self.at, f"calibration: batch {done} of {total}")


def unfold_checkpoint(
    folded: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    undo: str | PathLike[str] | None = None,
    rounding: Rounding = "preserve",
    max_shard_size: int | str = "5GB",
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> FoldRecord | None:
    """Take the last fold out of a checkpoint on disk.

    Args:
        folded: a folder that :func:`fold_checkpoint` wrote.
        destination: a folder that does not exist yet.
        base: the checkpoint that was folded: exact, checked against the hashes in ``oftsurgery.json``.
        adapter: what was folded: rotated back by the true inverse, rounded once more, with an
            :class:`~oftsurgery.UnfoldWarning` that states the error.
        undo: the file that ``fold_checkpoint(…, undo=…)`` wrote, or :func:`fold` of the same model: exact, checked
            against the hashes in it.
        rounding: of quantised weights that are rotated back, as for :func:`fold`.
        max_shard_size, device, resume, force, progress: as for :func:`fold_checkpoint`.

    Returns:
        the record of what is still folded in, or None.

    Raises:
        StateError: none or several of ``base``, ``adapter`` and ``undo``, or another fold than the last one.
        IntegrityError: ``base`` is not what was folded, or ``folded`` not what the fold left.
        UndoError: ``undo`` is no undo record, or a damaged one.
        and those of :func:`fold_checkpoint`.
    """
    _check_one((adapter, base, undo), "adapter=… rotates back, base=… and undo=… restore exactly")
    source = _opened(folded)
    size = parse_size(max_shard_size)
    if base is not None:
        plan = checkpoint.plan_restore(source, _opened(base), max_shard_bytes=size)
    elif undo is not None:
        plan = checkpoint.plan_undo(source, undo_file.open_undo(Path(undo).expanduser()), max_shard_bytes=size)
    else:
        assert adapter is not None  # noqa: S101 - checked above
        plan = checkpoint.plan_unfold(source, _loaded(adapter), rounding=rounding, max_shard_bytes=size)
    with shown(progress, "unfold") as step:
        return checkpoint.run_plan(plan, Path(destination), device=device, resume=resume, force=force, progress=step)


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
        _check_model(model)
    with shown(progress, "extract", "layer") as step:
        return extract_adapters.extract_from_models(base, merged, block_size, progress=step)


def extract_checkpoint(
    base: str | PathLike[str],
    merged: str | PathLike[str],
    block_size: int | None = None,
    *,
    progress: bool | Progress = False,
) -> ExtractedAdapter:
    """:func:`extract` from two checkpoints on disk, without building a model: two weights are in memory at a time.

    Args:
        base, merged: folders or Hub ids, plain or bitsandbytes-quantised, each in its own format.
        block_size: as for :func:`extract`.
        progress: show a bar, or a function of (weights done, weights in all, module path).

    Raises, warns: as :func:`extract`; CheckpointError for files that cannot be used.
    """
    here, there = _opened(base), _opened(merged)
    with shown(progress, "extract", "layer") as step:
        return extract_adapters.extract_from_checkpoints(here, there, block_size, base_name=str(base), progress=step)


def verify_checkpoint(
    folded: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    tolerance: float | None = None,
) -> CheckpointReport:
    """Check a folded checkpoint on disk: its files against the hashes in ``oftsurgery.json``, and, where base and adapter
    are given, every tensor that the model loads against those, by none of the code that folds.

    Args:
        folded: in any format.
        base: the checkpoint that was folded, or None to check the hashes alone.
        adapter: that was folded; several in the live order.
        tolerance: the largest relative error that passes; None: no more than storing the exact weight in that format
            costs.

    Returns:
        a report with the state of each file, an error for each rotated weight, and what was looked at of each tensor
        (``report.tensors``; ``report.wrong`` names what is wrong); ``report.ok`` says whether all pass.

    Raises:
        StateError: one of ``base`` and ``adapter`` without the other, or neither and no hashes to check.
        and those of :func:`fold_checkpoint` for inputs that do not belong together.
    """
    if (base is None) != (adapter is None):
        raise StateError(
            "a base without an adapter, or an adapter without its base",
            remedy="give both, or neither to check the files' hashes alone",
        )
    folder = files.find_checkpoint(folded, whole=True)
    if base is None or adapter is None:
        return verify_checkpoints.check_files(folder)
    opened = shards.open_checkpoint(folder)
    return verify_checkpoints.check_checkpoint(
        opened,
        _opened(base),
        _loaded(adapter),
        tolerance=tolerance,
        idle=lambda model, path: is_idle(modules_of(model), path, quantised="quantization_config" in opened.config),
    )


def read_record(folder: str | PathLike[str]) -> FoldRecord | None:
    """The record in a checkpoint's ``oftsurgery.json``, or None where nothing is folded in.

    Raises:
        CheckpointError: no such folder, or a record that cannot be read.
    """
    return configs.record_in(files.find_checkpoint(folder))


def report(
    source: FoldRecord | str | PathLike[str],
    html: str | PathLike[str] | None = None,
    *,
    png: str | PathLike[str] | None = None,
    verified: Verified | Sequence[Verified] = (),
    force: bool = False,
) -> str:
    """Draw a fold's record as one HTML page that needs no network and no file beside it.

    Args:
        source: a record (``folded.oftsurgery``), a folder that has one, or such a file (``oftsurgery.json``).
        html: file to write the page to.
        png: folder to write ``errors.png`` and ``angles.png`` to, for a model card; it is made where it is not there.
        verified: results of :func:`~oftsurgery.verify` or :func:`~oftsurgery.verify_checkpoint` to show too, or JSON files
            of them, as ``oftsurgery verify --json`` prints it.
        force: replace files that exist.

    Returns:
        the page, a function of the arguments alone.

    Raises:
        StateError: nothing is folded in, a file exists, or ``verified`` is of another model.
        CheckpointError: the record, or a file of ``verified``, cannot be read.
        MissingDependencyError: ``png`` without matplotlib.
        DiskError: the disk did not take a file; nothing is left half-written.
    """
    record, folder = record_of(source)
    given = [verified] if isinstance(verified, (Mapping, str, PathLike)) or hasattr(verified, "to_dict") else verified
    results = [_result_of(v) for v in given]  # type: ignore[arg-type]
    text = page.render(
        record,
        name=None if folder is None else folder.resolve().name,
        files={} if folder is None else shards.sizes_in(folder),
        verified=results,
    )
    outputs = {} if html is None else {Path(html): text.encode()}
    if png is not None:
        outputs |= {Path(png) / name: data for name, data in drawing.figures(record).items()}
    staging.write_files(outputs, force=force, make=None if png is None else Path(png))
    return text


def record_of(source: object) -> tuple[FoldRecord, Path | None]:
    if isinstance(source, FoldRecord):
        return source, None
    if not isinstance(source, (str, PathLike)):
        raise StateError(
            f"a report is of a record, a folder or a file, not of a {type(source).__name__}",
            remedy="report(folded.oftsurgery), or the folder that a fold wrote",
        )
    path = Path(source).expanduser()
    folder = path if path.is_dir() else None
    record = configs.record_at(path) if folder is None else configs.record_in(path)
    if record is None:
        raise StateError(
            "nothing is folded in: the folder has no record", path=path, remedy="give a folder that a fold wrote"
        )
    return record, folder


def _result_of(verified: Verified) -> Mapping[str, Any]:
    if isinstance(verified, (str, PathLike)):
        return shards.read_json(Path(verified))
    return verified if isinstance(verified, Mapping) else verified.to_dict()


def export_safetensors(
    model: nn.Module,
    destination: str | PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> FoldRecord | None:
    """Save a live model as a checkpoint that ``from_pretrained`` loads, bitsandbytes layers included.

    Args:
        model: plain or over bitsandbytes layers, also after CPU forwards, compiled or offloaded.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        dtype: dequantise to this (float32, float16 or bfloat16); None keeps every weight as it is stored.
        max_shard_size: bytes, or as the Hub's tools write it.
        force: replace what is at ``destination``.

    Returns:
        the model's record, which is ``oftsurgery.json`` in the destination too, or None where nothing was folded.

    Raises:
        StateError: live adapters, values not loaded, or the destination exists.
        FormatError: a tensor that cannot be saved.
        DiskError: the disk did not take it; nothing is left behind.
    """
    return export.save_model(
        model, Path(destination), dtype=dtype, max_shard_bytes=parse_size(max_shard_size), force=force
    )


def export_onnx(
    model: nn.Module | str | PathLike[str],
    destination: str | PathLike[str],
    dtype: Literal["float16", "float32"] = "float16",
    quantized: bool = False,
    with_past: bool = False,
    *,
    example_inputs: object = None,
    tokenizer: object = None,
    verify: bool = True,
    force: bool = False,
    progress: bool | Progress = False,
) -> OnnxReport:
    """Export a model as ``destination/model.onnx``, opset 20, and prove the graph against torch.

    Weights are read, dequantised and written one at a time, over 1 GiB in all to ``model.onnx.data``. The model stays
    as it is. Beside the graph are ``config.json``, the tokenizer's files and ``oftsurgery.json``, which holds the
    report.

    Args:
        model: folded or not, plain or over bitsandbytes layers; or the folder of a checkpoint that transformers loads.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        dtype: of the graph's weights and activations.
        quantized: keep the codes of bitsandbytes' layers, unchanged: 4-bit ones as ``com.microsoft::MatMulBnb4`` with
            float32 scales (double quantisation undone), int8 ones as ``DequantizeLinear``. Layers that the operator
            cannot hold are dequantised, and named in the report. Otherwise every layer is dequantised.
        with_past: of a decoder, one graph for prompt and generation: inputs ``input_ids``, ``attention_mask (batch,
            past + sequence)``, ``position_ids`` where the model takes them and ``past_key_values.{i}.key``, ``.value
            (batch, heads, past, size)``; outputs ``logits`` and ``present.{i}.key``, ``.value``; with a
            ``genai_config.json`` for onnxruntime-genai. Otherwise the inputs are ``input_ids``, ``attention_mask``,
            ``token_type_ids`` where there is more than one type, and for encoder-decoders ``decoder_input_ids``, the
            outputs as the model names them. Batch and lengths are dynamic.
        example_inputs: for any other model, or other inputs: a tensor, a tuple, or a mapping of names to tensors; axes
            that torch.export finds to be dynamic are so, but those of size 1 that are not the batch.
        tokenizer: an object with ``save_pretrained``, or a folder that holds its files; None for the folder that
            transformers loaded the model from, local or in the Hub's cache.
        verify: run onnx's checker, then onnxruntime and torch in float32 on several shapes, with left padding. The
            largest difference may be 1e-5 (float32) or 5e-3 (float16) of the output's largest value.
        force: replace what is at ``destination``.
        progress: show a bar of the stages, or a function of (stages done, stages in all, what comes).

    Returns:
        names, formats and the measured differences.

    Raises:
        ExportError: torch cannot capture the model, or the graph computes something else. Nothing is written.
        StateError: bfloat16, live adapters, no known inputs or no cache, nothing quantised to keep, values not loaded, or
            the destination exists or holds the model itself.
        NonFiniteError: a weight is too large for float16.
        FormatError: a weight is stored in a way that is not known.
        MissingDependencyError: the packages of the ``onnx`` extra are not installed.
        DiskError: the disk did not take it; nothing is left behind.
    """
    record = None
    if isinstance(model, (str, PathLike)):
        folder = files.find_checkpoint(model)
        record = configs.record_in(folder)
        tokenizer = folder if tokenizer is None else tokenizer
        model = onnx_export.load_model(folder)
    _check_model(model)
    with shown(progress, "export", "stage") as step:
        return onnx_export.export_model(
            model,
            Path(destination),
            dtype=dtype,
            quantized=quantized,
            with_past=with_past,
            example_inputs=example_inputs,
            tokenizer=tokenizer,
            record=record,
            verify=verify,
            force=force,
            progress=step,
        )


def parse_size(size: int | str) -> int:
    """Bytes, from a number or as the Hub's tools write sizes: decimal ``KB``, ``MB``, ``GB``, ``TB``.

    Raises:
        StateError: nothing of the kind.

    >>> parse_size("5GB")
    5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?\s*", str(size), re.IGNORECASE)
    units = ("B", "KB", "MB", "GB", "TB")
    nbytes = int(float(match[1]) * 1000 ** units.index((match[2] or "B").upper())) if match else 0
    if nbytes < 1:
        raise StateError(f"no size: {printable(size)!r}", remedy="a number of bytes, or '500MB', '5GB'")
    return nbytes


def _opened(source: str | PathLike[str]) -> shards.Checkpoint:
    return shards.open_checkpoint(files.find_checkpoint(source))


def _check_one(given: Sequence[object], remedy: str) -> None:
    if sum(way is not None for way in given) != 1:
        raise StateError("unfold needs one of the adapter, the base and an undo record", remedy=remedy)


def _resolve(
    model: nn.Module, adapter: AdapterLike | Sequence[AdapterLike] | None
) -> tuple[list[str] | None, list[OFTAdapter] | None]:
    """(names of live adapters, None) or (None, loaded adapters)."""
    given = [] if adapter is None else list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    configs_of_peft = getattr(live_model.inner_model(model), "peft_config", {})
    if isinstance(configs_of_peft, Mapping) and configs_of_peft and all(isinstance(a, str) for a in given):
        return [str(a) for a in given] or None, None
    return None, None if adapter is None else _loaded(adapter)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise StateError(
            f"a model is a torch.nn.Module, this is a {type(model).__name__}",
            remedy="load it first; folders go to fold_checkpoint",
        )


def _loaded(adapter: AdapterLike | Sequence[AdapterLike]) -> list[OFTAdapter]:
    given: Sequence[Any] = adapter if isinstance(adapter, (list, tuple)) else [adapter]
    if not all(isinstance(a, (OFTAdapter, str, PathLike)) for a in given):
        raise AdapterError(
            f"an adapter is an OFTAdapter, a folder or a Hub id, or a list of them, not a {type(adapter).__name__}",
            remedy="fold(peft_model) folds live adapters; load_adapter(path) reads one from files",
        )
    return [a if isinstance(a, OFTAdapter) else load_adapter(a) for a in given]
