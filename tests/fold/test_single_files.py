"""Checkpoints of image models in a single file: folded in place, all other tensors and the metadata kept, names kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnbf
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from image_models import adapted, build
from independent import make_case, relative, seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from warned import quietly

import oftsurgery
from oftsurgery.cli.main import main
from oftsurgery.stores.image_layouts import pairs_of

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
QUERY = f"{TEXT}text_model.encoder.layers.0.self_attn.q_proj.weight"
METADATA = {"modelspec.title": "a model", "strange": "é\"'\n"}


def original_names(names: list[str]) -> dict[str, str]:
    """``{name of a tensor of diffusers: its name in the file}``."""
    modules = {name.rpartition(".")[0] for name in names}
    paths = {pair.parts[0]: pair.original for pair in pairs_of(modules)}
    split = {name: name.rpartition(".") for name in names}
    return {name: f"{UNET}{paths[path]}.{leaf}" for name, (path, _, leaf) in split.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``sd.safetensors`` with a U-Net, a text encoder and more; ``adapter`` of the U-Net, trained on diffusers' names."""
    place = tmp_path_factory.mktemp("single")
    state = build("UNet2DConditionModel").state_dict()
    names = original_names(list(state))
    tensors = {names[name]: tensor.contiguous() for name, tensor in state.items()}
    tensors |= {QUERY: torch.randn(64, 64, generator=seeded("q")), "betas": torch.linspace(0, 1, 7).double()}
    tensors |= {"first_stage_model.decoder.conv_in.weight": torch.randn(4, 4, 3, 3).half()}
    save_file(tensors, place / "sd.safetensors", METADATA)
    adapted(build("UNet2DConditionModel")).save_pretrained(place / "adapter")
    return place


def test_a_single_file_is_folded_in_place(place: Path, tmp_path: Path) -> None:
    source, out, undo = place / "sd.safetensors", tmp_path / "out.safetensors", tmp_path / "fold.undo"
    record = quietly(oftsurgery.fold_checkpoint, source, place / "adapter", out, trained_on="plain", undo=undo)
    before, after = load_file(source), load_file(out)
    assert after.keys() == before.keys()
    expected = quietly(oftsurgery.fold, build("UNet2DConditionModel"), place / "adapter").state_dict()
    names = original_names(list(expected))
    assert all(torch.equal(after[names[n]], t) for n, t in expected.items())
    changed = {f"{path}.weight" for path in record.modules}
    assert {n for n in before if not torch.equal(before[n], after[n])} == changed
    with safe_open(out, "pt") as file:
        found = file.metadata()
    assert found.pop("oftsurgery")
    assert found == METADATA
    assert json.loads((tmp_path / "out.safetensors.oftsurgery.json").read_text())["files"].keys() == {out.name}
    assert {p.name for p in tmp_path.iterdir()} == {out.name, f"{out.name}.oftsurgery.json", undo.name}
    assert oftsurgery.verify_checkpoint(out).ok
    report = quietly(oftsurgery.verify_checkpoint, out, source, place / "adapter")
    assert report.ok, report.wrong
    assert report.looked_at == {"rotated": len(changed), "copied": len(before) - len(changed)}
    assert oftsurgery.doctor(out) == []
    assert [f.code for f in oftsurgery.doctor(out, base=source, adapter=place / "adapter")] == ["kept"]
    assert oftsurgery.report(out)
    for way, given in (("base", source), ("undo", undo)):
        quietly(oftsurgery.unfold_checkpoint, out, back := tmp_path / f"{way}.safetensors", **{way: given})
        assert back.read_bytes() == source.read_bytes()
        assert not Path(f"{back}.oftsurgery.json").exists()
    assert quietly(oftsurgery.extract_checkpoint, source, out).modules.keys() == record.modules.keys()


def rows(path: str) -> Any:
    adapter = make_case("0.21 exact", 64, 64).adapter
    return replace(adapter, modules={path: next(iter(adapter.modules.values()))}, config={})


