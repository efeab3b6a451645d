""":func:`verify` compares two live models that should compute the same, module by module and end to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.errors import MatchError, NonFiniteError, ShapeError, StateError, printable
from oftsurgery.records.record import plain
from oftsurgery.stores import peft_live
from oftsurgery.stores.live_model import record_of
from oftsurgery.stores.modules import inner_model, modules_of


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference's, over all inputs.

    >>> report = oftsurgery.verify(model, model, inputs)
    >>> report.outputs["logits"].max_abs
    0.0

    Attributes:
        relative: ``‖a - b‖ / ‖b‖`` (Frobenius).
        max_abs: largest absolute difference.
        cosine_distance: mean of ``1 - cos`` over the vectors of the last dimension.
    """

    relative: float
    max_abs: float
    cosine_distance: float


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`~oftsurgery.verify` measured.

    >>> report = oftsurgery.verify(oftsurgery.fold(model, "ADAPTER"), live, inputs)
    >>> path, error = report.worst
    >>> error == report.modules[path], list(report.outputs), report.batches
    (True, ['logits'], 1)

    Attributes:
        modules: ``{path: OutputError}`` of each compared module, given the very inputs that the module gets in the
            reference model: the error of this module, not of the modules before it.
        outputs: ``{name: OutputError}`` of the models' outputs.
        batches: how many inputs were run.
        plain: ``{name: OutputError}`` of the outputs of the model ``plain``; empty without one.
        uncalled: folded modules that the reference never called on these inputs: where their owners only read the
            weights, a live adapter does nothing there, and a fold should not either.
    """

    modules: Mapping[str, OutputError]
    outputs: Mapping[str, OutputError]
    batches: int
    plain: Mapping[str, OutputError] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[str, OutputError] | None:
        """The module with the largest relative error, or None without modules."""
        return max(self.modules.items(), key=lambda item: item[1].relative, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, strings and numbers."""
        return dict(plain(self))

    def __str__(self) -> str:
        rows = [
            *self.outputs.items(),
            *((f"{name}, plain rounding", e) for name, e in self.plain.items()),
            *sorted(self.modules.items(), key=lambda item: -item[1].relative),
        ]
        width = max((len(printable(name)) for name, _ in rows), default=0)
        lines = [f"{'':{width}}  relative   max abs    1 - cos"]
        for name, e in rows:
            lines.append(f"{printable(name):{width}}  {e.relative:.2e}   {e.max_abs:.2e}   {e.cosine_distance:.2e}")
        lines += [
            f"{printable(name)}: the reference never called this module on these inputs" for name in self.uncalled
        ]
        return "\n".join(lines)


