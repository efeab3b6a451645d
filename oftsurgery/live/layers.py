"""A live layer keeps the rotation beside the weight: the rotation trains, merges and is unmerged bit-exactly.

The forward of a :class:`LiveLayer` computes ``y = (x R) Wᵀ + bias`` by blocks (legacy dialects: ``((x Wᵀ) R) ⊙ s + bias``;
embeddings: ``E[i] R``), in float32 or better whatever the dtype or autocast state around it, and returns the dtype that the
base layer returns. Gradients reach the generators, through bitsandbytes layers too.

Keys of a wrapped model's ``state_dict``, for a layer at ``<path>``:

=============================  =====================================================================================================================
``<path>.base_layer.*``        the base layer's own keys
``<path>.oft_R.<name>.weight`` generator of adapter ``<name>``, ``(n, b(b-1)/2)`` float32, trainable (peft's key, except
for embeddings)
``<path>.oft_R.<name>.scale``  ``(out,)`` float32, trainable; only the ``oft_s`` of peft 0.14 and 0.15
``<path>.merged``              only while merged, so that a merged state does not load into a layer that would rotate once more
=============================  =====================================================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.errors import FormatError, MatchError, StateError, module_in_errors, printable
from oftsurgery.stores.layers import Layer, ReplacedWeight, offloaded
from oftsurgery.weights.fold import check_chain, fold_encoded

from .rotation import LiveRotation


def _of_base(name: str) -> Any:
    return property(lambda live: getattr(live.base_layer, name), doc=f"The base layer's ``{name}``.")


class LiveLayer(nn.Module):
    """A base layer and the rotations of one or more named adapters; the subclasses below differ in the base layers that
    they take.

    Attributes:
        base_layer: the layer that was wrapped, its weight untouched until :meth:`merge`.
        oft_R: ``{adapter name: LiveRotation}``.
        active_adapters: names of the active adapters in the live order: ``[a, b]`` computes ``x · Ra · Rb``.
        merged_adapters: names of the adapters that are merged into the base layer's weight, in the same order.
        disable_adapters: see :meth:`enable_adapters`.
        path: path of the layer in its model, for messages.

    Args:
        base_layer: a layer that the subclass takes. On a bitsandbytes 4-bit layer, ``support_avx512bf16_for_cpu`` is
            switched off and a weight that a CPU forward has repacked gets its old layout: bitsandbytes computes no
            gradients through a repacked weight.
        adapter_name: name of the first adapter, which becomes active.
        rotation: rotation of the first adapter.
        radius, dropout: see :class:`LiveRotation`.
        shared: whether other modules use the base layer's Parameter too; a merge must then not move it to the CPU.

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
        meant = class_for(layer)
        if not isinstance(self, meant):
            message = f"live.{type(self).__name__} does not take a {type(base_layer).__name__}"
            raise FormatError(message, module=self._name, remedy=f"use live.{meant.__name__} for this layer")
        self._shared = shared
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self._replaced: ReplacedWeight | None = None
        # the module that other places of the model hold, and that the base layer replaces in this place
        self._stands_for: tuple[nn.Module] | None = None
        self.merged_adapters: list[str] = []
        self.base_layer = base_layer
        self.oft_R = nn.ModuleDict().train(self.training)
        self.add_adapter(adapter_name, rotation, radius=radius, dropout=dropout)
        self._repacking_switch = repacking_switch_of(base_layer)
        self._undo_repacking(layer)

    def _undo_repacking(self, layer: Layer) -> None:
        """Take back the repacking of the weight by a forward on the CPU."""
        base: Any = layer.module
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            encoded, home = layer.read()
            now = replace(encoded.format, storage=home.storage)
            layer.write(now.kind.change_storage(encoded, now), park=False)
            # bitsandbytes marks a weight that was packed before in the same way; from these marks Layer.read sees that the
            # weight was doubly quantised
            state: Any = base.weight.quant_state
            state.packing_format_for_cpu, state.original_nested = False, bool(home.nested_blocksize)
            base.weight.compress_statistics = state.original_nested
        base.__dict__.update(dict.fromkeys(self._repacking_switch, False))

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
        """Add an adapter, which becomes active after the active adapters: ``x · Ra · Rb``. A merged layer is unmerged
        first.

        Raises:
            StateError: the name is taken, or ``nn.ModuleDict`` does not take the name (empty, with a dot, ``"keys"`` …).
            MatchError, ShapeError: the rotation does not fit.
        """
        check_name(adapter_name)
        if adapter_name in self.oft_R:
            message = f"the layer has an adapter {printable(adapter_name)!r} already"
            remedy = f"choose another name, or call delete_adapter({printable(adapter_name)!r}) first"
            raise StateError(message, module=self._name, remedy=remedy)
        embedding = isinstance(self.base_layer, nn.Embedding)
        if (rotation.side == "embedding") != embedding or (embedding and rotation.scale is not None):
            scaled = " with a scale" if rotation.scale is not None else ""
            place = f"the {rotation.side} side{scaled}"
            message = f"a {type(self.base_layer).__name__} does not take a rotation on {place}"
            remedy = "use the base model that the adapter was trained on"
            raise MatchError(message, module=self._name, remedy=remedy)
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
        """Make these adapters the active and trainable ones, in this order; a merged layer is unmerged first.

        Raises:
            StateError: the layer has no such adapter, or a name is given twice.
            MatchError: the adapters combine an ``oft_s`` with a rotation on the output side.
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
        check_known(names, [*self.oft_R], self._name)

    def _rotations(self, names: Sequence[str]) -> list[LiveRotation]:
        return [cast(LiveRotation, self.oft_R[name]) for name in names]

    def _check_chain(self, chain: Sequence[Rotation | LiveRotation]) -> None:
        with module_in_errors(self._name):
            check_chain(chain)

    # --- peft's names for the wrapped layer ---

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    # models read these attributes of their layers to find a dtype, a device and sizes; __getattr__ would hide the error
    # where one is missing
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
        """Rotate the inputs ``x``."""
        if not chain:
            return x
        with torch.autocast(x.device.type, enabled=False):
            z = self._features_last(x.to(torch.promote_types(x.dtype, torch.float32)))
            for r in chain:
                z = rotations.apply_blocks(z, r.blocks().to(z))
            return self._features_back(z).to(x.dtype)

    def _after(self, y: Tensor, chain: Sequence[LiveRotation]) -> Tensor:
        """Rotate and scale the outputs ``y``, if a rotation of the chain has that side or a scale."""
        if not any(r.side != "input" or r.scale is not None for r in chain):
            return y
        with torch.autocast(y.device.type, enabled=False):
            z = self._features_last(y.to(torch.promote_types(y.dtype, torch.float32)))
            bias = self._loaded_bias()
            if bias is not None:
                bias = bias.to(z)
                z = z - bias  # these dialects rotate and scale the output before the bias is added
            for r in [r for r in chain if r.side != "input"]:
                z = _apply_cropped_blocks(z, r.blocks().to(z))
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
        """Fold adapters into the base layer's weight, in its own format; the forward then applies no rotation.

        The old weight stays in CPU memory for :meth:`unmerge`. Merging the adapters that are merged already changes
        nothing.

        Args:
            safe_merge: peft's flag for the refusal of NaN and infinity. Every merge here refuses them and leaves the
                layer unchanged, whatever the flag says.
            adapter_names: names of the adapters in the live order; None for the active ones.

        Returns:
            the relative (Frobenius) error that storing the rotated weight added; 0 in float32.

        Raises:
            NonFiniteError: the generator, the weight or the result holds NaN or infinity.
            StateError: other adapters are merged, the adapters are disabled, or a name is unknown.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._check_known(names)
        if self.disable_adapters:
            message = "the layer's adapters are disabled"
            raise StateError(message, module=self._name, remedy="call enable_adapters(True) first")
        if not names or names == self.merged_adapters:
            return 0.0
        if self.merged:
            merged, wanted = (", ".join(map(printable, given)) for given in (self.merged_adapters, names))
            message = f"the layer has merged the adapters {merged}, and cannot also merge {wanted}"
            remedy = "call unmerge() first, then merge all adapters at once: merge(adapter_names=[…])"
            raise StateError(message, module=self._name, remedy=remedy)
        layer = Layer(self._name, self.base_layer)
        with module_in_errors(self._name):
            encoded, home = layer.read()
            folded = fold_encoded(encoded, [r.rotation() for r in self._rotations(names)], home, "preserve")
        self._replaced, self.merged_adapters = layer.write(folded.encoded, park=not self._shared), names
        return folded.error

    def unmerge(self) -> None:
        """Put back the weight that :meth:`merge` replaced, bit for bit and as the same Parameter; an unmerged layer stays."""
        if self._replaced is not None:
            self._replaced.put_back(self.base_layer)
            self._replaced, self.merged_adapters = None, []

    # --- state_dict ---

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "merged"] = torch.ones((), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            message = "a state_dict does not load into a merged layer"
            raise StateError(message, module=self._name, remedy="call unmerge() first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        state = ", disabled" if self.disable_adapters else f", merged={self.merged_adapters}" if self.merged else ""
        return f"active={self.active_adapters}{state}"


class Linear4bit(LiveLayer):
    """Live layer over :class:`bitsandbytes.nn.Linear4bit` (NF4, FP4)."""


class Linear8bitLt(LiveLayer):
    """Live layer over :class:`bitsandbytes.nn.Linear8bitLt`."""


class Linear(LiveLayer):
    """Live layer over :class:`torch.nn.Linear`, transformers' ``Conv1D`` or a 1×1 :class:`torch.nn.Conv2d`."""


class Embedding(LiveLayer):
    """Live layer over :class:`torch.nn.Embedding` or bitsandbytes' quantised embeddings; it rotates the embeddings."""


def class_for(layer: Layer) -> type[LiveLayer]:
    if layer.kind == "embedding":
        return Embedding
    bnb = layer.bitsandbytes
    return Linear if bnb is None else {"4-bit": Linear4bit, "int8": Linear8bitLt}[bnb.width]


def _apply_cropped_blocks(y: Tensor, blocks: Tensor) -> Tensor:
    """``y · blockdiag(blocks)`` with the matrix cropped to ``y``'s features as in peft ≤ 0.13; its other rows meet zeros."""
    features, b = y.shape[-1], blocks.shape[-1]
    needed = -(-features // b)
    padded = nn.functional.pad(y, (0, needed * b - features))
    return rotations.apply_blocks(padded, blocks[:needed])[..., :features]


def check_name(adapter_name: object) -> None:
    if not isinstance(adapter_name, str):
        message = f"an adapter's name is a string, not a {type(adapter_name).__name__}"
        raise StateError(message, remedy="give a string, as in adapter_name='default'")
    message = f"an adapter cannot be named {printable(adapter_name)!r}"
    if not adapter_name or "." in adapter_name:
        remedy = "choose a name without dots: the name becomes a part of a state_dict's keys"
        raise StateError(message, remedy=remedy)
    if hasattr(nn.ModuleDict(), adapter_name):
        message = f"{message}: torch.nn.ModuleDict, which holds adapters by name, has an attribute of this name"
        raise StateError(message, remedy="choose another name")


def repacking_switch_of(base: nn.Module) -> dict[str, bool]:
    """bitsandbytes' switch for the repacking of 4-bit weights in CPU eval forwards; empty for a layer without the switch."""
    return {name: value for name, value in base.__dict__.items() if name == "support_avx512bf16_for_cpu"}


def check_known(names: Sequence[str], known: Collection[str], module: str | None = None) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        lacking = "layer has no" if module else "model has no live"
        message = f"the {lacking} adapter {', '.join(map(printable, unknown))}"
        remedy = f"name one of {', '.join(map(printable, known))}" if known else "add an adapter first"
        raise StateError(message, module=module, remedy=remedy)
    if len(set(names)) < len(names):
        message = f"an adapter is named twice: {', '.join(map(printable, names))}"
        raise StateError(message, module=module, remedy="name each adapter once")
