"""Plan a fold: match adapters to a model's layers and tensors by names and shapes, before anything is computed or
changed.

Pure: everything comes in as names, formats and shapes, and a frozen :class:`FoldPlan` goes out; whatever does not fit
is an error here.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .adapter import OFTAdapter, Rotation
from .codecs import WeightFormat
from .errors import MatchError, ShapeError, StateError, printable

__all__ = ["FoldPlan", "LayerInfo", "Target", "make_plan", "not_found"]


@dataclass(frozen=True)
class LayerInfo:
    """What the planner needs to know of a layer: its kind, its weight's format, and an identity that two paths to one
    module share.
    """

    kind: Literal["linear", "embedding", "conv"]
    format: WeightFormat
    identity: int


@dataclass(frozen=True, eq=False)
class Target:
    """One layer to rotate, with the chain of rotations in the live order."""

    path: str
    format: WeightFormat
    chain: tuple[Rotation, ...]


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """All that a fold does.

    Attributes:
        adapters: in the live order.
        targets: layers to rotate, in the model's order.
        saved: ``{tensor name: its new values}``, applied before the rotations.
    """

    adapters: tuple[OFTAdapter, ...]
    targets: tuple[Target, ...]
    saved: Mapping[str, Tensor]


def make_plan(
    adapters: Sequence[OFTAdapter],
    layers: Mapping[str, LayerInfo],
    tensors: Mapping[str, tuple[int, ...]],
    names: Collection[str],
) -> FoldPlan:
    """Match ``adapters`` (in the live order) to a model.

    Args:
        layers: ``{path: LayerInfo}`` of at least the modules that the adapters name and the model has, in the model's
            order.
        tensors: ``{name: shape}`` of all of the model's parameters and buffers.
        names: of all modules, for "did you mean".

    Raises:
        MatchError: an adapter key matches nothing, two match one module, or a rotation is of a kind that the module
        does not take.
        ShapeError: a rotation or tensor does not fit.
        StateError: one adapter twice.
    """
    if not adapters:
        raise MatchError("no adapter to fold", remedy="give an OFTAdapter, its folder, or a list of them")
    prints = [a.fingerprint for a in adapters]
    if len(set(prints)) < len(prints):
        raise StateError(
            "the same adapter is given twice",
            remedy="give each adapter once; compose or scale it to apply it more strongly",
        )
    chains: dict[str, list[Rotation]] = {}
    saved: dict[str, Tensor] = {}
    for adapter in adapters:
        lost = [path for path in adapter.modules if path not in layers]
        if lost:
            raise not_found(lost, names, adapter)
        for path, rotation in adapter.modules.items():
            _check_kind(path, rotation, layers[path])
            chains.setdefault(path, []).append(rotation)
        for name, tensor in adapter.saved.items():
            _check_saved(name, tensor, tensors, adapter)
            if name in saved:
                raise MatchError(
                    "two adapters bring their own values for one tensor",
                    tensor=name,
                    remedy="fold one of them alone: trained biases and heads do not add up",
                )
            saved[name] = tensor
    _check_distinct(chains, layers)
    targets = tuple(Target(path, info.format, tuple(chains[path])) for path, info in layers.items() if path in chains)
    return FoldPlan(tuple(adapters), targets, saved)


def not_found(lost: Sequence[str], names: Collection[str], adapter: OFTAdapter) -> MatchError:
    """The error for adapter modules that the model lacks, with the nearest names."""
    path = lost[0]
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    tail = [n for n in names if n.endswith("." + path) or path.endswith("." + n)]
    hint = (
        f"; nearest in the model: {', '.join(printable(n) for n in dict.fromkeys(tail[:2] + near))}"
        if near or tail
        else ""
    )
    base = adapter.config.get("base_model_name_or_path")
    return MatchError(
        f"{len(lost)} of the adapter's {len(adapter.modules)} modules match nothing in the model{hint}",
        module=path,
        path=adapter.source,
        remedy="use the model that the adapter was trained on, of the same class"
        + (f", from {printable(base)}" if base else ""),
    )


def _check_kind(path: str, rotation: Rotation, info: LayerInfo) -> None:
    wanted = "embedding" if rotation.side == "embedding" else None
    if (info.kind == "embedding") != (wanted == "embedding"):
        raise MatchError(
            f"the adapter has a rotation on the {rotation.side} side, but the module is of kind {info.kind}",
            module=path,
            remedy="use the base model that the adapter was trained on",
        )
    if len(info.format.shape) != 2:
        raise ShapeError("the module's weight is not (out, in)", module=path, shape=info.format.shape)
    rotation.check_fits((info.format.shape[0], info.format.shape[1]), path)


def _check_saved(name: str, tensor: Tensor, tensors: Mapping[str, tuple[int, ...]], adapter: OFTAdapter) -> None:
    if name not in tensors:
        near = difflib.get_close_matches(name, tensors, n=3, cutoff=0.5)
        raise MatchError(
            "the adapter brings a tensor that the model does not have"
            + (f"; nearest: {', '.join(printable(n) for n in near)}" if near else ""),
            tensor=name,
            path=adapter.source,
            remedy="use a model of the same class and head as for training",
        )
    if tuple(tensor.shape) != tensors[name]:
        raise ShapeError(
            "the adapter's own values do not fit the model's tensor",
            tensor=name,
            shape=tuple(tensor.shape),
            expected=tensors[name],
            path=adapter.source,
            remedy="give the model the same number of labels and tokens as for training (resize_token_embeddings), with that tensor unquantised",
        )


def _check_distinct(chains: Mapping[str, Sequence[Rotation]], layers: Mapping[str, LayerInfo]) -> None:
    seen: dict[int, str] = {}
    for path in chains:
        other = seen.setdefault(layers[path].identity, path)
        if other != path:
            raise MatchError(
                f"two of the adapter's modules, {printable(other)!r} and this one, are one module of the model",
                module=path,
                remedy="the model shares this module between places; train the adapter on one of them",
            )