class _Meter:
    """Accumulates one :class:`OutputError` in float64."""

    def __init__(self) -> None:
        self.difference = self.norm = self.max_abs = self.distance = 0.0
        self.vectors = self.calls = 0

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        self.calls += 1
        if a.shape != b.shape:
            message, remedy = "the two models' outputs differ in shape", "give two models of the same class and size"
            raise ShapeError(message, tensor=name, shape=a.shape, expected=b.shape, remedy=remedy)
        a, b = a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            remedy = "check the inputs (is a row all padding?) and both models"
            raise NonFiniteError("an output holds NaN or infinity", tensor=name, remedy=remedy)
        if not a.numel():
            return
        self.difference += float((a - b).square().sum())
        self.norm += float(b.square().sum())
        self.max_abs = max(self.max_abs, float((a - b).abs().max()))
        rows_a, rows_b = (t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
        lengths = rows_a.norm(dim=-1) * rows_b.norm(dim=-1)
        cosine = (rows_a * rows_b).sum(-1) / lengths.clamp(min=1e-300)
        cosine = torch.where(lengths > 0, cosine, (rows_a == rows_b).all(-1).to(a))
        self.distance += float((1 - cosine).sum())
        self.vectors += cosine.numel()

    def result(self) -> OutputError:
        relative = (self.difference / self.norm) ** 0.5 if self.norm else self.difference**0.5
        return OutputError(relative, self.max_abs, self.distance / self.vectors if self.vectors else 0.0)


def _measured(meters: Mapping[str, _Meter]) -> Mapping[str, OutputError]:
    return MappingProxyType({name: meter.result() for name, meter in meters.items()})


@torch.no_grad()
def verify(folded: nn.Module, reference: nn.Module, inputs: Any, *, plain: nn.Module | None = None) -> VerifyReport:
    """Run two models on the same inputs and measure how far ``folded`` is from ``reference``, per module and end to end.

    >>> folded = oftsurgery.fold(model, "ADAPTER")
    >>> report = oftsurgery.verify(folded, live, inputs)
    >>> report.modules["model.layers.0.self_attn.q_proj"].relative < 0.2     # this module alone, on the same inputs
    True
    >>> report.outputs["logits"].cosine_distance < 0.05                      # end to end
    True

    Args:
        folded: a folded model, whose record says which modules to compare, or any model.
        reference: the model whose outputs ``folded`` should give: the live ``PeftModel``, a wrapped model, the base model …
        inputs: a batch (a tensor, a tuple of arguments or a mapping of keyword arguments), or an iterable of batches.
        plain: a model whose outputs are set beside those of ``folded``: with the same fold by ``rounding="nearest"``, the
            report says what the rounding gained end to end.

    Returns:
        a :class:`~oftsurgery.VerifyReport`.

    Both models run in eval mode, without gradients, and get their training flags back. A CPU forward of bitsandbytes'
    4-bit layers repacks them in place, here as in any other forward.

    Raises:
        MatchError: a folded module is not in the reference.
        ShapeError, NonFiniteError: outputs cannot be compared.
        StateError: there are no inputs.
    """
    mine, theirs = modules_of(folded), modules_of(peft_live.base_of(inner_model(reference)))
    record = record_of(folded)
    linears = (p for p, m in mine.items() if p and p in theirs and not m._modules and isinstance(m, nn.Linear))
    paths = list(record.modules if record is not None else linears)
    missing = [p for p in paths if p not in theirs]
    if missing:
        message, remedy = "the reference model lacks a folded module", "give a model of the same architecture"
        raise MatchError(message, module=missing[0], remedy=remedy)
    modules = {path: _Meter() for path in paths}
    outputs: dict[str, _Meter] = {}
    beside: dict[str, _Meter] = {}
    batches = 0
    with eval_mode(folded), eval_mode(reference), eval_mode(folded if plain is None else plain):
        for args, kwargs in batches_of(inputs):
            with _compared(modules, mine, theirs):
                expected = dict(_tensors(reference(*args, **kwargs)))
            got = dict(_tensors(folded(*args, **kwargs)))
            if got.keys() != expected.keys() or not got:
                names = [", ".join(map(printable, side)) or "none" for side in (got, expected)]
                remedy = "give models of the same class, with the same output settings (use_cache, return_dict)"
                message = f"the folded model gives other outputs ({names[0]}) than the reference ({names[1]})"
                raise MatchError(message, remedy=remedy)
            for name, value in got.items():
                outputs.setdefault(name, _Meter()).add(name, value, expected[name])
            for name, value in _tensors(plain(*args, **kwargs)) if plain is not None else ():
                beside.setdefault(name, _Meter()).add(name, value, expected[name])
            batches += 1
    if not batches:
        raise StateError("the inputs hold no batch to compare on", remedy="give at least one batch")
    called = {path: meter for path, meter in modules.items() if meter.calls}
    uncalled = tuple(path for path in modules if path not in called)
    return VerifyReport(_measured(called), _measured(outputs), batches, _measured(beside), uncalled)


@contextmanager
def _compared(
    meters: Mapping[str, _Meter], mine: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]
) -> Iterator[None]:
    """While the reference runs, give each of its modules' inputs to our module too."""

    def hook(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # a call of itself would hook again
        got = output if mine[path] is module else _called(mine[path], args, kwargs)
        for (name, a), (_, b) in zip(_tensors(got), _tensors(output), strict=True):
            meters[path].add(f"{path} {name}".strip(), a, b)

    handles = [theirs[path].register_forward_hook(partial(hook, path), with_kwargs=True) for path in meters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The module's output on another module's inputs; a plain layer gets floats in its own dtype, which a fold may change."""
    weight = module._parameters.get("weight")
    dtype = weight.dtype if type(weight) is nn.Parameter and weight.is_floating_point() else None

    def given(value: Any) -> Any:
        return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

    return module(*map(given, args), **{name: given(value) for name, value in kwargs.items()})


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; each module gets its training flag back afterwards."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def batches_of(inputs: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """``(args, kwargs)`` of a model's forward for each batch of ``inputs``, which :func:`verify` describes."""
    if isinstance(inputs, (Tensor, tuple, Mapping)) or not isinstance(inputs, Iterable):
        inputs = [inputs]
    for batch in inputs:
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        else:
            yield batch if isinstance(batch, tuple) else (batch,), {}


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of an output, with their names."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "output", value
    elif isinstance(value, (Mapping, tuple, list)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}".lstrip("."))
