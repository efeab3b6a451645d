"""These functions extract an adapter from a base and a merged model, live or on disk, one pair of weights at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import (
    ExtractionError,
    ExtractionWarning,
    FormatError,
    MatchError,
    StateError,
    module_in_errors,
    printable,
    share,
    warn_caller,
)
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.live.wrapped_model import live_layers
from oftsurgery.progress import Progress
from oftsurgery.rotations import Side
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.modules import inner_model, modules_of, tensors_in
from oftsurgery.stores.peft_live import LiveAdapters
from oftsurgery.tasks import again, mapped, slices
from oftsurgery.weights.extract import (
    ExtractedRotation,
    block_size_curve,
    choose_block_size,
    extract_encoded,
    extract_rotation,
    on_better_side,
    unrotated,
)

#: the side that a caller may name
ExtractedSide = Literal["input", "output"]

# the number of weights of one width whose curves are pooled: more weights would cost time and change nothing
_SAMPLE = 4
# a smaller explained fraction gives a warning; a small rotation under 4-bit rounding was seen to explain no more than this
_GOOD = 0.7


@dataclass(frozen=True, eq=False, repr=False)
class ExtractedAdapter(OFTAdapter):
    """The :class:`~oftsurgery.OFTAdapter` that :func:`~oftsurgery.extract` found, and how well it explains the difference.

    >>> found = oftsurgery.extract(plain, oftsurgery.fold(plain, "ADAPTER"))
    >>> found.report["model.layers.0.self_attn.q_proj"].rotation.block_size, found.unexplained
    (16, ())

    Attributes:
        report: ``{module path: ExtractedRotation}``, the figures of each module.
        unexplained: names of modules and tensors that differ by no rotation (biases, norms, a new head …): the adapter
            does not hold them.
    """

    report: Mapping[str, ExtractedRotation] = field(default_factory=lambda: MappingProxyType({}))
    unexplained: tuple[str, ...] = ()

    @property
    def explained(self) -> float:
        """The fraction of the squared difference of all rotated weights that the rotations explain, without the rounding of
        the storage; each weight counts by its relative change.
        """
        parts = [(max(r.change**2 - r.rounding**2, 0.0), r.explained) for r in self.report.values()]
        whole = sum(beyond for beyond, _ in parts)
        return sum(beyond * explained for beyond, explained in parts) / whole if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures, as plain values."""
        return {
            "explained": self.explained,
            "fingerprint": self.fingerprint,
            "modules": {path: r.to_dict() for path, r in self.report.items()},
            "unexplained": list(self.unexplained),
        }


@dataclass(frozen=True)
class Pair:
    """One weight in both models; ``read`` gives the base's and the merged one."""

    path: str
    embedding: bool
    read: Callable[[], tuple[EncodedWeight, EncodedWeight]]


def turned(pair: Pair) -> tuple[int, int] | Literal["no", "other shapes"]:
    """The shape of a weight that a rotation may have changed; else what is the case."""
    with module_in_errors(pair.path):
        base, merged = pair.read()
        if base.format.shape != merged.format.shape:
            return "other shapes"
        return "no" if unrotated(base, merged) else (base.format.shape[0], base.format.shape[1])


def extracted(pair: Pair, block_size: int, side: Side) -> ExtractedRotation:
    """The rotation of one weight; ``side`` is that of the weights that are no embeddings."""
    with module_in_errors(pair.path):
        return extract_encoded(*pair.read(), block_size, "embedding" if pair.embedding else side)


#: functions of pairs, given as (pair, further arguments); they give the results in order
TurnedOf = Callable[[Sequence[Pair]], Iterable[tuple[int, int] | str]]
ExtractedOf = Callable[[Sequence[tuple[Pair, int, Side]]], Iterable[ExtractedRotation]]


def _all_turned(pairs: Sequence[Pair]) -> Iterator[tuple[int, int] | str]:
    return map(turned, pairs)


def _all_extracted(pairs: Sequence[tuple[Pair, int, Side]]) -> Iterator[ExtractedRotation]:
    return starmap(extracted, pairs)


