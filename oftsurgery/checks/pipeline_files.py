"""What a check of a pipeline of diffusers adds to the checks of its models: one report of all, and the files beside the models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from oftsurgery.files.reading import inside, sha256_of

from .checkpoint_report import CheckpointReport, FileCheck

if TYPE_CHECKING:
    from oftsurgery.files.pipeline import Pipeline


def joined_reports(reports: Mapping[str, CheckpointReport]) -> CheckpointReport:
    """The reports of a pipeline's models as one, with the components' names in front."""

    def named(field: str, sep: str = ".") -> dict[str, Any]:
        parts = {component: getattr(report, field) for component, report in reports.items()}
        return {f"{component}{sep}{name}": value for component, part in parts.items() for name, value in part.items()}

    return CheckpointReport(
        named("modules"),
        next((report.tolerance for report in reports.values()), None),
        named("files", "/"),
        named("tensors"),
        config=next((f"{name}: {r.config}" for name, r in reports.items() if r.config is not None), None),
        remedies=tuple(dict.fromkeys(remedy for report in reports.values() for remedy in report.remedies)),
    )


def compare_files(folded: Pipeline, base: Pipeline, models: Collection[str]) -> dict[str, FileCheck]:
    """The state of the pipeline's files beside the folded ``models``: each must be the base's, byte for byte."""
    found: dict[str, FileCheck] = {}
    for name in folded.files(but=models):
        there = base.folder / name
        same = there.is_file() and sha256_of(inside(base.folder, name, nested=True)) == sha256_of(folded.folder / name)
        found[name] = "ok" if same else "changed"
    for component in base.models.keys() - folded.models.keys():
        found[component] = "missing"
    return found
