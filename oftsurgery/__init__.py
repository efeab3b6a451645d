"""Surgery on models that were fine-tuned with Orthogonal Fine-Tuning (OFT, OFTv2, QOFT) adapters over bitsandbytes-quantised weights.

>>> import oftsurgery
>>> folded = oftsurgery.fold(model, "my-qoft-adapter")  # doctest: +SKIP
>>> folded.oftsurgery.worst                             # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .adapter import DIALECTS, Cayley, OFTAdapter, Rotation
    from .api import fold, load_adapter, unfold
    from .codecs import EncodedWeight, WeightFormat
    from .compare import OutputError, VerifyReport, verify
    from .errors import (
        AdapterError,
        BackendWarning,
        DialectError,
        FormatError,
        IntegrityError,
        MatchError,
        MissingDependencyError,
        NonFiniteError,
        OFTSurgeryError,
        RoundingWarning,
        ShapeError,
        StateError,
        UnfoldWarning,
        UntieWarning,
    )
    from .kernels import backends, use_backend
    from .record import AdapterInfo, FoldRecord, ModuleRecord
    from .weight import fold_weight, unfold_weight

__all__ = [
    "DIALECTS",
    "AdapterError",
    "AdapterInfo",
    "BackendWarning",
    "Cayley",
    "DialectError",
    "EncodedWeight",
    "FoldRecord",
    "FormatError",
    "IntegrityError",
    "MatchError",
    "MissingDependencyError",
    "ModuleRecord",
    "NonFiniteError",
    "OFTAdapter",
    "OFTSurgeryError",
    "OutputError",
    "Rotation",
    "RoundingWarning",
    "ShapeError",
    "StateError",
    "UnfoldWarning",
    "UntieWarning",
    "VerifyReport",
    "WeightFormat",
    "__version__",
    "backends",
    "fold",
    "fold_weight",
    "load_adapter",
    "unfold",
    "unfold_weight",
    "use_backend",
    "verify",
]

# module → what it gives: a name is imported at its first use, so that the command line can answer `--help` without torch
_EXPORTS = {
    "adapter": ("Cayley", "DIALECTS", "OFTAdapter", "Rotation"),
    "api": ("fold", "load_adapter", "unfold"),
    "codecs": ("EncodedWeight", "WeightFormat"),
    "compare": ("OutputError", "VerifyReport", "verify"),
    "errors": (
        "AdapterError",
        "BackendWarning",
        "DialectError",
        "FormatError",
        "IntegrityError",
        "MatchError",
        "MissingDependencyError",
        "NonFiniteError",
        "OFTSurgeryError",
        "RoundingWarning",
        "ShapeError",
        "StateError",
        "UnfoldWarning",
        "UntieWarning",
    ),
    "kernels": ("backends", "use_backend"),
    "record": ("AdapterInfo", "FoldRecord", "ModuleRecord"),
    "weight": ("fold_weight", "unfold_weight"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
