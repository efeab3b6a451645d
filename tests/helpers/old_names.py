"""Checkpoints whose names transformers changes as it loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import (
    GROUPED,
    SIZES,
    scaled_up,
)
from rotated import CONFIG
from safetensors.torch import save_file

TEXT = SIZES | GROUPED


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


#: name → (class, config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM",
        TEXT
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 16,
            "decoder_sparse_step": 1,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            "text_config": {"model_type": "llama", **TEXT},
            "image_token_index": 63,
        },
    ),
    "qwen2 vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
            "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            "image_token_id": 60,
            "video_token_id": 61,
            "vision_start_token_id": 62,
            "vision_end_token_id": 63,
        },
    ),
    "llama": ("LlamaForCausalLM", TEXT),
    "bert": ("BertForSequenceClassification", SIZES),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    cls, config = MODELS[name]
    model_class: Any = getattr(transformers, cls)
    # a copy of the config: transformers changes nested ones in place
    return scaled_up(model_class(model_class.config_class(**json.loads(json.dumps(config))))).eval()


def hand_made(folder: Path, paths: dict[str, int]) -> Path:
    """An adapter on modules of these paths and input sizes, which no peft of today would train."""
    folder.mkdir()
    rows = {f"base_model.model.{p}.oft_R.weight": 0.03 * torch.randn(n // 16, 120) for p, n in paths.items()}
    save_file(rows, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder
