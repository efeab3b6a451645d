"""An adapter's config and tensors in the form of peft 0.21."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oftsurgery import rotations
from oftsurgery.errors import AdapterError, module_in_errors

from .rotation import Rotation
from .targets import saved_targets
from .to_rotation import as_rotation
from .weight_map import WeightMap

if TYPE_CHECKING:
    from .adapter import OFTAdapter

KEY_PREFIX = "base_model.model."  # the start of every key of an adapter's tensors

#: the config's field with the metadata of an image tool's file
IMAGE_METADATA = "metadata"

# the config fields that a saved adapter keeps, and a derived adapter if its origins agree
CARRIED = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")


def config_and_tensors(adapter: OFTAdapter) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """The mirror of :func:`~oftsurgery.adapters.from_peft.parse_adapter`: ``(config, tensors, residuals)`` as :meth:`OFTAdapter.save` writes them."""
    written: dict[str, Rotation] = {}
    for path, weight_map in adapter.modules.items():
        with module_in_errors(path):
            written[path] = _expressible(weight_map)
    residuals, terms = dict.fromkeys(written, 0.0), _kept_series(adapter, written)
    if terms is None:
        for path, r in written.items():
            with module_in_errors(path):
                written[path], residuals[path] = r.exact()
    settings = _block_settings(written, adapter.config)
    tensors: dict[str, Tensor] = {}
    for path, r in written.items():
        part = "oft_embedding_R" if r.side == "embedding" else "oft_R"
        size = settings["oft_block_size"] or r.block_size
        q = rotations.vector(r._generators(size)).to(torch.float32)
        tensors[f"{KEY_PREFIX}{path}.{part}.weight"] = q.contiguous()
    for name, value in adapter.saved.items():
        owner, _, local = name.rpartition(".")
        inside = f"{owner}.base_layer.{local}" if owner in written else name
        tensors[KEY_PREFIX + inside] = value.detach().cpu().contiguous().clone()
    config = {
        **{name: adapter.config.get(name) for name in (*CARRIED, "modules_to_save")},
        **settings,
        **saved_targets(adapter.config, written),
        "bias": adapter.config.get("bias") or "none",
        "coft": False,  # the generators are clamped already
        "eps": 6e-05,
        "fan_in_fan_out": False,  # has no effect on a rotation of the inputs; peft warns of True on nn.Linear
        "inference_mode": True,
        "init_weights": True,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": terms or 5,
        "peft_type": "OFT",
        "peft_version": "0.21.2",  # the release of this format, which readers need
        "use_cayley_neumann": terms is not None,
    }
    return dict(sorted(config.items())), tensors, residuals


def _kept_series(adapter: OFTAdapter, modules: Mapping[str, Rotation]) -> int | None:
    """The number of terms of the series in which the adapter of an image tool was trained, where peft 0.21 has this series; else
    None.
    """
    kinds = {r.cayley for r in modules.values()}
    of_image_tool = IMAGE_METADATA in adapter.config
    return next(iter(kinds)).terms if of_image_tool and len(kinds) == 1 and all(k.since_0_18 for k in kinds) else None


def _expressible(weight_map: WeightMap) -> Rotation:
    """The map as a rotation.

    Raises:
        AdapterError: peft 0.21 cannot store the map.
    """
    r = as_rotation(weight_map)
    if r.side == "output":
        lack = "peft 0.21 can store rotations of inputs and embeddings alone"
        message = f"the adapter has a rotation of the outputs (peft ≤ 0.13): {lack}"
        raise AdapterError(
            message,
            remedy="fold the adapter; or write it for other tools: save_for('lycoris', file), --to lycoris or comfyui",
        )
    if r.scale is not None and bool((r.scale != 1).any()):
        message = "the adapter has a trained scale of the outputs (peft 0.14 and 0.15): peft 0.21 cannot store a scale"
        remedy = "fold the adapter; or leave out the scale on purpose: dataclasses.replace(rotation, scale=None)"
        raise AdapterError(message, tensor="oft_s", remedy=remedy)
    return r


def _block_settings(modules: Mapping[str, Rotation], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which one config describes the blocks of all modules: ``block_share``, and ``r`` or
    ``oft_block_size``, of which the other is 0. The blocks are written in the size ``oft_block_size``, which may be
    larger than a module's own block size.
    """
    shared = {r._one_for_all for r in modules.values()}
    sizes = {r.block_size for r in modules.values()}
    counts = {r.generator.shape[0] for r in modules.values()}
    if len(shared) == 2:
        whole = next(path for path, r in modules.items() if r._one_for_all)
        mixed = "some modules share one block (`block_share`) and others do not"
        message = f"{mixed}, which one config of peft cannot state"
        raise AdapterError(message, module=whole, remedy="save the two kinds of modules as two adapters")
    size, listed = math.lcm(*sizes), ", ".join(map(str, sorted(sizes)))
    settings = {"r": 0, "oft_block_size": size, "block_share": shared.pop()}
    if len(sizes) == 1:
        return settings
    if settings["block_share"]:
        r = config.get("r")
        if not (isinstance(r, int) and r > 0 and not config.get("oft_block_size")):
            message = f"the modules have shared blocks of sizes {listed}, which one config of peft cannot state"
            raise AdapterError(message, remedy="save modules of one size each as an adapter")
        return settings | {"r": r, "oft_block_size": 0}
    if len(counts) == 1:
        return settings | {"r": counts.pop(), "oft_block_size": 0}
    for path, r in modules.items():
        features = r.generator.shape[0] * r.block_size
        if features % size:
            apart = f"the common size {size} does not divide the {features} features"
            message = (
                f"the modules have blocks of sizes {listed}: one config of peft gives all modules one size, and {apart}"
            )
            raise AdapterError(message, module=path, remedy="save modules of one size each as an adapter")
    return settings
