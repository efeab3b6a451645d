"""A Hub on the loopback: the calls that huggingface_hub makes to create, push to and read a model repository.

It keeps everything in memory, checks what the real one checks (tokens, permissions, hashes, parents of commits, cards'
metadata), notes every request, and fails where it is told to. Not a Hub: one namespace a token, models only, no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest
import yaml

FIELDS: dict[str, Any] = {
    "license": str,
    "license_name": str,
    "license_link": str,
    "library_name": str,
    "pipeline_tag": str,
    "base_model_relation": str,
    "base_model": (str, list),
    "tags": list,
    "language": (str, list),
    "datasets": (str, list),
}
RELATIONS = ("adapter", "merge", "quantized", "finetune")


@dataclass
class Fault:
    """What to do instead of answering the next ``times`` requests that match.

    Attributes:
        method, path: of the requests; a regular expression on the path.
        times: how often.
        status, headers, body: of the answer.
        cut: read this many bytes of the body, then reset the connection; None: answer.
        after: first let this many matching requests pass.
    """

    method: str
    path: str
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "it does not work"}'
    cut: int | None = None
    after: int = 0


@dataclass
class Repo:
    """Branches and commits; a file is its bytes, or the SHA-256 of a blob of the large file storage."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    def commit(self, files: dict[str, bytes | str], message: str, parent: str) -> str:
        facts = repr((sorted(files.items()), message, parent, len(self.commits)))
        sha = hashlib.sha1(facts.encode()).hexdigest()  # noqa: S324 - as git names commits
        self.commits[sha], self.messages[sha] = files, message
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class Hub:
    """The server's state.

    Args:
        users: ``{token: user}``; a token that starts with ``read`` may not write.
        large: files from this size on go to the large file storage.
        part: bytes of a part, for files of more than one.
    """

    def __init__(self, users: dict[str, str], *, large: int = 20_000, part: int = 1 << 30) -> None:
        self.users = users
        self.large = large
        self.part = part
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, str]] = []  # path and range of bytes of each GET
        self.before_commit: list[Any] = []
        self.lock = threading.RLock()
        self.url = ""

    # --- for tests ---

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        self.faults.append(Fault(method, path, **how))
        return self.faults[-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repo = self.repos[repo_id]
        sha = repo.resolve(revision)
        assert sha is not None
        return {name: self.content(of) for name, of in repo.commits[sha].items()}

    def put(self, repo_id: str, files: dict[str, str | None], revision: str = "main") -> str:
        """Commit as somebody else would; None deletes."""
        repo = self.repos[repo_id]
        now = dict(repo.commits[repo.branches[revision]])
        for name, text in files.items():
            if text is None:
                del now[name]
            else:
                now[name] = text.encode()
        repo.branches[revision] = repo.commit(now, "by hand", repo.branches[revision])
        return repo.branches[revision]

    def stored(self, data: bytes) -> bytes | str:
        """A file of a commit: its bytes, or of a large file the hash by which the large file storage has it."""
        if len(data) < self.large:
            return data
        oid = hashlib.sha256(data).hexdigest()
        self.blobs[oid] = data
        return oid

    def asked(self, method: str, path: str) -> list[str]:
        return [p for m, p in self.requests if m == method and re.search(path, p)]

    def content(self, of: bytes | str) -> bytes:
        return of if isinstance(of, bytes) else self.blobs[of]

    # --- the calls ---

    def route(self, method: str, path: str, query: dict[str, list[str]], headers: Any, body: bytes) -> Any:
        for pattern, call in self.ROUTES:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match is not None:
                with self.lock:
                    return call(self, *map(unquote, match.groups()), query=query, headers=headers, body=body)
        raise Refused(404, f"no such call: {method} {path}")

    def user(self, headers: Any, *, write: str | None = None) -> str:
        kind, _, token = headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        if write is not None and (token.startswith("read") or self.users[token] != write.partition("/")[0]):
            raise Refused(403, f"You don't have the rights to write to {write}")
        return self.users[token]

    def repo(self, repo_id: str, headers: Any) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        if repo.private and self.user(headers) != repo_id.partition("/")[0]:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def at(self, repo_id: str, revision: str, headers: Any) -> tuple[Repo, str]:
        repo = self.repo(repo_id, headers)
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha

    def harnesses(self, **_: Any) -> Any:
        return {"harnesses": []}

    def whoami(self, *, headers: Any, **_: Any) -> Any:
        return {"type": "user", "name": self.user(headers), "orgs": [], "auth": {"type": "access_token"}}

    def create(self, *, headers: Any, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or self.user(headers)
        repo_id = f"{owner}/{asked['name']}"
        self.user(headers, write=repo_id)
        if repo_id in self.repos:
            raise Refused(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.repos[repo_id] = Repo(private)
        repo.branches["main"] = repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", "")
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}

    def validate(self, *, body: bytes, **_: Any) -> Any:
        errors = problems(json.loads(body)["content"])
        if errors:
            raise Refused(400, "Invalid metadata", errors=[{"message": e} for e in errors], warnings=[])
        return {"errors": [], "warnings": []}

    def info(self, repo_id: str, revision: str | None = None, *, headers: Any, **_: Any) -> Any:
        repo, sha = self.at(repo_id, revision or "main", headers)
        return {
            "_id": sha[:24],
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(repo.commits[sha])],
        }

    def branch(self, repo_id: str, name: str, *, headers: Any, body: bytes, **_: Any) -> Any:
        self.user(headers, write=repo_id)
        repo = self.repo(repo_id, headers)
        if name in repo.branches:
            raise Refused(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.branches[json.loads(body or b"{}").get("startingPoint", "main")]
        return {}

    def preupload(self, repo_id: str, revision: str, *, headers: Any, body: bytes, query: Any, **_: Any) -> Any:
        if "create_pr" not in query:
            self.user(headers, write=repo_id)
        repo, sha = self.at(repo_id, revision, headers)
        ignored = self.content(repo.commits[sha].get(".gitignore", b"")).decode().split()
        answer = []
        for file in json.loads(body)["files"]:
            there = repo.commits[sha].get(file["path"])
            oid = there if isinstance(there, str) else None if there is None else git_blob(there)
            mode = "lfs" if file["size"] >= self.large else "regular"
            answer.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in ignored, "oid": oid}
            )
        return {"files": answer, "commitOid": sha}

    def batch(self, repo_id: str, *, headers: Any, body: bytes, **_: Any) -> Any:
        self.user(headers)
        self.repo(repo_id, headers)
        objects = []
        for item in json.loads(body)["objects"]:
            oid, size = item["oid"], item["size"]
            if oid in self.blobs:
                objects.append({"oid": oid, "size": size})
                continue
            signed = "X-Amz-Signature=5ec4e7"
            upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}?{signed}"}
            if size > self.part:
                count = -(-size // self.part)
                upload["href"] = f"{self.url}/lfs/{oid}/complete?{signed}"
                upload["header"] = {"chunk_size": str(self.part)} | {
                    f"{i:05d}": f"{self.url}/lfs/{oid}/{i}?{signed}" for i in range(1, count + 1)
                }
            verify = {"href": f"{self.url}/{repo_id}.git/info/lfs/objects/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, *, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the bytes are not those of the hash")
        self.blobs[oid] = body
        return {}

    def upload_part(self, oid: str, part: str, *, body: bytes, **_: Any) -> Any:
        self.parts.setdefault(oid, {})[int(part)] = body
        return ("", {"ETag": hashlib.md5(body).hexdigest()})  # noqa: S324 - as S3 names parts

    def complete(self, oid: str, *, body: bytes, **_: Any) -> Any:
        parts = self.parts.pop(oid)
        for part in json.loads(body)["parts"]:
            if hashlib.md5(parts[part["partNumber"]]).hexdigest() != part["etag"]:  # noqa: S324
                raise Refused(400, "a part is not what was uploaded")
        return self.upload(oid, body=b"".join(parts[i] for i in sorted(parts)))

    def verify(self, repo_id: str, *, headers: Any, body: bytes, **_: Any) -> Any:
        self.user(headers)
        asked = json.loads(body)
        if len(self.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such object, or of another size")
        return {}

    def commit(self, repo_id: str, revision: str, *, headers: Any, body: bytes, query: Any, **_: Any) -> Any:
        pull = "create_pr" in query
        if not pull:
            self.user(headers, write=repo_id)
        if self.before_commit:
            self.before_commit.pop(0)()
        repo, head = self.at(repo_id, revision, headers)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if not pull and header.get("parentCommit") not in (None, head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            path, value = line["value"]["path"], line["value"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Refused(400, f"the large file storage has no {path}")
                files[path] = value["oid"]
            elif line["key"] == "deletedFile":
                if path not in files:
                    raise Refused(404, f"no such file: {path}", "EntryNotFound")
                del files[path]
        sha = repo.commit(files, header["summary"], head)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}
        if pull:
            repo.pulls += 1
            repo.branches[f"refs/pr/{repo.pulls}"] = sha
            return answer | {"pullRequestUrl": f"{self.url}/{repo_id}/discussions/{repo.pulls}"}
        repo.branches[revision] = sha
        return answer

    def tree(self, repo_id: str, revision: str, below: str = "", *, headers: Any, query: Any, **_: Any) -> Any:
        repo, sha = self.at(repo_id, revision, headers)
        prefix = f"{below}/" if below else ""
        names = [name for name in sorted(repo.commits[sha]) if name.startswith(prefix)]
        if below and not names:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if query.get("recursive") in (["true"], ["True"]):
            return [self._entry(repo, sha, name) for name in names]
        folders = dict.fromkeys(
            prefix + n.removeprefix(prefix).partition("/")[0] for n in names if "/" in n.removeprefix(prefix)
        )
        found = [{"type": "directory", "path": path, "size": 0, "oid": git_blob(path.encode())} for path in folders]
        return found + [self._entry(repo, sha, name) for name in names if "/" not in name.removeprefix(prefix)]

    def paths_info(self, repo_id: str, revision: str, *, headers: Any, body: bytes, **_: Any) -> Any:
        repo, sha = self.at(repo_id, revision, headers)
        names = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        return [self._entry(repo, sha, name) for name in names if name in repo.commits[sha]]

    def _entry(self, repo: Repo, sha: str, path: str) -> dict[str, Any]:
        of = repo.commits[sha][path]
        data = self.content(of)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
        return entry | ({"lfs": {"oid": of, "size": len(data), "pointerSize": 134}} if of != data else {})

    def resolve(self, repo_id: str, revision: str, path: str, *, headers: Any, **_: Any) -> Any:
        repo, sha = self.at(repo_id, revision, headers)
        of = repo.commits[sha].get(path)
        if of is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if isinstance(of, str):
            linked = {"X-Linked-Etag": f'"{of}"', "X-Linked-Size": str(len(self.blobs[of]))}
            storage = self.url.replace("127.0.0.1", "localhost")  # another host, as the real one's storage is
            return (302, {"Location": f"{storage}/lfs/{of}", "X-Repo-Commit": sha} | linked)
        return (of, {"ETag": f'"{git_blob(of)}"', "X-Repo-Commit": sha})

    def download(self, oid: str, **_: Any) -> Any:
        return (self.blobs[oid], {"ETag": f'"{oid}"'})

    ID = r"([\w.-]+/[\w.-]+)"
    ROUTES: Any = (
        (r"GET /api/agent-harnesses", harnesses),
        (r"GET /api/whoami-v2", whoami),
        (r"POST /api/repos/create", create),
        (r"POST /api/validate-yaml", validate),
        (rf"GET /api/models/{ID}", info),
        (rf"GET /api/models/{ID}/revision/([^/]+)", info),
        (rf"GET /api/models/{ID}/tree/([^/]+)", tree),
        (rf"GET /api/models/{ID}/tree/([^/]+)/(.+)", tree),
        (rf"POST /api/models/{ID}/paths-info/([^/]+)", paths_info),
        (rf"POST /api/models/{ID}/branch/([^/]+)", branch),
        (rf"POST /api/models/{ID}/preupload/([^/]+)", preupload),
        (rf"POST /api/models/{ID}/commit/([^/]+)", commit),
        (rf"POST /{ID}\.git/info/lfs/objects/batch", batch),
        (rf"POST /{ID}\.git/info/lfs/objects/verify", verify),
        (r"PUT /lfs/(\w+)", upload),
        (r"PUT /lfs/(\w+)/(\d+)", upload_part),
        (r"POST /lfs/(\w+)/complete", complete),
        (r"(?:GET|HEAD) /lfs/(\w+)", download),
        (rf"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", resolve),
    )


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's own name of a file


def problems(card: str) -> list[str]:
    """What the Hub would say against a card's metadata, as far as its documented fields go."""
    match = re.match(r"\s*---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no object"]
    found = [
        f'"{key}" must be a {kind}' for key, kind in FIELDS.items() if key in data and not isinstance(data[key], kind)
    ]
    for key in ("tags", "base_model", "language"):
        values = data.get(key) if isinstance(data.get(key), list) else [data.get(key)] if key in data else []
        found += [f'"{key}" must hold strings' for v in values or [] if not isinstance(v, str)]
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", str(base)):
            found.append(f'"base_model" is no id of a model: {base}')
    if data.get("base_model_relation", "merge") not in RELATIONS:
        found.append('"base_model_relation" must be one of ' + ", ".join(RELATIONS))
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.hub.requests.append((self.command, self.path))
        if self.command == "GET":
            self.hub.ranges.append((self.path, self.headers.get("Range") or ""))
        length = int(self.headers.get("Content-Length") or 0)
        fault = self._fault(parts.path)
        if fault is not None and fault.cut is not None:
            self.rfile.read(min(fault.cut, length))
            # a reset, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault is not None:
            self._send(fault.status, fault.body.encode(), fault.headers)
            return
        try:
            answer = self.hub.route(self.command, parts.path, parse_qs(parts.query), self.headers, body)
        except Refused as refused:
            text = json.dumps({"error": refused.message, **refused.body}).encode()
            more = {"X-Error-Code": refused.code} if refused.code else {}
            self._send(refused.status, text, more | {"X-Error-Message": refused.message})
            return
        if not isinstance(answer, tuple):
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        elif isinstance(answer[0], int):
            self._send(answer[0], b"", answer[1])
        else:
            self._send_content(answer[0] if isinstance(answer[0], bytes) else answer[0].encode(), answer[1])

    def _send_content(self, data: bytes, headers: dict[str, str]) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if span is None:
            self._send(200, data, headers)
            return
        start, end = int(span[1]), min(int(span[2]), len(data) - 1)
        self._send(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _chunked(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815 - http.server's names


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client has gone


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """``hub`` at ``hub.url``, on the loopback and a free port."""
    server = _Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def talk_to(server: Hub, token: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client in this process talk to the server with this token; its cache lies in ``folder``."""
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "none"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    huggingface_hub.close_session()
