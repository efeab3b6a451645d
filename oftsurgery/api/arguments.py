"""What the public functions take as arguments: adapters, read by ``load_adapter``, models, checkpoints, sizes, modes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.dialects import Dialect
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.adapters.reading import find_adapter, read_adapter
from oftsurgery.errors import AdapterError, StateError, printable
from oftsurgery.files.checkpoint import Checkpoint, open_checkpoint
from oftsurgery.files.finding import find_checkpoint
from oftsurgery.formats.codecs import ROUNDINGS, Rounding

AdapterLike = OFTAdapter | str | PathLike[str]
RoundingMode = Rounding | Literal["calibrated"]


def load_adapter(
    path_or_repo: str | PathLike[str], *, dialect: Dialect | None = None, revision: str | None = None
) -> OFTAdapter:
    """Read an OFT adapter that any peft release from 0.12 to 0.21 wrote.

    >>> adapter = oftsurgery.load_adapter("ADAPTER")
    >>> adapter.dialect, len(adapter.modules)
    ('peft-0.21', 4)
    >>> adapter.modules["model.layers.0.self_attn.q_proj"].block_size
    16

    Args:
        path_or_repo: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id.
        dialect: the releases whose arithmetic the adapter follows, where its files do not tell (a key of
            :data:`oftsurgery.DIALECTS`).
        revision: of the Hub repository.

    Returns:
        the :class:`~oftsurgery.OFTAdapter`.

    Raises:
        AdapterError: files are missing, damaged, pickles, or no adapter's.
        DialectError: the adapter is of another kind, its dialect is unknown, or its files do not tell the dialect.
        ShapeError, NonFiniteError: a tensor has a shape or values that no adapter has.
    """
    folder = find_adapter(path_or_repo, revision=revision)
    config, tensors, sha256 = read_adapter(folder)
    return parse_adapter(config, tensors, dialect=dialect, source=str(path_or_repo), sha256=sha256)


def loaded_adapters(adapter: AdapterLike | Sequence[AdapterLike]) -> list[OFTAdapter]:
    given: Sequence[Any] = adapter if isinstance(adapter, (list, tuple)) else [adapter]
    if not all(isinstance(a, (OFTAdapter, str, PathLike)) for a in given):
        raise AdapterError(
            f"an adapter is an OFTAdapter, a folder or a Hub id, or a list of them, not a {type(adapter).__name__}",
            remedy="fold(peft_model) folds live adapters; load_adapter(path) reads one from files",
        )
    return [a if isinstance(a, OFTAdapter) else load_adapter(a) for a in given]


def parse_size(size: int | str) -> int:
    """Bytes, from a number or as the Hub's tools write sizes: decimal ``KB``, ``MB``, ``GB``, ``TB``.

    Raises:
        StateError: nothing of the kind.

    >>> parse_size("5GB")
    5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?\s*", str(size), re.IGNORECASE)
    units = ("B", "KB", "MB", "GB", "TB")
    nbytes = int(float(match[1]) * 1000 ** units.index((match[2] or "B").upper())) if match else 0
    if nbytes < 1:
        raise StateError(f"no size: {printable(size)!r}", remedy="a number of bytes, or '500MB', '5GB'")
    return nbytes


def rounding_mode(rounding: RoundingMode | None, calibration: object) -> RoundingMode:
    """The mode of a fold.

    Raises:
        StateError: it is unknown, or does not go with what there is to calibrate on.
    """
    if rounding is None:
        return "preserve" if calibration is None else "calibrated"
    if rounding not in (*ROUNDINGS, "calibrated"):
        known = ", ".join(map(repr, ROUNDINGS))
        raise StateError(f"unknown rounding {printable(rounding)!r}", remedy=f"{known} or 'calibrated'")
    if (rounding == "calibrated") != (calibration is not None):
        raise StateError(
            f"rounding={rounding!r} {'with nothing to calibrate on' if calibration is None else 'with a calibration'}",
            remedy="give calibration=…, some hundred texts of the kind that the model is for"
            if calibration is None
            else "rounding='calibrated', or leave the calibration out",
        )
    return rounding


def tokenizer_choice(tokenizer: Any) -> Any:
    """``"adapter"``, ``"base"``, an existing folder as a path, an object with ``save_pretrained``, or None.

    Raises:
        StateError: anything else.
    """
    if tokenizer is None or hasattr(tokenizer, "save_pretrained") or tokenizer in ("adapter", "base"):
        return tokenizer
    if not isinstance(tokenizer, (str, PathLike)) or not Path(tokenizer).expanduser().is_dir():
        message = f"no folder of a tokenizer: {printable(tokenizer)}"
        remedy = (
            "tokenizer='adapter' or 'base', a folder that holds its files, or an object with save_pretrained "
            "(transformers.AutoTokenizer.from_pretrained(…))"
        )
        raise StateError(message, remedy=remedy)
    return Path(tokenizer).expanduser()


def check_is_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        message = f"a model is a torch.nn.Module, this is a {type(model).__name__}"
        raise StateError(message, remedy="load it first; folders go to fold_checkpoint")


def opened_checkpoint(source: str | PathLike[str]) -> Checkpoint:
    return open_checkpoint(find_checkpoint(source))


def check_one_way_back(given: Sequence[object], remedy: str) -> None:
    if sum(way is not None for way in given) != 1:
        raise StateError("unfold needs one of the adapter, the base and an undo record", remedy=remedy)
