"""Files behind a URL (``s3://``, ``gs://``, ``hf://``, ``memory://`` …), through fsspec.

:func:`mirrored` makes a folder of this machine for a folder behind a URL: small files are copied, and in the place of each file of
weights lies a file of the same length without its bytes. :func:`opened` reads such a file by ranges, and any other file as it is, so
whoever reads weights through :func:`opened` reads both. Who does not finds no safetensors header, and no weights.

A place that is written is a path, which names its URL: ``s3://bucket/out`` is ``Path("s3:/bucket/out")``. :func:`url_of` gives the
URL of such a path and of everything in a mirror.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import io
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from oftsurgery.errors import CheckpointError, OFTSurgeryError, RemoteError, StateError, called, needs, printable

# pages of the web list no files, and files of this machine are read as such, by the rules of links
_URL = re.compile(r"(?!https?:|file:|local:)[A-Za-z][A-Za-z0-9+.-]+://")
_PROTOCOL = re.compile(r"(?!https?:|file:|local:)[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive
_HERE = "file://"
# what brings the client of a protocol; fsspec says it for the others
_PACKAGES = {"s3": "'oftsurgery[remote]'", "s3a": "'oftsurgery[remote]'", "gs": "gcsfs", "gcs": "gcsfs"}

#: files whose bytes stay where they are
_WEIGHTS = re.compile(
    r"(?i:.*\.(safetensors|bin|pth?|ckpt|pkl|pickle|joblib|npz|h5|keras|msgpack|pb|tflite|onnx|onnx_data|gguf|ot|undo|zip|tar|gz))",
    re.DOTALL,
)
_MOST_COPIED, _MOST_BYTES = 256 << 20, 2 << 30  # of one small file, and of all
_MOST_FILES, _MOST_LEVELS = 2_000, 4

#: bytes of one request, and of a part of an upload
PIECE = 16 << 20
# how many parts of an upload are on their way at once
_AT_ONCE = 2
# a read of at most so many bytes takes a block, which the next small reads find
_SMALL, _BLOCK, _BLOCKS = 64 << 10, 128 << 10, 4
# fields in which clients say which contents a file has, the surest first
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "crc32c", "blob_id", "mtime", "LastModified", "updated", "created")


def is_url(given: object) -> bool:
    """Whether ``given`` is a URL, such as ``"s3://bucket/model"``."""
    return isinstance(given, str) and _URL.match(given) is not None


def located(given: str | os.PathLike[str]) -> Path:
    """The path of a place to write: of this machine, or the path that names the URL ``given``.

    Raises:
        StateError: no folder behind the URL is named.
    """
    if isinstance(given, str) and re.match("https?://", given):
        message = "a page of the web takes no files"
        raise StateError(
            message, path=given, remedy="name a folder of this machine, or a URL of a bucket: s3://bucket/folder"
        )
    if not is_url(given):
        return plain_path(given)
    path = _path_of(str(given))
    parts = str(given).rstrip("/").partition("://")[2].removeprefix("/").split("/")
    if "::" in str(given) or "?" in str(given) or any(part in ("", ".", "..") for part in parts) or len(parts) < 2:
        message = "the URL names no folder to write"
        raise StateError(message, path=given, remedy="name a folder in a bucket: s3://bucket/folder")
    return path


def _path_of(url: str) -> Path:
    protocol, _, rest = url.partition("://")
    return Path(f"{protocol}:", rest.strip("/"))


def is_url_path(path: Path) -> bool:
    """Whether ``path`` names a URL."""
    return bool(path.parts) and _PROTOCOL.fullmatch(path.parts[0]) is not None


def url_of(path: Path) -> str | None:
    """The URL that ``path`` names, or of which ``path`` is the mirror; None for a file of this machine."""
    if is_url_path(path):
        return f"{path.parts[0]}//{'/'.join(path.parts[1:])}"
    for mirror in (path, *path.parents):
        if mirror in _MIRRORS:
            below = path.relative_to(mirror).as_posix()
            return _MIRRORS[mirror] if below == "." else f"{_MIRRORS[mirror]}/{below}"
    return None


def url_path(path: Path) -> Path | None:
    """The path that names the URL of ``path``, in every process; None for a file of this machine."""
    url = url_of(path)
    return None if url is None else _path_of(url)


def check_here(folder: Path, what: str) -> None:
    """Refuse a folder behind a URL for work that needs the files themselves; the message begins with ``what``.

    Raises:
        StateError: the folder is behind a URL.
    """
    url = url_of(folder)
    if url is not None:
        message = f"{what} needs the files on this machine, and the folder is behind a URL"
        raise StateError(message, path=url, remedy="copy the folder to this machine first, and give the copy")


# --- clients ----------------------------------------------------------------------------------------------------------


def client(url: str) -> tuple[Any, str]:
    """``(file system, path)``: fsspec's client of a URL, and the client's name of the place.

    Raises:
        MissingDependencyError: the client's package is not installed.
        RemoteError: no client knows the URL.
    """
    protocol = url.partition("://")[0]
    with needs("fsspec", "pip install 'oftsurgery[remote]'"):
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    if protocol == "hf":
        from huggingface_hub import HfFileSystem, constants

        fs = HfFileSystem(endpoint=constants.ENDPOINT)
        return fs, url.partition("://")[2]
    said = known_implementations.get(protocol, {}).get("err", "install the package of the protocol")
    remedy = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else printable(said)
    with needs(f"the client of {protocol}://", remedy):
        try:
            fs, path = url_to_fs(url)
        except ValueError as error:
            remedy = "name a folder of this machine, or a URL that fsspec knows (s3://, gs://, hf://)"
            raise RemoteError(f"no client knows the URL ({printable(error)})", path=url, remedy=remedy) from error
    return fs, str(path)


@contextmanager
def talking(url: str, remedy: str = "check the URL, the network and the permissions, and run again") -> Iterator[None]:
    """Turn a client's errors into :class:`~oftsurgery.RemoteError`."""
    try:
        yield
    except OFTSurgeryError:
        raise
    except Exception as error:  # each client raises errors of its own
        if type(error).__name__ == "FileExpired":
            raise changed(url) from error
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RemoteError(
            f"the URL does not answer as it should ({printable(reason)})", path=url, remedy=remedy
        ) from error


