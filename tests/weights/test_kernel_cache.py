"""The CPU kernels' machine code on disk: read without a compiler, never stale or damaged, wherever there is room for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from backends import in_process

from oftsurgery.cli.main import main
from oftsurgery.cli.warmup import begin_compiling
from oftsurgery.weights import cpu_kernels
from oftsurgery.weights.cpu_kernels import code_cache, compiled, compilers, compiling, lanes

#: decode a row of int8 by the kernel alone, a small one, and say where the kernel came from
DECODE = """
import sys
{before}
import numpy as np
from oftsurgery.notices import notices_to
from oftsurgery.weights.cpu_kernels import compiled, layout
codes, scale, out = np.arange(-16, 16, dtype=np.int8), np.array([0.5], np.float32), np.zeros(32, np.float32)
job = np.zeros(layout.JOB // 8, np.int64)
job[layout.CODES // 8], job[layout.SCALES // 8] = codes.ctypes.data, scale.ctypes.data
said = []
with notices_to(said.append):
    compiled.kernel("decode_int8")(job.ctypes.data, 0, 32, out.ctypes.data, 0)
here = sys.modules.get("numba") is not None
print((out == codes * np.float32(0.5)).all(), "compiled" + " here" * here if said else "read")
"""


def decoded(before: str = "", **environment: str) -> str:
    return in_process(DECODE.format(before=before), **environment)


def test_a_kernel_is_compiled_once_and_read_without_numba(tmp_path: Path) -> None:
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path)) == "True compiled"
    (file,) = tmp_path.iterdir()
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path)) == "True read"
    assert decoded("sys.modules['numba'] = None", NUMBA_CACHE_DIR=str(tmp_path)) == "True read"
    whole = file.read_bytes()
    assert code_cache.contents_of(whole) is not None
    for damaged in (b"", whole[:-1], whole[:200], whole.replace(b"\x00", b"\x01", 1), b"\n" + whole):
        assert code_cache.contents_of(damaged) is None
    file.write_bytes(whole[:-1])
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path)) == "True compiled"  # compiled again
    assert file.read_bytes() == whole


@pytest.mark.parametrize("name", ["", "host", "python3"])
def test_where_no_process_compiles_this_one_does(name: str, tmp_path: Path) -> None:
    """A program that embeds Python may have no Python to start, or another program; and a process may end at once."""
    executable = tmp_path / name
    if name:
        executable.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        executable.chmod(0o755)
    before = f"sys.executable = {str(executable) if name else ''!r}"
    assert decoded(before, NUMBA_CACHE_DIR=str(tmp_path / "cache")) == "True compiled here"
    assert (tmp_path / "started").exists() == (name == "python3")
    assert decoded(before, NUMBA_CACHE_DIR=str(tmp_path / "cache")) == "True read"


def test_what_a_process_leaves_undone_is_compiled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilers, "_MOST", 1)
    asked: list[str] = []
    ask = compilers._ask

    def once(process: subprocess.Popen[str], name: str) -> tuple[int, bytes]:
        asked.append(name)
        if len(asked) == 2:
            process.kill()
        return ask(process, name)

    monkeypatch.setattr(compilers, "_ask", once)
    names = ["decode_int8", "decode_dense", "read_scales"]
    found = compilers.start(names)
    assert [arguments for arguments, _ in (found[name].result(60) for name in names)] == [5, 5, 8]
    assert asked == names[:2]
    assert len(list(tmp_path.iterdir())) == 3


def test_an_error_of_the_compiler_reaches_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(cpu_kernels.KERNELS, "unwritten", "tile")
    with pytest.raises(AttributeError, match="unwritten"):
        compilers.start(["unwritten"])["unwritten"].result(60)


def test_a_process_that_compiles_runs_no_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numba", "json", "base64", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    assert compilers.start(["decode_int8"])["decode_int8"].result(60)[0] == 5
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_waits_for_no_thread_of_its_parent(tmp_path: Path) -> None:
    forked = """
import os
from oftsurgery.weights.cpu_kernels import compiled
compiled.prepare(["decode_int8", "decode_dense"])
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    assert status == 0
"""
    assert decoded(forked, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()[0].startswith("True")


def test_the_user_s_folder_serves_where_the_package_s_cannot(tmp_path: Path) -> None:
    """In an installation that cannot be written to."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    before = f"""
from pathlib import Path
import oftsurgery.weights.cpu_kernels.code_cache as c
c.BESIDE = Path({str(nowhere)!r}) / "__pycache__"
"""
    environment = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert decoded(before, **environment) == "True compiled"
    assert len(list((tmp_path / "home" / "oftsurgery").iterdir())) == 1
    assert decoded(before, **environment) == "True read"
    # and nothing is lost where there is no room at all
    assert decoded(before, **environment | {"XDG_CACHE_HOME": str(nowhere)}) == "True compiled"


def test_what_an_image_was_built_with_is_read_by_who_cannot_write_there(tmp_path: Path) -> None:
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path / "built")) == "True compiled"
    before = f"""
from pathlib import Path
import oftsurgery.weights.cpu_kernels.code_cache as c
c.BESIDE = Path({str(tmp_path / "built")!r})
Path.write_bytes = None  # would fail
"""
    home = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert decoded(before, **home) == "True read"
    assert not (tmp_path / "home").exists()


def test_the_key_follows_all_that_the_code_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = code_cache.key.__wrapped__
    first = key()
    assert key() == first
    found = {first}
    monkeypatch.setenv("NUMBA_OPT", "1")
    found.add(key())
    monkeypatch.delenv("NUMBA_OPT")
    monkeypatch.setattr(code_cache.processor, "NAME", "another")
    found.add(key())
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: f"another {name}")
        found.add(key())
    copied = tmp_path / "sources"
    shutil.copytree(Path(compiled.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_cache, "SOURCES", copied)
    assert key() == first
    (copied / "keep.py").write_text((copied / "keep.py").read_text().replace("0.0", "1.0", 1))
    found.add(key())
    assert len(found) == 5


def test_warmup_compiles_what_no_cache_holds_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    for module in (compiled, cpu_kernels):
        monkeypatch.setattr(module, "KERNELS", {"decode_int8": "tile", "decode_dense": "tile"})
    assert main(["warmup", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"kernels": 2, "compiled": 2, "folder": str(tmp_path)}
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["warmup"]) == 0
    assert capsys.readouterr().out == f"2 kernels, 0 of them compiled now, in {tmp_path}\n"
    assert main(["warmup", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("backend", "asked"), [("auto", True), ("numba", True), ("tiled", False), ("reference", False)]
)
def test_an_early_start_is_for_folds_that_compile_and_its_error_is_no_error_of_the_command(
    backend: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of llvmlite that cannot be loaded is an OSError; the fold then warns, and takes a slower path."""
    called: list[Sequence[str]] = []

    def broken(names: Sequence[str]) -> None:
        called.append(names)
        raise OSError("libllvmlite.so cannot be loaded")

    monkeypatch.setattr(compiled, "prepare", broken)
    monkeypatch.setenv("OFTSURGERY_BACKEND", backend)
    begin_compiling()
    assert bool(called) == asked


def test_a_kernel_that_can_raise_an_error_is_refused() -> None:
    """Its code would call Python, which a process without numba does not offer to it."""

    def raising(at: int, count: int, step: int) -> None:
        for i in range(0, count, step):  # a step of 0 raises ValueError
            lanes.store_byte(at + i, 0)

    with pytest.raises(RuntimeError, match=r"the kernel raising calls .*, and may call only sqrt, memset, memcpy"):
        compiling.compiled(raising, "raising")
