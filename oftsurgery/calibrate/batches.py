"""The batches of a calibration, as the model's forward takes them: given as tensors, or made of texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftsurgery.checks.verify_models import batches_of
from oftsurgery.errors import CalibrationError, needs, printable
from oftsurgery.hashing import hash_tensors

Batch = tuple[tuple[Any, ...], dict[str, Any]]

#: tokens of a text from a file, and texts a batch
TEXT_TOKENS, TEXTS = 512, 16

#: how transformers is installed, for a message
TRANSFORMERS = ("transformers", "pip install 'oftsurgery[peft]': a calibration must run the model")


def read_batches(calibration: Any) -> list[Batch]:
    """The batches of a calibration as ``(args, kwargs)`` of the model's forward: of a tensor, a tuple of arguments or a
    mapping of keyword arguments, or of an iterable of them, which is read once.

    Raises:
        CalibrationError: there are none, or they are text.
    """
    batches = list(batches_of([calibration] if _is_text(calibration) else calibration))
    if not batches:
        message = "the calibration holds no batches"
        raise CalibrationError(message, remedy="give at least one, better some hundred texts")
    for i, (args, kwargs) in enumerate(batches):
        values = (*args, *kwargs.values())
        if any(_is_text(v) or (isinstance(v, (list, tuple)) and any(map(_is_text, v))) for v in values):
            raise CalibrationError(
                "the calibration is text, and a model in memory comes without its tokenizer",
                remedy="tokenise it: calibration=[tokenizer(texts[i : i + 16], padding=True, return_tensors='pt') for i in "
                "range(0, len(texts), 16)]",
            )
        if not any(isinstance(v, Tensor) for v in values):
            remedy = "give what the model takes: a tensor, a tuple of arguments, or a mapping of keyword arguments"
            raise CalibrationError(f"calibration batch {i} holds no tensor", remedy=remedy)
    return batches


def _is_text(value: object) -> bool:
    return isinstance(value, (str, bytes))


def tokenise(texts: Sequence[str], folder: Path) -> list[Batch]:
    """Texts as a checkpoint's own tokenizer has them, each cut after :data:`TEXT_TOKENS`.

    Raises:
        CalibrationError: the checkpoint has no tokenizer that transformers reads without the checkpoint's own code.
        MissingDependencyError: transformers is not installed.
    """
    with needs(*TRANSFORMERS):
        import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a tokenizer is data of any kind, and its class raises what it likes
        message = f"the checkpoint's tokenizer cannot be loaded ({type(error).__name__}: {printable(error)})"
        remedy = "put its files beside the weights, or load the model and fold it in memory, with tokenised batches"
        raise CalibrationError(message, path=folder, remedy=remedy) from error
    length = min(int(tokenizer.model_max_length), TEXT_TOKENS)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    size = TEXTS if tokenizer.pad_token is not None else 1
    read = partial(tokenizer, padding=size > 1, truncation=True, max_length=length, return_tensors="pt")
    encoded = (read(list(texts[i : i + size])) for i in range(0, len(texts), size))
    batches: list[Batch] = [((), dict(batch)) for batch in encoded if batch["input_ids"].numel()]
    special = torch.tensor(tokenizer.all_special_ids)
    if all(bool(torch.isin(kwargs["input_ids"], special).all()) for _, kwargs in batches):
        # transformers makes up a tokenizer without words where the files have none
        message = "the checkpoint's tokenizer makes nothing of the texts but special tokens"
        raise CalibrationError(message, path=folder, remedy="put the tokenizer's files beside the weights")
    return batches


def batches_fingerprint(batches: Sequence[Batch]) -> str:
    """Content hash of the batches' tensors."""
    return hash_tensors(
        {
            f"{i}.{name}": value
            for i, (args, kwargs) in enumerate(batches)
            for name, value in (*enumerate(args), *kwargs.items())
            if isinstance(value, Tensor)
        }
    )


def batches_on(batches: Sequence[Batch], device: str) -> list[Batch]:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return [(tuple(map(moved, args)), {k: moved(v) for k, v in kwargs.items()}) for args, kwargs in batches]
