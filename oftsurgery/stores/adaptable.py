""":func:`adaptable_of` finds the modules of a model that peft could put an adapter on, from the modules alone, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from oftsurgery.adapters.targets import Adaptable

from .modules import tensors_in


def adaptable_of(modules: Mapping[str, nn.Module]) -> Adaptable:
    """The adaptable modules of ``{path: module}``, which has every path of a shared module.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Embedding(8, 4))
    >>> found = adaptable_of(dict(model.named_modules()))
    >>> found.linears, found.others
    (('0',), ('2',))
    """
    first: dict[int, str] = {}
    others: dict[str, str] = {}
    for path, module in modules.items():
        if first.setdefault(id(module), path) != path:
            others[path] = first[id(module)]
    alone = {path: modules[path] for path in first.values()}
    linears = tuple(p for p, m in alone.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    parts = [name.split(".") for name in tensors_in(modules)]
    root: Any = modules.get("")
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    return Adaptable(
        linears=linears,
        others=tuple(path for path, m in alone.items() if isinstance(m, (nn.Embedding, nn.Conv2d))),
        holders=tuple(dict.fromkeys(".".join(part[:i]) for part in parts for i in range(1, len(part)))),
        first=others,
        head=first.get(id(head)),
        name=None if root is None else type(root).__name__,
    )
