"""The folder in which a run works: taking over, locking, publishing. Whole runs that are killed or stopped are in
test_kill.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from oftsurgery.errors import DiskError, StateError
from oftsurgery.files import staging as staging_module
from oftsurgery.files.reading import sha256_of
from oftsurgery.files.staging import Staging
from oftsurgery.files.writing import Replacement


def staging(
    folder: Path,
    key: str = "key",
    *,
    needed: int = 0,
    resume: bool = False,
    force: bool = False,
    resumable: bool = True,
) -> Staging:
    return Staging(folder / "out", key, needed=needed, resume=resume, force=force, resumable=resumable)


def put(stage: Staging, name: str, data: bytes, facts: dict[str, object] | None = None) -> None:
    with stage.writing(name) as path:
        path.write_bytes(data)
    stage.finish(name, facts or {})


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


class Stop(Exception):
    pass


def stopped(folder: Path) -> None:
    """A run that finished one shard, and half of another."""
    with contextlib.suppress(Stop), staging(folder) as stage:
        put(stage, "one", b"1", {"modules": {"a": 1}})
        (stage.folder / "two").write_bytes(b"half")
        raise Stop


def test_published_at_once_and_whole(tmp_path: Path) -> None:
    with staging(tmp_path) as stage:
        put(stage, "one", b"1")
        stage.put_json("config.json", {"ä": 1})
        (tmp_path / "file").write_bytes(b"x")
        stage.copy(tmp_path / "file", "copied")
        assert names(tmp_path) == {"file", ".out.oftsurgery", ".out.oftsurgery.lock"}
        stage.publish()
    assert names(tmp_path) == {"file", "out"}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        "one": b"1",
        "config.json": '{\n  "ä": 1\n}\n'.encode(),
        "copied": b"x",
    }


def test_work_is_resumed_with_its_facts_and_without_its_halves(tmp_path: Path) -> None:
    stopped(tmp_path)
    assert names(tmp_path) == {".out.oftsurgery"}
    with staging(tmp_path, resume=True) as stage:
        assert stage.finished("one") == {"modules": {"a": 1}}
        assert stage.finished("two") is None
        assert names(stage.folder) == {".state.json", "one"}


def test_an_error_in_a_body_removes_its_file(tmp_path: Path) -> None:
    with staging(tmp_path) as stage:
        put(stage, "one", b"1")
        with contextlib.suppress(Stop), stage.writing("two") as path:
            path.write_bytes(b"half")
            raise Stop
        assert names(stage.folder) == {".state.json", "one"}


def test_the_run_works_on_while_a_shard_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next_shard = threading.Event()

    def slow(path: Path) -> None:
        assert next_shard.wait(30)

    monkeypatch.setattr(staging_module, "sync_file", slow)
    with staging(tmp_path) as stage:
        put(stage, "one", b"1", {"modules": {"a": 1}})
        assert stage.finished("one") is None  # the bytes are not on the disk yet
        next_shard.set()
        put(stage, "two", b"2")
        assert stage.finished("one") == {"modules": {"a": 1}}
        stage.settle()
        assert stage.finished("two") == {}
        stage.publish()


def test_a_shard_that_does_not_reach_the_disk_is_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        if path.name == "two":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging_module, "sync_file", full)
    with staging(tmp_path) as stage:
        put(stage, "one", b"1")
        put(stage, "two", b"2")
        with pytest.raises(DiskError, match="the disk is full"):
            stage.publish()
    assert names(tmp_path) == {".out.oftsurgery"}
    assert names(tmp_path / ".out.oftsurgery") == {".state.json", "one"}


def test_the_hashes_are_those_of_the_files_as_they_were_written_last(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    with staging(tmp_path) as stage:
        put(stage, "one", b"1")
        stage.copy(tmp_path / "file", "in/copied")
        stage.put_json("config.json", {"ä": 1})
        stage.put_text("twice", "first")
        with stage.writing("twice") as path:
            path.write_bytes(b"second")
        hashes = stage.hashes(but=["config.json"])
        assert hashes == {n: sha256_of(stage.folder / n) for n in ("one", "in/copied", "twice")}
        assert stage.hashes()["config.json"] == sha256_of(stage.folder / "config.json")


def test_what_is_not_resumable_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(Stop), staging(tmp_path, resumable=False) as stage:
        put(stage, "one", b"1")
        raise Stop
    assert names(tmp_path) == set()


@pytest.mark.parametrize("kept", [{}, {"resume": True}])
def test_a_refusal_leaves_an_earlier_runs_work(tmp_path: Path, kept: dict[str, bool]) -> None:
    stopped(tmp_path)
    with (
        pytest.raises(
            StateError, match="the unfinished work has other" if kept else "unfinished work of an earlier run"
        ),
        staging(tmp_path, "other", **kept),
    ):
        pass
    assert names(tmp_path / ".out.oftsurgery") == {".state.json", "one", "two"}
    with staging(tmp_path, resume=True) as stage:
        assert stage.finished("one") is not None


def test_work_without_its_state_is_nobodys(tmp_path: Path) -> None:
    stopped(tmp_path)
    (tmp_path / ".out.oftsurgery" / ".state.json").unlink()
    with staging(tmp_path, resume=True) as stage:
        assert names(stage.folder) == {".state.json"}


def test_the_space_that_finished_shards_take_is_not_asked_for_again(tmp_path: Path) -> None:
    with contextlib.suppress(Stop), staging(tmp_path) as stage:
        put(stage, "one", bytes(1_000_000))
        raise Stop
    state = json.loads((tmp_path / ".out.oftsurgery" / ".state.json").read_text())
    assert state["shards"].keys() == {"one"}
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DiskError, match=r"GB are needed and"), staging(tmp_path, resume=True, needed=2 * free):
        pass
    assert names(tmp_path / ".out.oftsurgery") == {".state.json", "one"}  # kept, for a larger disk
    with staging(tmp_path, resume=True, needed=1_000_000) as stage:
        assert stage.finished("one") == {}


def test_a_replacement_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with contextlib.suppress(Stop), Replacement(path) as new:
        new.beside.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise Stop
    assert names(tmp_path) == {"a"}
    assert path.read_bytes() == b"old"
    with Replacement(path, "mark") as new:
        new.beside.write_bytes(b"new")
        assert names(tmp_path) == {"a", ".a.mark"}
        new.put()
    assert names(tmp_path) == {"a"}
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_any_destination_that_is_there_needs_force_and_is_replaced_whole(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "precious").write_bytes(b"1")
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "old").write_bytes(b"old")
    elif kind == "file":
        out.write_bytes(b"old")
    else:
        out.symlink_to(target if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(StateError, match="the destination exists"), staging(tmp_path):
        pass
    with staging(tmp_path, force=True) as stage:
        put(stage, "new", b"new")
        assert out.is_symlink() == ("link" in kind)
        stage.publish()
    assert not out.is_symlink()
    assert names(out) == {"new"}
    assert (target / "precious").read_bytes() == b"1"  # a link is replaced, not followed
    assert names(tmp_path) == {"elsewhere", "out"}


def test_a_run_in_another_process_is_excluded(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from oftsurgery.files.staging import Staging
with Staging(Path({str(tmp_path / "out")!r}), "key", needed=0, resume=False, force=False):
    print("at work", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    before = names(tmp_path)
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(DiskError, match="another run is at work on this destination"), staging(tmp_path, **options):
            pass
    assert names(tmp_path) == before
    process.communicate("", timeout=30)
    assert names(tmp_path) == set()
    with staging(tmp_path) as stage:
        put(stage, "one", b"1")
