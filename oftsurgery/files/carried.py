""":func:`carried_from` finds the files that are copied beside a model's weights: loading the model reads these files, and the
folder's own index files name them.

Every file is data here. Nothing is imported or run; JSON and the text of Python files are read for names alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oftsurgery.errors import CheckpointError, printable

from .layout import CONFIG, LAYOUTS
from .reading import inside, is_nested_name, is_plain_name, read_json_value

#: names of files that loaders read (configs, vocabularies, templates), and of a model's terms
_DATA = re.compile(
    r"(?i:.*\.(json|txt|model|spm|jinja|tiktoken|vocab|bpe|codes|tokenizer)|.*\.model\.v\d+\w*"
    r"|(licen[cs]e|notice|copying|copyright|use_policy|acceptable_use).*)",
    re.DOTALL,
)
#: the same names as patterns for the Hub's client
PATTERNS = [
    "*.json", "*.txt", "*.model", "*.model.v*", "*.spm", "*.jinja", "*.tiktoken", "*.vocab", "*.bpe", "*.codes", "*.tokenizer",
    "*.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
]  # fmt: skip
#: names of files that are not copied, whoever names the files
_NEVER = re.compile(
    r"\..*|adapter_.*"  # hidden files, and an adapter's files
    r"|(?i:.*\.(bin|pth?|ckpt|pkl|pickle|joblib|dill|npz|h5|keras|msgpack|pb|tflite|onnx|gguf|ot|undo))"  # other weights
    r"|(?i:.*\.(bin|h5|msgpack)\.index(\.\w+)?\.json)"
    r"|(?i:(optimizer|scheduler|rng_state|random_states|training_args).*)"  # the state of a training
    r"|(?i:(quantize|quant|hf_quant)_config\.json)"  # of other packages' quantised weights, which no output has
    r"|(?i:trainer_state\.json|(all|train|eval|predict|test)_results\.json)"
    r"|(?i:.*\.(py|pyc|so|dll|dylib|exe|sh|bat))",  # code; an index names the code that is copied
    re.DOTALL,
)
_WEIGHTS = re.compile(r"(?i:.*\.safetensors(\.index(\.\w+)?\.json)?)", re.DOTALL)
_PICKLE = "pytorch_model.bin"  # the weights of a module that was saved without safetensors
_TEMPLATE = re.compile(r".*\.jinja", re.DOTALL)
_IMPORT = re.compile(r"^[ \t]*(?:import[ \t]+\.(\S+)[ \t]*$|from[ \t]+\.(\S+)[ \t]+import)", re.MULTILINE)
#: files that every output gets anew
_ANEW = (CONFIG, "README.md", "oftsurgery.json", "oftsurgery_calibration.json")

_MAX_FILES = 512
_MAX_NAMED = 4096  # with the files that an index names one by one
_MAX_LISTED = 100  # names in the list of files that are left out
_MAX_DEPTH = 8
_MAX_BYTES = 1 << 30  # of one file without weights
_MAX_INDEX_BYTES = 4 << 20  # of one file that is read for names
_MAX_READ_BYTES = 64 << 20  # of all files that are read for names

_REPAIR = "do not use this checkpoint, or repair its index files"


@dataclass(frozen=True)
class Carried:
    """The files that are copied beside a model's weights.

    Attributes:
        files: ``{name in the new folder: file to copy}``; a name leads through folders by ``/``.
        code: the names of the files of Python code.
        left_out: the names of the folder's other files, and of its folders that no index names.
        lost: ``{name: why}`` of files that loading the whole model reads, and that are not copied.
        tokenizer: the owner of the tokenizer: ``"base"``, ``"adapter"`` or ``"other"``; None without a tokenizer, or before
            the choice.
        chat_template: the owner of the chat templates, with the same values.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: str | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def carried_from(folder: Path, weights: Collection[str] = ()) -> Carried:
    """The files of the model in ``folder`` that are copied beside its weights: the folder's files of known kinds, and the
    files that its index files name.

    ============================================  ====================================================================
    index                                         names
    ============================================  ====================================================================
    ``modules.json``, ``router_config.json``,     the folders of sentence-transformers' modules, with their own weights,
    a ``config.json`` with ``types``              and the modules' code
    ``auto_map`` in any ``*config.json``          files of code, and the files beside them that the code imports
    texts in any ``*config.json``                 files with other endings, such as a tokenizer's ``vocab_file``
    ``speaker_embeddings_path.json``              Bark's voices
    ============================================  ====================================================================

    transformers finds ``additional_chat_templates``, ``custom_generate`` and the folders of a processor's further tokenizers
    by their names, and so does this function.

    Args:
        weights: the names of the files that hold the model's own weights.

    Raises:
        CheckpointError: an index names a place outside the folder, a link leaves the folder, or the files are too many.
    """
    walk = _Walk(folder, {*weights, *_ANEW, *(name for layout in LAYOUTS for name in layout.names)})
    walk.visit("")
    left_out = walk.left_out()
    if len(left_out) > _MAX_LISTED:
        left_out = [*left_out[:_MAX_LISTED], f"… and {len(left_out) - _MAX_LISTED} more"]
    return Carried(dict(sorted(walk.files.items())), tuple(sorted(walk.code)), tuple(left_out), walk.lost)


