"""Fold adapters into a live model and out of it: all planned changes are applied to an ``nn.Module``, or none is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.trained_on import TrainedOn
from oftsurgery.dtype_names import name_of
from oftsurgery.errors import IntegrityError, StateError, module_in_errors
from oftsurgery.formats.codecs import dense
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.other_libraries import is_of
from oftsurgery.progress import Progress
from oftsurgery.stores.dequantised import method_of
from oftsurgery.stores.layers import Layer, Undo, swap_modules
from oftsurgery.stores.live_model import LiveStore, fields_in, record_of, set_record
from oftsurgery.stores.live_quantisation import settings_in
from oftsurgery.stores.model_copy import share_model
from oftsurgery.stores.modules import inner_model, tensors_in
from oftsurgery.stores.package_layers import package_of, plain_layers
from oftsurgery.stores.peft_live import LiveAdapters, strip
from oftsurgery.stores.store import Store
from oftsurgery.stores.ties import FLAG
from oftsurgery.stores.vocabulary import Vocabulary
from oftsurgery.weights.calibrate import InputsOf

from . import engine
from .live_formats import LiveFormats, dtype_of, put_module, put_tensor
from .plan import FoldPlan, Replace, plan_changes, takes_no_values
from .undo_reader import UndoRecord
from .undo_writer import UndoWriter


def fold_model(
    model: nn.Module,
    adapters: Sequence[OFTAdapter] | None,
    *,
    names: Sequence[str] | None = None,
    format: str = "same",
    double_quant: bool = False,
    already: Mapping[str, str | None] | None = None,
    rounding: str = "nearest",
    calibrate: Callable[[nn.Module, FoldPlan], InputsOf] | None = None,
    calibration: Mapping[str, Any] = MappingProxyType({}),
    undo: UndoWriter | None = None,
    partial_adapters: bool = False,
    trained_on: TrainedOn | None = None,
    inplace: bool = False,
    base_at_hand: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """:func:`oftsurgery.fold` for adapters that are already loaded.

    Args:
        adapters: the adapters in the live order; None for the model's live adapters.
        names: the names of live adapters, where ``adapters`` is None.
        format, double_quant: as for :func:`oftsurgery.fold`.
        already: ``{tensor name: content hash before, or None}`` of tensors that hold the adapters' own values already.
        rounding: the rounding of quantised weights; ``"calibrated"`` needs ``calibrate``.
        calibrate: function that gives the inputs of the layers of a model that is about to be folded.
        calibration: what decides these inputs, for the record.
        undo: writer that takes the fold's changes and is finished after the last one.
        trained_on: what the adapters were trained on, where somebody says it.
        partial_adapters: whether to fold adapters that lack modules which their own configs target.
        base_at_hand: whether the caller's own model stays as it is.
    """
    live = LiveAdapters(model)
    if live and adapters is not None:
        raise StateError(
            "the model carries live peft adapters, and an adapter to fold was given too",
            remedy="fold(peft_model) folds the active adapters, fold(peft_model, ['name']) named ones; to fold files, load the plain base model",
        )
    if not live and adapters is None:
        message = "no adapter to fold was given, and the model carries no live peft adapter"
        raise StateError(message, remedy="give an OFTAdapter, its folder, or a list of them")
    if adapters is None:
        adapters = live.read(names)
        already = dict.fromkeys(live.trained_biases(names))
    package = _package_in(live.modules, format)
    # everything is checked before anything is copied or changed; live layers, and plain layers in the places of a package's own,
    # hide their base layers until `strip`
    given = None if live or package is not None else LiveStore(model, live.modules)
    plan = None if given is None else plan_changes(given, adapters, partial=partial_adapters)
    if plan is not None and undo is not None:
        engine.check_undo(plan)
    with transaction() as journal:
        work = _base_to_change(model, live, inplace=inplace, journal=journal)
        store = LiveStore(work)
        ties = (given or store).ties  # the ties before anything changes
        formats = LiveFormats(store, format, double_quant, journal, dequantised=package is not None or _named_in(work))
        if undo is not None and formats.converts:
            raise engine.no_undo(format)
        plan = formats.planned(plan or plan_changes(store, adapters, partial=partial_adapters))
        inputs_of = calibrate(work, plan) if calibrate is not None else None
        operation = engine.Operation(plan, rounding, inputs_of, undo, already or {}, sibling_in(store))
        own = {name: store.at(name).read()[0] for name in operation.brought}
        _replace(formats, operation)
        done = _rotate(formats, operation, progress, own)
        formats.convert_rest(done)
        _separate(store, plan, journal)
        set_vocabulary(store, plan.vocabulary, journal)
        record = engine.fold_record(plan, store.record, operation.modules, operation.saved, rounding)
        record = replace(formats.stated(record), calibrated_on=calibration)
        if trained_on is not None:
            record = replace(record, base={**record.base, **trained_on.facts})
        engine.finish_fold(record, plan, ties, on_disk=False, base_at_hand=base_at_hand)
        if undo is not None:
            undo.finish(record, ties=plan.apart, tie_word_embeddings=ties.flag)
        set_record(work, record)
    return work


def _package_in(modules: Mapping[str, nn.Module], format: str) -> str | None:
    """The package other than bitsandbytes that holds weights of the model quantised, or None.

    Raises:
        StateError: ``format`` keeps the package's own format, or the package holds all tensors of the model in a store of its own.
    """
    package = next((found for found in map(package_of, modules.values()) if found is not None), None)
    kept = next((p for p, m in modules.items() if is_of("compressed_tensors", m._parameters, "OffloadCache")), None)
    if kept is not None:
        raise StateError(
            "a forward has put the model's tensors into a store of compressed-tensors, in which no tensor takes another dtype",
            module=kept,
            remedy="load the model with CompressedTensorsConfig(dequantize=True), or fold the checkpoint on disk: oftsurgery.fold_checkpoint",
        )
    if package is not None and format == "same":
        raise StateError(
            f"the model's weights are stored as {package}, which oftsurgery reads and does not write in memory",
            format=format,
            remedy="choose format='bf16' or 'fp16' for the exactly rotated weights, or format='nf4' or 'int8' for 4 or 8 bits; a fold of the "
            "checkpoint on disk (oftsurgery.fold_checkpoint) also keeps the formats of hqq, compressed-tensors and fp8",
        )
    return package


def _named_in(model: nn.Module) -> bool:
    """Whether the model's config names another package than bitsandbytes, whose weights were dequantised as the model was loaded."""
    return method_of(settings_in(model)) not in (None, "bitsandbytes")


