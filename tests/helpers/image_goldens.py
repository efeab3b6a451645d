"""The adapters that image tools wrote, and models with the names of their bases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import oftsurgery

IMAGE = Path(__file__).parents[1] / "data" / "image"


@dataclass(frozen=True)
class Golden:
    """An adapter, and how its live layers computed.

    Attributes:
        folder: the folder with the effective weights.
        base: the folder of the base.
        trainer: the folder of the adapter's file, where it is another one.
        how: arguments of :func:`oftsurgery.load_adapter`.
        mode: the mode of strength of ``effective_strength0.5.safetensors``.
        always: whether the mode also counts at strength 1.
    """

    folder: str
    base: str
    trainer: str = ""
    how: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "linear"
    always: bool = False

    def adapter(self) -> oftsurgery.OFTAdapter:
        folder = IMAGE / (self.trainer or self.folder)
        if (folder / "adapter_config.json").is_file():
            return oftsurgery.load_adapter(folder, **self.how)
        name = next(path for path in sorted(folder.iterdir()) if path.name in _NAMES)
        return oftsurgery.load_adapter(name, **self.how)

    def base_tensors(self) -> dict[str, Tensor]:
        return load_file(IMAGE / self.base / "base.safetensors")

    def effective(self, strength: float) -> dict[str, Tensor] | None:
        path = IMAGE / self.folder / ("effective.safetensors" if strength == 1 else "effective_strength0.5.safetensors")
        return load_file(path) if path.is_file() else None


_NAMES = ("adapter.safetensors", "pytorch_lora_weights.safetensors")


def _goldens() -> list[Golden]:
    found = []
    for path in sorted(IMAGE.glob("*/*/effective.safetensors")):
        folder = path.parent.relative_to(IMAGE).as_posix()
        release, variant = folder.split("/")
        trainer, mode, always = "", "linear", False
        if "__" in variant:
            trainer, always = variant.replace("__", "/"), True
            mode = next(m for t, m in _TOOLS.items() if release.startswith(t))
        made_by = trainer or folder
        if made_by.startswith("layouts") or "fused" in variant:
            continue
        found.append(
            Golden(folder, _base_of(made_by), trainer, _how(made_by), mode if always else _mode(made_by), always)
        )
    return found


_TOOLS = {"comfyui-oftv2": "oftv2-node", "comfyui": "comfyui", "webui": "webui"}


def _base_of(made_by: str) -> str:
    release = made_by.split("/")[0]
    if release.startswith("lycoris"):
        return "lycoris-bypass-base" if "bypass" in release else "lycoris-base"
    if release.startswith("kohya"):
        return "kohya-flux-base" if "flux" in release else "kohya-base"
    if release.startswith("peft"):
        return "peft-0.21.2-base"
    return "onetrainer-base" if release.startswith("onetrainer") else release


def _how(made_by: str) -> dict[str, Any]:
    if made_by.startswith("lycoris-2.1.0/"):
        return {"constraint": 0.01 if "constraint" in made_by else 0.0}
    if "bypass" in made_by or "0.8.8" in made_by:
        return {"bias": "rotated"}
    dialects = {"onetrainer-2025-11-14/": "onetrainer-2025-11-14", "peft-0.13.2": "peft-boft-0.13"}
    return next(({"dialect": d} for start, d in dialects.items() if made_by.startswith(start)), {})


def _mode(made_by: str) -> str:
    if made_by.startswith("lycoris-2.1") and "boft" in made_by:
        return "lycoris-2"
    return next((tool for tool in ("lycoris", "kohya") if made_by.startswith(tool)), "linear")


GOLDENS = _goldens()


def model_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model with linear layers and convolutions of these names."""
    root = nn.Module()
    for name, weight in tensors.items():
        if not name.endswith(".weight"):
            continue
        path, bias = name.removesuffix(".weight"), tensors.get(name.removesuffix("weight") + "bias")
        *parents, last = path.split(".")
        at = root
        for part in parents:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        out, features, *kernel = weight.shape
        layer: nn.Module = (
            nn.Conv2d(features, out, tuple(kernel), bias=bias is not None, padding=kernel[0] // 2)
            if kernel
            else nn.Linear(features, out, bias=bias is not None)
        )
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        at.add_module(last, layer.requires_grad_(False))
    return root


def relative(got: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - exact.double()) / torch.linalg.vector_norm(exact.double()))
