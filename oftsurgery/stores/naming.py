"""How a checkpoint's tensor names and a model's module paths correspond, as transformers itself resolves them.

With transformers installed, the model's class is built on the meta device (names and shapes alone, no weights, and no
code of the checkpoint), and transformers' renaming tables are applied. Without transformers the names stay unchanged,
which is right for checkpoints of most text models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from oftsurgery.errors import MatchError, StateError, printable
from oftsurgery.formats.checkpoint_tensors import owner_of

from . import image_models
from .conversion import Unit, unit_of
from .layouts import Layout, find_names, image_layouts, layouts_of
from .modules import modules_of
from .single_file import as_of_module, is_transposed, single_file_layouts
from .skeleton import skeleton
from .ties import Ties, ties_of

# transformers' model types whose linears are `Conv1D`, which holds (in, out)
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_NAMES = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")


@dataclass(frozen=True, eq=False)
class Architecture:
    """The facts about a checkpoint's tensors that the model's class gives.

    Attributes:
        renamed: ``{name in the checkpoint: name in the model}``; both are the same if nothing is renamed.
        units: ``{name in the checkpoint: its unit}`` of the tensors that transformers converts while loading.
        transposed: checkpoint names of weights that are held ``(in, out)``: of ``Conv1D``, and OpenCLIP's ``text_projection``.
        linears: model names of the weights that bitsandbytes loading quantises; None for an unknown class.
        quantised_with: function from a list ``llm_int8_skip_modules`` to such names; None for an unknown class.
        loaded: ``{checkpoint or model name: dtype}`` of plain tensors after transformers' loading; empty for an unknown
            class.
        modules: ``{path: module}`` of the model on the meta device; empty for an unknown class.
        ties: ties of the model.
        layouts: the layouts of the class, from :func:`~oftsurgery.stores.layouts.layouts_of`.
        name: name of the class, or None.
    """

    renamed: Mapping[str, str]
    units: Mapping[str, Unit] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    linears: frozenset[str] | None = None
    quantised_with: Callable[[Sequence[str] | None], frozenset[str]] | None = None
    loaded: Mapping[str, torch.dtype] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    ties: Ties = field(default_factory=Ties)
    layouts: tuple[Layout, ...] = (str,)
    name: str | None = None

    @cached_property
    def stored(self) -> Mapping[str, tuple[str, ...]]:
        """``{model name: names in the checkpoint that are renamed to it}``, without names of units."""
        found: dict[str, tuple[str, ...]] = {}
        for name, target in self.renamed.items():
            if name not in self.units:
                found[target] = (*found.get(target, ()), name)
        return found

    @cached_property
    def made(self) -> Mapping[str, Unit]:
        """``{model name: the unit that gives it}``."""
        return {name: unit for unit in self.units.values() for name in unit.model}

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """``{model name that the checkpoint lacks: tied name that the checkpoint has}``."""
        there = self.stored.keys() | self.made.keys()
        found: dict[str, str] = {}
        for group in self.ties.groups:
            holder = next((n for n in group if n in there), None)
            if holder is not None:
                found |= {n: holder for n in group if n not in there}
        return found


def architecture_of(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    skip: Sequence[str] | None = None,
) -> Architecture:
    """Resolve the names of a checkpoint.

    Args:
        config: the checkpoint's ``config.json``.
        shapes: ``{tensor name: shape}``.
        dtype: dtype in which the model is loaded; only :attr:`Architecture.loaded` depends on it.
        skip: ``llm_int8_skip_modules`` of bitsandbytes loading, in place of transformers' own choice; only
            :attr:`Architecture.linears` depends on it.
    """
    model = skeleton(config, dtype, len(shapes))
    if model is None:
        ends = CONV1D_NAMES if config.get("model_type") in _CONV1D_TYPES else ()
        plain = "model_type" in config
        renamed = {name: name if plain else as_of_module(name) for name in shapes}
        turned = (name for name in shapes if (name.endswith(ends) if plain else is_transposed(name)))
        weights = [name.removesuffix(".weight") for name in renamed.values() if name.endswith(".weight")]
        return Architecture(
            renamed,
            transposed=frozenset(turned),
            layouts=(
                str,
                *(image_layouts(weights, encoder=True) if plain else single_file_layouts(weights)),
            ),
        )
    return names_of(model, shapes, dtype, skip)


def names_of(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    skip: Sequence[str] | None = None,
) -> Architecture:
    """The names of a checkpoint's tensors in ``model``, which is on the meta device. Arguments as for :func:`architecture_of`."""
    if not hasattr(model, "base_model_prefix"):
        return _names_of_image_model(model, shapes, dtype, skip)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model) or []
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    renamed: dict[str, str] = {}
    converted: dict[str, tuple[Any, dict[str, tuple[str, str]]]] = {}
    for name in shapes:
        # companions (weight.absmax, SCB) follow their weight; the tables know weights alone
        owner = owner_of(name)
        weight = owner if owner is not None and owner in shapes else name
        target, pattern = rename_source_key(weight, renamings, converters, model.base_model_prefix, state)
        if target not in state and weight in state:  # as transformers' loading does
            target, pattern = rename_source_key(weight, [], [], model.base_model_prefix, state)
        rest = name.removeprefix(weight.removesuffix("weight"))
        renamed[name] = target if weight == name else target.removesuffix("weight") + rest
        if pattern is not None:
            _, keys = converted.setdefault(target, (by_pattern[pattern], {}))
            keys[name] = (rename_source_key(weight, renamings, [])[0], target)
    units: dict[str, Unit] = {}
    for converter, keys in converted.values():
        units |= dict.fromkeys(keys, unit_of(converter, keys, shapes, state, model))
    modules = modules_of(model)
    conv1d = {path for path, m in modules.items() if type(m).__name__ == "Conv1D"}

    return Architecture(
        renamed=renamed,
        units=units,
        transposed=frozenset(n for n, target in renamed.items() if target.removesuffix(".weight") in conv1d),
        linears=quantised_with(model, modules, skip),
        quantised_with=partial(quantised_with, model, modules),
        loaded=_loaded(model, renamed, dtype),
        modules=modules,
        ties=ties_of(model),
        layouts=layouts_of(model),
        name=type(model).__name__,
    )


