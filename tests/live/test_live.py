"""Live layers: against peft's own, against float64, through training, and in and out of the weights bit for bit."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import peft
import pytest
import torch
from independent import VARIANTS, Case, fold, make_case, make_layer, relative, seeded, stored_weight
from safetensors.torch import load_file, save_file
from snapshots import snapshot_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import oftsurgery
from oftsurgery import live
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.adapters.rotation import Cayley, Rotation
from oftsurgery.hashing import hash_tensors
from oftsurgery.stores.layers import Layer

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = sorted(p.parent.relative_to(GOLDEN).as_posix() for p in GOLDEN.glob("peft-*/*/adapter_config.json"))

QUANTISED = {
    "nf4": ("nf4", False),
    "nf4, double quantisation": ("nf4", True),
    "fp4": ("fp4", False),
    "int8": ("int8", False),
}


class Single(nn.Module):
    """A model of one layer, ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def unpackable(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights at eval forwards, as the live layers do: for the models that they
    are held against.
    """
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.support_avx512bf16_for_cpu = False
    return model


def one(
    variant: str = "0.21 Neumann", codec: str = "dense", in_features: int = 64, out_features: int = 96, **options: Any
) -> tuple[Single, Case]:
    return Single(make_layer(codec, in_features, out_features, **options)), make_case(
        variant, in_features, out_features
    )


def wrap(model: nn.Module, adapter: Any, **options: Any) -> Any:
    return live.wrap_model(model, adapter, **options)


def bits(module: nn.Module) -> dict[str, Any]:
    """Bytes, Parameter identities and quantisation states of a base layer."""
    return snapshot_of(module)[""][2]


def rotation(*shape: int, size: float = 0.05, seed: object = 0, **options: Any) -> Rotation:
    return Rotation(size * torch.randn(*shape, generator=seeded(shape, seed)), **options)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", GOLDENS)
def test_the_identity_gives_the_weight_that_each_release_computes(variant: str, training: bool) -> None:
    base = load_file((GOLDEN / variant).parent / "base.safetensors")
    effective = load_file(GOLDEN / variant / "effective.safetensors")
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    for name in ("q_proj", "up_proj", "down_proj"):
        weight, bias = base[f"layers.0.{name}.weight"], base.get(f"layers.0.{name}.bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        model.layers[0].add_module(name, linear)
    wrapped = wrap(model, oftsurgery.load_adapter(GOLDEN / variant)).train(training)
    for name in ("q_proj", "up_proj", "down_proj"):
        layer = wrapped.get_submodule(f"layers.0.{name}")
        assert type(layer) is live.Linear
        with torch.no_grad():
            bias = layer(torch.zeros(1, layer.base_layer.in_features))[0]
            weight = (layer(torch.eye(layer.base_layer.in_features)) - bias).T
        assert relative(weight, effective[f"layers.0.{name}.weight"]) < 1e-5
        torch.testing.assert_close(
            bias, effective.get(f"layers.0.{name}.bias", torch.zeros_like(bias)), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stored", ["dense", *QUANTISED])
def test_a_training_forward_is_the_float64_one(stored: str, variant: str) -> None:
    codec, nested = QUANTISED.get(stored, (stored, False))
    model, case = one(variant, codec, nested=nested)
    weight = stored_weight(model.layer)
    x = torch.randn(3, 5, 64)
    expected = x.double() @ case.live_weight(weight).T + model.layer.bias.detach().double()
    wrapped = wrap(model, case.adapter).train()
    assert type(wrapped.layer).__name__ == {"dense": "Linear", "int8": "Linear8bitLt"}.get(codec, "Linear4bit")
    assert relative(wrapped(x).detach(), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", ["dense", *QUANTISED])
def test_an_eval_forward_is_the_base_layer_of_the_rotated_input(stored: str, dtype: torch.dtype) -> None:
    codec, nested = QUANTISED.get(stored, (stored, False))
    model, case = one("0.21 exact", codec, nested=nested, dtype=dtype)
    unpackable(model).eval()
    x = torch.randn(4, 64).to(dtype)
    with torch.no_grad():
        expected = model.layer((x.double() @ case.dense).to(dtype))
        y = wrap(model, case.adapter)(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(
        y, expected, rtol=0, atol={torch.float32: 1e-5}.get(dtype, 0.03) * float(expected.abs().max())
    )


@pytest.mark.parametrize("stored", ["dense", *QUANTISED])
def test_autocast_rotates_in_float32(stored: str) -> None:
    codec, nested = QUANTISED.get(stored, (stored, False))
    model, case = one("0.21 exact", codec, nested=nested)
    wrapped = wrap(model, case.adapter).train()
    x = torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wrapped(x)
        plain = model.layer.train()((x.double() @ case.dense).float())
        rotated = wrapped.layer._before(x, wrapped.layer._chain())
    assert y.dtype == plain.dtype
    assert rotated.dtype == torch.float32
    assert relative(rotated.detach(), x.double() @ case.dense) < 1e-6
    assert relative(y.detach(), plain.detach()) < 1e-3
    y.float().square().sum().backward()
    assert float(wrapped.layer.oft_R["default"].weight.grad.abs().max()) > 0


def test_reduced_matmul_precision_around_a_training_step_keeps_the_dtypes() -> None:
    model, case = one(dtype=torch.bfloat16)
    wrapped = wrap(model, case.adapter)
    y = wrapped(torch.randn(2, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert wrapped.layer.oft_R["default"].weight.grad.dtype == torch.float32


# --- against peft -----------------------------------------------------------------------------------------------------


def conv(in_features: int, out_features: int) -> nn.Module:
    return nn.Conv2d(in_features, out_features, 1, stride=2)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "linear": (lambda: nn.Linear(64, 96), lambda: torch.randn(2, 7, 64), "Linear"),
    "nf4": (lambda: make_layer("nf4", 64, 96, nested=True), lambda: torch.randn(2, 7, 64), "Linear4bit"),
    "int8": (lambda: make_layer("int8", 64, 96), lambda: torch.randn(2, 7, 64), "Linear8bitLt"),
    "1×1 convolution": (lambda: conv(64, 96), lambda: torch.randn(2, 64, 4, 6), "Linear"),
    "embedding": (lambda: nn.Embedding(11, 64), lambda: torch.randint(0, 11, (2, 7)), "Embedding"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Neumann": {"use_cayley_neumann": True},
    "exact": {"use_cayley_neumann": False},
    "shared": {"block_share": True},
    "COFT": {"coft": True, "eps": 0.05},
}


def peft_model(model: nn.Module, folder: Path, *names: str, **settings: Any) -> Any:
    """peft's live model over a copy of ``model``, its adapters saved to ``folder/<name>``; train mode."""
    config = peft.OFTConfig(oft_block_size=16, target_modules=["layer"], init_weights=False, **settings)
    theirs = peft.get_peft_model(unpackable(copy.deepcopy(model)), config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    for name, p in theirs.named_parameters():
        if "oft_" in name:
            nn.init.normal_(p, std=0.05)
    theirs.save_pretrained(folder)
    return theirs.train()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_peft(kind: str, settings: str, tmp_path: Path) -> None:
    make, sample, name = KINDS[kind]
    model, x = Single(make()), sample()
    theirs = peft_model(model, tmp_path, "default", **SETTINGS[settings])
    ours = wrap(model, oftsurgery.load_adapter(tmp_path)).train()
    assert type(ours.layer).__name__ == name
    target = torch.randn_like(theirs(x))
    for step in range(2):
        gradients, outputs = [], []
        for m in (theirs, ours):
            y = m(x)
            (y - target).square().mean().backward()
            (parameter,) = [p for p in m.parameters() if p.requires_grad]
            outputs.append(y.detach())
            gradients.append(parameter.grad.clone())
            torch.optim.SGD([parameter], lr=0.1).step()
            parameter.grad = None
        assert relative(outputs[1], outputs[0]) < 2e-6, step
        assert relative(gradients[1], gradients[0]) < 2e-5, step


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpt2s_layers_are_rotated_on_their_own_sides(variant: str) -> None:
    # peft 0.21's OFT takes no Conv1D; fold does
    model, case = Single(Conv1D(96, 64)), make_case(variant, 64, 96)
    nn.init.normal_(model.layer.bias)
    x = torch.randn(2, 7, 64)
    expected = (
        x.double() @ case.live_weight(model.layer.weight.detach().T.double()).T + model.layer.bias.detach().double()
    )
    wrapped = wrap(model, case.adapter)
    assert type(wrapped.layer) is live.Linear
    assert relative(wrapped(x).detach(), expected) < 1e-6
    wrapped.layer.merge()
    assert relative(wrapped(x).detach(), expected) < 1e-6
    wrapped.layer.unmerge()
    assert wrapped.layer.base_layer.weight.shape == (64, 96)


@pytest.mark.parametrize("kind", ["linear", "nf4", "embedding"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("b",), ("c", "a", "b")], ids=",".join)
def test_several_active_adapters_are_pefts_chain(order: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    make, sample, _ = KINDS[kind]
    model, x = Single(make()), sample()
    theirs = peft_model(model, tmp_path, "a", "b", "c")
    theirs.base_model.set_adapter(list(order))
    ours = wrap(model, {name: oftsurgery.load_adapter(tmp_path / name) for name in "abc"})
    assert live.active_adapters(ours) == ["a", "b", "c"]
    live.set_adapter(ours, order)
    expected = theirs(x).detach()
    assert relative(ours(x).detach(), expected) < 1e-6
    if len(order) > 1:
        live.set_adapter(ours, order[::-1])
        assert relative(ours(x).detach(), expected) > 1e-2


@pytest.mark.parametrize("first", ["0.15 with oft_s", "0.13 output side"])
def test_a_merge_of_several_adapters_is_their_live_chain(first: str) -> None:
    model = Single(make_layer("dense", 64, 96))
    a, b = make_case(first, 64, 96), make_case("0.21 exact", 64, 96, size=0.1)
    wrapped = wrap(model, {"a": a.adapter, "b": b.adapter})
    x, w, bias = torch.randn(9, 64), stored_weight(model.layer), model.layer.bias.detach().double()
    wt = w.T @ a.dense if a.side == "output" else a.dense @ b.dense @ w.T * a.scale
    expected = x.double() @ (b.dense @ wt if a.side == "output" else wt) + bias
    assert relative(wrapped(x).detach(), expected) < 1e-6
    assert wrapped.layer.merge() == 0.0
    assert relative(wrapped(x).detach(), expected) < 1e-6
    assert relative(fold(model, live.read_live(wrapped))(x).detach(), expected) < 1e-6


def test_sides_that_do_not_commute_are_refused_as_fold_refuses_them() -> None:
    model = Single(make_layer("dense", 64, 96))
    a, b = make_case("0.15 with oft_s", 64, 96).adapter, make_case("0.13 output side", 64, 96).adapter
    text = r"one chain holds a scale \(oft_s, boft_s\) and a rotation on the output side: they do not commute"
    with pytest.raises(oftsurgery.MatchError, match=text):
        fold(model, [a, b])
    before = snapshot_of(model)
    with pytest.raises(oftsurgery.MatchError, match=rf"{text}.* \[module 'layer'\]"):
        wrap(model, {"a": a, "b": b}, inplace=True)
    assert snapshot_of(model) == before
    wrapped = wrap(model, {"a": a})
    wrapped.layer.set_adapter([])
    wrapped.layer.add_adapter("b", b.modules["layer"])  # beside it, not in one chain
    assert wrapped.layer.active_adapters == ["b"]
    for call in (wrapped.layer.set_adapter, lambda names: live.set_adapter(wrapped, names)):
        with pytest.raises(oftsurgery.MatchError, match=text):
            call(["a", "b"])
    assert wrapped.layer.active_adapters == ["b"]


# --- gradients and training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_float64(variant: str) -> None:
    model = Single(nn.Linear(8, 10)).double()
    wrapped = wrap(model, make_case(variant, 8, 10, size=0.3, b=4).adapter).double()
    parts = dict(wrapped.layer.oft_R.named_parameters())
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        changed = {f"layer.oft_R.{name}": value for name, value in zip(parts, values, strict=True)}
        return torch.func.functional_call(wrapped, changed, (x,))

    values = [p.detach().clone().requires_grad_() for p in parts.values()]
    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("before", ["fresh", "after eval forwards"])
@pytest.mark.parametrize("stored", QUANTISED)
def test_training_over_quantised_layers_learns(stored: str, before: str) -> None:
    codec, nested = QUANTISED[stored]
    # two layers, so that a gradient has to pass one of them
    model = nn.Sequential(
        make_layer(codec, 64, 64, nested=nested), nn.Tanh(), make_layer(codec, 64, 64, nested=nested)
    ).eval()
    x = torch.randn(32, 64)
    if before != "fresh":
        with torch.no_grad():
            model(x)
    cases = {path: make_case("0.21 Neumann", 64, 64, path=path, size=0.05) for path in ("0", "2")}
    modules = {path: case.adapter.modules[path] for path, case in cases.items()}
    with torch.no_grad():
        target = wrap(model, oftsurgery.OFTAdapter(modules)).train()(x)
    student = wrap(model, oftsurgery.OFTAdapter({path: rotation(4, 120, size=0.0) for path in ("0", "2")})).train()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(4, 120)] * 2
    optimiser = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(40):
        loss = (student(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(float(p.grad.abs().max()) > 0 for p in trained)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    student.eval()
    with torch.no_grad():
        student(x)  # bitsandbytes repacks plain 4-bit layers here, after which no gradient passes
    student.train()(x).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in trained)


def test_what_trains_is_folded() -> None:
    model, case = one("0.21 exact")
    wrapped = wrap(model, case.adapter)
    x, target = torch.randn(16, 64), torch.randn(16, 96)
    optimiser = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimiser.zero_grad()
        (wrapped(x) - target).square().mean().backward()
        optimiser.step()
    trained = live.adapter_of(wrapped)
    assert trained.fingerprint != case.adapter.fingerprint
    assert relative(fold(model, trained)(x).detach(), wrapped(x).detach()) < 1e-6
    assert relative(fold(live.unwrap(wrapped), live.read_live(wrapped))(x).detach(), wrapped(x).detach()) < 1e-6
    with torch.no_grad():
        wrapped.layer.oft_R["default"].weight.zero_()
    assert float(trained.modules["layer"].generator.abs().max()) > 0  # tensors of its own


@pytest.mark.parametrize("dialect", ["peft-0.13", "peft-0.15", "peft-0.17"])
def test_coft_keeps_a_trained_generator_in_its_ball(dialect: str) -> None:
    # eps, as formats.md bounds ‖Q‖_F: eps/√rows; eps·⌈out/r⌉²/√rows before 0.16
    config: dict[str, Any] = {"peft_type": "OFT", "coft": True, "eps": 1e-3}
    if dialect == "peft-0.17":
        config |= {"use_cayley_neumann": False}
        tensors, radius = {"oft_R.weight": torch.randn(4, 120)}, 1e-3 / 2
    elif dialect == "peft-0.15":
        config |= {"oft_block_size": 16, "r": 0}
        tensors, radius = {"oft_r": torch.randn(4, 16, 16), "oft_s": torch.ones(96, 1)}, 1e-3 * 24**2 / 2
    else:
        config |= {"r": 4}
        tensors, radius = {"oft_r": torch.randn(4, 24, 24)}, 1e-3 * 24**2 / 2
    adapter = parse_adapter(config, {f"base_model.model.layer.{k}": v for k, v in tensors.items()})
    assert adapter.dialect == dialect
    wrapped = wrap(Single(nn.Linear(64, 96)), adapter)
    parameter = wrapped.layer.oft_R["default"].weight
    with torch.no_grad():
        parameter.mul_(3)
    outside = parameter.detach().clone()
    wrapped.eval()(torch.randn(2, 64))
    assert torch.equal(parameter, outside)  # an eval forward changes no tensor, but computes inside
    norms = (2 * live.adapter_of(wrapped).modules["layer"].generator.double().square().sum(1)).sqrt()
    torch.testing.assert_close(norms, torch.full((4,), radius, dtype=torch.float64), rtol=1e-5, atol=0)
    wrapped.train()(torch.randn(2, 64)).sum().backward()
    norms = (2 * parameter.detach().double().square().sum(1)).sqrt()
    torch.testing.assert_close(norms, torch.full((4,), radius, dtype=torch.float64), rtol=1e-5, atol=0)


def test_module_dropout_replaces_blocks_in_training_only() -> None:
    layer = live.dispatch_bnb_4bit(
        make_layer("nf4", 64, 64), "default", oft_block_size=8, module_dropout=0.5, init_weights=False
    )
    assert layer is not None
    rotation_ = layer.oft_R["default"]
    eye = torch.eye(8)
    kept = [int((rotation_.train().blocks() - eye).abs().amax((1, 2)).gt(0).sum()) for _ in range(4)]
    assert kept == [4] * 4
    assert int((rotation_.eval().blocks() - eye).abs().amax((1, 2)).gt(0).sum()) == 8
    assert torch.equal(rotation_.train().rotation().generator, rotation_.weight)


# --- merge and unmerge ------------------------------------------------------------------------------------------------


def merge_cases() -> Iterator[Any]:
    for (stored, (codec, nested)), dtype in itertools.product(
        QUANTISED.items(), (torch.float32, torch.bfloat16, torch.float16)
    ):
        yield pytest.param(codec, nested, dtype, id=f"{stored}-{str(dtype).removeprefix('torch.')}")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield pytest.param("dense", False, dtype, id=str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    "when", ["fresh", "after eval forwards", "after training forwards", "base after eval forwards"]
)
@pytest.mark.parametrize(("codec", "nested", "dtype"), list(merge_cases()))
def test_merge_computes_the_fold_and_unmerge_restores_every_bit(
    codec: str, nested: bool, dtype: torch.dtype, when: str
) -> None:
    model, case = one("0.15 with oft_s", codec, nested=nested, dtype=dtype)
    x = torch.randn(6, 64).to(dtype)
    if when == "base after eval forwards":
        with torch.no_grad():
            model.eval()(x)
    wrapped = wrap(model, case.adapter).train(when == "after training forwards")
    folded = fold(model, live.adapter_of(wrapped), rounding="preserve")
    layer = wrapped.layer
    with torch.no_grad():
        if when.startswith("after"):
            wrapped(x)
        before, output = bits(layer.base_layer), wrapped(x)
        before = bits(layer.base_layer)  # an int8 layer's first forward moves its statistics
        error = layer.merge()
        assert layer.merged_adapters == ["default"]
        assert (error == 0) == (dtype in (torch.float32, torch.float64) and codec == "dense")
        merged, plain = (
            oftsurgery.stores.layers.Layer("", layer.base_layer).read()[0],
            oftsurgery.stores.layers.Layer("", folded.layer).read()[0],
        )
        assert merged.format == plain.format
        assert merged.fingerprint == plain.fingerprint
        assert layer.merge() == 0.0  # merged already
        merged_output = wrapped(x)
        assert relative(merged_output, output) < {"dense": 0.01, "int8": 0.02}.get(codec, 0.2)
        layer.unmerge()
        assert bits(layer.base_layer) == before
        assert torch.equal(wrapped(x), output)
        layer.unmerge()
        assert bits(layer.base_layer) == before


def test_a_copy_of_a_merged_model_unmerges_by_itself() -> None:
    for codec, nested in [("dense", False), *QUANTISED.values()]:
        model, case = one("0.21 exact", codec, nested=nested)
        wrapped = wrap(model, case.adapter).eval()
        x = torch.randn(5, 64)
        base = wrapped(x).detach()
        wrapped.layer.merge()
        merged = wrapped(x).detach()
        for copied in (copy.deepcopy(wrapped), oftsurgery.stores.model_copy.share_model(wrapped)):
            copied.layer.unmerge()
            assert torch.equal(copied(x), base)
            assert torch.equal(wrapped(x), merged)
            assert getattr(copied.layer.base_layer.weight, "module", None) in (None, copied.layer.base_layer)
        wrapped.layer.unmerge()
        assert torch.equal(wrapped(x), base)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["0.21 Neumann", "0.21 exact", "0.15 with oft_s"])
@pytest.mark.parametrize("stored", ["dense", *QUANTISED])
def test_nan_is_refused_and_nothing_changes(stored: str, variant: str, value: float, safe_merge: bool) -> None:
    codec, nested = QUANTISED.get(stored, (stored, False))
    model, case = one(variant, codec, nested=nested)
    wrapped = wrap(model, case.adapter)
    parameters = wrapped.layer.oft_R["default"]
    with torch.no_grad():
        (parameters.weight if parameters.scale is None else parameters.scale).view(-1)[3] = value
    before = snapshot_of(wrapped)
    with pytest.raises(oftsurgery.NonFiniteError, match=r"NaN or infinity.*module 'layer'.*Remedy: "):
        wrapped.layer.merge(safe_merge=safe_merge)
    with pytest.raises(oftsurgery.NonFiniteError, match=r"module 'layer'"):
        live.merge(wrapped, safe_merge=safe_merge)
    assert snapshot_of(wrapped) == before
    assert not wrapped.layer.merged


def test_a_merge_of_a_model_is_all_or_nothing() -> None:
    model = nn.Sequential(make_layer("nf4", 64), make_layer("nf4", 64))
    wrapped = wrap(model, oftsurgery.OFTAdapter({"0": rotation(4, 120), "1": rotation(4, 120)}))
    assert list(live.merge(wrapped)) == ["0", "1"]
    live.unmerge(wrapped)
    with torch.no_grad():
        wrapped[1].oft_R["default"].weight[0, 0] = float("nan")
    before = snapshot_of(wrapped)
    with pytest.raises(oftsurgery.NonFiniteError, match="module '1'"):
        live.merge(wrapped)
    assert not wrapped[0].merged
    # `merged_adapters` is a new empty list; all else is the very same
    assert {path: state[2:5] for path, state in snapshot_of(wrapped).items()} == {
        path: state[2:5] for path, state in before.items()
    }


# --- wrapping a model -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding tied to the head, a quantised linear with a trained bias between them, and a head to save."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 64)
        self.middle = make_layer("nf4", 64, 64, nested=True)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 13, bias=False)
        self.head.weight = self.embed.weight
        self.score = nn.Linear(64, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.middle(self.embed(ids)))
        return self.head(x), self.score(x)


def net_adapter(**config: Any) -> oftsurgery.OFTAdapter:
    g = seeded("net")
    tensors = {
        "embed.oft_embedding_R.weight": 0.1 * torch.randn(4, 120, generator=g),
        "middle.oft_R.weight": 0.1 * torch.randn(4, 120, generator=g),
        "middle.bias": torch.randn(64, generator=g),
        "score.weight": torch.randn(3, 64, generator=g),
        "score.bias": torch.randn(3, generator=g),
    }
    settings = {
        "peft_type": "OFT",
        "peft_version": "0.21.2",
        "use_cayley_neumann": True,
        "bias": "oft_only",
        "modules_to_save": ["score"],
        **config,
    }
    return parse_adapter(settings, {f"base_model.model.{k}": v for k, v in tensors.items()})


def test_a_wrap_is_pure_and_trains_the_adapter_alone() -> None:
    model, ids = Net(), torch.randint(0, 13, (4, 5))
    outputs = model.train()(ids)
    before = snapshot_of(model)
    wrapped = wrap(model, net_adapter())
    assert [type(m).__name__ for m in live.live_layers(wrapped).values()] == ["Embedding", "Linear4bit"]
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == {
        "embed.oft_R.default.weight",
        "middle.oft_R.default.weight",
        "middle.base_layer.bias",
        "score.weight",
        "score.bias",
    }
    optimiser = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    head, score = wrapped.train()(ids)
    (head.square().sum() + score.square().sum()).backward()
    optimiser.step()
    optimiser.step()
    assert snapshot_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model(ids), outputs, strict=True))
    assert (
        wrapped.embed.base_layer.weight is wrapped.head.weight
    )  # the head stays tied to the embedding that is rotated live alone


