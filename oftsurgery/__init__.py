"""Surgery on models that were fine-tuned with Orthogonal Fine-Tuning (OFT, OFTv2, QOFT) adapters over
bitsandbytes-quantised weights.

>>> import oftsurgery
>>> folded = oftsurgery.fold(model, "my-qoft-adapter")  # doctest: +SKIP
>>> folded.oftsurgery.worst                             # doctest: +SKIP
"""

import ast as _ast
import importlib as _importlib
from pathlib import Path as _Path

# the public names stand in __init__.pyi, where type checkers read them too; each is imported at its first use, so that
# the command line answers `--help` without torch
_stub = _ast.parse(_Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {name.name: node.module for node in _stub.body if isinstance(node, _ast.ImportFrom) for name in node.names}
_TRANSFORMERS = (5, 21)  # the oldest that `make test-oldest` tests
__all__ = [name for name, home in _HOMES.items() if home is not None]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]  # None of a module: oftsurgery.live.Linear4bit
    if home != "errors":
        _check_transformers()
    module = _importlib.import_module(f".{home or name}", __name__)
    globals()[name] = value = getattr(module, name) if home else module
    return value


def _check_transformers() -> None:
    """Refuse a transformers whose loading has other rules than those that the stores ask; none at all is fine."""
    from contextlib import suppress
    from importlib import metadata

    from packaging.version import Version

    with suppress(metadata.PackageNotFoundError):
        installed = metadata.version("transformers")
        if Version(installed).release[:2] < _TRANSFORMERS:
            from oftsurgery.errors import MissingDependencyError

            oldest = ".".join(map(str, _TRANSFORMERS))
            message = f"transformers {installed} is installed, but oftsurgery needs {oldest} or newer"
            raise MissingDependencyError(message, remedy=f"pip install --upgrade 'transformers>={oldest}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
