"""Undo records on disk: one safetensors file of compressed bytes and a manifest, written whole or not at all.

``docs/undo.md`` describes the format. Nothing in a record executes, and nobody vouches for one: every size is checked
against the file and the model before anything is allocated, every part against its hash.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from torch import Tensor

from oftsurgery.adapters.adapter import Rotation
from oftsurgery.errors import CheckpointError, IntegrityError, StateError, UndoError, printable
from oftsurgery.files.shards import TensorEntry, header_bytes, read_header, to_disk
from oftsurgery.files.staging import Replacement, disk_errors
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.hashing import hash_bytes
from oftsurgery.records.record import FoldRecord
from oftsurgery.weights import undo
from oftsurgery.weights.undo import UndoEntry, changed, damaged, evidence

__all__ = ["UndoParts", "UndoRecord", "UndoWriter", "check_free", "open_undo"]

FORMAT = "oftsurgery-undo"
VERSION = 1

_ROOM = 504  # of the header, which is written last: metadata and two tensors
_MAX_MANIFEST = 256 << 20


def check_free(path: Path, *, force: bool = False) -> None:
    """Refuse a place where a record cannot be written, before anything is computed.

    Raises:
        StateError: something is there already (and ``force`` is not set, or it is a folder), or there is no such folder.
    """
    if os.path.lexists(path) and (not force or not path.is_file()):
        raise StateError(
            "something is there already, and undo records are not overwritten",
            path=path,
            remedy="name another file; a record belongs to one fold",
        )
    if not path.absolute().parent.is_dir():
        raise StateError("the folder for the undo record does not exist", path=path.parent, remedy="make it first")


# --- writing ----------------------------------------------------------------------------------------------------------


class UndoParts:
    """Collects what a fold changed: data goes to ``sink`` as it comes, facts stay.

    Attributes:
        facts: plain values, which :meth:`append` takes: ``weights`` has ``{module path: facts}``, ``tensors`` ``{tensor name:
            facts}`` of plain tensors that the adapters' own values replaced, ``tables`` ``{content hash: [start, bytes]}``.
        nbytes: written so far.
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
        chain: Sequence[Rotation],
        noise: float,
        relaxation: float | None,
        files: Mapping[str, Any] | None = None,
    ) -> None:
        """A rotated weight.

        Args:
            path: of its module.
            before, after: as stored.
            chain: that was folded, in the live order.
            noise: relative error of storing ``after``.
            relaxation: of the fold, where it kept the scales of ``before``.
            files: :func:`described` tensors of the checkpoint that do not follow from ``before``.
        """
        entry = undo.encode_weight(before, after, chain, noise=noise, relaxation=relaxation)
        self.facts["weights"][path] = {**entry.facts, "data": self._put(entry.data)}
        if files:
            self.facts["weights"][path]["files"] = dict(files)
        for name, table in entry.tables.items():
            if name not in self.facts["tables"]:
                self.facts["tables"][name] = self._put(table)[:2]

    def shared(self, path: str, other: str, before: EncodedWeight, after: EncodedWeight) -> None:
        """A rotated weight that was one with the tensor ``other``, which is as it was."""
        self.facts["weights"][path] = {"same_as": other, "before": before.fingerprint, "after": evidence(after)}

    def tensor(self, name: str, before: Tensor, after: Tensor) -> None:
        """A plain tensor that the adapter's own values replaced."""
        entry = undo.encode_tensor(before, after)
        self.facts["tensors"][name] = {**entry.facts, "data": self._put(entry.data)}

    def _put(self, data: bytes) -> list[Any]:
        self._sink.write(data)
        self.nbytes += len(data)
        return [self.nbytes - len(data), len(data), hash_bytes(data)]

    def append(self, facts: Mapping[str, Mapping[str, Any]], data: Iterable[bytes]) -> None:
        """Take over what other parts collected."""
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


