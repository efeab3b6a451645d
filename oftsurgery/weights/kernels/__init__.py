"""The fast paths behind :mod:`oftsurgery.weights.fold`, and the choice between them.

=============  ==================================================================================================================
``numba``      one fused pass on the CPU's threads: dense, NF4, FP4 and int8
``triton``     the same on CUDA, without the rounding ``mse``
``tiled``      the reference's own functions on a few rows at a time, on any device, without temporaries of the weight's size
``reference``  the readable path: decode, rotate, encode
=============  ==================================================================================================================

The fastest path that takes a weight is used. ``OFTSURGERY_BACKEND=<name>``, or :func:`use_backend` in code, forces a
path; a weight that it does not take goes to the paths below. All paths give the reference's result, but a code may differ
by one if the rotation's sums, taken in another order, round to the other side of a midpoint.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from importlib import import_module, util
from types import ModuleType
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.rotation import Cayley, Rotation
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import BackendWarning, MissingDependencyError, OFTSurgeryError, StateError, printable
from oftsurgery.formats.codecs import Grid
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.weights import preserve

from .blockwise import FoldedWeight
from .pool import start

__all__ = ["FoldedWeight", "backends", "fold", "measure", "prepare", "start", "store", "sweep", "use_backend"]

T = TypeVar("T")

_NAMES = ("numba", "triton", "tiled", "reference")
_VARIABLE = "OFTSURGERY_BACKEND"
#: for larger blocks a matrix product is faster than the fused kernels
_MAX_BLOCK = 512
_forced: ContextVar[str | None] = ContextVar("oftsurgery_backend", default=None)
#: 129 steps from 0 to i
_TO_ONE = 1j * np.linspace(0, 1, 129)
#: fast path → the reason why this process does not use it (again)
_broken: dict[str, str] = {}


def backends() -> dict[str, str]:
    """``{name: state}`` of all backends, the fastest first.

    >>> oftsurgery.backends()["reference"]
    'ready'

    The state is ``"ready"``, the reason why the backend does not serve here, or ``"forced"`` where ``OFTSURGERY_BACKEND``
    or :func:`use_backend` names the backend.
    """
    state = {name: _problem(name) or "ready" for name in _NAMES}
    name = _choice()
    return state if name is None else state | {name: "forced"}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend (or ``"auto"``) for the body of a ``with``, as ``OFTSURGERY_BACKEND`` does for a process.

    >>> with oftsurgery.use_backend("reference"):
    ...     oftsurgery.backends()["reference"]
    'forced'

    Raises:
        StateError: there is no backend of that name.
        MissingDependencyError: the backend cannot serve here.
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
        known = ", ".join(("auto", *_NAMES))
        raise StateError(f"unknown backend {printable(name)!r}", remedy=f"use for {_VARIABLE} one of {known}")
    problem = _missing(name)
    if problem:
        raise MissingDependencyError(
            f"the backend {name} is forced, and cannot serve: {problem}",
            remedy=f"unset {_VARIABLE}, or leave out use_backend",
        )
    return name


def _problem(name: str) -> str | None:
    return _broken.get(name) or _missing(name)


def _missing(name: str) -> str | None:
    if name in ("numba", "triton") and not _installed(name):
        return f"{name} is not installed"
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device"
    return None


@cache
def _installed(name: str) -> bool:
    return util.find_spec(name) is not None


def prepare(encoded: EncodedWeight, into: WeightFormat, rounding: str) -> None:
    """Begin to read or to compile what :func:`fold` needs, while the caller does other work."""
    if encoded.tensors["weight"].device.type == "cpu" and _choice() in (None, "numba"):
        _serve("numba", lambda driver: driver.prepare(encoded.format, into, rounding))


def fold(
    encoded: EncodedWeight, order: Sequence[WeightMap], into: WeightFormat, *, inverse: bool, rounding: str = "nearest"
) -> FoldedWeight | None:
    """The folded weight; None for a weight that the reference must fold.

    Args:
        order: the rotations in the order in which they touch the weight.
        into: the format in which the weight is stored.
        inverse: take the rotations out.
        rounding: as for :func:`oftsurgery.fold`, and known to ``into``.

    Raises:
        OFTSurgeryError: as the reference does.
    """
    forced = _choice()
    known = [r for r in order if isinstance(r, Rotation) and not _turns_many_rows(r)]
    if forced == "reference" or len(known) < len(order):
        return None
    device = encoded.tensors["weight"].device
    if any(r.side == "output" for r in known) and _stores(encoded, into):
        return None  # the rows are rotated as a whole, and `store` does the rest
    if forced != "tiled":
        name = forced or ("numba" if device.type == "cpu" else "triton")

        def use(driver: ModuleType) -> FoldedWeight | None:
            matrices = _matrices(known, encoded.format.shape[1], inverse=inverse)
            if matrices is None:
                return None
            placed = (None if m is None else m.to(device) for m in matrices)
            return driver.fold(encoded, into, *placed, rounding)  # type: ignore[no-any-return]

        result = _serve(name, use)
        if result is not None:
            return replace(result, backend=name)
    from . import tiled

    blocks = [(r, r.blocks.to(device)) for r in known]
    tiles = tiled.fold(encoded, into, blocks, rounding, inverse=inverse)
    return None if tiles is None else replace(tiles, backend="tiled")


def store(encoded: EncodedWeight, exact: Tensor, into: WeightFormat, rounding: str) -> FoldedWeight | None:
    """``exact``, the values of ``encoded`` after a rotation, stored as ``into``, and the cost of storing; None where the reference
    must store the values.

    Args:
        exact: ``(out, in)``, on the device of ``encoded``.
        rounding: as for :func:`fold`.
    """
    if not _stores(encoded, into):
        return None
    done: FoldedWeight | None = _serve("numba", lambda driver: driver.store(encoded, exact, into, rounding))
    return None if done is None else replace(done, backend="numba")


def _stores(encoded: EncodedWeight, into: WeightFormat) -> bool:
    """Whether :func:`store` serves."""
    if encoded.tensors["weight"].device.type != "cpu" or _choice() not in (None, "numba"):
        return False
    return bool(_serve("numba", lambda driver: driver.takes(encoded.format, into)))


def _turns_many_rows(r: Rotation) -> bool:
    """Whether the rotation is of so many rows that the weight is rotated as a whole."""
    return r.side == "output" and r.block_size > preserve.MOST_ROWS


def sweep(grid: Grid, points: Tensor, scales: Tensor, matrix: Tensor, stored: Tensor) -> Tensor | None:
    """:func:`oftsurgery.weights.sweep.sweep` by a kernel; None where no kernel serves."""
    on_cpu = points.device.type == "cpu"
    name = _choice() or ("numba" if on_cpu else "triton")
    driver = {"numba": ".sweep_cpu", "triton": ".sweep_gpu"}.get(name)
    if driver is None or (name == "numba" and not on_cpu):
        return None
    done: Tensor | None = _serve(name, lambda use: use.sweep(grid, points, scales, matrix, stored), driver)
    return done


def _serve(name: str, use: Callable[[ModuleType], T | None], driver: str = "") -> T | None:
    """The result of ``use`` with a fast path's driver of folds, or another; None if there is no driver, or the driver fails."""
    problem = _problem(name)
    if problem is not None:
        if name not in _broken:
            _give_up(name, problem)
        return None
    try:
        return use(import_module(driver or (".fold_cpu" if name == "numba" else ".fold_gpu"), __name__))
    except OFTSurgeryError:
        raise
    except Exception as error:  # a compiler may raise any error; the slower path has the same result
        _give_up(name, f"{type(error).__name__}: {printable(str(error))}")
        return None


