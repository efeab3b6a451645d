"""Pipelines of diffusers on disk: several models in one fold, the other files copied, one rename for the whole folder."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import fsspec
import pytest
import torch
import transformers
from checkpoints import bnb_config, quiet_transformers
from image_models import adapted, build, load, outputs
from independent import relative, seeded
from safetensors.torch import load_file, save_file
from warned import noted, quietly

import oftsurgery
from oftsurgery.cli.main import main
from oftsurgery.files.remote_staging import RemoteStaging
from oftsurgery.files.staging import Staging
from oftsurgery.folding import pipelines
from oftsurgery.stores.image_layouts import pairs_of


def text_encoder(layers: int) -> Any:
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=16)
    torch.manual_seed(layers)
    return transformers.CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline ``base``, and the adapters ``unet`` of its denoiser and ``text`` of its text encoder."""
    place = tmp_path_factory.mktemp("pipeline")
    base = place / "base"
    denoiser, encoder = build("UNet2DConditionModel"), text_encoder(2)
    denoiser.save_pretrained(base / "unet")
    quietly(encoder.save_pretrained, base / "text_encoder")
    diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8).save_pretrained(base / "vae")
    diffusers.DDIMScheduler().save_pretrained(base / "scheduler")
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    (base / "model_index.json").write_text(json.dumps(index))
    adapted(denoiser).save_pretrained(place / "unet")
    adapted(encoder, ["q_proj", "fc1"]).save_pretrained(place / "text")
    return place


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def contents_of(folder: Path) -> dict[str, Any]:
    """The files, and of the weights the tensors."""
    files = files_in(folder)
    names = [name for name in files if name.endswith(".safetensors")]
    return files | {
        n: {k: (str(t.dtype), t.shape, t.view(torch.uint8).numpy().tobytes()) for k, t in load_file(folder / n).items()}
        for n in names
    }


def fold(place: Path, adapters: list[str], out: Path, **more: Any) -> oftsurgery.FoldRecord:
    given = [place / name for name in adapters]
    record: oftsurgery.FoldRecord = quietly(
        oftsurgery.fold_checkpoint, place / "base", given, out, **{"trained_on": "plain"} | more
    )
    return record


NEW = {"README.md", "oftsurgery.json"}


def test_a_pipeline_is_folded_model_by_model(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = fold(place, ["unet", "text"], out)
    assert {path.partition(".")[0] for path in record.modules} == {"unet", "text_encoder"}
    before, after = files_in(place / "base"), files_in(out)
    weights = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert {n for n in before if before[n] != after[n]} - {"unet/config.json", "text_encoder/config.json"} == weights
    assert after.keys() - before.keys() == {f"{model}/{name}" for model in ("unet", "text_encoder") for name in NEW}
    loaded = diffusers.UNet2DConditionModel.from_pretrained(out / "unet").eval()
    in_memory = oftsurgery.fold(build("UNet2DConditionModel"), place / "unet")
    own = in_memory.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in loaded.state_dict().items())
    assert relative(outputs(loaded), outputs(in_memory)) < 1e-6  # oneDNN's sums follow the alignment of the memory
    encoder = transformers.CLIPTextModel.from_pretrained(out / "text_encoder").eval()
    expected = oftsurgery.fold(text_encoder(2), place / "text").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in encoder.state_dict().items())
    both = [place / "unet", place / "text"]
    report = quietly(oftsurgery.verify_checkpoint, out, place / "base", both)
    assert report.ok, report.wrong
    assert report.modules.keys() == record.modules.keys()
    assert oftsurgery.verify_checkpoint(out).ok
    assert oftsurgery.doctor(out) == []
    assert oftsurgery.report(out)
    for way, given in (("base", place / "base"), ("adapter", both)):
        quietly(oftsurgery.unfold_checkpoint, out, tmp_path / way, **{way: given})
    assert files_in(tmp_path / "base") == before
    # a changed file beside the models is seen
    (out / "vae" / "config.json").write_text("{}")
    report = quietly(oftsurgery.verify_checkpoint, out, place / "base", both)
    assert not report.ok
    assert report.files["vae/config.json"] == "changed"


