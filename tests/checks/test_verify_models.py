"""`verify` measures what it says, against figures worked out by hand."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

import oftsurgery
from oftsurgery import (
    MatchError,
    NonFiniteError,
    OutputError,
    RoundingWarning,
    ShapeError,
    StateError,
    VerifyReport,
    verify,
)
from oftsurgery.stores import peft_live


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


class Scores(nn.Module):
    """A tiny language model: the scores of 16 tokens."""

    config = PretrainedConfig(vocab_size=16)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up = nn.Embedding(16, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.up(self.embed(input_ids)))}


IDS = torch.arange(12).reshape(2, 6)


def live_scores() -> Any:
    torch.manual_seed(1)
    return get_peft_model(Scores(), OFTConfig(oft_block_size=4, target_modules=["up"], init_weights=False)).eval()


def test_the_share_of_the_effect_is_the_one_worked_out_by_hand() -> None:
    """Halfway between the base and the live model, half of the effect is there; with any noise that is orthogonal to the effect too."""
    live, base = live_scores(), Scores().eval()
    folded = oftsurgery.fold(live)
    whole = verify(folded, live, {"input_ids": IDS})
    assert whole.kept == pytest.approx(1, abs=1e-5)
    assert whole.modules["up"].kept == pytest.approx(1, abs=1e-5)
    assert whole.outputs["logits"].kl == pytest.approx(0, abs=1e-9)
    assert whole.verdict.startswith(
        "ok: 100% of the adapter's effect on logits is kept; the distance to the live model is"
    )
    with torch.no_grad():
        folded.up.weight.copy_((folded.up.weight + base.up.weight) / 2)
        half = verify(folded, live, {"input_ids": IDS})
        a, b = (m(IDS)["logits"].double().log_softmax(-1) for m in (folded, live))
    assert half.kept == pytest.approx(0.5, abs=1e-5)
    assert half.modules["up"].kept == pytest.approx(0.5, abs=1e-5)
    assert half.outputs["logits"].kl == pytest.approx(float((b.exp() * (b - a)).sum(-1).mean()), rel=1e-6)
    nothing = verify(base, live, {"input_ids": IDS})
    assert (nothing.ok, nothing.kept) == (False, pytest.approx(0, abs=1e-6))
    assert nothing.verdict.startswith("not ok: 0% of the adapter's effect on logits is kept")
    assert nothing.outputs["logits"].relative == pytest.approx(nothing.base["logits"].relative, rel=1e-6)
    data = json.loads(json.dumps(half.to_dict()))
    assert (data["kept"], data["ok"], data["verdict"]) == (half.kept, half.ok, half.verdict)
    assert "kept" in str(half).splitlines()[0]


def test_the_base_is_the_live_model_with_its_adapter_switched_off() -> None:
    """peft's and oftsurgery's live layers are switched off by their own attributes, and nothing else of them changes."""
    live, base = live_scores(), Scores().eval()
    folded = oftsurgery.fold(live)
    wrapped = oftsurgery.wrap(base, peft_live.LiveAdapters(live).read()[0])
    for reference in (live, wrapped):
        trained = {name: p.requires_grad for name, p in reference.named_parameters()}
        before = reference(IDS)["logits"]
        alone, given = verify(folded, reference, {"input_ids": IDS}), verify(folded, reference, IDS, base=base)
        assert alone.kept == pytest.approx(given.kept, abs=1e-6)
        assert alone.modules["up"].kept == pytest.approx(given.modules["up"].kept, abs=1e-6)
        assert alone.base["logits"].relative == pytest.approx(given.base["logits"].relative, rel=1e-6)
        assert trained == {name: p.requires_grad for name, p in reference.named_parameters()}
        assert torch.equal(before, reference(IDS)["logits"])
    live.merge_adapter()  # nothing can be switched off now
    merged = verify(folded, live, {"input_ids": IDS})
    assert (merged.kept, merged.ok, merged.base) == (None, None, {})
    assert merged.verdict.startswith("no verdict: the reference has no live adapter")
    assert live.base_model.model.up.merged


def test_padding_counts_nowhere() -> None:
    live = live_scores()
    folded = oftsurgery.fold(live)
    with torch.no_grad():
        folded.up.weight.mul_(1.1)
        folded.embed = copy.deepcopy(folded.embed)  # the live model has the same tensor
        folded.embed.weight[0].mul_(100)  # the token of padding
    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    padded = verify(folded, live, {"input_ids": IDS, "attention_mask": mask})
    real = verify(folded, live, [{"input_ids": IDS[:1, 1:]}, {"input_ids": IDS[1:]}])
    assert padded.outputs["logits"].relative == pytest.approx(real.outputs["logits"].relative, rel=1e-5)
    assert padded.outputs["logits"].kl == pytest.approx(real.outputs["logits"].kl, rel=1e-5)
    assert padded.kept == pytest.approx(real.kept, rel=1e-5)
    assert verify(folded, live, {"input_ids": IDS}).outputs["logits"].relative > 2 * padded.outputs["logits"].relative


def test_a_fold_of_int8_layers_has_no_verdict_below_enough() -> None:
    report = VerifyReport(
        {}, {"logits": OutputError(0.1, 1.0, 0.1, kept=0.7)}, 1, base={"logits": OutputError(0.15, 1.0, 0.1)}
    )
    assert report.ok is False
    assert replace(report, rounds_inputs=True).ok is None
    assert replace(report, rounds_inputs=True).verdict.startswith("no verdict: 70%")
    assert replace(report, base={"logits": OutputError(0.2, 1.0, 0.1)}).ok  # half of the base's distance


def test_a_base_of_another_class_is_refused() -> None:
    with pytest.raises(MatchError, match=r"the base gives other outputs \(out\) than the reference \(logits\)"):
        verify(Scores(), Scores(), IDS, base=Other())


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": x.float()}
