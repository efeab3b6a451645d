"""What the steps of :mod:`gpu_check` share: the figures that a step notes, weights, small models."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TREE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TREE / "tests" / "helpers"), str(TREE / "benchmarks")]

import models  # noqa: E402

import oftsurgery  # noqa: E402
from oftsurgery import Cayley, EncodedWeight, Rotation, WeightFormat, rotations  # noqa: E402
from oftsurgery.formats import codecs  # noqa: E402
from oftsurgery.weights.fold import fold_encoded  # noqa: E402


class Step:
    """What a step knows of its run, and its figures."""

    def __init__(self, device: str, path: Path, seconds: float) -> None:
        self.device, self.path, self.seconds = device, path, seconds
        self.small = device == "cpu"
        self.found: dict[str, Any] = {}
        self.wrong: list[str] = []

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.path.write_text(json.dumps(self.found, default=str))

    def check(self, right: bool, message: str) -> None:
        if not right:
            self.wrong.append(message)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """A case of the step; the next case runs after an error too."""
        figures: dict[str, Any] = {}
        try:
            yield figures
        except Exception as error:
            figures["error"] = f"{type(error).__name__}: {error}"[-1500:]
            self.wrong.append(f"{name}: {figures['error']}")
        self.note(name, figures)

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def timed(self, call: Callable[..., Any], *args: Any, **how: Any) -> tuple[float, Any]:
        """Seconds that ``call`` took, the device's work included, and its result."""
        self.wait()
        start = time.perf_counter()
        result = call(*args, **how)
        self.wait()
        return time.perf_counter() - start, result


# --- weights ------------------------------------------------------------------------------------------------------


def formats(small: bool, rows: int = 1024) -> dict[str, Any]:
    """The formats of the steps, by name."""
    shape = (40, 128) if small else (rows, 4096)
    quantised = {
        "nf4": ("nf4", torch.float16, 64, 0),
        "nf4 nested": ("nf4", torch.float16, 64, 256),
        "fp4": ("fp4", torch.float16, 128, 0),
        "int8": ("int8", torch.float16, 0, 0),
    }
    plain = {name: ("dense", getattr(torch, name), 0, 0) for name in ("float32", "float16", "bfloat16")}
    return {
        name: WeightFormat(codec, shape, dtype, size, nested)
        for name, (codec, dtype, size, nested) in (quantised | plain).items()
    }


def rotation_of(features: int, amplitude: float, b: int = 32) -> Any:
    """A random rotation; with the amplitude 0 one that float32 computes exactly: columns swapped in pairs."""
    if amplitude:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(features // b, b * (b - 1) // 2, generator=generator) * amplitude
        return Rotation(generator=rows, cayley=Cayley(5))
    q = torch.zeros(features // b, b, b)
    for i in range(0, b - 1, 2):
        q[:, i, i + 1], q[:, i + 1, i] = -1, 1
    return Rotation(generator=rotations.vector(q))


def weight_in(f: Any) -> Any:
    weight = torch.randn(f.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return codecs.encode(weight.to(f.dtype) if f.codec == "dense" else weight, f)


def folded(encoded: Any, rotation: Any, rounding: str, backend: str, device: str) -> Any:
    """The fold on a device, brought back."""
    there = EncodedWeight(encoded.format, {k: t.to(device) for k, t in encoded.tensors.items()})
    with oftsurgery.use_backend(backend):
        result = fold_encoded(there, (rotation,), rounding=rounding)
    for name, tensor in result.encoded.tensors.items():
        assert tensor.device.type == torch.device(device).type, f"{name} lies on {tensor.device}"
    return result, result.encoded.cpu()


def differing(got: Any, want: Any) -> dict[str, int]:
    """The number of entries of each stored tensor that differ."""
    return {name: int((tensor != want.tensors[name]).sum()) for name, tensor in got.tensors.items()}


# --- models -------------------------------------------------------------------------------------------------------


def tiny(device: str, kind: str, tokens: int = 2) -> tuple[nn.Module, Any, Tensor]:
    """A small llama on a device, quantised there by bitsandbytes; its live twin; inputs."""
    model = models.llama() if kind == "plain" else models.quantise(models.llama(), kind, device)
    with tempfile.TemporaryDirectory() as folder:
        models.live(models.llama()).save_pretrained(folder)
        adapter = oftsurgery.load_adapter(folder)
    inputs = torch.randint(64, (tokens, 6), generator=torch.Generator().manual_seed(0))
    return model.to(device), adapter, inputs.to(device)


def quiet_fold(model: nn.Module, adapter: Any, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oftsurgery.fold(model, adapter, **how)


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).logits.double().cpu()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
