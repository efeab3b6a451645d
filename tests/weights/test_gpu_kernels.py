"""The Triton kernels, in their interpreter and on a GPU, against the readable reference: what is kept, the grid, double quantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backends import in_process

FORMATS = {
    "nf4": ("nf4", 64, 0),
    "nf4, nested": ("nf4", 64, 256),
    "fp4": ("fp4", 64, 0),
    "fp4, nested": ("fp4", 128, 256),
    "int8": ("int8", 0, 0),
}

#: ``check`` folds by both; the figures of Triton's result are the reference's, and its codes but on a midpoint
BEGIN = f"""
import sys, warnings
# numpy's, which the interpreter computes with, where a reciprocal overflows; a GPU says nothing
warnings.filterwarnings("ignore", "(overflow|invalid value) encountered", RuntimeWarning)
sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
from dataclasses import replace
import pytest
import torch
from backends import codes_of, exact
from oftsurgery import Cayley, EncodedWeight, Rotation, WeightFormat
from oftsurgery.formats import codecs
from oftsurgery.weights import kernels
from oftsurgery.weights.fold import fold_encoded

where = "DEVICE"
def moved(encoded, device):
    return EncodedWeight(encoded.format, dict((k, t.to(device)) for k, t in encoded.tensors.items()))

gen = torch.Generator().manual_seed(0)
def weight_of(f):
    return torch.randn(f.shape, generator=gen) * 0.02
def format_of(codec, blocksize, nested, shape=(37, 128)):
    return WeightFormat(codec, shape, torch.float16, blocksize, nested)
