"""What rounding costs, mode by mode: ``make bench-quality``.

    python benchmarks/quality.py [minilm] [llama] [cost] [--out FILE]      all three by default

``minilm``: the demo's model, adapters and sentences; each mode's error in the weights, in the layers' outputs, and in
the sentence embeddings beside the live adapter's. Int8 layers round what they are given, too, so there the embeddings
are compared in plain float32 as well, where only the weights differ.

``llama``: a small byte-level llama, trained here on Python's documentation, quantised to NF4, given a QOFT adapter that
is trained on Python's own sources, and folded; perplexity on sources that neither training nor calibration saw.

``cost``: time and peak memory of each mode, on a layer of 4096 × 4096 and on the MiniLM, each in a process of its own.
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
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import bitsandbytes as bnb
import demo
import torch
import transformers
from peft import OFTConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import oftsurgery
from oftsurgery import codecs
from oftsurgery.layers import Layer

RESULTS = Path(__file__).parent / "results" / "quality.json"
Batches = list[dict[str, Tensor]]

#: line of the tables → (rounding, how much of the calibration)
MODES: dict[str, tuple[str, float]] = {
    "nearest": ("nearest", 0),
    "mse": ("mse", 0),
    "calibrated, 32 texts": ("calibrated", 1 / 8),
    "calibrated, 256 texts": ("calibrated", 1),
}
TEXTS = 256


def fold(model: nn.Module, adapter: Path, mode: str, batches: Batches) -> tuple[nn.Module, float]:
    """The folded model, and the seconds that it took."""
    rounding, part = MODES[mode]
    calibration = batches[: round(len(batches) * part)] if part else None
    start = time.perf_counter()
    folded = oftsurgery.fold(model, adapter, rounding=rounding, calibration=calibration)
    return folded, time.perf_counter() - start


def record_facts(folded: nn.Module) -> dict[str, Any]:
    modules = folded.oftsurgery.modules.values()
    outputs = [(m.output_error, m.output_nearest) for m in modules if m.output_error is not None]
    return {
        "weight_mse": sum(m.error**2 for m in modules) / len(modules),
        "output_error": sum(o for o, _ in outputs) / len(outputs) if outputs else None,
        "output_error_nearest": sum(o for _, o in outputs) / len(outputs) if outputs else None,
        "rounding": {r: sum(m.rounding == r for m in modules) for r in sorted({m.rounding for m in modules})},
    }


# --- MiniLM -----------------------------------------------------------------------------------------------------------


def sentences_for_calibration(count: int) -> list[str]:
    """Of the topics that the adapter was trained on; none of them is held out."""
    sentences = [s for paragraph in demo.paragraphs()[0] for s in paragraph]
    return random.Random(1).sample(sentences, count)  # noqa: S311


def tokenised(sentences: Sequence[str]) -> Batches:
    return [
        dict(
            demo._tokenizer()(
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


def minilm(quantisation: str, adapter: Path, *, held_out: int = 128, texts: int = TEXTS) -> dict[str, dict[str, Any]]:
    """``{mode: facts}`` of an adapter that :func:`demo.fine_tune` saved."""
    sentences, batches = demo.held_out(held_out), tokenised(sentences_for_calibration(texts))
    base = demo.load_base(quantisation)
    live = demo.embeddings(demo.load_live(quantisation, adapter), sentences)
    exact = demo.embeddings(PeftModel.from_pretrained(dequantised(base), adapter).eval(), sentences)
    rows = {}
    for mode in MODES:
        folded, seconds = fold(demo.load_base(quantisation), adapter, mode, batches)
        weights = demo.embeddings(dequantised(folded), sentences)
        rows[mode] = {
            **record_facts(folded),
            "distance": demo.distance(demo.embeddings(folded, sentences), live),
            "distance_of_weights": demo.distance(weights, exact),
            "seconds": seconds,
        }
    return rows


def run_minilm() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for quantisation in demo.QUANTISATIONS:
            adapter = Path(folder) / quantisation
            for _ in demo.fine_tune(quantisation, adapter, 20):
                pass
            found[quantisation] = minilm(quantisation, adapter)
            print(f"\nMiniLM, {quantisation}, 36 layers, adapter trained by the demo, 128 held-out sentences\n")
            print(table(found[quantisation], ("weight_mse", "output_error", "distance", "distance_of_weights")))
    return found


# --- a small llama ----------------------------------------------------------------------------------------------------

LENGTH = 256


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def documentation() -> Tensor:
    """(n,) bytes of what ``help()`` shows."""
    return as_bytes("\n\n".join(topics[name] for name in sorted(topics)))


def sources() -> tuple[Tensor, Tensor]:
    """(training, held out): bytes of the standard library's top-level modules, every fourth file held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [
        [f.read_text(encoding="utf-8", errors="ignore") for f in files if (files.index(f) % 4 == 0) is held]
        for held in (False, True)
    ]
    training, held_out = (as_bytes("\n\n".join(part)) for part in parts)
    return training, held_out


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH) of its bytes, from anywhere."""
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
    """Of bytes, over (n, LENGTH) windows."""
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
        "without the adapter": {"perplexity": perplexity(load_llama(base), data)},
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
    print(table(rows, ("weight_mse", "output_error", "perplexity", "excess")))
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
    """In this very process: seconds of one fold, and how far its memory rises above what was there before."""
    model, adapter, batches = CASES[case]()
    fold(*layer_case(128, 256)[:2], mode, layer_case(128, 2048)[2])  # kernels and libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmHWM")
    _, seconds = fold(model, adapter, mode, batches)
    return {"seconds": seconds, "peak_mb": (memory("VmHWM") - before) / 1000}


def memory(field: str) -> int:
    """kB of this process, of ``/proc``'s own name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def run_cost() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        found[case] = {}
        for mode in MODES:
            command = [sys.executable, __file__, "--measure", case, mode]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[case][mode] = json.loads(done.stdout.splitlines()[-1])
        print(f"\n{case}\n")
        print(table(found[case], ("seconds", "peak_mb")))
    return found


# --- the command line -------------------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> str:
    """Markdown; beside each figure, how many times plain rounding's it is."""
    lines = [f"| {'':22} |" + "".join(f" {c.replace('_', ' '):>20} |" for c in columns)]
    lines.append(f"| {'-' * 22} |" + f" {'-' * 19}: |" * len(columns))
    for mode, facts in rows.items():
        cells = []
        for c in columns:
            value, plain = facts.get(c), rows["nearest"].get(c)
            if c == "output_error":
                plain = facts.get("output_error_nearest")
            text = "" if value is None else f"{value:.4g}"
            cells.append(
                text + (f" ({value / plain:.2f} ×)" if value is not None and plain and mode != "nearest" else "")
            )
        lines.append(f"| {mode:22} |" + "".join(f" {cell:>20} |" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["minilm", "llama", "cost"], help="minilm, llama, cost")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write, what else is in it kept")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
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
    runs: dict[str, Callable[[], dict[str, Any]]] = {"minilm": run_minilm, "llama": run_llama, "cost": run_cost}
    for what in args.what:
        found[what] = runs[what]()
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
