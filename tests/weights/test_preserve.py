"""Rounding that keeps what a rotation did: against a float64 reference of our own and brute force, on every path.

Nothing here takes an expected value from oftsurgery.weights.preserve: levels are bitsandbytes', rotations those of
`independent`, and rounding, scales and sums are written out below.
"""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from backends import in_process
from checkpoints import adapted, bnb_config, build, load, quiet_fold, quiet_transformers
from independent import VARIANTS, cayley, fold, make_case, make_layer, relative, seeded, skew, stored_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import oftsurgery
from oftsurgery import EncodedWeight, NonFiniteError, OFTAdapter, Rotation, WeightFormat, use_backend
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.checks.doctor import doctor
from oftsurgery.checks.findings import Finding
from oftsurgery.formats import codecs
from oftsurgery.formats.packages.stored import Grid
from oftsurgery.formats.scales import GRID
from oftsurgery.records.record import FoldRecord, ModuleRecord
from oftsurgery.stores.layers import Layer
from oftsurgery.weights import preserve
from oftsurgery.weights.fold import fold_encoded
from oftsurgery.weights.kernels.blockwise import FoldedWeight

# --- the reference ----------------------------------------------------------------------------------------------------

#: by code, float64
BY_CODE = {codec: bnbf.get_4bit_type(codec, device="cpu").double() for codec in ("nf4", "fp4")}
#: ascending, FP4's two zeros as one
LEVELS = {codec: table.unique() for codec, table in BY_CODE.items()} | {
    "int8": torch.arange(-127, 128, dtype=torch.float64) / 127
}
BOUNDS = {codec: (levels[1:] + levels[:-1]) / 2 for codec, levels in LEVELS.items()}
#: what preserve.py says of the blocks that it calls strong: the root mean square of their change, in units of the scale
STRONG = {"nf4": 1 / 15, "fp4": 1 / 9, "int8": 1 / 254}


@dataclass(frozen=True, eq=False)
class Stored:
    """What an encoded weight stands for, float64: its values, and in units of their scales, flat."""

    values: Tensor  #: (out, in)
    levels: Tensor  #: (n,)
    scales: Tensor  #: one a block
    each: Tensor  #: the scale of each weight, (n,)
    size: int


def scales_in(encoded: EncodedWeight) -> Tensor:
    t, f = encoded.tensors, encoded.format
    if f.codec == "int8":
        return t["SCB"].reshape(-1).double()
    if not f.nested_blocksize:
        return t["absmax"].reshape(-1).double()
    block = torch.arange(t["absmax"].numel()) // f.nested_blocksize
    table = t["nested_quant_map"].double()[t["absmax"].reshape(-1).long()]
    return table * t["nested_absmax"].reshape(-1).double()[block] + t["nested_offset"].double()


