"""A :class:`Format` is a way to store a weight, and each storage format fills it in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.errors import NonFiniteError, StateError

from .encoded_weight import EncodedWeight, WeightFormat

#: of every exported ONNX graph
OPSET = 20

Names = Collection[str]
Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...] | None]]
Offloaded = Mapping[str, Tensor] | None
Live = tuple[EncodedWeight, WeightFormat]


class Format:
    """A way to store a weight. Each is one subclass in a file of this folder, and a row of
    :data:`~oftsurgery.formats.all_formats.FORMATS`.

    In every method ``f`` is a :class:`WeightFormat` of this format, ``encoded`` a weight in it, and ``weight`` the name
    of a weight's tensor in a checkpoint, which ends in ``weight``. A quantised weight is made of *codes*, which stand
    for *numbers*; a number divided by :attr:`unit` is a level in [-1, 1], and a level times its block's scale is the
    weight.

    A method that raises NotImplementedError is for the subclass to write; the plain format has no codes and writes only
    those that a plain weight is asked for.
    """

    name = "dense"  #: key of FORMATS
    quantised = True
    roundings: tuple[str, ...] = ("nearest",)  #: that have a part in the format
    scales_name = ""  #: local name of the tensor that holds the blocks' scales
    unit = 1.0  #: the number of level 1
    codes_per_element = 1  #: of the stored tensor
    either_sign = False  #: a block's scale may be negative
    strong_change = 0.0  #: in units of the scale: from it on oftsurgery.weights.preserve scales a block anew
    shared_tensors: tuple[str, ...] = ()  #: local names of the tensors that are the same in many weights
    least_blocksize = 0
    width = ""  #: what messages call the formats of this class
    name_part = "\0"  #: part of a tensor's name which tells that a checkpoint has weights in formats of this class
    config_fields: Mapping[str, Any] = MappingProxyType({})  #: of transformers' BitsAndBytesConfig that ask for it
    layer_classes: tuple[str, ...] = ()  #: bitsandbytes' classes of layers …
    parameter_class = ""  #: … and of parameters that hold such weights
    onnx_scales = ""  #: name of the scales in an ONNX graph

    # --- values ---

    def layout(self, f: WeightFormat) -> Layout:
        """Dtype and shape of each tensor by its local name, and of :meth:`format_tensor` under ``""``."""
        raise NotImplementedError

    def weights_per_entry(self, f: WeightFormat) -> dict[str, int]:
        """How many weights one entry of each tensor is of, by local name; of those that are not :attr:`shared_tensors`."""
        raise NotImplementedError

    def check(self, encoded: EncodedWeight) -> None:
        """Refuse tensors that are missing or do not fit the format, with FormatError or ShapeError."""
        raise NotImplementedError

    def encode(self, weight: Tensor, f: WeightFormat, rounding: str) -> EncodedWeight:
        raise NotImplementedError

    def decode(self, encoded: EncodedWeight) -> Tensor:
        self.check(encoded)
        f, n = encoded.format, math.prod(encoded.format.shape)
        # flat, never by rows: a 4-bit block may straddle them (bitsandbytes 0.50's own CPU kernel gets in = 96 with
        # blocksize 64 wrong)
        values = in_blocks(self.numbers(self.codes(encoded))[:n], f.block) * self.steps(encoded).unsqueeze(-1)
        return values.reshape(-1)[:n].reshape(f.shape)

    def change_storage(self, encoded: EncodedWeight, into: WeightFormat) -> EncodedWeight:
        """The weight in a format that differs in the storage of codes and statistics alone: no code changes."""
        return EncodedWeight(into, encoded.tensors)

    def codes(self, encoded: EncodedWeight) -> Tensor:
        """The stored codes as kernels take them: one a weight in the weight's shape, or flat and packed."""
        return encoded.tensors["weight"].detach()

    def numbers(self, codes: Tensor) -> Tensor:
        """The numbers of stored codes, flat, float32."""
        return codes.reshape(-1).to(torch.float32)

    def pack(self, codes: Tensor, f: WeightFormat) -> Tensor:
        """The tensor that holds one code a weight."""
        return codes

    def scales(self, encoded: EncodedWeight) -> Tensor:
        """``(blocks,)`` float32, as the weight's reader sees them."""
        raise NotImplementedError

    def steps(self, encoded: EncodedWeight) -> Tensor:
        """What numbers are multiplied by: the scales over the unit."""
        return self.scales(encoded) / self.unit

    def statistics(self, scales: Tensor, f: WeightFormat) -> dict[str, Tensor]:
        """The tensors that hold scales ``(blocks,)``."""
        return {self.scales_name: scales} if self.quantised else {}

    def assemble(self, f: WeightFormat, codes: Tensor, statistics: Mapping[str, Tensor]) -> EncodedWeight:
        """A weight from stored codes and :meth:`statistics`."""
        return EncodedWeight(f, {"weight": codes, **statistics})

    def levels(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The levels in order, the bounds between them, as in a :class:`~oftsurgery.formats.codecs.Grid`, and the stored codes of the levels."""
        raise NotImplementedError

    def nearest_levels(self, scaled: Tensor) -> Tensor:
        """The levels nearest to values in units of their scale, in the same units."""
        levels, bounds, _ = self.levels(scaled.device)
        return levels[torch.bucketize(scaled, bounds, out_int32=True)]

    def codes_at(self, weight: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        """The stored codes of a flat float32 weight: the levels nearest to it when block k is scaled by ``scales[k]``."""
        raise NotImplementedError

    def good_scales(self, blocks: Tensor) -> Tensor:
        """``(k,)``: with which scales blocks ``(k, block)`` err little."""
        return blocks.abs().amax(-1)

    # --- in a checkpoint ---

    def tensor_names(self, weight: str) -> dict[str, str]:
        """The names of a weight's tensors by their local names, that of :meth:`format_tensor` under ``""``."""
        return {"weight": weight}

    def format_tensor(self, encoded: EncodedWeight) -> Tensor:
        """The tensor beside a weight that says how it is stored."""
        raise NotImplementedError

    def recognises(self, weight: str, names: Collection[str], dtype: torch.dtype) -> bool:
        """Whether a weight of ``dtype`` among tensors ``names`` is in this format."""
        return False

    def from_checkpoint(self, weight: str, names: Names, read: Read, shape: Shape, dtype: torch.dtype) -> EncodedWeight:
        """See :func:`oftsurgery.formats.checkpoint_tensors.read_weight`."""
        raise NotImplementedError

    def to_checkpoint(self, weight: str, encoded: EncodedWeight) -> dict[str, Tensor]:
        """The tensors under their names, byte for byte what bitsandbytes' ``state_dict`` gives."""
        t, names = encoded.tensors, self.tensor_names(weight)
        return {n: t[k] if k else self.format_tensor(encoded) for k, n in names.items() if k in t or not k}

    def loaded_as(self, shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool) -> WeightFormat:
        """What transformers' quantising makes of a plain weight that it loads in ``dtype``."""
        return WeightFormat(self.name, shape, dtype)

    def once_quantised(self, f: WeightFormat) -> WeightFormat:
        """``f`` of :meth:`loaded_as` as it is once it is quantised."""
        return f

    # --- undo records ---

    def prediction_inputs(self, encoded: EncodedWeight) -> dict[str, Tensor]:
        """What a prediction is made from: the same before and after bitsandbytes repacks a weight for the CPU."""
        codes = {"weight": encoded.tensors["weight"]}
        return codes | {self.scales_name: encoded.tensors[self.scales_name].reshape(-1)} if self.quantised else codes

    def unpack_codes(self, stored: Tensor, n: int, facts: dict[str, Any]) -> Tensor:
        """One code a weight, ``(n,)``; ``facts`` is given what it takes to have the bytes back."""
        return stored.reshape(-1)

    def repack_codes(self, codes: Tensor, facts: Mapping[str, Any]) -> Tensor:
        """The bytes of :meth:`unpack_codes`'s codes."""
        return codes

    def codes_by_level(self, facts: Mapping[str, Any]) -> Tensor | None:
        """Codes in the order of their levels; None for facts that are none of :meth:`unpack_codes`."""
        raise NotImplementedError

    def nearest_ranks(self, numbers: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each number the nearest rank, whether the next nearest is the one above, and how far that is, in parts."""
        raise NotImplementedError

    # --- in kernels and graphs ---

    def kernel_name(self, f: WeightFormat) -> str:
        """The name of the constant by which kernels know the storage, ``""`` where they do not."""
        return ""

    def kernel_operands(self, encoded: EncodedWeight) -> tuple[Tensor, Tensor] | None:
        """The codes and their steps, contiguous, for a kernel; None where they are not."""
        self.check(encoded)
        codes = self.codes(encoded)
        return (codes, self.steps(encoded).contiguous()) if codes.is_contiguous() else None

    def onnx_obstacle(self, f: WeightFormat) -> str | None:
        """Why an ONNX graph cannot hold the codes, or None."""
        return None

    def onnx_product(self, x: Tensor, codes: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        """``x · Wᵀ`` as nodes of an ONNX graph."""
        raise NotImplementedError

    # --- in a live model ---

    def holds_module(self, module: nn.Module) -> bool:
        """Whether a module or its weight is of this format's classes, quantised or not."""
        weight = getattr(module, "weight", None)
        return bnb_class(module, *self.layer_classes) or bnb_class(weight, self.parameter_class)

    def is_quantised(self, weight: Any) -> bool:
        """Whether the weight of such a module is quantised already."""
        raise NotImplementedError

    def read_live(self, module: Any, weight: Any, offloaded: Offloaded, path: str) -> Live | None:
        """See :meth:`oftsurgery.stores.layers.Layer.read`; None for a weight that holds plain values. ``offloaded`` are
        accelerate's tensors of the module, where it keeps them.
        """
        raise NotImplementedError

    def parameter_of(self, encoded: EncodedWeight, old: Any, module: Any) -> nn.Parameter:
        """A Parameter of the class and settings of ``old`` that holds ``encoded``."""
        raise NotImplementedError

    def plain_parameter(self, old: Any, data: Tensor) -> nn.Parameter:
        """A Parameter that holds plain values in place of ``old``, which is of this format's class."""
        new = nn.Parameter(data, requires_grad=old.requires_grad)
        # what frameworks note on parameters (sequence_parallel, _is_hf_initialized …)
        new.__dict__.update(old.__dict__)
        return new

    def alias(self, parameter: Any) -> nn.Parameter:
        """A Parameter of its own over the same storage."""
        new = copy.copy(parameter)
        if type(parameter) is not nn.Parameter and type(new) is nn.Parameter:
            message = f"a parameter of class {type(parameter).__name__} cannot be shared between two models"
            raise StateError(message, remedy="fold with inplace=True, or a plain torch model")
        return new  # type: ignore[no-any-return]


def in_blocks(flat: Tensor, blocksize: int) -> Tensor:
    """``(n,)`` → ``(⌈n/blocksize⌉, blocksize)``, zero-padded."""
    rest = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat, (0, rest)).reshape(-1, blocksize) if rest else flat.reshape(-1, blocksize)


def finite(weight: Tensor, what: str, format: WeightFormat) -> Tensor:
    """``weight``, or NonFiniteError."""
    if not bool(torch.isfinite(weight).all()):
        remedy = "fold into a wider format, or check the adapter with a smaller scale"
        raise NonFiniteError(what, format=format.label, remedy=remedy)
    return weight


def bnb_class(obj: object, *names: str) -> bool:
    """Whether ``obj`` is of one of bitsandbytes' classes (or derived), without importing it: without it no model can
    hold any.
    """
    return any(c.__name__ in names and c.__module__.startswith("bitsandbytes.") for c in type(obj).__mro__)
