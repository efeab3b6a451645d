"""Checkpoints of image models in a single file: which part of the file holds which model, and what an adapter's names mean there.

The names in the file are the names of the model; nothing is renamed. A part is known by the beginning of its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

from oftsurgery.errors import MatchError, printable

from .image_names import DENOISER, ENCODER, ImageNames

#: the beginnings of names; a name without such a beginning belongs to a denoiser
_DENOISER = re.compile(r"(model\.)?diffusion_model\.")
_ENCODER = re.compile(
    r"cond_stage_model\.(transformer|model)\.|conditioner\.embedders\.\d\.(transformer|model)\."
    r"|text_encoders\.\w+\.(transformer|model)\."
)
_VAE = re.compile(r"(first_stage_model|vae)\.")
_NUMBER = re.compile(r"(?:lora_te|text_encoder_?)(\d?)[_.]")


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
        if name.startswith(DENOISER):
            parts = [part for part in self._parts if not part[1]]
        elif name.startswith(ENCODER):
            parts = [part for part in self._parts if part[1]]
        else:
            parts = self._parts
        found = [beginning + there for beginning, _, names in parts if (there := names.find(name, layout)) is not None]
        if len(found) > 1 and (number := _NUMBER.match(name)) is not None:
            # several CLIP encoders have the path: all tools number these two in the same order, the smaller one first
            found = sorted(found, key=lambda path: ("clip_g" in path, path))
            found = found[int(number[1] or 1) - 1 :][:1]
        if len(found) > 1:
            raise MatchError(
                f"several models in the file have this module: {', '.join(map(printable, found))}",
                module=name.rpartition(".")[0],
                remedy="name the module in a copy of the adapter's file as the checkpoint names it",
            )
        return found[0] if found else name


def single_file_layouts(paths: Iterable[str]) -> tuple[partial[str], ...]:
    """The layouts of a file with modules at these ``paths``: its own names, and those of the other layout."""
    names = SingleFileNames(paths)
    return tuple(partial(names.in_model, layout=i) for i in (0, 1))
