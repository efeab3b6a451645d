"""Hostile inputs: checkpoints, adapters, records and destinations that nobody vouches for.

One table, a line a kind. Each attack is made on a sound checkpoint and adapter, and must then be refused by
`fold_checkpoint`, by the command line and by `doctor`: a typed error, in a few seconds and without gigabytes, that puts
nothing raw on the terminal; no code runs, and nothing anywhere is changed.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, build, quiet_fold
from safetensors.torch import load_file, save_file
from torch import Tensor

from oftsurgery import errors as e
from oftsurgery.checks.doctor import doctor
from oftsurgery.cli import main as cli
from oftsurgery.cli.arguments import ExitCode
from oftsurgery.files.staging import Staging

SECONDS, MEGABYTES = 8, 300
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
RED = "\x1b[31m\u202e"
Header = dict[str, Any]


@dataclass
class Bench:
    """What an attack changes: ``source`` (NF4, doubly quantised, in shards), ``adapter``, and the files ``outside``
    that nobody may touch.
    """

    root: Path
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source, self.adapter, self.outside = self.root / "source", self.root / "adapter", self.root / "outside"
        self.destination = self.root / "destination"
        self.ran = self.root / "code-ran"

    # --- the source ---

    @property
    def shard(self) -> Path:
        return sorted(self.source.glob("model-*.safetensors"))[0]

    def index(self, change: Callable[[dict[str, str]], object]) -> None:
        """Change the index's weight_map."""
        value = json.loads((self.source / INDEX).read_text())
        change(value["weight_map"])
        (self.source / INDEX).write_text(json.dumps(value))

    def rename_shard(self, name: str) -> None:
        """The index names the first shard so."""
        self.index(lambda m: m.update({t: name for t, f in m.items() if f == self.shard.name}))

    def config(self, **fields: Any) -> None:
        path = self.source / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def header(self, change: Callable[[Header], object], data: Callable[[bytes], bytes] = lambda d: d) -> None:
        """Change the first shard's header, and perhaps its data."""
        raw = self.shard.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        text = change(header)
        blob = text if isinstance(text, bytes) else json.dumps(header).encode()
        self.shard.write_bytes(struct.pack("<Q", len(blob)) + blob + data(raw[8 + length :]))

    def tensors(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the first shard's tensors, and the index with them."""
        found = load_file(self.shard)
        before = set(found)
        change(found)
        save_file(found, self.shard)
        self.index(lambda m: [m.pop(n) for n in before - set(found)])
        self.index(lambda m: m.update(dict.fromkeys(set(found) - before, self.shard.name)))

    def state(self, **fields: Any) -> None:
        """Change the JSON in every packed state of the first shard."""

        def change(found: dict[str, Tensor]) -> None:
            for name in [n for n in found if ".quant_state." in n]:
                value = json.loads(bytes(found[name].numpy())) | fields
                found[name] = blob(json.dumps({k: v for k, v in value.items() if v is not ...}))

        self.tensors(change)

    def link(self, path: Path, target: Path | str) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    # --- the adapter ---

    def adapter_config(self, **fields: Any) -> None:
        path = self.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def adapter_tensors(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        path = self.adapter / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)


def blob(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


class Payload:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def first(mapping: Any, ending: str = "") -> Any:
    return next(k for k in mapping if k.endswith(ending) and k != "__metadata__")


def by_offset(header: Header) -> list[Header]:
    return sorted(
        (h for n, h in header.items() if n != "__metadata__" and h["data_offsets"][1] > h["data_offsets"][0]),
        key=lambda h: h["data_offsets"],
    )


@dataclass(frozen=True)
class Attack:
    """One kind of hostile input.

    Attributes:
        name: of the case.
        why: what it is after.
        make: makes it.
        error: what refuses it.
        text: regular expression that the error's text matches.
        examine: what `doctor` is shown: ``"source"``, ``"adapter"``, or None for an attack on the destination.
    """

    name: str
    why: str
    make: Callable[[Bench], object]
    error: type[e.OFTSurgeryError] | tuple[type[e.OFTSurgeryError], ...]
    text: str
    examine: str | None = "source"


C, A = e.CheckpointError, e.AdapterError


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def overlapping(header: Header) -> None:
    one, two = by_offset(header)[:2]
    size = two["data_offsets"][1] - two["data_offsets"][0]
    two["data_offsets"] = [one["data_offsets"][0], one["data_offsets"][0] + size]


def double_name(header: Header) -> bytes:
    name = first(header)
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode()


def with_hole(header: Header) -> None:
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [n + 8 for n in entry["data_offsets"]]


def set_first(field_: str, value: Any) -> Callable[[Header], None]:
    return lambda header: header[first(header)].update({field_: value})


def pickled_checkpoint(b: Bench) -> None:
    for path in b.source.glob("model*"):
        path.unlink()
    (b.source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(b.ran)))


def pickled_adapter(b: Bench) -> None:
    (b.adapter / "adapter_model.safetensors").unlink()
    (b.adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(b.ran)))


