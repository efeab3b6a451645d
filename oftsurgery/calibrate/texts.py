"""Texts for a calibration, from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from oftsurgery.errors import CalibrationError, needs


def read_texts(path: Path) -> list[str]:
    """The texts in a file, blank ones left out: of ``.txt`` one a line, of ``.jsonl`` and ``.parquet`` each row's
    ``text``.

    Raises:
        CalibrationError: no such file, another kind, damaged, or without texts.
        MissingDependencyError: a ``.parquet`` without pyarrow.
    """
    if not path.is_file():
        raise CalibrationError("no such file", path=path, remedy="give a .txt, .jsonl or .parquet file of texts")
    readers = {".txt": _lines, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        message = f"texts are not read from {path.suffix or 'a file without an ending'}"
        raise CalibrationError(message, path=path, remedy=f"give a {', '.join(readers)} file")
    texts = [text for text in readers[path.suffix.lower()](path) if text.strip()]
    if not texts:
        raise CalibrationError("the file holds no text", path=path, remedy="give some hundred texts")
    return texts


def _lines(path: Path) -> Iterator[str]:
    # str.splitlines ends lines at U+0085, U+2028 and U+2029 too, which JSON has inside strings, and texts inside sentences
    try:
        with path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"no UTF-8 text ({error})", path=path, remedy="save it as UTF-8") from error


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"line {number} is no JSON ({error})", path=path, remedy=_ROWS) from error
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
                raise CalibrationError("there is no column 'text' of strings", path=path, remedy=_ROWS)
            for batch in file.iter_batches(columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"no readable Parquet file ({error})", path=path, remedy="write it anew") from error


_ROWS = "give rows with their text in 'text'"
