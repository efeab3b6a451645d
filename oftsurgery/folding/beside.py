""":func:`beside_model` says what lies beside the weights of a model in memory: files of the folder that it was loaded from, and a
tokenizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from oftsurgery.adapters.reading import homes_of
from oftsurgery.files.carried import Carried, carried_from
from oftsurgery.files.tokenizer_files import choose_tokenizer, restore_tokenizer
from oftsurgery.records.record import FoldRecord


@contextmanager
def beside_model(home: Path | None, record: FoldRecord | None, tokenizer: Any = None) -> Iterator[Carried]:
    """What goes along with a model's weights, while the body runs.

    Args:
        home: the folder that the model was loaded from, or None.
        record: of what is folded in.
        tokenizer: ``"adapter"``, ``"base"``, a folder, or an object with ``save_pretrained``; None: the last adapter's where
            its folder is there still and has one, else the base's.

    Raises:
        StateError: what is asked for is not there.
        CheckpointError: a file cannot be used.
    """
    carried = Carried() if home is None else carried_from(home, [p.name for p in home.glob("model*.safetensors")])
    if not hasattr(tokenizer, "save_pretrained"):
        yield choose_tokenizer(carried, homes_of(record.adapters if record is not None else ()), tokenizer)
        return
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        given = carried_from(Path(place))
        carried = restore_tokenizer(carried, given)
        files = {**carried.files, **given.files}
        yield replace(carried, files=files, tokenizer="other", chat_template=carried.chat_template and "other")
