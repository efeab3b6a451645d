"""These public functions read a fold's record: :func:`report` draws a page and pictures. They need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from oftsurgery.checks.checkpoint_report import CheckpointReport
from oftsurgery.checks.verify_report import VerifyReport
from oftsurgery.errors import StateError
from oftsurgery.files.finding import checkpoint_place, given_path
from oftsurgery.files.layout import PIPELINE, is_single_file
from oftsurgery.files.reading import read_json, sizes_in
from oftsurgery.files.remote import local_path
from oftsurgery.files.writing import write_files
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import RECORD, record_at, records_in
from oftsurgery.reports.drawing import figures
from oftsurgery.reports.page import render

Verified = VerifyReport | CheckpointReport | Mapping[str, Any] | str | PathLike[str]


def report(
    source: FoldRecord | str | PathLike[str],
    html: str | PathLike[str] | None = None,
    *,
    png: str | PathLike[str] | None = None,
    verified: Verified | Sequence[Verified] = (),
    force: bool = False,
) -> str:
    """Draw a fold's record as one HTML page that needs no network and no file beside it.

    >>> folded = oftsurgery.fold(model, "ADAPTER")
    >>> page = oftsurgery.report(folded.oftsurgery, html="report.html")
    >>> page = oftsurgery.report(folded.oftsurgery, verified=[oftsurgery.verify(folded, live, inputs)])

    Args:
        source: a record (``folded.oftsurgery``), a folder that has a record, or a record's file (``oftsurgery.json``).
        html: file to write the page to.
        png: folder to write ``errors.png`` and ``angles.png`` to, for a model card; a missing folder is made.
        verified: results of :func:`~oftsurgery.verify` or :func:`~oftsurgery.verify_checkpoint` to show too, or JSON files
            that ``oftsurgery verify --json`` printed.
        force: replace files that exist.

    Returns:
        the page, a function of the arguments alone.

    Raises:
        StateError: nothing is folded in, a file exists, or ``verified`` is of another model.
        CheckpointError: the record, or a file of ``verified``, cannot be read.
        MissingDependencyError: ``png`` is given, and matplotlib is not installed.
        DiskError: the disk is full, read-only or in use; nothing is left half-written.
    """
    record, folder = record_of(source)
    given = [verified] if isinstance(verified, (Mapping, str, PathLike)) or hasattr(verified, "to_dict") else verified
    results = [_result_of(v) for v in given]  # type: ignore[arg-type]
    text = render(
        record,
        name=None if folder is None else folder.resolve().name,
        files={} if folder is None else sizes_in(folder),
        verified=results,
    )
    outputs = {} if html is None else {Path(html): text.encode()}
    if png is not None:
        outputs |= {Path(png) / name: data for name, data in figures(record).items()}
    write_files(outputs, force=force)
    return text


def read_record(folder: str | PathLike[str]) -> FoldRecord | None:
    """The record in a checkpoint's ``oftsurgery.json``, or None where nothing is folded in.

    Raises:
        CheckpointError: the folder does not exist, or its record cannot be read.
    """
    if is_single_file(folder):
        return records_in(local_path(folder))
    place = checkpoint_place(folder)
    return records_in(place.fetch([RECORD, f"*/{RECORD}", PIPELINE]))


def record_of(source: object) -> tuple[FoldRecord, Path | None]:
    if isinstance(source, FoldRecord):
        return source, None
    if not isinstance(source, (str, PathLike)):
        message = f"a report needs a record, a folder or a file, not a {type(source).__name__}"
        raise StateError(message, remedy="give the record (folded.oftsurgery), or the folder that a fold wrote")
    path = given_path(source)
    folder = path if path.is_dir() else None
    record = record_at(path) if folder is None and not is_single_file(path) else records_in(path)
    if record is None:
        raise StateError(
            "the folder has no record, so nothing is folded in", path=path, remedy="give a folder that a fold wrote"
        )
    return record, folder


def _result_of(verified: Verified) -> Mapping[str, Any]:
    if isinstance(verified, (str, PathLike)):
        return read_json(Path(verified))
    return verified if isinstance(verified, Mapping) else verified.to_dict()
