""":func:`remedies` decides what helps where a fold has kept too little of its adapter. Every warning, check, page and card takes
the advice from here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from oftsurgery.dtype_names import SHORT, name_of

from .record import FoldRecord

if TYPE_CHECKING:
    from oftsurgery.formats.encoded_weight import WeightFormat

#: format → (the formats with finer steps, the smallest first, and how many times as large they are)
_FINER: Mapping[str, tuple[tuple[str, int], ...]] = {
    "nf4": (("int8", 2), ("bf16", 4)),
    "fp4": (("int8", 2), ("bf16", 4)),
    "int8": (("bf16", 2),),
    "bfloat16": (("fp32", 2),),
    "float16": (("fp32", 2),),
    **dict.fromkeys(("hqq", "compressed-tensors", "fp8"), (("bf16", 0),)),  # of many sizes
}
_QUANTISED = ("nf4", "fp4", "int8")

#: the source of an adapter that was read from a live model begins so
_LIVE = "live adapter "

#: a command's own words for BASE, ADAPTER, OUTPUT and FLAGS; None where Python runs
_on_command_line: ContextVar[Mapping[str, Sequence[str]] | None] = ContextVar("oftsurgery_command_line", default=None)


@dataclass(frozen=True)
class Case:
    """The facts of a fold that decide what helps.

    >>> case = Case("nf4", "nearest", on_disk=True)
    >>> print(remedies(case)[0])
    round so that the change is kept, which needs no data: oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT", rounding="preserve")

    Attributes:
        stored: the format of the weights that keep too little, as in ``ModuleRecord.format``.
        rounding: the rounding of these weights, as in ``ModuleRecord.rounding``.
        calibrated: whether the fold was calibrated; then these weights are those that the calibration could not improve.
        same_levels: whether the base's weights lie on the levels of ``stored``: only then can a rounding prefer the side of
            the change.
        on_disk: whether a checkpoint was folded; a model in memory otherwise.
        adapters: the number of adapters; 0 for the live adapters of the model itself.
        base_at_hand: whether the model that was folded is still there.
        settings: the arguments of the fold that the next fold needs too.
    """

    stored: str
    rounding: str
    calibrated: bool = False
    same_levels: bool = True
    on_disk: bool = False
    adapters: int = 1
    base_at_hand: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_record(
        cls, record: FoldRecord, path: str | None = None, *, base_at_hand: bool = True, on_disk: bool | None = None
    ) -> Case | None:
        """The case of the module at ``path`` in a fold's record; without a path, of the module that keeps the least, and None where
        every module keeps enough. ``on_disk`` None: a whole record of a checkpoint has the tensors' sizes.
        """
        path = next(iter(record.weak), None) if path is None else path
        if path is None:
            return None
        module, on_disk = record.modules[path], bool(record.sizes) if on_disk is None else on_disk
        live = any((a.source or "").startswith(_LIVE) for a in record.adapters)
        turned_first = record.base.get("fold_into") == "original" or "format" in record.base
        return cls(
            stored=module.format,
            rounding=module.rounding,
            calibrated=record.rounding == "calibrated",
            # where "preserve" was asked for and another rounding was taken, "preserve" does not apply
            same_levels=not turned_first and not (record.rounding == "preserve" != module.rounding),
            on_disk=on_disk,
            adapters=0 if live and not on_disk else len(record.adapters),
            base_at_hand=base_at_hand,
            settings=_settings_of(record, module.format, on_disk=on_disk),
        )

    @classmethod
    def of_weights(cls, base: WeightFormat, merged: WeightFormat, *, rotated: WeightFormat, on_disk: bool) -> Case:
        """The case of a merge without a record, from the formats of one weight: any tool may have made the merge.

        Args:
            base: the format of the base's weight.
            merged: the format of the merged weight.
            rotated: the format of the weight that was rotated: the base's, or that of a plain base that was quantised first.
        """
        settings: dict[str, Any] = {}
        if on_disk and (merged.quantised, merged.dtype) != (base.quantised, base.dtype):
            settings["format"] = merged.codec if merged.quantised else SHORT.get(name_of(merged.dtype), "same")
        if on_disk and not base.quantised:
            settings["trained_on"] = (
                rotated.codec + "-double" * (rotated.nested_blocksize > 0) if rotated.quantised else "plain"
            )
            if merged.nested_blocksize and rotated.codec != merged.codec:
                settings["double_quant"] = True
        same = rotated.quantised and rotated.codec == merged.codec and rotated.blocksize == merged.blocksize
        return cls(merged.label, "nearest", same_levels=same, on_disk=on_disk, settings=settings)


@dataclass(frozen=True)
class Remedy:
    """One thing that helps.

    Attributes:
        what: what to do.
        call: the call of Python or the command that does it; empty where nothing is to be called.
    """

    what: str
    call: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.call}" if self.call else self.what


def remedies(case: Case, *, commands: bool | None = None) -> tuple[Remedy, ...]:
    """What helps in a case, best first.

    Args:
        commands: whether to give commands in place of calls; None: where a command runs.
    """
    words = _on_command_line.get()
    commands = case.on_disk and (words is not None if commands is None else commands)
    codec, found = _codec(case.stored), []

    def again(what: str, **changed: Any) -> None:
        settings = {**case.settings, **changed}
        if settings.get("format") not in (None, "nf4", "fp4"):
            settings.pop("double_quant", None)
        call = _command(case, settings, words or {}) if commands else _call(case, settings)
        found.append(Remedy(what, call))

    if codec in _QUANTISED and case.same_levels and case.rounding not in ("preserve", "calibrated"):
        again("round so that the change is kept, which needs no data", rounding="preserve")
    if codec in _QUANTISED and not case.calibrated:
        texts: Any = "texts.jsonl" if case.on_disk else _Name("batches")
        again(
            "choose the rounding by some hundred texts of the kind that the model is for, or by texts that a language model writes "
            "itself ('self' in place of the texts)",
            calibration=texts,
        )
    for format_, larger in _FINER.get(codec, ()):
        size = f"is {larger} × as large and " if larger else ""
        again(f"store the weights in {format_}, which {size}has finer steps", format=format_)
    if case.adapters:
        given = _adapters(case)
        found.append(Remedy("keep the adapter live on the base, in Python", f"oftsurgery.wrap(model, {given})"))
    else:
        found.append(Remedy("keep the adapter live: use the model as it was before the fold"))
    return tuple(found)


def advice(case: Case) -> str:
    """The remedies of a case as one sentence for a warning."""
    first = "" if case.base_at_hand else "load the base again, because the fold has changed it in place; then "
    return f"what helps, best first: {first}" + "; ".join(
        f"({i}) {remedy}" for i, remedy in enumerate(remedies(case), start=1)
    )


@contextmanager
def for_command_line(names: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """While the body runs, the advice is given as commands, with the command's own words (see above)."""
    token = _on_command_line.set(names)
    try:
        yield
    finally:
        _on_command_line.reset(token)


