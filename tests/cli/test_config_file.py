"""Arguments from a YAML file: the same names as on the command line, which goes before the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from oftsurgery.cli import main as cli
from oftsurgery.cli.printing import with_flags

FILE = {
    "base": "B",
    "adapter": ["A1", "A2"],
    "output": "OUT",
    "format": "bf16",
    "trained-on": "nf4-double",
    "skip_modules": ["lm_head", "x"],
    "resume": True,
    "force": False,
    "max-shard-size": 1_000_000,
    "undo": "--odd name",
}


def parsed(tmp_path: Path, command: str, *words: str, file: Any = FILE) -> dict[str, Any]:
    path = tmp_path / "fold.yaml"
    path.write_text(file if isinstance(file, str) else yaml.safe_dump(file))
    return vars(cli.command_parser().parse_args([command, "--config", str(path), *words]))


def test_all_from_the_file(tmp_path: Path) -> None:
    found = parsed(tmp_path, "fold")
    given = {name.replace("-", "_"): value for name, value in FILE.items()}
    assert {name: found[name] for name in given} == given | {"max_shard_size": "1000000"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], ("B", ["A1", "A2"], "OUT", "bf16")),
        (["--format", "fp16"], ("B", ["A1", "A2"], "OUT", "fp16")),
        (["C", "D", "E"], ("C", ["D"], "E", "bf16")),
        (["D", "--format", "fp32", "E"], ("B", ["D"], "E", "fp32")),
        (["B", "A1", "A2", "OUT"], ("B", ["A1", "A2"], "OUT", "bf16")),
    ],
)
def test_the_command_line_goes_before_the_file(tmp_path: Path, words: list[str], wanted: tuple[Any, ...]) -> None:
    found = parsed(tmp_path, "fold", *words)
    assert (found["base"], found["adapter"], found["output"], found["format"]) == wanted
    assert found["skip_modules"] == ["lm_head", "x"]


def test_one_file_serves_plan_fold_and_export(tmp_path: Path) -> None:
    for command in ("plan", "fold", "merge", "export"):
        found = parsed(tmp_path, command)
        assert (found["base"], found["adapter"], found["trained_on"]) == ("B", ["A1", "A2"], "nf4-double")


def test_the_printed_file_gives_the_same_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fold", "B", "--format", "nf4", "A", "OUT", "--double-quant", "--skip-modules", "x", "y", "--token-like=1"]
    assert cli.main([*words[:-1], "--print-config"]) == 0
    printed = capsys.readouterr().out
    once = parsed(tmp_path, "fold", file=printed)
    direct = vars(cli.command_parser().parse_args(words[:-1]))
    here = {"config", "print_help", "as_file"}
    assert {k: v for k, v in once.items() if k not in here} == {k: v for k, v in direct.items() if k not in here}


def test_a_token_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--base", "B", "--adapter", "A", "--output", "O", "--token", "hf_secret", "--print-config"]
    assert cli.main(words) == 0
    assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({"formt": "bf16"}, "'formt' is no argument of this command; its arguments are adapter, "),
        ({"token": "hf_x"}, "'token' is no argument"),
        ({"resume": "yes please"}, "resume is a switch, so its value is true or false"),
        ({"format": ["bf16"]}, "format takes a text or a number"),
        ({"format": True}, "format takes a text or a number"),
        ({"adapter": [["A"]]}, "adapter takes texts"),
        ({"output": "-o"}, "the value '-o' of output begins as a flag"),
        ({"format": "bf17"}, "argument --format: invalid choice: 'bf17'"),
        ("- a\n- b", "holds no names with values"),
        ("a: [", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, file: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(tmp_path, "fold", file=file)
    assert said in capsys.readouterr().err


def test_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fold", "--config", "/nowhere.yaml"])
    assert "/nowhere.yaml cannot be read" in capsys.readouterr().err


def test_a_missing_name_and_a_command_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["fold", "B", "A", "OUT", "--config"], "oftsurgery fold: error: argument --config: expected one argument"),
        (["verify", "FOLDED", "--config", "/nowhere.yaml"], "unrecognized arguments: --config"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(words)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("choose format='bf16' (--format bf16), or undo=… (--undo FILE)", "choose --format bf16, or --undo FILE"),
        ("replace it with force=True (--force)", "replace it with --force"),
        ("format='bf16' with quantize='nf4' (--format bf16 --quantize nf4)", "--format bf16 --quantize nf4"),
        ("give the base (base=…, --base)", "give the base (--base)"),
        ("fold_into='original' needs rounding='grid'", "--fold-into original needs --rounding grid"),
        ("call oftsurgery.fold(model, format='bf16')", "call oftsurgery.fold(model, format='bf16')"),
        ("a relation x=1 (see the docs)", "a relation x=1 (see the docs)"),
        ("name a subfolder: subfolder='a b' (--adapter-subfolder a b)", "name a subfolder: --adapter-subfolder a b"),
    ],
)
def test_remedies_in_the_words_of_the_command_line(text: str, wanted: str) -> None:
    assert with_flags(text) == wanted
