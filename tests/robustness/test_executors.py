"""Folds and unfolds whose tasks an executor works on: the same bytes as one process writes, whoever dies in the meantime."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MODELS, adapted, bnb_config, build, differing, file_bytes, linearised, load, quiet_fold, tensors
from checkpoints import quiet_transformers as quiet
from layered import write_inputs
from safetensors.torch import load_file, save_file
from warned import quietly

import oftsurgery
from oftsurgery import EngineError, IntegrityError, StateError, tasks
from oftsurgery.api.fold_settings import FoldSettings
from oftsurgery.api.slices import fold_slice
from oftsurgery.cli import main as cli
from oftsurgery.folding import disk_tasks

#: name → (model, how it is stored, targets, options of the fold)
CASES: dict[str, tuple[str, Any, tuple[str, ...], dict[str, Any]]] = {
    "nf4 double, undo": ("llama", bnb_config("nf4", double=True), (), {"undo": True, "max_shard_size": "40KB"}),
    "nf4 double, preserve": ("llama", bnb_config("nf4", double=True), (), {"rounding": "preserve"}),
    "fp4 to bf16": ("llama", bnb_config("fp4"), (), {"format": "bf16", "max_shard_size": "60KB"}),
    "int8, undo": ("llama", bnb_config("int8"), (), {"undo": True}),
    "plain, transposed, undo": ("gpt2", None, (), {"undo": True}),
    "plain to nf4": ("qwen3", None, (), {"format": "nf4", "double_quant": True}),
    "tied head, undo": ("t5", None, ("q", "lm_head"), {"undo": True, "max_shard_size": "80KB"}),
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of one or a few tensors, though the checkpoints are tiny."""
    monkeypatch.setattr(tasks, "LEAST", 10_000)
    monkeypatch.setattr(tasks, "MOST", 10_000)
    with quiet():
        yield


def pool(workers: int = 2) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with pool() as executor:
        yield executor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case's ``<name>/base``, ``adapter`` and ``one``, the fold of one process, with ``one.undo``."""
    place = tmp_path_factory.mktemp("executors")
    for name, (model, stored, targets, options) in CASES.items():
        folder = place / name
        with quiet():
            build(model).save_pretrained(folder / "base")
            if stored is not None:
                quantised = load(folder / "base", MODELS[model][0], quantization_config=stored)
                shutil.rmtree(folder / "base")
                quantised.save_pretrained(folder / "base")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # peft about tied embeddings
                wrapped = adapted(linearised(build(model)), list(targets) or MODELS[model][2])
                wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
        fold(folder, "one", **options)
    return place


def fold(folder: Path, out: str, **options: Any) -> oftsurgery.FoldRecord:
    undo = folder / f"{out}.undo" if options.pop("undo", False) else None
    return quiet_fold(folder / "base", folder / "adapter", folder / out, undo=undo, **options)


def check_same(folder: Path, out: str) -> None:
    """The fold ``out`` is the fold of one process, byte for byte, and nothing lies beside it."""
    assert file_bytes(folder / out) == file_bytes(folder / "one")
    if (folder / "one.undo").exists():
        assert (folder / f"{out}.undo").read_bytes() == (folder / "one.undo").read_bytes()
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", CASES)
def test_processes_write_the_same_bytes(name: str, place: Path, processes: Executor) -> None:
    folder, options = place / name, CASES[name][3]
    seen: list[int] = []
    one = fold(folder, "again", **options)
    record = fold(folder, "two", **options, executor=processes, progress=lambda done, *_: seen.append(done))
    check_same(folder, "two")
    assert record == one
    assert len(seen) > 2
    assert seen == sorted(seen)


def test_unfolds_write_the_same_bytes(place: Path, processes: Executor) -> None:
    folder = place / "nf4 double, undo"
    ways: dict[str, dict[str, Any]] = {
        "base": {"base": folder / "base"},
        "undo": {"undo": folder / "one.undo"},
        "adapter": {"adapter": folder / "adapter"},
    }
    for name, way in ways.items():
        for out, executor in {"alone": None, "many": processes}.items():
            quietly(
                oftsurgery.unfold_checkpoint,
                folder / "one",
                folder / f"{name} {out}",
                **way,
                max_shard_size="40KB",
                executor=executor,
            )
        assert file_bytes(folder / f"{name} alone") == file_bytes(folder / f"{name} many")
        assert bool(differing(tensors(folder / "base"), tensors(folder / f"{name} many"))) == (name == "adapter")


