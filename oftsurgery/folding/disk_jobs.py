"""A plan on disk is made of jobs; a job says how one stored tensor of a checkpoint changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from oftsurgery.dtypes import DTYPES, FLOATS
from oftsurgery.errors import FormatError, MatchError, StateError, printable
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.formats import checkpoint_tensors
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.stores.conversion import Unit, check_known
from oftsurgery.stores.dequantised import DequantisedCheckpoint
from oftsurgery.stores.folder import FolderStore

from .folder_writer import Outputs
from .plan import FoldPlan, Rotate, takes_no_values
from .target import Target

#: function of a tensor as loading has it and of the stored tensor; it raises an error where the tensor is not as expected
Check = Callable[[EncodedWeight, EncodedWeight], None]


@dataclass(frozen=True, eq=False)
class Part:
    """The change of one tensor of the model.

    Attributes:
        name: the tensor's name.
        output: the name under which the tensor is written.
        into: the format that is written.
        home: the format that is written where the formats stay; None for a tensor that takes an adapter's own values.
        base: the format in which loading has a plain tensor before it changes; None for the stored format.
        matrix: whether the tensor is a weight, handled in its canonical shape; other tensors keep their shape.
        values: an adapter's own values, which replace the stored values.
        rotate: the rotations, which are applied after that.
        check: the check of the tensor that is read.
        restore: function from the tensor that is read to its original, by an undo record.
        beside: ``{output: tensor}`` of tensors that are written in place of those that follow from the restored weight.
    """

    name: str
    output: str
    into: WeightFormat
    home: WeightFormat | None = None
    base: WeightFormat | None = None
    matrix: bool = True
    values: Tensor | None = None
    rotate: Rotate | None = None
    check: Check | None = None
    restore: Callable[[EncodedWeight], EncodedWeight] | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        return self.values is not None or self.rotate is not None or self.restore is not None

    @property
    def converts(self) -> bool:
        """Whether the format changes."""
        return self.home is not None and self.into != self.home


@dataclass(frozen=True, eq=False)
class Job:
    """The change of one stored weight or tensor, or of a unit of tensors.

    Attributes:
        name: the name of the first tensor.
        outputs: ``{name: (dtype, shape)}``.
        nbytes: the bytes that are read, for progress.
        parts: the model's tensors; empty where the bytes are copied.
        transposed: whether a plain weight is held ``(in, out)``.
        unit: the unit of the tensors, or None.
        origin: the store that is read, where it is not the plan's store.
        copied: the checkpoint whose bytes are copied.
        values: a tensor to write for which nothing is read.
    """

    name: str
    outputs: Outputs
    nbytes: int
    parts: tuple[Part, ...] = ()
    transposed: bool = False
    unit: Unit | None = None
    origin: FolderStore | None = None
    copied: Checkpoint | None = None
    values: Tensor | None = None


_DENSE = "choose format='bf16' or 'fp16' (--format bf16) for the exactly rotated weights, or format='nf4' or 'int8' (--format nf4) for 4 or 8 bits"


def not_written(label: str, module: str | None, source: Checkpoint) -> StateError:
    """The error for a weight whose package's layout cannot take the rotated values."""
    message = f"the base is stored as {source.stored_as}, which oftsurgery reads and does not write"
    return StateError(message, module=module, format=label, path=source.folder, remedy=_DENSE)


def copy_job(source: Checkpoint, name: str) -> Job:
    entry = source.entries[name]
    return Job(name, {name: (DTYPES[entry.dtype], entry.shape)}, entry.nbytes, copied=source)


