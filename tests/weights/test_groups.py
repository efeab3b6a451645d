"""Fused and split projections, and swapped halves, in both directions, against what a tool's live layers compute."""

from __future__ import annotations

import pytest
import torch
from image_goldens import IMAGE, relative
from safetensors.torch import load_file
from torch import Tensor

import oftsurgery
from oftsurgery import MatchError, ShapeError
from oftsurgery.adapters.hra import Householder
from oftsurgery.adapters.output_blocks import OutputBlocks
from oftsurgery.adapters.parts import RowParts, SwappedHalves
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.checks import measures
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.weights.fold import fold_encoded, fold_group

FLUX = IMAGE / "layouts-flux"
#: the module of the original layout → the modules of diffusers' layout
QKV = {
    "double_blocks.0.img_attn.qkv": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"],
    "single_blocks.0.linear1": [
        "single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp",
    ],
}  # fmt: skip
HALVES = ("final_layer.adaLN_modulation.1", "norm_out.linear")


def maps_of(variant: str) -> dict[str, WeightMap]:
    return dict(oftsurgery.load_adapter(FLUX / variant / "adapter.safetensors").modules)


def flat(path: str, prefix: str) -> str:
    return prefix + path.replace(".", "_")


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return load_file(FLUX / "base.safetensors")


@pytest.mark.parametrize("fused", QKV)
def test_a_fused_adapter_on_split_weights(fused: str, base: dict[str, Tensor]) -> None:
    variant = "trained-on-original_diag-oft_dim4"
    effective = load_file(FLUX / variant / "effective.safetensors")
    weight_map = maps_of(variant)[flat(fused, "lora_unet_")]
    group = [codecs.dense(base[f"diffusers.{path}.weight"]) for path in QKV[fused]]
    for path, folded in zip(QKV[fused], fold_group(group, [weight_map.resolved()]), strict=True):
        assert relative(folded.encoded.tensors["weight"], effective[f"diffusers.{path}.weight"]) < 2e-6
    whole = oftsurgery.fold_weight(base[f"original.{fused}.weight"], weight_map)
    assert relative(whole, effective[f"original.{fused}.weight"]) < 2e-6


@pytest.mark.parametrize("variant", ["trained-on-diffusers_boft_dim8", "trained-on-diffusers_diag-oft_dim4"])
@pytest.mark.parametrize("fused", QKV)
def test_a_split_adapter_on_a_fused_weight(fused: str, variant: str, base: dict[str, Tensor]) -> None:
    effective, maps = load_file(FLUX / variant / "effective.safetensors"), maps_of(variant)
    parts = tuple((maps[flat(path, "lycoris_")], len(base[f"diffusers.{path}.weight"])) for path in QKV[fused])
    weight = base[f"original.{fused}.weight"]
    folded = oftsurgery.fold_weight(weight, RowParts(parts))
    assert relative(folded, effective[f"original.{fused}.weight"]) < 2e-6
    assert relative(oftsurgery.unfold_weight(folded, RowParts(parts)), weight) < 1e-6
    assert relative(measures.rotated(weight, [RowParts(parts)]), effective[f"original.{fused}.weight"]) < 1e-6
    half = RowParts(parts).at_strength(0.5, "lycoris")
    expected = torch.cat(
        [
            oftsurgery.fold_weight(w, m.at_strength(0.5, "lycoris"))
            for w, (m, _) in zip(torch.split(weight, [rows for _, rows in parts]), parts, strict=True)
        ]
    )
    assert torch.equal(oftsurgery.fold_weight(weight, half), expected)


@pytest.mark.parametrize("variant", sorted(path.name for path in FLUX.glob("trained*")))
def test_swapped_halves(variant: str, base: dict[str, Tensor]) -> None:
    effective, maps = load_file(FLUX / variant / "effective.safetensors"), maps_of(variant)
    original, diffusers = HALVES
    trained_on_original = "original" in variant
    weight_map = maps[flat(original, "lora_unet_") if trained_on_original else flat(diffusers, "lycoris_")]
    for layout, path, own in (
        ("original", original, trained_on_original),
        ("diffusers", diffusers, not trained_on_original),
    ):
        here = weight_map if own else SwappedHalves(weight_map)
        name = f"{layout}.{path}.weight"
        folded = oftsurgery.fold_weight(base[name], here)
        assert relative(folded, effective[name]) < 2e-6
        assert relative(oftsurgery.unfold_weight(folded, here), base[name]) < 1e-6
        assert relative(measures.rotated(base[name], [here]), effective[name]) < 1e-6


def test_a_fused_rotation_of_the_inputs_is_each_parts_own() -> None:
    variant = IMAGE / "onetrainer-2026-08" / "fused_qkv"
    base, effective = (
        load_file(IMAGE / "onetrainer-base" / "base.safetensors"),
        load_file(variant / "effective.safetensors"),
    )
    maps = oftsurgery.load_adapter(variant / "adapter.safetensors").modules
    weight_map = maps["transformer.transformer_blocks.0.attn.qkv"]
    for part in ("to_q", "to_k", "to_v"):
        name = f"transformer_blocks.0.attn.{part}.weight"
        assert relative(oftsurgery.fold_weight(base[name], weight_map), effective[name]) < 2e-6


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_quantised_groups_keep_their_formats(codec: str) -> None:
    """A 4-bit block may straddle the rows of a weight, and a rotation the weights of a group."""
    weights = [torch.randn(rows, 24) for rows in (16, 10, 6)]
    blocks = torch.randn(4, 8, 8) * 0.1
    weight_map = OutputBlocks(blocks, 0.0, "lycoris")
    formats = [WeightFormat(codec, (len(w), 24), torch.float16, 64 if codec == "nf4" else 0) for w in weights]
    group = [codecs.encode(w, f) for w, f in zip(weights, formats, strict=True)]
    folded = fold_group(group, [weight_map.resolved()])
    exact = oftsurgery.fold_weight(torch.cat([codecs.decode(e) for e in group]), weight_map)
    for new, part, f in zip(folded, torch.split(exact, [16, 10, 6]), formats, strict=True):
        plain = codecs.encode(part, f)
        assert new.encoded.format == f
        assert new.encoded.fingerprint == plain.fingerprint
    alone = fold_encoded(group[0], [OutputBlocks(blocks[:2], 0.0, "lycoris").resolved()])
    assert alone.encoded.fingerprint == folded[0].encoded.fingerprint


def test_parts_that_do_not_fit() -> None:
    turned = OutputBlocks(torch.randn(2, 4, 4), 0.0, "lycoris")
    with pytest.raises(ShapeError, match=r"the parts have 8 \+ 8 rows, but the weight has 12"):
        oftsurgery.fold_weight(torch.randn(12, 4), RowParts(((turned, 8), (None, 8))))
    with pytest.raises(MatchError, match="need maps of one side, and have: input, output"):
        RowParts(((turned, 8), (Householder(torch.randn(4, 1)), 8)))
    with pytest.raises(ShapeError, match="a weight of 7 rows has no two halves"):
        oftsurgery.fold_weight(torch.randn(7, 4), SwappedHalves(turned))
    with pytest.raises(ShapeError, match="one number of inputs, but have 4, 6"):
        fold_group([codecs.dense(torch.randn(4, 4)), codecs.dense(torch.randn(4, 6))], [turned])
