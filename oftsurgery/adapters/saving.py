"""Write an adapter's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from oftsurgery.errors import StateError
from oftsurgery.files.reading import ADAPTER_CONFIG, ADAPTER_TENSORS
from oftsurgery.files.shard_writer import ShardWriter
from oftsurgery.files.staging import Staging
from oftsurgery.files.writing import write_files


def write_file(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool
) -> None:
    """Write a single safetensors file, whole or not at all.

    Raises:
        StateError: the file exists and ``force`` is not set, or its name is no safetensors file's.
        DiskError: the file could not be written.
    """
    from safetensors.torch import save

    destination = Path(path).expanduser()
    if destination.suffix != ".safetensors":
        message = "this form is one file, and the name is no safetensors file's"
        raise StateError(message, path=destination, remedy="name a file: style.safetensors")
    write_files({destination: save(dict(tensors), dict(metadata))}, force=force)


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