def _extract(
    pairs: Sequence[Pair],
    differing: Iterator[str],
    block_size: int | None,
    given_side: ExtractedSide | None,
    base_name: str | None,
    progress: Progress | None,
    turned_of: TurnedOf = _all_turned,
    extracted_of: ExtractedOf = _all_extracted,
) -> ExtractedAdapter:
    """One adapter from pairs of all weights that a rotation may have changed, with one pair in memory at a time;
    ``differing`` names other tensors that differ.
    """
    changed: dict[str, tuple[int, int]] = {}
    unexplained: list[str] = []
    for pair, found in zip(pairs, turned_of(pairs), strict=True):
        if isinstance(found, tuple):
            changed[pair.path] = found
        elif found == "other shapes":
            unexplained.append(pair.path)
    unexplained += differing
    rotated = [pair for pair in pairs if pair.path in changed]
    if not rotated:
        others = f"; {len(unexplained)} tensors differ otherwise: {_first(unexplained)}" if unexplained else ""
        remedy = "give the base first, then the model into which an adapter was merged"
        raise ExtractionError(f"no weight of the merged model is rotated{others}", remedy=remedy)
    if block_size is None:
        sizes, side = _detect(rotated, changed, given_side)
    else:
        sizes, side = {}, given_side or _better_side(rotated, changed, block_size)
    report: dict[str, ExtractedRotation] = {}
    widths = [changed[pair.path][_dim(pair, side)] for pair in rotated]
    sized = [(p, block_size or sizes[width], side) for p, width in zip(rotated, widths, strict=True)]
    for done, ((pair, _, _), rotation) in enumerate(zip(sized, extracted_of(sized), strict=True), start=1):
        if rotation.explained > 0 or block_size is not None:
            report[pair.path] = rotation
        else:
            unexplained.append(pair.path)
        if progress is not None:
            progress(done, len(rotated), pair.path)
    adapter = ExtractedAdapter(
        modules={path: r.rotation for path, r in report.items()},
        dialect="peft-0.13" if side == "output" else "peft-0.21",
        config={"peft_type": "OFT", "base_model_name_or_path": base_name, "bias": "none"},
        source=f"extracted, base {base_name}",
        report=MappingProxyType(report),
        unexplained=tuple(unexplained),
    )
    _say(adapter)
    return adapter


def _dim(pair: Pair, side: Side) -> int:
    """The dimension of a weight's shape with the features that rotate."""
    return 0 if side == "output" and not pair.embedding else 1


def _detect(
    pairs: Sequence[Pair], shapes: Mapping[str, tuple[int, int]], given: ExtractedSide | None
) -> tuple[dict[int, int], Side]:
    """``({features: block size}, side)``, on the side where rotations predict the difference better."""
    on = partial(_detect_on, pairs, shapes)
    if given is None and any(not pair.embedding for pair in pairs):
        return on_better_side(on)
    return on(given or "input")[0], given or "input"


def _better_side(pairs: Sequence[Pair], shapes: Mapping[str, tuple[int, int]], block_size: int) -> Side:
    """The side on which rotations of the given block size explain more of the largest weight's difference; the inputs, where these
    explain the most of it.
    """
    layers = [p for p in pairs if not p.embedding and shapes[p.path][0] % block_size == 0]
    if not layers or any(p.embedding or shapes[p.path][1] % block_size for p in pairs):
        return "input"
    largest = max(layers, key=lambda p: math.prod(shapes[p.path]))
    return extract_rotation(*largest.read(), block_size).rotation.side


