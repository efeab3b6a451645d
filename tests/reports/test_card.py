"""The model card: what it says, that its snippets run, and that what people wrote around it stays."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import adapted, build, load, quiet_fold
from hub_server import RELATIONS, problems
from huggingface_hub import ModelCard
from torch import nn

import oftsurgery
from oftsurgery import AdapterInfo, CheckpointError, FoldRecord, ModuleRecord, StateError
from oftsurgery.api.checkpoints import plan_fold
from oftsurgery.cli import main as cli
from oftsurgery.records import card

MARKED = re.compile(r"<!-- oftsurgery: what .*? -->.*<!-- oftsurgery: end -->", flags=re.DOTALL)
BASE_CARD = """---
license: other
license_name: llama3
language:
- en
- de
tags:
- mine
model-index:
- name: base
---
# Llama, the base

It scores 99 %.
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PLAIN (with a card), BASE (nf4), adapters ADAPTER and OTHER."""
    folder = tmp_path_factory.mktemp("card")
    build("llama").save_pretrained(folder / "PLAIN")
    (folder / "PLAIN" / "README.md").write_text(BASE_CARD)
    for i, name in enumerate(("ADAPTER", "OTHER")):
        adapted(build("llama"), ["q_proj", "down_proj"], seed=i).save_pretrained(folder / name)
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/llama"}))
    quiet_fold(folder / "PLAIN", folder / "ADAPTER", folder / "BASE", format="nf4")
    return folder


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def snippets(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def facts(text: str) -> dict[str, str]:
    """The first table: ``{name: value}``."""
    return dict(re.findall(r"^\| ([\w' -]+) \| (.*) \|$", text, flags=re.MULTILINE))


# --- what it says -----------------------------------------------------------------------------------------------------

FORMATS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "nf4": ({"format": "nf4"}, ["oft", "oftsurgery", "nf4", "bitsandbytes", "4-bit"], "quantized"),
    "int8": ({"format": "int8"}, ["oft", "oftsurgery", "int8", "bitsandbytes", "8-bit"], "quantized"),
    "bf16": ({"format": "bf16", "quantize": "nf4", "double_quant": True}, ["oft", "oftsurgery"], "merge"),
    "same": ({}, ["oft", "oftsurgery"], "merge"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_the_metadata_are_valid_and_the_tables_the_records_own(place: Path, tmp_path: Path, case: str) -> None:
    options, tags, relation = FORMATS[case]
    record = quiet_fold(place / "PLAIN", place / "ADAPTER", tmp_path / "out", **options)
    text = text_of(tmp_path / "out")
    assert problems(text) == []
    assert ModelCard(text).data.to_dict() == {
        "base_model": "org/llama",
        "base_model_relation": relation,
        "library_name": "transformers",
        "license": "other",
        "license_name": "llama3",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    assert relation in RELATIONS
    assert "It scores 99 %" not in text  # what the base's card claims is of the base
    assert text.count("\n# llama + ADAPTER\n") == 1
    adapter = record.adapters[0]
    said = facts(text)
    assert said["adapter"] == "`ADAPTER`"
    assert said["its SHA-256"] == f"`{adapter.sha256}`"
    assert said["its fingerprint"] == f"`{adapter.fingerprint}`"
    assert said["its dialect"] == f"`peft-0.21`, written by peft {adapter.peft_version}"
    assert said["rounding"] == "`nearest`"
    assert said["versions"] == ", ".join(f"{k} {v}" for k, v in record.versions.items())
    assert said["stored as"] == f"`{next(iter(record.modules.values())).format}`"
    quantised = options.get("quantize") or (case if case in ("nf4", "int8") else None)
    assert said["base"].startswith(f"quantised to `{quantised}`" if quantised else "the stored weights")
    rows = re.findall(r"^\| `(model[\w.]*)` \| `[^|]*` \| (\S+) \| (\S+) \| (\S+) \|$", text, flags=re.MULTILINE)
    worst = sorted(record.modules.items(), key=lambda item: -item[1].error)
    assert rows == [(p, f"{m.error:.2e}", f"{m.angle:.3f}", f"{m.defect:.1e}") for p, m in worst]
    assert "more, all in" not in text
    assert ("--base BASE" in text) == (case != "bf16")


def test_of_many_modules_the_worst_are_shown_and_the_others_counted() -> None:
    modules = {f"m.{i}": ModuleRecord("int8", "in", (16,), i / 1000, 0.0, 0.1, "a", "b") for i in range(36)}
    record = FoldRecord((AdapterInfo("a", "peft-0.21", "xxh3:0", None, None, None),), modules)
    text = card.section(record, {}, ["model.safetensors"], exact=True)
    assert re.findall(r"^\| `m\.(\d+)`", text, flags=re.MULTILINE) == [str(i) for i in range(35, 25, -1)]
    assert "The other 26 modules are in `oftsurgery.json`." in text
    assert "over 36 modules is 1.75e-02" in text
    assert "base_model" not in card.metadata(record, {}, [])


def test_the_card_is_a_function_of_its_inputs(place: Path, tmp_path: Path) -> None:
    for name in ("a", "elsewhere"):
        (tmp_path / name).mkdir()
        quiet_fold(place / "PLAIN", place / "ADAPTER", tmp_path / name / name, format="nf4")
    assert text_of(tmp_path / "a" / "a") == text_of(tmp_path / "elsewhere" / "elsewhere")
    assert str(tmp_path) not in text_of(tmp_path / "a" / "a")


def test_hostile_names_stay_text() -> None:
    bad = "`|</code><script>alert(1)</script>\x1b[2J\n# x [a](javascript:b) *b* " + card.END
    info = AdapterInfo(bad, bad, bad, bad, bad, bad)
    module = ModuleRecord(bad, bad, (16,), 0.1, 0.0, 0.1, bad, bad)
    base = {"quantize": bad, "fold_into": "quantized"}
    record = FoldRecord((info,), {bad: module}, saved={bad: None}, rounding=bad, base=base, versions={bad: bad})
    config = {"model_type": "x", "architectures": ['os; import("x")']}
    text = card.with_section(None, card.section(record, config, ["x.safetensors"], exact=True), {}, card._title(record))
    for wrong in ("<script", "\x1b", "</code><", "[a](", "*b*", "\n# x", "import("):
        assert wrong not in text
    assert text.count(card.END) == 1
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 6) for row in text.splitlines() if row.startswith("|"))


# --- its snippets run -------------------------------------------------------------------------------------------------


def run_python(code: str, folder: Path) -> dict[str, Any]:
    """A snippet as a reader would run it, in the folder of the card."""
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - it is what is tested
    return names


@pytest.mark.parametrize("case", FORMATS)
def test_loading_and_undoing_as_the_card_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    quiet_fold(place / "PLAIN", place / "ADAPTER", tmp_path / "out", **FORMATS[case][0])
    for name, target in (("BASE", "PLAIN"), ("ADAPTER", "ADAPTER")):
        (tmp_path / "out" / name).symlink_to(place / target)
    monkeypatch.chdir(tmp_path / "out")
    text = text_of(tmp_path / "out")
    (code,) = snippets(text, "python")
    model = run_python(code, tmp_path / "out")["model"]
    assert type(model).__name__ == "LlamaForCausalLM"
    kinds = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
    assert type(model.model.layers[0].self_attn.q_proj) is kinds.get(case, nn.Linear)
    (commands,) = snippets(text, "console")
    lines = [line.partition("#")[0].split()[2:] for line in commands.splitlines()]
    assert len(lines) == (1 if case == "bf16" else 2)
    for i, words in enumerate(lines):
        place_of = tmp_path / f"restored{i}"
        assert cli.main([str(place_of) if w == "RESTORED" else w for w in words] + ["-q"]) == 0, capsys.readouterr().err
        assert not (place_of / "README.md").exists()  # nothing is folded into it any more


def with_tokenizer(source: Path, folder: Path) -> Path:
    """A copy of ``source`` that knows five words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "The": 1, "quick": 2, "brown": 3, "fox": 4}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    shutil.copytree(source, folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_the_snippet_with_a_tokenizer_generates(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = with_tokenizer(place / "PLAIN", tmp_path / "base")
    quiet_fold(base, place / "ADAPTER", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    (code,) = snippets(text_of(tmp_path / "out"), "python")
    assert "AutoTokenizer" in code
    outputs = run_python(code, tmp_path / "out")["outputs"]
    assert outputs[0, :4].tolist() == [1, 2, 3, 4]
    assert outputs.shape[1] > 4


def test_a_graph_is_run_as_its_card_says(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = with_tokenizer(place / "PLAIN", tmp_path / "base")
    folded = tmp_path / "folded"
    quiet_fold(base, place / "ADAPTER", folded)
    (folded / "README.md").write_text(text_of(folded) + "\nWords of mine.\n")
    oftsurgery.export_onnx(folded, tmp_path / "out", "float32", verify=False)  # the snippet is compared below
    text = text_of(tmp_path / "out")
    assert problems(text) == []
    assert "Words of mine." in text
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("onnx", "merge")
    assert data["tags"] == ["oft", "oftsurgery", "onnx"]
    assert "A fold cannot be taken out of an ONNX graph" in text
    monkeypatch.chdir(tmp_path / "out")
    (code,) = snippets(text, "python")
    model = load(folded, "LlamaForCausalLM")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4]])).logits
    assert (torch.from_numpy(run_python(code, tmp_path)["outputs"][0]) - logits).abs().max() < 1e-4
    # neither a tokenizer nor an adapter: the card says what there is to say
    bare = card.section(FoldRecord((), {}), {}, ["model.onnx"], exact=False)
    assert "exported this model without a fold" in bare
    assert "session" in run_python(snippets(bare, "python")[0], tmp_path)
    assert oftsurgery.push_to_hub(tmp_path / "out", "a/b", dry_run=True).files.keys() >= {"model.onnx", "README.md"}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_other_models_name_the_class_that_loads_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(name).save_pretrained(tmp_path / "base")
    record = FoldRecord((AdapterInfo("a", "peft-0.21", "xxh3:0", None, None, None),), {})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    monkeypatch.chdir(tmp_path / "base")
    text = card.section(record, config, ["model.safetensors"], exact=True)
    (code,) = snippets(text, "python")
    assert [type(run_python(code, tmp_path)["model"]).__name__] == config["architectures"]
    expected = {"bert": "text-classification", "gpt2": "text-generation", "t5": None}
    assert card.metadata(record, config, []).get("pipeline_tag") == expected[name]


