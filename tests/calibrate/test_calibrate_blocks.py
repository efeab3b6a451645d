"""Calibration block by block: which models have blocks, what a block's layers are given, and what is left of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import oftsurgery
from oftsurgery import RoundingWarning
from oftsurgery.calibrate import batch_runs, blocks, hidden_values, recorder
from oftsurgery.calibrate.batches import one_sequence, read_batches
from oftsurgery.calibrate.input_sums import InputSum
from oftsurgery.calibrate.layer_inputs import Calibration
from oftsurgery.files.scratch import Scratch
from oftsurgery.folding.plan import plan_changes
from oftsurgery.formats import codecs
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.weights.calibrate import FoldedAlready, LayerInputs

COUNT = 3
PATHS = tuple(f"layers.{i}.{name}" for i in range(COUNT) for name in ("up", "gate", "down"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (
            bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32) for _ in range(3)
        )

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        inside = self.up(hidden) * torch.tanh(self.gate(hidden))
        return (hidden + self.down(inside),)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(COUNT))
        self.head = nn.Linear(64, 8)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask=mask)[0]
        return self.head(hidden)


class Rewritten(Decoder):
    """The hidden values change between the blocks."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)[0] * 2
        return self.head(hidden)


class Twice(Decoder):
    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            hidden = layer(hidden)[0]
        return self.head(hidden)


class Masked(Decoder):
    """Each block has a mask of its own."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, mask=torch.full((2,), float(i)))[0]
        return self.head(hidden)


@pytest.fixture(autouse=True)
def _no_rounding_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        yield


def build(cls: type[nn.Module] = Decoder) -> nn.Module:
    torch.manual_seed(0)
    model = cls().to("cpu").eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture
def adapter(write_adapter: Callable[..., Path], oft_config: Callable[..., dict[str, Any]]) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{path}.oft_R.weight": 0.05 * torch.randn(2, 496, generator=generator) for path in PATHS
    }
    return write_adapter(tensors, oft_config(oft_block_size=32, target_modules=list(PATHS)))


def batches(count: int = 6, *, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) / 4 + torch.eye(64)
    return [{"hidden": torch.randn(4, 40, 64, generator=generator) @ mix} for _ in range(count)]


def calibration(model: nn.Module, adapter: Path) -> Calibration:
    loaded = oftsurgery.load_adapter(adapter)
    plan = plan_changes(LiveStore(model), [loaded])
    jobs = {r.path: (r.chain, Layer(r.path, model.get_submodule(r.path)).read()[1]) for r in plan.rotate}
    return Calibration(model, [loaded], list(jobs), read_batches(batches()), jobs=jobs)


@pytest.mark.parametrize(
    ("cls", "by_blocks"), [(Decoder, True), (Rewritten, False), (Twice, False), (Masked, False)], ids=str
)
def test_which_models_have_blocks(cls: type[nn.Module], by_blocks: bool, adapter: Path) -> None:
    found = calibration(build(cls), adapter)
    kinds = {type(found(path)) for path in PATHS}
    assert kinds == {FoldedAlready if by_blocks else LayerInputs}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[LayerInputs]:
    """The inputs with which the layers of blocks are folded."""
    found: list[LayerInputs] = []
    fold = batch_runs.fold_calibrated

    def listen(encoded: Any, chain: Any, into: Any, inputs: LayerInputs) -> Any:
        found.append(inputs)
        return fold(encoded, chain, into, inputs)

    monkeypatch.setattr(batch_runs, "fold_calibrated", listen)
    return found


def test_layers_get_what_the_folded_blocks_before_give(adapter: Path, given: list[LayerInputs]) -> None:
    model = build()
    found = calibration(model, adapter)
    weights = {path: found(path) for path in PATHS}
    assert [inputs.drift is None for inputs in given] == [True] * 2 + [False] * 7
    # the same by a model whose first block is folded, and by the live model
    live = oftsurgery.wrap(model, adapter)
    own = oftsurgery.wrap(model, adapter)
    for path in PATHS[:3]:
        module = own.get_submodule(path)
        plain = nn.Linear(64, 64)
        plain.weight.data, plain.bias.data = codecs.decode(weights[path].folded.encoded), module.bias.detach()  # type: ignore[union-attr]
        own.set_submodule(path, plain)
    heard: dict[str, list[Tensor]] = {"live": [], "own": []}
    for name, each in (("live", live), ("own", own)):
        each.get_submodule(PATHS[3]).register_forward_pre_hook(lambda _m, args, n=name: heard[n].append(args[0]))
        with torch.no_grad():
            for batch in batches():
                each.eval()(**batch)
    held_out = recorder.held_out_sequences(24)
    y, x = (torch.cat(heard[name]).double() for name in ("live", "own"))
    kept_y, kept_x = (rows[~held_out].reshape(-1, 64) for rows in (y, x))
    inputs = given[3]
    scale = float(kept_x.square().sum())
    assert torch.allclose(inputs.hessian.double(), kept_x.t() @ kept_x, atol=1e-5 * scale)
    assert inputs.drift is not None
    assert inputs.live is not None
    assert torch.allclose(inputs.drift.double(), (kept_y - kept_x).t() @ kept_x, rtol=1e-2, atol=1e-6 * scale)
    assert torch.allclose(inputs.held_out.double(), x[held_out].reshape(-1, 64), atol=1e-4)
    assert torch.allclose(inputs.live.double(), y[held_out].reshape(-1, 64), atol=1e-4)
    assert given[3].hessian is given[4].hessian  # up and gate share their inputs
    assert given[3].hessian is not given[5].hessian


def test_layers_get_what_the_folded_layers_of_their_block_give(adapter: Path, given: list[LayerInputs]) -> None:
    model = build()
    found = calibration(model, adapter)
    weights = {path: found(path) for path in PATHS[:3]}
    up, gate = (codecs.decode(weights[path].folded.encoded).double() for path in PATHS[:2])  # type: ignore[union-attr]
    live = oftsurgery.wrap(model, adapter)
    hidden = torch.cat([batch["hidden"] for batch in batches()])[~recorder.held_out_sequences(24)].reshape(-1, 64)
    biases = [model.get_submodule(path).bias.detach().double() for path in PATHS[:2]]
    x = (hidden.double() @ up.t() + biases[0]) * torch.tanh(hidden.double() @ gate.t() + biases[1])
    scale = float(x.square().sum())
    assert torch.allclose(given[2].hessian.double(), x.t() @ x, atol=1e-5 * scale)
    with torch.no_grad():
        y = live.get_submodule(PATHS[0])(hidden) * torch.tanh(live.get_submodule(PATHS[1])(hidden))
    assert given[2].drift is not None
    assert torch.allclose(given[2].drift.double(), (y.double() - x).t() @ x, rtol=1e-2, atol=1e-5 * scale)


class Experts(nn.Module):
    """A block whose second expert takes no token."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("late", "query", "key", "out"):
            self.add_module(name, nn.Linear(64, 64))
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        hidden = self.out(self.query(hidden) * self.key(hidden))
        return (self.late(self.experts[0](hidden)),)


