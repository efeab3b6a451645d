"""How many folded weights are in memory at a time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from oftsurgery.folding import engine


class Held:
    """Counts the folded weights that the engine makes.

    Attributes:
        made: one reference for each weight.
        most: the most weights that were in memory at once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Any]] = []
        self.most = 0
        self._fold = engine.fold_encoded
        monkeypatch.setattr(engine, "fold_encoded", self._watched)

    def _watched(self, *args: Any, **options: Any) -> Any:
        folded = self._fold(*args, **options)
        self.made.append(weakref.ref(folded.encoded.tensors["weight"]))
        self.most = max(self.most, sum(ref() is not None for ref in self.made))
        return folded
