"""doctor() on image tools' adapters: its numbers are those of what the loaders themselves computed, and of what they leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_goldens import GOLDENS, IMAGE, Golden, model_of
from image_models import build
from safetensors.torch import load_file, save_file
from torch import Tensor

import oftsurgery
from oftsurgery.adapters.image_keys import has_image_keys
from oftsurgery.cli.main import main

LOADED = [g for g in GOLDENS if g.always]
NAMES = {"comfyui-2025": "comfyui", "webui": "webui", "comfyui-oftv2": "oftv2-node"}


def code_of(golden: Golden) -> str:
    return next(code for start, code in NAMES.items() if golden.folder.startswith(start))


def as_comfyui_takes_it(golden: Golden, folder: Path) -> oftsurgery.OFTAdapter:
    """The golden's adapter, for ComfyUI under the names that it loads: the golden's key map was forced."""
    if "kohya" not in golden.trainer or code_of(golden) != "comfyui":
        return golden.adapter()
    tensors = load_file(IMAGE / golden.trainer / "adapter.safetensors")
    save_file({k.replace("oft_unet_", "lora_unet_"): t for k, t in tensors.items()}, folder / "adapter.safetensors")
    return oftsurgery.load_adapter(folder / "adapter.safetensors", dialect="kohya")


def distances(loaded: dict[str, Tensor], right: dict[str, Tensor], base: dict[str, Tensor]) -> tuple[float, float]:
    """``(of the change, of the weights)``."""
    off = change = whole = 0.0
    for name in (name for name in right if name.endswith(".weight")):
        off += float((loaded[name].double() - right[name].double()).square().sum())
        change += float((right[name].double() - base[name].double()).square().sum())
        whole += float(right[name].double().square().sum())
    return (off / change) ** 0.5, (off / whole) ** 0.5


@pytest.mark.parametrize("golden", LOADED, ids=lambda g: g.folder)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_numbers_are_those_of_the_loader(golden: Golden, strength: float, tmp_path: Path) -> None:
    right = Golden(golden.trainer, golden.base).effective(strength)
    loaded, base = golden.effective(strength), golden.base_tensors()
    if right is None or loaded is None:
        pytest.skip("the tool knows no strength")
    of_change, of_weights = distances(loaded, right, base)
    code = ("other-in-" if strength == 1 else "strength-in-") + code_of(golden)
    found = oftsurgery.doctor(as_comfyui_takes_it(golden, tmp_path), base=model_of(base))
    (finding,) = [f for f in found if f.code == code] or [None]
    if of_weights < 1e-5 or (strength != 1 and of_change > 1e3):  # a trainer that changes nothing has no strength
        assert finding is None or of_weights > 1e-5
        return
    assert finding is not None
    assert finding.severity == ("warning" if strength == 1 else "note")
    assert finding.evidence["of_the_weights"] == pytest.approx(of_weights, rel=1e-4)
    if of_change < 1e3:
        assert finding.evidence["of_the_change"] == pytest.approx(of_change, rel=1e-4)
        assert f"{of_change:.1%} off" in finding.message
    else:
        assert "of_the_change" not in finding.evidence
        assert "where the trainer's layers compute the base" in finding.message


def test_without_a_base_the_maps_are_compared() -> None:
    """Weights without a preferred direction, which the goldens' bases are, are off by nearly the same."""
    for golden in (g for g in LOADED if "rescaled" in g.folder or "constraint" in g.folder):
        adapter = golden.adapter()
        both = [oftsurgery.doctor(adapter, base=b) for b in (None, model_of(golden.base_tensors()))]
        assert [f.code for f in both[0]] == [f.code for f in both[1]]
        for alone, with_base in zip(*both, strict=True):
            assert alone.evidence["of_the_change"] == pytest.approx(with_base.evidence["of_the_change"], rel=0.05)


