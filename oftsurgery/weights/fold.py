"""Fold and unfold one weight, whatever its codec: decode, rotate, encode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import MatchError, NonFiniteError, ShapeError
from oftsurgery.formats import codecs
from oftsurgery.formats.codecs import Rounding
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.packages.package_format import PackageFormat
from oftsurgery.records.record import ModuleRecord
from oftsurgery.weights.kernels.blockwise import FoldedWeight

from . import kernels, preserve

W = TypeVar("W", Tensor, EncodedWeight)


def begin_record(
    encoded: EncodedWeight, chain: Sequence[WeightMap], *, untied: bool = False
) -> Callable[[FoldedWeight], Callable[[], ModuleRecord]]:
    """Begin the record of a fold of ``encoded`` before the fold: another thread computes the facts that are known already.
    The returned function takes the folded weight: another thread then computes the rest, and the function that comes back
    gives the record.
    """
    known = kernels.start(lambda: (encoded.fingerprint, [kernels.measure(r) for r in chain]))

    def end(folded: FoldedWeight) -> Callable[[], ModuleRecord]:
        after = kernels.start(lambda: folded.encoded.fingerprint)
        before, measures = known()
        figures: dict[str, Any] = {f.name: getattr(folded, f.name) for f in fields(folded) if f.name != "encoded"}
        label = folded.encoded.format.label
        side, sizes = "+".join(dict.fromkeys(r.side for r in chain)), tuple(r.block_size for r in chain)

        def record() -> ModuleRecord:  # which keeps neither weights nor maps until it is asked for
            return ModuleRecord(
                format=label,
                side=side,
                block_size=sizes,
                defect=max(defect for defect, _ in measures),
                angle=max(angle for _, angle in measures),
                before=before,
                after=after(),
                untied=untied,
                **figures,
            )

        return record

    return end


def fold_weight(weight: W, rotation: WeightMap | Sequence[WeightMap], *, rounding: Rounding = "preserve") -> W:
    """The weight with which a plain layer computes what the live OFT layer computes with ``weight``.

    >>> quarter = oftsurgery.Rotation(generator=torch.tensor([[-1.0]]))       # R = [[0, 1], [-1, 0]]: a quarter turn
    >>> oftsurgery.fold_weight(torch.tensor([[3.0, 4.0]]), quarter).tolist()
    [[4.0, -3.0]]

    Args:
        weight: a plain tensor ``(out, in)``, a convolution's ``(out, in, kh, kw)``, or an :class:`~oftsurgery.EncodedWeight` of any codec.
        rotation: one, or several in the live order: ``[a, b]`` is the chain ``x · Ra · Rb`` of peft's active adapters
            ``[a, b]``.
        rounding: of a quantised weight, as for :func:`oftsurgery.fold`.

    Returns:
        of the same type, format and dtype as ``weight``.

    Raises:
        StateError: an unknown rounding.
        ShapeError: the rotation does not fit.
        MatchError: the chain mixes an ``oft_s`` with a rotation on the output side.
        NonFiniteError: NaN or infinity in the weight or the result.
    """
    return _apply(weight, rotation, rounding, inverse=False)


def unfold_weight(weight: W, rotation: WeightMap | Sequence[WeightMap], *, rounding: Rounding = "preserve") -> W:
    """The inverse of :func:`fold_weight`, by the rotations' true inverses; quantised weights are rounded once more.

    >>> quarter = oftsurgery.Rotation(generator=torch.tensor([[-1.0]]))
    >>> oftsurgery.unfold_weight(torch.tensor([[4.0, -3.0]]), quarter).tolist()
    [[3.0, 4.0]]

    Arguments, result and errors are those of :func:`fold_weight`.
    """
    return _apply(weight, rotation, rounding, inverse=True)


def _apply(weight: W, rotation: WeightMap | Sequence[WeightMap], rounding: str, *, inverse: bool) -> W:
    given = (rotation,) if isinstance(rotation, WeightMap) else tuple(rotation)
    if isinstance(weight, EncodedWeight):
        return fold_encoded(weight, resolved(given, ()), rounding=rounding, inverse=inverse).encoded
    kernel = tuple(weight.shape[2:]) if weight.ndim == 4 else ()
    rows = weight.reshape(weight.shape[0], -1) if kernel else weight
    folded = fold_encoded(codecs.dense(rows), resolved(given, kernel), rounding=rounding, inverse=inverse)
    return folded.encoded.tensors["weight"].reshape(weight.shape)


def resolved(chain: Sequence[WeightMap], kernel: tuple[int, ...] | None = None) -> tuple[WeightMap, ...]:
    """The maps in the form that the kernels know; with ``kernel``, as a layer with this kernel has the maps."""
    return tuple((r if kernel is None else r.for_layer(kernel, "weight")).resolved() for r in chain)


def fold_encoded(
    encoded: EncodedWeight,
    chain: Sequence[WeightMap],
    into: WeightFormat | None = None,
    rounding: str = "nearest",
    *,
    inverse: bool = False,
) -> FoldedWeight:
    """:func:`fold_weight`, or (``inverse``) :func:`unfold_weight`, with the cost of storing the result. ``chain`` is in
    the live order; ``into`` defaults to the format of ``encoded``.
    """
    f = encoded.format
    into = into or f
    codecs.check_rounding(rounding)
    used = codecs.rounding_of(into, rounding)
    if len(f.shape) != 2:
        remedy = "give a linear layer's weight (out, in), or a convolution's (out, in, kh, kw)"
        raise ShapeError("a rotation needs a weight of two dimensions", shape=f.shape, remedy=remedy)
    for r in chain:
        r.check_fits((f.shape[0], f.shape[1]), "weight")
    if isinstance(into, PackageFormat):
        return _by_package(encoded, chain, into, used, inverse=inverse)
    with rotations.full_precision(encoded.tensors["weight"].device.type):
        order = in_weight_order(chain, inverse=inverse)
        fast = kernels.fold(encoded, order, into, inverse=inverse, rounding=used)
        if fast is not None:
            return fast
        exact = rotate_chain(codecs.decode(encoded), chain, inverse=inverse)
        fast = kernels.store(encoded, exact, into, used)  # None for values that are not finite
        if fast is not None:
            return fast
        if not bool(torch.isfinite(exact).all()):
            remedy = "check the adapter: its rotation or scale is not finite"
            raise NonFiniteError("the rotated weight holds NaN or infinity", format=f.label, remedy=remedy)
        return _stored(encoded, codecs.decode(encoded), exact, chain, into, used)


def _by_package(
    encoded: EncodedWeight, chain: Sequence[WeightMap], into: PackageFormat, used: str, *, inverse: bool
) -> FoldedWeight:
    """:func:`fold_encoded` of a weight that stays in the layout of another package."""
    base = codecs.decode(encoded)
    plain = WeightFormat("dense", into.shape, base.dtype)
    turned = fold_encoded(codecs.dense(base), chain, plain, inverse=inverse)
    return replace(_stored(encoded, base, turned.encoded.tensors["weight"], chain, into, used), backend=turned.backend)


def rotate_group(group: Sequence[EncodedWeight], chain: Sequence[WeightMap], *, inverse: bool = False) -> list[Tensor]:
    """The exact values of weights that were one weight in training, with the maps in them: the maps act on the rows of all
    weights together, as on ``qkv`` where the model holds ``to_q``, ``to_k`` and ``to_v``.
    """
    formats = [e.format for e in group]
    if len({f.shape[1] for f in formats}) != 1:
        message = (
            f"weights of one group need one number of inputs, but have {', '.join(str(f.shape[1]) for f in formats)}"
        )
        raise ShapeError(message, remedy="use the base model that the adapter was trained on")
    rows = [f.shape[0] for f in formats]
    for r in chain:
        r.check_fits((sum(rows), formats[0].shape[1]), "weight")
    with rotations.full_precision(group[0].tensors["weight"].device.type):
        whole = rotate_chain(torch.cat([codecs.decode(e) for e in group]), chain, inverse=inverse)
        if not bool(torch.isfinite(whole).all()):
            remedy = "check the adapter: its rotation or scale is not finite"
            raise NonFiniteError("the rotated weights hold NaN or infinity", format=formats[0].label, remedy=remedy)
        return [part.contiguous() for part in torch.split(whole, rows)]


def fold_group(
    group: Sequence[EncodedWeight], chain: Sequence[WeightMap], rounding: str = "nearest", *, inverse: bool = False
) -> list[FoldedWeight]:
    """:func:`fold_encoded` of the weights of a group; each weight keeps its own format."""
    exact = rotate_group(group, resolved(chain), inverse=inverse)
    return [store_exact(e, x, e.format, rounding) for e, x in zip(group, exact, strict=True)]


def store_exact(encoded: EncodedWeight, exact: Tensor, into: WeightFormat, rounding: str) -> FoldedWeight:
    """``exact``, the values of ``encoded`` after a rotation, in the format ``into``, and the cost of storing."""
    codecs.check_rounding(rounding)
    with rotations.full_precision(exact.device.type):
        used = codecs.rounding_of(into, rounding)
        fast = kernels.store(encoded, exact, into, used)
        return fast or _stored(encoded, codecs.decode(encoded), exact, (), into, used)


def _stored(
    encoded: EncodedWeight,
    base: Tensor,
    exact: Tensor,
    chain: Sequence[WeightMap],
    into: WeightFormat,
    used: str,
) -> FoldedWeight:
    """``exact`` in the format ``into``, by the rounding ``used``, and the cost of storing."""
    folded = _preserved(encoded, base, exact, chain, into) if used == "preserve" else None
    if folded is None:
        used = codecs.rounding_of(into, "grid") if used == "preserve" else used
        folded = FoldedWeight(codecs.encode(exact, into, used), 0.0, rounding=used)
    return measured(folded, base, exact)


def _preserved(
    encoded: EncodedWeight, base: Tensor, exact: Tensor, chain: Sequence[WeightMap], into: WeightFormat
) -> FoldedWeight | None:
    """The weight by :mod:`oftsurgery.weights.preserve`, not measured yet; None if that rounding does not apply."""
    if not preserve.applies(encoded.format, into):
        return None
    if isinstance(into, PackageFormat):
        found = preserve.in_package(encoded, base, exact)
        return None if found is None else FoldedWeight(found[0], 0.0, rounding="preserve", relaxation=found[1])
    own = preserve.scales_of(encoded, into)

    def rows_of(ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        of_base, of_exact = (torch.cat([t[start:stop] for start, stop in ranges]) for t in (base, exact))
        return of_base, of_exact

    steps = preserve.relaxation(rows_of, own, into, chain)
    stored = None if steps is None else preserve.encode_rows(base, exact, own, 0, steps, into.single)
    if steps is None or stored is None:
        return None
    codes, scales, _ = stored
    new = into.kind.assemble(into, codes, preserve.put_scales(own, into, scales))
    return FoldedWeight(new, 0.0, rounding="preserve", relaxation=preserve.relaxation_of(steps))


def measured(folded: FoldedWeight, base: Tensor, exact: Tensor) -> FoldedWeight:
    """``folded`` with its figures, from the weight before the rotation and the exact weight after the rotation."""
    stored = codecs.decode(folded.encoded).to(exact.dtype)
    norm, change = _norm(exact), _norm(exact - base)
    error = _norm(stored - exact)
    held = float(((stored - base).to(torch.float64) * (exact - base)).sum())
    relative = error / norm if norm else error
    nearest = relative if folded.rounding == "nearest" else folded.nearest
    if nearest is None and folded.rounding != "preserve":
        nearest = relative_error(codecs.decode(codecs.encode(exact, folded.encoded.format)), exact)
    return replace(
        folded,
        error=relative,
        nearest=nearest,
        rho=error / change if change else None,
        kept=held / change**2 if change else None,
        change=change,
    )


def rotate_chain(weight: Tensor, chain: Sequence[WeightMap], *, inverse: bool = False) -> Tensor:
    """``weight`` with all of a chain's rotations in it, or (``inverse``) out of it, in float32 or better."""
    for r in in_weight_order(chain, inverse=inverse):
        weight = r.unfold_from(weight) if inverse else r.fold_into(weight)
    return weight


