"""A :class:`LoadedCheckpoint` holds the tensors that transformers or diffusers would load from a folder, by the model's own names.

The checks use this file, which shares no code with the files that plan or write a fold. The model's class is built on the
meta device (with names and shapes, without weights and without code of the checkpoint); transformers' conversion tables
then say how each stored tensor is converted, and ``tie_weights`` says which tensor each other name shares. Without
transformers, or for a class that transformers does not know, the names are those in the files.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery.dtypes import DTYPES
from oftsurgery.errors import CheckpointError, printable
from oftsurgery.files.checkpoint import Checkpoint
from oftsurgery.formats import codecs
from oftsurgery.formats.checkpoint_tensors import format_by_names, read_weight
from oftsurgery.formats.encoded_weight import EncodedWeight
from oftsurgery.stores.skeleton import quiet, skeleton

from .package_weights import CheckedCheckpoint, Held
from .tool_names import Rows, ToolNames

# transformers' model types whose linears are `Conv1D`, held (in, out); used where the class is not known
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
# the part of a tensor's name in a multimodal model up to the language model's own name
_AROUND_TEXT = re.compile(r"^(.+\.)?(language_model|text_model)\.")


@dataclass(frozen=True, eq=False)
class _Group:
    """Stored tensors that transformers splits, merges or transposes: the name of the first tensor, and
    ``(pattern, stored name)`` of each.
    """

    first: str
    members: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One weight, and its stored tensors by the ends of their names; ``parts`` is None for a computed weight, and ``held`` says how
    another package than bitsandbytes stores the weight, whose plain values ``weight`` then has.
    """

    weight: EncodedWeight
    parts: Mapping[str, Tensor] | None = None
    held: Held | None = None


def _plain(tensor: Tensor) -> StoredTensor:
    return StoredTensor(codecs.dense(tensor), {"weight": tensor})


