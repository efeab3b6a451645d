""":class:`Family` is a row of the table of families; the names below it are sizes and inputs that rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]

TOKENS = torch.tensor([[3, 5, 9, 2, 7, 11], [4, 4, 8, 13, 6, 6]])
TEXTS: Mapping[str, Tensor] = {"input_ids": TOKENS}


@dataclass(frozen=True)
class Family:
    """One class of transformers in a tiny size.

    Attributes:
        cls: name of the class.
        config: the arguments of the class's config class.
        inputs: the inputs of the class's forward, by name.
        linears: the targets of the first adapter; ``"all-linear"`` unless peft refuses this value for the family.
        head: path of the module that the second adapter trains whole; ``""`` finds the output embeddings.
        embedding: path of the module that the third adapter trains whole; ``""`` finds the input embeddings.
    """

    cls: str
    config: Config = field(hash=False)
    inputs: Mapping[str, Tensor] = field(hash=False, default_factory=lambda: TEXTS)
    linears: str | tuple[str, ...] = "all-linear"
    head: str = ""
    embedding: str = ""


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


#: fields that most configs know; a config keeps an unknown field unread
TEXT: Config = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: Config = TEXT | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
}
#: attention over compressed keys and values
LATENT: Config = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
STATE_SPACE: Config = TEXT | {
    "state_size": 8,
    "time_step_rank": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "num_heads": 8,
    "n_groups": 1,
    "chunk_size": 8,
}
ENCODER_DECODER: Config = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
#: targets for a class whose router peft must not rotate, since the router's output is a pair
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION: Config = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
}

IMAGE: Mapping[str, Tensor] = {"pixel_values": floats(2, 3, 32, 32)}
BOTH: Mapping[str, Tensor] = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
IMAGE_AND_TEXT: Mapping[str, Tensor] = {"input_ids": TOKENS, **IMAGE}
#: the token that stands for a piece of an image or of a sound
PIECE = 90


def with_pieces(count: int, **more: Tensor) -> dict[str, Tensor]:
    """Texts that hold an image or a sound of ``count`` pieces each."""
    rows = [[first, *[PIECE] * count, *last] for first, last in ((3, (5, 9)), (4, (8, 13)))]
    return {"input_ids": torch.tensor(rows), **more}
