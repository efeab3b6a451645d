"""What the Triton kernel keeps of a rotation, in its interpreter, against the readable reference."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_kernels import in_process

FORMATS = {
    "nf4": ("nf4", 64, 0),
    "nf4, nested": ("nf4", 64, 256),
    "fp4": ("fp4", 64, 0),
    "fp4, nested": ("fp4", 128, 256),
    "int8": ("int8", 0, 0),
}
by_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)

#: ``check`` folds by both; the figures of Triton's result are the reference's, and its codes but on a midpoint
BEGIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
import pytest
import torch
from test_kernels import codes_of, exact
from oftsurgery import Cayley, Rotation, WeightFormat
from oftsurgery.formats import codecs
from oftsurgery.weights import kernels
from oftsurgery.weights.kernels import tiled
from oftsurgery.weights.fold import fold_encoded

gen = torch.Generator().manual_seed(0)
def weight_of(f):
    return torch.randn(f.shape, generator=gen) * 0.02
def format_of(codec, blocksize, nested, shape=(37, 128)):
    return WeightFormat(codec, shape, torch.float16, blocksize, nested)
def chain_of(amplitude, features=128, b=32, scale=None):
    generator = torch.randn(features // b, b * (b - 1) // 2, generator=gen) * amplitude
    return (Rotation(generator=generator, cayley=Cayley(5), scale=scale),)
def check(encoded, chain, into=None, rounding="preserve", inverse=False, backend="triton"):
    results = []
    for name in ("reference", "triton"):
        with kernels.use_backend(name):
            results.append(fold_encoded(encoded, chain, into, rounding, inverse=inverse))
    want, got = results
    assert got.backend == backend
    assert (got.rounding, got.relaxation, got.encoded.format) == (want.rounding, want.relaxation, want.encoded.format)
    for name in ("error", "rho", "kept", "change"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-4, abs=3e-7), name
    assert got.encoded.tensors.keys() == want.encoded.tensors.keys()
    if want.rounding != "preserve":
        return got
    assert all(torch.equal(t, got.encoded.tensors[k]) for k, t in want.encoded.tensors.items() if k != "weight")
    mine, theirs = codes_of(got.encoded), codes_of(want.encoded)
    differ = (mine != theirs).nonzero().reshape(-1)
    assert len(differ) <= 2 and ((mine - theirs).abs() <= 1).all()
    if backend == "triton":
        base = codecs.decode(encoded).double()
        target = base + (exact(encoded, chain, inverse=inverse) - base) * want.relaxation
        grid = codecs.grid_of(want.encoded)
        at = target.reshape(-1)[differ] / grid.scales[differ // grid.blocksize]
        assert ((at.unsqueeze(-1) - grid.bounds).abs() < 2e-5).any(-1).all()
    return got
"""


def run(code: str) -> None:
    assert in_process(f"{BEGIN}\n{code}\nprint('same')", TRITON_INTERPRET="1") == "same"


@by_format
def test_a_weak_change_is_kept_as_by_the_reference(form):
    run(f"""
f = format_of(*{form})
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


@by_format
def test_blocks_of_zeros_stay_zeros(form):
    run(f"""
f = format_of(*{form})
weight = weight_of(f)
weight[3], weight[30:] = 0, 0
got = check(codecs.encode(weight, f), chain_of(0.0005))
assert got.rounding == "preserve"
assert not codecs.decode(got.encoded)[weight == 0].any()
""")


@by_format
def test_a_weight_with_a_strong_block_is_left_to_the_tiles(form):
    run(f"""
tiled._TILE_WEIGHTS = 1 << 11  # else a weight of this size is the reference's
f = format_of(*{form})
for factor in (1.15, 0.6):  # larger than the scale holds, and only far from the base
    scale = torch.ones(37)
    scale[5] = factor
    got = check(codecs.encode(weight_of(f), f), chain_of(0.0005, scale=scale), backend="tiled")
    assert got.rounding == "preserve"
""")


def test_double_quantisation_can_be_left_out():
    run("""
f = format_of("nf4", 64, 256)
got = check(codecs.encode(weight_of(f), f), chain_of(0.0005), replace(f, nested_blocksize=0))
assert got.rounding == "preserve"
""")


def test_where_scales_cannot_be_kept_int8_is_rounded_to_nearest_and_4_bits_by_the_tiles():
    run("""
tiled._TILE_WEIGHTS = 1 << 11
nf4, int8 = format_of("nf4", 64, 0), format_of("int8", 0, 0)
encoded = codecs.encode(weight_of(nf4), nf4)
assert check(encoded, chain_of(0.0005), int8).rounding == "nearest"
assert check(encoded, chain_of(0.0005), format_of("fp4", 64, 0), backend="tiled").rounding == "grid"
assert check(encoded, chain_of(0.05), backend="tiled").rounding == "grid"
""")


def test_the_base_is_left_as_it_was():
    run("""
for f in (format_of("nf4", 64, 256), format_of("fp4", 64, 0), format_of("int8", 0, 0)):
    encoded = codecs.encode(weight_of(f), f)
    before = encoded.fingerprint
    got = check(encoded, chain_of(0.0005))
    for name, tensor in got.encoded.tensors.items():
        tensor.zero_()
    assert encoded.fingerprint == before
""")


def test_what_nearest_rounding_keeps_is_measured():
    run(f"""
for codec, blocksize, nested in {[*FORMATS.values()]}:
    for amplitude in (0.002, 0.02):
        f = format_of(codec, blocksize, nested)
        check(codecs.encode(weight_of(f), f), chain_of(amplitude), rounding="nearest")
for dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off, where a GPU rounds
    got = check(codecs.dense(weight_of(format_of("int8", 0, 0)).to(dtype)), chain_of(0.002))
    assert got.kept == pytest.approx(1, abs=1e-3)
""")
