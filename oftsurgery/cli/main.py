"""The command line: ``oftsurgery plan|fold|unfold|extract|adapter|export|verify|doctor|report|show|push``.

Arguments are parsed before anything heavy is imported, so that ``--help`` and usage errors answer at once. Exit codes:
0 done; 1 a check failed (verify, doctor); 2 bad usage or refused input; 3 the environment (disk, network, permission);
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import oftsurgery  # its modules are imported when they are first used
from oftsurgery._version import __version__
from oftsurgery.errors import (
    CalibrationWarning,
    ConversionWarning,
    ExtractionWarning,
    OFTSurgeryError,
    RoundingWarning,
    StateError,
    UnfoldWarning,
    printable,
    without_tokens,
)
from oftsurgery.progress import Progress, shown, without_bars

if TYPE_CHECKING:
    from oftsurgery import CheckpointReport, FoldRecord, OFTAdapter, OnnxReport, PushReport

__all__ = ["export_main", "main"]

EXIT_OK, EXIT_CHECK_FAILED, EXIT_REFUSED, EXIT_ENVIRONMENT, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

FORMATS = ("same", "fp32", "fp16", "bf16", "nf4", "fp4", "int8")
ROUNDINGS = ("preserve", "nearest", "grid", "mse")
DTYPES = ("float32", "float16", "bfloat16")
ONNX_FORMATS = ("onnx", "onnx-quantized")
EXPORT_FORMATS = ("bnb", "fp32", "fp16", "bf16", *ONNX_FORMATS)


def _api() -> ModuleType:
    from oftsurgery.api import api

    return api


Run = Callable[[argparse.Namespace], int | None]  # None: done


# --- arguments --------------------------------------------------------------------------------------------------------


def _switch(text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": text}


_REPO = "owner/name, or a name of your own; without one it is named after base, adapter and format, and you are asked"
_EXPORT_EXAMPLE = "--base BASE --adapter ADAPTER --output OUTPUT --format bf16 --verify"
_ROUNDED = (
    "of quantised weights: so that what the adapter changed is kept (preserve), as bitsandbytes rounds (nearest), "
    "with the scale of each 4-bit block that errs least (mse), or nearly that in half the time (grid)"
)
#: what several commands take
_SHARED: Mapping[str, dict[str, Any]] = {
    "base": {"metavar": "BASE", "help": "folder or Hub id of the model: safetensors, plain or bitsandbytes-quantised"},
    "adapter": {
        "metavar": "ADAPTER",
        "nargs": "+",
        "help": "folder or Hub id of the adapter; several in the live order",
    },
    "output": {"metavar": "OUTPUT", "help": "folder to write; must not exist"},
    "--format": {"choices": FORMATS, "default": "same", "help": "what to write (default: %(default)s)"},
    "--quantize": {
        "choices": ("nf4", "fp4", "int8"),
        "help": "quantise a plain base first, as the trainer's loading did",
    },
    "--double-quant": _switch("with double quantisation (bnb_4bit_use_double_quant)"),
    "--compute-dtype": {"choices": DTYPES, "default": "float32", "help": "bnb_4bit_compute_dtype of the config"},
    "--load-dtype": {"choices": DTYPES, "help": "dtype in which the trainer loaded the model (default: the config's)"},
    "--skip-modules": {"nargs": "+", "metavar": "NAME", "help": "modules left unquantised (llm_int8_skip_modules)"},
    "--fold-into": {
        "choices": ("quantized", "original"),
        "default": "quantized",
        "help": "rotate the quantised base, which the adapter was trained on, or the original weights "
        "(default: %(default)s)",
    },
    "--rounding": {
        "choices": (*ROUNDINGS, "calibrated"),
        "help": f"{_ROUNDED}, or by what the layers compute on the texts of --calibration, which implies it "
        "(default: preserve)",
    },
    "--calibration": {
        "metavar": "FILE",
        "help": "texts to choose the rounding on, some hundred of the kind that the model is for: .txt (one a line), "
        ".jsonl or .parquet ('text'); loads the model and runs it",
    },
    "--max-shard-size": {
        "default": "5GB",
        "metavar": "SIZE",
        "help": "largest file, as the Hub's tools write it (default: %(default)s)",
    },
    "--undo": {"metavar": "FILE", "help": "write an undo record too: `oftsurgery unfold --undo FILE` restores exactly"},
    "--device": {"default": "cpu", "help": "where the arithmetic runs (default: %(default)s)"},
    "--resume": _switch("go on with the unfinished work of a run that was killed"),
    "--force": _switch("replace the output folder, when all is written and not before"),
    "--dry-run": _switch("show the plan and write nothing"),
    "--private": {"action": "store_true", "default": None, "help": "make the repository a private one"},
    "--revision": {"metavar": "BRANCH", "help": "branch to commit to, made if there is none"},
    "--commit-message": {"metavar": "TEXT", "help": "of the commit"},
    "--create-pr": _switch("open a pull request instead of committing"),
    "--token": {
        "help": "'-' reads it from the standard input (default: HF_TOKEN, or what `hf auth login` stored); one that "
        "stands here is seen in the list of processes",
    },
    "--yes": _switch("do not ask about a derived name"),
}
_QUANTISING = ("--quantize", "--double-quant", "--compute-dtype", "--load-dtype", "--skip-modules", "--fold-into")
_FOLDING = (*_QUANTISING, "--rounding", "--calibration", "--max-shard-size")
_RUNNING = ("--device", "--resume", "--force")
_PUSHING = ("--private", "--revision", "--commit-message", "--create-pr", "--token", "--yes")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(without_tokens(message))  # an argument in the wrong place may be one

    def add_shared(self, *names: str, **settings: Any) -> None:
        """Arguments that other commands take too, with ``settings`` of this one's own."""
        for name in names:
            self.add_argument(name, **_SHARED[name] | settings)


