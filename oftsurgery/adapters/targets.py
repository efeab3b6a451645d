""":func:`missing_modules` finds the modules that an adapter's config targets in a model, by peft's rules, and the adapter lacks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import regex

from oftsurgery.errors import AdapterError, printable

if TYPE_CHECKING:
    from .adapter import OFTAdapter

#: the fields of a config that say which modules are targets
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def without_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without its targets, for an adapter that is live in a model: the live layers show the adapter's modules."""
    return {name: value for name, value in config.items() if name not in TARGETS}


_ALL_LINEAR = "all-linear"
# modules that peft leaves out of "all-linear" if a model classifies sequences
_HEADS = ("score", "classifier")
# a pattern from a file must not be able to keep a fold busy for ever
_SECONDS_A_NAME, _SECONDS, _MAX_PATTERN = 0.5, 5.0, 200_000

#: (name in the adapter, path in the model) → whether the config targets the module
Rule = Callable[[str, str], bool]


@dataclass(frozen=True)
class Adaptable:
    """The modules of one model that peft could put an adapter on.

    Attributes:
        linears: paths of linear layers; a module that stands in several places has its first path.
        others: paths of embeddings and convolutions; paths of all layers if the class is not known.
        holders: paths of modules that hold tensors themselves, or whose parts hold tensors.
        first: ``{other path of a shared module: first path of the module}``.
        head: path of the output embeddings, or None.
        name: name of the model's class, or None.
    """

    linears: Collection[str]
    others: Collection[str]
    holders: Collection[str]
    first: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None
    name: str | None = None


def missing_modules(adapter: OFTAdapter, found: Mapping[str, str], model: Adaptable) -> tuple[str, ...]:
    """Paths in the model of the modules that the adapter's config targets or saves whole (``modules_to_save``), and that the
    adapter lacks. The result is empty where the config names no targets, or does not target the adapter's own modules.

    Args:
        found: ``{module in the adapter: path of the module in the model}``.

    Raises:
        AdapterError: a pattern in the config is no regular expression, or takes too long.
    """
    config = adapter.config
    target = config.get("target_modules")
    if not target or (isinstance(target, str) and set(target.split("|")) == {f"(?:{re.escape(p)})" for p in found}):
        return ()  # `OFTAdapter.save` writes such a pattern, which may hold thousands of paths
    rule = _rule(config, model)
    if not all(rule(name, path) for name, path in found.items()):
        return ()
    called = _names_in_adapter(found, model, config)
    there = {model.first.get(path, path) for path in found.values()}
    lost = [
        path
        for path in (*model.linears, *model.others)
        if path not in there and (name := called(path)) is not None and rule(name, path)
    ]
    return (*lost, *_unsaved(adapter, called, model))


