""":func:`plan_remembered` plans a fold of a quantised checkpoint without transformers' models where transformers has confirmed the
same plan before.

The import of transformers' models takes most of a command's time, and for most quantised checkpoints the model's class changes
nothing in a plan that is made from names alone. The first plan asks the class, compares the plan by names with the plan by the
class, and notes in the user's cache that the two are equal. A later plan takes the plan by names if everything that decided the
comparison is unchanged: the checkpoint's config, names and shapes, the adapters' configs, the settings, the versions, and the
files of transformers that were loaded. In every other case, the class is asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import OFTSurgeryError
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.files.reading import read_json
from oftsurgery.files.writing import Replacement, write_synced
from oftsurgery.records.record import versions
from oftsurgery.stores.folder import has_quantised_weights
from oftsurgery.stores.skeleton import without_classes

from .disk_jobs import Job, Part
from .disk_plan import CheckpointPlan, plan_checkpoint

#: the field of the config that the plan by the class may add, as :mod:`~oftsurgery.stores.quantised_loading` finds it
_SKIP = "llm_int8_skip_modules"
#: this package, whose rules make the plans: a developer changes them within a version
_SOURCES = Path(__file__).parents[1]
#: the most notes that the cache keeps
_MOST = 100


def plan_remembered(source: Checkpoint, adapters: Sequence[OFTAdapter], **settings: Any) -> CheckpointPlan:
    """:func:`plan_checkpoint`, with the same arguments, result and errors. An undo record and a calibration read facts of the
    class that no plan holds, so their plans come from :func:`plan_checkpoint` itself.
    """
    folder, known = _folder(), "transformers" in versions() and "model_type" in source.config
    if folder is None or not known or _loaded() or not has_quantised_weights(source):
        return plan_checkpoint(source, adapters, **settings)
    note = _Note(folder, source, adapters, settings)
    return note.plan() or note.asked()


class _Note:
    """What transformers has said of one checkpoint with one kind of adapter: a file in the user's cache."""

    def __init__(
        self, folder: Path, source: Checkpoint, adapters: Sequence[OFTAdapter], settings: Mapping[str, Any]
    ) -> None:
        self._arguments, self._settings = (source, adapters), settings
        facts = {
            "versions": versions(),
            "sources": {str(path): _stamp(path) for path in sorted(_SOURCES.rglob("*.py"))},
            "config": dict(source.config),
            "tensors": {name: [e.dtype, e.shape] for name, e in source.entries.items()},
            "wrapped": source.wrapped,
            "adapters": [[a.dialect, dict(a.config)] for a in adapters],
            "settings": {name: str(value) for name, value in settings.items()},
        }
        self._path = folder / f"{_hash(facts)}.json"

    def plan(self) -> CheckpointPlan | None:
        """The plan by names, with what the class adds; None if no note says that this plan is right."""
        note: dict[str, Any] = {}
        with contextlib.suppress(OFTSurgeryError):
            note = read_json(self._path) if self._path.is_file() else {}
        if not note or not _unchanged(note.get("files")):
            return None
        plan = self._by_names()
        if plan is None or _hash(_facts(plan)) != note.get("plan"):
            return None
        plan.store.architecture = replace(plan.store.architecture, name=note.get("class"))
        if _SKIP in note:
            quantization = {**plan.config["quantization_config"], _SKIP: note[_SKIP]}
            plan = replace(plan, config={**plan.config, "quantization_config": quantization})
        return plan

    def asked(self) -> CheckpointPlan:
        """The plan by the class, which is noted if the plan by names is equal."""
        plan, named = plan_checkpoint(*self._arguments, **self._settings), self._by_names()
        architecture = plan.store.architecture
        if named is None or architecture.name is None or architecture.units or _facts(named) != _facts(plan):
            return plan
        modules = [m for name, m in sys.modules.items() if name.startswith("transformers.")]
        files = {str(f): _stamp(f) for m in modules if isinstance(f := getattr(m, "__file__", None), str)}
        note = {"plan": _hash(_facts(plan)), "class": architecture.name, "files": files}
        settings = plan.config.get("quantization_config")
        if isinstance(settings, Mapping) and _SKIP in settings:
            note[_SKIP] = settings[_SKIP]
        with contextlib.suppress(OSError, OFTSurgeryError):  # a cache that cannot be written is no cache
            self._write(json.dumps(note))
        return plan

    def _by_names(self) -> CheckpointPlan | None:
        with contextlib.suppress(OFTSurgeryError), without_classes():
            return plan_checkpoint(*self._arguments, **self._settings)
        return None

    def _write(self, text: str) -> None:
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with Replacement(self._path) as new:
            write_synced(new.beside, text.encode())
            new.put()
        notes = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in notes[:-_MOST]:
            old.unlink()


def _folder() -> Path | None:
    """The folder of the notes in the user's cache; None for a user without a home."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oftsurgery" / "plans"
    return None


def _loaded() -> bool:
    """Whether transformers is loaded: its classes then cost no import, and this process may have changed them."""
    return "transformers" in sys.modules


def _stamp(file: str | Path) -> list[int] | None:
    with contextlib.suppress(OSError):
        stat = Path(file).stat()
        return [stat.st_size, stat.st_mtime_ns]
    return None


def _unchanged(files: object) -> bool:
    return isinstance(files, dict) and bool(files) and all(_stamp(file) == stamp for file, stamp in files.items())


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


# --- what a plan does -------------------------------------------------------------------------------------------------


def _facts(plan: CheckpointPlan) -> dict[str, Any]:
    """Everything that a run takes from a plan, but the values of tensors."""
    settings = plan.config.get("quantization_config")
    config = dict(plan.config)
    if isinstance(settings, Mapping):
        config["quantization_config"] = {name: value for name, value in settings.items() if name != _SKIP}
    changes = plan.changes
    return {
        "jobs": [_facts_of_job(job) for job in plan.jobs],
        "shards": [[shard.file, *shard.items] for shard in plan.shards],
        "config": config,
        "carried": [*plan.carried.files],
        "tokenizer": [plan.carried.tokenizer, plan.carried.chat_template],
        "rotated": sorted(rotate.path for rotate in changes.rotate),
        "replaced": [[change.name, *change.places] for change in changes.replace],
        "apart": changes.apart,
        "clears_flag": changes.clears_flag,
        "dequantised": sorted(changes.dequantised),
        "idle": changes.idle,
        "missing": changes.missing,
        "vocabulary": changes.recorded_vocabulary,
        "added": dict(plan.store.added),
        "target": str(plan.target),
        "rest": [plan.fold_into, plan.rotates, plan.rounding, plan.unfolds, str(plan.store.quantization)],
    }


def _facts_of_job(job: Job) -> list[Any]:
    outputs = {name: str(output) for name, output in job.outputs.items()}
    whole = [part is None for part in (job.unit, job.origin, job.values)]
    return [job.name, outputs, job.nbytes, job.transposed, *whole, *map(_facts_of_part, job.parts)]


def _facts_of_part(part: Part) -> list[Any]:
    named = [part.name, part.output, str(part.into), str(part.home), str(part.base), part.matrix, sorted(part.beside)]
    absent = [value is None for value in (part.values, part.check, part.restore)]
    if part.rotate is None:
        return [named, absent]
    chain = [[str(r.cayley), r.side, *r.generator.shape, r.scale is None, r.shared, r.whole] for r in part.rotate.chain]
    return [named, absent, part.rotate.path, str(part.rotate.format), part.rotate.untied, part.rotate.inverse, chain]
