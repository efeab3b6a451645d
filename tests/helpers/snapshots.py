"""What a model is made of, to compare before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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


def contents(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every tensor of a model with its dtype, shape and bytes, quantisation states included."""
    found: dict[str, tuple[Any, ...]] = {}

    def add(name: str, t: Any) -> None:
        if isinstance(t, Tensor):
            raw = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
            found[name] = (t.dtype, tuple(t.shape), raw)

    for path, m in model.named_modules(remove_duplicate=False):
        for holder in (m._parameters, m._buffers):
            for name, t in holder.items():
                add(f"{path}.{name}", t)
                for attribute in ("SCB", "CB"):
                    add(f"{path}.{name}.{attribute}", getattr(t, attribute, None))
                state = getattr(t, "quant_state", None)
                if state is not None:
                    nested = state.state2 if state.nested else None
                    found[f"{path}.{name}.state"] = (state.quant_type, state.dtype, tuple(state.shape), state.blocksize)
                    for key, value in (
                        ("absmax", state.absmax),
                        ("code", state.code),
                        ("offset", state.offset),
                        ("nested.absmax", getattr(nested, "absmax", None)),
                        ("nested.code", getattr(nested, "code", None)),
                    ):
                        add(f"{path}.{name}.{key}", value)
    return found
