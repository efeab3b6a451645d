"""Models of diffusers on disk: its own classes load what a fold writes, and compute what the fold in memory and peft's live model
compute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from image_models import CONFIGS, adapted, build, load, outputs, settings, without_gpu
from independent import relative
from safetensors.torch import load_file
from warned import quietly

import oftsurgery
from oftsurgery.stores.idle import is_idle
from oftsurgery.stores.modules import modules_of

FILE = "diffusion_pytorch_model.safetensors"
STORAGES = ("fp32", "nf4", "nf4-double", "int8")
#: each storage and each class, and all pairs in the slow run
FAST = {
    ("FluxTransformer2DModel", "nf4-double"),
    ("UNet2DConditionModel", "fp32"),
    ("UNet2DConditionModel", "int8"),
    ("SD3Transformer2DModel", "nf4"),
    ("QwenImageTransformer2DModel", "fp32"),
}
CASES = [
    pytest.param(name, storage, marks=() if (name, storage) in FAST else pytest.mark.slow)
    for name in CONFIGS
    for storage in STORAGES
]
QUANTISED_FAST = {
    ("UNet2DConditionModel", "nf4-double"),
    ("UNet2DConditionModel", "int8"),
    ("FluxTransformer2DModel", "nf4"),
    ("SD3Transformer2DModel", "fp4"),
}
#: the largest relative error of the outputs against peft's live model
LIVE = {"fp32": 2e-6, "nf4": 0.2, "nf4-double": 0.2, "int8": 0.03}


def plain_of(name: str, folder: Path) -> tuple[Path, Path]:
    """The folders of a plain model and of an adapter."""
    build(name).save_pretrained(folder / "plain")
    adapted(build(name)).save_pretrained(folder / "adapter")
    return folder / "plain", folder / "adapter"


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_file(a / FILE), load_file(b / FILE)
    return one.keys() == other.keys() and all(
        torch.equal(t.view(torch.uint8), other[n].view(torch.uint8)) for n, t in one.items()
    )


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_disk_memory_and_the_live_model_agree(name: str, storage: str, tmp_path: Path) -> None:
    plain, adapter = plain_of(name, tmp_path)
    base = plain
    if storage != "fp32":
        load(plain, name, storage).save_pretrained(base := tmp_path / "base")
    said: Any = {"trained_on": "plain"} if storage == "fp32" else {}
    out, undo = tmp_path / "out", tmp_path / "fold.undo"
    record = quietly(oftsurgery.fold_checkpoint, base, adapter, out, undo=undo, **said)
    in_memory = quietly(oftsurgery.fold, load(base, name), adapter)
    assert record.modules.keys() == in_memory.oftsurgery.modules.keys()
    disk = load(out, name)
    ours, theirs = in_memory.state_dict(), disk.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
    assert relative(outputs(disk), outputs(in_memory)) < 1e-6
    live = quietly(oftsurgery.wrap, load(base, name), adapter)
    if storage == "fp32":
        live = adapted(load(base, name)).base_model.model  # peft's own layers
    assert relative(outputs(disk), outputs(live)) < LIVE[storage]
    assert relative(outputs(load(base, name)), outputs(live)) > 0.05
    report = quietly(oftsurgery.verify_checkpoint, out, base, adapter)
    assert report.ok, report.wrong
    assert oftsurgery.doctor(out) == []
    for way, given in (("base", base), ("undo", undo)):
        quietly(oftsurgery.unfold_checkpoint, out, tmp_path / f"back by {way}", **{way: given})
        assert same_tensors(tmp_path / f"back by {way}", base)
    found = quietly(oftsurgery.extract_checkpoint, base, out)
    assert found.modules.keys() == record.modules.keys()
    assert found.explained > 0.9


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        pytest.param(n, s, marks=() if (n, s) in QUANTISED_FAST else pytest.mark.slow)
        for n in CONFIGS
        for s in ("nf4", "nf4-double", "fp4", "int8")
    ],
)
def test_a_plain_model_is_quantised_as_diffusers_loads_it(name: str, storage: str, tmp_path: Path) -> None:
    plain, adapter = plain_of(name, tmp_path)
    load(plain, name, storage).save_pretrained(tmp_path / "theirs")
    asked: Any = {"format": storage.partition("-")[0], "double_quant": storage.endswith("double")}
    quietly(oftsurgery.fold_checkpoint, plain, adapter, tmp_path / "first", **asked)
    quietly(oftsurgery.fold_checkpoint, tmp_path / "theirs", adapter, tmp_path / "second")
    assert same_tensors(tmp_path / "first", tmp_path / "second")
    record = oftsurgery.load_adapter(adapter).modules
    own, theirs = load_file(tmp_path / "first" / FILE), load_file(tmp_path / "theirs" / FILE)
    untouched = [n for n in theirs if not any(n.startswith(f"{path}.") for path in record)]
    assert len(untouched) > 20
    assert all(torch.equal(own[n], theirs[n]) for n in untouched)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("first", "theirs")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert quietly(oftsurgery.verify_checkpoint, tmp_path / "first", plain, adapter).ok
    dense = tmp_path / "bf16"
    quietly(
        oftsurgery.fold_checkpoint, plain, adapter, dense, **asked | {"format": "bf16", "quantize": asked["format"]}
    )
    assert quietly(oftsurgery.verify_checkpoint, dense, plain, adapter).ok
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert load(dense, name, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "skip",
    [["to_k"], ["down_blocks"], ["mid_block.attentions.0.proj_in", "conv_shortcut"], ["time_embedding.linear_1"]],
)
def test_modules_are_skipped_as_diffusers_skips_them(skip: list[str], tmp_path: Path) -> None:
    name = "UNet2DConditionModel"
    plain, adapter = plain_of(name, tmp_path)
    with without_gpu():
        model = diffusers.UNet2DConditionModel.from_pretrained(
            plain, quantization_config=settings("nf4", list(skip)), torch_dtype=torch.float32
        )
    model.save_pretrained(tmp_path / "theirs")
    quietly(oftsurgery.fold_checkpoint, plain, adapter, tmp_path / "first", format="nf4", skip_modules=skip)
    quietly(oftsurgery.fold_checkpoint, tmp_path / "theirs", adapter, tmp_path / "second")
    assert same_tensors(tmp_path / "first", tmp_path / "second")
    load(tmp_path / "first", name)


def test_kept_modules_stay_in_float32(tmp_path: Path) -> None:
    """diffusers keeps a class's ``_keep_in_fp32_modules`` in float32, and does not quantise them."""
    name = "WanTransformer3DModel"
    small = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model = diffusers.WanTransformer3DModel(**small, freq_dim=64, ffn_dim=32, num_layers=1, rope_max_seq_len=32)
    model.save_pretrained(tmp_path / "plain")
    adapted(model, r".*to_q").save_pretrained(tmp_path / "adapter")
    load(tmp_path / "plain", name, "nf4", torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    quietly(
        oftsurgery.fold_checkpoint,
        tmp_path / "plain",
        tmp_path / "adapter",
        tmp_path / "first",
        format="nf4",
        load_dtype="bfloat16",
    )
    own, theirs = load_file(tmp_path / "first" / FILE), load_file(tmp_path / "theirs" / FILE)
    assert {n: t.dtype for n, t in own.items()} == {n: t.dtype for n, t in theirs.items()}
    assert all(torch.equal(t, theirs[n]) for n, t in own.items() if "to_q.weight" not in n)
    assert quietly(oftsurgery.verify_checkpoint, tmp_path / "first", tmp_path / "plain", tmp_path / "adapter").ok


@pytest.mark.parametrize("name", CONFIGS)
def test_no_layer_of_an_attention_is_idle(name: str) -> None:
    modules = modules_of(build(name))
    linears = [path for path, module in modules.items() if isinstance(module, torch.nn.Linear)]
    assert [path for path in linears if is_idle(modules, path, quantised=False)] == []


def test_shards_and_variants_keep_their_names(tmp_path: Path) -> None:
    name = "FluxTransformer2DModel"
    _, adapter = plain_of(name, tmp_path)
    model = build(name).half()
    model.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="100KB")
    quietly(
        oftsurgery.fold_checkpoint,
        tmp_path / "base",
        adapter,
        tmp_path / "out",
        trained_on="plain",
        max_shard_size="100KB",
    )
    base, out = ({p.name for p in (tmp_path / folder).iterdir()} for folder in ("base", "out"))
    assert out - base == {"README.md", "oftsurgery.json"}
    assert not base - out
    assert load(tmp_path / "out", name, variant="fp16", torch_dtype=torch.float16).dtype == torch.float16
    assert oftsurgery.doctor(tmp_path / "out") == []
    # both are there: the plain files count, or the variant that is named
    shutil.copy(tmp_path / "plain" / FILE, tmp_path / "base")
    for variant, files in ((None, {FILE}), ("fp16", out & base - {"config.json"})):
        target = tmp_path / f"of {variant}"
        quietly(
            oftsurgery.fold_checkpoint,
            tmp_path / "base",
            adapter,
            target,
            trained_on="plain",
            variant=variant,
            max_shard_size="100KB" if variant else "5GB",
        )
        assert {p.name for p in target.iterdir() if "diffusion" in p.name} == files
        assert quietly(oftsurgery.verify_checkpoint, target, tmp_path / "base", adapter, variant=variant).ok
    with pytest.raises(oftsurgery.CheckpointError, match="bf16"):
        oftsurgery.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "no", trained_on="plain", variant="bf16")