# --- calls and commands -----------------------------------------------------------------------------------------------


class _Name(str):
    """The name of a variable, which has no quotation marks in a call."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _adapters(case: Case) -> str:
    names = ["ADAPTER"] if case.adapters == 1 else [f"ADAPTER-{i}" for i in range(1, case.adapters + 1)]
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"[{', '.join(quoted)}]"


def _call(case: Case, settings: Mapping[str, Any]) -> str:
    given = [] if not case.adapters else [_adapters(case)]
    arguments = ['"BASE"', *given, '"OUTPUT"'] if case.on_disk else ["model", *given]
    arguments += [f"{name}={_literal(value)}" for name, value in settings.items()]
    return f"oftsurgery.{'fold_checkpoint' if case.on_disk else 'fold'}({', '.join(arguments)})"


def _literal(value: Any) -> str:
    return repr(value) if isinstance(value, (_Name, bool)) else json.dumps(value, ensure_ascii=False)


def _command(case: Case, settings: Mapping[str, Any], words: Mapping[str, Sequence[str]]) -> str:
    several = [f"ADAPTER-{i}" for i in range(1, case.adapters + 1)] if case.adapters > 1 else ["ADAPTER"]
    parts = ["oftsurgery", "fold", *words.get("BASE", ["BASE"]), *words.get("ADAPTER", several)]
    parts += words.get("OUTPUT", ["OUTPUT"])
    for name, value in settings.items():
        parts.append("--base-revision" if name == "revision" else f"--{name.replace('_', '-')}")
        parts += [] if value is True else value if isinstance(value, list) else [str(value)]
    return shlex.join([*parts, *words.get("FLAGS", ()), *(["--force"] if "OUTPUT" in words else [])])


# --- the facts of a record --------------------------------------------------------------------------------------------


def _codec(label: str) -> str:
    """The format's name without its settings: ``"nf4"`` of ``"nf4 (double quantisation)"``."""
    return label.partition(" ")[0].removesuffix(",")


def _settings_of(record: FoldRecord, label: str, *, on_disk: bool) -> dict[str, Any]:
    """The arguments of a fold that give the base of a record's fold, and the format ``label``, once more."""
    # a model in memory is the base as it was loaded
    base = record.base if on_disk else {name: v for name, v in record.base.items() if name == "format"}
    found = dict[str, Any]()
    codec, double = _codec(label), "(double" in label
    quantize, turned = base.get("quantize"), base.get("fold_into")
    first = quantize is not None and turned != "original"  # a plain base, quantised and then rotated
    if first or turned == "original" or "format" in base or (turned and codec not in _QUANTISED):
        found["format"] = codec if codec in _QUANTISED else SHORT.get(codec, "same")
    if first or turned == "original":
        also = "-double" * (base.get("double_quant") == "true" and quantize != "int8")
        found["trained_on"] = f"{quantize}{also}" if first else "plain"
    if double and found and not (first and quantize == codec):
        found["double_quant"] = True
    if first and base.get("dtype"):
        found["load_dtype"] = base["dtype"]
    skip = _json(base.get("skip_modules"))
    if isinstance(skip, list) and skip:
        found["skip_modules"] = [str(name) for name in skip]
    if base.get("revision"):
        found["revision"] = base["revision"]
    if record.missing:
        found["partial"] = True
    return found


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None