NAMES = [
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te1_encoder_layers_0_self_attn_q_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    QUERY.removesuffix(".weight"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_encoder_in_the_file(name: str, place: Path, tmp_path: Path) -> None:
    source, out, adapter = place / "sd.safetensors", tmp_path / "out.safetensors", rows(name)
    record = quietly(oftsurgery.fold_checkpoint, source, adapter, out, trained_on="plain")
    assert list(record.modules) == [QUERY.removesuffix(".weight")]
    assert quietly(oftsurgery.verify_checkpoint, out, source, adapter).ok


def test_encoders_of_one_kind_are_told_apart_by_their_number(tmp_path: Path) -> None:
    end = "encoder.layers.0.mlp.fc1.weight"
    names = {n: f"text_encoders.{n}.transformer.text_model.{end}" for n in ("clip_g", "clip_l")}
    save_file({n: torch.randn(64, 64, generator=seeded(n)) for n in names.values()}, tmp_path / "sd3.safetensors")
    source = tmp_path / "sd3.safetensors"
    found = {}
    for number in (1, 2):
        adapter = rows(f"lora_te{number}_text_model_encoder_layers_0_mlp_fc1")
        out = tmp_path / f"{number}.safetensors"
        found[number] = list(quietly(oftsurgery.fold_checkpoint, source, adapter, out, trained_on="plain").modules)
        assert quietly(oftsurgery.verify_checkpoint, out, source, adapter).ok
    assert found == {1: [names["clip_l"].removesuffix(".weight")], 2: [names["clip_g"].removesuffix(".weight")]}
    with pytest.raises(oftsurgery.MatchError, match="several models in the file have this module"):
        oftsurgery.fold_checkpoint(
            source, rows("text_model.encoder.layers.0.mlp.fc1"), tmp_path / "x.safetensors", trained_on="plain"
        )


OPEN_CLIP = "conditioner.embedders.1.model."


def sdxl_like(layers: int = 2) -> tuple[dict[str, Tensor], Any]:
    """A file's tensors with a CLIP encoder in transformers' names, and another one in OpenCLIP's; and the second as a model."""
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        **sizes, num_hidden_layers=layers, max_position_embeddings=16, projection_dim=64
    )
    torch.manual_seed(7)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    width, tensors = 64, {"model.diffusion_model.input_blocks.0.0.weight": torch.randn(4, 4, 3, 3)}
    for i in range(layers):
        block = f"{OPEN_CLIP}transformer.resblocks.{i}"
        for leaf, ends in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            tensors[f"{block}.attn.in_proj_{leaf}"] = torch.randn(ends, generator=seeded(f"{i}{leaf}")) / 8
        for name, shape in (("attn.out_proj", (64, 64)), ("mlp.c_fc", (128, 64)), ("mlp.c_proj", (64, 128))):
            tensors[f"{block}.{name}.weight"] = torch.randn(shape, generator=seeded(f"{i}{name}")) / 8
            tensors[f"{block}.{name}.bias"] = torch.randn(shape[0], generator=seeded(f"{i}{name}b")) / 8
        for name in ("ln_1", "ln_2"):
            tensors |= {f"{block}.{name}.weight": torch.ones(64), f"{block}.{name}.bias": torch.zeros(64)}
    tensors |= {
        f"{OPEN_CLIP}token_embedding.weight": torch.randn(99, 64),
        f"{OPEN_CLIP}ln_final.weight": torch.ones(64),
    }
    tensors |= {f"{OPEN_CLIP}ln_final.bias": torch.zeros(64), f"{OPEN_CLIP}text_projection": torch.randn(64, 64)}
    tensors |= {f"{OPEN_CLIP}positional_embedding": torch.randn(16, 64), f"{OPEN_CLIP}logit_scale": torch.tensor(1.0)}
    first = "conditioner.embedders.0.transformer."
    tensors |= {first + n: t.contiguous() for n, t in text_state(layers).items()}
    return tensors, model


def text_state(layers: int) -> dict[str, Tensor]:
    """The first encoder, with as many layers and other widths."""
    found: dict[str, Tensor] = {}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"text_model.encoder.layers.{i}.self_attn.{name}.weight"] = torch.randn(32, 32) / 6
            found[f"text_model.encoder.layers.{i}.self_attn.{name}.bias"] = torch.randn(32) / 6
    return found


