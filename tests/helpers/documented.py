"""What the examples of docs and docstrings take as given: a llama, plain and in NF4, and adapters of it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import gguf_converter
import torch
from checkpoints import bnb_config, build, quiet_transformers
from peft import OFTConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import oftsurgery

ROOT = Path(__file__).parents[2]


def make_folders(place: Path) -> Path:
    """``place`` with ``PLAIN``, ``BASE`` (NF4, double quantisation), ``ADAPTER``, ``OLD``, ``texts.jsonl``, and a stand-in for
    llama.cpp's converter in ``llama.cpp``.
    """
    with quiet_transformers():
        build("llama").save_pretrained(place / "PLAIN")
        words = {word: i for i, word in enumerate(["[UNK]", "the", "quick", "brown", "fox"])}
        tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
        fast.save_pretrained(place / "PLAIN")
        base = AutoModelForCausalLM.from_pretrained(place / "PLAIN", quantization_config=bnb_config("nf4", double=True))
        base.save_pretrained(place / "BASE")
        fast.save_pretrained(place / "BASE")
        config = OFTConfig(oft_block_size=16, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False)
        live = get_peft_model(base, config)
        for name, parameter in live.named_parameters():
            if "oft_R" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        live.save_pretrained(place / "ADAPTER")
    shutil.copytree(ROOT / "tests" / "golden" / "peft-0.17.1" / "block16_exact", place / "OLD")
    texts = [json.dumps({"text": "the quick brown fox the brown quick fox the fox " * (1 + i % 4)}) for i in range(24)]
    (place / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    (place / "llama.cpp").mkdir()
    shutil.copy(gguf_converter.__file__, place / "llama.cpp" / "convert_hf_to_gguf.py")
    return place


def link_folders(folders: Path, into: Path) -> None:
    for path in (*folders.iterdir(), ROOT / "tools", ROOT / "tests" / "data" / "image"):
        (into / path.name).symlink_to(path)


@contextmanager
def without_our_warnings() -> Iterator[None]:
    with quiet_transformers(), warnings.catch_warnings():
        for name in oftsurgery.__all__:
            if isinstance(kind := getattr(oftsurgery, name), type) and issubclass(kind, Warning):
                warnings.simplefilter("ignore", kind)
        yield


def names_of_docstrings() -> dict[str, Any]:
    """What the names in public docstrings' examples are: models of the folders that lie in the working folder."""
    nf4 = AutoModelForCausalLM.from_pretrained("BASE").eval()
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "ADAPTER").eval()
    return {
        "oftsurgery": oftsurgery,
        "torch": torch,
        "bnb": bnb,
        "model": nf4,
        "live": live,
        "plain": AutoModelForCausalLM.from_pretrained("PLAIN").eval(),
        "inputs": torch.arange(32).reshape(4, 8) % 5,
    }
