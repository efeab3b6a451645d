""":class:`Prepared` copies a model's structure over placeholders: fake tensors, which have a shape and a dtype but no storage.

The values stay in the model, in bitsandbytes' 4 or 8 bits or in any float dtype, and each value becomes an initializer only
when the graph is written. So an export holds one dequantised weight at a time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtype_names import name_of
from oftsurgery.errors import NonFiniteError, StateError
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.stores.layers import Layer, offloaded
from oftsurgery.stores.model_copy import share_model
from oftsurgery.stores.modules import distinct, inner_model, modules_of

Read = Callable[[], Tensor]


class Prepared:
    """A structure to capture in ``dtype``, and the values of its placeholders.

    Args:
        model: the model, which stays unchanged.
        dtype: the graph's dtype: float32 or float16.
        quantized: whether to keep the codes of 4-bit layers (as ``com.microsoft::MatMulBnb4``) and int8 layers (as
            ``DequantizeLinear``); otherwise all weights are dequantised.

    Attributes:
        structure: a copy of the model whose parameters have no storage.
        values: ``{tensor name in the structure: function that gives its value}``.
        kept: ``{path: format}`` of the layers whose 4- or 8-bit codes the graph holds.
        dequantised: ``{path: reason}`` of the quantised layers whose codes the graph does not hold.
        repacked: paths of 4-bit layers that a CPU forward had repacked, which rounded their absmax to bfloat16 for good.

    Raises:
        StateError: a weight is not loaded, or is in a state in which it cannot be read.
        FormatError: a weight's format is not known.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, quantized: bool) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.kept: dict[str, str] = {}
        self.dequantised: dict[str, str] = {}
        self.repacked: list[str] = []
        self._dtype = dtype
        self._quantized = quantized
        self._dtype_of = _dtype_chooser(model, dtype)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._reads: dict[int, Read] = {}  # by the placeholder's id; the structure keeps the placeholders alive
        self._tied: dict[int, nn.Parameter] = {}  # by the original parameter's id

        self.structure = _copy_with(model, self._placeholder, dtype)
        _run_all_experts(self.structure)
        tensors = (
            *self.structure.named_parameters(remove_duplicate=False),
            *self.structure.named_buffers(remove_duplicate=False),
        )
        self.values = {name: self._reads[id(t)] for name, t in tensors if id(t) in self._reads}

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A placeholder."""
        with self._fake:
            return torch.empty(tuple(shape), dtype=dtype)

    def _placeholder(self, layer: Layer, module: nn.Module) -> nn.Module:
        """The module that stands for a layer in the graph: parameters become placeholders, and small buffers stay."""
        new: Any = self._quantised(layer) if layer.bitsandbytes else None
        new = _plain_counterpart(layer, module) if new is None else new
        for local, original in _parameters(layer):
            if local not in new._parameters:
                continue  # a quantised layer's codes are buffers
            name = f"{layer.path}.{local}".lstrip(".")
            if layer.bitsandbytes or original.is_floating_point():
                shape = original.shape if local != "weight" else new.weight.shape
                read = functools.partial(_value, layer, local)
                _set_parameter(new, local, self._parameter(original, name, shape, read))
            else:
                _set_parameter(new, local, nn.Parameter(_value(layer, local), requires_grad=False))
        for local, buffer in layer.module._buffers.items():
            if buffer is None or local not in new._buffers:
                continue
            name = f"{layer.path}.{local}".lstrip(".")
            value = _value(layer, local)
            # transformers computes its own buffers (rotary frequencies) in float32, whatever the weights' dtype
            computed = local in new._non_persistent_buffers_set and hasattr(new, "config")
            if value.is_floating_point() and not computed and self._dtype_of(name) == self._dtype:
                value = _narrow(value, self._dtype, name)
            new._buffers[local] = value
        return new  # type: ignore[no-any-return]

    def _parameter(self, original: Tensor, name: str, shape: Sequence[int], read: Read) -> nn.Parameter:
        """One placeholder for each tensor of the model, so that tied tensors stay tied."""
        if id(original) not in self._tied:
            dtype = self._dtype_of(name)
            new = nn.Parameter(self._empty(shape, dtype), requires_grad=False)
            self._reads[id(new)] = lambda: _narrow(read(), dtype, name)
            self._tied[id(original)] = new
        return self._tied[id(original)]

    def _quantised(self, layer: Layer) -> _QuantizedLinear | None:
        """A linear layer with placeholders for a bitsandbytes layer's codes; None if the graph does not hold the codes."""
        encoded, home = layer.read()
        f = encoded.format
        if layer.repacked:
            self.repacked.append(layer.path)
        if not self._quantized or not f.quantised:
            return None
        reason = _why_dequantised(layer, f, tied=id(layer.module._parameters["weight"]) in self._tied)
        if reason is not None:
            self.dequantised[layer.path] = reason
            return None
        self.kept[layer.path] = home.label
        new = _QuantizedLinear(f, self._dtype_of(f"{layer.path}.weight"))
        # 4-bit layers: codes (out·in/2,) uint8 as bitsandbytes packs them, and the absmax without double quantisation;
        # int8 layers: codes (out, in) and SCB/127
        for local, part in (("qweight", f.kind.codes), (f.kind.onnx_scales, f.kind.steps)):
            like = part(encoded)
            placeholder = self._empty(like.shape, like.dtype)
            self._reads[id(placeholder)] = functools.partial(_read_part, layer, part)
            new.register_buffer(local, placeholder)
        return new


