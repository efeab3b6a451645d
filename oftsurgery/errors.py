"""Every error that oftsurgery raises on purpose, with its facts in fields.

All errors form one tree, whose root is :class:`OFTSurgeryError`. Each error names the tensor or module, the shapes, and
the remedy, both in its text (for people) and in its attributes (for programs). This file imports the standard library
alone.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

# access tokens of the Hub, and passwords in URLs
_TOKEN = re.compile(r"\bhf_(?:oauth_)?[A-Za-z0-9]{20,}")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)")


def without_tokens(text: str, *known: str) -> str:
    """``text`` with stars in place of the ``known`` access tokens, and of all text that looks like a token or a password in a URL."""
    for token in known:
        text = text.replace(token, "***")
    return _PASSWORD.sub("***", _TOKEN.sub("hf_***", text))


#: ``{folder of this machine: the URL}`` of folders that stand for what lies behind a URL
_CALLED: dict[str, str] = {}


def called(folder: str, url: str) -> None:
    """From now on messages name the ``url`` in place of the ``folder``, which stands for the URL on this machine."""
    _CALLED[folder] = url


# the beginning of a path that names a URL
_URL_PATH = re.compile(r"(?!https?:|file:)[A-Za-z][A-Za-z0-9+.-]+:/")


def _as_called(given: object) -> str:
    text = str(given)
    if hasattr(given, "as_posix") and (named := _URL_PATH.match(posix := given.as_posix())):  # a path
        text = f"{named[0]}/{posix[named.end() :]}"
    for folder, url in _CALLED.items():
        text = text.replace(folder, url)
    return text


def printable(text: object, limit: int = 200) -> str:
    """``text`` for a message. Control characters are escaped, because names come from untrusted files; access tokens
    become stars; the text is cut to ``limit`` characters.
    """
    text = without_tokens(_as_called(text))
    out = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in text)
    return out if len(out) <= limit else out[: limit - 1] + "…"


#: the largest share that :func:`share` writes as it is
_MOST = 100.0


def share(value: float, spec: str = ".0%") -> str:
    """A share as a percentage, for a message. A share far beyond the whole was measured against nearly nothing, so the text
    states only that.

    >>> share(0.984), share(-0.001), share(18290.98)
    ('98%', '0%', '> 10000%')
    """
    if abs(value) >= _MOST:
        return f"{'>' if value > 0 else '<'} {_MOST if value > 0 else -_MOST:.0%}"
    text = format(value, spec)
    return text if any(ch in "123456789" for ch in text) else format(0.0, spec)  # no minus before a zero


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause of that cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _quoted(text: str) -> str:
    return repr(printable(text))


def _shape(shape: Iterable[int]) -> str:
    return "×".join(str(n) for n in shape) or "scalar"


class OFTSurgeryError(Exception):
    """Base of all errors of oftsurgery.

    Attributes:
        message: what is wrong, in one sentence.
        tensor: name of the tensor in question, or None.
        module: path of the module in question, or None.
        shape: the shape that was found, or None.
        expected: the shape that was needed, or None.
        format: the storage format in question (``"nf4"``, ``"int8"`` …), or None.
        path: file or folder in question, or None.
        remedy: what to do about it, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        tensor: str | None = None,
        module: str | None = None,
        shape: Sequence[int] | None = None,
        expected: Sequence[int] | None = None,
        format: str | None = None,
        path: object | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.tensor = tensor
        self.module = module
        self.shape = tuple(shape) if shape is not None else None
        self.expected = tuple(expected) if expected is not None else None
        self.format = format
        self.remedy = remedy
        place = None if path is None else _as_called(path)
        super().__init__(self._text(place))
        self.path = place  # set after ImportError's __init__, which clears the attribute `path`

    def _text(self, place: str | None) -> str:
        facts: list[tuple[str, Any, Callable[[Any], str]]] = [
            ("module", self.module, _quoted),
            ("tensor", self.tensor, _quoted),
            ("format", self.format, printable),
            ("shape", self.shape, _shape),
            ("expected", self.expected, _shape),
            ("at", place, printable),
        ]
        known = ", ".join(f"{name} {shown(fact)}" for name, fact, shown in facts if fact is not None)
        return self.message + f" [{known}]" * bool(known) + f" Remedy: {self.remedy}" * bool(self.remedy)

    def within(self, module: str) -> OFTSurgeryError:
        """The same error with ``module`` as its module, unless the error names a module already."""
        if self.module is not None:
            return self
        return type(self)(self.message, **(self._fields | {"module": module}))

    @property
    def _fields(self) -> dict[str, Any]:
        names = ("tensor", "module", "shape", "expected", "format", "path", "remedy")
        return {name: getattr(self, name) for name in names}

    @property
    def facts(self) -> dict[str, Any]:
        """The message and the known fields as plain values."""
        shapes = {name: list(value) if isinstance(value, tuple) else value for name, value in self._fields.items()}
        return {"message": self.message, **{name: value for name, value in shapes.items() if value is not None}}

    def __reduce__(self) -> tuple[Any, ...]:
        # keyword-only arguments do not survive Exception's own pickling (multiprocessing, concurrent.futures)
        return (partial(type(self), **self._fields), (self.message,))


