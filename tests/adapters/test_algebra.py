"""Scaling, inverting, composing, blending and saving adapters: against folds, peft's live layers and independent
float64 computations."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from goldens import GOLDEN, VARIANTS, Tiny, base_of, relative
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import OFTConfig, get_peft_model
from rotated import F64, layers_of, live_peft, live_weight, rotation
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import oftsurgery
from oftsurgery import AdapterError, Cayley, ConversionWarning, OFTAdapter, Rotation

LEGACY = [v for v in VARIANTS if v.startswith(("peft-0.13", "peft-0.15", "peft-0.17"))]


def adapter(features: int, b: int, norm: float, seed: int, **fields: object) -> OFTAdapter:
    return OFTAdapter({"m": rotation(features, b, norm, seed, **fields)}, source=f"seed {seed}")  # type: ignore[arg-type]


def dense(a: OFTAdapter | Rotation, features: int) -> Tensor:
    """The whole block-diagonal ``(features, features)`` matrix of a live layer."""
    r = a if isinstance(a, Rotation) else a.modules["m"]
    blocks = r.blocks
    return torch.block_diag(*(blocks.expand(features // r.block_size, -1, -1)))


norms = st.floats(0.01, 2.0)
seeds = st.integers(0, 10_000)
sizes = st.sampled_from([2, 3, 4, 6, 12])
weights = st.floats(-1.0, 1.0)


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seeds, sizes, sizes, sizes, norms)
def test_compose_is_the_live_chain_and_associative(seed: int, b1: int, b2: int, b3: int, norm: float) -> None:
    a, b, c = (adapter(12, size, norm, seed + i) for i, size in enumerate((b1, b2, b3)))
    try:
        left, right, ab = a.compose(b).compose(c), a.compose(b.compose(c)), a.compose(b)
    except AdapterError as error:
        assume("too close to π" not in str(error))
        raise
    torch.testing.assert_close(dense(ab, 12), dense(a, 12) @ dense(b, 12), rtol=0, atol=1e-9)
    torch.testing.assert_close(dense(left, 12), dense(right, 12), rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, sizes, norms)
def test_inverse_is_the_inverse(seed: int, b: int, norm: float) -> None:
    a = adapter(12, b, norm, seed)
    for product in (a.compose(a.inverse()), a.inverse().compose(a)):
        torch.testing.assert_close(dense(product, 12), torch.eye(12, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(dense(a.inverse(), 12), dense(a.scaled(-1), 12), rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, sizes, norms, weights, weights)
def test_scales_add_up(seed: int, b: int, norm: float, alpha: float, beta: float) -> None:
    a = adapter(12, b, norm, seed)
    assume(2 * abs(alpha + beta) * math.atan(norm) < 3.1)
    both = a.scaled(alpha).compose(a.scaled(beta))
    torch.testing.assert_close(dense(both, 12), dense(a.scaled(alpha + beta), 12), rtol=0, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds, sizes, sizes, norms, st.sampled_from(["input", "output", "embedding"]))
def test_folding_a_composition_is_folding_the_chain(seed: int, b1: int, b2: int, norm: float, side: str) -> None:
    a, b = adapter(12, b1, norm, seed, side=side), adapter(12, b2, norm, seed + 1, side=side)
    try:
        ab = a.compose(b)
    except AdapterError as error:
        assume("too close to π" not in str(error))
        raise
    layer = nn.Embedding(12, 12, dtype=F64) if side == "embedding" else nn.Linear(12, 12, dtype=F64)
    model = nn.ModuleDict({"m": layer})
    chain = oftsurgery.fold(model, [a, b])["m"].weight
    torch.testing.assert_close(oftsurgery.fold(model, ab)["m"].weight, chain, rtol=0, atol=1e-9)
    order = [b, a] if side == "input" else [a, b]
    one_by_one = oftsurgery.fold(oftsurgery.fold(model, order[0]), order[1])["m"].weight
    torch.testing.assert_close(one_by_one, chain, rtol=0, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds, sizes, sizes, norms, weights, weights)
def test_a_blend_is_the_exponential_of_the_mean_logarithm(
    seed: int, b1: int, b2: int, norm: float, wa: float, wb: float
) -> None:
    a, b = adapter(12, b1, norm, seed), adapter(12, b2, norm, seed + 1)

    def log(r: Tensor) -> Tensor:
        values, vectors = torch.linalg.eig(r)
        return (vectors @ torch.diag(torch.log(values)) @ torch.linalg.inv(vectors)).real

    mean = wa * log(dense(a, 12)) + wb * log(dense(b, 12))
    assume(float(torch.linalg.matrix_norm(mean, ord=2)) < 3.1)
    mixed = oftsurgery.blend([(a, wa), (b, wb)])
    torch.testing.assert_close(dense(mixed, 12), torch.linalg.matrix_exp(mean), rtol=0, atol=1e-8)
    swapped = oftsurgery.blend([(b, wb), (a, wa)])
    torch.testing.assert_close(dense(swapped, 12), dense(mixed, 12), rtol=0, atol=1e-9)


# --- scaled -----------------------------------------------------------------------------------------------------------


def test_scaled_turns_by_a_multiple_of_the_angle_not_of_the_generator() -> None:
    quarter = OFTAdapter({"m": Rotation(torch.tensor([[1.0]], dtype=F64))})
    assert quarter.modules["m"].angle == pytest.approx(math.pi / 2)
    assert quarter.scaled(0.5).modules["m"].angle == pytest.approx(math.pi / 4, abs=1e-12)
    assert float(quarter.scaled(0.5).modules["m"].generator) == pytest.approx(math.tan(math.pi / 8), abs=1e-12)
    assert quarter.scaled(1) is quarter
    assert quarter.scaled(0).modules["m"].angle == 0
    torch.testing.assert_close(dense(quarter.scaled(1.5), 2) @ dense(quarter.scaled(-1.5), 2), torch.eye(2, dtype=F64))


@pytest.mark.parametrize("alpha", [2.0, -2.0, 1e6])
def test_scaled_to_pi_is_refused(alpha: float) -> None:
    quarter = OFTAdapter({"m": Rotation(torch.tensor([[1.0]], dtype=F64))})
    with pytest.raises(AdapterError, match=r"a rotation by [\d.]+ rad: at π and beyond .*module 'm'.*smaller weights"):
        quarter.scaled(alpha)


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_scaled_by_no_number_is_refused(alpha: float) -> None:
    with pytest.raises(AdapterError, match=f"the weight {alpha} is not finite"):
        adapter(12, 4, 0.1, 0).scaled(alpha)


def test_composing_to_nearly_pi_is_refused() -> None:
    quarter = OFTAdapter({"m": Rotation(torch.tensor([[1.0]], dtype=F64))})
    with pytest.raises(
        AdapterError, match=r"too close to π: its exact Cayley generator .*more than 100 \[module 'm'\]"
    ):
        quarter.compose(quarter)
    near = OFTAdapter({"m": Rotation(torch.tensor([[math.tan(math.atan(99.0) - math.atan(1.0))]], dtype=F64))})
    assert float(near.compose(quarter).modules["m"].generator) == pytest.approx(99.0, rel=1e-9)


def test_identity_and_deep_powers() -> None:
    a = adapter(12, 6, 0.3, 1)
    thousandth = a.scaled(1e-3)
    total = thousandth
    for _ in range(9):
        total = total.compose(thousandth)
    torch.testing.assert_close(dense(total, 12), dense(a.scaled(1e-2), 12), rtol=0, atol=1e-13)


# --- truncated series -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("since_0_18", [True, False])
@pytest.mark.parametrize("terms", [2, 3, 5, 8])
def test_a_series_becomes_the_nearest_rotation_and_says_how_near(terms: int, since_0_18: bool) -> None:
    r = rotation(12, 6, 0.4, 3, cayley=Cayley(terms, since_0_18))
    exact, residual = r.exact()
    assert exact.cayley.exact
    assert exact.defect < 1e-12
    # closed form: the series' eigenvalues f(iθ) keep their angles, and lose their moduli
    theta = torch.linalg.eigvals(torch.stack([torch.tensor(0.4j, dtype=torch.complex128)]).reshape(1, 1)).reshape(())
    f = r.cayley(theta.reshape(1, 1, 1)).reshape(())
    assert residual >= abs(abs(complex(f)) - 1) - 1e-12
    assert residual == pytest.approx(float(torch.linalg.matrix_norm(r.blocks - exact.blocks, ord=2).max()), abs=1e-12)
    # nothing nearer: any other rotation is further away in the Frobenius norm
    best = torch.linalg.matrix_norm(r.blocks - exact.blocks)
    for seed in range(5):
        other = exact.blocks @ rotation(12, 6, 0.01, seed).blocks
        assert bool((torch.linalg.matrix_norm(r.blocks - other) > best).all())


def test_the_residual_of_five_terms_has_a_closed_form() -> None:
    # |f(iθ)|² = (1 - θ⁴)², so ‖R - nearest‖₂ = θ⁴
    _, residual = rotation(12, 6, 0.4, 3, cayley=Cayley(5)).exact()
    assert residual == pytest.approx(0.4**4, rel=1e-9)


@pytest.mark.parametrize("operation", ["scaled", "inverse", "compose", "blend", "save"])
def test_every_operation_on_a_series_states_the_residual(operation: str, tmp_path: Path) -> None:
    a = adapter(12, 6, 0.4, 3, cayley=Cayley(5))
    run: dict[str, Callable[[], object]] = {
        "scaled": lambda: a.scaled(0.5),
        "inverse": a.inverse,
        "compose": lambda: a.compose(adapter(12, 6, 0.1, 4)),
        "blend": lambda: oftsurgery.blend([(a, 1.0)]),
        "save": lambda: a.save(tmp_path / "saved"),
    }
    with pytest.warns(ConversionWarning, match=r"1 truncated Neumann series became .* is 2\.56e-02 at worst \(m\)"):
        result = run[operation]()
    if operation == "save":
        assert result == {"m": pytest.approx(0.4**4)}


def test_a_singular_series_is_refused() -> None:
    a = adapter(2, 2, 1.0, 0, cayley=Cayley(5))
    with pytest.raises(AdapterError, match="singular: there is no nearest rotation"):
        a.inverse()
    with pytest.raises(AdapterError, match="singular: there is no nearest rotation"):
        a.compose(a)


# --- block sizes, sharing, sides --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share_a", "share_b"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("b1", "b2"), [(4, 4), (4, 8), (8, 4), (8, 12)])
def test_block_sizes_and_shared_blocks_compose_exactly(b1: int, b2: int, share_a: bool, share_b: bool) -> None:
    a, b = adapter(24, b1, 0.3, 1, shared=share_a), adapter(24, b2, 0.4, 2, shared=share_b)
    ab = a.compose(b)
    assert ab.modules["m"].block_size == math.lcm(b1, b2)
    assert ab.modules["m"].generator.shape[0] == (1 if share_a and share_b else 24 // math.lcm(b1, b2))
    torch.testing.assert_close(dense(ab, 24), dense(a, 24) @ dense(b, 24), rtol=0, atol=1e-12)
    mixed = oftsurgery.blend([(a, 0.5), (b, 0.5)])
    folded = oftsurgery.fold_weight(torch.eye(24, dtype=F64), mixed.modules["m"])
    torch.testing.assert_close(folded, dense(mixed, 24).mT, rtol=0, atol=1e-12)


def test_other_widths_and_sides_are_refused() -> None:
    with pytest.raises(oftsurgery.ShapeError, match=r"rotations of 12 and of 24 features.*module 'm'"):
        adapter(12, 4, 0.1, 1).compose(adapter(24, 4, 0.1, 2))
    with pytest.raises(oftsurgery.MatchError, match="different sides of one weight: input, output"):
        adapter(12, 4, 0.1, 1).compose(adapter(12, 4, 0.1, 2, side="output"))


def test_modules_of_one_adapter_alone_stay_as_they_are() -> None:
    a = OFTAdapter({"x": rotation(12, 4, 0.1, 1), "m": rotation(12, 4, 0.1, 2)})
    b = OFTAdapter({"m": rotation(12, 4, 0.1, 3), "y": rotation(12, 4, 0.5, 4, cayley=Cayley(5))})
    ab = a.compose(b)  # no warning: y's series is left alone
    assert list(ab.modules) == ["x", "m", "y"]
    assert ab.modules["x"] is a.modules["x"]
    assert ab.modules["y"] is b.modules["y"]
    half = oftsurgery.blend([(a, 0.5), (OFTAdapter({"m": b.modules["m"]}), 0.5)])
    torch.testing.assert_close(half.modules["x"].blocks, a.scaled(0.5).modules["x"].blocks)


def test_a_cropped_block_has_no_algebra(golden: Path) -> None:
    """peft ≤ 0.13 crops a last block that reaches beyond the outputs; the crop of a product is no product of crops."""
    base = Tiny(base_of("peft-0.13.2/rank6_cropped"))
    cropped = oftsurgery.load_adapter(golden / "peft-0.13.2" / "rank6_cropped")
    for derived in (cropped.inverse(), cropped.scaled(0.5), cropped.compose(cropped.scaled(0.5))):
        with pytest.raises(oftsurgery.ShapeError, match="6 blocks of size 11 reach beyond the 64 outputs"):
            oftsurgery.fold(base, derived)
    fits = oftsurgery.load_adapter(golden / "peft-0.13.2" / "rank4")
    back = oftsurgery.fold(oftsurgery.fold(base, fits), fits.inverse())
    for name, parameter in base.named_parameters():
        assert relative(back.get_parameter(name), parameter.detach()) < 1e-6


def test_output_scales_compose_invert_and_scale(golden: Path) -> None:
    variant = "peft-0.15.2/block16"
    base, a = Tiny(base_of(variant)).double(), oftsurgery.load_adapter(golden / variant)
    assert any(bool((r.scale != 1).any()) for r in a.modules.values() if r.scale is not None)
    b = oftsurgery.load_adapter(golden / "peft-0.15.2" / "rank4")
    chain = oftsurgery.fold(base, [a, b])
    for folded in (oftsurgery.fold(base, a.compose(b)), oftsurgery.fold(oftsurgery.fold(base, b), a)):
        for name, parameter in chain.named_parameters():
            assert relative(folded.get_parameter(name), parameter.detach()) < 1e-9
    back = oftsurgery.fold(oftsurgery.fold(base, a), a.inverse())
    for name, parameter in base.named_parameters():
        assert relative(back.get_parameter(name), parameter.detach()) < 1e-9
    path, r = next((p, r) for p, r in a.modules.items() if r.scale is not None)
    positive = OFTAdapter({path: replace(r, scale=r.scale.abs())})  # type: ignore[union-attr]
    twice = positive.scaled(0.5).compose(positive.scaled(0.5))
    torch.testing.assert_close(twice.modules[path].scale, positive.modules[path].scale.double())  # type: ignore[union-attr]
    negative = OFTAdapter({path: replace(r, scale=-r.scale.abs())})  # type: ignore[union-attr]
    with pytest.raises(AdapterError, match="oft_s holds values that are not positive"):
        negative.scaled(0.5)
    zero = OFTAdapter({path: replace(r, scale=r.scale * 0)})  # type: ignore[operator]
    with pytest.raises(AdapterError, match="oft_s holds a zero"):
        zero.inverse()


def test_values_of_an_adapters_own_are_carried_or_refused() -> None:
    values = torch.randn(12)
    a = replace(adapter(12, 4, 0.1, 1), saved={"m.bias": values})
    b = adapter(12, 4, 0.1, 2)
    assert torch.equal(a.compose(b).saved["m.bias"], values)
    assert torch.equal(b.compose(a).saved["m.bias"], values)
    with pytest.raises(oftsurgery.MatchError, match=r"two adapters bring their own values.*tensor 'm.bias'"):
        a.compose(a.compose(b))
    for refused in (lambda: a.scaled(0.5), a.inverse, lambda: oftsurgery.blend([(b, 0.5), (a, 0.5)])):
        with pytest.raises(
            AdapterError, match=r"brings values of its own .*tensor 'm.bias'.*Remedy: leave these values out"
        ):
            refused()
    with pytest.raises(AdapterError, match="there is no adapter to blend"):
        oftsurgery.blend([])


def test_what_is_derived_keeps_the_origins_facts_where_they_agree() -> None:
    config = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM", "coft": True, "eps": 1.0, "bias": "none"}
    a = replace(adapter(12, 4, 0.1, 1), config=config, dialect="peft-0.17", sha256="0" * 64)
    b = replace(adapter(12, 4, 0.1, 2), config=config | {"task_type": "SEQ_CLS"})
    ab = a.compose(b)
    assert ab.config["base_model_name_or_path"] == "org/base"
    assert "task_type" not in ab.config
    assert "coft" not in ab.config  # its clamp is in the generators, and must not be applied again
    assert ab.source == "compose(seed 1, seed 2)"
    assert ab.sha256 is None
    assert ab.dialect == "peft-0.21"
    assert ab.fingerprint not in (a.fingerprint, b.fingerprint)


# --- against peft's own live layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", LEGACY)
def test_goldens_of_old_releases_become_adapters_of_todays_peft(variant: str, tmp_path: Path) -> None:
    """Each golden of ≤ 0.17 is refused with its reason, or loaded by the installed peft without a warning; its live
    weight is then the old release's own, to 1e-5, or for a truncated series to the residual that was stated."""
    old = oftsurgery.load_adapter(GOLDEN / variant)
    config = json.loads((GOLDEN / variant / "adapter_config.json").read_text())
    out = tmp_path / "converted"
    if old.dialect == "peft-0.13":
        with pytest.raises(
            AdapterError, match=r"a rotation of the outputs \(peft ≤ 0.13\).*module 'layers.0.down_proj'"
        ):
            old.save(out)
        assert not out.exists()
        return
    if any(r.scale is not None and bool((r.scale != 1).any()) for r in old.modules.values()):
        assert old.dialect == "peft-0.15"
        with pytest.raises(AdapterError, match=r"a trained scale of the outputs \(peft 0.14 and 0.15\).*oft_s"):
            old.save(out)
        assert not out.exists()
        without = {path: replace(r, scale=None) for path, r in old.modules.items()}
        replace(old, modules=without).save(out)
        scales = {path: r.scale for path, r in old.modules.items()}
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            residuals = old.save(out)
        assert bool(caught) == (max(residuals.values()) > 1e-12)
        assert not caught or f"{max(residuals.values()):.2e} at worst" in str(caught[0].message)
        scales = {}
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["use_cayley_neumann"] is False
    assert written["peft_version"] == "0.21.2"
    live = layers_of(live_peft(Tiny(base_of(variant)), out))
    assert set(live) == set(old.modules)
    effective = load_file(GOLDEN / variant / "effective.safetensors")
    base = base_of(variant)
    for path, layer in live.items():
        expected = effective[f"{path}.weight"]
        if scales:
            expected = expected / scales[path].unsqueeze(-1)
            assert relative(live_weight(layer), expected) <= 1e-5
            continue
        residual = residuals[path]
        if not config["use_cayley_neumann"]:
            assert residual == 0
        size = float(torch.linalg.vector_norm(base[f"{path}.weight"].double()))
        distance = float(torch.linalg.vector_norm(live_weight(layer).double() - expected.double()))
        assert distance <= residual * size + 1e-5 * size
        if residual > 1e-3:
            assert distance > 1e-5 * size, "the stated residual is not there"


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("peft-0.21")])
def test_saved_goldens_of_today_load_again(variant: str, tmp_path: Path) -> None:
    a = oftsurgery.load_adapter(GOLDEN / variant)
    exact = {path: r.exact()[0] for path, r in a.modules.items()}
    replace(a, modules=exact).save(tmp_path / "again")
    again = oftsurgery.load_adapter(tmp_path / "again")
    for path, r in exact.items():
        torch.testing.assert_close(again.modules[path].blocks, r.blocks, rtol=0, atol=1e-6)
        assert again.modules[path].shared == r.shared


