"""The sums of layers' inputs in the live model, and in the model whose earlier layers are folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.weights.calibrate import LayerInputs

from .recorder import HELD_OUT_TOKENS, add_square, check_finite, mirror


@dataclass(eq=False)
class InputSum:
    """The inputs of one layer, or of layers with the same inputs, in the folded and in the live model.

    Attributes:
        hessian: ``XᵀX`` of the inputs X in the folded model, ``(in, in)`` float32, above the diagonal alone until :meth:`end`.
        drifts: whether the inputs in the two models differ, row by row.
        drift: ``(Y - X)ᵀ X`` of the inputs Y in the live model; None where nothing drifts, or before the first rows.
        tokens: number of rows in ``hessian``.
        own_tokens: number of rows in ``drift``.
        held_out, live: other rows of X and of Y.
    """

    hessian: Tensor
    drifts: bool
    drift: Tensor | None = None
    tokens: int = 0
    own_tokens: int = 0
    held_out: list[Tensor] = field(default_factory=list)
    live: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Tensor, *, drifts: bool) -> InputSum:
        return cls(rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float32), drifts)

    def add(self, own: tuple[Tensor, Tensor], live: tuple[Tensor, Tensor]) -> None:
        """Add rows of inputs that are summed up, and rows that are held out."""
        if own[0].shape != live[0].shape or own[1].shape != live[1].shape:
            self._end_drift()  # the layer is one of several experts, and takes other tokens in the folded model
        x = self.add_only(own[0])
        self.own_tokens += x.shape[0]
        if self.drifts:
            self.drift = torch.zeros_like(self.hessian) if self.drift is None else self.drift
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

    def join(self, later: InputSum) -> None:
        """Add the sums over later rows."""
        self.hessian += later.hessian
        self.tokens += later.tokens
        self.own_tokens += later.own_tokens
        if not later.drifts:
            self._end_drift()
        elif self.drifts and later.drift is not None:
            self.drift = later.drift if self.drift is None else self.drift + later.drift
        self.held_out += later.held_out
        self.live += later.live

    def _end_drift(self) -> None:
        self.drifts, self.drift = False, None

    def end(self) -> None:
        """Complete the sums; the drift of some tokens counts for all tokens."""
        mirror(self.hessian)
        if self.drift is not None:
            self.drift *= self.tokens / max(self.own_tokens, 1)

    def inputs(self, path: str) -> LayerInputs:
        """
        Raises:
            CalibrationError: the inputs hold NaN or infinity.
        """
        held_out, live = (torch.cat(rows)[:HELD_OUT_TOKENS] for rows in (self.held_out, self.live))
        check_finite(path, self.hessian, held_out)
        if self.drift is None:
            return LayerInputs(self.hessian, self.tokens, held_out)
        check_finite(path, self.drift, live)
        return LayerInputs(self.hessian, self.tokens, held_out, self.drift, live)


@dataclass(eq=False)
class InputSums:
    """The inputs of a group of layers over some batches.

    Attributes:
        sums: the sums, each under the path of one of the layers that share it.
        leaders: the path of a layer → the path under which its sum is.
        wrong: whether layers that seemed to share their inputs do not.
    """

    sums: dict[str, InputSum]
    leaders: dict[str, str]
    wrong: bool

    def join(self, later: InputSums) -> None:
        """Add the sums over later batches."""
        self.wrong |= later.wrong or any(self.leaders.setdefault(p, at) != at for p, at in later.leaders.items())
        for path, own in later.sums.items():
            if path in self.sums:
                self.sums[path].join(own)
            else:
                self.sums[path] = own

    def end(self) -> None:
        """Complete the sums. A layer that no batch has reached in the folded model has none."""
        self.sums = {path: own for path, own in self.sums.items() if own.held_out}
        for own in self.sums.values():
            own.end()

    def of(self, path: str) -> InputSum | None:
        return self.sums.get(self.leaders.get(path, path))

    def as_plain(self) -> dict[str, Any]:
        """The same in dicts, lists and tensors."""
        return {**vars(self), "sums": {path: vars(own) for path, own in self.sums.items()}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> InputSums:
        return cls(**{**plain, "sums": {path: InputSum(**own) for path, own in plain["sums"].items()}})
