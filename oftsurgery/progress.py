"""Progress of a task: the type of a progress function, and a bar that shows the progress."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import printable
from .notices import notices_to

#: function of (amount done, total amount, name of the current item); amounts are in bytes, weights, batches or stages
Progress = Callable[[int, int, str], None]


@contextmanager
def shown(progress: bool | Progress, task: str, unit: str = "B") -> Iterator[Progress | None]:
    """The progress function of a task: the caller's own, or for True a function that moves a bar on the standard error. Warnings
    that Python shows while the bar is open wait until the bar is closed, because they would tear the bar.

    Args:
        progress: True for a bar, the caller's function, or False for no progress.
        task: text before the bar.
        unit: unit of the amounts; bytes are shown as kB, MB …
    """
    if progress is not True:
        yield progress or None
        return
    from tqdm.auto import tqdm

    with _warnings_held(), tqdm(desc=task, unit=unit, unit_scale=unit == "B") as line:

        def step(done: int, total: int, what: str) -> None:
            line.total = total
            line.set_postfix_str(printable(what, 40), refresh=False)
            line.update(done - line.n)

        with notices_to(lambda text: tqdm.write(text, file=sys.stderr)):
            yield step


@contextmanager
def _warnings_held() -> Iterator[None]:
    """Hold the warnings that Python would show while the body runs, and show them afterwards, in their order. A filter that
    makes a warning an error acts at once.
    """
    show, held, over = warnings.showwarning, list[tuple[Any, ...]](), False

    def hold(*warning: Any) -> None:
        if over:  # another thread has put this function back
            show(*warning)
        else:
            held.append(warning)

    warnings.showwarning = hold  # type: ignore[assignment]
    try:
        yield
    finally:
        over = True
        if warnings.showwarning is hold:
            warnings.showwarning = show
        for warning in held:
            show(*warning)


@contextmanager
def without_bars(shown: bool, hide: Callable[[], None], show: Callable[[], None]) -> Iterator[None]:
    """Run the body without a library's own bars: if they are ``shown``, call ``hide`` before the body and ``show`` after."""
    if shown:
        hide()
    try:
        yield
    finally:
        if shown:
            show()