def other_key(new: Callable[[str], str]) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        key = sorted(found)[0]
        found[new(key)] = found.pop(key)

    return change


def replace_first(tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        key = sorted(found)[0]
        found[key] = tensor(found[key])

    return change


def int8_without_scb(found: dict[str, Tensor]) -> None:
    weight = first(found, ".quant_map").removesuffix(".quant_map")
    for name in [n for n in found if n.startswith(weight)]:
        del found[name]
    found[weight] = torch.ones(64, 64, dtype=torch.int8)


def unfinished(b: Bench, state: dict[str, Any]) -> None:
    """The unfinished work of a run on these very inputs, as it would be found by --resume, with ``state`` changed by
    somebody.
    """
    key = ""
    enter = Staging.__enter__

    class Stop(Exception):
        pass

    def stop(self: Staging) -> Staging:
        nonlocal key
        key = self.key
        raise Stop

    Staging.__enter__ = stop  # type: ignore[method-assign]
    try:
        quiet_fold(b.source, b.adapter, b.destination)
    except Stop:
        pass
    finally:
        Staging.__enter__ = enter  # type: ignore[method-assign]
    folder = b.destination.parent / f".{b.destination.name}.oftsurgery"
    folder.mkdir()
    (folder / ".state.json").write_text(json.dumps({"key": key} | state))
    b.options["resume"] = True


def planted_link(b: Bench) -> None:
    (b.destination.parent / f".{b.destination.name}.oftsurgery").symlink_to(b.outside)


def around_the_source(b: Bench) -> None:
    b.destination = b.root / "around"
    b.destination.mkdir()
    b.source.rename(b.destination / "source")
    b.source = b.destination / "source"
    b.options["force"] = True


def linked_in_a_circle(b: Bench) -> None:
    b.link(b.source / "there", b.shard.name)
    b.link(b.shard, "there")


def linked_twice(b: Bench) -> None:
    b.link(b.source / "folder", b.outside)
    b.link(b.shard, "folder/secret.safetensors")


def like_the_cache(b: Bench) -> None:
    b.link(b.root / "blobs", b.outside)
    (b.root / "snapshots").mkdir()
    b.source = b.source.rename(b.root / "snapshots" / "0")
    b.link(b.shard, "../../blobs/secret.safetensors")


# no name of the model's is of it, and each is tried in very many ways
EVER = r".*q_proj|.*down_proj|(.|..|...)*!"

ATTACKS = [
    # --- names and links that leave the folder ---
    Attack(
        "index: parent folder",
        "read a file of the user's as a shard",
        lambda b: b.rename_shard("../outside/secret.safetensors"),
        C,
        "outside",
    ),
    Attack(
        "index: absolute path",
        "the same",
        lambda b: b.rename_shard(str(b.outside / "secret.safetensors")),
        C,
        "outside its folder",
    ),
    Attack(
        "index: backslashes",
        "the same where they separate",
        lambda b: b.rename_shard("..\\outside\\secret.safetensors"),
        C,
        "outside its folder",
    ),
    Attack(
        "index: NUL in a name",
        "end the name early for the system",
        lambda b: b.rename_shard("model\0.safetensors"),
        C,
        "outside its folder",
    ),
    Attack(
        "index: a name of 5000 characters",
        "an error of the system's own",
        lambda b: b.rename_shard("a" * 5000),
        C,
        "cannot be a file's name",
    ),
    Attack(
        "link: shard",
        "read a file of the user's",
        lambda b: b.link(b.shard, b.outside / "secret.safetensors"),
        C,
        "link that leaves its folder",
    ),
    Attack(
        "link: config",
        "copy a file of the user's",
        lambda b: b.link(b.source / CONFIG, b.outside / "secret.json"),
        C,
        "link that leaves its folder",
    ),
    Attack(
        "link: index",
        "the same",
        lambda b: b.link(b.source / INDEX, b.outside / "secret.json"),
        C,
        "link that leaves its folder",
    ),
    Attack(
        "link: tokenizer",
        "publish it with the model",
        lambda b: b.link(b.source / "tokenizer.json", b.outside / "secret.json"),
        C,
        "leaves its folder",
    ),
    Attack(
        "link: record",
        "the same",
        lambda b: b.link(b.source / "oftsurgery.json", b.outside / "secret.json"),
        C,
        "leaves its folder|no plain file",
    ),
    Attack("device as a shard", "read for ever", lambda b: b.link(b.shard, "/dev/zero"), C, "no plain file"),
    Attack("pipe as a shard", "wait for ever", lambda b: fifo(b.shard), C, "no plain file"),
    Attack("pipe as the config", "wait for ever", lambda b: fifo(b.source / CONFIG), C, "no plain file"),
    Attack("pipe as the index", "wait for ever", lambda b: fifo(b.source / INDEX), C, "no plain file"),
    Attack("folder as a shard", "an error of the system's own", lambda b: folder_instead(b.shard), C, "no plain file"),
    Attack("link to itself", "turn in a circle", lambda b: b.link(b.shard, b.shard.name), C, "no plain file"),
    Attack("links in a circle", "the same", linked_in_a_circle, C, "no plain file"),
    Attack("link: shard, over a link to a folder", "read a file of the user's", linked_twice, C, "leaves its folder"),
    Attack("link: shard, into /etc", "the same", lambda b: b.link(b.shard, "/etc/passwd"), C, "leaves its folder"),
    Attack(
        "link: blobs that are a link, in what looks like the Hub's cache",
        "the same",
        like_the_cache,
        C,
        "link that leaves its folder",
    ),
    Attack(
        "names: two that are one without a wrapper's name",
        "change one tensor and show the other",
        lambda b: b.tensors(lambda t: t.update({f"_orig_mod.{first(t)}": t[first(t)].clone()})),
        C,
        "and this tensor have one name",
    ),
    # --- the index's JSON ---
    Attack(
        "index: nested 100,000 deep",
        "overflow the stack",
        lambda b: (b.source / INDEX).write_text('{"a":' * 100_000),
        C,
        "no JSON",
    ),
    Attack(
        "index: a number of 100,000 digits",
        "quadratic time",
        lambda b: (b.source / INDEX).write_text('{"a":' + "9" * 100_000 + "}"),
        C,
        "no JSON",
    ),
    Attack(
        "index: 20 million lists",
        "gigabytes of small objects",
        lambda b: (b.source / INDEX).write_text("[" + "[]," * 20_000_000 + "0]"),
        C,
        "lists and objects, more than the limit of",
    ),
    Attack(
        "index: files that are no strings",
        "a type error",
        lambda b: b.index(lambda m: m.update({first(m): 7})),
        C,
        "no `weight_map` of file names",
    ),
    Attack(
        "index: escape sequences",
        "the reader's terminal",
        lambda b: b.index(lambda m: m.update({RED: b.shard.name})),
        C,
        "shards lack",
    ),
    Attack(
        "index: half a surrogate",
        "an encoding error",
        lambda b: b.index(lambda m: m.update({"\ud800": b.shard.name})),
        C,
        "shards lack",
    ),
    Attack(
        "index: a tensor in two shards",
        "two truths",
        lambda b: shutil.copy(b.shard, b.source / sorted(b.source.glob("model-*"))[1].name),
        C,
        "two shards",
    ),
    Attack(
        "two checkpoints in one folder",
        "check one, load the other",
        lambda b: shutil.copy(b.shard, b.source / "model.safetensors"),
        C,
        "two checkpoints",
    ),
    # --- headers ---
    Attack(
        "header: length of 2⁶³",
        "allocate it",
        lambda b: b.shard.write_bytes(struct.pack("<Q", 1 << 63) + b"{}"),
        C,
        "damaged",
    ),
    Attack(
        "header: longer than the file",
        "read past the end",
        lambda b: b.shard.write_bytes(struct.pack("<Q", 1000) + b"{}"),
        C,
        "damaged",
    ),
    Attack("header: no JSON", "a decoding error", lambda b: b.header(lambda h: b"\xff\xfe" * 40), C, "damaged"),
    Attack(
        "header: nested 10,000 deep",
        "overflow the stack",
        lambda b: b.header(lambda h: b'{"a":' * 10_000),
        C,
        "damaged",
    ),
    Attack(
        "header: overlapping tensors", "one tensor writes into another", lambda b: b.header(overlapping), C, "damaged"
    ),
    Attack(
        "header: a hole in the data",
        "a file in a file",
        lambda b: b.header(with_hole, lambda d: bytes(8) + d),
        C,
        "damaged",
    ),
    Attack(
        "header: bytes after the data",
        "the same",
        lambda b: b.header(lambda h: None, lambda d: d + bytes(64)),
        C,
        "damaged",
    ),
    Attack(
        "header: one name twice", "two readers see two tensors", lambda b: b.header(double_name), C, "damaged|twice"
    ),
    Attack(
        "header: shape that lies",
        "read past a tensor",
        lambda b: b.header(set_first("shape", [1 << 20, 1 << 10])),
        C,
        "damaged",
    ),
    Attack(
        "header: shape that overflows",
        "wrap around to a small size",
        lambda b: b.header(set_first("shape", [1 << 40, 1 << 40])),
        C,
        "damaged",
    ),
    Attack("header: negative size", "the same", lambda b: b.header(set_first("shape", [-64, -64])), C, "damaged"),
    Attack(
        "header: sizes that are no integers",
        "a type error",
        lambda b: b.header(set_first("shape", [64.5, True])),
        C,
        "damaged",
    ),
    Attack("header: unknown dtype", "a key error", lambda b: b.header(set_first("dtype", "F1")), C, "damaged"),
    Attack(
        "header: no elements, but 2⁶² rows",
        "overflow where sizes are multiplied",
        lambda b: (
            b.header(lambda h: h.update(x={"dtype": "F32", "shape": [1 << 62, 0], "data_offsets": [0, 0]})),
            b.index(lambda m: m.update(x=b.shard.name)),
        ),
        C,
        "oftsurgery does not know the tensor's dtype or shape",
    ),
    Attack(
        "shard: truncated",
        "read past the end",
        lambda b: b.shard.write_bytes(b.shard.read_bytes()[:-100]),
        C,
        "damaged",
    ),
    Attack("shard: empty", "the same", lambda b: b.shard.write_bytes(b""), C, "damaged"),
    Attack(
        "shard: a pickle by its name",
        "run code",
        lambda b: b.shard.write_bytes(pickle.dumps(Payload(b.ran))),
        C,
        "damaged",
    ),
    Attack("checkpoint: pickles alone", "run code", pickled_checkpoint, C, "is a pickle"),
    # --- the config ---
    Attack("config: no object", "a type error", lambda b: (b.source / CONFIG).write_text('["llama"]'), C, "JSON list"),
    Attack("config: 5 MB", "memory", lambda b: b.config(x="y" * (5 << 20)), C, "more than the limit of"),
    Attack(
        "config: model_type is a list",
        "a type error",
        lambda b: b.config(model_type=["llama"]),
        e.OFTSurgeryError,
        "model.type",
    ),
    Attack(
        "config: sizes are strings",
        "a type error",
        lambda b: b.config(hidden_size="64"),
        C,
        "cannot build it from this config",
    ),
    Attack(
        "config: no attention heads",
        "divide by zero",
        lambda b: b.config(num_attention_heads=0),
        C,
        "cannot build it from this config",
    ),
    Attack("config: 10⁹ layers", "build them for ever", lambda b: b.config(num_hidden_layers=10**9), C, "config"),
    Attack(
        "config: architectures is a number",
        "a type error",
        lambda b: b.config(architectures=7),
        e.OFTSurgeryError,
        "config",
    ),
    Attack(
        "config: quantization_config is a list",
        "a type error",
        lambda b: b.config(quantization_config=["nf4"]),
        e.OFTSurgeryError,
        "quantization_config",
    ),
    Attack(
        "config: another quantiser",
        "misread the codes",
        lambda b: b.config(quantization_config={"quant_method": f"{RED}gptq"}),
        e.FormatError,
        "another",
    ),
    # --- quantisation states ---
    Attack(
        "state: a shape of 10¹² elements",
        "allocate terabytes",
        lambda b: b.state(shape=[10**6, 10**6]),
        e.FormatError,
        "stored bytes do not fit",
    ),
    Attack(
        "state: shape of booleans and floats",
        "numbers that are none",
        lambda b: b.state(shape=[True, 4096.0]),
        e.FormatError,
        "not one that bitsandbytes writes",
    ),
    Attack(
        "state: negative shape",
        "wrap around",
        lambda b: b.state(shape=[-64, -64]),
        e.FormatError,
        "not one that bitsandbytes writes",
    ),
    Attack(
        "state: blocks of 2³⁰",
        "gigabytes of padding",
        lambda b: b.state(blocksize=1 << 30),
        e.FormatError,
        "not one that bitsandbytes writes",
    ),
    Attack(
        "state: nested blocks of 2³⁰",
        "the same",
        lambda b: b.state(nested_blocksize=1 << 30),
        e.FormatError,
        "not one that bitsandbytes writes",
    ),
    Attack(
        "state: offset NaN",
        "a weight of NaN",
        lambda b: b.state(nested_offset=math.nan),
        (e.NonFiniteError, e.FormatError),
        "NaN|not one that bitsandbytes writes",
    ),
    Attack("state: no offset", "a key error", lambda b: b.state(nested_offset=...), e.FormatError, "nested statistics"),
    Attack(
        "state: says another type",
        "decode by the wrong table",
        lambda b: b.state(quant_type="fp4"),
        e.FormatError,
        "but the tensor's name says",
    ),
    Attack(
        "state: dtype is code",
        "getattr on torch",
        lambda b: b.state(dtype="load"),
        e.FormatError,
        "not one that bitsandbytes writes",
    ),
    Attack(
        "state: nested 1000 deep",
        "overflow the stack",
        lambda b: b.tensors(lambda t: t.update({first(t, "nf4"): blob('{"a":' * 800)})),
        e.FormatError,
        "not one that bitsandbytes writes",
    ),
    Attack(
        "quant_map of another format",
        "two readers see two weights",
        lambda b: b.tensors(lambda t: t.update({n: torch.linspace(-1, 1, 16) for n in t if n.endswith(".quant_map")})),
        e.FormatError,
        "quant_map is not the format's own",
    ),
    Attack(
        "absmax too short",
        "read past the end",
        lambda b: b.tensors(lambda t: t.update({n: t[n][:-1].clone() for n in t if n.endswith(".absmax")})),
        e.ShapeError,
        "absmax does not hold",
    ),
    Attack(
        "int8 without SCB",
        "take codes for values",
        lambda b: b.tensors(int8_without_scb),
        e.FormatError,
        "lacks its SCB",
    ),
    # --- records and unfinished work ---
    Attack(
        "record: wrong types",
        "a type error",
        lambda b: (b.source / "oftsurgery.json").write_text('{"adapters": 7}'),
        C,
        "record",
    ),
    Attack(
        "record: nested 100,000 deep",
        "overflow the stack",
        lambda b: (b.source / "oftsurgery.json").write_text('{"earlier":[' * 100_000),
        C,
        "no JSON",
    ),
    Attack(
        "unfinished work: names that leave the folder",
        "delete a file of the user's",
        lambda b: unfinished(b, {"shards": {"../outside/secret.safetensors": {"sha256": "0", "facts": {}}}}),
        e.OFTSurgeryError,
        "unfinished work",
        None,
    ),
    Attack("unfinished work: a link", "empty a folder of the user's", planted_link, e.OFTSurgeryError, "link", None),
    Attack(
        "unfinished work: wrong types",
        "a type error",
        lambda b: unfinished(b, {"shards": {"model.safetensors": 7}}),
        e.StateError,
        "unfinished work",
        None,
    ),
    Attack(
        "unfinished work: shards are a list",
        "a type error",
        lambda b: unfinished(b, {"shards": ["x"]}),
        e.StateError,
        "unfinished work",
        None,
    ),
    # --- adapters ---
    Attack("adapter: a pickle", "run code", pickled_adapter, A, "is a pickle", "adapter"),
    Attack(
        "adapter: pipe as the config",
        "wait for ever",
        lambda b: fifo(b.adapter / "adapter_config.json"),
        A,
        "no adapter_config",
        "adapter",
    ),
    Attack(
        "adapter: pipe as the tensors",
        "wait for ever",
        lambda b: fifo(b.adapter / "adapter_model.safetensors"),
        A,
        "has no adapter_model",
        "adapter",
    ),
    Attack(
        "adapter: config nested 100,000 deep",
        "overflow the stack",
        lambda b: (b.adapter / "adapter_config.json").write_text('{"a":' * 100_000),
        A,
        "no JSON",
        "adapter",
    ),
    Attack(
        "adapter: config of 5 MB",
        "memory",
        lambda b: b.adapter_config(x="y" * (5 << 20)),
        A,
        "more than the limit of",
        "adapter",
    ),
    Attack(
        "adapter: a pattern of modules that backtracks for ever",
        "compute for ever",
        lambda b: b.adapter_config(target_modules=EVER),
        A,
        "takes too long",
        "adapter",
    ),
    Attack(
        "adapter: a pattern of modules of a megabyte",
        "the same",
        lambda b: b.adapter_config(target_modules="(?:a|b)" * 150_000),
        A,
        "takes too long",
        "adapter",
    ),
    Attack(
        "adapter: a pattern of modules that is none",
        "an error of the library's own",
        lambda b: b.adapter_config(target_modules=["q_proj", "down_proj"], exclude_modules="(" * 5000),
        A,
        "is no regular expression",
        "adapter",
    ),
    Attack(
        "adapter: target_modules is an object",
        "a type error",
        lambda b: b.adapter_config(target_modules={"q_proj": 1}),
        A,
        "target_modules",
        "adapter",
    ),
    Attack(
        "adapter: layers_to_transform is a text",
        "a type error",
        lambda b: b.adapter_config(layers_to_transform="all"),
        A,
        "layers_to_transform",
        "adapter",
    ),
    Attack(
        "adapter: two keys of one rotation",
        "change one and show the other",
        lambda b: b.adapter_tensors(lambda t: t.update({f"module.{sorted(t)[0]}": t[sorted(t)[0]] + 1})),
        e.MatchError,
        "two keys name one rotation",
        "adapter",
    ),
    Attack(
        "adapter: 10⁹ Neumann terms",
        "compute for ever",
        lambda b: b.adapter_config(num_cayley_neumann_terms=10**9),
        A,
        "at most 1000",
        "adapter",
    ),
    Attack(
        "adapter: eps is NaN",
        "a clamp that clamps nothing",
        lambda b: b.adapter_config(coft=True, eps=math.nan),
        A,
        "a finite number from 0 on",
        "adapter",
    ),
    Attack(
        "adapter: eps is infinite",
        "the same",
        lambda b: b.adapter_config(coft=True, eps=math.inf),
        A,
        "a finite number from 0 on",
        "adapter",
    ),
    Attack(
        "adapter: a boolean for a number",
        "a type error",
        lambda b: b.adapter_config(oft_block_size=True),
        A,
        "must be of type int",
        "adapter",
    ),
    Attack(
        "adapter: peft_version is a list",
        "a type error",
        lambda b: b.adapter_config(peft_version=["0.21.2"]),
        A,
        "peft_version",
        "adapter",
    ),
    Attack(
        "adapter: another tuner's",
        "fold what is no rotation",
        lambda b: b.adapter_config(peft_type=f"{RED}LORA"),
        e.DialectError,
        "LORA",
        "adapter",
    ),
    Attack(
        "adapter: module names that are paths",
        "write elsewhere",
        lambda b: b.adapter_tensors(other_key(lambda k: "base_model.model.../../outside/secret.oft_R.weight")),
        e.MatchError,
        "match nothing",
        "adapter",
    ),
    Attack(
        "adapter: escape sequences in names",
        "the reader's terminal",
        lambda b: b.adapter_tensors(other_key(lambda k: f"base_model.model.{RED}.oft_R.weight")),
        e.MatchError,
        "match nothing",
        "adapter",
    ),
    Attack(
        "adapter: no rows",
        "divide by zero",
        lambda b: b.adapter_tensors(replace_first(lambda t: t[:0].clone())),
        A,
        "has no elements",
        "adapter",
    ),
    Attack(
        "adapter: no triangle",
        "a fractional block",
        lambda b: b.adapter_tensors(replace_first(lambda t: t[:, :-1].clone())),
        e.ShapeError,
        "triangle",
        "adapter",
    ),
    Attack(
        "adapter: one block of 2048",
        "cubic time",
        lambda b: b.adapter_tensors(replace_first(lambda t: torch.zeros(1, 2096128))),
        e.ShapeError,
        "do not cover",
        "adapter",
    ),
    Attack(
        "adapter: integers",
        "arithmetic that wraps",
        lambda b: b.adapter_tensors(replace_first(lambda t: t.to(torch.int32))),
        A,
        "must be float32",
        "adapter",
    ),
    Attack(
        "adapter: NaN",
        "a weight of NaN",
        lambda b: b.adapter_tensors(replace_first(lambda t: torch.full_like(t, math.nan))),
        e.NonFiniteError,
        "NaN",
        "adapter",
    ),
    Attack(
        "adapter: 1e30",
        "overflow in the rotation",
        lambda b: b.adapter_tensors(replace_first(lambda t: torch.full_like(t, 1e30))),
        e.NonFiniteError,
        "not finite|NaN",
        None,
    ),
    # --- destinations ---
    Attack(
        "destination: the source",
        "destroy the source",
        lambda b: setattr(b, "destination", b.source),
        e.StateError,
        "exists|source",
        None,
    ),
    Attack(
        "destination: the source, forced",
        "the same",
        lambda b: (setattr(b, "destination", b.source), b.options.update(force=True)),
        e.StateError,
        "source",
        None,
    ),
    Attack(
        "destination: around the source, forced",
        "destroy all beside it",
        around_the_source,
        e.StateError,
        "the destination .* the source",
        None,
    ),
    Attack(
        "destination: inside the source",
        "change the source",
        lambda b: setattr(b, "destination", b.source / "out"),
        e.StateError,
        "the destination .* the source",
        None,
    ),
    Attack(
        "destination: the adapter, forced",
        "destroy the adapter",
        lambda b: (setattr(b, "destination", b.adapter), b.options.update(force=True)),
        e.StateError,
        "adapter",
        None,
    ),
    Attack(
        "destination: a link",
        "write elsewhere",
        lambda b: b.link(b.destination, b.outside),
        e.StateError,
        "exists",
        None,
    ),
    Attack(
        "destination: a dangling link",
        "the same",
        lambda b: b.link(b.destination, b.outside / "new"),
        e.StateError,
        "exists",
        None,
    ),
]


def test_there_are_forty_kinds() -> None:
    assert len({a.name for a in ATTACKS}) == len(ATTACKS) >= 40
    assert all(a.why for a in ATTACKS)


# --- what must hold of all --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    model = build("llama")
    model.save_pretrained(root / "plain")
    for name, seed in (("first", 1), ("adapter", 2)):
        adapted(build("llama"), ["q_proj", "down_proj"], seed=seed).save_pretrained(root / name)
    quiet_fold(root / "plain", root / "first", root / "source", format="nf4", double_quant=True, max_shard_size="40KB")
    (root / "source" / "oftsurgery.json").unlink()
    (root / "source" / "tokenizer.json").write_text("{}")
    outside = root / "outside"
    outside.mkdir()
    save_file({"secret": torch.ones(4)}, outside / "secret.safetensors")
    (outside / "secret.json").write_text('{"weight_map": {"secret": "secret.safetensors"}}')
    return root


@pytest.fixture
def bench(sound: Path, tmp_path: Path) -> Bench:
    for name in ("source", "adapter", "outside"):
        shutil.copytree(sound / name, tmp_path / name)
    return Bench(tmp_path)


def everything(root: Path) -> dict[str, Any]:
    """What lies under ``root``: kinds, contents, targets of links."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        what: Any = str(path.readlink()) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(root))] = (stat.S_IFMT(mode), what)
    return found


class Late(BaseException):
    """No Exception: nothing that is attacked may catch it and go on."""


@contextmanager
def bounded() -> Iterator[None]:
    """A few seconds, and no gigabytes."""

    def late(*_: object) -> None:
        raise Late(f"not refused within {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB"


def clean(text: str) -> None:
    """Nothing in ``text`` that a terminal would act on."""
    assert all(ch.isprintable() or ch == "\n" for ch in text), ascii(text)
    assert "Traceback" not in text


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_attack(attack: Attack, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    attack.make(bench)
    before = everything(bench.root)
    flags = [f"--{name}" for name in bench.options]

    with bounded(), pytest.raises(attack.error, match=attack.text) as caught:
        quiet_fold(bench.source, bench.adapter, bench.destination, **bench.options)
    clean(str(caught.value))
    assert len(str(caught.value)) < 3000
    assert everything(bench.root) == before

    with bounded():
        code = cli.main(["fold", str(bench.source), str(bench.adapter), str(bench.destination), *flags])
    out, err = capsys.readouterr()
    clean(out + err)
    assert code == ExitCode.REFUSED
    assert re.search(rf"^oftsurgery: {type(caught.value).__name__}: ", err)
    assert everything(bench.root) == before

    if attack.examine is not None:
        shown = bench.source if attack.examine == "source" else bench.adapter
        with bounded():
            findings = doctor(shown, base=None if attack.examine == "source" else bench.source)
        clean("\n".join(map(str, findings)))
        assert any(f.severity == "error" for f in findings), findings
        more = [] if attack.examine == "source" else ["--base", str(bench.source)]
        assert cli.main(["doctor", str(shown), *more]) == ExitCode.CHECK_FAILED
        clean("".join(capsys.readouterr()))
        assert everything(bench.root) == before


def test_the_sound_one_is_folded(bench: Bench) -> None:
    """The bench itself is refused for nothing."""
    assert doctor(bench.source) == doctor(bench.adapter, base=bench.source) == []
    with bounded():
        quiet_fold(bench.source, bench.adapter, bench.destination)
    assert (bench.destination / "model.safetensors").exists()


def test_a_link_in_place_of_the_lock_is_not_followed(bench: Bench) -> None:
    """The system opens a lock file for writing."""
    lock = bench.root / f".{bench.destination.name}.oftsurgery.lock"
    lock.symlink_to(bench.outside / "secret.json")
    before = everything(bench.outside)
    with pytest.raises(e.DiskError), bounded():
        quiet_fold(bench.source, bench.adapter, bench.destination)
    assert everything(bench.outside) == before
    assert not bench.destination.exists()


# --- what is carried along and never run ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config", "adapter"])
@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_beside_the_weights_is_never_imported(bench: Bench, where: str, model_type: str) -> None:
    code = f"from pathlib import Path\nPath({str(bench.ran)!r}).touch()\n"
    target = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    for name in ("configuration_evil.py", "modeling_evil.py", "setup.py", "sitecustomize.py", "conftest.py"):
        ((bench.source if where == "config" else bench.adapter) / name).write_text(code)
    if where == "config":
        bench.config(auto_map=target, trust_remote_code=True, model_type=model_type, architectures=["Evil"])
    else:
        bench.adapter_config(
            auto_mapping={"base_model_class": "Evil", "parent_library": "modeling_evil"},
            auto_map=target,
            trust_remote_code=True,
        )
    quiet_fold(bench.source, bench.adapter, bench.destination)
    doctor(bench.source)
    doctor(bench.adapter, base=bench.source)
    assert not bench.ran.exists()
    # what `auto_map` of the base names goes along as data
    named = ["configuration_evil.py", "modeling_evil.py"] if where == "config" else []
    assert sorted(p.name for p in bench.destination.iterdir() if p.suffix == ".py") == named


@pytest.mark.parametrize(
    "name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"]
)
def test_kernels_that_a_config_names_are_not_fetched(bench: Bench, name: str) -> None:
    """transformers would load such code from the Hub."""
    bench.config(**{name: "evil/kernel"})
    quiet_fold(bench.source, bench.adapter, bench.destination)
    assert (bench.destination / CONFIG).exists()


def test_the_command_itself_prints_no_traceback(bench: Bench) -> None:
    bench.index(lambda m: m.update({RED: bench.shard.name}))
    for command in (
        ["fold", str(bench.source), str(bench.adapter), str(bench.destination)],
        ["plan", str(bench.source), str(bench.adapter)],
    ):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "oftsurgery", *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == ExitCode.REFUSED
        clean(done.stdout + done.stderr)
        assert "CheckpointError" in done.stderr
        assert time.monotonic() - started < 60


def test_names_of_modules_are_escaped_in_a_plan_too(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint and an adapter that agree on a hostile name: the fold is right, and the terminal is spared."""
    folder, adapter = bench.root / "named", bench.root / "named-adapter"
    folder.mkdir()
    adapter.mkdir()
    save_file({f"{RED}.weight": torch.randn(32, 32)}, folder / "model.safetensors")
    save_file(
        {f"base_model.model.{RED}.oft_R.weight": torch.randn(2, 120) * 0.1}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "use_cayley_neumann": False}))
    out = bench.root / "out"
    for command in (
        ["plan", str(folder), str(adapter), "--trained-on", "plain"],
        ["fold", str(folder), str(adapter), str(out), "-v", "--trained-on", "plain"],
        ["show", str(out)],
        ["verify", str(out), str(folder), str(adapter)],
    ):
        assert cli.main(command) == ExitCode.OK
        text = "".join(capsys.readouterr())
        assert "\x1b[31m" not in text, command
        assert "\u202e" not in text, command
        assert "\\x1b[31m" in text, command
    assert [f.code for f in doctor(out, base=folder, adapter=adapter)] == ["kept"]