def _names_of_image_model(
    model: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, skip: Sequence[str] | None
) -> Architecture:
    """:func:`names_of` for a model of diffusers, whose tensors have the same names on disk."""
    modules = modules_of(model)
    return Architecture(
        renamed={name: name for name in shapes},
        linears=quantised_with(model, modules, skip),
        quantised_with=partial(quantised_with, model, modules),
        loaded=image_models.loaded_dtypes(model, dtype),
        modules=modules,
        ties=ties_of(model),
        layouts=layouts_of(model),
        name=type(model).__name__,
    )


def quantised_with(model: Any, modules: Mapping[str, nn.Module], skip: Sequence[str] | None) -> frozenset[str]:
    """The names of the weights that bitsandbytes loading quantises in a model of transformers or of diffusers.

    Args:
        modules: ``{path: module}`` of the model.
        skip: ``llm_int8_skip_modules``; None for transformers' own choice.
    """
    if not hasattr(model, "base_model_prefix"):
        left = image_models.not_converted(model, skip)
        return frozenset(f"{p}.weight" for p, m in modules.items() if isinstance(m, nn.Linear) and not left(p))
    skipped = _not_converted(model, skip)
    linears = (path for path, m in modules.items() if type(m).__name__ == "Conv1D" or type(m) is nn.Linear)
    return frozenset(f"{path}.weight" for path in linears if not skipped(path))


def _loaded(model: Any, renamed: Mapping[str, str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The model's own dtypes, with float32 for the tensors that its class keeps in float32."""
    from transformers.core_model_loading import build_glob_alternation

    kept = list(model._get_dtype_plan(dtype))
    is_kept = build_glob_alternation(kept)[0].search if kept else lambda _: None
    state = model.state_dict()
    names = {**{target: target for target in state}, **renamed}
    return {
        name: torch.float32 if is_kept(target) else state[target].dtype
        for name, target in names.items()
        if target in state and state[target].is_floating_point()
    }


def _not_converted(model: Any, skip: Sequence[str] | None) -> Callable[[str], bool]:
    """A function of a path: whether transformers' bitsandbytes loading leaves the module unquantised."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    with _untied(model):
        keep = HfQuantizer.get_modules_to_not_convert(
            model, None if skip is None else list(skip), model._keep_in_fp32_modules
        )
    try:
        should_convert_module("", keep)
    except re.error as error:
        message = f"a module to skip is no regular expression: {printable(list(skip or ()))} ({printable(error)})"
        raise StateError(message, remedy="name modules: skip_modules=['lm_head'] (--skip-modules lm_head)") from error
    return lambda path: not should_convert_module(path, keep)


@contextmanager
def _untied(model: Any) -> Iterator[None]:
    """While the body runs, each tied name has a parameter of its own: transformers' quantizer leaves the module of the last
    parameter alone, and chooses before transformers ties the weights.
    """
    tied: dict[str, Any] = {}
    for name in model.all_tied_weights_keys:
        path, _, local = name.rpartition(".")
        slots = model.get_submodule(path)._parameters
        if slots.get(local) is not None:
            tied[name] = (slots, local, slots[local])
            slots[local] = nn.Parameter(torch.empty_like(slots[local], device="meta"), requires_grad=False)
    try:
        yield
    finally:
        for slots, local, parameter in tied.values():
            slots[local] = parameter


def locate(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """``{name in the adapter: name of the tensor}`` for tensor names that an adapter implies (``<module path>.weight``)
    or brings. The tensor has its name in the model's class, or its checkpoint name if transformers converts the tensor.

    Raises:
        MatchError: a name finds two tensors.
    """

    known = {*architecture.stored, *architecture.made, *architecture.tied}

    def called(name: str) -> set[str]:
        here = {name} & known
        if name in architecture.units:
            here = here or {name}
        elif name in architecture.renamed:
            here.add(architecture.renamed[name])
        stored = [n for target in here for n in architecture.stored.get(target, (target,))]
        if len(stored) > 1:
            message = (
                f"the checkpoint has {len(stored)} tensors of this name: {', '.join(sorted(map(printable, stored)))}"
            )
            raise MatchError(message, tensor=name, remedy="save the checkpoint again with one release of transformers")
        return here

    return find_names(names, called, architecture.layouts)
