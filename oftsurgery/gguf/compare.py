""":func:`compare` compares a GGUF file with the checkpoint that llama.cpp's converter made the file from, tensor by tensor.

The two sides are read with the packages ``safetensors`` and ``gguf``. Names come from ``gguf``'s table; what the converter does to
the values of an architecture stands here a second time, on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from oftsurgery.errors import ExportError, printable

from .reading import value_in

#: architectures whose rotary pairs GGUF stores side by side: the converter reorders the rows of q and k
_PAIRED = frozenset(
    {"llama", "llama-embed", "llada", "deci", "olmo", "arctic", "deepseek", "minicpm", "smollm3", "arcee", "nanbeige"}
    | {"granite", "granitemoe", "granitehybrid", "granite-swa"}
)
#: architectures whose norms add one to the stored weight; GGUF holds the sum
_NORM_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
#: architectures whose linear layers hold (in, out); GGUF holds (out, in)
_TRANSPOSED = frozenset({"gpt2"})
#: architectures of which every value was compared with a file of the real converter: here another order is an error
_KNOWN = frozenset({"llama", "qwen2", "qwen3", "qwen3moe", "gpt2", "gemma3", "granite", "smollm3", "olmo"})

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_REMEDY = "convert again with a current llama.cpp; verify=False (--no-verify) writes the file without this comparison"


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        architecture: llama.cpp's name of the architecture; None without a comparison.
        equal: the number of tensors that hold the checkpoint's values.
        changed: ``{tensor of the GGUF: what the converter does to such a tensor}`` of the tensors whose values were compared after
            this change.
        uncompared: ``{tensor of the GGUF: why its values were not compared}``.
        left_out: ``{tensor of the checkpoint: why the GGUF has no such tensor}``.
    """

    architecture: str | None
    equal: int = 0
    changed: dict[str, str] = field(default_factory=dict)
    uncompared: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def compare(reader: Any, shards: Sequence[Path]) -> Comparison:
    """Compare each tensor of a GGUF with the checkpoint in the files ``shards``.

    Raises:
        ExportError: a tensor holds other values, a tensor of the checkpoint is missing, or the architecture is unknown.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in shards]
        sources = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - a file is no mapping
        return _Comparing(reader, sources).run()


class _Comparing:
    def __init__(self, reader: Any, sources: Mapping[str, Any]) -> None:
        import gguf

        self.sources = sources
        self.stored = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(value_in(reader, "general.architecture"))
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            message = f"the installed gguf package does not know the architecture {printable(self.architecture)!r}"
            raise ExportError(
                message, remedy="upgrade the package (pip install -U gguf), or leave the comparison out (--no-verify)"
            )
        heads = value_in(reader, f"{self.architecture}.attention.head_count")
        self.heads = (heads, value_in(reader, f"{self.architecture}.attention.head_count_kv") or heads)
        count = int(value_in(reader, f"{self.architecture}.block_count") or 0)
        self.names = gguf.get_tensor_name_map(known[self.architecture], count)
        self.found = Comparison(self.architecture)

    def run(self) -> Comparison:
        parts = self._parts()
        for name, tensor in self.stored.items():
            stored = _as_torch(tensor)
            if name not in parts:
                self.found.uncompared[name] = (
                    "the checkpoint has no tensor that gguf's table of names maps to this name"
                )
            elif stored is None:
                self.found.uncompared[name] = f"the converter stored the tensor in {tensor.tensor_type.name}"
            else:
                self._compare(name, stored, parts[name])
        return self.found

    def _parts(self) -> dict[str, list[str]]:
        """``{tensor of the GGUF: tensors of the checkpoint}``; more than one tensor for experts, which GGUF stacks."""
        parts: dict[str, dict[int, str]] = {}
        for source in sorted(self.sources):
            expert = _EXPERT.search(source)
            name = self._name_of(source.replace(expert[0], ".experts.") if expert else source)
            if name is None:
                self.found.left_out[source] = f"gguf's table has no name for the tensor in {self.architecture}"
            elif name in self.stored:
                index = int(expert[1]) if expert else 0
                first = parts.setdefault(name, {}).setdefault(index, source)
                if first != source:
                    self.found.left_out[source] = f"{first} has the same name in the GGUF"
            elif name == "output.weight" and self._is_tied(source):
                self.found.left_out[source] = "the head holds the embedding's values, and llama.cpp takes the embedding"
            else:
                message = f"the GGUF lacks the tensor {printable(name)!r}"
                raise ExportError(message, tensor=source, remedy=_REMEDY)
        return {name: [found[i] for i in sorted(found)] for name, found in parts.items()}

    def _name_of(self, source: str) -> str | None:
        """The GGUF's name of a tensor; the converter drops wrappers' prefixes."""
        for name in _spellings(source):
            found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return str(found)
        return None

    def _is_tied(self, head: str) -> bool:
        embedding = next((s for s in self.sources if self._name_of(s) == "token_embd.weight"), None)
        return embedding is not None and torch.equal(self._read(head), self._read(embedding))

    def _read(self, source: str) -> Tensor:
        return self.sources[source].get_tensor(source)  # type: ignore[no-any-return]

    def _compare(self, name: str, stored: Tensor, parts: list[str]) -> None:
        tensors = [self._read(part) for part in parts]
        source = tensors[0] if len(parts) == 1 and not _EXPERT.search(parts[0]) else torch.stack(tensors)
        change, apply = self._change(name)
        made = apply(source)
        cut = made.shape[0] - stored.shape[0] if made.dim() and made.shape[1:] == stored.shape[1:] else 0
        if name == "token_embd.weight" and cut > 0 and self.architecture.startswith("gemma"):
            # rows that the tokenizer has no token for
            change, made = f"the first {stored.shape[0]} of {made.shape[0]} rows", made[: stored.shape[0]]
        if [n for n in made.shape if n != 1] != [n for n in stored.shape if n != 1]:
            message = "the GGUF's tensor has another shape than the checkpoint's tensor"
            raise ExportError(message, tensor=name, shape=stored.shape, expected=made.shape, remedy=_REMEDY)
        bad = _unequal(stored, made.reshape(stored.shape))
        if not bad:
            if change:
                self.found.changed[name] = change
            else:
                self.found.equal += 1
        elif self.architecture not in _KNOWN and _same_values(stored, made):
            self.found.uncompared[name] = (
                f"the tensor holds the values of {parts[0]} in another order, which oftsurgery does not know"
            )
        else:
            raise self._differs(name, parts[0], stored, bad, change)

    def _change(self, name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        """What the converter does to the values of the tensor ``name``, in words and as a function."""
        end = name.rpartition("blk.")[2].partition(".")[2]
        if self.architecture in _PAIRED and end.startswith(("attn_q.", "attn_k.")):
            heads = self.heads[end.startswith("attn_k.")]
            count = int(heads[int(name.split(".")[1])] if isinstance(heads, list) else heads or 0)
            return "rows reordered for the rotary pairs", lambda source: _side_by_side(source, count)
        if self.architecture in _NORM_PLUS_ONE and name.endswith("norm.weight"):
            # the converter computes in float16 where the checkpoint has this dtype, and otherwise in float32
            return "plus one", lambda source: (source if source.dtype == torch.float16 else source.float()) + 1
        transposed = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
        if self.architecture in _TRANSPOSED and end in transposed:
            return "transposed", lambda source: source.t()
        return "", lambda source: source

    def _differs(self, name: str, source: str, stored: Tensor, count: int, change: str) -> ExportError:
        overflown = bool(torch.isinf(stored).any()) and not bool(torch.isinf(self._read(source)).any())
        expected = f" ({change})" * bool(change)
        return ExportError(
            f"{count} of {stored.numel()} values differ from the checkpoint's tensor {printable(source)!r}{expected}",
            tensor=name,
            format=str(stored.dtype).removeprefix("torch."),
            remedy="the tensor's values are too large for float16: choose dtype='bfloat16' (--dtype bfloat16)"
            if overflown
            else _REMEDY,
        )


def _spellings(source: str) -> Iterator[str]:
    """The tensor's name, and the name without the prefixes of wrappers."""
    plain = source.replace("language_model.", "").replace("text_model.", "")
    for name in dict.fromkeys((source, plain)):
        yield from (name, f"model.{name}", name.partition(".")[2])


