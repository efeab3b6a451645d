r"""Extract the rotation that takes a base weight to a merged weight, and estimate how good and how certain it is.

The functions are pure. Let ``W`` be the base's weight and ``W'`` the merged weight, both ``(out, in)`` and decoded
exactly. Each block of columns is an orthogonal Procrustes problem: the ``R`` in SO(b) that minimises ``‖W' - W Rᵀ‖`` is
the rotation nearest to ``W'ᵀ W`` (Schönemann 1966), and ``Q = (I - R)(I + R)⁻¹`` is its generator. For a rotation of the
outputs, both weights are taken transposed; "rows" below are then the inputs.

If ``W'`` was stored in a coarse format, this plain fit turns by too little: a weight that the rotation moved by less
than half a step was rounded back. But the storing can be repeated. Let ``S(R)`` be the stored fold of the base by
``R``: the fit is repeated on ``W Rᵀ + (W' - S(R))`` until ``S(R)`` comes no nearer to ``W'``. At the right ``R`` the
two are equal to the bit.

Two fits of half of the rows each are independent, and their difference gives an estimate of the error. The prediction
of the other half's rows shows how much of the difference is a rotation, and how large its blocks are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.errors import ExtractionError, NonFiniteError, ShapeError, StateError, share
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.rotations import Side

from . import preserve
from .fold import fold_encoded, relative_error
from .kernels.blockwise import FoldedWeight

# a held-out residual within this factor of the least counts as the least: the smallest such block size is taken
_WITHIN = 1.02
# but above this factor the size may be too small, because overfit at the true size hides the difference: the user must say
_NEAR = 1.005
# and without a rotation the residual must be above the least by this factor, or the block size is a guess
_CLEAR = 1.04
# the largest block size that is tried; larger sizes must be given
_LARGEST = 512
# rotations of the inputs that explain less, or gain less, are compared with rotations of the outputs: blocks of more columns than there
# are rows predict a part of what the outputs' rotations do
_OTHER_SIDE, _SURE = 0.9, 4.0
_FEATURES: Mapping[Side, str] = {"input": "input features", "output": "output features", "embedding": "features"}
# residuals below this are float64's own rounding
_FLOOR = 1e-12
_STEPS = 8
_CHUNK = 1 << 22  # elements that are held in float64 at a time

# ‖Q₁ - Q₂‖ of two halves, divided by the error of the whole: a plain fit's error goes with N^(-1/2) in the rows, so 2; the
# error of a fit that is refined against the stored codes goes with a power between N^(-1/2) and N^(-1), so 2^(5/4). See
# docs/extraction.md
_PLAIN, _REFINED = 2.0, 2.0**1.25


@dataclass(frozen=True, eq=False)
class ExtractedRotation:
    """A rotation out of one pair of weights.

    >>> turn = oftsurgery.Rotation(generator=torch.tensor([[0.1], [0.2]]))
    >>> base = torch.randn(64, 4, dtype=torch.float64)
    >>> found = oftsurgery.extract_rotation(base, oftsurgery.fold_weight(base, turn))
    >>> found.change > 0.1, found.residual < 1e-6, found.bounded
    (True, True, False)

    Attributes:
        rotation: with the exact Cayley map.
        change: ``‖W' - W‖ / ‖W'‖`` (Frobenius), the difference that is to be explained.
        residual: ``‖W' - W Rᵀ‖ / ‖W'‖``, what the rotation leaves.
        rounding: the relative error of storing ``W Rᵀ`` in the format of ``W'``.
        explained: the fraction of the squared change, the rounding aside, that the rotation explains on rows that it was
            not fitted to: 1 for a rotation, about 0 for anything else.
        error: estimated relative error of the generator, ``‖Q - Q_true‖ / ‖Q_true‖`` (Frobenius, all blocks).
        angle_error: estimated root mean square of the error of directions, radians.
        bounded: whether a block turns by more than the largest generator allows (‖Q‖₂ = 100, 3.12 rad) and is given that
            largest turn.
    """

    rotation: Rotation
    change: float
    residual: float
    rounding: float
    explained: float
    error: float
    angle_error: float
    bounded: bool = False

    def to_dict(self) -> dict[str, float | int | bool | str]:
        """The figures, as plain values."""
        r = self.rotation
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rotation"}
        return {"block_size": r.block_size, "side": r.side, "angle": r.angle, **figures}


def extract_rotation(
    base: Tensor | EncodedWeight,
    merged: Tensor | EncodedWeight,
    block_size: int | None = None,
    *,
    embedding: bool = False,
    side: Literal["input", "output"] | None = None,
) -> ExtractedRotation:
    """The rotation that takes one weight to another: the mirror of :func:`~oftsurgery.fold_weight`.

    >>> turn = oftsurgery.Rotation(generator=torch.tensor([[0.1], [0.2]]))
    >>> base = torch.randn(64, 4, dtype=torch.float64)
    >>> found = oftsurgery.extract_rotation(base, oftsurgery.fold_weight(base, turn))
    >>> found.rotation.generator.round(decimals=6).tolist(), found.explained > 0.999
    ([[0.1], [0.2]], True)

    Args:
        base: ``(out, in)``, a plain tensor or an :class:`~oftsurgery.EncodedWeight` of any codec.
        merged: of the same shape, in any format.
        block_size: of the rotation; None to detect it.
        embedding: the weights are ``(tokens, features)``, and the result rotates an embedding's features.
        side: whether the inputs or the outputs are rotated (kohya, LyCORIS, peft ≤ 0.13); None: the inputs, or else the outputs where
            rotations of these predict the difference and those of the inputs do not.

    Returns:
        an :class:`~oftsurgery.ExtractedRotation`: the rotation, and how well it explains the difference.

    Raises:
        ShapeError: the shapes differ, or the block size does not divide the features of the side.
        ExtractionError: the weights do not tell the block size.
        NonFiniteError: NaN or infinity in a weight.
    """
    before, after = (w if isinstance(w, EncodedWeight) else codecs.dense(w) for w in (base, merged))
    if embedding and side is not None:
        message = "an embedding's features are rotated, which have no side"
        raise StateError(message, remedy="leave out side=…, or embedding=True")
    chosen: Side = "embedding" if embedding else side or "input"
    if block_size is not None:
        found = extract_encoded(before, after, block_size, chosen)
        if side is None and not embedding and found.explained < _OTHER_SIDE and after.format.shape[0] % block_size == 0:
            other = extract_encoded(before, after, block_size, "output")
            return max(found, other, key=lambda one: one.explained)
        return found

    def on(one: Side) -> tuple[int, float]:
        curve = block_size_curve(before, after, one)
        return choose_block_size([curve], one), curve[1]

    size, chosen = on_better_side(on) if side is None and not embedding else (on(chosen)[0], chosen)
    return extract_encoded(before, after, size, chosen)


T = TypeVar("T")


def on_better_side(on: Callable[[Side], tuple[T, float]]) -> tuple[T, Side]:
    """``(what was found, side)``: of the inputs, or of the outputs where rotations of these predict the difference better.

    Args:
        on: function from a side to what is found there, and the residual without a rotation in units of the residual with the best
            rotations; it raises an :class:`ExtractionError` where nothing is found.

    Raises:
        ExtractionError: nothing is found on either side.
    """
    try:
        inputs, gain = on("input")
    except ExtractionError:
        with suppress(ExtractionError):
            return on("output")[0], "output"
        raise
    if gain < _SURE:
        with suppress(ExtractionError):
            outputs, other = on("output")
            if other > gain:
                return outputs, "output"
    return inputs, "input"


def extract_encoded(
    base: EncodedWeight, merged: EncodedWeight, block_size: int, side: Side = "input"
) -> ExtractedRotation:
    """:func:`extract_rotation` with a known block size and side."""
    _check_shapes(base, merged)
    features = base.format.shape[0 if side == "output" else 1]
    if block_size < 2 or features % block_size:
        raise ShapeError(
            f"block size {block_size} does not divide the {features} {_FEATURES[side]}",
            shape=base.format.shape,
            remedy="give a divisor of all rotated layers' features, or None to detect one for each width",
        )
    with rotations.full_precision("cpu"):
        base, w, m = _seen_by_the_adapter(
            base.cpu(), merged.cpu(), side, lambda w, m: _residual2(w, m, _fit(w, m, block_size))
        )
        fold = partial(fold_encoded, base, into=merged.format, rounding=_rounding_of(base, merged.cpu()))
        coarse = merged.format.quantised or merged.format.dtype not in (torch.float32, torch.float64)
        return _extract(_Storing(fold, side), w, m, block_size, _STEPS if coarse else 0)


@dataclass(frozen=True)
class _Storing:
    """How the merged weight was stored.

    Attributes:
        fold: function that folds rotations into the base and stores the result as the merged weight was stored.
        side: the side of the rotations.
    """

    fold: Callable[[Sequence[Rotation]], FoldedWeight]
    side: Side

    def rotation(self, q: Tensor) -> Rotation:
        """The rotation with the generators ``q: (n, b, b)`` of the fit ``m = w Rᵀ``."""
        # E' = E R, and W'ᵀ = Wᵀ R on the output side, so these rotations are the transposes
        v = rotations.vector(q if self.side == "input" else -q)
        return Rotation(v, side=self.side, shared=False, whole=self.side == "output")

    def stored(self, q: Tensor) -> Tensor:
        """The stored fold, decoded, with the features of the side in the columns."""
        return _turned(codecs.decode(self.fold([self.rotation(q)]).encoded), self.side)


def _turned(weight: Tensor, side: Side) -> Tensor:
    return weight.t().contiguous() if side == "output" else weight


def _rounding_of(base: EncodedWeight, merged: EncodedWeight) -> str:
    """The rounding of the merged weight: a fold with "preserve" keeps the base's scales, a fold with "nearest" does not."""
    if not preserve.applies(base.format, merged.format):
        return "nearest"
    own, new = (preserve.scales_of(e, replace(e.format, nested_blocksize=0)).values for e in (base, merged))
    return "preserve" if float((own == new).to(torch.float32).mean()) > 0.5 else "nearest"


