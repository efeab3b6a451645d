"""The cache of machine code on disk.

numba's own cache does not serve here: it watches the file of one function, and a kernel has parts in several files. The name of
a cached file has a hash of everything that decides its contents (these sources, the compilers' versions and settings, the
processor), and the file begins with a hash of its contents: no file is stale, and a damaged file is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import llvmlite.binding as llvm

from oftsurgery._version import __version__

from . import processor

SOURCES = Path(__file__).parent
#: machine code beside the sources, which an image can be built with
BESIDE = SOURCES / "__pycache__"


def folders() -> Iterator[Path]:
    """The folders of machine code: the folder that NUMBA_CACHE_DIR names; or else the folder beside these sources, and the
    user's own cache.
    """
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        yield Path(named)
        return
    yield BESIDE
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oftsurgery"
    except RuntimeError:  # a user without a home
        return


@cache
def key() -> str:
    """A hash of everything that decides the machine code."""
    facts = [__version__, metadata.version("numba"), metadata.version("llvmlite"), sys.implementation.cache_tag or ""]
    facts += [llvm.get_process_triple(), processor.NAME, processor.FEATURES]
    facts += [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NUMBA_") and k != "NUMBA_CACHE_DIR"]
    facts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(SOURCES.glob("*.py"))]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _file(name: str) -> str:
    return f"oftsurgery-{name}-{key()}.nbc"


def read(name: str) -> tuple[int, bytes] | None:
    """The number of arguments and the object code of a kernel; None if no folder holds them."""
    for folder in folders():
        try:
            content = contents_of((folder / _file(name)).read_bytes())
        except OSError:
            continue
        if content is not None:
            return content
    return None


def contents_of(file: bytes) -> tuple[int, bytes] | None:
    """The number of arguments and the object code in a cached file; None if the file is damaged."""
    digest, _, rest = file.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None
    arguments, _, code = rest.partition(b"\n")
    return int(arguments), code


def write(name: str, arguments: int, code: bytes) -> None:
    """Keep object code in the first folder that can be written to. Without such a folder the next process compiles again."""
    content = b"%d\n%b" % (arguments, code)
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                whole = Path(work) / _file(name)
                whole.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                whole.chmod(0o644)  # for other users of an image
                whole.replace(folder / whole.name)
        except OSError:
            continue
        return


def folder_of(name: str) -> Path | None:
    """The folder that holds a kernel; None if no folder does."""
    return next((folder for folder in folders() if (folder / _file(name)).is_file()), None)
