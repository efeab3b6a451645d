""":func:`examine_folds` compares weights with their record, base and adapter; :func:`obstacles` says why an adapter cannot be
folded in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.base_revision import base_revision, trained_at
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.adapters.targets import missing_modules
from oftsurgery.adapters.trained_on import TRAINED_ON
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import MatchError, share
from oftsurgery.files.checkpoint import open_checkpoint, open_single_file
from oftsurgery.files.finding import find_checkpoint
from oftsurgery.files.layout import is_single_file
from oftsurgery.files.remote import local_path
from oftsurgery.folding.disk_plan import plan_checkpoint
from oftsurgery.folding.plan import plan_changes
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.records.advice import Case, remedies
from oftsurgery.records.record import ENOUGH, HALF, FoldRecord
from oftsurgery.stores import peft_live
from oftsurgery.stores.dequantised import DequantisedCheckpoint, dequantised
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.modules import modules_of
from oftsurgery.stores.store import Store
from oftsurgery.weights.fold import relative_error, rotate_chain

from . import measures
from .checkpoint_report import WHOLE, is_whole
from .findings import FOLD, UNFOLD, Finding, Model, Numbers, Severity, noting, shape_text


def examine_folds(
    store: Store, record: FoldRecord | None, base: Model | None, adapter: OFTAdapter | None
) -> list[Finding]:
    found = [] if record is None else _against_record(record, store, adapter if base is None else None)
    if adapter is not None and base is not None:
        if not (isinstance(base, nn.Module) or is_single_file(base)):  # its errors are raised, not noted
            base = find_checkpoint(base, revision=base_revision(base, None, trained_at([adapter])))
        with noting(found):
            there = open_store(base)
            found += [*large_kernels(adapter, store), *_against_base(adapter, there, store, record)]
            found += _lacking(adapter, there, record)
    elif adapter is not None and (record is None or adapter.fingerprint not in record.fingerprints()):
        found += obstacles(adapter, store)
    return found


def obstacles(adapter: OFTAdapter, store: Store) -> list[Finding]:
    """Findings on why an adapter cannot be folded in."""
    found: list[Finding] = []
    with noting(found):
        found += large_kernels(adapter, store)
        if found:
            return found
        if isinstance(store, FolderStore):
            plan_checkpoint(store.source, [adapter])
        elif isinstance(store, LiveStore):
            store.record = None  # other findings tell what is folded in already
            plan_changes(store, [adapter])
    return found


def large_kernels(adapter: OFTAdapter, store: Store) -> Iterator[Finding]:
    names = store.locate([f"{path}.weight" for path in adapter.modules])
    for path in (path for path, m in adapter.modules.items() if isinstance(m, Rotation)):
        shape = store.shape(names[f"{path}.weight"]) if f"{path}.weight" in names else ()
        if len(shape) == 4 and shape[2:] != (1, 1):
            yield large_kernel(path, shape[2:])


def large_kernel(path: str, kernel: Iterable[int]) -> Finding:
    """The finding for a rotated convolution with a kernel larger than 1×1."""
    message = (
        "the adapter rotates a convolution with a kernel larger than 1: the patches of the live layer of peft 0.16 to 0.21 overlap, so no "
        "weight computes the same, and the error of peft's own merge is about as large as the weight itself"
    )
    remedy = "train the adapter without this convolution (`exclude_modules`); 1×1 convolutions can be folded"
    return Finding("error", "convolution", message, path, {"kernel": shape_text(kernel)}, remedy)


def _against_record(record: FoldRecord, store: Store, adapter: OFTAdapter | None) -> list[Finding]:
    """Findings from the fold's record: an adapter that was folded twice, and weights that differ from the record."""
    found: list[Finding] = []
    folded = [a for r in (*record.earlier, record) for a in r.adapters]
    for fingerprint, times in Counter(a.fingerprint for a in folded).items():
        if times > 1:
            source = next(a.source for a in folded if a.fingerprint == fingerprint)
            message = "the record says that this adapter was folded in more than once"
            remedy = f"take the last fold out of the checkpoint: {UNFOLD}"
            found.append(Finding("error", "folded-twice", message, source or fingerprint, {"times": times}, remedy))
    if adapter is not None and adapter.fingerprint in record.fingerprints():
        message = "this adapter is folded in already, and a second fold would rotate twice, so oftsurgery refuses it"
        remedy = f"use the checkpoint as it is, or take the adapter out: {UNFOLD}"
        folds = {"adapters_folded": len(folded)}
        subject = adapter.source or adapter.fingerprint
        found.append(Finding("warning", "already-folded", message, subject, folds, remedy))
    for path, module in record.modules.items():
        if isinstance(store, LiveStore) and path in store.modules and is_cpu_packed(store.modules[path]):
            continue  # a CPU forward packs a 4-bit weight and rounds its statistics: the finding of the layer tells this
        with noting(found, path):
            encoded = weight_at(store, path)
            if encoded is None:
                remedy = "restore the record that belongs to the weights"
                raise MatchError("the record names a module that the model does not have", module=path, remedy=remedy)
            after = encoded.fingerprint
            if after == module.after:
                continue
            message = "the weight is not the weight in the record: the weight has changed since, or the record is of another checkpoint"
            if after == module.before:
                message = "the record says that the weight is folded, but the weight is the base's"
            hashes = {"recorded": module.after, "found": after, "base": module.before, "format": encoded.format.label}
            found.append(Finding("error", "record", message, path, hashes, f"fold again: {FOLD}"))
    return found


