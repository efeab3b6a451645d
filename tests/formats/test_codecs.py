"""Codecs: bit for bit against bitsandbytes' quantisers, decoded against an independent float64 decoder, and what they
refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnbf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import decode_4bit, relative, seeded
from torch import Tensor

from oftsurgery.errors import FormatError, NonFiniteError, OFTSurgeryError, ShapeError
from oftsurgery.formats import codecs
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.quant_state import unpack_cpu_layout

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def bnb_tensors(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """bitsandbytes' result under the codec's local names."""
    tensors = {"weight": packed, "absmax": state.absmax, "quant_map": state.code}
    if state.nested:
        tensors |= {
            "nested_absmax": state.state2.absmax,
            "nested_quant_map": state.state2.code,
            "nested_offset": state.offset,
        }
    return tensors


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(shape))


def with_zero_blocks() -> Tensor:
    w = normal(40, 128)
    w[:33] = 0
    return w


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "one": lambda: normal(1, 1),
    "two": lambda: normal(1, 2),
    "odd number": lambda: normal(5, 13),
    "rows of 96": lambda: normal(64, 96),
    "rows of 100": lambda: normal(31, 100),
    "short last block": lambda: normal(3, 1400),
    "whole blocks of every size": lambda: normal(64, 256),
    "zero blocks": with_zero_blocks,
    "all zero": lambda: torch.zeros(4, 96),
    "negative zeros": lambda: -torch.zeros(2, 64),
    "denormals": lambda: normal(8, 96) * 1e-40,
    "tiny": lambda: normal(8, 96) * 1e-37,
    "huge": lambda: normal(8, 96).clamp(-3, 3) * 1e38,
    "constant": lambda: torch.full((8, 64), 0.3),
    "one outlier a block": lambda: normal(8, 64) * 1e-3 + torch.eye(8, 64) * 1e3,
    "midpoints": lambda: torch.cat([torch.ones(1), midpoints()]).repeat(4).reshape(4, -1),
    "a float16 view": lambda: normal(16, 64).half().float(),
    "not contiguous": lambda: normal(96, 40).t(),
}


def midpoints() -> Tensor:
    """Values on the very bounds between NF4's codes and FP4's, of either sign."""
    bounds = []
    for codec in ("nf4", "fp4"):
        levels = bnbf.get_4bit_type(codec, device="cpu").sort().values
        bounds.append((levels[1:] + levels[:-1]) / 2)
    both = torch.cat(bounds)
    return torch.cat([both, -both, torch.zeros(3)])


# --- encode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_encode_4bit_is_bitsandbytes_bit_for_bit(codec: str, nested: bool, storage: torch.dtype) -> None:
    for name, make in WEIGHTS.items():
        if nested and name == "huge":
            continue  # the mean of its absmax overflows: refused, see below
        weight = make()
        bytes_ = -(-weight.numel() // 2)
        if bytes_ % storage.itemsize or (storage != torch.uint8 and bytes_ == storage.itemsize):
            continue  # bitsandbytes raises, see below
        for blocksize in BLOCKSIZES:
            expected = bnb_tensors(
                *bnbf.quantize_4bit(
                    weight, blocksize=blocksize, compress_statistics=nested, quant_type=codec, quant_storage=storage
                )
            )
            stored_as = WeightFormat(
                codec, tuple(weight.shape), torch.float32, blocksize, 256 if nested else 0, storage
            )
            got = codecs.encode(weight, stored_as).tensors
            assert set(got) == set(expected)
            for key, tensor in expected.items():
                assert same_bytes(got[key], tensor), f"{name}, blocksize {blocksize}: {key} differs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("codec", ["nf4", "fp4", "int8"])
def test_encode_reads_any_float_dtype_as_float32(codec: str, dtype: torch.dtype) -> None:
    weight = normal(32, 96).to(dtype)
    stored_as = WeightFormat(codec, (32, 96), blocksize=64)
    assert codecs.encode(weight, stored_as).fingerprint == codecs.encode(weight.float(), stored_as).fingerprint


# 127/scb is infinite for rows of these, and bitsandbytes casts NaN and infinity to int8, which is undefined
OVERFLOWING = ("all zero", "negative zeros", "zero blocks", "denormals", "tiny")


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n not in OVERFLOWING])
def test_encode_int8_is_bitsandbytes_bit_for_bit(name: str) -> None:
    weight = WEIGHTS[name]()
    codes, scb, _ = bnbf.int8_vectorwise_quant(weight)
    got = codecs.encode(weight, WeightFormat("int8", tuple(weight.shape))).tensors
    assert same_bytes(got["SCB"], scb)
    assert same_bytes(got["weight"], codes)


def test_encode_int8_of_a_zero_row_is_zero() -> None:
    weight = normal(4, 32)
    weight[2] = 0
    codes, scb, _ = bnbf.int8_vectorwise_quant(weight)  # 0 · 127/0 is NaN there, cast to int8: undefined, 0 on x86
    got = codecs.encode(weight, WeightFormat("int8", (4, 32)))
    assert same_bytes(got.tensors["SCB"], scb)
    assert torch.equal(got.tensors["weight"][[0, 1, 3]], codes[[0, 1, 3]])
    assert got.tensors["weight"][2].eq(0).all()
    assert codecs.decode(got)[2].eq(0).all()


@pytest.mark.parametrize("name", OVERFLOWING)
def test_encode_int8_of_rows_near_zero(name: str) -> None:
    weight = WEIGHTS[name]()
    got = codecs.encode(weight, WeightFormat("int8", tuple(weight.shape)))
    assert torch.equal(got.tensors["SCB"], weight.abs().amax(1))
    step = weight.abs().amax(1, keepdim=True).double() / 127
    assert (
        (codecs.decode(got).double() - weight.double()).abs() <= 0.501 * step + 1e-43
    ).all()  # and the resolution of denormal steps


def test_exact_bytes_nf4() -> None:
    # 1 is code 15, -1 is 0, 0 is 7; 0.5/2 = 0.25 is nearest to 0.2461 (10); first code in the high nibble; an odd rest
    # is filled with 0's code
    got = codecs.encode(torch.tensor([[2.0, -2.0, 0.0, 0.5, -0.7]]), WeightFormat("nf4", (1, 5), blocksize=32)).tensors
    assert got["weight"].tolist() == [[0xF0], [0x7A], [0x37]]
    assert got["absmax"].tolist() == [2.0]
    assert got["quant_map"].tolist() == bnbf.get_4bit_type("nf4", device="cpu").tolist()


def test_exact_bytes_fp4() -> None:
    # levels by code, over 12: 0, 0.0625, 8, 12, 4, 6, 2, 3, and their negatives from 8 on
    got = codecs.encode(
        torch.tensor([[12.0, -12.0, 8.0, -4.0, 6.0, 3.0, -2.0, 0.06]]), WeightFormat("fp4", (1, 8), blocksize=32)
    ).tensors
    assert got["weight"].tolist() == [[0x3B], [0x2C], [0x57], [0xE1]]
    assert got["absmax"].tolist() == [12.0]


def test_exact_bytes_nf4_in_bfloat16_storage() -> None:
    got = codecs.encode(
        torch.tensor([[1.0, -1.0, -1.0, 1.0]]), WeightFormat("nf4", (1, 4), blocksize=32, storage=torch.bfloat16)
    ).tensors
    assert got["weight"].shape == (1, 1)
    assert got["weight"].view(torch.uint8).tolist() == [[0xF0, 0x0F]]


def test_exact_bytes_double_quantisation() -> None:
    # absmax 1 and 3: offset 2, the rest ∓1 are the ends of the dynamic map
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 0] = 1.0, -3.0
    got = codecs.encode(weight, WeightFormat("nf4", (2, 32), blocksize=32, nested_blocksize=256)).tensors
    assert got["nested_offset"].item() == 2.0
    assert got["nested_absmax"].tolist() == [1.0]
    assert got["absmax"].dtype == torch.uint8
    assert got["absmax"].tolist() == [0, 255]
    assert got["nested_quant_map"][255].item() == 1.0
    assert got["weight"][:2].tolist() == [[0xF7], [0x77]]
    assert got["weight"][16].tolist() == [0x07]


def test_exact_bytes_int8() -> None:
    got = codecs.encode(torch.tensor([[1.0, -0.5, 0.25], [-254.0, 3.0, 5.0]]), WeightFormat("int8", (2, 3))).tensors
    assert got["weight"].tolist() == [[127, -64, 32], [-127, 2, 2]]  # -63.5 and 2.5 round to even
    assert got["SCB"].tolist() == [1.0, 254.0]


def test_exact_bytes_dense() -> None:
    got = codecs.encode(torch.tensor([[1.0, 1.00390625]]), WeightFormat("dense", (1, 2), torch.bfloat16)).tensors
    assert list(got) == ["weight"]
    assert got["weight"].view(torch.int16).tolist() == [[0x3F80, 0x3F80]]  # halfway: to even


# --- decode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_decode_4bit_is_the_float64_decoder(codec: str, nested: bool, storage: torch.dtype) -> None:
    for shape in ((64, 96), (31, 100), (64, 256), (4, 1402), (6, 12)):
        for blocksize in (32, 64, 512, 4096):
            if (math.prod(shape) + 1) // 2 % storage.itemsize:
                continue
            packed, state = bnbf.quantize_4bit(
                normal(*shape), blocksize=blocksize, compress_statistics=nested, quant_type=codec, quant_storage=storage
            )
            stored_as = WeightFormat(codec, shape, torch.float32, blocksize, 256 if nested else 0, storage)
            got = codecs.decode(EncodedWeight(stored_as, bnb_tensors(packed, state)))
            expected = decode_4bit(packed, state)
            assert got.dtype == torch.float32
            # a float32 product, or with double quantisation one more and a sum
            assert (got.double() - expected).abs().max() <= 2e-7 * expected.abs().max(), (shape, blocksize)


@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_decode_of_random_bytes(codec: str) -> None:
    g = seeded(codec)
    packed = torch.randint(0, 256, (48, 1), generator=g, dtype=torch.uint8)
    absmax = torch.rand(3, generator=g) * 10
    got = codecs.decode(EncodedWeight(WeightFormat(codec, (12, 8), blocksize=32), {"weight": packed, "absmax": absmax}))
    state = bnbf.QuantState(absmax, shape=torch.Size((12, 8)), blocksize=32, quant_type=codec)
    assert relative(got, decode_4bit(packed, state)) <= 1e-7


def test_trap_bitsandbytes_dequantises_straddling_blocks_wrong_on_the_cpu() -> None:
    # in % 16 == 0 and in % blocksize != 0: formats.md. If this fails with a later bitsandbytes, the trap is gone
    packed, state = bnbf.quantize_4bit(normal(64, 96), blocksize=64, quant_type="nf4")
    expected = decode_4bit(packed, state)
    assert relative(bnbf.dequantize_4bit(packed, state), expected) > 1e-2
    ours = codecs.decode(EncodedWeight(WeightFormat("nf4", (64, 96), blocksize=64), bnb_tensors(packed, state)))
    assert relative(ours, expected) <= 1e-7
    state.shape = torch.Size((64 * 96,))  # flattened, bitsandbytes is right too
    assert relative(bnbf.dequantize_4bit(packed, state).reshape(64, 96), expected) <= 1e-7


def test_decode_int8() -> None:
    codes, scb, _ = bnbf.int8_vectorwise_quant(normal(33, 100))
    got = codecs.decode(EncodedWeight(WeightFormat("int8", (33, 100)), {"weight": codes, "SCB": scb}))
    assert relative(got, codes.double() * scb.double().unsqueeze(1) / 127) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dense_round_trip_is_exact_and_a_copy(dtype: torch.dtype) -> None:
    weight = normal(3, 5).to(dtype)
    encoded = codecs.dense(weight)
    got = codecs.decode(encoded)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(codecs.encode(got, encoded.format).tensors["weight"], weight)
    got.zero_()
    assert weight.ne(0).all()


def test_no_input_is_changed() -> None:
    for codec in ("dense", "nf4", "fp4", "int8"):
        weight = normal(8, 96)
        before = weight.clone()
        encoded = codecs.encode(weight, WeightFormat(codec, (8, 96), blocksize=64, nested_blocksize=0))
        assert torch.equal(weight, before), codec
        fingerprint = encoded.fingerprint
        codecs.decode(encoded)
        assert encoded.fingerprint == fingerprint, codec


# --- round trips ------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=shapes,
    seed=st.integers(0, 2**31),
    codec=st.sampled_from(["nf4", "fp4", "int8"]),
    blocksize=st.sampled_from([32, 64, 4096]),
    nested=st.booleans(),
    exponent=st.integers(-30, 30),
)
def test_what_was_decoded_encodes_to_the_same_codes(
    shape: tuple[int, int], seed: int, codec: str, blocksize: int, nested: bool, exponent: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    stored_as = WeightFormat(
        codec, shape, blocksize=blocksize, nested_blocksize=256 if nested and codec != "int8" else 0
    )
    first = codecs.encode(weight, stored_as)
    decoded = codecs.decode(first)
    again = codecs.encode(decoded, stored_as)
    assert torch.equal(fp4_zeros(first), fp4_zeros(again))
    if not stored_as.nested_blocksize:  # double quantisation rounds absmax anew
        assert relative(codecs.decode(again), decoded) <= 1e-6


def fp4_zeros(encoded: EncodedWeight) -> Tensor:
    """The codes, FP4's two zeros (0 and 8) as one: a value below its smallest level decodes to zero, and zero encodes
    to the other.
    """
    packed = encoded.tensors["weight"]
    if encoded.format.codec != "fp4":
        return packed
    codes = torch.cat([packed >> 4, packed & 15], dim=1)
    return torch.where(codes == 8, torch.zeros_like(codes), codes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=shapes, seed=st.integers(0, 2**31), codec=st.sampled_from(["nf4", "fp4", "int8"]))
def test_no_level_is_nearer_than_the_chosen_one(shape: tuple[int, int], seed: int, codec: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    stored_as = WeightFormat(codec, shape, blocksize=32)
    encoded = codecs.encode(weight, stored_as)
    error = (codecs.decode(encoded) - weight).abs().double().reshape(-1)
    if codec == "int8":
        grid = (torch.arange(-127, 128).double() / 127).expand(weight.numel(), -1)
        scale = weight.abs().amax(1, keepdim=True).double().expand(shape).reshape(-1, 1)
    else:
        grid = bnbf.get_4bit_type(codec, device="cpu").double().expand(weight.numel(), -1)
        scale = encoded.tensors["absmax"].double()[torch.arange(weight.numel()) // 32].unsqueeze(1)
    best = (grid * scale - weight.double().reshape(-1, 1)).abs().amin(1)
    assert (error <= best + 1e-6 * scale.squeeze(1)).all()


# --- the layout of a CPU eval forward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((32, 64), 64), ((64, 256), 64), ((96, 128), 32), ((160, 512), 256)], ids=str
)
@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_unpack_cpu_layout(
    codec: str, shape: tuple[int, int], blocksize: int, nested: bool, storage: torch.dtype
) -> None:
    packed, state = bnbf.quantize_4bit(
        normal(*shape), blocksize=blocksize, compress_statistics=nested, quant_type=codec, quant_storage=storage
    )
    codes = packed.clone().reshape(-1).view(torch.uint8).unsqueeze(1)
    absmax = state.absmax.clone()
    if nested:
        absmax = bnbf.dequantize_blockwise(state.absmax, state.state2) + state.offset
    tiled, state = bnbf._convert_weight_packed_for_cpu(packed, state)
    assert state.absmax.shape == (shape[1] // blocksize, shape[0])
    got_codes, got_absmax = unpack_cpu_layout(tiled, state.absmax, shape, blocksize)
    assert torch.equal(got_codes, codes)
    assert same_bytes(got_absmax, absmax.bfloat16().float())


# --- refusals ---------------------------------------------------------------------------------------------------------


def stored(codec: str = "nf4", *, nested: bool = False, drop: str | None = None, **changes: Any) -> EncodedWeight:
    stored_as = WeightFormat(codec, (4, 64), blocksize=64, nested_blocksize=256 if nested else 0)
    tensors = {**codecs.encode(normal(4, 64), stored_as).tensors, **changes}
    tensors.pop(drop or "", None)
    return EncodedWeight(stored_as, tensors)


def nan_at_one(shape: tuple[int, ...], value: float = math.nan) -> Tensor:
    t = torch.ones(shape)
    t.view(-1)[1] = value
    return t


DAMAGED: dict[str, tuple[Callable[[], EncodedWeight], type[OFTSurgeryError], str]] = {
    "4-bit without absmax": (
        lambda: stored(drop="absmax"),
        FormatError,
        r"lacks absmax \[format nf4\] Remedy: reload the model",
    ),
    "4-bit without weight": (lambda: stored(drop="weight"), FormatError, r"lacks weight"),
    "double without nested_absmax": (
        lambda: stored(nested=True, drop="nested_absmax"),
        FormatError,
        r"lacks nested_absmax \[format nf4 \(double quantisation\)\]",
    ),
    "double without offset": (lambda: stored(nested=True, drop="nested_offset"), FormatError, r"lacks nested_offset"),
    "uint8 absmax, not said to be double": (
        lambda: stored(absmax=torch.zeros(4, dtype=torch.uint8)),
        FormatError,
        r"absmax is quantised, but its nested statistics are missing \[tensor 'absmax', format nf4\]",
    ),
    "too few packed bytes": (
        lambda: stored(weight=torch.zeros(100, 1, dtype=torch.uint8)),
        ShapeError,
        r"packed codes have another number of bytes than the weight needs \[tensor 'weight', format nf4, shape 100, expected 128\]",
    ),
    "too few absmax": (
        lambda: stored(absmax=torch.ones(3)),
        ShapeError,
        r"one value per block of 64 \[tensor 'absmax', format nf4, shape 3, expected 4\]",
    ),
    "another quant_map": (
        lambda: stored(quant_map=torch.linspace(-1, 1, 16)),
        FormatError,
        r"quant_map is not the format's own table; .* Remedy: quantise the model again",
    ),
    "FP4's quant_map on NF4": (
        lambda: stored(quant_map=bnbf.get_4bit_type("fp4", device="cpu")),
        FormatError,
        r"quant_map is not the format's own",
    ),
    "a short quant_map": (lambda: stored(quant_map=torch.zeros(8)), FormatError, r"quant_map is not the format's own"),
    "NaN in quant_map": (
        lambda: stored(quant_map=nan_at_one((16,))),
        FormatError,
        r"quant_map is not the format's own",
    ),
    "NaN in absmax": (
        lambda: stored(absmax=nan_at_one((4,))),
        NonFiniteError,
        r"NaN or infinity \[format nf4\] Remedy: reload the base model",
    ),
    "infinite nested_absmax": (
        lambda: stored(nested=True, nested_absmax=torch.tensor([math.inf])),
        NonFiniteError,
        r"NaN or infinity \[format nf4 \(double quantisation\)\]",
    ),
    "too few nested_absmax": (
        lambda: stored(nested=True, nested_absmax=torch.ones(2)),
        ShapeError,
        r"nested_absmax has another number of values than absmax needs .*shape 2, expected 1\]",
    ),
    "a short nested_quant_map": (
        lambda: stored(nested=True, nested_quant_map=torch.ones(16)),
        ShapeError,
        r"nested_quant_map has another number of values than absmax needs .*shape 16, expected 256\]",
    ),
    "int8 without SCB": (lambda: stored("int8", drop="SCB"), FormatError, r"lacks SCB \[format int8\]"),
    "int8 of another dtype": (
        lambda: stored("int8", weight=torch.zeros(4, 64)),
        ShapeError,
        r"must be int8 of its format's shape, but the tensor is torch.float32",
    ),
    "int8 of another shape": (
        lambda: stored("int8", weight=torch.zeros(64, 4, dtype=torch.int8)),
        ShapeError,
        r"shape 64×4, expected 4×64",
    ),
    "int8 with a short SCB": (
        lambda: stored("int8", SCB=torch.ones(3)),
        ShapeError,
        r"SCB must hold one value per row \[tensor 'SCB', format int8, shape 3, expected 4\]",
    ),
    "int8 with NaN in SCB": (
        lambda: stored("int8", SCB=nan_at_one((4,))),
        NonFiniteError,
        r"NaN or infinity \[format int8\]",
    ),
    "dense integers": (
        lambda: codecs.dense(torch.ones(2, 2, dtype=torch.int32)),
        FormatError,
        r"must be floating point, but the tensor is torch.int32 Remedy: dequantise",
    ),
    "dense of another shape": (
        lambda: EncodedWeight(WeightFormat("dense", (2, 2)), {"weight": torch.ones(4)}),
        ShapeError,
        r"shape 4, expected 2×2",
    ),
    "dense NaN": (lambda: codecs.dense(nan_at_one((2, 2))), NonFiniteError, r"NaN or infinity \[format float32\]"),
    "dense infinity": (
        lambda: codecs.dense(nan_at_one((2, 2), -math.inf).half()),
        NonFiniteError,
        r"NaN or infinity \[format float16\]",
    ),
    "unknown codec": (
        lambda: EncodedWeight(WeightFormat("nf3", (2, 2)), {}),
        FormatError,
        rf"unknown storage format; known are {', '.join(FORMATS)} \[format nf3\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_decode_refuses(name: str) -> None:
    make, error, text = DAMAGED[name]
    encoded = make()
    with pytest.raises(error, match=text):
        codecs.decode(encoded)


UNFIT: dict[str, tuple[Tensor, WeightFormat, type[OFTSurgeryError], str]] = {
    "another shape": (
        torch.ones(2, 3),
        WeightFormat("int8", (3, 2)),
        ShapeError,
        r"not have its format's shape \[format int8, shape 2×3, expected 3×2\]",
    ),
    "NaN to nf4": (
        nan_at_one((2, 64)),
        WeightFormat("nf4", (2, 64), blocksize=64),
        NonFiniteError,
        r"to quantise is not finite \[format nf4\]",
    ),
    "infinity to fp4": (
        nan_at_one((2, 64), math.inf),
        WeightFormat("fp4", (2, 64), blocksize=64),
        NonFiniteError,
        r"\[format fp4\]",
    ),
    "NaN to int8": (nan_at_one((2, 64)), WeightFormat("int8", (2, 64)), NonFiniteError, r"\[format int8\]"),
    "beyond float16": (
        torch.full((2, 2), 7e4),
        WeightFormat("dense", (2, 2), torch.float16),
        NonFiniteError,
        r"not finite in float16 .* Remedy: fold into a wider format",
    ),
    "float64 beyond float32, to nf4": (
        torch.full((2, 64), 1e39, dtype=torch.float64),
        WeightFormat("nf4", (2, 64), blocksize=64),
        NonFiniteError,
        r"not finite",
    ),
    "mean of absmax beyond float32": (
        torch.full((8, 64), 3e38),
        WeightFormat("nf4", (8, 64), blocksize=64, nested_blocksize=256),
        NonFiniteError,
        r"mean of absmax, .* is not finite \[format nf4 \(double quantisation\)\]",
    ),
    "no whole float32": (
        torch.ones(1, 6),
        WeightFormat("nf4", (1, 6), blocksize=64, storage=torch.float32),
        FormatError,
        r"3 packed bytes do not fill whole elements of torch.float32 \[format nf4\] Remedy: use quant_storage=torch.uint8",
    ),
    "unknown codec": (
        torch.ones(2, 2),
        WeightFormat("awq", (2, 2)),
        FormatError,
        rf"known are {', '.join(FORMATS)} \[format awq\]",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_encode_refuses(name: str) -> None:
    weight, stored_as, error, text = UNFIT[name]
    with pytest.raises(error, match=text):
        codecs.encode(weight, stored_as)


@pytest.mark.parametrize(
    ("weight", "shape", "blocksize"),
    [
        (torch.zeros(33, 32, dtype=torch.uint8), (33, 64), 64),
        (torch.zeros(32, 48, dtype=torch.uint8), (32, 96), 64),
        (torch.zeros(32, 16, dtype=torch.uint8), (32, 64), 64),
        (torch.zeros(32, 32, dtype=torch.int8), (32, 64), 64),
    ],
    ids=["rows", "columns", "bytes", "dtype"],
)
def test_unpack_cpu_layout_refuses(weight: Tensor, shape: tuple[int, int], blocksize: int) -> None:
    with pytest.raises(FormatError, match=r"of a shape that bitsandbytes cannot pack \[tensor 'weight'"):
        unpack_cpu_layout(weight, torch.zeros(shape[1] // blocksize, shape[0], dtype=torch.bfloat16), shape, blocksize)


def test_labels_and_fingerprints() -> None:
    assert stored().format.label == "nf4"
    assert stored(nested=True).format.label == "nf4 (double quantisation)"
    assert stored("int8").format.label == "int8"
    assert codecs.dense(torch.zeros(2, 2).half()).format.label == "float16"
    assert not codecs.dense(torch.zeros(2, 2)).format.quantised
    assert stored().fingerprint == stored().fingerprint
    assert stored().fingerprint != stored(absmax=stored().tensors["absmax"] * 2).fingerprint
    with pytest.raises(TypeError, match="does not support item assignment"):
        stored().tensors["weight"] = torch.zeros(1)  # type: ignore[index]
