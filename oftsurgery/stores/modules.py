"""A model's modules and tensors by path, without the shells around modules: wrappers that compile, replicate or checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from oftsurgery.errors import StateError

#: class of a shell, in torch or DeepSpeed → name of the one module in the shell, whose output the shell returns
_SHELLS: Mapping[str, str] = MappingProxyType(
    {
        "OptimizedModule": "_orig_mod",
        "DataParallel": "module",
        "DistributedDataParallel": "module",
        "AveragedModel": "module",
        "DeepSpeedEngine": "module",
        "ActivationWrapper": "_checkpoint_wrapped_module",
        "FullyShardedDataParallel": "_fsdp_wrapped_module",
    }
)
#: the shells that replicate their module on devices or in processes
_REPLICATE = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine")


def _inside(module: nn.Module) -> nn.Module | None:
    """The module in a shell; None for a module that is not a shell."""
    for cls in type(module).__mro__:
        if cls.__name__ in _SHELLS and cls.__module__.partition(".")[0] in ("torch", "deepspeed"):
            if cls.__name__ == "FullyShardedDataParallel":
                raise StateError(
                    "FullyShardedDataParallel holds the model's weights as parts of one flat parameter",
                    remedy="save the full state dict (StateDictType.FULL_STATE_DICT), and load it into the plain model",
                )
            return module._modules[_SHELLS[cls.__name__]]
    return None


def shells_of(model: nn.Module) -> list[nn.Module]:
    """The shells of a model from outside to inside, and then the model inside them.

    Raises:
        StateError: one of the shells is torch's FullyShardedDataParallel.
    """
    found = [model]
    while (held := _inside(found[-1])) is not None:
        found.append(held)
    return found


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside all of its shells; the model itself if it has no shells."""
    return shells_of(model)[-1]


def without_replicas(model: nn.Module) -> nn.Module:
    """The model without the shells that replicate it, since one process alone cannot copy such a shell."""
    shells = shells_of(model)
    last = max((i for i, shell in enumerate(shells) if type(shell).__name__ in _REPLICATE), default=-1)
    return shells[last + 1]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """``{path: module}`` with every name of a shared module; shells have no part in the paths."""
    return dict(_walk("", model))


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    module = inner_model(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(f"{path}.{name}" if path else name, child)


def distinct(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module once, under its first path."""
    first: dict[int, str] = {}
    for path, module in modules.items():
        first.setdefault(id(module), path)
    return {path: modules[path] for path in first.values()}


def tensors_in(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """``{name: parameter or buffer}``; tied tensors are under each of their names."""
    return {
        f"{path}.{name}".lstrip("."): tensor
        for path, m in modules.items()
        for holder in (m._parameters, m._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    }
