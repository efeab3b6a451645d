"""Adapters from strong to weak: what the weights keep and what the outputs keep agree, and each remedy that is given helps."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import adapted, bnb_config, build, load
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig
from warned import noted, quietly

import oftsurgery
from oftsurgery import WeakAdapterWarning
from oftsurgery.api.reports import read_record
from oftsurgery.cli.main import main
from oftsurgery.records.advice import Case, remedies

TOKENS = torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def weak_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if w.category is WeakAdapterWarning]


# --- a tiny llama, in memory and on disk ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plain base, an adapter as weak as those that people train, and texts' tokens."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder / "base")
    adapted(build("llama"), TARGETS, use_cayley_neumann=False).save_pretrained(folder / "strong")
    oftsurgery.load_adapter(folder / "strong").scaled(0.25).save(folder / "weak")
    return folder


def folded_on_disk(llama: Path, out: Path, **settings: Any) -> list[str]:
    with noted() as caught:
        oftsurgery.fold_checkpoint(llama / "base", llama / "weak", out, **settings)
    return weak_warnings(caught)


@pytest.mark.parametrize(
    "settings",
    [
        {"trained_on": "nf4-double", "format": "nf4"},
        {"trained_on": "fp4", "format": "fp4"},
        {"trained_on": "nf4", "format": "bf16", "rounding": "preserve"},
        {"trained_on": "plain", "format": "nf4", "rounding": "preserve"},
    ],
    ids=str,
)
def test_verify_says_how_much_of_the_effect_is_kept_on_disk(
    llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """By the weights, by the outputs on given inputs, and by the fold's own record."""
    for rounding in ["nearest"] * ("rounding" not in settings) + ["preserve"]:
        out = tmp_path / rounding
        warned = folded_on_disk(llama, out, **settings | {"rounding": rounding})
        report = quietly(
            oftsurgery.verify_checkpoint, out, llama / "base", llama / "weak", texts=[{"input_ids": TOKENS}]
        )
        record = read_record(out)
        assert report.ok
        assert report.kept == pytest.approx(record.kept, abs=1e-3)
        assert report.on_texts.kept == pytest.approx(report.kept, abs=0.15)
        assert set(report.on_texts.modules) == set(record.modules)
        data = report.to_dict()
        assert (data["verdict"], data["on_texts"]["kept"]) == (report.verdict, report.on_texts.kept)
        lost = rounding == "nearest"
        assert bool(warned) is lost
        assert report.verdict.startswith("ok, but the rounding has undone a part of the adapter" if lost else "ok")
        assert "of the adapter's effect on logits is kept" in report.verdict
        assert "nats (KL)" in report.verdict
        assert bool(report.remedies) is report.weak


