"""What helps a fold that keeps too little of its adapter: a remedy is given where it applies, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import oftsurgery
from oftsurgery import WeightFormat
from oftsurgery.records.advice import Case, advice, for_command_line, remedies

PRESERVE, CALIBRATE, INT8, BF16, FP32, LIVE = "preserve", "texts", "int8", "bf16", "fp32", "live"


def kinds(case: Case) -> list[str]:
    """The remedies of a case by their kinds, in their order."""
    words = {"needs no data": PRESERVE, "hundred texts": CALIBRATE, "keep the adapter live": LIVE}
    words |= {f"store the weights in {name}": name for name in (INT8, BF16, FP32)}
    return [next(kind for text, kind in words.items() if text in remedy.what) for remedy in remedies(case)]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("nf4", "nearest"), [PRESERVE, CALIBRATE, INT8, BF16, LIVE]),
        (Case("nf4 (double quantisation)", "grid"), [PRESERVE, CALIBRATE, INT8, BF16, LIVE]),
        (Case("fp4", "mse"), [PRESERVE, CALIBRATE, INT8, BF16, LIVE]),
        (Case("int8", "nearest"), [PRESERVE, CALIBRATE, BF16, LIVE]),
        # "preserve" was used already, or does not apply to a base that does not lie on the levels
        (Case("nf4", "preserve"), [CALIBRATE, INT8, BF16, LIVE]),
        (Case("nf4", "grid", same_levels=False), [CALIBRATE, INT8, BF16, LIVE]),
        # no calibration for a calibrated fold
        (Case("nf4", "preserve", calibrated=True), [INT8, BF16, LIVE]),
        (Case("int8", "preserve", calibrated=True), [BF16, LIVE]),
        # plain weights have no codes to choose
        (Case("bfloat16", "nearest"), [FP32, LIVE]),
        (Case("float16", "nearest"), [FP32, LIVE]),
        (Case("float32", "nearest"), [LIVE]),
    ],
    ids=str,
)
def test_a_remedy_is_given_where_it_applies(case: Case, expected: list[str]) -> None:
    for on_disk in (False, True):
        assert kinds(replace(case, on_disk=on_disk)) == expected


def test_calls_and_commands_are_whole() -> None:
    disk = Case("nf4", "nearest", on_disk=True, settings={"trained_on": "nf4-double", "skip_modules": ["lm_head"]})
    assert remedies(disk)[0].call == (
        'oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT", trained_on="nf4-double", skip_modules=["lm_head"], rounding="preserve")'
    )
    assert remedies(replace(disk, adapters=2))[1].call.startswith(
        'oftsurgery.fold_checkpoint("BASE", ["ADAPTER-1", "ADAPTER-2"], "OUTPUT", '
    )
    memory = Case("nf4", "nearest")
    assert [r.call for r in remedies(memory)] == [
        'oftsurgery.fold(model, "ADAPTER", rounding="preserve")',
        'oftsurgery.fold(model, "ADAPTER", calibration=batches)',
        'oftsurgery.fold(model, "ADAPTER", format="int8")',
        'oftsurgery.fold(model, "ADAPTER", format="bf16")',
        'oftsurgery.wrap(model, "ADAPTER")',
    ]
    live = remedies(replace(memory, adapters=0))
    assert live[0].call == 'oftsurgery.fold(model, rounding="preserve")'
    assert live[-1].call == ""
    command = "oftsurgery fold BASE ADAPTER OUTPUT --trained-on nf4-double --skip-modules lm_head --rounding preserve"
    assert remedies(disk, commands=True)[0].call == command
    with for_command_line({"BASE": ["my base"], "ADAPTER": ["a", "b"], "OUTPUT": ["out"], "FLAGS": ["--follow-links"]}):
        assert remedies(disk)[2].call == (
            "oftsurgery fold 'my base' a b out --trained-on nf4-double --skip-modules lm_head --format int8 --follow-links --force"
        )
        assert "oftsurgery.fold(model" in remedies(memory)[0].call  # no command folds a model in memory
    assert "load the base again" in advice(replace(memory, base_at_hand=False))
    assert "load the base again" not in advice(memory)


def record(base: dict[str, Any], asked: str = "nearest", source: str = "a", **module: Any) -> oftsurgery.FoldRecord:
    """A record of one weight that keeps a tenth of its adapter."""
    facts = {"format": "nf4", "rounding": "nearest", "kept": 0.1, "change": 1.0} | module
    made = oftsurgery.ModuleRecord(
        side="input", block_size=(16,), error=0.1, defect=0.0, angle=0.1, before="a", after="b", **facts
    )
    info = oftsurgery.AdapterInfo(source, "peft-0.21", "xxh3:0", None, None, None)
    return oftsurgery.FoldRecord(adapters=(info,), modules={"up": made}, rounding=asked, base=base)


@pytest.mark.parametrize(
    ("base", "module", "settings"),
    [
        ({}, {}, {}),
        ({"fold_into": "quantized", "quantize": None}, {}, {}),
        ({"fold_into": "quantized", "quantize": None}, {"format": "bfloat16"}, {"format": "bf16"}),
        (
            {
                "fold_into": "quantized",
                "quantize": "nf4",
                "double_quant": "true",
                "skip_modules": '["head"]',
                "dtype": "bfloat16",
            },
            {"format": "nf4 (double quantisation)"},
            {"format": "nf4", "trained_on": "nf4-double", "load_dtype": "bfloat16", "skip_modules": ["head"]},
        ),
        (
            {"fold_into": "quantized", "quantize": "int8", "double_quant": "false", "skip_modules": None},
            {"format": "bfloat16"},
            {"format": "bf16", "trained_on": "int8"},
        ),
        (
            {"fold_into": "original", "quantize": "nf4", "double_quant": "true", "revision": "v1"},
            {"format": "nf4 (double quantisation)"},
            {"format": "nf4", "trained_on": "plain", "double_quant": True, "revision": "v1"},
        ),
        (
            {"fold_into": "original", "quantize": None},
            {"format": "bfloat16"},
            {"format": "bf16", "trained_on": "plain"},
        ),
    ],
)
def test_the_next_fold_has_the_settings_of_the_record(
    base: dict[str, Any], module: dict[str, Any], settings: dict[str, Any]
) -> None:
    case = Case.of_record(record(base, **module), on_disk=True)
    assert case is not None
    assert case.settings == settings
    memory = Case.of_record(record(base, **module))
    assert memory is not None
    assert (memory.on_disk, memory.settings) == (False, {})
    sizes = Case.of_record(replace(record(base, **module), sizes={"before": 2, "after": 1}))
    assert sizes == case
    changed = Case.of_record(record({"format": "int8", "fold_into": "quantized"}, format="int8"))
    assert changed is not None
    assert (changed.on_disk, changed.same_levels, changed.settings) == (False, False, {"format": "int8"})


def test_a_record_says_which_roundings_apply() -> None:
    assert Case.of_record(record({}, kept=0.95)) is None
    assert kinds(Case.of_record(record({})))[0] == PRESERVE  # type: ignore[arg-type]
    asked = record({"fold_into": "original", "quantize": "nf4"}, "preserve")
    case = Case.of_record(asked)
    assert case is not None
    assert kinds(case)[0] == CALIBRATE
    calibrated = Case.of_record(replace(record({}), rounding="calibrated"))
    assert calibrated is not None
    assert CALIBRATE not in kinds(calibrated)
    live = Case.of_record(record({}, source="live adapter 'default'"))
    assert live is not None
    assert live.adapters == 0


def test_a_merge_without_a_record_is_told_by_its_formats() -> None:
    plain, nf4 = WeightFormat("dense", (64, 64), torch.bfloat16), WeightFormat("nf4", (64, 64), torch.bfloat16, 64, 256)
    stored = Case.of_weights(nf4, nf4, rotated=nf4, on_disk=True)
    assert (stored.same_levels, stored.settings) == (True, {})
    first = Case.of_weights(plain, nf4, rotated=nf4, on_disk=True)
    assert (first.same_levels, first.settings) == (True, {"format": "nf4", "trained_on": "nf4-double"})
    turned = Case.of_weights(plain, nf4, rotated=plain, on_disk=True)
    assert (turned.same_levels, turned.settings) == (
        False,
        {"format": "nf4", "trained_on": "plain", "double_quant": True},
    )
    dense = Case.of_weights(plain, plain, rotated=plain, on_disk=True)
    assert (kinds(dense), dense.settings) == ([FP32, LIVE], {"trained_on": "plain"})
    qoft = Case.of_weights(plain, plain, rotated=nf4, on_disk=True)
    assert (qoft.same_levels, qoft.settings) == (False, {"trained_on": "nf4-double"})
    assert Case.of_weights(plain, plain, rotated=plain, on_disk=False).settings == {}


@pytest.mark.parametrize(("output_kept", "weak"), [(0.0, True), (0.45, True), (0.6, False)])
def test_a_calibration_that_puts_the_change_back_is_told(output_kept: float, *, weak: bool) -> None:
    """Where the adapter moves the weights by far less than a step, the base's own codes can be nearest on the texts."""
    made = replace(record({}, "calibrated", rounding="calibrated", output_kept=output_kept), rounding="calibrated")
    assert bool(made.weak) == weak
    case = Case.of_record(made)
    assert (case is not None) == weak
    if case is not None:
        assert kinds(case) == [INT8, BF16, LIVE]
