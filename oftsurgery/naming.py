"""How a checkpoint's tensor names and a model's module paths correspond, as transformers itself resolves them.

With transformers installed, the model's class is built on the meta device (names and shapes alone, no weights, no code
of the checkpoint's) and its own renaming tables are applied. Without it the names are taken as they are, which holds
for checkpoints of most text models.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, MatchError, MissingDependencyError, StateError, printable

__all__ = ["Architecture", "architecture_of", "locate"]

# transformers' model types whose linears are `Conv1D`, which holds (in, out)
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True, eq=False)
class Architecture:
    """What the model's class says of a checkpoint's tensors.

    Attributes:
        renamed: ``{name in the checkpoint: name in the model}``, both the same where nothing is renamed.
        converted: names in the checkpoint that transformers merges with others or splits while loading (fused experts).
        transposed: checkpoint names of ``Conv1D`` weights, held ``(in, out)``.
        linears: checkpoint names of the weights that bitsandbytes loading quantises, None where the class is not known.
        loaded: ``{checkpoint name: dtype}`` in which transformers holds a plain tensor after loading; empty where the
            class is not known.
        embeddings: checkpoint names of embedding weights.
        tied: ``{module path that is absent from the checkpoint: checkpoint name of what it shares}``.
        base_prefix: transformers' ``base_model_prefix``; empty where the class is not known.
        name: of the class, or None.
    """

    renamed: Mapping[str, str]
    converted: frozenset[str]
    transposed: frozenset[str]
    linears: frozenset[str] | None
    loaded: Mapping[str, torch.dtype]
    embeddings: frozenset[str]
    tied: Mapping[str, str]
    base_prefix: str
    name: str | None


def architecture_of(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    skip: Sequence[str] | None = None,
) -> Architecture:
    """Resolve the names of a checkpoint.

    Args:
        config: its ``config.json``.
        shapes: ``{tensor name: shape}``.
        dtype: in which the model is loaded; it decides :attr:`Architecture.loaded` alone.
        skip: ``llm_int8_skip_modules`` of bitsandbytes loading, in place of transformers' own choice; it decides
            :attr:`Architecture.linears` alone.
    """
    model = _meta_model(config, dtype, len(shapes))
    if model is None:
        return _unknown(config, shapes)
    return _known(model, shapes, dtype, skip)


def _unknown(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    transposed = frozenset(
        name
        for name in shapes
        if config.get("model_type") in _CONV1D_TYPES and name.endswith(tuple(f"{n}.weight" for n in _CONV1D_NAMES))
    )
    return Architecture(
        renamed=MappingProxyType({name: name for name in shapes}),
        converted=frozenset(),
        transposed=transposed,
        linears=None,
        loaded=MappingProxyType({}),
        embeddings=frozenset(),
        tied=MappingProxyType({}),
        base_prefix="",
        name=None,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# whose code transformers would fetch from the Hub and run, or that has no say in names
_NOT_FOR_NAMES = ("quantization_config", "auto_map", "attn_implementation", "experts_implementation")
_MODULES, _MODULES_PER_TENSOR = 10_000, 10


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without fields that lead to code, here and in its parts."""
    found = {}
    for key, value in config.items():
        if not key.lstrip("_").removesuffix("_internal").startswith(_NOT_FOR_NAMES):
            found[key] = without_code(value) if isinstance(value, Mapping) else value
    return found


@contextlib.contextmanager
def _at_most(count: int) -> Iterator[None]:
    """A model of more modules than ``count`` is not built to its end: a config may ask for 10⁹ layers."""
    from torch.nn.modules.module import register_module_module_registration_hook

    built = 0

    def hook(*_: object) -> None:
        nonlocal built
        built += 1
        if built > count:
            raise CheckpointError(
                "the config asks for many more modules than the checkpoint has tensors",
                tensor="config.json",
                remedy="restore the config.json that belongs to the checkpoint",
            )

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _meta_model(config: Mapping[str, Any], dtype: torch.dtype, tensors: int) -> Any:
    """The model of ``config``'s class on the meta device, in ``dtype``; None without transformers, or where it does not
    know the class.
    """
    if "model_type" not in config:
        return None
    try:
        import transformers
    except ImportError:
        return None
    if not isinstance(config["model_type"], str):
        raise CheckpointError(
            "`model_type` is no string",
            tensor="config.json",
            remedy="restore the config.json that belongs to the checkpoint",
        )
    plain = without_code(config)
    try:
        with quiet(), torch.device("meta"), _at_most(_MODULES_PER_TENSOR * tensors + _MODULES):
            parsed = transformers.AutoConfig.for_model(**plain)
            architectures = config.get("architectures") or []
            cls = getattr(transformers, str(architectures[0]), None) if architectures else None
            if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
                return transformers.AutoModel.from_config(parsed, dtype=dtype)
            known: Any = cls
            return known._from_config(parsed, dtype=dtype)
    except Exception as error:  # a config is data of any kind, and its class raises what it likes
        if str(config["model_type"]) in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
            raise CheckpointError(
                f"transformers knows the model type {printable(config['model_type'])}, but cannot build it from this config ({printable(error)})",
                tensor="config.json",
                remedy="restore the config.json that belongs to the checkpoint",
            ) from error
        return None


