"""Functions that name the axes and weights of a captured graph; :func:`write_graph` writes the graph."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .placeholders import Read
from .toolchain import own_errors, quiet

#: larger models have their weights in a file of their own: protobuf holds at most 2 GB, and writing a single file takes
#: several copies of the weights in memory
_SINGLE_FILE_BYTES = 1 << 30

MODULE_PREFIX = "model."  # the prefix of tensor names in the module that is captured


def name_axes(model: Any, inputs: Mapping[str, tuple[Tensor, Mapping[int, str | None]]]) -> None:
    """Replace torch's symbols for dynamic axes (also in sums) by names: the given names, else ``batch`` for the first axis
    of the first input and ``<input>_<axis>`` for others. Static axes become numbers.
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

    for value in named_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def named_values(graph: Any) -> Iterator[Any]:
    """All named values of a graph and of the graphs inside."""
    import onnx_ir as ir

    yield from (*graph.inputs, *graph.initializers.values())
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def fill_values(model: Any, values: Mapping[str, Read]) -> None:
    """Give the initializers their values, and the names that the tensors have in the model."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not name.startswith(MODULE_PREFIX):
            continue
        graph.initializers.pop(name)
        value.name = name.removeprefix(MODULE_PREFIX)
        read = values.get(value.name)
        if read is not None:
            array = functools.partial(lambda read: read().contiguous().numpy(), read)
            value.const_value = _lazy(value.name, value.const_value.dtype, value.shape, array)
        graph.initializers.add(value)


def _lazy(name: str, dtype: Any, shape: Sequence[int], array: Callable[[], np.ndarray[Any, Any]]) -> Any:
    """A tensor of a graph whose values are read when the graph is written."""
    import onnx_ir as ir

    return ir.LazyTensor(lambda: ir.tensor(array(), name=name), dtype, ir.Shape(shape), name=name)


def may_fold(node: Any) -> bool | None:
    """False for a node that reads a weight: folding it into a constant would hold the result in memory and lose the codes."""
    import onnx_ir as ir

    return False if any(v is not None and isinstance(v.const_value, ir.LazyTensor) for v in node.inputs) else None


def transpose_weights(model: Any) -> None:
    """Store weights as MatMul takes them, ``(in, out)``, where the graph uses a weight only transposed: onnxruntime would
    otherwise transpose the weight at each load, and hold both copies.
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
    """Whether the node swaps the two axes of a matrix, and can be removed."""
    perm = node.attributes.get("perm")
    return (
        node.op_type == "Transpose"
        and node.domain == ""
        and perm is not None
        and list(perm.as_ints()) == [1, 0]
        and not node.outputs[0].is_graph_output()
        and node.graph is not None
    )


def weights_file(path: Path) -> Path:
    """The path of the separate file for the weights of a large graph."""
    return path.with_name(f"{path.name}.data")


def write_graph(model: Any, path: Path) -> int:
    """Write a captured graph and return the bytes of its weights; a separate file gets one weight at a time.

    Raises:
        NonFiniteError: a weight is not finite in the graph's dtype.
    """
    import onnx_ir as ir

    held = [value.const_value for value in model.graph.initializers.values()]
    nbytes: int = sum(tensor.nbytes for tensor in held if tensor is not None)
    data = weights_file(path).name if nbytes > _SINGLE_FILE_BYTES else None
    with quiet(), own_errors("written"):
        ir.save(model, path, external_data=data, size_threshold_bytes=1024, alignment=4096)
    return nbytes
