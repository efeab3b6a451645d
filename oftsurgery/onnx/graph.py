"""A model as an ONNX graph: its structure captured over placeholders, its weights read one at a time as the file is
written.

torch.export sees a copy of the structure whose parameters are fake tensors: shapes and dtypes without storage. The
values stay where they are, in bitsandbytes' 4 or 8 bits or in any float dtype, and each becomes an initializer at the
moment it is written. So an export holds one dequantised weight at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oftsurgery.dtypes import name_of
from oftsurgery.errors import ExportError, NonFiniteError, OFTSurgeryError, StateError, causes, needs, printable
from oftsurgery.formats import codecs
from oftsurgery.formats.base import OPSET
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.stores.layers import Layer, offloaded
from oftsurgery.stores.sharing import share_model

__all__ = ["OPSET", "Prepared", "capture", "external", "reference", "require_onnx", "write"]

Read = Callable[[], Tensor]

#: larger models have their weights in a file of their own; beyond 2 GB protobuf leaves no choice, and below it a single
#: file takes several copies in memory
_SINGLE_FILE_BYTES = 1 << 30

_PREFIX = "model."


def require_onnx() -> None:
    """Import the packages of the ``onnx`` extra.

    Raises:
        MissingDependencyError: one is not installed.
    """
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        with needs(name, "pip install 'oftsurgery[onnx]'"):
            importlib.import_module(name)


# --- the model over placeholders --------------------------------------------------------------------------------------


class Prepared:
    """A structure to capture in ``dtype``, and the values that go with it.

    Args:
        model: as it is; it stays so.
        dtype: of the graph: float32 or float16.
        quantized: keep the codes of 4-bit layers (as ``com.microsoft::MatMulBnb4``) and int8 ones (as
            ``DequantizeLinear``); otherwise everything is dequantised.

    Attributes:
        structure: a copy of the model whose parameters have no storage.
        values: ``{tensor name in the structure: function that gives its value}``.
        kept: ``{path: format}`` of the layers whose 4- or 8-bit codes the graph holds.
        dequantised: ``{path: reason}`` of the quantised layers whose codes the graph does not hold.
        repacked: paths of 4-bit layers that a CPU forward had repacked: their absmax is rounded to bfloat16 for good.

    Raises:
        StateError: weights that are not loaded, or in a state in which they cannot be read.
        FormatError: stored in a way that is not known.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, quantized: bool) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.kept: dict[str, str] = {}
        self.dequantised: dict[str, str] = {}
        self.repacked: list[str] = []
        self._dtype = dtype
        self._quantized = quantized
        self._dtype_of = _dtypes(model, dtype)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._reads: dict[int, Read] = {}  # by the placeholder's id; the structure keeps them alive
        self._tied: dict[int, nn.Parameter] = {}  # by the original's

        self.structure = _rebuilt(model, self._placeholder, dtype)
        _run_all_experts(self.structure)
        tensors = (
            *self.structure.named_parameters(remove_duplicate=False),
            *self.structure.named_buffers(remove_duplicate=False),
        )
        self.values = {name: self._reads[id(t)] for name, t in tensors if id(t) in self._reads}

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._fake:
            return torch.empty(tuple(shape), dtype=dtype)

    def _placeholder(self, layer: Layer, module: nn.Module) -> nn.Module:
        """What stands for a layer in the graph: placeholders for its parameters; buffers are small, and stay."""
        new: Any = self._quantised(layer) if layer.bitsandbytes else None
        new = _dense(layer, module) if new is None else new
        for local, original in _parameters(layer):
            if local not in new._parameters:
                continue  # codes are buffers
            name = f"{layer.path}.{local}".lstrip(".")
            if layer.bitsandbytes or original.is_floating_point():
                shape = original.shape if local != "weight" else new.weight.shape
                _set(new, local, self._parameter(original, name, shape, functools.partial(_value, layer, local)))
            else:
                _set(new, local, nn.Parameter(_value(layer, local), requires_grad=False))
        for local, buffer in layer.module._buffers.items():
            if buffer is None or local not in new._buffers:
                continue
            name = f"{layer.path}.{local}".lstrip(".")
            value = _value(layer, local)
            # transformers computes its own (rotary frequencies) in float32, whatever the dtype of the weights
            computed = local in new._non_persistent_buffers_set and hasattr(new, "config")
            if value.is_floating_point() and not computed and self._dtype_of(name) == self._dtype:
                value = _narrowed(value, self._dtype, name)
            new._buffers[local] = value
        return new  # type: ignore[no-any-return]

    def _parameter(self, original: Tensor, name: str, shape: Sequence[int], read: Read) -> nn.Parameter:
        """One placeholder for each tensor of the model, so that what is tied stays so."""
        if id(original) not in self._tied:
            dtype = self._dtype_of(name)
            new = nn.Parameter(self._empty(shape, dtype), requires_grad=False)
            self._reads[id(new)] = lambda: _narrowed(read(), dtype, name)
            self._tied[id(original)] = new
        return self._tied[id(original)]

    def _quantised(self, layer: Layer) -> _QuantizedLinear | None:
        """A bitsandbytes layer with placeholders for its codes, or None where the graph does not hold them."""
        encoded, home = layer.read()
        f = encoded.format
        if layer.repacked:
            self.repacked.append(layer.path)
        if not self._quantized or not f.quantised:
            return None
        reason = _obstacle(layer, f, tied=id(layer.module._parameters["weight"]) in self._tied)
        if reason is not None:
            self.dequantised[layer.path] = reason
            return None
        self.kept[layer.path] = home.label
        new = _QuantizedLinear(f, self._dtype_of(f"{layer.path}.weight"))
        # 4-bit: codes (out·in/2,) uint8 as bitsandbytes packs them and the absmax, double quantisation undone; int8:
        # codes (out, in) and SCB/127
        for local, part in (("qweight", f.kind.codes), (f.kind.onnx_scales, f.kind.steps)):
            like = part(encoded)
            placeholder = self._empty(like.shape, like.dtype)
            self._reads[id(placeholder)] = functools.partial(_read, layer, part)
            new.register_buffer(local, placeholder)
        return new


