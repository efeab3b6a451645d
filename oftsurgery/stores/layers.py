"""Layers of a live model: find out how a layer's weight is stored, read the weight, and put another in its place.

One :class:`Layer` wraps a module and knows its kind (plain, bitsandbytes 4-bit or 8-bit, GPT-2's ``Conv1D``,
convolution, embedding) and where its weight lives (the module, its int8 state, or accelerate's offload map). Weights
are read and written as :class:`~oftsurgery.EncodedWeight` of the canonical two-dimensional shape: ``(out, in)``, or
``(tokens, features)``. The code here does no arithmetic.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oftsurgery.errors import FormatError, StateError
from oftsurgery.formats import codecs
from oftsurgery.formats.all_formats import FORMATS, format_of_parameter
from oftsurgery.formats.base import Format
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat

from .modules import distinct, inner_model, modules_of

Kind = Literal["linear", "embedding", "conv"]

Undo = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Layer:
    """One foldable module of a model, at ``path``."""

    path: str
    module: nn.Module

    # --- kind and format ---

    @property
    def kind(self) -> Kind:
        """The kind of the module. Raises FormatError for a module whose weight cannot be folded."""
        m = self.module
        if isinstance(m, nn.Embedding):
            return "embedding"
        if isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear):
            message = "nn.MultiheadAttention reads this weight and never calls the layer, so a live adapter does nothing, but a fold would"
            remedy = "leave the layer out of the adapter (`exclude_modules`)"
        elif isinstance(m, nn.Conv2d) and m.groups != 1:
            message = f"a grouped convolution cannot be folded, and this convolution has {m.groups} groups"
            remedy = "train the adapter without this convolution (`exclude_modules`)"
        elif isinstance(m, nn.Conv2d):
            return "conv"
        elif isinstance(m, nn.Linear) or self._is_conv1d:
            return "linear"
        else:
            message = f"a {type(m).__name__} has no weight that oftsurgery can rotate"
            remedy = "rotate torch's Linear, Embedding and Conv2d, transformers' Conv1D, and bitsandbytes' 4-bit and 8-bit layers alone"
        raise FormatError(message, module=self.path, remedy=remedy)

    @property
    def kernel(self) -> tuple[int, ...]:
        """``(kh, kw)`` of a convolution, else empty."""
        return tuple(self.module.kernel_size) if isinstance(self.module, nn.Conv2d) else ()

    @property
    def _is_conv1d(self) -> bool:
        classes = type(self.module).__mro__
        return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in classes)

    @property
    def bitsandbytes(self) -> Format | None:
        """The format with a bitsandbytes class of the module or its weight, quantised or not; None for other modules."""
        return next((kind for kind in FORMATS.values() if kind.holds_module(self.module)), None)

    @property
    def quantised(self) -> bool:
        """Whether bitsandbytes stores the weight in 4 or 8 bits."""
        bnb = self.bitsandbytes
        return bnb is not None and bnb.is_quantised(self.module._parameters.get("weight"))

    @property
    def repacked(self) -> bool:
        """Whether a CPU forward has repacked the 4-bit weight, even if the weight was unpacked again."""
        state = getattr(self.module._parameters.get("weight"), "quant_state", None)
        return hasattr(state, "packing_format_for_cpu")

    # --- where its tensors are ---

    def _weight(self) -> Tensor:
        module, trouble = self.module, ("", "")
        weight: Any = module._parameters.get("weight")
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            how = "call remove_parametrizations(module, 'weight') first"
            trouble = ("the weight is parametrised (torch.nn.utils.parametrize)", how)
        elif weight is None:
            trouble = (
                "the weight is no parameter of the module itself: the module computes it from others (weight_norm, spectral_norm, pruning), or has none",
                "make the weight a parameter first: remove_weight_norm, remove_spectral_norm, prune.remove",
            )
        elif nn.parameter.is_lazy(weight):
            trouble = ("the module is lazy and has no weight yet", "run one forward first")
        elif not isinstance(weight, Tensor):
            message = f"the module's weight is a {type(weight).__name__}, not a tensor"
            raise FormatError(message, module=self.path, remedy="give a torch model")
        elif weight.is_meta and _offload_hook(module) is None:
            trouble = ("the weight is on the meta device and has no values", "load the model's weights first")
        elif type(weight.data).__name__ == "DTensor":
            trouble = ("the weight is sharded over processes (DTensor)", "gather the model in one process first")
        if trouble[0]:
            raise StateError(trouble[0], module=self.path, remedy=trouble[1])
        return offloaded(module, "weight") if weight.is_meta else weight

    def read(self) -> tuple[EncodedWeight, WeightFormat]:
        """The stored weight, which shares the module's tensors, and the format in which a new weight is stored.

        The two formats differ if a CPU forward repacked a 4-bit layer: the repacked weight has lost the double
        quantisation that the layer may have had.

        Raises:
            FormatError: the storage is unknown, or statistics are missing.
            StateError: the weight is not loaded, sharded, parametrised, or not quantised yet.
        """
        weight = self._weight()
        bnb, hook = self.bitsandbytes, _offload_hook(self.module)
        offloaded = None if hook is None else hook.weights_map
        found = None if bnb is None else bnb.read_live(self.module, weight, offloaded, self.path)
        if found is not None:
            return found
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            message = f"a {type(self.module).__name__} with a weight of {weight.dtype} is stored in a way that oftsurgery does not know"
            remedy, shape = "load the model unquantised or with bitsandbytes", tuple(weight.shape)
            raise FormatError(message, module=self.path, shape=shape, remedy=remedy)
        encoded = codecs.dense(self._canonical(weight.detach()))
        return encoded, encoded.format

    def _canonical(self, weight: Tensor) -> Tensor:
        if self._is_conv1d:
            return weight.t()  # GPT-2's Conv1D holds (in, out)
        return weight.reshape(weight.shape[0], -1) if weight.ndim == 4 else weight

    def _stored(self, weight: Tensor) -> Tensor:
        """The mirror of :meth:`_canonical`."""
        if self._is_conv1d:
            return weight.t().contiguous()
        module = self.module
        if not isinstance(module, nn.Conv2d):
            return weight
        return weight.reshape(weight.shape[0], module.in_channels // module.groups, *module.kernel_size)

    # --- putting another weight in its place ---

    def write(self, encoded: EncodedWeight, *, park: bool, journal: list[Undo] | None = None) -> ReplacedWeight:
        """Put ``encoded`` in place of the module's weight, as a new Parameter: modules that shared the old Parameter keep
        the old weight.

        Args:
            encoded: a weight of the canonical shape, on the module's device.
            park: move the replaced weight from its device to CPU memory until it is put back; not for a weight that other
                modules still use.
            journal: list that gets the undo step before anything changes, so that no interrupt comes between the two.

        Returns:
            the replaced weight, Parameter objects included.
        """
        module: Any = self.module
        replaced, hook = ReplacedWeight.of(module), _offload_hook(module)
        new: Any = None
        if hook is None:
            new = self._new_parameter(replaced.weight, encoded)
        else:
            replaced.overlay = ChainMap(self._for_offload(encoded), hook.weights_map)
        if journal is not None:
            journal.append(partial(replaced.put_back, module))
        try:
            if hook is not None:
                hook.weights_map = replaced.overlay
                return replaced
            module._parameters["weight"] = new
            for name in replaced.quantisation:
                # int8 gets None as in a freshly quantised layer, whose first forward fills the attributes;
                # has_fp16_weights keeps its last quantisation there as well
                setattr(replaced.quantisation_holder(module), name, getattr(new, "quant_state", None))
            if park:
                replaced.move(torch.device("cpu"))
        except BaseException:
            replaced.put_back(module)
            raise
        return replaced

    def _for_offload(self, encoded: EncodedWeight) -> dict[str, Tensor]:
        """The tensors that cover accelerate's own map, which reads the disk or a dict shared with other hooks."""
        tensors: dict[str, Tensor] = {k: t.cpu() for k, t in encoded.tensors.items()}
        return tensors if encoded.format.quantised else {"weight": self._stored(tensors["weight"])}

    def _new_parameter(self, old: Any, encoded: EncodedWeight) -> nn.Parameter:
        if encoded.format.quantised:
            return encoded.format.kind.parameter_of(encoded, old, self.module)
        return format_of_parameter(old).plain_parameter(old, self._stored(encoded.tensors["weight"]))