def loaded_by_diffusers(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The tensors of the second encoder as diffusers' own loading of single files converts them."""
    given = {n: t for n, t in tensors.items() if n.startswith(OPEN_CLIP)}
    found: dict[str, Tensor] = single_file_utils.convert_open_clip_checkpoint(model, given, prefix=OPEN_CLIP)
    return found


def style_for(numbers: tuple[int, ...], width: int, prefix: str = "text_model_", **more: Tensor) -> dict[str, Tensor]:
    """LyCORIS' keys for projections of encoders, as sd-scripts names the encoders."""
    tensors = dict(more)
    for number in numbers:
        for end, rows in (("self_attn_q_proj", width), ("self_attn_v_proj", width), ("self_attn_out_proj", width)):
            key = f"lora_te{number}_{prefix}encoder_layers_1_{end}"
            tensors[f"{key}.oft_blocks"] = torch.randn(rows // 8, 8, 8, generator=seeded(key)) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(0.0)
    return tensors


@pytest.mark.parametrize("prefix", ["text_model_", ""])
def test_an_open_clip_encoder_in_the_file(prefix: str, tmp_path: Path) -> None:
    """The names of transformers mean rows of OpenCLIP's fused projections: as the same adapter on the encoder that diffusers loads."""
    tensors, model = sdxl_like()
    source, out, undo = tmp_path / "sdxl.safetensors", tmp_path / "out.safetensors", tmp_path / "fold.undo"
    save_file(tensors, source, METADATA)
    style = tmp_path / "style.safetensors"
    save_file(style_for((2,), 64, prefix), style, {"ss_network_module": "lycoris.kohya"})
    record = quietly(oftsurgery.fold_checkpoint, source, style, out, trained_on="plain", undo=undo)
    block = f"{OPEN_CLIP}transformer.resblocks.1"
    assert record.modules.keys() == {f"{block}.attn.in_proj", f"{block}.attn.out_proj"}
    after = load_file(out)
    assert list(after) == list(load_file(source))
    changed = {f"{block}.attn.in_proj_weight", f"{block}.attn.out_proj.weight"}
    assert {n for n in after if not torch.equal(after[n], tensors[n])} == changed
    quietly(model.load_state_dict, loaded_by_diffusers(tensors, model), strict=False)
    expected = quietly(oftsurgery.fold, model, style).state_dict()
    got = loaded_by_diffusers(after, model)
    assert all(
        torch.equal(t, expected[n.replace("text_model.", "", 1) if n not in expected else n]) for n, t in got.items()
    )
    report = quietly(oftsurgery.verify_checkpoint, out, source, style)
    assert report.ok, report.wrong
    assert report.looked_at == {"rotated": 2, "copied": len(tensors) - 2}
    assert oftsurgery.doctor(out) == []
    for way, given in (("base", source), ("undo", undo)):
        quietly(oftsurgery.unfold_checkpoint, out, back := tmp_path / f"{way}.safetensors", **{way: given})
        assert back.read_bytes() == source.read_bytes()
    # a changed key is seen
    after[f"{block}.attn.in_proj_weight"][70] *= 1.01  # rows of k, which the adapter leaves
    save_file(after, out, METADATA)
    assert not quietly(oftsurgery.verify_checkpoint, out, source, style).ok


def test_two_encoders_in_two_layouts(tmp_path: Path) -> None:
    """The number in the names tells which encoder is meant, and the turned biases follow the rows."""
    tensors, _ = sdxl_like()
    source, out = tmp_path / "sdxl.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    style = tmp_path / "style.safetensors"
    both = style_for((1,), 32) | style_for((2,), 64)
    save_file(both, style, {"ss_network_module": "lycoris.kohya"})
    adapter = oftsurgery.load_adapter(style, bias="rotated")
    record = quietly(oftsurgery.fold_checkpoint, source, adapter, out, trained_on="plain")
    assert len(record.modules) == 5
    assert quietly(oftsurgery.verify_checkpoint, out, source, adapter).ok
    after, block = load_file(out), f"{OPEN_CLIP}transformer.resblocks.1.attn"
    bias, before = after[f"{block}.in_proj_bias"], tensors[f"{block}.in_proj_bias"]
    assert torch.equal(bias[64:128], before[64:128])
    b = both["lora_te2_text_model_encoder_layers_1_self_attn_q_proj.oft_blocks"].double()
    q, eye = b - b.mT, torch.eye(8, dtype=torch.float64)
    turned = torch.linalg.solve(eye + q, eye - q, left=False) @ before[:64].double().reshape(8, 8, 1)
    assert relative(bias[:64], turned.reshape(64)) < 1e-6


@pytest.mark.parametrize("kind", ["diag-oft", "boft", "onetrainer"])
def test_the_projection_of_the_text_is_held_transposed(kind: str, tmp_path: Path) -> None:
    """As the same adapter on the encoder that diffusers loads from the file, whose ``text_projection`` is a module."""
    tensors, model = sdxl_like()
    source, out, undo = tmp_path / "sdxl.safetensors", tmp_path / "out.safetensors", tmp_path / "fold.undo"
    save_file(tensors, source, METADATA)
    style, name = tmp_path / "style.safetensors", f"{OPEN_CLIP}text_projection"
    draw = torch.Generator().manual_seed(4)
    if kind == "onetrainer":
        given = {"lora_te2_text_projection.oft_R.weight": torch.randn(8, 28, generator=draw) * 0.1}
        save_file(
            given | {"lora_te2_text_model_encoder_layers_1_self_attn_out_proj.oft_R.weight": torch.zeros(8, 28)}, style
        )
    else:
        shape = (4, 8, 8, 8) if kind == "boft" else (8, 8, 8)
        given = {"lora_te2_text_projection.oft_blocks": torch.randn(shape, generator=draw) * 0.1}
        given |= {"lora_te2_text_projection.alpha": torch.tensor(0.0)}
        save_file(style_for((2,), 64, **given), style, {"ss_network_module": "lycoris.kohya"})
    record = quietly(oftsurgery.fold_checkpoint, source, style, out, trained_on="plain", undo=undo)
    assert name in record.modules
    after = load_file(out)
    assert list(after) == list(load_file(source))
    assert not torch.equal(after[name], tensors[name])
    quietly(model.load_state_dict, loaded_by_diffusers(tensors, model), strict=False)
    expected = quietly(oftsurgery.fold, model, style).state_dict()
    got = loaded_by_diffusers(after, model)["text_projection.weight"]
    assert relative(got, expected["text_projection.weight"]) < 1e-7  # the order of sums follows the order in the file
    report = quietly(oftsurgery.verify_checkpoint, out, source, style)
    assert report.ok, report.wrong
    assert oftsurgery.doctor(out) == []
    assert "other-in-comfyui" in {f.code for f in oftsurgery.doctor(style, base=source)} or kind != "onetrainer"
    for way, given_back in (("base", source), ("undo", undo)):
        quietly(oftsurgery.unfold_checkpoint, out, back := tmp_path / f"{way}.safetensors", **{way: given_back})
        assert back.read_bytes() == source.read_bytes()
    quietly(oftsurgery.unfold_checkpoint, out, back := tmp_path / "adapter.safetensors", adapter=style)
    assert relative(load_file(back)[name], tensors[name]) < 1e-6
    if kind == "onetrainer":
        found = quietly(oftsurgery.extract_checkpoint, source, out, 8)
        assert found.report[name].explained > 0.99  # the series is no exact rotation
    # a changed value, and a transposed tensor, are seen
    for wrong in (after[name].mT.contiguous(), after[name] * 1.01):
        save_file(after | {name: wrong}, out, METADATA)
        assert not quietly(oftsurgery.verify_checkpoint, out, source, style).ok


def nf4_of(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that bitsandbytes writes for a weight in NF4, as Forge's files have them."""
    codes, state = bnbf.quantize_4bit(weight, quant_type="nf4")
    return {name: codes} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}


def test_a_file_in_nf4_stays_in_nf4(tmp_path: Path) -> None:
    """Forge's files hold bitsandbytes' tensors under the same beginnings."""
    name = "model.diffusion_model.double_blocks.0.img_attn.proj.weight"
    plain = torch.randn(64, 64, generator=seeded("w")).half()
    other = nf4_of("model.diffusion_model.double_blocks.0.img_mlp.2.weight", torch.randn(64, 64).half())
    save_file(nf4_of(name, plain) | other, tmp_path / "forge.safetensors")
    source, out = tmp_path / "forge.safetensors", tmp_path / "out.safetensors"
    adapter = rows("lora_unet_double_blocks_0_img_attn_proj")
    record = quietly(oftsurgery.fold_checkpoint, source, adapter, out)
    assert next(iter(record.modules.values())).format == "nf4"
    before, after = load_file(source), load_file(out)
    assert after.keys() == before.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} <= {name, f"{name}.absmax"}
    assert quietly(oftsurgery.verify_checkpoint, out, source, adapter).ok
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "back.safetensors", base=source)
    assert load_file(tmp_path / "back.safetensors").keys() == before.keys()
    quietly(oftsurgery.fold_checkpoint, source, adapter, dense := tmp_path / "dense.safetensors", format="bf16")
    assert {t.dtype for t in load_file(dense).values()} == {torch.bfloat16}


