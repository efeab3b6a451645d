""":func:`render` makes a self-contained HTML page of a fold's record: the page needs no network and no other file.

The page depends only on its inputs. This file finds and checks the figures; ``report.html`` has the words and the markup.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby
from typing import Any

from oftsurgery._version import __version__
from oftsurgery.errors import needs, printable, share
from oftsurgery.records.advice import Case, Remedy, remedies
from oftsurgery.records.record import ENOUGH, FoldRecord, ModuleRecord

from .figures import LEVELS, Scale, check_figures, degrees, histogram, is_figure, percent, scientific, size
from .model_layout import Layout, Stack, layout, natural
from .verify_results import MOST_LISTED, Column, VerifyResult, verify_results

# the most that a page shows, so that no record makes a page too large for a browser; no dense model reaches these limits
_ROWS, _STACKS, _KINDS, _CELLS = 1000, 12, 24, 1200

# below this defect a rotation is orthogonal to within float32's rounding
_ORTHOGONAL = 1e-5

# below this error no other figure is needed to show that the adapter is kept
_ALMOST_EXACT = 0.01


@dataclass(frozen=True)
class _Metric:
    """One figure of a module, and the way to draw the figure.

    Attributes:
        id: the key of the figure's words in the template.
        scale: function from the values to the colour scale.
        show: function from a value to its text with a unit.
        short: function from a value to its text without a unit.
        field: the field of the module's record, where its name is not ``id``.
        missing: whether 1 minus the field is drawn in place of the field.
        nearest: the record's field of the same figure with plain rounding, where the rounding decides the figure.
        nothing: the largest value that counts as zero.
    """

    id: str
    scale: Callable[[Sequence[float]], Scale]
    show: Callable[[float], str]
    short: Callable[[float], str]
    field: str = ""
    missing: bool = False
    nearest: str = ""
    nothing: float = 0.0

    def values(self, record: FoldRecord) -> dict[str, float]:
        """``{module path: drawn value}``; a larger value is worse."""
        return {path: self.mirrored(v) for path, v in _fields(record, self.field or self.id).items()}

    def mirrored(self, value: float) -> float:
        """The drawn value of the field's value, and the field's value of a drawn value."""
        return 1 - value if self.missing else value


def _percents(value: float) -> str:
    return f"{100 * value:.2f}" if value >= 1e-4 or value == 0 else scientific(value)


_METRICS = (
    _Metric("error", Scale.of_errors, percent, _percents, nearest="nearest"),
    _Metric(
        "kept",
        Scale.to_one,
        show=lambda lost: f"{100 * (1 - lost):.1f}\N{NO-BREAK SPACE}%",
        short=lambda lost: f"{100 * (1 - lost):.0f}",
        field="effect_kept",
        missing=True,
    ),
    _Metric("rho", Scale.to_one, "{:.2f}".format, "{:.2f}".format),
    _Metric("output_error", Scale.of_errors, percent, _percents, nearest="output_nearest"),
    _Metric("angle", Scale.from_zero, degrees, lambda angle: degrees(angle).removesuffix("°")),
    _Metric("defect", Scale.of_defects, scientific, scientific, nothing=_ORTHOGONAL),
)


def _fields(record: FoldRecord, name: str) -> dict[str, float]:
    """``{module path: a field of its record}`` of the modules that have the field."""
    return {path: value for path, module in record.modules.items() if (value := getattr(module, name)) is not None}


def _nearest(record: FoldRecord, metric: _Metric) -> dict[str, float]:
    """``{module path: the metric with plain rounding}``; empty where every weight was rounded plainly."""
    compared = any(module.rounding != "nearest" for module in record.modules.values())
    return _fields(record, metric.nearest) if compared and metric.nearest else {}


def render(
    record: FoldRecord,
    *,
    name: str | None = None,
    files: Mapping[str, int] | None = None,
    verified: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as a string.

    Args:
        record: the fold's record.
        name: the folder's name.
        files: ``{kind of file: bytes}`` of the folder's files.
        verified: results of ``verify``, as ``to_dict`` gives them.

    Raises:
        CheckpointError: a figure in the record is not a finite number.
        StateError: ``verified`` is not a result of ``verify``, or is of another model.
        MissingDependencyError: jinja2 is not installed.
    """
    check_figures(record)
    modules, files = record.modules, files or {}
    checks = [result for data in verified for result in verify_results(data, record)]
    ranked = sorted(modules, key=lambda path: (-modules[path].error, natural(path)))
    rows = {path: f"m{i}" for i, path in enumerate(ranked[:_ROWS])}
    place = _limited(layout(modules))
    maps = [_map(metric, record, place, rows) for metric in _METRICS if metric.values(record)]
    facts: dict[str, Any] = {
        "record": record,
        "name": name,
        "files": files,
        "adapters": _adapters(record),
        "bases": sorted(_last(base) for base in {a.base_model for a in record.adapters if a.base_model}),
        "formats": _formats(modules.values()),
        "failed": [path for check in checks for path in check.failed],
        "remedies": _remedies(record),
        "least": min(((kept, path) for path, kept in _fields(record, "effect_kept").items()), default=None),
        "maps": maps,
        "moved": _layers_moved(modules, place),
        "histogram": _histogram(record),
        "checks": checks,
        "columns": _columns(record, maps, checks),
        "rows": rows,
        "untied": [path for path, module in modules.items() if module.untied],
        "versions": ", ".join(f"{printable(k)} {printable(v)}" for k, v in record.versions.items()),
        "sizes": _sizes(record, files),
        "earlier": _earlier(record),
        "onnx": _onnx(record.extra.get("onnx")),
    }
    return str(_template().render(facts)) + "\n"


