"""The steps of :mod:`gpu_check` that take times: kernels alone, whole calls, a checkpoint on disk."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_step import Step, rotation_of, weight_in

import oftsurgery
from oftsurgery import EncodedWeight, WeightFormat
from oftsurgery.weights import kernels as backends
from oftsurgery.weights.kernels import fold_gpu, gpu


def benchmarked(step: Step, call: Callable[[], Any]) -> dict[str, Any]:
    """The median of milliseconds that ``call`` takes on the device: with an empty cache, and replayed as a graph, without the
    processor's part and with the cache as the call leaves it.
    """
    if step.small:
        return {"ms": step.timed(call)[0] * 1e3, "graph_ms": None}
    from triton.testing import do_bench, do_bench_cudagraph

    found: dict[str, Any] = {"ms": do_bench(call, warmup=10, rep=60, return_mode="median"), "graph_ms": None}
    with contextlib.suppress(Exception):  # not every call can be captured
        found["graph_ms"] = do_bench_cudagraph(call, rep=10, return_mode="median")
    return found


class Replayed:
    """A kernel whose launches are kept, to be launched again alone."""

    def __init__(self, kernel: Any, launches: list[Callable[[], Any]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **how: Any) -> Any:
            call = partial(self.kernel[grid], *args, **how)
            self.launches.append(call)
            return call()

        return launch


def kernels(step: Step) -> None:
    copied = torch.ones((1 << 20) if step.small else (1 << 28), device=step.device)
    to = torch.empty_like(copied)
    copy_ms = benchmarked(step, lambda: to.copy_(copied))["ms"]
    step.note("copy_gigabytes_per_second", 2 * copied.nbytes / copy_ms / 1e6)
    size = 128 if step.small else 4096
    cases = {
        "nf4": (WeightFormat("nf4", (size, size), torch.float16, 64), ("nearest", "grid", "preserve")),
        "nf4 nested": (WeightFormat("nf4", (size, size), torch.float16, 64, 256), ("nearest", "grid", "preserve")),
        "int8": (WeightFormat("int8", (size, size), torch.float16), ("nearest", "preserve")),
        "bfloat16": (WeightFormat("dense", (size, size), torch.bfloat16), ("nearest",)),
    }
    weights = {}
    for name, (f, _) in cases.items():
        weights[name] = EncodedWeight(f, {k: t.to(step.device) for k, t in weight_in(f).tensors.items()})
    usual, start = fold_gpu.tile_of(64), time.monotonic()
    tiles = [usual] if step.small else [usual, (16, 4), (32, 4), (64, 8)]
    for tile, (name, (_, roundings)) in itertools.product(tiles, cases.items()):
        for rounding in roundings:
            if tile != usual and time.monotonic() - start > 0.7 * step.seconds:
                return
            with step.case(f"{name}, {rounding}, {tile}") as figures:
                figures |= kernel_case(step, weights[name], rounding, tile)


def kernel_case(step: Step, encoded: EncodedWeight, rounding: str, tile: tuple[int, int]) -> dict[str, Any]:
    """Milliseconds of each launch of a fold alone, and of the fold's whole call."""
    f, order, launches = encoded.format, [rotation_of(encoded.format.shape[1], 0.0005)], []
    fold = partial(backends.fold, encoded, order, f, inverse=False, rounding=rounding)
    with pytest.MonkeyPatch.context() as patch, oftsurgery.use_backend("triton" if step.small else "auto"):
        patch.setattr(fold_gpu, "tile_of", lambda _: tile)
        with patch.context() as kept:
            for name in ("fold_four_bit", "fold_rows", "quantise_scales"):
                kept.setattr(gpu, name, Replayed(getattr(gpu, name), launches))
            result = fold()
        assert result is not None, "the kernel does not take the weight"
        each = [benchmarked(step, call) for call in launches]
        moved = sum(t.nbytes for e in (encoded, result.encoded) for t in e.tensors.values())
        call = min(step.timed(fold)[0] for _ in range(1 if step.small else 5))
    rate = moved / sum(one["ms"] for one in each) / 1e6
    return {"launches": each, "gigabytes_per_second": rate, "call_ms": call * 1e3, "backend": result.backend}


def times(step: Step) -> None:
    from bench import layer_rows
    from cases import CASES

    cases, start = CASES["tiny"][:1] if step.small else CASES["full"], time.monotonic()
    for i, case in enumerate(cases):
        if time.monotonic() - start > 0.7 * step.seconds:
            step.note("left_out", [c.label for c in cases[i:]])
            return
        with step.case(case.label) as figures:
            modes = [
                mode for mode in case.modes if mode != "mse"
            ]  # torch's operations search these scales, for seconds
            figures["rows"] = layer_rows(replace(case, modes=modes), 1 if step.small else 3, step.device)


def checkpoint(step: Step) -> None:
    from big import linears, write_adapter, write_checkpoint
    from safetensors import safe_open

    sizes = {"hidden": 256, "intermediate": 512} if step.small else {"hidden": 2048, "intermediate": 5632}
    depth = 1 if step.small else 4
    with tempfile.TemporaryDirectory() as temporary:
        base, adapter = Path(temporary) / "base", Path(temporary) / "adapter"
        step.note("bytes", write_checkpoint(base, layers=depth, shards=1, **sizes))
        paths = {f"model.layers.{i}.{p}": s[1] for i in range(depth) for p, s in linears(**sizes).items()}
        write_adapter(adapter, paths)
        for rounding in ("nearest", "preserve"):
            with step.case(rounding) as figures:
                read = []
                for device in ("cpu", step.device):
                    for turn in ("first_seconds", "seconds"):
                        out = Path(temporary) / f"{rounding}-{len(read)}-{turn}"
                        fold = partial(oftsurgery.fold_checkpoint, base, adapter, out, device=device, rounding=rounding)
                        figures[f"{turn} on {device}"] = step.timed(fold)[0]
                    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
                        read.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                codes_ = [
                    (t != read[1][n]).double().mean().item() for n, t in read[0].items() if t.dtype == torch.uint8
                ]
                figures["other_codes"] = max(codes_)
                # the factor of `preserve` comes from sums, and may be another by a 2048th of an octave
                assert figures["other_codes"] < (1e-4 if rounding == "nearest" else 1e-3), "the codes differ"
