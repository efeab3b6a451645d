"""The export to GGUF: what the converter writes is compared, faults are refused, and nothing half-written stays.

The stand-in converter speaks the command line of llama.cpp's; `make test-gguf` runs llama.cpp's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import gguf_converter
import pytest
import torch
from checkpoints import quiet_transformers
from models import llama
from safetensors.torch import load_file, save_file

import oftsurgery
from oftsurgery.cli.main import main

CONVERTER = Path(gguf_converter.__file__)


def make_base(folder: Path, dtype: torch.dtype = torch.bfloat16, **kw: Any) -> Path:
    with quiet_transformers():
        llama(**kw).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """What gguf's own decoder makes of each tensor, in float32."""
    found = {}
    for t in gguf.GGUFReader(file).tensors:
        shape = [int(n) for n in reversed(t.shape)]
        found[t.name] = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).reshape(shape)
    return found


def nothing_left(place: Path, but: set[str]) -> bool:
    return {p.name for p in place.iterdir()} == but


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_file_holds_the_checkpoint(base: Path, tmp_path: Path, dtype: Any) -> None:
    report = oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER, dtype)
    assert (report.dtype, report.architecture, report.verified) == (dtype, "llama", True)
    assert len(report.changed) == 4  # q and k of two layers
    assert set(report.changed.values()) == {"rows reordered for the rotary pairs"}
    assert (report.equal, dict(report.uncompared), dict(report.left_out)) == (17, {}, {})
    stored, source = tensors_of(tmp_path / "out" / "model.gguf"), load_file(base / "model.safetensors")
    torch.testing.assert_close(
        stored["blk.1.ffn_down.weight"],
        source["model.layers.1.mlp.down_proj.weight"].float(),
        rtol=2**-8 if dtype == "bfloat16" else 2**-11,
        atol=1e-7,
    )
    record = json.loads((tmp_path / "out" / "oftsurgery.json").read_text("utf-8"))
    assert record["gguf"] == report.to_dict()
    assert set(record["files"]) == {"model.gguf", "Modelfile"}


def test_the_dtype_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    assert oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER).dtype == "float32"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fails", r"failed with exit code 7; its last lines: loading \| ValueError: Can not map tensor 'odd.weight'"),
        ("no file", "ended without an error and without a file"),
        ("garbage", "cannot be read as GGUF"),
        ("a wrong value", r"1 of 8192 values differ .*blk.1.ffn_down.weight"),
        ("rows as they are", r"differ .*rows reordered for the rotary pairs.*attn_[qk].weight"),
        ("rows in another order", r"differ .*blk.0.attn_v.weight"),
        ("another shape", r"another shape .*blk.0.attn_v.weight.*shape 64×32, expected 32×64"),
        ("lacks a tensor", r"lacks the tensor 'blk.1.ffn_up.weight'"),
    ],
)
def test_a_fault_of_the_converter_is_an_error_and_nothing_stays(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    with pytest.raises(oftsurgery.ExportError, match=said) as caught:
        oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER)
    assert caught.value.remedy
    assert nothing_left(tmp_path, {"base"})


def test_without_the_comparison_the_record_says_so(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "a wrong value")
    report = oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER, verify=False)
    assert (report.verified, report.equal, report.architecture) == (False, 0, None)


def test_what_cannot_be_compared_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "one more tensor")
    report = oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER)
    assert list(report.uncompared) == ["rope_freqs.weight"]


def test_another_order_in_an_architecture_without_rules_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_ARCHITECTURE", "orion")
    monkeypatch.setenv("STAND_IN_FAULT", "rows in another order")
    report = oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER)
    assert list(report.uncompared) == ["blk.0.attn_v.weight"]
    assert "in another order" in report.uncompared["blk.0.attn_v.weight"]
    monkeypatch.setenv("STAND_IN_FAULT", "a wrong value")
    with pytest.raises(oftsurgery.ExportError, match="values differ"):
        oftsurgery.export_gguf(base, tmp_path / "out2", CONVERTER)


def test_a_tied_head_is_named_and_an_untied_head_must_be_there(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    assert not oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER).left_out
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert list(oftsurgery.export_gguf(base, tmp_path / "out2", CONVERTER).left_out) == ["lm_head.weight"]
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(oftsurgery.ExportError, match=r"lacks the tensor 'output\.weight'"):
        oftsurgery.export_gguf(base, tmp_path / "out3", CONVERTER)


def test_values_too_large_for_float16_are_refused(base: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(oftsurgery.ExportError, match="too large for float16"):
        oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER, "float16")


