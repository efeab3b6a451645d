""":func:`carried_from` says which files of a model's folder go along with its weights: those that loading the model reads, as the
folder's own index files name them.

All of them are data here: nothing is imported or run, JSON and the text of Python files are read for names alone.
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

from .checkpoint import CONFIG, LAYOUTS
from .reading import inside, is_nested_name, is_plain_name, read_json_value

#: kinds of files that loaders read: configs, vocabularies, templates; and the terms that go with a model
_DATA = re.compile(
    r"(?i:.*\.(json|txt|model|spm|jinja|tiktoken|vocab|bpe|codes|tokenizer)|.*\.model\.v\d+\w*"
    r"|(licen[cs]e|notice|copying|copyright|use_policy|acceptable_use).*)",
    re.DOTALL,
)
#: what stays behind, whoever names it
_NEVER = re.compile(
    r"\..*|adapter_.*"  # what belongs to a place, or to an adapter
    r"|(?i:.*\.(bin|pth?|ckpt|pkl|pickle|joblib|dill|npz|h5|keras|msgpack|pb|tflite|onnx|gguf|ot|undo))"  # other weights
    r"|(?i:.*\.(bin|h5|msgpack)\.index\.json)"
    r"|(?i:(optimizer|scheduler|rng_state|random_states|training_args).*)"  # the state of a training
    r"|(?i:trainer_state\.json|(all|train|eval|predict|test)_results\.json)"
    r"|(?i:.*\.(py|pyc|so|dll|dylib|exe|sh|bat))",  # code, which is taken by its name alone
    re.DOTALL,
)
_WEIGHTS = re.compile(r"(?i:.*\.safetensors(\.index\.json)?)", re.DOTALL)
_PICKLE = "pytorch_model.bin"  # of a module's weights
_TEMPLATE = re.compile(r".*\.jinja", re.DOTALL)
#: what is written anew
_ANEW = (CONFIG, "README.md", "oftsurgery.json")

_MAX_FILES = 512
_MAX_NAMED = 4096  # files that an index names one by one
_MAX_LISTED = 100  # names of what stays behind
_MAX_DEPTH = 8
_MAX_BYTES = 1 << 30  # of a file that holds no weights
_MAX_INDEX_BYTES = 4 << 20  # of a file that is read for names

_REPAIR = "do not use this checkpoint, or repair its index files"


@dataclass(frozen=True)
class Carried:
    """What goes along with a model's weights.

    Attributes:
        files: ``{name in the new folder: file that is copied}``; names lead through folders by ``/``.
        code: names of those that are Python code.
        left_out: names of the folder's other files, and of folders that nothing names.
        lost: ``{name: why}`` of files that loading the whole model reads, and that stay behind.
        tokenizer: whose tokenizer it is: ``"base"``, ``"adapter"``, ``"other"``; None where there is none, or nobody chose.
        chat_template: whose chat templates, likewise.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: str | None = None

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def carried_from(folder: Path, weights: Collection[str] = ()) -> Carried:
    """What goes along with the weights of the model in ``folder``: files of known kinds in the folder itself, and what its
    index files name.

    ============================================  ====================================================================
    index                                         names
    ============================================  ====================================================================
    ``modules.json``, ``router_config.json``,     folders of sentence-transformers' modules, with their own weights, and
    a ``config.json`` with ``types``              the modules' code
    ``auto_map`` in any ``*config.json``          files of code, and those that they import from beside them
    texts in any ``*config.json``                 files with other endings, as a tokenizer's ``vocab_file``
    ``speaker_embeddings_path.json``              Bark's voices
    ============================================  ====================================================================

    transformers finds ``additional_chat_templates``, ``custom_generate`` and the folders of a processor's further tokenizers by
    these names.

    Args:
        weights: names of the files that hold the model's own weights.

    Raises:
        CheckpointError: an index names a place outside the folder, a link leaves it, or too many files would go along.
    """
    walk = _Walk(folder, {*weights, *_ANEW, *(name for layout in LAYOUTS for name in layout.names)})
    walk.visit("")
    left_out = walk.left_out()
    if len(left_out) > _MAX_LISTED:
        left_out = [*left_out[:_MAX_LISTED], f"… and {len(left_out) - _MAX_LISTED} more"]
    return Carried(dict(sorted(walk.files.items())), tuple(sorted(walk.code)), tuple(left_out), walk.lost)


def missing_in(folder: Path) -> list[str]:
    """What the index files in ``folder`` name and the folder lacks, as the Hub's client takes patterns of names."""
    walk = _Walk(folder, set())
    walk.visit("")
    return walk.missing[:_MAX_FILES]


