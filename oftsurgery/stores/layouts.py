"""Other names of a model's tensors: in other classes with the same tensors, and in other releases of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from oftsurgery.files.wrappers import without_module

from .image_names import ImageNames
from .modules import modules_of, tensors_in

#: a function from a name elsewhere to the name in the model
Layout = Callable[[str], str]

#: the names that multimodal models of transformers give to the language model in them
_AROUND_TEXT = re.compile(r"^(model\.)?(language_model|text_model)\.")


def layouts_of(model: Any) -> tuple[Layout, ...]:
    """The layouts of the classes that share the model's tensors: the model's own class; the class of its base, or a class with
    a head over the base (``LlamaModel``, ``LlamaForCausalLM``); and the class of the language model in a multimodal model, or
    of a multimodal model around the language model (``Gemma3ForCausalLM``, ``Gemma3ForConditionalGeneration``).
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    own: tuple[Layout, ...] = (str, prefix.__add__, lambda name: name.removeprefix(prefix))
    # DDP puts `module` in front of names
    own += (without_module, lambda name: prefix + without_module(name))
    own += image_layouts(_weighted(model), encoder=is_encoder(model))
    inside = list(_language_models(model))
    if not inside:
        return own + tuple(partial(_taken_out, rule=rule) for rule in own)
    return own + tuple(partial(_put_in, before=before, after=f"{path}.") for path, before in inside)


def is_encoder(model: Any) -> bool | None:
    """Whether a model is of transformers, as the text encoders of image models are, and not of diffusers; None for another model."""
    return True if hasattr(model, "base_model_prefix") else False if hasattr(model, "_internal_dict") else None


def image_layouts(modules: Iterable[str], *, encoder: bool | None) -> tuple[Layout, ...]:
    """The layouts of image tools: prefixes and flattened paths, in the model's own layout and in the other one."""
    names = ImageNames(modules, encoder=encoder)
    return tuple(partial(names.in_model, layout=i) for i in (0, 1))


def _weighted(model: Any) -> Iterator[str]:
    """The paths of the modules that have weights."""
    return (path for path, module in modules_of(model).items() if module._parameters.get("weight") is not None)


def _taken_out(name: str, rule: Layout) -> str:
    """The name, by ``rule``, of a multimodal model's tensor in the language model alone; other names stay unchanged."""
    found = _AROUND_TEXT.sub("", name)
    return name if found == name else rule(found)


def _put_in(name: str, before: str, after: str) -> str:
    """The name of a language model's tensor in the multimodal model; other names stay unchanged."""
    return after + name.removeprefix(before) if name.startswith(before) else name


def _language_models(model: Any) -> Iterator[tuple[str, str]]:
    """``(path, prefix)`` of each language model in a multimodal model: its path there, and the prefix of its names elsewhere."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # the config is not transformers', or has several language models
        return
    if text is config:
        return
    modules: Any = modules_of(model)
    for path, module in modules.items():
        if path and getattr(module, "config", None) is text and hasattr(module, "base_model_prefix"):
            yield path, f"{module.base_model_prefix}."
            if module.get_output_embeddings() is not None:  # the module is a whole model with a head
                yield path, ""


def find_names(
    names: Iterable[str], called: Callable[[str], Collection[str]], layouts: Sequence[Layout]
) -> dict[str, str]:
    """``{name: name of the model's tensor}`` by one layout for all names: the layout that finds the most. Names that the layout
    does not find are left out.

    Args:
        called: a function from a name to the tensors of this name, which are one or none.
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
    """A function from a tensor's name in a file, also in a file of an earlier release, to the name under which transformers
    loads the tensor into this live model.
    """
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
