"""Decide which links of a folder are followed. A folder from somebody else may hold links to any file of the user's."""

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
    """Follow all links in the body, if ``yes``: the user vouches for the folders that the body reads."""
    token = _ALL.set(yes or _ALL.get())
    try:
        yield
    finally:
        _ALL.reset(token)


def following_links() -> bool:
    """Whether the code that runs follows all links."""
    return _ALL.get()


def check_link(folder: Path, name: str, *, own: bool) -> None:
    """Refuse the file ``name`` of ``folder`` if the file is a link that no rule follows.

    A link is followed if its target

    1. lies in the folder, or in the ``blobs`` beside a snapshot of the Hub's cache;
    2. lies in the ``blobs`` of the user's own cache (``HF_HUB_CACHE``), also where these ``blobs`` are themselves a link;
    3. belongs to the user, and ``own`` is set; a :class:`SourceWarning` says where the link leads;
    4. is any file, within :func:`links_followed` (``follow_links=True``, ``--follow-links``).

    Args:
        own: whether oftsurgery itself looks for a file of this name (``model.safetensors``); a file of the folder gives all
            other names.

    Raises:
        CheckpointError: the link leaves the folder, and no rule follows it.
    """
    path = folder / name
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root) or _in_blobs(target, root) or _ALL.get():
        return
    if not own:
        raise CheckpointError(
            f"a file of the checkpoint is a link that leaves its folder, to {printable(target)}",
            path=path,
            remedy="copy the file into the folder; if you trust the link, follow it: follow_links=True (--follow-links)",
        )
    owner, user = target.stat().st_uid, os.getuid() if hasattr(os, "getuid") else 0
    if owner != user:
        raise CheckpointError(
            f"the file is a link that leaves its folder, to {printable(target)}, which belongs to user {owner}, not to you ({user})",
            path=path,
            remedy="copy the file into the folder; if you trust the link, follow it: follow_links=True (--follow-links)",
        )
    warn_caller(
        f"{printable(path)} is a link to {printable(target)}. The link is followed, since no file of the folder names the link and "
        "the link's target belongs to you",
        SourceWarning,
    )


def _in_blobs(target: Path, root: Path) -> bool:
    """Whether the Hub's client put the file ``target`` into the cache that holds the snapshot ``root``."""
    at = next((folder for folder in root.parents if folder.name == "snapshots"), None)
    if at is None:
        return False
    blobs = at.parent / "blobs"
    if target.is_relative_to(blobs):
        return True
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return at.is_relative_to(cache) and target.is_relative_to(blobs.resolve())