def test_one_model_of_a_pipeline(place: Path, tmp_path: Path) -> None:
    out, undo = tmp_path / "out", tmp_path / "fold.undo"
    record = fold(place, ["text"], out, undo=undo, component="text_encoder")
    assert all(path.startswith("text_encoder.") for path in record.modules)
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert files_in(out)[unet] == files_in(place / "base")[unet]
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "back", undo=undo)
    assert files_in(tmp_path / "back") == files_in(place / "base")
    found = quietly(oftsurgery.extract_checkpoint, place / "base", out)
    assert {f"text_encoder.{path}" for path in found.modules} == record.modules.keys()
    # one model by itself is what it is in the pipeline
    alone = tmp_path / "alone"
    quietly(oftsurgery.fold_checkpoint, place / "base" / "text_encoder", place / "text", alone, trained_on="plain")
    assert files_in(alone)["model.safetensors"] == files_in(out)["text_encoder/model.safetensors"]


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_one_undo_record_for_several_models(storage: str, place: Path, tmp_path: Path) -> None:
    base, out, undo = tmp_path / "base", tmp_path / "out", tmp_path / "fold.undo"
    shutil.copytree(place / "base", base)
    if storage == "nf4":
        shutil.rmtree(base / "unet")
        load(place / "base" / "unet", "UNet2DConditionModel", "nf4").save_pretrained(base / "unet")
        with quiet_transformers():
            encoder = transformers.CLIPTextModel.from_pretrained(
                base / "text_encoder", quantization_config=bnb_config("nf4")
            )
        shutil.rmtree(base / "text_encoder")
        quietly(encoder.save_pretrained, base / "text_encoder")
    adapters = [place / "unet", place / "text"]
    trained = "nf4" if storage == "nf4" else "plain"
    record = quietly(oftsurgery.fold_checkpoint, base, adapters, out, undo=undo, trained_on=trained)
    assert {path.partition(".")[0] for path in record.modules} == {"unet", "text_encoder"}
    assert not [name for name in files_in(out) if "undo" in name]
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "back", undo=undo)
    assert contents_of(tmp_path / "back") == contents_of(base)
    if storage == "fp32":  # the order of quantised tensors in a file is the fold's
        assert files_in(tmp_path / "back") == files_in(base)
    # one model of the pipeline, in its folder, in memory, or by name
    quietly(oftsurgery.unfold_checkpoint, out / "text_encoder", tmp_path / "text", undo=undo)
    assert contents_of(tmp_path / "text") == contents_of(base / "text_encoder")
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "one", undo=undo, component="unet")
    one = contents_of(tmp_path / "one")
    assert [n for n, data in contents_of(base).items() if one.get(n) != data] == ["text_encoder/model.safetensors"]
    if storage == "fp32":
        folded = quietly(oftsurgery.fold, text_encoder(2), place / "text")
        own = oftsurgery.unfold(folded, undo=undo).state_dict()
        assert all(torch.equal(t, own[n]) for n, t in text_encoder(2).state_dict().items())
    # a record without the model, and a damaged one
    with pytest.raises(oftsurgery.UndoError, match=r"2 models of a pipeline: unet, text_encoder"):
        oftsurgery.unfold_checkpoint(out, tmp_path / "none", undo=undo, component="vae")
    data = bytearray(undo.read_bytes())
    data[-9] ^= 1
    undo.write_bytes(data)
    with pytest.raises(oftsurgery.UndoError, match="damaged"):
        oftsurgery.unfold_checkpoint(out, tmp_path / "none", undo=undo)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("quantised", "kind"), [("unet", "nf4"), ("text_encoder", "int8")])
