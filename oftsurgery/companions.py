"""A quantised weight's tensors under the names that checkpoints give them: what :mod:`oftsurgery.formats` knows of them."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from .codecs import EncodedWeight
from .formats import FORMATS, companion_names, gather, spread_shapes
from .formats.four_bit import FourBit, unpack_state

__all__ = ["companion_names", "gather", "spread", "spread_shapes", "state_name", "unpack_state"]


def state_name(weight: str, names: Collection[str]) -> str | None:
    """The name of a 4-bit weight's packed state among ``names``, or None."""
    states = (kind.names(weight)[""] for kind in FORMATS.values() if isinstance(kind, FourBit))
    return next((n for n in states if n in names), None)


def spread(weight: str, encoded: EncodedWeight) -> dict[str, Tensor]:
    """The tensors of ``encoded`` under their names, byte for byte what bitsandbytes' ``state_dict`` gives."""
    return encoded.format.kind.spread(weight, encoded)
