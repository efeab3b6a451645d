"""The record of a fold: :class:`FoldRecord`, which is frozen and has a JSON form."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from importlib import metadata
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from oftsurgery._version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

    from oftsurgery.adapters.adapter import OFTAdapter

#: a weight that keeps a smaller part of the adapter's change is reported
ENOUGH = 0.9
#: the same for a calibrated weight, by its outputs: a calibration makes the error least, and not the loss of the change
HALF = 0.5


@cache  # reading packages' metadata takes longer than folding a small layer
def versions() -> Mapping[str, str]:
    """Versions of oftsurgery, Python and the installed libraries that take part in a fold."""
    found = {"oftsurgery": __version__, "python": platform.python_version()}
    for name in ("torch", "bitsandbytes", "peft", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _number(value: Any) -> bool:
    return isinstance(value, float) or (_is(int)(value) and abs(value) < 1 << 63)


def _tuple_of(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and all(map(_is(*kinds), value))


def _mapping_to(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(_is(*kinds), value.values()))


# annotation of a field → check that a value from JSON has this type
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": _is(str),
    "str | None": _is(str, NoneType),
    "bool": _is(bool),
    "float": _number,
    "float | None": lambda value: value is None or _number(value),
    "tuple[int, ...]": _tuple_of(int),
    "tuple[str, ...]": _tuple_of(str),
    "Mapping[str, str]": _mapping_to(str),
    "Mapping[str, int]": _mapping_to(int),
    "Mapping[str, str | int]": _mapping_to(str, int),
    "Mapping[str, str | None]": _mapping_to(str, NoneType),
}
# annotation of a field that holds records → function that reads the records from JSON, with their own checks
_READERS: dict[str, Callable[[Any], Any]] = {}


class _Stored:
    """A base of dataclasses that are written as JSON and read again, by this version or another.

    Fields that only a newer version knows are kept in ``extra`` and written again; fields that an older version did not
    write have defaults. A class with a field whose annotation has no check cannot be defined.
    """

    extra: Mapping[str, Any]
    _DERIVED: ClassVar[tuple[str, ...]] = ()  # properties that are written too, for other readers

    def __init_subclass__(cls) -> None:
        several, by_path = f"tuple[{cls.__name__}, ...]", f"Mapping[str, {cls.__name__}]"
        _CHECKS.update({several: lambda _: True, by_path: lambda v: isinstance(v, Mapping)})
        _READERS[several] = lambda records: tuple(cls.from_dict(r) for r in records)
        _READERS[by_path] = lambda records: {path: cls.from_dict(r) for path, r in records.items()}
        for name, annotation in inspect.get_annotations(cls).items():
            if name != "extra" and annotation not in _CHECKS:
                raise TypeError(f"{cls.__name__}.{name}: there is no check of a value from JSON for {annotation}")

    def to_dict(self) -> dict[str, Any]:
        """The record as plain dicts, lists, strings and numbers."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}  # type: ignore[arg-type]
        derived = {name: getattr(self, name) for name in self._DERIVED}
        return {name: plain(value) for name, value in own.items()} | dict(self.extra) | derived

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The mirror of :meth:`to_dict`.

        Raises:
            TypeError: a field is missing or of another type.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"{cls.__name__} is a {type(data).__name__}, not an object")
        known = {f.name: f for f in fields(cls) if f.name != "extra"}  # type: ignore[arg-type]
        given: dict[str, Any] = {"extra": {n: v for n, v in data.items() if n not in (*known, *cls._DERIVED)}}
        for name, f in known.items():
            if name in data:
                value = tuple(data[name]) if isinstance(data[name], list) else data[name]
                if not _CHECKS[str(f.type)](value):
                    raise TypeError(f"{cls.__name__}.{name} is {str(value)[:40]!r}, not of type {f.type}")
                given[name] = _READERS.get(str(f.type), lambda v: v)(value)
            elif f.default is MISSING and f.default_factory is MISSING:
                raise TypeError(f"{cls.__name__} lacks {name!r}")
        return cls(**given)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Mapping):
                object.__setattr__(self, name, MappingProxyType(dict(value)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # the record is frozen, and a mapping proxy cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self).from_dict, (self.to_dict(),))


def plain(value: Any) -> Any:
    """Frozen dataclasses, mappings and tuples as plain dicts and lists."""
    if isinstance(value, _Stored):
        return value.to_dict()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class AdapterInfo(_Stored):
    """An adapter that was folded.

    >>> info = oftsurgery.fold(model, "ADAPTER").oftsurgery.adapters[0]
    >>> info.dialect, info.source
    ('peft-0.21', 'ADAPTER')

    Attributes:
        source: folder, repository or live adapter name.
        dialect: see :data:`oftsurgery.adapters.dialects.DIALECTS`.
        fingerprint: ``xxh3:…`` of all that the adapter computes.
        sha256: of its file of tensors, where the adapter came from a file.
        base_model: the base that its config names.
        peft_version: the release that its config names.
        strength: the strength at which the adapter was folded.
        strength_mode: how a strength other than 1 weakens the adapter, a key of :data:`oftsurgery.STRENGTH_MODES`.
        bias: for adapters of image tools, what the fold did to biases: ``"kept"`` or ``"rotated"``; else None.
        left_out: the names of embeddings of textual inversion that the adapter's file bundles, and that the caller left out.
        extra: fields of a newer version.
    """

    source: str | None
    dialect: str
    fingerprint: str
    sha256: str | None
    base_model: str | None
    peft_version: str | None
    strength: float = 1.0
    strength_mode: str = "angle"
    bias: str | None = None
    left_out: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    @classmethod
    def of(cls, adapter: OFTAdapter) -> AdapterInfo:
        config = adapter.config
        return cls(
            source=adapter.source,
            dialect=adapter.dialect,
            fingerprint=adapter.fingerprint,
            sha256=adapter.sha256,
            base_model=_named(config.get("base_model_name_or_path")),
            peft_version=_named(config.get("peft_version")),
            strength=adapter.strength,
            strength_mode=adapter.strength_mode,
            bias=adapter.bias,
            left_out=adapter.left_out,
        )


def _named(value: object) -> str | None:
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class ModuleRecord(_Stored):
    """One module's fold.

    >>> module = oftsurgery.fold(model, "ADAPTER").oftsurgery.modules["model.layers.0.self_attn.q_proj"]
    >>> module.format, module.block_size, module.error < 0.15, module.kept > 0.9
    ('nf4 (double quantisation)', (16,), True, True)

    Attributes:
        format: how the folded weight is stored: ``"nf4"``, ``"nf4 (double quantisation)"``, ``"int8"``,
            ``"bfloat16"`` …
        side: the side of the weight that the rotation is on.
        block_size: of each rotation of the chain.
        error: relative Frobenius error of storing the rotated weight, ``‖stored - exact‖ / ‖exact‖``.
        defect: largest ``‖RᵀR - I‖₂`` of the chain's rotations.
        angle: largest rotation angle of the chain's rotations, radians.
        before: content hash of the stored weight before the fold.
        after: content hash of the stored weight after the fold.
        untied: whether the weight was shared with another module before the fold.
        backend: the backend that computed the fold, a key of :func:`oftsurgery.backends`.
        rounding: how this weight was rounded; ``"nearest"`` where the mode that was asked for has no part in its format.
        nearest: what ``error`` would have been with plain rounding; None where it was not measured.
        rho: ``‖stored - exact‖ / ‖exact - base‖``, the rounding beside the adapter's change; None where the adapter
            changes nothing, or where it was not measured.
        kept: ``⟨stored - base, exact - base⟩ / ‖exact - base‖²``, how much of the adapter's change is there: 1 all of
            it, 0 nothing; None where the adapter changes nothing, or where it was not measured.
        change: ``‖exact - base‖``, Frobenius; None where it was not measured.
        relaxation: with ``"preserve"`` the factor by which the change was over-relaxed before rounding; 1 elsewhere.
        output_error: ``‖X storedᵀ - Y exactᵀ‖ / ‖Y exactᵀ‖``: how far the layer's outputs lie from its outputs in the live
            model. Y are inputs of the live model that the calibration has held out, and X the same inputs where the
            blocks before this layer are folded; X is Y where the calibration does not go block by block. None without inputs.
        output_nearest: what ``output_error`` would have been with plain rounding of this layer.
        output_kept: ``⟨X(stored - base)ᵀ, X(exact - base)ᵀ⟩ / ‖X(exact - base)ᵀ‖²``, how much of the change of the layer's
            outputs is there, where the weight is calibrated: codes that make up for each other's errors keep the
            change of the outputs, not the change of the weight.
        uncalibrated: why this weight was not calibrated, where the fold was to be; None elsewhere.
        extra: fields of a newer version.
    """

    format: str
    side: str
    block_size: tuple[int, ...]
    error: float
    defect: float
    angle: float
    before: str
    after: str
    untied: bool = False
    backend: str = "reference"
    rounding: str = "nearest"
    nearest: float | None = None
    rho: float | None = None
    kept: float | None = None
    change: float | None = None
    relaxation: float = 1.0
    output_error: float | None = None
    output_nearest: float | None = None
    output_kept: float | None = None
    uncalibrated: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    @property
    def effect_kept(self) -> float | None:
        """How much of the adapter's effect the weight holds: ``output_kept`` of a calibrated weight, else ``kept``."""
        return self.kept if self.output_kept is None else self.output_kept


@dataclass(frozen=True)
class FoldRecord(_Stored):
    """What was folded into what, and what the fold cost.

    >>> record = oftsurgery.fold(model, "ADAPTER").oftsurgery
    >>> len(record.modules), record.kept > 0.9, record.weak
    (4, True, {})
    >>> text = record.to_json()                                  # the contents of oftsurgery.json

    Attributes:
        adapters: in the live order.
        modules: ``{module path: ModuleRecord}``.
        saved: ``{tensor name: content hash before}`` of the tensors that the adapters' trained biases and
            ``modules_to_save`` replaced; None for a bias that was trained in place, whose original nobody has.
        rounding: how quantised weights were to be rounded; each module's record says how its weight was rounded.
        base: on disk, how a plain source was quantised first (``quantize``) and which weights were rotated (``fold_into``);
            where the fold changed the formats, the ``format`` of the result. Empty in memory where the formats stayed.
        versions: of the libraries that took part.
        earlier: records of the folds that the model already carried, oldest first.
        files: on disk, ``{file name: SHA-256}`` of the folder's other files, all but the card, which people edit.
        sizes: on disk, bytes of all tensors ``"before"`` and ``"after"`` the fold.
        idle: paths of layers that nobody calls, whose rotation is left out.
        added: on disk, the names of the tensors that the adapter brought and the base lacked (a head of another class).
        tokenizer: on disk, the owner of the tokenizer beside the weights: ``"base"``, ``"adapter"`` or ``"other"``; None without
            a tokenizer, and in a record of an older version.
        chat_template: on disk, the owner of the chat templates, with the same values.
        code: on disk, the names of the files of model code that were copied and not run.
        left_out: on disk, the names in the source's folder that were not copied.
        missing: paths of modules that the adapters' own configs target and the adapters lack. These modules stayed as in the
            base, since the fold was ``partial``.
        vocabulary: the number of tokens (rows of the embeddings) ``"before"`` and ``"after"`` the fold, where the adapter
            brought another number; else empty.
        calibrated_on: what a calibrated fold was calibrated on: ``texts`` is ``"given"``, with the ``fingerprint`` of the batches, or
            ``"self"``, with ``windows``, ``length`` and ``seed`` of the texts that the model wrote; else empty.
        extra: fields of a newer version.
    """

    adapters: tuple[AdapterInfo, ...]
    modules: Mapping[str, ModuleRecord]
    saved: Mapping[str, str | None] = field(default_factory=dict)
    rounding: str = "nearest"
    base: Mapping[str, str | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    earlier: tuple[FoldRecord, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    tokenizer: str | None = None
    chat_template: str | None = None
    code: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    calibrated_on: Mapping[str, str | int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _DERIVED = ("kept",)

    @property
    def worst(self) -> tuple[str, ModuleRecord] | None:
        """The module with the largest error, or None for an empty fold."""
        return max(self.modules.items(), key=lambda item: item[1].error, default=None)

    @property
    def kept(self) -> float | None:
        """How much of the adapters' change is there, over all weights: the modules' ``effect_kept``, each weighed by its change
        squared. None where no module has the figures.
        """
        of_all = [(m.effect_kept, m.change) for m in self.modules.values()]
        parts = [(kept, change**2) for kept, change in of_all if kept is not None and change is not None]
        total = math.fsum(weight for _, weight in parts)
        return math.fsum(kept * weight for kept, weight in parts) / total if total else None

    @property
    def weak(self) -> dict[str, float]:
        """``{module path: kept}`` of the modules that keep less than :data:`ENOUGH` of the adapters' change, least first; of calibrated
        modules, which hold what is nearest on the texts, those that keep less than :data:`HALF` of the outputs' change. Modules whose
        change is less than a hundredth of the largest are left out.
        """
        changes = [m.change for m in self.modules.values() if m.change is not None]
        least = max(changes, default=0.0) / 100
        found = {
            path: kept
            for path, m in self.modules.items()
            if (kept := m.effect_kept) is not None
            and kept < (HALF if m.rounding == "calibrated" else ENOUGH)
            and (m.change is None or m.change >= least)
        }
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def fingerprints(self) -> set[str]:
        """The fingerprints of all adapters that the model carries, in this record and the earlier records."""
        return {a.fingerprint for a in self.adapters}.union(*(r.fingerprints() for r in self.earlier))

    def header(self, **more: Any) -> str:
        """JSON for the metadata of safetensors files: the facts that are known before the first file is written."""
        folds = [
            [{"dialect": a.dialect, "fingerprint": a.fingerprint, "sha256": a.sha256} for a in r.adapters]
            for r in (*self.earlier, self)
        ]
        facts = {"adapters": folds[-1], "earlier": folds[:-1], "rounding": self.rounding, "versions": self.versions}
        return json.dumps(plain(facts) | more, sort_keys=True, ensure_ascii=False)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)


def joined(records: Mapping[str, FoldRecord]) -> FoldRecord:
    """The records of a pipeline's models as one record, with the components' names in front of paths, tensors and files."""
    first = next(iter(records.values()))

    def named(field: str, sep: str = ".") -> dict[str, Any]:
        parts = {component: getattr(record, field) for component, record in records.items()}
        return {f"{component}{sep}{name}": value for component, part in parts.items() for name, value in part.items()}

    adapters = {a.fingerprint: a for record in records.values() for a in record.adapters}
    sizes = [record.sizes for record in records.values() if record.sizes]
    return replace(
        first,
        adapters=tuple(adapters.values()),
        modules=named("modules"),
        saved=named("saved"),
        files=named("files", "/"),
        sizes={name: sum(part.get(name, 0) for part in sizes) for name in (sizes[0] if sizes else {})},
        idle=tuple(f"{c}.{path}" for c, record in records.items() for path in record.idle),
        added=tuple(f"{c}.{path}" for c, record in records.items() for path in record.added),
        missing=tuple(f"{c}.{path}" for c, record in records.items() for path in record.missing),
    )
