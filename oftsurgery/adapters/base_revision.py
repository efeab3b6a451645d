"""Choose the revision of a base: the revision at which an adapter was trained, unless the caller names one."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING

from oftsurgery.errors import SourceWarning, StateError, printable, warn_caller
from oftsurgery.files.finding import cached_commit, hub_id_of, loaded_commit

if TYPE_CHECKING:
    from .adapter import OFTAdapter


def base_revision(
    base: str | PathLike[str],
    asked: str | None,
    named: Iterable[tuple[object, object]],
    where: str = "the adapter's config",
) -> str | None:
    """The revision at which a base is read: ``asked``, else the revision that ``named`` has for this base, else None for the
    main branch.

    Args:
        base: a folder or a Hub id.
        asked: the revision that the caller names, or None.
        named: ``(base, revision)`` pairs, as :func:`trained_at` gives them.
        where: the place that names these pairs, for the warning.

    Raises:
        StateError: ``named`` has several revisions of this base.

    Warns:
        SourceWarning: the caller did not name the revision.
    """
    if asked is not None or hub_id_of(base) != base:
        return asked
    found = list(dict.fromkeys(at for repo, at in named if repo == base and isinstance(at, str) and at))
    if len(found) > 1:
        several = ", ".join(map(printable, found))
        message = f"the adapters were trained at different revisions of {printable(base)}: {several}"
        raise StateError(message, remedy="name the revision to read: revision=… (--base-revision)")
    if found in ([], ["main"]):
        return None
    remedy = "revision=… (--base-revision) names another revision"
    warn_caller(
        f"{printable(base)} is read at revision {printable(found[0])}, which {where} names; {remedy}", SourceWarning
    )
    return found[0]


def trained_at(adapters: Iterable[OFTAdapter]) -> list[tuple[object, object]]:
    """The pairs ``(base, revision)`` that the adapters' configs name."""
    return [(a.config.get("base_model_name_or_path"), a.config.get("revision")) for a in adapters]


def warn_of_another_commit(config: object, adapters: Iterable[OFTAdapter]) -> None:
    """Warn if a model in memory was loaded from one commit of its repository, and an adapter was trained at another commit. The
    model's ``config`` and the Hub's cache tell the commits.

    Warns:
        SourceWarning: the commits differ.
    """
    name = getattr(config, "_name_or_path", None)
    for base, revision in trained_at(adapters):
        if not (isinstance(base, str) and isinstance(revision, str) and base == name == hub_id_of(base)):
            continue
        wanted, loaded = cached_commit(base, revision), loaded_commit(config, base)
        if wanted is not None and loaded is not None and wanted != loaded:
            warn_caller(
                f"the model is commit {printable(loaded)} of {printable(base)}, but the adapter was trained at revision {printable(revision)}, "
                f"commit {wanted}; from_pretrained(…, revision={printable(revision)!r}) loads that commit",
                SourceWarning,
            )
