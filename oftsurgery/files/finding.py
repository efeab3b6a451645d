"""Finding and reading adapters and checkpoints: local folders, or the Hub's cache.

The disk is touched here, in the other files of this room, and by nothing that computes.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from oftsurgery.errors import AdapterError, CheckpointError, OFTSurgeryError, needs, printable

from .reading import sha256_of

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

# peft's configs are a few kB; a larger one is not a config
_MAX_CONFIG_BYTES = 4 << 20


def find_adapter(path_or_repo: str | PathLike[str], *, revision: str | None = None) -> Path:
    """The folder of an adapter: a local one, or a Hub repository's files in the Hub's cache (offline: from the cache
    alone).

    Raises:
        AdapterError: neither a folder nor a repository with an adapter.
    """
    path = Path(path_or_repo).expanduser()
    if path.exists() and not path.is_dir():
        raise AdapterError(
            "an adapter is a folder, this is a file", path=path, remedy=f"give the folder that holds {CONFIG}"
        )
    where = "give the folder that peft's save_pretrained wrote, or a Hub id 'owner/name'"
    return _find(path_or_repo, [CONFIG, TENSORS], AdapterError, where, revision)


def find_checkpoint(path_or_repo: str | PathLike[str], *, whole: bool = False) -> Path:
    """The folder of a checkpoint: a local one, or a Hub repository's files in the Hub's cache, only those that a fold
    needs, or the ``whole`` of it.

    Raises:
        CheckpointError: neither a folder nor a repository that can be read.
    """
    where = "give a folder that save_pretrained wrote, or a Hub id 'owner/name'"
    return _find(path_or_repo, None if whole else _NEEDED, CheckpointError, where)


# what a fold needs of a repository
_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]


def _find(
    place: str | PathLike[str],
    patterns: list[str] | None,
    refusal: type[OFTSurgeryError],
    where: str,
    revision: str | None = None,
) -> Path:
    """A local folder, or the files of a Hub repository that ``patterns`` match."""
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    is_hub_id = isinstance(place, str) and place.count("/") == 1 and not place.startswith((".", "~", "/"))
    if path.exists() or not is_hub_id:
        raise refusal("no such folder", path=path, remedy=where)
    with needs("huggingface-hub", "pip install huggingface-hub, or give a local folder"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(place), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise refusal(
            f"neither a folder nor a Hub repository that can be read ({printable(reason)})",
            path=place,
            remedy="check the name; private repositories need a login (HF_TOKEN), offline ones a filled cache",
        ) from error


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """``(config, tensors, sha256 of the tensors' file)`` of an adapter's folder. Nothing in it is executed.

    Raises:
        AdapterError: a file is missing, a pickle, truncated or no JSON object.
    """
    config_path, tensors_path = folder / CONFIG, folder / TENSORS
    if not config_path.is_file():
        inside = any(folder.iterdir())
        raise AdapterError(
            f"the folder has no {CONFIG}" if inside else "the folder is empty",
            path=folder,
            remedy="give the folder that peft's save_pretrained wrote",
        )
    if not tensors_path.is_file():
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            raise AdapterError(
                f"{pickles[0]} is a pickle, which could run code when read; oftsurgery reads safetensors only",
                path=folder,
                remedy="load it with the peft that wrote it, and save_pretrained(…, safe_serialization=True)",
            )
        raise AdapterError(
            f"the folder has no {TENSORS}", path=folder, remedy="save the adapter again with peft's save_pretrained"
        )
    return _read_json(config_path), _read_tensors(tensors_path), sha256_of(tensors_path)


def _read_json(path: Path) -> dict[str, Any]:
    def wrong(message: str) -> AdapterError:
        return AdapterError(message, path=path, remedy="restore the file that peft wrote")

    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise wrong(f"a config of {path.stat().st_size} bytes is no config")
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
        raise AdapterError(
            f"the tensors cannot be read: truncated, or no safetensors file ({printable(error)})",
            path=path,
            remedy="copy or download the file again",
        ) from error
