"""Files for ComfyUI, the web UI and LyCORIS from the adapters of other tools: what the tools compute from these files is what the
trainers' own live layers computed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_goldens import GOLDENS, IMAGE, Golden, model_of, relative
from safetensors.torch import load_file

import oftsurgery
from oftsurgery import AdapterError, StateError
from oftsurgery.adapters.output_blocks import OutputBlocks
from oftsurgery.cli.main import main

#: goldens of rotations of the outputs whose live layers leave the biases
CONVERTIBLE = [
    g
    for g in GOLDENS
    if not g.always
    and g.folder.startswith(("kohya", "lycoris"))
    and not g.folder.startswith(("lycoris-2.0", "kohya-sd-scripts-0.8.8"))
    and "bypass" not in g.folder
]


@pytest.mark.parametrize("golden", CONVERTIBLE, ids=lambda g: g.folder)
@pytest.mark.parametrize(("form", "mode"), [("comfyui", "comfyui"), ("comfyui", "webui"), ("lycoris", "angle")])
def test_the_tools_compute_what_the_trainer_computed(golden: Golden, form: str, mode: str, tmp_path: Path) -> None:
    adapter, effective, model = golden.adapter(), golden.effective(1), model_of(golden.base_tensors())
    odd = any(getattr(m, "scale", None) is not None and m.block_size % 2 for m in adapter.modules.values())
    if odd and form == "comfyui":
        with pytest.raises(AdapterError, match="needs blocks of an even size"):
            adapter.save_for("comfyui", tmp_path / "new.safetensors")
        return
    adapter.save_for(form, tmp_path / "new.safetensors")  # type: ignore[arg-type]
    new = oftsurgery.load_adapter(tmp_path / "new.safetensors")
    assert new.dialect == "lycoris"
    assert all(name.startswith("lora_unet_" if form == "comfyui" else "lycoris_") for name in new.modules)
    folded = oftsurgery.fold(model, new, strength_mode=mode).state_dict()
    for name, exact in (effective or {}).items():
        assert relative(folded[name], exact) <= 2e-6, name


@pytest.mark.parametrize("variant", ["trained-on-diffusers_diag-oft_dim4", "trained-on-diffusers_boft_dim8"])
@pytest.mark.parametrize("scaled", [False, True])
def test_comfyui_takes_swapped_halves_from_the_original_layout(variant: str, scaled: bool, tmp_path: Path) -> None:
    """The modulation gets its original name, and generators for the order of that layout; the other modules keep diffusers' names."""
    adapter = oftsurgery.load_adapter(IMAGE / "layouts-flux" / variant / "adapter.safetensors")
    draw = torch.Generator().manual_seed(0)
    if scaled:
        modules = {
            p: replace(m, scale=1 + 0.1 * torch.randn(m.rows, 1, generator=draw)) for p, m in adapter.modules.items()
        }  # type: ignore[attr-defined,call-arg]
        adapter = replace(adapter, modules=modules)
    adapter.save_for("comfyui", tmp_path / "new.safetensors")
    new = oftsurgery.load_adapter(tmp_path / "new.safetensors")
    assert "lora_unet_final_layer_adaLN_modulation_1" in new.modules
    assert all(p.startswith("lycoris_") for p in new.modules if "final_layer" not in p)
    base = load_file(IMAGE / "layouts-flux" / "base.safetensors")
    for which in ("original.", "diffusers."):
        model = model_of({n.removeprefix(which): t for n, t in base.items() if n.startswith(which)})
        one, other = (oftsurgery.fold(model, a, strength_mode=m) for a, m in ((new, "comfyui"), (adapter, "angle")))
        assert all(relative(t, other.state_dict()[name]) < 2e-6 for name, t in one.state_dict().items())
        assert "other-in-comfyui" not in {f.code for f in oftsurgery.doctor(new, base=model)}


def test_a_block_in_both_halves_is_refused(tmp_path: Path) -> None:
    modules = {
        "lycoris_single_transformer_blocks_0_proj_out": OutputBlocks(torch.zeros(3, 4, 4), 0.0, "lycoris"),
        "lycoris_norm_out_linear": OutputBlocks(torch.randn(3, 4, 4), 0.0, "lycoris"),
    }
    adapter = oftsurgery.OFTAdapter(modules, dialect="lycoris")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"a block lies in both halves.*norm_out_linear.*fold the adapter"):
        adapter.save_for("comfyui", tmp_path / "new.safetensors")
    adapter.save_for("lycoris", tmp_path / "new.safetensors")


