"""Hostile trees beside the weights: index files that lead outside, links, thousands of files, code. What goes along is data."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import adapted, build, file_bytes, quiet_fold

import oftsurgery
from oftsurgery.checks.doctor import doctor
from oftsurgery.cli import main as cli
from oftsurgery.cli.arguments import ExitCode

SECRET = "hf_" + "Qq9" * 12


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    build("llama").save_pretrained(root / "base")
    adapted(build("llama"), ["q_proj"]).save_pretrained(root / "adapter")
    (root / "outside").mkdir()
    (root / "outside" / "config.json").write_text(json.dumps({"secret": SECRET}))
    (root / "outside" / "secret.py").write_text(f"# {SECRET}\n")
    return root


@pytest.fixture
def base(sound: Path, tmp_path: Path) -> Path:
    for name in ("base", "adapter", "outside"):
        shutil.copytree(sound / name, tmp_path / name)
    return tmp_path / "base"


def modules(base: Path, *paths: Any) -> None:
    rows = [{"idx": i, "name": str(i), "path": path, "type": "x.y"} for i, path in enumerate(paths)]
    (base / "modules.json").write_text(json.dumps(rows))


def router(base: Path, *paths: str) -> None:
    (base / "router_config.json").write_text(json.dumps({"types": dict.fromkeys(paths, "x"), "structure": {}}))


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


def many(folder: Path, count: int, ending: str = ".json") -> None:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}{ending}").touch()


def nested(base: Path) -> None:
    place = base
    for _ in range(30):
        router(place, "down")
        place = place / "down"
        place.mkdir()


def named_code_is_a_link(base: Path) -> None:
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.T", None]}}))
    link(base / "mine.py", base.parent / "outside" / "secret.py")


def tokenizer_is_a_link(base: Path) -> None:
    adapter = base.parent / "adapter"
    (adapter / "tokenizer_config.json").write_text("{}")
    link(adapter / "tokenizer.json", base.parent / "outside" / "config.json")


def chained_code(base: Path, count: int = 1500) -> None:
    for i in range(count):
        (base / f"m{i}.py").write_text(f"from .m{i + 1} import x\n")
    _auto_map(base, "m0.M")


def large_indexes(base: Path) -> None:
    for i in range(20):
        (base / f"{i}_config.json").write_text(json.dumps(["x" * 100] * 39_000))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "modules.json: parent": (lambda b: modules(b, "../outside"), "a folder outside the checkpoint: "),
    "modules.json: parent, inside a path": (
        lambda b: modules(b, "1_Pooling/../../outside"),
        "a folder outside the checkpoint: ",
    ),
    "modules.json: absolute": (lambda b: modules(b, str(b.parent / "outside")), "a folder outside the checkpoint: "),
    "modules.json: root": (lambda b: modules(b, "/"), "a folder outside the checkpoint: "),
    "modules.json: backslashes": (lambda b: modules(b, "..\\outside"), "a folder outside the checkpoint: "),
    "modules.json: a drive": (lambda b: modules(b, "C:outside"), "a folder outside the checkpoint: "),
    "modules.json: a null": (lambda b: modules(b, "1\0_Pooling"), "a folder outside the checkpoint: "),
    "modules.json: hidden": (lambda b: modules(b, ".git"), "hidden folder"),
    "router: parent": (lambda b: router(b, "../outside"), "a folder outside the checkpoint: "),
    "module: a link that leaves": (
        lambda b: (modules(b, "1_Pooling"), link(b / "1_Pooling", b.parent / "outside")),
        "link that leaves",
    ),
    "module: a file that is a link": (
        lambda b: (
            modules(b, "1_Pooling"),
            link(b / "1_Pooling" / "config.json", b.parent / "outside" / "config.json"),
        ),
        "link that leaves",
    ),
    "module: a thousand files": (
        lambda b: (modules(b, "1_Pooling"), many(b / "1_Pooling", 1000)),
        "more than 512 files",
    ),
    "templates: a thousand files": (
        lambda b: many(b / "additional_chat_templates", 1000, ".jinja"),
        "more than 512 files",
    ),
    "templates: a link": (
        lambda b: link(b / "additional_chat_templates" / "a.jinja", b.parent / "outside" / "config.json"),
        "link that leaves",
    ),
    "module: folders in a circle": (
        lambda b: (link(b / "here", "."), modules(b, "here/here/here")),
        "levels deep, more than the limit of 8",
    ),
    "modules within modules": (nested, "levels deep, more than the limit of 8"),
    "code that imports thousands of files": (chained_code, "more than 512 files"),
    "hundreds of megabytes of indexes": (large_indexes, "bytes, more than the limit of 67108864"),
    "code that is a link": (named_code_is_a_link, "link that leaves"),
    "the adapter's tokenizer is a link": (tokenizer_is_a_link, "link that leaves"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tree_that_leads_outside_is_refused(base: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, text = REFUSED[case]
    make(base)
    root = base.parent
    before = sorted(map(str, root.rglob("*")))
    with pytest.raises(oftsurgery.OFTSurgeryError, match=text) as caught:
        quiet_fold(base, root / "adapter", root / "out")
    assert caught.value.remedy
    assert sorted(map(str, root.rglob("*"))) == before
    assert (
        cli.main(["fold", str(base), str(root / "adapter"), str(root / "out"), "--trained-on", "plain"])
        == ExitCode.REFUSED
    )
    assert SECRET not in "".join(capsys.readouterr())
    if "adapter" not in case:
        assert any(f.severity == "error" for f in doctor(base))


IGNORED: dict[str, Callable[[Path], object]] = {
    "auto_map: parent": lambda b: _auto_map(b, "../outside/secret.S"),
    "auto_map: absolute": lambda b: _auto_map(b, str(b.parent / "outside" / "secret") + ".S"),
    "auto_map: no class": lambda b: _auto_map(b, "secret"),
    "auto_map: folders": lambda b: _auto_map(b, "a.b.S"),
    "auto_map: numbers": lambda b: _auto_map(b, 5),
    "auto_map: hidden": lambda b: _auto_map(b, ".secret.S"),
    "ten thousand modules": lambda b: modules(b, *map(str, range(10_000))),
    "modules of wrong types": lambda b: modules(b, 5, None, ["x"], {"a": 1}),
    "a link to itself": lambda b: link(b / "loop.json", "loop.json"),
    "a pipe": lambda b: os.mkfifo(b / "pipe.json"),
}


def _auto_map(base: Path, reference: Any) -> None:
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": reference}}))


@pytest.mark.parametrize("case", IGNORED)
def test_what_names_nothing_is_left_alone(base: Path, case: str) -> None:
    IGNORED[case](base)
    root, started = base.parent, time.monotonic()
    quiet_fold(base, root / "adapter", root / "out")
    assert time.monotonic() - started < 20
    assert not any(SECRET.encode() in data for data in file_bytes(root / "out").values())
    assert not list((root / "out").rglob("*.py"))


def test_code_goes_along_and_is_never_imported(base: Path) -> None:
    """All that an index names, in all places that it may name it in."""
    root = base.parent
    mark = root / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom .part import x\n"
    names = ("configuration_mine", "modeling_mine", "tokenization_mine", "processing_mine", "pooling_mine", "part")
    for name in (*names, "setup", "sitecustomize", "conftest", "__init__"):
        (base / f"{name}.py").write_text(code)
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(code)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mine.C", "AutoModelForCausalLM": "modeling_mine.M"}
    (base / "config.json").write_text(json.dumps(config))
    _auto_map(base, ["tokenization_mine.T", None])
    (base / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "processing_mine.P"}}))
    modules(base, "")
    (base / "modules.json").write_text(json.dumps([{"path": "", "type": "pooling_mine.P"}]))
    before = set(sys.modules)
    record = quiet_fold(base, root / "adapter", root / "out")
    oftsurgery.verify_checkpoint(root / "out", base, root / "adapter")
    doctor(root / "out", base=base, adapter=root / "adapter")
    assert not mark.exists()
    assert not {m for m in set(sys.modules) - before if m.rpartition(".")[2] in names}
    expected = {"custom_generate/generate.py", *(f"{name}.py" for name in names)}
    assert set(record.code) == expected == {n for n in file_bytes(root / "out") if n.endswith(".py")}
    assert all(file_bytes(root / "out")[name] == file_bytes(base)[name] for name in expected)


@pytest.mark.parametrize(
    "name", ["../outside/config.json", "a/../../outside/config.json", "/etc/passwd", "a//b", "./a"]
)
def test_a_record_that_names_files_outside_is_refused(base: Path, name: str) -> None:
    root = base.parent
    quiet_fold(base, root / "adapter", root / "out")
    path = root / "out" / "oftsurgery.json"
    record = json.loads(path.read_text())
    record["files"][name] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(oftsurgery.CheckpointError, match="outside its folder"):
        oftsurgery.verify_checkpoint(root / "out")
    with pytest.raises(oftsurgery.CheckpointError, match="outside its folder"):
        oftsurgery.push_to_hub(root / "out", "me/x", dry_run=True)