def _extract(store: _Storing, w: Tensor, m: Tensor, b: int, most: int) -> ExtractedRotation:
    """The rotation in blocks of ``b``, refined in at most ``most`` steps."""
    norm = _norm2(m)
    r, steps, _ = _refine(store, w, m, b, slice(None), slice(0), most)
    halves = (slice(0, None, 2), slice(1, None, 2))
    refined = [_refine(store, w, m, b, rows, others, steps) for rows, others in (halves, halves[::-1])]
    parts, stored = [part for part, _, _ in refined], [missed for _, _, missed in refined]
    q, bounded = _bounded_generator(r)
    q_halves = [_bounded_generator(part)[0] for part in parts]
    spread = _REFINED if steps else _PLAIN
    size = float(q.norm())
    error = float((q_halves[0] - q_halves[1]).norm()) / spread / size if size else 0.0
    angle_error = float((parts[0] - parts[1]).norm()) / math.sqrt(r.shape[0] * b) / spread
    rotation = store.rotation(q)
    change = _norm2(m - w) / norm
    residual = _residual2(w, m, rotations.cayley(q)) / norm
    rounding = store.fold([rotation]).error ** 2
    held_out = sum(_residual2(w[rows], m[rows], part) for part, rows in zip(parts[::-1], halves, strict=True)) / norm
    explained = 1 - (held_out - rounding) / (change - rounding) if change > rounding else 0.0
    if stored[0] is not None and stored[1] is not None:
        # if the change is not much more than the rounding, equal stored values show a rotation, and their distance does not
        explained = max(explained, 1 - (stored[0] + stored[1]) / norm / change)
    return ExtractedRotation(
        rotation=rotation,
        change=math.sqrt(change),
        residual=math.sqrt(residual),
        rounding=math.sqrt(rounding),
        explained=min(max(explained, 0.0), 1.0),
        error=error,
        angle_error=angle_error,
        bounded=bounded,
    )


