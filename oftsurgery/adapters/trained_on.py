"""Find what an adapter was trained on, in the files that trainers leave beside it: no pickle is read, and no code runs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from oftsurgery.errors import CheckpointError, OFTSurgeryError, StateError, printable
from oftsurgery.files.finding import checkpoint_place, hub_id_of
from oftsurgery.files.layout import CONFIG
from oftsurgery.files.reading import inside
from oftsurgery.files.remote import is_url

#: ``{name: (format, double quantisation)}`` of what an adapter can be trained on; the format None is a plain base
TRAINED_ON: Mapping[str, tuple[str | None, bool]] = {
    "nf4-double": ("nf4", True),
    "nf4": ("nf4", False),
    "fp4-double": ("fp4", True),
    "fp4": ("fp4", False),
    "int8": ("int8", False),
    "plain": (None, False),
}

_ARGUMENT = "trained_on"  # the source where the caller says it
_CARD, _ARGS, _YAML = "README.md", "args.json", ("*.yml", "*.yaml")
#: names of the files that are read, as patterns for the Hub's client
SETTINGS = (_CARD, _ARGS, *_YAML)

_MAX_BYTES = 1 << 17  # of a file that is read for its settings
_MAX_FILES = 20  # in one folder, and lists of settings in one file
_SECTION = re.compile(r"^The following `?bitsandbytes`? quantization config was used during training:$", re.MULTILINE)
_SETTING = re.compile(r"\s*- _?(\w+): (.*)")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class TrainedOn:
    """What an adapter was trained on.

    Attributes:
        name: a key of :data:`TRAINED_ON`.
        source: the file that says so, or the argument.
        skip: the modules that stayed plain (``llm_int8_skip_modules``); None for transformers' own choice.
        certain: the adapter cannot have been trained on anything else.
    """

    name: str
    source: str
    skip: tuple[str, ...] | None = None
    certain: bool = False

    @property
    def format(self) -> str | None:
        return TRAINED_ON[self.name][0]

    @property
    def said_by(self) -> str:
        """The source, for a message."""
        return "trained_on=… (--trained-on)" if self.source == _ARGUMENT else printable(self.source)

    @property
    def facts(self) -> dict[str, str]:
        """What a record says of it."""
        return {"trained_on": self.name, "trained_on_source": self.source}

    @property
    def double_quant(self) -> bool:
        return TRAINED_ON[self.name][1]


def trained_on_said(said: str | PathLike[str]) -> TrainedOn:
    """What the caller says that an adapter was trained on: a key of :data:`TRAINED_ON`, or a file of a trainer's settings.

    Raises:
        StateError: neither of them, or the file does not say it.
    """
    if said in TRAINED_ON:
        return TrainedOn(str(said), _ARGUMENT)
    remedy = f"choose one of {', '.join(TRAINED_ON)}, or give the trainer's file of settings: trained_on=… (--trained-on FILE)"
    path = Path(said).expanduser()
    if not path.is_file():
        raise StateError(
            f"{printable(said)!r} is neither a format that adapters are trained on nor a file", remedy=remedy
        )
    found = list(_said_by(_yaml(_text(path.parent, path.name)), path.name))  # JSON is YAML too
    if not found:
        message = (
            "the file holds no settings of axolotl, LLaMA-Factory or ms-swift that say what an adapter was trained on"
        )
        raise StateError(message, path=path, remedy=remedy)
    return found[0]


def trained_on_in(folder: Path) -> list[TrainedOn]:
    """What the files beside an adapter say that it was trained on, without repetitions; several where files disagree.

    ======================================  ==============================================================================
    file                                    what says it
    ======================================  ==============================================================================
    ``README.md``                           peft's list of bitsandbytes' settings; axolotl's settings in a block of YAML
    ``*.yml``, ``*.yaml``                   axolotl's and LLaMA-Factory's settings
    ``args.json``                           ms-swift's settings
    ======================================  ==============================================================================

    The files of a trainer's folder count for its ``checkpoint-N`` too. A file that cannot be read says nothing.
    """
    places = [folder, folder.parent] if _CHECKPOINT.fullmatch(folder.name) else [folder]
    found = (one for place in places for one in _said_in(place))
    return list({(one.name, one.skip): one for one in reversed(list(found))}.values())[::-1]


def trained_on_base(config: Mapping[str, Any]) -> list[TrainedOn]:
    """What the base that an adapter's ``config`` names says of its own weights, where they are quantised. A plain base says
    nothing, since a trainer may quantise while it loads; nor does a base that is not on this machine, or behind a URL.
    """
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or is_url(base):
        return []
    with suppress(OFTSurgeryError, ValueError, OSError, RecursionError):
        file = checkpoint_place(base, None if Path(base).is_dir() else revision or None).on_disk(CONFIG)
        settings = json.loads(_text(file.parent, CONFIG) or "null") if file is not None else None
        quantised = settings.get("quantization_config") if isinstance(settings, dict) else None
        if isinstance(quantised, dict) and quantised.get("quant_method", "bitsandbytes") == "bitsandbytes":
            # a record is published, so it names no folders of this machine
            return list(_named(quantised, f"{CONFIG} of {hub_id_of(base) or Path(base).name}"))
    return []


def _said_in(folder: Path) -> Iterator[TrainedOn]:
    card = _text(folder, _CARD)
    for section in islice(_SECTION.finditer(card), _MAX_FILES):
        yield from _named(_bitsandbytes(_settings_after(card, section.end())), _CARD)
    for block in card.split("\n```yaml\n")[1:_MAX_FILES]:
        yield from _said_by(_yaml(block.partition("\n```")[0]), _CARD)
    for path in sorted(path for pattern in _YAML for path in folder.glob(pattern))[:_MAX_FILES]:
        yield from _said_by(_yaml(_text(folder, path.name)), path.name)
    with suppress(ValueError, RecursionError):
        yield from _said_by(json.loads(_text(folder, _ARGS) or "null"), _ARGS)


def _said_by(settings: object, source: str) -> Iterator[TrainedOn]:
    """What a trainer's settings say."""
    if not isinstance(settings, Mapping):
        return
    for is_of, reader in _TRAINERS:
        if is_of <= settings.keys():
            yield from _named(reader(settings), source)
            return


