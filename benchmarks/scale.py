"""This benchmark times folds on disk by one process and by the workers of executors, and folds of many adapters. The benchmark
writes a llama of 1.1 billion weights in NF4 (random bytes, 0.64 GB in 4 files), one of 3.5 billion weights in one file (2.0 GB), and
adapters on every linear, and runs these ways in turn, in ``--repeats`` rounds; the files are in the page cache:

* ``one``: ``fold_checkpoint`` in this process, which has folded before;
* ``processes 1``, ``2``, ``4``: the same with a ``ProcessPoolExecutor`` whose workers have folded before, one thread each;
* ``commands``: ``oftsurgery fold`` for each of 8 adapters, and ``many``: ``oftsurgery fold-many`` of the 8, as whole processes;
* with ``--calibration``, alone: the same ways with 1 and 2 workers for a calibrated fold of a llama of 52 million weights in 4 blocks, on
  32,768 random tokens;
* with ``--ray``, in an environment that has Ray: two nodes with one processor each;
* ``2 GB``: the fold of the one file by 4 processes: the peak of memory of each process above what the process held after its imports,
  beside that of one process.

Each figure has the time on the clock and the time of the processors, of this process and its workers: other programs on the
machine change the first figure most. Medians go to ``benchmarks/results/scale.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from timing import peak

import oftsurgery
from oftsurgery.records.record import versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))

HIDDEN, INTERMEDIATE, ADAPTERS = 2048, 5632, 8


def write(folder: Path, layers: int, shards: int) -> None:
    import big

    big.write_checkpoint(folder / "base", layers=layers, shards=shards, hidden=HIDDEN, intermediate=INTERMEDIATE)
    widths = {
        f"model.layers.{i}.{p}": s[1] for i in range(layers) for p, s in big.linears(HIDDEN, INTERMEDIATE).items()
    }
    for i in range(ADAPTERS):
        big.write_adapter(folder / f"adapter-{i}", widths, turn=0.0026 + 0.0002 * i)


def used() -> tuple[float, int]:
    """The processor's time of this process in seconds, and its peak of memory in bytes."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime, peak()


def of_worker(_: int) -> tuple[int, float, int]:
    time.sleep(0.2)  # so that each worker takes one
    return (os.getpid(), *used())


def of_workers(pool: Executor, count: int) -> dict[int, tuple[float, int]]:
    found: dict[int, tuple[float, int]] = {}
    while len(found) < count:
        found |= {pid: (cpu, peak) for pid, cpu, peak in pool.map(of_worker, range(2 * count))}
    return found


def write_plain(folder: Path) -> None:
    import big
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=512, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    shapes = big.linears(1024, 2816).items()
    big.write_adapter(
        folder / "adapter-0", {f"model.layers.{i}.{p}": s[1] for i in range(4) for p, s in shapes}, turn=0.01
    )


def calibration() -> dict[str, Any]:
    import torch

    tokens = torch.randint(0, 512, (32, 8, 128), generator=torch.Generator().manual_seed(0))
    return {"format": "nf4", "calibration": [{"input_ids": batch} for batch in tokens]}


def fold(folder: Path, executor: Any = None, **settings: Any) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oftsurgery.fold_checkpoint(folder / "base", folder / "adapter-0", folder / "out", executor=executor, **settings)


def timed(work: Callable[[], object], cpu: Callable[[], float]) -> dict[str, float]:
    start, before = time.perf_counter(), cpu()
    work()
    return {"seconds": time.perf_counter() - start, "processor": cpu() - before}


def by_processes(folder: Path, count: int, **settings: Any) -> tuple[dict[str, float], list[int]]:
    """The second fold of a pool, whose workers have folded; and the growth of each worker's peak above its imports."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(imports, range(2 * count)))
        base = of_workers(pool, count)
        fold(folder, pool, **settings)
        before = used()[0] + sum(cpu for cpu, _ in of_workers(pool, count).values())
        found = timed(lambda: fold(folder, pool, **settings), lambda: 0.0)
        found["processor"] = used()[0] + sum(cpu for cpu, _ in of_workers(pool, count).values()) - before
        after = of_workers(pool, count)
    del os.environ["OMP_NUM_THREADS"], os.environ["NUMBA_NUM_THREADS"]
    return found, [after[pid][1] - base[pid][1] for pid in after if pid in base]


def imports(_: int) -> None:
    """What each worker imports before its first task, which is no part of the times."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    time.sleep(0.2)


def command(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "oftsurgery", *map(str, words), "-q"],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def children() -> float:
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime


def commands(folder: Path) -> None:
    for i in range(ADAPTERS):
        command("fold", folder / "base", folder / f"adapter-{i}", folder / f"many-{i}", "--force")


def many(folder: Path) -> None:
    listed = [{"adapter": f"{folder}/adapter-{i}", "output": f"{folder}/many-{i}"} for i in range(ADAPTERS)]
    (folder / "list.yaml").write_text(json.dumps(listed))
    command("fold-many", folder / "base", "--adapters", folder / "list.yaml", "--force")


def by_ray(folder: Path) -> dict[str, float]:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with oftsurgery.RayExecutor(cluster.address) as executor:
        fold(folder, executor)
        found = timed(lambda: fold(folder, executor), lambda: used()[0])
    ray.shutdown()
    cluster.shutdown()
    return {"seconds": found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="time two nodes of Ray alone, beside one process")
    parser.add_argument("--calibration", action="store_true", help="time calibrated folds alone")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        small, large = Path(place) / "small", Path(place) / "large"
        settings = calibration() if args.calibration else {}
        if args.calibration:
            write_plain(small)
        else:
            write(small, 22, 4)
        fold(small, **settings)
        for _ in range(args.repeats):
            found.setdefault("one", []).append(timed(lambda: fold(small, **settings), lambda: used()[0]))
            if args.ray:
                found.setdefault("ray, two nodes", []).append(by_ray(small))
                continue
            for count in (1, 2) if args.calibration else (1, 2, 4):
                found.setdefault(f"processes {count}", []).append(by_processes(small, count, **settings)[0])
            if args.calibration:
                continue
            found.setdefault("commands", []).append(timed(lambda: commands(small), children))
            found.setdefault("many", []).append(timed(lambda: many(small), children))
            show(found)
        shutil.rmtree(small)
        facts: dict[str, Any] = {
            "processors": os.cpu_count(),
            "versions": versions(),
            "medians": {way: median(rows) for way, rows in found.items()},
        }
        if not args.ray and not args.calibration:
            write(large, 69, 1)
            facts["2 GB, peak of each of 4 processes in MB"] = [round(n / 1e6) for n in by_processes(large, 4)[1]]
            facts["2 GB, peak of one process in MB"] = [round(n / 1e6) for n in by_processes(large, 1)[1]]
    show(found)
    print(json.dumps(facts, indent=2))
    name = "scale-ray.json" if args.ray else "scale-calibration.json" if args.calibration else "scale.json"
    (HERE / "results" / name).write_text(json.dumps(facts, indent=2) + "\n")


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {what: round(statistics.median(row[what] for row in rows), 2) for what in rows[0]}


def show(found: dict[str, list[dict[str, float]]]) -> None:
    for way, rows in found.items():
        print(f"{way:16}", *(f"{what} {value:.2f}" for what, value in median(rows).items()), flush=True)


if __name__ == "__main__":
    main()
