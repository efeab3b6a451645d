"""A :class:`Stored` weight is a weight as another package than bitsandbytes stores it: its tensors, how that package dequantises the
weight, and where the package's quantiser needs nothing but the weight's values, how it quantises them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from oftsurgery.errors import FormatError, printable

Shape = tuple[int, ...]
#: ``{name of a tensor: (dtype, shape)}``
Entries = Mapping[str, tuple[torch.dtype, Shape]]
#: function from a name to the tensor
Read = Callable[[str], Tensor]
#: ``quantization_config`` of a ``config.json``
Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that another package quantised.

    Attributes:
        entries: the tensors.
        settings: ``quantization_config`` of its ``config.json``.
        dtype: dtype in which transformers loads the model.
        read: function that reads a small tensor.
        metadata: ``{name: text}`` in the headers of the files.
    """

    entries: Entries
    settings: Settings
    dtype: torch.dtype
    read: Read
    metadata: Mapping[str, str] = field(default_factory=dict)


_MOST = torch.finfo(torch.float8_e4m3fn).max


class Quantiser:
    """How a package stores the values of one weight, ``(out, in)`` float32.

    In every method ``tensors`` are the weight's tensors by their local names: the codes are ``weight``, the others are the scales and zeros.
    Codes stand for *numbers*, float32: ``value = (number - zero) · scale``.

    Attributes:
        bits: bits of a code in ``weight``.
        bounds: the least and the largest number; None for the numbers of F8_E4M3.
    """

    bits: int
    bounds: tuple[int, int] | None

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """All tensors, with the scales and zeros that the package's own quantiser chooses, and codes to nearest."""
        raise NotImplementedError

    def grid(self, tensors: Mapping[str, Tensor]) -> Grid:
        """The scale and the zero of each value."""
        raise NotImplementedError

    def stored(self, numbers: Tensor) -> Tensor:
        """The tensor ``weight``, from numbers ``(out, in)``."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that some weights can have.

    >>> grid = Grid(torch.tensor(0.5), torch.tensor(2.0), (0, 3))
    >>> grid.values(grid.nearest(torch.tensor([-3.0, -0.3, 0.2, 0.4])))
    tensor([-1.0000, -0.5000,  0.0000,  0.5000])

    Attributes:
        scale, zero: float32, of the shape of the weights, or broadcasting to it; None for zeros.
        bounds: as for :class:`Quantiser`.
    """

    scale: Tensor
    zero: Tensor | None
    bounds: tuple[int, int] | None

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest numbers."""
        steps = values / torch.where(self.scale == 0, 1.0, self.scale)
        if self.zero is not None:
            steps += self.zero
        steps = steps.nan_to_num_()
        if self.bounds is None:
            return steps.clamp_(-_MOST, _MOST).to(torch.float8_e4m3fn).to(torch.float32)
        return steps.clamp_(*self.bounds).round_()

    def values(self, numbers: Tensor) -> Tensor:
        """What numbers stand for, before the package rounds it to its dtype."""
        return (numbers if self.zero is None else numbers - self.zero) * self.scale

    def steps(self, values: Tensor) -> Tensor:
        """The distances of the grid's values around ``values``."""
        if self.bounds is not None:
            return self.scale.expand(values.shape)
        _, exponent = torch.frexp(values / torch.where(self.scale == 0, 1.0, self.scale))
        return torch.exp2((exponent.clamp(min=-5) - 4).to(torch.float32)) * self.scale

    def at(self, index: Tensor, shape: Shape) -> Grid:
        """The grid of some of the weights of ``shape``, by their numbers in the flat weight."""
        scale, zero = (None if t is None else t.expand(shape).reshape(-1)[index] for t in (self.scale, self.zero))
        assert scale is not None  # noqa: S101 - a grid has scales
        return Grid(scale, zero, self.bounds)


@dataclass(frozen=True, eq=False)
class Stored:
    """One weight as another package stores it.

    Attributes:
        tensors: ``{local name: name in the checkpoint}``.
        shape: shape of the dequantised tensor, ``(out, in)`` for a linear.
        dtype: dtype of the dequantised values.
        label: the format, for people.
        decode: function from ``{local name: tensor}`` to the dequantised tensor.
        quantiser: the package's own quantiser; None where it needs more than the values, or does not write this layout.
    """

    tensors: Mapping[str, str]
    shape: Shape
    dtype: torch.dtype
    label: str
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    quantiser: Quantiser | None = None


SAVE_AGAIN = "save the checkpoint again with the package that quantised the weights"


def damaged(message: str, tensor: str, format: str, **facts: Any) -> NoReturn:
    """Raise the error for tensors that do not fit the format that the config names."""
    raise FormatError(message, tensor=tensor, format=format, remedy=SAVE_AGAIN, **facts)


def unknown(setting: str, value: object, method: str, remedy: str) -> NoReturn:
    """Raise the error for a setting of ``quantization_config`` whose layout is not known."""
    message = f"the config says {setting}={printable(value)!r}, a layout that oftsurgery does not read"
    raise FormatError(message, format=method, remedy=remedy)


