"""Adapters of image tools in other tools' form: as LyCORIS stores them, and so that ComfyUI and the web UI compute what the trainer
computed.

Both forms hold generators that are limited already, with an alpha of 0 (no limit). ComfyUI ignores the scale of diag-oft, so a
scaled diag-oft becomes a BOFT of one factor, whose scale ComfyUI applies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    if adapter.sums:
        message = "the adapter also adds to tensors of normalisation layers, which are not converted"
        raise AdapterError(message, tensor=next(iter(adapter.sums)), path=adapter.source, remedy="fold the adapter")
    found: dict[str, Tensor] = {}
    for path, weight_map in adapter.modules.items():
        with module_in_errors(path):
            name, own = _name(path, form), _of_map(weight_map, form)
            if f"{name}.alpha" in found:
                message = f"two modules of the adapter would have the name {name!r}"
                raise MatchError(message, remedy="convert the adapters of the components one by one")
            found |= {f"{name}.{end}": t.to(torch.float32).contiguous() for end, t in own.items()}
    return found


def _name(path: str, form: ImageForm) -> str:
    if _ENCODER.match(path):
        return path
    prefix = "lora_unet_" if form == "comfyui" else "lycoris_"
    return prefix + _DENOISER.sub("", path, count=1).replace(".", "_")


def _of_map(weight_map: WeightMap, form: ImageForm) -> dict[str, Tensor]:
    if weight_map.turns_bias:
        message = "the live layers of the training turned biases, which this form does not store"
        raise AdapterError(message, remedy="fold the adapter; or read it with bias='kept' on purpose")
    q, scale = _generator(weight_map)
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
    m = weight_map.resolved() if isinstance(weight_map, AtStrength) else weight_map
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
