""":func:`checkpoint_inputs` gathers the inputs of a checkpoint's layers, from the model that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from oftsurgery.errors import CalibrationError, needs, printable
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.folding.plan import in_names_of
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.progress import Progress
from oftsurgery.stores.skeleton import quiet, readable_config
from oftsurgery.weights.calibrate import InputsOf

from .batches import TRANSFORMERS, Batch, batches_on
from .block_folds import Job
from .layer_inputs import Calibration, check_wanted


def checkpoint_inputs(
    plan: CheckpointPlan, batches: Sequence[Batch], *, device: str, progress: Progress | None = None
) -> InputsOf:
    """The inputs of the layers of a checkpoint that is to be folded, by the modules' paths in the model.

    When the first layer is asked for, transformers loads the model as the trainer loaded it, with the adapters live.
    Only transformers' own classes are built.

    Raises:
        CalibrationError: transformers does not know the model's class, or cannot load the checkpoint.
        MissingDependencyError: transformers is not installed.
    """
    jobs = calibrated_jobs(plan)

    @cache
    def calibration() -> Calibration:
        adapters = [in_names_of(plan.store, adapter) for adapter in plan.changes.adapters]
        moved = batches_on(batches, device)
        return Calibration(load_model(plan, device), adapters, list(jobs), moved, progress=progress, jobs=jobs)

    return lambda path: calibration()(path)


def calibrated_jobs(plan: CheckpointPlan) -> dict[str, Job]:
    """The modules' paths in the model whose rounding a calibration decides, and what becomes of each module.

    Raises:
        StateError: there is none.
    """
    rotated = [(p.rotate, p.into) for p in plan.parts if p.rotate is not None]
    jobs: dict[str, Job] = {rotate.path: (rotate.chain, into) for rotate, into in rotated if rotate.takes_inputs(into)}
    check_wanted(jobs)
    return jobs


def load_model(plan: CheckpointPlan, device: str) -> nn.Module:
    with needs(*TRANSFORMERS):
        import transformers
    cls: Any = getattr(transformers, plan.store.architecture.name or "", None)
    if not hasattr(cls, "from_pretrained"):
        name = printable(plan.store.architecture.name)
        message = f"transformers does not know the model's class ({name}), and a calibration must run the model"
        remedy = "fold without data (--rounding preserve), or load the model with its own code and fold it in memory"
        raise CalibrationError(message, path=plan.source.folder, remedy=remedy)
    if plan.source.wrapped:
        message = "the names of the checkpoint's tensors hold segments of wrappers, which transformers does not load, and a calibration must run the model"
        remedy = (
            "fold without a calibration, or first save the base again without its wrapper (torch.compile, FSDP, DDP)"
        )
        raise CalibrationError(message, path=plan.source.folder, remedy=remedy)
    config = transformers.AutoConfig.for_model(**readable_config(plan.store.config))
    stored = plan.source.config.get("quantization_config")
    settings: dict[str, Any] = {"dtype": "auto"}
    if stored is not None:
        config.quantization_config = dict(stored)
    q = plan.store.quantization
    if q is not None:
        settings["dtype"] = q.dtype or "auto"
        if plan.fold_into == "quantized":
            settings["quantization_config"] = transformers.BitsAndBytesConfig(
                **FORMATS[q.codec].config_fields,
                bnb_4bit_use_double_quant=q.double_quant,
                bnb_4bit_compute_dtype=q.compute_dtype,
                llm_int8_skip_modules=None if q.skip is None else list(q.skip),
            )
    if device != "cpu":
        settings["device_map"] = {"": device}
    try:
        with quiet():
            model: nn.Module = cls.from_pretrained(
                plan.source.folder, config=config, local_files_only=True, use_safetensors=True, **settings
            )
    except Exception as error:  # transformers raises errors of any kind at files that it cannot use
        message = f"transformers cannot load the checkpoint ({type(error).__name__}: {printable(error)})"
        remedy = "fold without data (--rounding preserve), or load the model in Python and fold it in memory"
        raise CalibrationError(message, path=plan.source.folder, remedy=remedy) from error
    return model
