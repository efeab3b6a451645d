"""What files of trainers beside an adapter say that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oftsurgery.adapters.trained_on import TRAINED_ON, trained_on_in
from oftsurgery.cli import arguments

CARD = """---
base_model: some/model
library_name: peft
---
# Model Card

## Training procedure

The following `bitsandbytes` quantization config was used during training:
{settings}

### Framework versions

- PEFT 0.21.2
"""
#: as peft writes transformers' settings
NF4_DOUBLE = {
    "quant_method": "QuantizationMethod.BITS_AND_BYTES",
    "_load_in_8bit": False,
    "_load_in_4bit": True,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "load_in_4bit": True,
    "load_in_8bit": False,
}


def card(**changed: Any) -> str:
    return CARD.format(settings="\n".join(f"- {name}: {value}" for name, value in (NF4_DOUBLE | changed).items()))


AXOLOTL = """base_model: some/model
adapter: qlora
load_in_8bit: false
load_in_4bit: true
"""
FACTORY = """### model
model_name_or_path: some/model
quantization_bit: 4
### method
stage: sft
finetuning_type: oft
"""
SWIFT = {"model": "some/model", "train_type": "lora", "quant_method": "bnb", "quant_bits": 4}
FILES: dict[str, tuple[str, str, str | None]] = {
    "peft's card": ("README.md", card(), "nf4-double"),
    "its simple form": ("README.md", card(quant_method="bitsandbytes", bnb_4bit_use_double_quant=False), "nf4"),
    "fp4": ("README.md", card(bnb_4bit_quant_type="fp4"), "fp4-double"),
    "int8": ("README.md", card(load_in_8bit=True, load_in_4bit=False), "int8"),
    "another method": ("README.md", card(quant_method="gptq"), None),
    "a card without the list": ("README.md", CARD.format(settings=""), None),
    "axolotl": ("qlora.yml", AXOLOTL, "nf4-double"),
    "axolotl, its own settings": (
        "a.yaml",
        AXOLOTL + "bnb_config_kwargs:\n  bnb_4bit_use_double_quant: false\n",
        "nf4",
    ),
    "axolotl in 8 bits": (
        "a.yaml",
        AXOLOTL.replace("8bit: false", "8bit: true").replace("4bit: true", "4bit: false"),
        "int8",
    ),
    "axolotl, 4 bits without qlora": ("a.yaml", AXOLOTL.replace("qlora", "lora"), None),
    "axolotl, plain": ("a.yaml", "base_model: some/model\nadapter: oft\n", "plain"),
    "axolotl's GPTQ": ("a.yaml", "base_model: some/model\nadapter: lora\ngptq: true\n", None),
    "axolotl's card": ("README.md", f"<details>\n\n```yaml\n{AXOLOTL}```\n\n</details>\n", "nf4-double"),
    "LLaMA-Factory": ("training_args.yaml", FACTORY, "nf4-double"),
    "LLaMA-Factory, one quantisation": ("t.yaml", FACTORY + "double_quantization: false\n", "nf4"),
    "LLaMA-Factory in 8 bits": ("t.yaml", FACTORY.replace("bit: 4", "bit: 8"), "int8"),
    "LLaMA-Factory, plain": ("t.yaml", FACTORY.replace("quantization_bit: 4\n", ""), "plain"),
    "LLaMA-Factory, another library": ("t.yaml", FACTORY + "quantization_method: hqq\n", None),
    "ms-swift": ("args.json", json.dumps(SWIFT), "nf4-double"),
    "ms-swift, fp4": (
        "args.json",
        json.dumps(SWIFT | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
        "fp4",
    ),
    "ms-swift, plain": ("args.json", json.dumps(SWIFT | {"quant_method": None, "quant_bits": None}), "plain"),
    "ms-swift, bits without a method": ("args.json", json.dumps(SWIFT | {"quant_method": None}), "plain"),
    "ms-swift, another library": ("args.json", json.dumps(SWIFT | {"quant_method": "hqq"}), None),
    "settings of something else": ("deepspeed.yaml", "zero_stage: 3\nload_in_4bit: true\n", None),
    "no YAML": ("a.yaml", "a: [1, 2\n b: {", None),
    "a type that is a list": (
        "a.yaml",
        AXOLOTL + "bnb_config_kwargs: {bnb_4bit_quant_type: [nf4], bnb_4bit_use_double_quant: false}\n",
        None,
    ),
    "nested beyond reading": ("README.md", card(llm_int8_skip_modules="[" * 50_000), "nf4-double"),
    "a thousand lists": ("README.md", card() * 90, "nf4-double"),
    "blocks that do not end": ("README.md", "\n```yaml\n" * 10_000, None),
    "no mapping": ("a.yaml", "- 1\n- 2\n", None),
    "code": ("a.yaml", "base_model: !!python/object/apply:os.system ['touch here']\nadapter: x\n", None),
    "a large file": ("a.yaml", AXOLOTL + "#" * (1 << 20), None),
    "no JSON": ("args.json", "{", None),
    "an unknown type": ("a.yaml", AXOLOTL + "bnb_config_kwargs: {bnb_4bit_quant_type: nf5}\n", None),
}


@pytest.mark.parametrize("case", FILES)
def test_what_a_file_says(case: str, tmp_path: Path) -> None:
    name, text, expected = FILES[case]
    (tmp_path / name).write_text(text)
    assert [(one.name, one.source) for one in trained_on_in(tmp_path)] == (
        [] if expected is None else [(expected, name)]
    )
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_modules_that_stayed_plain_are_said_too(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card(llm_int8_skip_modules=["lm_head", "score"]))
    assert [one.skip for one in trained_on_in(tmp_path)] == [("lm_head", "score")]


def test_the_trainers_folder_counts_for_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "qlora.yml").write_text(AXOLOTL)
    for name, count in (("checkpoint-500", 1), ("adapter", 0)):
        (tmp_path / name).mkdir()
        assert len(trained_on_in(tmp_path / name)) == count


def test_files_that_agree_say_it_once_and_others_are_all_told(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card() + card())
    (tmp_path / "qlora.yml").write_text(AXOLOTL)
    assert [(one.name, one.source) for one in trained_on_in(tmp_path)] == [("nf4-double", "README.md")]
    (tmp_path / "args.json").write_text(json.dumps(SWIFT | {"quant_bits": 8}))
    assert [one.name for one in trained_on_in(tmp_path)] == ["nf4-double", "int8"]


def test_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "there").write_text(AXOLOTL)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "qlora.yml").symlink_to(tmp_path / "there")
    assert trained_on_in(tmp_path / "beside") == []


def test_the_command_line_has_the_same_names() -> None:
    assert tuple(TRAINED_ON) == arguments.TRAINED_ON