def test_trained_biases_heads_and_embeddings_are_the_folded_models() -> None:
    model, ids = Net(), torch.randint(0, 13, (4, 5))
    wrapped = wrap(model, net_adapter()).train()
    for layer in live.live_layers(wrapped).values():
        assert layer.weight is layer.base_layer.weight
    plain = copy.deepcopy(model)
    adapter = net_adapter()
    # an independent model: float64 weights, rotated by dense matrices
    from independent import skew

    def dense(path: str) -> Tensor:
        q = skew(adapter.modules[path].generator, 16)
        return torch.block_diag(*(torch.eye(16) + 2 * (q + q @ q + q @ q @ q) + q @ q @ q @ q))

    x = plain.embed.weight.detach().double()[ids] @ dense("embed")
    x = x @ dense("middle") @ stored_weight(plain.middle).T + adapter.saved["middle.bias"].double()
    x = nn.functional.layer_norm(x, (64,))
    expected = (
        x @ plain.embed.weight.detach().double().T,
        x @ adapter.saved["score.weight"].double().T + adapter.saved["score.bias"].double(),
    )
    for y, e in zip(wrapped(ids), expected, strict=True):
        assert relative(y.detach(), e) < 1e-5
    assert {k: v.tolist() for k, v in live.adapter_of(wrapped).saved.items()} == {
        k: v.tolist() for k, v in adapter.saved.items()
    }
    with torch.no_grad():
        wrapped.middle.base_layer.bias.add_(1)
    assert torch.equal(live.adapter_of(wrapped).saved["middle.bias"], adapter.saved["middle.bias"] + 1)


