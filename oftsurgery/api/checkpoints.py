"""The public functions on checkpoints on disk plan, fold and unfold."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.strength import StrengthMode
from oftsurgery.dtypes import float_dtype
from oftsurgery.errors import SourceWarning, StateError, printable, warn_caller
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.links import links_followed
from oftsurgery.files.pipeline import Pipeline
from oftsurgery.files.remote import check_here, located
from oftsurgery.folding.disk_plan import CheckpointPlan, plan_checkpoint
from oftsurgery.folding.disk_run import run_plan
from oftsurgery.folding.disk_tasks import Engine
from oftsurgery.folding.disk_unfold import plan_restore, plan_undo, plan_unfold
from oftsurgery.folding.pipelines import PipelinePlan, run_pipeline
from oftsurgery.folding.remembered import plan_remembered
from oftsurgery.folding.target import FOUR_BIT, QUANTISED, Format
from oftsurgery.folding.undo_reader import open_undo
from oftsurgery.formats.codecs import Rounding
from oftsurgery.progress import Progress, shown
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import record_beside

from .arguments import (
    AdapterLike,
    RoundingMode,
    at_strengths,
    check_one_way_back,
    loaded_adapters,
    named_base,
    opened_base,
    opened_model,
    opened_pipeline,
    parse_size,
    rounding_mode,
    tokenizer_choice,
    usable_device,
)
from .elsewhere import here, with_links
from .fold_settings import FoldSettings
from .opened_executor import opened_executor
from .pipelines import plan_pipeline, plan_pipeline_back
from .trained_on import as_trained, check_said


def plan_fold(
    source: str | PathLike[str] | None,
    adapter: AdapterLike | Sequence[AdapterLike],
    settings: FoldSettings | None = None,
) -> CheckpointPlan | PipelinePlan:
    """The plan of :func:`fold_checkpoint`, from headers and JSON alone; it raises the same errors and writes nothing."""
    settings = settings or FoldSettings()
    adapters = at_strengths(loaded_adapters(adapter), settings.strength, settings.strength_mode)
    base = source if source is not None else named_base(adapters)
    opened = opened_model(base, settings.revision, adapters, variant=settings.variant, component=settings.component)
    if isinstance(opened, Pipeline):
        if settings.rounding == "calibrated":
            raise StateError(
                "a calibration runs one model on texts, and the source is a pipeline of diffusers",
                path=opened.folder,
                remedy="leave out calibration=… (--calibration): the rounding 'preserve' needs no data",
            )
        return plan_pipeline(opened, adapters, _plan_model, settings)
    return _plan_model(settings, opened, adapters)


def _plan_model(settings: FoldSettings, opened: Checkpoint, adapters: Sequence[OFTAdapter]) -> CheckpointPlan:
    """The plan of the fold of one model."""
    mode: RoundingMode = settings.rounding or "preserve"
    if mode == "calibrated":
        check_here(opened.folder, "a calibration")
    settings, trained = as_trained(settings, opened, adapters)
    plan = (plan_checkpoint if mode == "calibrated" or settings.undo is not None else plan_remembered)(
        opened,
        adapters,
        format=settings.format,
        double_quant=settings.double_quant and settings.format in FOUR_BIT,
        quantization=settings.quantization(opened, trained),
        compute_dtype=None if settings.compute_dtype is None else float_dtype(settings.compute_dtype),
        fold_into=settings.fold_into,
        rounding="preserve" if mode == "calibrated" else mode,
        undo=None if settings.undo is None else Path(settings.undo).expanduser(),
        tokenizer=tokenizer_choice(settings.tokenizer),
        max_shard_bytes=parse_size(settings.max_shard_size),
        partial=settings.partial,
    )
    plan = replace(plan, rounding=mode, trained_on=trained)
    check_said(plan, settings)
    if settings.format in QUANTISED and not any(part.into.quantised for part in plan.parts):
        name = printable(plan.store.architecture.name)
        warn_caller(
            f"the output has no weight in {settings.format}: bitsandbytes in transformers and diffusers quantises no layer of this model "
            f"({name}), whose linears are of classes of its own or are skipped",
            SourceWarning,
        )
    if mode == "calibrated":
        from oftsurgery.calibrate.checkpoint_model import calibrated_jobs

        calibrated_jobs(plan)
    return plan


def fold_checkpoint(
    source: str | PathLike[str] | None,
    adapter: AdapterLike | Sequence[AdapterLike],
    destination: str | PathLike[str],
    *,
    format: Format = "same",
    quantize: str | None = None,
    double_quant: bool = False,
    compute_dtype: str | None = None,
    load_dtype: str | None = None,
    skip_modules: Sequence[str] | None = None,
    fold_into: Literal["quantized", "original"] = "quantized",
    rounding: Rounding | Literal["calibrated"] | None = None,
    calibration: Any = None,
    undo: str | PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: Literal["adapter", "base"] | str | PathLike[str] | None = None,
    revision: str | None = None,
    partial: bool = False,
    trained_on: str | PathLike[str] | None = None,
    component: str | None = None,
    variant: str | None = None,
    strength: float | Sequence[float] = 1.0,
    strength_mode: StrengthMode = "angle",
    follow_links: bool = False,
    device: str = "cpu",
    device_map: str | Mapping[str, Any] | None = None,
    executor: Executor | Literal["ray"] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> FoldRecord:
    """Fold an adapter into a checkpoint on disk, one weight at a time, without building the model.

    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT")                      # in the formats of BASE
    >>> record.kept > 0.9
    True
    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUT-BF16", format="bf16")     # dequantised
    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUT-INT8", format="int8")     # rounded once, to int8
    >>> record = oftsurgery.fold_checkpoint("PLAIN", "ADAPTER", "OUT-NF4", format="nf4", double_quant=True)

    Args:
        source: a folder with ``config.json`` and safetensors shards of transformers or diffusers, plain or
            bitsandbytes-quantised, or quantised by GPTQ, AWQ, HQQ, compressed-tensors, torchao or in FP8 (``"same"`` keeps the formats
            of HQQ, compressed-tensors and FP8 alone); a folder with a pipeline of diffusers (``model_index.json``); a Hub id; or a
            URL (``s3://bucket/base``, ``hf://owner/name``), whose weights are read by ranges. None: the base that the adapter's
            config names, at the revision that it names.
        adapter: as for :func:`fold`; several adapters are the live chain. In a pipeline, names and shapes decide which model a
            module belongs to.
        destination: a folder that does not exist yet; it appears whole, by one rename. Or a URL (``s3://bucket/out``), where the file
            that makes the folder a model appears last.
        format: the format that is written: ``"same"`` as the source, ``"bnb"`` as a quantised source, ``"fp32"``, ``"fp16"``,
            ``"bf16"`` (dequantised), ``"nf4"``, ``"fp4"``, ``"int8"``. From any source the exactly rotated weight is rounded once.
            The quantised formats are those of every weight that the source holds quantised, or that loading would quantise in a
            plain source.
        quantize: quantise a plain source to this format first, exactly as transformers' bitsandbytes loading did for the
            trainer, so that the adapter meets the base that it was trained on; a quantised ``format`` implies this.
        double_quant, compute_dtype, load_dtype, skip_modules: the other settings of that loading
            (``bnb_4bit_use_double_quant``, ``bnb_4bit_compute_dtype`` (None: the dtype of the model), ``dtype`` of
            ``from_pretrained`` (None: the config's, as transformers 5 does), ``llm_int8_skip_modules``). Where ``format`` is
            another 4-bit format than that of the base, ``double_quant`` is that of ``format``.
        fold_into: rotate the ``"quantized"`` base, or the ``"original"`` plain weights.
        trained_on: what the adapter was trained on: ``"nf4-double"``, ``"nf4"``, ``"fp4-double"``, ``"fp4"``, ``"int8"`` or
            ``"plain"``, or the file of settings of axolotl, LLaMA-Factory or ms-swift. A plain source is quantised so before
            the fold; a quantised source must be stored so. None: what the files of the trainer beside the adapter say, or a
            quantised base that the adapter's config names; else a plain source is refused, unless ``quantize``,
            ``fold_into`` or a quantised ``format`` says how it is used. For a pipeline whose models are stored in different ways,
            of each model: ``"unet=nf4,text_encoder=plain"``; ``quantize``, ``fold_into``, ``load_dtype`` and ``skip_modules`` are
            then of the plain models.
        rounding: how rotated quantised weights are rounded, as for :func:`fold`.
        calibration: a file of texts (``.txt``: one a line; ``.jsonl``, ``.parquet``: each row's ``text``), a list of
            texts, or batches as for :func:`fold`. Texts go through the checkpoint's own tokenizer, and each is cut after
            512 tokens. Only a calibration loads the model through transformers and runs it. ``"self"`` needs no data, as for
            :func:`fold`; the tokens that the model wrote lie beside the record, in ``oftsurgery_calibration.json``, and a later
            fold reads this file.
        undo: a file to write, outside ``destination``, from which :func:`unfold_checkpoint` restores every byte that
            the fold changes, of all models of a pipeline. The fold must keep the weights' formats (an undo does not take back
            that a plain source was quantised first).
        max_shard_size: bytes, or text as the Hub's tools write sizes (``"5GB"``).
        tokenizer: the tokenizer and the chat template to write beside the weights: those of the ``"adapter"``, of the
            ``"base"``, or of a folder; None: those of the adapter where its folder has them, else those of the base.
        revision: the branch, tag or commit of a source on the Hub, which ``owner/name@revision`` names too. None: the
            revision that the adapter's config names for this base, else the main branch.
        partial: fold an adapter that lacks modules which its own config targets. These modules stay as they are, and the
            record names them.
        component: the model of a pipeline that takes the adapter (``"text_encoder_2"``); the other models are copied.
        variant: the variant of the weights (``"fp16"``). None: the files without a variant's name, or else the only variant.
        strength, strength_mode: as for :func:`fold`.
        follow_links: read files that are links, wherever the links lead. Otherwise the rules of
            :func:`~oftsurgery.files.links.check_link` say which links are followed.
        device: where the arithmetic runs.
        device_map: where the model of a calibration lies that does not run block by block, or that writes its own texts: as for
            transformers' ``from_pretrained``, such as ``"auto"``, with which accelerate spreads the model over all GPUs and the
            memory of the CPU. None: on ``device``.
        executor: who computes: any ``concurrent.futures.Executor`` whose workers see the same files at the same paths, such as a
            ``ProcessPoolExecutor`` that starts its workers with ``spawn``, or Dask's ``client.get_executor()``; ``"ray"`` for
            :class:`~oftsurgery.RayExecutor`. The output, the record and the undo record are the same bytes. A task that is lost
            with its worker is given again. ``device`` is then a device of the workers. Of a calibrated fold, the workers run the
            model's blocks on chunks of the texts and round the layers, and this process writes. None: this process.
        resume: go on with the unfinished work of a run that was killed; without such work, start.
        force: replace what is at ``destination`` (and ``undo``), at the rename and not before.
        progress: show a bar of the bytes read, or a function of (bytes done, bytes in all, what).

    Returns:
        the :class:`~oftsurgery.FoldRecord`, which is ``oftsurgery.json`` in the destination too.

    Raises:
        CheckpointError, AdapterError, MatchError, ShapeError, FormatError, StateError, NonFiniteError: an input cannot be
            used; nothing was written.
        CalibrationError: there are no texts or no tokenizer, or transformers does not know the model.
        DiskError: the disk is full, read-only or in use; finished work waits to be resumed.
        EngineError: the ``executor`` has lost its workers; finished work waits to be resumed.
        RemoteError: a URL could not be read or written; finished work waits to be resumed.
        MissingDependencyError: the client of a URL is not installed.
    Warns:
        RoundingWarning and the others of :func:`fold`.
    """
    mode = rounding_mode(rounding, calibration)
    settings = FoldSettings(
        format=format,
        quantize=quantize,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        load_dtype=load_dtype,
        skip_modules=skip_modules,
        fold_into=fold_into,
        rounding=mode,
        undo=undo,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        revision=revision,
        partial=partial,
        trained_on=trained_on,
        component=component,
        variant=variant,
        strength=strength,
        strength_mode=strength_mode,
    )
    if executor is None:
        usable_device(device)
    if device_map is not None and mode != "calibrated":
        message = "device_map says where a calibration runs the model, and this fold has no calibration"
        raise StateError(message, remedy="leave out device_map=… (--device-map), or give calibration=… (--calibration)")
    with links_followed(follow_links), opened_executor(executor) as workers:
        if workers is not None and source is None:
            source = named_base(loaded_adapters(adapter))
        plan = plan_fold(source, adapter, settings)
        engine = None
        if workers is not None:
            again = functools.partial(plan_fold, here(source), here(adapter), here(settings))
            engine = Engine(workers, functools.partial(with_links, follow_links, again, device), device)
        if isinstance(plan, PipelinePlan):
            return _fold_pipeline(
                plan, located(destination), device, engine, resume=resume, force=force, progress=progress
            )
        texts = None
        if mode == "calibrated":
            from oftsurgery.calibrate.sources import source_of  # a fold without a calibration runs no model

            texts = source_of(calibration, plan.source.folder)
            plan = replace(plan, calibration=texts.facts)
        with shown(progress, "fold") as step:
            beside = _ProgressWithCalibration(step or (lambda *_: None))
            calibrate = None
            if texts is not None:
                from oftsurgery.calibrate.checkpoint import checkpoint_inputs

                where: dict[str, Any] = {"device": device, "device_map": device_map, "engine": engine}
                calibrate = functools.partial(checkpoint_inputs, plan, texts, progress=beside.batch, **where)
            record = run_plan(
                plan,
                located(destination),
                device=device if engine is None else "cpu",
                resume=resume,
                force=force,
                progress=beside.bytes,
                calibrate=calibrate,
                write_shards=None if engine is None or calibrate is not None else engine.writer(),
            )
    assert record is not None  # noqa: S101 - a fold has one
    return record


def _fold_pipeline(
    plan: PipelinePlan,
    destination: Path,
    device: str,
    engine: Engine | None,
    *,
    resume: bool,
    force: bool,
    progress: bool | Progress,
) -> FoldRecord:
    with shown(progress, "fold") as step:
        record = run_pipeline(
            plan,
            destination,
            device=device,
            resume=resume,
            force=force,
            progress=step,
            writer_of=None if engine is None else engine.writer,
        )
    assert record is not None  # noqa: S101 - a fold has one
    return record


@dataclass
class _ProgressWithCalibration:
    """Reports a calibration's batches within the progress in bytes, which stands still during the calibration."""

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
    component: str | None = None,
    variant: str | None = None,
    follow_links: bool = False,
    device: str = "cpu",
    executor: Executor | Literal["ray"] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> FoldRecord | None:
    """Take the last fold out of a checkpoint on disk.

    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT", undo="OUTPUT.undo")
    >>> oftsurgery.unfold_checkpoint("OUTPUT", "RESTORED", base="BASE")                       # exact
    >>> oftsurgery.unfold_checkpoint("OUTPUT", "RESTORED-TOO", undo="OUTPUT.undo")            # exact, without BASE

    Args:
        folded: a folder that :func:`fold_checkpoint` wrote, or its URL. Of a pipeline, all models that carry a fold, or ``component``.
        destination: as for :func:`fold_checkpoint`.
        base: the checkpoint that was folded: its bytes are restored exactly, and checked against the hashes in
            ``oftsurgery.json``. A base on the Hub is read at the revision that the record names.
        adapter: the adapter that was folded. Its true inverse rotates the weights back, quantised weights are rounded once
            more, and an :class:`~oftsurgery.UnfoldWarning` states the error.
        undo: the file that ``fold_checkpoint(…, undo=…)`` or :func:`fold` of the same model wrote: the bytes are restored
            exactly, and checked against the hashes in the file.
        rounding: how quantised weights that are rotated back are rounded, as for :func:`fold`.
        max_shard_size, component, variant, follow_links, device, executor, resume, force, progress: as for :func:`fold_checkpoint`.

    Returns:
        the record of the folds that remain, or None.

    Raises:
        StateError: not exactly one of ``base``, ``adapter`` and ``undo`` is given, or the last fold is another one.
        IntegrityError: ``base`` is not what was folded, or ``folded`` is not what the fold left.
        UndoError: the file ``undo`` is damaged, or not an undo record.
        OFTSurgeryError: as :func:`fold_checkpoint`.
    Warns:
        UnfoldWarning: the result differs from the base by rounding.
    """
    ways = (
        "give adapter=… (--adapter), which rotates back, or base=… (--base) or undo=… (--undo), which restore exactly"
    )
    check_one_way_back((adapter, base, undo), ways)
    if executor is None:
        usable_device(device)
    settings: dict[str, Any] = {
        "rounding": rounding,
        "size": parse_size(max_shard_size),
        "component": component,
        "variant": variant,
    }
    with links_followed(follow_links), opened_executor(executor) as workers:
        plan = plan_back(folded, base, adapter, undo, **settings)
        engine = None
        if workers is not None:
            again = functools.partial(plan_back, here(folded), here(base), here(adapter), here(undo), **settings)
            engine = Engine(workers, functools.partial(with_links, follow_links, again, device), device)
        with shown(progress, "unfold") as step:
            how: dict[str, Any] = {"device": device, "resume": resume, "force": force, "progress": step}
            if isinstance(plan, PipelinePlan):
                writer_of = None if engine is None else engine.writer
                return run_pipeline(plan, located(destination), **how, writer_of=writer_of)
            write_shards = None if engine is None else engine.writer()
            return run_plan(plan, located(destination), **how, write_shards=write_shards)


def plan_back(
    folded: str | PathLike[str],
    base: str | PathLike[str] | None,
    adapter: AdapterLike | Sequence[AdapterLike] | None,
    undo: str | PathLike[str] | None,
    *,
    rounding: str,
    size: int,
    component: str | None,
    variant: str | None,
) -> CheckpointPlan | PipelinePlan:
    """The plan of :func:`unfold_checkpoint`, which raises the same errors and writes nothing."""
    source = opened_model(folded, variant=variant, component=component)
    if isinstance(source, Pipeline):
        return plan_pipeline_back(
            source,
            base=None if base is None else opened_pipeline(base, variant),
            undo=undo,
            adapters=() if adapter is None else loaded_adapters(adapter),
            component=component,
            rounding=rounding,
            max_shard_bytes=size,
        )
    if base is not None:
        plain = opened_base(base, record_beside(source), variant)
        return plan_restore(source, plain, max_shard_bytes=size)
    if undo is not None:
        return plan_undo(source, open_undo(Path(undo).expanduser(), record_beside(source)), max_shard_bytes=size)
    assert adapter is not None  # noqa: S101 - the caller has checked it
    return plan_unfold(source, loaded_adapters(adapter), rounding=rounding, max_shard_bytes=size)