def headline(record: FoldRecord) -> dict[str, Any]:
    """The main figures as plain values, which ``oftsurgery report --json`` prints."""
    check_figures(record)
    found: dict[str, Any] = {"modules": len(record.modules)}
    for metric in _METRICS:
        values = metric.values(record)
        if values:
            worst = max(values, key=values.__getitem__)
            middle, most = map(metric.mirrored, (statistics.median(values.values()), values[worst]))
            found[metric.id] = {"median": middle, "worst": most, "worst_module": worst}
    return found


@cache
def _template() -> Any:
    with needs("jinja2", "pip install jinja2"):
        import jinja2
        from markupsafe import Markup

    folder = resources.files(__package__)
    html, style, script = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # every value from a record is text, never markup: names of modules come from files that nobody vouches for
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {
        "style": Markup(style),  # noqa: S704 - the package's own file
        "script": Markup(script),  # noqa: S704 - the package's own file
        "style_hash": _csp_hash(style),
        "script_hash": _csp_hash(script),
        "version": __version__,
        "levels": range(LEVELS),
        "enough": ENOUGH,
        "almost_exact": _ALMOST_EXACT,
        "median": statistics.median,
        "middle_half": _middle_half,
    }
    environment.filters |= {
        "printable": printable,
        "shortened": _last,
        "counted": _count,
        "percent": percent,
        "share": share,
        "size": size,
    }
    return environment.from_string(html)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _remedies(record: FoldRecord) -> Sequence[Remedy]:
    """What helps where the fold keeps too little of its adapter. The page depends on its inputs alone, so a fold on disk gets
    commands, whoever draws the page.
    """
    case = Case.of_record(record)
    return () if case is None else remedies(case, commands=True)


def _adapters(record: FoldRecord) -> str:
    return " + ".join(_last(a.source) for a in record.adapters) or "No adapter"


def _last(source: str | None) -> str:
    """The name of an adapter without this machine's path."""
    if not source:
        return "an adapter without a name"
    parts = [part for part in source.replace("\\", "/").split("/") if part]
    return printable(source if len(parts) <= 2 and not source.startswith(("/", ".", "~")) else (parts or [source])[-1])


