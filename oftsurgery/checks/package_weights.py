"""Weights that other packages than bitsandbytes quantised, read a second time for the checks alone: bit by bit, from what the packages say
of their files. This file shares no code with :mod:`oftsurgery.formats.packages`, by which a fold reads and writes such weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oftsurgery.dtypes import DTYPE_NAMES, DTYPES
from oftsurgery.errors import FormatError, printable
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.reading import TensorEntry, read_header

Array = np.ndarray[Any, np.dtype[Any]]
#: the tensors of one weight by the ends of their names
Parts = Mapping[str, Tensor]

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16, "torch.float32": torch.float32}
_MOST = float(torch.finfo(torch.float8_e4m3fn).max)


@dataclass(frozen=True, eq=False)
class Codes:
    """What the tensors of one weight say, each of the weight's shape or broadcasting to it.

    Attributes:
        numbers: the codes, whole numbers or 8-bit floats, float64.
        scale, zero: float64: ``value = (number - zero) · scale + offset``.
        offset: float64.
        bounds: the least and the largest code; None for 8-bit floats.
        group: the number of the scale of each value.
        slack: by how much a value may be off because the package rounds scales and zeros after it has chosen the codes, float64.
        stored: the dtype of the scales.
        span: what the package divides by the largest code less the least to find a scale: ``"range"`` of the values; ``"range with 0"``;
            ``"size"``, twice the largest size; ``""`` where the scale follows from more than the values.
    """

    numbers: Tensor
    scale: Tensor
    zero: Tensor | float = 0.0
    offset: Tensor | None = None
    bounds: tuple[int, int] | None = None
    group: Tensor | None = None
    slack: Tensor | float = 0.0
    stored: torch.dtype = torch.float32
    span: str = ""

    def of(self, exact: Tensor) -> Codes:
        """The codes nearest to the values ``exact`` with these scales and zeros."""
        steps = exact / torch.where(self.scale == 0, 1.0, self.scale)
        if self.bounds is None:
            return replace(self, numbers=steps.float().clamp(-_MOST, _MOST).to(torch.float8_e4m3fn).double())
        return replace(self, numbers=torch.round(steps + self.zero).clamp(*self.bounds))

    def step_error(self, exact: Tensor) -> float:
        """The relative error of values that lie anywhere between two codes: the root of ``Σ step² / 12``."""
        return float((self._steps(exact).square().sum() / 12).sqrt() / exact.norm())

    def grain(self, base: Tensor, exact: Tensor) -> float:
        """The largest share of the change from ``base`` to ``exact`` that one element makes where it goes one step."""
        change = (exact - base).abs()
        size = float(change.square().sum())
        return float((self._steps(exact) * change).max()) / size if size else 0.0

    def _steps(self, exact: Tensor) -> Tensor:
        steps = self.scale.abs().expand(exact.shape)
        if self.bounds is None:  # 3 bits of a mantissa, down to the exponent -6
            size = exact.abs() / torch.where(steps == 0, 1.0, steps)
            steps = steps * torch.exp2(torch.floor(torch.log2(size.clamp(min=2.0**-6))) - 3)
        return steps

    def scales_fit(self, exact: Tensor) -> bool:
        """Whether the scales are those that the package gives to the values ``exact``, up to their rounding; a power of two may be a
        factor 2 larger. Scales of groups of nearly equal values may be any.
        """
        if self.group is None:
            return True
        of, flat = self.group.expand(exact.shape).reshape(-1), exact.reshape(-1)
        least, most = torch.zeros(2, int(of.max()) + 1, dtype=torch.float64)
        include = self.span != "range"
        least = least.scatter_reduce(0, of, flat, "amin", include_self=include)
        most = most.scatter_reduce(0, of, flat, "amax", include_self=include)
        span = 2 * torch.maximum(-least, most) if self.span == "size" else most - least
        wanted = span / (2 * _MOST if self.bounds is None else self.bounds[1] - self.bounds[0])
        own = torch.zeros_like(wanted).scatter_(0, of, self.scale.expand(exact.shape).reshape(-1))
        usual = (span > 1.01e-4) & (wanted > torch.finfo(self.stored).tiny)
        ratio = (own / wanted)[usual]
        powers = bool((torch.frexp(own)[0] == 0.5).all())
        return bool(((ratio > 0.99) & (ratio < (2.01 if powers else 1.01))).all())


@dataclass(frozen=True, eq=False)
class Held:
    """One weight in a package's layout.

    Attributes:
        parts: ``{end of the name: name}`` of its tensors.
        shape, dtype: of the dequantised weight.
        codes: function of the tensors.
        roundings: how often the package rounds to ``dtype``: 2 where it computes each step in this dtype.
        turned: whether the model's class holds the weight ``(in, out)``.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: Callable[[Parts], Codes]
    roundings: int = 1
    turned: bool = False

    def values(self, codes: Codes) -> Tensor:
        if self.roundings == 2:
            numbers = codes.numbers.to(self.dtype)
            numbers = numbers - codes.zero.to(self.dtype) if isinstance(codes.zero, Tensor) else numbers
            values = numbers * codes.scale.to(self.dtype)
        else:
            values = (codes.numbers - codes.zero) * codes.scale
            if codes.offset is not None:  # a sum with 0.0 would lose the sign of -0.0
                values = values + codes.offset
            values = values.float().to(self.dtype)
        return (values.t() if self.turned else values).contiguous()


