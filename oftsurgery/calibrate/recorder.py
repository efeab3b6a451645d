"""An :class:`InputRecorder` listens to a model's layers, and adds up their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.errors import CalibrationError
from oftsurgery.weights.calibrate import LayerInputs

from .batches import Batch, sequences_of

#: one sequence of HOLD_OUT is held out, and HELD_OUT_TOKENS tokens of the held-out sequences are kept for each layer
HOLD_OUT, HELD_OUT_TOKENS = 8, 1024

#: columns of a matrix product whose result is symmetric
_COLUMNS = 512


def held_out_sequences(count: int) -> Tensor:
    """A mask ``(count,)`` of the sequences that are held out: chosen at random, but the same each time. A single sequence
    is not held out; its tokens are divided.
    """
    held_out = torch.zeros(count, dtype=torch.bool, device="cpu")
    if count > 1:
        order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        held_out[order[: max(1, count // HOLD_OUT)]] = True
    return held_out


def held_out_of(batches: Sequence[Batch]) -> Sequence[Tensor]:
    """The masks of the sequences that are held out, one for each batch."""
    sizes = [sequences_of(batch) for batch in batches]
    return torch.split(held_out_sequences(sum(sizes)), sizes)


def add_square(total: Tensor, x: Tensor) -> None:
    """Add ``XᵀX`` to ``total``, but not below the blocks on the diagonal: :func:`mirror` fills these at the end."""
    with rotations.full_precision(x.device.type):
        for begin in range(0, len(total), _COLUMNS):
            own, later = slice(begin, begin + _COLUMNS), slice(begin, None)
            total[own, later].addmm_(x[:, own].t(), x[:, later])


def mirror(total: Tensor) -> None:
    """Copy what lies above the diagonal below the diagonal."""
    for end in range(_COLUMNS, len(total), _COLUMNS):
        own = slice(end - _COLUMNS, end)
        total[end:, own] = total[own, end:].t()


@dataclass(eq=False)
class _InputSum:
    """The inputs of one layer, or of several layers that get the same inputs."""

    hessian: Tensor
    tokens: int = 0
    held_out: list[Tensor] = field(default_factory=list)

    def add(self, kept: Tensor, held_out: Tensor) -> None:
        """Add rows of inputs; both tensors are ``(n, in)``."""
        add_square(self.hessian, kept.to(torch.float32))
        self.tokens += kept.shape[0]
        self.held_out.append(held_out.to(torch.float32, copy=True))


class InputRecorder:
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
        #: path of a layer → path of the layer whose sum has its inputs
        self.leaders: dict[str, str] = {}
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
        features_last = getattr(module, "_features_last", lambda x: x)  # of a live layer

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            version = -1 if x.is_inference() else x._version  # the version changes when the tensor is written to
            leader = path
            if self._share and self._last is not None and self._last[1] is x and self._last[2] == version:
                leader = self._last[0]
            self.wrongly_shared |= self.leaders.setdefault(path, leader) != leader
            if leader == path:
                self._last = (path, x, version)
                self._add(path, features_last(x.detach()))

        return hook

    def inputs_of(self, path: str) -> LayerInputs | None:
        """The inputs of the layer at ``path``.

        Raises:
            CalibrationError: the inputs hold NaN or infinity.
        """
        found = self._sums.get(self.leaders.get(path, path))
        if found is None:
            return None
        mirror(found.hessian)
        inputs = LayerInputs(found.hessian, found.tokens, torch.cat(found.held_out)[:HELD_OUT_TOKENS])
        check_finite(path, inputs.hessian, inputs.held_out)
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
        self.take(path, rows[~held_out], _evenly(rows[held_out], self._room))

    def take(self, path: str, kept: Tensor, held_out: Tensor) -> None:
        """Add rows of inputs to the sum of ``path``."""
        if path not in self._sums:
            self._sums[path] = _InputSum(kept.new_zeros((kept.shape[1],) * 2, dtype=torch.float32))
        self._sums[path].add(kept, held_out)


def _evenly(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of the rows, evenly spread over them."""
    if rows.shape[0] <= count:
        return rows
    return rows[torch.linspace(0, rows.shape[0] - 1, count, device=rows.device).to(torch.int64)]


def check_finite(path: str, *inputs: Tensor) -> None:
    """Refuse a layer's inputs, or sums of them, that are not finite.

    Raises:
        CalibrationError: a value is NaN or infinity.
    """
    if not all(bool(torch.isfinite(values).all()) for values in inputs):
        message = "the calibration's inputs of this layer hold NaN, infinity or values that overflow"
        remedy = "check the calibration's texts or batches (is a row all padding?) and the model's dtype"
        raise CalibrationError(message, module=path, remedy=remedy)
