"""Tensors in a temporary file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from oftsurgery import DiskError
from oftsurgery.files.scratch import Scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_come_back(dtype: torch.dtype) -> None:
    scratch = Scratch()
    given = [
        (100 * torch.randn(3, 5)).to(dtype).t(),
        torch.zeros(0, 4, dtype=dtype),
        torch.full((2, 1, 2), 3).to(dtype),
    ]
    places = [scratch.write(tensor) for tensor in given]
    for tensor, place in reversed(list(zip(given, places, strict=True))):
        back = scratch.read(place)
        assert back.dtype == dtype
        assert torch.equal(back, tensor)


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch()
    scratch.write(torch.ones(1000))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told() -> None:
    scratch = Scratch()

    class Full:
        def seek(self, *_: int) -> int:
            return 0

        def write(self, _: object) -> None:
            raise OSError(28, "No space left on device")

    scratch._file = Full()  # type: ignore[assignment]
    with pytest.raises(DiskError, match=r"a temporary file cannot be written \(No space left on device\).*set TMPDIR"):
        scratch.write(torch.ones(3))
