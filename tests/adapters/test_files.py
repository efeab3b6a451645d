"""Reading an adapter's folder: what is on disk, and what cannot be read."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oftsurgery.adapters import reading
from oftsurgery.errors import AdapterError, OFTSurgeryError

TENSORS = {"base_model.model.a.oft_R.weight": torch.full((2, 6), 0.1)}


@pytest.fixture
def folder(write_adapter: Callable[..., Path]) -> Path:
    return write_adapter(TENSORS)


def test_a_whole_folder_is_read(folder: Path, oft_config: Callable[..., dict[str, Any]]) -> None:
    assert reading.find_adapter(folder)[1] == folder
    assert reading.find_adapter(str(folder))[1] == folder
    config, tensors, sha256 = reading.read_files(folder)
    assert config == oft_config()
    assert {k: v.tolist() for k, v in tensors.items()} == {k: v.tolist() for k, v in TENSORS.items()}
    assert sha256 == hashlib.sha256((folder / reading.ADAPTER_TENSORS).read_bytes()).hexdigest()


def test_the_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert reading.find_adapter(f"~/{folder.name}")[1] == folder


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was read",))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content))


def void(_: object) -> None: ...


def cut(folder: Path, size: int) -> None:
    path = folder / reading.ADAPTER_TENSORS
    path.write_bytes(path.read_bytes()[:size])


def pickled(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / reading.ADAPTER_TENSORS).unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb()))

    return harm


def huge_header(folder: Path) -> None:
    (folder / reading.ADAPTER_TENSORS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def outside_offsets(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / reading.ADAPTER_TENSORS).write_bytes(len(header).to_bytes(8, "little") + header)


def unknown_dtype(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F1024", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / reading.ADAPTER_TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")


NO_JSON = r"the file holds no JSON that can be read \(.+\) \[at .*adapter_config.json\] Remedy: restore the file"
UNREADABLE = r"the tensors cannot be read: the file is truncated, or is no safetensors file \(.+\) \[at .*adapter_model.safetensors\] Remedy: copy or download"
PICKLE = r"is a pickle, which could run code when read; oftsurgery reads safetensors only .*Remedy: load the adapter with the peft release that wrote it"

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (
        remove(reading.ADAPTER_CONFIG),
        r"the folder has no adapter_config.json \[at .*Remedy: give the folder that peft's save_pretrained wrote",
    ),
    "no tensors": (
        remove(reading.ADAPTER_TENSORS),
        r"the folder has no adapter_model.safetensors \[at .*Remedy: save the adapter again",
    ),
    "a .bin": (pickled("adapter_model.bin"), "^adapter_model.bin " + PICKLE),
    "a .pt": (pickled("adapter_model.pt"), "^adapter_model.pt " + PICKLE),
    "config cut": (write(reading.ADAPTER_CONFIG, b'{"peft_type": "OF'), NO_JSON),
    "config empty": (write(reading.ADAPTER_CONFIG, b""), NO_JSON),
    "config not UTF-8": (write(reading.ADAPTER_CONFIG, b"\xff\xfe\x00"), NO_JSON),
    "config nested without end": (write(reading.ADAPTER_CONFIG, b"[" * 100_000), NO_JSON),
    "config a list": (write(reading.ADAPTER_CONFIG, b"[1]"), "a JSON list, not an object .*Remedy: restore"),
    "config a string": (write(reading.ADAPTER_CONFIG, b'"OFT"'), "a JSON str, not an object"),
    "config huge": (
        write(reading.ADAPTER_CONFIG, b" " * (4 << 20) + b"{}"),
        r"the JSON file has 4194306 bytes, more than the limit of 4194304 .*Remedy: restore",
    ),
    "tensors empty": (write(reading.ADAPTER_TENSORS, b""), UNREADABLE),
    "tensors of another kind": (write(reading.ADAPTER_TENSORS, b"PK\x03\x04" + b"zip" * 100), UNREADABLE),
    "tensors cut in the header": (lambda f: cut(f, 20), UNREADABLE),
    "tensors cut in the data": (lambda f: cut(f, (f / reading.ADAPTER_TENSORS).stat().st_size - 4), UNREADABLE),
    "a header of 2⁶² bytes": (huge_header, UNREADABLE),
    "offsets outside the file": (outside_offsets, UNREADABLE),
    "an unknown dtype": (unknown_dtype, UNREADABLE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage: str, folder: Path) -> None:
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        reading.read_files(folder)
    assert caught.value.path is not None
    assert str(folder) in caught.value.path
    assert caught.value.remedy


def test_an_empty_folder_is_told_from_another_one(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"the folder is empty \[at "):
        reading.read_files(tmp_path)


def test_links_out_of_the_folder_that_lead_nowhere(folder: Path) -> None:
    (folder / reading.ADAPTER_TENSORS).unlink()
    (folder / reading.ADAPTER_TENSORS).symlink_to(folder / "gone")
    with pytest.raises(AdapterError, match=r"the folder has no adapter_model\.safetensors"):
        reading.read_files(folder)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/a/b/c", "~/no-such-folder-here", "/no/such", "", "a\0b"])
def test_no_such_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":
        with pytest.raises(AdapterError, match="the folder is empty"):
            reading.find_adapter(name)
        return
    with pytest.raises(
        AdapterError,
        match=r"the folder does not exist \[at .+\] Remedy: give the folder that peft's save_pretrained wrote, or a Hub id",
    ):
        reading.find_adapter(name)


def test_a_path_object_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="the folder does not exist"):
        reading.find_adapter(Path("owner/name"))


def test_a_file_instead_of_its_folder(folder: Path) -> None:
    with pytest.raises(
        AdapterError,
        match=r"an adapter is a folder, but the path is a file .*Remedy: give the folder that holds adapter_config.json",
    ):
        reading.find_adapter(folder / reading.ADAPTER_TENSORS)


@pytest.mark.parametrize("repo", ["nobody/no-such-adapter", "no body/bad name!"])
def test_a_hub_id_offline_with_an_empty_cache(repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        AdapterError,
        match=r"neither a folder nor a Hub repository that can be read \(.+Remedy: check the name; .*HF_TOKEN.*cache",
    ):
        reading.find_adapter(repo)


def test_a_hub_id_offline_from_a_filled_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name in (reading.ADAPTER_CONFIG, reading.ADAPTER_TENSORS):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    _, found = reading.find_adapter("owner/name")
    assert reading.read_files(found)[2] == reading.read_files(folder)[2]


def test_names_from_a_file_do_not_reach_a_message_raw(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "a\x1b[31m\n\u202ered"
    bad.mkdir()
    save_file(TENSORS, bad / reading.ADAPTER_TENSORS)
    with pytest.raises(OFTSurgeryError) as caught:
        reading.read_files(bad)
    assert str(caught.value).isprintable()
    assert r"a\x1b[31m\n\u202ered" in str(caught.value)