class Net(nn.Module):
    """Two linears of other widths and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.up = nn.Linear(16, 24)
        self.inner = nn.ModuleDict({"up": nn.Linear(24, 24), "head": nn.Linear(24, 5)})

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.inner["up"](torch.relu(self.up(self.embed(tokens))))
        return self.inner["head"](x)


def trained_by_peft(model: nn.Module, folder: Path, seed: int, **settings_: object) -> Path:
    """An adapter that peft itself trains for three steps and saves."""
    torch.manual_seed(seed)
    config = OFTConfig(**({"r": 0, "use_cayley_neumann": False, "init_weights": False} | settings_))  # type: ignore[arg-type]
    live = get_peft_model(copy.deepcopy(model), config)
    optimizer = torch.optim.Adam([p for p in live.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        live(torch.randint(10, (8, 3))).square().sum().backward()
        optimizer.step()
    live.save_pretrained(folder)
    return folder


def test_a_composition_saved_is_peft_with_both_adapters_active(tmp_path: Path) -> None:
    model, tokens = Net(), torch.arange(10).reshape(2, 5)
    folders = [
        trained_by_peft(model, tmp_path / name, seed, oft_block_size=b, target_modules=["up", "embed"])
        for seed, (name, b) in enumerate((("a", 4), ("b", 8)))
    ]
    both = live_peft(copy.deepcopy(model), folders[0], "a")
    both.load_adapter(str(folders[1]), "b")
    both.base_model.set_adapter(["a", "b"])
    a, b = map(oftsurgery.load_adapter, folders)
    assert set(a.modules) == {"embed", "up", "inner.up"}
    a.compose(b).save(tmp_path / "ab")
    with torch.no_grad():
        torch.testing.assert_close(
            live_peft(copy.deepcopy(model), tmp_path / "ab")(tokens), both(tokens), rtol=1e-5, atol=1e-5
        )
        off = live_peft(copy.deepcopy(model), tmp_path / "ab")
        off.base_model.disable_adapter_layers()
        assert not torch.allclose(off(tokens), both(tokens), atol=1e-2)


def test_trained_biases_and_heads_survive_saving(tmp_path: Path) -> None:
    model, tokens = Net(), torch.arange(10).reshape(2, 5)
    folder = trained_by_peft(
        model, tmp_path / "a", 0, oft_block_size=4, target_modules=["up"], bias="all", modules_to_save=["head"]
    )
    a = oftsurgery.load_adapter(folder)
    assert set(a.saved) >= {"up.bias", "inner.head.weight", "inner.head.bias"}
    a.save(tmp_path / "again")
    with torch.no_grad():
        expected = live_peft(copy.deepcopy(model), folder)(tokens)
        torch.testing.assert_close(live_peft(copy.deepcopy(model), tmp_path / "again")(tokens), expected)
    again = oftsurgery.load_adapter(tmp_path / "again")
    assert again.saved.keys() == a.saved.keys()
    assert all(torch.equal(again.saved[n], t) for n, t in a.saved.items())


def test_saving_targets_these_modules_and_no_namesakes(tmp_path: Path) -> None:
    one = OFTAdapter({"up": rotation(16, 4, 0.1, 1)})
    one.save(tmp_path / "one")
    assert set(layers_of(live_peft(Net(), tmp_path / "one"))) == {"up"}  # and not inner.up


def test_block_sizes_of_many_modules_in_one_config(tmp_path: Path) -> None:
    same_count = OFTAdapter({"up": rotation(16, 4, 0.1, 1), "inner.up": rotation(24, 6, 0.1, 2)})
    same_count.save(tmp_path / "count")
    config = json.loads((tmp_path / "count" / "adapter_config.json").read_text())
    assert (config["r"], config["oft_block_size"]) == (4, 0)
    wider = OFTAdapter({"up": rotation(16, 8, 0.1, 1), "inner.up": rotation(24, 4, 0.1, 2)})
    wider.save(tmp_path / "wider")
    config = json.loads((tmp_path / "wider" / "adapter_config.json").read_text())
    assert (config["r"], config["oft_block_size"]) == (0, 8)
    for a, name in ((same_count, "count"), (wider, "wider")):
        live = layers_of(live_peft(Net(), tmp_path / name))
        for path, r in a.modules.items():
            weight = live[path].base_layer.weight
            assert relative(live_weight(live[path]), oftsurgery.fold_weight(weight.detach(), r)) < 1e-5
    apart = OFTAdapter({"up": rotation(16, 8, 0.1, 1), "inner.up": rotation(24, 6, 0.1, 2)})
    apart = replace(apart, modules={**apart.modules, "inner.head": rotation(24, 24, 0.1, 3)})
    with pytest.raises(AdapterError, match=r"the common size 24 does not divide the 16 features.*module 'up'"):
        apart.save(tmp_path / "apart")
    shares = OFTAdapter({"up": rotation(16, 8, 0.1, 1, shared=True), "inner.up": rotation(24, 6, 0.1, 2, shared=True)})
    with pytest.raises(AdapterError, match="shared blocks of sizes 6, 8"):
        shares.save(tmp_path / "apart")
    mixed = OFTAdapter({"up": rotation(16, 8, 0.1, 1, shared=True), "inner.up": rotation(24, 8, 0.1, 2)})
    with pytest.raises(AdapterError, match=r"some modules share one block .*module 'up'"):
        mixed.save(tmp_path / "apart")
    assert not (tmp_path / "apart").exists()


def test_shared_blocks_by_count_are_saved_by_count(tmp_path: Path) -> None:
    model = Net()
    folder = trained_by_peft(model, tmp_path / "a", 0, r=4, oft_block_size=0, block_share=True, target_modules=["up"])
    a = oftsurgery.load_adapter(folder).scaled(0.5)
    assert {r.block_size for r in a.modules.values()} == {4, 6}
    a.save(tmp_path / "half")
    live = layers_of(live_peft(copy.deepcopy(model), tmp_path / "half"))
    for path, r in a.modules.items():
        weight = live[path].base_layer.weight
        assert relative(live_weight(live[path]), oftsurgery.fold_weight(weight.detach(), r)) < 1e-5


def test_saving_is_whole_or_nothing_and_overwrites_only_when_asked(tmp_path: Path) -> None:
    a = adapter(16, 4, 0.1, 1)
    assert a.save(tmp_path / "a") == {"m": 0.0}
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(oftsurgery.StateError, match="the destination exists"):
        adapter(16, 4, 0.1, 2).save(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    adapter(16, 4, 0.1, 2).save(tmp_path / "a", force=True)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(oftsurgery.StateError, match="a file is in the place of a folder"):
        a.save(tmp_path / "a" / "adapter_config.json" / "where")


def test_what_peft_saves_is_what_we_save(tmp_path: Path) -> None:
    """Same files, fields and tensors as peft's own save of the same adapter, but for how the targets are named."""
    folder = trained_by_peft(Net(), tmp_path / "theirs", 0, oft_block_size=4, target_modules=["up"])
    oftsurgery.load_adapter(folder).save(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("theirs", "ours"))
    # init_weights: not what training began with, but what a load expects
    for name in ("target_modules", "peft_version", "init_weights"):
        theirs.pop(name), ours.pop(name)
    assert ours == theirs
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_half_precision_generators_are_saved_exactly(tmp_path: Path, write_adapter: Callable[..., Path]) -> None:
    folder = trained_by_peft(Net(), tmp_path / "a", 0, oft_block_size=4, target_modules=["up"])
    tensors = {k: v.bfloat16() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    a = oftsurgery.load_adapter(folder)
    a.save(tmp_path / "again")
    again = oftsurgery.load_adapter(tmp_path / "again")
    assert all(torch.equal(again.modules[p].generator, r.generator.float()) for p, r in a.modules.items())
