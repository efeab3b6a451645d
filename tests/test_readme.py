"""README and changelog say what is so. (The README's examples run as doctests.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import oftsurgery

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_two_commands_come_first() -> None:
    code = re.search(r"```console\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    assert re.findall(r"^\$ (make \w+)", code[1], flags=re.MULTILINE) == ["make demo", "make test"]
    assert README[: README.index(code[1])].count("\n") < 10


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci/run"])
def test_every_make_target_named_exists(text: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    found = re.finditer(
        r"(?:`|\$ )make ([\w-]+)|^make ([\w-]+)$", (ROOT / text).read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    named = {m[1] or m[2] for m in found}
    assert named
    assert named <= targets


def test_every_name_of_the_package_in_the_readme_exists() -> None:
    names = set(re.findall(r"\boftsurgery\.([a-zA-Z]\w*)", README)) - {"json"}
    # `folded.oftsurgery.worst` is the record, not the package
    names -= set(re.findall(r"\b(?:folded|model)\.oftsurgery\.([a-zA-Z]\w*)", README))
    assert names
    assert {n for n in names if not hasattr(oftsurgery, n)} == set()


def test_the_changelog_names_all_that_is_public() -> None:
    assert {n for n in oftsurgery.__all__ if f"`{n}`" not in CHANGELOG} == {"__version__"}


def test_the_dialect_table_is_the_codes_own() -> None:
    assert re.findall(r"^\| `([\w.-]+)` \|", README, flags=re.MULTILINE) == list(oftsurgery.DIALECTS)
