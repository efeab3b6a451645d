"""The weights of a base that an adapter's modules rotate, in float64, for the checks of an adapter without a fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import MatchError
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import WeightFormat
from oftsurgery.stores.store import Store

from .row_groups import sizes_of
from .tool_names import Rows, ToolNames, flat_name


class BaseWeights:
    """The rows that each module of an adapter rotates.

    Args:
        parts: ``(part of the adapter, model of this part)``: one, or one for each component of a pipeline.
    """

    def __init__(self, parts: Sequence[tuple[OFTAdapter, Store]]) -> None:
        self._stores = {path: store for adapter, store in parts for path in adapter.modules}
        self._names = {id(store): ToolNames(store.tensors) for _, store in parts}

    def swapped(self, path: str) -> bool:
        """Whether the module has a name of diffusers, and the original layout holds the halves of its rows in the other order."""
        return flat_name(path) in self._names[id(self._stores[path])].swapped

    def __call__(self, path: str) -> tuple[Tensor, tuple[int, ...]]:
        """``(rows, rest)`` float64 of the module ``path``, and the kernel ``(kh, kw)`` of a convolution.

        Raises:
            MatchError: the base has no such module.
        """
        store = self._stores[path]
        own = store.locate([f"{path}.weight"]).get(f"{path}.weight")
        rows = Rows((own.removesuffix(".weight"),)) if own is not None else self._names[id(store)].rows(path)
        weights = (
            {} if rows is None else {p: store.weight(f"{p}.weight", WeightFormat("dense", ())) for p in rows.paths}
        )
        if rows is None or any(w is None for w in weights.values()):
            message = "the base has no module of this name"
            raise MatchError(message, module=path, remedy="give the base that the adapter was trained on")
        kernel = tuple(store.shape(f"{rows.paths[0]}.weight")[2:])
        plain = {p: codecs.decode(w).to("cpu", torch.float64) for p, w in weights.items() if w is not None}
        plain = {p: w.reshape(len(w), -1) for p, w in plain.items()}
        if rows.part is not None:
            return torch.split(plain[rows.paths[0]], sizes_of(rows, plain))[rows.part], kernel
        whole = torch.cat([plain[p] for p in rows.paths])
        return (torch.cat(whole.chunk(2)[::-1]) if rows.swapped else whole), kernel
