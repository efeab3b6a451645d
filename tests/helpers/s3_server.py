"""Moto's S3 on the loopback, for a real client in this process or in others: it notes every request, looks after each, fails where it is
told to, and kills a client before a request.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

BUCKET = "bucket"
#: what a client finds the server by
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Request:
    """One request: its method, the path with the query, and the range of bytes that was asked for."""

    method: str
    path: str
    range: str
    sent: int  # bytes of the answer

    @property
    def writes(self) -> bool:
        return self.method != "GET" and self.method != "HEAD"


@dataclass
class Fault:
    """A 403 in place of the answer to the next ``times`` requests that match."""

    method: str
    path: str
    times: int = 1


@dataclass(eq=False)
class S3:
    """The server's state, with one bucket.

    Attributes:
        requests: what was asked for.
        faults: what fails.
        looking: called after each request that writes.
    """

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    looking: Callable[[], None] | None = None
    _victim: tuple[int, int] | None = None  # (process, requests that are left to it)
    _lock: Any = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._app: Any = DomainDispatcherApplication(create_backend_app)

    @property
    def environment(self) -> dict[str, str]:
        return KEYS | {"AWS_ENDPOINT_URL": self.url}

    def fail(self, method: str, path: str, times: int = 1) -> None:
        self.faults.append(Fault(method, path, times))

    def kill(self, process: int, after: int) -> None:
        """Kill the ``process`` when it sends its request number ``after``, before the request does anything."""
        self._victim = (process, after)

    @property
    def _bucket(self) -> Any:
        return _backend().buckets[BUCKET]

    def files(self, below: str) -> dict[str, bytes]:
        """``{name: contents}`` below a folder, as they are now, without any client."""
        keys = dict(self._bucket.keys.items())
        return {name.removeprefix(f"{below}/"): key.value for name, key in keys.items() if name.startswith(f"{below}/")}

    def put(self, below: str, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            _backend().put_object(BUCKET, f"{below}/{name}", data)

    def remove(self, below: str) -> None:
        for name in self.files(below):
            self._bucket.keys.pop(f"{below}/{name}")

    @property
    def unfinished(self) -> list[str]:
        """The keys of uploads in parts that are neither complete nor aborted."""
        return [upload.key_name for upload in self._bucket.multiparts.values()]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"] + (f"?{environ['QUERY_STRING']}" if environ.get("QUERY_STRING") else "")
        method = environ["REQUEST_METHOD"]
        with self._lock:
            if self._victim is not None:
                process, left = self._victim
                self._victim = (process, left - 1) if left > 1 else None
                if left == 1:
                    os.kill(process, signal.SIGKILL)
                    environ["wsgi.input"] = io.BytesIO()
                    start_response("500 Killed", [])
                    return [b""]
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                    start_response("403 Forbidden", [("Content-Type", "application/xml")])
                    return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        answer = b"".join(self._app(environ, start_response))
        with self._lock:
            request = Request(method, path, environ.get("HTTP_RANGE", ""), 0 if method == "HEAD" else len(answer))
            self.requests.append(request)
            if request.writes and self.looking is not None:
                self.looking()
        return [answer]


def _backend() -> Any:
    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


@contextmanager
def serving() -> Iterator[S3]:
    """A server with an empty bucket, on a free port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3 = S3()
    server = make_server("127.0.0.1", 0, s3, threaded=True)
    s3.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    _backend().create_bucket(BUCKET, "us-east-1")
    try:
        yield s3
    finally:
        _backend().reset()
        server.shutdown()
        server.server_close()
        thread.join()


def talk_to(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients in this process, and in those that it starts, talk to the server."""
    import fsspec

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
