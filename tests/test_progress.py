"""Who is told of a task's progress: the caller's own function, a bar, or nobody."""

from __future__ import annotations

import contextlib

import pytest

from oftsurgery.progress import shown, without_bars


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
