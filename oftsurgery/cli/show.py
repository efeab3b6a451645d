"""The commands ``report`` and ``show`` give a fold's record as a page, as pictures, or in print."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import oftsurgery  # its names are imported when they are first used
from oftsurgery.errors import share

from .arguments import AddCommand
from .printing import Row, facts_beside, print_facts, print_table, tokens_text, wants_words


def add_commands(command: AddCommand) -> None:
    text = "draw a fold's errors, and the changes of the fine-tune, as one HTML page"
    report = command("report", text, "FOLDER --html report.html", _report)
    report.add_argument("source", metavar="FOLDER|RECORD", help="folder that carries a fold, or its oftsurgery.json")
    report.add_argument("--html", metavar="FILE", help="page to write (default, without --png: report.html)")
    report.add_argument("--png", metavar="DIR", help="folder to write errors.png and angles.png to, for a model card")
    report.add_argument(
        "--verified",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of `oftsurgery verify --json`, or of oftsurgery.verify as JSON, which the page shows too",
    )
    report.add_shared("--force", help="replace files that exist")

    show = command("show", "print what is folded into a checkpoint, from its oftsurgery.json", "FOLDER", _show)
    show.add_argument("folder", metavar="FOLDER", help="folder of the checkpoint")


def _report(args: argparse.Namespace) -> None:
    from oftsurgery.api.reports import record_of
    from oftsurgery.reports.page import headline

    html = args.html or (None if args.png else "report.html")
    oftsurgery.report(args.source, html, png=args.png, verified=args.verified, force=args.force)
    record, _ = record_of(args.source)
    if wants_words(args, {"html": html, "png": args.png, **headline(record)}):
        print("wrote " + " and ".join(filter(None, (html, args.png))))


def _show(args: argparse.Namespace) -> None:
    from oftsurgery.api.reports import read_record

    record = read_record(args.folder)
    if wants_words(args, record) and record is not None:
        folds = (*record.earlier, record)
        for i, fold in enumerate(folds, start=1):
            print(f"fold {i} of {len(folds)}")
            _print_fold(fold)
            print()
        checks = " (oftsurgery verify checks them)" * bool(record.files)
        print(f"files with a recorded hash: {len(record.files)}{checks}")
    elif record is None and not args.json:
        print("nothing is folded into this checkpoint")


def _exported(fold: oftsurgery.FoldRecord, name: str, what: str, kind: str = "") -> str:
    """The facts about the graph or the GGUF file (``name``) that was exported and compared with ``what``."""
    facts = fold.extra.get(name)
    if not isinstance(facts, Mapping):
        return ""
    return f"{kind}{facts.get('dtype')}, {'' if facts.get('verified') is True else 'not '}compared with {what}"


def _print_fold(fold: oftsurgery.FoldRecord) -> None:
    for a in fold.adapters:
        print_facts(
            ("adapter", a.source),
            ("  dialect", a.dialect + (f", written by peft {a.peft_version}" if a.peft_version else "")),
            ("  fingerprint", a.fingerprint),
            ("  sha256", a.sha256),
            ("  base model in its config", a.base_model),
        )
    print_facts(
        ("base", ", ".join(f"{key} {value}" for key, value in fold.base.items() if value is not None)),
        ("rounding", fold.rounding),
        ("kept of what the adapter changed", "" if fold.kept is None else share(fold.kept, ".1%")),
        ("replaced by the adapter's own", ", ".join(fold.saved)),
        ("missing in the adapter", ", ".join(fold.missing)),
        ("tokens", tokens_text(fold.vocabulary)),
        ("added by the adapter", ", ".join(fold.added)),
        *facts_beside(fold.to_dict()),
        ("versions", ", ".join(f"{name} {v}" for name, v in fold.versions.items())),
        ("graph", _exported(fold, "onnx", "torch", "ONNX, ")),
        ("GGUF", _exported(fold, "gguf", "the checkpoint")),
        (
            "fields of a newer version, which this version cannot read",
            ", ".join(n for n in fold.extra if n not in ("onnx", "gguf")),
        ),
    )
    rows: list[Row] = []
    for path, m in sorted(fold.modules.items(), key=lambda item: -item[1].error):
        sizes = "+".join(map(str, m.block_size))
        rows.append(
            (path, m.format, m.side, sizes, m.error, m.defect, m.angle, m.rounding, m.nearest, m.rho, m.effect_kept)
        )
    head = "module  format  side  block size  error:.3e  defect:.1e  angle:.3f  rounding  plain:.3e  ρ:.2f  kept:.1%"
    print_table(head, rows)
