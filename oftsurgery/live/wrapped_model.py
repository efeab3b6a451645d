"""The functions here work on all live layers of a wrapped model: they choose, merge and read the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import StateError, printable
from oftsurgery.folding.memory import transaction
from oftsurgery.stores.modules import inner_model, modules_of

from .layers import LiveLayer, check_known
from .rotation import LiveRotation

ORIGINS_ATTRIBUTE = "_oftsurgery_live"


@dataclass(frozen=True)
class Origin:
    """The facts of a wrapped adapter beside its rotations."""

    config: dict[str, Any]
    dialect: str
    saved: Mapping[str, str]  # {name of a tensor that the adapter brought: content hash of the model's tensor before}


def origins_of(model: nn.Module) -> dict[str, Origin]:
    return dict(inner_model(model).__dict__.get(ORIGINS_ATTRIBUTE, {}))


def original_hashes(model: nn.Module) -> dict[str, str]:
    """``{tensor name: content hash of the base model's values}`` of all tensors that wrapped adapters brought. Call this
    function before :func:`strip` or :func:`unwrap`.
    """
    return {name: before for origin in origins_of(model).values() for name, before in origin.saved.items()}


def live_layers(model: nn.Module) -> dict[str, LiveLayer]:
    """``{path: LiveLayer}`` of a model; each layer once, under the path at which it was wrapped."""
    found: dict[LiveLayer, list[str]] = {}
    for path, module in modules_of(model).items():
        if isinstance(module, LiveLayer):
            found.setdefault(module, []).append(path)
    return {layer.path if layer.path in paths else paths[0]: layer for layer, paths in found.items()}


def active_adapters(model: nn.Module) -> list[str]:
    """Names of a wrapped model's active adapters in the live order.

    Raises:
        StateError: the model is not wrapped, or its layers disagree.
    """
    layers = wrapped_layers(model)
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters))
    for path, layer in layers.items():
        if layer.active_adapters != [name for name in names if name in layer.oft_R]:
            message = "the model's layers have different active adapters"
            raise StateError(
                message, module=path, remedy="choose the same for all: live.set_adapter(model, ['a', 'b'])"
            )
    return names


def set_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Make these adapters active in all layers of a wrapped model, in this order; merged layers are unmerged first.

    Raises:
        StateError: the model has no such adapter, or a name is given twice.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    layers = wrapped_layers(model)
    check_known(names, _names_in(layers))
    wanted = {path: [name for name in names if name in layer.oft_R] for path, layer in layers.items()}
    for path, layer in layers.items():
        layer._check_chain(layer._rotations(wanted[path]))
    for path, layer in layers.items():
        layer.set_adapter(wanted[path])


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """:meth:`LiveLayer.enable_adapters` of all layers of a wrapped model."""
    for layer in wrapped_layers(model).values():
        layer.enable_adapters(enabled)


def merge(model: nn.Module, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> dict[str, float]:
    """:meth:`LiveLayer.merge` of all layers of a wrapped model; after an error no layer is merged.

    Returns:
        ``{path: relative error of storing the merged weight}``.
    """
    layers = wrapped_layers(model)
    if adapter_names is not None:
        check_known(adapter_names, _names_in(layers))
    errors: dict[str, float] = {}
    with transaction() as journal:
        for path, layer in layers.items():
            if not layer.merged:
                journal.append(layer.unmerge)
            names = None if adapter_names is None else [name for name in adapter_names if name in layer.oft_R]
            errors[path] = layer.merge(safe_merge, names)
    return errors


def unmerge(model: nn.Module) -> None:
    """:meth:`LiveLayer.unmerge` of all layers of a wrapped model, bit-exactly."""
    for layer in wrapped_layers(model).values():
        layer.unmerge()


def adapter_of(model: nn.Module, adapter_name: str | None = None) -> OFTAdapter:
    """A live adapter in its present state, trained or not, which can be folded into the base model.

    Args:
        model: a wrapped model.
        adapter_name: the adapter's name; None where the model has only one adapter.

    Raises:
        StateError: the model is not wrapped, or has no such adapter.
    """
    layers = wrapped_layers(model)
    names = _names_in(layers)
    if adapter_name is None:
        if len(names) != 1:
            message = f"the model has {len(names)} live adapters, and none was named"
            raise StateError(message, remedy=f"name one of {', '.join(map(printable, names))} (adapter_name=…)")
        adapter_name = names[0]
    check_known([adapter_name], names)
    origin = origins_of(model).get(adapter_name, Origin({}, "peft-0.21", {}))
    modules = modules_of(model)
    saved: dict[str, Tensor] = {}
    for name in origin.saved:
        path, _, local = name.rpartition(".")
        saved[name] = getattr(modules[path], local).detach().clone()
    rotations_ = {
        path: cast(LiveRotation, layer.oft_R[adapter_name]).rotation()
        for path, layer in layers.items()
        if adapter_name in layer.oft_R
    }
    source = f"live adapter {adapter_name!r}"
    return OFTAdapter(rotations_, saved, dialect=origin.dialect, config=origin.config, source=source)


def read_live(model: nn.Module) -> list[OFTAdapter]:
    """The active adapters in their present state and live order: ``fold(base, read_live(live))`` computes what the
    wrapped model computes.

    Raises:
        StateError: the model is not wrapped, its adapters are disabled, or none is active.
    """
    for path, layer in wrapped_layers(model).items():
        if layer.disable_adapters:
            message = "the adapters are disabled, so the model computes what its base computes"
            raise StateError(message, module=path, remedy="call live.enable_adapters(model, True) first")
    names = active_adapters(model)
    if not names:
        raise StateError("the model has no active adapter", remedy="call live.set_adapter(model, 'name') first")
    return [adapter_of(model, name) for name in names]


def wrapped_layers(model: nn.Module) -> dict[str, LiveLayer]:
    layers = live_layers(model)
    if not layers:
        message = "the model carries no live layer of oftsurgery"
        raise StateError(message, remedy="call oftsurgery.wrap(model, adapter) first")
    return layers


def _names_in(layers: Mapping[str, LiveLayer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.oft_R))
