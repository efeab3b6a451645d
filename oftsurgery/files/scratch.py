"""A :class:`Scratch` keeps tensors in a temporary file. The file has no name, so the file is gone when nobody uses it, or when
the process ends.
"""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from oftsurgery.errors import DiskError, printable


class Scratch:
    """Tensors in a temporary file.

    >>> scratch = Scratch()
    >>> place = scratch.write(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    >>> scratch.read(place)
    tensor([[1., 2.]], dtype=torch.bfloat16)
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - the file lives as long as the object
        weakref.finalize(self, self._file.close)

    def write(self, tensor: Tensor) -> Place:
        """Add a tensor at the end of the file.

        Raises:
            DiskError: the file cannot be written, for example because the disk is full.
        """
        data = tensor.detach().cpu().contiguous()
        try:
            begin = self._file.seek(0, 2)
            self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            message = f"a temporary file cannot be written ({printable(error.strerror or error)})"
            remedy = "make room on that disk, or set TMPDIR to a folder on another disk"
            raise DiskError(message, path=tempfile.gettempdir(), remedy=remedy) from error
        return Place(begin, data.shape, data.dtype, tensor.device)

    def read(self, place: Place) -> Tensor:
        """The tensor that :meth:`write` has put at ``place``, on the device where the tensor was."""
        data = torch.empty(place.shape, dtype=place.dtype, device="cpu")
        self._file.seek(place.begin)
        self._file.readinto(data.reshape(-1).view(torch.uint8).numpy().data)
        return data.to(place.device)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file, and what the tensor is."""

    begin: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
