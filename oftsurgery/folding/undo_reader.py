""":func:`open_undo` reads an undo record. A record holds no code, and nobody vouches for its contents: every size is checked
against the file and the model before memory is allocated, and every part is checked against its hash.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from oftsurgery.errors import CheckpointError, IntegrityError, StateError, UndoError, printable
from oftsurgery.files.reading import TensorEntry, read_header
from oftsurgery.files.remote import opened
from oftsurgery.files.writing import disk_errors
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.hashing import hash_bytes
from oftsurgery.records.record import FoldRecord
from oftsurgery.weights import undo
from oftsurgery.weights.undo_streams import damaged

FORMAT = "oftsurgery-undo"
#: the format of a record of several models of a pipeline
OF_PIPELINE = "oftsurgery-undo-pipeline"
VERSION = 1
#: the parts of one model in the file
PARTS = ("data", "manifest")

_MAX_MANIFEST = 256 << 20


@dataclass(frozen=True, eq=False)
class UndoRecord:
    """The manifest of an undo record; the data are read when a weight is asked for.

    Attributes:
        path: the record's file.
        fold: the fold that the record undoes.
        weights: ``{module path: facts}``.
        tensors: ``{tensor name: facts}``.
        ties: names of tensors that were one tensor before the fold.
        tie_word_embeddings: the setting in the base's config, or None.
        config: the checkpoint's ``config.json`` without the fold, or None.
        identity: content hash of the manifest, which holds the hashes of all data.
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
        """The tensor that still holds the original of the module's weight, or None."""
        same = self.weights[path].get("same_as")
        return None if same is None else str(same)

    def format(self, path: str, folded: WeightFormat) -> WeightFormat:
        """The format in which the weight of ``path`` is stored without the fold; with the fold, it is stored as ``folded``."""
        with self._told_of(path):
            return undo.read_format(self.weights[path].get("format"), folded)

    def is_of(self, record: FoldRecord) -> bool:
        """Whether this undo record belongs to the fold of ``record``."""
        return _identity(self.fold) == _identity(record)

    def weight(self, path: str, current: EncodedWeight) -> EncodedWeight:
        """The original stored weight of the module at ``path``, from the folded weight; its hash is checked.

        Raises:
            UndoError: the record is damaged.
            IntegrityError: ``current`` is not the folded weight.
        """
        with self._told_of(path):
            tables = {name: self._read(place, name) for name, place in self._tables.items()}
            return undo.decode_weight(self._entry(self.weights[path], tables), current)

    def check_shared(self, path: str, other: EncodedWeight, current: EncodedWeight | None = None) -> None:
        """Raise IntegrityError unless ``other`` is the original of the weight at ``path``, and ``current``, where it is
        given, the folded weight.
        """
        facts = self.weights[path]
        moved = current is not None and undo.evidence(current) != facts.get("after")
        if moved or other.fingerprint != facts.get("before"):
            message = "the weight, or a weight that was tied to this weight, has changed since the fold"
            raise undo.changed(message, module=path, path=self.path)

    def tensor(self, name: str, current: Tensor) -> Tensor:
        """The original of the plain tensor ``name``."""
        with self._told_of(name):
            return undo.decode_tensor(self._entry(self.tensors[name], {}), current)

    def shape(self, name: str, folded: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the original of the plain tensor ``name``, whose shape after the fold is ``folded``."""
        with self._told_of(name):
            return undo.read_shape(self.tensors[name].get("tensor"), math.prod(folded))

    def files(self, path: str) -> Mapping[str, Tensor | None]:
        """Tensors of the checkpoint beside the weight of ``path`` that do not follow from the weight; None for a tensor
        that the checkpoint did not have.
        """
        try:
            found = self.weights[path].get("files", {}).items()
            return {name: None if f is None else undo.tensor_of(bytes.fromhex(f["hex"]), f) for name, f in found}
        except (TypeError, KeyError, ValueError, RuntimeError, AttributeError, UndoError) as error:
            raise damaged(self.path) from error

    def _entry(self, facts: Mapping[str, Any], tables: Mapping[str, bytes]) -> undo.UndoEntry:
        place = facts.get("data")
        if not isinstance(place, list) or len(place) != 3:
            raise damaged()
        return undo.UndoEntry(facts, self._read(place[:2], place[2]), tables)

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
        """Add the tensor's name and the record's path to errors of the body."""
        try:
            yield
        except (UndoError, IntegrityError) as error:
            raise type(error)(
                error.message, module=name, format=error.format, path=self.path, remedy=error.remedy
            ) from error

    def check_last(self, record: FoldRecord | None) -> None:
        """Refuse a model or checkpoint whose ``record`` names another last fold.

        Raises:
            StateError: the record's fold is not the last fold.
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
                f"the undo record's fold (of {mine}) is not the last fold: {len(over)} later folds (of {names}) were made after it",
                path=self.path,
                remedy="take the later folds out first, the last fold first, each with its own undo record",
            )
        message = f"the undo record is of a fold of {mine}, but the model's last fold is of {_sources(record)}"
        raise StateError(message, path=self.path, remedy="give the undo record that was written with the last fold")


