"""Surgery on models that were fine-tuned with Orthogonal Fine-Tuning (OFT, OFTv2, QOFT) adapters over
bitsandbytes-quantised weights.

>>> import oftsurgery
>>> folded = oftsurgery.fold(model, "my-qoft-adapter")  # doctest: +SKIP
>>> folded.oftsurgery.worst                             # doctest: +SKIP
"""

import importlib as _importlib
import typing as _typing

from . import errors as _errors
from ._version import __version__
from .errors import *  # noqa: F403 - errors and warnings are public, all of them

if _typing.TYPE_CHECKING:
    from .adapters.adapter import DIALECTS, Cayley, OFTAdapter, Rotation, blend
    from .api.api import (
        export_onnx,
        export_safetensors,
        extract,
        extract_checkpoint,
        fold,
        fold_checkpoint,
        load_adapter,
        report,
        unfold,
        unfold_checkpoint,
        verify_checkpoint,
        wrap,
    )
    from .checks.checkpoint_report import CheckpointReport, TensorCheck, WeightCheck
    from .checks.doctor import doctor
    from .checks.extract_adapters import ExtractedAdapter
    from .checks.findings import Finding
    from .checks.verify_models import OutputError, VerifyReport, verify
    from .formats.encoded_weight import EncodedWeight, WeightFormat
    from .hub import PushReport, push_to_hub
    from .live import dispatch_bnb_4bit, dispatch_bnb_8bit
    from .onnx.export import OnnxCheck, OnnxReport
    from .records.record import AdapterInfo, FoldRecord, ModuleRecord
    from .weights.extract import ExtractedRotation, extract_rotation
    from .weights.fold import fold_weight, unfold_weight
    from .weights.kernels import backends, use_backend

__all__ = [
    "DIALECTS",
    "AdapterInfo",
    "Cayley",
    "CheckpointReport",
    "EncodedWeight",
    "ExtractedAdapter",
    "ExtractedRotation",
    "Finding",
    "FoldRecord",
    "ModuleRecord",
    "OFTAdapter",
    "OnnxCheck",
    "OnnxReport",
    "OutputError",
    "PushReport",
    "Rotation",
    "TensorCheck",
    "VerifyReport",
    "WeightCheck",
    "WeightFormat",
    "__version__",
    "backends",
    "blend",
    "dispatch_bnb_4bit",
    "dispatch_bnb_8bit",
    "doctor",
    "export_onnx",
    "export_safetensors",
    "extract",
    "extract_checkpoint",
    "extract_rotation",
    "fold",
    "fold_checkpoint",
    "fold_weight",
    "load_adapter",
    "push_to_hub",
    "report",
    "unfold",
    "unfold_checkpoint",
    "unfold_weight",
    "use_backend",
    "verify",
    "verify_checkpoint",
    "wrap",
]
__all__ += _errors.__all__

# module → what it gives, imported at its first use: the command line answers `--help` without torch
_EXPORTS = {
    "adapters.adapter": "DIALECTS Cayley OFTAdapter Rotation blend",
    "api.api": "export_onnx export_safetensors extract extract_checkpoint fold fold_checkpoint "
    "load_adapter report unfold unfold_checkpoint verify_checkpoint wrap",
    "checks.checkpoint_report": "CheckpointReport TensorCheck WeightCheck",
    "formats.encoded_weight": "EncodedWeight WeightFormat",
    "checks.verify_models": "OutputError VerifyReport verify",
    "checks.doctor": "doctor",
    "checks.findings": "Finding",
    "weights.extract": "ExtractedRotation extract_rotation",
    "checks.extract_adapters": "ExtractedAdapter",
    "hub": "PushReport push_to_hub",
    "weights.kernels": "backends use_backend",
    "live": "dispatch_bnb_4bit dispatch_bnb_8bit",
    "onnx.export": "OnnxCheck OnnxReport",
    "records.record": "AdapterInfo FoldRecord ModuleRecord",
    "weights.fold": "fold_weight unfold_weight",
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}


def __getattr__(name: str) -> _typing.Any:
    if name in _HOME:
        value = getattr(_importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name == "live":  # oftsurgery.live.Linear4bit
        value = _importlib.import_module(".live", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
