""":func:`check_checkpoint` checks a folded checkpoint on disk: its files against the hashes in its record, and every tensor
that its model would load against base and adapter.

The check shares no code with the fold: :mod:`~oftsurgery.checks.loaded` says which tensors the model has before and after,
:mod:`~oftsurgery.checks.measures` rotates again in float64, and this file states a second time how a live adapter changes
each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import CheckpointError, OFTSurgeryError, StateError
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.quant_state import unpack_state
from oftsurgery.records.advice import Case, remedies
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import record_beside
from oftsurgery.tasks import again, mapped, slices

from . import measures
from .adapter_effects import AdapterEffects
from .base_loading import Loading, dtype_in_config
from .checkpoint_report import CheckpointReport, TensorCheck, TensorKind, WeightCheck
from .loaded import LoadedCheckpoint, StoredTensor
from .package_weights import Codes, read_again
from .verify_files import file_checks
from .verify_report import VerifyReport


def check_checkpoint(
    folded: Checkpoint,
    base: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    tolerance: float | None = None,
    idle: Callable[[Any, str], bool] | None = None,
    on_texts: Callable[[Any], VerifyReport] | None = None,
    executor: Executor | None = None,
    begin: bytes = b"",
) -> CheckpointReport:
    """Compare every tensor of the folded model with the live result of base and adapters.

    Args:
        folded: the folded checkpoint, in any format.
        base: the checkpoint that was folded; a plain base that the fold quantised first (as the folded checkpoint's
            record or format says) is quantised again.
        adapters: the folded adapters, in the live order.
        tolerance: largest relative error of a rotated weight that passes; None: the error of storing the exact weight.
        idle: ``(model, path) -> bool``, whether the model never calls a module, whose rotation then has no effect.
        on_texts: function that compares the outputs, from the way in which the base was loaded (its attributes are those of
            ``Loading``); None to compare the weights alone.
        executor: who compares; None: this process.
        begin: the pickled function by which the executor's workers begin the comparison.

    Raises:
        MatchError, ShapeError: base and adapters do not belong together.
        StateError: the adapters have no rotation.
        CheckpointError, FormatError: the base, a config or the record cannot be used.
    """
    comparison = begin_comparison(folded, base, adapters, tolerance=tolerance, idle=idle)
    record, before, after = comparison.record, comparison.base, comparison.folded
    parts = [[comparison.names[i] for i in part] for part in slices(comparison.sizes)]
    for found in (
        [comparison.found(comparison.names)]
        if executor is None
        else mapped(executor, _found_again, [(begin, part) for part in parts])
    ):
        comparison.take(found)
    tensors = MappingProxyType(comparison.tensors)
    files = file_checks(folded.folder, record, executor) if record is not None else {}
    flags, now = before.tie_readers(), after.tie_readers()
    turned = [path or "the model" for path, flag in flags.items() if now.get(path) is not flag]
    config = None
    if turned:
        config = f"`tie_word_embeddings` is not the source's value, and {turned[0]} therefore computes something else"
    report = CheckpointReport(MappingProxyType(comparison.modules), tolerance, files, tensors, config)
    report = report if on_texts is None else replace(report, on_texts=on_texts(comparison.loading))
    return replace(report, remedies=comparison.remedies()) if report.weak else report


def begin_comparison(
    folded: Checkpoint,
    base: Checkpoint,
    adapters: Sequence[OFTAdapter],
    *,
    tolerance: float | None,
    idle: Callable[[Any, str], bool] | None,
) -> Comparison:
    """The comparison before any tensor is read; the arguments and errors are those of :func:`check_checkpoint`."""
    if folded.wrapped:
        message = "the names of the folded checkpoint's tensors hold segments of wrappers, so transformers finds none of the tensors"
        raise CheckpointError(
            message, path=folded.folder, remedy="save the model without its wrapper (torch.compile, FSDP, DDP)"
        )
    if not any(adapter.modules for adapter in adapters):
        raise StateError("the adapter has no rotation", path=folded.folder, remedy="give the adapter that was folded")
    record = record_beside(folded)
    alike = folded.stored_as == base.stored_as
    folded, base = read_again(folded, idle=alike), read_again(base, idle=alike)
    adapters = _at_recorded_strength(adapters, record)
    loading = Loading(record, folded, base)
    base, other_head = _in_class_of(folded, base, adapters, loading.dtype)
    before = LoadedCheckpoint(base, loading.dtype)
    named = {before.place(n) for a in adapters for n in (*a.saved, *(f"{path}.weight" for path in a.modules))}
    apart = frozenset(n for n in named if n is not None and n not in before.sources)
    before = LoadedCheckpoint(base, loading.dtype, apart) if apart else before
    after = LoadedCheckpoint(folded, apart=frozenset(before.apart))
    names = tuple(n for n in {**before.sources, **after.sources} if n not in before.left_out | other_head)
    return Comparison(before, after, AdapterEffects(before, adapters, idle), loading, record, tolerance, names)


def _found_again(begin: bytes, names: Sequence[str]) -> Found:
    """What a worker finds of the tensors ``names``."""
    comparison: Comparison = again(begin)
    return comparison.found(names)


def _at_recorded_strength(adapters: Sequence[OFTAdapter], record: FoldRecord | None) -> Sequence[OFTAdapter]:
    """The adapters at the strengths that the record names, where they were given as they were read."""
    if record is None or len(record.adapters) != len(adapters):
        return adapters
    found = []
    for adapter, info in zip(adapters, record.adapters, strict=True):
        as_read = adapter.strength == 1 and adapter.strength_mode == "angle"
        found.append(adapter.at_strength(info.strength, info.strength_mode) if as_read else adapter)  # type: ignore[arg-type]
    return found


def _in_class_of(
    folded: Checkpoint, base: Checkpoint, adapters: Sequence[OFTAdapter], dtype: torch.dtype
) -> tuple[Checkpoint, set[str]]:
    """The base as a checkpoint of the folded one's class, where an adapter brings a head that the base's class lacks; and the
    names of the base's tensors that only its own class takes.
    """
    if folded.config.get("architectures") == base.config.get("architectures") and not _other_labels(folded, base):
        return base, set()
    if not any(adapter.saved for adapter in adapters):
        return base, set()
    own = LoadedCheckpoint(base, dtype)
    fields = {n: folded.config[n] for n in ("architectures", "id2label", "label2id") if n in folded.config}
    headed = replace(base, config={**base.config, **fields})
    there = LoadedCheckpoint(headed, dtype)
    if own.model is None or there.model is None:
        return base, set()
    return headed, set(own.model.state_dict()) - set(there.model.state_dict())


def _other_labels(folded: Checkpoint, base: Checkpoint) -> bool:
    labels = [len(config.get("id2label") or {"0": "", "1": ""}) for config in (folded.config, base.config)]
    return labels[0] != labels[1]


@dataclass(frozen=True)
class Found:
    """What a comparison has found of some tensors, as in a :class:`CheckpointReport`; and the formats of the rotated weights: the
    base's, whether the base was quantised first, and the folded weight's.
    """

    tensors: Mapping[str, TensorCheck]
    modules: Mapping[str, WeightCheck]
    formats: Mapping[str, tuple[WeightFormat, bool, WeightFormat]]


@dataclass
class Comparison:
    """The comparison, which takes one tensor after the other and holds one converted group at a time."""

    base: LoadedCheckpoint
    folded: LoadedCheckpoint
    live: AdapterEffects
    loading: Loading
    record: FoldRecord | None
    tolerance: float | None
    names: tuple[str, ...]
    tensors: dict[str, TensorCheck] = field(default_factory=dict)
    modules: dict[str, WeightCheck] = field(default_factory=dict)
    done: dict[tuple[str, str], TensorCheck] = field(default_factory=dict)  # for tied tensors
    formats: dict[str, tuple[WeightFormat, bool, WeightFormat]] = field(default_factory=dict)
    exact: dict[str, Tensor] = field(default_factory=dict)  # of weights whose group is rotated already

    @property
    def sizes(self) -> list[int]:
        """The stored bytes of each tensor of the folded checkpoint; a tensor that is tied to another one has none."""
        entries = self.folded.checkpoint.entries
        stored = [self.folded.sources.get(name) for name in self.names]
        return [entries[n].nbytes if n is not None and n in entries else 0 for n in stored]

    def found(self, names: Sequence[str]) -> Found:
        """What is found of the tensors ``names``."""
        self.modules, self.formats = {}, {}
        tensors = {name: self.check(name) for name in names}
        return Found(tensors, self.modules, self.formats)

    def take(self, found: Found) -> None:
        self.tensors |= found.tensors
        self.modules |= found.modules
        self.formats |= found.formats

    def remedies(self) -> tuple[str, ...]:
        """What helps where the weights keep too little of the adapter, from the record or else from the worst weight."""
        path = min(self.modules, key=lambda path: k if (k := self.modules[path].kept) is not None else 1.0)
        if self.record is not None and path in self.record.modules:
            case = Case.of_record(self.record, path)
        else:
            base, first, merged = self.formats[path]
            case = Case.of_weights(base, merged, rotated=merged if first else base, on_disk=True)
        return () if case is None else tuple(map(str, remedies(case)))

    @cached_property
    def _first(self) -> frozenset[str]:
        """The weights that were quantised first, for a checkpoint that stores only plain weights."""
        return self.base.linears(self.loading.skip) if self.base.model is not None else frozenset()

    def check(self, name: str) -> TensorCheck:
        found = self._check(name)
        return found if found.why is not None else replace(found, why=self.folded.misfit(name))

    def _check(self, name: str) -> TensorCheck:
        source, now = self.base.sources.get(name), self.folded.sources.get(name)
        rotated, replaced = name in self.live.chains, name in self.live.values
        kind: TensorKind = "rotated" if rotated else "replaced" if replaced else "copied"
        if source is None and replaced:
            return TensorCheck(kind, self._as_brought(name, now))
        if source is None:
            return TensorCheck("absent") if now is None else TensorCheck("added", "the source does not have the tensor")
        if now is None:
            made_up = ", and transformers would fill it with random numbers" if name in self.folded.sources else ""
            return TensorCheck(kind, f"the folded checkpoint lacks the tensor{made_up}")
        if not self.folded.fits(name) and self.base.fits(name):
            return TensorCheck(
                kind, "the weight is quantised and config.json says plain, or the other way round: the model cannot run"
            )
        if kind == "copied" and now != name:
            kind = "tied"
        if kind == "tied" and (source, now) in self.done:
            return TensorCheck(kind, self.done[source, now].why)
        try:
            stored = self.folded.read(name)
            decoded = codecs.decode(_linear(self.folded, name, stored.weight)) if rotated else None
        except OFTSurgeryError as error:
            return TensorCheck(kind, error.message)
        before = self._before(name, stored.weight.format)
        if decoded is not None:
            return TensorCheck(kind, self._as_rotated(name, before, stored, decoded))
        if replaced or name in self.live.biases or name in self.live.sums:
            check = self._as_replaced if replaced else self._as_turned
            return TensorCheck("replaced", check(name, before, stored))
        same = before.parts is not None and before.weight.format == stored.weight.format
        same = same and (before.held is None) == (stored.held is None)
        kind = kind if kind == "tied" else "copied" if same else "converted"
        found = self.done[source, now] = TensorCheck(kind, self._unchanged(name, before, stored))
        return found

    def _before(self, name: str, into: WeightFormat) -> StoredTensor:
        """The weight of the live model before any rotation; a plain base is cast and quantised as it was loaded."""
        base, values, how = self.base.read(name), self.live.values.get(name), self.loading
        quantised = base.weight.format.quantised
        if values is not None:
            base = StoredTensor(codecs.dense(values if quantised else values.to(base.weight.format.dtype)))
        weight = base.weight.tensors["weight"]
        rotated = name in self.live.chains
        if quantised or not (how.cast and (how.cast_rotated or not rotated) and weight.is_floating_point()):
            return base
        dtype = self.base.dtype_of(name) or weight.dtype
        base = base if dtype == weight.dtype else StoredTensor(codecs.dense(weight.to(dtype)))
        if how.original and rotated:
            return base
        first = into if into.quantised and how.codec in ("stored", into.codec) else how.format
        if first is None or (not into.quantised and (name not in self._first or self.base.sources[name] != name)):
            return base
        weight = _linear(self.base, name, base.weight).tensors["weight"]
        weight = (
            weight.to(torch.float16) if first.codec == "int8" else weight
        )  # bitsandbytes also quantises from float16
        return StoredTensor(codecs.encode(weight, replace(first, shape=tuple(weight.shape), dtype=weight.dtype)))

    def _as_rotated(self, name: str, before: StoredTensor, stored: StoredTensor, decoded: Tensor) -> str | None:
        path, chain = self.live.chains[name]
        start, own = codecs.decode(_linear(self.base, name, before.weight)), _linear(self.folded, name, stored.weight)
        shape = self.base.read(name).weight.format.shape
        kernel = tuple(shape[2:]) if len(shape) == 4 else ()
        group = self.live.groups.of(name.removesuffix(".weight"))
        exact, into = self._of_group(name, group) if group else measures.rotated(start, chain, path, kernel), own.format
        if decoded.shape != exact.shape:
            return f"the weight's shape is {tuple(decoded.shape)}, but {tuple(exact.shape)} in the source"
        plain = codecs.encode(exact, into)
        codes = None if stored.held is None else stored.held.codes(stored.parts or {})
        modules = self.record.modules if self.record is not None else {}
        module = modules.get(path, modules.get(name.removesuffix(".weight")))
        own_base = self.base.read(name).weight.format
        self.formats[name.removesuffix(".weight") if group else path] = (
            own_base,
            before.weight.format.quantised and not own_base.quantised,
            into,
        )
        error, changed = measures.relative(decoded, exact), measures.relative(start, exact)
        check = self.modules[name.removesuffix(".weight") if group else path] = WeightCheck(
            error,
            rounding=measures.relative(codecs.decode(plain), exact)
            if codes is None
            else _rounding(stored, codes, exact),
            recorded=None if module is None else own.fingerprint == module.after,
            calibrated=module.error if module is not None and module.rounding == "calibrated" else None,
            rho=error / changed if changed else None,
            kept=measures.kept(decoded, start, exact),
            change=float((exact - start.to(torch.float64)).norm()),
            format=into.label if codes is None else str(self.folded.checkpoint.stored_as),
            steps=measures.step_error(own, exact) if codes is None else codes.step_error(exact),
            grain=measures.grain(own, start, exact) if codes is None else codes.grain(start.to(torch.float64), exact),
        )
        if not check.passes(self.tolerance):
            recorded = "" if check.recorded is not False else "; the record has another hash"
            return f"the relative error is {error:.2e}, and the rounding to the format explains {check.rounding:.2e}{recorded}"
        if codes is not None:
            return self._wrong_scales(codes, before, exact) or _parts_unlike(stored, before, fixed=True)
        if not into.quantised:
            return self._wrong_dtype(before, into.dtype)
        same = replace(before.weight.format, nested_blocksize=into.nested_blocksize)
        if module is not None and module.format == into.label and same == into:
            before = StoredTensor(plain)  # the record says that the double quantisation has changed
        if before.weight.format.codec == into.codec and before.weight.format != into:
            was = {k: v for k, v in vars(before.weight.format).items() if v != getattr(into, k)}
            return f"the weight is stored with other settings than in the source, which has {was}"
        # the companions may be the source's (old releases write fewer) or those that are written now
        found = [_parts_unlike(stored, usual, fixed=True) for usual in (before, StoredTensor(plain))]
        return None if None in found else found[-1]

    def _wrong_scales(self, codes: Codes, before: StoredTensor, exact: Tensor) -> str | None:
        """What is wrong with the scales of a weight in a package's layout, or None: both the package's choice for the values and the
        source's own scales are right.
        """
        own = before.held.codes(before.parts or {}).scale if before.held is not None else None
        if codes.scales_fit(exact) or (own is not None and torch.equal(own, codes.scale)):
            return None
        return "the scales are neither the source's nor those that the package gives to the exact values"

    def _of_group(self, name: str, group: Collection[str]) -> Tensor:
        """The exact weight ``name`` of a group; the whole group is rotated when its first weight is asked for."""
        if name not in self.exact:
            found = self.live.groups.rotated(self._weights_of(group))
            self.exact |= {f"{path}.weight": weight for path, weight in found.items()}
        return self.exact.pop(name)

    def _weights_of(self, group: Collection[str]) -> dict[str, Tensor]:
        """The weights of a group before any rotation."""
        found = {}
        for path in sorted(group):
            into = self.folded.read(f"{path}.weight").weight.format
            before = self._before(f"{path}.weight", into).weight
            found[path] = codecs.decode(_linear(self.base, f"{path}.weight", before))
        return found

    def _biases_of_group(self, group: Collection[str]) -> dict[str, Tensor]:
        biases = {path: self.base.read(f"{path}.bias").weight.tensors["weight"] for path in group}
        return self.live.groups.rotated_biases(biases, self._weights_of(group))

    def _as_replaced(self, name: str, before: StoredTensor, stored: StoredTensor) -> str | None:
        values, got = self.live.values[name], stored.weight.tensors["weight"]
        if stored.weight.format.quantised:
            return f"the tensor is stored as {stored.weight.format.label}, but the adapter's own values are plain"
        if not any(_same(got, v.to(got.dtype)) for v in (values, values.to(before.weight.format.dtype))):
            return "the tensor does not hold the adapter's own values"
        return self._wrong_dtype(before, got.dtype)

    def _as_turned(self, name: str, before: StoredTensor, stored: StoredTensor) -> str | None:
        """What is wrong with a bias that the live layer turns with the rows of its weight, or with a tensor to which the adapter
        adds, or None.
        """
        got, old = stored.weight.tensors["weight"], before.weight.tensors["weight"]
        group = self.live.groups.of(name.removesuffix(".bias"))
        if name not in self.live.biases:
            exact = old.to("cpu", torch.float64)
        elif group:
            exact = self._biases_of_group(group)[name.removesuffix(".bias")]
        else:
            exact = measures.rotated_bias(old, self.live.biases[name])
        exact = exact + self.live.sums.get(name, 0)
        if got.shape != exact.shape:
            return f"the tensor has the shape {tuple(got.shape)}, but {tuple(exact.shape)} in the source"
        error, rounding = measures.relative(got, exact), measures.relative(exact.to(got.dtype), exact)
        if not error <= 2 * rounding + 1e-6:
            return f"the relative error is {error:.2e}, and the rounding to its format explains {rounding:.2e}"
        return self._wrong_dtype(before, got.dtype)

    def _as_brought(self, name: str, now: str | None) -> str | None:
        """What is wrong with a tensor that the adapter brings and the base lacks, or None."""
        if now is None:
            return "the folded checkpoint lacks it, and transformers would make it up"
        stored, values = self.folded.read(name).weight, self.live.values[name]
        if stored.format.quantised:
            return f"the tensor is stored as {stored.format.label}, but the adapter's own values are plain"
        got = stored.tensors["weight"]
        if not _same(got, values.to(got.dtype)):
            return "the tensor does not hold the adapter's own values"
        return self._wrong_dtype(StoredTensor(codecs.dense(values)), got.dtype)

    def _unchanged(self, name: str, before: StoredTensor, stored: StoredTensor) -> str | None:
        if stored.weight.format.quantised:
            if not before.weight.format.quantised:
                return f"the tensor is stored as {stored.weight.format.label}, but plain in the source"
            if self._changed_format(before.weight.format, stored.weight.format):
                before = StoredTensor(codecs.encode(codecs.decode(before.weight), stored.weight.format))
            return _parts_unlike(stored, before)
        if before.held is not None and stored.held is not None:
            return _parts_unlike(stored, before)
        want, got = before.weight.tensors["weight"], stored.weight.tensors["weight"]
        if before.weight.format.quantised:
            want = codecs.decode(before.weight)
            want = want.t() if self.folded.transposed(name) else want
        if want.is_floating_point() == got.is_floating_point():
            want = want.to(got.dtype)
        if want.shape != got.shape and want.ndim == got.ndim and self.folded.is_buffer(name):
            # resize_token_embeddings cuts off a buffer with an entry for each token, or adds zeros
            grown = torch.zeros_like(got)
            common = tuple(slice(min(a, b)) for a, b in zip(want.shape, got.shape, strict=True))
            grown[common] = want[common]
            want = grown
        return self._wrong_dtype(before, got.dtype) if _same(got, want) else "the tensor differs from the source's"

    def _changed_format(self, before: WeightFormat, after: WeightFormat) -> bool:
        """Whether the fold gave a quantised weight another quantised format: another codec, or what the record says."""
        said = self.record.base.get("format") if self.record is not None else None
        return before.codec != after.codec or (said == after.codec and before != after)

    def _wrong_dtype(self, before: StoredTensor, dtype: torch.dtype) -> str | None:
        """What is wrong with a plain tensor's dtype, or None: the source's dtype and the config's are both right."""
        fine = {dtype_in_config(self.folded.checkpoint) if self.folded.checkpoint.config else dtype}
        fine |= set() if before.weight.format.quantised else {before.weight.format.dtype}
        return (
            None
            if dtype in fine
            else f"the tensor is stored as {dtype}, expected is {' or '.join(sorted(map(str, fine)))}"
        )


