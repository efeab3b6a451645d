"""Folds in memory and on disk compute, record and warn by this file, and keep here what an undo record needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import (
    CalibrationWarning,
    IdleWarning,
    IntegrityError,
    MatchError,
    RoundingWarning,
    SourceWarning,
    StateError,
    UnfoldWarning,
    UntieWarning,
    WeakAdapterWarning,
    printable,
    share,
    warn_caller,
)
from oftsurgery.formats.codecs import dense
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.hashing import hash_tensors
from oftsurgery.records.advice import Case, advice
from oftsurgery.records.record import ENOUGH, AdapterInfo, FoldRecord, ModuleRecord
from oftsurgery.stores.store import Store
from oftsurgery.stores.ties import Ties
from oftsurgery.weights import kernels
from oftsurgery.weights.calibrate import InputsOf, fold_calibrated
from oftsurgery.weights.fold import begin_record, fold_encoded, resolved, rotate_group, store_exact

from .plan import FoldPlan, Rotate
from .undo_reader import UndoRecord
from .undo_writer import UndoCollector

#: the number of modules that a warning names
_NAMED = 5
#: how many times as far as the adapter the rounding may move the weights, in the median, before a warning says so
_MANY = 10


# --- computing --------------------------------------------------------------------------------------------------------


#: records that other threads may still be at work on
_UNFINISHED = 4


@dataclass(eq=False)
class Operation:
    """One run of a plan: the operation computes the changes, gives them to the undo record, and collects the fold's record.

    Attributes:
        plan: the plan whose changes are applied.
        rounding: the rounding of quantised weights that are rotated.
        inputs_of: function that gives the inputs of the layer at a path; None without a calibration.
        undo: collector of an undo record; or None.
        already: ``{tensor name: content hash before, or None}`` of tensors that held the adapters' own values before the
            fold; the fold does not change these tensors.
        saved: ``{tensor name: content hash before, or None}`` of the replaced tensors.
        brought: names of weights that take an adapter's own values and are then rotated.
        sibling: function that reads another weight of a group by its name.
    """

    plan: FoldPlan
    rounding: str
    inputs_of: InputsOf | None = None
    undo: UndoCollector | None = None
    already: Mapping[str, str | None] = field(default_factory=dict)
    sibling: Callable[[str], EncodedWeight] | None = None

    def __post_init__(self) -> None:
        self._records: dict[str, Callable[[], ModuleRecord]] = {}
        self._modules: dict[str, ModuleRecord] = {}
        self._exact: dict[str, Tensor] = {}  # of weights whose group is rotated already
        self.saved = dict(self.already)
        rotated = {r.name for r in self.plan.rotate}
        self.brought = {place for r in self.plan.replace for place in r.places if place in rotated}

    @property
    def modules(self) -> dict[str, ModuleRecord]:
        """``{path: record}`` of the rotated modules."""
        self.settle()
        return self._modules

    def settle(self, left: int = 0) -> None:
        """Finish all records but the last few; an unfinished record keeps its weight in memory."""
        while len(self._records) > left:
            path = next(iter(self._records))
            self._modules[path] = self._records.pop(path)()

    def replaced(self, name: str, before: Tensor | EncodedWeight, after: Tensor) -> None:
        """Record that a tensor took an adapter's own values."""
        if self.saved.get(name) is None:
            self.saved[name] = content_hash(name, before)
        if (
            self.undo is not None
            and isinstance(before, Tensor)
            and name not in self.already
            and name not in self.brought
        ):
            self.undo.tensor(name, before, after)

    def rotate(
        self,
        change: Rotate,
        before: EncodedWeight,
        into: WeightFormat,
        own: EncodedWeight,
        beside: Mapping[str, Any] | None = None,
    ) -> EncodedWeight:
        """The rotated weight in the format ``into``.

        Args:
            before: the weight to rotate.
            own: the weight that the model had, which is not ``before`` where the adapter brings its own.
            beside: small tensors of a checkpoint that do not follow from ``own``.
        """
        if self.inputs_of is None:
            kernels.prepare(before, into, self.rounding)
        chain = resolved(change.chain)
        end = begin_record(before, chain, untied=change.untied)
        if change.group:
            folded = store_exact(before, self._of_group(change, before, chain), into, self.rounding)
            chain = ()  # an undo record of one weight does not know the others
        elif self.inputs_of is None:
            folded = fold_encoded(before, chain, into, self.rounding, inverse=change.inverse)
        else:
            inputs = self.inputs_of(change.path) if change.takes_inputs(into) else None
            folded = fold_calibrated(before, chain, into, inputs)
        new = folded.encoded
        self._records[change.path] = end(folded)
        self.settle(_UNFINISHED)
        if self.undo is not None:
            same = None if change.name in self.brought else self.plan.partner(change.name)
            if same is not None:
                self.undo.shared(change.path, same, before, new)
            else:
                self.undo.weight(change.path, own, new, chain, folded.error, folded.kept_scales, beside)
        return new

    def _of_group(self, change: Rotate, before: EncodedWeight, chain: Sequence[WeightMap]) -> Tensor:
        """The exact values of a weight of a group; the whole group is rotated when its first weight is asked for."""
        if change.name not in self._exact:
            assert self.sibling is not None  # noqa: S101 - each applier sets the function
            group = [before if name == change.name else self.sibling(name) for name in change.group]
            self._exact |= dict(zip(change.group, rotate_group(group, chain, inverse=change.inverse), strict=True))
        return self._exact.pop(change.name)


