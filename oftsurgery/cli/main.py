"""The command line: ``oftsurgery plan|fold|unfold|extract|adapter|export|verify|doctor|report|show|push``.

The arguments are parsed before any heavy import, so that ``--help`` and usage errors answer at once: a command imports its
modules when the command runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import shtab

from oftsurgery._version import __version__
from oftsurgery.errors import (
    CalibrationWarning,
    ConversionWarning,
    ExtractionWarning,
    OFTSurgeryError,
    RoundingWarning,
    SourceWarning,
    UnfoldWarning,
    without_tokens,
)
from oftsurgery.files.links import links_followed
from oftsurgery.notices import notices_to

from . import adapters, export, fold, show, verify
from .arguments import ExitCode, Parser, Run, add_command, add_output_flags
from .printing import hub_bars, with_flags


def command_parser() -> Parser:
    parser = Parser(
        prog="oftsurgery",
        description="Fold orthogonal fine-tuning (OFT, OFTv2, QOFT) adapters into checkpoints on disk, and take them out again.",
        epilog="exit codes: 0 success; 1 a check failed; 2 wrong usage or refused input; 3 an error of disk, network, memory or permission; "
        "4 a fault of oftsurgery; 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"oftsurgery {__version__}")
    parser.set_defaults(run=None, print_help=parser.print_help)
    shtab.add_argument_to(parser, "--print-completion", help="print the completion script of a shell")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = partial(add_command, commands)
    fold.add_commands(command)
    adapters.add_commands(command)
    export.add_export(command)
    verify.add_commands(command)
    show.add_commands(command)
    export.add_push(command)
    for leaf in dict.fromkeys(commands.choices.values()):  # an alias names its command's parser again
        if leaf.get_default("run") is not None:  # `adapter` has its own subcommands
            add_output_flags(leaf)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``oftsurgery`` command and return its exit code."""
    return _run(command_parser().parse_args(argv))


def export_main(argv: Sequence[str] | None = None) -> int:
    """Run ``oftsurgery export`` as ``python tools/export.py``."""
    parser = Parser(
        prog="tools/export.py",
        description="Fold an OFT adapter into a checkpoint and export it.",
        epilog=f"example: python tools/export.py {export.EXPORT_EXAMPLE}",
    )
    export.add_export_arguments(parser)
    add_output_flags(parser)
    return _run(parser.parse_args(argv))


# kinds of warnings that are printed each time
_ALWAYS = (CalibrationWarning, ConversionWarning, ExtractionWarning, RoundingWarning, SourceWarning, UnfoldWarning)


def _run(args: argparse.Namespace) -> int:
    # bitsandbytes logs at its import on a CPU that one of its optional packages is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    run: Run | None = args.run
    if run is None:
        args.print_help()
        return ExitCode.OK
    if getattr(args, "print_config", False):
        print(args.as_file(args), end="")
        return ExitCode.OK
    as_json = getattr(args, "json", False)  # `export --push-to-hub` sets the argument aside while it folds
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_print_warning, args)
            for category in _ALWAYS:
                warnings.simplefilter("always", category)
            from oftsurgery.records.advice import for_command_line  # heavy, as all that the commands import

            follows = links_followed(getattr(args, "follow_links", False))
            quiet = getattr(args, "quiet", False) or as_json
            notices = nullcontext() if quiet else notices_to(partial(print, file=sys.stderr))
            with follows, hub_bars(args), notices, for_command_line(_words_of(args)):
                return run(args) or ExitCode.OK
    except KeyboardInterrupt:
        print(f"interrupted: {_what_is_kept(args)}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has gone, so nobody can read an error
        return ExitCode.ENVIRONMENT
    except Exception as error:
        return _print_error(error, as_json=as_json)


def _words_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command's own words for BASE, ADAPTER, OUTPUT and the flags that the fold's record does not have, which advice repeats."""
    folds = getattr(args, "command", None) in ("fold", "merge")
    given = {name.upper(): getattr(args, name, None) for name in ("base", "adapter", *(["output"] if folds else []))}
    flags = {name: getattr(args, name, None) for name in ("adapter_subfolder", "compute_dtype", "tokenizer")}
    more = [word for name, value in flags.items() if value for word in (f"--{name.replace('_', '-')}", value)]
    given["FLAGS"] = more + ["--follow-links"] * bool(getattr(args, "follow_links", False))
    words = {name: [value] if isinstance(value, str) else value for name, value in given.items() if value}
    return {"BASE": [], **words} if folds else words  # a fold's BASE may be left out


# errors of disk, network and missing packages are also of these kinds
_ENVIRONMENT = (OSError, ImportError, MemoryError)


def _what_is_kept(args: argparse.Namespace) -> str:
    """What is there after an interruption."""
    if getattr(args, "pushing", False):
        return "the uploaded files are kept, and the repository does not show them yet; push again to continue"
    resumes = (
        hasattr(args, "resume")
        and not getattr(args, "dry_run", False)
        and getattr(args, "format", None) not in export.FINAL_FORMATS
    )
    return "the finished work is kept; continue with --resume" if resumes else "nothing was written"


def _print_error(error: Exception, *, as_json: bool) -> ExitCode:
    """Print an error, ``as_json`` as an object on the standard output too; its exit code."""
    ours = isinstance(error, OFTSurgeryError)
    code = ExitCode.REFUSED if ours else ExitCode.UNFORESEEN
    if isinstance(error, _ENVIRONMENT):
        code = ExitCode.ENVIRONMENT
    said = with_flags(str(error)) if ours else without_tokens(f"{error}")
    if code == ExitCode.UNFORESEEN:
        print(without_tokens("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        said += " Remedy: this error is a fault of oftsurgery: report the lines above, with the command and `oftsurgery --version`"
    print(f"oftsurgery: {type(error).__name__}: {said}", file=sys.stderr)
    if as_json:
        facts = error.facts if isinstance(error, OFTSurgeryError) else {"message": said}
        facts = {name: with_flags(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
        said = json.dumps({"error": {"type": type(error).__name__, **facts, "exit_code": code}}, indent=2)
        print(without_tokens(said))
    return code


def _print_warning(args: argparse.Namespace, message: Warning | str, category: type[Warning], *_: object) -> None:
    if not args.quiet and category.__module__.startswith("oftsurgery"):
        print(with_flags(f"{category.__name__}: {message}"), file=sys.stderr)
