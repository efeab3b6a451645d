"""The results of a sweep: their file, the cells in trouble, and the changes between two sweeps.

The file has one line a class. A class's row holds the cells that are not right, each with its findings: ``[step,
verdict, error, text]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reasons import reason_of

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "families.json"

BASES = ("plain", "nf4", "int8")
ADAPTERS = ("linears", "head saved", "embedding saved", "ends rotated")

RIGHT, REFUSED, STACK, WRONG, CRASH, ABSENT = "right", "refused", "stack", "wrong", "crash", "absent"

Row = dict[str, list[list[str]]]


def read_results(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"versions": {}, "families": {}}


def write_results(results: dict[str, Any]) -> None:
    """Write the results with one line a class, in the order of the classes' names."""
    lines = [
        f"{json.dumps(cls)}: {json.dumps(row, ensure_ascii=False)}" for cls, row in sorted(results["families"].items())
    ]
    text = f'{{"versions": {json.dumps(results["versions"])},\n"families": {{\n' + ",\n".join(lines) + "\n}}\n"
    RESULTS.write_text(text, encoding="utf-8")


def trouble(families: dict[str, Row]) -> list[str]:
    """Cells that are wrong, that crash, or that are refused for a reason that the table does not have."""
    return [
        f"{cls}: {cell}: {step}: {verdict}: {error}: {text}"
        for cls, row in families.items()
        for cell, findings in row.items()
        for step, verdict, error, text in findings
        if verdict in (WRONG, CRASH) or (verdict == REFUSED and reason_of(error, text) is None)
    ]


def verdict_of(findings: list[list[str]], *, onnx: bool) -> str:
    """The worst verdict on a cell's graph (``onnx``), or on the other steps of the cell."""
    found = [verdict for step, verdict, *_ in findings if (step == "onnx") == onnx]
    return next((v for v in (CRASH, WRONG, REFUSED, STACK, ABSENT) if v in found), RIGHT)


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """The differences between two sweeps, one line each."""
    for name, version in new["versions"].items():
        if old["versions"].get(name, version) != version:
            yield f"{name}: {old['versions'][name]} → {version}"
    was, now = old["families"], new["families"]
    for cls in sorted(was.keys() | now.keys()):
        if cls not in now or cls not in was:
            yield f"{cls}: {'new' if cls in now else 'gone'}"
            continue
        for cell in sorted(was[cls].keys() | now[cls].keys()):
            before, after = (_told(rows[cls].get(cell, [])) for rows in (was, now))
            if before != after:
                yield f"{cls}: {cell}: {before} → {after}"


def _told(findings: list[list[str]]) -> str:
    return (
        "; ".join(
            f"{step} {verdict} ({error}: {text[:120]})" if error else f"{step} {verdict}"
            for step, verdict, error, text in findings
        )
        or RIGHT
    )