def _check_shapes(base: EncodedWeight, merged: EncodedWeight) -> None:
    if base.format.shape != merged.format.shape or len(base.format.shape) != 2:
        shape, expected, remedy = merged.format.shape, base.format.shape, "give the base that was merged"
        message = "base and merged weight are not of one shape (out, in)"
        raise ShapeError(message, shape=shape, expected=expected, remedy=remedy)


def _seen_by_the_adapter(
    base: EncodedWeight, merged: EncodedWeight, side: Side, distance: Callable[[Tensor, Tensor], float]
) -> tuple[EncodedWeight, Tensor, Tensor]:
    """``(base, W, W')`` with the base that the adapter saw, and the side's features in the columns. A QOFT adapter is trained on a quantised base: if the
    merged weight is quantised and the base is plain, the base is quantised likewise, if that lies nearer by ``distance``.
    """
    w, m = (_turned(codecs.decode(one), side) for one in (base, merged))
    if merged.format.quantised and not base.format.quantised:
        quantised = codecs.encode(codecs.decode(base), merged.format)
        w_quantised = _turned(codecs.decode(quantised), side)
        if distance(w_quantised, m) < distance(w, m):
            return quantised, w_quantised, m
    return base, w, m


# --- one fit ----------------------------------------------------------------------------------------------------------


