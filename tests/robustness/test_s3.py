"""Folds from and to S3: the real client against moto's server, killed at any request, and watched by a reader after each."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from big import linears, write_adapter, write_checkpoint
from checkpoints import TOKENS, adapted, build, file_bytes, load, quiet_fold
from rotated import CONFIG
from safetensors.torch import save_file

import oftsurgery
from oftsurgery import CheckpointError, DiskError, MissingDependencyError, RemoteError, StateError
from oftsurgery.cli import main as cli
from oftsurgery.files import remote

pytest.importorskip("moto", reason="moto's server and s3fs are not installed (the Makefile installs them)")
from s3_server import BUCKET, S3, serving, talk_to

SIZE = "100KB"
URL = f"s3://{BUCKET}"
OUT, UNFINISHED = "out", ".out.oftsurgery"
OLD = {"config.json": b"{}", "model.safetensors": b"earlier weights", "notes.txt": b"earlier"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in five shards and its adapter, as transformers and peft save them, and the fold on this machine."""
    folder = tmp_path_factory.mktemp("s3")
    build("llama").save_pretrained(folder / "base", max_shard_size=SIZE)
    (folder / "base" / "tokenizer_config.json").write_text("{}")
    adapted(build("llama"), ["q_proj", "down_proj"]).save_pretrained(folder / "adapter")
    quiet_fold(folder / "base", folder / "adapter", folder / "out", max_shard_size=SIZE)
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, bytes]:
    return file_bytes(place / "out")


