"""Live OFT layers: the rotation stays beside the weight, trains, merges and comes out again bit-exactly.

:func:`wrap_model` puts a :class:`LiveLayer` in place of each layer that an adapter targets. Its forward computes ``y =
(x R) Wᵀ + bias`` by blocks (legacy dialects: ``((x Wᵀ) R) ⊙ s + bias``; embeddings: ``E[i] R``), in float32 or better
whatever the dtype or autocast state around it, and returns the dtype that the base layer returns. Gradients reach the
generators, through bitsandbytes layers too.

Keys of a wrapped model's ``state_dict``, for a layer at ``<path>``:

=============================  =====================================================================================================================
``<path>.base_layer.*``        the base layer's own
``<path>.oft_R.<name>.weight`` generator of adapter ``<name>``, ``(n, b(b-1)/2)`` float32, trainable (peft's key, but
for embeddings)
``<path>.oft_R.<name>.scale``  ``(out,)`` float32, trainable; the ``oft_s`` of peft 0.14 and 0.15 alone
``<path>.merged``              only while merged, so that such a state does not load into a layer that would rotate once more
=============================  =====================================================================================================================
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.adapters.adapter import Cayley, OFTAdapter, Rotation, coft_radius
from oftsurgery.errors import AdapterError, FormatError, MatchError, StateError, printable, told_of, warn_caller
from oftsurgery.folding.engine import warn_of_idle
from oftsurgery.folding.memory import inner_model, modules_of, replace_tensor, separate_module, transaction
from oftsurgery.folding.plan import FoldPlan, in_names_of, plan_changes
from oftsurgery.hashing import hash_tensors
from oftsurgery.stores import peft_live
from oftsurgery.stores.layers import Held, Layer, Undo, offloaded, swap_modules
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.sharing import share_model
from oftsurgery.weights.fold import check_chain, fold_encoded

__all__ = [
    "Embedding",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LiveLayer",
    "LiveRotation",
    "active_adapters",
    "adapter_of",
    "dispatch_bnb_4bit",
    "dispatch_bnb_8bit",
    "enable_adapters",
    "live_layers",
    "merge",
    "original_hashes",
    "read_live",
    "set_adapter",
    "strip",
    "unmerge",
    "unwrap",
    "wrap_model",
]


# --- one adapter's rotation of one layer ------------------------------------------------------------------------------


class LiveRotation(nn.Module):
    """A :class:`~oftsurgery.Rotation` that trains.

    Attributes:
        weight: the generator, ``(n, b(b-1)/2)`` float32.
        scale: ``(out,)`` float32, or None.
        cayley, side: as in :class:`~oftsurgery.Rotation`.
        radius: COFT's bound of each block's ``‖Q‖_F``, or None. Every forward keeps to it, and a training one writes
            the clamped generator back.
        dropout: share of the blocks that a training forward replaces by the identity, at random: what peft's
            ``module_dropout`` says (its layers have ignored it since 0.16).
    """

    def __init__(
        self,
        rotation: Rotation,
        *,
        radius: float | None = None,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()

        def own(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach().to(device=device, dtype=torch.float32, copy=True))

        with torch.inference_mode(False):  # what is made in inference mode never trains
            self.weight = own(rotation.generator)
            self.scale = None if rotation.scale is None else own(rotation.scale)
        self.cayley, self.side, self.radius, self.dropout = rotation.cayley, rotation.side, radius, dropout

    def _generator(self, *, write_back: bool) -> Tensor:
        """Clamped; the gradient passes the clamp as if it were not there, as peft's does."""
        v = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if self.radius is None:
            return v
        with torch.no_grad():
            # each element of v stands in Q twice
            norm = math.sqrt(2) * torch.linalg.vector_norm(v, dim=1, keepdim=True)
            clamped = torch.where(norm <= self.radius, v, v * (self.radius / norm))
            if write_back:
                self.weight.copy_(clamped)
        return v + (clamped - v).detach()

    def blocks(self) -> Tensor:
        """``(n, b, b)`` in float32 or better, differentiable: the live layer computes ``x · blockdiag(blocks)``."""
        blocks = self.cayley(rotations.skew(self._generator(write_back=self.training)))
        n = blocks.shape[0]
        if self.training and self.dropout > 0 and n > 1:
            dropped = (torch.randperm(n, device=blocks.device) < int(self.dropout * n)).reshape(n, 1, 1)
            blocks = torch.where(dropped, torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device), blocks)
        return blocks

    @torch.no_grad()
    def rotation(self) -> Rotation:
        """What it computes now (dropout aside), as a frozen :class:`~oftsurgery.Rotation` of tensors of its own."""
        generator, scale = self._generator(write_back=False), self.scale
        return Rotation(generator.clone(), self.cayley, self.side, None if scale is None else scale.detach().clone())

    def extra_repr(self) -> str:
        n, elements = self.weight.shape
        return f"{n} blocks of {rotations.block_size_of(elements)}, {self.side} side"


# --- layers -----------------------------------------------------------------------------------------------------------