def test_several_variants_need_a_choice(tmp_path: Path) -> None:
    name = "FluxTransformer2DModel"
    _, adapter = plain_of(name, tmp_path)
    for variant in ("fp16", "ema"):
        build(name).save_pretrained(tmp_path / "base", variant=variant)
    with pytest.raises(oftsurgery.CheckpointError, match=r"several variants of the weights: ema, fp16.*--variant"):
        oftsurgery.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", trained_on="plain")


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_live_model_is_saved_as_diffusers_loads_it(storage: str, tmp_path: Path) -> None:
    name = "FluxTransformer2DModel"
    plain, adapter = plain_of(name, tmp_path)
    folded = quietly(oftsurgery.fold, load(plain, name, storage), adapter)
    quietly(oftsurgery.export_safetensors, folded, tmp_path / "out")
    assert torch.equal(outputs(load(tmp_path / "out", name)), outputs(folded))
    quietly(oftsurgery.export_safetensors, folded, tmp_path / "bf16", dtype=torch.bfloat16)
    assert load(tmp_path / "bf16", name, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert [f.severity for f in oftsurgery.doctor(tmp_path / "out")] == []


def test_a_plain_model_folds_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes are enough, as the names on disk are those of the class."""
    name = "FluxTransformer2DModel"
    plain, adapter = plain_of(name, tmp_path)
    quietly(oftsurgery.fold_checkpoint, plain, adapter, tmp_path / "with", trained_on="plain")
    monkeypatch.setattr("oftsurgery.stores.skeleton.image_model", lambda _: None)
    quietly(oftsurgery.fold_checkpoint, plain, adapter, tmp_path / "without", trained_on="plain")
    assert same_tensors(tmp_path / "with", tmp_path / "without")
    with pytest.raises(
        oftsurgery.StateError, match=r"does not know the class or is not installed.*oftsurgery\[diffusers\]"
    ):
        oftsurgery.fold_checkpoint(plain, adapter, tmp_path / "no", format="nf4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": 3}, "must be a string"),
        ({"num_layers": "many"}, "cannot build it from this config"),
        ({"num_layers": 10**9}, "cannot build it from this config"),
    ],
)
def test_a_config_that_builds_no_model_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain, adapter = plain_of("FluxTransformer2DModel", tmp_path)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(oftsurgery.CheckpointError, match=message):
        oftsurgery.fold_checkpoint(plain, adapter, tmp_path / "out", trained_on="plain")
    assert not (tmp_path / "out").exists()
