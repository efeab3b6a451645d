"""Calibrations whose batches run on the workers of an executor, or over the devices of a map: the same bytes as in one process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from checkpoints import MODELS, adapted, bnb_config, build, file_bytes, load, quiet_fold
from checkpoints import quiet_transformers as quiet

import oftsurgery
from oftsurgery import DiskError, StateError
from oftsurgery.calibrate import batch_runs, checkpoint, run_tasks
from oftsurgery.calibrate.batches import read_batches
from oftsurgery.calibrate.input_sums import InputSum, InputSums
from oftsurgery.cli import main as cli

#: name → (model, its settings, targets)
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": (
        "llama",
        {"num_hidden_layers": 3, "max_position_embeddings": 32},
        ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    ),
    "a layer outside of the blocks": ("llama", {}, ["q_proj", "lm_head"]),
    "bert": ("bert", {}, ["query", "value"]),
}


@pytest.fixture(autouse=True)
def _chunks_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(batch_runs, "CHUNK_TOKENS", 200)
    monkeypatch.setattr(batch_runs, "OWN_TOKENS", 700)
    with quiet():
        yield


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case's ``<name>/base`` in NF4, and its ``adapter``."""
    place = tmp_path_factory.mktemp("calibrations")
    for name, (model, changes, targets) in CASES.items():
        with quiet():
            build(model, **changes).save_pretrained(place / "plain" / name)
            config = bnb_config("nf4", double=True, skip_modules=[])
            quantised = load(place / "plain" / name, MODELS[model][0], quantization_config=config)
            quantised.save_pretrained(place / name / "base")
            adapted(build(model, **changes), targets).save_pretrained(
                place / name / "adapter", save_embedding_layers=False
            )
    return place


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 64, (8, 24), generator=generator)} for _ in range(6)]


def fold(folder: Path, out: Path, **options: Any) -> oftsurgery.FoldRecord:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.CalibrationWarning)  # models of random weights need not gain
        return quiet_fold(folder / "base", folder / "adapter", out, **{"calibration": batches()} | options)


def test_chunks_depend_on_the_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = batch_runs.Batches.of(read_batches(batches()))
    assert [list(chunk) for chunk in found.chunks] == [[0], [1], [2], [3], [4], [5]]
    assert found.own == 4
    monkeypatch.setattr(batch_runs, "CHUNK_TOKENS", 400)
    assert [list(c) for c in batch_runs.Batches.of(read_batches(batches())).chunks] == [[0, 1], [2, 3], [4, 5]]
    monkeypatch.setattr(batch_runs, "CHUNKS", 2)
    assert [list(c) for c in batch_runs.Batches.of(read_batches(batches())).chunks] == [[0, 1, 2], [3, 4, 5]]


def _sums(rows: torch.Tensor, leaders: dict[str, str]) -> InputSums:
    sums = {path: InputSum.of(rows, drifts=True) for path in set(leaders.values())}
    for own in sums.values():
        own.add((rows, rows[:2]), (rows + 1, rows[:2] + 1))
    return InputSums(sums, leaders, wrong=False)