def _against_base(adapter: OFTAdapter, base: Store, folded: Store, record: FoldRecord | None) -> list[Finding]:
    """Findings on each folded weight against the base's (rotated as expected, unrotated, transposed, rotated twice), and on
    how much of the adapter all weights hold; for calibrated weights, ``record`` says how much the outputs hold.
    """
    found: list[Finding] = []
    kept: dict[str, tuple[float, float]] = {}
    recorded = record.modules if record is not None else {}
    outputs = {path: m.output_kept for path, m in recorded.items() if m.output_kept is not None}
    for path, rotation in adapter.modules.items():
        with noting(found, path):
            name = name_at(base, path)
            meaning = base.meanings([path]).get(path) if name is None else None
            if meaning is not None and meaning.whole is None:
                continue  # rows of a weight, or of several weights together, which `verify` compares
            before, after = weight_at(base, path), weight_at(folded, path)
            if before is None or after is None or name is None:
                message = f"the {'base' if before is None else 'folded'} model does not have the adapter's module"
                remedy = "give the base and the adapter of this fold (--base, --adapter)"
                raise MatchError(message, module=path, remedy=remedy)
            own = adapter.saved.get(f"{path}.weight")  # the live layer rotates the adapter's own values
            before = before if own is None else codecs.dense(own)
            shape = base.shape(name)
            rotation = rotation.for_layer(tuple(shape[2:]) if len(shape) == 4 else (), path).resolved()
            rotation.check_fits((before.format.shape[0], before.format.shape[1]), path)
            finding, part = _judge_weight(path, rotation, before, after)
            found += [] if finding is None else [finding]
            if part is not None:
                kept[path] = (outputs.get(path, part[0]), part[1])
    # the weight that is farthest from the right fold comes first
    found.sort(key=lambda f: -float(f.evidence.get("from_the_right_fold") or math.inf))
    # how much is kept has a meaning only for a right merge
    wrong = any(f.severity == "error" for f in found)
    if wrong:
        return found

    def case(path: str) -> Case:
        return _case_of(path, adapter.modules[path], base, folded, record)

    return found + _how_much_is_kept(kept, case, calibrated=not outputs.keys().isdisjoint(kept))


def _case_of(path: str, rotation: WeightMap, base: Store, folded: Store, record: FoldRecord | None) -> Case:
    """The facts that decide what helps a merge that keeps too little, from its record or else from one of its weights."""
    case = None if record is None or path not in record.modules else Case.of_record(record, path)
    before, after = weight_at(base, path), weight_at(folded, path)
    if case is not None or before is None or after is None:
        return case or Case("", "nearest")
    weight = codecs.decode(after)
    turned = _rotated_from(before, after, weight, rotation)
    return Case.of_weights(before.format, after.format, rotated=turned.format, on_disk=isinstance(folded, FolderStore))


