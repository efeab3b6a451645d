"""The table of layers that nobody calls, against the source of the transformers that is installed."""

from __future__ import annotations

import ast
import importlib.resources
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from oftsurgery.stores.idle import _READ, is_idle

LAYERS = {"nn.Linear", "nn.Embedding", "nn.Conv2d", "Conv1D"}


def read_and_never_called() -> Iterator[tuple[str, str]]:
    """(class, attribute) of layers whose class takes their weight and nowhere calls them."""
    for path in sorted(importlib.resources.files("transformers").joinpath("models").glob("*/modeling_*.py")):  # type: ignore[attr-defined]
        for owner in (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)):
            made, read, called = set(), set(), set()
            for node in ast.walk(owner):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    if ast.unparse(node.value.func) in LAYERS:
                        made |= {t.attr for t in node.targets if own(t)}  # type: ignore[attr-defined]
                elif isinstance(node, ast.Call) and own(node.func):
                    called.add(node.func.attr)  # type: ignore[attr-defined]
                elif isinstance(node, ast.Attribute) and node.attr == "weight" and own(node.value):
                    read.add(node.value.attr)  # type: ignore[attr-defined]
            yield from ((owner.name, name) for name in sorted((made & read) - called))


def own(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


@pytest.mark.slow
def test_the_table_has_all_that_transformers_reads_and_never_calls() -> None:
    found = list(read_and_never_called())
    assert len(found) > 80
    assert [(owner, name) for owner, name in found if owner not in _READ.get(name, ())] == []


def test_what_the_owner_calls_is_not_idle() -> None:
    attention = nn.MultiheadAttention(8, 2)
    modules = dict(nn.ModuleDict({"a": attention, "b": nn.Sequential(nn.Linear(8, 8))}).named_modules())
    assert is_idle(modules, "a.out_proj", quantised=False)
    assert not is_idle(modules, "b.0", quantised=False)


def test_what_is_called_only_where_quantised() -> None:
    class JambaMambaMixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dt_proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.dt_proj.weight.t()

    modules = dict(nn.ModuleDict({"mixer": JambaMambaMixer()}).named_modules())
    assert is_idle(modules, "mixer.dt_proj", quantised=False)
    assert not is_idle(modules, "mixer.dt_proj", quantised=True)
