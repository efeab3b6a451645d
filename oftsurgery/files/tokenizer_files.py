""":func:`choose_tokenizer` chooses the tokenizer and the chat template that are written beside folded weights: the base's, an
adapter's, or those of another folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
#: a tokenizer's files as patterns for the Hub's client
PATTERNS = [
    "*tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken",
    "tekken.json", "*.jinja", "chat_template.json", "encoder.json", "dict.txt", "bpe.codes", "emoji.json", "normalizer.json",
]  # fmt: skip
_TEMPLATE = re.compile(r"chat_template\.(jinja|json)|additional_chat_templates/[^/]*\.jinja")
_PROCESSOR = re.compile(r"(\w+_)?(pre)?processor_config\.json")
_REMEDY = "choose the base's tokenizer, tokenizer='base' (--tokenizer base), or name the folder of a tokenizer"


def choose_tokenizer(
    carried: Carried,
    adapters: Sequence[Path],
    wanted: str | Path | None = None,
    rows: int | None = None,
    before: int | None = None,
) -> Carried:
    """The files beside folded weights, with the chosen tokenizer and chat template.

    Args:
        carried: the base's files.
        adapters: the adapters' folders.
        wanted: ``"adapter"``, ``"base"``, or a folder; None: the adapter's files where its folder has them, else the base's.
        rows: the rows of the model's embedding, where they are known.
        before: the rows of the base's embedding, if the fold changes their number.

    Raises:
        StateError: the adapter or the folder has no tokenizer, two adapters have different tokenizers, or the tokenizer has
            tokens that the model's embedding lacks.
        CheckpointError: a file cannot be used.
    """
    base = _Own(carried)
    folders = [wanted] if isinstance(wanted, Path) else [] if wanted == "base" else adapters
    found = [own for folder in folders for own in [_Own(carried_from(folder))] if own.is_whole(base) or own.templates]
    if not found:
        if isinstance(wanted, Path):
            raise StateError("the folder has neither a tokenizer nor a chat template", path=wanted, remedy=_REMEDY)
        if wanted == "adapter":
            where = ", ".join(map(str, adapters)) or None
            raise StateError("no adapter's folder has a tokenizer or a chat template", path=where, remedy=_REMEDY)
        _check_rows(base, base, rows, before)
        return base.told()
    own = found[-1]
    if any(other.contents != own.contents for other in found):
        where = ", ".join(map(str, folders))
        raise StateError("the adapters bring different tokenizers or chat templates", path=where, remedy=_REMEDY)
    whole = own.is_whole(base)
    _check_rows(own if whole else base, base, rows, before)
    if wanted is None and own.contents.items() <= base.contents.items():
        return base.told()  # trainers save the base's tokenizer beside an adapter too
    whose = "other" if isinstance(wanted, Path) else "adapter"
    return _with(base, own, whose, tokenizer=whole, templates=own.has_template)


def _check_rows(own: _Own, base: _Own, rows: int | None, before: int | None) -> None:
    """Refuse a tokenizer with tokens that have no row in the embedding, unless the base's tokenizer has tokens without a row in the
    base's embedding.
    """
    largest = max(own.token_ids(), default=-1)
    if rows is None or largest < rows or max(base.token_ids(), default=-1) >= (before or rows):
        return
    if before is not None:
        remedy = "give the tokenizer of the training: tokenizer=FOLDER (--tokenizer FOLDER)"
    else:
        remedy = (
            "save the adapter with its resized embeddings, save_pretrained(folder, save_embedding_layers=True); or resize the base's "
            "embeddings as in training (resize_token_embeddings) and save the base; or choose the base's tokenizer: "
            "tokenizer='base' (--tokenizer base)"
        )
    raise StateError(
        f"the tokenizer has a token with the number {largest}, and the model's embedding has {rows} rows",
        path=own.carried.files[own.files[0]].parent,
        remedy=remedy,
    )


def restore_tokenizer(carried: Carried, base: Carried) -> Carried:
    """``carried`` with the tokenizer and the chat templates of ``base`` in place of those of ``carried``; without a tokenizer if
    ``base`` has none.
    """
    return _with(_Own(carried), _Own(base), "base", tokenizer=True, templates=True)


def _with(there: _Own, own: _Own, whose: str, *, tokenizer: bool, templates: bool) -> Carried:
    """The files of one folder with the tokenizer or the chat templates of another folder."""
    drop = {*(there.files if tokenizer else ()), *(there.templates if templates else ())}
    drop -= {name for name in drop if tokenizer and name not in own.carried.files and own.agrees_with(there, name)}
    take = [*(own.files if tokenizer else ()), *(own.templates if templates else ())]
    take += [name for name in own.carried.code if tokenizer and name not in there.carried.files]
    files = {n: path for n, path in there.carried.files.items() if n not in drop}
    files |= {n: own.carried.files[n] for n in take}
    told = there.told()
    return replace(
        told,
        files=dict(sorted(files.items())),
        code=tuple(n for n in sorted({*there.carried.code, *own.carried.code}) if n in files),
        tokenizer=whose if tokenizer and own.files else told.tokenizer,
        chat_template=whose if templates and own.has_template else told.chat_template,
    )


def tokenizer_files(carried: Carried) -> dict[str, Path]:
    """``{name: path}`` of the files of a tokenizer and of a processor."""
    own = _Own(carried)
    processor = filter(_PROCESSOR.fullmatch, carried.files)
    return {name: carried.files[name] for name in (*own.files, *own.templates, *processor)}


class _Own:
    """The tokenizer of one folder.

    Attributes:
        carried: the folder's files.
        config: the contents of the folder's ``tokenizer_config.json``.
        files: the names of the tokenizer's files, without chat templates.
        templates: the names of the chat templates' files.
    """

    def __init__(self, carried: Carried) -> None:
        self.carried = carried
        self.config = self._json(_CONFIG)
        named = {value for value in self.config.values() if isinstance(value, str)}
        top = [name for name in carried.files if "/" not in name and name not in carried.code]
        self.files = [n for n in top if n in _BESIDE or n in named or _VOCABULARY.fullmatch(n)]
        self.templates = list(filter(_TEMPLATE.fullmatch, carried.files))

    def _json(self, name: str) -> Mapping[str, Any]:
        """The contents of a JSON file; nothing for a missing or unreadable file."""
        with suppress(CheckpointError):
            return read_json(self.carried.files[name]) if name in self.carried.files else {}
        return {}

    @cached_property
    def _tokens(self) -> Mapping[str, Any]:
        """The contents of ``tokenizer.json``."""
        return self._json("tokenizer.json")

    @cached_property
    def _added(self) -> Mapping[str, Any]:
        """``{token: number}`` of the tokens that ``tokenizer.json`` has beside its vocabulary."""
        added = self._tokens.get("added_tokens")
        return {str(t.get("content")): t.get("id") for t in added or () if isinstance(t, Mapping)}

    def token_ids(self) -> Iterator[int]:
        """The numbers of the tokens that are added to the vocabulary, and in ``tokenizer.json`` of the vocabulary's tokens."""
        model = self._tokens.get("model")
        vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
        if isinstance(vocabulary, list):  # without numbers: the first token has the number 0
            yield len(vocabulary) - 1
        elif isinstance(vocabulary, Mapping):
            yield from (n for n in vocabulary.values() if isinstance(n, int))
        decoder = self.config.get("added_tokens_decoder")
        numbers = [*self._added.values(), *self._json("added_tokens.json").values()]
        numbers += [int(n) for n in (decoder if isinstance(decoder, Mapping) else ()) if str(n).isdecimal()]
        yield from (n for n in numbers if isinstance(n, int))

    def agrees_with(self, other: _Own, name: str) -> bool:
        """Whether the other tokenizer's file ``name``, which this tokenizer lacks, contradicts nothing in this tokenizer."""
        model = self._tokens.get("model")
        if model is None or model != other._tokens.get("model"):
            return False
        said = other._json(name)
        if name == "special_tokens_map.json":
            return all(_text(self.config.get(key)) == _text(value) for key, value in said.items())
        if name == "added_tokens.json":
            return all(self._added.get(token) == number for token, number in said.items())
        return bool(_VOCABULARY.fullmatch(name))

    @property
    def _has_vocabulary(self) -> bool:
        return any(map(_VOCABULARY.fullmatch, self.files))

    def is_whole(self, base: _Own) -> bool:
        """Whether the folder has a tokenizer's settings and vocabulary. A tokenizer of bytes has no vocabulary; the settings
        are enough if the base has such a tokenizer.
        """
        settings = {_CONFIG, "tokenizer.json"}.intersection(self.files)
        return bool(settings) and (self._has_vocabulary or not base._has_vocabulary)

    @cached_property
    def contents(self) -> dict[str, str]:
        """``{name: SHA-256}`` of the tokenizer's files and of the chat templates."""
        return {n: sha256_of(self.carried.files[n]) for n in (*self.files, *self.templates)}

    @property
    def has_template(self) -> bool:
        return bool(self.templates or self.config.get("chat_template"))

    def told(self) -> Carried:
        """The folder's files, with the owner ``"base"`` in place of an owner that is not chosen yet."""
        c = self.carried
        return replace(
            c,
            tokenizer=c.tokenizer or ("base" if self.files else None),
            chat_template=c.chat_template or ("base" if self.has_template else None),
        )


def _text(token: Any) -> Any:
    """The text of a special token, which a file has with or without the token's settings."""
    return token.get("content") if isinstance(token, Mapping) else token
