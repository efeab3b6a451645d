"""A plain base gets the quantisation that the adapter was trained on, by the trainer's files or the caller, and the record
says what was done.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODELS, adapted, bnb_config, build, differing, load, outputs, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import oftsurgery
from oftsurgery.cli import main as cli

CLS = MODELS["llama"][0]
LINEARS = ["q_proj", "v_proj", "down_proj"]
#: what the live base is, by the name of what the adapter was trained on
BASES: dict[str, dict[str, Any]] = {
    "nf4-double": {"quantization_config": bnb_config("nf4", double=True)},
    "nf4": {"quantization_config": bnb_config("nf4")},
    "fp4": {"quantization_config": bnb_config("fp4")},
    "int8": {"quantization_config": bnb_config("int8")},
    "plain": {},
}
#: LLaMA-Factory's settings that say so
SAID = {
    "nf4-double": "quantization_bit: 4\n",
    "nf4": "quantization_bit: 4\ndouble_quantization: false\n",
    "fp4": "quantization_bit: 4\nquantization_type: fp4\ndouble_quantization: false\n",
    "int8": "quantization_bit: 8\n",
    "plain": "",
}


class Trained:
    """A plain base, and for each kind of base an adapter that was trained on it, with the trainer's file beside."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        build("llama", torch.bfloat16).save_pretrained(self.base)
        self.logits: dict[str, Tensor] = {}
        for name, options in BASES.items():
            live = adapted(load(self.base, CLS, **options), LINEARS)
            self.logits[name] = outputs(live)
            live.save_pretrained(self.adapter(name))
            (self.adapter(name) / "training_args.yaml").write_text(
                f"model_name_or_path: some/model\nfinetuning_type: oft\n{SAID[name]}"
            )

    def adapter(self, name: str) -> Path:
        return self.folder / name

    def off(self, name: str, folder: Path) -> float:
        wanted = self.logits[name]
        return float((outputs(load(folder, CLS)) - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def fold(trained: Trained, name: str | Path, out: Path, **options: Any) -> tuple[oftsurgery.FoldRecord, list[str]]:
    adapter = trained.adapter(name) if isinstance(name, str) else name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = oftsurgery.fold_checkpoint(options.pop("base", trained.base), adapter, out, **options)
    return record, [str(w.message) for w in caught if w.category is oftsurgery.SourceWarning]


@pytest.mark.parametrize("name", BASES)
def test_the_shortest_call_is_near_the_live_model(name: str, trained: Trained, tmp_path: Path) -> None:
    """Plain weights as the base's, of the base as it was in training."""
    record, told = fold(trained, name, tmp_path / "out")
    said = f"the adapter was trained on {name}, as training_args.yaml says; trained_on=… (--trained-on) says"
    assert [text.startswith(said) for text in told] == [True]
    assert (record.base["trained_on"], record.base["trained_on_source"]) == (name, "training_args.yaml")
    assert f"| trained on | `{name}` (`training_args.yaml`) |" in (tmp_path / "out" / "README.md").read_text()
    assert record.base["fold_into"] == ("original" if name == "plain" else "quantized")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    near = trained.off(name, tmp_path / "out")
    assert near < (0.05 if name == "int8" else 0.02)
    if name not in ("plain", "int8"):
        fold(trained, name, tmp_path / "wrong", trained_on="plain")
        assert trained.off(name, tmp_path / "wrong") > 5 * near
    assert oftsurgery.verify_checkpoint(tmp_path / "out", trained.base, trained.adapter(name)).ok


def test_what_the_caller_says_counts(trained: Trained, tmp_path: Path) -> None:
    record, told = fold(trained, "plain", tmp_path / "said", trained_on="nf4-double")
    assert told == []
    assert (record.base["trained_on"], record.base["trained_on_source"]) == ("nf4-double", "trained_on")
    (trained.adapter("plain") / "training_args.yaml").rename(tmp_path / "away")
    try:
        fold(trained, "plain", tmp_path / "by hand", format="bf16", quantize="nf4", double_quant=True)
        assert differing(tensors(tmp_path / "said"), tensors(tmp_path / "by hand")) == []
        with pytest.raises(oftsurgery.StateError, match="nobody says what the adapter was trained on") as refused:
            fold(trained, "plain", tmp_path / "nobody says")
        assert "--trained-on plain" in str(refused.value)
        assert "--trained-on nf4-double" in str(refused.value)
        assert not (tmp_path / "nobody says").exists()
        for options in ({"fold_into": "original"}, {"format": "nf4"}, {"format": "bf16", "quantize": "nf4"}):
            record, told = fold(trained, "plain", tmp_path / "-".join(options.values()), **options)
            assert told == []
            assert "trained_on" not in record.base
            assert record.base["fold_into"] == options.get("fold_into", "quantized")
    finally:
        (tmp_path / "away").rename(trained.adapter("plain") / "training_args.yaml")


@pytest.mark.parametrize(
    ("name", "format_"), [("nf4-double", "nf4"), ("nf4-double", "bnb"), ("int8", "bnb"), ("plain", "nf4")]
)
def test_quantised_outputs(name: str, format_: Any, trained: Trained, tmp_path: Path) -> None:
    record, _ = fold(trained, name, tmp_path / "out", format=format_)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["load_in_8bit"] == (name == "int8")
    assert settings["bnb_4bit_use_double_quant"] == (name == "nf4-double")
    assert record.base["fold_into"] == ("original" if name == "plain" else "quantized")
    assert oftsurgery.verify_checkpoint(tmp_path / "out", trained.base, trained.adapter(name)).ok


def test_a_quantised_base_must_be_stored_so(trained: Trained, tmp_path: Path) -> None:
    load(trained.base, CLS, **BASES["nf4"]).save_pretrained(tmp_path / "nf4")
    adapter = trained.adapter("nf4")
    with pytest.raises(
        oftsurgery.StateError,
        match=r"was trained on nf4-double, as trained_on=… .--trained-on. says, but the base is stored as nf4 ",
    ):
        oftsurgery.fold_checkpoint(tmp_path / "nf4", adapter, tmp_path / "out", trained_on="nf4-double")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        record = oftsurgery.fold_checkpoint(tmp_path / "nf4", adapter, tmp_path / "out", trained_on="nf4")
    assert (record.base["trained_on"], record.base["fold_into"]) == ("nf4", "quantized")


def test_the_trainers_files_must_agree_with_a_quantised_base(trained: Trained, tmp_path: Path) -> None:
    model, base, other = load(trained.base, CLS, **BASES["nf4"]), tmp_path / "nf4", trained.adapter("nf4-double")
    model.save_pretrained(base)
    says = "trained on nf4-double, as training_args.yaml says, but the"
    with pytest.raises(oftsurgery.StateError, match=rf"{says} base is stored as nf4 .*trained_on='nf4' "):
        oftsurgery.fold_checkpoint(base, other, tmp_path / "out")
    for changed in (oftsurgery.fold, oftsurgery.wrap):
        with pytest.raises(oftsurgery.StateError, match=rf"{says} model's weights are in nf4 "):
            changed(model, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        said = oftsurgery.fold_checkpoint(base, other, tmp_path / "said", trained_on="nf4")
        found = oftsurgery.fold_checkpoint(base, trained.adapter("nf4"), tmp_path / "found")
        live = oftsurgery.fold(model, trained.adapter("nf4")).oftsurgery
    assert said.base["trained_on_source"] == "trained_on"
    for record in (found, live):
        assert (record.base["trained_on"], record.base["trained_on_source"]) == ("nf4", "training_args.yaml")


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"fold_into": "original"}])
def test_two_ways_to_say_it(options: Any, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(oftsurgery.StateError, match="other arguments say it too"):
        oftsurgery.fold_checkpoint(
            trained.base, trained.adapter("nf4"), tmp_path / "out", trained_on="nf4", format="bf16", **options
        )
    with pytest.raises(
        oftsurgery.StateError, match="'gptq' is neither a format that adapters are trained on nor a file"
    ):
        oftsurgery.fold_checkpoint(trained.base, trained.adapter("nf4"), tmp_path / "out", trained_on="gptq")


def test_settings_that_contradict_what_it_was_trained_on(trained: Trained, tmp_path: Path) -> None:
    base, adapter = trained.base, trained.adapter("nf4")
    for said in ({}, {"trained_on": "nf4"}):
        for text, options in (
            (
                "double quantisation was asked for, but .* says that the adapter was trained on nf4",
                {"format": "nf4", "double_quant": True},
            ),
            ("is quantised first, which an undo record does not take back", {"undo": tmp_path / "undo"}),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", oftsurgery.SourceWarning)
                with pytest.raises(oftsurgery.StateError, match=text):
                    oftsurgery.fold_checkpoint(base, adapter, tmp_path / "out", **said, **options)
    assert list(tmp_path.iterdir()) == []


def test_quantised_weights_without_a_config_say_what_they_are(trained: Trained, tmp_path: Path) -> None:
    """The base's tensors tell that it is quantised, so the trainer's file is not asked, and the record does not call it plain."""
    load(trained.base, CLS, **BASES["nf4"]).save_pretrained(tmp_path / "nf4")
    config = tmp_path / "nf4" / "config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "quantization_config"})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        record = oftsurgery.fold_checkpoint(tmp_path / "nf4", trained.adapter("nf4-double"), tmp_path / "out")
    assert record.base["fold_into"] == "quantized"


def test_files_that_disagree(trained: Trained, tmp_path: Path) -> None:
    args = trained.adapter("nf4") / "args.json"
    args.write_text(json.dumps({"model": "x", "quant_method": "bnb", "quant_bits": 8}))
    try:
        with pytest.raises(oftsurgery.StateError, match=r"do not agree .*training_args.yaml: nf4, args.json: int8"):
            oftsurgery.fold_checkpoint(trained.base, trained.adapter("nf4"), tmp_path / "out")
        fold(trained, "nf4", tmp_path / "out", trained_on="nf4")
    finally:
        args.unlink()


def test_the_command_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(trained.base), str(trained.adapter("nf4"))]
    assert cli.main(["plan", *words]) == 0
    said = capsys.readouterr()
    assert "trained on: nf4 (training_args.yaml)\n" in said.out
    assert "SourceWarning: the adapter was trained on nf4, as training_args.yaml" in said.err
    assert cli.main(["plan", *words, "--trained-on", "plain", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trained_on"] == {"name": "plain", "source": "trained_on"}
    assert plan["fold_into"] == "original"
    assert cli.main(["fold", *words, str(tmp_path / "out"), "--trained-on", "nf4-double", "-q"]) == 0
    assert json.loads((tmp_path / "out" / "oftsurgery.json").read_text())["base"]["quantize"] == "nf4"


def with_base(trained: Trained, base: object, folder: Path) -> Path:
    """A copy of the plain adapter, without the trainer's file, whose config names ``base``."""
    shutil.copytree(trained.adapter("plain"), folder)
    (folder / "training_args.yaml").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


def test_a_quantised_base_that_the_config_names_says_it(trained: Trained, tmp_path: Path) -> None:
    load(trained.base, CLS, **BASES["fp4"]).save_pretrained(tmp_path / "fp4")
    adapter = with_base(trained, str(tmp_path / "fp4"), tmp_path / "adapter")
    record, told = fold(trained, adapter, tmp_path / "out")
    assert told[0].startswith("the adapter was trained on fp4, as config.json of fp4 says")
    assert (record.base["trained_on"], record.base["trained_on_source"]) == ("fp4", "config.json of fp4")
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    for elsewhere in (str(tmp_path / "nowhere"), "owner/name", str(trained.base), None, 3):
        other = with_base(trained, elsewhere, tmp_path / f"adapter {str(elsewhere)[-4:]}")
        with pytest.raises(oftsurgery.StateError, match="nobody says"):
            oftsurgery.fold_checkpoint(trained.base, other, tmp_path / "refused")


def test_the_base_is_left_out(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_base(trained, str(trained.base), tmp_path / "adapter")
    adapter = str(folder)
    _, told = fold(trained, folder, tmp_path / "python", base=None, trained_on="plain")
    assert told == [f"the base is {trained.base}, which the adapter's config names"]
    for at, words in enumerate(
        (
            ["merge", adapter, "OUT", "--trained-on", "plain"],
            ["fold", adapter, "--trained-on", "plain", "OUT"],
            ["fold", "--trained-on", "plain", str(trained.base), "-q", adapter, "OUT"],
            [
                "export",
                "--adapter",
                adapter,
                "--output",
                "OUT",
                "--format",
                "bf16",
                "--trained-on",
                "plain",
                "--verify",
            ],
        )
    ):
        out = tmp_path / str(at)
        assert cli.main([str(out) if word == "OUT" else word for word in words]) == 0
        assert differing(tensors(out), tensors(tmp_path / "python")) == []
        assert ("which the adapter's config names" in capsys.readouterr().err) == (str(trained.base) not in words)
    assert cli.main(["plan", adapter, "--trained-on", "plain"]) == 0
    assert f"base: {trained.base}\n" in capsys.readouterr().out


def test_no_base_is_named(trained: Trained, tmp_path: Path) -> None:
    nameless = with_base(trained, None, tmp_path / "nameless")
    gone = with_base(trained, "./gone", tmp_path / "gone")
    here = with_base(trained, str(trained.base), tmp_path / "here")
    for text, adapter in (
        ("the adapter's config names no base", nameless),
        ("the base that the adapter's config names, './gone', is not here", gone),
        ("the adapters' configs name several: .*base, ./gone", [here, gone]),
    ):
        with pytest.raises(oftsurgery.StateError, match=text):
            oftsurgery.fold_checkpoint(None, adapter, tmp_path / "out", trained_on="plain")


def test_a_release_that_trains_on_plain_weights_only(golden: Path, tmp_path: Path) -> None:
    """peft 0.14 and 0.15 multiply what a layer stores, so that codes of 4 or 8 bits do not train."""
    base = tmp_path / "base"
    base.mkdir()
    save_file(load_file(golden / "peft-0.15.2" / "base.safetensors"), base / "model.safetensors")
    (base / "config.json").write_text("{}")
    record = oftsurgery.fold_checkpoint(base, golden / "peft-0.15.2" / "block16", tmp_path / "out")
    assert (record.base["trained_on"], record.base["trained_on_source"]) == ("plain", "its dialect peft-0.15")


def test_the_trainers_settings_from_elsewhere(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaMA-Factory keeps the file of its settings where the user wrote it."""
    settings = tmp_path / "llama3_oft_sft.yaml"
    settings.write_text("model_name_or_path: m\nfinetuning_type: oft\nquantization_bit: 4\nquantization_method: bnb\n")
    adapter = with_base(trained, str(trained.base), tmp_path / "adapter")
    record, told = fold(trained, adapter, tmp_path / "out", trained_on=settings)
    assert told == []
    assert (record.base["trained_on"], record.base["trained_on_source"]) == ("nf4-double", "llama3_oft_sft.yaml")
    fold(trained, adapter, tmp_path / "said", trained_on="nf4-double")
    assert differing(tensors(tmp_path / "out"), tensors(tmp_path / "said")) == []
    words = ["fold", str(trained.base), str(adapter), str(tmp_path / "command"), "-q", "--trained-on", str(settings)]
    assert cli.main(words) == 0
    assert differing(tensors(tmp_path / "command"), tensors(tmp_path / "said")) == []
    settings.write_text("model_name_or_path: m\nfinetuning_type: oft\nquantization_bit: 4\nquantization_method: hqq\n")
    assert cli.main([*words[:3], str(tmp_path / "refused"), *words[4:]]) == 2
    assert "the file holds no settings of axolotl, LLaMA-Factory or ms-swift that say" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::oftsurgery.RoundingWarning")
def test_a_model_in_memory_must_be_what_the_adapter_was_trained_on(trained: Trained, tmp_path: Path) -> None:
    plain = load(trained.base, CLS)
    text = "the adapter was trained on nf4-double, as training_args.yaml says, but the model's weights are plain"
    for act in (oftsurgery.fold, oftsurgery.wrap):
        with pytest.raises(oftsurgery.StateError, match=text):
            act(plain, trained.adapter("nf4-double"))  # type: ignore[operator]
    folded = oftsurgery.fold(plain, trained.adapter("plain"))
    assert folded.oftsurgery.base == {"trained_on": "plain", "trained_on_source": "training_args.yaml"}
    for name in ("nf4", "nf4-double", "int8"):
        live = load(trained.base, CLS, **BASES[name])
        folded = oftsurgery.fold(live, trained.adapter(name), trained_on=name, format="bf16")
        assert folded.oftsurgery.base["trained_on"] == name
        for other in {"nf4", "fp4", "plain", "int8"} - {name}:
            with pytest.raises(
                oftsurgery.StateError, match=f"trained on {other}, .* but the model's weights are in {name}"
            ):
                oftsurgery.fold(live, trained.adapter(name), trained_on=other)
    said = oftsurgery.fold(plain, trained.adapter("nf4"), trained_on="plain")
    assert said.oftsurgery.base["trained_on_source"] == "trained_on"
    with pytest.raises(oftsurgery.StateError, match="leave out trained_on"):
        oftsurgery.fold(adapted(load(trained.base, CLS), LINEARS), trained_on="plain")


@pytest.mark.filterwarnings("ignore::oftsurgery.RoundingWarning")
def test_a_model_in_memory_that_says_it_is_verified_on_disk(trained: Trained, tmp_path: Path) -> None:
    """The model was cast while it was loaded, which its record does not say."""
    build("llama").save_pretrained(tmp_path / "base")
    folded = oftsurgery.fold(load(tmp_path / "base", CLS, dtype=torch.bfloat16), trained.adapter("plain"))
    assert folded.oftsurgery.base["trained_on"] == "plain"
    oftsurgery.export_safetensors(folded, tmp_path / "out")
    report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", trained.adapter("plain"))
    assert report.ok, report.to_dict()
    assert "| base | the model in memory |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::oftsurgery.RoundingWarning")
@pytest.mark.parametrize("format_", ["fp16", "fp32", "nf4", "int8"])
def test_a_model_in_memory_that_changes_its_format_is_verified_on_disk(
    format_: Any, trained: Trained, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    live = load(tmp_path / "base", CLS, dtype=torch.bfloat16)
    folded = oftsurgery.fold(live, trained.adapter("plain"), format=format_)
    oftsurgery.export_safetensors(folded, tmp_path / "out")
    report = oftsurgery.verify_checkpoint(tmp_path / "out", tmp_path / "base", trained.adapter("plain"))
    assert report.ok, report.to_dict()
