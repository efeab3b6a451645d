"""The functions here put live layers into a model and take the layers out again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.dialects import live_coft_radius
from oftsurgery.adapters.targets import without_targets
from oftsurgery.errors import MatchError, StateError, printable
from oftsurgery.folding.engine import content_hash, warn_of_idle, warn_of_missing
from oftsurgery.folding.memory import replace_tensor, separate_module, set_vocabulary, transaction
from oftsurgery.folding.plan import FoldPlan, in_names_of, plan_changes
from oftsurgery.stores.layers import Layer, ReplacedWeight, Undo, swap_modules
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.model_copy import share_model
from oftsurgery.stores.modules import inner_model, modules_of
from oftsurgery.stores.peft_live import LiveAdapters

from .layers import LiveLayer, check_name, class_for, repacking_switch_of
from .wrapped_model import ORIGINS_ATTRIBUTE, Origin, live_layers, origins_of, wrapped_layers


def wrap_model(
    model: nn.Module,
    adapters: OFTAdapter | Mapping[str, OFTAdapter],
    *,
    adapter_name: str = "default",
    incomplete: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Replace the layers that an adapter targets by live, trainable layers, as :func:`oftsurgery.wrap` does.

    Only the adapter trains afterwards: its generators (and ``oft_s``) and the tensors that the adapter saved itself
    (biases, ``modules_to_save``), which replace the model's own, whichever adapters are active. All other tensors are
    frozen, since the wrapped copy shares these tensors with ``model``.

    Args:
        model: a plain model, or a wrapped one, whose adapters stay active before the new adapter.
        adapters: one adapter, or several by name, which compute ``x · Ra · Rb`` in this order.
        adapter_name: the name of a single adapter.
        incomplete: whether to take adapters that lack modules which their own configs target.
        inplace: whether to change ``model`` itself; otherwise the result shares every tensor that does not train.

    Raises:
        MatchError, ShapeError, FormatError, StateError: as for :func:`oftsurgery.fold`; also where a name is taken or a
            layer is merged. After any error the model is unchanged.
    """
    named = {adapter_name: adapters} if isinstance(adapters, OFTAdapter) else dict(adapters)
    for name in named:
        check_name(name)
    if LiveAdapters(model):
        message = "the model carries live peft layers already"
        raise StateError(message, remedy="wrap the plain base model, or use the peft model as it is")
    with transaction() as journal:
        work = model if inplace else share_model(model)
        before = live_layers(work)
        origins = origins_of(work)
        taken = [name for name in named if any(name in layer.oft_R for layer in before.values())]
        if taken:
            message = f"the model has a live adapter {printable(taken[0])!r} already"
            raise StateError(message, remedy="choose another adapter_name")
        _refuse_merged(before)
        swap_modules(work, {id(layer): layer.base_layer for layer in before.values()}, journal)
        store = LiveStore(work)
        plan = plan_changes(store, list(named.values()), partial=incomplete)
        named = {name: in_names_of(store, adapter) for name, adapter in named.items()}
        ties = store.ties
        layers = {layer.base_layer: layer for layer in before.values()}
        twins = _separate_modules(store.modules, [change.path for change in plan.rotate], layers, journal)
        modules = modules_of(work)
        for name, adapter in named.items():
            for path, rotation in adapter.modules.items():
                if path in plan.idle:
                    continue
                base = modules[path]
                radius = live_coft_radius(adapter.dialect, adapter.config, rotation)
                if base in layers:
                    layers[base].add_adapter(name, rotation, radius=radius)
                    journal.append(partial(layers[base].delete_adapter, name))
                else:
                    # LiveLayer lays a repacked 4-bit weight out anew, and switches the repacking off
                    journal.append(partial(ReplacedWeight.of(base).put_back, base))
                    journal.append(partial(base.__dict__.update, repacking_switch_of(base)))
                    live_class, shared = class_for(Layer(path, base)), len(ties.group(f"{path}.weight")) > 1
                    layers[base] = live_class(base, name, rotation, radius=radius, path=path, shared=shared)
                    layers[base]._stands_for = twins.get(base)
        hashes = _put_saved_tensors(plan, store, origins, journal)
        set_vocabulary(store, plan.vocabulary, journal)
        for name, adapter in named.items():
            saved = {key: hashes[key] for key in adapter.saved}
            origins[name] = Origin(dict(without_targets(adapter.config)), adapter.dialect, saved)
        _freeze(modules, {name for origin in origins.values() for name in origin.saved}, journal)
        swap_modules(work, {id(base): layer for base, layer in layers.items()}, journal)
        _leave_fast_paths(work, journal)
        inner_model(work).__dict__[ORIGINS_ATTRIBUTE] = origins
        warn_of_missing(plan)
        warn_of_idle(plan)
    return work


