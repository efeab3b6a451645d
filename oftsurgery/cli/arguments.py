"""What the commands share: arguments that several take, the parser that adds them, and exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NoReturn

from oftsurgery.errors import without_tokens

FORMATS = ("same", "fp32", "fp16", "bf16", "nf4", "fp4", "int8")
ROUNDINGS = ("preserve", "nearest", "grid", "mse")
DTYPES = ("float32", "float16", "bfloat16")


class ExitCode(IntEnum):
    OK = 0
    CHECK_FAILED = 1  # verify, doctor
    REFUSED = 2  # bad usage or refused input
    ENVIRONMENT = 3  # disk, network or permission
    INTERRUPTED = 130


Run = Callable[[argparse.Namespace], int | None]  # None: done
AddCommand = Callable[..., "Parser"]  # `add_command` without its first argument


def switch(text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": text}


ROUNDED = (
    "of quantised weights: so that what the adapter changed is kept (preserve), as bitsandbytes rounds (nearest), "
    "with the scale of each 4-bit block that errs least (mse), or nearly that in half the time (grid)"
)
#: what several commands take
_SHARED: Mapping[str, dict[str, Any]] = {
    "base": {
        "metavar": "BASE",
        "help": "folder or Hub id (owner/name, owner/name@revision) of the model: safetensors, plain or bitsandbytes-quantised",
    },
    "adapter": {
        "metavar": "ADAPTER",
        "nargs": "+",
        "help": "folder or Hub id (owner/name, owner/name/subfolder, owner/name@revision) of the adapter; several in the live order",
    },
    "--base-revision": {
        "metavar": "REVISION",
        "help": "branch, tag or commit of a base on the Hub (default: the one that the adapter's config names for it, else main)",
    },
    "--adapter-subfolder": {
        "metavar": "NAME",
        "help": "subfolder of ADAPTER that holds the adapter (default: the folder itself, or its only adapter)",
    },
    "--partial": switch("fold an adapter that lacks modules which its own config targets; the record names them"),
    "--follow-links": switch("read files that are links, wherever these lead"),
    "output": {"metavar": "OUTPUT", "help": "folder to write; must not exist"},
    "--format": {"choices": FORMATS, "default": "same", "help": "what to write (default: %(default)s)"},
    "--quantize": {
        "choices": ("nf4", "fp4", "int8"),
        "help": "quantise a plain base first, as the trainer's loading did",
    },
    "--double-quant": switch("with double quantisation (bnb_4bit_use_double_quant)"),
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
        "help": f"{ROUNDED}, or by what the layers compute on the texts of --calibration, which implies it "
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
    "--resume": switch("go on with the unfinished work of a run that was killed"),
    "--force": switch("replace the output folder, when all is written and not before"),
    "--dry-run": switch("show the plan and write nothing"),
    "--private": {"action": "store_true", "default": None, "help": "make the repository a private one"},
    "--revision": {"metavar": "BRANCH", "help": "branch to commit to, made if there is none"},
    "--commit-message": {"metavar": "TEXT", "help": "of the commit"},
    "--create-pr": switch("open a pull request instead of committing"),
    "--token": {
        "help": "'-' reads it from the standard input (default: HF_TOKEN, or what `hf auth login` stored); one that "
        "stands here is seen in the list of processes"
    },
    "--yes": switch("do not ask about a derived name"),
}
_QUANTISING = ("--quantize", "--double-quant", "--compute-dtype", "--load-dtype", "--skip-modules", "--fold-into")
READING_FLAGS = ("--adapter-subfolder", "--follow-links")
FOLDING_FLAGS = (
    *_QUANTISING,
    "--rounding",
    "--calibration",
    "--max-shard-size",
    "--base-revision",
    "--partial",
    *READING_FLAGS,
)
RUNNING_FLAGS = ("--device", "--resume", "--force")
PUSHING_FLAGS = ("--private", "--revision", "--commit-message", "--create-pr", "--token", "--yes")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(without_tokens(message))  # an argument in the wrong place may be one

    def add_shared(self, *names: str, **settings: Any) -> None:
        """Arguments that other commands take too, with ``settings`` of this one's own."""
        for name in names:
            self.add_argument(name, **_SHARED[name] | settings)


def add_command(commands: Any, name: str, text: str, example: str, run: Run | None = None) -> Parser:
    parser: Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.epilog = f"example: {parser.prog} {example}"
    parser.set_defaults(run=run)
    return parser


def add_output_flags(parser: Parser) -> None:
    """How much a command prints, and in which form: the last of its arguments."""
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", **switch("print errors only"))
    volume.add_argument("-v", "--verbose", **switch("name every weight"))
    parser.add_argument("--json", **switch("print the result as JSON on the standard output"))


def base_of(args: argparse.Namespace) -> str:
    """The base that a command was given, at ``--base-revision``."""
    from oftsurgery.files.finding import checkpoint_place

    return str(checkpoint_place(args.base, getattr(args, "base_revision", None)))


def adapters_of(args: argparse.Namespace) -> list[Any]:
    """The adapters that a command was given, in ``--adapter-subfolder``."""
    import oftsurgery

    given = args.adapter if isinstance(args.adapter, list) else [args.adapter]
    if args.adapter_subfolder is None:
        return given
    return [oftsurgery.load_adapter(adapter, subfolder=args.adapter_subfolder) for adapter in given]


def keywords(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of a command's arguments that a function takes by the same names."""
    return {name: getattr(args, name) for name in names}
