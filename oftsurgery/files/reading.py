"""These functions read what nobody vouches for: names of files, JSON, and safetensors headers.

The safetensors library checks every header (lengths, offsets, overlaps); where a tensor's bytes are, it does not tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from oftsurgery.dtypes import DTYPES
from oftsurgery.errors import CheckpointError, printable

from .links import check_link

#: the two files of an adapter
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"

_MAX_JSON_BYTES = 64 << 20
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


def damaged(message: str, path: object, tensor: str | None = None) -> CheckpointError:
    return CheckpointError(message, tensor=tensor, path=path, remedy="download the checkpoint again")


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is that of a file in a folder itself."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0") and not PureWindowsPath(name).anchor


def is_nested_name(name: str) -> bool:
    """Whether ``name`` leads to a file in a folder, or in folders inside it: ``1_Pooling/config.json``."""
    return all(map(is_plain_name, name.split("/")))


def inside(folder: Path, name: str, *, nested: bool = False, own: bool = False) -> Path:
    """``folder / name``, for a name that comes from a file: a plain one, whose target stays in the folder, or is a link
    that :func:`~oftsurgery.files.links.check_link` follows.

    Args:
        nested: the name may lead through folders inside ``folder``, by ``/``.
        own: no file gives the name, it is the one that weights have in a folder of one file.

    Raises:
        CheckpointError: otherwise, or if there is no such file.
    """
    if not (is_nested_name(name) if nested else is_plain_name(name)):
        message = "the index or record names a file outside its folder"
        raise CheckpointError(message, path=name, remedy="do not use this checkpoint, or repair its index")
    path = folder / name
    try:
        plain, there = path.is_file(), os.path.lexists(path)
    except OSError as error:
        raise damaged(f"no name of a file ({printable(error.strerror)})", name) from error
    if not there:
        raise damaged("a file of the checkpoint is missing", path)
    if not plain:  # a pipe or a device would be read for ever
        raise damaged("a file of the checkpoint is no plain file: a folder, pipe, device, or a link to nothing", path)
    check_link(folder, name, own=own)
    return path


def read_json(path: Path, *, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for, of at most ``limit`` bytes.

    Raises:
        CheckpointError: too large, not readable, no JSON, too deep, or no object.
    """
    value = read_json_value(path, limit=limit)
    if not isinstance(value, dict):
        raise damaged(f"a JSON {type(value).__name__}, not an object", path)
    return value


def read_json_value(path: Path, *, limit: int = _MAX_JSON_BYTES) -> Any:
    """What :func:`read_json` reads, which may be a list too."""
    try:
        if path.stat().st_size > limit:
            raise damaged(f"a JSON file of {path.stat().st_size} bytes is not read", path)
        data = path.read_bytes()
        if data.count(b"[") + data.count(b"{") > _MAX_JSON_PARTS:
            raise damaged(f"JSON of more than {_MAX_JSON_PARTS} parts is not read", path)
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise damaged(f"no JSON that can be read ({printable(error)})", path) from error


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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sizes_in(folder: Path) -> dict[str, int]:
    """``{what: bytes}`` of the plain files in a folder: ``weights`` (safetensors), ``ONNX``, ``other files``."""
    sizes = {"weights": 0, "ONNX": 0, "other files": 0}
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            what = "weights" if path.suffix == ".safetensors" else "ONNX" if ".onnx" in path.name else "other files"
            sizes[what] += path.stat().st_size
    return sizes
