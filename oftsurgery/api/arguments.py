"""What the public functions take as arguments: adapters, read by ``load_adapter``, models, checkpoints, sizes, modes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.base_revision import base_revision, trained_at
from oftsurgery.adapters.dialects import Dialect
from oftsurgery.adapters.reading import read_adapter
from oftsurgery.errors import AdapterError, StateError, printable
from oftsurgery.files.checkpoint import Checkpoint, open_checkpoint
from oftsurgery.files.finding import checkpoint_place, find_checkpoint
from oftsurgery.files.links import links_followed
from oftsurgery.formats.codecs import ROUNDINGS, Rounding
from oftsurgery.records.record import FoldRecord

AdapterLike = OFTAdapter | str | PathLike[str]
RoundingMode = Rounding | Literal["calibrated"]


def load_adapter(
    path_or_repo: str | PathLike[str],
    *,
    dialect: Dialect | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    follow_links: bool = False,
) -> OFTAdapter:
    """Read an OFT adapter that any peft release from 0.12 to 0.21 wrote.

    Args:
        path_or_repo: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id: ``owner/name``,
            ``owner/name/subfolder``, ``owner/name@revision``. Of a folder that holds its one adapter in a subfolder (as peft
            saves one that is not called "default", and trainers their checkpoints), that one.
        dialect: which releases' arithmetic the adapter is of, where its files do not tell (a key of
            :data:`oftsurgery.DIALECTS`).
        revision: of the Hub repository.
        subfolder: of the folder or repository.
        follow_links: read files that are links, wherever these lead.

    Raises:
        AdapterError: files are missing, damaged, pickles, or not an adapter's; several adapters in subfolders.
        DialectError: another kind of adapter, or an OFT one that cannot be told or is not supported.
        ShapeError, NonFiniteError: tensors that no adapter has.
    Warns:
        SourceWarning: the adapter is in a subfolder that was not named, or its files are links.
    """
    with links_followed(follow_links):
        return read_adapter(path_or_repo, dialect=dialect, revision=revision, subfolder=subfolder)


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


def check_is_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        message = f"a model is a torch.nn.Module, this is a {type(model).__name__}"
        raise StateError(message, remedy="load it first; folders go to fold_checkpoint")


def opened_checkpoint(
    source: str | PathLike[str], revision: str | None = None, adapters: Iterable[OFTAdapter] = ()
) -> Checkpoint:
    """The checkpoint in a folder or a Hub repository, at ``revision``, or at the one that ``adapters`` were trained at."""
    at = base_revision(source, revision, trained_at(adapters))
    return replace(
        open_checkpoint(find_checkpoint(source, revision=at)), revision=checkpoint_place(source, at).revision
    )


def opened_base(base: str | PathLike[str], record: FoldRecord | None) -> Checkpoint:
    """The checkpoint that was folded, at the revision that the fold's ``record`` names."""
    named = [(a.base_model, record.base.get("revision")) for a in record.adapters] if record is not None else []
    return opened_checkpoint(base, base_revision(base, None, named, "the fold's record"))


def check_one_way_back(given: Sequence[object], remedy: str) -> None:
    if sum(way is not None for way in given) != 1:
        raise StateError("unfold needs one of the adapter, the base and an undo record", remedy=remedy)
