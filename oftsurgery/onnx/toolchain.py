"""Functions that import the packages that write an ONNX graph, keep the packages' messages quiet, and convert their errors."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from oftsurgery.errors import ExportError, OFTSurgeryError, causes, needs, printable


def require_onnx() -> None:
    """Import the packages of the ``onnx`` extra.

    Raises:
        MissingDependencyError: a package is not installed.
    """
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        with needs(name, "pip install 'oftsurgery[onnx]'"):
            importlib.import_module(name)


@contextmanager
def own_errors(what: str) -> Iterator[None]:
    """Raise an error of reading a weight unchanged, although the packages' passes have wrapped the error; other errors become
    an ExportError.
    """
    try:
        yield
    except Exception as error:  # the passes raise errors of any kind, which wrap the errors of reading a weight
        chain = [*causes(error)]
        own = next((cause for cause in chain if isinstance(cause, (OFTSurgeryError, OSError))), None)
        if own is not None:
            raise own from None
        deepest = chain[-1]
        message = f"the graph cannot be {what}: {type(deepest).__name__}: {printable(deepest, 400)}"
        raise ExportError(message, remedy="report this error together with the model's config.json") from error


_NOISY = ("torch", "onnxscript", "onnx_ir", "onnx")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the log messages and warnings of torch and onnxscript; the model's own warnings stay."""
    names = {*_NOISY, *logging.root.manager.loggerDict}
    levels = {log: log.level for log in map(logging.getLogger, names) if log.name.partition(".")[0] in _NOISY}
    with warnings.catch_warnings():
        for name in _NOISY:
            warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            for log in levels:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in levels.items():
                log.setLevel(level)
