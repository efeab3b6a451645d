"""Where the weights of a model's blocks come from: from a live model in memory, or from a checkpoint while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.adapters.weight_map import WeightMap
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.layers import Layer
from oftsurgery.stores.modules import modules_of
from oftsurgery.stores.new_layers import LayerSettings, layer_with
from oftsurgery.weights.fold import rotate_chain

from .blocks import weights_of

#: the chain of rotations of a layer, and the format of its folded weight
Job = tuple[Sequence[WeightMap], WeightFormat]


class LiveBlocks:
    """The blocks of a live model in memory.

    Attributes:
        model: the model.
        modules: its modules by path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, modules_of(model)

    def weight(self, path: str) -> EncodedWeight:
        """The weight of the layer at ``path`` before the fold."""
        return Layer(path, self._base(path)).read()[0]

    def is_plain(self, path: str, chain: Sequence[WeightMap]) -> bool:
        """Whether the layer at ``path`` computes ``x Wᵀ + bias`` with the folded weight as W."""
        return is_plain(self._base(path), chain) and not self._base(path).weight.is_meta

    def _base(self, path: str) -> Any:
        return self.modules[path].base_layer

    def loaded(self, block: str) -> AbstractContextManager[None]:  # noqa: ARG002 - a model in memory has all tensors
        """Have the values of a block's tensors in memory while the body runs."""
        return nullcontext()

    def on_demand(self, jobs: Mapping[str, Job], blocks: Sequence[str]) -> AbstractContextManager[None]:  # noqa: ARG002
        """While the body runs, each of the blocks has its tensors and its adapters whenever the model calls the block."""
        return nullcontext()


class StoredBlocks(LiveBlocks):
    """The blocks of a checkpoint. The model has no adapters; the layers at ``paths``, which are all plain, have no weights.

    Attributes:
        store: the checkpoint.
        names: the names of the model's tensors.
        model: the model, whose tensors in blocks are on the meta device.
        paths: the layers that are to be folded.
        device: where blocks run.
        settings: of bitsandbytes' layers.
    """

    def __init__(
        self, store: FolderStore, model: nn.Module, paths: Sequence[str], device: str, settings: LayerSettings
    ) -> None:
        super().__init__(model)
        self.store, self.names = store, tuple(model.state_dict())
        self.paths, self.device, self.settings = frozenset(paths), device, settings

    def weight(self, path: str) -> EncodedWeight:
        name = f"{path}.weight"
        found = self.store.weight(name, self.store.loaded(name))
        assert found is not None  # noqa: S101 - `stored_blocks` has looked for all tensors
        return EncodedWeight(found.format, {n: t.to(self.device) for n, t in found.tensors.items()})

    def is_plain(self, path: str, chain: Sequence[WeightMap]) -> bool:
        return is_plain(self.modules[path], chain)

    @contextmanager
    def loaded(self, block: str) -> Iterator[None]:
        with ExitStack() as undo:
            self.fill([name for name in self.names if name.startswith(f"{block}.")], undo)
            yield

    @contextmanager
    def on_demand(self, jobs: Mapping[str, Job], blocks: Sequence[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for block in blocks:
                own = {path: chain for path, (chain, _) in jobs.items() if path.startswith(f"{block}.")}
                running = stack.enter_context(ExitStack())
                begin, end = partial(self._begin, block, own, running), partial(_end, running)
                stack.enter_context(self.modules[block].register_forward_pre_hook(begin))
                stack.enter_context(self.modules[block].register_forward_hook(end))
            yield

    def _begin(
        self,
        block: str,
        chains: Mapping[str, Sequence[WeightMap]],
        running: ExitStack,
        _module: nn.Module,
        args: tuple[Any, ...],
    ) -> None:
        running.enter_context(self.loaded(block))
        dtype = args[0].dtype if args and isinstance(args[0], Tensor) else torch.float32
        exact = {path: exact_weight(self.weight(path), chain, dtype) for path, chain in chains.items()}
        running.enter_context(weights_of(self.modules, exact))

    def fill(self, names: Sequence[str], undo: ExitStack | None = None) -> None:
        """Give the model the values of tensors, until ``undo`` is closed."""
        names = [name for name in names if name.removesuffix(".weight") not in self.paths]
        quantised = [n for n in names if n.endswith(".weight") and self.store.loaded(n).quantised]
        for name in names:
            if name not in quantised:
                path, _, local = name.rpartition(".")
                module = self.modules[path]
                value = self._tensor(name)
                if local in module._parameters:
                    _put(module._parameters, local, nn.Parameter(value, requires_grad=False), undo)
                else:
                    _put(module._buffers, local, value, undo)
        for name in quantised:  # a layer of bitsandbytes takes over the bias
            path = name.removesuffix(".weight")
            made: Any = layer_with(Layer(path, self.modules[path]), self.weight(path), self.settings)
            if hasattr(made, "support_avx512bf16_for_cpu"):
                made.support_avx512bf16_for_cpu = False  # a CPU forward would round the statistics to bfloat16
            parent, _, local = path.rpartition(".")
            _put(self.modules[parent]._modules, local, made, undo)

    def _tensor(self, name: str) -> Tensor:
        found = self.store.tensor(name)
        assert found is not None  # noqa: S101 - `stored_blocks` has looked for all tensors
        return found.to(self.device, self.store.architecture.loaded.get(name, found.dtype))


def _end(running: ExitStack, *_: object) -> None:
    running.close()


def _put(holder: dict[str, Any], key: str, value: Any, undo: ExitStack | None) -> None:
    if undo is not None:
        undo.callback(holder.__setitem__, key, holder[key])
    holder[key] = value


def is_plain(base: nn.Module, chain: Sequence[WeightMap]) -> bool:
    """Whether a layer over ``base`` computes ``x Wᵀ + bias`` with the folded weight as W."""
    linear = isinstance(base, nn.Linear) and all(type(r) is Rotation for r in chain)
    return linear and all(r.side == "input" for r in chain)


def exact_weight(before: EncodedWeight, chain: Sequence[WeightMap], dtype: torch.dtype) -> Tensor:
    """The rotated weight, for hidden values of ``dtype``."""
    with rotations.full_precision(before.tensors["weight"].device.type):
        exact = rotate_chain(codecs.decode(before), chain)
    return exact.to(dtype_of_weights(dtype))


def dtype_of_weights(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the weights that multiply hidden values of ``dtype``."""
    return torch.promote_types(dtype, torch.bfloat16)
