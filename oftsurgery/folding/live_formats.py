"""A live model's tensors take the formats of a :class:`~oftsurgery.folding.target.Target`, and the model then says so."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtype_names import name_of
from oftsurgery.dtypes import FLOATS
from oftsurgery.errors import StateError, module_in_errors
from oftsurgery.formats import codecs
from oftsurgery.formats.all_formats import format_of_parameter
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.records.record import FoldRecord
from oftsurgery.stores.folder import Quantization
from oftsurgery.stores.layers import Layer, ReplacedWeight, Undo
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.live_quantisation import layer_settings, settings_in, state_dtype, state_quantisation
from oftsurgery.stores.modules import distinct, inner_model, tensors_in
from oftsurgery.stores.naming import quantised_with
from oftsurgery.stores.new_layers import holds, layer_with
from oftsurgery.weights.fold import fold_encoded

from .plan import FoldPlan
from .quantised_first import facts_of_quantization
from .target import Target


class LiveFormats:
    """The formats that a fold gives to the tensors of a live model.

    Attributes:
        target: the formats.
        made: names of the plain weights that become quantised: those that transformers' loading would quantise, in a model
            without a quantised weight.
        converts: whether a tensor changes its format, or (``dequantised``) has changed it: plain layers took the places of another
            package's layers.
        quantised: whether the model held quantised weights before the fold.
        kept_plain: whether a weight that transformers' loading would quantise stays plain, since an adapter brings its values.

    Raises:
        StateError: a tensor is offloaded or not loaded, or transformers does not know the class of a model that is to be
            quantised.
    """

    def __init__(
        self, store: LiveStore, format: str, double_quant: bool, journal: list[Undo], *, dequantised: bool = False
    ) -> None:
        self.store, self.journal = store, journal
        self.target = Target(format, double_quant, dtype_of(store))
        self.made: frozenset[str] = frozenset()
        self.converts, self.quantised, self.kept_plain = dequantised, False, False
        if format == "same":
            return
        layers = [Layer(path, module) for path, module in distinct(store.modules).items()]
        _check_loaded(store, format)
        self.quantised = any(layer.quantised for layer in layers)
        if self.target.codec is not None and not self.quantised:
            self.made = _made(store)
        homes = {f"{layer.path}.weight": layer.read()[1] for layer in layers if layer.quantised}
        self.converts |= bool(self.made) or any(self._into(name, home) != home for name, home in homes.items())
        self.converts |= any(self.target.plain(t.dtype) != t.dtype for t in self._plain().values())

    def planned(self, plan: FoldPlan) -> FoldPlan:
        """The plan whose rotated weights are stored in the new formats. A tensor that takes an adapter's own values stays
        plain.
        """
        rotated = {change.name for change in plan.rotate}
        own = {place for change in plan.replace for place in change.places} - rotated
        self.kept_plain = bool(own & self.made or plan.dequantised)
        self.made -= own
        return replace(plan, rotate=tuple(replace(r, format=self._into(r.name, r.format)) for r in plan.rotate))

    def put(self, layer: Layer, new: EncodedWeight, *, park: bool) -> nn.Module:
        """Put a weight in its layer's place, in a new layer where the layer's class does not hold the format.

        Args:
            park: as for :meth:`Layer.write`.

        Returns:
            the layer that now holds the weight.
        """
        if holds(layer, new.format):
            layer.write(new, park=park, journal=self.journal)
            return layer.module
        made = layer_with(layer, new, layer_settings(self.store.model, self.target.dtype))
        old: Any = layer.module
        for path in [path for path, module in self.store.modules.items() if module is old]:
            put_module(self.store.modules, path, made, self.journal)
        if park:
            replaced = ReplacedWeight.of(old)
            self.journal.append(partial(replaced.move, old.weight.device))
            replaced.move(torch.device("cpu"))
        return made

    def convert_rest(self, done: Collection[nn.Module]) -> None:
        """Give the new formats to all tensors but the weights of the layers ``done``, and make the model say so."""
        if not self.converts:
            return
        for path, module in distinct(self.store.modules).items():
            layer, name = Layer(path, module), f"{path}.weight"
            if module not in done and (name in self.made or layer.quantised):
                with module_in_errors(path):
                    self._convert(layer, name)
        for name, tensor in self._plain().items():
            if tensor.dtype != self.target.plain(tensor.dtype):
                self._cast(name, tensor)
        if self.target.dense is not None:
            state_quantisation(self.store.model, None, self.journal)
            state_dtype(self.store.model, self.target.dense, self.journal)
        else:
            state_quantisation(self.store.model, self._quantization(), self.journal)

    def stated(self, record: FoldRecord) -> FoldRecord:
        """The record with the facts about the formats, where the fold changes the formats."""
        if not self.converts:
            return record
        quantised = facts_of_quantization(self._quantization() if self.made else None)
        into = "quantized" if self.quantised else "original"
        loaded = name_of(self.target.dtype)
        return replace(record, base={"fold_into": into, "format": self.target.format, "loaded": loaded, **quantised})

    def _into(self, name: str, home: WeightFormat) -> WeightFormat:
        return self.target.weight(home, quantises=name in self.made)

    def _convert(self, layer: Layer, name: str) -> None:
        before, home = layer.read()
        into = self._into(name, home)
        if into == home:
            return
        quantised = home.quantised
        new = fold_encoded(before, (), into, "nearest").encoded if quantised else codecs.as_loaded(before, into)
        self.put(layer, new, park=True)

    def _plain(self) -> dict[str, Tensor]:
        """The plain tensors of floats that a checkpoint of the model holds; tied tensors under each name."""
        modules = self.store.modules
        found = {}
        for name, tensor in tensors_in(modules).items():
            path, _, local = name.rpartition(".")
            module = modules[path]
            if tensor.dtype not in FLOATS or local in module._non_persistent_buffers_set:
                continue
            if not (local == "weight" and Layer(path, module).quantised):
                found[name] = tensor
        return found

    def _cast(self, name: str, tensor: Tensor) -> None:
        """Cast one tensor in all its places."""
        if tensors_in(self.store.modules)[name] is not tensor:
            return  # cast under another of its names
        with module_in_errors(name.rpartition(".")[0]):
            into = WeightFormat("dense", tuple(tensor.shape), self.target.plain(tensor.dtype))
            data = codecs.encode(tensor.detach(), into).tensors["weight"]
        new = format_of_parameter(tensor).plain_parameter(tensor, data) if isinstance(tensor, nn.Parameter) else data
        for other, there in tensors_in(self.store.modules).items():
            if there is tensor:
                put_tensor(self.store.modules, other, new, self.journal)

    def _quantization(self) -> Quantization:
        """The quantisation of the model after the fold."""
        target = self.target
        assert target.codec is not None  # noqa: S101 - the target is quantised
        compute = layer_settings(self.store.model, target.dtype).compute_dtype
        skip = None
        if self.kept_plain or not (
            self.made or settings_in(self.store.model)
        ):  # transformers' own choice is another one
            skip = tuple(p for p, m in self.store.modules.items() if type(m) is nn.Linear)
        return Quantization(target.codec, target.double_quant, compute, skip)


def _check_loaded(store: LiveStore, format: str) -> None:
    lost = next((name for name, tensor in tensors_in(store.modules).items() if tensor.is_meta), None)
    if lost is not None:
        raise StateError(
            f"the tensor is offloaded or not loaded, and cannot take the format {format}",
            tensor=lost,
            remedy="load the whole model on devices, or fold the checkpoint on disk (oftsurgery.fold_checkpoint, format=…)",
        )


def _made(store: LiveStore) -> frozenset[str]:
    """The names of the weights that transformers' loading would quantise."""
    inner: Any = inner_model(store.model)
    if not hasattr(inner, "all_tied_weights_keys"):
        raise StateError(
            f"a {type(inner).__name__} is no model of transformers, whose class decides which modules bitsandbytes loading quantises",
            remedy="put bitsandbytes' layers into the model, and fold in their format (format='same'); or choose format='bf16'",
        )
    return quantised_with(inner, store.modules, None)


def dtype_of(store: LiveStore) -> torch.dtype:
    """The dtype of the model's plain parameters."""
    found = (t for t in tensors_in(store.modules).values() if type(t) is nn.Parameter and t.is_floating_point())
    return next((t.dtype for t in found), torch.float32)


def put_module(modules: dict[str, nn.Module], path: str, module: nn.Module, journal: list[Undo]) -> None:
    parent, _, name = path.rpartition(".")
    slots = inner_model(modules[parent])._modules
    journal.append(partial(slots.__setitem__, name, slots[name]))
    slots[name] = modules[path] = module


def put_tensor(modules: dict[str, nn.Module], name: str, tensor: Any, journal: list[Undo]) -> None:
    path, _, local = name.rpartition(".")
    module = modules[path]
    slots: dict[str, Any] = module._parameters if local in module._parameters else module._buffers
    journal.append(partial(slots.__setitem__, local, slots[local]))
    slots[local] = tensor
