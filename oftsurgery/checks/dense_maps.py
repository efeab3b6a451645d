"""What the live layers of image tools, and of peft's BOFT, HRA and RoAd, compute: a second time, for the checks.

Each function here states a tool's formula in float64 from the tensors as they are stored. No code of the fold takes part: of
the maps, these functions read the fields alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oftsurgery.adapters.boft import LycorisBoft, PeftBoft
from oftsurgery.adapters.hra import Householder
from oftsurgery.adapters.onetrainer import OneTrainerBlocks
from oftsurgery.adapters.output_blocks import FinishedBlocks, FluxParts, OutputBlocks
from oftsurgery.adapters.parts import RowParts, SwappedHalves
from oftsurgery.adapters.road import Pairs
from oftsurgery.adapters.rotation import Cayley, Rotation
from oftsurgery.adapters.strength import AtStrength
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.errors import NonFiniteError, StateError


def live_weight(
    w: Tensor, weight_map: WeightMap, kernel: tuple[int, ...], rotate: Callable[[Tensor, Rotation], Tensor]
) -> Tensor:
    """The float64 weight of the live layer over ``w: (out, rest)`` float64.

    Args:
        kernel: ``(kh, kw)`` of a convolution, else empty.
        rotate: the same for a :class:`~oftsurgery.Rotation`, a rotation of peft.
    """
    if isinstance(weight_map, RowParts):
        pieces = torch.split(w, [rows for _, rows in weight_map.parts])
        each = zip(pieces, weight_map.parts, strict=True)
        return torch.cat([x if m is None else live_weight(x, m, kernel, rotate) for x, (m, _) in each])
    if isinstance(weight_map, SwappedHalves):
        half = len(w) // 2
        return live_weight(w.roll(half, 0), weight_map.of, kernel, rotate).roll(half, 0)
    m, s, mode = weight_map, 1.0, "trainer"
    if isinstance(weight_map, AtStrength):
        m, s, mode = weight_map.of, weight_map.strength, weight_map.mode
    if mode == "angle" and s == 1:
        mode = "trainer"
    formula = next((f for kind, f in _WITH_STRENGTH.items() if isinstance(m, kind)), None)
    if formula is not None:
        return formula(w, m, s, mode)
    power = s if mode == "angle" else 1.0
    if isinstance(m, Rotation):
        new = rotate(w, _at_angle(m, power) if power != 1 else m)
    elif isinstance(m, OneTrainerBlocks):
        new = _onetrainer(w, m, kernel, power, today=mode == "oftv2-node")
    else:
        new = _other(w, m, power)
    return new if mode in ("angle", "trainer") else w + s * (new - w)


def _other(w: Tensor, m: WeightMap, power: float) -> Tensor:
    if isinstance(m, PeftBoft):
        return _peft_boft(w, m, power)
    if isinstance(m, Householder):
        return w @ _reflections(m)
    if isinstance(m, Pairs):
        return _pairs(w, m, power)
    message = f"the check does not know the map {type(m).__name__}"
    raise StateError(message, remedy="check the fold with a model that carries the live adapter: oftsurgery.verify")


def _cayley(q: Tensor, power: float = 1.0) -> Tensor:
    """``((I - Q)(I + Q)⁻¹)^power`` of skew-symmetric ``q: (n, b, b)``, one block at a time."""
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    if power == 1:
        r = torch.stack([2 * torch.linalg.inv(eye + block) - eye for block in q])
        if not float((r @ (eye + q) - (eye - q)).abs().max()) <= 1e-9 * (1 + float(q.abs().max())):  # NaN is not
            message = "a block's generator is too large: the exact Cayley map cannot be computed in float64"
            raise NonFiniteError(message, remedy="use another checkpoint of the adapter's training")
        return r
    found = []
    for block in q:
        values, vectors = torch.linalg.eigh(1j * block)  # Q has the eigenvalues -i·values
        turned = ((1 + 1j * values) / (1 - 1j * values)) ** power
        found.append(((vectors * turned) @ vectors.mH).real)
    return torch.stack(found)


def _of_rows(w: Tensor, blocks: Tensor) -> Tensor:
    """``blockdiag(blocks) · w``."""
    b = blocks.shape[-1]
    return torch.cat([block @ w[i * b : (i + 1) * b] for i, block in enumerate(blocks)])


def _skew(b: Tensor) -> Tensor:
    b = b.detach().to("cpu", torch.float64)
    return b - b.transpose(-1, -2)


def _column(scale: Tensor | None, power: float = 1.0) -> Tensor | float:
    return 1.0 if scale is None else scale.detach().to("cpu", torch.float64).reshape(-1, 1) ** power


def _limited(q: Tensor, alpha: float | None, tool: str, rows: int) -> Tensor:
    """``q`` after a tool's limit: ``alpha`` times the number of rows, in ComfyUI ``alpha``."""
    norm = float(q.square().sum().sqrt())
    limit = (alpha or 0.0) * (1 if tool == "comfyui" else rows)
    if (tool == "kohya" and alpha is not None) or (tool == "webui" and limit):
        return q * (min(norm, limit) + 1e-8) / (norm + 1e-8)
    return q * limit / (norm + 1e-8) if limit > 0 and norm + 1e-8 > limit else q


