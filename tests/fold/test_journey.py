"""From the end of a training to a folder in 16 bit: transformers' Trainer trains QOFT over NF4 with double quantisation, and the
shortest command gives what the live model computes, or a refusal that names the choice.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODELS, bnb_config, build, load, unpacked
from peft import OFTConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from oftsurgery.cli import main as cli

CLS = MODELS["llama"][0]
NF4 = {"quantization_config": bnb_config("nf4", double=True)}
TEXTS = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(3))

AXOLOTL = "base_model: {base}\nadapter: qlora\nload_in_4bit: true\n"
LLAMA_FACTORY = "model_name_or_path: {base}\nfinetuning_type: oft\nquantization_bit: 4\nquantization_method: bnb\n"
SWIFT = {
    "model": "m",
    "quant_method": "bnb",
    "quant_bits": 4,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
CARD = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: True
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: True
- bnb_4bit_compute_dtype: bfloat16

### Framework versions
"""
#: what each trainer leaves beside the adapter that says what it was trained on
TRAINERS: dict[str, dict[str, str]] = {
    "axolotl's card": {"README.md": f"---\nlibrary_name: peft\n---\n<details>\n\naxolotl version: `0.9`\n```yaml\n{AXOLOTL}\n```\n\n</details>\n"},
    "axolotl's settings": {"config.yml": AXOLOTL},
    "LLaMA-Factory": {"training_args.yaml": LLAMA_FACTORY},
    "ms-swift": {"args.json": json.dumps(SWIFT)},
    "peft's card": {"README.md": CARD},
}  # fmt: skip


class Run:
    """A training that has ended: the plain base, the base in 4 bits, the Trainer's folder, and the live model's logits."""

    def __init__(self, folder: Path) -> None:
        self.base, self.quantised, self.out = folder / "base", folder / "quantised", folder / "out"
        build("llama", torch.bfloat16).save_pretrained(self.base)
        model = load(self.base, CLS, **NF4)
        model.save_pretrained(self.quantised)
        config = OFTConfig(
            oft_block_size=16, target_modules="all-linear", task_type="CAUSAL_LM", use_cayley_neumann=True
        )
        args = TrainingArguments(
            self.out, max_steps=4, save_steps=2, learning_rate=2e-2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            get_peft_model(model, config), args, train_dataset=[{"input_ids": t, "labels": t} for t in TEXTS]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the trainer's
            trainer.train()
            trainer.save_model()
        live = PeftModel.from_pretrained(load(self.base, CLS, **NF4), str(self.out))
        self.logits = logits(unpacked(live))
        self.moved = kl(self.logits, logits(load(self.base, CLS, **NF4)))

    def folder(self, trainer: str, at: Path) -> Path:
        """The Trainer's folder, with the files of another trainer beside the adapter."""
        shutil.copytree(self.out, at)
        (at / "README.md").unlink(missing_ok=True)
        for name, text in TRAINERS.get(trainer, {}).items():
            (at / name).write_text(text.replace("{base}", str(self.base)))
        return at


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TEXTS).logits.double()


def kl(live: Tensor, other: Tensor) -> float:
    """The mean over all tokens of KL(live ‖ other), in nats."""
    a, b = live.log_softmax(-1), other.log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def off(run: Run, out: Path) -> float:
    model = load(out, CLS)
    assert model.dtype == torch.bfloat16
    return kl(run.logits, logits(model.float()))


def test_the_training_moved_the_model(run: Run) -> None:
    assert run.moved > 0.02
    assert {p.name for p in run.out.iterdir()} >= {"checkpoint-2", "checkpoint-4", "adapter_model.safetensors"}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("checkpoint", ["", "checkpoint-4"])
def test_the_shortest_command_with_the_trainers_files(trainer: str, checkpoint: str, run: Run, tmp_path: Path) -> None:
    adapter = run.folder(trainer, tmp_path / "adapter") / checkpoint
    assert cli.main(["fold", str(run.base), str(adapter), str(tmp_path / "out")]) == 0
    assert off(run, tmp_path / "out") < 1e-3
    assert cli.main(["merge", str(adapter), str(tmp_path / "without base")]) == 0
    assert off(run, tmp_path / "without base") == off(run, tmp_path / "out")


def test_the_trainers_own_folder_is_refused_by_the_choice(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([str(run.base), str(run.out)], [str(run.out)]):
        assert cli.main(["fold", *words, str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "say --trained-on plain, or --trained-on nf4-double" in said
        assert "trained_on=" not in said
    assert cli.main(["fold", str(run.out), str(tmp_path / "out"), "--trained-on", "nf4-double"]) == 0
    near = off(run, tmp_path / "out")
    assert near < 1e-3
    assert cli.main(["fold", str(run.out), str(tmp_path / "wrong"), "--trained-on", "plain"]) == 0
    assert off(run, tmp_path / "wrong") > 20 * near


def test_from_the_base_that_was_saved_in_4_bits(run: Run, tmp_path: Path) -> None:
    words = ["fold", str(run.quantised), str(run.out), str(tmp_path / "out"), "--format", "bf16"]
    assert cli.main(words) == 0
    assert off(run, tmp_path / "out") < 1e-3
    assert cli.main([*words[:3], str(tmp_path / "said"), *words[4:], "--trained-on", "nf4-double"]) == 0
    assert cli.main([*words[:3], str(tmp_path / "refused"), *words[4:], "--trained-on", "plain"]) == 2