def test_inplace_wraps_the_model_itself_and_unwrap_takes_it_out() -> None:
    model, case = one("0.21 exact", "nf4")
    base = model.layer
    base.requires_grad_(False)  # as a wrap leaves it
    before = bits(base)
    x = torch.randn(3, 64)
    assert wrap(model, case.adapter, inplace=True) is model
    assert model.layer.base_layer is base
    assert base.support_avx512bf16_for_cpu is False
    with pytest.raises(
        oftsurgery.StateError,
        match=r"the model has a live adapter 'default' already.*Remedy: choose another adapter_name",
    ):
        wrap(model, case.adapter)
    assert live.unwrap(model, inplace=True) is model
    assert model.layer is base
    assert bits(base) == before
    assert base.support_avx512bf16_for_cpu == bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    assert torch.isfinite(model(x)).all()
    with pytest.raises(oftsurgery.StateError, match=r"carries no live layer.*Remedy: call oftsurgery.wrap"):
        live.unwrap(model)


def test_another_adapter_joins_those_that_are_live() -> None:
    model, x = Single(make_layer("dense", 64, 96)), torch.randn(3, 64)
    a, b = make_case("0.21 exact", 64, 96, size=0.1), make_case("0.21 Neumann", 64, 96, size=0.05)
    first = wrap(model, a.adapter, adapter_name="a")
    both = wrap(first, b.adapter, adapter_name="b")
    w, bias = stored_weight(model.layer), model.layer.bias.detach().double()
    assert live.active_adapters(both) == ["a", "b"]
    assert live.active_adapters(first) == ["a"]
    assert relative(both(x).detach(), x.double() @ a.dense @ b.dense @ w.T + bias) < 1e-6
    assert relative(first(x).detach(), x.double() @ a.dense @ w.T + bias) < 1e-6
    assert [f.modules["layer"].cayley.terms for f in live.read_live(both)] == [None, 5]
    live.set_adapter(both, "b")
    assert {n for n, p in both.named_parameters() if p.requires_grad} == {"layer.oft_R.b.weight"}
    assert relative(both(x).detach(), x.double() @ b.dense @ w.T + bias) < 1e-6
    both.layer.delete_adapter("b")
    assert relative(both(x).detach(), x.double() @ w.T + bias) < 1e-6


