"""A fold on disk holds a few weights at a time, however many weights a file has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from held import Held
from independent import make_case
from safetensors.torch import save_file

import oftsurgery

LAYERS = 40


def test_few_weights_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_case("0.21 exact", 64, 64).adapter
    rotation = next(iter(adapter.modules.values()))
    adapter = replace(adapter, modules={f"layers.{i}": rotation for i in range(LAYERS)}, config={})
    (tmp_path / "base").mkdir()
    save_file(
        {f"layers.{i}.weight": torch.randn(64, 64) for i in range(LAYERS)}, tmp_path / "base" / "model.safetensors"
    )
    held = Held(monkeypatch)
    record = oftsurgery.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", trained_on="plain")
    assert len(record.modules) == len(held.made) == LAYERS
    assert held.most < 12
