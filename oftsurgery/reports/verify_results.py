""":func:`verify_results` prepares a result of ``verify`` or ``verify_checkpoint`` for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oftsurgery.errors import StateError, printable, share
from oftsurgery.records.record import FoldRecord

from .figures import is_figure, percent, scientific

#: the most entries of a list on the page
MOST_LISTED = 100


@dataclass(frozen=True)
class Column:
    """A column of the modules' table: ``{path: value}``, and the text of a value. The template has its words by ``id``."""

    id: str
    values: Mapping[str, float]
    show: Callable[[float], str] = percent


@dataclass(frozen=True)
class VerifyResult:
    """One result of ``verify``, on ``"outputs"`` or on ``"weights"``, with its failures and the facts of its section."""

    kind: str
    column: Column
    failed: Sequence[str]
    facts: Mapping[str, Any]


def verify_results(data: Mapping[str, Any], record: FoldRecord) -> list[VerifyResult]:
    """The results in one result of ``verify``: of the weights, and of the outputs where texts were given."""
    found = [_verify_result(data, record)]
    on_texts = data.get("on_texts")
    return [*found, _verify_result(on_texts, record)] if isinstance(on_texts, Mapping) else found


def _verify_result(data: Mapping[str, Any], record: FoldRecord) -> VerifyResult:
    modules = data.get("modules")
    if not isinstance(modules, Mapping) or not all(isinstance(m, Mapping) for m in modules.values()):
        raise _no_result()
    known = set(record.modules).union(*(r.modules for r in record.earlier))
    strange = [path for path in modules if path not in known]
    if strange:
        message = "the result of verify is of another model: it has a module that the record does not have"
        raise StateError(
            message, module=strange[0], remedy="give a result of verify for this fold: verified=… (--verified)"
        )
    try:
        return _outputs(data, modules) if "outputs" in data else _weights(data, modules)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_result() from error


def _no_result() -> StateError:
    message = "the given data are not a result of verify"
    remedy = "give the output of `oftsurgery verify --json`, or the result of oftsurgery.verify(…) (to_dict() as JSON)"
    return StateError(message, remedy=remedy)


def _figure(value: object) -> float:
    if not is_figure(value):
        raise TypeError
    return float(value)  # type: ignore[arg-type]


def _outputs(data: Mapping[str, Any], modules: Mapping[str, Any]) -> VerifyResult:
    """The result of a :class:`~oftsurgery.VerifyReport`."""
    shown = {"relative": percent, "max_abs": scientific, "cosine_distance": scientific}
    base = {f"{name}, base": of for name, of in (data.get("base") or {}).items()}
    rows = [
        [printable(o), *(show(_figure(of[n])) for n, show in shown.items()), *_of_adapter(of)]
        for o, of in {**data["outputs"], **base}.items()
    ]
    column = Column("verified_output", {path: _figure(m["relative"]) for path, m in modules.items()})
    facts = {
        "rows": rows,
        "outputs": len(data["outputs"]),
        "batches": int(data["batches"]),
        "verdict": data.get("verdict"),
    }
    return VerifyResult("outputs", column, [], facts)


def _of_adapter(output: Mapping[str, Any]) -> list[str]:
    """The KL divergence and the share of the adapter's effect, which older results lack."""
    kl, kept = output.get("kl"), output.get("kept")
    if kept is not None and not is_figure(abs(kept)):
        raise TypeError
    return ["–" if kl is None else scientific(max(0.0, kl)), "–" if kept is None else share(kept, ".1%")]


def _weights(data: Mapping[str, Any], modules: Mapping[str, Any]) -> VerifyResult:
    """The result of a :class:`~oftsurgery.CheckpointReport`."""
    errors = {path: _figure(m["error"]) for path, m in modules.items()}
    failed = sorted((path for path, m in modules.items() if m["passes"] is not True), key=lambda path: -errors[path])
    files, tensors = data.get("files") or {}, data.get("tensors") or {}
    changed = [f"{printable(name)}: {printable(state)}" for name, state in files.items() if state != "ok"]
    wrong = [f"{printable(name)}: {printable(t['why'])}" for name, t in tensors.items() if t["why"] is not None]
    wrong = [w for w in wrong if w.partition(".weight: ")[0] not in set(map(printable, failed))]
    wrong += [f"config.json: {printable(data['config'])}"] if data.get("config") is not None else []
    recorded = {True: "yes", False: "no"}
    facts = {
        "weights": len(modules),
        "failed": [
            (
                printable(path),
                percent(errors[path]),
                percent(_figure(modules[path]["rounding"])),
                recorded.get(modules[path]["recorded"], "not recorded"),
            )
            for path in failed[:MOST_LISTED]
        ],
        "passed": len(modules) - len(failed),
        "tolerance": None if data["tolerance"] is None else _figure(data["tolerance"]),
        "files": files,
        "changed": changed,
        "tensors": tensors,
        "wrong": wrong[:MOST_LISTED],
    }
    return VerifyResult("weights", Column("verified_error", errors), failed + wrong + changed, facts)
