"""A record as a trained adapter leaves it."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import OFTConfig, get_peft_model


def trained(model: Any, targets: Any) -> Any:
    """A peft model whose rotations grow from layer to layer."""
    wrapped = get_peft_model(model, OFTConfig(r=0, oft_block_size=32, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(0)
    layers = [int(found[1]) for n, _ in wrapped.named_parameters() if (found := re.search(r"\.(\d+)\.", n))]
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "oft_" in name:
                layer = int(re.search(r"\.(\d+)\.", name)[1])  # type: ignore[index]
                strength = 0.02 * (layer + 0.2) / (max(layers) + 0.2)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
    return wrapped
