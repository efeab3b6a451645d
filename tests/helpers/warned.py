"""Our warnings, noted or left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oftsurgery

#: all warnings of ours but those of missing fast paths
OURS = [
    w
    for w in (getattr(oftsurgery, name) for name in oftsurgery.__all__)
    if isinstance(w, type) and issubclass(w, Warning) and w is not oftsurgery.BackendWarning
]


@contextmanager
def noted() -> Iterator[list[warnings.WarningMessage]]:
    """Our warnings in a list; those of others stay errors."""
    with warnings.catch_warnings(record=True) as caught:
        for category in OURS:
            warnings.simplefilter("always", category)
        yield caught


def quietly(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with noted():
        return call(*args, **options)