@dataclass(eq=False)
class JobBuilder:
    """Makes the jobs that turn what ``store`` holds into what a folder holds after ``changes``.

    Attributes:
        target: the formats that are written.
        fold_into: with ``"original"``, rotated weights are not quantised first.
        touched: ``{tensor name: whether the tensor is a weight}`` of the tensors that become parts, changed or not.
    """

    store: FolderStore
    changes: FoldPlan
    target: Target = field(default_factory=Target)
    fold_into: str = "quantized"
    touched: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries = self.store.entries
        self.architecture = self.store.architecture
        self.shapes = {} if self.changes.vocabulary is None else self.changes.vocabulary.shapes
        self.rotate = {change.name: change for change in self.changes.rotate}
        self.values = {place: change.values for change in self.changes.replace for place in change.places}
        source, same = self.store.source, self.target.format == "same"
        self.package = source if same and isinstance(source, DequantisedCheckpoint) else None
        self.held = {} if self.package is None else self.package.held  # weights that stay in a package's layout
        self.touched = {**dict.fromkeys(self.values, False), **self.touched, **dict.fromkeys(self.rotate, True)}

    def jobs(self) -> list[Job]:
        made: list[Job] = []
        done: set[str] = set()
        for name in self.entries:
            if name in done:
                continue
            unit = self.architecture.units.get(name)
            target = name if unit is not None and name in self.touched else self.architecture.renamed[name]
            if unit is not None and self._touches(unit):
                done.update(unit.stored)
                made.append(self._of_unit(unit))
            elif not checkpoint_tensors.is_companion(name, self.entries):  # a companion comes with its weight
                group = checkpoint_tensors.companion_names(name, self.entries) if name.endswith("weight") else (name,)
                done.update(group)
                if target in self.touched or self._converts(target, name):
                    made.append(self._of_tensor(target, name, name, group))
                elif name in self.held:
                    made += [copy_job(self.store.source.as_stored, n) for n in self.held[name].tensors.values()]
                else:
                    made += [self._plain(n) for n in group]
        if self.package is not None:
            made += [copy_job(self.package.as_stored, name) for name in self.package.idle]
        made += [self._untied(name) for name in self._to_untie()]
        made += [self._added(name, shape) for name, shape in self.store.added.items()]
        return made

    def _touches(self, unit: Unit) -> bool:
        made = any(name in self.touched or self.store.quantises(name) for name in unit.model)
        own = next((name for name in unit.stored if name in self.touched), None)
        if own is not None and made:
            raise MatchError(
                "the fold would change both a stored tensor and the tensors that transformers makes from this tensor at loading",
                tensor=own,
                remedy="name the modules of the model's class in the adapter: "
                + ", ".join(printable(name.removesuffix(".weight")) for name in unit.model),
            )
        return made

    def _converts(self, target: str, name: str) -> bool:
        """Whether a weight changes its codec without any rotation."""
        if not self.store.holds_quantised(name):
            return self.store.quantises(target)
        stored = self.store.stored(target)
        return self.target.weight(stored) != stored

    # --- one job of a kind ---

    def _plain(self, name: str, target: str = "", output: str = "") -> Job:
        """The job of a stored tensor that changes at most in its dtype or to an adapter's own values; ``target`` is the
        model's tensor, where it is to be a part.
        """
        entry, stored = self.entries[name], self.store.dtype(name)
        part = self._cast(target or name, output or name, WeightFormat("dense", entry.shape, stored))
        if not target and stored == part.into.dtype == (part.base or part.into).dtype:
            return copy_job(self.store.source, name)
        return Job(name, {part.output: (part.into.dtype, part.into.shape)}, entry.nbytes, (part,))

    def _cast(self, name: str, output: str, stored: WeightFormat) -> Part:
        """The part of a tensor that changes at most in its dtype or to an adapter's own values."""
        loaded = self.store.loaded_dtype(name) if stored.dtype in FLOATS else None
        base = None if loaded is None else replace(stored, dtype=loaded)
        values = self.values.get(name)
        home = base or stored
        home = home if values is None else replace(home, shape=tuple(values.shape))
        into = replace(home, dtype=self.target.plain(home.dtype))
        return Part(name, output, into, home, base, matrix=False, values=values)

    def _of_tensor(self, target: str, name: str, output: str, group: Sequence[str], *, untied: bool = False) -> Job:
        """The job that makes the model's tensor ``target`` from the stored tensor ``name``."""
        if name in self.held:
            return self._of_package(target, name, output)
        entry = self.entries[name]
        if target in self.changes.dequantised:
            return self._dequantised(target, name, output, group)
        values = self.values.get(target)  # integers for a counter, such as BatchNorm's
        if values is not None and values.is_floating_point() and DTYPES[entry.dtype] not in FLOATS:
            raise takes_no_values(target, entry.dtype)
        converts = self._converts(target, name) and target not in self.values
        if not (self.touched.get(target) or converts or len(group) > 1):
            return self._plain(name, target, output)
        part = self._weight(target, output, untied=untied)
        outputs = checkpoint_tensors.checkpoint_shapes(output, part.into)
        transposed = name in self.architecture.transposed
        if not part.into.quantised:
            shape = entry.shape if len(entry.shape) == 4 else part.into.shape[::-1] if transposed else part.into.shape
            outputs = {output: (part.into.dtype, shape)}
        return Job(name, outputs, sum(self.entries[n].nbytes for n in group), (part,), transposed)

    def _of_package(self, target: str, name: str, output: str) -> Job:
        """The job of a weight that stays in the layout of another package."""
        assert self.package is not None  # noqa: S101 - it holds the weight
        into = self.package.format(name)
        if self.held[name].quantiser is None and target in self.rotate:
            raise not_written(into.label, target.removesuffix(".weight"), self.package)
        if name in self.architecture.transposed:
            message = f"the model's class holds this weight (in, out), and no quantiser of {into.codec} does"
            raise StateError(message, module=target.removesuffix(".weight"), format=into.label, remedy=_DENSE)
        if target in self.values or output != name:
            what = (
                "the adapter brings its own values for this weight"
                if target in self.values
                else "the fold unties this weight"
            )
            message = (
                f"{what}, and the base stores the weight as {into.codec}, which holds no plain weight in this place"
            )
            raise StateError(message, module=target.removesuffix(".weight"), format=into.label, remedy=_DENSE)
        part = Part(target, output, into, into, rotate=self.rotate.get(target))
        outputs = checkpoint_tensors.checkpoint_shapes(output, into)
        return Job(name, outputs, sum(self.package.as_stored.entries[n].nbytes for n in outputs), (part,))

    def _dequantised(self, target: str, name: str, output: str, group: Sequence[str]) -> Job:
        """The job of a weight that is stored quantised, and takes an adapter's own values: they stay plain."""
        if name in self.architecture.transposed:
            raise takes_no_values(target, self.store.stored(target).label)
        dtype = self.target.dense or self.architecture.loaded.get(target) or self.values[target].dtype
        into = WeightFormat("dense", tuple(self.values[target].shape), dtype)
        part = Part(target, output, into, values=self.values[target])
        return Job(name, {output: (dtype, into.shape)}, sum(self.entries[n].nbytes for n in group), (part,))

    def _added(self, name: str, shape: tuple[int, ...]) -> Job:
        """The job of a tensor that an adapter brings and the checkpoint lacks."""
        values = self.values[name]
        dtype = self.target.dense or self.architecture.loaded.get(name) or values.dtype
        part = Part(name, name, WeightFormat("dense", shape, dtype), matrix=False)
        return Job(name, {name: (dtype, shape)}, 0, (part,), values=values)

    def _weight(self, name: str, output: str, *, untied: bool = False) -> Part:
        stored = self.store.stored(name)
        loaded = self.store.loaded(name)
        if untied:  # an output head, which loading does not quantise
            loaded = replace(stored, dtype=self.store.loaded_dtype(name) or stored.dtype)
        base = None if loaded == stored else loaded
        home = loaded.kind.once_quantised(loaded)
        into = self.target.weight(home)
        if self.fold_into == "original" and name in self.rotate:
            home, base = stored, None
        shape = self.shapes.get(name, home.shape)
        home, into = replace(home, shape=shape), replace(into, shape=shape)
        return Part(name, output, into, home, base, values=self.values.get(name), rotate=self.rotate.get(name))

    def _of_unit(self, unit: Unit) -> Job:
        """The job of tensors that transformers converts: the outputs have the stored names, or the model's names where
        loading quantises one of the tensors.
        """
        held = next((name for name in unit.stored if name in self.held), None)
        if held is not None:
            message = "transformers converts this weight at loading, and no converted weight goes back into its package's layout"
            raise StateError(message, tensor=held, format=self.held[held].label, remedy=_DENSE)
        split_up = self.target.dense is None and any(self.store.quantises(name) for name in unit.model)
        path = next((n for n in unit.model if n in self.touched), next(iter(unit.model), next(iter(unit.stored))))
        check_known(unit, path.removesuffix(".weight"), back=not split_up)
        parts = [self._made(name) for name in unit.model]
        as_stored = {name: (parts[0].into.dtype, shape) for name, shape in unit.stored.items()}
        return self._unit_job(unit, parts, None if split_up else as_stored)

    def _made(self, name: str, *, untied: bool = False) -> Part:
        """The part of a tensor that a unit makes, or of a tensor that is tied to such a tensor."""
        if self.touched.get(name) or (self.store.quantises(name) and not untied):
            return self._weight(name, name, untied=untied)
        return self._cast(name, name, self.store.stored(name))

    def _unit_job(self, unit: Unit, parts: Sequence[Part], outputs: Outputs | None = None) -> Job:
        nbytes = sum(self.entries[name].nbytes for name in unit.stored)
        if outputs is None:
            outputs = {n: o for p in parts for n, o in checkpoint_tensors.checkpoint_shapes(p.output, p.into).items()}
        return Job(next(iter(unit.stored)), outputs, nbytes, tuple(parts), unit=unit)

    def _to_untie(self) -> list[str]:
        """Names that the checkpoint lacks, since their tensors were tied, and that the destination needs."""
        flagged = self.store.ties.flagged
        for group in self.changes.apart:
            if not flagged.issuperset(group):
                raise FormatError(
                    "the model's class holds one module in several places, so no checkpoint can hold two weights for the module",
                    tensor=group[0],
                    remedy="load the model and fold it in memory (oftsurgery.fold); the folded model cannot be saved and loaded again",
                )
        names = [n for group in self.changes.apart for n in group if n in self.architecture.tied]
        if self.changes.clears_flag:
            return names
        # only a tensor that differs from the tensor it was tied to
        return [n for n in names if {n, self.architecture.tied[n]} & self.changes.changed]

    def _untied(self, name: str) -> Job:
        unit = self.store.unit(name)
        if unit is not None:
            return self._unit_job(unit, [self._made(name, untied=True)])
        holder = self.store.holder(name)
        return self._of_tensor(name, holder, name, (holder,), untied=True)