def _parser() -> _Parser:
    parser = _Parser(
        prog="oftsurgery",
        description="Fold orthogonal fine-tuning (OFT, OFTv2, QOFT) adapters into checkpoints on disk, and take them out again.",
        epilog="exit codes: 0 done; 1 a check failed; 2 bad usage or refused input; 3 disk, network or permission; 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"oftsurgery {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = partial(_command, commands)

    plan = command("plan", "show what a fold would do, and what it needs", "BASE ADAPTER --format bf16", _plan)
    plan.add_shared("base", "adapter", "--format", *_FOLDING)

    text = "fold an adapter into a checkpoint"
    fold = command("fold", text, "BASE ADAPTER OUTPUT --format nf4 --double-quant", _fold)
    fold.add_shared("base", "adapter", "output", "--format", *_FOLDING, "--undo", *_RUNNING, "--dry-run")

    unfold = command("unfold", "take the last fold out of a checkpoint", "FOLDED OUTPUT --base BASE", _unfold)
    unfold.add_argument("folded", metavar="FOLDED", help="checkpoint that carries a fold")
    unfold.add_shared("output")
    how = unfold.add_mutually_exclusive_group(required=True)
    how.add_argument("--base", help="checkpoint that was folded: restores exactly")
    how.add_argument("--undo", metavar="FILE", help="undo record that was written with the fold: restores exactly")
    how.add_argument(
        "--adapter",
        action="append",
        help="adapter that was folded: rotates back, and states the error; several in the live order",
    )
    unfold.add_shared("--rounding", choices=ROUNDINGS, default="preserve", help=f"{_ROUNDED} (default: %(default)s)")
    unfold.add_shared("--max-shard-size", *_RUNNING)

    text = "get an adapter back out of a checkpoint that it was folded into"
    extract = command("extract", text, "BASE FOLDED OUTPUT", _extract)
    extract.add_shared("base", help="checkpoint that was folded or fine-tuned: folder or Hub id, in any format")
    extract.add_argument("merged", metavar="MERGED", help="what became of it, in any format")
    extract.add_shared("output", help="adapter's folder to write; must not exist")
    extract.add_argument(
        "--block-size",
        type=int,
        metavar="B",
        help="of the rotations (default: detected; named, it gives the best ones for any difference)",
    )
    extract.add_shared("--force", help="replace the output folder")

    adapter = command("adapter", "show, convert and compute with adapters", "show ADAPTER")
    _adapter_commands(adapter)

    _export_arguments(command("export", "fold and export in one step", _EXPORT_EXAMPLE, _export))

    text = "check a folded checkpoint's files against their recorded hashes, and its weights against base and adapter"
    verify = command("verify", text, "FOLDED BASE ADAPTER", _verify)
    verify.add_argument("folded", metavar="FOLDED", help="checkpoint; without BASE and ADAPTER its hashes alone")
    verify.add_shared("base", nargs="?", help="folder or Hub id of the model that was folded")
    verify.add_shared("adapter", nargs="*", help="and of the adapter; several in the live order")
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="ERROR",
        help="largest relative error that passes (default: what storing the exact weight costs)",
    )

    text = "find and explain what is wrong with a checkpoint or an adapter"
    doctor = command("doctor", text, "PATH --base BASE", _doctor)
    doctor.add_argument("path", metavar="PATH", help="folder of a checkpoint or an adapter")
    doctor.add_argument("--base", help="checkpoint that was folded")
    doctor.add_argument("--adapter", help="adapter that was folded")

    text = "draw what a fold cost, and what the fine-tune moved, as one HTML page"
    report = command("report", text, "FOLDER --html report.html", _report)
    report.add_argument("source", metavar="FOLDER|RECORD", help="folder that carries a fold, or its oftsurgery.json")
    report.add_argument("--html", metavar="FILE", help="page to write (default, without --png: report.html)")
    report.add_argument("--png", metavar="DIR", help="folder to write errors.png and angles.png to, for a model card")
    report.add_argument(
        "--verified",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of `oftsurgery verify --json`, or of oftsurgery.verify as JSON, to show too",
    )
    report.add_shared("--force", help="replace files that exist")

    show = command("show", "print what is folded into a checkpoint, from its oftsurgery.json", "FOLDER", _show)
    show.add_argument("folder", metavar="FOLDER")

    text = "push an exported folder to a Hub repository, its files and no others"
    push = command("push", text, "FOLDER owner/name --dry-run", _push)
    push.add_argument("folder", metavar="FOLDER", help="that an export wrote")
    push.add_argument("repo_id", metavar="REPO_ID", nargs="?", help=_REPO)
    push.add_shared("--dry-run", help="list files, sizes and the target, and send nothing")
    push.add_shared(*_PUSHING)

    for leaf in commands.choices.values():
        if leaf is not adapter:
            _output(leaf)
    return parser


def _adapter_commands(adapter: _Parser) -> None:
    verbs = adapter.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, example: str, run: Run, nargs: str | None = None) -> _Parser:
        parser = _command(verbs, name, text, example, run)
        parser.add_shared("adapter", nargs=nargs, help="folder or Hub id")
        return parser

    def output(parser: _Parser) -> None:
        parser.add_shared("output")
        parser.add_shared("--force", help="replace the output folder")

    verb("show", "print what an adapter does to each module", "ADAPTER", _adapter_show)
    text = "write an adapter of any peft release as peft 0.21 reads it"
    convert = verb("convert", text, "ADAPTER OUTPUT", _adapter_convert)
    convert.add_argument(
        "--dialect", help="which releases' arithmetic it is of, where its files do not tell (peft-0.17 …)"
    )
    output(convert)
    scale = verb("scale", "turn by a multiple of each angle; -1 is the inverse", "ADAPTER 0.5 OUTPUT", _adapter_scale)
    scale.add_argument("alpha", metavar="ALPHA", type=float, help="factor of the angles")
    output(scale)
    text = "make one adapter of several in the live order, as peft's active adapters"
    output(verb("compose", text, "ADAPTER OTHER OUTPUT", _adapter_compose, "+"))
    example = "ADAPTER OTHER OUTPUT --weights 0.5 0.5"
    blend = verb("blend", "average several, or add them up", example, _adapter_blend, "+")
    output(blend)
    blend.add_argument("--weights", nargs="+", type=float, required=True, metavar="W", help="one for each adapter")
    for leaf in verbs.choices.values():
        _output(leaf)


