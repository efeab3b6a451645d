"""What the layers of a model are given while it computes with its adapters live: the inputs that a calibration is of.

A layer's exact output is that of the live model, so its inputs are taken there too, for all layers, whatever has been
rounded by then; the order in which layers are folded does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.checks.verify_models import batches_of, eval_mode
from oftsurgery.errors import CalibrationError, OFTSurgeryError, needs, printable
from oftsurgery.folding.disk import CheckpointPlan
from oftsurgery.folding.memory import inner_model, modules_of
from oftsurgery.folding.plan import in_names_of
from oftsurgery.formats.all_formats import FORMATS
from oftsurgery.hashing import hash_tensors
from oftsurgery.live import wrap as live
from oftsurgery.progress import Progress
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.skeleton import quiet, without_code
from oftsurgery.weights.calibrate import InputsOf, LayerInputs

__all__ = ["Batch", "Calibration", "fingerprint", "of_checkpoint", "read_batches", "tokenise"]

Batch = tuple[tuple[Any, ...], dict[str, Any]]

#: one sequence in this many is held out, and so many of their tokens are kept for each layer
HOLD_OUT, HELD_OUT_TOKENS = 8, 2048

#: tokens of a text from a file, and texts a batch
TEXT_TOKENS, TEXTS = 512, 16

#: of the Hessians that are gathered in one pass over the batches; more layers take more passes
PASS_BYTES = 2 << 30

_TRANSFORMERS = ("transformers", "pip install 'oftsurgery[peft]': a calibration must run the model")


def read_batches(calibration: Any) -> list[Batch]:
    """The batches of a calibration as ``(args, kwargs)`` of the model's forward: of a tensor, a tuple of arguments or a
    mapping of keyword arguments, or of an iterable of them, which is read once.

    Raises:
        CalibrationError: there are none, or they are text.
    """
    batches = list(batches_of([calibration] if _is_text(calibration) else calibration))
    if not batches:
        raise CalibrationError(
            "the calibration holds no batches", remedy="give at least one, better some hundred texts"
        )
    for i, (args, kwargs) in enumerate(batches):
        values = (*args, *kwargs.values())
        if any(_is_text(v) or (isinstance(v, (list, tuple)) and any(map(_is_text, v))) for v in values):
            raise CalibrationError(
                "the calibration is text, and a model in memory comes without its tokenizer",
                remedy="tokenise it: calibration=[tokenizer(texts[i : i + 16], padding=True, return_tensors='pt') for i in "
                "range(0, len(texts), 16)]",
            )
        if not any(isinstance(v, Tensor) for v in values):
            remedy = "give what the model takes: a tensor, a tuple of arguments, or a mapping of keyword arguments"
            raise CalibrationError(f"calibration batch {i} holds no tensor", remedy=remedy)
    return batches


def _is_text(value: object) -> bool:
    return isinstance(value, (str, bytes))


def tokenise(texts: Sequence[str], folder: Path) -> list[Batch]:
    """Texts as a checkpoint's own tokenizer has them, each cut after :data:`TEXT_TOKENS`.

    Raises:
        CalibrationError: the checkpoint has no tokenizer that transformers reads without the checkpoint's own code.
        MissingDependencyError: transformers is not installed.
    """
    with needs(*_TRANSFORMERS):
        import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a tokenizer is data of any kind, and its class raises what it likes
        message = f"the checkpoint's tokenizer cannot be loaded ({type(error).__name__}: {printable(error)})"
        remedy = "put its files beside the weights, or load the model and fold it in memory, with tokenised batches"
        raise CalibrationError(message, path=folder, remedy=remedy) from error
    length = min(int(tokenizer.model_max_length), TEXT_TOKENS)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    size = TEXTS if tokenizer.pad_token is not None else 1
    read = partial(tokenizer, padding=size > 1, truncation=True, max_length=length, return_tensors="pt")
    encoded = (read(list(texts[i : i + size])) for i in range(0, len(texts), size))
    batches: list[Batch] = [((), dict(batch)) for batch in encoded if batch["input_ids"].numel()]
    special = torch.tensor(tokenizer.all_special_ids)
    if all(bool(torch.isin(kwargs["input_ids"], special).all()) for _, kwargs in batches):
        # transformers makes up a tokenizer without words where the files have none
        message = "the checkpoint's tokenizer makes nothing of the texts but special tokens"
        raise CalibrationError(message, path=folder, remedy="put the tokenizer's files beside the weights")
    return batches


def of_checkpoint(
    plan: CheckpointPlan, batches: Sequence[Batch], *, device: str, progress: Progress | None = None
) -> InputsOf:
    """The inputs of the layers of a checkpoint that is to be folded, by their modules' paths as the adapter names them.

    The model is loaded through transformers when the first layer is asked for, as the trainer loaded it, with the
    adapters live. Nothing but transformers' own classes is built.

    Raises:
        CalibrationError: transformers does not know the class, or cannot load it.
        MissingDependencyError: transformers is not installed.
    """
    wanted = [p.rotate.path for p in plan.parts if p.rotate is not None and p.rotate.takes_inputs(p.into)]

    @cache
    def calibration() -> Calibration:
        adapters = [in_names_of(plan.store, adapter) for adapter in plan.changes.adapters]
        return Calibration(_load(plan, device), adapters, wanted, _to(batches, device), progress=progress)

    return lambda path: calibration()(path)


def _load(plan: CheckpointPlan, device: str) -> nn.Module:
    with needs(*_TRANSFORMERS):
        import transformers
    cls: Any = getattr(transformers, plan.store.architecture.name or "", None)
    if not hasattr(cls, "from_pretrained"):
        message = "transformers does not know the model's class, and a calibration must run the model"
        remedy = "load the model yourself and fold it in memory; code from a checkpoint is never run"
        raise CalibrationError(message, path=plan.source.folder, remedy=remedy)
    config = transformers.AutoConfig.for_model(**without_code(plan.source.config))
    stored = plan.source.config.get("quantization_config")
    settings: dict[str, Any] = {"dtype": "auto"}
    if stored is not None:
        config.quantization_config = dict(stored)
    q = plan.store.quantization
    if q is not None:
        settings["dtype"] = q.dtype or "auto"
        if plan.fold_into == "quantized":
            settings["quantization_config"] = transformers.BitsAndBytesConfig(
                **FORMATS[q.codec].config_fields,
                bnb_4bit_use_double_quant=q.double_quant,
                bnb_4bit_compute_dtype=q.compute_dtype,
                llm_int8_skip_modules=None if q.skip is None else list(q.skip),
            )
    if device != "cpu":
        settings["device_map"] = {"": device}
    try:
        with quiet():
            model: nn.Module = cls.from_pretrained(
                plan.source.folder, config=config, local_files_only=True, use_safetensors=True, **settings
            )
    except Exception as error:  # whatever transformers raises at files that it cannot use
        message = f"transformers cannot load the checkpoint ({type(error).__name__}: {printable(error)})"
        remedy = "load the model yourself and fold it in memory"
        raise CalibrationError(message, path=plan.source.folder, remedy=remedy) from error
    return model


def _to(batches: Sequence[Batch], device: str) -> list[Batch]:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return [(tuple(map(moved, args)), {k: moved(v) for k, v in kwargs.items()}) for args, kwargs in batches]


class Calibration:
    """The inputs of a model's layers over a calibration's batches, gathered pass by pass as they are asked for.

    What is run is a copy of ``model`` over the same tensors, with ``adapters`` live in their order. The layers at ``paths``
    will be asked for, in about this order; their Hessians take ``pass_bytes`` of memory at once, unless one alone takes more.
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
        named = {f"calibration_{i}": adapter for i, adapter in enumerate(adapters)}
        self._live = inner_model(live.wrap_model(model, named))
        self._modules = modules_of(self._live)
        self._batches = batches
        self._progress = progress
        self._ready: dict[str, LayerInputs | None] = {}
        self._done = 0
        layers: dict[str, Any] = {path: self._modules[path] for path in paths}
        # paths whose inputs were not asked for yet, by the pass that gathers them
        self._passes = _passes({path: int(layer._shape[1]) for path, layer in layers.items()}, pass_bytes)
        sizes = [_length(batch) for batch in batches]
        self._held_out = torch.split(_split(sum(sizes)), sizes)
        for module in self._live.modules():
            # a CPU forward would round the statistics of 4-bit weights to bfloat16
            if hasattr(module, "support_avx512bf16_for_cpu") and not Layer("", module).repacked:
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    def __call__(self, path: str) -> LayerInputs | None:
        """The inputs of the layer at ``path``, which are forgotten with this; None where the batches never reached it.

        Raises:
            CalibrationError: the model does not take a batch, or computes NaN or infinity from it.
        """
        waiting = next(paths for paths in self._passes if path in paths)
        if path not in self._ready:
            ears = self._run(waiting, share=True)
            if ears.apart:
                ears = self._run(waiting, share=False)
            self._ready = {p: ears.heard(p) for p in waiting}
        waiting.remove(path)
        return self._ready.pop(path)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, paths: Sequence[str], *, share: bool) -> _Ears:
        ears = _Ears(self._held_out, share=share)
        with ExitStack() as hooks, eval_mode(self._live), _stance("force_eager"):
            for path in paths:
                module = self._modules[path]
                hooks.enter_context(module.register_forward_pre_hook(ears.at(path, module), with_kwargs=True))
            for i, batch in enumerate(self._batches):
                ears.listen(i, batch)
                self._forward(i, batch)
                self._done += 1
                if self._progress is not None:
                    total = max(len(self._passes) * len(self._batches), self._done)
                    self._progress(self._done, total, "calibration")
        return ears

    def _forward(self, number: int, batch: Batch) -> None:
        args, kwargs = batch
        try:
            self._live(*args, **kwargs)
        except OFTSurgeryError:
            raise
        except Exception as error:  # whatever a model raises at a batch that is not for it
            raise CalibrationError(
                f"the model does not take calibration batch {number}: {type(error).__name__}: {printable(error)}",
                remedy="give batches as its forward takes them, on its device",
            ) from error


