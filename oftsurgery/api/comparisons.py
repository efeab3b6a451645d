"""The functions here compare two checkpoints on disk: one extracts an adapter, the other checks a fold against its base."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.calibrate.batches import given_batches
from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.extract_adapters import ExtractedAdapter, Pair, extract_from_checkpoints, pairs_of
from oftsurgery.checks.verify_checkpoints import Comparison, begin_comparison, check_checkpoint
from oftsurgery.checks.verify_outputs import base_settings, compare_on_inputs
from oftsurgery.checks.verify_report import VerifyReport
from oftsurgery.errors import StateError, printable
from oftsurgery.files.checkpoint import Checkpoint, open_checkpoint, open_single_file
from oftsurgery.files.links import following_links, links_followed
from oftsurgery.files.pipeline import Pipeline, is_pipeline
from oftsurgery.progress import Progress, shown
from oftsurgery.stores.dequantised import dequantised, open_models
from oftsurgery.stores.idle import is_idle
from oftsurgery.stores.modules import modules_of

from .arguments import AdapterLike, loaded_adapters, opened_model, opened_pipeline
from .elsewhere import here, with_links
from .opened_executor import opened_executor
from .pipelines import compared_models, differing_models, report_of_pipeline


def extract_checkpoint(
    base: str | PathLike[str],
    merged: str | PathLike[str],
    block_size: int | None = None,
    *,
    component: str | None = None,
    variant: str | None = None,
    follow_links: bool = False,
    executor: Executor | Literal["ray"] | None = None,
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
        variant, follow_links, executor: as for :func:`fold_checkpoint`.
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
        pair = _opened_pair(base, merged, component, variant)
    begin = b""
    if executor is not None:
        opened = partial(_opened_pair, here(base), here(merged), component, variant)
        begin = pickle.dumps(partial(with_links, follow_links, partial(_pairs, opened)))
    with shown(progress, "extract", "layer") as step, opened_executor(executor) as workers:
        return extract_from_checkpoints(
            *pair, block_size, base_name=str(base), progress=step, executor=workers, begin=begin
        )


def _opened_pair(
    base: str | PathLike[str], merged: str | PathLike[str], component: str | None, variant: str | None
) -> tuple[Checkpoint, Checkpoint]:
    """The two models to compare."""
    first, second = (opened_model(one, variant=variant, component=component) for one in (base, merged))
    if isinstance(first, Pipeline) and isinstance(second, Pipeline):
        return differing_models(first, second, component)
    if isinstance(first, Pipeline) or isinstance(second, Pipeline):
        pipeline, model = (base, merged) if isinstance(first, Pipeline) else (merged, base)
        raise StateError(
            f"{printable(pipeline)} is a pipeline of diffusers, but {printable(model)} is one model",
            remedy="give two pipelines, or the folders of the same model in both",
        )
    return first, second


def _pairs(opened: Callable[[], tuple[Checkpoint, Checkpoint]]) -> dict[str, Pair]:
    """The pairs of weights, in a worker."""
    return pairs_of(*opened())


@dataclass(frozen=True)
class _Given:
    """The checkpoints and the adapter of a comparison, as a worker finds them too."""

    folder: Path
    base: str | PathLike[str]
    adapter: AdapterLike | Sequence[AdapterLike]
    component: str | None
    variant: str | None

    def pipelines(self) -> tuple[Pipeline, Pipeline] | None:
        """The folded pipeline and its base; None for one model."""
        if not is_pipeline(self.folder):
            return None
        return open_models(self.folder, self.variant), opened_pipeline(self.base, self.variant)

    def models(self) -> dict[str, tuple[Checkpoint, Checkpoint, Sequence[OFTAdapter]]]:
        """``{component, or "" for one model: (folded, base, adapters)}``."""
        adapters = loaded_adapters(self.adapter)
        pipelines = self.pipelines()
        if pipelines is not None:
            return compared_models(*pipelines, adapters, self.component)
        start = opened_model(self.base, adapters=adapters, variant=self.variant, component=self.component)
        if isinstance(start, Pipeline):
            message = "the base is a pipeline of diffusers, but the folded checkpoint is one model"
            raise StateError(message, path=start.folder, remedy="give the folder of the same model in the base")
        opened = (
            open_single_file(self.folder)
            if self.folder.is_file()
            else dequantised(open_checkpoint(self.folder, self.variant))
        )
        return {"": (opened, start, adapters)}

    def begin(self, follow_links: bool, component: str, tolerance: float | None) -> Comparison:
        """The comparison of one model, in a worker."""
        with links_followed(follow_links):
            parts = self.models()[component]
            return begin_comparison(*parts, tolerance=tolerance, idle=_idle_in(parts[0]))


def compare_with_base(
    folder: Path,
    base: str | PathLike[str],
    adapter: AdapterLike | Sequence[AdapterLike],
    *,
    texts: Any,
    tolerance: float | None,
    component: str | None = None,
    variant: str | None = None,
    executor: Executor | None = None,
) -> CheckpointReport:
    """:func:`~oftsurgery.verify_checkpoint` of a folder with its base and adapter."""
    given = _Given(folder, base, adapter, component, variant)
    reports = {}
    for name, (opened, start, adapters) in given.models().items():
        begin = b""
        if executor is not None:
            there = _Given(folder.absolute(), here(base), here(adapter), component, variant)
            begin = pickle.dumps(partial(there.begin, following_links(), name, tolerance))
        reports[name] = _check(opened, start, adapters, texts, tolerance, executor, begin)
    pipelines = given.pipelines()
    return reports[""] if pipelines is None else report_of_pipeline(*pipelines, reports)


def _check(
    opened: Checkpoint,
    start: Checkpoint,
    adapters: Sequence[OFTAdapter],
    texts: Any,
    tolerance: float | None,
    executor: Executor | None,
    begin: bytes,
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
        idle=_idle_in(opened),
        executor=executor,
        begin=begin,
    )


def _idle_in(folded: Checkpoint) -> Callable[[Any, str], bool]:
    return lambda model, path: is_idle(modules_of(model), path, quantised="quantization_config" in folded.config)
