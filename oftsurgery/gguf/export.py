""":func:`export_folder` exports a checkpoint as a GGUF file: llama.cpp's converter writes the file, and every tensor is compared with
the checkpoint before the folder appears.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from oftsurgery.dtypes import DTYPE_NAMES, NAMED
from oftsurgery.errors import StateError, printable
from oftsurgery.files.carried import Carried
from oftsurgery.files.checkpoint import Checkpoint, open_checkpoint
from oftsurgery.files.reading import sha256_of
from oftsurgery.files.staging import Staging, check_apart
from oftsurgery.folding.folder_writer import write_other_files
from oftsurgery.progress import Progress
from oftsurgery.records.record import FoldRecord, plain
from oftsurgery.records.record_file import public_record, record_in

from .chat import modelfile
from .compare import Comparison, compare
from .converter import OUTTYPES, check_converter, convert, require_gguf
from .reading import read_gguf

FILE = "model.gguf"
MODELFILE = "Modelfile"

_STAGES = 3


@dataclass(frozen=True)
class GgufReport:
    """The facts about a GGUF file that :func:`~oftsurgery.export_gguf` wrote.

    >>> report = oftsurgery.export_gguf("PLAIN", "OUT-GGUF", "llama.cpp/convert_hf_to_gguf.py")
    >>> report.architecture, report.verified, len(report.uncompared)
    ('llama', True, 0)

    Attributes:
        file: the file's name in the folder.
        dtype: the dtype of the weights: ``"bfloat16"``, ``"float16"`` or ``"float32"``; llama.cpp keeps norms in float32.
        architecture: llama.cpp's name of the architecture; None if ``verified`` is False.
        nbytes: the file's bytes.
        equal: the number of tensors that hold the checkpoint's values.
        changed: ``{tensor of the GGUF: what the converter does to such a tensor}``; the values were compared after this change.
        uncompared: ``{tensor of the GGUF: why its values were not compared}``.
        left_out: ``{tensor of the checkpoint: why the GGUF has no such tensor}``.
        verified: whether the tensors were compared.
        without_template: why the ``Modelfile`` has no template; None where it has one.
        converter: the SHA-256 of the converter's file.
        versions: the version of the package ``gguf``.
    """

    file: str
    dtype: str
    architecture: str | None
    nbytes: int
    equal: int
    changed: Mapping[str, str]
    uncompared: Mapping[str, str]
    left_out: Mapping[str, str]
    verified: bool
    without_template: str | None
    converter: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("changed", "uncompared", "left_out", "versions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return dict(plain(self))


def export_folder(
    folder: Path,
    destination: Path,
    converter: Path,
    *,
    dtype: str | None,
    python: str | None,
    verify: bool,
    force: bool,
    progress: Progress | None,
) -> GgufReport:
    """Export a checkpoint: the core of :func:`oftsurgery.export_gguf`."""
    require_gguf()
    check_converter(converter)
    checkpoint = open_checkpoint(folder)
    dtype = _checked_dtype(dtype, checkpoint)
    _check_plain(checkpoint)
    check_apart(destination, "model", [folder])
    stages = iter(range(_STAGES))

    def step(what: str) -> None:
        if progress is not None:
            progress(next(stages), _STAGES, what)

    needed = sum(NAMED[dtype].itemsize * math.prod(entry.shape) for entry in checkpoint.entries.values())
    with Staging(destination, "gguf", needed=needed, resume=False, force=force, resumable=False) as staging:
        step("convert")
        with staging.writing(FILE) as path:
            convert(converter, folder, path, dtype, python)
        staging.finish(FILE, {})
        reader = read_gguf(path)
        step("compare the tensors")
        found = compare(reader, [folder / name for name in checkpoint.shards]) if verify else Comparison(None)
        written_for_ollama = modelfile(reader, FILE)
        del reader  # the reader holds the file open
        step("write the files beside the weights")
        staging.put_text(MODELFILE, written_for_ollama.text)
        report = GgufReport(
            file=FILE,
            dtype=dtype,
            nbytes=path.stat().st_size,
            verified=verify,
            without_template=written_for_ollama.without_template,
            converter=sha256_of(converter),
            versions={"gguf": metadata.version("gguf")},
            **asdict(found),
        )
        record = record_in(folder)
        record = FoldRecord((), {}) if record is None else public_record(record)
        record = replace(record, extra={**record.extra, "gguf": report.to_dict()})
        write_other_files(staging, (), record, source=folder, jsons={}, carried=Carried(), exact=False)
        staging.publish()
    if progress is not None:
        progress(_STAGES, _STAGES, "done")
    return report


def _checked_dtype(dtype: str | None, checkpoint: Checkpoint) -> str:
    """The name of the file's dtype; None takes the dtype that most of the checkpoint's weights have."""
    if dtype is None:
        sizes: Counter[str] = Counter()
        for entry in checkpoint.entries.values():
            sizes[entry.dtype] += entry.nbytes
        most = sizes.most_common(1)[0][0] if sizes else ""
        return next((name for name in OUTTYPES if DTYPE_NAMES[NAMED[name]] == most), "bfloat16")
    name = str(dtype).removeprefix("torch.")
    if name not in OUTTYPES:
        message = f"the dtype {printable(dtype)!r} is not one of {', '.join(OUTTYPES)}"
        raise StateError(
            message, remedy="choose one of these dtypes; llama.cpp's llama-quantize makes smaller files of the result"
        )
    return name


def _check_plain(checkpoint: Checkpoint) -> None:
    """Refuse a quantised checkpoint, which llama.cpp's converter does not read.

    Raises:
        StateError: the checkpoint is quantised.
    """
    config = checkpoint.config.get("quantization_config")
    codes = next((e.name for e in checkpoint.entries.values() if e.dtype in ("U8", "I8")), None)
    if config or codes is not None:
        raise StateError(
            "the checkpoint is quantised, and llama.cpp's converter reads plain weights",
            tensor=codes,
            path=checkpoint.folder,
            remedy="fold into plain weights first (oftsurgery fold … --format bf16), or fold and export in one step "
            "(oftsurgery export --base … --adapter … --format gguf)",
        )
