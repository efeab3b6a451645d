"""How far a task is: one kind of function that is told, and the bar that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import printable

#: called with (done, all there is to do, what it is about), both in bytes, weights, batches or stages
Progress = Callable[[int, int, str], None]


@contextmanager
def shown(progress: bool | Progress, task: str, unit: str = "B") -> Iterator[Progress | None]:
    """What a task is to tell of its progress: the caller's own function; for True one that moves a bar on the standard
    error.

    Args:
        progress: True, the caller's function, or False for nobody.
        task: stands before the bar.
        unit: of what is counted; bytes are shown as kB, MB …
    """
    if progress is not True:
        yield progress or None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=task, unit=unit, unit_scale=unit == "B") as line:

        def step(done: int, total: int, what: str) -> None:
            line.total = total
            line.set_postfix_str(printable(what, 40), refresh=False)
            line.update(done - line.n)

        yield step


@contextmanager
def without_bars(shown: bool, hide: Callable[[], None], show: Callable[[], None]) -> Iterator[None]:
    """Without a library's own bars, which are ``shown`` so far: its functions ``hide`` and ``show`` them."""
    if shown:
        hide()
    try:
        yield
    finally:
        if shown:
            show()
