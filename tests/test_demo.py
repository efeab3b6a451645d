"""The demo's own functions, shortened: what it prints is what is true."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from bitsandbytes.functional import has_avx512bf16

SCRIPT = Path(__file__).parent.parent / "tools" / "demo.py"

# Both merges round the same weights to the same grid. What differs is the order of summation, which tips some ties, and
# after a forward the bfloat16
# rounding of absmax that bitsandbytes' repacking did to the base: less than 1 % of the distance in all runs so far.
NOISE = 1.02


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def distances(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """``{quantisation: {line of the table: distance to the live adapter}}`` after six steps of fine-tuning."""
    found = {}
    for quantisation in demo.QUANTISATIONS:
        folder = tmp_path_factory.mktemp(quantisation)
        losses = list(demo.fine_tune(quantisation, folder, steps=6, rate=4e-3, size=8))
        assert len(losses) == 6
        assert all(0 < loss < 10 for loss in losses)
        rows = demo.compare(quantisation, folder, sentences=48, repeats=1)
        assert all(row.seconds is None or row.seconds > 0 for row in rows)
        found[quantisation] = {row.model: row.distance for row in rows}
        assert list(found[quantisation]) == [demo.BASE, *demo.MERGES]
        assert demo.format_table({quantisation: rows}).count("\n") == len(rows) + 1
    return found


def _of(demo: ModuleType, rows: dict[str, float], by: str, *, after_forward: bool) -> float:
    return next(rows[label] for label, case in demo.MERGES.items() if case == (by, after_forward))


@pytest.mark.parametrize("quantisation", ["NF4", "int8"])
@pytest.mark.parametrize("after_forward", [False, True], ids=["fresh", "after a forward"])
def test_no_worse_than_pefts_fresh_merge(
    demo: ModuleType, distances: dict[str, dict[str, float]], quantisation: str, after_forward: bool
) -> None:
    rows = distances[quantisation]
    ours = _of(demo, rows, "oftsurgery", after_forward=after_forward)
    assert ours <= NOISE * _of(demo, rows, "peft", after_forward=False)
    # and the fold did fold: without the adapter the embeddings are elsewhere
    assert ours < 0.5 * rows[demo.BASE]


def test_pefts_merge_after_a_forward_is_noise_where_the_cpu_repacks(
    demo: ModuleType, distances: dict[str, dict[str, float]]
) -> None:
    after = _of(demo, distances["NF4"], "peft", after_forward=True)
    fresh = _of(demo, distances["NF4"], "peft", after_forward=False)
    if has_avx512bf16():
        assert after > 0.1
    else:  # nothing is repacked
        assert after == pytest.approx(fresh, rel=NOISE - 1)


def test_text_is_prose_and_held_out_sentences_are_not_trained_on(demo: ModuleType) -> None:
    trained, held_out = ({s for paragraph in part for s in paragraph} for part in demo.paragraphs())
    assert len(trained) > 500
    assert len(demo.held_out(128)) == len(set(demo.held_out(128)))
    assert not set(demo.held_out(128)) & trained
    assert held_out >= set(demo.held_out(128))
