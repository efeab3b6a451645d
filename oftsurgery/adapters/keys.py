"""Sort the keys of an adapter's file: a key names a module's rotation, or a tensor of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from oftsurgery.dtypes import FLOATS
from oftsurgery.errors import AdapterError, DialectError, MatchError, NonFiniteError, not_gathered, printable
from oftsurgery.files.wrappers import without_peft

from .dialects import ROTATION_KEYS
from .to_peft import KEY_PREFIX


@cache
def _patterns(ends: tuple[str, ...]) -> dict[str, re.Pattern[str]]:
    """``{end of a key: pattern of the key}``; in a model's whole state the adapter's name stands within the end."""
    return {
        end: re.compile(rf"(?P<path>.+)\.{re.escape(part)}(?:\.(?P<adapter>[^.]+))?{re.escape(dot + rest)}", re.DOTALL)
        for end in ends
        for part, dot, rest in [end.partition(".")]
    }


_OTHER_TUNER = re.compile(
    r"\.(lora_[a-zA-Z_]+|boft_[A-Za-z]+|hada_\w+|lokr_\w+|vera_\w+|ia3_l|hra_u|oft_[A-Za-z_]+)(\.|$)"
)

_GATHER = (
    "save the adapter with whole tensors: stage3_gather_16bit_weights_on_model_save (DeepSpeed), fsdp_state_dict_type: FULL_STATE_DICT "
    "(FSDP); or gather the checkpoint with the script that DeepSpeed put into it, `python zero_to_fp32.py . OUTPUT --safe_serialization`, "
    "and save the gathered oft_ tensors as adapter_model.safetensors"
)

Parts = dict[str, dict[str, Tensor]]


def sort_keys(
    tensors: Mapping[str, Tensor], source: str | None, ends: tuple[str, ...] = ROTATION_KEYS
) -> tuple[Parts, dict[str, Tensor]]:
    """Sort tensors by their keys into ``({module path: {part: tensor}}, {model tensor name: tensor})``. The names that
    wrappers of a model leave in keys are taken out. ``ends`` are the ends of keys that hold rotations.

    Raises:
        AdapterError: a key is unknown, the file holds several adapters, a rotation holds no floats, or a tensor is empty.
        DialectError: a tensor belongs to another kind of adapter.
        MatchError: two keys name one tensor.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    raw: Parts = {}
    saved: dict[str, Tensor] = {}
    plain = {key: _without_prefix(key, source) for key in tensors}
    rotations = {key: found for key, name in plain.items() if (found := _rotation_of(name, ends)) is not None}
    adapter = _only_name({name for _, _, name in rotations.values() if name is not None}, source)
    for key, tensor in tensors.items():
        where: dict[str, Any] = {"tensor": key, "path": source}
        _check_values(tensor, where, rotates=key in rotations)
        if key in rotations:
            path, end, _ = rotations[key]
            if not _equal(raw.setdefault(path, {}).setdefault(end, tensor), tensor):
                raise MatchError("two keys name one rotation", **where, remedy="remove one of the keys")
        elif ".token_adapter." in plain[key]:
            message = (
                "the adapter holds trained rows of single tokens (`trainable_token_indices`), and no release of peft saves with an OFT "
                "adapter which tokens have these rows"
            )
            remedy = (
                "fold the live model of the training, which knows the tokens: oftsurgery.fold(peft_model); or train with the embeddings "
                "in modules_to_save"
            )
            raise DialectError(message, **where, remedy=remedy)
        elif other := _OTHER_TUNER.search("." + plain[key]):
            message = f"the adapter holds {printable(other[1])!r}, which is no part of an OFT adapter that peft saves"
            raise DialectError(message, **where, remedy="save OFT adapters alone, with peft's save_pretrained")
        # the frozen original of a module in `modules_to_save` (with bias="all" peft saves its bias) is not used live
        elif ".original_module." not in plain[key]:
            target = plain[key].replace(f".modules_to_save.{adapter}.", ".").replace(".modules_to_save.", ".")
            # with bias="all" peft saves the biases of `modules_to_save` under two keys
            if not _equal(saved.setdefault(target.replace(".base_layer.", "."), tensor), tensor):
                raise MatchError("two keys name one tensor of the model", **where, remedy="remove one of the keys")
    if not raw:
        message = f"the adapter has {len(saved)} tensors, but none is a rotation ({', '.join(ends)})"
        remedy = "check that the adapter was saved after training, from the rank that holds the weights"
        raise AdapterError(message, path=source, remedy=remedy)
    return raw, saved


def _without_prefix(key: str, source: str | None) -> str:
    """The key without peft's prefix and without segments of wrappers."""
    name, found = without_peft(key)
    if not found:
        message = f"the key is unknown: peft's adapter keys start with {KEY_PREFIX!r}"
        raise AdapterError(message, tensor=key, path=source, remedy="save the adapter with peft's save_pretrained")
    return name


def _rotation_of(name: str, ends: tuple[str, ...]) -> tuple[str, str, str | None] | None:
    """``(module path, end of the key, adapter's name within it or None)`` of a rotation's key; None for another key."""
    matches = ((end, pattern.fullmatch(name)) for end, pattern in _patterns(ends).items())
    return next(((match["path"], end, match["adapter"]) for end, match in matches if match is not None), None)


def _only_name(names: Collection[str], source: str | None) -> str:
    """The adapter's name within the keys; ``default`` where no key has a name."""
    if len(names) > 1:
        message = f"the file holds {len(names)} adapters: {', '.join(map(printable, sorted(names)))}"
        remedy = "save each adapter into its own folder: save_pretrained(folder, selected_adapters=['name'])"
        raise AdapterError(message, path=source, remedy=remedy)
    return next(iter(names), "default")


def _check_values(tensor: Tensor, where: Mapping[str, Any], *, rotates: bool) -> None:
    """Refuse a tensor that is empty, holds NaN or infinity, or is a rotation without floats."""
    if tensor.numel() == 0:
        raise not_gathered(AdapterError, "the adapter's tensor", _GATHER, **where)
    if rotates and tensor.dtype not in FLOATS:
        message = f"a rotation must be float32, float16, bfloat16 or float64, but the tensor is {tensor.dtype}"
        raise AdapterError(message, **where, remedy="restore the file of the adapter")
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _finite(tensor):
        message = "the adapter's tensor holds NaN or infinity"
        raise NonFiniteError(message, **where, remedy="retrain from an earlier checkpoint")


def _finite(tensor: Tensor) -> bool:
    # one pass and no mask: on the CPU torch.isfinite takes five times as long
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
