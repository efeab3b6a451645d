"""What a fold leaves behind: :class:`FoldRecord`, frozen and JSON-able."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import Any

from ._version import __version__
from .adapter import OFTAdapter

__all__ = ["AdapterInfo", "FoldRecord", "ModuleRecord", "versions"]


def versions() -> dict[str, str]:
    """Versions of what took part in a fold, those of its libraries that are installed."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:  # reading packages' metadata takes longer than folding a small layer
    found = {"oftsurgery": __version__, "python": platform.python_version()}
    for name in ("torch", "bitsandbytes", "peft", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that was folded.

    Attributes:
        source: folder, repository or live adapter name.
        dialect: see :data:`oftsurgery.adapter.DIALECTS`.
        fingerprint: ``xxh3:…`` of all that it computes.
        sha256: of its file of tensors, where it came from a file.
        base_model: the base that its config names.
        peft_version: the release that its config names.
    """

    source: str | None
    dialect: str
    fingerprint: str
    sha256: str | None
    base_model: str | None
    peft_version: str | None

    @classmethod
    def of(cls, adapter: OFTAdapter) -> AdapterInfo:
        config = adapter.config
        return cls(
            source=adapter.source,
            dialect=adapter.dialect,
            fingerprint=adapter.fingerprint,
            sha256=adapter.sha256,
            base_model=config.get("base_model_name_or_path"),
            peft_version=config.get("peft_version"),
        )


@dataclass(frozen=True)
class ModuleRecord:
    """One module's fold.

    Attributes:
        format: how the weight is stored, before and after: ``"nf4"``, ``"nf4 (double quantisation)"``, ``"int8"``,
            ``"bfloat16"`` …
        side: of the weight that the rotation is on.
        block_size: of each rotation of the chain.
        error: relative Frobenius error of storing the rotated weight, ``‖stored - exact‖ / ‖exact‖``.
        defect: largest ``‖RᵀR - I‖₂`` of the chain's rotations.
        angle: largest rotation angle of the chain's rotations, radians.
        before: content hash of the stored weight before the fold.
        after: and after it.
        untied: the weight was shared with another module, and is no more.
        backend: what computed the fold, a key of :func:`oftsurgery.backends`.
        rounding: how this weight was rounded; ``"nearest"`` where the mode that was asked for has no part in its format.
        nearest: what ``error`` would have been with plain rounding; None where it was not measured.
        rho: ``‖stored - exact‖ / ‖exact - base‖``, the rounding beside what the adapter changed; None where that is
            nothing, or it was not measured.
        output_error: ``‖X(stored - exact)ᵀ‖ / ‖X exactᵀ‖`` over calibration inputs X; None without any.
        output_nearest: what ``output_error`` would have been with plain rounding.
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
    output_error: float | None = None
    output_nearest: float | None = None


@dataclass(frozen=True)
class FoldRecord:
    """What was folded into what, and what it cost.

    Attributes:
        adapters: in the live order.
        modules: ``{module path: ModuleRecord}``.
        saved: ``{tensor name: content hash before}`` of what the adapters' trained biases and ``modules_to_save``
            replaced; None for a bias that was trained in place, whose original nobody has.
        rounding: how quantised weights were to be rounded; each module's record says how it was.
        base: on disk, how a plain source was quantised first (``quantize``) and which weights were rotated
            (``fold_into``); empty in memory.
        versions: of the libraries that took part.
        earlier: records of the folds that the model already carried, oldest first.
    """

    adapters: tuple[AdapterInfo, ...]
    modules: Mapping[str, ModuleRecord]
    saved: Mapping[str, str | None] = field(default_factory=dict)
    rounding: str = "nearest"
    base: Mapping[str, str | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    earlier: tuple[FoldRecord, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(self, "saved", MappingProxyType(dict(self.saved)))
        object.__setattr__(self, "base", MappingProxyType(dict(self.base)))
        object.__setattr__(self, "versions", MappingProxyType(dict(self.versions)))

    @property
    def worst(self) -> tuple[str, ModuleRecord] | None:
        """The module with the largest error, or None for an empty fold."""
        return max(self.modules.items(), key=lambda item: item[1].error, default=None)

    def fingerprints(self) -> set[str]:
        """Of all adapters that the model carries, this record's and the earlier ones'."""
        mine = {a.fingerprint for a in self.adapters}
        return mine.union(*(r.fingerprints() for r in self.earlier)) if self.earlier else mine

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "adapters": [asdict(a) for a in self.adapters],
            "modules": {path: {**asdict(m), "block_size": list(m.block_size)} for path, m in self.modules.items()},
            "saved": dict(self.saved),
            "rounding": self.rounding,
            "base": dict(self.base),
            "versions": dict(self.versions),
            "earlier": [r.to_dict() for r in self.earlier],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FoldRecord:
        """Mirror of :meth:`to_dict`."""
        return cls(
            adapters=tuple(AdapterInfo(**a) for a in data["adapters"]),
            modules={
                path: ModuleRecord(**{**m, "block_size": tuple(m["block_size"])}) for path, m in data["modules"].items()
            },
            saved=data["saved"],
            rounding=data["rounding"],
            base=data["base"],
            versions=data["versions"],
            earlier=tuple(cls.from_dict(r) for r in data["earlier"]),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldRecord:
        return self  # frozen; a mapping proxy cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (FoldRecord.from_dict, (self.to_dict(),))
