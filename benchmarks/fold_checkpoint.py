"""This benchmark times a fold on disk, beside a copy of the files and beside peft. ``make bench`` runs the benchmark in
about three minutes on two cores.

The benchmark writes a llama of 1.1 billion weights in NF4 (random bytes) to a temporary folder, with an adapter on every
linear. Then it runs three ways in turn, in ``--repeats`` rounds:

* ``cp -r`` of the checkpoint, which does not wait for the disk;
* ``oftsurgery.fold_checkpoint``, which waits for the disk (fsync) and leaves a whole checkpoint;
* transformers' loading, ``PeftModel.from_pretrained`` and ``merge_and_unload``, in memory: this way saves nothing, because
  transformers cannot save such a model.

The last two ways run in processes of their own. These processes report their time without imports and without the loading of
the kernels, and their peak of memory above both. The files are in the page cache for all three ways; one fold and one copy
before the first round do not count. Medians and ranges go to the terminal, and all figures to
``benchmarks/results/fold_checkpoint.json``.
"""

from __future__ import annotations

import argparse
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

import oftsurgery
from oftsurgery.records.record import versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peft-repeats", type=int, default=1, help="rounds that time peft too, which takes minutes")
    parser.add_argument("--alone", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def copy(base: Path, out: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", base, out], check=True)  # noqa: S607
    return {"seconds": time.perf_counter() - start}


def resident(what: str) -> int:
    """Bytes of this process; ``what`` is VmRSS (now) or VmHWM (at most)."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(what))
    return int(line.split()[1]) * 1024


def alone(way: str, base: Path, adapter: Path, out: Path, shard_size: str) -> None:
    """Run one fold or merge in this process, and print the figures."""
    # the imports take seconds, in both ways: a fold on disk asks transformers how the model's tensors are named
    import bitsandbytes  # noqa: F401
    from transformers import LlamaForCausalLM

    if way == "peft":
        from peft import PeftModel
    else:
        small = oftsurgery.Rotation(generator=torch.zeros(1, 496))
        oftsurgery.fold_weight(torch.eye(32), small)  # loads the kernels
    before, start = resident("VmRSS"), time.perf_counter()
    if way == "peft":
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
        folded = sum("oft_R" in name for name, _ in model.named_parameters())
        assert folded == 7 * model.config.num_hidden_layers
        model.merge_and_unload()
    else:
        oftsurgery.fold_checkpoint(base, adapter, out, max_shard_size=shard_size, rounding="nearest")
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": (resident("VmHWM") - before) / 2**20}))


def apart(way: str, *args: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--alone", way, *map(str, args)]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.alone:
        way, base, adapter, out, size = args.alone
        alone(way, Path(base), Path(adapter), Path(out), size)
        return
    from big import linears, write_adapter, write_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        base, adapter, out = (Path(temporary) / name for name in ("base", "adapter", "out"))
        sizes = {"hidden": args.hidden, "intermediate": args.intermediate}
        nbytes = write_checkpoint(base, layers=args.layers, shards=args.shards, **sizes)
        shapes = linears(args.hidden, args.intermediate)
        paths = {f"model.layers.{i}.{path}": shape[1] for i in range(args.layers) for path, shape in shapes.items()}
        write_adapter(adapter, paths)
        size = f"{nbytes // args.shards // 1_000_000 + 1}MB"
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "cp -r": lambda: copy(base, out),
            "oftsurgery.fold_checkpoint": lambda: apart("fold", base, adapter, out, size),
            "peft: load, merge, nothing saved": lambda: apart("peft", base, adapter, out, size),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for i in range(-1, args.repeats):  # the first round warms up
            for name, work in ways.items():
                if not name.startswith("peft") or 0 <= i < args.peft_repeats:
                    shutil.rmtree(out, ignore_errors=True)
                    figures = work()
                    found[name].extend([figures] if i >= 0 else [])
    ours = found["oftsurgery.fold_checkpoint"]
    print(
        f"{nbytes / 1e9:.2f} GB in NF4, {len(paths)} weights, {torch.get_num_threads()} threads; {args.repeats} rounds"
    )
    for name, runs in ((name, runs) for name, runs in found.items() if runs):
        times = [run["seconds"] for run in runs]
        ratio = statistics.median(o["seconds"] / t for o, t in zip(ours, times, strict=False))
        peak = f"; peak {statistics.median(run['peak_mb'] for run in runs):.0f} MB" if "peak_mb" in runs[0] else ""
        print(
            f"{name:<36}{statistics.median(times):8.2f} s ({min(times):.2f} to {max(times):.2f})   ours takes {ratio:6.3f} ×{peak}"
        )
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    facts = {
        "bytes": nbytes,
        "folded": len(paths),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{name: value for name, value in vars(args).items() if name != "alone"},
        "runs": {name: [{k: round(v, 3) for k, v in run.items()} for run in runs] for name, runs in found.items()},
        "versions": versions(),
    }
    (results / "fold_checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
