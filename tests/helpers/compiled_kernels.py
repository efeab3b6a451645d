"""Compile the Triton kernels for a GPU that is not there, as :mod:`oftsurgery.weights.kernels.fold_gpu` launches them.

    python tests/helpers/compiled_kernels.py ARCH [CASE …]     ARCH: 80, 90 …; without CASE all of CASES

Each line of the output is a launch: the kernel's name, its constants, bytes of shared memory, registers a thread, bytes of
stack a thread (spilt registers), as JSON. Needs Triton's wheel for Linux, which holds NVIDIA's assembler.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from oftsurgery import Cayley, Rotation, WeightFormat
from oftsurgery.errors import OFTSurgeryError
from oftsurgery.formats import codecs
from oftsurgery.weights import kernels
from oftsurgery.weights.kernels import fold_gpu, gpu, sweep_gpu

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHAPE = (64, 256)


def form(codec: str, blocksize: int = 0, nested: int = 0, dtype: torch.dtype = torch.float16) -> WeightFormat:
    return WeightFormat(codec, SHAPE, dtype, blocksize, nested)


NF4, NESTED, FP4, INT8 = form("nf4", 64), form("nf4", 64, 256), form("fp4", 128), form("int8")
F32, F16, BF16 = (form("dense", dtype=d) for d in (torch.float32, torch.float16, torch.bfloat16))
#: name → (from, into, b, one shared block, with a scale, roundings)
CASES: dict[str, tuple[WeightFormat, WeightFormat, int, bool, bool, tuple[str, ...]]] = {
    "nf4": (NF4, NF4, 32, False, False, ("nearest", "grid", "preserve")),
    "nf4 nested": (NESTED, NESTED, 64, False, True, ("nearest", "grid", "preserve")),
    "nf4 nested, wide": (NESTED, NESTED, 256, False, False, ("nearest", "grid", "preserve")),
    "fp4": (FP4, FP4, 32, True, False, ("nearest", "grid", "preserve")),
    "int8": (INT8, INT8, 32, False, False, ("nearest", "preserve")),
    "int8, wide": (INT8, INT8, 256, True, True, ("nearest", "preserve")),
    **{str(f.dtype): (f, f, 16, False, True, ("nearest",)) for f in (F32, F16, BF16)},
    "bf16, wide": (BF16, BF16, 256, False, False, ("nearest",)),
    "bf16 to nf4": (BF16, NESTED, 32, False, False, ("nearest", "grid")),
    "nf4 to int8": (NF4, INT8, 32, False, False, ("nearest",)),
    "int8 to nf4": (INT8, NF4, 32, False, False, ("nearest",)),
    "nf4 to bf16": (NESTED, BF16, 32, False, False, ("nearest",)),
}


class Absent:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Launches:
    """A kernel that is compiled where it should run."""

    def __init__(self, name: str, told: Callable[[dict[str, Any]], None]) -> None:
        self.name, self.told, self.kernel = name, told, getattr(gpu, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **how: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **how)
            self.told({"kernel": self.name, **how, "shared": compiled.metadata.shared, **usage(compiled.asm["cubin"])})

        return launch


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA / "cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def compile_case(name: str) -> None:
    f, into, b, shared, scaled, roundings = CASES[name]
    torch.manual_seed(0)
    encoded = codecs.encode(torch.randn(SHAPE).to(f.dtype if f.codec == "dense" else torch.float32) * 0.02, f)
    generator = torch.randn(1 if shared else SHAPE[1] // b, b * (b - 1) // 2) * 0.0001
    rotation = Rotation(generator=generator, cayley=Cayley(5), scale=torch.ones(SHAPE[0]) if scaled else None)
    matrices = kernels._matrices([rotation], SHAPE[1], inverse=False)
    for rounding in roundings:
        # what the kernels do not compute may be refused after the last launch
        with contextlib.suppress(OFTSurgeryError):
            fold_gpu.fold(encoded, into, *matrices, rounding)


def compile_sweep(f: WeightFormat) -> None:
    if f.quantised:
        grid = codecs.grid_of(codecs.encode(torch.randn(SHAPE), f))
        columns, matrix = torch.randn(128, SHAPE[0]), torch.randn(128, 128)
        sweep_gpu.sweep(grid, columns, columns.clone(), matrix, columns.clone())


def main(arch: int, *cases: str) -> None:
    warnings.simplefilter("ignore")
    driver.set_active(Absent(arch))
    for name in ("fold_four_bit", "fold_rows", "quantise_scales", "sweep"):
        setattr(gpu, name, Launches(name, lambda found: sys.stdout.write(json.dumps(found) + "\n")))
    for case in cases or CASES:
        compile_case(case)
        compile_sweep(CASES[case][1])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
