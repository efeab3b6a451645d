"""What a process of :mod:`.compilers` runs."""

from __future__ import annotations

import base64
import gc
import json
import sys

from .compiling import compile_kernel


def answer() -> None:
    """Compile the kernels whose names come on standard input, one a line; write a line of JSON for each."""
    gc.disable()  # a compilation makes many objects, and the process ends soon
    for line in sys.stdin:
        arguments, code = compile_kernel(line.strip())
        sys.stdout.write(f"{json.dumps([arguments, base64.b64encode(code).decode()])}\n")
        sys.stdout.flush()
