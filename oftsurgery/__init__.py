"""Surgery on models that were fine-tuned with Orthogonal Fine-Tuning (OFT, OFTv2, QOFT) adapters over bitsandbytes-quantised weights.

>>> import oftsurgery
>>> folded = oftsurgery.fold(model, "my-qoft-adapter")  # doctest: +SKIP
>>> folded.oftsurgery.worst                             # doctest: +SKIP
"""

from ._version import __version__
from .adapter import DIALECTS, Cayley, OFTAdapter, Rotation
from .api import export_safetensors, fold, fold_checkpoint, load_adapter, unfold, unfold_checkpoint, verify_checkpoint, wrap
from .checks import CheckpointReport, WeightCheck
from .codecs import EncodedWeight, WeightFormat
from .compare import OutputError, VerifyReport, verify
from .diagnosis import Finding, doctor
from .errors import (
    AdapterError,
    CheckpointError,
    DialectError,
    DiskError,
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
from .live import dispatch_bnb_4bit, dispatch_bnb_8bit
from .record import AdapterInfo, FoldRecord, ModuleRecord
from .weight import fold_weight, unfold_weight

__all__ = [
    "DIALECTS",
    "AdapterError",
    "AdapterInfo",
    "Cayley",
    "CheckpointError",
    "CheckpointReport",
    "DialectError",
    "DiskError",
    "EncodedWeight",
    "Finding",
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
    "WeightCheck",
    "WeightFormat",
    "__version__",
    "dispatch_bnb_4bit",
    "dispatch_bnb_8bit",
    "doctor",
    "export_safetensors",
    "fold",
    "fold_checkpoint",
    "fold_weight",
    "load_adapter",
    "unfold",
    "unfold_checkpoint",
    "unfold_weight",
    "verify",
    "verify_checkpoint",
    "wrap",
]