def changed(url: str) -> RemoteError:
    """The error for a file that another program has written meanwhile."""
    message = "the file has changed since the folder was opened"
    return RemoteError(message, path=url, remedy="wait until no program writes the files, and run again")


def stamp_in(info: Mapping[str, Any]) -> str:
    """What a client says of the contents of a file in its facts about the file."""
    lfs = info.get("lfs")
    if lfs:  # of a large file on the Hub
        return str(getattr(lfs, "sha256", None) or lfs)
    found = next((info[name] for name in _STAMPS if info.get(name) is not None), "")
    return str(found.timestamp() if hasattr(found, "timestamp") else found)  # a client may say a time in two ways


# --- one file ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Far:
    """A file behind a URL, of which ranges are read.

    Attributes:
        fs, path: the client, and its name of the file.
        size: the bytes of the file.
        stamp: what the client says of the contents; another stamp means other contents.
        sha256: the hash of the contents, where the whole file was read.
    """

    fs: Any
    path: str
    size: int
    stamp: str
    sha256: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _handles: dict[bool, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def read(self, start: int, nbytes: int) -> bytes:
        """At most ``nbytes`` bytes from ``start`` on, by one request or none."""
        small = nbytes <= _SMALL
        with self._lock, talking(self.url):
            if small not in self._handles:
                cached = {"cache_type": "blockcache", "block_size": _BLOCK, "cache_options": {"maxblocks": _BLOCKS}}
                self._handles[small] = self._open(cached if small else {"cache_type": "none"})
            handle = self._handles[small]
            handle.seek(start)
            return bytes(handle.read(nbytes))

    def _open(self, options: Mapping[str, Any]) -> Any:
        # a client that knows a mark of the contents (S3) asks for this mark with each range
        handle = self.fs.open(self.path, "rb", **options)
        if stamp_in(getattr(handle, "details", None) or self.fs.info(self.path)) != self.stamp:
            raise changed(self.url)
        return handle


class _Ranges(io.RawIOBase):
    """A :class:`Far` as an open file."""

    def __init__(self, file: Far) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(min(len(view), self._file.size - self._at), 0)
        done = 0
        while done < wanted:
            piece = self._file.read(self._at, min(wanted - done, PIECE))
            if not piece:
                break
            view[done : done + len(piece)] = piece
            done += len(piece)
            self._at += len(piece)
        return done


#: ``{folder or file of this machine: the URL of which it is the mirror}``
_MIRRORS: dict[Path, str] = {}
#: ``{file of this machine: the file in whose place it lies}``
_FAR: dict[Path, Far] = {}


def far(path: Path) -> Far | None:
    """The file behind a URL that ``path`` names, or in whose place the file at ``path`` lies; else None."""
    if not is_url_path(path):
        return _FAR.get(path)
    url = str(url_of(path))
    fs, place = client(url)
    with talking(url):
        info = fs.info(place)
        return Far(fs, place, int(info["size"]), stamp_in(info))


def opened(path: Path) -> io.BufferedReader | io.RawIOBase:
    """A file of weights, opened for reading and seeking, here or behind a URL. A read of a file behind a URL gives all bytes that it
    is asked for, at most :data:`PIECE` bytes by one request.
    """
    file = far(path)
    return path.open("rb") if file is None else _Ranges(file)


def stamp_of(path: Path) -> list[Any]:
    """The size of a file, and what changes with its contents: its time, or the stamp of a file behind a URL."""
    file = far(path)
    if file is not None:
        return [file.size, file.stamp]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


@contextmanager
def with_header(path: Path, most: int) -> Iterator[Path]:
    """A safetensors file of this machine with the header and the length of the file at ``path``: this file itself, or for the body a
    file with a hole for its tensors. A header of more than ``most`` bytes is cut.
    """
    file = far(path)
    if file is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, path.name)
        begin = file.read(0, 8)
        with local.open("wb") as out:
            out.write(begin)
            left = min(int.from_bytes(begin, "little"), most)
            while left and (piece := file.read(out.tell(), min(left, PIECE))):
                out.write(piece)
                left -= len(piece)
            out.truncate(file.size)
        yield local


@contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """For the body the file at ``path``, whole on this machine; of a file behind a URL a copy, whose hash is kept."""
    file = _FAR.get(path)
    if file is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, path.name)
        with talking(file.url):
            file.fs.get_file(file.path, str(local))
        if local.stat().st_size != file.size:
            raise changed(file.url)
        digest = hashlib.sha256()
        with local.open("rb") as content:
            while chunk := content.read(PIECE):
                digest.update(chunk)
        file.sha256 = digest.hexdigest()
        yield local


def put_in_place(path: Path, file: Far) -> None:
    """Put at ``path`` a file of the length of ``file`` without its bytes, which :func:`opened` reads behind the URL."""
    beside = path.with_name(f".{path.name}.far")
    with beside.open("wb") as place:
        place.truncate(file.size)
    _FAR[path] = file
    beside.replace(path)


def forget(path: Path) -> None:
    """The file at ``path`` no longer stands for a file behind a URL."""
    _FAR.pop(path, None)


# --- a folder ---------------------------------------------------------------------------------------------------------

#: ``{URL: (the client, its files as they were, the mirror)}``
_LAST: dict[str, tuple[Any, dict[str, list[Any]], Path]] = {}


def mirrored(url: str, named: str | None = None) -> Path:
    """The folder of this machine for the folder (or the single safetensors file) behind a URL. While the files there stay as they are,
    a process has one mirror of a URL, and the mirror goes with the process.

    Args:
        named: the path of the mirror below a folder of its own; None: the URL's last part.

    Raises:
        RemoteError: the URL cannot be read.
        CheckpointError: there is nothing, or more than a model's folder.
    """
    url = url.rstrip("/")
    fs, root = client(url)
    root = root.rstrip("/")
    with talking(url):
        fs.invalidate_cache()
        single = url.endswith(".safetensors") and fs.isfile(root)
        if single:
            found = {root.rpartition("/")[2]: fs.info(root)}
            with suppress(FileNotFoundError):
                found[f"{root.rpartition('/')[2]}.oftsurgery.json"] = fs.info(f"{root}.oftsurgery.json")
            root = root.rpartition("/")[0]
        else:
            found = _listed(fs, root, url)
    files: dict[str, list[Any]] = {name: [int(info["size"]), stamp_in(info)] for name, info in found.items()}
    if not files:
        message = "there is no file behind the URL"
        raise CheckpointError(
            message, path=url, remedy="check the name: the URL of a folder that save_pretrained wrote"
        )
    if url in _LAST and _LAST[url][0] is fs and _LAST[url][1] == files:
        return _LAST[url][2]
    small = [name for name, (size, _) in files.items() if not _WEIGHTS.fullmatch(name) and size <= _MOST_COPIED]
    if (nbytes := sum(files[name][0] for name in small)) > _MOST_BYTES:
        message = f"the small files in the folder have {nbytes / 1e9:.1f} GB, more than the limit of {_MOST_BYTES / 1e9:.1f} GB"
        raise CheckpointError(message, path=url, remedy="name the folder of the model itself")
    whole = Path(tempfile.mkdtemp(dir=_home()), named or url.rpartition("/")[2])
    folder = whole.parent if single else whole
    for name, info in found.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in small:
            put_in_place(path, Far(fs, f"{root}/{name}", int(info["size"]), stamp_in(info)))
        else:
            with talking(url):
                fs.get_file(f"{root}/{name}", str(path))
            if path.stat().st_size != files[name][0]:
                raise changed(f"{url}/{name}")
    _MIRRORS[whole] = url
    called(str(whole), url)
    _LAST[url] = (fs, files, whole)
    return whole


