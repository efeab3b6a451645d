"""What a storage format is: the description of one stored weight, its tensors, and the class that each format fills in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtypes import name_of
from oftsurgery.errors import FormatError, NonFiniteError, ShapeError, StateError
from oftsurgery.hashing import hash_tensors

__all__ = ["FORMATS", "EncodedWeight", "Format", "Grid", "WeightFormat", "blocks_of"]

RELOAD = "reload the model: part of its quantisation state is damaged"

#: of every exported ONNX graph
OPSET = 20

Read = Callable[[str], Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...] | None]]
Offloaded = Mapping[str, Tensor] | None


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored.

    Attributes:
        codec: key of :data:`FORMATS`: ``"dense"``, ``"nf4"``, ``"fp4"``, ``"int8"``.
        shape: logical shape, ``(out, in)`` for a linear.
        dtype: of the stored values (dense), or that bitsandbytes dequantises to (``quant_state.dtype``; float16 for
            int8).
        blocksize: weights a 4-bit block; 0 elsewhere.
        nested_blocksize: absmax values a block of the double quantisation; 0 where there is none.
        storage: dtype in which the packed 4-bit bytes are held (``quant_storage``; FSDP wants a float one).
    """

    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    blocksize: int = 0
    nested_blocksize: int = 0
    storage: torch.dtype = torch.uint8

    @property
    def kind(self) -> Format:
        """What knows all about the format.

        Raises:
            FormatError: there is no such format.
        """
        try:
            return FORMATS[self.codec]
        except KeyError:
            known = f"unknown storage format; known are {', '.join(FORMATS)}"
            raise FormatError(known, format=self.codec, remedy="use one of those") from None

    @property
    def quantised(self) -> bool:
        return self.kind.quantised

    @property
    def label(self) -> str:
        """``"nf4"``, ``"nf4 (double quantisation)"``, ``"int8"``, ``"float16"`` …"""
        if self.codec in FORMATS and not self.quantised:
            return name_of(self.dtype)
        return f"{self.codec} (double quantisation)" if self.nested_blocksize else self.codec

    @property
    def block(self) -> int:
        """How many weights share a scale: a 4-bit block of the flat weight, an int8 row."""
        return self.kind.entries(self)[self.kind.scales_name]

    @property
    def single(self) -> WeightFormat:
        """The same without double quantisation, its codes held as bytes."""
        return replace(self, nested_blocksize=0, storage=torch.uint8)


