"""Tensors without elements: what one process saves, or holds, of a model that ZeRO-3 or FSDP has spread over several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import live, llama
from safetensors.torch import load_file, save_file
from torch import nn

import oftsurgery
from oftsurgery import AdapterError, CheckpointError, StateError

EMPTY = (
    r"has no elements: training has spread the tensor over processes \(ZeRO-3, FSDP\), and nobody gathered the parts"
)
ON_DISK = r".*zero_to_fp32.py \. OUTPUT --safe_serialization.*FULL_STATE_DICT"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    live(llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path


def empty(path: Path, *names: str) -> None:
    """Leave tensors of no elements in the place of those that end so."""
    found = load_file(path)
    changed = {n: torch.empty(0, dtype=t.dtype) if n.endswith(names) else t for n, t in found.items()}
    assert any(t.numel() == 0 for t in changed.values())
    save_file(changed, path, {"format": "pt"})


@pytest.mark.parametrize("names", [("",), ("layers.1.mlp.up_proj.weight",), ("norm.weight",)])
def test_a_base_on_disk(names: tuple[str, ...], place: Path) -> None:
    empty(place / "base" / "model.safetensors", *names)
    with pytest.raises(
        CheckpointError,
        match=rf"the checkpoint's tensor {EMPTY} .*model.safetensors\] Remedy: gather the checkpoint{ON_DISK}",
    ):
        oftsurgery.fold_checkpoint(place / "base", place / "adapter", place / "out", trained_on="plain")
    (finding,) = oftsurgery.doctor(place / "base")
    assert (finding.code, finding.severity) == ("checkpoint-files", "error")
    assert "zero_to_fp32.py" in finding.remedy
    assert not (place / "out").exists()


@pytest.mark.parametrize("names", [("",), ("layers.1.mlp.down_proj.oft_R.weight",)])
def test_an_adapter(names: tuple[str, ...], place: Path) -> None:
    empty(place / "adapter" / "adapter_model.safetensors", *names)
    text = rf"the adapter's tensor {EMPTY} .*Remedy: save the adapter with whole tensors: stage3_gather_16bit_weights_on_model_save{ON_DISK[:2]}"
    with pytest.raises(AdapterError, match=text):
        oftsurgery.fold(llama(), place / "adapter")
    with pytest.raises(AdapterError, match=text):
        oftsurgery.fold_checkpoint(place / "base", place / "adapter", place / "out", trained_on="plain")
    assert [f.code for f in oftsurgery.doctor(place / "adapter")] == ["adapter-files"]


def test_a_model_in_memory(place: Path) -> None:
    model = llama()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    text = rf"{EMPTY} .*Remedy: gather the model within `deepspeed.zero.GatheredParameters"
    with pytest.raises(StateError, match=rf"the model's weight {text}"):
        oftsurgery.fold(model, place / "adapter")
    with pytest.raises(StateError, match=rf"the model's tensor {text}"):
        oftsurgery.export_safetensors(model, place / "out")


def test_what_a_class_has_empty_by_itself_stays_so(place: Path) -> None:
    """A parameter that is neither weight nor bias may have no elements, and mean it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.prompt = nn.Linear(4, 4), nn.Parameter(torch.empty(0, 4))

    oftsurgery.export_safetensors(Own(), place / "out")
    assert load_file(place / "out" / "model.safetensors")["prompt"].shape == (0, 4)
