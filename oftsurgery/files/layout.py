"""How a checkpoint's files are called: :data:`LAYOUTS`. This file reads names and JSON, and no weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from oftsurgery.errors import CheckpointError, printable

from .reading import ADAPTER_CONFIG, damaged, inside, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Layout:
    """The names of a checkpoint's files, as paths below its folder. ``single`` holds all tensors, or ``index`` lists the
    shards; all of these files lie in one folder, which may be a subfolder.
    """

    single: str
    index: str

    @property
    def names(self) -> tuple[str, str]:
        return self.single, self.index


#: every layout that is read; the first layout is written
LAYOUTS = (Layout(SINGLE, INDEX),)


def layout_of(folder: Path) -> Layout | None:
    """The layout of the checkpoint in ``folder``; None for a folder without a checkpoint."""
    return next((layout for layout in LAYOUTS if any((folder / name).exists() for name in layout.names)), None)


#: files of diffusers' pipelines and models
_IMAGE_MODELS = {
    "model_index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
}


def no_checkpoint(place: object, names: Collection[str], otherwise: str | None = None) -> CheckpointError:
    """The error for a folder or repository that holds files of these ``names`` and no weights that are read; the message is
    ``otherwise`` where the names tell nothing.
    """

    def first(*endings: str) -> str | None:
        return next((printable(name) for name in sorted(names) if name.endswith(endings)), None)

    inner = sorted(name.rpartition("/")[0] for name in names if name.endswith((f"/{SINGLE}", f"/{INDEX}")))
    pickled, converted = first(".bin", ".pt", ".pth", ".ckpt"), first(".gguf", ".onnx")
    adapters = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{ADAPTER_CONFIG}"))
    if ADAPTER_CONFIG in names:
        message, remedy = (
            "the folder holds an adapter, not a model",
            "give the model's folder in this place; the commands take BASE, ADAPTER and OUTPUT in this order",
        )
    elif adapters:  # a trainer's output
        message = f"the folder holds no model, but adapters in subfolders: {', '.join(map(printable, adapters))}"
        remedy = "give the base model first, and one of these folders as the adapter"
    elif _IMAGE_MODELS & {name.rpartition("/")[2] for name in names}:
        message = "the folder holds a model of diffusers, and oftsurgery reads folders of transformers only"
        remedy = (
            "load the model with diffusers, and fold the adapter in memory: oftsurgery.fold(pipeline.unet, adapter)"
        )
    elif pickled is not None:
        message = f"{pickled} is a pickle, which could run code when read; oftsurgery reads safetensors only"
        remedy = "load the model with transformers on a machine that you trust, and save_pretrained(…, safe_serialization=True)"
    elif converted is not None:
        message = f"the weights are there only as {converted}; oftsurgery reads safetensors only"
        remedy = "give the model from which that file was converted"
    elif inner:  # sentence-transformers once saved a model in 0_Transformer
        message = f"the folder holds no weights, but its subfolder {printable(inner[0])!r} holds weights"
        remedy = "give the subfolder of the model that the adapter was trained on"
    else:
        wanted = " nor ".join(name for layout in LAYOUTS for name in layout.names)
        message = otherwise or f"the folder has neither {wanted}"
        remedy = "give a folder that save_pretrained wrote, or a Hub id 'owner/name'"
    return CheckpointError(message, path=place, remedy=remedy)


def two_checkpoints(place: object, layout: Layout) -> CheckpointError:
    """The error for a folder or repository with a checkpoint of one file and another checkpoint of shards."""
    message = (
        f"the folder holds two checkpoints: {layout.single}, which transformers reads, and the shards of {layout.index}"
    )
    remedy = "remove the checkpoint that you do not mean; download a repository without it (hf download --exclude)"
    return CheckpointError(message, path=place, remedy=remedy)


def weight_map_in(index: Path) -> Mapping[str, str]:
    """``{tensor name: file name}`` of a checkpoint's index."""
    weight_map = read_json(inside(index.parent, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged("the index has no `weight_map` of file names", index)
    return weight_map
