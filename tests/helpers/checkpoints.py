"""Shared by the tests of folds on disk: tiny models saved by transformers, and what a folder holds, read without
oftsurgery.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
import transformers
from independent import decode_4bit, skew
from peft import OFTConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import oftsurgery

TOKENS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 1, 6, 6]])
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 16}

#: name → (class, config, modules that the tests' adapter targets)
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaForCausalLM", SIZES | GROUPED, ["q_proj", "down_proj"]),
    "qwen3": ("Qwen3ForCausalLM", SIZES | GROUPED | {"head_dim": 16}, ["k_proj", "o_proj", "up_proj"]),
    "mistral": ("MistralForCausalLM", SIZES | GROUPED, ["v_proj", "gate_proj"]),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
        ["c_attn", "c_proj"],
    ),
    "bert": ("BertForSequenceClassification", SIZES | {"num_labels": 3}, ["query", "dense"]),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        ["q", "o", "wi"],
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, *, cls: str | None = None, **changes: Any) -> Any:
    """A tiny model whose outputs are not near zero."""
    torch.manual_seed(0)
    cls_name, config, _ = MODELS[name]
    model_class: Any = getattr(transformers, cls or cls_name)
    model = model_class(model_class.config_class(**config | changes))
    return scaled_up(model).to(dtype).eval()


def scaled_up(model: Any) -> Any:
    """Weights of variance 1/in instead of transformers' 0.02², biases that are not zero.

    T5 does not divide its attention scores by √d: its queries' weights hold that factor, from the start of training on.
    Without it the scores' deviation would be √d, no such model is trained, and rounding of its weights alone to float16
    would move the outputs five times as far.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = (
                    parameter.shape[0] if any(n in path for n in ("c_attn", "c_proj", "c_fc")) else parameter.shape[-1]
                )
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
                if model.config.model_type == "t5" and path.endswith(".q.weight"):
                    parameter.mul_(model.config.d_kv**-0.5)
            elif path.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def adapted(model: Any, targets: Any, *, seed: int = 0, **config: Any) -> Any:
    """A peft model whose rotations do something."""
    wrapped = get_peft_model(
        model, OFTConfig(**{"oft_block_size": 16, "target_modules": targets, "use_cayley_neumann": True} | config)
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "oft_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return wrapped


def linearised(model: Any) -> Any:
    """``model`` with its Conv1D layers as linears: peft 0.21 wraps no Conv1D."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            linear.weight = nn.Parameter(module.weight.detach().t().contiguous())
            linear.bias = module.bias
            model.set_submodule(path, linear)
    return model


def bnb_config(codec: str, *, double: bool = False, **more: Any) -> BitsAndBytesConfig:
    if codec == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=codec,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        **more,
    )


def load(folder: Path, cls: str, **options: Any) -> Any:
    """transformers' own ``from_pretrained``; unexpected, missing or mismatched keys fail."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return unpacked(model)


def unpacked(model: Any) -> Any:
    """CPU forwards of 4-bit layers must leave their weights as they are."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def outputs(model: Any) -> Tensor:
    """float64 logits (or hidden states)."""
    with torch.no_grad():
        more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
        out = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **more)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).double()


def said(source: object, **options: Any) -> dict[str, Any]:
    """The options of a fold, which say that the adapter was trained on the plain weights where nothing else says how a plain
    source is used.
    """
    says = {"trained_on", "quantize"} & {name for name, value in options.items() if value is not None}
    quantised = options.get("format", "same") in ("nf4", "fp4", "int8", "bnb")
    if says or quantised or options.get("fold_into") == "original" or is_quantised(Path(str(source))):
        return options
    return options | {"trained_on": "plain"}


def is_quantised(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text())


def quiet_fold(source: Path, adapter: Any, destination: Path, **options: Any) -> oftsurgery.FoldRecord:
    """`fold_checkpoint` of an adapter that was trained on ``source`` as it is, rounding to nearest unless told otherwise,
    without its warnings, which tests of their own cover.
    """
    options = said(source, **options)
    if "calibration" not in options:
        options.setdefault("rounding", "nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        warnings.simplefilter("ignore", oftsurgery.UntieWarning)
        return oftsurgery.fold_checkpoint(source, adapter, destination, **options)


# --- what a folder holds, without oftsurgery --------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder as safetensors itself reads it."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found
            found[name] = tensor
    return found


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in name, dtype, shape and bytes."""
    names = a.keys() ^ b.keys()
    return sorted(
        names
        | {
            n
            for n in a.keys() & b.keys()
            if a[n].dtype != b[n].dtype or a[n].shape != b[n].shape or _raw(a[n]) != _raw(b[n])
        }
    )


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def quant_state(found: Mapping[str, Tensor], name: str) -> Any:
    """bitsandbytes' state of a 4-bit weight, None for another."""
    stats = {n: t for n, t in found.items() if n.startswith(f"{name}.")}
    return (
        bnbf.QuantState.from_dict(stats, device=torch.device("cpu")) if any("quant_state" in n for n in stats) else None
    )


def decoded(found: Mapping[str, Tensor], name: str) -> Tensor:
    """float64: what the weight ``name`` stands for."""
    state = quant_state(found, name)
    if state is not None:
        return decode_4bit(found[name], state)
    if found[name].dtype == torch.int8:
        return found[name].double() * found[name.removesuffix("weight") + "SCB"].double().unsqueeze(1) / 127
    return found[name].double()


def stored_as(exact: Tensor, found: Mapping[str, Tensor], name: str) -> Tensor:
    """float64: ``exact`` as bitsandbytes or torch itself stores it in the format that the weight ``name`` has."""
    state = quant_state(found, name)
    if state is not None:
        packed, new = bnbf.quantize_4bit(
            exact.float(), blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type
        )
        return decode_4bit(packed, new)
    if found[name].dtype == torch.int8:
        codes, scb, _ = bnbf.int8_vectorwise_quant(exact.float())
        return codes.double() * scb.double().unsqueeze(1) / 127
    return exact.to(found[name].dtype).double()


def rotations_in(adapter: Path) -> dict[str, Tensor]:
    """``{module path: float64 R (in, in)}`` of an adapter that peft 0.21 wrote: exact Cayley, or the Neumann series of
    5 terms.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for key, rows in load_file(adapter / "adapter_model.safetensors").items():
        if ".oft_" not in key:
            continue
        b = round((1 + (1 + 8 * rows.shape[1]) ** 0.5) / 2)
        q = skew(rows, b)
        eye = torch.eye(b, dtype=torch.float64)
        if config["use_cayley_neumann"]:
            assert config["num_cayley_neumann_terms"] == 5
            blocks = list(eye + 2 * (q + q @ q + q @ q @ q) + q @ q @ q @ q)
        else:
            blocks = [(eye - m) @ torch.linalg.inv(eye + m) for m in q]
        found[key.removeprefix("base_model.model.").rpartition(".oft_")[0]] = torch.block_diag(*blocks)
    return found


class quiet_transformers:  # noqa: N801 - a context manager
    """transformers logs its loading reports at warning level."""

    def __enter__(self) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("transformers").setLevel(logging.WARNING)


def linears(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
