"""The bases in ``tests/data/bases``, which the packages themselves wrote, and an adapter for them."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from checkpoints import adapted, rotations_in
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from oftsurgery.files.checkpoint import open_checkpoint
from oftsurgery.stores.dequantised import DequantisedCheckpoint, dequantised

HOME = Path(__file__).parents[1] / "data" / "bases"
CASES = sorted(path.name for path in HOME.iterdir())
#: the bases whose packages' quantisers need nothing but the values
STORED = [name for name in CASES if name.startswith(("hqq", "ct", "fp8"))]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def opened(folder: Path) -> DequantisedCheckpoint:
    found = dequantised(open_checkpoint(folder))
    assert isinstance(found, DequantisedCheckpoint)
    return found


def values(name: str) -> dict[str, Tensor]:
    """All tensors of a base, dequantised; another test compares them with what the packages say."""
    source = opened(HOME / name)
    return {tensor: source.read(tensor) for tensor in source.entries}


class Folders:
    """Made once: the adapter, and a base as a plain checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = cache(self._plain)
        model = adapted(LlamaForCausalLM(self._config(CASES[0])), TARGETS)
        self.adapter = folder / "adapter"
        model.save_pretrained(self.adapter)

    def _config(self, name: str) -> LlamaConfig:
        config = json.loads((HOME / name / "config.json").read_text())
        del config["quantization_config"]
        return LlamaConfig(**config)

    def _plain(self, name: str) -> Path:
        found = values(name)
        model = LlamaForCausalLM(self._config(name)).to(found["lm_head.weight"].dtype)
        model.load_state_dict(found)
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def exact(self, name: str) -> dict[str, Tensor]:
        """float64: the rotated weights."""
        found = {n: t.double() for n, t in values(name).items()}
        turns = {f"{path}.weight": r for path, r in rotations_in(self.adapter).items()}
        assert len(turns) == 3
        return {n: found[n] @ turns[n].t() for n in turns}


def changed(name: str, folder: Path, settings: dict[str, Any] | None = None, **other: Tensor | None) -> Path:
    """A copy of a base with other settings, and with other tensors ``{end of the name: tensor, or None for no tensor}``."""
    shutil.copytree(HOME / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings or {}
    (folder / "config.json").write_text(json.dumps(config))
    held = load_file(folder / "model.safetensors")
    for end, tensor in other.items():
        full = f"model.layers.0.self_attn.q_proj.{end}"
        held.pop(full, None)
        held |= {} if tensor is None else {full: tensor}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
