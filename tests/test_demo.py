"""The demo's own functions, shortened: what it prints is what is true."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from bitsandbytes.functional import has_avx512bf16

# The strong adapter's weights round to the same levels in both merges. What differs is the order of summation, which tips
# some ties, and after a forward the bfloat16 rounding of absmax that bitsandbytes' repacking did to the base: about 1 % of
# the distance in all runs so far.
NOISE = 1.02

#: name → (quantisation, learning rate of six steps); the weak adapter moves the weights by about 3 %, the others by 13 %
ADAPTERS = {"NF4": ("NF4", 4e-3), "weak": ("NF4", 1e-3), "int8": ("int8", 4e-3)}


@pytest.fixture(scope="module")
def found(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``{name of the adapter: demo.Comparison}`` after six steps of fine-tuning."""
    comparisons = {}
    for name, (quantisation, rate) in ADAPTERS.items():
        folder = tmp_path_factory.mktemp(name)
        losses = list(demo.fine_tune(quantisation, folder, steps=6, rate=rate, size=8))
        assert len(losses) == 6
        assert all(0 < loss < 10 for loss in losses)
        comparisons[name] = demo.compare(quantisation, folder, sentences=48, repeats=1)
    return comparisons


def test_rows_and_table(demo: ModuleType, found: dict[str, Any]) -> None:
    for comparison in found.values():
        assert [row.model for row in comparison.rows] == [demo.BASE, demo.LIVE, *demo.MERGES]
        base, live, *merges = comparison.rows
        assert (base.kept, base.seconds, live.kept, live.distance) == (0, None, 1, 0)
        assert all(row.seconds > 0 for row in merges)
    table = demo.format_table(list(found.values()))
    assert table.count("\n") == len(demo.MERGES) + 3
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert f"{found['weak'].moved:.1%}" in demo.conclusion(*found.values())


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("after_forward", [False, True], ids=["fresh", "after a forward"])
def test_no_worse_than_pefts_fresh_merge(found: dict[str, Any], name: str, after_forward: bool) -> None:
    comparison = found[name]
    ours = comparison.of("oftsurgery", after_forward=after_forward).distance
    assert ours <= NOISE * comparison.of("peft", after_forward=False).distance
    # and the fold did fold: without the adapter the embeddings are elsewhere
    assert ours < 0.5 * comparison.rows[0].distance


@pytest.mark.parametrize("after_forward", [False, True], ids=["fresh", "after a forward"])
def test_a_weak_adapter_is_kept_where_nearest_rounding_gives_the_base_back(
    found: dict[str, Any], after_forward: bool
) -> None:
    weak = found["weak"]
    assert 0.01 < weak.moved < 0.05
    ours, theirs = weak.of("oftsurgery", after_forward=after_forward), weak.of("peft", after_forward=False)
    assert 0.95 <= ours.kept <= 1.05
    assert theirs.kept < 0.2
    assert ours.distance <= 0.3 * theirs.distance


@pytest.mark.parametrize("name", ["NF4", "weak"])
def test_pefts_merge_after_a_forward_is_noise_where_the_cpu_repacks(found: dict[str, Any], name: str) -> None:
    fresh, after = (found[name].of("peft", after_forward=after).distance for after in (False, True))
    if has_avx512bf16():
        assert after > 0.5
    else:  # nothing is repacked
        assert after == pytest.approx(fresh, rel=NOISE - 1)


def test_text_is_prose_and_held_out_sentences_are_not_trained_on(demo: ModuleType) -> None:
    trained, held_out = ({s for paragraph in part for s in paragraph} for part in demo.paragraphs())
    assert len(trained) > 500
    assert len(demo.held_out(128)) == len(set(demo.held_out(128)))
    assert not set(demo.held_out(128)) & trained
    assert held_out >= set(demo.held_out(128))


@pytest.mark.slow
def test_a_language_model_beside_its_live_adapter() -> None:
    """The shipped adapter, on two windows: the table's order of models, and what each row says."""
    from demo_language_model import compare_language_models, table_of, texts_of

    rows = {row.model: row for row in compare_language_models("of now", windows=1, calibration=2)}
    base, live, peft, noise, ours, calibrated = rows.values()
    assert live.sources.divergence < 1e-6
    assert (base.kept, live.kept, live.sources.same) == (0.0, 1.0, 1.0)
    for text in ("sources", "prose"):
        nearest, kept, more = (getattr(row, text).divergence for row in (peft, ours, calibrated))
        assert max(kept, more) < 0.6 * nearest
        assert nearest < 1.5 * getattr(base, text).divergence
    assert ours.kept == pytest.approx(1, abs=0.02)
    assert peft.kept is not None
    assert peft.kept < 0.2
    if has_avx512bf16():
        assert noise.sources.divergence > 1
    table = table_of(list(rows.values()))
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert all(name in table and name in texts_of(list(rows.values())) for name in rows)
