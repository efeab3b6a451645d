"""A :class:`BlockFolds` folds the layers of a model's blocks in the order in which the model calls the blocks.

The inputs of a layer are those in the model whose earlier layers are folded, and the aim are the live model's outputs, so a
layer makes up for a part of what the layers before it lost. The memory holds the inputs of one group of layers. Past
:data:`~oftsurgery.calibrate.batch_runs.OWN_TOKENS` the inputs are taken from the live model alone, which saves two of three runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

from oftsurgery.weights.calibrate import FoldedAlready, LayerInputs

from .batch_runs import Batches, BatchRuns, BlockWeights, RowRecorder, Runs, Step, listen, run
from .batches import Batch, length_of, one_sequence
from .block_sources import Job, LiveBlocks
from .blocks import are_chained, block_paths, run_batch, running, weights_of
from .freed_memory import give_back
from .input_sums import InputSums

#: function that gives the runs of the batches through the blocks at paths; None where the batches cannot run block by block
RunsOf = Callable[[LiveBlocks, Sequence[str], Batches], Runs | None]


def _count(calls: Counter[str], path: str, *_: object) -> None:
    calls[path] += 1


@dataclass(eq=False)
class BlockFolds:
    """The folded weights of a model's blocks.

    Attributes:
        source: the model, and where its weights come from.
        jobs: what becomes of each layer.
        blocks: the paths of the blocks.
        batches: the batches.
        runs: the runs of the batches through the blocks.
        again: function that gives the inputs of a layer in the live model.
    """

    source: LiveBlocks
    jobs: Mapping[str, Job]
    blocks: Sequence[str]
    batches: Batches
    runs: Runs
    again: Callable[[str], LayerInputs | None]

    @classmethod
    def of(
        cls,
        source: LiveBlocks,
        jobs: Mapping[str, Job],
        given: Sequence[Batch],
        again: Callable[[str], LayerInputs | None],
        runs_of: RunsOf,
    ) -> BlockFolds | None:
        """None for a model whose blocks cannot be run one by one.

        Raises:
            CalibrationError: the model does not take a batch.
        """
        paths = block_paths(source.modules, jobs)
        if not paths:
            return None
        blocks = [source.modules[path] for path in paths]
        with running(source.model):
            longest = max(range(len(given)), key=lambda i: length_of(given[i]))  # masks depend on the length
            once = partial(run_batch, source.model, longest, one_sequence(given[longest]))
            with source.on_demand(jobs, paths):
                if not are_chained(blocks, once):
                    return None
            batches = Batches.of(given)
            runs = runs_of(source, paths, batches)
        return None if runs is None else cls(source, jobs, paths, batches, runs, again)

    def __post_init__(self) -> None:
        self.paths = {path: i for i, at in enumerate(self.blocks) for path in self.jobs if path.startswith(f"{at}.")}
        self.count = 1 + max(self.paths.values())  # the later blocks have no layer to fold
        self._done = 0
        self._ready: dict[str, FoldedAlready | None] = {}
        self._orders: dict[tuple[str, ...], list[list[str]]] = {}

    def __call__(self, path: str) -> FoldedAlready | None:
        """The folded weight of the layer at ``path``; None where no batch reached the layer."""
        while self._done <= self.paths[path]:
            with running(self.source.model), self.source.loaded(self.blocks[self._done]):
                self._fold(self._done)
            give_back()
            self._done += 1
        return self._ready.pop(path)

    def _fold(self, number: int) -> None:
        """Fold the layers of a block, group by group, and run the block."""
        paths = [path for path, i in self.paths.items() if i == number]
        weights = BlockWeights(self.source, self.jobs, paths, self.runs.first[1].dtype)
        groups = self._groups(number, weights)
        steps = [Step(number, g, list(chain(*groups[k + 1 :])), number + k > 0) for k, g in enumerate(groups)]
        for step in steps:
            found = self._gather(step, weights, share=True) or self._gather(step, weights, share=False)
            assert found is not None  # noqa: S101 - layers that share nothing are not wrongly shared
            for path, folded in self.runs.fold(step, weights, found).items():
                self._ready[path] = None
                if folded is not None:
                    before = weights.before[path].fingerprint
                    self._ready[path] = FoldedAlready(before, folded, partial(self.again, path))
                    weights.fold(path, folded.encoded)
        if number + 1 < self.count:
            self.runs.advance(steps[-1], weights)

    def _groups(self, number: int, weights: BlockWeights) -> list[list[str]]:
        """The layers of a block in groups, in the order in which the first batch calls them: layers with the same input are together,
        and so are all layers with a number in their paths (experts), and layers that the batch does not call. After the first
        input, two inputs make a group: each group costs two runs of the block. A block that calls a layer twice is one group.
        """
        at, paths = f"{self.blocks[number]}.", weights.paths
        local = tuple(path.removeprefix(at) for path in paths)
        if local not in self._orders:
            recorder, calls = RowRecorder(self.batches.held_out, share=True), Counter[str]()
            call, hidden = self.runs.first
            once = partial(run, self.source, self.blocks[number], call, hidden)
            with weights_of(self.source.modules, weights.exact), ExitStack() as hooks:
                for path in paths:
                    count = partial(_count, calls, path)
                    hooks.enter_context(self.source.modules[path].register_forward_pre_hook(count))
                listen(self.source, Step(number, paths, (), False), recorder, 0, self.batches.batches[0], once)
            groups: dict[str, list[str]] = {}
            for path in (*recorder.leaders, *(path for path in paths if path not in recorder.leaders)):
                numbered = any(part.isdigit() for part in path.removeprefix(at).split("."))
                key = "" if numbered else recorder.leaders.get(path, "")
                groups.setdefault(key, []).append(path.removeprefix(at))
            first, *others = [*groups.values()] or [[]]
            pairs = (others[i : i + 2] for i in range(0, len(others), 2))
            self._orders[local] = [first, *(list(chain.from_iterable(pair)) for pair in pairs)]
            if any(n > 1 for n in calls.values()):  # the second call may come after layers of any group
                self._orders[local] = [list(local)]
        return [[at + path for path in group] for group in self._orders[local]]

    def _gather(self, step: Step, weights: BlockWeights, *, share: bool) -> InputSums | None:
        """The inputs of a group's layers; None if layers that seemed to share their inputs do not."""
        total: InputSums | None = None
        for found in self.runs.gather(step, weights, share=share):
            if total is None:
                total = found
            else:
                total.join(found)
            if share and total.wrong:
                return None
        assert total is not None  # noqa: S101 - there is a batch
        total.end()
        return total


def in_this_process(passed: Callable[[], None]) -> RunsOf:
    """The runs of all batches in this process; ``passed`` is called after each batch of a block."""

    def runs_of(source: LiveBlocks, blocks: Sequence[str], batches: Batches) -> BatchRuns | None:
        return BatchRuns.of(source, blocks, batches, batches.chunks, passed)

    return runs_of