@dataclass(eq=False)
class ReplacedWeight:
    """The weight that :meth:`Layer.write` took out of a module: the whole Parameter, with all of its quantisation state.

    The object is data and no closure, so that a copy of a model that keeps the object has bytes of its own.

    Attributes:
        weight: the Parameter.
        quantisation: attributes that change with the Parameter: ``quant_state``, or ``CB`` and ``SCB`` of the int8 state.
        overlay: the new weight over accelerate's map of offloaded weights; with an overlay, only the map has changed.
    """

    weight: Any
    quantisation: dict[str, Any]
    overlay: ChainMap[str, Tensor] | None = None

    @classmethod
    def of(cls, module: Any) -> ReplacedWeight:
        quantisation = {}
        if module.__dict__.get("quant_state") is not None:
            quantisation = {"quant_state": module.quant_state}
        elif hasattr(getattr(module, "state", None), "SCB"):
            quantisation = {"CB": module.state.CB, "SCB": module.state.SCB}
        return cls(module._parameters["weight"], quantisation)

    def quantisation_holder(self, module: Any) -> Any:
        """The object that has the attributes of :attr:`quantisation`."""
        return module.state if "CB" in self.quantisation else module

    def move(self, device: torch.device) -> None:
        """Move the weight's bytes to a device."""
        if self.weight.device == device:
            return
        self.weight.data = self.weight.data.to(device)
        if getattr(self.weight, "CB", None) is not None:
            self.weight.CB = self.weight.data  # CB is another name of the same bytes
            self.weight.SCB = self.weight.SCB.to(device)
        for name, value in self.quantisation.items():
            if name == "CB" and self.weight.dtype == torch.int8:
                self.quantisation[name] = None if value is None else self.weight.data
            elif isinstance(value, Tensor):
                self.quantisation[name] = value.to(device)
        states = (self.quantisation.get("quant_state"), getattr(self.weight, "quant_state", None))
        for state in {id(s): s for s in states if s is not None}.values():
            state.to(device)

    def put_back(self, module: Any) -> None:
        """Undo the write, in the module or in its copy."""
        if self.overlay is not None:
            hook: Any = _offload_hook(module)
            if hook.weights_map is self.overlay:
                hook.weights_map = self.overlay.maps[1]
            return
        self.move(module._parameters["weight"].device)
        if getattr(self.weight, "module", None) is not None:
            self.weight.module = module  # a copied Params4bit still names the module that it was copied from
        module._parameters["weight"] = self.weight
        for name, value in self.quantisation.items():
            setattr(self.quantisation_holder(module), name, value)


