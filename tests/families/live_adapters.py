"""The adapters of a sweep, which peft makes, trains and saves, and peft's live model of an adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bench import distance, doubled, outputs
from checkpoints import decoded, rotations_in, unpacked
from family import Family
from peft import OFTConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

#: names that linears of attention have
ATTENTION = re.compile(
    r"(q|k|v)(_proj|_lin)?|query|key|value|c_attn|W?qkv(_proj)?|query_key_value|(query|key|value)_proj|q_[ab]_proj"
    r"|kv_a_proj_with_mqa"
)


#: ends of class names, and peft's tasks, which save the heads that peft knows
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((path for path, m in model.named_modules() if m is wanted), "")


def called_modules(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[nn.Module]:
    """The modules that the forward calls."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in model.modules()]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return called


def head_path(family: Family, model: Any) -> str:
    return family.head or path_of(model, model.get_output_embeddings())


def embedding_path(family: Family, model: Any) -> str:
    """The path of the input embeddings; if several modules hold their weight, the path of the module that the forward calls."""
    if family.embedding:
        return family.embedding
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return ""
    if not isinstance(found, nn.Module):
        return ""
    weight = getattr(found, "weight", None)
    same = [
        m
        for m in model.modules()
        if weight is not None and getattr(m, "weight", None) is weight and type(m) is type(found)
    ]
    called = called_modules(model, family.inputs)
    return path_of(model, next((m for m in same if m in called), found))


def short_name(model: nn.Module, path: str) -> str:
    """The last part of a path, as people write targets, if only this module has such a name; else the path."""
    leaf = path.rpartition(".")[2]
    return leaf if sum(p == leaf or p.endswith(f".{leaf}") for p, _ in model.named_modules()) == 1 else path


def linears_of(family: Family, model: nn.Module) -> tuple[list[str], bool]:
    """Paths of the linears that peft can rotate, and whether these are all linears: peft 0.21 takes an input of four
    dimensions for an image, and raises an error.
    """
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    images: set[nn.Module] = set()

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].ndim == 4:
            images.add(module)

    hooks = [m.register_forward_pre_hook(note) for m in linears.values()]
    outputs(model, family.inputs)
    for hook in hooks:
        hook.remove()
    return [p for p, m in linears.items() if m not in images], not images


def all_linears(family: Family, model: Any, head: str) -> str | list[str]:
    """``"all-linear"``, or paths if peft raises an error at this value: peft asks for the input embeddings, which not every class
    has.
    """
    if not isinstance(family.linears, str):
        return list(family.linears)
    linears, all_of_them = linears_of(family, model)
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        all_of_them = False
    return family.linears if all_of_them else [p for p in linears if p != head]


def adapter_settings(family: Family, model: Any, which: str) -> dict[str, Any] | None:
    """peft's settings of the adapter; None if the family lacks the part that the adapter trains."""
    head, embedding = head_path(family, model), embedding_path(family, model)
    if which == "linears":
        return {"target_modules": all_linears(family, model, head)}
    linears = [p for p in linears_of(family, model)[0] if p != head]
    names = sorted({n for p in linears if ATTENTION.fullmatch(n := p.rpartition(".")[2])})
    targets = names or (list(family.linears) if isinstance(family.linears, tuple) else linears)
    if which == "ends rotated":
        modules = dict(model.named_modules())
        ends = [
            short_name(model, p) for p in (embedding, head) if p and isinstance(modules[p], (nn.Embedding, nn.Linear))
        ]
        return {"target_modules": [*targets, *ends]} if ends else None
    saved = head if which == "head saved" else embedding
    if not saved:
        return None
    task = next((task for end, task in TASKS.items() if family.cls.endswith(end)), None)
    heads = ("qa_outputs",) if task == "QUESTION_ANS" else ("classifier", "score")
    if which == "head saved" and task and head in heads:
        return {"target_modules": targets, "task_type": task}  # peft saves the head by itself
    return {"target_modules": targets, "modules_to_save": [short_name(model, saved)]}


def saved_adapter(base: Any, settings: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Write an adapter with random changes of all trained tensors, by peft's ``save_pretrained``; the result is these tensors."""
    live = get_peft_model(base, OFTConfig(oft_block_size=16, use_cayley_neumann=True, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.04 if "oft_" in name else 0.05))
    live.save_pretrained(folder)
    return trained(live)


def trained(live: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in live.named_parameters() if "oft_" in n or ".modules_to_save." in n}


class Live:
    """The facts about a live model: its tensors by the plain model's names, its outputs, and the layers that it never calls."""

    def __init__(
        self, model: PeftModel, names: list[str], adapter: Path, inputs: Mapping[str, Tensor], *, plain: bool
    ) -> None:
        self.model, self.inputs = model, inputs
        self.rotations = rotations_in(adapter)
        self.values = {name: self._value(name) for name in names}
        model.eval()
        reference = doubled(model) if plain else unpacked(model)
        self.wanted = outputs(reference, inputs)
        self.must_stay = self._read_and_not_called()

    def _module(self, path: str) -> Any:
        module: Any = self.model.base_model.model
        for part in path.split(".") if path else []:
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                module = module.modules_to_save["default"]
        return module

    def _value(self, name: str) -> tuple[Tensor, bool]:
        """The tensor, and whether it is rotated (then in float64)."""
        path, _, leaf = name.rpartition(".")
        module = self._module(path)
        inner = module.base_layer if hasattr(module, "base_layer") else module
        if leaf != "weight" or path not in self.rotations:
            return getattr(inner, leaf).detach(), False
        if isinstance(inner, nn.Embedding):
            return inner.weight.detach().double() @ self.rotations[path], True
        return decoded(inner.state_dict(), "weight") @ self.rotations[path].T, True

    def _read_and_not_called(self) -> set[str]:
        """Paths of targeted layers that the forward does not call and whose weight the forward reads. ``unused`` has the other
        layers that the forward does not call: these layers take no part for the given inputs.
        """
        called = called_modules(self.model, self.inputs)
        idle = [p for p in self.rotations if self._module(p) not in called]
        before = outputs(self.model, self.inputs)
        found = {path for path in idle if self._is_read(self._module(path).base_layer, before)}
        self.unused = set(idle) - found
        return found

    def _is_read(self, layer: nn.Module, before: list[Tensor]) -> bool:
        """Whether the outputs depend on the layer's own weight, apart from other layers that share the weight."""
        kept = layer.weight
        layer.weight = copy.deepcopy(kept)
        layer.weight.data.zero_()
        after = outputs(self.model, self.inputs)
        layer.weight = kept
        return distance(after, before) > 0
