"""All or nothing: whatever fails, wherever, the model is as it was: outputs, bytes, hooks, identities, config."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from independent import fold, make_layer, relative, seeded
from snapshots import snapshot_of
from torch import Tensor, nn

import oftsurgery
import oftsurgery.weights.fold
from oftsurgery import OFTAdapter, Rotation, rotations
from oftsurgery.formats import codecs
from oftsurgery.stores import layers
from oftsurgery.weights import kernels

TARGETS = ("embed", "nf4", "twice", "int8", "used", "dense")


class Config:
    tie_word_embeddings = True


class Tiny(nn.Module):
    """A little of everything: NF4 (double too), int8 (fresh and after a forward), dense with a bias, tied embeddings, a
    buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        g = seeded("tiny")
        self.config = Config()
        self.config.tie_word_embeddings = True
        self.embed = nn.Embedding(40, 64, _weight=torch.randn(40, 64, generator=g))
        self.nf4 = make_layer("nf4", 64, generator=g)
        self.twice = make_layer("fp4", 64, nested=True, dtype=torch.bfloat16, bias=False, generator=g)
        self.int8 = make_layer("int8", 64, generator=g)
        self.used = make_layer("int8", 64, generator=g)
        self.dense = make_layer("dense", 64, generator=g)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(64, generator=g))
        self.hooked: deque[str] = deque()
        self.nf4.register_forward_hook(lambda *_: self.hooked.append("nf4"))
        self.dense.register_forward_pre_hook(lambda *_: self.hooked.append("dense"))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in (self.nf4, self.twice, self.int8, self.used, self.dense):
            x = torch.tanh(layer(x)) + self.shift
        return self.head(x)  # type: ignore[no-any-return]


TOKENS = torch.randint(0, 40, (3, 5), generator=seeded("tokens"))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.train()(TOKENS)  # type: ignore[no-any-return]  # train: an eval forward would repack the 4-bit weights


@pytest.fixture
def tiny() -> Tiny:
    return build()


def build() -> Tiny:
    """The same each time."""
    model = Tiny()
    run(model)  # int8 statistics go to the state
    model.int8 = make_layer("int8", 64, generator=seeded("a fresh one"))
    model.hooked.clear()
    return model


@pytest.fixture(scope="module")
def adapter() -> OFTAdapter:
    modules = {
        path: Rotation(
            0.05 * torch.randn(4, 120, generator=seeded(path)), side="embedding" if path == "embed" else "input"
        )
        for path in TARGETS
    }
    saved = {
        "dense.bias": torch.randn(64, generator=seeded("bias")),
        "shift": torch.randn(64, generator=seeded("shift")),
    }
    return OFTAdapter(modules, saved)


def whole(model: nn.Module) -> Any:
    """All that must stay, the outputs apart (an int8 layer's first forward moves its statistics)."""
    config = getattr(model, "config", None)
    tie = getattr(config, "tie_word_embeddings", None)
    hooks = [
        (path, tuple(m._forward_hooks.values()), tuple(m._forward_pre_hooks.values()))
        for path, m in model.named_modules()
    ]
    return snapshot_of(model), id(config), tie, hooks, model.__dict__.get("oftsurgery"), list(model.state_dict())