class UndoWriter(UndoParts):
    """Writes one record: into a file beside ``path``, which :meth:`finish` puts in its place.

    As a context manager it removes what is unfinished.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        check_free(path, force=force)
        self._force = force
        self._new = Replacement(path, "oftsurgery")
        with disk_errors(self._new.beside):
            self._file: BinaryIO = self._new.beside.open("wb")
            self._file.write(bytes(8 + _ROOM))
        super().__init__(self._file)

    def __enter__(self) -> UndoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._new:
            self._file.close()

    def finish(
        self,
        fold: FoldRecord,
        *,
        ties: Iterable[Sequence[str]] = (),
        tie_word_embeddings: bool | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the rest and put the file in its place.

        Args:
            fold: that the record undoes.
            ties: names of tensors that were one and the same, that which a checkpoint holds first.
            tie_word_embeddings: of the base's config, or None.
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
        check_free(self._new.path, force=self._force)
        self._new.put()


def described(tensor: Tensor | None) -> dict[str, Any] | None:
    """A small tensor as JSON; None for one that there was not."""
    return None if tensor is None else {**undo.described(tensor), "hex": undo.bytes_of(tensor).hex()}


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UndoRecord:
    """A record that was read: the manifest; data is read when it is asked for.

    Attributes:
        path: of the file.
        fold: that it undoes.
        weights: ``{module path: facts}``.
        tensors: ``{tensor name: facts}``.
        ties: names of tensors that were one and the same before the fold.
        tie_word_embeddings: of the base's config, or None.
        config: the checkpoint's ``config.json`` without the fold, or None.
        identity: content hash of the manifest, which holds those of all data.
    """

    path: Path
    fold: FoldRecord
    weights: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Any]]
    ties: tuple[tuple[str, ...], ...]
    tie_word_embeddings: bool | None
    config: Mapping[str, Any] | None
    identity: str
    _tables: Mapping[str, Any]
    _data: TensorEntry

    def shared_with(self, path: str) -> str | None:
        """The tensor that holds the original of the module's weight still, or None."""
        same = self.weights[path].get("same_as")
        return None if same is None else str(same)

    def format(self, path: str, shape: tuple[int, ...]) -> WeightFormat:
        """In which the weight of ``path``, of ``shape``, is stored without the fold."""
        with self._told_of(path):
            return undo.read_format(self.weights[path].get("format"), shape)

    def is_of(self, record: FoldRecord) -> bool:
        """Whether it undoes the fold of ``record``."""
        return _identity(self.fold) == _identity(record)

    def weight(self, path: str, current: EncodedWeight) -> EncodedWeight:
        """The stored weight of the module at ``path`` as it was, from the folded one; proved by its hash.

        Raises:
            UndoError: the record is damaged.
            IntegrityError: ``current`` is not what the fold left.
        """
        with self._told_of(path):
            tables = {name: self._read(place, name) for name, place in self._tables.items()}
            return undo.decode_weight(self._entry(self.weights[path], tables), current)

    def check_shared(self, path: str, other: EncodedWeight, current: EncodedWeight | None = None) -> None:
        """Raise IntegrityError unless ``other`` is what the weight at ``path`` was, and ``current``, where it is given,
        what the fold left of it.
        """
        facts = self.weights[path]
        moved = current is not None and evidence(current) != facts.get("after")
        if moved or other.fingerprint != facts.get("before"):
            message = "the weight, or the one that it was tied to, was changed since the fold"
            raise changed(message, module=path, path=self.path)

    def tensor(self, name: str, current: Tensor) -> Tensor:
        """The plain tensor ``name`` as it was."""
        with self._told_of(name):
            return undo.decode_tensor(self._entry(self.tensors[name], {}), current)

    def files(self, path: str) -> Mapping[str, Tensor | None]:
        """Tensors of the checkpoint beside the weight of ``path`` that do not follow from it; None for one that there
        was not.
        """
        try:
            found = self.weights[path].get("files", {}).items()
            return {name: None if f is None else undo.tensor_of(bytes.fromhex(f["hex"]), f) for name, f in found}
        except (TypeError, KeyError, ValueError, RuntimeError, AttributeError, UndoError) as error:
            raise damaged(self.path) from error

    def _entry(self, facts: Mapping[str, Any], tables: Mapping[str, bytes]) -> UndoEntry:
        place = facts.get("data")
        if not isinstance(place, list) or len(place) != 3:
            raise damaged()
        return UndoEntry(facts, self._read(place[:2], place[2]), tables)

    def _read(self, place: Any, expected: str) -> bytes:
        good = isinstance(place, list) and len(place) == 2 and all(type(n) is int and n >= 0 for n in place)
        if not good or sum(place) > self._data.nbytes:
            raise damaged()
        content = _bytes_at(self.path, self._data.start + place[0], place[1])
        if hash_bytes(content) != expected:
            raise damaged()
        return content

    @contextlib.contextmanager
    def _told_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except (UndoError, IntegrityError) as error:
            raise type(error)(
                error.message, module=name, format=error.format, path=self.path, remedy=error.remedy
            ) from error

    def check_last(self, record: FoldRecord | None) -> None:
        """Refuse a model or checkpoint whose ``record`` says that its last fold is another one.

        Raises:
            StateError: with the reason.
        """
        if record is None or self.is_of(record):
            return
        mine = _sources(self.fold)
        later = [*record.earlier, record]
        places = [i for i, fold in enumerate(later) if self.is_of(fold)]
        if places:
            over = later[places[-1] + 1 :]
            names = "; ".join(map(_sources, over))
            raise StateError(
                f"the record's fold (of {mine}) is not the last one: {len(over)} later ones lie on top of it (of {names})",
                path=self.path,
                remedy="take those out first, the last one first, each with its own record",
            )
        raise StateError(
            f"the undo record is of another fold: it is of {mine}, the last fold of {_sources(record)}",
            path=self.path,
            remedy="give the record that was written with this fold",
        )


