"""How long a fold on disk takes, beside copying the files and beside peft: ``make bench``, about three minutes on two
cores.

A llama in NF4 of random bytes is written to a temporary folder, with an adapter on every linear. Then in turn,
``--repeats`` rounds:

* ``cp -r`` of the checkpoint, which does not wait for the disk; * ``oftsurgery.fold_checkpoint``, which does (fsync)
and leaves a whole checkpoint; * transformers' loading, ``PeftModel.from_pretrained`` and ``merge_and_unload``, in
memory: nothing is saved, since transformers cannot.

The files are in the page cache for all three; one fold and one copy before the first round do not count. Medians and
ranges go to the terminal, all times to ``benchmarks/results/fold_checkpoint.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
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
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peft-repeats", type=int, default=1, help="of those, with peft too, which takes minutes")
    return parser.parse_args()


def seconds_of(work: Callable[[], object], clean: Callable[[], object]) -> float:
    clean()
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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
        sizes = {"hidden": args.hidden, "intermediate": args.intermediate}
        nbytes = write_checkpoint(base, layers=args.layers, shards=args.shards, **sizes)
        shapes = linears(args.hidden, args.intermediate)
        paths = {f"model.layers.{i}.{path}": shape[1] for i in range(args.layers) for path, shape in shapes.items()}
        write_adapter(adapter, paths)

        def clean() -> None:
            shutil.rmtree(out, ignore_errors=True)

        size = f"{nbytes // args.shards // 1_000_000 + 1}MB"
        ways: dict[str, Callable[[], object]] = {
            "cp -r": lambda: subprocess.run(["cp", "-r", base, out], check=True),  # noqa: S607
            "oftsurgery.fold_checkpoint": lambda: oftsurgery.fold_checkpoint(base, adapter, out, max_shard_size=size),
            "peft: load, merge, nothing saved": lambda: merge_with_peft(base, adapter),
        }
        warm_up = {name: seconds_of(ways[name], clean) for name in list(ways)[:2]}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(args.repeats):
            for name, work in ways.items():
                if i < args.peft_repeats or not name.startswith("peft"):
                    seconds[name].append(seconds_of(work, clean))
    ours = seconds["oftsurgery.fold_checkpoint"]
    print(
        f"{nbytes / 1e9:.2f} GB in NF4, {len(paths)} weights, {torch.get_num_threads()} threads; {args.repeats} rounds"
    )
    for name, times in seconds.items():
        value = statistics.median(times)
        ratio = statistics.median(o / t for o, t in zip(ours, times, strict=False))
        print(f"{name:<36}{value:8.2f} s ({min(times):.2f} to {max(times):.2f})   ours takes {ratio:6.3f} ×")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    facts = {
        "bytes": nbytes,
        "folded": len(paths),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **vars(args),
        "warm_up_seconds": {name: round(t, 3) for name, t in warm_up.items()},
        "seconds": {name: [round(t, 3) for t in times] for name, times in seconds.items()},
        "versions": versions(),
    }
    (results / "fold_checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
