"""The Triton kernels compile for GPUs, which the interpreter does not show: Triton's compiler and NVIDIA's assembler need no
GPU.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HELPER = Path(__file__).parents[1] / "helpers" / "compiled_kernels.py"
#: bytes of shared memory that a program may have on the smallest of today's GPUs (compute capability 8.6 and 8.9)
SHARED = 99 << 10

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="needs Triton's wheel, which holds NVIDIA's assembler",
)


def compiled(arch: int, *cases: str) -> list[dict[str, Any]]:
    """The launches of the cases, compiled for a GPU."""
    command = [sys.executable, str(HELPER), str(arch), *cases]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(launches: list[dict[str, Any]]) -> None:
    for launch in launches:
        assert launch["shared"] <= SHARED, launch
        assert launch["stack"] <= 64, launch  # few registers are spilt, if any
        assert not launch["enable_fp_fusion"], launch  # a fused product would change codes


def test_a_kernel_of_each_kind_compiles_for_a_gpu() -> None:
    launches = compiled(90, "nf4 nested", "int8")
    assert {x["kernel"] for x in launches} == {"fold_four_bit", "fold_rows", "quantise_scales", "sweep"}
    assert {x["MODE"] for x in launches if x["kernel"] == "fold_four_bit"} == {0, 1, 2}
    check(launches)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_every_kernel_compiles_for_every_gpu(arch: int) -> None:
    launches = compiled(arch)
    modes = {(x["MODE"], x["NESTED"]) for x in launches if x["kernel"] == "fold_four_bit"}
    assert modes == {(mode, nested) for mode in range(3) for nested in (False, True)}
    check(launches)
