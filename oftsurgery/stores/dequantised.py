"""A checkpoint that another package than bitsandbytes quantised, read as the plain checkpoint that this package dequantises it to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtypes import DTYPE_NAMES, DTYPES
from oftsurgery.errors import FormatError, printable
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.pipeline import Pipeline, open_pipeline
from oftsurgery.files.reading import TensorEntry, read_header
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.formats.packages.methods import METHODS, REMEDIES, idle_tensors
from oftsurgery.formats.packages.package_format import PackageFormat
from oftsurgery.formats.packages.stored import SAVE_AGAIN, Source, Stored

from .folder import load_dtype
from .naming import CONV1D_NAMES, architecture_of

_SETTINGS = ("quantization_config", "compression_config")


@dataclass(frozen=True, eq=False)
class DequantisedCheckpoint(Checkpoint):
    """The plain checkpoint that a package's own dequantisation of ``packed`` gives, weight by weight as each is read.

    Attributes:
        packed: the checkpoint as it is stored.
        held: ``{name of a weight: the stored weight}``.
        idle: the names of the stored tensors that only the package needs.
        method: ``quant_method`` of the config.
    """

    packed: Checkpoint | None = None
    held: Mapping[str, Stored] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    method: str | None = None

    def read(self, name: str) -> Tensor:
        stored = self.held.get(name)
        return super().read(name) if stored is None else stored.decode(self._tensors(stored)).contiguous()

    def stored(self, name: str) -> EncodedWeight:
        """A weight of :attr:`held` as it is stored."""
        return EncodedWeight(self.format(name), self._tensors(self.held[name]))

    def format(self, name: str) -> PackageFormat:
        """The format of a weight of :attr:`held`."""
        stored, entries = self.held[name], self.as_stored.entries
        tensors = {local: entries[own] for local, own in stored.tensors.items()}
        layout = {local: (DTYPES[entry.dtype], entry.shape) for local, entry in tensors.items()}
        return PackageFormat(str(self.method), stored.shape, stored.dtype, stored=stored, entries=layout)

    def _tensors(self, stored: Stored) -> dict[str, Tensor]:
        return {local: self.as_stored.read(own) for local, own in stored.tensors.items()}

    def chunks(self, name: str) -> Iterator[bytes]:
        if name not in self.held:
            yield from super().chunks(name)
        else:
            yield self.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()

    @property
    def as_stored(self) -> Checkpoint:
        assert self.packed is not None  # noqa: S101 - such a checkpoint has one
        return self.packed

    @property
    def nbytes(self) -> int:
        return self.as_stored.nbytes

    @property
    def stored_as(self) -> str | None:
        return self.method

    @property
    def labels(self) -> Mapping[str, str]:
        return {name: stored.label for name, stored in self.held.items()}

    @property
    def identity(self) -> dict[str, Any]:
        return self.as_stored.identity


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint``, or the plain checkpoint that its package dequantises it to.

    Raises:
        FormatError: oftsurgery does not read the package's weights, or the tensors do not prove what the config says.
    """
    settings = next((checkpoint.config[name] for name in _SETTINGS if checkpoint.config.get(name)), None)
    method = method_of(settings)
    if not isinstance(settings, Mapping) or method in (None, "bitsandbytes"):
        _check_plain(checkpoint)
        return checkpoint
    if method not in METHODS:
        raise FormatError(
            "another library quantised the checkpoint; oftsurgery reads plain weights and those of bitsandbytes, "
            + ", ".join(METHODS),
            format=printable(method),
            path=checkpoint.folder,
            remedy=REMEDIES.get(str(method), "dequantise the checkpoint with that library first"),
        )
    entries = {name: (DTYPES[e.dtype], e.shape) for name, e in checkpoint.entries.items()}
    held = METHODS[method](
        Source(entries, settings, load_dtype(checkpoint), checkpoint.read, _metadata(checkpoint, method))
    )
    if not held:
        raise FormatError(
            f"the config says that {printable(method)} quantised the weights, and no weight is stored so",
            format=printable(method),
            path=checkpoint.folder,
            remedy="restore the config.json of these weights",
        )
    both = next((n for n, s in held.items() if n in entries and n not in s.tensors.values()), None)
    if both is not None:
        message = "the checkpoint holds the weight twice, plain and quantised"
        raise FormatError(message, tensor=both, format=printable(method), remedy=SAVE_AGAIN)
    own = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    own["config"] = MappingProxyType({k: v for k, v in checkpoint.config.items() if k not in _SETTINGS})
    if method == "gptq":
        held = _as_in_class(own["config"], held)
    idle = tuple(idle_tensors(method, entries))
    own["entries"] = MappingProxyType(_entries(checkpoint, held, {*idle}))
    return DequantisedCheckpoint(**own, packed=checkpoint, held=MappingProxyType(held), idle=idle, method=method)


