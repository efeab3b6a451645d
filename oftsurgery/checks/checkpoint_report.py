"""A :class:`CheckpointReport` says what :func:`oftsurgery.verify_checkpoint` found of each file, tensor and rotated weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from oftsurgery.errors import printable, share
from oftsurgery.records.record import ENOUGH

from .verify_report import VerifyReport

#: the formats' names in a sentence
_LABELS = {"nf4": "NF4", "fp4": "FP4"}

#: the state of a file whose hash is recorded
FileCheck = Literal["ok", "changed", "missing"]

#: the expected kind of a tensor: ``"rotated"``; ``"replaced"`` by the adapter's own values; ``"tied"`` to another tensor
#: and unchanged; ``"copied"`` from the source; ``"converted"`` from the source to another format or dtype; ``"absent"``
#: in both folders, since the model makes the tensor itself; ``"added"``, since the source does not have the tensor
TensorKind = Literal["rotated", "replaced", "tied", "copied", "converted", "absent", "added"]

#: a weight holds a change where ``kept`` differs from 1 by at most this, see :func:`is_whole`
WHOLE = 0.25

# the factor by which the error of storing the right weight may differ: rounding ties, and the last bits of float32 products
_SLACK = 1.05


def is_whole(kept: float | None, grain: float) -> bool:
    """Whether a weight holds a change. About 1/grain elements hold a small change, and of a large weight a rounding chooses these by
    a part of the weight: the chance in their number is what ``kept`` may differ by.

    Args:
        grain: the share of the change that one element can make.
    """
    return kept is not None and abs(kept - 1) <= max(WHOLE, 4 * math.sqrt(grain))


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
        grain: the largest share of the change that one element makes by one step of the format.
        change: ``‖exact - base‖``, Frobenius; None where it was not measured.
        format: how the weight is stored, as in ``ModuleRecord.format``.
    """

    error: float
    rounding: float
    recorded: bool | None
    calibrated: float | None = None
    rho: float | None = None
    kept: float | None = None
    steps: float = 0.0
    grain: float = 0.0
    change: float | None = None
    format: str = ""

    @property
    def gain(self) -> float:
        """The relative change of the squared error against plain rounding; a negative value is an improvement."""
        return (self.error / self.rounding) ** 2 - 1 if self.rounding else 0.0

    @property
    def excess(self) -> float:
        """The part of the error that neither plain rounding nor the calibration explains, nor, where the change is kept,
        the format's steps.
        """
        whole = is_whole(self.kept, self.grain)
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
    >>> print(report.verdict)
    ok: all 2 tensors are as base and adapter make them

    Attributes:
        modules: ``{path: WeightCheck}`` of the rotated weights.
        tolerance: the largest error that passes; None: plain rounding and no more.
        files: ``{file name: FileCheck}`` of the files that the record has hashes of; empty without a record.
        tensors: ``{name: TensorCheck}`` of every tensor that the model loads, and of stored tensors that the model does
            not take.
        config: what the folded ``config.json`` makes the model compute otherwise, or None.
        on_texts: what the folded model and the base with the adapter live compute on the given texts; None without texts.
        remedies: what helps where the fold keeps too little of the adapter, best first; empty elsewhere.
    """

    modules: Mapping[str, WeightCheck]
    tolerance: float | None
    files: Mapping[str, FileCheck] = field(default_factory=dict)
    tensors: Mapping[str, TensorCheck] = field(default_factory=dict)
    config: str | None = None
    on_texts: VerifyReport | None = None
    remedies: tuple[str, ...] = ()

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

    @property
    def kept(self) -> float | None:
        """How much of the adapter's change the weights hold, each weighed by its change squared. None where the adapter changes
        nothing, or where weights are calibrated: those hold the change of the outputs, which texts measure.
        """
        parts = [(c.kept, c.change**2) for c in self.modules.values() if c.kept is not None and c.change is not None]
        total = math.fsum(size for _, size in parts)
        if not total or any(c.calibrated is not None for c in self.modules.values()):
            return None
        return math.fsum(kept * size for kept, size in parts) / total

    @property
    def weak(self) -> bool:
        """Whether the checkpoint keeps too little of the adapter: less than 90 % in the weights or on the texts, or outputs that
        are no nearer to the live model's than the base's are.
        """
        on_texts = self.on_texts is not None and self.on_texts.ok is False
        return on_texts or (self.kept is not None and self.kept < ENOUGH)

    @property
    def verdict(self) -> str:
        """One line that says whether the checkpoint is the right fold, and how much of the adapter it keeps."""
        if not self.ok:
            return f"not ok: {self._reason()}"
        if not self.modules:
            files = f"all {len(self.files)} files are as recorded; the weights were not compared, which needs BASE and ADAPTER"
            return (
                f"ok: {f'all {len(self.tensors)} tensors are as base and adapter make them' if self.tensors else files}"
            )
        text = f"the output computes what the adapter's live layers compute within {self._allowed}"
        text += "" if self._kept_text() is None else f"; {self._kept_text()}"
        if not self.weak:
            return f"ok: {text}"
        shares = [self.kept, None if self.on_texts is None else self.on_texts.kept]
        lost = any(kept is not None and kept < ENOUGH for kept in shares)
        what = "has undone a part of the adapter" if lost else "moves the outputs as far as the adapter does"
        return f"ok, but the rounding {what}: {text}"

    @property
    def _allowed(self) -> str:
        """The error that passes, in words."""
        if self.tolerance is not None:
            return f"a relative error of {self.tolerance:g}"
        codecs = sorted({c.format.partition(" ")[0] for c in self.modules.values()} - {""})
        return " and ".join(f"{_LABELS.get(c, c)}'s rounding" for c in codecs) or "its format's rounding"

    def _kept_text(self) -> str | None:
        parts = [] if self.kept is None else [f"{share(self.kept)} of the adapter is kept"]
        if self.on_texts is not None and self.on_texts.kept is not None:
            parts.append(self.on_texts.verdict.partition(": ")[2])
        elif self.kept is None and any(c.calibrated is not None for c in self.modules.values()):
            parts.append(
                "the weights are calibrated, so their outputs tell how much of the adapter is kept (texts=…, --texts FILE)"
            )
        return "; ".join(parts) or None

    def _reason(self) -> str:
        """What is wrong, the worst first."""
        failed = [(path, check) for path, check in self.worst_first if not self.passes(check)]
        if failed:
            path, check = failed[0]
            why = f"the error is {check.error:.2e}, and the rounding explains {check.rounding:.2e}"
            if self.tolerance is not None:
                why = f"the error is {check.error:.2e}, and the tolerance is {self.tolerance:g}"
            if check.recorded is False:
                why += "; the record has another hash"
            return f"{len(failed)} of {len(self.modules)} weights are not what base and adapter give (worst: {printable(path)}: {why})"
        if self.wrong:
            name, why = next(iter(self.wrong.items()))
            return f"{len(self.wrong)} of {len(self.tensors)} tensors are wrong (first: {printable(name)}: {printable(why)})"
        if self.config is not None:
            return f"config.json: {printable(self.config)}"
        changed = [f"{printable(name)} is {state}" for name, state in self.files.items() if state != "ok"]
        return f"{len(changed)} of {len(self.files)} files are not as recorded ({changed[0]})"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with the worst weights first."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "kept": self.kept,
            "remedies": list(self.remedies),
            "on_texts": None if self.on_texts is None else self.on_texts.to_dict(),
            "tolerance": self.tolerance,
            "files": dict(self.files),
            "config": self.config,
            "modules": {path: {**asdict(c), "passes": self.passes(c)} for path, c in self.worst_first},
            "looked_at": self.looked_at,
            "tensors": {n: asdict(c) for n, c in sorted(self.tensors.items(), key=lambda item: item[1].ok)},
        }