def hooks_of(module: nn.Module) -> Sequence[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def _offload_hook(module: nn.Module) -> Any | None:
    """accelerate's hook that holds this module's offloaded weights, or None."""
    holding = (h for h in hooks_of(module) if getattr(h, "offload", False))
    return next((h for h in holding if getattr(h, "weights_map", None) is not None), None)


def offloaded(module: nn.Module, name: str) -> Tensor:
    """The values of a parameter that accelerate holds elsewhere.

    Raises:
        StateError: the parameter is on the meta device, and nobody holds its values.
    """
    hook = _offload_hook(module)
    if hook is None:
        message = "the tensor is on the meta device and has no values"
        raise StateError(message, tensor=name, remedy="load the model's weights first")
    return hook.weights_map[name]  # type: ignore[no-any-return]


def quant_states(module: nn.Module) -> Mapping[int, Any]:
    """``{id: QuantState}`` that a module or its weight holds."""
    weight = module._parameters.get("weight")
    found = (module.__dict__.get("quant_state"), getattr(weight, "quant_state", None))
    return {id(s): s for s in found if s is not None}


def swap_modules(model: nn.Module, table: Mapping[int, nn.Module], journal: list[Undo]) -> None:
    """Replace modules, by id, everywhere in the model, together with the shells around these modules: a compiled module goes
    on calling its first module after a replacement inside. ``journal`` gets each undo step before its change.
    """
    for parent in distinct(modules_of(model)).values():
        for name, child in list(parent._modules.items()):
            new = None if child is None else table.get(id(inner_model(child)))
            if new is not None:
                journal.append(partial(parent._modules.__setitem__, name, child))
                parent._modules[name] = new