def local_path(given: str | os.PathLike[str]) -> Path:
    """The path of what ``given`` names on this machine: of a URL, or a path that names a URL, its mirror."""
    if is_url(given):
        return mirrored(str(given))
    path = plain_path(given).expanduser()
    return mirrored(str(url_of(path))) if is_url_path(path) else path


def plain_path(given: str | os.PathLike[str]) -> Path:
    """A path of this machine, which ``file://`` names too."""
    return Path(given.removeprefix(_HERE)) if isinstance(given, str) else Path(given)


@cache
def _home() -> str:
    """The folder of this process' mirrors."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="oftsurgery-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _listed(fs: Any, root: str, url: str) -> dict[str, Any]:
    """``{name: facts}`` of the files below a folder, without hidden ones; nothing for a folder that does not exist."""
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        prefix = fs._strip_protocol(root).rstrip("/")
        for at, folders, files in fs.walk(root, maxdepth=_MOST_LEVELS, detail=True, on_error="raise"):
            below = fs._strip_protocol(at).rstrip("/").removeprefix(prefix).strip("/")
            for name in [name for name in folders if name.startswith(".")]:
                del folders[name]
            shown = {name: info for name, info in files.items() if name and not name.startswith(".")}
            found |= {f"{below}/{name}" if below else name: info for name, info in shown.items()}
            if len(found) > _MOST_FILES:
                message = f"the folder holds more than {_MOST_FILES} files, which is the limit behind a URL"
                raise CheckpointError(message, path=url, remedy="name the folder of the model itself")
    for name in found:
        if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in name.split("/")):
            message = "a file has a name that leads out of its folder"
            raise CheckpointError(message, path=url, remedy="do not use this folder")
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


def send(fs: Any, source: Path, place: str) -> Far:
    """Copy a file of this machine to ``place``, in parts where the client knows parts: two parts of :data:`PIECE` bytes are in memory.
    A client that fails removes its parts.

    Raises:
        RemoteError: the client failed.
    """
    size = source.stat().st_size
    known = inspect.signature(getattr(fs, "_put_file", fs.put_file)).parameters
    # S3 takes 10,000 parts
    options = {"chunksize": max(PIECE, size // 9_000), "max_concurrency": _AT_ONCE}
    url = str(fs.unstrip_protocol(place))
    with talking(url, "check the network and the permissions, and go on with resume=True (--resume)"):
        fs.put_file(str(source), place, **{name: value for name, value in options.items() if name in known})
        fs.invalidate_cache()
        info = fs.info(place)
        if info["size"] != size:
            message = f"{info['size']} of {size} bytes have arrived"
            raise RemoteError(message, path=url, remedy="go on with resume=True (--resume)")
        return Far(fs, place, size, stamp_in(info))


def abort_uploads(fs: Any, folder: str) -> None:
    """Abort the uploads in parts, of files below a folder, whose process was killed; S3 alone keeps such parts."""
    if not hasattr(fs, "call_s3"):
        return
    bucket, key, _ = fs.split_path(f"{folder}/")
    with suppress(OSError):  # without the permission to list them, the bucket's lifecycle removes them
        for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads", []):
            fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])


def anything_at(path: Path) -> bool:
    """Whether a file, or a folder that is not empty, is at the URL that ``path`` names."""
    url = str(url_of(path))
    fs, place = client(url)
    with talking(url):
        fs.invalidate_cache()
        with suppress(FileNotFoundError):
            return bool(fs.ls(place, detail=False))
    return False
