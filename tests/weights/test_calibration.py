"""Calibrated rounding: the sweep against a column-by-column one in float64, what the hooks gather against hooks of our
own, and whole folds against the live layers.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import oftsurgery
from oftsurgery import CalibrationError, CalibrationWarning, RoundingWarning, StateError
from oftsurgery.calibrate import layer_inputs, recorder
from oftsurgery.calibrate.batches import read_batches
from oftsurgery.folding.engine import _warn_of_rounding as warn_of_rounding
from oftsurgery.folding.plan import plan_changes
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.formats.levels import LEVELS
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.weights import sweep
from oftsurgery.weights.calibrate import LayerInputs, fold_calibrated, make_least
from oftsurgery.weights.sweep import Rows, damp

FORMATS = {
    "nf4": WeightFormat("nf4", (24, 128), blocksize=64),
    "nf4, double quantisation": WeightFormat("nf4", (24, 128), blocksize=64, nested_blocksize=256),
    "nf4 over rows": WeightFormat("nf4", (24, 96), blocksize=64),
    "nf4, a short last block": WeightFormat("nf4", (5, 33), blocksize=64),
    "nf4 in bfloat16 storage": WeightFormat("nf4", (24, 128), blocksize=64, storage=torch.bfloat16),
    "fp4": WeightFormat("fp4", (24, 128), blocksize=128),
    "int8": WeightFormat("int8", (24, 128), torch.float16),
}


@pytest.fixture(autouse=True)
def _no_rounding_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        yield


def correlated(tokens: int, features: int, *, seed: int = 0, strength: float = 1.0) -> Tensor:
    """Inputs as layers have them: correlated, and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(99)) / features**0.5
    sizes = torch.logspace(-1, 1, features)[torch.randperm(features, generator=torch.Generator().manual_seed(98))]
    return (torch.randn(tokens, features, generator=generator) * sizes) @ (torch.eye(features) + strength * mix)


# --- the sweep --------------------------------------------------------------------------------------------------------


def compensate(exact: Tensor, start: EncodedWeight, hessian: Tensor, *, damping: float) -> EncodedWeight | None:
    """The sweep alone."""
    numbers = sweep.compensate(Rows.of(start, exact), damp(hessian, damping))
    return None if numbers is None else codecs.with_levels(start, numbers)