def _of_base(name: str) -> Any:
    return property(lambda live: getattr(live.base_layer, name), doc=f"The base layer's ``{name}``.")


class LiveLayer(nn.Module):
    """A base layer and the rotations of one or more named adapters; the named subclasses below differ in the base that
    they take.

    Attributes:
        base_layer: the layer that was wrapped, its weight untouched until :meth:`merge`.
        oft_R: ``{adapter name: LiveRotation}``.
        active_adapters: names in the live order: ``[a, b]`` computes ``x · Ra · Rb``.
        merged_adapters: of those that are merged into the base layer's weight, likewise.
        disable_adapters: see :meth:`enable_adapters`.
        path: of the layer in its model, for messages.

    Args:
        base_layer: what the subclass takes. On a bitsandbytes 4-bit layer, ``support_avx512bf16_for_cpu`` is switched
            off and a weight that a CPU forward has repacked is laid out as before: bitsandbytes computes no gradients
            through the repacked one.
        adapter_name: of the first adapter; it becomes active.
        rotation: of the first adapter.
        radius, dropout: see :class:`LiveRotation`.
        shared: other modules use the base layer's Parameter too, so that a merge must not move it to the CPU.

    Raises:
        FormatError: the base layer is not of the subclass's kind.
        MatchError, ShapeError: the rotation does not fit it.
    """

    oft_R: nn.ModuleDict  # noqa: N815 (peft's name)
    base_layer: nn.Module

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        rotation: Rotation,
        *,
        radius: float | None = None,
        dropout: float = 0.0,
        path: str = "",
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.path, self._name, self.training = path, path or type(base_layer).__name__, base_layer.training
        layer = Layer(self._name, base_layer)
        meant = _class_for(layer)
        if not isinstance(self, meant):
            raise FormatError(
                f"live.{type(self).__name__} does not take a {type(base_layer).__name__}",
                module=self._name,
                remedy=f"for this one there is live.{meant.__name__}",
            )
        self._shared = shared
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self._held: Held | None = None
        # the module of other places, which the base layer stands for in this one
        self._twin: tuple[nn.Module] | None = None
        self.merged_adapters: list[str] = []
        self.base_layer = base_layer
        self.oft_R = nn.ModuleDict().train(self.training)
        self.add_adapter(adapter_name, rotation, radius=radius, dropout=dropout)
        self._packing = _packing_of(base_layer)
        self._stay_differentiable(layer)

    def _stay_differentiable(self, layer: Layer) -> None:
        base: Any = layer.module
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            encoded, home = layer.read()
            now = replace(encoded.format, storage=home.storage)
            layer.write(now.kind.change_storage(encoded, now), park=False)
            # bitsandbytes' own marks of what has been packed and is not any more: Layer.read knows by them that it was
            # doubly quantised
            state: Any = base.weight.quant_state
            state.packing_format_for_cpu, state.original_nested = False, bool(home.nested_blocksize)
            base.weight.compress_statistics = state.original_nested
        base.__dict__.update(dict.fromkeys(self._packing, False))

    # --- adapters ---

    @property
    def _shape(self) -> tuple[int, int]:
        """``(out, in)`` of the canonical weight; ``(tokens, features)`` of an embedding."""
        base: Any = self.base_layer
        if isinstance(base, nn.Embedding):
            return base.num_embeddings, base.embedding_dim
        if isinstance(base, nn.Conv2d):
            return base.out_channels, base.in_channels
        if isinstance(base, nn.Linear):
            return base.out_features, base.in_features
        return base.weight.shape[1], base.weight.shape[0]  # GPT-2's Conv1D

    def add_adapter(
        self, adapter_name: str, rotation: Rotation, *, radius: float | None = None, dropout: float = 0.0
    ) -> None:
        """One more adapter, which becomes active after those that are: live, ``x · Ra · Rb``. A merged layer is
        unmerged first.

        Raises:
            StateError: the name is taken, or no name for an ``nn.ModuleDict``'s entry (empty, with a dot, ``"keys"``
            …).
            MatchError, ShapeError: the rotation does not fit.
        """
        _check_name(adapter_name)
        if adapter_name in self.oft_R:
            raise StateError(
                f"the layer has an adapter {printable(adapter_name)!r} already",
                module=self._name,
                remedy="choose another name, or delete_adapter() it first",
            )
        embedding = isinstance(self.base_layer, nn.Embedding)
        if (rotation.side == "embedding") != embedding or (embedding and rotation.scale is not None):
            raise MatchError(
                f"a rotation on the {rotation.side} side{' with a scale' if rotation.scale is not None else ''} does not go on a "
                f"{type(self.base_layer).__name__}",
                module=self._name,
                remedy="use the base model that the adapter was trained on",
            )
        rotation.check_fits(self._shape, self._name)
        self._check_chain([*self._rotations(self.active_adapters), rotation])
        weight = cast(Tensor, self.base_layer.weight)
        self.unmerge()
        device = torch.device("cpu") if weight.is_meta else weight.device
        added = LiveRotation(rotation, radius=radius, dropout=dropout, device=device)
        self.oft_R[adapter_name] = added.train(self.training)
        self.active_adapters = [*self.active_adapters, adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; a merged layer is unmerged first."""
        self._check_known([adapter_name])
        self.unmerge()
        del self.oft_R[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def set_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Make these the active adapters, in this order, and the ones that train; a merged layer is unmerged first.

        Raises:
            StateError: the layer has no such adapter, or a name is given twice.
            MatchError: an ``oft_s`` and a rotation on the output side.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        self._check_chain(self._rotations(names))
        self.unmerge()
        self.active_adapters = names
        for name, rotation in self.oft_R.items():
            rotation.requires_grad_(name in names)

    def enable_adapters(self, enabled: bool) -> None:
        """Without adapters the layer computes what its base layer does; disabling unmerges a merged layer first."""
        if not enabled:
            self.unmerge()
        self.disable_adapters = not enabled

    def _check_known(self, names: Sequence[str]) -> None:
        _check_known(names, [*self.oft_R], self._name)

    def _rotations(self, names: Sequence[str]) -> list[LiveRotation]:
        return [cast(LiveRotation, self.oft_R[name]) for name in names]

    def _check_chain(self, chain: Sequence[Rotation | LiveRotation]) -> None:
        with told_of(self._name):
            check_chain(chain)

    # --- peft's names for what it wraps ---

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    # models ask their layers for these, by which they find a dtype or device and sizes; not by __getattr__, which would
    # hide what is missing
    weight, bias = _of_base("weight"), _of_base("bias")
    in_features, out_features = _of_base("in_features"), _of_base("out_features")
    num_embeddings, embedding_dim = _of_base("num_embeddings"), _of_base("embedding_dim")
    padding_idx = _of_base("padding_idx")
    in_channels, out_channels = _of_base("in_channels"), _of_base("out_channels")
    kernel_size, stride = _of_base("kernel_size"), _of_base("stride")

    # --- forward ---

    def _chain(self) -> list[LiveRotation]:
        return [] if self.disable_adapters or self.merged else self._rotations(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        chain = self._chain()
        y = self.base_layer(self._before(x, [r for r in chain if r.side == "input"]), *args, **kwargs)
        return self._after(y, chain)

    def _before(self, x: Tensor, chain: Sequence[LiveRotation]) -> Tensor:
        if not chain:
            return x
        with torch.autocast(x.device.type, enabled=False):
            z = self._features_last(x.to(torch.promote_types(x.dtype, torch.float32)))
            for r in chain:
                z = rotations.apply_blocks(z, r.blocks().to(z))
            return self._features_back(z).to(x.dtype)

    def _after(self, y: Tensor, chain: Sequence[LiveRotation]) -> Tensor:
        if not any(r.side != "input" or r.scale is not None for r in chain):
            return y
        with torch.autocast(y.device.type, enabled=False):
            z = self._features_last(y.to(torch.promote_types(y.dtype, torch.float32)))
            bias = self._loaded_bias()
            if bias is not None:
                bias = bias.to(z)
                z = z - bias  # these dialects rotate and scale what comes before the bias
            for r in [r for r in chain if r.side != "input"]:
                z = _apply_cropped(z, r.blocks().to(z))
            for r in chain:
                z = z if r.scale is None else z * r.scale.to(z)
            if bias is not None:
                z = z + bias
            return self._features_back(z).to(y.dtype)

    def _loaded_bias(self) -> Tensor | None:
        bias = cast("Tensor | None", getattr(self.base_layer, "bias", None))
        return offloaded(self.base_layer, "bias") if bias is not None and bias.is_meta else bias

    def _features_last(self, x: Tensor) -> Tensor:  # (…, channels, height, width)
        return x.movedim(-3, -1) if isinstance(self.base_layer, nn.Conv2d) else x

    def _features_back(self, x: Tensor) -> Tensor:
        return x.movedim(-1, -3) if isinstance(self.base_layer, nn.Conv2d) else x

    # --- merge ---

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> float:  # noqa: ARG002
        """Fold adapters into the base layer's weight, in its own format; forward then rotates nothing more.

        The weight that was there waits in CPU memory, whole, for :meth:`unmerge`. Merging what is merged already
        changes nothing.

        Args:
            safe_merge: as in peft, refuse NaN and infinity and leave the layer as it was. Every merge does, whatever is
                given here.
            adapter_names: in the live order; None for the active ones.

        Returns:
            the relative (Frobenius) error that storing the rotated weight added; 0 in float32.

        Raises:
            NonFiniteError: NaN or infinity in the generator, the weight or the result.
            StateError: other adapters are merged, the adapters are disabled, or a name is unknown.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._check_known(names)
        if self.disable_adapters:
            raise StateError(
                "the layer's adapters are disabled", module=self._name, remedy="enable_adapters(True) first"
            )
        if not names or names == self.merged_adapters:
            return 0.0
        if self.merged:
            raise StateError(
                f"{', '.join(map(printable, self.merged_adapters))} is merged already, and {', '.join(map(printable, names))} was asked for",
                module=self._name,
                remedy="unmerge() first, then merge all of them at once: merge(adapter_names=[…])",
            )
        layer = Layer(self._name, self.base_layer)
        with told_of(self._name):
            encoded, home = layer.read()
            folded = fold_encoded(encoded, [r.rotation() for r in self._rotations(names)], home, "preserve")
        self._held, self.merged_adapters = layer.write(folded.encoded, park=not self._shared), names
        return folded.error

    def unmerge(self) -> None:
        """Put back what :meth:`merge` replaced, bit for bit and as the same Parameter; nothing where nothing is merged."""
        if self._held is not None:
            self._held.put_back(self.base_layer)
            self._held, self.merged_adapters = None, []

    # --- state_dict ---

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "merged"] = torch.ones((), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise StateError(
                "a state_dict does not load into a merged layer", module=self._name, remedy="unmerge() first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        state = ", disabled" if self.disable_adapters else f", merged={self.merged_adapters}" if self.merged else ""
        return f"active={self.active_adapters}{state}"


class Linear4bit(LiveLayer):
    """Live layer over :class:`bitsandbytes.nn.Linear4bit` (NF4, FP4)."""


class Linear8bitLt(LiveLayer):
    """Live layer over :class:`bitsandbytes.nn.Linear8bitLt`."""


class Linear(LiveLayer):
    """Live layer over an unquantised one: :class:`torch.nn.Linear`, transformers' ``Conv1D``, a 1×1
    :class:`torch.nn.Conv2d`.
    """


class Embedding(LiveLayer):
    """Live layer over :class:`torch.nn.Embedding` and bitsandbytes' quantised ones: rotates the embeddings that it
    looks up.
    """


def _class_for(layer: Layer) -> type[LiveLayer]:
    if layer.kind == "embedding":
        return Embedding
    bnb = layer.bitsandbytes
    return Linear if bnb is None else {"4-bit": Linear4bit, "int8": Linear8bitLt}[bnb.width]


def _apply_cropped(y: Tensor, blocks: Tensor) -> Tensor:
    """``y · blockdiag(blocks)``, the matrix cropped to ``y``'s features as peft ≤ 0.13 does: its other rows meet zeros."""
    features, b = y.shape[-1], blocks.shape[-1]
    needed = -(-features // b)
    padded = nn.functional.pad(y, (0, needed * b - features))
    return rotations.apply_blocks(padded, blocks[:needed])[..., :features]


def _check_name(adapter_name: object) -> None:
    if not isinstance(adapter_name, str):
        message = f"an adapter's name is a string, not a {type(adapter_name).__name__}"
        raise StateError(message, remedy="adapter_name='default'")
    message = f"an adapter cannot be named {printable(adapter_name)!r}"
    if not adapter_name or "." in adapter_name:
        raise StateError(message, remedy="a name without dots, as it becomes part of a state_dict's keys")
    if hasattr(nn.ModuleDict(), adapter_name):
        message = f"{message}, an attribute of torch.nn.ModuleDict, which holds it"
        raise StateError(message, remedy="choose another name")


# --- models -----------------------------------------------------------------------------------------------------------

_ATTRIBUTE = "_oftsurgery_live"


@dataclass(frozen=True)
class _Origin:
    """What a wrapped adapter came with beside its rotations."""

    config: dict[str, Any]
    dialect: str
    saved: Mapping[str, str]  # {name of a tensor that it brought: content hash of what was there before}


def _origins(model: nn.Module) -> dict[str, _Origin]:
    return dict(inner_model(model).__dict__.get(_ATTRIBUTE, {}))


def original_hashes(model: nn.Module) -> dict[str, str]:
    """``{tensor name: content hash of the base model's values}`` of all tensors that wrapped adapters brought
    themselves.

    To be asked before :func:`strip` or :func:`unwrap`; empty where the model is not wrapped.
    """
    return {name: before for origin in _origins(model).values() for name, before in origin.saved.items()}


def live_layers(model: nn.Module) -> dict[str, LiveLayer]:
    """``{path: LiveLayer}`` of a model; each layer once, under the path at which it was wrapped."""
    found: dict[LiveLayer, list[str]] = {}
    for path, module in modules_of(model).items():
        if isinstance(module, LiveLayer):
            found.setdefault(module, []).append(path)
    return {layer.path if layer.path in paths else paths[0]: layer for layer, paths in found.items()}


def wrap_model(
    model: nn.Module,
    adapters: OFTAdapter | Mapping[str, OFTAdapter],
    *,
    adapter_name: str = "default",
    inplace: bool = False,
) -> nn.Module:
    """Put live, trainable layers in place of those that an adapter targets; all or nothing.

    What trains afterwards is the adapter: its generators (and ``oft_s``) and the tensors that it saved itself (biases,
    ``modules_to_save``), which replace the model's own, whichever adapters are active. Everything else is frozen, since
    a pure wrap shares it with ``model``.

    Args:
        model: plain, or wrapped already: the adapter then joins those that are there, active after them.
        adapters: one, or several by name: live, ``x · Ra · Rb`` in this order.
        adapter_name: of a single one.
        inplace: change ``model`` itself. Otherwise the result is a new model that shares every tensor that it does not
            train.

    Raises:
        MatchError, ShapeError, FormatError, StateError: as :func:`oftsurgery.fold` raises them.
        StateError: also where a name is taken or a layer is merged.
        After any error the model is as it was.
    """
    named = {adapter_name: adapters} if isinstance(adapters, OFTAdapter) else dict(adapters)
    for name in named:
        _check_name(name)
    if peft_live.has_live_layers(inner_model(model)):
        raise StateError(
            "the model carries live peft layers already",
            remedy="wrap the plain base model, or use the peft model as it is",
        )
    with transaction() as journal:
        work = model if inplace else share_model(model)
        before = live_layers(work)
        origins = _origins(work)
        taken = [name for name in named if any(name in layer.oft_R for layer in before.values())]
        if taken:
            raise StateError(
                f"the model has a live adapter {printable(taken[0])!r} already", remedy="choose another adapter_name"
            )
        _refuse_merged(before)
        swap_modules(work, {id(layer): layer.base_layer for layer in before.values()}, journal)
        store = LiveStore(work)
        named = {name: in_names_of(store, adapter) for name, adapter in named.items()}
        plan = plan_changes(store, list(named.values()))
        ties = store.ties
        layers = {layer.base_layer: layer for layer in before.values()}
        twins = _separate(store.modules, [change.path for change in plan.rotate], layers, journal)
        modules = modules_of(work)
        for name, adapter in named.items():
            for path, rotation in adapter.modules.items():
                if path in plan.idle:
                    continue
                base = modules[path]
                radius = _radius(adapter, rotation)
                if base in layers:
                    layers[base].add_adapter(name, rotation, radius=radius)
                    journal.append(partial(layers[base].delete_adapter, name))
                else:
                    # LiveLayer lays a repacked 4-bit weight out anew, and switches the repacking off
                    journal.append(partial(Held.of(base).put_back, base))
                    journal.append(partial(base.__dict__.update, _packing_of(base)))
                    layers[base] = _class_for(Layer(path, base))(
                        base, name, rotation, radius=radius, path=path, shared=len(ties.group(f"{path}.weight")) > 1
                    )
                    layers[base]._twin = twins.get(base)
        hashes = _bring(plan, store, origins, journal)
        for name, adapter in named.items():
            saved = {key: hashes[key] for key in adapter.saved}
            origins[name] = _Origin(dict(adapter.config), adapter.dialect, saved)
        _freeze(modules, {name for origin in origins.values() for name in origin.saved}, journal)
        swap_modules(work, {id(base): layer for base, layer in layers.items()}, journal)
        _leave_fast_paths(work, journal)
        inner_model(work).__dict__[_ATTRIBUTE] = origins
        warn_of_idle(plan)
    return work


def _bring(plan: FoldPlan, store: LiveStore, origins: Mapping[str, _Origin], journal: list[Undo]) -> dict[str, str]:
    """Put the adapters' own tensors in place; returns the content hashes of what was there."""
    hashes: dict[str, str] = {}
    for change in plan.replace:
        if any(change.name in origin.saved for origin in origins.values()):
            raise MatchError(
                "two adapters bring their own values for one tensor",
                tensor=change.name,
                remedy="wrap one of them alone",
            )
        old = store.tensor(change.name)
        replace_tensor(store.modules, change, journal)
        hashes |= {name: hash_tensors({name: old}) for name in change.places if old is not None}
    return hashes


def _refuse_merged(layers: Mapping[str, LiveLayer]) -> None:
    for path, layer in layers.items():
        if layer.merged:
            raise StateError(
                f"{', '.join(map(printable, layer.merged_adapters))} is merged into this layer",
                module=path,
                remedy="live.unmerge(model) first",
            )


def _separate(
    modules: dict[str, nn.Module], paths: Iterable[str], live: Collection[nn.Module], journal: list[Undo]
) -> dict[nn.Module, tuple[nn.Module]]:
    """Give each path's layer, where it stands under several names, a module of its own over the same tensors, for peft
    makes the named place alone live. Returns ``{new module: (the one that it stands for,)}``; shared parents stay shared.
    """
    twins = {}
    for path in paths:
        base = modules[path]
        if base not in live:
            separate_module(modules, path, journal)
        if modules[path] is not base:
            twins[modules[path]] = (base,)
    return twins


#: attributes by which torch's encoders and their layers take fused kernels, which read weights and never call the layers
#: that hold them, and the values for no; an encoder makes nested tensors, which its layers take on the fast path alone
_SLOW: Mapping[str, Any] = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}
_FAST = "_oftsurgery_fast_path"


def _leave_fast_paths(model: nn.Module, journal: list[Undo]) -> None:
    """Have torch's transformer encoders call their layers where one of these is live."""
    for module in model.modules():
        encoder = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder))
        if encoder and _FAST not in module.__dict__ and any(isinstance(m, LiveLayer) for m in module.modules()):
            journal.append(partial(_take_fast_path, module))
            _leave_fast_path(module)


