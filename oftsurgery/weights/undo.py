"""An undo record gives a folded weight its original bytes back, in far fewer bits than the weight.

The folded weight, rotated back, lies within its own rounding error of the original. So the original codes are *predicted*:
rotate back, requantise against the original statistics. The record holds those statistics and the prediction's errors,
and because most predictions are right, both compress well. Nothing of this is an estimate: a record is decoded and
compared by content hash when it is written, and compared again when it is used.

Pure: tensors in, facts (JSON-able) and bytes out, and back. ``docs/undo.md`` describes the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from oftsurgery.adapters.rotation import Rotation
from oftsurgery.dtypes import NAMED, name_of
from oftsurgery.errors import FormatError, IntegrityError, NonFiniteError
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.hashing import hash_bytes, hash_tensors

from . import preserve
from .undo_prediction import MANTISSA, RELAXATION_BITS, code_floats, code_tensors, flat_parts
from .undo_rotations import power_of_two, read_stages, write_stages
from .undo_streams import Streams, bytes_of, damaged

_REPORT = "unfold with base=…, and report this with both models' formats"


@dataclass(frozen=True, eq=False)
class UndoEntry:
    """What undoes the change of one weight or tensor.

    Attributes:
        facts: JSON-able: how ``data`` is to be read, and the hashes that prove it.
        data: the compressed streams.
        tables: ``{content hash: bytes}`` of small tensors that many weights share (the codecs' tables of levels), which
            a file holds once.
    """

    facts: Mapping[str, Any]
    data: bytes
    tables: Mapping[str, bytes]


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Whatever default device and grad mode the caller is in."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        yield


def changed(message: str, **where: Any) -> IntegrityError:
    """What is raised where the model is not what the fold left."""
    remedy = "take out later folds first, the last one first; or unfold with base=…"
    return IntegrityError(message, **where, remedy=remedy)


def evidence(folded: EncodedWeight) -> str:
    """Content hash of what the prediction is made from; the same before and after bitsandbytes repacks a 4-bit weight
    at a CPU forward.
    """
    return hash_tensors(folded.format.kind.prediction_inputs(folded.cpu()))


@_on_the_cpu()
def encode_weight(
    before: EncodedWeight,
    after: EncodedWeight,
    chain: Sequence[Rotation],
    *,
    noise: float,
    relaxation: float | None = None,
) -> UndoEntry:
    """What gives ``before`` back from ``after``, proved: it is decoded once and compared.

    Args:
        before: the stored weight that was folded.
        after: what the fold stored instead, of the same shape.
        chain: the rotations that were folded, in the live order.
        noise: the relative error that storing ``after`` cost; it decides how finely the rotation is recorded.
        relaxation: the factor by which the fold over-relaxed what it changed, where it kept the scales of ``before``;
            None where it rounded otherwise.

    Raises:
        IntegrityError: the entry does not give ``before`` back.
    """
    before, after, f = before.cpu(), after.cpu(), before.format
    tables = {k: bytes_of(before.tensors[k]) for k in f.kind.shared_tensors if k in before.tensors}
    facts: dict[str, Any] = {
        "format": asdict(f) | {"shape": list(f.shape), "dtype": name_of(f.dtype), "storage": name_of(f.storage)},
        "before": before.fingerprint,
        "after": evidence(after),
        "tensors": {k: described(t) for k, t in before.tensors.items()},
    }
    for k, content in tables.items():
        facts["tensors"][k]["table"] = hash_bytes(content)
    io = Streams()
    stored = [bytes_of(t) for k, t in before.tensors.items() if k not in tables]
    if _predictable(before, after):
        if relaxation is not None and preserve.applies(f, after.format):
            facts["relaxation"] = round(relaxation * power_of_two(RELAXATION_BITS))
        try:
            facts["stages"], stages = write_stages(io, chain, f.shape, max(noise, 2.0**-24))
            code_tensors(io, facts, f, after, stages, before.tensors, before.tensors)
        except NonFiniteError:  # a rotation without an inverse
            io = Streams()
    if not io.data or len(io.data) >= sum(map(len, stored)):
        facts.pop("stages", None)
        facts.pop("relaxation", None)
        io = Streams()
        for raw in stored:
            io.raw(raw, len(raw))
    entry = UndoEntry(facts, bytes(io.data), {hash_bytes(t): t for t in tables.values()})
    decode_weight(entry, after)
    return entry


@_on_the_cpu()
def decode_weight(entry: UndoEntry, after: EncodedWeight) -> EncodedWeight:
    """The weight that was folded, from what the fold stored instead; on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not what the fold stored, or the result not what was folded.
    """
    facts, after = entry.facts, after.cpu()
    if evidence(after) != facts.get("after"):
        raise changed(
            "the weight is not the one that this record's fold left: another fold or another change lies on top, or it is of another model",
            format=after.format.label,
        )
    f = read_format(facts.get("format"), after.format.shape)
    limit = 8 * math.prod(f.shape) + 4096
    if not isinstance(facts.get("tensors"), dict):
        raise damaged()
    told = {name: _checked(t, limit=limit) for name, t in facts["tensors"].items()}
    own = {name: t for name, t in told.items() if "table" not in t}
    try:
        tables = {name: tensor_of(entry.tables[t["table"]], t) for name, t in told.items() if name not in own}
    except (KeyError, TypeError) as error:
        raise damaged() from error
    io = Streams(entry.data)
    if "stages" in facts:
        found = code_tensors(io, facts, f, after, read_stages(io, facts["stages"], f.shape), tables, None)
    else:
        found = {name: io.raw(None, _nbytes(t)) for name, t in own.items()}
    io.end()
    if found.keys() != own.keys():
        raise damaged()
    tensors = tables | {name: tensor_of(raw, own[name]) for name, raw in found.items()}
    before = EncodedWeight(f, {name: tensors[name] for name in told})
    if before.fingerprint != facts.get("before"):
        raise IntegrityError("the restored weight is not the one that was folded", format=f.label, remedy=_REPORT)
    return before


def _predictable(before: EncodedWeight, after: EncodedWeight) -> bool:
    """Whether the weight is stored in the way that the prediction knows; what else there may be is stored as it is."""
    f, t = before.format, before.tensors
    if len(f.shape) != 2 or f.shape != after.format.shape or min(f.shape) < 1:
        return False
    # bytes of codes, and of tables that many weights share, may be of any dtype
    wanted = {name: dtype for name, (dtype, _) in f.kind.layout(f).items() if name not in ("", "weight", "quant_map")}
    found = {name: tensor.dtype for name, tensor in t.items() if name not in ("weight", "quant_map")}
    return found == wanted and (f.quantised or f.dtype in MANTISSA)


@_on_the_cpu()
def encode_tensor(before: Tensor, after: Tensor) -> UndoEntry:
    """What gives the plain tensor ``before`` back from ``after``, which stands in its place (a trained bias or head),
    proved.
    """
    before, after = before.detach().cpu(), after.detach().cpu()
    facts: dict[str, Any] = {"before": _hash_one(before), "after": _hash_one(after), "tensor": described(before)}
    io = Streams()
    if before.dtype in MANTISSA and (before.dtype, before.shape) == (after.dtype, after.shape):
        code_floats(io, before.dtype, flat_parts(after), before)
    if 0 < len(io.data) < before.nbytes:
        facts["predicted"] = True
    else:
        io = Streams()
        io.raw(bytes_of(before), before.nbytes)
    entry = UndoEntry(facts, bytes(io.data), {})
    decode_tensor(entry, after)
    return entry


@_on_the_cpu()
def decode_tensor(entry: UndoEntry, after: Tensor) -> Tensor:
    """Mirror of :func:`encode_tensor`, on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not what stood in the tensor's place, or the result not what it was.
    """
    facts, after = entry.facts, after.detach().cpu()
    if _hash_one(after) != facts.get("after"):
        raise changed("the tensor is not the one that this record's fold left", shape=tuple(after.shape))
    about = _checked(facts.get("tensor"), limit=16 * after.numel() + 1024)
    io = Streams(entry.data)
    if facts.get("predicted"):
        if about != described(after) or after.dtype not in MANTISSA:
            raise damaged()
        raw = code_floats(io, after.dtype, flat_parts(after), None)
    else:
        raw = io.raw(None, _nbytes(about))
    io.end()
    before = tensor_of(raw, about)
    if _hash_one(before) != facts.get("before"):
        raise IntegrityError("the restored tensor is not the one that was replaced", remedy=_REPORT)
    return before


def _hash_one(tensor: Tensor) -> str:
    return hash_tensors({"": tensor})


# --- facts ------------------------------------------------------------------------------------------------------------


def described(t: Tensor) -> dict[str, Any]:
    """A tensor's dtype and shape as JSON."""
    return {"dtype": name_of(t.dtype), "shape": list(t.shape)}


def tensor_of(raw: bytes, about: Mapping[str, Any]) -> Tensor:
    """Mirror of :func:`bytes_of` and :func:`described`."""
    if len(raw) != _nbytes(about):
        raise damaged()
    dtype, shape = NAMED[about["dtype"]], about["shape"]
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def _nbytes(about: Mapping[str, Any]) -> int:
    return NAMED[about["dtype"]].itemsize * int(math.prod(about["shape"]))


def _checked(about: Any, *, limit: int) -> dict[str, Any]:
    """What a file says of a tensor, if that is possible and of at most ``limit`` bytes."""
    try:
        good = isinstance(about["shape"], list) and all(type(n) is int and n >= 0 for n in about["shape"])
        if not good or _nbytes(about) > limit:
            raise damaged()
    except (KeyError, TypeError) as error:
        raise damaged() from error
    return about  # type: ignore[no-any-return]


def read_format(facts: Any, shape: tuple[int, ...]) -> WeightFormat:
    """A format that a file names, for a weight of ``shape``."""
    try:
        sizes = facts["blocksize"], facts["nested_blocksize"]
        f = WeightFormat(facts["codec"], shape, NAMED[facts["dtype"]], *sizes, NAMED[facts["storage"]])
        least = f.kind.least_blocksize
    except (FormatError, KeyError, TypeError) as error:
        raise damaged() from error
    good = len(facts) == len(fields(f)) and facts["shape"] == list(shape)
    good = good and all(type(n) is int and 0 <= n <= 1 << 16 for n in sizes)
    if not good or f.blocksize < least or (f.nested_blocksize and not least):
        raise damaged()
    return f
