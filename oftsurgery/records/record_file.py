"""A fold's record is the file ``oftsurgery.json`` of a folder: :func:`record_in` reads it, :func:`write_record` writes it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from oftsurgery.errors import CheckpointError, printable
from oftsurgery.files.finding import HUB
from oftsurgery.files.layout import PIPELINE
from oftsurgery.files.reading import inside, read_json

from .record import AdapterInfo, FoldRecord, joined

if TYPE_CHECKING:
    from oftsurgery.files.checkpoint import Checkpoint
    from oftsurgery.files.staging import Staging

RECORD = "oftsurgery.json"
_RESTORE = "restore the record, or remove it if nothing is folded in"


def write_record(staging: Staging, record: FoldRecord) -> FoldRecord:
    """Write ``record`` into a folder, with the hashes of all other files except the card, which people edit. Returns the
    record with these hashes.
    """
    record = replace(record, files=staging.hashes(but=(RECORD, "README.md")))
    staging.put_json(RECORD, record.to_dict())
    return record


def record_in(folder: Path) -> FoldRecord | None:
    """The record in a checkpoint's folder, or None.

    Raises:
        CheckpointError: the record cannot be read.
    """
    return record_at(inside(folder, RECORD)) if os.path.lexists(folder / RECORD) else None


def record_at(path: Path) -> FoldRecord:
    """The record in a file.

    Raises:
        CheckpointError: the record cannot be read.
    """
    try:
        return FoldRecord.from_dict(read_json(path))
    except (TypeError, RecursionError) as error:
        message = f"the record of an earlier fold cannot be read ({printable(error)})"
        raise CheckpointError(message, path=path, remedy=_RESTORE) from error


def sidecar_of(file: Path) -> Path:
    """The file that holds the record of a checkpoint in a single file."""
    return file.with_name(f"{file.name}.{RECORD}")


def record_beside(checkpoint: Checkpoint) -> FoldRecord | None:
    """The record of a checkpoint, in its folder or beside its single file; or None.

    Raises:
        CheckpointError: the record cannot be read.
    """
    if not checkpoint.single:
        return record_in(checkpoint.folder)
    name = sidecar_of(checkpoint.path).name
    return record_at(inside(checkpoint.folder, name)) if os.path.lexists(checkpoint.folder / name) else None


def records_in(folder: Path) -> FoldRecord | None:
    """The record in a checkpoint's folder or beside its single file, or of a pipeline the records of its models as one; or None.

    Raises:
        CheckpointError: a record cannot be read.
    """
    if folder.is_file():
        sidecar = sidecar_of(folder)
        return record_at(sidecar) if sidecar.is_file() else None
    if not (folder / PIPELINE).is_file():
        return record_in(folder)
    below = sorted(path.parent.name for path in folder.glob(f"[!.]*/{RECORD}"))
    found = {name: record for name in below if (record := record_in(folder / name)) is not None}
    return joined(found) if found else None


def public_info(info: AdapterInfo) -> AdapterInfo:
    """``info`` without paths of this machine: a local folder is given by its name alone."""
    return replace(info, source=public_place(info.source), base_model=public_place(info.base_model))


def public_record(record: FoldRecord) -> FoldRecord:
    """``record`` and its earlier ones without paths of this machine."""
    return replace(
        record, adapters=tuple(map(public_info, record.adapters)), earlier=tuple(map(public_record, record.earlier))
    )


def public_place(place: str | None) -> str | None:
    """The place without its path: a Hub id or an adapter's name unchanged, of a path the last part."""
    if place is None:
        return None
    path = Path(place)
    hub_id = place.count("/") <= 1 and not place.startswith(("/", ".", "~")) and "\\" not in place
    known = hub_id and not os.path.exists(place)  # noqa: PTH110 - os.path.exists takes any name
    return place if known or place.startswith(HUB) else path.name or place