def test_plain_and_quantised_models_in_one_fold(quantised: str, kind: str, place: Path, tmp_path: Path) -> None:
    """Each model as it is stored; the arguments that are about plain models; and what is said of each model."""
    base, out, undo = tmp_path / "base", tmp_path / "out", tmp_path / "fold.undo"
    shutil.copytree(place / "base", base)
    shutil.rmtree(base / quantised)
    if quantised == "unet":
        load(place / "base" / "unet", "UNet2DConditionModel", kind).save_pretrained(base / "unet")
    else:
        with quiet_transformers():
            encoder = transformers.CLIPTextModel.from_pretrained(
                place / "base" / "text_encoder", quantization_config=bnb_config(kind)
            )
        quietly(encoder.save_pretrained, base / "text_encoder")
    adapters = {"unet": place / "unet", "text_encoder": place / "text"}
    each = ",".join(f"{name}={kind if name == quantised else 'plain'}" for name in adapters)
    given = [base, list(adapters.values())]
    for said in ({}, {"trained_on": "plain"}, {"trained_on": "fp4", "format": "fp4"}):
        with pytest.raises(oftsurgery.StateError, match=rf"of each model of the pipeline.*--trained-on {each}\)"):
            oftsurgery.fold_checkpoint(*given, out, **said)
    for wrong, message in (("vae=plain", "names 'vae'.*unet, text_encoder"), ("unet=nf5", "'nf5' is neither")):
        with pytest.raises(oftsurgery.StateError, match=message):
            oftsurgery.fold_checkpoint(*given, out, trained_on=wrong)
    assert not out.exists()

    def alone(name: str, **how: Any) -> dict[str, Any]:
        to = tmp_path / f"{name}-{len(how)}"
        how |= {"trained_on": "plain"} if name != quantised and "format" not in how else {}
        quietly(oftsurgery.fold_checkpoint, base / name, adapters[name], to, **how)
        return contents_of(to)

    weights = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    record = quietly(oftsurgery.fold_checkpoint, *given, out, trained_on=each, undo=undo)
    assert {path.partition(".")[0] for path in record.modules} == adapters.keys()
    for name, file in weights.items():
        assert contents_of(out / name)[file] == alone(name)[file]
        config = json.loads((out / name / "config.json").read_text())
        assert ("quantization_config" in config) is (name == quantised)
    report = quietly(oftsurgery.verify_checkpoint, out, *given)
    assert report.ok, report.wrong
    assert oftsurgery.doctor(out) == []
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "back", undo=undo)
    assert contents_of(tmp_path / "back") == contents_of(base)
    quietly(oftsurgery.unfold_checkpoint, out, tmp_path / "from-base", base=base)
    assert contents_of(tmp_path / "from-base") == contents_of(base)
    # the plain model is quantised as its own loading would, and the other keeps its format
    settings = {"quantize": kind, "format": kind, "skip_modules": ["fc1", "to_out.0"]}
    quietly(oftsurgery.fold_checkpoint, *given, tmp_path / "both", **settings)
    for name, file in weights.items():
        own = settings if name != quantised else {"format": kind}
        assert contents_of(tmp_path / "both" / name)[file] == alone(name, **own)[file]
    report = quietly(oftsurgery.verify_checkpoint, tmp_path / "both", *given)
    assert report.ok, report.wrong


