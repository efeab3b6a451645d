"""Files behind URLs, by fsspec's own clients of memory and of this machine's files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoints import file_bytes, quiet_fold
from layered import write_inputs
from safetensors.torch import load_file, save_file

import oftsurgery
from oftsurgery import AdapterError, CheckpointError, RemoteError, StateError
from oftsurgery.cli import main as cli
from oftsurgery.errors import printable
from oftsurgery.files import remote
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.files.reading import read_header, sha256_of
from oftsurgery.folding.disk_tasks import Work

SIZE = "350KB"
URL = "memory://bucket"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Base and adapter here and in memory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = write_inputs(tmp_path / "work")
    for name in ("base", "adapter"):
        put(f"{URL}/{name}", file_bytes(folder / name))
    yield folder
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def put(url: str, files: dict[str, bytes]) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for name, data in files.items():
        fs.pipe_file(f"{root}/{name}", data)


def files_at(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}


def fold(source: str = f"{URL}/base", destination: str = f"{URL}/out", **options: Any) -> oftsurgery.FoldRecord:
    options = {"trained_on": "plain", "max_shard_size": SIZE} | options
    return quiet_fold(source, f"{URL}/adapter", destination, **options)  # type: ignore[arg-type]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["s3://bucket/out", "memory://a/b", "abfs://container@account.dfs.core.windows.net/out"]
)
def test_a_path_names_its_url(url: str) -> None:
    path = remote.located(url)
    assert remote.url_of(path) == printable(path) == url
    assert path.name == url.rpartition("/")[2]
    assert remote.url_of(path.parent / "other") == url.rpartition("/")[0] + "/other"


@pytest.mark.parametrize("path", ["out", "/data/out", "C:/out", "owner/name", "a:b/c"])
def test_a_path_of_this_machine_names_none(path: str) -> None:
    assert not remote.is_url(path)
    assert remote.located(path) == remote.located(f"file://{path}") == Path(path)
    assert path == "a:b/c" or remote.url_of(Path(path)) is None


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/", "s3://bucket//out", "s3://bucket/../out", "zip://a::s3://b/c"]
)
def test_a_url_without_a_folder(url: str) -> None:
    with pytest.raises(StateError, match="the URL names no folder to write"):
        remote.located(url)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_mirror_has_small_files_and_no_weights(work: Path) -> None:
    base = work / "base"
    put(f"{URL}/base", {"sub/config.json": b"{}", ".hidden": b"", "pytorch_model.bin": b"x" * 100})
    folder = remote.mirrored(f"{URL}/base")
    assert folder.name == "base"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"model.safetensors", "tokenizer.json", "sub/config.json", "pytorch_model.bin"}
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    weights = folder / "model.safetensors"
    assert weights.stat().st_size == (base / "model.safetensors").stat().st_size
    assert not weights.read_bytes().strip(b"\0")
    with pytest.raises(Exception, match="header"):  # who reads the file itself finds no weights
        load_file(weights)
    assert read_header(weights) == read_header(base / "model.safetensors")
    assert sha256_of(weights) == sha256_of(base / "model.safetensors")
    far, near = open_checkpoint(folder), open_checkpoint(base)
    for name in near.entries:
        assert torch.equal(far.read(name), near.read(name))
        assert b"".join(far.chunks(name)) == b"".join(near.chunks(name))
    assert remote.mirrored(f"{URL}/base/") == folder
    put(f"{URL}/base", {"tokenizer.json": b"{ }"})
    assert (remote.mirrored(f"{URL}/base") / "tokenizer.json").read_bytes() == b"{ }"


def test_large_tensors_are_read_in_pieces(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 100_000)
    near = torch.randn(300, 200)
    save_file({"a": near, "b": torch.ones(3)}, work / "large.safetensors")
    put(URL, {"large.safetensors": (work / "large.safetensors").read_bytes()})
    with remote.opened(remote.mirrored(f"{URL}/large.safetensors")) as file:
        assert file.read() == (work / "large.safetensors").read_bytes()  # type: ignore[comparison-overlap]
        assert file.seek(-12, os.SEEK_END) == file.tell()
        assert file.read(100) == (work / "large.safetensors").read_bytes()[-12:]


def test_a_truncated_shard_is_refused_before_anything_is_written(work: Path) -> None:
    data = (work / "base" / "model.safetensors").read_bytes()
    put(f"{URL}/base", {"model.safetensors": data[:-1]})
    with pytest.raises(CheckpointError, match=r"is damaged.*\[at memory://bucket/base/model.safetensors\]"):
        fold()
    assert not files_at(f"{URL}/out")


def test_too_many_files(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MOST_FILES", 1)
    with pytest.raises(
        CheckpointError, match=r"more than 1 files, which is the limit behind a URL \[at memory://bucket/"
    ):
        fold()


def test_names_that_lead_out(work: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.store["/bucket/base/a\\..\\evil.json"] = fs.store["/bucket/base/tokenizer.json"]
    with pytest.raises(CheckpointError, match="a file has a name that leads out of its folder"):
        fold()


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", [f"{URL}/out", "file://{}/far/out"])
def test_the_bytes_are_those_of_a_local_fold(work: Path, destination: str) -> None:
    quiet_fold(work / "base", work / "adapter", work / "out", max_shard_size=SIZE)
    url = destination.format(work)
    fold(destination=url)
    assert files_at(url) == file_bytes(work / "out")
    assert files_at(url.rpartition("/")[0] + "/.out.oftsurgery") == {}
    assert oftsurgery.verify_checkpoint(url, f"{URL}/base", f"{URL}/adapter").ok


def test_from_a_local_base_to_a_url_and_back(work: Path) -> None:
    quiet_fold(work / "base", work / "adapter", f"{URL}/out", trained_on="plain")  # type: ignore[arg-type]
    oftsurgery.unfold_checkpoint(f"{URL}/out", work / "back", base=work / "base")
    assert (
        load_file(work / "back" / "model.safetensors").keys() == load_file(work / "base" / "model.safetensors").keys()
    )
    put(f"{URL}/base", {"model.safetensors": files_at(f"{URL}/out")["model.safetensors"]})
    with pytest.raises(oftsurgery.IntegrityError):
        oftsurgery.unfold_checkpoint(f"{URL}/out", f"{URL}/wrong", base=f"{URL}/base")
    assert not files_at(f"{URL}/wrong")


def test_a_single_file(work: Path) -> None:
    put(URL, {"model.safetensors": files_at(f"{URL}/base")["model.safetensors"]})
    given = {"trained_on": "plain", "rounding": "nearest"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        quiet_fold(work / "base" / "model.safetensors", work / "adapter", work / "out.safetensors", **given)
        fold(f"{URL}/model.safetensors", f"{URL}/out.safetensors")
    for name in ("out.safetensors", "out.safetensors.oftsurgery.json"):
        assert fsspec.filesystem("memory").cat_file(f"/bucket/{name}") == (work / name).read_bytes()
    assert oftsurgery.verify_checkpoint(f"{URL}/out.safetensors").ok


class Elsewhere(ThreadPoolExecutor):
    """Workers that do not see the folder of the unfinished output."""

    def submit(self, attempt: Any, function: Any, *given: Any) -> Any:  # type: ignore[override]
        given = tuple(replace(one, folder=one.folder + "/elsewhere") if isinstance(one, Work) else one for one in given)
        return super().submit(attempt, function, *given)


def test_workers_on_this_machine_and_elsewhere(work: Path) -> None:
    quiet_fold(work / "base", work / "adapter", work / "out", max_shard_size=SIZE)
    with Elsewhere(1) as executor, pytest.raises(StateError, match=r"a worker does not see the folder.*set TMPDIR"):
        fold(executor=executor)
    with ThreadPoolExecutor(2) as executor:
        fold(executor=executor)
    assert files_at(f"{URL}/out") == file_bytes(work / "out")


def test_no_url_of_an_adapters_config_is_opened(work: Path) -> None:
    """The config is somebody else's: a base that it names is no reason to talk to a server."""
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    put(
        f"{URL}/adapter",
        {"adapter_config.json": json.dumps(config | {"base_model_name_or_path": f"{URL}/base"}).encode()},
    )
    with pytest.raises(
        StateError, match=r"no base was given, and the base that the adapter's config names, .* is not here"
    ):
        fold(None)  # type: ignore[arg-type]


