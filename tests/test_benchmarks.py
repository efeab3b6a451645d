"""The benchmarks: the guard fails for slower folds alone, and README's and docs' figures are those of the results."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    """A file of benchmarks/ that imports none of the others."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


compare, tables = load("compare"), load("tables")


def run(*ratios: float, cpu: str = "AMD EPYC", threads: int = 2, mode: str = "preserve") -> dict[str, Any]:
    """A run with a layer for each ratio to peft."""
    rows = [
        {"codec": "nf4", "out": 64, "in": 32 * (i + 1), "b": 32, "adapter": "trained", "mode": mode}
        | {"times_faster_than_peft": ratio}
        for i, ratio in enumerate(ratios)
    ]
    return {"machine": {"cpu": cpu, "processors": 2, "threads": threads}, "layers": rows}


def test_the_guard_passes_up_to_15_percent() -> None:
    text, code = compare.verdict([run(50.0, 87.0)], {"runs": [run(1.0, 1.0, threads=1), run(40.0, 100.0)]})
    assert code == 0
    assert text.splitlines() == [
        "    ok  nf4 64x32 b=32 trained, preserve: 50.0 x faster than peft, committed 40.0 x: 20% faster",
        "    ok  nf4 64x64 b=32 trained, preserve: 87.0 x faster than peft, committed 100.0 x: 15% slower",
        "All 2 rows are within 15% of the committed results, or faster.",
    ]


def test_the_guard_names_the_slower_row() -> None:
    committed = {"runs": [run(100.0, 100.0)]}
    text, code = compare.verdict([run(100.0, 86.0)], committed)
    assert code == 1
    assert "SLOWER  nf4 64x64 b=32 trained, preserve: 86.0 x faster than peft, committed 100.0 x: 16% slower" in text
    assert text.endswith("1 of 2 rows are more than 15% slower than the committed results.")
    assert [row.case for row in compare.compare(run(100.0, 86.0), committed) if row.slower] == [
        "nf4 64x64 b=32 trained"
    ]


def test_the_median_of_three_measurements_counts() -> None:
    committed = {"runs": [run(100.0, 100.0)]}
    assert compare.verdict([run(50.0, 100.0), run(95.0), run(90.0)], committed)[1] == 0
    assert compare.verdict([run(50.0, 100.0), run(95.0), run(60.0)], committed)[1] == 1


@pytest.mark.parametrize(
    "committed",
    [run(100.0, threads=1), run(100.0, mode="grid"), run()],
    ids=["other threads", "other mode", "no rows"],
)
def test_without_a_common_row_there_is_no_verdict(committed: dict[str, Any]) -> None:
    text, code = compare.verdict([run(100.0)], {"runs": [committed]})
    assert code == 2
    assert "run `make bench` first" in text


def test_rows_without_committed_results_and_another_machine_are_named() -> None:
    text, code = compare.verdict([run(100.0, 100.0)], {"runs": [run(100.0, cpu="Intel Xeon")]})
    assert code == 0
    assert "The committed results lack 1 of the measured rows." in text
    assert "of another machine (Intel Xeon, 2 processors; this machine is AMD EPYC, 2 processors)" in text


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_pages_have_the_figures_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- results: " in text
    assert tables.filled(text, tables.read()) == text, "run python benchmarks/tables.py"


def test_another_result_changes_the_page() -> None:
    results = tables.read()
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in results["layers"]["runs"][-1]["layers"]:
        row["times_faster_than_peft"] += 100
    assert tables.filled(page, results) != page


@pytest.mark.slow
def test_the_benchmark_runs_and_its_results_fill_every_table(tmp_path: Path) -> None:
    small = "--layers 1 --hidden 256 --intermediate 512 --shards 1 --repeats 1"
    commands = {
        "layers": "bench.py layers --cases tiny --pairs 1",
        "model": "bench.py model --blocks 1 --pairs 1",
        "first": "bench.py first --pairs 1",
        "fold_checkpoint": f"fold_checkpoint.py {small}",
    }
    for name, command in commands.items():
        script, *words = command.split()
        whole = [sys.executable, BENCHMARKS / script, *words, "--out", tmp_path / f"{name}.json"]
        subprocess.run(whole, check=True, capture_output=True)
    results = tables.read(tmp_path)
    assert compare.verdict(results["layers"]["runs"][-1:], results["layers"])[1] == 0
    # tiny layers have no row of 4096 × 4096
    assert [name for name, figures in tables.FIGURES.items() if not figures(results)] == ["single"]
