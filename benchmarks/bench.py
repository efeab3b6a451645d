"""This benchmark times folds against peft's merge, and against bitsandbytes' own kernels with torch's products: pair by
pair, in one run.

    python benchmarks/bench.py layers [--full] [--out FILE]      sizes, formats, block sizes; threads 1 (fewer) and 2
    python benchmarks/bench.py layers --device cuda [--full]     the same on a GPU
    python benchmarks/bench.py model [--out FILE]                a 1.1 B-shaped NF4 model in memory
    python benchmarks/bench.py plot FILE --out PNG               time against width

`make bench` runs the first command, in about five minutes on two cores; ``--full`` takes every case at each number of
threads.

Every figure of oftsurgery is a whole ``oftsurgery.fold`` call with its record; every figure of peft is the layer's
``merge()``. Before each timing the benchmark drops the previous result and collects the garbage, for all ways alike.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import bitsandbytes as bnb  # noqa: E402
from peft import OFTConfig, get_peft_model  # noqa: E402

import oftsurgery  # noqa: E402

RESULTS = Path(__file__).parent / "results"
# (codec, out, in, b)
QUICK = [("nf4", 1024, 1024, 32), ("nf4", 4096, 4096, 32), ("int8", 4096, 4096, 32)]
LAYERS = [
    *(("nf4", n, n, 32) for n in (1024, 2048, 4096, 8192)),
    ("nf4", 4096, 11008, 32),
    *(("nf4", 4096, 4096, b) for b in (16, 128)),
    ("nf4 nested", 4096, 4096, 32),
    ("fp4", 4096, 4096, 32),
    *(("int8", n, n, 32) for n in (1024, 4096)),
]
FULL = [
    *LAYERS,
    *(("nf4", 4096, 4096, b) for b in (64, 256)),
    *(("int8", n, n, 32) for n in (2048, 8192)),
    ("int8", 4096, 11008, 32),
    *(("int8", 4096, 4096, b) for b in (16, 256)),
]
CASES = {"quick": QUICK, "default": LAYERS, "full": FULL}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def quantised(codec: str, rows: int, features: int, device: str = "cpu") -> nn.Module:
    """A bitsandbytes layer with random normal weights."""
    weight = torch.randn(rows, features, device=device) * 0.02
    if codec == "int8":
        layer = bnb.nn.Linear8bitLt(features, rows, bias=False, has_fp16_weights=False, device="meta")
        scb = weight.abs().amax(1)
        codes = (weight * (127 / scb).unsqueeze(1)).round().to(torch.int8)
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scb)
        layer.state.CB, layer.state.SCB = codes, scb
        return layer
    kind, nested = codec.removesuffix(" nested"), codec.endswith(" nested")
    layer = bnb.nn.Linear4bit(features, rows, bias=False, quant_type=kind, compress_statistics=nested, device="meta")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=nested, module=layer
    ).to(device)
    return layer


def with_adapter(model: nn.Module, targets: list[str], b: int) -> Any:
    live = get_peft_model(model, OFTConfig(target_modules=targets, oft_block_size=b))
    for name, parameter in live.named_parameters():
        if "oft_" in name:
            nn.init.normal_(parameter, std=0.1 / b**0.5)
    return live.requires_grad_(False)


def library_fold(layer: nn.Module, rotation: oftsurgery.Rotation) -> Any:
    """Plain code for bitsandbytes and torch: dequantise, rotate by blocks, quantise."""
    weight: Any = layer.weight
    blocks = rotation.blocks.to(weight.device, torch.float32)
    n, b, _ = blocks.shape
    if isinstance(weight, bnb.nn.Int8Params):
        plain = weight.data.float() * (weight.SCB / 127).unsqueeze(1)
    else:
        plain = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    rows = plain.reshape(-1, n, b).transpose(0, 1)
    rotated = torch.bmm(rows, blocks.transpose(1, 2)).transpose(0, 1).reshape(plain.shape)
    if isinstance(weight, bnb.nn.Int8Params):
        return bnb.functional.int8_vectorwise_quant(rotated.half())
    state = weight.quant_state
    return bnb.functional.quantize_4bit(
        rotated, blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    return (time.perf_counter() - start) * 1e3, result


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": round(middle, 3),
        "quartile_1": round(low, 3),
        "quartile_3": round(high, 3),
        "min_ms": round(min(times), 3),
    }


def layer_case(codec: str, rows: int, features: int, b: int, pairs: int, device: str = "cpu") -> dict[str, Any]:
    torch.manual_seed(0)
    live = with_adapter(Model(quantised(codec, rows, features, device)), ["layer"], b)
    layer = live.base_model.model.layer
    base, weight = layer.base_layer, layer.base_layer.weight
    state = (base.state.CB, base.state.SCB) if codec == "int8" else None

    def restore() -> None:
        layer.merged_adapters.clear()
        base.weight = weight
        if state:
            base.state.CB, base.state.SCB = state

    times: dict[str, list[float]] = {"oftsurgery": [], "peft": [], "bitsandbytes": []}
    first, folded = timed(lambda: oftsurgery.fold(live, rounding="nearest"))
    record = folded.oftsurgery.modules["layer"]
    rotation = _rotation(live)
    for i in range(pairs + 1):  # the first pair warms up
        for _ in range(3):  # a fold is short: three folds to each call of the other ways
            ms, folded = timed(lambda: oftsurgery.fold(live, rounding="nearest"))
            times["oftsurgery"].extend([ms] if i else [])
            del folded
        ms, _ = timed(lambda: library_fold(base, rotation))
        times["bitsandbytes"].extend([ms] if i else [])
        ms, _ = timed(layer.merge)
        times["peft"].extend([ms] if i else [])
        restore()
    ours = [statistics.median(times["oftsurgery"][3 * i : 3 * i + 3]) for i in range(pairs)]
    weights = rows * features
    seconds = statistics.median(times["oftsurgery"]) / 1e3
    moved = weights * (2 if codec == "int8" else 1 + 2 * 4 / 64)
    return {
        "codec": codec, "out": rows, "in": features, "b": b, "backend": record.backend, "error": record.error, "first_call_ms": round(first, 1),
        **{name: spread(t) for name, t in times.items()},
        "times_faster_than_peft": round(statistics.median(p / o for p, o in zip(times["peft"], ours, strict=True)), 1),
        "times_faster_than_bitsandbytes": round(statistics.median(p / o for p, o in zip(times["bitsandbytes"], ours, strict=True)), 1),
        "gigabytes_per_second": round(moved / seconds / 1e9, 2), "gigaflops": round(2 * b * weights / seconds / 1e9, 1),
    }  # fmt: skip


def _rotation(live: Any) -> oftsurgery.Rotation:
    from oftsurgery.stores.peft_live import read_adapters

    return read_adapters(live)[0].modules["layer"]


def ceilings(device: str) -> dict[str, float]:
    """The speed that this machine reaches now: copies of memory, and float32 products by torch."""
    a, m = torch.ones(1 << 26, device=device), torch.rand(2048, 2048, device=device)
    b = a.clone()
    copy = min(timed(lambda: b.copy_(a))[0] for _ in range(10))
    product = min(timed(lambda: m @ m)[0] for _ in range(10))
    return {
        "copy_gigabytes_per_second": round(2 * a.nbytes / copy / 1e6, 1),
        "product_gigaflops": round(2 * 2048**3 / product / 1e6, 1),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    from oftsurgery.records.record import versions

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        **({"gpu": torch.cuda.get_device_name(device)} if device != "cpu" else {}),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **versions(),
        **ceilings(device),
    }


def layers(cases: str, pairs: int, device: str) -> dict[str, Any]:
    found = []
    for codec, rows, features, b in CASES[cases]:
        case = layer_case(codec, rows, features, b, min(3, pairs) if rows * features > 1 << 25 else pairs, device)
        print(
            f"{codec:>10} {rows}×{features} b={b:<3} threads={torch.get_num_threads()}: {case['oftsurgery']['median_ms']:8.2f} ms; "
            f"peft {case['times_faster_than_peft']:6.1f}×, bitsandbytes {case['times_faster_than_bitsandbytes']:6.1f}×",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        found.append(case)
    return {"machine": machine(device), "layers": found, "line": line(found)}


def line(cases: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Milliseconds against millions of weights, of the square NF4 layers with b = 32: the line with the least error
    relative to each time, and the line's largest error.
    """
    squares = [c for c in cases if c["codec"] == "nf4" and c["b"] == 32 and c["out"] == c["in"]]
    if len(squares) < 3:
        return None
    millions = np.array([c["out"] * c["in"] / 1e6 for c in squares])
    times = np.array([c["oftsurgery"]["median_ms"] for c in squares])
    slope, fixed = np.polyfit(millions, times, 1, w=1 / times)
    off = (fixed + slope * millions) / times - 1
    return {
        "fixed_ms": round(fixed, 3),
        "ms_per_million": round(slope, 4),
        "off": {str(c["in"]): round(x, 3) for c, x in zip(squares, off, strict=True)},
    }


