"""A :class:`Format` is a way to store a weight, and each storage format is a subclass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.errors import NonFiniteError, StateError
from oftsurgery.other_libraries import is_of

from .encoded_weight import EncodedWeight, WeightFormat
from .levels import quotient

#: the opset of every exported ONNX graph
OPSET = 20

Names = Collection[str]
Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...] | None]]
Offloaded = Mapping[str, Tensor] | None
Live = tuple[EncodedWeight, WeightFormat]


class Format:
    """A way to store a weight. Each way is one subclass in a file of this folder, and a row of
    :data:`~oftsurgery.formats.all_formats.FORMATS`.

    In every method ``f`` is a :class:`WeightFormat` of this format, ``encoded`` a weight in it, and ``weight`` the name
    of a weight's tensor in a checkpoint, which ends in ``weight``. A quantised weight is made of *codes*, which stand
    for *numbers*; a number divided by :attr:`unit` is a level in [-1, 1], and a level times its block's scale is the
    weight.

    A subclass writes the methods that raise NotImplementedError here. The plain format has no codes, and writes only the
    methods that a plain weight needs.
    """

    name = "dense"  #: key of FORMATS
    quantised = True
    roundings: tuple[str, ...] = ("nearest",)  #: that the format knows
    has_levels = True  #: whether all blocks share one table of levels
    scales_name = ""  #: local name of the tensor that holds the blocks' scales
    unit = 1.0  #: the number whose level is 1
    codes_per_element = 1  #: codes in one element of the stored tensor
    either_sign = False  #: whether a block's scale may be negative
    strong_change = 0.0  #: change, in units of the scale, above which oftsurgery.weights.preserve scales a block anew
    shared_tensors: tuple[str, ...] = ()  #: local names of the tensors that are the same in many weights
    least_blocksize = 0
    own_dtype: torch.dtype | None = (
        None  #: :attr:`WeightFormat.dtype` of every weight in the format, whatever the model's dtype is
    )
    width = ""  #: name of this class's formats in messages
    name_part = "\0"  #: part of a tensor's name that shows weights of this class's formats in a checkpoint
    config_fields: Mapping[str, Any] = MappingProxyType({})  #: fields of BitsAndBytesConfig that ask for the format
    layer_classes: tuple[str, ...] = ()  #: bitsandbytes' classes of layers that hold such weights
    parameter_class = ""  #: bitsandbytes' class of parameters that hold such weights
    onnx_scales = ""  #: name of the scales in an ONNX graph

    # --- values ---

    def layout(self, f: WeightFormat) -> Layout:
        """Dtype and shape of each tensor by its local name, and of :meth:`format_tensor` under ``""``."""
        raise NotImplementedError

    def weights_per_entry(self, f: WeightFormat) -> dict[str, int]:
        """The number of weights behind one entry of each tensor, by local name, without :attr:`shared_tensors`."""
        raise NotImplementedError

    def check(self, encoded: EncodedWeight) -> None:
        """Refuse tensors that are missing or do not fit the format, with FormatError or ShapeError."""
        raise NotImplementedError

    def encode(self, weight: Tensor, f: WeightFormat, rounding: str) -> EncodedWeight:
        raise NotImplementedError

    def decode(self, encoded: EncodedWeight) -> Tensor:
        self.check(encoded)
        f, n = encoded.format, math.prod(encoded.format.shape)
        # the flat weight, never row by row: a 4-bit block may straddle rows (bitsandbytes 0.50's own CPU kernel is wrong
        # for in = 96 with blocksize 64)
        values = in_blocks(self.numbers(self.codes(encoded))[:n], f.block) * self.steps(encoded).unsqueeze(-1)
        return values.reshape(-1)[:n].reshape(f.shape)

    def change_storage(self, encoded: EncodedWeight, into: WeightFormat) -> EncodedWeight:
        """The weight in a format that differs only in the storage of codes and statistics; no code changes."""
        return EncodedWeight(into, encoded.tensors)

    def codes(self, encoded: EncodedWeight) -> Tensor:
        """The stored codes as kernels take them: one code per weight in the weight's shape, or flat and packed."""
        return encoded.tensors["weight"].detach()

    def numbers(self, codes: Tensor) -> Tensor:
        """The numbers that stored codes stand for, flat, in float32."""
        return codes.reshape(-1).to(torch.float32)

    def pack(self, codes: Tensor, f: WeightFormat) -> Tensor:
        """The stored tensor, from one code per weight."""
        return codes

    def scales(self, encoded: EncodedWeight) -> Tensor:
        """The scales ``(blocks,)`` in float32, as a reader of the weight sees them."""
        raise NotImplementedError

    def steps(self, encoded: EncodedWeight) -> Tensor:
        """The factors of the numbers: the scales divided by :attr:`unit`."""
        scales = self.scales(encoded)
        return scales if self.unit == 1 else quotient(scales, self.unit)

    def statistics(self, scales: Tensor, f: WeightFormat) -> dict[str, Tensor]:
        """The tensors that hold scales ``(blocks,)``."""
        return {self.scales_name: scales} if self.quantised else {}

    def assemble(self, f: WeightFormat, codes: Tensor, statistics: Mapping[str, Tensor]) -> EncodedWeight:
        """A weight from stored codes and :meth:`statistics`."""
        return EncodedWeight(f, {"weight": codes, **statistics})

    def levels(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The levels in order, the bounds between the levels (see :class:`~oftsurgery.formats.codecs.Grid`), and the levels' stored codes."""
        raise NotImplementedError

    def nearest_levels(self, scaled: Tensor) -> Tensor:
        """The levels that are nearest to values in units of the scale."""
        levels, bounds, _ = self.levels(scaled.device)
        return levels[torch.bucketize(scaled, bounds, out_int32=True)]

    def codes_at(self, weight: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        """The stored codes of the levels nearest to a flat float32 weight, where ``scales[k]`` scales block k."""
        raise NotImplementedError

    def good_scales(self, blocks: Tensor) -> Tensor:
        """Scales ``(k,)`` with which blocks ``(k, block)`` have a small rounding error."""
        return blocks.abs().amax(-1)

    def step_error(self, encoded: EncodedWeight, exact: Tensor) -> float:
        """:func:`oftsurgery.checks.measures.step_error` for a format without levels."""
        return 0.0

    def hashed(self, encoded: EncodedWeight) -> Mapping[str, Tensor]:
        """The tensors whose hash is that of the weight in records."""
        return encoded.tensors

    # --- in a checkpoint ---

    def tensor_names(self, weight: str) -> dict[str, str]:
        """The checkpoint names of a weight's tensors, by local name; ``""`` stands for :meth:`format_tensor`."""
        return {"weight": weight}

    def format_tensor(self, encoded: EncodedWeight) -> Tensor:
        """The tensor beside a weight that says how the weight is stored."""
        raise NotImplementedError

    def recognises(self, weight: str, names: Collection[str], dtype: torch.dtype) -> bool:
        """Whether a weight of ``dtype`` among tensors ``names`` is in this format."""
        return False

    def from_checkpoint(self, weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> EncodedWeight:
        """See :func:`oftsurgery.formats.checkpoint_tensors.read_weight`."""
        raise NotImplementedError

    def to_checkpoint(self, weight: str, encoded: EncodedWeight) -> dict[str, Tensor]:
        """The tensors under their checkpoint names, byte for byte as in bitsandbytes' ``state_dict``."""
        t, names = encoded.tensors, self.tensor_names(weight)
        return {n: t[k] if k else self.format_tensor(encoded) for k, n in names.items() if k in t or not k}

    def loaded_as(self, shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool) -> WeightFormat:
        """The format of a plain weight that transformers loads in ``dtype`` and quantises."""
        return WeightFormat(self.name, shape, dtype)

    def once_quantised(self, f: WeightFormat) -> WeightFormat:
        """The format ``f`` of :meth:`loaded_as` after the quantisation, which may change the dtype."""
        return replace(f, dtype=self.own_dtype or f.dtype)

    def in_place_of(self, f: WeightFormat, dtype: torch.dtype, double_quant: bool) -> WeightFormat:
        """The format in which a weight that was stored as ``f`` is stored anew, in a model of ``dtype``."""
        return self.once_quantised(self.loaded_as(f.shape, dtype, double_quant))

    # --- undo records ---

    def prediction_inputs(self, encoded: EncodedWeight) -> dict[str, Tensor]:
        """The inputs of a prediction, which stay the same when bitsandbytes repacks a weight for the CPU."""
        codes = {"weight": encoded.tensors["weight"]}
        return codes | {self.scales_name: encoded.tensors[self.scales_name].reshape(-1)} if self.quantised else codes

    def unpack_codes(self, stored: Tensor, n: int, facts: dict[str, Any]) -> Tensor:
        """One code per weight, ``(n,)``. The method adds to ``facts`` what :meth:`repack_codes` needs."""
        return stored.reshape(-1)

    def repack_codes(self, codes: Tensor, facts: Mapping[str, Any]) -> Tensor:
        """The stored bytes, from the codes of :meth:`unpack_codes`."""
        return codes

    def codes_by_level(self, facts: Mapping[str, Any]) -> Tensor | None:
        """Codes in the order of their levels; None for facts that :meth:`unpack_codes` cannot have written."""
        raise NotImplementedError

    def nearest_ranks(self, numbers: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each number: the nearest rank, whether the second nearest rank lies above, and the distance to the threshold
        on that side, in fixed parts.
        """
        raise NotImplementedError

    # --- in kernels and graphs ---

    def kernel_name(self, f: WeightFormat) -> str:
        """The name of the kernels' constant for this storage; ``""`` for a storage that the kernels do not know."""
        return ""

    def kernel_operands(self, encoded: EncodedWeight) -> tuple[Tensor, Tensor] | None:
        """The codes and their steps, contiguous, for a kernel; None if the codes are not contiguous."""
        self.check(encoded)
        codes = self.codes(encoded)
        return (codes, self.steps(encoded).contiguous()) if codes.is_contiguous() else None

    def onnx_obstacle(self, f: WeightFormat) -> str | None:
        """The reason why an ONNX graph cannot hold the codes, or None."""
        return None

    def onnx_product(self, x: Tensor, codes: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        """``x · Wᵀ`` as nodes of an ONNX graph."""
        raise NotImplementedError

    # --- in a live model ---

    def holds_module(self, module: nn.Module) -> bool:
        """Whether a module or its weight is of this format's classes, quantised or not."""
        weight = getattr(module, "weight", None)
        return is_of("bitsandbytes", module, *self.layer_classes) or is_of("bitsandbytes", weight, self.parameter_class)

    def is_quantised(self, weight: Any) -> bool:
        """Whether the weight of a module of this format is quantised already."""
        raise NotImplementedError

    def read_live(self, module: Any, weight: Any, offloaded: Offloaded, path: str) -> Live | None:
        """The weight as :meth:`oftsurgery.stores.layers.Layer.read` gives it; None for a weight that holds plain values.
        ``offloaded`` are the module's tensors that accelerate holds, if it holds any.
        """
        raise NotImplementedError

    def parameter_of(self, encoded: EncodedWeight, old: Any, module: Any) -> nn.Parameter:
        """A Parameter of the class and settings of ``old`` that holds ``encoded``."""
        raise NotImplementedError

    def new_linear(self, f: WeightFormat, compute_dtype: torch.dtype, threshold: float) -> nn.Module:
        """A linear layer without bias and without values, for a weight in ``f``.

        Args:
            compute_dtype, threshold: bitsandbytes' settings of 4-bit and of 8-bit layers.
        """
        raise NotImplementedError

    def plain_parameter(self, old: Any, data: Tensor) -> nn.Parameter:
        """A Parameter that holds plain values in place of ``old``, which is of this format's class."""
        new = nn.Parameter(data, requires_grad=old.requires_grad)
        # attributes that frameworks set on parameters (sequence_parallel, _is_hf_initialized …)
        new.__dict__.update(old.__dict__)
        return new

    def alias(self, parameter: Any) -> nn.Parameter:
        """A new Parameter over the same storage."""
        new = copy.copy(parameter)
        if type(parameter) is not nn.Parameter and type(new) is nn.Parameter:
            message = f"a parameter of class {type(parameter).__name__} cannot be shared between two models"
            raise StateError(message, remedy="fold with inplace=True, or give a plain torch model")
        return new  # type: ignore[no-any-return]


def in_blocks(flat: Tensor, blocksize: int) -> Tensor:
    """The blocks ``(⌈n/blocksize⌉, blocksize)`` of a flat ``(n,)``, padded with zeros."""
    rest = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat, (0, rest)).reshape(-1, blocksize) if rest else flat.reshape(-1, blocksize)


def finite(weight: Tensor, what: str, format: WeightFormat) -> Tensor:
    """``weight``; raises NonFiniteError with the message ``what`` if a value is not finite."""
    if not bool(torch.isfinite(weight).all()):
        remedy = "fold into a wider format, or check the adapter with a smaller scale"
        raise NonFiniteError(what, format=format.label, remedy=remedy)
    return weight
