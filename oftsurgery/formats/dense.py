"""A plain tensor is a storage format too, which :class:`Dense` describes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oftsurgery.errors import FormatError

from .base import Format, Layout, Names, Read, Shape, finite
from .encoded_weight import EncodedWeight, WeightFormat

_KERNELS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Dense(Format):
    """The tensor ``weight`` in the weight's shape and a float dtype."""

    quantised = False
    has_levels = False

    def layout(self, f: WeightFormat) -> Layout:
        return {"weight": (f.dtype, f.shape)}

    def weights_per_entry(self, f: WeightFormat) -> dict[str, int]:
        return {"weight": f.shape[1]}

    def check(self, encoded: EncodedWeight) -> None:
        (weight,) = encoded.require("weight")
        shape, expected = tuple(weight.shape), encoded.format.shape
        if not weight.is_floating_point():
            message = f"a dense weight must be floating point, but the tensor is {weight.dtype}"
            raise FormatError(message, remedy="dequantise the weight first")
        if shape != expected:
            raise encoded.misfit("the stored weight does not have its format's shape", None, shape, expected)

    def encode(self, weight: Tensor, f: WeightFormat, rounding: str) -> EncodedWeight:
        stored = finite(weight.to(f.dtype), f"the weight is not finite in {f.label}", f)
        return EncodedWeight(f, {"weight": stored})

    def decode(self, encoded: EncodedWeight) -> Tensor:
        self.check(encoded)
        weight = self.codes(encoded)
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    def from_checkpoint(self, weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> EncodedWeight:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            message = f"a weight of {dtype} is stored in a way that oftsurgery does not know"
            raise FormatError(message, tensor=weight, remedy="dequantise the weight first")
        return EncodedWeight(WeightFormat("dense", shape, dtype), {"weight": read(weight)})

    def new_linear(self, f: WeightFormat, compute_dtype: torch.dtype, threshold: float) -> nn.Module:
        return nn.Linear(f.shape[1], f.shape[0], bias=False, device="meta", dtype=f.dtype)

    def kernel_name(self, f: WeightFormat) -> str:
        return _KERNELS.get(f.dtype, "")

    def kernel_operands(self, encoded: EncodedWeight) -> tuple[Tensor, Tensor] | None:
        self.check(encoded)
        weight = self.codes(encoded)
        return (weight, weight) if weight.dtype == encoded.format.dtype and weight.is_contiguous() else None
