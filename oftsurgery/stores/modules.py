"""A model's modules and tensors by their paths, without what stands around them to compile, replicate or checkpoint them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from oftsurgery.errors import StateError

#: class of torch's or DeepSpeed's that computes what the one module in it computes → that module's name in it
_AROUND: Mapping[str, str] = MappingProxyType(
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
#: those of them that replicate it
_REPLICATE = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine")


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that ``module`` stands around, or None where ``module`` is a part of the model itself."""
    for cls in type(module).__mro__:
        if cls.__name__ in _AROUND and cls.__module__.partition(".")[0] in ("torch", "deepspeed"):
            if cls.__name__ == "FullyShardedDataParallel":
                raise StateError(
                    "torch's FullyShardedDataParallel holds the model's weights as parts of one flat parameter",
                    remedy="save its full state dict (StateDictType.FULL_STATE_DICT), and load that into the plain model",
                )
            return module._modules[_AROUND[cls.__name__]]
    return None


def inner_model(model: nn.Module) -> nn.Module:
    """The module behind what ``torch.compile``, data parallel classes and the like put around it, or ``model`` itself.

    Raises:
        StateError: the model is sharded by torch's FullyShardedDataParallel.
    """
    return shells_of(model)[-1]


def shells_of(model: nn.Module) -> list[nn.Module]:
    """The model, and one by one what stands inside; :func:`inner_model` comes last."""
    found = [model]
    while (held := _inside(found[-1])) is not None:
        found.append(held)
    return found


def without_replicas(model: nn.Module) -> nn.Module:
    """The model behind what computes it on several devices or processes, which cannot be copied by one of them alone."""
    shells = shells_of(model)
    last = max((i for i, shell in enumerate(shells) if type(shell).__name__ in _REPLICATE), default=-1)
    return shells[last + 1]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """``{path: module}``, every name of a shared one; what stands around modules has no part in the paths."""
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
    """``{name: parameter or buffer}``, tied ones under each of their names."""
    return {
        f"{path}.{name}".lstrip("."): tensor
        for path, m in modules.items()
        for holder in (m._parameters, m._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    }
