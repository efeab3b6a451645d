"""This benchmark times folds against peft's merge, and against bitsandbytes' own kernels with torch's products: pair by
pair, in one run.

    python benchmarks/bench.py layers [--full] [--out FILE]      sizes, formats, roundings; threads 1 (fewer cases) and 2
    python benchmarks/bench.py layers --device cuda [--full]     the same on a GPU
    python benchmarks/bench.py model [--out FILE]                a 1 B-shaped NF4 model in memory
    python benchmarks/bench.py first [--out FILE]                the first fold of a process, without and with compiled kernels
    python benchmarks/bench.py check [--out FILE]                a few layers against the committed results: `make bench-check`
    python benchmarks/bench.py plot [FILE] --out PNG             time against width

`make bench` runs these commands but `check`; ``--full`` takes more cases.

Every figure of oftsurgery is a whole ``oftsurgery.fold`` call with its record; every figure of peft is the layer's
``merge()``. Before each timing the benchmark drops the previous result and collects the garbage, for all ways alike. The
default rounding comes first. :mod:`cases` says which layers and adapters are folded.

``check`` compares how many times faster than peft each fold is with ``results/layers.json``, since peft's merge in the same
process takes the machine's load out of the comparison. A row that is more than 15 % slower is measured twice again, and the
median counts. The exit code is 0 if no row is slower, 1 if a row is, and 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import compare  # noqa: E402
from cases import CASES, MODES, Case, Model, layer_of, library_fold, live_case, restorer, with_adapter  # noqa: E402
from timing import machine, peak, ratio, reset_peak, spread, timed  # noqa: E402

import oftsurgery  # noqa: E402
from oftsurgery.stores.layers import Layer  # noqa: E402
from oftsurgery.stores.peft_live import LiveAdapters  # noqa: E402
from oftsurgery.weights import kernels  # noqa: E402

RESULTS = Path(__file__).parent / "results"
#: from so many weights on a merge by peft takes seconds: fewer rounds, and no warm-up of peft
_LARGE = 1 << 25


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_rows(case: Case, pairs: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The figures of one layer, a row for each mode."""
    live = live_case(case, device)
    layer = live.base_model.model.layer
    base, rotation, restore = layer.base_layer, LiveAdapters(live).read()[0].modules["layer"], restorer(layer)
    folds: dict[str, list[list[float]]] = {mode: [] for mode in case.modes}
    others: dict[str, list[float]] = {"peft": [], "bitsandbytes": []}
    records = {}
    for i in range(-1, _rounds(case, pairs)):  # the first round warms up
        for mode in case.modes:
            times = []
            for _ in range(3):  # a fold is short: three folds to each call of the other ways
                ms, folded = timed(partial(oftsurgery.fold, live, rounding=mode))
                times.append(ms)
                records[mode] = folded.oftsurgery.modules["layer"]
                del folded
            folds[mode].append(times)
        others["bitsandbytes"].append(timed(lambda: library_fold(base, rotation))[0])
        if i >= 0 or case.weights < _LARGE:
            others["peft"].append(timed(layer.merge)[0])
            restore()
    return [_row(case, mode, records[mode], folds[mode][1:], others) for mode in case.modes]


def _rounds(case: Case, pairs: int) -> int:
    """The number of rounds: more for small layers, whose times scatter more."""
    return min(3, pairs) if case.weights >= _LARGE else pairs * (3 if case.weights <= 1 << 20 else 1)


def _row(
    case: Case, mode: str, record: Any, folds: list[list[float]], others: dict[str, list[float]]
) -> dict[str, Any]:
    ours = [statistics.median(times) for times in folds]
    measured = {name: times[-len(ours) :] for name, times in others.items()}
    every = [ms for times in folds for ms in times]
    return {
        "codec": case.codec, "out": case.shape[0], "in": case.shape[1], "b": case.b, "adapter": case.adapter, "mode": mode,
        "backend": record.backend, "rounding": record.rounding, "error": record.error, "kept": record.kept,
        "moved": record.error / record.rho if record.rho else None,
        "oftsurgery": spread(every), **{name: spread(times) for name, times in measured.items()},
        **{f"times_faster_than_{name}": round(ratio(times, ours), 2) for name, times in measured.items()},
        "gigaflops": round(2 * case.b * case.weights / statistics.median(every) / 1e6, 1),
    }  # fmt: skip


