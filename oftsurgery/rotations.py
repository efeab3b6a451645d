r"""Block rotations: the maps from a generator to ``R``, and functions that apply, invert and measure ``R``.

This file alone decides operand order. A block-diagonal ``R`` is kept as ``blocks: (n, b, b)``; a live OFT layer
computes ``x' = x · blockdiag(blocks)``, so the three sides on which peft puts a rotation are

=============  ===========================  ==========================
side           live                         fold
=============  ===========================  ==========================
``input``      ``y = (x R) Wᵀ``             ``W' = W Rᵀ``
``output``     ``y = (x Wᵀ) R``             ``W' = Rᵀ W``
``embedding``  ``y = E[i] R``               ``E' = E R``
=============  ===========================  ==========================

with ``W: (out, in)`` and ``E: (tokens, features)``. A dense ``in × in`` matrix is never built. Block matrices are
computed in float64; weights are rotated in float32 (float64 when they are float64), whatever the dtype, matmul
precision or autocast state around the call.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from .errors import NonFiniteError, ShapeError

__all__ = [
    "LANCZOS_FROM",
    "MAX_NORM",
    "Side",
    "apply_blocks",
    "block_diagonal",
    "block_size_of",
    "cayley",
    "eigen_angles",
    "even_chunks_first",
    "full_precision",
    "generator_norm",
    "generator_of",
    "interleaved",
    "inverse_blocks",
    "largest_angle",
    "map_eigenvalues",
    "nearest_rotation",
    "neumann",
    "power_of",
    "rotate_weight",
    "skew",
    "vector",
]

Side = Literal["input", "output", "embedding"]

#: Largest ‖Q‖₂ of a generator that is computed here: a rotation by 3.1216 rad. At π itself an exact Cayley generator is
#: infinite.
MAX_NORM = 100.0

# ‖R(I+Q) − (I−Q)‖∞ relative to the size of the operands; a right float64 solve gives around 1e-15 · b, torch's broken
# batched solve around 4e-2
_SOLVE_TOLERANCE = 1e-10

_TRAINED_ON = "use the base model that the adapter was trained on"

# blocks of this size and more are solved one by one on the CPU (batched solves were right up to 144 rows)
_LARGE = 128
#: the eigenvalues of larger blocks would take longer than a fold
LANCZOS_FROM = 512
_LANCZOS = 40


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Run the body without gradients, autocast or reduced-precision float32 products.

    ``torch.set_float32_matmul_precision("medium")`` makes a float32 product bfloat16 inside (on CPUs with oneDNN too),
    and autocast changes the product's dtype; a fold must not depend on either. Afterwards the settings are restored.
    """
    with _Precision.lock:
        if _Precision.users == 0:
            _Precision.before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _Precision.users += 1
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _Precision.lock:
            _Precision.users -= 1
            if _Precision.users == 0:
                torch.set_float32_matmul_precision(_Precision.before)


class _Precision:
    """torch has one precision of float32 products for the whole process: it is raised while any thread needs it, and the
    last thread restores it.
    """

    lock = threading.Lock()
    users = 0
    before = "highest"


def block_size_of(elements: int) -> int:
    """The block size ``b`` with ``b(b-1)/2 == elements``.

    Raises:
        ShapeError: ``elements`` is not b(b-1)/2 for any b ≥ 2.

    >>> block_size_of(496)
    32
    """
    b = (1 + math.isqrt(1 + 8 * elements)) // 2
    if elements < 1 or b * (b - 1) // 2 != elements:
        message = f"a generator row of {elements} elements is no upper triangle of a block: the number must be b(b-1)/2 with b ≥ 2"
        raise ShapeError(message, shape=(elements,), remedy="restore the adapter's file")
    return b


def skew(v: Tensor) -> Tensor:
    """Skew-symmetric ``Q: (n, b, b)`` from ``v: (n, b(b-1)/2)``: the upper triangle row by row, then ``Q - Qᵀ`` (as
    peft ≥ 0.16).

    >>> skew(torch.tensor([[1.0, 2.0, 3.0]]))[0].tolist()
    [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]
    """
    b = block_size_of(v.shape[-1])
    rows, cols = torch.triu_indices(b, b, 1, device=v.device)
    q = torch.zeros(v.shape[0], b, b, dtype=v.dtype, device=v.device)
    q[:, rows, cols] = v
    return q - q.transpose(-2, -1)


def vector(q: Tensor) -> Tensor:
    """Inverse of :func:`skew`: ``(n, b, b)`` skew-symmetric to ``(n, b(b-1)/2)``."""
    b = q.shape[-1]
    rows, cols = torch.triu_indices(b, b, 1, device=q.device)
    return q[:, rows, cols]


