"""The CPU kernels: their sources in numba, their compilation, and the cache of machine code.

This package imports nothing but numba, llvmlite and numpy, so that a process that only compiles starts soon.
"""

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
    "sweep": "sweep",
    "rotation_blocks": "rotations",
    "largest_angle": "rotations",
}

#: the kernels that every fold needs
OF_EVERY_FOLD = ("rotation_blocks", "largest_angle", "tile")


def symbol(name: str) -> str:
    """The name of a kernel in its object code."""
    return f"oftsurgery_{name}"
