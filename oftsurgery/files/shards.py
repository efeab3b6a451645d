"""safetensors checkpoints on disk: headers without data, one tensor at a time in, one tensor at a time out.

The safetensors library checks every header (lengths, offsets, overlaps); what it has no call for is done here: where a
tensor's bytes are without reading them, and writing a file whose tensors never meet in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from oftsurgery.dtypes import DTYPE_NAMES, DTYPES
from oftsurgery.errors import CheckpointError, printable

__all__ = ["Checkpoint", "ShardWriter", "TensorEntry", "open_checkpoint", "sha256_of"]


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_MAX_JSON_BYTES = 64 << 20
_MAX_CONFIG_BYTES = 4 << 20
_MAX_JSON_PARTS = 2_000_000  # objects and lists: an empty one takes a byte or two of a file and 60 of memory
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_SIZE = 1 << 48  # of a dimension: an empty tensor may state any
_CHUNK = 8 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is: ``nbytes`` from ``start`` in ``file`` of the folder; ``dtype`` is safetensors' name of it."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's headers and JSON.

    Attributes:
        folder: that holds it.
        entries: ``{tensor name: TensorEntry}`` in the files' order.
        files: shards in order.
        config: the parsed ``config.json``; empty without one.
        metadata: of the first shard's header.
    """

    folder: Path
    entries: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in memory of its own."""
        entry = self.entries[name]
        buffer = bytearray(entry.nbytes)
        with (self.folder / entry.file).open("rb") as file:
            file.seek(entry.start)
            if file.readinto(buffer) < entry.nbytes:
                raise self._ended(entry)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]).reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of tensor ``name``, a few megabytes at a time."""
        entry = self.entries[name]
        left = entry.nbytes
        with (self.folder / entry.file).open("rb") as file:
            file.seek(entry.start)
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise self._ended(entry)
                left -= len(chunk)
                yield chunk

    def _ended(self, entry: TensorEntry) -> CheckpointError:
        return CheckpointError(
            "the shard ended early: it changed while it was read", tensor=entry.name, path=self.folder / entry.file
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What tells whether the checkpoint is still the same, without reading its data: sizes and times of its files,
        and its config.
        """
        stats = {name: (self.folder / name).stat() for name in self.files}
        return {"files": {n: [s.st_size, s.st_mtime_ns] for n, s in stats.items()}, "config": dict(self.config)}


def _damaged(message: str, path: object, tensor: str | None = None) -> CheckpointError:
    return CheckpointError(message, tensor=tensor, path=path, remedy="download the checkpoint again")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the checkpoint in ``folder``.

    Raises:
        CheckpointError: no safetensors checkpoint, an index that disagrees with its shards, a file that leaves the
        folder, a header that lies.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder",
            path=folder,
            remedy="give a folder with config.json and *.safetensors, or a Hub id 'owner/name'",
        )
    weight_map: Mapping[str, str] | None = None
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder)
        files = tuple(dict.fromkeys(weight_map.values()))
        if (folder / SINGLE).exists() and SINGLE not in files:
            raise CheckpointError(
                f"the folder holds two checkpoints: {SINGLE}, which transformers reads, and the shards of {INDEX}",
                path=folder,
                remedy="remove the one that is not meant",
            )
    elif (folder / SINGLE).exists():
        files = (SINGLE,)
    else:
        raise _no_checkpoint(folder)
    entries: dict[str, TensorEntry] = {}
    metadata: Mapping[str, str] = {}
    for name in sorted(files):
        found, meta = read_header(inside(folder, name))
        metadata = metadata or meta
        for entry in found:
            if entry.name in entries:
                raise CheckpointError(
                    f"two shards, {printable(entries[entry.name].file)} and {printable(name)}, hold one tensor",
                    tensor=entry.name,
                    path=folder,
                )
            entries[entry.name] = entry
    if weight_map is not None:
        _check_index(weight_map, entries, folder)
    config = read_json(inside(folder, CONFIG), limit=_MAX_CONFIG_BYTES) if os.path.lexists(folder / CONFIG) else {}
    return Checkpoint(folder, MappingProxyType(entries), tuple(sorted(files)), MappingProxyType(config), metadata)


def _no_checkpoint(folder: Path) -> CheckpointError:
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if pickles:
        return CheckpointError(
            f"{printable(pickles[0])} is a pickle, which could run code when read; oftsurgery reads safetensors only",
            path=folder,
            remedy="load it with transformers in a place that you trust, and save_pretrained(…, safe_serialization=True)",
        )
    if (folder / "adapter_config.json").exists():
        return CheckpointError(
            "the folder holds an adapter, not a model",
            path=folder,
            remedy="give the base model first, the adapter second",
        )
    return CheckpointError(
        f"the folder has neither {SINGLE} nor {INDEX}", path=folder, remedy="give a folder that save_pretrained wrote"
    )


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, for a name that comes from a file: a plain one, whose target stays in the folder (or in the
    Hub cache's blobs beside it).

    Raises:
        CheckpointError: otherwise, or if there is no such file.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or Path(name).is_absolute():
        raise CheckpointError(
            "the index or record names a file outside its folder",
            path=name,
            remedy="do not use this checkpoint, or repair its index",
        )
    path = folder / name
    try:
        plain, there = path.is_file(), os.path.lexists(path)
    except OSError as error:
        raise _damaged(f"no name of a file ({printable(error.strerror)})", name) from error
    if not there:
        raise _damaged("a file of the checkpoint is missing", path)
    if not plain:  # a pipe or a device would be read for ever
        raise _damaged("a file of the checkpoint is no plain file: a folder, pipe, device, or a link to nothing", path)
    target, root = path.resolve(), folder.resolve()
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not target.is_relative_to(root) and not (cache is not None and target.is_relative_to(cache)):
        raise CheckpointError(
            "a file of the checkpoint is a link that leaves its folder",
            path=path,
            remedy="do not use this checkpoint, or copy the file into the folder",
        )
    return path


def _weight_map(folder: Path) -> Mapping[str, str]:
    index = read_json(inside(folder, INDEX))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise _damaged("the index has no `weight_map` of file names", folder / INDEX)
    return weight_map


def _check_index(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry], folder: Path) -> None:
    for name, file in weight_map.items():
        if name not in entries:
            raise _damaged("the index names a tensor that its shards lack", folder / INDEX, name)
        if entries[name].file != file:
            there = printable(entries[name].file)
            raise _damaged(f"the index says {printable(file)}, but the tensor is in {there}", folder / INDEX, name)
    unlisted = [name for name in entries if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            "a shard holds a tensor that the index lacks",
            tensor=unlisted[0],
            path=folder / INDEX,
            remedy="repair the index",
        )


def sizes_in(folder: Path) -> dict[str, int]:
    """``{what: bytes}`` of the plain files in a folder: ``weights`` (safetensors), ``ONNX``, ``other files``."""
    sizes = {"weights": 0, "ONNX": 0, "other files": 0}
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            what = "weights" if path.suffix == ".safetensors" else "ONNX" if ".onnx" in path.name else "other files"
            sizes[what] += path.stat().st_size
    return sizes


def read_json(path: Path, *, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for, of at most ``limit`` bytes.

    Raises:
        CheckpointError: too large, not readable, no JSON, too deep, or no object.
    """
    try:
        if path.stat().st_size > limit:
            raise _damaged(f"a JSON file of {path.stat().st_size} bytes is not read", path)
        data = path.read_bytes()
        if data.count(b"[") + data.count(b"{") > _MAX_JSON_PARTS:
            raise _damaged(f"JSON of more than {_MAX_JSON_PARTS} parts is not read", path)
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise _damaged(f"no JSON that can be read ({printable(error)})", path) from error
    if not isinstance(value, dict):
        raise _damaged(f"a JSON {type(value).__name__}, not an object", path)
    return value


def read_header(path: Path) -> tuple[list[TensorEntry], Mapping[str, str]]:
    """The tensors and metadata of a safetensors file, in the order of their bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as checked:  # the library's checks of lengths, offsets and overlaps
            names = set(checked.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"no safetensors file, or a damaged one ({printable(error)})", path=path, remedy="download it again"
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"a header of {length} bytes", path=path, remedy="download it again")
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates(path))
    metadata = header.pop("__metadata__", {})
    if set(header) != names:
        raise CheckpointError("the header names tensors twice", path=path, remedy="do not use this file")
    entries = []
    for name, facts in header.items():
        start, end = facts["data_offsets"]
        shape = tuple(facts["shape"])
        entries.append(TensorEntry(name, path.name, str(facts["dtype"]), shape, 8 + length + start, end - start))
    strange = next((e for e in entries if e.dtype not in DTYPES or max(e.shape, default=0) > _MAX_SIZE), None)
    if strange is not None:
        raise CheckpointError(
            f"the tensor's dtype or shape, {printable(strange.dtype)} {printable(list(strange.shape))}, is none that oftsurgery knows",
            tensor=strange.name,
            path=path,
            remedy="save it again in another dtype",
        )
    return sorted(entries, key=lambda e: (e.start, e.name)), metadata


def _no_duplicates(path: Path) -> Any:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise CheckpointError("the header names a tensor twice", path=path, remedy="do not use this file")
        return found

    return check


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, so that no two need to be in memory at once.

    The library's own writer wants all tensors at once. This one lays them out as the library does (largest dtype first,
    so that all are aligned), each at a place known beforehand; tensors of a size not known beforehand (small JSON
    blobs) come last, and the header, for which room was left, at the very end. As a context manager it closes a whole
    file, and aborts after an error.

    Args:
        path: of the file; must not exist.
        tensors: ``{name: (dtype, shape)}`` of all that will be written; shape None for a uint8 tensor of at most
            :data:`LATE_BYTES` bytes.
        metadata: of the header.
    """

    LATE_BYTES = 1 << 12

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]], metadata: Mapping[str, str]
    ) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._late = {name: b"" for name in sorted(tensors) if tensors[name][1] is None}
        self._left = set(tensors)
        self._end = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            if shape is not None:
                self._place(name, dtype, shape)
        # room for the longest header that the late tensors can lead to
        longest = {name: _header_entry(torch.uint8, (self.LATE_BYTES,), 10**15) for name in self._late}
        room = len(_dump(self._header | longest))
        self._room = room + -room % 8
        self._file: BinaryIO = path.open("xb")

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._header[name] = _header_entry(dtype, shape, self._end)
        self._end = self._header[name]["data_offsets"][1]

    def write(self, name: str, data: Tensor | Iterable[bytes]) -> None:
        """Write one tensor: as a tensor, or as its bytes in pieces. Any thread, one at a time."""
        if name not in self._left:
            raise AssertionError(f"{name} is not planned, or written already")
        pieces = _bytes_of(data) if isinstance(data, Tensor) else data
        if name in self._late:
            self._late[name] = b"".join(pieces)
        else:
            start, end = self._header[name]["data_offsets"]
            self._file.seek(8 + self._room + start)
            for piece in pieces:
                self._file.write(piece)
            if self._file.tell() != 8 + self._room + end:
                raise AssertionError(
                    f"{name} has {self._file.tell() - 8 - self._room - start} bytes, planned were {end - start}"
                )
        self._left.discard(name)

    def close(self) -> None:
        """Write what comes last and flush to the disk itself."""
        if self._left:
            raise AssertionError(f"{len(self._left)} tensors were not written")
        for name, data in self._late.items():
            self._file.seek(8 + self._room + self._end)
            self._file.write(data)
            self._place(name, torch.uint8, (len(data),))
        self._file.seek(0)
        self._file.write(header_bytes(self._header, self._room))
        to_disk(self._file)
        self._file.close()

    def abort(self) -> None:
        """Close without finishing."""
        self._file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


def _header_entry(dtype: torch.dtype, shape: tuple[int, ...], start: int) -> dict[str, Any]:
    end = start + dtype.itemsize * math.prod(shape)
    return {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def header_bytes(header: Mapping[str, Any], room: int) -> bytes:
    """What a safetensors file begins with, where ``room`` bytes were left for the header's JSON."""
    return struct.pack("<Q", room) + _dump(header).ljust(room)


def to_disk(file: BinaryIO) -> None:
    """Do not return before what was written is on the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> Iterator[Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
