"""Find a model's modules by the names that image tools write: behind a prefix, and flattened (``.`` became ``_``).

``lora_unet_down_blocks_0_attentions_0_proj_in`` is ``down_blocks.0.attentions.0.proj_in`` of a U-Net. To undo the flattening is
ambiguous, so the model's own names are flattened and looked up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from oftsurgery.errors import MatchError, printable


@dataclass(frozen=True)
class Meaning:
    """The weights of a model that one module of an adapter means.

    Attributes:
        modules: paths in the model, in the order of the rows; several where the model splits the adapter's module.
        part: where the model fuses modules, the number of the adapter's module among them; else None.
        of: the names of all modules that the model fuses, in the adapter's layout; empty elsewhere.
        swapped: whether the halves of the rows are in the other order in the model.
    """

    modules: tuple[str, ...]
    part: int | None = None
    of: tuple[str, ...] = ()
    swapped: bool = False

    @property
    def whole(self) -> str | None:
        """The path of the one module whose rows are the adapter's, in the same order; None elsewhere."""
        return self.modules[0] if len(self.modules) == 1 and self.part is None and not self.swapped else None


#: the prefixes of flattened names
FLAT_PREFIXES = (
    "lora_unet_", "oft_unet_", "lycoris_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_",
)  # fmt: skip

#: the prefixes of dotted names
DOTTED_PREFIXES = ("transformer.", "unet.", "diffusion_model.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")


def flat_names(paths: Iterable[str]) -> dict[str, list[str]]:
    """``{flat name: the paths that have it}``, which is one path unless two modules share the flat name."""
    found: dict[str, list[str]] = {}
    for path in paths:
        if path:
            found.setdefault(path.replace(".", "_"), []).append(path)
    return found


def find_flat(wanted: Iterable[str], paths: Collection[str]) -> dict[str, str]:
    """``{module's name in an adapter: path of the model's module}``, without names that the model lacks.

    Raises:
        MatchError: two modules of the model have the flat name.
    """
    names, flat = list(wanted), flat_names(paths)
    found = {name: name for name in names if name in paths}
    for name in names:
        if name in found:
            continue
        for prefix in (*DOTTED_PREFIXES, *FLAT_PREFIXES):
            path = _there(name.removeprefix(prefix), paths, flat) if name.startswith(prefix) else None
            if path is not None:
                found[name] = path
                break
    rest = [name for name in names if name not in found]
    return found | _by_own_prefix(rest, paths, flat)


def _there(name: str, paths: Collection[str], flat: Mapping[str, list[str]]) -> str | None:
    if name in paths:
        return name
    if "." in name:
        return None
    found = flat.get(name, [])
    if len(found) > 1:
        message = (
            f"the flat name {printable(name)!r} stands for two modules of the model: {', '.join(map(printable, found))}"
        )
        raise MatchError(message, module=name, remedy="rename the adapter's key to the dotted path of the module")
    return found[0] if found else None


def _by_own_prefix(names: list[str], paths: Collection[str], flat: Mapping[str, list[str]]) -> dict[str, str]:
    """The names by a prefix that a preset of the tool has set: the shortest prefix behind which the model has all names."""
    if not names or any("." in name for name in names):
        return {}
    first = names[0]
    for end in [0, *(i + 1 for i, letter in enumerate(first) if letter == "_")]:
        prefix = first[:end]
        found = {n: _there(n[end:], paths, flat) for n in names if n.startswith(prefix) and n != prefix}
        if len(found) == len(names) and all(path is not None for path in found.values()):
            return {name: path for name, path in found.items() if path is not None}
    return {}