def content_hash(name: str, tensor: Tensor | EncodedWeight) -> str:
    """The hash of the tensor ``name``, plain or quantised, as a record has it."""
    return tensor.fingerprint if isinstance(tensor, EncodedWeight) else hash_tensors({name: tensor})


_KEEP_BASE = "fold without undo=… (--undo), and keep the base: unfold with base=… restores exactly"


def check_undo(plan: FoldPlan, added: Collection[str] = ()) -> None:
    """Refuse an undo record of a fold that makes quantised weights plain, brings tensors that the base lacks, or rotates weights
    that take another number of rows.

    Raises:
        StateError: the plan has such tensors.
    """
    if added:
        raise StateError(
            "the adapter brings a head that the base lacks, and an undo record has no form for tensors that come or go",
            tensor=min(added),
            remedy=_KEEP_BASE,
        )
    rows = {} if plan.vocabulary is None else plan.vocabulary.shapes
    turned = next((change for change in plan.rotate if change.name in rows), None)
    if turned is not None:
        raise StateError(
            "the adapter brings another number of rows for a weight and rotates the weight, and an undo record has no form for both",
            module=turned.path,
            remedy=_KEEP_BASE,
        )
    if plan.dequantised:
        raise StateError(
            "the adapter brings its own values for a quantised weight, and an undo record has no form for a weight that becomes plain",
            module=min(plan.dequantised).removesuffix(".weight"),
            remedy=_KEEP_BASE,
        )


def no_undo(format: str) -> StateError:
    """The error for an undo record of a fold that changes the weights' formats."""
    return StateError(
        "an undo record restores the bytes that a fold changes, and this fold also changes the weights' formats",
        format=format,
        remedy="choose the format of the base: format='same' (--format same); or leave out undo=… (--undo), and keep the base",
    )


# --- going back -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Original:
    """A tensor that a fold changed, and the place of its original in the base.

    Attributes:
        name: the tensor's name in the fold's record.
        at: the tensor's name in the base.
        weight: whether the tensor was rotated and the adapter did not bring it.
        before: hash of the original; None where no record has it.
    """

    name: str
    at: str
    weight: bool
    before: str | None

    def check(self, *found: EncodedWeight, repacked: bool = False) -> None:
        """Refuse a base whose tensor is not the original.

        Args:
            found: the base's tensor as loading has it, and as it is stored where the stored dtype is another one.
            repacked: whether a CPU forward of bitsandbytes has repacked the base's weight.

        Raises:
            IntegrityError: no tensor of ``found`` is the original.
        """
        if self.before is None or self.before in map(self._hash, found):
            return
        if repacked:
            raise IntegrityError(
                "a CPU forward has repacked the base's 4-bit weight since the fold, and rounded its absmax to bfloat16: the weight has changed",
                module=self.name.removesuffix(".weight"),
                format=found[0].format.label,
                remedy="load the base again; with `module.support_avx512bf16_for_cpu = False` bitsandbytes does not repack",
            )
        remedy = "give exactly the model that was folded: base=… (--base)"
        if not self.weight:
            message = "the base's tensor is not the one that was replaced"
            raise IntegrityError(message, tensor=self.name, remedy=remedy)
        raise IntegrityError(
            "the base's weight is not the one that was folded",
            module=self.name.removesuffix(".weight"),
            format=found[0].format.label,
            remedy=remedy,
        )

    def _hash(self, found: EncodedWeight) -> str:
        return (
            found.fingerprint
            if self.weight or found.format.quantised
            else hash_tensors({self.name: found.tensors["weight"]})
        )


