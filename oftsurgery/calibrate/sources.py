"""Where the batches of a calibration come from: from the caller, or from the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oftsurgery.errors import CalibrationError
from oftsurgery.files.reading import read_json
from oftsurgery.files.staging import Staging

from .batches import Batch, BatchesOf, batches_fingerprint, given_batches, read_batches
from .self_texts import SelfTexts, batches_of_windows, can_write

#: the argument that asks for a calibration without data
SELF = "self"
#: the file beside the record with the tokens that the model has written
FILE = "oftsurgery_calibration.json"


class Source(Protocol):
    """The source of a calibration on disk."""

    @property
    def fingerprint(self) -> str:
        """What decides the batches, beside the model."""

    def batches(self, live: Callable[[], nn.Module], staging: Staging) -> Sequence[Batch]:
        """The batches; ``live`` loads the model with its adapters live."""


@dataclass(frozen=True, eq=False)
class Given:
    """Batches that the caller gives."""

    given: Sequence[Batch]

    @property
    def fingerprint(self) -> str:
        return batches_fingerprint(self.given)

    def batches(self, live: Callable[[], nn.Module], staging: Staging) -> Sequence[Batch]:  # noqa: ARG002 - the model is not needed
        return self.given


@dataclass(frozen=True, eq=False)
class Itself:
    """Text that the model writes, or reads from what is built in. The tokens that it writes are a file of the output too, beside
    the record: a run that goes on after a kill, and a later fold, read this file.
    """

    texts: SelfTexts
    folder: Path

    @property
    def fingerprint(self) -> str:
        return self.texts.fingerprint

    def batches(self, live: Callable[[], nn.Module], staging: Staging) -> Sequence[Batch]:
        if staging.finished(FILE) is None:
            model = live()
            if not can_write(model):
                return self.texts.batches(model, self.folder)
            lines = ",\n".join(json.dumps(window) for window in self.texts.written(model).tolist())
            staging.put_text(FILE, f'{{"seed": {self.texts.seed}, "input_ids": [\n{lines}\n]}}\n')
            staging.finish(FILE, {})
            staging.settle()
        return batches_of_windows(read_windows(staging.folder / FILE))


def source_of(calibration: Any, folder: Path) -> Source:
    """The source of the calibration of a checkpoint in ``folder``."""
    if isinstance(calibration, str) and calibration == SELF:
        return Itself(SelfTexts(), folder)
    if isinstance(calibration, (str, PathLike)) and Path(calibration).suffix.lower() == ".json":
        return Given(batches_of_windows(read_windows(Path(calibration).expanduser())))
    return Given(given_batches(calibration, folder))


def batches_in_memory(calibration: Any) -> BatchesOf:
    """A function from the live model to the batches of a calibration that is given for a model in memory."""
    if isinstance(calibration, str) and calibration == SELF:
        return SelfTexts().batches
    batches = read_batches(calibration)
    return lambda _live: batches


def read_windows(path: Path) -> Tensor:
    """``(windows, length)`` tokens from the file of an earlier fold.

    Raises:
        CalibrationError: the file holds something else.
    """
    found = read_json(path).get("input_ids")
    windows = found if isinstance(found, list) else []
    sizes = {len(window) if isinstance(window, list) else 0 for window in windows}
    if len(sizes) != 1 or 0 in sizes or not all(type(token) is int and token >= 0 for w in windows for token in w):
        message = "the file does not hold the tokens of a calibration: `input_ids`, lists of one length"
        raise CalibrationError(message, path=path, remedy=f"give the {FILE} of an earlier fold, or a file of texts")
    return torch.tensor(windows)
