""":func:`write_files` writes small files, each whole or not at all; :func:`disk_errors` explains the system's errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from oftsurgery.errors import DiskError, OFTSurgeryError, StateError, printable

from .remote import anything_at, is_url_path, url_of


class Replacement:
    """A file that is written at ``beside`` until :meth:`put` moves it to ``path``. At the end of the context the file at
    ``beside`` is removed.
    """

    def __init__(self, path: Path, mark: str | None = None) -> None:
        self.path = path
        self.beside = path.parent / f".{path.name}.{mark or f'{os.getpid()}.new'}"

    def put(self) -> None:
        """Move the complete file, which must be on the disk, to ``path``."""
        with disk_errors(self.path):
            self.beside.replace(self.path)
            sync_folder(self.path.parent)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.beside.unlink()


def write_files(files: Mapping[Path, bytes], *, force: bool) -> None:
    """Write small files, each whole or not at all: all files are renamed to their places when all are on the disk.

    Args:
        files: ``{path: contents}``; missing folders are made.
        force: replace existing files.

    Raises:
        StateError: a file exists, or a file is in the place of a folder; nothing is written then.
        DiskError: a file could not be written.
    """
    for path in files:
        if path.is_dir():
            raise StateError("a folder is in the place of the file", path=path, remedy="name another file")
        missing_above(path)
        check_free("file", path, force=force)
    with contextlib.ExitStack() as stack:
        for path in files:
            stack.enter_context(folders_above(path))
        waiting = [stack.enter_context(Replacement(path)) for path in files]
        for new in waiting:
            with disk_errors(new.path):
                write_synced(new.beside, files[new.path])
        for new in waiting:
            new.put()


def check_free(what: str, path: Path, *, force: bool) -> None:
    """Refuse a path at which something exists, unless ``force``; the message calls the path ``what``."""
    if exists(path) and not force:
        remedy = f"name another {what}, or replace the {what} with force=True (--force)"
        raise StateError(f"the {what} exists", path=path, remedy=remedy)


def missing_above(path: Path) -> list[Path]:
    """The folders above ``path`` that do not exist, the deepest first.

    Raises:
        StateError: a file is in the place of one of these folders, or ``path`` names a URL.
    """
    if is_url_path(path):
        message = "this output is written to a folder of this machine, and not to a URL"
        raise StateError(
            message,
            path=url_of(path),
            remedy="name a folder here, and copy it; fold, unfold and fold-many write to a URL",
        )
    above = [folder for folder in path.absolute().parents if not folder.is_dir()]
    file = next((folder for folder in above if exists(folder)), None)
    if file is not None:
        message = "a file is in the place of a folder of the path to write"
        raise StateError(message, path=file, remedy="name a path in a folder")
    return above


@contextlib.contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the missing folders above ``path``; those that are empty at the end are removed again.

    Raises:
        StateError: a file is in the place of one of these folders.
        DiskError: a folder could not be made.
    """
    made = missing_above(path)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()


def exists(path: Path) -> bool:
    """Whether anything is at ``path``, a broken link included, or at the URL that it names."""
    if is_url_path(path):
        return anything_at(path)
    return path.exists() or path.is_symlink()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, and wait until its bytes are on the disk itself."""
    with path.open("wb") as file:
        file.write(data)
        to_disk(file)


def to_disk(file: BinaryIO) -> None:
    """Wait until the written bytes are on the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until the bytes that were written to a file, and that the file's writer has flushed, are on the disk itself."""
    with path.open("rb+") as file:
        to_disk(file)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of files is on the disk itself."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REASONS = {
    errno.ENOSPC: ("the disk is full", "make room and continue with resume=True (--resume)"),
    errno.EDQUOT: ("the disk quota is used up", "make room and continue with resume=True (--resume)"),
    errno.EFBIG: (
        "the file is larger than this system allows",
        "write smaller shards: max_shard_size (--max-shard-size)",
    ),
    errno.EROFS: ("the file system is read-only", "name a destination elsewhere"),
    errno.EACCES: ("this user has no permission to write", "name a destination elsewhere"),
    errno.EPERM: ("this user has no permission to write", "name a destination elsewhere"),
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into :class:`DiskError` with a remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OFTSurgeryError):  # some of them are system's errors too
            raise
        reason, remedy = _REASONS.get(error.errno or 0, (printable(error.strerror or error), "check the disk"))
        raise DiskError(reason, path=error.filename or path, remedy=remedy) from error