def originals(record: FoldRecord, base: Store) -> list[Original]:
    """The tensors that unfolding takes from ``base``.

    Raises:
        MatchError: the base lacks a tensor of the record.
    """
    weights = {f"{path}.weight": module.before for path, module in record.modules.items()}
    before = {**weights, **record.saved}
    found = base.locate(before)
    lost = next((name for name in before if name not in found), None)
    remedy = "give the model that was folded: base=… (--base)"
    if lost in weights:
        raise MatchError("the base lacks a folded module", module=lost.removesuffix(".weight"), remedy=remedy)
    if lost is not None:
        raise MatchError("the base lacks a tensor that the adapter replaced", tensor=lost, remedy=remedy)
    # where the adapter brought a weight and rotated it, the record has the base's weight in `saved`
    return [Original(n, found[n], n in weights and n not in record.saved, before[n]) for n in before]


def other_format(what: str, **where: Any) -> StateError:
    """The error where the base's bytes cannot be put back into a folded ``what``, a model or checkpoint."""
    return StateError(
        f"the folded {what} has another format than its base, so the base's bytes cannot be put back",
        remedy=f"use the base {what} itself, or rotate back with the adapter: adapter=… (--adapter)",
        **where,
    )


def undone(undo: UndoRecord, store: Store) -> dict[str, Callable[[EncodedWeight], EncodedWeight]]:
    """``{tensor name in the undo record: function from the folded tensor to its original}``. Each function checks hashes.

    Raises:
        StateError: the record's fold is not the store's last one.
        MatchError: the store lacks a tensor of the record.
    """
    undo.check_last(store.record)
    same = [name for path in undo.weights for name in (undo.shared_with(path),) if name is not None]
    wanted = [*(f"{path}.weight" for path in undo.weights), *same, *undo.tensors]
    found = store.locate(wanted)
    lost = [name for name in wanted if name not in found]
    if lost:
        message = f"the {store.what} lacks {len(lost)} of the tensors that the undo record restores"
        raise MatchError(message, tensor=lost[0], path=undo.path, remedy=f"give the {store.what} that was folded")

    def weight(path: str, current: EncodedWeight) -> EncodedWeight:
        other = undo.shared_with(path)
        if other is None:
            return undo.weight(path, current)
        before = store.weight(found[other], current.format)
        assert before is not None  # noqa: S101 - it was located
        undo.check_shared(path, before, current)
        return before

    def tensor(name: str, current: EncodedWeight) -> EncodedWeight:
        return dense(undo.tensor(name, current.tensors["weight"]))

    return {
        **{f"{path}.weight": partial(weight, path) for path in undo.weights},
        **{name: partial(tensor, name) for name in undo.tensors},
    }


# --- records and warnings ---------------------------------------------------------------------------------------------


def fold_record(
    plan: FoldPlan,
    before: FoldRecord | None,
    modules: Mapping[str, ModuleRecord],
    saved: Mapping[str, str | None],
    rounding: str,
) -> FoldRecord:
    """The record of a fold into a model that carries the folds of ``before``."""
    return FoldRecord(
        adapters=tuple(AdapterInfo.of(a) for a in plan.adapters),
        modules=modules,
        saved=saved,
        rounding=rounding,
        earlier=(*before.earlier, replace(before, earlier=())) if before else (),
        idle=plan.idle,
        missing=plan.missing,
        vocabulary=plan.recorded_vocabulary,
    )


def earlier_record(record: FoldRecord | None) -> FoldRecord | None:
    """The record that remains after ``record``'s last fold is taken out."""
    return replace(record.earlier[-1], earlier=record.earlier[:-1]) if record and record.earlier else None


def finish_fold(record: FoldRecord, plan: FoldPlan, ties: Ties, *, on_disk: bool, base_at_hand: bool = True) -> None:
    """Warn of what the fold did, before its result is visible: where a filter makes the warning an error, nothing has
    changed. ``base_at_hand`` says whether the model that was folded stays.
    """
    warn_of_missing(plan)
    warn_of_idle(plan)
    if plan.apart:
        reads = (
            ". The model computes with tie_word_embeddings, so its config keeps the setting: transformers 5 loads the two weights "
            "separately, and older releases would tie the weights again"
        )
        warn_caller(
            "a folded weight was shared with another module (tied embeddings): the two modules now have a weight each, the other "
            f"module's weight is unchanged, and the model is larger{reads if ties.flag and ties.flag_is_read() else ''}",
            UntieWarning,
        )
    _warn_of_calibration(record)
    _warn_of_rounding(record)
    _warn_of_weak_adapter(record, Case.of_record(record, on_disk=on_disk, base_at_hand=base_at_hand))


def warn_of_missing(plan: FoldPlan) -> None:
    """Give one :class:`SourceWarning` that names the modules which partial adapters lack, if any."""
    if plan.missing:
        warn_caller(
            f"the adapters lack {len(plan.missing)} modules that their own configs target; these modules stay as in the base "
            f"({_named(map(printable, plan.missing))})",
            SourceWarning,
        )


