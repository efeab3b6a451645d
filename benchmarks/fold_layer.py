"""How fast one layer folds: ``make bench``.

oftsurgery's fold and peft's own merge of the same layer with the same adapter, in turn within one process; medians and their ratio. peft gets
the layer with its adapter live on it; oftsurgery gets the plain layer and the adapter as read. Both make a new weight in the layer's own format;
oftsurgery's time includes what peft does not do: measuring the weight's error and hashing it for the record.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from peft import OFTConfig, get_peft_model, get_peft_model_state_dict
from peft import __version__ as peft_version
from torch import nn

import oftsurgery
from oftsurgery.adapter import parse_adapter

BLOCK_SIZE = 32


@dataclass(frozen=True)
class Case:
    """A layer of ``out`` × ``features``, stored as ``format``; each side's merge is timed ``repeats`` times."""

    format: str
    out: int
    features: int
    repeats: int


CASES = [Case(stored, size, size, repeats) for size, repeats in ((1024, 7), (4096, 3)) for stored in ("nf4", "int8")]


class Model(nn.Module):
    """The least that peft takes: one named layer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(case.out, case.features) * 0.02
        if case.format == "int8":
            self.layer: nn.Module = bnb.nn.Linear8bitLt(case.features, case.out, bias=False, has_fp16_weights=False)
            self.layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            self.layer = bnb.nn.Linear4bit(case.features, case.out, bias=False, quant_type=case.format, compute_dtype=torch.float32)
            self.layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=case.format, compress_statistics=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def build(case: Case) -> nn.Module:
    """A fresh quantised layer; the same each time."""
    return Model(case).to("cpu").eval()


def with_adapter(case: Case) -> nn.Module:
    """The same, with a random adapter live on it."""
    model = get_peft_model(build(case), OFTConfig(r=0, oft_block_size=BLOCK_SIZE, target_modules=["layer"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.01)
    return model.eval()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case) -> tuple[float, float]:
    """Median seconds of (oftsurgery's fold, peft's merge), one of each in turn after one of each that does not count."""
    live = with_adapter(case)
    config = live.peft_config["default"].to_dict() | {"peft_version": peft_version}
    adapter = parse_adapter(config, {k: t.clone() for k, t in get_peft_model_state_dict(live).items()})
    base = build(case)
    ours, theirs = [], []
    for _ in range(case.repeats + 1):
        ours.append(seconds(lambda: oftsurgery.fold(base, adapter)))
        model = with_adapter(case)
        theirs.append(seconds(model.merge_and_unload))
    return statistics.median(ours[1:]), statistics.median(theirs[1:])


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", oftsurgery.RoundingWarning)
    print(f"Folding one layer, OFT block size {BLOCK_SIZE}, CPU ({os.cpu_count()} cores): median seconds, and peft's as a multiple of ours\n")
    print(f"| layer | oftsurgery {oftsurgery.__version__} | peft {peft_version} | peft / oftsurgery |\n|---|---:|---:|---:|")
    for case in CASES:
        ours, theirs = measure(case)
        print(f"| {case.format}, {case.out} × {case.features} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
