"""Which links of a folder are followed: files that nobody vouches for may be links to any file of the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from oftsurgery.errors import CheckpointError, SourceWarning, printable, warn_caller

_ALL = ContextVar("follow_links", default=False)


@contextmanager
def links_followed(yes: bool) -> Iterator[None]:
    """In the body links are followed wherever they lead, if ``yes``: the user vouches for the folders that are read."""
    token = _ALL.set(yes or _ALL.get())
    try:
        yield
    finally:
        _ALL.reset(token)


def check_link(folder: Path, name: str, *, own: bool) -> None:
    """Refuse the file ``name`` of ``folder`` where it is a link that is not to be followed.

    Followed are links whose target

    1. lies in the folder, or in the ``blobs`` beside a snapshot of the Hub's cache;
    2. lies in the ``blobs`` of the user's own cache (``HF_HUB_CACHE``), wherever that folder of blobs is itself a link to;
    3. is a file that belongs to the user, where ``own``: which is said, in a :class:`SourceWarning`;
    4. is any file, within :func:`links_followed`.

    Args:
        own: no file of the folder gives the name, it is the one that weights have in a folder of one file.

    Raises:
        CheckpointError: the link leaves the folder by none of these rules.
    """
    path = folder / name
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root) or _in_blobs(target, root) or _ALL.get():
        return
    if not own:
        raise CheckpointError(
            f"a file of the checkpoint is a link that leaves its folder, to {printable(target)}",
            path=path,
            remedy="copy the file into the folder, or if you made the link yourself: --follow-links (follow_links=True)",
        )
    owner, user = target.stat().st_uid, os.getuid() if hasattr(os, "getuid") else 0
    if owner != user:
        raise CheckpointError(
            f"the file is a link that leaves its folder, to {printable(target)}, which belongs to user {owner}, not to you ({user})",
            path=path,
            remedy="copy the file into the folder, or if you trust the link: --follow-links (follow_links=True)",
        )
    warn_caller(
        f"{printable(path)} is a link to {printable(target)}. The link is followed: no file of the folder names it, and its "
        "target is a file of yours",
        SourceWarning,
    )


def _in_blobs(target: Path, root: Path) -> bool:
    """Whether a link's ``target`` is what the Hub's client put into the cache in which the snapshot ``root`` lies."""
    at = next((folder for folder in root.parents if folder.name == "snapshots"), None)
    if at is None:
        return False
    blobs = at.parent / "blobs"
    if target.is_relative_to(blobs):
        return True
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return at.is_relative_to(cache) and target.is_relative_to(blobs.resolve())
