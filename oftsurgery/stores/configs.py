"""The ``config.json`` of a folded checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oftsurgery.dtype_names import name_of
from oftsurgery.dtypes import DENSE
from oftsurgery.formats.all_formats import FORMATS

from .image_models import is_of_diffusers

if TYPE_CHECKING:
    from .folder import Quantization
    from .vocabulary import Vocabulary


def output_config(
    config: Mapping[str, Any], format: str, quantization: Quantization | None, *, untied: bool
) -> dict[str, Any]:
    """The destination's ``config.json``.

    A dense format loses ``quantization_config`` (an old one breaks the loading) and gets its dtype; a quantised format
    gets transformers' own ``quantization_config``. Rope settings are written for transformers 4 and 5. The config no
    longer ties weights that the fold untied.
    """
    new = copy.deepcopy(dict(config))
    if not new:
        return new
    if format in DENSE:
        new.pop("quantization_config", None)
        for sub in _with_text(new) if not is_of_diffusers(new) else ():  # whose configs name no dtype
            if sub is new or "dtype" in sub or "torch_dtype" in sub:
                sub["dtype"] = sub["torch_dtype"] = name_of(DENSE[format])
    elif quantization is not None:
        old = new.get("quantization_config")
        new["quantization_config"] = bnb_config(quantization, old if isinstance(old, Mapping) else {})
        if quantization.dtype is not None and not is_of_diffusers(new):
            new["dtype"] = new["torch_dtype"] = name_of(quantization.dtype)
    for sub in _with_text(new):
        readable_rope(sub)
        if untied and (sub is new or "tie_word_embeddings" in sub):
            sub["tie_word_embeddings"] = False
    return new


def restored_config(
    folded: Mapping[str, Any], base: Mapping[str, Any], *, head: bool = False, vocabulary: Vocabulary | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint whose fold is taken out: the folded config, with the ties of the base's config, with its
    class and labels where the adapter had brought a ``head``, and with its number of tokens.
    """
    folded = folded if vocabulary is None else vocabulary.in_config(folded)
    new = copy.deepcopy(dict(folded))
    if head:
        for name in ("architectures", "id2label", "label2id"):
            new.pop(name, None)
            new |= {name: base[name]} if name in base else {}
    for mine, theirs in zip(_with_text(new), _with_text(dict(base)), strict=False):
        mine.pop("tie_word_embeddings", None)
        mine |= {k: v for k, v in theirs.items() if k == "tie_word_embeddings"}
    return new


def _with_text(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def readable_rope(config: dict[str, Any]) -> None:
    """Add ``rope_theta`` and ``rope_scaling`` to a config that has only transformers 5's ``rope_parameters``, which
    transformers 4 ignores.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", scaling)


#: settings that a new format takes over from the old config, since they are no part of the format
_KEPT = ("bnb_4bit_quant_storage", "llm_int8_skip_modules", "llm_int8_threshold")


def bnb_config(q: Quantization, old: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' ``BitsAndBytesConfig.to_dict()`` for the same settings, with the settings of an ``old`` config that are no
    part of the format.
    """
    four = "load_in_4bit" in FORMATS[q.codec].config_fields
    new = {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": name_of(q.compute_dtype or DENSE["fp32"]),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": q.codec if four else "fp4",
        "bnb_4bit_use_double_quant": q.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(q.skip) if q.skip is not None else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
    kept = {name: old[name] for name in _KEPT if name in old and (name != "llm_int8_skip_modules" or q.skip is None)}
    return new | kept
