"""safetensors headers and the streaming writer, against the safetensors library itself."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from checkpoints import differing
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import oftsurgery
from oftsurgery.dtypes import DTYPES
from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.files.reading import read_header, sha256_of
from oftsurgery.files.shard_writer import ShardWriter

CheckpointError = oftsurgery.CheckpointError


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """One of every dtype; scalars, empty ones and odd byte counts among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (0,), (7,), (2, 0, 3), (1, 1, 4), (129,), (2, 3), (5,), (11,), (1,), (13,)]
    return {
        f"t.{name}": torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
        for (name, dtype), shape in zip(DTYPES.items(), itertools.cycle(shapes), strict=False)
    }


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str], late: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    writer = ShardWriter(
        path, {n: (t.dtype, None if n in late else tuple(t.shape)) for n, t in tensors.items()}, {"format": "pt"}
    )
    for name in order:
        writer.write(name, tensors[name])
    writer.close()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_library_reads_what_the_writer_wrote_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    tensors = some_tensors(seed) | {
        "late.b": torch.randint(256, (seed % 4096,), dtype=torch.uint8),
        "late.a": torch.zeros(0, dtype=torch.uint8),
    }
    order = sorted(tensors)
    random.Random(seed).shuffle(order)
    path = tmp_path_factory.mktemp("w") / "model.safetensors"
    write(path, tensors, order, {"late.a", "late.b"})
    assert differing(load_file(path), tensors) == []
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    source = open_checkpoint(path.parent)
    assert differing({n: source.read(n) for n in source.entries}, tensors) == []
    assert {n: b"".join(source.chunks(n)) for n in tensors} == {
        n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()
    }
    for entry in source.entries.values():
        assert entry.start % max(1, DTYPES[entry.dtype].itemsize) == 0  # every tensor is aligned


def test_the_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "a", tensors, sorted(tensors))
    write(tmp_path / "b", tensors, sorted(tensors, reverse=True))
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")


def test_the_exact_bytes_of_a_small_file(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.tensor([1, 2], dtype=torch.uint8), "y": torch.tensor([1.0])}, ["x", "y"])
    header = b'{"__metadata__":{"format":"pt"},"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}'
    room = len(header) + -len(header) % 8
    assert (tmp_path / "a").read_bytes() == room.to_bytes(8, "little") + header.ljust(
        room
    ) + b"\x00\x00\x80\x3f\x01\x02"


def test_reading_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "note": "ü"})
    source = open_checkpoint(tmp_path)
    assert differing({n: source.read(n) for n in source.entries}, tensors) == []
    assert read_header(tmp_path / "model.safetensors")[1] == {"format": "pt", "note": "ü"}
    assert source.config == {}


def test_the_writer_refuses_what_was_not_planned(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", {"x": (torch.float32, (2,)), "y": (torch.float32, (1,))}, {})
    with pytest.raises(AssertionError, match="z is not planned"):
        writer.write("z", torch.zeros(2))
    with pytest.raises(AssertionError, match="x has 4 bytes, and 8 were planned"):
        writer.write("x", torch.zeros(1))
    writer.write("x", torch.zeros(2))
    with pytest.raises(AssertionError, match="x is not planned, or is written already"):
        writer.write("x", torch.zeros(2))
    with pytest.raises(AssertionError, match="1 tensors were not written"):
        writer.close()
    writer.abort()
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "a", {}, {})


def test_as_a_context_the_writer_closes_what_is_whole_and_finishes_nothing_else(tmp_path: Path) -> None:
    shapes = {"x": (torch.float32, (2,))}
    with ShardWriter(tmp_path / "model.safetensors", shapes, {}) as writer:
        writer.write("x", torch.ones(2))
    assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [1, 1]
    with pytest.raises(AssertionError, match="1 tensors were not written"), ShardWriter(tmp_path / "a", shapes, {}):
        pass
    with contextlib.suppress(KeyError), ShardWriter(tmp_path / "b", shapes, {}) as writer:
        writer.write("x", torch.ones(2))
        raise KeyError
    assert (tmp_path / "b").read_bytes()[:8] == bytes(8)  # no header


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1000)}, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    for read in (lambda: source.read("x"), lambda: list(source.chunks("x"))):
        with pytest.raises(
            CheckpointError, match=r"the shard ended early, before \d+ bytes of the tensor: the file has changed"
        ):
            read()


# --- an index that disagrees ------------------------------------------------------------------------------------------


def sharded(folder: Path) -> dict[str, str]:
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.zeros(4)}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


#: change to the index → message
INDEXES = {
    "a tensor that its shard lacks": (
        lambda m: m | {"d": "two.safetensors"},
        "the index names a tensor that its shards lack",
    ),
    "the wrong shard": (
        lambda m: m | {"c": "one.safetensors", "a": "two.safetensors"},
        "the index names .*, but the tensor is in",
    ),
    "a tensor left out": (
        lambda m: {k: v for k, v in m.items() if k != "b"},
        "the shard .* holds a tensor that the index lacks",
    ),
    "a missing shard": (lambda m: m | {"c": "three.safetensors"}, r"is missing \[at .*three\.safetensors"),
    "nothing": (lambda m: {}, "the index has no `weight_map`"),
    "numbers": (lambda m: m | {"c": 3}, "the index has no `weight_map`"),
    "a path": (lambda m: m | {"c": "../two.safetensors"}, "the index or record names a file outside its folder"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_disagrees_is_refused(tmp_path: Path, case: str) -> None:
    change, message = INDEXES[case]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": change(sharded(tmp_path))}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_an_index_that_agrees(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_checkpoint(tmp_path)
    assert {n: e.file for n, e in source.entries.items()} == weight_map
    assert source.files == ("one.safetensors", "two.safetensors")


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    save_file({"c": torch.zeros(4), "a": torch.zeros(2)}, tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=r"two shards, one\.safetensors and two\.safetensors, hold the same tensor"
    ):
        open_checkpoint(tmp_path)


#: what a folder holds → message
FOLDERS = {
    "pytorch_model.bin": "is a pickle, which could run code when read",
    "adapter_config.json": "the folder holds an adapter, not a model",
    "notes.txt": r"the folder has neither model\.safetensors nor model\.safetensors\.index\.json",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=FOLDERS[name]):
        open_checkpoint(tmp_path)


def test_identity_tells_changed_data_and_config(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(10)}, tmp_path / "model.safetensors")
    first = open_checkpoint(tmp_path).identity
    assert open_checkpoint(tmp_path).identity == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = open_checkpoint(tmp_path).identity
    save_file({"x": torch.ones(10)}, tmp_path / "model.safetensors")
    assert first != second != open_checkpoint(tmp_path).identity != first
