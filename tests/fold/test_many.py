"""Folds of many adapters into one base: the bytes of single folds, and no fold touches another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODELS, adapted, bnb_config, build, file_bytes, linearised, load, quiet_fold
from checkpoints import quiet_transformers as quiet
from held import Held
from independent import make_case
from layered import write_inputs
from safetensors.torch import load_file, save_file
from warned import quietly

import oftsurgery
from oftsurgery import MatchError, NonFiniteError, StateError
from oftsurgery.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in NF4 as ``base``, and adapters of it: ``a``; ``b`` of other modules; ``nan``; ``other`` of another model."""
    place = tmp_path_factory.mktemp("many")
    with quiet():
        build("llama").save_pretrained(place / "plain")
        load(place / "plain", MODELS["llama"][0], quantization_config=bnb_config("nf4", double=True)).save_pretrained(
            place / "base"
        )
        for name, targets in {"a": ["q_proj", "down_proj"], "b": ["q_proj", "v_proj"]}.items():
            adapted(linearised(build("llama")), targets, seed=len(name) + ord(name)).save_pretrained(place / name)
        adapted(linearised(build("bert")), MODELS["bert"][2]).save_pretrained(place / "other")
    (place / "nan").mkdir()
    (place / "nan" / "adapter_config.json").write_bytes((place / "a" / "adapter_config.json").read_bytes())
    held = {name: torch.full_like(t, 3e38) for name, t in load_file(place / "a" / "adapter_model.safetensors").items()}
    save_file(held, place / "nan" / "adapter_model.safetensors")
    return place


def many(place: Path, out: Path, folds: dict[str, dict[str, Any]], **options: Any) -> dict[str, Any]:
    given = [
        {"adapter": place / fold["adapter"], **{k: v for k, v in fold.items() if k != "adapter"}, "output": out / name}
        for name, fold in folds.items()
    ]
    with quiet():
        found = quietly(
            oftsurgery.fold_many, place / "base", given, **{"rounding": "nearest", "max_shard_size": "40KB"} | options
        )
    return {Path(output).name: end for output, end in found.items()}


def test_each_output_is_that_of_a_single_fold(place: Path, tmp_path: Path) -> None:
    folds: dict[str, dict[str, Any]] = {
        "same": {"adapter": "a", "undo": tmp_path / "a.undo"},
        "other modules": {"adapter": "b"},
        "bf16": {"adapter": "a", "format": "bf16", "max_shard_size": "70KB"},
        "half": {"adapter": "b", "strength": 0.5, "strength_mode": "linear", "rounding": "preserve"},
        "int8": {"adapter": "b", "format": "int8"},
    }
    seen: list[tuple[int, int]] = []
    ended = many(place, tmp_path, folds, progress=lambda done, total, _: seen.append((done, total)))
    assert not [end for end in ended.values() if isinstance(end, Exception)]
    assert seen[-1][0] == seen[-1][1]
    for name, fold in folds.items():
        own = {k: v for k, v in fold.items() if k not in ("adapter", "undo")}
        undo = {"undo": tmp_path / "alone.undo"} if "undo" in fold else {}
        with quiet():
            record = quiet_fold(
                place / "base",
                place / fold["adapter"],
                tmp_path / "alone" / name,
                **{"max_shard_size": "40KB"} | own | undo,
            )
        assert ended[name] == record
        assert file_bytes(tmp_path / name) == file_bytes(tmp_path / "alone" / name)
    assert (tmp_path / "a.undo").read_bytes() == (tmp_path / "alone.undo").read_bytes()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_fold_that_fails_leaves_the_others_alone(place: Path, tmp_path: Path) -> None:
    """One fold fails in its plan, one while it computes, one before it writes, and one at its publishing."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("earlier content")
    folds = {name: {"adapter": name} for name in ("other", "a", "nan", "b")} | {"there": {"adapter": "a"}}
    ended = many(place, tmp_path, folds)
    assert isinstance(ended["other"], MatchError)
    assert isinstance(ended["nan"], NonFiniteError)
    assert isinstance(ended["there"], StateError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "there"]
    assert file_bytes(tmp_path / "there") == {"old": b"earlier content"}
    for name in ("a", "b"):
        with quiet():
            quiet_fold(place / "base", place / name, tmp_path / "alone" / name, max_shard_size="40KB")
        assert file_bytes(tmp_path / name) == file_bytes(tmp_path / "alone" / name)


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "work")
    options = {"max_shard_size": "350KB", "trained_on": "plain"}
    folds = [
        {"adapter": str(folder / "adapter"), "output": str(folder / name), "strength": s}
        for name, s in (("x", 1.0), ("y", 0.5))
    ]
    for fold in folds:
        quiet_fold(
            folder / "base",
            fold["adapter"],
            Path(str(fold["output"]) + "-alone"),
            strength=fold["strength"],
            rounding="preserve",
            **options,
        )
    script = f"""if True:
        import os, signal, oftsurgery, warnings
        warnings.simplefilter("ignore")
        def progress(done, total, what):
            if done > 0.6 * total:
                os.kill(os.getpid(), signal.SIGKILL)
        oftsurgery.fold_many({str(folder / "base")!r}, {folds!r}, **{options!r}, progress=progress)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    noted = {name: json.loads((folder / f".{name}.oftsurgery" / ".state.json").read_text())["shards"] for name in "xy"}
    kept = {(n, file): (folder / f".{n}.oftsurgery" / file).stat().st_mtime_ns for n in "xy" for file in noted[n]}
    assert kept
    with pytest.raises(StateError, match="unfinished work"):
        raise quietly(oftsurgery.fold_many, folder / "base", folds, **options)[folds[0]["output"]]
    ended = quietly(oftsurgery.fold_many, folder / "base", folds, **options, resume=True)
    assert not [end for end in ended.values() if isinstance(end, Exception)]
    for name in "xy":
        assert file_bytes(folder / name) == file_bytes(folder / f"{name}-alone")
    assert {(name, file): (folder / name / file).stat().st_mtime_ns for name, file in kept} == kept


