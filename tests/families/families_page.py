"""The page of the results, docs/model-families.md."""

from __future__ import annotations

from typing import Any

from results import ROOT

PAGE = ROOT / "docs" / "model-families.md"


def page_of(results: dict[str, Any]) -> str:
    return "# Model families\n"
