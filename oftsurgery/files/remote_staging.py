"""The unfinished output of a run whose destination is behind a URL.

There is no rename behind a URL. Each shard is written on this machine, sent to ``.<destination>.oftsurgery/`` beside the destination
when it is whole, and removed here. At the end the files are copied to the destination by the server, and the file that makes the
folder a model comes last: its index, or its only file of weights. Until then nobody can load the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oftsurgery.errors import DiskError, StateError, called

from .layout import PIPELINE
from .reading import is_nested_name
from .remote import Far, abort_uploads, client, forget, put_in_place, send, stamp_in, talking, url_of
from .staging import STATE, Staging
from .writing import disk_errors, exists

# a copied file of at least so many bytes leaves this machine at once
_LARGE = 64 << 20
_RESUME = "check the network and the permissions, and go on with resume=True (--resume)"


def staging_at(destination: Path, key: str, **how: Any) -> Staging:
    """The unfinished output of a run for a destination on this machine, or at the URL that the path ``destination`` names."""
    return Staging(destination, key, **how) if url_of(destination) is None else RemoteStaging(destination, key, **how)


@dataclass(eq=False)
class RemoteStaging(Staging):
    """A run's unfinished output behind a URL; the attributes and errors are those of :class:`Staging`.

    The folder of this machine holds the shard that is written and the one that is sent; files that were sent have stand-ins there. The
    state lies behind the URL, so that a run on another machine goes on. A shard that was sent is believed while its size and its
    stamp (on S3 its ETag) are those that were noted.

    Raises:
        RemoteError: the URL could not be read or written; finished work waits to be resumed.
        DiskError: also where a run on another machine has taken over the destination.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.url = str(url_of(self.destination))
        if self.destination.parts[0] == "hf:":
            message = "each file that is written to the Hub is a commit of its own, so half an output would be seen"
            raise StateError(
                message, path=self.url, remedy="name a folder here, and push it: oftsurgery push OUTPUT owner/name"
            )
        self._fs, self._root = client(self.url)
        above, _, name = self._root.rstrip("/").rpartition("/")
        self._far = f"{above}/.{name}.oftsurgery"
        user = os.getuid() if hasattr(os, "getuid") else 0
        self._place = Path(os.path.realpath(tempfile.gettempdir()), f"oftsurgery-{user}")
        self.folder = self._place / hashlib.sha256(self.url.encode()).hexdigest()[:32]
        self.lock_path = self._place / f"{self.folder.name}.lock"
        self._run = uuid.uuid4().hex
        self._saved = False

    def __enter__(self) -> Staging:
        with disk_errors(self._place):
            self._place.mkdir(mode=0o700, exist_ok=True)
            if self._place.is_symlink() or (hasattr(os, "getuid") and self._place.stat().st_uid != os.getuid()):
                message = "the folder for unfinished work belongs to another user, or is a link"
                raise DiskError(message, path=self._place, remedy="set TMPDIR to a folder of your own")
        called(str(self.folder), f"{self.url.rpartition('/')[0]}/.{self.destination.name}.oftsurgery")
        self._begin()
        self._above = contextlib.ExitStack()
        return self

    # --- taking over ---

    def _recover(self) -> None:
        """Remove what a run has left that was killed after it had published."""
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed on this machine
        state = self._unfinished()
        if state is not None and state.get("phase") == "published":
            self._remove_far()

    def _check_free(self) -> None:
        state = None if self.force or not exists(self.destination) else self._unfinished()
        if state is None or "phase" not in state:  # else the files there are those of the unfinished work
            super()._check_free()

    def _check_space(self) -> None:
        """The folder holds two shards at most, whose sizes the run alone knows; a full disk is an error of the writing."""

    def _unfinished(self) -> dict[str, Any] | None:
        with talking(self.url):
            self._fs.invalidate_cache()
            try:
                found = json.loads(self._fs.cat_file(f"{self._far}/{STATE}"))
            except FileNotFoundError:
                return None
            except ValueError:
                return {}
            return found if isinstance(found, dict) else {}

    def _start_anew(self) -> None:
        self._ours = True
        self._remove_far()
        self._save_state()

    def _keep_whole_shards(self) -> None:
        shards = self.state["shards"]
        there = self._there(self._far)
        for name, entry in list(shards.items()):
            info = there.pop(name, None)
            # a client that says nothing of the contents proves nothing
            if info is None or not stamp_in(info) or [info["size"], stamp_in(info)] != entry.get("sent"):
                del shards[name]
                there |= {} if info is None else {name: info}
            else:
                self._stand_in(name, Far(self._fs, f"{self._far}/{name}", *entry["sent"]))
        there.pop(STATE, None)
        self._remove([f"{self._far}/{name}" for name in there])
        abort_uploads(self._fs, self._far)

    def _stand_in(self, name: str, file: Far) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(path, file)

    def _save_state(self) -> None:
        with talking(self.url, _RESUME):
            found = self._unfinished() if self._saved else None
            if self._saved and (found is None or found.get("run") != self._run):
                message = "another run has taken over this destination"
                raise DiskError(
                    message, path=self.url, remedy="wait until the other run ends, or name another destination"
                )
            self._fs.pipe_file(f"{self._far}/{STATE}", json.dumps(self.state | {"run": self._run}).encode())
            self._saved = True

    def _tidy(self) -> None:
        if self._ours and not (self.resumable and self.state["shards"]):
            with contextlib.suppress(OSError):  # the error of the run counts
                self._remove_far()
        for path in list(self.folder.rglob("*")):
            forget(path)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- writing ---

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        if name not in self.state["shards"]:
            forget(self.folder / name)
        with super().writing(name) as path:
            yield path

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        """Send a shard, and put its stand-in in its place."""
        file = send(self._fs, self.folder / name, f"{self._far}/{name}")
        super()._keep(name, entry | {"sent": [file.size, file.stamp]})
        self._stand_in(name, file)

    def drop(self, name: str) -> None:
        super().drop(name)
        forget(self.folder / name)
        with talking(self.url, _RESUME):
            self._remove([f"{self._far}/{name}"])

    def copy(self, source: Path, name: str) -> None:
        if name in self.state["shards"]:
            return
        super().copy(source, name)
        if (self.folder / name).stat().st_size >= _LARGE:
            self.finish(name, {})
            self.settle()

    # --- publishing ---

    def _remove_beside(self, path: Path) -> None:
        with talking(self.url, _RESUME):
            self._remove([client(str(url_of(path)))[1]])

    def _publish(self, files: Sequence[tuple[str, Path]], last: str | None) -> None:
        self.settle()
        # the weights come first: a config is small, and of no use without them
        names = sorted((n for n in self.names() if n != last), key=lambda n: n not in self.state["shards"])
        with talking(self.url, _RESUME):
            if files:
                self._enter_phase("publishing")
                for name, path in files:
                    self._put(name, client(str(url_of(path)))[1])
            else:
                if self.state.get("phase") != "publishing" and (old := self._there(self._root)):
                    self._enter_phase("clearing")
                    self._clear(old)
                self._enter_phase("publishing")
                for name in [*names, *([] if last is None else [last])]:
                    self._put(name, f"{self._root}/{name}")
            self._enter_phase("published")
            self._remove_far()
        self.state = {"key": self.key, "shards": {}}
        self._ours = False

    def _enter_phase(self, phase: str) -> None:
        self.state["phase"] = phase
        self._save_state()

    def _put(self, name: str, place: str) -> None:
        if name in self.state["shards"]:
            self._fs.cp_file(f"{self._far}/{name}", place)
        else:
            send(self._fs, self.folder / name, place)

    def _clear(self, old: Mapping[str, Any]) -> None:
        """Remove what is at the destination: first the index, or else the weights, without which nobody can load the rest."""
        index = [n for n in old if n.rpartition("/")[2] == PIPELINE or ".index." in n]
        weights = [n for n in old if n.endswith(".safetensors")]
        for group in (index, weights, list(old)):
            left = [name for name in group if name in old]
            self._remove([f"{self._root}/{name}" for name in left])
            old = {name: info for name, info in old.items() if name not in left}

    # --- files behind the URL ---

    def _there(self, folder: str) -> dict[str, Any]:
        """``{name: facts}`` of the files below a folder behind the URL."""
        self._fs.invalidate_cache()
        with talking(self.url, _RESUME), contextlib.suppress(FileNotFoundError):
            found = self._fs.find(folder, detail=True)
            prefix = self._fs._strip_protocol(folder).rstrip("/") + "/"
            below = {self._fs._strip_protocol(name).removeprefix(prefix): info for name, info in found.items()}
            return {name: info for name, info in below.items() if is_nested_name(name)}
        return {}

    def _remove(self, places: Sequence[str]) -> None:
        for place in places:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(place)
        self._fs.invalidate_cache()

    def _remove_far(self) -> None:
        with talking(self.url, _RESUME):
            abort_uploads(self._fs, self._far)
            there = self._there(self._far)
            state = there.pop(STATE, None)
            self._remove([f"{self._far}/{name}" for name in there])
            self._remove([f"{self._far}/{STATE}"] if state is not None else [])
            if self._fs.exists(self._far):  # a folder that is not only a name
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(self._far, recursive=True)
        self._saved = False
