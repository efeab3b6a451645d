"""peft's own live BOFT, HRA and RoAd, with two adapters at once, against folds of their files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, HRAConfig, PeftModel, RoadConfig, get_peft_model
from torch import nn

import oftsurgery
from oftsurgery import MatchError
from oftsurgery.checks import measures


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 24)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        return y


def trained(config: Callable[[], Any], folder: Path) -> tuple[PeftModel, list[Path]]:
    """A model with two live adapters, and their folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BOFT tells that it has no CUDA kernel
        model = get_peft_model(Small().eval(), config())
        model.add_adapter("other", config())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("boft_", "hra_", "road_")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, selected_adapters=["default", "other"])
    model.base_model.set_adapter(["default", "other"])
    return model, [folder, folder / "other"]


CONFIGS = {
    "BOFT": lambda: BOFTConfig(boft_block_size=4, target_modules=["fc"], init_weights=False),
    "HRA": lambda: HRAConfig(r=4, target_modules=["fc"], init_weights=False),
    "HRA with Gram-Schmidt": lambda: HRAConfig(r=4, apply_GS=True, target_modules=["fc"], init_weights=False),
    "RoAd": lambda: RoadConfig(variant="road_2", group_size=8, target_modules=["fc"], init_weights=False),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_live_adapters(kind: str, tmp_path: Path) -> None:
    model, folders = trained(CONFIGS[kind], tmp_path)
    adapters = [oftsurgery.load_adapter(folder) for folder in folders]
    folded = oftsurgery.fold(Small().eval(), adapters)
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(folded(x), expected, atol=1e-5)
        swapped = oftsurgery.fold(Small().eval(), adapters[::-1])
        assert not torch.allclose(swapped(x), expected, atol=1e-3)
    chain = [adapter.modules["fc"] for adapter in adapters]
    assert torch.allclose(measures.rotated(Small().fc.weight, chain).float(), folded.fc.weight, atol=1e-5)
    back = oftsurgery.unfold(folded, base=Small())
    assert torch.equal(back.fc.weight, Small().fc.weight)


def test_boft_beside_oft_has_no_order(tmp_path: Path) -> None:
    _, folders = trained(CONFIGS["HRA"], tmp_path)
    oft = oftsurgery.OFTAdapter({"fc": oftsurgery.Rotation(torch.randn(4, 6))})
    with pytest.raises(MatchError, match="an order for each kind alone"):
        oftsurgery.fold(Small(), [oftsurgery.load_adapter(folders[0]), oft])
