"""Idle layers: the owner of such a layer reads its weight and never calls the layer. A live adapter on it does nothing,
so a fold must do nothing either.

peft puts its own layer in the place of the target layer, and code that reads ``layer.weight`` gets the base's weight. The
code of the owner's class shows whether the owner reads or calls: ``self.dt_proj.weight @ x`` reads the weight, and
``self.dt_proj(x)`` calls the layer. The code is parsed and never run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType, MappingProxyType
from typing import Any, Literal

from torch import nn

#: methods that make, tie or hand over layers, and that compute nothing from a layer
_SETUP = frozenset(
    {
        "_init_weights", "init_weights", "reset_parameters", "tie_weights", "_tie_weights", "get_input_embeddings",
        "set_input_embeddings", "get_output_embeddings", "set_output_embeddings",
    }
)  # fmt: skip
#: attributes of a layer or of a weight that do not depend on the weight's values
_FACTS = frozenset(
    {
        "dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_meta", "requires_grad", "requires_grad_", "in_features",
        "out_features", "num_embeddings", "embedding_dim",
    }
)  # fmt: skip
#: class of transformers whose code shows neither use → the idle layer, and whether the class calls the layer if the model was
#: loaded quantised
_EXCEPTIONS: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "FalconMambaMixer": ("dt_proj", True),
        "JambaMambaMixer": ("dt_proj", True),
        "OneFormerTransformerModule": ("queries_embedder", False),  # another module gets the layer and reads its weight
    }
)

_Use = Literal["reads", "calls"]


def is_idle(modules: Mapping[str, nn.Module], path: str, *, quantised: bool) -> bool:
    """Whether the owner of the module at ``path`` reads the module's weight and never calls the module.

    Args:
        modules: ``{path: module}`` of the model.
        quantised: whether the model was loaded through a quantiser.
    """
    if isinstance(modules.get(path), nn.modules.linear.NonDynamicallyQuantizableLinear):
        return True  # nn.MultiheadAttention's out_proj
    above, _, name = path.rpartition(".")
    if isinstance(modules.get(above), (nn.ModuleList, nn.ModuleDict)):
        above, _, name = above.rpartition(".")  # self.name[i].weight
    owner: Any = type(modules.get(above))
    for cls in owner.__mro__:
        layer, called = _EXCEPTIONS.get(cls.__name__, (None, False))
        if layer == name:
            return not (called and quantised)
    if _uses(owner, None, name) != {"reads"} or _hands_itself_over(owner):
        return False
    parts = above.split(".")
    around: list[Any] = [type(modules.get(".".join(parts[:i]))) for i in range(len(parts))]
    return not any("calls" in _uses(cls, parts[-1], name) for cls in around if above)


@cache
def _uses(cls: type[Any], parent: str | None, layer: str) -> frozenset[_Use]:
    """The uses of ``self.layer`` in the code of a class, or the calls of the ``layer`` of the class's part ``parent``."""
    found = set()
    for method, tree in _methods(cls, layer):
        over = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == layer and _is_of(node.value, parent):
                use = _use(node, over)
                if parent is not None:  # of the code around the owner, only calls count
                    use = "calls" if getattr(over.get(node), "func", None) is node else None
                if use == "calls" or (use == "reads" and method != "__init__"):
                    found.add(use)
    return frozenset(found)


@cache
def _hands_itself_over(cls: type[Any]) -> bool:
    """Whether ``forward`` gives the module itself to another object of its own, which may call any layer of the module: the
    attention of diffusers' models computes in ``self.processor(self, …)``.
    """
    forward = inspect.unwrap(getattr(cls, "forward", None) or (lambda: None))
    calls = (node for node in ast.walk(_parsed(forward)) if isinstance(node, ast.Call))
    return any(
        isinstance(node.func, ast.Attribute)
        and _is_of(node.func.value, None)
        and any(_is_of(a, None) for a in node.args)
        for node in calls
    )


def _is_of(value: ast.expr, parent: str | None) -> bool:
    """Whether an expression is ``self``, or the part ``parent`` if a parent is given."""
    if parent is None:
        return isinstance(value, ast.Name) and value.id == "self"
    if parent.isdigit():  # `for block in self.blocks: block.layer(x)`, `self.blocks[0].layer(x)`
        return isinstance(value, ast.Subscript) or (isinstance(value, ast.Name) and value.id != "self")
    return isinstance(value, ast.Attribute) and value.attr == parent


def _use(node: ast.AST, over: Mapping[ast.AST, ast.AST]) -> _Use | None:
    """The use of a layer at ``node``: "reads" for a read of the layer's weight or bias, None for a look at facts or a test of
    the layer, and "calls" for everything else.
    """
    while isinstance(up := over.get(node), ast.Subscript) and up.value is node:
        node = up
    asked = up.attr if isinstance(up, ast.Attribute) else ""
    if asked in ("weight", "bias"):
        then = over.get(up)  # type: ignore[arg-type]
        reads = isinstance(up.ctx, ast.Load) and not (isinstance(then, ast.Attribute) and then.attr in _FACTS)  # type: ignore[union-attr]
        return "reads" if reads else None
    tested = isinstance(up, ast.Call) and isinstance(up.func, ast.Name) and up.func.id in ("isinstance", "hasattr")
    stored = isinstance(getattr(node, "ctx", None), ast.Store)
    return None if asked in _FACTS or tested or stored or isinstance(up, ast.Compare) else "calls"


def _methods(cls: type[Any], layer: str) -> Iterator[tuple[str, ast.Module]]:
    """``(name, code)`` of the methods of a class and of its bases that name the layer, without torch's own classes."""
    for base in cls.__mro__:
        members = vars(base).items() if issubclass(base, nn.Module) and not base.__module__.startswith("torch.") else ()
        for name, member in members:
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            if name not in _SETUP and inspect.isfunction(function) and layer in _named(function.__code__):
                yield name, _parsed(function)


def _named(code: CodeType) -> Iterator[str]:
    """The names of attributes and globals in compiled code, and in the functions within the code."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(constant)


@cache
def _parsed(function: Any) -> ast.Module:
    """The syntax tree of a function; an empty tree for a function without readable source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # the function was made at run time, or is a lambda within a line
        return ast.Module([], [])