def _blocks(w: Tensor, m: Tensor, b: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """``(which blocks, W, W')`` as ``(blocks, rows, b)`` float64, a few at a time."""
    rows, features = w.shape
    step = max(1, _CHUNK // max(1, rows * b))
    for start in range(0, features // b, step):
        which = slice(start, min(start + step, features // b))
        columns = slice(which.start * b, which.stop * b)
        wb, mb = (t[:, columns].double().reshape(rows, -1, b).transpose(0, 1) for t in (w, m))
        yield which, wb, mb


def _fit(w: Tensor, m: Tensor, b: int) -> Tensor:
    """The ``R: (n, b, b)`` that minimises ``‖m - w Rᵀ‖``."""
    eye = torch.eye(b, dtype=torch.float64)
    found = []
    for _, wb, mb in _blocks(w, m, b):
        gram = mb.mT @ wb
        # directions that the weight does not have are not turned
        weight = torch.linalg.matrix_norm(gram, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        found.append(rotations.nearest_rotation(gram / weight + 1e-12 * eye)[0])
    return torch.cat(found)


def _residual2(w: Tensor, m: Tensor, r: Tensor) -> float:
    """``‖m - w Rᵀ‖²``."""
    return sum(float((mb - wb @ r[which].mT).square().sum()) for which, wb, mb in _blocks(w, m, r.shape[-1]))


def _norm2(x: Tensor) -> float:
    return max(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2, torch.finfo(torch.float64).tiny)


def _refine(
    store: _Storing, w: Tensor, m: Tensor, b: int, rows: slice, others: slice, steps: int
) -> tuple[Tensor, int, float | None]:
    """The fit of the rows, refined against the storing of ``m``; the number of steps, at most ``steps``; and the squared
    error of its prediction of the other rows' stored values (None for a fit that was not refined).
    """
    r = _fit(w[rows], m[rows], b)
    if not steps:
        return r, 0, None
    best, least, taken, held_out = r, _residual2(w[rows], m[rows], r), 0, None
    for step in range(steps + 1):
        difference = m - store.stored(_bounded_generator(r)[0])
        mismatch = _norm2(difference[rows])
        if mismatch < least:
            best, least, taken, held_out = r, mismatch, step, _norm2(difference[others])
        elif step > 1:
            break
        if step < steps:
            target = rotations.rotate_weight(w, r, "input").add_(difference)
            r = _fit(w[rows], target[rows], b)
    return best, taken, held_out


def _bounded_generator(r: Tensor) -> tuple[Tensor, bool]:
    """Skew-symmetric ``Q: (n, b, b)`` of rotations ``r``, bounded for rotations by nearly π, and whether any was bounded."""
    near = rotations.generator_norm(r) > rotations.MAX_NORM
    q = torch.empty_like(r)
    if not bool(near.all()):
        q[~near] = rotations.generator_of(r[~near])
    for i in near.nonzero().reshape(-1).tolist():
        q[i] = _bounded(r[i])
    return q, bool(near.any())


def _bounded(r: Tensor) -> Tensor:
    """The generator of ``r: (b, b)``, with the largest norm in planes that turn by nearly π."""
    # R = S + K, symmetric and skew, commute: with eigenvalues cos φ and i sin φ, Q is -K/(1 + cos φ), whose modulus
    # tan(φ/2) is bounded in the planes where cos φ is nearly -1
    cosines, v = torch.linalg.eigh((r + r.mT) / 2)
    k = v.mT @ ((r - r.mT) / 2) @ v
    limit = rotations.MAX_NORM
    far = cosines < (1 - limit**2) / (1 + limit**2)
    count = int(far.sum())
    q = torch.zeros_like(r)
    q[count:, count:] = -k[count:, count:] / (1 + cosines[count:]).unsqueeze(-1)
    # in those planes Q is -limit times the skew orthogonal factor of K; at φ = π K is zero and leaves the pairing free
    pairs = torch.zeros(count, count, dtype=r.dtype)
    pairs[range(0, count - 1, 2), range(1, count, 2)] = 1e-9
    u, _, vh = torch.linalg.svd(k[:count, :count] + pairs - pairs.mT)
    q[:count, :count] = -limit * (u @ vh)
    whole: Tensor = v @ ((q - q.mT) / 2) @ v.mT
    return (whole - whole.mT) / 2


# --- the block size ---------------------------------------------------------------------------------------------------


def block_size_curve(base: EncodedWeight, merged: EncodedWeight, side: Side = "input") -> dict[int, float]:
    """How well rotations of each block size predict rows that they were not fitted to.

    The function tries the divisors of the side's features up to 512, from small to large, until none can be better.

    Returns:
        ``{block size: ‖W' - W Rᵀ‖ / ‖W'‖}`` over both halves of the rows, each with the ``R`` of the other half, in units
        of the least; block size 1 stands for no rotation.
    """
    _check_shapes(base, merged)
    features = base.format.shape[0 if side == "output" else 1]
    with rotations.full_precision("cpu"):
        _, w, m = _seen_by_the_adapter(base.cpu(), merged.cpu(), side, lambda w, m: _norm2(m - w))
        norm = _norm2(m)
        held_out = {1: max(math.sqrt(_norm2(m - w) / norm), _FLOOR)}
        for b in (d for d in range(2, min(features, _LARGEST) + 1) if features % d == 0):
            squares = sum(_residual2(w[1 - i :: 2], m[1 - i :: 2], _fit(w[i::2], m[i::2], b)) for i in (0, 1))
            held_out[b] = max(math.sqrt(squares / norm), _FLOOR)
            best = min(held_out, key=lambda size: held_out[size])
            if b >= 4 * best and held_out[1] > _CLEAR * held_out[best]:
                break
    if not all(map(math.isfinite, held_out.values())):
        raise NonFiniteError("a held-out residual is not finite", remedy="check both weights for NaN and infinity")
    least = min(held_out.values())
    return {b: residual / least for b, residual in held_out.items()}


def choose_block_size(curves: Sequence[Mapping[int, float]], side: Side = "input") -> int:
    """The smallest block size whose held-out residual is within 2 % of the least, over all of ``curves`` (from
    :func:`block_size_curve`, of weights of one width) together.

    Raises:
        ExtractionError: no rotation predicts the other half's rows clearly better than no rotation, or two block sizes
            predict them equally well.
    """
    sizes = set.intersection(*map(set, curves))
    pooled = {b: sum(curve[b] for curve in curves) / len(curves) for b in sorted(sizes)}
    least = min(pooled.values())
    chosen = min(b for b, h in pooled.items() if h <= _WITHIN * least)
    if chosen == 1 or pooled[1] <= _CLEAR * least or pooled[chosen] > _NEAR * least:
        gain = 1 - (least / pooled[1]) ** 2
        raise ExtractionError(
            f"no block size can be told: rotations of the {_FEATURES[side]} explain {share(gain, '.1%')} of the difference on rows that they "
            "were not fitted to, so the difference is not such a rotation (a LoRA or full fine-tune), or the rotation is too small "
            "against the rounding of the stored weights",
            remedy="give block_size=… for the best rotation of that size and its quality, or give less coarsely stored weights",
        )
    return chosen


def unrotated(base: EncodedWeight, merged: EncodedWeight) -> bool:
    """Whether ``merged`` is ``base`` itself, perhaps stored in another format."""
    base, merged = base.cpu(), merged.cpu()
    w, m = codecs.decode(base), codecs.decode(merged)
    change = relative_error(m, w)
    if change == 0:
        return True
    stored = codecs.decode(codecs.encode(w, merged.format))
    return change <= 1.05 * relative_error(stored, w)
