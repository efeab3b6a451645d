""":func:`open_checkpoint` reads a checkpoint's headers and JSON; :class:`Checkpoint` reads its tensors, one at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from oftsurgery.dtypes import DTYPES
from oftsurgery.errors import CheckpointError, SourceWarning, not_gathered, printable, warn_caller

from .layout import CONFIG, LAYOUTS, Layout, layout_of, no_checkpoint, no_variant, two_checkpoints, weight_map_in
from .reading import TensorEntry, damaged, inside, read_header, read_json
from .remote import opened, stamp_of
from .wrappers import plain_names

_MAX_CONFIG_BYTES = 4 << 20
_CHUNK = 8 << 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's headers and JSON.

    Attributes:
        folder: folder of the checkpoint.
        weights: folder of the shards.
        entries: ``{tensor name: TensorEntry}`` in the files' order; the names lack the segments of wrappers.
        files: names of the shards, in order.
        config: the parsed ``config.json``; empty if the folder has no such file.
        wrapped: whether the files have names with segments of wrappers, which transformers does not load.
        revision: the revision of a Hub repository that was asked for, or None.
        layout: how the files are called.
        metadata: the metadata of the files that an output keeps.
        single: whether the checkpoint is a file of its own, without a config; the folder then holds other things too.
    """

    folder: Path
    weights: Path
    entries: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    config: Mapping[str, Any]
    wrapped: bool = False
    revision: str | None = None
    layout: Layout = LAYOUTS[0]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    single: bool = False

    @property
    def path(self) -> Path:
        """The checkpoint's folder, or its single file."""
        return self.folder / self.files[0] if self.single else self.folder

    @property
    def shards(self) -> list[str]:
        """The shards as paths below the folder, with ``/``."""
        return [(self.weights / name).relative_to(self.folder).as_posix() for name in self.files]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in new memory."""
        entry = self.entries[name]
        buffer = bytearray(entry.nbytes)
        with opened(self.weights / entry.file) as file:
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
        with opened(self.weights / entry.file) as file:
            file.seek(entry.start)
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise self._ended(entry)
                left -= len(chunk)
                yield chunk

    def _ended(self, entry: TensorEntry) -> CheckpointError:
        message = f"the shard ended early, before {entry.nbytes} bytes of the tensor: the file has changed since its header was read"
        remedy = "wait until no program writes the checkpoint, and run again"
        return CheckpointError(message, tensor=entry.name, path=self.weights / entry.file, remedy=remedy)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, as they are stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def stored_as(self) -> str | None:
        """``quant_method`` of the package that quantised the weights, where they are read dequantised; else None."""
        return None

    @property
    def as_stored(self) -> Checkpoint:
        """The checkpoint with the names and tensors of its files, where this one is read dequantised."""
        return self

    @property
    def labels(self) -> Mapping[str, str]:
        """``{name of a weight that is read dequantised: how the weight is stored}``, for people."""
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """Sizes and times (or stamps) of the checkpoint's files, and its config. A checkpoint with an equal identity counts as unchanged."""
        stamps = {name: stamp_of(self.weights / name) for name in self.files}
        return {"files": stamps, "config": dict(self.config)}


def open_single_file(path: Path) -> Checkpoint:
    """Read the header of a checkpoint in a single file.

    Raises:
        CheckpointError: the file is no safetensors file, or is damaged.
    """
    path = path.expanduser()
    entries = _entries(path.parent, [path.name], own=True)
    metadata = {name: text for name, text in read_header(path)[1].items() if name != _RECORD}
    layout = Layout(path.name, f"{path.name}.index.json", written=True)
    folder, held = path.parent, MappingProxyType(entries)
    return Checkpoint(
        folder, folder, held, (path.name,), MappingProxyType({}), layout=layout, metadata=metadata, single=True
    )


_RECORD = "oftsurgery"  # the field of a file's metadata that each fold writes anew