def test_disabled_adapters_leave_the_base() -> None:
    model, case = one("0.13 output side", "nf4")
    x = torch.randn(3, 64)
    with torch.no_grad():
        base = unpackable(model)(x)
        wrapped = wrap(model, case.adapter)
        wrapped.layer.merge()
        live.enable_adapters(wrapped, False)
        assert not wrapped.layer.merged
        assert wrapped.layer.disable_adapters
        assert torch.equal(wrapped(x), base)
        with pytest.raises(
            oftsurgery.StateError,
            match=r"the layer's adapters are disabled \[module 'layer'\] Remedy: call enable_adapters\(True\) first",
        ):
            wrapped.layer.merge()
        with pytest.raises(
            oftsurgery.StateError, match="the adapters are disabled, so the model computes what its base computes"
        ):
            live.read_live(wrapped)
        live.enable_adapters(wrapped, True)
        assert relative(wrapped(x), base) > 1e-2


def test_a_tied_embedding_merges_alone_and_is_tied_again() -> None:
    wrapped, ids = wrap(Net(), net_adapter()).eval(), torch.randint(0, 13, (4, 5))
    head, logits = wrapped.head.weight, wrapped(ids)[0].detach()
    bytes_ = head.detach().clone()
    live.merge(wrapped, adapter_names=["default"])
    assert wrapped.head.weight is head
    assert torch.equal(head, bytes_)
    assert wrapped.embed.base_layer.weight is not head
    assert relative(wrapped(ids)[0].detach(), logits) < 0.2  # the 4-bit layer was rounded
    live.unmerge(wrapped)
    assert wrapped.embed.base_layer.weight is head
    assert torch.equal(wrapped(ids)[0], logits)


PLACES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 64),
    "nf4": lambda: make_layer("nf4", 64, 64, nested=True),
    "int8": lambda: make_layer("int8", 64, 64),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_layer_in_two_places_is_live_in_the_one_that_the_adapter_names(kind: str, tmp_path: Path) -> None:
    shared = PLACES[kind]()
    model, x = unpackable(nn.Sequential(shared, nn.Tanh(), shared)), torch.randn(2, 64)
    config = peft.OFTConfig(oft_block_size=16, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    assert isinstance(theirs.base_model.model[2], type(shared))  # bare
    nn.init.normal_(theirs.base_model.model[0].oft_R["default"].weight, std=0.05)
    theirs.save_pretrained(tmp_path)
    expected, plain = theirs.train()(x).detach(), copy.deepcopy(model).train()(x).detach()
    before = snapshot_of(model)
    wrapped = wrap(model, oftsurgery.load_adapter(tmp_path)).train()
    assert snapshot_of(model) == before
    assert isinstance(wrapped[0], live.LiveLayer)
    assert wrapped[2] is not wrapped[0].base_layer
    assert type(wrapped[2]) is type(shared)
    assert list(live.live_layers(wrapped)) == ["0"]
    for model_ in (wrapped, copy.deepcopy(wrapped)):
        assert relative(model_(x).detach(), expected) < 2e-6
        live.merge(model_)
        assert relative(model_(x).detach(), expected) < (2e-6 if kind == "linear" else 0.2)
        assert relative(model_(x).detach(), plain) > 0.05
        live.unmerge(model_)
        assert relative(model_(x).detach(), expected) < 2e-6
        bare = live.unwrap(model_)
        assert bare[0] is bare[2]
        assert torch.equal(bare.train()(x), plain)


def test_each_place_of_a_layer_takes_an_adapter_of_its_own() -> None:
    shared = nn.Linear(64, 64)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(2, 64)
    a, b = make_case("0.21 exact", 64, 64, path="0"), make_case("0.21 Neumann", 64, 64, path="2", size=0.05)
    config = {"peft_type": "OFT", "bias": "oft_only"}
    adapter = oftsurgery.OFTAdapter(a.adapter.modules, {"0.bias": torch.randn(64)}, config=config)
    both = wrap(wrap(model, adapter, adapter_name="a"), b.adapter, adapter_name="b")
    w, bias = stored_weight(shared), adapter.saved["0.bias"].double()
    middle = torch.tanh(x.double() @ a.dense @ w.T + bias)  # peft trains the one bias, in both places
    assert relative(both(x).detach(), middle @ b.dense @ w.T + bias) < 1e-6
    assert both[0].base_layer.bias is both[2].base_layer.bias
    assert both[0].base_layer.weight is both[2].base_layer.weight
    live.merge(both)
    assert relative(both(x).detach(), middle @ b.dense @ w.T + bias) < 1e-6
    live.unmerge(both)
    assert live.unwrap(both, inplace=True)[0] is both[2]


def test_a_shared_parent_is_live_in_all_of_its_places() -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.Tanh())  # as ALBERT's
    model, x = nn.Sequential(block, block), torch.randn(2, 64)
    case = make_case("0.21 exact", 64, 64, path="0.0")
    wrapped = wrap(model, case.adapter)
    assert wrapped[0] is wrapped[1]
    w, bias = stored_weight(block[0]), block[0].bias.detach().double()
    expected = x.double()
    for _ in range(2):
        expected = torch.tanh(expected @ case.dense @ w.T + bias)
    assert relative(wrapped(x).detach(), expected) < 1e-6


