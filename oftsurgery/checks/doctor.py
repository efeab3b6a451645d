""":func:`doctor` finds and explains what is wrong with a checkpoint, an adapter or a live model.

The doctor reads tensor by tensor and changes nothing. The doctor collects all errors that other functions raise one by one, and
also finds damage that is valid data and therefore loads without an error: weights that peft merged wrongly, adapters that
newer peft loads as the identity, settings that readers ignore.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from typing import get_args

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.adapters.reading import CONFIG_FILE, TENSORS_FILE, find_adapter, read_adapter
from oftsurgery.files.checkpoint import layout_of
from oftsurgery.files.finding import find_checkpoint

from .doctor_adapter import examine_adapter
from .doctor_checkpoint import examine_checkpoint
from .doctor_live_model import examine_model
from .findings import Finding, Severity


def doctor(
    path_or_model: str | PathLike[str] | nn.Module,
    *,
    base: str | PathLike[str] | nn.Module | None = None,
    adapter: OFTAdapter | str | PathLike[str] | None = None,
) -> list[Finding]:
    """Examine a checkpoint's folder, an adapter's folder (or a Hub id of either), or a live model.

    >>> oftsurgery.doctor("ADAPTER")                             # nothing is wrong
    []
    >>> record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT")
    >>> for finding in oftsurgery.doctor("OUTPUT", base="BASE", adapter="ADAPTER"):
    ...     print(finding.severity, finding.code)
    note kept

    Args:
        path_or_model: what to examine.
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
        config, tensors, sha256 = read_adapter(find_adapter(adapter))
        adapter = parse_adapter(config, tensors, source=str(adapter), sha256=sha256)
    if isinstance(path_or_model, nn.Module):
        found = examine_model(path_or_model, base, adapter)
    else:
        folder = find_checkpoint(path_or_model)
        is_adapter = any((folder / name).exists() for name in (CONFIG_FILE, TENSORS_FILE)) and layout_of(folder) is None
        found = examine_adapter(folder, base) if is_adapter else examine_checkpoint(folder, base, adapter)
    return sorted(_grouped(found), key=lambda f: get_args(Severity).index(f.severity))


def _grouped(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each trouble: the first (the callers put the worst first) with the subjects of the others."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding.message), []).append(finding)
    return [replace(g[0], others=(*g[0].others, *dict.fromkeys(f.subject for f in g[1:]))) for g in groups.values()]
