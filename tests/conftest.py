"""Shared by all tests: no network, adapters written to disk, and a model's whole state for before/after comparisons."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: threads cost the many tiny operations here more than they bring

import pytest
import torch
from rotated import CONFIG
from safetensors.torch import save_file
from snapshots import snapshot_of
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"

# need torchao, MPI and Ray; `make test-bases` and `make test-scale` name the files
collect_ignore = ["bases/diffusers_models.py", "scale/mpi_pool.py", "scale/ray_cluster.py"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden adapters, ``peft-<release>/<variant>``."""
    return GOLDEN


@pytest.fixture
def oft_config() -> Callable[..., dict[str, Any]]:
    """``oft_config(**changes)``: an adapter_config.json as peft 0.21.2 writes it; a change to ``...`` leaves the field
    out.
    """
    return lambda **changes: {k: v for k, v in (CONFIG | changes).items() if v is not ...}


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """``write_adapter(tensors, config=CONFIG, name="adapter")``: the folder of an adapter with these files."""

    def write(tensors: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG, name: str = "adapter") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        return folder

    return write


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Any]]:
    """``snapshot(model)``: everything that an error must leave as it was, comparable with ``==``."""
    return snapshot_of


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    """tools/demo.py."""
    return importlib.import_module("demo")
