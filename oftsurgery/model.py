"""Fold adapters into a live model and out of it: a plan applied to an ``nn.Module``, all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import peft_live
from .adapter import OFTAdapter
from .calibration import InputsOf, fold_calibrated
from .codecs import EncodedWeight, WeightFormat
from .errors import (
    CalibrationWarning,
    FormatError,
    IntegrityError,
    MatchError,
    OFTSurgeryError,
    RoundingWarning,
    StateError,
    UnfoldWarning,
    UntieWarning,
    WeakAdapterWarning,
    printable,
    warn_caller,
)
from .hashing import hash_tensors
from .layers import Layer, Undo
from .plan import FoldPlan, LayerInfo, Target, make_plan
from .record import ENOUGH, AdapterInfo, FoldRecord, ModuleRecord
from .sharing import share_model
from .undo_file import UndoParts, UndoRecord, UndoWriter
from .weight import FoldedWeight, begin_record, fold_encoded, unfold_encoded

__all__ = [
    "BaseSource",
    "Progress",
    "fold_model",
    "inner_model",
    "modules_of",
    "record_of",
    "restore_model",
    "source_of",
    "undo_model",
    "unfold_model",
]

M = TypeVar("M", bound=nn.Module)

#: called after each module with (modules done, modules in all, module path)
Progress = Callable[[int, int, str], None]

_ATTRIBUTE = "oftsurgery"


def inner_model(model: nn.Module) -> nn.Module:
    """The module behind ``torch.compile``'s wrapper, or ``model`` itself."""
    return getattr(model, "_orig_mod", model)


def record_of(model: nn.Module) -> FoldRecord | None:
    """The model's :class:`FoldRecord`, or None where nothing was folded."""
    record = inner_model(model).__dict__.get(_ATTRIBUTE)
    return record if isinstance(record, FoldRecord) else None


