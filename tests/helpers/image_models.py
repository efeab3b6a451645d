"""Tiny models of diffusers' own classes, with inputs, adapters and diffusers' own quantised loading on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from peft import OFTConfig, get_peft_model
from torch import Tensor
from warned import quietly

#: class → its config; every linear that the tests run in 4 bits on the CPU has a multiple of 64 inputs
CONFIGS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
    },
    "UNet2DConditionModel": {
        "sample_size": 8,
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 32,
    },
    "QwenImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
}
#: modules of attention, MLPs, norms and 1×1 convolutions
TARGETS = r".*(to_q|to_k|to_v|to_out\.0|net\.2|add_q_proj|to_add_out|proj_in|linear|proj_mlp)"


def build(name: str, seed: int = 1) -> Any:
    """A model whose outputs are not near zero."""
    model = getattr(diffusers, name)(**CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            elif path.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def outputs(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    name = type(model).__name__
    text = {"encoder_hidden_states": noise(1, 6, 64)}
    if name.startswith("Flux"):
        image = {"hidden_states": noise(1, 16, 64), "pooled_projections": noise(1, 64), "timestep": torch.tensor([0.5])}
        image |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    elif name.startswith("SD3"):
        image = {"hidden_states": noise(1, 16, 8, 8), "pooled_projections": noise(1, 64), "timestep": torch.tensor([5])}
    elif name.startswith("UNet"):
        image = {"sample": noise(1, 4, 8, 8), "timestep": torch.tensor([5])}
    else:
        image = {"hidden_states": noise(1, 16, 64), "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 4)]]}
        image |= {"encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.bool)}
    with torch.no_grad():
        found: Tensor = model(**image, **text).sample
    return found


def adapted(model: Any, targets: str | list[str] = TARGETS, seed: int = 3) -> Any:
    """A peft model whose rotations do something."""
    wrapped = get_peft_model(
        model, OFTConfig(oft_block_size=16, target_modules=targets, use_cayley_neumann=True)
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "oft_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return wrapped


@contextmanager
def without_gpu() -> Iterator[None]:
    """diffusers refuses to quantise without a GPU; everything that it does besides runs on the CPU."""
    kinds = (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patches = [mock.patch.object(kind, "validate_environment") for kind in kinds]
        patches += [mock.patch.object(kind, "update_device_map", lambda _, given: given) for kind in kinds]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def settings(storage: str, skip: list[str] | None = None) -> diffusers.BitsAndBytesConfig:
    """diffusers' config for ``"nf4"``, ``"nf4-double"``, ``"fp4"`` or ``"int8"``."""
    if storage == "int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage.partition("-")[0],
        bnb_4bit_use_double_quant=storage.endswith("double"),
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )


def load(folder: Path, name: str, storage: str | None = None, **more: Any) -> Any:
    """``from_pretrained``, quantised to ``storage`` where it is given."""
    quantised = {} if storage in (None, "fp32") else {"quantization_config": settings(str(storage))}
    with without_gpu():
        return quietly(
            getattr(diffusers, name).from_pretrained, folder, **{"torch_dtype": torch.float32} | quantised | more
        ).eval()