class LoadedCheckpoint:
    """The tensors that transformers would load from a folder.

    Args:
        checkpoint: the folder's headers.
        dtype: the dtype of the loaded model, which decides only :meth:`dtype_of`.
        apart: stored tensors that are compared in their stored form, without the model's conversion.

    Attributes:
        model: the model on the meta device, tied as loading ties it; None where the class is not known.
        sources: ``{name: the name that holds its tensor}``: its own name, the name to which it is tied, or None where no
            tensor is stored and transformers would initialise one. The model's names come first, then the names of
            stored tensors that the model does not take.
        left_out: the model's names whose tensors are compared in their stored form.
        apart: the stored tensors of these names.

    In a llama with tied embeddings, ``sources["lm_head.weight"]`` is ``"model.embed_tokens.weight"``.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, apart: frozenset[str] = frozenset()):
        self.checkpoint, self.dtype, self.apart = checkpoint, dtype, set(apart)
        self.sources: dict[str, str | None] = {}
        self._from: dict[str, str | _Group] = {}
        self.left_out: set[str] = set()
        self._converted: tuple[_Group | None, Mapping[str, Tensor]] = (None, {})
        self._parts = {name: _parts(name, checkpoint) for name in checkpoint.entries}
        beside = {part for parts in self._parts.values() for part in parts[1:]}
        stored = [name for name in checkpoint.entries if name not in beside]
        self.model = skeleton(checkpoint.config, dtype, len(stored))
        if self.model is None:
            self._from.update((_of_module(name), name) for name in stored)
            self.sources.update((name, name) for name in self._from)
            return
        self._state = {n: t for n, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        self._of_diffusers = not hasattr(self.model, "all_tied_weights_keys")
        if self._of_diffusers:  # the names in the files are those of the class, and no tensors are tied
            self._pairs: dict[str, str] = {}
            self._held = {name: id(tensor) for name, tensor in self._state.items()}
            self._from.update((name, name) for name in stored)
            self.sources.update((name, name if name in self._from else None) for name in self._state)
            self.sources.update((name, name) for name in stored)
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        tables = get_model_conversion_mapping(self.model) or []
        self._renamings = [t for t in tables if isinstance(t, WeightRenaming)]
        self._converters = [t for t in tables if isinstance(t, WeightConverter)]
        self._pairs = dict(self.model.all_tied_weights_keys)
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._rename(name)
            if pattern is not None and target in self._state:
                groups.setdefault(target, []).append((pattern, name))
            elif target in self._state:
                self._from.setdefault(target, name)
        for first, members in groups.items():
            self._from |= dict.fromkeys(*self._made_of(_Group(first, tuple(members))))
        self._tie()
        taken = {n for s in self._from.values() for n in ([s] if isinstance(s, str) else (n for _, n in s.members))}
        # two stored tensors may have the same name in the model, an old and a new one: the model takes the first
        self._from |= {f"{n} (second)" if n in self._from else n: n for n in stored if n not in taken}
        self.sources |= {name: name for name in self._from if name not in self.sources}

    # --- names ---

    def _rename(self, name: str) -> tuple[str, str | None]:
        """A stored tensor's name in the model, and the pattern of its conversion, as transformers' loading finds both."""
        if self._of_diffusers:
            return name, None
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], prefix, self._state)
        return target, pattern

    def _made_of(self, group: _Group) -> tuple[list[str], _Group]:
        """The names that a group gives, computed on the meta device; empty where the group's tensors are compared in their
        stored form: on request, or because transformers cannot convert the tensors (quantised ones).
        """
        files = [name for _, name in group.members]
        try:
            made = list(self._convert(group, self._empty))
        except Exception:  # transformers' operations raise errors of any kind; the names are then not known
            made = [group.first]
            self.apart.update(files)
        if self.apart.isdisjoint(files) and all(len(self._parts[name]) == 1 for name in files):
            return made, group
        self.apart.update(files)
        self.left_out.update(made)
        return [], group

    def _empty(self, name: str) -> Tensor:
        entry = self.checkpoint.entries[name]
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors of the model that transformers' converter makes of a group of stored tensors."""
        pattern = group.members[0][0]
        converter: Any = copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        for pattern, name in group.members:
            converter.add_tensor(group.first, name, pattern, functools.partial(read, name))
        made = converter.convert(group.first, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def _tie(self) -> None:
        """Give each name of the model its own parameter, and let transformers tie the names without a stored tensor."""
        for name, tensor in self._state.items():
            module, attribute = self._holder(name)
            empty = torch.empty_like(tensor, device="meta")
            if attribute in module._parameters:
                module._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
            else:
                module._buffers[attribute] = empty
        given = {id(getattr(*self._holder(name))): name for name in self._from if name in self._state}
        # two names that both have a stored tensor are not tied
        self.model.all_tied_weights_keys = {a: b for a, b in self._pairs.items() if not {a, b} <= self._from.keys()}
        with quiet():
            self.model.tie_weights(missing_keys=self._state.keys() - self._from.keys(), recompute_mapping=False)
        self.model.all_tied_weights_keys = dict(self._pairs)
        self._held = {name: id(getattr(*self._holder(name))) for name in self._state}
        self.sources |= {name: given.get(held) for name, held in self._held.items()}

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        return self.model.get_submodule(path), attribute

    def place(self, name: str) -> str | None:
        """The name here of an adapter's ``name``, if the adapter was trained in this class, its base or an older layout.

        Returns:
            a key of :attr:`sources`; the name of a stored tensor that the model converts, which the caller then passes
            as ``apart``; or None.
        """
        found = self._place(name)
        if found is None:
            path, _, leaf = name.rpartition(".")
            rows = self.tool_names.rows(path)
            found = f"{rows.paths[0]}.{leaf}" if rows is not None and rows.plain else None
            found = found if found in self.sources else None
        if found is None and ".module." in f".{name}":  # DDP puts `module.` in front of the names of its module
            found = self._place(f".{name}".replace(".module.", ".").removeprefix("."))
        return found

    def _place(self, name: str) -> str | None:
        """:meth:`place` of a name without the segments of wrappers."""
        if self.model is None or self.sources.get(name) is not None:
            return name if name in self.sources else None
        target, pattern = self._rename(name)
        if pattern is None:
            return target if target in self.sources else self._in_language_model(name)
        prefix = f"{self.model.base_model_prefix}."
        return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in self._parts), None)

    @functools.cached_property
    def tool_names(self) -> ToolNames:
        """The names here as image tools write them."""
        return ToolNames(self.sources)

    def rows(self, path: str) -> Rows | None:
        """The rows that an adapter's module ``path`` means, of one weight or of several; None for an unknown name."""
        place = self.place(f"{path}.weight")
        return self.tool_names.rows(path) if place is None else Rows((place.removesuffix(".weight"),))

    def _in_language_model(self, name: str) -> str | None:
        """The name here of a language model's tensor, if ``name`` is the tensor's name in another class: a multimodal class has
        other names around the language model than the language model's own class. The result is the only name here with the
        same end, from the language model on.
        """
        end = _AROUND_TEXT.sub("", name).removeprefix("model.")
        alike = [n for n in self.sources if n == end or n.endswith(f".{end}")]
        alike = [n for n in alike if _AROUND_TEXT.search(n)] or alike
        return alike[0] if len(alike) == 1 else None

    def together(self, name: str) -> set[str]:
        """The names of the model that share one parameter with ``name``, with ``name`` among them."""
        if self.model is None or name not in self._held:
            return {name}
        both = [pair for pair in self._pairs.items() if name in pair and all(n == self.sources[n] for n in pair)]
        equal = [pair for pair in both if torch.equal(*(self.read(n).weight.tensors["weight"] for n in pair))]
        return {name, *itertools.chain(*equal), *(n for n, held in self._held.items() if held == self._held[name])}

    # --- tensors ---

    def read(self, name: str) -> StoredTensor:
        """Read one tensor.

        Raises:
            FormatError: companions are missing or contradict each other.
        """
        name = self.sources[name] or name
        source = self._from[name]
        if isinstance(source, _Group):
            if self._converted[0] is not source:
                self._converted = (None, {})
                self._converted = (source, self._convert(source, self.checkpoint.read))
            return _plain(self._converted[1][name])
        if isinstance(self.checkpoint, CheckedCheckpoint) and source in self.checkpoint.held:
            held, parts = self.checkpoint.held[source], self.checkpoint.parts(source)
            return StoredTensor(codecs.dense(held.values(held.codes(parts))), parts, held)
        tensors = {n: self.checkpoint.read(n) for n in self._parts[source]}
        weight, module = tensors[source], source.removesuffix("weight")
        if len(tensors) == 1:
            return _plain(weight)
        encoded = read_weight(source, tensors, tensors.__getitem__, tuple(weight.shape), weight.dtype)
        return StoredTensor(encoded, {n.removeprefix(module): t for n, t in tensors.items()})

    def transposed(self, name: str) -> bool:
        """Whether a plain weight is held ``(in, out)``."""
        if self.model is None:
            conv1d = self.checkpoint.config.get("model_type") in _CONV1D_TYPES and _CONV1D.search(name) is not None
            return conv1d or (name in self._from and self._from[name] == name.removesuffix(".weight"))
        return name in self._state and type(self._holder(name)[0]).__name__ == "Conv1D" and name.endswith("weight")

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype in which the model holds a plain tensor; None where the dtype is not known."""
        if self.model is None or name not in self._state:
            return None
        if self._of_diffusers:
            own = self._state[name].dtype
            whole = any(segment in self._kept for segment in name.split("."))
            return torch.float32 if whole else self.dtype if own.is_floating_point else own
        from transformers.core_model_loading import build_glob_alternation

        kept = list(self.model._get_dtype_plan(self.dtype))
        return torch.float32 if kept and build_glob_alternation(kept)[0].search(name) else self._state[name].dtype

    def misfit(self, name: str) -> str | None:
        """How the shape of a plain stored tensor differs from the shape that the config gives to it, or None."""
        source = self._from.get(name)
        if self.model is None or name not in self._state or not isinstance(source, str) or len(self._parts[source]) > 1:
            return None
        stored, stated = self.checkpoint.entries[source].shape, tuple(self._state[name].shape)
        return (
            None if stored == stated else f"the shape is {stored}, and {stated} by config.json: the model cannot load"
        )

    def is_buffer(self, name: str) -> bool:
        """Whether the model holds the tensor as a buffer, which nobody trains."""
        return self.model is not None and name in dict(self.model.named_buffers())

    def fits(self, name: str) -> bool:
        """Whether the config agrees with the stored weight on whether the weight is quantised."""
        if self.model is None or self.sources[name] != name or not name.endswith(".weight"):
            return True
        source = self._from[name]
        quantised = isinstance(source, str) and len(self._parts[source]) > 1
        return quantised == (name in self._settled)

    @functools.cached_property
    def _settled(self) -> frozenset[str]:
        settings = self.checkpoint.config.get("quantization_config")
        return self.linears(settings.get("llm_int8_skip_modules")) if isinstance(settings, Mapping) else frozenset()

    @functools.cached_property
    def _kept(self) -> tuple[str, ...]:
        """The segments of names whose tensors a class of diffusers keeps in float32."""
        kept = type(self.model)._keep_in_fp32_modules or ()
        return (kept,) if isinstance(kept, str) else tuple(kept)

    @functools.cached_property
    def _before_tying(self) -> Any:
        """The model as transformers' quantizer sees it: the last of its parameters is the last one of the untied model."""
        model = copy.deepcopy(self.model)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if name in self._pairs:
                path, _, local = name.rpartition(".")
                setattr(model.get_submodule(path), local, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        return model

    def linears(self, skip: object) -> frozenset[str]:
        """Names of the weights that bitsandbytes loading quantises.

        Args:
            skip: ``llm_int8_skip_modules``, a list that replaces transformers' own choice.
        """
        if self._of_diffusers:
            keys = [*(map(str, skip) if isinstance(skip, list) else ()), *self._kept]
            # an entry with dots is a whole path, or the beginning of a path inside the model
            ends = [rf"^{re.escape(k)}$" if "." in k else rf"^(.*\.)?{re.escape(k)}$" for k in keys]
            plain = re.compile("|".join([*ends, *(rf"{re.escape(k)}\." for k in keys)]) or "(?!)")
            own = (path for path, module in self.model.named_modules() if isinstance(module, nn.Linear))
            return frozenset(f"{path}.weight" for path in own if not plain.search(path))
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        named = list(map(str, skip)) if isinstance(skip, list) else None
        keep = HfQuantizer.get_modules_to_not_convert(self._before_tying, named, self.model._keep_in_fp32_modules)
        modules = [p for p, m in self.model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
        try:
            return frozenset(f"{path}.weight" for path in modules if should_convert_module(path, keep))
        except re.error as error:
            message = f"transformers reads a module to skip as a regular expression, and one of these is not valid ({printable(error)})"
            remedy = "restore the config.json and oftsurgery.json that belong to the checkpoint"
            raise CheckpointError(message, path=self.checkpoint.folder, remedy=remedy) from error

    def tie_readers(self) -> dict[str, bool]:
        """``{module path: tie_word_embeddings}`` of modules that compute with this setting; the value is the config's,
        whatever this release of transformers reads from the config.
        """
        found = {}
        for path, module in self.model.named_modules() if self.model is not None else ():
            code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
            if code is not None and "tie_word_embeddings" in code.co_names:
                parsed = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
                written = self.checkpoint.config if path == "" else {}
                found[path] = bool(written.get("tie_word_embeddings", parsed))
        return found


def _of_module(name: str) -> str:
    """The name of a stored tensor, or for the projections of OpenCLIP, an attention's fused one and that of the text (which is held
    ``(in, out)``), the name that a module's tensor would have.
    """
    if re.fullmatch(r"(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.model\.text_projection", name):
        return f"{name}.weight"
    before, mark, leaf = name.rpartition(".attn.in_proj_")
    return f"{before}.attn.in_proj.{leaf}" if mark and leaf in ("weight", "bias") and ".resblocks." in before else name


def _parts(name: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of all stored tensors of the weight ``name``, which comes first; the format decides the others."""
    entries = checkpoint.entries
    kind = format_by_names(name, entries, DTYPES[entries[name].dtype])
    beside = kind.tensor_names(name).values() if kind.quantised else ()
    return (name, *(n for n in beside if n in entries and n != name))
