"""The functions here compare two checkpoints on disk: one extracts an adapter, the other checks a fold against its base."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from oftsurgery.calibrate.batches import given_batches
from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.extract_adapters import ExtractedAdapter, extract_from_checkpoints
from oftsurgery.checks.verify_checkpoints import check_checkpoint
from oftsurgery.checks.verify_outputs import base_settings, compare_on_inputs
from oftsurgery.checks.verify_report import VerifyReport
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.files.links import links_followed
from oftsurgery.progress import Progress, shown
from oftsurgery.stores.idle import is_idle
from oftsurgery.stores.modules import modules_of

from .arguments import AdapterLike, loaded_adapters, opened_checkpoint


def extract_checkpoint(
    base: str | PathLike[str],
    merged: str | PathLike[str],
    block_size: int | None = None,
    *,
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
        follow_links: as for :func:`fold_checkpoint`.
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
        here, there = opened_checkpoint(base), opened_checkpoint(merged)
    with shown(progress, "extract", "layer") as step:
        return extract_from_checkpoints(here, there, block_size, base_name=str(base), progress=step)


def compare_with_base(
    folder: Path,
    base: str | PathLike[str],
    adapter: AdapterLike | Sequence[AdapterLike],
    *,
    texts: Any,
    tolerance: float | None,
) -> CheckpointReport:
    """:func:`~oftsurgery.verify_checkpoint` of a folder with its base and adapter."""
    opened = open_checkpoint(folder)
    adapters = loaded_adapters(adapter)
    start = opened_checkpoint(base, adapters=adapters)
    # scores of tokens are large, so few texts are run at once
    batches = [] if texts is None else given_batches(texts, folder, size=4)

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