@dataclass(frozen=True, eq=False)
class CheckedCheckpoint(Checkpoint):
    """The plain checkpoint that a package's dequantisation gives, by this file alone.

    Attributes:
        of: the checkpoint as it is stored.
        held: ``{name of a weight: the weight}``.
    """

    of: Checkpoint | None = None
    held: Mapping[str, Held] = field(default_factory=dict)

    @property
    def as_stored(self) -> Checkpoint:
        return self.of or self

    @property
    def stored_as(self) -> str | None:
        return _method(self.as_stored.config)[0]

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of a weight of :attr:`held`."""
        return {end: self.as_stored.read(own) for end, own in self.held[name].parts.items()}

    def read(self, name: str) -> Tensor:
        held = self.held.get(name)
        return super().read(name) if held is None else held.values(held.codes(self.parts(name)))


def read_again(checkpoint: Checkpoint, *, idle: bool) -> Checkpoint:
    """A checkpoint that a fold reads dequantised, as this file reads it; other checkpoints as they are.

    Args:
        idle: whether the tensors count that only the package needs.
    """
    if checkpoint.stored_as is None:
        return checkpoint
    files = checkpoint.as_stored
    method, settings = _method(files.config)
    held = dict(_FINDERS[method or ""](files, settings))
    owner = {own: name for name, weight in held.items() for own in weight.parts.values()}
    entries: dict[str, TensorEntry] = {}
    for name, entry in files.entries.items():
        weight = owner.get(name)
        if weight is not None:
            shape, dtype = held[weight].shape, held[weight].dtype
            size = int(np.prod(shape)) * dtype.itemsize
            entries[weight] = TensorEntry(weight, entry.file, DTYPE_NAMES[dtype], shape, -1, size)
        elif idle or not name.endswith(_IDLE):
            entries[name] = entry
    if not owner:
        message = "the config names a package that quantised the weights, and no weight is stored so"
        raise FormatError(message, format=printable(method), path=files.folder, remedy="restore the config.json")
    own = {f.name: getattr(files, f.name) for f in fields(Checkpoint)}
    own["config"] = MappingProxyType({k: v for k, v in files.config.items() if k not in _SETTINGS})
    own["entries"] = MappingProxyType(entries)
    return CheckedCheckpoint(**own, of=files, held=MappingProxyType(held))


_SETTINGS = ("quantization_config", "compression_config")
#: ends of the names of tensors that only quantised activations and caches need
_IDLE = (
    ".input_scale", ".activation_scale", ".weight_activation_scale", ".input_scale_ub", ".output_scale", ".k_scale", ".v_scale", ".kv_scale",
    ".q_scale", ".qscale_act", ".input_zero_point", ".output_zero_point",
)  # fmt: skip


def _method(config: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    settings: Mapping[str, Any] = next(
        (config[name] for name in _SETTINGS if isinstance(config.get(name), Mapping)), {}
    )
    method = settings.get("quant_method")
    return (
        None if method is None and "config_groups" not in settings else str(method or "compressed-tensors")
    ), settings


def _modules(files: Checkpoint, end: str) -> Iterator[str]:
    """The paths of the modules that have a tensor with this end."""
    return (name.removesuffix(end) for name in files.entries if name.endswith(f".{end}") or name == end)


def _named(files: Checkpoint, path: str, *ends: str) -> dict[str, str]:
    return {end: f"{path}{end}" for end in ends if f"{path}{end}" in files.entries}


def _shape(files: Checkpoint, name: str) -> tuple[int, ...]:
    return files.entries[name].shape


def _dtype(files: Checkpoint, name: str) -> torch.dtype:
    return DTYPES[files.entries[name].dtype]


# --- bits -------------------------------------------------------------------------------------------------------------


def _stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes in the bits of each row of ``words``, from the lowest bit of the first word on; float64."""
    data = np.ascontiguousarray(words.numpy())
    each = np.unpackbits(data.view(np.uint8).reshape(len(data), -1), axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy(each.reshape(len(data), count, bits) @ (1 << np.arange(bits))).double()


def _by(numbers: Tensor, of: Tensor) -> Tensor:
    """Columns ``of`` of ``(rows, groups)``, float64."""
    return numbers.double()[:, of.long()]


# --- a function for each package --------------------------------------------------------------------------------------


def _gptq(files: Checkpoint, settings: Mapping[str, Any]) -> Iterator[tuple[str, Held]]:
    first = (settings.get("checkpoint_format") or settings.get("format") or "gptq") == "gptq"
    conv1d = files.config.get("model_type") in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
    for path in _modules(files, "qweight"):
        parts = _named(files, path, "qweight", "qzeros", "scales", "g_idx")
        words, out = _shape(files, parts["qweight"])
        bits = int(settings["bits"])
        inputs = _shape(files, parts["g_idx"])[0] if "g_idx" in parts else words * 32 // bits
        bits = bits if -(-inputs * bits // 32) == words else words * 32 // inputs
        size = int(settings.get("group_size", -1))

        def codes(p: Parts, bits: int = bits, inputs: int = inputs, out: int = out, size: int = size) -> Codes:
            zeros = p["qzeros"]
            if first and bits != 3:  # one is added to all codes of a word at once
                added = zeros.numpy().view(np.uint32) + np.uint32(sum(1 << at for at in range(0, 32, bits)))
                zeros = torch.from_numpy(added.view(np.int32))
            numbers = _stream(zeros, bits, out)
            numbers = (numbers + 1) % 8 if first and bits == 3 else numbers
            of = p["g_idx"] if "g_idx" in p else torch.arange(inputs) // (size if size > 0 else inputs)
            return Codes(
                _stream(p["qweight"].t(), bits, inputs),
                _by(p["scales"].t(), of),
                _by(numbers.t(), of),
                bounds=(0, 2**bits - 1),
            )

        turned = conv1d and path.split(".")[-2] in ("c_attn", "c_proj", "c_fc", "q_attn")
        shape = (inputs, out) if turned else (out, inputs)
        yield f"{path}weight", Held(parts, shape, _dtype(files, parts["scales"]), codes, turned=turned)


def _awq(files: Checkpoint, settings: Mapping[str, Any]) -> Iterator[tuple[str, Held]]:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    size = int(settings.get("group_size", settings.get("q_group_size", 128)))
    for path in _modules(files, "qweight"):
        parts = _named(files, path, "qweight", "qzeros", "scales")
        rows, columns = _shape(files, parts["qweight"])
        shapes = {"gemm": (columns * 8, rows), "gemv": (rows, columns * 8), "gemv_fast": (rows * 4, columns)}
        out, inputs = shapes[version]
        of = torch.arange(inputs) // (size if size > 0 else inputs)

        def codes(p: Parts, out: int = out, inputs: int = inputs, of: Tensor = of) -> Codes:
            if version == "gemv":
                zeros = _stream(p["qzeros"], 4, int(of[-1]) + 1)
                return Codes(_stream(p["qweight"], 4, inputs), _by(p["scales"], of), _by(zeros, of), bounds=(0, 15))
            if version == "gemv_fast":
                numbers = torch.empty(out * inputs, dtype=torch.float64)
                numbers[_places_of_gemv_fast(out, inputs)] = _stream(p["qweight"].reshape(1, -1), 4, out * inputs)[0]
                scale, offset = (_by(p[name].t(), of) for name in ("scales", "qzeros"))
                return Codes(numbers.reshape(out, inputs), scale, offset=offset)
            numbers, zeros = (_stream(p[name], 4, out)[:, _order_of_gemm(out)] for name in ("qweight", "qzeros"))
            return Codes(numbers.t(), _by(p["scales"].t(), of), _by(zeros.t(), of), bounds=(0, 15))

        yield f"{path}weight", Held(parts, (out, inputs), _dtype(files, parts["scales"]), codes)


def _order_of_gemm(out: int) -> Tensor:
    """Where AutoAWQ puts each output: its words hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    held = [0, 2, 4, 6, 1, 3, 5, 7]
    return torch.tensor([8 * (o // 8) + held.index(o % 8) for o in range(out)])


def _places_of_gemv_fast(out: int, inputs: int) -> Tensor:
    """The number of the weight in each place of AutoAWQ's layout, by the three steps in which AutoAWQ orders a weight."""
    at = torch.arange(out * inputs).reshape(out, inputs // 32, 4, 4, 2)
    at = at.transpose(2, 3).reshape(out, inputs // 32, 4, 4, 2)  # each 32 inputs
    at = at.transpose(3, 4).reshape(out // 4, 4, inputs // 64, 64)  # each 8 inputs
    return at.transpose(1, 2).reshape(-1)  # four outputs, 64 inputs of each


def _hqq(files: Checkpoint, _: Mapping[str, Any]) -> Iterator[tuple[str, Held]]:
    for path in _modules(files, "W_q"):
        parts = {name.removeprefix(path): name for name in files.entries if name.startswith(path)}
        parts = {end: name for end, name in parts.items() if "." not in end and end != "bias"}

        def text(end: str, parts: Mapping[str, str] = parts) -> str:
            return bytes(files.read(parts[end]).tolist()).decode("ascii", "replace")

        def number(end: str, parts: Mapping[str, str] = parts) -> float:
            return float(files.read(parts[end]).reshape(-1)[0])

        out, inputs = files.read(parts["shape"]).tolist()
        dtype = _FLOATS[text("compute_dtype")]
        bits, axis, size = number("nbits"), int(number("axis")), int(number("group_size"))
        words = text("packing")

        def codes(
            p: Parts,
            shape: tuple[int, int] = (out, inputs),
            bits: float = bits,
            axis: int = axis,
            size: int = size,
            words: str = words,
        ) -> Codes:
            n = shape[0] * shape[1]
            rows, columns = (n // size, size) if axis else (size, n // size)
            width, kind = {
                "8": (8, np.uint8),
                "4": (4, np.uint8),
                "3": (3, np.int32),
                "2": (2, np.uint8),
                "1": (1, np.uint8),
            }[words[0]]
            count = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[width]
            flat = np.ascontiguousarray(p["W_q"].contiguous().view(torch.uint8).numpy()).reshape(-1).view(kind)
            held = flat.astype(np.int64).reshape(-1, columns)  # the codes of a word are `len(held)` rows apart
            numbers = np.concatenate([held // 2 ** (width * (count - 1 - i)) % 2**width for i in range(count)])[:rows]
            ones = (rows, columns)
            of = torch.arange(columns).expand(ones) if axis == 0 else torch.arange(rows).unsqueeze(1).expand(ones)
            scale, zero = (p[name].double().expand(ones).reshape(shape) for name in ("scale", "zero"))
            found = torch.from_numpy(numbers).double().reshape(shape)
            eps, top = torch.finfo(p["zero"].dtype).eps / 2, round(2**bits - 1)
            slack = (zero.abs() + (found - zero).abs()) * scale * eps
            return Codes(
                found,
                scale,
                zero,
                bounds=(0, top),
                group=of.reshape(shape),
                slack=slack,
                stored=p["scale"].dtype,
                span="range",
            )

        yield f"{path}weight", Held(parts, (out, inputs), dtype, codes, roundings=2)


def _compressed(files: Checkpoint, settings: Mapping[str, Any]) -> Iterator[tuple[str, Held]]:
    schemes = [s.get("weights") for s in settings.get("config_groups", {}).values()]
    schemes = [s for s in schemes if isinstance(s, Mapping)]
    widths = {int(s["num_bits"]) for s in schemes if "num_bits" in s}
    blocks = [s["block_structure"] for s in schemes if s.get("block_structure")]

    def centred(bits: int) -> bool:
        return all(s.get("symmetric", True) for s in schemes if s.get("num_bits") == bits)

    for path in _modules(files, "weight_packed"):
        parts = _named(
            files, path, "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"
        )
        out, inputs = map(int, files.read(parts["weight_shape"]))
        words = _shape(files, parts["weight_packed"])[1]
        bits = next(b for b in sorted(widths) if -(-inputs * b // 32) == words)

        def packed(p: Parts, shape: tuple[int, int] = (out, inputs), bits: int = bits) -> Codes:
            zero = p.get("weight_zero_point")
            if zero is not None and zero.dtype == torch.int32:
                zero = _stream(zero.t(), bits, len(p["weight_scale"])).t() - 2 ** (bits - 1)
            numbers = _stream(p["weight_packed"], bits, shape[1]) - 2 ** (bits - 1)
            return _integers(numbers, p, zero, bits, centred=zero is None or centred(bits))

        yield f"{path}weight", Held(parts, (out, inputs), _dtype(files, parts["weight_scale"]), packed)
    for path in _modules(files, "weight_scale"):
        name = f"{path}weight"
        if name not in files.entries:
            continue
        parts, dtype = (
            {"weight": name, **_named(files, path, "weight_scale", "weight_zero_point", "weight_g_idx")},
            _dtype(files, name),
        )
        if dtype in _FLOAT8:
            block = tuple(blocks[0]) if blocks else None
            yield name, _float8(files, name, parts["weight_scale"], block, _dtype(files, parts["weight_scale"]))
        elif dtype == torch.int8:
            bits = min(widths, default=8) if len(widths) == 1 else 8

            def plain(p: Parts, bits: int = bits) -> Codes:
                zero = p.get("weight_zero_point")
                return _integers(p["weight"].double(), p, zero, bits, centred=zero is None or centred(bits))

            yield name, Held(parts, _shape(files, name), _dtype(files, parts["weight_scale"]), plain)


def _integers(numbers: Tensor, p: Parts, zero: Tensor | None, bits: int, *, centred: bool) -> Codes:
    """Codes ``(out, in)`` with scales for groups of inputs, of each row or of all rows."""
    out, inputs = numbers.shape
    scale = p["weight_scale"].double()
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(len(scale), -1)
    groups = scale.shape[1]
    of = p["weight_g_idx"].long() if "weight_g_idx" in p else torch.arange(inputs) // (inputs // groups)
    rows = torch.arange(out).unsqueeze(1) if len(scale) > 1 else torch.zeros(out, 1, dtype=torch.int64)
    wide = 0.0 if zero is None else _by(zero.reshape(scale.shape), of)
    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    span = "size" if centred else "range with 0"
    group, stored = rows * groups + of, p["weight_scale"].dtype
    return Codes(numbers, _by(scale, of), wide, bounds=bounds, group=group, stored=stored, span=span)


def _fp8(files: Checkpoint, settings: Mapping[str, Any]) -> Iterator[tuple[str, Held]]:
    named = files.config.get("dtype", files.config.get("torch_dtype"))
    floats = (DTYPES[e.dtype] for e in files.entries.values() if DTYPES[e.dtype] in _FLOATS.values())
    dtype = getattr(torch, named) if isinstance(named, str) else next(floats, torch.float32)
    block = settings.get("weight_block_size")
    for name, entry in files.entries.items():
        if DTYPES[entry.dtype] in _FLOAT8 and (len(entry.shape) > 1 or name.endswith("weight")):
            stem = name.removesuffix("weight")
            scale = next(
                n
                for n in (f"{name}_scale_inv", f"{name}_scale", f"{stem}qscale_weight", f"{stem}scale")
                if n in files.entries
            )
            yield name, _float8(files, name, scale, None if block is None else tuple(block), dtype)


def _float8(files: Checkpoint, name: str, scale: str, block: tuple[int, ...] | None, dtype: torch.dtype) -> Held:
    shape = _shape(files, name)
    rows, columns = shape[-2:]

    def codes(p: Parts) -> Codes:
        own = p["scale"].double()
        own = own.reshape(-1, 1) if own.ndim < 2 else own
        down, along = own.shape[-2:]
        size = (-(-rows // down), -(-columns // along))
        if block is not None and (down, along) == (-(-rows // block[0]), -(-columns // block[1])) and own.numel() > 1:
            size = (block[0], block[1])
        at = torch.arange(rows) // size[0], torch.arange(columns) // size[1]
        wide = own[..., at[0], :][..., at[1]]
        group = at[0].unsqueeze(1) * along + at[1]
        return Codes(p["weight"].double(), wide, group=group, stored=p["scale"].dtype, span="size")

    return Held({"weight": name, "scale": scale}, shape, dtype, codes)


def _torchao(files: Checkpoint, _: Mapping[str, Any]) -> Iterator[tuple[str, Held]]:
    for file in files.files:
        for name, text in read_header(files.weights / file)[1].items():
            try:
                facts = json.loads(text)
            except ValueError:
                continue
            if not isinstance(facts, dict) or facts.get("_type", "Tensor") == "Tensor":
                continue
            stem, dot, local = name.rpartition(".")
            parts = {str(end): f"{stem}{dot}_{local}_{end}" for end in facts["_tensor_data_names"]}
            shape, block = _shape(files, parts["qdata"]), facts["_data"]["block_size"]

            def codes(p: Parts, shape: tuple[int, ...] = shape, block: list[int] = block) -> Codes:
                grid = [n // b for n, b in zip(shape, block, strict=True)]
                scale, zero = (
                    None
                    if end not in p
                    else p[end].double().reshape(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
                    for end in ("scale", "zero_point")
                )
                assert scale is not None  # noqa: S101 - every class has scales
                bounds = None if p["qdata"].dtype in _FLOAT8 else (-128, 127)
                return Codes(p["qdata"].double(), scale, 0.0 if zero is None else zero, bounds=bounds)

            twice = 1 if facts["_type"] == "Float8Tensor" else 2
            yield name, Held(parts, shape, getattr(torch, facts["_data"]["dtype"]["_data"]), codes, roundings=twice)


_FINDERS: Mapping[str, Callable[[Checkpoint, Mapping[str, Any]], Iterator[tuple[str, Held]]]] = MappingProxyType(
    {
        "gptq": _gptq,
        "awq": _awq,
        "hqq": _hqq,
        "compressed-tensors": _compressed,
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "torchao": _torchao,
    }
)