def fold_model(
    model: nn.Module,
    adapters: Sequence[OFTAdapter] | None,
    *,
    names: Sequence[str] | None = None,
    already: Mapping[str, str | None] | None = None,
    rounding: str = "nearest",
    calibrate: Callable[[nn.Module, FoldPlan], InputsOf] | None = None,
    undo: UndoWriter | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """:func:`oftsurgery.fold` for adapters that are already loaded.

    Args:
        model: plain, or with live peft layers.
        adapters: in the live order; None for the model's live ones.
        names: of live adapters, where ``adapters`` is None.
        already: ``{tensor name: content hash before, or None}`` of tensors that hold the adapters' own values already.
        rounding: of quantised weights; ``"calibrated"`` needs ``calibrate``.
        calibrate: gives the inputs of the layers of a model that is about to be folded.
        undo: takes what the fold changes, and is finished when all is done.
        inplace: change ``model`` itself.
        progress: called after each module.
    """
    live = peft_live.has_live_layers(inner_model(model))
    if live != (adapters is None):
        raise StateError(
            "the model carries live peft adapters, and an adapter to fold was given too"
            if live
            else "no adapter to fold was given, and the model carries no live peft adapter",
            remedy="fold(peft_model) folds its active adapters, fold(peft_model, ['name']) named ones; load the plain base model to fold files into it"
            if live
            else "give an OFTAdapter, its folder, or a list of them",
        )
    if adapters is None:
        adapters = peft_live.read_adapters(inner_model(model), names)
        already = dict.fromkeys(peft_live.trained_biases(inner_model(model), names))
    # everything is checked before anything is copied or changed; live layers hide their base layers until they are
    # taken out
    plan = None if live else _plan(model, adapters)
    with _transaction() as journal:
        work = peft_live.base_of(inner_model(model)) if live else model
        if not inplace:
            work = share_model(work, peft_live.inner_modules(work) if live else {})
        if live:
            peft_live.strip(work, journal)
        plan = plan or _plan(work, adapters)
        origin = source_of(work)
        keep = None if undo is None else _Keeper(undo, plan, origin, already or {}, modules_of(work))
        inputs_of = calibrate(work, plan) if calibrate is not None else None
        modules, saved = _apply(work, plan, journal, progress, _folding(rounding, inputs_of), keep=keep)
        before = record_of(work)
        record = FoldRecord(
            adapters=tuple(AdapterInfo.of(a) for a in plan.adapters),
            modules=modules,
            saved=_saved(saved, already or {}),
            rounding=rounding,
            earlier=(*before.earlier, replace(before, earlier=())) if before else (),
        )
        warn_of_calibration(record)
        warn_of_rounding(record)  # an error to whoever filters it so: then nothing has happened
        if undo is not None:
            undo.finish(record, ties=keep.ties if keep else (), tie_word_embeddings=origin.tie_word_embeddings)
        _set_record(inner_model(work), record)
    return work


def _saved(replaced: Mapping[str, str], already: Mapping[str, str | None]) -> dict[str, str | None]:
    """Hashes of what the base held: of what was replaced now, unless it had been replaced before."""
    return {
        **replaced,
        **{name: before for name, before in already.items() if before is not None or name not in replaced},
    }


@contextmanager
def _transaction() -> Iterator[list[Undo]]:
    """A journal of undo steps, run backwards if the body fails (Ctrl-C included)."""
    journal: list[Undo] = []
    try:
        # what is made inside must be trainable, and on the devices of what is there, whatever the caller's surroundings
        with torch.inference_mode(False), _on_cpu():
            yield journal
    except BaseException:
        for undo in reversed(journal):
            undo()
        raise


def _on_cpu() -> AbstractContextManager[object]:
    # as a context, torch.device() takes part in every call of torch: only where what is made would be elsewhere
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """``{path: module}``, every name of a shared one, with compiled submodules under their plain names."""
    return {path.replace("_orig_mod.", ""): m for path, m in inner_model(model).named_modules(remove_duplicate=False)}


def _plan(model: nn.Module, adapters: Sequence[OFTAdapter]) -> FoldPlan:
    folded = record_of(model)
    if folded is not None:
        again = [a for a in adapters if a.fingerprint in folded.fingerprints()]
        if again:
            raise StateError(
                "this adapter is folded into the model already",
                path=again[0].source,
                remedy="unfold it first, or fold into the base model (record: model.oftsurgery)",
            )
    modules = modules_of(model)
    wanted = {path for a in adapters for path in a.modules}
    layers = {path: _info(Layer(path, m)) for path, m in modules.items() if path in wanted}
    tensors = {name: tuple(t.shape) for name, t in _tensors(modules).items()}
    return make_plan(adapters, layers, tensors, modules)


def _info(layer: Layer) -> LayerInfo:
    return LayerInfo(layer.kind, layer.read()[1], id(layer.module))


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{path}.{name}".lstrip("."): tensor
        for path, m in modules.items()
        for holder in (m._parameters, m._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    }


# --- applying a plan --------------------------------------------------------------------------------------------------


def _apply(
    model: nn.Module,
    plan: FoldPlan,
    journal: list[Undo],
    progress: Progress | None,
    recode: Recode,
    *,
    inverse: bool = False,
    keep: _Keeper | None = None,
) -> tuple[dict[str, ModuleRecord], dict[str, str]]:
    modules = modules_of(model)
    tied = _Tied(model)
    saved: dict[str, str] = {}
    if not inverse:
        for name, tensor in plan.saved.items():
            own = any(_covers(entry, name) for a in plan.adapters for entry in a.config.get("modules_to_save") or ())
            before = _tensors(modules)[name]
            saved[name] = _replace_tensor(modules, name, tensor, tied, journal, only_here=own)
            if keep is not None:
                keep.tensor(name, before, _tensors(modules)[name])
    records: dict[str, ModuleRecord] = {}
    for done, target in enumerate(plan.targets, start=1):
        untied = tied.shared(modules[target.path])
        if tied.places_of(modules[target.path]) > 1:
            untied = True
            _separate(modules, target.path, journal)
        layer = Layer(target.path, modules[target.path])
        try:
            encoded, home = layer.read()
            end = begin_record(encoded, target.chain, untied=untied)
            folded = recode(layer.kind, encoded, target, home)
            if keep is not None:
                keep.weight(target, encoded, folded)
            layer.write(folded.encoded, park=not untied, journal=journal)
            records[target.path] = end(folded)
        except OFTSurgeryError as error:
            raise error.within(target.path) from error.__cause__
        if progress is not None:
            progress(done, len(plan.targets), target.path)
    if any(r.untied for r in records.values()) or tied.broken:
        _untie_config(inner_model(model), journal)
    return records, saved


Recode = Callable[[str, EncodedWeight, Target, WeightFormat], FoldedWeight]


def _folding(rounding: str, inputs_of: InputsOf | None) -> Recode:
    """How a layer of a kind is folded: its weight, target and format to what replaces it."""

    def recode(kind: str, encoded: EncodedWeight, target: Target, home: WeightFormat) -> FoldedWeight:
        if inputs_of is None:
            return fold_encoded(encoded, target.chain, home, rounding)
        multiplies = home.quantised and kind != "embedding"
        return fold_calibrated(encoded, target.chain, home, inputs_of(target.path) if multiplies else None)

    return recode


class _Keeper:
    """Gives an undo record what a fold changes.

    Attributes:
        ties: names of tensors that are one and the same, of which the fold changes one.
    """

    def __init__(
        self,
        undo: UndoParts,
        plan: FoldPlan,
        origin: BaseSource,
        already: Mapping[str, object],
        modules: Mapping[str, nn.Module],
    ) -> None:
        self._undo = undo
        self._already = already
        self._changed = {f"{t.path}.weight" for t in plan.targets} | set(plan.saved)
        # a weight that the adapter brings itself is rotated from that; what comes back is the model's own
        brought = [t.path for t in plan.targets if f"{t.path}.weight" in plan.saved]
        self._own = {path: Layer(path, modules[path]).read()[0] for path in brought}
        self.ties = tuple(group for group in origin.groups if self._changed.intersection(group))

    def tensor(self, name: str, before: Tensor, after: Tensor) -> None:
        # where the adapter's own values were there before, the fold changes nothing
        if name not in self._already and name.rpartition(".weight")[0] not in self._own:
            self._undo.tensor(name, before, after)

    def weight(self, target: Target, before: EncodedWeight, folded: FoldedWeight) -> None:
        name = f"{target.path}.weight"
        others = [n for group in self.ties if name in group for n in group if n not in self._changed]
        same = next((n for n in others if n.endswith(".weight")), None)
        if same is not None:
            self._undo.shared(target.path, same, before, folded.encoded)
        else:
            before = self._own.get(target.path, before)
            self._undo.weight(target.path, before, folded.encoded, target.chain, folded.error, folded.kept_scales)


def _covers(entry: str, name: str) -> bool:
    """Whether ``modules_to_save``'s entry names the module of tensor ``name``, as peft matches it: by the end of the
    module's path.
    """
    parts = name.split(".")
    return any(".".join(parts[:i]).endswith(entry) for i in range(1, len(parts)))


def _separate(modules: dict[str, nn.Module], path: str, journal: list[Undo]) -> None:
    """Give the module at ``path`` alone a module of its own, over the same tensors: a live adapter replaces it in the
    place that it names, no other.
    """
    old = modules[path]
    new = copy.copy(old)
    for name, value in old.__dict__.items():
        if isinstance(value, dict) or name == "state":  # parameters, buffers, hooks; bitsandbytes' int8 state
            new.__dict__[name] = copy.copy(value)
    parent, _, name = path.rpartition(".")
    slots = inner_model(modules[parent])._modules
    journal.append(partial(slots.__setitem__, name, old))
    slots[name] = modules[path] = new


class _Tied:
    """Which parameters and modules several places of a model share."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.broken = False
        self._parents: dict[int, int] = {}
        for module in model.modules():
            for child in module._modules.values():
                self._parents[id(child)] = self._parents.get(id(child), 0) + 1
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.places.setdefault(id(parameter), []).append((module, name))

    def places_of(self, module: nn.Module) -> int:
        """In how many places of the model the module itself stands (a shared parent counts once)."""
        return self._parents.get(id(module), 0)

    def shared(self, module: nn.Module) -> bool:
        # after a replacement the new parameter is nobody else's
        return len(self.places.get(id(module._parameters.get("weight")), ())) > 1


def _replace_tensor(
    modules: Mapping[str, nn.Module], name: str, values: Tensor, tied: _Tied, journal: list[Undo], *, only_here: bool
) -> str:
    """Give a parameter or buffer new values (its own dtype and device); in all places that share it, or ``only_here``.
    Returns the old content's hash.
    """
    path, _, local = name.rpartition(".")
    module = modules[path]
    holder: dict[str, Any] = module._parameters if local in module._parameters else module._buffers
    old = holder[local]
    if old.is_meta:
        raise StateError(
            "the tensor is offloaded or not loaded; an adapter's own values cannot go there",
            tensor=name,
            remedy="load it on a device",
        )
    if values.is_floating_point() and not old.is_floating_point():
        raise FormatError(
            "the adapter brings its own values for a weight that is stored quantised",
            tensor=name,
            format=str(old.dtype).removeprefix("torch."),
            remedy="load the model with that module unquantised (llm_int8_skip_modules), as for training",
        )
    data = values.detach().to(device=old.device, dtype=old.dtype, copy=True)
    new: Any = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
    places = tied.places.get(id(old), [(module, local)])
    if only_here and len(places) > 1:
        tied.broken = True
        places = [(module, local)]
    tied.places[id(new)] = places
    for place, key in places:
        slots: dict[str, Any] = place._parameters if key in place._parameters else place._buffers
        journal.append(partial(slots.__setitem__, key, old))
        slots[key] = new
    return hash_tensors({name: old})


def _untie_config(model: nn.Module, journal: list[Undo]) -> None:
    """transformers ties embeddings again whenever it loads, unless the config says not to."""
    configs = [c for c in (getattr(model, "config", None),) if c is not None]
    configs += [c for c in (getattr(configs[0], "text_config", None),) if c is not None] if configs else []
    for config in configs:
        if getattr(config, "tie_word_embeddings", False):
            journal.append(partial(setattr, config, "tie_word_embeddings", True))
            config.tie_word_embeddings = False
    warn_caller(
        "a folded weight was shared with another module (tied embeddings): the two are apart now, the other one is as it was, and the model is larger",
        UntieWarning,
    )


def _set_record(model: nn.Module, record: FoldRecord | None) -> None:
    if record is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = record


def warn_of_rounding(record: FoldRecord) -> None:
    """One :class:`RoundingWarning` for the fold, if it rounded anything."""
    errors = {path: m for path, m in record.modules.items() if m.error > 0}
    if not errors:
        return
    worst = max(errors, key=lambda path: errors[path].error)
    formats = ", ".join(sorted({m.format for m in errors.values()}))
    middle = sorted(m.error for m in errors.values())[len(errors) // 2]
    kept = "" if record.kept is None else f"; {record.kept:.1%} of what the adapter changed is kept"
    warn_caller(
        f"folding rounded {len(errors)} weights to {formats}: relative error {middle:.2%} in the median, {errors[worst].error:.2%} at worst "
        f"({printable(worst)}){kept}{_of_outputs(errors.values())}; per module in the fold's record",
        RoundingWarning,
    )
    _warn_of_weak_adapter(record)


def _warn_of_weak_adapter(record: FoldRecord) -> None:
    """One :class:`WeakAdapterWarning` that names the modules in which rounding has put back what the adapter changed."""
    weak = record.weak
    if not weak:
        return
    named = ", ".join(f"{printable(path)} ({round(kept, 2) + 0.0:.0%})" for path, kept in list(weak.items())[:3])
    more = ", …" if len(weak) > 3 else ""
    overall = "" if record.kept is None else f" ({round(record.kept, 2) + 0.0:.0%} over all weights)"
    plain = any(record.modules[path].rounding != "preserve" for path in weak) and record.rounding != "preserve"
    remedy = 'Fold with rounding="preserve", which needs no data' if plain else "Fold with a calibration"
    warn_caller(
        f"the rounding has put back what the adapter changed in {len(weak)} of {len(record.modules)} weights: less than {ENOUGH:.0%} is "
        f"kept{overall}, in {named}{more}. {remedy}, into int8 or bfloat16, or keep the adapter live (oftsurgery.wrap)",
        WeakAdapterWarning,
    )


def _of_outputs(modules: Iterable[ModuleRecord]) -> str:
    """What calibration brought, where there was any."""
    measured = [(m.output_error, m.output_nearest) for m in modules if m.output_error is not None]
    if not measured:
        return ""
    ours, plain = (sorted(e or 0.0 for e in errors)[len(measured) // 2] for errors in zip(*measured, strict=True))
    return f"; outputs on held-out inputs: {ours:.2%} in the median, {plain:.2%} with plain rounding"


def warn_of_calibration(record: FoldRecord) -> None:
    """One :class:`CalibrationWarning` that names what was to be calibrated and is not, if anything."""
    left = {path: m.uncalibrated for path, m in record.modules.items() if m.uncalibrated is not None}
    if not left:
        return
    named = "; ".join(f"{printable(path)}: {why}" for path, why in list(left.items())[:_NAMED])
    more = f"; and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    warn_caller(
        f"{len(left)} of {len(record.modules)} weights are not calibrated, but rounded without data ({named}{more}); "
        "all are in the fold's record",
        CalibrationWarning,
    )


_NAMED = 5


# --- taking it out again ----------------------------------------------------------------------------------------------


def unfold_model(
    folded: nn.Module,
    adapters: Sequence[OFTAdapter],
    *,
    rounding: str = "nearest",
    inplace: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """:func:`oftsurgery.unfold` by rotating back."""
    record = record_of(folded)
    if record is not None and [a.fingerprint for a in record.adapters] != [a.fingerprint for a in adapters]:
        raise StateError(
            f"the model's last fold is of {', '.join(printable(a.source) for a in record.adapters)}, not of {', '.join(printable(a.source) for a in adapters)}",
            remedy="unfold the last fold first, with the same adapters in the same order",
        )
    with _transaction() as journal:
        work = folded if inplace else share_model(folded)
        modules = modules_of(work)
        wanted = {path for a in adapters for path in a.modules}
        layers = {path: _info(Layer(path, m)) for path, m in modules.items() if path in wanted}
        plan = make_plan(adapters, layers, {name: tuple(t.shape) for name, t in _tensors(modules).items()}, modules)
        records, _ = _apply(
            work,
            plan,
            journal,
            progress,
            lambda _, e, t, home: unfold_encoded(e, t.chain, home, rounding),
            inverse=True,
        )
        warn_of_unfold({path: m.error for path, m in records.items()}, record, len(plan.saved))
        _set_record(inner_model(work), _earlier(record))
    return work


def _earlier(record: FoldRecord | None) -> FoldRecord | None:
    """The record of the model once ``record``'s fold is out of it."""
    return replace(record.earlier[-1], earlier=record.earlier[:-1]) if record and record.earlier else None


def warn_of_unfold(errors: Mapping[str, float], record: FoldRecord | None, kept: int) -> None:
    """One :class:`UnfoldWarning`: the error of rotating back, with the fold's own where its record tells it; ``kept``
    tensors could not go back.
    """

    # the two roundings are independent to first order
    def total(path: str) -> float:
        before = record.modules[path].error if record and path in record.modules else 0.0
        return float((before**2 + errors[path] ** 2) ** 0.5)

    worst = max(errors, key=total)
    known = "including the fold's own" if record else "without the fold's own, which has no record here"
    stay = f"; {kept} tensors that the adapter had replaced (biases, modules_to_save) stay as they are" if kept else ""
    warn_caller(
        f"unfolded by rotating back: not bit-exact, relative error {total(worst):.2e} at worst ({printable(worst)}), {known}{stay}; "
        "unfolding with base=… restores exactly",
        UnfoldWarning,
    )


@dataclass(frozen=True, eq=False)
class BaseSource:
    """What a fold is restored from, a model or a checkpoint.

    Attributes:
        weight: module path and the format that it is wanted in → the stored weight, or None where there is no such
            module.
        tensor: name → plain tensor, or None.
        repacked: module path → whether a CPU forward has repacked its weight since.
        groups: names of parameters that are one and the same.
        tie_word_embeddings: of the base's config.
    """

    weight: Callable[[str, WeightFormat], EncodedWeight | None]
    tensor: Callable[[str], Tensor | None]
    repacked: Callable[[str], bool]
    groups: tuple[tuple[str, ...], ...] = ()
    tie_word_embeddings: bool | None = None


def source_of(base: nn.Module) -> BaseSource:
    """A model as a :class:`BaseSource`."""
    modules = modules_of(base)
    tensors = _tensors(modules)
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return BaseSource(
        weight=lambda path, _: Layer(path, modules[path]).read()[0] if path in modules else None,
        tensor=tensors.get,
        repacked=lambda path: Layer(path, modules[path]).repacked,
        groups=tuple(tuple(names) for names in groups.values() if len(names) > 1),
        tie_word_embeddings=getattr(getattr(inner_model(base), "config", None), "tie_word_embeddings", None),
    )


def restore_model(folded: nn.Module, base: BaseSource, *, inplace: bool = False) -> nn.Module:
    """:func:`oftsurgery.unfold` from the base: bit-exact, checked against the record's hashes; parameters that the fold
    untied are tied again.

    Raises:
        StateError: the folded model has no record.
        MatchError: the base lacks a module or tensor of the record.
        IntegrityError: the base's contents are not those that were folded, or the folded model was changed since in
        what the record does not name.
    """
    record = record_of(folded)
    if record is None:
        raise StateError(
            "the model carries no record of a fold", remedy="give the adapter instead: unfold(model, adapter)"
        )
    with _transaction() as journal:
        work = folded if inplace else share_model(folded)
        modules = modules_of(work)
        tied = _Tied(work)
        for path, module_record in record.modules.items():
            current, home = Layer(path, modules[path]).read()
            source = base.weight(path, home)
            if source is None:
                raise MatchError("the base lacks a folded module", module=path, remedy="give the model that was folded")
            # a weight that the adapter brought itself was rotated from that; the record has the base's own among the saved
            if f"{path}.weight" not in record.saved and source.fingerprint != module_record.before:
                raise _not_the_base(path, home, base.repacked(path))
            own = EncodedWeight(
                source.format, {k: t.to(current.tensors["weight"].device, copy=True) for k, t in source.tensors.items()}
            )
            Layer(path, modules[path]).write(own, park=not tied.shared(modules[path]), journal=journal)
        for name, before in record.saved.items():
            values = base.tensor(name)
            if values is None:
                raise MatchError(
                    "the base lacks a tensor that the adapter replaced",
                    tensor=name,
                    remedy="give the model that was folded",
                )
            if before is not None and hash_tensors({name: values}) != before:
                raise IntegrityError(
                    "the base's tensor is not the one that was replaced",
                    tensor=name,
                    remedy="give the very model that was folded",
                )
            _replace_tensor(modules, name, values, tied, journal, only_here=False)
        _check_rest(modules, base, {f"{path}.weight" for path in record.modules} | set(record.saved))
        _tie_again(work, base.groups, base.tie_word_embeddings, journal)
        _set_record(inner_model(work), _earlier(record))
    return work


def undo_model(folded: nn.Module, undo: UndoRecord, *, inplace: bool = False) -> nn.Module:
    """:func:`oftsurgery.unfold` by an undo record: bit-exact, checked against its hashes; parameters that the fold
    untied are tied again.

    Raises:
        StateError: the record's fold is not the model's last one.
        MatchError: the model lacks what the record restores.
        IntegrityError: a weight is not what the fold left.
        UndoError: the record is damaged.
    """
    undo.check_last(record_of(folded))
    with _transaction() as journal:
        work = folded if inplace else share_model(folded)
        modules = modules_of(work)
        tied = _Tied(work)
        _check_there(modules, undo)
        for path in undo.weights:
            same = undo.shared_with(path)
            layer = Layer(path, modules[path])
            current, _ = layer.read()
            if same is None:
                before = undo.weight(path, current)
            else:
                before = Layer(same, modules[same.rpartition(".")[0]]).read()[0]
                undo.check_shared(path, current, before)
            device = current.tensors["weight"].device
            own = EncodedWeight(before.format, {k: t.to(device, copy=True) for k, t in before.tensors.items()})
            layer.write(own, park=not tied.shared(modules[path]), journal=journal)
        for name in undo.tensors:
            now = _tensors(modules)[name]
            _replace_tensor(modules, name, undo.tensor(name, now), tied, journal, only_here=False)
        _tie_again(work, undo.ties, undo.tie_word_embeddings, journal)
        _set_record(inner_model(work), _earlier(undo.fold))
    return work


def _check_there(modules: Mapping[str, nn.Module], undo: UndoRecord) -> None:
    same = [name for path in undo.weights for name in (undo.shared_with(path),) if name is not None]
    there = _tensors(modules)
    lost = [f"{path}.weight" for path in undo.weights if path not in modules]
    lost += [name for name in (*same, *undo.tensors) if name not in there]
    if lost:
        raise MatchError(
            f"the model lacks {len(lost)} of the tensors that the undo record restores",
            tensor=lost[0],
            path=undo.path,
            remedy="give the model that was folded",
        )


def _not_the_base(path: str, home: WeightFormat, repacked: bool) -> IntegrityError:
    if repacked:
        return IntegrityError(
            "a CPU forward has repacked the base's 4-bit weight since the fold, and rounded its absmax to bfloat16: it is not the base any more",
            module=path,
            format=home.label,
            remedy="load the base again; `module.support_avx512bf16_for_cpu = False` keeps bitsandbytes from repacking",
        )
    return IntegrityError(
        "the base's weight is not the one that was folded",
        module=path,
        format=home.label,
        remedy="give the very model that was folded",
    )


def _check_rest(modules: Mapping[str, nn.Module], base: BaseSource, restored: set[str]) -> None:
    """What the fold did not touch must be the base's still: after a training step, "restored exactly" would not be
    true.
    """
    for name, tensor in _tensors(modules).items():
        other = base.tensor(name)
        if (
            name in restored
            or other is None
            or tensor.is_meta
            or other.is_meta
            or tensor.data_ptr() == other.data_ptr()
        ):
            continue
        quantised = Layer(
            name, modules[name.rpartition(".")[0]]
        ).quantised  # compared by their codes, which a CPU forward tiles
        if not quantised and not (
            tensor.shape == other.shape and torch.equal(tensor.cpu(), other.cpu().to(tensor.dtype))
        ):
            raise IntegrityError(
                "the folded model differs from the base in a tensor that the fold did not touch",
                tensor=name,
                remedy="one of the two was changed since (trained, cast, resized); rotate back with the adapter instead",
            )


def _tie_again(
    model: nn.Module, groups: Sequence[Sequence[str]], tie_word_embeddings: bool | None, journal: list[Undo]
) -> None:
    modules = modules_of(model)
    for names in groups:
        places = [
            (modules[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in names if n.rpartition(".")[0] in modules
        ]
        slots: list[tuple[dict[str, Any], str]] = [(m._parameters, key) for m, key in places if key in m._parameters]
        for parameters, key in slots[1:]:
            journal.append(partial(parameters.__setitem__, key, parameters[key]))
            parameters[key] = slots[0][0][slots[0][1]]
    config = getattr(inner_model(model), "config", None)
    if tie_word_embeddings is not None and config is not None:
        for part in (config, getattr(config, "text_config", None)):
            if part is not None and hasattr(part, "tie_word_embeddings"):
                journal.append(partial(setattr, part, "tie_word_embeddings", part.tie_word_embeddings))
                part.tie_word_embeddings = tie_word_embeddings
