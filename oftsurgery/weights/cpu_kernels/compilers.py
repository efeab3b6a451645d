"""Processes that compile kernels: one for each processor, so that several kernels are compiled at a time.

numba holds a lock while it compiles, so threads would wait for one another. A process takes the name of a kernel from its
standard input, and answers with the object code, until its input ends.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread

from . import code_cache

Code = tuple[int, bytes]

#: processes at a time: each takes 150 MB
_MOST = 4
#: the settings of numba under which its own passes do as little as possible: :mod:`.compiling` optimises the whole kernel
_SETTINGS = {"NUMBA_OPT": "0", "NUMBA_DISABLE_JIT": "0"}
_PROGRAM = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {module} import answer; answer()"


def start(names: Iterable[str]) -> dict[str, Future[Code]]:
    """Begin to compile kernels, in this order; the cache then keeps them. Returns of each kernel the number of its arguments and
    its object code.
    """
    left = deque(names)
    found: dict[str, Future[Code]] = {name: Future() for name in left}
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for _ in range(min(processors, len(left), _MOST)):
        Thread(target=_work, args=(left, found), name="oftsurgery-compiler", daemon=True).start()
    return found


def _work(left: deque[str], found: dict[str, Future[Code]]) -> None:
    """Compile names from ``left`` until no name is left: in a process, or in this one if the process fails."""
    name = _next(left)
    with suppress(Exception), _process() as process:
        while name is not None:
            _set(found[name], name, *_ask(process, name))
            name = _next(left)
    while name is not None:
        try:
            _set(found[name], name, *import_module(".compiling", __package__).compile_kernel(name))
        except Exception as error:  # the path that needs the kernel fails with it
            found[name].set_exception(error)
        name = _next(left)


def _next(left: deque[str]) -> str | None:
    try:
        return left.popleft()
    except IndexError:
        return None


def _set(found: Future[Code], name: str, arguments: int, code: bytes) -> None:
    code_cache.write(name, arguments, code)
    found.set_result((arguments, code))


def _process() -> subprocess.Popen[str]:
    if getattr(sys, "frozen", False) or not Path(sys.executable or "").name.startswith("python"):
        raise OSError("a program that embeds Python starts itself by this name")
    # -I: neither the current folder nor PYTHONPATH comes before the paths of this process
    package = str(Path(__file__).parents[3])
    program = _PROGRAM.format(module=f"{__package__}.answering")
    command = [sys.executable, "-I", "-c", program, json.dumps([*sys.path, package])]
    return subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **_SETTINGS},
    )


def _ask(process: subprocess.Popen[str], name: str) -> Code:
    assert process.stdin is not None  # noqa: S101 - it is a pipe
    assert process.stdout is not None  # noqa: S101
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    arguments, code = json.loads(process.stdout.readline())
    return arguments, base64.b64decode(code)