def test_a_killed_fold_of_several_models_resumes_with_its_undo_record(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the joined record, and again between the record and the last rename."""
    fold(place, ["unet", "text"], tmp_path / "whole", undo=tmp_path / "whole.undo")
    undo = tmp_path / "fold.undo"
    for where, name in ((pipelines, "join_undos"), (Staging, "copy"), (Staging, "publish")):
        with monkeypatch.context() as killed:
            killed.setattr(where, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                fold(place, ["unet", "text"], tmp_path / "out", undo=undo, resume=True)
        assert not (tmp_path / "out").exists()
    fold(place, ["unet", "text"], tmp_path / "out", undo=undo, resume=True)
    assert undo.read_bytes() == (tmp_path / "whole.undo").read_bytes()
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    with pytest.raises(oftsurgery.StateError, match="undo records are not overwritten"):
        fold(place, ["unet", "text"], tmp_path / "other", undo=undo)
    assert not (tmp_path / "other").exists()


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_one_file_of_an_image_tool_for_several_models(place: Path, tmp_path: Path) -> None:
    """LyCORIS within sd-scripts: flattened names behind a prefix for each model, those of the U-Net in the original layout."""
    models = {"lora_unet_": build("UNet2DConditionModel"), "lora_te_": text_encoder(2)}
    original = {
        part: p.original for p in pairs_of(n for n, _ in models["lora_unet_"].named_modules()) for part in p.parts
    }
    tensors: dict[str, torch.Tensor] = {}
    for prefix, model in models.items():
        for path, module in model.named_modules():
            if path.endswith((".to_q", ".q_proj", ".conv1")):
                name = original.get(path, f"text_model.{path.removeprefix('text_model.')}")
                key = prefix + name.replace(".", "_")
                rows = module.weight.shape[0]
                tensors[f"{key}.oft_blocks"] = torch.randn(rows // 8, 8, 8, generator=seeded(key)) * 0.05
                tensors[f"{key}.alpha"] = torch.tensor(0.0)
    style, out = tmp_path / "style.safetensors", tmp_path / "out"
    save_file(tensors, style, {"ss_network_module": "lycoris.kohya"})
    record = quietly(oftsurgery.fold_checkpoint, place / "base", style, out, trained_on="plain")
    assert len(record.modules) == len(tensors) // 2
    assert {path.partition(".")[0] for path in record.modules} == {"unet", "text_encoder"}
    assert quietly(oftsurgery.verify_checkpoint, out, place / "base", style).ok
    adapter = oftsurgery.load_adapter(style)
    own = replace(adapter, modules={n: m for n, m in adapter.modules.items() if n.startswith("lora_unet_")})
    expected = quietly(oftsurgery.fold, models["lora_unet_"], own).state_dict()
    loaded = diffusers.UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    assert all(torch.equal(t, loaded[n]) for n, t in expected.items())


def test_the_commands_take_a_pipeline(place: Path, tmp_path: Path) -> None:
    base, adapter, out = place / "base", place / "unet", tmp_path / "out"
    for command in (
        ["plan", base, adapter, "--trained-on", "plain", "--component", "unet"],
        ["fold", base, adapter, out, "--trained-on", "plain"],
        ["verify", out, base, adapter, "--component", "unet"],
        ["show", out],
        ["doctor", out],
    ):
        assert quietly(main, list(map(str, command))) == 0, command
    assert files_in(out)["vae/config.json"] == files_in(base)["vae/config.json"]


def test_a_pipeline_appears_whole_or_not_at_all(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = Staging.copy

    def broken(self: Staging, source: Path, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "copy", broken)
    with pytest.raises(KeyboardInterrupt):
        fold(place, ["unet", "text"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Staging, "copy", copied)
    shards = tmp_path / ".out.oftsurgery"
    weights = [shards / "unet" / "diffusion_pytorch_model.safetensors", shards / "text_encoder" / "model.safetensors"]
    before = [path.stat().st_ino for path in weights]
    fold(place, ["unet", "text"], tmp_path / "out", resume=True)
    names = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    assert [(tmp_path / "out" / name).stat().st_ino for name in names] == before  # finished shards were kept
    fold(place, ["unet", "text"], tmp_path / "again")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "again")


def test_adapters_that_fit_several_models_need_a_choice(place: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    quietly(text_encoder(3).save_pretrained, base / "text_encoder_2")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(oftsurgery.MatchError, match=r"text_encoder, text_encoder_2.*--component"):
        oftsurgery.fold_checkpoint(base, place / "text", tmp_path / "out", trained_on="plain")
    record = quietly(
        oftsurgery.fold_checkpoint,
        base,
        place / "text",
        tmp_path / "out",
        trained_on="plain",
        component="text_encoder_2",
        partial=True,
    )
    assert all(path.startswith("text_encoder_2.") for path in record.modules)


@pytest.mark.parametrize(
    "prefixes", [("lora_te1_", "lora_te2_"), ("lora_te_", "lora_te2_"), ("text_encoder.", "text_encoder_2.")]
)
def test_the_number_tells_two_encoders_of_one_shape(prefixes: tuple[str, str], place: Path, tmp_path: Path) -> None:
    """And each model takes what LyCORIS adds to its own normalisation layers."""
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    quietly(text_encoder(2).save_pretrained, base / "text_encoder_2")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    tensors: dict[str, torch.Tensor] = {}
    for prefix in prefixes:
        dotted = f"{prefix}text_model.encoder.layers.1."
        layer = dotted if prefix.endswith(".") else dotted.replace(".", "_")
        mid = "self_attn.q_proj" if prefix.endswith(".") else "self_attn_q_proj"
        tensors[f"{layer}{mid}.oft_blocks"] = torch.randn(8, 8, 8, generator=seeded(prefix)) * 0.1
        tensors[f"{layer}{mid}.alpha"] = torch.tensor(0.0)
        tensors[f"{layer}layer_norm1.w_norm"] = torch.randn(64, generator=seeded(f"{prefix}n"))
    unet = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors |= {f"{unet}.oft_blocks": torch.randn(16, 8, 8) * 0.1, f"{unet}.alpha": torch.tensor(0.0)}
    style, out = tmp_path / "style.safetensors", tmp_path / "out"
    save_file(tensors, style, {"ss_network_module": "lycoris.kohya"})
    quietly(oftsurgery.fold_checkpoint, base, style, out, trained_on="plain")
    report = quietly(oftsurgery.verify_checkpoint, out, base, style)
    assert report.ok, report.wrong
    for name, prefix in zip(("text_encoder", "text_encoder_2"), prefixes, strict=True):
        own = {k: t for k, t in tensors.items() if k.startswith(prefix)}
        save_file(own, tmp_path / "own.safetensors", {"ss_network_module": "lycoris.kohya"})
        expected = quietly(oftsurgery.fold, text_encoder(2), tmp_path / "own.safetensors").state_dict()
        got = load_file(out / name / "model.safetensors")
        assert all(
            torch.equal(t, expected[n.removeprefix("text_model.") if n not in expected else n]) for n, t in got.items()
        )
    changed = json.loads((out / "unet" / "oftsurgery.json").read_text())["modules"]
    assert len(changed) == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"component": "unett"}, r"no model 'unett'.*unet, text_encoder, vae"),
    ({"component": "unet"}, r"match nothing in the model"),
    ({"calibration": ["a text"]}, r"the source is a pipeline"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda case: str(case)[:30])
def test_what_a_pipeline_cannot_take_is_refused(
    given: dict[str, Any], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(oftsurgery.OFTSurgeryError, match=message):
        fold(place, ["unet", "text"], tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_component_outside_the_folder_is_refused(place: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model_index.json").write_text(json.dumps({"../unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(oftsurgery.CheckpointError, match="outside the folder"):
        oftsurgery.fold_checkpoint(base, place / "unet", tmp_path / "out", trained_on="plain")
    shutil.copytree(place / "base", tmp_path / "linked")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "linked" / "tokenizer" / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(oftsurgery.CheckpointError, match="link that leaves its folder"):
        oftsurgery.fold_checkpoint(tmp_path / "linked", place / "unet", tmp_path / "out", trained_on="plain")
    assert not (tmp_path / "out").exists()


def test_pickles_are_named_and_not_copied(place: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    (base / "vae" / "diffusion_pytorch_model.safetensors").rename(base / "vae" / "diffusion_pytorch_model.bin")
    (base / "whole.safetensors").write_bytes(b"another form of the same model")
    with noted() as caught:
        oftsurgery.fold_checkpoint(base, place / "unet", tmp_path / "out", trained_on="plain")
    (said,) = [str(w.message) for w in caught if w.category is oftsurgery.LeftOutWarning]
    assert "vae/diffusion_pytorch_model.bin (a pickle" in said
    assert not {"whole.safetensors", "vae/diffusion_pytorch_model.bin"} & files_in(tmp_path / "out").keys()


def test_an_executor_writes_and_checks_the_same(place: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        records = [
            fold(place, ["unet", "text"], tmp_path / out, executor=e, undo=tmp_path / f"{out}.undo")
            for out, e in (("1", None), ("2", threads))
        ]
        assert records[0] == records[1]
        assert files_in(tmp_path / "1") == files_in(tmp_path / "2")
        assert (tmp_path / "1.undo").read_bytes() == (tmp_path / "2.undo").read_bytes()
        paths = [tmp_path / "1", place / "base", [place / "unet", place / "text"]]
        assert oftsurgery.verify_checkpoint(*paths, executor=threads) == oftsurgery.verify_checkpoint(*paths)  # type: ignore[arg-type]
        oftsurgery.unfold_checkpoint(tmp_path / "1", tmp_path / "back", base=place / "base", executor=threads)
    assert files_in(tmp_path / "back") == files_in(place / "base")


def test_a_pipeline_behind_a_url(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files, the undo record and the restored pipeline are those of this machine; the index of the pipeline comes last."""
    memory, given = fsspec.filesystem("memory"), [place / "unet", place / "text"]
    memory.put(str(place / "base"), "/pipe/base", recursive=True)
    put: list[str] = []
    monkeypatch.setattr(
        RemoteStaging,
        "_put",
        lambda self, name, to, really=RemoteStaging._put: (put.append(name), really(self, name, to)),
    )
    fold(place, ["unet", "text"], tmp_path / "out", undo=tmp_path / "here.undo")
    there = {"undo": tmp_path / "there.undo", "trained_on": "plain"}
    quietly(oftsurgery.fold_checkpoint, "memory://pipe/base", given, "memory://pipe/out", **there)
    memory.get("/pipe/out", str(tmp_path / "copy"), recursive=True)
    assert files_in(tmp_path / "copy") == files_in(tmp_path / "out")
    assert put[-1] == "model_index.json"
    assert (tmp_path / "there.undo").read_bytes() == (tmp_path / "here.undo").read_bytes()
    report = quietly(oftsurgery.verify_checkpoint, "memory://pipe/out", "memory://pipe/base", given)
    assert report.ok, report.wrong
    quietly(oftsurgery.unfold_checkpoint, "memory://pipe/out", "memory://pipe/back", undo=tmp_path / "there.undo")
    memory.get("/pipe/back", str(tmp_path / "back"), recursive=True)
    assert files_in(tmp_path / "back") == files_in(place / "base")
    assert sorted(memory.ls("/pipe", detail=False)) == ["/pipe/back", "/pipe/base", "/pipe/out"]
