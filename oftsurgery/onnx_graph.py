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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import codecs
from .codecs import EncodedWeight, WeightFormat
from .dtypes import name_of
from .errors import ExportError, NonFiniteError, OFTSurgeryError, StateError, causes, needs, printable
from .formats.base import OPSET
from .layers import Layer, offloaded
from .model import inner_model
from .sharing import share_model

__all__ = ["OPSET", "Prepared", "capture", "external", "prepare", "reference", "require_onnx", "size_of", "write"]

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


@dataclass(frozen=True, eq=False)
class Prepared:
    """A structure to capture, and the values that go with it.

    Attributes:
        structure: a copy of the model whose parameters have no storage.
        values: ``{tensor name in the structure: function that gives its value}``.
        kept: ``{path: format}`` of the layers whose 4- or 8-bit codes the graph holds.
        dequantised: ``{path: reason}`` of the quantised layers whose codes the graph does not hold.
        repacked: paths of 4-bit layers that a CPU forward had repacked: their absmax is rounded to bfloat16 for good.
    """

    structure: nn.Module
    values: Mapping[str, Read]
    kept: Mapping[str, str]
    dequantised: Mapping[str, str]
    repacked: tuple[str, ...]


def prepare(model: nn.Module, dtype: torch.dtype, *, quantized: bool = False) -> Prepared:
    """The structure of ``model`` in ``dtype``, without the weights.

    Args:
        model: as it is; it stays so.
        dtype: of the graph: float32 or float16.
        quantized: keep the codes of 4-bit layers (as ``com.microsoft::MatMulBnb4``) and int8 ones (as
            ``DequantizeLinear``); otherwise everything is dequantised.

    Raises:
        StateError: weights that are not loaded, or in a state in which they cannot be read.
        FormatError: stored in a way that is not known.
    """
    copy: Any = _bare_copy(model)
    _run_all_experts(copy)
    builder = _Builder(dtype, quantized, _dtypes(model, dtype))
    copy = _rebuilt(model, copy, builder.placeholder, dtype)
    values = {
        name: builder.reads[id(p)]
        for name, p in (*copy.named_parameters(remove_duplicate=False), *copy.named_buffers(remove_duplicate=False))
        if id(p) in builder.reads
    }
    return Prepared(copy, values, builder.kept, builder.dequantised, tuple(builder.repacked))


class _Builder:
    """Puts placeholders in place of weights, and notes what each stands for."""

    def __init__(self, dtype: torch.dtype, quantized: bool, dtype_of: Callable[[str], torch.dtype]) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.dtype = dtype
        self.quantized = quantized
        self.dtype_of = dtype_of
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads: dict[int, Read] = {}  # by the placeholder's id; the structure keeps them alive
        self.tied: dict[int, nn.Parameter] = {}  # by the original's
        self.kept: dict[str, str] = {}
        self.dequantised: dict[str, str] = {}
        self.repacked: list[str] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, read: Read) -> Tensor:
        with self.fake:
            placeholder = torch.empty(tuple(shape), dtype=dtype)
        self.reads[id(placeholder)] = read
        return placeholder

    def parameter(self, original: Tensor, name: str, shape: Sequence[int], read: Read) -> nn.Parameter:
        """One placeholder for each tensor of the model, so that what is tied stays so."""
        if id(original) not in self.tied:
            dtype = self.dtype_of(name)
            with self.fake:
                new = nn.Parameter(torch.empty(tuple(shape), dtype=dtype), requires_grad=False)
            self.reads[id(new)] = lambda: _narrowed(read(), dtype, name)
            self.tied[id(original)] = new
        return self.tied[id(original)]

    def placeholder(self, layer: Layer, module: nn.Module) -> nn.Module:
        return self.replacement(layer) if layer.bitsandbytes else self.emptied(layer, module)

    def emptied(self, layer: Layer, module: nn.Module) -> nn.Module:
        """``module`` with placeholders for its own parameters; buffers are small, and stay."""
        for local, original in layer.module._parameters.items():
            if original is None:
                continue
            name = f"{layer.path}.{local}".lstrip(".")
            if nn.parameter.is_lazy(original):
                message, remedy = "the module is lazy and has no weight yet", "run one forward first"
                raise StateError(message, module=layer.path, remedy=remedy)
            if original.is_floating_point():
                read = functools.partial(_value, layer.module, local)
                _set(module, local, self.parameter(original, name, original.shape, read))
            else:
                _set(module, local, nn.Parameter(_value(layer.module, local).cpu(), requires_grad=False))
        for local, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{layer.path}.{local}".lstrip(".")
            value = _value(layer.module, local).cpu()
            # transformers computes its own (rotary frequencies) in float32, whatever the dtype of the weights
            computed = local in module._non_persistent_buffers_set and hasattr(module, "config")
            if value.is_floating_point() and not computed and self.dtype_of(name) == self.dtype:
                value = _narrowed(value, self.dtype, name)
            module._buffers[local] = value
        return module

    def replacement(self, layer: Layer) -> nn.Module:
        """What stands for a bitsandbytes layer in the graph."""
        encoded, home = layer.read()
        if layer.repacked:
            self.repacked.append(layer.path)
        weight = layer.module._parameters["weight"]
        assert weight is not None  # noqa: S101 - it is quantised
        keep = self.quantized and encoded.format.quantised
        reason = _obstacle(layer, encoded.format, tied=id(weight) in self.tied) if keep else None
        bias = layer.module._parameters.get("bias")
        new: Any
        if keep and reason is None:
            f = encoded.format
            self.kept[layer.path] = home.label
            new = _QuantizedLinear(f, self.dtype_of(f"{layer.path}.weight"))
            # 4-bit: codes (out·in/2,) uint8 as bitsandbytes packs them and the absmax, double quantisation undone; int8:
            # codes (out, in) and SCB/127
            for local, part in (("qweight", f.kind.codes), (f.kind.graph_scales, f.kind.steps)):
                like, read = part(encoded), functools.partial(_read, layer, part)
                new.register_buffer(local, self.empty(like.shape, like.dtype, read))
        else:
            if reason is not None:
                self.dequantised[layer.path] = reason
            rows, columns = encoded.format.shape
            new = _plain(layer)
            read = functools.partial(_read, layer, codecs.decode)
            new.weight = self.parameter(weight, f"{layer.path}.weight", (rows, columns), read)
        if bias is not None:
            read = functools.partial(_value, layer.module, "bias")
            new.bias = self.parameter(bias, f"{layer.path}.bias", bias.shape, read)
        return new.eval()  # type: ignore[no-any-return]


