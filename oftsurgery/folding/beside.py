""":func:`beside_model` finds the files that are written beside the weights of a model in memory: the files of the folder that the
model was loaded from, and a tokenizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from oftsurgery.adapters.reading import homes_of
from oftsurgery.files.carried import Carried, carried_from
from oftsurgery.files.layout import LAYOUTS
from oftsurgery.files.tokenizer_files import choose_tokenizer, restore_tokenizer
from oftsurgery.records.record import FoldRecord


@contextmanager
def beside_model(
    home: Path | None, record: FoldRecord | None, tokenizer: Any = None, config: object = None
) -> Iterator[Carried]:
    """The files beside a model's weights, which exist while the body runs.

    Args:
        home: the folder that the model was loaded from, or None.
        record: the record of the model's fold, or None.
        tokenizer: ``"adapter"``, ``"base"``, a folder, or an object with ``save_pretrained``; None: the tokenizer in the
            adapters' folders if they still exist and have one, else the base's.
        config: the model's config.

    Raises:
        StateError: the chosen tokenizer does not exist.
        CheckpointError: a file cannot be used.
    """
    weights = [
        p.name for layout in LAYOUTS for p in ([] if home is None else home.glob(layout.shards.format(suffix="*")))
    ]
    carried = Carried() if home is None else carried_from(home, weights)
    if not hasattr(tokenizer, "save_pretrained"):
        adapters = homes_of(record.adapters if record is not None else ())
        rows = rows_of(config.to_dict() if hasattr(config, "to_dict") else {})
        before = None if record is None else record.vocabulary.get("before")
        yield choose_tokenizer(carried, adapters, tokenizer, rows, before)
        return
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(Path(place))
        given = carried_from(Path(place))
        carried = restore_tokenizer(carried, given)
        files = {**carried.files, **given.files}
        yield replace(carried, files=files, tokenizer="other", chat_template=carried.chat_template and "other")


def rows_of(config: Mapping[str, Any]) -> int | None:
    """The number of rows of the embedding in a config; None for a config without this number."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    found = next((part["vocab_size"] for part in parts if part.get("vocab_size") is not None), None)
    return found if isinstance(found, int) else None