def _obstacle(layer: Layer, f: WeightFormat, *, tied: bool) -> str | None:
    """Why the graph cannot hold this layer's codes, or None."""
    if layer.kind != "linear":
        return f"an {layer.kind}: only linear layers can stay quantised"
    if tied:
        return "its weight is shared with a module that is dequantised"
    return f.kind.onnx_obstacle(f)


class _QuantizedLinear(nn.Module):
    """A linear layer whose codes go into the graph; it can be captured and not run."""

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
        """Models ask for its dtype."""
        return torch.empty(0, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[-1] == self.in_features)  # type: ignore[no-untyped-call]  # torch knows nothing of the operator
        f, scales = self.format, getattr(self, self.format.kind.onnx_scales)
        y = f.kind.onnx_product(x, self.qweight, scales, f)
        return y if self.bias is None else y + self.bias


def reference(model: nn.Module) -> nn.Module:
    """What the graph is compared with: a copy of ``model`` on the CPU that computes in float32 with the exact weights,
    each decoded when it is read, so that there is one at a time.
    """
    return _rebuilt(model, _in_float32, torch.float32)


def _dense(layer: Layer, module: nn.Module) -> nn.Module:
    """``module`` of a copy, or the plain counterpart of a bitsandbytes layer, without values."""
    if not layer.bitsandbytes:
        return module
    rows, columns = layer.read()[0].format.shape
    if layer.kind == "embedding":
        padding = getattr(layer.module, "padding_idx", None)
        return nn.Embedding(rows, columns, padding_idx=padding, device="meta")
    return nn.Linear(columns, rows, bias=layer.module._parameters.get("bias") is not None, device="meta")


def _in_float32(layer: Layer, module: nn.Module) -> nn.Module:
    """The module of a copy, or what stands for it, with the values of the layer's: small ones as they are, large ones to be
    read when they are used.
    """
    new = _dense(layer, module)
    reads: dict[str, Read] = {}
    for local, parameter in _parameters(layer):
        large = parameter.is_floating_point() and parameter.numel() > 1 << 18 and not isinstance(new, nn.RNNBase)
        if large or (local == "weight" and layer.bitsandbytes):
            reads[local] = functools.partial(_float32, layer, local)
        else:
            _set(new, local, nn.Parameter(_float32(layer, local), requires_grad=False))
    for local, buffer in layer.module._buffers.items():
        if buffer is not None:
            new._buffers[local] = _float32(layer, local)
    _read_on_access(new, reads)
    return new


