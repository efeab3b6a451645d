"""GGUF files are read with the package ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oftsurgery.errors import ExportError, printable


def read_gguf(file: Path) -> Any:
    """The file's ``gguf.GGUFReader``.

    Raises:
        ExportError: the file is not a whole GGUF file.
    """
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        message = f"the converter's file cannot be read as GGUF: {type(error).__name__}: {printable(error)}"
        raise ExportError(message, path=file, remedy="convert again with llama.cpp's own converter") from error


def value_in(reader: Any, key: str) -> Any:
    """The value of a file's key; None for a key that the file lacks."""
    entry = reader.get_field(key)
    return None if entry is None else entry.contents()
