"""A live model as a :class:`~oftsurgery.stores.store.Store`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from oftsurgery.adapters.targets import Adaptable
from oftsurgery.errors import GATHER_MODEL, StateError, not_gathered
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.records.record import FoldRecord

from .adaptable import adaptable_of
from .idle import is_idle
from .image_names import ImageNames
from .layers import Layer
from .layouts import find_names, is_encoder, layouts_of, names_in_model
from .meaning import Meaning
from .modules import inner_model, modules_of, shells_of, tensors_in
from .resizing import resized
from .skeleton import quiet
from .store import LayerInfo
from .ties import Ties, ties_of
from .vocabulary import Vocabulary, vocabulary_of

_ATTRIBUTE = "oftsurgery"


def record_of(model: nn.Module) -> FoldRecord | None:
    """The model's :class:`FoldRecord`, or None if nothing was folded."""
    record = inner_model(model).__dict__.get(_ATTRIBUTE)
    return record if isinstance(record, FoldRecord) else None


def set_record(model: nn.Module, record: FoldRecord | None) -> None:
    """Set the model's record, or remove it."""
    for shell in shells_of(model):  # a DataParallel does not pass its model's attributes on
        if record is None:
            shell.__dict__.pop(_ATTRIBUTE, None)
        else:
            shell.__dict__[_ATTRIBUTE] = record


def fields_in(config: Any, vocabulary: Vocabulary | None) -> Iterator[tuple[Any, str, int]]:
    """``(part of the config, name of a field, its new value)`` of the fields that state the number of tokens."""
    for path, value in vocabulary.fields.items() if vocabulary is not None else ():
        *parts, name = path.split(".")
        yield reduce(getattr, parts, config), name, value


class LiveStore:
    """The named weights of ``model``; each read gives the current values.

    Attributes:
        modules: ``{path: module}``; code that changes the model must keep this mapping right.
        record: the record of what is folded in.
    """

    what = "model"

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module] | None = None) -> None:
        self.model = model
        self.modules = modules_of(model) if modules is None else modules
        self.record = record_of(model)

    @cached_property
    def ties(self) -> Ties:
        return ties_of(self.model)

    @property
    def names(self) -> Collection[str]:
        return self.modules

    @property
    def tensors(self) -> Collection[str]:
        return tensors_in(self.modules)

    @property
    def adaptable(self) -> Adaptable:
        return adaptable_of(self.modules)

    def locate(self, names: Iterable[str]) -> Mapping[str, str]:
        tensors = self.tensors

        def there(name: str) -> bool:
            # for a module without such a parameter, the layer raises the error that gives the reason
            return name in tensors or (name.endswith(".weight") and name.removesuffix(".weight") in self.modules)

        wanted = list(names)
        if all(map(there, wanted)):
            return dict(zip(wanted, wanted, strict=True))
        inner: Any = inner_model(self.model)
        renamed = names_in_model(inner)

        def called(name: str) -> set[str]:
            return {n for n in ({name} if there(name) else {renamed(name)}) if there(n)}

        return find_names(wanted, called, layouts_of(inner))

    def meanings(self, names: Iterable[str]) -> Mapping[str, Meaning]:
        paths = (path for path, module in self.modules.items() if module._parameters.get("weight") is not None)
        return ImageNames(paths, encoder=is_encoder(inner_model(self.model))).meanings(names)

    def layer(self, name: str) -> LayerInfo:
        layer, tensor = self.at(name), self.tensor(name)
        if tensor is not None and not is_lazy(tensor) and 0 in self.shape(name):  # `read` refuses a lazy layer
            raise not_gathered(StateError, "the model's weight", GATHER_MODEL, module=layer.path)
        config: Any = getattr(inner_model(self.model), "config", None)
        idle = is_idle(self.modules, layer.path, quantised=hasattr(config, "_is_quantized"))
        kind = None if idle else layer.kind
        return LayerInfo(kind, layer.read()[1], id(layer.module), idle, layer.kernel)

    def is_quantised(self, name: str) -> bool:
        path, _, local = name.rpartition(".")
        return local == "weight" and path in self.modules and self.at(name).quantised

    def in_bitsandbytes(self, name: str) -> bool:
        """Whether the tensor is the weight of a linear layer of bitsandbytes, quantised or not."""
        path, _, local = name.rpartition(".")
        module = self.modules.get(path)
        return local == "weight" and isinstance(module, nn.Linear) and self.at(name).bitsandbytes is not None

    def shape(self, name: str) -> tuple[int, ...]:
        if self.is_quantised(name):
            return self.at(name).read()[1].shape
        tensor = self.tensor(name)
        return () if tensor is None else tuple(tensor.shape)

    def vocabulary(self, brought: Mapping[str, tuple[int, ...]]) -> Vocabulary | None:
        inner: Any = inner_model(self.model)
        if not (hasattr(inner, "resize_token_embeddings") and hasattr(type(inner), "_from_config")):
            return None

        def make(vocabulary: Vocabulary | None) -> Any:
            config = copy.deepcopy(inner.config)
            for part, name, value in fields_in(config, vocabulary):
                setattr(part, name, value)
            with quiet(), torch.device("meta"):
                return type(inner)._from_config(config)

        def held(name: str) -> tuple[int, ...] | None:
            return self.shape(name) or None

        return vocabulary_of(brought, self.shape, partial(resized, make, held))

    def weight(self, name: str, home: WeightFormat) -> EncodedWeight | None:  # noqa: ARG002 - a live weight has its own format
        path = name.removesuffix(".weight")
        return self.at(name).read()[0] if path in self.modules else None

    def tensor(self, name: str) -> Tensor | None:
        path, _, local = name.rpartition(".")
        module = self.modules.get(path)
        return None if module is None else module._parameters.get(local, module._buffers.get(local))

    def at(self, name: str) -> Layer:
        """The layer whose weight is the tensor ``name``."""
        path = name.removesuffix(".weight")
        return Layer(path, self.modules[path])
