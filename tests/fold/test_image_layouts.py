"""Folds of adapters that were trained in the other layout of a model: groups, row parts and swapped halves through the planner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from image_goldens import IMAGE, model_of, relative
from models import quantise, state_bytes
from safetensors.torch import load_file, save_file
from torch import nn
from warned import quietly

import oftsurgery
from oftsurgery import MatchError, OFTAdapter
from oftsurgery.adapters.output_blocks import OutputBlocks

FLUX = IMAGE / "layouts-flux"
VARIANTS = sorted(path.name for path in FLUX.glob("trained*"))
#: original → diffusers, of the modules in the goldens
PAIRS = {
    "double_blocks.0.img_attn.qkv": tuple(f"transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k", "to_v")),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn.to_out.0",),
    "single_blocks.0.linear1": (
        *(f"single_transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k", "to_v")),
        "single_transformer_blocks.0.proj_mlp",
    ),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SWAPPED = "final_layer.adaLN_modulation.1"


def layout(tensors: Mapping[str, torch.Tensor], which: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{which}."): t for name, t in tensors.items() if name.startswith(f"{which}.")}


@pytest.mark.parametrize("which", ["original", "diffusers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_layouts_hold_what_the_tool_computes(variant: str, which: str, tmp_path: Path) -> None:
    base = model_of(layout(load_file(FLUX / "base.safetensors"), which))
    adapter = oftsurgery.load_adapter(FLUX / variant / "adapter.safetensors")
    effective = layout(load_file(FLUX / variant / "effective.safetensors"), which)
    folded = oftsurgery.fold(base, adapter, undo=tmp_path / "fold.undo")
    for name, exact in effective.items():
        assert relative(folded.state_dict()[name], exact) <= 2e-6, name
    in_place = oftsurgery.fold(model_of(base.state_dict()), adapter, inplace=True)
    for back in (
        oftsurgery.unfold(folded, undo=tmp_path / "fold.undo"),
        oftsurgery.unfold(folded, base=base),
    ):
        assert all(torch.equal(back.state_dict()[name], t) for name, t in base.state_dict().items())
    back = quietly(oftsurgery.unfold, folded, adapter)
    for name, tensor in base.state_dict().items():
        assert torch.equal(in_place.state_dict()[name], folded.state_dict()[name])
        assert relative(back.state_dict()[name], tensor) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("which", ["original", "diffusers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantised_layouts_come_back_byte_for_byte(variant: str, which: str, kind: str, tmp_path: Path) -> None:
    base = quantise(model_of(layout(load_file(FLUX / "base.safetensors"), which)), kind)
    adapter = oftsurgery.load_adapter(FLUX / variant / "adapter.safetensors")
    before = state_bytes(base)
    folded = quietly(oftsurgery.fold, base, adapter, undo=tmp_path / "fold.undo")
    assert all(0 < m.error < (0.15 if kind == "nf4" else 0.02) for m in folded.oftsurgery.modules.values())
    assert state_bytes(oftsurgery.unfold(folded, undo=tmp_path / "fold.undo")) == before
    assert state_bytes(base) == before


def test_a_group_with_a_turned_bias() -> None:
    base = model_of(layout(load_file(FLUX / "base.safetensors"), "diffusers"))
    fused = model_of(layout(load_file(FLUX / "base.safetensors"), "original"))
    maps = {
        "lora_unet_double_blocks_0_img_attn_qkv": OutputBlocks(torch.randn(6, 8, 8), 0.0, "lycoris", turns_bias=True)
    }
    adapter = OFTAdapter(maps, dialect="lycoris", bias="rotated")  # type: ignore[arg-type]
    split, whole = oftsurgery.fold(base, adapter), oftsurgery.fold(fused, adapter)
    parts = [split.get_submodule(path) for path in PAIRS["double_blocks.0.img_attn.qkv"]]
    together = whole.get_submodule("double_blocks.0.img_attn.qkv")
    for name in ("weight", "bias"):
        assert torch.allclose(torch.cat([getattr(p, name) for p in parts]), getattr(together, name), atol=1e-6)


def test_a_split_and_a_fused_adapter_in_one_fold() -> None:
    tensors = load_file(FLUX / "base.safetensors")
    fused = oftsurgery.load_adapter(FLUX / "trained-on-original_diag-oft_dim4" / "adapter.safetensors")
    split = oftsurgery.load_adapter(FLUX / "trained-on-diffusers_boft_dim8" / "adapter.safetensors")
    both = [
        oftsurgery.fold(model_of(layout(tensors, which)), [fused, split], strength=[0.5, 1.0]).state_dict()
        for which in ("original", "diffusers")
    ]
    one_by_one = oftsurgery.fold(
        oftsurgery.fold(model_of(layout(tensors, "diffusers")), fused, strength=0.5), split
    ).state_dict()
    for original, parts in PAIRS.items():
        pieces = torch.cat([both[1][f"{part}.weight"] for part in parts])
        if original == SWAPPED:
            pieces = torch.cat(pieces.chunk(2)[::-1])
        assert torch.allclose(both[0][f"{original}.weight"], pieces, atol=1e-6)
    for name, tensor in one_by_one.items():
        assert torch.allclose(both[1][name], tensor, atol=1e-6)


def test_two_modules_for_one_weight() -> None:
    block = OutputBlocks(torch.randn(6, 8, 8), 0.0, "lycoris")
    names = ("lora_unet_double_blocks_0_img_attn_qkv", "lycoris_transformer_blocks_0_attn_to_q")
    adapter = OFTAdapter(dict.fromkeys(names, block), dialect="lycoris")  # type: ignore[arg-type]
    for which in ("original", "diffusers"):
        model: nn.Module = model_of(layout(load_file(FLUX / "base.safetensors"), which))
        with pytest.raises(MatchError, match=r"two of the adapter's modules, .* are one module of the model"):
            oftsurgery.fold(model, adapter)


@pytest.mark.parametrize("kind", ["folder", "single file"])
@pytest.mark.parametrize("which", ["original", "diffusers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_hold_what_memory_holds(variant: str, which: str, kind: str, tmp_path: Path) -> None:
    tensors = layout(load_file(FLUX / "base.safetensors"), which)
    beginning = "" if kind == "folder" else "model.diffusion_model."
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    if kind == "folder":
        base, out = tmp_path / "base", tmp_path / "out"
        base.mkdir()
    save_file({beginning + n: t for n, t in tensors.items()}, base / FILE if kind == "folder" else base)
    adapter = FLUX / variant / "adapter.safetensors"
    undo = tmp_path / "fold.undo"
    record = quietly(oftsurgery.fold_checkpoint, base, adapter, out, trained_on="plain", undo=undo)
    folded = load_file(out / FILE if kind == "folder" else out)
    in_memory = oftsurgery.fold(model_of(tensors), oftsurgery.load_adapter(adapter)).state_dict()
    assert all(torch.equal(folded[beginning + n], t) for n, t in in_memory.items())
    report = quietly(oftsurgery.verify_checkpoint, out, base, adapter)
    assert report.ok, (report.verdict, report.wrong)
    assert len(report.modules) == len(record.modules)
    for way, given in (("base", base), ("undo", undo)):
        back = tmp_path / f"{way} back.safetensors"
        quietly(oftsurgery.unfold_checkpoint, out, back, **{way: given})
        restored = load_file(back / FILE if kind == "folder" else back)
        assert all(torch.equal(restored[beginning + n], t) for n, t in tensors.items())
    # a wrong weight is seen
    name = next(iter(record.modules)) + ".weight"
    save_file(folded | {name: folded[name] * 1.01}, out / FILE if kind == "folder" else out)
    assert name in quietly(oftsurgery.verify_checkpoint, out, base, adapter).wrong


FILE = "diffusion_pytorch_model.safetensors"


def test_a_fused_projection_beside_the_names_of_its_parts() -> None:
    """OneTrainer's own fused name, which neither layout has, and diffusers' ``fuse_qkv_projections``."""
    variant = IMAGE / "onetrainer-2026-08" / "fused_qkv"
    tensors = load_file(IMAGE / "onetrainer-base" / "base.safetensors")
    adapter = oftsurgery.load_adapter(variant / "adapter.safetensors")
    folded = oftsurgery.fold(model_of(tensors), adapter).state_dict()
    for name, exact in load_file(variant / "effective.safetensors").items():
        assert relative(folded[name], exact) <= 2e-6, name
    split = oftsurgery.load_adapter(FLUX / "trained-on-diffusers_boft_dim8" / "adapter.safetensors")
    own = layout(load_file(FLUX / "base.safetensors"), "diffusers")
    expected = oftsurgery.fold(model_of(own), split).state_dict()
    attn = "transformer_blocks.0.attn"
    for leaf in ("weight", "bias"):
        parts = [own.pop(f"{attn}.{end}.{leaf}") for end in ("to_q", "to_k", "to_v")]
        own[f"{attn}.to_qkv.{leaf}"] = torch.cat(parts)
    fused = oftsurgery.fold(model_of(own), split).state_dict()
    together = torch.cat([expected[f"{attn}.{end}.weight"] for end in ("to_q", "to_k", "to_v")])
    assert torch.allclose(fused[f"{attn}.to_qkv.weight"], together, atol=1e-6)


def test_the_checks_know_a_fused_projection_beside_the_names_of_its_parts(tmp_path: Path) -> None:
    adapter = IMAGE / "onetrainer-2026-08" / "fused_qkv" / "adapter.safetensors"
    (tmp_path / "base").mkdir()
    save_file(load_file(IMAGE / "onetrainer-base" / "base.safetensors"), tmp_path / "base" / FILE)
    record = quietly(oftsurgery.fold_checkpoint, tmp_path / "base", adapter, tmp_path / "out", trained_on="plain")
    report = quietly(oftsurgery.verify_checkpoint, tmp_path / "out", tmp_path / "base", adapter)
    assert report.ok, report.wrong
    assert report.looked_at["rotated"] == len(record.modules)
