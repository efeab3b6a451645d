"""Adapters of image tools, and peft's BOFT and HRA, as peft's current OFT: real peft loads the written folder onto real modules, and
its live layers compute in float64 what the trainer's own live layers computed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from image_goldens import GOLDENS, IMAGE, Golden, model_of, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from warned import quietly

import oftsurgery
from oftsurgery import AdapterError, MatchError, OFTAdapter
from oftsurgery.adapters.hra import Householder
from oftsurgery.adapters.onetrainer import OneTrainerBlocks
from oftsurgery.cli.main import main

F64 = torch.float64


def live_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """``{path: the weight of peft's live layer}`` float64, by impulses at its inputs."""
    live = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(model), folder).double().eval()
    found: dict[str, Tensor] = {}
    for path, layer in live.base_model.model.named_modules():
        if not isinstance(layer, peft.tuners.oft.layer.OFTLayer):
            continue
        base = layer.base_layer
        impulses = torch.eye(base.weight.shape[1], dtype=F64)
        with torch.no_grad():
            y = layer(impulses.reshape(*impulses.shape, *([1] * (base.weight.ndim - 2))))
        y = y.reshape(len(impulses), -1) - (0 if base.bias is None else base.bias)
        found[path] = y.mT.reshape(base.weight.shape)
    return found


def without_larger_kernels(adapter: OFTAdapter, model: nn.Module) -> OFTAdapter:
    kernels = {path: tuple(getattr(layer, "kernel_size", ())) for path, layer in model.named_modules()}
    modules = {p: m for p, m in adapter.modules.items() if kernels[p.removeprefix("transformer.")] in ((), (1, 1))}
    return replace(adapter, modules=modules, config={**adapter.config, "target_modules": None})


def check(written: OFTAdapter, model: nn.Module, exact: Mapping[str, Tensor], folder: Path, within: float) -> None:
    residuals = quietly(written.save, folder)
    live = live_weights(model, folder)
    assert live.keys() == written.modules.keys() == residuals.keys()
    for path, weight in live.items():
        assert relative(weight, exact[f"{path}.weight"]) <= within + max(residuals.values()), path


ROTATE_INPUTS = [g for g in GOLDENS if not g.always and g.folder.startswith(("onetrainer", "diffusers"))]


@pytest.mark.parametrize("golden", ROTATE_INPUTS, ids=lambda g: g.folder)
def test_peft_computes_what_the_tool_computed(golden: Golden, tmp_path: Path) -> None:
    model, adapter = model_of(golden.base_tensors()), golden.adapter()
    if golden.folder.startswith("onetrainer"):
        with pytest.raises(AdapterError, match=r"no form for a 3×3 convolution.*module 'conv3'.*fold the adapter"):
            oftsurgery.as_peft(adapter, model)
        adapter = without_larger_kernels(adapter, model)
        with pytest.raises(AdapterError, match=r"do not tell a linear layer from a convolution.*--base BASE"):
            adapter.save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    written = oftsurgery.as_peft(adapter, model)
    check(written, model, golden.effective(1) or {}, tmp_path / "out", 2e-7)
    first_days = golden.folder.startswith("onetrainer-2025-11-14")  # a series that peft 0.21 does not have
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_cayley_neumann"] is not first_days
    again = oftsurgery.fold(model, oftsurgery.load_adapter(tmp_path / "out"))
    own = oftsurgery.fold(model, written)
    assert first_days or all(relative(t, own.state_dict()[n]) < 2e-7 for n, t in again.state_dict().items())


def test_a_fused_module_is_written_for_each_part_of_the_base(tmp_path: Path) -> None:
    variant = IMAGE / "onetrainer-2026-08" / "fused_qkv"
    model = model_of(load_file(IMAGE / "onetrainer-base" / "base.safetensors"))
    adapter = oftsurgery.load_adapter(variant / "adapter.safetensors")
    own = {path: m for path, m in adapter.modules.items() if "conv3" not in path}
    written = oftsurgery.as_peft(replace(adapter, modules=own), model)
    assert {path.rpartition(".")[2] for path in written.modules} == {"conv1", "to_q", "to_k", "to_v", "proj"}
    check(written, model, load_file(variant / "effective.safetensors"), tmp_path / "out", 2e-7)


def test_parts_of_a_fused_module_of_the_base(tmp_path: Path) -> None:
    """One rotation of all parts is the fused layer's rotation; different ones, or a part alone, have no form."""
    attn = "transformer_blocks.0.attn"
    draw = torch.Generator().manual_seed(2)
    fused = model_of({f"{attn}.to_qkv.weight": torch.randn(48, 24, generator=draw)})
    v = 0.1 * torch.randn(3, 28, generator=draw)

    def adapter(*vectors: Tensor) -> OFTAdapter:
        ends = ("to_q", "to_k", "to_v")[: len(vectors)]
        modules = {f"transformer.{attn}.{end}": OneTrainerBlocks(t) for end, t in zip(ends, vectors, strict=True)}
        return OFTAdapter(modules, dialect="onetrainer", config={"metadata": {}})  # type: ignore[arg-type]

    one = adapter(v, v.clone(), v.clone())
    exact = oftsurgery.fold(copy.deepcopy(fused).double(), one).state_dict()
    check(oftsurgery.as_peft(one, fused), fused, exact, tmp_path / "out", 2e-7)
    for other in (adapter(v, v + 0.1, v), adapter(v, v)):
        with pytest.raises(AdapterError, match=r"turns by different rotations.*to_qkv.*has these modules apart"):
            oftsurgery.as_peft(other, fused)


