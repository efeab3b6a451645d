"""Which places names mean: folders of the user's and repositories of the Hub. What comes from the Hub is in test_hub_reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from oftsurgery.errors import AdapterError
from oftsurgery.files.finding import commit_of, hub_id_of, place_of

WHERE = "give a folder"


@pytest.mark.parametrize(
    ("given", "repo", "subfolder", "revision"),
    [
        ("owner/name", "owner/name", "", None),
        ("owner/name@v1.0", "owner/name", "", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "", "refs/pr/3"),
        ("owner/name/sub", "owner/name", "sub", None),
        ("owner/name/a/checkpoint-500", "owner/name", "a/checkpoint-500", None),
        ("owner/name/sub@0123abc", "owner/name", "sub", "0123abc"),
        ("hf://owner/name", "owner/name", "", None),
        ("hf://owner/name@refs/pr/3", "owner/name", "", "refs/pr/3"),
        ("hf://owner/name@v1/sub/folder", "owner/name", "sub/folder", "v1"),
        ("hf://owner/name@refs/pr/3/sub", "owner/name", "sub", "refs/pr/3"),
    ],
)
def test_names_of_the_hub(given: str, repo: str, subfolder: str, revision: str | None) -> None:
    place = place_of(given, AdapterError, WHERE)
    assert (place.repo, place.subfolder, place.revision, place.folder) == (repo, subfolder, revision, None)
    again = place_of(str(place), AdapterError, WHERE)
    assert (again.repo, again.subfolder, again.revision, str(again)) == (repo, subfolder, revision, str(place))
    assert str(place).startswith("hf://") == bool(subfolder)
    assert hub_id_of(given) == repo


@pytest.mark.parametrize(
    "given",
    [
        "name",
        "./owner/name",
        "~/owner/name",
        "/owner/name",
        "../owner/name",
        "owner/",
        "/name",
        "owner//name",
        "@v1",
        "hf://owner",
        "http://owner/name",
        "C:/owner/name",
        "",
    ],
)
def test_what_is_no_name_of_the_hub(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id_of(given) is None
    if given:
        with pytest.raises(AdapterError, match=r"the folder does not exist .*Remedy: give a folder"):
            place_of(given, AdapterError, WHERE)


def test_a_folder_of_the_users_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name" / "sub").mkdir(parents=True)
    for given in ("owner/name", "owner/name/sub"):
        assert place_of(given, AdapterError, WHERE).folder == Path(given)
        assert hub_id_of(given) is None
    with pytest.raises(
        AdapterError,
        match=r"a local folder has no revisions, but the revision 'v1' was given .*Remedy: give the Hub id",
    ):
        place_of("owner/name", AdapterError, WHERE, revision="v1")


@pytest.mark.parametrize(
    "revision", ["..", "../../x", "a/../../x", "/etc", "-x", "", "a b", "a\0b", "a\nb", "x~1", "x:y", "x\\y"]
)
def test_revisions_that_no_repository_has(revision: str) -> None:
    """The client makes a path of a revision; an adapter's config may name any."""
    for given, asked in (("owner/name", revision), (f"owner/name@{revision}", None)):
        if (given, asked) != ("owner/name@", None):
            with pytest.raises(
                AdapterError, match=r"no repository has a revision of the name|the folder does not exist"
            ):
                place_of(given, AdapterError, WHERE, revision=asked)


def test_two_revisions_of_one_repository() -> None:
    assert place_of("owner/name@v1", AdapterError, WHERE, revision="v1").revision == "v1"
    with pytest.raises(AdapterError, match="two revisions of one repository were given, 'v1' and 'v2'"):
        place_of("owner/name@v1", AdapterError, WHERE, revision="v2")


@pytest.mark.parametrize(
    "subfolder", ["..", "../x", "a/../../x", "/etc", "", ".", "a//b", "a\\..\\..\\b", "a\0b", "./a"]
)
def test_subfolders_that_lead_out(subfolder: str, tmp_path: Path) -> None:
    for given in (str(tmp_path), "owner/name"):
        with pytest.raises(AdapterError, match=r"is no path inside the folder .*Remedy: name a folder inside"):
            place_of(given, AdapterError, WHERE).below(subfolder)
    for part in ("..", "."):
        with pytest.raises(AdapterError, match="is no path inside the folder"):
            place_of(f"owner/name/{part}/x", AdapterError, WHERE)


def test_a_subfolder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "saved" / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "saved" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "saved" / "in").symlink_to("inside")
    place = place_of(tmp_path / "saved", AdapterError, WHERE)
    assert place.below("in").folder == tmp_path / "saved" / "in"
    with pytest.raises(
        AdapterError, match=r"the subfolder 'out' is a link that leaves the folder .*Remedy: give the folder to which"
    ):
        place.below("out")
    with pytest.raises(AdapterError, match="the folder has no subfolder 'nowhere'"):
        place.below("nowhere")


def test_files_below_are_bounded(tmp_path: Path) -> None:
    """Neither circles of links nor very deep or very many folders keep anybody busy."""
    (tmp_path / "a" / "b" / "c" / "d" / "e").mkdir(parents=True)
    for folder in ("a", "a/b/c/d", "a/b/c/d/e"):
        (tmp_path / folder / "file").write_text("")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "file").write_text("")
    assert place_of(tmp_path, AdapterError, WHERE).names() == ["a/file", "a/b/c/d/file"]


def test_commits(tmp_path: Path) -> None:
    assert commit_of(tmp_path / "snapshots" / ("a" * 40)) == "a" * 40
    assert commit_of(tmp_path / "snapshots" / "main") is None
    assert commit_of(tmp_path / ("a" * 40)) is None
