"""The page of the results, docs/model-families.md."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from families import GROUPS
from reasons import reason_of
from results import ABSENT, ADAPTERS, BASES, REFUSED, RIGHT, ROOT, STACK, Row, verdict_of

PAGE = ROOT / "docs" / "model-families.md"

HEAD = """\
# Model families

<!-- written by `make families` from families.json: change tests/families, not this page -->

Every class below was folded in a tiny size, with {versions}, and each result was held against what peft's own live model computes. Each class is tried on
three bases, with four adapters:

| base | what it is |
|---|---|
| plain | float32 |
| nf4 | what transformers loads with bitsandbytes' NF4 and double quantisation |
| int8 | what transformers loads with bitsandbytes' int8 |

| adapter | what it trains |
|---|---|
| linears | rotations of every linear layer (peft's `all-linear`) |
| head saved | rotations of the attention's layers, and the whole head (`modules_to_save`, or the task's own) |
| embedding saved | rotations of the attention's layers, and the whole input embedding |
| ends rotated | rotations of the attention's layers, the input embedding and the head |

A cell is **right** when all of this holds:

- `fold` in memory: each rotated weight is the live layer's, each trained tensor is the live model's byte for byte, nothing else has changed, and the
  outputs are the live model's (plain: in float64, to 1e-5; quantised: to the rounding of the format);
- `fold_checkpoint` from the plain folder gives the same bytes, and transformers loads its output without a missing or superfluous key;
- both undo records give every byte of the base back;
- `export_safetensors` of the folded model loads with the same bytes and the same outputs.

**ONNX** is `export_onnx` of the folded plain and nf4 models with the first adapter, proved by onnxruntime beside torch. **Refused** cells raise a
typed error before anything is written; **the stack cannot** where transformers, peft, bitsandbytes or torch raise without oftsurgery. The numbers lead to the
reasons below the tables. A dash: the class has no such part.

Of {classes} classes, {cells} cells: {counts}.
"""


class Notes:
    """Numbers of the reasons, in the order in which the tables name them."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], int] = {}

    def number(self, verdict: str, error: str, text: str) -> int:
        reason = reason_of(error, text) if verdict == REFUSED else None
        told = (
            reason.why if reason is not None else re.sub(r"\s+", " ", text if verdict == STACK else f"{error}: {text}")
        )
        return self.found.setdefault((verdict, told), len(self.found) + 1)

    def cell(self, findings: list[list[str]], *, onnx: bool) -> str:
        """``right``, or the verdict and the numbers of its reasons."""
        verdict = verdict_of(findings, onnx=onnx)
        if verdict in (RIGHT, ABSENT):
            return "–" if verdict == ABSENT else RIGHT
        numbers = {self.number(v, e, t) for step, v, e, t in findings if (step == "onnx") == onnx and v != ABSENT}
        name = "the stack cannot" if verdict == STACK else verdict
        return f"{name} [{', '.join(str(n) for n in sorted(numbers))}]"


def page_of(results: dict[str, Any]) -> str:
    families: dict[str, Row] = results["families"]
    notes, tables = Notes(), []
    for group, rows in GROUPS.items():
        lines = [_line(f.cls, families[f.cls], notes) for f in rows if f.cls in families]
        if lines:
            tables += [
                f"## {group}",
                "",
                "| class | plain | nf4 | int8 | ONNX |",
                "|---|---|---|---|---|",
                *sorted(lines),
                "",
            ]
    reasons = ["## Reasons", "", "| | | |", "|---|---|---|"]
    reasons += [
        f"| {n} | {'the stack cannot' if v == STACK else v} | {_escaped(told)} |"
        for (v, told), n in notes.found.items()
    ]
    return "\n".join([_head(results), *tables, *reasons, ""])


def _head(results: dict[str, Any]) -> str:
    families: dict[str, Row] = results["families"]
    counted = Counter(
        verdict_of(row.get(f"{base}, {adapter}", []), onnx=False)
        for row in families.values()
        for base in BASES
        for adapter in ADAPTERS
    )
    absent = counted.pop(ABSENT, 0)
    names = {STACK: "the stack cannot"}
    counts = ", ".join(f"{n} {names.get(v, v)}" for v, n in counted.most_common())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    cells = len(families) * len(BASES) * len(ADAPTERS) - absent
    return HEAD.format(versions=versions, classes=len(families), cells=cells, counts=counts)


def _line(cls: str, row: Row, notes: Notes) -> str:
    """Of one class: a base's cells in one word where they are alike."""
    columns = []
    for base in BASES:
        told = {a: notes.cell(row.get(f"{base}, {a}", []), onnx=False) for a in ADAPTERS}
        alike = {t for t in told.values() if t != "–"}
        columns.append(
            alike.pop() if len(alike) == 1 else "; ".join(f"{a}: {t}" for a, t in told.items() if t not in (RIGHT, "–"))
        )
    graphs = {base: notes.cell(row.get(f"{base}, linears", []), onnx=True) for base in BASES[:2]}
    folded = [b for b in graphs if verdict_of(row.get(f"{b}, linears", []), onnx=False) == RIGHT]
    shown = {graphs[b] for b in folded}
    columns.append(shown.pop() if len(shown) == 1 else "; ".join(f"{b}: {graphs[b]}" for b in folded) or "–")
    return f"| {cls} | {' | '.join(columns)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
