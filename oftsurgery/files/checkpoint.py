""":func:`open_checkpoint` reads a checkpoint's headers and JSON without data, :class:`Checkpoint` one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from oftsurgery.dtypes import DTYPES
from oftsurgery.errors import CheckpointError, SourceWarning, not_gathered, printable, warn_caller

from .reading import ADAPTER_CONFIG, TensorEntry, damaged, inside, read_header, read_json
from .wrappers import plain_names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_MAX_CONFIG_BYTES = 4 << 20
_CHUNK = 8 << 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's headers and JSON.

    Attributes:
        folder: that holds it.
        entries: ``{tensor name: TensorEntry}`` in the files' order, by names without wrappers' segments.
        files: shards in order.
        config: the parsed ``config.json``; empty without one.
        wrapped: the files have names with wrappers' segments, which transformers does not load.
        revision: of the Hub repository that was asked for, or None.
    """

    folder: Path
    entries: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    config: Mapping[str, Any]
    wrapped: bool = False
    revision: str | None = None

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
        weight_map = weight_map_in(folder)
        files = tuple(dict.fromkeys(weight_map.values()))
        if (folder / SINGLE).exists() and SINGLE not in files:
            raise two_checkpoints(folder)
    elif (folder / SINGLE).exists():
        files = (SINGLE,)
    else:
        raise no_checkpoint(folder, [path.name for path in folder.iterdir()])
    entries = _entries(folder, files, own=weight_map is None)
    if weight_map is not None:
        _check_index(weight_map, entries, folder)
    config = read_json(inside(folder, CONFIG), limit=_MAX_CONFIG_BYTES) if os.path.lexists(folder / CONFIG) else {}
    plain = _without_wrappers(entries, config, folder)
    wrapped = plain.keys() != entries.keys()
    return Checkpoint(folder, MappingProxyType(plain), tuple(sorted(files)), MappingProxyType(config), wrapped=wrapped)


def _entries(folder: Path, files: Collection[str], *, own: bool) -> dict[str, TensorEntry]:
    """The tensors in ``files``, whose names no file gives where ``own``."""
    entries: dict[str, TensorEntry] = {}
    for name in sorted(files):
        for entry in read_header(inside(folder, name, own=own))[0]:
            if entry.name in entries:
                message = f"two shards, {printable(entries[entry.name].file)} and {printable(name)}, hold one tensor"
                raise CheckpointError(message, tensor=entry.name, path=folder)
            entries[entry.name] = entry
    empty = next((e for e in entries.values() if 0 in e.shape and e.name.endswith((".weight", ".bias"))), None)
    if empty is not None:
        remedy = (
            "gather it with DeepSpeed's script in the training's checkpoint, `python zero_to_fp32.py . OUTPUT --safe_serialization`, or save it "
            "where it is whole: stage3_gather_16bit_weights_on_model_save (DeepSpeed), fsdp_state_dict_type: FULL_STATE_DICT (FSDP)"
        )
        where = {"tensor": empty.name, "path": folder / empty.file}
        raise not_gathered(CheckpointError, "the checkpoint's tensor", remedy, **where)
    return entries


def _without_wrappers(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], folder: Path
) -> Mapping[str, TensorEntry]:
    """The tensors by the names that the model has without its wrappers, which is said."""
    plain = plain_names(entries, whole="model_type" in config and "auto_map" not in config)
    changed = next((name for name in entries if plain[name] != name), None)
    if changed is None:
        return entries
    warn_caller(
        f"the tensors of {printable(folder)} have names of wrappers in them ({printable(changed)} is read as "
        f"{printable(plain[changed])}): transformers does not load such names; what is written has the plain ones",
        SourceWarning,
    )
    return {plain[name]: replace(entry, name=plain[name]) for name, entry in entries.items()}


def no_checkpoint(place: object, names: Collection[str]) -> CheckpointError:
    """The error for a folder or repository that holds files of these ``names`` and no weights that are read."""

    def first(*endings: str) -> str | None:
        return next((printable(name) for name in sorted(names) if name.endswith(endings)), None)

    pickled, converted = first(".bin", ".pt", ".pth", ".ckpt"), first(".gguf", ".onnx")
    if pickled is not None:
        message = f"{pickled} is a pickle, which could run code when read; oftsurgery reads safetensors only"
        remedy = "load it with transformers in a place that you trust, and save_pretrained(…, safe_serialization=True)"
    elif ADAPTER_CONFIG in names:
        message = "the folder holds an adapter, not a model"
        remedy = "give the base model first, the adapter second"
    elif converted is not None:
        message = f"the weights are there as {converted} alone; oftsurgery reads safetensors only"
        remedy = "give the model from which that file was converted"
    else:
        message, remedy = f"the folder has neither {SINGLE} nor {INDEX}", "give a folder that save_pretrained wrote"
    return CheckpointError(message, path=place, remedy=remedy)


def two_checkpoints(place: object) -> CheckpointError:
    """The error for a folder or repository with a checkpoint of one file and another one of shards."""
    message = f"the folder holds two checkpoints: {SINGLE}, which transformers reads, and the shards of {INDEX}"
    remedy = "remove the one that is not meant; from the Hub, download the other one alone: hf download --exclude"
    return CheckpointError(message, path=place, remedy=remedy)


def weight_map_in(folder: Path) -> Mapping[str, str]:
    """``{tensor name: file name}`` of the index in ``folder``."""
    index = read_json(inside(folder, INDEX))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged("the index has no `weight_map` of file names", folder / INDEX)
    return weight_map


def _check_index(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry], folder: Path) -> None:
    for name, file in weight_map.items():
        if name not in entries:
            raise damaged("the index names a tensor that its shards lack", folder / INDEX, name)
        if entries[name].file != file:
            there = printable(entries[name].file)
            raise damaged(f"the index says {printable(file)}, but the tensor is in {there}", folder / INDEX, name)
    unlisted = [name for name in entries if name not in weight_map]
    if unlisted:
        message = "a shard holds a tensor that the index lacks"
        raise CheckpointError(message, tensor=unlisted[0], path=folder / INDEX, remedy="repair the index")
