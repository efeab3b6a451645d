"""How a checkpoint's files are called: :data:`LAYOUTS`. This file reads names and JSON, and no weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oftsurgery.errors import CheckpointError, printable

from .reading import ADAPTER_CONFIG, damaged, inside, read_json
from .remote import is_url, plain_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Layout:
    """The names of a checkpoint's files, as paths below its folder. ``single`` holds all tensors, or ``index`` lists the
    shards; all of these files lie in one folder, which may be a subfolder.

    Attributes:
        written: whether an output of such a checkpoint has these names; the names of other outputs are those of the first row
            of :data:`LAYOUTS`.
    """

    single: str
    index: str
    written: bool = False

    @property
    def names(self) -> tuple[str, str]:
        return self.single, self.index

    @property
    def output(self) -> Layout:
        """The layout of an output of such a checkpoint."""
        return self if self.written else LAYOUTS[0]

    @property
    def shards(self) -> str:
        """The pattern of the files' names, as huggingface_hub's function of shards takes it."""
        return f"{self.single.removesuffix(_WEIGHTS)}{{suffix}}{_WEIGHTS}"

    def variant(self, name: str) -> Layout:
        """The layout of a variant (``"fp16"``), whose name stands before the ending, as in diffusers and transformers."""
        single, index = (f"{file.rpartition('.')[0]}.{name}.{file.rpartition('.')[2]}" for file in self.names)
        return Layout(single, index, written=True)


_WEIGHTS = ".safetensors"
#: every layout that is read
LAYOUTS = (
    Layout(SINGLE, INDEX, written=True),
    Layout(f"diffusion_pytorch_{SINGLE}", f"diffusion_pytorch_{INDEX}", written=True),
)
_VARIANT = re.compile(r"\w+")


def layout_of(folder: Path, variant: str | None = None) -> Layout | None:
    """The layout of the checkpoint in ``folder``; None for a folder without a checkpoint.

    Args:
        variant: the name of a variant (``"fp16"``); None for the files without such a name, or else for the only variant.

    Raises:
        CheckpointError: the folder holds several variants, and nobody chooses.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if variant is None:
        plain = next((one for one in LAYOUTS if any((folder / name).exists() for name in one.names)), None)
        if plain is not None:
            return plain
    found = variants_in(there)
    if variant is not None:
        return found.get(variant)
    if len(found) > 1:
        raise CheckpointError(
            f"the folder holds several variants of the weights: {', '.join(map(printable, sorted(found)))}",
            path=folder,
            remedy="choose one of the variants: variant=… (--variant)",
        )
    return next(iter(found.values()), None)


def layout_for(config: Mapping[str, Any]) -> Layout:
    """The layout in which the library of a ``config.json`` looks for a model's weights: transformers, or diffusers."""
    return LAYOUTS[1] if "_class_name" in config and "model_type" not in config else LAYOUTS[0]


def variants_in(names: Collection[str]) -> dict[str, Layout]:
    """``{name of a variant: its layout}`` of the files of these ``names``."""
    found: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for file in layout.names:
            before, _, after = file.rpartition(".")
            for name in sorted(names):
                middle = name.removeprefix(f"{before}.").removesuffix(f".{after}")
                if name == f"{before}.{middle}.{after}" and _VARIANT.fullmatch(middle) and name not in layout.names:
                    found.setdefault(middle, layout.variant(middle))
    return found


def is_of_variant(name: str) -> bool:
    """Whether a file of weights belongs to a variant, by its name."""
    stems = "|".join(re.escape(layout.single.removesuffix(_WEIGHTS)) for layout in LAYOUTS)
    return re.fullmatch(rf"({stems})\.\w+(-\d+-of-\d+)?{re.escape(_WEIGHTS)}", name) is not None


_FILE = re.compile(
    r"(?:.*/)?(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors"
    r"|(?:.*/)?(?:diffusion_pytorch_)?model\.safetensors\.index(?:\.(?P<index>\w+))?\.json"
)


def without_other_variants(names: Iterable[str], variant: str | None) -> list[str]:
    """The files of these ``names``, with ``/``, without the weights of other variants: of each folder the weights of the ``variant``,
    or else those without a variant's name, or else all.

    >>> without_other_variants(["unet/model.safetensors", "unet/model.fp16.safetensors", "unet/config.json"], "fp16")
    ['unet/model.fp16.safetensors', 'unet/config.json']
    """
    listed = list(names)
    matches = {name: match for name in listed if (match := _FILE.fullmatch(name)) is not None}
    of = {name: match["variant"] or match["index"] for name, match in matches.items()}
    there: dict[str, set[str | None]] = {}
    for name, own in of.items():
        there.setdefault(name.rpartition("/")[0], set()).add(own)

    def kept(name: str) -> bool:
        found = there.get(name.rpartition("/")[0], set())
        chosen = variant if variant in found else None
        return name not in of or chosen not in found or of[name] == chosen

    return [name for name in listed if kept(name)]


#: the index of a pipeline of diffusers: the names and the classes of its components
PIPELINE = "model_index.json"


def is_single_file(path: object) -> bool:
    """Whether ``path`` names a file of safetensors, here or behind a URL."""
    return str(path).endswith(".safetensors") and (is_url(path) or plain_path(str(path)).expanduser().is_file())


def no_checkpoint(place: object, names: Collection[str], otherwise: str | None = None) -> CheckpointError:
    """The error for a folder or repository that holds files of these ``names`` and no weights that are read; the message is
    ``otherwise`` where the names tell nothing.
    """

    def first(*endings: str) -> str | None:
        return next((printable(name) for name in sorted(names) if name.endswith(endings)), None)

    files = tuple(f"/{file}" for layout in LAYOUTS for file in layout.names)
    inner = sorted({name.rpartition("/")[0] for name in names if name.endswith(files)})
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
    elif PIPELINE in names:
        message = "the folder holds a pipeline of diffusers, where one model is meant"
        remedy = f"give the folder of one of its models: {', '.join(map(printable, inner)) or 'none has safetensors'}"
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


def no_variant(folder: Path, variant: str) -> CheckpointError:
    """The error for a folder whose weights have no such variant."""
    there = ", ".join(map(printable, variants_in({path.name for path in folder.iterdir()}))) or "none"
    message = f"the folder has no variant {printable(variant)!r} of the weights; its variants: {there}"
    return CheckpointError(
        message, path=folder, remedy="name one of these variants, or leave out variant=… (--variant)"
    )


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
