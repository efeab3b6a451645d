"""Weights that an adapter of the other layout rotates together, or in parts, for the checks: each step is done on the rows as the
trainer's model had them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from oftsurgery.adapters.weight_map import WeightMap

from . import measures
from .tool_names import Rows


class RowGroups:
    """The weights that belong together in an adapter, with the steps on them.

    Args:
        steps: ``(rows, map)`` of all modules of all adapters, in the live order.
    """

    def __init__(self, steps: Sequence[tuple[Rows, WeightMap]]) -> None:
        self._steps = list(steps)
        self._of: dict[str, frozenset[str]] = {}
        for rows, _ in self._steps:
            if not rows.plain:
                whole = frozenset(rows.paths).union(*(self._of.get(path, frozenset()) for path in rows.paths))
                self._of |= dict.fromkeys(whole, whole)

    def of(self, path: str) -> frozenset[str]:
        """The paths of all weights that the weight at ``path`` is rotated with; empty for a weight that is rotated alone."""
        return self._of.get(path, frozenset())

    def turns_bias(self, path: str) -> bool:
        return any(weight_map.turns_bias for rows, weight_map in self._steps if {*rows.paths} & self.of(path))

    def rotated(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{path: exact float64 weight}`` of the weights ``{path: (out, in)}`` of one group."""
        found = {path: weight.to("cpu", torch.float64) for path, weight in weights.items()}
        own = [(rows, m) for rows, m in self._steps if {*rows.paths} & found.keys()]
        inputs = [step for step in own if step[1].side == "input"]
        for rows, weight_map in [step for step in own if step[1].side != "input"] + inputs[::-1]:
            step = partial(measures.rotated, chain=[weight_map], module=rows.paths[0], kernel=())
            found |= _on_rows(found, rows, sizes_of(rows, weights), step)
        return found

    def rotated_biases(self, biases: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of the biases ``{path: (out,)}`` of one group."""
        found = {path: bias.to("cpu", torch.float64) for path, bias in biases.items()}
        for rows, weight_map in self._steps:
            if {*rows.paths} <= found.keys() and weight_map.turns_bias:
                step = partial(measures.rotated_bias, chain=[weight_map])
                found |= _on_rows(found, rows, sizes_of(rows, weights), step)
        return found


def sizes_of(rows: Rows, weights: Mapping[str, Tensor]) -> list[int]:
    """The numbers of rows of the parts of a fused weight: equal, or three projections and the MLP of Flux' single blocks."""
    out, features = weights[rows.paths[0]].shape
    return [features, features, features, out - 3 * features] if rows.count == 4 else [out // rows.count] * rows.count


def _on_rows(
    tensors: Mapping[str, Tensor], rows: Rows, sizes: Sequence[int], step: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The tensors of ``rows`` after ``step`` on these rows."""
    if rows.part is not None:
        parts = list(torch.split(tensors[rows.paths[0]], list(sizes)))
        parts[rows.part] = step(parts[rows.part])
        return {rows.paths[0]: torch.cat(parts)}
    whole = torch.cat([tensors[path] for path in rows.paths])
    turned = step(_halves(whole)) if rows.swapped else step(whole)
    turned = _halves(turned) if rows.swapped else turned
    return dict(zip(rows.paths, torch.split(turned, [len(tensors[path]) for path in rows.paths]), strict=True))


def _halves(tensor: Tensor) -> Tensor:
    """The tensor with its two halves of rows in the other order."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
