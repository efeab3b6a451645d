"""A checkpoint's files may have other names and lie in a subfolder: a row of the table is all that a new layout takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from independent import make_case, seeded
from safetensors.torch import load_file, save_file

import oftsurgery
from oftsurgery.checks import doctor_checkpoint
from oftsurgery.files import layout
from oftsurgery.files.layout import Layout

PARTS = Layout("parts/part.safetensors", "parts/parts.json")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards in a subfolder, and the same tensors as transformers lays them out in the folder beside."""
    for module in (layout, doctor_checkpoint):
        monkeypatch.setattr(module, "LAYOUTS", (*module.LAYOUTS, PARTS))
    tensors = {f"{name}.weight": torch.randn(64, 64, generator=seeded(name)) for name in ("layer", "other")}
    for folder in ("source/parts", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    files = {name: f"part-{i}.safetensors" for i, name in enumerate(tensors, 1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, tmp_path / "source" / "parts" / file)
    (tmp_path / "source" / PARTS.index).write_text(json.dumps({"weight_map": files}))
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    return tmp_path / "source"


def test_another_layout_folds_to_the_same_tensors(source: Path, tmp_path: Path) -> None:
    adapter = make_case("0.21 exact", 64, 64).adapter
    folded = []
    for base in (source, tmp_path / "plain"):
        oftsurgery.fold_checkpoint(base, adapter, out := tmp_path / f"{base.name} folded", trained_on="plain")
        assert oftsurgery.verify_checkpoint(out, base, adapter).ok
        folded.append(load_file(out / "model.safetensors"))
    assert folded[0].keys() == folded[1].keys()
    assert all(torch.equal(tensor, folded[1][name]) for name, tensor in folded[0].items())
    oftsurgery.unfold_checkpoint(tmp_path / "source folded", back := tmp_path / "back", base=source)
    before, after = load_file(tmp_path / "plain" / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_the_doctor_reads_another_layout(source: Path) -> None:
    assert oftsurgery.doctor(source) == []
    save_file({"x": torch.ones(2)}, source / "parts" / "part-3.safetensors")
    assert [f.subject for f in oftsurgery.doctor(source)] == ["part-3.safetensors"]  # a stray
    swapped = {"layer.weight": "part-2.safetensors", "other.weight": "part-1.safetensors"}
    (source / PARTS.index).write_text(json.dumps({"weight_map": swapped}))
    (finding,) = oftsurgery.doctor(source)
    assert (finding.code, finding.evidence["in_another_shard"]) == ("index", 2)


def test_names_in_another_layout_stay_in_its_folder(source: Path, tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(2)}, source / "outside.safetensors")
    (source / PARTS.index).write_text(json.dumps({"weight_map": {"layer.weight": "../outside.safetensors"}}))
    with pytest.raises(oftsurgery.CheckpointError, match="names a file outside its folder"):
        oftsurgery.fold_checkpoint(
            source, make_case("0.21 exact", 64, 64).adapter, tmp_path / "out", trained_on="plain"
        )
