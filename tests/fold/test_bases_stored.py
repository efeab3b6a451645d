"""Folds that keep the format of a base which another package quantised: HQQ, compressed-tensors, FP8. What the packages' own quantisers
store of the same values lies in ``tests/data/bases-quantised`` (``tests/bases/packages.py``).
"""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, differing, file_bytes, load, quiet_fold, rotations_in, tensors
from independent import make_case, relative
from package_bases import CASES, HOME, STORED, Folders, changed, opened, values
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import oftsurgery
from oftsurgery.checks.package_weights import read_again
from oftsurgery.cli import main as cli
from oftsurgery.formats.codecs import encode
from oftsurgery.formats.packages.methods import METHODS
from oftsurgery.formats.packages.stored import Source, Stored, packed, unpacked
from oftsurgery.stores.dequantised import DequantisedCheckpoint

QUANTISED = Path(__file__).parents[1] / "data" / "bases-quantised"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    found = Folders(tmp_path_factory.mktemp("bases"))
    weak = shutil.copytree(found.adapter, found.adapter.with_name("weak"))
    file = weak / "adapter_model.safetensors"
    save_file({name: tensor * 0.15 for name, tensor in load_file(file).items()}, file)
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_the_mirror_of_unpacking(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 37), generator=torch.Generator().manual_seed(bits))
    words = packed(codes, bits)
    assert words.shape == (3, -(-37 * bits // 32))
    assert torch.equal(unpacked(words, bits, 37).long(), codes)


@pytest.mark.parametrize("name", STORED)
def test_values_are_stored_as_the_package_s_quantiser_stores_them(name: str) -> None:
    at = torch.arange(32 * 64, dtype=torch.float32).reshape(32, 64)
    path = "model.layers.0.self_attn.k_proj"
    form = opened(HOME / name).format(f"{path}.weight")
    found = form.kind.to_checkpoint("", encode((at * 37 % 101 - 50) * (at % 7 + 1) / 2048, form))
    theirs = load_file(QUANTISED / f"{name}.safetensors")
    assert {n.removeprefix(f"{path}.") for n in found} == theirs.keys()
    for end, want in theirs.items():
        got = found[f"{path}.{end}"]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), end
        if name.startswith("hqq") and end in ("W_q", "zero"):  # the last bits of a mean depend on the processor
            assert (got != want).float().mean() < 0.02, end
        else:
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (got, want))), end


@pytest.mark.parametrize("name", STORED)
def test_a_fold_in_the_base_s_own_format_and_the_ways_back(name: str, folders: Folders, tmp_path: Path) -> None:
    base, out = HOME / name, tmp_path / "out"
    record = quiet_fold(base, folders.adapter, out, undo=tmp_path / "record.undo")
    before, after = tensors(base), tensors(out)
    paths = [f"{path}." for path in record.modules]
    assert differing(before, after)
    assert not [n for n in differing(before, after) if not n.startswith(tuple(paths))]
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    settings = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (base, out)]
    assert settings[0] == settings[1]
    found = opened(out)
    for weight, exact in folders.exact(name).items():
        module = record.modules[weight.removesuffix(".weight")]
        assert module.error == pytest.approx(relative(found.read(weight).double(), exact), rel=1e-3)
        assert module.format == found.held[weight].label
        assert module.rounding == "nearest"
    assert "format" not in record.base
    card, method = (out / "README.md").read_text(), settings[0]["quant_method"]
    assert f"\n- {method}\n" in card
    needed = "transformers" if method == "fp8" else f"transformers and {method}"
    assert f"The model loads with {needed}:" in card
    assert "bitsandbytes:" not in card
    report = oftsurgery.verify_checkpoint(out, base, folders.adapter)
    assert report.ok, str(report)
    findings = oftsurgery.doctor(out, base=base, adapter=folders.adapter)
    assert {f.code for f in findings} <= {"kept", "adapter-lost"}
    for way in ({"base": base}, {"undo": tmp_path / "record.undo"}):
        back = tmp_path / next(iter(way))
        oftsurgery.unfold_checkpoint(out, back, **way)
        assert not differing(before, tensors(back))
        assert json.loads((back / "config.json").read_text())["quantization_config"] == settings[0]
    with pytest.warns(oftsurgery.UnfoldWarning, match="not bit-exact"):
        oftsurgery.unfold_checkpoint(out, tmp_path / "turned", adapter=folders.adapter)
    turned = opened(tmp_path / "turned")
    for weight in folders.exact(name):
        assert relative(turned.read(weight).double(), values(name)[weight].double()) < 0.35


