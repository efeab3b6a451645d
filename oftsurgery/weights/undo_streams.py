"""A stream holds integers of an undo record as compressed bytes; the same code writes and reads a stream."""

from __future__ import annotations

import lzma
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oftsurgery.errors import UndoError

# LZMA's literal coder is an adaptive binary range coder: without its contexts (lc, lp, pb) the coder comes within a few
# per cent of the entropy of packed bits. The filters are fixed here, so a file cannot ask for memory.
_CONTEXTS = {"lc": 0, "lp": 0, "pb": 0}
_SEARCH = {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC4, "nice_len": 273, "depth": 4}
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, **_CONTEXTS, **_SEARCH}]
_STORED = 1 << 31  # no stream is so long, because a chunk has a few million values

Array = np.ndarray[Any, np.dtype[Any]]


def damaged(path: object | None = None, why: str = "") -> UndoError:
    """The error for a wrong record at ``path``, with the reason."""
    message = f"the undo record is damaged: {why}" if why else "the undo record is damaged"
    return UndoError(message, path=path, remedy="restore the file, or unfold with base=…")


class Streams:
    """Streams of bytes one after the other, each after its length (4 bytes, little-endian; the top bit marks a stream that
    is not compressed).

    The same code writes and reads, so that the two mirror each other: every method takes the true values when writing and
    None when reading, and returns the values. A reader knows how many bytes each stream must give.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.data, self._at = bytearray(data), 0

    def end(self) -> None:
        """Check that everything was read."""
        if self._at != len(self.data):
            raise damaged(why=f"{len(self.data) - self._at} bytes are left over")

    def raw(self, true: bytes | None, nbytes: int) -> bytes:
        """One stream of ``nbytes`` bytes."""
        if true is not None:
            packed = lzma.compress(true, format=lzma.FORMAT_RAW, filters=FILTERS)
            stored = len(packed) >= len(true)
            body = true if stored else packed
            self.data += (len(body) | _STORED * stored).to_bytes(4, "little") + body
            return true
        head = int.from_bytes(self._take(4), "little")
        body = self._take(head & ~_STORED)
        if not head & _STORED:
            try:
                decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=FILTERS)
                body = decoder.decompress(body, max_length=nbytes + 1)
            except lzma.LZMAError as error:
                raise damaged(why="a stream cannot be decompressed") from error
        if len(body) != nbytes:
            raise damaged(why=f"a stream has another length than {nbytes} bytes")
        return body

    def _take(self, nbytes: int) -> bytes:
        self._at += nbytes
        if self._at > len(self.data):
            raise damaged(why=f"it ends {self._at - len(self.data)} bytes too early")
        return bytes(self.data[self._at - nbytes : self._at])

    def words(self, true: Array | None, count: int, dtype: str) -> Array:
        """``count`` unsigned integers as planes of bytes, the lowest first."""
        size = np.dtype(dtype).itemsize
        planes = None if true is None else np.ascontiguousarray(true.astype(dtype).view(np.uint8).reshape(-1, size).T)
        read = [self.raw(None if planes is None else planes[i].tobytes(), count) for i in range(size)]
        return np.stack([np.frombuffer(p, np.uint8) for p in read], axis=-1).reshape(-1).view(dtype)

    def symbols(self, true: Array | None, count: int, planes: int = 3) -> Array:
        """``count`` small integers, mostly 0. The bits, eight to the byte, say whether each integer is above 0, whether
        each of those is above 1, and so on; the rest of the few larger integers follows in 16 bits each.
        """
        if not planes:
            return self.words(true, count, "<u2").astype(np.int32)
        bits = self.raw(None if true is None else np.packbits(true > 0).tobytes(), -(-count // 8))
        above = np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool)
        whole: Array = np.zeros(count, np.int32)
        whole[above] = 1 + self.symbols(None if true is None else true[above] - 1, int(above.sum()), planes - 1)
        return whole

    def differences(self, true: Array | None, predicted: Array) -> Array:
        """Signed integers of ``predicted``'s dtype, stored as their differences from ``predicted``, wrapped to its width:
        the differences 0, -1, 1, -2, 2 … are stored as 0, 1, 2, 3, 4 ….
        """
        unsigned = f"<u{predicted.itemsize}"
        folded = None
        if true is not None:
            d = true - predicted
            folded = ((d << 1) ^ (d >> (8 * d.itemsize - 1))).view(unsigned)
        folded = self.words(folded, predicted.size, unsigned)
        d = ((folded >> 1) ^ (0 - (folded & 1))).view(predicted.dtype)
        whole: Array = predicted + d
        return whole


def bytes_of(t: Tensor) -> bytes:
    """The bytes of a tensor on the CPU, of any dtype."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
