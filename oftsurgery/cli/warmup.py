"""The command ``warmup``: compile the kernels before the first fold, while an image is built; and an early start for other
commands."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress

from oftsurgery.errors import needs

from .arguments import AddCommand
from .printing import wants_words


def add_warmup(command: AddCommand) -> None:
    text = "compile the CPU kernels that the first folds would compile, where no cache holds them yet"
    command("warmup", text, "--quiet", _warmup)


def _warmup(args: argparse.Namespace) -> None:
    with needs("numba", "pip install numba; without numba folds take a slower path, which needs no warming"):
        import numba  # noqa: F401
    from oftsurgery.weights.cpu_kernels import KERNELS, compiled

    count, folder = compiled.warm_up()
    facts = {"kernels": len(KERNELS), "compiled": count, "folder": None if folder is None else str(folder)}
    if wants_words(args, facts):
        where = "in no cache: no folder can be written to" if folder is None else f"in {folder}"
        print(f"{len(KERNELS)} kernels, {count} of them compiled now, {where}")


def begin_compiling() -> None:
    """Compile what every fold needs, where no cache holds it, while this process imports what its command needs. An error here is
    no error of the command: the fold meets the error again, warns, and takes a slower path.
    """
    if os.environ.get("OFTSURGERY_BACKEND", "auto") not in ("auto", "numba"):
        return
    with suppress(Exception):
        from oftsurgery.weights.cpu_kernels import OF_EVERY_FOLD, compiled

        compiled.prepare(OF_EVERY_FOLD)