def _detect_on(
    pairs: Sequence[Pair], shapes: Mapping[str, tuple[int, int]], side: Side
) -> tuple[dict[int, int], float]:
    """``({features: block size}, mean residual without a rotation in units of the least)``, since the tools give all layers of one width
    the same block size.
    """
    found: dict[int, int] = {}
    gains: list[float] = []
    unsure: dict[int, ExtractionError] = {}
    widths = {pair.path: shapes[pair.path][_dim(pair, side)] for pair in pairs}
    for width in sorted(set(widths.values())):
        # a weight with more of the other features gives a clearer curve
        group = sorted((p for p in pairs if widths[p.path] == width), key=lambda p: -math.prod(shapes[p.path]))[
            :_SAMPLE
        ]
        try:
            curves = [block_size_curve(*p.read(), "embedding" if p.embedding else side) for p in group]
            found[width] = choose_block_size(curves, side)
            gains += [curve[1] for curve in curves]
        except ExtractionError as error:
            unsure[width] = error
    others = set(found.values())
    for width, why in unsure.items():
        if len(others) != 1 or width % min(others):
            raise why
        found[width] = min(others)
    return found, sum(gains) / len(gains)


def _say(adapter: ExtractedAdapter) -> None:
    """Give one :class:`ExtractionWarning` about the parts of the difference that the adapter does not explain."""
    said = []
    if adapter.explained < _GOOD:
        worst = min(adapter.report, key=lambda path: adapter.report[path].explained)
        said.append(
            f"rotations explain {share(adapter.explained, '.1%')} of the difference of {len(adapter.report)} weights "
            f"({share(adapter.report[worst].explained, '.1%')} at worst, {printable(worst)}): these are the best rotations of these block "
            "sizes, but the difference is not a rotation alone"
        )
    bounded = [path for path, r in adapter.report.items() if r.bounded]
    if bounded:
        said.append(
            f"{len(bounded)} rotations turn by nearly π, more than a generator holds, and were bounded: {_first(bounded)}"
        )
    if adapter.unexplained:
        said.append(
            f"{len(adapter.unexplained)} tensors differ otherwise than by a rotation, and are not in the adapter: {_first(adapter.unexplained)}"
        )
    if said:
        warn_caller("; ".join(said), ExtractionWarning)


