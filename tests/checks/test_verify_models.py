"""`verify` measures what it says, against figures worked out by hand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import OFTConfig, get_peft_model
from torch import nn

import oftsurgery
from oftsurgery import MatchError, NonFiniteError, RoundingWarning, ShapeError, StateError, verify


class Net(nn.Module):
    def __init__(self, scale: float = 1.0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, 8, bias=False)
        self.second = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.second.weight.mul_(scale)
            self.second.bias.mul_(scale)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.dropout(self.second(self.first(x))), "ids": x.argmax(-1)}


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_errors_are_those_worked_out_by_hand() -> None:
    a, b = Net(1.5), Net()
    report = verify(a, b, X)
    assert report.batches == 1
    assert report.modules["first"].relative == 0
    assert report.modules["second"].relative == pytest.approx(0.5, rel=1e-6)
    out = report.outputs["out"]
    assert list(report.outputs) == ["out"]  # integers are no outputs to compare
    b.eval()
    expected = b(X)["out"].detach().double()
    assert out.relative == pytest.approx(0.5, rel=1e-6)
    assert out.max_abs == pytest.approx(float(expected.abs().max()) / 2, rel=1e-6)
    assert out.cosine_distance == pytest.approx(0, abs=1e-7)  # the same direction
    assert report.worst is not None
    assert report.worst[0] == "second"
    assert (
        json.loads(json.dumps(report.to_dict()))["modules"]["second"]["relative"] == report.modules["second"].relative
    )
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["out", "second", "first"]


def test_a_model_is_like_itself() -> None:
    net = Net()
    report = verify(net, net, X)
    assert set(report.modules) == {"first", "second"}
    assert {e.max_abs for e in (*report.modules.values(), *report.outputs.values())} == {0.0}


def test_opposite_outputs_are_two_apart() -> None:
    assert verify(Net(-1.0), Net(), X).outputs["out"].cosine_distance == pytest.approx(2)


def test_each_module_gets_the_reference_inputs_not_upstream_errors() -> None:
    a, b = Net(), Net()
    with torch.no_grad():
        a.first.weight.mul_(3)
    report = verify(a, b, X)
    assert report.modules["first"].relative == pytest.approx(2, rel=1e-6)
    assert report.modules["second"].relative == 0
    assert report.outputs["out"].relative > 0.5


@pytest.mark.parametrize(
    "inputs",
    [X, (X,), {"x": X}, [X], [{"x": X[:2]}, {"x": X[2:]}], (b for b in [X[:1], X[1:]])],
    ids=["tensor", "tuple", "mapping", "list", "batches", "iterator"],
)
def test_inputs_in_every_form_give_the_same(inputs: object) -> None:
    report = verify(Net(1.5), Net(), inputs)
    assert report.outputs["out"].relative == pytest.approx(0.5, rel=1e-6)


def test_modes_and_hooks_come_back_and_gradients_stay_off() -> None:
    a, b = Net(), Net()
    a.train()
    b.eval()
    b.dropout.train()
    verify(a, b, X)
    assert a.training
    assert a.dropout.training
    assert not b.training
    assert b.dropout.training
    assert not b.first._forward_hooks
    assert verify(a, b, X).outputs["out"].relative == 0  # dropout is off in both


def test_live_peft_model_is_a_reference(tmp_path: Path) -> None:
    live = get_peft_model(
        Net(), OFTConfig(oft_block_size=4, target_modules=["first", "second"], init_weights=False)
    ).eval()
    folded = oftsurgery.fold(live)
    report = verify(folded, live, X)
    assert set(report.modules) == {"first", "second"}
    assert all(e.relative < 1e-6 for e in [*report.modules.values(), *report.outputs.values()])
    half = live.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        folded = oftsurgery.fold(half)
    report = verify(folded, half, X.bfloat16())
    assert all(1e-4 < e.relative < 2e-2 for e in report.modules.values())


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(StateError, match=r"the inputs hold no batch to compare on Remedy: give at least one batch"):
        verify(Net(), Net(), [])
    folded = oftsurgery.fold(get_peft_model(Net(), OFTConfig(oft_block_size=4, target_modules=["first"])))
    with pytest.raises(MatchError, match=r"lacks a folded module \[module 'first'\]"):
        verify(folded, nn.Linear(8, 4), X)
    with pytest.raises(MatchError, match=r"gives other outputs \(out\) than the reference \(output\)"):
        verify(Net(), nn.Sequential(nn.Linear(8, 4)), X)
    with pytest.raises(ShapeError, match=r"outputs differ in shape \[tensor '.*', shape 5×4, expected 5×2\]"):
        verify(nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 2)), X)
    with pytest.raises(NonFiniteError, match=r"an output holds NaN or infinity"):
        verify(Net(float("nan")), Net(), X)


def test_a_plain_model_that_holds_nothing_runs_in_eval_mode_too() -> None:
    seen = []

    class Empty(nn.Sequential):  # false, as an empty container is
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.training)
            return x

    plain = Empty()
    oftsurgery.verify(nn.Identity(), nn.Identity(), torch.ones(1, 2), plain=plain)
    assert (seen, plain.training) == ([False], True)
