"""The model card: which adapters were folded, what the fold cost, how to load the model and how to undo the fold.

oftsurgery writes its section between two marks, which are HTML comments. People write around the marks: an existing
card is amended between the marks alone. Existing metadata stay too, except those that oftsurgery wrote. The text is a
function of the record and the files beside it, and holds no dates and no paths.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from oftsurgery.errors import CheckpointError, StateError, needs, printable, share
from oftsurgery.files.reading import inside
from oftsurgery.formats.all_formats import FORMATS

from .advice import Case, remedies
from .record import FoldRecord

__all__ = [
    "CARD",
    "base_metadata",
    "for_repository",
    "merged",
    "own_card",
    "read_card",
    "section",
    "with_section",
    "without_section",
    "written_card",
]

CARD = "README.md"
BEGIN = "<!-- oftsurgery: what follows is written anew by each export; write above or below it -->"
END = "<!-- oftsurgery: end -->"

_MAX_BYTES = 4 << 20

# metadata that a new card takes over from the base's card
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LOAD = "## How to load it"
_PICTURES = {
    "errors.png": "Error of storing each rotated weight, layers by kinds of modules",
    "angles.png": "Largest rotation angle of each module, layers by kinds of modules",
}
# the outputs of a tokenizer
_TOKENIZED = {"input_ids", "attention_mask", "token_type_ids"}
# tags that name the format, which another export may change
_BITS = {name: f"{8 // kind.codes_per_element}-bit" for name, kind in FORMATS.items() if kind.quantised}
#: other packages' formats that a fold keeps, as ``quant_method`` and the Hub's tags name them
_PACKAGES = ("hqq", "compressed-tensors", "fp8", "fbgemm_fp8")
_FORMAT_TAGS = frozenset({"bitsandbytes", "onnx", *_BITS, *_BITS.values(), *_PACKAGES})
_OURS = ("base_model_relation", "library_name")
#: end of an architecture's name → the class that loads it, and the Hub's name of its task
_TASKS: Mapping[str, tuple[str | None, str | None]] = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),
    "ForImageClassification": (None, "image-classification"),
}
_GENERATES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def written_card(
    source: Path | None, record: FoldRecord | None, config: Mapping[str, Any], files: Collection[str], *, exact: bool
) -> str | None:
    """The card of an export.

    Args:
        source: folder of the checkpoint that was folded, or None. A card that oftsurgery wrote is amended; of another
            card, which is the base's own, only licence, languages and task are kept.
        record: record of the export; None if nothing is folded in any more.
        config: the export's ``config.json``.
        files: names of the export's files.
        exact: whether the fold can be undone exactly with the base.

    Returns:
        the text, or None if there is nothing to say.

    Raises:
        CheckpointError: the card to amend cannot be read.
    """
    there = own_card(source)
    if record is None:
        return without_section(there) if there is not None else None
    facts = metadata(record, config, files) | (base_metadata(source) if there is None else {})
    return with_section(there, section(record, config, files, exact=exact), facts, _title(record))


def own_card(folder: Path | None) -> str | None:
    """The card in ``folder``, if oftsurgery wrote into it; otherwise None.

    Raises:
        CheckpointError: oftsurgery wrote into the card, and the card cannot be read.
    """
    if folder is None or not (folder / CARD).is_file():
        return None
    path = inside(folder, CARD)
    if path.stat().st_size > _MAX_BYTES or BEGIN.encode() not in path.read_bytes():
        return None
    text = read_card(folder)
    _parse(text)
    return text


def metadata(record: FoldRecord, config: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """The metadata of the card's YAML block."""
    oldest = (*record.earlier, record)[0]
    bases = dict.fromkeys(a.base_model for a in oldest.adapters if a.base_model and a.base_model.count("/") == 1)
    onnx, gguf = (any(name.endswith(end) for name in files) for end in (".onnx", ".gguf"))
    stored = _onnx_facts(record, "quantized", {}).values() if onnx else [m.format for m in record.modules.values()]
    quantised = {str(label).partition(" ")[0] for label in stored} & _BITS.keys()
    architecture = _architecture(config)
    found = {
        "base_model": next(iter(bases), None),
        "base_model_relation": ("quantized" if quantised else "merge") if bases else None,
        "library_name": _library(config, files),
        "pipeline_tag": _task(architecture)[1],
        "tags": ["oft", "oftsurgery", *sorted(quantised), *(["bitsandbytes"] if quantised and not onnx else [])]
        + sorted({_BITS[name] for name in quantised})
        + [m for m in [_method(config)] if m in _PACKAGES and not onnx]
        + ["onnx"] * onnx
        + ["gguf"] * gguf,
    }
    return {key: value for key, value in found.items() if value is not None}


