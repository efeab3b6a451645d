""":func:`verify_checkpoint` checks a folded checkpoint on disk. Without a base it reads files and hashes, and needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.verify_files import check_files
from oftsurgery.errors import StateError
from oftsurgery.files.finding import find_checkpoint
from oftsurgery.files.layout import is_single_file
from oftsurgery.files.links import links_followed
from oftsurgery.files.remote import local_path

from .opened_executor import opened_executor

if TYPE_CHECKING:
    from .arguments import AdapterLike


def verify_checkpoint(
    folded: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    *,
    texts: Any = None,
    tolerance: float | None = None,
    component: str | None = None,
    variant: str | None = None,
    follow_links: bool = False,
    executor: Executor | Literal["ray"] | None = None,
) -> CheckpointReport:
    """Check a folded checkpoint on disk, by other code than the fold's.

    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT")
    >>> report = oftsurgery.verify_checkpoint("OUTPUT", "BASE", "ADAPTER")
    >>> report.ok, report.wrong
    (True, {})
    >>> oftsurgery.verify_checkpoint("OUTPUT").ok                # the files alone, against the record's hashes
    True
    >>> print(report.verdict)
    ok: the output computes what the adapter's live layers compute within NF4's rounding; 99% of the adapter is kept

    The files are checked against the hashes in ``oftsurgery.json``. Where base and adapter are given, every tensor that
    the model loads is checked against them.

    Args:
        folded: a folder or Hub id, in any format.
        base: the checkpoint that was folded, or None to check the hashes alone. A base on the Hub is read at the revision
            that the adapter's config names for this base.
        adapter: the adapter that was folded; several in the live order.
        texts: texts or batches, as ``calibration`` of :func:`fold_checkpoint` takes them, on which the folded model and the
            base with the adapter live are compared too (``report.on_texts``). Only texts load the two models through
            transformers and run them.
        tolerance: the largest relative error that passes; None: the error that storing the exact weight in that format
            costs.
        component: the model of a pipeline to check; None: all models that carry a fold, and the other files.
        variant, follow_links, executor: as for :func:`fold_checkpoint`.

    Returns:
        a :class:`~oftsurgery.CheckpointReport` with the state of each file, an error for each rotated weight, and the kind
        of each tensor (``report.tensors``; ``report.wrong`` names what is wrong); ``report.ok`` says whether all pass, and
        ``report.verdict`` is one line about all.

    Raises:
        StateError: one of ``base`` and ``adapter`` is given without the other, or neither is given and there are no hashes
            or there are ``texts``.
        CalibrationError: there are no texts or no tokenizer.
        OFTSurgeryError: as :func:`fold_checkpoint`, for inputs that do not belong together.
    """
    if (base is None) != (adapter is None):
        message = (
            f"the {'adapter' if base is None else 'base'} was given without the {'base' if base is None else 'adapter'}"
        )
        raise StateError(
            message, remedy="give base and adapter (FOLDED BASE ADAPTER), or only FOLDED to check the hashes"
        )
    if base is None and texts is not None:
        message = "texts compare the folded model with its base and the live adapter, and neither of the two was given"
        raise StateError(message, remedy="give base and adapter (FOLDED BASE ADAPTER), or leave out the texts")
    with links_followed(follow_links), opened_executor(executor) as workers:
        folder = local_path(folded) if is_single_file(folded) else find_checkpoint(folded, whole=True)
        if base is None or adapter is None:
            return check_files(folder if component is None else folder / component, workers)
        from .comparisons import compare_with_base  # imports torch

        return compare_with_base(
            folder,
            base,
            adapter,
            texts=texts,
            tolerance=tolerance,
            component=component,
            variant=variant,
            executor=workers,
        )
