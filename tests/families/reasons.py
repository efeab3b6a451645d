"""The reasons for which a cell may be refused: the error's class, a pattern of the error's text, and the reason in plain words."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    error: str
    text: str
    why: str


REASONS: list[Reason] = []


def reason_of(error: str, text: str) -> Reason | None:
    return next((r for r in REASONS if r.error == error and re.search(r.text, text)), None)
