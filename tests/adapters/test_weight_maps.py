"""Maps of many sizes against their second statement in the checks, at several strengths, and their inverses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from image_goldens import relative
from warned import quietly

import oftsurgery
from oftsurgery import AdapterError, NonFiniteError, OFTAdapter, WeightMap
from oftsurgery.adapters.boft import LycorisBoft, PeftBoft
from oftsurgery.adapters.hra import Householder
from oftsurgery.adapters.onetrainer import OneTrainerBlocks
from oftsurgery.adapters.output_blocks import FinishedBlocks, FluxParts, OutputBlocks
from oftsurgery.adapters.road import Pairs
from oftsurgery.checks import measures


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.2


def _maps() -> Iterator[tuple[WeightMap, int, int]]:
    """``(map, outputs, inputs)``."""
    torch.manual_seed(1)
    for (n, b), alpha in itertools.product([(1, 3), (5, 3), (7, 11), (3, 1)], [0.0, 1e-3]):
        yield OutputBlocks(random(n, b, b), alpha, "kohya"), n * b, 14
        yield OutputBlocks(random(n, b, b), alpha, "lycoris", torch.rand(n * b, 1) + 0.2), n * b, 14
        yield FluxParts((random(n, b, b), random(n, b, b), random(n, 2 * b, 2 * b)), alpha), 4 * n * b, 5
    yield OutputBlocks(random(5, 4, 4), None, "lycoris"), 20, 3
    yield OutputBlocks(random(2, 160, 160), 10.0, "kohya"), 320, 3
    yield FinishedBlocks(torch.eye(4) + random(3, 4, 4) * 0.1), 12, 5
    for n, b, m in ((8, 4, 4), (4, 6, 3), (2, 10, 2), (1, 8, 1), (12, 4, 3)):
        yield LycorisBoft(random(m, n, b, b), 1e-3, torch.rand(n * b, 1) + 0.5), n * b, 10
        yield LycorisBoft(random(m, n, b, b), None), n * b, 10
    for n, b, factors in ((8, 4, 3), (4, 6, 2), (9, 4, 1), (6, 3, 1)):
        yield PeftBoft(random(factors, n, b, b), torch.rand(13, 1) + 0.5), 13, n * b
        yield PeftBoft(random(factors, n, b, b), torch.rand(1, 13) + 0.5, relaid=True), 13, n * b
    for (r, b, features), scaled in itertools.product([(1, 8, 24), (9, 5, 45), (1, 4, 4)], [False, True]):
        yield OneTrainerBlocks(random(r, b * (b - 1) // 2), scaled, first_days=scaled), 11, features
    for orthogonal in (False, True):
        yield Householder(random(18, 5), orthogonal), 7, 18
    for (variant, count), group in itertools.product([("road_1", 1), ("road_2", 2), ("road_4", 4)], [2, 6, 12]):
        yield Pairs(torch.randn(12 * count), torch.rand(12 * count) + 0.3, variant, group), 24, 5


@pytest.mark.parametrize("strength", [1.0, 0.4, -1.3])
def test_the_maps_are_what_the_checks_state(strength: float) -> None:
    for weight_map, rows, features in _maps():
        for mode in ("angle", "linear", *weight_map.modes):
            weight = torch.randn(rows, features, dtype=torch.float64)
            adapter = OFTAdapter({"m": weight_map}, dialect="lycoris").at_strength(strength, mode)  # type: ignore[arg-type]
            here, what = adapter.modules["m"], f"{weight_map.settings()!r} {mode}"
            try:
                folded = quietly(oftsurgery.fold_weight, weight, here)
            except (AdapterError, NonFiniteError) as error:
                with pytest.raises(
                    type(error), match=r"no part of its angle|without alpha|too close to π|at π and beyond"
                ):
                    quietly(here.resolved)
                continue
            assert relative(folded, measures.rotated(weight, [here])) < 1e-9, what
            try:
                back = quietly(oftsurgery.unfold_weight, folded, here)
            except NonFiniteError:  # a half reflection, or a mix with a scale
                assert mode != "angle", what
                continue
            assert relative(back, weight) < 1e-6, what
            resolved = here.resolved()
            assert 0 <= resolved.angle <= 3.1416, what
            assert resolved.defect >= 0, what
