"""Extracting rotations of outputs: in memory, on disk, from every format, and back into a file that LyCORIS reads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from image_goldens import GOLDENS, model_of
from models import quantise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from warned import quietly

import oftsurgery
from oftsurgery import ExtractionError, Rotation, ShapeError, StateError
from oftsurgery.cli.main import main


def turn(rows: int, b: int, norm: float, seed: int) -> Rotation:
    q = torch.randn(rows // b, b * (b - 1) // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Rotation(q * norm / b**0.5, side="output", shared=False, whole=True)


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def distance(found: Rotation, true: Rotation) -> float:
    return float((found.blocks - true.blocks).norm() / (true.blocks - torch.eye(true.block_size)).norm())


@pytest.mark.parametrize(("given", "side"), [(None, None), (None, "output"), (8, None), (8, "output")])
def test_a_rotation_of_the_outputs(given: int | None, side: str | None) -> None:
    base, true = weight(64, 96), turn(64, 8, 0.3, 1)
    found = oftsurgery.extract_rotation(base, oftsurgery.fold_weight(base, true), given, side=side)  # type: ignore[arg-type]
    assert (found.rotation.side, found.rotation.block_size) == ("output", 8)
    assert distance(found.rotation, true) < 1e-5
    assert found.explained > 0.999
    assert found.residual < 1e-6
    # the weight of the rotation is that of the fold
    again = oftsurgery.fold_weight(base, found.rotation)
    assert torch.allclose(again, oftsurgery.fold_weight(base, true), atol=1e-5)


def test_the_side_is_that_of_the_adapter() -> None:
    base = weight(64, 96)
    inputs = Rotation(0.1 * torch.randn(12, 28, generator=torch.Generator().manual_seed(1)), shared=False)
    found = oftsurgery.extract_rotation(base, oftsurgery.fold_weight(base, inputs))
    assert found.rotation.side == "input"
    with pytest.raises(ExtractionError, match="rotations of the output features explain"):
        oftsurgery.extract_rotation(base, oftsurgery.fold_weight(base, inputs), side="output")
    with pytest.raises(ExtractionError, match="rotations of the input features explain"):
        oftsurgery.extract_rotation(base, oftsurgery.fold_weight(base, turn(64, 8, 0.3, 1)), side="input")
    with pytest.raises(ExtractionError, match="rotations of the input features explain"):
        oftsurgery.extract_rotation(base, weight(64, 96, 1))
    with pytest.raises(ShapeError, match="block size 48 does not divide the 64 output features"):
        oftsurgery.extract_rotation(base, base, 48, side="output")
    with pytest.raises(StateError, match="have no side"):
        oftsurgery.extract_rotation(base, base, 8, embedding=True, side="output")


@pytest.mark.parametrize(("storage", "within"), [("bfloat16", 0.02), ("int8", 0.1), ("nf4", 0.35)])
def test_from_coarse_weights(storage: str, within: float) -> None:
    """The error is near its estimate, as for rotations of inputs."""
    base, true = nn.Linear(512, 128, bias=False), turn(128, 8, 0.25, 2)
    base.load_state_dict({"weight": weight(128, 512)})
    model = nn.Sequential()
    model.add_module("a", base.requires_grad_(False))
    model = model.to(torch.bfloat16) if storage == "bfloat16" else quantise(model, storage)
    adapter = oftsurgery.OFTAdapter({"a": true}, dialect="peft-0.13")
    found = quietly(oftsurgery.extract, model, quietly(oftsurgery.fold, model, adapter))
    own = found.report["a"]
    assert own.rotation.side == "output"
    assert own.rotation.block_size == 8
    true_error = float((own.rotation.generator - true.generator).norm() / true.generator.norm())
    assert true_error < within
    assert true_error < 1.5 * own.error
    assert own.explained > 0.9


KINDS = ["kohya-sd-scripts-0.9.0/dim8_alpha0.02", "lycoris-4.1.3/diag-oft_constraint"]


@pytest.mark.parametrize("folder", KINDS)
def test_an_image_tools_adapter_comes_back(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the limit applied, of linear layers and convolutions; in memory, on disk, by tasks, and as a file of LyCORIS. The sizes of
    so small weights are given.
    """
    golden = next(g for g in GOLDENS if g.folder == folder)
    adapter, tensors = golden.adapter(), golden.base_tensors()
    wanted = {m.block_size for m in adapter.modules.values()}
    b = max(wanted)
    one = {p: m for p, m in adapter.modules.items() if m.block_size == b}
    own = oftsurgery.OFTAdapter(one, dialect=adapter.dialect, bias="kept")
    model = model_of(tensors)
    folded = quietly(oftsurgery.fold, model, own)
    found = quietly(oftsurgery.extract, model, folded, b, side="output")
    assert len(found.modules) == len(one)
    again = quietly(oftsurgery.fold, model, found)
    for name, tensor in folded.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, atol=1e-4), name
    base, merged, out = (tmp_path / f"{name}.safetensors" for name in ("base", "merged", "out"))
    save_file(tensors, base)
    quietly(oftsurgery.fold_checkpoint, base, own, merged, trained_on="plain")
    on_disk = quietly(oftsurgery.extract_checkpoint, base, merged, b, side="output")
    with ThreadPoolExecutor(1) as threads:
        by_tasks = quietly(oftsurgery.extract_checkpoint, base, merged, b, side="output", executor=threads)
    assert on_disk.fingerprint == by_tasks.fingerprint
    words = ["extract", str(base), str(merged), "--block-size", str(b), "--side", "output"]
    assert main([*words, str(tmp_path / "folder")]) == 2
    assert "name a file: OUTPUT.safetensors" in capsys.readouterr().err
    assert quietly(main, [*words, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"].keys() == on_disk.modules.keys()
    assert all(name.startswith("lycoris_") for name in load_file(out))
    last = quietly(oftsurgery.fold, model, oftsurgery.load_adapter(out))
    for name, tensor in folded.state_dict().items():
        assert torch.allclose(last.state_dict()[name], tensor, atol=1e-4), name


def test_the_command_finds_side_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A size for each number of outputs, as kohya's number of blocks gives them; and inputs are no file of LyCORIS."""
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_file({"a.weight": weight(64, 96), "b.weight": weight(32, 96, 1), "c.weight": weight(32, 64, 2)}, base)
    maps = {"a": turn(64, 16, 0.3, 1), "b": turn(32, 8, 0.3, 2), "c": turn(32, 8, 0.3, 3)}
    adapter = oftsurgery.OFTAdapter(maps, dialect="peft-0.13")
    quietly(oftsurgery.fold_checkpoint, base, adapter, merged, trained_on="plain")
    found = quietly(oftsurgery.extract_checkpoint, base, merged)
    assert {p: (m.side, m.block_size) for p, m in found.modules.items()} == {
        "a": ("output", 16), "b": ("output", 8), "c": ("output", 8),
    }  # fmt: skip
    assert all(distance(found.report[p].rotation, m) < 1e-4 for p, m in maps.items())
    inputs = {"a": Rotation(0.1 * torch.randn(12, 28, generator=torch.Generator().manual_seed(1)), shared=False)}
    quietly(oftsurgery.fold_checkpoint, base, oftsurgery.OFTAdapter(inputs), merged, trained_on="plain", force=True)
    assert quietly(main, ["extract", str(base), str(merged), str(tmp_path / "x.safetensors")]) == 2
    assert "name a folder" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    assert quietly(main, ["extract", str(base), str(merged), str(tmp_path / "x")]) == 0
