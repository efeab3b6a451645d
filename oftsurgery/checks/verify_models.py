""":func:`verify` compares two live models that should compute the same, module by module and end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.errors import MatchError, StateError, printable
from oftsurgery.stores import peft_live
from oftsurgery.stores.live_model import record_of
from oftsurgery.stores.modules import inner_model, modules_of

from .meters import Meter, measured
from .verify_report import VerifyReport


def verify(
    folded: nn.Module,
    reference: nn.Module,
    inputs: Any,
    *,
    plain: nn.Module | None = None,
    base: nn.Module | None = None,
) -> VerifyReport:
    """Run two models on the same inputs and measure how far ``folded`` is from ``reference``, per module and end to end.

    >>> folded = oftsurgery.fold(model, "ADAPTER")
    >>> report = oftsurgery.verify(folded, live, inputs)
    >>> report.modules["model.layers.0.self_attn.q_proj"].relative < 0.2     # this module alone, on the same inputs
    True
    >>> report.outputs["logits"].cosine_distance < 0.05                      # end to end
    True
    >>> report.outputs["logits"].kept > 0.9                                  # of the adapter's effect on the logits
    True

    Args:
        folded: a folded model, whose record says which modules to compare, or any model.
        reference: the model whose outputs ``folded`` should give: the live ``PeftModel``, a wrapped model, the base model …
        inputs: a batch (a tensor, a tuple of arguments or a mapping of keyword arguments), or an iterable of batches.
        plain: a model whose outputs are set beside those of ``folded``: with the same fold by ``rounding="nearest"``, the
            report says what the rounding gained end to end.
        base: the model without the adapter, by which the report says how much of the adapter's effect is kept. None: the
            reference with its rotations switched off, where it has live adapters that are not merged; heads and biases that
            the adapter trained then stay.

    Returns:
        a :class:`~oftsurgery.VerifyReport`.

    All models run in eval mode, without gradients, and get their training flags back. A CPU forward of bitsandbytes'
    4-bit layers repacks them in place, here as in any other forward.

    Raises:
        MatchError: a folded module is not in the reference, or the base gives other outputs.
        ShapeError, NonFiniteError: outputs cannot be compared.
        StateError: there are no inputs.
    """
    return compare(folded, reference, inputs, plain=plain, base=base)


@torch.no_grad()
def compare(
    folded: nn.Module,
    reference: nn.Module,
    inputs: Any,
    *,
    plain: nn.Module | None = None,
    base: nn.Module | None = None,
    paths: Sequence[str] | None = None,
) -> VerifyReport:
    """:func:`verify` with the ``paths`` of the modules to compare; None: those of the folded model's record, or else all linear
    layers.
    """
    mine, theirs = modules_of(folded), modules_of(peft_live.base_of(inner_model(reference)))
    paths = _compared_paths(folded, mine, theirs, paths)
    modules = {path: Meter() for path in paths}
    without = WithoutAdapter(reference, base)
    outputs: dict[str, Meter] = {}
    others: dict[str, dict[str, Meter]] = {"plain": {}, "base": {}}
    batches = 0
    models = [folded, reference, *(m for m in (plain, base) if m is not None)]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
        for args, kwargs in batches_of(inputs):
            real = kwargs.get("attention_mask")
            with _compared(modules, mine, theirs, without):
                expected = _outputs(reference(*args, **kwargs), real)
            got = _same_outputs(_outputs(folded(*args, **kwargs), real), expected, "folded model")
            before = _outputs(without(*args, **kwargs), real) if without.known else {}
            if before:
                _same_outputs(before, expected, "base")
            beside = _outputs(plain(*args, **kwargs), real) if plain is not None else {}
            for name, value in got.items():
                tokens = _is_scores(name, value, folded)
                outputs.setdefault(name, Meter(tokens=tokens)).add(name, value, expected[name], before.get(name))
                for which, those in (("plain", beside), ("base", before)):
                    if name in those:
                        meter = others[which].setdefault(name, Meter(tokens=tokens))
                        meter.add(name, those[name], expected[name], before.get(name))
            batches += 1
    if not batches:
        raise StateError("the inputs hold no batch to compare on", remedy="give at least one batch")
    called = {path: meter for path, meter in modules.items() if meter.calls}
    uncalled = tuple(path for path in modules if path not in called)
    found = {which: measured(meters) for which, meters in others.items()}
    rounds_inputs = any(type(m).__name__ == "Linear8bitLt" for model in models for m in model.modules())
    return VerifyReport(
        measured(called), measured(outputs), batches, found["plain"], uncalled, found["base"], rounds_inputs
    )


def _compared_paths(
    folded: nn.Module,
    mine: Mapping[str, nn.Module],
    theirs: Mapping[str, nn.Module],
    wanted: Sequence[str] | None,
) -> list[str]:
    record = record_of(folded)
    linears = (p for p, m in mine.items() if p and p in theirs and not m._modules and isinstance(m, nn.Linear))
    paths = list(wanted if wanted is not None else record.modules if record is not None else linears)
    missing = [p for p in paths if p not in theirs]
    if missing:
        message, remedy = "the reference model lacks a folded module", "give a model of the same architecture"
        raise MatchError(message, module=missing[0], remedy=remedy)
    return paths


def _same_outputs(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if got.keys() == expected.keys() and got:
        return got
    names = [", ".join(map(printable, side)) or "none" for side in (got, expected)]
    message = f"the {what} gives other outputs ({names[0]}) than the reference ({names[1]})"
    remedy = "give models of the same class, with the same output settings (use_cache, return_dict)"
    raise MatchError(message, remedy=remedy)


def _is_scores(name: str, value: Tensor, model: nn.Module) -> bool:
    """Whether an output holds scores of the tokens of a language model."""
    config: Any = getattr(inner_model(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return name == "logits" and value.ndim == 3 and value.shape[-1] == getattr(text, "vocab_size", None)


@contextmanager
def _compared(
    meters: Mapping[str, Meter],
    mine: Mapping[str, nn.Module],
    theirs: Mapping[str, nn.Module],
    without: WithoutAdapter,
) -> Iterator[None]:
    """While the reference runs, give each of its modules' inputs to our module too, and to the module without the adapter."""

    def hook(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # a call of itself would hook again
        got = output if mine[path] is module else _called(mine[path], args, kwargs)
        before = without.module(path, module)
        start = dict(_tensors(before(*args, **kwargs))) if before is not None else {}
        for (name, a), (_, b) in zip(_tensors(got), _tensors(output), strict=True):
            meters[path].add(f"{path} {name}".strip(), a, b, start.get(name))

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


class WithoutAdapter:
    """The model without the adapter: ``base``, or ``live`` with its adapters switched off.

    Attributes:
        known: whether there is such a model. A live model whose adapters are merged or switched off is none.
    """

    def __init__(self, live: nn.Module, base: nn.Module | None) -> None:
        self._base, self._live = base, live
        self._modules = {} if base is None else modules_of(base)
        self._switches = _switches(live) if base is None else []
        self.known = base is not None or bool(self._switches)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._base is not None:
            return self._base(*args, **kwargs)
        with _switched_off(self._switches):
            return self._live(*args, **kwargs)

    def module(self, path: str, live: nn.Module) -> Callable[..., Any] | None:
        """What the module ``live`` at ``path`` computes without the adapter; None where that is not known."""
        if self._base is not None:
            return self._modules.get(path)
        switches = [(m, name) for m, name in self._switches if m is live]

        def run(*args: Any, **kwargs: Any) -> Any:
            with _switched_off(switches):
                return live.forward(*args, **kwargs)  # a call of the module itself would run its hooks again

        return run if switches else None


def _switches(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The attributes that switch off the live adapters of peft and of oftsurgery, which are all on; empty where an adapter is
    merged or off. peft's own methods would also change which parameters are trained, and would unmerge.
    """
    found: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if "original_module" in module._modules:  # peft's holder of a trained head, which no rounding loses
            continue
        if hasattr(type(module), "_disable_adapters") or "_disable_adapters" in module.__dict__:  # peft's
            found.append((module, "_disable_adapters"))
        elif "disable_adapters" in module.__dict__:  # oftsurgery's
            found.append((module, "disable_adapters"))
    off = any(getattr(module, name) or getattr(module, "merged", False) for module, name in found)
    return [] if off else found


@contextmanager
def _switched_off(switches: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name in switches:
            setattr(module, name, False)


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


def _outputs(value: Any, real: object) -> dict[str, Tensor]:
    """The outputs by name; of an output with a vector for each position, the positions that ``real`` does not mark as padding."""
    found = dict(_tensors(value))
    if not isinstance(real, Tensor) or real.ndim != 2:
        return found
    return {
        n: t[real.to(t.device).bool()][None] if t.ndim == 3 and t.shape[:2] == real.shape else t
        for n, t in found.items()
    }


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of an output, with their names."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "output", value
    elif isinstance(value, (Mapping, tuple, list)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}".lstrip("."))
