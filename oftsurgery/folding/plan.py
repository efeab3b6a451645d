"""Plan what changes in a model: adapters matched to its layers and tensors by names and shapes, before anything is
computed or changed.

The functions are pure: a :class:`Store` says what the model has, and the result is a frozen :class:`FoldPlan`. An
adapter that does not fit is refused here. Only this file decides which tied tensors the fold separates.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.targets import missing_modules
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import AdapterError, FormatError, MatchError, ShapeError, StateError, printable
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.stores.meaning import Meaning
from oftsurgery.stores.store import LayerInfo, Store
from oftsurgery.stores.vocabulary import Vocabulary

from .chains import Chains, at_folded_strength, chains_of, one_module, summed, turned_biases
from .fused_names import fused_meanings


@dataclass(frozen=True, eq=False)
class Rotate:
    """One layer's weight is rotated, in its own place alone.

    Attributes:
        path: the module's path.
        format: the format of the module's weight; in a fold into a live model, the format that the rotated weight takes.
        chain: the rotations in the live order.
        untied: whether another place holds the same tensor.
        inverse: whether to rotate back.
        group: names of the weights that the chain acts on together, in the order of the rows; empty for this weight alone.
    """

    path: str
    format: WeightFormat
    chain: tuple[WeightMap, ...]
    untied: bool = False
    inverse: bool = False
    group: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The weight's name."""
        return f"{self.path}.weight"

    def takes_inputs(self, into: WeightFormat) -> bool:
        """Whether the layer's inputs can decide the rounding to ``into``: the format has codes to choose, and the model
        multiplies the inputs by the weight.
        """
        return into.kind.has_levels and self.chain[0].side != "embedding"


@dataclass(frozen=True, eq=False)
class Replace:
    """A tensor takes an adapter's own values.

    Attributes:
        name: the tensor's name.
        values: the adapter's values, in the shape of the tensor, or in its shape by the plan's vocabulary.
        places: names of all tensors that take the values: only ``name`` where the adapter brings the whole module
            (``modules_to_save``), else also every tensor that is still tied to ``name``.
        turned: whether the values come from the model's own: a bias turned with the rows of its weight, or a sum; unfolding
            changes such values back.
    """

    name: str
    values: Tensor
    places: tuple[str, ...]
    turned: bool = False


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """All changes that a fold makes.

    Attributes:
        adapters: the adapters in the live order.
        rotate: the rotations in the model's order.
        replace: the replacements, which are applied before the rotations.
        apart: groups of tied tensors that the fold separates.
        clears_flag: whether the fold clears the config's ``tie_word_embeddings``.
        dequantised: names of quantised weights that become plain with an adapter's own values.
        idle: paths of layers whose rotation is left out, since the model never calls these layers.
        missing: paths of modules that the adapters' configs target and the adapters lack; these modules stay as they are.
        vocabulary: the number of tokens that the adapters bring, where the model has another number.
    """

    adapters: tuple[OFTAdapter, ...] = ()
    rotate: tuple[Rotate, ...] = ()
    replace: tuple[Replace, ...] = ()
    apart: tuple[tuple[str, ...], ...] = ()
    clears_flag: bool = False
    dequantised: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None

    @property
    def turned(self) -> tuple[Replace, ...]:
        """The replacements by values that come from the model's own."""
        return tuple(r for r in self.replace if r.turned)

    @property
    def changed(self) -> set[str]:
        """Names of all tensors that change."""
        return {r.name for r in self.rotate} | {place for r in self.replace for place in r.places}

    @property
    def recorded_vocabulary(self) -> dict[str, int]:
        """The numbers of tokens before and after the fold, as the record has them; nothing where the number stays."""
        v = self.vocabulary
        return {} if v is None else {"before": v.before, "after": v.after}

    def recorded(self, change: Replace) -> tuple[str, ...]:
        """Names of the tensors that the record lists for a replacement: all its places where the fold separates them."""
        return change.places if any(change.name in group for group in self.apart) else (change.name,)

    def partner(self, name: str) -> str | None:
        """A weight that was tied to ``name`` and stays unchanged, or None."""
        group = next((g for g in self.apart if name in g), ())
        return next((n for n in group if n not in self.changed and n.endswith(".weight")), None)