def test_an_error_leaves_a_layer_in_two_places() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(64, 64, device="meta"))
    adapter = oftsurgery.OFTAdapter({"0": rotation(4, 120)}, {"3.bias": torch.zeros(64)})
    with pytest.raises(oftsurgery.StateError, match="offloaded or not loaded"):
        wrap(model, adapter, inplace=True)
    assert model[0] is shared
    assert model[2] is shared


class Padded(nn.Module):
    """An encoder of two layers, called with a padding mask, which makes torch's fast path take nested tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[0, -2:] = True
        return self.encoder(x, src_key_padding_mask=mask)[~mask]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # once a process, on the base's fast path
@pytest.mark.parametrize("layer", [0, 1])
def test_torchs_encoders_call_live_layers_in_eval_too(layer: int) -> None:
    model, x = Padded().eval(), torch.randn(2, 5, 16)
    names = [f"encoder.layers.{layer}.linear{i}" for i in (1, 2)]
    shapes = {names[0]: (4, 6), names[1]: (8, 6)}
    adapter = oftsurgery.OFTAdapter({name: rotation(*shapes[name], size=0.3) for name in names})
    wrapped = wrap(model, adapter)
    trained, plain = wrapped.train()(x).detach(), model.train()(x).detach()
    assert relative(trained, plain) > 0.05
    with torch.no_grad():
        fast = model.eval()(x)  # the base keeps its fast path
        assert relative(wrapped.eval()(x), trained) < 1e-6
        assert relative(copy.deepcopy(wrapped)(x), trained) < 1e-6
        live.merge(wrapped)
        assert relative(wrapped(x), trained) < 1e-6
        live.unmerge(wrapped)
        second = wrap(wrapped, oftsurgery.OFTAdapter({names[0]: rotation(4, 6, seed=1)}), adapter_name="second")
        live.set_adapter(second, "default")
        assert relative(second(x), trained) < 1e-6
    for model_ in (wrapped, second):
        encoder = live.unwrap(model_).encoder
        assert encoder.use_nested_tensor is True
        assert [m.activation_relu_or_gelu for m in encoder.layers] == [1, 1]
        with torch.no_grad():
            assert torch.equal(live.unwrap(model_).eval()(x), fast)


def test_a_failed_fold_leaves_encoders_as_they_were() -> None:
    wrapped = wrap(Padded(), oftsurgery.OFTAdapter({"encoder.layers.0.linear1": rotation(4, 6)}))
    undo = live.strip(wrapped)
    assert wrapped.encoder.use_nested_tensor is True
    for step in reversed(undo):
        step()
    assert wrapped.encoder.use_nested_tensor is False
    assert [m.activation_relu_or_gelu for m in wrapped.encoder.layers] == [0, 1]
    assert live.unwrap(wrapped).encoder.layers[0].activation_relu_or_gelu == 1


def test_an_attentions_out_proj_stays_as_it_is() -> None:
    # nn.MultiheadAttention reads its weight and never calls it
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    adapter = oftsurgery.OFTAdapter({"self_attn.out_proj": rotation(2, 28), "linear1": rotation(2, 28)})
    with pytest.warns(oftsurgery.IdleWarning, match=r"\(self_attn\.out_proj\)"):
        wrapped = wrap(model, adapter, inplace=True)
    assert list(live.live_layers(wrapped)) == ["linear1"]


def test_originals_of_replaced_tensors_are_known_by_their_hashes() -> None:
    model = Net()
    wrapped = wrap(model, net_adapter())
    # in the order in which the tensors were replaced, of the base's own values
    names = ("middle.bias", "score.weight", "score.bias")
    expected = {name: hash_tensors({name: model.get_parameter(name)}) for name in names}
    assert live.original_hashes(wrapped) == expected
    with torch.no_grad():
        wrapped.score.weight.add_(1)
    second = oftsurgery.OFTAdapter({"embed": rotation(4, 120, side="embedding")}, {"norm.weight": torch.randn(64)})
    expected["norm.weight"] = hash_tensors({"norm.weight": model.norm.weight})
    assert live.original_hashes(wrap(wrapped, second, adapter_name="second")) == expected
    assert live.original_hashes(copy.deepcopy(wrapped)) == {name: expected[name] for name in names}
    assert live.original_hashes(live.unwrap(wrapped)) == {}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_unfolding_a_folded_wrap_restores_what_the_adapter_replaced(inplace: bool) -> None:
    model = Net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wrapped = wrap(model, net_adapter())
    with torch.no_grad():
        wrapped.score.bias.add_(1)
    with pytest.warns(oftsurgery.RoundingWarning), pytest.warns(oftsurgery.UntieWarning):
        folded = oftsurgery.fold(wrapped, inplace=inplace)
    assert torch.equal(folded.score.bias, net_adapter().saved["score.bias"] + 1)
    restored = oftsurgery.unfold(folded, base=model)
    state = restored.state_dict()
    assert {name: t.tolist() for name, t in state.items()} == {name: t.tolist() for name, t in before.items()}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double quantisation"])
def test_a_repacked_base_keeps_its_format_through_wrap_and_fold(nested: bool, storage: torch.dtype) -> None:
    base = bnb.nn.Linear4bit(
        64, 96, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32, quant_storage=storage
    )
    model = Single(base.to("cpu")).eval()
    case = make_case("0.21 exact", 64, 96)
    expected = fold(model, case.adapter)
    expected_format = Layer("layer", expected.layer).read()[1]
    assert bool(expected_format.nested_blocksize) is nested
    assert expected_format.storage == storage
    weight, state = stored_weight(base), base.weight.quant_state
    base.weight.data, _ = bnbf._convert_weight_packed_for_cpu(base.weight.data, state)  # as a CPU eval forward does
    wrapped = wrap(model, case.adapter)
    x = torch.randn(3, 64)
    y = x.double() @ case.live_weight(weight).T + base.bias.detach()
    assert relative(wrapped.train()(x).detach(), y) < 4e-3  # packing has rounded absmax to bfloat16
    bare = live.unwrap(wrapped)
    assert Layer("layer", bare.layer).read()[1] == expected_format
    assert Layer("layer", bare.layer).repacked
    for result in (fold(wrapped, None), fold(bare, case.adapter), fold(copy.deepcopy(wrapped), None)):
        encoded, home = Layer("layer", result.layer).read()
        assert encoded.format == home == expected_format
        assert result.layer.weight.compress_statistics is nested
        assert result.layer.weight.quant_state.nested is nested
    wrapped.layer.merge()
    assert wrapped.layer.base_layer.weight.quant_state.nested is nested
    assert base.weight.quant_state.packing_format_for_cpu  # the model's own, untouched


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("stored", ["dense", *QUANTISED])
def test_what_is_wrapped_in_inference_mode_trains(stored: str, mode: Any) -> None:
    codec, nested = QUANTISED.get(stored, (stored, False))
    model, case = one(codec=codec, nested=nested)
    x, adapter = torch.randn(3, 64), oftsurgery.OFTAdapter(case.adapter.modules, {"layer.bias": torch.randn(96)})
    expected = wrap(model, adapter).train()(x)
    with mode():
        wrapped = wrap(model, adapter)
        wrapped.layer.add_adapter("more", rotation(4, 120, size=0.0))
    assert not any(p.is_inference() for p in wrapped.parameters())
    y = wrapped.train()(x)
    assert torch.equal(y, expected)
    y.square().mean().backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert set(trained) == {"layer.base_layer.bias", "layer.oft_R.default.weight", "layer.oft_R.more.weight"}
    assert all(float(p.grad.abs().max()) > 0 for p in trained.values())


def test_live_layers_have_their_base_layers_sizes() -> None:
    linear = live.Linear(nn.Linear(64, 96), "a", rotation(4, 120))
    assert (linear.in_features, linear.out_features) == (64, 96)
    embedding = live.Embedding(nn.Embedding(11, 64, padding_idx=3), "a", rotation(4, 120, side="embedding"))
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (11, 64, 3)
    convolution = live.Linear(nn.Conv2d(64, 96, 1, stride=2), "a", rotation(4, 120))
    assert (convolution.in_channels, convolution.out_channels) == (64, 96)
    assert (convolution.kernel_size, convolution.stride) == ((1, 1), (2, 2))
    assert not hasattr(linear, "num_embeddings")
    assert not hasattr(embedding, "in_features")


def test_layers_that_accelerate_offloads() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(3, 64)
    cases = {"0": make_case("0.13 output side", 64, 64, path="0"), "2": make_case("0.15 with oft_s", 64, 64, path="2")}
    adapter = oftsurgery.OFTAdapter({path: case.adapter.modules[path] for path, case in cases.items()})
    expected, base = wrap(model, adapter)(x).detach(), model(x).detach()
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert offloaded[0].weight.is_meta
    wrapped = wrap(offloaded, adapter)
    assert relative(wrapped(x).detach(), expected) < 1e-6
    live.merge(wrapped)
    copied = copy.deepcopy(wrapped)
    assert relative(wrapped(x).detach(), expected) < 1e-6
    live.unmerge(wrapped)
    assert relative(wrapped(x).detach(), expected) < 1e-6
    assert relative(copied(x).detach(), expected) < 1e-6
    live.enable_adapters(wrapped, False)
    assert torch.equal(wrapped(x), base)
    assert torch.equal(offloaded(x), base)


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "inplace"])
def test_a_compiled_model_is_wrapped(inplace: bool) -> None:
    model, case = one("0.21 Neumann")
    x = torch.randn(3, 64)
    expected = wrap(model, case.adapter)(x).detach()
    compiled = torch.compile(model, backend="eager")
    base = compiled(x).detach()
    wrapped = wrap(compiled, case.adapter, inplace=inplace)
    assert relative(wrapped(x).detach(), expected) < 1e-6
    assert relative(compiled(x).detach(), expected if inplace else base) < 1e-6


def test_an_adapter_that_joins_takes_on_the_layers_mode() -> None:
    model, case = one("0.21 exact")
    wrapped = wrap(model.eval(), case.adapter)
    wrapped.layer.add_adapter("b", rotation(4, 120))
    assert not any(m.training for m in wrapped.modules())


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["dense", "int8"])
@pytest.mark.parametrize("variant", ["0.15 with oft_s", "0.21 Neumann"])
def test_a_state_dict_round_trips(variant: str, stored: str, tmp_path: Path) -> None:
    model, case = one(variant, stored)
    wrapped = wrap(model, case.adapter).train()
    state = wrapped.state_dict()
    assert {k for k in state if "oft_R" in k} == {"layer.oft_R.default.weight"} | (
        {"layer.oft_R.default.scale"} if case.scale is not None else set()
    )
    assert {"layer.base_layer.weight", "layer.base_layer.bias"} < set(state)
    if stored == "dense":
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
        state = load_file(tmp_path / "model.safetensors")
    other, _ = one(variant, stored, generator=seeded("other"))
    fresh = wrap(other, make_case(variant, 64, 96, size=0.2).adapter).train()
    x = torch.randn(3, 64)
    fresh.load_state_dict(state)  # before a forward: bitsandbytes loads into int8 layers only then
    assert torch.equal(fresh(x), wrapped(x))


def test_adapter_keys_alone_load_into_a_4bit_model() -> None:
    model, case = one("0.21 exact", "nf4")
    wrapped = wrap(model, case.adapter).train()
    part = {k: v for k, v in wrapped.state_dict().items() if ".oft_R." in k}
    fresh = wrap(model, make_case("0.21 exact", 64, 96, size=0.2).adapter).train()
    assert fresh.load_state_dict(part, strict=False).unexpected_keys == []
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), wrapped(x))


def test_a_merged_state_dict_does_not_load_where_it_would_rotate_twice() -> None:
    model, case = one("0.21 exact")
    wrapped, other = wrap(model, case.adapter), wrap(model, case.adapter)
    plain = other.state_dict()
    wrapped.layer.merge()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "layer.merged"'):
        other.load_state_dict(wrapped.state_dict())
    before = bits(wrapped.layer.base_layer)
    with pytest.raises(
        oftsurgery.StateError,
        match=r"a state_dict does not load into a merged layer \[module 'layer'\] Remedy: call unmerge\(\) first",
    ):
        wrapped.load_state_dict(plain)
    assert bits(wrapped.layer.base_layer) == before


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_errors_are_those_of_fold_and_leave_the_model_as_it_was() -> None:
    good = rotation(4, 120)
    wrongs = {
        "a module that is not there": {"layer": good, "lost": good},
        "a shape that does not fit": {"layer": rotation(5, 120)},
        "an embedding's rotation on a linear": {"layer": rotation(4, 120, side="embedding")},
        "a scale that does not fit": {"layer": rotation(4, 120, scale=torch.ones(7))},
    }
    for what, modules in wrongs.items():
        for codec in ("dense", "nf4"):
            model = Single(make_layer(codec, 64, 96))
            with torch.no_grad():
                model.eval()(torch.randn(2, 64))
            before = snapshot_of(model)
            adapter = oftsurgery.OFTAdapter(modules)
            with pytest.raises(oftsurgery.OFTSurgeryError) as expected:
                oftsurgery.fold(model, adapter)
            for inplace in (False, True):
                with pytest.raises(type(expected.value)) as error:
                    wrap(model, adapter, inplace=inplace)
                assert str(error.value) == str(expected.value), what
                assert snapshot_of(model) == before, what


def test_an_error_halfway_leaves_the_model_as_it_was() -> None:
    model = Net().eval()
    with torch.no_grad():
        model(torch.randint(0, 13, (2, 3)))  # repacks the 4-bit layer, which a wrap lays out anew
    model.score.to("meta")
    before = snapshot_of(model)
    with pytest.raises(oftsurgery.StateError, match=r"cannot take an adapter's own values \[tensor 'score.weight'\]"):
        wrap(model, net_adapter(), inplace=True)  # found out when the layers are built and the bias has its new values
    assert snapshot_of(model) == before


def test_two_adapters_with_own_tensors_are_refused() -> None:
    wrapped = wrap(Net(), net_adapter(), adapter_name="a")
    before = snapshot_of(wrapped)
    other = oftsurgery.OFTAdapter({"middle": rotation(4, 120, seed=1)}, {"score.bias": torch.zeros(3)})
    with pytest.raises(
        oftsurgery.MatchError,
        match=r"two adapters bring their own values for one tensor \[tensor 'score.bias'\] Remedy: wrap only one",
    ):
        wrap(wrapped, other, adapter_name="b", inplace=True)
    after = snapshot_of(wrapped)
    assert after == before


def test_a_folded_adapter_and_peft_models_are_refused(tmp_path: Path) -> None:
    model, case = one("0.21 exact")
    with pytest.raises(oftsurgery.StateError, match="this adapter is folded into the model already"):
        wrap(fold(model, case.adapter), case.adapter)
    with pytest.raises(
        oftsurgery.StateError, match=r"carries live peft layers already Remedy: wrap the plain base model"
    ):
        wrap(peft_model(model, tmp_path, "default"), case.adapter)


Call = Callable[[Any], Any]
REFUSED: dict[str, tuple[Call, str]] = {
    "unknown adapter, layer": (
        lambda m: m.layer.set_adapter("x"),
        r"the layer has no adapter x \[module 'layer'\] Remedy: name one of a, b",
    ),
    "unknown adapter, model": (
        lambda m: live.set_adapter(m, "x"),
        r"the model has no live adapter x Remedy: name one of a, b",
    ),
    "twice, layer": (lambda m: m.layer.set_adapter(["a", "a"]), r"an adapter is named twice: a, a \[module 'layer'\]"),
    "twice, model": (lambda m: live.set_adapter(m, ["a", "a"]), r"an adapter is named twice: a, a Remedy"),
    "delete unknown": (lambda m: m.layer.delete_adapter("x"), r"the layer has no adapter x"),
    "merge unknown": (lambda m: m.layer.merge(adapter_names=["x"]), r"the layer has no adapter x"),
    "merge unknown, model": (lambda m: live.merge(m, adapter_names=["x"]), r"the model has no live adapter x"),
    "taken": (
        lambda m: m.layer.add_adapter("a", rotation(4, 120)),
        r"has an adapter 'a' already .* Remedy: choose another name",
    ),
    "dot": (
        lambda m: m.layer.add_adapter("a.b", rotation(4, 120)),
        r"an adapter cannot be named 'a.b' Remedy: choose a name without dots",
    ),
    "empty": (
        lambda m: m.layer.add_adapter("", rotation(4, 120)),
        r"an adapter cannot be named '' Remedy: choose a name without dots",
    ),
    **{
        name: (
            lambda m, name=name: m.layer.add_adapter(name, rotation(4, 120)),
            rf"an adapter cannot be named '{name}': torch.nn.ModuleDict, .* has an attribute of this name Remedy: choose another name",
        )
        for name in ("training", "keys", "pop", "forward", "_modules")
    },
    "reserved, model": (
        lambda m: wrap(m, make_case("0.21 exact", 64, 96).adapter, adapter_name="items"),
        r"an adapter cannot be named 'items': torch.nn.ModuleDict",
    ),
    "number": (
        lambda m: m.layer.add_adapter(3, rotation(4, 120)),
        r"an adapter's name is a string, not a int Remedy: give a string, as in adapter_name='default'",
    ),
    "number, model": (
        lambda m: wrap(m, {3: make_case("0.21 exact", 64, 96).adapter}),
        r"an adapter's name is a string, not a int",
    ),
    "which": (
        lambda m: live.adapter_of(m),
        r"the model has 2 live adapters, and none was named Remedy: name one of a, b",
    ),
    "adapter_of unknown": (lambda m: live.adapter_of(m, "x"), r"the model has no live adapter x"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    model, case = one("0.21 exact")
    wrapped = wrap(model, {"a": case.adapter, "b": make_case("0.21 Neumann", 64, 96).adapter})
    before, (call, text) = snapshot_of(wrapped), REFUSED[what]
    with pytest.raises(oftsurgery.StateError, match=text):
        call(wrapped)
    assert snapshot_of(wrapped) == before


def test_a_merged_layer_takes_no_other_merge_and_no_wrap() -> None:
    model, case = one("0.21 exact")
    second = make_case("0.21 Neumann", 64, 96)
    wrapped = wrap(model, {"a": case.adapter, "b": second.adapter})
    wrapped.layer.merge(adapter_names=["a"])
    with pytest.raises(
        oftsurgery.StateError,
        match=r"the layer has merged the adapters a, and cannot also merge a, b \[module 'layer'\] Remedy: call unmerge\(\) first",
    ):
        wrapped.layer.merge()
    for call in (live.strip, lambda m: wrap(m, case.adapter, adapter_name="c")):
        with pytest.raises(
            oftsurgery.StateError,
            match=r"the layer has merged the adapters a \[module 'layer'\] Remedy: call live.unmerge\(model\) first",
        ):
            call(wrapped)
    live.set_adapter(wrapped, [])
    assert not wrapped.layer.merged
    with pytest.raises(oftsurgery.StateError, match=r"the model has no active adapter"):
        live.read_live(wrapped)


def test_layers_that_disagree_are_told() -> None:
    wrapped = wrap(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)),
        oftsurgery.OFTAdapter({"0": rotation(4, 120), "1": rotation(4, 120)}),
    )
    wrapped[1].set_adapter([])
    with pytest.raises(
        oftsurgery.StateError, match=r"the model's layers have different active adapters \[module '1'\]"
    ):
        live.active_adapters(wrapped)


@pytest.mark.parametrize(
    ("cls", "base", "text"),
    [
        (
            live.Linear4bit,
            "dense",
            r"live.Linear4bit does not take a Linear .* Remedy: use live.Linear for this layer",
        ),
        (live.Linear8bitLt, "nf4", r"live.Linear8bitLt does not take a Linear4bit .* use live.Linear4bit"),
        (live.Linear, "int8", r"live.Linear does not take a Linear8bitLt .* use live.Linear8bitLt"),
        (live.Embedding, "dense", r"live.Embedding does not take a Linear"),
    ],
)
def test_each_class_takes_its_own_layers(cls: type[live.LiveLayer], base: str, text: str) -> None:
    with pytest.raises(oftsurgery.FormatError, match=text):
        cls(make_layer(base, 64), "default", rotation(4, 120))


def test_a_convolution_with_a_kernel_is_refused_by_name() -> None:
    with pytest.raises(oftsurgery.FormatError, match="a 3×3 convolution cannot be folded"):
        wrap(Single(nn.Conv2d(64, 64, 3)), oftsurgery.OFTAdapter({"layer": rotation(4, 120)}))


# --- dispatchers ------------------------------------------------------------------------------------------------------

DISPATCH = {"nf4": live.dispatch_bnb_4bit, "fp4": live.dispatch_bnb_4bit, "int8": live.dispatch_bnb_8bit}


@pytest.mark.parametrize("codec", DISPATCH)
def test_dispatchers_take_their_own_layers_alone(codec: str) -> None:
    mine, other = DISPATCH[codec], live.dispatch_bnb_8bit if codec != "int8" else live.dispatch_bnb_4bit
    flag = "loaded_in_8bit" if codec == "int8" else "loaded_in_4bit"
    layer = mine(make_layer(codec, 64), "default", oft_block_size=16)
    assert type(layer) is (live.Linear8bitLt if codec == "int8" else live.Linear4bit)
    assert layer.active_adapters == ["default"]
    assert other(make_layer(codec, 64), "default", oft_block_size=16) is None
    assert mine(make_layer(codec, 64), "default", oft_block_size=16, **{flag: False}) is None
    for target in (
        nn.Linear(64, 64),
        nn.Embedding(4, 64),
        nn.Conv2d(64, 64, 1),
        nn.LayerNorm(64),
        live.Linear(nn.Linear(64, 64), "x", rotation(4, 120)),
    ):
        assert mine(target, "default", oft_block_size=16, **{flag: True}) is None
    assert mine(layer, "second", oft_block_size=32) is layer
    assert layer.active_adapters == ["default", "second"]


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_dispatched_layers_compute_what_peft_computes(settings: str, codec: str, tmp_path: Path) -> None:
    model = Single(make_layer(codec, 64, 96))
    theirs = peft_model(model, tmp_path, "default", **SETTINGS[settings])
    config = theirs.peft_config["default"]
    # as OFTModel of peft 0.18 called its dispatchers, and as that of 0.20 did
    flat = {
        k: getattr(config, k)
        for k in ("r", "oft_block_size", "module_dropout", "coft", "eps", "block_share", "use_cayley_neumann")
    }
    flat |= {
        "num_cayley_neumann_terms": 5,
        "init_weights": True,
        "fan_in_fan_out": False,
        "loaded_in_8bit": codec == "int8",
        "loaded_in_4bit": codec == "nf4",
    }
    calls = [
        {"oft_config": config, "device_map": None, **flat},
        {"config": config, "r": config.r, "init_weights": True},
        {"config": config.to_dict(), "init_weights": True},
    ]
    x = torch.randn(5, 64)
    expected = theirs(x)
    for kw in calls:
        layer = DISPATCH[codec](copy.deepcopy(model.layer), "default", **kw)
        assert layer is not None
        (parameter,) = layer.oft_R.parameters()
        assert float(parameter.detach().abs().max()) == 0  # starts at the identity
        with torch.no_grad():
            parameter.copy_(theirs.base_model.model.layer.oft_R["default"].weight)
        assert relative(layer.train()(x).detach(), expected.detach()) < 1e-6


def test_a_dispatcher_takes_a_rotation() -> None:
    case = make_case("0.13 output side", 64, 96)
    base = make_layer("nf4", 64, 96)
    expected = case.live_weight(stored_weight(base))
    layer = live.dispatch_bnb_4bit(base, "default", rotation=case.adapter.modules["layer"], loaded_in_4bit=True)
    assert layer is not None
    x = torch.randn(3, 64)
    assert relative(layer.train()(x).detach(), x.double() @ expected.T + base.bias.detach().double()) < 1e-6


def test_a_layer_dispatched_before_it_is_quantised_is_quantised_by_moving() -> None:
    base = bnb.nn.Linear4bit(64, 96, quant_type="nf4")
    weight = base.weight.detach().clone()
    layer = live.dispatch_bnb_4bit(base, "default", rotation=make_case("0.21 exact", 64, 96).adapter.modules["layer"])
    assert layer is not None
    layer.to("cpu").train()
    assert base.weight.bnb_quantized
    assert relative(stored_weight(base), weight) < 0.15
    assert layer.merge() > 0
    layer.unmerge()


BLOCKS = [
    ({"oft_block_size": 16}, 100, 100 // 5, "oft_block_size` (16)! Adjusted `oft_block_size` to (20)"),
    ({"oft_block_size": 200}, 100, 100, "oft_block_size` (200)! Adjusted `oft_block_size` to (100)"),
    ({"oft_block_size": 0, "r": 3}, 64, 32, "r` (3)! Adjusted `r` to (2)"),
    ({}, 100, 10, "r` (8)! Adjusted `r` to (10)"),
]


@pytest.mark.parametrize(("settings", "features", "b", "text"), BLOCKS, ids=str)
def test_block_sizes_are_adjusted_as_peft_adjusts_them(
    settings: dict[str, Any], features: int, b: int, text: str
) -> None:
    theirs = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    wanted = settings.get("oft_block_size") or settings.get("r", 8)
    assert theirs(None, features, wanted) == (b if settings.get("oft_block_size") else features // b)
    with pytest.warns(UserWarning, match="Invalid `") as caught:
        layer = live.dispatch_bnb_8bit(make_layer("int8", features), "default", **settings)
    assert text in str(caught[0].message)
    assert layer.oft_R["default"].rotation().block_size == b


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "typo": (
        {"oft_blok_size": 8},
        oftsurgery.AdapterError,
        "the settings oft_blok_size are not known Remedy: give rotation, config, or some of r, oft_block_size",
    ),
    "both": (
        {"r": 4, "oft_block_size": 16},
        oftsurgery.AdapterError,
        "r = 4 and oft_block_size = 16: one of r and oft_block_size must be positive, the other 0",
    ),
    "neither": ({"r": 0, "oft_block_size": 0}, oftsurgery.AdapterError, "r = 0 and oft_block_size = 0"),
    "negative": ({"r": -4, "oft_block_size": 16}, oftsurgery.AdapterError, "r = -4 and oft_block_size = 16"),
    "one by one": (
        {"r": 64},
        oftsurgery.AdapterError,
        r"a rotation with blocks of size 1 is the identity \(r = 64, 64 features\)",
    ),
    "init": ({"init_weights": "random"}, oftsurgery.AdapterError, "init_weights = 'random' is neither True nor False"),
    "r, a fraction": (
        {"r": 2.5},
        oftsurgery.AdapterError,
        "r = '2.5' is not a whole number Remedy: give r = 8, peft's default",
    ),
    "r, text": ({"r": "x"}, oftsurgery.AdapterError, "r = 'x' is not a whole number"),
    "r, a flag": ({"r": True}, oftsurgery.AdapterError, "r = 'True' is not a whole number"),
    "block size, None": (
        {"oft_block_size": None},
        oftsurgery.AdapterError,
        "oft_block_size = 'None' is not a whole number",
    ),
    "terms, negative": (
        {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": -1},
        oftsurgery.AdapterError,
        "num_cayley_neumann_terms = '-1' is not a whole number from 0 to 1000 Remedy: give num_cayley_neumann_terms = 5, peft's default",
    ),
    "dropout": (
        {"r": 4, "module_dropout": 3},
        oftsurgery.AdapterError,
        "module_dropout = '3' is not a number from 0 to 1",
    ),
    "dropout, text": (
        {"r": 4, "module_dropout": "x"},
        oftsurgery.AdapterError,
        "module_dropout = 'x' is not a number from 0 to 1",
    ),
    **{
        f"eps {eps}": (
            {"r": 4, "coft": True, "eps": eps},
            oftsurgery.AdapterError,
            f"eps = '{eps}' is not a number of at least 0 Remedy: give eps = 6e-05, peft's default",
        )
        for eps in (-1, None, float("nan"), float("inf"))
    },
    "coft": (
        {"r": 4, "coft": "x"},
        oftsurgery.AdapterError,
        "coft = 'x' is neither True nor False Remedy: give coft = False, peft's default",
    ),
    "config": ({"config": {"r": "x"}}, oftsurgery.AdapterError, "r = 'x' is not a whole number"),
    "rotation, text": (
        {"rotation": "x"},
        oftsurgery.AdapterError,
        "rotation is a str, not an oftsurgery.Rotation Remedy: give an oftsurgery.Rotation",
    ),
    "rotation and more": (
        {"rotation": Rotation(torch.zeros(4, 120)), "r": 4},
        oftsurgery.AdapterError,
        "a rotation was given together with the settings of a new rotation",
    ),
    "too wide": (
        {"rotation": Rotation(torch.zeros(5, 120))},
        oftsurgery.ShapeError,
        "5 blocks of size 16 do not cover the 64 input features",
    ),
    "embedding": (
        {"rotation": Rotation(torch.zeros(4, 120), Cayley(), "embedding")},
        oftsurgery.MatchError,
        "a Linear4bit does not take a rotation on the embedding side",
    ),
}


@pytest.mark.parametrize("what", WRONG_SETTINGS)
def test_wrong_settings_are_refused(what: str) -> None:
    settings, error, text = WRONG_SETTINGS[what]
    base = make_layer("nf4", 64)
    before = snapshot_of(base)
    with pytest.raises(error, match=text):
        live.dispatch_bnb_4bit(base, "default", **settings)
    assert snapshot_of(base) == before


def test_the_layers_say_what_they_are() -> None:
    model, case = one("0.21 exact")
    wrapped = wrap(model, case.adapter)
    assert "active=['default']" in repr(wrapped)
    assert "4 blocks of 16, input side" in repr(wrapped)
    wrapped.layer.merge()
    assert "merged=['default']" in repr(wrapped)
    wrapped.layer.enable_adapters(False)
    assert "disabled" in repr(wrapped)
    assert json.dumps(live.adapter_of(wrapped).config["peft_type"]) == '"OFT"'
