"""The commands ``export``, which folds and exports to a checkpoint or to ONNX in one step, and ``push``, to the Hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import oftsurgery  # its names are imported when they are first used
from oftsurgery.errors import StateError, printable
from oftsurgery.progress import shown

from .arguments import (
    FOLDING_FLAGS,
    PUSHING_FLAGS,
    RUNNING_FLAGS,
    AddCommand,
    ExitCode,
    Parser,
    add_config_flags,
    base_of,
    keywords,
    switch,
)
from .fold import fold_into, print_written, show_plan
from .printing import hub_bars, print_facts, print_table, progress_for, size_text, wants_words
from .verify import verify_output

ONNX_FORMATS = ("onnx", "onnx-quantized")
FORMATS = ("bnb", "fp32", "fp16", "bf16", *ONNX_FORMATS)
_REPO = "owner/name, or a name of your own; by default the name is made of base, adapter and format, and you are asked"
EXPORT_EXAMPLE = "--base BASE --adapter ADAPTER --output OUTPUT --trained-on nf4-double --format bf16 --verify"


def add_export(command: AddCommand) -> None:
    add_export_arguments(command("export", "fold and export in one step", EXPORT_EXAMPLE))


def add_push(command: AddCommand) -> None:
    text = "push the files of an export, and no others, to a Hub repository"
    push = command("push", text, "FOLDER owner/name --dry-run", _push)
    push.add_argument("folder", metavar="FOLDER", help="folder that an export wrote")
    push.add_argument("repo_id", metavar="REPO_ID", nargs="?", help=_REPO)
    push.add_shared("--dry-run", help="list the files, their sizes and the repository, and send nothing")
    push.add_shared(*PUSHING_FLAGS)


def add_export_arguments(parser: Parser) -> None:
    """Add the arguments of ``export``, which ``tools/export.py`` takes too."""
    parser.add_argument(
        "--base", help="folder or Hub id of the model (default: the base that the adapter's config names)"
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        help="folder or Hub id of the adapter; several adapters in the live order. Without an adapter the ONNX formats export the base",
    )
    parser.add_argument("--output", required=True, help="folder to write, which must not exist")
    parser.add_shared("--format", choices=FORMATS, default="bnb")
    parser.add_shared(*FOLDING_FLAGS, "--undo", *RUNNING_FLAGS, "--dry-run")
    parser.add_argument("--verify", **switch("check every weight of the output against base and adapter"))
    onnx = parser.add_argument_group("--format onnx, onnx-quantized")
    onnx.add_argument("--dtype", choices=("float16", "float32"), help="dtype of the graph (default: float16)")
    onnx.add_argument("--with-past", **switch("export the key-value cache too, for generation (onnxruntime-genai)"))
    onnx.add_argument("--no-verify", **switch("do not compare the graph with torch; the record states this"))
    parser.add_argument("--push-to-hub", metavar="REPO_ID", nargs="?", const="", help=f"push the output: {_REPO}")
    parser.add_shared(*PUSHING_FLAGS)
    add_config_flags(parser)
    parser.flags_between = True
    parser.set_defaults(run=_export, usage_error=parser.error)


def _export(args: argparse.Namespace) -> int:
    onnx = args.format in ONNX_FORMATS
    if not onnx and (args.dtype or args.with_past or args.no_verify):
        args.usage_error("--dtype, --with-past and --no-verify belong to --format onnx and onnx-quantized")
    if onnx and args.undo:
        args.usage_error("a graph cannot be unfolded, so --undo belongs to the other formats: leave out --undo")
    if not args.adapter and (not onnx or args.dry_run or args.verify or args.quantize):
        args.usage_error("the following arguments are required: --adapter")
    if args.base is None and not args.adapter:
        args.usage_error("one of the following arguments is required: --base, --adapter")
    base_of(args)  # names the base in `args` too
    if args.dry_run:
        show_plan(args)
        if args.push_to_hub is not None and not args.json and not args.quiet:
            print(f"push to: {args.push_to_hub or 'a repository named after base, adapter and format'}")
        return ExitCode.OK
    export = _export_onnx if onnx else _export_checkpoint
    return export(args) if args.push_to_hub is None else _export_and_push(args, export)


def _export_and_push(args: argparse.Namespace, export: Callable[[argparse.Namespace], int]) -> int:
    from oftsurgery.api.checkpoints import read_record
    from oftsurgery.hub import login

    # check before the fold, which may take hours, that the push can begin
    _prepare_push(args, asks=not args.push_to_hub)
    login(args.token)
    as_json = args.json  # export and push print one JSON document together
    args.json, args.quiet = False, args.quiet or as_json
    code = export(args)
    if code != ExitCode.OK:
        return code
    args.json = as_json
    record = read_record(args.output)
    beside = {"record": record.to_dict() if record is not None else None}
    return _send(args, args.output, args.push_to_hub or None, beside)


def _export_checkpoint(args: argparse.Namespace) -> int:
    print_written(args, fold_into(args, args.output, force=args.force))
    return verify_output(args, args.output) if args.verify else ExitCode.OK


def _export_onnx(args: argparse.Namespace) -> int:
    from oftsurgery.files.staging import check_apart, scratch
    from oftsurgery.onnx.toolchain import require_onnx

    require_onnx()  # the check comes before the fold, which may take hours

    def export(source: str | Path) -> None:
        report = oftsurgery.export_onnx(
            source,
            args.output,
            args.dtype or "float16",
            args.format == "onnx-quantized",
            args.with_past,
            verify=not args.no_verify,
            force=args.force,
            progress=False if args.quiet or args.json else _print_stage,
        )
        _print_onnx(args, report)

    if not args.adapter:
        export(base_of(args))
        return ExitCode.OK
    for what, given in (("base", [args.base]), ("adapter", args.adapter)):
        check_apart(Path(args.output), what, [Path(name) for name in given if Path(name).is_dir()])
    with scratch(Path(args.output), force=args.force) as folded:
        fold_into(args, folded, force=True)
        code = verify_output(args, folded) if args.verify else ExitCode.OK
        export(folded)
    return code


def _print_onnx(args: argparse.Namespace, report: oftsurgery.OnnxReport) -> None:
    if wants_words(args, report):
        quantised = f", {len(report.quantized)} layers quantised" * bool(report.quantized or report.dequantized)
        print(f"wrote {args.output}: {size_text(report.nbytes)} of weights in {report.dtype}{quantised}")
        for path, reason in report.dequantized.items():
            print(f"{printable(path)} is dequantised: {reason}")
        if report.verified:
            worst = f"{report.worst:.1e} of the largest value"
            print(f"largest difference from torch: {worst}, in {len(report.checks)} comparisons")
        if report.repacked:
            count = len(report.repacked)
            print(f"a CPU forward had repacked {count} weights before, and rounded their scales to bfloat16")
        if args.verbose:
            differences = [(c.inputs, name, e) for c in report.checks for name, e in c.errors.items()]
            print_table("inputs  output  difference:.1e", differences)


def _print_stage(done: int, total: int, what: str) -> None:
    if done < total:
        print(f"[{done + 1}/{total}] {what}", file=sys.stderr)


def _prepare_push(args: argparse.Namespace, *, asks: bool) -> None:
    """Prepare a push's use of the standard input: refuse a push that ``asks`` without a terminal, and read the token."""
    if asks and not args.yes and not sys.stdin.isatty():
        message = "a derived name of a repository needs your consent, and there is no terminal for the question"
        raise StateError(message, remedy="name the repository, or consent with --yes")
    if args.token == "-":  # noqa: S105 - no token
        args.token = sys.stdin.readline().strip()
    elif args.token and not args.quiet:
        print("oftsurgery: the list of processes shows --token: use HF_TOKEN or --token -", file=sys.stderr)


