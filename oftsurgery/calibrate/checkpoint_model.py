"""The model of a checkpoint as a calibration runs it: block by block from the disk, or as transformers loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from oftsurgery.errors import CalibrationError, StateError, needs, printable
from oftsurgery.folding.disk_plan import CheckpointPlan
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.stores.dequantised import from_pretrained
from oftsurgery.stores.folder import load_dtype
from oftsurgery.stores.live_quantisation import settings_from
from oftsurgery.stores.skeleton import quiet, readable_config, skeleton

from .batches import TRANSFORMERS
from .block_sources import Job, StoredBlocks
from .blocks import block_paths
from .layer_inputs import check_wanted


def calibrated_jobs(plan: CheckpointPlan) -> dict[str, Job]:
    """The modules' paths in the model whose rounding a calibration decides, and what becomes of each module.

    Raises:
        StateError: there is none.
    """
    if plan.source.stored_as is not None and plan.format == "same":
        raise StateError(
            f"a calibration chooses among the levels of bitsandbytes' formats, and this fold keeps the format of {plan.source.stored_as}",
            path=plan.source.folder,
            remedy="leave out the calibration (--calibration): the rounding 'preserve' needs no data; or choose format='nf4' or 'int8' (--format nf4)",
        )
    rotated = [(p.rotate, p.into) for p in plan.parts if p.rotate is not None]
    jobs: dict[str, Job] = {rotate.path: (rotate.chain, into) for rotate, into in rotated if rotate.takes_inputs(into)}
    check_wanted(jobs)
    return jobs


def stored_blocks(plan: CheckpointPlan, jobs: Mapping[str, Job], device: str) -> StoredBlocks | None:
    """The blocks of the checkpoint; None where the model has to be in memory as a whole."""
    store, changes = plan.store, plan.changes
    _class_of(plan)
    paths = block_paths(store.architecture.modules, jobs)
    inside = tuple(f"{path}." for path in paths)
    wanted = plan.fold_into == "quantized" or store.quantization is None
    if not wanted or changes.replace or changes.vocabulary or changes.apart or store.added:
        return None
    if not all(r.path in jobs and r.path.startswith(inside) for r in changes.rotate):
        return None
    model = skeleton(store.config, load_dtype(plan.source), len(store.entries), buffers=True)
    if not set(model.state_dict()) <= {*store.tensors, *store.architecture.tied}:
        return None
    q = store.quantization
    said = plan.source.config.get("quantization_config") or {}
    settings = settings_from(said, torch.float32 if q is None or q.compute_dtype is None else q.compute_dtype)
    source = StoredBlocks(store, model, list(jobs), device, settings)
    if not all(source.is_plain(path, chain) for path, (chain, _) in jobs.items()):
        return None
    source.fill([n for n in source.names if not n.startswith(inside) and n not in store.architecture.tied])
    model.tie_weights()
    return source


def _class_of(plan: CheckpointPlan) -> Any:
    """transformers' class of the checkpoint's model.

    Raises:
        CalibrationError: transformers does not know the class, or the names of the tensors.
        MissingDependencyError: transformers is not installed.
    """
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
    return cls


def load_model(plan: CheckpointPlan, device_map: str | Mapping[str, Any]) -> nn.Module:
    """The model as the trainer loaded it, on the devices that ``device_map`` says (as for transformers' ``from_pretrained``).

    Raises:
        CalibrationError: transformers cannot load the checkpoint.
    """
    cls = _class_of(plan)
    import transformers

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
    if device_map != {"": "cpu"}:
        settings["device_map"] = device_map
    try:
        with quiet():
            model = from_pretrained(cls, plan.source, config, **settings)
    except Exception as error:  # transformers raises errors of any kind at files that it cannot use
        message = f"transformers cannot load the checkpoint ({type(error).__name__}: {printable(error)})"
        remedy = "fold without data (--rounding preserve), or load the model in Python and fold it in memory"
        raise CalibrationError(message, path=plan.source.folder, remedy=remedy) from error
    return model
