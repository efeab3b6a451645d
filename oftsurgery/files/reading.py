"""These functions read untrusted data: names of files, JSON, and safetensors headers.

The safetensors library checks every header (lengths, offsets, overlaps), but does not tell where a tensor's bytes are.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from oftsurgery.dtype_names import SAFETENSORS
from oftsurgery.errors import CheckpointError, printable

from .links import check_link
from .remote import PIECE, far, opened, with_header

#: the two files of an adapter
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"

_MAX_JSON_BYTES = 64 << 20
_MAX_JSON_PARTS = 2_000_000  # objects and lists: an empty list takes about two bytes of a file and 60 of memory
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_SIZE = 1 << 48  # of a dimension: an empty tensor's header may state any size
_CHUNK = 1 << 20  # a processor's cache holds this much


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor: ``nbytes`` bytes of ``file`` from ``start`` on; ``dtype`` is the dtype's safetensors name."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def damaged(message: str, path: object, tensor: str | None = None) -> CheckpointError:
    """The error for a file that a new download would mend."""
    return CheckpointError(message, tensor=tensor, path=path, remedy="download the checkpoint again")


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is the name of a file, without any folder."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0") and not PureWindowsPath(name).anchor


def is_nested_name(name: str) -> bool:
    """Whether ``name`` leads to a file in a folder, or in folders inside it: ``1_Pooling/config.json``."""
    return all(map(is_plain_name, name.split("/")))


def inside(folder: Path, name: str, *, nested: bool = False, own: bool = False) -> Path:
    """The path ``folder / name`` for a name that comes from a file. The name must be plain, and the file must lie in the
    folder, or be a link that :func:`~oftsurgery.files.links.check_link` follows.

    Args:
        nested: whether the name may lead through folders inside ``folder``, by ``/``.
        own: whether oftsurgery itself looks for a file of this name; a file of the folder gives all other names.

    Raises:
        CheckpointError: the name is not plain, or the file is missing, is no plain file, or lies elsewhere.
    """
    if not (is_nested_name(name) if nested else is_plain_name(name)):
        message = "the index or record names a file outside its folder"
        raise CheckpointError(message, path=name, remedy="do not use this checkpoint, or repair its index")
    path = folder / name
    try:
        plain, there = path.is_file(), os.path.lexists(path)
    except OSError as error:
        raise damaged(f"the name cannot be a file's name ({printable(error.strerror)})", name) from error
    if not there:
        raise damaged("a file of the checkpoint is missing", path)
    if not plain:  # a read of a pipe or a device would never end
        raise damaged(
            "a file of the checkpoint is no plain file, but a folder, a pipe, a device or a broken link", path
        )
    check_link(folder, name, own=own)
    return path


def read_json(path: Path, *, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in an untrusted file of at most ``limit`` bytes.

    Raises:
        CheckpointError: the file is too large, cannot be read, or holds no JSON object, or the JSON is nested too deeply.
    """
    value = read_json_value(path, limit=limit)
    if not isinstance(value, dict):
        raise damaged(f"the file holds a JSON {type(value).__name__}, not an object", path)
    return value


def read_json_value(path: Path, *, limit: int = _MAX_JSON_BYTES) -> Any:
    """The JSON value in an untrusted file, by the rules of :func:`read_json`; the value may be a list too."""
    try:
        if path.stat().st_size > limit:
            raise damaged(f"the JSON file has {path.stat().st_size} bytes, more than the limit of {limit}", path)
        data = path.read_bytes()
        if (parts := data.count(b"[") + data.count(b"{")) > _MAX_JSON_PARTS:
            raise damaged(f"the JSON has {parts} lists and objects, more than the limit of {_MAX_JSON_PARTS}", path)
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise damaged(f"the file holds no JSON that can be read ({printable(error)})", path) from error


def read_header(path: Path) -> tuple[list[TensorEntry], Mapping[str, str]]:
    """The tensors and metadata of a safetensors file, in the order of their bytes."""
    with with_header(path, _MAX_HEADER_BYTES) as local:
        return _read_header(path, local)


def _read_header(path: Path, local: Path) -> tuple[list[TensorEntry], Mapping[str, str]]:
    """:func:`read_header` of the file at ``path``, whose header and length the file at ``local`` has."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(local, framework="pt") as checked:  # the library's checks of lengths, offsets and overlaps
            names = set(checked.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"the file is no safetensors file, or is damaged ({printable(error)})",
            path=path,
            remedy="download the file again",
        ) from error
    with local.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            message = f"the header has {length} bytes, more than the limit of {_MAX_HEADER_BYTES}"
            raise CheckpointError(message, path=path, remedy="download the file again")
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates(path))
    metadata = header.pop("__metadata__", {})
    if set(header) != names:
        tensor, message = min(set(header) ^ names), "the header names a tensor twice"
        raise CheckpointError(message, tensor=tensor, path=path, remedy="do not use this file")
    entries = []
    for name, facts in header.items():
        start, end = facts["data_offsets"]
        shape = tuple(facts["shape"])
        entries.append(TensorEntry(name, path.name, str(facts["dtype"]), shape, 8 + length + start, end - start))
    strange = next((e for e in entries if e.dtype not in SAFETENSORS or max(e.shape, default=0) > _MAX_SIZE), None)
    if strange is not None:
        raise CheckpointError(
            f"oftsurgery does not know the tensor's dtype or shape, {printable(strange.dtype)} {printable(list(strange.shape))}",
            tensor=strange.name,
            path=path,
            remedy="save the tensor again in another dtype",
        )
    return sorted(entries, key=lambda e: (e.start, e.name)), metadata


def _no_duplicates(path: Path) -> Any:
    """A hook for :func:`json.loads` that refuses an object with the same key twice."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            message = f"the header names {printable(key)!r} twice"
            raise CheckpointError(message, path=path, remedy="do not use this file")
        return found

    return check


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    file_there = far(path)
    if file_there is not None and file_there.sha256 is not None:
        return file_there.sha256
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK if file_there is None else PIECE))
    with opened(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sizes_in(folder: Path) -> dict[str, int]:
    """``{kind: bytes}`` of a folder's plain files; kinds are ``weights`` (safetensors), ``ONNX`` and ``other files``."""
    sizes = {"weights": 0, "ONNX": 0, "other files": 0}
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            what = "weights" if path.suffix == ".safetensors" else "ONNX" if ".onnx" in path.name else "other files"
            sizes[what] += path.stat().st_size
    return sizes
