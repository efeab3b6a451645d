"""The rotation that checks make for themselves, against peft's releases and against dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from independent import VARIANTS, make_case, relative
from safetensors.torch import load_file

import oftsurgery
from oftsurgery import NonFiniteError, Rotation, ShapeError
from oftsurgery.checks import measures

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = sorted(p.parent.relative_to(GOLDEN).as_posix() for p in GOLDEN.glob("peft-*/*/adapter_config.json"))


@pytest.mark.parametrize("variant", GOLDENS)
def test_it_gives_what_the_release_computes(variant: str) -> None:
    base, effective = (load_file(GOLDEN / variant / name) for name in ("../base.safetensors", "effective.safetensors"))
    for path, rotation in oftsurgery.load_adapter(GOLDEN / variant).modules.items():
        assert relative(measures.rotated(base[f"{path}.weight"], [rotation]), effective[f"{path}.weight"]) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chain_is_the_live_one(variant: str) -> None:
    first, second = (make_case(variant, 96, 64, path="layer", size=size) for size in (0.03, 0.05))
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(96, dtype=torch.float64)
    if first.side == "output":
        live = ((eye @ weight.double().T) @ first.dense @ second.dense).T
    else:
        live = ((eye @ first.dense @ second.dense) @ weight.double().T).T
    for case in (first, second):
        live = live if case.scale is None else live * case.scale.unsqueeze(1)
    chain = [case.adapter.modules["layer"] for case in (first, second)]
    # independent.py makes Q of old releases' matrices in float32
    assert relative(measures.rotated(weight, chain), live) < (1e-14 if ".2" in variant or ".17" in variant else 1e-7)


@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("since_0_18", [True, False])
def test_series(terms: int, since_0_18: bool) -> None:
    """Of ``Q = [[0, θ], [-θ, 0]]`` every term is a power of ``iθ``."""
    theta = 0.3
    rotation = Rotation(
        torch.tensor([[theta]], dtype=torch.float64), oftsurgery.Cayley(terms, since_0_18=since_0_18), "embedding"
    )
    m = max(terms - 1, 3) if since_0_18 and terms >= 3 else terms - 1
    value = 1 + 2 * sum((1j * theta) ** k for k in range(1, m + 1))
    value -= (1j * theta) ** m if since_0_18 and terms >= 3 else 0
    expected = torch.tensor([[value.real, value.imag], [-value.imag, value.real]], dtype=torch.float64)
    assert relative(measures.rotated(torch.eye(2), [rotation]), expected) < 1e-15


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="do not cover"):
        measures.rotated(torch.ones(4, 6), [Rotation(torch.zeros(2, 1))])
    with pytest.raises(ShapeError, match="two or four dimensions"):
        measures.rotated(torch.ones(4, 4, 3), [Rotation(torch.zeros(2, 1))])
    with pytest.raises(ShapeError, match="overlaps the patches"):
        measures.rotated(torch.ones(4, 4, 3, 3), [Rotation(torch.zeros(18, 1))])
    with pytest.raises(NonFiniteError, match="a block's generator is too large"):
        measures.rotated(torch.ones(4, 4), [Rotation(torch.full((1, 6), float("nan")))])


def test_relative_error() -> None:
    assert measures.relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert measures.relative(torch.zeros(2), torch.zeros(2)) == 0