def test_sums_of_chunks_add_up() -> None:
    parts = [torch.randn(30, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    total, *later = [_sums(part, {"a": "a", "b": "a"}) for part in parts]
    for part in later:
        total.join(part)
    total.end()
    whole = _sums(torch.cat(parts), {"a": "a", "b": "a"})
    whole.end()
    found, expected = (sums.of("b") for sums in (total, whole))
    assert found is not None
    assert expected is not None
    assert torch.allclose(found.hessian, expected.hessian, atol=1e-4)
    assert found.drift is not None
    assert expected.drift is not None
    assert torch.allclose(found.drift, expected.drift, atol=1e-4)
    assert (found.tokens, len(torch.cat(found.held_out))) == (90, 6)
    assert not total.wrong


def test_layers_that_share_their_inputs_in_one_chunk_alone_are_found() -> None:
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    total = _sums(rows, {"a": "a", "b": "a"})
    total.join(_sums(rows, {"a": "a", "b": "b"}))
    assert total.wrong


def test_a_layer_with_other_tokens_in_one_chunk_has_no_drift() -> None:
    """An expert takes other tokens in the folded model."""
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    total, later = _sums(rows, {"a": "a"}), InputSums({"a": InputSum.of(rows, drifts=True)}, {"a": "a"}, wrong=False)
    later.sums["a"].add((rows, rows[:2]), (rows[:20], rows[:2]))
    total.join(later)
    total.end()
    assert total.sums["a"].drift is None
    assert total.sums["a"].tokens == 60


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks whose layers workers have listened to, in their order."""
    found: list[int] = []
    gather = run_tasks.TaskRuns.gather

    def listen(self: run_tasks.TaskRuns, step: batch_runs.Step, *rest: Any, **kw: Any) -> Any:
        found.append(step.block)
        return gather(self, step, *rest, **kw)

    monkeypatch.setattr(run_tasks.TaskRuns, "gather", listen)
    return found


@pytest.mark.parametrize("name", CASES)
def test_workers_give_the_same_bytes(
    name: str, place: Path, processes: Executor, tmp_path: Path, gathered: list[int]
) -> None:
    seen: list[str] = []
    one = fold(place / name, tmp_path / "one")
    assert not gathered
    many = fold(place / name, tmp_path / "many", executor=processes, progress=lambda _d, _t, what: seen.append(what))
    assert file_bytes(tmp_path / "many") == file_bytes(tmp_path / "one")
    assert many == one
    assert set(gathered) == ({0, 1, 2} if name == "llama" else {0, 1} if name == "bert" else set())
    assert "calibrated" in {m.rounding for m in one.modules.values()}
    assert sum("calibration: batch" in what for what in seen) >= 6
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["llama", "a layer outside of the blocks"])
def test_workers_and_maps_on_a_gpu_give_the_same_bytes(
    name: str, place: Path, processes: Executor, tmp_path: Path
) -> None:
    fold(place / name, tmp_path / "one", device="cuda")
    fold(place / name, tmp_path / "many", device="cuda", executor=processes, device_map="auto")
    assert file_bytes(tmp_path / "many") == file_bytes(tmp_path / "one")


def test_threads_give_the_same_bytes(place: Path, tmp_path: Path, gathered: list[int]) -> None:
    fold(place / "bert", tmp_path / "one")
    with ThreadPoolExecutor(2) as executor:
        fold(place / "bert", tmp_path / "many", executor=executor)
    assert gathered
    assert file_bytes(tmp_path / "many") == file_bytes(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold(place / "llama", tmp_path / "one")
    advance, killed = run_tasks.TaskRuns.advance, list[int]()

    def kill(self: run_tasks.TaskRuns, step: batch_runs.Step, weights: batch_runs.BlockWeights) -> None:
        executor: Any = self.tasks._executor
        killed.append(*executor._processes)
        os.kill(killed[-1], signal.SIGKILL)
        advance(self, step, weights)

    monkeypatch.setattr(run_tasks.TaskRuns, "advance", kill)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        fold(place / "llama", tmp_path / "many", executor=executor)
    assert len(set(killed)) == 2
    assert file_bytes(tmp_path / "many") == file_bytes(tmp_path / "one")


def test_an_error_leaves_nothing_and_a_later_run_goes_on(place: Path, processes: Executor, tmp_path: Path) -> None:
    one = fold(place / "llama", tmp_path / "one", max_shard_size="40KB")

    class Stopped(Exception):
        pass

    def stop(done: int, total: int, _: str) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        fold(place / "llama", tmp_path / "many", executor=processes, max_shard_size="40KB", progress=stop)
    assert (tmp_path / ".many.oftsurgery").is_dir()
    many = fold(place / "llama", tmp_path / "many", executor=processes, max_shard_size="40KB", resume=True)
    assert many == one
    assert file_bytes(tmp_path / "many") == file_bytes(tmp_path / "one")


def test_a_full_disk_is_said_as_such(tmp_path: Path) -> None:
    work = run_tasks.Work(b"", "", "cpu", str(tmp_path))
    (tmp_path / f".sums.pt.{run_tasks.mark()}").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"disk is full.*sums"):
        work.put("sums", {"a": torch.zeros(1 << 20)})
    assert not list(tmp_path.iterdir())


def test_a_map_of_devices_is_for_a_calibration(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "llama"
    with pytest.raises(StateError, match="this fold has no calibration"):
        quiet_fold(folder / "base", folder / "adapter", tmp_path / "out", device_map="auto")
    places = [str(place) for place in (folder / "base", folder / "adapter", tmp_path / "out")]
    assert cli.main(["fold", *places, "--device-map", "auto"]) == 2
    assert "--device-map" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _spread(model: Any) -> Any:
    """The model with the hooks by which accelerate brings inputs to the devices of the parts; here each device is the CPU."""
    for path, module in model.named_modules():
        if path.count(".") == 1 or path.split(".")[-1].isdigit() or path == "lm_head":
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", place_submodules=True))
    return add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))


@pytest.mark.parametrize(("name", "given"), [("llama", "self"), ("a layer outside of the blocks", "batches")])
def test_a_spread_model_gives_the_same_bytes(
    name: str, given: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps: list[Any] = []
    load_model = checkpoint.load_model

    def spread(plan: Any, device_map: Any) -> Any:
        maps.append(device_map)
        return _spread(load_model(plan, device_map))

    calibration: Any = batches() if given == "batches" else given
    fold(place / name, tmp_path / "one", calibration=calibration)
    monkeypatch.setattr(checkpoint, "load_model", spread)
    fold(place / name, tmp_path / "many", calibration=calibration, device_map="auto")
    assert set(maps) == {"auto"}
    assert file_bytes(tmp_path / "many") == file_bytes(tmp_path / "one")


def test_a_spread_model_in_memory_gives_the_same_bytes(place: Path) -> None:
    """accelerate's hooks stay where the calibration runs the blocks one by one."""
    folded = []
    for spread in (lambda model: model, _spread):
        model = spread(load(place / "llama" / "base", MODELS["llama"][0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = oftsurgery.fold(model, place / "llama" / "adapter", calibration=batches()).oftsurgery
        assert "calibrated" in {m.rounding for m in record.modules.values()}
        folded.append({path: m.after for path, m in record.modules.items()})
    assert folded[0] == folded[1]
