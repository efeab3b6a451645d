"""What a run leaves behind when it is killed, interrupted, or out of disk: nothing half-written, and work that can be
resumed to the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import file_bytes, quiet_fold
from layered import LAYERS, SIDE, write_inputs
from safetensors.torch import save_file

from oftsurgery.errors import DiskError, StateError
from oftsurgery.files.staging import Staging

SIZE = "350KB"  # two weights to a shard

#: what a run may leave beside the destination, besides its state in .out.oftsurgery
INPUTS = {"base", "adapter"}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "work")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_inputs(tmp_path_factory.mktemp("undisturbed") / "work")
    run(folder)
    found = file_bytes(folder / "out")
    assert len([n for n in found if n.endswith(".safetensors")]) == LAYERS // 2
    return found


def run(folder: Path, **options: object) -> None:
    quiet_fold(folder / "base", folder / "adapter", folder / "out", **{"max_shard_size": SIZE} | options)


def beside(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def stop_after(shards: int, error: BaseException) -> Callable[[int, int, str], None]:
    """A progress callback that fails while shard number ``shards`` (from 0) is written."""

    def progress(done: int, total: int, what: str) -> None:
        if done > total * (2 * shards + 1) / LAYERS - 1:
            raise error

    return progress


class Stop(Exception):
    pass


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """The id of a child process that does ``work`` and exits 0, or 1 on an error."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        work()
        code = 0
    os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def kill_at_event(number: int, folder: Path) -> None:
    """Kill this process right before its ``number``-th change of the file system under ``folder``."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_events(folder: Path) -> None:
    """Add a byte to ``events`` beside ``folder`` for each change of the file system under it."""
    log = (folder.parent / "events").open("ab", buffering=0)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            log.write(b".")

    sys.addaudithook(hook)


#: where a process of its own finds this module and the helpers
PLACES = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]
HARNESS = """
import sys
sys.path[:0] = {places!r}
import test_kill
from pathlib import Path
test_kill.kill_many(Path({folder!r}), {count})
"""


def kill_many(folder: Path, count: int) -> None:
    """Run in a process of its own that has imported everything and computed nothing, so that it can fork. Raises if
    anything is not as it must be.
    """
    write_inputs(folder / "reference")
    assert wait(forked(lambda: run(folder / "reference"))) == 0
    expected = file_bytes(folder / "reference" / "out")
    write_inputs(folder / "timed")
    start = time.monotonic()
    assert wait(forked(lambda: (count_events(folder / "timed"), run(folder / "timed")))) == 0  # type: ignore[func-returns-value]
    whole = time.monotonic() - start
    steps = len((folder / "events").read_text())
    rng = random.Random(7)
    ends = {"killed": 0, "resumed from a shard": 0, "finished": 0}
    for i in itertools.count():
        if ends["killed"] == count:
            break
        case = write_inputs(folder / f"case-{i}")
        force = i % 5 == 4  # an older destination is replaced
        if force:
            (case / "out").mkdir()
            (case / "out" / "old").write_text("earlier content")
        if i % 2:
            # right before a step of the file system; the last ones are those that publish
            event = rng.choice([rng.randrange(1, steps + 1), rng.randrange(steps - 25, steps + 1)])
            child = forked(
                lambda case=case, event=event, force=force: (kill_at_event(event, case), run(case, force=force))
            )  # type: ignore[misc]
        else:
            child = forked(lambda case=case, force=force: run(case, force=force))  # type: ignore[misc]
            time.sleep(rng.uniform(0, whole))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        ended = wait(child)
        assert ended in (0, -signal.SIGKILL), (i, ended)
        ends["killed" if ended else "finished"] += 1
        found = file_bytes(case / "out") if (case / "out").exists() else None
        assert found in (None, expected, {"old": b"earlier content"} if force else None), (
            i,
            "half-written",
            sorted(found or ()),
        )
        assert file_bytes(case / "base") == file_bytes(folder / "reference" / "base")
        state = case / ".out.oftsurgery" / ".state.json"
        if state.exists() and json.loads(state.read_text())["shards"]:
            ends["resumed from a shard"] += 1
        if found != expected:
            assert wait(forked(lambda case=case, force=force: run(case, resume=True, force=force))) == 0, i  # type: ignore[misc]
        else:
            Staging(case / "out", "", needed=0, resume=False, force=True, resumable=False).__enter__().__exit__(
                None, None, None
            )
        assert file_bytes(case / "out") == expected, i
        assert beside(case) == {*INPUTS, "out"}, (i, beside(case))
        shutil.rmtree(case)
    print(ends, f"a whole run: {whole:.2f} s, {steps} steps")  # noqa: T201


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path, count: int) -> None:
    script = HARNESS.format(places=PLACES, folder=str(tmp_path / "kills"), count=count)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)  # noqa: T201
    ends = eval(result.stdout.partition("}")[0] + "}")  # noqa: S307 - our own output
    assert ends["killed"] == count
    assert ends["resumed from a shard"] >= count // 5


def test_a_run_killed_between_the_two_renames_of_a_replacement(inputs: Path, undisturbed: dict[str, bytes]) -> None:
    """The destination's earlier content is put back by the next run, whatever that run then does."""
    (inputs / ".out.replaced").mkdir()
    (inputs / ".out.replaced" / "old").write_text("earlier content")
    with pytest.raises(StateError, match="the destination exists"):
        run(inputs)
    assert file_bytes(inputs / "out") == {"old": b"earlier content"}
    run(inputs, force=True)
    assert file_bytes(inputs / "out") == undisturbed
    assert beside(inputs) == {*INPUTS, "out"}


