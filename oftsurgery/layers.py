"""Layers of a live model: what their weight is stored as, reading it, and putting another in its place.

One :class:`Layer` wraps a module and knows its kind (plain, bitsandbytes 4-bit or 8-bit, GPT-2's ``Conv1D``, 1×1
convolution, embedding) and where its weight lives (the module, its int8 state, or accelerate's offload map). Weights
are read and written as :class:`~oftsurgery.EncodedWeight` of the canonical two-dimensional shape: ``(out, in)``, or
``(tokens, features)``. Nothing here computes.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import codecs
from .codecs import EncodedWeight, WeightFormat
from .errors import FormatError, StateError

__all__ = ["Kind", "Layer", "alias_parameter", "copy_quant_state"]

Kind = Literal["linear", "embedding", "conv"]

Undo = Callable[[], None]


def _bnb_class(obj: object, *names: str) -> bool:
    """Whether ``obj`` is of one of bitsandbytes' classes (or derived), without importing it: without it no model can
    hold any.
    """
    return any(c.__name__ in names and c.__module__.startswith("bitsandbytes.") for c in type(obj).__mro__)


@dataclass(frozen=True, eq=False)
class Layer:
    """One foldable module of a model, at ``path``."""

    path: str
    module: nn.Module

    # --- what it is ---

    @property
    def kind(self) -> Kind:
        """Raises FormatError for modules whose weight cannot be folded."""
        m = self.module
        if isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise FormatError(
                "nn.MultiheadAttention reads this weight and never calls the layer, so a live adapter on it does nothing, and a fold would",
                module=self.path,
                remedy="leave it out of the adapter (`exclude_modules`)",
            )
        if isinstance(m, nn.Embedding):
            return "embedding"
        if isinstance(m, nn.Conv2d):
            if tuple(m.kernel_size) != (1, 1):
                raise FormatError(
                    f"a {m.kernel_size[0]}×{m.kernel_size[1]} convolution cannot be folded: peft 0.16 to 0.21's live layer overlaps its patches, "
                    "so no weight computes the same",
                    module=self.path,
                    remedy="train the adapter without this convolution (`exclude_modules`); 1×1 convolutions are fine",
                )
            if m.groups != 1:
                raise FormatError(
                    "a grouped convolution cannot be folded",
                    module=self.path,
                    remedy="train the adapter without it (`exclude_modules`)",
                )
            return "conv"
        if isinstance(m, nn.Linear) or self._is_conv1d:
            return "linear"
        raise FormatError(
            f"a {type(m).__name__} has no weight that OFT rotates and oftsurgery knows",
            module=self.path,
            remedy="known are torch's Linear, Embedding and 1×1 Conv2d, transformers' Conv1D, and bitsandbytes' 4-bit and 8-bit layers",
        )

    @property
    def _is_conv1d(self) -> bool:
        return any(
            c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(self.module).__mro__
        )

    @property
    def _is_4bit(self) -> bool:
        return _bnb_class(self.module, "Linear4bit", "Embedding4bit") or _bnb_class(
            getattr(self.module, "weight", None), "Params4bit"
        )

    @property
    def _is_8bit(self) -> bool:
        return _bnb_class(self.module, "Linear8bitLt", "Embedding8bit") or _bnb_class(
            getattr(self.module, "weight", None), "Int8Params"
        )

    @property
    def bitsandbytes(self) -> bool:
        """Whether the module or its weight is bitsandbytes' own, quantised or not."""
        return self._is_4bit or self._is_8bit

    @property
    def quantised(self) -> bool:
        """Whether the weight is stored by bitsandbytes in 4 or 8 bits."""
        weight = self.module._parameters.get("weight")
        return (
            self._is_4bit
            and not (weight is not None and weight.is_floating_point() and getattr(weight, "quant_state", None) is None)
        ) or (self._is_8bit and weight is not None and weight.dtype == torch.int8)

    @property
    def repacked(self) -> bool:
        """Whether a CPU forward has repacked a 4-bit weight, now or before it was unpacked again."""
        state = getattr(self.module._parameters.get("weight"), "quant_state", None)
        return hasattr(state, "packing_format_for_cpu")

    # --- where its tensors are ---

    @property
    def _offload_hook(self) -> Any | None:
        """accelerate's hook that holds this module's offloaded weights, or None."""
        hook = getattr(self.module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        return next(
            (h for h in hooks if getattr(h, "offload", False) and getattr(h, "weights_map", None) is not None), None
        )

    def _weight(self) -> Tensor:
        module = self.module
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            raise StateError(
                "the weight is parametrised (torch.nn.utils.parametrize)",
                module=self.path,
                remedy="remove_parametrizations(module, 'weight') first",
            )
        if module._parameters.get("weight") is None:
            raise StateError(
                "the weight is no parameter of the module itself: it is computed from others (weight_norm, spectral_norm, pruning), or there is none",
                module=self.path,
                remedy="make it one first: remove_weight_norm, remove_spectral_norm, prune.remove",
            )
        weight: Any = module.weight
        if nn.parameter.is_lazy(weight):
            raise StateError(
                "the module is lazy and has no weight yet", module=self.path, remedy="run one forward first"
            )
        if not isinstance(weight, Tensor):
            raise FormatError(
                f"the module's weight is a {type(weight).__name__}, not a tensor",
                module=self.path,
                remedy="give a torch model",
            )
        if weight.is_meta:
            hook = self._offload_hook
            if hook is None:
                raise StateError(
                    "the weight is on the meta device: it has no values",
                    module=self.path,
                    remedy="load the model's weights first",
                )
            return hook.weights_map["weight"]  # type: ignore[no-any-return]
        if type(weight.data).__name__ == "DTensor":
            raise StateError(
                "the weight is sharded over processes (DTensor)",
                module=self.path,
                remedy="gather the model in one process first",
            )
        return weight

    def read(self) -> tuple[EncodedWeight, WeightFormat]:
        """The stored weight, sharing the module's tensors, and the format that it goes back to.

        The two differ where a CPU forward repacked a 4-bit layer: what is left is singly quantised, what the layer was
        may be doubly.

        Raises:
            FormatError: stored in a way that is not known, or statistics are missing.
            StateError: not loaded, sharded, parametrised, or not quantised yet.
        """
        weight = self._weight()
        if self._is_4bit:
            return self._read_4bit(weight)
        if self._is_8bit and weight.dtype == torch.int8:
            return self._read_8bit(weight)
        if self._is_8bit and not getattr(weight, "has_fp16_weights", True):
            raise StateError(
                "the 8-bit layer is not quantised yet",
                module=self.path,
                remedy="move the model to its device first: model.to(device)",
            )
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise FormatError(
                f"a {type(self.module).__name__} with a weight of {weight.dtype} is stored in a way that oftsurgery does not know",
                module=self.path,
                shape=tuple(weight.shape),
                remedy="load the model unquantised or with bitsandbytes",
            )
        encoded = codecs.dense(self._canonical(weight.detach()))
        return encoded, encoded.format

    def _canonical(self, weight: Tensor) -> Tensor:
        if self._is_conv1d:
            return weight.t()  # GPT-2's Conv1D holds (in, out)
        return weight.reshape(weight.shape[0], -1) if weight.ndim == 4 else weight

    def _stored(self, weight: Tensor) -> Tensor:
        """Mirror of :meth:`_canonical`."""
        if self._is_conv1d:
            return weight.t().contiguous()
        return weight.reshape(*weight.shape, 1, 1) if isinstance(self.module, nn.Conv2d) else weight

    def _read_4bit(self, weight: Tensor) -> tuple[EncodedWeight, WeightFormat]:
        if self._offload_hook is not None:
            raise StateError(
                "a 4-bit layer offloaded by accelerate keeps no quantisation state with its weight",
                module=self.path,
                remedy="keep 4-bit layers on a device (device_map), or fold the checkpoint on disk",
            )
        state = getattr(weight, "quant_state", None) or getattr(self.module, "quant_state", None)
        if state is None:
            if weight.is_floating_point() and not getattr(weight, "bnb_quantized", False):
                raise StateError(
                    "the 4-bit layer is not quantised yet",
                    module=self.path,
                    remedy="move the model to its device first: model.to(device)",
                )
            raise FormatError(
                "the 4-bit layer has lost its quant_state", module=self.path, format="4-bit", remedy="reload the model"
            )
        if state.quant_type not in ("nf4", "fp4"):
            raise FormatError(
                "unknown 4-bit type", module=self.path, format=str(state.quant_type), remedy="quantise with nf4 or fp4"
            )
        shape = tuple(state.shape)
        data = weight.detach()
        if getattr(state, "packing_format_for_cpu", False):
            packed, absmax = codecs.unpack_cpu_layout(data, state.absmax, (shape[0], shape[1]), state.blocksize)
            now = WeightFormat(state.quant_type, shape, state.original_dtype, state.blocksize)
            home = replace(
                now,
                nested_blocksize=256 if state.original_nested or getattr(weight, "compress_statistics", False) else 0,
                storage=getattr(state, "original_storage_type", torch.uint8),
            )
            return EncodedWeight(now, {"weight": packed, "absmax": absmax, "quant_map": state.code}), home
        if state.absmax.ndim != 1:
            # bitsandbytes 0.50: state_dict() of a CPU-packed layer puts the codes back, but leaves a single absmax
            # transposed
            raise StateError(
                "saving this layer after a CPU eval forward has left its absmax transposed: bitsandbytes computes noise with it now",
                module=self.path,
                tensor="absmax",
                shape=tuple(state.absmax.shape),
                remedy="load the base model again; set `module.support_avx512bf16_for_cpu = False` on its layers before evaluating on the CPU",
            )
        nested = state.state2.blocksize if state.nested else 0
        tensors = {"weight": data, "absmax": state.absmax, "quant_map": state.code}
        if state.nested:
            tensors |= {
                "nested_absmax": state.state2.absmax,
                "nested_quant_map": state.state2.code,
                "nested_offset": state.offset,
            }
        now = WeightFormat(state.quant_type, shape, state.dtype, state.blocksize, nested, data.dtype)
        # a CPU eval forward that fails to pack (in no multiple of blocksize) has undone the double quantisation by then
        undone = not nested and hasattr(state, "original_nested") and getattr(weight, "compress_statistics", False)
        return EncodedWeight(now, tensors), replace(now, nested_blocksize=256) if undone else now

    def _read_8bit(self, weight: Tensor) -> tuple[EncodedWeight, WeightFormat]:
        hook = self._offload_hook
        if hook is not None:
            scb = hook.weights_map.get("SCB")
        else:
            scb = getattr(weight, "SCB", None)
            if scb is None:
                scb = getattr(getattr(self.module, "state", None), "SCB", None)
        if scb is None:
            raise FormatError(
                "the int8 layer has lost its SCB statistics",
                module=self.path,
                tensor="SCB",
                format="int8",
                remedy="reload the model",
            )
        encoded = EncodedWeight(
            WeightFormat("int8", tuple(weight.shape), torch.float16), {"weight": weight.detach(), "SCB": scb}
        )
        return encoded, encoded.format

    # --- putting another weight in its place ---

    def write(self, encoded: EncodedWeight, *, park: bool, journal: list[Undo] | None = None) -> Undo:
        """Put ``encoded`` in place of the module's weight: a new Parameter, so that modules that shared the old one
        keep it.

        Args:
            encoded: of the canonical shape, on the module's device.
            park: move the replaced weight from its device to CPU memory, where it waits for the undo step; not for one
                that others still use.
            journal: is given the undo step before anything changes, so that no interrupt comes between the two.

        Returns:
            what puts everything back as it was, Parameter objects included.
        """
        if self._offload_hook is not None:
            return self._write_offloaded(encoded, journal if journal is not None else [])
        module: Any = self.module
        old = module._parameters["weight"]
        new: Any = self._new_parameter(old, encoded)
        slots: list[tuple[Any, str]] = []  # attributes beside the parameter that change with it
        if module.__dict__.get("quant_state") is not None:
            slots = [(module, "quant_state")]
        elif self._is_8bit and getattr(module, "state", None) is not None:
            # as in a freshly quantised layer, whose first forward fills them; has_fp16_weights keeps its last
            # quantisation there as well
            slots = [(module.state, "CB"), (module.state, "SCB")]
        before = [(holder, name, getattr(holder, name)) for holder, name in slots]
        unpark = _park(old, before) if park else None

        def undo() -> None:
            if unpark is not None:
                unpark()
            module._parameters["weight"] = old
            for holder, name, value in before:
                setattr(holder, name, old.data if name == "CB" and unpark is not None and value is not None else value)

        if journal is not None:
            journal.append(undo)
        try:
            module._parameters["weight"] = new
            for holder, name in slots:
                setattr(holder, name, getattr(new, "quant_state", None))
        except BaseException:
            undo()
            raise
        return undo

    def _write_offloaded(self, encoded: EncodedWeight, journal: list[Undo]) -> Undo:
        # over accelerate's own map, which reads the disk or a dict shared with other hooks: the new weight waits in CPU
        # memory
        hook: Any = self._offload_hook
        tensors: dict[str, Tensor] = {k: t.cpu() for k, t in encoded.tensors.items()}
        if encoded.format.codec == "dense":
            tensors = {"weight": self._stored(tensors["weight"])}
        before = hook.weights_map

        def undo() -> None:
            hook.weights_map = before

        journal.append(undo)
        hook.weights_map = ChainMap(tensors, before)
        return undo

    def _new_parameter(self, old: Any, encoded: EncodedWeight) -> nn.Parameter:
        t = encoded.tensors
        if encoded.format.codec == "dense":
            return self._new_dense(old, self._stored(t["weight"]))
        if encoded.format.codec == "int8":
            return type(old)(  # type: ignore[no-any-return]
                t["weight"],
                requires_grad=old.requires_grad,
                has_fp16_weights=old.has_fp16_weights,
                CB=t["weight"],
                SCB=t["SCB"],
            )
        return self._new_4bit(old, encoded)

    def _new_dense(self, old: Any, data: Tensor) -> nn.Parameter:
        if _bnb_class(old, "Int8Params"):
            return type(old)(data, requires_grad=old.requires_grad, has_fp16_weights=old.has_fp16_weights)  # type: ignore[no-any-return]
        new = nn.Parameter(data, requires_grad=old.requires_grad)
        new.__dict__.update(
            old.__dict__
        )  # what frameworks note on parameters (sequence_parallel, _is_hf_initialized …)
        return new

    def _new_4bit(self, old: Any, encoded: EncodedWeight) -> nn.Parameter:
        from bitsandbytes.functional import QuantState

        t, f = encoded.tensors, encoded.format
        nested = None
        if f.nested_blocksize:
            nested = QuantState(
                absmax=t["nested_absmax"], blocksize=f.nested_blocksize, code=t["nested_quant_map"], dtype=torch.float32
            )
        state = QuantState(
            absmax=t["absmax"],
            shape=torch.Size(f.shape),
            code=t["quant_map"],
            blocksize=f.blocksize,
            quant_type=f.codec,
            dtype=f.dtype,
            offset=t.get("nested_offset"),
            state2=nested,
        )
        if not _bnb_class(old, "Params4bit"):
            # FSDP leaves a plain Parameter and the module's quant_state: bitsandbytes' forward makes a Params4bit of it
            # in the same way
            from bitsandbytes.nn import Params4bit

            old = Params4bit(
                old.data,
                old.requires_grad,
                state,
                f.blocksize,
                bool(nested),
                f.codec,
                f.storage,
                self.module,
                bnb_quantized=True,
            )
        # the constructor's own arguments and nothing else: __dict__ may carry torch.compile's attributes
        return type(old)(  # type: ignore[no-any-return]
            t["weight"],
            requires_grad=old.requires_grad,
            quant_state=state,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=old.module,
            bnb_quantized=True,
        )


def _park(parameter: Any, beside: list[tuple[Any, str, Any]]) -> Undo | None:
    """Move a replaced parameter's bytes to CPU memory, so that its device can drop them; returns what brings them back."""
    device = parameter.device
    if device.type == "cpu":
        return None
    parameter.data = parameter.data.cpu()
    if getattr(parameter, "CB", None) is not None:
        parameter.CB = parameter.data  # the same bytes, under another name
    for i, (holder, name, value) in enumerate(beside):
        if name == "CB" and value is not None:
            beside[i] = (holder, name, parameter.data)

    def unpark() -> None:
        parameter.data = parameter.data.to(device)
        if getattr(parameter, "CB", None) is not None:
            parameter.CB = parameter.data

    return unpark


def offloaded(module: nn.Module, name: str) -> Tensor:
    """The values of a parameter that accelerate holds elsewhere.

    Raises:
        StateError: the parameter is on the meta device, and nobody holds its values.
    """
    hook = Layer("", module)._offload_hook
    if hook is None:
        raise StateError(
            "the tensor is on the meta device: it has no values", tensor=name, remedy="load the model's weights first"
        )
    return hook.weights_map[name]  # type: ignore[no-any-return]


def copy_quant_state(state: Any) -> Any:
    """A QuantState of its own over the same tensors: bitsandbytes changes states in place (``to``, CPU packing)."""
    new = copy.copy(state)
    if getattr(new, "state2", None) is not None:
        new.state2 = copy.copy(new.state2)
    return new


def alias_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A Parameter of its own, of the same class and attributes, over the same storage."""
    if _bnb_class(parameter, "Params4bit"):
        new = copy.copy(parameter)
        if new.quant_state is not None:  # type: ignore[attr-defined]
            new.quant_state = copy_quant_state(new.quant_state)  # type: ignore[attr-defined]
        return new
    if _bnb_class(parameter, "Int8Params"):
        p: Any = parameter
        return type(p)(p.data, requires_grad=p.requires_grad, has_fp16_weights=p.has_fp16_weights, CB=p.CB, SCB=p.SCB)  # type: ignore[no-any-return]
    new = copy.copy(parameter)
    if type(parameter) is not nn.Parameter and type(new) is nn.Parameter:
        raise StateError(
            f"a parameter of class {type(parameter).__name__} cannot be shared between two models",
            remedy="fold with inplace=True, or a plain torch model",
        )
    return new


def quant_states(module: nn.Module) -> Mapping[int, Any]:
    """``{id: QuantState}`` that a module or its weight holds."""
    weight = module._parameters.get("weight")
    found = (module.__dict__.get("quant_state"), getattr(weight, "quant_state", None))
    return {id(s): s for s in found if s is not None}
