"""An undo record gives a folded weight its original bytes back, and is far smaller than the weight.

The folded weight, rotated back, lies within its own rounding error of the original. So the original codes are *predicted*:
the weight is rotated back and requantised against the original statistics. The record holds these statistics and the
prediction's errors, and because most predictions are right, both compress well. The result is exact: a record is decoded
and compared by content hash when it is written, and compared again when it is used.

The functions are pure: they turn tensors into facts (for JSON) and bytes, and back. ``docs/undo.md`` describes the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.dtype_names import name_of
from oftsurgery.dtypes import NAMED
from oftsurgery.errors import FormatError, IntegrityError, NonFiniteError, UndoError, printable
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.packages.package_format import PackageFormat
from oftsurgery.hashing import hash_bytes, hash_tensors

from . import preserve
from .undo_prediction import MANTISSA, RELAXATION_BITS, code_floats, code_tensors, flat_parts
from .undo_rotations import power_of_two, read_stages, write_stages
from .undo_streams import Streams, bytes_of, damaged

#: the dtypes of a record's tensors by name
_DTYPES = {name_of(dtype): dtype for dtype in (*NAMED.values(), torch.float8_e4m3fn)}
_REPORT = "unfold with base=…, and report this error with both models' formats"


@dataclass(frozen=True, eq=False)
class UndoEntry:
    """The data that undo the change of one weight or tensor.

    Attributes:
        facts: values for JSON: how to read ``data``, and the hashes that prove the result.
        data: the compressed streams.
        tables: ``{content hash: bytes}`` of small tensors that many weights share (the codecs' tables of levels), which
            a file holds once.
    """

    facts: Mapping[str, Any]
    data: bytes
    tables: Mapping[str, bytes]


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Run the body on the CPU and without gradients, whatever the caller's default device and grad mode are."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        yield


def changed(message: str, **where: Any) -> IntegrityError:
    """The error for a model that has changed since the fold."""
    remedy = "take out later folds first, beginning with the last; or unfold with base=…"
    return IntegrityError(message, **where, remedy=remedy)


def evidence(folded: EncodedWeight) -> str:
    """Content hash of the prediction's inputs, which stays the same when a CPU forward of bitsandbytes repacks a 4-bit
    weight.
    """
    return hash_tensors(folded.format.kind.prediction_inputs(folded.cpu()))


@_on_the_cpu()
def encode_weight(
    before: EncodedWeight,
    after: EncodedWeight,
    chain: Sequence[WeightMap],
    *,
    noise: float,
    relaxation: float | None = None,
) -> UndoEntry:
    """The entry that gives ``before`` back from ``after``. As a proof, the entry is decoded once and compared.

    Args:
        before: the stored weight that was folded.
        after: the weight that the fold stored instead, of the same shape.
        chain: the rotations that were folded, in the live order.
        noise: the relative error of storing ``after``; this decides how finely the rotation is recorded.
        relaxation: the factor by which the fold over-relaxed the change, if the fold kept the scales of ``before``; None
            for another rounding.

    Raises:
        IntegrityError: the entry does not give ``before`` back.
    """
    before, after, f = before.cpu(), after.cpu(), before.format
    tables = {k: bytes_of(before.tensors[k]) for k in f.kind.shared_tensors if k in before.tensors}
    facts: dict[str, Any] = {
        "format": _facts_of_format(f),
        "before": before.fingerprint,
        "after": evidence(after),
        "tensors": {k: described(t) for k, t in before.tensors.items()},
    }
    for k, content in tables.items():
        facts["tensors"][k]["table"] = hash_bytes(content)
    io = Streams()
    stored = [bytes_of(t) for k, t in before.tensors.items() if k not in tables]
    if isinstance(f, PackageFormat):
        facts["bytes"] = evidence(before)
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
    """The weight that was folded, from the weight that the fold stored instead; on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not the weight that the fold stored, or the result is not the weight that was folded.
    """
    facts, after = entry.facts, after.cpu()
    form = facts.get("format")
    if isinstance(form, dict) and "label" in form and not isinstance(after.format, PackageFormat):
        raise UndoError(
            f"the record restores a weight in the layout of {printable(form.get('codec'))}, in which the model does not hold the weight",
            format=after.format.label,
            remedy="unfold the checkpoint on disk, as it was written: oftsurgery.unfold_checkpoint",
        )
    if evidence(after) != facts.get("after"):
        raise changed(
            "the weight is not the one that this record's fold left: another fold or another change lies on top, or the model is another",
            format=after.format.label,
        )
    f = read_format(facts.get("format"), after.format)
    limit = 8 * math.prod(f.shape) + 4096
    if not isinstance(facts.get("tensors"), dict):
        raise damaged(why="`tensors` is no object")
    told = {name: _checked(t, limit=limit) for name, t in facts["tensors"].items()}
    own = {name: t for name, t in told.items() if "table" not in t}
    try:
        tables = {name: tensor_of(entry.tables[t["table"]], t) for name, t in told.items() if name not in own}
    except (KeyError, TypeError) as error:
        raise damaged(why="a table of levels is missing") from error
    io = Streams(entry.data)
    if "stages" in facts:
        found = code_tensors(io, facts, f, after, read_stages(io, facts["stages"], f.shape), tables, None)
    else:
        found = {name: io.raw(None, _nbytes(t)) for name, t in own.items()}
    io.end()
    if found.keys() != own.keys():
        raise damaged(why=f"it holds the tensors {', '.join(found)}, but describes {printable(', '.join(own))}")
    tensors = tables | {name: tensor_of(raw, own[name]) for name, raw in found.items()}
    before = EncodedWeight(f, {name: tensors[name] for name in told})
    if before.fingerprint != facts.get("before") or (
        isinstance(f, PackageFormat) and evidence(before) != facts.get("bytes")
    ):
        raise IntegrityError("the restored weight is not the one that was folded", format=f.label, remedy=_REPORT)
    return before


def _predictable(before: EncodedWeight, after: EncodedWeight) -> bool:
    """Whether the prediction knows the weight's storage; a weight in another storage is recorded without prediction."""
    f, t = before.format, before.tensors
    if isinstance(f, PackageFormat):
        return f.kind.predictable and isinstance(after.format, PackageFormat)
    if len(f.shape) != 2 or f.shape != after.format.shape or min(f.shape) < 1:
        return False
    # codes, and tables that many weights share, may be of any dtype
    wanted = {name: dtype for name, (dtype, _) in f.kind.layout(f).items() if name not in ("", "weight", "quant_map")}
    found = {name: tensor.dtype for name, tensor in t.items() if name not in ("weight", "quant_map")}
    return found == wanted and (f.quantised or f.dtype in MANTISSA)


@_on_the_cpu()
def encode_tensor(before: Tensor, after: Tensor) -> UndoEntry:
    """The proved entry that gives the plain tensor ``before`` back from ``after``, which stands in its place (a trained
    bias or head).
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
    """The mirror of :func:`encode_tensor`, on the CPU.

    Raises:
        UndoError: the entry is damaged.
        IntegrityError: ``after`` is not the tensor that the fold left, or the result is not the tensor that was replaced.
    """
    facts, after = entry.facts, after.detach().cpu()
    if _hash_one(after) != facts.get("after"):
        raise changed("the tensor is not the one that this record's fold left", shape=tuple(after.shape))
    about = _checked(facts.get("tensor"), limit=_limit(after.numel()))
    io = Streams(entry.data)
    if facts.get("predicted"):
        if about != described(after) or after.dtype not in MANTISSA:
            raise damaged(why="a predicted tensor has another dtype or shape than the model's tensor")
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
    """The mirror of :func:`bytes_of` and :func:`described`."""
    if len(raw) != _nbytes(about):
        raise damaged(why=f"a tensor has {len(raw)} bytes, not {_nbytes(about)}")
    dtype, shape = _DTYPES[about["dtype"]], about["shape"]
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def _nbytes(about: Mapping[str, Any]) -> int:
    return _DTYPES[about["dtype"]].itemsize * int(math.prod(about["shape"]))


def _checked(about: Any, *, limit: int) -> dict[str, Any]:
    """A file's description of a tensor, checked: it must be possible, and of at most ``limit`` bytes."""
    try:
        good = isinstance(about["shape"], list) and all(type(n) is int and n >= 0 for n in about["shape"])
        if not good or _nbytes(about) > limit:
            raise damaged(why=f"a tensor's shape is {printable(about['shape'])}")
    except (KeyError, TypeError) as error:
        raise damaged(why="a tensor's dtype or shape is missing or unknown") from error
    return about  # type: ignore[no-any-return]


def _limit(numel: int) -> int:
    """The most bytes of the original of a plain tensor, for a tensor of ``numel`` elements in its place: a fold may cut an embedding
    off to a part of its rows.
    """
    return 256 * numel + 1024


def read_shape(about: Any, numel: int) -> tuple[int, ...]:
    """The shape of a plain tensor's original that a file names, for a tensor of ``numel`` elements in its place."""
    return tuple(_checked(about, limit=_limit(numel))["shape"])


def _facts_of_format(f: WeightFormat) -> dict[str, Any]:
    if isinstance(f, PackageFormat):
        return {"codec": f.codec, "shape": list(f.shape), "label": f.label}
    return asdict(f) | {"shape": list(f.shape), "dtype": name_of(f.dtype), "storage": name_of(f.storage)}


def read_format(facts: Any, folded: WeightFormat) -> WeightFormat:
    """A format that a file names, for a weight that is stored as ``folded`` after the fold."""
    shape = folded.shape
    if isinstance(folded, PackageFormat):  # whose layout the fold keeps
        if facts != _facts_of_format(folded):
            raise damaged(why="the weight is stored in the layout of another package than before the fold")
        return folded
    try:
        sizes = facts["blocksize"], facts["nested_blocksize"]
        f = WeightFormat(facts["codec"], shape, NAMED[facts["dtype"]], *sizes, NAMED[facts["storage"]])
        least = f.kind.least_blocksize
    except (FormatError, KeyError, TypeError) as error:
        raise damaged(why="the format is incomplete or unknown") from error
    good = len(facts) == len(fields(f)) and facts["shape"] == list(shape)
    good = good and all(type(n) is int and 0 <= n <= 1 << 16 for n in sizes)
    if not good or f.blocksize < least or (f.nested_blocksize and not least):
        raise damaged(why="the format's block sizes or shape do not fit the weight")
    return f
