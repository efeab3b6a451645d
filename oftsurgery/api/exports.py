"""The public functions that export a model in memory: to safetensors, to ONNX."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from oftsurgery.files.finding import find_checkpoint
from oftsurgery.folding.export import save_model
from oftsurgery.onnx.export import OnnxReport, export_model, load_model
from oftsurgery.progress import Progress, shown
from oftsurgery.records.record import FoldRecord
from oftsurgery.records.record_file import record_in

from .arguments import check_is_model, parse_size, tokenizer_choice


def export_safetensors(
    model: nn.Module,
    destination: str | PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: int | str = "5GB",
    tokenizer: object = None,
    force: bool = False,
) -> FoldRecord | None:
    """Save a live model as a checkpoint that ``from_pretrained`` loads, bitsandbytes layers included.

    Args:
        model: plain or over bitsandbytes layers, also after CPU forwards, compiled or offloaded.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        dtype: dequantise to this (float32, float16 or bfloat16); None keeps every weight as it is stored.
        max_shard_size: bytes, or as the Hub's tools write it.
        tokenizer: whose tokenizer and chat template go along: the ``"adapter"``'s or the ``"base"``'s, those in a folder, or an
            object with ``save_pretrained``; None: the folded adapter's where its folder has them, else the base's.
        force: replace what is at ``destination``.

    The files beside the weights come from the folder that transformers loaded the model from, local or in the Hub's cache
    (``model.name_or_path``), as :func:`fold_checkpoint` carries them.

    Returns:
        the model's record, which is ``oftsurgery.json`` in the destination too, or None where nothing was folded.

    Raises:
        StateError: live adapters, values not loaded, or the destination exists.
        FormatError: a tensor that cannot be saved.
        DiskError: the disk did not take it; nothing is left behind.
    """
    return save_model(
        model,
        Path(destination),
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

    Weights are read, dequantised and written one at a time, over 1 GiB in all to ``model.onnx.data``. The model stays
    as it is. Beside the graph are ``config.json``, the tokenizer's files and ``oftsurgery.json``, which holds the
    report.

    Args:
        model: folded or not, plain or over bitsandbytes layers; or the folder of a checkpoint that transformers loads.
        destination: a folder that does not exist yet; it appears whole, by one rename.
        dtype: of the graph's weights and activations.
        quantized: keep the codes of bitsandbytes' layers, unchanged: 4-bit ones as ``com.microsoft::MatMulBnb4`` with
            float32 scales (double quantisation undone), int8 ones as ``DequantizeLinear``. Layers that the operator
            cannot hold are dequantised, and named in the report. Otherwise every layer is dequantised.
        with_past: of a decoder, one graph for prompt and generation: inputs ``input_ids``, ``attention_mask (batch,
            past + sequence)``, ``position_ids`` where the model takes them and ``past_key_values.{i}.key``, ``.value
            (batch, heads, past, size)``; outputs ``logits`` and ``present.{i}.key``, ``.value``; with a
            ``genai_config.json`` for onnxruntime-genai. Otherwise the inputs are ``input_ids``, ``attention_mask``,
            ``token_type_ids`` where there is more than one type, and for encoder-decoders ``decoder_input_ids``, the
            outputs as the model names them. Batch and lengths are dynamic.
        example_inputs: for any other model, or other inputs: a tensor, a tuple, or a mapping of names to tensors; axes
            that torch.export finds to be dynamic are so, but those of size 1 that are not the batch.
        tokenizer: as for :func:`export_safetensors`.
        verify: run onnx's checker, then onnxruntime and torch in float32 on several shapes, with left padding. The
            largest difference may be 1e-5 (float32) or 5e-3 (float16) of the output's largest value.
        force: replace what is at ``destination``.
        progress: show a bar of the stages, or a function of (stages done, stages in all, what comes).

    Returns:
        names, formats and the measured differences.

    Raises:
        ExportError: torch cannot capture the model, or the graph computes something else. Nothing is written.
        StateError: bfloat16, live adapters, no known inputs or no cache, nothing quantised to keep, values not loaded, or
            the destination exists or holds the model itself.
        NonFiniteError: a weight is too large for float16.
        FormatError: a weight is stored in a way that is not known.
        MissingDependencyError: the packages of the ``onnx`` extra are not installed.
        DiskError: the disk did not take it; nothing is left behind.
    """
    record = None
    if isinstance(model, (str, PathLike)):
        folder = find_checkpoint(model)
        record = record_in(folder)
        tokenizer = folder if tokenizer is None else tokenizer
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
