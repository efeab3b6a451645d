"""A :class:`Calibration` gathers the inputs of a model's layers while the model computes with its adapters live.

The exact output of a layer is its output in the live model, so the inputs of all layers are taken from the live model
too, whichever layers are rounded already; the order in which layers are folded does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.targets import without_targets
from oftsurgery.checks.verify_models import eval_mode
from oftsurgery.errors import CalibrationError, OFTSurgeryError, StateError, printable
from oftsurgery.live.wrapping import wrap_model
from oftsurgery.progress import Progress
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.modules import inner_model, modules_of
from oftsurgery.weights.calibrate import LayerInputs

from .batches import Batch

#: one sequence of HOLD_OUT is held out, and HELD_OUT_TOKENS tokens of the held-out sequences are kept for each layer
HOLD_OUT, HELD_OUT_TOKENS = 8, 2048

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
        batches: Sequence[Batch],
        *,
        progress: Progress | None = None,
        pass_bytes: int = PASS_BYTES,
    ) -> None:
        # the plan of the fold has already reported modules that the adapters lack
        planned = [replace(adapter, config=without_targets(adapter.config)) for adapter in adapters]
        named = {f"calibration_{i}": adapter for i, adapter in enumerate(planned)}
        self._live = inner_model(wrap_model(model, named))
        self._modules = modules_of(self._live)
        self._batches = batches
        self._progress = progress
        self._ready: dict[str, LayerInputs | None] = {}
        self._done = 0
        layers: dict[str, Any] = {path: self._modules[path] for path in paths}
        # the paths that nobody has asked for yet, in a list for each pass
        self._passes = _passes({path: int(layer._shape[1]) for path, layer in layers.items()}, pass_bytes)
        sizes = [_length(batch) for batch in batches]
        self._held_out = torch.split(held_out_sequences(sum(sizes)), sizes)
        for module in self._live.modules():
            # a CPU forward would round the statistics of 4-bit weights to bfloat16
            if hasattr(module, "support_avx512bf16_for_cpu") and not Layer("", module).repacked:
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    def __call__(self, path: str) -> LayerInputs | None:
        """The inputs of the layer at ``path``, which can be read once; None where no batch reached the layer.

        Raises:
            CalibrationError: the model does not take a batch, or computes NaN or infinity from a batch.
        """
        waiting = next(paths for paths in self._passes if path in paths)
        if path not in self._ready:
            recorder = self._run(waiting, share=True)
            if recorder.wrongly_shared:
                recorder = self._run(waiting, share=False)
            self._ready = {p: recorder.inputs_of(p) for p in waiting}
        waiting.remove(path)
        return self._ready.pop(path)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, paths: Sequence[str], *, share: bool) -> _InputRecorder:
        recorder = _InputRecorder(self._held_out, share=share)
        with ExitStack() as hooks, eval_mode(self._live), _stance("force_eager"):
            for path in paths:
                module = self._modules[path]
                hooks.enter_context(module.register_forward_pre_hook(recorder.hook_for(path, module), with_kwargs=True))
            for i, batch in enumerate(self._batches):
                recorder.start_batch(i, batch)
                self._forward(i, batch)
                self._done += 1
                if self._progress is not None:
                    total = max(len(self._passes) * len(self._batches), self._done)
                    self._progress(self._done, total, "calibration")
        return recorder

    def _forward(self, number: int, batch: Batch) -> None:
        args, kwargs = batch
        try:
            self._live(*args, **kwargs)
        except OFTSurgeryError:
            raise
        except Exception as error:  # a model raises errors of any kind at a batch that it does not take
            message = f"the model does not take calibration batch {number}: {type(error).__name__}: {printable(error)}"
            remedy = "give batches that the model's forward takes, on the model's device"
            raise CalibrationError(message, remedy=remedy) from error


# compiled models run eagerly, so that hooks are called and nothing is compiled again
_stance: Any = getattr(torch.compiler, "set_stance", nullcontext)  # torch 2.6


def _passes(features: Mapping[str, int], limit: int) -> list[list[str]]:
    """Paths in groups whose Hessians and held-out inputs take at most ``limit`` bytes."""
    groups, size = [list[str]()], 0
    for path, n in features.items():
        nbytes = 4 * n * (n + HELD_OUT_TOKENS)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += nbytes
    return groups


def _length(batch: Batch) -> int:
    """The number of sequences in a batch: the first dimension of its first tensor."""
    first = next(v for v in (*batch[0], *batch[1].values()) if isinstance(v, Tensor))
    return first.shape[0] if first.ndim else 1


def held_out_sequences(count: int) -> Tensor:
    """A mask ``(count,)`` of the sequences that are held out: chosen at random, but the same each time. A single sequence
    is not held out; its tokens are divided.
    """
    held_out = torch.zeros(count, dtype=torch.bool, device="cpu")
    if count > 1:
        order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        held_out[order[: max(1, count // HOLD_OUT)]] = True
    return held_out


@dataclass(eq=False)
class _InputSum:
    """The inputs of one layer, or of several layers that get the same inputs."""

    hessian: Tensor
    tokens: int = 0
    held_out: list[Tensor] = field(default_factory=list)

    def add(self, kept: Tensor, held_out: Tensor) -> None:
        """Add rows of inputs; both tensors are ``(n, in)``."""
        kept = kept.to(torch.float32)
        with rotations.full_precision(kept.device.type):
            self.hessian.addmm_(kept.t(), kept)
        self.tokens += kept.shape[0]
        self.held_out.append(held_out.to(torch.float32, copy=True))


class _InputRecorder:
    """Hooks that add up the inputs of layers, and keep some of the sequences that are ``held_out`` in each batch. With
    ``share``, layers that get the same tensor one after the other (queries, keys and values) share one sum.
    """

    def __init__(self, held_out: Sequence[Tensor], *, share: bool) -> None:
        self._held_out = held_out
        self._share = share
        divided = sum(bool(which.any()) for which in held_out)
        self._by_sequence = divided > 0
        self._room = max(1, HELD_OUT_TOKENS // (divided or len(held_out)))  # tokens of each batch
        self._sums: dict[str, _InputSum] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[str, Tensor, int] | None = None
        #: whether layers that shared an input tensor in one call got different tensors in a later call
        self.wrongly_shared = False

    def start_batch(self, number: int, batch: Batch) -> None:
        """Tell the hooks that the following inputs belong to this batch."""
        mask = batch[1].get("attention_mask")
        self._mask = mask.reshape(-1).to(torch.bool) if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._which = self._held_out[number]
        self._last = None

    def hook_for(self, path: str, module: Any) -> Any:
        """A hook that runs before the forward of the layer at ``path``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            version = -1 if x.is_inference() else x._version  # the version changes when the tensor is written to
            leader = path
            if self._share and self._last is not None and self._last[1] is x and self._last[2] == version:
                leader = self._last[0]
            self.wrongly_shared |= self._leader.setdefault(path, leader) != leader
            if leader == path:
                self._last = (path, x, version)
                self._add(path, module._features_last(x.detach()))

        return hook

    def inputs_of(self, path: str) -> LayerInputs | None:
        """The inputs of the layer at ``path``.

        Raises:
            CalibrationError: the inputs hold NaN or infinity.
        """
        found = self._sums.get(self._leader.get(path, path))
        if found is None:
            return None
        inputs = LayerInputs(found.hessian, found.tokens, torch.cat(found.held_out)[:HELD_OUT_TOKENS])
        if not bool(torch.isfinite(inputs.hessian).all() and torch.isfinite(inputs.held_out).all()):
            message = "the calibration's inputs of this layer hold NaN, infinity or values that overflow"
            remedy = "check the calibration's texts or batches (is a row all padding?) and the model's dtype"
            raise CalibrationError(message, module=path, remedy=remedy)
        return inputs

    def _add(self, path: str, x: Tensor) -> None:
        """Add ``x: (…, in)`` to the sum of ``path``; padding that the batch's mask names is left out."""
        rows = x.reshape(-1, x.shape[-1])
        count, sequences = rows.shape[0], len(self._which)
        whole = x.shape[0] in (sequences, count) and count % max(sequences, 1) == 0  # sequences one after the other
        if self._by_sequence and whole:
            held_out = self._which.to(x.device).repeat_interleave(count // sequences)
        else:
            held_out = torch.arange(count, device=x.device) % HOLD_OUT == HOLD_OUT - 1
        if self._mask is not None and whole and self._mask.numel() == count:
            mask = self._mask.to(x.device)
            rows, held_out = rows[mask], held_out[mask]
        if path not in self._sums:
            self._sums[path] = _InputSum(rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float32))
        self._sums[path].add(rows[~held_out], _evenly(rows[held_out], self._room))


def _evenly(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of the rows, evenly spread over them."""
    if rows.shape[0] <= count:
        return rows
    return rows[torch.linspace(0, rows.shape[0] - 1, count, device=rows.device).to(torch.int64)]
