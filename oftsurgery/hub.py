"""Push the files of an export, and no others, to a Hub repository through huggingface_hub, in one commit.

Large files are uploaded first, one by one, and a later attempt does not send them again; the repository shows no uploaded
file before the commit, which is the last step.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ._version import __version__
from .checks.verify_files import check_files
from .errors import (
    CheckpointError,
    HubError,
    IntegrityError,
    OFTSurgeryError,
    StateError,
    causes,
    needs,
    printable,
    without_tokens,
)
from .files.reading import ADAPTER_CONFIG, inside
from .progress import Progress
from .records import card
from .records.card import CARD
from .records.record import FoldRecord, plain
from .records.record_file import RECORD, record_in

__all__ = ["PushReport", "login", "plan_push", "push_to_hub"]

_TENSORS = (".safetensors", ".onnx", ".onnx.data", ".data", ".gguf")
_LARGE = 10_000_000  # a file of at least this many bytes is uploaded by itself, before the commit
_CONFLICTS = 3  # the number of attempts where others commit at the same time
_MAX_NAME = 96  # the longest name of a repository that the Hub allows


@dataclass(frozen=True)
class PushReport:
    """What is pushed, and where to.

    >>> record = oftsurgery.export_safetensors(oftsurgery.fold(model, "ADAPTER"), "OUTPUT")
    >>> report = oftsurgery.push_to_hub("OUTPUT", "me/my-model", dry_run=True)
    >>> report.derived, report.url
    (False, None)

    Attributes:
        folder: the folder that is pushed.
        repo_id: ``owner/name``.
        derived: whether the repository's name was derived from the record.
        revision: branch, or None for the main one.
        private: whether a new repository is to be private; None for the owner's default.
        create_pr: whether the push is a pull request.
        files: ``{file name: bytes}`` of all files that are sent.
        changed: files among them that differ from the record (never weights: a push of changed weights is refused).
        left_out: names in the folder that are no part of the export.
        pictures: ``{file name: PNG}`` of those that are drawn for the card, where matplotlib is installed.
        url: of the commit; None before the push, and in a dry run.
        commit: hash of the commit.
        pull_request: address of the pull request.
    """

    folder: str
    repo_id: str
    derived: bool
    revision: str | None
    private: bool | None
    create_pr: bool
    files: Mapping[str, int]
    changed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    url: str | None = None
    commit: str | None = None
    pull_request: str | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return plain(vars(self)) | {"bytes": self.nbytes, "pictures": list(self.pictures)}  # type: ignore[no-any-return]


def push_to_hub(
    folder: str | PathLike[str],
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Push an exported folder to a Hub repository, as one commit.

    >>> record = oftsurgery.export_safetensors(oftsurgery.fold(model, "ADAPTER"), "OUTPUT")
    >>> report = oftsurgery.push_to_hub("OUTPUT", "me/my-model", dry_run=True)                # what would be sent
    >>> report.repo_id, "model.safetensors" in report.files
    ('me/my-model', True)

    The push sends the files that ``oftsurgery.json`` names, ``oftsurgery.json``, and the model card (with pictures, where
    matplotlib is installed to draw them); nothing else of the folder.
    In a card that the repository has already, the section between oftsurgery's marks is replaced. Files of an earlier
    export that this export lacks are deleted from the repository.

    Args:
        folder: a folder that an export wrote.
        repo_id: ``owner/name``; a name alone is a repository of the user; None: named after base, adapter and format.
        private: make a new repository private. None: as the owner's settings say. An existing repository stays as it is;
            with True, a public one is refused.
        revision: branch to commit to; a missing branch is made; None: the main one.
        commit_message: its first line.
        create_pr: open a pull request instead of committing to the branch.
        token: of the Hub; None: ``HF_TOKEN``, or the token that ``hf auth login`` stored.
        dry_run: report what would be sent where, and send nothing. Only a name without an owner needs the network.
        progress: called with (bytes done, bytes in all, file name) after each file.

    Returns:
        a :class:`~oftsurgery.PushReport`.

    Raises:
        CheckpointError, StateError: no export wrote the folder, the repository does not fit, or two cards contradict each
            other.
        IntegrityError: weights are missing, or are not those that were exported.
        HubError: network, permission or a conflict; the next attempt does not send again what was uploaded.
    """
    report = plan_push(folder, repo_id, private=private, revision=revision, create_pr=create_pr, token=token)
    return report if dry_run else send(report, commit_message=commit_message, token=token, progress=progress)


