"""This benchmark times a fold on disk as users run it, beside a copy of the files, the imports alone, and peft. ``make bench``
runs the benchmark in about two minutes on two cores.

The benchmark writes a llama of 1.1 billion weights in NF4 (random bytes) to a temporary folder, with an adapter on every
linear that moves the weights by 3 %. Then it runs these ways in turn, in ``--repeats`` rounds:

* ``cp -r`` of the checkpoint, which does not wait for the disk;
* the whole commands ``oftsurgery plan``, ``fold``, ``show`` and ``report``, from the start of the process to its end; the fold
  has the default rounding, and waits for the disk (fsync);
* ``oftsurgery fold`` in a fresh environment: the cache of machine code (``NUMBA_CACHE_DIR``) and the user's cache with the
  notes of plans (``XDG_CACHE_HOME``) are empty folders;
* ``oftsurgery fold`` of a base that no note knows, with a full cache of machine code;
* the imports that a fold on disk cannot do without: a process that imports torch and transformers' modelling class;
* ``oftsurgery.fold_checkpoint`` in a process that reports the time without imports and without the loading of the kernels,
  and the peak of memory above both;
* with ``--peft``, once: transformers' loading, ``PeftModel.from_pretrained`` and ``merge_and_unload``, in memory, reported in
  the same way. This way takes minutes, and saves nothing, because transformers cannot save such a model.

The files are in the page cache for all ways; one fold and one copy before the first round do not count. Medians and ranges
go to the terminal, and all figures to ``benchmarks/results/fold_checkpoint.json``.
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
from timing import peak, processor, resident

import oftsurgery
from oftsurgery.records.record import versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))

IMPORTS = "import torch; from transformers import LlamaForCausalLM"
#: of the generators: weights are moved by 3 %
TURN = 0.0026
Figures = dict[str, float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="time peft too, once: minutes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fold_checkpoint.json")
    parser.add_argument("--alone", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def whole(command: list[str], **environment: str) -> Figures:
    """The time of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)
    return {"seconds": time.perf_counter() - start}


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
    before, start = resident(), time.perf_counter()
    if way == "peft":
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
        folded = sum("oft_R" in name for name, _ in model.named_parameters())
        assert folded == 7 * model.config.num_hidden_layers
        model.merge_and_unload()
    else:
        oftsurgery.fold_checkpoint(base, adapter, out, max_shard_size=shard_size)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": (peak() - before) / 2**20}))


def apart(way: str, *args: object) -> Figures:
    command = [sys.executable, __file__, "--alone", way, *map(str, args)]
    found: Figures = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def ways_of(base: Path, adapter: Path, out: Path, size: str, cache: Path) -> dict[str, Callable[[], Figures]]:
    """The ways in the order of a round. ``show`` and ``report`` read what the fold before them has written."""

    def command(*words: object, code: Path = cache / "code", notes: Path = cache / "notes") -> Figures:
        caches = {"NUMBA_CACHE_DIR": str(code), "XDG_CACHE_HOME": str(notes)}
        return whole([sys.executable, "-m", "oftsurgery", *map(str, words), "-q"], **caches)

    def fold(**caches: Path) -> Figures:
        shutil.rmtree(out, ignore_errors=True)
        return command("fold", base, adapter, out, "--max-shard-size", size, **caches)

    def fold_with_empty(*names: str) -> Figures:
        with tempfile.TemporaryDirectory() as empty:
            return fold(**{name: Path(empty) / name for name in names})

    def copy() -> Figures:
        shutil.rmtree(out, ignore_errors=True)
        return whole(["cp", "-r", str(base), str(out)])

    def without_imports() -> Figures:
        shutil.rmtree(out, ignore_errors=True)
        return apart("fold", base, adapter, out, size)

    return {
        "cp -r": copy,
        "imports alone": lambda: whole([sys.executable, "-c", IMPORTS]),
        "oftsurgery plan": lambda: command("plan", base, adapter),
        "oftsurgery fold, fresh": lambda: fold_with_empty("code", "notes"),
        "oftsurgery fold, first of a base": lambda: fold_with_empty("notes"),
        "oftsurgery fold": fold,
        "oftsurgery show": lambda: command("show", out),
        "oftsurgery report": lambda: command("report", out, "--html", out.parent / "report.html", "--force"),
        "oftsurgery.fold_checkpoint": without_imports,
    }


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
        base, adapter, out, cache = (Path(temporary) / name for name in ("base", "adapter", "out", "cache"))
        sizes = {"hidden": args.hidden, "intermediate": args.intermediate}
        nbytes = write_checkpoint(base, layers=args.layers, shards=args.shards, **sizes)
        shapes = linears(args.hidden, args.intermediate)
        paths = {f"model.layers.{i}.{path}": shape[1] for i in range(args.layers) for path, shape in shapes.items()}
        write_adapter(adapter, paths, turn=TURN)
        size = f"{nbytes // args.shards // 1_000_000 + 1}MB"
        ways = ways_of(base, adapter, out, size, cache)
        for name in ("cp -r", "oftsurgery fold"):  # files and machine code are in their caches from here on
            ways[name]()
        found: dict[str, list[Figures]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, work in ways.items():
                found[name].append(work())
        if args.peft:
            found["peft: load, merge, nothing saved"] = [apart("peft", base, adapter, out, size)]
    print(
        f"{nbytes / 1e9:.2f} GB in NF4, {len(paths)} weights, {torch.get_num_threads()} threads; {args.repeats} rounds"
    )
    for name, runs in found.items():
        times = [run["seconds"] for run in runs]
        most = f"; peak {statistics.median(run['peak_mb'] for run in runs):.0f} MB" if "peak_mb" in runs[0] else ""
        print(f"{name:<36}{statistics.median(times):8.2f} s ({min(times):.2f} to {max(times):.2f}){most}")
    facts = {
        "cpu": processor(),
        "bytes": nbytes,
        "folded": len(paths),
        "rounding": "preserve",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{name: getattr(args, name) for name in ("layers", "hidden", "intermediate", "shards", "repeats")},
        "runs": {name: [{k: round(v, 3) for k, v in run.items()} for run in runs] for name, runs in found.items()},
        "versions": versions(),
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
