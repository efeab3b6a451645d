"""The functions here read the batches of a calibration, as the model's forward takes them, from tensors or texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.checks.verify_models import batches_of
from oftsurgery.errors import CalibrationError, needs, printable
from oftsurgery.hashing import hash_tensors

from .texts import read_texts

Batch = tuple[tuple[Any, ...], dict[str, Any]]
#: function from the live model to the batches of a calibration
BatchesOf = Callable[[nn.Module], Sequence[Batch]]

#: the most tokens of a text from a file, and the number of texts in a batch
TEXT_TOKENS, TEXTS = 512, 16

#: the package that a calibration needs and how to install the package, for a message
TRANSFORMERS = ("transformers", "pip install 'oftsurgery[peft]': a calibration must run the model")


def read_batches(calibration: Any) -> list[Batch]:
    """The batches of a calibration as ``(args, kwargs)`` of the model's forward, from a tensor, a tuple of arguments, a
    mapping of keyword arguments, or an iterable of these, which is read once.

    Raises:
        CalibrationError: the calibration holds no batches, or texts.
    """
    batches = list(batches_of([calibration] if _is_text(calibration) else calibration))
    if not batches:
        message = "the calibration holds no batches"
        remedy = "give at least one batch, better some hundred texts (calibration=…, --calibration FILE)"
        raise CalibrationError(message, remedy=remedy)
    for i, (args, kwargs) in enumerate(batches):
        values = (*args, *kwargs.values())
        if any(_is_text(v) or (isinstance(v, (list, tuple)) and any(map(_is_text, v))) for v in values):
            raise CalibrationError(
                "the calibration is text, and a model in memory has no tokenizer",
                remedy="tokenise the texts: calibration=[tokenizer(texts[i : i + 16], padding=True, return_tensors='pt') for i in "
                "range(0, len(texts), 16)]",
            )
        if not any(isinstance(v, Tensor) for v in values):
            remedy = "give the model's inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments"
            raise CalibrationError(f"calibration batch {i} holds no tensor", remedy=remedy)
    return batches


def given_batches(texts: Any, folder: Path, **options: int) -> list[Batch]:
    """The batches of texts (a file or a list) by the tokenizer in ``folder``, or batches as they are."""
    if isinstance(texts, (str, PathLike)):
        texts = read_texts(Path(texts).expanduser())
    if isinstance(texts, (list, tuple)) and texts and all(isinstance(t, str) for t in texts):
        return tokenise(texts, folder, **options)
    return read_batches(texts)


def _is_text(value: object) -> bool:
    return isinstance(value, (str, bytes))


def tokenise(texts: Sequence[str], folder: Path | str, size: int = TEXTS) -> list[Batch]:
    """Batches of ``size`` texts by a checkpoint's own tokenizer; each text is cut after :data:`TEXT_TOKENS` tokens, or after the last
    position that the model has.

    Raises:
        CalibrationError: transformers cannot load the tokenizer without code from the checkpoint, or the model is an encoder with a
            decoder, which needs inputs for both.
        MissingDependencyError: transformers is not installed.
    """
    with needs(*TRANSFORMERS):
        import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer's files may hold anything, and its class raises errors of any kind
        message = f"the checkpoint's tokenizer cannot be loaded ({type(error).__name__}: {printable(error)})"
        remedy = "put the tokenizer's files beside the weights, or fold the model in memory with tokenised batches"
        raise CalibrationError(message, path=folder, remedy=remedy) from error
    length = min(int(tokenizer.model_max_length), TEXT_TOKENS, _positions(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    size = size if tokenizer.pad_token is not None else 1
    read = partial(tokenizer, padding=size > 1, truncation=True, max_length=length, return_tensors="pt")
    encoded = (read(list(texts[i : i + size])) for i in range(0, len(texts), size))
    batches: list[Batch] = [((), dict(batch)) for batch in encoded if batch["input_ids"].numel()]
    special = torch.tensor(tokenizer.all_special_ids)
    if all(bool(torch.isin(kwargs["input_ids"], special).all()) for _, kwargs in batches):
        # where the tokenizer's files are missing, transformers makes a tokenizer without words
        message = "the checkpoint's tokenizer turns the texts into special tokens only"
        raise CalibrationError(message, path=folder, remedy="put the tokenizer's files beside the weights")
    return batches


def _positions(folder: Path | str) -> int:
    """The tokens that the model of a checkpoint takes at most.

    Raises:
        CalibrationError: the model is an encoder with a decoder.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # the model itself says what is wrong with its config
        return TEXT_TOKENS
    if getattr(config, "is_encoder_decoder", False):
        message = "the model is an encoder with a decoder, and texts alone do not say what the decoder reads"
        remedy = "fold without data (--rounding preserve), or fold the model in memory with batches of input_ids and decoder_input_ids"
        raise CalibrationError(message, path=folder, remedy=remedy)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    behind = "roberta" in text.model_type or text.model_type in ("camembert", "mpnet")
    before = (
        1 + (getattr(text, "pad_token_id", None) or 0) if behind else 0
    )  # they count positions from behind the padding
    return positions - before if isinstance(positions, int) and positions > before else TEXT_TOKENS


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


def batches_on(batches: Sequence[Batch], device: str | torch.device) -> list[Batch]:
    """The batches with their tensors on a device."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return [(tuple(map(moved, args)), {k: moved(v) for k, v in kwargs.items()}) for args, kwargs in batches]


def sequences_of(batch: Batch) -> int:
    """The number of sequences in a batch: the first dimension of its first tensor."""
    first = first_of(batch)
    return first.shape[0] if first.ndim else 1


def length_of(batch: Batch) -> int:
    """The length of a batch's sequences: the second dimension of its first tensor."""
    first = first_of(batch)
    return first.shape[1] if first.ndim > 1 else 1


def one_sequence(batch: Batch) -> Batch:
    """The first sequence of a batch."""
    count = sequences_of(batch)

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value

    args, kwargs = batch
    return tuple(map(first, args)), {key: first(value) for key, value in kwargs.items()}


def first_of(batch: Batch) -> Tensor:
    """The first tensor of a batch."""
    return next(v for v in (*batch[0], *batch[1].values()) if isinstance(v, Tensor))