def _base_to_change(model: nn.Module, live: LiveAdapters, *, inplace: bool, journal: list[Undo]) -> nn.Module:
    """The base model, or its copy, with base layers in place of live layers, and plain layers in place of those of other packages."""
    plain = plain_layers(live.modules)
    inside = {wrapper: plain.get(id(base), base) for wrapper, base in live.inner_modules.items()} | plain
    work = live.base if live else model
    if not inplace:
        work = share_model(work, inside)
    elif plain and not live:
        swap_modules(work, plain, journal)
    if live:
        strip(work, inside if inplace else {}, journal)
    return work


@contextmanager
def transaction() -> Iterator[list[Undo]]:
    """A journal of undo steps, run backwards if the body fails (Ctrl-C included)."""
    journal: list[Undo] = []
    try:
        # new tensors must be trainable and on the old tensors' devices, whatever contexts the caller has entered
        with torch.inference_mode(False), _on_cpu():
            yield journal
    except BaseException:
        for undo in reversed(journal):
            undo()
        raise


def _on_cpu() -> AbstractContextManager[object]:
    # the context torch.device() slows every call of torch: it is entered only where torch's default device is not the CPU
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


# --- applying changes -------------------------------------------------------------------------------------------------


def _replace(formats: LiveFormats, operation: engine.Operation) -> None:
    """Give tensors the adapters' own values."""
    for change in operation.plan.replace:
        dense = formats.target.dense if operation.brought.isdisjoint(change.places) else None
        before, after = replace_tensor(formats.store, change, formats.journal, dense)
        for name in operation.plan.recorded(change):
            operation.replaced(name, before, after)