def _how_much_is_kept(
    parts: Mapping[str, tuple[float, float]], case: Callable[[str], Case], *, calibrated: bool
) -> list[Finding]:
    """A finding on how much of the adapter's change is in the merged weights, from ``(kept, ‖exact - base‖²)`` of each
    weight. Calibrated weights are judged by their outputs.
    """
    total = math.fsum(change for _, change in parts.values())
    if not total:
        return []
    overall = math.fsum(kept * change for kept, change in parts.values()) / total
    least = min(parts, key=lambda path: parts[path][0])
    evidence: Numbers = {
        "kept": overall,
        "least": parts[least][0],
        "weights": len(parts),
        f"below_{ENOUGH:.0%}": sum(kept < ENOUGH for kept, _ in parts.values()),
    }
    text = f"{share(overall)} of what the adapter changes is in the merged weights"
    if overall >= (HALF if calibrated else ENOUGH):
        return [Finding("note", "kept", text, least, evidence)]
    text += ": rounding to the format's levels has undone the rest of the change"
    text += ", and the model computes nearly what its base computes" if overall < 0.5 else ""
    remedy = "; ".join(f"({i}) {remedy}" for i, remedy in enumerate(remedies(case(least)), start=1))
    return [Finding("warning", "adapter-lost", text, least, evidence, remedy)]


_TRANSPOSED = (
    "the weight is the base's, transposed and not rotated: peft 0.16 to 0.20 merge OFT adapters into bitsandbytes layers so "
    "(a square weight loads, and computes noise)"
)

_COARSE = "the weight is the right fold, but its error is larger than its format's rounding: a coarser format held the weight before"

_OTHER = (
    "the weight is neither the base's nor this adapter's fold of the base: it is damaged, or of another base or adapter"
)

# the candidate that is nearest to a merged weight → the finding's code and message
_NEAREST: Mapping[str, tuple[str, str]] = {
    "base": (
        "unrotated",
        "the weight is the base's and not rotated: the adapter should be folded into the weight, but is not",
    ),
    "base_transposed": ("transposed", _TRANSPOSED),
    "fold_transposed": ("transposed", "the weight is folded, but transposed"),
    "fold_twice": ("folded-twice", "the adapter is folded into the weight twice"),
    "right_fold": ("coarse-fold", _COARSE),
    "none": ("not-the-fold", _OTHER),
}

# the relative error of a fold is about a tenth in NF4, and a little more in FP4
_COARSEST = 0.2
# a rounding's error that happens to lie along the change moves a distance by less than this ratio
_BETTER = 0.97


def _judge_weight(
    path: str, rotation: WeightMap, before: EncodedWeight, after: EncodedWeight
) -> tuple[Finding | None, tuple[float, float] | None]:
    """The finding on a merged weight, if any, and how much of the change the weight holds, with ``‖exact - base‖²``."""
    device = before.tensors["weight"].device
    with rotations.full_precision(device.type):
        weight = codecs.decode(after).to(device)
        start = codecs.decode(_rotated_from(before, after, weight, rotation))
        right = rotate_chain(start, [rotation])
        stored = codecs.decode(codecs.encode(right, replace(after.format, shape=tuple(right.shape))))
        rounding, effect = relative_error(stored, right), relative_error(start, right)
        kept = measures.kept(weight, start, right) if weight.shape == right.shape else None
        part = None if kept is None else (kept, float((right - start).square().sum(dtype=torch.float64)))
        if weight.shape == right.shape and relative_error(weight, stored) <= max(rounding / 2, 1e-6):
            return None, part
        far = _distances(weight, start, right, rotation)
    # the cost of storing, with room for a base that was itself quantised on the way
    limit = 2 * rounding + 1e-3
    off, nearest = far.get("right_fold", math.inf), min(far, key=lambda k: far[k], default="none")
    if (
        "right_fold" in far and far[nearest] > _BETTER * off
    ):  # chance alone may have brought the weight nearer to another candidate
        nearest = "right_fold"
    if off <= limit and (nearest == "right_fold" or effect <= 1e-6):
        return None, part
    whole = weight.shape == right.shape and is_whole(kept, measures.grain(after, start, right))
    # rounding that keeps the change may err by more than nearest rounding, but by no more than the format's steps
    if whole and off <= max(limit, 1.1 * measures.step_error(after, right)):
        return None, part
    if kept is not None and nearest == "base" and far["base"] <= limit and not torch.equal(weight, start):
        # a right merge to the nearest level would also undo the change: one finding tells this of all weights together
        of_nearest = measures.kept(stored, start, right)
        if of_nearest is not None and of_nearest < 1 - WHOLE:
            return None, part
    if far.get(nearest, math.inf) > (_COARSEST if nearest == "right_fold" else limit):
        nearest = "none"
    code, message = _NEAREST[nearest]
    evidence: Numbers = {f"from_the_{k}": v for k, v in far.items()}
    evidence |= {"rounding": rounding, "rotation_effect": effect}
    evidence |= {"shape": shape_text(weight.shape), "format": after.format.label}
    severity: Severity = "warning" if nearest == "right_fold" else "error"
    return Finding(severity, code, message, path, evidence, f"fold the base again: {FOLD}"), part


