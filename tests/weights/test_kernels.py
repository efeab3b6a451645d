"""The fast paths against the readable reference and against float64, and which of them serves."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from importlib.util import find_spec

import bitsandbytes.functional as bnbf
import numpy as np
import pytest
import torch
from backends import codes_of, exact, in_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oftsurgery
from oftsurgery import Cayley, EncodedWeight, NonFiniteError, Rotation, WeightFormat, rotations
from oftsurgery.adapters.boft import LycorisBoft
from oftsurgery.adapters.output_blocks import OutputBlocks
from oftsurgery.errors import MissingDependencyError, StateError
from oftsurgery.formats import codecs
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.formats.four_bit import FourBit
from oftsurgery.weights import kernels
from oftsurgery.weights.cpu_kernels import layout, tables
from oftsurgery.weights.fold import fold_encoded
from oftsurgery.weights.kernels import blockwise, fold_cpu
from oftsurgery.weights.kernels.blockwise import FoldedWeight

MAPS = {
    "exact": Cayley(),
    "neumann 5": Cayley(5),
    "neumann 5 of 0.17": Cayley(5, since_0_18=False),
    "neumann 2": Cayley(2),
    "neumann 1": Cayley(1),
}


def folded(
    backend: str,
    encoded: EncodedWeight,
    chain: tuple[Rotation, ...],
    into: WeightFormat | None = None,
    *,
    inverse: bool = False,
) -> FoldedWeight:
    with kernels.use_backend(backend):
        return fold_encoded(encoded, chain, into, inverse=inverse)


def assert_same(got: FoldedWeight, want: FoldedWeight, truth: torch.Tensor) -> int:
    """Equal but for ties: codes one apart where the exact value lies on the midpoint between them, to float32's
    rounding. Returns their number.
    """
    f = want.encoded.format
    assert got.encoded.format == f
    assert {k: (t.shape, t.dtype) for k, t in got.encoded.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in want.encoded.tensors.items()
    }
    mine, theirs = codes_of(got.encoded), codes_of(want.encoded)
    flat = truth.reshape(-1)
    if f.codec == "dense":
        step = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[f.dtype]
        scale = truth.abs().amax(1, keepdim=True).expand_as(truth).reshape(-1)
        assert ((mine - theirs).abs() <= step * flat.abs() + 4e-6 * scale + 1e-7).all()
        return int((mine != theirs).sum())
    differ = (mine != theirs).nonzero().reshape(-1)
    assert ((mine - theirs).abs() <= 1).all()
    if f.codec == "int8":
        scb = truth.abs().amax(1)
        assert torch.allclose(got.encoded.tensors["SCB"], want.encoded.tensors["SCB"], rtol=2e-6, atol=1e-44)
        s = flat[differ] * 127 / scb.repeat_interleave(truth.shape[1])[differ].clamp(min=1e-300)
        assert ((s.abs() % 1 - 0.5).abs() < 2e-3).all()
    else:
        size = f.blocksize
        absmax = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size).abs().amax(1)
        s = flat[differ] / absmax[differ // size].clamp(min=1e-38)
        bounds = f.kind.levels(s.device)[1].double()
        assert ((s.unsqueeze(-1) - bounds).abs().amin(-1) < 2e-5).all() if len(s) else True
        nested = bool(f.nested_blocksize)
        single = [x.encoded.scales for x in (got, want)]
        # a nested code on a tie is another of 256 levels of the statistics' range
        close = (single[0] - single[1]).abs() <= 2e-6 * single[1].abs() + (
            0.02 * float(single[1].abs().max()) if nested else 1e-44
        )
        assert close.all()
        if nested:
            assert (
                int((got.encoded.tensors["absmax"] != want.encoded.tensors["absmax"]).sum())
                <= 1 + absmax.numel() // 100
            )
    return len(differ)


@st.composite
def cases(draw: st.DrawFn) -> tuple[EncodedWeight, tuple[Rotation, ...], WeightFormat, bool]:
    b = draw(st.sampled_from([2, 3, 4, 8, 16, 20, 24, 32, 48, 64, 128]), "b")
    blocks = draw(st.integers(1, max(1, 256 // b)), "blocks")
    features, rows = b * blocks, draw(st.integers(1, 70), "rows")
    codec = st.sampled_from(["nf4", "fp4", "int8", "float32", "float16", "bfloat16"])

    def form(name: str) -> WeightFormat:
        if name in ("nf4", "fp4"):
            nested = draw(st.sampled_from([0, 256]))
            return WeightFormat(
                name, (rows, features), torch.float16, draw(st.sampled_from([32, 64, 128, 512, 4096])), nested
            )
        return (
            WeightFormat("int8", (rows, features), torch.float16)
            if name == "int8"
            else WeightFormat("dense", (rows, features), getattr(torch, name))
        )

    old = form(draw(codec, "codec"))
    into = old if draw(st.booleans(), "same format") else form(draw(codec, "into"))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31), "seed"))
    weight = torch.randn(rows, features, generator=gen) * 0.02
    special = draw(st.sampled_from(["", "zeros", "zero rows", "huge", "tiny", "denormal"]), "special")
    part = weight.view(-1)[: max(1, weight.numel() // 2)]
    narrow = torch.float16 in (old.dtype, into.dtype)
    if special == "zeros":
        weight.zero_()
    elif special == "zero rows":
        part.zero_()
    elif special:
        part.mul_(
            {"huge": 1e4 if narrow else 1e30, "tiny": 1e-3 if narrow else 1e-30, "denormal": 1e-3 if narrow else 1e-38}[
                special
            ]
        )
    side = draw(st.sampled_from(["input", "embedding", "output"]), "side")
    chain = []
    for _ in range(draw(st.integers(1, 2), "rotations")):
        width = rows if side == "output" else features
        size = draw(st.sampled_from([s for s in (2, 4, 8, b) if width % s == 0] or [width])) if width > 1 else 0
        if size < 2:
            continue
        n = draw(st.sampled_from([1, width // size]))
        cayley = MAPS[draw(st.sampled_from(list(MAPS)), "map")]
        scale = None
        if side != "output" and draw(st.booleans(), "scaled"):  # beside the output side it is refused
            scale = torch.rand(rows, generator=gen) + 0.5
        generator = torch.randn(n, size * (size - 1) // 2, generator=gen) * 0.2 / size**0.5
        chain.append(Rotation(generator=generator, cayley=cayley, side=side, scale=scale))
    return codecs.encode(weight, old), tuple(chain), into, draw(st.booleans(), "inverse")


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_path_gives_the_reference_result(case):
    encoded, chain, into, inverse = case
    want = folded("reference", encoded, chain, into, inverse=inverse)
    truth = exact(encoded, chain, inverse=inverse)
    for backend in ("numba", "tiled"):
        got = folded(backend, encoded, chain, into, inverse=inverse)
        ties = assert_same(got, want, truth)
        assert into.codec == "dense" or ties <= 2 + truth.numel() // 500
        assert got.error == pytest.approx(want.error, rel=1e-3, abs=3e-7)


ROTATED_ROWS = {
    "nf4": (WeightFormat("nf4", (576, 528), torch.float16, 64, 0), 576),
    "nf4, nested, blocks straddle rows": (WeightFormat("nf4", (192, 1040), torch.float16, 64, 256), 96),
    "fp4": (WeightFormat("fp4", (640, 512), torch.bfloat16, 128, 0), 640),
    "int8": (WeightFormat("int8", (320, 512), torch.float16), 320),
    "fp16": (WeightFormat("dense", (640, 336), torch.float16), 160),
    "bf16": (WeightFormat("dense", (320, 512), torch.bfloat16), 8),
    "fp32": (WeightFormat("dense", (320, 512), torch.float32), 320),
    "no multiple of 16 columns": (WeightFormat("dense", (320, 270), torch.float16), 320),
}


@pytest.mark.parametrize("name", ROTATED_ROWS)
@pytest.mark.parametrize("rounding", ["preserve", "mse", "nearest"])
@pytest.mark.parametrize("family", ["diag-oft", "BOFT"])
def test_rows_that_are_rotated_as_a_whole_are_stored_as_the_reference_stores_them(name, rounding, family):
    """Large blocks of rows, and maps that are no rotation: the kernel stores the exact values that it is given."""
    f, b = ROTATED_ROWS[name]
    gen = torch.Generator().manual_seed(0)
    encoded = codecs.encode(torch.randn(f.shape, generator=gen) * 0.02, f)
    n, b = (f.shape[0] // b, b) if family == "diag-oft" else (f.shape[0] // 16, 16)
    blocks = torch.randn(n, b, b, generator=gen) * (0.02 / b**0.5)
    scale = 1 + 0.01 * torch.randn(f.shape[0], generator=gen)
    chain = (
        OutputBlocks(blocks, None, "lycoris", scale) if family == "diag-oft" else LycorisBoft(blocks[None], None, scale)
    )
    used = codecs.rounding_of(f, rounding)
    with oftsurgery.use_backend("reference"):
        want = fold_encoded(encoded, [chain.resolved()], rounding=used)
    with oftsurgery.use_backend("numba"):
        got = fold_encoded(encoded, [chain.resolved()], rounding=used)
    assert (want.backend, got.backend) == ("reference", "reference" if f.shape[1] % 16 else "numba")
    assert (got.rounding, got.relaxation) == (want.rounding, want.relaxation)
    for figure in ("error", "nearest", "rho", "kept", "change"):
        mine, theirs = getattr(got, figure), getattr(want, figure)
        assert (mine is None) == (theirs is None), figure
        assert mine is None or mine == pytest.approx(theirs, rel=1e-3, abs=3e-7), figure
    if not f.quantised:
        assert torch.equal(got.encoded.tensors["weight"], want.encoded.tensors["weight"])
    differ = (codecs.decode(got.encoded) != codecs.decode(want.encoded)).float().mean()
    assert f.nested_blocksize or rounding == "mse" or differ < 1e-3
    broken = replace(chain, blocks=blocks * torch.nan) if family == "BOFT" else replace(chain, scale=scale * torch.inf)
    with oftsurgery.use_backend("numba"), pytest.raises(oftsurgery.NonFiniteError):
        fold_encoded(encoded, [broken.resolved()], rounding=used)


def test_every_path_gives_the_reference_result_on_many_tiles():
    torch.manual_seed(0)
    ties = weights = 0
    for name, shape, b, blocksize, nested in [
        ("nf4", (523, 2048), 32, 64, 256),
        ("fp4", (1031, 1056), 32, 128, 0),
        ("nf4", (520, 2040), 8, 64, 256),
        ("int8", (520, 2048), 64, 0, 0),
        ("int8", (700, 1000), 20, 0, 0),
    ]:
        f = WeightFormat(name, shape, torch.float16, blocksize, nested)
        encoded = codecs.encode(torch.randn(shape) * 0.02, f)
        chain = (Rotation(generator=torch.randn(shape[1] // b, b * (b - 1) // 2) * 0.2 / b**0.5, cayley=Cayley(5)),)
        want = folded("reference", encoded, chain)
        truth = exact(encoded, chain, inverse=False)
        for backend in ("numba", "tiled"):
            got = folded(backend, encoded, chain)
            assert got.backend == ("tiled" if shape[1] % 16 else backend)
            ties += assert_same(got, want, truth)
            weights += truth.numel()
            assert got.error == pytest.approx(want.error, rel=1e-4)
            assert got.rho == pytest.approx(want.rho, rel=1e-4)
    assert ties <= weights // 100_000


def quarter_turns(features: int, b: int) -> Rotation:
    """Exact in float32: pairs of columns swapped, one with its sign changed."""
    q = torch.zeros(features // b, b, b)
    for i in range(0, b - 1, 2):
        q[:, i, i + 1], q[:, i + 1, i] = -1, 1
    return Rotation(generator=rotations.vector(q))


EXACT = {
    "nf4": ("nf4", (77, 192), 16, 64, 0, torch.uint8),
    "nf4, nested": ("nf4", (77, 192), 32, 64, 256, torch.uint8),
    "nf4, blocks over rows": ("nf4", (77, 96), 32, 64, 0, torch.uint8),
    "nf4, a short last block": ("nf4", (3, 48), 16, 128, 256, torch.uint8),
    "nf4, held as bfloat16": ("nf4", (64, 128), 64, 64, 0, torch.bfloat16),
    "nf4, one block of 4096": ("nf4", (33, 256), 64, 4096, 0, torch.uint8),
    "fp4": ("fp4", (77, 192), 2, 64, 0, torch.uint8),
    "fp4, nested": ("fp4", (77, 384), 8, 128, 256, torch.uint8),
    "int8": ("int8", (77, 192), 16, 0, 0, torch.uint8),
}


@pytest.mark.parametrize("special", ["", "zeros", "huge", "tiny", "denormal", "blocks of all sizes"])
@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_exact_rotations_give_the_same_bytes(case, special):
    codec, shape, b, blocksize, nested, storage = case
    torch.manual_seed(1)
    weight = torch.randn(shape) * 0.02
    if special == "blocks of all sizes":
        weight *= 10.0 ** -(torch.arange(weight.numel()).reshape(shape) // 64 % 7 * 6)
    else:
        part = weight if special == "tiny" else weight[: shape[0] // 2]
        part *= {"": 1, "zeros": 0, "huge": 1e36, "tiny": 1e-18, "denormal": 1e-38}[special]
    encoded = codecs.encode(weight, WeightFormat(codec, shape, torch.float16, blocksize, nested, storage))
    chain = (quarter_turns(shape[1], b),)
    want, got = folded("reference", encoded, chain), folded("numba", encoded, chain)
    assert got.backend == "numba"
    assert got.encoded.fingerprint == want.encoded.fingerprint
    assert got.error == pytest.approx(want.error, rel=1e-5, abs=3e-7)
    assert got.rho == pytest.approx(want.rho, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_rotations_give_the_same_bytes_dense(dtype):
    torch.manual_seed(1)
    weight = (torch.randn(77, 192) * 0.02).to(dtype)
    for into in (dtype, torch.bfloat16, torch.float16, torch.float32):
        f = WeightFormat("dense", (77, 192), into)
        want, got = (folded(x, codecs.dense(weight), (quarter_turns(192, 32),), f) for x in ("reference", "numba"))
        assert (got.backend, got.encoded.fingerprint) == ("numba", want.encoded.fingerprint)
        assert got.error == pytest.approx(want.error, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_ties_go_where_torch_puts_them(codec):
    bounds = FORMATS[codec].levels(torch.device("cpu"))[1]
    near = torch.cat(
        [
            bounds,
            bounds.nextafter(torch.tensor(2.0)),
            bounds.nextafter(torch.tensor(-2.0)),
            torch.tensor([1.0, -1.0, 0.0]),
        ]
    )
    weight = torch.cat([near, near.new_zeros(-len(near) % 64)]).reshape(1, 64)
    weight = torch.cat([weight, -weight, weight.nextafter(torch.tensor(0.0))])
    weight[2, 47] = 1
    f = WeightFormat(codec, (3, 64), torch.float16, 64)
    still = Rotation(generator=torch.zeros(1, 120))
    want, got = (folded(x, codecs.dense(weight), (still,), f) for x in ("reference", "numba"))
    assert (got.backend, got.encoded.fingerprint) == ("numba", want.encoded.fingerprint)


def test_a_transposed_weight_and_float64_take_the_tiled_path():
    torch.manual_seed(2)
    for weight in (torch.randn(700, 1024).t().contiguous().t(), torch.randn(700, 1024).double()):
        chain = (Rotation(generator=torch.randn(32, 496) * 0.02),)
        got, want = folded("auto", codecs.dense(weight), chain), folded("reference", codecs.dense(weight), chain)
        assert got.backend == "tiled"
        assert torch.allclose(got.encoded.tensors["weight"], want.encoded.tensors["weight"], rtol=0, atol=2e-6)


# --- double quantisation ----------------------------------------------------------------------------------------------


def test_the_steps_of_double_quantisation_are_bitsandbytes_own():
    """For a million values, and on either side of each step."""
    steps = torch.from_numpy(
        tables.dynamic()[layout.DYNAMIC_STEPS : layout.DYNAMIC_START].copy().view(np.float32)[:255]
    )
    assert steps.isfinite().all()
    edges = [
        steps,
        steps.nextafter(torch.tensor(-2.0)),
        steps.nextafter(torch.tensor(2.0)),
        torch.linspace(-1, 1, 1 << 20),
    ]
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0])
    values = torch.cat([*edges, tiny, torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 1e-3]).clamp(
        -1, 1
    )
    values = torch.cat([torch.nn.functional.pad(part, (1, 0), value=1.0) for part in values.split(4095)])
    theirs, state = bnbf.quantize_blockwise(values, blocksize=4096)
    f = WeightFormat("nf4", (1, 64 * len(values)), blocksize=64, nested_blocksize=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FourBit, "offset_of", lambda *_: torch.zeros(()))
        mine = fold_cpu.quantise_scales(values, f)[0]["absmax"]
    assert torch.equal(mine, theirs)
    assert torch.equal(state.absmax, torch.ones(len(state.absmax)))


@st.composite
def scales_of_blocks(draw: st.DrawFn) -> tuple[torch.Tensor, WeightFormat]:
    count, size = draw(st.integers(1, 3000), "count"), draw(st.sampled_from([64, 128, 256, 1024]), "nested")
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31), "seed"))
    scales = torch.rand(count, generator=gen) + 0.5
    kind = draw(
        st.sampled_from(["", "equal", "zeros", "one large", "tiny", "denormal", "huge", "negative", "parts"]), "kind"
    )
    scales = {
        "": lambda: scales * 0.02,
        "equal": lambda: torch.full_like(scales, 0.1),
        "zeros": lambda: scales.zero_(),
        "one large": lambda: torch.where(torch.arange(count) == count // 2, 1e4, scales),
        "tiny": lambda: scales * 1e-30,
        "denormal": lambda: scales * 1e-39,
        "huge": lambda: scales * 1e34,
        "negative": lambda: scales - 1,
        "parts": lambda: scales * 10.0 ** -(torch.arange(count) // size % 9).float(),
    }[kind]()
    return scales, WeightFormat("nf4", (count, 64), torch.float16, 64, size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scales_of_blocks())
def test_double_quantisation_is_bitsandbytes_own(case):
    scales, f = case
    moments = torch.randn(3, len(scales), generator=torch.Generator().manual_seed(1))
    got, error, held = fold_cpu.quantise_scales(scales, f, moments)
    want = f.kind.statistics(scales, f)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name], tensor), name
    wanted = blockwise.nested_error(f, scales, want, moments.t())
    assert (error, held) == pytest.approx(wanted, rel=1e-9, abs=1e-9 * float(scales.abs().max()) ** 2)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_are_refused_as_by_the_reference():
    f = WeightFormat("nf4", (16, 64), torch.float16, 64)
    encoded = codecs.encode(torch.randn(16, 64), f)
    chain = (quarter_turns(64, 32),)
    for bad in (float("nan"), float("inf")):
        absmax = encoded.tensors["absmax"].clone()
        absmax[3] = bad
        with pytest.raises(NonFiniteError, match="the stored weight holds NaN or infinity"):
            folded("numba", EncodedWeight(f, {**encoded.tensors, "absmax": absmax}), chain)
    with pytest.raises(NonFiniteError, match="the rotated weight holds NaN or infinity"):
        folded(
            "numba",
            codecs.dense(torch.full((16, 64), 3e38)),
            (Rotation(generator=torch.full((2, 496), 0.5), cayley=Cayley(5)),),
        )
    narrow = codecs.dense(torch.full((16, 64), 6e4, dtype=torch.float16))
    with pytest.raises(NonFiniteError, match="not finite in float16"):
        folded("numba", narrow, (replace(chain[0], scale=torch.full((16,), 2.0)),))


def test_a_zero_scale_has_no_inverse():
    rotation = replace(quarter_turns(64, 32), scale=torch.zeros(16))
    with pytest.raises(NonFiniteError, match="oft_s holds a zero"):
        folded("numba", codecs.dense(torch.randn(16, 64)), (rotation,), inverse=True)


# --- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cayley", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize(("n", "b"), [(1, 32), (8, 2), (16, 8), (4, 24), (5, 32), (3, 48), (2, 128), (1, 256), (3, 20)])
def test_blocks_and_their_measures_are_the_reference_ones(n, b, cayley):
    torch.manual_seed(b)
    rotation = Rotation(generator=torch.randn(n, b * (b - 1) // 2) * 0.3 / b**0.5, cayley=cayley)
    wide = kernels._wide(b, n)
    if wide:
        got = kernels._blocks(rotation, wide)
        want = torch.block_diag(*rotation.blocks.expand(max(n, wide // b), b, b))
        assert (torch.block_diag(*got) - want).abs().max() < 1e-13
    defect, angle = kernels.measure(rotation)
    assert defect == pytest.approx(rotation.defect, rel=1e-9, abs=1e-13)
    assert angle == pytest.approx(rotation.angle, rel=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-8, 3.0, 40.0])
def test_measures_of_small_and_large_generators(size):
    torch.manual_seed(3)
    for cayley in MAPS.values():
        rotation = Rotation(generator=torch.randn(4, 496) * size, cayley=cayley)
        assert kernels.measure(rotation) == (
            pytest.approx(rotation.defect, rel=1e-7, abs=1e-12),
            pytest.approx(rotation.angle, rel=1e-7, abs=1e-12),
        )


def test_equal_angles_are_found():
    assert kernels.measure(quarter_turns(64, 32)) == (pytest.approx(0, abs=1e-12), pytest.approx(torch.pi / 2))


# --- which one serves -------------------------------------------------------------------------------------------------


def test_backends_are_visible_and_can_be_forced():
    assert oftsurgery.backends()["numba"] == "ready"
    assert list(oftsurgery.backends()) == ["numba", "triton", "tiled", "reference"]
    model = torch.nn.Sequential(torch.nn.Linear(64, 1024, bias=False))
    adapter = oftsurgery.OFTAdapter(modules={"0": quarter_turns(64, 32)})
    assert oftsurgery.fold(model, adapter).oftsurgery.modules["0"].backend == "numba"
    with oftsurgery.use_backend("reference"):
        assert oftsurgery.backends()["reference"] == "forced"
        record = oftsurgery.fold(model, adapter).oftsurgery
    assert record.modules["0"].backend == "reference"
    assert oftsurgery.FoldRecord.from_dict(record.to_dict()) == record


def test_unknown_and_missing_backends_are_refused():
    with (
        pytest.raises(
            StateError,
            match=r"unknown backend 'cuda'.* Remedy: use for OFTSURGERY_BACKEND one of auto, numba, triton, tiled, reference",
        ),
        kernels.use_backend("cuda"),
    ):
        pass
    if not torch.cuda.is_available():
        with (
            pytest.raises(MissingDependencyError, match="the backend triton is forced, and cannot serve"),
            kernels.use_backend("triton"),
        ):
            pass


FOLD = """
import sys, warnings
{before}
import torch
from oftsurgery import Cayley, Rotation, WeightFormat
from oftsurgery.formats import codecs
from oftsurgery.weights import kernels
from oftsurgery.weights.fold import fold_encoded
torch.manual_seed(0)
f = WeightFormat("nf4", (1030, 1024), torch.float16, 64, 256)
encoded = codecs.encode(torch.randn(1030, 1024) * 0.02, f)
rotation = Rotation(generator=torch.randn(32, 496) * 0.02, cayley=Cayley(5))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    first, second = fold_encoded(encoded, (rotation,)), fold_encoded(encoded, (rotation,))
said = [str(w.message) for w in said if w.category.__name__ == "BackendWarning"]
"""


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("sys.modules['numba'] = None", "numba is not installed"),
        ("sys.modules['llvmlite.binding'] = None", "ModuleNotFoundError: "),
    ],
    ids=["missing", "failing"],
)
def test_a_path_that_cannot_serve_is_told_once_and_replaced(before, reason):
    out = in_process(
        FOLD.format(before=before)
        + "print(len(said), first.backend, second.backend, kernels.backends()['numba'], said[0], sep='|')"
    )
    count, first, second, state, text = out.split("|")
    assert (count, first, second) == ("1", "tiled", "tiled")
    assert reason in state
    assert text.startswith(f"the fast path numba cannot serve ({reason}")
    assert text.endswith("folds go on without it, slower, with the same result")


SAME_CODES = """
import sys, warnings
{before}
import torch
from oftsurgery import Rotation, WeightFormat, rotations
from oftsurgery.formats import codecs
from oftsurgery.weights.fold import fold_encoded
warnings.simplefilter("ignore")  # of a path that cannot serve
gen = torch.Generator().manual_seed(0)
q = torch.zeros(32, 32, 32)
for i in range(0, 32, 2):
    q[:, i, i + 1], q[:, i + 1, i] = -1, 1
