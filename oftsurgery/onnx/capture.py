""":func:`capture_graph` has torch.export capture a model and translates it to ONNX, or says why that fails."""

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
    with quiet():
        try:
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # a failed capture prints its graph
                program = torch.export.export(module, args, dynamic_shapes=(dims,), strict=False)
        except Exception as error:  # whatever the model's code and torch raise while it is traced
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
        except Exception as error:  # as many kinds as there are operators
            raise _not_translated(error, program) from error
        name_axes(model, inputs)
        fill_values(model, values)
        step("optimise")
        with own_errors("optimised"):
            optimizer.optimize_ir(model, should_fold=may_fold)
    transpose_weights(model)
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    for part in (model, model.graph, *nodes, *named_values(model.graph)):
        part.metadata_props.clear()  # paths and lines of this machine, and torch's own view of the graph
    return model


def _deepest(error: BaseException, model: nn.Module) -> str | None:
    """Path of the module in whose forward an error came up, None for the model itself."""
    paths = {id(module): path for path, module in distinct(modules_of(model)).items()}
    frames = [frame for cause in causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    return next(filter(None, (paths.get(id(frame.f_locals.get("self"))) for frame in reversed(frames))), None)


_ADVICE = (
    "try attn_implementation='eager' when the model is loaded; shapes must not depend on values "
    "(`.item()`, `if tensor:`, boolean indexing): rewrite that module, or export the part of the model without it"
)


def _not_captured(error: Exception, module: str | None) -> ExportError:
    reason = _first_line(error)
    if reason.startswith("Constraints violated"):  # torch names the axes by places in its own arguments
        message = "torch.export cannot capture the model: its code takes a batch or length for fixed"
        remedy = "give example_inputs={'input_ids': …} of the size that it is to have: with them such an axis is fixed"
        return ExportError(message, remedy=remedy)
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
    message = f"there is no ONNX operator for what the model computes: {printable(reason, 400)}"
    module = next((stack[-1].removeprefix(MODULE_PREFIX) for stack in stacks if stack), None)
    return ExportError(message, module=module, remedy="replace that module by one of plain torch operations")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")
