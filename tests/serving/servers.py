"""Real servers generate from folded checkpoints what transformers 5 generates. pytest collects this file only when a command names it:
`make test-serving`, `make test-vllm` and `make test-gguf LLAMA_CPP=…`, each with an environment of its own in SERVER_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PYTHON = os.environ.get("SERVER_PYTHON", "")


def run(*command: object, **environment: str) -> str:
    """The standard output of a command, and its errors where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("smollm2")
    run(sys.executable, HERE / "smollm2.py", place, PYTHON)
    return place


@pytest.fixture(scope="session")
def facts(folders: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folders / "expected.json").read_text("utf-8"))
    return found


def generated(kind: str, model: Path, folders: Path, **environment: str) -> list[int]:
    said = run(PYTHON, HERE / "generate.py", kind, model, folders / "expected.json", **environment)
    # servers print messages of their own before the last line and after it
    return next(json.loads(line) for line in reversed(said.splitlines()) if line.startswith("[") and line.endswith("]"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["BF16", "NF4", "INT8"])
def test_transformers4(name: str, folders: Path, facts: dict[str, Any]) -> None:
    assert generated("transformers", folders / name, folders) == facts["expected"][name]


@pytest.mark.parametrize("name", ["BF16", "NF4"])
def test_vllm(name: str, folders: Path, facts: dict[str, Any]) -> None:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    made, expected = generated("vllm", folders / name, folders, **settings), facts["expected"][name]
    # vLLM rounds to bfloat16 at other places than transformers, so a near tie may fall to another token later on
    assert made[:4] == expected[:4]


def test_llama_cpp(folders: Path, facts: dict[str, Any]) -> None:
    converter = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    tool = ["--format", "gguf", "--converter", converter, "--converter-python", PYTHON]
    run(sys.executable, "-m", "oftsurgery", "export", folders / "BF16", folders / "GGUF", *tool)
    record = json.loads((folders / "GGUF" / "oftsurgery.json").read_text("utf-8"))["gguf"]
    assert (record["equal"], len(record["changed"])) == (212, 60)
    assert (record["uncompared"], record["without_template"]) == ({}, None)
    assert generated("llama_cpp", folders / "GGUF" / "model.gguf", folders) == facts["expected"]["FLOAT32"]
