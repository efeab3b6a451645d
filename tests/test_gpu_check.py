"""tools/gpu_check.py: what it brings along, that no step takes others with it, and its steps: on the CPU (slow), and on a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TOOL = Path(__file__).parent.parent / "tools" / "gpu_check.py"
#: the steps that check results
CHECKS = (
    "environment",
    "codes",
    "reference",
    "images",
    "layers",
    "training",
    "undo",
    "model",
    "calibration",
    "checkpoint",
)

#: stands in for tools/gpu_steps.py: each step behaves in its own way
STEPS = """
import json, os, sys, time
name, device, found, seconds = sys.argv[1:]
open(found, "w").write(json.dumps({"step": name}))
if name == "codes":
    os.abort()
if name == "layers":
    print("what went wrong")
    raise SystemExit(1)
if name == "undo":
    time.sleep(600)
"""


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_step_takes_the_others_with_it(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, out = tmp_path / "steps.py", tmp_path / "told.json"
    steps.write_text(STEPS)
    monkeypatch.setattr(tool, "STEPS", steps)
    monkeypatch.setitem(tool.LIMITS, "undo", 2)
    names = ["codes", "layers", "undo", "model"]
    args = argparse.Namespace(device="cpu", out=out, wheels=tmp_path / "none", only=names, budget=60)
    told = tool.run_steps(args)
    assert json.loads(out.read_text()) == told
    assert not told["ok"]
    assert {name: step["state"] for name, step in told["steps"].items()} == {
        "codes": "failed",
        "layers": "failed",
        "undo": "timed out",
        "model": "passed",
    }
    assert all(step["found"] == {"step": name} for name, step in told["steps"].items())
    assert told["steps"]["layers"]["error"] == "exit code 1: what went wrong"
    args.budget = 1
    assert {step["state"] for step in tool.run_steps(args)["steps"].values()} == {"skipped"}


def test_what_pyproject_names_is_asked_for(tool: ModuleType) -> None:
    names = {r.name for r in tool.requirements()}
    assert {"torch", "bitsandbytes", "peft", "transformers", "safetensors", "triton", "pytest"} <= names
    assert tool.unmet() == []
    assert {r.name for r in tool.unmet([])} == names


def test_a_package_that_is_missing_comes_from_the_wheels(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wheels of an environment's own packages, in which pip finds all that it needs."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wanted = [r for r in tool.requirements() if r.name in ("bitsandbytes", "shtab", "xxhash")]
    monkeypatch.setattr(tool, "requirements", lambda: wanted)
    made = tool.pack(wheels, "13")
    assert [w.name.partition("-")[0] for w in made] == ["bitsandbytes", "shtab"]  # xxhash is code for one Python
    libraries = [n for n in zipfile.ZipFile(made[0]).namelist() if n.endswith(".so")]
    assert {n.rpartition("bitsandbytes_")[2][:6] for n in libraries} == {"cpu.so", "cuda13"}
    assert made[0].stat().st_size < 16 << 20
    wanted[:] = [r for r in wanted if r.name != "xxhash"]
    real = tool.unmet
    monkeypatch.setattr(tool, "unmet", lambda path=None: real([] if path is None else path[:1]))  # of the site alone
    told = tool.fetch(wheels, site, 120)
    assert told == {"from_wheels": [w.name for w in made], "from_index": [], "missing": []}
    assert (site / "bitsandbytes" / "functional.py").is_file()


def checked(tmp_path: Path, device: str, *names: str) -> dict[str, Any]:
    out = tmp_path / "told.json"
    command = [sys.executable, str(TOOL), "--device", device, "--out", str(out), "--budget", "900", "--only", *names]
    subprocess.run(command, check=False, timeout=1000)
    told = json.loads(out.read_text())
    return {name: step.get("error", step["state"]) for name, step in told["steps"].items()}


@pytest.mark.slow
def test_every_step_runs_without_a_gpu(tool: ModuleType, tmp_path: Path) -> None:
    assert checked(tmp_path, "cpu", *tool.LIMITS) == dict.fromkeys(tool.LIMITS, "passed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_on_a_gpu(name: str, tmp_path: Path) -> None:
    assert checked(tmp_path, "cuda", name) == {name: "passed"}
