"""Live layers: adapters that are applied while the model computes."""

from .wrap import Embedding, Linear, Linear4bit, Linear8bitLt, dispatch_bnb_4bit, dispatch_bnb_8bit

__all__ = ["Embedding", "Linear", "Linear4bit", "Linear8bitLt", "dispatch_bnb_4bit", "dispatch_bnb_8bit"]
