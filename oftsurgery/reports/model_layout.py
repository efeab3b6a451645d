""":func:`layout` sorts the modules of a fold into layers × kinds, in the order in which people look at modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# names of lists inside a layer whose members are layers too (Swin's stages, a U-Net's blocks); a list of another name,
# such as a mixture's experts, holds parts of one layer
_INNER_LAYERS = ("blocks", "layers", "resblocks", "attentions", "resnets", "transformer_blocks")

# the order in which people name the linears of a layer; files hold the linears in alphabetical order
_ORDER = ("q", "query", "k", "key", "v", "value", "o", "gate", "up", "down")

# the parts of a list of at most this length are drawn separately; a longer list (experts) is drawn as one
_FEW = 4


@dataclass(frozen=True)
class Stack:
    """The layers of one list of modules.

    Attributes:
        name: path of the list, such as ``"model.layers"``.
        layers: the layers' indices in the list, ascending.
        kinds: paths inside a layer, attention first; ``*`` stands for the index in a longer list, such as an expert's.
        cells: ``{(layer, kind): module paths}``.
    """

    name: str
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """The places of all modules.

    Attributes:
        stacks: the stacks of layers.
        loose: modules outside of all stacks, in the record's order: embeddings, heads, poolers.
    """

    stacks: tuple[Stack, ...]
    loose: tuple[str, ...]


def layout(paths: Iterable[str]) -> Layout:
    """Sort module paths into layers and kinds, whatever the architecture's own names.

    >>> layout(["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "head"])
    Layout(stacks=(Stack(name='h', layers=('0', '1'), kinds=('attn', 'mlp'), cells={('0', 'attn'): ('h.0.attn',), \
('0', 'mlp'): ('h.0.mlp',), ('1', 'attn'): ('h.1.attn',), ('1', 'mlp'): ('h.1.mlp',)}),), loose=('head',))
    """
    paths = list(paths)
    found: dict[str, list[tuple[str, list[str], str]]] = defaultdict(list)
    for path in paths:
        place = _place(path)
        if place is not None:
            found[place[0]].append((place[1], place[2], path))
    stacks = [_stack(name, members) for name, members in found.items() if len({layer for layer, _, _ in members}) > 1]
    placed = {path for stack in stacks for cell in stack.cells.values() for path in cell}
    return Layout(tuple(stacks), tuple(path for path in paths if path not in placed))


def _place(path: str) -> tuple[str, str, list[str]] | None:
    """``(list of layers, index in the list, parts of the path inside the layer)``; None for a module outside of layers."""
    parts = path.split(".")
    inner = range(len(parts) - 1)  # a path that ends in a number names a member of a plain list, such as nn.Sequential
    first = next((i for i in inner if _number(parts[i])), None)
    if first is None:
        return None
    last = max([first, *(i for i in inner if i > first and _number(parts[i]) and parts[i - 1] in _INNER_LAYERS)])
    return ".".join(parts[:first]), ".".join(parts[first : last + 1]), parts[last + 1 :]


def _number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _stack(name: str, members: Sequence[tuple[str, list[str], str]]) -> Stack:
    values: dict[tuple[tuple[str, ...], int], set[str]] = defaultdict(set)
    for _, parts, _ in members:
        for i, part in enumerate(parts):
            values[_template(parts), i].add(part)
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layer, parts, path in members:
        template = _template(parts)
        kind = ".".join("*" if len(values[template, i]) > _FEW else part for i, part in enumerate(parts))
        cells[layer, kind].append(path)
    return Stack(
        name,
        tuple(sorted({layer for layer, _ in cells}, key=natural)),
        tuple(sorted(dict.fromkeys(kind for _, kind in cells), key=_rank)),
        {place: tuple(paths) for place, paths in cells.items()},
    )


def _rank(kind: str) -> tuple[bool, int]:
    """A sort key: attention comes first, then :data:`_ORDER` inside each group; other kinds keep their order."""
    group, _, leaf = kind.rpartition(".")
    leaf = leaf.removesuffix("_proj").removeprefix("to_")
    return "att" not in group.lower(), _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER)


def _template(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple("*" if _number(part) else part for part in parts)


def natural(path: str) -> list[tuple[int, int, str]]:
    """A sort key that sorts numbers in a path by their value.

    >>> sorted(["h.10.up", "h.9.up"], key=natural)
    ['h.9.up', 'h.10.up']
    """
    parts = (part.lstrip("0") if _number(part) else part for part in path.split("."))
    return [(0, len(p), p) if _number(p) or not p else (1, 0, p) for p in parts]