def missing_in(folder: Path) -> list[str]:
    """The files that index files in ``folder`` name and the folder lacks, as patterns for the Hub's client."""
    walk = _Walk(folder, set())
    walk.visit("")
    return walk.missing[:_MAX_FILES]


class _Walk:
    """A walk through a model's folder.

    Attributes:
        files: ``{name: path}`` of the files to copy.
        code: the names of the files of code.
        lost: ``{name: why}`` of files that an index names and that are not copied.
        missing: patterns of files that an index names and the folder lacks.
    """

    def __init__(self, root: Path, own: Collection[str]) -> None:
        self.root, self.own = root, own
        self.files: dict[str, Path] = {}
        self.code: set[str] = set()
        self.lost: dict[str, str] = {}
        self.missing: list[str] = []
        self._visited: set[str] = set()
        self._seen: list[str] = []  # files of visited folders, and folders with a / at the end
        self._read = 0

    def left_out(self) -> list[str]:
        """The names of the files and folders in visited folders that are not copied."""
        used = {*self.own, *self.files, *(f"{place}/" for place in self._visited)}
        used |= {f"{name.rpartition('/')[0]}/" for name in self.files}
        return sorted(name for name in self._seen if name not in used)

    def visit(self, place: str, *, module: bool = False, kinds: re.Pattern[str] = _DATA) -> None:
        """Take files from the folder ``place`` (``""`` is the model's own) and from the folders that its index files name.

        Args:
            module: whether the folder is a module's, with weights of its own.
            kinds: the names of files to take.
        """
        if place in self._visited:
            return
        self._visited.add(place)
        if place.count("/") >= _MAX_DEPTH:
            depth = place.count("/") + 1
            message = f"the index files name a folder {depth} levels deep, more than the limit of {_MAX_DEPTH}"
            raise CheckpointError(message, path=self.root / place, remedy=_REPAIR)
        files, folders = self._look(place)
        read = [n for n in files if (n.endswith("config.json") and not _NEVER.fullmatch(n)) or n in _INDEXES]
        indexes = {n: self._json(_join(place, n)) for n in read}
        configs = [value for name, value in indexes.items() if name.endswith("config.json")]
        named = {text for value in configs for text in _texts(value)}
        for name in files:
            if module and _WEIGHTS.fullmatch(name):
                self._take(_join(place, name), weights=True)
            elif (kinds.fullmatch(name) or name in named) and not _WEIGHTS.fullmatch(name):
                self._take(_join(place, name))
        self.missing += [_join(place, name) for name in _named_files(configs) if name not in files]
        if module:
            self._check_weights(place, files)
        for reference in _auto_maps(configs):
            self._take_class(place, reference)
        for path, kind in _modules(indexes):
            self._visit_module(place, path, kind)
        self._take_voices(place, indexes)
        self._visit_known(place, folders)

    def _visit_known(self, place: str, folders: Collection[str]) -> None:
        """Visit the folders that transformers finds by their names."""
        if "custom_generate" in folders:
            self._take_code(_join(place, "custom_generate/generate"))
            self._take_named(_join(place, "custom_generate/requirements.txt"))
        if "additional_chat_templates" in folders:
            self.visit(_join(place, "additional_chat_templates"), kinds=_TEMPLATE)
        for name in folders:
            if name.endswith("tokenizer"):
                self.visit(_join(place, name))

    # --- looking ---

    def _look(self, place: str) -> tuple[list[str], list[str]]:
        """The names of the files and of the folders in ``place``, without hidden ones."""
        folder = self.root / place
        if not folder.is_dir():
            return [], []
        if not folder.resolve().is_relative_to(self.root.resolve()):
            message = "a folder of the checkpoint is a link that leaves the checkpoint's folder"
            remedy = "do not use this checkpoint, or copy the folder into the checkpoint's"
            raise CheckpointError(message, path=folder, remedy=remedy)
        there = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        files = [p.name for p in there if p.is_file()]
        folders = [p.name for p in there if p.is_dir()]
        self._seen += [_join(place, name) for name in files] + [f"{_join(place, name)}/" for name in folders]
        return files, folders

    def _json(self, name: str) -> Any:
        """The contents of an index; None for an unreadable index, which names nothing to its loaders either."""
        path = inside(self.root, name, nested=True)
        self._count(path)
        with suppress(CheckpointError):
            return read_json_value(path, limit=_MAX_INDEX_BYTES)
        return None

    def _count(self, path: Path) -> None:
        """Count the bytes of a file that is read for names."""
        self._read += min(path.stat().st_size, _MAX_INDEX_BYTES)
        if self._read > _MAX_READ_BYTES:
            message = f"the index files and the code hold at least {self._read} bytes, more than the limit of {_MAX_READ_BYTES}"
            raise CheckpointError(message, path=path, remedy=_REPAIR)

    # --- taking ---

    def _take(self, name: str, *, weights: bool = False, code: bool = False, most: int = _MAX_FILES) -> None:
        """Take the file ``name``, unless files of its name are never copied or the file is too large."""
        base = name.rpartition("/")[2]
        if name in self.files or name in self.own or (_NEVER.fullmatch(base) and not code) or base in _ANEW[1:]:
            return
        path = inside(self.root, name, nested=True)
        if not weights and path.stat().st_size > _MAX_BYTES:
            return
        if len(self.files) >= most:
            message = f"the folder and its index files name more than {most} files to copy beside the weights, which is the limit"
            raise CheckpointError(message, path=path.parent, remedy="remove the files that do not belong to the model")
        self.files[name] = path

    def _take_named(self, name: str) -> None:
        """Take a file that an index names by itself, if the folder has the file."""
        if os.path.lexists(self.root / name):
            self._take(name, most=_MAX_NAMED)
        else:
            self.missing.append(name)

    def _check_weights(self, place: str, files: Collection[str]) -> None:
        """Note a module whose weights are a pickle, or are yet to be downloaded."""
        if any(_WEIGHTS.fullmatch(name) for name in files):
            return
        self.missing.append(f"{place}/*.safetensors*")
        if _PICKLE in files:
            self.lost[_join(place, _PICKLE)] = "a pickle, which could run code when read"

    def _take_voices(self, place: str, indexes: Mapping[str, Any]) -> None:
        """Take the files of Bark's voices."""
        for text in _texts(indexes.get(_VOICES)):
            if text.endswith(".npy") and _is_visible(text):
                self._take_named(_join(place, text))

    # --- model code ---

    def _take_class(self, place: str, reference: str) -> None:
        """Take the code of a class that a config names as ``file.Class``. The code of ``owner/name--file.Class`` lies in
        another repository.
        """
        module, _, name = reference.partition(".")
        if "--" not in reference and "." not in name and name and module:
            self._take_code(_join(place, module))

    def _take_code(self, module: str) -> None:
        """Take a file of code and the files beside it that the code imports, by transformers' own pattern."""
        place, waiting = module.rpartition("/")[0], [module]
        while waiting:
            name = f"{waiting.pop()}.py"
            if name in self.code or not _is_visible(name):
                continue
            if not os.path.lexists(self.root / name):
                self.missing.append(name)
                continue
            path = inside(self.root, name, nested=True)
            if path.stat().st_size > _MAX_INDEX_BYTES:
                self.lost[name] = f"a file of code with more than {_MAX_INDEX_BYTES} bytes"
                continue
            self._count(path)
            self._take(name, code=True)
            self.code.add(name)
            text = path.read_text(encoding="utf-8", errors="replace")
            waiting += [_join(place, "".join(groups)) for groups in _IMPORT.findall(text)]

    # --- sentence-transformers ---

    def _visit_module(self, place: str, path: object, kind: object) -> None:
        """Visit the folder of a module of the class ``kind``, which an index in ``place`` names."""
        inner = self._module_folder(place, path) if isinstance(path, str) else ""
        if isinstance(kind, str) and not kind.startswith("sentence_transformers."):
            # sentence-transformers looks for the class beside modules.json, and saves the class in the module's own folder
            for where in {"", inner}:
                self._take_class(where, kind)
        if inner and inner != place:
            self.visit(inner, module=True)

    def _module_folder(self, place: str, path: str) -> str:
        """The folder of a module, as a path below the model's folder; an index in ``place`` names the folder ``path``."""
        parts = (
            [part for part in path.removesuffix("/").split("/") if part != "."] if path not in ("", ".", "./") else []
        )
        where = None
        if not all(map(is_plain_name, parts)):
            where = "a folder outside the checkpoint"
        elif any(part.startswith(".") for part in parts):
            where = "a hidden folder"
        if where is not None:
            message = f"an index file puts a module into {where}: {printable(path)!r}"
            raise CheckpointError(message, path=self.root / place, remedy=_REPAIR)
        return "/".join(filter(None, [place, *parts]))


