"""A :class:`CheckpointReport` says what :func:`oftsurgery.verify_checkpoint` found of each file, tensor and rotated weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from . import measures

#: the state of a file whose hash is recorded
FileCheck = Literal["ok", "changed", "missing"]

#: the expected kind of a tensor: ``"rotated"``; ``"replaced"`` by the adapter's own values; ``"tied"`` to another tensor
#: and unchanged; ``"copied"`` from the source; ``"converted"`` from the source to another format or dtype; ``"absent"``
#: in both folders, since the model makes the tensor itself; ``"added"``, since the source does not have the tensor
TensorKind = Literal["rotated", "replaced", "tied", "copied", "converted", "absent", "added"]

# the factor by which the error of storing the right weight may differ: rounding ties, and the last bits of float32 products
_SLACK = 1.05


@dataclass(frozen=True)
class WeightCheck:
    """One folded weight.

    >>> check = oftsurgery.WeightCheck(error=0.08, rounding=0.08, recorded=True)
    >>> check.passes(None)
    True

    Attributes:
        error: ``‖folded - exact‖ / ‖exact‖`` (Frobenius); exact is base and rotation in float64.
        rounding: the error of storing the exact weight in the folded format.
        recorded: whether the content hash is the record's: True, False, or None where there is no record.
        calibrated: the error that the record names where the weight was calibrated; None elsewhere. A calibrated weight
            errs more than a plainly rounded weight, so that its layer's outputs err less.
        rho: ``‖folded - exact‖ / ‖exact - base‖``; None where the adapter changes nothing.
        kept: ``⟨folded - base, exact - base⟩ / ‖exact - base‖²``, how much of the change is there; None where the adapter
            changes nothing.
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
        """The relative change of the squared error against plain rounding; a negative value is an improvement."""
        return (self.error / self.rounding) ** 2 - 1 if self.rounding else 0.0

    @property
    def excess(self) -> float:
        """The part of the error that neither plain rounding nor the calibration explains, nor, where the change is kept,
        the format's steps.
        """
        whole = self.kept is not None and abs(self.kept - 1) <= measures.WHOLE
        return max(0.0, self.error - max(self.rounding, self.calibrated or 0.0, self.steps if whole else 0.0) * _SLACK)

    def passes(self, tolerance: float | None) -> bool:
        """Whether the error is within ``tolerance`` (None: that of plain rounding) and the weight is as recorded."""
        within = self.error <= tolerance if tolerance is not None else self.excess <= 1e-6
        return within and self.recorded is not False


@dataclass(frozen=True)
class TensorCheck:
    """One tensor: of the model, or of the files where the model's class does not take it.

    >>> oftsurgery.TensorCheck("copied").ok, oftsurgery.TensorCheck("copied", why="it differs from the base's").ok
    (True, False)

    Attributes:
        kind: what the tensor should be.
        why: what is wrong with the tensor, or None.
    """

    kind: TensorKind
    why: str | None = None

    @property
    def ok(self) -> bool:
        return self.why is None


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`~oftsurgery.verify_checkpoint` looked at.

    >>> checks = {"lm_head.weight": oftsurgery.TensorCheck("tied"), "norm.weight": oftsurgery.TensorCheck("copied")}
    >>> report = oftsurgery.CheckpointReport({}, None, tensors=checks)
    >>> report.ok, report.looked_at
    (True, {'tied': 1, 'copied': 1})

    Attributes:
        modules: ``{path: WeightCheck}`` of the rotated weights.
        tolerance: the largest error that passes; None: plain rounding and no more.
        files: ``{file name: FileCheck}`` of the files that the record has hashes of; empty without a record.
        tensors: ``{name: TensorCheck}`` of every tensor that the model loads, and of stored tensors that the model does
            not take.
        config: what the folded ``config.json`` makes the model compute otherwise, or None.
    """

    modules: Mapping[str, WeightCheck]
    tolerance: float | None
    files: Mapping[str, FileCheck] = field(default_factory=dict)
    tensors: Mapping[str, TensorCheck] = field(default_factory=dict)
    config: str | None = None

    def passes(self, check: WeightCheck) -> bool:
        """Whether one weight is within the tolerance and as recorded."""
        return check.passes(self.tolerance)

    @property
    def ok(self) -> bool:
        """Whether every weight passes, every tensor is as expected, and every file is as recorded."""
        right = all(map(self.passes, self.modules.values())) and all(c == "ok" for c in self.files.values())
        return right and not self.wrong and self.config is None

    @property
    def wrong(self) -> dict[str, str]:
        """``{tensor: what is wrong with this tensor}``."""
        return {name: check.why for name, check in self.tensors.items() if check.why is not None}

    @property
    def looked_at(self) -> dict[str, int]:
        """The number of tensors of each kind that were looked at."""
        return dict(Counter(check.kind for check in self.tensors.values()))

    @property
    def worst_first(self) -> list[tuple[str, WeightCheck]]:
        return sorted(self.modules.items(), key=lambda item: (self.passes(item[1]), -item[1].error))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with the worst weights first."""
        return {
            "ok": self.ok,
            "tolerance": self.tolerance,
            "files": dict(self.files),
            "config": self.config,
            "modules": {path: {**asdict(c), "passes": self.passes(c)} for path, c in self.worst_first},
            "looked_at": self.looked_at,
            "tensors": {n: asdict(c) for n, c in sorted(self.tensors.items(), key=lambda item: item[1].ok)},
        }
