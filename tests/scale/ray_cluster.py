"""Folds on a cluster of Ray with two nodes on this machine. ``make test-scale`` runs this file in an environment with Ray; pytest
does not collect this file by itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from checkpoints import file_bytes
from layered import write_inputs
from ray.cluster_utils import Cluster
from test_executors import CASES, check_same, fold, place  # noqa: F401 - `place` is a fixture

import oftsurgery
from oftsurgery import tasks
from oftsurgery.calibrate import batch_runs
from oftsurgery.cli import main as cli

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    monkeypatch.setattr(tasks, "LEAST", 10_000)
    monkeypatch.setattr(tasks, "MOST", 10_000)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)


@pytest.mark.parametrize("name", CASES)
def test_two_nodes_write_the_same_bytes(name: str, place: Path) -> None:  # noqa: F811
    with oftsurgery.RayExecutor() as executor:
        fold(place / name, "ray", **CASES[name][3], executor=executor)
    check_same(place / name, "ray")


def test_two_nodes_calibrate_to_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(batch_runs, "CHUNK_TOKENS", 200)
    folder = place / "nf4 double, preserve"
    tokens = torch.randint(0, 64, (4, 8, 24), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": batch} for batch in tokens]
    fold(folder, "calibrated", calibration=batches)
    with oftsurgery.RayExecutor() as executor:
        fold(folder, "calibrated by ray", calibration=batches, executor=executor)
    assert file_bytes(folder / "calibrated by ray") == file_bytes(folder / "calibrated")


def test_the_command_and_the_name(place: Path) -> None:  # noqa: F811
    folder = place / "fp4 to bf16"
    what = [str(folder / part) for part in ("base", "adapter", "by-command")]
    flags = ["--format", "bf16", "--max-shard-size", "60KB", "--rounding", "nearest"]
    assert cli.main(["fold", *what, *flags, "--ray", "--cpus-per-task", "1"]) == 0
    check_same(folder, "by-command")
    paths = [folder / part for part in ("one", "base", "adapter")]
    assert oftsurgery.verify_checkpoint(*paths, executor="ray") == oftsurgery.verify_checkpoint(*paths)


def workers() -> list[int]:
    """The processes of Ray's that work for this process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(path.name)] = parent, (path / "cmdline").read_text()

    def ours(pid: int) -> bool:
        while pid in found and pid != os.getpid():
            pid = found[pid][0]
        return pid == os.getpid()

    return [pid for pid, (_, name) in found.items() if name.startswith("ray::_call") and ours(pid)]


def test_twenty_killed_workers_change_nothing(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "work")
    options: dict[str, Any] = {"max_shard_size": "350KB", "undo": True}
    fold(folder, "one", **options)
    rng, killed = random.Random(5), 0
    with oftsurgery.RayExecutor() as executor:
        for i in range(20):
            left = [rng.randrange(1, 10)]

            def progress(*_: Any, left: list[int] = left) -> None:
                """Kill a worker when that many parts are written, a random moment later; once."""
                nonlocal killed
                if left:
                    left[0] -= 1
                    time.sleep(rng.uniform(0, 0.02))
                    found = workers() if left[0] <= 0 else []
                    if found:
                        os.kill(rng.choice(found), signal.SIGKILL)
                        killed += 1
                        left.clear()

            fold(folder, f"killed-{i}", **options, executor=executor, progress=progress)
            check_same(folder, f"killed-{i}")
    assert killed == 20


def test_the_log_of_a_failing_task_is_in_the_error(place: Path, tmp_path: Path) -> None:  # noqa: F811
    from safetensors.torch import load_file, save_file

    folder, other = place / "nf4 double, undo", tmp_path / "base"
    other.mkdir()
    for path in (folder / "base").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    held = load_file(other / "model.safetensors")
    held["model.layers.1.self_attn.q_proj.weight"] ^= 1
    save_file(held, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(oftsurgery.IntegrityError) as caught:
        oftsurgery.unfold_checkpoint(folder / "one", tmp_path / "out", base=other, executor="ray")
    assert "write_part" in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()