def _push(args: argparse.Namespace) -> int:
    args.pushing = True
    _prepare_push(args, asks=args.repo_id is None and not args.dry_run)
    return _send(args, args.folder, args.repo_id)


def _send(args: argparse.Namespace, folder: str, repo_id: str | None, beside: Mapping[str, Any] | None = None) -> int:
    """Push, and print what was pushed; the JSON document also has the facts in ``beside``."""
    from oftsurgery.hub import plan_push, send

    args.pushing = True
    report = plan_push(folder, repo_id, **keywords(args, "private", "revision", "create_pr", "token"))
    if not args.quiet and not args.json:
        _print_push(report)
    if not args.dry_run:
        if report.derived and not args.yes:
            print(f"push {len(report.files)} files to {report.repo_id}? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                print("nothing was pushed", file=sys.stderr)
                return ExitCode.REFUSED
        with shown(progress_for(args), "push") as step, hub_bars(args, unwanted=not sys.stderr.isatty()):
            report = send(report, **keywords(args, "commit_message", "token"), progress=step)
    said = report if beside is None else {**beside, "push": report.to_dict()}
    if wants_words(args, said) and not args.dry_run:
        print(f"pushed: {report.pull_request or report.url}")
    return ExitCode.OK


def _print_push(report: oftsurgery.PushReport) -> None:
    changed = dict.fromkeys(report.changed, "CHANGED since the export")
    print_table("file  size  ", [(name, size_text(size), changed.get(name, "")) for name, size in report.files.items()])
    print()
    print_facts(
        ("to", report.repo_id),
        ("branch", report.revision),
        ("as", "a pull request" if report.create_pr else None),
        ("visibility", "private" if report.private else None),
        ("in all", f"{len(report.files)} files, {size_text(report.nbytes)}"),
        ("not sent, since not part of the export", ", ".join(report.left_out)),
    )
