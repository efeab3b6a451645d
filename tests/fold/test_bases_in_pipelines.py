"""Pipelines of diffusers with a component that another package than bitsandbytes quantised. transformers' own FP8 quantises a text encoder
here; ``tests/bases/diffusers_models.py`` has denoisers that diffusers quantises with torchao.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from checkpoints import rotations_in
from image_models import adapted, build
from independent import relative
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from warned import quietly

import oftsurgery

SETTINGS: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "modules_to_not_convert": ["embeddings"],
}
FP8 = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(32, 32), scale_fmt="float"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline ``base`` whose text encoder is stored in FP8, and the adapters ``unet`` and ``text``."""
    place = tmp_path_factory.mktemp("pipeline")
    base = place / "base"
    denoiser = build("UNet2DConditionModel")
    denoiser.save_pretrained(base / "unet")
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(2)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**sizes, num_hidden_layers=2, max_position_embeddings=16)
    ).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_().div_(8)
    quietly(encoder.save_pretrained, base / "text_encoder")
    adapted(denoiser).save_pretrained(place / "unet")
    adapted(encoder, ["q_proj", "fc1"]).save_pretrained(place / "text")
    file = base / "text_encoder" / "model.safetensors"
    held = load_file(file)
    linears = [n for n, t in held.items() if t.ndim == 2 and "embedding" not in n]
    made = Fp8Quantize(FP8).convert({n: held[n] for n in linears})
    save_file(held | {n: t.contiguous() for n, t in made.items()}, file, metadata={"format": "pt"})
    config = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    diffusers.DDIMScheduler().save_pretrained(base / "scheduler")
    (base / "model_index.json").write_text(json.dumps(index))
    return place


def dequantised(folder: Path) -> dict[str, Tensor]:
    """What transformers' own FP8 makes of the weights, float32, by the names of the files."""
    held = load_file(folder / "model.safetensors")
    return {
        n: Fp8Dequantize(FP8)._dequantize_one(t, held[f"{n}_scale_inv"], output_dtype=torch.float32)
        if f"{n}_scale_inv" in held
        else t
        for n, t in held.items()
        if not n.endswith("_scale_inv")
    }


def exact(place: Path) -> dict[str, Tensor]:
    """float64: the rotated weights of the text encoder, by the ends of their names."""
    before = dequantised(place / "base" / "text_encoder")
    turns = rotations_in(place / "text")
    found = {f"{path}.weight": r for path, r in turns.items()}
    names = {n: next(full for full in before if full.endswith(n)) for n in found}
    return {names[n]: before[names[n]].double() @ found[n].t() for n in found}


@pytest.mark.parametrize(("format", "within"), [("bf16", 0.003), ("fp32", 1e-6), ("same", 0.03)])
def test_each_component_is_read_in_its_own_format(format: Any, within: float, place: Path, tmp_path: Path) -> None:
    out, both = tmp_path / "out", [place / "unet", place / "text"]
    record = quietly(oftsurgery.fold_checkpoint, place / "base", both, out, format=format, trained_on="plain")
    assert {path.partition(".")[0] for path in record.modules} == {"unet", "text_encoder"}
    settings = json.loads((out / "text_encoder" / "config.json").read_text()).get("quantization_config")
    assert settings == (SETTINGS if format == "same" else None)
    found = dequantised(out / "text_encoder")
    assert len(exact(place)) == 4
    for name, weight in exact(place).items():
        assert relative(found[name].double(), weight) < within
    report = quietly(oftsurgery.verify_checkpoint, out, place / "base", both)
    assert report.ok, report.wrong
    assert [f.code for f in oftsurgery.doctor(out) if f.severity != "note"] == []
    assert "error" not in {f.severity for f in oftsurgery.doctor(out, base=place / "base", adapter=place / "text")}
    assert "error" not in {f.severity for f in oftsurgery.doctor(place / "text", base=place / "base")}
    found_again = quietly(oftsurgery.extract_checkpoint, place / "base", out, block_size=16, component="text_encoder")
    assert len(found_again.modules) == 4
    loaded = quietly(transformers.CLIPTextModel.from_pretrained, out / "text_encoder").state_dict()
    assert all(relative(loaded[n].double(), t.double()) < 1e-6 for n, t in found.items() if n in loaded)
    if format == "same":
        quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "back", base=place / "base")
        for name in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
            before, after = load_file(place / "base" / name), load_file(tmp_path / "back" / name)
            assert before.keys() == after.keys()
            assert all(
                torch.equal(t.view(torch.uint8), after[n].view(torch.uint8)) for n, t in before.items() if t.ndim
            )


def test_an_undo_record_of_a_pipeline_restores_every_byte(place: Path, tmp_path: Path) -> None:
    out, undo = tmp_path / "out", tmp_path / "pipeline.undo"
    quietly(
        oftsurgery.fold_checkpoint, place / "base", [place / "unet", place / "text"], out, undo=undo, trained_on="plain"
    )
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "back", undo=undo)
    for name in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        before, after = load_file(place / "base" / name), load_file(tmp_path / "back" / name)
        assert all(torch.equal(t.view(torch.uint8), after[n].view(torch.uint8)) for n, t in before.items() if t.ndim)


@pytest.mark.parametrize("method", ["quanto", "gguf", "modelopt"])
def test_components_of_other_packages_are_refused_by_name(method: str, place: Path, tmp_path: Path) -> None:
    base = shutil.copytree(place / "base", tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    for adapter in ("unet", "text"):
        with pytest.raises(
            oftsurgery.FormatError, match=rf"another library quantised.*{method}.*unet.*dequantise"
        ) as caught:
            oftsurgery.fold_checkpoint(base, place / adapter, tmp_path / "out", format="bf16", trained_on="plain")
        assert caught.value.format == method
    assert not (tmp_path / "out").exists()
