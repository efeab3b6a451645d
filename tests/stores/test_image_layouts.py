"""The names of image models in the original layout and in diffusers', against the conversions of diffusers itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor

import oftsurgery
from oftsurgery.folding.chains import part_rows
from oftsurgery.stores.image_layouts import Pair, pairs_of
from oftsurgery.stores.image_names import ImageNames
from oftsurgery.stores.meaning import Meaning

#: file of names → (layers_per_block of a U-Net, or None)
FAMILIES = {"flux_transformer": None, "sd3_transformer": None, "sd15_unet": 2, "sdxl_unet": 2}
FLUX_WIDTH = 3072  # built into diffusers' function


@pytest.fixture(params=FAMILIES)
def names(request: pytest.FixtureRequest, golden: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """``(family, {diffusers' path: original path, part, number of parts, swapped halves})``."""
    read = json.loads((golden / "image-names" / f"{request.param}.json").read_text())
    return request.param, {n: {"module": v} if isinstance(v, str) else v for n, v in read.items()}


def facts(pairs: tuple[Pair, ...]) -> dict[str, dict[str, Any]]:
    """Pairs in the form of the files."""
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        for i, part in enumerate(pair.parts):
            assert part not in found
            parts = {"part": i, "parts": len(pair.parts)} if len(pair.parts) > 1 else {}
            found[part] = {"module": pair.original} | parts | ({"swap_halves": True} if pair.swapped else {})
    return found


def test_names_of_diffusers_have_the_original_names(names: tuple[str, dict[str, dict[str, Any]]]) -> None:
    _, expected = names
    assert facts(pairs_of(expected)) == expected


def test_original_names_have_the_names_of_diffusers(names: tuple[str, dict[str, dict[str, Any]]]) -> None:
    _, expected = names
    originals = {value["module"] for value in expected.values()}
    found = facts(tuple(pair for pair in pairs_of(originals) if pair.original in originals))
    assert {n: v for n, v in found.items() if n in expected} == expected


def _parts(weight: Tensor) -> set[tuple[int, int, int]]:
    """``(number of the tensor, first row, rows)`` of a tensor of tagged rows; two entries where the halves are swapped."""
    rows = weight.flatten(1)[:, 0].to(torch.int64).tolist() if weight.ndim > 1 else weight.to(torch.int64).tolist()
    runs: list[list[int]] = []
    for row in rows:
        if not runs or row != runs[-1][0] + runs[-1][1]:
            runs.append([row, 0])
        runs[-1][1] += 1
    return {(start >> 20, start & 0xFFFFF, length) for start, length in runs}


def rows_of(pair: Pair, out: int) -> list[slice]:
    """The rows of the parts of a pair in the original weight."""
    sizes = part_rows(len(pair.parts), (out, FLUX_WIDTH))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _convert(family: str, tagged: dict[str, Tensor]) -> dict[str, Tensor]:
    if family == "flux_transformer":
        for i in range(2):  # the function asks for the norms too, which are no modules with weights
            for stream in ("img", "txt"):
                for norm in ("query_norm", "key_norm"):
                    tagged[f"double_blocks.{i}.{stream}_attn.norm.{norm}.scale"] = torch.zeros(1)
            for norm in ("query_norm", "key_norm"):
                tagged[f"single_blocks.{i}.norm.{norm}.scale"] = torch.zeros(1)
        found: dict[str, Tensor] = theirs.convert_flux_transformer_checkpoint_to_diffusers(tagged)
    elif family == "sd3_transformer":
        found = theirs.convert_sd3_transformer_checkpoint_to_diffusers(tagged | {"pos_embed": torch.zeros(1)})
    else:
        added = "text_time" if family == "sdxl_unet" else None
        config = {"layers_per_block": FAMILIES[family], "class_embed_type": None, "addition_embed_type": added}
        prefixed = {f"model.diffusion_model.{name}": t for name, t in tagged.items()}
        found = theirs.convert_ldm_unet_checkpoint(prefixed, config)
    return found


def _tagged(family: str, expected: dict[str, dict[str, Any]]) -> Iterator[tuple[str, int, Tensor]]:
    """``(original path, its number, a weight whose rows tell both)``."""
    for number, module in enumerate(dict.fromkeys(value["module"] for value in expected.values()), start=1):
        rows = 12
        if family == "flux_transformer":
            rows = FLUX_WIDTH * (7 if module.endswith("linear1") else 3 if module.endswith("qkv") else 2)
        columns = 64 if module == "context_embedder" else 1
        yield module, number, ((number << 20) + torch.arange(rows, dtype=torch.float64))[:, None].expand(-1, columns)


def test_the_tables_are_those_of_diffusers_own_conversion(names: tuple[str, dict[str, dict[str, Any]]]) -> None:
    """Conversions only move rows: what becomes of rows that tell where they come from shows every name, part and swap."""
    family, expected = names
    numbers, tagged = {}, {}
    for module, number, weight in _tagged(family, expected):
        numbers[module], tagged[f"{module}.weight"] = number, weight.clone()
        tagged[f"{module}.bias"] = weight[:, 0].clone()
    sizes = {name.removesuffix(".weight"): t.shape[0] for name, t in tagged.items() if name.endswith(".weight")}
    converted = _convert(family, tagged)
    pairs = [pair for pair in pairs_of(numbers) if pair.original in numbers]
    seen = 0
    for pair in pairs:
        out = sizes[pair.original]
        for part, rows in zip(pair.parts, rows_of(pair, out), strict=True):
            if f"{part}.weight" not in converted:  # a pair of names of another family (SD3's names in Flux)
                continue
            length, number = rows.stop - rows.start, numbers[pair.original]
            moved = {(number, rows.start, length)}
            if pair.swapped:
                moved = {(number, 0, length // 2), (number, length // 2, length // 2)}
            for name in (f"{part}.weight", f"{part}.bias"):
                if name in converted:
                    assert _parts(converted[name]) == moved, name
                    seen += 1
    assert seen == sum(name.rpartition(".")[0] in expected for name in converted)
    assert seen > len(expected)


# --- names in adapters ------------------------------------------------------------------------------------------------

SPLIT = tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
DIFFUSERS = [
    *SPLIT,
    "transformer_blocks.0.attn.to_out.0",
    "norm_out.linear",
    "proj_out",
    "single_transformer_blocks.0.proj_out",
]
ORIGINAL = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_attn.proj",
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
]
FLUX_QKV = "double_blocks.0.img_attn.qkv"
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1"]

MEANINGS: dict[str, tuple[list[str], bool, str, Meaning]] = {
    "flat, in the model's own layout": (
        DIFFUSERS,
        False,
        "lycoris_transformer_blocks_0_attn_to_q",
        Meaning((SPLIT[0],)),
    ),
    "dotted": (DIFFUSERS, False, "transformer.transformer_blocks.0.attn.to_out.0", Meaning((DIFFUSERS[3],))),
    "no prefix": (DIFFUSERS, False, DIFFUSERS[3], Meaning((DIFFUSERS[3],))),
    "fused, in a model that splits": (DIFFUSERS, False, "lora_unet_double_blocks_0_img_attn_qkv", Meaning(SPLIT)),
    "dotted and fused": (DIFFUSERS, False, f"diffusion_model.{FLUX_QKV}", Meaning(SPLIT)),
    "swapped halves": (
        DIFFUSERS,
        False,
        "lora_unet_final_layer_adaLN_modulation_1",
        Meaning(("norm_out.linear",), swapped=True),
    ),
    "split, in a model that fuses": (
        ORIGINAL,
        False,
        "lora_transformer_transformer_blocks_0_attn_to_k",
        Meaning((FLUX_QKV,), 1, SPLIT),
    ),
    "another name, in a model that fuses": (
        ORIGINAL,
        False,
        "transformer.transformer_blocks.0.attn.to_out.0",
        Meaning(("double_blocks.0.img_attn.proj",)),
    ),
    "any prefix of a preset": (DIFFUSERS, False, "mine_transformer_blocks_0_attn_to_q", Meaning((SPLIT[0],))),
    "a text encoder": (TEXT, True, "lora_te1_text_model_encoder_layers_0_mlp_fc1", Meaning((TEXT[1],))),
    "a text encoder by its own name": (
        TEXT,
        True,
        "text_encoders.gemma.transformer.text_model.encoder.layers.0.mlp.fc1",
        Meaning((TEXT[1],)),
    ),
    "a text encoder's dots": (TEXT, True, "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", Meaning((TEXT[1],))),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_names_in_adapters(case: str) -> None:
    modules, encoder, name, expected = MEANINGS[case]
    assert ImageNames(modules, encoder=encoder).meanings([name]) == {name: expected}


def test_the_layout_with_all_names_counts() -> None:
    """`proj_out` of diffusers' layout is another module than the flattened `proj_out` of a block."""
    names = ImageNames(DIFFUSERS, encoder=False)
    found = names.meanings(["lora_unet_single_blocks_0_linear2", "lora_unet_final_layer_linear"])
    assert [meaning.whole for meaning in found.values()] == ["single_transformer_blocks.0.proj_out", "proj_out"]
    assert ImageNames(TEXT, encoder=True).meanings(["lora_unet_x", "lora_te_encoder_layers_0_mlp_fc1"]).keys() == {
        "lora_te_encoder_layers_0_mlp_fc1"
    }
    assert names.meanings(["lora_te1_proj_out"]) == {}  # of another component


def test_lycoris_own_prefix_is_that_of_any_model() -> None:
    """LyCORIS' wrapper writes one prefix, whatever the model is."""
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    name = "lycoris_" + path.replace(".", "_")
    assert ImageNames([path], encoder=True).meanings([name])[name].whole == path
    denoiser = "down_blocks.0.attentions.0.proj_in"
    name = "lycoris_" + denoiser.replace(".", "_")
    assert ImageNames([denoiser]).meanings([name])[name].whole == denoiser


def test_a_flattened_path_of_two_modules_is_refused() -> None:
    names = ImageNames(["block.to_q", "block_to.q", "other"])
    assert names.meanings(["lycoris_other"])["lycoris_other"].whole == "other"
    with pytest.raises(oftsurgery.MatchError, match=r"that of 2 modules of the model: block\.to_q, block_to\.q"):
        names.meanings(["lycoris_block_to_q"])


RULES: list[Callable[[str], str]] = [
    lambda path: "lycoris_" + path.replace(".", "_"),
    lambda path: f"unet.{path}",
    lambda path: "lora_unet_" + path.replace(".", "_"),
]


@pytest.mark.parametrize("rule", RULES, ids=["flat", "dotted", "kohya's"])
@pytest.mark.parametrize("original", [False, True], ids=["own layout", "other layout"])
def test_adapters_with_such_names_fold_in_memory_and_on_disk(
    rule: Callable[[str], str], original: bool, tmp_path: Path
) -> None:
    """A toy model with the names of a U-Net: no class of diffusers is needed."""
    from dataclasses import replace

    from independent import make_case
    from safetensors.torch import load_file, save_file
    from torch import nn

    paths = {
        "down_blocks.0.attentions.1.proj_in": "input_blocks.2.1.proj_in",
        "time_embedding.linear_1": "time_embed.0",
    }
    paths |= {"up_blocks.1.upsamplers.0.conv": "output_blocks.5.1.conv"}
    model = nn.Module()
    for path in paths:
        at = model
        *above, last = path.split(".")
        for name in above:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(last, nn.Linear(64, 64, bias=False))
    model.requires_grad_(False)
    adapter = make_case("0.21 exact", 64, 64).adapter
    rotation = next(iter(adapter.modules.values()))
    plain = replace(adapter, modules=dict.fromkeys(paths, rotation), config={})
    named = replace(plain, modules={rule(b if original else a): rotation for a, b in paths.items()})
    expected = oftsurgery.fold(model, plain).state_dict()
    found = oftsurgery.fold(model, named).state_dict()
    assert all(torch.equal(t, found[n]) for n, t in expected.items())
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    oftsurgery.fold_checkpoint(tmp_path / "base", named, tmp_path / "out", trained_on="plain")
    disk = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t, disk[n]) for n, t in expected.items())
    assert oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", named).ok
