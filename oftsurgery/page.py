"""One self-contained HTML page of a fold's record: no network, no file beside it, a function of its inputs alone."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby
from typing import Any

from ._version import __version__
from .errors import StateError, needs, printable
from .record import ENOUGH, AdapterInfo, FoldRecord, ModuleRecord
from .summary import (
    LEVELS,
    Layout,
    Scale,
    Stack,
    check_figures,
    degrees,
    histogram,
    is_figure,
    layout,
    natural,
    percent,
    scientific,
    size,
)

__all__ = ["headline", "render"]

# what a page shows at most, so that no record makes it larger than a browser likes: far above any dense model's
_ROWS, _LOOSE, _STACKS, _KINDS, _CELLS = 1000, 100, 12, 24, 1200

# below this a rotation is orthogonal as far as float32 can tell
_ORTHOGONAL = 1e-5

# errors below it need no other proof that the adapter is still there
_ALMOST_EXACT = 0.01


@dataclass(frozen=True)
class _Metric:
    """One figure of a module, and how it is drawn.

    Attributes:
        id: of the section, and of the field in the record.
        title: of its map.
        column: its name in tables.
        scale: of its colours, from its values.
        show: a value with its unit.
        unit: of the values in cells.
        short: a value without it.
        extreme: what its largest value is called (of a ``wanted`` one, the value farthest below); None: not told.
        wanted: what a value should be, from which it is told how far below it lies; None: small is good.
    """

    id: str
    title: str
    column: str
    scale: Callable[[Sequence[float]], Scale]
    show: Callable[[float], str]
    unit: str
    short: Callable[[float], str]
    extreme: str | None
    wanted: float | None = None

    def of(self, module: ModuleRecord) -> float | None:
        """What is drawn: the more of it, the worse."""
        value = module.effect_kept if self.id == "kept" else getattr(module, self.id, None)
        return value if value is None or self.wanted is None else self.wanted - value

    def plain(self, drawn: float) -> float:
        """The field's own value: mirror of :meth:`of`."""
        return drawn if self.wanted is None else self.wanted - drawn


def _percents(value: float) -> str:
    return f"{100 * value:.2f}" if value >= 1e-4 or value == 0 else scientific(value)


_METRICS = (
    _Metric(
        "error",
        "Error of storing the rotated weights",
        "error",
        Scale.of_errors,
        percent,
        "in %",
        _percents,
        "worst",
    ),
    _Metric(
        "kept",
        "Kept: is the adapter still there?",
        "kept",
        Scale.to_one,
        lambda v: f"{100 * (1 - v):.1f}\N{NO-BREAK SPACE}%",
        "in %",
        lambda v: f"{100 * (1 - v):.0f}",
        "least",
        wanted=1.0,
    ),
    _Metric(
        "rho",
        "ρ: the rounding beside the adapter",
        "ρ",
        Scale.to_one,
        lambda v: f"{v:.2f}",
        "a ratio",
        lambda v: f"{v:.2f}",
        "worst",
    ),
    _Metric(
        "output_error",
        "Error of the layers' outputs",
        "output error",
        Scale.of_errors,
        percent,
        "in %",
        _percents,
        None,
    ),
    _Metric(
        "angle",
        "What the fine-tune moved",
        "angle",
        Scale.from_zero,
        degrees,
        "in degrees",
        lambda v: degrees(v).removesuffix("°"),
        "largest",
    ),
    _Metric(
        "defect",
        "Orthogonality defects",
        "defect",
        Scale.of_defects,
        scientific,
        "a pure number",
        scientific,
        "largest",
    ),
)

# metric that rounding decides → the record's field of it with plain rounding, and that one's name and title in tables
_PLAIN = {
    "error": ("nearest", "plain rounding", "what the error would have been with plain rounding"),
    "output_error": ("output_nearest", "plain, output", "the output error with plain rounding"),
}


