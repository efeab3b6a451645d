""":func:`split_adapters` decides which component of a pipeline each module of an adapter belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import MatchError, OFTSurgeryError, printable

from .folder import FolderStore
from .single_file import ENCODER_NUMBER

_CHOOSE = "name the component: component=… (--component)"


def split_adapters(
    adapters: Sequence[OFTAdapter], stores: Mapping[str, FolderStore], component: str | None = None
) -> dict[str, list[OFTAdapter]]:
    """``{component: its adapters in the live order}``, by names and shapes.

    Args:
        stores: ``{component: its model}``.
        component: the component of all modules, where the caller names it.

    Raises:
        MatchError: a module fits no component, or several; or the pipeline has no such component.
    """
    if component is not None and component not in stores:
        message = f"the pipeline has no model {printable(component)!r}"
        raise MatchError(message, remedy=f"choose one of {', '.join(map(printable, stores))} (--component)")
    own = stores if component is None else {component: stores[component]}
    found: dict[str, list[OFTAdapter]] = {}
    for adapter in adapters:
        for name, part in _split(adapter, own).items():
            found.setdefault(name, []).append(part)
    return {name: found[name] for name in stores if name in found}


def _split(adapter: OFTAdapter, stores: Mapping[str, FolderStore]) -> dict[str, OFTAdapter]:
    if len(stores) == 1:
        return dict.fromkeys(stores, adapter)
    fits = {name: _fitting(adapter, store) for name, store in stores.items()}
    wanted = {*adapter.modules, *adapter.saved, *adapter.sums}
    homes = {path: _by_number(path, [name for name, own in fits.items() if path in own]) for path in sorted(wanted)}
    whole = [name for name, own in fits.items() if own == wanted]
    if len(whole) > 1 and any(len(there) > 1 for there in homes.values()):
        message = f"the adapter fits several models of the pipeline: {', '.join(map(printable, whole))}"
        raise MatchError(message, path=adapter.source, remedy=_CHOOSE)
    if len(whole) == 1:
        return {whole[0]: adapter}
    parts: dict[str, set[str]] = {}
    for path, there in homes.items():
        if len(there) != 1:
            fault = (
                f"fits several models of the pipeline: {', '.join(map(printable, there))}"
                if there
                else (f"fits none of the pipeline's models: {', '.join(map(printable, stores))}")
            )
            raise MatchError(
                f"a module of the adapter {fault}",
                module=path,
                path=adapter.source,
                remedy=_CHOOSE if there else "give the pipeline that the adapter was trained on",
            )
        parts.setdefault(there[0], set()).add(path)
    return {
        name: replace(
            adapter,
            modules={path: rotation for path, rotation in adapter.modules.items() if path in own},
            saved={path: values for path, values in adapter.saved.items() if path in own},
            sums={path: values for path, values in adapter.sums.items() if path in own},
        )
        for name, own in parts.items()
    }


def _by_number(path: str, there: list[str]) -> list[str]:
    """The one of the text encoders ``there`` that a name with an encoder's prefix means: all tools number encoders that share the names
    of their modules in one order.
    """
    number = ENCODER_NUMBER.match(path)
    encoders = sorted(name for name in there if name.startswith("text_encoder"))
    if number is None or len(there) < 2 or len(encoders) < len(there):
        return there
    return encoders[int(number[1] or 1) - 1 :][:1] or there


def _fitting(adapter: OFTAdapter, store: FolderStore) -> set[str]:
    """The names of the adapter's modules and tensors that the model has, in shapes that fit."""
    try:
        found = store.locate(f"{path}.weight" for path in adapter.modules)
        own = store.locate(adapter.saved)
    except OFTSurgeryError:
        return set()
    fitting = {name for name, at in own.items() if store.shape(at) == tuple(adapter.saved[name].shape)}
    added = {name: name.rpartition(".")[0] for name in adapter.sums}
    try:
        others = store.meanings([*(p for p in adapter.modules if f"{p}.weight" not in found), *added.values()])
    except OFTSurgeryError:
        others = {}
    for given, path in added.items():
        if path in others and f"{others[path].modules[0]}.{given.rpartition('.')[2]}" in store.tensors:
            fitting.add(given)
    for path, weight_map in adapter.modules.items():
        if path in others and others[path].whole is None:
            fitting.add(path)  # rows of a weight, or of several weights: the plan checks their sizes
            continue
        name = f"{others[path].whole}.weight" if path in others else found.get(f"{path}.weight")
        if name is not None:
            out, *rest = store.shape(name)
            with suppress(OFTSurgeryError):
                own_map = weight_map.for_layer(tuple(rest[1:]), path)
                own_map.check_fits((out, math.prod(rest)), path)
                fitting.add(path)
    return fitting
