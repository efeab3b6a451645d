"""Compare measured layers with committed results, row by row, as ratios to peft in the same run (``make bench-check``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: a row fails if its fold is slower by more than this part
LIMIT = 0.15
_RATIO = "times_faster_than_peft"


def label(codec: str, shape: Sequence[int], b: int, adapter: str) -> str:
    """The name of a layer with its adapter, in results and on the terminal."""
    return f"{codec} {shape[0]}x{shape[1]} b={b} {adapter}"


@dataclass(frozen=True)
class Compared:
    """One row, measured now and in the committed results.

    Attributes:
        case: the label of the layer.
        mode: the rounding.
        now: how many times faster than peft the fold is now: the median, if the row was measured several times.
        committed: the same of the committed results.
    """

    case: str
    mode: str
    now: float
    committed: float

    @property
    def loss(self) -> float:
        """The part by which the fold has become slower; negative for a faster fold."""
        return self.committed / self.now - 1

    @property
    def slower(self) -> bool:
        return self.loss > LIMIT

    def __str__(self) -> str:
        change = f"{abs(self.loss):.0%} {'slower' if self.loss > 0 else 'faster'}"
        return (
            f"{self.case}, {self.mode}: {self.now:.1f} x faster than peft, committed {self.committed:.1f} x: {change}"
        )


def _ratios(run: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (label(row["codec"], (row["out"], row["in"]), row["b"], row["adapter"]), row["mode"]): row[_RATIO]
        for row in run["layers"]
    }


def _same_threads(run: dict[str, Any], committed: dict[str, Any]) -> dict[str, Any] | None:
    threads = run["machine"]["threads"]
    return next((other for other in committed["runs"] if other["machine"]["threads"] == threads), None)


def compare(run: dict[str, Any], committed: dict[str, Any], *again: dict[str, Any]) -> list[Compared]:
    """The rows of ``run`` that the committed results have too, for the same number of threads.

    Args:
        run: a run as ``bench.py layers`` writes it: a machine and its layers.
        committed: a file of ``bench.py layers``.
        again: further runs, in which some rows were measured again: the median counts.
    """
    old = _same_threads(run, committed)
    if old is None:
        return []
    before, measured = _ratios(old), [_ratios(r) for r in (run, *again)]
    return [
        Compared(*key, statistics.median(ratios[key] for ratios in measured if key in ratios), before[key])
        for key in measured[0]
        if key in before
    ]


def other_machine(run: dict[str, Any], committed: dict[str, Any]) -> str | None:
    """What says that the committed results are of another machine; None if they are of the same processor."""
    old = _same_threads(run, committed)
    if old is None:
        return None
    now, then = ((r["machine"]["cpu"], r["machine"]["processors"]) for r in (run, old))
    if now == then:
        return None
    return (
        f"The committed results are of another machine ({then[0]}, {then[1]} processors; this machine is {now[0]}, {now[1]} processors): "
        "the ratios to peft may differ for this reason alone. `make bench` on this machine writes results of its own."
    )


def verdict(runs: Sequence[dict[str, Any]], committed: dict[str, Any]) -> tuple[str, int]:
    """The text for the terminal and the exit code: 0 if no row is slower, 1 if a row is, 2 if no row can be compared.

    Args:
        runs: the first run, and the runs in which slow rows were measured again.
        committed: a file of ``bench.py layers``.
    """
    found = compare(runs[0], committed, *runs[1:])
    if not found:
        return (
            f"The committed results have none of the measured rows for {runs[0]['machine']['threads']} threads: run `make bench` first.",
            2,
        )
    said = [f"{'SLOWER' if row.slower else 'ok':>6}  {row}" for row in found]
    left = len(runs[0]["layers"]) - len(found)
    if left:
        said.append(f"The committed results lack {left} of the measured rows.")
    said += [note] if (note := other_machine(runs[0], committed)) else []
    slow = sum(row.slower for row in found)
    said.append(
        f"{slow} of {len(found)} rows are more than {LIMIT:.0%} slower than the committed results."
        if slow
        else f"All {len(found)} rows are within {LIMIT:.0%} of the committed results, or faster."
    )
    return "\n".join(said), int(slow > 0)