def _method(config: Mapping[str, Any]) -> str | None:
    """``quant_method`` of the config; None for plain weights."""
    settings = config.get("quantization_config")
    return str(settings.get("quant_method", "bitsandbytes")) if isinstance(settings, Mapping) else None


def _package(config: Mapping[str, Any]) -> str | None:
    """The package that transformers needs to load the quantised weights."""
    method = _method(config)
    return None if method is None or method.endswith("fp8") else method


def _library(config: Mapping[str, Any], files: Collection[str]) -> str | None:
    if any(name.endswith(".onnx") for name in files):
        return "onnx"
    if "modules.json" in files:
        return "sentence-transformers"
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if "model_type" in config else None


def base_metadata(folder: Path | None) -> dict[str, Any]:
    """Licence, languages and task from the card in a base's folder, as far as the card has them; nothing from a card that
    cannot be read.
    """
    if folder is None or not (folder / CARD).is_file():
        return {}
    try:
        data = _parse(read_card(folder)).data.to_dict()
    except CheckpointError:
        return {}

    def plain(value: object) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))

    return {key: data[key] for key in _INHERITED if plain(data.get(key))}


# --- joining texts ----------------------------------------------------------------------------------------------------


def with_section(text: str | None, new: str, facts: Mapping[str, Any], title: str) -> str:
    """``text`` with ``new`` between its marks, or at its end if it has no marks, and with ``facts`` in its metadata; for
    None a new card.
    """
    card = _parse(text or "")
    parts = _split(card.text)
    known = parts is not None
    head = f"\n# {title}\n\n" if text is None else card.text.rstrip() + "\n\n"
    before, _, after = parts or (head, "", "\n")
    card.text = before + new + after
    for key, value in facts.items():
        if key == "tags":
            there = card.data.get("tags") or []
            kept = [t for t in there if not (known and t in _FORMAT_TAGS)] if isinstance(there, list) else [there]
            card.data["tags"] = list(dict.fromkeys([*kept, *value])) or None
        elif key not in card.data or card.data[key] is None or (known and key in _OURS):
            card.data[key] = value
    return str(card)


def without_section(text: str) -> str | None:
    """``text`` without the marked section, or None if people wrote nothing else."""
    card = _parse(text)
    parts = _split(card.text)
    if parts is None:
        return text
    card.text = parts[0] + parts[2]
    if not _peoples_text(card.text):
        return None
    card.data["tags"] = [
        t for t in card.data.get("tags") or [] if t not in _FORMAT_TAGS | {"oft", "oftsurgery"}
    ] or None
    card.data["base_model_relation"] = None
    return str(card)


def merged(mine: str, theirs: str) -> str:
    """The card to push: oftsurgery's section from the folder's card, and people's text from the card that has some.

    Raises:
        StateError: both cards have people's text, and the texts differ.
        CheckpointError: a card cannot be read.
    """
    card, there = _parse(mine), _parse(theirs)
    parts, others = _split(card.text), _split(there.text)
    if parts is None:
        return mine
    before, new, after = parts
    own, foreign = _peoples_text(before + after), _peoples_text(there.text if others is None else others[0] + others[2])
    if own and foreign and own != foreign:
        raise StateError(
            "people wrote into the card in the folder and into the card in the repository, and the texts differ",
            remedy=f"bring both texts together around the marked section of the folder's {CARD}, and in the repository's {CARD}",
        )
    if own or not foreign:
        return with_section(mine, new, there.data.to_dict() | {"tags": card.data.get("tags") or []}, "")
    return with_section(theirs, new, card.data.to_dict(), "")


def for_repository(text: str, repo_id: str, revision: str | None = None, *, pictures: Collection[str] = ()) -> str:
    """``text`` with a repository's name in place of the local folder, and with pictures of the fold's cost."""
    card = _parse(text)
    parts = _split(card.text)
    if parts is None:
        return text
    before, new, after = parts
    where = f'"{repo_id}"' + (f', revision="{revision}"' if revision is not None else "")
    new = new.replace(
        'folder = "."', f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({where})"
    )
    for loads in ("from_pretrained", "SentenceTransformer"):
        new = new.replace(f'{loads}("."', f"{loads}({where}")
    new = new.replace(" unfold . ", f" unfold {repo_id} ")
    shown = "".join(f"![{_PICTURES.get(name, name)}]({name})\n\n" for name in pictures)
    card.text = before + new.replace(_LOAD, shown + _LOAD, 1) + after
    return str(card)


