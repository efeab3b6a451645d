"""The CPU kernels as functions: from the cache of machine code, or compiled by numba, each kernel when it is first needed.

A kernel in the cache needs llvmlite alone; numba, whose import takes longer than many folds, only compiles.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from oftsurgery.notices import COMPILING, notice

from . import code_cache, processor

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
        self.address: int = self._engine.get_function_address(_symbol(name))
        if not self.address:
            raise RuntimeError(f"the object code of the kernel {name} does not hold {_symbol(name)}")
        self._call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(self.address)

    def __call__(self, *arguments: int) -> None:
        self._call(*arguments)


def _symbol(name: str) -> str:
    return f"oftsurgery_{name}"


def kernel(name: str) -> Kernel:
    """The kernel of that name. The first call reads the kernel from the cache, or compiles it."""
    found = _kernels.get(name)
    if found is not None:
        return found
    with _lock:
        found = _kernels.get(name)
        if found is None:
            found = _kernels[name] = _cached(name) or _compile(name)
        return found


@cache
def _say_once() -> None:
    """Give the notice that this process compiles."""
    notice(COMPILING)


def _compile(name: str) -> Kernel:
    _say_once()
    compiled: Callable[[Any, str], tuple[int, bytes]] = import_module(".compiling", __package__).compiled
    function = getattr(import_module(f".{KERNELS[name]}", __package__), name)
    arguments, code = compiled(function, _symbol(name))
    code_cache.write(name, arguments, code)
    return Kernel(name, arguments, code)


def _cached(name: str) -> Kernel | None:
    """The kernel from the cache; None if no cache holds it."""
    found = code_cache.read(name)
    return None if found is None else Kernel(name, *found)


def warm_up() -> tuple[int, Path | None]:
    """Compile every kernel that no cache holds. Returns the number of these kernels, and the folder with the code: None if no
    folder can be written to.
    """
    missing = [name for name in KERNELS if _cached(name) is None]
    for name in missing:
        _compile(name)
    return len(missing), code_cache.folder_of(next(iter(KERNELS)))
