"""What the keys of an adapter's file name: rotations of modules, and tensors of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from oftsurgery.dtypes import FLOATS
from oftsurgery.errors import AdapterError, DialectError, MatchError, NonFiniteError, not_gathered, printable
from oftsurgery.files.wrappers import without_peft

from .to_peft import KEY_PREFIX

# a whole PeftModel's state has the adapter's name behind each part, which save_pretrained takes out
_ROTATION = re.compile(
    r"(?P<path>.+)\.(?:(?P<part>oft_R|oft_embedding_R)(?:\.(?P<name>[^.]+))?(?P<end>\.weight)"
    r"|(?P<old>oft_r|oft_s)(?:\.(?P<old_name>[^.]+))?)",
    re.DOTALL,
)
_OTHER_TUNER = re.compile(
    r"\.(lora_[a-zA-Z_]+|boft_[A-Za-z]+|hada_\w+|lokr_\w+|vera_\w+|ia3_l|hra_u|oft_[A-Za-z_]+)(\.|$)"
)

_GATHER = (
    "save it where it is whole: stage3_gather_16bit_weights_on_model_save (DeepSpeed), fsdp_state_dict_type: FULL_STATE_DICT (FSDP); or "
    "gather the checkpoint with DeepSpeed's script in it, `python zero_to_fp32.py . OUTPUT --safe_serialization`, and save its oft_ "
    "tensors as adapter_model.safetensors"
)

Parts = dict[str, dict[str, Tensor]]


def sort_keys(tensors: Mapping[str, Tensor], source: str | None) -> tuple[Parts, dict[str, Tensor]]:
    """Keys → ({module path: {part: tensor}}, {model tensor name: tensor}), without what wrappers put into them.

    Raises:
        AdapterError: a key that no adapter has, several adapters, a rotation that holds no floats or nothing at all.
        DialectError: tensors of another kind of adapter.
        MatchError: two keys name one tensor.
        NonFiniteError: NaN or infinity.
    """
    raw: Parts = {}
    saved: dict[str, Tensor] = {}
    plain = {key: _without_prefix(key, source) for key in tensors}
    adapter = _adapter_name(plain, source)
    for key, tensor in tensors.items():
        where: dict[str, Any] = {"tensor": key, "path": source}
        match = _ROTATION.fullmatch(plain[key])
        _check_values(tensor, where, rotates=match is not None)
        if match is not None:
            part = match["old"] or match["part"] + match["end"]
            if part in raw.setdefault(match["path"], {}) and not _equal(raw[match["path"]][part], tensor):
                raise MatchError("two keys name one rotation", **where, remedy="remove one of the keys")
            raw[match["path"]][part] = tensor
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
        message = f"the adapter has {len(saved)} tensors, but none is a rotation (oft_R, oft_embedding_R, oft_r)"
        remedy = "check that the adapter was saved after training, from the rank that holds the weights"
        raise AdapterError(message, path=source, remedy=remedy)
    return raw, saved


def _without_prefix(key: str, source: str | None) -> str:
    name, found = without_peft(key)
    if not found:
        message = f"unknown key: peft's adapter keys start with {KEY_PREFIX!r}"
        raise AdapterError(message, tensor=key, path=source, remedy="save the adapter with peft's save_pretrained")
    return name


def _adapter_name(plain: Mapping[str, str], source: str | None) -> str:
    """The adapter's name within the keys; ``default`` where they do not say it."""

    def names() -> Iterator[str]:
        for name in plain.values():
            match = _ROTATION.fullmatch(name)
            if match is not None and (match["name"] or match["old_name"]):
                yield match["name"] or match["old_name"]

    found = sorted(set(names()))
    if len(found) > 1:
        message = f"the file holds {len(found)} adapters: {', '.join(map(printable, found))}"
        remedy = "save each into its own folder: save_pretrained(folder, selected_adapters=['name'])"
        raise AdapterError(message, path=source, remedy=remedy)
    return found[0] if found else "default"


def _check_values(tensor: Tensor, where: Mapping[str, Any], *, rotates: bool) -> None:
    if tensor.numel() == 0:
        raise not_gathered(AdapterError, "the adapter's tensor", _GATHER, **where)
    if rotates and tensor.dtype not in FLOATS:
        message = f"a rotation must be float32, float16, bfloat16 or float64, this is {tensor.dtype}"
        raise AdapterError(message, **where, remedy="restore the file")
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _finite(tensor):
        message = "the adapter's tensor holds NaN or infinity"
        raise NonFiniteError(message, **where, remedy="retrain from an earlier checkpoint")


def _finite(tensor: Tensor) -> bool:
    # one pass and no mask: on the CPU torch.isfinite takes five times as long
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
