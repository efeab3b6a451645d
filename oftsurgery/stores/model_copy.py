"""A copy of a model's structure over the same storages, so that a pure fold costs only the tensors that it changes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from oftsurgery.errors import StateError
from oftsurgery.formats.all_formats import format_of_parameter
from oftsurgery.formats.quant_state import copy_quant_state

from .layers import hooks_of, quant_states
from .modules import without_replicas

M = TypeVar("M", bound=nn.Module)


def share_model(model: M, instead: Mapping[int, nn.Module] | None = None) -> M:
    """A deep copy of ``model`` whose parameters and buffers share the storages of the original's.

    Modules, configs and hooks are copies; Parameters are objects of their own, so that moving, casting or freezing the
    copy leaves the original as it is. A write into a shared tensor in place (training, BatchNorm statistics) changes
    both models. Shells that replicate the model (``DistributedDataParallel``) are left out.

    Args:
        instead: ``{id of a wrapper: the module inside it that takes the wrapper's place in the copy}``.

    Raises:
        StateError: the model holds something that cannot be copied.
    """
    instead = instead or {}
    model = without_replicas(model)  # type: ignore[assignment]
    memo: dict[int, Any] = {}
    try:
        for module in model.modules():
            memo.update(_shared_by(module, memo))
        for wrapper, inside in instead.items():
            memo[wrapper] = copy.deepcopy(inside, memo)
        shared = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        message = f"the model holds something that cannot be copied ({error})"
        remedy = "fold with inplace=True, which copies only modules that stand in two places; or remove the object from the model"
        raise StateError(message, remedy=remedy) from error
    for old in model.modules():
        new = memo.get(id(old))
        if new is None:  # the module is in a wrapper that another module replaces
            continue
        weight = new._parameters.get("weight")
        if getattr(weight, "module", None) is old:
            weight.module = new
        if old._compiled_call_impl is not None:
            compile_like(old, new)
    return shared


def _shared_by(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """``{id: object for the copy}`` of a module's objects that a deep copy must not copy, except objects in ``memo``."""
    uses: dict[int, Any] = {id(s): memo.get(id(s)) or copy_quant_state(s) for s in quant_states(module).values()}
    for parameter in module._parameters.values():
        if parameter is None or id(parameter) in memo:
            continue
        alias: Any = format_of_parameter(parameter).alias(parameter)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            alias.quant_state = uses.get(id(state)) or memo.get(id(state)) or alias.quant_state
        uses[id(parameter)] = alias
    for holder in (module.__dict__, module._buffers, getattr(getattr(module, "state", None), "__dict__", {})):
        uses.update({id(t): t for t in holder.values() if isinstance(t, torch.Tensor)})
    for hook in hooks_of(module):
        # accelerate's maps of offloaded weights and tied pointers are read only, and may hold the whole model
        maps = (getattr(hook, name, None) for name in ("weights_map", "tied_params_map"))
        uses.update({id(v): v for v in maps if v is not None})
    return uses


def compile_like(old: nn.Module, new: nn.Module) -> None:
    """Compile ``new`` as ``old`` was compiled: Module.compile() leaves a callable that is not copied, and keeps its
    arguments in the closure alone.
    """
    config = getattr(old._compiled_call_impl, "get_compiler_config", None)
    context = inspect.getclosurevars(config).nonlocals.get("self") if config is not None else None
    if context is None:
        new.compile()
    else:
        new._compiled_call_impl = context(new._call_impl)