@pytest.fixture(autouse=True)
def _step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference path, whose steps can be broken one by one; the fused one is one step, and has a test of its own."""
    monkeypatch.setenv("OFTSURGERY_BACKEND", "reference")


# the functions through which every fold goes, at their module: (owner, name)
STEPS: dict[str, tuple[Any, str]] = {
    "decode": (codecs, "decode"),
    "rotate": (rotations, "rotate_weight"),
    "encode": (codecs, "encode"),
    "swap": (layers.Layer, "write"),
    "read": (layers.Layer, "read"),
}


def break_at(
    monkeypatch: pytest.MonkeyPatch, step: str, call: int, error: BaseException, *, after: bool
) -> Callable[[], int]:
    """Raise ``error`` at the ``call``-th call of a step, before or after its work; returns what counts the calls."""
    owner, name = STEPS[step]
    real, calls = getattr(owner, name), 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise error

    monkeypatch.setattr(owner, name, broken)
    return lambda: calls


def calls_of(monkeypatch: pytest.MonkeyPatch, adapter: OFTAdapter) -> dict[str, int]:
    """How often a whole fold calls each step."""
    found = {}
    for step in STEPS:
        with monkeypatch.context() as patch:
            count = break_at(patch, step, 0, RuntimeError(), after=False)
            fold_untied(Tiny(), adapter)
            found[step] = count()
    return found


def fold_untied(model: nn.Module, adapter: OFTAdapter, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftsurgery.UntieWarning)
        return fold(model, adapter, **options)


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_a_hundred_errors_each_leave_the_model_as_it_was(
    inplace: bool, tiny: Tiny, adapter: OFTAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(monkeypatch, adapter)
    assert all(n >= len(TARGETS) for n in calls.values()), calls
    before = whole(tiny)
    rng = random.Random(7)
    for i in range(100):
        step = ("decode", "rotate", "encode", "swap")[i % 4]
        call = rng.randint(1, calls[step])
        error = (
            RuntimeError("injected"),
            KeyboardInterrupt(),
            MemoryError("injected"),
            oftsurgery.FormatError("injected"),
        )[rng.randrange(4)]
        after = step != "swap" and rng.random() < 0.5  # a swap that fails half way: test_layers
        with monkeypatch.context() as patch:
            break_at(patch, step, call, error, after=after)
            with pytest.raises(type(error)):
                fold_untied(tiny, adapter, inplace=inplace)
        assert whole(tiny) == before, f"{step}, call {call}, {error!r}, after={after}"
    assert torch.equal(run(tiny), run(build()))
    assert list(tiny.hooked) == ["nf4", "dense"]
    folded = fold_untied(tiny, adapter, inplace=inplace)  # and now it folds: nothing was left behind
    assert set(folded.oftsurgery.modules) == set(TARGETS)


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_outputs_are_the_same_after_an_error_at_the_last_swap(
    inplace: bool, tiny: Tiny, adapter: OFTAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tiny)
    before = whole(tiny)
    calls = calls_of(monkeypatch, adapter)
    for step in ("encode", "swap", "decode"):
        with monkeypatch.context() as patch:
            break_at(patch, step, calls[step], RuntimeError("injected"), after=False)
            with pytest.raises(RuntimeError, match="injected"):
                fold_untied(tiny, adapter, inplace=inplace)
        assert whole(tiny) == before
        assert torch.equal(run(tiny), expected)


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_an_error_names_the_module_it_happened_in(inplace: bool, tiny: Tiny, adapter: OFTAdapter) -> None:
    tiny.dense.weight.data[3, 5] = torch.nan
    before = whole(tiny)
    with pytest.raises(
        oftsurgery.NonFiniteError,
        match=r"NaN or infinity \[module 'dense', format float32\] Remedy: reload the base model",
    ):
        fold_untied(tiny, adapter, inplace=inplace)
    assert whole(tiny) == before


def test_an_error_of_the_record_names_the_module_too(
    tiny: Tiny, adapter: OFTAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(rotation: Rotation) -> tuple[float, float]:
        raise oftsurgery.NonFiniteError("no angle", remedy="none")

    before = whole(tiny)
    monkeypatch.setattr(kernels, "measure", fail)
    with pytest.raises(oftsurgery.NonFiniteError, match=r"no angle \[module '\w"):
        fold_untied(tiny, adapter, inplace=True)
    assert whole(tiny) == before


def test_an_error_of_the_progress_callback(tiny: Tiny, adapter: OFTAdapter) -> None:
    from oftsurgery.folding.memory import fold_model

    before = whole(tiny)

    def stop(done: int, total: int, path: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_model(tiny, [adapter], inplace=True, progress=stop)
    assert whole(tiny) == before


@pytest.mark.parametrize("call", [1, 3, 4])
def test_an_interrupt_just_after_a_weight_was_replaced(
    call: int, tiny: Tiny, adapter: OFTAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = whole(tiny)
    break_at(monkeypatch, "swap", call, KeyboardInterrupt(), after=True)
    with pytest.raises(KeyboardInterrupt):
        fold_untied(tiny, adapter, inplace=True)
    assert whole(tiny) == before


@pytest.mark.parametrize("category", [oftsurgery.RoundingWarning, oftsurgery.UntieWarning])
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(
    category: type[Warning], tiny: Tiny, adapter: OFTAdapter
) -> None:
    before = whole(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", category)
        with pytest.raises(category):
            oftsurgery.fold(tiny, adapter, inplace=True)
    assert whole(tiny) == before


def test_the_unfold_warning_as_an_error_leaves_the_model_as_it_was(tiny: Tiny, adapter: OFTAdapter) -> None:
    folded = fold_untied(tiny, adapter)
    before = whole(folded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", oftsurgery.UnfoldWarning)
        with pytest.raises(oftsurgery.UnfoldWarning):
            oftsurgery.unfold(folded, adapter, inplace=True)
    assert whole(folded) == before


@pytest.mark.parametrize("step", ["decode", "encode", "swap"])
def test_unfold_in_place_is_all_or_nothing(
    step: str, tiny: Tiny, adapter: OFTAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = fold_untied(tiny, adapter)
    before = whole(folded)
    with monkeypatch.context() as patch:
        break_at(patch, step, 5, KeyboardInterrupt(), after=False)
        with pytest.raises(KeyboardInterrupt):
            oftsurgery.unfold(folded, adapter, inplace=True)
    assert whole(folded) == before
    with monkeypatch.context() as patch:
        break_at(patch, "swap", 3, RuntimeError("injected"), after=False)
        with pytest.raises(RuntimeError, match="injected"):
            oftsurgery.unfold(folded, base=tiny, inplace=True)
    assert whole(folded) == before


@pytest.mark.parametrize(
    "error", [RuntimeError("injected"), KeyboardInterrupt()], ids=["RuntimeError", "KeyboardInterrupt"]
)
@pytest.mark.parametrize("step", ["decode", "rotate", "encode", "swap"])
@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_a_peft_model_stays_a_working_peft_model(
    inplace: bool, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import OFTConfig, PeftModel, get_peft_model

    base = nn.ModuleDict({"a": make_layer("nf4", 64), "b": make_layer("int8", 64), "c": make_layer("dense", 64)})
    chain = nn.Sequential(*base.values())
    config = OFTConfig(r=0, oft_block_size=16, target_modules=["0", "1", "2"], use_cayley_neumann=True)
    live = get_peft_model(chain, config)
    assert isinstance(live, PeftModel)
    for name, parameter in live.named_parameters():
        if "oft_R" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=seeded(name))
    x = torch.randn(4, 64, generator=seeded("x"))
    with torch.no_grad():
        expected = live.train()(x)
    before = snapshot_of(live)
    for call in (1, 3):
        with monkeypatch.context() as patch:
            break_at(patch, step, call, error, after=False)
            with pytest.raises(type(error)):
                fold(live, None, inplace=inplace)
        assert snapshot_of(live) == before
        with torch.no_grad():
            assert torch.equal(live(x), expected)
    assert live.active_adapters == ["default"]
    assert live.get_base_model() is chain
    assert not hasattr(chain, "oftsurgery")
    # and it folds
    folded = fold(live, None, inplace=inplace)
    with torch.no_grad():
        assert relative(folded.train()(x), expected) < 0.2


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), oftsurgery.NonFiniteError("injected")], ids=["Ctrl-C", "refusal"]
)
def test_the_fused_path_is_all_or_nothing_too(
    error: BaseException, inplace: bool, tiny: Tiny, adapter: OFTAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFTSURGERY_BACKEND", "auto")
    before = whole(tiny)
    real, calls = oftsurgery.weights.fold.kernels.fold, 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == len(TARGETS):
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(oftsurgery.weights.fold.kernels, "fold", broken)
        with pytest.raises(type(error)):
            fold_untied(tiny, adapter, inplace=inplace)
    assert calls == len(TARGETS)
    assert whole(tiny) == before
