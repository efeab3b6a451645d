"""A task names the inputs and outputs of an exported graph, their dynamic axes, and the inputs on which the graph is checked.

There are three kinds of task: for text models without a cache, for decoders with a cache, and for any module with example
inputs. A task gives the module to capture, its inputs, and the cases on which onnxruntime and torch are compared.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.errors import StateError, printable

#: function from ``{input name: tensor}`` to ``{output name: tensor}``, which onnxruntime computes
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

Inputs = dict[str, tuple[Tensor, dict[int, str | None]]]

BATCH, SEQUENCE, PAST, TOTAL, DECODER = "batch", "sequence", "past_sequence", "total_sequence", "decoder_sequence"

_LONGEST = 64


@dataclass(frozen=True)
class Case:
    """One comparison of the graph's outputs with torch's.

    Attributes:
        label: the shapes, for the report.
        pairs: ``{output: (graph's, torch's)}``, without the positions of padding.
    """

    label: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]


class Task:
    """The base class of the three kinds of task.

    Attributes:
        names: the inputs' names.
        by_name: whether the model takes the inputs by name.
    """

    names: Sequence[str]
    by_name = True

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to capture, which has ``model`` as its attribute ``model`` and takes the inputs in order."""
        _set_up(model, use_cache=False)
        return _Named(model, self.names, by_name=self.by_name)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """``{name: (example, {dynamic axis: name})}``."""
        raise NotImplementedError

    def outputs(self, reference: nn.Module) -> list[str]:
        """The outputs' names, in order."""
        raise NotImplementedError

    def cases(self, reference: nn.Module, run: Run, axes: Mapping[str, Sequence[str | int]]) -> Iterator[Case]:
        """Run the reference and the graph on several shapes.

        Args:
            reference: the model in torch.
            run: function that runs the graph in onnxruntime.
            axes: ``{input or output: its axes}`` of the graph: sizes, or names of dynamic axes.
        """
        raise NotImplementedError


def task_of(model: nn.Module, example_inputs: Any, *, with_past: bool) -> Task:
    """The task for the export of a model.

    Raises:
        StateError: the model needs example inputs, or has no cache to export.
    """
    if example_inputs is not None:
        if with_past:
            message = "a graph with a cache has its own inputs, and example inputs were given too"
            raise StateError(message, remedy="leave out with_past=True (--with-past) or example_inputs")
        return ExampleTask(model, example_inputs)
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters or _text_config(model) is None:
        message = f"the inputs of a {type(model).__name__} are not known"
        remedy = "give example inputs: example_inputs={'name': tensor, …}, or a tuple of tensors"
        raise StateError(message, remedy=remedy)
    return CacheTask(model) if with_past else TextTask(model)


def _text_config(model: nn.Module) -> Any:
    """The config of the texts that a model takes; None for a model without such a config, or with several (MusicGen)."""
    try:
        return getattr(model, "config", None).get_text_config()  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        return None