def _as_torch(tensor: Any) -> Tensor | None:
    """A tensor of the GGUF in the dtype in which it is stored; None for a quantised tensor."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(
        tensor.tensor_type.name
    )
    if dtype is None:
        return None
    shape = tuple(int(n) for n in reversed(tensor.shape))
    # the reader's memory is that of the file, which torch may not write to
    return torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=dtype).reshape(shape)


def _side_by_side(source: Tensor, heads: int) -> Tensor:
    """source: (heads · 2 · half, …), the first half of each head's rotary pairs before the second half; here the two rows of a pair
    follow each other.
    """
    if not heads or source.shape[0] % (2 * heads):
        return source
    pairs = source.reshape(heads, 2, -1, *source.shape[1:])  # (heads, 2, half, …)
    return torch.stack([pairs[:, 0], pairs[:, 1]], dim=2).reshape(source.shape)


def _unequal(stored: Tensor, made: Tensor) -> int:
    """The number of values that are not ``made``, rounded to the dtype of ``stored``."""
    rounded = made.to(stored.dtype)
    same = ((rounded == stored) & (rounded.isinf() == made.isinf())) | (rounded.isnan() & stored.isnan())
    return int((~same).sum())


def _same_values(stored: Tensor, made: Tensor) -> bool:
    """Whether both tensors hold the same values, in any order."""
    rounded = made.to(stored.dtype)
    return torch.equal(rounded.flatten().sort().values, stored.flatten().sort().values)