def _parameters(layer: Layer) -> Iterator[tuple[str, nn.Parameter]]:
    for local, parameter in layer.module._parameters.items():
        if parameter is None:
            continue
        if nn.parameter.is_lazy(parameter):
            message, remedy = "the module is lazy and has no weight yet", "run one forward first"
            raise StateError(message, module=layer.path, remedy=remedy)
        yield local, parameter


def _read(layer: Layer, part: Callable[[EncodedWeight], Tensor]) -> Tensor:
    return part(layer.read()[0]).detach().cpu()


def _value(layer: Layer, local: str) -> Tensor:
    """A parameter or buffer of a layer, decoded, on the CPU."""
    if local == "weight" and layer.bitsandbytes:
        return _read(layer, codecs.decode)
    module = layer.module
    tensor: Any = {**module._parameters, **module._buffers}[local]
    return (offloaded(module, local) if tensor.is_meta else tensor).detach().cpu()


def _float32(layer: Layer, local: str) -> Tensor:
    """The same in float32, if it is floating point."""
    value = _value(layer, local)
    return value.float() if value.is_floating_point() else value


def _read_on_access(module: nn.Module, reads: Mapping[str, Read]) -> None:
    """Make attributes of ``module`` computed ones, whoever reads them."""
    if not reads:
        return
    for local in reads:
        shape = module._parameters[local].shape  # type: ignore[union-attr]
        # of the right dtype and shape, and of one element: models ask their parameters for it
        module._parameters[local] = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)

    def computed(read: Read) -> property:
        return property(lambda _: read())

    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {local: computed(read) for local, read in reads.items()})


# --- copies and values ------------------------------------------------------------------------------------------------