@contextmanager
def module_in_errors(module: str) -> Iterator[None]:
    """Add ``module`` to each error of the body, by :meth:`OFTSurgeryError.within`."""
    try:
        yield
    except OFTSurgeryError as error:
        raise error.within(module) from error.__cause__


class AdapterError(OFTSurgeryError):
    """The adapter's files or tensors cannot be used."""


class DialectError(AdapterError):
    """The adapter is of a kind that is not supported, or that cannot be told from its files."""


class CalibrationError(OFTSurgeryError):
    """What a fold is to be calibrated on cannot be used: no batches, text without a tokenizer, or not what the model
    takes.
    """


class CheckpointError(OFTSurgeryError):
    """A checkpoint's files cannot be used."""


class DiskError(OFTSurgeryError, OSError):
    """The disk did not take what was written: full, read-only, or in use by another run."""


class EngineError(OFTSurgeryError, OSError):
    """The executor that works on a run's tasks has lost its workers, or takes no tasks."""


class ExportError(OFTSurgeryError):
    """A model cannot be exported: torch cannot capture it, or the result does not compute what the model does."""


class HubError(OFTSurgeryError, OSError):
    """The Hub did not do what was asked: network, permission, or a conflict."""


class MatchError(OFTSurgeryError):
    """Adapter modules and model modules do not correspond one to one."""


class RemoteError(OFTSurgeryError, OSError):
    """A URL could not be read or written: network, permission, or a file that has changed meanwhile."""


class ShapeError(OFTSurgeryError):
    """A tensor's shape does not fit its use."""


class ExtractionError(OFTSurgeryError):
    """The difference of two models does not determine a rotation, or is not a rotation."""


class NonFiniteError(OFTSurgeryError):
    """NaN or infinity in an input or a result."""


class FormatError(OFTSurgeryError):
    """A weight is stored in a way that is unknown, incomplete or damaged."""


class StateError(OFTSurgeryError):
    """The model is in a state in which the operation has no right result (already folded, merged, not yet quantised …)."""


class IntegrityError(OFTSurgeryError):
    """Contents differ from the hashes recorded for them."""


class UndoError(OFTSurgeryError):
    """A file is no undo record, or a damaged one."""


class MissingDependencyError(OFTSurgeryError, ImportError):
    """An optional dependency is not installed; the remedy names the extra that brings the dependency."""


#: the remedy for a model in memory whose tensors are not gathered
GATHER_MODEL = "gather the model within `deepspeed.zero.GatheredParameters(list(model.parameters()))`, or load a checkpoint that is whole"


def not_gathered(kind: type[OFTSurgeryError], what: str, remedy: str, **where: Any) -> OFTSurgeryError:
    """The error for a tensor without elements, which DeepSpeed's ZeRO-3 or FSDP holds in parts."""
    message = f"{what} has no elements: training has spread the tensor over processes (ZeRO-3, FSDP), and nobody gathered the parts"
    return kind(message, remedy=remedy, **where)


@contextmanager
def needs(package: str, remedy: str) -> Iterator[None]:
    """Turn a failed import in the body into a :class:`MissingDependencyError` that names ``package``."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{package} is not installed", remedy=remedy) from error


class RoundingWarning(UserWarning):
    """States, once a fold, the error that requantisation added."""


class WeakAdapterWarning(RoundingWarning):
    """States, once a fold, that rounding has undone a part of the adapter's change, and how much of the change is kept."""


class UnfoldWarning(UserWarning):
    """States, once an inexact unfold, how far the result is from the base."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn in the name of the line that called oftsurgery, however deep the call is: warning filters match that line."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "oftsurgery",
        "contextlib",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class UntieWarning(UserWarning):
    """A fold gave each of two modules that shared a weight a weight of its own."""


class SourceWarning(UserWarning):
    """A function read something that its arguments left open: the revision of a base, the only adapter in a subfolder, the
    target of a link, names without the segments of wrappers, or a part of an adapter.
    """


class IdleWarning(UserWarning):
    """Names, once a fold, the layers whose rotation is left out, since the layer's owner reads the weight and never calls the layer."""


class LeftOutWarning(UserWarning):
    """Names, once an output, the files of the whole model that the output lacks, or that the output has from an adapter."""


class CalibrationWarning(UserWarning):
    """Names, once a calibrated fold, the layers that were not calibrated, and says why."""


class BackendWarning(UserWarning):
    """A fast path is missing or failed; a slower path has computed the same result."""


class ConversionWarning(UserWarning):
    """States, once an operation, how far adapters' rotations are from what their truncated series compute."""


class ExtractionWarning(UserWarning):
    """States, once an extraction, what of the two models' difference the extracted rotations do not explain."""
