"""A model without weights, built on the meta device from an untrusted ``config.json``."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from oftsurgery.errors import CheckpointError, needs, printable
from oftsurgery.progress import without_bars

from .image_models import image_model, is_of_diffusers

#: fields that lead to code which transformers would fetch from the Hub and run, or that have no effect on names
_CODE = ("quantization_config", "auto_map", "attn_implementation", "experts_implementation")

_BY_NAMES = ContextVar("oftsurgery_without_classes", default=False)


@contextlib.contextmanager
def without_classes() -> Iterator[None]:
    """While the body runs, :func:`skeleton` knows no class, as where transformers is not installed."""
    token = _BY_NAMES.set(True)
    try:
        yield
    finally:
        _BY_NAMES.reset(token)


_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While the body runs, transformers logs errors alone and shows no bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars(logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar):
            yield
    finally:
        logging.set_verbosity(before)


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as transformers reads it, without fields that lead to code, in the config itself and in its parts."""
    kept = {k: v for k, v in config.items() if not k.lstrip("_").removesuffix("_internal").startswith(_CODE)}
    return {k: _readable(v) for k, v in kept.items()}


def _readable(value: Any) -> Any:
    if isinstance(value, Mapping):
        # JSON has no infinite numbers: transformers 5 writes {"__float__": "Infinity"}
        tag = value.get("__float__")
        return _FLOATS[tag] if len(value) == 1 and isinstance(tag, str) and tag in _FLOATS else readable_config(value)
    return [_readable(v) for v in value] if isinstance(value, list) else value


def _classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' class that ``config`` names, or None; and the config class of that class, or None if ``config`` is of another
    model type. The parts of some models (Bark's) have config classes that ``AutoConfig`` does not know.
    """
    import transformers

    named: Any = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        return None, None
    own: Any = getattr(named, "config_class", None)
    return named, own if getattr(own, "model_type", None) == config["model_type"] else None


def _without_parameters() -> contextlib.AbstractContextManager[None]:
    with needs("accelerate", "pip install 'oftsurgery[peft]'"):
        from accelerate import init_empty_weights
    empty: contextlib.AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return empty


def skeleton(config: Mapping[str, Any], dtype: torch.dtype, tensors: int, *, buffers: bool = False) -> Any:
    """The model of ``config``'s class on the meta device, in ``dtype``; None without transformers (diffusers), or for a class that
    transformers (diffusers) does not know.

    Args:
        tensors: number of the checkpoint's tensors, which bounds the number of the model's modules.
        buffers: whether the buffers have their values; accelerate must be installed then.

    Raises:
        CheckpointError: the library knows the class and cannot build it from this config.
    """
    if _BY_NAMES.get():
        return None
    if is_of_diffusers(config):
        with _bounded(tensors), _without_parameters() if buffers else torch.device("meta"):
            return image_model(config)
    return _of_transformers(config, dtype, tensors, buffers=buffers) if "model_type" in config else None


@contextlib.contextmanager
def _bounded(tensors: int) -> Iterator[None]:
    """While the body runs, no config makes many more modules than a checkpoint of so many ``tensors`` has."""
    from torch.nn.modules.module import register_module_module_registration_hook

    built, most = itertools.count(), 10 * tensors + 10_000

    def check(*_: object) -> None:
        if next(built) > most:  # a config may ask for 10⁹ layers
            raise ValueError("the config asks for many more modules than the checkpoint has tensors")

    handle = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _of_transformers(config: Mapping[str, Any], dtype: torch.dtype, tensors: int, *, buffers: bool) -> Any:
    """:func:`skeleton` of a model of transformers."""
    if not isinstance(config["model_type"], str):
        raise CheckpointError(
            f"`model_type` must be a string, but is {printable(config['model_type'])}",
            tensor="config.json",
            remedy="restore the config.json that belongs to the checkpoint",
        )
    try:
        import transformers
        import transformers.conversion_mapping
    except ImportError:
        return None
    model_class, config_class = None, None
    try:
        with _bounded(tensors), quiet(), _without_parameters() if buffers else torch.device("meta"):
            model_class, config_class = _classes(config)
            fields = readable_config(config)
            model_type = fields.pop("model_type")
            make = config_class or partial(transformers.AutoConfig.for_model, model_type)
            parsed = make(**fields)
            if model_class is not None:
                return model_class._from_config(parsed, dtype=dtype)
            return transformers.AutoModel.from_config(parsed, dtype=dtype)
    except Exception as error:  # a config may hold any data, and its class may raise any error
        known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
        if config_class is not None or str(config["model_type"]) in known:
            raise CheckpointError(
                f"transformers knows the model type {printable(config['model_type'])}, but cannot build it from this config ({printable(error)})",
                tensor="config.json",
                remedy="restore the config.json that belongs to the checkpoint",
            ) from error
        return None