def _command(commands: Any, name: str, text: str, example: str, run: Run | None = None) -> _Parser:
    parser: _Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.epilog = f"example: {parser.prog} {example}"
    parser.set_defaults(run=run)
    return parser


def _output(parser: _Parser) -> None:
    """How much a command prints, and in which form: the last of its arguments."""
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", **_switch("print errors only"))
    volume.add_argument("-v", "--verbose", **_switch("name every weight"))
    parser.add_argument("--json", **_switch("print the result as JSON on the standard output"))


def _export_arguments(parser: _Parser) -> None:
    parser.add_argument("--base", required=True, help="folder or Hub id of the model")
    parser.add_argument(
        "--adapter",
        nargs="+",
        help="folder or Hub id of the adapter; several in the live order. The ONNX formats do without, and export the base as it is",
    )
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_shared("--format", choices=EXPORT_FORMATS, default="bnb")
    parser.add_shared(*_FOLDING, "--undo", *_RUNNING, "--dry-run")
    parser.add_argument("--verify", **_switch("check every weight of the output against base and adapter"))
    onnx = parser.add_argument_group("--format onnx, onnx-quantized")
    onnx.add_argument("--dtype", choices=("float16", "float32"), help="of the graph (default: float16)")
    onnx.add_argument("--with-past", **_switch("with the key-value cache, for generation (onnxruntime-genai)"))
    onnx.add_argument("--no-verify", **_switch("do not compare the graph with torch; the record says so"))
    parser.add_argument("--push-to-hub", metavar="REPO_ID", nargs="?", const="", help=f"push the output: {_REPO}")
    parser.add_shared(*_PUSHING)
    parser.set_defaults(usage_error=parser.error)