def test_an_unfold_by_another_base_is_refused(place: Path, processes: Executor, tmp_path: Path) -> None:
    """The error of a worker has its fields, and its cause has the worker's traceback."""
    other = tmp_path / "base"
    shutil.copytree(place / "nf4 double, undo" / "base", other)
    held = load_file(other / "model.safetensors")
    held["model.layers.1.self_attn.q_proj.weight"] ^= 1
    save_file(held, other / "model.safetensors", {"format": "pt"})
    message = r"not the one that was folded \[module 'model\.layers\.1\.self_attn\.q_proj'"
    with pytest.raises(IntegrityError, match=message) as caught:
        oftsurgery.unfold_checkpoint(
            place / "nf4 double, undo" / "one", tmp_path / "out", base=other, executor=processes
        )
    assert "write_part" in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_memory_goes_with_the_tasks(place: Path, processes: Executor) -> None:
    folder = place / "nf4 double, preserve"
    adapter = quietly(oftsurgery.load_adapter(folder / "adapter").scaled, 0.5)
    for out, executor in {"half": None, "half-too": processes}.items():
        quiet_fold(folder / "base", adapter, folder / out, executor=executor)
    assert file_bytes(folder / "half") == file_bytes(folder / "half-too")


def test_relative_paths_are_those_of_the_caller(
    place: Path, processes: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers have another working folder."""
    folder = place / "fp4 to bf16"
    monkeypatch.chdir(folder)
    quiet_fold(Path("base"), Path("adapter"), Path("elsewhere"), **CASES[folder.name][3], executor=processes)
    quiet_fold(Path("base"), Path("adapter"), Path("here"), **CASES[folder.name][3])
    assert file_bytes(folder / "elsewhere") == file_bytes(folder / "here")


def test_checks_and_extractions_find_the_same(place: Path, processes: Executor, tmp_path: Path) -> None:
    for name in CASES:
        folder = place / name
        paths = [folder / part for part in ("one", "base", "adapter")]
        one, many = (oftsurgery.verify_checkpoint(*paths, executor=executor) for executor in (None, processes))
        assert many == one
        assert one.ok
        assert list(many.tensors) == list(one.tensors)
        assert list(many.modules) == list(one.modules)
        assert oftsurgery.verify_checkpoint(paths[0], executor=processes).files == one.files
    for name in ("fp4 to bf16", "plain, transposed, undo"):
        found = [
            quietly(oftsurgery.extract_checkpoint, place / name / "base", place / name / "one", executor=executor)
            for executor in (None, processes)
        ]
        assert found[0].fingerprint == found[1].fingerprint
        assert found[0].to_dict() == found[1].to_dict()
    shutil.copytree(place / "int8, undo" / "one", tmp_path / "wrong")
    held = load_file(tmp_path / "wrong" / "model.safetensors")
    held["model.layers.1.self_attn.q_proj.weight"][0] += 9
    save_file(held, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    paths = [tmp_path / "wrong", *(place / "int8, undo" / part for part in ("base", "adapter"))]
    report = oftsurgery.verify_checkpoint(*paths, executor=processes)
    assert list(report.wrong) == ["model.layers.1.self_attn.q_proj.weight"]
    assert report == oftsurgery.verify_checkpoint(*paths)


@pytest.mark.slow
def test_dask_writes_the_same_bytes(place: Path) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for name in ("nf4 double, undo", "tied head, undo"):
            fold(place / name, "dask", **CASES[name][3], executor=client.get_executor())
            check_same(place / name, "dask")


# --- lost workers, lost coordinators ----------------------------------------------------------------------------------


def kill_one(rng: random.Random) -> None:
    children = [child for child in multiprocessing.active_children() if child.is_alive() and child.pid]
    if children:
        os.kill(rng.choice(children).pid or 0, signal.SIGKILL)


def killing(moments: list[int], rng: random.Random) -> Callable[[int, int, str], None]:
    """A progress function that kills a worker after these numbers of parts, a random moment later."""
    calls = 0

    def progress(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in moments:
            time.sleep(rng.uniform(0, 0.02))
            kill_one(rng)

    return progress


def check_kills(folder: Path, folds: int, kills: int) -> None:
    """``folds`` folds, in each of which ``kills`` workers are killed."""
    write_inputs(folder)
    options: dict[str, Any] = {"max_shard_size": "350KB", "undo": True}
    fold(folder, "one", **options)
    rng = random.Random(3)
    for i in range(folds):
        with pool() as executor:
            moments = sorted(rng.sample(range(1, 10), kills))
            fold(folder, f"killed-{i}", **options, executor=executor, progress=killing(moments, rng))
            with pytest.raises(BrokenProcessPool):  # a worker was indeed lost
                executor.submit(int).result()
        check_same(folder, f"killed-{i}")


def test_killed_workers_change_nothing(tmp_path: Path) -> None:
    check_kills(tmp_path / "work", folds=1, kills=3)


@pytest.mark.slow
def test_twenty_killed_workers_change_nothing(tmp_path: Path) -> None:
    check_kills(tmp_path / "work", folds=20, kills=1)


@pytest.mark.slow
def test_a_killed_coordinator_resumes_on_another_executor(tmp_path: Path) -> None:
    """The parts that were written are believed by their hashes; the workers end with the coordinator."""
    folder = tmp_path / "work"
    write_inputs(folder)
    options: dict[str, Any] = {"max_shard_size": "700KB", "undo": True}
    fold(folder, "one", **options)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]!r}

            def run():
                import os, signal
                from pathlib import Path
                import test_executors as here

                def progress(done, total, what, calls=[]):
                    calls.append(done)
                    if len(calls) == 6:
                        print(*[child.pid for child in here.multiprocessing.active_children()], flush=True)
                        os.kill(os.getpid(), signal.SIGKILL)

                here.tasks.LEAST = here.tasks.MOST = 10_000
                with here.pool() as executor:
                    here.fold(Path({str(folder)!r}), "two", **{options!r}, executor=executor, progress=progress)

            if __name__ == "__main__":  # the workers import this file too
                run()
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    notes = sorted((folder / ".two.oftsurgery").glob("*.parts/*.json"))
    assert notes
    for worker in map(int, done.stdout.split()):
        end = time.monotonic() + 30
        while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{worker}").exists(), "the worker outlives its coordinator"
    kept = notes[0].stat().st_mtime_ns
    damaged = Path(str(notes[-1].parent).removesuffix(".parts"))  # the note is there, and the bytes are not
    damaged.write_bytes(b"")
    shutil.copytree(folder / ".two.oftsurgery", folder / ".alone.oftsurgery")
    seen: list[int] = []
    with ThreadPoolExecutor(2) as threads:

        def progress(*_: Any) -> None:
            seen.append(notes[0].stat().st_mtime_ns if notes[0].exists() else kept)

        fold(folder, "two", **options, executor=threads, resume=True, progress=progress)
    assert set(seen) == {kept}
    shutil.move(folder / "two", tmp_path / "two")
    shutil.move(folder / "two.undo", tmp_path / "two.undo")
    fold(folder, "alone", **options, resume=True)  # and without any executor
    for out in (tmp_path / "two", folder / "alone"):
        assert file_bytes(out) == file_bytes(folder / "one")
    assert (tmp_path / "two.undo").read_bytes() == (folder / "one.undo").read_bytes()


def test_an_error_leaves_finished_parts_to_resume(tmp_path: Path, processes: Executor) -> None:
    folder = tmp_path / "work"
    write_inputs(folder)
    fold(folder, "one")

    def stop(done: int, *_: Any) -> None:
        if done > 400_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(folder, "two", executor=processes, progress=stop)
    assert not (folder / "two").exists()
    with pytest.raises(StateError, match="unfinished work of an earlier run"):
        fold(folder, "two", executor=processes)
    fold(folder, "two", executor=processes, resume=True)
    check_same(folder, "two")


class Losing(Executor):
    """An executor that loses each task but the first ``good`` ones."""

    def __init__(self, good: int = 0) -> None:
        self.good = good

    def submit(self, work: Any, /, *args: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.good -= 1
        if self.good >= 0:
            future.set_result(work(*args, **more))
        else:
            future.set_exception(RuntimeError("KilledWorker"))
        return future


def test_a_task_that_is_always_lost_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    write_inputs(folder)
    fold(folder, "one", max_shard_size="350KB")
    with pytest.raises(EngineError, match=r"lost a task 4 times in a row: RuntimeError: KilledWorker.*resume=True"):
        fold(folder, "two", max_shard_size="350KB", executor=Losing(7))
    with ThreadPoolExecutor(1) as threads:
        fold(folder, "two", max_shard_size="350KB", executor=threads, resume=True)
    check_same(folder, "two")


class Broken(Executor):
    def submit(self, work: Any, /, *args: Any, **more: Any) -> Future[Any]:
        raise BrokenExecutor("no worker")


def test_what_no_executor_can_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_inputs(tmp_path / "work")
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as forks,
        pytest.raises(StateError, match=r"start with fork.*get_context\('spawn'\)"),
    ):
        fold(folder, "two", executor=forks)
    with pytest.raises(StateError, match=r"an executor is a concurrent\.futures\.Executor, not a int"):
        fold(folder, "two", executor=4)
    with pytest.raises(EngineError, match=r"the executor is broken: no worker.*resume=True"):
        fold(folder, "two", executor=Broken())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(oftsurgery.MissingDependencyError, match=r"ray is not installed.*oftsurgery\[ray\]"):
        fold(folder, "two", executor="ray")
    assert cli.main(["fold", str(folder / "base"), str(folder / "adapter"), str(folder / "two"), "--ray"]) == 3
    with ThreadPoolExecutor(1) as closed:
        pass
    with pytest.raises(EngineError, match="the executor takes no tasks"):
        fold(folder, "two", executor=closed)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "base"]


def test_a_worker_that_sees_other_files_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_inputs(tmp_path / "work")
    seen: list[Any] = []

    def other(plan: Any) -> str:
        seen.append(plan)
        return f"as seen by process {len(seen)}"

    monkeypatch.setattr(disk_tasks, "fingerprint", other)
    with ThreadPoolExecutor(1) as threads, pytest.raises(StateError, match="a worker sees other files"):
        fold(folder, "two", executor=threads)


# --- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4 double, undo", "tied head, undo"])
def test_slices_write_the_same_bytes(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slices in any order, one of them run twice, and one that was interrupted: what is there then is not written again."""
    folder, options = place / name, CASES[name][3]
    flags = ["--rounding", "nearest", "--max-shard-size", options["max_shard_size"], "--undo", str(folder / "cut.undo")]
    flags += [] if "nf4" in name else ["--trained-on", "plain"]
    what = [str(folder / part) for part in ("base", "adapter")]

    def command(*more: str) -> int:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cli.main(["fold", *what, str(folder / "cut"), *flags, *more])

    assert cli.main(["plan", *what, *flags[:4], *flags[6:], "--array", "3", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [one["slice"] for one in planned] == ["1/3", "2/3", "3/3"]
    assert all(one["parts"] > 1 for one in planned)
    assert command("--finish") == 2
    assert "no slice of this output is written" in capsys.readouterr().err
    for number in (3, 1):
        assert command("--slice", f"{number}/3") == 0
    assert command("--finish") == 2
    assert f"{planned[1]['parts']} of {sum(one['parts'] for one in planned)} parts" in capsys.readouterr().err

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    said = {"rounding": "nearest", "max_shard_size": options["max_shard_size"], "undo": folder / "cut.undo"}
    settings = FoldSettings(**said, trained_on=None if "nf4" in name else "plain")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        fold_slice(*what, folder / "cut", (2, 3), settings, progress=stop)
    notes = sorted((folder / ".cut.oftsurgery").glob("*.parts/[0-9]*.json"))
    stamps = {note: note.stat().st_mtime_ns for note in notes}
    assert command("--slice", "2/3") == 0
    assert {note: note.stat().st_mtime_ns for note in notes} == stamps
    assert command("--slice", "2/3") == 0
    assert not (folder / "cut").exists()
    assert command("--finish") == 0
    check_same(folder, "cut")
    assert command("--slice", "1/3") == 2  # the output is there
    assert "destination exists" in capsys.readouterr().err


def test_slices_of_other_settings_do_not_mix(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "fp4 to bf16"
    what = ["fold", str(folder / "base"), str(folder / "adapter"), str(folder / "mixed")]
    with quiet():
        assert cli.main([*what, "--slice", "1/2", "--format", "bf16"]) == 0
        assert cli.main([*what, "--slice", "2/2", "--format", "fp16"]) == 2
        assert "other inputs or settings" in capsys.readouterr().err
        for wrong, message in {"0/2": "there is no slice 0 of 2", "two": "a slice is i/N"}.items():
            assert cli.main([*what, "--slice", wrong, "--format", "bf16"]) == 2
            assert message in capsys.readouterr().err
        assert cli.main([*what, "--slice", "1/2", "--calibration", "self"]) == 2
        assert "cannot be cut into slices" in capsys.readouterr().err
    shutil.rmtree(folder / ".mixed.oftsurgery")
