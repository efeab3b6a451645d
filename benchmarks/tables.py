"""README's and docs' figures of speed come from ``benchmarks/results``: this script writes them.

    python benchmarks/tables.py             writes the figures into README.md and docs/
    python benchmarks/tables.py --check     writes nothing; the exit code is 1 if a page has other figures than the results

A page has the figures between ``<!-- results: NAME -->`` and ``<!-- end of results -->``; each NAME is a function here. A
function whose results were not measured yet gives nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = ("README.md", "docs/speed.md")
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
_DEFAULT = "preserve"
_CODECS = {
    "nf4 nested": "NF4 with double quantisation",
    "nf4": "NF4",
    "fp4 nested": "FP4 with double quantisation",
    "fp4": "FP4",
    "int8": "int8",
    "bf16": "bf16",
}
_ADAPTERS = {"trained": "", "strong": ", strong adapter"}

Results = dict[str, Any]


# --- figures ----------------------------------------------------------------------------------------------------------


def _figure(x: float) -> str:
    return f"{x:.1f}" if x < 9.95 else f"{x:.0f}"


def _times(x: float) -> str:
    return f"{_figure(x)} ×"


def _ms(spread: dict[str, float], *, quartiles: bool = False) -> str:
    text = f"{_figure(spread['median_ms'])} ms"
    if not quartiles:
        return text
    return f"{text} ({_figure(spread['quartile_1'])} to {_figure(spread['quartile_3'])})"


def _seconds(x: float) -> str:
    return f"{x:.2f} s" if x < 1 else f"{x:.1f} s" if x < 20 else f"{x:.0f} s"


def _middle(runs: list[dict[str, float]], what: str = "seconds") -> float:
    return statistics.median(run[what] for run in runs)


def _table(head: list[str], rows: list[list[str]], *, words: int = 1) -> str:
    """A table whose first ``words`` columns are text, and the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    lines = [" | ".join(head), "|".join(rule), *(" | ".join(row) for row in rows)]
    return "\n".join(f"|{line}|" if i == 1 else f"| {line} |" for i, line in enumerate(lines)) + "\n"


def _prose(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 160, break_long_words=False, break_on_hyphens=False) + "\n"


def _mode(mode: str) -> str:
    return f'`"{mode}"`, the default' if mode == _DEFAULT else f'`"{mode}"`'


# --- layers -----------------------------------------------------------------------------------------------------------


