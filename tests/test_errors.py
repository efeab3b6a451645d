"""The error tree: fields, text, pickling, and names from untrusted files."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

import oftsurgery
from oftsurgery import errors
from oftsurgery.errors import OFTSurgeryError, ShapeError, printable

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, OFTSurgeryError)]
WARNINGS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Warning)]
FIELDS: dict[str, Any] = {
    "tensor": "t.weight",
    "module": "layers.0",
    "shape": (3, 4),
    "expected": (4, 4),
    "format": "nf4",
    "path": "/some/where",
    "remedy": "do that",
}


def test_the_tree() -> None:
    assert {c.__name__ for c in CLASSES + WARNINGS} <= set(oftsurgery.__all__)
    assert all(c.__doc__ for c in CLASSES + WARNINGS)
    assert issubclass(errors.DialectError, errors.AdapterError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    assert all(issubclass(w, UserWarning) for w in WARNINGS)


@pytest.mark.parametrize("cls", CLASSES)
def test_fields_and_text(cls: type[OFTSurgeryError]) -> None:
    error = cls("it is wrong", **FIELDS)
    assert {name: getattr(error, name) for name in FIELDS} == FIELDS
    assert error.message == "it is wrong"
    assert str(error) == (
        "it is wrong [module 'layers.0', tensor 't.weight', format nf4, shape 3×4, expected 4×4, at /some/where] Remedy: do that"
    )
    assert str(cls("it is wrong")) == "it is wrong"
    assert str(cls("it is wrong", remedy="do that")) == "it is wrong Remedy: do that"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fields", [FIELDS, {}, {"shape": ()}], ids=["all", "none", "scalar"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(cls: type[OFTSurgeryError], fields: dict[str, Any], protocol: int) -> None:
    error = cls("wrong", **fields)
    for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301
        assert type(twin) is cls
        assert str(twin) == str(error)
        assert {name: getattr(twin, name) for name in FIELDS} == {name: getattr(error, name) for name in FIELDS}


def test_paths_and_shapes_are_plain_data() -> None:
    from pathlib import Path

    import torch

    error = ShapeError("wrong", shape=torch.Size([2, 3]), path=Path("a") / "b")
    assert (type(error.shape), error.path) == (tuple, "a/b")
    assert "shape scalar" in str(ShapeError("wrong", shape=()))


def test_within_adds_the_module_once() -> None:
    error = ShapeError("wrong", shape=(2,), remedy="do that")
    told = error.within("layers.3")
    assert type(told) is ShapeError
    assert str(told) == "wrong [module 'layers.3', shape 2] Remedy: do that"
    assert told.within("elsewhere") is told
    assert error.module is None


def test_catching_by_family() -> None:
    with pytest.raises(errors.AdapterError):
        raise errors.DialectError("which")
    with pytest.raises(ImportError):
        raise errors.MissingDependencyError("none", remedy="pip install x")


PRINTED = {
    "plain": "plain",
    "naïve ×2 漢字": "naïve ×2 漢字",
    "a\nb\tc\r": r"a\nb\tc\r",
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "\x00\x07\x7f\x9b": r"\x00\x07\x7f\x9b",
    "right\u202eleft\u2066": r"right\u202eleft\u2066",
    "zero\u200bwidth\ufeff": r"zero\u200bwidth\ufeff",
    "line\u2028paragraph\u2029": r"line\u2028paragraph\u2029",
    "lone \ud800 surrogate": r"lone \ud800 surrogate",
}


@pytest.mark.parametrize("text", PRINTED, ids=ascii)
def test_printable(text: str) -> None:
    assert printable(text) == PRINTED[text]
    assert printable(text).isprintable()


def test_printable_cuts() -> None:
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 199 + "…"
    assert len(printable("\x00" * 10**5)) == 200
    assert printable(None) == "None"


@pytest.mark.parametrize("field", ["tensor", "module", "format", "path"])
def test_no_field_reaches_the_text_raw(field: str) -> None:
    nasty = "".join(PRINTED)
    error = OFTSurgeryError("wrong", **{field: nasty})
    assert str(error).isprintable()
    assert getattr(error, field) == nasty, "the field keeps the name as it is"


def test_a_token_never_gets_into_a_message() -> None:
    token = "hf_" + "aB3" * 12
    for text in (
        str(OFTSurgeryError("x", path=f"/home/{token}")),
        str(OFTSurgeryError("x", tensor=token, module=token)),
        printable(f"Bearer {token}, hf_oauth_{'q' * 30}"),
        errors.without_tokens(f"a {token} b secret c", "secret"),
    ):
        assert token not in text
        assert "hf_***" in text
        assert "secret" not in text
    assert printable("hf_models/a_b") == "hf_models/a_b"
