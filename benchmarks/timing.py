"""How the benchmarks time a call, and what they say of the machine."""

from __future__ import annotations

import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of one call, and its result. The garbage is collected before the call."""
    gc.collect()
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    return (time.perf_counter() - start) * 1e3, result


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": round(middle, 3),
        "quartile_1": round(low, 3),
        "quartile_3": round(high, 3),
        "min_ms": round(min(times), 3),
    }


def ratio(over: list[float], under: list[float]) -> float:
    """The median of the ratios, pair by pair."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def reset_peak() -> None:
    """The peak of memory counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of this process at its peak."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Bytes of this process now."""
    return _status("VmRSS") or 0


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def machine(device: str = "cpu") -> dict[str, Any]:
    from oftsurgery.records.record import versions

    return {
        "cpu": processor(),
        **({"gpu": torch.cuda.get_device_name(device)} if device != "cpu" else {}),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **versions(),
        **ceilings(device),
    }


def ceilings(device: str) -> dict[str, float]:
    """The speed that this machine reaches now: copies of memory, and float32 products by torch."""
    a, m = torch.ones(1 << 26, device=device), torch.rand(2048, 2048, device=device)
    b = a.clone()
    copy = min(timed(lambda: b.copy_(a))[0] for _ in range(10))
    product = min(timed(lambda: m @ m)[0] for _ in range(10))
    return {
        "copy_gigabytes_per_second": round(2 * a.nbytes / copy / 1e6, 1),
        "product_gigaflops": round(2 * 2048**3 / product / 1e6, 1),
    }
