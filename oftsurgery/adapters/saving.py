"""Write an adapter's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from oftsurgery.files.reading import ADAPTER_CONFIG, ADAPTER_TENSORS
from oftsurgery.files.shard_writer import ShardWriter
from oftsurgery.files.staging import Staging


def write_adapter(
    folder: str | PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, force: bool = False
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``, which appears by one rename.

    Raises:
        StateError: the folder exists and ``force`` is not set, or a file is in the place of a folder above it.
        DiskError: the folder could not be written; nothing is left behind.
    """
    destination = Path(folder).expanduser()
    key = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    needed = sum(t.nbytes for t in tensors.values()) + (1 << 16)
    with Staging(destination, key, needed=needed, resume=False, force=force, resumable=False) as staging:
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        with staging.writing(ADAPTER_TENSORS) as path, ShardWriter(path, shapes, {"format": "pt"}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        staging.finish(ADAPTER_TENSORS, {})
        staging.put_json(ADAPTER_CONFIG, config)
        staging.publish()