def _diag_oft(w: Tensor, m: OutputBlocks, s: float, mode: str) -> Tensor:
    tool = mode if mode in ("comfyui", "webui") else m.tool
    q = _limited(_skew(m.blocks), m.alpha, tool, len(w))
    if mode == "angle":
        return _column(m.scale, s) * _of_rows(w, _cayley(q, s))
    turned, g = _of_rows(w, _cayley(q)), _column(m.scale)
    if mode == "comfyui":
        return w + s * s * (turned - w)
    if mode in ("linear", "webui"):
        return w + s * (g * turned - w)
    return g * ((1 - s) * w + s * turned)


def _flux_parts(w: Tensor, m: FluxParts, s: float, mode: str) -> Tensor:
    found, start = [], 0
    for part in m.parts:
        rows = len(part) * part.shape[-1]
        here = w[start : start + rows]
        q = _limited(_skew(part), m.alpha, "kohya", rows)
        power = s if mode == "angle" else 1.0
        turned = _of_rows(here, _cayley(q, power))
        found.append(turned if mode == "angle" else here + s * (turned - here))
        start += rows
    return torch.cat(found)


def _finished(w: Tensor, m: FinishedBlocks, s: float, mode: str) -> Tensor:
    a = m.matrices.detach().to("cpu", torch.float64).transpose(1, 2)
    if mode != "angle":
        return w + s * (_of_rows(w, a) - w)
    scale = a.square().sum(-2).sqrt()
    powers = []
    for block in a / scale.unsqueeze(-2):
        u, _, vh = torch.linalg.svd(block)
        values, vectors = torch.linalg.eig(u @ vh)
        powers.append(((vectors * values**s) @ torch.linalg.inv(vectors)).real)
    return _of_rows(scale.reshape(-1, 1) ** s * w, torch.stack(powers))


def _lycoris_boft(w: Tensor, m: LycorisBoft, s: float, mode: str) -> Tensor:
    tool = mode if mode in ("comfyui", "webui") else "lycoris"
    q = _limited(_skew(m.blocks), m.alpha, tool, len(w))
    eye = torch.eye(m.blocks.shape[-1], dtype=torch.float64)
    new = w
    for i, q_i in enumerate(q):
        f = _cayley(q_i, s if mode == "angle" else 1.0).transpose(1, 2)
        if mode in ("lycoris", "comfyui") or (mode == "lycoris-2" and i == 0):
            f = (1 - s) * eye + s * f
        half = 2**i * m.blocks.shape[-1] // 2
        order = [start + u * half + t for start in range(0, len(w), 2 * half) for t in range(half) for u in (0, 1)]
        turned = torch.empty_like(new)
        turned[order] = _of_rows(new[order], f)
        new = turned
    new = _column(m.scale, s if mode == "angle" else 1.0) * new
    return w + s * (new - w) if mode in ("comfyui", "webui", "linear") else new


def _peft_boft(w: Tensor, m: PeftBoft, power: float) -> Tensor:
    n, b = m.blocks.shape[1:3]
    product = torch.eye(n * b, dtype=torch.float64)
    for i, a in enumerate(m.blocks.detach().to("cpu", torch.float64)):
        factor = _diagonal(_cayley((a - a.transpose(1, 2)) / 2, power))
        if len(m.blocks) > 1:
            group, chunk = b * 2**i, b // 2
            parts = [list(range(start, start + chunk)) for start in range(0, n * b, chunk)]
            per = group // chunk
            order = [
                entry
                for first in range(0, len(parts), per)
                for odd in (0, 1)
                for part in parts[first + odd : first + per : 2]
                for entry in part
            ]
            p = torch.eye(n * b, dtype=torch.float64)[order]  # (P x)[r] = x[order[r]]
            factor = p @ factor @ p.T
        product = factor @ product
    scale = m.scale.detach().to("cpu", torch.float64).reshape(-1) ** power
    if m.relaid:
        return ((product @ w.reshape(w.shape[1], w.shape[0])) * scale).reshape(w.shape)
    turned: Tensor = scale.unsqueeze(1) * (w @ product.T)
    return turned