def _why_dequantised(layer: Layer, f: WeightFormat, *, tied: bool) -> str | None:
    """Why the graph cannot hold this layer's codes, or None."""
    if layer.kind != "linear":
        return f"the layer is an {layer.kind}, and only linear layers can stay quantised"
    if tied:
        return "the layer shares its weight with a module that is dequantised"
    return f.kind.onnx_obstacle(f)


class _QuantizedLinear(nn.Module):
    """A linear layer whose codes go into the graph; the layer can be captured, but not run."""

    qweight: Tensor
    bias: nn.Parameter | None

    def __init__(self, format: WeightFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.format = format
        self.dtype = dtype
        self.out_features, self.in_features = format.shape
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """An empty tensor in the layer's dtype, which models ask for."""
        return torch.empty(0, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[-1] == self.in_features)  # type: ignore[no-untyped-call]  # torch does not know the operator
        f, scales = self.format, getattr(self, self.format.kind.onnx_scales)
        y = f.kind.onnx_product(x, self.qweight, scales, f)
        return y if self.bias is None else y + self.bias


def float32_copy(model: nn.Module) -> nn.Module:
    """The reference of the graph: a copy of ``model`` on the CPU that computes in float32 with the exact weights. Each
    weight is decoded when it is read, so that memory holds one decoded weight at a time.
    """
    return _copy_with(model, _module_in_float32, torch.float32)


def _plain_counterpart(layer: Layer, module: nn.Module) -> nn.Module:
    """The copy's ``module``, or a plain module without values in place of a bitsandbytes layer."""
    if not layer.bitsandbytes:
        return module
    rows, columns = layer.read()[0].format.shape
    if layer.kind == "embedding":
        padding = getattr(layer.module, "padding_idx", None)
        return nn.Embedding(rows, columns, padding_idx=padding, device="meta")
    return nn.Linear(columns, rows, bias=layer.module._parameters.get("bias") is not None, device="meta")


def _module_in_float32(layer: Layer, module: nn.Module) -> nn.Module:
    """The copy's module, or a plain module in its place, with the layer's values; large values are read at each use."""
    new = _plain_counterpart(layer, module)
    reads: dict[str, Read] = {}
    for local, parameter in _parameters(layer):
        large = parameter.is_floating_point() and parameter.numel() > 1 << 18 and not isinstance(new, nn.RNNBase)
        if large or (local == "weight" and layer.bitsandbytes):
            reads[local] = functools.partial(_float32, layer, local)
        else:
            _set_parameter(new, local, nn.Parameter(_float32(layer, local), requires_grad=False))
    for local, buffer in layer.module._buffers.items():
        if buffer is not None:
            new._buffers[local] = _float32(layer, local)
    _read_on_access(new, reads)
    return new


def _parameters(layer: Layer) -> Iterator[tuple[str, nn.Parameter]]:
    """``(name, parameter)`` of a layer's own parameters; raises StateError for a lazy parameter."""
    for local, parameter in layer.module._parameters.items():
        if parameter is None:
            continue
        if nn.parameter.is_lazy(parameter):
            message, remedy = "the module is lazy and has no weight yet", "run one forward of the model first"
            raise StateError(message, module=layer.path, remedy=remedy)
        yield local, parameter


def _read_part(layer: Layer, part: Callable[[EncodedWeight], Tensor]) -> Tensor:
    """One part of a layer's weight, on the CPU."""
    return part(layer.read()[0]).detach().cpu()


def _value(layer: Layer, local: str) -> Tensor:
    """A parameter or buffer of a layer, decoded, on the CPU."""
    if local == "weight" and layer.bitsandbytes:
        return _read_part(layer, codecs.decode)
    module = layer.module
    tensor: Any = {**module._parameters, **module._buffers}[local]
    return (offloaded(module, local) if tensor.is_meta else tensor).detach().cpu()


def _float32(layer: Layer, local: str) -> Tensor:
    """:func:`_value`, in float32 if the value is floating point."""
    value = _value(layer, local)
    return value.float() if value.is_floating_point() else value


def _read_on_access(module: nn.Module, reads: Mapping[str, Read]) -> None:
    """Make the attributes in ``reads`` properties of ``module``, which compute the value at each access."""
    if not reads:
        return
    for local in reads:
        shape = module._parameters[local].shape  # type: ignore[union-attr]
        # models read the dtype and the shape of their parameters, so an expanded tensor of one element stays
        module._parameters[local] = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)

    def computed(read: Read) -> property:
        return property(lambda _: read())

    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {local: computed(read) for local, read in reads.items()})


