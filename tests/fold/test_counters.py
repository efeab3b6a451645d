"""A trained module's integers, which BatchNorm counts its batches in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import differing, quiet_fold, tensors
from peft import OFTConfig, get_peft_model
from transformers import ResNetConfig, ResNetForImageClassification

import oftsurgery

COUNTER = "resnet.embedder.embedder.normalization.num_batches_tracked"


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A base and an adapter, and the tensors of the live model's trained normalisation."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic", num_labels=3)
    )
    model.save_pretrained(tmp_path / "base")
    config = OFTConfig(
        oft_block_size=8,
        use_cayley_neumann=True,
        target_modules=["classifier.1"],
        modules_to_save=["embedder.embedder.normalization"],
        init_weights=False,
    )
    live = get_peft_model(model, config).train()
    for _ in range(3):
        live(torch.randn(2, 3, 32, 32))
    live.eval().save_pretrained(tmp_path / "adapter")
    own = live.base_model.model.resnet.embedder.embedder.normalization.modules_to_save["default"].state_dict()
    return {f"{COUNTER.rpartition('.')[0]}.{name}": tensor for name, tensor in own.items()}


@pytest.mark.parametrize("format_", ["same", "bf16"])
def test_a_counter_is_written_as_it_is(format_: str, trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert int(trained[COUNTER]) == 3
    undo: dict[str, Path] = {"undo": tmp_path / "undo"} if format_ == "same" else {}
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=format_, **undo)
    found = tensors(tmp_path / "out")
    assert found[COUNTER].dtype == torch.int64
    floats = {"same": torch.float32, "bf16": torch.bfloat16}[format_]
    wanted = {n: t.to(floats) if t.is_floating_point() else t for n, t in trained.items()}
    assert differing({n: found[n] for n in wanted}, wanted) == []
    memory = oftsurgery.fold(ResNetForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert int(memory.state_dict()[COUNTER]) == 3
    assert oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").ok
    if format_ == "same":
        for name, way in {"base": {"base": tmp_path / "base"}, "undo": undo}.items():
            oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / f"back by {name}", **way)
            assert differing(tensors(tmp_path / f"back by {name}"), tensors(tmp_path / "base")) == []
