"""How long a fold on disk takes, beside copying the files and beside peft: ``make bench``.

A llama in NF4 of random bytes is written to a temporary folder, with an adapter on every linear. Then in turn, each ``--repeats`` times and by its
median: ``cp`` of the checkpoint's files; ``oftsurgery.fold_checkpoint``; and transformers' loading, ``PeftModel.from_pretrained`` and
``merge_and_unload``, after which nothing is saved, since transformers cannot. The files are in the page cache for all three. The table goes to the
terminal, the numbers to ``benchmarks/results/fold_checkpoint.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import oftsurgery
from oftsurgery.record import versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from big import linears, write_adapter, write_checkpoint  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def median_seconds(work: Callable[[], object], clean: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        clean()
        gc.collect()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    clean()
    return statistics.median(times)


def merge_with_peft(base: Path, adapter: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    peft_model = PeftModel.from_pretrained(model, adapter)
    assert sum("oft_R" in name for name, _ in peft_model.named_parameters()) == 7 * model.config.num_hidden_layers
    peft_model.merge_and_unload()


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        base, adapter, out = (Path(temporary) / name for name in ("base", "adapter", "out"))
        nbytes = write_checkpoint(base, layers=args.layers, shards=args.shards, hidden=args.hidden, intermediate=args.intermediate)
        shapes = linears(args.hidden, args.intermediate)
        paths = {f"model.layers.{i}.{path}": shape[1] for i in range(args.layers) for path, shape in shapes.items()}
        write_adapter(adapter, paths)

        def clean() -> None:
            shutil.rmtree(out, ignore_errors=True)

        size = f"{nbytes // args.shards // 1_000_000 + 1}MB"
        ways: dict[str, Callable[[], object]] = {
            "cp -r": lambda: subprocess.run(["cp", "-r", base, out], check=True),  # noqa: S603, S607
            "oftsurgery.fold_checkpoint": lambda: oftsurgery.fold_checkpoint(base, adapter, out, max_shard_size=size),
            "peft: load, merge, nothing saved": lambda: merge_with_peft(base, adapter),
        }
        seconds = {name: median_seconds(work, clean, args.repeats) for name, work in ways.items()}
    ours = seconds["oftsurgery.fold_checkpoint"]
    print(f"{nbytes / 1e9:.2f} GB in NF4, {len(paths)} weights folded, {torch.get_num_threads()} threads; medians of {args.repeats}")
    for name, value in seconds.items():
        print(f"{name:<36}{value:8.2f} s   {nbytes / value / 1e6:8.1f} MB/s   ours takes {ours / value:6.2f} ×")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    facts = {"bytes": nbytes, "folded": len(paths), "threads": torch.get_num_threads(), **vars(args), "seconds": seconds, "versions": versions()}
    (results / "fold_checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
