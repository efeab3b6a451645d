"""The hidden values between two blocks of a model, over all batches of a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from oftsurgery.files.scratch import Place, Scratch

#: bytes of hidden values after one block that stay in memory; further values go to a temporary file
MEMORY_BYTES = 1 << 25


class HiddenValues:
    """Hidden values, one tensor for each batch, in the dtype in which the model computes."""

    def __init__(self, values: Iterable[Tensor] = ()) -> None:
        self._held: list[Tensor | Place] = []
        self._nbytes = 0
        self._scratch: Scratch | None = None
        for hidden in values:
            self.append(hidden)

    def append(self, hidden: Tensor) -> None:
        self._nbytes += hidden.nbytes
        if self._nbytes <= MEMORY_BYTES:
            self._held.append(hidden)
            return
        self._scratch = self._scratch or Scratch()
        self._held.append(self._scratch.write(hidden))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self._held)))

    def __getitem__(self, i: int) -> Tensor:
        held = self._held[i]
        if isinstance(held, Tensor):
            return held
        assert self._scratch is not None  # noqa: S101 - only the file gives places
        return self._scratch.read(held)
