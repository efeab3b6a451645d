""":func:`read_texts` reads a calibration's texts from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from oftsurgery.errors import CalibrationError, needs


def read_texts(path: Path) -> list[str]:
    """The texts in a file without the blank ones: the lines of a ``.txt`` file, or each row's ``text`` in a ``.jsonl`` or
    ``.parquet`` file.

    Raises:
        CalibrationError: the file does not exist, is of another kind or damaged, or holds no text.
        MissingDependencyError: the file is ``.parquet`` and pyarrow is not installed.
    """
    if not path.is_file():
        message = "the calibration's file does not exist"
        raise CalibrationError(message, path=path, remedy="give a .txt, .jsonl or .parquet file of texts")
    readers = {".txt": _lines, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        message = (
            f"texts cannot be read from a file {f'ending in {path.suffix}' if path.suffix else 'without an ending'}"
        )
        raise CalibrationError(message, path=path, remedy=f"give a {', '.join(readers)} file")
    texts = [text for text in readers[path.suffix.lower()](path) if text.strip()]
    if not texts:
        raise CalibrationError("the file holds no text", path=path, remedy="give some hundred texts")
    return texts


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends."""
    # str.splitlines would end lines at U+0085, U+2028 and U+2029 too, which stand inside strings of JSON and inside sentences
    try:
        with path.open(encoding="utf-8-sig") as file:  # Windows' editors put a mark before the first line
            yield from (line.rstrip("\n") for line in file)
    except UnicodeDecodeError as error:
        message = f"the file is not UTF-8 text ({error})"
        raise CalibrationError(message, path=path, remedy="save the file as UTF-8") from error


def _jsonl(path: Path) -> Iterator[str]:
    """The texts of a JSON Lines file, one object with a ``text`` a line."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"line {number} is not valid JSON ({error})", path=path, remedy=_ROWS) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise CalibrationError(f"line {number} has no string 'text'", path=path, remedy=_ROWS)
        yield text


def _parquet(path: Path) -> Iterator[str]:
    with needs("pyarrow", "pip install 'oftsurgery[parquet]', or give a .txt or .jsonl file"):
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            at = schema.get_field_index("text")
            if at < 0 or not (types.is_string(schema.field(at).type) or types.is_large_string(schema.field(at).type)):
                raise CalibrationError("the file has no column 'text' of strings", path=path, remedy=_ROWS)
            for batch in file.iter_batches(columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (ArrowException, OSError) as error:
        message = f"the file is not a readable Parquet file ({error})"
        raise CalibrationError(
            message, path=path, remedy="write the file again, or give a .txt or .jsonl file"
        ) from error


_ROWS = "give rows that hold their text in the field 'text'"