def open_checkpoint(folder: Path, variant: str | None = None) -> Checkpoint:
    """Read the headers of the checkpoint in ``folder``, and of its ``variant`` (``"fp16"``) where a variant is named.

    Raises:
        CheckpointError: the folder has no safetensors checkpoint, the index disagrees with the shards, a file lies
            outside the folder, or a header is wrong.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "the path is a file, not a folder" if folder.is_file() else "the folder does not exist",
            path=folder,
            remedy="give a folder with config.json and *.safetensors, or a Hub id 'owner/name'",
        )
    layout = layout_of(folder, variant)
    if layout is None:
        if variant is not None and layout_of(folder) is not None:
            raise no_variant(folder, variant)
        names = [p.relative_to(folder).as_posix() for p in (*folder.iterdir(), *folder.glob("*/*"))]
        raise no_checkpoint(folder, names)
    single, index = folder / layout.single, folder / layout.index
    files: tuple[str, ...] = (single.name,)
    weight_map: Mapping[str, str] | None = None
    if index.exists():
        weight_map = weight_map_in(index)
        files = tuple(dict.fromkeys(weight_map.values()))
        if single.exists() and single.name not in files:
            raise two_checkpoints(folder, layout)
    entries = _entries(index.parent, files, own=weight_map is None)
    if weight_map is not None:
        _check_index(weight_map, entries, index)
    config = read_json(inside(folder, CONFIG), limit=_MAX_CONFIG_BYTES) if os.path.lexists(folder / CONFIG) else {}
    plain = _without_wrappers(entries, config, folder)
    return Checkpoint(
        folder,
        index.parent,
        MappingProxyType(plain),
        tuple(sorted(files)),
        MappingProxyType(config),
        wrapped=plain.keys() != entries.keys(),
        layout=layout,
    )


def _entries(folder: Path, files: Collection[str], *, own: bool) -> dict[str, TensorEntry]:
    """The tensors in ``files``; ``own``: no index names the files."""
    entries: dict[str, TensorEntry] = {}
    for name in sorted(files):
        for entry in read_header(inside(folder, name, own=own))[0]:
            if entry.name in entries:
                message = (
                    f"two shards, {printable(entries[entry.name].file)} and {printable(name)}, hold the same tensor"
                )
                remedy = "save the checkpoint again with save_pretrained"
                raise CheckpointError(message, tensor=entry.name, path=folder, remedy=remedy)
            entries[entry.name] = entry
    empty = next((e for e in entries.values() if 0 in e.shape and e.name.endswith((".weight", ".bias"))), None)
    if empty is not None:
        remedy = (
            "gather the checkpoint with the script that DeepSpeed put into it, `python zero_to_fp32.py . OUTPUT --safe_serialization`, or save "
            "whole tensors: stage3_gather_16bit_weights_on_model_save (DeepSpeed), fsdp_state_dict_type: FULL_STATE_DICT (FSDP)"
        )
        where = {"tensor": empty.name, "path": folder / empty.file}
        raise not_gathered(CheckpointError, "the checkpoint's tensor", remedy, **where)
    return entries


def _without_wrappers(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], folder: Path
) -> Mapping[str, TensorEntry]:
    """The tensors by the names that the model has without its wrappers; a warning tells of names that change."""
    plain = plain_names(entries, whole="model_type" in config and "auto_map" not in config)
    changed = next((name for name in entries if plain[name] != name), None)
    if changed is None:
        return entries
    warn_caller(
        f"the tensors' names in {printable(folder)} hold segments of wrappers, which transformers does not load: "
        f"{printable(changed)} is read as {printable(plain[changed])}, and the output has the plain names",
        SourceWarning,
    )
    return {plain[name]: replace(entry, name=plain[name]) for name, entry in entries.items()}


def _check_index(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry], index: Path) -> None:
    """Refuse an index that disagrees with its shards."""
    for name, file in weight_map.items():
        if name not in entries:
            raise damaged("the index names a tensor that its shards lack", index, name)
        if entries[name].file != file:
            there = printable(entries[name].file)
            raise damaged(f"the index names {printable(file)}, but the tensor is in {there}", index, name)
    unlisted = [name for name in entries if name not in weight_map]
    if unlisted:
        message = f"the shard {printable(entries[unlisted[0]].file)} holds a tensor that the index lacks"
        remedy = "add the tensor to the index, or save the checkpoint again with save_pretrained"
        raise CheckpointError(message, tensor=unlisted[0], path=index, remedy=remedy)