# what is compiled runs as it is written: hooks are heard, and nothing is compiled anew for them
_stance: Any = getattr(torch.compiler, "set_stance", nullcontext)  # torch 2.6


def fingerprint(batches: Sequence[Batch]) -> str:
    """Content hash of the batches' tensors."""
    return hash_tensors(
        {
            f"{i}.{name}": value
            for i, (args, kwargs) in enumerate(batches)
            for name, value in (*enumerate(args), *kwargs.items())
            if isinstance(value, Tensor)
        }
    )


def _passes(features: Mapping[str, int], limit: int) -> list[list[str]]:
    """Paths in groups whose Hessians and held-out inputs take at most ``limit`` bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for path, n in features.items():
        nbytes = 4 * n * (n + HELD_OUT_TOKENS)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += nbytes
    return groups


def _length(batch: Batch) -> int:
    """Sequences in a batch: the first dimension of its first tensor."""
    first = next(v for v in (*batch[0], *batch[1].values()) if isinstance(v, Tensor))
    return first.shape[0] if first.ndim else 1


def _split(count: int) -> Tensor:
    """Which of ``count`` sequences are held out, ``(count,)`` bool: at random, the same ones each time. Of a single one
    none is; its tokens are divided.
    """
    held_out = torch.zeros(count, dtype=torch.bool, device="cpu")
    if count > 1:
        order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        held_out[order[: max(1, count // HOLD_OUT)]] = True
    return held_out


@dataclass(eq=False)
class _Sum:
    """The inputs of one layer, or of several that are given the same."""

    hessian: Tensor
    tokens: int = 0
    held_out: list[Tensor] = field(default_factory=list)

    def add(self, kept: Tensor, held_out: Tensor) -> None:
        """Rows of inputs, ``(n, in)`` both."""
        kept = kept.to(torch.float32)
        with rotations.full_precision(kept.device.type):
            self.hessian.addmm_(kept.t(), kept)
        self.tokens += kept.shape[0]
        self.held_out.append(held_out.to(torch.float32, copy=True))


class _Ears:
    """Hooks that add up what layers are given, and keep some of the sequences that are ``held_out`` of each batch. Where
    they ``share``, layers given one tensor one after the other (queries, keys and values) have one sum.
    """

    def __init__(self, held_out: Sequence[Tensor], *, share: bool) -> None:
        self._held_out = held_out
        self._share = share
        divided = sum(bool(which.any()) for which in held_out)
        self._by_sequence = divided > 0
        self._room = max(1, HELD_OUT_TOKENS // (divided or len(held_out)))  # of each batch
        self._sums: dict[str, _Sum] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[str, Tensor, int] | None = None
        #: layers that were given one tensor once were given different ones later
        self.apart = False

    def listen(self, number: int, batch: Batch) -> None:
        """What is heard from now on is of this batch."""
        mask = batch[1].get("attention_mask")
        self._mask = mask.reshape(-1).to(torch.bool) if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._which = self._held_out[number]
        self._last = None

    def at(self, path: str, module: Any) -> Any:
        """A forward hook, before the layer at ``path``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            version = -1 if x.is_inference() else x._version  # as it was, or written into since
            leader = path
            if self._share and self._last is not None and self._last[1] is x and self._last[2] == version:
                leader = self._last[0]
            self.apart |= self._leader.setdefault(path, leader) != leader
            if leader == path:
                self._last = (path, x, version)
                self._add(path, module._features_last(x.detach()))

        return hook

    def heard(self, path: str) -> LayerInputs | None:
        """What the layer at ``path`` was given.

        Raises:
            CalibrationError: NaN or infinity among it.
        """
        found = self._sums.get(self._leader.get(path, path))
        if found is None:
            return None
        inputs = LayerInputs(found.hessian, found.tokens, torch.cat(found.held_out)[:HELD_OUT_TOKENS])
        if not bool(torch.isfinite(inputs.hessian).all() and torch.isfinite(inputs.held_out).all()):
            message = "on the calibration the live model gives this layer NaN, infinity or what overflows"
            remedy = "check the batches (a row that is all padding?) and the model's dtype"
            raise CalibrationError(message, module=path, remedy=remedy)
        return inputs

    def _add(self, path: str, x: Tensor) -> None:
        """``x: (…, in)`` to the sum of ``path``; padding is left out where the batch's mask names it."""
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
            self._sums[path] = _Sum(rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float32))
        self._sums[path].add(rows[~held_out], _evenly(rows[held_out], self._room))


def _evenly(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of the rows, evenly spread over them."""
    if rows.shape[0] <= count:
        return rows
    return rows[torch.linspace(0, rows.shape[0] - 1, count, device=rows.device).to(torch.int64)]