@dataclass(frozen=True, eq=False)
class EncodedWeight:
    """A weight as stored: its format and its tensors under their local names.

    ======  =====================================================================================================================================
    codec   tensors
    ======  =====================================================================================================================================
    dense   ``weight`` of ``shape``
    4-bit   ``weight`` (packed codes, ``(⌈n/2⌉, 1)`` uint8 or as ``storage``), ``absmax`` (one a block: float32, or uint8 with double quantisation),
            ``quant_map`` (16,), and with double quantisation ``nested_absmax``, ``nested_quant_map`` (256,),
            ``nested_offset`` ()
    int8    ``weight`` ``(out, in)`` int8, ``SCB`` ``(out,)`` float32
    ======  =====================================================================================================================================
    """

    format: WeightFormat
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @property
    def fingerprint(self) -> str:
        """Content hash of the tensors, :func:`~oftsurgery.hashing.hash_tensors`."""
        return hash_tensors(self.tensors)

    @property
    def scales(self) -> Tensor:
        """The scales of a quantised weight's blocks as its reader sees them, double quantisation included: float32."""
        return self.format.kind.scales(self)

    def single(self) -> EncodedWeight:
        """The same without double quantisation, its codes as kernels take them; refused where its tensors do not fit."""
        kind = self.format.kind
        kind.check(self)
        statistics = {kind.scales_name: self.scales} if kind.quantised else {}
        return EncodedWeight(self.format.single, {"weight": kind.codes(self), **statistics})

    def cpu(self) -> EncodedWeight:
        """The same, detached, on the CPU."""
        return EncodedWeight(self.format, {k: t.detach().cpu() for k, t in self.tensors.items()})

    def require(self, *names: str) -> list[Tensor]:
        """The tensors of these names.

        Raises:
            FormatError: one is missing.
        """
        missing = [n for n in names if n not in self.tensors]
        if missing:
            raise FormatError(f"the stored weight lacks {', '.join(missing)}", format=self.format.label, remedy=RELOAD)
        return [self.tensors[n] for n in names]

    def misfit(self, message: str, tensor: str | None, shape: tuple[int, ...], expected: tuple[int, ...]) -> ShapeError:
        """The error of a tensor that does not have the shape which the format needs."""
        label = None if tensor is None else self.format.label
        return ShapeError(message, tensor=tensor, shape=shape, expected=expected, format=label, remedy=RELOAD)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that each element of a quantised weight can take, its statistics given.

    Attributes:
        levels: ascending, ``(16,)`` or ``(255,)`` float32 in [-1, 1].
        bounds: between neighbouring levels.
        scales: what the levels are multiplied by: one a block of the flat weight, float32.
        blocksize: elements a block.
    """

    levels: Tensor
    bounds: Tensor
    scales: Tensor
    blocksize: int

    def nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        """Numbers of the levels that are nearest to ``values``, each with its scale, as int32."""
        return torch.bucketize(torch.where(scale != 0, values / scale, 0.0), self.bounds, out_int32=True)


Live = tuple[EncodedWeight, WeightFormat]


class Format:
    """A way to store a weight. Each is one subclass in a file of this folder, and a row of :data:`FORMATS`.

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
    packed = 1  #: weights an element of the stored codes
    either_sign = False  #: a block's scale may be negative
    strong = 0.0  #: a change, in units of the scale, from which on oftsurgery.weights.preserve scales a block anew
    shared: tuple[str, ...] = ()  #: local names of the tensors that are the same in many weights
    least_blocksize = 0
    width = ""  #: what messages call the formats of this class
    evidence_in = "\0"  #: part of a tensor's name which tells that a checkpoint has weights in formats of this class
    loading: Mapping[str, Any] = MappingProxyType({})  #: fields of transformers' BitsAndBytesConfig that ask for it
    modules: tuple[str, ...] = ()  #: bitsandbytes' classes of layers …
    parameter = ""  #: … and of parameters that hold such weights
    graph_scales = ""  #: name of the scales in an ONNX graph

    # --- values ---

    def layout(self, f: WeightFormat) -> Layout:
        """Dtype and shape of each tensor by its local name, and of :meth:`mark` under ``""``."""
        raise NotImplementedError

    def entries(self, f: WeightFormat) -> dict[str, int]:
        """How many weights one entry of each tensor is of, by local name; of those that are not :attr:`shared`."""
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
        values = blocks_of(self.numbers(self.codes(encoded))[:n], f.block) * self.steps(encoded).unsqueeze(-1)
        return values.reshape(-1)[:n].reshape(f.shape)

    def restate(self, encoded: EncodedWeight, into: WeightFormat) -> EncodedWeight:
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
        """The levels in order, the bounds between them, as in a :class:`Grid`, and the stored codes of the levels."""
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

    def names(self, weight: str) -> dict[str, str]:
        """The names of a weight's tensors by their local names, that of :meth:`mark` under ``""``."""
        return {"weight": weight}

    def mark(self, encoded: EncodedWeight) -> Tensor:
        """The tensor beside a weight that says how it is stored."""
        raise NotImplementedError

    def shows(self, weight: str, names: Collection[str], dtype: torch.dtype) -> bool:
        """Whether a weight of ``dtype`` among tensors ``names`` is in this format."""
        return False

    def gather(
        self, weight: str, names: Collection[str], read: Read, shape: tuple[int, ...], dtype: torch.dtype
    ) -> EncodedWeight:
        """See :func:`oftsurgery.formats.gather`."""
        raise NotImplementedError

    def spread(self, weight: str, encoded: EncodedWeight) -> dict[str, Tensor]:
        """The tensors under their names, byte for byte what bitsandbytes' ``state_dict`` gives."""
        t = encoded.tensors
        return {n: t[k] if k else self.mark(encoded) for k, n in self.names(weight).items() if k in t or not k}

    def loaded_as(self, shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool) -> WeightFormat:
        """What transformers' quantising makes of a plain weight that it loads in ``dtype``."""
        return WeightFormat(self.name, shape, dtype)

    def home(self, f: WeightFormat) -> WeightFormat:
        """``f`` of :meth:`loaded_as` as it is once it is quantised."""
        return f

    # --- undo records ---

    def evidence(self, encoded: EncodedWeight) -> dict[str, Tensor]:
        """What a prediction is made from: the same before and after bitsandbytes repacks a weight for the CPU."""
        return {"weight": encoded.tensors["weight"]}

    def spell(self, stored: Tensor, n: int, facts: dict[str, Any]) -> Tensor:
        """One code a weight, ``(n,)``; ``facts`` is given what it takes to have the bytes back."""
        return stored.reshape(-1)

    def unspell(self, codes: Tensor, facts: Mapping[str, Any]) -> Tensor:
        """The bytes of :meth:`spell`'s codes."""
        return codes

    def ranks(self, facts: Mapping[str, Any]) -> Tensor | None:
        """Codes in the order of their levels; None for facts that are none of :meth:`spell`."""
        raise NotImplementedError

    def near(self, numbers: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each number the nearest rank, whether the next nearest is the one above, and how far that is, in parts."""
        raise NotImplementedError

    # --- in kernels and graphs ---

    def kernel(self, f: WeightFormat) -> str:
        """The name of the constant by which kernels know the storage, ``""`` where they do not."""
        return ""

    def source(self, encoded: EncodedWeight) -> tuple[Tensor, Tensor] | None:
        """The codes and their steps, contiguous, for a kernel; None where they are not."""
        self.check(encoded)
        codes = self.codes(encoded)
        return (codes, self.steps(encoded).contiguous()) if codes.is_contiguous() else None

    def graph_obstacle(self, f: WeightFormat) -> str | None:
        """Why an ONNX graph cannot hold the codes, or None."""
        return None

    def graph_product(self, x: Tensor, codes: Tensor, scales: Tensor, f: WeightFormat) -> Tensor:
        """``x · Wᵀ`` as nodes of an ONNX graph."""
        raise NotImplementedError

    # --- in a live model ---

    def holds(self, module: nn.Module) -> bool:
        """Whether a module or its weight is of this format's classes, quantised or not."""
        return bnb_class(module, *self.modules) or bnb_class(getattr(module, "weight", None), self.parameter)

    def is_live(self, weight: Any) -> bool:
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


#: every storage format by its name; the package's ``__init__`` fills it
FORMATS: dict[str, Format] = {}


def blocks_of(flat: Tensor, blocksize: int) -> Tensor:
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
