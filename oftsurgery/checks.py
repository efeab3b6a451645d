"""Check a folded checkpoint on disk: its files against the hashes in its record, its weights against base and adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from . import codecs, configs, measures, rotations
from .adapter import OFTAdapter
from .checkpoint import Part, plan_checkpoint, recorded_quantization
from .codecs import WeightFormat
from .errors import MatchError, StateError, printable
from .folder_store import FolderStore
from .record import FoldRecord, ModuleRecord
from .shards import Checkpoint, inside, sha256_of
from .weight import nearest_error, relative_error, rotate_chain

__all__ = ["CheckpointReport", "FileCheck", "WeightCheck", "check_checkpoint", "check_files"]

#: what became of a recorded file
FileCheck = Literal["ok", "changed", "missing"]

# what storing the right weight once more may differ by: rounding ties, and the last bits of float32 products
_SLACK = 1.05


@dataclass(frozen=True)
class WeightCheck:
    """One folded weight.

    Attributes:
        error: ``‖folded - exact‖ / ‖exact‖`` (Frobenius), exact being base and rotation in float32.
        rounding: what storing the exact weight in the folded format costs by itself.
        recorded: content hash as the record has it: True, False, or None where there is no record.
        calibrated: the error that the record names where the weight was calibrated; None elsewhere. A calibrated weight
            errs more than a plainly rounded one, so that its layer's outputs err less.
        rho: ``‖folded - exact‖ / ‖exact - base‖``; None where the adapter changes nothing.
        kept: ``⟨folded - base, exact - base⟩ / ‖exact - base‖²``, how much of the change is there; None likewise.
        steps: the error of a weight that lies anywhere between the format's levels: rounding that keeps the change costs
            no more.
    """

    error: float
    rounding: float
    recorded: bool | None
    calibrated: float | None = None
    rho: float | None = None
    kept: float | None = None
    steps: float = 0.0

    @property
    def gain(self) -> float:
        """What this fold's rounding changes in the squared error of plain rounding, as a part of it: below 0 for the
        better.
        """
        return (self.error / self.rounding) ** 2 - 1 if self.rounding else 0.0

    @property
    def excess(self) -> float:
        """How far the error is beyond plain rounding, beyond what calibration made of it, or, where the change is kept,
        beyond what the format's steps cost.
        """
        whole = self.kept is not None and abs(self.kept - 1) <= measures.WHOLE
        return max(0.0, self.error - max(self.rounding, self.calibrated or 0.0, self.steps if whole else 0.0) * _SLACK)


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`check_checkpoint` measured.

    Attributes:
        modules: ``{path: WeightCheck}``.
        tolerance: the largest error that passes; None: plain rounding and no more.
        files: ``{file name: FileCheck}`` of the files that the record has hashes of; empty without a record.
    """

    modules: Mapping[str, WeightCheck]
    tolerance: float | None
    files: Mapping[str, FileCheck] = field(default_factory=dict)

    def passes(self, check: WeightCheck) -> bool:
        """Whether one weight is within the tolerance and as recorded."""
        within = check.error <= self.tolerance if self.tolerance is not None else check.excess <= 1e-6
        return within and check.recorded is not False

    @property
    def ok(self) -> bool:
        """Whether all are, and every file is as recorded."""
        return all(map(self.passes, self.modules.values())) and all(c == "ok" for c in self.files.values())

    @property
    def worst_first(self) -> list[tuple[str, WeightCheck]]:
        return sorted(self.modules.items(), key=lambda item: (self.passes(item[1]), -item[1].error))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, worst first."""
        rows = {path: {**asdict(c), "passes": self.passes(c)} for path, c in self.worst_first}
        return {"ok": self.ok, "tolerance": self.tolerance, "files": dict(self.files), "modules": rows}


def check_files(folder: Path) -> CheckpointReport:
    """Compare a folder's files with the SHA-256 hashes in its ``oftsurgery.json``, and nothing else.

    Raises:
        StateError: it has no record, or one without hashes.
        CheckpointError: the record cannot be read.
    """
    record = configs.record_in(folder)
    if record is None or not record.files:
        raise StateError(
            f"the folder has no {configs.RECORD}" if record is None else "the record has no hashes of files",
            path=folder,
            remedy="give the base and the adapter too: the weights are then compared with them",
        )
    return CheckpointReport(MappingProxyType({}), None, _file_checks(folder, record))


def _file_checks(folder: Path, record: FoldRecord) -> Mapping[str, FileCheck]:
    return MappingProxyType({name: _file_check(folder, name, record.files[name]) for name in sorted(record.files)})


def _file_check(folder: Path, name: str, sha256: str) -> FileCheck:
    if "/" not in name and "\\" not in name and not os.path.lexists(folder / name):
        return "missing"
    # a record's names may lead anywhere, and links too: those are refused
    return "ok" if sha256_of(inside(folder, name)) == sha256 else "changed"


def check_checkpoint(
    folded: Checkpoint, base: Checkpoint, adapters: Sequence[OFTAdapter], *, tolerance: float | None = None
) -> CheckpointReport:
    """Compare each folded weight with the base's, rotated anew.

    Args:
        folded: in any format.
        base: the checkpoint that was folded; where it is plain and the fold quantised it first (its record says so, or
            its format), it is quantised again.
        adapters: that were folded, in the live order.
        tolerance: largest relative error that passes; None: no more than storing the exact weight costs.

    Raises:
        MatchError: a folded weight is missing.
        and those of planning a fold.
    """
    record = configs.record_in(folded.folder)
    there = FolderStore(folded)
    codec = _codec(folded, base, record.base if record is not None else {})
    quantization = recorded_quantization(folded, codec)
    plan = plan_checkpoint(
        base, adapters, format="fp32" if quantization is not None else "same", quantization=quantization
    )
    parts = [part for part in plan.parts if part.rotate is not None]
    names = there.locate([part.name for part in parts])
    checks = {}
    for part in parts:
        assert part.rotate is not None
        path = part.rotate.path
        name = names.get(part.name)
        if name is None:
            raise MatchError(
                "the folded checkpoint lacks a weight that the adapter targets", module=path, path=folded.folder
            )
        module = record.modules.get(path) if record is not None else None
        checks[path] = _check(part, plan.store, there, name, module)
    if not checks:
        raise StateError(
            "the adapter targets nothing", path=folded.folder, remedy="check that base and adapter belong together"
        )
    files = _file_checks(folded.folder, record) if record is not None else {}
    return CheckpointReport(MappingProxyType(checks), tolerance, files)


def _codec(folded: Checkpoint, base: Checkpoint, recorded: Mapping[str, str | None]) -> str | None:
    """What a plain base was quantised to before it was rotated."""
    if recorded:
        return recorded.get("quantize") if recorded.get("fold_into") == "quantized" else None
    if any(e.dtype == "U8" or e.dtype == "I8" for e in base.entries.values()):
        return None
    states = [n.rpartition("bitsandbytes__")[2] for n in folded.entries if ".quant_state.bitsandbytes__" in n]
    return states[0] if states else "int8" if any(n.endswith(".SCB") for n in folded.entries) else None


def _check(part: Part, base: FolderStore, folded: FolderStore, name: str, recorded: ModuleRecord | None) -> WeightCheck:
    encoded = base.weight(part.name, base.stored(part.name))
    stored = folded.weight(name, folded.stored(name))
    assert encoded is not None and stored is not None and part.rotate is not None
    job = part.rotate
    with rotations.full_precision("cpu"):
        before = codecs.decode(encoded)
        exact = rotate_chain(before, job.chain)
        into: WeightFormat = stored.format
        if into.shape != tuple(exact.shape):
            raise MatchError(f"the folded weight {printable(name)} has another shape than the base's", module=job.path)
        error = relative_error(codecs.decode(stored), exact)
        rounding = nearest_error(exact, into)
        changed = relative_error(before, exact)
        kept = measures.kept(codecs.decode(stored), before, exact)
        steps = measures.step_error(stored, exact)
    rho = error / changed if changed else None
    calibrated = recorded.error if recorded is not None and recorded.rounding == "calibrated" else None
    same = stored.fingerprint == recorded.after if recorded is not None else None
    return WeightCheck(error, rounding, same, calibrated, rho, kept, steps)