def test_each_command_that_a_warning_gives_helps(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line repeats its own words, so the commands run as they stand."""
    monkeypatch.chdir(tmp_path)
    base, adapter = str(llama / "base"), str(llama / "weak")
    assert (
        main(["fold", base, adapter, "out", "--trained-on", "nf4-double", "--format", "nf4", "--rounding", "nearest"])
        == 0
    )
    err = capsys.readouterr().err
    commands = [line.rpartition(": ")[2].strip() for line in err.split("what helps, best first")[1].split("; (")]
    commands = [command for command in commands if command.startswith("oftsurgery fold ")]
    assert [command.split("--force")[0].split()[-1] for command in commands][:2] == ["preserve", "texts.jsonl"]
    for command in commands:
        if "--calibration" in command or "--format int8" in command:
            continue  # the tiny model has no tokenizer; `test_commands_to_other_quantised_formats_run` folds to int8
        assert main(shlex.split(command)[1:]) == 0, command
        assert "WeakAdapterWarning" not in capsys.readouterr().err
        record = read_record("out")
        assert record.kept > 0.9
    assert main(["verify", "out", base, adapter]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok: the output computes what")


@pytest.mark.parametrize("stored", ["nf4", "plain"])
def test_what_the_doctor_and_verify_advise_on_disk_helps(llama: Path, tmp_path: Path, stored: str) -> None:
    """Also for a merge without a record, which any tool may have made."""
    base, trained = llama / "base", "nf4-double"
    if stored == "nf4":
        base = tmp_path / "stored"
        load(llama / "base", "LlamaForCausalLM", quantization_config=bnb_config("nf4", double=True)).save_pretrained(
            base
        )
    settings = {} if stored == "nf4" else {"format": "nf4", "trained_on": trained}
    out = tmp_path / "out"
    quietly(oftsurgery.fold_checkpoint, base, llama / "weak", out, rounding="nearest", **settings)
    (out / "oftsurgery.json").unlink()
    finding = next(f for f in oftsurgery.doctor(out, base=base, adapter=llama / "weak") if f.code == "adapter-lost")
    report = oftsurgery.verify_checkpoint(out, base, llama / "weak")
    assert report.remedies[0] in finding.remedy
    call = report.remedies[0].partition(": ")[2]
    for name, path in (("BASE", base), ("ADAPTER", llama / "weak"), ("OUTPUT", tmp_path / "again")):
        call = call.replace(f'"{name}"', repr(str(path)))
    record = quietly(eval, call, {"oftsurgery": oftsurgery})
    assert record.kept > 0.9


@pytest.mark.parametrize("trained", ["nf4-double", "plain"])
def test_commands_to_other_quantised_formats_run(llama: Path, tmp_path: Path, trained: str) -> None:
    """From a base that is quantised first, as the adapter was trained, and from a plain base."""
    settings = {"format": "nf4", "trained_on": trained, "rounding": "nearest"}
    quietly(oftsurgery.fold_checkpoint, llama / "base", llama / "weak", tmp_path / "out", **settings)
    record = read_record(tmp_path / "out")
    case = Case.of_record(record, next(iter(record.modules)))
    assert case is not None
    [remedy] = [r for r in remedies(case, commands=True) if "--format int8" in r.call]
    words = {"BASE": llama / "base", "ADAPTER": llama / "weak", "OUTPUT": tmp_path / "int8"}
    command = [str(words.get(word, word)) for word in shlex.split(remedy.call)[1:]]
    assert quietly(main, command) == 0
    record = read_record(tmp_path / "int8")
    assert record.kept > 0.9
    assert {module.format for module in record.modules.values()} == {"int8"}
    assert quietly(main, ["verify", str(tmp_path / "int8"), str(llama / "base"), str(llama / "weak")]) == 0


# --- MiniLM, trained ---------------------------------------------------------------------------------------------------

#: format of the base, factor of the adapter, rounding (or "peft" for peft's own merge), what the weights keep
MINILM = [
    ("nf4-double", 4, "nearest", (0.9, 1.0)),
    ("nf4-double", 2, "nearest", (0.3, 0.6)),
    ("nf4-double", 1, "nearest", (-0.05, 0.1)),
    ("nf4-double", 1, "preserve", (0.97, 1.03)),
    ("nf4-double", 1, "calibrated", (0.5, 0.8)),
    ("nf4-double", 1, "peft", (-0.05, 0.1)),
    ("nf4", 1, "grid", (-0.05, 0.1)),
    ("fp4", 1, "nearest", (0.0, 0.2)),
    ("fp4-double", 1, "preserve", (0.97, 1.03)),
    ("int8", 0.1, "nearest", (-0.05, 0.1)),
    ("int8", 0.1, "preserve", (0.97, 1.03)),
    ("bf16", 0.05, "nearest", (0.6, 0.85)),
]


@pytest.fixture(scope="module")
def minilm(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    """A function that loads MiniLM in a format; ``.adapter`` is a trained adapter, ``.inputs`` and ``.batches`` are texts."""
    folder = tmp_path_factory.mktemp("minilm")
    list(demo.fine_tune("NF4", folder, steps=6, rate=1e-3, size=8))

    def made(name: str) -> nn.Module:
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": name[:3], "bnb_4bit_use_double_quant": "double" in name}
        four |= {"bnb_4bit_compute_dtype": torch.float32}
        how = None if name == "bf16" else BitsAndBytesConfig(**({"load_in_8bit": True} if name == "int8" else four))
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        model = AutoModel.from_pretrained(
            demo.get_model_path(), quantization_config=how, dtype=dtype, add_pooling_layer=False
        )
        return demo.compute_in_float32(model.eval())

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(demo.tokenizer()(texts, padding=True, truncation=True, max_length=48, return_tensors="pt"))

    texts = [sentence for paragraph in demo.paragraphs()[0] for sentence in paragraph]
    made.adapter = folder
    made.inputs = [tokens(demo.held_out(32))]
    made.batches = [tokens(texts[i : i + 32]) for i in range(0, 128, 32)]
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "factor", "rounding", "expected"), MINILM, ids=str)
def test_weights_and_outputs_keep_the_same_share_and_remedies_help(
    demo: ModuleType,
    minilm: Any,
    tmp_path: Path,
    format_: str,
    factor: float,
    rounding: str,
    expected: tuple[float, float],
) -> None:
    """On a real model. The shares agree within 0.1 for 4-bit weights, and within 0.2 for calibrated and bf16 weights. Int8 layers
    round their inputs too, live and folded, so their outputs' share is lower than the weights' share, and has no band.
    """
    model, place = minilm(format_), tmp_path / "adapter"
    with noted():
        oftsurgery.load_adapter(minilm.adapter).scaled(factor).save(place)
    if rounding == "peft":
        from peft import PeftModel

        folded = PeftModel.from_pretrained(minilm(format_), place).merge_and_unload()
        code = {"adapter-lost", "kept"}
        finding = next(f for f in oftsurgery.doctor(folded, base=model, adapter=place) if f.code in code)
        kept, case = finding.evidence["kept"], Case("nf4", "nearest")
        assert remedies(case)[0].call in finding.remedy
    else:
        batches = minilm.batches if rounding == "calibrated" else None
        with noted() as caught:
            folded = oftsurgery.fold(model, place, rounding=rounding, calibration=batches)
        kept, case = folded.oftsurgery.kept, Case.of_record(folded.oftsurgery)
        assert bool(weak_warnings(caught)) is (case is not None)
    assert expected[0] <= kept <= expected[1]
    live = demo.compute_in_float32(oftsurgery.wrap(model, place))
    report = oftsurgery.verify(demo.compute_in_float32(folded), live, minilm.inputs)
    if format_ != "int8":
        assert report.kept == pytest.approx(kept, abs=0.2 if "bf16" in format_ or rounding == "calibrated" else 0.1)
        assert report.ok is (kept >= 0.9 or rounding == "calibrated")
    given = () if case is None else remedies(case)
    for remedy in given:
        names = {"oftsurgery": oftsurgery, "model": model, "batches": minilm.batches}
        with noted() as caught:
            helped = eval(remedy.call.replace('"ADAPTER"', repr(str(place))), names)  # noqa: S307
        assert not weak_warnings(caught), remedy
        if hasattr(helped, "oftsurgery"):
            assert "texts" in remedy.what or helped.oftsurgery.kept > 0.9, remedy
        better = oftsurgery.verify(demo.compute_in_float32(helped), live, minilm.inputs)
        assert better.outputs[better.main].relative < report.outputs[report.main].relative, remedy


@pytest.mark.parametrize("trained", ["nf4-double", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", ["coft with peft's own eps", "1e-6", "1e-5"])
def test_a_fold_of_a_very_weak_adapter_is_right(kind: str, trained: str, tmp_path: Path) -> None:
    """A single element may then make a third of the change, and chance decides which wrong merge a weight is near to."""
    build("llama").save_pretrained(tmp_path / "base")
    if kind.startswith("coft"):
        wrapped = adapted(build("llama"), TARGETS, use_cayley_neumann=False, coft=True, oft_block_size=32)
        with torch.no_grad():
            wrapped(TOKENS)  # the live layers bring their parameters within the limit
    else:
        wrapped = adapted(build("llama"), TARGETS, use_cayley_neumann=False, oft_block_size=32)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "oft_" in name:
                    parameter.mul_(float(kind) / 0.03)
    wrapped.save_pretrained(tmp_path / "adapter")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    codec = trained.removesuffix("-double")
    with noted() as caught:
        oftsurgery.fold_checkpoint(base, adapter, out, trained_on=trained, format=codec)
    assert (kind, codec) != ("1e-5", "nf4") or any("times as far as the adapter does" in str(w.message) for w in caught)
    assert oftsurgery.verify_checkpoint(out, base, adapter).ok
    assert not [f for f in quietly(oftsurgery.doctor, out, base=base, adapter=adapter) if f.severity == "error"]
