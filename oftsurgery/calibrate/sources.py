"""Where the batches of a calibration come from: from the caller, or from the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oftsurgery.errors import CalibrationError
from oftsurgery.files.reading import read_json
from oftsurgery.files.staging import Staging

from .batches import Batch, batches_fingerprint, given_batches, read_batches
from .self_texts import SelfTexts, batches_of_windows, can_write

#: the argument that asks for a calibration without data
SELF = "self"
#: the file beside the record with the tokens that the model has written
FILE = "oftsurgery_calibration.json"


class Source(Protocol):
    """The source of a calibration."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What decides the batches beside the model, as the record of a fold has it."""

    def batches(self, live: nn.Module) -> Sequence[Batch]:
        """The batches for a model with its adapters live."""

    def staged(self, live: Callable[[], nn.Module], staging: Staging) -> Sequence[Batch]:
        """The batches for a checkpoint that is to be folded into ``staging``; ``live`` loads the model with its adapters live."""


@dataclass(frozen=True, eq=False)
class Given:
    """Batches that the caller gives."""

    given: Sequence[Batch]

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"texts": "given", "fingerprint": batches_fingerprint(self.given)}

    def batches(self, live: nn.Module) -> Sequence[Batch]:  # noqa: ARG002 - the batches are there without the model
        return self.given

    def staged(self, live: Callable[[], nn.Module], staging: Staging) -> Sequence[Batch]:  # noqa: ARG002
        return self.given


@dataclass(frozen=True, eq=False)
class Itself:
    """Text that the model writes, or reads from what is built in. The tokens that it writes are a file of the output too, beside
    the record: a run that goes on after a kill, and a later fold, read this file.
    """

    texts: SelfTexts
    folder: Path | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.texts.facts

    def batches(self, live: nn.Module) -> Sequence[Batch]:
        return self.texts.batches(live, self.folder)

    def staged(self, live: Callable[[], nn.Module], staging: Staging) -> Sequence[Batch]:
        if staging.finished(FILE) is None:
            model = live()
            if not can_write(model):
                return self.batches(model)
            lines = ",\n".join(json.dumps(window) for window in self.texts.written(model).tolist())
            staging.put_text(FILE, f'{{"seed": {self.texts.seed}, "input_ids": [\n{lines}\n]}}\n')
            staging.finish(FILE, {})
            staging.settle()
        return batches_of_windows(read_windows(staging.folder / FILE))


def source_of(calibration: Any, folder: Path | None = None) -> Source:
    """The source of a calibration, of the checkpoint in ``folder`` or of a model in memory (None).

    Raises:
        CalibrationError: the calibration holds nothing that the model could read.
    """
    if isinstance(calibration, str) and calibration == SELF:
        return Itself(SelfTexts(), folder)
    if isinstance(calibration, (str, PathLike)) and Path(calibration).suffix.lower() == ".json":
        return Given(batches_of_windows(read_windows(Path(calibration).expanduser())))
    return Given(read_batches(calibration) if folder is None else given_batches(calibration, folder))


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
