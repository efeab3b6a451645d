"""Machine code of the CPU kernels: from a cache on disk, or compiled by numba, each kernel when it is first needed.

A kernel in the cache needs llvmlite alone; numba, whose import takes as long as many a fold, is there to compile. A cached file
is named by a hash of all that its contents follow from (these sources, the compiler's versions, the processor), and holds a
hash of its contents: no file is ever stale or half-written.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from . import processor

#: the kernels: where each one is written
KERNELS = {
    "tile": "tile",
    "decode_4bit": "tile",
    "decode_int8": "tile",
    "decode_dense": "tile",
    "nearest_by_cells": "encode",
    "nearest_by_ranks": "encode",
    "given_by_cells": "encode",
    "given_by_ranks": "encode",
    "encode_int8": "encode_rows",
    "encode_dense": "encode_rows",
    "grid_by_cells": "search",
    "grid_by_ranks": "search",
    "best_by_cells": "search_best",
    "best_by_ranks": "search_best",
    "keep_by_cells": "keep",
    "keep_by_ranks": "keep",
    "sample": "keep",
    "project_by_cells": "keep",
    "project_by_ranks": "keep",
    "project_int8": "keep",
    "quantise_scales": "nested",
    "read_scales": "nested",
    "rotation_blocks": "rotations",
    "largest_angle": "rotations",
}

_lock = threading.RLock()
_kernels: dict[str, Kernel] = {}


class Kernel:
    """A compiled function of 64-bit integers. Calling it lets other threads run; its address is for other kernels.

    Args:
        name: a key of :data:`KERNELS`.
        symbol: its name in the object code.
        arguments: how many it takes.
        code: the object code.
    """

    def __init__(self, name: str, symbol: str, arguments: int, code: bytes) -> None:
        self.name = name
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(symbol)
        if not self.address:
            raise RuntimeError(f"the object code of {name} lacks {symbol}")
        # numba's own convention: where the result goes (none), where an exception goes (never one), the arguments
        words = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * arguments
        self._call = ctypes.CFUNCTYPE(ctypes.c_int32, *words)(self.address)
        self._unused = ctypes.create_string_buffer(64)
        self._at = ctypes.addressof(self._unused)

    def __call__(self, *arguments: int) -> None:
        self._call(self._at, self._at, *arguments)


def _target() -> Any:
    """The processor for one engine, which will own it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    relocation = "static" if llvm.Target.from_default_triple().name.startswith("x86") else "default"
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(
        cpu=processor.NAME, features=processor.FEATURES, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )


def kernel(name: str) -> Kernel:
    """The kernel of that name, compiled or read from the cache if this process has not yet."""
    found = _kernels.get(name)
    if found is not None:
        return found
    with _lock:
        found = _kernels.get(name)
        if found is None:
            found = _kernels[name] = _read(name) or _compile(name)
        return found


def _compile(name: str) -> Kernel:
    compiled: Callable[[Any], tuple[str, int, bytes]] = import_module(".compiling", __package__).compiled
    symbol, arguments, code = compiled(getattr(import_module(f".{KERNELS[name]}", __package__), name))
    _write(name, symbol, arguments, code)
    return Kernel(name, symbol, arguments, code)


# --- the cache --------------------------------------------------------------------------------------------------------

SOURCES = Path(__file__).parent
#: machine code beside the sources, which an image can be built with
BESIDE = SOURCES / "__pycache__"


def folders() -> Iterator[Path]:
    """Where machine code may lie: the folder that NUMBA_CACHE_DIR names, else beside these sources, or the user's."""
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
    """A hash of all that the machine code follows from."""
    facts = [metadata.version("numba"), metadata.version("llvmlite"), llvm.get_process_triple()]
    facts += [processor.NAME, processor.FEATURES]
    facts += [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NUMBA_") and k != "NUMBA_CACHE_DIR"]
    facts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(SOURCES.glob("*.py"))]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _file(name: str) -> str:
    return f"oftsurgery-{name}-{key()}.nbc"


def _read(name: str) -> Kernel | None:
    for folder in folders():
        try:
            content = contents_of((folder / _file(name)).read_bytes())
        except OSError:
            continue
        if content is not None:
            return Kernel(name, *content)
    return None


def contents_of(file: bytes) -> tuple[str, int, bytes] | None:
    """The symbol, the arguments and the object code in a cached file; None where it is damaged."""
    digest, _, rest = file.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None
    head, _, code = rest.partition(b"\n")
    symbol, arguments = json.loads(head)
    return symbol, arguments, code


def _write(name: str, symbol: str, arguments: int, code: bytes) -> None:
    """Keep object code in the first folder that can be written to; nothing is lost but time where none can."""
    content = json.dumps([symbol, arguments]).encode() + b"\n" + code
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
                part.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            Path(part.name).chmod(0o644)  # for other users of an image
            Path(part.name).replace(folder / _file(name))
        except OSError:
            continue
        return


def warm_up() -> tuple[int, Path | None]:
    """Compile every kernel that no cache holds yet; how many that were, and the folder with the code, None where there is room
    for none.
    """
    missing = [name for name in KERNELS if _read(name) is None]
    for name in missing:
        _compile(name)
    held = (folder for folder in folders() if (folder / _file(next(iter(KERNELS)))).is_file())
    return len(missing), next(held, None)
