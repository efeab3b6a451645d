"""An undo record holds the rotations that lead back, and every product by them is exact.

**Why the prediction is the same everywhere.** A sum of floats depends on its order, which differs between machines,
thread counts and BLAS libraries. Here every product is of integers held in float64: weights rounded to ``p`` bits,
rotations to ``f``, with ``p + f`` chosen so that every partial sum of any order stays below 2⁵³. Such sums are exact, so
order and fused multiply-adds do not matter. The rest is elementwise IEEE arithmetic (multiplication by powers of two,
rounding, division, comparison), which is the same on every machine. All arithmetic runs on the CPU.

The record holds a rotation as the quantised generator of a Cayley map, whose inverse is computed by Newton's iteration
in the same exact products. A rotation without such a generator (not orthogonal, or a half turn) is held as a quantised
matrix. The rotation needs to be only as fine as the folded weight's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.adapters.steps import Blocks, Permute, Scale, StepMap
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import NonFiniteError, printable

from .fold import in_weight_order
from .undo_streams import Array, Streams, damaged

# sums of products stay below this many bits in every order; float64 holds one bit more exactly
_EXACT_BITS = 52

# the error that the record's rotation may add, as a part of the folded weight's own rounding error
_SHARE = 0.15


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of rotating back: ``x · blockdiag(matrix) / 2**bits`` over columns (``dim`` 1) or rows (0) from feature
    ``start`` on, or a division of the rows by ``scale``.
    """

    dim: int = 1
    start: int = 0
    matrix: Tensor | None = None  # (n, b, b) integers in float64; one block serves all where n is 1
    bits: int = 0
    scale: Tensor | None = None  # (rows,) float64
    index: Tensor | None = None  # an order of the columns or rows


def power_of_two(exponent: int) -> float:
    return math.ldexp(1.0, exponent)


