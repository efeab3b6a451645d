"""The CPU kernels as functions: from the cache of machine code, or compiled by numba, each kernel when it is first needed.

A kernel in the cache needs llvmlite alone; numba, whose import takes longer than many folds, only compiles.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm

from oftsurgery.notices import COMPILING, notice

from . import KERNELS, code_cache, compilers, processor, symbol
from .compilers import Code

_lock = threading.Lock()
_kernels: dict[str, Kernel] = {}
#: machine code of kernels, read or still being compiled
_coming: dict[str, Future[Code]] = {}


class Kernel:
    """A compiled C function of 64-bit integers. Other threads run during a call; other kernels call the address.

    Args:
        name: a key of :data:`KERNELS`.
        arguments: the number of its arguments.
        code: the object code.
    """

    def __init__(self, name: str, arguments: int, code: bytes) -> None:
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), processor.target())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(symbol(name))
        if not self.address:
            raise RuntimeError(f"the object code of the kernel {name} does not hold {symbol(name)}")
        self._call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(self.address)

    def __call__(self, *arguments: int) -> None:
        self._call(*arguments)


def kernel(name: str) -> Kernel:
    """The kernel of that name. The first call reads the kernel from the cache, or compiles it."""
    found = _kernels.get(name)
    if found is None:
        prepare([name])
        code = _coming[name].result()
        with _lock:
            found = _kernels.get(name)
            if found is None:
                found = _kernels[name] = Kernel(name, *code)
    return found


def prepare(names: Sequence[str]) -> None:
    """Begin to read or to compile the kernels that a job needs, in this order, while the caller does other work."""
    if all(name in _coming for name in names):
        return
    with _lock:
        new = [name for name in names if name not in _coming]
        held = {name: code_cache.read(name) for name in new}
        missing = [name for name, code in held.items() if code is None]
        if missing:
            _say_once()
        _coming.update(compilers.start(missing))
        for name, code in held.items():
            if code is not None:
                _coming[name] = Future()
                _coming[name].set_result(code)


@cache
def _say_once() -> None:
    """Give the notice that this process compiles."""
    notice(COMPILING)


def _after_fork() -> None:
    """A child has none of the threads that its parent's kernels come from."""
    global _lock
    _lock = threading.Lock()
    for name in [name for name, code in _coming.items() if not code.done()]:
        del _coming[name]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def warm_up() -> tuple[int, Path | None]:
    """Compile every kernel that no cache holds. Returns the number of these kernels, and the folder with the code: None if no
    folder can be written to.
    """
    missing = [name for name in KERNELS if code_cache.read(name) is None]
    for code in compilers.start(missing).values():
        code.result()
    return len(missing), code_cache.folder_of(next(iter(KERNELS)))