def test_few_weights_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number does not grow with the number of folds."""
    adapter = make_case("0.21 exact", 64, 64).adapter
    adapter = replace(
        adapter, modules={f"layers.{i}": next(iter(adapter.modules.values())) for i in range(20)}, config={}
    )
    (tmp_path / "base").mkdir()
    save_file({f"layers.{i}.weight": torch.randn(64, 64) for i in range(20)}, tmp_path / "base" / "model.safetensors")
    held = Held(monkeypatch)
    folds = [{"adapter": adapter, "output": tmp_path / f"out-{i}"} for i in range(12)]
    ended = oftsurgery.fold_many(tmp_path / "base", folds, trained_on="plain")
    assert len(held.made) == 240
    assert not [end for end in ended.values() if isinstance(end, Exception)]
    assert held.most <= 4


def test_what_a_fold_of_many_refuses(place: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"no setting 'calibration'"):
        many(place, tmp_path, {"x": {"adapter": "a", "calibration": "self"}})
    with pytest.raises(StateError, match=r"has no output"):
        oftsurgery.fold_many(place / "base", [{"adapter": "a"}])
    with pytest.raises(StateError, match=r"two folds have one output"):
        oftsurgery.fold_many(
            place / "base", [{"adapter": "a", "output": "x"}, {"adapter": "b", "output": os.curdir + "/x"}]
        )
    ended = many(place, tmp_path, {"x": {"adapter": "a", "rounding": "calibrated"}})
    assert isinstance(ended["x"], StateError)
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = [{"adapter": str(place / name), "output": f"out/{name}"} for name in ("a", "other", "b")]
    Path("list.yaml").write_text(json.dumps(listed))
    with quiet():
        code = main(["fold-many", str(place / "base"), "--adapters", "list.yaml", "--rounding", "nearest", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 2
    assert found["out/other"]["kind"] == "MatchError"
    assert "error" not in found["out/a"]
    assert len(found["out/a"]["modules"]) == 4
    assert oftsurgery.verify_checkpoint("out/b", place / "base", place / "b").ok
    Path("list.yaml").write_text("a: b")
    assert main(["fold-many", str(place / "base"), "--adapters", "list.yaml"]) == 2
    assert "the file is no list of folds" in capsys.readouterr().err
