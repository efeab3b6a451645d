"""A calibration without data: a language model with its adapter live writes the texts itself, and other text models read texts that
are built in.

Text that a model has sampled follows the distribution that the model itself has learned, the adapter's part of it included (the
idea is that of LLM-QAT, Liu et al. 2023). The starts are diverse: half of the windows begin as texts of the model begin, with
its first token, and half begin with a token that is drawn from the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.checks.verify_models import eval_mode
from oftsurgery.errors import CalibrationError, printable
from oftsurgery.stores.modules import inner_model

from .batches import Batch, tokenise
from .built_in_texts import TEXTS

#: windows in a batch of a calibration
_BATCH = 8
#: bytes of keys and values that one call of ``generate`` may hold
_CACHE_BYTES = 512 << 20

_REMEDY = "give inputs of the kind that the model is for: calibration=… (--calibration FILE)"


@dataclass(frozen=True)
class SelfTexts:
    """The settings of a calibration that a model writes itself.

    Attributes:
        windows: number of texts that the model samples.
        length: tokens of each text.
        seed: of the random numbers.
    """

    windows: int = 64
    length: int = 256
    seed: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the texts beside the model, as the record of a fold has it."""
        return {"texts": "self", "windows": self.windows, "length": self.length, "seed": self.seed}

    def batches(self, live: nn.Module, folder: Path | None = None) -> list[Batch]:
        """The batches of a calibration of ``live``, a transformers model whose adapters are live.

        Args:
            folder: folder of the model's tokenizer, which only a model needs that does not write; None: the folder or the cached
                Hub repository that the model came from.

        Raises:
            CalibrationError: the model neither writes nor reads texts, or has no tokenizer.
        """
        if can_write(live):
            return batches_of_windows(self.written(live))
        if not _reads_texts(live):
            name = printable(type(inner_model(live)).__name__)
            message = f"calibration='self' needs a model of texts, and the model is a {name}"
            raise CalibrationError(message, remedy=_REMEDY)
        at = folder or getattr(inner_model(live).config, "_name_or_path", None)
        if not at:
            message = "a model that does not write reads texts that are built in for calibration='self', and nobody says where its tokenizer is"
            raise CalibrationError(message, remedy=_REMEDY)
        return tokenise(TEXTS, at)

    def written(self, live: nn.Module) -> Tensor:
        """``(windows, length)`` tokens that the model samples."""
        model: Any = inner_model(live)
        config = model.config.get_text_config(decoder=True)
        device = model.get_input_embeddings().weight.device
        longest = getattr(config, "max_position_embeddings", None) or self.length
        length = min(self.length, int(longest))
        each = max(1, min(self.windows, _CACHE_BYTES // max(1, _cache_bytes(model, config, length))))
        with _seeded(self.seed, device), torch.inference_mode(False), torch.no_grad(), eval_mode(model):
            starts = self._starts(model, config).to(device)
            parts = [_sampled(model, part, length) for part in torch.split(starts, each)]
        return torch.cat(parts).cpu()

    def _starts(self, model: Any, config: Any) -> Tensor:
        """``(windows, 1)``: the first token of each text."""
        special = {_token(model, config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        others = torch.tensor([token for token in range(int(config.vocab_size)) if token not in special], device="cpu")
        drawn = others[torch.randint(len(others), (self.windows, 1), device="cpu")]
        first = _token(model, config, "bos_token_id")
        if first is not None:
            drawn[::2] = first
        return drawn


def can_write(live: nn.Module) -> bool:
    """Whether a model continues texts: a transformers model with a head of tokens, and without an encoder of its own."""
    model: Any = inner_model(live)
    writes = getattr(model, "can_generate", None)
    return bool(writes is not None and writes()) and not getattr(model.config, "is_encoder_decoder", False)


def batches_of_windows(windows: Tensor) -> list[Batch]:
    """The batches of a calibration of ``(n, length)`` tokens."""
    return [((), {"input_ids": part, "attention_mask": torch.ones_like(part)}) for part in torch.split(windows, _BATCH)]


def _reads_texts(live: nn.Module) -> bool:
    model: Any = inner_model(live)
    return hasattr(model, "config") and getattr(model, "main_input_name", None) == "input_ids"


def _sampled(model: Any, starts: Tensor, length: int) -> Tensor:
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        pad_token_id=0,
    )
    found: Tensor = model.generate(input_ids=starts, attention_mask=torch.ones_like(starts), generation_config=settings)
    return found


def _cache_bytes(model: Any, config: Any, length: int) -> int:
    """Bytes of the keys and values of one window."""
    heads = int(config.num_attention_heads)
    kept = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(config.num_hidden_layers) * kept * width * length * int(model.dtype.itemsize)


def _token(model: Any, config: Any, name: str) -> int | None:
    found = getattr(model.generation_config, name, None)
    found = getattr(config, name, None) if found is None else found
    found = found[0] if isinstance(found, Sequence) and found else found
    # configs name tokens that a small vocabulary does not have
    return int(found) if isinstance(found, int) and 0 <= found < int(config.vocab_size) else None


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers follow from ``seed`` inside the body; those of the caller go on as if the body had not been."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
