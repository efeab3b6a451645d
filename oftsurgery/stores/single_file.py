"""Checkpoints of image models in a single file: which part of the file holds which model, and what an adapter's names mean there.

The names in the file are the names of the model; only the projections of OpenCLIP that are no modules get names of modules. A part is
known by the beginning of its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

from oftsurgery.errors import MatchError, printable

from .image_names import DENOISER, ImageNames, is_of_encoder
from .meaning import Meaning

T = TypeVar("T")

#: the beginnings of names; a name without such a beginning belongs to a denoiser
_DENOISER = re.compile(r"(model\.)?diffusion_model\.")
_ENCODER = re.compile(
    r"cond_stage_model\.(transformer|model)\.|conditioner\.embedders\.\d\.(transformer|model)\."
    r"|text_encoders\.\w+\.(transformer|model)\."
)
_VAE = re.compile(r"(first_stage_model|vae)\.")
#: the beginning of a name in an adapter, with the encoder's number
ENCODER_NUMBER = re.compile(r"(?:lora_te|text_encoder_?)(\d?)[_.]")


#: the fused projections of OpenCLIP's encoders, which are parameters of an attention and no modules
_FUSED = re.compile(r"(resblocks\.\d+\.attn\.in_proj)_(weight|bias)$")
#: the projection of the text in OpenCLIP's encoders, ``(in, out)``: x · text_projection
_PROJECTION = re.compile(rf"({_ENCODER.pattern})(?<=\.model\.)text_projection")


def as_of_module(name: str) -> str:
    """A tensor's name in the file, with the projections of OpenCLIP named as if a module held them.

    >>> as_of_module("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight")
    'cond_stage_model.model.transformer.resblocks.0.attn.in_proj.weight'
    """
    return f"{name}.weight" if is_transposed(name) else _FUSED.sub(r"\1.\2", name)


def is_transposed(name: str) -> bool:
    """Whether the tensor is OpenCLIP's projection of the text, which is held ``(in, out)``.

    >>> is_transposed("conditioner.embedders.1.model.text_projection"), is_transposed("text_encoder.text_projection")
    (True, False)
    """
    return _PROJECTION.fullmatch(name) is not None


class SingleFileNames:
    """The names of a file's modules, by parts.

    >>> names = SingleFileNames(["model.diffusion_model.input_blocks.1.1.proj_in", "first_stage_model.conv"])
    >>> names.in_model("lora_unet_down_blocks_0_attentions_0_proj_in.weight", layout=1)
    'model.diffusion_model.input_blocks.1.1.proj_in.weight'
    """

    def __init__(self, paths: Iterable[str]) -> None:
        parts: dict[tuple[str, bool], list[str]] = {}
        for path in paths:
            if _VAE.match(path):
                continue
            encoder = _ENCODER.match(path)
            beginning = (encoder or _DENOISER.match(path) or re.match("", path))[0]  # type: ignore[index]
            parts.setdefault((beginning, encoder is not None), []).append(path.removeprefix(beginning))
        self._parts = [
            (beginning, encoder, ImageNames(own, encoder=encoder))
            for (beginning, encoder), own in sorted(parts.items())
        ]

    def in_model(self, name: str, layout: int) -> str:
        """The name in the file, of a tensor's name in an adapter; an unknown name stays unchanged.

        Raises:
            MatchError: several parts of the file have the module.
        """
        path = name.rpartition(".")[0]
        there = {beginning: names for beginning, names in self._parts_for(name) if names.has(path)}
        if not there:
            return name
        beginning, names = _chosen(name, {b: (b, names) for b, names in there.items()})
        own = names.find(name, layout)
        return name if own is None else beginning + own

    def meanings(self, paths: Iterable[str]) -> dict[str, Meaning]:
        """As :meth:`~oftsurgery.stores.image_names.ImageNames.meanings`."""
        found: dict[str, dict[str, Meaning]] = {}
        wanted = list(paths)
        for beginning, _, names in self._parts:
            own = names.meanings(p for p in wanted if (beginning, names) in self._parts_for(p))
            for path, meaning in own.items():
                modules = tuple(beginning + module for module in meaning.modules)
                found.setdefault(path, {})[beginning] = replace(meaning, modules=modules)
        return {path: _chosen(path, there) for path, there in found.items()}

    def _parts_for(self, name: str) -> list[tuple[str, ImageNames]]:
        """``(beginning, names)`` of the parts to which a name in an adapter may belong."""
        kinds = [True] if is_of_encoder(name) else [False] if name.startswith(DENOISER) else [True, False]
        return [(beginning, names) for beginning, encoder, names in self._parts if encoder in kinds]


def _chosen(name: str, there: Mapping[str, T]) -> T:
    """The one of ``{beginning of a part: value}`` that a name in an adapter means.

    Raises:
        MatchError: several parts have the module, and the name does not tell which is meant.
    """
    # all tools number the two CLIP encoders in the same order, the smaller one first
    order = sorted(there, key=lambda beginning: ("clip_g" in beginning, beginning))
    number = ENCODER_NUMBER.match(name)
    if len(order) > 1 and number is not None:
        order = order[int(number[1] or 1) - 1 :][:1]
    if len(order) == 1:
        return there[order[0]]
    raise MatchError(
        f"several models in the file have this module: {', '.join(map(printable, there))}",
        module=name,
        remedy="name the module in a copy of the adapter's file as the checkpoint names it",
    )


def single_file_layouts(paths: Iterable[str]) -> tuple[partial[str], ...]:
    """The layouts of a file with modules at these ``paths``: its own names, and those of the other layout."""
    names = SingleFileNames(paths)
    return tuple(partial(names.in_model, layout=i) for i in (0, 1))
