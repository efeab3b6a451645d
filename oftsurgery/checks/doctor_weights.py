""":func:`examine_weights` finds what is wrong with the stored weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from oftsurgery.dtypes import DTYPES
from oftsurgery.errors import OFTSurgeryError
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.reading import TensorEntry
from oftsurgery.formats import codecs
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.formats.checkpoint_tensors import companion_names, format_by_names, owner_of
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.quant_state import unpack_cpu_layout, unpack_state
from oftsurgery.stores.folder import load_weight
from oftsurgery.weights.fold import relative_error

from .findings import FOLD, Finding, Numbers, noting, shape_text


def examine_weights(checkpoint: Checkpoint) -> list[Finding]:
    found: list[Finding] = []
    entries = checkpoint.entries
    groups = {name: companion_names(name, entries) for name in entries if name.endswith("weight")}
    beside = {name for group in groups.values() for name in group[1:]}
    for name, entry in entries.items():
        owner = owner_of(name)
        if name in beside:
            continue  # a companion is examined with its weight
        if owner is not None:
            found.append(
                _missing_companion(owner, name, "the checkpoint has statistics of a weight, but not the weight")
            )
        elif name in groups and (len(groups[name]) > 1 or entry.dtype in ("U8", "I8")):
            found += _quantised_weight(checkpoint, name)
        else:
            with noting(found, name):
                found += non_finite(name, checkpoint.read(name))
    return found


def non_finite(name: str, tensor: Tensor) -> Iterator[Finding]:
    """A finding for a tensor that holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    bad = int((~torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float())).sum())
    if bad:
        message = "the tensor holds NaN or infinity, so the model computes NaN"
        remedy = "restore the tensor from the checkpoint that it came from; oftsurgery cannot fold such a tensor"
        yield Finding("error", "non-finite", message, name, {"values": bad, "of": tensor.numel()}, remedy)


def _missing_companion(subject: str, tensor: str, what: str) -> Finding:
    message = f"{what}, so the weight cannot be loaded"
    remedy = f"save the whole model again, or start from its base: {FOLD} --format nf4"
    return Finding("error", "missing-companions", message, subject, {"tensor": tensor}, remedy)


def _quantised_weight(checkpoint: Checkpoint, name: str) -> list[Finding]:
    """Findings on a quantised weight: missing companions, packing for the CPU, NaN, damaged codes."""
    found = _missing_companions(name, checkpoint.entries) or _cpu_packed(checkpoint, name)
    if found:
        return found
    with noting(found, name):
        encoded = load_weight(checkpoint, name, transposed=False)
        for local, tensor in encoded.tensors.items():
            found += non_finite(name if local == "weight" else f"{name}.{local}", tensor)
        if not found:
            codecs.decode(encoded)
    return found


def _missing_companions(name: str, entries: Mapping[str, TensorEntry]) -> list[Finding]:
    """Findings on tensors that a quantised weight needs beside it and that the checkpoint lacks."""
    entry, absmax = entries[name], entries.get(f"{name}.absmax")
    marked = format_by_names(name, entries, DTYPES[entry.dtype]).quantised
    if entry.dtype == "I8":
        what, kind, wanted = "the int8 weight has no SCB statistics beside it", FORMATS["int8"], ["SCB"]
    elif entry.dtype == "U8" or absmax is not None or marked:
        nested = absmax is not None and absmax.dtype == "U8"
        what, kind = "the 4-bit weight lacks some of its statistics", FORMATS["nf4"]
        wanted = ["absmax", "quant_map"] + ["nested_absmax", "nested_quant_map"] * nested + [""] * (not marked)
    else:
        return []
    lost = (kind.tensor_names(name)[local] for local in wanted)
    return [_missing_companion(name, tensor, what) for tensor in lost if tensor not in entries]


def _cpu_packed(checkpoint: Checkpoint, name: str) -> list[Finding]:
    """A finding on a 4-bit weight that was saved after a CPU forward of bitsandbytes ≥ 0.49 had packed it: codes tiled
    ``(out, in/2)``, absmax bfloat16 ``(in/blocksize, out)``.
    """
    own, absmax = checkpoint.entries[name], checkpoint.entries.get(f"{name}.absmax")
    if own.dtype != "U8" or absmax is None:
        return []
    state = format_by_names(name, checkpoint.entries, torch.uint8).tensor_names(name)[""]
    try:
        packed = unpack_state(checkpoint.read(state), state)
    except OFTSurgeryError:
        return []  # the decoding of the weight finds this error
    shape, blocksize = tuple(packed["shape"]), packed["blocksize"]
    format_ = WeightFormat(packed["quant_type"], shape, blocksize=blocksize)
    if len(shape) != 2 or shape[1] % blocksize or absmax.shape != (shape[1] // blocksize, shape[0]):
        return []
    tiled = own.shape == (shape[0], shape[1] // 2) and shape[1] != 2
    what = "its codes are tiled and its absmax is transposed" if tiled else "its absmax is transposed"
    message = f"the weight was saved after a CPU eval forward, in bitsandbytes' packing for that CPU: {what}, so readers load noise"
    numbers: Numbers = {
        "weight_shape": shape_text(own.shape),
        "absmax_shape": shape_text(absmax.shape),
        "absmax_dtype": absmax.dtype,
        "relative_error": _misread(checkpoint, name, format_, tiled=tiled),
    }
    remedy = (
        "start from the base again and set `module.support_avx512bf16_for_cpu = False` on its layers before any CPU forward, "
        f"or fold on disk: {FOLD} --format {packed['quant_type']}"
    )
    return [Finding("error", "cpu-packed" if tiled else "absmax-transposed", message, name, numbers, remedy)]


def _misread(checkpoint: Checkpoint, name: str, format_: WeightFormat, *, tiled: bool) -> float | None:
    """Relative error of reading a CPU-packed weight as an unpacked one; None where the weight cannot be read so."""
    out, features = format_.shape
    try:
        weight, absmax = checkpoint.read(name), checkpoint.read(f"{name}.absmax")
        wrong, right = (weight.reshape(-1, 1), absmax.reshape(-1).float()), (weight, absmax.t().reshape(-1).float())
        if tiled:
            right = unpack_cpu_layout(weight, absmax, (out, features), format_.blocksize)
        both = [EncodedWeight(format_, {"weight": codes, "absmax": scales}) for codes, scales in (wrong, right)]
        return relative_error(*map(codecs.decode, both))
    except OFTSurgeryError:
        return None
