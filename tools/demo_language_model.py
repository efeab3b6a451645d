"""The demo's second part: the merges of a language model's adapter, measured by the next token, and by what each model writes."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from change import Change, compute_in_float32
from language_model import DEMO_ADAPTER, Agreement, SmolLM2, next_tokens, source_texts
from peft import PeftModel
from torch import Tensor, nn

import oftsurgery

PROMPT = '''def read_lines(path):
    """Return the lines of a file."""
'''
#: windows of each held-out text, tokens of each window, windows of the calibration, tokens that each model writes
WINDOWS, LENGTH, CALIBRATION, NEW = 4, 128, 8, 16


@dataclass(frozen=True)
class LanguageRow:
    """One line of the table: a model beside the live adapter on held-out Python sources and prose, the share of the adapter's
    change that the weights hold, and the continuation of :data:`PROMPT`.
    """

    model: str
    sources: Agreement
    prose: Agreement
    kept: float | None
    text: str


def compare_language_models(
    peft_version: str, windows: int = WINDOWS, calibration: int = CALIBRATION
) -> list[LanguageRow]:
    """The base, the live adapter and the merges, each merge into a fresh model."""
    training, apart = source_texts()
    # every third topic of Python's documentation, which the demo's first part holds out too
    prose = "\n".join(topics[name] for name in sorted(topics)[::3])
    with tempfile.TemporaryDirectory() as folder:
        model = SmolLM2(Path(folder))
        texts = {"sources": model.windows(apart, windows, LENGTH, 2), "prose": model.windows(prose, windows, LENGTH, 3)}
        batches = [{"input_ids": part} for part in model.windows(training, calibration, LENGTH, 1).split(8)]
        change = Change.of(model.load(), DEMO_ADAPTER)
        live = _live(model)
        expected = {name: list(next_tokens(live, held)) for name, held in texts.items()}

        def row(label: str, merged: nn.Module, kept: float | None) -> LanguageRow:
            compute_in_float32(merged)
            found = {name: Agreement.of(merged, held, expected[name]) for name, held in texts.items()}
            return LanguageRow(label, **found, kept=kept, text=model.continued(merged, PROMPT, NEW))

        rows = [row("base, without the adapter", model.load(), 0.0), row("the live adapter", live, 1.0)]
        for label, merge in _merges(peft_version, model, batches).items():
            merged = merge()
            rows.append(row(label, merged, change.kept(merged)))
    return rows


def _live(model: SmolLM2) -> nn.Module:
    return compute_in_float32(PeftModel.from_pretrained(model.load(), DEMO_ADAPTER).eval())


def _merges(
    peft_version: str, model: SmolLM2, batches: Sequence[dict[str, Tensor]]
) -> dict[str, Callable[[], nn.Module]]:
    def by_peft(*, after_forward: bool) -> nn.Module:
        live: Any = PeftModel.from_pretrained(model.load(), DEMO_ADAPTER).eval()
        if after_forward:
            with torch.no_grad():
                live(input_ids=batches[0]["input_ids"][:1, :8])
        merged: nn.Module = live.merge_and_unload()
        return merged

    def by_us(calibration: Sequence[dict[str, Tensor]] | None) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", oftsurgery.RoundingWarning)  # the table has the figures
            return oftsurgery.fold(model.load(), DEMO_ADAPTER, calibration=calibration)

    return {
        f"peft {peft_version}, fresh model": lambda: by_peft(after_forward=False),
        f"peft {peft_version}, after a forward": lambda: by_peft(after_forward=True),
        "oftsurgery": lambda: by_us(None),
        f"oftsurgery, calibrated with {CALIBRATION} texts": lambda: by_us(batches),
    }


# --- what is printed --------------------------------------------------------------------------------------------------


def explanation() -> str:
    return (
        "A language model: SmolLM2-135M-Instruct in NF4 with double quantisation, and an adapter that peft trained on Python sources\n"
        "(tools/demo_adapter). KL is the divergence of the next token's probabilities from the live adapter's, in nats, and 'same' is the\n"
        f"share of equal most likely tokens: on {WINDOWS} windows of {LENGTH} tokens of Python sources that the training did not see, and of prose."
    )


def table_of(rows: Sequence[LanguageRow]) -> str:
    """The table in Markdown, which people read as plain text too."""
    heads = ("KL, Python", "KL, prose", "same, Python", "perplexity", "kept")
    width = max(len(row.model) for row in rows)
    lines = ["| " + " | ".join(["model".ljust(width), *heads]) + " |"]
    lines.append("| " + " | ".join(["-" * width, *("-" * (len(head) - 1) + ":" for head in heads)]) + " |")
    for row in rows:
        cells = (
            f"{row.sources.divergence:.4f}",
            f"{row.prose.divergence:.4f}",
            f"{row.sources.same:.1%}",
            f"{row.sources.perplexity:.2f}" if row.sources.perplexity < 1e4 else "noise",
            "" if row.kept is None else f"{row.kept:.1%}",
        )
        padded = (cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))
        lines.append("| " + " | ".join([row.model.ljust(width), *padded]) + " |")
    return "\n".join(lines)


def texts_of(rows: Sequence[LanguageRow]) -> str:
    """The prompt, and what each model writes after it."""
    width = max(len(row.model) for row in rows)
    lines = (f"{row.model.ljust(width)}  {row.text!r}" for row in rows)
    return "\n".join([f"Each model continues {PROMPT!r}:", *lines])
