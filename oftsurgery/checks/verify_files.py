""":func:`check_files` compares a folder's files with the hashes in its record. This file needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from types import MappingProxyType

from oftsurgery.errors import StateError
from oftsurgery.files.reading import inside, is_nested_name, sha256_of
from oftsurgery.files.remote import url_path
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import RECORD, records_in
from oftsurgery.tasks import mapped

from .checkpoint_report import CheckpointReport, FileCheck


def check_files(folder: Path, executor: Executor | None = None) -> CheckpointReport:
    """Compare a folder's files, or a single file, with the SHA-256 hashes in its ``oftsurgery.json``, without the weights' values.

    Raises:
        StateError: the folder has no record, or the record has no hashes.
        CheckpointError: the record cannot be read.
    """
    record = records_in(folder)
    if record is None or not record.files:
        message = (
            f"the {'file' if folder.is_file() else 'folder'} has no {RECORD}"
            if record is None
            else "the record has no hashes of files"
        )
        remedy = "give the base and the adapter too, to compare the weights: oftsurgery verify FOLDED BASE ADAPTER"
        raise StateError(message, path=folder, remedy=remedy)
    return CheckpointReport(
        MappingProxyType({}), None, file_checks(folder.parent if folder.is_file() else folder, record, executor)
    )


def file_checks(folder: Path, record: FoldRecord, executor: Executor | None = None) -> Mapping[str, FileCheck]:
    """The state of each file that the record names, by the recorded hashes, which the ``executor`` computes if there is one."""
    there = [n for n in sorted(record.files) if not (is_nested_name(n) and not os.path.lexists(folder / n))]
    # `inside` refuses a name or a link that leaves the folder
    paths = [inside(folder, name, nested=True).absolute() for name in there]
    if executor is not None:  # another process finds a file behind a URL by its URL
        paths = [url_path(path) or path for path in paths]
    hashes = dict(zip(there, mapped(executor, sha256_of, [(path,) for path in paths]), strict=True))
    states: dict[str, FileCheck] = {
        n: "missing" if n not in hashes else "ok" if hashes[n] == record.files[n] else "changed"
        for n in sorted(record.files)
    }
    return MappingProxyType(states)
