""":func:`figures` draws PNGs of a fold's record, for places that cannot show HTML, such as a model card."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from oftsurgery.errors import needs
from oftsurgery.records.record import FoldRecord

from .figures import LEVELS, Scale, check_figures, degrees, percent
from .model_layout import Stack, layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# the page's own colours, on white
_COLOURS = ("#f3f6fb", "#dfe9f5", "#c6d8ee", "#a6c3e4", "#83abd8", "#5e92ca", "#3573b1", "#1f568f", "#103763")
_DARK_FROM = 6  # from this level on, the text is white

_LAYERS, _KINDS, _LOOSE = 128, 16, 24


def figures(record: FoldRecord) -> dict[str, bytes]:
    """``{file name: PNG}`` of ``errors.png`` and ``angles.png``, which are maps of layers × kinds of modules.

    The pictures depend only on the record and on matplotlib's version, and hold no date.

    Raises:
        CheckpointError: a figure in the record is not a finite number.
        MissingDependencyError: matplotlib is not installed.
    """
    check_figures(record)
    with needs("matplotlib", "pip install 'oftsurgery[report]'"):
        import matplotlib as mpl
    if not record.modules:
        return {}
    errors = {path: m.error for path, m in record.modules.items()}
    angles = {path: m.angle for path, m in record.modules.items()}
    with mpl.rc_context():
        mpl.rcdefaults()  # the user's own settings have no effect
        return {
            "errors.png": _png(_map("Error of storing the rotated weights", errors, Scale.of_errors, percent)),
            "angles.png": _png(_map("Largest rotation angle", angles, Scale.from_zero, degrees)),
        }


def _map(title: str, values: Mapping[str, float], scale_of: Any, show: Any) -> Figure:
    """The figure of one value for each module, with a map for each stack of layers."""
    from matplotlib.figure import Figure

    place = layout(values)
    scale: Scale = scale_of(list(values.values()))
    loose = sorted(place.loose, key=lambda path: -values[path])[:_LOOSE]
    heights = [min(len(s.layers), _LAYERS) * 0.22 + 1.1 for s in place.stacks] + [len(loose) * 0.24 + 0.5] * bool(loose)
    widths = [1.2 + 0.95 * min(len(s.kinds), _KINDS) for s in place.stacks]
    figure = Figure(figsize=(max([6.4, *widths]), sum(heights) + 0.9), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, stack in zip(axes, place.stacks, strict=False):
        _draw_stack(ax, stack, values, scale, show)
    if loose:
        _draw(axes[-1], [[values[path]] for path in loose], [_plain(p, 60) for p in loose], [""], scale, show)
    return figure


def _draw_stack(ax: Any, stack: Stack, values: Mapping[str, float], scale: Scale, show: Any) -> None:
    layers, kinds = stack.layers[:_LAYERS], stack.kinds[:_KINDS]
    rows = [
        [max((values[p] for p in stack.cells.get((layer, kind), ())), default=None) for kind in kinds]
        for layer in layers
    ]
    _draw(ax, rows, [_plain(layer, 30) for layer in layers], [_wrapped(kind) for kind in kinds], scale, show)
    ax.set_ylabel(_plain(stack.name, 40), parse_math=False, fontsize=9)


def _draw(
    ax: Any, rows: Sequence[Sequence[float | None]], left: Sequence[str], top: Sequence[str], scale: Scale, show: Any
) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    levels = [[float("nan") if v is None else scale.level(v) for v in row] for row in rows]
    norm = BoundaryNorm([i - 0.5 for i in range(LEVELS + 1)], LEVELS)
    ax.imshow(levels, cmap=ListedColormap(_COLOURS), norm=norm, aspect="auto", interpolation="nearest")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value is not None:
                colour = "white" if scale.level(value) >= _DARK_FROM else "#0b1016"
                text = show(value).replace("\N{NO-BREAK SPACE}", " ")
                ax.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(top)))
    ax.set_yticks(range(len(left)))
    for labels, texts in ((ax.set_xticklabels, top), (ax.set_yticklabels, left)):
        for label in labels(texts, fontsize=8):
            label.set_parse_math(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks([i - 0.5 for i in range(len(top) + 1)], minor=True)
    ax.set_yticks([i - 0.5 for i in range(len(left) + 1)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)


def _wrapped(kind: str) -> str:
    """A module's path in lines that are short enough for a column."""
    return "\n".join(_plain(part, 14) for part in kind.split("."))


def _plain(text: str, limit: int) -> str:
    """``text`` in characters that matplotlib's own font has, cut to ``limit`` characters."""
    out = text.encode("ascii", "backslashreplace").decode("ascii")
    out = "".join(ch if ch.isprintable() else f"\\x{ord(ch):02x}" for ch in out)
    return out if len(out) <= limit else out[: limit - 3] + "..."


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
