"""A :class:`Finding` is :func:`oftsurgery.doctor`'s report of one trouble; this file also turns errors into findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from oftsurgery import errors
from oftsurgery.errors import OFTSurgeryError, printable
from oftsurgery.records.record import plain

Severity = Literal["error", "warning", "note"]  # the worst first
Numbers = dict[str, float | int | str | None]
Model = str | PathLike[str] | nn.Module

FOLD, UNFOLD = "oftsurgery fold BASE ADAPTER OUTPUT", "oftsurgery unfold FOLDED OUTPUT --adapter ADAPTER"
CONVERT = "oftsurgery adapter convert ADAPTER OUTPUT.safetensors --to comfyui"


@dataclass(frozen=True)
class Finding:
    """One trouble, told once however many tensors have it.

    >>> print(oftsurgery.Finding("warning", "cpu-packed", "a CPU forward has repacked the codes", "model.layers.0.mlp.up_proj"))
    warning: cpu-packed: model.layers.0.mlp.up_proj
      a CPU forward has repacked the codes

    Attributes:
        severity: ``"error"``: the subject computes something wrong, or does not load; ``"warning"``: the same for some
            readers; ``"note"``: worth knowing.
        code: short and stable, for programs: ``"cpu-packed"``, ``"unrotated"`` …
        message: the trouble and its effect.
        subject: module, tensor or file; the worst where several have the trouble.
        evidence: numbers that were measured, of the subject.
        remedy: what to do, with a command where there is one.
        others: further modules, tensors or files with the same trouble.
    """

    severity: Severity
    code: str
    message: str
    subject: str
    evidence: Mapping[str, float | int | str | None] = field(default_factory=dict)
    remedy: str = ""
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # names from files never reach the terminal raw
        evidence = {k: printable(v) if isinstance(v, str) else v for k, v in self.evidence.items()}
        object.__setattr__(self, "evidence", MappingProxyType(evidence))
        object.__setattr__(self, "subject", printable(self.subject))
        object.__setattr__(self, "others", tuple(map(printable, self.others)))

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain values."""
        return dict(plain(self))

    def __str__(self) -> str:
        more = f" and {len(self.others)} more" if self.others else ""
        lines = [f"{self.severity}: {self.code}: {self.subject}{more}", f"  {self.message}"]
        shown = {k.replace("_", " "): f"{v:.3g}" if isinstance(v, float) else v for k, v in self.evidence.items()}
        lines += ["  " + ", ".join(f"{k} {v}" for k, v in shown.items())] * bool(shown)
        return "\n".join(lines + [f"  remedy: {self.remedy}"] * bool(self.remedy))


# an error class without its own code has the code of its base class
_CODES: Mapping[type, str] = {
    errors.NonFiniteError: "non-finite",
    errors.DialectError: "dialect",
    errors.AdapterError: "adapter-files",
    errors.MatchError: "no-match",
    errors.ShapeError: "shape",
    errors.FormatError: "format",
    errors.StateError: "state",
    errors.IntegrityError: "hash",
    errors.CheckpointError: "checkpoint-files",
    errors.MissingDependencyError: "dependency",
    errors.OFTSurgeryError: "refused",
}


def of_error(error: OFTSurgeryError, subject: str = "") -> Finding:
    code = next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)
    shapes = {"shape": error.shape, "expected_shape": error.expected}
    evidence = {name: shape_text(shape) for name, shape in shapes.items() if shape is not None}
    where = subject or error.module or error.tensor or (Path(error.path).name if error.path else "")
    return Finding("error", code, printable(error.message, 1000), where, evidence, error.remedy or "")


def shape_text(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


@contextmanager
def noting(found: list[Finding], subject: str = "") -> Iterator[None]:
    """An error of the body becomes a finding."""
    try:
        yield
    except OFTSurgeryError as error:
        found.append(of_error(error, subject))