def chain_of(amplitude, features=128, b=32, scale=None):
    generator = torch.randn(features // b, b * (b - 1) // 2, generator=gen) * amplitude
    return (Rotation(generator=generator, cayley=Cayley(5), scale=scale),)
def check(encoded, chain, into=None, rounding="preserve", inverse=False, strong=0):
    results = []
    for name, device in (("reference", "cpu"), ("triton", where)):
        with kernels.use_backend(name):
            results.append(fold_encoded(moved(encoded, device), chain, into, rounding, inverse=inverse))
    want, got = results
    assert all(t.device.type == where for t in got.encoded.tensors.values())
    got = replace(got, encoded=got.encoded.cpu())
    assert got.backend == "triton"
    assert (got.rounding, got.relaxation, got.encoded.format) == (want.rounding, want.relaxation, want.encoded.format)
    for name in ("error", "rho", "kept", "change"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-4, abs=3e-7), name
    assert got.encoded.tensors.keys() == want.encoded.tensors.keys()
    if not want.encoded.format.quantised:
        return got
    scales, wanted = got.encoded.scales, want.encoded.scales
    if strong or want.rounding == "grid":  # the last bits of a fitted scale depend on the order of a sum
        # double quantisation may leave small differences of large numbers
        nested = bool(want.encoded.format.nested_blocksize) * 1e-6 * float(wanted.abs().max())
        assert torch.allclose(scales, wanted, rtol=1e-5, atol=nested)
        assert not strong or int((scales != codecs.grid_of(encoded).scales).sum()) == strong
    else:
        for name, tensor in want.encoded.tensors.items():
            if name == "absmax" and want.rounding == "nearest" and (where, tensor.dtype) == ("cuda", torch.uint8):
                # on a GPU bitsandbytes multiplies by a reciprocal that is rounded otherwise: a value on a step may have another code
                assert int((got.encoded.tensors[name] != tensor).sum()) <= max(1, len(tensor) // 50)
            else:
                assert name == "weight" or torch.equal(tensor, got.encoded.tensors[name]), name
    mine, theirs = codes_of(got.encoded), codes_of(want.encoded)
    differ = (mine != theirs).nonzero().reshape(-1)
    assert len(differ) <= 2 and ((mine - theirs).abs() <= 1).all()
    base = codecs.decode(encoded).double()
    targets = [base + (exact(encoded, chain, inverse=inverse) - base) * omega for omega in (want.relaxation, 1.0)]
    grid = codecs.grid_of(want.encoded)
    at = torch.stack([t.reshape(-1)[differ] / grid.scales[differ // grid.blocksize] for t in targets], -1)
    assert ((at.unsqueeze(-1) - grid.bounds).abs() < 2e-5).flatten(1).any(-1).all()
    return got
"""


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


# the interpreter takes a minute and a half in all; tests/weights/test_kernels.py has a test of it that is not slow
@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=on_a_gpu)])
def run(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Run code that ends without an error in a process of its own: in the interpreter, or on a GPU."""
    device = request.param

    def run(code: str) -> None:
        environment = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
        begin = BEGIN.replace("DEVICE", device)
        assert in_process(f"{begin}\n{code}\nprint('same')", **environment) == "same"

    return run


def test_a_weak_change_is_kept_as_by_the_reference(run):
    run(f"""
for form in {[*FORMATS.values()]}:
    f = format_of(*form)
    for amplitude in (0.0005, 0.002):
        weak = f.codec != "int8" or amplitude == 0.0005
        for inverse in (False, True):
            got = check(codecs.encode(weight_of(f), f), chain_of(amplitude), inverse=inverse)
            assert (got.rounding, got.relaxation > 1) == (("preserve", True) if weak else ("nearest", False))
            assert abs(got.kept - 1) < 0.05
    scaled = chain_of(0.0003, b=64, scale=1 + 0.002 * torch.rand(37, generator=gen))
    assert check(codecs.encode(weight_of(f), f), scaled).rounding == "preserve"
    shared = (replace(chain_of(0.0005)[0], generator=chain_of(0.0005)[0].generator[:1]),)
    assert check(codecs.encode(weight_of(f), f), shared).rounding == "preserve"
""")


def test_blocks_of_zeros_stay_zeros(run):
    run(f"""
for form in {[*FORMATS.values()]}:
    f = format_of(*form)
    weight = weight_of(f)
    weight[3], weight[30:] = 0, 0
    got = check(codecs.encode(weight, f), chain_of(0.0005))
    assert got.rounding == "preserve"
    assert not codecs.decode(got.encoded)[weight == 0].any()
""")


def test_strong_blocks_are_scaled_anew_as_by_the_reference(run):
    run(f"""
for form in {[*FORMATS.values()]}:
    f = format_of(*form)
    for factor in (1.15, 0.6):  # larger than the scale holds, and only far from the base
        scale = torch.ones(37)
        scale[5] = factor
        got = check(codecs.encode(weight_of(f), f), chain_of(0.0005, scale=scale), strong=1 if f.codec == "int8" else 128 // f.blocksize)
        assert got.rounding == "preserve"
""")


def test_statistics_of_the_base_that_would_clip_a_strong_block_are_made_anew(run):
    run("""
f = format_of("nf4", 64, 256)
scale = torch.ones(37)
scale[5] = 4
assert check(codecs.encode(weight_of(f), f), chain_of(0.0005, scale=scale)).rounding == "grid"
""")


def test_the_grid_finds_the_scales_of_the_reference(run):
    run(f"""
for form in {[form for name, form in FORMATS.items() if name != "int8"]}:
    f = format_of(*form, shape=(20, 128))
    for special in (1, 0, 1e-39, 1e36):
        weight = weight_of(f)
        weight[:9] *= special
        check(codecs.encode(weight, f), chain_of(0.02), rounding="grid")
""")


def test_double_quantisation_can_be_left_out(run):
    run("""
f = format_of("nf4", 64, 256)
got = check(codecs.encode(weight_of(f), f), chain_of(0.0005), replace(f, nested_blocksize=0))
assert got.rounding == "preserve"
""")


def test_where_scales_cannot_be_kept_int8_is_rounded_to_nearest_and_4_bits_by_the_grid(run):
    run("""
nf4, int8 = format_of("nf4", 64, 0), format_of("int8", 0, 0)
encoded = codecs.encode(weight_of(nf4), nf4)
assert check(encoded, chain_of(0.0005), int8).rounding == "nearest"
assert check(encoded, chain_of(0.0005), format_of("fp4", 64, 0)).rounding == "grid"
assert check(encoded, chain_of(0.05)).rounding == "grid"
""")


def test_the_base_is_left_as_it_was(run):
    run("""
for f in (format_of("nf4", 64, 256), format_of("fp4", 64, 0), format_of("int8", 0, 0)):
    encoded = codecs.encode(weight_of(f), f)
    there = moved(encoded, where)
    with kernels.use_backend("triton"):
        got = fold_encoded(there, chain_of(0.0005), None, "preserve")
    for name, tensor in got.encoded.tensors.items():
        tensor.zero_()
    assert there.fingerprint == encoded.fingerprint
""")


def test_what_nearest_rounding_keeps_is_measured(run):
    run(f"""
for codec, blocksize, nested in {[*FORMATS.values()]}:
    for amplitude in (0.002, 0.02):
        f = format_of(codec, blocksize, nested)
        check(codecs.encode(weight_of(f), f), chain_of(amplitude), rounding="nearest")
for dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off, where a GPU rounds
    got = check(codecs.dense(weight_of(format_of("int8", 0, 0)).to(dtype)), chain_of(0.002))
    assert got.kept == pytest.approx(1, abs=1e-3)
""")


def test_double_quantisation_is_the_references(run):
    run("""
from oftsurgery.weights.kernels import blockwise
from oftsurgery.weights.kernels.fold_gpu import _Nested
for count, size in ((1, 64), (700, 256), (2049, 1024), (300, 4096)):
    scales = torch.rand(count, generator=gen) + 0.5
    moments = torch.randn(count, 3, generator=gen)
    kinds = [scales * 0.02, torch.full_like(scales, 0.1), torch.zeros(count), scales * 1e-30, scales * 1e-39, scales * 1e34, scales - 1,
             torch.where(torch.arange(count) == count // 2, 1e4, scales)]
    for number, scales in enumerate(kinds):
        f = WeightFormat("nf4", (count, 64), torch.float16, 64, size)
        scales, moments = scales.to(where), moments.to(where)
        got, want = _Nested(scales, f, moments), f.kind.statistics(scales, f)
        cost = got.read(got.numbers.tolist())
        assert got.statistics.keys() == want.keys()
        for name, tensor in want.items():
            assert (got.statistics[name].dtype, got.statistics[name].shape) == (tensor.dtype, tensor.shape)
            # on a GPU bitsandbytes multiplies by a reciprocal that is rounded otherwise: a value on a step may have another code
            other = int((got.statistics[name] != tensor).sum())
            assert other <= (count // 100 if (name, where) == ("absmax", "cuda") else 0), (name, number, size)
        wanted = blockwise.nested_error(f, scales, got.statistics, moments)
        assert cost == pytest.approx(wanted, rel=1e-9, abs=1e-9 * float(scales.abs().max()) ** 2)
""")


def test_a_sweep_is_the_references(run):
    run("""
from oftsurgery.formats.codecs import Grid
from oftsurgery.weights import sweep

for f in (format_of("nf4", 64, 0), format_of("fp4", 64, 0), format_of("int8", 0, 0)):
    grid = codecs.grid_of(moved(codecs.encode(weight_of(f), f), where))
    for columns, rows in ((128, 40), (37, 16), (1, 3)):
        exact = torch.randn(columns, rows, generator=gen)
        scales = 0.5 + torch.rand(columns, rows, generator=gen)
        scales[0, 0] = 0
        matrix = torch.randn(columns, columns, generator=gen) * 0.05
        found = {}
        for name, device in (("reference", "cpu"), ("triton", where)):
            on = Grid(grid.levels.to(device), grid.bounds.to(device), grid.scales, grid.blocksize)
            points = exact.clone().to(device)
            with kernels.use_backend(name):
                numbers = sweep.sweep(on, points, scales.to(device), matrix.to(device), (exact * 0.9).to(device))
            assert numbers.dtype == torch.int32
            assert name == "reference" or not kernels._broken
            found[name] = numbers.cpu(), points.cpu()
        # a code on a bound changes what follows in its row
        same = (found["reference"][0] == found["triton"][0]).all(0)
        assert same.float().mean() > 0.9, f
        got, want = (found[name][1][:, same] for name in ("triton", "reference"))
        assert torch.allclose(got, want, rtol=0, atol=1e-5)
""")