def in_weight_order(chain: Sequence[WeightMap], *, inverse: bool) -> list[WeightMap]:
    """The chain in the order in which its members touch the weight.

    Live, ``x·Ra·Rb·Wᵀ`` applies a first; in ``W' = W Rbᵀ Raᵀ`` the weight meets b first. On the output and embedding
    sides (``(x Wᵀ)·Ra·Rb``, ``E·Ra·Rb``) the weight meets a first, and so with peft's BOFT and HRA (``W Ha Hb``). The sides
    commute with each other, so each side keeps an order of its own.
    """
    check_chain(chain)
    inputs = [r for r in chain if r.side == "input"]
    order = [r for r in chain if r.side != "input"] + inputs[:: 1 if _first_on_weight(inputs) else -1]
    return order[::-1] if inverse else order


def check_chain(chain: Sequence[Any]) -> None:
    """Refuse, with MatchError, a chain of rotations (frozen or live) that has no right order."""
    if any(r.side == "output" for r in chain) and any(map(_scales_rows, chain)):
        raise MatchError(
            "one chain holds a scale (oft_s, boft_s) and a rotation on the output side: they do not commute, and no tool computes both live",
            remedy="fold the adapters one after the other, in the order that you mean",
        )
    inputs = [r for r in chain if r.side == "input"]
    if len({_first_on_weight([r]) for r in inputs}) > 1:
        raise MatchError(
            "one chain holds rotations of the inputs of peft's OFT and of its BOFT or HRA, and peft has an order for each kind alone",
            remedy="fold the adapters one after the other, in the order that you mean",
        )


def _first_on_weight(inputs: Sequence[Any]) -> bool:
    return all(isinstance(r, WeightMap) and r.first_on_weight for r in inputs)


def _scales_rows(r: Any) -> bool:
    return r.scales_rows if isinstance(r, WeightMap) else r.side != "output" and r.scale is not None


def relative_error(stored: Tensor, exact: Tensor) -> float:
    """``‖stored - exact‖ / ‖exact‖`` (Frobenius, accumulated in float64); 0 for two zeros."""
    norm, difference = _norm(exact), _norm(stored.to(exact.dtype) - exact)
    return difference / norm if norm else difference


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
