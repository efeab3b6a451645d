""":class:`UndoWriter` writes an undo record: one safetensors file with compressed bytes and a manifest, all or nothing.

``docs/undo.md`` describes the format.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import StateError
from oftsurgery.files.reading import read_header
from oftsurgery.files.remote import opened
from oftsurgery.files.shard_writer import header_bytes
from oftsurgery.files.writing import Replacement, disk_errors, folders_above, missing_above, to_disk
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.hashing import hash_bytes
from oftsurgery.records.record import FoldRecord
from oftsurgery.weights import undo
from oftsurgery.weights.undo_streams import bytes_of

from .undo_reader import FORMAT, OF_PIPELINE, PARTS, VERSION, place_of

_ROOM = 504  # bytes for the header (metadata and two tensors), which is written last


def check_place(path: Path, *, force: bool = False) -> None:
    """Refuse a place where a record cannot be written, before anything is computed.

    Raises:
        StateError: the path exists (and ``force`` is not set, or the path is no file), or a file is in the place of a folder.
    """
    if os.path.lexists(path) and (not force or not path.is_file()):
        message = "the path for the undo record exists already, and undo records are not overwritten"
        raise StateError(message, path=path, remedy="name another file: an undo record belongs to one fold")
    missing_above(path)


class UndoCollector:
    """Collects what a fold changed: the data go to ``sink`` at once, and the facts stay in memory.

    Attributes:
        facts: plain values, which :meth:`append` takes: ``weights`` has ``{module path: facts}``, ``tensors`` ``{tensor name:
            facts}`` of plain tensors that the adapters' own values replaced, ``tables`` ``{content hash: [start, bytes]}``.
        nbytes: the bytes that were written so far.
    """

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self.facts: dict[str, dict[str, Any]] = {"weights": {}, "tensors": {}, "tables": {}}
        self.nbytes = 0

    def weight(
        self,
        path: str,
        before: EncodedWeight,
        after: EncodedWeight,
        chain: Sequence[WeightMap],
        noise: float,
        relaxation: float | None,
        files: Mapping[str, Any] | None = None,
    ) -> None:
        """Collect a rotated weight.

        Args:
            path: the path of the weight's module.
            before, after: the stored weights.
            chain: the rotations that were folded, in the live order.
            noise: the relative error of storing ``after``.
            relaxation: the fold's relaxation, where the fold kept the scales of ``before``.
            files: tensors of the checkpoint that do not follow from ``before``, by :func:`tensor_as_json`.
        """
        entry = undo.encode_weight(before, after, chain, noise=noise, relaxation=relaxation)
        self.facts["weights"][path] = {**entry.facts, "data": self._put(entry.data)}
        if files:
            self.facts["weights"][path]["files"] = dict(files)
        for name, table in entry.tables.items():
            if name not in self.facts["tables"]:
                self.facts["tables"][name] = self._put(table)[:2]

    def shared(self, path: str, other: str, before: EncodedWeight, after: EncodedWeight) -> None:
        """Collect a rotated weight that was tied to the tensor ``other``, which has not changed."""
        self.facts["weights"][path] = {"same_as": other, "before": before.fingerprint, "after": undo.evidence(after)}

    def tensor(self, name: str, before: Tensor, after: Tensor) -> None:
        """Collect a plain tensor that the adapter's own values replaced."""
        entry = undo.encode_tensor(before, after)
        self.facts["tensors"][name] = {**entry.facts, "data": self._put(entry.data)}

    def _put(self, data: bytes) -> list[Any]:
        self._sink.write(data)
        self.nbytes += len(data)
        return [self.nbytes - len(data), len(data), hash_bytes(data)]

    def join(self, facts: Mapping[str, Mapping[str, Any]], data: BinaryIO) -> None:
        """Take over the facts and data of another collector as if this collector had collected them: a table that is here is not
        written again.
        """
        found = [(*f["data"][:2], "") for kind in ("weights", "tensors") for f in facts[kind].values() if "data" in f]
        found += [(start, nbytes, name) for name, (start, nbytes) in facts["tables"].items()]
        moved: dict[int, int] = {}
        for start, nbytes, table in sorted(found):
            moved[start] = self.nbytes
            if table in self.facts["tables"]:
                continue
            data.seek(start)
            self._sink.write(data.read(nbytes))
            self.nbytes += nbytes
            if table:
                self.facts["tables"][table] = [moved[start], nbytes]
        for kind in ("weights", "tensors"):
            for name, f in facts[kind].items():
                self.facts[kind][name] = {**f, "data": [moved[f["data"][0]], *f["data"][1:]]} if "data" in f else f

    def append(self, facts: Mapping[str, Mapping[str, Any]], data: Iterable[bytes]) -> None:
        """Take over the facts and data of another collector."""
        shift = self.nbytes
        for chunk in data:
            self._sink.write(chunk)
            self.nbytes += len(chunk)
        for kind in ("weights", "tensors"):
            for name, f in facts[kind].items():
                start, *rest = f.get("data", [0])
                self.facts[kind][name] = {**f, "data": [start + shift, *rest]} if "data" in f else f
        for name, (start, nbytes) in facts["tables"].items():
            self.facts["tables"].setdefault(name, [start + shift, nbytes])


