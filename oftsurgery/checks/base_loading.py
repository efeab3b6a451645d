""":class:`Loading` says how a base was loaded before its rotation, without the fold's code."""

from __future__ import annotations

import json

import torch

from oftsurgery.dtypes import DTYPES, FLOATS
from oftsurgery.errors import CheckpointError
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import RECORD


class Loading:
    """How a plain base was loaded before its rotation, from the record, or else from the folded checkpoint's formats.

    Attributes:
        dtype: the dtype in which the base was loaded.
        cast: whether the base was cast to this dtype; a fold on disk casts only where it quantises.
        cast_rotated: whether rotated weights were cast too; a fold on disk rotates the original weights as they are stored.
        codec: the quantisation of the base; ``"stored"`` for the format of each stored weight; None for no quantisation.
        format: the format of a plain base's weights that were quantised first and are stored in another format now; None where
            no format is recorded.
        skip: ``llm_int8_skip_modules``.
        original: whether rotated weights were not quantised first.
    """

    def __init__(self, record: FoldRecord | None, folded: Checkpoint, base: Checkpoint) -> None:
        # a fold of a model in memory that changes no format says nothing of how the model was loaded
        said = record.base if record is not None and "fold_into" in record.base else {}
        stored = next((DTYPES[e.dtype] for e in base.entries.values() if DTYPES[e.dtype] in FLOATS), torch.float32)
        in_memory = _dtype_named(said.get("loaded"))
        self.dtype = in_memory or _dtype_named(said.get("dtype")) or dtype_in_config(base if said else folded) or stored
        dense = not _is_quantised(folded)
        self.codec = said.get("quantize") if said else None if dense or _is_quantised(base) else "stored"
        self.cast_rotated = in_memory is not None or said.get("fold_into") != "original"
        self.cast = self.codec is not None or in_memory is not None or (record is not None and not said)
        blocks = (0, 0) if self.codec == "int8" else (64, 256 if said.get("double_quant") == "true" else 0)
        self.format = WeightFormat(self.codec, (), self.dtype, *blocks) if self.codec not in (None, "stored") else None
        self.original = said.get("fold_into") == "original"
        try:
            self.skip = json.loads(said.get("skip_modules") or "null")
        except ValueError as error:
            message, remedy = (
                "the record's `skip_modules` is not valid JSON",
                f"restore the {RECORD} that the fold wrote",
            )
            raise CheckpointError(message, path=folded.folder, remedy=remedy) from error


def _is_quantised(checkpoint: Checkpoint) -> bool:
    return any(".quant_state.bitsandbytes__" in n or n.endswith(".SCB") for n in checkpoint.entries)


def dtype_in_config(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype that a config names; for diffusers, whose configs name none, the dtype of the most bytes of plain floats."""
    if "_class_name" in checkpoint.config:
        held: dict[torch.dtype, int] = {}
        for name, entry in checkpoint.entries.items():
            if DTYPES[entry.dtype] in FLOATS and name.rpartition(".")[2] in ("weight", "bias"):
                held[DTYPES[entry.dtype]] = held.get(DTYPES[entry.dtype], 0) + entry.nbytes
        return max(held, key=lambda dtype: held[dtype], default=None)
    return _dtype_named(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype")))


def _dtype_named(name: object) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None
