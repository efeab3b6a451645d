"""Shared by all tests: no network, adapters written to disk, and a model's whole state for before/after comparisons."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: threads cost the many tiny operations here more than they bring

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"

CONFIG: dict[str, Any] = {
    "peft_type": "OFT",
    "peft_version": "0.21.2",
    "r": 0,
    "oft_block_size": 16,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "block_share": False,
    "coft": False,
    "eps": 6e-5,
    "bias": "none",
    "modules_to_save": None,
}


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


def snapshot_of(model: nn.Module) -> dict[str, Any]:
    """Bytes, object identities, hooks, quantisation states and attributes of every module of ``model``."""
    state: dict[str, Any] = {}
    for path, m in model.named_modules(remove_duplicate=False):
        own = {
            k: v
            for k, v in m.__dict__.items()
            if not k.startswith("_") or k in ("_hf_hook", "_active_adapter", "_disable_adapters")
        }
        state[path] = (
            id(m),
            type(m),
            {name: _tensor(p) for holder in (m._parameters, m._buffers) for name, p in holder.items()},
            {name: id(child) for name, child in m._modules.items()},
            [list(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._state_dict_hooks)],
            {
                k: (id(v), repr(v) if isinstance(v, (bool, int, float, str, list, type(None))) else "")
                for k, v in own.items()
            },
            {
                k: _tensor(v)
                for k, v in getattr(m.__dict__.get("state"), "__dict__", {}).items()
                if isinstance(v, Tensor)
            },
        )
    return state


def _tensor(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    data = b"" if t.is_meta else t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    statistics = [_tensor(getattr(t, name, None)) for name in ("SCB", "CB")]
    q = getattr(t, "quant_state", None)
    if q is not None:
        nested = getattr(q, "state2", None)
        statistics += [
            id(q),
            q.quant_type,
            q.dtype,
            tuple(q.shape),
            q.blocksize,
            _tensor(q.absmax),
            _tensor(q.code),
            _tensor(q.offset),
        ]
        statistics += [_tensor(nested.absmax), _tensor(nested.code)] if nested is not None else []
    return (id(t), type(t), t.dtype, tuple(t.shape), t.requires_grad, data, statistics)
