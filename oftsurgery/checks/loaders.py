"""What popular loaders make of an image tool's adapter: by the formulas of :mod:`dense_maps`, which take no code of the fold.

The distances are of all weights together. Without a base the weights are the identity: the distance is then that of the maps
themselves, and of weights without a preferred direction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.boft import LycorisBoft
from oftsurgery.adapters.onetrainer import OneTrainerBlocks
from oftsurgery.adapters.output_blocks import FinishedBlocks, FluxParts, OutputBlocks
from oftsurgery.adapters.strength import AtStrength
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import share

from .base_weights import BaseWeights
from .findings import CONVERT, FOLD, Finding, Numbers
from .measures import rotated
from .tool_names import flat_name, is_original, of_flux_or_sd3, swapped_in_adapter

#: the most columns of the identity that stand for a weight
_COLUMNS = 128
_HALF = 0.5
#: what is less is rounding
_NOTHING = 1e-6


@dataclass(frozen=True)
class Loader:
    """A tool that loads adapters.

    Attributes:
        name: the tool with its releases.
        mode: the mode of strength that has the tool's formula.
        code: the code of the finding.
        drops: function from a module's name, its map, and whether the adapter has diffusers' names of Flux or SD3, to why the tool
            does not load the module; None where it does.
        faults: function from a map to the tool's mistakes at strength 1.
        swaps: whether the tool computes the change of a module with swapped halves from rows in the original layout's order.
    """

    name: str
    mode: str
    code: str
    drops: Callable[[str, WeightMap, bool], str | None]
    faults: Callable[[WeightMap], tuple[str, ...]]
    swaps: bool = False


_LIMIT = "the limit is taken as alpha, and not as alpha times the outputs"
_OFF = "an alpha of 0 turns the rotation off in kohya's trainer, and means no limit in the loader"
_RESCALE = "the trained scale (rescale) is ignored"
_UNSTATED = "the file does not hold the limit of the training"
_SERIES = "the series of OneTrainer's first two days is computed as today's"
_HALVES = "the modulation's halves (shift and scale) are in the other order in its layout, and it turns each by the other's rotation"
_SAID = {
    _HALVES: "swapped_halves",
    _LIMIT: "limit",
    _OFF: "alpha_0",
    _UNSTATED: "limit",
    _RESCALE: "rescale",
    _SERIES: "series",
}


def _comfyui_drops(path: str, m: WeightMap, split: bool) -> str | None:
    keys = {OneTrainerBlocks: "oft_R", FinishedBlocks: "oft_diag", FluxParts: "oft_blocks.<i>"}
    key = next((key for kind, key in keys.items() if isinstance(m, kind)), None)
    if key is not None:
        return f"keys {key}"
    if path.startswith("oft_unet_"):
        return "keys oft_unet_…"
    if path.startswith("lora_unet_") and split and not is_original(path):
        return "keys lora_unet_… with diffusers' names of Flux or SD3"
    if path.startswith("lycoris_") and is_original(path):
        return "keys lycoris_… with names of an original layout"
    return "BOFT without alpha" if isinstance(m, LycorisBoft) and m.alpha is None else None


def _webui_drops(path: str, m: WeightMap, split: bool) -> str | None:  # noqa: ARG001 - the signature of a loader
    keys = {OneTrainerBlocks: "oft_R", FluxParts: "oft_blocks.<i>"}
    key = next((key for kind, key in keys.items() if isinstance(m, kind)), None)
    return None if key is None else f"keys {key}"


def _comfyui_faults(m: WeightMap) -> tuple[str, ...]:
    if not isinstance(m, (OutputBlocks, LycorisBoft)):
        return ()
    found, alpha = [], m.alpha
    norm = _norm(m.blocks)
    if isinstance(m, OutputBlocks) and m.tool == "kohya" and alpha == 0:
        found += [_OFF] if norm else []
    elif alpha and norm > alpha:
        found.append(_LIMIT)
    if isinstance(m, OutputBlocks) and m.scale is not None and bool((m.scale != 1).any()):
        found.append(_RESCALE)
    return tuple(found)


def _webui_faults(m: WeightMap) -> tuple[str, ...]:
    off = isinstance(m, OutputBlocks) and m.tool == "kohya" and m.alpha == 0 and bool(m.blocks.any())
    return (_OFF,) if off else ()


def _node_faults(m: WeightMap) -> tuple[str, ...]:
    return (_SERIES,) if isinstance(m, OneTrainerBlocks) and m.first_days else ()


LOADERS = (
    Loader("ComfyUI to 2025-10", "comfyui", "other-in-comfyui", _comfyui_drops, _comfyui_faults, swaps=True),
    Loader("A1111's web UI and Forge", "webui", "other-in-webui", _webui_drops, _webui_faults),
)
#: the loader of OneTrainer's files in ComfyUI, a node of its own
NODE = Loader("the OFTv2 node of ComfyUI", "oftv2-node", "other-in-oftv2-node", lambda *_: None, _node_faults)


def other_loaders(adapter: OFTAdapter, subject: str, weight_of: BaseWeights | None = None) -> Iterator[Finding]:
    """Findings on what popular loaders compute with the adapter of an image tool.

    Args:
        weight_of: gives the base's weights; None without a base.
    """
    kinds = (OutputBlocks, LycorisBoft, FluxParts, FinishedBlocks, OneTrainerBlocks)
    if not all(isinstance(m, kinds) for m in adapter.modules.values()):
        return
    loaders = (*LOADERS, *([NODE] if adapter.dialect.startswith("onetrainer") else []))
    names = frozenset[str]() if weight_of is not None else swapped_in_adapter(adapter.modules)
    found = {p for p in adapter.modules if (flat_name(p) in names if weight_of is None else weight_of.swapped(p))}
    for loader in loaders:
        swapped = found if loader.swaps else frozenset[str]()
        yield from _of_loader(adapter, loader, subject, _Weights(weight_of, swapped))


@dataclass(frozen=True)
class _Weights:
    """The weights on which the distances are measured.

    Attributes:
        base: the base's weights; None without a base.
        swapped: the modules whose halves the loader takes in the other order.
    """

    base: BaseWeights | None
    swapped: Collection[str]

    def of(self, path: str, m: WeightMap) -> tuple[Tensor, tuple[int, ...]]:
        """``(weight, kernel)``: the base's, or else the identity: tiled where the blocks are independent, and in some of its columns
        for BOFT.
        """
        if self.base is not None:
            return self.base(path)
        if isinstance(m, OneTrainerBlocks):
            return torch.eye(m.block_size, dtype=torch.float64).repeat(1, len(m.vectors)), ()
        assert isinstance(m, (OutputBlocks, LycorisBoft))  # noqa: S101 - loaders load the others rightly, or not at all
        if isinstance(m, LycorisBoft) or (path in self.swapped and len(m.blocks) % 2):
            eye = torch.zeros(m.rows, min(m.rows, _COLUMNS), dtype=torch.float64)
            ones = torch.linspace(0, m.rows - 1, eye.shape[1]).round().long()
            eye[ones, torch.arange(eye.shape[1])] = 1
            return eye, ()
        n, b = len(m.blocks), m.block_size
        eye = torch.eye(b, dtype=torch.float64)
        if path in self.swapped:  # independent halves
            return torch.block_diag(eye.repeat(n // 2, 1), eye.repeat(n // 2, 1)), ()  # type: ignore[no-untyped-call]  # of torch
        return eye.repeat(n, 1), ()

    def measured_on(self, modules: Iterable[WeightMap]) -> str:
        if self.base is not None:
            return "the base's weights"
        large = any(isinstance(m, LycorisBoft) and m.rows > _COLUMNS for m in modules)
        some = f"; an estimate from {_COLUMNS} columns where a BOFT has more rows" * large
        return f"weights without a preferred direction{some}"

    def loaded(self, path: str, w: Tensor, m: WeightMap, kernel: tuple[int, ...]) -> Tensor:
        """What the loader makes of ``w`` with the map ``m``."""
        if path not in self.swapped:
            return _made(path, w, m, kernel)
        other = w.roll(len(w) // 2, 0)
        return w + _made(path, other, m, kernel) - other


def _of_loader(adapter: OFTAdapter, loader: Loader, subject: str, weights: _Weights) -> Iterator[Finding]:
    there = {path: _in_file(adapter, m) for path, m in adapter.modules.items()}
    split = of_flux_or_sd3(adapter.modules)
    dropped = {path: why for path, m in there.items() if (why := loader.drops(path, m, split)) is not None}
    faults = {path: loader.faults(m) for path, m in there.items() if path not in dropped}
    faults |= {path: (*own, _HALVES) for path, own in faults.items() if path in weights.swapped}
    faults |= {
        path: (*own, _UNSTATED)
        for path, own in faults.items()
        if _limits(adapter.modules[path]) and there[path] is not adapter.modules[path]
    }
    turned = sum(m.turns_bias for path, m in adapter.modules.items() if path not in dropped)
    said = list(dict.fromkeys(fault for own in faults.values() for fault in own))
    measured_on = weights.measured_on(adapter.modules.values())
    numbers: Numbers = {"loader": loader.name, "measured_on": measured_on, "modules": len(adapter.modules)}
    if len(dropped) == len(adapter.modules):
        why = _listed(dropped.values())
        message = f"{loader.name} loads none of the adapter's modules ({why}), and draws the base's picture"
        numbers |= {"not_loaded": len(dropped), "of_the_change": 1.0}
        yield Finding("warning", loader.code, message, subject, numbers, _remedy(loader, adapter))
        return
    if said or dropped:
        far = _Distances()
        for path, m in adapter.modules.items():
            own = faults.get(path, ())
            far.add(path, *_of_module(path, m, there[path], loader, own, weights, dropped=path in dropped))
        off, of_weights = far.of_change(), far.of_weights()
        if far.changes and off is not None and off <= _NOTHING and not dropped:
            return
        reasons = [f"{_count(fault, faults)}: {fault}" for fault in said]
        if dropped:
            reasons.append(f"{len(dropped)} modules are not loaded ({_listed(dropped.values())})")
        amount = f"something {share(off, '.1%')} off what the adapter changes" if off is not None else ""
        amount = amount or "something where the trainer's layers compute the base"
        message = f"{loader.name} computes {amount} ({share(of_weights, '.1%')} of the weights): {'; '.join(reasons)}"
        numbers |= {"of_the_weights": of_weights, "not_loaded": len(dropped)} | (
            {} if off is None else {"of_the_change": off}
        )
        numbers |= {f"off_by_{_SAID[fault]}": far.of_fault(fault) for fault in said if off is not None}
        numbers |= {"worst_module": far.worst, "worst_of_the_weights": far.largest}
        numbers |= {"biases_not_turned": turned} if turned else {}
        yield Finding("warning", loader.code, message, subject, numbers, _remedy(loader, adapter))
    elif turned:
        message = f"{loader.name} leaves the biases of {turned} modules, which the training turned"
        yield Finding("warning", loader.code, message, subject, numbers, _remedy(loader, adapter))
    yield from _at_half(adapter, loader, dropped.keys(), subject, weights, numbers)


def _at_half(
    adapter: OFTAdapter,
    loader: Loader,
    dropped: Collection[str],
    subject: str,
    weights: _Weights,
    numbers: Numbers,
) -> Iterator[Finding]:
    """A note on a loader that understands a strength otherwise than the trainer."""
    here = {path: m for path, m in adapter.modules.items() if path not in dropped and _weakens(loader, m)}
    if not here:
        return
    far = _Distances()
    for path, m in here.items():
        w, kernel = weights.of(path, m)
        own = AtStrength(m, _HALF, m.tool if isinstance(m, OutputBlocks) else "lycoris")
        loaded = weights.loaded(path, w, AtStrength(m, _HALF, loader.mode), kernel)
        far.add(path, w, _made(path, w, own, kernel), loaded, {})
    off = far.of_change()
    if off is None or off <= _NOTHING:
        return
    squared = loader.mode == "comfyui" and any(isinstance(m, OutputBlocks) for m in here.values())
    how = "it squares the strength" if squared else "it weakens the change in another way"
    message = f"at strength 0.5 {loader.name} is {share(off, '.1%')} off what the trainer's own layers change: {how}"
    own_numbers = {k: v for k, v in numbers.items() if k in ("loader", "measured_on")}
    numbers = {**own_numbers, "strength": _HALF, "modules": len(here), "of_the_change": off}
    numbers |= {"of_the_weights": far.of_weights()}
    remedy = f"use the loader at strength 1 and fold at the strength that you want: {FOLD} --strength 0.5"
    yield Finding("note", loader.code.replace("other", "strength"), message, subject, numbers, remedy)


def _in_file(adapter: OFTAdapter, m: WeightMap) -> WeightMap:
    """The map as the file has it: a limit that the caller stated is not in the file."""
    return (
        replace(m, alpha=None)
        if adapter.config.get("without_alpha") and isinstance(m, (OutputBlocks, LycorisBoft))
        else m
    )


def _limits(m: WeightMap) -> bool:
    """Whether the limit of the training weakens the rotation."""
    return isinstance(m, (OutputBlocks, LycorisBoft)) and bool(m.alpha) and _norm(m.blocks) > (m.alpha or 0) * m.rows


def _norm(blocks: Tensor) -> float:
    b = blocks.detach().to("cpu", torch.float64)
    return float((b - b.transpose(-1, -2)).square().sum().sqrt())


def _weakens(loader: Loader, m: WeightMap) -> bool:
    """Whether the loader may compute something else than the trainer at another strength."""
    if isinstance(m, LycorisBoft):
        return True
    scaled = isinstance(m, OutputBlocks) and m.scale is not None
    return isinstance(m, OutputBlocks) and (loader.mode == "comfyui" or scaled)


class _Distances:
    """Sums over the modules of squared distances."""

    def __init__(self) -> None:
        self.off = self.changes = self.weights = 0.0
        self.faults: dict[str, float] = {}
        self.worst, self.largest = "", 0.0

    def add(self, path: str, before: Tensor, right: Tensor, loaded: Tensor, alone: Mapping[str, Tensor]) -> None:
        off, weight = float((loaded - right).square().sum()), float(right.square().sum())
        self.off, self.weights = self.off + off, self.weights + weight
        self.changes += float((right - before).square().sum())
        for fault, only in alone.items():
            self.faults[fault] = self.faults.get(fault, 0.0) + float((only - right).square().sum())
        own = (off / weight) ** 0.5 if weight else 0.0
        if own > self.largest:
            self.worst, self.largest = path, own

    def _per_change(self, squared: float) -> float | None:
        none = self.changes <= _NOTHING**2 * self.weights
        return None if none else float((squared / self.changes) ** 0.5)

    def of_change(self) -> float | None:
        """``‖loaded - right‖ / ‖right - base‖``; None where the trainer changes nothing."""
        return self._per_change(self.off)

    def of_weights(self) -> float:
        """``‖loaded - right‖ / ‖right‖``."""
        return float((self.off / self.weights) ** 0.5) if self.weights else 0.0

    def of_fault(self, fault: str) -> float | None:
        return self._per_change(self.faults.get(fault, 0.0))


def _of_module(
    path: str,
    m: WeightMap,
    there: WeightMap,
    loader: Loader,
    faults: Sequence[str],
    weights: _Weights,
    *,
    dropped: bool,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """``(base's weight, trainer's, loader's, {fault: the weight with this fault alone})``."""
    w, kernel = weights.of(path, m)
    right = _made(path, w, m, kernel)
    if dropped:
        return w, right, w, {}
    if not faults:
        return w, right, right, {}
    loaded = weights.loaded(path, w, AtStrength(there, 1.0, loader.mode), kernel)
    if len(faults) == 1:
        return w, right, loaded, dict.fromkeys(faults, loaded)
    limited, alone = AtStrength(there, 1.0, loader.mode), {}
    if isinstance(m, OutputBlocks) and isinstance(there, OutputBlocks) and m.scale is not None:
        scale = m.scale.detach().to("cpu", torch.float64).reshape(-1, 1)
        unscaled = AtStrength(replace(there, scale=None), 1.0, loader.mode)
        alone = dict.fromkeys(faults, scale * _made(path, w, unscaled, kernel))
        alone |= {_RESCALE: _made(path, w, replace(m, scale=None), kernel)}
    else:
        alone = dict.fromkeys(faults, _made(path, w, limited, kernel))
    alone |= {_HALVES: weights.loaded(path, w, m, kernel)}
    return w, right, loaded, {fault: alone[fault] for fault in faults}


def _made(path: str, w: Tensor, m: WeightMap, kernel: tuple[int, ...]) -> Tensor:
    return rotated(w, [m], path, kernel)


def _count(fault: str, faults: Mapping[str, Sequence[str]]) -> str:
    return f"in {sum(fault in own for own in faults.values())} modules"


def _listed(whys: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(whys))


def _remedy(loader: Loader, adapter: OFTAdapter) -> str:
    fold = f"fold the adapter, which computes what the trainer computed: {FOLD}"
    if loader.mode == "oftv2-node" or any(
        isinstance(m, (OneTrainerBlocks, FinishedBlocks)) for m in adapter.modules.values()
    ):
        return fold
    return f"write the adapter in the form that this loader computes rightly: {CONVERT}; or {fold}"
