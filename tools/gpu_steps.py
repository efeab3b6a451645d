"""The steps of :mod:`gpu_check`: ``python tools/gpu_steps.py STEP DEVICE FOUND SECONDS`` runs one step.

A step notes its figures in the JSON file FOUND as it finds them, so that they are there if it fails or is killed afterwards.
An error is told at the end of the step, after the other cases. On the device ``cpu`` the sizes are small, and Triton's kernels
run in its interpreter.

===========  ============================================================================================================
step         what ``found`` holds
===========  ============================================================================================================
environment  versions, the GPU, its memory, the backends, whether bitsandbytes computes on the device
codes        per format: weights, codes and statistics that differ from the CPU's reference with rotations that are exact in
             float32 (must be 0), and with others (a code on a midpoint may)
reference    per format and rounding: the largest relative difference of the figures and the share of other codes
images       per adapter of an image tool: distance from what the tool computes, share of codes that differ from the CPU's
layers       per bitsandbytes layer: whether folds before and after forwards give the same bytes, distance of the outputs
             from the live adapter's
training     losses of some steps of a wrapped model, whether merge and unmerge keep outputs and bytes
undo         whether each way between the devices gives every byte back
model        a fold of a language model: seconds, distance of the logits from the live adapter's, of the base's too
calibration  per format: seconds, memory and distance of the logits from the live adapter's, with texts and without
kernels      the device's own copy, gigabytes read and written a second; per format, rounding and tile (rows, warps): milliseconds
             of each launch alone, gigabytes a second of the stored weights, milliseconds of the whole call
times        per layer: the whole call beside peft's merge and bitsandbytes with torch, as benchmarks/bench.py measures
checkpoint   seconds of a fold on disk on the device and on the CPU, tensors that differ
tests        the last lines of ``pytest -m gpu``
===========  ============================================================================================================
"""

from __future__ import annotations

import faulthandler
import sys

if __name__ == "__main__":  # before the imports, which take seconds: a step that takes too long says where it was
    faulthandler.dump_traceback_later(max(1.0, float(sys.argv[4]) - 3), exit=True)

import logging
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_models import calibration, layers, model, training, undo
from gpu_step import TREE, Step
from gpu_times import checkpoint, kernels, times
from gpu_weights import codes, images, reference


def environment(step: Step) -> None:
    import bitsandbytes as bnb
    import peft
    import transformers
    import triton

    import oftsurgery

    modules = (torch, triton, bnb, peft, transformers, oftsurgery)
    step.note("python", sys.version.split()[0])
    step.note("versions", {m.__name__: m.__version__ for m in modules})
    step.note("tree", oftsurgery.__file__)
    step.check(Path(oftsurgery.__file__).is_relative_to(TREE), "the package is not this tree's")
    step.note("backends", oftsurgery.backends())
    step.check(oftsurgery.backends()["triton"] == "ready", "Triton's backend is not ready")
    if not step.small:
        properties = torch.cuda.get_device_properties(step.device)
        step.note(
            "gpu",
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": torch.cuda.get_device_capability(step.device),
                "cuda": torch.version.cuda,
            },
        )
    with step.case("the CPU's kernels, compiled") as figures:  # the next steps load them
        warmup = partial(
            subprocess.run, [sys.executable, "-m", "oftsurgery", "warmup"], check=True, capture_output=True
        )
        figures["seconds"] = step.timed(warmup)[0]
    with step.case("bitsandbytes") as figures:
        codes_, state = bnb.functional.quantize_4bit(torch.randn(64, 64, device=step.device), quant_type="nf4")
        back = bnb.functional.dequantize_4bit(codes_, state)
        figures |= {"device": str(back.device), "finite": bool(back.isfinite().all())}


def tests(step: Step) -> None:
    # the other files need packages that a machine with a GPU may lack; test_gpu_check.py's tests are the steps themselves
    files = [
        p for p in (TREE / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text() and p.name != "test_gpu_check.py"
    ]
    # warnings of other releases of torch are no faults
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        *map(str, files),
    ]
    if not step.small and find_spec("xdist"):  # most of the time goes to Triton's compiler
        command += ["-n", "4"]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=step.seconds)
    step.note("said", done.stdout.strip().splitlines()[-25:])
    step.note("exit_code", done.returncode)
    step.check(done.returncode == 0, f"pytest -m gpu: exit code {done.returncode}\n{done.stdout[-2500:]}")


STEPS: dict[str, Callable[[Step], None]] = {
    f.__name__: f
    for f in (
        environment,
        codes,
        reference,
        images,
        layers,
        training,
        undo,
        model,
        calibration,
        kernels,
        times,
        checkpoint,
        tests,
    )
}


def main(name: str, device: str, path: str, seconds: str) -> int:
    logging.disable(logging.WARNING)
    step = Step(device, Path(path), float(seconds))
    STEPS[name](step)
    for message in step.wrong:
        print(message)
    return 1 if step.wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