def cayley(q: Tensor) -> Tensor:
    """Exact Cayley map ``R = (I - Q)(I + Q)⁻¹`` of skew-symmetric ``q: (n, b, b)``.

    The map is differentiable. Every solve is checked, and large blocks are solved one by one: after a call of
    ``torch.set_num_threads``, torch 2.13's batched CPU solve of 160 rows and more reads wrong pivots, and is silently
    wrong or raises.

    Raises:
        NonFiniteError: ``q`` or the result is not finite.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return _solve_right(eye + q, eye - q)


def inverse_blocks(blocks: Tensor) -> Tensor:
    """The inverse ``R⁻¹`` of each of the ``blocks: (n, b, b)``, by a checked solve. The transpose would be wrong, because
    a truncated Neumann ``R`` is not orthogonal.
    """
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device).expand_as(blocks)
    return _solve_right(blocks, eye)


def _solve_right(a: Tensor, c: Tensor) -> Tensor:
    """The ``X`` with ``X a = c`` for each block; the residual is checked."""
    if not bool(torch.isfinite(a.detach()).all()):
        raise NonFiniteError(
            "a block rotation's generator holds NaN or infinity", remedy="retrain or re-export the adapter"
        )
    large = a.device.type == "cpu" and a.shape[-1] >= _LARGE
    for each in (True,) if large else (False, True):
        x = _solve(a, c, each=each)
        if _solved(x, a, c):
            return x
    raise NonFiniteError(
        "a block rotation is singular or too ill-conditioned to solve",
        remedy="check the adapter's generator: its norm should be well below 1 for a Neumann series, and finite for Cayley",
    )


def _solve(a: Tensor, c: Tensor, *, each: bool) -> Tensor:
    # solve_ex gives NaN for a singular block, which the residual shows; solve would raise torch's own error
    if each:
        return torch.stack([_solve(a_i, c_i, each=False) for a_i, c_i in zip(a, c.expand_as(a), strict=True)])
    x: Tensor = torch.linalg.solve_ex(a, c, left=False).result
    return x


def _solved(x: Tensor, a: Tensor, c: Tensor) -> bool:
    with torch.no_grad():
        residual = (x @ a - c).abs().amax(dim=(-2, -1))
        scale = c.abs().amax(dim=(-2, -1)) + x.abs().amax(dim=(-2, -1)) * a.abs().amax(dim=(-2, -1))
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.complex64) else _SOLVE_TOLERANCE
        return bool((residual <= tolerance * scale).all())  # NaN compares false


def neumann(q: Tensor, terms: int, *, since_0_18: bool = True) -> Tensor:
    """The truncated Neumann series of ``(I + Q)(I - Q)⁻¹``, as peft computes the series for ``q: (n, b, b)``.

    Mind the sign: the series approximates the *inverse* of the exact map :func:`cayley`. With ``N = terms``, ``N ≤ 1``
    gives ``I``, and ``N = 2`` gives ``I + 2Q``. For ``N ≥ 3`` peft ≥ 0.18 gives ``I + 2ΣQᵏ (k < m) + Qᵐ`` with
    ``m = max(N-1, 3)``, and peft 0.16 and 0.17 give ``I + 2ΣQᵏ (k < N)``. The result is not orthogonal.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms <= 1:
        return eye.clone()
    last = max(terms - 1, 3) if since_0_18 and terms >= 3 else terms - 1
    r = eye + 2 * q
    power = q
    for k in range(2, last + 1):
        power = power @ q
        r = r + (power if since_0_18 and k == last else 2 * power)
    return r


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """``x · blockdiag(blocks)`` over the last dimension; a single block serves the whole row.

    Args:
        x: ``(..., features)``.
        blocks: ``(n, b, b)`` with ``n·b == features``, or ``(1, b, b)`` with ``features % b == 0``.

    >>> apply_blocks(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])).tolist()
    [[0.0, 1.0, -1.0, 0.0]]
    """
    n, b, _ = blocks.shape
    features = x.shape[-1]
    if features % b or n not in (1, features // b):
        message, expected = f"blocks do not cover the features, {features} of them", (features // b, b, b)
        raise ShapeError(message, shape=tuple(blocks.shape), expected=expected, remedy=_TRAINED_ON)
    if n == 1:
        return (x.reshape(-1, b) @ blocks[0]).reshape(x.shape)
    rows = x.reshape(-1, n, b)
    return torch.bmm(rows.transpose(0, 1), blocks).transpose(0, 1).reshape(x.shape)


def rotate_weight(weight: Tensor, blocks: Tensor, side: Side, *, inverse: bool = False) -> Tensor:
    """The folded weight ``W Rᵀ`` (input), ``Rᵀ W`` (output) or ``E R`` (embedding).

    Args:
        weight: ``(out, in)``, floating point; the computation is in float32 at least.
        blocks: ``(n, b, b)``. On the output side ``n·b`` may exceed ``out``: peft ≤ 0.13 crops the block-diagonal
            matrix to ``(out, out)``.
        inverse: take the rotation out, by the blocks' true inverses, whether or not the blocks are orthogonal.

    Returns:
        ``(out, in)`` float32, or float64 for a float64 weight.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    r = blocks.to(torch.float64)
    if side == "output":
        shared, b, out = r.shape[0] == 1, r.shape[-1], weight.shape[0]
        whole, needed = out - out % b, -(-out // b)
        if not shared and r.shape[0] < needed:
            message, expected = f"blocks do not cover the output features, {out} of them", (needed, b, b)
            raise ShapeError(message, shape=tuple(r.shape), expected=expected, remedy=_TRAINED_ON)
        cropped = (r if shared else r[needed - 1 : needed])[:, : out - whole, : out - whole]
        parts = [(weight[:whole], r if shared else r[: whole // b]), (weight[whole:], cropped)]
        turned = [_turn_rows(x, inverse_blocks(m) if inverse else m) for x, m in parts if len(x)]
        return turned[0] if len(turned) == 1 else torch.cat(turned)
    if inverse:
        r = inverse_blocks(r)
    if side == "input":
        r = r.transpose(-2, -1)
    return apply_blocks(weight, r.to(weight))


def _turn_rows(weight: Tensor, blocks: Tensor) -> Tensor:
    """``blockdiag(blocks)ᵀ · weight``; a single block serves all rows. (rows, columns)."""
    b = blocks.shape[-1]
    rows = weight.reshape(-1, b, weight.shape[1])
    turned: Tensor = torch.matmul(blocks.to(weight).mT, rows)
    return turned.reshape(weight.shape)


def eigen_angles(q: Tensor) -> Tensor:
    """The ``θ ≥ 0`` for which ``±iθ`` are the eigenvalues of skew-symmetric ``q: (n, b, b)``: ``(n, b)``, each θ twice.

    Every OFT map is a rational function of ``Q``, so its ``R`` is normal and has the map's values at ``±iθ`` as
    eigenvalues.
    """
    q = q.to(torch.float64)
    squares: Tensor = torch.linalg.eigvalsh(-(q @ q))
    return squares.clamp(min=0).sqrt()


def largest_angle(q: Tensor) -> float:
    """The largest angle of ``cayley(q)`` for skew-symmetric ``q: (n, b, b)``, in radians.

    Of blocks larger than :data:`LANCZOS_FROM`, Lanczos' iteration for ``-Q²`` from a fixed start finds the largest eigenvalue to
    about five digits.
    """
    n, b, _ = q.shape
    if b <= LANCZOS_FROM:
        return 2 * math.atan(float(eigen_angles(q).max()))
    q = q.to(torch.float32)
    v = torch.linspace(-1, 1, b, device=q.device).cos_().mul_(torch.arange(b, device=q.device) % 7 + 1).expand(n, b)
    basis = [v / torch.linalg.vector_norm(v, dim=1, keepdim=True)]
    rows: list[Tensor] = []
    for _ in range(_LANCZOS):
        w = torch.bmm(q, torch.bmm(q, basis[-1].unsqueeze(2))).squeeze(2).neg_()
        spanned = torch.stack(basis, dim=1)  # (n, k, b)
        here = torch.bmm(spanned, w.unsqueeze(2))
        rows.append(torch.nn.functional.pad(here.squeeze(2), (0, _LANCZOS - len(basis))))
        for _ in range(2):  # once more, since one orthogonalisation loses digits
            w = w - torch.bmm(spanned.mT, torch.bmm(spanned, w.unsqueeze(2))).squeeze(2)
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        basis.append(torch.where(norm > 0, w / norm.clamp(min=1e-30), 0.0))
    projected = torch.stack(rows, dim=2).to(torch.float64)  # the upper triangle of the projection
    projected = projected.triu() + projected.triu(1).mT
    largest: Tensor = torch.linalg.eigvalsh(projected)[:, -1].clamp(min=0).sqrt().max()
    return 2 * math.atan(float(largest))


# --- the algebra of rotations -----------------------------------------------------------------------------------------


def nearest_rotation(m: Tensor) -> tuple[Tensor, Tensor]:
    """The rotations ``R`` nearest to ``m: (n, b, b)``: matrices of determinant +1 that maximise ``tr(R mᵀ)``.

    ``R = U diag(1, …, 1, det(U Vᵀ)) Vᵀ`` of ``m = U S Vᵀ`` (Schönemann 1966, "A generalized solution of the orthogonal
    Procrustes problem"; the sign from Kabsch 1976). For a nonsingular ``m`` of positive determinant ``R`` is the
    orthogonal factor of ``m``'s polar decomposition.

    Returns:
        ``R: (n, b, b)`` and the singular values ``(n, b)``, the last one negative where the sign was needed.
    """
    if not bool(torch.isfinite(m).all()):
        raise NonFiniteError("a product of blocks holds NaN or infinity", remedy="check the weights and adapters")
    u, s, vh = torch.linalg.svd(m)
    r = u @ vh
    # large blocks one by one, because torch 2.13's batched factorisation reads wrong pivots, see cayley
    sign = torch.linalg.det(r) if m.shape[-1] < _LARGE else torch.stack([torch.linalg.det(x) for x in r])
    sign = torch.sign(sign)
    s = torch.cat([s[:, :-1], s[:, -1:] * sign.unsqueeze(-1)], dim=-1)
    u = torch.cat([u[..., :-1], u[..., -1:] * sign.reshape(-1, 1, 1)], dim=-1)
    return u @ vh, s


def generator_norm(r: Tensor) -> Tensor:
    """The norms ``‖Q‖₂ = tan(angle/2)``, ``(n,)``, of the generators of rotations ``r: (n, b, b)``; infinite at π."""
    c = torch.linalg.eigvalsh((r + r.transpose(-2, -1)) / 2)[:, 0].clamp(-1, 1)
    norm: Tensor = ((1 - c) / (1 + c)).clamp(min=0).sqrt()
    return norm


def generator_of(r: Tensor) -> Tensor:
    """The skew-symmetric ``Q: (n, b, b)`` with ``cayley(Q) = r``, for rotations ``r: (n, b, b)`` by less than π.

    ``Q = (I - R)(I + R)⁻¹`` (Cayley 1846): the map is its own inverse.
    """
    q = cayley(r)
    return (q - q.transpose(-2, -1)) / 2


def map_eigenvalues(q: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``f(Q)``: each eigenvalue ``iλ`` of skew-symmetric ``q: (n, b, b)`` becomes ``i·f(λ)``. ``f`` must be odd, and the
    result is skew-symmetric again.

    >>> quarter = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64)
    >>> map_eigenvalues(quarter, lambda x: 3 * x)[0].round(decimals=12).tolist()
    [[0.0, 3.0], [-3.0, 0.0]]
    """
    # i·Q = V λ Vᴴ is Hermitian and has real eigenvalues λ, so Q = V (-iλ) Vᴴ
    values, v = torch.linalg.eigh(1j * q)
    mapped: Tensor = ((v * f(values).unsqueeze(-2)) @ v.mH).imag
    return (mapped - mapped.transpose(-2, -1)) / 2


def block_diagonal(blocks: Tensor, size: int, *, shared: bool) -> Tensor:
    """The same block-diagonal matrix, written in larger blocks.

    Args:
        blocks: ``(n, b, b)``.
        size: size of the new blocks, a multiple of ``b`` that divides ``n·b``.
        shared: whether a single block stands for a whole row of blocks, as the result will.

    Returns:
        ``(n·b/size, size, size)``.
    """
    n, b, _ = blocks.shape
    if size == b:
        return blocks
    k = size // b
    if shared:
        blocks = blocks.expand(k, b, b)
        n = k
    out = blocks.new_zeros(n // k, k, b, k, b)
    for i in range(k):
        out[:, i, :, i, :] = blocks[i::k]
    return out.reshape(n // k, size, size)


# --- butterflies ------------------------------------------------------------------------------------------------------


def interleaved(size: int, half: int) -> Tensor:
    """LyCORIS' order for a factor of BOFT: inside groups of ``2·half`` entries, new entry ``2t + u`` is old entry ``u·half + t``.

    >>> interleaved(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return torch.arange(size).reshape(-1, 2, half).transpose(1, 2).reshape(-1)


def even_chunks_first(size: int, group: int, chunk: int) -> Tensor:
    """peft's order for a factor of BOFT: inside groups of ``group`` entries, in chunks of ``chunk``, the even chunks come first.

    >>> even_chunks_first(8, 8, 2).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return torch.arange(size).reshape(size // group, -1, 2, chunk).transpose(1, 2).reshape(-1)


def power_of(q: Tensor, exponent: float) -> Tensor:
    """The skew-symmetric generator, ``(n, b, b)`` float64, of ``cayley(q)`` to the power ``exponent``: the same planes, and
    ``exponent`` times the angles.

    Raises:
        NonFiniteError: an angle of the result is π or more, where the exact Cayley map has no generator.
    """
    largest = 2 * math.atan(float(eigen_angles(q).max()))
    if abs(exponent) * largest > 2 * math.atan(MAX_NORM):
        message = f"the result is a rotation by {abs(exponent) * largest:.4f} rad: at π and beyond there is no exact Cayley generator"
        raise NonFiniteError(message, remedy="use a smaller strength")
    return map_eigenvalues(q.to(torch.float64), lambda x: torch.tan(exponent * torch.atan(x)))
