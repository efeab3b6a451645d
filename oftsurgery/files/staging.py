"""The folder beside a destination in which a run works, and the rename that makes this folder the destination."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from oftsurgery.errors import CheckpointError, DiskError, StateError

from .reading import is_nested_name, read_json, sha256_of
from .remote import opened, url_path
from .writing import (
    Replacement,
    check_free,
    disk_errors,
    exists,
    folders_above,
    missing_above,
    sync_file,
    sync_folder,
    to_disk,
    write_synced,
)

STATE = ".state.json"
#: end of the name of the folder with the notes about the parts of a shard, which lies beside the shard
PARTS = ".parts"


@dataclass(eq=False)
class Staging:
    """A run's unfinished output: ``.<destination>.oftsurgery`` beside the destination, locked while the run works.

    Attributes:
        destination: the folder that the run writes.
        key: fingerprint of everything that decides the output.
        needed: number of bytes that will be written, which is compared with the free space first.
        resume: continue unfinished work of the same key, if there is any.
        force: replace an existing destination (at the rename, not before) and unfinished work of another key.
        resumable: keep finished files after an error; otherwise nothing is kept, and unfinished work is ignored.

    Raises (on entering):
        StateError: the destination or unfinished work exists, and the arguments do not say what to do; or a file is in the
            place of a folder above the destination.
        DiskError: space or permission is missing, or another run works on the destination.
    """

    destination: Path
    key: str
    _: KW_ONLY
    needed: int
    resume: bool
    force: bool
    resumable: bool = True

    def __post_init__(self) -> None:
        self.folder = self.destination.parent / f".{self.destination.name}.oftsurgery"
        self.lock_path = self.destination.parent / f".{self.destination.name}.oftsurgery.lock"
        self.replaced = self.destination.parent / f".{self.destination.name}.replaced"
        self.state: dict[str, Any] = {"key": self.key, "shards": {}}
        self._ours = False  # whether this run may remove the folder's contents
        self._hashes: dict[str, str] = {}  # of small files, taken while they were written
        # a shard is hashed on one thread and synced on the other, while the run works on
        self._threads = ThreadPoolExecutor(2, "oftsurgery-finish")
        self._finishing: Future[None] | None = None

    def __enter__(self) -> Staging:
        missing_above(self.destination)  # of a URL its error comes before any request
        self._check_free()
        with contextlib.ExitStack() as above:
            above.enter_context(folders_above(self.destination))
            self._begin()
            self._above = above.pop_all()
        return self

    def _begin(self) -> None:
        with disk_errors(self.folder):
            if self.folder.is_symlink():
                message = "a link is in the place of unfinished work"
                raise StateError(message, path=self.folder, remedy="remove the link, or name another destination")
            self._acquire()
            try:
                self._recover()
                # another run may have finished since the first look
                self._check_free()
                self.folder.mkdir(exist_ok=True)
                self._take_over()
                self._check_space()
            except BaseException:
                self._leave()
                raise

    def _check_free(self) -> None:
        check_free("destination", self.destination, force=self.force)

    def __exit__(self, *_: object) -> None:
        with self._above:
            self._leave()

    def _leave(self) -> None:
        """Remove work that is not worth resuming, and release the lock."""
        if self._finishing is not None:
            self._finishing.exception()  # waits: the run's error has not made the last whole shard worthless
        self._threads.shutdown()
        self._tidy()
        with contextlib.suppress(OSError):
            # the lock is still held here: a run that opened the lock's file before sees the removal and tries again
            self.lock_path.unlink()
        self._lock.release()

    def _tidy(self) -> None:
        if self._ours and not (self.resumable and (self.state["shards"] or self._parts())):
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- taking over ---

    def _acquire(self) -> None:
        from filelock import FileLock, Timeout

        self._lock = FileLock(self.lock_path)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            message = "another run is at work on this destination"
            remedy = "wait until the other run ends, or name another destination"
            raise DiskError(message, path=self.destination, remedy=remedy) from None

    def _recover(self) -> None:
        """Finish the work of a run that was killed between the two renames of :meth:`publish`."""
        if not exists(self.replaced):
            return
        if exists(self.destination):
            _remove(self.replaced)
        else:
            self.replaced.rename(self.destination)

    def _take_over(self) -> None:
        """Continue the folder's unfinished work or start anew, as ``resume`` and ``force`` say."""
        state = self._unfinished() if self.resumable else None
        if state is None:
            self._start_anew()
            return
        if not self.resume and not self.force:
            raise StateError(
                "the folder holds unfinished work of an earlier run",
                path=self.folder,
                remedy="continue the work with resume=True (--resume), or start anew with force=True (--force)",
            )
        if not self.resume or state.get("key") != self.key or not _sound(state.get("shards")):
            if not self.force:
                raise StateError(
                    "the unfinished work has other inputs or settings",
                    path=self.folder,
                    remedy="give the earlier inputs and settings again, or start anew with force=True (--force)",
                )
            self._start_anew()
            return
        self.state = state
        self._ours = True
        self._keep_whole_shards()
        self._save_state()

    def _unfinished(self) -> dict[str, Any] | None:
        """The state of unfinished work, empty where it cannot be read; None without unfinished work."""
        if not (self.folder / STATE).is_file():
            return None
        with contextlib.suppress(CheckpointError):
            return read_json(self.folder / STATE)
        return {}

    def _keep_whole_shards(self) -> None:
        """Remove from the folder what the state does not have, and from the state what the folder does not have."""
        parts, shards = self._parts(), self.state["shards"]
        # a half-written shard has no entry and is removed; a finished shard is kept only if its hash is right
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # the folder is not empty
                    path.rmdir()
            elif name != STATE and name not in shards and name not in parts:
                path.unlink()
        for name, shard in list(shards.items()):
            path = self.folder / name
            if path.is_symlink() or not path.is_file() or sha256_of(path) != shard["sha256"]:
                path.unlink(missing_ok=True)
                del shards[name]

    def _parts(self) -> set[str]:
        """The names of unfinished shards of which parts are written, of what belongs to them, and of the notes about these parts."""
        found = set()
        for folder in self.folder.rglob(f"*.safetensors{PARTS}"):
            shard = folder.relative_to(self.folder).as_posix().removesuffix(PARTS)
            if shard not in self.state["shards"] and not folder.is_symlink():
                beside = [self.folder / shard, *folder.parent.glob(f"{glob.escape(folder.stem)}.*"), *folder.iterdir()]
                found |= {path.relative_to(self.folder).as_posix() for path in beside if path.is_file()}
        return found

    def _start_anew(self) -> None:
        """Empty the folder."""
        self._ours = True
        for path in self.folder.iterdir():
            _remove(path)
        self._save_state()

    def _check_space(self) -> None:
        there = sum((self.folder / name).stat().st_size for name in self.state["shards"])
        # a shard that is written in parts has holes
        there += sum(getattr(p.stat(), "st_blocks", 0) * 512 for p in map(self.folder.joinpath, self._parts()))
        free = shutil.disk_usage(self.folder).free
        needed = self.needed - there
        if needed > free:
            message = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
            raise DiskError(message, path=self.folder.parent, remedy="make room, or name a destination on another disk")

    # --- writing ---

    def finished(self, name: str) -> dict[str, Any] | None:
        """The facts that :meth:`finish` noted for a whole shard; None for a shard whose note is not on the disk yet."""
        entry = self.state["shards"].get(name)
        return None if entry is None else dict(entry["facts"])

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The path at which to write the file ``name``; the file is removed if the body fails."""
        path = self.folder / name
        self._hashes.pop(name, None)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield path
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def finish(self, name: str, facts: Mapping[str, Any]) -> None:
        """Note that the shard ``name`` is whole, as soon as its hash is known and its bytes are on the disk. The caller works on
        meanwhile; the next call waits for the note, so that a kill costs one shard at most.

        Raises:
            DiskError: the bytes of the shard before did not reach the disk.
        """
        self.settle()
        self._finishing = self._threads.submit(self._finish, name, {"facts": dict(facts)})

    def _finish(self, name: str, entry: dict[str, Any]) -> None:
        path = self.folder / name
        with self.writing(name):
            synced = self._threads.submit(sync_file, path)
            entry["sha256"] = sha256_of(path)
            synced.result()
            self._keep(name, entry)

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        """Note a shard that is whole and on the disk."""
        self.state["shards"][name] = entry
        self._save_state()

    def note(self, name: str, facts: Mapping[str, Any], sha256: str) -> None:
        """Note that the shard ``name``, whose bytes are on the disk, is whole, and drop the notes about its parts."""
        self.settle()
        self._keep(name, {"facts": dict(facts), "sha256": sha256})
        self.drop_parts(name)

    def drop_parts(self, name: str, *, unfinished: bool = False) -> None:
        """Remove the notes about the parts of the shard ``name``, and the shard too where it is ``unfinished``."""
        with disk_errors(self.folder):
            shutil.rmtree(self.folder / f"{name}{PARTS}", ignore_errors=True)
            if unfinished:
                (self.folder / name).unlink(missing_ok=True)

    def settle(self) -> None:
        """Wait until the last shard given to :meth:`finish` is noted.

        Raises:
            DiskError: the bytes of the shard did not reach the disk.
        """
        last, self._finishing = self._finishing, None
        if last is not None:
            last.result()

    def _save_state(self) -> None:
        with Replacement(self.folder / STATE) as new:
            write_synced(new.beside, json.dumps(self.state).encode())
            new.put()

    def put_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``value`` as the file ``name``."""
        self.put_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def put_text(self, name: str, text: str) -> None:
        """Write ``text`` as the file ``name``."""
        with self.writing(name) as path:
            write_synced(path, text.encode())
        self._hashes[name] = hashlib.sha256(text.encode()).hexdigest()

    def copy(self, source: Path, name: str) -> None:
        """Copy a file's contents to the file ``name``, which may lie in a folder of the output."""
        digest = hashlib.sha256()
        with self.writing(name) as path, opened(source) as reader, path.open("wb") as writer:
            while chunk := reader.read(1 << 20):
                writer.write(chunk)
                digest.update(chunk)
            to_disk(writer)
        self._hashes[name] = digest.hexdigest()

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of the file ``name``, a few megabytes at a time."""
        with disk_errors(self.folder), opened(self.folder / name) as file:
            while chunk := file.read(1 << 23):
                yield chunk

    def drop(self, name: str) -> None:
        """Remove the finished file ``name``, which does not belong to the output."""
        self.settle()
        with disk_errors(self.folder):
            self.state["shards"].pop(name, None)
            self._save_state()
            (self.folder / name).unlink(missing_ok=True)

    def hashes(self, *, but: Collection[str] = ()) -> dict[str, str]:
        """``{name: SHA-256}`` of all written files, except the files ``but``."""
        self.settle()
        known = self._hashes | {name: shard["sha256"] for name, shard in self.state["shards"].items()}
        return {n: known.get(n) or sha256_of(self.folder / n) for n in self.names() if n not in but}

    def names(self) -> list[str]:
        """Names of all written files, with ``/`` for files in folders."""
        files = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        return sorted(name for name in files if name != STATE)

    # --- the rename ---

    def publish(self, last: str | None = None) -> None:
        """Make the folder the destination.

        Args:
            last: the file that makes the folder a model: behind a URL, where there is no rename, this file appears last.
        """
        self._publish((), last)

    def publish_files(self, files: Mapping[str, Path], without: Path | None = None) -> None:
        """Move ``{name: path}`` of the written files to their places in this order, and drop the folder; the last file is the
        destination itself. A file at ``without`` is removed first.
        """
        if without is not None:
            self._remove_beside(without)
        self._publish(tuple(files.items()), None)

    def _remove_beside(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _publish(self, files: Sequence[tuple[str, Path]], last: str | None) -> None:  # noqa: ARG002 - a rename has no order
        self.settle()
        with disk_errors(self.destination):
            for name, path in files:
                sync_file(self.folder / name)
                (self.folder / name).replace(path)
            if files:
                sync_folder(self.destination.parent)
                self.state["shards"] = {}  # nothing is left to resume
                return
            (self.folder / STATE).unlink()
            for folder in (self.folder, *filter(Path.is_dir, self.folder.rglob("*"))):
                sync_folder(folder)
            if exists(self.destination):
                self.destination.rename(self.replaced)
            self.folder.rename(self.destination)
            self._ours = False
            sync_folder(self.destination.parent)
            self._recover()


def shared_folder(destination: Path, key: str, mark: str) -> Path:
    """The folder of an unfinished output in which several processes write parts of shards; :class:`Staging`, with ``resume``, takes
    the folder over when all parts are there.

    Args:
        key: as for :class:`Staging`.
        mark: the end of a temporary file's name, which no other process uses.

    Raises:
        StateError: unfinished work of another key is there.
    """
    folder = destination.parent / f".{destination.name}.oftsurgery"
    state = folder / STATE
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not state.is_file():
            with Replacement(state, mark) as new:
                write_synced(new.beside, json.dumps({"key": key, "shards": {}}).encode())
                new.put()
    found: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        found = read_json(state)
    if found.get("key") != key:
        raise StateError(
            "the unfinished work has other inputs or settings",
            path=folder,
            remedy="give all slices the same inputs and settings; or remove the folder, and start all slices again",
        )
    return folder


class Below(Staging):
    """The folder ``place`` of an unfinished output, as if this folder were an output of its own; the whole output alone is
    entered and published.
    """

    def __init__(self, whole: Staging, place: str) -> None:
        self._whole, self._place = whole, f"{place}/"
        self.destination, self.folder = whole.destination / place, whole.folder / place
        self._hashes = {}

    @property
    def state(self) -> dict[str, Any]:  # type: ignore[override]
        shards = self._whole.state["shards"]
        own = {n.removeprefix(self._place): entry for n, entry in shards.items() if n.startswith(self._place)}
        return {"shards": own}

    def finish(self, name: str, facts: Mapping[str, Any]) -> None:
        self._whole.finish(self._place + name, facts)

    def note(self, name: str, facts: Mapping[str, Any], sha256: str) -> None:
        self._whole.note(self._place + name, facts, sha256)

    def settle(self) -> None:
        self._whole.settle()

    def drop(self, name: str) -> None:
        self._whole.drop(self._place + name)


def place_in_full(path: Path) -> Path:
    """The one path of a place: without links, or the path that names its URL."""
    return url_path(path) or path.resolve()


def check_apart(destination: Path, what: str, folders: Iterable[Path]) -> None:
    """Refuse a destination that would replace or change a folder that is read.

    Raises:
        StateError: one of ``folders`` is the destination, lies in it or holds it; the message calls the folder ``what``.
    """
    there = place_in_full(destination)
    for folder in map(place_in_full, folders):
        if folder.is_relative_to(there):
            message = f"the destination is, or holds, the {what} itself"
            raise StateError(message, path=destination, remedy="name another destination")
        if there.is_relative_to(folder):
            message = f"the destination is inside the {what}"
            raise StateError(message, path=destination, remedy=f"name a destination outside the {what}")


@contextlib.contextmanager
def scratch(destination: Path, *, force: bool) -> Iterator[Path]:
    """A path beside ``destination`` for a folder that a later step reads; the folder is removed at the end.

    Raises:
        StateError: the destination exists; the error comes before any work is done.
    """
    missing_above(destination)
    check_free("destination", destination, force=force)
    path = destination.parent / f".{destination.name}.folded"
    with folders_above(destination):
        try:
            yield path
        finally:
            with disk_errors(path):
                if exists(path):
                    _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _sound(shards: object) -> bool:
    """Whether ``shards`` of a state file has the form of :meth:`Staging.finish`: names of files in the folder itself,
    or in folders of it, each with a hash and facts.
    """
    return isinstance(shards, dict) and all(
        is_nested_name(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("facts"), dict)
        and all(isinstance(part, dict) for part in entry["facts"].values())
        for name, entry in shards.items()
    )