def test_the_commands_take_a_single_file(place: Path, tmp_path: Path) -> None:
    source, adapter, out = place / "sd.safetensors", place / "adapter", tmp_path / "out.safetensors"
    for command in (
        ["plan", source, adapter, "--trained-on", "plain"],
        ["fold", source, adapter, out, "--trained-on", "plain"],
        ["verify", out, source, adapter],
        ["show", out],
        ["doctor", out],
        ["unfold", out, tmp_path / "back.safetensors", "--base", source],
    ):
        assert quietly(main, list(map(str, command))) == 0, command
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another ending": ("out", {}, r"the destination is a file too.*OUTPUT\.safetensors"),
    "the source": ("sd.safetensors", {}, r"the destination is, or holds, the source itself"),
    "a quantised format": ("out.safetensors", {"format": "nf4"}, r"a single file has no class.*from_single_file"),
    "quantised first": ("out.safetensors", {"trained_on": "nf4"}, r"a single file has no class"),
    "a component": ("out.safetensors", {"component": "unet"}, r"holds one model and no pipeline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_single_file_cannot_take_is_refused(case: str, place: Path, tmp_path: Path) -> None:
    name, given, message = REFUSED[case]
    source = tmp_path / "sd.safetensors"
    source.write_bytes((place / "sd.safetensors").read_bytes())
    said = {} if "format" in given else {"trained_on": "plain"}
    with pytest.raises(oftsurgery.OFTSurgeryError, match=message):
        quietly(oftsurgery.fold_checkpoint, source, place / "adapter", tmp_path / name, **said | given)
    assert list(tmp_path.iterdir()) == [source]
    assert source.read_bytes() == (place / "sd.safetensors").read_bytes()


def test_nothing_is_replaced_without_force(place: Path, tmp_path: Path) -> None:
    source, adapter, out = place / "sd.safetensors", place / "adapter", tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(oftsurgery.StateError, match="the destination exists"):
        oftsurgery.fold_checkpoint(source, adapter, out, trained_on="plain")
    assert out.read_bytes() == b"mine"
    quietly(oftsurgery.fold_checkpoint, source, adapter, out, trained_on="plain", force=True)
    assert oftsurgery.verify_checkpoint(out).ok


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.diffusion_model.x.weight", torch.ones(64, 64).to(torch.float8_e4m3fn)),
        ("model.diffusion_model.x.weight", torch.ones(64, 64).to(torch.float8_e5m2)),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_is_refused_by_name(name: str, tensor: Tensor, scaled: bool, tmp_path: Path) -> None:
    scale = {"model.diffusion_model.x.scale_weight": torch.ones(())} if scaled else {}
    save_file({name: tensor} | scale, tmp_path / "fp8.safetensors")
    with pytest.raises(oftsurgery.FormatError, match=r"stored in fp8.*same model in bf16"):
        oftsurgery.fold_checkpoint(
            tmp_path / "fp8.safetensors", rows("lora_unet_x"), tmp_path / "out.safetensors", trained_on="plain"
        )


@pytest.mark.parametrize("name", ["model.gguf", "model.ckpt"])
def test_other_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(oftsurgery.CheckpointError, match="oftsurgery reads safetensors only"):
        oftsurgery.fold_checkpoint(tmp_path / name, rows("x"), tmp_path / "out.safetensors", trained_on="plain")
