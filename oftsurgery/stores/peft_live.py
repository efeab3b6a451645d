"""Live peft layers inside a model: read their adapters, and take the layers out again.

peft is imported only to read an adapter: a model without peft's classes needs no peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.dialects import ROTATION_KEYS
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.adapters.targets import without_targets
from oftsurgery.adapters.to_peft import KEY_PREFIX
from oftsurgery.errors import StateError, printable
from oftsurgery.other_libraries import is_of

from .conversion import CONVERSIONS, of_adapter
from .layers import Undo, swap_modules
from .modules import distinct, inner_model, modules_of, tensors_in

#: peft's classes around a module: a live layer, a module that an adapter brings, an embedding or head with rows that it trains
_WRAPPERS = ("BaseTunerLayer", "ModulesToSaveWrapper", "TrainableTokensWrapper")

#: peft's class around a base model → attribute of the next object inside: ``PeftModel`` holds a ``BaseTuner``, which holds the
#: model
_AROUND = MappingProxyType({"PeftModel": "base_model", "PeftMixedModel": "base_model", "BaseTuner": "model"})


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside all of peft's own classes; a model with adapters added by transformers is its own base model."""
    inner = inner_model(model)
    held = next((inner._modules[name] for cls, name in _AROUND.items() if is_of("peft", inner, cls)), None)
    return model if held is None else base_of(held)