class _Walk:
    """A walk through a model's folder.

    Attributes:
        files: ``{name: path}`` of what goes along.
        code: names of those that are code.
        lost: ``{name: why}`` of those that should and cannot.
        missing: patterns of what is named and is not there.
    """

    def __init__(self, root: Path, own: Collection[str]) -> None:
        self.root, self.own = root, own
        self.files: dict[str, Path] = {}
        self.code: set[str] = set()
        self.lost: dict[str, str] = {}
        self.missing: list[str] = []
        self._visited: set[str] = set()
        self._seen: list[str] = []  # files of visited folders, and folders with a / at the end

    def left_out(self) -> list[str]:
        """Names of what was seen and does not go along."""
        used = {*self.own, *self.files, *(f"{place}/" for place in self._visited)}
        used |= {f"{name.rpartition('/')[0]}/" for name in self.files}
        return sorted(name for name in self._seen if name not in used)

    def visit(self, place: str, *, module: bool = False, kinds: re.Pattern[str] = _DATA) -> None:
        """Take what goes along from the folder ``place`` (``""`` is the model's own) and from those that it names.

        Args:
            module: the folder is that of a module with weights of its own.
            kinds: names of files that are taken.
        """
        if place in self._visited:
            return
        self._visited.add(place)
        if place.count("/") >= _MAX_DEPTH:
            raise CheckpointError("the index files name folders within folders", path=self.root / place, remedy=_REPAIR)
        files, folders = self._look(place)
        configs = [value for n in files if n.endswith("config.json") for value in [self._json(_join(place, n))]]
        named = {text for value in configs for text in _texts(value)}
        for name in files:
            weights = module and _WEIGHTS.fullmatch(name)
            if weights or ((kinds.fullmatch(name) or name in named) and not _WEIGHTS.fullmatch(name)):
                self._take(_join(place, name), weights=bool(weights))
        if module:
            self._check_weights(place, files)
        for reference in _auto_maps(configs):
            self._take_class(place, reference)
        self._visit_modules(place, files)
        self._take_voices(place, files)
        self._visit_known(place, folders)

    def _visit_known(self, place: str, folders: Collection[str]) -> None:
        """Visit the folders that transformers finds by their names."""
        if "custom_generate" in folders:
            self._take_code(_join(place, "custom_generate/generate"))
            self._take_plain(_join(place, "custom_generate/requirements.txt"))
        if "additional_chat_templates" in folders:
            self.visit(_join(place, "additional_chat_templates"), kinds=_TEMPLATE)
        for name in folders:
            if name.endswith("tokenizer"):
                self.visit(_join(place, name))

    # --- what there is ---

    def _look(self, place: str) -> tuple[list[str], list[str]]:
        """Names of the plain files and of the folders in ``place``, without hidden ones."""
        folder = self.root / place
        if not folder.is_dir():
            return [], []
        if not folder.resolve().is_relative_to(self.root.resolve()):
            message = "a folder of the checkpoint is a link that leaves it"
            raise CheckpointError(message, path=folder, remedy="do not use this checkpoint, or copy the folder into it")
        there = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        files = [p.name for p in there if p.is_file()]
        folders = [p.name for p in there if p.is_dir()]
        self._seen += [_join(place, name) for name in files] + [f"{_join(place, name)}/" for name in folders]
        return files, folders

    def _json(self, name: str) -> Any:
        """The contents of an index; None where they cannot be read: such a file names nothing to its loaders either."""
        with suppress(CheckpointError):
            return read_json_value(inside(self.root, name, nested=True), limit=_MAX_INDEX_BYTES)
        return None

    # --- taking ---

    def _take(self, name: str, *, weights: bool = False, code: bool = False, most: int = _MAX_FILES) -> None:
        base = name.rpartition("/")[2]
        if name in self.files or name in self.own or (_NEVER.fullmatch(base) and not code) or base in _ANEW[1:]:
            return
        path = inside(self.root, name, nested=True)
        if not weights and path.stat().st_size > _MAX_BYTES:
            self.lost[name] = f"it holds {path.stat().st_size} bytes, and at most {_MAX_BYTES} go along"
            return
        if len(self.files) >= most:
            message = f"more than {most} files would go along with the weights"
            raise CheckpointError(message, path=path.parent, remedy="remove the files that do not belong to the model")
        self.files[name] = path

    def _take_plain(self, name: str, most: int = _MAX_FILES) -> None:
        """Take a file that is named by itself, if it is there."""
        if os.path.lexists(self.root / name):
            self._take(name, most=most)
        else:
            self.missing.append(name)

    def _check_weights(self, place: str, files: Collection[str]) -> None:
        if any(_WEIGHTS.fullmatch(n) for n in files):
            return
        self.missing.append(f"{place}/*.safetensors*")
        if _PICKLE in files:
            self.lost[_join(place, _PICKLE)] = "a pickle, which could run code when read"

    # --- model code ---

    def _take_class(self, place: str, reference: str) -> None:
        """Take the code of a class that a config names: ``file.Class``; ``owner/name--file.Class`` lies elsewhere."""
        module, _, name = reference.partition(".")
        if "--" not in reference and "." not in name and name and module:
            self._take_code(_join(place, module))

    def _take_code(self, module: str) -> None:
        """Take a file of code, and what it imports from beside it, as transformers looks for that."""
        name = f"{module}.py"
        if name in self.code or not is_nested_name(name) or any(part.startswith(".") for part in name.split("/")):
            return
        if not os.path.lexists(self.root / name):
            self.missing.append(name)
            return
        self.code.add(name)
        self._take(name, code=True, most=_MAX_NAMED)
        path = inside(self.root, name, nested=True)
        if path.stat().st_size > _MAX_INDEX_BYTES:
            self.lost[name] = f"code of more than {_MAX_INDEX_BYTES} bytes is not read for what it imports"
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        for imported in re.findall(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", text, re.MULTILINE):
            self._take_code(_join(module.rpartition("/")[0], "".join(imported)))

    # --- sentence-transformers ---

    def _visit_modules(self, place: str, files: Collection[str]) -> None:
        """Visit the folders of the modules that an index of sentence-transformers names."""
        found: list[tuple[object, object]] = []
        if "modules.json" in files:
            value = self._json(_join(place, "modules.json"))
            rows = [row for row in (value if isinstance(value, list) else []) if isinstance(row, Mapping)]
            found += [(row.get("path"), row.get("type")) for row in rows]
        for name in ("router_config.json", "config.json"):
            value = self._json(_join(place, name)) if name in files else None
            types = value.get("types") if isinstance(value, Mapping) and "structure" in value else None
            found += types.items() if isinstance(types, Mapping) else []
        for path, kind in found:
            inner = self._module_folder(place, path)
            # the class is looked for beside modules.json, and saved in the module's own folder
            for where in {"", inner} if isinstance(kind, str) and not kind.startswith("sentence_transformers.") else ():
                self._take_class(where, str(kind))
            if inner and inner != place:
                self.visit(inner, module=True)

    def _module_folder(self, place: str, path: object) -> str:
        """The folder of a module, from what an index names."""
        if not isinstance(path, str):
            return ""
        parts = [part for part in path.split("/") if part != "."]
        if path and (path.startswith("/") or not all(is_plain_name(p) for p in parts[: len(parts) - (not parts[-1])])):
            message = f"an index file names a folder outside the checkpoint's: {printable(path)}"
            raise CheckpointError(message, path=self.root / place, remedy=_REPAIR)
        if any(part.startswith(".") for part in parts):
            message = f"an index file names a hidden folder as a module's: {printable(path)}"
            raise CheckpointError(message, path=self.root / place, remedy=_REPAIR)
        return "/".join(filter(None, [place, *parts]))

    def _take_voices(self, place: str, files: Collection[str]) -> None:
        if "speaker_embeddings_path.json" not in files:
            return
        for text in _texts(self._json(_join(place, "speaker_embeddings_path.json"))):
            if text.endswith(".npy") and is_nested_name(text) and not text.startswith("."):
                self._take_plain(_join(place, text), most=_MAX_NAMED)


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def _parts(value: Any) -> Iterator[Any]:
    """All values in a JSON value, itself among them, however deep."""
    stack = [value]
    while stack:
        one = stack.pop()
        yield one
        if isinstance(one, Mapping):
            stack += one.values()
        elif isinstance(one, list):
            stack += one


def _texts(value: Any) -> Iterator[str]:
    return (one for one in _parts(value) if isinstance(one, str))


def _auto_maps(configs: Iterable[Any]) -> Iterator[str]:
    """The classes that ``auto_map`` names, anywhere in ``configs``."""
    for config in configs:
        for part in _parts(config):
            if isinstance(part, Mapping) and "auto_map" in part:
                yield from _texts(part["auto_map"])
