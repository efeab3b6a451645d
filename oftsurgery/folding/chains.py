"""Which maps act on which weights of the model, and in which groups: from the names in the adapters to chains of maps.

A module of an adapter is one weight of the model, or, where the model has another layout, a part of the rows of a weight, several
weights together, or a weight with swapped halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.parts import RowParts, SwappedHalves
from oftsurgery.adapters.weight_map import TRAINED_ON, WeightMap
from oftsurgery.errors import MatchError, ShapeError, printable
from oftsurgery.records.record import AdapterInfo, FoldRecord
from oftsurgery.stores.meaning import Meaning
from oftsurgery.weights.fold import in_weight_order

#: function from a weight's name to its shape
ShapeOf = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Chains:
    """The maps of a fold.

    Attributes:
        of: ``{name of a weight: its maps in the live order}``; the maps of a weight of a group act on the whole group.
        groups: ``{name of a weight: the names of all weights of its group, in the order of the rows}``.
    """

    of: Mapping[str, Sequence[WeightMap]]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def chains_of(adapters: Sequence[OFTAdapter], meanings: Mapping[str, Meaning], shape: ShapeOf) -> Chains:
    """The chains of maps of ``adapters``, in the live order.

    Args:
        meanings: ``{module's name in an adapter: what the name means}``.

    Raises:
        MatchError: two modules of one adapter mean one weight, or groups of weights overlap.
    """
    on_adapters = [_on_weights(adapter, meanings, shape) for adapter in adapters]
    groups = _groups(group for _, together in on_adapters for group in together)
    chains: dict[str, list[WeightMap]] = {}
    for single, together in on_adapters:
        for group in dict.fromkeys(groups[name] for name in (*single, *_names(together)) if name in groups):
            whole = together.get(group)
            if whole is None:
                whole = RowParts(tuple((single.get(name), shape(name)[0]) for name in group))
            for name in group:
                chains.setdefault(name, []).append(whole)
        for name, weight_map in single.items():
            if name not in groups:
                chains.setdefault(name, []).append(weight_map)
    return Chains(chains, groups)


def _groups(found: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """``{name: its group}``.

    Raises:
        MatchError: groups overlap.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for group in found:
        for name in group:
            if groups.setdefault(name, group) != group:
                message = "two adapters rotate a weight together with other weights, and these are not the same weights"
                raise MatchError(message, tensor=name, remedy="fold the adapters one after the other")
    return groups


def _names(together: Mapping[tuple[str, ...], WeightMap]) -> list[str]:
    return [name for group in together for name in group]


def _on_weights(
    adapter: OFTAdapter, meanings: Mapping[str, Meaning], shape: ShapeOf
) -> tuple[dict[str, WeightMap], dict[tuple[str, ...], WeightMap]]:
    """``({name of a weight: its map}, {names of a group: the map of the group})`` of one adapter."""
    single: dict[str, WeightMap] = {}
    together: dict[tuple[str, ...], WeightMap] = {}
    fused: dict[str, dict[int, WeightMap]] = {}
    owner: dict[tuple[str, int | None], str] = {}
    for path, weight_map in adapter.modules.items():
        meaning = meanings[path]
        names = tuple(f"{module}.weight" for module in meaning.modules)
        for name in names:
            _check_alone(owner, name, meaning, path)
        here = SwappedHalves(weight_map) if meaning.swapped and weight_map.side == "output" else weight_map
        if meaning.part is not None:
            fused.setdefault(names[0], {})[meaning.part] = here
        elif len(names) == 1:
            single[names[0]] = here
        elif here.side == "input" and not here.scales_rows:  # a rotation of the inputs is the same for all rows
            single |= dict.fromkeys(names, here)
        else:
            together[names] = here
    counts = {f"{m.modules[0]}.weight": len(m.of) for m in meanings.values() if m.part is not None}
    for name, maps in fused.items():
        rows = part_rows(counts[name], shape(name))
        single[name] = RowParts(tuple((maps.get(i), count) for i, count in enumerate(rows)))
    return single, together


def _check_alone(owner: dict[tuple[str, int | None], str], name: str, meaning: Meaning, path: str) -> None:
    """Refuse a second module of the adapter for the same weight, or the same part of it."""
    for part in {None, meaning.part}:
        other = owner.get((name, part))
        if other is not None:
            raise one_module(other, path)
    if meaning.part is None:
        other = next((p for (n, _), p in owner.items() if n == name), None)
        if other is not None:
            raise one_module(other, path)
    owner[name, meaning.part] = path


def one_module(other: str, path: str) -> MatchError:
    """The error for two modules of an adapter that are one module of the model."""
    return MatchError(
        f"two of the adapter's modules, {printable(other)!r} and {printable(path)!r}, are one module of the model",
        module=path,
        remedy="train the adapter on one of the two names, or keep one of them in a copy of the adapter: they mean one module",
    )


def part_rows(count: int, shape: Sequence[int]) -> list[int]:
    """The rows of the ``count`` parts of a fused weight: equal parts, but for the fourth part of Flux' ``linear1``, the MLP after
    three projections of as many rows as the weight has inputs.

    >>> part_rows(3, (48, 16)), part_rows(4, (112, 16))
    ([16, 16, 16], [16, 16, 16, 64])
    """
    out, features = shape[0], shape[1]
    rows = [features] * 3 + [out - 3 * features] if count == 4 else [out // count] * count
    if sum(rows) != out or min(rows) < 1:
        message = f"a weight of {out} rows does not hold {count} parts"
        raise ShapeError(message, shape=tuple(shape), remedy="use the base model that the adapter was trained on")
    return rows


def turned_biases(
    chains: Mapping[str, Sequence[WeightMap]],
    groups: Mapping[str, tuple[str, ...]],
    tensor: Callable[[str], Tensor | None],
    *,
    inverse: bool,
) -> dict[str, Tensor]:
    """``{name of a bias: its new values}`` of the biases that the live layers turn with the rows of their weights.

    Args:
        chains: ``{name of a weight: its maps}``.
        tensor: function that gives the tensor of a name, or None.

    Raises:
        MatchError: some weights of a group have a bias and others have none.
    """
    found: dict[str, Tensor] = {}
    for name, chain in chains.items():
        names = [f"{n.removesuffix('.weight')}.bias" for n in groups.get(name, (name,))]
        if names[0] in found or not any(r.turns_bias for r in chain):
            continue
        biases = [tensor(n) for n in names]
        there = [b for b in biases if b is not None]
        if not there:
            continue
        if len(there) < len(biases):
            lost = names[next(i for i, b in enumerate(biases) if b is None)]
            message = "the adapter turns the biases of several weights together, and one of the weights has no bias"
            raise MatchError(message, tensor=lost, remedy="use the base model that the adapter was trained on")
        whole = torch.cat(there)
        with rotations.full_precision(whole.device.type):
            for r in in_weight_order(chain, inverse=inverse):
                whole = r.unfold_bias(whole) if inverse else r.fold_bias(whole)
        found |= dict(zip(names, torch.split(whole, [len(b) for b in there]), strict=True))
    return found


def summed(
    adapters: Sequence[OFTAdapter],
    meanings: Mapping[str, Meaning],
    tensor: Callable[[str], Tensor | None],
    *,
    inverse: bool,
) -> dict[str, Tensor]:
    """``{name of a tensor: its new values}`` of the tensors to which adapters add their own (normalisation layers).

    Raises:
        MatchError: the model has no such tensor.
        ShapeError: the values do not fit.
    """
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        factor = -adapter.strength if inverse else adapter.strength
        for given, values in adapter.sums.items():
            module, _, leaf = given.rpartition(".")
            meaning = meanings[module]
            if len(meaning.modules) > 1 or meaning.part is not None or meaning.swapped:
                message = "the adapter adds to a tensor whose rows the model holds otherwise"
                raise MatchError(
                    message, tensor=given, path=adapter.source, remedy="use the base that the adapter was trained on"
                )
            name = f"{meaning.modules[0]}.{leaf}"
            old = found.get(name, tensor(name))
            if old is None:
                message = "the adapter adds to a tensor that the model does not have"
                raise MatchError(
                    message, tensor=given, path=adapter.source, remedy="use the base that the adapter was trained on"
                )
            if old.shape != values.shape:
                message, expected = "what the adapter adds does not fit the model's tensor", tuple(old.shape)
                raise ShapeError(message, tensor=given, shape=tuple(values.shape), expected=expected, remedy=TRAINED_ON)
            found[name] = old.to(torch.promote_types(old.dtype, torch.float32)) + factor * values.to(
                old.device, torch.float32
            )
    return found


def at_folded_strength(record: FoldRecord | None, adapters: Sequence[OFTAdapter]) -> list[OFTAdapter]:
    """The adapters at the strengths at which the last fold of ``record`` has them, where they were given as they were read."""
    infos = record.adapters if record is not None else ()
    if len(infos) != len(adapters):
        return list(adapters)

    def weakened(adapter: OFTAdapter, info: AdapterInfo) -> OFTAdapter:
        given = adapter.fingerprint == info.fingerprint or (adapter.strength, adapter.strength_mode) != (1, "angle")
        return adapter if given else adapter.at_strength(info.strength, info.strength_mode)  # type: ignore[arg-type]

    return [weakened(adapter, info) for adapter, info in zip(adapters, infos, strict=True)]
