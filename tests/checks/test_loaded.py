"""What checks take a folder to hold is what transformers' own ``from_pretrained`` loads from it: names, ties, values, and
what is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import GROUPED, SIZES, bnb_config, differing, load, quiet_transformers, tensors
from models import BART
from safetensors.torch import save_file

from oftsurgery import CheckpointError
from oftsurgery.checks.loaded import LoadedCheckpoint
from oftsurgery.files.checkpoint import open_checkpoint

T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: case → (class, config, names that are tied, groups of which transformers makes others)
CLASSES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "plain": ("LlamaForCausalLM", SIZES | GROUPED, 0, 0),
    "tied": ("LlamaForCausalLM", SIZES | GROUPED | {"tie_word_embeddings": True}, 1, 0),
    "Conv1D": ("GPT2LMHeadModel", GPT2, 1, 0),
    "a tied bias": ("BertForMaskedLM", SIZES, 2, 0),
    "three tied": ("BartForConditionalGeneration", BART, 3, 0),
    "three tied, T5": ("T5ForConditionalGeneration", T5, 3, 0),
    "experts are merged": ("MixtralForCausalLM", SIZES | GROUPED | EXPERTS, 0, 4),
    "q, k and v are split": ("NomicBertModel", SIZES | {"num_hidden_layers": 1}, 0, 1),
    "made up, and meant to be": ("MarianMTModel", BART | {"pad_token_id": 0}, 3, 0),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def saved(folder: Path, cls: str, config: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    model_class: Any = getattr(transformers, cls)
    model = model_class(model_class.config_class(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def real(folder: Path, cls: str) -> tuple[dict[str, torch.Tensor], set[str]]:
    """(state dict, names that transformers made up)."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    return model.state_dict(), set(info["missing_keys"])


def values(loaded: LoadedCheckpoint) -> dict[str, torch.Tensor]:
    return {n: loaded.read(n).weight.tensors["weight"] for n, source in loaded.sources.items() if source is not None}


@pytest.mark.parametrize("case", CLASSES)
def test_every_tensor_is_the_clients(tmp_path: Path, case: str) -> None:
    cls, config, tied, groups = CLASSES[case]
    saved(tmp_path, cls, config)
    state, _ = real(tmp_path, cls)
    loaded = LoadedCheckpoint(open_checkpoint(tmp_path))
    assert list(loaded.sources) == list(state)
    missing = {name for name, source in loaded.sources.items() if source is None}
    assert all("embed_positions" in name for name in missing)
    assert bool(missing) == (case == "made up, and meant to be")
    assert differing(values(loaded), {n: t for n, t in state.items() if n not in missing}) == []
    assert sum(source not in (None, name) for name, source in loaded.sources.items()) == tied
    assert len({id(source) for source in loaded._from.values() if not isinstance(source, str)}) == groups


@pytest.mark.parametrize("kept", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("flag", [True, False], ids=["flag", "no flag"])
def test_ties_are_the_clients_whatever_is_there(tmp_path: Path, kept: tuple[bool, ...], flag: bool) -> None:
    """Of four names that a class ties, each may be stored or not, with values of its own."""
    saved(tmp_path, "BartForConditionalGeneration", BART)
    names = [
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ]
    found = {n: t for n, t in tensors(tmp_path).items() if n not in names}
    found |= {n: torch.randn(64, 64) for n, here in zip(names, kept, strict=True) if here}
    save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": flag}))
    state, missing = real(tmp_path, "BartForConditionalGeneration")
    loaded = LoadedCheckpoint(open_checkpoint(tmp_path))
    assert {name for name, source in loaded.sources.items() if source is None} == missing & set(names)
    assert differing(values(loaded), {n: t for n, t in state.items() if n not in missing}) == []


def test_names_of_old_releases(tmp_path: Path) -> None:
    """And a tensor that is there by both names: the client takes one, and the other is looked at as it is stored."""
    saved(tmp_path, "BertForMaskedLM", SIZES)
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors(tmp_path).items()}
    twice = "bert.embeddings.LayerNorm.weight"
    save_file(old | {twice: torch.zeros(64)}, tmp_path / "model.safetensors", {"format": "pt"})
    state, _ = real(tmp_path, "BertForMaskedLM")
    found = values(LoadedCheckpoint(open_checkpoint(tmp_path)))
    assert torch.equal(found.pop(f"{twice} (second)"), torch.zeros(64))
    assert differing(found, state) == []


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_quantised_weights_come_with_what_is_beside_them(tmp_path: Path, codec: str) -> None:
    saved(tmp_path / "plain", "LlamaForCausalLM", SIZES | GROUPED)
    load(tmp_path / "plain", "LlamaForCausalLM", quantization_config=bnb_config(codec)).save_pretrained(tmp_path / "q")
    loaded = LoadedCheckpoint(open_checkpoint(tmp_path / "q"))
    assert list(loaded.sources) == list(LoadedCheckpoint(open_checkpoint(tmp_path / "plain")).sources)
    stored = loaded.read("model.layers.0.mlp.up_proj.weight")
    assert stored.weight.format.codec == codec
    assert stored.parts is not None
    beside = ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"]
    expected = {f"weight.{n}" for n in beside} if codec == "nf4" else {"SCB", "weight_format"}
    assert stored.parts.keys() == {"weight"} | expected
    assert all(map(loaded.fits, loaded.sources))


@pytest.mark.parametrize("config", [{}, {"model_type": "no such"}, {"model_type": "gpt2 of mine", "n_layer": 10**9}])
def test_without_a_class_names_are_as_they_are(tmp_path: Path, config: dict[str, Any]) -> None:
    save_file({"h.0.attn.c_attn.weight": torch.ones(2, 6), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = LoadedCheckpoint(open_checkpoint(tmp_path))
    assert loaded.model is None
    assert set(loaded.sources) == {"h.0.attn.c_attn.weight", "b"}
    assert (loaded.place("b"), loaded.place("c"), loaded.together("b")) == ("b", None, {"b"})
    assert not loaded.transposed("h.0.attn.c_attn.weight")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": "llama", "num_attention_heads": 0},
        {"model_type": ["llama"]},
        {"model_type": "llama", "architectures": 7},
    ],
    ids=str,
)
def test_a_config_that_no_model_has_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cannot build it from this config|`model_type` must be a string"):
        LoadedCheckpoint(open_checkpoint(tmp_path))