def warn_of_idle(plan: FoldPlan) -> None:
    """One :class:`IdleWarning` that names the layers whose rotation is left out, if any."""
    if plan.idle:
        warn_caller(
            f"{len(plan.idle)} of the adapter's rotations are left out: the model reads these layers' weights and never calls "
            f"the layers, so a live adapter has no effect on them ({_named(map(printable, plan.idle))})",
            IdleWarning,
        )


def _named(names: Iterable[str]) -> str:
    """The first names, and the number of the others."""
    all_ = list(names)
    return "; ".join(all_[:_NAMED]) + (f"; and {len(all_) - _NAMED} more" if len(all_) > _NAMED else "")


def _warn_of_calibration(record: FoldRecord) -> None:
    """Give one :class:`CalibrationWarning` that names the weights without a calibration, if any."""
    left = [f"{printable(p)}: {m.uncalibrated}" for p, m in record.modules.items() if m.uncalibrated is not None]
    if left:
        warn_caller(
            f"{len(left)} of {len(record.modules)} weights are not calibrated, but rounded without data ({_named(left)}); "
            "the fold's record names all of these weights",
            CalibrationWarning,
        )


def _warn_of_rounding(record: FoldRecord) -> None:
    """Give one :class:`RoundingWarning` with the errors of the rounding, if any weight was rounded."""
    errors = {path: m for path, m in record.modules.items() if m.error > 0}
    if not errors:
        return
    worst = max(errors, key=lambda path: errors[path].error)
    formats = ", ".join(sorted({m.format for m in errors.values()}))
    middle = sorted(m.error for m in errors.values())[len(errors) // 2]
    kept = "" if record.kept is None else f"; {share(record.kept, '.1%')} of what the adapter changed is kept"
    beside = sorted(m.rho for m in errors.values() if m.rho is not None)
    if beside and (many := beside[len(beside) // 2]) >= _MANY:
        kept += (
            f", but the rounding moves the weights {many:.0f} times as far as the adapter does, which 16 bits (format='bf16', --format bf16) "
            "would not"
        )
    warn_caller(
        f"folding rounded {len(errors)} weights to {formats}: relative error {middle:.2%} in the median, {errors[worst].error:.2%} at worst "
        f"({printable(worst)}){kept}{_of_outputs(errors.values())}; the fold's record has the error of each module",
        RoundingWarning,
    )


def _warn_of_weak_adapter(record: FoldRecord, case: Case | None) -> None:
    """Give one :class:`WeakAdapterWarning` if rounding has undone a part of the adapter's change."""
    weak = record.weak
    if case is None:
        return
    named = ", ".join(f"{printable(path)} ({share(kept)})" for path, kept in list(weak.items())[:3])
    more = ", …" if len(weak) > 3 else ""
    overall = "" if record.kept is None else f" ({share(record.kept)} over all weights)"
    warn_caller(
        f"the rounding has undone the adapter's change in {len(weak)} of {len(record.modules)} weights: less than {ENOUGH:.0%} of the change "
        f"is kept{overall}, in {named}{more}; {advice(case)}",
        WeakAdapterWarning,
    )


def _of_outputs(modules: Iterable[ModuleRecord]) -> str:
    """The outputs' errors with and without calibration; an empty text where no layer was calibrated."""
    measured = [(m.output_error, m.output_nearest) for m in modules if m.output_error is not None]
    if not measured:
        return ""
    ours, plain = (sorted(e or 0.0 for e in errors)[len(measured) // 2] for errors in zip(*measured, strict=True))
    return f"; outputs on held-out inputs: {ours:.2%} in the median, {plain:.2%} with plain rounding"


def finish_unfold(plan: FoldPlan, modules: Mapping[str, ModuleRecord], record: FoldRecord | None) -> None:
    """Warn once (:class:`UnfoldWarning`) of the error of rotating back; a ``record`` adds the error of the fold itself."""

    # the two roundings are independent to first order
    def total(path: str) -> float:
        before = record.modules[path].error if record and path in record.modules else 0.0
        return float((before**2 + modules[path].error ** 2) ** 0.5)

    worst = max(modules, key=total)
    known = "with the fold's own error" if record else "without the fold's own error, which no record states"
    exact = record is not None and "format" not in record.base
    way = "unfolding with base=… (--base) restores exactly" if exact else "only the base itself is the exact way back"
    kept = len(plan.replace) - len(plan.turned)
    stay = f"; {kept} tensors that the adapter had replaced (biases, modules_to_save) are not restored" if kept else ""
    if not total(worst):  # storing in float32 costs nothing
        known += ", beside the rounding of the products in float32"
    warn_caller(
        f"rotating back is not bit-exact: the largest relative error is {total(worst):.2e} ({printable(worst)}), {known}{stay}; {way}",
        UnfoldWarning,
    )