# --- running ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The ``oftsurgery`` command; returns its exit code."""
    return _run(_parser().parse_args(argv))


def export_main(argv: Sequence[str] | None = None) -> int:
    """``python tools/export.py``: ``oftsurgery export`` under another name."""
    parser = _Parser(
        prog="tools/export.py",
        description="Fold an OFT adapter into a checkpoint and export it.",
        epilog=f"example: python tools/export.py {_EXPORT_EXAMPLE}",
    )
    parser.set_defaults(run=_export)
    _export_arguments(parser)
    _output(parser)
    return _run(parser.parse_args(argv))


def _run(args: argparse.Namespace) -> int:
    # bitsandbytes logs that an optional package of its own is missing, whenever it is imported on a CPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    run: Run = args.run
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_print_warning, args)
            for category in (CalibrationWarning, ConversionWarning, ExtractionWarning, RoundingWarning, UnfoldWarning):
                warnings.simplefilter("always", category)
            return run(args) or EXIT_OK
    except KeyboardInterrupt:
        pushed = "what is uploaded is kept, and not yet seen; push again to go on"
        folded = "what is finished is kept; go on with --resume"
        print(f"interrupted: {pushed if getattr(args, 'pushing', False) else folded}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OFTSurgeryError as error:
        print(f"oftsurgery: {type(error).__name__}: {error}", file=sys.stderr)
        # the errors of disk, network and missing packages are the system's own kinds too
        return EXIT_ENVIRONMENT if isinstance(error, (OSError, ImportError)) else EXIT_REFUSED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nobody to tell
        return EXIT_ENVIRONMENT


def _print_warning(args: argparse.Namespace, message: Warning | str, category: type[Warning], *_: object) -> None:
    if not args.quiet and category.__module__.startswith("oftsurgery"):
        print(f"{category.__name__}: {message}", file=sys.stderr)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    format_ = args.format
    if format_ in ("bnb", "onnx-quantized"):
        format_ = args.quantize or "same"
    elif format_ == "onnx":  # rotated weights that are not quantised once more
        format_ = "fp32" if args.dtype == "float32" else "fp16"
    settings = {field.name: getattr(args, field.name, None) for field in fields(_api().FoldSettings)}
    return settings | {"format": format_, "rounding": args.rounding or ("calibrated" if args.calibration else None)}


def _taken(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _plan(args: argparse.Namespace) -> None:
    settings = _api().FoldSettings(**_settings(args))
    facts = _api().plan_fold(args.base, args.adapter, settings).to_dict()
    if _in_words(args, facts):
        rows = [
            (f["module"], "×".join(map(str, f["shape"])), f["from"], f["to"], "+".join(map(str, f["block_size"])))
            for f in facts["folds"]
        ]
        _table("module  shape  from  to  block size", rows)
        print()
        _facts(
            ("folds", str(len(facts["folds"]))),
            ("other weights converted", str(facts["converts"])),
            ("tensors copied", str(facts["copies"])),
            ("replaced by the adapter's own", str(len(facts["replaces"]))),
            ("files carried over", ", ".join(facts["carried"]) or "none"),
            ("shards", str(len(facts["shards"]))),
            ("disk", _size(facts["bytes"])),
            ("largest weight in float32", _size(facts["largest_weight_bytes"])),
            limit=10_000,
        )


def _fold(args: argparse.Namespace) -> None:
    if args.dry_run:
        _plan(args)
    else:
        _say_record(args, _folded(args, args.output, force=args.force))


def _folded(args: argparse.Namespace, output: str | Path, *, force: bool) -> FoldRecord:
    settings = _settings(args) | _taken(args, "calibration", "device", "resume")
    record: FoldRecord = _api().fold_checkpoint(
        args.base, args.adapter, output, **settings, force=force, progress=_progress(args)
    )
    return record


def _export(args: argparse.Namespace) -> int:
    onnx = args.format in ONNX_FORMATS
    if not onnx and (args.dtype or args.with_past or args.no_verify):
        args.usage_error("--dtype, --with-past and --no-verify belong to --format onnx and onnx-quantized")
    if onnx and args.undo:
        args.usage_error("a graph is not unfolded: --undo belongs to the other formats")
    if not args.adapter and (not onnx or args.dry_run or args.verify or args.quantize):
        args.usage_error("the following arguments are required: --adapter")
    if args.dry_run:
        _plan(args)
        if args.push_to_hub is not None and not args.json and not args.quiet:
            print(f"pushed to: {args.push_to_hub or 'a repository named after base, adapter and format'}")
        return EXIT_OK
    export = _export_onnx if onnx else _export_checkpoint
    return export(args) if args.push_to_hub is None else _export_and_push(args, export)


def _export_and_push(args: argparse.Namespace, export: Callable[[argparse.Namespace], int]) -> int:
    # before the fold, which may take hours: whether the push can begin at all
    _prepare_push(args, asks=not args.push_to_hub)
    oftsurgery.hub.login(args.token)
    as_json = args.json  # one document for the two
    args.json, args.quiet = False, args.quiet or as_json
    code = export(args)
    if code != EXIT_OK:
        return code
    args.json = as_json
    record = _api().read_record(args.output)
    beside = {"record": record.to_dict() if record is not None else None}
    return _send(args, args.output, args.push_to_hub or None, beside)


def _export_checkpoint(args: argparse.Namespace) -> int:
    _say_record(args, _folded(args, args.output, force=args.force))
    return _checked(args, args.output) if args.verify else EXIT_OK


def _export_onnx(args: argparse.Namespace) -> int:
    from oftsurgery.files.staging import check_apart, scratch
    from oftsurgery.onnx.toolchain import require_onnx

    require_onnx()  # before a fold that may take hours

    def export(source: str | Path) -> None:
        report = _api().export_onnx(
            source,
            args.output,
            args.dtype or "float16",
            args.format == "onnx-quantized",
            args.with_past,
            verify=not args.no_verify,
            force=args.force,
            progress=False if args.quiet or args.json else _say_stage,
        )
        _say_onnx(args, report)

    if not args.adapter:
        export(args.base)
        return EXIT_OK
    for what, given in (("base", [args.base]), ("adapter", args.adapter)):
        check_apart(Path(args.output), what, [Path(name) for name in given if Path(name).is_dir()])
    with scratch(Path(args.output), force=args.force) as folded:
        _folded(args, folded, force=True)
        code = _checked(args, folded) if args.verify else EXIT_OK
        export(folded)
    return code


def _say_onnx(args: argparse.Namespace, report: OnnxReport) -> None:
    if _in_words(args, report):
        quantised = f", {len(report.quantized)} layers quantised" * bool(report.quantized or report.dequantized)
        print(f"wrote {args.output}: {_size(report.nbytes)} of weights in {report.dtype}{quantised}")
        for path, reason in report.dequantized.items():
            print(f"{printable(path)} is dequantised: {reason}")
        if report.verified:
            worst = f"{report.worst:.1e} of the largest value"
            print(f"largest difference from torch: {worst}, in {len(report.checks)} comparisons")
        if report.repacked:
            count = len(report.repacked)
            print(f"{count} weights had been repacked by a CPU forward, their scales rounded to bfloat16")
        if args.verbose:
            differences = [(c.inputs, name, e) for c in report.checks for name, e in c.errors.items()]
            _table("inputs  output  difference:.1e", differences)


def _say_stage(done: int, total: int, what: str) -> None:
    if done < total:
        print(f"[{done + 1}/{total}] {what}", file=sys.stderr)


def _prepare_push(args: argparse.Namespace, *, asks: bool) -> None:
    """What a push needs of the standard input: somebody to consent where it ``asks``, and the token where that is there."""
    if asks and not args.yes and not sys.stdin.isatty():
        raise StateError(
            "a repository's name that is derived needs your consent, and there is no terminal to ask on",
            remedy="name the repository, or consent with --yes",
        )
    if args.token == "-":  # noqa: S105 - no token
        args.token = sys.stdin.readline().strip()
    elif args.token and not args.quiet:
        print("oftsurgery: --token shows in the list of processes: use HF_TOKEN or --token -", file=sys.stderr)


def _push(args: argparse.Namespace) -> int:
    args.pushing = True
    _prepare_push(args, asks=args.repo_id is None and not args.dry_run)
    return _send(args, args.folder, args.repo_id)


def _send(args: argparse.Namespace, folder: str, repo_id: str | None, beside: Mapping[str, Any] | None = None) -> int:
    """Push, and print what was pushed: as JSON within what stands ``beside`` it."""
    args.pushing = True
    report = oftsurgery.hub.plan_push(folder, repo_id, **_taken(args, "private", "revision", "create_pr", "token"))
    if not args.quiet and not args.json:
        _say_push(report)
    if not args.dry_run:
        if report.derived and not args.yes:
            print(f"push {len(report.files)} files to {report.repo_id}? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                print("nothing was pushed", file=sys.stderr)
                return EXIT_REFUSED
        with shown(_progress(args), "push") as step, _hub_bars(args):
            report = oftsurgery.hub.send(report, **_taken(args, "commit_message", "token"), progress=step)
    said = report if beside is None else {**beside, "push": report.to_dict()}
    if _in_words(args, said) and not args.dry_run:
        print(f"pushed: {report.pull_request or report.url}")
    return EXIT_OK


def _say_push(report: PushReport) -> None:
    changed = dict.fromkeys(report.changed, "CHANGED since the export")
    _table("file  size  ", [(name, _size(size), changed.get(name, "")) for name, size in report.files.items()])
    print()
    _facts(
        ("to", report.repo_id),
        ("branch", report.revision),
        ("as", "a pull request" if report.create_pr else None),
        ("visibility", "private" if report.private else None),
        ("in all", f"{len(report.files)} files, {_size(report.nbytes)}"),
        ("no part of the export, not sent", ", ".join(report.left_out)),
    )


def _hub_bars(args: argparse.Namespace) -> AbstractContextManager[None]:
    """The client's own bars on a terminal, for nothing else shows how far a large file is."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    unwanted = args.quiet or args.json or not sys.stderr.isatty()
    return without_bars(unwanted and not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars)


def _unfold(args: argparse.Namespace) -> None:
    settings = _taken(args, "base", "adapter", "undo", "rounding", "max_shard_size", "device", "resume", "force")
    record = _api().unfold_checkpoint(args.folded, args.output, **settings, progress=_progress(args))
    _say_record(args, record)


def _extract(args: argparse.Namespace) -> None:
    def step(done: int, total: int, path: str) -> None:
        if args.verbose:
            print(f"{done} of {total}: {printable(path)}", file=sys.stderr)

    adapter = _api().extract_checkpoint(args.base, args.merged, args.block_size, progress=step)
    adapter.save(args.output, force=args.force)
    if _in_words(args, adapter):
        rows: list[_Row] = []
        for path, r in sorted(adapter.report.items(), key=lambda item: -item[1].error):
            turn = r.rotation
            error = f"{r.error:.1%}" if r.error >= 1e-3 else f"{r.error:.1e}"
            figures = (turn.angle, r.change, r.residual, r.rounding, r.explained)
            rows.append((path, turn.side, turn.block_size, *figures, error))
        head = "module  side  block size  angle:.3f  change:.2e  residual:.2e  rounding:.2e  explained:.1%  error"
        _table(head, rows)
        print(f"wrote {args.output}: {len(rows)} rotations explain {adapter.explained:.1%} of the difference")


def _adapter_show(args: argparse.Namespace) -> None:
    facts = oftsurgery.adapters.adapter.describe(oftsurgery.load_adapter(args.adapter))
    if _in_words(args, facts):
        rows = []
        for path, m in facts["modules"].items():
            blocks = f"{m['blocks']}×{m['block_size']}" + " shared" * m["shared"]
            rows.append((path, m["side"], blocks, m["map"], m["angle"], m["defect"], "oft_s" if m["scale"] else ""))
        _table("module  side  blocks  map  angle:.4f  defect:.1e  scale", rows)
        print(f"dialect: {facts['dialect']}\nbase model: {facts['base_model']}\nfingerprint: {facts['fingerprint']}")
        if facts["saved"]:
            print(f"its own tensors: {', '.join(facts['saved'])}")


def _adapter_convert(args: argparse.Namespace) -> None:
    _write_adapter(args, oftsurgery.load_adapter(args.adapter, dialect=args.dialect))


def _adapter_scale(args: argparse.Namespace) -> None:
    _write_adapter(args, oftsurgery.load_adapter(args.adapter).scaled(args.alpha))


def _adapter_compose(args: argparse.Namespace) -> None:
    _write_adapter(args, reduce(oftsurgery.OFTAdapter.compose, map(oftsurgery.load_adapter, args.adapter)))


def _adapter_blend(args: argparse.Namespace) -> None:
    if len(args.weights) != len(args.adapter):
        raise StateError(
            f"{len(args.adapter)} adapters and {len(args.weights)} weights",
            remedy="one weight for each: --weights 0.5 0.5",
        )
    parts = zip(map(oftsurgery.load_adapter, args.adapter), args.weights, strict=True)
    _write_adapter(args, oftsurgery.blend(parts))


def _write_adapter(args: argparse.Namespace, adapter: OFTAdapter) -> None:
    residuals = adapter.save(args.output, force=args.force)
    facts = {"output": args.output, "residual": max(residuals.values()), "modules": dict(residuals)}
    if _in_words(args, facts):
        print(f"wrote {args.output}: {len(residuals)} modules")


def _verify(args: argparse.Namespace) -> int:
    report = _api().verify_checkpoint(args.folded, args.base, args.adapter or None, tolerance=args.tolerance)
    if _in_words(args, report):
        _say_checked(report)
    return EXIT_OK if report.ok else EXIT_CHECK_FAILED


def _checked(args: argparse.Namespace, folded: str | Path) -> int:
    """``oftsurgery verify`` of what was folded, in words alone: the JSON is the fold's."""
    verify = {"folded": folded, "tolerance": None, "json": False, "quiet": args.quiet or args.json}
    return _verify(argparse.Namespace(**vars(args) | verify))


def _say_checked(report: CheckpointReport) -> None:
    rows: list[_Row] = []
    for path, c in report.worst_first:
        recorded = {True: "yes", False: "NO", None: None}[c.recorded]
        gain = c.gain if c.rounding else None
        passes = "ok" if report.passes(c) else "FAILED"
        rows.append((path, c.error, c.rounding, gain, c.rho, c.kept, recorded, passes))
    if rows:
        head = "module  error:.3e  plain rounding:.3e  of its square:+.0%  ρ:.2f  kept:.1%  as recorded  "
        _table(head, rows)
    for name, why in report.wrong.items():
        print(f"{printable(name)}: {printable(why)}")
    if report.config is not None:
        print(f"config.json: {printable(report.config)}")
    if report.tensors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.looked_at.items())
        print(f"looked at {len(report.tensors)} tensors: {kinds}; {len(report.wrong) or 'none'} wrong")
    wrong = [(name, state) for name, state in report.files.items() if state != "ok"]
    for name, state in wrong:
        print(f"{printable(name)}: {state.upper()} since it was recorded")
    if report.files and not wrong:
        print(f"{len(report.files)} files are as recorded")


def _doctor(args: argparse.Namespace) -> int:
    findings = oftsurgery.doctor(args.path, base=args.base, adapter=args.adapter)
    if _in_words(args, [f.to_dict() for f in findings]):
        for finding in findings:
            print(f"{finding}\n")
        print("nothing found" if not findings else f"{len(findings)} findings")
    return EXIT_CHECK_FAILED if any(f.severity == "error" for f in findings) else EXIT_OK


def _report(args: argparse.Namespace) -> None:
    from oftsurgery.reports.page import headline

    html = args.html or (None if args.png else "report.html")
    oftsurgery.report(args.source, html, png=args.png, verified=args.verified, force=args.force)
    record, _ = _api().record_of(args.source)
    if _in_words(args, {"html": html, "png": args.png, **headline(record)}):
        print("wrote " + " and ".join(filter(None, (html, args.png))))


def _show(args: argparse.Namespace) -> None:
    record = _api().read_record(args.folder)
    if _in_words(args, record) and record is not None:
        folds = (*record.earlier, record)
        for i, fold in enumerate(folds, start=1):
            print(f"fold {i} of {len(folds)}")
            _show_fold(fold)
            print()
        checks = " (oftsurgery verify checks them)" * bool(record.files)
        print(f"files with a recorded hash: {len(record.files)}{checks}")
    elif record is None and not args.json:
        print("nothing is folded in")


def _graph(fold: FoldRecord) -> str:
    facts = fold.extra.get("onnx")
    if not isinstance(facts, Mapping):
        return ""
    compared = "compared with torch" if facts.get("verified") is True else "not compared with torch"
    return f"ONNX, {facts.get('dtype')}, {compared}"


def _show_fold(fold: FoldRecord) -> None:
    for a in fold.adapters:
        _facts(
            ("adapter", a.source),
            ("  dialect", a.dialect + (f", written by peft {a.peft_version}" if a.peft_version else "")),
            ("  fingerprint", a.fingerprint),
            ("  sha256", a.sha256),
            ("  trained on", a.base_model),
        )
    _facts(
        ("base", ", ".join(f"{key} {value}" for key, value in fold.base.items() if value is not None)),
        ("rounding", fold.rounding),
        ("kept of what the adapter changed", "" if fold.kept is None else f"{fold.kept:.1%}"),
        ("replaced by the adapter's own", ", ".join(fold.saved)),
        ("versions", ", ".join(f"{name} {v}" for name, v in fold.versions.items())),
        ("graph", _graph(fold)),
        ("written by a newer version, not understood", ", ".join(n for n in fold.extra if n != "onnx")),
    )
    rows: list[_Row] = []
    for path, m in sorted(fold.modules.items(), key=lambda item: -item[1].error):
        sizes = "+".join(map(str, m.block_size))
        rows.append(
            (path, m.format, m.side, sizes, m.error, m.defect, m.angle, m.rounding, m.nearest, m.rho, m.effect_kept)
        )
    head = "module  format  side  block size  error:.3e  defect:.1e  angle:.3f  rounding  plain:.3e  ρ:.2f  kept:.1%"
    _table(head, rows)


# --- printing ---------------------------------------------------------------------------------------------------------


def _in_words(args: argparse.Namespace, result: Any) -> bool:
    """Whether to tell of a result in words; ``--json`` prints it here."""
    if args.json:
        print(json.dumps(result.to_dict() if hasattr(result, "to_dict") else result, indent=2))
    return not args.json and not args.quiet


def _say_record(args: argparse.Namespace, record: FoldRecord | None) -> None:
    if _in_words(args, record):
        carried = "" if record is None else f": {len(record.modules)} weights carry {len(record.adapters)} adapter(s)"
        kept = "" if record is None or record.kept is None else f", {record.kept:.1%} of the change kept"
        print(f"wrote {args.output}{carried}{kept}")


def _facts(*rows: tuple[str, str | None], limit: int = 400) -> None:
    """What is known, a line each."""
    for label, value in rows:
        if value:
            print(f"{label}: {printable(value, limit)}")


_Row = Sequence[str | float | None]


def _table(head: str, rows: Sequence[_Row]) -> None:
    """Columns, whose names stand two spaces apart in ``head``, each with the format of its figures."""
    names, _, formats = zip(*(column.partition(":") for column in head.split("  ")), strict=True)
    cells = [names, *([_cell(*pair) for pair in zip(row, formats, strict=True)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: str | float | None, spec: str) -> str:
    if isinstance(value, str):
        return printable(value)
    return "-" if value is None else format(value, spec)


def _size(nbytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes = nbytes / 1000  # type: ignore[assignment]
    return f"{nbytes:.2f} GB"


_EVERY_S = 10.0  # between two lines of progress


def _progress(args: argparse.Namespace) -> bool | Progress:
    """A bar in bytes on a terminal, a plain line now and then elsewhere, every weight with ``-v``, nothing with ``-q``
    or ``--json``.
    """
    last = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal last
        if args.verbose:
            print(f"{_size(done)} of {_size(total)}: {printable(what)}", file=sys.stderr)
        elif time.monotonic() - last >= _EVERY_S or done == total:
            last = time.monotonic()
            part = f"{_size(done)} of {_size(total)} ({done / total:.0%})" if total else "nothing to read"
            print(part, file=sys.stderr)

    if args.quiet or args.json:
        return False
    return line if args.verbose or not sys.stderr.isatty() else True