def _onetrainer(w: Tensor, m: OneTrainerBlocks, kernel: tuple[int, ...], power: float, *, today: bool) -> Tensor:
    v = m.vectors.detach().to("cpu", torch.float64)
    b = round((1 + (1 + 8 * v.shape[1]) ** 0.5) / 2)
    q = v.new_zeros(len(v), b, b)
    q[:, torch.ones(b, b).triu(1).bool()] = v / (2 * (b - 1) ** 0.5) if m.scaled else v
    q = q - q.transpose(1, 2)
    last = 2.0 if m.first_days and not today else 1.0
    if power == 1:
        eye = torch.eye(b, dtype=torch.float64)
        r = eye + q @ (2 * eye + q @ (2 * eye + q @ (2 * eye + last * q)))
    else:
        r = _series_power(q, (1.0, 2.0, 2.0, 2.0, last), power)
    wide = r.expand(w.shape[1] // b, b, b) if len(r) == 1 else r
    whole = _diagonal(wide)
    return w @ whole if kernel else w @ whole.T


def _series_power(q: Tensor, factors: Sequence[float], power: float) -> Tensor:
    """The nearest rotation of ``Σ factors[k] Qᵏ`` to a power."""
    found = []
    for block in q:
        values, vectors = torch.linalg.eigh(1j * block)
        eigenvalues = -1j * values
        series = torch.stack([f * eigenvalues**k for k, f in enumerate(factors)]).sum(0)
        turned = (series / series.abs()) ** power
        found.append(((vectors * turned) @ vectors.mH).real)
    return torch.stack(found)


def _diagonal(blocks: Tensor) -> Tensor:
    n, b, _ = blocks.shape
    whole = torch.zeros(n * b, n * b, dtype=torch.float64)
    for i, block in enumerate(blocks):
        whole[i * b : (i + 1) * b, i * b : (i + 1) * b] = block
    return whole


def _reflections(m: Householder) -> Tensor:
    u = m.u.detach().to("cpu", torch.float64)
    eye = torch.eye(len(u), dtype=torch.float64)
    if m.orthogonal:
        q: Tensor = torch.linalg.qr(u).Q  # another basis of the same space, so the same projection
        reflected: Tensor = eye - 2 * q @ q.T
        return reflected
    product = eye
    for column in u.unbind(1):
        product = product @ (eye - 2 * torch.outer(column, column) / column.dot(column))
    return product


def _pairs(w: Tensor, m: Pairs, power: float) -> Tensor:
    alpha, theta = (t.detach().to("cpu", torch.float64).reshape(-1) for t in (m.alpha, m.theta))
    if power != 1:
        theta, alpha = torch.atan2(theta.sin(), theta.cos()) * power, alpha**power
    new, g = torch.empty_like(w), m.group
    for start in range(0, len(w), g):
        for j in range(g // 2):
            at, to = start + j, start + j + g // 2
            if m.variant == "road_1":
                places = [start // 2 + j] * 4
            elif m.variant == "road_2":
                places = [at, to, at, to]
            else:
                places = [2 * start + j, 2 * start + j + g // 2, 2 * start + g + j, 2 * start + g + j + g // 2]
            c = [float(alpha[i] * theta[i].cos()) for i in places[:2]]
            d = [float(alpha[i] * theta[i].sin()) for i in places[2:]]
            new[at] = c[0] * w[at] - d[0] * w[to]
            new[to] = c[1] * w[to] + d[1] * w[at]
    return new


def _at_angle(r: Rotation, s: float) -> Rotation:
    """A rotation of peft at a part of its angles, from the eigenvalues of its map."""
    rows = r.generator.detach().to("cpu", torch.float64)
    b = round((1 + (1 + 8 * rows.shape[1]) ** 0.5) / 2)
    upper = torch.ones(b, b).triu(1).bool()
    q = rows.new_zeros(len(rows), b, b)
    q[:, upper] = rows
    q = q - q.transpose(1, 2)
    found = []
    for block in q:
        values, vectors = torch.linalg.eigh(1j * block)
        x = -1j * values
        mapped = r.cayley(x.reshape(-1, 1, 1)).reshape(-1)
        half = torch.log(mapped / mapped.abs()).imag * s / 2  # the angle of the power, halved
        found.append(((vectors * (-1j * torch.tan(half))) @ vectors.mH).real[upper])
    scale = None if r.scale is None else r.scale.detach().to("cpu", torch.float64) ** s
    return replace(r, generator=torch.stack(found), cayley=Cayley(), scale=scale)


#: kind of map → its formula at any strength
_WITH_STRENGTH: Mapping[type[WeightMap], Callable[[Tensor, Any, float, str], Tensor]] = {
    OutputBlocks: _diag_oft,
    FluxParts: _flux_parts,
    FinishedBlocks: _finished,
    LycorisBoft: _lycoris_boft,
}