def _give_up(name: str, problem: str) -> None:
    """Do not use a fast path again in this process, and warn once."""
    _broken[name] = problem
    warnings.warn(
        f"the fast path {name} cannot serve ({problem}); folds go on without it, slower, with the same result",
        BackendWarning,
        stacklevel=2,
    )


# --- rotations --------------------------------------------------------------------------------------------------------


def measure(rotation: WeightMap) -> tuple[float, float]:
    """``(rotation.defect, rotation.angle)``, from the largest eigenvalue alone if that decides."""
    if not isinstance(rotation, Rotation):
        return rotation.defect, rotation.angle
    if rotation.cayley.exact and rotation.block_size > _MAX_BLOCK // 2:
        return rotation.defect, rotation.angle
    series = _series(rotation.cayley)
    theta = _by_kernel(rotation, lambda driver, v, wide, _: driver.largest_angle(v, rotation.block_size, wide))
    if theta is None or series is None:
        return rotation.defect, rotation.angle
    if rotation.cayley.exact:
        return 0.0, 2 * math.atan(theta)
    # the series at the eigenvalues iθ: if both figures are largest at the end of [0, θmax], no other eigenvalue matters
    power, weight = series
    x = theta * _TO_ONE
    values = np.full_like(x, weight)
    for coefficient in (*[2.0] * (power - 1), 1.0):
        values = values * x + coefficient
    defects, angles = np.abs(np.abs(values) ** 2 - 1), np.abs(np.angle(values))
    if theta < 1 and defects.max() <= defects[-1] and angles.max() <= angles[-1]:
        return float(defects[-1]), float(angles[-1])
    return rotation.defect, rotation.angle


