"""The public functions on checkpoints on disk: plan, fold, unfold, extract, verify, and the record in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from oftsurgery.calibrate.batches import Batch, batches_fingerprint, read_batches, tokenise
from oftsurgery.calibrate.checkpoint import checkpoint_inputs
from oftsurgery.calibrate.texts import read_texts
from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.extract_adapters import ExtractedAdapter, extract_from_checkpoints
from oftsurgery.checks.verify_checkpoints import check_checkpoint, check_files
from oftsurgery.dtypes import float_dtype
from oftsurgery.errors import StateError
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.files.finding import checkpoint_place, find_checkpoint
from oftsurgery.files.links import links_followed
from oftsurgery.folding.disk_plan import QUANTISED, CheckpointPlan, Format, plan_checkpoint
from oftsurgery.folding.disk_run import run_plan
from oftsurgery.folding.disk_unfold import plan_restore, plan_undo, plan_unfold
from oftsurgery.folding.undo_reader import open_undo
from oftsurgery.formats.codecs import Rounding
from oftsurgery.progress import Progress, shown
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import RECORD, record_in
from oftsurgery.stores.folder import Quantization
from oftsurgery.stores.idle import is_idle
from oftsurgery.stores.ties import modules_of

from .arguments import (
    AdapterLike,
    RoundingMode,
    check_one_way_back,
    loaded_adapters,
    opened_base,
    opened_checkpoint,
    parse_size,
    rounding_mode,
)


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
    revision: str | None = None
    partial: bool = False

    def quantization(self) -> Quantization | None:
        """How a plain source is quantised first.

        Raises:
            StateError: it is not, and double quantisation is asked for; or a dtype is unknown.
        """
        codec = self.quantize or (self.format if self.format in QUANTISED else None)
        if codec is not None:
            skip = tuple(self.skip_modules) if self.skip_modules is not None else None
            dtype = None if self.load_dtype is None else float_dtype(self.load_dtype)
            return Quantization(codec, self.double_quant, float_dtype(self.compute_dtype), skip, dtype)
        if self.double_quant:
            message = "double quantisation of a checkpoint that is not to be quantised"
            raise StateError(message, remedy="name the 4-bit type too: quantize='nf4'")
        return None


def plan_fold(
    source: str | PathLike[str], adapter: AdapterLike | Sequence[AdapterLike], settings: FoldSettings = FoldSettings()
) -> CheckpointPlan:
    """What :func:`fold_checkpoint` would do, from headers and JSON alone; same errors, nothing written."""
    mode: RoundingMode = settings.rounding or "preserve"
    adapters = loaded_adapters(adapter)
    plan = plan_checkpoint(
        opened_checkpoint(source, settings.revision, adapters),
        adapters,
        format=settings.format,
        quantization=settings.quantization(),
        fold_into=settings.fold_into,
        rounding="preserve" if mode == "calibrated" else mode,
        undo=None if settings.undo is None else Path(settings.undo).expanduser(),
        max_shard_bytes=parse_size(settings.max_shard_size),
        partial=settings.partial,
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
    revision: str | None = None,
    partial: bool = False,
    follow_links: bool = False,
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
        revision: branch, tag or commit of a source on the Hub (``owner/name@revision`` says the same). None: the one that
            the adapter's config names for this base, else the main branch.
        partial: fold an adapter that lacks modules which its own config targets; they stay as they are, and are in the record.
        follow_links: read files that are links, wherever these lead; otherwise only those that
            :func:`~oftsurgery.files.links.check_link` lists.
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
    mode = rounding_mode(rounding, calibration)
    settings = FoldSettings(
        format,
        quantize,
        double_quant,
        compute_dtype,
        load_dtype,
        skip_modules,
        fold_into,
        mode,
        undo,
        max_shard_size,
        revision,
        partial,
    )
    with links_followed(follow_links):
        plan = plan_fold(source, adapter, settings)
        batches = None
        if mode == "calibrated":
            batches = _calibration_batches(calibration, plan)
            plan = replace(plan, calibration=batches_fingerprint(batches))
        with shown(progress, "fold") as step:
            beside = _ProgressWithCalibration(step or (lambda *_: None))
            inputs_of = None
            if batches is not None:
                inputs_of = checkpoint_inputs(plan, batches, device=device, progress=beside.batch)
            record = run_plan(
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


def _calibration_batches(calibration: Any, plan: CheckpointPlan) -> list[Batch]:
    if isinstance(calibration, (str, PathLike)):
        calibration = read_texts(Path(calibration).expanduser())
    if isinstance(calibration, (list, tuple)) and calibration and all(isinstance(t, str) for t in calibration):
        return tokenise(calibration, plan.source.folder)
    return read_batches(calibration)


@dataclass
class _ProgressWithCalibration:
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
    follow_links: bool = False,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> FoldRecord | None:
    """Take the last fold out of a checkpoint on disk.

    Args:
        folded: a folder that :func:`fold_checkpoint` wrote.
        destination: a folder that does not exist yet.
        base: the checkpoint that was folded: exact, checked against the hashes in ``oftsurgery.json``. Of a Hub id the
            revision that the record names.
        adapter: what was folded: rotated back by the true inverse, rounded once more, with an
            :class:`~oftsurgery.UnfoldWarning` that states the error.
        undo: the file that ``fold_checkpoint(…, undo=…)`` wrote, or :func:`fold` of the same model: exact, checked
            against the hashes in it.
        rounding: of quantised weights that are rotated back, as for :func:`fold`.
        max_shard_size, follow_links, device, resume, force, progress: as for :func:`fold_checkpoint`.

    Returns:
        the record of what is still folded in, or None.

    Raises:
        StateError: none or several of ``base``, ``adapter`` and ``undo``, or another fold than the last one.
        IntegrityError: ``base`` is not what was folded, or ``folded`` not what the fold left.
        UndoError: ``undo`` is no undo record, or a damaged one.
        OFTSurgeryError: as :func:`fold_checkpoint`.
    """
    check_one_way_back((adapter, base, undo), "adapter=… rotates back, base=… and undo=… restore exactly")
    with links_followed(follow_links):
        source = opened_checkpoint(folded)
        size = parse_size(max_shard_size)
        if base is not None:
            plan = plan_restore(source, opened_base(base, record_in(source.folder)), max_shard_bytes=size)
        elif undo is not None:
            plan = plan_undo(source, open_undo(Path(undo).expanduser()), max_shard_bytes=size)
        else:
            assert adapter is not None  # noqa: S101 - checked above
            plan = plan_unfold(source, loaded_adapters(adapter), rounding=rounding, max_shard_bytes=size)
        with shown(progress, "unfold") as step:
            return run_plan(plan, Path(destination), device=device, resume=resume, force=force, progress=step)


def extract_checkpoint(
    base: str | PathLike[str],
    merged: str | PathLike[str],
    block_size: int | None = None,
    *,
    follow_links: bool = False,
    progress: bool | Progress = False,
) -> ExtractedAdapter:
    """:func:`extract` from two checkpoints on disk, without building a model: two weights are in memory at a time.

    Args:
        base, merged: folders or Hub ids, plain or bitsandbytes-quantised, each in its own format.
        block_size: as for :func:`extract`.
        follow_links: as for :func:`fold_checkpoint`.
        progress: show a bar, or a function of (weights done, weights in all, module path).

    Raises:
        CheckpointError: files cannot be used.
        OFTSurgeryError: as :func:`extract`.
    Warns:
        ExtractionWarning: as :func:`extract`.
    """
    with links_followed(follow_links):
        here, there = opened_checkpoint(base), opened_checkpoint(merged)
    with shown(progress, "extract", "layer") as step:
        return extract_from_checkpoints(here, there, block_size, base_name=str(base), progress=step)


def verify_checkpoint(
    folded: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    tolerance: float | None = None,
    follow_links: bool = False,
) -> CheckpointReport:
    """Check a folded checkpoint on disk: its files against the hashes in ``oftsurgery.json``, and, where base and adapter
    are given, every tensor that the model loads against those, by none of the code that folds.

    Args:
        folded: in any format.
        base: the checkpoint that was folded, or None to check the hashes alone; of a Hub id the revision that the
            adapter's config names for it.
        adapter: that was folded; several in the live order.
        tolerance: the largest relative error that passes; None: no more than storing the exact weight in that format
            costs.
        follow_links: as for :func:`fold_checkpoint`.

    Returns:
        a report with the state of each file, an error for each rotated weight, and what was looked at of each tensor
        (``report.tensors``; ``report.wrong`` names what is wrong); ``report.ok`` says whether all pass.

    Raises:
        StateError: one of ``base`` and ``adapter`` without the other, or neither and no hashes to check.
        OFTSurgeryError: as :func:`fold_checkpoint`, for inputs that do not belong together.
    """
    if (base is None) != (adapter is None):
        message = "a base without an adapter, or an adapter without its base"
        raise StateError(message, remedy="give both, or neither to check the files' hashes alone")
    with links_followed(follow_links):
        folder = find_checkpoint(folded, whole=True)
        if base is None or adapter is None:
            return check_files(folder)
        opened = open_checkpoint(folder)
        adapters = loaded_adapters(adapter)
        return check_checkpoint(
            opened,
            opened_checkpoint(base, adapters=adapters),
            adapters,
            tolerance=tolerance,
            idle=lambda model, path: is_idle(modules_of(model), path, quantised="quantization_config" in opened.config),
        )


def read_record(folder: str | PathLike[str]) -> FoldRecord | None:
    """The record in a checkpoint's ``oftsurgery.json``, or None where nothing is folded in.

    Raises:
        CheckpointError: no such folder, or a record that cannot be read.
    """
    place = checkpoint_place(folder)
    return record_in(place.fetch([RECORD]))
