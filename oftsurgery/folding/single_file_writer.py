"""A checkpoint in a single file as the output of a run: the file itself, and its record beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from oftsurgery.errors import StateError
from oftsurgery.files.reading import read_header
from oftsurgery.files.staging import Staging
from oftsurgery.files.writing import check_free
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import RECORD, sidecar_of, write_record


def check_single_destination(destination: Path, *, force: bool) -> None:
    """Refuse a destination that is no name of a safetensors file, or beside which another record lies.

    Raises:
        StateError: as said.
    """
    if destination.is_dir() or not destination.name.endswith(".safetensors"):
        message = "the source is a single file, so the destination is a file too, and its name ends in .safetensors"
        raise StateError(message, path=destination, remedy="name the new file: OUTPUT.safetensors")
    check_free("destination", destination, force=force)
    check_free("record of the destination", sidecar_of(destination), force=force)


def with_sizes(staging: Staging, file: str, record: FoldRecord, before: int) -> FoldRecord:
    """The record with the bytes of all tensors before and after the fold."""
    after = sum(entry.nbytes for entry in read_header(staging.folder / file)[0])
    return replace(record, sizes={"before": before, "after": after})


def publish_single_file(staging: Staging, file: str, record: FoldRecord | None) -> FoldRecord | None:
    """Make ``file`` the destination, with the record beside it, which comes first: no file appears without its record."""
    destination = staging.destination
    files = {file: destination}
    if record is not None:
        record = write_record(staging, record)
        record = replace(record, files={destination.name: record.files[file]})
        staging.put_json(RECORD, record.to_dict())
        files = {RECORD: sidecar_of(destination), **files}
    # without a record, that of the file that is replaced goes
    staging.publish_files(files, sidecar_of(destination) if record is None else None)
    return record
