"""The functions here read and check arguments of the public functions: adapters, models, checkpoints, sizes, modes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.base_revision import base_revision, trained_at
from oftsurgery.adapters.dialects import Dialect
from oftsurgery.adapters.reading import read_adapter
from oftsurgery.adapters.strength import StrengthMode, check_strength
from oftsurgery.errors import AdapterError, SourceWarning, StateError, printable, warn_caller
from oftsurgery.files.checkpoint import Checkpoint, open_checkpoint, open_single_file
from oftsurgery.files.finding import checkpoint_place, find_checkpoint, hub_id_of
from oftsurgery.files.layout import is_single_file
from oftsurgery.files.links import links_followed
from oftsurgery.files.pipeline import Pipeline, is_pipeline
from oftsurgery.formats.codecs import ROUNDINGS, Rounding
from oftsurgery.records.record import FoldRecord
from oftsurgery.stores.dequantised import dequantised, open_models

AdapterLike = OFTAdapter | str | PathLike[str]
RoundingMode = Rounding | Literal["calibrated"]


def load_adapter(
    path_or_repo: str | PathLike[str],
    *,
    dialect: Dialect | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    filename: str | None = None,
    bias: Literal["kept", "rotated"] | None = None,
    constraint: float | None = None,
    follow_links: bool = False,
) -> OFTAdapter:
    """Read an OFT adapter that any peft release from 0.12 to 0.21 wrote, a BOFT, HRA or RoAd adapter of peft, or the single
    file of an image tool (kohya's sd-scripts, LyCORIS, OneTrainer, diffusers).

    >>> adapter = oftsurgery.load_adapter("ADAPTER")
    >>> adapter.dialect, len(adapter.modules)
    ('peft-0.21', 4)
    >>> adapter.modules["model.layers.0.self_attn.q_proj"].block_size
    16

    Args:
        path_or_repo: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id: ``owner/name``,
            ``owner/name/subfolder``, ``owner/name@revision``. A folder may hold its one adapter in a subfolder, as peft saves
            an adapter that is not called "default", and trainers save their checkpoints. Or a ``.safetensors`` file of an image
            tool.
        dialect: the releases whose arithmetic the adapter follows, where its files do not tell (a key of
            :data:`oftsurgery.DIALECTS`).
        revision: the branch, tag or commit of a Hub repository.
        subfolder: the folder inside ``path_or_repo`` that holds the adapter.
        filename: the file in a folder or a Hub repository, for the single files of image tools.
        bias: what the live layers of the training did to biases, for the files of image tools that do not tell: ``"kept"``
            leaves them, ``"rotated"`` turns them with the rows of the weights (kohya before 2024-09-13, LyCORIS in bypass mode).
            None: ``"kept"``, and a file that hints at the other way is refused.
        constraint: the limit of the training (LyCORIS' argument ``constraint``, 0 for none) where a file of LyCORIS 2.1.0 to
            2.1.0.post2 does not hold the limit.
        follow_links: read files that are links, wherever the links lead.

    Returns:
        the :class:`~oftsurgery.OFTAdapter`.

    Raises:
        AdapterError: files are missing, damaged or pickles, or do not belong to an adapter; or several subfolders hold adapters.
        DialectError: the adapter is of another kind, its dialect is unknown, or its files do not tell the dialect.
        ShapeError, NonFiniteError: a tensor has a shape or values that no adapter has.

    Warns:
        SourceWarning: the adapter is in a subfolder that the caller did not name, or its files are links.
    """
    with links_followed(follow_links):
        return read_adapter(
            path_or_repo,
            dialect=dialect,
            revision=revision,
            subfolder=subfolder,
            filename=filename,
            bias=bias,
            constraint=constraint,
        )


def loaded_adapters(adapter: AdapterLike | Sequence[AdapterLike]) -> list[OFTAdapter]:
    """The adapters of an argument that takes one adapter or several; folders and Hub ids are read."""
    given: Sequence[Any] = adapter if isinstance(adapter, (list, tuple)) else [adapter]
    if not all(isinstance(a, (OFTAdapter, str, PathLike)) for a in given):
        raise AdapterError(
            f"an adapter is an OFTAdapter, a folder, a Hub id or a list of these, not a {type(adapter).__name__}",
            remedy="give load_adapter(path), which reads an adapter from files; fold(peft_model) folds live adapters",
        )
    return [a if isinstance(a, OFTAdapter) else load_adapter(a) for a in given]


def at_strengths(adapters: list[OFTAdapter], strength: float | Sequence[float], mode: StrengthMode) -> list[OFTAdapter]:
    """The adapters at one strength, or each at its own.

    Raises:
        StateError: there are other numbers of strengths and adapters, or a strength or the mode is not known.
    """
    several = isinstance(strength, (list, tuple))
    given: list[float] = list(strength) if isinstance(strength, (list, tuple)) else [strength] * len(adapters)  # type: ignore[list-item]
    if several and len(given) == 1:
        given *= len(adapters)
    if len(given) != len(adapters):
        message = f"{len(given)} strengths were given for {len(adapters)} adapters"
        raise StateError(message, remedy="give one strength, or one for each adapter: strength=[0.8, 0.5] (--strength)")
    for one in given:
        check_strength(one, mode)
    return [adapter.at_strength(one, mode) for adapter, one in zip(adapters, given, strict=True)]


def parse_size(size: int | str) -> int:
    """The bytes of a size: a number, or a text with the decimal units ``KB``, ``MB``, ``GB``, ``TB`` of the Hub's tools.

    Raises:
        StateError: ``size`` is not a size, or is less than a byte.

    >>> parse_size("5GB")
    5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?\s*", str(size), re.IGNORECASE)
    units = ("B", "KB", "MB", "GB", "TB")
    nbytes = int(float(match[1]) * 1000 ** units.index((match[2] or "B").upper())) if match else 0
    if nbytes < 1:
        message = f"{printable(size)!r} is not a size"
        raise StateError(message, remedy="give a number of bytes, or a text like '500MB' or '5GB' (--max-shard-size)")
    return nbytes


def rounding_mode(rounding: RoundingMode | None, calibration: object) -> RoundingMode:
    """The rounding mode of a fold.

    Raises:
        StateError: the mode is not known, or only one of ``"calibrated"`` and a calibration is given.
    """
    if rounding is None:
        return "preserve" if calibration is None else "calibrated"
    if rounding not in (*ROUNDINGS, "calibrated"):
        known = ", ".join(map(repr, ROUNDINGS))
        message = f"the rounding {printable(rounding)!r} is not known"
        raise StateError(message, remedy=f"choose {known} or 'calibrated' (--rounding)")
    if (rounding == "calibrated") != (calibration is not None):
        raise StateError(
            f"rounding={rounding!r} was asked for, but {'no' if calibration is None else 'also a'} calibration was given",
            remedy="give some hundred texts of the kind that the model is for: calibration=… (--calibration FILE)"
            if calibration is None
            else "choose rounding='calibrated' (--rounding calibrated), or leave the calibration out",
        )
    return rounding


def usable_device(device: str) -> str:
    """The device, if torch can compute on it.

    Raises:
        StateError: torch does not know the device, or the machine does not have it.
    """
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("the meta device holds no values")
        torch.empty(1, device=device)
    except Exception as error:  # torch raises errors of several kinds
        reason = printable(str(error).partition("\n")[0])
        message = f"torch cannot compute on the device {printable(device)!r} ({reason})"
        raise StateError(
            message, remedy="choose 'cpu', or a device that this torch and this machine have (--device)"
        ) from error
    return device


def tokenizer_choice(tokenizer: Any) -> Any:
    """``"adapter"``, ``"base"``, an existing folder as a path, an object with ``save_pretrained``, or None.

    Raises:
        StateError: anything else.
    """
    if tokenizer is None or hasattr(tokenizer, "save_pretrained") or tokenizer in ("adapter", "base"):
        return tokenizer
    if not isinstance(tokenizer, (str, PathLike)) or not Path(tokenizer).expanduser().is_dir():
        message = f"the tokenizer {printable(tokenizer)!r} is neither a folder nor an object with save_pretrained"
        remedy = (
            "choose 'adapter' or 'base', or give a folder that holds a tokenizer's files, or an object with save_pretrained "
            "(transformers.AutoTokenizer.from_pretrained(…))"
        )
        raise StateError(message, remedy=remedy)
    return Path(tokenizer).expanduser()


def check_is_model(model: object) -> None:
    """Refuse an object that is not a model in memory."""
    if not isinstance(model, nn.Module):
        message = f"a model is a torch.nn.Module, not a {type(model).__name__}"
        raise StateError(message, remedy="load the model first; the functions …_checkpoint take folders")


def opened_model(
    source: str | PathLike[str],
    revision: str | None = None,
    adapters: Iterable[OFTAdapter] = (),
    *,
    variant: str | None = None,
    component: str | None = None,
) -> Checkpoint | Pipeline:
    """The checkpoint or the pipeline in a folder, a single file or a Hub repository, at ``revision``, or at the revision at which
    ``adapters`` were trained.

    Raises:
        StateError: a ``component`` is named, and the folder holds one model.
    """
    if is_single_file(source):
        _check_one_model(component, Path(source))
        return open_single_file(Path(source))
    at = base_revision(source, revision, trained_at(adapters))
    folder = find_checkpoint(source, revision=at, variant=variant)
    if is_pipeline(folder):
        pipeline, named = open_models(folder, variant), checkpoint_place(source, at).revision
        return replace(pipeline, models={n: replace(m, revision=named) for n, m in pipeline.models.items()})
    _check_one_model(component, folder)
    return replace(dequantised(open_checkpoint(folder, variant)), revision=checkpoint_place(source, at).revision)


def _check_one_model(component: str | None, place: Path) -> None:
    if component is not None:
        message = f"the component {printable(component)!r} was named, but the place holds one model and no pipeline"
        raise StateError(message, path=place, remedy="leave out component=… (--component)")


def named_base(adapters: Sequence[OFTAdapter]) -> str:
    """The base that the adapters' configs name.

    Raises:
        StateError: the configs name no base, several, or one that is neither a folder here nor a Hub id.

    Warns:
        SourceWarning: always, since the caller did not name the base.
    """
    named = [base if isinstance(base, str) else "" for base, _ in trained_at(adapters)]
    base = named[0] if named else ""
    remedy = "give the base that the adapter was trained on: a folder, or a Hub id 'owner/name'"
    if len(set(named)) > 1:
        message = f"no base was given, and the adapters' configs name several: {', '.join(printable(one) or 'none' for one in named)}"
        raise StateError(message, remedy=remedy)
    if not base:
        raise StateError("no base was given, and the adapter's config names no base", remedy=remedy)
    if not Path(base).expanduser().is_dir() and hub_id_of(base) is None:
        message = f"no base was given, and the base that the adapter's config names, {printable(base)!r}, is not here"
        raise StateError(message, remedy=remedy)
    warn_caller(f"the base is {printable(base)}, which the adapter's config names", SourceWarning)
    return base


def opened_base(base: str | PathLike[str], record: FoldRecord | None, variant: str | None = None) -> Checkpoint:
    """The checkpoint that was folded, at the revision that the fold's ``record`` names."""
    named = [(a.base_model, record.base.get("revision")) for a in record.adapters] if record is not None else []
    if is_single_file(base):
        return open_single_file(Path(base))
    at = base_revision(base, None, named, "the fold's record")
    folder = find_checkpoint(base, revision=at, variant=variant)
    return replace(dequantised(open_checkpoint(folder, variant)), revision=checkpoint_place(base, at).revision)


def opened_pipeline(base: str | PathLike[str], variant: str | None = None) -> Pipeline:
    """The pipeline in a folder or a Hub repository.

    Raises:
        CheckpointError: the folder holds no pipeline.
    """
    return open_models(find_checkpoint(base, variant=variant), variant)


def check_one_way_back(given: Sequence[object], remedy: str) -> None:
    """Refuse an unfold that was given no way back, or several."""
    count = sum(way is not None for way in given)
    if count != 1:
        message = f"unfold needs one of the adapter, the base and an undo record, but {count} of these were given"
        raise StateError(message, remedy=remedy)
