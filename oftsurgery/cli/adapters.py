"""The commands ``extract`` and ``adapter`` show, convert, combine and extract adapters."""

from __future__ import annotations

import argparse
import sys
from functools import reduce

import oftsurgery  # its names are imported when they are first used
from oftsurgery.errors import StateError, printable, share

from .arguments import (
    PIPELINE_FLAGS,
    READING_FLAGS,
    AddCommand,
    Parser,
    Run,
    adapters_of,
    add_command,
    add_output_flags,
    keywords,
)
from .printing import Row, print_table, wants_words


def add_commands(command: AddCommand) -> None:
    text = "get an adapter back out of a checkpoint that it was folded into"
    extract = command("extract", text, "BASE FOLDED OUTPUT", _extract)
    extract.add_shared("base", help="checkpoint that was folded or fine-tuned: folder or Hub id, in any format")
    extract.add_argument("merged", metavar="MERGED", help="folded or fine-tuned checkpoint, in any format")
    extract.add_shared("output", help="adapter's folder to write, which must not exist")
    extract.add_argument(
        "--block-size",
        type=int,
        metavar="B",
        help="block size of the rotations (default: detected); with a size, extract gives the best rotations for any difference",
    )
    extract.add_argument(
        "--side",
        choices=("input", "output"),
        help="features of the layers that are rotated (default: the inputs, or else the outputs where rotations of these predict the "
        "difference); rotations of outputs are written as a file of LyCORIS, OUTPUT.safetensors",
    )
    extract.add_shared(*PIPELINE_FLAGS, "--follow-links")
    extract.add_shared("--force", help="replace the output folder")

    _add_adapter_commands(command("adapter", "show, convert and compute with adapters", "show ADAPTER"))


def _add_adapter_commands(adapter: Parser) -> None:
    verbs = adapter.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, text: str, example: str, run: Run, nargs: str | None = None) -> Parser:
        parser = add_command(verbs, name, text, example, run)
        parser.add_shared("adapter", nargs=nargs, help="folder or Hub id of the adapter")
        parser.add_shared(*READING_FLAGS)
        return parser

    def output(parser: Parser) -> None:
        parser.add_shared("output")
        parser.add_argument(
            "--to",
            choices=("peft", "lycoris", "comfyui"),
            default="peft",
            help="form to write: peft's folder; a file that LyCORIS reads; or a file from which ComfyUI and the web UI compute at "
            "strength 1 what the trainer computed (default: %(default)s)",
        )
        parser.add_argument(
            "--base",
            metavar="BASE",
            help="model that the adapter is for, where the adapter's files do not tell all that peft's form needs: folder, Hub id, "
            "pipeline or single file",
        )
        parser.add_shared(*PIPELINE_FLAGS)
        parser.add_shared("--force", help="replace the output folder")

    verb("show", "print what an adapter does to each module", "ADAPTER", _adapter_show)
    text = "write an adapter as peft 0.21 reads it, or as LyCORIS or ComfyUI read it"
    convert = verb("convert", text, "ADAPTER OUTPUT", _adapter_convert)
    output(convert)
    text = "multiply each angle of an adapter by a factor; -1 gives the inverse"
    scale = verb("scale", text, "ADAPTER 0.5 OUTPUT", _adapter_scale)
    scale.add_argument("alpha", metavar="ALPHA", type=float, help="factor of the angles")
    output(scale)
    text = "make one adapter of several in the live order, as peft's active adapters"
    output(verb("compose", text, "ADAPTER OTHER OUTPUT", _adapter_compose, "+"))
    example = "ADAPTER OTHER OUTPUT --weights 0.5 0.5"
    blend = verb("blend", "average several adapters, or add them up", example, _adapter_blend, "+")
    output(blend)
    blend.add_argument("--weights", nargs="+", type=float, required=True, metavar="W", help="a weight for each adapter")
    for leaf in verbs.choices.values():
        add_output_flags(leaf)


def _extract(args: argparse.Namespace) -> None:
    def step(done: int, total: int, path: str) -> None:
        if args.verbose:
            print(f"{done} of {total}: {printable(path)}", file=sys.stderr)

    settings = keywords(args, "side", "component", "variant")
    if args.side is not None:
        _check_form(args.side, args.output)
    adapter = oftsurgery.extract_checkpoint(args.base, args.merged, args.block_size, **settings, progress=step)
    if adapter.dialect == "peft-0.13":
        _check_form("output", args.output)
        adapter.save_for("lycoris", args.output, force=args.force)
    else:
        _check_form("input", args.output)
        adapter.save(args.output, force=args.force)
    if wants_words(args, adapter):
        rows: list[Row] = []
        for path, r in sorted(adapter.report.items(), key=lambda item: -item[1].error):
            turn = r.rotation
            error = f"{r.error:.1%}" if r.error >= 1e-3 else f"{r.error:.1e}"
            figures = (turn.angle, r.change, r.residual, r.rounding, r.explained)
            rows.append((path, turn.side, turn.block_size, *figures, error))
        head = "module  side  block size  angle:.3f  change:.2e  residual:.2e  rounding:.2e  explained:.1%  error"
        print_table(head, rows)
        print(f"wrote {args.output}: {len(rows)} rotations explain {share(adapter.explained, '.1%')} of the difference")