def _rotate(
    formats: LiveFormats,
    operation: engine.Operation,
    progress: Progress | None,
    own: Mapping[str, EncodedWeight] = MappingProxyType({}),
) -> set[nn.Module]:
    """Rotate the weights; the result is the layers that hold the rotated weights."""
    store, journal = formats.store, formats.journal
    changes, layers = operation.plan.rotate, set()
    for done, change in enumerate(changes, start=1):
        if change.untied:
            separate_module(store.modules, change.path, journal)
        layer = store.at(change.name)
        with module_in_errors(change.path):
            before, _ = layer.read()
            new = operation.rotate(change, before, change.format, own.get(change.name, before))
            layers.add(formats.put(layer, new, park=not change.untied))
        if progress is not None:
            progress(done, len(changes), change.path)
    return layers


def sibling_in(store: LiveStore) -> Callable[[str], EncodedWeight]:
    """A function that reads a weight by its name."""
    return lambda name: store.at(name).read()[0]


def separate_module(modules: dict[str, nn.Module], path: str, journal: list[Undo]) -> None:
    """Where other places hold the module at ``path`` too, put a new module over the same tensors at ``path``: a live
    adapter replaces the module only in the place that the adapter names. A parent in two places counts once.
    """
    old = modules[path]
    parent, _, name = path.rpartition(".")
    slots = modules[parent]._modules
    if places_of(modules, old) < 2:
        return
    new = share_model(old)
    for key, parameter in old._parameters.items():
        if type(parameter) is nn.Parameter:  # both modules share it; bitsandbytes changes its own Parameters in place
            new._parameters[key] = parameter
    journal.append(partial(slots.__setitem__, name, slots[name]))
    slots[name] = modules[path] = new


def places_of(modules: Mapping[str, nn.Module], module: nn.Module) -> int:
    """The number of places in the model that hold the module."""
    parents = {id(m): m for m in modules.values()}.values()
    children = (child for parent in parents for child in parent._modules.values() if child is not None)
    return sum(inner_model(child) is module for child in children)


def replace_tensor(
    store: LiveStore, change: Replace, journal: list[Undo], dtype: torch.dtype | None = None
) -> tuple[Tensor | EncodedWeight, Tensor]:
    """Give a parameter or buffer an adapter's own values (on the old device, floats in ``dtype`` or else in the old dtype), in
    all places of the change; return the old tensor and the new one. The weight of a bitsandbytes layer becomes plain.
    """
    old: Any = tensors_in(store.modules)[change.name]
    if old.is_meta:
        message = "the tensor is offloaded or not loaded, and cannot take an adapter's own values"
        raise StateError(message, tensor=change.name, remedy="load the tensor's module on a device")
    if store.in_bitsandbytes(change.name):
        return _make_plain(store, change, journal, dtype)
    if change.values.is_floating_point() and not old.is_floating_point():
        raise takes_no_values(change.name, name_of(old.dtype))
    into = dtype if dtype is not None and old.is_floating_point() else old.dtype
    data = change.values.detach().to(device=old.device, dtype=into, copy=True)
    new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
    for place in change.places:
        put_tensor(store.modules, place, new, journal)
        if new.shape != old.shape:
            _set_rows(store.modules[place.rpartition(".")[0]], int(new.shape[0]), journal)
    return old, new


#: attributes of modules that state the number of rows of the module's weight
_ROWS = ("num_embeddings", "out_features")


def _set_rows(module: nn.Module, rows: int, journal: list[Undo]) -> None:
    """State the number of rows of an embedding or a linear layer whose tensors have taken another number of rows."""
    for name in _ROWS:
        if name in module.__dict__:
            journal.append(partial(setattr, module, name, getattr(module, name)))
            setattr(module, name, rows)


def set_vocabulary(store: LiveStore, vocabulary: Vocabulary | None, journal: list[Undo]) -> None:
    """State another number of tokens where transformers' own resizing does: in the model's config and in ``model.vocab_size``."""
    if vocabulary is None:
        return
    inner: Any = inner_model(store.model)
    fields = list(fields_in(inner.config, vocabulary))
    if "vocab_size" in inner.__dict__:
        fields.append((inner, "vocab_size", vocabulary.after))
    for part, name, value in fields:
        journal.append(partial(setattr, part, name, getattr(part, name)))
        setattr(part, name, value)