def _leave_fast_path(encoder: nn.Module) -> None:
    fast = {name: encoder.__dict__[name] for name in _SLOW if name in encoder.__dict__}
    encoder.__dict__.update({_FAST: fast, **{name: _SLOW[name] for name in fast}})


def _take_fast_path(encoder: nn.Module) -> None:
    encoder.__dict__.update(encoder.__dict__.pop(_FAST, {}))


def _packing_of(base: nn.Module) -> dict[str, bool]:
    """bitsandbytes' switch of the repacking of 4-bit weights at CPU eval forwards, where the layer has one."""
    return {name: value for name, value in base.__dict__.items() if name == "support_avx512bf16_for_cpu"}


def _freeze(modules: Mapping[str, nn.Module], trained: set[str], journal: list[Undo]) -> None:
    """Let nothing train but the tensors named; the live layers' own are not in ``modules`` yet."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            wanted = f"{path}.{name}".lstrip(".") in trained
            if parameter is not None and parameter.requires_grad != wanted and parameter.is_floating_point():
                journal.append(partial(setattr, parameter, "requires_grad", not wanted))
                parameter.requires_grad_(wanted)


def _radius(adapter: OFTAdapter, rotation: Rotation) -> float | None:
    """COFT's bound of ``‖Q‖_F`` a block, by the adapter's dialect; None without COFT."""
    rows, width = rotation.generator.shape[0], 1
    if adapter.dialect in ("peft-0.13", "peft-0.15"):
        width = rotation.block_size if rotation.scale is None else -(-rotation.scale.shape[0] // rows)
    return coft_radius(adapter.config, rows, width)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of a wrapped model's active adapters in the live order.

    Raises:
        StateError: the model is not wrapped, or its layers disagree.
    """
    layers = _wrapped(model)
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters))
    for path, layer in layers.items():
        if layer.active_adapters != [name for name in names if name in layer.oft_R]:
            raise StateError(
                "the model's layers have different active adapters",
                module=path,
                remedy="live.set_adapter(model, ['a', 'b'])",
            )
    return names


