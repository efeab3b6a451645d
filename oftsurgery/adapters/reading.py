"""Find and read an adapter's files, in a local folder or in the Hub's cache."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from oftsurgery.errors import AdapterError, printable
from oftsurgery.files.finding import find_folder
from oftsurgery.files.reading import sha256_of
from oftsurgery.files.tokenizer_files import PATTERNS

if TYPE_CHECKING:
    from oftsurgery.records.record import AdapterInfo

    from .adapter import OFTAdapter

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

# peft's configs are a few kB; a much larger file is no config
_MAX_CONFIG_BYTES = 4 << 20


def find_adapter(path_or_repo: str | PathLike[str], *, revision: str | None = None) -> Path:
    """The folder of an adapter: a local folder, or the Hub's cache of a repository. Offline, only the cache is read.

    Raises:
        AdapterError: ``path_or_repo`` is neither a folder nor a repository with an adapter.
    """
    path = Path(path_or_repo).expanduser()
    if path.exists() and not path.is_dir():
        message = "an adapter is a folder, but the path is a file"
        raise AdapterError(message, path=path, remedy=f"give the folder that holds {CONFIG_FILE}")
    where = "give the folder that peft's save_pretrained wrote, or a Hub id 'owner/name'"
    return find_folder(path_or_repo, [CONFIG_FILE, TENSORS_FILE, *PATTERNS], AdapterError, where, revision)


def homes_of(adapters: Iterable[OFTAdapter | AdapterInfo]) -> list[Path]:
    """The folders that adapters were read from, as far as those are there still: local ones, or the Hub's cache."""
    return [home for a in adapters for home in [_home_of(a.source, a.sha256)] if home is not None]


def _home_of(source: str | None, sha256: str | None) -> Path | None:
    if source is None or sha256 is None:
        return None
    tensors = Path(source).expanduser() / TENSORS_FILE
    if not tensors.is_file():
        with suppress(ImportError, ValueError):  # what is no repository's id is a ValueError
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(source, TENSORS_FILE)
            tensors = Path(found) if isinstance(found, str) else tensors
    return tensors.parent if tensors.is_file() and sha256_of(tensors) == sha256 else None


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """``(config, tensors, sha256 of the tensors' file)`` of an adapter's folder. No file is executed.

    Raises:
        AdapterError: a file is missing, is a pickle, is truncated, or holds no JSON object.
    """
    config_path, tensors_path = folder / CONFIG_FILE, folder / TENSORS_FILE
    if not config_path.is_file():
        message = f"the folder has no {CONFIG_FILE}" if any(folder.iterdir()) else "the folder is empty"
        raise AdapterError(message, path=folder, remedy="give the folder that peft's save_pretrained wrote")
    if not tensors_path.is_file():
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            message = f"{pickles[0]} is a pickle, which could run code when read; oftsurgery reads safetensors only"
            remedy = (
                "load the adapter with the peft release that wrote it, and save_pretrained(…, safe_serialization=True)"
            )
            raise AdapterError(message, path=folder, remedy=remedy)
        message = f"the folder has no {TENSORS_FILE}"
        raise AdapterError(message, path=folder, remedy="save the adapter again with peft's save_pretrained")
    return _read_json(config_path), _read_tensors(tensors_path), sha256_of(tensors_path)


def _read_json(path: Path) -> dict[str, Any]:
    def wrong(message: str) -> AdapterError:
        return AdapterError(message, path=path, remedy="restore the file that peft wrote")

    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise wrong(f"the config has {path.stat().st_size} bytes, more than the limit of {_MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise wrong(f"the config is no JSON ({printable(error)})") from error
    if not isinstance(config, dict):
        raise wrong(f"the config is a JSON {type(config).__name__}, not an object")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, KeyError) as error:
        message = f"the tensors cannot be read: the file is truncated, or no safetensors file ({printable(error)})"
        raise AdapterError(message, path=path, remedy="copy or download the file again") from error
