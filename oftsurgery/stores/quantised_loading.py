"""Which modules transformers quantises as it loads a checkpoint in 4 or 8 bits, by its own rules, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from oftsurgery.errors import FormatError, StateError, printable
from oftsurgery.formats.checkpoint_tensors import companion_names, is_companion

from .naming import Architecture, names_of
from .skeleton import skeleton

#: ``{name of a tensor: (dtype, shape)}``
Written = Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]]

_SKIP = "llm_int8_skip_modules"
_REMEDY = "write the weights dequantised: format='bf16' with quantize='nf4' (--format bf16 --quantize nf4)"


def loadable_config(config: Mapping[str, Any], written: Written) -> dict[str, Any]:
    """``config`` with a list ``llm_int8_skip_modules`` by which the library that loads the model (transformers or diffusers)
    quantises exactly the modules whose weights are ``written`` quantised. The config's own list stays where it has this effect.

    Raises:
        FormatError: no list has this effect, or the library would not find a weight that is written.
    """
    settings: Any = config.get("quantization_config")
    quantised = [n for n in written if n.endswith("weight") and len(companion_names(n, written)) > 1]
    model = skeleton(config, torch.float32, len(written)) if quantised and isinstance(settings, Mapping) else None
    if model is None:
        return dict(config)
    shapes = {n: shape or () for n, (_, shape) in written.items() if not is_companion(n, written)}
    names = names_of(model, shapes)
    choice = _Choice(names, frozenset(names.renamed[name] for name in quantised))
    skip = choice.skip(settings.get(_SKIP))
    found = _found(names, model)
    if hasattr(model, "base_model_prefix") and _replace_modules(model):
        _check_found(found, _found(names_of(model, shapes), model))
    return {**config, "quantization_config": {**settings, _SKIP: skip}}


class _Choice:
    """The modules that transformers quantises, chosen by a list of modules to skip.

    Attributes:
        wanted: names of the weights that are written quantised.
    """

    def __init__(self, names: Architecture, wanted: frozenset[str]) -> None:
        self.names, self.wanted = names, wanted
        self._written = names.stored.keys() | names.made.keys()

    def _made_by(self, skip: Sequence[str] | None) -> frozenset[str]:
        """Names of the written weights that transformers quantises with this list."""
        assert self.names.quantised_with is not None  # noqa: S101 - the class is known
        return self.names.quantised_with(skip) & self._written

    def skip(self, given: Any) -> Sequence[str] | None:
        """A list that makes the choice: the list ``given``, else no list, else the paths of the plain modules, else regular
        expressions of these paths, since a path also skips all modules whose paths end in that path.
        """
        if given is not None and not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
            message = f"`{_SKIP}` in the config must be a list of names, but is {printable(given)}"
            raise StateError(message, remedy="restore the config.json that was saved with the weights")
        plain = sorted(name.removesuffix(".weight") for name in self._made_by([]) - self.wanted)
        exactly = [f"^{re.escape(path)}$" for path in plain]
        lists: tuple[Sequence[str] | None, ...] = (given, None, plain, exactly)
        for skip in lists:
            if self._made_by(skip) == self.wanted:
                return skip
        strange = min(self.wanted ^ self._made_by(plain))
        message = "the module's weight is written quantised, and transformers' bitsandbytes loading does not quantise such a module"
        raise FormatError(message, module=strange.removesuffix(".weight"), remedy=_REMEDY)


def _replace_modules(model: Any) -> bool:
    """Replace the modules (Llama 4's experts) that transformers replaces as it loads a quantised checkpoint. The result is whether
    the model has such modules.
    """
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.quantization_config import BitsAndBytesConfig

    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=True)
    before = [name for name, _ in model.named_modules()]
    with torch.device("meta"):
        quantizer._convert_model_for_quantization(model)
    return [name for name, _ in model.named_modules()] != before


def _found(names: Architecture, model: Any) -> set[str]:
    """Names of the model's tensors that a checkpoint gives."""
    return {*names.stored, *names.made} & set(model.state_dict())


def _check_found(before: set[str], after: set[str]) -> None:
    """Refuse weights that transformers finds in the class itself, but not after the replacement of modules."""
    lost = sorted(before - after)
    if lost:
        message = "transformers replaces this module as it loads a checkpoint in 4 or 8 bits, and would not find the weight that is written"
        raise FormatError(message, tensor=lost[0], remedy=_REMEDY)
