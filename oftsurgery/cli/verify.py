"""The commands ``verify`` and ``doctor``."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

import oftsurgery  # its names are imported when they are first used
from oftsurgery.errors import printable

from .arguments import PIPELINE_FLAGS, READING_FLAGS, AddCommand, ExitCode, adapters_of, base_of, keywords
from .printing import Row, print_table, wants_words


def add_commands(command: AddCommand) -> None:
    text = "check a folded checkpoint's files against their recorded hashes, and its weights against base and adapter"
    verify = command("verify", text, "FOLDED BASE ADAPTER", _verify)
    verify.add_argument(
        "folded", metavar="FOLDED", help="folded checkpoint; without BASE and ADAPTER only its hashes are checked"
    )
    verify.add_shared("base", nargs="?", help="folder, Hub id or URL of the model that was folded")
    verify.add_shared(
        "adapter", nargs="*", help="folder, Hub id or URL of the adapter; several adapters in the live order"
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="ERROR",
        help="largest relative error that passes (default: the error of storing the exact weight)",
    )

    verify.add_argument(
        "--texts",
        metavar="FILE",
        help="texts on which the outputs are compared too: .txt (one text a line), .jsonl or .parquet (field 'text'); this flag "
        "loads the folded model and the base with the adapter live, and runs them",
    )
    verify.add_shared("--base-revision", *PIPELINE_FLAGS, *READING_FLAGS)

    text = "find and explain errors in a checkpoint or an adapter"
    doctor = command("doctor", text, "PATH --base BASE", _doctor)
    doctor.add_argument("path", metavar="PATH", help="folder or file of a checkpoint or an adapter")
    doctor.add_argument("--base", help="checkpoint that was folded, or that the adapter is for")
    doctor.add_argument("--adapter", help="adapter that was folded")
    doctor.add_shared(*READING_FLAGS)


def _verify(args: argparse.Namespace) -> int:
    both = (base_of(args) if args.base else None, adapters_of(args) if args.adapter else None)
    settings = keywords(args, "texts", "tolerance", "component", "variant")
    report = oftsurgery.verify_checkpoint(args.folded, *both, **settings)
    if wants_words(args, report):
        _print_verified(report)
    return ExitCode.OK if report.ok else ExitCode.CHECK_FAILED


def verify_output(args: argparse.Namespace, folded: str | Path) -> int:
    """Run ``oftsurgery verify`` on the folded checkpoint and print words only: the fold prints the JSON."""
    verify = {"folded": folded, "tolerance": None, "texts": None, "json": False, "quiet": args.quiet or args.json}
    return _verify(argparse.Namespace(**vars(args) | verify))


def _print_verified(report: oftsurgery.CheckpointReport) -> None:
    rows: list[Row] = []
    for path, c in report.worst_first:
        recorded = {True: "yes", False: "NO", None: None}[c.recorded]
        gain = c.gain if c.rounding else None
        passes = "ok" if report.passes(c) else "FAILED"
        rows.append((path, c.error, c.rounding, gain, c.rho, c.kept, recorded, passes))
    if rows:
        head = "module  error:.3e  plain rounding:.3e  of its square:+.0%  ρ:.2f  kept:.1%  as recorded  "
        print_table(head, rows)
    for name, why in report.wrong.items():
        print(f"{printable(name)}: {printable(why)}")
    if report.config is not None:
        print(f"config.json: {printable(report.config)}")
    if report.tensors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.looked_at.items())
        print(f"looked at {len(report.tensors)} tensors: {kinds}; {len(report.wrong) or 'none'} of them wrong")
    wrong = [(name, state) for name, state in report.files.items() if state != "ok"]
    for name, state in wrong:
        print(f"{printable(name)}: {state.upper()} since it was recorded")
    if report.files and not wrong:
        print(f"{len(report.files)} files are as recorded")
    if report.on_texts is not None:
        print(report.on_texts)
    print("\n".join(_verdict(report)))


def _verdict(report: oftsurgery.CheckpointReport) -> list[str]:
    """What helps where the fold keeps too little of its adapter, and the verdict in the last line."""
    helps = [f"  {i}. {remedy}" for i, remedy in enumerate(report.remedies, start=1)]
    return [*(["what helps, best first:", *helps] if helps else []), report.verdict]


def _doctor(args: argparse.Namespace) -> int:
    # flags that say how to read an adapter belong to --adapter, or else to the examined adapter
    named = argparse.Namespace(**vars(args) | ({} if args.adapter else {"adapter": args.path}))
    read = adapters_of(named)[0]
    found = oftsurgery.doctor(
        args.path if args.adapter else read, base=args.base, adapter=read if args.adapter else None
    )
    findings = [replace(finding, remedy=_in_own_words(args, finding.remedy)) for finding in found]
    if wants_words(args, [f.to_dict() for f in findings]):
        for finding in findings:
            print(f"{finding}\n")
        print("the doctor found nothing wrong" if not findings else f"findings of the doctor: {len(findings)}")
    return ExitCode.CHECK_FAILED if any(f.severity == "error" for f in findings) else ExitCode.OK


def _in_own_words(args: argparse.Namespace, remedy: str) -> str:
    """A remedy of the doctor with the command's own folders in its commands."""
    from oftsurgery.checks.findings import CONVERT, FOLD, UNFOLD

    own = {"BASE": args.base, "ADAPTER": args.adapter or args.path, "FOLDED": args.path}
    for command in (FOLD, UNFOLD, CONVERT):
        remedy = remedy.replace(command, shlex.join(own.get(word) or word for word in command.split()))
    return remedy
