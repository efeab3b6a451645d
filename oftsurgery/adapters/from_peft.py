"""Make an adapter from the config and the tensors that any peft release saves, after a check of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from oftsurgery.errors import AdapterError, DialectError, module_in_errors, printable

from .adapter import OFTAdapter
from .dialects import DIALECTS, Dialect, detect_dialect, rotation_of
from .from_peft_others import OTHER_KINDS, OtherKind, dialect_of
from .keys import sort_keys
from .weight_map import WeightMap


def parse_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dialect: Dialect | None = None,
    source: str | None = None,
    sha256: str | None = None,
) -> OFTAdapter:
    """An adapter from its parsed ``adapter_config.json`` and its tensors, ``{key as peft saves it: tensor}``.

    Args:
        dialect: the dialect, if the files do not show it; a dialect that contradicts the files is refused.
        source: the place that the adapter came from, for messages and records.
        sha256: SHA-256 of the file of tensors.

    Raises:
        DialectError: the adapter is no OFT adapter, or of an unsupported or ambiguous kind.
        AdapterError: keys are missing, unknown or of a wrong type.
        ShapeError, NonFiniteError: no peft release writes such tensors.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise DialectError(f"unknown dialect {printable(dialect)!r}", remedy=f"use one of {', '.join(DIALECTS)}")
    _check_config(config)
    if not tensors:
        message = "the adapter holds no tensor"
        raise AdapterError(message, path=source, remedy="save it again with peft's save_pretrained")
    kind = OTHER_KINDS.get(str(config["peft_type"]))
    if kind is not None:
        return _other_adapter(kind, config, tensors, dialect, source, sha256)
    raw, saved = sort_keys(tensors, source)
    name = detect_dialect(config, raw, dialect, source)
    modules: dict[str, WeightMap] = {}
    for path, parts in sorted(raw.items()):
        with module_in_errors(path):
            modules[path] = rotation_of(name, parts, config)
    return OFTAdapter(modules=modules, saved=saved, dialect=name, config=config, source=source, sha256=sha256)


def _other_adapter(
    kind: OtherKind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    named: str | None,
    source: str | None,
    sha256: str | None,
) -> OFTAdapter:
    """An adapter of a relative of OFT."""
    kept = {
        key: tensor for key, tensor in tensors.items() if not key.endswith(tuple(f".{end}" for end in kind.ignored))
    }
    raw, saved = sort_keys(kept, source, kind.ends)
    modules: dict[str, WeightMap] = {}
    for path, parts in sorted(raw.items()):
        with module_in_errors(path):
            modules[path] = kind.read(parts, config, named)
    name = dialect_of(kind, modules, named)
    return OFTAdapter(modules=modules, saved=saved, dialect=name, config=config, source=source, sha256=sha256)


# the fields are those of OFT's configs; configs of other kinds have some of these fields
# field → (types, function that finds wrong values, what a right value is)
_FIELDS: Mapping[str, tuple[tuple[type, ...], Callable[[Any], bool] | None, str]] = {
    **dict.fromkeys(("block_share", "coft", "use_cayley_neumann", "fan_in_fan_out"), ((bool,), None, "")),
    **dict.fromkeys(("r", "oft_block_size"), ((int,), None, "")),
    "bias": ((str,), None, ""),
    "apply_GS": ((bool,), None, ""),
    "peft_version": ((str, type(None)), None, ""),
    "eps": ((int, float), lambda eps: not 0 <= eps < math.inf, "a finite number from 0 on"),  # NaN is wrong too
    # peft's default is 5; a file with a huge number could keep a fold busy for ever
    "num_cayley_neumann_terms": ((int,), lambda terms: terms > 1000, "at most 1000"),
    "modules_to_save": ((list, type(None)), lambda value: not _all_are(str, value), "a list of names"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        ((str, list, type(None)), lambda value: not _all_are(str, value), "a name or a list of names"),
    ),
    "layers_to_transform": (
        (int, list, type(None)),
        lambda value: not isinstance(value, int) and not _all_are(int, value),
        "a number or a list of numbers",
    ),
    **dict.fromkeys(("revision", "task_type"), ((str, type(None)), None, "")),
    "auto_mapping": ((dict, type(None)), None, ""),
}


def _all_are(kind: type, values: Any) -> bool:
    return all(isinstance(value, kind) for value in values or ())


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config of another kind of adapter, or with fields of wrong types or values."""
    kind = config.get("peft_type")
    if kind is None:
        message = "the adapter's config has no `peft_type`"
        remedy = "give a folder that peft's save_pretrained wrote"
        raise AdapterError(message, tensor="adapter_config.json", remedy=remedy)
    if kind not in ("OFT", *OTHER_KINDS):
        message = f"the adapter is a {printable(kind)} adapter, not an OFT adapter"
        if kind == "PSOFT":
            message += ": its other matrices come from a decomposition of the base's weights and are not stored, and their signs decide"
        remedy = "oftsurgery folds OFT, OFTv2, QOFT, BOFT, HRA and RoAd adapters only; merge others with peft's merge_and_unload"
        raise DialectError(message, remedy=remedy)
    for name, (types, wrong, right) in _FIELDS.items():
        value = config.get(name)
        if name in config and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            kinds = " or ".join(t.__name__ for t in types if t is not type(None))
            raise _wrong_config(f"{name} = {printable(value)!r}, but the value must be of type {kinds}")
        if name in config and wrong is not None and wrong(value):
            raise _wrong_config(f"{name} = {printable(value)}, but the value must be {right}")
    if config.get("layer_replication"):
        message = "`layer_replication` is not supported"
        remedy = "replicate the layers in the base model first, then train or load the adapter on it"
        raise DialectError(message, remedy=remedy)
    if config.get("use_dora"):
        message = "the config sets `use_dora`, which no peft release computes for OFT"
        raise DialectError(message, remedy="check where the config came from")


def _wrong_config(what: str) -> AdapterError:
    message, remedy = f"the adapter's config has {what}", "restore the config that peft wrote"
    return AdapterError(message, tensor="adapter_config.json", remedy=remedy)