def groups_of(
    entries: Entries, mark: str, wanted: Collection[str], method: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """``(path, {local name: name})`` of the modules that hold a tensor ``mark``; each must hold all tensors ``wanted``."""
    for name in entries:
        path, dot, local = name.rpartition(".")
        if local != mark:
            continue
        found = {local: f"{path}{dot}{local}" for local in (mark, *wanted)}
        lost = next((n for n in found.values() if n not in entries), None)
        if lost is not None:
            damaged("a tensor of the quantised weight is missing", lost, method)
        yield path, found


def matrix(entries: Entries, name: str, format: str) -> tuple[int, int]:
    """The shape of a matrix without empty sides."""
    shape = entries[name][1]
    if len(shape) != 2 or 0 in shape:
        damaged("a tensor of the quantised weight is no matrix", name, format, shape=shape)
    return shape[0], shape[1]


def check(entries: Entries, name: str, dtypes: Collection[torch.dtype], shape: Shape, format: str) -> None:
    """Refuse a tensor of another dtype or shape than the format has."""
    dtype, found = entries[name]
    if dtype not in dtypes or found != shape:
        what = (
            f"a tensor of the quantised weight has the dtype {dtype} and does not fit the format, or has another shape"
        )
        damaged(what, name, format, shape=found, expected=shape)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes in the rows of ``words``, which hold one stream of bits, lowest bit first.

    >>> unpacked(torch.tensor([[0x21, 0x43]]), 4, 10).tolist()
    [[1, 2, 0, 0, 0, 0, 0, 0, 3, 4]]

    Args:
        words: ``(rows, n)`` int32.
        bits: 1 to 8.
        count: number of codes in a row; further bits are padding.

    Returns:
        ``(rows, count)`` uint8.
    """
    rows, n = words.shape
    if 8 % bits == 0:  # a code lies in one byte, and the lowest byte of a word comes first in memory
        held = words.to(torch.int32).contiguous().view(torch.uint8)
        parts = [held >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)] if bits < 8 else [held]
        return torch.stack(parts, dim=-1).reshape(rows, -1)[:, :count]
    period = 32 // math.gcd(bits, 32)  # codes after which a code begins at a word again
    width = period * bits // 32  # words of a period
    words = torch.nn.functional.pad(words, (0, -n % width)).to(torch.int64) & 0xFFFFFFFF
    words = words.reshape(rows, -1, width)
    codes = torch.empty(rows, words.shape[1], period, dtype=torch.uint8)
    for i in range(period):
        at, shift = divmod(i * bits, 32)
        code = words[..., at] >> shift
        if shift + bits > 32:
            code = code | words[..., at + 1] << (32 - shift)
        codes[..., i] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :count]


def packed(codes: Tensor, bits: int) -> Tensor:
    """The mirror of :func:`unpacked`.

    >>> [hex(word) for word in packed(torch.tensor([[1, 2, 0, 0, 0, 0, 0, 0, 3, 4]]), 4)[0]]
    ['0x21', '0x43']

    Args:
        codes: ``(rows, count)``, each less than ``2**bits``.

    Returns:
        ``(rows, ⌈count·bits/32⌉)`` int32.
    """
    rows, count = codes.shape
    period = 32 // math.gcd(bits, 32)  # codes after which a code begins at a word again
    whole = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % period)).reshape(rows, -1, period)
    words = torch.zeros(rows, whole.shape[1], period * bits // 32, dtype=torch.int64, device=codes.device)
    for i in range(period):
        at, shift = divmod(i * bits, 32)
        words[..., at] |= whole[..., i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., at + 1] |= whole[..., i] >> (32 - shift)
    low = words.view(torch.int32)[..., ::2]  # the lowest half of a word comes first in memory
    return low.reshape(rows, -1)[:, : -(-count * bits // 32)].contiguous()


def scaled(codes: Tensor, zeros: Tensor | None, scales: Tensor) -> Tensor:
    """``(codes − zeros) · scales``, rounded once to the dtype of ``scales``, which holds the differences of the integers exactly."""
    steps = codes.to(torch.float32)
    if zeros is not None:
        steps -= zeros.to(torch.float32)
    return steps.mul_(scales.to(torch.float32)).to(scales.dtype)


def by_groups(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, index: Tensor | None, size: int, name: str
) -> Tensor:
    """:func:`scaled` of codes ``(out, in)``, where the zeros and scales ``(out or 1, groups)`` are those of groups of inputs.

    Args:
        index: ``(in,)``, the group of each input; None for groups of ``size`` neighbours.
        name: the name of the index, for the error.

    Raises:
        FormatError: the index names a group that is not there.
    """
    out, inputs = codes.shape
    of = torch.arange(inputs) // size if index is None else index.to(torch.int64)
    if not 0 <= int(of.min()) <= int(of.max()) < scales.shape[1]:
        damaged("the group of an input lies outside the groups", name, "groups of inputs")
    if inputs == size * scales.shape[1] and torch.equal(of, torch.arange(inputs) // size):
        zeros = None if zeros is None else zeros.unsqueeze(-1)
        return scaled(codes.reshape(out, -1, size), zeros, scales.unsqueeze(-1)).reshape(out, inputs)
    return scaled(codes, None if zeros is None else zeros[:, of], scales[:, of])
