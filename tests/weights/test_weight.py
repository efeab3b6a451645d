"""Folding one weight: against bitsandbytes' quantiser on the exact rotation; chains, inverses, dtypes, and surroundings
that must not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import bitsandbytes.functional as bnbf
import pytest
import torch
from independent import cayley, relative, seeded, skew
from torch import Tensor

import oftsurgery
from oftsurgery.adapters.rotation import Cayley, Rotation
from oftsurgery.errors import MatchError, NonFiniteError, ShapeError
from oftsurgery.formats import codecs, levels
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.weights import kernels
from oftsurgery.weights.cpu_kernels import tables
from oftsurgery.weights.fold import fold_encoded, fold_weight, relative_error, rotate_chain, unfold_weight
from oftsurgery.weights.kernels import blockwise

NEUMANN = Cayley(terms=5)


def generator(features: int, b: int, *, size: float = 0.03, key: object = 0, shared: bool = False) -> Tensor:
    return size * torch.randn(1 if shared else features // b, b * (b - 1) // 2, generator=seeded(features, b, key))


def dense_of(rotation: Rotation, features: int) -> Tensor:
    """float64 (features, features): R, by our own arithmetic."""
    b = rotation.block_size
    q = skew(rotation.generator, b)
    eye = torch.eye(b, dtype=torch.float64)
    blocks = cayley(q) if rotation.cayley.terms is None else eye + 2 * (q + q @ q + q @ q @ q) + q @ q @ q @ q
    count = -(-features // b)
    return torch.block_diag(*(blocks[i % len(blocks)] for i in range(count)))[:features, :features]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded("weight", *shape)) / shape[-1] ** 0.5


def stored(codec: str, weight: Tensor, *, nested: bool = False, dtype: torch.dtype = torch.float32) -> EncodedWeight:
    form = WeightFormat(
        codec, tuple(weight.shape), dtype, 0 if codec in ("dense", "int8") else 64, 256 if nested else 0
    )
    return codecs.encode(weight, form)


# --- against bitsandbytes ---------------------------------------------------------------------------------------------


def codes_of(encoded: EncodedWeight) -> Tensor:
    """Codes as positions among the sorted levels, so that neighbours differ by one."""
    codes = encoded.tensors["weight"].reshape(-1)
    if encoded.format.codec == "int8":
        return codes.long()
    codes = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1).long()
    return torch.argsort(torch.argsort(bnbf.get_4bit_type(encoded.format.codec, device="cpu"), stable=True))[codes]


@pytest.mark.parametrize("cayley_map", [Cayley(), NEUMANN], ids=["exact", "Neumann"])
@pytest.mark.parametrize("width", [512, 480, 500], ids=["in 512", "in 480", "in 500"])
@pytest.mark.parametrize(
    ("codec", "nested"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
)
def test_fold_is_bitsandbytes_quantiser_on_the_exact_rotation(
    codec: str, nested: bool, width: int, cayley_map: Cayley
) -> None:
    base = stored(codec, normal(512, width), nested=nested)
    rotation = Rotation(generator(width, 20 if width == 500 else 32), cayley_map)
    exact = codecs.decode(base).double() @ dense_of(rotation, width).T

    folded = fold_encoded(base, [rotation]).encoded

    if codec == "int8":
        codes, scb, _ = bnbf.int8_vectorwise_quant(exact.float())
        expected = EncodedWeight(base.format, {"weight": codes, "SCB": scb})
    else:
        packed, state = bnbf.quantize_4bit(exact.float(), blocksize=64, compress_statistics=nested, quant_type=codec)
        expected = EncodedWeight(base.format, {"weight": packed, "absmax": state.absmax})
        if nested:
            assert (folded.tensors["absmax"].int() - state.absmax.int()).abs().max() <= 1
            assert folded.tensors["absmax"].ne(state.absmax).float().mean() <= 1e-2  # its own ties
            assert torch.allclose(folded.tensors["nested_absmax"], state.state2.absmax, rtol=1e-4)
            assert torch.allclose(folded.tensors["nested_offset"], state.offset, rtol=1e-6)
    statistic = "SCB" if codec == "int8" else "absmax"
    if not nested:
        assert torch.allclose(folded.tensors[statistic], expected.tensors[statistic], rtol=1e-6, atol=0)

    got, wanted = codes_of(folded), codes_of(expected)
    different = (got != wanted).nonzero().flatten()
    assert len(different) <= 1e-4 * got.numel()
    assert (got - wanted)[different].abs().le(1).all(), "not neighbours"
    if codec == "int8":
        levels, scale = torch.arange(-128, 128).double() / 127, exact.abs().amax(1).repeat_interleave(width)
        got, wanted = got + 128, wanted + 128
    else:
        levels = bnbf.get_4bit_type(codec, device="cpu").double().sort().values
        scale = exact.reshape(-1, 64).abs().amax(1).repeat_interleave(64)
    x = exact.reshape(-1) / scale
    tie = (levels[got] + levels[wanted]) / 2
    assert ((x - tie)[different].abs() <= 1e-6).all(), "not at a tie"


# --- chains, sides, inverses ------------------------------------------------------------------------------------------


def chain_case(side: str) -> tuple[Tensor, list[Rotation], Tensor]:
    """Weight (48, 64), rotations [a, b] and the float64 weight that the live chain gives."""
    weight = normal(48, 64)
    width = 48 if side == "output" else 64
    a = Rotation(generator(width, 16, size=0.1, key="a"), Cayley(), side)  # type: ignore[arg-type]
    b = Rotation(generator(width, 8, size=0.1, key="b"), NEUMANN, side)  # type: ignore[arg-type]
    ra, rb = dense_of(a, width), dense_of(b, width)
    assert relative(ra @ rb, rb @ ra) > 0.1  # or the test could not tell the order
    w, eye = weight.double(), torch.eye(64, dtype=torch.float64)
    if side == "input":
        expected = ((eye @ ra @ rb) @ w.T).T
    elif side == "output":
        expected = ((eye @ w.T) @ ra @ rb).T
    else:
        expected = w @ ra @ rb  # E[i]·Ra·Rb
    return weight, [a, b], expected


@pytest.mark.parametrize("side", ["input", "output", "embedding"])
def test_a_chain_is_in_the_live_order(side: str) -> None:
    weight, chain, expected = chain_case(side)
    assert relative(fold_weight(weight, chain), expected) <= 1e-6
    assert relative(fold_weight(weight, chain[::-1]), expected) > 0.1
    assert relative(fold_weight(weight.double(), chain), expected) <= 1e-14


@pytest.mark.parametrize("side", ["input", "output", "embedding"])
def test_a_chain_unfolds(side: str) -> None:
    weight, chain, _ = chain_case(side)
    assert relative(unfold_weight(fold_weight(weight, chain), chain), weight) <= 1e-6
    assert relative(unfold_weight(fold_weight(weight.double(), chain), chain), weight) <= 1e-14


def test_both_sides_of_one_weight() -> None:
    weight = normal(48, 64)
    right, left = Rotation(generator(64, 16, size=0.1)), Rotation(generator(48, 8, size=0.1), side="output")
    expected = dense_of(left, 48).T @ weight.double() @ dense_of(right, 64).T
    for chain in ([right, left], [left, right]):
        got = fold_weight(weight.double(), chain)
        assert relative(got, expected) <= 1e-14
        assert relative(unfold_weight(got, chain), weight) <= 1e-14


def test_scales_of_a_chain_multiply() -> None:
    weight = normal(48, 64).double()
    first, second = (1 + 0.1 * torch.randn(48, generator=seeded("scale", i)) for i in (1, 2))
    a, b = Rotation(generator(64, 16, size=0.1), scale=first), Rotation(generator(64, 8, size=0.1), scale=second)
    expected = (first * second).double().unsqueeze(1) * (weight @ (dense_of(a, 64) @ dense_of(b, 64)).T)
    got = fold_weight(weight, [a, b])
    assert relative(got, expected) <= 1e-7  # the product of two float32 scales
    assert relative(unfold_weight(got, [a, b]), weight) <= 1e-14


def test_a_scale_and_an_output_side_do_not_commute_and_are_refused_in_one_chain() -> None:
    scaled = Rotation(generator(64, 16), scale=torch.ones(48))
    left = Rotation(generator(48, 8), side="output")
    for chain in ([scaled, left], [left, scaled]):
        with pytest.raises(
            MatchError, match=r"one chain holds a scale .* Remedy: fold the adapters one after the other"
        ):
            fold_weight(normal(48, 64), chain)


@pytest.mark.parametrize("size", [0.02, 0.08, 0.15])
def test_unfold_is_the_true_inverse_of_a_rotation_that_is_not_orthogonal(size: float) -> None:
    weight = normal(32, 64).double()
    rotation = Rotation(generator(64, 16, size=size), NEUMANN)
    folded = fold_weight(weight, rotation)
    transposed = folded @ dense_of(rotation, 64)  # what undoing by the transpose would give
    assert relative(transposed, weight) > rotation.defect / 20 > 1e-6
    assert relative(unfold_weight(folded, rotation), weight) <= 1e-12


def test_one_shared_block_and_a_cropped_output_side() -> None:
    weight = normal(50, 64).double()
    shared = Rotation(generator(64, 16, size=0.1, shared=True))
    assert relative(fold_weight(weight, shared), weight @ dense_of(shared, 64).T) <= 1e-14
    cropped = Rotation(0.1 * torch.randn(4, 13 * 12 // 2, generator=seeded("crop")), side="output")  # 4 · 13 = 52 > 50
    folded = fold_weight(weight, cropped)
    assert relative(folded, dense_of(cropped, 50).T @ weight) <= 1e-14
    assert relative(unfold_weight(folded, cropped), weight) <= 1e-12


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_precision_is_storage_not_arithmetic(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    weight = normal(32, 64).to(dtype)
    rotation = Rotation(generator(64, 16, size=0.1).to(adapter_dtype))
    exact = weight.double() @ dense_of(rotation, 64).T
    got = fold_weight(weight, rotation)
    assert got.dtype == dtype
    wanted = exact.to(dtype)
    if dtype in (torch.float32, torch.float64):
        assert relative(got, exact) <= (1e-6 if dtype == torch.float32 else 1e-14)
    else:  # rounded once, at the end
        assert got.ne(wanted).float().mean() <= 1e-3
        assert relative(got, exact) <= relative(wanted, exact) * (1 + 1e-3)


# --- what must not matter ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(get: Callable[[], Any], set_: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "medium matmul precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "default dtype float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype bfloat16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("codec", ["dense", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("backend", ["numba", "tiled", "reference"])
def test_surroundings_do_not_matter(backend: str, codec: str, surrounding: str) -> None:
    # the tiled path leaves a weight of one tile to the reference
    base = stored(codec, normal(2752 if backend == "tiled" else 64, 96), nested=codec in ("nf4", "fp4"))
    rotations = [Rotation(generator(96, 16, size=0.1)), Rotation(generator(96, 8, size=0.1), NEUMANN)]
    with oftsurgery.use_backend(backend):
        _check_surroundings(SURROUNDINGS[surrounding], base, rotations, backend)
    measured = [kernels.measure(r) for r in rotations]
    with SURROUNDINGS[surrounding]():
        assert [kernels.measure(r) for r in rotations] == measured


def _check_surroundings(
    surrounding: Callable[[], AbstractContextManager[Any]], base: EncodedWeight, rotations: list[Rotation], backend: str
) -> None:
    expected, back = fold_encoded(base, rotations), fold_encoded(base, rotations, inverse=True)
    assert (expected.backend, back.backend) == (backend, backend)
    cleared = ("levels_of", "sorted_levels", "levels_of_bytes")
    for name in cleared:  # tables are kept: none may be made in these surroundings and be wrong for later
        getattr(levels, name).cache_clear()
    blockwise.tables.cache_clear()
    for table in (tables.levels, tables.suffix, tables.search, tables.dynamic):
        table.cache_clear()
    if surrounding is not SURROUNDINGS["default device meta"]:  # bitsandbytes cannot make its own table there
        bnbf.name2qmap.clear()
    before = torch.get_float32_matmul_precision()
    with surrounding():
        within = torch.get_float32_matmul_precision()
        got, undone = fold_encoded(base, rotations), fold_encoded(base, rotations, inverse=True)
        assert torch.get_float32_matmul_precision() == within
    assert torch.get_float32_matmul_precision() == before
    assert got.encoded.fingerprint == expected.encoded.fingerprint
    assert (got.error, got.backend, undone.backend) == (expected.error, backend, backend)
    assert undone.encoded.fingerprint == back.encoded.fingerprint
    assert fold_encoded(base, rotations).encoded.fingerprint == expected.encoded.fingerprint
    assert not got.encoded.tensors["weight"].requires_grad


def test_a_generator_and_weight_that_require_gradients_fold() -> None:
    weight = normal(8, 32).requires_grad_()
    got = fold_weight(weight, Rotation(generator(32, 8).requires_grad_()))
    assert not got.requires_grad
    assert torch.equal(got, fold_weight(weight.detach(), Rotation(generator(32, 8))))


# --- the reported error -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["nf4", "fp4", "int8", "dense"])
def test_the_reported_error_is_the_measured_one(codec: str) -> None:
    dtype = torch.bfloat16 if codec == "dense" else torch.float32
    base = stored(codec, normal(64, 96), dtype=dtype)
    rotation = Rotation(generator(96, 16, size=0.1))
    exact = codecs.decode(base).double() @ dense_of(rotation, 96).T
    folded = fold_encoded(base, [rotation])
    assert folded.error == pytest.approx(relative(codecs.decode(folded.encoded), exact), rel=1e-4)
    assert {"nf4": 0.09, "fp4": 0.13, "int8": 0.0063, "dense": 0.0017}[codec] == pytest.approx(folded.error, rel=0.15)
    unfolded = fold_encoded(folded.encoded, [rotation], inverse=True)
    exact = codecs.decode(folded.encoded).double() @ dense_of(rotation, 96)
    assert unfolded.error == pytest.approx(relative(codecs.decode(unfolded.encoded), exact), rel=1e-4)


def test_float32_and_float64_are_without_error() -> None:
    rotation = Rotation(generator(96, 16))
    assert fold_encoded(codecs.dense(normal(8, 96)), [rotation]).error == 0
    assert fold_encoded(codecs.dense(normal(8, 96).double()), [rotation]).error == 0


def test_another_format_to_go_to() -> None:
    base = stored("nf4", normal(64, 96))
    rotation = Rotation(generator(96, 16))
    exact = codecs.decode(base).double() @ dense_of(rotation, 96).T
    into = fold_encoded(base, [rotation], WeightFormat("int8", (64, 96)))
    assert into.encoded.format.codec == "int8"
    assert into.error == pytest.approx(relative(codecs.decode(into.encoded), exact), rel=1e-3)


def test_relative_error_of_zeros() -> None:
    zero = torch.zeros(2, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1, zero) == 2  # no relative one: the absolute


# --- refusals and types -----------------------------------------------------------------------------------------------


def test_result_is_of_the_argument_s_type_and_the_argument_stays() -> None:
    base = stored("nf4", normal(16, 64), nested=True)
    before = base.fingerprint
    got = oftsurgery.fold_weight(base, Rotation(generator(64, 16)))
    assert isinstance(got, EncodedWeight)
    assert got.format == base.format
    assert base.fingerprint == before
    weight = normal(4, 64)
    copy = weight.clone()
    assert oftsurgery.fold_weight(weight, Rotation(generator(64, 16))).shape == (4, 64)
    assert torch.equal(weight, copy)


def test_refusals() -> None:
    with pytest.raises(
        ShapeError,
        match=r"4 blocks of size 16 do not cover the 60 input features \[module 'weight', shape 8×60\] Remedy: use the base",
    ):
        fold_weight(normal(8, 60), Rotation(generator(64, 16)))
    with pytest.raises(
        ShapeError,
        match=r"a rotation needs a weight of two dimensions \[shape 8×64×1\] Remedy: give a linear layer's weight",
    ):
        fold_weight(normal(8, 64, 1), Rotation(generator(64, 16)))
    with pytest.raises(
        ShapeError,
        match=r"oft_s does not fit the output features \[module 'weight', tensor 'oft_s', shape 9, expected 8\]",
    ):
        fold_weight(normal(8, 64), Rotation(generator(64, 16), scale=torch.ones(9)))
    with pytest.raises(NonFiniteError, match=r"the stored weight holds NaN or infinity \[format float32\]"):
        fold_weight(torch.full((8, 64), torch.nan), Rotation(generator(64, 16)))
    with pytest.raises(NonFiniteError, match="generator holds NaN or infinity"):
        fold_weight(normal(8, 64), Rotation(torch.full((4, 120), torch.nan)))
    with pytest.raises(
        NonFiniteError, match=r"the rotated weight holds NaN or infinity \[format float32\] Remedy: check the adapter"
    ):
        fold_weight(torch.full((8, 64), 3e38), Rotation(generator(64, 16), scale=torch.full((8,), 100.0)))
    with pytest.raises(NonFiniteError, match=r"oft_s holds a zero, which no inverse undoes \[tensor 'oft_s'\]"):
        unfold_weight(normal(8, 64), Rotation(generator(64, 16), scale=torch.zeros(8)))
    singular = Rotation(torch.tensor([[1.0]]), NEUMANN)  # (I+Q)(I-Q)⁻¹(I-Q⁴) at ‖Q‖ = 1: I - Q⁴ = 0
    with pytest.raises(NonFiniteError, match="singular or too ill-conditioned"):
        unfold_weight(normal(8, 2), singular)


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "columns swapped"])
@pytest.mark.parametrize("codec", ["fp4", "dense"])
def test_values_on_a_midpoint_get_bitsandbytes_own_codes(codec: str, turned: bool) -> None:
    """FP4's levels lie on midpoints of int8's. A quarter turn is exact."""
    f, into = WeightFormat(codec, (64, 64), torch.float32, 64), WeightFormat("int8", (64, 64), torch.float16)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator) * 0.02
    if codec == "dense":
        f = WeightFormat(codec, (64, 64), torch.float32)
        halves = torch.randint(-126, 126, (64, 63), generator=generator) + 0.5
        weight[:, 1:] = halves * weight[:, :1].abs() / 127
    quarters = Rotation(torch.full((32, 1), -1.0))
    chain = (quarters,) if turned else ()
    encoded = codecs.encode(weight, f)
    want = codecs.encode(rotate_chain(codecs.decode(encoded), chain), into)
    got = fold_encoded(encoded, chain, into, "nearest").encoded
    assert all(torch.equal(tensor, got.tensors[name]) for name, tensor in want.tensors.items())