def by_hand(exact: Tensor, start: EncodedWeight, hessian: Tensor, damping: float) -> Tensor:
    """The stored values that compensation gives, in float64 and column by column, each with an inverse of its own of
    what is left of H.
    """
    f = start.format
    rows, features = f.shape
    if f.codec == "int8":
        levels = torch.arange(-127, 128, dtype=torch.float64) / 127
        scales = start.tensors["SCB"].double().unsqueeze(1).expand(rows, features)
    else:
        levels = torch.tensor(LEVELS[f.codec], dtype=torch.float64)
        levels = levels / levels.abs().max()
        blocks = start.scales.double()
        scales = blocks.repeat_interleave(f.blocksize)[: rows * features].reshape(rows, features)
    h = hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    left, stored = exact.double().clone(), torch.empty(rows, features, dtype=torch.float64)
    columns = sorted(range(features), key=lambda c: -float(hessian[c, c]))
    for done, c in enumerate(columns):
        values = scales[:, c : c + 1] * levels
        stored[:, c] = values.gather(1, (values - left[:, c : c + 1]).abs().argmin(1, keepdim=True)).squeeze(1)
        rest = columns[done:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        left[:, rest] -= torch.outer((left[:, c] - stored[:, c]) / inverse[0, 0], inverse[0])
    return stored


@pytest.mark.parametrize("name", FORMATS)
def test_the_sweep_is_the_columnwise_one(name: str) -> None:
    f = FORMATS[name]
    rows, features = f.shape
    exact, x = torch.randn(f.shape), correlated(400, features)
    hessian = x.t() @ x
    start = codecs.encode(exact, f, "mse")
    new = compensate(exact, start, hessian, damping=0.05)
    assert new is not None
    expected = by_hand(exact, start, hessian, 0.05)
    # a tie that float32 breaks in another way goes on along its row
    same = (codecs.decode(new).double() - expected).abs() <= 1e-5 * expected.abs().max()
    assert same.double().mean() > 0.99
    assert same.all(1).sum() >= rows - 1
    # in the same format, on the same statistics, and better by far than what it started from
    assert new.format == start.format
    assert new.tensors["weight"].shape == start.tensors["weight"].shape
    assert new.tensors["weight"].dtype == start.tensors["weight"].dtype
    for tensor in set(start.tensors) - {"weight"}:
        assert torch.equal(new.tensors[tensor], start.tensors[tensor])
    fresh = correlated(400, features, seed=1).double()
    before = (fresh @ (codecs.decode(start).double() - exact.double()).t()).norm()
    after = (fresh @ (codecs.decode(new).double() - exact.double()).t()).norm()
    assert after < 0.8 * before


def test_more_columns_than_one_group() -> None:
    f = WeightFormat("nf4", (3, 320), blocksize=64)
    exact, x = torch.randn(f.shape), correlated(900, 320)
    start = codecs.encode(exact, f, "mse")
    new = compensate(exact, start, x.t() @ x, damping=0.05)
    assert new is not None
    expected = by_hand(exact, start, x.t() @ x, 0.05)
    assert ((codecs.decode(new).double() - expected).abs() < 1e-5 * expected.abs().max()).double().mean() > 0.95


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    f = FORMATS["nf4"]
    exact = torch.randn(f.shape)
    start = codecs.encode(exact, f, "mse")
    new = compensate(exact, start, torch.diag(torch.rand(f.shape[1]) + 0.1), damping=0.05)
    assert new is not None
    assert torch.equal(codecs.decode(new), codecs.decode(start))


def test_blocks_of_zeros_and_inputs_of_zeros() -> None:
    f = FORMATS["nf4"]
    exact = torch.randn(f.shape)
    exact[0] = 0.0
    x = correlated(300, f.shape[1])
    x[:, 5:40] = 0.0
    new = compensate(exact, codecs.encode(exact, f, "mse"), x.t() @ x, damping=0.05)
    assert new is not None
    assert bool(torch.isfinite(codecs.decode(new)).all())
    assert not codecs.decode(new)[0].any()


def test_a_hessian_that_cannot_be_factorised_is_said_and_not_used() -> None:
    f = FORMATS["nf4"]
    exact = torch.randn(f.shape)
    assert compensate(exact, codecs.encode(exact, f), torch.zeros(128, 128), damping=0.05) is None
    rotation = oftsurgery.Rotation(generator=torch.zeros(4, 32 * 31 // 2))
    x = correlated(50, 128)
    folded = fold_calibrated(codecs.encode(exact, f), [rotation], f, LayerInputs(-x.t() @ x, 50, x))
    assert folded.rounding == "preserve"
    assert folded.uncalibrated == "the Hessian of the inputs cannot be factorised"


def test_a_hessian_near_the_limit_of_float32_is_factorised_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # two inputs that are all but one, and hardly any damping
    base = torch.randn(200, 64, dtype=torch.float64)
    x = torch.cat([base, base + 1e-5 * torch.randn(200, 64, dtype=torch.float64)], 1)
    f = WeightFormat("nf4", (8, 128), blocksize=64)
    exact = torch.randn(f.shape)
    dtypes = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: dtypes.append(h.dtype) or original(h))  # type: ignore[func-returns-value]
    hessian = (x.t() @ x).float()
    new = compensate(exact, codecs.encode(exact, f, "mse"), hessian, damping=1e-7)
    assert dtypes == [torch.float32, torch.float64]
    assert new is None or bool(torch.isfinite(codecs.decode(new)).all())


def test_the_hessian_must_fit() -> None:
    f = FORMATS["nf4"]
    exact = torch.randn(f.shape)
    with pytest.raises(oftsurgery.ShapeError, match=r"does not fit the weight \[shape 96×96, expected 128×128\]"):
        make_least(exact, codecs.encode(exact, f), torch.eye(96), torch.eye(96), torch.eye(96))


# --- a model ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three layers that share an input, one that follows them, one that nobody calls, and a dense one."""

    def __init__(self, kind: str) -> None:
        super().__init__()

        def linear(features: int, out: int) -> nn.Module:
            if kind == "int8":
                return bnb.nn.Linear8bitLt(features, out, has_fp16_weights=False)
            return bnb.nn.Linear4bit(
                features,
                out,
                quant_type=kind.split()[0],
                compress_statistics="double" in kind,
                compute_dtype=torch.float32,
            )

        self.q, self.k, self.v = (linear(128, 128) for _ in range(3))
        self.down = linear(128, 64)
        self.idle = linear(128, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mixed = self.q(hidden) + torch.tanh(self.k(hidden)) * self.v(hidden)
        return self.head(torch.relu(self.down(mixed)))


PATHS = ("q", "k", "v", "down", "idle", "head")


def build(kind: str = "nf4 double") -> nn.Module:
    torch.manual_seed(0)
    return Attention(kind).to("cpu").eval()


@pytest.fixture
def adapter(write_adapter: Callable[..., Path], oft_config: Callable[..., dict[str, Any]]) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{path}.oft_R.weight": 0.05
        * torch.randn((64 if path == "head" else 128) // 32, 32 * 31 // 2, generator=generator)
        for path in PATHS
    }
    return write_adapter(tensors, oft_config(oft_block_size=32, target_modules=list(PATHS)))


def batches(count: int = 8, size: int = 8, length: int = 24, *, seed: int = 0) -> list[dict[str, Tensor]]:
    x = correlated(count * size * length, 128, seed=seed, strength=3.0).reshape(count, size, length, 128) / 10
    return [{"hidden": batch} for batch in x]


def distance(model: nn.Module, live: nn.Module, data: Sequence[dict[str, Tensor]]) -> float:
    """Relative error of all outputs together."""
    with torch.no_grad():
        a, b = (torch.cat([m.eval()(**batch) for batch in data]).double() for m in (model, live))
    return float((a - b).norm() / b.norm())


def in_float32(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """The same weights in plain float32 layers: int8 ones round what they are given as well, and no weight makes up for
    that.
    """
    plain = copy.deepcopy(model)
    for path in PATHS[:-1]:
        old = plain.get_submodule(path)
        new = nn.Linear(old.in_features, old.out_features)
        new.weight.data, new.bias.data = codecs.decode(_read(model, path)), old.bias.data.float()
        setattr(plain, path, new)
    return plain


def calibrated(*args: Any, **kwargs: Any) -> Any:
    """A fold of which ``idle`` alone is not calibrated."""
    with pytest.warns(
        CalibrationWarning, match=r"^1 of 6 weights are not calibrated.*\(idle: the model never multiplies"
    ):
        return oftsurgery.fold(*args, **kwargs)


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4", "int8"])
def test_a_calibrated_fold_is_nearer_to_the_live_model(kind: str, adapter: Path) -> None:
    from peft import PeftModel

    model = in_float32(build(kind))
    as_it_is = dequantised if kind == "int8" else copy.deepcopy
    live = PeftModel.from_pretrained(as_it_is(model), adapter).eval()
    held_out = batches(3, seed=7)
    nearest = oftsurgery.fold(model, adapter, rounding="nearest")
    folded = calibrated(model, adapter, calibration=batches())
    far, near = (distance(as_it_is(m), live, held_out) for m in (nearest, folded))
    assert near < 0.65 * far
    assert distance(folded, PeftModel.from_pretrained(copy.deepcopy(model), adapter), held_out) < 0.02 + near
    record = folded.oftsurgery
    assert record.rounding == "calibrated"
    for path in ("q", "k", "v", "down"):
        module = record.modules[path]
        assert (module.rounding, module.uncalibrated) == ("calibrated", None)
        assert module.output_error < 0.8 * module.output_nearest
        assert module.rho is not None
        # it is judged by the outputs: the weight itself may be farther off than with plain rounding
        assert module.nearest == pytest.approx(nearest.oftsurgery.modules[path].error, rel=1e-3)
        exact = oftsurgery.fold_weight(
            codecs.decode(_read(model, path)), oftsurgery.load_adapter(adapter).modules[path]
        )
        stored = codecs.decode(_read(folded, path))
        assert module.error == pytest.approx(float((stored - exact).norm() / exact.norm()), rel=1e-3)
    assert record.modules["idle"].rounding == ("nearest" if kind == "int8" else "grid")  # a strong one
    assert record.modules["idle"].output_error is None
    assert record.modules["head"].rounding == "nearest"
    assert record.modules["head"].uncalibrated is None
    assert oftsurgery.FoldRecord.from_dict(json.loads(record.to_json())) == record
    # out again, to the last bit
    base = oftsurgery.unfold(folded, base=model)
    assert all(_read(base, path).fingerprint == _read(model, path).fingerprint for path in PATHS)


def _read(model: nn.Module, path: str) -> EncodedWeight:
    from oftsurgery.stores.layers import Layer

    return Layer(path, model.get_submodule(path)).read()[0]


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_the_model_is_left_as_it_was(kind: str, adapter: Path, snapshot: Callable[[nn.Module], object]) -> None:
    model = build(kind)  # as bitsandbytes makes it: on some CPUs a forward would repack it
    before = snapshot(model)
    folded = calibrated(model, adapter, calibration=batches(2))
    assert snapshot(model) == before
    assert not any(m._forward_pre_hooks for m in folded.modules())
    again = calibrated(model, adapter, calibration=batches(2))
    within = calibrated(model, adapter, calibration=batches(2), inplace=True)
    assert within is model
    for path in PATHS:
        prints = {_read(m, path).fingerprint for m in (folded, again, within)}
        assert len(prints) == 1, path


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("what", ["NaN", "a batch that does not fit"])
def test_after_an_error_the_model_is_as_it_was(
    inplace: bool, what: str, adapter: Path, snapshot: Callable[[nn.Module], object]
) -> None:
    model = build()
    bad = batches(3)
    if what == "NaN":
        bad[1]["hidden"][0, 0, 0] = torch.nan
    else:
        bad[2] = {"hidden": torch.zeros(2, 3, 5)}
    before = snapshot(model)
    message = {
        "NaN": r"inputs of this layer hold NaN, infinity or values that overflow \[module 'q'\] Remedy: check the calibration",
        "a batch that does not fit": r"the model does not take calibration batch 2: .* Remedy: give batches that the model's forward takes",
    }[what]
    with pytest.raises(CalibrationError, match=message):
        oftsurgery.fold(model, adapter, calibration=bad, inplace=inplace)
    assert snapshot(model) == before


def test_an_error_half_way_through_the_layers(
    adapter: Path, snapshot: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from oftsurgery.weights import calibrate as calibration

    model, done = build(), []
    original = calibration.compensate

    def fails(*args: Any, **kwargs: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(calibration, "compensate", fails)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        oftsurgery.fold(model, adapter, calibration=batches(2), inplace=True)
    assert snapshot(model) == before


def test_live_and_wrapped_models(adapter: Path) -> None:
    from peft import PeftModel

    model = in_float32(build())
    plain = calibrated(model, adapter, calibration=batches(2))
    live = PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
    from_live = calibrated(live, calibration=batches(2))
    from_wrapped = calibrated(oftsurgery.wrap(model, adapter), calibration=batches(2))
    for path in PATHS:
        prints = {_read(m, path).fingerprint for m in (plain, from_live, from_wrapped)}
        assert len(prints) == 1, path
    with torch.no_grad():  # the live model computes as before
        assert torch.isfinite(live(**batches(1)[0])).all()


def test_the_rounding_warning_states_what_it_brought(adapter: Path) -> None:
    folded = calibrated(build(), adapter, calibration=batches(2))
    measured = [m for m in folded.oftsurgery.modules.values() if m.output_error is not None]
    ours, plain = sorted(m.output_error for m in measured)[2], sorted(m.output_nearest for m in measured)[2]
    said = f"; outputs on held-out inputs: {ours:.2%} in the median, {plain:.2%} with plain rounding; the fold's record"
    with pytest.warns(RoundingWarning, match=re.escape(said)):
        warn_of_rounding(folded.oftsurgery)


def test_two_adapters_are_calibrated_on_their_chain(
    write_adapter: Callable[..., Path], oft_config: Callable[..., dict[str, Any]]
) -> None:
    model = in_float32(build())
    folders = [
        write_adapter(
            {
                f"base_model.model.{path}.oft_R.weight": 0.05 * torch.randn(4, 32 * 31 // 2)
                for path in ("q", "k", "v", "down")
            },
            oft_config(oft_block_size=32),
            name=f"adapter-{i}",
        )
        for i in range(2)
    ]
    both = [oftsurgery.load_adapter(folder) for folder in folders]
    live = oftsurgery.wrap(oftsurgery.wrap(model, both[0], adapter_name="a"), both[1], adapter_name="b")
    held_out = batches(3, seed=7)
    nearest = oftsurgery.fold(model, both, rounding="nearest")
    folded = oftsurgery.fold(model, both, calibration=batches())
    assert {m.rounding for m in folded.oftsurgery.modules.values()} == {"calibrated"}
    assert distance(folded, live, held_out) < 0.65 * distance(nearest, live, held_out)


# --- falling back -----------------------------------------------------------------------------------------------------


def test_where_it_is_worse_on_held_out_inputs_the_layer_falls_back(adapter: Path) -> None:
    """What is gathered lies in a few directions that what is held out avoids: learnt by heart, of no use."""
    count = 16
    held_out = recorder.held_out_sequences(count)
    assert int(held_out.sum()) == 2
    known = torch.randn(8, 128)
    sequences = [
        torch.randn(24, 128) if held_out[i] else 100 * torch.randn(24, 8) @ known + torch.randn(24, 128)
        for i in range(count)
    ]
    model = build("nf4")
    with pytest.warns(CalibrationWarning) as caught:
        folded = oftsurgery.fold(model, adapter, calibration=[{"hidden": s.unsqueeze(0)} for s in sequences])
    worse = [
        p
        for p, m in folded.oftsurgery.modules.items()
        if (m.uncalibrated or "").startswith("the error on held-out inputs is worse")
    ]
    assert "q" in worse
    assert f"{len(worse) + 1} of 6 weights are not calibrated, but rounded without data" in str(caught[0].message)
    assert "q: the error on held-out inputs is worse, " in str(caught[0].message)
    plain = oftsurgery.fold(model, adapter, rounding="preserve")
    for path in worse:
        module = folded.oftsurgery.modules[path]
        assert module.rounding == plain.oftsurgery.modules[path].rounding == "grid"  # strong ones
        assert module.output_error is not None
        assert _read(folded, path).fingerprint == _read(plain, path).fingerprint


def test_an_embedding_is_named(write_adapter: Callable[..., Path], oft_config: Callable[..., dict[str, Any]]) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = bnb.nn.Embedding4bit(100, 64, quant_type="nf4")
            self.up = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32)

        def forward(self, ids: Tensor) -> Tensor:
            return self.up(self.embed(ids).float())

    tensors = {
        "base_model.model.embed.oft_embedding_R.weight": 0.05 * torch.randn(2, 32 * 31 // 2),
        "base_model.model.up.oft_R.weight": 0.05 * torch.randn(2, 32 * 31 // 2),
    }
    folder = write_adapter(tensors, oft_config(oft_block_size=32))
    ids = [torch.randint(0, 100, (4, 20)) for _ in range(8)]
    with pytest.warns(
        CalibrationWarning, match=r"embed: the model never multiplies inputs by this weight on the calibration\)"
    ):
        folded = oftsurgery.fold(Words().to("cpu").eval(), folder, calibration=ids)
    rounding = {path: m.rounding for path, m in folded.oftsurgery.modules.items()}
    assert rounding == {"embed": "grid", "up": "calibrated"}


def test_a_warning_as_an_error_leaves_the_model_as_it_was(
    adapter: Path, snapshot: Callable[[nn.Module], object]
) -> None:
    model = build()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        with pytest.raises(CalibrationWarning):
            oftsurgery.fold(model, adapter, calibration=batches(2), inplace=True)
    assert snapshot(model) == before


def test_a_calibration_of_a_plain_model_is_refused(
    write_adapter: Callable[..., Path], oft_config: Callable[..., dict[str, Any]]
) -> None:
    folder = write_adapter(
        {"base_model.model.0.oft_R.weight": torch.full((2, 496), 0.01)}, oft_config(oft_block_size=32)
    )
    model = nn.Sequential(nn.Linear(64, 8))
    before = model[0].weight.clone()
    with pytest.raises(
        oftsurgery.StateError, match=r"this fold writes no such weight Remedy: leave out the calibration"
    ):
        oftsurgery.fold(model, folder, calibration=torch.randn(9, 64), inplace=True)
    assert torch.equal(model[0].weight, before)


# --- what is gathered -------------------------------------------------------------------------------------------------


def gathered(
    model: nn.Module, adapter: Path, data: Any, paths: Sequence[str] = ("q", "k", "v", "down", "idle"), **kw: Any
) -> dict[str, LayerInputs | None]:
    adapters = [oftsurgery.load_adapter(adapter)]
    plan_changes(LiveStore(model), adapters)
    calibration = layer_inputs.Calibration(model, adapters, paths, read_batches(data), **kw)
    return {path: calibration(path) for path in paths}


def listened(model: nn.Module, adapter: Path, data: Sequence[dict[str, Tensor]], path: str) -> list[Tensor]:
    """What peft's live layer at ``path`` is given, a tensor a batch."""
    from peft import PeftModel

    live = PeftModel.from_pretrained(in_float32(copy.deepcopy(model)), adapter).eval()
    heard: list[Tensor] = []
    module = live.base_model.model.get_submodule(path)
    module.register_forward_pre_hook(lambda _m, args: heard.append(args[0].detach().double()))
    with torch.no_grad():
        for batch in data:
            live(**batch)
    return heard


def test_inputs_are_those_of_the_live_layers_without_padding_and_without_what_is_held_out(adapter: Path) -> None:
    model, data = build(), batches(4, size=6)
    for i, batch in enumerate(data):
        lengths = torch.randint(5, 25, (6,), generator=torch.Generator().manual_seed(i))
        batch["attention_mask"] = (torch.arange(24) < lengths.unsqueeze(1)).to(torch.int64)
    found = gathered(model, adapter, data)
    assert found["idle"] is None
    held_out = recorder.held_out_sequences(24)
    assert int(held_out.sum()) == 3
    for path in ("q", "v", "down"):
        sequences = [x for batch in listened(model, adapter, data, path) for x in batch]
        masks = [m.bool() for batch in data for m in batch["attention_mask"]]
        kept = torch.cat([x[m] for x, m, held in zip(sequences, masks, held_out, strict=True) if not held])
        apart = torch.cat([x[m] for x, m, held in zip(sequences, masks, held_out, strict=True) if held])
        got = found[path]
        assert got is not None
        assert got.tokens == len(kept)
        assert torch.allclose(
            got.hessian.double(), kept.t() @ kept, rtol=1e-4, atol=1e-3 * float(kept.square().sum(0).mean())
        )
        assert torch.allclose(got.held_out.double(), apart, rtol=1e-4, atol=1e-4)
    # one tensor, added up once
    assert found["q"] is not None
    assert found["v"] is not None
    assert found["q"].hessian is found["v"].hessian


def test_several_passes_gather_the_same(adapter: Path) -> None:
    model, data = build(), batches(3)
    whole = gathered(model, adapter, data)
    steps: list[tuple[int, int, str]] = []
    parts = gathered(model, adapter, data, pass_bytes=1, progress=lambda *step: steps.append(step))
    assert steps == [(i, 15, "calibration") for i in range(1, 16)]  # five layers, three batches
    for path, one in whole.items():
        other = parts[path]
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.hessian, other.hessian)
            assert torch.equal(one.held_out, other.held_out)


class Sometimes(nn.Module):
    """Two layers given one tensor, or not."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = (bnb.nn.Linear4bit(32, 32, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return self.a(x) + self.b(self.between(x))


@pytest.mark.parametrize(
    ("between", "shares"),
    [
        (lambda x: x, True),
        (lambda x: x if x.shape[0] == 2 else x * 2, False),  # the first batch has two sequences
        (lambda x: x.mul_(2), False),
    ],
    ids=["always", "in the first batch alone", "written into between"],
)
def test_layers_share_what_is_the_same(
    between: Callable[[Tensor], Tensor],
    shares: bool,
    write_adapter: Callable[..., Path],
    oft_config: Callable[..., dict[str, Any]],
) -> None:
    folder = write_adapter(
        {f"base_model.model.{p}.oft_R.weight": torch.full((1, 496), 0.01) for p in "ab"}, oft_config(oft_block_size=32)
    )
    data = [torch.randn(n, 30, 32) for n in (2, 3, 4)]
    found = gathered(Sometimes(between).to("cpu").eval(), folder, data, ("a", "b"))
    a, b = found["a"], found["b"]
    assert a is not None
    assert b is not None
    assert (a.hessian is b.hessian) == shares
    assert bool(a.hessian.trace() * 1.5 < b.hessian.trace()) != shares


def test_a_single_sequence_is_divided_by_tokens(adapter: Path) -> None:
    found = gathered(build(), adapter, batches(1, size=1, length=80))["q"]
    assert found is not None
    assert (found.tokens, len(found.held_out)) == (70, 10)


def test_held_out_inputs_are_bounded_and_from_all_sequences(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "HELD_OUT_TOKENS", 40)
    data = [{"hidden": torch.full((4, 100, 128), float(i + 1))} for i in range(10)]
    found = gathered(build(), adapter, data)["q"]
    assert found is not None
    assert len(found.held_out) <= 40
    held = {i // 4 + 1 for i in recorder.held_out_sequences(40).nonzero().flatten().tolist()}
    assert {int(row[0]) for row in found.held_out} == held
    assert len(held) > 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], r"the calibration holds no batches Remedy: give at least one"),
        ("some text", r"the calibration is text, .* Remedy: tokenise the texts: calibration=\[tokenizer\("),
        (["one text", "another"], r"the calibration is text"),
        ({"text": ["one", "another"]}, r"the calibration is text"),
        ([{"input_ids": [1, 2, 3]}], r"calibration batch 0 holds no tensor Remedy: give the model's inputs"),
        ([{"no_such_argument": torch.zeros(1, 2, 128)}], r"does not take calibration batch 0: TypeError: "),
        (3, r"calibration batch 0 holds no tensor"),
    ],
)
def test_what_is_no_calibration(calibration: Any, message: str, adapter: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        oftsurgery.fold(build(), adapter, calibration=calibration)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rounding": "calibrated"},
            r"rounding='calibrated' was asked for, but no calibration was given Remedy: give some hundred",
        ),
        (
            {"rounding": "mse", "calibration": torch.zeros(1, 2, 128)},
            r"rounding='mse' was asked for, but also a calibration was given Remedy: choose rounding='calibrated'",
        ),
        ({"rounding": "best"}, r"the rounding 'best' is not known"),
    ],
)
def test_modes_and_calibrations_that_do_not_go_together(arguments: dict[str, Any], message: str, adapter: Path) -> None:
    with pytest.raises(StateError, match=message):
        oftsurgery.fold(build(), adapter, **arguments)


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    """``benchmarks/quality.py``, which ``make bench-quality`` runs."""
    script = Path(__file__).parents[2] / "benchmarks" / "quality.py"
    spec = importlib.util.spec_from_file_location("quality", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_minilms_embeddings(
    quality: ModuleType, write_adapter: Callable[..., Path], oft_config: Callable[..., dict[str, Any]]
) -> None:
    """An adapter on the first two of six layers of the real model, 96 sentences: a third of what the benchmark takes."""
    model = quality.demo.load_base("NF4")
    generator = torch.Generator().manual_seed(0)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [path for path in linears if ".layer.0." in path or ".layer.1." in path]
    tensors = {
        f"base_model.model.{path}.oft_R.weight": 0.03
        * torch.randn(model.get_submodule(path).in_features // 32, 496, generator=generator)
        for path in targets
    }
    folder = write_adapter(tensors, oft_config(oft_block_size=32, target_modules=targets))
    sentences = quality.demo.held_out(48)
    live = quality.demo.embeddings(quality.demo.load_live("NF4", folder), sentences)
    nearest = oftsurgery.fold(model, folder, rounding="nearest")
    texts = quality.tokenised(quality.sentences_for_calibration(96))
    folded = oftsurgery.fold(quality.demo.load_base("NF4"), folder, calibration=texts)
    assert len(folded.oftsurgery.modules) == 12
    assert {m.rounding for m in folded.oftsurgery.modules.values()} == {"calibrated"}
    far, near = (quality.demo.distance(quality.demo.embeddings(m, sentences), live) for m in (nearest, folded))
    assert near < 0.5 * far


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["NF4", "int8"])
def test_minilm_as_in_the_readme(quality: ModuleType, quantisation: str, tmp_path: Path) -> None:
    assert len(list(quality.demo.fine_tune(quantisation, tmp_path / "adapter", 20))) == 20
    rows = quality.minilm(lambda: quality.demo.load_base(quantisation), tmp_path / "adapter")
    assert list(rows) == [quality.BASE, *quality.MODES]
    _, nearest, _, mse, preserve, few, all_, itself = rows.values()
    assert 0.95 <= preserve["kept"] <= 1.05
    if quantisation == "NF4":
        assert mse["weight_mse"] <= 0.90 * nearest["weight_mse"]
        assert all_["distance"] <= 0.40 * nearest["distance"]
    assert all_["distance_of_weights"] <= (0.40 if quantisation == "NF4" else 0.50) * nearest["distance_of_weights"]
    assert all_["distance"] < few["distance"] < nearest["distance"]
    assert itself["distance"] < nearest["distance"]


@pytest.mark.slow
def test_a_llamas_perplexity(quality: ModuleType, tmp_path: Path) -> None:
    rows = quality.llama(*quality.train_llama(tmp_path, 400, 100))
    assert rows["without the adapter"]["perplexity"] > 1.2 * rows["live"]["perplexity"]
    assert rows["nearest"]["excess"] > 0
    assert rows["calibrated, 256 texts"]["excess"] <= 0.6 * rows["nearest"]["excess"]
