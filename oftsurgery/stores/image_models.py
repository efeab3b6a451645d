"""Models of diffusers: the class that a component's ``config.json`` names, which of its modules bitsandbytes loading quantises, and
in which dtypes loading has its tensors, by the rules of diffusers itself. A component's tensors have the names of its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from oftsurgery.errors import CheckpointError, printable

#: the field that names the class
CLASS = "_class_name"
#: fields of the config that the class does not take
_BESIDE = ("quantization_config", "_name_or_path", "_diffusers_version", "auto_map", "dtype", "torch_dtype")


def is_of_diffusers(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a model of diffusers."""
    return CLASS in config and "model_type" not in config


def image_model(config: Mapping[str, Any]) -> nn.Module | None:
    """The model that a config names, without values where the caller has chosen the meta device; None without diffusers, or for a
    class that diffusers does not have.

    Raises:
        CheckpointError: diffusers knows the class and cannot build it from this config.
    """
    name = config.get(CLASS)
    if not isinstance(name, str):
        raise CheckpointError(
            f"`{CLASS}` must be a string, but is {printable(name)}",
            tensor="config.json",
            remedy="restore the config.json that belongs to the checkpoint",
        )
    try:
        import diffusers
    except ImportError:
        return None
    found: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        return None
    try:
        with _quiet():
            make: Any = found.from_config
            made: nn.Module = make({k: v for k, v in config.items() if k not in _BESIDE})
            return made
    except Exception as error:  # a config may hold any data, and its class may raise any error
        raise CheckpointError(
            f"diffusers knows the class {printable(name)}, but cannot build it from this config ({printable(error)})",
            tensor="config.json",
            remedy="restore the config.json that belongs to the checkpoint",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """While the body runs, diffusers logs errors alone."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def kept_in_fp32(model: Any) -> list[str]:
    """The segments of names by which a class keeps tensors in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    return [kept] if isinstance(kept, str) else list(kept)


def not_converted(model: Any, skip: Sequence[str] | None) -> Callable[[str], bool]:
    """A function of a path: whether diffusers' bitsandbytes loading leaves the linear unquantised. An entry of the list
    ``llm_int8_skip_modules`` names a module by its whole path or by its last segment, or everything below the entry.
    """
    keys = [*(skip or ()), *kept_in_fp32(model)]

    def left(path: str) -> bool:
        return path.rpartition(".")[2] in keys or any(f"{key}." in path or key == path for key in keys)

    return left


def loaded_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """``{name: dtype after loading in dtype}`` of the model's tensors of floats."""
    kept = set(kept_in_fp32(model))
    return {
        name: torch.float32 if kept & set(name.split(".")) else dtype
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