def test_the_groups_of_a_block(adapter: Path) -> None:
    model = Decoder()
    model.layers = nn.ModuleList(Experts() for _ in range(COUNT))
    names = ("late", "query", "key", "out", "experts.0", "experts.1")
    paths = [f"layers.{i}.{name}" for i in range(COUNT) for name in names]
    loaded = oftsurgery.load_adapter(adapter)
    rotation = loaded.modules[PATHS[0]]
    whole = oftsurgery.OFTAdapter(dict.fromkeys(paths, rotation), dialect=loaded.dialect)
    into = oftsurgery.WeightFormat("nf4", (64, 64), torch.float32, 64)
    found = Calibration(model, [whole], paths, read_batches(batches()), jobs=dict.fromkeys(paths, ((rotation,), into)))
    kinds = {path: type(found(path)) for path in paths}
    assert {path for path, kind in kinds.items() if kind is not FoldedAlready} == {
        f"layers.{i}.experts.1" for i in range(COUNT)
    }
    assert found._blocks is not None
    assert list(found._blocks._orders.values()) == [[["query", "key"], ["out", "experts.0", "experts.1"], ["late"]]]


class Again(Block):
    """The block calls a layer after the last one once more."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        return (self.up(super().forward(hidden)[0]),)


def test_a_block_that_calls_a_layer_twice_is_one_group(adapter: Path, given: list[LayerInputs]) -> None:
    model = Decoder()
    model.layers = nn.ModuleList(Again() for _ in range(COUNT))
    found = calibration(model.to("cpu").eval(), adapter)
    assert all(isinstance(found(path), FoldedAlready) for path in PATHS)
    assert found._blocks is not None
    assert list(found._blocks._orders.values()) == [[["up", "gate", "down"]]]
    assert given[0].tokens == 2 * 21 * 40


def test_a_fold_by_blocks(adapter: Path, snapshot: Callable[[nn.Module], object]) -> None:
    model = build()
    before = snapshot(model)
    folded, again = (oftsurgery.fold(model, adapter, calibration=batches()) for _ in range(2))
    assert snapshot(model) == before
    assert {m.rounding for m in folded.oftsurgery.modules.values()} == {"calibrated"}
    assert all("forward" not in vars(m) for m in (*model.modules(), *folded.modules()))
    live = oftsurgery.wrap(model, adapter)
    plain = oftsurgery.fold(model, adapter, rounding="preserve")
    with torch.no_grad():
        errors = [
            sum(float((m(**b) - live(**b)).square().sum()) for b in batches(3, seed=7)) for m in (plain, folded, again)
        ]
    assert errors[1] == errors[2] < 0.8 * errors[0]
    base = oftsurgery.unfold(folded, base=model)
    for path in PATHS:
        prints = {Layer(path, m.get_submodule(path)).read()[0].fingerprint for m in (base, model)}
        assert len(prints) == 1


def test_another_weight_is_folded_by_the_same_inputs(adapter: Path) -> None:
    """A weight that is not the one that the calibration has folded takes the live inputs."""
    model = build()
    found = calibration(model, adapter)(PATHS[4])
    assert isinstance(found, FoldedAlready)
    inputs = found.again()
    assert inputs is not None
    assert inputs.drift is None
    assert inputs.tokens == 21 * 40


def test_what_a_block_may_be_called_with() -> None:
    mask = torch.ones(2)
    call = blocks._call((mask, None), {"position": (mask, mask), "flag": True})
    assert call is not None
    same = blocks._call((mask, None), {"position": (mask.clone(), mask), "flag": True})
    assert same is not None
    assert call.same_arguments(same)
    other = blocks._call((mask, None), {"position": (mask + 1, mask), "flag": True})
    assert other is not None
    assert not call.same_arguments(other)
    assert blocks._call((mask,), {"cache": copy}) is None
    assert blocks._call((), {"hidden": mask}) is None


def test_one_sequence_of_a_batch() -> None:
    ids, positions = torch.arange(12).reshape(3, 4), torch.arange(4).reshape(1, 4)
    args, kwargs = one_sequence(((ids,), {"attention_mask": ids, "position_ids": positions, "flag": True}))
    assert args[0].tolist() == [[0, 1, 2, 3]]
    assert kwargs["attention_mask"].shape == (1, 4)
    assert (kwargs["position_ids"] is positions, kwargs["flag"]) == (True, True)


def test_hidden_values_past_the_limit_lie_in_a_file(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = oftsurgery.fold(build(), adapter, calibration=batches())
    written: list[Tensor] = []
    write = Scratch.write

    def listen(self: Scratch, tensor: Tensor) -> object:
        written.append(tensor)
        return write(self, tensor)

    monkeypatch.setattr(Scratch, "write", listen)
    monkeypatch.setattr(hidden_values, "MEMORY_BYTES", 2 * batches()[0]["hidden"].nbytes)
    outside = oftsurgery.fold(build(), adapter, calibration=batches())
    assert len(written) == 4 * (1 + COUNT + COUNT - 1)  # four of six batches: first, live, and folded but the last
    prints = [{p: m.after for p, m in f.oftsurgery.modules.items()} for f in (inside, outside)]
    assert prints[0] == prints[1]


@pytest.mark.filterwarnings("ignore::oftsurgery.CalibrationWarning")  # 40 held-out tokens need not show a gain
def test_past_a_number_of_tokens_the_live_model_gives_the_inputs(
    adapter: Path, given: list[LayerInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (1 << 14, 3 * 160):
        monkeypatch.setattr(batch_runs, "OWN_TOKENS", most)
        oftsurgery.fold(build(), adapter, calibration=batches())
        found.append(given[:])
        given.clear()
    part = [inputs for inputs in found[1] if inputs.drift is not None]
    assert {i.tokens for i in found[0]} == {21 * 40}
    assert {len(i.held_out) for i in part} == {40}  # one of the twelve sequences that run through the folded blocks too
    assert {i.tokens for i in part} == {23 * 40}


def test_the_drift_of_some_tokens_counts_for_all() -> None:
    own, live = (torch.randn(30, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    nothing = torch.zeros(0, 8)
    pair = InputSum.of(own, drifts=True)
    pair.add((own[:10], own[20:]), (live[:10], live[20:]))
    pair.add_only(live[10:20])
    pair.add((nothing, nothing), (nothing, nothing))
    pair.end()
    inputs = pair.inputs("layer")
    x = torch.cat([own[:10], live[10:20]])
    assert torch.allclose(inputs.hessian, x.t() @ x, atol=1e-4)
    assert inputs.drift is not None
    assert torch.allclose(inputs.drift, 2 * (live[:10] - own[:10]).t() @ own[:10], atol=1e-4)
    assert torch.equal(inputs.held_out, own[20:])
    assert torch.equal(inputs.held_out_live, live[20:])
    assert inputs.tokens == 20


@pytest.mark.parametrize("features", [8, 512, 1100])
def test_a_symmetric_sum_is_computed_by_half(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(20, features, generator=generator) for _ in range(2)]
    total = torch.zeros(features, features)
    for x in parts:
        recorder.add_square(total, x)
    for _ in range(2):
        recorder.mirror(total)
    x = torch.cat(parts)
    assert torch.allclose(total, x.t() @ x, atol=1e-4)
    assert torch.allclose(total, total.t())