# --- stopped in the middle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3, 5])
@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_finished_shards_are_kept_and_used(
    inputs: Path, undisturbed: dict[str, bytes], shards: int, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        run(inputs, progress=stop_after(shards, error))
    assert beside(inputs) == {*INPUTS, ".out.oftsurgery"}
    kept = sorted((inputs / ".out.oftsurgery").glob("*.safetensors"))
    assert len(kept) == shards
    times = {p.name: p.stat().st_mtime_ns for p in kept}
    run(inputs, resume=True)
    assert file_bytes(inputs / "out") == undisturbed
    assert {n: (inputs / "out" / n).stat().st_mtime_ns for n in times} == times
    assert beside(inputs) == {*INPUTS, "out"}


def test_an_error_before_the_first_whole_shard_leaves_nothing(inputs: Path, undisturbed: dict[str, bytes]) -> None:
    with pytest.raises(Stop):
        run(inputs, progress=stop_after(0, Stop()))
    assert beside(inputs) == INPUTS
    run(inputs, resume=True)  # nothing to resume: it simply starts
    assert file_bytes(inputs / "out") == undisturbed


def test_unfinished_work_is_neither_used_nor_removed_unasked(inputs: Path, undisturbed: dict[str, bytes]) -> None:
    with pytest.raises(Stop):
        run(inputs, progress=stop_after(2, Stop()))
    before = file_bytes(inputs)
    with pytest.raises(
        StateError, match=r"the folder holds unfinished work of an earlier run.*resume=True.*force=True"
    ):
        run(inputs)
    assert file_bytes(inputs) == before
    run(inputs, force=True)
    assert file_bytes(inputs / "out") == undisturbed


def touch_source(folder: Path) -> dict[str, object]:
    path = folder / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return {}


def change_config(folder: Path) -> dict[str, object]:
    (folder / "base" / "config.json").write_text('{"rope_theta": 1.0}')
    return {}


def change_adapter(folder: Path) -> dict[str, object]:
    rows = {
        f"base_model.model.layers.{i}.q_proj.oft_R.weight": torch.zeros(SIDE // 16, 120) + 0.01 for i in range(LAYERS)
    }
    save_file(rows, folder / "adapter" / "adapter_model.safetensors")
    return {}


#: what is another when a run is resumed
CHANGES: dict[str, Callable[[Path], dict[str, object]]] = {
    "the source's bytes": touch_source,
    "the config": change_config,
    "the adapter": change_adapter,
    "the format": lambda _: {"format": "bf16"},
    "the shard size": lambda _: {"max_shard_size": "700KB"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_or_settings_do_not_resume(inputs: Path, change: str) -> None:
    with pytest.raises(Stop):
        run(inputs, progress=stop_after(2, Stop()))
    options = CHANGES[change](inputs)
    before = file_bytes(inputs)
    with pytest.raises(StateError, match=r"the unfinished work has other inputs or settings.*force=True"):
        run(inputs, resume=True, **options)
    assert file_bytes(inputs) == before
    run(inputs, resume=True, force=True, **options)
    assert beside(inputs) == {*INPUTS, "out"}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tamper", [cut, flip, Path.unlink], ids=["shorter", "one bit", "gone"])
def test_a_finished_shard_is_believed_by_its_hash_alone(
    inputs: Path, undisturbed: dict[str, bytes], tamper: Callable[[Path], None]
) -> None:
    with pytest.raises(Stop):
        run(inputs, progress=stop_after(3, Stop()))
    path = inputs / ".out.oftsurgery" / "model-00002-of-00006.safetensors"
    times = path.stat()
    tamper(path)
    if path.exists():
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(inputs, resume=True)
    assert file_bytes(inputs / "out") == undisturbed


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 1, "shards": []}'])
def test_a_damaged_state_is_not_resumed(inputs: Path, undisturbed: dict[str, bytes], text: str) -> None:
    with pytest.raises(Stop):
        run(inputs, progress=stop_after(3, Stop()))
    (inputs / ".out.oftsurgery" / ".state.json").write_text(text)
    with pytest.raises(StateError, match="the unfinished work has other inputs or settings"):
        run(inputs, resume=True)
    run(inputs, force=True)
    assert file_bytes(inputs / "out") == undisturbed


def test_force_replaces_at_the_rename_and_not_before(inputs: Path, undisturbed: dict[str, bytes]) -> None:
    old = inputs / "out"
    old.mkdir()
    (old / "precious").write_text("earlier")
    with pytest.raises(StateError, match=r"the destination exists.*force=True"):
        run(inputs)
    seen = []
    run(inputs, force=True, progress=lambda *_: seen.append(file_bytes(old)))
    assert len(seen) == LAYERS
    assert all(s == {"precious": b"earlier"} for s in seen)
    assert file_bytes(old) == undisturbed


def test_two_runs_at_one_destination_exclude_each_other(inputs: Path, undisturbed: dict[str, bytes]) -> None:
    refusals = []

    def meanwhile(done: int, total: int, what: str) -> None:
        if not refusals:
            with pytest.raises(DiskError, match="another run is at work on this destination") as caught:
                run(inputs, resume=True, force=True)
            refusals.append(caught.value)

    run(inputs, progress=meanwhile)
    assert len(refusals) == 1
    assert file_bytes(inputs / "out") == undisturbed


def test_sigint_leaves_work_to_resume(inputs: Path, undisturbed: dict[str, bytes]) -> None:
    # a job in the background of a shell inherits that it ignores SIGINT
    script = f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path[:0] = {PLACES!r}
        import test_kill, time
        from pathlib import Path
        def progress(done, total, what):
            print(done / total, flush=True)
            time.sleep(0.1)
        test_kill.run(Path({str(inputs)!r}), progress=progress)
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while float(process.stdout.readline()) < 0.5:
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert beside(inputs) == {*INPUTS, ".out.oftsurgery"}
    assert len(list((inputs / ".out.oftsurgery").glob("*.safetensors"))) >= 2
    run(inputs, resume=True)
    assert file_bytes(inputs / "out") == undisturbed


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_too_little_space_is_told_before_anything_is_written(inputs: Path) -> None:
    """A plan that claims more bytes than any disk has."""
    with (
        pytest.raises(DiskError, match=r"1000000\.00 GB are needed and .* GB are free.*make room"),
        Staging(inputs / "out", "key", needed=10**15, resume=False, force=False),
    ):
        pass
    assert beside(inputs) == INPUTS


def test_a_missing_parent_is_made_and_removed_again_after_an_error(inputs: Path) -> None:
    with (
        pytest.raises(DiskError, match="make room"),
        Staging(inputs / "new" / "er" / "out", "key", needed=10**15, resume=False, force=False),
    ):
        pass
    assert beside(inputs) == INPUTS
    with Staging(inputs / "new" / "er" / "out", "key", needed=1, resume=False, force=False) as staging:
        staging.put_text("x", "y")
        staging.publish()
    assert beside(inputs) == {*INPUTS, "new"}
    assert [p.relative_to(inputs).as_posix() for p in (inputs / "new").rglob("*")] == [
        "new/er",
        "new/er/out",
        "new/er/out/x",
    ]


def test_a_file_larger_than_the_limit(inputs: Path, undisturbed: dict[str, bytes]) -> None:
    before = file_bytes(inputs)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(DiskError, match=r"the file is larger than this system allows.*--max-shard-size"):
            run(inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file_bytes(inputs) == before
    run(inputs, resume=True)
    assert file_bytes(inputs / "out") == undisturbed


NAMESPACE = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else []), "--propagation", "private"]


def in_namespace(folder: Path, commands: str, body: str) -> str:
    """Run ``commands`` (a shell's, to mount) and then ``body`` (Python) where mounts are the process's own and end with
    it.
    """
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    script = (
        f"import sys; sys.path[:0] = {PLACES!r}\nfrom test_kill import *\nfolder = Path({str(folder)!r})\n"
        + textwrap.dedent(body)
    )
    shell = f'set -e; cd {folder}; {commands}; exec {sys.executable} -W ignore -c "$SCRIPT"'
    result = subprocess.run(
        [*NAMESPACE, "sh", "-c", shell],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"SCRIPT": script},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """Space was there when the run began; then somebody else takes it. With room again, the run resumes."""
    out = in_namespace(
        tmp_path,
        "mount -t tmpfs -o size=8m tmpfs .",
        """
        write_inputs(folder / "work")
        work, filler = folder / "work", folder / "filler"
        before = file_bytes(work)

        def fill(done, total, what):
            if done >= total / 3 and not filler.exists():
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))

        try:
            run(work, progress=fill)
        except DiskError as error:
            print(error)
        assert beside(work) == {*INPUTS, ".out.oftsurgery"}, beside(work)
        after = file_bytes(work)
        assert {n: after[n] for n in before} == before
        filler.unlink()
        run(work, resume=True)
        shutil.rmtree(work / "adapter")
        shutil.move(work / "out", folder / "resumed")
        write_inputs(folder / "again")
        shutil.rmtree(work)
        run(folder / "again")
        assert file_bytes(folder / "resumed") == file_bytes(folder / "again" / "out")
        """,
    )
    assert "the disk is full" in out
    assert "make room and continue with resume=True (--resume)" in out


def test_a_read_only_file_system(inputs: Path) -> None:
    before = file_bytes(inputs)
    out = in_namespace(
        inputs,
        "mount --bind . . ; mount -o remount,bind,ro .",
        """
        try:
            run(folder)
        except DiskError as error:
            print(error)
        """,
    )
    assert "the file system is read-only" in out
    assert "name a destination elsewhere" in out
    assert file_bytes(inputs) == before
