"""The flags ``--config`` and ``--print-config``: a command's arguments as YAML, by the names that the command line has."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oftsurgery.errors import printable

#: arguments that a file does not hold: the file's own, help, and what no file should hold
_NOT_IN_FILES = {"config", "print_config", "help", "token"}
_MAX_BYTES = 1 << 20


class ConfigError(Exception):
    """A file of arguments cannot be used; the message says why."""


def words_of(
    path: str, actions: Sequence[argparse.Action], unused: Collection[str] = ()
) -> tuple[list[str], dict[str, list[str]]]:
    """The flags of a YAML file, as words of the command line, and its positional arguments by their names.

    Args:
        path: the file: ``{name: value}``. A name is that of a flag without its dashes, or that of a positional argument in
            lower case; ``-`` and ``_`` are the same. A switch has true or false, and an argument of several values a list.
        actions: the command's arguments.
        unused: further names that a file may have, of arguments of other commands.

    Raises:
        ConfigError: the file cannot be read, or has names or values that the command does not have.
    """
    settings = _read(path)
    known = {name: action for action in actions for name in [name_of(action)] if action.dest not in _NOT_IN_FILES}
    flags: list[str] = []
    positional: dict[str, list[str]] = {}
    for name in settings:
        if name not in known and name not in unused:
            names = ", ".join(sorted(known))
            raise ConfigError(f"{path}: {printable(name)!r} is no argument of this command; its arguments are {names}")
    for name, action in known.items():  # in the order of the command line
        value = settings.get(name)
        if value is None:
            continue
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                raise ConfigError(
                    f"{path}: {name} is a switch, so its value is true or false, not {printable(value)!r}"
                )
            flags += [action.option_strings[-1]] * value
            continue
        texts = list(_texts(value, several=action.nargs in ("+", "*"), where=f"{path}: {name}"))
        if action.option_strings:
            flags += (
                [action.option_strings[-1], *texts]
                if action.nargs in ("+", "*")
                else [f"{action.option_strings[-1]}={texts[0]}"]
            )
        else:
            if any(text.startswith("-") for text in texts):
                raise ConfigError(
                    f"{path}: the value {printable(texts[0])!r} of {name} begins as a flag; write ./ before it"
                )
            positional[name] = texts
    return flags, positional


def name_of(action: argparse.Action) -> str:
    """The name of an argument in a file."""
    return action.dest.replace("_", "-")


def as_yaml(args: argparse.Namespace, actions: Sequence[argparse.Action]) -> str:
    """A command's arguments as a file that ``--config`` reads, with the defaults."""
    import yaml

    named = {name_of(a): getattr(args, a.dest, None) for a in actions if a.dest not in _NOT_IN_FILES}
    given = {name: value for name, value in named.items() if value not in (None, []) and value is not False}
    return str(yaml.safe_dump(given, sort_keys=False))


def _read(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_BYTES} bytes, which no file of arguments has")
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({printable(error)})") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{path} holds no names with values; write a line such as `format: bf16` for each argument")
    return {name.replace("_", "-"): value for name, value in found.items()}


def _texts(value: Any, *, several: bool, where: str) -> Iterator[str]:
    values = value if several and isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            raise ConfigError(f"{where} takes {'texts' if several else 'a text or a number'}, not {printable(one)!r}")
        yield str(one)
