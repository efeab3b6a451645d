"""What the names in an image tool's adapter mean in a model: prefixes of components, flattened paths, and the model's other layout.

Tools write a module's path behind a prefix, flattened (``.`` becomes ``_``) or not, in the layout that the tool trains. A flattened
path cannot be turned back by itself; the model's own paths, in both layouts, are flattened and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from oftsurgery.errors import MatchError, printable

from .image_layouts import pairs_of
from .meaning import Meaning

#: prefixes of a denoiser's modules
DENOISER = (
    "lora_unet_", "oft_unet_", "lora_transformer_", "transformer.", "unet.", "model.diffusion_model.", "diffusion_model.",
)  # fmt: skip
#: prefixes of a text encoder's modules; tools number the encoders of one model differently, so the number decides nothing
ENCODER = (
    "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder.", "text_encoder_2.", "text_encoder_3.",
)  # fmt: skip
#: the prefix of an encoder by its own name, as ComfyUI's files have it
_NAMED_ENCODER = re.compile(r"text_encoders\.\w+\.transformer\.")
#: the prefix that LyCORIS' wrapper writes, whatever the model is
ANY = ("lycoris_",)


def is_of_encoder(name: str) -> bool:
    """Whether a name in an adapter has the prefix of a text encoder.

    >>> is_of_encoder("lora_te2_text_projection"), is_of_encoder("text_encoders.qwen.transformer.model.layers.0.mlp.up_proj")
    (True, True)
    """
    return name.startswith(ENCODER) or _NAMED_ENCODER.match(name) is not None


class ImageNames:
    """The names of a model's modules in both layouts.

    >>> names = ImageNames(["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"])
    >>> names.meanings(["lora_unet_double_blocks_0_img_attn_qkv"])["lora_unet_double_blocks_0_img_attn_qkv"].modules
    ('transformer_blocks.0.attn.to_q', 'transformer_blocks.0.attn.to_k', 'transformer_blocks.0.attn.to_v')

    Attributes:
        modules: the paths of the model's modules.
        encoder: whether the model is a text encoder, and not a denoiser; None where nobody knows.
        prefixes: the prefixes that the names may have: those of :data:`ANY`, and of :data:`ENCODER`, of :data:`DENOISER`, or both.
    """

    def __init__(self, modules: Iterable[str], *, encoder: bool | None = None) -> None:
        self._given, self.encoder = modules, encoder
        own = () if encoder else DENOISER
        self.prefixes = tuple(sorted((*own, *ANY, *(ENCODER if encoder is not False else ())), key=len, reverse=True))

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for path in self._given if path))

    @cached_property
    def layouts(self) -> tuple[Mapping[str, Meaning], ...]:
        """``{path: its meaning}`` in the model's own layout, and in the other one."""
        own = {path: Meaning((path,)) for path in self.modules}
        other: dict[str, Meaning] = {}
        for path in self.modules if self.encoder is not False else ():
            # CLIP's text model by itself, and as the only part of transformers 4's class
            alias = path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}"
            if alias not in own:
                other[alias] = Meaning((path,))
        for pair in pairs_of(self.modules):
            if pair.original not in own:
                other.setdefault(pair.original, Meaning(pair.parts, swapped=pair.swapped))
                continue
            fused = len(pair.parts) > 1
            for i, part in enumerate(pair.parts):
                if part not in own:
                    meaning = Meaning((pair.original,), i if fused else None, pair.parts if fused else (), pair.swapped)
                    other.setdefault(part, meaning)
                    if part.startswith("text_model."):
                        other.setdefault(part.removeprefix("text_model."), meaning)
        return own, other

    @cached_property
    def _flat(self) -> tuple[Mapping[str, tuple[str, ...]], ...]:
        """``{flattened path: the paths that have it}`` of each layout."""
        found = []
        for layout in self.layouts:
            flat: dict[str, tuple[str, ...]] = {}
            for path in layout:
                name = path.replace(".", "_")
                flat[name] = (*flat.get(name, ()), path)
            found.append(flat)
        return tuple(found)

    def meanings(self, paths: Iterable[str]) -> dict[str, Meaning]:
        """``{path in an adapter: its meaning}``, without paths that the model lacks: by the layout that has the most of the paths.

        Raises:
            MatchError: two modules of the model have the same flattened path.
        """
        wanted = list(dict.fromkeys(paths))
        best: dict[str, Meaning] = {}
        for prefix in ("", *self._unknown_prefixes(wanted)):
            for i in range(len(self.layouts)):
                found = {path: meaning for path in wanted if (meaning := self._meaning(path, i, prefix)) is not None}
                if len(found) > len(best):
                    best = found
            if len(best) == len(wanted):
                break
        return best

    def in_model(self, name: str, layout: int) -> str:
        """The name of a tensor in the model, of a name in an adapter; an unknown name, and a name of several tensors or of rows of a
        tensor, stay unchanged.
        """
        return self.find(name, layout) or name

    def find(self, name: str, layout: int) -> str | None:
        """:meth:`in_model`, with None for a name that stays unchanged there."""
        path, _, leaf = name.rpartition(".")
        meaning = self._meaning(path, layout, "")
        return None if meaning is None or meaning.whole is None else f"{meaning.whole}.{leaf}"

    def has(self, path: str) -> bool:
        """Whether a module's path in an adapter means something in the model, in either layout."""
        return any(self._meaning(path, i, "") is not None for i in range(len(self.layouts)))

    def _meaning(self, path: str, layout: int, prefix: str) -> Meaning | None:
        for name in self._without_prefix(path.removeprefix(prefix)):
            exact = self.layouts[layout].get(name)
            if exact is not None:
                return exact
            found = self._flat[layout].get(name, ())
            if len(found) > 1:
                raise MatchError(
                    f"the flattened path is that of {len(found)} modules of the model: {', '.join(map(printable, found))}",
                    module=path,
                    remedy="name the module with its dots, in a copy of the adapter's file",
                )
            if found:
                return self.layouts[layout][found[0]]
        return None

    def _without_prefix(self, path: str) -> list[str]:
        found = [path, *(path.removeprefix(prefix) for prefix in self.prefixes if path.startswith(prefix))]
        named = _NAMED_ENCODER.match(path) if self.encoder is not False else None
        return found if named is None else [*found, path[named.end() :]]

    def _unknown_prefixes(self, paths: list[str]) -> list[str]:
        """Prefixes that no table has and that all paths share: a preset of LyCORIS may set any prefix."""
        if not paths or any(path.startswith((*DENOISER, *ANY)) or is_of_encoder(path) for path in paths):
            return []
        first = paths[0]
        ends = {name for flat in self._flat for name in flat if first.endswith(f"_{name}")}
        found = {first.removesuffix(name) for name in ends}
        return sorted((p for p in found if all(path.startswith(p) for path in paths)), key=len)
