"""What a model's tensors are called elsewhere: in other classes that share them, and in other releases of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from oftsurgery.files.wrappers import without_module

from .modules import modules_of, tensors_in

#: turns a name into the model's own
Layout = Callable[[str], str]

#: what multimodal models of transformers call the language model in them
_AROUND_TEXT = re.compile(r"^(model\.)?(language_model|text_model)\.")


def layouts_of(model: Any) -> tuple[Layout, ...]:
    """What the model's tensors are called in the classes that share them: the model's own, its base or one with a head over
    it (``LlamaModel``, ``LlamaForCausalLM``), and the language model in a multimodal one, or a multimodal one around it
    (``Gemma3ForCausalLM``, ``Gemma3ForConditionalGeneration``).
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    own: tuple[Layout, ...] = (str, prefix.__add__, lambda name: name.removeprefix(prefix))
    # DDP puts `module` before the names
    own += (without_module, lambda name: prefix + without_module(name))
    inside = list(_language_models(model))
    if not inside:
        return own + tuple(partial(_taken_out, rule=rule) for rule in own)
    return own + tuple(partial(_put_in, before=before, after=f"{path}.") for path, before in inside)


def _taken_out(name: str, rule: Layout) -> str:
    found = _AROUND_TEXT.sub("", name)
    return name if found == name else rule(found)


def _put_in(name: str, before: str, after: str) -> str:
    return after + name.removeprefix(before) if name.startswith(before) else name


def _language_models(model: Any) -> Iterator[tuple[str, str]]:
    """``(path, prefix)`` of the language models in a multimodal one, and of their names in a class of their own."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # no config of transformers', or one of several texts
        return
    if text is config:
        return
    modules: Any = modules_of(model)
    for path, module in modules.items():
        if path and getattr(module, "config", None) is text and hasattr(module, "base_model_prefix"):
            yield path, f"{module.base_model_prefix}."
            if module.get_output_embeddings() is not None:  # the whole class of its own
                yield path, ""


def find_names(
    names: Iterable[str], called: Callable[[str], Collection[str]], layouts: Sequence[Layout]
) -> dict[str, str]:
    """Look for names in each layout, by one for all of the names. What is not found is left out.

    Args:
        called: a name to the tensor that it is the name of, if there is one.
    """
    wanted = list(names)
    best: dict[str, str] = {}
    for layout in layouts:
        found = {name: target for name in wanted for target in called(layout(name))}
        if len(found) > len(best):
            best = found
        if len(found) == len(wanted):
            break
    return best


def names_in_model(model: Any) -> Callable[[str], str]:
    """How transformers reads tensor names of files, also those of earlier releases, for this live model."""
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    renamings = [t for t in get_model_conversion_mapping(model) or [] if isinstance(t, WeightRenaming)]
    state = tensors_in(modules_of(model))
    return lambda name: str(rename_source_key(name, renamings, [], model.base_model_prefix, state)[0])