def model(blocks: int) -> dict[str, Any]:
    """22 blocks of TinyLlama's shapes, NF4 with double quantisation, in memory: oftsurgery's fold, then peft's merge of
    the same model.
    """
    shapes = {
        "q": (2048, 2048),
        "k": (256, 2048),
        "v": (256, 2048),
        "o": (2048, 2048),
        "gate": (5632, 2048),
        "up": (5632, 2048),
        "down": (2048, 5632),
    }
    torch.manual_seed(0)
    whole = nn.ModuleDict(
        {f"{i}_{name}": quantised("nf4 nested", *shape) for i in range(blocks) for name, shape in shapes.items()}
    )
    live = with_adapter(Model(whole), [rf"layer.{name}" for name in whole], 32)
    small = with_adapter(Model(quantised("nf4 nested", 256, 256)), ["layer"], 32)
    first, _ = timed(lambda: oftsurgery.fold(small, rounding="nearest"))  # loads the kernels
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide the memory that the fold takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _peak()
    ours, folded = timed(lambda: oftsurgery.fold(live, rounding="nearest"))
    peak = _peak() - before
    size = sum(m.before != "" for m in folded.oftsurgery.modules.values())
    new = sum(p.nbytes for p in folded.parameters())
    folds = [ours]
    for _ in range(4):
        del folded
        ms, folded = timed(lambda: oftsurgery.fold(live, rounding="nearest"))
        folds.append(ms)
    again = statistics.median(folds)
    del folded
    peft, _ = timed(live.merge_and_unload)
    return {
        "machine": machine(), "layers": size, "weights": blocks * sum(a * b for a, b in shapes.values()),
        "kernels_loaded_in_s": round(first / 1e3, 3), "fold_s": round(again / 1e3, 3), "folds_s": [round(t / 1e3, 3) for t in folds],
        "peft_s": round(peft / 1e3, 3), "times_faster": round(peft / again, 1),
        "peak_above_start_mb": round(peak / 2**20, 1), "new_weights_mb": round(new / 2**20, 1),
    }  # fmt: skip