def render(
    record: FoldRecord,
    *,
    name: str | None = None,
    files: Mapping[str, int] | None = None,
    verified: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as a string.

    Args:
        record: of the fold.
        name: of the folder that it is of.
        files: ``{what: bytes}`` of what lies in the folder.
        verified: results of ``verify``, as their ``to_dict`` gives them.

    Raises:
        CheckpointError: the record's figures are none.
        StateError: ``verified`` is no result of ``verify``, or of another model.
        MissingDependencyError: jinja2 is not installed.
    """
    check_figures(record)
    checks = [_check(data, record) for data in verified]
    ranked = sorted(record.modules, key=lambda path: (-record.modules[path].error, natural(path)))
    shown = ranked[:_ROWS]
    rows = {path: f"m{i}" for i, path in enumerate(shown)}
    place = _limited(layout(record.modules))
    maps = [_map(metric, record, place, rows) for metric in _METRICS if _values(metric, record)]
    facts: dict[str, Any] = {
        "title": f"{_adapters(record)} · fold report",
        "headline": f"{_adapters(record)}, folded into {_count(len(record.modules), 'weight')}"
        if record.adapters
        else "Nothing folded in",
        "subtitle": _subtitle(record, name),
        "verdict": _verdict(record, checks),
        "cards": _cards(record, checks, files or {}),
        "maps": maps,
        "histogram": _histogram(record),
        "verified": [check.section for check in checks],
        "modules": _modules(record, shown, rows, checks),
        "adapters": [_adapter(a, i, len(record.adapters)) for i, a in enumerate(record.adapters, 1)],
        "fold": _fold(record),
        "sizes": _sizes(record, files or {}),
        "earlier": _earlier(record),
        "onnx": _onnx(record.extra.get("onnx")),
        "enough": f"{ENOUGH:.0%}",
        "levels": range(LEVELS),
        "version": __version__,
    }
    facts["sections"] = [
        *((m["id"], m["metric"].title) for m in maps),
        *([("histogram", "How the errors are spread")] if facts["histogram"] else []),
        *((check.section["id"], check.section["title"]) for check in checks),
        ("modules", "Every module"),
        ("provenance", "Provenance"),
        *([("onnx", "ONNX")] if facts["onnx"] else []),
        ("words", "What the figures mean"),
    ]
    return str(_template().render(facts)) + "\n"


def headline(record: FoldRecord) -> dict[str, Any]:
    """The first figures as plain values: what ``oftsurgery report --json`` prints."""
    check_figures(record)
    found: dict[str, Any] = {"modules": len(record.modules)}
    for metric in _METRICS:
        values = _values(metric, record)
        if values:
            worst = max(values, key=lambda path: values[path])
            found[metric.id] = {
                "median": metric.plain(statistics.median(values.values())),
                "worst": metric.plain(values[worst]),
                "worst_module": worst,
            }
    return found


@cache
def _template() -> Any:
    with needs("jinja2", "pip install jinja2"):
        import jinja2
        from markupsafe import Markup

    folder = resources.files(__package__) / "templates"
    html, style, script = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # every value from a record is text, never markup: names of modules come from files that nobody vouches for
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {
        "style": Markup(style),  # noqa: S704 - the package's own file
        "script": Markup(script),  # noqa: S704 - the package's own file
        "style_hash": _csp_hash(style),
        "script_hash": _csp_hash(script),
    }
    return environment.from_string(html)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- the head ---------------------------------------------------------------------------------------------------------


def _adapters(record: FoldRecord) -> str:
    names = [_last(a.source) for a in record.adapters]
    return " + ".join(names) if names else "No adapter"


def _last(source: str | None) -> str:
    """Name of an adapter without the path of this machine."""
    if not source:
        return "an adapter without a name"
    parts = [part for part in source.replace("\\", "/").split("/") if part]
    return printable(source if len(parts) <= 2 and not source.startswith(("/", ".", "~")) else (parts or [source])[-1])


def _formats(modules: Iterable[ModuleRecord]) -> str:
    counts = Counter(m.format for m in modules)
    if len(counts) == 1:
        return printable(next(iter(counts)))
    return ", ".join(f"{n} × {printable(f)}" for f, n in counts.most_common())


def _subtitle(record: FoldRecord, name: str | None) -> str:
    parts = [_formats(record.modules.values()), f"rounding {printable(record.rounding)}"]
    bases = {a.base_model for a in record.adapters if a.base_model}
    if bases:
        parts.append("base " + ", ".join(sorted(_last(b) for b in bases)))
    if name:
        parts.append(f"in {printable(name)}")
    if record.earlier:
        parts.append(f"over {_count(len(record.earlier), 'earlier fold')}")
    return " · ".join(part for part in parts if part)


def _verdict(record: FoldRecord, checks: Sequence[_Check]) -> tuple[str, str, str]:
    """``(tone, word, text)``"""
    modules = record.modules
    weights = _count(len(modules), "weight")
    failed = [path for check in checks for path in check.failed]
    if failed:
        text = f"{_count(len(failed), 'weight')} failed the comparison with base and adapter, the worst {printable(failed[0])}."
        return "warn", "Not as it should be.", text
    if not modules:
        return "plain", "Nothing was rotated.", "The record names no weight."
    kept, weak = record.kept, record.weak
    if kept is not None and weak:
        worst = next(iter(weak))
        first = "" if record.rounding == "preserve" else 'rounding="preserve", '
        text = (
            f"{kept:.0%} of what the adapter changed is kept; in {len(weak)} of {weights} less than {ENOUGH:.0%} (least in "
            f"{printable(worst)}: {weak[worst]:.0%}). What helps: {first}calibrated rounding, int8 or bf16 as the format, or keeping the "
            "adapter live."
        )
        return "warn", "Lost." if kept < 0.5 else "Partly lost.", text
    if kept is not None:
        least = min((m.effect_kept, path) for path, m in modules.items() if m.effect_kept is not None)
        text = f"{kept:.1%} of what the adapter changed is kept, over all weights; {least[0]:.1%} at least, in {printable(least[1])}."
        return "good", "The adapter is still there.", text
    errors = [m.error for m in modules.values()]
    if max(errors) <= _ALMOST_EXACT:
        text = f"No weight is further than {percent(max(errors))} from what the adapter computes."
        return "good", "Stored almost exactly.", text
    text = (
        f"Weights are {percent(statistics.median(errors))} in the median from what the adapter computes, {percent(max(errors))} at most. "
        "The record does not tell how much of the adapter is kept."
    )
    return "plain", "Rounded.", text


def _cards(record: FoldRecord, checks: Sequence[_Check], files: Mapping[str, int]) -> list[dict[str, str]]:
    modules = record.modules
    cards = [_card("weights folded", f"{len(modules)}", _formats(modules.values()))]
    for metric in _METRICS:
        values = _values(metric, record)
        if not values:
            continue
        worst = max(values, key=lambda path: values[path])
        if metric.id in _PLAIN:
            plain = _plain_median(metric, record)
            note = f"half between {_middle_half(values.values(), metric.show)}"
            note = note if plain is None else f"plain rounding: {metric.show(plain)}"
            cards.append(_card(f"{metric.column}, median", metric.show(statistics.median(values.values())), note))
        if metric.extreme:
            cards.append(_card(f"{metric.column}, {metric.extreme}", metric.show(values[worst]), path=printable(worst)))
    cards += [card for check in checks for card in check.cards]
    sizes = _before_after(record, files)
    if sizes is not None:
        before, after = sizes
        figure = size(after) if before is None else f"{size(before)} → {size(after)}"
        note = "tensors on disk" if before is None else f"{after / before:.2f} × as large"
        cards.append(_card("size", figure, note))
    return cards


def _card(what: str, figure: str, note: str = "", path: str = "") -> dict[str, str]:
    return {"what": what, "figure": figure, "note": note, "path": path}


def _plain_median(metric: _Metric, record: FoldRecord) -> float | None:
    """Median of what plain rounding would have cost, where it was measured and something else was done."""
    if not _compared(record):
        return None
    values = [v for m in record.modules.values() if (v := getattr(m, _PLAIN[metric.id][0])) is not None]
    return statistics.median(values) if values else None


def _compared(record: FoldRecord) -> bool:
    """Whether any weight was rounded otherwise than plainly."""
    return any(m.rounding != "nearest" for m in record.modules.values())


def _values(metric: _Metric, record: FoldRecord) -> dict[str, float]:
    return {path: v for path, m in record.modules.items() if (v := metric.of(m)) is not None}


# --- the maps ---------------------------------------------------------------------------------------------------------


def _map(metric: _Metric, record: FoldRecord, place: Layout, rows: Mapping[str, str]) -> dict[str, Any]:
    values = _values(metric, record)
    scale = metric.scale(list(values.values()))

    def cell(paths: Sequence[str]) -> dict[str, Any] | None:
        known = [path for path in paths if path in values]
        if not known:
            return None
        worst = max(known, key=lambda path: values[path])
        title = f"{printable(worst, 100)}: {metric.show(values[worst])}"
        if len(known) > 1:
            middle = metric.show(statistics.median(values[path] for path in known))
            title += f", the {'largest' if metric.wanted is None else 'least'} of {len(known)}; median {middle}"
        return {
            "name": printable(worst),
            "level": scale.level(values[worst]),
            "text": metric.short(values[worst]),
            "title": title,
            "row": rows.get(worst, "modules"),
            "weak": metric.id == "kept" and metric.plain(values[worst]) < ENOUGH,
        }

    loose = [path for path in place.loose if path in values]
    drawn = loose if len(loose) <= _LOOSE else sorted(loose, key=lambda path: -values[path])[:_LOOSE]
    return {
        "id": f"map-{metric.id}",
        "metric": metric,
        "reading": _reading(metric, values, place),
        "low": metric.show(scale.low),
        "high": metric.show(scale.high),
        "scale": " (steps of equal ratio)" if scale.ratios else "",
        "stacks": [_stack(stack, len(place.stacks), cell) for stack in place.stacks],
        "loose": [cell([path]) for path in drawn],
        "loose_note": f"; the {len(drawn)} largest of {len(loose)}" if len(drawn) < len(loose) else "",
    }


def _limited(place: Layout) -> Layout:
    """The largest stacks; what is in others is loose."""
    kept = sorted(place.stacks, key=lambda s: -len(s.cells))[:_STACKS]
    rest = [path for s in place.stacks if s not in kept for cell in s.cells.values() for path in cell]
    return Layout(tuple(s for s in place.stacks if s in kept), (*place.loose, *rest))


def _stack(stack: Stack, stacks: int, cell: Callable[[Sequence[str]], dict[str, Any] | None]) -> dict[str, Any]:
    kinds = stack.kinds[:_KINDS]
    layers = stack.layers[: max(2, _CELLS // len(kinds) // stacks)]
    notes = []
    if any("*" in kind.split(".") for kind in kinds):
        notes.append("* stands for all members of a list, of which the largest is shown")
    if len(kinds) < len(stack.kinds):
        notes.append(f"{len(stack.kinds) - len(kinds)} more kinds are in the table of modules only")
    if len(layers) < len(stack.layers):
        notes.append(f"{len(stack.layers) - len(layers)} more layers are in the table of modules only")
    heads = [kind.rpartition(".") for kind in kinds]
    groups = [{"name": name, "span": len([*same])} for name, same in groupby(printable(group) for group, _, _ in heads)]
    return {
        "name": printable(stack.name),
        "note": "".join(f"; {note}" for note in notes),
        "groups": groups if any(group["name"] for group in groups) else [],
        "kinds": [printable(kind) for _, _, kind in heads],
        "rows": [
            {
                "layer": printable(layer),
                "cells": [cell(stack.cells.get((layer, kind), ())) for kind in kinds],
            }
            for layer in layers
        ],
    }


def _reading(metric: _Metric, values: Mapping[str, float], place: Layout) -> str:
    """The map in a sentence."""
    worst, least = (printable(pick(values, key=lambda path: values[path])) for pick in (max, min))
    high, low = max(values.values()), min(values.values())
    if metric.id == "angle":
        if high == 0:
            return "Nothing was rotated: every rotation is the identity."
        unmoved = sum(v == 0 for v in values.values())
        moved = _layers_moved(values, place)
        return (
            f"Largest: {worst}, {degrees(high)}."
            + (f" Layers moved most, by the median of their modules: {moved}." if moved else "")
            + (f" Not moved at all: {unmoved} of {len(values)}." if unmoved else "")
        )
    if metric.id == "defect":
        near = sum(v < _ORTHOGONAL for v in values.values())
        if near == len(values):
            return f"All are orthogonal to within float32's rounding; the largest defect is {scientific(high)}."
        return f"Largest: {worst}, {scientific(high)}." + (
            f" {near} of {len(values)} are orthogonal to within float32's rounding." if near else ""
        )
    if len(values) == 1:
        return f"{worst}: {metric.show(high)}."
    if metric.wanted is not None:
        worst, least, high, low = least, worst, low, high
    return f"Largest: {worst}, {metric.show(high)}; smallest: {least}, {metric.show(low)}."


def _layers_moved(values: Mapping[str, float], place: Layout) -> str:
    medians = []
    for stack in place.stacks:
        for layer in stack.layers:
            found = [
                values[path] for kind in stack.kinds for path in stack.cells.get((layer, kind), ()) if path in values
            ]
            if found:
                label = f"{stack.name}.{layer}" if len(place.stacks) > 1 else layer
                medians.append((statistics.median(found), printable(label)))
    medians.sort(key=lambda entry: -entry[0])
    if not medians or medians[0][0] < 1.05 * medians[-1][0]:  # all alike
        return ""
    return ", ".join(f"{label} ({degrees(value)})" for value, label in medians[:3])


# --- the histogram ----------------------------------------------------------------------------------------------------


def _histogram(record: FoldRecord) -> dict[str, Any] | None:
    errors = [m.error for m in record.modules.values()]
    if len(errors) < 2:
        return None
    nearest = [v for m in record.modules.values() if (v := m.nearest) is not None] if _compared(record) else []
    borders, counts = histogram([*errors, *nearest], 12)
    _, mine = histogram(errors, borders=borders)
    _, plain = histogram(nearest, borders=borders) if nearest else ([], [0] * len(counts))
    top = max([*mine, *plain])
    return {
        "text": f"How many weights have which error; the middle half lies between {_middle_half(errors, percent)}.",
        "plain": bool(nearest),
        "rows": [
            {
                "range": f"{percent(a)} to {percent(b)}" if i or min(errors) >= a else f"up to {percent(b)}",
                "mine": {"count": n, "width": round(100 * n / top, 2)},
                "plain": {"count": p, "width": round(100 * p / top, 2)},
            }
            for i, (a, b, n, p) in enumerate(zip(borders[:-1], borders[1:], mine, plain, strict=True))
        ],
    }


def _middle_half(values: Iterable[float], show: Callable[[float], str]) -> str:
    """Between what the middle half of the values lies."""
    values = list(values)
    first, _, last = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return f"{show(first)} and {show(last)}"


# --- what verify measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Check:
    """One result of ``verify``: its section, its cards, ``failed`` modules, and a column of the modules' table."""

    section: Mapping[str, Any]
    cards: Sequence[dict[str, str]]
    failed: Sequence[str]
    column: tuple[str, str, Mapping[str, float]]


def _check(data: Mapping[str, Any], record: FoldRecord) -> _Check:
    modules = data.get("modules")
    if not isinstance(modules, Mapping) or not all(isinstance(m, Mapping) for m in modules.values()):
        raise _no_result()
    known = set(record.modules).union(*(r.modules for r in record.earlier))
    strange = [path for path in modules if path not in known]
    if strange:
        raise StateError(
            "the result of verify is of another model: the record has no such module",
            module=strange[0],
            remedy="verify this very fold",
        )
    try:
        return _outputs(data, modules) if "outputs" in data else _weights(data, modules)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_result() from error


def _no_result() -> StateError:
    return StateError(
        "this is no result of verify",
        remedy="give what `oftsurgery verify --json` printed, or what oftsurgery.verify(…) returned (its to_dict() as JSON)",
    )


def _figure(value: object) -> float:
    if not is_figure(value):
        raise TypeError
    return float(value)  # type: ignore[arg-type]


def _outputs(data: Mapping[str, Any], modules: Mapping[str, Any]) -> _Check:
    """Of :class:`~oftsurgery.VerifyReport`."""
    names = ("relative", "max_abs", "cosine_distance")
    outputs = {name: [_figure(o[n]) for n in names] for name, o in data["outputs"].items()}
    errors = {path: _figure(m["relative"]) for path, m in modules.items()}
    batches = int(data["batches"])
    rows = [
        [printable(name), percent(relative), scientific(largest), scientific(cosine)]
        for name, (relative, largest, cosine) in outputs.items()
    ]
    head = ["output", "relative error", "largest difference", "1 − cos"]
    cards = [
        _card(f"end to end, {printable(name)}", scientific(cosine), f"1 − cos; relative error {percent(relative)}")
        for name, (relative, _, cosine) in list(outputs.items())[:2]
    ]
    return _Check(
        {
            "id": "end-to-end",
            "title": "End to end",
            "text": f"The folded model beside the reference, over {_count(batches, 'batch', 'batches')} of inputs.",
            "tables": [_table("How far the models' outputs are apart", head, rows)],
        },
        cards,
        [],
        ("verified output", "relative error of the module's output, given the reference model's inputs", errors),
    )


def _weights(data: Mapping[str, Any], modules: Mapping[str, Any]) -> _Check:
    """Of :class:`~oftsurgery.CheckpointReport`."""
    errors = {path: _figure(m["error"]) for path, m in modules.items()}
    failed = sorted((path for path, m in modules.items() if m["passes"] is not True), key=lambda path: -errors[path])
    files, tensors = data.get("files") or {}, data.get("tensors") or {}
    changed = [f"{printable(name)}: {printable(state)}" for name, state in files.items() if state != "ok"]
    wrong = [f"{printable(name)}: {printable(t['why'])}" for name, t in tensors.items() if t["why"] is not None]
    wrong = [w for w in wrong if w.partition(".weight: ")[0] not in set(map(printable, failed))]
    wrong += [f"config.json: {printable(data['config'])}"] if data.get("config") is not None else []
    text = (
        f"{len(modules) - len(failed)} of {_count(len(modules), 'weight')} are what base and adapter give, to within "
        + ("plain rounding" if data["tolerance"] is None else f"a relative error of {_figure(data['tolerance']):g}")
        + (
            "."
            if not files
            else f"; {len(files) - len(changed)} of {_count(len(files), 'file')} have their recorded hash."
        )
        + (f" All {_count(len(tensors), 'tensor')} of the model were looked at." if tensors else "")
    )
    tables = []
    if failed:
        rows = [
            [
                printable(path),
                percent(errors[path]),
                percent(_figure(modules[path]["rounding"])),
                {True: "yes", False: "no"}.get(modules[path]["recorded"], "not recorded"),
            ]
            for path in failed[:_LOOSE]
        ]
        tables.append(_table("Weights that failed", ["module", "error", "plain rounding", "as recorded"], rows))
    if wrong:
        caption = "Tensors and settings that are not what base and adapter give"
        tables.append(_table(caption, ["what"], [[w] for w in wrong[:_LOOSE]]))
    if changed:
        tables.append(_table("Files that are not as recorded", ["file"], [[c] for c in changed]))
    return _Check(
        {"id": "weights", "title": "Weight by weight", "text": text, "tables": tables},
        [_card("verified", f"{len(modules) - len(failed)} of {len(modules)}", "weights, against base and adapter")],
        failed + wrong + changed,
        ("verified error", "error of the stored weight, measured again from base and adapter", errors),
    )


# --- the table of modules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column of the modules' table: name, title, what it holds of the module at a path, and how that is shown."""

    name: str
    title: str
    of: Callable[[str], Any]
    show: Callable[[Any], str] = printable
    number: bool = False

    def cell(self, path: str) -> dict[str, Any]:
        value = self.of(path)
        key = None if not self.number else "" if value is None else repr(float(value))
        text = "–" if value is None else self.show(value)
        return {"key": key, "text": text, "weak": self.name == "kept" and (value or 0) > 1 - ENOUGH}


def _modules(
    record: FoldRecord, shown: Sequence[str], rows: Mapping[str, str], checks: Sequence[_Check]
) -> dict[str, Any]:
    def field(name: str) -> Callable[[str], Any]:
        return lambda path: getattr(record.modules[path], name)

    def drawn(metric: _Metric) -> Callable[[str], float | None]:
        return lambda path: metric.of(record.modules[path])

    columns: list[_Column] = []
    for metric in _METRICS:
        columns.append(_Column(metric.column, metric.title, drawn(metric), metric.show, number=True))
        if metric.id in _PLAIN and _compared(record):
            of, name, title = _PLAIN[metric.id]
            columns.append(_Column(name, title, field(of), percent, number=True))
    for name, title, values in (check.column for check in checks):
        columns.append(_Column(name, title, values.get, percent, number=True))
    columns = [column for column in columns if any(column.of(path) is not None for path in record.modules)]
    columns += [
        _Column("format", "how the weight is stored", field("format")),
        _Column("rounding", "how this weight was rounded", field("rounding")),
        _Column("side", "of the weight that the rotation is on", field("side")),
        _Column(
            "block",
            "size of the rotation's blocks; several adapters have one each",
            field("block_size"),
            lambda sizes: "+".join(map(str, sizes)),
        ),
        _Column("backend", "what computed the fold", field("backend")),
    ]
    left = len(record.modules) - len(shown)
    return {
        "text": _count(len(record.modules), "weight")
        + (f"; here the {len(shown)} with the largest errors, `oftsurgery show` lists all." if left else "."),
        "columns": [_Column("module", "path in the model", str), *columns],
        "rows": [
            {"id": rows[path], "path": printable(path), "cells": [column.cell(path) for column in columns]}
            for path in shown
        ],
    }


# --- provenance -------------------------------------------------------------------------------------------------------

# name, text, and whether that is code
_Fact = tuple[str, str] | tuple[str, str, bool]


def _adapter(adapter: AdapterInfo, index: int, count: int) -> dict[str, Any]:
    facts: list[_Fact] = [
        ("name", _last(adapter.source)),
        ("dialect", printable(adapter.dialect)),
        ("fingerprint", printable(adapter.fingerprint), True),
        (
            "SHA-256 of its tensors",
            printable(adapter.sha256) if adapter.sha256 else "not from a file",
            bool(adapter.sha256),
        ),
        ("base model in its config", _last(adapter.base_model) if adapter.base_model else "not named"),
        ("peft version in its config", printable(adapter.peft_version or "not named")),
    ]
    return {"title": "The adapter" if count == 1 else f"Adapter {index} of {count}, in the live order", "facts": facts}


def _fold(record: FoldRecord) -> list[_Fact]:
    facts: list[_Fact] = [("rounding", printable(record.rounding))]
    into = record.base.get("fold_into")
    if into is not None:
        said = {
            "quantized": "the quantised base, which a QOFT adapter is trained on",
            "original": "the original weights",
        }
        facts.append(("which weights were rotated", said.get(into, printable(into))))
    facts += [(printable(k), printable(v)) for k, v in record.base.items() if k != "fold_into" and v is not None]
    if record.saved:
        facts.append(("replaced by the adapter's own", f"{_count(len(record.saved), 'tensor')}"))
    untied = [path for path, m in record.modules.items() if m.untied]
    if untied:
        facts.append(("untied", ", ".join(map(printable, untied[:10]))))
    facts.append(("versions", ", ".join(f"{printable(k)} {printable(v)}" for k, v in record.versions.items())))
    return facts


def _before_after(record: FoldRecord, files: Mapping[str, int]) -> tuple[int | None, int] | None:
    sizes = record.sizes
    before, after = sizes.get("before"), sizes.get("after") or files.get("weights") or files.get("ONNX")
    return (before or None, after) if after else None


def _sizes(record: FoldRecord, files: Mapping[str, int]) -> dict[str, Any] | None:
    sizes = record.sizes
    rows = [
        [label, size(sizes[key]), f"{sizes[key]:,}"]
        for key, label in (("before", "tensors before the fold"), ("after", "tensors after it"))
        if key in sizes
    ]
    rows += [[f"in the folder: {what}", size(n), f"{n:,}"] for what, n in files.items() if n]
    return _table("Sizes", ["what", "size", "bytes"], rows) if rows else None


def _earlier(record: FoldRecord) -> dict[str, Any] | None:
    rows = []
    for i, fold in enumerate(record.earlier, 1):
        errors = [m.error for m in fold.modules.values() if is_figure(m.error)]
        rows.append(
            [
                f"{i}",
                _adapters(fold),
                ", ".join(printable(a.dialect) for a in fold.adapters),
                ", ".join(printable(a.fingerprint) for a in fold.adapters),
                f"{len(fold.modules)}",
                percent(statistics.median(errors)) if errors else "–",
                percent(max(errors)) if errors else "–",
            ]
        )
    if not rows:
        return None
    head = ["fold", "adapter", "dialect", "fingerprint", "weights", "median error", "worst error"]
    return _table("What the model carried before this fold", head, rows, words=4)


def _onnx(value: object) -> dict[str, Any] | None:
    """What the export of a graph recorded, in any shape: another version's may differ."""
    if not isinstance(value, Mapping) or not value:
        return None
    facts: list[_Fact] = []
    tables = []
    for key, item in value.items():
        name = printable(key).replace("_", " ")
        if key == "nbytes" and is_figure(item):
            facts.append(("weights of the graph", size(item)))
        elif key == "checks" and isinstance(item, (list, tuple)) and all(map(_is_check, item)):
            if item:
                tables.append(_comparisons(item))
        elif isinstance(item, Mapping) and len(item) > 6 and all(isinstance(v, str) for v in item.values()):
            counts = Counter(item.values()).most_common(10)
            facts.append((name, ", ".join(f"{n} × {printable(v)}" for v, n in counts)))
        else:
            facts += _flat(item, name)
    return {"facts": facts, "tables": tables}


def _is_check(value: object) -> bool:
    errors = value.get("errors") if isinstance(value, Mapping) else None
    return isinstance(errors, Mapping) and all(map(is_figure, errors.values()))


def _comparisons(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    outputs = list(dict.fromkeys(name for check in checks for name in check["errors"]))[:_KINDS]
    rows = [
        [printable(c.get("inputs", "")), *(scientific(c["errors"][n]) if n in c["errors"] else "–" for n in outputs)]
        for c in checks[:_LOOSE]
    ]
    caption = "onnxruntime beside torch: largest difference, relative to the largest value"
    return _table(caption, ["inputs", *map(printable, outputs)], rows)


def _flat(value: object, name: str) -> list[_Fact]:
    """Facts of a JSON value, named by their place in it."""
    if isinstance(value, Mapping):
        return [fact for key, item in value.items() for fact in _flat(item, f"{name} {printable(key)}")][:200]
    if isinstance(value, (list, tuple)):
        return [(name, ", ".join(printable(v) for v in value[:50]) or "none")]
    if value is None:
        return []
    shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else printable(value)
    return [(name, f"{value:.4g}" if isinstance(value, float) else shown)]


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> dict[str, Any]:
    """A table of which the first ``words`` columns hold words, and the others figures."""
    return {"caption": caption, "head": head, "rows": rows, "words": words}


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
