"""Folds into checkpoints that other packages quantised. The packages themselves wrote the folders in ``tests/data/bases`` and said
what they dequantise the weights to (``tests/bases/packages.py``).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    decoded,
    differing,
    file_bytes,
    load,
    outputs,
    quiet_fold,
    rotations_in,
    stored_as,
    tensors,
)
from independent import make_case, relative
from package_bases import CASES, HOME, Folders, changed, values
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import oftsurgery
from oftsurgery.cli import main as cli
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.formats.packages.methods import METHODS
from oftsurgery.formats.packages.stored import Source
from oftsurgery.stores.dequantised import DequantisedCheckpoint, dequantised

DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_read_as_its_package_dequantises_it(name: str) -> None:
    said = json.loads((HOME / name / "dequantised.json").read_text())
    found = values(name)
    assert len(found) == len(said) + 5
    for weight, (dtype, digest) in said.items():
        data = found[weight].view(torch.uint8).numpy().tobytes()
        assert [str(found[weight].dtype), hashlib.sha256(data).hexdigest()] == [dtype, digest], weight


@pytest.mark.parametrize("known", [True, False])
def test_gptq_holds_gpt2_s_weights_turned(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gptqmodel packs ``Conv1D`` as a linear; `tests/bases/live_layers.py` has it do so, and compares the outputs."""
    config = json.loads((HOME / "gptq-4-gptq" / "config.json").read_text())
    own: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": 128,
    }
    own |= {"model_type": "gpt2", "quantization_config": config["quantization_config"]}
    held = load_file(HOME / "gptq-4-gptq" / "model.safetensors")
    places = {"self_attn.o_proj": "transformer.h.0.attn.c_proj", "mlp.up_proj": "transformer.h.0.mlp.c_fc"}
    found = {}
    for llama, gpt2 in places.items():
        path = f"model.layers.0.{llama}."
        found |= {f"{gpt2}.{n.removeprefix(path)}": t for n, t in held.items() if n.startswith(path)}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(own))
    save_file(found, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    if not known:
        monkeypatch.setattr("oftsurgery.stores.naming.skeleton", lambda *_: None)
    source = dequantised(open_checkpoint(tmp_path / "base"))
    for llama, gpt2 in places.items():
        want = values("gptq-4-gptq")[f"model.layers.0.{llama}.weight"].t()
        assert torch.equal(source.read(f"{gpt2}.weight"), want)
        assert source.entries[f"{gpt2}.weight"].shape == want.shape


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_has_a_scale_for_each_block_of_any_size_under_any_name(
    codes: torch.dtype, end: str, tmp_path: Path
) -> None:
    """DeepSeek's last blocks are smaller than the others, and transformers does not dequantise such weights."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 64, generator=generator).to(codes)
    scale = torch.rand(2, 2, generator=generator)
    base = changed("fp8-block", tmp_path / "base", {"weight_block_size": [48, 40]}, weight_scale_inv=None)
    held = load_file(base / "model.safetensors")
    for name in [n for n in held if n.endswith("_scale_inv")]:
        rows, columns = held[name.removesuffix("_scale_inv")].shape
        held[name] = torch.ones(-(-rows // 48), -(-columns // 40))
    path = "model.layers.0.self_attn.q_proj."
    save_file(held | {f"{path}weight": weight, f"{path}{end}": scale}, base / "model.safetensors")
    found = dequantised(open_checkpoint(base)).read(f"{path}weight")
    places = torch.arange(64)
    exact = weight.double() * scale.double()[places[:, None] // 48, places[None] // 40]
    assert torch.equal(found, exact.float().bfloat16())


def test_a_scale_for_each_row_and_for_a_stack_of_experts() -> None:
    generator = torch.Generator().manual_seed(2)
    for shape, of in (((8, 16), (8, 1)), ((8, 16), (8,)), ((3, 8, 16), (3, 2, 4))):
        weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(of, generator=generator)
        entries = {n: (t.dtype, tuple(t.shape)) for n, t in (("x", weight), ("x_scale_inv", scale))}
        source = Source(entries, {}, torch.float32, {"x": weight, "x_scale_inv": scale}.__getitem__)
        found = METHODS["fbgemm_fp8"](source)["x"].decode({"weight": weight, "scale": scale})
        full = scale.reshape(8, 1) if len(shape) == 2 else scale.repeat_interleave(4, 1).repeat_interleave(4, 2)
        assert torch.equal(found, weight.float() * full)


def test_zero_points_of_older_compressed_tensors_are_not_packed(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj."
    name, held = "ct-int4-group-asym", load_file(HOME / "ct-int4-group-asym" / "model.safetensors")
    packed = held[f"{path}weight_zero_point"]  # (8, 2) int32: 64 rows of 4 bits
    plain = torch.stack([(packed >> shift & 15) - 8 for shift in range(0, 32, 4)], 1).flatten(0, 1).to(torch.int8)
    base = changed(name, tmp_path / "base", weight_zero_point=plain)
    assert torch.equal(dequantised(open_checkpoint(base)).read(f"{path}weight"), values(name)[f"{path}weight"])


@pytest.mark.parametrize(
    ("name", "format"), [*((name, "bf16") for name in CASES), ("gptq-4-gptq", "fp16"), ("ct-int8-fp16", "fp32")]
)
def test_a_dense_fold_rounds_the_rotated_weight_once(name: str, format: str, folders: Folders, tmp_path: Path) -> None:
    record = quiet_fold(HOME / name, folders.adapter, tmp_path / "out", format=format)
    found, before = tensors(tmp_path / "out"), values(name)
    assert found.keys() == before.keys()
    assert {t.dtype for t in found.values()} == {DENSE[format]}
    for weight, exact in folders.exact(name).items():
        rounding = relative(exact.to(DENSE[format]).double(), exact)
        assert relative(found[weight].double(), exact) <= 1.05 * rounding + 2e-6
    for weight in before.keys() - folders.exact(name).keys():
        assert torch.equal(found[weight], before[weight].to(DENSE[format]))
    assert (
        record.base["stored_as"]
        == json.loads((HOME / name / "config.json").read_text())["quantization_config"]["quant_method"]
    )
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load(tmp_path / "out", "LlamaForCausalLM")
    report = oftsurgery.verify_checkpoint(tmp_path / "out", HOME / name, folders.adapter)
    assert report.ok, str(report)
    assert not [f for f in oftsurgery.doctor(tmp_path / "out", base=HOME / name) if f.severity != "note"]


@pytest.mark.parametrize(
    ("name", "format"), [*((name, "nf4") for name in CASES), ("gptq-4-gptq", "fp4"), ("fp8-block", "int8")]
)
def test_a_quantised_fold_rounds_the_rotated_weight_once(
    name: str, format: str, folders: Folders, tmp_path: Path
) -> None:
    quiet_fold(HOME / name, folders.adapter, tmp_path / "out", format=format)
    found = tensors(tmp_path / "out")
    for weight, exact in folders.exact(name).items():
        best = relative(stored_as(exact, found, weight), exact)
        assert relative(decoded(found, weight), exact) <= 1.001 * best
    live = load(tmp_path / "out", "LlamaForCausalLM")
    assert type(live.model.layers[0].self_attn.k_proj).__name__ == (
        "Linear8bitLt" if format == "int8" else "Linear4bit"
    )
    report = oftsurgery.verify_checkpoint(tmp_path / "out", HOME / name, folders.adapter)
    assert report.ok, str(report)


@pytest.mark.parametrize("rounding", ["nearest", "grid", "mse", "preserve"])
def test_every_rounding_is_that_of_the_same_weights_stored_plain(
    rounding: Any, folders: Folders, tmp_path: Path
) -> None:
    for base, out in ((HOME / "gptq-4-gptq", "out"), (folders.plain("gptq-4-gptq"), "plain")):
        said = {"trained_on": "plain"} if out == "plain" else {}
        quiet_fold(base, folders.adapter, tmp_path / out, format="nf4", double_quant=True, rounding=rounding, **said)
    assert not differing(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))


def test_the_fold_computes_what_peft_computes_over_transformers_own_dequantisation(
    folders: Folders, tmp_path: Path
) -> None:
    """transformers dequantises fp8 on a CPU, so that peft's layers run over it here."""
    from peft import PeftModel

    for name in ("fp8-block", "fp8-tensor"):
        base = LlamaForCausalLM.from_pretrained(HOME / name)
        state = base.state_dict()
        assert all(torch.equal(state[n], t) for n, t in values(name).items())
        live = PeftModel.from_pretrained(base.float(), folders.adapter).eval()
        quiet_fold(HOME / name, folders.adapter, tmp_path / name, format="fp32")
        assert relative(outputs(load(tmp_path / name, "LlamaForCausalLM")), outputs(live)) < 1e-5


def test_live_layers_in_fp8_give_what_the_disk_gives(folders: Folders, tmp_path: Path) -> None:
    """transformers computes with such layers on a GPU alone; the weights are the same everywhere."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    base = HOME / "fp8-block"
    model: Any = LlamaForCausalLM(LlamaConfig(**json.loads((base / "config.json").read_text()))).to(torch.bfloat16)
    for path in [p for p, m in model.named_modules() if type(m) is torch.nn.Linear and p != "lm_head"]:
        out, inputs = model.get_submodule(path).weight.shape
        model.set_submodule(path, FP8Linear(inputs, out, block_size=(32, 32)))
    model.load_state_dict(load_file(base / "model.safetensors"))
    model.config.quantization_config = {"quant_method": "fp8"}
    for format_ in ("bf16", "nf4"):
        quiet_fold(base, folders.adapter, tmp_path / format_, format=format_)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
            folded: Any = oftsurgery.fold(model, folders.adapter, format=format_, rounding="nearest")
        oftsurgery.export_safetensors(folded, tmp_path / f"live-{format_}")
        assert not differing(tensors(tmp_path / format_), tensors(tmp_path / f"live-{format_}"))
    assert type(model.model.layers[0].mlp.up_proj) is FP8Linear
    with pytest.raises(oftsurgery.StateError, match=r"stored as fp8, which oftsurgery reads and does not write"):
        oftsurgery.fold(model, folders.adapter)


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"stored as awq, which oftsurgery reads and does not write.*choose format='bf16'"),
        ({"format": "bnb"}, r"stored as awq, which oftsurgery reads and does not write"),
        ({"format": "nf4", "quantize": "nf4"}, r"trained in nf4, but the base is stored as awq.*leave out quantize"),
        ({"format": "bf16", "trained_on": "nf4-double"}, r"trained on nf4-double.*stored as awq.*trained_on='plain'"),
        ({"format": "bf16", "undo": "undo"}, r"an undo record restores the bytes.*keep the base"),
    ],
)
def test_refusals(options: Any, message: str, folders: Folders, tmp_path: Path) -> None:
    if "undo" in options:
        options = {"format": "bf16", "undo": tmp_path / "undo"}
    with pytest.raises(oftsurgery.StateError, match=message):
        oftsurgery.fold_checkpoint(HOME / "awq-gemm-g32", folders.adapter, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_files_of_another_training_are_refused(folders: Folders, tmp_path: Path) -> None:
    adapter = shutil.copytree(folders.adapter, tmp_path / "adapter")
    (adapter / "training_args.yaml").write_text("model_name_or_path: a/b\nfinetuning_type: oft\nquantization_bit: 4\n")
    base, out = HOME / "fp8-block", tmp_path / "out"
    with pytest.raises(
        oftsurgery.StateError, match=r"trained on nf4-double, as training_args.yaml says.*stored as fp8"
    ):
        oftsurgery.fold_checkpoint(base, adapter, out, format="bf16")
    quiet_fold(base, adapter, out, format="bf16", trained_on="plain")


@pytest.mark.parametrize(
    ("name", "settings", "other", "message"),
    [
        ("gptq-4-gptq", {"quant_method": "eetq"}, {}, r"reads plain weights and those of .*gptq.*eetq.*GPU"),
        ("gptq-4-gptq", {"quant_method": "aqlm"}, {}, r"reads plain weights.*codebooks"),
        ("gptq-4-gptq", {"quant_method": "vptq"}, {}, r"reads plain weights.*dequantise the checkpoint with that"),
        ("gptq-4-gptq", {"quant_method": "hqq"}, {}, r"says that hqq quantised the weights, and no weight is stored"),
        ("gptq-4-gptq", {"bits": 3}, {}, r"not stored in 3 bits"),
        ("gptq-4-gptq", {"checkpoint_format": "marlin"}, {}, r"checkpoint_format='marlin', a layout.*gptq_v2"),
        ("gptq-4-gptq", {}, {"scales": None}, r"a tensor of the quantised weight is missing.*q_proj.scales"),
        ("gptq-4-gptq", {}, {"g_idx": torch.full((64,), 9, dtype=torch.int32)}, r"lies outside the groups.*g_idx"),
        ("gptq-4-gptq", {}, {"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, r"or has another shape.*qzeros"),
        ("gptq-4-gptq", {"desc_act": True}, {"g_idx": None}, r"group of each input is missing.*g_idx"),
        ("gptq-4-gptq", {}, {"weight": torch.zeros(64, 64)}, r"holds the weight twice"),
        ("awq-gemm-g32", {"version": "exllama"}, {}, r"version='exllama'.*gemv_fast"),
        ("awq-gemm-g32", {"bits": 8}, {}, r"bits='8'.*4 bits"),
        ("awq-gemm-g32", {"group_size": 48}, {}, r"inputs do not make groups of 48"),
        ("awq-gemv-g64", {"version": "gemm"}, {}, r"or has another shape"),
        ("awq-gemm-g32", {}, {"act.scales": torch.ones(64)}, r"AWQ scales this activation"),
        ("hqq-4-bf16", {}, {"quant_zero": torch.ones((), dtype=torch.uint8)}, r"scales or zeros are quantised too"),
        ("hqq-4-bf16", {}, {"packing": torch.tensor([120], dtype=torch.uint8)}, r"do not say a layout of hqq"),
        ("hqq-4-bf16", {}, {"shape": torch.zeros(1000, dtype=torch.int64)}, r"too large"),
        ("ct-int3-group", {"format": "nvfp4-pack-quantized"}, {}, r"format='nvfp4-pack-quantized'.*int-quantized"),
        ("ct-int3-group", {"transform_config": {"a": 1}}, {}, r"transform_config.*without transforms"),
        ("ct-int3-group", {}, {"weight_packed": torch.zeros(64, 7, dtype=torch.int32)}, r"packed in \[3\] bits"),
        ("ct-int8-fp16", {}, {"weight_scale": torch.ones(5, 1)}, r"scales do not fit the weight"),
        ("ct-float8-channel", {}, {"weight_scale": None}, r"has no scale beside it"),
        ("fp8-block", {}, {"weight_scale_inv": None}, r"has no scale beside it"),
        ("fp8-block", {}, {"weight_scale_inv": torch.ones(3, 3)}, r"scales do not fit the weight"),
        ("fp8-block", {"weight_block_size": "x"}, {}, r"weight_block_size='x'"),
    ],
)
def test_files_that_do_not_prove_their_config_are_refused(
    name: str, settings: dict[str, Any], other: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    base = changed(name, tmp_path / "base", settings, **other)
    with pytest.raises(oftsurgery.FormatError, match=message):
        oftsurgery.fold_checkpoint(base, folders.adapter, tmp_path / "out", format="bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_of_another_shape_gives_a_typed_error_or_a_weight(name: str, tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj."
    whole = open_checkpoint(HOME / name)
    ends = [n.removeprefix(path) for n in whole.entries if n.startswith(path)]
    refused = 0
    for end, shape in itertools.product(ends, [(3,), (2, 3, 5)]):
        wrong = torch.zeros(shape).to(whole.read(f"{path}{end}").dtype)
        base = changed(name, tmp_path / f"{end}{shape}", **{end: wrong})
        try:
            found = dequantised(open_checkpoint(base)).read(f"{path}weight")
        except oftsurgery.OFTSurgeryError:
            refused += 1
        else:  # one scale for the whole weight, or a tensor that no weight needs
            assert found.shape == values(name)[f"{path}weight"].shape
    assert refused >= 4


# --- the other commands -----------------------------------------------------------------------------------------------


def test_a_calibration_and_texts_run_the_dequantised_model(folders: Folders, tmp_path: Path) -> None:
    base = HOME / "gptq-4-gptq"
    generator = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(0, 32, (2, 24), generator=generator)} for _ in range(4)]
    weights = {"trained_on": "plain"}
    for place, name, said in ((base, "out", {}), (folders.plain("gptq-4-gptq"), "plain", weights)):
        quiet_fold(
            place, folders.adapter, tmp_path / name, format="nf4", calibration=batches, rounding="calibrated", **said
        )
    assert not differing(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, folders.adapter, texts=batches)
    assert report.ok, str(report)
    assert report.on_texts is not None
    assert report.on_texts.kept > 0.5


def test_settings_of_activations_and_files_of_the_package_do_not_go_on(folders: Folders, tmp_path: Path) -> None:
    base = changed("ct-float8-channel", tmp_path / "base", input_scale=torch.ones(1), k_scale=torch.ones(1))
    (base / "quantize_config.json").write_text("{}")
    quiet_fold(base, folders.adapter, tmp_path / "out", format="bf16")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not [n for n in file.keys() if n.endswith("scale")]  # noqa: SIM118 - no mapping


def test_unfold_goes_back_to_the_dequantised_weights(folders: Folders, tmp_path: Path) -> None:
    base, out = HOME / "gptq-3-gptq-asym-act", tmp_path / "out"
    quiet_fold(base, folders.adapter, out, format="fp32")
    with pytest.raises(oftsurgery.StateError, match=r"another format than its base.*rotate back"):
        oftsurgery.unfold_checkpoint(out, tmp_path / "back", base=base)
    with pytest.warns(oftsurgery.UnfoldWarning):
        oftsurgery.unfold_checkpoint(out, tmp_path / "back", adapter=folders.adapter)
    found = tensors(tmp_path / "back")
    for name, tensor in values("gptq-3-gptq-asym-act").items():
        assert relative(found[name].double(), tensor.double()) < 1e-6


def test_extract_finds_the_adapter_in_a_merge_of_a_quantised_base(folders: Folders, tmp_path: Path) -> None:
    quiet_fold(HOME / "awq-gemv-g64", folders.adapter, tmp_path / "out", format="fp32")
    found = oftsurgery.extract_checkpoint(HOME / "awq-gemv-g64", tmp_path / "out", block_size=16)
    turns = rotations_in(folders.adapter)
    assert found.modules.keys() == turns.keys()


def test_a_killed_run_goes_on_and_gives_the_same_bytes(folders: Folders, tmp_path: Path) -> None:
    base, more = HOME / "gptq-8-gptq_v2", {"format": "bf16", "max_shard_size": 20_000}
    quiet_fold(base, folders.adapter, tmp_path / "whole", **more)

    def killed(done: int, total: int, what: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet_fold(base, folders.adapter, tmp_path / "out", **more, progress=killed)
    left = {p: p.stat().st_mtime_ns for p in (tmp_path / ".out.oftsurgery").glob("*.safetensors")}
    assert left
    assert not (tmp_path / "out").exists()
    quiet_fold(base, folders.adapter, tmp_path / "out", **more, resume=True)
    whole, resumed = (file_bytes(tmp_path / name) for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert whole == resumed


def test_few_dequantised_weights_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = 40
    held = load_file(HOME / "gptq-4-gptq" / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj."
    own = {n.removeprefix(path): t for n, t in held.items() if n.startswith(path)}
    (tmp_path / "base").mkdir()
    tensors_ = {f"layers.{i}.{n}": t.clone() for i in range(layers) for n, t in own.items()}
    save_file(tensors_, tmp_path / "base" / "model.safetensors")
    settings = json.loads((HOME / "gptq-4-gptq" / "config.json").read_text())["quantization_config"]
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": settings}))
    adapter = make_case("0.21 exact", 64, 64).adapter
    rotation = next(iter(adapter.modules.values()))
    adapter = replace(adapter, modules={f"layers.{i}": rotation for i in range(layers)}, config={})
    made: list[weakref.ref[Tensor]] = []
    most = 0
    read = DequantisedCheckpoint.read

    def watched(self: DequantisedCheckpoint, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        made.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in made))
        return tensor

    monkeypatch.setattr(DequantisedCheckpoint, "read", watched)
    record = quiet_fold(tmp_path / "base", adapter, tmp_path / "out", format="bf16")
    assert len(record.modules) == len(made) == layers
    assert most < 12


def test_the_commands(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = str(HOME / "hqq-4-g64-axis1"), str(tmp_path / "out")
    assert cli.main(["plan", base, str(folders.adapter), "--format", "bf16"]) == 0
    assert "hqq" in capsys.readouterr().out
    assert cli.main(["fold", base, str(folders.adapter), out, "--format", "bf16", "--quiet"]) == 0
    assert cli.main(["verify", out, base, str(folders.adapter)]) == 0
    assert cli.main(["doctor", out, "--base", base, "--adapter", str(folders.adapter)]) == 0
    assert cli.main(["doctor", base]) == 0
    broken = changed("hqq-4-g64-axis1", tmp_path / "broken", scale=None)
    assert cli.main(["doctor", str(broken)]) == 1
    assert "a tensor of the quantised weight is missing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quantised_base_becomes_a_graph(folders: Folders, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    command = ["export", "--base", str(HOME / "gptq-4-gptq"), "--adapter", str(folders.adapter), "--output", out]
    assert cli.main([*command, "--format", "onnx", "--verify"]) == 0
    assert (tmp_path / "out" / "model.onnx").is_file()
