"""Find the folder of an adapter or a checkpoint, on this machine or in the Hub's cache.

``owner/name``, ``owner/name/sub/folder`` and ``owner/name@revision`` name a repository, a folder in it, and a branch, tag
or commit of it; so does the Hub's own ``hf://owner/name@revision/sub/folder``.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

from oftsurgery.errors import CheckpointError, OFTSurgeryError, needs, printable

from .carried import PATTERNS, missing_in, never_copied
from .layout import (
    CONFIG,
    LAYOUTS,
    PIPELINE,
    Layout,
    layout_of,
    no_checkpoint,
    two_checkpoints,
    weight_map_in,
    without_other_variants,
)
from .reading import ADAPTER_CONFIG, ADAPTER_TENSORS
from .remote import is_url, local_path, mirrored

# patterns of the files that a fold needs beside the weights
_NEEDED = PATTERNS
# folders in which repositories keep the same model in other formats
OTHER_FORMATS = ["original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*"]

HUB = "hf://"
_HUB_ID = re.compile(r"(?P<repo>[^/@.~:][^/@:]*/[^/@]+)(?P<sub>(?:/[^/@]+)+)?(?:@(?P<revision>.+))?")
_HUB_URI = re.compile(
    rf"{HUB}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?P<sub>(?:/[^/@]+)+)?"
)
# names of revisions; no such name leads out of the cache's folder of revisions
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]*")

# rounds in which downloaded index files name further files
_MOST_ROUNDS = 8
# limits of a search below a folder; a trainer's output is no deeper
_MOST_LEVELS, _MOST_FILES = 4, 20_000


@dataclass(frozen=True)
class Place:
    """A folder of the user's, or a folder of a Hub repository.

    Attributes:
        given: the user's name for the place.
        folder: the user's folder; None for a place on the Hub.
        repo: ``owner/name``; empty for the user's folder.
        subfolder: the folder in the repository; empty for the whole repository.
        revision: the revision of the repository; None for its main branch.
        refusal: the class of the errors about the place.
        remedy: the remedy of these errors.
    """

    given: str
    folder: Path | None
    repo: str
    subfolder: str
    revision: str | None
    refusal: type[OFTSurgeryError]
    remedy: str

    def __str__(self) -> str:
        if self.folder is not None:
            return self.given
        at = self.repo + (f"@{self.revision}" if self.revision is not None else "")
        return f"{HUB}{at}/{self.subfolder}" if self.subfolder else at  # no path of this machine begins with `hf://`

    def below(self, subfolder: str) -> Place:
        """The place ``subfolder`` inside this place.

        Raises:
            OFTSurgeryError: the subfolder leads out of the place, or the user's folder has no such subfolder.
        """
        parts = subfolder.replace("\\", "/").removesuffix("/").split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            message = f"the subfolder {printable(subfolder)!r} is no path inside the folder"
            raise self.refusal(
                message, path=self.given, remedy="name a folder inside the folder, as 'name' or 'name/name'"
            )
        if self.folder is None:
            return replace(self, subfolder="/".join([*filter(None, [self.subfolder]), *parts]))
        folder = self.folder.joinpath(*parts)
        if not folder.is_dir():
            raise self.refusal(
                f"the folder has no subfolder {printable(subfolder)!r}", path=self.given, remedy=self.remedy
            )
        if not folder.resolve().is_relative_to(self.folder.resolve()):
            message = f"the subfolder {printable(subfolder)!r} is a link that leaves the folder"
            raise self.refusal(message, path=self.given, remedy="give the folder to which the link leads")
        given = "/".join([self.given.rstrip("/"), *parts]) if is_url(self.given) else str(Path(self.given, *parts))
        return replace(self, given=given, folder=folder)

    def fetch(self, patterns: list[str] | None, *, but: list[str] | None = None) -> Path:
        """The place's folder. The folder of a Hub repository has the files that match ``patterns``, without the files that
        match ``but``; None stands for all files. If no file matches, the folder may not exist.

        Raises:
            OFTSurgeryError: the repository or the revision does not exist, or the Hub cannot be reached.
        """
        if self.folder is not None:
            return self.folder
        below = f"{glob.escape(self.subfolder)}/" if self.subfolder else ""
        wanted = [below + pattern for pattern in (patterns if patterns is not None else ["*"])]
        with needs("huggingface-hub", "pip install huggingface-hub, or give a local folder"):
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import OfflineModeIsEnabled
        unwanted = None if but is None else [below + pattern for pattern in but]
        download = partial(
            snapshot_download, self.repo, revision=self.revision, allow_patterns=wanted, ignore_patterns=unwanted
        )
        with self._talking(), _without_notes():
            try:
                snapshot = download()
            except OfflineModeIsEnabled:  # before huggingface_hub 2.2 also where the cache has the files
                snapshot = download(local_files_only=True)
            except FileNotFoundError as error:
                # offline, with some of the files in the cache: a later step says which needed file is missing
                snapshot = getattr(error, "snapshot_path", None)
                if snapshot is None:
                    raise
        return Path(snapshot, self.subfolder)

    def on_disk(self, name: str) -> Path | None:
        """The place's file ``name`` on this machine, in the user's folder or the Hub's cache; None for a file that is not there."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        below = f"{self.subfolder}/{name}" if self.subfolder else name
        found = try_to_load_from_cache(self.repo, below, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def names(self) -> list[str]:
        """Paths of the files below the place, with ``/``. Offline, these files of a Hub repository are the files in the cache."""
        if self.folder is not None:
            return list(_files_below(self.folder))
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled

        with self._talking():
            try:
                found = HfApi().list_repo_files(self.repo, revision=self.revision)
            except OfflineModeIsEnabled:
                snapshot = snapshot_download(self.repo, revision=self.revision, allow_patterns=[])
                found = list(_files_below(Path(snapshot)))
        below = f"{self.subfolder}/" if self.subfolder else ""
        return sorted(name.removeprefix(below) for name in found if name.startswith(below))

    @property
    def spelled(self) -> str:
        """The user's name for the place, with its revision."""
        if self.folder is not None:
            return self.given
        below, at = (
            f"/{self.subfolder}" if self.subfolder else "",
            f"@{self.revision}" if self.revision is not None else "",
        )
        return f"{HUB}{self.repo}{at}{below}" if self.given.startswith(HUB) else f"{self.repo}{below}{at}"

    def streamed(self) -> Path:
        """The mirror of the place on the Hub at the commit that its revision has now: a folder that is named as in the Hub's cache.

        Raises:
            OFTSurgeryError: the repository or the revision does not exist, or the Hub cannot be reached.
        """
        from huggingface_hub import HfApi

        with self._talking():
            commit = HfApi().model_info(self.repo, revision=self.revision).sha
        below = f"/{self.subfolder}" if self.subfolder else ""
        return mirrored(f"{HUB}{self.repo}@{commit}{below}", f"snapshots/{commit}{below}")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn the client's errors into ``refusal``."""
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except RevisionNotFoundError as error:
            message = f"the repository has no revision {printable(self.revision)!r}"
            remedy = "name a branch, a tag or a commit of the repository: revision=… (--base-revision for a base), or 'owner/name@revision'"
            raise self.refusal(message, path=self.given, remedy=remedy) from error
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            message = f"the name is neither a folder nor a Hub repository that can be read ({printable(reason)})"
            remedy = (
                "check the name; a private repository needs a login (HF_TOKEN), and offline use needs a filled cache"
            )
            raise self.refusal(message, path=self.given, remedy=remedy) from error


@contextmanager
def _without_notes() -> Iterator[None]:
    """Run the body without the client's note that no file matches: a caller asks for files that a repository may have."""
    log = logging.getLogger("huggingface_hub._snapshot_download")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def given_path(given: str | PathLike[str]) -> Path:
    """The path that the user has given; of a URL, but ``hf://``, the mirror."""
    return Path(given).expanduser() if str(given).startswith(HUB) else local_path(given)


def place_of(
    given: str | PathLike[str], refusal: type[OFTSurgeryError], remedy: str, *, revision: str | None = None
) -> Place:
    """The place that ``given`` names: the user's folder where it exists, the mirror of a folder behind a URL, else a Hub repository.

    Args:
        refusal: the class of the errors about the place.
        remedy: the remedy of these errors.
        revision: the revision of a Hub repository.

    Raises:
        OFTSurgeryError: ``given`` names neither a folder nor a repository, or no repository has a revision of this name.
    """
    path = given_path(given)
    if path.is_dir():
        if revision is not None:
            message = f"a local folder has no revisions, but the revision {printable(revision)!r} was given"
            raise refusal(message, path=given, remedy="give the Hub id 'owner/name', or leave the revision out")
        return Place(str(given), path, "", "", None, refusal, remedy)
    match = _hub_id(given)
    if path.exists() or match is None:
        missing = f"the {'file' if path.suffix == '.safetensors' else 'folder'} does not exist"
        message = "the path is a file, not a folder" if path.exists() else missing
        raise refusal(message, path=path, remedy=remedy)
    named = match["revision"]
    if None not in (named, revision) and named != revision:
        message = f"two revisions of one repository were given, {printable(named)!r} and {printable(revision)!r}"
        raise refusal(message, path=given, remedy="give one of the two revisions")
    at = named if named is not None else revision
    if at is not None and not _REVISION.fullmatch(at):
        message = f"no repository has a revision of the name {printable(at)!r}"
        raise refusal(message, path=given, remedy="give the name of a branch, of a tag or of a commit")
    place = Place(str(given), None, match["repo"], "", at, refusal, remedy)
    return place.below(match["sub"][1:]) if match["sub"] else place


def _hub_id(given: object) -> re.Match[str] | None:
    """The parts of a name on the Hub; None for another name."""
    return (_HUB_URI.fullmatch(given) or _HUB_ID.fullmatch(given)) if isinstance(given, str) else None


def hub_id_of(given: object) -> str | None:
    """``owner/name``, where ``given`` names a Hub repository and no local file; else None."""
    match = _hub_id(given)
    return None if match is None or os.path.exists(str(given)) else match["repo"]  # noqa: PTH110 - os.path.exists takes any name


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache; None for a folder elsewhere."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


def cached_commit(repo: str, revision: str) -> str | None:
    """The commit of a repository's revision in the Hub's cache; None for a revision that the cache lacks."""
    if not revision or not _REVISION.fullmatch(revision):
        return None
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, CONFIG, revision=revision)
    return commit_of(Path(config).parent) if isinstance(config, str) else None