def set_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Make these the active adapters of all of a wrapped model's layers, in this order; merged layers are unmerged
    first.

    Raises:
        StateError: the model has no such adapter, or a name is given twice.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    layers = _wrapped(model)
    _check_known(names, _names_in(layers))
    wanted = {path: [name for name in names if name in layer.oft_R] for path, layer in layers.items()}
    for path, layer in layers.items():
        layer._check_chain(layer._rotations(wanted[path]))
    for path, layer in layers.items():
        layer.set_adapter(wanted[path])


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """:meth:`LiveLayer.enable_adapters` of all layers of a wrapped model."""
    for layer in _wrapped(model).values():
        layer.enable_adapters(enabled)


def merge(model: nn.Module, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> dict[str, float]:
    """:meth:`LiveLayer.merge` of all layers of a wrapped model, all or nothing.

    Returns:
        ``{path: relative error of storing the merged weight}``.
    """
    layers = _wrapped(model)
    if adapter_names is not None:
        _check_known(adapter_names, _names_in(layers))
    errors: dict[str, float] = {}
    with transaction() as journal:
        for path, layer in layers.items():
            if not layer.merged:
                journal.append(layer.unmerge)
            errors[path] = layer.merge(
                safe_merge, None if adapter_names is None else [name for name in adapter_names if name in layer.oft_R]
            )
    return errors


def unmerge(model: nn.Module) -> None:
    """:meth:`LiveLayer.unmerge` of all layers of a wrapped model: bit-exact."""
    for layer in _wrapped(model).values():
        layer.unmerge()


def adapter_of(model: nn.Module, adapter_name: str | None = None) -> OFTAdapter:
    """A live adapter as it is now, trained or not: to fold it into the base model.

    Args:
        model: wrapped.
        adapter_name: may be left out where there is one alone.

    Raises:
        StateError: the model is not wrapped, or has no such adapter.
    """
    layers = _wrapped(model)
    names = _names_in(layers)
    if adapter_name is None:
        if len(names) != 1:
            raise StateError(
                "the model has several live adapters", remedy=f"name one: {', '.join(map(printable, names))}"
            )
        adapter_name = names[0]
    _check_known([adapter_name], names)
    origin = _origins(model).get(adapter_name, _Origin({}, "peft-0.21", {}))
    modules = modules_of(model)
    saved: dict[str, Tensor] = {}
    for name in origin.saved:
        path, _, local = name.rpartition(".")
        saved[name] = getattr(modules[path], local).detach().clone()
    rotations_ = {
        path: cast(LiveRotation, layer.oft_R[adapter_name]).rotation()
        for path, layer in layers.items()
        if adapter_name in layer.oft_R
    }
    return OFTAdapter(
        rotations_, saved, dialect=origin.dialect, config=origin.config, source=f"live adapter {adapter_name!r}"
    )


def read_live(model: nn.Module) -> list[OFTAdapter]:
    """The active adapters as they are now, in the live order: ``fold(base, read_live(live))`` computes what the wrapped
    model does.

    Raises:
        StateError: the model is not wrapped, its adapters are disabled, or none is active.
    """
    for path, layer in _wrapped(model).items():
        if layer.disable_adapters:
            raise StateError(
                "the adapters are disabled: the model computes the base",
                module=path,
                remedy="live.enable_adapters(model, True) first",
            )
    names = active_adapters(model)
    if not names:
        raise StateError("the model has no active adapter", remedy="live.set_adapter(model, 'name') first")
    return [adapter_of(model, name) for name in names]


def strip(model: nn.Module) -> list[Undo]:
    """Put the base layers back in place of the live ones, in ``model`` itself; tensors that an adapter brought itself
    stay.

    Returns:
        what undoes it, to be called in reverse order.

    Raises:
        StateError: a layer is merged, or the model is not wrapped.
    """
    layers, inner = _wrapped(model), inner_model(model)
    _refuse_merged(layers)
    journal: list[Undo] = []
    bases = {id(layer): layer._twin[0] if layer._twin else layer.base_layer for layer in layers.values()}
    swap_modules(inner, bases, journal)
    for module in inner.modules():
        if _FAST in module.__dict__:
            _take_fast_path(module)
            journal.append(partial(_leave_fast_path, module))
    for layer in layers.values():
        base = layer.base_layer.__dict__
        journal.append(partial(base.update, dict.fromkeys(layer._packing, False)))
        base.update(layer._packing)
    origins = inner.__dict__.pop(_ATTRIBUTE, {})
    journal.append(partial(inner.__dict__.update, {_ATTRIBUTE: origins}))
    return journal


def unwrap(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model without its live layers, but with the biases and heads that an adapter brought; frozen, as
    :func:`wrap_model` left it.

    Raises:
        StateError: a layer is merged, or the model is not wrapped.
    """
    work = model if inplace else share_model(model)
    strip(work)
    return work


def _wrapped(model: nn.Module) -> dict[str, LiveLayer]:
    layers = live_layers(model)
    if not layers:
        raise StateError(
            "the model carries no live layer of oftsurgery", remedy="oftsurgery.wrap(model, adapter) first"
        )
    return layers


def _names_in(layers: Mapping[str, LiveLayer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.oft_R))


def _check_known(names: Sequence[str], known: Collection[str], module: str | None = None) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise StateError(
            f"the {'layer has no' if module else 'model has no live'} adapter {', '.join(map(printable, unknown))}",
            module=module,
            remedy=f"it has {', '.join(map(printable, known)) or 'none'}",
        )
    if len(set(names)) < len(names):
        raise StateError("an adapter is named twice", module=module, remedy="name each adapter once")


# --- dispatchers ------------------------------------------------------------------------------------------------------

#: an adapter's settings, with the defaults that peft 0.16 to 0.20 gave its bitsandbytes layers
_SETTINGS: Mapping[str, Any] = {
    "r": 8,
    "oft_block_size": 0,
    "module_dropout": 0.0,
    "coft": False,
    "eps": 6e-5,
    "block_share": False,
    "init_weights": True,
    "use_cayley_neumann": False,
    "num_cayley_neumann_terms": 5,
}
#: those of them that are finite numbers: of which kind, between what, and in words
_NUMBERS: Mapping[str, tuple[type[Any], float, float, str]] = {
    "r": (numbers.Integral, -math.inf, math.inf, "whole number"),
    "oft_block_size": (numbers.Integral, -math.inf, math.inf, "whole number"),
    "module_dropout": (numbers.Real, 0, 1, "number from 0 to 1"),
    "eps": (numbers.Real, 0, math.inf, "number of at least 0"),
    "num_cayley_neumann_terms": (numbers.Integral, 0, 1000, "whole number from 0 to 1000"),
}
#: what peft passes to every dispatcher and bitsandbytes layers have no use for
_IGNORED = {
    "loaded_in_4bit",
    "loaded_in_8bit",
    "fan_in_fan_out",
    "is_target_conv_1d_layer",
    "device_map",
    "get_apply_tensor_subclass",
}
_IGNORED |= {f"{method}_quantization_config" for method in ("gptq", "aqlm", "awq")}


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, **kw: Any) -> Linear8bitLt | None:
    """The live layer over ``target``, or None where ``target`` is no :class:`bitsandbytes.nn.Linear8bitLt`.

    Args:
        target: the layer to wrap; or a live one over such a layer, which gets the adapter and is returned.
        adapter_name: of the adapter.
        **kw: ``rotation=Rotation``; or the settings of a new adapter as peft 0.16 to 0.20 passed them: ``config`` (or
            ``oft_config``; an ``OFTConfig`` or a dict), ``r``, ``oft_block_size``, ``coft``, ``eps``, ``block_share``,
            ``use_cayley_neumann``, ``num_cayley_neumann_terms``, ``init_weights`` and ``module_dropout``; what is given
            by itself goes before the config's. ``loaded_in_8bit=False`` gives None.

    Raises:
        AdapterError: unknown or contradicting settings.
        MatchError, ShapeError: the rotation does not fit.
    """
    return cast("Linear8bitLt | None", _dispatch(Linear8bitLt, "loaded_in_8bit", target, adapter_name, kw))


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, **kw: Any) -> Linear4bit | None:
    """:func:`dispatch_bnb_8bit` for :class:`bitsandbytes.nn.Linear4bit`; ``loaded_in_4bit=False`` gives None."""
    return cast("Linear4bit | None", _dispatch(Linear4bit, "loaded_in_4bit", target, adapter_name, kw))


def _dispatch(
    cls: type[LiveLayer], loaded: str, target: nn.Module, adapter_name: str, kw: Mapping[str, Any]
) -> LiveLayer | None:
    base = target.base_layer if isinstance(target, LiveLayer) else target
    layer = Layer(type(base).__name__, base)
    if not isinstance(base, nn.Linear) or not kw.get(loaded, True) or _class_for(layer) is not cls:
        return None
    rotation, radius, dropout = _from_settings(kw, base.in_features)
    if isinstance(target, LiveLayer):
        target.add_adapter(adapter_name, rotation, radius=radius, dropout=dropout)
        return target
    return cls(base, adapter_name, rotation, radius=radius, dropout=dropout)


def _from_settings(kw: Mapping[str, Any], features: int) -> tuple[Rotation, float | None, float]:
    """(rotation, COFT radius, dropout) of a new adapter."""
    own = {k: v for k, v in kw.items() if k not in _IGNORED}
    configs = own.pop("config", None), own.pop("oft_config", None)
    config = next((c for c in configs if c is not None), None)
    rotation = own.pop("rotation", None)
    unknown = sorted(set(own) - set(_SETTINGS))
    if unknown:
        raise AdapterError(
            f"unknown settings {', '.join(map(printable, unknown))}",
            remedy=f"rotation, config, or some of {', '.join(_SETTINGS)}",
        )
    if rotation is not None:
        if own or config is not None:
            raise AdapterError("a rotation and the settings of a new one were given", remedy="give rotation=… alone")
        if not isinstance(rotation, Rotation):
            raise AdapterError(f"rotation is a {type(rotation).__name__}", remedy="give an oftsurgery.Rotation")
        return rotation, None, 0.0
    given = config if isinstance(config, Mapping) else {k: getattr(config, k) for k in _SETTINGS if hasattr(config, k)}
    s = {**_SETTINGS, **{k: v for k, v in given.items() if k in _SETTINGS}, **own}
    if "r" not in own and "r" not in given and s["oft_block_size"]:
        s["r"] = 0
    for name, value in s.items():
        if name != "num_cayley_neumann_terms" or s["use_cayley_neumann"]:
            _check_setting(name, value)
    b = _block_size(s["r"], s["oft_block_size"], features)
    rows, elements = 1 if s["block_share"] else features // b, b * (b - 1) // 2
    generator = torch.zeros(rows, elements) if s["init_weights"] else 0.1 * torch.randn(rows, elements)
    cayley = Cayley(s["num_cayley_neumann_terms"]) if s["use_cayley_neumann"] else Cayley()
    return Rotation(generator, cayley), coft_radius(s, rows), float(s["module_dropout"])


def _check_setting(name: str, value: Any) -> None:
    if name in _NUMBERS:
        kind, least, most, what = _NUMBERS[name]
        right = not isinstance(value, bool) and isinstance(value, kind)
        right, what = right and least <= value <= most and math.isfinite(value), f"is no {what}"
    else:
        right, what = isinstance(value, bool), "is neither True nor False"
    if not right:
        remedy = "True starts at the identity" if name == "init_weights" else f"peft's default is {_SETTINGS[name]}"
        raise AdapterError(f"{name} = {printable(value)!r} {what}", remedy=remedy)


def _block_size(r: int, oft_block_size: int, features: int) -> int:
    """Of ``features`` in ``r`` blocks or in blocks of ``oft_block_size``; what does not divide is adjusted to the
    nearest that does, as peft does.
    """
    if (r > 0) == (oft_block_size > 0) or min(r, oft_block_size) < 0:
        raise AdapterError(
            f"r = {r} and oft_block_size = {oft_block_size}: one must be positive, the other 0",
            remedy="give oft_block_size alone",
        )
    wanted, name = (r, "r") if r else (oft_block_size, "oft_block_size")
    fitting = [n for n in range(1, features + 1) if features % n == 0]
    nearest = min(fitting, key=lambda n: (abs(n - wanted), n))
    if nearest != wanted:
        warn_caller(f"Invalid `{name}` ({wanted})! Adjusted `{name}` to ({nearest}).", UserWarning)
    b = features // nearest if r else nearest
    if b < 2:
        raise AdapterError(
            f"blocks of size 1 rotate nothing ({name} = {wanted}, {features} features)",
            remedy="give a larger oft_block_size",
        )
    return b