def plan_changes(
    store: Store, adapters: Sequence[OFTAdapter], *, inverse: bool = False, partial: bool = False
) -> FoldPlan:
    """Match ``adapters`` (in the live order) to a model.

    Args:
        inverse: whether the adapters are in the model and the plan takes them out.
        partial: whether to fold an adapter that lacks modules which its own config targets.

    Raises:
        AdapterError: an adapter lacks modules which its own config targets, and ``partial`` is not set.
        MatchError: an adapter key matches nothing, two keys match one module, or the module does not take this kind of
            rotation.
        ShapeError: a rotation or tensor does not fit.
        FormatError: a module cannot be folded.
        StateError: an adapter is given twice or is folded in already; with ``inverse``, the last fold is of others.
    """
    adapters = at_folded_strength(store.record, adapters) if inverse else adapters
    _check_given(store, adapters, inverse=inverse)
    meanings = _meanings(store, adapters)
    missing = () if inverse else _missing(store, adapters, meanings, partial=partial)
    chains = chains_of(adapters, meanings, store.shape)
    located = [store.locate(adapter.saved) for adapter in adapters]
    vocabulary = None if inverse else store.vocabulary(_shapes_brought(adapters, located))
    shapes = {} if vocabulary is None else vocabulary.shapes
    layers, bound = _layers(store, chains, shapes)
    replaced, alone = _own_values(store, adapters, located, shapes)
    _check_distinct(layers)
    turned = [name for name, info in layers.items() if not info.idle]
    apart = store.ties.apart([*turned, *alone])
    broken = {name for group in apart for name in group}
    rotate = (
        Rotate(
            name.removesuffix(".weight"),
            layers[name].format,
            bound[name],
            name in broken,
            inverse,
            chains.groups.get(name, ()),
        )
        for name in turned
    )
    replace = _replacements(store, replaced, alone)
    changed = turned_biases({name: bound[name] for name in turned}, chains.groups, store.tensor, inverse=inverse)
    changed |= summed(adapters, meanings, store.tensor, inverse=inverse)
    replace += _computed(changed, replaced)
    if vocabulary is not None:
        replace += _resized_buffers(store, vocabulary, replace)
        _check_whole(store, vocabulary, replace, adapters)
    return FoldPlan(
        adapters=tuple(adapters),
        rotate=tuple(rotate),
        replace=replace,
        apart=apart,
        clears_flag=store.ties.clears_flag(apart),
        dequantised=_dequantised(store, replace, layers),
        idle=tuple(name.removesuffix(".weight") for name, info in layers.items() if info.idle),
        missing=missing,
        vocabulary=vocabulary,
    )


def _meanings(store: Store, adapters: Sequence[OFTAdapter]) -> dict[str, Meaning]:
    """``{module's name in the adapters: what the name means in the model}``, for all modules of the adapters."""
    norms = [name.rpartition(".")[0] for a in adapters for name in a.sums]
    paths = list(dict.fromkeys([*(path for a in adapters for path in a.modules), *norms]))
    found = store.locate(f"{path}.weight" for path in paths)
    own = {p: Meaning((found[f"{p}.weight"].removesuffix(".weight"),)) for p in paths if f"{p}.weight" in found}
    rest = [path for path in paths if path not in own]
    meanings = own | dict(store.meanings(rest) if rest else {})  # the tables of names are asked for other layouts alone
    meanings |= fused_meanings([path for path in paths if path not in meanings], store.meanings)
    for adapter in adapters:
        wanted = [*adapter.modules, *(name.rpartition(".")[0] for name in adapter.sums)]
        lost = [path for path in wanted if path not in meanings]
        if lost:
            raise _not_found(lost, store.names, adapter)
    return meanings