def loaded_commit(config: object, repo: str) -> str | None:
    """The commit at which transformers loaded a model of the repository ``repo``: the commit in the model's ``config``, which
    not every release of transformers writes, else the only commit in the Hub's cache; None where several may be meant.

    Raises:
        HFValidationError: no repository has such a name.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    known = getattr(config, "_commit_hash", None)
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots")
    there = [known] if isinstance(known, str) else sorted(path.parent.name for path in snapshots.glob(f"*/{CONFIG}"))
    return there[0] if len(there) == 1 else None


def find_checkpoint(
    path_or_repo: str | PathLike[str], *, whole: bool = False, revision: str | None = None, variant: str | None = None
) -> Path:
    """The folder of a checkpoint: a local folder, or the Hub's cache of a repository. The cache gets only the files that
    a fold needs, or with ``whole`` all files. A fold needs the weights that transformers reads: the shards of the index,
    else ``model.safetensors``. Of a URL, ``hf://`` too, the folder is a mirror, whose weights stay behind the URL.

    Raises:
        CheckpointError: ``path_or_repo`` is neither a folder nor a repository that can be read, or the repository has no
            such weights.
    """
    place = checkpoint_place(path_or_repo, revision)
    if place.folder is None and str(path_or_repo).startswith(HUB) and not _offline():
        return place.streamed()
    if place.folder is not None or whole:
        return place.fetch(None)
    folder = place.fetch(_NEEDED, but=OTHER_FORMATS)
    # all further downloads are of this commit, although somebody may push another commit meanwhile
    place = replace(place, revision=commit_of(folder) or place.revision)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        place.fetch([ADAPTER_TENSORS])  # the repository holds an adapter; the caller's error says so
        return folder
    if (folder / PIPELINE).is_file():  # whose components all are a part of the output
        other = tuple(pattern.removesuffix("*") for pattern in OTHER_FORMATS)
        names = [
            name for name in place.names() if "/" in name and not name.startswith(other) and not never_copied(name)
        ]
        place.fetch([glob.escape(name) for name in without_other_variants(names, variant)])
        return folder
    _fetch_what_it_names(place, folder)
    layout = layout_of(folder, variant)  # the weights are not downloaded yet, so a layout is found by its index
    single = [one if variant is None else one.variant(variant) for one in LAYOUTS]
    wanted = [one.single for one in single] if layout is None else _shards(place, folder, layout)
    place.fetch([glob.escape(name) for name in wanted])
    if layout_of(folder, variant) is None:
        raise no_checkpoint(place.given, place.names())
    return folder


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fetch_what_it_names(place: Place, folder: Path) -> None:
    """Download the files that the index files of a repository name; such a file may name further files."""
    asked: set[str] = set()
    for _ in range(_MOST_ROUNDS):
        missing = [name for name in missing_in(folder) if name not in asked]
        if not missing:
            return
        asked.update(missing)
        place.fetch(missing)


def _shards(place: Place, folder: Path, layout: Layout) -> list[str]:
    """The files that the index of a repository names, as paths below its folder."""
    index = folder / layout.index
    if index.is_file() and layout.single in place.names():
        raise two_checkpoints(place.given, layout)
    if not index.is_file():
        return [layout.single]
    shards = dict.fromkeys(weight_map_in(index).values())
    return [(Path(layout.index).parent / shard).as_posix() for shard in shards]


def checkpoint_place(path_or_repo: str | PathLike[str], revision: str | None = None) -> Place:
    """The place of a checkpoint, whose errors are :class:`CheckpointError`."""
    path = given_path(path_or_repo)
    if path.is_file():  # GGUF, a pickle or one shard
        raise no_checkpoint(path, [path.name], "the path is a file, not a folder")
    where = "give a folder that save_pretrained wrote, or a Hub id 'owner/name'"
    return place_of(path_or_repo, CheckpointError, where, revision=revision)


def _files_below(folder: Path) -> Iterator[str]:
    """Paths of the files in a folder and its subfolders; links to folders are not followed, and the number is limited."""
    left = _MOST_FILES
    for root, folders, files in os.walk(folder):
        below = Path(root).relative_to(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if len(below.parts) < _MOST_LEVELS else []
        for file in sorted(files)[:left]:
            yield (below / file).as_posix()
        left -= len(files)
        if left <= 0:
            return