def _rotated_from(before: EncodedWeight, after: EncodedWeight, weight: Tensor, rotation: WeightMap) -> EncodedWeight:
    """The weight that was rotated: the base's, or the weight of a plain base in a format in which QOFT adapters are trained, where
    this weight explains the merged weight clearly better.
    """
    f = before.format
    if f.quantised or f.shape != after.format.shape:
        return before
    trained = [
        WeightFormat(codec, f.shape, f.dtype, *((64, 256 * double) if codec != "int8" else ()))
        for codec, double in TRAINED_ON.values()
        if codec is not None
    ]
    start, own = codecs.decode(before), [after.format] if after.format.quantised else []
    quantised = (codecs.encode(start, one) for one in [*own, *trained])

    def far(e: EncodedWeight) -> float:
        return relative_error(weight, rotate_chain(codecs.decode(e), [rotation]))

    best, least = before, far(before)
    for one in quantised:
        if (distance := far(one)) < _BETTER * least:
            best, least = one, distance
    return best


def _distances(weight: Tensor, start: Tensor, right: Tensor, rotation: WeightMap) -> dict[str, float]:
    """The distances of a merged weight to the base, to the right fold, and to the results of wrong merges."""
    far: dict[str, float] = {}
    if weight.shape == right.shape:
        far["right_fold"] = relative_error(weight, right)
        far["base"] = relative_error(start, right) and relative_error(weight, start)
        far["fold_twice"] = relative_error(weight, rotate_chain(right, [rotation]))
    if weight.shape == right.shape[::-1]:
        far["base_transposed"] = relative_error(weight.t(), start)
        far["fold_transposed"] = relative_error(weight.t(), right)
    return far


def _lacking(adapter: OFTAdapter, base: Store, record: FoldRecord | None) -> Iterator[Finding]:
    """A finding if the adapter lacks modules that its config targets; only a note if the fold's ``record`` names these modules."""
    found = base.locate(f"{path}.weight" for path in adapter.modules)
    mine = {
        path: found[f"{path}.weight"].removesuffix(".weight") for path in adapter.modules if f"{path}.weight" in found
    }
    lost = missing_modules(adapter, mine, base.adaptable) if len(mine) == len(adapter.modules) else ()
    if lost:
        message = "the adapter lacks modules that its own config targets: the file is one rank's or stage's part of an adapter"
        severity: Severity = "note" if record is not None and set(lost) <= set(record.missing) else "error"
        numbers: Numbers = {"missing": len(lost), "there": len(mine)}
        remedy = "gather the whole adapter from all ranks, and fold the base again"
        yield Finding(severity, "partial-adapter", message, lost[0], numbers, remedy, lost[1:])


def open_store(base: Model) -> Store:
    if isinstance(base, nn.Module):
        return LiveStore(base, plain_paths(base))
    if is_single_file(base):
        return FolderStore(open_single_file(local_path(base)))
    return FolderStore(dequantised(open_checkpoint(find_checkpoint(base))))


def weight_at(store: Store, path: str) -> EncodedWeight | None:
    """The stored weight of the module at ``path``; None where the store has no such weight."""
    name = name_at(store, path)
    if isinstance(store, FolderStore) and isinstance(store.source, DequantisedCheckpoint) and name is not None:
        held = store.source.held.get(store.holder(name))
        if held is not None and held.quantiser is not None:
            return store.source.stored(store.holder(name))
    return None if name is None else store.weight(name, WeightFormat("dense", ()))


def name_at(store: Store, path: str) -> str | None:
    """The name of the weight of the module that an adapter calls ``path``; None where the store has no such weight."""
    name = f"{path}.weight"
    return store.locate([name]).get(name)


def plain_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the paths of the base model; the base layers stand in the places of peft's live layers."""
    named = modules_of(peft_live.base_of(model))
    return {path.removesuffix(".base_layer"): m for path, m in named.items() if f"{path}.base_layer" not in named}


def quant_state_of(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None) or module.__dict__.get("quant_state")


def is_cpu_packed(module: nn.Module) -> bool:
    return bool(getattr(quant_state_of(module), "packing_format_for_cpu", False))
