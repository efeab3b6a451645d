""":func:`open_checkpoint` reads a checkpoint's headers and JSON; :class:`Checkpoint` reads its tensors, one at a time."""

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


@dataclass(frozen=True)
class Layout:
    """The names of a checkpoint's files, as paths below its folder. ``single`` holds all tensors, or ``index`` lists the
    shards; all of these files lie in one folder, which may be a subfolder.
    """

    single: str
    index: str

    @property
    def names(self) -> tuple[str, str]:
        return self.single, self.index


#: every layout that is read; the first layout is written
LAYOUTS = (Layout(SINGLE, INDEX),)

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
    """

    folder: Path
    weights: Path
    entries: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    config: Mapping[str, Any]
    wrapped: bool = False
    revision: str | None = None

    @property
    def shards(self) -> list[str]:
        """The shards as paths below the folder, with ``/``."""
        return [(self.weights / name).relative_to(self.folder).as_posix() for name in self.files]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in new memory."""
        entry = self.entries[name]
        buffer = bytearray(entry.nbytes)
        with (self.weights / entry.file).open("rb") as file:
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
        with (self.weights / entry.file).open("rb") as file:
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
    def identity(self) -> dict[str, Any]:
        """Sizes and times of the checkpoint's files, and its config. A checkpoint with an equal identity counts as unchanged."""
        stats = {name: (self.weights / name).stat() for name in self.files}
        return {"files": {n: [s.st_size, s.st_mtime_ns] for n, s in stats.items()}, "config": dict(self.config)}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the checkpoint in ``folder``.

    Raises:
        CheckpointError: the folder has no safetensors checkpoint, the index disagrees with the shards, a file lies
            outside the folder, or a header is wrong.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "the folder does not exist",
            path=folder,
            remedy="give a folder with config.json and *.safetensors, or a Hub id 'owner/name'",
        )
    layout = layout_of(folder)
    if layout is None:
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
    )


def layout_of(folder: Path) -> Layout | None:
    """The layout of the checkpoint in ``folder``; None for a folder without a checkpoint."""
    return next((layout for layout in LAYOUTS if any((folder / name).exists() for name in layout.names)), None)


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


#: files of diffusers' pipelines and models
_IMAGE_MODELS = {
    "model_index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
}


def no_checkpoint(place: object, names: Collection[str], otherwise: str | None = None) -> CheckpointError:
    """The error for a folder or repository that holds files of these ``names`` and no weights that are read; the message is
    ``otherwise`` where the names tell nothing.
    """

    def first(*endings: str) -> str | None:
        return next((printable(name) for name in sorted(names) if name.endswith(endings)), None)

    inner = sorted(name.rpartition("/")[0] for name in names if name.endswith((f"/{SINGLE}", f"/{INDEX}")))
    pickled, converted = first(".bin", ".pt", ".pth", ".ckpt"), first(".gguf", ".onnx")
    adapters = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{ADAPTER_CONFIG}"))
    if ADAPTER_CONFIG in names:
        message, remedy = (
            "the folder holds an adapter, not a model",
            "give the model's folder in this place; the commands take BASE, ADAPTER and OUTPUT in this order",
        )
    elif adapters:  # a trainer's output
        message = f"the folder holds no model, but adapters in subfolders: {', '.join(map(printable, adapters))}"
        remedy = "give the base model first, and one of these folders as the adapter"
    elif _IMAGE_MODELS & {name.rpartition("/")[2] for name in names}:
        message = "the folder holds a model of diffusers, and oftsurgery reads folders of transformers only"
        remedy = (
            "load the model with diffusers, and fold the adapter in memory: oftsurgery.fold(pipeline.unet, adapter)"
        )
    elif pickled is not None:
        message = f"{pickled} is a pickle, which could run code when read; oftsurgery reads safetensors only"
        remedy = "load the model with transformers on a machine that you trust, and save_pretrained(…, safe_serialization=True)"
    elif converted is not None:
        message = f"the weights are there only as {converted}; oftsurgery reads safetensors only"
        remedy = "give the model from which that file was converted"
    elif inner:  # sentence-transformers once saved a model in 0_Transformer
        message = f"the folder holds no weights, but its subfolder {printable(inner[0])!r} holds weights"
        remedy = "give the subfolder of the model that the adapter was trained on"
    else:
        wanted = " nor ".join(name for layout in LAYOUTS for name in layout.names)
        message = otherwise or f"the folder has neither {wanted}"
        remedy = "give a folder that save_pretrained wrote, or a Hub id 'owner/name'"
    return CheckpointError(message, path=place, remedy=remedy)


def two_checkpoints(place: object, layout: Layout) -> CheckpointError:
    """The error for a folder or repository with a checkpoint of one file and another checkpoint of shards."""
    message = (
        f"the folder holds two checkpoints: {layout.single}, which transformers reads, and the shards of {layout.index}"
    )
    remedy = "remove the checkpoint that you do not mean; download a repository without it (hf download --exclude)"
    return CheckpointError(message, path=place, remedy=remedy)


def weight_map_in(index: Path) -> Mapping[str, str]:
    """``{tensor name: file name}`` of a checkpoint's index."""
    weight_map = read_json(inside(index.parent, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged("the index has no `weight_map` of file names", index)
    return weight_map


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
