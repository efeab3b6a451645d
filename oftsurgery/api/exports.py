"""The public functions here export a model to safetensors, to ONNX or to GGUF."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from oftsurgery.files.finding import find_checkpoint
from oftsurgery.files.remote import check_here
from oftsurgery.files.writing import check_free
from oftsurgery.folding.export import format_named, save_model
from oftsurgery.gguf.export import GgufReport, export_folder
from oftsurgery.live.wrapped_model import live_layers
from oftsurgery.onnx.export import OnnxReport, export_model, load_model
from oftsurgery.progress import Progress, shown
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import record_in
from oftsurgery.stores.peft_live import LiveAdapters

from .arguments import check_is_model, parse_size, tokenizer_choice
from .models import fold


def export_safetensors(
    model: nn.Module,
    destination: str | PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: int | str = "5GB",
    tokenizer: object = None,
    force: bool = False,
) -> FoldRecord | None:
    """Save a live model, with its live adapters folded in, as a checkpoint that ``from_pretrained`` loads.

    >>> folded = oftsurgery.fold(model, "ADAPTER")
    >>> record = oftsurgery.export_safetensors(folded, "OUTPUT")
    >>> again = type(model).from_pretrained("OUTPUT")
    >>> torch.equal(again(inputs).logits, folded(inputs).logits)
    True
    >>> record = oftsurgery.export_safetensors(live, "OUT-BF16", dtype=torch.bfloat16)        # dequantised, rotated, stored
    >>> record.modules["model.layers.0.self_attn.q_proj"].format, record.worst[1].error < 0.01
    ('bfloat16', True)

    Args:
        model: plain or over bitsandbytes layers, also after CPU forwards, compiled or offloaded; or a ``PeftModel`` or a model
            of :func:`wrap`, whose active adapters are folded as by ``fold(model, format=…)`` in the format of ``dtype``.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        dtype: dequantise to this dtype (float32, float16 or bfloat16); None keeps every weight as it is stored. A live adapter
            rotates the exactly dequantised weights, and the result is rounded once, to ``dtype`` or to the weights' formats.
        max_shard_size: bytes, or text as the Hub's tools write sizes (``"5GB"``).
        tokenizer: the tokenizer and the chat template to write beside the weights: those of the ``"adapter"``, of the
            ``"base"``, of a folder, or of an object with ``save_pretrained``; None: those of the folded adapter where its
            folder has them, else those of the base.
        force: replace what is at ``destination``.

    The files beside the weights come from the folder that transformers loaded the model from, local or in the Hub's cache
    (``model.name_or_path``), as :func:`fold_checkpoint` carries them.

    Returns:
        the model's record, which is ``oftsurgery.json`` in the destination too, or None where nothing was folded.

    Raises:
        StateError: the model has values that are not loaded, or the destination exists.
        FormatError: a tensor cannot be saved.
        OFTSurgeryError: as :func:`fold`, where the model has live adapters.
        DiskError: the disk is full, read-only or in use; nothing is left behind.
    """
    place, format_ = Path(destination), format_named(dtype)
    if live_layers(model) or LiveAdapters(model):
        check_free("destination", place, force=force)  # before the work of the fold
        model = fold(model, format=format_)
    return save_model(
        model,
        place,
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size),
        tokenizer=tokenizer_choice(tokenizer),
        force=force,
    )


def export_onnx(
    model: nn.Module | str | PathLike[str],
    destination: str | PathLike[str],
    dtype: Literal["float16", "float32"] = "float16",
    quantized: bool = False,
    with_past: bool = False,
    *,
    example_inputs: object = None,
    tokenizer: object = None,
    verify: bool = True,
    force: bool = False,
    progress: bool | Progress = False,
) -> OnnxReport:
    """Export a model as ``destination/model.onnx``, opset 20, and prove the graph against torch.

    >>> report = oftsurgery.export_onnx(oftsurgery.fold(model, "ADAPTER"), "OUT-ONNX")        # or a checkpoint's folder
    >>> report.worst < report.tolerance
    True

    Weights are read, dequantised and written one at a time, over 1 GiB in all to ``model.onnx.data``. The model stays
    as it is. Beside the graph are ``config.json``, the tokenizer's files and ``oftsurgery.json``, which holds the
    report.

    Args:
        model: folded or not, plain or over bitsandbytes layers; or the folder of a checkpoint that transformers loads.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        dtype: of the graph's weights and activations.
        quantized: keep the codes of bitsandbytes' layers: 4-bit layers become ``com.microsoft::MatMulBnb4`` with
            float32 scales (double quantisation undone), int8 layers ``DequantizeLinear``. A layer that the operator
            cannot hold is dequantised, and the report names the layer. Otherwise every layer is dequantised.
        with_past: of a decoder, one graph for prompt and generation: inputs ``input_ids``, ``attention_mask (batch,
            past + sequence)``, ``position_ids`` where the model takes them and ``past_key_values.{i}.key``, ``.value
            (batch, heads, past, size)``; outputs ``logits`` and ``present.{i}.key``, ``.value``; with a
            ``genai_config.json`` for onnxruntime-genai. Otherwise the inputs are ``input_ids``, ``attention_mask``,
            ``token_type_ids`` where there is more than one type, and for encoder-decoders ``decoder_input_ids``; the
            model names the outputs. Batch and lengths are dynamic.
        example_inputs: for any other model, or other inputs: a tensor, a tuple, or a mapping of names to tensors. The axes
            that torch.export finds to be dynamic are dynamic, but for axes of size 1 other than the batch.
        tokenizer: as for :func:`export_safetensors`.
        verify: run onnx's checker, then onnxruntime and torch in float32 on several shapes, with left padding. The
            largest difference may be 1e-5 (float32) or 5e-3 (float16) of the output's largest value.
        force: replace what is at ``destination``.
        progress: show a bar of the stages, or a function of (stages done, stages in all, what comes).

    Returns:
        an :class:`~oftsurgery.OnnxReport`: names, formats and the measured differences.

    Raises:
        ExportError: torch cannot capture the model, or the graph computes something else. Nothing is written.
        StateError: the dtype is bfloat16, the model has live adapters or values that are not loaded, the model's inputs or
            its cache are unknown, there is nothing quantised to keep, or the destination exists or holds the model itself.
        NonFiniteError: a weight is too large for float16.
        FormatError: a weight's storage format is unknown.
        MissingDependencyError: the packages of the ``onnx`` extra are not installed.
        DiskError: the disk is full, read-only or in use; nothing is left behind.
    """
    record = None
    if isinstance(model, (str, PathLike)):
        folder = find_checkpoint(model)
        check_here(folder, "an export")
        record = record_in(folder)
        tokenizer = "base" if tokenizer is None else tokenizer
        model = load_model(folder)
    check_is_model(model)
    with shown(progress, "export", "stage") as step:
        return export_model(
            model,
            Path(destination),
            dtype=dtype,
            quantized=quantized,
            with_past=with_past,
            example_inputs=example_inputs,
            tokenizer=tokenizer_choice(tokenizer),
            record=record,
            verify=verify,
            force=force,
            progress=step,
        )


def export_gguf(
    folder: str | PathLike[str],
    destination: str | PathLike[str],
    converter: str | PathLike[str],
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    *,
    python: str | PathLike[str] | None = None,
    verify: bool = True,
    force: bool = False,
    progress: bool | Progress = False,
) -> GgufReport:
    """Export a checkpoint as ``destination/model.gguf`` for llama.cpp and Ollama, and prove every tensor.

    >>> report = oftsurgery.export_gguf("PLAIN", "OUT-GGUF", "llama.cpp/convert_hf_to_gguf.py")
    >>> report.verified, len(report.uncompared)       # every tensor was compared
    (True, 0)

    llama.cpp's own converter writes the file, as a process of its own. Then each tensor is compared with the checkpoint, through
    the package ``gguf``. Beside the file are a ``Modelfile`` for Ollama, a card, and ``oftsurgery.json``, which holds the report.

    Args:
        folder: a checkpoint with plain weights that transformers loads, with its tokenizer; or the Hub id of such a checkpoint.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        converter: ``convert_hf_to_gguf.py`` of a llama.cpp repository.
        dtype: of the weights; None: the dtype that most of the checkpoint's weights have.
        python: the Python that runs the converter, with the packages of llama.cpp's requirements; None: the Python that runs
            oftsurgery.
        verify: compare the tensors. llama.cpp's reorderings are known for the common architectures; the report names
            tensors that could not be compared.
        force: replace what is at ``destination``.
        progress: show a bar of the stages, or a function of (stages done, stages in all, what comes).

    Returns:
        a :class:`~oftsurgery.GgufReport`.

    Raises:
        ExportError: the converter failed, or a tensor differs or is missing. Nothing is written.
        StateError: the converter does not exist, the checkpoint is quantised, the dtype is unknown, or the destination exists
            or holds the checkpoint itself.
        CheckpointError: the checkpoint cannot be read.
        MissingDependencyError: the package of the ``gguf`` extra is not installed.
        DiskError: the disk is full, read-only or in use; nothing is left behind.
    """
    found = find_checkpoint(folder)
    check_here(found, "an export")
    with shown(progress, "export", "stage") as step:
        return export_folder(
            found,
            Path(destination),
            Path(converter),
            dtype=dtype,
            python=None if python is None else str(python),
            verify=verify,
            force=force,
            progress=step,
        )
