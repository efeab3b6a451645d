""":func:`read_adapter` finds an adapter's files in a local folder or on the Hub, and reads them."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from oftsurgery.errors import AdapterError, CheckpointError, RemoteError, SourceWarning, printable, warn_caller
from oftsurgery.files.finding import OTHER_FORMATS, Place, given_path, place_of
from oftsurgery.files.reading import ADAPTER_CONFIG, ADAPTER_TENSORS, inside, read_json, sha256_of
from oftsurgery.files.remote import fetched
from oftsurgery.files.tokenizer_files import PATTERNS

from .adapter import OFTAdapter
from .dialects import Dialect
from .from_image_tools import Bias, parse_image_adapter
from .from_peft import parse_adapter
from .trained_on import SETTINGS

if TYPE_CHECKING:
    from oftsurgery.records.record import AdapterInfo

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

# peft's configs are a few kB; a much larger file is no config
_MAX_CONFIG_BYTES = 4 << 20
#: the name of diffusers' files of adapters
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# the most adapters that an error names
_NAMED = 8


def read_adapter(
    path_or_repo: str | PathLike[str],
    *,
    dialect: Dialect | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    filename: str | None = None,
    bias: Bias | None = None,
    constraint: float | None = None,
    without_embeddings: bool = False,
) -> OFTAdapter:
    """The adapter in a folder, a file or a Hub repository: :func:`oftsurgery.load_adapter`."""
    if bias not in (None, "kept", "rotated"):
        message = f"bias is {printable(bias)!r}"
        raise AdapterError(message, remedy="choose bias='kept' or bias='rotated' (--bias)")
    if constraint is not None and not 0 <= constraint < math.inf:
        raise AdapterError(
            f"the constraint is {printable(constraint)}",
            remedy="give the limit of the training, a finite number from 0 on (0: no limit)",
        )
    single = single_file(path_or_repo, revision, subfolder, filename)
    if single is not None:
        source, path = single
        with _told_of_adapter():
            path = inside(path.parent, path.name, own=True)
        tensors, metadata = read_file(path)
        return parse_image_adapter(
            tensors,
            metadata,
            dialect=dialect,
            bias=bias,
            constraint=constraint,
            without_embeddings=without_embeddings,
            source=source,
            sha256=sha256_of(path),
        )
    if bias is not None or constraint is not None or without_embeddings:
        message = "bias=…, constraint=… and without_embeddings=… are for the single files of image tools, but the adapter is a folder of peft"
        raise AdapterError(message, path=path_or_repo, remedy="leave these arguments out")
    place, folder = find_adapter(path_or_repo, revision=revision, subfolder=subfolder)
    config, tensors, sha256 = read_files(folder)
    return parse_adapter(config, tensors, dialect=dialect, source=str(place), sha256=sha256)


def single_file(
    given: str | PathLike[str], revision: str | None = None, subfolder: str | None = None, filename: str | None = None
) -> tuple[str, Path] | None:
    """``(source, path)`` of the adapter's single file, local or in the Hub's cache; None for a folder of peft.

    Raises:
        AdapterError: there is no such file, or the file is no safetensors file.
    """
    path = given_path(given)
    if path.is_file():
        if path.name == ADAPTER_TENSORS and (path.parent / ADAPTER_CONFIG).is_file():
            message = f"the path is the tensors' file of an adapter's folder, beside {ADAPTER_CONFIG}"
            raise AdapterError(message, path=path, remedy="give the folder")
        if filename is not None or subfolder is not None:
            message = "the path is a file, and a filename or a subfolder was given too"
            raise AdapterError(message, path=path, remedy="give the file alone")
        _check_suffix(path.name, path)
        return str(given), path
    where = "give an adapter's file or folder, or a Hub id 'owner/name'"
    if filename is None:
        if not path.is_dir() or (path / ADAPTER_CONFIG).is_file() or not (path / DIFFUSERS_FILE).is_file():
            return None
        if subfolder is not None:
            return None
        return str(path / DIFFUSERS_FILE), path / DIFFUSERS_FILE
    _check_suffix(filename, given)
    place = place_of(given, AdapterError, where, revision=revision)
    if subfolder is not None:
        place = place.below(subfolder)
    *above, name = filename.replace("\\", "/").split("/")
    if above:
        place = place.below("/".join(above))
    folder = place.fetch([glob.escape(name)])
    if not (folder / name).is_file():
        message = f"there is no file {printable(name)!r}"
        raise AdapterError(message, path=place, remedy="name a file of the folder or the repository: filename=…")
    return f"{place}/{name}" if place.folder is None else str(folder / name), folder / name


def _check_suffix(name: str, where: object) -> None:
    if not name.endswith(".safetensors"):
        pickle = name.endswith((".ckpt", ".pt", ".pth", ".bin"))
        message = (
            f"the file {printable(name)!r} is a pickle, which could run code when read; oftsurgery reads safetensors only"
            if pickle
            else f"the file {printable(name)!r} is no safetensors file"
        )
        raise AdapterError(message, path=where, remedy="save the adapter as .safetensors with the tool that trained it")


def find_adapter(
    path_or_repo: str | PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> tuple[Place, Path]:
    """The place of an adapter, and the folder with its files: a local folder, or the Hub's cache of a repository. Offline,
    only the cache is read. If the place holds one adapter in its subfolders, that adapter is read.

    Raises:
        AdapterError: ``path_or_repo`` is neither a folder nor a repository with an adapter, or several subfolders hold
            adapters.

    Warns:
        SourceWarning: the adapter is in a subfolder that the caller did not name.
    """
    path = given_path(path_or_repo)
    if path.exists() and not path.is_dir():
        message = "an adapter is a folder, but the path is a file"
        raise AdapterError(message, path=path, remedy=f"give the folder that holds {ADAPTER_CONFIG}")
    where = "give the folder that peft's save_pretrained wrote, or a Hub id 'owner/name'"
    place = place_of(path_or_repo, AdapterError, where, revision=revision)
    if subfolder is not None:
        place = place.below(subfolder)
    folder = place.fetch([ADAPTER_CONFIG, ADAPTER_TENSORS])
    if not (folder / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_TENSORS).is_file():
        place = _only_one(place)
    folder = place.fetch(
        [ADAPTER_CONFIG, ADAPTER_TENSORS, *PATTERNS, *SETTINGS], but=[*OTHER_FORMATS, "checkpoint-*/*"]
    )
    if place.folder is None and not (folder / ADAPTER_TENSORS).is_file():
        raise _no_tensors(place, place.names())
    return place, folder


def homes_of(adapters: Iterable[OFTAdapter | AdapterInfo]) -> list[Path]:
    """The folders that the adapters were read from, local or in the Hub's cache, without folders that hold other files now."""
    return [home for a in adapters for home in [_home_of(a.source, a.sha256)] if home is not None]


