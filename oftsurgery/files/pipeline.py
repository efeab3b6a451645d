""":func:`open_pipeline` reads which models a pipeline of diffusers has: a folder with ``model_index.json`` and a folder for each
component.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from oftsurgery.errors import CheckpointError, printable

from .checkpoint import Checkpoint, open_checkpoint
from .layout import PIPELINE, layout_of
from .reading import inside, is_plain_name, read_json

_MAX_FILES = 4096
_PICKLED = re.compile(r"(pytorch_model|diffusion_pytorch_model)\b.*")
#: names of components in the order in which a fold takes them
_FIRST = ("transformer", "unet", "prior", "text_encoder")


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The models of a pipeline.

    Attributes:
        folder: the pipeline's folder.
        models: ``{name of a component: its checkpoint}`` of the components that have weights in safetensors.
        components: the names of all components that have folders.
    """

    folder: Path
    models: Mapping[str, Checkpoint]
    components: tuple[str, ...] = ()

    @property
    def lost(self) -> dict[str, str]:
        """``{file: why}`` of the weights that loading the pipeline reads and that are not copied."""
        why = "a pickle, which could run code when read"
        plain = (name for name in self.components if name not in self.models)
        return {
            f"{name}/{path.name}": why
            for name in plain
            for path in sorted((self.folder / name).glob("*.bin"))
            if _PICKLED.match(path.name)
        }

    def files(self, but: Collection[str]) -> Iterator[str]:
        """The names of the pipeline's files, with ``/``, without the folders ``but`` and hidden files.

        Raises:
            CheckpointError: a file is a link that leaves the folder, or the files are too many.
        """
        count = 0
        for root, folders, names in os.walk(self.folder):
            below = Path(root).relative_to(self.folder)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and (below / f).as_posix() not in but)
            for name in sorted(n for n in names if not n.startswith(".")):
                file = (below / name).as_posix()
                inside(self.folder, file, nested=True)
                count += 1
                if count > _MAX_FILES:
                    message = f"the pipeline holds more than {_MAX_FILES} files, which is the limit"
                    raise CheckpointError(
                        message, path=self.folder, remedy="remove the files that do not belong to the pipeline"
                    )
                yield file


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (folder / PIPELINE).is_file()


def open_pipeline(folder: Path, variant: str | None = None) -> Pipeline:
    """Read the headers of a pipeline's models; of each model the ``variant`` where its folder has the variant.

    Raises:
        CheckpointError: the index names a place outside the folder, no component has weights, or a component cannot be used.
    """
    index = read_json(inside(folder, PIPELINE))
    names = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    bad = next((name for name in names if not is_plain_name(name)), None)
    if bad is not None:
        message = f"the pipeline's index names a component outside the folder: {printable(bad)!r}"
        raise CheckpointError(message, path=folder / PIPELINE, remedy="do not use this pipeline, or repair its index")
    there = [name for name in names if (folder / name).is_dir()]
    order = sorted(there, key=lambda name: (next((i for i, f in enumerate(_FIRST) if name.startswith(f)), 9), name))
    models = {name: _open(folder / name, variant) for name in order if _has_weights(folder / name, variant)}
    if not models:
        wanted = "" if variant is None else f" of the variant {printable(variant)!r}"
        message = f"no component of the pipeline has weights{wanted} in safetensors"
        raise CheckpointError(
            message,
            path=folder,
            remedy="save the pipeline with save_pretrained(…, safe_serialization=True), or name another variant (--variant)",
        )
    return Pipeline(folder, models, tuple(there))


def _has_weights(folder: Path, variant: str | None) -> bool:
    return layout_of(folder, variant) is not None or (variant is not None and layout_of(folder) is not None)


def _open(folder: Path, variant: str | None) -> Checkpoint:
    return open_checkpoint(folder, variant if layout_of(folder, variant) is not None else None)
