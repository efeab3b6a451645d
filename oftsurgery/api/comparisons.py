"""The functions here compare two checkpoints on disk: one extracts an adapter, the other checks a fold against its base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.calibrate.batches import given_batches
from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.extract_adapters import ExtractedAdapter, extract_from_checkpoints
from oftsurgery.checks.verify_checkpoints import check_checkpoint
from oftsurgery.checks.verify_outputs import base_settings, compare_on_inputs
from oftsurgery.checks.verify_report import VerifyReport
from oftsurgery.errors import StateError, printable
from oftsurgery.files.checkpoint import Checkpoint, open_checkpoint, open_single_file
from oftsurgery.files.links import links_followed
from oftsurgery.files.pipeline import Pipeline, is_pipeline, open_pipeline
from oftsurgery.progress import Progress, shown
from oftsurgery.stores.dequantised import dequantised
from oftsurgery.stores.idle import is_idle
from oftsurgery.stores.modules import modules_of

from .arguments import AdapterLike, loaded_adapters, opened_model, opened_pipeline
from .pipelines import compare_pipelines, extract_from_pipelines


def extract_checkpoint(
    base: str | PathLike[str],
    merged: str | PathLike[str],
    block_size: int | None = None,
    *,
    component: str | None = None,
    variant: str | None = None,
    follow_links: bool = False,
    progress: bool | Progress = False,
) -> ExtractedAdapter:
    """:func:`extract` from two checkpoints on disk, without building a model: two weights are in memory at a time.

    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT", format="bf16")
    >>> found = oftsurgery.extract_checkpoint("BASE", "OUTPUT")
    >>> found.explained > 0.99
    True

    Args:
        base, merged: folders or Hub ids, plain or bitsandbytes-quantised, each in its own format.
        block_size: as for :func:`extract`.
        component: the model of a pipeline from which the adapter is extracted; None: the only model that differs.
        variant, follow_links: as for :func:`fold_checkpoint`.
        progress: show a bar, or a function of (weights done, weights in all, module path).

    Returns:
        as :func:`extract`.

    Raises:
        CheckpointError: files cannot be used.
        OFTSurgeryError: as :func:`extract`.
    Warns:
        ExtractionWarning: as :func:`extract`.
    """
    with links_followed(follow_links):
        here, there = (opened_model(one, variant=variant, component=component) for one in (base, merged))
    with shown(progress, "extract", "layer") as step:
        extract = partial(extract_from_checkpoints, block_size=block_size, base_name=str(base), progress=step)
        if isinstance(here, Pipeline) and isinstance(there, Pipeline):
            return extract_from_pipelines(here, there, component, extract)
        if isinstance(here, Pipeline) or isinstance(there, Pipeline):
            pipeline, model = (base, merged) if isinstance(here, Pipeline) else (merged, base)
            raise StateError(
                f"{printable(pipeline)} is a pipeline of diffusers, but {printable(model)} is one model",
                remedy="give two pipelines, or the folders of the same model in both",
            )
        return extract(here, there)


def compare_with_base(
    folder: Path,
    base: str | PathLike[str],
    adapter: AdapterLike | Sequence[AdapterLike],
    *,
    texts: Any,
    tolerance: float | None,
    component: str | None = None,
    variant: str | None = None,
) -> CheckpointReport:
    """:func:`~oftsurgery.verify_checkpoint` of a folder with its base and adapter."""
    adapters = loaded_adapters(adapter)
    if is_pipeline(folder):
        plain = opened_pipeline(base, variant)
        check = partial(_check, texts=texts, tolerance=tolerance)
        return compare_pipelines(open_pipeline(folder, variant), plain, adapters, component, check)
    start = opened_model(base, adapters=adapters, variant=variant, component=component)
    if isinstance(start, Pipeline):
        message = "the base is a pipeline of diffusers, but the folded checkpoint is one model"
        raise StateError(message, path=start.folder, remedy="give the folder of the same model in the base")
    opened = open_single_file(folder) if folder.is_file() else dequantised(open_checkpoint(folder, variant))
    return _check(opened, start, adapters, texts=texts, tolerance=tolerance)


def _check(
    opened: Checkpoint, start: Checkpoint, adapters: Sequence[OFTAdapter], *, texts: Any, tolerance: float | None
) -> CheckpointReport:
    """The check of one model."""
    # scores of tokens are large, so few texts are run at once
    batches = [] if texts is None else given_batches(texts, opened.folder, size=4)

    def on_texts(loading: Any) -> VerifyReport:
        return compare_on_inputs(opened, start, adapters, batches, base_settings(opened, start, loading))

    return check_checkpoint(
        opened,
        start,
        adapters,
        tolerance=tolerance,
        on_texts=None if texts is None else on_texts,
        idle=lambda model, path: is_idle(modules_of(model), path, quantised="quantization_config" in opened.config),
    )
