"""Runs of a calibration's batches through one block of a model after the other, which give the inputs of the blocks' layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.tasks import cut
from oftsurgery.weights.calibrate import fold_calibrated
from oftsurgery.weights.kernels.blockwise import FoldedWeight

from .batches import Batch, length_of, sequences_of
from .block_sources import Job, LiveBlocks, dtype_of_weights, exact_weight
from .blocks import Call, before_calls, first_call, hidden_of, run_batch, weights_of
from .hidden_values import HiddenValues
from .input_sums import InputSum, InputSums
from .recorder import InputRecorder, held_out_of

#: number of tokens that run through the folded blocks too
OWN_TOKENS = 1 << 14
#: batches are summed up in chunks of at least so many tokens, and at most so many chunks
CHUNK_TOKENS, CHUNKS = 1 << 13, 32


class RowRecorder(InputRecorder):
    """An :class:`InputRecorder` that keeps the rows of one batch."""

    rows: dict[str, tuple[Tensor, Tensor]]

    def start_batch(self, number: int, batch: Batch) -> None:
        super().start_batch(number, batch)
        self.rows = {}

    def take(self, path: str, kept: Tensor, held_out: Tensor) -> None:
        if path in self.rows:
            kept, held_out = (torch.cat(both) for both in zip(self.rows[path], (kept, held_out), strict=True))
        self.rows[path] = kept, held_out


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a calibration, and how they are used.

    Attributes:
        batches: the batches.
        own: number of the batches, from the first, that run through the folded blocks too.
        held_out: the masks of the sequences that are held out, one for each batch.
        chunks: the numbers of the batches in chunks. The inputs of each chunk are summed up by themselves, and then the chunks'
            sums in their order, so a sum does not depend on who has computed its parts.
    """

    batches: Sequence[Batch]
    own: int
    held_out: Sequence[Tensor]
    chunks: Sequence[range]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Batches:
        tokens = [sequences_of(batch) * length_of(batch) for batch in batches]
        own = 1 + sum(count < OWN_TOKENS for count in accumulate(tokens))
        live_only = [torch.zeros(sequences_of(batch), dtype=torch.bool, device="cpu") for batch in batches[own:]]
        chunks = cut(tokens, max(CHUNK_TOKENS, sum(tokens) / CHUNKS))
        return cls(batches, own, [*held_out_of(batches[:own]), *live_only], chunks)

    def as_plain(self) -> dict[str, Any]:
        """The same in dicts, lists and tensors."""
        return {**vars(self), "chunks": [(chunk.start, chunk.stop) for chunk in self.chunks]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Batches:
        return cls(**{**plain, "chunks": [range(*ends) for ends in plain["chunks"]]})


@dataclass(frozen=True)
class Step:
    """A group of a block's layers.

    Attributes:
        block: number of the block.
        paths: the layers.
        later: the layers of the later groups.
        drifts: whether the inputs in the folded model differ from those in the live model.
    """

    block: int
    paths: Sequence[str]
    later: Sequence[str]
    drifts: bool


@dataclass(eq=False)
class BlockWeights:
    """The weights of the layers at ``paths``, which are those of one block that are to be folded.

    Attributes:
        folded: the folded weights, as far as the layers are folded.
    """

    source: LiveBlocks
    jobs: Mapping[str, Job]
    paths: Sequence[str]
    dtype: torch.dtype
    folded: dict[str, EncodedWeight] = field(default_factory=dict)

    @cached_property
    def before(self) -> dict[str, EncodedWeight]:
        """The weights before the fold."""
        return {path: self.source.weight(path) for path in self.paths}

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The weights in the live model, of layers that multiply by nothing else."""
        return {path: exact_weight(self.before[path], self.jobs[path][0], self.dtype) for path in self._plain}

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """The same in the folded model, as far as the layers are folded."""
        return {path: self._decoded(path) if path in self.folded else self.exact[path] for path in self._plain}

    def fold(self, path: str, folded: EncodedWeight) -> None:
        """Take over the folded weight of a layer."""
        self.folded[path] = folded
        if "stored" in self.__dict__ and path in self.stored:
            self.stored[path] = self._decoded(path)

    @cached_property
    def _plain(self) -> list[str]:
        return [path for path in self.paths if self.source.is_plain(path, self.jobs[path][0])]

    def _decoded(self, path: str) -> Tensor:
        return codecs.decode(self.folded[path]).to(dtype_of_weights(self.dtype))


class Runs(Protocol):
    """The runs of all batches through a model's blocks, block by block."""

    @property
    def first(self) -> tuple[Call, Tensor]:
        """The call of the blocks by the first batch, and its hidden values before the block that is at work."""

    def gather(self, step: Step, weights: BlockWeights, *, share: bool) -> Iterator[InputSums]:
        """The inputs of a group's layers, chunk by chunk; with ``share``, layers that get the same tensor share a sum."""

    def fold(self, step: Step, weights: BlockWeights, found: InputSums) -> dict[str, FoldedWeight | None]:
        """The folded weights of a group's layers; None for a layer without inputs."""

    def advance(self, step: Step, weights: BlockWeights) -> None:
        """Go on to the next block; ``step`` is the last of a block."""


@dataclass(eq=False)
class BatchRuns:
    """The runs of some batches in this process.

    Attributes:
        source: the model, and where its weights come from.
        blocks: the paths of the blocks.
        batches: all batches.
        chunks: the chunks of the batches that run.
        calls: the other arguments of the blocks, a call for each batch that runs.
        passed: function that is called after each batch of a block.
        live, own: the hidden values of each batch that runs before the block that is at work, in the live and in the folded model.
        after: the hidden values after this block in the live model, as soon as :meth:`gather` knows them.
    """

    source: LiveBlocks
    blocks: Sequence[str]
    batches: Batches
    chunks: Sequence[range]
    calls: Sequence[Call]
    passed: Callable[[], None]
    live: HiddenValues
    own: HiddenValues
    after: HiddenValues = field(default_factory=HiddenValues)

    @classmethod
    def of(
        cls,
        source: LiveBlocks,
        blocks: Sequence[str],
        batches: Batches,
        chunks: Sequence[range],
        passed: Callable[[], None],
    ) -> BatchRuns | None:
        """The runs before the first block; None where a batch makes a call that cannot be made again.

        Raises:
            CalibrationError: the model does not take a batch.
        """
        calls, hidden = list[Call](), HiddenValues()
        for i in range(chunks[0].start, chunks[-1].stop):
            call = first_call(source.modules[blocks[0]], partial(run_batch, source.model, i, batches.batches[i]))
            if call is None:
                return None
            hidden.append(call.hidden)
            calls.append(replace(call, hidden=call.hidden.new_empty(0)))
        return cls(source, blocks, batches, chunks, calls, passed, hidden, hidden)

    @property
    def first(self) -> tuple[Call, Tensor]:
        return self.calls[0], self.live[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.live[0].dtype

    def gather(self, step: Step, weights: BlockWeights, *, share: bool) -> Iterator[InputSums]:
        self.after = HiddenValues()
        for chunk in self.chunks:
            yield self._gather(chunk, step, weights, share)

    def _gather(self, chunk: range, step: Step, weights: BlockWeights, share: bool) -> InputSums:
        live, own = (RowRecorder(self.batches.held_out, share=share) for _ in range(2))
        sums: dict[str, InputSum] = {}
        for i in chunk:
            at = i - self.chunks[0].start
            with weights_of(self.source.modules, weights.exact):
                hidden = self._listen(step, i, self.live[at], live)
            if hidden is not None:
                self.after.append(hidden)
                self.passed()
            rows = live.rows
            if step.drifts and i < self.batches.own:
                with weights_of(self.source.modules, weights.stored):
                    self._listen(step, i, self.own[at], own)
                rows = own.rows
            for path, found in rows.items():
                if path not in sums:
                    sums[path] = InputSum.of(found[0], drifts=step.drifts)
                if step.drifts and i >= self.batches.own:
                    sums[path].add_only(found[0])
                else:
                    sums[path].add(found, live.rows.get(path, found))
        ran = step.drifts and chunk.start < self.batches.own
        wrong = share and (live.wrongly_shared or own.wrongly_shared or (ran and own.leaders != live.leaders))
        return InputSums(sums, live.leaders, wrong)

    def fold(self, step: Step, weights: BlockWeights, found: InputSums) -> dict[str, FoldedWeight | None]:
        folded: dict[str, FoldedWeight | None] = {}
        for path in step.paths:
            own, (chain, into) = found.of(path), weights.jobs[path]
            folded[path] = None if own is None else fold_calibrated(weights.before[path], chain, into, own.inputs(path))
        return folded

    def advance(self, step: Step, weights: BlockWeights) -> None:
        self.own = self.through_folded(step, weights)
        self.live = self.after

    def through_folded(self, step: Step, weights: BlockWeights) -> HiddenValues:
        """The hidden values after a block in the folded model."""
        numbers = range(self.chunks[0].start, min(self.chunks[-1].stop, self.batches.own))
        with weights_of(self.source.modules, weights.stored):
            return HiddenValues(
                run(self.source, self.blocks[step.block], self.calls[at], self.own[at]) for at in range(len(numbers))
            )

    def _listen(self, step: Step, i: int, hidden: Tensor, recorder: RowRecorder) -> Tensor | None:
        call = self.calls[i - self.chunks[0].start]
        listened = partial(run, self.source, self.blocks[step.block], call, hidden)
        return listen(self.source, step, recorder, i, self.batches.batches[i], listened)


def listen(
    source: LiveBlocks, step: Step, recorder: InputRecorder, i: int, batch: Batch, running: partial[Tensor]
) -> Tensor | None:
    """Run a block up to the last of a group's layers where there are later layers; its hidden values if it reaches its end."""
    recorder.start_batch(i, batch)
    with ExitStack() as hooks:
        for path in step.paths:
            module = source.modules[path]
            hooks.enter_context(module.register_forward_pre_hook(recorder.hook_for(path, module), with_kwargs=True))
        after, last = ([source.modules[path] for path in group] for group in (step.later, step.paths))
        return before_calls(after, running, heard=last if step.later else ())


def run(source: LiveBlocks, block: str, call: Call, hidden: Tensor) -> Tensor:
    """The hidden values after a block."""
    module = source.modules[block]
    result: Tensor = hidden_of(module(hidden.clone(), *call.args, **call.kwargs))  # a block may write to its inputs
    return result
