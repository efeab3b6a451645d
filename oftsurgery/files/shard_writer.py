""":class:`ShardWriter` writes a safetensors file with one tensor at a time in memory; several writers can share a file."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from oftsurgery.dtypes import DTYPE_NAMES

from .writing import to_disk


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, with one tensor at a time in memory.

    The safetensors library's own writer needs all tensors at once. This writer uses the library's layout: the largest
    dtype comes first, so that all tensors are aligned, and each tensor has a place that is known beforehand. Tensors of
    unknown size (small JSON blobs) come after the others, and the header is written last, into room that was left for
    it. As a context manager, the writer closes a complete file, and aborts after an error.

    Since all places are known, several writers in any processes can share one file: each is given the names of its ``part``,
    and the last one writes the late tensors, whose bytes the others have kept in :attr:`late`, and the header (:meth:`seal`).

    Args:
        path: path of the file, which must not exist, unless the writer writes a part.
        tensors: ``{name: (dtype, shape)}`` of all tensors that will be written; the shape is None for a uint8 tensor of
            at most :data:`LATE_BYTES` bytes.
        metadata: metadata of the header.
        part: the names of the tensors that this writer writes; None for all.

    Attributes:
        late: ``{name: bytes}`` of the late tensors that were written.
        hashes: ``{name: XXH3}`` of the other tensors that a part has written.
    """

    LATE_BYTES = 1 << 12

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]],
        metadata: Mapping[str, str],
        part: Collection[str] | None = None,
    ) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        late = sorted(name for name in tensors if tensors[name][1] is None)
        self.late: dict[str, bytes] = {}
        self.hashes: dict[str, str] = {}
        self._left = set(tensors if part is None else part)
        self._part = part is not None
        self._end = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            if shape is not None:
                self._place(name, dtype, shape)
        # room for the longest header that is possible with the late tensors
        longest = {name: _header_entry(torch.uint8, (self.LATE_BYTES,), 10**15) for name in late}
        self._all_late = late
        room = len(_dump(self._header | longest))
        self._room = room + -room % 8
        # no writer of a part may empty what another one has written
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o666), "r+b") if self._part else path.open("xb")

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._header[name] = _header_entry(dtype, shape, self._end)
        self._end = self._header[name]["data_offsets"][1]

    @property
    def start(self) -> int:
        """The place of the first tensor in the file, which the header's length decides."""
        return 8 + self._room

    def write(self, name: str, data: Tensor | Iterable[bytes]) -> None:
        """Write one tensor, given whole or as pieces of its bytes. Any thread may call this method, one at a time."""
        if name not in self._left:
            raise AssertionError(f"{name} is not planned, or is written already")
        pieces = _bytes_of(data) if isinstance(data, Tensor) else data
        if name in self._all_late:
            self.late[name] = b"".join(pieces)
        else:
            start, end = self._header[name]["data_offsets"]
            self._file.seek(8 + self._room + start)
            content = xxh3()
            for piece in pieces:
                self._file.write(piece)
                if self._part:
                    content.update(piece)
            if self._file.tell() != 8 + self._room + end:
                raise AssertionError(
                    f"{name} has {self._file.tell() - 8 - self._room - start} bytes, and {end - start} were planned"
                )
            if self._part:
                self.hashes[name] = content.hexdigest()
        self._left.discard(name)

    def holds(self, hashes: Mapping[str, str]) -> bool:
        """Whether the file holds the tensors that another writer of a part has written, by their :attr:`hashes`."""
        return all(name in self._header and self._hash_of(name) == expected for name, expected in hashes.items())

    def _hash_of(self, name: str) -> str:
        start, end = self._header[name]["data_offsets"]
        self._file.seek(8 + self._room + start)
        content, left = xxh3(), end - start
        while left and (chunk := self._file.read(min(left, 1 << 23))):
            content.update(chunk)
            left -= len(chunk)
        return str(content.hexdigest())

    def close(self) -> None:
        """Complete the file, which :meth:`~oftsurgery.files.staging.Staging.finish` brings to the disk. A part is brought to the
        disk here.
        """
        if self._left:
            raise AssertionError(f"{len(self._left)} tensors were not written")
        if self._part:
            to_disk(self._file)
        else:
            self._seal()
        self._file.close()

    def leave(self) -> None:
        """Leave the part as it is in the file."""
        self._left.clear()

    def seal(self, late: Mapping[str, bytes]) -> None:
        """Complete a file whose parts are all written; ``late`` has what the writers of the parts kept."""
        self.late = dict(late)
        self._seal()

    def _seal(self) -> None:
        for name in self._all_late:
            self._file.seek(8 + self._room + self._end)
            self._file.write(self.late[name])
            self._place(name, torch.uint8, (len(self.late[name]),))
        self._file.seek(0)
        self._file.write(header_bytes(self._header, self._room))

    def abort(self) -> None:
        """Close the file without finishing it."""
        self._file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


def xxh3() -> Any:
    import xxhash

    return xxhash.xxh3_128()


def _header_entry(dtype: torch.dtype, shape: tuple[int, ...], start: int) -> dict[str, Any]:
    end = start + dtype.itemsize * math.prod(shape)
    return {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def header_bytes(header: Mapping[str, Any], room: int) -> bytes:
    """The first bytes of a safetensors file that has ``room`` bytes for the header's JSON."""
    return struct.pack("<Q", room) + _dump(header).ljust(room)


def _bytes_of(tensor: Tensor) -> Iterator[Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
