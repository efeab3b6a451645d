"""Which weights of a model the names in an image tool's adapter mean, for the checks: the planner finds the same by other code. Only
the table of the two layouts of image models is shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from oftsurgery.stores.image_layouts import pairs_of

# the prefixes by which image tools name the component of a module
_COMPONENT = re.compile(
    r"^((lora|oft)_(unet|transformer|te\d?)_|lycoris_|(model\.)?diffusion_model\.|transformer\.|unet\.|text_encoder(_\d)?\."
    r"|text_encoders\.\w+\.transformer\.)"
)
_OF_ENCODER = ("lora_te", "text_encoder")
_OF_DENOISER = ("lora_unet_", "lora_transformer_", "oft_unet_", "unet.", "transformer.")
_NUMBER = re.compile(r"(?:lora_te|text_encoder_?)(\d?)[_.]")
# fused projections under names that no layout has
_FUSED = {
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "qkv": ("to_q", "to_k", "to_v"),
}
# the beginnings of names in checkpoints of image models in a single file
_ENCODER_IN_FILE = re.compile(
    r"^(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.(transformer|model)\."
)
_IN_FILE = re.compile(rf"{_ENCODER_IN_FILE.pattern}|^(model\.)?diffusion_model\.")


@dataclass(frozen=True)
class Rows:
    """The rows that one module of an adapter means.

    Attributes:
        paths: the modules that hold the rows, in order.
        part: the number of the rows' part in the one module; None for whole modules.
        count: the number of parts in that module.
        swapped: whether the halves of the rows are in the other order.
    """

    paths: tuple[str, ...]
    part: int | None = None
    count: int = 1
    swapped: bool = False

    @property
    def plain(self) -> bool:
        """Whether the rows are those of one module, in the same order."""
        return len(self.paths) == 1 and self.part is None and not self.swapped


class ToolNames:
    """The names of the tensors ``names``, as image tools write them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._weights = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]

    def rows(self, path: str) -> Rows | None:
        """The rows that an adapter's module ``path`` means; None for an unknown name, or for a name of several modules."""
        plain = _COMPONENT.sub("", path)
        found = self._own.get(plain.replace(".", "_")) or self._own.get(path.replace(".", "_")) or []
        other = self._other.get(plain.replace(".", "_"), [])
        # one file may hold encoders in both layouts
        found = found + [r for r in other if _ENCODER_IN_FILE.match(r.paths[0])] if found else other
        found = found or self._by_any_prefix(path)
        encoder = path.startswith(_OF_ENCODER)
        if encoder or path.startswith(_OF_DENOISER):
            found = [
                r
                for r in found
                if not _IN_FILE.match(r.paths[0]) or bool(_ENCODER_IN_FILE.match(r.paths[0])) == encoder
            ]
        found = sorted(found, key=lambda rows: ("clip_g" in rows.paths[0], rows.paths))  # after clip_l, in all tools
        number = _NUMBER.match(path)
        if len(found) > 1 and number is not None:
            found = found[int(number[1] or 1) - 1 :][:1]
        return found[0] if len(found) == 1 else self._beside(path) if not found else None

    def _beside(self, path: str) -> Rows | None:
        """The rows of a fused projection beside its parts' names, or of a part beside the fused projection's name."""
        for end, parts in _FUSED.items():
            for name, others in ((end, parts), *((part, (end,)) for part in parts)):
                if not path.endswith((f".{name}", f"_{name}")):
                    continue
                start = path.removesuffix(name)
                known = [self._plain_rows(start + other) for other in others]
                if any(rows is None for rows in known):
                    continue
                paths = tuple(rows.paths[0] for rows in known if rows is not None)
                return Rows(paths) if name == end else Rows(paths, parts.index(name), len(parts))
        return None

    def _plain_rows(self, path: str) -> Rows | None:
        plain = _COMPONENT.sub("", path).replace(".", "_")
        found = self._own.get(plain) or self._own.get(path.replace(".", "_")) or []
        return found[0] if len(found) == 1 else None

    def _by_any_prefix(self, path: str) -> list[Rows]:
        """By a prefix that a preset of LyCORIS may have set: the longest flattened path at the end."""
        ends = [i + 1 for i, letter in enumerate(path) if letter == "_"]
        for end in ends if "." not in path else ():
            if path[end:] in self._own or path[end:] in self._other:
                return self._own.get(path[end:]) or self._other[path[end:]]
        return []

    @cached_property
    def swapped(self) -> frozenset[str]:
        """The flattened names, in diffusers' layout, of modules whose halves the original layout of Flux and SD3 holds in the other
        order.
        """
        return swapped_modules(_IN_FILE.sub("", path) for path in self._weights)

    @cached_property
    def _own(self) -> dict[str, list[Rows]]:
        found: dict[str, list[Rows]] = {}
        for path in self._weights:
            plain = _IN_FILE.sub("", path)
            aliases = (path, plain, f"text_model.{plain}", plain.removeprefix("text_model."))
            for alias in dict.fromkeys(name.replace(".", "_") for name in aliases):
                found.setdefault(alias, []).append(Rows((path,)))
        return found

    @cached_property
    def _other(self) -> dict[str, list[Rows]]:
        """The names in the layout that the model does not have."""
        found: dict[str, list[Rows]] = {}
        parts: dict[str, dict[str, str]] = {}
        for path in self._weights:
            start = match[0] if (match := _ENCODER_IN_FILE.match(path)) else ""
            parts.setdefault(start, {})[_IN_FILE.sub("", path)] = path
        for here in parts.values():
            for name, rows in _in_other_layout(here):
                aliases = (name, name.removeprefix("text_model."))
                for flat in dict.fromkeys(alias.replace(".", "_") for alias in aliases):
                    own = found.setdefault(flat, [])
                    if name not in here and rows not in own:
                        own.append(rows)
        return found


