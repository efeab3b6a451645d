""":func:`doctor` finds and explains what is wrong with a checkpoint, an adapter or a live model.

The doctor reads tensor by tensor and changes nothing. The doctor collects all errors that other functions raise one by one, and
also finds damage that is valid data and therefore loads without an error: weights that peft merged wrongly, adapters that
newer peft loads as the identity, settings that readers ignore.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import get_args

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.from_image_tools import PEFT_METADATA
from oftsurgery.adapters.image_keys import has_image_keys
from oftsurgery.adapters.reading import DIFFUSERS_FILE, find_adapter, read_adapter
from oftsurgery.errors import CheckpointError, OFTSurgeryError
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.finding import checkpoint_place, find_checkpoint
from oftsurgery.files.layout import CONFIG, LAYOUTS, PIPELINE, is_single_file, variants_in
from oftsurgery.files.pipeline import is_pipeline, open_pipeline
from oftsurgery.files.reading import ADAPTER_CONFIG, ADAPTER_TENSORS, read_header
from oftsurgery.stores.components import split_adapters
from oftsurgery.stores.dequantised import dequantised
from oftsurgery.stores.folder import FolderStore

from .doctor_adapter import examine_adapter, examine_read_adapter
from .doctor_checkpoint import examine_checkpoint
from .doctor_live_model import examine_model
from .findings import Finding, Model, Severity


def doctor(
    path_or_model: str | PathLike[str] | nn.Module | OFTAdapter,
    *,
    base: str | PathLike[str] | nn.Module | None = None,
    adapter: OFTAdapter | str | PathLike[str] | None = None,
) -> list[Finding]:
    """Examine a checkpoint's folder, an adapter's folder (or a Hub id of either), a single file of either, or a live model.

    >>> oftsurgery.doctor("ADAPTER")                             # nothing is wrong
    []
    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT")
    >>> for finding in oftsurgery.doctor("OUTPUT", base="BASE", adapter="ADAPTER"):
    ...     print(finding.severity, finding.code)
    note kept

    Args:
        path_or_model: what to examine. An adapter of an image tool is also compared with what popular loaders (ComfyUI, A1111's web
            UI, the OFTv2 node) make of it; an :class:`~oftsurgery.OFTAdapter` where its file does not tell the dialect.
        base: the checkpoint or model that was folded, or that an adapter is for. With ``adapter`` each folded weight is
            compared with the base's weight, rotated anew.
        adapter: the adapter that is folded in (with ``base``), or that is to be.

    Returns:
        what was found, worst first; an empty list where nothing is wrong. With ``base`` and ``adapter``, a note or a warning
        says how much of the adapter's change is in the weights.

    Raises:
        CheckpointError: ``path_or_model`` or ``base`` does not exist.
        AdapterError: ``adapter`` cannot be used (``doctor(adapter)`` examines it).
    """
    if adapter is not None and not isinstance(adapter, OFTAdapter):
        adapter = read_adapter(adapter)
    if isinstance(path_or_model, nn.Module):
        found = examine_model(path_or_model, base, adapter)
    elif isinstance(path_or_model, OFTAdapter):
        found = examine_read_adapter(path_or_model, Path(path_or_model.source or "adapter").name, base)
    elif (file := _file_of_adapter(path_or_model)) is not None:
        found = examine_adapter(file, base)
    elif is_single_file(path_or_model):
        found = examine_checkpoint(Path(path_or_model).expanduser(), base, adapter)
    elif (folder := _folder_of_adapter(path_or_model)) is not None:
        found = examine_adapter(folder, base)
    else:
        found = _examine_folder(find_checkpoint(path_or_model), base, adapter)
    return sorted(_grouped(found), key=lambda f: get_args(Severity).index(f.severity))


def _examine_folder(folder: Path, base: Model | None, adapter: OFTAdapter | None) -> list[Finding]:
    """The findings on a checkpoint; on a pipeline, those on its models, with the components' names in front."""
    if not is_pipeline(folder):
        return examine_checkpoint(folder, base, adapter)
    models = open_pipeline(folder).models
    own: dict[str, OFTAdapter] = {}
    if adapter is not None:
        stores = {name: FolderStore(_readable(model)) for name, model in models.items()}
        own = {name: one for name, (one,) in split_adapters([adapter], stores).items()}
    found: list[Finding] = []
    for name, model in models.items():
        plain = base if base is None or isinstance(base, nn.Module) else find_checkpoint(base) / name
        given = plain if name in own or adapter is None else None
        own_findings = examine_checkpoint(model.folder, given, own.get(name))
        found += [replace(finding, subject=f"{name}: {finding.subject}") for finding in own_findings]
    return found


def _readable(model: Checkpoint) -> Checkpoint:
    """A model of a pipeline as a fold reads it; as it is stored where a fold cannot read it, which is the finding of its examination."""
    with suppress(OFTSurgeryError):
        return dequantised(model)
    return model


def _file_of_adapter(path: str | PathLike[str]) -> Path | None:
    """The single file of an image tool's adapter at ``path``, or in this folder; None for anything else."""
    given = Path(path).expanduser()
    file = given / DIFFUSERS_FILE if given.is_dir() and not (given / ADAPTER_CONFIG).is_file() else given
    if not is_single_file(file) or (file.name == ADAPTER_TENSORS and (file.parent / ADAPTER_CONFIG).is_file()):
        return None
    with suppress(CheckpointError):  # the error of a damaged file belongs to the examination
        entries, metadata = read_header(file)
        if PEFT_METADATA in metadata or has_image_keys(entry.name for entry in entries):
            return file
    return None


def _folder_of_adapter(path: str | PathLike[str]) -> Path | None:
    """The folder of the adapter at ``path``; None if ``path`` holds a checkpoint, or neither an adapter nor a checkpoint."""
    place = checkpoint_place(path)
    names = place.names()
    if PIPELINE in names or variants_in(names) or any(name in names for layout in LAYOUTS for name in layout.names):
        return None
    if ADAPTER_CONFIG in names or ADAPTER_TENSORS in names:
        return place.fetch([ADAPTER_CONFIG, ADAPTER_TENSORS])
    below = any(name.endswith(f"/{ADAPTER_CONFIG}") for name in names)
    return find_adapter(path)[1] if below and CONFIG not in names else None


def _grouped(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each trouble: the first (the callers put the worst first) with the subjects of the others."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding.message), []).append(finding)
    return [replace(g[0], others=(*g[0].others, *dict.fromkeys(f.subject for f in g[1:]))) for g in groups.values()]
