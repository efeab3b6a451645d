"""The results of the sweep: the page agrees with the results, every refusal has its reason, and some cells run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import run_family
from families import FAMILIES
from families_page import PAGE, page_of
from results import RESULTS, changes, read_results, trouble

#: cells of every kind: ties, fused projections, idle layers, experts, state spaces, images, sound
CELLS = [
    ("LlamaForCausalLM", "nf4, ends rotated"),
    ("GPT2LMHeadModel", "plain, embedding saved"),
    ("BartForConditionalGeneration", "plain, ends rotated"),
    ("T5ForConditionalGeneration", "int8, head saved"),
    ("NomicBertForMaskedLM", "plain, linears"),
    ("BertForSequenceClassification", "nf4, head saved"),
    ("MixtralForCausalLM", "nf4, linears"),
    ("MambaForCausalLM", "plain, linears"),
    ("Zamba2ForCausalLM", "plain, linears"),
    ("ViTForImageClassification", "int8, linears"),
    ("WavLMForCTC", "plain, head saved"),
    ("CLIPModel", "plain, linears"),
]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return read_results(RESULTS)


def test_every_class_has_its_results_and_the_page_says_them(results: dict[str, Any]) -> None:
    """``make families`` writes the results and the page; ``tests/families/sweep.py --page`` writes the page alone."""
    assert results["families"].keys() <= FAMILIES.keys()
    assert len(results["families"]) >= 100
    assert PAGE.read_text(encoding="utf-8") == page_of(results)
    assert RESULTS.stat().st_size < 1_000_000


def test_nothing_is_wrong_and_every_refusal_has_its_reason(results: dict[str, Any]) -> None:
    assert trouble(results["families"]) == []


def verdicts(findings: list[list[str]]) -> list[tuple[str, str, str]]:
    return [(step, verdict, error) for step, verdict, error, _ in findings if step != "onnx"]


@pytest.mark.parametrize(("cls", "cell"), CELLS)
def test_a_cell_still_says_what_the_table_says(cls: str, cell: str, results: dict[str, Any], tmp_path: Path) -> None:
    kind, which = cell.split(", ")
    found = run_family(FAMILIES[cls], tmp_path, [(kind, which)], graphs=False)[cell]
    now = [[f.step, f.verdict, f.error, f.text] for f in found]
    assert verdicts(now) == verdicts(results["families"][cls].get(cell, [])), now


def test_changes_between_two_sweeps_are_told_a_line_each() -> None:
    wrong = [["disk", "wrong", "WrongError", "outputs are 0.5 from the live ones"]]
    old = {"versions": {"transformers": "5.23.0"}, "families": {"A": {"plain, linears": wrong}, "B": {}, "C": {}}}
    new = {"versions": {"transformers": "5.24.0"}, "families": {"A": {}, "B": {"nf4, linears": wrong}, "D": {}}}
    assert list(changes(old, new)) == [
        "transformers: 5.23.0 → 5.24.0",
        "A: plain, linears: disk wrong (WrongError: outputs are 0.5 from the live ones) → right",
        "B: nf4, linears: right → disk wrong (WrongError: outputs are 0.5 from the live ones)",
        "C: gone",
        "D: new",
    ]
    assert trouble(new["families"]) == ["B: nf4, linears: disk: wrong: WrongError: outputs are 0.5 from the live ones"]
    assert list(changes(new, new)) == []
