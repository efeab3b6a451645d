"""A plain checkpoint of equal layers without a class, and its adapter, for runs that are killed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rotated import CONFIG
from safetensors.torch import save_file

LAYERS = 12
SIDE = 192


def write_inputs(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    weights = {f"layers.{i}.q_proj.weight": torch.randn(SIDE, SIDE, generator=generator) for i in range(LAYERS)}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "tokenizer.json").write_text("{}")
    rows = {
        f"base_model.model.layers.{i}.q_proj.oft_R.weight": 0.03 * torch.randn(SIDE // 16, 120, generator=generator)
        for i in range(LAYERS)
    }
    save_file(rows, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder
