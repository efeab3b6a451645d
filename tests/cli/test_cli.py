"""The command line as a user runs it: real checkpoints, real adapters, exit codes, and what is printed where."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from checkpoints import bnb_config, load
from models import distance, live, llama, logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oftsurgery.cli import arguments
from oftsurgery.cli import main as cli
from oftsurgery.formats import codecs

COMMANDS = [
    "plan",
    "fold",
    "unfold",
    "extract",
    "adapter",
    "export",
    "verify",
    "doctor",
    "report",
    "show",
    "push",
    "warmup",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with BASE, ADAPTER and FOLDED, as the examples of the help name them."""
    folder = tmp_path_factory.mktemp("cli")
    llama().save_pretrained(folder / "BASE")
    live(llama()).save_pretrained(folder / "ADAPTER")
    live(llama(), seed=1).save_pretrained(folder / "OTHER")
    assert (
        cli.main(
            [
                "fold",
                str(folder / "BASE"),
                str(folder / "ADAPTER"),
                str(folder / "FOLDED"),
                "-q",
                "--trained-on",
                "plain",
            ]
        )
        == 0
    )
    return folder


def run(place: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "oftsurgery", *arguments],
        cwd=place,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_an_example_that_runs(
    command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    example = capsys.readouterr().out.split("example: ")[1].strip()
    words = " ".join(example.split()).removeprefix("oftsurgery ").split()
    assert words[0] == command
    for name in ("BASE", "ADAPTER", "FOLDED"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "FOLDER").symlink_to(place / "FOLDED")
    (tmp_path / "PATH").symlink_to(place / "BASE")
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 0
    if "OUTPUT" in words and command != "extract":
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "OUTPUT") is not None