class LiveAdapters:
    """A model's live adapters, as one walk over its modules finds them. A model without peft's layers has none and is false.

    Attributes:
        base: the base model inside all of peft's own classes.
        modules: ``{path: module}`` of the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = inner_model(model)
        self.base = base_of(self._model)
        self.modules = modules_of(self.base)
        alone = distinct(self.modules)

        def found(name: str) -> list[tuple[str, Any]]:
            return [(path, module) for path, module in alone.items() if is_of("peft", module, name)]

        self._layers, self._saved, self._rows = map(found, _WRAPPERS)

    def __bool__(self) -> bool:
        return self.base is not self._model or bool(self._layers)

    def read(self, names: Sequence[str] | None = None) -> list[OFTAdapter]:
        """The live adapters with their current values, in the live order.

        Args:
            names: adapters to read, in this order; None for the active adapters.

        Raises:
            StateError: an adapter is merged or disabled, no adapter is active, or a live layer is not OFT's.
        """
        self._check_layers()
        configs = _configs(self._model)
        wanted = list(names) if names is not None else _active(self._layers)
        unknown = [n for n in wanted if n not in configs]
        if unknown or not wanted:
            what = f"live adapter {', '.join(map(printable, unknown))}" if unknown else "active adapter"
            there = ", ".join(map(printable, configs))
            remedy = f"activate one of the model's adapters with set_adapter(): {there}"
            raise StateError(f"the model has no {what}", remedy=remedy)
        return [self._read(name, configs[name]) for name in wanted]

    def _check_layers(self) -> None:
        rows = {id(wrapper.token_adapter) for _, wrapper in self._rows}
        for path, layer in self._layers:
            if not type(layer).__module__.startswith("peft.tuners.oft.") and id(layer) not in rows:
                message = f"the model carries a live {type(layer).__name__} of {type(layer).__module__}"
                remedy = "merge or unload that adapter first"
            elif layer.merged_adapters:
                message = "peft has merged this adapter into the base weights already"
                remedy = "reload the base model and the adapter: peft's unmerge does not restore quantised weights"
            elif layer.disable_adapters:
                message = "the adapters are disabled, so the model computes what its base computes"
                remedy = "call enable_adapter_layers() first"
            else:
                continue
            raise StateError(message, module=path, remedy=remedy)

    def trained_biases(self, names: Sequence[str] | None = None) -> list[str]:
        """Names of the base model's biases that live adapters train in place (``bias="all"`` or ``"oft_only"``); the old values of
        these biases are lost.
        """
        configs = _configs(self._model)
        wanted = names if names is not None else _active(self._layers)
        kinds = {getattr(configs.get(name), "bias", "none") for name in wanted}
        if not kinds & {"all", "oft_only"}:
            return []
        inside = ("modules_to_save", "original_module")  # biases that the adapter brings, or that nobody trains
        tensors = tensors_in(self.modules)
        parameters = {
            id(t): n for n, t in reversed(tensors.items()) if isinstance(t, nn.Parameter)
        }  # their first names
        found = {
            n.replace(".base_layer.", ".")
            for n in parameters.values()
            if n.endswith(".bias") and not any(f".{w}." in n for w in inside)
        }
        return sorted(found if "all" in kinds else found & {f"{path}.bias" for path, _ in self._layers})

    @property
    def inner_modules(self) -> dict[int, nn.Module]:
        """``{id of each of peft's wrappers: the base layer in it}``."""
        layers = {id(m): m.get_base_layer() for _, m in self._layers}
        return layers | {id(m): m.original_module for _, m in [*self._saved, *self._rows]}

    def _read(self, name: str, config: Any) -> OFTAdapter:
        """One live adapter; the installed peft decides the dialect."""
        from peft import __version__ as peft_version

        rows = list(self._token_rows(name))
        tensors = dict(self._tensors(name)) | {f"{KEY_PREFIX}{path}.weight": weight for path, weight, _ in rows}
        fields = without_targets(config.to_dict())
        # the installed release computes the live layer, whatever release wrote the file
        fields.pop("peft_version", None)
        if tuple(int(n) for n in peft_version.split(".")[:2]) >= (0, 18):
            fields["peft_version"] = peft_version
        separate = [path for path, _, alone in rows if alone]
        fields["modules_to_save"] = [*(fields.get("modules_to_save") or ()), *separate] or None
        return parse_adapter(fields, tensors, source=f"live adapter {name!r}")

    def _tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The adapter's tensors under peft's keys of saved files, as copies, because training may go on."""
        for path, layer in self._layers:
            for key in ROTATION_KEYS:
                part, _, inside = key.partition(".")  # a module, or in peft ≤ 0.15 the Parameter itself
                held = getattr(layer, part, {})
                if name in held:
                    tensor = getattr(held[name], inside) if inside else held[name]
                    yield f"{KEY_PREFIX}{path}.{key}", tensor.detach().clone()
        for path, wrapper in self._saved:
            if name in wrapper.modules_to_save:
                for key, tensor in wrapper.modules_to_save[name].state_dict().items():
                    yield f"{KEY_PREFIX}{path}.{key}", tensor.detach().clone()

    def _token_rows(self, name: str) -> Iterator[tuple[str, Tensor, bool]]:
        """``(path, weight, alone)`` of the embeddings and heads in which an adapter trains single rows
        (``trainable_token_indices``): the whole weight with the trained rows, and whether other places of the same parameter do
        not take these rows.
        """
        for path, wrapper in self._rows:
            rows = wrapper.token_adapter
            if rows.tied_adapter is None and name in rows.trainable_tokens_delta:
                weight = rows.base_layer.weight
                if isinstance(rows.base_layer, nn.Linear) and rows.base_layer.bias is not None:
                    raise StateError(
                        "peft computes a head with trained rows of single tokens (`trainable_token_indices`) without the head's bias, "
                        "and no weight computes the same beside the bias",
                        module=path,
                        remedy="train with the head in modules_to_save",
                    )
                others = (w.token_adapter for _, w in self._rows)
                follow = sum(adapter is rows or adapter.tied_adapter is rows for adapter in others)
                places = len({n for n, t in tensors_in(self.modules).items() if t is weight})
                yield path, rows.get_merged_weights([name]).detach().clone(), places > follow


def _configs(model: nn.Module) -> dict[str, Any]:
    """``{adapter name: OFTConfig}`` of a model with live layers."""
    configs: dict[str, Any] = getattr(inner_model(model), "peft_config", {})
    if configs:
        return configs
    # get_submodule takes a path with the names of shells
    holder = next((path for path, m in model.named_modules() if path and m.__dict__.get("peft_config")), None)
    if holder is None:
        message = "the model has live peft layers, and its `peft_config` names no adapter"
        raise StateError(message, remedy="load the plain base model, and fold the adapter's files into it")
    raise StateError(
        "the live peft layers are in a part of this model, not in the model itself",
        module=holder,
        remedy=f"fold the part: oftsurgery.fold(model.get_submodule({printable(holder)!r}), inplace=True)",
    )


def _active(layers: Sequence[tuple[str, Any]]) -> list[str]:
    """Names of the active adapters, which must be the same in all layers."""
    # an adapter without trained rows of tokens leaves the layers of these rows without an active adapter
    found = {tuple(layer.active_adapters) for _, layer in layers if not is_of("peft", layer, "TrainableTokensLayer")}
    if len(found) > 1:
        message = f"the model's layers have different active adapters: {printable(sorted(map(list, found)))}"
        raise StateError(message, remedy="name the adapters to fold: fold(model, ['a', 'b'])")
    return list(found.pop()) if found else []


def strip(base: nn.Module, inside: Mapping[int, nn.Module], journal: list[Undo]) -> None:
    """Put base layers back in place of peft's live layers, in ``base`` itself; ``journal`` gets each undo step before its change.

    Args:
        inside: ``{id of each of peft's wrappers: the base layer in it}``; empty for a copy that has no wrappers any more.
    """
    if inside:
        swap_modules(base, inside, journal)
    own = inner_model(base).__dict__
    names = ["peft_config", "_hf_peft_config_loaded", *([CONVERSIONS] if of_adapter(own.get(CONVERSIONS)) else [])]
    noted = {name: own[name] for name in names if name in own}
    journal.append(partial(own.update, noted))
    for name in noted:
        del own[name]
