"""`export_safetensors`: live models saved so that the real transformers loads them, which transformers 5 cannot do by
itself.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import disk_offload
from models import bert, gpt2, live, llama, logits, quantise, state_bytes
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import oftsurgery
from oftsurgery import RoundingWarning, StateError

MODELS: dict[str, Any] = {
    "llama": (llama, AutoModelForCausalLM, ["q_proj", "down_proj"]),
    "bert": (bert, AutoModelForSequenceClassification, ["query", "dense"]),
    "gpt2": (gpt2, AutoModelForCausalLM, ["c_attn", "c_proj"]),
}
CONFIGS: dict[str, Any] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


def straight(model: nn.Module) -> nn.Module:
    """Without the CPU forward's repacking, so that outputs can be compared."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def folded_model(name: str, config: str, tmp_path: Path) -> tuple[nn.Module, Any]:
    make, auto, targets = MODELS[name]
    make().save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base", quantization_config=BitsAndBytesConfig(**CONFIGS[config]))
    peft_model = live(straight(model), target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        return oftsurgery.fold(peft_model), auto


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_folded_quantised_models_reload_to_the_same_bytes(name: str, config: str, tmp_path: Path) -> None:
    folded, auto = folded_model(name, config, tmp_path)
    record = oftsurgery.export_safetensors(folded, tmp_path / "out", max_shard_size="30KB")
    assert record is not None
    assert record.modules.keys() == folded.oftsurgery.modules.keys()
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = straight(auto.from_pretrained(tmp_path / "out"))
    assert state_bytes(again) == state_bytes(folded)
    assert torch.equal(logits(again), logits(folded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", ["nf4 double", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_dequantised_models_reload_as_plain_ones(name: str, config: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folded, auto = folded_model(name, config, tmp_path)
    oftsurgery.export_safetensors(folded, tmp_path / "out", dtype)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in saved
    assert saved["dtype"] == saved["torch_dtype"] == str(dtype).removeprefix("torch.")
    plain = auto.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert not [m for m in plain.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    # int8 layers compute in fp16 and quantise their activations as well: only 4-bit ones give the same outputs
    limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] + (0.05 if config == "int8" else 0)
    assert float((logits(plain) - logits(folded)).norm() / logits(folded).norm()) < limit


def test_a_cpu_forward_before_saving_changes_no_code(tmp_path: Path) -> None:
    """bitsandbytes' own state_dict unpacks in place; ours does not touch the model. What the forward did to absmax
    (bfloat16) stays done.
    """
    folded, auto = folded_model("llama", "nf4 double", tmp_path)
    oftsurgery.export_safetensors(folded, tmp_path / "before")
    for module in folded.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    expected = logits(folded)
    packed = {n: p.detach().clone() for n, p in folded.named_parameters()}
    oftsurgery.export_safetensors(folded, tmp_path / "after")
    assert all(torch.equal(p, packed[n]) for n, p in folded.named_parameters())
    assert torch.equal(logits(folded), expected)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("before", "after"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith(".weight"):
            assert torch.equal(tensor, after[name]), name
    again = auto.from_pretrained(tmp_path / "after").eval()
    assert float((logits(again) - expected).norm() / expected.norm()) < 0.02


def test_tied_offloaded_compiled_and_hand_made_models(tmp_path: Path) -> None:
    tied = llama(tie_word_embeddings=True)
    oftsurgery.export_safetensors(tied, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tied").eval()), logits(tied))

    offloaded = llama()
    expected = logits(offloaded)
    disk_offload(offloaded, str(tmp_path / "offload"), torch.device("cpu"))
    oftsurgery.export_safetensors(torch.compile(offloaded, backend="eager"), tmp_path / "offloaded")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "offloaded").eval()), expected)

    # layers replaced by hand: no quantization_config in the model, so one is written that fits
    by_hand = quantise(llama(), "nf4")
    oftsurgery.export_safetensors(by_hand, tmp_path / "hand")
    assert json.loads((tmp_path / "hand" / "config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ] == ["lm_head"]
    assert torch.equal(logits(straight(AutoModelForCausalLM.from_pretrained(tmp_path / "hand"))), logits(by_hand))

    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert oftsurgery.export_safetensors(net, tmp_path / "plain") is None
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == net.state_dict().keys()
    assert not (tmp_path / "plain" / "config.json").exists()


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"the dtype torch.int8 is not one of torch.float32, .* Remedy: choose one"):
        oftsurgery.export_safetensors(llama(), tmp_path / "out", torch.int8)
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    with pytest.raises(StateError, match=r"meta device.*tensor 'weight'"):
        oftsurgery.export_safetensors(empty, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(StateError, match="the destination exists"):
        oftsurgery.export_safetensors(llama(), tmp_path / "out")
    oftsurgery.export_safetensors(llama(), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_no_file_of_an_export_names_a_folder_of_this_machine(tmp_path: Path) -> None:
    model, _ = folded_model("llama", "nf4", tmp_path)
    oftsurgery.export_safetensors(model, tmp_path / "out")
    oftsurgery.export_onnx(model, tmp_path / "graph")
    for path in [*(tmp_path / "out").iterdir(), *(tmp_path / "graph").iterdir()]:
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_a_model_whose_name_is_no_name_of_a_folder_is_exported(tmp_path: Path) -> None:
    model = llama()
    model.config._name_or_path = "x" * 5000
    oftsurgery.export_safetensors(model, tmp_path / "out")
    oftsurgery.export_onnx(model, tmp_path / "graph")
