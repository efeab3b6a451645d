"""Adapters whose names reach one tensor twice, or a tensor that the model's class does not take; tensors that only look
quantised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import quiet_fold, quiet_transformers, tensors
from old_names import build, hand_made
from safetensors.torch import save_file

import oftsurgery

Q = "model.language_model.layers.0.self_attn.q_proj"
WQKV, NOMIC_Q = "encoder.layers.0.attn.Wqkv", "layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def nomic(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.NomicBertModel(config).save_pretrained(folder)
    return folder


def refused(base: Path, adapter: Path, match: str, **options: str) -> None:
    with pytest.raises((oftsurgery.MatchError, oftsurgery.FormatError), match=match):
        oftsurgery.fold_checkpoint(base, adapter, base.parent / "out", **options)  # type: ignore[arg-type]
    assert not (base.parent / "out").exists()


def test_two_names_of_one_module(tmp_path: Path) -> None:
    """An old and a new one: not two rotations of one weight."""
    model = build("llava")
    model.save_pretrained(tmp_path / "base")
    adapter = hand_made(tmp_path / "adapter", {Q: 64, "language_model.model.layers.0.self_attn.q_proj": 64})
    refused(tmp_path / "base", adapter, "two of the adapter's modules.*are one module")
    with pytest.raises(oftsurgery.MatchError, match=r"two of the adapter's modules.*are one module"):
        oftsurgery.fold(model, adapter)


def test_a_tensor_of_the_file_and_a_part_of_it(tmp_path: Path) -> None:
    adapter = hand_made(tmp_path / "adapter", {WQKV: 64, NOMIC_Q: 64})
    refused(nomic(tmp_path / "base"), adapter, "both a stored tensor and the tensors that transformers makes")


def test_a_tensor_of_the_file_whose_parts_are_to_be_quantised(tmp_path: Path) -> None:
    """Under its own name it would be written plain, and transformers would not load it."""
    adapter = hand_made(tmp_path / "adapter", {WQKV: 64})
    refused(
        nomic(tmp_path / "base"), adapter, "both a stored tensor and the tensors that transformers makes", format="nf4"
    )
    quiet_fold(tmp_path / "base", adapter, tmp_path / "whole")
    assert set(tensors(tmp_path / "whole")) == set(tensors(tmp_path / "base"))


def test_a_module_that_the_class_does_not_take(tmp_path: Path) -> None:
    """Such as layers for the prediction of further tokens, which transformers leaves out as it loads."""
    build("llama").save_pretrained(tmp_path / "base")
    found = tensors(tmp_path / "base") | {"mtp.proj.weight": torch.randn(64, 64)}
    save_file(found, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    hand_made(tmp_path / "adapter", {"mtp.proj": 64, "model.layers.0.self_attn.q_proj": 64})
    record = quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert set(record.modules) == {"mtp.proj", "model.layers.0.self_attn.q_proj"}
    assert not torch.equal(tensors(tmp_path / "out")["mtp.proj.weight"], found["mtp.proj.weight"])


@pytest.mark.parametrize("name", ["index", "table.weight"])
@pytest.mark.parametrize("format_", ["same", "bf16"])
def test_integers_are_no_int8_weight(tmp_path: Path, name: str, format_: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    integers = torch.arange(6, dtype=torch.int8).reshape(2, 3)
    save_file({"q.weight": torch.randn(64, 64), name: integers}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({}))
    hand_made(tmp_path / "adapter", {"q": 64})
    quiet_fold(base, tmp_path / "adapter", tmp_path / "out", format=format_)
    assert torch.equal(tensors(tmp_path / "out")[name], integers)
