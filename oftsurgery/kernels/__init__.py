"""The fast paths behind :mod:`oftsurgery.weight`, and which of them serves.

=============  ==================================================================================================================
``numba``      one fused pass on the CPU's threads: dense, NF4, FP4 and int8
``triton``     the same in one kernel on CUDA
``tiled``      the reference's own functions on a few rows at a time, on any device, without temporaries of the weight's size
``reference``  the readable one: decode, rotate, encode
=============  ==================================================================================================================

The fastest that takes a weight is used. ``OFTSURGERY_BACKEND=<name>``, or :func:`use_backend` in code, forces one; what it does not take goes to those
below it. All give the reference's result; where the rotation's sums, taken in another order, round to the other side of a midpoint, a code may differ by one.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module, util
from types import ModuleType

import torch
from torch import Tensor

from .. import rotations
from ..adapter import Rotation
from ..codecs import EncodedWeight, WeightFormat
from ..errors import BackendWarning, MissingDependencyError, OFTSurgeryError, StateError, printable

__all__ = ["backends", "fold", "use_backend"]

_NAMES = ("numba", "triton", "tiled", "reference")
_VARIABLE = "OFTSURGERY_BACKEND"
_forced: ContextVar[str | None] = ContextVar("oftsurgery_backend", default=None)
#: why a fast path is not to be used (again) in this process
_broken: dict[str, str] = {}

Result = tuple[EncodedWeight, float, str]


def backends() -> dict[str, str]:
    """``{name: "ready", or why it does not serve}`` of all backends, the fastest first; ``"forced"`` where ``OFTSURGERY_BACKEND`` or
    :func:`use_backend` names it.

    >>> import oftsurgery
    >>> oftsurgery.backends()["reference"]
    'ready'
    """
    state = {name: _problem(name) or "ready" for name in _NAMES}
    name = _choice()
    return state if name is None else state | {name: "forced"}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend (or ``"auto"``) for the body, as ``OFTSURGERY_BACKEND`` does for a process.

    Raises:
        StateError: no such backend.
        MissingDependencyError: it cannot serve here.
    """
    token = _forced.set(name)
    try:
        _choice()
        yield
    finally:
        _forced.reset(token)


def _choice() -> str | None:
    """The forced backend, or None."""
    name = _forced.get() or os.environ.get(_VARIABLE) or "auto"
    if name == "auto":
        return None
    if name not in _NAMES:
        raise StateError(f"unknown backend {printable(name)!r}", remedy=f"{_VARIABLE}: auto, {', '.join(_NAMES)}")
    problem = _problem(name)
    if problem:
        raise MissingDependencyError(f"the backend {name} is forced, and cannot serve: {problem}", remedy=f"unset {_VARIABLE}")
    return name


def _problem(name: str) -> str | None:
    if name in _broken:
        return _broken[name]
    if name in ("numba", "triton") and util.find_spec(name) is None:
        return f"{name} is not installed"
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device"
    return None


def fold(encoded: EncodedWeight, order: Sequence[Rotation], into: WeightFormat, *, inverse: bool) -> Result | None:
    """The folded weight, its relative error and the backend that computed it; None where the reference is to.

    Args:
        order: the rotations in the order in which they touch the weight.
        into: the format to store it in.
        inverse: unfold.

    Raises:
        OFTSurgeryError: as the reference does.
    """
    forced = _choice()
    if forced == "reference":
        return None
    blocks = [_blocks(r).to(encoded.tensors["weight"].device) for r in order]
    if forced != "tiled":
        name = forced or ("numba" if encoded.tensors["weight"].device.type == "cpu" else "triton")
        result = _fused(name, encoded, order, blocks, into, inverse=inverse)
        if result is not None:
            return (*result, name)
    from . import tiled

    tiles = tiled.fold(encoded, into, list(zip(order, blocks, strict=True)), inverse=inverse)
    return None if tiles is None else (*tiles, "tiled")


def _fused(
    name: str, encoded: EncodedWeight, order: Sequence[Rotation], blocks: Sequence[Tensor], into: WeightFormat, *, inverse: bool
) -> tuple[EncodedWeight, float] | None:
    problem = _problem(name)
    if problem is not None:
        if name not in _broken:
            _give_up(name, problem)
        return None
    matrices = _matrices(order, blocks, encoded.format.shape[1], inverse=inverse)
    if matrices is None:
        return None
    try:
        driver = import_module(".fold_cpu" if name == "numba" else ".fold_gpu", __name__)
        return driver.fold(encoded, into, *matrices)  # type: ignore[no-any-return]
    except OFTSurgeryError:
        raise
    except Exception as error:  # noqa: BLE001 - a compiler's errors are of any class; the slower path has the same result
        _give_up(name, f"{type(error).__name__}: {printable(str(error))}", error)
        return None


def _give_up(name: str, problem: str, error: Exception | None = None) -> None:
    """Not again in this process, and said once."""
    _broken[name] = problem
    warnings.warn(
        f"the fast path {name} cannot serve ({problem}); folds go on without it, slower, with the same result",
        BackendWarning,
        stacklevel=2,
        source=error,
    )


# --- one matrix a block -------------------------------------------------------------------------------------------------------------------------


def _blocks(rotation: Rotation) -> Tensor:
    return rotation.blocks


def _matrices(
    order: Sequence[Rotation], blocks: Sequence[Tensor], features: int, *, inverse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """``M: (n, b, b)`` float32 and ``s: (out,)`` or None, such that ``s · (W · blockdiag(M))`` is the folded weight; b a multiple of 16.

    None where a rotation is of the rows themselves, or its blocks do not come together in reasonable ones.
    """
    if any(r.side == "output" for r in order):
        return None
    b = math.lcm(16, *(r.block_size for r in order))
    if b > 512 or features % b:
        return None
    whole: Tensor | None = None
    scale: Tensor | None = None
    for rotation, own in zip(order, blocks, strict=True):
        m = own
        if inverse:
            m = own.transpose(1, 2) if rotation.cayley.exact else rotations.inverse_blocks(own)
        if rotation.side == "input":
            m = m.transpose(1, 2)
        m = _widen(m, b)
        whole = m if whole is None else whole @ m
        if rotation.scale is not None:
            if inverse and bool((rotation.scale == 0).any()):
                return None
            factor = rotation.scale.detach().to(torch.float64)
            factor = 1 / factor if inverse else factor
            scale = factor if scale is None else scale * factor
    if whole is None:
        return None
    return whole.to(torch.float32), None if scale is None else scale.to(torch.float32)


def _widen(m: Tensor, b: int) -> Tensor:
    """Blocks ``(n, a, a)`` as blocks ``(n·a/b, b, b)`` that hold b/a of them on the diagonal (``(1, b, b)`` for a single, shared one)."""
    n, a, _ = m.shape
    if a == b:
        return m
    each = b // a
    m = m.expand(each, a, a) if n == 1 else m
    wide = m.new_zeros(m.shape[0] // each, each, a, each, a)
    for i in range(each):
        wide[:, i, :, i, :] = m[i::each]
    return wide.reshape(-1, b, b)