#: ``{end of a tensor's name: the packages that write such tensors}``
_MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".W_q": "HQQ",
    ".weight_packed": "compressed-tensors",
    "._weight_qdata": "torchao",
}


def _check_plain(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are a package's, and whose config names no package.

    Raises:
        FormatError: there is such a tensor.
    """
    for name, entry in checkpoint.entries.items():
        package = next((package for end, package in _MARKS.items() if name.endswith(end)), None)
        if entry.dtype == "I8" and name.endswith(".weight") and f"{name}_scale" in checkpoint.entries:
            package = "compressed-tensors"
        if package is not None:
            raise FormatError(
                f"the tensors are those of {package}, and config.json does not say how the weights are quantised",
                tensor=name,
                path=checkpoint.folder,
                remedy="restore the config.json of these weights, with its `quantization_config`",
            )


def open_models(folder: Path, variant: str | None = None) -> Pipeline:
    """The pipeline in a folder; each of its models is read as :func:`dequantised` reads it."""
    pipeline = open_pipeline(folder, variant)
    return replace(pipeline, models={name: dequantised(model) for name, model in pipeline.models.items()})


def config_as_stored(source: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the settings of the package whose layout ``source`` has."""
    own = source.as_stored.config if source.stored_as is not None else {}
    return {**config, **{name: own[name] for name in _SETTINGS if name in own}}


def from_pretrained(cls: Any, checkpoint: Checkpoint, config: Any, **settings: Any) -> nn.Module:
    """The model that ``from_pretrained`` of transformers' class ``cls`` loads from a checkpoint; a checkpoint that is read dequantised
    gives its plain tensors.
    """
    if checkpoint.stored_as is None:
        place: Path | None = checkpoint.folder
        settings |= {"local_files_only": True, "use_safetensors": True}
    else:
        place = None
        settings |= {"state_dict": {name: checkpoint.read(name) for name in checkpoint.entries}}
    return cls.from_pretrained(place, config=config, **settings)  # type: ignore[no-any-return]


def method_of(settings: object) -> str | None:
    """The package that a ``quantization_config`` names; None for none."""
    if not isinstance(settings, Mapping):
        return None
    named = settings.get("quant_method")
    if named is None:
        return "compressed-tensors" if "config_groups" in settings else None
    return str(getattr(named, "value", named))


def _as_in_class(config: Mapping[str, Any], held: Mapping[str, Stored]) -> dict[str, Stored]:
    """The weights as the model's class holds them: GPTQ's layers take the places of ``Conv1D`` too, which holds ``(in, out)``."""
    found = dict(held)
    if any(name.endswith(CONV1D_NAMES) for name in held):
        shapes = {name: stored.shape for name, stored in held.items()}
        transposed = architecture_of(config, shapes, dtype=torch.float32, skip=None).transposed
        for name in transposed & held.keys():
            stored = held[name]
            found[name] = replace(stored, shape=stored.shape[::-1], decode=partial(_turned, stored))
    return found


def _turned(stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    return stored.decode(tensors).t()


def _metadata(checkpoint: Checkpoint, method: str) -> dict[str, str]:
    """The metadata of the headers, where torchao says of each weight how the weight is stored; nothing for other packages."""
    files = checkpoint.files if method == "torchao" else ()
    return {name: text for file in files for name, text in read_header(checkpoint.weights / file)[1].items()}


def _entries(checkpoint: Checkpoint, held: Mapping[str, Stored], idle: set[str]) -> dict[str, TensorEntry]:
    """The plain checkpoint's tensors: each weight in the place of its first tensor, and the tensors that belong to no weight."""
    owner = {own: name for name, stored in held.items() for own in stored.tensors.values()}
    entries: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.entries.items():
        weight = owner.get(name)
        if weight is None:
            if name not in idle:
                entries[name] = entry
        elif weight not in entries:
            stored = held[weight]
            size = math.prod(stored.shape) * stored.dtype.itemsize
            entries[weight] = TensorEntry(weight, entry.file, DTYPE_NAMES[stored.dtype], stored.shape, -1, size)
    return entries