turns = Rotation(generator=rotations.vector(q))  # exact in float32: no path has a tie to break
bent = Rotation(generator=torch.randn(32, 496, generator=gen) * 0.02)
for codec, blocksize, nested in [("nf4", 64, 256), ("fp4", 128, 0), ("int8", 0, 0), ("dense", 0, 0)]:
    f = WeightFormat(codec, (1030, 1024), torch.bfloat16 if codec == "dense" else torch.float16, blocksize, nested)
    encoded = codecs.encode(torch.randn(1030, 1024, generator=gen) * 0.02, f)
    exact, near = fold_encoded(encoded, (turns,)), fold_encoded(encoded, (bent,))
    packed = near.encoded.tensors["weight"].contiguous().reshape(-1).view(torch.uint8)
    print(exact.backend, exact.encoded.fingerprint, packed.numpy().tobytes().hex(), f"{{near.error:.4f}}")
"""


def check_same_codes(ways: dict[str, str]) -> None:
    found = {name: [line.split() for line in out.splitlines()] for name, out in ways.items()}
    for name, lines in found.items():
        for (backend, told, codes, error), (_, wanted, wanted_codes, wanted_error) in zip(
            lines, found["reference"], strict=True
        ):
            assert backend == name.partition(",")[0]
            assert told == wanted
            assert error == wanted_error
            pairs = zip(bytes.fromhex(codes), bytes.fromhex(wanted_codes), strict=True)
            differ = sum(a != b for a, b in pairs)
            assert differ <= len(codes) // 2 * (1e-2 if lines.index([backend, told, codes, error]) == 3 else 1e-5)


def test_numba_is_not_needed_for_the_same_codes():
    """In processes of their own: as installed, without numba, and each slower path forced."""
    check_same_codes(
        {
            "numba": in_process(SAME_CODES.format(before="")),
            "tiled": in_process(SAME_CODES.format(before="sys.modules['numba'] = None")),
            "tiled, forced": in_process(SAME_CODES.format(before=""), OFTSURGERY_BACKEND="tiled"),
            "reference": in_process(SAME_CODES.format(before=""), OFTSURGERY_BACKEND="reference"),
        }
    )


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86_64")
@pytest.mark.parametrize(
    ("name", "features"),
    [("x86-64", "+sse2"), ("generic", ""), ("haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2")],
)
def test_a_processor_without_avx512_gives_the_same_codes(name, features, tmp_path):
    """The kernel compiled for older processors, which this one runs as well."""
    older = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    ways = {"numba": in_process(SAME_CODES.format(before=""), **older)}
    reference = in_process(SAME_CODES.format(before=""), OFTSURGERY_BACKEND="reference")
    check_same_codes({**ways, "reference": reference})
    scales = in_process(BETTER_SCALES, **older).splitlines()
    wanted = in_process(BETTER_SCALES, OFTSURGERY_BACKEND="reference").splitlines()
    assert len(scales) == len(wanted) == 4
    for mine, theirs in zip(scales, wanted, strict=True):
        assert mine.split()[0] == "numba"
        assert [float(x) for x in mine.split()[1:]] == pytest.approx([float(x) for x in theirs.split()[1:]], rel=1e-5)


BETTER_SCALES = """
import torch
from oftsurgery import Rotation, WeightFormat
from oftsurgery.formats import codecs
from oftsurgery.weights.fold import fold_encoded
gen = torch.Generator().manual_seed(0)
weight = torch.randn(64, 1024, generator=gen) * 0.02
bent = Rotation(generator=torch.randn(32, 496, generator=gen) * 0.02)
for codec, nested in [("nf4", 256), ("fp4", 0)]:
    encoded = codecs.encode(weight, WeightFormat(codec, (64, 1024), blocksize=64, nested_blocksize=nested))
    for rounding in ("grid", "mse"):
        got = fold_encoded(encoded, (bent,), rounding=rounding)
        print(got.backend, got.error, got.nearest, got.rho)