def _missing(
    store: Store, adapters: Sequence[OFTAdapter], meanings: Mapping[str, Meaning], *, partial: bool
) -> tuple[str, ...]:
    """Paths of the modules that the adapters' configs target and the adapters lack.

    Raises:
        AdapterError: an adapter lacks such modules, and ``partial`` is not set.
    """
    missing: dict[str, None] = {}
    for adapter in adapters:
        if not adapter.config.get("target_modules"):
            continue
        mine = {path: meanings[path].modules[0] for path in adapter.modules}
        lost = missing_modules(adapter, mine, store.adaptable)
        if lost and not partial:
            named = ", ".join(map(printable, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise AdapterError(
                f"the adapter lacks {len(lost)} of the {len(lost) + len(mine)} modules that its own config targets ({named}): the file "
                "is one rank's or stage's part of an adapter, or the config belongs to another adapter",
                module=lost[0],
                path=adapter.source,
                remedy="give the whole adapter, gathered from all ranks, with the config that was saved beside it; "
                "partial=True (--partial) folds the modules of the file, and the others stay as in the base",
            )
        missing |= dict.fromkeys(lost)
    return tuple(missing)


def _computed(changed: Mapping[str, Tensor], replaced: Collection[str]) -> tuple[Replace, ...]:
    """The replacements of tensors by values that the adapters compute from the model's own.

    Raises:
        MatchError: an adapter brings its own values for such a tensor.
    """
    both = next((name for name in changed if name in replaced), None)
    if both is not None:
        message = "an adapter brings its own values for a tensor that another adapter changes"
        raise MatchError(message, tensor=both, remedy="fold the adapters one after the other")
    return tuple(Replace(name, values, (name,), turned=True) for name, values in changed.items())


def _layers(
    store: Store, chains: Chains, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, LayerInfo], dict[str, tuple[WeightMap, ...]]]:
    """``{name of a weight: the facts about its layer}`` of the rotated weights in the model's order, and ``{name: the maps as the
    layer has them}``; ``shapes`` has new shapes.
    """
    order = {path: i for i, path in enumerate(store.names)}
    layers: dict[str, LayerInfo] = {}
    bound: dict[str, tuple[WeightMap, ...]] = {}
    for name in sorted(chains.of, key=lambda n: order[n.removesuffix(".weight")]):
        info = store.layer(name)
        format_ = dataclasses.replace(info.format, shape=shapes.get(name, info.format.shape))
        layers[name] = dataclasses.replace(info, format=format_)
        path = name.removesuffix(".weight")
        kernel = () if info.idle else info.kernel  # the model never calls an idle layer, whatever it is
        bound[name] = tuple(r.for_layer(kernel, path) for r in chains.of[name])
    for name, info in layers.items():
        rows = sum(layers[n].format.shape[0] for n in chains.groups.get(name, (name,)))
        for rotation in bound[name]:
            _check_kind(name.removesuffix(".weight"), rotation, info, rows)
    return layers, bound


def _shapes_brought(adapters: Sequence[OFTAdapter], located: Sequence[Mapping[str, str]]) -> dict[str, tuple[int, ...]]:
    """``{name of the model's tensor: shape}`` of the adapters' own values."""
    named = [(own, adapter.saved.items()) for adapter, own in zip(adapters, located, strict=True)]
    return {own[name]: tuple(values.shape) for own, saved in named for name, values in saved if name in own}


def _own_values(
    store: Store,
    adapters: Sequence[OFTAdapter],
    located: Sequence[Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Tensor], set[str]]:
    """``{name of the model's tensor: an adapter's own values}``, and the names that belong to a whole module of the adapter."""
    replaced: dict[str, Tensor] = {}
    alone: set[str] = set()
    for adapter, own in zip(adapters, located, strict=True):
        for given, values in adapter.saved.items():
            name = _checked(given, values, own.get(given), store, adapter, shapes)
            if name in replaced:
                raise MatchError(
                    "two adapters bring their own values for one tensor",
                    tensor=name,
                    remedy="fold one of them alone: trained biases and heads do not add up",
                )
            replaced[name] = values
            if _brings_module(adapter, given):
                alone.add(name)
    return replaced, alone


def in_names_of(store: Store, adapter: OFTAdapter) -> OFTAdapter:
    """``adapter`` with the names of the store's model, where the model has the adapter's modules and tensors."""
    found = store.locate(f"{path}.weight" for path in adapter.modules)
    own = store.locate(adapter.saved)
    modules = {found.get(f"{p}.weight", f"{p}.weight").removesuffix(".weight"): r for p, r in adapter.modules.items()}
    if len(modules) < len(adapter.modules):
        return adapter  # two names of one module, which planning refuses
    saved = {own.get(name, name): tensor for name, tensor in adapter.saved.items()}
    return dataclasses.replace(adapter, modules=modules, saved=saved)


def _replacements(store: Store, replaced: Mapping[str, Tensor], alone: Collection[str]) -> tuple[Replace, ...]:
    """The replacements of tensors by the adapters' own values; tied names take one replacement together."""
    made: dict[tuple[str, ...], Replace] = {}
    for name, values in replaced.items():
        places = (name,) if name in alone else tuple(n for n in store.ties.group(name) if n not in alone)
        first = made[places].name if places in made else name
        made[places] = Replace(first, values, places)  # the last values stay, as in peft's loading
    return tuple(made.values())


def _resized_buffers(store: Store, vocabulary: Vocabulary, replace: Sequence[Replace]) -> tuple[Replace, ...]:
    """The replacements of buffers that follow the number of tokens and that no adapter brings: as in transformers' own resizing, a
    buffer is cut off or filled up with zeros.
    """
    made = []
    there = {place for change in replace for place in change.places}
    for name in sorted(vocabulary.buffers & vocabulary.shapes.keys() - there):
        old = store.tensor(name)
        if old is not None:
            new = old.new_zeros(vocabulary.shapes[name])
            kept = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            new[kept] = old[kept]
            made.append(Replace(name, new, (name,)))
    return tuple(made)


def _check_whole(
    store: Store, vocabulary: Vocabulary, replace: Sequence[Replace], adapters: Sequence[OFTAdapter]
) -> None:
    """Refuse adapters that bring only some of the tensors that follow the number of tokens.

    Raises:
        ShapeError: the model would have tensors of two numbers of tokens.
    """
    there = {place for change in replace for place in change.places}
    lost = next((name for name in store.locate(vocabulary.shapes) if name not in there), None)
    if lost is not None:
        first = next(name for name in vocabulary.shapes if name in there)
        raise ShapeError(
            f"the adapter brings {printable(first)} for {vocabulary.after} tokens, and no values for another tensor of the model, which "
            f"has {vocabulary.before} tokens",
            tensor=lost,
            shape=store.shape(lost),
            expected=vocabulary.shapes[lost],
            path=adapters[-1].source,
            remedy="save the adapter with all resized tensors: save_pretrained(folder, save_embedding_layers=True), or train with the "
            "tensor's module in modules_to_save; or save the resized base of the training (base.save_pretrained), and fold into it",
        )


def _dequantised(store: Store, replace: Sequence[Replace], layers: Mapping[str, LayerInfo]) -> frozenset[str]:
    """The names of quantised weights that take an adapter's own values (trained heads): transformers loads such a module plain
    if the config names the module.
    """
    found = frozenset(place for change in replace for place in change.places if store.is_quantised(place))
    both = next((name for name in layers if name in found), None)
    if both is not None:
        raise takes_no_values(both, layers[both].format.label)
    return found


def _check_given(store: Store, adapters: Sequence[OFTAdapter], *, inverse: bool) -> None:
    if not adapters:
        raise MatchError("no adapter to fold was given", remedy="give an OFTAdapter, its folder, or a list of them")
    given = [a.fingerprint for a in adapters]
    twice = next((a for a in adapters if given.count(a.fingerprint) > 1), None)
    if twice is not None:
        remedy = "give each adapter once; to apply an adapter more strongly, scale it (oftsurgery adapter scale)"
        raise StateError("the same adapter is given twice", path=twice.source, remedy=remedy)
    record = store.record
    if record is None:
        return
    if inverse:
        if [a.fingerprint for a in record.adapters] != [a.fingerprint for a in adapters]:
            raise StateError(
                f"the {store.what}'s last fold is of {', '.join(printable(a.source) for a in record.adapters)}, "
                f"not of {', '.join(printable(a.source) for a in adapters)}",
                remedy="unfold the last fold first, with the same adapters in the same order",
            )
        return
    again = [a for a in adapters if a.fingerprint in record.fingerprints()]
    if again:
        raise StateError(
            f"this adapter is folded into the {store.what} already",
            path=again[0].source,
            remedy=f"use the {store.what} as it is, unfold the adapter first, or fold into the base model",
        )


def _not_found(lost: Sequence[str], names: Collection[str], adapter: OFTAdapter) -> MatchError:
    """The error for adapter modules that the model lacks; the error names the nearest modules."""
    path = lost[0]
    tail = [n for n in names if n.endswith("." + path) or path.endswith("." + n)]
    near = dict.fromkeys(tail[:2] + difflib.get_close_matches(path, names, n=3, cutoff=0.5))
    hint = f"; nearest in the model: {', '.join(map(printable, near))}" if near else ""
    base = adapter.config.get("base_model_name_or_path")
    return MatchError(
        f"{len(lost)} of the adapter's {len(adapter.modules)} modules match nothing in the model{hint}",
        module=path,
        path=adapter.source,
        remedy="use the model that the adapter was trained on, of the same class"
        + (f", from {printable(base)}" if base else ""),
    )


def _check_kind(path: str, rotation: WeightMap, info: LayerInfo, rows: int) -> None:
    """Refuse a rotation that does not fit the kind or the shape of its module, or of its group of ``rows`` rows."""
    if info.kind is not None and (info.kind == "embedding") != (rotation.side == "embedding"):
        message = f"the adapter's rotation is on the {rotation.side} side, but the module's kind is {info.kind}"
        raise MatchError(message, module=path, remedy="use the base model that the adapter was trained on")
    if len(info.format.shape) != 2:
        message = "the module's weight does not have the two dimensions (out, in)"
        remedy = "use the base model that the adapter was trained on"
        raise ShapeError(message, module=path, shape=info.format.shape, remedy=remedy)
    rotation.check_fits((rows, info.format.shape[1]), path)


def _checked(
    given: str,
    values: Tensor,
    name: str | None,
    store: Store,
    adapter: OFTAdapter,
    shapes: Mapping[str, tuple[int, ...]],
) -> str:
    """The name of the model's tensor that takes an adapter's ``values``."""
    if name is None:
        near = difflib.get_close_matches(given, store.tensors, n=3, cutoff=0.5)
        raise MatchError(
            "the adapter brings a tensor that the model does not have"
            + (f"; nearest: {', '.join(printable(n) for n in near)}" if near else ""),
            tensor=given,
            path=adapter.source,
            remedy="use a model of the same class and head as for training",
        )
    expected = shapes.get(name, store.shape(name))
    if tuple(values.shape) != expected:
        raise ShapeError(
            "the adapter's own values do not fit the model's tensor",
            tensor=given,
            shape=tuple(values.shape),
            expected=expected,
            path=adapter.source,
            remedy="give the model the same number of labels and tokens as for training (resize_token_embeddings), with that tensor unquantised",
        )
    return name


def takes_no_values(name: str, format: str) -> FormatError:
    """The error where an adapter brings its own values for a tensor that is stored quantised, in ``format``."""
    return FormatError(
        "the adapter brings its own values for a weight that is stored quantised",
        tensor=name,
        format=format,
        remedy="leave that module unquantised, as in training (llm_int8_skip_modules, --skip-modules)",
    )


def _brings_module(adapter: OFTAdapter, name: str) -> bool:
    """Whether ``modules_to_save`` names the module of tensor ``name``. As in peft, a name matches the end of the
    module's path.
    """
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(path.endswith(entry) for entry in adapter.config.get("modules_to_save") or () for path in paths)


def _check_distinct(layers: Mapping[str, LayerInfo]) -> None:
    """Refuse rotations that reach one module by two paths."""
    seen: dict[int, str] = {}
    for name, info in layers.items():
        path = name.removesuffix(".weight")
        other = seen.setdefault(info.identity, path)
        if other != path:
            raise one_module(other, path)
