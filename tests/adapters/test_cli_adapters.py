"""``oftsurgery extract`` and ``oftsurgery adapter``: files in, files out, tables and JSON."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from rotated import rotation
from transformers import BertConfig, BertModel

import oftsurgery
from oftsurgery import OFTAdapter
from oftsurgery.cli import main as cli

MODULE = "encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE, MERGED (ADAPTER folded in), ADAPTER, OTHER, and SERIES: truncated, of norm 0.4."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256, vocab_size=99
    )
    BertModel(config).save_pretrained(folder / "BASE")
    one = OFTAdapter({MODULE: rotation(64, 16, 0.3, 1)})
    one.save(folder / "ADAPTER")
    OFTAdapter({MODULE: rotation(64, 32, 0.2, 2)}).save(folder / "OTHER")
    oftsurgery.fold_checkpoint(folder / "BASE", one, folder / "MERGED", trained_on="plain")
    one.save(folder / "SERIES")
    path = folder / "SERIES" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_cayley_neumann": True}))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(w) for w in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def blocks(folder: Path) -> torch.Tensor:
    return oftsurgery.load_adapter(folder).modules[MODULE].blocks


def test_extract(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "extract", place / "BASE", place / "MERGED", tmp_path / "out", "-v")
    assert code == 0
    assert (
        " ".join(out.splitlines()[0].split()) == "module side block size angle change residual rounding explained error"
    )
    assert out.splitlines()[1].split()[:3] == [MODULE, "input", "16"]
    assert "1 rotations explain 100.0% of the difference" in out
    assert err == f"1 of 1: {MODULE}\n"
    torch.testing.assert_close(blocks(tmp_path / "out"), blocks(place / "ADAPTER"), rtol=0, atol=1e-5)
    code, out, _ = run(
        capsys, "extract", place / "BASE", place / "MERGED", tmp_path / "out", "--json", "--force", "--block-size", 32
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["modules"][MODULE]["block_size"] == 32
    assert facts["explained"] > 0.99
    assert facts["unexplained"] == []


def test_extract_refuses(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "extract", place / "BASE", place / "BASE", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "ExtractionError: no weight of the merged model is rotated" in err
    code, _, err = run(capsys, "extract", place / "BASE", place / "MERGED", place / "ADAPTER")
    assert code == 2
    assert "the destination exists" in err


def test_show(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "adapter", "show", place / "SERIES")
    assert code == 0
    row = out.splitlines()[1].split("  ")
    assert [cell.strip() for cell in row if cell][:4] == [MODULE, "input", "4×16", "Neumann, 5 terms"]
    assert "dialect: peft-0.21" in out
    code, out, _ = run(capsys, "adapter", "show", place / "ADAPTER", "--json")
    facts = json.loads(out)["modules"][MODULE]
    assert (facts["block_size"], facts["blocks"], facts["map"], facts["scale"]) == (16, 4, "exact Cayley", False)


def test_convert_states_the_residual(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "adapter", "convert", place / "SERIES", tmp_path / "out", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["residual"] == facts["modules"][MODULE] == pytest.approx(0.3**4, rel=1e-5)
    assert "ConversionWarning: 1 truncated Neumann series became the nearest rotations" in err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert oftsurgery.load_adapter(tmp_path / "out").modules[MODULE].cayley.exact


def test_scale_compose_and_blend(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (oftsurgery.load_adapter(place / n) for n in ("ADAPTER", "OTHER"))
    expected = {
        "half": a.scaled(0.5),
        "back": a.inverse(),
        "chain": a.compose(b).compose(a),
        "mean": oftsurgery.blend([(a, 0.5), (b, -0.25)]),
    }
    one, two = place / "ADAPTER", place / "OTHER"
    commands = {
        "half": ["scale", one, 0.5, tmp_path / "half"],
        "back": ["scale", one, -1, tmp_path / "back"],
        "chain": ["compose", one, two, one, tmp_path / "chain"],
        "mean": ["blend", one, two, tmp_path / "mean", "--weights", 0.5, -0.25],
    }
    for name, words in commands.items():
        code, out, _ = run(capsys, "adapter", *words)
        assert (code, out) == (0, f"wrote {tmp_path / name}: 1 modules\n")
        torch.testing.assert_close(blocks(tmp_path / name), expected[name].modules[MODULE].blocks, rtol=0, atol=1e-6)
    code, _, err = run(capsys, "adapter", "blend", one, two, tmp_path / "no", "--weights", 1)
    assert code == 2
    assert "2 adapters and 1 weights" in err
    code, _, err = run(capsys, "adapter", "scale", one, 20, tmp_path / "no")
    assert code == 2
    assert "at π and beyond" in err
    assert not (tmp_path / "no").exists()


def test_quiet_says_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "adapter", "convert", place / "SERIES", tmp_path / "out", "-q") == (0, "", "")


@pytest.mark.parametrize("verb", ["show", "convert", "scale", "compose", "blend"])
def test_each_verbs_example_runs(
    verb: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["adapter", verb, "--help"])
    words = capsys.readouterr().out.split("example: ")[1].split()
    assert words[:3] == ["oftsurgery", "adapter", verb]
    monkeypatch.chdir(tmp_path)
    for name in ("ADAPTER", "OTHER"):
        (tmp_path / name).symlink_to(place / name)
    assert cli.main(words[1:]) == 0
    assert (tmp_path / "OUTPUT").exists() == ("OUTPUT" in words)