def _sources(fold: FoldRecord) -> str:
    return ", ".join(printable(a.source) for a in fold.adapters)


def _identity(fold: FoldRecord) -> object:
    return [adapter.fingerprint for adapter in fold.adapters], {path: m.after for path, m in fold.modules.items()}


def _no_record(message: str, path: Path) -> UndoError:
    return UndoError(message, path=path, remedy="give the file that fold(…, undo=…) or `oftsurgery fold --undo` wrote")


def _bytes_at(path: Path, start: int, nbytes: int) -> bytes:
    with disk_errors(path), opened(path) as file:
        file.seek(start)
        return file.read(nbytes)


def open_undo(path: Path, fold: FoldRecord | None = None) -> UndoRecord:
    """Read the manifest of one model's undo record.

    Args:
        fold: the model's last fold, which chooses among the models of a pipeline's record.

    Raises:
        UndoError: the file is no undo record, is damaged or of a newer version, or is a pipeline's record without this model.
    """
    found = open_undos(path)
    own = [record for name, record in found.items() if not name or (fold is not None and record.is_of(fold))]
    if own:
        return own[0]
    message = f"the undo record is of a fold of {len(found)} models of a pipeline: {', '.join(map(printable, found))}"
    raise UndoError(
        message, path=path, remedy="give the pipeline, or the folder of one of these models as it was folded"
    )


def open_undos(path: Path) -> Mapping[str, UndoRecord]:
    """Read the manifests of an undo record: ``{component: its record}`` of a pipeline, ``{"": record}`` of one model.

    Raises:
        UndoError: the file is no undo record, or is damaged or of a newer version.
    """
    if not path.is_file():
        raise _no_record("the path is not a plain file" if os.path.lexists(path) else "the file does not exist", path)
    try:
        entries, metadata = read_header(path)
    except (CheckpointError, ValueError) as error:
        raise _no_record("the file is no undo record, or is truncated or damaged", path) from error
    kind = metadata.get("format")
    if kind not in (FORMAT, OF_PIPELINE):
        raise _no_record("the file is safetensors, but no undo record", path)
    if metadata.get("version") != str(VERSION):
        message = (
            f"the undo record has version {printable(metadata.get('version'))}; this oftsurgery reads version {VERSION}"
        )
        raise UndoError(message, path=path, remedy="use the oftsurgery that wrote the record, or a newer release")
    found = {e.name: e for e in entries}
    names = [""] if kind == FORMAT else [n.removesuffix("/data") for n in found if "/data" in n]
    if {place_of(name, part) for name in names for part in PARTS} != set(found) or not names:
        raise damaged(path)
    if any(e.dtype != "U8" for e in entries):
        raise damaged(path)
    return MappingProxyType({name: _opened(path, name, found, metadata) for name in names})


def place_of(model: str, part: str) -> str:
    """The name of a part of the file, a tensor or a hash in the metadata; ``model`` is empty in a record of one model."""
    return f"{model}/{part}" if model else part


def _opened(path: Path, name: str, found: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> UndoRecord:
    """The record of one model in the file."""
    manifest, identity = found[place_of(name, "manifest")], metadata.get(place_of(name, "manifest"), "")
    packed = _bytes_at(path, manifest.start, manifest.nbytes)
    if hash_bytes(packed) != identity:
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
    data = found[place_of(name, "data")]
    return UndoRecord(path, fold, weights, tensors, ties, tie, config, identity, tables, data)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("the value is no JSON object")
    return MappingProxyType(value)


def _mappings(value: Any) -> Mapping[str, Mapping[str, Any]]:
    return MappingProxyType({name: _mapping(v) for name, v in _mapping(value).items()})