def test_a_strength_is_kept_where_it_is_a_rotation(tmp_path: Path) -> None:
    golden = next(g for g in GOLDENS if g.folder == "lycoris-4.1.3/diag-oft_rescaled")
    half = golden.adapter().at_strength(0.5)
    half.save_for("comfyui", tmp_path / "half.safetensors")
    model = model_of(golden.base_tensors())
    one = oftsurgery.fold(model, oftsurgery.load_adapter(tmp_path / "half.safetensors"), strength_mode="comfyui")
    other = oftsurgery.fold(model, half)
    assert all(relative(t, other.state_dict()[name]) < 1e-6 for name, t in one.state_dict().items())
    with pytest.raises(AdapterError, match=r"no place for this map \(steps of the output side\)"):
        golden.adapter().at_strength(0.5, "linear").save_for("comfyui", tmp_path / "linear.safetensors")


@pytest.mark.parametrize("form", ["comfyui", "lycoris"])
def test_changes_of_norms_and_names_of_encoders_are_written(form: str, tmp_path: Path) -> None:
    blocks, draw = torch.randn(2, 4, 4), torch.Generator().manual_seed(1)
    modules = {
        p: OutputBlocks(blocks, 0.0, "lycoris") for p in ("lycoris_a", "text_encoder_2.text_model.encoder.layers.0.fc")
    }
    sums = {"lycoris_norm.weight": torch.randn(8, generator=draw), "lycoris_norm.bias": torch.randn(8, generator=draw)}
    adapter = oftsurgery.OFTAdapter(modules, sums=sums, dialect="lycoris")  # type: ignore[arg-type]
    for strength in (1.0, 0.5):
        adapter.at_strength(strength).save_for(form, tmp_path / "new.safetensors", force=True)  # type: ignore[arg-type]
        new = oftsurgery.load_adapter(tmp_path / "new.safetensors")
        norm = "lora_unet_norm" if form == "comfyui" else "lycoris_norm"
        for leaf in ("weight", "bias"):
            assert torch.allclose(new.sums[f"{norm}.{leaf}"], strength * sums[f"lycoris_norm.{leaf}"])
        assert new.modules.keys() == (
            {"lora_unet_a", "lora_te2_text_model_encoder_layers_0_fc"}
            if form == "comfyui"
            else {"lycoris_a", "lycoris_text_encoder_2_text_model_encoder_layers_0_fc"}
        )


SCALED = ["diag-oft_rescaled", "diag-oft_constraint", "boft_constraint"]


@pytest.mark.parametrize("variant", SCALED)
@pytest.mark.parametrize("form", ["comfyui", "lycoris"])
def test_the_commands_write_each_form(variant: str, form: str, tmp_path: Path) -> None:
    """``adapter scale``: BOFT and scales of rows too; what the form computes is the fold at that strength."""
    golden = next(g for g in GOLDENS if g.folder == f"lycoris-4.1.3/{variant}")
    file, out = IMAGE / golden.folder / "adapter.safetensors", tmp_path / "half.safetensors"
    assert main(["adapter", "scale", str(file), "0.5", str(out), "--to", form]) == 0
    mode = "comfyui" if form == "comfyui" else "angle"
    model = model_of(golden.base_tensors())
    one = oftsurgery.fold(model, oftsurgery.load_adapter(out), strength_mode=mode).state_dict()  # type: ignore[arg-type]
    other = oftsurgery.fold(model, golden.adapter(), strength=0.5).state_dict()
    assert all(relative(t, other[name]) < 1e-6 for name, t in one.items())
    assert main(["adapter", "scale", str(file), "0.5", str(tmp_path / "folder")]) == 2  # peft has no such form
    assert not (tmp_path / "folder").exists()


def test_what_has_no_place(tmp_path: Path) -> None:
    file = tmp_path / "new.safetensors"
    onetrainer = next(g for g in GOLDENS if g.folder == "onetrainer-2026-08/block8").adapter()
    with pytest.raises(
        AdapterError, match=r"no place for this map \(OFT of OneTrainer of the input side\).*fold the adapter"
    ):
        onetrainer.save_for("comfyui", file)
    turned = next(g for g in GOLDENS if "0.8.8" in g.folder).adapter()
    with pytest.raises(AdapterError, match=r"turned biases, which this form does not store.*bias='kept' on purpose"):
        turned.save_for("lycoris", file)
    adapter = oftsurgery.OFTAdapter({"oft_unet_a": OutputBlocks(torch.randn(2, 4, 4), 0.1, "kohya")}, dialect="kohya")
    with pytest.raises(StateError, match="the form 'forge' is not known"):
        adapter.save_for("forge", file)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="no safetensors file's"):
        adapter.save_for("comfyui", tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    adapter.save_for("comfyui", file)
    with pytest.raises(StateError, match="exists"):
        adapter.save_for("comfyui", file)
    with pytest.raises(AdapterError, match=r"the adapter's map \(diag-oft\) is none that peft 0\.21 can store"):
        adapter.save(tmp_path / "peft")