class UndoWriter(UndoCollector):
    """Writes one record into a file beside ``path``, which :meth:`finish` renames to ``path``.

    As a context manager the writer removes an unfinished file.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        check_place(path, force=force)
        self._force = force
        self._new = Replacement(path, "oftsurgery")
        with contextlib.ExitStack() as above:
            above.enter_context(folders_above(path))
            with disk_errors(self._new.beside):
                self._file: BinaryIO = self._new.beside.open("wb")
                self._file.write(bytes(8 + _ROOM))
            self._above = above.pop_all()
        super().__init__(self._file)

    def __enter__(self) -> UndoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._above, self._new:  # removes the file first, and then folders that are empty
            self._file.close()

    def finish(
        self,
        fold: FoldRecord,
        *,
        ties: Iterable[Sequence[str]] = (),
        tie_word_embeddings: bool | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the manifest and the header, and put the file in its place.

        Args:
            fold: the fold that the record undoes.
            ties: names of tensors that were one tensor; the name that a checkpoint holds comes first.
            tie_word_embeddings: the setting in the base's config, or None.
            config: the checkpoint's ``config.json`` without the fold, or None.
        """
        manifest = {
            "fold": replace(fold, files={}).to_dict(),
            **self.facts,
            "ties": [list(group) for group in ties],
            "tie_word_embeddings": tie_word_embeddings,
            "config": None if config is None else dict(config),
        }
        packed = lzma.compress(json.dumps(manifest, separators=(",", ":"), ensure_ascii=False).encode())
        start, end = self.nbytes, self.nbytes + len(packed)
        header = {
            "__metadata__": {"format": FORMAT, "version": str(VERSION), "manifest": hash_bytes(packed)},
            "data": {"dtype": "U8", "shape": [start], "data_offsets": [0, start]},
            "manifest": {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]},
        }
        with disk_errors(self._new.beside):
            self._file.write(packed)
            self._file.seek(0)
            self._file.write(header_bytes(header, _ROOM))
            to_disk(self._file)
            self._file.close()
        check_place(self._new.path, force=self._force)
        self._new.put()


def join_undos(path: Path, records: Mapping[str, Path], *, force: bool) -> None:
    """Write the undo record of a pipeline from those of its models, ``{component: file}``."""
    check_place(path, force=force)
    held = {name: read_header(file) for name, file in records.items()}
    header: dict[str, Any] = {"__metadata__": {"format": OF_PIPELINE, "version": str(VERSION)}}
    end, copied = 0, []
    for name, (entries, metadata) in held.items():
        header["__metadata__"][place_of(name, "manifest")] = metadata["manifest"]
        for entry in sorted(entries, key=lambda e: PARTS.index(e.name)):
            offsets = [end, end + entry.nbytes]
            header[place_of(name, entry.name)] = {"dtype": "U8", "shape": [entry.nbytes], "data_offsets": offsets}
            copied.append((records[name], entry))
            end = offsets[1]
    room = -(-len(json.dumps(header)) // 8) * 8
    with folders_above(path), Replacement(path, "oftsurgery") as new:
        with disk_errors(new.beside), new.beside.open("wb") as file:
            file.write(header_bytes(header, room))
            for source, entry in copied:
                with opened(source) as part:
                    part.seek(entry.start)
                    left = entry.nbytes
                    while left:
                        chunk = part.read(min(left, 1 << 23))
                        file.write(chunk)
                        left -= len(chunk)
            to_disk(file)
        check_place(path, force=force)
        new.put()


def tensor_as_json(tensor: Tensor | None) -> dict[str, Any] | None:
    """A small tensor as JSON; None for a tensor that the checkpoint did not have."""
    return None if tensor is None else {**undo.described(tensor), "hex": bytes_of(tensor).hex()}
