"""Folders of adapters and checkpoints: local ones, or the Hub's cache."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from oftsurgery.errors import CheckpointError, OFTSurgeryError, needs, printable

from .carried import missing_in


def find_checkpoint(path_or_repo: str | PathLike[str], *, whole: bool = False) -> Path:
    """The folder of a checkpoint: a local one, or a Hub repository's files in the Hub's cache, only those that a fold
    needs, or the ``whole`` of it.

    Raises:
        CheckpointError: neither a folder nor a repository that can be read.
    """
    where = "give a folder that save_pretrained wrote, or a Hub id 'owner/name'"
    folder = find_folder(path_or_repo, None if whole else _NEEDED, CheckpointError, where)
    if not whole and not Path(path_or_repo).expanduser().is_dir():
        folder = _with_what_it_names(folder, path_or_repo, where)
    return folder


def _with_what_it_names(folder: Path, repo: str | PathLike[str], where: str) -> Path:
    """A repository's folder with the files that its index files name, which may name further ones."""
    asked: set[str] = set()
    for _ in range(_MOST_ROUNDS):
        missing = [name for name in missing_in(folder) if name not in asked]
        if not missing:
            break
        asked.update(missing)
        folder = find_folder(repo, missing, CheckpointError, where)
    return folder


# of index files that name index files
_MOST_ROUNDS = 8

# what a fold needs of a repository
_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]


def find_folder(
    place: str | PathLike[str],
    patterns: list[str] | None,
    refusal: type[OFTSurgeryError],
    where: str,
    revision: str | None = None,
) -> Path:
    """A local folder, or the files of a Hub repository that ``patterns`` match; where there is neither, a ``refusal``."""
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
        message = f"neither a folder nor a Hub repository that can be read ({printable(reason)})"
        remedy = "check the name; private repositories need a login (HF_TOKEN), offline ones a filled cache"
        raise refusal(message, path=place, remedy=remedy) from error