def _put_saved_tensors(
    plan: FoldPlan, store: LiveStore, origins: Mapping[str, Origin], journal: list[Undo]
) -> dict[str, str]:
    """Put the adapters' own tensors in place; return the content hashes of the tensors that they replace."""
    hashes: dict[str, str] = {}
    for change in plan.replace:
        if any(change.name in origin.saved for origin in origins.values()):
            message = "two adapters bring their own values for one tensor"
            raise MatchError(message, tensor=change.name, remedy="wrap only one of the two adapters")
        old, _ = replace_tensor(store, change, journal)
        hashes |= {name: content_hash(name, old) for name in change.places}
    return hashes


def _refuse_merged(layers: Mapping[str, LiveLayer]) -> None:
    for path, layer in layers.items():
        if layer.merged:
            message = f"the layer has merged the adapters {', '.join(map(printable, layer.merged_adapters))}"
            raise StateError(message, module=path, remedy="call live.unmerge(model) first")


def _separate_modules(
    modules: dict[str, nn.Module], paths: Iterable[str], live: Collection[nn.Module], journal: list[Undo]
) -> dict[nn.Module, tuple[nn.Module]]:
    """Give each path whose layer has several names a new module over the same tensors, since peft makes only the named
    place live. Return ``{new module: (the old module,)}``; shared parents stay shared.
    """
    twins = {}
    for path in paths:
        base = modules[path]
        if base not in live:
            separate_module(modules, path, journal)
        if modules[path] is not base:
            twins[modules[path]] = (base,)
    return twins


#: attributes by which torch's encoders choose fused kernels, which read weights and never call the layers that hold the
#: weights, with the values that switch the kernels off; only the fused kernels take the nested tensors that an encoder makes
_SLOW: Mapping[str, Any] = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}
_FAST = "_oftsurgery_fast_path"


def _leave_fast_paths(model: nn.Module, journal: list[Undo]) -> None:
    """Make torch's transformer encoders call their layers where one of the layers is live."""
    for module in model.modules():
        encoder = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder))
        if encoder and _FAST not in module.__dict__ and any(isinstance(m, LiveLayer) for m in module.modules()):
            journal.append(partial(_take_fast_path, module))
            _leave_fast_path(module)


def _leave_fast_path(encoder: nn.Module) -> None:
    fast = {name: encoder.__dict__[name] for name in _SLOW if name in encoder.__dict__}
    encoder.__dict__.update({_FAST: fast, **{name: _SLOW[name] for name in fast}})


def _take_fast_path(encoder: nn.Module) -> None:
    encoder.__dict__.update(encoder.__dict__.pop(_FAST, {}))


def _freeze(modules: Mapping[str, nn.Module], trained: set[str], journal: list[Undo]) -> None:
    """Let only the named tensors train; ``modules`` does not hold the live layers' own tensors yet."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            wanted = f"{path}.{name}".lstrip(".") in trained
            if parameter is not None and parameter.requires_grad != wanted and parameter.is_floating_point():
                journal.append(partial(setattr, parameter, "requires_grad", not wanted))
                parameter.requires_grad_(wanted)


def strip(model: nn.Module) -> list[Undo]:
    """Put the base layers back in place of the live ones, in ``model`` itself; tensors that an adapter brought stay.

    Returns:
        functions that undo the change, which are to be called in reverse order.

    Raises:
        StateError: a layer is merged, or the model is not wrapped.
    """
    layers, inner = wrapped_layers(model), inner_model(model)
    _refuse_merged(layers)
    journal: list[Undo] = []
    bases = {id(layer): layer._stands_for[0] if layer._stands_for else layer.base_layer for layer in layers.values()}
    swap_modules(inner, bases, journal)
    for module in inner.modules():
        if _FAST in module.__dict__:
            _take_fast_path(module)
            journal.append(partial(_leave_fast_path, module))
    for layer in layers.values():
        base = layer.base_layer.__dict__
        journal.append(partial(base.update, dict.fromkeys(layer._repacking_switch, False)))
        base.update(layer._repacking_switch)
    origins = inner.__dict__.pop(ORIGINS_ATTRIBUTE, {})
    journal.append(partial(inner.__dict__.update, {ORIGINS_ATTRIBUTE: origins}))
    return journal


def unwrap(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model without its live layers, but with the biases and heads that an adapter brought; the model stays frozen.

    Raises:
        StateError: a layer is merged, or the model is not wrapped.
    """
    work = model if inplace else share_model(model)
    strip(work)
    return work
