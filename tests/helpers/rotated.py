"""Rotations at random, and live peft layers with them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from oftsurgery import Rotation

F64 = torch.float64


def generator(n: int, b: int, norm: float, seed: int) -> Tensor:
    """``(n, b(b-1)/2)`` float64, each block of spectral norm ``norm``."""
    v = torch.randn(n, b * (b - 1) // 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
    q = torch.zeros(n, b, b, dtype=F64)
    rows, columns = torch.triu_indices(b, b, 1)
    q[:, rows, columns] = v
    return v * (norm / torch.linalg.matrix_norm(q - q.mT, ord=2)).unsqueeze(-1)


def rotation(features: int, b: int, norm: float, seed: int, *, shared: bool = False, **fields: object) -> Rotation:
    v = generator(1 if shared else features // b, b, norm, seed)
    return Rotation(v, shared=shared, **fields)  # type: ignore[arg-type]


def live_peft(model: nn.Module, folder: Path, name: str = "default") -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers' own, of peft's constructor, with any adapter
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval()


def layers_of(live: nn.Module) -> dict[str, nn.Module]:
    found = {n.removeprefix("base_model.model."): m for n, m in live.named_modules()}
    return {n: m for n, m in found.items() if n and hasattr(m, "base_layer")}


def live_weight(layer: nn.Module) -> Tensor:
    """The weight that a live layer computes with, by pushing the identity through it."""
    inside = layer.base_layer
    with torch.no_grad():
        out = layer(torch.eye(inside.in_features)) - (inside.bias if inside.bias is not None else 0)
    return out.t()


CONFIG: dict[str, Any] = {
    "peft_type": "OFT",
    "peft_version": "0.21.2",
    "r": 0,
    "oft_block_size": 16,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "block_share": False,
    "coft": False,
    "eps": 6e-5,
    "bias": "none",
    "modules_to_save": None,
}