def _obstacle(layer: Layer, f: WeightFormat, *, tied: bool) -> str | None:
    """Why the graph cannot hold this layer's codes, or None."""
    if layer.kind != "linear":
        return f"an {layer.kind}: only linear layers can stay quantised"
    if tied:
        return "its weight is shared with a module that is dequantised"
    return f.kind.graph_obstacle(f)


class _QuantizedLinear(nn.Module):
    """A linear layer whose codes go into the graph; it can be captured and not run."""

    qweight: Tensor

    def __init__(self, format: WeightFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.format = format
        self.dtype = dtype
        self.out_features, self.in_features = format.shape
        self.bias: nn.Parameter | None = None

    @property
    def weight(self) -> Tensor:
        """Models ask for its dtype."""
        return torch.empty(0, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[-1] == self.in_features)  # type: ignore[no-untyped-call]  # torch knows nothing of the operator
        f, scales = self.format, getattr(self, self.format.kind.graph_scales)
        y = f.kind.graph_product(x, self.qweight, scales, f)
        return y if self.bias is None else y + self.bias


def reference(model: nn.Module) -> nn.Module:
    """What the graph is compared with: a copy of ``model`` on the CPU that computes in float32 with the exact weights,
    each decoded when it is read, so that there is one at a time.
    """
    return _rebuilt(model, _bare_copy(model), _in_float32, torch.float32)


def _plain(layer: Layer) -> nn.Module:
    """The dense counterpart of a bitsandbytes layer, without values or bias."""
    rows, columns = layer.read()[0].format.shape
    if layer.kind == "embedding":
        padding = getattr(layer.module, "padding_idx", None)
        return nn.Embedding(rows, columns, padding_idx=padding, device="meta")
    return nn.Linear(columns, rows, bias=False, device="meta")


def _in_float32(layer: Layer, module: nn.Module) -> nn.Module:
    """The module of a copy, or what stands for it, with the values of the layer's: small ones as they are, large ones to be
    read when they are used.
    """
    new: Any = module
    if layer.bitsandbytes:
        new = _plain(layer)
        new.bias = module._parameters.get("bias")
    original = layer.module
    reads: dict[str, Read] = {}
    for local, parameter in original._parameters.items():
        if parameter is None:
            continue
        if local == "weight" and layer.bitsandbytes:
            reads[local] = functools.partial(_read, layer, codecs.decode)
        elif parameter.is_floating_point() and parameter.numel() > 1 << 18 and not isinstance(original, nn.RNNBase):
            reads[local] = functools.partial(_float32, original, local)
        else:
            _set(new, local, nn.Parameter(_float32(original, local), requires_grad=False))
    for local, buffer in original._buffers.items():
        if buffer is not None:
            new._buffers[local] = _float32(original, local)
    _read_on_access(new, reads)
    return new.eval()  # type: ignore[no-any-return]


def _read(layer: Layer, part: Callable[[EncodedWeight], Tensor]) -> Tensor:
    return part(layer.read()[0]).detach().cpu()


def _float32(module: nn.Module, local: str) -> Tensor:
    """A tensor of a module, on the CPU; in float32 if it is floating point."""
    value = _value(module, local).cpu()
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


def _bare_copy(model: nn.Module) -> nn.Module:
    """The structure alone: no accelerate hooks, nothing compiled, in eval mode, for one forward without a cache."""
    copy = share_model(inner_model(model))
    for module in copy.modules():
        module._compiled_call_impl = None
        if "_hf_hook" in module.__dict__:
            for name in ("_hf_hook", "_old_forward", "forward"):
                module.__dict__.pop(name, None)
    return copy.eval()


def _rebuilt(
    model: nn.Module, copy: nn.Module, make: Callable[[Layer, nn.Module], nn.Module], dtype: torch.dtype
) -> nn.Module:
    """A copy of ``model`` that computes in ``dtype``, with what ``make`` gives for each layer in the place of the copy's
    module.
    """
    copies = dict(copy.named_modules())
    for path, original in inner_model(model).named_modules():
        copy = _put(copy, copies[path], make(Layer(path, original), copies[path]))
    config: Any = getattr(copy, "config", None)
    if getattr(config, "dtype", None) is not None:
        config.dtype = dtype
    return copy


def _put(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``root`` with ``new`` wherever ``old`` was."""
    if old is new:
        return root
    if root is old:
        return new
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return root


def _set(module: nn.Module, local: str, parameter: nn.Parameter) -> None:
    if isinstance(module, nn.RNNBase):
        setattr(module, local, parameter)  # it keeps a list of its weights too
    else:
        module._parameters[local] = parameter


def _value(module: nn.Module, local: str) -> Tensor:
    tensor: Tensor | None = module._parameters.get(local)
    if tensor is None:
        tensor = module._buffers[local]
    assert tensor is not None  # noqa: S101 - callers ask for what is there
    return (offloaded(module, local) if tensor.is_meta else tensor).detach()


def _narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Raises NonFiniteError where the narrower dtype has no such number."""
    new = value.cpu().to(dtype)
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
    module: nn.Module,
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
    trail = _Trail(module)
    step("capture with torch.export")
    with _quiet():
        try:
            with trail, torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # a failed capture prints its graph
                program = torch.export.export(module, args, dynamic_shapes=(dims,), strict=False)
        except Exception as error:
            raise _not_captured(error, trail.deepest) from error
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
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    found = (*model.graph.inputs, *model.graph.initializers.values(), *(v for node in nodes for v in node.outputs))
    for part in (model, model.graph, *nodes, *found):
        part.metadata_props.clear()  # paths and lines of this machine, and torch's own view of the graph
    return model


class _Trail:
    """Follows a forward from module to module, so that an error can be told of the one that it came from."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.deepest = ""
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for path, module in self.root.named_modules():
            enter = functools.partial(self._enter, path.removeprefix(_PREFIX))
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(
                module.register_forward_hook(functools.partial(self._leave, path.removeprefix(_PREFIX)))
            )

    def _enter(self, path: str, *_: object) -> None:
        self.deepest = path

    def _leave(self, path: str, *_: object) -> None:
        self.deepest = path.rpartition(".")[0]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


_ADVICE = (
    "try attn_implementation='eager' when the model is loaded; shapes must not depend on values "
    "(`.item()`, `if tensor:`, boolean indexing): rewrite that module, or export the part of the model without it"
)


def _not_captured(error: Exception, module: str) -> ExportError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    if reason.startswith("Constraints violated"):  # torch names the axes by places in its own arguments
        return ExportError(
            "torch.export cannot capture the model: its code takes a batch or length for fixed",
            remedy="give example_inputs={'input_ids': …} of the size that it is to have: with them such an axis is fixed",
        )
    return ExportError(
        f"torch.export cannot capture the model: {type(error).__name__}: {printable(reason, 400)}",
        module=module or None,
        remedy=_ADVICE,
    )


def _not_translated(error: Exception, program: Any) -> ExportError:
    """Of an operator that has no translation: the deepest exception names it, and the captured graph says where it is."""
    *_, cause = causes(error)
    reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    where = next((path for graph in _graphs(program) for path in _where(graph, reason)), None)
    return ExportError(
        f"there is no ONNX operator for what the model computes: {printable(reason, 400)}",
        module=where.removeprefix(_PREFIX) if where else None,
        remedy="replace that module by one of plain torch operations",
    )


def _graphs(program: Any) -> Iterator[Any]:
    """As captured, and as the exporter takes it apart further."""
    yield program.graph
    with contextlib.suppress(Exception):  # an error is being told already
        yield program.run_decompositions().graph


def _where(graph: Any, reason: str) -> Iterator[str]:
    """Paths of the modules whose operators ``reason`` names."""
    for node in graph.nodes:
        if node.op == "call_function" and (repr(node.target) in reason or str(node.target) in reason):
            stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            yield from stack[-1:]


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
    loggers = [logging.getLogger(name) for name in _NOISY]
    loggers += [
        log
        for name, log in logging.root.manager.loggerDict.items()
        if name.startswith(tuple(f"{n}." for n in _NOISY)) and isinstance(log, logging.Logger)
    ]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings():
        for name in _NOISY:
            warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            for log in loggers:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


# --- the graph --------------------------------------------------------------------------------------------------------


def _name_axes(model: Any, inputs: Mapping[str, tuple[Tensor, Mapping[int, str | None]]]) -> None:
    """Names of dynamic axes in place of torch's symbols, sums of them included: the given ones, else ``batch`` for the
    first axis of the first input and ``<input>_<axis>`` for others. What torch found to be static is a number.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    for i, (value, (input_name, axes)) in enumerate(
        zip(model.graph.inputs, ((n, a) for n, (_, a) in inputs.items()), strict=True)
    ):
        for axis, name in axes.items():
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value.isidentifier():
                usual = "batch" if i == axis == 0 else re.sub(r"\W", "_", f"{input_name}_{axis}")
                names.setdefault(dim.value, name or usual)
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(symbol)}(?!\w)" for symbol in longest_first))

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, ir.SymbolicDim) or not dim.value:
            return dim
        if dim.value.isdigit():
            return int(dim.value)
        return pattern.sub(lambda m: names[m[0]], dim.value) if names else dim

    graph = model.graph
    nodes = ir.traversal.RecursiveGraphIterator(graph)
    for value in (*graph.inputs, *graph.initializers.values(), *(v for node in nodes for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _fill(model: Any, values: Mapping[str, Read]) -> None:
    """Give the initializers their values and their names in the model."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not name.startswith(_PREFIX):
            continue
        read = values.get(name.removeprefix(_PREFIX))
        if read is not None:
            value.const_value = _lazy(name.removeprefix(_PREFIX), value.const_value.dtype, value.shape, read)
        graph.initializers.pop(name)
        value.name = name.removeprefix(_PREFIX)
        graph.initializers.add(value)


def _lazy(name: str, dtype: Any, shape: Any, read: Read) -> Any:
    import onnx_ir as ir

    return ir.LazyTensor(
        lambda: ir.tensor(read().contiguous().numpy(), name=name), dtype, ir.Shape(list(shape)), name=name
    )


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
        value.const_value = ir.LazyTensor(
            functools.partial(_transposed, old), old.dtype, ir.Shape(list(old.shape)[::-1]), name=value.name
        )
        value.shape = ir.Shape(list(old.shape)[::-1])
        for node in users:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)


def _transposed(tensor: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=tensor.name)


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


def size_of(model: Any) -> int:
    """Bytes of a captured graph's weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def external(path: Path) -> Path:
    """Where a graph's weights are, if they have a file of their own."""
    return path.with_name(f"{path.name}.data")


def write(model: Any, path: Path) -> int:
    """Write a captured graph, one weight at a time where they have a file of their own; returns their bytes.

    Raises:
        NonFiniteError: a weight is not finite in the graph's dtype.
    """
    import onnx_ir as ir

    nbytes = size_of(model)
    data = external(path).name if nbytes > _SINGLE_FILE_BYTES else None
    with _quiet(), _own_errors("written"):
        ir.save(model, path, external_data=data, size_threshold_bytes=1024, alignment=4096)
    return nbytes
