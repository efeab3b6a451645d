"""``python benchmarks/extraction.py`` measures what an extraction finds on real weights, for the figures of docs/extraction.md.

The benchmark folds an adapter that peft trained on MiniLM (b = 32) into each format, and extracts the adapter again. The
benchmark also looks for block sizes over a grid of formats, sizes and norms.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import demo
from safetensors.torch import load_file
from transformers import AutoModel, BitsAndBytesConfig

import oftsurgery
from oftsurgery import Rotation, rotations
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.weights.extract import block_size_curve, choose_block_size

FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "bf16": {},
    "fp32": {},
}


def norm(r: Rotation) -> float:
    q = rotations.skew(r.exact()[0].generator.double())
    return float(torch.linalg.matrix_norm(q, ord=2).mean())


def models() -> None:
    with tempfile.TemporaryDirectory() as folder:
        list(demo.fine_tune("NF4", Path(folder) / "adapter", 8))
        trained = oftsurgery.load_adapter(Path(folder) / "adapter")
    each = [norm(r) for r in trained.modules.values()]
    print(
        f"trained in 8 steps: {len(each)} modules, mean ‖Q‖₂ {sum(each) / len(each):.3f}, {min(each):.3f} to {max(each):.3f}"
    )
    print("| format | mean ‖Q‖₂ | block size | relative error of Q | at worst | estimate / true | explained | time |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for target in (0.1, 0.3, 0.05):
        true = trained.scaled(target / (sum(each) / len(each)))
        for form, settings in FORMATS.items():
            row(form, target, true, {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {})


def row(form: str, target: float, true: oftsurgery.OFTAdapter, settings: dict[str, object]) -> None:
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    base = AutoModel.from_pretrained(demo.get_model_path(), dtype=dtype, add_pooling_layer=False, **settings)
    merged = oftsurgery.fold(base, true)
    start = time.perf_counter()
    try:
        found = oftsurgery.extract(base, merged)
    except oftsurgery.ExtractionError:
        print(f"| {form} | {target} | asked for | | | | | |")
        return
    seconds = time.perf_counter() - start
    lost = len(true.modules) - len(found.modules)
    pairs = {
        p: (found.modules[p].generator, r.exact()[0].generator.double())
        for p, r in true.modules.items()
        if p in found.modules
    }
    errors = {p: float((a - b).norm() / b.norm()) for p, (a, b) in pairs.items()}
    whole = math.sqrt(
        sum(float((a - b).square().sum()) for a, b in pairs.values())
        / sum(float(b.square().sum()) for _, b in pairs.values())
    )
    ratios = [found.report[p].error / e for p, e in errors.items()]
    sizes = ", ".join(str(b) for b in sorted({r.block_size for r in found.modules.values()}))
    print(
        f"| {form} | {target} | {sizes} | {whole:.2g} | {max(errors.values()):.2g} | {min(ratios):.2f} to {max(ratios):.2f} | "
        f"{found.explained:.1%} | {seconds:.0f} s |" + (f" {lost} lost" if lost else ""),
        flush=True,
    )


def block_sizes() -> None:
    tensors = load_file(next(Path(demo.get_model_path()).glob("*.safetensors")))
    weights = [
        tensors[f"encoder.layer.{i}.{n}.weight"] for i, n in ((0, "attention.self.key"), (2, "intermediate.dense"))
    ]
    print("\n| format | mean ‖Q‖₂ | found | asked for | wrong |\n|---|---:|---:|---:|---:|")
    for form in ("nf4", "fp4", "int8", "fp16", "fp32"):
        for target in (0.03, 0.05, 0.1, 0.3):
            results = [one(w, form, target, b) for w in weights for b in (8, 16, 32, 64, 128)]
            counts = [sum(r == kind for r in results) for kind in ("found", "asked", "wrong")]
            print(f"| {form} | {target} | {counts[0]} | {counts[1]} | {counts[2]} |", flush=True)


def one(w: Tensor, form: str, target: float, b: int) -> str:
    shape = (w.shape[0], w.shape[1])
    formats = {
        "nf4": WeightFormat("nf4", shape, torch.float32, 64, 256),
        "fp4": WeightFormat("fp4", shape, torch.float32, 64),
        "int8": WeightFormat("int8", shape, torch.float16),
        "fp16": WeightFormat("dense", shape, torch.float16),
        "fp32": WeightFormat("dense", shape),
    }
    v = torch.randn(shape[1] // b, b * (b - 1) // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(b))
    size = torch.linalg.matrix_norm(rotations.skew(v), ord=2).unsqueeze(-1)
    base = codecs.encode(w, formats[form])
    merged = oftsurgery.fold_weight(base, Rotation(v * target / size, shared=False))
    try:
        return "found" if choose_block_size([block_size_curve(base, merged)]) == b else "wrong"
    except oftsurgery.ExtractionError:
        return "asked"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("models", "block-sizes"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.only != "block-sizes":
        models()
    if args.only != "models":
        block_sizes()


if __name__ == "__main__":
    main()
