"""The demo of image models, in small: what it draws and prints is what is true."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from image_goldens import GOLDENS
from PIL import Image

demo: Any = importlib.import_module("demo_image")


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    return [demo.compare(name, side=8, steps=2) for name in demo.MODELS]


def test_folds_draw_what_the_live_adapter_draws(drawn: list[Any]) -> None:
    for one in drawn:
        base, fp16, nf4 = (one.distance(name) for name in (demo.BASE, demo.FP16, demo.NF4))
        assert one.distance(demo.LIVE) == 0
        assert one.change > 0.2
        assert base > 0.02
        assert 0 < fp16 < 2e-3
        assert fp16 < nf4 < 2 * one.rounding


def test_the_live_layer_is_that_of_the_tool() -> None:
    """The demo's own live layer of diag-oft, against LyCORIS'."""
    golden = next(g for g in GOLDENS if g.folder == "lycoris-4.1.3/diag-oft_rescaled_constraint")
    base, effective = golden.base_tensors(), golden.effective(1) or {}
    for path, m in golden.adapter().modules.items():
        name = next(n for n in effective if n.replace(".", "_") == f"{path.removeprefix('lycoris_')}_weight")
        live = demo.DiagOFT(m.blocks, m.alpha, m.scale)(base[name])
        assert float((live - effective[name]).norm() / effective[name].norm()) < 1e-6


def test_the_sheet_and_the_table(drawn: list[Any], tmp_path: Path) -> None:
    demo.contact_sheet(drawn, tmp_path / "sheet.png", size=64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 + 6 * 72, 8 + 2 * 94)
        pixels = torch.tensor(list(sheet.convert("L").tobytes()))
    assert len(pixels.unique()) > 20
    table = demo.format_table(drawn)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert f"{drawn[0].distance(demo.NF4):.2g}" in table
    shown = Path(demo.PICTURE)
    assert shown.is_file()
    assert shown.stat().st_size < 200_000
