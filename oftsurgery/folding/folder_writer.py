""":func:`write_shard` and :func:`write_other_files` write a model's folder: the weights one tensor at a time, the index, the
config, the card and the record. Folds, exports and ONNX graphs are all written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftsurgery.errors import LeftOutWarning, module_in_errors, printable, warn_caller
from oftsurgery.files.carried import Carried
from oftsurgery.files.layout import LAYOUTS, Layout
from oftsurgery.files.reading import read_header
from oftsurgery.files.shard_writer import ShardWriter
from oftsurgery.files.staging import Staging
from oftsurgery.records import card
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import write_record

#: ``{tensor name: (dtype, shape)}``; the shape is None where it is known only once the tensor is made (small JSON blobs)
Outputs = Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]]


@dataclass(frozen=True, eq=False)
class Item:
    """One unit of writing: a weight, or tensors that belong together.

    Attributes:
        name: the name in messages.
        outputs: the tensors that the item gives.
        nbytes: the bytes that are read for the item.
        load: function that reads, in a thread that runs ahead.
        make: function from the result of ``load`` to the outputs, as tensors or as pieces of their bytes.
    """

    name: str
    outputs: Outputs
    nbytes: int
    load: Callable[[], Any]
    make: Callable[[Any], Mapping[str, Tensor | Iterable[bytes]]]


@dataclass(frozen=True, eq=False)
class Shard:
    """One file and the numbers of its items, in order."""

    file: str
    items: tuple[int, ...]


def nbytes_of(outputs: Outputs) -> int:
    """The bytes of the outputs; a small blob counts as 256 bytes."""
    return sum(d.itemsize * math.prod(s) if s is not None else 256 for d, s in outputs.values())


def into_shards(items: Sequence[Outputs], limit: int, layout: Layout = LAYOUTS[0]) -> tuple[Shard, ...]:
    """Files of at most ``limit`` bytes (an item is never split), with the file names of the Hub's tools."""
    from huggingface_hub import split_state_dict_into_shards_factory

    numbered: dict[str, Any] = {str(i): outputs for i, outputs in enumerate(items)}
    found = split_state_dict_into_shards_factory(
        numbered, get_storage_size=nbytes_of, filename_pattern=layout.shards, max_shard_size=limit
    )
    return tuple(Shard(file, tuple(map(int, names))) for file, names in found.filename_to_tensors.items())


def write_shard(
    staging: Staging,
    file: str,
    items: Sequence[Item],
    metadata: Mapping[str, str],
    step: Callable[[Item], None] = lambda _: None,
) -> None:
    """Write one file; ``step`` is called after each item."""
    outputs = {name: output for item in items for name, output in item.outputs.items()}
    with staging.writing(file) as path, ShardWriter(path, outputs, metadata) as writer:
        write_items(writer, items, step)


def write_items(writer: ShardWriter, items: Sequence[Item], step: Callable[[Item], None] = lambda _: None) -> None:
    """Write the outputs of ``items``. Reading, computing and writing overlap; each holds one item at a time."""
    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:

        def put(item: Item, made: Mapping[str, Tensor | Iterable[bytes]]) -> None:
            for name, tensor in made.items():
                writer.write(name, tensor)
            step(item)

        ahead: Future[Any] | None = None
        behind: Future[None] | None = None
        for i, item in enumerate(items):
            loaded = (ahead or readers.submit(item.load)).result()
            ahead = readers.submit(items[i + 1].load) if i + 1 < len(items) else None
            with module_in_errors(item.name):
                made = item.make(loaded)
            del loaded
            if behind is not None:
                behind.result()
            behind = writers.submit(put, item, made)
            del made
        if behind is not None:
            behind.result()


def write_other_files(
    staging: Staging,
    files: Sequence[str],
    record: FoldRecord | None,
    *,
    source: Path | None,
    jsons: Mapping[str, Mapping[str, Any]],
    carried: Carried,
    exact: bool,
    before: int | None = None,
    layout: Layout = LAYOUTS[0],
) -> FoldRecord | None:
    """Write the files beside the weights; return the record with the hashes of all files.

    Args:
        files: the files of weights that were written.
        source: the model's folder, for the card.
        jsons: ``{file name: contents}``, with ``config.json`` where the model has a config.
        carried: the files that are copied.
        exact: whether the weights have the source's formats.
        before: bytes of the source's tensors, for the record; None keeps the record's sizes.
        layout: how the files of weights are called.
    """
    warn_of_lost(carried.lost)
    held = {file: read_header(staging.folder / file)[0] for file in files}
    total = sum(e.nbytes for entries in held.values() for e in entries)
    if len(files) > 1:
        weight_map = {e.name: file for file, entries in held.items() for e in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        staging.put_json(layout.index, index)
    for name, path in carried.files.items():
        staging.copy(path, name)
    for name, value in jsons.items():
        if value:
            staging.put_json(name, value)
    if record is not None:
        record = replace(
            record,
            tokenizer=carried.tokenizer or record.tokenizer,
            chat_template=carried.chat_template or record.chat_template,
            code=carried.code,
            left_out=carried.left_out,
        )
    text = card.written_card(source, record, jsons.get("config.json", {}), staging.names(), exact=exact)
    if text is not None:
        staging.put_text(card.CARD, text)
    if record is not None:
        sizes = record.sizes if before is None else {"before": before, "after": total}
        record = write_record(staging, replace(record, sizes=sizes))
    return record


def warn_of_lost(lost: Mapping[str, str]) -> None:
    """One :class:`LeftOutWarning` that names files of the whole model that the output lacks, if there are any."""
    if lost:
        named = "; ".join(f"{printable(name)} ({why})" for name, why in list(lost.items())[:3])
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        warn_caller(
            f"the output lacks {len(lost)} files that loading the whole model reads: {named}{more}. Save the source again with "
            "safe_serialization=True, or copy the files if you trust them",
            LeftOutWarning,
        )
