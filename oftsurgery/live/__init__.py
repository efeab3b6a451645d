"""Live layers apply adapters while the model computes."""

from .dispatch import dispatch_bnb_4bit, dispatch_bnb_8bit
from .layers import Embedding, Linear, Linear4bit, Linear8bitLt, LiveLayer
from .rotation import LiveRotation
from .wrapped_model import (
    active_adapters,
    adapter_of,
    enable_adapters,
    live_layers,
    merge,
    original_hashes,
    read_live,
    set_adapter,
    unmerge,
)
from .wrapping import strip, unwrap, wrap_model

__all__ = [
    "Embedding", "Linear", "Linear4bit", "Linear8bitLt", "LiveLayer", "LiveRotation", "active_adapters", "adapter_of",
    "dispatch_bnb_4bit", "dispatch_bnb_8bit", "enable_adapters", "live_layers", "merge", "original_hashes", "read_live",
    "set_adapter", "strip", "unmerge", "unwrap", "wrap_model",
]  # fmt: skip