_MODULES, _ROUTER, _VOICES = "modules.json", "router_config.json", "speaker_embeddings_path.json"
_INDEXES = (_MODULES, _VOICES)


def _modules(indexes: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    """``(path, class)`` of the modules that a folder's index files name."""
    listed = indexes.get(_MODULES)
    for row in listed if isinstance(listed, list) else ():
        if isinstance(row, Mapping):
            yield row.get("path"), row.get("type")
    for name in (_ROUTER, CONFIG):
        value = indexes.get(name)
        types = value.get("types") if isinstance(value, Mapping) and "structure" in value else None
        yield from types.items() if isinstance(types, Mapping) else ()


def _named_files(configs: Iterable[Any]) -> Iterator[str]:
    """The names of files that configs have under keys such as ``vocab_file``."""
    for config in configs:
        for key, name in config.items() if isinstance(config, Mapping) else ():
            if key.endswith("_file") and isinstance(name, str) and is_plain_name(name) and not _NEVER.fullmatch(name):
                yield name


def _is_visible(name: str) -> bool:
    """Whether ``name`` leads to a file inside the folder, through no hidden folder."""
    return is_nested_name(name) and not any(part.startswith(".") for part in name.split("/"))


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def _parts(value: Any) -> Iterator[Any]:
    """A JSON value and all values in it, however deep."""
    stack = [value]
    while stack:
        one = stack.pop()
        yield one
        if isinstance(one, Mapping):
            stack += one.values()
        elif isinstance(one, list):
            stack += one


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, without the keys of objects."""
    return (one for one in _parts(value) if isinstance(one, str))


def _auto_maps(configs: Iterable[Any]) -> Iterator[str]:
    """The classes that ``auto_map`` names anywhere in ``configs``."""
    for config in configs:
        for part in _parts(config):
            if isinstance(part, Mapping) and "auto_map" in part:
                yield from _texts(part["auto_map"])


def never_copied(name: str) -> bool:
    """Whether a file of a pipeline is not copied, by its name: pickles, weights of other libraries, the state of a training, and a
    single file of weights beside the components.
    """
    base = name.rpartition("/")[2]
    kept = base == "scheduler_config.json" or base.endswith(".py")  # a pipeline's own code is data here
    return (_NEVER.fullmatch(base) is not None and not kept) or (
        "/" not in name and _WEIGHTS.fullmatch(base) is not None
    )