def plan_push(
    folder: str | PathLike[str],
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> PushReport:
    """A report of what :func:`push_to_hub` would send, and to which repository; errors of the folder are raised here too."""
    path = Path(folder).expanduser()
    record, files, changed = _manifest(path)
    pictures = _pictures(record) if CARD in files else {}
    return PushReport(
        folder=str(path),
        repo_id=_target(repo_id, record, path, token),
        derived=repo_id is None,
        revision=revision,
        private=private,
        create_pr=create_pr,
        files=MappingProxyType(files | {name: len(data) for name, data in pictures.items()}),
        changed=changed,
        left_out=tuple(_strangers(path, files)),
        pictures=MappingProxyType(pictures),
    )


# --- what is sent -----------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> tuple[FoldRecord, dict[str, int], tuple[str, ...]]:
    """(record, ``{name: bytes}`` of the export's files in ``folder``, names of the files that have changed since)."""
    if not folder.is_dir():
        message = "the path is a file, not a folder" if folder.is_file() else "the folder does not exist"
        raise CheckpointError(message, path=folder, remedy="give a folder that oftsurgery wrote")
    record = record_in(folder)
    if record is None or not record.files:
        raise StateError(
            f"the folder has no {RECORD} with the hashes of files, so oftsurgery does not know which files belong to the export",
            path=folder,
            remedy="export the model with this version of oftsurgery, or send the whole folder with `hf upload`",
        )
    state = check_files(folder).files
    for wrong, verb in (("missing", "are missing"), ("changed", "have changed since the export")):
        names = [n for n, s in state.items() if s == wrong and (wrong == "missing" or n.endswith(_TENSORS))]
        if names:
            raise IntegrityError(
                f"{len(names)} files of the export {verb}: {', '.join(map(printable, names[:3]))}{' …' * (len(names) > 3)}",
                path=folder,
                remedy="export the model again",
            )
    own = [CARD] if (folder / CARD).exists() else []
    names = sorted({*record.files, RECORD, *own})
    files = {name: inside(folder, name, nested=True).stat().st_size for name in names}
    return record, files, tuple(n for n, s in state.items() if s == "changed")


def _strangers(folder: Path, files: Collection[str], place: str = "") -> list[str]:
    """Names in a folder that are no part of the export: of files, and of folders that hold nothing of it."""
    found: list[str] = []
    for path in sorted((folder / place).iterdir()):
        name = f"{place}{path.name}"
        if any(n.startswith(f"{name}/") for n in files):
            found += _strangers(folder, files, f"{name}/")
        elif name not in files:
            found.append(name)
    return found


def _pictures(record: FoldRecord) -> dict[str, bytes]:
    """``{file name: PNG}`` of the card's pictures; empty without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from .reports import drawing

    return drawing.figures(record)


def _target(repo_id: str | None, record: FoldRecord, folder: Path, token: str | None) -> str:
    """The name ``owner/name`` of the repository to push to."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    wanted = repo_id if repo_id is not None else _derived(record, folder)
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        message = f"{printable(wanted)!r} is not a name of a repository ({printable(error)})"
        raise StateError(message, remedy="give owner/name, with letters, digits, '-', '_' and '.' only") from None
    return wanted if "/" in wanted else f"{login(token)}/{wanted}"


def _derived(record: FoldRecord, folder: Path) -> str:
    """A repository's name from base, adapters and format: ``Llama-3-8B-my-adapter-nf4``; from the folder's name where the
    record does not name them.
    """
    base = record.adapters[0].base_model if record.adapters else None
    parts = [base, *(a.source for a in record.adapters)]
    formats = {m.format.partition(" ")[0] for m in record.modules.values()}
    if None in parts or len(parts) < 2:
        parts = [folder.resolve().name]
    elif other := [end for end in ("onnx", "gguf") if any(name.endswith(f".{end}") for name in record.files)]:
        parts += other
    elif len(formats) == 1:
        parts += formats
    name = "-".join(str(part).rstrip("/").rpartition("/")[2] for part in parts)
    name = re.sub(r"[^A-Za-z0-9._]+|-{2,}|\.{2,}", "-", name)[:_MAX_NAME].strip("-.").removesuffix(".git")
    return name or "oftsurgery-export"


# --- sending ----------------------------------------------------------------------------------------------------------


def login(token: str | None = None) -> str:
    """The name of the user to whom the token belongs.

    Raises:
        HubError: there is no token, or the Hub does not accept the token.
    """
    token = _token(token)
    with _talking("asking who the token belongs to", token):
        return str(_api(token).whoami()["name"])


def send(
    report: PushReport, *, commit_message: str | None = None, token: str | None = None, progress: Progress | None = None
) -> PushReport:
    """Send the files of a report that :func:`plan_push` made; see :func:`push_to_hub`."""
    token = _token(token)
    sending = _Sending(report, _api(token), progress)
    message = commit_message or f"Upload {Path(report.folder).resolve().name} with oftsurgery {__version__}"
    with _talking(f"pushing to {report.repo_id}", token, sending.left):
        return sending.run(message)


@dataclass
class _Sending:
    """One push, with the files that are uploaded so far."""

    report: PushReport
    api: Any
    progress: Progress | None
    uploaded: dict[str, int] = field(default_factory=dict)

    def left(self) -> str:
        """The text with which an error describes the state of the push."""
        large = sum(size >= _LARGE for size in self.report.files.values())
        told = f"{len(self.uploaded)} of {large} large files are uploaded" if large else "nothing is uploaded"
        return f"{told}, and the repository shows nothing of this push"

    def run(self, message: str) -> PushReport:
        from huggingface_hub.errors import HfHubHTTPError

        self._prepare()
        for attempt in range(1, _CONFLICTS + 1):
            head = self.api.model_info(self.report.repo_id, revision=self.report.revision)
            try:
                commit = self._commit(head, message)
            except HfHubHTTPError as error:
                # somebody else has committed in between: the next attempt reads the repository again
                if error.response.status_code not in (409, 412) or attempt == _CONFLICTS:
                    raise
            else:
                break
        self._check(commit)
        return replace(self.report, url=commit.commit_url, commit=commit.oid, pull_request=commit.pr_url)

    def _prepare(self) -> None:
        """Make the repository and the branch, where they do not exist."""
        from huggingface_hub.errors import RepositoryNotFoundError

        report = self.report
        try:
            info = self.api.model_info(report.repo_id)
        except RepositoryNotFoundError:
            self.api.create_repo(report.repo_id, private=report.private, exist_ok=True)
        else:
            if report.private and not info.private:
                raise StateError(
                    f"the repository {report.repo_id} exists already and is public, but a private one was asked for",
                    remedy="make the repository private in its settings, name another repository, or push without --private (private=True)",
                )
        if report.revision is not None and not report.revision.startswith("refs/"):
            self.api.create_branch(report.repo_id, branch=report.revision, exist_ok=True)

    def _commit(self, head: Any, message: str) -> Any:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        report, folder = self.report, Path(self.report.folder)
        contents: dict[str, bytes] = dict(report.pictures)
        with tempfile.TemporaryDirectory() as place:
            there = {s.rfilename for s in head.siblings or ()}

            def fetched(name: str) -> Path | None:
                """The path of a small text file that is downloaded from the repository's present state."""
                if name not in there:
                    return None
                return Path(self.api.hf_hub_download(report.repo_id, name, revision=head.sha, local_dir=place))

            stale = _stale(there, fetched(RECORD), report)
            if CARD in report.files:
                contents[CARD] = _card(folder, fetched(CARD), report).encode()
        additions = [
            CommitOperationAdd(name, contents.get(name) or str(inside(folder, name, nested=True)))
            for name in report.files
        ]
        for addition in additions:
            if report.files[addition.path_in_repo] >= _LARGE:
                self.api.preupload_lfs_files(
                    report.repo_id, [addition], revision=report.revision, create_pr=report.create_pr, free_memory=False
                )
                self._step(addition.path_in_repo)
        commit = self.api.create_commit(
            report.repo_id,
            [*additions, *map(CommitOperationDelete, sorted(stale))],
            commit_message=message,
            revision=report.revision,
            create_pr=report.create_pr,
            parent_commit=head.sha,
        )
        for name in report.files:
            self._step(name)
        return commit

    def _step(self, name: str) -> None:
        if name not in self.uploaded:
            self.uploaded[name] = self.report.files[name]
            if self.progress is not None:
                self.progress(sum(self.uploaded.values()), self.report.nbytes, name)

    def _check(self, commit: Any) -> None:
        """Check that the commit has all files: a repository's ``.gitignore`` makes the client leave files out silently."""
        info = self.api.model_info(self.report.repo_id, revision=commit.oid)
        there = {s.rfilename for s in info.siblings or ()}
        missing = sorted(n for n in self.report.files if n not in there)
        if missing:
            raise HubError(
                f"the commit lacks {len(missing)} of the files: {', '.join(map(printable, missing[:3]))}",
                path=self.report.repo_id,
                remedy="remove the repository's .gitignore, or name another repository, and push again",
            )


def _stale(there: set[str], record: Path | None, report: PushReport) -> set[str]:
    """The files of an earlier export in the repository that this export does not have: readers would take two checkpoints
    in one place for one.
    """
    earlier: set[str] = set()
    if record is not None:
        try:
            found = record_in(record.parent)
        except CheckpointError as error:
            message = f"the {RECORD} in the repository {report.repo_id} cannot be read: {error.message}"
            remedy = "name another repository or revision, or delete that file in the repository"
            raise StateError(message, remedy=remedy) from None
        earlier = {n for n in found.files if not n.startswith(".") and n != CARD} if found is not None else set()
    others = there - set(report.files)
    foreign = {n for n in others - earlier if _read_instead(n, report)}
    if foreign:
        named = ", ".join(map(printable, sorted(foreign)))
        what = f"another checkpoint: {named}, which oftsurgery did not put there"
        if ADAPTER_CONFIG in foreign:
            what = f"an adapter: {named}; transformers would load the adapter instead of the pushed model"
        raise StateError(
            f"the repository {report.repo_id} holds {what}",
            remedy=f"name another repository or revision, or delete these files in the repository: {named} (`hf repos delete-files`)",
        )
    return others & earlier


def _read_instead(name: str, report: PushReport) -> bool:
    """Whether loaders would read a file of the repository instead of the pushed files, or beside them."""
    if name == ADAPTER_CONFIG:
        return True
    weights = "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    return weights and any(n.endswith(".safetensors") for n in report.files)


def _card(folder: Path, there: Path | None, report: PushReport) -> str:
    mine = card.for_repository(card.read_card(folder), report.repo_id, report.revision, pictures=report.pictures)
    return mine if there is None else card.merged(mine, card.read_card(there.parent))


# --- talking to the Hub -----------------------------------------------------------------------------------------------


def _token(token: str | None) -> str:
    with needs("huggingface-hub", "pip install huggingface-hub"):
        from huggingface_hub import get_token
    found = token or get_token()
    if not found:
        raise HubError("there is no token for the Hub", remedy=_LOGIN)
    return found


def _api(token: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="oftsurgery", library_version=__version__)


_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
_AGAIN = "push again, with `oftsurgery push` or push_to_hub: uploaded files are not sent again"
_MAY_WRITE = "use a token that may write to this repository, or may create the repository"
_NAMES = "check the names of the repository and the revision, and the token's permissions"
_REASONS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        401: ("the Hub does not accept the token", _LOGIN),
        403: ("the token does not allow this", _MAY_WRITE),
        404: ("the repository, revision or file does not exist, or is hidden from this token", _NAMES),
        409: ("another request is changing the repository", f"wait for the other request; {_AGAIN}"),
        412: ("others have committed to the branch in the meantime", _AGAIN),
        429: ("the Hub received too many requests", f"wait a while; {_AGAIN}"),
    }
)