def _peak() -> int:
    return next(
        (
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ),
        resource.getrusage(0).ru_maxrss,
    )


def plot(results: Path, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg" if out.suffix == ".svg" else "agg")
    from matplotlib import pyplot as plt

    runs = json.loads(results.read_text())["runs"]
    cases = [c for c in runs[-1]["layers"] if c["codec"] == "nf4" and c["b"] == 32 and c["out"] == c["in"]]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (
        ("peft", "peft's merge"),
        ("bitsandbytes", "bitsandbytes + torch"),
        ("oftsurgery", "oftsurgery.fold"),
    ):
        axes.plot([c["in"] for c in cases], [c[name]["median_ms"] for c in cases], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="width of a square NF4 layer, b = 32", ylabel="milliseconds")
    axes.set_xticks([c["in"] for c in cases], [str(c["in"]) for c in cases], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "model", "plot", "one"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--full", action="store_true", help="every case at each number of threads")
    parser.add_argument("--cases", choices=CASES, default="default", help="of `one`")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=22, help="of the model")
    parser.add_argument("--device", default="cpu", help="of the layers")
    args = parser.parse_args()
    if args.what == "one":  # each number of threads has its own process: torch's number may not change after the start
        print(json.dumps(layers(args.cases, args.pairs, args.device)))
    elif args.what == "layers" and args.device != "cpu":
        runs = [layers("full" if args.full else "default", args.pairs, args.device)]
        _write(args.out or RESULTS / f"layers_{args.device}.json", {"runs": runs})
    elif args.what == "layers":
        many = min(2, os.cpu_count() or 1)
        wanted = {1: "quick"} | {many: "default"}
        runs = [_one(n, "full" if args.full else cases, args.pairs) for n, cases in wanted.items()]
        _write(args.out or RESULTS / "layers.json", {"runs": runs})
    elif args.what == "model":
        _write(args.out or RESULTS / "model.json", model(args.blocks))
    else:
        plot(args.file or RESULTS / "layers.json", args.out or RESULTS / "width.svg")


def _one(threads: int, cases: str, pairs: int) -> Any:
    command = [sys.executable, __file__, "one", "--cases", cases, "--pairs", str(pairs)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
