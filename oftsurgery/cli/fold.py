"""The commands ``plan``, ``fold`` and ``unfold``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import oftsurgery  # its names are imported when they are first used
from oftsurgery.errors import StateError, printable, share

from .arguments import (
    ADAPTER_FLAGS,
    FOLDING_FLAGS,
    PIPELINE_FLAGS,
    RAY_FLAGS,
    ROUNDED,
    ROUNDINGS,
    RUNNING_FLAGS,
    AddCommand,
    ExitCode,
    adapters_of,
    add_config_flags,
    base_of,
    executor_of,
    keywords,
    switch,
)
from .printing import facts_beside, print_facts, print_table, progress_for, size_text, tokens_text, wants_words
from .warmup import begin_compiling

_BASE = (
    "folder, Hub id (owner/name, owner/name@revision) or URL (s3://bucket/folder) of the model: safetensors, plain or "
    "bitsandbytes-quantised; may be left out before one adapter (default: the base that the adapter's config names)"
)


_OUTPUT = "folder to write, or its URL (s3://bucket/folder), which must not exist"


#: flags of a fold that belong to one adapter, and what only a fold of one adapter does
_NOT_OF_MANY = (
    "--rounding",
    "--calibration",
    "--device-map",
    "--component",
    "--base-revision",
    *ADAPTER_FLAGS,
)


def add_commands(command: AddCommand) -> None:
    text = "show what a fold would do, and the disk and memory that the fold needs"
    plan = command("plan", text, "BASE ADAPTER --trained-on nf4-double", show_plan)
    plan.add_shared("base", nargs="?", help=_BASE)
    plan.add_shared("adapter", "--format", *FOLDING_FLAGS)
    plan.add_argument(
        "--array", type=int, metavar="N", help="show what each of N slices would write (fold --slice i/N)"
    )
    add_config_flags(plan)
    plan.unused = (
        "output",
        "undo",
        "device",
        "resume",
        "force",
        "dry-run",
        "slice",
        "finish",
    )  # one file serves `plan` and `fold`

    text = "fold an adapter into a checkpoint"
    fold = command("fold", text, "BASE ADAPTER OUTPUT --trained-on nf4-double --format bnb", _fold, ["merge"])
    fold.add_shared("base", nargs="?", help=_BASE)
    fold.add_shared("adapter")
    fold.add_shared("output", help=_OUTPUT)
    fold.add_shared("--format", *FOLDING_FLAGS, "--undo", *RUNNING_FLAGS, *RAY_FLAGS, "--dry-run")
    steps = fold.add_mutually_exclusive_group()
    steps.add_argument(
        "--slice",
        metavar="i/N",
        help="write slice i of N (from 1) and publish nothing: a job of an array of jobs; a slice that was killed is run again",
    )
    steps.add_argument("--finish", **switch("complete and publish the output when all slices are written"))
    add_config_flags(fold)

    text = "fold many adapters into one checkpoint, each to a folder of its own: each weight is read once"
    many = command("fold-many", text, "BASE --adapters LIST.yaml --trained-on nf4-double", _fold_many)
    many.add_shared("base", help=_BASE.partition(";")[0])
    many.add_argument(
        "--adapters",
        metavar="FILE",
        required=True,
        help="YAML file with a list of folds, each with `adapter` (a folder or Hub id, or a list of them), `output`, and any of the "
        "other arguments by their names here that differ (undo, strength, format …)",
    )
    flags = [flag for flag in FOLDING_FLAGS if flag not in _NOT_OF_MANY]
    many.add_shared("--rounding", choices=ROUNDINGS, help=f"{ROUNDED} (default: preserve)")
    many.add_shared("--format", *flags, *RUNNING_FLAGS)

    unfold = command("unfold", "take the last fold out of a checkpoint", "FOLDED OUTPUT --base BASE", _unfold)
    unfold.add_argument("folded", metavar="FOLDED", help="checkpoint that carries a fold")
    unfold.add_shared("output", help=_OUTPUT)
    how = unfold.add_mutually_exclusive_group(required=True)
    how.add_argument("--base", help="checkpoint that was folded; the unfold restores its bytes exactly")
    how.add_argument(
        "--undo", metavar="FILE", help="undo record that the fold wrote; the unfold restores the bytes exactly"
    )
    how.add_argument(
        "--adapter",
        action="append",
        help="adapter that was folded; the unfold rotates back and states the error; several adapters in the live order",
    )
    unfold.add_shared("--rounding", choices=ROUNDINGS, default="preserve", help=f"{ROUNDED} (default: %(default)s)")
    unfold.add_shared("--max-shard-size", *PIPELINE_FLAGS, "--follow-links", *RUNNING_FLAGS, *RAY_FLAGS)


def show_plan(args: argparse.Namespace) -> None:
    from oftsurgery.api.checkpoints import plan_fold
    from oftsurgery.api.fold_settings import FoldSettings

    if getattr(args, "array", None) is not None:
        _show_slices(args)
        return
    facts = plan_fold(base_of(args), adapters_of(args), FoldSettings(**_fold_settings(args))).to_dict()
    if not wants_words(args, facts):
        return
    for name, model in facts.get("models", {"": facts}).items():
        if name:
            print(f"{name}:")
        _print_plan(model)


def _show_slices(args: argparse.Namespace) -> None:
    from oftsurgery.api.fold_settings import FoldSettings
    from oftsurgery.api.slices import plan_slices

    found = plan_slices(base_of(args), adapters_of(args), args.array, FoldSettings(**_fold_settings(args)))
    if wants_words(args, found):
        rows = [(one["slice"], str(one["parts"]), size_text(one["bytes"]), str(len(one["files"]))) for one in found]
        print_table("slice  parts  reads  files", rows)


def _print_plan(facts: Mapping[str, Any]) -> None:
    rows = [
        (f["module"], "×".join(map(str, f["shape"])), f["from"], f["to"], "+".join(map(str, f["block_size"])))
        for f in facts["folds"]
    ]
    print_table("module  shape  from  to  block size", rows)
    print()
    print_facts(
        ("base", facts["base"]),
        ("trained on", _trained_on(facts["trained_on"])),
        ("rotates", f"the {facts['fold_into'] if facts['stored_as'] is None else 'dequantised'} weights"),
        ("folds", str(len(facts["folds"]))),
        ("other weights converted", str(facts["converts"])),
        ("tensors copied", str(facts["copies"])),
        ("replaced by the adapter's own", str(len(facts["replaces"]))),
        ("added by the adapter", ", ".join(facts["adds"])),
        ("missing in the adapter", ", ".join(facts["missing"])),
        ("tokens", tokens_text(facts["vocabulary"])),
        ("files carried over", ", ".join(facts["carried"]) or "none"),
        *facts_beside(facts),
        ("shards", str(len(facts["shards"]))),
        ("disk", size_text(facts["bytes"])),
        ("largest weight in float32", size_text(facts["largest_weight_bytes"])),
        ("memory", f"up to about {size_text(facts['memory_bytes'])}, without a calibration"),
        ("time", f"about {facts['seconds']:.0f} s on two CPU cores, without imports and a calibration"),
        limit=10_000,
    )


def _trained_on(facts: Mapping[str, str] | None) -> str | None:
    if facts is None:
        return None
    return f"{facts['name']} ({'--trained-on' if facts['source'] == 'trained_on' else facts['source']})"


def _fold(args: argparse.Namespace) -> None:
    if args.dry_run:
        show_plan(args)
    elif args.slice is not None or args.finish:
        _fold_in_slices(args)
    else:
        print_written(args, fold_into(args, args.output, force=args.force))


def _fold_in_slices(args: argparse.Namespace) -> None:
    from oftsurgery.api.fold_settings import FoldSettings
    from oftsurgery.api.slices import finish_fold, fold_slice, slice_of

    how: dict[str, Any] = {"force": args.force, "progress": progress_for(args)}
    if args.slice is not None:
        slice_ = slice_of(args.slice)
        begin_compiling()
        what = base_of(args), adapters_of(args), args.output
        parts = fold_slice(*what, slice_, FoldSettings(**_fold_settings(args)), device=args.device, **how)
        if wants_words(args, {"slice": args.slice, "parts": parts}):
            print(f"wrote slice {args.slice} of {args.output}: {parts} parts")
        return
    what = base_of(args), adapters_of(args), args.output
    print_written(args, finish_fold(*what, FoldSettings(**_fold_settings(args)), **how))


def _fold_many(args: argparse.Namespace) -> int:
    begin_compiling()
    settings = {name: value for name, value in _fold_settings(args).items() if name not in ("undo", "component")}
    folds = read_list(args.adapters)
    how = keywords(args, "device", "resume", "force", "follow_links")
    ended = oftsurgery.fold_many(args.base, folds, **settings, **how, progress=progress_for(args))
    errors = {output: error for output, error in ended.items() if isinstance(error, Exception)}
    facts = {
        output: {"error": getattr(end, "facts", {"message": str(end)}), "kind": type(end).__name__}
        if isinstance(end, Exception)
        else end.to_dict()
        for output, end in ended.items()
    }
    if wants_words(args, facts):
        for output, end in ended.items():
            if isinstance(end, Exception):
                print(f"FAILED {output}: {type(end).__name__}: {end}")
            else:
                print(
                    f"wrote {output}: {len(end.modules)} weights"
                    + (f", {share(end.kept, '.1%')} kept" if end.kept is not None else "")
                )
    codes = [ExitCode.ENVIRONMENT if isinstance(error, OSError) else ExitCode.REFUSED for error in errors.values()]
    return max(codes, default=ExitCode.OK)


def read_list(path: str) -> list[dict[str, Any]]:
    """The folds that a YAML file lists.

    Raises:
        StateError: the file is no list of mappings.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StateError(
            f"the list cannot be read: {printable(error)}", path=path, remedy="give a YAML file"
        ) from error
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        message = "the file is no list of folds"
        raise StateError(
            message, path=path, remedy="give a list: `- {adapter: ADAPTER, output: OUTPUT}`, one line for each fold"
        )
    return [{str(name).replace("-", "_"): value for name, value in one.items()} for one in found]


