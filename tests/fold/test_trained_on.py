"""A plain base gets the quantisation that the adapter was trained on, by the trainer's files or the caller, and the record
says what was done.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODELS, adapted, bnb_config, build, differing, load, outputs, tensors
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


def fold(trained: Trained, name: str, out: Path, **options: Any) -> tuple[oftsurgery.FoldRecord, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = oftsurgery.fold_checkpoint(trained.base, trained.adapter(name), out, **options)
    return record, [str(w.message) for w in caught if w.category is oftsurgery.SourceWarning]


@pytest.mark.parametrize("name", BASES)
def test_the_shortest_call_is_near_the_live_model(name: str, trained: Trained, tmp_path: Path) -> None:
    """Plain weights as the base's, of the base as it was in training."""
    record, told = fold(trained, name, tmp_path / "out")
    said = f"the adapter was trained on {name}, as training_args.yaml beside it says; trained_on=… (--trained-on) says"
    assert [text.startswith(said) for text in told] == [True]
    assert (record.base["trained_on"], record.base["trained_on_source"]) == (name, "training_args.yaml")
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
        record, told = fold(trained, "plain", tmp_path / "nobody says")
        assert told == []
        assert "trained_on" not in record.base
        assert record.base["fold_into"] == "original"  # nothing was quantised
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
    with pytest.raises(oftsurgery.StateError, match="was trained on nf4-double, but the base is stored as nf4 "):
        oftsurgery.fold_checkpoint(tmp_path / "nf4", adapter, tmp_path / "out", trained_on="nf4-double")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        record = oftsurgery.fold_checkpoint(tmp_path / "nf4", adapter, tmp_path / "out", trained_on="nf4")
    assert (record.base["trained_on"], record.base["fold_into"]) == ("nf4", "quantized")


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"fold_into": "original"}])
def test_two_ways_to_say_it(options: Any, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(oftsurgery.StateError, match="other settings say it too"):
        oftsurgery.fold_checkpoint(
            trained.base, trained.adapter("nf4"), tmp_path / "out", trained_on="nf4", format="bf16", **options
        )
    with pytest.raises(oftsurgery.StateError, match="'gptq' is nothing that an adapter is trained on"):
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