def _named(settings: Mapping[str, Any] | None, source: str) -> Iterator[TrainedOn]:
    """The name of bitsandbytes' settings; nothing for unknown settings (None)."""
    if settings is None:
        return
    skip = settings.get("llm_int8_skip_modules")
    skipped = tuple(map(str, skip)) if isinstance(skip, (list, tuple)) else None
    kind: object = "plain"
    if settings.get("load_in_8bit"):
        kind = "int8"
    elif settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type", "fp4")  # transformers' default
        kind = f"{kind}-double" if settings.get("bnb_4bit_use_double_quant") else kind
    if str(kind) in TRAINED_ON:
        yield TrainedOn(str(kind), source, None if kind == "plain" else skipped)


# --- trainers ---------------------------------------------------------------------------------------------------------


def _axolotl(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """axolotl's ``qlora`` quantises to NF4 with double quantisation, unless ``bnb_config_kwargs`` says otherwise; what its other
    adapters do with 4 bits depends on the release.
    """
    if settings.get("gptq") or (settings.get("load_in_4bit") and settings["adapter"] != "qlora"):
        return None
    more = settings.get("bnb_config_kwargs")
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {**defaults, **settings, **(more if isinstance(more, Mapping) else {})}


def _by_bits(
    settings: Mapping[str, Any], *, bits: str, method: str, kind: str, double: str, no_method: str | None
) -> Mapping[str, Any] | None:
    """Settings of a trainer that names the number of bits; its defaults are NF4 and double quantisation.

    Args:
        bits, method, kind, double: the trainer's names of the settings.
        no_method: the method that the trainer takes where none is named; None: the trainer does not quantise then.
    """
    chosen = settings.get(method) or no_method
    count = settings.get(bits) if chosen is not None else None
    if count not in (None, 0, 4, 8) or (count and str(chosen).lower() not in ("bnb", "bitsandbytes")):
        return None
    return {
        "load_in_4bit": count == 4,
        "load_in_8bit": count == 8,
        "bnb_4bit_quant_type": settings.get(kind, "nf4"),
        "bnb_4bit_use_double_quant": settings.get(double, True),
    }


_llama_factory = partial(
    _by_bits,
    bits="quantization_bit",
    method="quantization_method",
    kind="quantization_type",
    double="double_quantization",
    no_method="bnb",
)
_ms_swift = partial(
    _by_bits,
    bits="quant_bits",
    method="quant_method",
    kind="bnb_4bit_quant_type",
    double="bnb_4bit_use_double_quant",
    no_method=None,
)
#: fields that a trainer's settings have, and their reader
_TRAINERS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Mapping[str, Any] | None]], ...] = (
    (frozenset({"base_model", "adapter"}), _axolotl),
    (frozenset({"model_name_or_path", "finetuning_type"}), _llama_factory),
    (frozenset({"model", "quant_bits"}), _ms_swift),
)


# --- files ------------------------------------------------------------------------------------------------------------


def _settings_after(card: str, start: int) -> dict[str, str]:
    """The list ``- name: value`` after a heading of a card."""
    found: dict[str, str] = {}
    for line in card[start:].splitlines():
        setting = _SETTING.fullmatch(line)
        if setting is not None:
            found[setting[1]] = setting[2].strip()
        elif found and line.strip():
            break
    return found


def _bitsandbytes(settings: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Settings as a card has them: Python's words for values, and names without quotes."""
    if settings.get("quant_method", "bitsandbytes") not in ("bitsandbytes", "QuantizationMethod.BITS_AND_BYTES"):
        return None
    values: dict[str, Any] = dict(settings)
    for name, text in settings.items():
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            values[name] = ast.literal_eval(text)
    return values if {"load_in_4bit", "load_in_8bit"} & values.keys() else None


def _text(folder: Path, name: str) -> str:
    """The text of a file; an empty text for a file that is missing, too large, or a link that is not followed."""
    with suppress(CheckpointError, OSError):
        path = inside(folder, name)
        if path.stat().st_size <= _MAX_BYTES:
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _yaml(text: str) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
