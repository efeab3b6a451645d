"""Who is told of a task's progress: the caller's own function, a bar, or nobody."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import pytest

from oftsurgery.notices import COMPILING, notice, notices_to
from oftsurgery.progress import shown, without_bars
from oftsurgery.weights.cpu_kernels import compiled


def test_the_callers_own_function_is_told_and_nobody_where_none_is_wanted() -> None:
    told: list[tuple[int, int, str]] = []

    def step(done: int, total: int, what: str) -> None:
        told.append((done, total, what))

    with shown(step, "fold") as found:
        assert found is step
    with shown(False, "fold") as found:
        assert found is None
    assert told == []


def test_a_bar_shows_the_task_its_unit_and_what_it_is_at(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True, "fold", "layer") as step:
        assert step is not None
        step(1, 4, "model.\x1b[31mlayers")
        step(4, 4, "x" * 100)
    err = capsys.readouterr().err
    assert err.split("\r")[-1].startswith("fold: 100%|")
    assert "4/4" in err
    assert "layer/s" in err
    assert "\x1b[31m" not in err
    assert "x" * 41 not in err


@pytest.mark.parametrize("shown_before", [True, False])
def test_a_librarys_bars_are_as_they_were(shown_before: bool) -> None:
    said: list[str] = []
    with (
        contextlib.suppress(KeyError),
        without_bars(shown_before, lambda: said.append("off"), lambda: said.append("on")),
    ):
        assert said == ["off"] * shown_before
        raise KeyError
    assert said == ["off", "on"] * shown_before


def test_warnings_wait_until_the_bar_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a bar within a bar; a warning tears no line of a bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: sys.stderr.write(f"WARNED {message}\n")
        with shown(True, "fold", "layer") as step, shown(True, "calibrate") as inner:
            assert step is not None
            assert inner is not None
            step(1, 2, "a")
            warnings.warn("first", UserWarning, stacklevel=1)
            inner(1, 1, "b")
            warnings.warn("second", UserWarning, stacklevel=1)
            step(2, 2, "c")
        warnings.warn("third", UserWarning, stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "WARNED" in line] == ["WARNED first", "WARNED second", "WARNED third"]
    assert lines[-3:] == ["WARNED first", "WARNED second", "WARNED third"]


def test_a_warning_that_is_an_error_does_not_wait_and_recorded_warnings_are_all_there() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with shown(True, "fold"):
            warnings.warn("held", UserWarning, stacklevel=1)
            assert not caught
        assert [str(w.message) for w in caught] == ["held"]
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="at once"), shown(True, "fold"):
            warnings.warn("at once", UserWarning, stacklevel=1)
    assert warnings.showwarning is before


def test_a_first_start_says_that_kernels_are_compiled_and_a_later_start_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that compiles gives the notice once, and a start with a full cache gives none; a task without progress is silent."""

    def start(cache: str) -> None:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / cache))
        monkeypatch.setattr(compiled, "_kernels", {})
        monkeypatch.setattr(compiled, "_coming", {})
        compiled._say_once.cache_clear()
        for name in ("decode_int8", "decode_dense"):
            compiled.kernel(name)

    with shown(True, "fold"):
        start("one")
    assert capsys.readouterr().err.count(COMPILING) == 1
    with shown(True, "fold"):
        start("one")
    start("two")
    assert COMPILING not in capsys.readouterr().err
    told: list[str] = []
    with notices_to(told.append):
        start("three")
        notice("another")
    assert told == [COMPILING, "another"]