def small(kinds: str) -> nn.Module:
    """Layers of several widths: linear layers, and a 1×1 convolution if ``kinds`` says so."""
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("a", nn.Linear(24, 16))
    model.add_module("b", nn.Linear(20, 12, bias=False))
    if "conv" in kinds:
        model.add_module("c", nn.Conv2d(8, 12, 1))
    return model.requires_grad_(False)


def test_reflections_are_one_rotation(tmp_path: Path) -> None:
    model, config = small("conv"), peft.HRAConfig(r=4, target_modules=["a", "b", "c"], init_weights=False)
    live = peft.get_peft_model(copy.deepcopy(model), config)
    live.save_pretrained(tmp_path / "peft")
    merged = copy.deepcopy(live).double().merge_and_unload().state_dict()
    check(oftsurgery.as_peft(tmp_path / "peft", model), model, merged, tmp_path / "out", 2e-6)
    with pytest.raises(AdapterError, match=r"do not tell a linear layer from a convolution.*--base BASE"):
        oftsurgery.load_adapter(tmp_path / "peft").save(tmp_path / "without")


@pytest.mark.parametrize("folder", ["boft_block8", "boft_block4_factors2", "boft_conv", "boft_conv_factors2"])
def test_factors_of_boft_are_one_rotation(folder: str, tmp_path: Path) -> None:
    golden = next(g for g in GOLDENS if g.folder == f"peft-0.21.2/{folder}")
    model = model_of(golden.base_tensors())
    adapter = without_larger_kernels(golden.adapter(), model)
    with pytest.raises(AdapterError, match=r"trained scale of the outputs \(boft_s\).*peft 0\.21, which reads"):
        oftsurgery.as_peft(adapter, model)
    scales: dict[str, Tensor] = {path: m.tensors()["boft_s"] for path, m in adapter.modules.items()}
    plain = {path: replace(m, scale=torch.ones_like(scales[path])) for path, m in adapter.modules.items()}  # type: ignore[call-arg]
    unscaled, effective = {}, golden.effective(1) or {}
    for path, scale in scales.items():
        weight = effective[f"{path}.weight"]
        unscaled[f"{path}.weight"] = weight / scale.reshape(-1, *([1] * (weight.ndim - 1)))
    adapter = replace(adapter, modules=plain)
    check(oftsurgery.as_peft(adapter, model), model, unscaled, tmp_path / "out", 5e-7)
    if "conv" in folder:
        with pytest.raises(AdapterError, match=r"do not tell the size of a convolution's kernel.*--base BASE"):
            adapter.save(tmp_path / "without")
    else:
        adapter.save(tmp_path / "without")  # boft_s tells that these layers are linear
        assert live_weights(model, tmp_path / "without").keys() == scales.keys()


@pytest.mark.parametrize("folder", ["hra_r3_gs", "road_1", "boft_conv"])
def test_what_no_rotation_of_inputs_is(folder: str) -> None:
    golden = next(g for g in GOLDENS if g.folder == f"peft-0.21.2/{folder}")
    with pytest.raises(AdapterError, match=r"(odd number of reflections|RoAd|boft_s).*peft 0\.21, which reads"):
        oftsurgery.as_peft(golden.adapter(), model_of(golden.base_tensors()))
    half_turn = OFTAdapter({"a": Householder(torch.eye(24)[:, :2], orthogonal=True)}, dialect="peft-hra")
    with pytest.raises(AdapterError, match=r"too close to π.*peft 0\.21, which reads"):
        oftsurgery.as_peft(half_turn, small(""))


