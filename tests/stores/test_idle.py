"""Which layers nobody calls: by the code of a class, against code of transformers and code that is hard to tell."""

from __future__ import annotations

import ast
import importlib
import importlib.resources
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from oftsurgery.stores.idle import is_idle

LAYERS = {"nn.Linear", "nn.Embedding", "nn.Conv2d", "Conv1D"}


def read_and_never_called() -> Iterator[tuple[str, str, str]]:
    """(model type, class, attribute) of layers whose class takes their weight and nowhere calls them."""
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
            yield from ((f"{path.parent.name}.{path.stem}", owner.name, n) for n in sorted((made & read) - called))


def own(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


@pytest.mark.slow
def test_all_that_transformers_reads_and_never_calls_is_idle() -> None:
    found = list(read_and_never_called())
    assert len(found) > 80
    missed = []
    for module, owner, name in found:
        cls = getattr(importlib.import_module(f"transformers.models.{module}"), owner)
        modules = {"": cls.__new__(cls), name: nn.Linear(1, 1)}
        if not is_idle(modules, name, quantised=False):
            missed.append((owner, name))
    # its weight is another tensor's when it is made, and nothing reads it after that
    assert missed == [("SeamlessM4Tv2TextToUnitDecoder", "embed_tokens")]


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

        def forward(self, x: Tensor) -> Tensor:
            return self.dt_proj(x) if hasattr(self, "quantised") else x @ self.dt_proj.weight.t()

    modules = dict(nn.ModuleDict({"mixer": JambaMambaMixer()}).named_modules())
    assert is_idle(modules, "mixer.dt_proj", quantised=False)
    assert not is_idle(modules, "mixer.dt_proj", quantised=True)


def test_layers_in_a_list_whose_weights_are_read() -> None:
    config = transformers.SamConfig().prompt_encoder_config
    with torch.device("meta"):
        encoder = transformers.models.sam.modeling_sam.SamPromptEncoder(transformers.SamConfig())
    assert config.hidden_size == encoder.no_mask_embed.embedding_dim
    modules = dict(encoder.named_modules())
    layers = [path for path, m in modules.items() if isinstance(m, nn.Embedding)]
    idle = {path for path in layers if is_idle(modules, path, quantised=False)}
    assert idle == {"no_mask_embed", "not_a_point_embed", *(f"point_embed.{i}" for i in range(4))}


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


class Reads(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.layer.weight, self.layer.bias)


class ReadsByAnother(Layered):
    """Of a base class, behind a decorator, in a function within."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return (lambda: self.part(x))()

    def part(self, x: Tensor) -> Tensor:
        assert self.layer is not None
        assert isinstance(self.layer, nn.Linear)
        return x.to(self.layer.weight.dtype) @ self.layer.weight


class Inherits(ReadsByAnother):
    pass


class Calls(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype)) @ self.layer.weight


class CallsInHeir(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.layer(x)


class AsksForFacts(Layered):
    """The layer is called by whoever holds this module."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.layer.weight.dtype).to(self.layer.weight.device)


class PassesOn(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layer, x + self.layer.weight.sum(), use_reentrant=False)


class Ties(Layered):
    def tie_weights(self) -> None:
        self.other = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return x


class HeldBy(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


class CallsOfPart(HeldBy):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.layer(x)


class CallsOfEach(HeldBy):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(nn.ModuleList([part]))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.part:
            x = part.layer(x)
        return x


class Hands(HeldBy):
    def get_output_embeddings(self) -> nn.Module:
        return self.part.layer


#: module → whether its `layer` is idle
CODE: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "reads": (Reads, True),
    "reads in parts": (ReadsByAnother, True),
    "inherits": (Inherits, True),
    "calls": (Calls, False),
    "calls in an heir": (CallsInHeir, False),
    "asks for facts": (AsksForFacts, False),
    "passes on": (PassesOn, False),
    "ties": (Ties, False),
    "called from above": (lambda: CallsOfPart(Reads()), False),
    "called from above, of each": (lambda: CallsOfEach(Reads()), False),
    "handed out": (lambda: Hands(Reads()), True),
    "of the same name": (lambda: HeldBy(CallsOfPart(nn.Sequential(nn.Linear(1, 1)))), False),
}


@pytest.mark.parametrize("name", CODE)
def test_code_is_told(name: str) -> None:
    make, idle = CODE[name]
    modules = dict(make().named_modules())
    path = next(p for p, m in modules.items() if isinstance(m, nn.Linear))
    assert is_idle(modules, path, quantised=False) is idle


def test_code_without_a_source_is_not_idle() -> None:
    names: dict[str, Any] = {"Layered": Layered}
    exec("class Made(Layered):\n    def forward(self, x):\n        return x @ self.layer.weight", names)  # noqa: S102
    modules = dict(names["Made"]().named_modules())
    assert not is_idle(modules, "layer", quantised=False)
