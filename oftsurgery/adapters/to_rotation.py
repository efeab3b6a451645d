"""Maps of the inputs as the block rotations that peft 0.21 holds, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, ShapeError

from .boft import PeftBoft
from .hra import Householder
from .parts import RowParts
from .road import Pairs
from .rotation import Rotation, bounded_generator
from .weight_map import WeightMap

#: the remedy where the base is needed
GIVE_BASE = (
    "name the base: oftsurgery.as_peft(adapter, 'BASE').save('OUTPUT'), oftsurgery adapter convert … --base BASE"
)

_FOLD = "fold the adapter as it is: a fold needs no conversion"
_IN_PEFT = "fold the adapter; or load its folder with peft 0.21, which reads this kind of adapter as it is"
# larger distances from orthogonality are no rounding
_ROUNDING = 1e-9


def as_rotation(m: WeightMap, shape: tuple[int, ...] | None = None) -> Rotation:
    """The map as the block rotation that peft 0.21's live layer computes.

    Args:
        shape: the shape of the layer's weight, ``(out, in)`` or ``(out, in, kh, kw)``; None where the layer is not known.

    Raises:
        AdapterError: peft 0.21 has no form for the map, or the layer must be known.
    """
    if isinstance(m, RowParts) and m.side == "input":
        m = _of_all_parts(m)
    kernel = None if shape is None else shape[2:]
    if not isinstance(m, Rotation) and m.side == "output":
        remedy = _IN_PEFT if isinstance(m, Pairs) else _FOLD
        raise AdapterError(f"the adapter's map ({m.family}) is none that peft 0.21 can store as OFT", remedy=remedy)
    if kernel not in (None, (), (1, 1)):
        message = (
            f"peft 0.21 has no form for a {kernel[0]}×{kernel[1]} convolution: its live layer overlaps the patches"
        )
        raise AdapterError(message, remedy=_FOLD)
    if m.asks_layer and kernel is None:
        message = f"the adapter's files do not tell a linear layer from a convolution, on which the map ({m.family}) is another one"
        raise AdapterError(message, remedy=GIVE_BASE)
    bound = m if kernel is None else m.for_layer(kernel, "")
    if isinstance(bound, PeftBoft):
        return _of_boft(bound, kernel)
    if isinstance(bound, Householder):
        return _of_reflections(bound, kernel)
    found = bound.resolved()
    if not isinstance(found, Rotation):
        raise AdapterError(f"the adapter's map ({m.family}) is none that peft 0.21 can store as OFT", remedy=_FOLD)
    features = None if shape is None else math.prod(shape[1:])
    if found.generator.shape[0] == 1 and found.block_size == features:
        return replace(found, shared=False)  # the one block of the layer is nobody's share
    return found


def _of_all_parts(m: RowParts) -> WeightMap:
    """The one map that all parts of a fused weight have."""
    first, *others = m.maps
    same = len(m.maps) == len(m.parts) and all(
        other.settings() == first.settings()
        and all(torch.equal(t, other.tensors()[name]) for name, t in first.tensors().items())
        for other in others
    )
    if not same:
        message = "the base fuses modules whose inputs the adapter turns by different rotations, and one layer has one rotation"
        raise AdapterError(message, remedy=f"{_FOLD}; or name a base that has these modules apart")
    return first


def _of_boft(m: PeftBoft, kernel: tuple[int, ...] | None) -> Rotation:
    """The factors' product, which lies in blocks of the last factor's groups."""
    if kernel is None and m.scale.shape[0] == 1:
        message = "the adapter's files do not tell the size of a convolution's kernel"
        raise AdapterError(message, remedy=GIVE_BASE)
    if m.relaid:
        message = "the adapter has a convolution whose weight peft ≤ 0.13 relays before it turns it, which no rotation of the inputs does"
        raise AdapterError(message, remedy=_FOLD)
    if bool((m.scale != 1).any()):
        message = "the adapter has a trained scale of the outputs (boft_s), for which peft 0.21's OFT has no place"
        raise AdapterError(message, tensor="boft_s", remedy=_IN_PEFT)
    plain = replace(m, scale=torch.ones(m.features, 1))
    return _in_blocks(plain, m.features, min(m.features, m.block_size * 2 ** (len(m.blocks) - 1)))


def _of_reflections(m: Householder, kernel: tuple[int, ...] | None) -> Rotation:
    if kernel is None:
        message = "the adapter's files do not tell a linear layer from a convolution"
        raise AdapterError(message, remedy=GIVE_BASE)
    features, count = m.u.shape
    if count % 2:
        message = f"the adapter has {count} reflections a module, and an odd number of reflections is no rotation"
        raise AdapterError(message, tensor="hra_u", remedy=_IN_PEFT)
    return _in_blocks(m, features, features)


def _in_blocks(m: WeightMap, features: int, size: int) -> Rotation:
    """The orthogonal map of ``features`` inputs as rotations in blocks of ``size``."""
    turned = m.fold_into(torch.eye(features, dtype=torch.float64)).mT  # W' = W · blockdiag(R)ᵀ
    blocks = torch.stack([turned[i : i + size, i : i + size] for i in range(0, features, size)])
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]  # of torch
    eye = torch.eye(size, dtype=torch.float64)
    if float((turned - whole).abs().max()) > _ROUNDING or float((blocks @ blocks.mT - eye).abs().max()) > _ROUNDING:
        message = f"the adapter's map ({m.family}) is no rotation in blocks of {size} inputs"
        raise AdapterError(message, remedy=_FOLD)
    try:
        return Rotation(bounded_generator(blocks), shared=False)
    except AdapterError as error:  # the same distance from π, and another remedy
        raise AdapterError(error.message, remedy=_IN_PEFT) from None


def in_one_config(modules: Mapping[str, Rotation], features: Mapping[str, int]) -> dict[str, Rotation]:
    """The same rotations in blocks that one config of peft states: all of one size, or all of one number.

    Args:
        features: ``{path: the inputs that the module's rotation covers}``.
    """
    sizes = {r.block_size for r in modules.values()}
    shared = {r._one_for_all for r in modules.values()}
    if len(sizes) == 1 and len(shared) == 1:
        return dict(modules)
    apart = {path: _own_blocks(r, features[path]) for path, r in modules.items()}
    size = math.lcm(*sizes)
    if all(count % size == 0 for count in features.values()):
        return apart
    number = math.gcd(*(len(r.generator) for r in apart.values()))
    return {path: _in_larger(r, features[path] // number) for path, r in apart.items()}


def _own_blocks(r: Rotation, features: int) -> Rotation:
    """The rotation with a block of its own in each place."""
    if not r._one_for_all:
        return r
    if features % r.block_size:
        message = f"blocks of size {r.block_size} do not cover the {features} inputs"
        raise ShapeError(message, remedy="use the base that the adapter was trained on")
    return replace(r, generator=r.generator.repeat(features // r.block_size, 1), shared=False)


def _in_larger(r: Rotation, size: int) -> Rotation:
    q: Tensor = rotations.skew(r.generator.detach().to("cpu", torch.float64))
    return replace(r, generator=rotations.vector(rotations.block_diagonal(q, size, shared=False)))
