"""Check a folded checkpoint on disk: its files against the hashes in its record, every tensor that its model would load
against base and adapter.

By none of the code that folds: :mod:`~oftsurgery.loaded` says what the model has before and after,
:mod:`~oftsurgery.measures` rotates anew in float64, and what a live adapter does to which tensor is written here once
more.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from . import codecs, companions, configs, measures
from .adapter import OFTAdapter, Rotation
from .codecs import EncodedWeight, WeightFormat
from .errors import MatchError, OFTSurgeryError, StateError
from .loaded import Loaded
from .record import FoldRecord
from .shards import DTYPES, Checkpoint, inside, sha256_of

__all__ = ["CheckpointReport", "FileCheck", "TensorCheck", "WeightCheck", "check_checkpoint", "check_files"]

_FLOATS = ("F64", "F32", "F16", "BF16")

#: what became of a recorded file
FileCheck = Literal["ok", "changed", "missing"]

#: what a tensor should be: ``"rotated"``; ``"replaced"`` by the adapter's own values; ``"tied"``, with no tensor of its
#: own, and unchanged; ``"copied"`` from the source; ``"converted"``, the source's in another format or dtype;
#: ``"absent"`` in both folders, made by the model itself; ``"added"`` beside what the source has
Kind = Literal["rotated", "replaced", "tied", "copied", "converted", "absent", "added"]

# what storing the right weight once more may differ by: rounding ties, and the last bits of float32 products
_SLACK = 1.05


@dataclass(frozen=True)
class WeightCheck:
    """One folded weight.

    Attributes:
        error: ``‖folded - exact‖ / ‖exact‖`` (Frobenius), exact being base and rotation in float64.
        rounding: what storing the exact weight in the folded format costs by itself.
        recorded: content hash as the record has it: True, False, or None where there is no record.
        calibrated: the error that the record names where the weight was calibrated; None elsewhere. A calibrated weight
            errs more than a plainly rounded one, so that its layer's outputs err less.
        rho: ``‖folded - exact‖ / ‖exact - base‖``; None where the adapter changes nothing.
        kept: ``⟨folded - base, exact - base⟩ / ‖exact - base‖²``, how much of the change is there; None likewise.
        steps: the error of a weight that lies anywhere between the format's levels: rounding that keeps the change costs
            no more.
    """

    error: float
    rounding: float
    recorded: bool | None
    calibrated: float | None = None
    rho: float | None = None
    kept: float | None = None
    steps: float = 0.0

    @property
    def gain(self) -> float:
        """What this fold's rounding changes in the squared error of plain rounding, as a part of it: below 0 for the
        better.
        """
        return (self.error / self.rounding) ** 2 - 1 if self.rounding else 0.0

    @property
    def excess(self) -> float:
        """How far the error is beyond plain rounding, beyond what calibration made of it, or, where the change is kept,
        beyond what the format's steps cost.
        """
        whole = self.kept is not None and abs(self.kept - 1) <= measures.WHOLE
        return max(0.0, self.error - max(self.rounding, self.calibrated or 0.0, self.steps if whole else 0.0) * _SLACK)

    def passes(self, tolerance: float | None) -> bool:
        """Whether it is within ``tolerance`` (None: plain rounding and no more) and as recorded."""
        within = self.error <= tolerance if tolerance is not None else self.excess <= 1e-6
        return within and self.recorded is not False


@dataclass(frozen=True)
class TensorCheck:
    """One tensor: of the model, or of the files where the model's class does not take it.

    Attributes:
        kind: what it should be.
        why: what is wrong with it, or None.
    """

    kind: Kind
    why: str | None = None

    @property
    def ok(self) -> bool:
        return self.why is None


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`check_checkpoint` looked at.

    Attributes:
        modules: ``{path: WeightCheck}`` of what was rotated.
        tolerance: the largest error that passes; None: plain rounding and no more.
        files: ``{file name: FileCheck}`` of the files that the record has hashes of; empty without a record.
        tensors: ``{name: TensorCheck}`` of everything that the model loads, and of stored tensors that it does not take.
        config: what the folded ``config.json`` makes the model compute otherwise, or None.

    >>> report = CheckpointReport({}, None, tensors={"lm_head.weight": TensorCheck("tied"), "norm.weight": TensorCheck("copied")})
    >>> report.ok, report.looked_at
    (True, {'tied': 1, 'copied': 1})
    """

    modules: Mapping[str, WeightCheck]
    tolerance: float | None
    files: Mapping[str, FileCheck] = field(default_factory=dict)
    tensors: Mapping[str, TensorCheck] = field(default_factory=dict)
    config: str | None = None

    def passes(self, check: WeightCheck) -> bool:
        """Whether one weight is within the tolerance and as recorded."""
        return check.passes(self.tolerance)

    @property
    def ok(self) -> bool:
        """Whether all weights are, every tensor is what it should be, and every file is as recorded."""
        right = all(map(self.passes, self.modules.values())) and all(c == "ok" for c in self.files.values())
        return right and not self.wrong and self.config is None

    @property
    def wrong(self) -> dict[str, str]:
        """``{tensor: what is wrong with it}``."""
        return {name: check.why for name, check in self.tensors.items() if check.why is not None}

    @property
    def looked_at(self) -> dict[str, int]:
        """How many tensors of each kind were looked at."""
        return dict(Counter(check.kind for check in self.tensors.values()))

    @property
    def worst_first(self) -> list[tuple[str, WeightCheck]]:
        return sorted(self.modules.items(), key=lambda item: (self.passes(item[1]), -item[1].error))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, worst first."""
        return {
            "ok": self.ok,
            "tolerance": self.tolerance,
            "files": dict(self.files),
            "config": self.config,
            "modules": {path: {**asdict(c), "passes": self.passes(c)} for path, c in self.worst_first},
            "looked_at": self.looked_at,
            "tensors": {n: asdict(c) for n, c in sorted(self.tensors.items(), key=lambda item: item[1].ok)},
        }


def check_files(folder: Path) -> CheckpointReport:
    """Compare a folder's files with the SHA-256 hashes in its ``oftsurgery.json``, and nothing else.

    Raises:
        StateError: it has no record, or one without hashes.
        CheckpointError: the record cannot be read.
    """
    record = configs.record_in(folder)
    if record is None or not record.files:
        raise StateError(
            f"the folder has no {configs.RECORD}" if record is None else "the record has no hashes of files",
            path=folder,
            remedy="give the base and the adapter too: the weights are then compared with them",
        )
    return CheckpointReport(MappingProxyType({}), None, _file_checks(folder, record))


def _file_checks(folder: Path, record: FoldRecord) -> Mapping[str, FileCheck]:
    return MappingProxyType({name: _file_check(folder, name, record.files[name]) for name in sorted(record.files)})


def _file_check(folder: Path, name: str, sha256: str) -> FileCheck:
    if "/" not in name and "\\" not in name and not os.path.lexists(folder / name):
        return "missing"
    # a record's names may lead anywhere, and links too: those are refused
    return "ok" if sha256_of(inside(folder, name)) == sha256 else "changed"


def check_checkpoint(
    folded: Checkpoint,
    base: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    tolerance: float | None = None,
    idle: Callable[[Any, str], bool] | None = None,
) -> CheckpointReport:
    """Compare every tensor of the folded model with what base and adapters make of it live.

    Args:
        folded: in any format.
        base: the checkpoint that was folded; where it is plain and the fold quantised it first (its record says so, or
            its format), it is quantised again.
        adapters: that were folded, in the live order.
        tolerance: largest relative error of a rotated weight that passes; None: no more than storing the exact weight
            costs.
        idle: ``(model, path) -> bool``, whether the model never calls a module, so that a rotation of it does nothing
            live.

    Raises:
        MatchError, ShapeError: base and adapters do not belong together.
        StateError: the adapters rotate nothing.
        CheckpointError, FormatError: the base, a config or the record cannot be used.
    """
    if not any(adapter.modules for adapter in adapters):
        raise StateError(
            "the adapter targets nothing", path=folded.folder, remedy="check that base and adapter belong together"
        )
    record = configs.record_in(folded.folder)
    loading = _Loading(record, folded, base)
    before = Loaded(base, loading.dtype)
    named = {before.place(n) for a in adapters for n in (*a.saved, *(f"{path}.weight" for path in a.modules))}
    apart = frozenset(n for n in named if n is not None and n not in before.sources)
    if apart:
        before = Loaded(base, loading.dtype, apart)
    after = Loaded(folded, apart=frozenset(before.apart))
    comparison = _Comparison(before, after, _Live(before, adapters, idle), loading, record, tolerance)
    names = [n for n in {**before.sources, **after.sources} if n not in before.left_out]
    tensors = {name: comparison.check(name) for name in names}
    files = _file_checks(folded.folder, record) if record is not None else {}
    modules = MappingProxyType(comparison.modules)
    return CheckpointReport(modules, tolerance, files, MappingProxyType(tensors), _config(before, after))


def _config(before: Loaded, after: Loaded) -> str | None:
    """What the config makes the model compute otherwise."""
    now = after.tie_readers()
    for path, tied in before.tie_readers().items():
        if now.get(path) is not tied:
            what = f"`tie_word_embeddings` is {now.get(path)}, in the source {tied}"
            return f"{what}, and {type(before.model.get_submodule(path)).__name__} computes something else by it"
    return None


class _Loading:
    """How a plain base was loaded before it was rotated, by the record, or else by what the folded checkpoint stores.

    Attributes:
        codec: to which it was quantised; ``"stored"`` for what each weight is stored as; None for no quantisation.
        dtype: in which it was loaded.
        double: its statistics are nested.
        skip: ``llm_int8_skip_modules``.
        original: rotated weights were not quantised first.
        dense: what is written is not quantised.
    """

    def __init__(self, record: FoldRecord | None, folded: Checkpoint, base: Checkpoint) -> None:
        said = record.base if record is not None else {}
        stored = next((DTYPES[e.dtype] for e in base.entries.values() if e.dtype in _FLOATS), torch.float32)
        self.dtype = _dtype(said.get("dtype")) or _configured(base if said else folded) or stored
        self.dense = not _quantised(folded)
        self.codec = said.get("quantize") if said else None if self.dense or _quantised(base) else "stored"
        self.double, self.original = said.get("double_quant") == "true", said.get("fold_into") == "original"
        self.skip = json.loads(said.get("skip_modules") or "null")


class _Live:
    """What adapters do to which of the base's tensors, as peft's live model has them.

    Attributes:
        chains: ``{name: (path as the adapter has it, rotations in the live order)}``; of the weight at that place alone,
            whatever is tied to it.
        values: ``{name: the adapter's own}``: those of ``modules_to_save``, whose modules peft copies, at that place
            alone; what is trained in its place wherever it is tied to.
    """

    def __init__(self, base: Loaded, adapters: Sequence[OFTAdapter], idle: Callable[[Any, str], bool] | None) -> None:
        self.chains: dict[str, tuple[str, list[Rotation]]] = {}
        self.values: dict[str, Tensor] = {}
        for adapter in adapters:
            for path, rotation in adapter.modules.items():
                place = _found(base, f"{path}.weight", adapter)
                if idle is None or base.model is None or not idle(base.model, place.rpartition(".")[0]):
                    self.chains.setdefault(place, (path, []))[1].append(rotation)
            own: dict[str, Tensor] = {}
            for name, values in adapter.saved.items():
                place = _found(base, name, adapter)
                if place in self.values:
                    raise MatchError("two adapters bring their own values for one tensor", tensor=name)
                own[place] = values
                if not _copied(name, adapter):
                    own = dict.fromkeys(base.together(place), values) | own
            self.values |= own


def _found(base: Loaded, name: str, adapter: OFTAdapter) -> str:
    place = base.place(name)
    if place is None:
        raise MatchError(
            "the base checkpoint has no such tensor, which the adapter names",
            tensor=name,
            path=adapter.source,
            remedy="give the base that the adapter was trained on, of the same class",
        )
    return place


def _copied(name: str, adapter: OFTAdapter) -> bool:
    """Whether a tensor is of a module in ``modules_to_save``, by the ends of paths, as peft finds them."""
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(path.endswith(saved) for path in paths for saved in adapter.config.get("modules_to_save") or ())


class _Comparison:
    """Of one tensor after the other; of a group that transformers makes others of, one at a time."""

    def __init__(
        self,
        base: Loaded,
        folded: Loaded,
        live: _Live,
        loading: _Loading,
        record: FoldRecord | None,
        tolerance: float | None,
    ) -> None:
        self.base, self.folded, self.live, self.loading, self.tolerance = base, folded, live, loading, tolerance
        self.recorded = record.modules if record is not None else {}
        self.modules: dict[str, WeightCheck] = {}
        self._first = base.linears(loading.skip) if loading.codec and loading.dense and base.model else frozenset()
        self._done: dict[tuple[object, object], TensorCheck] = {}

    def check(self, name: str) -> TensorCheck:
        source, now = self.base.sources.get(name), self.folded.sources.get(name)
        rotated, replaced = name in self.live.chains, name in self.live.values
        kind: Kind = "rotated" if rotated else "replaced" if replaced else "copied"
        if now is None:
            if source is None and not replaced:
                return TensorCheck("absent")
            made_up = ", and transformers would make it up" if name in self.folded.sources else ""
            return TensorCheck(kind, f"the folded checkpoint lacks it{made_up}")
        if source is None and not replaced:
            return TensorCheck("added", "the source has no such tensor")
        if not self.folded.fits(name) and self.base.fits(name):
            return TensorCheck(kind, "stored plain or quantised where config.json says the other, and cannot be run")
        tied = not rotated and not replaced and name not in self.folded.given
        if tied and (source, now) in self._done:
            return TensorCheck("tied", self._done[source, now].why)
        try:
            stored, parts = self.folded.read(name)
            decoded = codecs.decode(_linear(self.folded, name, stored)) if rotated else None
        except OFTSurgeryError as error:
            return TensorCheck(kind, error.message)
        if decoded is not None:
            return TensorCheck(kind, self._rotated(name, stored, parts, decoded))
        if replaced:
            return TensorCheck(kind, self._replaced(name, stored))
        found = self._kept(name, stored, parts)
        if isinstance(source, str) and isinstance(now, str):
            self._done[source, now] = found
        return replace(found, kind="tied") if tied else found

    def _rotated(self, name: str, stored: EncodedWeight, parts: Mapping[str, Tensor], decoded: Tensor) -> str | None:
        path, chain = self.live.chains[name]
        before, beside = self._before(name, stored.format)
        start, stored = codecs.decode(_linear(self.base, name, before)), _linear(self.folded, name, stored)
        exact, into = measures.rotated(start, chain), stored.format
        if decoded.shape != exact.shape:
            return f"its shape is {tuple(decoded.shape)}, that of the source {tuple(exact.shape)}"
        plain = codecs.encode(exact, into)
        module = self.recorded.get(path, self.recorded.get(name.removesuffix(".weight")))
        error, changed = measures.relative(decoded, exact), measures.relative(start, exact)
        check = self.modules[path] = WeightCheck(
            error,
            measures.relative(codecs.decode(plain), exact),
            None if module is None else stored.fingerprint == module.after,
            module.error if module is not None and module.rounding == "calibrated" else None,
            error / changed if changed else None,
            measures.kept(decoded, start, exact),
            measures.step_error(stored, exact),
        )
        if not check.passes(self.tolerance):
            recorded = "" if check.recorded is not False else "; its record has other contents"
            return f"{error:.2e} off what base and adapter give, of which its format explains {check.rounding:.2e}{recorded}"
        if not into.quantised:
            return self._dtype(before, into.dtype)
        if before.format.codec == into.codec and before.format != into:
            return f"stored as {into}, the source as {before.format}"
        usual = companions.spread("weight", plain)
        return _unlike(parts, beside if beside is not None and before.format == into else usual, _FIXED)

    def _replaced(self, name: str, stored: EncodedWeight) -> str | None:
        values, got = self.live.values[name], stored.tensors["weight"]
        if stored.format.quantised:
            return f"stored as {stored.format.label}, the adapter's own values are plain"
        before, _ = self._before(name, stored.format)
        held = before.tensors["weight"].dtype  # into which the trainer's loading, or peft's, may have put them
        if not any(_same(got, v.to(got.dtype)) for v in (values, values.to(held))):
            return "not the adapter's own values"
        return self._dtype(before, got.dtype)

    def _kept(self, name: str, stored: EncodedWeight, parts: Mapping[str, Tensor]) -> TensorCheck:
        before, beside = self._before(name, stored.format)
        kind: Kind = "copied" if beside is not None and before.format == stored.format else "converted"
        if stored.format.quantised:
            if not before.format.quantised:
                return TensorCheck(kind, f"stored as {stored.format.label}, where the source is plain")
            return TensorCheck(kind, _unlike(parts, companions.spread("weight", before) if beside is None else beside))
        want, got = before.tensors["weight"], stored.tensors["weight"]
        if before.format.quantised:
            want = codecs.decode(before)
            want = want.t() if self.folded.transposed(name) else want
        if want.is_floating_point() == got.is_floating_point():
            want = want.to(got.dtype)
        why = self._dtype(before, got.dtype)
        return TensorCheck(kind, why if _same(got, want) else "not what the source has")

    def _dtype(self, before: EncodedWeight, dtype: torch.dtype) -> str | None:
        """What is wrong with a plain tensor's dtype: it may be the source's, or the one that the config names."""
        fine = {_configured(self.folded.checkpoint) or dtype} | (
            {before.format.dtype} if not before.format.quantised else set()
        )
        return None if dtype in fine else f"stored as {dtype}, expected {' or '.join(sorted(map(str, fine)))}"

    def _before(self, name: str, into: WeightFormat) -> tuple[EncodedWeight, Mapping[str, Tensor] | None]:
        """The weight as the live model had it before any rotation, of a plain base as it was loaded; and what the base
        stores of it, where it is that.
        """
        values, beside = self.live.values.get(name), None
        if self.base.sources.get(name) is not None:
            encoded, beside = self.base.read(name)
            held = encoded.tensors["weight"].dtype
        if values is not None:
            encoded, beside = (
                codecs.dense(values if beside is None or encoded.format.quantised else values.to(held)),
                None,
            )
        weight, how = encoded.tensors["weight"], self.loading
        stays = encoded.format.quantised or not weight.is_floating_point() or how.codec is None
        if stays or (how.original and name in self.live.chains):
            return encoded, beside
        dtype = self.base.dtype_of(name) or weight.dtype
        codec = into.codec if into.quantised and how.codec in ("stored", into.codec) else "dense"
        if how.dense and name in self._first and name in self.base.given:
            codec = str(how.codec)
        if codec == "dense":
            return (encoded, beside) if dtype == weight.dtype else (codecs.dense(weight.to(dtype)), None)
        weight = _linear(self.base, name, codecs.dense(weight.to(dtype))).tensors["weight"]
        weight = weight.to(torch.float16) if codec == "int8" else weight  # as bitsandbytes itself does
        usual = WeightFormat(
            codec, (), blocksize=0 if codec == "int8" else 64, nested_blocksize=256 if how.double else 0
        )
        return codecs.encode(
            weight, replace(into if into.quantised else usual, shape=tuple(weight.shape), dtype=weight.dtype)
        ), None


def _linear(loaded: Loaded, name: str, encoded: EncodedWeight) -> EncodedWeight:
    """A weight as ``(out, in)``."""
    weight = encoded.tensors["weight"]
    if encoded.format.quantised:
        return encoded
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        return codecs.dense(weight.flatten(1))
    return codecs.dense(weight.t()) if loaded.transposed(name) else encoded


# companions whose values do not depend on the weight
_FIXED = ("quant_map", "weight_format")


def _unlike(got: Mapping[str, Tensor], want: Mapping[str, Tensor], only: tuple[str, ...] | None = None) -> str | None:
    """How a quantised weight's tensors differ from what they should be; in names, dtypes and shapes alone where they are
    not ``only`` of such endings.
    """
    for name in sorted(got.keys() | want.keys()):
        if name not in got or name not in want:
            return f"its {name} is missing" if name not in got else f"it has a {name} too many"
        a, b = got[name], want[name]
        if "quant_state" in name:
            alike = only is not None or companions.unpack_state(a, name) == companions.unpack_state(b, name)
        elif only is None or name.endswith(only):
            alike = _same(a, b)
        else:
            alike = a.dtype == b.dtype and a.shape == b.shape
        if not alike:
            return (
                f"its {name} is not what the source has" if only is None else f"its {name} is not what its format has"
            )
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _quantised(checkpoint: Checkpoint) -> bool:
    return any(".quant_state.bitsandbytes__" in n or n.endswith(".SCB") for n in checkpoint.entries)


def _configured(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype that a config names."""
    return _dtype(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype")))


def _dtype(name: object) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None