def _home_of(source: str | None, sha256: str | None) -> Path | None:
    """The folder of the adapter's file with this SHA-256, or None."""
    if source is None or sha256 is None:
        return None
    with suppress(AdapterError, ImportError):
        tensors = place_of(source, AdapterError, "give the adapter's folder").on_disk(ADAPTER_TENSORS)
        return tensors.parent if tensors is not None and sha256_of(tensors) == sha256 else None
    return None


def _only_one(place: Place) -> Place:
    """The subfolder of ``place`` that holds the place's only adapter."""
    names = place.names()
    found = sorted(_folder_of(name) for name in names if name.endswith(f"/{ADAPTER_CONFIG}"))
    if not found:
        raise _no_config(place, names)
    found.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])  # checkpoint-500, checkpoint-1000
    if len(found) > 1:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        listed = ", ".join(map(printable, found[-_NAMED:])) + more
        message = f"the folder holds {len(found)} adapters, each in a subfolder: {listed}"
        remedy = f"name one subfolder: subfolder={found[-1]!r} (--adapter-subfolder {found[-1]})"
        raise AdapterError(message, path=place, remedy=printable(remedy))
    warn_caller(
        f"{printable(place)} holds one adapter, in its subfolder {printable(found[0])}; this adapter is read",
        SourceWarning,
    )
    return place.below(found[0])


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _no_config(place: Place, names: Collection[str]) -> AdapterError:
    """The error for a place that holds files of these ``names``, and no adapter's config."""
    if any(name.rpartition("/")[2] in _PICKLES for name in names):
        return _no_tensors(place, [name.rpartition("/")[2] for name in names])
    weights = next((name for name in sorted(names) if name.endswith((".safetensors", ".bin", ".gguf"))), None)
    if weights is not None:
        message = (
            f"neither the folder nor a subfolder has {ADAPTER_CONFIG}; the folder holds a model ({printable(weights)})"
        )
        return AdapterError(
            message,
            path=place,
            remedy="give the adapter's folder in this place; the commands take BASE, ADAPTER and OUTPUT in this order",
        )
    message = f"the folder has no {ADAPTER_CONFIG}" if names else "the folder is empty"
    return AdapterError(message, path=place, remedy=place.remedy)


def _no_tensors(place: object, names: Collection[str]) -> AdapterError:
    """The error for a place that holds files of these ``names``, and no adapter's tensors in safetensors."""
    pickle = next((name for name in _PICKLES if name in names), None)
    if pickle is not None:
        message = f"{pickle} is a pickle, which could run code when read; oftsurgery reads safetensors only"
        remedy = "load the adapter with the peft release that wrote it, and save_pretrained(…, safe_serialization=True)"
    else:
        message = f"the folder has no {ADAPTER_TENSORS}"
        remedy = "save the adapter again with peft's save_pretrained"
    return AdapterError(message, path=place, remedy=remedy)


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """``(config, tensors, sha256 of the tensors' file)`` of an adapter's folder. No file is executed.

    Raises:
        AdapterError: a file is missing, is a pickle, is truncated, holds no JSON object, or is a link that is not followed.
    """
    names = [path.name for path in folder.iterdir()]
    if not (folder / ADAPTER_CONFIG).is_file():
        message = f"the folder has no {ADAPTER_CONFIG}" if names else "the folder is empty"
        raise AdapterError(message, path=folder, remedy="give the folder that peft's save_pretrained wrote")
    if not (folder / ADAPTER_TENSORS).is_file():
        raise _no_tensors(folder, names)
    with _told_of_adapter():
        config = read_json(inside(folder, ADAPTER_CONFIG, own=True), limit=_MAX_CONFIG_BYTES)
        path = inside(folder, ADAPTER_TENSORS, own=True)
    return config, _read_tensors(path), sha256_of(path)


@contextmanager
def _told_of_adapter() -> Iterator[None]:
    """Turn the errors of a checkpoint's file into errors of an adapter's file."""
    try:
        yield
    except CheckpointError as error:
        message = error.message.replace("of the checkpoint", "of the adapter")
        remedy = "restore the file that peft wrote" if "link" not in message else error.remedy
        raise AdapterError(message, path=error.path, remedy=remedy) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's safetensors file."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``(tensors, metadata)`` of an adapter's safetensors file."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with fetched(path) as local:
            with safe_open(local, "pt") as file:
                metadata = dict(file.metadata() or {})
            return dict(load_file(local)), metadata
    except RemoteError:
        raise
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        message = f"the tensors cannot be read: the file is truncated, or is no safetensors file ({printable(error)})"
        raise AdapterError(message, path=path, remedy="copy or download the file again") from error
