"""Blocks that a model shares between its layers, with an adapter in each place: each layer gets weights of its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import adapted, bnb_config, differing, load, outputs, quiet_fold, tensors
from independent import relative
from peft import PeftModel

import oftsurgery

CONFIG: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_d_state": 16, "mamba_ngroups": 1, "chunk_size": 8,
    "adapter_rank": 8, "use_mem_rope": False, "layers_block_type": ["mamba", "hybrid"] * 3, "hybrid_layer_ids": [1, 3, 5],
}  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("codec", [None, "nf4", "int8"])
def test_zamba2(tmp_path: Path, blocks: int, codec: Any) -> None:
    cls = "Zamba2ForCausalLM"
    torch.manual_seed(0)
    transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**CONFIG, num_mem_blocks=blocks)).save_pretrained(
        tmp_path / "base"
    )
    adapted(load(tmp_path / "base", cls), ["q_proj", "gate_up_proj"]).save_pretrained(tmp_path / "adapter")
    settings = {} if codec is None else {"quantization_config": bnb_config(codec)}
    base = load(tmp_path / "base", cls, **settings)
    want = outputs(PeftModel.from_pretrained(load(tmp_path / "base", cls, **settings), tmp_path / "adapter").eval())
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format=codec or "same")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.UntieWarning)
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        memory = oftsurgery.fold(base, tmp_path / "adapter", rounding="nearest")
    bound = {None: 1e-5, "int8": 0.05, "nf4": 0.5}[codec]
    for model in (memory, load(tmp_path / "out", cls)):
        assert relative(outputs(model), want) < bound
    report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert report.ok, report.wrong
    oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "restored", base=tmp_path / "base")
    if codec is None:
        assert differing(tensors(tmp_path / "restored"), tensors(tmp_path / "base")) == []
    else:
        restored = outputs(load(tmp_path / "restored", cls))
        assert torch.equal(restored, outputs(load(tmp_path / "base", cls, **settings)))
