"""An :class:`EncodedWeight` is a weight as it is stored: its :class:`WeightFormat` and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oftsurgery.dtype_names import name_of
from oftsurgery.errors import FormatError, ShapeError
from oftsurgery.hashing import hash_tensors

if TYPE_CHECKING:
    from .base import Format


RELOAD = "reload the model: part of its quantisation state is damaged"


@cache
def _formats() -> dict[str, Format]:
    from .all_formats import FORMATS  # imported late, because the formats need this file's classes

    return FORMATS


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored.

    >>> oftsurgery.WeightFormat("nf4", (4096, 4096), torch.bfloat16, blocksize=64, nested_blocksize=256).label
    'nf4 (double quantisation)'

    Attributes:
        codec: key of :data:`~oftsurgery.formats.all_formats.FORMATS`: ``"dense"``, ``"nf4"``, ``"fp4"``, ``"int8"``.
        shape: logical shape, ``(out, in)`` for a linear.
        dtype: of the stored values (dense), or of the values that bitsandbytes dequantises to (``quant_state.dtype``;
            float16 for int8).
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
        """The object that has the format's code.

        Raises:
            FormatError: :attr:`codec` is unknown.
        """
        try:
            return _formats()[self.codec]
        except KeyError:
            known = f"unknown storage format; known are {', '.join(_formats())}"
            raise FormatError(known, format=self.codec, remedy="use one of the known formats") from None

    @property
    def quantised(self) -> bool:
        return self.kind.quantised

    @property
    def label(self) -> str:
        """``"nf4"``, ``"nf4 (double quantisation)"``, ``"int8"``, ``"float16"`` …"""
        if self.codec in _formats() and not self.quantised:
            return name_of(self.dtype)
        return f"{self.codec} (double quantisation)" if self.nested_blocksize else self.codec

    @property
    def block(self) -> int:
        """The number of weights that share a scale: a 4-bit block of the flat weight, or an int8 row."""
        return self.kind.weights_per_entry(self)[self.kind.scales_name]

    @property
    def single(self) -> WeightFormat:
        """The same format without double quantisation, and with codes stored as bytes."""
        return replace(self, nested_blocksize=0, storage=torch.uint8)


@dataclass(frozen=True, eq=False)
class EncodedWeight:
    """A weight as stored: its format and its tensors under their local names.

    >>> stored = oftsurgery.EncodedWeight(oftsurgery.WeightFormat("dense", (1, 2)), {"weight": torch.tensor([[3.0, 4.0]])})
    >>> quarter = oftsurgery.Rotation(generator=torch.tensor([[-1.0]]))
    >>> oftsurgery.fold_weight(stored, quarter).tensors["weight"]
    tensor([[ 4., -3.]])

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
        """Content hash of the tensors, :func:`~oftsurgery.hashing.hash_tensors`; of the dequantised weight where another package than
        bitsandbytes stores it.
        """
        return hash_tensors(self.format.kind.hashed(self))

    @property
    def scales(self) -> Tensor:
        """The scales of a quantised weight's blocks as its reader sees them, double quantisation included: float32."""
        return self.format.kind.scales(self)

    def single(self) -> EncodedWeight:
        """The same weight without double quantisation, with codes as kernels take them. Tensors that do not fit the format
        are refused.
        """
        kind = self.format.kind
        kind.check(self)
        statistics = {kind.scales_name: self.scales} if kind.quantised else {}
        return EncodedWeight(self.format.single, {"weight": kind.codes(self), **statistics})

    def cpu(self) -> EncodedWeight:
        """The same weight, detached, on the CPU."""
        return EncodedWeight(self.format, {k: t.detach().cpu() for k, t in self.tensors.items()})

    def require(self, *names: str) -> list[Tensor]:
        """The tensors with these local names.

        Raises:
            FormatError: a tensor is missing.
        """
        missing = [n for n in names if n not in self.tensors]
        if missing:
            raise FormatError(f"the stored weight lacks {', '.join(missing)}", format=self.format.label, remedy=RELOAD)
        return [self.tensors[n] for n in names]

    def misfit(self, message: str, tensor: str | None, shape: tuple[int, ...], expected: tuple[int, ...]) -> ShapeError:
        """The error for a tensor whose shape does not fit the format."""
        label = None if tensor is None else self.format.label
        return ShapeError(message, tensor=tensor, shape=shape, expected=expected, format=label, remedy=RELOAD)
