"""Quantised folds keep the rules of vLLM's loader of bitsandbytes checkpoints, read in vllm-bnb-plugin 0.0.3 (which vLLM 0.32 takes).

The rules stand here in our own words. `make test-vllm` loads the same kind of folders with vLLM itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from checkpoints import quiet_transformers
from models import llama
from safetensors.torch import load_file, save_file
from torch import Tensor

import oftsurgery

#: ends of names that the loader takes for parts of a 4-bit weight's state, wherever these words stand in the last part of a name
STATE_WORDS = ("absmax", "quant_map", "bitsandbytes")
#: linear layers that vLLM builds as one layer; a module to skip cannot be one part of these
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def broken_rules(folder: Path) -> list[str]:
    """What vLLM's loader would refuse or misread in a folder of a llama."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    settings = config.get("quantization_config", {})
    found = []
    if settings.get("quant_method") != "bitsandbytes":
        found.append("the method is not bitsandbytes")
    if (settings.get("bnb_4bit_quant_storage") or "uint8") != "uint8":
        found.append("the codes are not stored as uint8")
    skipped = settings.get("llm_int8_skip_modules") or []
    rules = eight_bit_rules if settings.get("load_in_8bit") else four_bit_rules
    found += rules(tensors, set(linears(tensors)) - {n for n in linears(tensors) if is_skipped(n, skipped)})
    for parts in FUSED:
        listed = {part for part in parts for name in skipped if name.split(".")[-1] == part}
        if listed and listed != set(parts):
            found.append(f"only {sorted(listed)} of a fused layer is to be skipped")
    return found


def linears(tensors: dict[str, Tensor]) -> list[str]:
    """The linear layers of a llama; the head and the embedding are layers of another kind in vLLM."""
    return [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]


def is_skipped(module: str, skipped: list[str]) -> bool:
    """An entry skips the modules that it leads to, or whose path has it as one part."""
    parts = module.split(".")
    return any(name in parts or ".".join(parts[: name.count(".") + 1]) == name for name in skipped)


def four_bit_rules(tensors: dict[str, Tensor], expected: set[str]) -> list[str]:
    states = {name for name in tensors if ".weight." in name}
    found = [
        f"{name} would be taken for a state"
        for name in tensors.keys() - states
        if any(word in name.split(".")[-1] for word in STATE_WORDS)
    ]
    for module in expected:
        weight = tensors[f"{module}.weight"]
        # the loader takes every tensor whose name contains the weight's name and a dot
        state = {name: t for name, t in tensors.items() if f"{module}.weight." in name}
        kinds = [name for name in state if name.split(".")[-1] in ("bitsandbytes__nf4", "bitsandbytes__fp4")]
        if len(kinds) != 1:
            found.append(f"{module} is plain, and vLLM would quantise it anew")
            continue
        read = QuantState.from_dict(state, device=torch.device("cpu"))
        out_features, in_features = read.shape
        if weight.dtype != torch.uint8 or tuple(weight.shape) != (out_features * in_features // 2, 1):
            found.append(f"{module}: the codes are {weight.dtype} {tuple(weight.shape)}")
    return found


def eight_bit_rules(tensors: dict[str, Tensor], expected: set[str]) -> list[str]:
    found = []
    for module in expected:
        weight, scales = tensors[f"{module}.weight"], tensors.get(f"{module}.SCB")
        if scales is None or weight.dtype != torch.int8:
            found.append(f"{module} is plain, and vLLM would read it as codes")
        elif scales.dtype != torch.float32 or tuple(scales.shape) != (weight.shape[0],):
            found.append(f"{module}: the scales are {scales.dtype} {tuple(scales.shape)}")
        # the loader finds the scales of a weight by its name in small letters
        if module != module.lower():
            found.append(f"{module} has capital letters")
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    with quiet_transformers():
        llama().to(torch.bfloat16).save_pretrained(folder)
    return folder


FOLDS: dict[str, dict[str, Any]] = {
    "nf4-double": {"format": "nf4", "trained_on": "nf4-double"},
    "nf4": {"format": "nf4", "trained_on": "nf4"},
    "fp4": {"format": "fp4", "trained_on": "fp4"},
    "int8": {"format": "int8", "trained_on": "int8"},
}


@pytest.fixture(scope="module")
def folds(plain: Path, tmp_path_factory: pytest.TempPathFactory, saved_adapter: Callable[..., Path]) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folds")
    adapter = saved_adapter(place / "adapter", ["q_proj", "down_proj"])
    for name, settings in FOLDS.items():
        with pytest.warns(oftsurgery.RoundingWarning):
            oftsurgery.fold_checkpoint(plain, adapter, place / name, **settings)
    return {name: place / name for name in FOLDS}


@pytest.fixture(scope="module")
def saved_adapter() -> Callable[..., Path]:
    def save(folder: Path, targets: list[str]) -> Path:
        from peft import OFTConfig, get_peft_model

        with quiet_transformers():
            live = get_peft_model(
                llama(), OFTConfig(oft_block_size=16, target_modules=targets, use_cayley_neumann=False)
            )
            for name, parameter in live.named_parameters():
                if "oft_R" in name:
                    torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
            live.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("name", FOLDS)
def test_a_fold_keeps_the_rules(name: str, folds: dict[str, Path]) -> None:
    assert broken_rules(folds[name]) == []


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_a_model_exported_from_memory_keeps_the_rules(name: str, folds: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folds[name])
    oftsurgery.export_safetensors(model, tmp_path / "out")
    assert broken_rules(tmp_path / "out") == []


def test_the_state_gives_the_weights_that_transformers_computes_with(folds: dict[str, Path]) -> None:
    """vLLM undoes double quantisation as it loads; bitsandbytes dequantises what the loader read to the same weight."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folds["nf4-double"])
    tensors = load_file(folds["nf4-double"] / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    state = QuantState.from_dict(
        {n: t for n, t in tensors.items() if f"{module}.weight." in n}, device=torch.device("cpu")
    )
    layer = model.get_submodule(module).weight
    assert torch.equal(
        dequantize_4bit(tensors[f"{module}.weight"], state), dequantize_4bit(layer.data, layer.quant_state)
    )


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "not stored as uint8"),
        ("nf4", {"llm_int8_skip_modules": ["q_proj"]}, "of a fused layer is to be skipped"),
        ("nf4", {"quant_method": "gptq"}, "the method is not bitsandbytes"),
        ("int8", {"load_in_8bit": False}, "is plain, and vLLM would quantise it anew"),
    ],
)
def test_the_rules_find_a_fault_of_the_config(
    name: str, change: dict[str, Any], said: str, folds: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folds[name] / "config.json").read_text("utf-8"))
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "model.safetensors").symlink_to(folds[name] / "model.safetensors")
    assert any(said in broken for broken in broken_rules(tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("nf4", "model.layers.0.mlp.up_proj.weight", "is plain, and vLLM would quantise it anew"),
        ("int8", "model.layers.0.mlp.up_proj.weight", "is plain, and vLLM would read it as codes"),
        ("int8", "model.layers.0.mlp.up_proj.SCB", "the scales are"),
    ],
)
def test_the_rules_find_a_fault_of_the_tensors(
    name: str, tensor: str, said: str, folds: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(folds[name] / "model.safetensors")
    module = tensor.rpartition(".")[0]
    if tensor.endswith("SCB"):
        tensors[tensor] = tensors[tensor][:-1].clone()
    else:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{module}.")} | {tensor: torch.zeros(128, 64)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folds[name] / "config.json").read_bytes())
    assert any(said in broken for broken in broken_rules(tmp_path))
