"""What goes along with a model's weights: by kind in its folder, by what its index files name elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from oftsurgery.errors import CheckpointError
from oftsurgery.files.carried import carried_from, missing_in
from oftsurgery.files.checkpoint import open_checkpoint

KINDS = {
    "generation_config.json": True,
    "tokenizer.json": True,
    "chat_template.jinja": True,
    "LICENSE": True,
    "LICENSE.md": True,
    "vocab.txt": True,
    "tokenizer.model": True,
    "tokenizer.model.v3": True,
    "source.spm": True,
    "qwen.tiktoken": True,
    "tekken.json": True,
    "bpe.codes": True,
    "preprocessor_config.json": True,
    "video_preprocessor_config.json": True,
    "model-00002.safetensors": False,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": False,
    "model.fp16.safetensors.index.json": False,
    "tf_model.h5": False,
    "flax_model.msgpack": False,
    "model.onnx": False,
    "model.gguf": False,
    "training_args.bin": False,
    "optimizer.pt": False,
    "scheduler.json": False,
    "trainer_state.json": False,
    "eval_results.json": False,
    "train.jsonl": False,
    "results.csv": False,
    "modeling_own.py": False,
    "adapter_config.json": False,
    "adapter_model.safetensors": False,
    "onnx/": False,
}
ANEW = ("config.json", "README.md", "oftsurgery.json", "model.safetensors.index.json", "model-00001.safetensors")


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return folder


def test_kinds_of_files(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys([*(n for n in KINDS if not n.endswith("/")), *ANEW, ".gitattributes", ".env"], "x"))
    (tmp_path / "onnx").mkdir()
    found = carried_from(tmp_path, ["model-00001.safetensors"])
    assert set(found.files) == {name for name, carried in KINDS.items() if carried}
    assert set(found.left_out) == {name for name, carried in KINDS.items() if not carried}
    assert found.code == ()
    assert found.lost == {}
    assert found.nbytes == len(found.files)


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "./2_Router/", "type": "sentence_transformers.models.Router"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    {"idx": 4, "name": "4", "path": "4_Own", "type": "own_pooling.Own"},
]


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "modules.json": MODULES,
            "sentence_bert_config.json": {},
            "config_sentence_transformers.json": {},
            "1_Pooling/config.json": {},
            "1_Pooling/README.md": "",
            "1_Pooling/optimizer.pt": "",
            "2_Router/router_config.json": {"types": {"a_Dense": "x", "b_Asym": "y"}, "structure": {}},
            "2_Router/a_Dense/config.json": {},
            "2_Router/a_Dense/model.safetensors": "weights",
            "2_Router/b_Asym/config.json": {"types": {"c_Dense": "x"}, "structure": {}},
            "2_Router/b_Asym/c_Dense/config.json": {},
            "2_Router/b_Asym/c_Dense/pytorch_model.bin": "",
            "2_Router/stray/config.json": {},
            "own_pooling.py": "from .own_parts import x\n",
            "own_parts.py": "",
            "4_Own/own_pooling.py": "",
            "checkpoint-5/config.json": {},
        },
    )
    found = carried_from(tmp_path)
    assert set(found.files) == {
        "1_Pooling/config.json",
        "2_Router/a_Dense/config.json",
        "2_Router/a_Dense/model.safetensors",
        "2_Router/b_Asym/c_Dense/config.json",
        "2_Router/b_Asym/config.json",
        "2_Router/router_config.json",
        "4_Own/own_pooling.py",
        "config_sentence_transformers.json",
        "modules.json",
        "own_parts.py",
        "own_pooling.py",
        "sentence_bert_config.json",
    }
    assert found.code == ("4_Own/own_pooling.py", "own_parts.py", "own_pooling.py")
    assert dict(found.lost) == {"2_Router/b_Asym/c_Dense/pytorch_model.bin": "a pickle, which could run code when read"}
    assert set(found.left_out) == {
        "1_Pooling/README.md",
        "1_Pooling/optimizer.pt",
        "2_Router/b_Asym/c_Dense/pytorch_model.bin",
        "2_Router/stray/",
        "checkpoint-5/",
    }


def test_model_code_that_configs_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "config.json": {"auto_map": {"AutoModel": "modeling_a.A", "AutoConfig": "else/where--conf.C"}},
            "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_b.B", None]}, "vocab_file": "v.dic"},
            "processor_config.json": {"image_processor": {"auto_map": {"AutoImageProcessor": "imaging.I"}}},
            "modeling_a.py": "import torch\nfrom .parts import p\n  from .lazy import l\nfrom .../../secret import s\n",
            "parts.py": "import .deep \nfrom .modeling_a import circular\n",
            **dict.fromkeys(("lazy.py", "deep.py", "tokenization_b.py", "imaging.py", "unnamed.py", "conf.py"), ""),
            "v.dic": "",
            "w.dic": "",
            "custom_generate/generate.py": "from .helper import h\n",
            "custom_generate/helper.py": "",
            "custom_generate/requirements.txt": "",
            "custom_generate/other.py": "",
        },
    )
    found = carried_from(tmp_path)
    code = {"deep.py", "imaging.py", "lazy.py", "modeling_a.py", "parts.py", "tokenization_b.py"}
    code |= {"custom_generate/generate.py", "custom_generate/helper.py"}
    assert set(found.code) == code
    assert set(found.files) == code | {
        "custom_generate/requirements.txt", "processor_config.json", "tokenizer_config.json", "v.dic",
    }  # fmt: skip
    assert found.left_out == ("conf.py", "unnamed.py", "w.dic")


def test_folders_that_transformers_finds_by_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "additional_chat_templates/tool_use.jinja": "",
            "additional_chat_templates/notes.txt": "",
            "qformer_tokenizer/tokenizer_config.json": {},
            "qformer_tokenizer/vocab.txt": "",
            "qformer_tokenizer/model.safetensors": "",
            "speaker_embeddings_path.json": {"repo_or_path": "x", "v": {"a": "voices/a.npy", "b": "../b.npy"}},
            "voices/a.npy": "",
            "voices/c.npy": "",
        },
    )
    assert set(carried_from(tmp_path).files) == {
        "additional_chat_templates/tool_use.jinja",
        "qformer_tokenizer/tokenizer_config.json",
        "qformer_tokenizer/vocab.txt",
        "speaker_embeddings_path.json",
        "voices/a.npy",
    }


def test_what_is_named_and_not_there(tmp_path: Path) -> None:
    """What is still to be downloaded of a repository."""
    write(
        tmp_path,
        {
            "config.json": {"auto_map": {"AutoModel": "modeling_a.A"}},
            "tokenizer_config.json": {
                "vocab_file": "words.dic",
                "other_file": "../x",
                "third_file": "y.pkl",
                "z_file": None,
            },
            "modules.json": MODULES[1:2],
            "1_Pooling/config.json": {},
        },
    )
    assert missing_in(tmp_path) == ["words.dic", "modeling_a.py", "1_Pooling/*.safetensors*"]
    write(tmp_path, {"words.dic": "", "modeling_a.py": "from .parts import p\n", "1_Pooling/model.safetensors": ""})
    assert missing_in(tmp_path) == ["parts.py"]


@pytest.mark.parametrize("text", ["", "[", "5", "[5]", '[{"path": 3}]', '{"path": "x"}', "[" * 3000])
def test_an_index_that_cannot_be_read_names_nothing(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"modules.json": text, "tokenizer_config.json": text, "router_config.json": text})
    assert len(carried_from(tmp_path).files) == 3


def test_the_list_of_what_stays_behind_is_short(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:03}.csv": "" for i in range(130)})
    left_out = carried_from(tmp_path).left_out
    assert len(left_out) == 101
    assert left_out[-1] == "… and 30 more"


def test_weights_in_a_subfolder_are_pointed_to(tmp_path: Path) -> None:
    """As sentence-transformers once saved a model."""
    write(tmp_path, {"modules.json": [], "0_Transformer/model.safetensors": "", "0_Transformer/config.json": {}})
    with pytest.raises(CheckpointError, match=r"its subfolder '0_Transformer' holds weights.*give the subfolder"):
        open_checkpoint(tmp_path)


def test_the_patterns_of_downloads_name_every_kind_that_is_copied(tmp_path: Path) -> None:
    """But the files that have no ending in common, which nothing names."""
    from fnmatch import fnmatch

    from oftsurgery.files.carried import PATTERNS

    for name in [name for name, copied in KINDS.items() if copied]:
        assert any(fnmatch(name, pattern) for pattern in PATTERNS), name