def _series(cayley: Cayley) -> tuple[int, float] | None:
    """(0, 0) for the exact map, else (power, weight) of ``I + 2ΣQᵏ (k < power) + weight · Q^power``; None for a series
    of one term or very many.
    """
    if cayley.terms is None:
        return 0, 0.0
    if not 2 <= cayley.terms <= 32:
        return None
    if cayley.since_0_18 and cayley.terms >= 3:
        return max(cayley.terms - 1, 3), 1.0
    return cayley.terms - 1, 2.0


def _wide(b: int, n: int) -> int:
    """The size of the blocks that the kernels work on: a multiple of b and 16 into which n blocks fit; 0 if no such size
    is small enough.
    """
    wide = math.lcm(b, 16)
    return wide if wide <= _MAX_BLOCK and (n == 1 or n * b % wide == 0) else 0


def _by_kernel(rotation: Rotation, use: Callable[[ModuleType, Tensor, int, tuple[int, float]], T | None]) -> T | None:
    """The result of ``use`` with the CPU's driver, the generator on the CPU, the width of a rotation's blocks and their series;
    None if the driver does not serve.

    A live adapter's generator may lie on a GPU. A generator has few bytes, and many small solves and eigenvalues are quick on
    the CPU.
    """
    wide, series = _wide(rotation.block_size, rotation.generator.shape[0]), _series(rotation.cayley)
    if not wide or series is None or _choice() not in (None, "numba"):
        return None
    generator = rotation.generator.detach().cpu()
    return _serve("numba", lambda driver: use(driver, generator, wide, series), ".rotations_cpu")


def _blocks(rotation: Rotation, wide: int) -> Tensor:
    """The rotation's blocks, put together to ``wide``: float64, on the CPU."""
    b = rotation.block_size
    found: Tensor | None = _by_kernel(rotation, lambda driver, v, own, series: driver.blocks(v, b, own, *series))
    blocks = rotation.blocks.cpu() if found is None else found
    return rotations.block_diagonal(blocks, wide, shared=len(blocks) == 1)


def _matrices(order: Sequence[Rotation], features: int, *, inverse: bool) -> tuple[Tensor, Tensor | None] | None:
    """``M: (n, b, b)`` float32 and ``s: (out,)`` or None, such that ``s · (W · blockdiag(M))`` is the folded weight; b
    a multiple of 16; both on the CPU.

    None if a rotation turns the rows themselves, or if its blocks have no common size that is small enough.
    """
    b = math.lcm(16, *(r.block_size for r in order))
    if not order or b > _MAX_BLOCK or features % b or any(r.side == "output" for r in order):
        return None
    if len(order) == 1 and order[0].scale is None and (order[0].cayley.exact or not inverse):
        found = _single_blocks(order[0], b, inverse=inverse)
        if found is not None:
            return found, None
    whole: Tensor | None = None
    scale: Tensor | None = None
    for rotation in order:
        m = _blocks(rotation, b)
        turned = rotation.side == "input"
        if inverse and rotation.cayley.exact:
            turned = not turned  # an orthogonal block's inverse is its transpose
        elif inverse:
            m = rotations.inverse_blocks(m)
        m = m.transpose(1, 2) if turned else m
        whole = m if whole is None else whole @ m
        if rotation.scale is not None:
            if inverse and bool((rotation.scale == 0).any()):
                return None
            factor = rotation.scale.detach().cpu().to(torch.float64)
            factor = 1 / factor if inverse else factor
            scale = factor if scale is None else scale * factor
    return _single(cast(Tensor, whole)), None if scale is None else scale.to(torch.float32)


def _single_blocks(rotation: Rotation, wide: int, *, inverse: bool) -> Tensor | None:
    """:func:`_matrices` of one rotation in blocks of its own size, by the kernel alone; None if the kernel does not serve."""
    b = rotation.block_size
    turned = (rotation.side == "input") != inverse

    def use(driver: ModuleType, v: Tensor, own: int, series: tuple[int, float]) -> Tensor | None:
        return driver.blocks(v, b, own, *series, np.float32, turned=turned) if own == wide else None

    return _by_kernel(rotation, use)


def _single(matrices: Tensor) -> Tensor:
    """``matrices`` as contiguous float32. numpy converts them: torch would wake all its threads for this little work, and wait
    for them while other threads compute.
    """
    with np.errstate(over="ignore"):  # a value that overflows becomes infinite, and the weight is refused
        return torch.from_numpy(matrices.numpy().astype(np.float32, order="C"))