def _make_plain(
    store: LiveStore, change: Replace, journal: list[Undo], dtype: torch.dtype | None
) -> tuple[Tensor | EncodedWeight, Tensor]:
    """Put a plain linear layer with an adapter's own values in place of a bitsandbytes layer, as transformers loads the module
    where `llm_int8_skip_modules` names it. transformers does not quantise a head that the checkpoint lacks, and bitsandbytes
    cannot compute with such a layer.
    """
    path = change.name.removesuffix(".weight")
    module: Any = store.modules[path]
    old, bias, quantised = module.weight, module.bias, store.is_quantised(change.name)
    before = store.at(change.name).read()[0] if quantised else old
    if getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D":
        raise takes_no_values(change.name, before.format.label if quantised else name_of(old.dtype))
    usual = bias.dtype if bias is not None and bias.is_floating_point() else dtype_of(store)
    linear = nn.Linear(module.in_features, change.values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(
        change.values.detach().to(device=old.device, dtype=dtype or (usual if quantised else old.dtype), copy=True),
        requires_grad=False,
    )
    linear.bias = bias
    for place in change.places:
        put_module(store.modules, place.removesuffix(".weight"), linear.train(module.training), journal)
    return before, linear.weight


def _separate(store: LiveStore, plan: FoldPlan, journal: list[Undo]) -> None:
    """Give tensors that the plan separates a Parameter and a storage each, where transformers would load them so, and
    clear the flag in the config.
    """
    if not plan.clears_flag:
        return
    for group in plan.apart:
        seen = set()
        for name in group:
            tensor: Any = store.tensor(name)
            # transformers' save_pretrained leaves out one of two tensors that share a storage
            if id(tensor) in seen and type(tensor) is nn.Parameter:
                tensor = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
                put_tensor(store.modules, name, tensor, journal)
            seen.add(id(tensor))
    _set_flag(store.model, value=False, journal=journal)


def _set_flag(model: nn.Module, *, value: bool, journal: list[Undo]) -> None:
    """Set ``tie_word_embeddings`` in the model's configs: by this flag transformers ties embeddings when it loads."""
    whole = getattr(inner_model(model), "config", None)
    for config in (whole, getattr(whole, "text_config", None)):
        if getattr(config, FLAG, value) != value:
            journal.append(partial(setattr, config, FLAG, getattr(config, FLAG)))
            setattr(config, FLAG, value)


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
    with transaction() as journal:
        work = folded if inplace else share_model(folded)
        store = LiveStore(work)
        plan = plan_changes(store, adapters, inverse=True)
        formats = LiveFormats(store, "same", double_quant=False, journal=journal)
        for change in plan.turned:
            replace_tensor(store, change, journal)
        operation = engine.Operation(plan, rounding, sibling=sibling_in(store))
        _rotate(formats, operation, progress)
        engine.finish_unfold(plan, operation.modules, store.record)
        set_record(work, engine.earlier_record(store.record))
    return work


def restore_model(folded: nn.Module, base: Store, *, inplace: bool = False) -> nn.Module:
    """:func:`oftsurgery.unfold` from the base: bit-exact and checked against the record's hashes; parameters that the
    fold untied are tied again.

    Raises:
        StateError: the folded model has no record.
        MatchError: the base lacks a module or tensor of the record.
        IntegrityError: the base is not the model that was folded, or a tensor that the fold did not touch has changed
            since.
    """
    record = record_of(folded)
    if record is None:
        raise StateError(
            "the model has no record of a fold", remedy="give the adapter in place of the base: unfold(model, adapter)"
        )
    if "format" in record.base:
        raise engine.other_format("model")
    with transaction() as journal:
        work = folded if inplace else share_model(folded)
        store = LiveStore(work)
        wanted = engine.originals(record, base)
        set_vocabulary(store, store.vocabulary({o.name: base.shape(o.at) for o in wanted}), journal)
        for original in wanted:
            if original.weight or base.is_quantised(original.at):
                found = base.weight(original.at, store.at(original.name).read()[1])
                repacked = isinstance(base, LiveStore) and base.at(original.at).repacked
            else:
                tensor = base.tensor(original.at)
                found, repacked = None if tensor is None else dense(tensor), False
            assert found is not None  # noqa: S101 - it was located
            original.check(found, repacked=repacked)
            if found.format.quantised and not store.is_quantised(original.name):
                _put_layer_back(store, original, base, journal)
            _put_back(store, original.name, found, journal, weight=original.weight or found.format.quantised)
        _check_rest(store, base, {o.name for o in wanted})
        _tie_again(store, base.ties.groups, base.ties.flag, journal)
        set_record(work, engine.earlier_record(record))
    return work


def undo_model(folded: nn.Module, undo: UndoRecord, *, inplace: bool = False) -> nn.Module:
    """:func:`oftsurgery.unfold` by an undo record: bit-exact and checked against the record's hashes; parameters that the
    fold untied are tied again.

    Raises:
        StateError: the record's fold is not the model's last fold.
        MatchError: the model lacks a tensor that the record restores.
        IntegrityError: a weight has changed since the fold.
        UndoError: the record is damaged.
    """
    with transaction() as journal:
        work = folded if inplace else share_model(folded)
        store = LiveStore(work)
        weights = {f"{path}.weight" for path in undo.weights}
        # all tensors are read before the first one is put back: two names may be one tensor
        found = {
            name: (back, store.at(name).read()[0] if name in weights else dense(tensors_in(store.modules)[name]))
            for name, back in engine.undone(undo, store).items()
        }
        originals = {name: back(current) for name, (back, current) in found.items()}
        set_vocabulary(store, store.vocabulary({n: o.format.shape for n, o in originals.items()}), journal)
        for name, original in originals.items():
            _put_back(store, name, original, journal, weight=name in weights)
        _tie_again(store, undo.ties, undo.tie_word_embeddings, journal)
        set_record(work, engine.earlier_record(undo.fold))
    return work


def _put_layer_back(store: LiveStore, original: engine.Original, base: Store, journal: list[Undo]) -> None:
    """Put a bitsandbytes layer in place of the plain layer of a weight that the fold has made plain."""
    path = original.name.removesuffix(".weight")
    if not isinstance(base, LiveStore):
        raise StateError(
            "the fold has put a plain layer in place of a bitsandbytes layer, and a folder has no layer to put back",
            module=path,
            remedy="load the base with transformers, and give the model: unfold(folded, base=model)",
        )
    layer = share_model(base.modules[original.at.removesuffix(".weight")])
    layer._parameters["bias"] = store.modules[path]._parameters["bias"]
    put_module(store.modules, path, layer, journal)


def _put_back(store: LiveStore, name: str, before: EncodedWeight, journal: list[Undo], *, weight: bool) -> None:
    """Put a copy of the original ``before`` at ``name`` and in all places that share the tensor."""
    group = store.ties.group(name)  # the folded model's ties
    if not weight:
        replace_tensor(store, Replace(name, before.tensors["weight"], group), journal)
        return
    layer = store.at(name)
    device = layer.read()[0].tensors["weight"].device
    own = EncodedWeight(before.format, {k: t.to(device, copy=True) for k, t in before.tensors.items()})
    layer.write(own, park=len(group) == 1, journal=journal)


def _check_rest(store: LiveStore, base: Store, restored: set[str]) -> None:
    """Refuse a folded model whose untouched tensors are not the base's: after a training step, the restored model would
    not be exactly the base.
    """
    for name, tensor in tensors_in(store.modules).items():
        if name in restored or tensor.is_meta:
            continue
        other = base.tensor(name)
        if other is None or other.is_meta or tensor.data_ptr() == other.data_ptr():
            continue
        # the codes of quantised weights are not compared, since a CPU forward reorders them
        quantised = Layer(name, store.modules[name.rpartition(".")[0]]).quantised
        if not quantised and not (
            tensor.shape == other.shape and torch.equal(tensor.cpu(), other.cpu().to(tensor.dtype))
        ):
            raise IntegrityError(
                "the folded model differs from the base in a tensor that the fold did not touch",
                tensor=name,
                remedy="one of the two models was changed since (trained, cast, resized): unfold with the adapter, which rotates back",
            )


def _tie_again(store: LiveStore, groups: Sequence[Sequence[str]], flag: bool | None, journal: list[Undo]) -> None:
    """Make each group of names one parameter again, and restore the config's setting of ties."""
    for names in groups:
        there = [n for n in names if isinstance(store.tensor(n), nn.Parameter)]
        for name in there[1:]:
            put_tensor(store.modules, name, store.tensor(there[0]), journal)
    if flag is not None:
        _set_flag(store.model, value=flag, journal=journal)
