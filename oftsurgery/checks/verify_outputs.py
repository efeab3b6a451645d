""":func:`compare_on_inputs` loads a folded checkpoint and its base with the adapters live, and compares what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import CheckpointError, needs, printable
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.live.wrapped_model import live_layers
from oftsurgery.live.wrapping import wrap_model
from oftsurgery.stores.dequantised import from_pretrained
from oftsurgery.stores.skeleton import quiet, readable_config

from .verify_models import compare
from .verify_report import VerifyReport


def compare_on_inputs(
    folded: Checkpoint,
    base: Checkpoint,
    adapters: Sequence[OFTAdapter],
    batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    settings: Mapping[str, Any],
) -> VerifyReport:
    """:func:`~oftsurgery.verify` of a folded checkpoint against its base with the adapters live, both loaded by transformers.

    Args:
        folded: the folded checkpoint.
        base: the checkpoint that was folded.
        adapters: the folded adapters, in the live order.
        batches: ``(args, kwargs)`` of the model's forward.
        settings: how the base was loaded for the training, from :func:`base_settings`.

    Raises:
        CheckpointError: transformers does not know the model's class, or cannot load a checkpoint.
        MissingDependencyError: transformers is not installed.
    """
    named = (folded.config.get("architectures") or [None])[0]
    model = loaded(folded, named, {"dtype": "auto"})
    start = loaded(base, named, settings)
    live = wrap_model(start, {f"adapter_{i}": adapter for i, adapter in enumerate(adapters)}, incomplete=True)
    with _in_full_precision(model), _in_full_precision(live):
        return compare(model, live, [kwargs or args for args, kwargs in batches], paths=list(live_layers(live)))


def base_settings(folded: Checkpoint, base: Checkpoint, loading: Any) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that give the base that the adapter was trained on.

    Args:
        loading: how a plain base was loaded, as :mod:`oftsurgery.checks.verify_checkpoints` finds it.
    """
    settings: dict[str, Any] = {"dtype": loading.dtype if loading.cast else "auto"}
    stored = folded.config.get("quantization_config")
    if base.config.get("quantization_config") is not None or loading.codec is None or loading.original:
        return settings
    if isinstance(stored, Mapping):
        return settings | {"quantization_config": dict(stored)}
    with needs("transformers", "pip install 'oftsurgery[peft]'"):
        from transformers import BitsAndBytesConfig
    double, skip = loading.format is not None and loading.format.nested_blocksize > 0, loading.skip
    quantised = BitsAndBytesConfig(
        **FORMATS[loading.codec].config_fields,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=loading.dtype,
        llm_int8_skip_modules=None if skip is None else list(skip),
    )
    return settings | {"quantization_config": quantised}


def loaded(checkpoint: Checkpoint, class_name: object, settings: Mapping[str, Any]) -> nn.Module:
    """The model that transformers' own class ``class_name`` loads from a checkpoint."""
    with needs("transformers", "pip install 'oftsurgery[peft]': texts need a model that runs"):
        import transformers
    cls: Any = getattr(transformers, str(class_name), None)
    if not hasattr(cls, "from_pretrained"):
        message = (
            f"transformers does not know the model's class ({printable(class_name)}), and texts need a model that runs"
        )
        remedy = "compare the weights alone, without texts=… (--texts); or load both models with their own code: oftsurgery.verify"
        raise CheckpointError(message, path=checkpoint.folder, remedy=remedy)
    config = transformers.AutoConfig.for_model(**readable_config(checkpoint.config))
    own = checkpoint.config.get("quantization_config")
    if own is not None:
        config.quantization_config = dict(own)
    try:
        with quiet():
            model = from_pretrained(cls, checkpoint, config, **settings)
    except Exception as error:  # transformers raises errors of any kind at files that it cannot use
        message = f"transformers cannot load the checkpoint ({type(error).__name__}: {printable(error)})"
        remedy = (
            "compare the weights alone, without texts=… (--texts), or load both models in Python: oftsurgery.verify"
        )
        raise CheckpointError(message, path=checkpoint.folder, remedy=remedy) from error
    return model.eval()


@contextmanager
def _in_full_precision(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from repacking 4-bit weights for bfloat16 arithmetic, so that only the weights of two models differ."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__["support_avx512bf16_for_cpu"] = False
    yield