def _known(
    model: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, skip: Sequence[str] | None
) -> Architecture:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model) or []
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamed, converted = {}, set()
    for name in shapes:
        # companions (weight.absmax, SCB) follow their weight; the tables know weights alone
        weight, companion = split_companion(name)
        target, pattern = rename_source_key(weight, renamings, converters, model.base_model_prefix, state)
        if target not in state and weight in state:  # as transformers' loading has it
            target, pattern = rename_source_key(weight, [], [], model.base_model_prefix, state)
        renamed[name] = target + companion
        if pattern is not None:
            converted.add(name)
    by_model = {target: name for name, target in renamed.items()}
    modules = dict(model.named_modules())
    transposed, linears, embeddings = set(), set(), set()
    skipped = _not_converted(model, skip)
    for path, module in modules.items():
        stored = by_model.get(f"{path}.weight")
        if stored is None:
            continue
        conv1d = type(module).__name__ == "Conv1D"
        if conv1d:
            transposed.add(stored)
        if isinstance(module, nn.Embedding):
            embeddings.add(stored)
        if (conv1d or type(module) is nn.Linear) and not skipped(path):
            linears.add(stored)
    tied = {
        target.removesuffix(".weight"): by_model[source]
        for target, source in getattr(model, "all_tied_weights_keys", {}).items()
        if target.endswith(".weight") and target not in by_model and source in by_model
    }
    return Architecture(
        renamed=MappingProxyType(renamed),
        converted=frozenset(converted),
        transposed=frozenset(transposed),
        linears=frozenset(linears),
        loaded=MappingProxyType(_loaded(model, renamed, dtype)),
        embeddings=frozenset(embeddings),
        tied=MappingProxyType(tied),
        base_prefix=model.base_model_prefix,
        name=type(model).__name__,
    )


def _loaded(model: Any, renamed: Mapping[str, str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The model's own dtypes, but for what its class keeps in float32."""
    from transformers.core_model_loading import build_glob_alternation

    kept = list(model._get_dtype_plan(dtype))
    is_kept = build_glob_alternation(kept)[0].search if kept else lambda _: None
    state = model.state_dict()
    return {
        name: torch.float32 if is_kept(target) else state[target].dtype
        for name, target in renamed.items()
        if target in state and state[target].is_floating_point()
    }


def _not_converted(model: Any, skip: Sequence[str] | None) -> Callable[[str], bool]:
    """``path -> bool``: what transformers' bitsandbytes loading leaves unquantised."""
    try:
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError as error:
        raise MissingDependencyError(
            "this transformers has no bitsandbytes loading rules to follow", remedy="pip install 'transformers>=5.0'"
        ) from error
    keep = HfQuantizer.get_modules_to_not_convert(
        model, None if skip is None else list(skip), model._keep_in_fp32_modules
    )
    try:
        should_convert_module("", keep)
    except re.error as error:
        raise StateError(
            f"a module to skip is no regular expression, as which transformers takes it ({printable(error)})",
            remedy="name modules: skip_modules=['lm_head'] (--skip-modules lm_head)",
        ) from error
    return lambda path: not should_convert_module(path, keep)


_COMPANIONS = (
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_map",
    ".absmax",
)


def split_companion(name: str) -> tuple[str, str]:
    """``("a.weight", ".absmax")`` for ``"a.weight.absmax"``; ``(name, "")`` for what is no companion of a 4-bit weight."""
    for suffix in _COMPANIONS:
        if name.endswith(".weight" + suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def locate(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """``{name in the adapter: name in the checkpoint}`` for tensor names that an adapter implies (``<module
    path>.weight``) or brings.

    A name is looked for as the checkpoint has it and as the model's class does, there also with transformers'
    ``base_model_prefix`` added or taken away (an adapter of ``LlamaModel`` on a checkpoint of ``LlamaForCausalLM``), by
    one rule for all of the names. What is not found is left out.

    Raises:
        MatchError: one name finds two tensors.
    """
    by_model: dict[str, set[str]] = {}
    for name, target in architecture.renamed.items():
        by_model.setdefault(target, set()).add(name)
    tied = {f"{path}.weight": name for path, name in architecture.tied.items()}
    prefix = f"{architecture.base_prefix}." if architecture.base_prefix else ""
    rules: list[Callable[[str], str]] = [lambda n: n]
    if prefix:
        rules += [lambda n: prefix + n, lambda n: n.removeprefix(prefix)]
    wanted = list(names)
    best: dict[str, str] = {}
    for rule in rules:
        found: dict[str, str] = {}
        for name in wanted:
            here = set(by_model.get(rule(name), ()))
            here |= {rule(name)} if rule(name) in architecture.renamed else set()
            here |= (
                by_model[architecture.renamed[rule(name)]] - architecture.converted
                if rule(name) in architecture.renamed
                else set()
            )
            if not here and rule(name) in tied:
                here = {tied[rule(name)]}
            if len(here) > 1:
                raise MatchError(
                    f"the checkpoint has two tensors by that name: {', '.join(sorted(map(printable, here)))}",
                    tensor=name,
                    remedy="save the checkpoint again with one release of transformers",
                )
            found.update(dict.fromkeys([name], *here) if here else {})
        if len(found) > len(best):
            best = found
        if len(found) == len(wanted):
            break
    return best
