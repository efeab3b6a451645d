"""The blocks of a model, one after the other: the layers of a decoder or an encoder.

Each block takes what the block before it returned, and otherwise the same arguments. So a calibration that runs one block at
a time over all batches needs the hidden values between two blocks and the inputs of one block's layers, and never the
inputs of all layers; and a block can run on the hidden values that the folded blocks before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from oftsurgery.checks.verify_models import eval_mode
from oftsurgery.errors import CalibrationError, OFTSurgeryError, printable

from .batches import Batch, batches_on, first_of

T = TypeVar("T")

#: values besides tensors that a block may be called with: a block could write to other objects (a cache of keys and values)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Reached(BaseException):
    """A forward has reached a module, and need not go on. No model catches it as an error."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a block, whose first argument are the hidden values.

    Attributes:
        hidden: ``(sequences, length, features)``.
        args, kwargs: the other arguments.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def same_arguments(self, other: Call) -> bool:
        """Whether another block is called with the same other arguments."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


def block_paths(modules: Mapping[str, nn.Module], wanted: Collection[str]) -> list[str]:
    """The paths of the items of the module list that holds most of the layers at ``wanted``; none without such a list."""
    lists = {path: len(module) for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    held = {path: sum(w.startswith(f"{path}.") for w in wanted) for path in lists}
    best = max(held, key=lambda path: (held[path], -len(path)), default=None)
    return [] if best is None or not held[best] else [f"{best}.{i}" for i in range(lists[best])]


def are_chained(blocks: Sequence[nn.Module], run: Callable[[], object]) -> bool:
    """Whether the model that ``run`` runs calls each block once, in order, with what the block before it returned and with
    the same other arguments.
    """
    calls: list[tuple[int, Call | None]] = []
    results: list[Any] = []
    with ExitStack() as hooks:
        for i, block in enumerate(blocks):

            def before(_module: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
                calls.append((i, _call(args, kwargs)))

            def after(_module: nn.Module, _args: Any, result: Any) -> None:
                results.append(hidden_of(result))

            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(after))
        run()
    found = [call for _, call in calls if call is not None]
    return (
        [i for i, _ in calls] == list(range(len(blocks)))
        and len(found) == len(blocks) == len(results)
        and all(call.same_arguments(found[0]) for call in found[1:])
        and all(_equal(call.hidden, result) for call, result in zip(found[1:], results, strict=False))
    )


def first_call(block: nn.Module, run: Callable[[], object]) -> Call | None:
    """The call of the first block in the forward that ``run`` begins, which ends there; None where the forward makes no such call."""
    calls: list[Call | None] = []

    def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_call(args, kwargs))
        raise _Reached

    with block.register_forward_pre_hook(stop, with_kwargs=True):
        try:
            run()
        except _Reached:
            return calls[0]
    return None


def before_calls(modules: Sequence[nn.Module], run: Callable[[], T], *, heard: Collection[nn.Module] = ()) -> T | None:
    """The result of ``run``, which ends, without a result, where it calls one of the modules, or the last of those that are to be
    ``heard``.
    """
    left = set(heard)

    def stop(module: nn.Module, *_: object) -> None:
        left.discard(module)
        if module not in heard or not left:
            raise _Reached

    with ExitStack() as hooks:
        for module in (*modules, *heard):
            hooks.enter_context(module.register_forward_pre_hook(stop))
        try:
            return run()
        except _Reached:
            return None


def hidden_of(result: Any) -> Any:
    """The hidden values that a block returned."""
    return result[0] if isinstance(result, tuple) and result else result


# compiled models run eagerly, so that hooks are called and nothing is compiled again
_stance: Any = getattr(torch.compiler, "set_stance", nullcontext)  # torch 2.6


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run the body with a model as it is after training, without gradients and without a cache of keys and values."""
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    with torch.inference_mode(False), torch.no_grad(), eval_mode(model), _stance("force_eager"):
        try:
            if cache:
                config.use_cache = False  # type: ignore[union-attr]
            yield
        finally:
            if cache:
                config.use_cache = cache  # type: ignore[union-attr]


def run_batch(model: nn.Module, number: int, batch: Batch) -> None:
    """Run a model's forward; a batch on the CPU is brought to the model's device.

    Raises:
        CalibrationError: the model does not take the batch with this ``number``.
    """
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    if where.type not in ("cpu", "meta") and first_of(batch).device.type == "cpu":
        (batch,) = batches_on([batch], where)
    args, kwargs = batch
    try:
        model(*args, **kwargs)
    except OFTSurgeryError:
        raise
    except Exception as error:  # a model raises errors of any kind at a batch that it does not take
        message = f"the model does not take calibration batch {number}: {type(error).__name__}: {printable(error)}"
        remedy = "give batches that the model's forward takes"
        raise CalibrationError(message, remedy=remedy) from error


@contextmanager
def weights_of(layers: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the body with layers that multiply their inputs by ``weights``, plain and ``(out, in)``, and add their own biases."""

    def compute(layer: Any, weight: Tensor) -> Callable[..., Tensor]:
        live = getattr(layer, "_loaded_bias", None)
        bias = layer.bias if live is None else live()

        def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

        return forward

    try:
        for path, weight in weights.items():
            layers[path].forward = compute(layers[path], weight)
        yield
    finally:
        for path in weights:
            layers[path].__dict__.pop("forward", None)


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """None for arguments that cannot be given again."""
    if not args or not isinstance(args[0], Tensor) or not _repeatable((args, kwargs)):
        return None
    return Call(args[0], args[1:], dict(kwargs))


def _repeatable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_repeatable, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_repeatable, value))
    return isinstance(value, (Tensor, *_PLAIN))


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
