"""What a record says of the quantisation of a plain base, and the same facts of a :class:`Quantization`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from oftsurgery.dtype_names import name_of
from oftsurgery.records.record import FoldRecord
from oftsurgery.stores.folder import Quantization


def recorded_quantization(record: FoldRecord, config: Mapping[str, Any]) -> Quantization | None:
    """The quantisation of a plain base before its fold, from the record or else the config; None where there was none."""
    base = record.base
    codec = base.get("quantize") if base.get("fold_into") == "quantized" else None
    if codec is None:
        return None
    if "double_quant" in base:
        double, skip = base["double_quant"] == "true", json.loads(base.get("skip_modules") or "null")
    else:
        settings = config.get("quantization_config") or {}
        double, skip = bool(settings.get("bnb_4bit_use_double_quant")), settings.get("llm_int8_skip_modules")
    dtype = getattr(torch, base.get("dtype") or "", None)
    return Quantization(codec, double, skip=None if skip is None else tuple(map(str, skip)), dtype=dtype)


def facts_of_quantization(q: Quantization | None) -> dict[str, str | None]:
    """The mirror of :func:`recorded_quantization`."""
    if q is None:
        return {"quantize": None}
    return {
        "quantize": q.codec,
        "double_quant": json.dumps(q.double_quant),
        "skip_modules": None if q.skip is None else json.dumps(q.skip),
        "dtype": None if q.dtype is None else name_of(q.dtype),
    }
