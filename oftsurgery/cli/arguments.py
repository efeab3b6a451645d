"""The parts that commands share: arguments of several commands, the parser that adds the arguments, and exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

from oftsurgery.errors import without_tokens

from .config_file import ConfigError, as_yaml, words_of

FORMATS = ("same", "bnb", "fp32", "fp16", "bf16", "nf4", "fp4", "int8")
ROUNDINGS = ("preserve", "nearest", "grid", "mse")
TRAINED_ON = ("nf4-double", "nf4", "fp4-double", "fp4", "int8", "plain")
STRENGTH_MODES = ("angle", "linear", "kohya", "lycoris", "lycoris-2", "webui", "comfyui", "oftv2-node")
DTYPES = ("float32", "float16", "bfloat16")


class ExitCode(IntEnum):
    OK = 0
    CHECK_FAILED = 1  # of verify or doctor
    REFUSED = 2  # wrong usage or refused input
    ENVIRONMENT = 3  # an error of disk, network, memory or permission
    UNFORESEEN = 4  # an error that oftsurgery does not raise on purpose
    INTERRUPTED = 130


Run = Callable[[argparse.Namespace], int | None]  # None means ExitCode.OK
AddCommand = Callable[..., "Parser"]  # `add_command` without its first argument


def switch(text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": text}


ROUNDED = (
    "rounding of quantised weights: preserve keeps what the adapter changed, nearest rounds as bitsandbytes does, mse takes "
    "the scale of each 4-bit block with the least error, and grid finds nearly the same scales in half the time"
)
#: arguments of several commands
_SHARED: Mapping[str, dict[str, Any]] = {
    "base": {
        "metavar": "BASE",
        "help": "folder, Hub id (owner/name, owner/name@revision) or URL (s3://bucket/folder) of the model: safetensors, plain or bitsandbytes-quantised",
    },
    "adapter": {
        "metavar": "ADAPTER",
        "nargs": "+",
        "help": "folder, Hub id (owner/name, owner/name/subfolder, owner/name@revision) or URL of the adapter; several adapters in the live order",
    },
    "--base-revision": {
        "metavar": "REVISION",
        "help": "branch, tag or commit of a base on the Hub (default: the revision that the adapter's config names for this base, else main)",
    },
    "--adapter-subfolder": {
        "metavar": "NAME",
        "help": "subfolder of ADAPTER that holds the adapter (default: ADAPTER itself, or its only subfolder with an adapter)",
    },
    "--partial": switch(
        "fold an adapter that lacks modules which its own config targets; the record names the modules"
    ),
    "--follow-links": switch("read files that are links, wherever the links lead"),
    "output": {"metavar": "OUTPUT", "help": "folder to write, which must not exist"},
    "--format": {
        "choices": FORMATS,
        "default": "same",
        "help": "format to write, from a base in any format (default: %(default)s)",
    },
    "--quantize": {
        "choices": ("nf4", "fp4", "int8"),
        "help": "quantise a plain base first, as the trainer's loading did",
    },
    "--trained-on": {
        "metavar": "|".join((*TRAINED_ON, "FILE")),
        "help": "what the adapter was trained on, or the file of the trainer's settings that says it: a plain base is quantised so "
        "before the fold; of the models of a pipeline, unet=nf4,text_encoder=plain (default: what the files of the trainer beside the adapter "
        "say, or a quantised base that the adapter's config names)",
    },
    "--strength": {
        "type": float,
        "nargs": "+",
        "default": [1.0],
        "metavar": "S",
        "help": "how strongly the adapter is folded, for several adapters one number or one for each (default: 1)",
    },
    "--strength-mode": {
        "choices": STRENGTH_MODES,
        "default": "angle",
        "help": "what a strength other than 1 means: angle turns by a part of the angles, linear mixes weights, the others do what "
        "an image tool does (default: %(default)s)",
    },
    "--dialect": {
        "help": "tool or releases of peft that trained the adapter, where its files do not tell (peft-0.17, kohya …)"
    },
    "--adapter-file": {"metavar": "NAME", "help": "file of an image tool in the adapter's folder or repository"},
    "--bias": {
        "choices": ("kept", "rotated"),
        "help": "what the training did to biases, for files of image tools that do not tell (default: kept)",
    },
    "--constraint": {
        "type": float,
        "metavar": "C",
        "help": "LyCORIS' limit of the training, for files of LyCORIS 2.1.0 to 2.1.0.post2 (0: none)",
    },
    "--without-embeddings": {
        "action": "store_true",
        "default": None,
        "help": "leave out the embeddings of textual inversion that an image tool's file bundles with the adapter (bundle_emb)",
    },
    "--double-quant": switch("use double quantisation (bnb_4bit_use_double_quant) in the 4-bit format"),
    "--compute-dtype": {
        "choices": DTYPES,
        "help": "bnb_4bit_compute_dtype of the config (default: the dtype of the model)",
    },
    "--load-dtype": {"choices": DTYPES, "help": "dtype in which the trainer loaded the model (default: the config's)"},
    "--skip-modules": {"nargs": "+", "metavar": "NAME", "help": "modules that stay plain (llm_int8_skip_modules)"},
    "--fold-into": {
        "choices": ("quantized", "original"),
        "default": "quantized",
        "help": "rotate the quantised base, which the adapter was trained on, or the original weights "
        "(default: %(default)s)",
    },
    "--rounding": {
        "choices": (*ROUNDINGS, "calibrated"),
        "help": f"{ROUNDED}; calibrated chooses by the layers' outputs on the texts of --calibration, and is implied by that "
        "flag (default: preserve)",
    },
    "--calibration": {
        "metavar": "self|FILE",
        "help": "some hundred texts of the kind that the model is for, by which the rounding is chosen: .txt (one text a line), "
        ".jsonl or .parquet (field 'text'); self: the model writes the texts, or reads texts that are built in; this flag loads the "
        "model and runs it",
    },
    "--device-map": {
        "metavar": "auto|DEVICE",
        "help": "where the model of a calibration lies that does not run block by block, or that writes its own texts; auto: spread over "
        "all GPUs and the CPU's memory by accelerate (default: --device)",
    },
    "--max-shard-size": {
        "default": "5GB",
        "metavar": "SIZE",
        "help": "size of the largest file, as the Hub's tools write sizes (default: %(default)s)",
    },
    "--tokenizer": {
        "metavar": "adapter|base|FOLDER",
        "help": "tokenizer and chat template to write beside the weights: those of the adapter, the base or a folder "
        "(default: those of the adapter where its folder has them)",
    },
    "--component": {
        "metavar": "NAME",
        "help": "model of a pipeline of diffusers, such as unet or text_encoder_2 (default: names and shapes decide)",
    },
    "--variant": {
        "metavar": "NAME",
        "help": "variant of the weights, such as fp16 (default: the files without a variant's name, or else the only variant)",
    },
    "--undo": {
        "metavar": "FILE",
        "help": "undo record to write: `oftsurgery unfold --undo FILE` then restores exactly",
    },
    "--device": {"default": "cpu", "help": "device for the arithmetic (default: %(default)s)"},
    "--ray": {
        "nargs": "?",
        "const": "",
        "metavar": "ADDRESS",
        "help": "give the work to Ray: the cluster at ADDRESS, or without ADDRESS that of RAY_ADDRESS or a new one on this machine",
    },
    "--cpus-per-task": {
        "type": float,
        "default": 1.0,
        "metavar": "N",
        "help": "processors of each of Ray's tasks, and threads of its arithmetic (default: 1)",
    },
    "--gpus-per-task": {
        "type": float,
        "default": 0.0,
        "metavar": "N",
        "help": "GPUs of each of Ray's tasks; with --device cuda the arithmetic runs on the task's GPU (default: 0)",
    },
    "--resume": switch("continue the unfinished work of a run that was killed"),
    "--force": switch("replace the output folder, but only after everything is written"),
    "--dry-run": switch("show the plan and write nothing"),
    "--config": {
        "metavar": "FILE",
        "help": "YAML file of arguments, by their names here (base, adapter, output, format …); the command line goes before the file",
    },
    "--print-config": switch("print all arguments as a file for --config, and do nothing else"),
    "--private": {"action": "store_true", "default": None, "help": "make the new repository private"},
    "--revision": {"metavar": "BRANCH", "help": "branch to commit to, which is made if it does not exist"},
    "--commit-message": {"metavar": "TEXT", "help": "message of the commit"},
    "--create-pr": switch("open a pull request instead of committing"),
    "--token": {
        "help": "token of the Hub; '-' reads the token from the standard input (default: HF_TOKEN, or the token that "
        "`hf auth login` stored); the list of processes shows a token that is given here"
    },
    "--yes": switch("do not ask for consent to a derived name"),
}
_QUANTISING = (
    "--trained-on",
    "--quantize",
    "--double-quant",
    "--compute-dtype",
    "--load-dtype",
    "--skip-modules",
    "--fold-into",
)
#: flags that say how one adapter's files are read
ADAPTER_FLAGS = (
    "--adapter-subfolder",
    "--adapter-file",
    "--dialect",
    "--bias",
    "--constraint",
    "--without-embeddings",
)
READING_FLAGS = (*ADAPTER_FLAGS, "--follow-links")
PIPELINE_FLAGS = ("--component", "--variant")
FOLDING_FLAGS = (
    *_QUANTISING,
    "--strength",
    "--strength-mode",
    "--rounding",
    "--calibration",
    "--device-map",
    "--max-shard-size",
    "--tokenizer",
    "--base-revision",
    "--partial",
    *PIPELINE_FLAGS,
    *READING_FLAGS,
)
RUNNING_FLAGS = ("--device", "--resume", "--force")
RAY_FLAGS = ("--ray", "--cpus-per-task", "--gpus-per-task")
PUSHING_FLAGS = ("--private", "--revision", "--commit-message", "--create-pr", "--token", "--yes")


class Parser(argparse.ArgumentParser):
    """A parser of a command's arguments.

    Attributes:
        flags_between: flags may stand between positional arguments, some of which may be left out.
        unused: names that a file for ``--config`` may have, although the command has no such arguments.
    """

    flags_between = False
    unused: Collection[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if not self.flags_between:
            return super().parse_known_args(args, namespace)
        self.flags_between = False  # argparse's function for this calls this method
        try:
            return self._with_file(list(args)) if args is not None else self.parse_known_intermixed_args()
        finally:
            self.flags_between = True

    def _with_file(self, words: list[str]) -> tuple[Any, list[str]]:
        """The arguments of the command line, which go before the arguments of the file ``--config``."""
        beside = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        beside.add_argument("--config", nargs="?")
        path = beside.parse_known_args(words)[0].config
        if path is None or not any("--config" in action.option_strings for action in self._actions):
            return self.parse_known_intermixed_args(words)
        try:
            flags, positional = words_of(path, self._actions, self.unused)
        except ConfigError as error:
            self.error(str(error))
        flags.append(f"--config={path}")  # ends the values of the last flag
        in_file = [text for texts in positional.values() for text in texts]
        parsed, rest = self.parse_known_intermixed_args([*flags, *words, *in_file])
        if self._positional(parsed) != in_file:  # the command line has positional arguments too, which count
            parsed, rest = self.parse_known_intermixed_args([*flags, *words])
            for name, texts in positional.items():
                if getattr(parsed, name) is None:  # BASE, which may be left out
                    setattr(parsed, name, *texts)
        return parsed, rest

    def as_file(self, args: argparse.Namespace) -> str:
        """The parsed arguments as a file for ``--config``."""
        return as_yaml(args, self._actions)

    def _positional(self, parsed: argparse.Namespace) -> list[str]:
        values = [getattr(parsed, action.dest) for action in self._actions if not action.option_strings]
        return [
            text for value in values if value is not None for text in (value if isinstance(value, list) else [value])
        ]

    def error(self, message: str) -> NoReturn:
        super().error(without_tokens(message))  # an argument in the wrong place may be a token

    def add_shared(self, *names: str, **settings: Any) -> None:
        """Add arguments that other commands take too; ``settings`` override the shared ones."""
        for name in names:
            self.add_argument(name, **_SHARED[name] | settings)


def add_command(
    commands: Any, name: str, text: str, example: str, run: Run | None = None, aliases: Sequence[str] = ()
) -> Parser:
    """Add a command; a command without ``run`` prints its help."""
    parser: Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", aliases=aliases)
    parser.epilog = f"example: {parser.prog} {example}"
    parser.set_defaults(run=run, print_help=parser.print_help)
    parser.flags_between = run is not None  # a command without `run` has subcommands
    return parser


def add_output_flags(parser: Parser) -> None:
    """Add the last arguments of a command, which say how much the command prints and in which form."""
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", **switch("print errors only"))
    volume.add_argument("-v", "--verbose", **switch("name every weight"))
    parser.add_argument("--json", **switch("print the result as JSON on the standard output"))


def add_config_flags(parser: Parser) -> None:
    """Add the flags that read and print a command's arguments as a file."""
    parser.add_shared("--config", "--print-config")
    parser.set_defaults(as_file=parser.as_file)


