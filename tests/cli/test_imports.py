"""A command imports what it needs and no more: each row names packages that the command must not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import bnb_config, load, quiet_fold
from models import live, llama

HEAVY = ("torch", "numpy", "transformers", "peft", "bitsandbytes", "numba", "scipy", "accelerate", "matplotlib")
RUN = """
import sys
from oftsurgery.cli.main import main
code = main(sys.argv[2:])
print(code, *(name for name in sys.argv[1].split() if name in sys.modules), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports")
    llama().save_pretrained(folder / "BASE")
    live(llama()).save_pretrained(folder / "ADAPTER")
    nf4 = load(folder / "BASE", "LlamaForCausalLM", quantization_config=bnb_config("nf4"), dtype=torch.float32)
    nf4.save_pretrained(folder / "NF4")
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "FOLDED", trained_on="plain")
    return folder


def imported(place: Path, command: str, absent: tuple[str, ...]) -> list[str]:
    """The exit code of a command, and the packages of ``absent`` that the command has imported."""
    run = [sys.executable, "-c", RUN, " ".join(absent), *command.split()]
    env = os.environ | {"XDG_CACHE_HOME": str(place / "cache")}
    done = subprocess.run(run, cwd=place, env=env, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    "command",
    ["show FOLDED", "show FOLDED --json", "report FOLDED --force", "verify FOLDED", "verify FOLDED --json"],
)
def test_the_readers_of_a_record_import_no_framework(place: Path, command: str) -> None:
    assert imported(place, command, HEAVY) == ["0"]


def test_a_fold_after_its_plan_imports_no_model_of_transformers(place: Path) -> None:
    assert imported(place, "plan NF4 ADAPTER", ("transformers",)) == ["0", "transformers"]
    others = tuple(name for name in HEAVY if name not in ("torch", "numpy"))
    assert imported(place, "fold NF4 ADAPTER OUTPUT", others) == ["0"]