def test_each_mistake_alone(tmp_path: Path) -> None:
    """A limit and a scale in one adapter: the share of each, and of both together."""
    torch.manual_seed(0)
    blocks, scale = torch.randn(4, 8, 8), 1 + 0.2 * torch.randn(32, 1)
    tensors = {"lora_unet_a.oft_blocks": blocks, "lora_unet_a.alpha": torch.tensor(0.1), "lora_unet_a.rescale": scale}
    save_file(tensors, tmp_path / "both.safetensors")
    (finding, *_) = oftsurgery.doctor(tmp_path / "both.safetensors")
    q = blocks.double() - blocks.double().mT
    eye, norm = torch.eye(8, dtype=torch.float64), q.norm()

    def turned(limit: float) -> Tensor:
        own = q * (limit / norm)
        return torch.linalg.solve(eye + own, eye - own, left=False)

    g, one = scale.double().reshape(4, 8, 1), eye.expand(4, 8, 8)
    right = g * turned(3.2)
    expected = {
        "of_the_change": turned(0.1) - right,
        "off_by_limit": g * turned(0.1) - right,
        "off_by_rescale": turned(3.2) - right,
    }
    for name, off in expected.items():
        assert finding.evidence[name] == pytest.approx(float(off.norm() / (right - one).norm()), rel=1e-6), name


@pytest.mark.parametrize(
    ("file", "dropped"),
    [
        ("kohya-sd-scripts-0.9.0/dim8_alpha0.02", {"comfyui": "oft_unet_"}),
        ("kohya-sd-scripts-flux-0.9.0/", {"comfyui": "oft_blocks.<i>", "webui": "oft_blocks.<i>"}),
        ("lycoris-2.0.2/diag-oft_rescaled", {"comfyui": "oft_diag"}),
        ("onetrainer-2026-08/block8_scaled", {"comfyui": "oft_R", "webui": "oft_R"}),
    ],
)
def test_what_a_loader_drops(file: str, dropped: dict[str, str]) -> None:
    path = next((IMAGE / file.split("/")[0]).glob(f"{file.split('/')[1]}*/adapter.safetensors"))
    found = {f.code: f for f in oftsurgery.doctor(path) if f.severity == "warning"}
    assert found.keys() == {f"other-in-{loader}" for loader in dropped}
    for loader, key in dropped.items():
        finding = found[f"other-in-{loader}"]
        assert key in finding.message
        assert "loads none" in finding.message
        assert finding.evidence["not_loaded"] == finding.evidence["modules"]


def test_boft_without_alpha_is_not_applied_by_comfyui(tmp_path: Path) -> None:
    tensors = load_file(IMAGE / "lycoris-4.1.3/boft_constraint/adapter.safetensors")
    file = tmp_path / "old.safetensors"
    save_file({k: t for k, t in tensors.items() if not k.endswith(".alpha")}, file)
    (refused,) = oftsurgery.doctor(file)
    assert (refused.code, refused.severity) == ("dialect", "error")
    for constraint in (0, 0.01):
        found = {f.code: f for f in oftsurgery.doctor(oftsurgery.load_adapter(file, constraint=constraint))}
        assert "BOFT without alpha" in found["other-in-comfyui"].message
    assert "does not hold the limit" in found["other-in-webui"].message
    assert found["other-in-webui"].evidence["off_by_limit"] == found["other-in-webui"].evidence["of_the_change"]


def test_a_part_that_is_dropped_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{p}_a{i}.oft_blocks": torch.randn(2, 4, 4) for i, p in enumerate(("lora_unet", "oft_unet"))}
    tensors |= {f"{name.removesuffix('.oft_blocks')}.alpha": torch.tensor(1e3) for name in tensors}
    save_file(tensors, tmp_path / "mixed.safetensors")
    adapter = oftsurgery.load_adapter(tmp_path / "mixed.safetensors", dialect="kohya")
    finding = next(f for f in oftsurgery.doctor(adapter) if f.code == "other-in-comfyui")
    assert finding.evidence["not_loaded"] == 1
    assert finding.evidence["of_the_change"] == pytest.approx(0.7, abs=0.1)