def _sources(fold: FoldRecord) -> str:
    return ", ".join(printable(a.source) for a in fold.adapters)


def _identity(fold: FoldRecord) -> object:
    return [adapter.fingerprint for adapter in fold.adapters], {path: m.after for path, m in fold.modules.items()}


def _no_record(message: str, path: Path) -> UndoError:
    return UndoError(message, path=path, remedy="give the file that fold(…, undo=…) wrote")


def _bytes_at(path: Path, start: int, nbytes: int) -> bytes:
    with disk_errors(path), path.open("rb") as file:
        file.seek(start)
        return file.read(nbytes)


def open_undo(path: Path) -> UndoRecord:
    """Read an undo record's manifest.

    Raises:
        UndoError: no undo record, one of a newer version, or a damaged one.
    """
    if not path.is_file():
        raise _no_record("an undo record is a plain file" if os.path.lexists(path) else "no such file", path)
    try:
        entries, metadata = read_header(path)
    except (CheckpointError, ValueError) as error:
        raise _no_record("no undo record, or a truncated or damaged one", path) from error
    if metadata.get("format") != FORMAT:
        raise _no_record("a safetensors file, but no undo record", path)
    if metadata.get("version") != str(VERSION):
        raise UndoError(
            f"an undo record of version {printable(metadata.get('version'))}; this oftsurgery reads {VERSION}",
            path=path,
            remedy="use the oftsurgery that wrote it, or a newer one",
        )
    found = {e.name: e for e in entries}
    if set(found) != {"data", "manifest"} or any(e.dtype != "U8" for e in entries):
        raise damaged(path)
    packed = _bytes_at(path, found["manifest"].start, found["manifest"].nbytes)
    if hash_bytes(packed) != metadata.get("manifest"):
        raise damaged(path)
    try:
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 << 20)
        text = decoder.decompress(packed, max_length=_MAX_MANIFEST)
        if not decoder.eof:
            raise damaged(path)
        m = json.loads(text)
        fold = FoldRecord.from_dict(m["fold"])
        weights, tensors = _mappings(m["weights"]), _mappings(m["tensors"])
        ties = tuple(tuple(map(str, group)) for group in m["ties"])
        tables, config, tie = _mapping(m["tables"]), m["config"], m["tie_word_embeddings"]
        if tie not in (None, True, False) or not (config is None or isinstance(config, dict)):
            raise damaged(path)
    except (lzma.LZMAError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path) from error
    return UndoRecord(path, fold, weights, tensors, ties, tie, config, metadata["manifest"], tables, found["data"])


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("no object")
    return MappingProxyType(value)


def _mappings(value: Any) -> Mapping[str, Mapping[str, Any]]:
    return MappingProxyType({name: _mapping(v) for name, v in _mapping(value).items()})
