""":func:`examine_adapter` finds what is wrong with an adapter's files, and which releases of peft read the adapter otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.base_revision import base_revision, trained_at
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.adapters.reading import read_files
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.files.finding import find_checkpoint
from oftsurgery.files.layout import is_single_file

from .doctor_folds import obstacles, open_store
from .doctor_weights import non_finite
from .findings import FOLD, Finding, Model, Numbers, noting


def examine_adapter(folder: Path, base: Model | None) -> list[Finding]:
    found: list[Finding] = []
    with noting(found, folder.name):
        config, tensors, sha256 = read_files(folder)
        for name, tensor in tensors.items():
            found += non_finite(name, tensor)
        if found:
            return sorted(found, key=lambda f: -float(f.evidence["values"] or 0))
        with noting(found):  # the error names the tensor or the module
            adapter = parse_adapter(config, tensors, source=str(folder), sha256=sha256)
            found += other_releases(adapter, folder.name)
            if base is not None:
                if not (isinstance(base, nn.Module) or is_single_file(base)):
                    base = find_checkpoint(base, revision=base_revision(base, None, trained_at([adapter])))
                found += obstacles(adapter, open_store(base))
    return found


def other_releases(adapter: OFTAdapter, subject: str) -> list[Finding]:
    """Findings on what other releases of peft compute with the adapter."""
    modules = [m for m in adapter.modules.values() if isinstance(m, Rotation)]
    if len(modules) < len(adapter.modules):
        return []  # other tools' adapters
    turns = any(r.angle > 1e-7 or (r.scale is not None and bool((r.scale != 1).any())) for r in modules)
    angle = max((r.angle for r in modules), default=0.0)
    numbers: Numbers = {"modules": len(adapter.modules), "largest_angle": angle, "dialect": adapter.dialect}
    remedy = f"fold the adapter with oftsurgery, which reads it as trained: {FOLD}"
    if not turns and not adapter.saved:
        terms = next(iter(modules)).cayley.terms
        one = "a Neumann series of one term is the identity, whatever the weights are"
        why = one if terms == 1 else "all its rotations are the identity, so the adapter is untrained"
        numbers["neumann_terms"] = terms
        code, message = "no-effect", f"the adapter changes nothing: {why}"
        remedy = "train the adapter, or check its adapter_config.json"
    elif adapter.dialect == "peft-0.15":
        code = "loads-as-identity"
        message = (
            "peft 0.14 or 0.15 wrote the adapter: newer peft drops the adapter's tensors (oft_r, oft_s), warns only of missing keys, "
            "and computes the base model"
        )
    elif adapter.dialect == "peft-0.13":
        code = "refused-by-newer-peft"
        message = "peft ≤ 0.13 wrote the adapter: newer peft refuses the adapter and asks to train it again"
    elif adapter.dialect == "peft-0.17":
        apart = {path: _series_apart(r) for path, r in zip(adapter.modules, modules, strict=True)}
        worst = max(apart, key=lambda path: apart[path])
        if apart[worst] <= 1e-6:
            return []
        numbers |= {"worst_module": worst, "largest_difference_of_R": apart[worst]}
        code = "other-series"
        message = (
            "peft 0.16 or 0.17 wrote the adapter: newer peft computes it with another Neumann series, after a warning"
        )
    else:
        return []
    return [Finding("warning", code, message, subject, numbers, remedy)]


def _series_apart(r: Rotation) -> float:
    """Largest spectral norm of the difference between the blocks of the two Neumann series."""
    if r.cayley.exact:
        return 0.0
    other = replace(r, cayley=replace(r.cayley, since_0_18=not r.cayley.since_0_18))
    return float(torch.linalg.matrix_norm(r.blocks - other.blocks, ord=2).max())