def test_a_model_that_is_not_transformers_own(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 128)

    from peft import OFTConfig, get_peft_model

    settings: dict[str, Any] = {"r": 0, "oft_block_size": 16, "target_modules": ["up"], "init_weights": False}
    folded = oftsurgery.fold(get_peft_model(Tiny(), OFTConfig(**settings)))
    record = oftsurgery.export_safetensors(folded, tmp_path / "out")
    assert record is not None
    assert "README.md" not in record.files
    monkeypatch.chdir(tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert problems(text) == []
    (code,) = snippets(text, "python")
    assert torch.equal(run_python(code, tmp_path)["tensors"]["up.weight"], folded.up.weight)
    assert facts(text)["base"] == "the model in memory"


# --- amending ---------------------------------------------------------------------------------------------------------


def test_a_second_fold_amends_the_card_and_leaves_what_people_wrote(place: Path, tmp_path: Path) -> None:
    source = shutil.copytree(place / "BASE", tmp_path / "source")
    text = text_of(source)
    mine = text.replace("# llama + ADAPTER", "# My model\n\nTrained on poems.").replace(
        "license: other", "license: mit"
    )
    mine = mine.replace("tags:\n", "tags:\n- poetry\n").replace("license_name: llama3\n", "datasets:\n- me/poems\n")
    (source / "README.md").write_text(mine + "\n## Limits\n\nNone known.\n")
    quiet_fold(source, place / "OTHER", tmp_path / "twice")
    new = text_of(tmp_path / "twice")
    outside, before = (MARKED.sub("…", ModelCard(t).text) for t in (new, text_of(source)))
    assert outside == before
    assert "Trained on poems." in outside
    assert "None known." in outside
    data = ModelCard(new).data.to_dict()
    assert (data["license"], data["datasets"], data["base_model"]) == ("mit", ["me/poems"], "org/llama")
    assert data["tags"] == ["poetry", "oft", "oftsurgery", "nf4", "bitsandbytes", "4-bit"]
    assert re.findall(r"^### (Fold \d)$", new, flags=re.MULTILINE) == ["Fold 1", "Fold 2"]
    assert new.count(card.BEGIN) == new.count(card.END) == 1
    # dequantised, it is no quantisation of the base any more
    quiet_fold(source, place / "OTHER", tmp_path / "dense", format="bf16")
    data = ModelCard(text_of(tmp_path / "dense")).data.to_dict()
    assert (data["base_model_relation"], data["tags"]) == ("merge", ["poetry", "oft", "oftsurgery"])
    # and one fold taken out again, the card says so
    oftsurgery.unfold_checkpoint(tmp_path / "twice", tmp_path / "once", base=source)
    assert text_of(tmp_path / "once") == text_of(source)
    # both, and what people wrote is left
    bases = shutil.copytree(place / "PLAIN", tmp_path / "plain")
    oftsurgery.unfold_checkpoint(tmp_path / "once", tmp_path / "none", base=bases)
    left = text_of(tmp_path / "none")
    assert "Trained on poems." in left
    assert card.BEGIN not in left
    assert ModelCard(left).data.to_dict() | {"base_model": None} == {
        "base_model": None,
        "datasets": ["me/poems"],
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["poetry"],
    }


def test_amending_twice_changes_nothing(place: Path) -> None:
    record = oftsurgery.FoldRecord.from_dict(json.loads((place / "BASE" / "oftsurgery.json").read_text()))
    new = card.section(record, {}, ["model.safetensors"], exact=True)
    more = card.metadata(record, {}, ["model.safetensors"])
    for text in (
        None,
        "",
        "Only words, and no metadata.",
        "---\ntags: one\nlicense: mit\n---\n# A card\n\nof its own\n",
        "---\r\nlicense: mit\r\n---\r\n# With\r\n\r\nWindows' line ends\r\n",
    ):
        once = card.with_section(text, new, more, "title")
        assert card.with_section(once, new, more, "other title") == once
        assert problems(once) == []
        if text is not None:
            text = text.replace("\r\n", "\n")
            body = ModelCard(f"---\n\n---\n{text}" if "---" not in text else text).text
            assert once.count(new) == 1
            assert body.rstrip() in once


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("---\n[\n---\n", "metadata cannot be read"),
        ("---\n- a\n---\n", "metadata cannot be read"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_card_that_cannot_be_read(place: Path, tmp_path: Path, text: Any, error: str) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    base = shutil.copytree(place / "PLAIN", tmp_path / "base")
    (base / "README.md").write_bytes(data)
    quiet_fold(base, place / "ADAPTER", tmp_path / "out")  # the base's own only lends its licence
    assert "license" not in ModelCard(text_of(tmp_path / "out")).data.to_dict()
    if not isinstance(text, bytes):
        source = shutil.copytree(place / "BASE", tmp_path / "source")
        (source / "README.md").write_bytes(data + card.BEGIN.encode())
        with pytest.raises(CheckpointError, match=error):
            plan_fold(source, place / "OTHER")
        with pytest.raises(CheckpointError, match=error):
            quiet_fold(source, place / "OTHER", tmp_path / "twice")
        assert not list(tmp_path.glob(".twice*"))


OURS = card.BEGIN + "\n\nnew\n\n" + card.END
HEAD = "---\nlicense: mit\n---\n"


@pytest.mark.parametrize(
    ("mine", "theirs", "merged"),
    [
        # nobody wrote anything: the folder's own
        (f"{HEAD}# a\n\n{OURS}\n", "---\n\n---\n", f"{HEAD}# a\n\n{OURS}\n"),
        # only they did
        (
            f"{HEAD}# a\n\n{OURS}\n",
            "---\nlicense: other\n---\nWords.\n",
            f"---\nlicense: other\n---\nWords.\n\n{OURS}\n",
        ),
        (
            f"{HEAD}# a\n\n{OURS}\n",
            f"---\nlicense: other\n---\n# b\n\nWords.\n\n{card.BEGIN}\nold\n{card.END}\nMore.\n",
            f"---\nlicense: other\n---\n# b\n\nWords.\n\n{OURS}\nMore.\n",
        ),
        # only we did
        (
            f"{HEAD}# a\n\nWords.\n\n{OURS}\n",
            f"---\nlicense: other\n---\n# b\n{OURS}\n",
            f"{HEAD}# a\n\nWords.\n\n{OURS}\n",
        ),
        # both, the same
        (
            f"{HEAD}# a\n\nWords.\n\n{OURS}\n",
            f"{HEAD}# a\n\nWords.\n\n{card.BEGIN}\nold\n{card.END}\n",
            f"{HEAD}# a\n\nWords.\n\n{OURS}\n",
        ),
        # no marks left in ours: it is theirs who took them out
        (f"{HEAD}Mine.\n", f"{HEAD}Theirs.\n", f"{HEAD}Mine.\n"),
    ],
)
def test_the_repositorys_card_keeps_its_words(mine: str, theirs: str, merged: str) -> None:
    assert card.merged(mine, theirs) == merged
    assert card.merged(mine, card.merged(mine, theirs)) == merged


def test_two_cards_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(StateError, match=r"people wrote into the card in the folder.*bring both texts together"):
        card.merged(f"{HEAD}# a\n\nMine.\n\n{OURS}\n", f"{HEAD}# a\n\nTheirs.\n\n{OURS}\n")
