"""An adapter as peft 0.21 loads it onto a model: the model's own names, and block rotations of the inputs."""

from __future__ import annotations

import math
from dataclasses import replace

from oftsurgery.adapters.adapter import OFTAdapter
from oftsurgery.adapters.rotation import Rotation
from oftsurgery.adapters.to_rotation import as_rotation, in_one_config
from oftsurgery.errors import AdapterError, module_in_errors
from oftsurgery.stores.store import Store

from .plan import plan_changes


def adapter_for_peft(store: Store, adapter: OFTAdapter) -> OFTAdapter:
    """``adapter`` as rotations of the layers of the store's model.

    Raises:
        AdapterError: peft 0.21 has no form for what the adapter does to a layer.
        OFTSurgeryError: the adapter does not fit the model, as in a fold.
    """
    found: dict[str, Rotation] = {}
    features: dict[str, int] = {}
    for change in plan_changes(store, [adapter], partial=True).rotate:
        with module_in_errors(change.path):
            if change.group:
                message = "the adapter turns the rows of several weights together, which peft 0.21 has no form for"
                raise AdapterError(message, remedy="fold the adapter as it is: a fold needs no conversion")
            shape = store.shape(change.name)
            found[change.path] = as_rotation(change.chain[0], shape)
            features[change.path] = math.prod(shape[1:])
    own = store.locate(adapter.saved)
    series = {r.cayley for r in found.values()}
    return replace(
        adapter,
        modules=in_one_config(found, features),
        saved={own[name]: values for name, values in adapter.saved.items()},
        dialect="peft-0.21" if all(one.since_0_18 for one in series) else "peft-0.17",
        config={**adapter.config, "peft_type": "OFT"},
        bias=None,
    )
