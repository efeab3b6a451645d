""":func:`examine_adapter` finds what is wrong with an adapter's files, and which releases of peft, and which loaders of image
tools, read the adapter otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.base_revision import base_revision, trained_at
from oftsurgery.adapters.from_image_tools import parse_image_adapter
from oftsurgery.adapters.from_peft import parse_adapter
from oftsurgery.adapters.reading import read_file, read_files
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.files.finding import find_checkpoint
from oftsurgery.files.layout import is_single_file
from oftsurgery.files.pipeline import is_pipeline
from oftsurgery.files.reading import sha256_of
from oftsurgery.stores.components import split_adapters
from oftsurgery.stores.dequantised import open_models
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.store import Store

from .base_weights import BaseWeights
from .doctor_folds import obstacles, open_store
from .doctor_weights import non_finite
from .findings import FOLD, Finding, Model, Numbers, noting
from .loaders import other_loaders


def examine_adapter(path: Path, base: Model | None) -> list[Finding]:
    """Findings on the adapter in a folder of peft, or in the single file of an image tool."""
    found: list[Finding] = []
    with noting(found, path.name):
        single = path.is_file()
        config: Mapping[str, Any]
        if single:
            tensors, config = read_file(path)
            sha256 = sha256_of(path)
        else:
            config, tensors, sha256 = read_files(path)
        for name, tensor in tensors.items():
            found += non_finite(name, tensor)
        if found:
            return sorted(found, key=lambda f: -float(f.evidence["values"] or 0))
        with noting(found):  # the error names the tensor or the module
            parse: Any = parse_image_adapter if single else parse_adapter
            first, second = (tensors, config) if single else (config, tensors)
            found += examine_read_adapter(parse(first, second, source=str(path), sha256=sha256), path.name, base)
    return found


def examine_read_adapter(adapter: OFTAdapter, subject: str, base: Model | None) -> list[Finding]:
    """Findings on an adapter that was read from its files."""
    found = other_releases(adapter, subject)
    with noting(found):
        if base is None:
            return found + list(other_loaders(adapter, subject))
        if not (isinstance(base, nn.Module) or is_single_file(base)):
            base = find_checkpoint(base, revision=base_revision(base, None, trained_at([adapter])))
        parts = _with_stores(adapter, base)
        against = [finding for part, store in parts for finding in obstacles(part, store)]
        found += against or other_loaders(adapter, subject, BaseWeights(parts))
    return found


def _with_stores(adapter: OFTAdapter, base: Model) -> list[tuple[OFTAdapter, Store]]:
    """``(part of the adapter, its model)``: the parts for a pipeline's components, or the whole adapter."""
    if not (isinstance(base, Path) and is_pipeline(base)):
        return [(adapter, open_store(base))]
    stores = {name: FolderStore(model) for name, model in open_models(base).models.items()}
    return [(one, stores[name]) for name, (one,) in split_adapters([adapter], stores).items()]


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
