"""The packages that write an ONNX graph are asked for here, kept quiet, and their errors are told as ours."""

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
        MissingDependencyError: one is not installed.
    """
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        with needs(name, "pip install 'oftsurgery[onnx]'"):
            importlib.import_module(name)


@contextmanager
def own_errors(what: str) -> Iterator[None]:
    """Errors of reading a weight as they are, whatever the passes around it made of them."""
    try:
        yield
    except Exception as error:
        chain = [*causes(error)]  # passes wrap each other's errors in their own words
        own = next((cause for cause in chain if isinstance(cause, (OFTSurgeryError, OSError))), None)
        if own is not None:
            raise own from None
        deepest = chain[-1]
        message = f"the graph cannot be {what}: {type(deepest).__name__}: {printable(deepest, 400)}"
        raise ExportError(message, remedy="report it, with the model's config") from error


_NOISY = ("torch", "onnxscript", "onnx_ir", "onnx")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxscript say about themselves while they work; the model's own warnings stay."""
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
