"""The functions here make a live layer over one bitsandbytes layer, from the settings that peft passes to its dispatchers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from oftsurgery.adapters.dialects import coft_radius
from oftsurgery.adapters.rotation import Cayley, Rotation
from oftsurgery.errors import AdapterError, printable, warn_caller
from oftsurgery.stores.layers import Layer

from .layers import Linear4bit, Linear8bitLt, LiveLayer, class_for

#: an adapter's settings, with the defaults that peft 0.16 to 0.20 gave its bitsandbytes layers
_SETTINGS: Mapping[str, Any] = {
    "r": 8, "oft_block_size": 0, "module_dropout": 0.0, "coft": False, "eps": 6e-5, "block_share": False, "init_weights": True,
    "use_cayley_neumann": False, "num_cayley_neumann_terms": 5,
}  # fmt: skip
#: the settings that are finite numbers, each with its type, its smallest and largest value, and a description
_NUMBERS: Mapping[str, tuple[type[Any], float, float, str]] = {
    "r": (numbers.Integral, -math.inf, math.inf, "whole number"),
    "oft_block_size": (numbers.Integral, -math.inf, math.inf, "whole number"),
    "module_dropout": (numbers.Real, 0, 1, "number from 0 to 1"),
    "eps": (numbers.Real, 0, math.inf, "number of at least 0"),
    "num_cayley_neumann_terms": (numbers.Integral, 0, 1000, "whole number from 0 to 1000"),
}
#: settings that peft passes to every dispatcher and that bitsandbytes layers do not use
_IGNORED = {
    "loaded_in_4bit", "loaded_in_8bit", "fan_in_fan_out", "is_target_conv_1d_layer", "device_map", "get_apply_tensor_subclass",
    "gptq_quantization_config", "aqlm_quantization_config", "awq_quantization_config",
}  # fmt: skip


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, **kw: Any) -> Linear8bitLt | None:
    """The live layer over ``target``, or None where ``target`` is no :class:`bitsandbytes.nn.Linear8bitLt`.

    >>> target = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    >>> layer = oftsurgery.dispatch_bnb_8bit(target, "default", oft_block_size=16)
    >>> layer(torch.randn(2, 64)).shape
    torch.Size([2, 32])

    Args:
        target: the layer to wrap; or a live layer over such a layer, which gets the adapter and is returned.
        adapter_name: of the adapter.
        **kw: ``rotation=Rotation``; or the settings of a new adapter as peft 0.16 to 0.20 passed them: ``config`` (or
            ``oft_config``; an ``OFTConfig`` or a dict), ``r``, ``oft_block_size``, ``coft``, ``eps``, ``block_share``,
            ``use_cayley_neumann``, ``num_cayley_neumann_terms``, ``init_weights`` and ``module_dropout``; a setting that
            is given by itself goes before the config's. ``loaded_in_8bit=False`` gives None.

    Raises:
        AdapterError: unknown or contradicting settings.
        MatchError, ShapeError: the rotation does not fit.
    """
    return cast("Linear8bitLt | None", _dispatch(Linear8bitLt, "loaded_in_8bit", target, adapter_name, kw))


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, **kw: Any) -> Linear4bit | None:
    """:func:`dispatch_bnb_8bit` for :class:`bitsandbytes.nn.Linear4bit`; ``loaded_in_4bit=False`` gives None.

    >>> target = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    >>> layer = oftsurgery.dispatch_bnb_4bit(target, "default", oft_block_size=16)
    >>> oftsurgery.dispatch_bnb_4bit(torch.nn.Linear(64, 32), "default", oft_block_size=16) is None
    True
    """
    return cast("Linear4bit | None", _dispatch(Linear4bit, "loaded_in_4bit", target, adapter_name, kw))


def _dispatch(
    cls: type[LiveLayer], loaded: str, target: nn.Module, adapter_name: str, kw: Mapping[str, Any]
) -> LiveLayer | None:
    base = target.base_layer if isinstance(target, LiveLayer) else target
    layer = Layer(type(base).__name__, base)
    if not isinstance(base, nn.Linear) or not kw.get(loaded, True) or class_for(layer) is not cls:
        return None
    rotation, radius, dropout = _rotation_from_settings(kw, base.in_features)
    if isinstance(target, LiveLayer):
        target.add_adapter(adapter_name, rotation, radius=radius, dropout=dropout)
        return target
    return cls(base, adapter_name, rotation, radius=radius, dropout=dropout)


def _rotation_from_settings(kw: Mapping[str, Any], features: int) -> tuple[Rotation, float | None, float]:
    """(rotation, COFT radius, dropout) of a new adapter."""
    own = {k: v for k, v in kw.items() if k not in _IGNORED}
    configs = own.pop("config", None), own.pop("oft_config", None)
    config = next((c for c in configs if c is not None), None)
    rotation = own.pop("rotation", None)
    unknown = sorted(set(own) - set(_SETTINGS))
    if unknown:
        message = f"the settings {', '.join(map(printable, unknown))} are not known"
        raise AdapterError(message, remedy=f"give rotation, config, or some of {', '.join(_SETTINGS)}")
    if rotation is not None:
        if own or config is not None:
            message = "a rotation was given together with the settings of a new rotation"
            raise AdapterError(message, remedy="give rotation=… alone, or the settings alone")
        if not isinstance(rotation, Rotation):
            message = f"rotation is a {type(rotation).__name__}, not an oftsurgery.Rotation"
            raise AdapterError(message, remedy="give an oftsurgery.Rotation")
        return rotation, None, 0.0
    given = config if isinstance(config, Mapping) else {k: getattr(config, k) for k in _SETTINGS if hasattr(config, k)}
    s = {**_SETTINGS, **{k: v for k, v in given.items() if k in _SETTINGS}, **own}
    if "r" not in own and "r" not in given and s["oft_block_size"]:
        s["r"] = 0
    for name, value in s.items():
        if name != "num_cayley_neumann_terms" or s["use_cayley_neumann"]:
            _check_setting(name, value)
    b = _block_size(s["r"], s["oft_block_size"], features)
    rows, elements = 1 if s["block_share"] else features // b, b * (b - 1) // 2
    generator = torch.zeros(rows, elements) if s["init_weights"] else 0.1 * torch.randn(rows, elements)
    cayley = Cayley(s["num_cayley_neumann_terms"]) if s["use_cayley_neumann"] else Cayley()
    return Rotation(generator, cayley), coft_radius(s, rows), float(s["module_dropout"])


def _check_setting(name: str, value: Any) -> None:
    if name in _NUMBERS:
        kind, least, most, what = _NUMBERS[name]
        right = not isinstance(value, bool) and isinstance(value, kind)
        right, what = right and least <= value <= most and math.isfinite(value), f"is not a {what}"
    else:
        right, what = isinstance(value, bool), "is neither True nor False"
    if not right:
        why = "which starts at the identity" if name == "init_weights" else "peft's default"
        remedy = f"give {name} = {_SETTINGS[name]}, {why}"
        raise AdapterError(f"{name} = {printable(value)!r} {what}", remedy=remedy)


def _block_size(r: int, oft_block_size: int, features: int) -> int:
    """The block size of ``features`` in ``r`` blocks or in blocks of ``oft_block_size``. As in peft, a number that does
    not divide ``features`` is replaced by the nearest divisor.
    """
    if (r > 0) == (oft_block_size > 0) or min(r, oft_block_size) < 0:
        message = (
            f"r = {r} and oft_block_size = {oft_block_size}: one of r and oft_block_size must be positive, the other 0"
        )
        raise AdapterError(message, remedy="give oft_block_size alone")
    wanted, name = (r, "r") if r else (oft_block_size, "oft_block_size")
    fitting = [n for n in range(1, features + 1) if features % n == 0]
    nearest = min(fitting, key=lambda n: (abs(n - wanted), n))
    if nearest != wanted:
        warn_caller(f"Invalid `{name}` ({wanted})! Adjusted `{name}` to ({nearest}).", UserWarning)
    b = features // nearest if r else nearest
    if b < 2:
        message = f"a rotation with blocks of size 1 is the identity ({name} = {wanted}, {features} features)"
        raise AdapterError(message, remedy="give a larger oft_block_size")
    return b
