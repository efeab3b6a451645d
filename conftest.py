"""Names and folders for the examples in docstrings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def example_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that commands and examples of docs and docstrings name."""
    from documented import make_folders

    return make_folders(tmp_path_factory.mktemp("examples"))


@pytest.fixture(autouse=True)
def _docstring_names(request: pytest.FixtureRequest) -> Iterator[None]:
    """A docstring that names ``oftsurgery`` finds the models and folders of ``docs/reference.md`` in its namespace."""
    if not isinstance(request.node, pytest.DoctestItem) or not any(
        "oftsurgery." in example.source for example in request.node.dtest.examples
    ):
        yield
        return
    from documented import link_folders, names_of_docstrings, without_our_warnings

    place = request.getfixturevalue("tmp_path")
    link_folders(request.getfixturevalue("example_folders"), place)
    request.getfixturevalue("monkeypatch").chdir(place)
    with without_our_warnings():
        request.node.dtest.globs.update(names_of_docstrings())
        yield