def _copy_with(model: nn.Module, make: Callable[[Layer, nn.Module], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` for a forward in ``dtype``, in eval mode, without accelerate hooks and compiled code; ``make``
    gives the module for each layer.
    """
    copies = distinct(modules_of(share_model(model)))
    for module in copies.values():
        module._compiled_call_impl = None
        if "_hf_hook" in module.__dict__:
            for name in ("_hf_hook", "_old_forward", "forward"):
                module.__dict__.pop(name, None)
    originals = distinct(modules_of(model))
    made = {id(copy): make(Layer(path, originals[path]), copy) for path, copy in copies.items()}
    for module in copies.values():
        children = {name: inner_model(child) for name, child in module._modules.items() if child is not None}
        module._modules.update({name: made[id(child)] for name, child in children.items()})
    copy: Any = made[id(copies[""])].eval()
    if getattr(getattr(copy, "config", None), "dtype", None) is not None:
        copy.config.dtype = dtype
    return copy  # type: ignore[no-any-return]


def _set_parameter(module: nn.Module, local: str, parameter: nn.Parameter) -> None:
    if isinstance(module, nn.RNNBase):
        setattr(module, local, parameter)  # a recurrent module also keeps a list of its weights
    else:
        module._parameters[local] = parameter


def _narrow(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``value`` in ``dtype``; raises NonFiniteError if the narrower dtype cannot hold a value."""
    new = value.to(dtype)
    if not bool(torch.isfinite(new).all()) and bool(torch.isfinite(value).all()):
        message = f"the weight is not finite in {name_of(dtype)}"
        raise NonFiniteError(message, tensor=name, remedy="export the model with dtype='float32' (--dtype float32)")
    return new


def _dtype_chooser(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """A function that gives each tensor's dtype in the graph: transformers keeps some tensors of a half-precision model in
    float32 (T5's ``wo``).
    """
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    parts = sorted({part for name in names for part in getattr(model, name, None) or ()})
    pattern = re.compile("|".join(rf"(^|\.){re.escape(p)}($|\.)" for p in parts))
    return lambda name: torch.float32 if parts and pattern.search(name) else dtype


_EXPERTS = "oftsurgery_all_experts"


def _run_all_experts(copy: nn.Module) -> None:
    """Let transformers' mixtures of experts run each expert on each token: the other implementations depend on the values,
    gather whole weights for each token, or use an operator that ONNX does not have.
    """
    configs = {id(c): c for m in copy.modules() if (c := getattr(m, "config", None)) is not None}.values()
    mixtures = [c for c in configs if getattr(c, "_experts_implementation", None) is not None]
    if not mixtures:
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _all_experts)
    for config in mixtures:
        config._experts_implementation = _EXPERTS


def _all_experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' output ``(tokens, size)`` from ``hidden (tokens, size)`` and ``chosen`` and ``weights (tokens, k)``;
    ``self`` is an experts module of transformers.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        y: Tensor = x @ (weight if self.is_transposed else weight.transpose(1, 2))  # (experts, tokens, out)
        if self.has_bias:
            y = y + getattr(self, f"{name}_bias").unsqueeze(1)
        return y

    x = hidden.unsqueeze(0)
    inner = self._apply_gate(linear(x, "gate_up_proj")) if self.has_gate else self.act_fn(linear(x, "up_proj"))
    out = linear(inner, "down_proj")
    share = torch.zeros(hidden.shape[0], out.shape[0], dtype=out.dtype, device=out.device)
    share = share.scatter(1, chosen, weights.to(out.dtype))
    return (out * share.t().unsqueeze(-1)).sum(0).to(hidden.dtype)