def saved_targets(config: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """The target fields of the config that is saved for an adapter of these modules: the fields of ``config`` if they target all
    of the modules, so that a part of an adapter stays a part; else one pattern that matches these paths and no others. (A list
    would match every path that ends in a listed name.)
    """
    target = config.get("target_modules")
    nothing = Adaptable((), (), ())
    if target and not _is_all_linear(target) and all(_rule(config, nothing)(path, path) for path in paths):
        return {name: config.get(name) for name in TARGETS}
    return dict.fromkeys(TARGETS) | {"target_modules": "|".join(f"(?:{re.escape(path)})" for path in paths)}


def _is_all_linear(target: object) -> bool:
    return isinstance(target, str) and target.lower() == _ALL_LINEAR


def _unsaved(adapter: OFTAdapter, called: Callable[[str], str | None], model: Adaptable) -> Iterator[str]:
    """Paths of the modules that ``modules_to_save`` names and the adapter lacks."""
    for entry in adapter.config.get("modules_to_save") or ():
        for path in model.holders:
            name = called(path)
            if name is not None and _ends(name, entry) and not any(n.startswith(f"{name}.") for n in adapter.saved):
                yield path


def _names_in_adapter(
    found: Mapping[str, str], model: Adaptable, config: Mapping[str, Any]
) -> Callable[[str], str | None]:
    """A function from a path in the model to the module's name in the adapter; None for a part of the model that the adapter's
    class does not have. The names of an adapter of another class, or of an earlier layout, begin differently.
    """
    beginnings: dict[str, str] = {}
    renamed = any(name != path for name, path in found.items())
    for name, path in found.items():
        mine, theirs = name.split("."), path.split(".")
        if renamed and mine == theirs:
            # an unchanged `lm_head` beside a language model that lies deeper here tells nothing about other parts
            beginnings[theirs[0]] = mine[0]
            continue
        while mine and theirs and mine[-1] == theirs[-1]:
            mine.pop()
            theirs.pop()
        beginnings[".".join(theirs)] = ".".join(mine)
    longest = sorted(beginnings, key=len, reverse=True)
    trained = (config.get("auto_mapping") or {}).get("base_model_class")
    other_class = None not in (trained, model.name) and trained != model.name
    parts = {path.partition(".")[0] for path in found.values()} if other_class else None

    def called(path: str) -> str | None:
        if parts is not None and path.partition(".")[0] not in parts:
            return None
        for beginning in longest:
            if not beginning or f"{path}.".startswith(f"{beginning}."):
                rest = path[len(beginning) :].removeprefix(".")
                return ".".join(filter(None, (beginnings[beginning], rest)))
        return None

    return called


# --- peft's rules -----------------------------------------------------------------------------------------------------


def _rule(config: Mapping[str, Any], model: Adaptable) -> Rule:
    """peft's decision whether a config targets a module."""
    target, excluded, match = config["target_modules"], config.get("exclude_modules"), _Patterns().match

    def is_excluded(name: str) -> bool:
        if isinstance(excluded, str) and excluded and match(excluded, name, whole=True):
            return True
        if isinstance(excluded, list) and any(_ends(name, entry) for entry in excluded):
            return True
        return any(match(rf"(?:^|.*\.){entry}(?:$|\.)", name) for entry in config.get("modules_to_save") or ())

    def is_target(name: str, path: str) -> bool:
        if isinstance(target, list):
            return name in target or (any(_ends(name, entry) for entry in target) and _in_layers(name, config, match))
        if _is_all_linear(target):
            return (
                model.first.get(path, path) in model.linears
                and path != model.head
                and not _is_head(name, config, model)
            )
        return bool(match(target, name, whole=True))

    return lambda name, path: is_target(name, path) and not is_excluded(name)


def _is_head(name: str, config: Mapping[str, Any], model: Adaptable) -> bool:
    """Whether the module is the head of a classifier, which "all-linear" leaves out."""
    return model.head is None and config.get("task_type") == "SEQ_CLS" and name in _HEADS


def _in_layers(name: str, config: Mapping[str, Any], match: Callable[[str, str], Any]) -> bool:
    """Whether the module lies in one of the config's ``layers_to_transform``; True for a config without this field."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    listed = layers if isinstance(layers, list) else [layers]
    before = [rf"{p}\." for p in ([patterns] if isinstance(patterns, str) else patterns or ()) if p] or [
        r"[^.]+\.[^.]+\."
    ]
    for pattern in before:
        # some releases of peft take the first number in a name as the layer's number, and others the last number: a name
        # counts only if both numbers are listed
        found = [match(rf"(?:{any_}\.)?{pattern}(\d+)\.", name) for any_ in (".*?", ".*")]
        if all(found):
            return {int(number[1]) for number in found} <= set(listed)
    return False


def _ends(name: str, entry: str) -> bool:
    """Whether the last segments of ``name`` are ``entry``."""
    return name == entry or name.endswith(f".{entry}")


class _Patterns:
    """Regular expressions of a config, which are matched within a time limit."""

    def __init__(self) -> None:
        self.compiled: dict[str, Any] = {}
        self.until = time.monotonic() + _SECONDS

    def match(self, pattern: str, name: str, *, whole: bool = False) -> Any:
        """The match of the beginning of ``name``, or of ``name`` as a ``whole``; None without a match."""
        remedy = "restore the config that peft wrote"
        try:
            if len(pattern) > _MAX_PATTERN:
                raise TimeoutError
            if pattern not in self.compiled:
                self.compiled[pattern] = regex.compile(pattern)
            compiled, left = self.compiled[pattern], min(self.until - time.monotonic(), _SECONDS_A_NAME)
            return (compiled.fullmatch if whole else compiled.match)(name, timeout=max(left, 1e-3))
        except (regex.error, RecursionError, MemoryError) as error:
            message = f"a pattern of modules in the adapter's config is no regular expression: {printable(pattern)} ({printable(error)})"
            raise AdapterError(message, tensor="adapter_config.json", remedy=remedy) from error
        except TimeoutError as error:
            limits = f"limits: {_SECONDS_A_NAME} s a name, {_SECONDS:.0f} s in all, {_MAX_PATTERN} characters"
            message = (
                f"a pattern of modules in the adapter's config takes too long to match ({limits}): {printable(pattern)}"
            )
            raise AdapterError(message, tensor="adapter_config.json", remedy=remedy) from error
