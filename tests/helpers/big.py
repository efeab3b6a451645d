"""Big checkpoints of random bytes, written a tensor at a time; for what memory and time a fold takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bnbf
import torch
from rotated import CONFIG
from safetensors.torch import save_file
from torch import Tensor

from oftsurgery.files.shard_writer import ShardWriter
from oftsurgery.formats.checkpoint_tensors import checkpoint_shapes
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat


def linears(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    square = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
    return square | {
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def write_checkpoint(
    folder: Path, *, layers: int, shards: int, hidden: int = 4096, intermediate: int = 11008, vocab: int = 512
) -> int:
    """A llama in NF4 of that many layers, spread evenly over shards; returns its bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = range(shard * layers // shards, (shard + 1) * layers // shards)
        formats = {
            f"model.layers.{i}.{path}.weight": WeightFormat("nf4", shape, torch.bfloat16, 64)
            for i in mine
            for path, shape in linears(hidden, intermediate).items()
        }
        plain = {f"model.layers.{i}.{n}_layernorm.weight": (hidden,) for i in mine for n in ("input", "post_attention")}
        if shard == 0:
            plain |= {
                "model.embed_tokens.weight": (vocab, hidden),
                "lm_head.weight": (vocab, hidden),
                "model.norm.weight": (hidden,),
            }
        planned = {n: v for weight, f in formats.items() for n, v in checkpoint_shapes(weight, f).items()}
        writer = ShardWriter(
            folder / name, planned | {n: (torch.bfloat16, s) for n, s in plain.items()}, {"format": "pt"}
        )
        for tensor_name, tensor in (
            *_quantised(formats, generator),
            *((n, torch.ones(s, dtype=torch.bfloat16)) for n, s in plain.items()),
        ):
            writer.write(tensor_name, tensor)
            weight_map[tensor_name] = name
        writer.close()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    return sum(p.stat().st_size for p in folder.iterdir())


def _quantised(formats: dict[str, WeightFormat], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for weight, f in formats.items():
        n = f.shape[0] * f.shape[1]
        tensors = {
            "weight": torch.randint(256, (n // 2, 1), dtype=torch.uint8, generator=generator),
            "absmax": 0.05 + 0.05 * torch.rand(n // f.blocksize, generator=generator),
            "quant_map": bnbf.get_4bit_type("nf4", device="cpu"),
        }
        yield from f.kind.to_checkpoint(weight, EncodedWeight(f, tensors)).items()


def write_adapter(folder: Path, paths: dict[str, int], *, block: int = 32, turn: float = 0.01) -> None:
    """An adapter on ``{module path: in_features}``; ``turn`` is the standard deviation of the generators."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    rows = {
        f"base_model.model.{path}.oft_R.weight": turn
        * torch.randn(n // block, block * (block - 1) // 2, generator=generator)
        for path, n in paths.items()
    }
    save_file(rows, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(CONFIG | {"oft_block_size": block, "target_modules": sorted(paths)})
    )
