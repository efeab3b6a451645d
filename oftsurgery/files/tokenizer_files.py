""":func:`choose_tokenizer` says whose tokenizer and chat template lie beside folded weights: the base's, an adapter's, those of
another folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from oftsurgery.errors import CheckpointError, StateError

from .carried import Carried, carried_from
from .reading import read_json, sha256_of

_CONFIG = "tokenizer_config.json"
_BESIDE = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
_VOCABULARY = re.compile(
    r"(?i:tokenizer\.json|tekken\.json|encoder\.json|emoji\.json|normalizer\.json|byte_maps\.json|dict\.txt|merges\.txt"
    r"|(\w+[_-])?vocab([_-]\w+)?\.(json|txt)|word_(shape|pronunciation)\.json"
    r"|.*\.(model|spm|tiktoken|vocab|bpe|codes|tokenizer)|.*\.model\.v\d+\w*)"
)
#: the same as the Hub's client takes patterns
PATTERNS = [
    "*tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken",
    "tekken.json", "*.jinja", "chat_template.json", "encoder.json", "dict.txt", "bpe.codes", "emoji.json", "normalizer.json",
]  # fmt: skip
_TEMPLATE = re.compile(r"chat_template\.(jinja|json)|additional_chat_templates/[^/]*\.jinja")
_PROCESSOR = re.compile(r"(\w+_)?(pre)?processor_config\.json")
_REMEDY = "tokenizer='base' (--tokenizer base), or name the folder of the tokenizer"


def choose_tokenizer(carried: Carried, adapters: Sequence[Path], wanted: str | Path | None = None) -> Carried:
    """What goes along with folded weights, with the tokenizer and the chat template that are wanted.

    Args:
        carried: what goes along from the base.
        adapters: the adapters' folders.
        wanted: ``"adapter"``, ``"base"``, or a folder; None: the adapter's where it has one, else the base's.

    Raises:
        StateError: the adapter or the folder has none, or two adapters have different ones.
        CheckpointError: a file cannot be used.
    """
    base = _Own(carried)
    folders = [wanted] if isinstance(wanted, Path) else [] if wanted == "base" else adapters
    found = [own for folder in folders for own in [_Own(carried_from(folder))] if own.serves(base) or own.templates]
    if not found:
        if isinstance(wanted, Path):
            raise StateError("the folder has neither a tokenizer nor a chat template", path=wanted, remedy=_REMEDY)
        if wanted == "adapter":
            raise StateError("no adapter has a tokenizer or a chat template in its folder", remedy=_REMEDY)
        return base.told()
    own = found[-1]
    if any(other.contents != own.contents for other in found):
        raise StateError("the adapters bring different tokenizers or chat templates", remedy=_REMEDY)
    whose = "other" if isinstance(wanted, Path) else "adapter"
    return _with(base, own, whose, tokenizer=own.serves(base), templates=own.has_template)


def restore_tokenizer(carried: Carried, base: Carried) -> Carried:
    """``carried`` with the tokenizer and the chat templates of ``base`` in place of its own, or without any."""
    return _with(_Own(carried), _Own(base), "base", tokenizer=True, templates=True)


def _with(there: _Own, own: _Own, whose: str, *, tokenizer: bool, templates: bool) -> Carried:
    """What goes along from one folder, with the tokenizer or the chat templates of another."""
    drop = {*(there.files if tokenizer else ()), *(there.templates if templates else ())}
    drop -= {name for name in drop if tokenizer and name not in own.carried.files and own.agrees_with(there, name)}
    take = [*(own.files if tokenizer else ()), *(own.templates if templates else ())]
    take += [name for name in own.carried.code if tokenizer and name not in there.carried.files]
    files = {n: path for n, path in there.carried.files.items() if n not in drop}
    files |= {n: own.carried.files[n] for n in take}
    code = tuple(n for n in sorted({*there.carried.code, *own.carried.code}) if n in files)
    told = there.told()
    return replace(
        told,
        files=dict(sorted(files.items())),
        code=code,
        tokenizer=whose if tokenizer and own.files else told.tokenizer,
        chat_template=whose if templates and own.has_template else told.chat_template,
    )


def tokenizer_files(carried: Carried) -> dict[str, Path]:
    """``{name: path}`` of the files of a tokenizer and of a processor among what goes along."""
    own = _Own(carried)
    processor = filter(_PROCESSOR.fullmatch, carried.files)
    return {name: carried.files[name] for name in (*own.files, *own.templates, *processor)}


class _Own:
    """The tokenizer among what goes along from a folder.

    Attributes:
        files: names of its files in the folder itself.
        templates: names of its chat templates.
        template_in_config: its config holds one.
    """

    def __init__(self, carried: Carried) -> None:
        self.carried = carried
        self.config = self._json(_CONFIG)
        named = {value for value in self.config.values() if isinstance(value, str)}
        top = [name for name in carried.files if "/" not in name and name not in carried.code]
        self.files = [n for n in top if n in _BESIDE or n in named or _VOCABULARY.fullmatch(n)]
        self.templates = list(filter(_TEMPLATE.fullmatch, carried.files))
        self.template_in_config = bool(self.config.get("chat_template"))

    def _json(self, name: str) -> Mapping[str, Any]:
        """The contents of a JSON file; nothing where it is not there or cannot be read."""
        with suppress(CheckpointError):
            return read_json(self.carried.files[name]) if name in self.carried.files else {}
        return {}

    @cached_property
    def _tokens(self) -> Mapping[str, Any]:
        return self._json("tokenizer.json")

    def agrees_with(self, other: _Own, name: str) -> bool:
        """Whether the other tokenizer's file ``name``, which this one lacks, says nothing else than this one does."""
        model = self._tokens.get("model")
        if model is None or model != other._tokens.get("model"):
            return False
        said = other._json(name)
        if name == "special_tokens_map.json":
            return all(_text(self.config.get(key)) == _text(value) for key, value in said.items())
        if name == "added_tokens.json":
            added = self._tokens.get("added_tokens")
            ids = {str(t.get("content")): t.get("id") for t in added or () if isinstance(t, Mapping)}
            return all(ids.get(token) == number for token, number in said.items())
        return bool(_VOCABULARY.fullmatch(name))

    @property
    def _has_vocabulary(self) -> bool:
        return any(map(_VOCABULARY.fullmatch, self.files))

    def serves(self, base: _Own) -> bool:
        """Whether it is whole: with a vocabulary, unless the base's needs none (bytes)."""
        return bool({_CONFIG, "tokenizer.json"}.intersection(self.files)) and (
            self._has_vocabulary or not base._has_vocabulary
        )

    @property
    def contents(self) -> dict[str, str]:
        """``{name: SHA-256}``"""
        return {n: sha256_of(self.carried.files[n]) for n in (*self.files, *self.templates)}

    @property
    def has_template(self) -> bool:
        return bool(self.templates or self.template_in_config)

    def told(self) -> Carried:
        """What goes along, as the base's where nobody has chosen yet."""
        c = self.carried
        return replace(
            c,
            tokenizer=c.tokenizer or ("base" if self.files else None),
            chat_template=c.chat_template or ("base" if self.has_template else None),
        )


def _text(token: Any) -> Any:
    """A special token, which is written as a text or with its settings."""
    return token.get("content") if isinstance(token, Mapping) else token