"""


def test_any_number_of_threads_gives_the_same_bytes():
    code = (
        FOLD.format(before="") + "print(first.backend, first.encoded.fingerprint, first.error, torch.get_num_threads())"
    )
    one, two = (in_process(code, OMP_NUM_THREADS=n).split() for n in "12")
    assert one[:3] == two[:3]
    assert (one[0], one[3], two[3]) == ("numba", "1", "2")


STARTED = """
    import contextvars, threading
    from oftsurgery.weights.kernels import pool
    done, threads, said = [], set(), contextvars.ContextVar("said")
    def note(name):
        done.append(name)
        threads.add(threading.get_ident())
    said.set("here")
    # what was started runs tasks of its own, and so does this thread
    def work():
        pool.run(note, 20)
        return said.get()
    results = [pool.start(work) for _ in range(3)]
    pool.run(note, 20)
    print(*[result() for result in results], len(done), end=" ")
    def fail():
        raise ValueError("told")
    result = pool.start(fail)
    try:
        result()
    except ValueError as error:
        print(error, end=" ")
    print(pool.threads(), len(threads) <= pool.threads())
"""


@pytest.mark.parametrize("threads", "12")
def test_work_that_is_started_before_other_work(threads):
    assert in_process(STARTED, OMP_NUM_THREADS=threads) == f"here here here 80 told {threads} True"


def test_importing_the_package_imports_neither_torch_nor_a_compiler():
    heavy = ["torch", "numba", "triton", "bitsandbytes", "peft", "transformers"]
    assert in_process(f"import sys, oftsurgery; print([m for m in {heavy} if m in sys.modules])") == "[]"
    assert (
        in_process(f"import sys, oftsurgery; oftsurgery.fold; print([m for m in {heavy} if m in sys.modules])")
        == "['torch']"
    )


def test_every_public_name_is_there():
    assert set(oftsurgery.__all__) <= set(dir(oftsurgery))
    assert all(getattr(oftsurgery, name) is not None for name in oftsurgery.__all__)
    with pytest.raises(AttributeError, match="module 'oftsurgery' has no attribute 'merge'"):
        oftsurgery.merge  # noqa: B018


def test_the_environment_forces_a_backend():
    assert (
        in_process(FOLD.format(before="") + "print(first.backend, len(said))", OFTSURGERY_BACKEND="reference")
        == "reference 0"
    )


TRITON = """
import warnings
import torch
# numpy's, which the interpreter computes with, where 127/scb overflows; a GPU says nothing
warnings.filterwarnings("ignore", "(overflow|invalid value) encountered", RuntimeWarning)
from oftsurgery import Cayley, Rotation, WeightFormat
from oftsurgery.formats import codecs
from oftsurgery.weights import kernels
from oftsurgery.weights.fold import fold_encoded
torch.manual_seed(0)
for codec, shape, b, blocksize, nested, special in [
    ("nf4", (37, 128), 32, 64, 0, 1), ("nf4", (20, 128), 64, 64, 256, 1), ("fp4", (20, 128), 2, 128, 0, 1), ("nf4", (20, 64), 32, 64, 0, 1e36),
    ("nf4", (20, 64), 32, 64, 0, 0), ("nf4", (20, 64), 32, 64, 0, 1e-38), ("int8", (37, 64), 32, 0, 0, 1), ("int8", (20, 64), 32, 0, 0, 0),
    ("int8", (20, 64), 32, 0, 0, 1e-38),
    ("dense", (20, 64), 32, 0, 0, 1),
]:
    f = WeightFormat(codec, shape, torch.float16, blocksize, nested)
    weight = torch.randn(shape) * 0.02
    weight[: shape[0] // 2] *= special if codec != "dense" else 1
    encoded = codecs.encode(weight.to({device!r}), f)
    q = torch.zeros(shape[1] // b, b, b)
    for i in range(0, b - 1, 2):
        q[:, i, i + 1], q[:, i + 1, i] = -1, 1
    from oftsurgery import rotations
    chain = (Rotation(generator=rotations.vector(q), scale=torch.ones(shape[0]) * 2 if special == 1 else None),)
    result = []
    for backend in ("reference", "triton"):
        with kernels.use_backend(backend):
            result.append(fold_encoded(encoded, chain))
    want, got = result
    assert got.backend == "triton", codec
    assert got.encoded.tensors["weight"].device == encoded.tensors["weight"].device
    assert all(torch.equal(t, got.encoded.tensors[k]) for k, t in want.encoded.tensors.items()), (codec, special)
    assert abs(got.error - want.error) <= 1e-5 * want.error + 3e-7, (got.error, want.error)
    weight = torch.randn(shape) * 0.02
    chain = (Rotation(generator=torch.randn(1, 496 if b == 32 else b * (b - 1) // 2) * 0.02, cayley=Cayley(5)),)
    encoded = codecs.encode(weight.to({device!r}), f)
    result = []
    for backend in ("reference", "triton"):
        with kernels.use_backend(backend):
            result.append(fold_encoded(encoded, chain))
    want, got = result
    assert got.backend == "triton"
    differ = int((want.encoded.tensors["weight"] != got.encoded.tensors["weight"]).sum())
    assert differ <= (2 if codec != "dense" else weight.numel() // 50), (codec, differ)
    assert abs(got.error - want.error) <= 1e-3 * want.error + 3e-7
print("same")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_triton_kernel_gives_the_reference_result_in_its_interpreter():
    assert in_process(TRITON.format(device="cpu"), TRITON_INTERPRET="1").endswith("same")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_triton_kernel_gives_the_reference_result_on_a_gpu():
    assert in_process(TRITON.format(device="cuda")).endswith("same")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("backend", "features"), [("numba", 4096), ("tiled", 4096), ("numba", 4128)])
def test_peak_memory_is_a_tile_a_thread_above_input_and_output(backend, features):
    code = f"""
    import torch
    from oftsurgery import EncodedWeight, Rotation, WeightFormat
    from oftsurgery.formats import codecs
    from oftsurgery.weights import kernels
    from oftsurgery.weights.fold import fold_encoded
    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
    def fold(rows):
        n = rows * {features}
        tensors = {{"weight": torch.randint(0, 256, (n // 2, 1), dtype=torch.uint8), "absmax": torch.rand(n // 64) * 0.01}}
        encoded = EncodedWeight(WeightFormat("nf4", (rows, {features}), torch.float16, 64), tensors)
        rotation = Rotation(generator=torch.randn({features} // 32, 496) * 0.02)
        before = peak()
        with kernels.use_backend({backend!r}):
            result = fold_encoded(encoded, (rotation,))
        assert result.backend == {backend!r}
        return peak() - before - sum(t.nbytes for t in result.encoded.tensors.values())
    fold(64 if {backend!r} == "numba" else 1024)
    print(fold(8192) / 2**20 / torch.get_num_threads())
    """
    assert float(in_process(code)) <= 64
