"""The adapters that peft's releases wrote, and layers for them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"


VARIANTS = sorted(p.parent.relative_to(GOLDEN).as_posix() for p in GOLDEN.glob("peft-*/*/adapter_config.json"))


class Layer(nn.Module):
    def __init__(self, base: dict[str, Tensor], index: int) -> None:
        super().__init__()
        for name in ("q_proj", "up_proj", "down_proj"):
            weight, bias = base[f"layers.{index}.{name}.weight"], base.get(f"layers.{index}.{name}.bias")
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            self.add_module(name, linear)
            linear.weight.data.copy_(weight)
            if bias is not None:
                linear.bias.data.copy_(bias)


class Tiny(nn.Module):
    """The goldens' base model: ``layers.0.{q,up,down}_proj``."""

    def __init__(self, base: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(base, 0)])


def base_of(variant: str) -> dict[str, Tensor]:
    return load_file((GOLDEN / variant).parent / "base.safetensors")


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.detach().double() - b.double()) / torch.linalg.vector_norm(b.double()))