def _cases(run: Results) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """``(any row, {mode: row})`` of each layer with its adapter."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in run["layers"]:
        key = tuple(row[name] for name in ("codec", "out", "in", "b", "adapter"))
        found.setdefault(key, {})[row["mode"]] = row
    for modes in found.values():
        yield next(iter(modes.values())), modes


def _run(results: Results) -> Results:
    """The run of the most threads."""
    return max(results["layers"]["runs"], key=lambda run: run["machine"]["threads"])


def _threads(machine: dict[str, Any]) -> str:
    count = machine["threads"]
    return f"{ {1: 'one thread', 2: 'two threads'}.get(count, f'{count} threads') } of an {machine['cpu']}"


def _adapters(run: Results) -> str:
    """How far the adapters move the weights, as far as the results say it."""
    moved = {row["adapter"]: row["moved"] for row in run["layers"] if row["moved"]}
    said = [f"the {name} adapter moves the weights by {moved[name]:.0%}" for name in _ADAPTERS if name in moved]
    return f" ({', '.join(said)})".replace("%", " %") if said else ""


def short(results: Results) -> str:
    """README's table: how many times faster than peft's merge."""
    run, widths = _run(results), (1024, 4096, 8192)
    rows = []
    for codec, named in _CODECS.items():
        for mode in (_DEFAULT, "nearest"):
            same = [r for r in run["layers"] if (r["codec"], r["mode"], r["b"]) == (codec, mode, 32)]
            at = {r["in"]: r for r in reversed(same) if r["out"] == r["in"] and r["adapter"] == same[0]["adapter"]}
            if all(width in at for width in widths):
                cells = [f"{_ms(at[w]['oftsurgery'])}, {_times(at[w]['times_faster_than_peft'])}" for w in widths]
                rows.append([f"{named}, {_mode(mode)}", *cells])
    said = _prose(
        f"`make bench` measured on {_threads(run['machine'])} how long the fold of one layer takes, and how many times faster the fold is than",
        f"peft {run['machine']['peft']}'s merge:",
    )
    return f"{said}\n{_table(['', *(f'{width} × {width}' for width in widths)], rows[:2])}"


def layers(results: Results) -> str:
    """One row for each layer of the run with the most threads."""
    run = _run(results)
    machine, rows = run["machine"], []
    for row, modes in _cases(run):
        usual, near = modes.get(_DEFAULT), modes.get("nearest")
        block = "" if row["b"] == 32 else f", b = {row['b']}"
        rows.append(
            [
                f"{_CODECS[row['codec']]}, {row['out']} × {row['in']}{block}{_ADAPTERS[row['adapter']]}",
                "" if usual is None else _ms(usual["oftsurgery"], quartiles=True),
                "" if near is None else _ms(near["oftsurgery"], quartiles=True),
                _ms(row["peft"], quartiles=True),
                _ms(row["bitsandbytes"]),
                "" if usual is None else _times(usual["times_faster_than_peft"]),
                "" if near is None else _times(near["times_faster_than_peft"]),
                "" if near is None else _times(near["times_faster_than_bitsandbytes"]),
            ]
        )
    if len({row["adapter"] for row in run["layers"]}) == 1:  # then nothing needs telling apart
        rows = [[row[0].removesuffix(_ADAPTERS["strong"]), *row[1:]] for row in rows]
    head = ["b = 32", '`"preserve"`', '`"nearest"`', "peft", "bitsandbytes, torch"]
    head += ['`"preserve"` than peft', '`"nearest"` than peft', '`"nearest"` than bitsandbytes, torch']
    if not any(row[1] for row in rows):
        head, *rows = ([cell for i, cell in enumerate(row) if i not in (1, 5)] for row in [head, *rows])
    said = _prose(
        f"The table is of {_threads(machine)}, torch {machine['torch']}, bitsandbytes {machine['bitsandbytes']} and "
        f"peft {machine['peft']}{_adapters(run)}:"
    )
    return f"{said}\n{_table(head, rows)}"


def line(results: Results) -> str:
    """The fixed part and the part for each million weights."""
    said = []
    for run in results["layers"]["runs"]:
        machine = run["machine"]
        for mode, found in run["lines"].items():
            off = max(abs(x) for x in found["off"].values())
            said.append(
                f"On {_threads(machine)}, the parts are {found['fixed_ms']:.1f} ms and {found['ms_per_million']:.2f} ms for "
                f'{_CODECS[found["codec"]]} with `"{mode}"`, and no width differs from their sum by more than {100 * off:.1f} %.'
            )
    if not said:
        return ""
    machine = _run(results)["machine"]
    fastest = max(_run(results)["layers"], key=lambda row: row["gigaflops"])
    return _prose(
        "The time of a fold is a fixed part and a part for each million weights.",
        *said,
        f"In the last of these runs torch's products reached {machine['product_gigaflops']:.0f} Gflop/s, and a copy reached",
        f"{machine['copy_gigabytes_per_second']:.0f} GB/s. The whole fold reached up to {fastest['gigaflops']:.0f} Gflop/s",
        f'({_CODECS[fastest["codec"]]}, {fastest["out"]} × {fastest["in"]}, b = {fastest["b"]}, `"{fastest["mode"]}"`).',
    )


def single(results: Results) -> str:
    """The figures of one thread."""
    said = [
        f'{_ms(row["oftsurgery"])} in {_CODECS[row["codec"]]}, `"{row["mode"]}"` '
        f"({_times(row['times_faster_than_peft'])} and "
        f"{_times(row['times_faster_than_bitsandbytes'])})"
        for run in results["layers"]["runs"]
        for row in run["layers"]
        if run["machine"]["threads"] == 1
        and (row["out"], row["in"], row["b"]) == (4096, 4096, 32)
        and row["mode"] in (_DEFAULT, "nearest")
    ]
    if not said:
        return ""
    head = "On one thread, a layer of 4096 × 4096 takes (in brackets: how many times faster than peft, and than bitsandbytes with torch):"
    return _prose(head, "; ".join(said) + ".")


def roundings(results: Results) -> str:
    """The roundings against nearest, and double quantisation against plain scales."""
    found = results["layers"]["roundings"]
    if not found:
        return ""
    rows = [
        [f"{r['width']} × {r['width']}", _CODECS[codec], *(f"{over[m]:.2f} ×" for m in (_DEFAULT, "grid", "mse"))]
        for r in found
        for codec, over in r["over_nearest"].items()
    ]
    said = [
        ", ".join(f'{over:.2f} × with `"{mode}"`' for mode, over in r["nested_over_plain"].items())
        + f" ({r['width']} × {r['width']})"
        for r in found
    ]
    table = _table(['time against `"nearest"`', "", '`"preserve"`', '`"grid"`', '`"mse"`'], rows, words=2)
    return table + "\n" + _prose(f"Double quantisation takes, against plain scales, {'; '.join(said)}.")


# --- a model, the first fold, a checkpoint ----------------------------------------------------------------------------


def model(results: Results) -> str:
    found = results["model"]
    size = f"{found['layers']} layers, {found['weights'] / 1e9:.2f} billion weights, NF4 with double quantisation"
    said = [f"The next figures are of a model of TinyLlama's shapes in memory ({size}, {_threads(found['machine'])})."]
    said.append(f"peft's merge takes {found['peft_s']:.0f} s.")
    for mode, own in found["modes"].items():
        text = f"The fold with {_mode(mode)}{', ' if mode == _DEFAULT else ' '}takes"
        text += (
            f" {own['fold_s']:.2f} s (median of {len(own['folds_s'])}), {_times(own['times_faster'])} faster than peft"
        )
        if "kernels_s" in own:
            text += f" and {own['over_kernels']:.2f} × as long as the kernels alone on the same weights ({own['kernels_s']:.2f} s)"
        said.append(text + ".")
    said.append(
        f"The peak of memory is {found['peak_above_start_mb']:.0f} MB above the model, with the {found['new_weights_mb']:.0f} MB of new weights "
        "included (`python benchmarks/bench.py model`)."
    )
    return _prose(*said)


def first(results: Results) -> str:
    found = results.get("first")
    if not found:
        return ""
    return _prose(
        f"`python benchmarks/bench.py first` times the first fold of a process after the imports, on {_threads(found['machine'])}",
        f'(1024 × 1024 in NF4 with double quantisation, `"{found["mode"]}"`): {_seconds(found["cold_s"])} with an empty cache, and',
        f"{_seconds(found['warm_s'])} with a full cache.",
    )


def disk(results: Results) -> str:
    found = results["fold_checkpoint"]
    names = {
        "cp -r": "`cp -r`, which does not wait for the disk",
        "imports alone": "a process that imports torch and transformers' modelling class",
        "oftsurgery plan": "`oftsurgery plan`",
        "oftsurgery fold, fresh": "`oftsurgery fold`, with empty caches, as in a fresh container",
        "oftsurgery fold, first of a base": "`oftsurgery fold` of a base for the first time",
        "oftsurgery fold": "`oftsurgery fold`",
        "oftsurgery show": "`oftsurgery show`",
        "oftsurgery report": "`oftsurgery report`",
        "oftsurgery.fold_checkpoint": "`oftsurgery.fold_checkpoint`, without the imports; it waits for the disk",
        "peft: load, merge, nothing saved": "peft, without the imports: load and merge in memory, nothing saved",
    }
    rows = []
    for name, text in names.items():
        runs = found["runs"].get(name)
        if runs:
            times = [run["seconds"] for run in runs]
            span = f" ({min(times):.2f} to {max(times):.2f})" if len(times) > 1 else ""
            most = f"{_middle(runs, 'peak_mb'):.0f} MB" if "peak_mb" in runs[0] else ""
            rows.append([text, _seconds(statistics.median(times)) + span, most])
    flag = " --peft" if any(name.startswith("peft") for name in found["runs"]) else ""
    head = _prose(
        f"The next table is of a checkpoint of 1.1 billion weights on disk ({found['bytes'] / 1e9:.2f} GB in NF4, {found['folded']} weights, all "
        f'folded with `"{found["rounding"]}"`, {_threads(found)}, median and range; `python benchmarks/fold_checkpoint.py{flag}`).',
        "The commands are whole processes.",
    )
    return f"{head}\n{_table(['', 'time', 'peak of memory above the imports'], rows)}"


# --- pages ------------------------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Results], str]] = {
    f.__name__: f for f in (short, layers, line, single, roundings, model, first, disk)
}


def read(folder: Path = RESULTS) -> Results:
    """``{name of the file: its contents}`` of the results."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def filled(text: str, results: Results) -> str:
    """A page with the figures of ``results``."""

    def figures(m: re.Match[str]) -> str:
        found = FIGURES[m[2]](results)
        return f"{m[1]}{found}\n{m[3]}" if found else f"{m[1]}{m[3]}"

    return _BLOCK.sub(figures, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    results, stale = read(), []
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = filled(old, results)
        if new != old:
            stale.append(name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    said = "has other figures than benchmarks/results: run python benchmarks/tables.py" if args.check else "written"
    for name in stale:
        print(f"{name}: {said}")
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
