"""The sweep of families runs every cell of the table, one process a class, and writes docs/families.json and docs/model-families.md.

    python tests/families/sweep.py                      runs every class; a stopped sweep goes on
    python tests/families/sweep.py --only llama,bert    runs the classes whose names begin so, again if they have results
    python tests/families/sweep.py --compare OLD.json   says what has changed since another sweep
    python tests/families/sweep.py --finished           writes what a stopped sweep has finished, and runs nothing
    python tests/families/sweep.py --page               writes the page from the JSON, and runs nothing

The exit code is 1 if a cell is wrong, crashes, or is refused for a reason that is not in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers"), str(ROOT)]

from families_page import PAGE, page_of  # noqa: E402 - the line above adds the path
from results import ADAPTERS, BASES, RESULTS, changes, read_results, trouble, write_results  # noqa: E402

#: results of the classes that a stopped sweep has finished
UNFINISHED = ROOT / ".families"
PACKAGES = ("transformers", "peft", "bitsandbytes", "torch", "accelerate", "onnxruntime")


def run_one(cls: str, out: Path) -> None:
    """All cells of one class, in this process."""
    from cells import run_family
    from families import FAMILIES

    with tempfile.TemporaryDirectory() as folder:
        found = run_family(
            FAMILIES[cls],
            Path(folder),
            list(product(BASES, ADAPTERS)),
            graphs=not os.environ.get("FAMILIES_WITHOUT_ONNX"),
        )
        told = {
            cell: [[f.step, f.verdict, f.error, f.text.replace(folder, "…")] for f in findings]
            for cell, findings in found.items()
            if findings
        }
    out.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def run_in_process(cls: str, limit: int) -> None:
    """:func:`run_one` in a process of its own; a process that crashes or takes too long becomes a finding."""
    start, out = time.monotonic(), UNFINISHED / f"{cls}.json"
    log = UNFINISHED / f"{cls}.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    part = out.with_suffix(".part")
    with log.open("w", encoding="utf-8") as told:
        command = [sys.executable, __file__, "--one", cls, str(part)]
        try:
            code = subprocess.run(
                command, env=environment, stdout=told, stderr=told, timeout=limit, check=False
            ).returncode
            reason = "" if part.exists() else f"the process ended with {code}: {log.read_text(encoding='utf-8')[-300:]}"
        except subprocess.TimeoutExpired:
            reason = f"no end after {limit} s"
    if reason:
        finding = [["all", "crash", "process", " ".join(reason.split())]]
        part.write_text(json.dumps({f"{b}, {a}": finding for b, a in product(BASES, ADAPTERS)}), encoding="utf-8")
    part.replace(out)
    troubles = trouble({cls: json.loads(out.read_text(encoding="utf-8"))})
    print(f"{cls}: {time.monotonic() - start:.0f} s, {len(troubles)} in trouble", flush=True)


def sweep(classes: list[str], jobs: int, limit: int) -> dict[str, Any]:
    """Run the classes that have no result yet, and return the results of all classes."""
    UNFINISHED.mkdir(exist_ok=True)
    missing = [cls for cls in classes if not (UNFINISHED / f"{cls}.json").exists()]
    print(f"{len(missing)} of {len(classes)} classes to run, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cls: run_in_process(cls, limit), missing))
    return finished(classes)


def finished(classes: list[str]) -> dict[str, Any]:
    """The results of the classes that have run."""
    paths = {cls: UNFINISHED / f"{cls}.json" for cls in classes}
    return {cls: json.loads(path.read_text(encoding="utf-8")) for cls, path in paths.items() if path.exists()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="beginnings of class names, with commas between them; these classes run again"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit", type=int, default=1200, help="seconds that one class may take")
    parser.add_argument(
        "--compare", type=Path, help="the JSON of another sweep (default: docs/families.json before this sweep)"
    )
    parser.add_argument("--page", action="store_true", help="write the page from the JSON alone")
    parser.add_argument(
        "--finished", action="store_true", help="write what a stopped sweep has finished, and run nothing"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given.one[0], Path(given.one[1]))
        return 0
    old = read_results(given.compare or RESULTS)
    results = read_results(RESULTS)
    if not given.page:
        from families import FAMILIES

        starts = tuple(name.strip().lower() for name in given.only.split(",") if name.strip())
        classes = [cls for cls in FAMILIES if not starts or cls.lower().startswith(starts)]
        if starts and not given.finished:
            for cls in classes:
                (UNFINISHED / f"{cls}.json").unlink(missing_ok=True)
        found = finished(classes) if given.finished else sweep(classes, given.jobs, given.limit)
        keeps = starts or given.finished
        kept = {cls: row for cls, row in results["families"].items() if cls in FAMILIES} if keeps else {}
        results = {"versions": {name: metadata.version(name) for name in PACKAGES}, "families": kept | found}
        write_results(results)
    PAGE.write_text(page_of(results), encoding="utf-8")
    for line in changes(old, results):
        print(line)
    troubles = trouble(results["families"])
    print(*troubles, sep="\n")
    print(f"{len(results['families'])} classes, {len(troubles)} cells in trouble")
    if not given.page and not given.only and not given.finished:
        shutil.rmtree(UNFINISHED)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