def _rounding(stored: StoredTensor, codes: Codes, exact: Tensor) -> float:
    """The relative error of storing ``exact`` in a package's layout, with the scales and zeros that are stored."""
    assert stored.held is not None  # noqa: S101 - the codes are of such a weight
    error = measures.relative(stored.held.values(codes.of(exact)), exact)
    slack = torch.as_tensor(codes.slack, dtype=torch.float64).expand(exact.shape)
    return math.hypot(error, float(slack.norm() / exact.norm()))


def _linear(loaded: LoadedCheckpoint, name: str, encoded: EncodedWeight) -> EncodedWeight:
    """A weight as ``(out, in)``."""
    weight = encoded.tensors["weight"]
    if encoded.format.quantised:
        return encoded
    if weight.ndim == 4:
        return codecs.dense(weight.flatten(1))
    return codecs.dense(weight.t()) if loaded.transposed(name) else encoded


#: ends of the names of the tensors that say how a weight is stored, whatever its values are
_CONSTANT = (
    "quant_map", "weight_format", "weight_shape", "weight_g_idx", "axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size",
    "nbits", "offload_meta", "optimize", "packing", "quant_scale", "quant_zero", "round_zero", "shape", "stores_quant_config",
    "unpack_view_dtype", "view_as_float",
)  # fmt: skip


def _parts_unlike(stored: StoredTensor, expected: StoredTensor, *, fixed: bool = False) -> str | None:
    """How a quantised weight's tensors differ from the expected ones, or None; with ``fixed``, only the parts that do not
    depend on the weight's values are compared.
    """
    got, want = (s.parts or s.weight.format.kind.to_checkpoint("weight", s.weight) for s in (stored, expected))
    for name in sorted(got.keys() | want.keys()):
        if name not in got or name not in want:
            return f"the tensor {name} is missing" if name not in got else f"the tensor {name} should not be there"
        a, b = got[name], want[name]
        if "quant_state" in name:
            alike = fixed or unpack_state(a, name) == unpack_state(b, name)
        elif fixed and not name.endswith(_CONSTANT):
            alike = a.dtype == b.dtype and a.shape == b.shape
        else:
            alike = _same(a, b)
        if not alike:
            return f"the tensor {name} differs from {'its format' if fixed else 'the source'}'s"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