# what shows that a model is Flux or SD3; Qwen-Image also has a ``norm_out.linear``, in one layout alone
_ORIGINAL = re.compile(r"(double|single|joint|input|output)_blocks\.|middle_block\.|final_layer\.")
_SPLIT = re.compile(r"single_transformer_blocks\.|transformer_blocks\.\d+\.(norm1_context|ff_context)\.")
_FUSED_BLOCKS = re.compile(r"(single|joint)_blocks\.")
# ends of modules of the transformers' blocks, in the order in which they are tried
_ENDS = ("norm1_context", "norm_out", "ff_context", "attn", "final_layer")


def swapped_modules(paths: Iterable[str]) -> frozenset[str]:
    """The flattened names, in diffusers' layout, of the swapped modules among modules of these paths, dotted and without a prefix."""
    there = tuple(paths)
    if not any(_SPLIT.match(path) or _FUSED_BLOCKS.match(path) for path in there):
        return frozenset()
    return frozenset(part.replace(".", "_") for pair in pairs_of(there) if pair.swapped for part in pair.parts)


def flat_name(path: str) -> str:
    """The flattened name of a module in an adapter, without the prefix of a component."""
    return _COMPONENT.sub("", path).replace(".", "_")


def swapped_in_adapter(paths: Iterable[str]) -> frozenset[str]:
    """As :attr:`ToolNames.swapped`, by the names in an adapter alone: a block is the last one of SD3 where it alone lacks a trained
    ``to_add_out``.
    """
    names = [_dotted(path) for path in paths]
    found = swapped_modules(names)
    return found if any(name.endswith("attn.to_add_out") for name in names) else found & {"norm_out_linear"}


def of_flux_or_sd3(paths: Iterable[str]) -> bool:
    """Whether the names in an adapter are diffusers' names of Flux or SD3."""
    return any(_SPLIT.match(_dotted(path)) for path in paths)


def is_original(path: str) -> bool:
    """Whether a name in an adapter is one of an original layout."""
    return _ORIGINAL.match(_dotted(path)) is not None


def _dotted(path: str) -> str:
    """A name with its dots, as far as they decide the family of the model and the swapped halves."""
    dotted = re.sub(r"_(\d+)_", r".\1.", flat_name(path))
    head = next((end for end in _ENDS if f"{end}_" in dotted), None)
    return dotted if head is None else dotted.replace(f"{head}_", f"{head}.", 1)


def _in_other_layout(here: Mapping[str, str]) -> Iterator[tuple[str, Rows]]:
    """``(name in the other layout, its rows)`` of one model's modules ``{name: path in the file}``."""
    for pair in pairs_of(here):
        if pair.original in here:
            path, count = here[pair.original], len(pair.parts)
            rows = [Rows((path,), i, count) for i in range(count)] if count > 1 else [Rows((path,))]
            named = dict(zip(pair.parts, rows, strict=True))
        else:
            named = {pair.original: Rows(tuple(here[part] for part in pair.parts))}
        for name, one in named.items():
            yield name, replace(one, swapped=pair.swapped)