@pytest.mark.parametrize("name", STORED)
def test_a_small_change_is_kept(name: str, folders: Folders, tmp_path: Path) -> None:
    """The package's own rounding puts most weights of few bits back where they were; the default rounding keeps the change."""
    base, kept, change, adapter = HOME / name, {}, {}, folders.adapter.with_name("weak")
    for rounding in ("nearest", "preserve"):
        out = tmp_path / rounding
        record = quiet_fold(base, adapter, out, rounding=rounding, undo=tmp_path / f"{rounding}.undo")
        kept[rounding], change[rounding] = [m.kept for m in record.modules.values()], record
        report = oftsurgery.verify_checkpoint(out, base, adapter)
        assert report.ok, str(report)
        assert all(report.modules[path].kept == pytest.approx(m.kept, abs=1e-3) for path, m in record.modules.items())
        assert {f.code for f in oftsurgery.doctor(out, base=base, adapter=adapter)} <= {"kept", "adapter-lost"}
        oftsurgery.unfold_checkpoint(out, tmp_path / f"{rounding}-back", undo=tmp_path / f"{rounding}.undo")
        assert not differing(tensors(base), tensors(tmp_path / f"{rounding}-back"))
    assert all(0.97 < k < 1.03 for k in kept["preserve"]), kept
    if not name.startswith("fp8") and "float" not in name and "int8" not in name:
        assert all(k < 0.9 for k in kept["nearest"]), kept
        assert {m.rounding for m in change["preserve"].modules.values()} == {"preserve"}
    for path, module in change["preserve"].modules.items():
        before, after = (opened(folder).stored(f"{path}.weight").tensors for folder in (base, tmp_path / "preserve"))
        own = [n for n in before if n != "weight" and not torch.equal(before[n], after[n])]
        assert not own or module.rounding == "nearest", path


@pytest.mark.parametrize("name", CASES)
def test_verify_reads_each_weight_by_code_of_its_own(name: str) -> None:
    first = opened(HOME / name)
    second = read_again(first, idle=False)
    assert {n: (e.dtype, e.shape) for n, e in first.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in second.entries.items()
    }
    assert not differing(*({n: one.read(n) for n in first.entries} for one in (first, second)))


def _rows_turned(stored: Stored, tensors_: Any) -> Tensor:
    return stored.decode(tensors_).roll(1, 0)


