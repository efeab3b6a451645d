"""A family's base in a folder, the models that transformers loads from the folder, and the outputs of models."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import bnb_config, differing, unpacked
from family import Family
from torch import Tensor, nn


class StackError(Exception):
    """transformers, peft, bitsandbytes or torch cannot do what the cell asks, without oftsurgery."""

    def __init__(self, what: str, error: BaseException | str) -> None:
        deepest = error
        while isinstance(deepest, BaseException) and deepest.__cause__ is not None:
            deepest = deepest.__cause__
        said = error if isinstance(error, str) else f"{type(deepest).__name__}: {deepest}"
        super().__init__(f"{what}: {' '.join(said.split())[:300]}")


@contextmanager
def stack(what: str) -> Iterator[None]:
    """Turn any error in the body into a :class:`StackError`."""
    try:
        yield
    except StackError:
        raise
    except Exception as error:
        raise StackError(what, error) from error


class WrongError(Exception):
    """The result is not what it must be."""


def wrong_unless(condition: bool, text: str) -> None:
    if not condition:
        raise WrongError(text)


def randomised(model: Any) -> Any:
    """The model with random weights of variance 1/in, and with random biases, which are not zero."""
    generator = torch.Generator().manual_seed(1)
    convolutions = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue  # codes
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel() if id(parameter) in convolutions else parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
                if name.endswith((".SelfAttention.q.weight", ".EncDecAttention.q.weight")):
                    parameter.div_(4)  # T5's attention does not divide by the root of the heads' size, 16
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model.eval()


def outputs(model: nn.Module, inputs: Mapping[str, Tensor], seed: int = 0) -> list[Tensor]:
    """Every float tensor that the model returns, in float64."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype == torch.float64), None)
    given = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in inputs.items()}
    torch.manual_seed(seed)
    with torch.no_grad(), default_dtype(dtype):
        return list(_tensors(model(**given)))


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors that a model of this dtype makes have the dtype too: XGLM fills one with the least float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.double()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference of any output."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return float("inf")
        norm = float(b[finite].norm())
        worst = max(worst, float((a[finite] - b[finite]).norm()) / (norm or 1.0))
    return worst


def doubled(model: Any) -> Any:
    """A copy in float64, without torch's grouped product of experts, which does not take float64."""
    found = copy.deepcopy(model).double()
    for module in found.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None):
            module.config._experts_implementation = "eager"
    return found


class Bench:
    """A family's plain base in a folder, and the models that transformers loads from the folder."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.cls: Any = getattr(transformers, family.cls)
        with stack("transformers builds, saves and loads the model"):
            torch.manual_seed(0)
            randomised(self.cls(self.cls.config_class(**family.config))).save_pretrained(self.plain)
            self.base_keys = self.loaded(self.plain)[1]

    @property
    def plain(self) -> Path:
        return self.folder / "base"

    def loaded(self, folder: Path, **options: Any) -> tuple[Any, dict[str, list[str]]]:
        """The model, and the keys that are missing, unexpected or of another shape."""
        model, info = self.cls.from_pretrained(folder, output_loading_info=True, **options)
        found = {
            k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]
        }
        return unpacked(model), found

    def base(self, kind: str, skip: tuple[str, ...] = ()) -> Any:
        """The plain base, or a base that transformers quantised, without the modules to skip."""
        if kind == "plain":
            return self.loaded(self.plain)[0]
        more = {"llm_int8_skip_modules": list(skip)} if skip else {}
        return self.loaded(self.plain, quantization_config=bnb_config(kind, double=kind == "nf4", **more))[0]

    def reloaded(self, folder: Path) -> Any:
        """The model that transformers loads from a folder that oftsurgery wrote; the base's folder has the same missing and
        unexpected keys.
        """
        model, keys = self.loaded(folder)
        wrong_unless(keys == self.base_keys, f"keys of the output: {json.dumps(keys)[:300]}")
        return model

    def stack_reloads(self, kind: str) -> tuple[str, set[str]]:
        """The reason why transformers cannot load a base that transformers itself saved, or an empty text; and the names of the
        lost tensors.
        """
        if kind not in self._reloads:
            saved = self.folder / f"stack-{kind}"
            try:
                base = randomised(self.base(kind))
                before = dict(base.state_dict())
                base.save_pretrained(saved)
                model, keys = self.loaded(saved)
                lost = set(differing(dict(model.state_dict()), before))
                outputs(model, self.family.inputs)
                told = f"loads its own folder with {json.dumps(keys)[:200]}, {len(lost)} tensors differ: {sorted(lost)[:2]}"
                self._reloads[kind] = (told if keys != self.base_keys or lost else "", lost)
            except Exception as error:
                self._reloads[kind] = (f"{type(error).__name__}: {error}", set())
        return self._reloads[kind]

    @cached_property
    def _reloads(self) -> dict[str, tuple[str, set[str]]]:
        return {}