def test_the_base_is_looked_at(tmp_path: Path) -> None:
    golden = next(g for g in LOADED if "diag-oft_rescaled" in g.folder and code_of(g) == "comfyui")
    save_file({"other.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    found = oftsurgery.doctor(IMAGE / golden.trainer / "adapter.safetensors", base=tmp_path / "other.safetensors")
    assert [f.code for f in found] == ["no-match"]
    save_file(golden.base_tensors(), tmp_path / "base.safetensors")
    found = oftsurgery.doctor(IMAGE / golden.trainer / "adapter.safetensors", base=tmp_path / "base.safetensors")
    right, loaded = Golden(golden.trainer, golden.base).effective(1), golden.effective(1)
    assert right is not None
    assert loaded is not None
    exact = distances(loaded, right, golden.base_tensors())[0]
    assert found[0].evidence["of_the_change"] == pytest.approx(exact, rel=1e-4)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(IMAGE / "lycoris-4.1.3/diag-oft_constraint/adapter.safetensors")
    assert main(["doctor", file, "--json"]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)
    assert (first["code"], first["evidence"]["off_by_limit"] > 0.9) == ("other-in-comfyui", True)
    assert main(["doctor", file]) == 0
    shown = capsys.readouterr().out
    assert "ComfyUI to 2025-10 computes something 97" in shown
    assert f"adapter convert {file} OUTPUT.safetensors --to comfyui" in shown
    # the file that the remedy writes is computed rightly at strength 1
    assert main(["adapter", "convert", file, str(tmp_path / "new.safetensors"), "--to", "comfyui", "--quiet"]) == 0
    assert {f.severity for f in oftsurgery.doctor(tmp_path / "new.safetensors")} == {"note"}
    # flags say how to read the examined adapter
    first_days = str(IMAGE / "onetrainer-2025-11-14/block8/adapter.safetensors")
    assert main(["doctor", first_days, "--dialect", "onetrainer-2025-11-14"]) == 0
    assert "first two days" in capsys.readouterr().out


def test_damaged_values_are_found(tmp_path: Path) -> None:
    tensors = load_file(IMAGE / "lycoris-4.1.3/diag-oft_rescaled/adapter.safetensors")
    name = next(name for name in tensors if name.endswith(".oft_blocks"))
    tensors[name][0, 0, 1] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    (finding,) = oftsurgery.doctor(tmp_path / "nan.safetensors")
    assert (finding.code, finding.subject) == ("non-finite", name)


def test_which_files_are_adapters() -> None:
    assert has_image_keys(["a.oft_R.weight"])
    assert not has_image_keys(["a.alpha", "a.w_norm", "a.weight"])


FLUX = IMAGE / "layouts-flux"


def flux(which: str) -> dict[str, Tensor]:
    tensors = load_file(FLUX / "base.safetensors")
    return {name.removeprefix(f"{which}."): t for name, t in tensors.items() if name.startswith(f"{which}.")}


def halves(w: Tensor) -> Tensor:
    return torch.cat(w.chunk(2)[::-1])


def in_comfyui(w: Tensor, stored: Tensor, strength: float) -> Tensor:
    """ComfyUI's own steps on the original layout's weight, for a module with swapped halves: the change of the rows as they are there,
    with its halves swapped.
    """
    q = stored.double() - stored.double().transpose(-1, -2)
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    if q.ndim == 3:
        r = (eye + q) @ torch.linalg.inv(eye - q)
        turned = torch.einsum("knm,kn...->km...", (r - eye) * strength, w.unflatten(0, (len(q), -1))).flatten(0, 1)
        return w + halves(strength * turned)
    new, b = w, q.shape[-1]
    for i, q_i in enumerate(q):
        r = (eye + q_i) @ torch.linalg.inv(eye - q_i) * strength + (1 - strength) * eye
        g = 2**i * b // 2
        rows = new.unflatten(0, (-1, 2, g)).transpose(1, 2).flatten(0, 2)
        rows = torch.einsum("bij,bj...->bi...", r, rows.unflatten(0, (-1, b))).flatten(0, 1)
        new = rows.unflatten(0, (-1, g, 2)).transpose(1, 2).flatten(0, 2)
    return w + halves(strength * (new - w))


@pytest.mark.parametrize("which", ["original", "diffusers"])
@pytest.mark.parametrize("variant", ["trained-on-diffusers_diag-oft_dim4", "trained-on-diffusers_boft_dim8"])
def test_groups_and_swapped_halves(variant: str, which: str) -> None:
    """ComfyUI loads the parts of a fused weight rightly, and the modulation with swapped halves wrongly."""
    file, base = FLUX / variant / "adapter.safetensors", flux("original")
    effective = load_file(FLUX / variant / "effective.safetensors")
    right = {n.removeprefix("original."): t for n, t in effective.items() if n.startswith("original.")}
    name = "final_layer.adaLN_modulation.1.weight"
    stored = load_file(file)["lycoris_norm_out_linear.oft_blocks"]
    found = {f.code: f for f in oftsurgery.doctor(file, base=model_of(flux(which)))}
    of_change, of_weights = distances(
        right | {name: in_comfyui(base[name].double(), stored, 1.0)}, right, {n: base[n] for n in right}
    )
    finding = found["other-in-comfyui"]
    assert finding.evidence["of_the_change"] == pytest.approx(of_change, rel=1e-4)
    assert finding.evidence["of_the_weights"] == pytest.approx(of_weights, rel=1e-4)
    assert finding.evidence["off_by_swapped_halves"] == finding.evidence["of_the_change"]
    assert finding.evidence["worst_module"] == "lycoris_norm_out_linear"
    assert "halves (shift and scale)" in finding.message
    alone = {f.code: f for f in oftsurgery.doctor(file)}["other-in-comfyui"]
    assert alone.evidence["of_the_change"] == pytest.approx(of_change, rel=0.06)
    # an adapter on the original names, and other loaders, have no such halves
    original = FLUX / "trained-on-original_diag-oft_dim4" / "adapter.safetensors"
    for path, code in ((original, "other-in-comfyui"), (file, "other-in-webui")):
        assert code not in {f.code for f in oftsurgery.doctor(path, base=model_of(flux(which)))}


def test_swapped_halves_beside_other_mistakes(tmp_path: Path) -> None:
    """A limit, a scale and swapped halves in one module: the share of each, and at half strength."""
    torch.manual_seed(1)
    name, base = "final_layer.adaLN_modulation.1.weight", flux("original")
    rows, hidden = base[name].shape
    blocks, scale = torch.randn(rows // 8, 8, 8), 1 + 0.2 * torch.randn(rows, 1)
    norm = (blocks.double() - blocks.double().mT).norm()
    own = {"oft_blocks": blocks, "alpha": torch.tensor(float(norm) / rows / 2), "rescale": scale}
    file = tmp_path / "three.safetensors"
    other = {"lycoris_single_transformer_blocks_0_attn_to_q.oft_blocks": torch.zeros(hidden // 8, 8, 8)}
    other |= {"lycoris_single_transformer_blocks_0_attn_to_q.alpha": torch.tensor(0.0)}
    save_file({f"lycoris_norm_out_linear.{end}": t for end, t in own.items()} | other, file)
    found = {f.code: f for f in oftsurgery.doctor(file, base=model_of(base))}
    w, g = base[name].double(), halves(scale.double())
    eye = torch.eye(8, dtype=torch.float64)

    def turned(limit: float) -> Tensor:
        q = (blocks.double() - blocks.double().mT) * limit / norm
        r = torch.linalg.solve(eye + q, eye - q, left=False)
        return halves(torch.einsum("kij,kj...->ki...", r, halves(w).unflatten(0, (-1, 8))).flatten(0, 1))

    alpha = float(own["alpha"])
    right = g * turned(alpha * rows)
    wrong_halves = w + halves(scale.double() * halves(turned_there(w, blocks, alpha * rows)) - w)
    expected = {
        "of_the_change": in_comfyui(w, blocks * (alpha / norm), 1.0) - right,
        "off_by_limit": g * turned(alpha) - right,
        "off_by_rescale": turned(alpha * rows) - right,
        "off_by_swapped_halves": wrong_halves - right,
    }
    for number, off in expected.items():
        got = found["other-in-comfyui"].evidence[number]
        assert got == pytest.approx(float(off.norm() / (right - w).norm()), rel=1e-4), number


def turned_there(w: Tensor, blocks: Tensor, limit: float) -> Tensor:
    """The rows as they are, rotated, with swapped halves."""
    q = blocks.double() - blocks.double().mT
    q, eye = q * limit / q.norm(), torch.eye(8, dtype=torch.float64)
    r = torch.linalg.solve(eye + q, eye - q, left=False)
    return halves(torch.einsum("kij,kj...->ki...", r, w.unflatten(0, (-1, 8))).flatten(0, 1))


@pytest.mark.parametrize(
    ("prefix", "names", "dropped"),
    [
        ("lora_unet_", ["single_transformer_blocks_0_attn_to_q", "transformer_blocks_0_attn_to_q", "norm_out_linear"], True),
        ("lora_unet_", ["transformer_blocks_0_norm1_context_linear", "transformer_blocks_0_attn_to_q"], True),
        ("lycoris_", ["double_blocks_0_img_attn_qkv", "final_layer_linear"], True),
        ("lycoris_", ["input_blocks_4_1_proj_in", "middle_block_1_proj_in"], True),
        ("lycoris_", ["single_transformer_blocks_0_attn_to_q", "proj_out"], False),
        ("lora_unet_", ["double_blocks_0_img_attn_qkv", "final_layer_linear"], False),
        ("lora_unet_", ["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"], False),
        ("lora_unet_", ["transformer_blocks_0_attn_add_q_proj", "transformer_blocks_0_img_mod_1"], False),  # Qwen-Image
    ],
)  # fmt: skip
def test_names_that_comfyui_does_not_load(prefix: str, names: list[str], dropped: bool, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{prefix}{name}.oft_blocks": torch.randn(4, 4, 4, generator=draw) for name in names}
    tensors |= {f"{prefix}{name}.alpha": torch.tensor(0.0) for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    found = {f.code: f for f in oftsurgery.doctor(tmp_path / "a.safetensors")}
    assert ("other-in-comfyui" in found) is dropped
    if dropped:
        assert found["other-in-comfyui"].evidence["not_loaded"] == len(names)
        oftsurgery.load_adapter(tmp_path / "a.safetensors").save_for("comfyui", tmp_path / "b.safetensors")
        assert "other-in-comfyui" not in {f.code for f in oftsurgery.doctor(tmp_path / "b.safetensors")}


def test_numbers_from_some_columns_are_called_an_estimate(tmp_path: Path) -> None:
    for n, estimated in ((16, False), (64, True)):
        blocks = 0.3 * torch.randn(2, n, 4, 4, generator=torch.Generator().manual_seed(0))
        tensors = {"lycoris_a.oft_blocks": blocks, "lycoris_a.alpha": torch.tensor(0.001)}
        save_file(tensors, tmp_path / "a.safetensors")
        (first, *_) = oftsurgery.doctor(tmp_path / "a.safetensors")
        assert ("an estimate from 128 columns" in str(first.evidence["measured_on"])) is estimated


@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        ("FluxTransformer2DModel", {"norm_out.linear": "final_layer_adaLN_modulation_1"}),
        (
            "SD3Transformer2DModel",
            {
                "norm_out.linear": "final_layer_adaLN_modulation_1",
                "transformer_blocks.1.norm1_context.linear": "joint_blocks_1_context_block_adaLN_modulation_1",
            },
        ),
        ("QwenImageTransformer2DModel", {}),
        ("UNet2DConditionModel", {}),
    ],
)
def test_the_swapped_modules_of_diffusers_classes(name: str, swapped: dict[str, str], tmp_path: Path) -> None:
    """With the base and by the adapter's names alone; and the file for ComfyUI has no finding left."""
    model, draw = build(name), torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight.shape[0] % 16 == 0:
            key = f"lycoris_{path.replace('.', '_')}"
            tensors[f"{key}.oft_blocks"] = torch.randn(module.weight.shape[0] // 8, 8, 8, generator=draw) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(0.0)
    file, new = tmp_path / "style.safetensors", tmp_path / "comfyui.safetensors"
    save_file(tensors, file)
    adapter = oftsurgery.load_adapter(file)
    for base in (model, None):
        found = {f.code: f for f in oftsurgery.doctor(adapter, base=base)}
        assert ("other-in-comfyui" in found) is bool(swapped)
        if swapped:
            assert f"in {len(swapped)} modules: the modulation's halves" in found["other-in-comfyui"].message
    adapter.save_for("comfyui", new)
    written = oftsurgery.load_adapter(new)
    assert (
        set(adapter.modules) - set(written.modules) == {f"lycoris_{p.replace('.', '_')}" for p in swapped}
        or not swapped
    )
    assert {f"lora_unet_{p}" for p in swapped.values()} <= written.modules.keys()
    assert "other-in-comfyui" not in {f.code for f in oftsurgery.doctor(written, base=model)}
    one, other = (oftsurgery.fold(model, a).state_dict() for a in (adapter, written))
    assert all(torch.allclose(t, other[n], atol=1e-6) for n, t in one.items())
