"""Adapters of image tools in other tools' form: as LyCORIS stores them, and so that ComfyUI and the web UI compute what the trainer
computed.

Both forms hold generators that are limited already, with an alpha of 0 (no limit). ComfyUI ignores the scale of diag-oft, so a
scaled diag-oft becomes a BOFT of one factor, whose scale ComfyUI applies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, MatchError, module_in_errors

from .boft import LycorisBoft
from .output_blocks import FluxParts, OutputBlocks, checked_scale
from .rotation import Rotation
from .strength import AtStrength
from .weight_map import WeightMap

if TYPE_CHECKING:
    from .adapter import OFTAdapter

ImageForm = Literal["lycoris", "comfyui"]
FORMS: tuple[ImageForm, ...] = ("lycoris", "comfyui")

_DENOISER = re.compile(r"(lora_unet_|oft_unet_|lycoris_|lora_transformer_|transformer\.|unet\.|diffusion_model\.)")
_ENCODER = re.compile(r"lora_te[123]?_")
#: the flattened path of a text encoder's module, behind the component's name or without it
_ENCODER_PATH = re.compile(r"(?:text_encoder_(?:([23])_)?)?(text_model_encoder_)")


def image_tensors(adapter: OFTAdapter, form: ImageForm) -> dict[str, Tensor]:
    """The tensors of an adapter's file in the form of ``form``, float32.

    Raises:
        AdapterError: the form has no place for a map of the adapter, for turned biases or for tensors of the adapter's own.
        MatchError: two modules would have one name.
    """
    if adapter.saved:
        message = (
            "the adapter brings values of its own for a tensor, and files of image tools have no place for these values"
        )
        raise AdapterError(message, tensor=next(iter(adapter.saved)), path=adapter.source, remedy="fold the adapter")
    found: dict[str, Tensor] = {}
    added = {given: given.rpartition(".") for given in adapter.sums}
    names = _Names([*adapter.modules, *(path for path, _, _ in added.values())], form)
    for given, (path, _, leaf) in added.items():
        values = adapter.strength * adapter.sums[given].detach().to("cpu", torch.float32)
        found[f"{names.of(path)}.{'w_norm' if leaf == 'weight' else 'b_norm'}"] = values.contiguous()
    for path, weight_map in adapter.modules.items():
        with module_in_errors(path):
            name, own = names.of(path), _of_map(weight_map, form, swapped=names.swapped(path))
            if f"{name}.alpha" in found:
                message = f"two modules of the adapter would have the name {name!r}"
                raise MatchError(message, remedy="convert the adapters of the components one by one")
            found |= {f"{name}.{end}": t.to(torch.float32).contiguous() for end, t in own.items()}
    return found


class _Names:
    """The names of an adapter's modules in a form.

    ComfyUI loads ``lora_unet_`` before the names of U-Nets and of original layouts, and ``lycoris_`` before diffusers' names of Flux, SD3
    and Qwen-Image. It takes a modulation whose halves (shift and scale) its own layout holds in the other order from the rows in
    that order, so such a module gets its original name, and halves in the original order.
    """

    def __init__(self, paths: Iterable[str], form: ImageForm) -> None:
        flat = {path: _DENOISER.sub("", path, count=1).replace(".", "_") for path in paths if not _ENCODER.match(path)}
        blocks = any(name.startswith(("transformer_blocks_", "single_transformer_blocks_")) for name in flat.values())
        self._prefix = "lora_unet_" if form == "comfyui" and not blocks else "lycoris_"
        self._flat, self._form = flat, form
        self._originals = _swapped_names(flat.values()) if form == "comfyui" else {}

    def of(self, path: str) -> str:
        if path not in self._flat:
            return path
        encoder = _ENCODER_PATH.match(self._flat[path])
        if encoder is not None and self._form == "comfyui":
            return f"lora_te{encoder[1] or ''}_{self._flat[path][encoder.start(2) :]}"
        original = self._originals.get(self._flat[path])
        return self._prefix + self._flat[path] if original is None else f"lora_unet_{original}"

    def swapped(self, path: str) -> bool:
        return self._flat.get(path) in self._originals


def _swapped_names(flat: Iterable[str]) -> dict[str, str]:
    """``{flattened name in diffusers' layout: original name}`` of the modules whose halves are in the other order there: in Flux and SD3
    the last modulation, and in SD3 that of the last context, whose block alone has no ``to_add_out``.
    """
    names = set(flat)
    found: dict[str, str] = {}
    sd3 = any(re.match(r"transformer_blocks_\d+_(norm1_context|ff_context)_", name) for name in names)
    flux = any(name.startswith("single_transformer_blocks_") for name in names)
    if "norm_out_linear" in names and (flux or sd3):
        found["norm_out_linear"] = "final_layer_adaLN_modulation_1"
    blocks = [int(match[1]) for name in names if (match := re.match(r"transformer_blocks_(\d+)_", name))]
    last = max(blocks, default=0)
    added = [int(match[1]) for name in names if (match := re.match(r"transformer_blocks_(\d+)_attn_to_add_out", name))]
    if added and last > max(added) and f"transformer_blocks_{last}_norm1_context_linear" in names and not flux:
        found[f"transformer_blocks_{last}_norm1_context_linear"] = (
            f"joint_blocks_{last}_context_block_adaLN_modulation_1"
        )
    return found


def _of_map(weight_map: WeightMap, form: ImageForm, *, swapped: bool) -> dict[str, Tensor]:
    if weight_map.turns_bias:
        message = "the live layers of the training turned biases, which this form does not store"
        raise AdapterError(message, remedy="fold the adapter; or read it with bias='kept' on purpose")
    q, scale = _generator(weight_map)
    if swapped:
        q, scale = _with_halves_swapped(q), None if scale is None else scale.roll(scale.numel() // 2, 0)
    none = {"alpha": torch.tensor(0.0)}
    rescale = {} if scale is None else {"rescale": scale.reshape(-1, 1)}
    if q.ndim == 3 and scale is not None and form == "comfyui":
        q = _as_one_factor(q)
    return {"oft_blocks": q / 2, **none, **rescale}  # the tools take B - Bᵀ of what is stored


def _generator(weight_map: WeightMap) -> tuple[Tensor, Tensor | None]:
    """``(limited Q, scale of the rows or None)`` of a rotation of rows: ``(n, b, b)``, or ``(m, n, b, b)`` of BOFT.

    Raises:
        AdapterError: the map is no such rotation.
    """
    m = weight_map
    if isinstance(m, AtStrength):
        m = m.of.at_strength(m.strength, m.mode)
    if isinstance(m, (OutputBlocks, LycorisBoft)):
        return m.generator(), checked_scale(m.scale)
    if isinstance(m, FluxParts):
        return _one_size(m), None
    if isinstance(m, Rotation) and m.side == "output" and m.whole and m.cayley.exact:
        return -rotations.skew(m.generator.detach().to("cpu", torch.float64)), checked_scale(m.scale)
    message = f"the form has no place for this map ({m.family} of the {m.side} side): it holds rotations of the outputs"
    raise AdapterError(message, remedy="fold the adapter: a fold needs no conversion")


def _one_size(m: FluxParts) -> Tensor:
    """The blocks of all parts in the size of the largest blocks.

    Raises:
        AdapterError: the blocks of a part do not fill such blocks.
    """
    size, found = m.block_size, []
    for _, q in m.generators():
        n, b, _ = q.shape
        if size % b or (n * b) % size:
            message = (
                f"the parts have blocks of other sizes, and {n} blocks of size {b} do not fill blocks of size {size}"
            )
            raise AdapterError(message, remedy="fold the adapter: a fold needs no conversion")
        found.append(rotations.block_diagonal(q, size, shared=False))
    return torch.cat(found)


def _with_halves_swapped(q: Tensor) -> Tensor:
    """The generators ``(n, b, b)`` or ``(m, n, b, b)`` of the same map of rows whose halves are in the other order.

    Raises:
        AdapterError: a block, or a group of a factor, lies in both halves.
    """
    if q.ndim == 3:
        return _rolled(q, 1)
    return torch.stack([_rolled(factor, 2**i) for i, factor in enumerate(q)])


def _rolled(blocks: Tensor, group: int) -> Tensor:
    """The blocks ``(n, b, b)`` of one factor, which interleaves halves of groups of ``group`` blocks."""
    n, b, _ = blocks.shape
    if (n // group) % 2 == 0:
        return blocks.roll(n // 2, 0)
    if n == group > 1:  # the two halves of the one group alternate in the blocks
        order = torch.arange(b) ^ 1
        return blocks[:, order][:, :, order]
    message = "ComfyUI takes the halves (shift and scale) of this modulation in the other order, and a block lies in both halves"
    raise AdapterError(message, remedy="fold the adapter: a fold needs no conversion")


def _as_one_factor(q: Tensor) -> Tensor:
    """The one factor of a BOFT that is the rotation of diag-oft ``q: (n, b, b)``: ``K(-Q')`` between the interleaving order of the
    first factor and its inverse.
    """
    n, b, _ = q.shape
    if b % 2:
        message = f"ComfyUI ignores the scale of a diag-oft, and a BOFT, whose scale it applies, needs blocks of an even size, not of {b}"
        raise AdapterError(message, tensor="rescale", remedy="fold the adapter: a fold needs no conversion")
    order = rotations.interleaved(b, b // 2)
    turned = q.new_empty(n, b, b)
    turned[:] = -q[:, order][:, :, order]
    return turned.unsqueeze(0)


def metadata_of(form: ImageForm) -> Mapping[str, str]:
    """The metadata of a file in this form."""
    return {"format": "pt", "oftsurgery": f"converted to the form of {form}: limits are applied, alpha is 0"}
