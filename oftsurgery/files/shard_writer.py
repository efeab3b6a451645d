""":class:`ShardWriter` writes a safetensors file with one tensor at a time in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from oftsurgery.dtypes import DTYPE_NAMES


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, with one tensor at a time in memory.

    The safetensors library's own writer needs all tensors at once. This writer uses the library's layout: the largest
    dtype comes first, so that all tensors are aligned, and each tensor has a place that is known beforehand. Tensors of
    unknown size (small JSON blobs) come after the others, and the header is written last, into room that was left for
    it. As a context manager, the writer closes a complete file, and aborts after an error.

    Args:
        path: path of the file, which must not exist.
        tensors: ``{name: (dtype, shape)}`` of all tensors that will be written; the shape is None for a uint8 tensor of
            at most :data:`LATE_BYTES` bytes.
        metadata: metadata of the header.
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
        # room for the longest header that is possible with the late tensors
        longest = {name: _header_entry(torch.uint8, (self.LATE_BYTES,), 10**15) for name in self._late}
        room = len(_dump(self._header | longest))
        self._room = room + -room % 8
        self._file: BinaryIO = path.open("xb")

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._header[name] = _header_entry(dtype, shape, self._end)
        self._end = self._header[name]["data_offsets"][1]

    def write(self, name: str, data: Tensor | Iterable[bytes]) -> None:
        """Write one tensor, given whole or as pieces of its bytes. Any thread may call this method, one at a time."""
        if name not in self._left:
            raise AssertionError(f"{name} is not planned, or is written already")
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
                    f"{name} has {self._file.tell() - 8 - self._room - start} bytes, and {end - start} were planned"
                )
        self._left.discard(name)

    def close(self) -> None:
        """Write the late tensors and the header; :meth:`~oftsurgery.files.staging.Staging.finish` brings the file to the disk."""
        if self._left:
            raise AssertionError(f"{len(self._left)} tensors were not written")
        for name, data in self._late.items():
            self._file.seek(8 + self._room + self._end)
            self._file.write(data)
            self._place(name, torch.uint8, (len(data),))
        self._file.seek(0)
        self._file.write(header_bytes(self._header, self._room))
        self._file.close()

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
