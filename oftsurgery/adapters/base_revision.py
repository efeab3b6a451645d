"""At which revision of its base an adapter was trained."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING

from oftsurgery.errors import SourceWarning, StateError, printable, warn_caller
from oftsurgery.files.finding import hub_id_of

if TYPE_CHECKING:
    from .adapter import OFTAdapter


def base_revision(
    base: str | PathLike[str],
    asked: str | None,
    named: Iterable[tuple[object, object]],
    where: str = "the adapter's config",
) -> str | None:
    """The revision at which a base is read: the one that is asked for, else the one that is named with it; None: main.

    Args:
        base: a folder or a Hub id.
        asked: by the caller.
        named: ``(base, revision)``, as :func:`trained_at` gives them.
        where: they are named.

    Raises:
        StateError: this base is named with different revisions.
    Warns:
        SourceWarning: the revision is one that the caller did not ask for.
    """
    if asked is not None or hub_id_of(base) != base:
        return asked
    found = list(dict.fromkeys(at for repo, at in named if repo == base and isinstance(at, str) and at))
    if len(found) > 1:
        message = f"adapters that were trained at different revisions of {printable(base)}: {', '.join(map(printable, found))}"
        raise StateError(message, remedy="name the one that is meant: revision=… (--base-revision)")
    if found in ([], ["main"]):
        return None
    remedy = "revision=… (--base-revision) reads another one"
    warn_caller(
        f"{printable(base)} is read at revision {printable(found[0])}, which {where} names; {remedy}", SourceWarning
    )
    return found[0]


def trained_at(adapters: Iterable[OFTAdapter]) -> list[tuple[object, object]]:
    """``(base, revision)`` that the adapters' configs name."""
    return [(a.config.get("base_model_name_or_path"), a.config.get("revision")) for a in adapters]
