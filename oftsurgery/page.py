"""One self-contained HTML page of a fold's record: no network, no file beside it, a function of its inputs alone."""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ._version import __version__
from .errors import MissingDependencyError, StateError, printable
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
        text: what it is.
        scale: of its colours, from its values.
        show: a value with its unit.
        unit: of the values in cells.
        short: a value without it.
        wanted: what a value should be, from which it is told how far below it lies; None: small is good.
    """

    id: str
    title: str
    column: str
    text: str
    scale: Callable[[Sequence[float]], Scale]
    show: Callable[[float], str]
    unit: str
    short: Callable[[float], str]
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
        "How far each stored weight is from the exactly rotated one, ‖stored − exact‖ / ‖exact‖. The format's own grid "
        "costs this: with 4 bits about 9 % is usual, and quantising the base cost about as much before.",
        Scale.of_errors,
        percent,
        "in %",
        _percents,
    ),
    _Metric(
        "kept",
        "Kept: is the adapter still there?",
        "kept",
        f"How much of what the adapter changed is in the stored weights, ⟨stored − base, exact − base⟩ / ‖exact − base‖². At 100 % "
        f"all of it; below {ENOUGH:.0%} (marked !) the rounding has put a part back; at 0 % nothing is left of it. Of calibrated weights it "
        "is measured on the layer's outputs.",
        Scale.to_one,
        lambda v: f"{100 * (1 - v):.1f}\N{NO-BREAK SPACE}%",
        "in %",
        lambda v: f"{100 * (1 - v):.0f}",
        wanted=1.0,
    ),
    _Metric(
        "rho",
        "ρ: the rounding beside the adapter",
        "ρ",
        "The error beside what the adapter changed, ‖stored − exact‖ / ‖exact − base‖. It says nothing of the error's direction: a "
        "weight may err by more than the adapter changed and still hold all of it.",
        Scale.to_one,
        lambda v: f"{v:.2f}",
        "a ratio",
        lambda v: f"{v:.2f}",
    ),
    _Metric(
        "output_error",
        "Error of the layers' outputs",
        "output error",
        "‖X (stored − exact)ᵀ‖ / ‖X exactᵀ‖ over the calibration texts' inputs X: what the error does to what the layer "
        "computes.",
        Scale.of_errors,
        percent,
        "in %",
        _percents,
    ),
    _Metric(
        "angle",
        "What the fine-tune moved",
        "angle",
        "The largest angle by which the adapter turns any direction of a module's inputs. 0° is a module that the "
        "fine-tune left alone.",
        Scale.from_zero,
        degrees,
        "in degrees",
        lambda v: degrees(v).removesuffix("°"),
    ),
    _Metric(
        "defect",
        "Orthogonality defects",
        "defect",
        "The largest ‖RᵀR − I‖₂ of a module's rotations R: how far from orthogonal they are. A truncated Neumann series "
        "(peft's default) has a defect, which the live adapter has too and the fold reproduces.",
        Scale.of_defects,
        scientific,
        "a pure number",
        scientific,
    ),
)

_WORDS = (
    ("error", "‖stored − exact‖ / ‖exact‖ (Frobenius): rounding of the exactly rotated weight to its storage format."),
    (
        "plain rounding",
        "What the error would have been with bitsandbytes' own rounding, each value to its nearest code.",
    ),
    ("kept", "⟨stored − base, exact − base⟩ / ‖exact − base‖²: how much of what the adapter changed is there."),
    ("ρ", "‖stored − exact‖ / ‖exact − base‖: the error beside what the adapter changed."),
    ("output error", "The same error measured on a layer's outputs over calibration texts."),
    ("angle", "The largest angle between a direction and its rotated self, over the module's blocks."),
    ("defect", "‖RᵀR − I‖₂, 0 for an orthogonal R."),
    (
        "1 − cos",
        "Mean of one minus the cosine between the two models' output vectors: 0 where they agree in direction.",
    ),
)


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
        "words": _WORDS,
        "levels": range(LEVELS),
        "version": __version__,
    }
    facts["sections"] = [
        *((m["id"], m["title"]) for m in maps),
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
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("jinja2 is not installed", remedy="pip install jinja2") from error
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


def _verdict(record: FoldRecord, checks: Sequence[_Check]) -> dict[str, str]:
    modules = record.modules
    failed = [path for check in checks for path in check.failed]
    if failed:
        return {
            "tone": "warn",
            "word": "Not as it should be.",
            "text": f"{_count(len(failed), 'weight')} failed the comparison with base and adapter, the worst {printable(failed[0])}.",
        }
    if not modules:
        return {"tone": "plain", "word": "Nothing was rotated.", "text": "The record names no weight."}
    kept, weak = record.kept, record.weak
    if kept is not None:
        if weak:
            worst = next(iter(weak))
            first = "" if record.rounding == "preserve" else 'rounding="preserve", '
            return {
                "tone": "warn",
                "word": "Lost." if kept < 0.5 else "Partly lost.",
                "text": f"{kept:.0%} of what the adapter changed is kept; in {len(weak)} of {_count(len(modules), 'weight')} less than "
                f"{ENOUGH:.0%} (least in {printable(worst)}: {weak[worst]:.0%}). What helps: {first}calibrated rounding, int8 or bf16 as "
                "the format, or keeping the adapter live.",
            }
        least = min((m.effect_kept, path) for path, m in modules.items() if m.effect_kept is not None)
        return {
            "tone": "good",
            "word": "The adapter is still there.",
            "text": f"{kept:.1%} of what the adapter changed is kept, over all weights; {least[0]:.1%} at least, in {printable(least[1])}.",
        }
    error = max(m.error for m in modules.values())
    if error <= _ALMOST_EXACT:
        return {
            "tone": "good",
            "word": "Stored almost exactly.",
            "text": f"No weight is further than {percent(error)} from what the adapter computes.",
        }
    return {
        "tone": "plain",
        "word": "Rounded.",
        "text": f"Weights are {percent(statistics.median(m.error for m in modules.values()))} in the median from what the adapter "
        f"computes, {percent(error)} at most. The record does not tell how much of the adapter is kept.",
    }


def _cards(record: FoldRecord, checks: Sequence[_Check], files: Mapping[str, int]) -> list[dict[str, str]]:
    modules = record.modules
    cards = [_card("weights folded", f"{len(modules)}", _formats(modules.values()))]
    for metric in _METRICS:
        values = _values(metric, record)
        if not values:
            continue
        worst = max(values, key=lambda path: values[path])
        if metric.id in ("error", "output_error"):
            plain = _plain_median(metric, record)
            spread = [metric.show(_quantile(list(values.values()), share)) for share in (0.25, 0.75)]
            note = (
                f"plain rounding: {metric.show(plain)}" if plain is not None else f"half between {' and '.join(spread)}"
            )
            cards.append(_card(f"{metric.column}, median", metric.show(statistics.median(values.values())), note))
        if metric.id != "output_error":
            what = {
                "error": "error, worst",
                "kept": "kept, least",
                "rho": "ρ, worst",
                "angle": "angle, largest",
                "defect": "defect, largest",
            }
            cards.append(_card(what[metric.id], metric.show(values[worst]), path=printable(worst)))
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
    name = {"error": "nearest", "output_error": "output_nearest"}.get(metric.id, "")
    values = [v for m in record.modules.values() if (v := getattr(m, name, None)) is not None]
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
    drawn = sorted(loose, key=lambda path: -values[path])[:_LOOSE] if len(loose) > _LOOSE else loose
    return {
        "id": f"map-{metric.id}",
        "title": metric.title,
        "column": metric.column,
        "text": metric.text,
        "unit": metric.unit,
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
    groups: list[dict[str, Any]] = []
    for group, _, _ in heads:
        if groups and groups[-1]["name"] == printable(group):
            groups[-1]["span"] += 1
        else:
            groups.append({"name": printable(group), "span": 1})
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
        "text": f"How many weights have which error; the middle half lies between "
        f"{percent(_quantile(errors, 0.25))} and {percent(_quantile(errors, 0.75))}.",
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


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


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
    cards = [
        _card(f"end to end, {printable(name)}", scientific(cosine), f"1 − cos; relative error {percent(relative)}")
        for name, (relative, _, cosine) in list(outputs.items())[:2]
    ]
    return _Check(
        {
            "id": "end-to-end",
            "title": "End to end",
            "text": f"The folded model beside the reference, over {_count(batches, 'batch', 'batches')} of inputs.",
            "tables": [
                {
                    "caption": "How far the models' outputs are apart",
                    "head": ["output", "relative error", "largest difference", "1 − cos"],
                    "rows": rows,
                }
            ],
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
        tables.append(
            {
                "caption": "Weights that failed",
                "head": ["module", "error", "plain rounding", "as recorded"],
                "rows": [
                    [
                        printable(path),
                        percent(errors[path]),
                        percent(_figure(modules[path]["rounding"])),
                        {True: "yes", False: "no"}.get(modules[path]["recorded"], "not recorded"),
                    ]
                    for path in failed[:_LOOSE]
                ],
            }
        )
    if wrong:
        caption = "Tensors and settings that are not what base and adapter give"
        tables.append({"caption": caption, "head": ["what"], "rows": [[w] for w in wrong[:_LOOSE]]})
    if changed:
        tables.append({"caption": "Files that are not as recorded", "head": ["file"], "rows": [[c] for c in changed]})
    return _Check(
        {"id": "weights", "title": "Weight by weight", "text": text, "tables": tables},
        [_card("verified", f"{len(modules) - len(failed)} of {len(modules)}", "weights, against base and adapter")],
        failed + wrong + changed,
        ("verified error", "error of the stored weight, measured again from base and adapter", errors),
    )


# --- the table of modules ---------------------------------------------------------------------------------------------


def _modules(
    record: FoldRecord, shown: Sequence[str], rows: Mapping[str, str], checks: Sequence[_Check]
) -> dict[str, Any]:
    columns: list[tuple[str, str, Callable[[str], tuple[float | None, str]]]] = []

    def number(name: str, title: str, of: Callable[[str], float | None], show: Callable[[float], str]) -> None:
        if any(of(path) is not None for path in record.modules):
            columns.append((name, title, lambda p: (of(p), "–" if (v := of(p)) is None else show(v))))

    def of(field: str) -> Callable[[str], float | None]:
        return lambda path: getattr(record.modules[path], field, None)

    def drawn(metric: _Metric) -> Callable[[str], float | None]:
        return lambda path: metric.of(record.modules[path])

    for metric in _METRICS:
        number(metric.column, metric.title, drawn(metric), metric.show)
        if metric.id == "error" and _compared(record):
            number("plain rounding", "what the error would have been with plain rounding", of("nearest"), percent)
        if metric.id == "output_error" and _compared(record):
            number("plain, output", "the output error with plain rounding", of("output_nearest"), percent)
    for name, title, values in (check.column for check in checks):
        number(name, title, values.get, percent)
    texts: list[tuple[str, str, Callable[[ModuleRecord], str]]] = [
        ("format", "how the weight is stored", lambda m: m.format),
        ("rounding", "how this weight was rounded", lambda m: m.rounding),
        ("side", "of the weight that the rotation is on", lambda m: m.side),
        (
            "block",
            "size of the rotation's blocks; several adapters have one each",
            lambda m: "+".join(map(str, m.block_size)),
        ),
        ("backend", "what computed the fold", lambda m: m.backend),
    ]
    left = len(record.modules) - len(shown)
    return {
        "text": _count(len(record.modules), "weight")
        + (f"; here the {len(shown)} with the largest errors, `oftsurgery show` lists all." if left else "."),
        "columns": [
            {"name": "module", "title": "path in the model", "number": False, "sorted": False},
            *({"name": n, "title": t, "number": True, "sorted": n == "error"} for n, t, _ in columns),
            *({"name": n, "title": t, "number": False, "sorted": False} for n, t, _ in texts),
        ],
        "rows": [
            {
                "id": rows[path],
                "path": printable(path),
                "cells": [
                    *(
                        {
                            "key": "" if v is None else repr(float(v)),
                            "text": text,
                            "weak": n == "kept" and (v or 0) > 1 - ENOUGH,
                        }
                        for n, (v, text) in ((n, get(path)) for n, _, get in columns)
                    ),
                    *(
                        {"key": None, "text": printable(get(record.modules[path])), "weak": False}
                        for _, _, get in texts
                    ),
                ],
            }
            for path in shown
        ],
    }


# --- provenance -------------------------------------------------------------------------------------------------------

_Fact = tuple[str, str, bool]


def _adapter(adapter: AdapterInfo, index: int, count: int) -> dict[str, Any]:
    facts: list[_Fact] = [
        ("name", _last(adapter.source), False),
        ("dialect", printable(adapter.dialect), False),
        ("fingerprint", printable(adapter.fingerprint), True),
        (
            "SHA-256 of its tensors",
            printable(adapter.sha256) if adapter.sha256 else "not from a file",
            bool(adapter.sha256),
        ),
        (
            "base model in its config",
            printable(_last(adapter.base_model)) if adapter.base_model else "not named",
            False,
        ),
        ("peft version in its config", printable(adapter.peft_version or "not named"), False),
    ]
    return {"title": "The adapter" if count == 1 else f"Adapter {index} of {count}, in the live order", "facts": facts}


def _fold(record: FoldRecord) -> list[_Fact]:
    facts: list[_Fact] = [("rounding", printable(record.rounding), False)]
    into = record.base.get("fold_into")
    if into is not None:
        said = {
            "quantized": "the quantised base, which a QOFT adapter is trained on",
            "original": "the original weights",
        }
        facts.append(("which weights were rotated", said.get(into, printable(into)), False))
    facts += [(printable(k), printable(v), False) for k, v in record.base.items() if k != "fold_into" and v is not None]
    if record.saved:
        facts.append(("replaced by the adapter's own", f"{_count(len(record.saved), 'tensor')}", False))
    untied = [path for path, m in record.modules.items() if m.untied]
    if untied:
        facts.append(("untied", ", ".join(map(printable, untied[:10])), False))
    facts.append(("versions", ", ".join(f"{printable(k)} {printable(v)}" for k, v in record.versions.items()), False))
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
    return {"caption": "Sizes", "head": ["what", "size", "bytes"], "rows": rows} if rows else None


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
    return {"caption": "What the model carried before this fold", "words": 4, "head": head, "rows": rows}


def _onnx(value: object) -> dict[str, Any] | None:
    """What the export of a graph recorded, in any shape: another version's may differ."""
    if not isinstance(value, Mapping) or not value:
        return None
    facts: list[_Fact] = []
    tables = []
    for key, item in value.items():
        name = printable(key).replace("_", " ")
        if key == "nbytes" and is_figure(item):
            facts.append(("weights of the graph", size(item), False))
        elif key == "checks" and isinstance(item, (list, tuple)) and all(map(_is_check, item)):
            if item:
                tables.append(_comparisons(item))
        elif isinstance(item, Mapping) and len(item) > 6 and all(isinstance(v, str) for v in item.values()):
            counts = Counter(item.values()).most_common(10)
            facts.append((name, ", ".join(f"{n} × {printable(v)}" for v, n in counts), False))
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
    return {"caption": caption, "head": ["inputs", *map(printable, outputs)], "rows": rows}


def _flat(value: object, name: str) -> list[_Fact]:
    """Facts of a JSON value, named by their place in it."""
    if isinstance(value, Mapping):
        return [fact for key, item in value.items() for fact in _flat(item, f"{name} {printable(key)}")][:200]
    if isinstance(value, (list, tuple)):
        return [(name, ", ".join(printable(v) for v in value[:50]) or "none", False)]
    if value is None:
        return []
    shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else printable(value)
    return [(name, f"{value:.4g}" if isinstance(value, float) else shown, False)]


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