@pytest.mark.parametrize("format", ["bf16", "same"])
@pytest.mark.parametrize("name", ["gptq-4-gptq", "awq-gemm-g32", "torchao-int8", *STORED[1::3]])
def test_verify_finds_that_a_fold_has_read_the_weights_wrongly(
    name: str, format: Any, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each decoder of the fold is broken: it turns the rows of the weights around."""
    if format == "same" and name not in STORED:
        return

    def broken(method: str, source: Source) -> dict[str, Stored]:
        found = METHODS[method](source)
        return {n: replace(stored, decode=partial(_rows_turned, stored)) for n, stored in found.items()}

    with monkeypatch.context() as patch:
        patch.setattr("oftsurgery.stores.dequantised.METHODS", {m: partial(broken, m) for m in METHODS})
        quiet_fold(HOME / name, folders.adapter, tmp_path / "out", format=format)
        report = oftsurgery.verify_checkpoint(tmp_path / "out", HOME / name, folders.adapter)
    assert not report.ok
    assert len(report.wrong) >= 3
    assert not oftsurgery.verify_checkpoint(tmp_path / "out", HOME / name, folders.adapter).ok


@pytest.mark.parametrize("name", STORED)
def test_verify_finds_scales_and_codes_that_no_package_would_store(name: str, folders: Folders, tmp_path: Path) -> None:
    quiet_fold(HOME / name, folders.adapter, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj."
    scale = next(n for n in held if n.startswith(path) and "scale" in n and "quant_scale" not in n)
    codes = next(f"{path}{end}" for end in ("W_q", "weight_packed", "weight") if f"{path}{end}" in held)
    parts = "model.layers.0.self_attn.o_proj."
    other = codes.replace(path, parts)
    (tmp_path / "out" / "oftsurgery.json").unlink()  # whose hashes would tell
    for changed_name, tensor in (
        (scale, held[scale] * 1.5),
        (
            codes,
            held[codes].reshape(-1).roll(1, 0).reshape(held[codes].shape)
            if held[codes].element_size() > 1
            else held[codes].view(torch.uint8).roll(1, 0).view(held[codes].dtype),
        ),
        (other, held[other].view(torch.uint8).roll(1, 0).view(held[other].dtype)),
    ):
        save_file(held | {changed_name: tensor}, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        report = oftsurgery.verify_checkpoint(tmp_path / "out", HOME / name, folders.adapter)
        assert len(report.wrong) == 1, changed_name
    save_file(held, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert oftsurgery.verify_checkpoint(tmp_path / "out", HOME / name, folders.adapter).ok


def test_an_undo_record_of_a_package_s_layout_needs_this_layout(folders: Folders, tmp_path: Path) -> None:
    """transformers dequantises FP8 on a CPU, and the model in memory has plain weights."""
    out, undo = tmp_path / "out", tmp_path / "record.undo"
    quiet_fold(HOME / "fp8-block", folders.adapter, out, undo=undo)
    model = load(out, "LlamaForCausalLM")
    with pytest.raises(oftsurgery.UndoError, match=r"in the layout of fp8.*unfold_checkpoint"):
        oftsurgery.unfold(model, undo=undo)
    other = tmp_path / "other"
    quiet_fold(HOME / "fp8-tensor", folders.adapter, other)
    with pytest.raises(oftsurgery.OFTSurgeryError):
        oftsurgery.unfold_checkpoint(other, tmp_path / "back", undo=undo)
    assert not (tmp_path / "back").exists()


def test_settings_of_activations_stay_in_the_same_format(folders: Folders, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    changed("ct-float8-channel", base, input_scale=torch.full((1,), 0.5))
    quiet_fold(base, folders.adapter, out)
    name = "model.layers.0.self_attn.q_proj.input_scale"
    held = load_file(out / "model.safetensors")
    assert torch.equal(held[name], torch.full((1,), 0.5))
    assert oftsurgery.verify_checkpoint(out, base, folders.adapter).ok
    (out / "oftsurgery.json").unlink()  # whose hashes would tell
    for other in (None, torch.ones(1)):
        left = {n: t for n, t in held.items() if n != name} | ({} if other is None else {name: other})
        save_file(left, out / "model.safetensors", metadata={"format": "pt"})
        assert list(oftsurgery.verify_checkpoint(out, base, folders.adapter).wrong) == [name]


# --- what cannot be kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name not in STORED])
def test_formats_that_need_more_than_the_values_are_refused(name: str, folders: Folders, tmp_path: Path) -> None:
    method = name.partition("-")[0]
    for kind in ("same", "bnb"):
        with pytest.raises(
            oftsurgery.StateError, match=rf"stored as {method}, which oftsurgery reads and does not write.*choose"
        ):
            oftsurgery.fold_checkpoint(HOME / name, folders.adapter, tmp_path / "out", format=kind)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_a_package_s_format_is_refused(folders: Folders, tmp_path: Path) -> None:
    base, out = HOME / "hqq-4-bf16", tmp_path / "out"
    with pytest.raises(oftsurgery.StateError, match=r"bnb writes bitsandbytes' formats.*stored as hqq.*format='same'"):
        oftsurgery.fold_checkpoint(base, folders.adapter, out, format="bnb")
    batches = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    with pytest.raises(oftsurgery.StateError, match=r"keeps the format of hqq.*'preserve' needs no data"):
        oftsurgery.fold_checkpoint(base, folders.adapter, out, calibration=batches)
    with pytest.raises(oftsurgery.StateError, match=r"restores the bytes that a fold changes"):
        oftsurgery.fold_checkpoint(base, folders.adapter, out, format="bf16", undo=tmp_path / "x.undo")
    config = json.loads((base / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "quantization_config"}))
    adapted(model, ["q_proj"], modules_to_save=["up_proj"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(oftsurgery.StateError, match=r"its own values for this weight.*stores the weight as hqq.*bf16"):
        oftsurgery.fold_checkpoint(base, tmp_path / "saved", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
    quiet_fold(base, tmp_path / "saved", out, format="bf16")


@pytest.mark.parametrize("name", ["ct-int4-group-asym", "ct-int8-fp16"])
def test_layouts_that_the_package_no_longer_writes_are_refused(name: str, folders: Folders, tmp_path: Path) -> None:
    """compressed-tensors 0.20 has no order of activations."""
    index = (torch.arange(64) // 32).to(torch.int32)
    base = changed(name, tmp_path / "base", weight_g_idx=index if "int4" in name else index * 0)
    with pytest.raises(oftsurgery.StateError, match=r"reads and does not write.*q_proj"):
        oftsurgery.fold_checkpoint(base, folders.adapter, tmp_path / "out")
    quiet_fold(base, folders.adapter, tmp_path / "bf16", format="bf16")
    assert oftsurgery.verify_checkpoint(tmp_path / "bf16", base, folders.adapter).ok


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_gives_the_same_bytes(folders: Folders, tmp_path: Path) -> None:
    base, more = HOME / "ct-int4-group-asym", {"max_shard_size": 8_000}
    quiet_fold(base, folders.adapter, tmp_path / "whole", **more, undo=tmp_path / "whole.undo")

    def killed(done: int, total: int, what: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet_fold(base, folders.adapter, tmp_path / "out", **more, undo=tmp_path / "out.undo", progress=killed)
    assert list((tmp_path / ".out.oftsurgery").glob("*.safetensors"))
    quiet_fold(base, folders.adapter, tmp_path / "out", **more, undo=tmp_path / "out.undo", resume=True)
    assert file_bytes(tmp_path / "whole") == file_bytes(tmp_path / "out")
    assert (tmp_path / "whole.undo").read_bytes() == (tmp_path / "out.undo").read_bytes()


def test_many_folds_and_slices_give_the_same_bytes(folders: Folders, tmp_path: Path) -> None:
    base, weak = HOME / "hqq-4-g64-axis1", folders.adapter.with_name("weak")
    whole = {path: tmp_path / f"whole-{path.name}" for path in (folders.adapter, weak)}
    for adapter, out in whole.items():
        quiet_fold(base, adapter, out, rounding="preserve")
    folds = [{"adapter": str(adapter), "output": str(tmp_path / adapter.name)} for adapter in whole]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        oftsurgery.fold_many(base, folds)
        for arguments in (["--slice", "1/2"], ["--slice", "2/2"], ["--finish"]):
            assert cli.main(["fold", str(base), str(weak), str(tmp_path / "sliced"), *arguments, "--quiet"]) == 0
    for adapter, out in whole.items():
        assert file_bytes(out) == file_bytes(tmp_path / adapter.name)
    assert file_bytes(whole[weak]) == file_bytes(tmp_path / "sliced")


def test_few_weights_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, held = 40, load_file(HOME / "fp8-block" / "model.safetensors")
    own = {end: held[f"model.layers.0.self_attn.q_proj.{end}"] for end in ("weight", "weight_scale_inv")}
    (tmp_path / "base").mkdir()
    tensors_ = {f"layers.{i}.{n}": t.clone() for i in range(layers) for n, t in own.items()}
    save_file(tensors_, tmp_path / "base" / "model.safetensors")
    settings = json.loads((HOME / "fp8-block" / "config.json").read_text())["quantization_config"]
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": settings}))
    adapter = make_case("0.21 exact", 64, 64).adapter
    rotation = next(iter(adapter.modules.values()))
    adapter = replace(adapter, modules={f"layers.{i}": rotation for i in range(layers)}, config={})
    made: list[weakref.ref[Tensor]] = []
    most, stored = 0, DequantisedCheckpoint.stored

    def watched(self: DequantisedCheckpoint, name: str) -> Any:
        nonlocal most
        encoded = stored(self, name)
        made.append(weakref.ref(encoded.tensors["weight"]))
        most = max(most, sum(ref() is not None for ref in made))
        return encoded

    monkeypatch.setattr(DequantisedCheckpoint, "stored", watched)
    record = quiet_fold(tmp_path / "base", adapter, tmp_path / "out", undo=tmp_path / "undo")
    assert len(record.modules) == len(made) == layers
    assert most < 12


# --- the packages and the commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8-block", "fp8-tensor"])
def test_transformers_loads_the_stored_weights(name: str, folders: Folders, tmp_path: Path) -> None:
    """transformers dequantises FP8 on a CPU; ``tests/bases/live_layers.py`` loads the other formats with their packages."""
    quiet_fold(HOME / name, folders.adapter, tmp_path / "out")
    state = load(tmp_path / "out", "LlamaForCausalLM").state_dict()
    found = opened(tmp_path / "out")
    assert all(torch.equal(state[n], found.read(n)) for n in found.entries)


@pytest.mark.parametrize("name", CASES)
def test_every_command_takes_every_base(
    name: str, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = str(HOME / name), str(folders.adapter)
    for kind in ("bf16", "same") if name in STORED else ("bf16",):
        out, page = str(tmp_path / kind), str(tmp_path / f"{kind}.html")
        back, found = ([str(tmp_path / f"{kind}-{what}")] for what in ("back", "found"))
        commands = [
            ["plan", base, adapter, "--format", kind],
            ["fold", base, adapter, out, "--format", kind, "--quiet"],
            ["verify", out, base, adapter],
            ["doctor", out, "--base", base, "--adapter", adapter],
            ["report", out, "--html", page],
            ["show", out],
            ["extract", base, out, *found, "--block-size", "16", "--quiet"],
            ["unfold", out, *back, "--adapter", adapter, "--quiet"],
        ]
        for command in commands:
            assert cli.main(command) == 0, (command, capsys.readouterr())
        again = oftsurgery.load_adapter(found[0])
        assert again.modules.keys() == rotations_in(folders.adapter).keys()
    assert cli.main(["doctor", base]) == 0
    assert cli.main(["unfold", str(tmp_path / "bf16"), str(tmp_path / "x"), "--base", base]) == 2
    assert "use the base checkpoint itself" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gptq-4-gptq", "awq-gemm-g32", "ct-int4-group-asym", "hqq-4-bf16", "torchao-int8"])
def test_a_graph_is_made_of_the_dequantised_model(name: str) -> None:
    """No package of these formats is installed here."""
    from oftsurgery.onnx.export import load_model

    state = load_model(HOME / name).state_dict()
    assert all(torch.equal(state[n], t) for n, t in values(name).items())


@pytest.mark.slow
def test_a_base_and_its_fold_become_graphs(folders: Folders, tmp_path: Path) -> None:
    quiet_fold(HOME / "hqq-4-bf16", folders.adapter, tmp_path / "out")
    for source, graph in ((HOME / "hqq-4-bf16", "base"), (tmp_path / "out", "folded")):
        command = ["export", "--base", str(source), "--output", str(tmp_path / graph), "--format", "onnx"]
        assert cli.main(command) == 0
        assert (tmp_path / graph / "model.onnx").is_file()


def test_texts_compare_the_outputs(folders: Folders, tmp_path: Path) -> None:
    base, weak = HOME / "hqq-4-g64-axis1", folders.adapter.with_name("weak")
    generator = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(0, 32, (2, 24), generator=generator)} for _ in range(2)]
    quiet_fold(base, weak, tmp_path / "out", rounding="preserve")
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, weak, texts=batches)
    assert report.ok, str(report)
    assert report.on_texts is not None
    assert report.on_texts.kept > 0.5
