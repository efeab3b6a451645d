""":func:`capture_graph` captures a model with torch.export and translates the capture to ONNX, or says why a step fails."""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.errors import ExportError, causes, printable
from oftsurgery.formats.base import OPSET
from oftsurgery.stores.modules import distinct, modules_of

from .graph import MODULE_PREFIX, fill_values, may_fold, name_axes, named_values, transpose_weights
from .placeholders import Read
from .toolchain import own_errors, quiet


def capture_graph(
    module: Any,
    inputs: Mapping[str, tuple[Tensor, Mapping[int, str | None]]],
    outputs: Sequence[str],
    values: Mapping[str, Read],
    step: Callable[[str], None] = lambda _: None,
) -> Any:
    """The graph of ``module``, which takes its inputs in order and returns a tuple of tensors.

    Args:
        module: a module over placeholders.
        inputs: ``{name: (example, {axis: name of the dynamic axis, or None where torch decides})}``.
        outputs: the outputs' names.
        values: the placeholders' values, by their names in ``module.model``.
        step: function that is called at each stage.

    Returns:
        ``onnx_ir.Model``; its initializers read their values when they are written.

    Raises:
        ExportError: torch cannot capture the module, or ONNX has no operator for a part of the module.
    """
    import onnx_ir as ir
    from onnxscript import optimizer

    args = tuple(tensor.contiguous() for tensor, _ in inputs.values())  # strides would become symbols
    auto, dynamic = torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC
    dims = tuple({a: auto if name is None else dynamic for a, name in axes.items()} for _, axes in inputs.values())
    step("capture with torch.export")
    with quiet():
        try:
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # a failed capture prints its graph
                program = torch.export.export(module, args, dynamic_shapes=(dims,), strict=False)
        except Exception as error:  # the model's code and torch raise errors of any kind during the capture
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
        except Exception as error:  # each operator's translation raises errors of its own kinds
            raise _not_translated(error, program) from error
        name_axes(model, inputs)
        fill_values(model, values)
        step("optimise")
        with own_errors("optimised"):
            optimizer.optimize_ir(model, should_fold=may_fold)
    transpose_weights(model)
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    for part in (model, model.graph, *nodes, *named_values(model.graph)):
        part.metadata_props.clear()  # the properties hold paths of this machine and torch's own view of the graph
    return model


def _deepest(error: BaseException, model: nn.Module) -> str | None:
    """The path of the module whose forward raised an error; None for the model itself."""
    paths = {id(module): path for path, module in distinct(modules_of(model)).items()}
    frames = [frame for cause in causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    return next(filter(None, (paths.get(id(frame.f_locals.get("self"))) for frame in reversed(frames))), None)


_ADVICE = (
    "load the model with attn_implementation='eager'; or rewrite the module so that no shape depends on values "
    "(`.item()`, `if tensor:`, boolean indexing); or export the part of the model without the module"
)


def _not_captured(error: Exception, module: str | None) -> ExportError:
    """The error for a model that torch.export cannot capture."""
    reason = _first_line(error)
    if reason.startswith("Constraints violated"):  # torch names the axes by places in its own arguments
        message = "torch.export cannot capture the model: the model's code fixes the batch or the length"
        remedy = "give example_inputs={'input_ids': …} of the size that the graph is to have, which fixes such an axis"
        return ExportError(message, remedy=remedy)
    message = f"torch.export cannot capture the model: {type(error).__name__}: {printable(reason, 400)}"
    return ExportError(message, module=module, remedy=_ADVICE)


def _not_translated(error: Exception, program: Any) -> ExportError:
    """The error of an operator without a translation: the deepest exception names the operator, the graph its module."""
    *_, cause = causes(error)
    reason = _first_line(cause) or type(cause).__name__
    graphs = [program.graph]
    with contextlib.suppress(Exception):  # an error is being reported already, and must not be hidden by another one
        graphs.append(program.run_decompositions().graph)  # the exporter decomposes the graph in the same way
    operators = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    named = [node for node in operators if repr(node.target) in reason or str(node.target) in reason]
    stacks = [[path for path, _ in (node.meta.get("nn_module_stack") or {}).values()] for node in named]
    message = f"ONNX has no operator for a part of the model: {printable(reason, 400)}"
    module = next((stack[-1].removeprefix(MODULE_PREFIX) for stack in stacks if stack), None)
    return ExportError(message, module=module, remedy="replace the module by a module of plain torch operations")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")
