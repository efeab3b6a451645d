"""A :class:`Calibration` gathers the inputs of a model's layers while the model computes with its adapters live.

The exact output of a layer is its output in the live model, so the inputs of all layers are taken from the live model
too, whichever layers are rounded already; the order in which layers are folded does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.targets import without_targets
from oftsurgery.errors import StateError
from oftsurgery.live.wrapping import wrap_model
from oftsurgery.progress import Progress
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.modules import inner_model, modules_of
from oftsurgery.weights.calibrate import FoldedAlready, LayerInputs

from .batches import Batch, BatchesOf
from .block_folds import BlockFolds, in_this_process
from .block_sources import Job, LiveBlocks
from .blocks import run_batch, running
from .recorder import HELD_OUT_TOKENS, InputRecorder, held_out_of

#: bytes of the Hessians that are gathered in one pass over the batches; more layers take more passes
PASS_BYTES = 2 << 30


def check_wanted(paths: Collection[str]) -> None:
    """Refuse a calibration that decides the rounding of no layer.

    Raises:
        StateError: ``paths`` is empty.
    """
    if not paths:
        raise StateError(
            "a calibration chooses how the quantised weights of layers are rounded, and this fold writes no such weight",
            remedy="leave out the calibration (--calibration), or write a quantised format (--format nf4)",
        )


def live_model(model: nn.Module, adapters: Sequence[OFTAdapter]) -> nn.Module:
    """A copy of ``model`` over the same tensors, with ``adapters`` live in their order."""
    # the plan of the fold has already reported modules that the adapters lack
    planned = [replace(adapter, config=without_targets(adapter.config)) for adapter in adapters]
    live = inner_model(wrap_model(model, {f"calibration_{i}": adapter for i, adapter in enumerate(planned)}))
    for module in live.modules():
        # a CPU forward would round the statistics of 4-bit weights to bfloat16
        if hasattr(module, "support_avx512bf16_for_cpu") and not Layer("", module).repacked:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return live


class Calibration:
    """The inputs of a model's layers over a calibration's batches, which are gathered pass by pass when a layer is asked for.

    The passes run a copy of ``model`` over the same tensors, with ``adapters`` live in their order. Callers ask for the
    layers at ``paths``, in about this order; the Hessians take ``pass_bytes`` of memory at once, or more for a larger layer.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[OFTAdapter],
        paths: Sequence[str],
        batches: BatchesOf | Sequence[Batch],
        *,
        progress: Progress | None = None,
        pass_bytes: int = PASS_BYTES,
        jobs: Mapping[str, Job] | None = None,
    ) -> None:
        self._live = live_model(model, adapters)
        self._modules = modules_of(self._live)
        self._batches = batches(self._live) if callable(batches) else batches
        self._progress = progress
        self._ready: dict[str, LayerInputs | None] = {}
        self._done = 0
        self._jobs, self._limit = jobs or {}, pass_bytes
        # the paths that nobody has asked for yet, in a list for each pass
        self._waiting: list[list[str]] | None = None
        self._paths = list(paths)
        self._held_out = held_out_of(self._batches)
        self._blocks: BlockFolds | None = None

    def __call__(self, path: str) -> LayerInputs | FoldedAlready | None:
        """The inputs of the layer at ``path``, or its folded weight, which can be read once; None where no batch reached the
        layer.

        Raises:
            CalibrationError: the model does not take a batch, or computes NaN or infinity from a batch.
        """
        if self._waiting is None:
            self._start()
        if self._blocks is not None and path in self._blocks.paths:
            return self._blocks(path)
        return self._inputs(path)

    def _start(self) -> None:
        """Find the model's blocks, and divide the other layers into passes."""
        runs_of = in_this_process(self._step)
        self._blocks = BlockFolds.of(LiveBlocks(self._live), self._jobs, self._batches, self.alone, runs_of)
        others = [path for path in self._paths if self._blocks is None or path not in self._blocks.paths]
        layers: dict[str, Any] = {path: self._modules[path] for path in others}
        self._waiting = _passes({path: int(layer._shape[1]) for path, layer in layers.items()}, self._limit)
        self._rounds = len(self._waiting) + (0 if self._blocks is None else self._blocks.count)

    def _inputs(self, path: str) -> LayerInputs | None:
        assert self._waiting is not None  # noqa: S101 - the first call divides the layers
        waiting = next(paths for paths in self._waiting if path in paths)
        if path not in self._ready:
            recorder = self._run(waiting, share=True)
            if recorder.wrongly_shared:
                recorder = self._run(waiting, share=False)
            self._ready = {p: recorder.inputs_of(p) for p in waiting}
        waiting.remove(path)
        return self._ready.pop(path)

    def _step(self) -> None:
        """Report that a batch has passed a block, or the whole model."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._rounds * len(self._batches), self._done), "calibration")

    def alone(self, path: str) -> LayerInputs | None:
        """The inputs of one layer in the live model."""
        return self._run([path], share=True).inputs_of(path)

    def _run(self, paths: Sequence[str], *, share: bool) -> InputRecorder:
        recorder = InputRecorder(self._held_out, share=share)
        with ExitStack() as hooks, running(self._live):
            for path in paths:
                module = self._modules[path]
                hooks.enter_context(module.register_forward_pre_hook(recorder.hook_for(path, module), with_kwargs=True))
            for i, batch in enumerate(self._batches):
                recorder.start_batch(i, batch)
                run_batch(self._live, i, batch)
                self._step()
        return recorder


def _passes(features: Mapping[str, int], limit: int) -> list[list[str]]:
    """Paths in groups whose Hessians and held-out inputs take at most ``limit`` bytes."""
    groups, size = list[list[str]](), 0
    for path, n in features.items():
        nbytes = 4 * n * (n + HELD_OUT_TOKENS)
        if not groups or size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += nbytes
    return groups