def one_trainer(model: nn.Module, sizes: Mapping[str, int], *, shared: bool = False) -> OFTAdapter:
    draw = torch.Generator().manual_seed(3)
    modules = {}
    for path, b in sizes.items():
        count = model.get_submodule(path).weight.shape[1] // b
        v = 0.1 * torch.randn(1 if shared else count, b * (b - 1) // 2, generator=draw)
        modules[f"lora_unet_{path}"] = OneTrainerBlocks(v)
    config = {"metadata": {}}
    return OFTAdapter(modules, dialect="onetrainer", config=config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "shared", "written"),
    [
        ({"a": 8, "b": 10, "c": 4}, False, (1, 0)),  # as OneTrainer adjusts the size to each layer
        ({"a": 6, "b": 5, "c": 2}, False, (4, 0)),
        ({"a": 4, "b": 4, "c": 4}, False, (0, 4)),
        ({"a": 4, "b": 2, "c": 2}, False, (0, 4)),
        ({"a": 24, "b": 20, "c": 8}, False, (1, 0)),  # one block for each layer
        ({"a": 4, "b": 4, "c": 4}, True, (0, 4)),
        ({"a": 8, "b": 5, "c": 4}, True, (1, 0)),
        ({"a": 8, "b": 10, "c": 8}, True, (1, 0)),  # the one block of a layer beside shared ones
    ],
)
def test_blocks_of_any_sizes_are_written_for_one_config(
    sizes: dict[str, int], shared: bool, written: tuple[int, int], tmp_path: Path
) -> None:
    model = small("conv")
    adapter = one_trainer(model, sizes, shared=shared)
    exact = oftsurgery.fold(copy.deepcopy(model).double(), adapter).state_dict()
    check(oftsurgery.as_peft(adapter, model), model, exact, tmp_path / "out", 2e-7)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["oft_block_size"]) == written


def test_a_weaker_adapter_of_onetrainer_keeps_the_kinds_of_layers(tmp_path: Path) -> None:
    model = small("conv")
    adapter = one_trainer(model, {"a": 8, "b": 4, "c": 4})
    half = adapter.scaled(0.5)
    exact = oftsurgery.fold(copy.deepcopy(model).double(), half).state_dict()
    check(oftsurgery.as_peft(half, model), model, exact, tmp_path / "out", 2e-7)
    with pytest.raises(AdapterError, match="no block rotation for every kind of layer"):
        half.inverse()


def test_live_layers_of_an_adapter_of_onetrainer() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 12)).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    modules = {
        f"lora_unet_{i}": OneTrainerBlocks(0.1 * torch.randn(n, 28, generator=draw)) for i, n in ((0, 3), (1, 2))
    }
    adapter = OFTAdapter(modules, dialect="onetrainer", config={"metadata": {}})  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="no live layer for this kind of adapter"):
        oftsurgery.wrap(model, adapter)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    expected = oftsurgery.fold(model, adapter)(x)
    wrapped = oftsurgery.wrap(model, oftsurgery.as_peft(adapter, model))
    assert relative(wrapped(x).detach(), expected) < 1e-6


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline ``base`` with a U-Net, and a file of OneTrainer for both of its models, ``both.safetensors``."""
    from image_models import build
    from transformers import CLIPTextConfig, CLIPTextModel

    place = tmp_path_factory.mktemp("pipeline")
    unet = build("UNet2DConditionModel")
    unet.save_pretrained(place / "base" / "unet")
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1, max_position_embeddings=16))
    quietly(encoder.save_pretrained, place / "base" / "text_encoder")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (place / "base" / "model_index.json").write_text(json.dumps(index))
    tensors: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(5)
    for prefix, model, ends in (("lora_unet_", unet, ("to_q", "to_v")), ("lora_te_", encoder, ("q_proj",))):
        for path, layer in model.named_modules():
            if path.endswith(ends):
                shape = (layer.weight.shape[1] // 8, 28)
                tensors[f"{prefix}{path.replace('.', '_')}.oft_R.weight"] = 0.1 * torch.randn(shape, generator=draw)
    save_file(tensors, place / "both.safetensors", {"ot_branch": "master"})
    return place


def test_the_command_writes_a_folder_for_each_model_of_a_pipeline(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(*words: object) -> tuple[int, str]:
        code = main(["adapter", "convert", str(pipeline / "both.safetensors"), *map(str, words)])
        return code, capsys.readouterr().err

    out = tmp_path / "out"
    code, err = convert(out)
    assert (code, "--base BASE" in err) == (2, True), err
    code, err = convert(out, "--base", pipeline / "base")
    assert code == 2
    assert "changes several models of the pipeline (text_encoder, unet)" in err or "(unet, text_encoder)" in err
    assert "--component" in err
    assert convert(out, "--component", "unet")[0] == 2
    assert convert(tmp_path / "x.safetensors", "--to", "comfyui", "--base", pipeline / "base")[0] == 2
    assert not list(tmp_path.iterdir())
    code, err = convert(out, "--base", pipeline / "base", "--component", "unet")
    assert code == 0, err
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "base" / "unet")
    adapter = oftsurgery.load_adapter(pipeline / "both.safetensors")
    own = {p: m for p, m in adapter.modules.items() if p.startswith("lora_unet_")}
    exact = oftsurgery.fold(copy.deepcopy(unet).double(), replace(adapter, modules=own)).state_dict()
    live = live_weights(unet, out)
    assert len(live) == len(own)
    assert all(relative(t, exact[f"{path}.weight"]) < 2e-7 for path, t in live.items())
    with pytest.raises(MatchError, match=r"no module of the pipeline's model 'vae'"):
        oftsurgery.as_peft(adapter, pipeline / "base", component="vae")