def _check_form(side: str, output: str) -> None:
    """Refuse a folder for rotations of outputs, and a file's name for the folder of peft."""
    if side == "output" and not output.endswith(".safetensors"):
        message = "the rotations are of the outputs, for which peft has no form, and are written as a file of LyCORIS"
        raise StateError(message, path=output, remedy="name a file: OUTPUT.safetensors")
    if side != "output" and output.endswith(".safetensors"):
        message = "the rotations are of the inputs, and are written as a folder of peft"
        raise StateError(message, path=output, remedy="name a folder; or --side output, for rotations of outputs")


def _adapter_show(args: argparse.Namespace) -> None:
    from oftsurgery.adapters.adapter import describe

    facts = describe(_loaded(args)[0])
    if wants_words(args, facts):
        rows = []
        for path, m in facts["modules"].items():
            count = f"{m['blocks']}×" if "blocks" in m else f"{m['factors']} factors, " if "factors" in m else ""
            blocks = f"{count}{m['block_size']}" + " shared" * m.get("shared", False)
            rows.append(
                (path, m["side"], blocks, m["map"], m["angle"], m["defect"], "scaled" if m.get("scale") else "")
            )
        print_table("module  side  blocks  map  angle:.4f  defect:.1e  scale", rows)
        print(f"dialect: {facts['dialect']}\nbase model: {facts['base_model']}\nfingerprint: {facts['fingerprint']}")
        if facts["saved"]:
            print(f"tensors of the adapter's own: {', '.join(facts['saved'])}")
        if facts["left_out"]:
            print(f"embeddings that were left out: {', '.join(map(printable, facts['left_out']))}")


def _adapter_convert(args: argparse.Namespace) -> None:
    _write_adapter(args, _loaded(args)[0])


def _adapter_scale(args: argparse.Namespace) -> None:
    _write_adapter(args, _loaded(args)[0].scaled(args.alpha))


def _adapter_compose(args: argparse.Namespace) -> None:
    _write_adapter(args, reduce(oftsurgery.OFTAdapter.compose, _loaded(args)))


def _adapter_blend(args: argparse.Namespace) -> None:
    if len(args.weights) != len(args.adapter):
        message = f"{len(args.adapter)} adapters and {len(args.weights)} weights were given"
        raise StateError(message, remedy="give one weight for each adapter: --weights 0.5 0.5")
    _write_adapter(args, oftsurgery.blend(zip(_loaded(args), args.weights, strict=True)))


def _loaded(args: argparse.Namespace) -> list[oftsurgery.OFTAdapter]:
    """The adapters that a command was given."""
    from oftsurgery.api.arguments import loaded_adapters

    if getattr(args, "base", None) is not None and args.to != "peft":
        message = f"a base was given, but the form {args.to} needs none"
        raise StateError(message, remedy="leave out --base, or choose peft's form: --to peft")
    found = loaded_adapters(adapters_of(args))
    if getattr(args, "base", None) is None:
        if any(getattr(args, name, None) is not None for name in ("component", "variant")):
            message = "a component or a variant was named, but no base"
            raise StateError(message, remedy="name the base too: --base BASE")
        return found
    how = keywords(args, *(flag.removeprefix("--") for flag in PIPELINE_FLAGS))
    return [oftsurgery.as_peft(adapter, args.base, **how) for adapter in found]


def _write_adapter(args: argparse.Namespace, adapter: oftsurgery.OFTAdapter) -> None:
    if args.to != "peft":
        adapter.save_for(args.to, args.output, force=args.force)
        written: dict[str, object] = {"output": args.output, "form": args.to, "modules": len(adapter.modules)}
        if wants_words(args, written):
            print(f"wrote {args.output}: {len(adapter.modules)} modules, for {args.to}")
        return
    residuals = adapter.save(args.output, force=args.force)
    facts = {"output": args.output, "residual": max(residuals.values()), "modules": dict(residuals)}
    if wants_words(args, facts):
        print(f"wrote {args.output}: {len(residuals)} modules")