def _formats(modules: Iterable[ModuleRecord]) -> str:
    counts = Counter(m.format for m in modules)
    if len(counts) == 1:
        return printable(next(iter(counts)))
    return ", ".join(f"{n} × {printable(f)}" for f, n in counts.most_common())


def _count(of: Collection[object] | int, one: str, many: str | None = None) -> str:
    n = of if isinstance(of, int) else len(of)
    return f"{n} {one if n == 1 else many or one + 's'}"


def _middle_half(values: Iterable[float], show: Callable[[float], str] = percent) -> str:
    """The two borders of the middle half of the values, as text."""
    values = list(values)
    first, _, last = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return f"{show(first)} and {show(last)}"


def _map(metric: _Metric, record: FoldRecord, place: Layout, rows: Mapping[str, str]) -> dict[str, Any]:
    """The data of one metric's map."""
    values = metric.values(record)
    scale = metric.scale(list(values.values()))

    def cell(paths: Sequence[str]) -> dict[str, Any] | None:
        """The worst of several modules."""
        known = {path: values[path] for path in paths if path in values}
        if not known:
            return None
        worst = max(known, key=known.__getitem__)
        row = rows.get(worst, "modules")
        return {"path": worst, "value": values[worst], "level": scale.level(values[worst]), "row": row, "of": known}

    loose = [path for path in place.loose if path in values]
    shown = loose if len(loose) <= MOST_LISTED else sorted(loose, key=lambda path: -values[path])[:MOST_LISTED]
    return {
        "metric": metric,
        "drawn": values,
        "nearest": _nearest(record, metric),
        "worst": max(values, key=values.__getitem__),
        "best": min(values, key=values.__getitem__),
        "nothing": sum(v <= metric.nothing for v in values.values()),
        "scale": scale,
        "stacks": [_stack(stack, len(place.stacks), cell) for stack in place.stacks],
        "loose": [cell([path]) for path in shown],
        "outside": len(loose),
    }


def _limited(place: Layout) -> Layout:
    """The layout with the largest stacks only; the modules of other stacks are loose."""
    kept = sorted(place.stacks, key=lambda s: -len(s.cells))[:_STACKS]
    rest = [path for s in place.stacks if s not in kept for cell in s.cells.values() for path in cell]
    return Layout(tuple(s for s in place.stacks if s in kept), (*place.loose, *rest))


