"""A :class:`Meter` measures how far one output of a model is from a reference's, and how much of an adapter's effect it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from oftsurgery.errors import NonFiniteError, ShapeError

from .verify_report import OutputError

#: elements that are converted to float64 at once
_PART = 1 << 22


class Meter:
    """Accumulates one :class:`~oftsurgery.OutputError` in float64. With ``tokens`` the vectors of the output are scores of
    tokens, and the meter compares their distributions too.
    """

    def __init__(self, *, tokens: bool = False) -> None:
        self.difference = self.norm = self.max_abs = self.distance = self.divergence = 0.0
        self.held = self.effect = 0.0
        self.vectors = self.calls = 0
        self.tokens, self.whole = tokens, True

    def add(self, name: str, got: Tensor, expected: Tensor, base: Tensor | None = None) -> None:
        """Add an output, the reference's output, and the output without the adapter where it is known."""
        self.calls += 1
        for other in (expected, base):
            if other is not None and got.shape != other.shape:
                message, remedy = (
                    "the two models' outputs differ in shape",
                    "give two models of the same class and size",
                )
                raise ShapeError(message, tensor=name, shape=got.shape, expected=other.shape, remedy=remedy)
        self.whole = self.whole and base is not None
        for a, b, c in _parts(got, expected, base):
            if not bool(torch.isfinite(a).all() and torch.isfinite(b).all() and torch.isfinite(c).all()):
                remedy = "check the inputs (is a row all padding?) and both models"
                raise NonFiniteError("an output holds NaN or infinity", tensor=name, remedy=remedy)
            self._add(a, b, c)

    def _add(self, a: Tensor, b: Tensor, c: Tensor) -> None:
        """Add float64 ``(vectors, features)`` of the model, the reference and the base."""
        self.difference += float((a - b).square().sum())
        self.norm += float(b.square().sum())
        self.max_abs = max(self.max_abs, float((a - b).abs().max()))
        self.held += float(((a - c) * (b - c)).sum())
        self.effect += float((b - c).square().sum())
        lengths = a.norm(dim=-1) * b.norm(dim=-1)
        cosine = (a * b).sum(-1) / lengths.clamp(min=1e-300)
        cosine = torch.where(lengths > 0, cosine, (a == b).all(-1).to(a))
        self.distance += float((1 - cosine).sum())
        self.vectors += len(a)
        if self.tokens:
            ours, theirs = a.log_softmax(-1), b.log_softmax(-1)
            self.divergence += float((theirs.exp() * (theirs - ours)).sum())

    def result(self) -> OutputError:
        vectors = max(self.vectors, 1)
        return OutputError(
            relative=(self.difference / self.norm) ** 0.5 if self.norm else self.difference**0.5,
            max_abs=self.max_abs,
            cosine_distance=max(0.0, self.distance / vectors),
            kept=self.held / self.effect if self.whole and self.effect else None,
            kl=self.divergence / vectors if self.tokens else None,
        )


def measured(meters: Mapping[str, Meter]) -> Mapping[str, OutputError]:
    return MappingProxyType({name: meter.result() for name, meter in meters.items()})


def _parts(got: Tensor, expected: Tensor, base: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The tensors as ``(vectors, features)`` float64 on the CPU, a few vectors at a time: the scores of a batch of long texts
    would fill the memory several times over.
    """
    if not got.numel():
        return
    features = got.shape[-1] if got.ndim else 1
    rows = [t.detach().reshape(-1, features) for t in (got, expected, expected if base is None else base)]
    size = max(1, _PART // features)
    for start in range(0, len(rows[0]), size):
        a, b, c = (t[start : start + size].to("cpu", torch.float64) for t in rows)
        yield a, b, c
