"""A checkpoint's folder as a :class:`~oftsurgery.stores.store.Store`: the model that transformers would load, read weight
by weight, without building the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from oftsurgery.adapters.targets import Adaptable
from oftsurgery.dtypes import DENSE, DTYPES, FLOATS
from oftsurgery.errors import FormatError, printable
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.formats import checkpoint_tensors, codecs
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import record_beside

from .adaptable import adaptable_of
from .conversion import Unit, check_known
from .idle import is_idle
from .image_models import is_of_diffusers
from .image_names import ImageNames
from .layers import Layer
from .layouts import find_names
from .meaning import Meaning
from .naming import architecture_of, locate
from .resizing import resized
from .single_file import SingleFileNames
from .skeleton import skeleton
from .store import LayerInfo
from .ties import Ties
from .vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from .new_head import NewHead


@dataclass(frozen=True)
class Quantization:
    """How a plain source is quantised before the fold, as bitsandbytes' loading did in training.

    Attributes:
        codec: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        double_quant: quantise the 4-bit statistics too.
        compute_dtype: compute dtype of the live 4-bit layers, for the config alone: no stored byte depends on it. None: the dtype
            in which the model is loaded, since bitsandbytes is slow where the two differ.
        skip: modules to leave unquantised (``llm_int8_skip_modules``, read as transformers reads them); None for
            transformers' own choice.
        dtype: dtype in which the model was loaded; None for the config's dtype, which transformers 5 uses by default.
    """

    codec: str
    double_quant: bool = False
    compute_dtype: torch.dtype | None = None
    skip: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None


class FolderStore:
    """The model in ``source``, as if it were loaded with ``quantization`` (None: as it is stored).

    Tensors have the names of the model's class; tensors that transformers converts have the checkpoint's own names too.

    Attributes:
        config: the ``config.json`` of the model; an adapter's head may have changed the file's contents.
        entries: the checkpoint's tensors that the model has.
        added: ``{name: shape}`` of the tensors that an adapter brings to the model.
        architecture: the names by the model's class.
    """

    what = "checkpoint"

    def __init__(
        self, source: Checkpoint, quantization: Quantization | None = None, head: NewHead | None = None
    ) -> None:
        q = quantization
        dtype = q.dtype if q is not None and q.dtype is not None else load_dtype(source)
        if q is not None and q.compute_dtype is None:
            q = replace(q, compute_dtype=dtype if dtype in DENSE.values() else torch.float32)
        self.source = source
        self.quantization = q
        self.config = source.config if head is None else head.config
        self.added: Mapping[str, tuple[int, ...]] = {} if head is None else head.added
        dropped = frozenset() if head is None else head.dropped
        self.entries = {n: e for n, e in source.entries.items() if not {n, checkpoint_tensors.owner_of(n)} & dropped}
        self.architecture = architecture_of(
            self.config,
            {name: e.shape for name, e in self.entries.items()},
            dtype=dtype,
            skip=q.skip if q is not None else None,
        )

    @cached_property
    def record(self) -> FoldRecord | None:
        return record_beside(self.source)

    @property
    def ties(self) -> Ties:
        return self.architecture.ties

    @cached_property
    def names(self) -> Collection[str]:
        a = self.architecture
        # the modules of the class, further weights of the files, and weights that transformers converts
        weights = (n.removesuffix(".weight") for n in (*a.renamed.values(), *a.units) if n.endswith(".weight"))
        return dict.fromkeys([*a.modules, *weights])

    @property
    def adaptable(self) -> Adaptable:
        if self.architecture.modules:
            return adaptable_of(self.architecture.modules)
        weights = tuple(n.removesuffix(".weight") for n in self.tensors if n.endswith(".weight") and self.is_weight(n))
        return Adaptable(linears=(), others=weights, holders=tuple(n.rpartition(".")[0] for n in self.tensors))

    def locate(self, names: Iterable[str]) -> Mapping[str, str]:
        wanted = list(names)
        found = locate(wanted, self.architecture)
        if self.added:
            rest = [name for name in wanted if name not in found]
            found |= find_names(rest, lambda name: {name} & self.added.keys(), self.architecture.layouts)
        self._check_not_merged(n.removesuffix(".weight") for n in wanted if n not in found)
        return found

    def meanings(self, names: Iterable[str]) -> Mapping[str, Meaning]:
        return self._tool_names.meanings(names)

    @cached_property
    def _tool_names(self) -> ImageNames | SingleFileNames:
        """The names of the modules with weights, as image tools write them."""
        paths = [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]
        if not self.architecture.modules:
            return SingleFileNames(paths)
        return ImageNames(paths, encoder=not is_of_diffusers(self.config))

    def _check_not_merged(self, paths: Iterable[str]) -> None:
        """Refuse an adapter on a weight that transformers merges from several tensors of the checkpoint (fused experts):
        no single module can take the fold.
        """
        made = self.architecture.made
        for path in paths:
            whole = next((m for m in sorted(made) if path in (m, m.rpartition(".")[0])), None)
            if whole is not None and not whole.endswith((".weight", ".bias")):
                parts = sorted(made[whole].stored)
                raise FormatError(
                    f"the model merges this weight from {len(parts)} tensors of the checkpoint ({printable(parts[0])} …)",
                    module=path,
                    remedy="fold an adapter on those tensors, one by one; or load the model with transformers, fold it in memory, and save the model",
                )

    @cached_property
    def tensors(self) -> Collection[str]:
        """Names of all tensors of the model that the checkpoint gives, without companions of quantised weights; tensors of
        unknown units have the checkpoint's own names.
        """
        a = self.architecture
        unknown = [n for n, unit in a.units.items() if not unit.model]
        return dict.fromkeys(
            n
            for n in [*a.stored, *a.made, *a.tied, *unknown]
            if not checkpoint_tensors.is_companion(self.holder(n), self.source.entries)
        )

    def is_weight(self, name: str) -> bool:
        """Whether the tensor is a weight, stored in any format, that can be rotated."""
        holder = self.holder(name)
        if self.unit(name) is not None:
            return len(self.shape(name)) == 2
        if holder not in self.source.entries:
            return False
        if self.holds_quantised(holder):
            return True
        entry = self.source.entries[holder]
        return len(entry.shape) in (2, 4) and DTYPES[entry.dtype] in FLOATS

    def is_quantised(self, name: str) -> bool:
        return self.holds_quantised(self.holder(name))

    def holds_quantised(self, stored: str) -> bool:
        """Whether a tensor of the checkpoint is a quantised weight; integers without statistics are not such a weight."""
        return stored.endswith("weight") and len(checkpoint_tensors.companion_names(stored, self.source.entries)) > 1

    def is_embedding(self, name: str) -> bool:
        """Whether the weight is an embedding's."""
        return isinstance(self.architecture.modules.get(name.removesuffix(".weight")), nn.Embedding)

    # --- where tensors are ---

    def holder(self, name: str) -> str:
        """The name of the stored tensor, or of the unit's tensor, that holds ``name`` itself or by a tie."""
        name = self.architecture.tied.get(name, name)
        return self.architecture.stored.get(name, (name,))[0]

    def unit(self, name: str) -> Unit | None:
        """The unit that makes the tensor ``name``, or None for a tensor that is stored by itself."""
        return self.architecture.made.get(self.architecture.tied.get(name, name))

    def layer(self, name: str) -> LayerInfo:
        path = name.removesuffix(".weight")
        modules = self.architecture.modules
        unit = self.unit(name)
        if unit is not None:
            check_known(unit, path, back=True)
        format_, shape = self.loaded(name), self.shape(name)
        if path in modules:
            quantised = self.quantization is not None or "quantization_config" in self.source.config
            idle = is_idle(modules, path, quantised=quantised)
            layer = Layer(path, modules[path])
            return LayerInfo(None if idle else layer.kind, format_, id(modules[path]), idle, layer.kernel)
        if name in self.architecture.units and len(shape) != 2:
            raise FormatError(
                "the checkpoint holds this weight fused with other weights",
                module=path,
                tensor=name,
                shape=shape,
                remedy="load the model with transformers, fold it in memory, and save it",
            )
        return LayerInfo(None, format_, hash(name), kernel=tuple(shape[2:]) if len(shape) == 4 else ())

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.added:
            return self.added[name]
        unit = self.unit(name)
        if unit is not None:
            return unit.model[self.architecture.tied.get(name, name)]
        return self.stored(name).shape if self.is_quantised(name) else self.source.entries[self.holder(name)].shape

    def vocabulary(self, brought: Mapping[str, tuple[int, ...]]) -> Vocabulary | None:
        def make(vocabulary: Vocabulary | None) -> Any:
            config = self.config if vocabulary is None else vocabulary.in_config(self.config)
            return skeleton(config, torch.float32, len(self.entries))

        def held(name: str) -> tuple[int, ...] | None:
            return self.shape(name) if name in self.tensors and self.unit(name) is None else None

        return vocabulary_of(brought, self.shape, partial(resized, make, held))

    # --- formats and values ---

    def stored(self, name: str) -> WeightFormat:
        """A weight's stored format, in the canonical shape. Only a 4-bit state's JSON is read."""
        unit = self.unit(name)
        if unit is not None:
            return WeightFormat("dense", self.shape(name), self.dtype(next(iter(unit.stored))))
        holder, entries = self.holder(name), self.source.entries
        dtype, shape = self.dtype(holder), entries[holder].shape
        if not checkpoint_tensors.format_by_names(holder, entries, dtype).quantised:
            turned = shape[::-1] if holder in self.architecture.transposed else shape
            shape = (turned[0], math.prod(turned[1:])) if len(turned) == 4 else turned
        return checkpoint_tensors.stored_format(holder, entries, self.source.read, shape, dtype)

    def loaded(self, name: str) -> WeightFormat:
        """A weight's format after the model is loaded."""
        stored, q = self.stored(name), self.quantization
        if q is None or stored.quantised:
            return stored
        dtype = self.loaded_dtype(name) or stored.dtype
        if self.quantises(name):
            return FORMATS[q.codec].loaded_as(stored.shape, dtype, q.double_quant)
        return replace(stored, dtype=dtype)

    def quantises(self, name: str) -> bool:
        """Whether loading with ``quantization`` quantises the weight ``name``."""
        linears = self.architecture.linears
        return self.quantization is not None and linears is not None and name in linears

    def loaded_dtype(self, name: str) -> torch.dtype | None:
        """The dtype of the plain tensor ``name`` after loading; None without quantised loading, or for integers."""
        if self.quantization is None:
            return None
        return self.architecture.loaded.get(name)

    def dtype(self, stored: str) -> torch.dtype:
        """The dtype of a tensor of the checkpoint."""
        return DTYPES[self.source.entries[stored].dtype]

    def weight(self, name: str, home: WeightFormat) -> EncodedWeight | None:
        holder = self.holder(name)
        if self.unit(name) is not None:
            found = codecs.dense(self._plain(name))
        elif holder in self.source.entries:
            found = load_weight(self.source, holder, transposed=holder in self.architecture.transposed)
        else:
            return None
        if self.quantization is not None:
            home = self.loaded(name)
        elif found.format.quantised or not home.quantised:
            home = found.format
        return found if found.format == home else codecs.as_loaded(found, home)

    def tensor(self, name: str) -> Tensor | None:
        found = locate([name], self.architecture).get(name)
        return None if found is None else self._plain(found)

    def _plain(self, name: str) -> Tensor:
        unit = self.unit(name)
        if unit is None:
            return self.source.read(self.holder(name))
        return self.read_unit(unit)[self.architecture.tied.get(name, name)]

    def read_unit(self, unit: Unit) -> dict[str, Tensor]:
        """The model's tensors that a unit makes."""
        return unit.load({name: self.source.read(name) for name in unit.stored})


