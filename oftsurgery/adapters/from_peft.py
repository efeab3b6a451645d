"""Make an adapter from the config and the tensors that any peft release saves, after a check of both."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from oftsurgery.dtypes import FLOATS
from oftsurgery.errors import AdapterError, DialectError, MatchError, NonFiniteError, module_in_errors, printable

from .adapter import OFTAdapter
from .dialects import ROTATION_KEYS, Dialect, detect_dialect, rotation_of
from .rotation import Rotation
from .to_peft import KEY_PREFIX


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
    _check_config(config)
    if not tensors:
        message = "the adapter holds no tensor"
        raise AdapterError(message, path=source, remedy="save it again with peft's save_pretrained")
    raw, saved = _sort_keys(tensors, source)
    name = detect_dialect(config, raw, dialect, source)
    modules: dict[str, Rotation] = {}
    for path, parts in sorted(raw.items()):
        with module_in_errors(path):
            modules[path] = rotation_of(name, parts, config)
    return OFTAdapter(modules=modules, saved=saved, dialect=name, config=config, source=source, sha256=sha256)


# field → (types, function that finds wrong values, what a right value is)
_FIELDS: Mapping[str, tuple[tuple[type, ...], Callable[[Any], bool] | None, str]] = {
    **dict.fromkeys(("block_share", "coft", "use_cayley_neumann", "fan_in_fan_out"), ((bool,), None, "")),
    **dict.fromkeys(("r", "oft_block_size"), ((int,), None, "")),
    "bias": ((str,), None, ""),
    "peft_version": ((str, type(None)), None, ""),
    "eps": ((int, float), lambda eps: not 0 <= eps < math.inf, "a finite number from 0 on"),  # NaN is wrong too
    # peft's default is 5; a file with a huge number could keep a fold busy for ever
    "num_cayley_neumann_terms": ((int,), lambda terms: terms > 1000, "at most 1000"),
    "modules_to_save": (
        (list, type(None)),
        lambda names: not all(isinstance(name, str) for name in names or ()),
        "a list of names",
    ),
}


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind is None:
        message = "the adapter's config has no `peft_type`"
        remedy = "give a folder that peft's save_pretrained wrote"
        raise AdapterError(message, tensor="adapter_config.json", remedy=remedy)
    if kind != "OFT":
        message = f"the adapter is a {printable(kind)} adapter, not an OFT adapter"
        remedy = "oftsurgery folds OFT, OFTv2 and QOFT adapters only; merge others with peft's merge_and_unload"
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


# --- keys -------------------------------------------------------------------------------------------------------------

_PARTS = re.compile(rf"^(?P<path>.+)\.(?P<part>{'|'.join(map(re.escape, ROTATION_KEYS))})$", re.DOTALL)
_OTHER_TUNER = re.compile(
    r"\.(lora_[a-zA-Z_]+|boft_[A-Za-z]+|hada_\w+|lokr_\w+|vera_\w+|ia3_l|hra_u|oft_[A-Za-z_]+)(\.|$)"
)


def _sort_keys(
    tensors: Mapping[str, Tensor], source: str | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort tensors by their keys into ``({module path: {part: tensor}}, {model tensor name: tensor})``."""
    raw: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        where: dict[str, Any] = {"tensor": key, "path": source}
        if not key.startswith(KEY_PREFIX):
            message = f"the key is unknown: peft's adapter keys start with {KEY_PREFIX!r}"
            raise AdapterError(message, **where, remedy="save the adapter with peft's save_pretrained")
        name = key.removeprefix(KEY_PREFIX)
        match = _PARTS.match(name)
        if match and tensor.dtype not in FLOATS:
            message = f"a rotation must be float32, float16, bfloat16 or float64, but the tensor is {tensor.dtype}"
            raise AdapterError(message, **where, remedy="restore the file of the adapter")
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _finite(tensor):
            message = "the adapter's tensor holds NaN or infinity"
            raise NonFiniteError(message, **where, remedy="retrain from an earlier checkpoint")
        if match:
            raw.setdefault(match["path"], {})[match["part"]] = tensor
        elif other := _OTHER_TUNER.search("." + name):
            message = f"the adapter holds {printable(other[1])!r}, which is no part of an OFT adapter that peft saves"
            raise DialectError(message, **where, remedy="save OFT adapters alone, with peft's save_pretrained")
        # the frozen original of a module in `modules_to_save` (with bias="all" peft saves its bias) is not used live
        elif ".original_module." not in name:
            target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            # with bias="all" peft saves the biases of `modules_to_save` under two keys
            earlier = saved.setdefault(target, tensor)
            if earlier is not tensor and not (earlier.dtype == tensor.dtype and torch.equal(earlier, tensor)):
                raise MatchError("two keys name one tensor of the model", **where, remedy="remove one of the keys")
    if not raw:
        message = f"the adapter has {len(saved)} tensors, but none is a rotation ({', '.join(ROTATION_KEYS)})"
        remedy = "check that the adapter was saved after training, from the rank that holds the weights"
        raise AdapterError(message, path=source, remedy=remedy)
    return raw, saved


def _finite(tensor: Tensor) -> bool:
    # one pass and no mask: on the CPU torch.isfinite takes five times as long
    return tensor.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))