def _stack(stack: Stack, stacks: int, cell: Callable[[Sequence[str]], dict[str, Any] | None]) -> dict[str, Any]:
    kinds = stack.kinds[:_KINDS]
    layers = stack.layers[: max(2, _CELLS // len(kinds) // stacks)]
    groups = [(group, len([*same])) for group, same in groupby(kind.rpartition(".")[0] for kind in kinds)]
    return {
        "name": stack.name,
        "merged": any("*" in kind.split(".") for kind in kinds),
        "left_out": {"kinds": len(stack.kinds) - len(kinds), "layers": len(stack.layers) - len(layers)},
        "groups": groups if any(group for group, _ in groups) else [],
        "kinds": [kind.rpartition(".")[2] for kind in kinds],
        "rows": {layer: [cell(stack.cells.get((layer, kind), ())) for kind in kinds] for layer in layers},
    }


def _layers_moved(modules: Mapping[str, ModuleRecord], place: Layout) -> str:
    """The layers with the largest angles, by the median of their modules; an empty text where all layers are alike."""
    medians = []
    for stack in place.stacks:
        for layer in stack.layers:
            angles = [modules[p].angle for kind in stack.kinds for p in stack.cells.get((layer, kind), ())]
            label = f"{stack.name}.{layer}" if len(place.stacks) > 1 else layer
            medians.append((statistics.median(angles), printable(label)))
    medians.sort(key=lambda entry: -entry[0])
    if not medians or medians[0][0] < 1.05 * medians[-1][0]:
        return ""
    return ", ".join(f"{label} ({degrees(value)})" for value, label in medians[:3])


def _histogram(record: FoldRecord) -> dict[str, Any] | None:
    errors, nearest = ([*found.values()] for found in (_fields(record, "error"), _nearest(record, _METRICS[0])))
    if len(errors) < 2:
        return None
    borders, _ = histogram([*errors, *nearest])
    _, mine = histogram(errors, borders=borders)
    _, plain = histogram(nearest, borders=borders)
    bins = list(zip(borders[:-1], borders[1:], mine, plain, strict=True))
    return {"errors": errors, "nearest": nearest, "bins": bins, "top": max([*mine, *plain])}


def _columns(record: FoldRecord, maps: Iterable[Mapping[str, Any]], checks: Iterable[VerifyResult]) -> list[Column]:
    """The columns of the modules' table that have a figure of at least one module."""
    columns = []
    for found in maps:
        metric = found["metric"]
        columns += [Column(metric.id, found["drawn"], metric.show), Column(metric.nearest, found["nearest"])]
    columns += [check.column for check in checks]
    return [column for column in columns if not record.modules.keys().isdisjoint(column.values)]


def _sizes(record: FoldRecord, files: Mapping[str, int]) -> list[Sequence[str]]:
    found = {"tensors before the fold": record.sizes.get("before"), "tensors after it": record.sizes.get("after")}
    found |= {f"in the folder: {what}": n or None for what, n in files.items()}
    return [(what, size(n), f"{n:,}") for what, n in found.items() if n is not None]


def _earlier(record: FoldRecord) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for i, fold in enumerate(record.earlier, 1):
        errors = [m.error for m in fold.modules.values() if is_figure(m.error)]
        rows.append(
            (
                f"{i}",
                _adapters(fold),
                ", ".join(printable(a.dialect) for a in fold.adapters),
                ", ".join(printable(a.fingerprint) for a in fold.adapters),
                f"{len(fold.modules)}",
                percent(statistics.median(errors)) if errors else "–",
                percent(max(errors)) if errors else "–",
            )
        )
    return rows


def _onnx(value: object) -> dict[str, Any] | None:
    """The facts that the export of a graph recorded; another version's record may have another form."""
    if not isinstance(value, Mapping) or not value:
        return None
    facts: list[tuple[str, str]] = []
    checks: Sequence[Mapping[str, Any]] = ()
    for key, item in value.items():
        name = printable(key).replace("_", " ")
        if key == "nbytes" and is_figure(item):
            facts.append(("weights of the graph", size(item)))
        elif key == "checks" and isinstance(item, (list, tuple)) and all(map(_is_check, item)):
            checks = item[:MOST_LISTED]
        elif isinstance(item, Mapping) and len(item) > 6 and all(isinstance(v, str) for v in item.values()):
            counts = Counter(item.values()).most_common(10)
            facts.append((name, ", ".join(f"{n} × {printable(v)}" for v, n in counts)))
        else:
            facts += _flat(item, name)
    tables = [(printable(check.get("inputs", "")), check["errors"]) for check in checks]
    outputs = list(dict.fromkeys(output for _, errors in tables for output in errors))[:_KINDS]
    rows = [[ran, *(scientific(errors[o]) if o in errors else "–" for o in outputs)] for ran, errors in tables]
    return {"facts": facts, "outputs": outputs, "rows": rows}


def _is_check(value: object) -> bool:
    errors = value.get("errors") if isinstance(value, Mapping) else None
    return isinstance(errors, Mapping) and all(map(is_figure, errors.values()))


def _flat(value: object, name: str) -> list[tuple[str, str]]:
    """The facts in a JSON value, each named by its place in the value."""
    if isinstance(value, Mapping):
        return [fact for key, item in value.items() for fact in _flat(item, f"{name} {printable(key)}")][:200]
    if isinstance(value, (list, tuple)):
        return [(name, ", ".join(printable(v) for v in value[:50]) or "none")]
    if value is None:
        return []
    shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else printable(value)
    return [(name, f"{value:.4g}" if isinstance(value, float) else shown)]
