"""The commands ``export``, which folds and exports to a checkpoint, to ONNX or to GGUF in one step, and ``push``, to the Hub."""

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
    DTYPES,
    FOLDING_FLAGS,
    FORMATS,
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
#: formats that are written from a model that needs no fold, and that no fold can be taken out of again
FINAL_FORMATS = (*ONNX_FORMATS, "gguf")
_REPO = "owner/name, or a name of your own; by default the name is made of base, adapter and format, and you are asked"
EXPORT_EXAMPLE = "BASE OUTPUT --adapter ADAPTER --trained-on nf4-double --format bf16 --verify"


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
        "places", metavar="BASE OUTPUT", nargs="*", help="the base and the folder to write, as --base and --output"
    )
    parser.add_argument(
        "--base", help="folder or Hub id of the model (default: the base that the adapter's config names)"
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        help="folder or Hub id of the adapter; several adapters in the live order. Without an adapter the formats onnx, onnx-quantized and "
        "gguf export the base",
    )
    parser.add_argument("--output", help="folder to write, which must not exist")
    parser.add_shared("--format", choices=(*FORMATS, *FINAL_FORMATS), default="bnb")
    parser.add_shared(*FOLDING_FLAGS, "--undo", *RUNNING_FLAGS, "--dry-run")
    parser.add_argument("--verify", **switch("check every weight of the output against base and adapter"))
    final = parser.add_argument_group("--format onnx, onnx-quantized, gguf")
    final.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of a graph (float16, which is the default, or float32) or of a GGUF file (default: bfloat16 after a fold, else the dtype "
        "of the base's weights)",
    )
    final.add_argument(
        "--no-verify",
        **switch("do not compare the graph with torch, or the GGUF file with the checkpoint; the record states this"),
    )
    final.add_argument(
        "--with-past", **switch("ONNX: export the key-value cache too, for generation (onnxruntime-genai)")
    )
    final.add_argument("--converter", metavar="FILE", help="GGUF: llama.cpp's convert_hf_to_gguf.py")
    final.add_argument(
        "--converter-python",
        metavar="FILE",
        help="GGUF: the Python that runs the converter, with the packages of llama.cpp's requirements (default: the Python that runs oftsurgery)",
    )
    parser.add_argument("--push-to-hub", metavar="REPO_ID", nargs="?", const="", help=f"push the output: {_REPO}")
    parser.add_shared(*PUSHING_FLAGS)
    add_config_flags(parser)
    parser.flags_between = True
    parser.set_defaults(run=_export, usage_error=parser.error)


def _export(args: argparse.Namespace) -> int:
    _take_places(args)
    _check_arguments(args)
    base_of(args)  # names the base in `args` too
    if args.dry_run:
        show_plan(args)
        if args.push_to_hub is not None and not args.json and not args.quiet:
            print(f"push to: {args.push_to_hub or 'a repository named after base, adapter and format'}")
        return ExitCode.OK
    export = _export_final if args.format in FINAL_FORMATS else _export_checkpoint
    return export(args) if args.push_to_hub is None else _export_and_push(args, export)


def _take_places(args: argparse.Namespace) -> None:
    """Take BASE and OUTPUT from either of their two places."""
    if args.places:
        if len(args.places) != 2 or args.base is not None or args.output is not None:
            args.usage_error("give BASE and OUTPUT, or --base BASE and --output OUTPUT")
        args.base, args.output = args.places
    if args.output is None:
        args.usage_error("the following arguments are required: --output")
    if args.base is None and not args.adapter:
        args.usage_error("one of the following arguments is required: --base, --adapter")


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do not belong together."""
    final = args.format in FINAL_FORMATS
    if not final and (args.dtype or args.no_verify):
        args.usage_error(f"--dtype and --no-verify belong to --format {', '.join(FINAL_FORMATS)}")
    if args.dtype == "bfloat16" and args.format in ONNX_FORMATS:
        args.usage_error(
            "onnxruntime's CPU has no bfloat16 kernels: choose --dtype float16 or float32 for an ONNX graph"
        )
    if args.with_past and args.format not in ONNX_FORMATS:
        args.usage_error("--with-past belongs to --format onnx and onnx-quantized")
    if (args.format == "gguf") != bool(args.converter) or (args.converter_python and not args.converter):
        args.usage_error(
            "--format gguf needs --converter FILE (llama.cpp's convert_hf_to_gguf.py), and no other format takes it"
        )
    if final and args.undo:
        what = "a GGUF file" if args.format == "gguf" else "a graph"
        args.usage_error(f"{what} cannot be unfolded, so --undo belongs to the other formats: leave out --undo")
    if not args.adapter and (not final or args.dry_run or args.verify or args.quantize):
        args.usage_error("the following arguments are required: --adapter")


def _export_and_push(args: argparse.Namespace, export: Callable[[argparse.Namespace], int]) -> int:
    from oftsurgery.api.reports import read_record
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


def _export_final(args: argparse.Namespace) -> int:
    """Export the base, or a fold of the base that is removed afterwards, to a format that is no checkpoint."""
    from oftsurgery.files.staging import check_apart, scratch

    export = _gguf_export(args) if args.format == "gguf" else _onnx_export(args)
    if not args.adapter:
        export(base_of(args))
        return ExitCode.OK
    for what, given in (("base", [args.base]), ("adapter", args.adapter)):
        check_apart(Path(args.output), what, [Path(name) for name in given if Path(name).is_dir()])
    with scratch(Path(args.output), force=args.force) as place:
        folded = place / Path(args.output).name  # llama.cpp's converter names the model after the folder
        fold_into(args, folded, force=True)
        code = verify_output(args, folded) if args.verify else ExitCode.OK
        export(folded)
    return code


def _onnx_export(args: argparse.Namespace) -> Callable[[str | Path], None]:
    """The function that exports a checkpoint to ONNX."""
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

    return export


def _gguf_export(args: argparse.Namespace) -> Callable[[str | Path], None]:
    """The function that exports a checkpoint to GGUF."""
    from oftsurgery.gguf.converter import check_converter, require_gguf

    require_gguf()  # both checks come before the fold, which may take hours
    check_converter(Path(args.converter))

    def export(source: str | Path) -> None:
        report = oftsurgery.export_gguf(
            source,
            args.output,
            args.converter,
            args.dtype,
            python=args.converter_python,
            verify=not args.no_verify,
            force=args.force,
            progress=False if args.quiet or args.json else _print_stage,
        )
        _print_gguf(args, report)

    return export


def _print_gguf(args: argparse.Namespace, report: oftsurgery.GgufReport) -> None:
    if wants_words(args, report):
        print(f"wrote {args.output}: {report.file}, {size_text(report.nbytes)}, weights in {report.dtype}")
        if report.verified:
            changed = f", {len(report.changed)} of them after llama.cpp's own changes" * bool(report.changed)
            print(f"tensors that hold the checkpoint's values: {report.equal + len(report.changed)}{changed}")
        for what, named in (("not compared", report.uncompared), ("not in the file", report.left_out)):
            for name, reason in named.items():
                print(f"{what}: {printable(name)}: {reason}")
        if report.without_template is not None:
            print(f"the Modelfile has no template: {report.without_template}")


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
