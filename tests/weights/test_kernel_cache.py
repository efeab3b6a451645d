"""The CPU kernels' machine code on disk: read without a compiler, never stale or damaged, wherever there is room for it."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from backends import in_process

from oftsurgery.cli.main import main
from oftsurgery.weights.kernels.cpu import code_cache, compiled, compiling, lanes

#: decode a row of int8 by the kernel alone, a small one, and say whether numba was there
DECODE = """
import sys
{before}
import numpy as np
from oftsurgery.weights.kernels.cpu import compiled, layout
codes, scale, out = np.arange(-16, 16, dtype=np.int8), np.array([0.5], np.float32), np.zeros(32, np.float32)
job = np.zeros(layout.JOB // 8, np.int64)
job[layout.CODES // 8], job[layout.SCALES // 8] = codes.ctypes.data, scale.ctypes.data
compiled.kernel("decode_int8")(job.ctypes.data, 0, 32, out.ctypes.data, 0)
print((out == codes * np.float32(0.5)).all(), "numba" in sys.modules and sys.modules["numba"] is not None)
"""


def decoded(before: str = "", **environment: str) -> str:
    return in_process(DECODE.format(before=before), **environment)


def test_a_kernel_is_compiled_once_and_read_without_numba(tmp_path: Path) -> None:
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path)) == "True True"
    (file,) = tmp_path.iterdir()
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path)) == "True False"
    assert decoded("sys.modules['numba'] = None", NUMBA_CACHE_DIR=str(tmp_path)) == "True False"
    whole = file.read_bytes()
    assert code_cache.contents_of(whole) is not None
    for damaged in (b"", whole[:-1], whole[:200], whole.replace(b"\x00", b"\x01", 1), b"\n" + whole):
        assert code_cache.contents_of(damaged) is None
    file.write_bytes(whole[:-1])
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path)) == "True True"  # compiled again
    assert file.read_bytes() == whole


def test_the_user_s_folder_serves_where_the_package_s_cannot(tmp_path: Path) -> None:
    """In an installation that cannot be written to."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    before = f"""
from pathlib import Path
import oftsurgery.weights.kernels.cpu.code_cache as c
c.BESIDE = Path({str(nowhere)!r}) / "__pycache__"
"""
    environment = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert decoded(before, **environment) == "True True"
    assert len(list((tmp_path / "home" / "oftsurgery").iterdir())) == 1
    assert decoded(before, **environment) == "True False"
    # and nothing is lost where there is no room at all
    assert decoded(before, **environment | {"XDG_CACHE_HOME": str(nowhere)}) == "True True"


def test_what_an_image_was_built_with_is_read_by_who_cannot_write_there(tmp_path: Path) -> None:
    assert decoded(NUMBA_CACHE_DIR=str(tmp_path / "built")) == "True True"
    before = f"""
from pathlib import Path
import oftsurgery.weights.kernels.cpu.code_cache as c
c.BESIDE = Path({str(tmp_path / "built")!r})
Path.write_bytes = None  # would fail
"""
    home = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert decoded(before, **home) == "True False"
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
    copied = tmp_path / "cpu"
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
    monkeypatch.setattr(compiled, "KERNELS", {"decode_int8": "tile", "decode_dense": "tile"})
    assert main(["warmup", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"kernels": 2, "compiled": 2, "folder": str(tmp_path)}
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["warmup"]) == 0
    assert capsys.readouterr().out == f"2 kernels, 0 of them compiled now, in {tmp_path}\n"
    assert main(["warmup", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_kernel_that_can_raise_an_error_is_refused() -> None:
    """Its code would call Python, which a process without numba does not offer to it."""

    def raising(at: int, count: int, step: int) -> None:
        for i in range(0, count, step):  # a step of 0 raises ValueError
            lanes.store_byte(at + i, 0)

    with pytest.raises(RuntimeError, match=r"the kernel raising calls .*, and may call only sqrt, memset, memcpy"):
        compiling.compiled(raising, "raising")
