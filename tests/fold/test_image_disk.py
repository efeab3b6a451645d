"""Adapters of image tools on disk: the same tensors as in memory, and the same ways back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import state_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from warned import quietly

import oftsurgery
from oftsurgery.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose projections have biases, and a file of diag-oft and BOFT on it."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config)
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            rows = module.weight.shape[0]
            module.bias is None or torch.nn.init.normal_(module.bias)  # type: ignore[arg-type]
            key = f"lora_te_{name.replace('.', '_')}"
            shape = (2, 8, 8, 8) if name.endswith("q_proj") else (rows // 8, 8, 8)
            tensors |= {f"{key}.oft_blocks": torch.randn(shape) * 0.1, f"{key}.alpha": torch.tensor(0.01)}
            tensors |= {f"{key}.rescale": torch.rand(rows, 1) + 0.5}
    folder = tmp_path_factory.mktemp("image")
    model.save_pretrained(folder / "base")
    save_file(tensors, folder / "style.safetensors")
    return folder / "base"


def test_disk_is_memory(base: Path, tmp_path: Path) -> None:
    adapter = oftsurgery.load_adapter(base.parent / "style.safetensors", bias="rotated")
    undo, out = tmp_path / "fold.undo", tmp_path / "out"
    record = oftsurgery.fold_checkpoint(
        base, adapter, out, trained_on="plain", strength=0.7, strength_mode="lycoris", undo=undo
    )
    model = Qwen2ForCausalLM.from_pretrained(base)
    memory = oftsurgery.fold(model, adapter, strength=0.7, strength_mode="lycoris")
    on_disk = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, memory.state_dict()[name]) for name, tensor in on_disk.items())
    assert (record.adapters[0].strength, record.adapters[0].strength_mode, record.adapters[0].bias) == (
        0.7,
        "lycoris",
        "rotated",
    )
    assert set(record.saved) == {f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)}
    before = load_file(base / "model.safetensors")
    for i, way in enumerate(({"undo": undo}, {"base": base})):
        oftsurgery.unfold_checkpoint(out, tmp_path / f"back{i}", **way)
        back = load_file(tmp_path / f"back{i}" / "model.safetensors")
        assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "turned", adapter=adapter)
    turned = load_file(tmp_path / "turned" / "model.safetensors")
    assert all(torch.allclose(turned[name], tensor, atol=1e-6) for name, tensor in before.items())
    # the undo record of the disk also restores the model in memory
    assert state_bytes(oftsurgery.unfold(memory, undo=undo)) == state_bytes(model)


def test_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    style, out = str(base.parent / "style.safetensors"), tmp_path / "out"
    flags = ["--trained-on", "plain", "--strength", "0.5", "--strength-mode", "linear", "--bias", "kept"]
    assert main(["fold", str(base), style, str(out), *flags]) == 0
    model = Qwen2ForCausalLM.from_pretrained(base)
    memory = oftsurgery.fold(model, style, strength=0.5, strength_mode="linear").state_dict()
    assert all(torch.equal(t, memory[name]) for name, t in load_file(out / "model.safetensors").items())
    assert main(["adapter", "show", style]) == 0
    assert "BOFT" in capsys.readouterr().out
    assert main(["adapter", "convert", style, str(tmp_path / "new.safetensors"), "--to", "comfyui"]) == 0
    assert len(oftsurgery.load_adapter(tmp_path / "new.safetensors").modules) == 4
    assert main(["fold", str(base), style, str(out), "--trained-on", "plain", "--strength", "0.5", "0.2"]) == 2
    assert "2 strengths were given for 1 adapters" in capsys.readouterr().err


def test_the_precision_of_products_does_not_decide_a_bias(base: Path) -> None:
    model = Qwen2ForCausalLM.from_pretrained(base)
    adapter = oftsurgery.load_adapter(base.parent / "style.safetensors", bias="rotated")
    expected = oftsurgery.fold(model, adapter).state_dict()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            got = oftsurgery.fold(model, adapter).state_dict()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
