"""The immutable OFT adapter of any dialect: its rotations by module, and adapters that are computed from others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from oftsurgery.errors import (
    AdapterError,
    ConversionWarning,
    DialectError,
    MatchError,
    StateError,
    module_in_errors,
    printable,
    warn_caller,
)
from oftsurgery.hashing import hash_tensors

from .algebra import inverse, product, weighted_mean
from .dialects import DIALECTS
from .rotation import Rotation
from .strength import AtStrength, StrengthMode, changes_nothing, check_strength
from .targets import TARGETS
from .to_image_tools import FORMS, ImageForm, image_tensors, metadata_of
from .to_peft import CARRIED, config_and_tensors
from .weight_map import WeightMap

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True, eq=False)
class OFTAdapter:
    """An OFT adapter of any dialect, immutable.

    >>> adapter = oftsurgery.load_adapter("ADAPTER")
    >>> half = adapter.scaled(0.5)                               # half of each angle
    >>> nothing = adapter.compose(adapter.inverse())             # the identity
    >>> errors = half.save("HALF")                               # as peft's current release loads it

    Attributes:
        modules: ``{module path as the base model names it: Rotation}``. The modules of other adapters than peft's OFT have the
            names and the kinds of maps that the adapter's own tool gave them.
        saved: ``{tensor name in the base model: tensor}``: trained biases, ``modules_to_save`` and saved embeddings,
            which replace the model's own.
        dialect: a key of :data:`~oftsurgery.adapters.dialects.DIALECTS`.
        config: the adapter's ``adapter_config.json``, as read.
        fingerprint: ``xxh3:…`` over all that decides what the adapter computes; equal for equal adapters from different
            places.
        source: folder, repository or live model that the adapter came from.
        sha256: of the tensors' file, where there is one.
        sums: ``{tensor name, with a module's name as in ``modules``: tensor}``: what LyCORIS adds to tensors of normalisation layers
            (``w_norm``, ``b_norm``), at strength 1.
        bias: whether the live layers of training left the biases as they are (``"kept"``) or turned them with the rows of the
            weights (``"rotated"``); None for the dialects of peft, which tell.
        strength: the strength at which the adapter is folded; ``modules`` have this strength.
        strength_mode: how a strength other than 1 weakens the maps, see :func:`oftsurgery.fold`.
        left_out: the names of embeddings of textual inversion that the file holds too, and that the caller left out.
    """

    modules: Mapping[str, WeightMap]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    dialect: str = "peft-0.21"
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    sha256: str | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    bias: str | None = None
    strength: float = 1.0
    strength_mode: str = "angle"
    left_out: tuple[str, ...] = ()
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            message = f"unknown dialect {printable(self.dialect)!r}"
            raise DialectError(message, path=self.source, remedy=f"use one of {', '.join(DIALECTS)}")
        for name in ("modules", "saved", "config", "sums"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        parts = dict(self.saved) | {f"{name}\0sum\0{self.strength!r}": tensor for name, tensor in self.sums.items()}
        for path, r in self.modules.items():
            if not isinstance(r, Rotation):
                parts |= {f"{path}\0{r.settings()}\0{name}": tensor for name, tensor in r.tensors().items()}
                continue
            parts[f"{path}\0{r.side}\0{r.cayley}"] = r.generator
            if r.scale is not None:
                parts[f"{path}\0scale"] = r.scale
        object.__setattr__(self, "fingerprint", hash_tensors(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        # read-only mappings cannot be pickled (multiprocessing, concurrent.futures)
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        plain = {name: dict(value) if isinstance(value, MappingProxyType) else value for name, value in given.items()}
        make: Callable[..., OFTAdapter] = type(self)
        return partial(make, **plain), ()

    def at_strength(self, strength: float, mode: StrengthMode = "angle") -> OFTAdapter:
        """The adapter at another strength, as ``fold(…, strength=…, strength_mode=…)`` folds the adapter.

        >>> weaker = oftsurgery.load_adapter("ADAPTER").at_strength(0.8, "linear")

        The maps are computed when they are folded. :meth:`scaled` computes the mode ``"angle"`` at once.

        Raises:
            StateError: the strength is not finite, the mode is unknown, or the adapter has a strength already.
            AdapterError: the mode has no meaning for this adapter, or the adapter brings biases or other tensors.
        """
        check_strength(strength, mode)
        if changes_nothing(strength, mode):
            return self
        if self.strength != 1 or self.strength_mode != "angle":
            message = f"the adapter has a strength already ({self.strength:g}, {self.strength_mode})"
            raise StateError(
                message, path=self.source, remedy="give the strength once, with the adapter as it was read"
            )
        _check_no_saved([replace(self, sums={})])
        modules: dict[str, WeightMap] = {}
        for path, weight_map in self.modules.items():
            with module_in_errors(path):
                modules[path] = AtStrength(weight_map, float(strength), mode)
        return replace(self, modules=modules, strength=float(strength), strength_mode=mode)

    # --- algebra, in float64 ---

    def scaled(self, alpha: float) -> OFTAdapter:
        """The adapter ``alpha`` times as strong: each rotation by ``alpha`` times its angles, in the same planes.

        >>> half = oftsurgery.load_adapter("ADAPTER").scaled(0.5)

        The result is the geodesic ``R^α = exp(α log R)`` of the rotation group: ``tan(α·atan θ)`` on the eigenvalues ``±iθ``
        of the generators, not ``α·Q``. ``scaled(a)`` and ``scaled(b)`` compose to ``scaled(a + b)``. A scale ``oft_s``
        becomes ``oft_s^α``.

        Raises:
            AdapterError: an angle is π or more, a scale is not positive, or the adapter brings biases or other tensors, which
                cannot be scaled without the base's tensors.
        Warns:
            ConversionWarning: truncated Neumann series were replaced by their nearest rotations.
        """
        if alpha == 1:
            return self
        if self.sums or not all(map(_has_algebra, self.modules.values())):
            return self.at_strength(alpha)
        return _mean_of([(self, alpha)], f"scaled({self.source}, {alpha:g})")

    def inverse(self) -> OFTAdapter:
        """The adapter that undoes this adapter: ``a.compose(a.inverse())`` is the identity.

        >>> back = oftsurgery.load_adapter("ADAPTER").inverse()

        The errors are those of :meth:`scaled`, but any scale ``oft_s`` without zeros has an inverse.
        """
        _check_no_saved([self])
        return _derived([self], f"inverse({self.source})", lambda path: inverse(_rotation(self.modules[path])))

    def compose(self, other: OFTAdapter) -> OFTAdapter:
        """One adapter for the live chain ``x · Ra · Rb`` of this adapter (a) and then ``other`` (b), peft's active adapters
        ``[a, b]``.

        >>> a, b = oftsurgery.load_adapter("ADAPTER"), oftsurgery.load_adapter("ADAPTER").scaled(0.2)
        >>> chain = a.compose(b)                                     # fold(m, chain) is fold(m, [a, b])

        With rotations on the input side ``fold(m, a.compose(b))`` is ``fold(fold(m, b), a)``; on the output side (peft ≤ 0.13)
        and of embeddings, ``fold(fold(m, a), b)``. Different block sizes are brought to their least common multiple. A module
        of only one of the adapters stays as it is.

        Raises:
            AdapterError: a product turns by nearly π (a generator's norm over 100).
            MatchError: both adapters bring values for one tensor, or rotate different sides of one weight.
            ShapeError: the adapters are of different base models.
        Warns:
            ConversionWarning: products of truncated Neumann series were replaced by their nearest rotations.
        """
        twice = sorted(set(self.saved) & set(other.saved))
        if twice:
            message = "two adapters bring their own values for one tensor"
            remedy = "leave out the values of one adapter: dataclasses.replace(adapter, saved={})"
            raise MatchError(message, tensor=twice[0], remedy=remedy)

        def chained(path: str) -> tuple[Rotation, float]:
            chain = [_rotation(a.modules[path]) for a in (self, other) if path in a.modules]
            return product(*chain) if len(chain) == 2 else (chain[0], 0.0)

        composed = _derived([self, other], f"compose({self.source}, {other.source})", chained)
        return replace(composed, saved={**self.saved, **other.saved})

    def save(self, folder: str | PathLike[str], *, force: bool = False) -> Mapping[str, float]:
        """Write the adapter as peft 0.21 does: ``adapter_config.json`` and ``adapter_model.safetensors``, with the exact
        Cayley map and generators in float32. peft 0.21 then loads an adapter of an older release too.

        >>> errors = oftsurgery.load_adapter("OLD").save("NEW")
        >>> oftsurgery.load_adapter("NEW").dialect
        'peft-0.21'

        Args:
            folder: a folder that does not exist yet; it appears whole, by one rename.
            force: replace the folder, at the rename and not before.

        Returns:
            ``{module path: ‖R - written R‖₂}``: 0 for the exact map; a truncated Neumann series is not a rotation, and its
            nearest rotation is written.

        Raises:
            AdapterError: peft 0.21 has no form for the adapter: a rotation on the output side, an ``oft_s``, or block sizes
                that one config cannot describe.
            StateError: the folder exists.
            DiskError: the disk is full, read-only or in use; nothing is left behind.
        Warns:
            ConversionWarning: states the largest error of the result.
        """
        from . import saving

        config, tensors, residuals = config_and_tensors(self)
        saving.write_adapter(folder, config, tensors, force=force)
        _warn_converted(residuals)
        return MappingProxyType(residuals)

    def save_for(self, form: ImageForm, file: str | PathLike[str], *, force: bool = False) -> None:
        """Write a rotation of outputs as one ``.safetensors`` file of an image tool.

        >>> blocks = {"lora_unet_a.oft_blocks": torch.randn(4, 8, 8), "lora_unet_a.alpha": torch.tensor(0.01)}
        >>> from safetensors.torch import save_file
        >>> save_file(blocks, "style.safetensors")
        >>> oftsurgery.load_adapter("style.safetensors").save_for("comfyui", "style-comfyui.safetensors")

        Args:
            form: ``"comfyui"``: ComfyUI and A1111's web UI compute at strength 1 what the trainer's live layers computed, with limits
                and scales. ``"lycoris"``: LyCORIS 3.0 and later read the file.
            file: the file to write.
            force: replace the file.

        Raises:
            AdapterError: the form has no place for the adapter's maps: rotations of inputs, turned biases, a linear strength, a
                scaled diag-oft with blocks of an odd size.
            StateError: the file exists.
            DiskError: the disk is full or read-only; nothing is left behind.
        """
        from . import saving

        if form not in FORMS:
            message = f"the form {printable(form)!r} is not known"
            raise StateError(message, remedy=f"choose one of {', '.join(map(repr, FORMS))}, or save(folder) for peft")
        saving.write_file(file, image_tensors(self, form), metadata_of(form), force=force)

    def __repr__(self) -> str:
        sizes = sorted({r.block_size for r in self.modules.values()})
        return f"OFTAdapter({len(self.modules)} modules, block size {', '.join(map(str, sizes))}, {self.dialect}, source={printable(self.source)!r})"


def blend(parts: Iterable[tuple[OFTAdapter, float]]) -> OFTAdapter:
    """The weighted mean of adapters' rotations: ``exp(Σ wᵢ log Rᵢ)`` for each module.

    >>> a, b = oftsurgery.load_adapter("ADAPTER"), oftsurgery.load_adapter("ADAPTER").scaled(0.2)
    >>> mean = oftsurgery.blend([(a, 0.5), (b, 0.5)])
    >>> path = "model.layers.0.self_attn.q_proj"
    >>> torch.allclose(mean.modules[path].blocks, a.scaled(0.6).modules[path].blocks, atol=1e-6)
    True

    The mean is log-Euclidean: it is taken in the Lie algebra, does not depend on the order, and is again a rotation.
    ``blend([(a, w)])`` is ``a.scaled(w)``; the blend of commuting rotations is their composition. Weights need not sum
    to 1: ``[(a, 1), (b, 1)]`` adds two tasks, ``[(a, 0.5), (b, 0.5)]`` averages them. An adapter that lacks a module
    counts as the identity there.

    Args:
        parts: ``(adapter, weight)``, at least one.

    Raises, warns: as :meth:`OFTAdapter.scaled` and :meth:`OFTAdapter.compose`.
    """
    given = list(parts)
    if not given:
        raise AdapterError("there is no adapter to blend", remedy="give (adapter, weight) pairs")
    return _mean_of(given, f"blend({', '.join(f'{w:g} {a.source}' for a, w in given)})")


def describe(adapter: OFTAdapter) -> dict[str, Any]:
    """The facts about an adapter as plain values, which ``oftsurgery adapter show --json`` prints."""
    return {
        "source": adapter.source,
        "dialect": adapter.dialect,
        "bias": adapter.bias,
        "strength": adapter.strength,
        "strength_mode": adapter.strength_mode,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "fingerprint": adapter.fingerprint,
        "sha256": adapter.sha256,
        "modules": {path: r.facts() | {"angle": r.angle, "defect": r.defect} for path, r in adapter.modules.items()},
        "saved": sorted(adapter.saved),
        "left_out": list(adapter.left_out),
    }


def _mean_of(parts: Sequence[tuple[OFTAdapter, float]], source: str) -> OFTAdapter:
    """The weighted mean of adapters on the rotation group."""
    adapters = [a for a, _ in parts]
    for adapter, w in parts:
        if not math.isfinite(w):
            raise AdapterError(f"the weight {w} is not finite", path=adapter.source, remedy="give finite numbers")
    _check_no_saved(adapters)

    def mean(path: str) -> tuple[Rotation, float]:
        exact = [(_rotation(a.modules[path]).exact(), w) for a, w in parts if path in a.modules]
        return weighted_mean([(r, w) for (r, _), w in exact]), max(residual for (_, residual), _ in exact)

    return _derived(adapters, source, mean)


def _derived(origins: Sequence[OFTAdapter], source: str, make: Callable[[str], tuple[Rotation, float]]) -> OFTAdapter:
    """An adapter from others: ``make`` gives a module's rotation, and its distance from the exact result."""
    residuals: dict[str, float] = {}
    modules: dict[str, WeightMap] = {}
    for path in dict.fromkeys(path for a in origins for path in a.modules):
        with module_in_errors(path):
            modules[path], residuals[path] = make(path)
    _warn_converted(residuals)
    config: dict[str, Any] = {"peft_type": "OFT"}
    for name in (*CARRIED, *TARGETS):
        values = [a.config[name] for a in origins if a.config.get(name) is not None]
        if values and all(v == values[0] for v in values):
            config[name] = values[0]
    saved = [name for a in origins if a.saved for name in a.config.get("modules_to_save") or ()]
    config["modules_to_save"] = list(dict.fromkeys(saved)) or None
    config["bias"] = next((b for b in ("all", "oft_only") for a in origins if a.config.get("bias") == b), "none")
    sizes = _sizes(modules)
    if all(sizes == _sizes(a.modules) for a in origins):
        config |= {n: origins[0].config[n] for n in ("r", "oft_block_size") if n in origins[0].config}
    output = any(r.side == "output" for r in modules.values())
    scaled = any(getattr(r, "scale", None) is not None for r in modules.values())
    dialect = "peft-0.13" if output else "peft-0.15" if scaled else "peft-0.21"
    bias = next((a.bias for a in origins if a.bias is not None), None)
    return OFTAdapter(modules=modules, dialect=dialect, config=config, source=source, bias=bias)


def _sizes(modules: Mapping[str, WeightMap]) -> set[tuple[str, int, bool]]:
    return {(path, r.block_size, isinstance(r, Rotation) and r._one_for_all) for path, r in modules.items()}


def _rotation(weight_map: WeightMap) -> Rotation:
    """The map as a rotation.

    Raises:
        AdapterError: the map is none.
    """
    if not _has_algebra(weight_map):
        message = f"the map ({weight_map.family}) is no block rotation for every kind of layer, and has no products, means or inverses"
        raise AdapterError(
            message, remedy="fold the adapters one after the other; strength=… (--strength) weakens an adapter"
        )
    return cast(Rotation, weight_map.resolved())


def _has_algebra(weight_map: WeightMap) -> bool:
    return not weight_map.asks_layer and isinstance(weight_map.resolved(), Rotation)


def _warn_converted(residuals: Mapping[str, float]) -> None:
    """Give one :class:`ConversionWarning` for all modules."""
    changed = {path: r for path, r in residuals.items() if r > 1e-12}  # smaller residuals are float64's rounding
    if changed:
        worst = max(changed, key=lambda path: changed[path])
        what = f"{len(changed)} truncated Neumann series became the nearest rotations, which the exact Cayley map gives"
        distance = f"‖R - nearest‖₂ is {changed[worst]:.2e} at worst ({printable(worst)})"
        warn_caller(f"{what}: {distance}", ConversionWarning)


def _check_no_saved(adapters: Iterable[OFTAdapter]) -> None:
    """Refuse adapters with values of their own for tensors of the model."""
    for adapter in adapters:
        if adapter.sums:
            message = (
                "the adapter also adds to tensors of normalisation layers, and has no products, means or inverses here"
            )
            remedy = "leave these values out on purpose: dataclasses.replace(adapter, sums={})"
            raise AdapterError(message, tensor=next(iter(adapter.sums)), path=adapter.source, remedy=remedy)
        if adapter.saved:
            own = "the adapter brings values of its own for a tensor (a trained bias, `modules_to_save`)"
            message = f"{own}, which cannot be scaled, blended or inverted without the base's values"
            remedy = "leave these values out on purpose: dataclasses.replace(adapter, saved={})"
            raise AdapterError(message, tensor=next(iter(adapter.saved)), path=adapter.source, remedy=remedy)