def read_card(folder: Path) -> str:
    """The text of the card in ``folder``."""
    path = inside(folder, CARD)
    if path.stat().st_size > _MAX_BYTES:
        message = f"the card has {path.stat().st_size} bytes, more than the limit of {_MAX_BYTES}"
        raise CheckpointError(message, path=path, remedy="shorten the card")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("the card is no UTF-8 text", path=path, remedy="save the card as UTF-8") from error


def _parse(text: str) -> Any:
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard
    from yaml import YAMLError

    # one kind of line ends, because otherwise the metadata's line ends would change with each amendment
    text = text.replace("\r\n", "\n")
    # ModelCard rewrites evaluation results; RepoCard keeps everything that others wrote
    kind = RepoCard if text else ModelCard
    try:
        return kind(text if REGEX_YAML_BLOCK.search(text) else f"---\n\n---\n{text}")
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the card's metadata cannot be read ({printable(error)})", remedy=f"correct the YAML at the top of {CARD}"
        ) from error


def _split(text: str) -> tuple[str, str, str] | None:
    """The text before the marked section, the section, and the text after it; None for a text without the section."""
    start, end = text.find(BEGIN), text.rfind(END) + len(END)
    return None if start < 0 or end < start + len(END) else (text[:start], text[start:end], text[end:])


def _peoples_text(text: str) -> str:
    """The text that people wrote; a single heading does not count."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "" if len(lines) <= 1 and all(line.startswith("# ") for line in lines) else "\n".join(lines)


# --- the section ------------------------------------------------------------------------------------------------------


def section(record: FoldRecord, config: Mapping[str, Any], files: Collection[str], *, exact: bool) -> str:
    """The section of oftsurgery, with its marks."""
    architecture = _architecture(config)
    model = (_task(architecture)[0] or architecture) if "model_type" in config else ""
    words = {"input_ids"} <= {*map(str, _onnx_facts(record, "inputs", []))} <= _TOKENIZED
    tokenizer = "tokenizer_config.json" in files
    text = _template().render(
        begin=BEGIN,
        end=END,
        load=_LOAD,
        folds=(*record.earlier, record),
        graph=min((name for name in files if name.endswith(".onnx")), default=None),
        gguf=min((name for name in files if name.endswith(".gguf")), default=None),
        runs=words and tokenizer,
        model=model,
        tokenizer=tokenizer,
        generates=model in _GENERATES,
        package=_package(config),
        modules="modules.json" in files,
        code=record.code,
        trust=", trust_remote_code=True" if record.code else "",
        exact=exact,
    )
    return str(text)


@cache
def _template() -> Any:
    with needs("jinja2", "pip install jinja2"):
        import jinja2
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)  # noqa: S701 - text from files is escaped for Markdown
    environment.filters |= {
        "code": _code,
        "escaped": _escaped,
        "median": statistics.median,
        "share": share,
        "remedies": _remedies,
    }
    text = resources.files(__package__) / "card.md.jinja"
    return environment.from_string(text.read_text(encoding="utf-8"))


def _remedies(fold: FoldRecord) -> list[tuple[str, str]]:
    """What helps where a fold keeps too little of its adapter, and the call or the command that does it; best first."""
    case = Case.of_record(fold)
    return [] if case is None else [(remedy.what, remedy.call) for remedy in remedies(case, commands=True)]


def _task(architecture: str) -> tuple[str | None, str | None]:
    return next((task for end, task in _TASKS.items() if architecture.endswith(end)), (None, None))


def _title(record: FoldRecord) -> str:
    oldest = (*record.earlier, record)[0]
    base = next((a.base_model for a in oldest.adapters if a.base_model), None)
    names = [a.source for fold in (*record.earlier, record) for a in fold.adapters]
    parts = [str(n).rstrip("/").rpartition("/")[2] for n in (base, *names) if n]
    return " + ".join(map(_escaped, parts)) or "Folded model"


def _onnx_facts(record: FoldRecord, name: str, default: Any) -> Any:
    """A field of the record's section on an ONNX graph."""
    facts = record.extra.get("onnx")
    found = facts.get(name) if isinstance(facts, Mapping) else None
    return found if isinstance(found, type(default)) else default


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return first if isinstance(first, str) and first.isidentifier() and first.isascii() else ""


def _code(text: object) -> str:
    """``text`` from an untrusted file, as code in a table; an empty string for None."""
    if text is None:
        return ""
    shown = printable(text)
    plain = all(ch.isalnum() or ch in " ._-/+:=,()×…" for ch in shown)
    return f"`{shown}`" if plain and shown.strip() else f"<code>{_escaped(shown)}</code>"


def _escaped(text: object) -> str:
    """``text`` from an untrusted file, escaped so that Markdown and HTML show it unchanged."""
    return "".join(ch if ch.isalnum() or ch in " .-/+:,()" else f"&#{ord(ch)};" for ch in printable(text))
