"""Folds of image tools' adapters against what the tools' own live layers compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_goldens import GOLDENS, Golden, model_of, relative
from independent import requantised, stored_weight
from models import quantise, state_bytes
from torch import nn
from warned import quietly

import oftsurgery
from oftsurgery.adapters.output_blocks import OutputBlocks
from oftsurgery.checks import measures
from oftsurgery.stores.image_names import ImageNames

CASES = pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: g.folder)


def found_in(adapter: oftsurgery.OFTAdapter, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """``{module's name in the adapter: path in the model}``."""
    paths = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return {name: str(meaning.whole) for name, meaning in ImageNames(paths).meanings(adapter.modules).items()}


@CASES
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_fold_is_what_the_tool_computes(golden: Golden, strength: float) -> None:
    effective = golden.effective(strength)
    if effective is None:
        pytest.skip("the tool knows no strength")
    model = model_of(golden.base_tensors())
    mode = golden.mode if golden.always or strength != 1 else "angle"
    folded = oftsurgery.fold(model, golden.adapter(), strength=strength, strength_mode=mode)
    got = folded.state_dict()
    for name, exact in effective.items():
        assert relative(got[name], exact) <= 2e-6, name
    info = folded.oftsurgery.adapters[0]
    assert (info.strength, info.strength_mode) == ((strength, mode) if golden.always or strength != 1 else (1, "angle"))
    for name, tensor in model.state_dict().items():
        if name not in effective:
            assert torch.equal(got[name], tensor)


@CASES
def test_the_ways_back(golden: Golden, tmp_path: Path) -> None:
    base, adapter = model_of(golden.base_tensors()), golden.adapter()
    record = tmp_path / "fold.undo"
    strength = 1 if golden.effective(0.5) is None else 0.5  # a half reflection has no inverse
    mode = golden.mode if golden.always or strength != 1 else "angle"
    folded = oftsurgery.fold(base, adapter, undo=record, strength=strength, strength_mode=mode)
    for way in ({"undo": record}, {"base": base}):
        back = oftsurgery.unfold(folded, **way).state_dict()
        assert all(torch.equal(back[name], tensor) for name, tensor in base.state_dict().items())
    # the adapter as it was read: the record knows the strength
    back = quietly(oftsurgery.unfold, folded, adapter).state_dict()
    assert all(relative(back[name], tensor) < 1e-6 for name, tensor in base.state_dict().items())


@CASES
def test_the_checks_know_the_formulas_a_second_time(golden: Golden) -> None:
    base, adapter, effective = golden.base_tensors(), golden.adapter(), golden.effective(1)
    assert effective is not None
    if golden.always:
        adapter = adapter.at_strength(1, golden.mode)
    names = found_in(adapter, base)
    for name, weight_map in adapter.modules.items():
        path = names[name]
        weight = base[f"{path}.weight"]
        assert relative(measures.rotated(weight, [weight_map]), effective[f"{path}.weight"]) < 1e-6
        if f"{path}.bias" in effective:
            exact = effective[f"{path}.bias"]
            assert relative(measures.rotated_bias(base[f"{path}.bias"], [weight_map]), exact) < 1e-6
        for strength in (0.3, 1.7):
            for mode in ("angle", "linear", *weight_map.modes):
                _check_strength(weight.double(), weight_map, strength, mode)


def _check_strength(weight: torch.Tensor, weight_map: oftsurgery.WeightMap, strength: float, mode: str) -> None:
    if hasattr(weight_map, "strength"):
        return
    adapter = oftsurgery.OFTAdapter({"m": weight_map}, dialect="lycoris").at_strength(strength, mode)  # type: ignore[arg-type]
    weaker = adapter.modules["m"]
    try:
        got = quietly(oftsurgery.fold_weight, weight, weaker)
    except oftsurgery.AdapterError:
        with pytest.raises(oftsurgery.AdapterError, match=r"no part of its angle|leaves a BOFT adapter without alpha"):
            weaker.resolved()
        return
    assert relative(got, measures.rotated(weight, [weaker])) < 1e-10, (strength, mode)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "folder",
    [
        "lycoris-4.1.3/boft_rescaled", "lycoris-4.1.3/diag-oft_rescaled", "kohya-sd-scripts-0.8.8/dim4_alpha0.02",
        "kohya-sd-scripts-flux-0.9.0/dim4_alpha0.001", "lycoris-2.0.2/diag-oft_rescaled", "onetrainer-2026-08/block8_scaled",
        "peft-0.21.2/boft_block4_factors2", "peft-0.21.2/hra_r3_gs", "peft-0.21.2/road_4",
    ],
)  # fmt: skip
def test_quantised_weights_hold_the_fold_up_to_their_rounding(folder: str, kind: str, tmp_path: Path) -> None:
    golden = next(g for g in GOLDENS if g.folder == folder)
    adapter, base = golden.adapter(), quantise(model_of(golden.base_tensors()), kind)
    before = state_bytes(base)
    folded = quietly(oftsurgery.fold, base, adapter, undo=tmp_path / "fold.undo", rounding="nearest")
    names = found_in(adapter, base.state_dict())
    for name, weight_map in adapter.modules.items():
        layer, new = base.get_submodule(names[name]), folded.get_submodule(names[name])
        if isinstance(layer, nn.Conv2d):
            continue
        exact = measures.rotated(stored_weight(layer), [weight_map])
        rounding = relative(requantised(exact, layer), exact)
        assert relative(stored_weight(new), exact) <= 1.02 * rounding + 1e-6
    back = oftsurgery.unfold(folded, undo=tmp_path / "fold.undo")
    assert state_bytes(back) == before


def test_a_check_disapproves_the_wrong_conventions() -> None:
    """Every wrong convention is far off the golden weights."""
    golden = next(g for g in GOLDENS if g.folder == "lycoris-4.1.3/diag-oft_constraint")
    weight_map, weight = golden.adapter().modules["lycoris_attn_to_q"], golden.base_tensors()["attn.to_q.weight"]
    assert isinstance(weight_map, OutputBlocks)
    right = (golden.effective(1) or {})["attn.to_q.weight"]
    wrong = {
        "transposed": replace(weight_map, blocks=weight_map.blocks.mT),
        "half": replace(weight_map, blocks=weight_map.blocks / 2, alpha=0.0),
        "no limit": replace(weight_map, alpha=0.0),
        "limit without the outputs": replace(weight_map, alpha=float(weight_map.alpha or 0) / weight_map.rows),
    }
    for what, other in wrong.items():
        assert relative(measures.rotated(weight, [other]), right) > 0.05, what