def roundings(widths: Sequence[int], rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The roundings and double quantisation against each other, of NF4 layers with the trained adapter: a round folds each way
    once, and the ratios are medians over the rounds.
    """
    found = []
    for width in widths:
        live = {codec: live_case(Case(codec, (width, width)), device) for codec in ("nf4 nested", "nf4")}
        times: dict[tuple[str, str], list[float]] = {(codec, mode): [] for codec in live for mode in MODES}
        for i in range(-1, rounds):
            for (codec, mode), own in times.items():
                ms, _ = timed(partial(oftsurgery.fold, live[codec], rounding=mode))
                own.extend([ms] if i >= 0 else [])
        found.append(
            {
                "width": width,
                "over_nearest": {
                    codec: {mode: round(ratio(times[codec, mode], times[codec, "nearest"]), 3) for mode in MODES}
                    for codec in live
                },
                "nested_over_plain": {
                    mode: round(ratio(times["nf4 nested", mode], times["nf4", mode]), 3) for mode in MODES
                },
            }
        )
    return found


def layers(cases: Sequence[Case], pairs: int, device: str) -> dict[str, Any]:
    rows = []
    for case in cases:
        for row in layer_rows(case, pairs, device):
            print(
                f"{case.label:>32} threads={torch.get_num_threads()} {row['mode']:>8}: {row['oftsurgery']['median_ms']:8.2f} ms; "
                f"peft {row['times_faster_than_peft']:6.1f}x, bitsandbytes {row['times_faster_than_bitsandbytes']:6.1f}x",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            rows.append(row)
    return {"machine": machine(device), "layers": rows, "lines": lines(rows)}


def lines(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``{mode: line}``: milliseconds against millions of weights, of the square layers with one adapter. The line has the
    least error relative to each time; ``off`` is its error at each width.
    """
    found = {}
    for mode in MODES:
        squares = squares_of(rows, mode)
        if len(squares) >= 3:
            millions = np.array([r["out"] * r["in"] / 1e6 for r in squares])
            times = np.array([r["oftsurgery"]["median_ms"] for r in squares])
            slope, fixed = np.polyfit(millions, times, 1, w=1 / times)
            off = (fixed + slope * millions) / times - 1
            found[mode] = {
                "codec": squares[0]["codec"],
                "fixed_ms": round(fixed, 3),
                "ms_per_million": round(slope, 4),
                "off": {str(r["in"]): round(x, 3) for r, x in zip(squares, off, strict=True)},
            }
    return found


def squares_of(rows: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """The rows of the square 4-bit layers of several widths, in the first codec that has them."""
    for codec in ("nf4 nested", "nf4"):
        same = [r for r in rows if (r["codec"], r["mode"], r["b"]) == (codec, mode, 32) and r["out"] == r["in"]]
        first = [r for r in same if r["adapter"] == same[0]["adapter"]]
        if len(first) >= 3:
            return first
    return []


# --- a model in memory ------------------------------------------------------------------------------------------------

_BLOCK = {
    "q": (2048, 2048),
    "k": (256, 2048),
    "v": (256, 2048),
    "o": (2048, 2048),
    "gate": (5632, 2048),
    "up": (5632, 2048),
    "down": (2048, 5632),
}


def model(blocks: int, rounds: int, shapes: dict[str, tuple[int, int]] = _BLOCK) -> dict[str, Any]:
    """Blocks of TinyLlama's shapes, NF4 with double quantisation, in memory: folds with the default and with nearest
    rounding, the kernels alone, and peft's merge of the same model.
    """
    torch.manual_seed(0)
    whole = nn.ModuleDict(
        {f"{i}_{name}": layer_of("nf4 nested", *shape) for i in range(blocks) for name, shape in shapes.items()}
    )
    live = with_adapter(Model(whole), [rf"layer.{name}" for name in whole], 32)
    small = live_case(Case("nf4 nested", (256, 256)))
    for mode in MODES[:2]:
        oftsurgery.fold(small, rounding=mode)  # loads the kernels
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide the memory that the fold takes
    reset_peak()
    before = peak()
    folded = oftsurgery.fold(live)
    most = peak() - before
    size, new = len(folded.oftsurgery.modules), sum(p.nbytes for p in folded.parameters())
    del folded
    prepared = prepared_weights(live)
    folds: dict[str, list[float]] = {mode: [] for mode in MODES[:2]}
    alone: dict[str, list[float]] = {mode: [] for mode in MODES[:2]}
    for _ in range(rounds):
        for mode in folds:
            folds[mode].append(timed(partial(oftsurgery.fold, live, rounding=mode))[0])
            alone[mode].append(timed(partial(kernels_alone, prepared, mode))[0])
    peft, _ = timed(live.merge_and_unload)
    modes = {
        mode: {
            "fold_s": _seconds(statistics.median(times)), "folds_s": [_seconds(t) for t in times],
            "times_faster": round(peft / statistics.median(times), 1),
            "kernels_s": _seconds(statistics.median(alone[mode])), "over_kernels": round(ratio(times, alone[mode]), 2),
        } for mode, times in folds.items()
    }  # fmt: skip
    return {
        "machine": machine(), "layers": size, "weights": blocks * sum(a * b for a, b in shapes.values()),
        "modes": modes, "peft_s": _seconds(peft),
        "peak_above_start_mb": round(most / 2**20, 1), "new_weights_mb": round(new / 2**20, 1),
    }  # fmt: skip


def _seconds(ms: float) -> float:
    return round(ms / 1e3, 3)


def prepared_weights(live: Any) -> list[tuple[Any, Any]]:
    """``(weight, rotation)`` of each layer, as a fold hands them to the kernels."""
    rotations = LiveAdapters(live).read()[0].modules
    base = live.base_model.model
    return [(Layer(path, base.get_submodule(path).base_layer).read()[0], r) for path, r in rotations.items()]


def kernels_alone(prepared: list[tuple[Any, Any]], mode: str) -> None:
    """The kernels' own work of a fold: the blocks of each rotation, and the folded weight with its error. Hashes, angles and
    modules are not in it. Each result is dropped before the next one.
    """
    for encoded, rotation in prepared:
        folded = kernels.fold(encoded, [rotation], encoded.format, inverse=False, rounding=mode)
        assert folded is not None
        del folded


# --- the first fold ---------------------------------------------------------------------------------------------------


def first(repeats: int, mode: str) -> dict[str, Any]:
    """Seconds of the first fold of a process after the imports, 1024 × 1024 in NF4 with double quantisation: with an empty
    cache of machine code, and with the cache that this fold has filled.
    """
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for own in times.values():
                own.append(_apart("first-fold", "--mode", mode, NUMBA_CACHE_DIR=folder))
    return {
        "machine": machine(),
        "mode": mode,
        **{f"{state}_s": round(statistics.median(own), 3) for state, own in times.items()},
        **{f"all_{state}_s": [round(x, 3) for x in own] for state, own in times.items()},
    }


def first_fold(mode: str) -> float:
    """Seconds of this process's first fold."""
    live = live_case(Case("nf4 nested", (1024, 1024)))
    return timed(lambda: oftsurgery.fold(live, rounding=mode))[0] / 1e3


# --- comparison and picture -------------------------------------------------------------------------------------------


def check(committed: dict[str, Any], threads: int, pairs: int, out: Path | None) -> int:
    """Measure a few layers, compare them with committed results, and print the verdict. Returns the exit code."""
    run = _one(threads, "check", pairs)
    runs = [run]
    slow = [row for row in compare.compare(run, committed) if row.slower]
    if slow:
        print(f"{len(slow)} rows are slower; they are measured twice again", file=sys.stderr)
        again = sorted({row.case for row in slow})
        runs += [_one(threads, "check", pairs, only=again) for _ in range(2)]
    if out is not None:
        _write(out, {"runs": runs})
    text, code = compare.verdict(runs, committed)
    print(text)
    return code


def plot(results: Path, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg" if out.suffix == ".svg" else "agg")
    from matplotlib import pyplot as plt

    rows = json.loads(results.read_text())["runs"][-1]["layers"]
    modes = [mode for mode in MODES[:2] if squares_of(rows, mode)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")

    def draw(mode: str, name: str, label: str) -> None:
        squares = squares_of(rows, mode)
        axes.plot([r["in"] for r in squares], [r[name]["median_ms"] for r in squares], marker="o", label=label)

    draw(modes[-1], "peft", "peft's merge")
    draw(modes[-1], "bitsandbytes", "bitsandbytes + torch")
    for mode in modes:
        draw(mode, "oftsurgery", f'oftsurgery.fold, "{mode}"')
    widths = [r["in"] for r in squares_of(rows, modes[-1])]
    axes.set(xscale="log", yscale="log", xlabel="width of a square NF4 layer, b = 32", ylabel="milliseconds")
    axes.set_xticks(widths, [str(width) for width in widths], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "model", "first", "check", "plot", "one", "first-fold"])
    parser.add_argument("file", nargs="?", type=Path, help="of `plot` and `check`: the results")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--full", action="store_true", help="more cases")
    parser.add_argument("--cases", choices=CASES, help="of `layers` and `one`: other cases")
    parser.add_argument("--only", action="append", default=[], help="of `one`: the label of a case")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="of `first` and `first-fold`")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of a layer of middle size, and of the model")
    parser.add_argument("--blocks", type=int, default=22, help="of the model")
    parser.add_argument("--device", default="cpu", help="of the layers")
    args = parser.parse_args()
    gc.collect()
    gc.freeze()  # the collection before each timing need not look at what the imports made: this takes a tenth of a second
    threads = min(2, os.cpu_count() or 1)
    name = args.cases or ("full" if args.full else "default")
    if args.what == "one":  # each number of threads has its own process: torch's number may not change after the start
        cases = [case for case in CASES[name] if not args.only or case.label in args.only]
        found = layers(cases, args.pairs, args.device)
        print(json.dumps(found))
    elif args.what == "first-fold":
        print(json.dumps(first_fold(args.mode)))
    elif args.what == "layers" and args.device != "cpu":
        runs = [layers(CASES[name], args.pairs, args.device)]
        _write(args.out or RESULTS / f"layers_{args.device}.json", {"runs": runs})
    elif args.what == "layers":
        wanted = {1: args.cases or "quick"} | {threads: name}
        runs = [_one(n, cases, args.pairs) for n, cases in wanted.items()]
        widths = (128,) if name == "tiny" else (1024, 4096)
        _write(args.out or RESULTS / "layers.json", {"runs": runs, "roundings": roundings(widths, 3 * args.pairs)})
    elif args.what == "model":
        _write(args.out or RESULTS / "model.json", model(args.blocks, args.pairs))
    elif args.what == "first":
        _write(args.out or RESULTS / "first.json", first(min(3, args.pairs), args.mode))
    elif args.what == "check":
        committed = json.loads((args.file or RESULTS / "layers.json").read_text())
        return check(committed, threads, args.pairs, args.out)
    else:
        plot(args.file or RESULTS / "layers.json", args.out or RESULTS / "width.svg")
    return 0


def _one(threads: int, cases: str, pairs: int, only: Sequence[str] = ()) -> Any:
    chosen = [word for label in only for word in ("--only", label)]
    return _apart("one", "--cases", cases, "--pairs", str(pairs), *chosen, OMP_NUM_THREADS=str(threads))


def _apart(*words: str, **environment: str) -> Any:
    """What a process of its own prints."""
    command = [sys.executable, __file__, *words]
    ran = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
    return json.loads(ran.stdout)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
