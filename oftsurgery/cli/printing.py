"""The functions here print results and progress: tables, facts, sizes, JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from oftsurgery.errors import printable, share
from oftsurgery.progress import Progress, without_bars


def wants_words(args: argparse.Namespace, result: Any) -> bool:
    """Whether the command prints its result in words; with ``--json`` this function prints the result as JSON."""
    if args.json:
        print(json.dumps(result.to_dict() if hasattr(result, "to_dict") else result, indent=2))
    return not args.json and not args.quiet


_VALUE = r"(?:'[^']*'|…|\w+)"
_IN_PYTHON = re.compile(
    rf"(?P<call>\w+\([^()]*\))"  # a call stays
    rf"|\b\w+={_VALUE}(?: with \w+='[^']*')? \((?P<flag>--[^()]*)\)"  # an argument before the flag that is the same
    rf"|\(\w+={_VALUE}, (?P<inside>--[^()]*)\)"  # both in brackets
    rf"|\b(?P<name>{'|'.join(('format', 'quantize', 'fold_into', 'rounding'))})='(?P<value>\w+)'"  # an argument alone
)


def with_flags(text: str) -> str:
    """A message in the words of the command line: ``format='bf16' (--format bf16)`` becomes ``--format bf16``."""

    def flag(found: re.Match[str]) -> str:
        if found["name"]:
            return f"--{found['name'].replace('_', '-')} {found['value']}"
        return found["call"] or found["flag"] or f"({found['inside']})"

    return _IN_PYTHON.sub(flag, text)


def print_facts(*rows: tuple[str, str | None], limit: int = 400) -> None:
    """Print each known fact on a line."""
    for label, value in rows:
        if value:
            print(f"{label}: {printable(value, limit)}")


def facts_beside(facts: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """The lines about the files beside the weights, from a plan or a record as plain values."""
    whose = {"tokenizer": facts["tokenizer"], "chat template": facts["chat_template"]}
    told = [(what, f"the {name}'s" if name != "other" else "of another folder") for what, name in whose.items() if name]
    names = {"model code, copied and not run": facts["code"], "left out": facts["left_out"]}
    return [*told, *((what, ", ".join(found)) for what, found in names.items())]


def tokens_text(vocabulary: Mapping[str, int]) -> str:
    """The number of tokens that an adapter brought; an empty text where the number stays."""
    return (
        f"{vocabulary['after']}, and {vocabulary['before']} in the base" if {"before", "after"} <= {*vocabulary} else ""
    )


Row = Sequence[str | float | None]


def print_table(head: str, rows: Sequence[Row]) -> None:
    """Print a table; ``head`` has the columns' names, two spaces apart, each with the format of its figures."""
    names, _, formats = zip(*(column.partition(":") for column in head.split("  ")), strict=True)
    cells = [names, *([_cell(*pair) for pair in zip(row, formats, strict=True)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: str | float | None, spec: str) -> str:
    if isinstance(value, str):
        return printable(value)
    if value is not None and spec.endswith("%"):
        return share(value, spec)
    return "-" if value is None else format(value, spec)


def size_text(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


_EVERY_S = 10.0  # seconds between two lines of progress


def progress_for(args: argparse.Namespace) -> bool | Progress:
    """The progress of a command: a bar in bytes on a terminal, elsewhere a plain line every few seconds, a line for every
    weight with ``-v``, and nothing with ``-q`` or ``--json``.
    """
    last = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal last
        if args.verbose:
            print(f"{size_text(done)} of {size_text(total)}: {printable(what)}", file=sys.stderr)
        elif time.monotonic() - last >= _EVERY_S or done == total:
            last = time.monotonic()
            part = (
                f"{size_text(done)} of {size_text(total)} ({done / total:.0%})" if total else "there is nothing to read"
            )
            print(part, file=sys.stderr)

    if args.quiet or args.json:
        return False
    return line if args.verbose or not sys.stderr.isatty() else True


def hub_bars(args: argparse.Namespace, *, unwanted: bool = False) -> AbstractContextManager[None]:
    """While the body runs, the Hub's client shows its own bars for large files, unless the bars are ``unwanted`` or the command
    prints nothing or JSON.
    """
    if not (unwanted or args.quiet or args.json):
        return nullcontext()
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    return without_bars(not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars)
