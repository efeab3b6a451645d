"""``hf://`` bases: small files are copied, and the weights stay on the Hub, where ranges of them are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoints import adapted, build, file_bytes, quiet_fold
from hub_server import Hub, Repo, serving, talk_to

import oftsurgery
from oftsurgery import CheckpointError, StateError
from oftsurgery.cli import main as cli

TOKEN = "hf_" + "Ab3" * 12
BASE = "org/base"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming")
    build("llama").save_pretrained(folder / "base", max_shard_size="100KB")
    adapted(build("llama"), ["q_proj", "down_proj"]).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def server(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with the base, once at the top and once in a folder of a branch, and with the adapter."""
    with serving(Hub({TOKEN: "me"})) as hub:
        talk_to(hub, TOKEN, tmp_path, monkeypatch)
        base = file_bytes(place / "base")
        hold(hub, BASE, base | {"pytorch_model.bin": b"x" * 30_000}, "main")
        hold(hub, BASE, {f"sub/{name}": data for name, data in base.items()}, "v1")
        hold(hub, "me/adapter", file_bytes(place / "adapter"), "main")
        yield hub
        huggingface_hub.close_session()


def hold(hub: Hub, repo_id: str, files: dict[str, bytes], branch: str) -> str:
    """A commit whose large files lie in the large file storage, as on the real Hub."""
    repo = hub.repos.setdefault(repo_id, Repo(private=False))
    sha = repo.commit({name: hub.stored(data) for name, data in files.items()}, "by hand", "")
    repo.branches[branch] = sha
    return sha


@pytest.mark.parametrize("given", [f"hf://{BASE}", f"hf://{BASE}@v1/sub"])
def test_a_base_is_read_by_ranges(server: Hub, place: Path, tmp_path: Path, given: str) -> None:
    quiet_fold(place / "base", place / "adapter", tmp_path / "local", trained_on="plain")
    record = quiet_fold(given, "hf://me/adapter", tmp_path / "out", trained_on="plain")
    found, local = file_bytes(tmp_path / "out"), file_bytes(tmp_path / "local")
    assert found["model.safetensors"] == local["model.safetensors"]
    assert found["config.json"] == local["config.json"]
    commit = server.repos[BASE].branches["v1" if "v1" in given else "main"]
    assert record.base["commit"] == commit
    assert record.base.get("revision") == ("v1" if "v1" in given else None)
    read = [(path, span) for path, span in server.ranges if "/lfs/" in path]
    sizes = {name: len(data) for name, data in file_bytes(place / "base").items() if name.endswith(".safetensors")}
    assert len(read) == len(sizes) > 2
    assert all(span for _, span in read)
    assert not [path for path in server.asked("GET", r"/resolve/") if "pytorch_model" in path]
    assert not list((tmp_path / "cache").glob("models--org--base/**/*.safetensors"))
    assert oftsurgery.verify_checkpoint(tmp_path / "out", given, place / "adapter").ok


def test_the_command_and_other_names(server: Hub, place: Path, tmp_path: Path) -> None:
    what = [str(place / "adapter"), "--trained-on", "plain", "--rounding", "nearest"]
    assert cli.main(["fold", f"hf://{BASE}", what[0], str(tmp_path / "far"), *what[1:]]) == 0
    cache = tmp_path / "cache" / "models--org--base"
    assert not list(cache.glob("**/*.safetensors"))
    # a name of the Hub that is no URL downloads, as before
    given = ["fold", f"{BASE}/sub", what[0], str(tmp_path / "near"), *what[1:], "--base-revision", "v1"]
    assert cli.main(given) == 0
    assert list(cache.glob("**/*.safetensors"))
    assert (tmp_path / "far/model.safetensors").read_bytes() == (tmp_path / "near/model.safetensors").read_bytes()


def test_offline_the_cache_is_read(server: Hub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_fold(BASE, place / "adapter", tmp_path / "cached", trained_on="plain")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    quiet_fold(f"hf://{BASE}", place / "adapter", tmp_path / "offline", trained_on="plain")
    assert file_bytes(tmp_path / "offline") == file_bytes(tmp_path / "cached")


def test_what_is_refused(server: Hub, place: Path) -> None:
    with pytest.raises(CheckpointError, match="the name is neither a folder nor a Hub repository that can be read"):
        oftsurgery.fold_checkpoint("hf://org/nowhere", place / "adapter", "out", trained_on="plain")
    with pytest.raises(CheckpointError, match="the repository has no revision 'v9'"):
        oftsurgery.fold_checkpoint(f"hf://{BASE}@v9", place / "adapter", "out", trained_on="plain")
    with pytest.raises(StateError, match=re.escape("push it: oftsurgery push OUTPUT owner/name")):
        oftsurgery.fold_checkpoint(place / "base", place / "adapter", "hf://me/out", trained_on="plain")
