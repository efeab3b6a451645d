"""`verify` ends with one line of verdict, in words and in JSON; `--texts` compares the outputs too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from documented import without_our_warnings

import oftsurgery
from oftsurgery.cli.arguments import FORMATS
from oftsurgery.cli.main import main


@pytest.fixture
def out(example_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(example_folders)
    with without_our_warnings():
        oftsurgery.fold_checkpoint("BASE", "ADAPTER", tmp_path / "out")
    return tmp_path / "out"


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_the_verdict_is_the_last_line_and_stands_in_the_json(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = "ok: the output computes what the adapter's live layers compute within NF4's rounding; "
    assert main(["verify", str(out), "BASE", "ADAPTER"]) == 0
    assert last_line(capsys).startswith(right)
    assert main(["verify", str(out), "BASE", "ADAPTER", "--texts", "texts.jsonl"]) == 0
    verdict = last_line(capsys)
    assert verdict.startswith(right)
    assert "of the adapter's effect on logits is kept; the distance to the live model is" in verdict
    assert main(["verify", str(out), "BASE", "ADAPTER", "--texts", "texts.jsonl", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"] == verdict
    assert data["on_texts"]["outputs"]["logits"]["kl"] < data["on_texts"]["base"]["logits"]["kl"]
    assert data["kept"] == pytest.approx(1, abs=0.1)
    assert main(["verify", str(out), "BASE", "ADAPTER", "--tolerance", "1"]) == 0
    assert "within a relative error of 1;" in last_line(capsys)
    assert main(["verify", str(out)]) == 0
    assert last_line(capsys).startswith("ok: all ")


def test_a_wrong_output_is_told_with_its_reason(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out), "BASE", "ADAPTER", "--tolerance", "0.001"]) == 1
    assert last_line(capsys).startswith(
        "not ok: 4 of 4 weights are not what base and adapter give (worst: model.layers."
    )
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    assert main(["verify", str(out)]) == 1
    assert last_line(capsys).startswith("not ok: 1 of ")
    unfolded = tmp_path / "unfolded"
    shutil.copytree("BASE", unfolded)
    assert main(["verify", str(unfolded), "BASE", "ADAPTER"]) == 1
    assert last_line(capsys).startswith("not ok: ")


def test_texts_need_the_base_and_the_adapter(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out), "--texts", "texts.jsonl"]) == 2
    assert "give base and adapter (FOLDED BASE ADAPTER), or leave out the texts" in capsys.readouterr().err
    assert main(["verify", str(out), "BASE", "ADAPTER", "--texts", "none.txt"]) == 2
    assert "give a .txt, .jsonl or .parquet file of texts" in capsys.readouterr().err


def test_the_doctors_remedies_have_the_commands_own_folders(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "BASE", "--base", "BASE", "--adapter", "ADAPTER"]) == 1
    assert "remedy: fold the base again: oftsurgery fold BASE ADAPTER OUTPUT\n" in capsys.readouterr().out
    (out.parent / "my adapter").symlink_to(Path("ADAPTER").resolve())
    assert main(["doctor", str(out), "--adapter", str(out.parent / "my adapter")]) == 0
    said = capsys.readouterr().out
    assert f"oftsurgery unfold {out} OUTPUT --adapter '{out.parent / 'my adapter'}'\n" in said


def test_the_way_back_that_a_warning_names_is_there(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["unfold", str(out), str(tmp_path / "1"), "--adapter", "ADAPTER"]) == 0
    assert "unfolding with --base restores exactly" in capsys.readouterr().err
    assert main(["unfold", str(out), str(tmp_path / "2"), "--base", "BASE"]) == 0
    assert main(["fold", "BASE", "ADAPTER", str(tmp_path / "bf16"), "--format", "bf16"]) == 0
    assert main(["unfold", str(tmp_path / "bf16"), str(tmp_path / "3"), "--adapter", "ADAPTER"]) == 0
    assert "only the base itself is the exact way back" in capsys.readouterr().err
    assert main(["unfold", str(tmp_path / "bf16"), str(tmp_path / "4"), "--base", "BASE"]) == 2


def test_export_takes_every_format_of_fold(tmp_path: Path, out: Path) -> None:
    for format_ in FORMATS:
        words = ["BASE", str(out.parent / format_), "--adapter", "ADAPTER", "--format", format_]
        assert main(["export", *words, "--dry-run", "-q"]) == 0