def _rebuilt(model: nn.Module, make: Callable[[Layer, nn.Module], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` for one forward in ``dtype``: no accelerate hooks, nothing compiled, in eval mode, and what
    ``make`` gives for each layer in the place of the copy's module.
    """
    copies = dict(share_model(model).named_modules())
    for module in copies.values():
        module._compiled_call_impl = None
        if "_hf_hook" in module.__dict__:
            for name in ("_hf_hook", "_old_forward", "forward"):
                module.__dict__.pop(name, None)
    made = {id(copies[path]): make(Layer(path, original), copies[path]) for path, original in model.named_modules()}
    for module in copies.values():
        module._modules.update({name: made[id(child)] for name, child in module._modules.items() if child is not None})
    copy: Any = made[id(copies[""])].eval()
    if getattr(getattr(copy, "config", None), "dtype", None) is not None:
        copy.config.dtype = dtype
    return copy  # type: ignore[no-any-return]


def _set(module: nn.Module, local: str, parameter: nn.Parameter) -> None:
    if isinstance(module, nn.RNNBase):
        setattr(module, local, parameter)  # it keeps a list of its weights too
    else:
        module._parameters[local] = parameter


def _narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Raises NonFiniteError where the narrower dtype has no such number."""
    new = value.to(dtype)
    if not bool(torch.isfinite(new).all()) and bool(torch.isfinite(value).all()):
        message = f"the weight is not finite in {name_of(dtype)}"
        raise NonFiniteError(message, tensor=name, remedy="export it as dtype='float32' (--dtype float32)")
    return new


def _dtypes(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype of each tensor in the graph: transformers itself keeps some in float32 in a half-precision model (T5's
    ``wo``).
    """
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    parts = sorted({part for name in names for part in getattr(model, name, None) or ()})
    pattern = re.compile("|".join(rf"(^|\.){re.escape(p)}($|\.)" for p in parts))
    return lambda name: torch.float32 if parts and pattern.search(name) else dtype


_EXPERTS = "oftsurgery_all_experts"


def _run_all_experts(copy: nn.Module) -> None:
    """Let transformers' mixtures of experts run each expert on each token: what else it has for them either depends on
    the values, or gathers whole weights for each token, or is an operator that ONNX has not.
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
    """``hidden (tokens, size)``, ``chosen`` and ``weights (tokens, k)`` to ``(tokens, size)``, with an experts module of
    transformers as ``self``.
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


# --- capture ----------------------------------------------------------------------------------------------------------


def capture(
    module: Any,
    inputs: Mapping[str, tuple[Tensor, Mapping[int, str | None]]],
    outputs: Sequence[str],
    values: Mapping[str, Read],
    step: Callable[[str], None] = lambda _: None,
) -> Any:
    """The graph of ``module``, which takes its inputs in order and returns a tuple of tensors.

    Args:
        module: over placeholders.
        inputs: ``{name: (example, {dynamic axis: its name, or None for torch to decide whether it can be})}``.
        outputs: names.
        values: of the placeholders, by their names in ``module.model``.
        step: told of each stage.

    Returns:
        ``onnx_ir.Model``; its initializers read their values when they are written.

    Raises:
        ExportError: torch cannot capture it, or there is no operator for something in it.
    """
    import onnx_ir as ir
    from onnxscript import optimizer

    args = tuple(tensor.contiguous() for tensor, _ in inputs.values())  # strides would become symbols
    auto, dynamic = torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC
    dims = tuple({a: auto if name is None else dynamic for a, name in axes.items()} for _, axes in inputs.values())
    step("capture with torch.export")
    with _quiet():
        try:
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # a failed capture prints its graph
                program = torch.export.export(module, args, dynamic_shapes=(dims,), strict=False)
        except Exception as error:
            raise _not_captured(error, _deepest(error, module.model)) from error
        step("translate to ONNX")
        try:
            model = torch.onnx.export(
                program,
                args,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            ).model  # type: ignore[union-attr]
        except Exception as error:
            raise _not_translated(error, program) from error
        _name_axes(model, inputs)
        _fill(model, values)
        step("optimise")
        with _own_errors("optimised"):
            optimizer.optimize_ir(model, should_fold=_may_fold)
    _transpose_weights(model)
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    for part in (model, model.graph, *nodes, *_values(model.graph)):
        part.metadata_props.clear()  # paths and lines of this machine, and torch's own view of the graph
    return model


def _deepest(error: BaseException, model: nn.Module) -> str | None:
    """Path of the module in whose forward an error came up, None for the model itself."""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [frame for cause in causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    return next(filter(None, (paths.get(id(frame.f_locals.get("self"))) for frame in reversed(frames))), None)


_ADVICE = (
    "try attn_implementation='eager' when the model is loaded; shapes must not depend on values "
    "(`.item()`, `if tensor:`, boolean indexing): rewrite that module, or export the part of the model without it"
)


def _not_captured(error: Exception, module: str | None) -> ExportError:
    reason = _first_line(error)
    if reason.startswith("Constraints violated"):  # torch names the axes by places in its own arguments
        return ExportError(
            "torch.export cannot capture the model: its code takes a batch or length for fixed",
            remedy="give example_inputs={'input_ids': …} of the size that it is to have: with them such an axis is fixed",
        )
    message = f"torch.export cannot capture the model: {type(error).__name__}: {printable(reason, 400)}"
    return ExportError(message, module=module, remedy=_ADVICE)


def _not_translated(error: Exception, program: Any) -> ExportError:
    """Of an operator that has no translation: the deepest exception names it, and the captured graph says where it is."""
    *_, cause = causes(error)
    reason = _first_line(cause) or type(cause).__name__
    graphs = [program.graph]
    with contextlib.suppress(Exception):  # an error is being told already
        graphs.append(program.run_decompositions().graph)  # as the exporter takes it apart further
    operators = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    named = [node for node in operators if repr(node.target) in reason or str(node.target) in reason]
    stacks = [[path for path, _ in (node.meta.get("nn_module_stack") or {}).values()] for node in named]
    return ExportError(
        f"there is no ONNX operator for what the model computes: {printable(reason, 400)}",
        module=next((stack[-1].removeprefix(_PREFIX) for stack in stacks if stack), None),
        remedy="replace that module by one of plain torch operations",
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


@contextmanager
def _own_errors(what: str) -> Iterator[None]:
    """Errors of reading a weight as they are, whatever the passes around it made of them."""
    try:
        yield
    except Exception as error:
        chain = [*causes(error)]  # passes wrap each other's errors in their own words
        own = next((cause for cause in chain if isinstance(cause, (OFTSurgeryError, OSError))), None)
        if own is not None:
            raise own from None
        deepest = chain[-1]
        raise ExportError(
            f"the graph cannot be {what}: {type(deepest).__name__}: {printable(deepest, 400)}",
            remedy="report it, with the model's config",
        ) from error


_NOISY = ("torch", "onnxscript", "onnx_ir", "onnx")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript say about themselves while they work; the model's own warnings stay."""
    names = {*_NOISY, *logging.root.manager.loggerDict}
    levels = {log: log.level for log in map(logging.getLogger, names) if log.name.partition(".")[0] in _NOISY}
    with warnings.catch_warnings():
        for name in _NOISY:
            warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            for log in levels:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in levels.items():
                log.setLevel(level)


# --- the graph --------------------------------------------------------------------------------------------------------


def _name_axes(model: Any, inputs: Mapping[str, tuple[Tensor, Mapping[int, str | None]]]) -> None:
    """Names of dynamic axes in place of torch's symbols, sums of them included: the given ones, else ``batch`` for the
    first axis of the first input and ``<input>_<axis>`` for others. What torch found to be static is a number.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    for i, value in enumerate(model.graph.inputs):
        for axis, name in inputs[value.name][1].items():
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value.isidentifier():
                usual = "batch" if i == axis == 0 else re.sub(r"\W", "_", f"{value.name}_{axis}")
                names.setdefault(dim.value, name or usual)
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(symbol)}(?!\w)" for symbol in longest_first))

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, ir.SymbolicDim) or not dim.value:
            return dim
        if dim.value.isdigit():
            return int(dim.value)
        return pattern.sub(lambda m: names[m[0]], dim.value) if names else dim

    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _values(graph: Any) -> Iterator[Any]:
    """All that has a name in a graph, those inside it included."""
    import onnx_ir as ir

    yield from (*graph.inputs, *graph.initializers.values())
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _fill(model: Any, values: Mapping[str, Read]) -> None:
    """Give the initializers their values and their names in the model."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not name.startswith(_PREFIX):
            continue
        graph.initializers.pop(name)
        value.name = name.removeprefix(_PREFIX)
        read = values.get(value.name)
        if read is not None:
            array = functools.partial(lambda read: read().contiguous().numpy(), read)
            value.const_value = _lazy(value.name, value.const_value.dtype, value.shape, array)
        graph.initializers.add(value)


def _lazy(name: str, dtype: Any, shape: Sequence[int], array: Callable[[], np.ndarray[Any, Any]]) -> Any:
    """A tensor of a graph whose values are asked for when they are written."""
    import onnx_ir as ir

    return ir.LazyTensor(lambda: ir.tensor(array(), name=name), dtype, ir.Shape(shape), name=name)


def _may_fold(node: Any) -> bool | None:
    """No constant in place of a weight: what comes of it would be held in memory, and dequantised codes are no codes."""
    import onnx_ir as ir

    return False if any(v is not None and isinstance(v.const_value, ir.LazyTensor) for v in node.inputs) else None


def _transpose_weights(model: Any) -> None:
    """Store weights as MatMul takes them, ``(in, out)``, where all that a graph does with one is to transpose it:
    onnxruntime would do so at each load, and hold both.
    """
    import onnx_ir as ir

    graph = model.graph
    for value in list(graph.initializers.values()):
        users = [use.node for use in value.uses()]
        if not users or value.is_graph_output() or not all(_transposes(node) for node in users):
            continue
        old = value.const_value
        value.shape = ir.Shape(list(old.shape)[::-1])
        array = functools.partial(lambda old: np.ascontiguousarray(old.numpy().T), old)
        value.const_value = _lazy(value.name, old.dtype, value.shape, array)
        for node in users:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)


def _transposes(node: Any) -> bool:
    perm = node.attributes.get("perm")
    return (
        node.op_type == "Transpose"
        and node.domain == ""
        and perm is not None
        and list(perm.as_ints()) == [1, 0]
        and not node.outputs[0].is_graph_output()
        and node.graph is not None
    )


def external(path: Path) -> Path:
    """Where a graph's weights are, if they have a file of their own."""
    return path.with_name(f"{path.name}.data")


def write(model: Any, path: Path) -> int:
    """Write a captured graph, one weight at a time where they have a file of their own; returns their bytes.

    Raises:
        NonFiniteError: a weight is not finite in the graph's dtype.
    """
    import onnx_ir as ir

    held = [value.const_value for value in model.graph.initializers.values()]
    nbytes: int = sum(tensor.nbytes for tensor in held if tensor is not None)
    data = external(path).name if nbytes > _SINGLE_FILE_BYTES else None
    with _quiet(), _own_errors("written"):
        ir.save(model, path, external_data=data, size_threshold_bytes=1024, alignment=4096)
    return nbytes