@contextmanager
def _talking(doing: str, token: str, left: Callable[[], str] = str) -> Iterator[None]:
    """Convert the client's errors to :class:`HubError`, with a remedy and without the token or signed addresses."""
    from huggingface_hub import errors

    try:
        yield
    except OFTSurgeryError:
        raise
    except (OSError, errors.HTTPError, RuntimeError, ValueError) as error:
        reason, remedy = _explained(error)
        text = "; ".join(filter(None, (f"{doing}: {reason}", left())))
        # `from None`, since a traceback would print the client's own message, which may hold the server's secrets
        raise HubError(without_tokens(text, token), remedy=remedy) from None


def _explained(error: BaseException) -> tuple[str, str]:
    """The reason and the remedy for an error of the Hub's client."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = [*causes(error)]
    answered = next((e for e in chain if getattr(e, "response", None) is not None), None)
    if answered is None:
        name = type(chain[-1]).__name__
        if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
            return "the Hub's client is in offline mode", "unset the environment variable HF_HUB_OFFLINE"
        if isinstance(error, ValueError) and "metadata in README.md" in str(error):
            return _short(error), "correct the metadata of the model card, README.md"
        return f"{name}: {_short(chain[-1])}", f"check the network; {_AGAIN}"
    response: Any = answered.response  # type: ignore[attr-defined]
    status = response.status_code
    other = (
        ("the Hub failed", f"try again later; {_AGAIN}")
        if status >= 500
        else ("the Hub refused the request", "follow the Hub's message, which this error quotes")
    )
    reason, remedy = _REASONS.get(status, other)
    said = getattr(answered, "server_message", None) or response.headers.get("X-Error-Message") or ""
    reason += f" (HTTP {status}{': ' + _short(said) if said else ''})"
    wait = response.headers.get("Retry-After")
    if status == 429 and wait:
        remedy = f"wait {printable(wait, 20)} seconds; {_AGAIN}"
    return reason, remedy


def _short(text: object) -> str:
    """A message on one line, without the parameters of addresses, which may be signatures."""
    lines = " ".join(str(text).split())
    return printable(re.sub(r"(https?://[^\s?'\"]+)\?\S*", r"\1", lines), 300)
