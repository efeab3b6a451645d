"""A command imports what it needs and no more: each row names packages that the command must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import quiet_fold
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
    quiet_fold(folder / "BASE", folder / "ADAPTER", folder / "FOLDED", trained_on="plain")
    return folder


def imported(place: Path, command: str, absent: tuple[str, ...]) -> list[str]:
    """The exit code of a command, and the packages of ``absent`` that the command has imported."""
    run = [sys.executable, "-c", RUN, " ".join(absent), *command.split()]
    done = subprocess.run(run, cwd=place, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    "command",
    ["show FOLDED", "show FOLDED --json", "report FOLDED --force", "verify FOLDED", "verify FOLDED --json"],
)
def test_the_readers_of_a_record_import_no_framework(place: Path, command: str) -> None:
    assert imported(place, command, HEAVY) == ["0"]
