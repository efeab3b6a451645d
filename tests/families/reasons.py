"""The reasons for which a cell may be refused: the error's class, a pattern of the error's text, and the reason in plain words."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    error: str
    text: str
    why: str


REASONS = [
    Reason(
        "ExportError",
        r"^with example inputs alone: ",
        "`example_inputs=` gives a graph of their batch and length, which computes what torch computes. torch and ONNX write no graph of free sizes",
    ),
    Reason(
        "ExportError",
        r"^onnxruntime cannot run the graph: ",
        "onnxruntime cannot run the graph that torch writes of the model's code",
    ),
    Reason(
        "ExportError",
        r"^ONNX has no operator for a part of the model: ",
        "torch's exporter finds no ONNX operator for a part of the model's code",
    ),
    Reason(
        "FormatError",
        r"^transformers replaces this module as it loads a checkpoint in 4 or 8 bits",
        'transformers replaces the experts when it loads a checkpoint in 4 or 8 bits, and would not find rotated weights. `format="bf16"` with '
        "`quantize=` writes the rotated weights",
    ),
]


def reason_of(error: str, text: str) -> Reason | None:
    return next((r for r in REASONS if r.error == error and re.search(r.text, text)), None)
