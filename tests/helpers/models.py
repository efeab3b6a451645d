"""Tiny models, live adapters on them, and what they compute."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

TOKENS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 1, 0, 6]])


def llama(**kw: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **kw,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32)).eval()


def quantise(model: nn.Module, kind: str, device: str = "cpu") -> nn.Module:
    """Every linear but the head, by bitsandbytes' own layers and quantiser on a device."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name in ("lm_head", "classifier"):
                continue
            bias = child.bias is not None
            new: nn.Module
            if kind == "int8":
                new = bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias=bias, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(child.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=bias, quant_type=kind, compute_dtype=torch.float32
                )
                new.weight = bnb.nn.Params4bit(
                    child.weight.data.clone(), requires_grad=False, quant_type=kind, module=new
                )
                new.support_avx512bf16_for_cpu = False  # the repacking forward has tests of its own
            if bias:
                new.bias = nn.Parameter(child.bias.data.clone())
            setattr(parent, name, new.to(device))
    return model.eval().to(device)


def live(model: nn.Module, *, seed: int = 0, **config: Any) -> PeftModel:
    """A real peft model with rotations that do something."""
    settings = {"oft_block_size": 16, "target_modules": ["q_proj", "down_proj"], "use_cayley_neumann": True} | config
    wrapped = get_peft_model(model, OFTConfig(**settings)).eval()
    shake(wrapped, seed)
    return wrapped


def shake(model: nn.Module, seed: int, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_" in name and f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {
        k: v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for k, v in model.state_dict().items()
    }


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


BART = {
    "vocab_size": 64,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
}
