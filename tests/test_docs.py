"""README and docs do what they show: every Python example, and every command, in the order of its page."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from documented import link_folders, without_our_warnings

import oftsurgery
from oftsurgery.cli import main as cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: commands that a page shows and this test does not run
LEFT_OUT = {"make": "each has a test or a job of its own", "pip": "it changes the environment"}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"(?:<!-- not run: (.*?) -->\n)?^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(m[2], m[3], text.count("\n", 0, m.start(3)) + 1, m[1]) for m in found]


@pytest.fixture
def _desk(example_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder in which the examples' folders lie, and `tools`."""
    link_folders(example_folders, tmp_path)
    monkeypatch.chdir(tmp_path)
    with without_our_warnings():
        yield


def names_of(page: Path) -> dict[str, object]:
    """What the page's examples take as given: the model of models.md, which other pages refer to."""
    if page.name == "models.md":
        return {}
    globs: dict[str, object] = {}
    first = next(b for b in blocks(ROOT / "docs" / "models.md") if b.language == "python")
    run_examples(first, globs)
    globs["inputs"] = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    return globs


def run_examples(block: Block, globs: dict[str, object]) -> None:
    test = doctest.DocTestParser().get_doctest(block.code, globs, "example", None, block.line)
    assert test.examples, f"line {block.line}: no >>> in it"
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test, out=said.append, clear_globs=False)
    globs.update(test.globs)
    assert not failed.failed, "".join(said)


def run_command(line: str) -> None:
    words = shlex.split(line.removeprefix("$ "), comments=True)
    if words[0] in LEFT_OUT:
        return
    if words[:2] == ["python", "tools/export.py"]:
        assert cli.export_main(words[2:]) == 0
    else:
        assert words[0] == "oftsurgery", line
        assert cli.main(words[1:]) == 0, line


def comparable(text: str) -> list[list[str]]:
    """The words of each line; numbers that are rounding alone differ between machines."""
    return [re.sub(r"\d\.\de-1\d", "ε", line).split() for line in text.strip().splitlines()]


@pytest.mark.usefixtures("_desk")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_does_what_it_shows(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [b for b in blocks(page) if b.not_run is None]
    globs = names_of(page) if any(b.language == "python" for b in found) else {}
    printed = ""
    for block in found:
        if block.language == "python":
            run_examples(block, globs)
        elif block.language == "console":
            for line in block.code.splitlines():
                assert line.startswith("$ "), f"{page.name}: {line}"
                run_command(line)
            printed = capsys.readouterr().out
        elif block.language == "text":  # what the commands above print
            assert comparable(printed) == comparable(block.code), f"{page.name}: line {block.line}"


def test_each_command_is_shown() -> None:
    shown = {
        m[1] for page in PAGES for m in re.finditer(r"^\$ oftsurgery ([\w-]+)", page.read_text("utf-8"), re.MULTILINE)
    }
    actions = cli.command_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert shown == set(actions) - {"merge"}  # which is `fold`


def test_what_is_not_run_says_why() -> None:
    reasons = [b.not_run for page in PAGES for b in blocks(page) if b.not_run is not None]
    assert reasons
    assert all(len(reason) > 20 for reason in reasons)


def test_links_lead_somewhere() -> None:
    assert re.search(r"\]\(docs/", PAGES[0].read_text(encoding="utf-8"))
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_reference_has_each_public_name_once() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto\w+:: oftsurgery\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(set(oftsurgery.__all__) - {"__version__"})


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 160


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    from sphinx.cmd.build import build_main

    assert build_main(["-q", "-E", "-W", "--keep-going", "-b", "html", str(ROOT / "docs"), str(tmp_path)]) == 0
    assert (tmp_path / "reference.html").stat().st_size > 50_000


def test_tests_that_pages_name_are_there() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"\btests/[\w/]+\.py", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"
