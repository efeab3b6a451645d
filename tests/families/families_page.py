"""The page of the results, docs/model-families.md."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from families import FAMILIES, GROUPS
from reasons import reason_of
from results import ABSENT, ADAPTERS, BASES, REFUSED, RIGHT, ROOT, STACK, Row, verdict_of

PAGE = ROOT / "docs" / "model-families.md"

HEAD = """\
# Model families

<!-- `make families` writes this page from families.json: change tests/families, not this page -->

The sweep of `make families` folds each class below in a tiny size and compares every result with the live model that peft computes. The sweep ran with
{versions}.

Each class has three bases:

| base | storage |
|---|---|
| plain | float32 |
| nf4 | bitsandbytes' NF4 with double quantisation, as transformers loads it |
| int8 | bitsandbytes' int8, as transformers loads it |

and four adapters:

| adapter | what peft trains |
|---|---|
| linears | rotations of every linear layer (peft's `all-linear`) |
| head saved | rotations of the attention's layers, and the whole head (`modules_to_save`, or a task type that saves the head) |
| embedding saved | rotations of the attention's layers, and the whole input embedding (`modules_to_save`) |
| ends rotated | rotations of the attention's layers, of the input embedding and of the head |

A cell is **right** when the project has shown all of these facts:

- In memory, `fold` gives each rotated weight of the live model, every trained tensor of the live model byte for byte, and no other change. The outputs equal
  the live model's: on a plain base to 1e-5 in float64. On a quantised base each weight agrees to the rounding of its format.
- On disk, `fold_checkpoint` gives the same bytes from the plain folder, and transformers loads the output without a missing or unexpected key.
- Both undo records give back every byte of the base.
- `export_safetensors` writes the folded model as a folder that loads with the same bytes and outputs.

The column **ONNX** is `export_onnx` of the folded plain model with the adapter "linears"; onnxruntime proves each graph beside torch. A **refused** cell
raises a typed error before anything is written. **The stack cannot** means that transformers, peft, bitsandbytes, torch or onnxruntime fails at the cell
without oftsurgery. Numbers lead to the reasons at the end of the page. A dash means that the class
has no such part, or that the fold is not right.

The table has {classes} of the {rows} classes in tests/families, and {cells} cells: {counts}.
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
    return HEAD.format(versions=versions, classes=len(families), rows=len(FAMILIES), cells=cells, counts=counts)


def _line(cls: str, row: Row, notes: Notes) -> str:
    """The table's row of one class; the cells of a base become one word if all of these cells are alike."""
    columns = []
    for base in BASES:
        told = {a: notes.cell(row.get(f"{base}, {a}", []), onnx=False) for a in ADAPTERS}
        alike = {t for t in told.values() if t != "–"}
        columns.append(
            alike.pop() if len(alike) == 1 else "; ".join(f"{a}: {t}" for a, t in told.items() if t not in (RIGHT, "–"))
        )
    plain = row.get("plain, linears", [])
    columns.append(notes.cell(plain, onnx=True) if verdict_of(plain, onnx=False) == RIGHT else "–")
    return f"| {cls} | {' | '.join(columns)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