def as_integers(x: Tensor, bits: int) -> tuple[Tensor, int]:
    """``x`` as integers of at most ``bits`` bits, and the exponent of two that scales them back."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    exponent = math.frexp(largest)[1] - bits if largest else 0
    if exponent < -900:  # 2**-exponent must be a float64
        return torch.zeros_like(x), 0
    return torch.round(x * power_of_two(-exponent)), exponent


def apply_stage(x: Tensor, stage: Stage, first: int = 0) -> Tensor:
    """Apply one stage to rows ``x: (rows, columns)`` float64 of a weight, from its row ``first`` on."""
    if stage.scale is not None:
        scale = stage.scale[first : first + len(x)]
        return x / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    if stage.index is not None:
        return x.index_select(stage.dim, stage.index)
    m = stage.matrix
    assert m is not None  # noqa: S101 - a stage has a matrix or a scale
    turned = x.t() if stage.dim == 0 else x
    features, b = turned.shape[-1], m.shape[-1]
    width = (features - stage.start) // b * b if m.shape[0] == 1 else m.shape[0] * b
    room = _EXACT_BITS - int(m.abs().sum(dim=-2).max()).bit_length()
    before, part, after = turned.tensor_split([stage.start, stage.start + width], dim=-1)
    part, exponent = as_integers(part, room)
    part = rotations.apply_blocks(part, m) * power_of_two(exponent - stage.bits)
    part = torch.cat([before, part, after], dim=-1) if width < features else part
    return part.t() if stage.dim == 0 else part


def exact_cayley(g: Tensor, bits: int) -> tuple[Tensor, int] | None:
    """``(I - G)(I + G)⁻¹`` for ``G = skew(g) / 2**bits``: integers, and their fraction bits; None if G is too large.

    Newton's iteration ``Y ← Y (2I - A Y)`` for the inverse of ``A = I + G``, from ``Y = Aᵀ / (1 + ‖G‖²)``: the
    eigenvalues of ``A Y`` are then real and in (0, 1] for every skew-symmetric G. Each product is exact.
    """
    q = rotations.skew(g)
    b = q.shape[-1]
    norm = (int(q.abs().sum(dim=-1).max()) >> bits) + 1  # an integer above the spectral norm
    # |A| has row sums ≤ 1 + norm, |Y| entries ≤ 2; |2I - A Y| entries ≤ 4
    fraction = (_EXACT_BITS - 2 - max((1 + norm).bit_length(), b.bit_length() + 2)) // 2
    if fraction < bits or norm > 1 << 8:
        return None
    one = power_of_two(fraction)
    eye = torch.eye(b, dtype=torch.float64) * one
    g_scaled = q * power_of_two(fraction - bits)
    a = eye + g_scaled
    y = torch.round((eye - g_scaled) / (1 + norm * norm))
    for _ in range((1 + norm * norm).bit_length() + 5):
        y = torch.round((y @ (2 * eye - torch.round((a @ y) / one))) / one)
    return 2 * y - eye, fraction


def _steps_back(r: WeightMap, shape: tuple[int, ...]) -> list[Blocks | Permute | Scale]:
    """The steps that take a map out of a weight.

    Raises:
        NonFiniteError: a record has no form for the map's steps.
    """
    if isinstance(r, Rotation):
        return [*_scale_back(r), *_blocks_back(r, shape)]
    steps = r.back() if isinstance(r, StepMap) else ()
    found = [s for s in steps if isinstance(s, (Blocks, Permute)) or (isinstance(s, Scale) and s.dim == 0)]
    if not steps or len(found) < len(steps):
        message = "an undo record has no form for the steps of this map"
        raise NonFiniteError(message, remedy="the record then holds the original weight")
    return found


def _scale_back(r: Rotation) -> list[Scale]:
    return [] if r.scale is None else [Scale(r.scale.detach().cpu().to(torch.float64)).inverse()]


def _blocks_back(r: Rotation, shape: tuple[int, ...]) -> list[Blocks]:
    blocks = r.blocks.cpu()
    if r.side == "embedding":
        return [Blocks(1, rotations.inverse_blocks(blocks))]
    if r.side == "input":
        return [Blocks(1, rotations.inverse_blocks(blocks).mT)]
    # W = R⁻ᵀ W'; peft ≤ 0.13 crops the last block if out is no multiple
    count, rest = divmod(shape[0], blocks.shape[-1])
    body, last = (blocks, blocks) if len(blocks) == 1 else (blocks[:count], blocks[count : count + 1])
    parts = [Blocks(0, rotations.inverse_blocks(body).mT)] if count else []
    if rest:
        parts.append(Blocks(0, rotations.inverse_blocks(last[:, :rest, :rest]).mT, shape[0] - rest))
    return parts


def write_stages(
    io: Streams, chain: Sequence[WeightMap], shape: tuple[int, ...], noise: float
) -> tuple[list[dict[str, Any]], list[Stage]]:
    """Write the stages that rotate ``chain`` out of a weight, as coarse as ``noise`` (the folded weight's relative
    rounding error) allows.
    """
    facts: list[dict[str, Any]] = []
    stages: list[Stage] = []
    for r in in_weight_order(chain, inverse=True):
        for step in _steps_back(r, shape):
            if isinstance(step, Permute):
                facts.append({"kind": "order", "dim": step.dim})
                index = step.index.cpu().numpy().astype(np.int32)
                io.raw(index.tobytes(), index.nbytes)
                stages.append(Stage(step.dim, index=step.index.cpu()))
            elif isinstance(step, Scale):
                factors = (1 / step.factors.detach().cpu().to(torch.float64)).contiguous()
                facts.append({"kind": "scale"})
                io.raw(factors.numpy().tobytes(), factors.nbytes)
                stages.append(Stage(scale=factors))
            else:
                # a stage of rows is a product from the right with the transposed weight
                matrix = step.matrices.mT.contiguous() if step.dim == 0 else step.matrices
                kind, bits, whole = _quantised(matrix, noise)
                n, b, _ = matrix.shape
                facts.append({"kind": kind, "dim": step.dim, "start": step.start, "blocks": n, "size": b, "bits": bits})
                stages.append(_code_blocks(io, facts[-1], whole))
    return facts, stages


def _quantised(matrix: Tensor, noise: float) -> tuple[str, int, Tensor]:
    """(kind, fraction bits, integers in float64): a generator's triangles if its Cayley map is the matrix up to an error
    that ``noise`` allows, else the matrix itself.
    """
    n, b, _ = matrix.shape
    # rounding to steps of 2**-bits errs by 0.29 steps a value, and a generator's error counts twice in its rotation
    steps = 0.58 * math.sqrt(b) / (_SHARE * noise)
    bits = min(max(math.frexp(steps)[1], 4), 22)
    with suppress(NonFiniteError):  # half turns have no generator
        eye = torch.eye(b, dtype=torch.float64)
        generator = (eye - matrix) @ rotations.inverse_blocks(eye + matrix)
        g = torch.round(rotations.vector(generator - generator.transpose(-2, -1)) * power_of_two(bits - 1))
        made = exact_cayley(g, bits) if float(g.abs().max()) < 1 << 30 else None
        if made is not None:
            error = float(torch.linalg.vector_norm(made[0] * power_of_two(-made[1]) - matrix))
            if error <= max(2 * _SHARE * noise, 1e-5) * math.sqrt(n * b):
                return "generator", bits, g
    return "matrix", bits, torch.round(matrix * power_of_two(bits)).clamp(-(2.0**31) + 1, 2.0**31 - 1)


def _code_blocks(io: Streams, facts: Mapping[str, Any], true: Tensor | None) -> Stage:
    """The stage that ``facts`` describe; its integers are written or read."""
    n, b, bits = facts["blocks"], facts["size"], facts["bits"]
    near: Array = np.zeros((n, b * (b - 1) // 2), np.int32)
    if facts["kind"] == "matrix":
        near = np.tile(np.eye(b, dtype=np.int32) << bits, (n, 1, 1))
    found = io.differences(None if true is None else true.numpy().astype(np.int32).reshape(-1), near.reshape(-1))
    whole = torch.from_numpy(found.astype(np.float64).reshape(near.shape))
    made = (whole, bits) if facts["kind"] == "matrix" else exact_cayley(whole, bits)
    if made is None:
        raise damaged(why="a rotation's generator is too large")
    return Stage(facts["dim"], facts["start"], *made)


def _read_order(io: Streams, dim: object, shape: tuple[int, ...]) -> Stage:
    if dim not in (0, 1):
        raise damaged(why="an order is neither of rows nor of columns")
    size = shape[0] if dim == 0 else math.prod(shape) // shape[0]
    index = torch.from_numpy(np.frombuffer(io.raw(None, 4 * size), np.int32).astype(np.int64))
    if not torch.equal(index.sort().values, torch.arange(size)):
        raise damaged(why="an order does not name each row or column once")
    return Stage(0 if dim == 0 else 1, index=index)


def read_stages(io: Streams, facts: object, shape: tuple[int, ...]) -> list[Stage]:
    """The mirror of :func:`write_stages`, for untrusted facts."""
    if not isinstance(facts, list) or not all(isinstance(f, dict) for f in facts):
        raise damaged(why="`stages` is no list of objects")
    stages = []
    for f in facts:
        if f.get("kind") == "scale":
            scale = np.frombuffer(io.raw(None, 8 * shape[0]), np.float64)
            stages.append(Stage(scale=torch.from_numpy(scale.copy())))
            continue
        if f.get("kind") == "order":
            stages.append(_read_order(io, f.get("dim"), shape))
            continue
        numbers: list[Any] = [f.get(name) for name in ("dim", "start", "blocks", "size", "bits")]
        if f.get("kind") not in ("generator", "matrix") or not all(type(n) is int for n in numbers):
            raise damaged(why=f"a rotation's kind or numbers are wrong: {printable(f)}")
        dim, start, n, b, bits = numbers
        fits = dim in (0, 1) and start >= 0 and n >= 1 and b >= 1 and start + n * b <= shape[dim] and 4 <= bits <= 22
        if not fits or (f["kind"] == "generator" and b < 2):
            raise damaged(why=f"a rotation does not fit the weight: {printable(f)}")
        stages.append(_code_blocks(io, f, None))
    return stages
