"""OFT adapters: the files that any peft release writes, as one frozen :class:`OFTAdapter`.

Pure: config and tensors in, an adapter out. :func:`oftsurgery.load_adapter` reads the files. What differs between
releases is told apart once, here, as a *dialect*; from then on an adapter is a mapping from module paths to
:class:`Rotation`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.dtypes import FLOATS
from oftsurgery.errors import (
    AdapterError,
    ConversionWarning,
    DialectError,
    MatchError,
    NonFiniteError,
    ShapeError,
    module_in_errors,
    printable,
    warn_caller,
)
from oftsurgery.hashing import hash_tensors

__all__ = [
    "DIALECTS",
    "Cayley",
    "Dialect",
    "OFTAdapter",
    "Rotation",
    "blend",
    "coft_radius",
    "describe",
    "parse_adapter",
    "spread_adapter",
]

if TYPE_CHECKING:
    from os import PathLike

Dialect = Literal["peft-0.13", "peft-0.15", "peft-0.17", "peft-0.21"]

#: dialect → the peft releases that write it
DIALECTS: Mapping[str, str] = MappingProxyType(
    {
        "peft-0.13": "peft ≤ 0.13: output side, `oft_r` without `oft_s`",
        "peft-0.15": "peft 0.14 and 0.15: input side with `oft_s`",
        "peft-0.17": "peft 0.16 and 0.17: input side, the first Neumann series",
        "peft-0.21": "peft ≥ 0.18: input side and embeddings, the second Neumann series",
    }
)

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Cayley:
    """Which map takes the generator ``Q`` to ``R``.

    Attributes:
        terms: None for the exact map ``(I-Q)(I+Q)⁻¹``, else the number of terms of the truncated Neumann series (of the
            inverse: mind the sign).
        since_0_18: the series of peft ≥ 0.18 rather than that of 0.16 and 0.17.
    """

    terms: int | None = None
    since_0_18: bool = True

    @property
    def exact(self) -> bool:
        return self.terms is None

    def __call__(self, q: Tensor) -> Tensor:
        """``R: (n, b, b)`` from skew-symmetric ``q: (n, b, b)``; differentiable."""
        if self.terms is None:
            return rotations.cayley(q)
        return rotations.neumann(q, self.terms, since_0_18=self.since_0_18)


@dataclass(frozen=True, eq=False)
class Rotation:
    """One module's rotation.

    Attributes:
        generator: ``(n, b(b-1)/2)``, the upper triangles of the skew-symmetric generators, COFT's clamp applied.
        cayley: the map from generator to rotation.
        side: ``"input"``, ``"output"`` (peft ≤ 0.13) or ``"embedding"``; see :mod:`oftsurgery.rotations` for what each
            folds to.
        scale: ``(out,)``, the ``oft_s`` of peft 0.14 and 0.15, which multiplies the outputs before the bias; or None.
        shared: whether a single row serves all blocks (peft's ``block_share``); if not, its one block must cover the
            features alone.
        whole: on the output side, whether a last block that reaches beyond the outputs is refused. peft ≤ 0.13 crops
            it, to something that is no rotation, and of which no product or power is a cropped block again.
    """

    generator: Tensor
    cayley: Cayley = Cayley()
    side: rotations.Side = "input"
    scale: Tensor | None = None
    shared: bool = True
    whole: bool = False

    @property
    def block_size(self) -> int:
        return rotations.block_size_of(self.generator.shape[-1])

    @property
    def blocks(self) -> Tensor:
        """``(n, b, b)`` float64: the live layer computes ``x' = x · blockdiag(blocks)``. Computed anew at each access.

        Raises:
            NonFiniteError: if the map has no finite result.
        """
        q = rotations.skew(self.generator.detach().to(torch.float64))
        with rotations.full_precision(q.device.type):
            return self.cayley(q)

    @cached_property
    def _eigenvalues(self) -> Tensor:
        """Half of the eigenvalues of the blocks, complex128 (the others are their conjugates)."""
        theta = rotations.eigen_angles(rotations.skew(self.generator.detach().to(torch.float64)))
        return self.cayley((1j * theta).reshape(-1, 1, 1)).reshape(-1)

    @property
    def defect(self) -> float:
        """Largest ``‖RᵀR - I‖₂`` over the blocks; 0 (to rounding) for the exact map."""
        return float((self._eigenvalues.abs() ** 2 - 1).abs().max())

    @property
    def angle(self) -> float:
        """Largest rotation angle of a block in radians, 0 to π."""
        return float(self._eigenvalues.angle().abs().max())

    def check_fits(self, shape: tuple[int, int], module: str) -> None:
        """Raise :class:`ShapeError` unless this rotation fits a weight of ``shape`` = ``(out, in)``, or ``(tokens,
        features)`` for an embedding.
        """
        n, b = self.generator.shape[0], self.block_size
        out, features = shape
        remedy = "use the base model that the adapter was trained on (its `base_model_name_or_path`)"
        if self.side == "output":
            r = -(-out // b) if self._one_for_all else n
            fits = b == -(-out // r)  # r blocks of ⌈out/r⌉, of which the last ones may lie outside
            if fits and self.whole and r * b != out:
                raise ShapeError(
                    f"{r} blocks of size {b} reach beyond the {out} outputs, and a cropped block has no products or powers",
                    module=module,
                    shape=shape,
                    remedy="fold the adapters themselves, one after the other, instead of what was computed from them",
                )
            rotated, width = "output features", out
        else:
            fits = features % b == 0 and (self._one_for_all or n == features // b)
            rotated, width = "features" if self.side == "embedding" else "input features", features
        if not fits:
            message = f"{n} blocks of size {b} do not cover the {width} {rotated}"
            raise ShapeError(message, module=module, shape=shape, remedy=remedy)
        if self.scale is not None and self.scale.shape != (out,):
            raise ShapeError(
                "oft_s does not fit the output features",
                module=module,
                tensor="oft_s",
                shape=tuple(self.scale.shape),
                expected=(out,),
                remedy=remedy,
            )

    def fold_into(self, weight: Tensor) -> Tensor:
        """What the live layer computes with ``weight: (out, in)`` (or ``(tokens, features)``), as a weight, in float32
        or better.
        """
        rotated = rotations.rotate_weight(weight, self.blocks.to(weight.device), self.side)
        return rotated if self.scale is None else rotated * self.scale.to(rotated).unsqueeze(-1)

    def unfold_from(self, weight: Tensor) -> Tensor:
        """The true inverse of :meth:`fold_into`.

        Raises:
            NonFiniteError: if a scale is zero or the rotation singular.
        """
        if self.scale is not None:
            if bool((self.scale == 0).any()):
                raise NonFiniteError(
                    "oft_s holds a zero, which no inverse undoes",
                    tensor="oft_s",
                    remedy="restore from the base model instead",
                )
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight = weight / self.scale.to(weight).unsqueeze(-1)
        return rotations.rotate_weight(weight, self.blocks.to(weight.device), self.side, inverse=True)

    # --- algebra, in float64 ---

    def exact(self) -> tuple[Rotation, float]:
        """The nearest rotation under the exact Cayley map, and how far it is: ``‖R - nearest‖₂``, the largest over the
        blocks.

        An exact one is its own nearest, at 0. A truncated series ``R = f(Q)`` is not orthogonal: its nearest rotation
        (the polar factor) keeps the angles of its eigenvalues ``f(±iθ)``, and the distance is that of their moduli
        from 1.

        Raises:
            AdapterError: no rotation is nearest (a singular ``R``), or it is by more than an exact generator holds.
        """
        if self.cayley.exact:
            return self, 0.0
        nearest, residual = _nearest(
            self.blocks,
            "the truncated series is singular",
            "its generator's norm is far above what the series is made for; retrain with a smaller learning rate",
        )
        return replace(self, generator=_generator(nearest), cayley=Cayley()), residual

    @property
    def _one_for_all(self) -> bool:
        return self.shared and self.generator.shape[0] == 1

    def _generators(self, size: int) -> Tensor:
        """Of an exact rotation, ``(n, size, size)`` float64, in larger blocks."""
        q = rotations.skew(self.generator.detach().to("cpu", torch.float64))
        return rotations.block_diagonal(q, size, shared=self._one_for_all)


def _nearest(r: Tensor, singular: str, remedy: str) -> tuple[Tensor, float]:
    """The rotations that are nearest to ``r: (n, b, b)``, and how far away the farthest is."""
    nearest, values = rotations.nearest_rotation(r)
    if float(values.min()) < 1e-6:  # smaller ones point nowhere
        raise AdapterError(f"{singular}: no rotation is nearest to it", remedy=remedy)
    return nearest, float(torch.linalg.matrix_norm(r - nearest, ord=2).max())


def _generator(r: Tensor) -> Tensor:
    """``(n, b(b-1)/2)`` of rotations ``r: (n, b, b)``, bounded."""
    norm = float(rotations.generator_norm(r).max())
    if not norm <= rotations.MAX_NORM:
        raise AdapterError(
            f"a rotation by {2 * math.atan(norm):.4f} rad, too close to π: its exact Cayley generator has a norm of {norm:.3g}, "
            f"more than {rotations.MAX_NORM:.0f}",
            remedy="scale the adapters down first (scaled), or fold them one after the other",
        )
    return rotations.vector(rotations.generator_of(r))


def _common(parts: Sequence[Rotation]) -> tuple[int, bool]:
    """The block size that all rotations of one module can be written in, and whether one block still serves all."""
    if len({r.side for r in parts}) > 1:
        raise MatchError(
            f"rotations on different sides of one weight: {', '.join(r.side for r in parts)}",
            remedy="fold the adapters one after the other",
        )
    widths = {r.generator.shape[0] * r.block_size for r in parts if not r._one_for_all}
    if len(widths) > 1:
        raise ShapeError(
            f"rotations of {' and of '.join(map(str, sorted(widths)))} features",
            remedy="compose adapters of the same base model",
        )
    size = math.lcm(*(r.block_size for r in parts))
    if any(width % size for width in widths):
        raise ShapeError(
            f"block sizes {', '.join(str(r.block_size) for r in parts)} have no common multiple that divides the {widths.pop()} features",
            remedy="fold the adapters one after the other",
        )
    return size, not widths


def _product(a: Rotation, b: Rotation) -> tuple[Rotation, float]:
    """The live chain ``x · Ra · Rb`` as one exact rotation, and how far it is from that."""
    size, shared = _common((a, b))
    wide = [rotations.block_diagonal(r.blocks.cpu(), size, shared=r._one_for_all) for r in (a, b)]
    product = wide[0] @ wide[1]
    residual = 0.0
    if not (a.cayley.exact and b.cayley.exact):
        product, residual = _nearest(
            product, "the product of truncated series is singular", "fold the adapters one after the other"
        )
    scale = a.scale if b.scale is None else b.scale if a.scale is None else a.scale.double() * b.scale.double()
    whole = a.side == "output"
    return Rotation(_generator(product), side=a.side, scale=scale, shared=shared, whole=whole), residual


def _inverse(r: Rotation) -> tuple[Rotation, float]:
    """The exact inverse of the nearest exact rotation, and how far ``r`` is from that."""
    exact, residual = r.exact()
    if exact.scale is not None and bool((exact.scale == 0).any()):
        raise AdapterError(
            "oft_s holds a zero, which no inverse undoes", tensor="oft_s", remedy="fold the adapter as it is"
        )
    scale = None if exact.scale is None else 1 / exact.scale.double()
    return replace(exact, generator=-exact.generator, scale=scale, whole=exact.side == "output"), residual


def _weighted(parts: Sequence[tuple[Rotation, float]]) -> Rotation:
    """``exp(Σ wᵢ log Rᵢ)`` of exact rotations; the scales' weighted geometric mean."""
    members = [r for r, _ in parts]
    size, shared = _common(members)
    # log R has the eigenvalues -2i·atan λ where Q has iλ; half of it keeps the sign of Q
    logs = [w * rotations.map_eigenvalues(r._generators(size), torch.atan) for r, w in parts]
    half = sum(logs[1:], start=logs[0])  # a shared one is added to every block
    angle = 2 * float(torch.linalg.matrix_norm(half, ord=2).max())
    if angle > 2 * math.atan(rotations.MAX_NORM):
        raise AdapterError(
            f"a rotation by {angle:.4f} rad: at π and beyond there is no exact Cayley generator, and another rotation would come out",
            remedy="use smaller weights",
        )
    generator = rotations.vector(rotations.map_eigenvalues(half, torch.tan))
    scales = [(r.scale.double(), w) for r, w in parts if r.scale is not None]
    if any(bool((scale <= 0).any()) for scale, _ in scales):
        raise AdapterError(
            "oft_s holds values that are not positive, which have no powers",
            tensor="oft_s",
            remedy="fold the adapter as it is",
        )
    powers = [w * scale.log() for scale, w in scales]
    scale = sum(powers[1:], start=powers[0]).exp() if powers else None
    side = members[0].side
    return Rotation(generator, side=side, scale=scale, shared=shared, whole=side == "output")


@dataclass(frozen=True, eq=False)
class OFTAdapter:
    """An OFT adapter of any dialect, immutable.

    Attributes:
        modules: ``{module path as the base model names it: Rotation}``.
        saved: ``{tensor name in the base model: tensor}``: trained biases, ``modules_to_save`` and saved embeddings,
            which replace the model's own.
        dialect: a key of :data:`DIALECTS`.
        config: the adapter's ``adapter_config.json``, as read.
        fingerprint: ``xxh3:…`` over all that decides what the adapter computes; equal for equal adapters, wherever they
            came from.
        source: folder, repository or live model it came from.
        sha256: of the tensors' file, where there is one.
    """

    modules: Mapping[str, Rotation]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    dialect: str = "peft-0.21"
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    sha256: str | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        for name in ("modules", "saved", "config"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        parts = dict(self.saved)
        for path, r in self.modules.items():
            parts[f"{path}\0{r.side}\0{r.cayley}"] = r.generator
            if r.scale is not None:
                parts[f"{path}\0scale"] = r.scale
        object.__setattr__(self, "fingerprint", hash_tensors(parts))

    # --- algebra, in float64 ---

    def scaled(self, alpha: float) -> OFTAdapter:
        """The adapter ``alpha`` times as strong: each rotation by ``alpha`` times its angles, in the same planes.

        The geodesic ``R^α = exp(α log R)`` of the rotation group, so ``tan(α·atan θ)`` on the eigenvalues ``±iθ`` of the
        generators, not ``α·Q``. ``scaled(a)`` and ``scaled(b)`` compose to ``scaled(a + b)``. A scale ``oft_s`` becomes
        ``oft_s^α``.

        Raises:
            AdapterError: an angle of π or beyond, a scale that is not positive, or biases and other tensors of its own,
                which cannot be scaled without the base's.
        Warns:
            ConversionWarning: truncated Neumann series were taken as their nearest rotations.
        """
        return self if alpha == 1 else _mixed([(self, alpha)], f"scaled({self.source}, {alpha:g})")

    def inverse(self) -> OFTAdapter:
        """The adapter that undoes this one: ``a.compose(a.inverse())`` is the identity. Errors as :meth:`scaled`, but any
        scale ``oft_s`` without zeros has an inverse.
        """
        _check_no_saved([self])
        return _made([self], f"inverse({self.source})", lambda path: _inverse(self.modules[path]))

    def compose(self, other: OFTAdapter) -> OFTAdapter:
        """One adapter for the live chain ``x · Ra · Rb`` of this one (a) and then ``other`` (b), peft's active adapters
        ``[a, b]``.

        ``fold(m, a.compose(b))`` is ``fold(m, [a, b])``. With rotations on the input side that is
        ``fold(fold(m, b), a)``; on the output side (peft ≤ 0.13) and of embeddings ``fold(fold(m, a), b)``. Block sizes
        that differ are brought to their least common multiple. Modules of one adapter alone stay as they are.

        Raises:
            AdapterError: a product by nearly π (a generator norm over 100).
            MatchError: both bring values for one tensor, or rotate different sides of one weight.
            ShapeError: adapters of different base models.
        Warns:
            ConversionWarning: products of truncated Neumann series were taken as their nearest rotations.
        """
        twice = sorted(set(self.saved) & set(other.saved))
        if twice:
            raise MatchError(
                "two adapters bring their own values for one tensor",
                tensor=twice[0],
                remedy="compose them without one's: dataclasses.replace(adapter, saved={})",
            )

        def chained(path: str) -> tuple[Rotation, float]:
            chain = [a.modules[path] for a in (self, other) if path in a.modules]
            return _product(*chain) if len(chain) == 2 else (chain[0], 0.0)

        composed = _made([self, other], f"compose({self.source}, {other.source})", chained)
        return replace(composed, saved={**self.saved, **other.saved})

    def save(self, folder: str | PathLike[str], *, force: bool = False) -> Mapping[str, float]:
        """Write the adapter as peft 0.21 does: ``adapter_config.json`` and ``adapter_model.safetensors``, with the exact
        Cayley map and generators in float32. Of an older release's adapter this makes one that peft 0.21 loads.

        Args:
            folder: appears whole, by one rename; must not exist.
            force: replace it, at the rename and not before.

        Returns:
            ``{module path: ‖R - written R‖₂}``: 0 for the exact map; a truncated Neumann series is no rotation, and
            becomes the nearest one.

        Raises:
            AdapterError: what peft 0.21 has no form for: a rotation on the output side, an ``oft_s``, block sizes that
                one config does not describe.
            StateError: the folder exists.
            DiskError: the disk did not take it; nothing is left behind.
        Warns:
            ConversionWarning: states the largest of what is returned.
        """
        from . import saving

        config, tensors, residuals = spread_adapter(self)
        saving.write_adapter(folder, config, tensors, force=force)
        _warn_converted(residuals)
        return MappingProxyType(residuals)

    def __repr__(self) -> str:
        sizes = sorted({r.block_size for r in self.modules.values()})
        return f"OFTAdapter({len(self.modules)} modules, block size {', '.join(map(str, sizes))}, {self.dialect}, source={printable(self.source)!r})"


def blend(parts: Iterable[tuple[OFTAdapter, float]]) -> OFTAdapter:
    """The weighted mean of adapters' rotations: ``exp(Σ wᵢ log Rᵢ)`` for each module.

    The log-Euclidean mean: taken in the Lie algebra, it does not depend on the order, and is again a rotation.
    ``blend([(a, w)])`` is ``a.scaled(w)``; for rotations that commute it is their composition. Weights need not sum
    to 1: ``[(a, 1), (b, 1)]`` adds two tasks, ``[(a, 0.5), (b, 0.5)]`` averages them. An adapter that lacks a module
    counts there as the identity.

    Args:
        parts: ``(adapter, weight)``, at least one.

    Raises, warns: as :meth:`OFTAdapter.scaled` and :meth:`OFTAdapter.compose`.
    """
    given = list(parts)
    if not given:
        raise AdapterError("nothing to blend", remedy="give (adapter, weight) pairs")
    return _mixed(given, f"blend({', '.join(f'{w:g} {a.source}' for a, w in given)})")


def describe(adapter: OFTAdapter) -> dict[str, Any]:
    """What an adapter is, as plain values: what ``oftsurgery adapter show --json`` prints."""
    return {
        "source": adapter.source,
        "dialect": adapter.dialect,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "fingerprint": adapter.fingerprint,
        "sha256": adapter.sha256,
        "modules": {
            path: {
                "side": r.side,
                "blocks": r.generator.shape[0],
                "block_size": r.block_size,
                "shared": r._one_for_all,
                "map": "exact Cayley" if r.cayley.exact else f"Neumann, {r.cayley.terms} terms",
                "angle": r.angle,
                "defect": r.defect,
                "scale": r.scale is not None,
            }
            for path, r in adapter.modules.items()
        },
        "saved": sorted(adapter.saved),
    }


def _mixed(parts: Sequence[tuple[OFTAdapter, float]], source: str) -> OFTAdapter:
    adapters = [a for a, _ in parts]
    if not all(math.isfinite(w) for _, w in parts):
        raise AdapterError("a weight is not finite", remedy="give finite numbers")
    _check_no_saved(adapters)

    def mean(path: str) -> tuple[Rotation, float]:
        exact = [(a.modules[path].exact(), w) for a, w in parts if path in a.modules]
        return _weighted([(r, w) for (r, _), w in exact]), max(residual for (_, residual), _ in exact)

    return _made(adapters, source, mean)


# what is kept of a config: by a derived adapter where its origins agree, and by what is saved
_CARRIED = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")


def _made(origins: Sequence[OFTAdapter], source: str, make: Callable[[str], tuple[Rotation, float]]) -> OFTAdapter:
    """An adapter from others: ``make`` gives a module's rotation, and how far it is from what it stands for."""
    residuals: dict[str, float] = {}
    modules: dict[str, Rotation] = {}
    for path in dict.fromkeys(path for a in origins for path in a.modules):
        with module_in_errors(path):
            modules[path], residuals[path] = make(path)
    _warn_converted(residuals)
    config: dict[str, Any] = {"peft_type": "OFT"}
    for name in _CARRIED:
        values = [a.config[name] for a in origins if a.config.get(name) is not None]
        if values and all(v == values[0] for v in values):
            config[name] = values[0]
    saved = [name for a in origins for name in a.config.get("modules_to_save") or ()]
    config["modules_to_save"] = list(dict.fromkeys(saved)) or None
    config["bias"] = next((b for b in ("all", "oft_only") for a in origins if a.config.get("bias") == b), "none")
    sizes = {(path, r.block_size, r._one_for_all) for path, r in modules.items()}
    if all(sizes == {(p, r.block_size, r._one_for_all) for p, r in a.modules.items()} for a in origins):
        config |= {n: origins[0].config[n] for n in ("r", "oft_block_size") if n in origins[0].config}
    output = any(r.side == "output" for r in modules.values())
    scaled = any(r.scale is not None for r in modules.values())
    dialect = "peft-0.13" if output else "peft-0.15" if scaled else "peft-0.21"
    return OFTAdapter(modules=modules, dialect=dialect, config=config, source=source)


def _warn_converted(residuals: Mapping[str, float]) -> None:
    """One :class:`ConversionWarning` for all modules."""
    changed = {path: r for path, r in residuals.items() if r > 1e-12}  # less is float64's rounding
    if changed:
        worst = max(changed, key=lambda path: changed[path])
        warn_caller(
            f"{len(changed)} truncated Neumann series became the nearest rotations, which the exact Cayley map gives: "
            f"‖R - nearest‖₂ is {changed[worst]:.2e} at worst ({printable(worst)})",
            ConversionWarning,
        )


def _check_no_saved(adapters: Iterable[OFTAdapter]) -> None:
    for adapter in adapters:
        if adapter.saved:
            raise AdapterError(
                "the adapter brings values of its own for a tensor (a trained bias, `modules_to_save`), "
                "which cannot be scaled, blended or inverted without the base's",
                tensor=next(iter(adapter.saved)),
                path=adapter.source,
                remedy="leave them out knowingly: dataclasses.replace(adapter, saved={})",
            )


def parse_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dialect: Dialect | None = None,
    source: str | None = None,
    sha256: str | None = None,
) -> OFTAdapter:
    """An adapter from its parsed ``adapter_config.json`` and its tensors, ``{key as peft saves it: tensor}``.

    Args:
        dialect: names the dialect where the files do not tell it; refused where they contradict it.
        source: where it came from, for messages and records.
        sha256: of the file of tensors.

    Raises:
        DialectError: no OFT adapter, an unsupported kind, or an ambiguous one.
        AdapterError: missing, unknown or mistyped keys.
        ShapeError, NonFiniteError: tensors that no peft release writes.
    """
    _check_config(config)
    if not tensors:
        raise AdapterError(
            "the adapter holds no tensor", path=source, remedy="save it again with peft's save_pretrained"
        )
    raw, saved = _group(tensors, source)
    name = _detect_dialect(config, raw, dialect, source)
    modules: dict[str, Rotation] = {}
    for path, parts in sorted(raw.items()):
        with module_in_errors(path):
            modules[path] = _rotation(parts, config, name)
    return OFTAdapter(modules=modules, saved=saved, dialect=name, config=config, source=source, sha256=sha256)


# --- and back ---------------------------------------------------------------------------------------------------------


def spread_adapter(adapter: OFTAdapter) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """The mirror of :func:`parse_adapter`: ``(config, tensors, residuals)`` as :meth:`OFTAdapter.save` writes them."""
    residuals: dict[str, float] = {}
    exact: dict[str, Rotation] = {}
    for path, r in adapter.modules.items():
        with module_in_errors(path):
            _check_expressible(r)
            exact[path], residuals[path] = r.exact()
    settings = _block_settings(exact, adapter.config)
    tensors: dict[str, Tensor] = {}
    for path, r in exact.items():
        part = "oft_embedding_R" if r.side == "embedding" else "oft_R"
        size = settings["oft_block_size"] or r.block_size
        q = rotations.vector(r._generators(size)).to(torch.float32)
        tensors[f"{_PREFIX}{path}.{part}.weight"] = q.contiguous()
    for name, value in adapter.saved.items():
        owner, _, local = name.rpartition(".")
        inside = f"{owner}.base_layer.{local}" if owner in exact else name
        tensors[_PREFIX + inside] = value.detach().cpu().contiguous().clone()
    config = {
        **{name: adapter.config.get(name) for name in (*_CARRIED, "modules_to_save")},
        **settings,
        "bias": adapter.config.get("bias") or "none",
        "coft": False,  # the clamp is in the generators
        "eps": 6e-05,
        "exclude_modules": None,
        "fan_in_fan_out": False,  # means nothing to a rotation of the inputs; peft warns of it on nn.Linear
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": 5,
        "peft_type": "OFT",
        "peft_version": "0.21.2",  # whose format this is; readers go by it
        # one pattern that matches these paths and no other: a list would match every path that ends in one
        "target_modules": "|".join(f"(?:{re.escape(path)})" for path in exact),
        "use_cayley_neumann": False,
    }
    return dict(sorted(config.items())), tensors, residuals


def _check_expressible(r: Rotation) -> None:
    if r.side == "output":
        raise AdapterError(
            "a rotation of the outputs (peft ≤ 0.13): peft 0.21 rotates inputs and embeddings, and has no form for it",
            remedy="fold it; or fold it into a copy of the base and train anew",
        )
    if r.scale is not None and bool((r.scale != 1).any()):
        raise AdapterError(
            "a trained scale of the outputs (peft 0.14 and 0.15): peft 0.21 has no form for it",
            tensor="oft_s",
            remedy="fold it; or give up the scale knowingly: dataclasses.replace(rotation, scale=None)",
        )


def _block_settings(modules: Mapping[str, Rotation], config: Mapping[str, Any]) -> dict[str, Any]:
    """How one config describes the blocks of all modules: ``r`` or ``oft_block_size``, the other being 0, and
    ``block_share``. They are written in blocks of ``oft_block_size``, which may be larger than they are.
    """
    shared = {r._one_for_all for r in modules.values()}
    sizes = {r.block_size for r in modules.values()}
    counts = {r.generator.shape[0] for r in modules.values()}
    if len(shared) == 2:
        whole = next(path for path, r in modules.items() if r._one_for_all)
        raise AdapterError(
            "some modules share one block (`block_share`) and others do not, which one config of peft's cannot say",
            module=whole,
            remedy="save them as two adapters",
        )
    size, listed = math.lcm(*sizes), ", ".join(map(str, sorted(sizes)))
    settings = {"r": 0, "oft_block_size": size, "block_share": shared.pop()}
    if len(sizes) == 1:
        return settings
    if settings["block_share"]:
        r = config.get("r")
        if not (isinstance(r, int) and r > 0 and not config.get("oft_block_size")):
            raise AdapterError(
                f"shared blocks of sizes {listed}, which one config of peft's cannot say",
                remedy="save modules of one size each as an adapter",
            )
        return settings | {"r": r, "oft_block_size": 0}
    if len(counts) == 1:
        return settings | {"r": counts.pop(), "oft_block_size": 0}
    for path, r in modules.items():
        features = r.generator.shape[0] * r.block_size
        if features % size:
            raise AdapterError(
                f"blocks of sizes {listed}: one config of peft's gives all modules one size, "
                f"and their common one, {size}, does not divide the {features} features",
                module=path,
                remedy="save modules of one size each as an adapter",
            )
    return settings


# --- config -----------------------------------------------------------------------------------------------------------

# field → (types, which of their values are none, and why)
_FIELDS: Mapping[str, tuple[tuple[type, ...], Callable[[Any], bool] | None, str]] = {
    **dict.fromkeys(("block_share", "coft", "use_cayley_neumann", "fan_in_fan_out"), ((bool,), None, "")),
    **dict.fromkeys(("r", "oft_block_size"), ((int,), None, "")),
    "bias": ((str,), None, ""),
    "peft_version": ((str, type(None)), None, ""),
    "eps": ((int, float), lambda eps: not 0 <= eps < math.inf, "which is no radius"),  # nor is NaN
    # peft's default is 5; a file must not be able to keep a fold busy for ever
    "num_cayley_neumann_terms": ((int,), lambda terms: terms > 1000, "more than 1000"),
    "modules_to_save": (
        (list, type(None)),
        lambda names: not all(isinstance(name, str) for name in names or ()),
        "which is no list of names",
    ),
}


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind is None:
        raise AdapterError(
            "the adapter's config has no `peft_type`",
            tensor="adapter_config.json",
            remedy="give a folder that peft's save_pretrained wrote",
        )
    if kind != "OFT":
        raise DialectError(
            f"this is a {printable(kind)} adapter, not an OFT one",
            remedy="oftsurgery folds OFT, OFTv2 and QOFT adapters only; merge others with peft's merge_and_unload",
        )
    for name, (types, wrong, why) in _FIELDS.items():
        value = config.get(name)
        if name in config and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise _wrong_config(f"{name} = {printable(value)!r}, which is no {types[0].__name__}")
        if name in config and wrong is not None and wrong(value):
            raise _wrong_config(f"{name} = {printable(value)}, {why}")
    if config.get("layer_replication"):
        raise DialectError(
            "`layer_replication` is not supported",
            remedy="replicate the layers in the base model first, then train or load the adapter on it",
        )
    if config.get("use_dora"):
        raise DialectError(
            "`use_dora` is no OFT setting that any peft release computes", remedy="check where the config came from"
        )


def _wrong_config(what: str) -> AdapterError:
    return AdapterError(
        f"the adapter's config has {what}",
        tensor="adapter_config.json",
        remedy="restore the config that peft wrote",
    )


# --- keys -------------------------------------------------------------------------------------------------------------

_PARTS = re.compile(r"^(?P<path>.+)\.(?P<part>oft_R\.weight|oft_embedding_R\.weight|oft_r|oft_s)$", re.DOTALL)
_OLD_PARTS = {"oft_r", "oft_s"}  # peft ≤ 0.15
_OTHER_TUNER = re.compile(
    r"\.(lora_[a-zA-Z_]+|boft_[A-Za-z]+|hada_\w+|lokr_\w+|vera_\w+|ia3_l|hra_u|oft_[A-Za-z_]+)(\.|$)"
)


def _group(tensors: Mapping[str, Tensor], source: str | None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Keys → ({module path: {part: tensor}}, {model tensor name: tensor})."""
    raw: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        where: dict[str, Any] = {"tensor": key, "path": source}
        if not key.startswith(_PREFIX):
            raise AdapterError(
                f"unknown key: peft's adapter keys start with {_PREFIX!r}",
                **where,
                remedy="save the adapter with peft's save_pretrained",
            )
        name = key.removeprefix(_PREFIX)
        match = _PARTS.match(name)
        if match and tensor.dtype not in FLOATS:
            raise AdapterError(
                f"a rotation must be float32, float16, bfloat16 or float64, this is {tensor.dtype}",
                **where,
                remedy="restore the file",
            )
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _finite(tensor):
            raise NonFiniteError(
                "the adapter's tensor holds NaN or infinity", **where, remedy="retrain from an earlier checkpoint"
            )
        if match:
            raw.setdefault(match["path"], {})[match["part"]] = tensor
        elif other := _OTHER_TUNER.search("." + name):
            raise DialectError(
                f"the adapter holds {printable(other[1])!r}, which is no part of an OFT adapter that peft saves",
                **where,
                remedy="save OFT adapters alone, with peft's save_pretrained",
            )
        # the frozen original of a module in `modules_to_save` (with bias="all" peft saves its bias) is not used live
        elif ".original_module." not in name:
            target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            # with bias="all" peft saves the biases of `modules_to_save` under two keys
            earlier = saved.setdefault(target, tensor)
            if earlier is not tensor and not (earlier.dtype == tensor.dtype and torch.equal(earlier, tensor)):
                raise MatchError("two keys name one tensor of the model", **where, remedy="remove one of the keys")
    if not raw:
        raise AdapterError(
            f"the adapter has {len(saved)} tensors, but none is a rotation (oft_R, oft_embedding_R, oft_r)",
            path=source,
            remedy="check that the adapter was saved after training, from the rank that holds the weights",
        )
    return raw, saved


def _finite(tensor: Tensor) -> bool:
    # one pass and no mask: on the CPU torch.isfinite takes five times as long
    return tensor.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))


# --- dialects ---------------------------------------------------------------------------------------------------------


def _detect_dialect(
    config: Mapping[str, Any], raw: Mapping[str, Mapping[str, Tensor]], named: str | None, source: str | None
) -> str:
    if named is not None and named not in DIALECTS:
        raise DialectError(f"unknown dialect {printable(named)!r}", remedy=f"one of {', '.join(DIALECTS)}")
    old = [path for path, parts in raw.items() if parts.keys() & _OLD_PARTS]
    new = {part for parts in raw.values() for part in parts} - _OLD_PARTS
    if old and new:
        raise DialectError(
            "keys of peft ≤ 0.15 (oft_r) and of ≥ 0.16 (oft_R) in one adapter",
            tensor=old[0],
            path=source,
            remedy="save it with one peft",
        )
    if old:
        candidates = _old_dialects(config, raw, source)
    elif "oft_embedding_R.weight" in new:
        candidates = ["peft-0.21"]  # embeddings came with 0.19, whatever the config has lost
    else:
        candidates = _new_dialects(config, source)
    fitting = [dialect for dialect in candidates if named in (None, dialect)]
    if not fitting:
        raise DialectError(
            f"named {named}, but the files are of {' or '.join(candidates)}",
            path=source,
            remedy="leave the dialect out",
        )
    if len(fitting) > 1:
        raise DialectError(
            f"the files do not tell the dialect: {' or '.join(candidates)} (config: use_cayley_neumann={config.get('use_cayley_neumann')!r}, "
            f"peft_version={printable(config.get('peft_version'))!r})",
            path=source,
            remedy="name it: load_adapter(…, dialect=…), by the peft release that trained it",
        )
    return fitting[0]


def _old_dialects(config: Mapping[str, Any], raw: Mapping[str, Mapping[str, Tensor]], source: str | None) -> list[str]:
    scaled = "oft_block_size" in config
    for path, parts in raw.items():
        missing = _OLD_PARTS - parts.keys()
        if scaled and missing:
            raise AdapterError(
                f"peft 0.14 and 0.15 save oft_r and oft_s; {', '.join(missing)} is missing",
                module=path,
                path=source,
                remedy="restore the whole file",
            )
        if not scaled and "oft_s" in parts:
            raise DialectError(
                "oft_s without `oft_block_size` in the config: neither peft ≤ 0.13 nor 0.14/0.15 writes that",
                module=path,
                path=source,
                remedy="restore the adapter_config.json that belongs to these tensors",
            )
    return ["peft-0.15" if scaled else "peft-0.13"]


def _new_dialects(config: Mapping[str, Any], source: str | None) -> list[str]:
    version = config.get("peft_version")
    release = re.match(r"(\d+)\.(\d+)", version or "")
    after = release is not None and (int(release[1]), int(release[2])) >= (0, 18)
    if config.get("use_cayley_neumann") is False:
        return ["peft-0.21" if after else "peft-0.17"]  # the exact map is the same in both
    if "use_cayley_neumann" not in config:
        raise DialectError(
            "the config has no `use_cayley_neumann`, so the map cannot be told: peft ≥ 0.16 always writes `use_cayley_neumann`",
            path=source,
            remedy="restore the adapter_config.json that belongs to these tensors",
        )
    if version is None:
        return ["peft-0.17"]  # the field came with 0.18
    if not after or re.search(r"^0\.18\.0\.?dev", version):
        # a development version around the change of the series
        return ["peft-0.17", "peft-0.21"]
    return ["peft-0.21"]


# --- rotations --------------------------------------------------------------------------------------------------------


def _rotation(parts: Mapping[str, Tensor], config: Mapping[str, Any], dialect: str) -> Rotation:
    if dialect in ("peft-0.13", "peft-0.15"):
        return _old_rotation(parts, config, dialect)
    if len(parts) > 1:
        raise AdapterError(
            f"one module has {' and '.join(sorted(parts))}", remedy="save the adapter again with peft's save_pretrained"
        )
    part, v = next(iter(parts.items()))
    if v.ndim != 2 or v.shape[0] < 1:
        raise _misshapen("a generator must be (blocks, b(b-1)/2)", part, v)
    try:
        rotations.block_size_of(v.shape[1])
    except ShapeError as error:
        raise _misshapen(error.message, part, v) from None
    _check_shared(v, config)
    cayley = Cayley()
    if config.get("use_cayley_neumann"):
        cayley = Cayley(terms=int(config.get("num_cayley_neumann_terms", 5)), since_0_18=dialect == "peft-0.21")
    radius = coft_radius(config, v.shape[0])
    if radius is not None:
        # peft ≥ 0.16: the clamp is on the skew-symmetric matrix; clamped anew by every live forward, so a file may not be
        v = rotations.vector(_clamp(rotations.skew(v.to(torch.float64)), radius))
    side: rotations.Side = "embedding" if part.startswith("oft_embedding") else "input"
    return Rotation(generator=v, cayley=cayley, side=side, shared=bool(config.get("block_share")))


def _misshapen(message: str, part: str, tensor: Tensor) -> ShapeError:
    return ShapeError(message, tensor=part, shape=tensor.shape, remedy="restore the file")


def _old_rotation(parts: Mapping[str, Tensor], config: Mapping[str, Any], dialect: str) -> Rotation:
    a = parts["oft_r"]  # which a module of these dialects has, with oft_s in peft 0.14 and 0.15
    if a.ndim != 3 or a.shape[1] != a.shape[2] or a.shape[0] < 1 or a.shape[1] < 2:
        raise _misshapen("oft_r must be (blocks, b, b) with b ≥ 2", "oft_r", a)
    _check_shared(a, config)
    scale = parts.get("oft_s")
    if scale is not None and (scale.ndim != 2 or scale.shape[1] != 1):
        raise _misshapen("oft_s must be (out, 1)", "oft_s", scale)
    a = a.to(torch.float64)
    rows, b, _ = a.shape
    radius = coft_radius(config, rows, b if scale is None else -(-scale.shape[0] // rows))
    if radius is not None:  # on the raw matrix
        if scale is not None and config.get("block_share"):
            raise DialectError(
                "a COFT adapter of peft 0.14/0.15 with one shared block clamps by the number of blocks a row, which its files do not hold",
                remedy="run one forward in peft 0.15 and save again with `coft: false`",
            )
        a = _clamp(a, radius)
    return Rotation(
        generator=rotations.vector((a - a.transpose(1, 2)) / 2),
        side="output" if dialect == "peft-0.13" else "input",
        scale=None if scale is None else scale.reshape(-1),
        shared=bool(config.get("block_share")),
    )


def _check_shared(rows: Tensor, config: Mapping[str, Any]) -> None:
    if config.get("block_share") and rows.shape[0] != 1:
        raise ShapeError(
            "`block_share` is set, but the generator has more than one row",
            shape=rows.shape,
            remedy="restore the config",
        )


def coft_radius(config: Mapping[str, Any], rows: int, width: int = 1) -> float | None:
    """COFT's bound of each block's Frobenius norm, ``eps / √rows`` for a generator of ``rows`` blocks; None without COFT.

    peft ≤ 0.15 has ``eps · width²`` in place of ``eps``, with a ``width`` of ⌈out/r⌉ for r blocks a row, in ≤ 0.13 of
    the block size.
    """
    return float(config.get("eps", 6e-5)) * width**2 / rows**0.5 if config.get("coft") else None


def _clamp(q: Tensor, radius: float) -> Tensor:
    """Each block of ``q: (rows, b, b)`` scaled to Frobenius norm ``radius`` where it is larger."""
    norm = torch.linalg.matrix_norm(q, keepdim=True)
    return torch.where(norm <= radius, q, q * (radius / norm.clamp(min=torch.finfo(q.dtype).tiny)))