def _set_up(model: nn.Module, *, use_cache: bool) -> None:
    """Set the options in a copy's configs, with the configs of its submodules."""
    settings: dict[str, Any] = {"use_cache": use_cache, "return_dict": True}
    if getattr(getattr(model, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa"):
        settings["_attn_implementation"] = "sdpa"  # in place of flash attention, for example
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        for name, value in settings.items():
            if hasattr(config, name):
                setattr(config, name, value)


# --- text -------------------------------------------------------------------------------------------------------------


class _Named(nn.Module):
    """A model as a function of named tensors in a fixed order; the module keeps the names of its outputs."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], *, by_name: bool) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.by_name = by_name
        self.names: list[str] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, tensors, strict=True))
        out = self.model(**given) if self.by_name else self.model(*tensors)
        # a graph has one name for each value, so an output that is an input, a weight or another output is copied
        taken = {id(t) for t in (*tensors, *self.model.parameters(), *self.model.buffers())}
        found: dict[str, Tensor] = {}
        for name, tensor in _tensors(out):
            found[f"{name}_output" if name in self.inputs else name] = tensor.clone() if id(tensor) in taken else tensor
            taken.add(id(tensor))
        self.names = list(found)
        return tuple(found.values())


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's output by name, without caches and other values."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "past_key_values":
                yield from _tensors(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}.{i}" if name else f"output_{i}")


class TextTask(Task):
    """The task of a text model: the inputs are ``input_ids`` and ``attention_mask``, ``token_type_ids`` for a model with
    several types (BERT's pairs of sentences) and ``decoder_input_ids`` for an encoder-decoder; all outputs are exported.
    """

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(model.forward).parameters
        config = _text_config(model)
        self.types = int(getattr(config, "type_vocab_size", None) or 0)
        self.names = [n for n in ("input_ids", "attention_mask") if n in parameters]
        if "token_type_ids" in parameters and self.types > 1:
            self.names.append("token_type_ids")
        if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            self.names.append("decoder_input_ids")
        self.vocabulary = int(config.vocab_size)
        self.pad = getattr(config, "pad_token_id", None)
        positions = int(getattr(config, "max_position_embeddings", None) or 0)
        positions = positions if positions > 0 else 2 * _LONGEST  # XLNet's config has -1
        # RoBERTa's positions start after the pad id
        first = 1 + max(self.pad or 0, 0) if isinstance(self.pad, int) else 0
        self.longest = max(1, min(_LONGEST, positions - first))

    def inputs(self, dtype: torch.dtype) -> Inputs:  # noqa: ARG002 - all inputs are integers
        given = self._feeds(2, min(5, self.longest), torch.Generator().manual_seed(0))
        return {n: (t, {0: BATCH, 1: DECODER if n == "decoder_input_ids" else SEQUENCE}) for n, t in given.items()}

    def outputs(self, reference: nn.Module) -> list[str]:
        wrapped: Any = self.wrap(reference)
        wrapped(*(t for t, _ in self.inputs(torch.float32).values()))
        return list(wrapped.names)

    def _feeds(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs of one batch size and one length."""
        ids, mask = self.tokens(batch, length, generator)
        given = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.names:
            given["token_type_ids"] = torch.randint(0, self.types, (batch, length), generator=generator)
        if "decoder_input_ids" in self.names:
            given["decoder_input_ids"], _ = self.tokens(batch, max(1, length // 2 + 1), generator, padded=False)
        return {n: given[n] for n in self.names}

    def tokens(
        self, batch: int, length: int, generator: torch.Generator, *, padded: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Random tokens and their mask, both (batch, length) int64; each row of a batch has more left padding than the
        row before.
        """
        ids = torch.randint(0, self.vocabulary, (batch, length), generator=generator)
        if self.pad is not None and self.vocabulary > 1:
            ids[ids == self.pad] = (self.pad + 1) % self.vocabulary
        mask = torch.ones_like(ids)
        if padded and "attention_mask" in self.names:
            for row in range(1, batch):
                width = length * row // (batch + 1)
                mask[row, :width] = 0
                ids[row, :width] = self.pad if self.pad is not None and 0 <= self.pad < self.vocabulary else 0
        return ids, mask

    def cases(self, reference: nn.Module, run: Run, axes: Mapping[str, Sequence[str | int]]) -> Iterator[Case]:
        generator = torch.Generator().manual_seed(1)
        wrapped: Any = self.wrap(reference)
        for batch, length in ((1, 1), (1, _LONGEST), (3, 2), (3, 17), (3, _LONGEST)):
            length = min(length, self.longest)
            given = self._feeds(batch, length, generator)
            got = run(given)
            values = wrapped(*given.values())
            expected = dict(zip(wrapped.names, values, strict=True))
            real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
            pairs = {}
            for name, value in expected.items():
                # the outputs at padding have no meaning, so only the other positions are compared
                by_position = list(axes[name][:2]) == [BATCH, SEQUENCE]
                pairs[name] = (got[name][real], value[real]) if by_position else (got[name], value)
            yield Case(f"batch {batch}, length {length}", pairs)


# --- decoders with a cache --------------------------------------------------------------------------------------------


class CacheTask(TextTask):
    """The task of a decoder with its key-value cache: one graph serves the prompt (no past) and each token after it.

    The inputs are ``input_ids (batch, sequence)``, ``attention_mask (batch, past + sequence)``, ``position_ids (batch,
    sequence)`` where the model takes them, and for each layer ``past_key_values.{i}.key`` and ``.value (batch, heads,
    past, size)``. The outputs are ``logits`` and ``present.{i}.key``, ``.value``.

    Attributes:
        layers: the heads and sizes of each layer's keys and values: ``((heads, size), (heads, size))``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if "decoder_input_ids" in self.names or getattr(model.config, "is_encoder_decoder", False):
            message = "the model is an encoder-decoder, and no single graph can serve its prompt and its generation"
            raise StateError(message, remedy="export the model without with_past=True (--with-past)")
        parameters = inspect.signature(model.forward).parameters
        if "past_key_values" not in parameters:
            message = f"a {type(model).__name__} has no cache of keys and values"
            remedy = "export the model without with_past=True (--with-past); only decoders that generate have a cache"
            raise StateError(message, remedy=remedy)
        self.names = [n for n in ("input_ids", "attention_mask", "position_ids") if n in parameters]
        self.layers: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def wrap(self, model: nn.Module) -> nn.Module:
        _set_up(model, use_cache=True)
        return _WithCache(model, self.names)

    def outputs(self, reference: nn.Module) -> list[str]:
        """The outputs' names; raises StateError if the cache holds more than keys and values of attention layers."""
        from transformers import DynamicCache

        model: Any = self.wrap(reference).model
        given = self._step(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
        try:
            out = model(**given, past_key_values=DynamicCache(), use_cache=True)
        except Exception:  # the model has another cache, or does not run at all: the next line tells which
            model(**given, use_cache=False)
            out = {}
        layers: Any = getattr(out.get("past_key_values"), "layers", None)
        try:
            self.layers = [(_heads(layer.keys), _heads(layer.values)) for layer in layers]
        except (AttributeError, TypeError, ValueError):
            self.layers = []
        if not self.layers or "logits" not in out:
            message = f"the cache of a {type(model).__name__} holds more than keys and values of attention layers"
            raise StateError(message, remedy="export the model without with_past=True (--with-past)")
        return ["logits", *self.presents]

    @property
    def pasts(self) -> list[str]:
        return [f"past_key_values.{i}.{part}" for i in range(len(self.layers)) for part in ("key", "value")]

    @property
    def presents(self) -> list[str]:
        return [f"present.{i}.{part}" for i in range(len(self.layers)) for part in ("key", "value")]

    def inputs(self, dtype: torch.dtype) -> Inputs:
        batch, past, length = 2, 3, 2
        ids, mask = self.tokens(batch, past + length, torch.Generator().manual_seed(0))
        given = self._step(ids[:, past:], mask)
        found: Inputs = {n: (t, {0: BATCH, 1: TOTAL if n == "attention_mask" else SEQUENCE}) for n, t in given.items()}
        return found | {n: (t, {0: BATCH, 2: PAST}) for n, t in self._past(batch, past, dtype).items()}

    def _step(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The inputs for the last tokens of a mask, without the cache; the positions follow from the mask, as in
        transformers' ``generate``.
        """
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {n: given[n] for n in self.names}

    def _past(self, batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        shapes = [part for layer in self.layers for part in layer]
        return {
            name: torch.zeros(batch, heads, length, size, dtype=dtype)
            for name, (heads, size) in zip(self.pasts, shapes, strict=True)
        }

    def cases(self, reference: nn.Module, run: Run, axes: Mapping[str, Sequence[str | int]]) -> Iterator[Case]:  # noqa: ARG002
        """Run the prompt, then two tokens at once, then single tokens; torch computes the whole text without a cache."""
        generator = torch.Generator().manual_seed(1)
        _set_up(reference, use_cache=False)
        for batch, prompt in ((1, 1), (3, 2), (3, 17), (3, _LONGEST)):
            chunks = [max(1, min(prompt, self.longest - 4)), 2, 1, 1]
            total = sum(chunks)
            ids, mask = self.tokens(batch, total, generator)
            expected = reference(**self._step(ids, mask), use_cache=False).logits
            past = self._past(batch, 0, torch.float32)
            got, start = [], 0
            for width in chunks:
                stop = start + width
                found = run({**self._step(ids[:, start:stop], mask[:, :stop]), **past})
                got.append(found["logits"])
                past = {p: found[q] for p, q in zip(self.pasts, self.presents, strict=True)}
                start = stop
            real = mask.bool()
            label = f"batch {batch}, prompt {chunks[0]}, then 2, 1, 1"
            yield Case(label, {"logits": (torch.cat(got, dim=1)[real], expected[real])})


def _heads(tensor: Tensor) -> tuple[int, int]:
    """Heads and size of a tensor ``(batch, heads, length, size)``."""
    _, heads, _, size = tensor.shape
    return heads, size


class _WithCache(nn.Module):
    """A decoder as a function of named tensors and of its cache's tensors, in a fixed order."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        given = dict(zip(self.inputs, tensors, strict=False))
        past = tensors[len(self.inputs) :]
        # without a config the cache stays whole: the mask applies a sliding window, and lengths are those of the inputs
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(**given, past_key_values=cache, use_cache=True)
        present = out.past_key_values.layers
        return (out.logits, *(part for layer in present for part in (layer.keys, layer.values)))


# --- any module -------------------------------------------------------------------------------------------------------


class ExampleTask(Task):
    """The task of any module with example inputs: a tensor, a tuple of tensors, or a mapping of names to tensors."""

    def __init__(self, model: nn.Module, examples: Any) -> None:
        if isinstance(examples, Tensor):
            examples = (examples,)
        self.by_name = isinstance(examples, Mapping)
        found = examples if self.by_name else dict(zip(_names(model), examples, strict=False))
        if (
            not isinstance(examples, (Mapping, tuple, list))
            or not found
            or not all(isinstance(t, Tensor) for t in found.values())
        ):
            raise StateError(
                f"example inputs must be a tensor, a tuple of tensors or a mapping of names to tensors, not a {printable(type(examples).__name__)} of "
                f"{', '.join(sorted({type(v).__name__ for v in found.values()})) or 'nothing'}",
                remedy="wrap the model in a module whose forward takes tensors alone",
            )
        for name, tensor in found.items():
            if not tensor.numel():
                message = f"the example input {printable(name)!r} is empty: its shape is {tuple(tensor.shape)}"
                raise StateError(message, remedy="give an example input with at least one element")
        self.examples: dict[str, Tensor] = {
            str(n): (t.float() if t.is_floating_point() else t).detach().cpu() for n, t in found.items()
        }
        self.names = [*self.examples]
        self.captured = self.examples

    def inputs(self, dtype: torch.dtype) -> Inputs:
        return {
            n: (t.to(dtype) if t.is_floating_point() else t, dict.fromkeys(range(t.ndim)))
            for n, t in self.captured.items()
        }

    def outputs(self, reference: nn.Module) -> list[str]:
        wrapped: Any = self.wrap(reference)
        values = wrapped(*self.examples.values())
        names = list(wrapped.names)
        self.captured = self._in_two_rows(wrapped, values)
        return names

    def _in_two_rows(self, wrapped: nn.Module, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """The examples with a batch of 2 in place of 1, if an output follows the batch, since torch.export fixes an axis of
        size 1.
        """
        if any(not t.ndim or t.shape[0] != 1 for t in self.examples.values()):
            return self.examples
        doubled = {n: _resized(t, (2, *t.shape[1:])) for n, t in self.examples.items()}
        try:
            found = wrapped(*doubled.values())
        except (RuntimeError, ValueError, IndexError):
            return self.examples
        follows = [new.shape == (2, *old.shape[1:]) for new, old in zip(found, values, strict=True) if old.ndim]
        same_rank = all(new.ndim == old.ndim for new, old in zip(found, values, strict=True))
        return doubled if same_rank and any(follows) else self.examples

    def cases(self, reference: nn.Module, run: Run, axes: Mapping[str, Sequence[str | int]]) -> Iterator[Case]:
        """Run the examples, and resized examples whose dynamic axes have size one or three more."""
        wrapped: Any = self.wrap(reference)
        sizes: dict[str, Callable[[int], int]] = {"as given": lambda size: size}
        dynamic = {axis for name in self.examples for axis in axes[name] if isinstance(axis, str)}
        if dynamic and all(re.fullmatch(r"\w+", axis) for axis in dynamic):
            sizes |= {"one": lambda _: 1, "three more": lambda size: size + 3}
        for label, resize in sizes.items():
            feeds = {}
            for name, tensor in self.examples.items():
                named = zip(axes[name], tensor.shape, strict=True)
                feeds[name] = _resized(tensor, [resize(n) if isinstance(axis, str) else n for axis, n in named])
            try:
                values = wrapped(*feeds.values())
            except (RuntimeError, ValueError, IndexError):
                if label == "as given":
                    raise
                continue  # the model itself does not take this size
            got = run(feeds)
            shapes = ", ".join("×".join(map(str, t.shape)) or "scalar" for t in feeds.values())
            yield Case(f"{label}: {shapes}", {n: (got[n], v) for n, v in zip(wrapped.names, values, strict=True)})


def _names(model: nn.Module) -> Iterator[str]:
    """The names of a forward's positional parameters, and then numbered names."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    yield from (p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds)
    yield from (f"input_{i}" for i in range(1000))


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor`` repeated and cut to another shape."""
    for axis, size in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor
