"""What the arguments of a function must be for a worker in another process, which may have another working folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from oftsurgery.files.links import links_followed

from .arguments import usable_device
from .fold_settings import FoldSettings

T = TypeVar("T")


def here(given: Any) -> Any:
    """The same argument with absolute paths: a place, an adapter, several of these, or the settings of a fold. A name on the Hub
    and an adapter in memory stay as they are.
    """
    if isinstance(given, FoldSettings):
        # the files beside the weights, which the tokenizer belongs to, are no worker's work
        return replace(given, trained_on=here(given.trained_on), undo=here(given.undo), tokenizer=None)
    if isinstance(given, (str, PathLike)):
        path = Path(given).expanduser()
        return str(path.absolute()) if path.exists() else given
    return [here(one) for one in given] if isinstance(given, Sequence) else given


def with_links(follow: bool, work: Callable[[], T], device: str = "cpu") -> T:
    """The result of ``work`` in a worker, which follows links as the caller said, and computes on ``device``."""
    usable_device(device)
    with links_followed(follow):
        return work()
