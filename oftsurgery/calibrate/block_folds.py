"""A :class:`BlockFolds` folds the layers of a model's blocks in the order in which the model calls the blocks.

The inputs of a layer are those in the model whose earlier layers are folded, and the aim are the live model's outputs, so a
layer makes up for a part of what the layers before it lost. The memory holds the inputs of one group of layers. Past
:data:`OWN_TOKENS` the inputs are taken from the live model alone, which saves two of three runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.formats import codecs
from oftsurgery.weights.calibrate import FoldedAlready, LayerInputs, fold_calibrated

from .batches import Batch, length_of, one_sequence, sequences_of
from .block_sources import Job, LiveBlocks, exact_weight
from .blocks import Call, are_chained, before_calls, block_paths, first_call, hidden_of, run_batch, running, weights_of
from .freed_memory import give_back
from .hidden_values import HiddenValues
from .recorder import HELD_OUT_TOKENS, InputRecorder, add_square, check_finite, held_out_of, mirror

#: number of tokens that run through the folded blocks too
OWN_TOKENS = 1 << 14


@dataclass(eq=False)
class _Pair:
    """The inputs of one layer, or of layers with the same inputs, in the folded and in the live model."""

    hessian: Tensor
    drift: Tensor | None
    tokens: int = 0
    own_tokens: int = 0
    held_out: list[Tensor] = field(default_factory=list)
    live: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Tensor, *, drifts: bool) -> _Pair:
        square = rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float32)
        return cls(square, square.clone() if drifts else None)

    def add(self, own: tuple[Tensor, Tensor], live: tuple[Tensor, Tensor]) -> None:
        """Add rows of inputs that are summed up, and rows that are held out."""
        if own[0].shape != live[0].shape or own[1].shape != live[1].shape:
            self.drift = None  # the layer is one of several experts, and takes other tokens in the folded model
        x = self.add_only(own[0])
        self.own_tokens += x.shape[0]
        if self.drift is not None:
            with rotations.full_precision(x.device.type):
                self.drift.addmm_((live[0].to(torch.float32) - x).t(), x)
        for kept, rows in ((self.held_out, own[1]), (self.live, live[1])):
            kept.append(rows.to(torch.float32, copy=True))

    def add_only(self, rows: Tensor) -> Tensor:
        """Add rows to the Hessian alone, and return them in float32."""
        x = rows.to(torch.float32)
        add_square(self.hessian, x)
        self.tokens += x.shape[0]
        return x

    def end(self) -> None:
        """Complete the sums; the drift of some tokens counts for all tokens."""
        mirror(self.hessian)
        if self.drift is not None:
            self.drift *= self.tokens / max(self.own_tokens, 1)

    def inputs(self, path: str) -> LayerInputs:
        held_out, live = (torch.cat(rows)[:HELD_OUT_TOKENS] for rows in (self.held_out, self.live))
        check_finite(path, self.hessian, held_out)
        if self.drift is None:
            return LayerInputs(self.hessian, self.tokens, held_out)
        check_finite(path, self.drift, live)
        return LayerInputs(self.hessian, self.tokens, held_out, self.drift, live)


class _RowRecorder(InputRecorder):
    """An :class:`InputRecorder` that keeps the rows of one batch."""

    rows: dict[str, tuple[Tensor, Tensor]]

    def start_batch(self, number: int, batch: Batch) -> None:
        super().start_batch(number, batch)
        self.rows = {}

    def take(self, path: str, kept: Tensor, held_out: Tensor) -> None:
        if path in self.rows:
            kept, held_out = (torch.cat(both) for both in zip(self.rows[path], (kept, held_out), strict=True))
        self.rows[path] = kept, held_out


def _count(calls: Counter[str], path: str, *_: object) -> None:
    calls[path] += 1


@dataclass(frozen=True, eq=False)
class _Step:
    """A group of a block's layers.

    Attributes:
        block: number of the block.
        paths: the layers.
        later: the layers of the later groups.
        exact, stored: the weights of the block's layers in the live model, and in the folded model as far as it is folded.
        drifts: whether the inputs in the folded model differ from those in the live model.
    """

    block: int
    paths: Sequence[str]
    later: Sequence[str]
    exact: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]
    drifts: bool


@dataclass(eq=False)
class BlockFolds:
    """The folded weights of a model's blocks.

    Attributes:
        source: the model, and where its weights come from.
        jobs: what becomes of each layer.
        blocks: the paths of the blocks.
        batches: the batches.
        calls: the other arguments of the blocks, one call a batch.
        hidden: the hidden values before the first block.
        again: function that gives the inputs of a layer in the live model.
        step: function that is called after each batch of a block.
    """

    source: LiveBlocks
    jobs: Mapping[str, Job]
    blocks: Sequence[str]
    batches: Sequence[Batch]
    calls: Sequence[Call]
    hidden: InitVar[HiddenValues]
    again: Callable[[str], LayerInputs | None]
    step: Callable[[], None]

    @classmethod
    def of(
        cls,
        source: LiveBlocks,
        jobs: Mapping[str, Job],
        batches: Sequence[Batch],
        again: Callable[[str], LayerInputs | None],
        step: Callable[[], None],
    ) -> BlockFolds | None:
        """None for a model whose blocks cannot be run one by one.

        Raises:
            CalibrationError: the model does not take a batch.
        """
        paths = block_paths(source.modules, jobs)
        if not paths:
            return None
        blocks, run = [source.modules[path] for path in paths], partial(run_batch, source.model)
        with running(source.model):
            longest = max(range(len(batches)), key=lambda i: length_of(batches[i]))  # masks depend on the length
            with source.on_demand(jobs, paths):
                if not are_chained(blocks, partial(run, longest, one_sequence(batches[longest]))):
                    return None
            calls, hidden = list[Call](), HiddenValues()
            for i, batch in enumerate(batches):
                call = first_call(blocks[0], partial(run, i, batch))
                if call is None:
                    return None
                hidden.append(call.hidden)
                calls.append(replace(call, hidden=call.hidden.new_empty(0)))
        return cls(source, jobs, paths, batches, calls, hidden, again, step)

    def __post_init__(self, hidden: HiddenValues) -> None:
        self.paths = {path: i for i, at in enumerate(self.blocks) for path in self.jobs if path.startswith(f"{at}.")}
        self.count = 1 + max(self.paths.values())  # the later blocks have no layer to fold
        self._live = self._own = hidden
        self._done = 0
        tokens = accumulate(sequences_of(batch) * length_of(batch) for batch in self.batches)
        self._runs = 1 + sum(count < OWN_TOKENS for count in tokens)  # batches that run through the folded blocks
        runs, others = self.batches[: self._runs], self.batches[self._runs :]
        live_only = [torch.zeros(sequences_of(batch), dtype=torch.bool, device="cpu") for batch in others]
        self._held_out = [*held_out_of(runs), *live_only]
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
        before = {path: self.source.weight(path) for path in paths}
        plain = [path for path in paths if self.source.is_plain(path, self.jobs[path][0])]
        dtype = self._live[0].dtype
        exact = {path: exact_weight(before[path], self.jobs[path][0], dtype) for path in plain}
        stored = dict(exact)
        groups = self._groups(number, paths, exact)
        for k, group in enumerate(groups):
            step = _Step(number, group, list(chain.from_iterable(groups[k + 1 :])), exact, stored, number + k > 0)
            found = self._gather(step, share=True) or self._gather(step, share=False)
            assert found is not None  # noqa: S101 - layers that share nothing are not wrongly shared
            pairs, leaders, after = found
            for path in group:
                pair = pairs.get(leaders.get(path, path))
                if pair is None:
                    self._ready[path] = None
                    continue
                turns, into = self.jobs[path]
                folded = fold_calibrated(before[path], turns, into, pair.inputs(path))
                self._ready[path] = FoldedAlready(before[path].fingerprint, folded, partial(self.again, path))
                if path in stored:
                    stored[path] = codecs.decode(folded.encoded).to(stored[path].dtype)
        self._live = after
        if number + 1 < self.count:
            with weights_of(self.source.modules, stored):
                own = zip(range(self._runs), self._own, strict=False)
                self._own = HiddenValues(self._run(number, i, hidden) for i, hidden in own)

    def _groups(self, number: int, paths: Sequence[str], exact: Mapping[str, Tensor]) -> list[list[str]]:
        """The layers of a block in groups, in the order in which the first batch calls them: layers with the same input are together,
        and so are all layers with a number in their paths (experts), and layers that the batch does not call. After the first
        input, two inputs make a group: each group costs two runs of the block. A block that calls a layer twice is one group.
        """
        at = f"{self.blocks[number]}."
        local = tuple(path.removeprefix(at) for path in paths)
        if local not in self._orders:
            recorder, calls = _RowRecorder(self._held_out, share=True), Counter[str]()
            with weights_of(self.source.modules, exact), ExitStack() as hooks:
                for path in paths:
                    count = partial(_count, calls, path)
                    hooks.enter_context(self.source.modules[path].register_forward_pre_hook(count))
                self._listen(number, 0, self._live[0], recorder, paths, self.batches[0])
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

    def _gather(self, step: _Step, *, share: bool) -> tuple[dict[str, _Pair], dict[str, str], HiddenValues] | None:
        """The inputs of a group's layers, the paths under which layers share inputs, and, for the last group, the hidden values
        after the block in the live model; None if layers that seemed to share their inputs do not.
        """
        live, own = (_RowRecorder(self._held_out, share=share) for _ in range(2))
        pairs: dict[str, _Pair] = {}
        after = HiddenValues()
        for i, batch in enumerate(self.batches):
            with weights_of(self.source.modules, step.exact):
                hidden = self._listen(step.block, i, self._live[i], live, step.paths, batch, step.later)
            if hidden is not None:
                after.append(hidden)
                self.step()
            if step.drifts and i >= self._runs:
                for path in live.rows.keys() & pairs.keys():
                    pairs[path].add_only(live.rows[path][0])
            else:
                self._add_both(step, i, own, live, pairs)
        if share and (live.wrongly_shared or own.wrongly_shared or (step.drifts and own.leaders != live.leaders)):
            return None
        for pair in pairs.values():
            pair.end()
        return pairs, live.leaders, after

    def _add_both(self, step: _Step, i: int, own: _RowRecorder, live: _RowRecorder, pairs: dict[str, _Pair]) -> None:
        """Add the inputs of batch ``i`` in the folded model and in the live model, which are the same for the first group."""
        rows = live.rows
        if step.drifts:
            with weights_of(self.source.modules, step.stored):
                self._listen(step.block, i, self._own[i], own, step.paths, self.batches[i], step.later)
            rows = own.rows
        for path, found in rows.items():
            if path not in pairs:
                pairs[path] = _Pair.of(found[0], drifts=step.drifts)
            pairs[path].add(found, live.rows.get(path, found))

    def _listen(
        self,
        number: int,
        i: int,
        hidden: Tensor,
        recorder: _RowRecorder,
        paths: Sequence[str],
        batch: Batch,
        later: Sequence[str] = (),
    ) -> Tensor | None:
        """Run a block up to the last of the layers at ``paths`` where there are ``later`` layers; its hidden values if it reaches
        its end.
        """
        recorder.start_batch(i, batch)
        with ExitStack() as hooks:
            for path in paths:
                module = self.source.modules[path]
                hooks.enter_context(module.register_forward_pre_hook(recorder.hook_for(path, module), with_kwargs=True))
            after, last = ([self.source.modules[path] for path in group] for group in (later, paths))
            heard = last if later else ()
            return before_calls(after, partial(self._run, number, i, hidden), heard=heard)

    def _run(self, number: int, i: int, hidden: Tensor) -> Tensor:
        """The hidden values after a block, for batch ``i``."""
        call = self.calls[i]
        block = self.source.modules[self.blocks[number]]
        result: Tensor = hidden_of(block(hidden.clone(), *call.args, **call.kwargs))  # a block may write to its inputs
        return result