def base_of(args: argparse.Namespace) -> str:
    """The base that a command was given, at ``--base-revision``, or else the base that the adapter's config names."""
    from oftsurgery.files.finding import checkpoint_place
    from oftsurgery.files.layout import is_single_file

    if is_single_file(args.base):
        return str(args.base)
    if args.base is None:
        from oftsurgery.api.arguments import loaded_adapters, named_base

        args.base = named_base(loaded_adapters(adapters_of(args)))
    return checkpoint_place(args.base, getattr(args, "base_revision", None)).spelled


def adapters_of(args: argparse.Namespace) -> list[Any]:
    """The adapters that a command was given, as its flags say to read them."""
    import oftsurgery

    given = args.adapter if isinstance(args.adapter, list) else [args.adapter]
    flags = {
        "subfolder": "adapter_subfolder",
        "filename": "adapter_file",
        "dialect": "dialect",
        "bias": "bias",
        "constraint": "constraint",
        "without_embeddings": "without_embeddings",
    }
    how: dict[str, Any] = {name: getattr(args, flag, None) for name, flag in flags.items()}
    if all(value is None for value in how.values()):
        return given
    how = {name: value for name, value in how.items() if value is not None}
    return [oftsurgery.load_adapter(adapter, **how) for adapter in given]


@contextmanager
def executor_of(args: argparse.Namespace) -> Iterator[Any]:
    """The executor that a command was told to give its work to, or None."""
    if getattr(args, "ray", None) is None:
        yield None
        return
    from oftsurgery.ray_executor import RayExecutor

    how = keywords(args, "cpus_per_task", "gpus_per_task")
    with RayExecutor(args.ray or None, **how) as executor:
        yield executor


def keywords(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The named arguments of a command, for a function that has parameters of the same names."""
    return {name: getattr(args, name) for name in names}
