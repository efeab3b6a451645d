"""Find the folder of an adapter or a checkpoint, on this machine or in the Hub's cache."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from oftsurgery.errors import CheckpointError, OFTSurgeryError, needs, printable

from .carried import missing_in


def find_checkpoint(path_or_repo: str | PathLike[str], *, whole: bool = False) -> Path:
    """The folder of a checkpoint: a local folder, or the Hub's cache of a repository. The cache gets only the files that
    a fold needs, or with ``whole`` all files.

    Raises:
        CheckpointError: ``path_or_repo`` is neither a folder nor a repository that can be read.
    """
    where = "give a folder that save_pretrained wrote, or a Hub id 'owner/name'"
    folder = find_folder(path_or_repo, None if whole else _NEEDED, CheckpointError, where)
    if not whole and not Path(path_or_repo).expanduser().is_dir():
        folder = _with_what_it_names(folder, path_or_repo, where)
    return folder


def _with_what_it_names(folder: Path, repo: str | PathLike[str], where: str) -> Path:
    """The folder of a repository with the files that its index files name; such a file may name further files."""
    asked: set[str] = set()
    for _ in range(_MOST_ROUNDS):
        missing = [name for name in missing_in(folder) if name not in asked]
        if not missing:
            break
        asked.update(missing)
        folder = find_folder(repo, missing, CheckpointError, where)
    return folder


# rounds in which downloaded index files name further files
_MOST_ROUNDS = 8

# the files of a repository that a fold needs
_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]


def find_folder(
    place: str | PathLike[str],
    patterns: list[str] | None,
    refusal: type[OFTSurgeryError],
    where: str,
    revision: str | None = None,
) -> Path:
    """A local folder, or the cached files of a Hub repository that match ``patterns``; otherwise ``refusal`` is raised."""
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    is_hub_id = isinstance(place, str) and place.count("/") == 1 and not place.startswith((".", "~", "/"))
    if path.exists() or not is_hub_id:
        message = "the path is a file, not a folder" if path.exists() else "the folder does not exist"
        raise refusal(message, path=path, remedy=where)
    with needs("huggingface-hub", "pip install huggingface-hub, or give a local folder"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(place), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"the name is neither a folder nor a Hub repository that can be read ({printable(reason)})"
        remedy = "check the name; a private repository needs a login (HF_TOKEN), and offline use needs a filled cache"
        raise refusal(message, path=place, remedy=remedy) from error
