"""bitsandbytes' NF4 and FP4 are storage formats (Dettmers et al. 2023, "QLoRA").

Blocks of ``blocksize`` weights lie over the flat row-major weight, so that a block straddles rows if ``in`` is not a
multiple of ``blocksize``. Two codes make a byte, the first in the high nibble. Each block is scaled by its absmax.
Double quantisation stores the absmax values as uint8, in blocks of 256 around their mean.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtype_names import name_of
from oftsurgery.dtypes import NAMED
from oftsurgery.errors import FormatError, StateError
from oftsurgery.other_libraries import is_of

from .base import Format, Layout, Live, Names, Offloaded, Read, Shape, finite, in_blocks
from .encoded_weight import RELOAD, EncodedWeight, WeightFormat
from .levels import LEVELS, levels_of, levels_of_bytes, sorted_levels
from .quant_state import QUANTISE_AGAIN, copy_quant_state, unpack_cpu_layout, unpack_state
from .scales import TINY, best_scales, grid_scales

_QUANT_STATE = ".quant_state.bitsandbytes__"

#: block sizes of com.microsoft::MatMulBnb4 (onnxruntime's contrib operators, since 1.17)
_GRAPH_BLOCKSIZES = (16, 32, 64, 128, 256)


class FourBit(Format):
    """Packed codes and their statistics. A checkpoint also has their state, which is JSON in a uint8 tensor.

    Args:
        name: ``"nf4"`` or ``"fp4"``.
        strong_change: see :class:`Format`.
        farther: more scales, in units of absmax, from which :mod:`oftsurgery.weights.kernels.fold_cpu` searches.
    """

    roundings = ("nearest", "preserve", "grid", "mse")
    scales_name = "absmax"
    codes_per_element = 2
    either_sign = True
    shared_tensors = ("quant_map", "nested_quant_map")
    least_blocksize = 2
    width = "4-bit"
    name_part = _QUANT_STATE
    layer_classes, parameter_class = ("Linear4bit", "Embedding4bit"), "Params4bit"
    onnx_scales = "absmax"

    def __init__(self, name: str, strong_change: float, farther: tuple[float, ...] = ()) -> None:
        self.name, self.strong_change, self.farther = name, strong_change, farther
        self.config_fields = MappingProxyType({"load_in_4bit": True, "bnb_4bit_quant_type": name})

    # --- values ---

    def layout(self, f: WeightFormat) -> Layout:
        n = math.prod(f.shape)
        blocks = -(-n // f.blocksize)
        single: Layout = {
            "weight": (f.storage, (-(-n // 2) // f.storage.itemsize, 1)),
            "absmax": (torch.float32, (blocks,)),
            "quant_map": (torch.float32, (16,)),
            "": (torch.uint8, None),
        }
        if not f.nested_blocksize:
            return single
        return single | {
            "absmax": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (-(-blocks // f.nested_blocksize),)),
            "nested_quant_map": (torch.float32, (256,)),
            "nested_offset": (torch.float32, ()),
        }

    def weights_per_entry(self, f: WeightFormat) -> dict[str, int]:
        return {"weight": 2, "absmax": f.blocksize}

    def check(self, encoded: EncodedWeight) -> None:
        packed, absmax = encoded.require("weight", "absmax")
        f, n = encoded.format, math.prod(encoded.format.shape)
        nbytes, expected = packed.numel() * packed.dtype.itemsize, -(-n // 2)
        if nbytes != expected:
            message = "the packed codes have another number of bytes than the weight needs"
            raise encoded.misfit(message, "weight", (nbytes,), (expected,))
        blocks = -(-n // max(f.blocksize, 1))
        if f.blocksize < 2 or absmax.numel() != blocks:
            message = f"absmax does not hold one value per block of {f.blocksize}"
            raise encoded.misfit(message, "absmax", (absmax.numel(),), (blocks,))
        quant_map = encoded.tensors.get("quant_map")
        if quant_map is None:
            return
        levels, given = levels_of(f.codec, quant_map.device), quant_map.to(torch.float32)
        near = given.shape == levels.shape and (given.equal(levels) or torch.allclose(given, levels, rtol=0, atol=1e-3))
        if not near:
            why = "quant_map is not the format's own table; bitsandbytes' kernels ignore it and would decode another weight"
            remedy = "quantise the model again with a stock bitsandbytes"
            raise FormatError(why, tensor="quant_map", format=f.label, remedy=remedy)

    def encode(self, weight: Tensor, f: WeightFormat, rounding: str) -> EncodedWeight:
        flat = finite(weight.detach().to(torch.float32).reshape(-1), "the weight to quantise is not finite", f)
        if rounding != "nearest":
            ways = best_scales if rounding == "mse" else grid_scales
            scales = ways(in_blocks(flat, f.blocksize), *self.levels(flat.device)[:2])
            # codes for the scales before double quantisation, as bitsandbytes chooses its codes: those for the scales that a
            # reader will see need another rotation, and err less by 0.02 %
            return self.assemble(f, self.codes_at(flat, scales, f), self.statistics(scales, f))
        blocks = in_blocks(flat, f.blocksize)
        absmax = blocks.abs().amax(-1)
        scaled = blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(-1)
        if flat.numel() % f.blocksize:
            # bitsandbytes treats a short last block a little differently: its absmax itself is bounded, and is the divisor
            absmax[-1].clamp_(min=TINY)
            scaled[-1] = blocks[-1] / absmax[-1]
        return self.assemble(f, self._nearest(scaled.reshape(-1)[: flat.numel()]), self.statistics(absmax, f))

    def change_storage(self, encoded: EncodedWeight, into: WeightFormat) -> EncodedWeight:
        t = dict(encoded.tensors)
        if encoded.format.nested_blocksize != into.nested_blocksize:
            t |= self.statistics(self.scales(encoded), into)
        if encoded.format.storage != into.storage:
            t["weight"] = self._held(self.codes(encoded).unsqueeze(1), into)
        return EncodedWeight(into, t)

    def codes(self, encoded: EncodedWeight) -> Tensor:
        return encoded.tensors["weight"].detach().contiguous().reshape(-1).view(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        return levels_of_bytes(self.name, codes.device)[codes.to(torch.int64)].reshape(-1)

    def pack(self, codes: Tensor, f: WeightFormat) -> Tensor:
        return self._held(self._packed(codes.reshape(-1)), f)

    def _packed(self, codes: Tensor) -> Tensor:
        """Codes ``(n,)`` as two per byte, ``(⌈n/2⌉, 1)``; an odd last code shares its byte with the code of zero."""
        if codes.numel() % 2:
            _, bounds, in_order = self.levels(codes.device)
            codes = torch.cat([codes, in_order[torch.bucketize(bounds.new_zeros(1), bounds)]])
        return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)

    def _nearest(self, scaled: Tensor) -> Tensor:
        """The nearest codes, packed, of values ``(n,)`` in units of their scale."""
        _, bounds, codes = self.levels(scaled.device)
        return self._packed(codes[torch.bucketize(scaled, bounds, out_int32=True)])

    def _held(self, packed: Tensor, f: WeightFormat) -> Tensor:
        """The packed bytes ``(⌈n/2⌉, 1)`` as a tensor of the storage dtype."""
        if f.storage == packed.dtype:
            return packed
        if packed.numel() % f.storage.itemsize:
            message = f"{packed.numel()} packed bytes do not fill whole elements of {f.storage}"
            raise FormatError(message, format=f.label, remedy="use quant_storage=torch.uint8")
        return packed.reshape(-1).view(f.storage).unsqueeze(1)

    def scales(self, encoded: EncodedWeight) -> Tensor:
        (absmax,) = encoded.require("absmax")
        f = encoded.format
        if not f.nested_blocksize:
            if not absmax.is_floating_point():
                message = "absmax is quantised, but its nested statistics are missing"
                raise FormatError(message, tensor="absmax", format=f.label, remedy=RELOAD)
            return absmax.reshape(-1).to(torch.float32)
        nested_absmax, nested_map, offset = encoded.require("nested_absmax", "nested_quant_map", "nested_offset")
        for name, tensor, expected in (
            ("nested_quant_map", nested_map, 256),
            ("nested_absmax", nested_absmax, -(-absmax.numel() // f.nested_blocksize)),
        ):
            if tensor.numel() != expected:
                message = f"{name} has another number of values than absmax needs"
                raise encoded.misfit(message, name, (tensor.numel(),), (expected,))
        values = torch.index_select(nested_map.to(torch.float32), 0, absmax.reshape(-1).to(torch.int32))
        scaled = in_blocks(values, f.nested_blocksize) * nested_absmax.reshape(-1, 1).to(torch.float32)
        return scaled.reshape(-1)[: absmax.numel()] + offset.to(device=absmax.device, dtype=torch.float32)

    def statistics(self, scales: Tensor, f: WeightFormat) -> dict[str, Tensor]:
        if not f.nested_blocksize:
            return {"absmax": scales}
        # bitsandbytes' own function, because its CPU kernel uses a coarse table, whose codes are one step off the nearest
        # in 0.2 % of the cases
        from bitsandbytes.functional import quantize_blockwise

        offset = self.offset_of(scales, f)
        codes, state = quantize_blockwise(scales - offset, blocksize=f.nested_blocksize)
        nested = {"nested_absmax": state.absmax, "nested_quant_map": state.code.clone(), "nested_offset": offset}
        return {"absmax": codes, **nested}

    def offset_of(self, scales: Tensor, f: WeightFormat) -> Tensor:
        """What double quantisation takes off the scales before it rounds them."""
        return finite(scales.mean(), "the mean of absmax, which double quantisation stores, is not finite", f)

    def assemble(self, f: WeightFormat, codes: Tensor, statistics: Mapping[str, Tensor]) -> EncodedWeight:
        levels = levels_of(self.name, codes.device).clone()
        return EncodedWeight(f, {"weight": self._held(codes, f), "quant_map": levels, **statistics})

    def levels(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return sorted_levels(self.name, device)

    def codes_at(self, weight: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        rows, s = in_blocks(weight, f.blocksize), scales.unsqueeze(-1)
        scaled = torch.where(s.abs() >= TINY, rows * (1.0 / s), rows / s)  # if 1/s overflows, divide
        return self._nearest(torch.where(s != 0, scaled, 0.0).reshape(-1)[: weight.numel()])

    def good_scales(self, blocks: Tensor) -> Tensor:
        return grid_scales(blocks, *self.levels(blocks.device)[:2])

    # --- in a checkpoint ---

    def tensor_names(self, weight: str) -> dict[str, str]:
        plain = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        return {"weight": weight, **{p: f"{weight}.{p}" for p in plain}, "": weight + _QUANT_STATE + self.name}

    def format_tensor(self, encoded: EncodedWeight) -> Tensor:
        f = encoded.format
        fields: dict[str, Any] = {"quant_type": f.codec, "blocksize": f.blocksize, "dtype": name_of(f.dtype)}
        fields["shape"] = list(f.shape)
        if f.nested_blocksize:
            offset = float(encoded.tensors["nested_offset"])
            fields |= {"nested_blocksize": f.nested_blocksize, "nested_dtype": "float32", "nested_offset": offset}
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    def recognises(self, weight: str, names: Collection[str], dtype: torch.dtype) -> bool:
        return self.tensor_names(weight)[""] in names

    def from_checkpoint(self, weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> EncodedWeight:
        named = self.tensor_names(weight)
        fields = unpack_state(read(named[""]), named[""])
        if fields["quant_type"] != self.name:
            message = f"the packed state says {fields['quant_type']}, but the tensor's name says {self.name}"
            raise FormatError(message, tensor=named[""], remedy=QUANTISE_AGAIN)
        if -(-math.prod(fields["shape"]) // 2) != math.prod(shape) * dtype.itemsize:
            said = "×".join(map(str, fields["shape"]))
            message = f"the stored bytes do not fit a weight of {said}, which is the shape in the packed state"
            raise FormatError(message, tensor=weight, shape=shape, format=self.name, remedy=QUANTISE_AGAIN)
        if len(shape) > 1 and sorted(shape)[-2] != 1:
            raise self._cpu_packed(weight, shape)
        nested = named["nested_absmax"] in names
        wanted = ["absmax"] + ["nested_absmax", "nested_quant_map"] * (nested or "nested_offset" in fields)
        missing = [named[k] for k in wanted if named[k] not in names]
        if missing:
            message = "the 4-bit weight lacks this tensor of statistics"
            raise FormatError(message, tensor=missing[0], format=self.name, remedy="save the whole weight again")
        if nested and ("nested_offset" not in fields or "nested_blocksize" not in fields):
            message = "the packed state lacks nested_offset or nested_blocksize, which the nested statistics need"
            raise FormatError(message, tensor=named[""], format=self.name, remedy=QUANTISE_AGAIN)
        tensors = {k: read(n) for k, n in named.items() if k == "weight" or (k and n in names)}
        if tensors["absmax"].ndim > 1 and min(tensors["absmax"].shape) > 1:
            raise self._cpu_packed(named["absmax"], tuple(tensors["absmax"].shape))
        if nested:
            tensors["nested_offset"] = torch.tensor(float(fields["nested_offset"]))
        sizes = (fields["blocksize"], fields["nested_blocksize"] if nested else 0)
        f = WeightFormat(self.name, tuple(fields["shape"]), NAMED[fields["dtype"]], *sizes, dtype)
        return EncodedWeight(f, tensors)

    def _cpu_packed(self, tensor: str, shape: tuple[int, ...]) -> FormatError:
        # bitsandbytes ≥ 0.49: a raw weight is tiled in this packing, and even state_dict() leaves a single absmax as
        # (in/blocksize, out), which gives noise when it is read flat
        why = "the tensor was saved in bitsandbytes' packing for CPUs, after an eval forward on a CPU: the file's values are noise"
        remedy = "load the base again, and set `module.support_avx512bf16_for_cpu = False` on its layers before any CPU forward"
        return FormatError(why, tensor=tensor, shape=shape, format=self.name, remedy=remedy)

    def loaded_as(self, shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool) -> WeightFormat:
        return WeightFormat(self.name, shape, dtype, 64, 256 if double_quant else 0)

    def in_place_of(self, f: WeightFormat, dtype: torch.dtype, double_quant: bool) -> WeightFormat:
        if not f.blocksize:
            return super().in_place_of(f, dtype, double_quant)
        nested = (f.nested_blocksize or 256) if double_quant else 0
        return replace(f, codec=self.name, nested_blocksize=nested)  # blocks and storage of 4 bits stay

    # --- undo records ---

    def prediction_inputs(self, encoded: EncodedWeight) -> dict[str, Tensor]:
        # a CPU forward that repacks the weight rounds absmax to bfloat16
        return {"codes": self.codes(encoded), "absmax": self.scales(encoded).to(torch.bfloat16)}

    def unpack_codes(self, stored: Tensor, n: int, facts: dict[str, Any]) -> Tensor:
        packed = stored.contiguous().reshape(-1).view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1)
        facts["present"] = sum(1 << c for c in range(16) if bool((codes[:n] == c).any()))
        facts["pad"] = int(codes[n]) if n % 2 else 0
        return codes[:n]

    def repack_codes(self, codes: Tensor, facts: Mapping[str, Any]) -> Tensor:
        codes = torch.cat([codes, codes.new_full((len(codes) % 2,), facts["pad"])])
        return codes[::2] << 4 | codes[1::2]

    def codes_by_level(self, facts: Mapping[str, Any]) -> Tensor | None:
        present = facts.get("present")
        if type(present) is not int or not 0 < present < 1 << 16 or facts.get("pad") not in range(16):
            return None
        levels = levels_of(self.name, torch.device("cpu")).tolist()
        # negative zero comes before zero; only codes that occur are taken, because a quantiser may use one of fp4's two zeros
        there = sorted((c for c in range(16) if present >> c & 1), key=lambda c: (levels[c], -c))
        return torch.tensor(there, dtype=torch.uint8)

    def nearest_ranks(self, numbers: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = levels_of(self.name, torch.device("cpu")).to(torch.float64)[ranks.to(torch.int64)]
        bounds = (level[1:] + level[:-1]) / 2
        infinite = bounds.new_full((1,), torch.inf)
        wide = torch.cat([-infinite, bounds, infinite])
        near = torch.bucketize(numbers, bounds)
        up = ((numbers > level[near]) | (near == 0)) & (near < len(ranks) - 1)
        return near, up, torch.where(up, wide[near + 1] - numbers, numbers - wide[near]) * 4096

    # --- in kernels and graphs ---

    def kernel_name(self, f: WeightFormat) -> str:
        return "FOUR_BIT"

    def onnx_obstacle(self, f: WeightFormat) -> str | None:
        if f.blocksize not in _GRAPH_BLOCKSIZES:
            known = ", ".join(map(str, _GRAPH_BLOCKSIZES))
            return f"MatMulBnb4 has no block size of {f.blocksize}, only {known}"
        if f.shape[1] % f.blocksize:
            return f"{f.shape[1]} input features are not a multiple of the block size {f.blocksize}"
        return None

    def onnx_product(self, x: Tensor, codes: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        # the scales are float32 in every graph: a narrower dtype would change them, and onnxruntime's CPU kernel takes
        # float32 alone
        rows, columns = f.shape
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (x.float(), codes, scales),
            {"K": columns, "N": rows, "block_size": f.blocksize, "quant_type": int(self.name == "nf4")},
            dtype=torch.float32,
            shape=(*x.shape[:-1], rows),
            version=1,
        )
        return y.to(x.dtype)

    # --- in a live model ---

    def is_quantised(self, weight: Any) -> bool:
        return weight is None or not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None

    def read_live(self, module: Any, weight: Any, offloaded: Offloaded, path: str) -> Live:
        if offloaded is not None:
            message = "a 4-bit layer offloaded by accelerate keeps no quantisation state with its weight"
            remedy = "keep 4-bit layers on a device (device_map), or fold the checkpoint on disk"
            raise StateError(message, module=path, remedy=remedy)
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None:
            if weight.is_floating_point() and not getattr(weight, "bnb_quantized", False):
                remedy = "move the model to its device first: model.to(device)"
                raise StateError("the 4-bit layer is not quantised yet", module=path, remedy=remedy)
            message = "the 4-bit layer has lost its quant_state"
            raise FormatError(message, module=path, format="4-bit", remedy="reload the model")
        if state.quant_type not in LEVELS:
            known, given = " or ".join(LEVELS), str(state.quant_type)
            raise FormatError("the 4-bit type is unknown", module=path, format=given, remedy=f"quantise with {known}")
        shape, data = tuple(state.shape), weight.detach()
        if getattr(state, "packing_format_for_cpu", False):
            packed, absmax = unpack_cpu_layout(data, state.absmax, (shape[0], shape[1]), state.blocksize)
            now = WeightFormat(state.quant_type, shape, state.original_dtype, state.blocksize)
            nested = 256 if state.original_nested or getattr(weight, "compress_statistics", False) else 0
            home = replace(now, nested_blocksize=nested, storage=getattr(state, "original_storage_type", torch.uint8))
            return EncodedWeight(now, {"weight": packed, "absmax": absmax, "quant_map": state.code}), home
        if state.absmax.ndim != 1:
            # bitsandbytes 0.50: state_dict() of a CPU-packed layer puts the codes back, but leaves a single absmax
            # transposed
            message = "saving this layer after a CPU eval forward has left its absmax transposed: bitsandbytes now computes noise with the layer"
            remedy = "load the base model again; set `module.support_avx512bf16_for_cpu = False` on its layers before evaluating on the CPU"
            raise StateError(message, module=path, tensor="absmax", shape=tuple(state.absmax.shape), remedy=remedy)
        tensors, nested = {"weight": data, "absmax": state.absmax, "quant_map": state.code}, 0
        if state.nested:
            inner, nested = state.state2, state.state2.blocksize
            tensors |= {"nested_absmax": inner.absmax, "nested_quant_map": inner.code, "nested_offset": state.offset}
        now = WeightFormat(state.quant_type, shape, state.dtype, state.blocksize, nested, data.dtype)
        # a CPU eval forward that fails to pack (in is not a multiple of blocksize) undoes the double quantisation first
        undone = not nested and hasattr(state, "original_nested") and getattr(weight, "compress_statistics", False)
        return EncodedWeight(now, tensors), replace(now, nested_blocksize=256) if undone else now

    def parameter_of(self, encoded: EncodedWeight, old: Any, module: Any) -> nn.Parameter:
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        t, f = encoded.tensors, encoded.format
        nested = None
        if f.nested_blocksize:
            inner, code = t["nested_absmax"], t["nested_quant_map"]
            nested = QuantState(absmax=inner, blocksize=f.nested_blocksize, code=code, dtype=torch.float32)
        held = {"absmax": t["absmax"], "code": t["quant_map"], "offset": t.get("nested_offset"), "state2": nested}
        state = QuantState(shape=torch.Size(f.shape), blocksize=f.blocksize, quant_type=f.codec, dtype=f.dtype, **held)
        if not is_of("bitsandbytes", old, self.parameter_class):
            # FSDP leaves a plain Parameter and the module's quant_state; bitsandbytes' forward makes a Params4bit of the
            # two in the same way
            settings = (f.blocksize, bool(nested), f.codec, f.storage, module)
            old = Params4bit(old.data, old.requires_grad, state, *settings, bnb_quantized=True)
        # only the constructor's own arguments are kept: __dict__ may carry torch.compile's attributes
        kept = {name: getattr(old, name) for name in ("requires_grad", "compress_statistics", "module")}
        if getattr(old.quant_state, "nested", bool(nested)) != bool(nested):
            kept["compress_statistics"] = bool(nested)
        own = {"blocksize": f.blocksize, "quant_type": f.codec, "quant_storage": f.storage}
        return type(old)(t["weight"], quant_state=state, bnb_quantized=True, **kept, **own)  # type: ignore[no-any-return]

    def new_linear(self, f: WeightFormat, compute_dtype: torch.dtype, threshold: float) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        settings = {
            "compute_dtype": compute_dtype,
            "compress_statistics": bool(f.nested_blocksize),
            "quant_type": f.codec,
        }
        rows, columns = f.shape
        return Linear4bit(columns, rows, bias=False, quant_storage=f.storage, device="meta", **settings)  # type: ignore[no-any-return]

    def alias(self, parameter: Any) -> nn.Parameter:
        new: Any = copy.copy(parameter)
        if new.quant_state is not None:
            new.quant_state = copy_quant_state(new.quant_state)
        return new  # type: ignore[no-any-return]