def holds_quantised_weights(source: Checkpoint) -> bool:
    """Whether the checkpoint holds quantised weights, or its config says so."""
    return source.config.get("quantization_config") is not None or has_quantised_weights(source)


def has_quantised_weights(source: Checkpoint) -> bool:
    """Whether the checkpoint holds quantised weights, whatever its config says."""
    return any(
        name.endswith("weight") and len(checkpoint_tensors.companion_names(name, source.entries)) > 1
        for name in source.entries
    )


def load_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype in which the checkpoint is loaded. transformers 5 takes the config's dtype by default, or else the dtype of the first
    float tensor. The configs of diffusers name no dtype, and its trainers load a model as it is stored: the dtype is that of the
    most bytes of float tensors, without the statistics of quantised weights.
    """
    if is_of_diffusers(source.config):
        held: Counter[torch.dtype] = Counter()
        for name, entry in source.entries.items():
            if DTYPES[entry.dtype] in FLOATS and not checkpoint_tensors.is_companion(name, source.entries):
                held[DTYPES[entry.dtype]] += entry.nbytes
        return held.most_common(1)[0][0] if held else torch.float32
    named = source.config.get("dtype", source.config.get("torch_dtype"))
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(dtype, torch.dtype):
        return dtype
    return next((DTYPES[e.dtype] for e in source.entries.values() if DTYPES[e.dtype] in FLOATS), torch.float32)


def load_weight(source: Checkpoint, name: str, *, transposed: bool) -> EncodedWeight:
    """A stored weight with its companions, in the canonical shape; a ``transposed`` plain weight is held ``(in, out)``."""
    entry = source.entries[name]
    encoded = checkpoint_tensors.read_weight(name, source.entries, source.read, entry.shape, DTYPES[entry.dtype])
    return encoded if encoded.format.quantised else canonical(encoded.tensors["weight"], transposed=transposed)


def canonical(weight: Tensor, *, transposed: bool) -> EncodedWeight:
    """A plain weight as ``(out, in)``."""
    return codecs.dense(
        weight.t() if transposed else weight.reshape(weight.shape[0], -1) if weight.ndim == 4 else weight
    )