def test_what_is_refused_before_the_converter_runs(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(oftsurgery.StateError, match=r"the converter does not exist .*nowhere.py"):
        oftsurgery.export_gguf(base, out, tmp_path / "nowhere.py")
    with pytest.raises(oftsurgery.StateError, match="the converter is a folder"):
        oftsurgery.export_gguf(base, out, tmp_path)
    with pytest.raises(oftsurgery.StateError, match="'int4' is not one of bfloat16, float16, float32"):
        oftsurgery.export_gguf(base, out, CONVERTER, "int4")  # type: ignore[arg-type]
    with pytest.raises(oftsurgery.StateError, match="cannot be started"):
        oftsurgery.export_gguf(base, out, CONVERTER, python=tmp_path / "no-python")
    with pytest.raises(oftsurgery.StateError, match="the destination is inside the model"):
        oftsurgery.export_gguf(base, base / "out", CONVERTER)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(oftsurgery.StateError, match=r"the checkpoint is quantised.*--format bf16"):
        oftsurgery.export_gguf(base, out, CONVERTER)
    assert nothing_left(tmp_path, {"base"})


def test_without_the_package_the_error_names_the_extra(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(oftsurgery.MissingDependencyError, match=r"gguf is not installed.*oftsurgery\[gguf\]"):
        oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER)


def test_an_existing_folder_stays_until_all_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(oftsurgery.StateError, match="exists"):
        oftsurgery.export_gguf(base, out, CONVERTER)
    monkeypatch.setenv("STAND_IN_FAULT", "a wrong value")
    with pytest.raises(oftsurgery.ExportError):
        oftsurgery.export_gguf(base, out, CONVERTER, force=True)
    assert nothing_left(out, {"mine"})
    monkeypatch.delenv("STAND_IN_FAULT")
    oftsurgery.export_gguf(base, out, CONVERTER, force=True)
    assert nothing_left(out, {"model.gguf", "Modelfile", "README.md", "oftsurgery.json"})


# --- the command ---


def test_the_command_exports_a_folder_or_a_fold(
    example_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, adapter = str(example_folders / "PLAIN"), str(example_folders / "ADAPTER")
    tool = ["--format", "gguf", "--converter", str(CONVERTER)]
    assert main(["export", plain, str(tmp_path / "a"), *tool, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    fold = ["--adapter", adapter, "--trained-on", "nf4-double", "--verify"]
    assert main(["export", "--base", plain, "--output", str(tmp_path / "b"), *fold, *tool]) == 0
    assert "tensors that hold the checkpoint's values" in capsys.readouterr().out
    assert nothing_left(tmp_path, {"a", "b"})
    # the file holds what a fold to bfloat16 holds
    with pytest.warns(oftsurgery.RoundingWarning):
        oftsurgery.fold_checkpoint(plain, adapter, tmp_path / "bf16", format="bf16", trained_on="nf4-double")
    oftsurgery.export_gguf(tmp_path / "bf16", tmp_path / "c", CONVERTER)
    assert (tmp_path / "b" / "model.gguf").read_bytes() == (tmp_path / "c" / "model.gguf").read_bytes()
    record = json.loads((tmp_path / "b" / "oftsurgery.json").read_text("utf-8"))
    assert record["adapters"]
    assert main(["show", str(tmp_path / "b")]) == 0
    assert "bfloat16, compared with the checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["B", "O", "--format", "gguf"], "--converter FILE"),
        (["B", "O", "--format", "onnx", "--converter", "c"], "no other format takes it"),
        (["B", "O", "--format", "bf16", "--adapter", "A", "--dtype", "float16"], "--dtype and --no-verify belong to"),
        (["B", "O", "--format", "gguf", "--converter", "c", "--with-past"], "--with-past belongs to"),
        (
            ["B", "O", "--format", "gguf", "--converter", "c", "--undo", "u", "--adapter", "A"],
            "a GGUF file cannot be unfolded",
        ),
        (["B", "O", "--format", "onnx", "--dtype", "bfloat16"], "no bfloat16 kernels"),
        (["B", "--format", "gguf", "--converter", "c"], "give BASE and OUTPUT, or"),
        (["B", "O", "--base", "B", "--format", "gguf", "--converter", "c"], "give BASE and OUTPUT, or"),
        (["--base", "B", "--format", "gguf", "--converter", "c"], "required: --output"),
        (["--output", "O", "--format", "gguf", "--converter", "c"], "required: --base, --adapter"),
    ],
)
def test_arguments_that_do_not_belong_together(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_converter_is_checked_before_the_fold(
    example_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(example_folders / "BASE"), str(tmp_path / "out"), "--adapter", "NOWHERE"]
    assert main([*words, "--format", "gguf", "--converter", str(tmp_path / "none.py")]) == 2
    assert "the converter does not exist" in capsys.readouterr().err


def test_a_model_without_a_chat_template_has_a_modelfile_without_one(base: Path, tmp_path: Path) -> None:
    report = oftsurgery.export_gguf(base, tmp_path / "out", CONVERTER)
    assert report.without_template == "the model has no chat template"
    assert "no TEMPLATE" in (tmp_path / "out" / "Modelfile").read_text("utf-8")
