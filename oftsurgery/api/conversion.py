"""The functions here bring adapters into other tools' forms, where the base must be known."""

from __future__ import annotations

from os import PathLike

from torch import nn

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.errors import MatchError, printable
from oftsurgery.files.pipeline import Pipeline
from oftsurgery.folding.for_peft import adapter_for_peft
from oftsurgery.stores.components import split_adapters
from oftsurgery.stores.folder import FolderStore
from oftsurgery.stores.live_model import LiveStore
from oftsurgery.stores.store import Store

from .arguments import AdapterLike, check_is_model, loaded_adapters, opened_model


def as_peft(
    adapter: AdapterLike,
    base: str | PathLike[str] | nn.Module,
    *,
    component: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> OFTAdapter:
    """An adapter as peft 0.21 loads it onto a base: the base's own names, and block rotations of the inputs of its layers.

    >>> adapter = oftsurgery.as_peft("ADAPTER", "BASE")
    >>> adapter.dialect, sorted(adapter.save("FOR-PEFT")) == sorted(adapter.modules)
    ('peft-0.21', True)

    An image tool's file names a layer in the tool's own way, and does not tell a linear layer from a convolution, on which
    OneTrainer's formula is another one. The base tells both. peft's BOFT becomes a rotation in larger blocks, and HRA with an even
    number of reflections becomes one block for each layer. A series of OneTrainer, or of diffusers' file, is one that peft 0.21
    has, and stays.

    Args:
        adapter: rotations of inputs: of OneTrainer, of diffusers' ``save_lora_adapter``, or of peft's OFT, BOFT or HRA.
        base: the model that the adapter was trained on: a folder, a Hub id, a single file, or a model in memory. Its weights are
            not read.
        component: the model of a pipeline whose part of the adapter is wanted.
        variant: as for :func:`oftsurgery.fold_checkpoint`.
        revision: the branch, tag or commit of a base on the Hub.

    Returns:
        an adapter of the dialect ``"peft-0.21"`` (``"peft-0.17"`` with OneTrainer's first series) to save, scale or compose.

    Raises:
        AdapterError: peft 0.21 has no form for the adapter: rotations of outputs, larger kernels than 1×1, a trained scale, an odd
            number of reflections, or several weights that turn together.
        MatchError: the adapter does not fit the base, or changes several models of a pipeline and none is named.
        CheckpointError: there is no such base.
    """
    (given,) = loaded_adapters([adapter])
    if not isinstance(base, (str, PathLike)):
        check_is_model(base)
        return adapter_for_peft(LiveStore(base), given)
    opened = opened_model(base, revision, [given], variant=variant, component=component)
    if isinstance(opened, Pipeline):
        stores = {name: FolderStore(model) for name, model in opened.models.items()}
        name, part = _part(given, stores, component)
        return adapter_for_peft(stores[name], part)
    store: Store = FolderStore(opened)
    return adapter_for_peft(store, given)


def _part(adapter: OFTAdapter, stores: dict[str, FolderStore], component: str | None) -> tuple[str, OFTAdapter]:
    """``(component, the part of the adapter that belongs to it)``.

    Raises:
        MatchError: the adapter has parts of several components and none is named, or no part of the named component.
    """
    try:
        parts = split_adapters([adapter], stores)
    except MatchError:
        if component is None:
            raise
        parts = split_adapters([adapter], stores, component)
    if component is None and len(parts) > 1:
        message = f"the adapter changes several models of the pipeline ({', '.join(map(printable, parts))}), and peft has an adapter for each"
        remedy = "name one after the other: component=… (--component)"
        raise MatchError(message, path=adapter.source, remedy=remedy)
    name = next(iter(parts)) if component is None else component
    if name not in parts:
        message = f"the adapter has no module of the pipeline's model {printable(name)!r}"
        remedy = f"name one of {', '.join(map(printable, parts))}: component=… (--component)"
        raise MatchError(message, path=adapter.source, remedy=remedy)
    return name, parts[name][0]