def test_each_command_imports_what_it_uses(tmp_path: Path) -> None:
    """In a process of its own, where nothing else has."""
    words = {
        "plan": "x y",
        "fold": "x y z",
        "unfold": "x z --base y",
        "extract": "x y z",
        "adapter show": "x",
        "adapter convert": "x z",
        "adapter scale": "x 1 z",
        "adapter compose": "x y z",
        "adapter blend": "x y z --weights 1 1",
        "export": "--base x --adapter y --output z",
        "verify": "x y z",
        "doctor": "x",
        "report": "x",
        "show": "x",
        "push": "x owner/name",
    }
    assert {command.partition(" ")[0] for command in words} == set(COMMANDS) - {"warmup"}  # which takes nothing
    script = (
        "import os, sys\nimport torch\nfrom oftsurgery.cli.main import main\nfor command in sys.argv[1:]:\n"
        "    if os.fork() == 0: os._exit(main(command.split()))\n    print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    given = [f"{command} {rest}" for command, rest in words.items()]
    done = subprocess.run(
        [sys.executable, "-c", script, *given], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["2"] * len(given), done.stderr
    assert done.stderr.count("Error: ") == len(done.stderr.splitlines()) == len(given)


def test_tools_export_is_the_same_command(place: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "export.py"
    said = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    example = " ".join(said.split("example: ")[1].split()).removeprefix("python tools/export.py ").split()
    words = [str(place / w) if w in ("BASE", "ADAPTER") else str(tmp_path / w) if w == "OUTPUT" else w for w in example]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "OUTPUT").eval()
    assert folded.dtype == torch.bfloat16
    base = load(place / "BASE", "LlamaForCausalLM", quantization_config=bnb_config("nf4", double=True))
    assert distance(logits(folded), logits(live(base))) < 0.02


def test_fold_prints_progress_and_error_on_stderr_and_the_result_on_stdout(place: Path, tmp_path: Path) -> None:
    code, out, err = run(place, "fold", "BASE", "ADAPTER", str(tmp_path / "out"), "--format", "nf4", "--double-quant")
    assert code == 0
    assert out == f"wrote {tmp_path / 'out'}: 4 weights carry 1 adapter(s), 99.0% of the change kept\n"
    assert "(100%)" in err
    assert "RoundingWarning: folding rounded 4 weights to nf4 (double quantisation): relative error" in err
    assert "Traceback" not in err
    assert "\x1b" not in err  # no terminal, no control sequences
    code, out, err = run(place, "fold", "BASE", "ADAPTER", str(tmp_path / "quiet"), "-q", "--format", "nf4")
    assert (code, out, err) == (0, "", "")
    code, out, err = run(place, "fold", "BASE", "ADAPTER", str(tmp_path / "loud"), "-v", "--trained-on", "plain")
    assert "model.layers.0.self_attn.q_proj" in err
    code, out, err = run(place, "fold", "BASE", "ADAPTER", str(tmp_path / "json"), "--json", "--trained-on", "plain")
    assert json.loads(out)["modules"].keys() == {
        f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert json.loads(out) == json.loads((tmp_path / "json" / "oftsurgery.json").read_text())


def test_a_terminal_gets_a_bar_in_bytes(place: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "oftsurgery", "fold", "BASE", "ADAPTER", str(tmp_path / "out"), "--trained-on", "plain"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    assert process.wait() == 0
    process.stdout.close()  # type: ignore[union-attr]
    os.close(leader)
    assert b"100%|" in seen
    assert b"kB" in seen or b"k/" in seen


REFUSED = {
    "unknown format": (["fold", "BASE", "ADAPTER", "x", "--format", "gguf"], 2, "invalid choice: 'gguf'"),
    "no such base": (["fold", "nowhere", "ADAPTER", "x"], 2, "CheckpointError: the folder does not exist"),
    "no such adapter": (["fold", "BASE", "nowhere", "x"], 2, "AdapterError: the folder does not exist"),
    "base is an adapter": (["fold", "ADAPTER", "ADAPTER", "x"], 2, "the folder holds an adapter, not a model"),
    "adapter is a model": (
        ["fold", "BASE", "BASE", "x"],
        2,
        "neither the folder nor a subfolder has adapter_config.json",
    ),
    "output exists": (
        ["fold", "BASE", "ADAPTER", "FOLDED", "--trained-on", "plain"],
        2,
        "StateError: the destination exists",
    ),
    "folded already": (["fold", "FOLDED", "ADAPTER", "x"], 2, "folded into the checkpoint already"),
    "below a file": (
        ["fold", "BASE", "ADAPTER", "FOLDED/config.json/x", "--trained-on", "plain"],
        2,
        "a file is in the place of a folder of the path to write",
    ),
    "output in the base": (
        ["fold", "BASE", "ADAPTER", "BASE/x/y", "--trained-on", "plain"],
        2,
        "the destination is inside the source",
    ),
    "output in the adapter": (
        ["fold", "BASE", "ADAPTER", "ADAPTER/x", "--trained-on", "plain"],
        2,
        "the destination is inside the adapter",
    ),
    "unknown device": (
        ["fold", "BASE", "ADAPTER", "x", "--device", "tpu9"],
        2,
        "torch cannot compute on the device 'tpu9' (Invalid device string: 'tpu9') Remedy: choose 'cpu'",
    ),
    "no values on this device": (
        ["unfold", "FOLDED", "x", "--base", "BASE", "--device", "meta"],
        2,
        "torch cannot compute on the device 'meta'",
    ),
    "bad size": (["fold", "BASE", "ADAPTER", "x", "--max-shard-size", "huge"], 2, "'huge' is not a size"),
    "quantised as it is": (
        ["fold", "BASE", "ADAPTER", "x", "--quantize", "nf4"],
        2,
        "keeps plain weights plain, but the quantisation nf4 was asked for too",
    ),
    "double quant of nothing": (
        ["plan", "BASE", "ADAPTER", "--double-quant"],
        2,
        "double quantisation was asked for, but nothing is to be quantised to 4 bits",
    ),
    "a graph's flags without one": (
        ["export", "--base", "BASE", "--adapter", "ADAPTER", "--output", "x", "--with-past"],
        2,
        "--with-past belongs to --format onnx and onnx-quantized",
    ),
    "no adapter": (["export", "--base", "BASE", "--output", "x"], 2, "arguments are required: --adapter"),
    "undo of a graph": (
        ["export", "--base", "BASE", "--adapter", "ADAPTER", "--output", "x", "--format", "onnx", "--undo", "u"],
        2,
        "a graph cannot be unfolded",
    ),
    "unfold with neither": (["unfold", "FOLDED", "x"], 2, "one of the arguments --base --undo --adapter is required"),
    "unfold the wrong one": (["unfold", "FOLDED", "x", "--adapter", "OTHER"], 2, "last fold is of"),
    "unfold from the wrong base": (["unfold", "FOLDED", "x", "--base", "FOLDED"], 2, "not the one that was folded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_usage_exits_2_with_one_line_and_nothing_written(
    case: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, text = REFUSED[case]
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    try:
        got = cli.main(words)
    except SystemExit as stop:  # argparse's own
        got = stop.code
    assert got == code
    err = capsys.readouterr().err
    assert text in " ".join(err.split())
    assert "Traceback" not in err
    assert sorted(place.rglob("*")) == before


def test_verify_exits_1_where_a_weight_is_not_what_it_should_be(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["verify", "FOLDED", "BASE", "ADAPTER"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert cli.main(["verify", "FOLDED", "BASE", "OTHER", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    errors = [m["error"] for m in report["modules"].values()]
    assert errors == sorted(errors, reverse=True)
    assert cli.main(["verify", "FOLDED", "BASE", "OTHER", "--tolerance", "0.9"]) == 0


def test_an_interrupt_exits_130_and_says_how_to_go_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import oftsurgery.folding.engine

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(oftsurgery.folding.engine, "fold_encoded", interrupt)
        assert (
            cli.main(
                ["fold", str(place / "BASE"), str(place / "ADAPTER"), str(tmp_path / "out"), "--trained-on", "plain"]
            )
            == 130
        )
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (
        cli.main(
            [
                "fold",
                str(place / "BASE"),
                str(place / "ADAPTER"),
                str(tmp_path / "out"),
                "--resume",
                "--trained-on",
                "plain",
            ]
        )
        == 0
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_of_a_command_that_cannot_go_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    monkeypatch.setattr("oftsurgery.api.checkpoints.plan_fold", interrupt)
    for words in (
        ["plan", "BASE", "ADAPTER", "--trained-on", "plain"],
        ["fold", "BASE", "ADAPTER", "x", "--dry-run", "--trained-on", "plain"],
    ):
        assert cli.main(words) == 130
        assert capsys.readouterr().err == "interrupted: nothing was written\n"


@pytest.mark.parametrize("words", [[], ["adapter"]])
def test_a_bare_command_prints_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    bare = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    assert bare == capsys.readouterr().out
    assert "usage: oftsurgery" in bare


@pytest.mark.skipif(shutil.which("bash") is None, reason="runs bash")
def test_bash_completes_commands_flags_and_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", "bash"])
    assert stop.value.code == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    script = (
        "source completion; for line in 'oftsurgery fo' 'oftsurgery fold --rou' 'oftsurgery fold --format b'; do\n"
        "COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_oftsurgery; echo ${COMPREPLY[@]}; done"
    )
    done = subprocess.run(
        [str(shutil.which("bash")), "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["fold", "fold-many", "--rounding", "bnb", "bf16"], done.stderr


@pytest.mark.parametrize("says", [["--trained-on", "nf4-double"], ["--quantize", "nf4", "--double-quant"]])
def test_a_quantised_graph_has_the_format_of_the_training(
    says: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(place / "BASE"), str(place / "GRAPH"), "--adapter", str(place / "ADAPTER"), *says]
    assert cli.main([*words, "--format", "onnx-quantized", "--dry-run", "--json"]) == 0
    assert {f["to"] for f in json.loads(capsys.readouterr().out)["folds"]} == {"nf4 (double quantisation)"}


def test_merge_is_fold(place: Path, tmp_path: Path) -> None:
    for word in ("merge", "fold"):
        assert run(place, word, "BASE", "ADAPTER", str(tmp_path / "new" / word), "-q", "--trained-on", "plain") == (
            0,
            "",
            "",
        )
    merged, folded = (
        {p.name: p.read_bytes() for p in (tmp_path / "new" / word).iterdir()} for word in ("merge", "fold")
    )
    assert merged == folded


def test_missing_parents_are_made_and_do_not_stay_after_an_error(place: Path, tmp_path: Path) -> None:
    code, _, err = run(
        place,
        "fold",
        "BASE",
        "ADAPTER",
        str(tmp_path / "a" / "b"),
        "--undo",
        str(tmp_path / "c" / "d" / "undo"),
        "--trained-on",
        "plain",
    )
    assert (code, sorted(p.name for p in tmp_path.iterdir())) == (0, ["a", "c"]), err
    code, _, err = run(place, "adapter", "scale", "ADAPTER", "nan", str(tmp_path / "e" / "f"))
    assert (code, sorted(p.name for p in tmp_path.iterdir())) == (2, ["a", "c"]), err
    code, _, err = run(place, "report", str(tmp_path / "a" / "b"), "--html", str(tmp_path / "g" / "h" / "r.html"))
    assert code == 0, err
    assert (tmp_path / "g" / "h" / "r.html").is_file()


def test_an_error_as_json(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["fold", "nowhere", "ADAPTER", "x", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "error": {
            "type": "CheckpointError",
            "message": "the folder does not exist",
            "path": "nowhere",
            "remedy": "give a folder that save_pretrained wrote, or a Hub id 'owner/name'",
            "exit_code": 2,
        }
    }
    assert said.err.startswith("oftsurgery: CheckpointError: the folder does not exist [at nowhere] Remedy: ")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RuntimeError("hf_" + "a" * 30), 4, "this error is a fault of oftsurgery: report the lines above"),
        (PermissionError(13, "Permission denied", "x"), 3, "PermissionError: [Errno 13] Permission denied: 'x'"),
        (MemoryError("no room"), 3, "MemoryError: no room"),
    ],
)
def test_an_unforeseen_error(
    error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("oftsurgery.cli.fold.base_of", fail)
    assert cli.main(["plan", "x", "y", "--json"]) == code
    said = capsys.readouterr()
    assert text in said.err
    assert ("Traceback" in said.err) == (code == 4)
    assert "hf_aaa" not in said.err + said.out
    assert json.loads(said.out)["error"]["exit_code"] == code


def test_a_full_disk_exits_3(place: Path) -> None:
    # the limit on file sizes stands in for a disk that is full: both are an OSError of write()
    script = (
        "import resource, sys\n"
        "from oftsurgery.cli import main as cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.exit(cli.main(['fold', 'BASE', 'ADAPTER', 'big', '--trained-on', 'plain']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "DiskError: the file is larger than this system allows" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in place.iterdir() if "big" in p.name]


def test_the_dtype_of_the_trainers_loading_decides_the_codes(place: Path, tmp_path: Path) -> None:
    """transformers quantises what it has loaded: float32 weights loaded as bfloat16 give other codes."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trained_on = AutoModelForCausalLM.from_pretrained(
        place / "BASE", quantization_config=quantization, dtype=torch.bfloat16
    )
    words = ["fold", str(place / "BASE"), str(place / "ADAPTER"), "--format", "nf4", "-q"]
    assert cli.main([*words, str(tmp_path / "bf16"), "--load-dtype", "bfloat16"]) == 0
    assert cli.main([*words, str(tmp_path / "fp32")]) == 0
    name = "model.layers.0.self_attn.k_proj.weight"  # quantised, not rotated
    same, other = (load_file(tmp_path / d / "model.safetensors")[name] for d in ("bf16", "fp32"))
    assert torch.equal(same, trained_on.state_dict()[name])
    assert not torch.equal(other, same)


def test_the_roundings_offered_are_those_there_are() -> None:
    assert arguments.ROUNDINGS == codecs.ROUNDINGS