def fold_into(args: argparse.Namespace, output: str | Path, *, force: bool) -> oftsurgery.FoldRecord:
    begin_compiling()
    settings = _fold_settings(args) | keywords(args, "calibration", "device_map", "device", "resume")
    with executor_of(args) as executor:
        return oftsurgery.fold_checkpoint(
            base_of(args),
            adapters_of(args),
            output,
            **settings,
            executor=executor,
            force=force,
            progress=progress_for(args),
        )


def _fold_settings(args: argparse.Namespace) -> dict[str, Any]:
    from oftsurgery.api.fold_settings import FoldSettings
    from oftsurgery.dtypes import FORMAT_OF, NAMED

    format_ = args.format
    if format_ == "onnx-quantized":
        format_ = args.quantize or "bnb"  # the format that the adapter was trained on
    elif format_ in ("onnx", "gguf"):  # the rotated weights stay plain
        default = "float16" if format_ == "onnx" else "bfloat16"
        format_ = FORMAT_OF[NAMED[args.dtype or default]]
    names = [field.name for field in fields(FoldSettings) if field.name != "revision"]  # `base_of` adds the revision
    settings = {name: getattr(args, name, None) for name in names}
    return settings | {
        "format": format_,
        "rounding": args.rounding or ("calibrated" if getattr(args, "calibration", None) else None),
    }


def _unfold(args: argparse.Namespace) -> None:
    names = (
        "base",
        "adapter",
        "undo",
        "rounding",
        "max_shard_size",
        "component",
        "variant",
        "device",
        "resume",
        "force",
    )
    settings = keywords(args, *names)
    with executor_of(args) as executor:
        record = oftsurgery.unfold_checkpoint(
            args.folded, args.output, **settings, executor=executor, progress=progress_for(args)
        )
    print_written(args, record)


def print_written(args: argparse.Namespace, record: oftsurgery.FoldRecord | None) -> None:
    if wants_words(args, record):
        carried = "" if record is None else f": {len(record.modules)} weights carry {len(record.adapters)} adapter(s)"
        kept = "" if record is None or record.kept is None else f", {share(record.kept, '.1%')} of the change kept"
        print(f"wrote {args.output}{carried}{kept}")
        if record is not None:
            print_facts(*facts_beside(record.to_dict()))
