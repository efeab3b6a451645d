"""The commands ``plan``, ``fold`` and ``unfold``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import oftsurgery  # its names are imported when they are first used
from oftsurgery.errors import share

from .arguments import (
    FOLDING_FLAGS,
    PIPELINE_FLAGS,
    ROUNDED,
    ROUNDINGS,
    RUNNING_FLAGS,
    AddCommand,
    adapters_of,
    add_config_flags,
    base_of,
    keywords,
)
from .printing import facts_beside, print_facts, print_table, progress_for, size_text, tokens_text, wants_words
from .warmup import begin_compiling

_BASE = (
    "folder or Hub id (owner/name, owner/name@revision) of the model: safetensors, plain or bitsandbytes-quantised; may be left "
    "out before one adapter (default: the base that the adapter's config names)"
)


def add_commands(command: AddCommand) -> None:
    text = "show what a fold would do, and the disk and memory that the fold needs"
    plan = command("plan", text, "BASE ADAPTER --trained-on nf4-double", show_plan)
    plan.add_shared("base", nargs="?", help=_BASE)
    plan.add_shared("adapter", "--format", *FOLDING_FLAGS)
    add_config_flags(plan)
    plan.unused = ("output", "undo", "device", "resume", "force", "dry-run")  # one file serves `plan` and `fold`

    text = "fold an adapter into a checkpoint"
    fold = command("fold", text, "BASE ADAPTER OUTPUT --trained-on nf4-double --format bnb", _fold, ["merge"])
    fold.add_shared("base", nargs="?", help=_BASE)
    fold.add_shared("adapter", "output", "--format", *FOLDING_FLAGS, "--undo", *RUNNING_FLAGS, "--dry-run")
    add_config_flags(fold)

    unfold = command("unfold", "take the last fold out of a checkpoint", "FOLDED OUTPUT --base BASE", _unfold)
    unfold.add_argument("folded", metavar="FOLDED", help="checkpoint that carries a fold")
    unfold.add_shared("output")
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
    unfold.add_shared("--max-shard-size", *PIPELINE_FLAGS, "--follow-links", *RUNNING_FLAGS)


def show_plan(args: argparse.Namespace) -> None:
    from oftsurgery.api.checkpoints import plan_fold
    from oftsurgery.api.fold_settings import FoldSettings

    facts = plan_fold(base_of(args), adapters_of(args), FoldSettings(**_fold_settings(args))).to_dict()
    if not wants_words(args, facts):
        return
    for name, model in facts.get("models", {"": facts}).items():
        if name:
            print(f"{name}:")
        _print_plan(model)


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
    else:
        print_written(args, fold_into(args, args.output, force=args.force))


def fold_into(args: argparse.Namespace, output: str | Path, *, force: bool) -> oftsurgery.FoldRecord:
    begin_compiling()
    settings = _fold_settings(args) | keywords(args, "calibration", "device", "resume")
    return oftsurgery.fold_checkpoint(
        base_of(args), adapters_of(args), output, **settings, force=force, progress=progress_for(args)
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
    return settings | {"format": format_, "rounding": args.rounding or ("calibrated" if args.calibration else None)}


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
    print_written(args, oftsurgery.unfold_checkpoint(args.folded, args.output, **settings, progress=progress_for(args)))


def print_written(args: argparse.Namespace, record: oftsurgery.FoldRecord | None) -> None:
    if wants_words(args, record):
        carried = "" if record is None else f": {len(record.modules)} weights carry {len(record.adapters)} adapter(s)"
        kept = "" if record is None or record.kept is None else f", {share(record.kept, '.1%')} of the change kept"
        print(f"wrote {args.output}{carried}{kept}")
        if record is not None:
            print_facts(*facts_beside(record.to_dict()))
