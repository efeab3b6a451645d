"""A head that an adapter brings to a checkpoint of another class: peft saves a classifier's head beside the rotations, and the
base holds another head, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import MatchError, OFTSurgeryError, printable
from oftsurgery.formats.checkpoint_tensors import is_companion

from .folder import FolderStore
from .layouts import find_names
from .naming import names_of
from .skeleton import skeleton
from .vocabulary import Vocabulary

Shape = tuple[int, ...]

#: peft's ``task_type`` → transformers' table of the classes with a head for the task
_TABLES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@dataclass(frozen=True, eq=False)
class NewHead:
    """The changes of a checkpoint that takes an adapter's head.

    Attributes:
        config: the ``config.json`` of the class with the head.
        added: ``{name of a tensor of the model: shape}`` of the tensors that the adapter brings and the checkpoint lacks.
        dropped: the checkpoint's names of the tensors of its own head.
    """

    config: Mapping[str, Any]
    added: Mapping[str, Shape]
    dropped: frozenset[str]


def new_head(store: FolderStore, adapters: Iterable[OFTAdapter]) -> NewHead | None:
    """The head that ``adapters`` bring, where the checkpoint's own class has no place for it; None elsewhere.

    Raises:
        MatchError: the class with the head has tensors that neither the checkpoint nor the adapter holds.
    """
    given = list(adapters)
    saved = {name: tuple(tensor.shape) for adapter in given for name, tensor in adapter.saved.items()}
    found = store.locate(saved) if saved else {}
    vocabulary = store.vocabulary({found[n]: saved[n] for n in found})
    shapes = {} if vocabulary is None else vocabulary.shapes
    fits = all(n in found and shapes.get(found[n], store.shape(found[n])) == saved[n] for n in saved)
    if store.architecture.name is None or fits:
        return None
    for name in dict.fromkeys(filter(None, (_class_of(adapter, store.source.config) for adapter in given))):
        # the number of labels is a dimension of one of the head's tensors
        for labels in (None, *sorted({shape[0] for shape in saved.values() if shape})):
            headed = _Headed.built(store, name, labels, vocabulary)
            if headed is not None and headed.takes(saved):
                return headed.head(saved)
    return None


def _class_of(adapter: OFTAdapter, config: Mapping[str, Any]) -> str | None:
    """The name of the class that the adapter was trained on; None if the adapter's config does not name the class."""
    from transformers.models.auto import modeling_auto

    mapping = adapter.config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    table = getattr(modeling_auto, _TABLES.get(str(adapter.config.get("task_type")), ""), {})
    found = named if isinstance(named, str) else table.get(config.get("model_type"))
    return found if isinstance(found, str) else None


class _Headed:
    """A checkpoint in the class with the head, with the number of tokens that the adapter brings."""

    def __init__(self, store: FolderStore, config: Mapping[str, Any], model: Any, resized: Mapping[str, Shape]) -> None:
        entries = store.source.entries
        self.resized = resized
        self.store, self.config, self.model = store, config, model
        self.stored = {name: entry.shape for name, entry in entries.items() if not is_companion(name, entries)}
        self.names = names_of(model, self.stored)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    @classmethod
    def built(
        cls, store: FolderStore, name: str, labels: int | None, vocabulary: Vocabulary | None = None
    ) -> _Headed | None:
        """The checkpoint in transformers' class ``name``; None for an unknown class, or if the class refuses the config."""
        import transformers

        known = getattr(transformers, name, None)
        if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
            return None
        config = {**store.source.config, "architectures": [name]}
        if labels is not None:
            config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(labels)}}
            config |= {"label2id": {f"LABEL_{i}": i for i in range(labels)}}
        try:
            fields = config if vocabulary is None else vocabulary.in_config(config)
            model = skeleton(fields, torch.float32, len(store.source.entries))
        except OFTSurgeryError:  # the class may refuse a number of labels
            return None
        resized = {} if vocabulary is None else vocabulary.shapes
        return None if model is None else cls(store, config, model, resized)

    def _located(self, saved: Mapping[str, Shape]) -> Mapping[str, str]:
        """``{name of the adapter's own tensor: name in the class with the head}``."""
        return find_names(saved, lambda name: {name} & self.shapes.keys(), self.names.layouts)

    def takes(self, saved: Mapping[str, Shape]) -> bool:
        """Whether the class has a place for every one of an adapter's own tensors."""
        found = self._located(saved)
        return all(name in found and self.shapes[found[name]] == shape for name, shape in saved.items())

    def head(self, saved: Mapping[str, Shape]) -> NewHead:
        """The changes by which the checkpoint takes the head.

        Raises:
            MatchError: the class has tensors that neither the checkpoint nor the adapter holds.
        """
        own, brought = self.store.architecture, set(self._located(saved).values())
        fits = {n: target for n, target in self.names.renamed.items() if self._fits(n, target)}
        held = {*fits.values(), *self.names.made, *self.names.tied}
        lost = [n for n in self.shapes if n not in held | brought and not self._made_up(n)]
        if lost:
            raise MatchError(
                f"the adapter brings a head of {self.names.name} to a checkpoint of {own.name}, and {len(lost)} tensors of that class "
                "are neither in the checkpoint nor in the adapter",
                tensor=lost[0],
                remedy=f"train with {printable(lost[0].rpartition('.')[0])!r} in modules_to_save, or give a base of the class {self.names.name}",
            )
        # tensors that only the checkpoint's own class has are dropped; tensors that neither class has stay unchanged
        other = {n for n in self.names.renamed if n not in fits and own.renamed[n] in self._own_tensors()}
        return NewHead(self.config, {n: self.shapes[n] for n in sorted(brought - held)}, frozenset(other))

    def _fits(self, name: str, target: str) -> bool:
        """Whether the stored tensor ``name``, plain or quantised, is the model's ``target``."""
        if target not in self.shapes:
            return name in self.names.units
        shape = self.shapes[target]
        if self.resized.get(self.store.architecture.renamed[name]) == shape:
            return True  # the adapter brings the tensor with other rows
        conv1d = name in self.names.transposed
        return name in self.names.units or self._stored_shape(name) in (shape, shape[::-1] if conv1d else shape)

    def _stored_shape(self, name: str) -> Shape:
        if self.store.holds_quantised(name):
            return self.store.stored(self.store.architecture.renamed[name]).shape
        return self.stored[name]

    def _own_tensors(self) -> set[str]:
        """Names of the tensors of the checkpoint's own class."""
        modules = self.store.architecture.modules.items()
        return {f"{p}.{n}".lstrip(".") for p, m in modules for n in (*m._parameters, *m._buffers)}

    def _made_up(self, name: str) -> bool:
        """Whether transformers says that it computes the tensor."""
        return any(re.search(pattern, name) for pattern in self.model._keys_to_ignore_on_load_missing or ())