def _first(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + more


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both tensors exist and are equal in the narrower of the two dtypes."""
    if a is None or b is None:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
        return False
    narrow = min((a.dtype, b.dtype), key=lambda d: (d.itemsize, d != a.dtype))
    return torch.equal(a.to(narrow), b.to(narrow))


def extract_from_models(
    base: nn.Module,
    merged: nn.Module,
    block_size: int | None = None,
    *,
    side: ExtractedSide | None = None,
    progress: Progress | None = None,
) -> ExtractedAdapter:
    """:func:`oftsurgery.extract`."""
    for name, model in (("base", base), ("merged model", merged)):
        if live_layers(model) or LiveAdapters(model):
            message = f"the {name} carries live adapters"
            raise StateError(message, remedy="fold the adapters first (oftsurgery.fold), or give the plain model")
    here, there = modules_of(base), modules_of(merged)
    pairs, seen = [], set()
    for path, module in here.items():
        other = there.get(path)
        if (id(module), id(other)) in seen or module._parameters.get("weight") is None:
            continue
        seen.add((id(module), id(other)))
        layer = Layer(path, module)
        try:
            kind = layer.kind
        except FormatError:
            continue  # a norm or a large kernel is compared as a plain tensor
        if other is None:
            message = "the merged model lacks a layer of the base"
            raise MatchError(message, module=path, remedy="give two models of the same class")
        pairs.append(Pair(path, kind == "embedding", _reader(layer, Layer(path, other))))
    name_or_path = getattr(getattr(inner_model(base), "config", None), "_name_or_path", None) or None
    covered = {f"{pair.path}.weight" for pair in pairs}
    differing = _differing(tensors_in(here), tensors_in(there), covered)
    return _extract(pairs, differing, block_size, side, name_or_path, progress)


def _reader(base: Layer, merged: Layer) -> Callable[[], tuple[EncodedWeight, EncodedWeight]]:
    return lambda: (base.read()[0], merged.read()[0])


def _differing(here: Mapping[str, Tensor], there: Mapping[str, Tensor], covered: Collection[str]) -> Iterator[str]:
    for name in dict.fromkeys((*here, *there)):
        if name not in covered and not _same(here.get(name), there.get(name)):
            yield name


def extract_from_checkpoints(
    base: Checkpoint,
    merged: Checkpoint,
    block_size: int | None = None,
    *,
    side: ExtractedSide | None = None,
    base_name: str | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
    begin: bytes = b"",
) -> ExtractedAdapter:
    """:func:`oftsurgery.extract_checkpoint`.

    Args:
        executor: who reads and extracts; None: this process.
        begin: the pickled function by which the executor's workers find the pairs (:func:`pairs_of`).
    """
    here, there = FolderStore(base), FolderStore(merged)
    own = _located(here, there)
    pairs = _pairs_on_disk(here, there, own)
    differing = _differing_on_disk(here, there, own)
    if executor is None:
        return _extract(pairs, differing, block_size, side, base_name, progress)
    sizes = {pair.path: math.prod(here.shape(f"{pair.path}.weight")) for pair in pairs}

    def by_tasks(function: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        parts = slices([2 * sizes[path] for path, *_ in given])
        tasks = [(begin, function, [given[i] for i in part]) for part in parts]
        return itertools.chain.from_iterable(mapped(executor, _of_pairs, tasks))

    return _extract(
        pairs,
        differing,
        block_size,
        side,
        base_name,
        progress,
        lambda pairs: by_tasks(turned, [(pair.path,) for pair in pairs]),
        lambda sized: by_tasks(extracted, [(pair.path, *rest) for pair, *rest in sized]),
    )


def _of_pairs(begin: bytes, function: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of ``function`` for pairs, which a worker finds by their paths."""
    pairs: dict[str, Pair] = again(begin)
    return [function(pairs[path], *rest) for path, *rest in given]


def pairs_of(base: Checkpoint, merged: Checkpoint) -> dict[str, Pair]:
    """``{module path: pair}`` of two checkpoints."""
    here, there = FolderStore(base), FolderStore(merged)
    return {pair.path: pair for pair in _pairs_on_disk(here, there, _located(here, there))}


def _located(here: FolderStore, there: FolderStore) -> dict[str, str]:
    """``{weight of the base: its name in the merged checkpoint}``."""
    names = [n for n in here.tensors if n.endswith(".weight") and here.is_weight(n)]
    found = there.locate(names)
    missing = [n for n in names if n not in found]
    if missing:
        message = "the merged checkpoint lacks a weight of the base"
        raise MatchError(
            message, tensor=missing[0], path=there.source.folder, remedy="give two checkpoints of the same model"
        )
    # a tied head counts only where a fold untied the head
    return {n: found[n] for n in names if n not in here.architecture.tied or found[n] not in there.architecture.tied}


def _pairs_on_disk(here: FolderStore, there: FolderStore, own: Mapping[str, str]) -> list[Pair]:
    return [
        Pair(n.removesuffix(".weight"), here.is_embedding(n), partial(_read_pair, here, n, there, other))
        for n, other in own.items()
    ]


def _read_pair(here: FolderStore, name: str, there: FolderStore, other: str) -> tuple[EncodedWeight, EncodedWeight]:
    pair = here.weight(name, here.stored(name)), there.weight(other, there.stored(other))
    assert pair[0] is not None  # noqa: S101 - both were located
    assert pair[1] is not None  # noqa: S101
    return pair[0], pair[1]


def _differing_on_disk(here: FolderStore, there: FolderStore, weights: Mapping[str, str]) -> Iterator[str]:
    """Names of the tensors, other than the extracted weights, that differ between two checkpoints."""
    tied = here.architecture.tied.keys() | there.architecture.tied.keys()
    plain = [n for n in here.tensors if n not in weights and n not in tied]
    found = there.locate(plain)
    for name in plain:
        if not _same(here.tensor(name), there.tensor(found[name]) if name in found else None):
            yield name
    known = {*weights.values(), *found.values()}
    yield from (n for n in there.tensors if n not in known and n not in tied)
