"""Fused projections under names that no layout has: trainers and ``fuse_qkv_projections`` put ``qkv`` beside ``to_q``, ``to_k`` and
``to_v``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from oftsurgery.stores.meaning import Meaning

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
#: end of a fused module's name → the ends of its parts
_FUSED = {"to_added_qkv": _ADDED, "to_qkv": _QKV, "to_kv": ("to_k", "to_v"), "qkv": _QKV}

#: function from names in an adapter to what they mean in a model
MeaningsOf = Callable[[Iterable[str]], Mapping[str, Meaning]]


def fused_meanings(names: Iterable[str], meanings: MeaningsOf) -> dict[str, Meaning]:
    """What names mean that only the names beside them explain: a fused module where the model has the parts, and a part where the
    model has the fused module. Flat and dotted names end alike.
    """
    found: dict[str, Meaning] = {}
    for name in names:
        meaning = _split(name, meanings) or _fused(name, meanings)
        if meaning is not None:
            found[name] = meaning
    return found


def _split(name: str, meanings: MeaningsOf) -> Meaning | None:
    for end, ends in _FUSED.items():
        if not name.endswith((f".{end}", f"_{end}")):
            continue
        parts = [name.removesuffix(end) + part for part in ends]
        known = meanings(parts)
        if all(part in known and known[part].whole for part in parts):
            return Meaning(tuple(known[part].modules[0] for part in parts))
    return None


def _fused(name: str, meanings: MeaningsOf) -> Meaning | None:
    for end, ends in _FUSED.items():
        part = next((part for part in ends if name.endswith((f".{part}", f"_{part}"))), None)
        if part is None:
            continue
        start = name.removesuffix(part)
        known = meanings([start + end])
        if start + end in known and known[start + end].whole:
            of = tuple(start + other for other in ends)
            return Meaning(known[start + end].modules, ends.index(part), of)
    return None
