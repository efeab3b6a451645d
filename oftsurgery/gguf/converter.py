""":func:`convert` runs llama.cpp's converter, ``convert_hf_to_gguf.py``, as a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

from oftsurgery.errors import ExportError, StateError, needs, printable

CONVERTER = "convert_hf_to_gguf.py"

#: the dtypes of the weights, with the converter's names
OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

_SHOWN = 12  # last lines of the converter's messages


def require_gguf() -> None:
    """Import the package of the ``gguf`` extra.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    with needs("gguf", "pip install 'oftsurgery[gguf]'"):
        importlib.import_module("gguf")


def check_converter(converter: Path) -> None:
    """Refuse a converter that is not a file.

    Raises:
        StateError: the converter does not exist, or is a folder.
    """
    inner = converter / CONVERTER
    if converter.is_dir():
        remedy = f"name the file in the folder: {inner}" if inner.is_file() else f"name llama.cpp's {CONVERTER}"
        raise StateError("the converter is a folder, and a Python file is needed", path=converter, remedy=remedy)
    if not converter.is_file():
        remedy = f"name llama.cpp's {CONVERTER} (--converter), which lies in the top folder of llama.cpp's repository"
        raise StateError("the converter does not exist", path=converter, remedy=remedy)


def convert(converter: Path, folder: Path, file: Path, dtype: str, python: str | None = None) -> None:
    """Write ``file`` from the checkpoint in ``folder``.

    Args:
        python: the Python that runs the converter; None: the Python that runs oftsurgery.

    Raises:
        StateError: ``python`` cannot be run.
        ExportError: the converter failed, or wrote no file.
    """
    command = [python or sys.executable, str(converter.absolute()), str(folder.absolute())]
    command += ["--outfile", str(file.absolute()), "--outtype", OUTTYPES[dtype]]
    # the converter reads the local folder alone
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(command, capture_output=True, env=environment, stdin=subprocess.DEVNULL, check=False)  # noqa: S603 - the user names the converter
    except OSError as error:
        message = f"the Python that runs the converter cannot be started: {printable(error.strerror or error)}"
        raise StateError(message, path=python, remedy="name a Python interpreter (--converter-python)") from error
    if done.returncode or not file.is_file():
        what = (
            f"failed with exit code {done.returncode}"
            if done.returncode
            else "ended without an error and without a file"
        )
        raise ExportError(
            f"llama.cpp's converter {what}; its last lines: {_last_lines(done.stderr or done.stdout)}",
            path=converter,
            remedy=f"the converter needs the packages of llama.cpp's requirements/requirements-{CONVERTER.removesuffix('.py')}.txt: name a "
            "Python that has these packages (--converter-python); see llama.cpp for the architectures that the converter knows",
        )


def _last_lines(said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip(" ^~")]
    return " | ".join(printable(line, 300) for line in lines[-_SHOWN:]) or "none"