def test_an_adapter_in_a_subfolder_brings_its_tokenizer(work: Path) -> None:
    adapter = file_bytes(work / "adapter") | {"tokenizer.json": b'{"own": 1}', "tokenizer_config.json": b"{}"}
    put(f"{URL}/trainer", {f"checkpoint-5/{name}": data for name, data in adapter.items()})
    with pytest.warns(oftsurgery.SourceWarning, match=r"memory://bucket/trainer holds one adapter, in its subfolder"):
        read = oftsurgery.load_adapter(f"{URL}/trainer")
    assert read.source == f"{URL}/trainer/checkpoint-5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        record = oftsurgery.fold_checkpoint(f"{URL}/base", read, f"{URL}/out", trained_on="plain")
    assert record.tokenizer == "adapter"
    assert record.adapters[0].source == "checkpoint-5"  # as of a local folder
    assert files_at(f"{URL}/out")["tokenizer.json"] == b'{"own": 1}'
    assert not oftsurgery.doctor(f"{URL}/adapter")


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown protocol": (
        {"source": "nope://bucket/base"},
        RemoteError,
        r"no client knows the URL .*\[at nope://bucket/base\]",
    ),
    "a password": (
        {"source": "nope://me:secret@host/base"},
        RemoteError,
        r"\[at nope://\*\*\*@host/base\]",
    ),
    "a client that is not installed": (
        {"source": "abfs://container/base"},
        oftsurgery.MissingDependencyError,
        "the client of abfs:// is not installed Remedy: Install adlfs to access",
    ),
    "nothing there": (
        {"source": f"{URL}/nowhere"},
        CheckpointError,
        r"there is no file behind the URL \[at memory://bucket/nowhere\]",
    ),
    "a revision": (
        {"revision": "v1"},
        CheckpointError,
        r"a local folder has no revisions, but the revision 'v1' was given",
    ),
    "an undo record there": (
        {"undo": f"{URL}/out.undo"},
        StateError,
        "this output is written to a folder of this machine",
    ),
    "the Hub as an output": ({"destination": "hf://owner/name"}, StateError, "oftsurgery push OUTPUT owner/name"),
    "the web as an output": ({"destination": "https://host/out"}, StateError, "a page of the web takes no files"),
    "a bucket as an output": ({"destination": "memory://bucket"}, StateError, "the URL names no folder to write"),
    "the base as the output": (
        {"destination": f"{URL}/base", "force": True},
        StateError,
        "the destination is, or holds, the source itself",
    ),
    "an output in the base": ({"destination": f"{URL}/base/out"}, StateError, "the destination is inside the source"),
    "an output that holds the adapter": (
        {"destination": URL + "/adapter/..", "force": True},
        StateError,
        "names no folder",
    ),
    "the adapter as the output": ({"destination": f"{URL}/adapter", "force": True}, StateError, "the adapter itself"),
    "an output that exists": (
        {"destination": f"{URL}/there"},
        StateError,
        r"the destination exists \[at memory://bucket/there\]",
    ),
    "a calibration": ({"calibration": ["a text"]}, StateError, "a calibration needs the files on this machine"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing(work: Path, case: str) -> None:
    put(f"{URL}/there", {"notes.txt": b"somebody's"})
    options, error, told = REFUSED[case]
    before = files_at(URL)
    with pytest.raises(error, match=told):
        fold(**options)
    assert files_at(URL) == before
    assert not list(work.parent.glob("oftsurgery-*/*.lock"))


def test_other_outputs_and_slices_are_refused(work: Path) -> None:
    adapter = oftsurgery.load_adapter(f"{URL}/adapter")
    with pytest.raises(
        StateError, match=r"written to a folder of this machine, and not to a URL \[at memory://bucket/saved\]"
    ):
        adapter.save(f"{URL}/saved")
    what = ["fold", f"{URL}/base", f"{URL}/adapter", f"{URL}/out", "--trained-on", "plain"]
    assert cli.main([*what, "--slice", "1/2"]) == 2
    assert cli.main([*what, "--finish"]) == 2
    with pytest.raises(AdapterError, match="the folder does not exist"):
        oftsurgery.load_adapter("https://host/adapter")
    assert not Path("memory:").exists()
