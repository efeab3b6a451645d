"""bitsandbytes' int8 (Dettmers et al. 2022, "LLM.int8()") is a storage format with one scale a row, ``W = weight · SCB / 127``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.errors import FormatError, StateError

from .base import OPSET, Format, Layout, Live, Names, Offloaded, Read, Shape, finite
from .encoded_weight import EncodedWeight, WeightFormat
from .levels import quotient


class Int8(Format):
    """The tensors ``weight (out, in)`` int8 and ``SCB (out,)`` float32. A checkpoint also has ``weight_format``."""

    name = "int8"
    roundings = ("nearest", "preserve")
    scales_name = "SCB"
    unit = 127.0
    strong_change = 1 / 254
    own_dtype = torch.float16  # Int8Params quantises the float16 rounding
    width = "int8"
    name_part = ".SCB"
    config_fields = MappingProxyType({"load_in_8bit": True})
    layer_classes: tuple[str, ...] = ("Linear8bitLt", "Embedding8bit")
    parameter_class = "Int8Params"
    onnx_scales = "scale"

    def layout(self, f: WeightFormat) -> Layout:
        return {"weight": (torch.int8, f.shape), "SCB": (torch.float32, f.shape[:1]), "": (torch.uint8, ())}

    def weights_per_entry(self, f: WeightFormat) -> dict[str, int]:
        return {"weight": f.shape[-1], "SCB": f.shape[-1]}

    def check(self, encoded: EncodedWeight) -> None:
        weight, scb = encoded.require("weight", "SCB")
        shape, expected = tuple(weight.shape), encoded.format.shape
        if weight.dtype != torch.int8 or shape != expected:
            message = f"an int8 weight must be int8 of its format's shape, but the tensor is {weight.dtype}"
            raise encoded.misfit(message, None, shape, expected)
        if scb.numel() != shape[0]:
            raise encoded.misfit("SCB must hold one value per row", "SCB", tuple(scb.shape), shape[:1])

    def encode(self, weight: Tensor, f: WeightFormat, rounding: str) -> EncodedWeight:
        weight = finite(weight.detach().to(torch.float32), "the weight to quantise is not finite", f)
        scales = self.good_scales(weight)
        return self.assemble(f, self.codes_at(weight, scales, f), self.statistics(scales, f))

    def scales(self, encoded: EncodedWeight) -> Tensor:
        (scb,) = encoded.require("SCB")
        return scb.detach().reshape(-1).to(torch.float32)

    def levels(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.arange(-127, 128, device=device, dtype=torch.int8)
        levels, bounds = codes.to(torch.float32), torch.arange(-127, 127, device=device) + 0.5
        return quotient(levels, 127), quotient(bounds, 127), codes

    def nearest_levels(self, scaled: Tensor) -> Tensor:
        return quotient(torch.round(scaled * 127.0).clamp(-127, 127), 127)

    def codes_at(self, weight: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        weight, scb = weight.reshape(f.shape), scales.unsqueeze(-1)
        factor = 127.0 / scb
        scaled = weight * factor
        if not bool(torch.isfinite(factor).all()):
            # 127/scb overflows for rows of zeros and near zero, where bitsandbytes' cast of NaN and infinity is
            # undefined: divide first
            scaled = torch.where(torch.isfinite(factor), scaled, weight / scb.clamp(min=1e-45) * 127.0)
        return torch.round(scaled).clamp(-127, 127).to(torch.int8)

    # --- in a checkpoint ---

    def tensor_names(self, weight: str) -> dict[str, str]:
        module = weight.removesuffix("weight")
        return {"weight": weight, "SCB": f"{module}SCB", "": f"{module}weight_format"}

    def format_tensor(self, encoded: EncodedWeight) -> Tensor:
        return torch.tensor(0, dtype=torch.uint8)

    def recognises(self, weight: str, names: Collection[str], dtype: torch.dtype) -> bool:
        return dtype == torch.int8

    def from_checkpoint(self, weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> EncodedWeight:
        scb = self.tensor_names(weight)["SCB"]
        if scb not in names:
            message = "the int8 weight lacks its SCB statistics"
            raise FormatError(message, tensor=weight, format="int8", remedy="save the whole checkpoint again")
        return EncodedWeight(WeightFormat("int8", shape, torch.float16), {"weight": read(weight), "SCB": read(scb)})

    # --- undo records ---

    def codes_by_level(self, facts: Mapping[str, Any]) -> Tensor:
        return torch.arange(-128, 128).to(torch.int8)

    def nearest_ranks(self, numbers: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = torch.clamp(torch.round(numbers), -127, 127)
        up = ((numbers > near) | (near == -127)) & (near < 127)
        return near + 128, up, (0.5 - (numbers - near).abs()) * 1024

    # --- in kernels and graphs ---

    def kernel_name(self, f: WeightFormat) -> str:
        return "INT8"

    def onnx_product(self, x: Tensor, codes: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        # the scales lie along the rows of the untransposed weight: with scales along the columns onnxruntime would
        # quantise the activations too
        symbolic = torch.onnx.ops.symbolic
        parts: Any = (codes, scales)
        weight = symbolic("DequantizeLinear", parts, {"axis": 0}, dtype=torch.float32, shape=f.shape, version=OPSET)
        return x @ weight.to(x.dtype).t()

    # --- in a live model ---

    def is_quantised(self, weight: Any) -> bool:
        return weight is not None and weight.dtype == torch.int8

    def read_live(self, module: Any, weight: Any, offloaded: Offloaded, path: str) -> Live | None:
        if not self.is_quantised(weight):
            if getattr(weight, "has_fp16_weights", True):
                return None
            remedy = "move the model to its device first: model.to(device)"
            raise StateError("the 8-bit layer is not quantised yet", module=path, remedy=remedy)
        holders = (weight, getattr(module, "state", None))
        found = [getattr(h, "SCB", None) for h in holders] if offloaded is None else [offloaded.get("SCB")]
        scb = next((s for s in found if s is not None), None)
        if scb is None:
            message = "the int8 layer has lost its SCB statistics"
            raise FormatError(message, module=path, tensor="SCB", format="int8", remedy="reload the model")
        f = WeightFormat("int8", tuple(weight.shape), torch.float16)
        # `model.to(device)` leaves the statistics of a quantised layer behind, because torch moves the data alone
        return EncodedWeight(f, {"weight": weight.detach(), "SCB": scb.to(weight.device)}), f

    def parameter_of(self, encoded: EncodedWeight, old: Any, module: Any) -> nn.Parameter:
        codes, scb = encoded.tensors["weight"], encoded.tensors["SCB"]
        return _parameter(old, codes, CB=codes, SCB=scb)

    def new_linear(self, f: WeightFormat, compute_dtype: torch.dtype, threshold: float) -> nn.Module:
        from bitsandbytes.nn import Linear8bitLt

        rows, columns = f.shape
        return Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")  # type: ignore[no-any-return]

    def plain_parameter(self, old: Any, data: Tensor) -> nn.Parameter:
        return _parameter(old, data)

    def alias(self, parameter: Any) -> nn.Parameter:
        return _parameter(parameter, parameter.data, CB=parameter.CB, SCB=parameter.SCB)


def _parameter(old: Any, data: Tensor, **statistics: Tensor) -> nn.Parameter:
    settings = {"requires_grad": old.requires_grad, "has_fp16_weights": old.has_fp16_weights}
    return type(old)(data, **settings, **statistics)  # type: ignore[no-any-return]