def read(encoded: EncodedWeight) -> Stored:
    f, weight, scales = encoded.format, encoded.tensors["weight"], scales_in(encoded)
    n = math.prod(f.shape)
    if f.codec == "int8":
        levels = weight.double().reshape(-1) / 127
    else:
        byte = weight.contiguous().reshape(-1).view(torch.uint8).long()
        levels = BY_CODE[f.codec][torch.stack([byte >> 4, byte & 15], 1).reshape(-1)[:n]]
    size = f.blocksize or f.shape[1]
    each = scales[torch.arange(n) // size]
    return Stored((levels * each).reshape(f.shape), levels, scales, each, size)


def nearest(scaled: Tensor, codec: str) -> Tensor:
    return LEVELS[codec][torch.bucketize(scaled, BOUNDS[codec])]


def over_relaxed(base: Stored, exact: Tensor, relaxation: float, each: Tensor | None = None) -> Tensor:
    """The change over-relaxed, in units of the base's own scales (or ``each``), flat; 0 where those are 0."""
    each = base.each if each is None else each
    target = (base.values + (exact - base.values) * relaxation).reshape(-1)
    return torch.where(each != 0, target / each, 0.0)


def kept_in(stored: Tensor, base: Tensor, exact: Tensor) -> float:
    change = exact - base
    return float(((stored - base) * change).sum() / change.square().sum())


def assert_nearest(got: Tensor, scaled: Tensor, codec: str) -> None:
    """Each of ``got`` is the level nearest to ``scaled``; ties are counted, and must be ties."""
    bounds = BOUNDS[codec]
    differ = (got != nearest(scaled, codec)).nonzero().reshape(-1)
    assert len(differ) <= 1 + got.numel() // 10_000
    at = scaled[differ]
    assert bool(((at.unsqueeze(-1) - bounds).abs().amin(-1) < 1e-5).all())
    between = torch.searchsorted(LEVELS[codec], at)
    assert bool(((LEVELS[codec][between] == got[differ]) | (LEVELS[codec][between - 1] == got[differ])).all())


def assert_same_statistics(got: EncodedWeight, base: EncodedWeight) -> None:
    """All but the codes, to the bit."""
    names = set(base.tensors) - {"weight"}
    assert set(got.tensors) - {"weight"} == names
    for name in names:
        a, b = got.tensors[name], base.tensors[name]
        assert (a.dtype, a.reshape(-1).tolist()) == (b.dtype, b.reshape(-1).tolist()), name


def assert_same(got: EncodedWeight, want: EncodedWeight) -> None:
    assert got.format == want.format
    assert_same_statistics(got, want)
    assert (
        got.tensors["weight"]
        .contiguous()
        .view(torch.uint8)
        .equal(want.tensors["weight"].contiguous().view(torch.uint8))
    )


def turned(
    features: int, b: int, amplitude: float | Tensor, *, seed: object = 0, **more: Any
) -> tuple[Rotation, Tensor]:
    """A rotation of the inputs, or of the rows, and R in float64; ``amplitude``: one, or one a block."""
    n = features // b
    rows = torch.randn(n, b * (b - 1) // 2, generator=seeded(features, b, seed))
    rows = rows * torch.as_tensor(amplitude, dtype=torch.float32).expand(n).unsqueeze(1)
    return Rotation(generator=rows, shared=False, **more), torch.block_diag(*cayley(skew(rows, b)))


def weight_of(f: WeightFormat, *, seed: object = 0) -> Tensor:
    return torch.randn(f.shape, generator=seeded(f.shape, seed)) * 0.02


def preserved(encoded: EncodedWeight, rotation: Rotation, into: WeightFormat | None = None) -> FoldedWeight:
    return fold_encoded(encoded, (rotation,), into, "preserve")


def form(
    codec: str, shape: tuple[int, int] = (64, 256), *, nested: bool = False, size: int = 64, **more: Any
) -> WeightFormat:
    blocks = {"blocksize": size, "nested_blocksize": 256 * nested} if codec != "int8" else {}
    return WeightFormat(codec, shape, **{"dtype": torch.float16, **blocks, **more})


#: name → (codec, double quantisation)
KINDS = {
    "nf4": ("nf4", False),
    "nf4, nested": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4, nested": ("fp4", True),
    "int8": ("int8", False),
}
by_kind = pytest.mark.parametrize("kind", KINDS)
#: generators that change a weight of unit variance by much less than a step
WEAK = {"nf4": 0.002, "fp4": 0.002, "int8": 0.0004}


def form_of(kind: str, shape: tuple[int, int] = (64, 256), **more: Any) -> WeightFormat:
    codec, nested = KINDS[kind]
    return form(codec, shape, nested=nested, **more)


#: and that of a few weights, whose largest is not much larger than the others
TINY = {"nf4": 0.003, "fp4": 0.003, "int8": 0.0002}


# --- 1. optimality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 10), (2, 5)], ids=["a row", "two rows"])
@pytest.mark.parametrize("codec", ["nf4", "fp4", "int8"])
def test_no_choice_of_levels_that_keeps_as_much_errs_less(codec: str, shape: tuple[int, int], seed: int) -> None:
    """All choices, up to 4¹⁰, of the level behind the base's, the base's own, the next one and one beyond that."""
    f = form(codec, shape)
    encoded = codecs.encode(weight_of(f, seed=seed), f)
    rotation, r = turned(shape[1], shape[1], TINY[codec] * (1 + seed % 3), seed=seed)
    folded = preserved(encoded, rotation)
    assert folded.rounding == "preserve"
    base, got = read(encoded), read(folded.encoded)
    exact = base.values @ r.T
    change, levels = (exact - base.values).reshape(-1), LEVELS[codec]
    rank = torch.searchsorted(levels, base.levels - 1e-9)
    error, held = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for i in range(10):
        ahead = 1 if change[i] > 0 else -1
        taken = int(torch.searchsorted(levels, got.levels[i] - 1e-9))
        beyond = taken + ahead if taken == rank[i] + ahead else taken
        choices = {min(max(k, 0), len(levels) - 1) for k in (*(int(rank[i]) + ahead * k for k in (-1, 0, 1)), beyond)}
        values = levels[sorted(choices)] * base.each[i]
        assert taken in choices
        wanted, own = exact.reshape(-1)[i], base.values.reshape(-1)[i]
        error = (error.unsqueeze(-1) + (values - wanted).square()).reshape(-1)
        held = (held.unsqueeze(-1) + (values - own) * change[i]).reshape(-1)
    mine = float((got.values - exact).square().sum())
    enough = held >= float(((got.values - base.values).reshape(-1) * change).sum()) - 1e-12
    assert enough.any()
    assert not enough.all()
    assert float(error[enough].min()) >= mine * (1 - 1e-6) - 1e-12


@pytest.mark.parametrize("backend", ["auto", "reference"])
@by_kind
def test_the_relaxation_is_the_one_that_keeps_the_change_best(kind: str, backend: str) -> None:
    """Of all 32769 that there are."""
    f = form_of(kind, (4, 64))
    encoded = codecs.encode(weight_of(f), f)
    rotation, r = turned(64, 16, WEAK[f.codec])
    with use_backend(backend):
        folded = preserved(encoded, rotation)
    steps = math.log2(folded.relaxation) * 2048
    assert folded.relaxation > 1.2
    assert steps == pytest.approx(round(steps), abs=1e-6)
    base = read(encoded)
    exact = base.values @ r.T
    change = (exact - base.values).reshape(-1)
    kept = []
    for part in torch.split(2.0 ** (torch.arange(16 * 2048 + 1, dtype=torch.float64) / 2048), 4096):
        scaled = base.levels + change / base.each * part.unsqueeze(-1)
        kept.append((nearest(scaled, f.codec) - base.levels) * base.each @ change / change.square().sum())
    found = torch.cat(kept)
    assert float(found.diff().min()) > -1e-9
    assert float((found[round(steps)] - 1).abs()) <= float((found - 1).abs().min()) + 1e-6


# --- 2. codes and scales ----------------------------------------------------------------------------------------------

#: name → (format, b)
FORMATS: dict[str, tuple[WeightFormat, int]] = {
    **{kind: (form_of(kind, (80, 192)), 16) for kind in KINDS},
    "nf4, blocks of 128": (form("nf4", (80, 256), size=128), 32),
    "fp4, nested, blocks of 128": (form("fp4", (80, 256), nested=True, size=128), 64),
    "nf4, one block of 4096": (form("nf4", (48, 256), size=4096), 64),
    "nf4, blocks over rows": (form("nf4", (77, 96)), 32),
    "nf4, nested, blocks over rows": (form("nf4", (78, 96), nested=True), 16),
    "fp4, blocks over rows": (form("fp4", (77, 96), size=128), 48),
    "nf4, a short last block": (form("nf4", (101, 48), size=128), 16),
    "nf4, odd": (form("nf4", (37, 51)), 17),
    "fp4, nested, odd": (form("fp4", (93, 99), nested=True), 9),
    "int8, odd": (form("int8", (37, 45)), 9),
    "nf4, of bfloat16": (form("nf4", (64, 128), dtype=torch.bfloat16), 16),
    "nf4, nested, of float32": (form("nf4", (64, 128), nested=True, dtype=torch.float32), 16),
    "nf4, held as bfloat16": (form("nf4", (64, 128), storage=torch.bfloat16, dtype=torch.bfloat16), 16),
    "fp4, nested, held as float32": (form("fp4", (64, 128), nested=True, storage=torch.float32), 16),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("inverse", [False, True], ids=["fold", "unfold"])
@pytest.mark.parametrize("case", FORMATS.values(), ids=FORMATS)
def test_codes_are_nearest_to_the_over_relaxed_change_at_the_bases_scales(
    case: tuple[WeightFormat, int], inverse: bool, backend: str
) -> None:
    f, b = case
    encoded = codecs.encode(weight_of(f), f)
    before = {name: t.contiguous().reshape(-1).view(torch.uint8).clone() for name, t in encoded.tensors.items()}
    rotation, r = turned(f.shape[1], b, WEAK[f.codec] * 4 / b**0.5)
    with use_backend(backend):
        folded = fold_encoded(encoded, (rotation,), None, "preserve", inverse=inverse)
    assert (folded.rounding, folded.relaxation > 1.05) == ("preserve", True)
    assert folded.encoded.format == f
    assert_same_statistics(folded.encoded, encoded)
    base, got = read(encoded), read(folded.encoded)
    exact = base.values @ (r if inverse else r.T)
    assert_nearest(got.levels, over_relaxed(base, exact, folded.relaxation), f.codec)
    assert not torch.equal(got.levels, base.levels)
    assert folded.kept == pytest.approx(kept_in(got.values, base.values, exact), abs=1e-3)
    assert folded.change == pytest.approx(float((exact - base.values).norm()), rel=1e-4)
    assert folded.error == pytest.approx(relative(got.values, exact), rel=1e-4)
    # and the base is as it was, also when the fold is written over
    for tensor in folded.encoded.tensors.values():
        tensor.zero_()
    for name, tensor in encoded.tensors.items():
        assert torch.equal(before[name], tensor.contiguous().reshape(-1).view(torch.uint8))


def test_an_odd_last_code_lies_beside_that_of_zero() -> None:
    f = form("nf4", (37, 45))
    folded = preserved(codecs.encode(weight_of(f), f), turned(45, 15, 0.002)[0])
    assert int(folded.encoded.tensors["weight"][-1]) & 15 == int((BY_CODE["nf4"] == 0).nonzero())


@pytest.mark.parametrize("kind", ["nf4", "fp4, nested", "int8"])
def test_a_layer_of_bitsandbytes_keeps_its_statistics(kind: str) -> None:
    codec, nested = KINDS[kind]
    model = nn.ModuleDict({"layer": make_layer(codec, 256, 256, nested=nested)})
    case = make_case("0.21 exact", 256, 256, size=WEAK[codec], b=16)
    folded = fold(model, case.adapter, rounding="preserve")
    was, now = (Layer("layer", m["layer"]).read()[0] for m in (model, folded))
    assert_same_statistics(now, was)
    base, got = stored_weight(model["layer"]), stored_weight(folded["layer"])
    record = folded.oftsurgery.modules["layer"]
    exact = case.live_weight(base)
    assert record.kept == pytest.approx(kept_in(got, base, exact), abs=1e-3)
    assert_nearest(read(now).levels, over_relaxed(read(was), exact, record.relaxation), codec)
    assert (record.rounding, folded.oftsurgery.rounding) == ("preserve", "preserve")
    assert FoldRecord.from_dict(folded.oftsurgery.to_dict()) == folded.oftsurgery
    layer: Any = folded["layer"]
    if codec != "int8":
        layer.support_avx512bf16_for_cpu = False
        assert relative(bnbf.dequantize_4bit(layer.weight.data, layer.weight.quant_state), got) < 1e-6
    x = torch.randn(5, 256, generator=seeded("x"))
    assert relative(layer(x) - layer.bias, x.double() @ got.T) < (2e-2 if codec == "int8" else 1e-5)


# --- 3. kept ----------------------------------------------------------------------------------------------------------

#: (amplitude of the generators, b)
STRENGTHS = [(0.0005, 16), (0.001, 32), (0.002, 64), (0.005, 128)]
Live = Callable[[Tensor], Tensor]


def new_adapter(part: str, rows: Tensor, dense: Tensor, **config: Any) -> tuple[Rotation, Live]:
    """One of peft 0.21, of exact Cayley maps."""
    settings = {"peft_type": "OFT", "peft_version": "0.21.2", "use_cayley_neumann": False, **config}
    adapter = parse_adapter(settings, {f"base_model.model.layer.{part}.weight": rows})
    embedding = part == "oft_embedding_R"
    return adapter.modules["layer"], lambda w: w @ dense if embedding else w @ dense.T


def of_case(variant: str, amplitude: float, b: int) -> tuple[Rotation, Live, tuple[int, int]]:
    shape = (256, 256)
    if variant == "0.13 output side":  # r = 4
        shape = (4 * b, 65536 // (4 * b))
    case = make_case(variant, shape[1], shape[0], size=amplitude, b=b)
    return case.adapter.modules["layer"], case.live_weight, shape


def coft(amplitude: float, b: int) -> tuple[Rotation, Live, tuple[int, int]]:
    """Generators that the clamp makes as large as those of the others: each block to eps / √blocks."""
    n = 256 // b
    rows = torch.randn(n, b * (b - 1) // 2, generator=seeded("coft", b))
    q = skew(rows, b)
    eps = amplitude * (b * (b - 1)) ** 0.5 * n**0.5
    clamped = q * (eps / n**0.5 / q.flatten(1).norm(dim=1)).reshape(-1, 1, 1)
    return (*new_adapter("oft_R", rows, torch.block_diag(*cayley(clamped)), coft=True, eps=eps), (256, 256))


def shared(amplitude: float, b: int) -> tuple[Rotation, Live, tuple[int, int]]:
    rows = amplitude * torch.randn(1, b * (b - 1) // 2, generator=seeded("shared", b))
    dense = torch.block_diag(*cayley(skew(rows, b)).expand(256 // b, -1, -1))
    return (*new_adapter("oft_R", rows, dense, block_share=True), (256, 256))


def embedding(amplitude: float, b: int) -> tuple[Rotation, Live, tuple[int, int]]:
    rows = amplitude * torch.randn(256 // b, b * (b - 1) // 2, generator=seeded("embedding", b))
    return (*new_adapter("oft_embedding_R", rows, torch.block_diag(*cayley(skew(rows, b)))), (300, 256))


def large(amplitude: float, b: int) -> tuple[Rotation, Live, tuple[int, int]]:
    """Of four times as many weights as the relaxation is found from."""
    rotation, r = turned(2048, b, amplitude)
    return rotation, lambda w: w @ r.T, (1024, 2048)


ADAPTERS: dict[str, Callable[[float, int], tuple[Rotation, Live, tuple[int, int]]]] = {
    **{v: lambda a, b, v=v: of_case(v, a, b) for v in VARIANTS if v != "0.13 output side, cropped"},  # type: ignore[misc]
    "COFT": coft,
    "block_share": shared,
    "embedding": embedding,
    "large": large,
}


@pytest.mark.parametrize(("amplitude", "b"), STRENGTHS, ids=[f"{a} b{b}" for a, b in STRENGTHS])
@pytest.mark.parametrize("variant", ADAPTERS)
def test_what_an_adapter_changes_is_kept(variant: str, amplitude: float, b: int) -> None:
    rotation, live, shape = ADAPTERS[variant](amplitude, b)
    for kind in KINDS if variant != "large" else ("nf4", "int8"):
        f = form_of(kind, shape)
        encoded = codecs.encode(weight_of(f), f)
        folded = preserved(encoded, rotation)
        base, got = read(encoded).values, read(folded.encoded).values
        exact = live(base)
        assert folded.kept is not None
        assert folded.kept == pytest.approx(kept_in(got, base, exact), abs=1e-3), kind
        # of an `oft_s` many blocks are clipped, and those rounded to nearest
        assert (0.97 if rotation.scale is None else 0.94) <= folded.kept <= 1.03, kind
        plain = fold_encoded(encoded, (rotation,), rounding="nearest")
        assert plain.kept == pytest.approx(kept_in(read(plain.encoded).values, base, exact), abs=1e-3), kind
        assert folded.relaxation >= 1
        if amplitude == 0.0005 and rotation.scale is None:  # of which plain rounding leaves next to nothing in 4 bits
            assert plain.kept < 0.5 < folded.relaxation - 1, kind


@pytest.mark.parametrize("rounding", ["nearest", "grid", "mse", "preserve"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", [*KINDS, "dense"])
def test_kept_is_recorded_of_every_rounding(kind: str, backend: str, rounding: str) -> None:
    f = WeightFormat("dense", (64, 256), torch.bfloat16) if kind == "dense" else form_of(kind)
    encoded = codecs.encode(weight_of(f).to(torch.bfloat16).float(), f)
    rotation, r = turned(256, 32, 0.006)
    with use_backend(backend):
        folded = fold_encoded(encoded, (rotation,), rounding=rounding)
    values = [(e.tensors["weight"].double() if kind == "dense" else read(e).values) for e in (encoded, folded.encoded)]
    exact = values[0] @ r.T
    assert folded.kept == pytest.approx(kept_in(values[1], values[0], exact), abs=1e-3)
    assert folded.change == pytest.approx(float((exact - values[0]).norm()), rel=1e-4)
    assert folded.rho == pytest.approx(float((values[1] - exact).norm() / (exact - values[0]).norm()), rel=1e-3)


def module(**more: Any) -> ModuleRecord:
    return ModuleRecord("nf4", "input", (16,), 0.1, 0.0, 0.1, "a", "b", **more)


@pytest.mark.parametrize(
    ("modules", "kept", "weak"),
    [
        ({}, None, {}),
        ({"a": module()}, None, {}),
        ({"a": module(kept=0.5, change=3.0), "b": module(kept=1.0, change=4.0)}, (0.5 * 9 + 16) / 25, {"a": 0.5}),
        ({"a": module(kept=0.89, change=1.0), "b": module(kept=0.2, change=0.011)}, None, {"b": 0.2, "a": 0.89}),
        ({"a": module(kept=0.9, change=1.0), "b": module(kept=0.2, change=0.009)}, None, {}),
        ({"a": module(kept=0.7, change=None), "b": module(kept=None, change=0.0)}, None, {"a": 0.7}),
        ({"a": module(kept=1.3, change=2.0)}, 1.3, {}),
    ],
    ids=["empty", "unmeasured", "weighed", "two", "too small to count", "of an unknown change", "more than all"],
)
def test_a_record_sums_up_what_is_kept(modules: Any, kept: float | None, weak: dict[str, float]) -> None:
    record = FoldRecord((), modules)
    if kept is not None or not weak:
        parts = [(m.kept, m.change**2) for m in modules.values() if m.kept is not None and m.change is not None]
        whole = sum(k * c for k, c in parts) / sum(c for _, c in parts) if parts else None
        assert record.kept == (None if whole is None else pytest.approx(whole))
        assert kept is None or record.kept == pytest.approx(kept)
    assert list(record.weak.items()) == list(weak.items())


# --- 4. backends and threads ------------------------------------------------------------------------------------------

ALIKE = """
import torch
from oftsurgery import Cayley, Rotation, WeightFormat
from oftsurgery.formats import codecs
from oftsurgery.weights import kernels
from oftsurgery.weights.kernels import tiled
from oftsurgery.weights.fold import fold_encoded
tiled._TILE_WEIGHTS = 1 << 13  # else weights of these sizes are the reference's
found = {}
for name, (codec, shape, blocksize, nested, b, amplitude, side) in CASES.items():
    gen = torch.Generator().manual_seed(len(name))
    f = WeightFormat(codec, shape, torch.float16, blocksize, nested)
    encoded = codecs.encode(torch.randn(shape, generator=gen) * 0.02, f)
    n = (shape[0] if side == "output" else shape[1]) // b
    rows = torch.randn(n, b * (b - 1) // 2, generator=gen) * amplitude
    if "strong" in name:
        rows[n // 2] *= 20
    rotation = Rotation(generator=rows, cayley=Cayley(5), side=side)
    for way in ("fold", "unfold"):
        for backend in ("reference", "tiled", "numba"):
            with kernels.use_backend(backend):
                r = fold_encoded(encoded, (rotation,), None, "preserve", inverse=way == "unfold")
            figures = r.backend, r.rounding, r.relaxation, r.kept, r.error, r.rho, r.change
            found[name, way, backend] = (figures, *[(e.format, dict(e.tensors)) for e in (r.encoded, encoded)])
torch.save(found, PATH)
print(torch.get_num_threads())
"""
#: name → (codec, shape, blocksize, nested blocksize, b, amplitude, side)
ALIKES: dict[str, tuple[Any, ...]] = {
    "nf4": ("nf4", (200, 192), 64, 0, 16, 0.002, "input"),
    "nf4, nested": ("nf4", (200, 192), 64, 256, 32, 0.001, "input"),
    "nf4, blocks over rows": ("nf4", (200, 96), 64, 0, 32, 0.002, "input"),
    "fp4": ("fp4", (200, 256), 128, 0, 64, 0.001, "input"),
    "fp4, nested": ("fp4", (200, 256), 64, 256, 16, 0.004, "embedding"),
    "int8": ("int8", (200, 192), 0, 0, 16, 0.0003, "input"),
    "a strong block, nf4": ("nf4", (200, 256), 64, 0, 32, 0.002, "input"),
    "a strong block, nf4, nested": ("nf4", (200, 256), 64, 256, 64, 0.001, "input"),
    "a strong block, fp4": ("fp4", (200, 256), 64, 0, 32, 0.003, "embedding"),
    "a strong block, int8, of rows": ("int8", (192, 256), 0, 0, 16, 0.0003, "output"),
    "nf4, of rows": ("nf4", (192, 256), 64, 256, 16, 0.002, "output"),
    "an odd size, nf4": ("nf4", (201, 45), 64, 0, 9, 0.003, "input"),
    "all of nf4 is moved far": ("nf4", (200, 192), 64, 0, 16, 0.05, "input"),
    "all of int8 is moved far": ("int8", (200, 192), 0, 0, 16, 0.01, "input"),
}
#: weights whose blocks the fused kernel does not take
NO_KERNEL = ("an odd size, nf4",)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, Any]]:
    """The cases by every backend, in a process with one thread and in one with two."""
    found = {}
    for threads in "12":
        path = tmp_path_factory.mktemp("alike") / "found.pt"
        code = ALIKE.replace("CASES", repr(ALIKES)).replace("PATH", repr(str(path)))
        assert in_process(code, OMP_NUM_THREADS=threads, OMP_WAIT_POLICY="PASSIVE") == threads
        read_again = torch.load(path, weights_only=False)
        found[threads] = {
            key: (figures, *[EncodedWeight(*part) for part in parts]) for key, (figures, *parts) in read_again.items()
        }
    return found


@pytest.mark.parametrize("backend", ["tiled", "numba"])
@pytest.mark.parametrize("way", ["fold", "unfold"])
@pytest.mark.parametrize("name", ALIKES)
def test_every_backend_gives_the_same(alike: dict[str, dict[Any, Any]], name: str, way: str, backend: str) -> None:
    want, reference, base = alike["1"][name, way, "reference"]
    got, encoded, _ = alike["1"][name, way, backend]
    assert want[0] == "reference"
    assert got[0] == ("tiled" if name in NO_KERNEL else backend)
    assert got[1:3] == want[1:3]
    assert got[3:] == pytest.approx(want[3:], rel=1e-4)
    far = name.startswith("all")
    assert want[1] == ("nearest" if "int8" in name else "grid") if far else want[1] == "preserve"
    mine, theirs, own = read(encoded), read(reference), read(base)
    # of scales made anew, double quantisation's apart, the last bits may differ
    if base.format.nested_blocksize or not ("strong" in name or far):
        assert_same_statistics(encoded, reference)
    assert torch.allclose(mine.scales, theirs.scales, rtol=1e-5, atol=0)
    differ = (mine.levels != theirs.levels).nonzero().reshape(-1)
    assert len(differ) <= 1 + mine.levels.numel() // 10_000
    ranks = [torch.searchsorted(LEVELS[base.format.codec], x.levels[differ] - 1e-9) for x in (mine, theirs)]
    assert bool(((ranks[0] - ranks[1]).abs() <= 1).all())
    if not far:
        others = int((theirs.scales != own.scales).sum())
        assert (others > 0) == ("strong" in name)


@pytest.mark.parametrize("name", ALIKES)
def test_threads_change_nothing(alike: dict[str, dict[Any, Any]], name: str) -> None:
    for way in ("fold", "unfold"):
        for backend in ("reference", "tiled", "numba"):
            (one, a, _), (two, b, _) = (alike[threads][name, way, backend] for threads in "12")
            assert one[:3] == two[:3]
            assert one[3:] == pytest.approx(two[3:], rel=1e-7)  # torch adds up by threads
            assert_same(a, b)


# --- 5. strong blocks -------------------------------------------------------------------------------------------------


def grid_scales(blocks: Tensor, codec: str) -> Tensor:
    """Of fifteen scales of each block the one that errs least, and then the best one for its levels."""
    absmax = blocks.abs().amax(-1, keepdim=True)
    best, least = absmax.clone(), torch.full_like(absmax, math.inf)
    for ratio in GRID:
        levels = nearest(blocks / (absmax * ratio), codec)
        error = (levels * absmax * ratio - blocks).square().sum(-1, keepdim=True)
        fitted = (levels * blocks).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, fitted, best), torch.minimum(error, least)
    return best.squeeze(-1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@by_kind
def test_a_strong_block_is_scaled_anew_and_the_others_are_not(kind: str, backend: str) -> None:
    """One rotation of the inputs, of int8 one of the rows, turns its weights far; the others hardly."""
    f = form_of(kind, (64, 256))
    encoded = codecs.encode(weight_of(f), f)
    base = read(encoded)
    if f.codec == "int8":
        rotation, r = turned(64, 16, torch.tensor([0.0004, 0.05, 0.0004, 0.0004]), side="output")
        exact, strong = r.T @ base.values, torch.arange(64) // 16 == 1
    else:
        rotation, r = turned(256, 64, torch.tensor([0.001, 0.1, 0.001, 0.001]))
        exact, strong = base.values @ r.T, torch.arange(256) % 4 == 1
    with use_backend(backend):
        folded = preserved(encoded, rotation)
    got = read(folded.encoded)
    assert folded.rounding == "preserve"
    assert folded.relaxation > 1.5
    # the others'
    stated = {"int8": "SCB"}.get(f.codec, "absmax")
    now, was = (e.tensors[stated].reshape(-1) for e in (folded.encoded, encoded))
    assert torch.equal(now[~strong], was[~strong])
    weak_weights = ~strong[torch.arange(got.levels.numel()) // got.size]
    target = over_relaxed(base, exact, folded.relaxation)
    assert_nearest(got.levels[weak_weights], target[weak_weights], f.codec)
    flat = [x.reshape(-1)[weak_weights] for x in (got.values, base.values, exact)]
    assert kept_in(*flat) == pytest.approx(1, abs=0.02)
    # and the strong ones
    blocks = exact.reshape(-1, got.size)[strong]
    wanted = blocks.abs().amax(-1) if f.codec == "int8" else grid_scales(blocks, f.codec)
    seen = got.scales[strong]
    if f.nested_blocksize:
        t = folded.encoded.tensors
        possible = t["nested_quant_map"].double() * float(t["nested_absmax"]) + float(t["nested_offset"])
        apart = (possible - wanted.unsqueeze(-1)).abs().amin(-1)
        assert bool(((seen - wanted).abs() <= apart + 1e-6 * wanted).all())
        for name in ("nested_absmax", "nested_quant_map", "nested_offset"):
            assert torch.equal(t[name], encoded.tensors[name])
    else:
        assert torch.allclose(seen, wanted, rtol=1e-5, atol=0)
    assert (now[strong] != was[strong]).float().mean() > (0.5 if f.nested_blocksize else 0.9)
    assert_nearest(got.levels[~weak_weights], (blocks / seen.unsqueeze(-1)).reshape(-1), f.codec)
    assert folded.kept == pytest.approx(kept_in(got.values, base.values, exact), abs=1e-3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_weight_is_clipped_by_a_tenth_and_no_more(kind: str, backend: str) -> None:
    """A row that grows by 5 % keeps its scales, one that grows by 15 % does not, though it moves little."""
    f = form_of(kind, (64, 256))
    sizes = torch.linspace(0.001, 0.5, 64)
    sizes[9] = 1
    weight = weight_of(f).sign() * 0.02 * sizes.repeat(4)
    weight[::2] *= 2  # for double quantisation, to which one absmax is none
    encoded = codecs.encode(weight, f)
    scale = torch.ones(64)
    scale[5], scale[6] = 1.05, 1.15
    with use_backend(backend):
        folded = preserved(encoded, Rotation(torch.zeros(1, 120), scale=scale))
    assert folded.rounding == "preserve"
    rows = (read(folded.encoded).scales != read(encoded).scales).reshape(64, -1).any(1)
    within = {5} if f.codec == "int8" else set()  # of int8, where 5 % are several steps
    assert set(rows.nonzero().reshape(-1).tolist()) - within == {6}


@by_kind
def test_a_weight_that_is_strong_everywhere_is_rounded_by_the_grid(kind: str) -> None:
    f = form_of(kind)
    encoded = codecs.encode(weight_of(f), f)
    rotation, _ = turned(256, 32, 0.03)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            folded, grid = preserved(encoded, rotation), fold_encoded(encoded, (rotation,), rounding="grid")
        assert folded.rounding == grid.rounding == ("nearest" if f.codec == "int8" else "grid")
        assert folded.relaxation == 1
        assert_same(folded.encoded, grid.encoded)
        assert (folded.error, folded.kept, folded.nearest) == (grid.error, grid.kept, grid.nearest)


@pytest.mark.parametrize("share", [0.5, 0.75], ids=["half", "most"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["nf4", "fp4, nested"])
def test_it_takes_more_than_half_of_the_blocks(kind: str, backend: str, share: float) -> None:
    f = form_of(kind)
    encoded = codecs.encode(weight_of(f), f)
    rotation, _ = turned(256, 64, torch.where(torch.arange(4) < 4 * share, 0.04, 0.001))
    with use_backend(backend):
        assert preserved(encoded, rotation).rounding == ("preserve" if share == 0.5 else "grid")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_a_scale_that_the_bases_statistics_cannot_hold(codec: str, backend: str) -> None:
    """Where all blocks have the same absmax, double quantisation holds that one alone."""
    weight = weight_of(form(codec))
    weight = weight / weight.reshape(-1, 64).abs().amax(1).repeat_interleave(64).reshape(weight.shape)
    rotation, _ = turned(256, 16, 0.001)
    for grown, nested, rounding in ((1.5, True, "grid"), (1.2, True, "preserve"), (1.5, False, "preserve")):
        encoded = codecs.encode(weight, form(codec, nested=nested))
        scale = torch.ones(64)
        scale[7] = grown
        with use_backend(backend):
            folded = preserved(encoded, replace(rotation, scale=scale))
            grid = fold_encoded(encoded, (replace(rotation, scale=scale),), rounding="grid")
        assert folded.rounding == rounding, (grown, nested)
        if rounding == "grid":
            assert folded.relaxation == 1
            assert_same(folded.encoded, grid.encoded)
        elif nested:  # clipped
            assert torch.equal(read(folded.encoded).scales, read(encoded).scales)
            assert float((read(folded.encoded).levels.reshape(64, -1)[7].abs() == 1).double().mean()) > 0.02
        else:
            assert float(read(folded.encoded).scales.reshape(64, -1)[7].min()) > 1.25


#: generators that move most blocks far, (amplitude · √b)
FAR = {"nf4": (0.1, 0.2, 0.5), "fp4": (0.16, 0.3, 0.5), "int8": (0.01, 0.05, 0.3)}


@pytest.mark.parametrize("b", [16, 64, 128])
@by_kind
def test_outputs_with_a_strong_adapter_err_no_more_than_by_the_grid(kind: str, b: int) -> None:
    f = form_of(kind, (128, 256))
    encoded = codecs.encode(weight_of(f), f)
    base = read(encoded).values
    x = torch.randn(1000, 256, generator=seeded("inputs"), dtype=torch.float64)
    for size in FAR[f.codec]:
        rotation, r = turned(256, b, size / b**0.5)
        exact = base @ r.T
        ours, grid = (
            float(
                (x @ (read(fold_encoded(encoded, (rotation,), rounding=name).encoded).values - exact).T).square().sum()
            )
            for name in ("preserve", "grid")
        )
        assert ours <= 1.02 * grid, size


# --- 6. edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("what", ["a weight of zeros", "a rotation by nothing"])
@by_kind
def test_nothing_is_changed_by(what: str, kind: str, backend: str) -> None:
    f = form_of(kind)
    encoded = codecs.encode(torch.zeros(f.shape) if "zeros" in what else weight_of(f), f)
    rotation, _ = turned(256, 16, 0.0 if "nothing" in what else 0.01)
    with use_backend(backend):
        folded = preserved(encoded, rotation)
    assert (folded.kept, folded.rho, folded.change, folded.relaxation, folded.error) == (None, None, 0, 1, 0)
    assert folded.rounding == "preserve"
    assert_same_statistics(folded.encoded, encoded)
    assert torch.equal(read(folded.encoded).levels, read(encoded).levels)  # FP4's zero has two codes


@pytest.mark.parametrize("factor", [0.0, 1e-39], ids=["zeros", "denormal"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@by_kind
def test_blocks_with_hardly_a_scale_stay_out_of_it(kind: str, backend: str, factor: float) -> None:
    f = form_of(kind)
    weight = weight_of(f)
    weight[8:24] *= factor
    encoded = codecs.encode(weight, f)
    rotation, r = turned(256, 16, WEAK[f.codec])
    with use_backend(backend):
        folded = preserved(encoded, rotation)
    base, got = read(encoded), read(folded.encoded)
    exact = base.values @ r.T
    assert folded.rounding == "preserve"
    target = over_relaxed(base, exact, folded.relaxation)
    used = torch.ones(f.shape, dtype=torch.bool)
    used[8:24] = False
    assert_nearest(got.levels[used.reshape(-1)], target[used.reshape(-1)], f.codec)
    assert bool((got.scales.reshape(64, -1)[8:24].abs() <= 1e-39 * (0.1 if f.nested_blocksize == 0 else 1e37)).all())
    assert torch.equal(got.scales.reshape(64, -1)[used[:, 0]], base.scales.reshape(64, -1)[used[:, 0]])
    if factor == 0:
        assert_same_statistics(folded.encoded, encoded)
    assert folded.kept == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rounding", ["preserve", "nearest"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@by_kind
def test_what_is_not_finite_is_refused(kind: str, bad: float, backend: str, rounding: str) -> None:
    f = form_of(kind)
    encoded = codecs.encode(weight_of(f), f)
    name = {"nf4": "absmax", "fp4": "absmax", "int8": "SCB"}[f.codec] if not f.nested_blocksize else "nested_absmax"
    broken = encoded.tensors[name].clone()
    broken.view(-1)[0] = bad
    rotation, _ = turned(256, 16, 0.002)
    damaged = EncodedWeight(f, {**encoded.tensors, name: broken})
    with use_backend(backend), pytest.raises(NonFiniteError, match="the stored weight holds NaN or infinity"):
        fold_encoded(damaged, (rotation,), rounding=rounding)
    rotation = replace(rotation, scale=torch.where(torch.arange(64) == 9, bad, 1.0))
    with use_backend(backend), pytest.raises(NonFiniteError, match="the rotated weight holds NaN or infinity"):
        fold_encoded(encoded, (rotation,), rounding=rounding)


#: from → to, and what is used then
CHANGES: dict[str, tuple[WeightFormat, WeightFormat, str]] = {
    "float32 to nf4": (WeightFormat("dense", (64, 256)), form("nf4"), "grid"),
    "float32 to int8": (WeightFormat("dense", (64, 256)), form("int8"), "nearest"),
    "nf4 to fp4": (form("nf4"), form("fp4"), "grid"),
    "nf4 to other blocks": (form("nf4"), form("nf4", size=128), "grid"),
    "nf4 to int8": (form("nf4"), form("int8"), "nearest"),
    "int8 to nf4": (form("int8"), form("nf4"), "grid"),
    "nf4 to doubly quantised": (form("nf4"), form("nf4", nested=True), "preserve"),
    "nf4 to bfloat16": (form("nf4"), WeightFormat("dense", (64, 256), torch.bfloat16), "nearest"),
    "nf4 no longer doubly quantised": (form("nf4", nested=True), form("nf4"), "preserve"),
    "nf4 held otherwise": (form("nf4"), form("nf4", storage=torch.bfloat16, dtype=torch.bfloat16), "preserve"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_where_the_format_changes(change: tuple[WeightFormat, WeightFormat, str], backend: str) -> None:
    old, new, used = change
    encoded = codecs.encode(weight_of(old), old)
    rotation, r = turned(256, 16, 0.002)
    with use_backend(backend):
        folded = preserved(encoded, rotation, new)
        other = fold_encoded(encoded, (rotation,), new, "grid")
    assert (folded.rounding, folded.encoded.format) == (used, new)
    if used == "preserve":
        assert folded.relaxation > 1.5
        base, got = read(encoded), read(folded.encoded)
        again = new.nested_blocksize > old.nested_blocksize  # the scales, as bitsandbytes' double quantisation has them
        wanted = scales_in(codecs.encode(weight_of(old), new)) if again else base.scales
        assert torch.allclose(got.scales, wanted, rtol=1e-6, atol=0)
        exact = base.values @ r.T
        assert_nearest(got.levels, over_relaxed(base, exact, folded.relaxation, got.each), "nf4")
        assert folded.kept == pytest.approx(kept_in(got.values, base.values, exact), abs=1e-3)
        assert folded.kept == pytest.approx(1, abs=0.06 if again else 0.03)
    else:
        assert folded.relaxation == 1
        assert_same(folded.encoded, other.encoded)


@pytest.mark.parametrize(("codec", "nested"), [("nf4", False), ("fp4", False), ("nf4", True)])
def test_a_base_that_a_cpu_forward_has_repacked(codec: str, nested: bool) -> None:
    """What is left of it is singly quantised: where it was doubly, its scales are quantised anew."""
    layer: Any = make_layer(codec, 256, nested=nested)
    layer.weight.data, _ = bnbf._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    model = nn.ModuleDict({"layer": layer})
    before, home = Layer("layer", layer).read()
    case = make_case("0.21 exact", 256, 64, size=0.002, b=16)
    folded = fold(model, case.adapter, rounding="preserve")
    record = folded.oftsurgery.modules["layer"]
    now, _ = Layer("layer", folded["layer"]).read()
    assert now.format == home
    base, got = read(before), read(now)
    exact = case.live_weight(base.values)
    assert record.kept == pytest.approx(kept_in(got.values, base.values, exact), abs=1e-3)
    assert record.rounding == "preserve"
    assert record.kept == pytest.approx(1, abs=0.06 if nested else 0.03)
    assert torch.allclose(got.scales, base.scales, rtol=0.02 if nested else 0, atol=0)
    assert_nearest(got.levels, over_relaxed(base, exact, record.relaxation, got.each), codec)


def test_two_adapters_one_after_the_other_are_both_kept() -> None:
    f = form("nf4", (256, 256), nested=True)
    first = codecs.encode(weight_of(f), f)
    now, truth = first, read(first).values
    start = truth.clone()
    for seed in range(4):
        rotation, r = turned(256, 32, 0.002, seed=seed)
        now, truth = preserved(now, rotation).encoded, truth @ r.T
    assert_same_statistics(now, first)
    assert kept_in(read(now).values, start, truth) == pytest.approx(1, abs=0.05)
    chain = [turned(256, 32, 0.002, seed=seed) for seed in range(4)]
    once = fold_encoded(first, [rotation for rotation, _ in chain][::-1], rounding="preserve")
    assert kept_in(read(once.encoded).values, start, truth) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_embedding_of_bitsandbytes(kind: str) -> None:
    g = seeded("embedding", kind)
    if kind == "int8":
        layer: Any = bnb.nn.Embedding8bit(300, 256)
    else:
        layer = bnb.nn.Embedding4bit(300, 256, quant_type=kind)
    layer.load_state_dict({"weight": torch.randn(300, 256, generator=g)})
    model = nn.ModuleDict({"layer": layer.to("cpu")})
    rotation, live, _ = embedding(WEAK[kind], 16)
    folded = fold(model, OFTAdapter({"layer": rotation}), rounding="preserve")
    was, now = (Layer("layer", m["layer"]).read()[0] for m in (model, folded))
    assert_same_statistics(now, was)
    base = read(was).values
    kept = kept_in(read(now).values, base, live(base))
    assert folded.oftsurgery.modules["layer"].kept == pytest.approx(kept, abs=1e-3)
    assert kept == pytest.approx(1, abs=0.03)


# --- 7. there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 20], ids=["weak", "strong"])
@by_kind
def test_ten_folds_come_out_again_to_the_last_bit(kind: str, size: float, tmp_path: Path) -> None:
    codec, nested = KINDS[kind]
    model: Any = nn.ModuleDict({"layer": make_layer(codec, 128, nested=nested)})
    states = [Layer("layer", model["layer"]).read()[0]]
    for i in range(10):
        adapter = OFTAdapter({"layer": turned(128, 16, size * WEAK[codec], seed=i)[0]})
        model = fold(model, adapter, rounding="preserve", undo=tmp_path / f"{i}")
        states.append(Layer("layer", model["layer"]).read()[0])
    used = "preserve" if size == 1 else "nearest" if codec == "int8" else "grid"
    assert model.oftsurgery.modules["layer"].rounding == used
    for i in reversed(range(10)):
        assert not torch.equal(states[i + 1].tensors["weight"], states[i].tensors["weight"])
        model = oftsurgery.unfold(model, undo=tmp_path / f"{i}")
        assert_same(Layer("layer", model["layer"]).read()[0], states[i])


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 0.5), ("int8", 0.26)])
def test_an_undo_record_knows_what_was_over_relaxed(kind: str, bits: float, tmp_path: Path) -> None:
    """Bits a weight: by a tenth more than these where the way back is predicted as of a fold to nearest."""
    model: Any = nn.ModuleDict({"layer": make_layer(kind, 512, 512)})
    fold(model, OFTAdapter({"layer": turned(512, 32, WEAK[kind])[0]}), rounding="preserve", undo=tmp_path / "undo")
    assert (tmp_path / "undo").stat().st_size * 8 / 512**2 < bits


@pytest.mark.parametrize("amplitude", [0.0005, 0.002, 0.01, 0.02])
@by_kind
def test_ten_folds_and_rotations_back_hardly_drift(kind: str, amplitude: float) -> None:
    f = form_of(kind, (256, 256))
    start = codecs.encode(weight_of(f), f)
    rotation, _ = turned(256, 32, amplitude)
    now = start
    for _ in range(10):
        folded = preserved(now, rotation).encoded
        now = fold_encoded(folded, (rotation,), rounding="preserve", inverse=True).encoded
    limit = {"nf4": 0.12, "fp4": 0.25, "int8": 0.015}[f.codec]
    assert relative(read(now).values, read(start).values) < limit


# --- 8. checks --------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
TARGETS = ["q_proj", "down_proj"]
Q_PROJ = "model.layers.0.self_attn.q_proj"
#: name → (codec, double quantisation, amplitude)
BASES = {"nf4": ("nf4", False, 0.002), "double": ("nf4", True, 0.001), "int8": ("int8", False, 0.0002)}


def small_model() -> Any:
    return build("llama", **SIZES)


def save_adapter(folder: Path, amplitude: float, seed: int) -> Path:
    """One that peft writes."""
    model = adapted(small_model(), TARGETS, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_" in name:
                parameter.mul_(amplitude / 0.03)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=BASES)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quantised base as transformers saves it, two weak adapters, and folds of the first: by default, and to nearest."""
    root = tmp_path_factory.mktemp(request.param)
    codec, double, amplitude = BASES[request.param]
    small_model().save_pretrained(root / "plain")
    with quiet_transformers():
        settings = bnb_config(codec, double=double)
        load(root / "plain", "LlamaForCausalLM", quantization_config=settings).save_pretrained(root / "base")
    found: dict[str, Any] = {"base": root / "base", "root": root, "codec": codec}
    for name, seed in (("adapter", 0), ("other", 5)):
        found[name] = save_adapter(root / name, amplitude, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
        found["record"] = oftsurgery.fold_checkpoint(root / "base", found["adapter"], root / "folded")
    found["nearest record"] = quiet_fold(root / "base", found["adapter"], root / "nearest", rounding="nearest")
    quiet_fold(root / "base", found["other"], root / "of another", rounding="preserve")
    for name in ("folded", "nearest", "of another"):
        found[name] = root / name
        found[f"{name}, no record"] = root / f"{name}-bare"
        shutil.copytree(root / name, root / f"{name}-bare")
        (root / f"{name}-bare" / "oftsurgery.json").unlink()
    return found


def damaged(folder: Path, to: Path) -> Path:
    """A tenth of one weight's codes, or bytes of codes, among themselves in another order."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    flat = tensors[f"{Q_PROJ}.weight"].view(-1)
    g = seeded("damage")
    some = torch.randperm(flat.numel(), generator=g)[: flat.numel() // 10]
    flat[some] = flat[some[torch.randperm(some.numel(), generator=g)]]
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_a_fold_on_disk_is_preserved_by_default(disk: dict[str, Any]) -> None:
    record = disk["record"]
    assert record.rounding == "preserve"
    assert {m.rounding for m in record.modules.values()} == {"preserve"}
    assert record.kept == pytest.approx(1, abs=0.02)
    assert record.weak == {}
    assert disk["nearest record"].kept < 0.1
    assert set(disk["nearest record"].weak) == set(record.modules)
    written = FoldRecord.from_dict(oftsurgery.FoldRecord.to_dict(record))
    assert written.kept == record.kept


@pytest.mark.parametrize("which", ["folded", "folded, no record", "nearest", "nearest, no record"])
def test_verify_accepts(which: str, disk: dict[str, Any]) -> None:
    report = oftsurgery.verify_checkpoint(disk[which], disk["base"], disk["adapter"])
    assert report.ok, report.to_dict()
    for path, check in report.modules.items():
        record = disk["nearest record" if "nearest" in which else "record"].modules[path]
        assert check.kept == pytest.approx(record.kept, abs=1e-3)
        assert check.error == pytest.approx(record.error, rel=1e-3)
        assert check.recorded is (None if "no record" in which else True)


@pytest.mark.parametrize("record", ["", ", no record"], ids=["with its record", "without"])
def test_verify_finds_damage_and_another_adapter(record: str, disk: dict[str, Any], tmp_path: Path) -> None:
    broken = damaged(disk[f"folded{record}"], tmp_path / "damaged")
    report = oftsurgery.verify_checkpoint(broken, disk["base"], disk["adapter"])
    assert [path for path, check in report.modules.items() if not report.passes(check)] == [Q_PROJ]
    assert not report.ok
    another = oftsurgery.verify_checkpoint(disk[f"of another{record}"], disk["base"], disk["adapter"])
    assert not any(map(another.passes, another.modules.values()))
    assert all(abs(check.kept) < 0.3 for check in another.modules.values())


@pytest.mark.parametrize("record", ["", ", no record"], ids=["with its record", "without"])
def test_doctor_tells_how_much_is_kept_on_disk(record: str, disk: dict[str, Any]) -> None:
    found = only(doctor(disk[f"folded{record}"], base=disk["base"], adapter=disk["adapter"]))
    assert (found.severity, found.code) == ("note", "kept")
    assert found.evidence["kept"] == pytest.approx(disk["record"].kept, abs=1e-3)
    assert found.evidence["least"] == pytest.approx(min(m.kept for m in disk["record"].modules.values()), abs=1e-3)
    assert (found.evidence["weights"], found.evidence["below_90%"]) == (2, 0)
    assert "100% of what the adapter changes is in the merged weights" in found.message
    lost = only(doctor(disk[f"nearest{record}"], base=disk["base"], adapter=disk["adapter"]))
    assert (lost.severity, lost.code) == ("warning", "adapter-lost")
    assert lost.evidence["kept"] == pytest.approx(disk["nearest record"].kept, abs=1e-3)
    assert lost.evidence["kept"] < 0.1
    assert lost.evidence["below_90%"] == 2
    assert 'rounding="preserve"' in lost.remedy


def test_doctor_finds_damage_in_a_preserved_fold(disk: dict[str, Any], tmp_path: Path) -> None:
    broken = damaged(disk["folded, no record"], tmp_path / "damaged")
    found = only(doctor(broken, base=disk["base"], adapter=disk["adapter"]))
    assert (found.severity, found.code, found.subject) == ("error", "not-the-fold", Q_PROJ)


@by_kind
def test_doctor_tells_how_much_is_kept_in_memory(kind: str) -> None:
    codec, nested = KINDS[kind]
    model = nn.ModuleDict({"layer": make_layer(codec, 256, 256, nested=nested)})
    case = make_case("0.21 exact", 256, 256, size=WEAK[codec] / 2, b=16)
    folded = fold(model, case.adapter, rounding="preserve")
    found = only(doctor(folded, base=model, adapter=case.adapter))
    assert (found.severity, found.code) == ("note", "kept")
    assert found.evidence["kept"] == pytest.approx(folded.oftsurgery.kept, abs=1e-3)
    plain = fold(model, case.adapter, rounding="nearest")
    lost = only(doctor(plain, base=model, adapter=case.adapter))
    assert (lost.severity, lost.code) == ("warning", "adapter-lost")
    assert lost.evidence["kept"] < 0.1 + 0.05 * (codec == "fp4")
    # and merged by others: bitsandbytes' own quantiser of the exact weight
    merged = copy.deepcopy(model)
    exact = case.live_weight(stored_weight(model["layer"])).float()
    layer: Any = merged["layer"]
    if codec == "int8":
        layer.weight = bnb.nn.Int8Params(exact, requires_grad=False, has_fp16_weights=False)
    else:
        layer.weight = bnb.nn.Params4bit(
            exact, requires_grad=False, compress_statistics=nested, quant_type=codec, blocksize=64, module=layer
        )
    merged = merged.to("cpu")
    lost = only(doctor(merged, base=model, adapter=case.adapter))
    assert (lost.severity, lost.code) == ("warning", "adapter-lost")
    kept = kept_in(stored_weight(merged["layer"]), stored_weight(model["layer"]), exact.double())
    assert lost.evidence["kept"] == pytest.approx(kept, abs=1e-3)


def test_records_without_what_is_kept_are_read() -> None:
    """As they were written before."""
    new = FoldRecord(
        (), {"m": module(kept=0.5, change=2.0, relaxation=3.0, rho=0.4, rounding="preserve")}, rounding="grid"
    )
    data = new.to_dict()
    assert FoldRecord.from_dict(data) == new
    for name in ("kept", "change", "relaxation"):
        del data["modules"]["m"][name]
    old = FoldRecord.from_dict(data)
    record = old.modules["m"]
    assert (record.kept, record.change, record.relaxation, record.rho) == (None, None, 1.0, 0.4)
    assert (old.kept, old.weak, old.rounding) == (None, {}, "grid")
    with pytest.raises(TypeError, match=r"ModuleRecord.kept is 'most'"):
        FoldRecord.from_dict({**data, "modules": {"m": {**data["modules"]["m"], "kept": "most"}}})


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "numba"])
def test_a_very_small_change_of_a_large_weight_is_kept(backend: str) -> None:
    """Few weights leave their levels: a sample of half a million weights would have some hundred, with which 67 to 161 % were kept."""
    f = WeightFormat("nf4", (2048, 1024), torch.float32, blocksize=64)
    for seed in range(4):
        encoded = codecs.encode(weight_of(f, seed=seed), f)
        rotation, matrix = turned(1024, 32, 3e-6, seed=seed)
        with use_backend(backend):
            got = preserved(encoded, rotation)
        base = read(encoded).values
        assert kept_in(read(got.encoded).values, base, base @ matrix.T) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_very_small_change_in_the_layout_of_a_package_is_kept(seed: int) -> None:
    """A sample of half a million weights kept 168 and 74 %."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(torch.tensor(0.006), None, (-8, 7))
    base = grid.values(grid.nearest(torch.randn(2048, 1024, generator=generator) * 0.02))
    change = torch.randn(2048, 1024, generator=generator) * 2e-7
    found = preserve.steps_in_package(grid, base, change)
    assert found is not None
    stored = grid.values(grid.nearest(base + change * preserve.relaxation_of(found)))
    assert kept_in(stored.double(), base.double(), base.double() + change) == pytest.approx(1, abs=0.1)