@pytest.fixture
def s3(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """A server with base and adapter, and the client of this process; temporary files lie in a folder of the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serving() as server:
        talk_to(server, monkeypatch)
        for name in ("base", "adapter"):
            server.put(name, file_bytes(place / name))
        yield server


def run(destination: str = f"{URL}/{OUT}", **options: Any) -> oftsurgery.FoldRecord:
    options = {"trained_on": "plain", "max_shard_size": SIZE} | options
    return quiet_fold(f"{URL}/base", f"{URL}/adapter", destination, **options)  # type: ignore[arg-type]


def can_be_loaded(files: Mapping[str, bytes]) -> bool:
    """Whether transformers, or oftsurgery, finds a model among these files."""
    return "model.safetensors" in files or "model.safetensors.index.json" in files


def reader(s3: S3, *wholes: Mapping[str, bytes]) -> Callable[[], None]:
    """A reader that looks whenever something is written: it finds one of the ``wholes``, or nothing that can be loaded."""
    faults = []

    def look() -> None:
        found = s3.files(OUT)
        if can_be_loaded(found) and found not in wholes:
            faults.append(sorted(found))

    s3.looking = look
    return lambda: pytest.fail(f"half an output was seen: {faults[0]}") if faults else None


def test_a_fold_from_and_to_s3_has_the_bytes_of_a_local_fold(
    s3: S3, place: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    check = reader(s3, expected)
    record = run()
    check()
    assert s3.files(OUT) == expected
    assert not s3.files(UNFINISHED)
    assert record.to_dict() == json.loads(expected["oftsurgery.json"])
    base = file_bytes(place / "base")
    shards = {name for name in base if name.endswith(".safetensors")}
    assert len(shards) > 2
    asked = [r for r in s3.requests if r.method == "GET" and r.path.startswith(f"/{BUCKET}/base/")]
    ranges = [r for r in asked if r.range]
    assert {r.path.rpartition("/")[2] for r in ranges} == shards  # no file of weights is read whole
    read, stored = sum(r.sent for r in ranges), sum(len(base[name]) for name in shards)
    # each tensor once; small reads take blocks of 128 KiB, and these files are hardly larger
    assert stored <= read <= 2 * stored, (read, stored)
    report = oftsurgery.verify_checkpoint(f"{URL}/{OUT}", f"{URL}/base", f"{URL}/adapter")
    assert report.ok, report
    assert set(report.files.values()) == {"ok"}
    assert not oftsurgery.doctor(f"{URL}/{OUT}")
    (tmp_path / "copy").mkdir()
    for name, data in s3.files(OUT).items():
        (tmp_path / "copy" / name).write_bytes(data)
    there, here = (load(folder, "LlamaForCausalLM") for folder in (tmp_path / "copy", place / "out"))
    with torch.no_grad():
        assert torch.equal(there(TOKENS).logits, here(TOKENS).logits)


def test_unfold_and_fold_many(s3: S3, place: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    undo = tmp_path / "out.undo"
    run(undo=undo)
    oftsurgery.unfold_checkpoint(f"{URL}/{OUT}", f"{URL}/back", undo=undo, max_shard_size=SIZE)
    oftsurgery.unfold_checkpoint(place / "out", tmp_path / "back", undo=undo, max_shard_size=SIZE)
    assert s3.files("back") == file_bytes(tmp_path / "back")
    folds = [{"adapter": f"{URL}/adapter", "output": f"{URL}/many/{name}"} for name in ("one", "two")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        oftsurgery.fold_many(f"{URL}/base", folds, trained_on="plain", rounding="nearest", max_shard_size=SIZE)
    assert s3.files("many/one") == s3.files("many/two") == expected


def test_the_command_line(s3: S3, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    what = [f"{URL}/base", f"{URL}/adapter", "--trained-on", "plain", "--rounding", "nearest", "--max-shard-size", SIZE]
    assert cli.main(["plan", *what]) == 0
    assert f"base: {URL}/base\n" in capsys.readouterr().out
    assert cli.main(["fold", *what[:2], f"{URL}/{OUT}", *what[2:]]) == 0
    assert s3.files(OUT) == expected
    assert cli.main(["show", f"{URL}/{OUT}"]) == 0
    assert cli.main(["fold", *what[:2], f"{URL}/{OUT}", *what[2:]]) == 2
    assert f"the destination exists [at {URL}/{OUT}]" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_open_the_urls_themselves(s3: S3, expected: dict[str, bytes]) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        run(executor=executor)
        assert s3.files(OUT) == expected
        report = oftsurgery.verify_checkpoint(f"{URL}/{OUT}", f"{URL}/base", f"{URL}/adapter", executor=executor)
        assert report.ok, report
        assert set(report.files.values()) == {"ok"}


# --- killed -----------------------------------------------------------------------------------------------------------

#: where a process of its own finds this module and the helpers
PLACES = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]


def serve_runs() -> None:
    """Fork a child for each line of the standard input, ``"destination resume force"``; the child waits for a further line. What is
    printed is the child's process and its exit code. This process has imported everything and computed nothing, so it can fork.
    """
    import s3fs  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import oftsurgery.api.checkpoints  # noqa: F401

    for line in sys.stdin:
        destination, resume, force = line.split()
        wait, go = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.read(wait, 1)
                run(destination, resume=resume == "True", force=force == "True")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)  # noqa: T201
        sys.stdin.readline()
        os.write(go, b"g")
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201
        os.close(wait)
        os.close(go)


class Runs:
    """Runs in processes of their own."""

    def __init__(self, s3: S3, folder: Path) -> None:
        script = f"import sys\nsys.path[:0] = {PLACES!r}\nimport test_s3\ntest_s3.serve_runs()"
        environment = os.environ | s3.environment | {"TMPDIR": str(folder)}
        self._s3, self._log = s3, folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def __call__(self, *, after: int = 0, resume: bool = False, force: bool = False) -> int:
        """The exit code of a run that is killed at its request number ``after``, or not at all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(f"{URL}/{OUT}", resume, force, file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline() or pytest.fail(self._log.read_text()))
        if after:
            self._s3.kill(child, after)
        print("go", file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL), self._log.read_text()[-3000:]
        return code


@pytest.mark.parametrize("count", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_resume_to_the_same_bytes(s3: S3, expected: dict[str, bytes], tmp_path: Path, count: int) -> None:
    """A run is killed at some of its requests; some runs replace an older output, and some are killed again."""
    rng, resumed = random.Random(5), 0
    with Runs(s3, tmp_path) as runs:
        assert runs() == 0
        whole = len(s3.requests)
        # half of the kills are at the last requests, which publish
        at = sorted(
            rng.sample(range(1, whole // 2), count // 2) + rng.sample(range(whole // 2, whole + 1), count - count // 2)
        )
        for i, after in enumerate(at):
            s3.remove(OUT)
            force = i % 3 == 2
            if force:
                s3.put(OUT, OLD)
            check = reader(s3, expected, *([OLD] if force else []))
            assert runs(after=after, force=force) == -signal.SIGKILL, after
            state = state_of(s3)
            resumed += bool(state["shards"]) and not is_published(s3, expected)
            before = sent(s3, state["shards"])
            if i % 4 == 3 and not is_published(s3, expected):
                runs(after=after // 2, resume=True, force=force)
            if not is_published(s3, expected):
                assert runs(resume=True, force=force) == 0, after
                assert not s3.files(UNFINISHED), after
            check()
            assert s3.files(OUT) == expected, after
            assert sent(s3, state["shards"]) == before, "a shard that was sent is sent again"
    assert resumed >= len(at) // 3
    print(f"a whole run: {whole} requests; {len(at)} kills, {resumed} resumed from a shard")  # noqa: T201


def state_of(s3: S3) -> dict[str, Any]:
    return json.loads(s3.files(UNFINISHED).get(".state.json", b'{"shards": {}}'))  # type: ignore[no-any-return]


def is_published(s3: S3, expected: Mapping[str, bytes]) -> bool:
    """Whether nothing is left to do but to remove the unfinished output."""
    state = state_of(s3)
    return state.get("phase") == "published" or ("key" not in state and s3.files(OUT) == expected)


def sent(s3: S3, shards: Collection[str]) -> int:
    """How often one of these shards was sent."""
    places = {f"/{BUCKET}/{UNFINISHED}/{name}" for name in shards}
    return sum(r.method == "PUT" and r.path in places for r in s3.requests)


# --- failed -----------------------------------------------------------------------------------------------------------


def write_large(folder: Path, s3: S3) -> dict[str, bytes]:
    """A base of two weights of 16 MB, each in a file of its own, and an adapter of the first, here and there; the base's files."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    weight_map = {f"layers.{i}.q_proj.weight": f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)}
    for name, file in weight_map.items():
        save_file({name: torch.randn(2048, 2048, generator=generator)}, folder / "base" / file, {"format": "pt"})
    index = {"metadata": {"total_size": 2 << 24}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = {"base_model.model.layers.0.q_proj.oft_R.weight": 0.03 * torch.randn(128, 120, generator=generator)}
    save_file(rows, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))
    for name in ("base", "adapter"):
        s3.remove(name)
        s3.put(name, file_bytes(folder / name))
    return file_bytes(folder / "base")


@pytest.mark.parametrize("fails", ["a part", "the completion", "the publication"])
def test_a_failed_upload_publishes_nothing(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setattr(remote, "PIECE", 5 << 20)  # parts, as of a file of gigabytes
    write_large(tmp_path, s3)
    quiet_fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "local", max_shard_size="17MB")
    shard = f"/{BUCKET}/{UNFINISHED}/model-00002-of-00002.safetensors"
    method, path = {
        "a part": ("PUT", rf"{shard}\?partNumber=2"),
        "the completion": ("POST", rf"{shard}\?uploadId"),
        "the publication": ("PUT", rf"/{BUCKET}/{OUT}/model.safetensors.index.json"),
    }[fails]
    s3.fail(method, path)
    with pytest.raises(RemoteError, match=r"Access Denied.*\[at s3://bucket/.*resume=True"):
        run(max_shard_size="17MB")
    assert not can_be_loaded(s3.files(OUT))
    assert not s3.unfinished, "parts are left"
    assert "model-00001-of-00002.safetensors" in s3.files(UNFINISHED)
    del s3.requests[:]
    with pytest.raises(StateError, match=r"the folder holds unfinished work.*\[at s3://bucket/\.out\.oftsurgery\]"):
        run(max_shard_size="17MB")
    run(max_shard_size="17MB", resume=True)
    assert s3.files(OUT) == file_bytes(tmp_path / "local")
    first = [r for r in s3.requests if r.writes and r.path.startswith(f"/{BUCKET}/{UNFINISHED}/model-00001")]
    assert [r.method for r in first] == ["DELETE"]  # sent once, copied by the server, and removed
    assert not s3.files(UNFINISHED)
    assert not list(tmp_path.glob("oftsurgery-*/*"))  # nothing is left on this machine


def test_a_shard_that_somebody_has_changed_is_written_again(s3: S3, expected: dict[str, bytes]) -> None:
    s3.fail("PUT", f"/{BUCKET}/{OUT}/")
    with pytest.raises(RemoteError):
        run()
    shard = sorted(name for name in expected if name.endswith(".safetensors"))[1]
    assert shard in s3.files(UNFINISHED)
    s3.put(UNFINISHED, {shard: expected[shard][:-1] + b"?", "stray": b""})
    # the parts of a killed upload, and of somebody else's
    for key in (f"{UNFINISHED}/{shard}", "elsewhere"):
        fsspec.filesystem("s3").call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
    run(resume=True)
    assert s3.files(OUT) == expected
    assert not s3.files(UNFINISHED)
    assert s3.unfinished == ["elsewhere"]


def test_a_base_that_changes_meanwhile(s3: S3, tmp_path: Path) -> None:
    large = write_large(tmp_path, s3)

    def meanwhile(done: int, total: int, what: str) -> None:
        for name, data in large.items():
            if name.endswith(".safetensors"):
                s3.put("base", {name: data[:-1] + bytes([data[-1] ^ 1])})

    with pytest.raises(
        RemoteError, match=r"the file has changed since the folder was opened \[at s3://bucket/base/model-"
    ):
        run(progress=meanwhile, max_shard_size="17MB")
    assert not s3.files(OUT)


def test_an_older_output_stays_until_the_new_one_is_whole(s3: S3, expected: dict[str, bytes]) -> None:
    s3.put(OUT, OLD)
    with pytest.raises(StateError, match=r"the destination exists \[at s3://bucket/out\].*force=True"):
        run()
    seen = []
    run(force=True, progress=lambda *_: seen.append(s3.files(OUT)))
    assert seen
    assert all(found == OLD for found in seen)
    assert s3.files(OUT) == expected  # without the notes


def test_two_runs_at_one_destination(
    s3: S3, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one machine the second is refused; on two machines the first ends when the second has taken over."""
    refused = []

    def meanwhile(done: int, total: int, what: str) -> None:
        if not refused:
            with pytest.raises(DiskError, match="another run is at work on this destination") as caught:
                run(resume=True)
            refused.append(caught.value)
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
            run(force=True)
            monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    with pytest.raises(DiskError, match="another run has taken over this destination"):
        run(progress=meanwhile)
    assert s3.files(OUT) == expected


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
sys.path[:0] = {places!r}
import resource, s3fs, torch, transformers, oftsurgery
from big import linears, write_adapter, write_checkpoint
from checkpoints import quiet_fold
from pathlib import Path

def memory(what):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)) / 1e3

Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory begins anew
before = memory("VmRSS")
quiet_fold(*sys.argv[1:], trained_on="nf4", rounding="preserve", max_shard_size="300MB")
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_no_file_is_held_in_memory(s3: S3, tmp_path: Path) -> None:
    """A base of 464 MB in two files: the fold holds hardly more than a local one, and reads hardly more than is stored."""
    write_checkpoint(tmp_path / "base", layers=4, shards=2)
    paths = {f"model.layers.{i}.{path}": shape[1] for i in range(4) for path, shape in linears(4096, 11008).items()}
    write_adapter(tmp_path / "adapter", paths)
    for name in ("base", "adapter"):
        s3.remove(name)
        s3.put(name, file_bytes(tmp_path / name))

    def peak(place: object) -> float:
        """MB above what the process has before the fold."""
        what = [f"{place}/{name}" for name in ("base", "adapter", "out")]
        script = [sys.executable, "-W", "ignore", "-c", MEASURED.format(places=PLACES), *what]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return float(done.stdout)

    here, there = peak(tmp_path), peak(URL)
    assert s3.files(OUT) == file_bytes(tmp_path / "out")
    gets = [r for r in s3.requests if r.method == "GET" and r.path.startswith(f"/{BUCKET}/base/") and r.range]
    stored = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    read = sum(r.sent for r in gets)
    told = f"{stored / 1e6:.0f} MB: {here:.0f} MB of memory here, {there:.0f} MB on S3; {read / 1e6:.0f} MB read by {len(gets)} requests"
    print(told)  # noqa: T201
    assert there - here < 200
    assert stored <= read < 1.02 * stored


# --- refused ----------------------------------------------------------------------------------------------------------


def test_without_the_client(s3: S3) -> None:
    code = f"import sys; sys.modules['s3fs'] = None; import oftsurgery; oftsurgery.load_adapter('{URL}/adapter')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    told = "MissingDependencyError: the client of s3:// is not installed Remedy: pip install 'oftsurgery[remote]'"
    assert told in done.stderr
    with pytest.raises(MissingDependencyError, match=r"the client of gs:// is not installed Remedy: pip install gcsfs"):
        oftsurgery.load_adapter("gs://bucket/adapter")


@pytest.mark.parametrize(
    ("url", "error", "told"),
    [
        (f"{URL}/nowhere", CheckpointError, r"there is no file behind the URL \[at s3://bucket/nowhere\]"),
        (
            "s3://no-such-bucket/base",
            CheckpointError,
            r"there is no file behind the URL \[at s3://no-such-bucket/base\]",
        ),
    ],
)
def test_a_base_that_is_not_there(s3: S3, url: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        oftsurgery.fold_checkpoint(url, f"{URL}/adapter", f"{URL}/{OUT}", trained_on="plain")
    assert not s3.files(OUT)


def test_a_server_that_refuses(s3: S3) -> None:
    s3.fail("GET", f"/{BUCKET}/base/config.json", times=100)
    with pytest.raises(RemoteError, match=r"Access Denied.*\[at s3://bucket/base\] Remedy: check the URL, the network"):
        run()
