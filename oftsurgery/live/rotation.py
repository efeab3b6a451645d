"""A :class:`LiveRotation` is one adapter's rotation of one layer, as a module that trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oftsurgery import rotations
from oftsurgery.adapters.rotation import Rotation


class LiveRotation(nn.Module):
    """A :class:`~oftsurgery.Rotation` that trains.

    Attributes:
        weight: the generator, ``(n, b(b-1)/2)`` float32.
        scale: ``(out,)`` float32, or None.
        cayley, side: as in :class:`~oftsurgery.Rotation`.
        radius: COFT's bound of each block's ``‖Q‖_F``, or None. Every forward clamps the generator to the bound, and a
            training forward writes the clamped generator back.
        dropout: share of the blocks that a training forward replaces by the identity, at random: the meaning of peft's
            ``module_dropout``, which peft's own layers ignore since 0.16.
    """

    def __init__(
        self,
        rotation: Rotation,
        *,
        radius: float | None = None,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()

        def own(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach().to(device=device, dtype=torch.float32, copy=True))

        with torch.inference_mode(False):  # a tensor that is made in inference mode cannot train
            self.weight = own(rotation.generator)
            self.scale = None if rotation.scale is None else own(rotation.scale)
        self.cayley, self.side, self.radius, self.dropout = rotation.cayley, rotation.side, radius, dropout

    def _generator(self, *, write_back: bool) -> Tensor:
        """The clamped generator; as in peft, the gradient passes through the clamp unchanged."""
        v = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if self.radius is None:
            return v
        with torch.no_grad():
            # Q holds each element of v twice
            norm = math.sqrt(2) * torch.linalg.vector_norm(v, dim=1, keepdim=True)
            clamped = torch.where(norm <= self.radius, v, v * (self.radius / norm))
            if write_back:
                self.weight.copy_(clamped)
        return v + (clamped - v).detach()

    def blocks(self) -> Tensor:
        """``(n, b, b)`` in float32 or better, differentiable: the live layer computes ``x · blockdiag(blocks)``."""
        blocks = self.cayley(rotations.skew(self._generator(write_back=self.training)))
        n = blocks.shape[0]
        if self.training and self.dropout > 0 and n > 1:
            dropped = (torch.randperm(n, device=blocks.device) < int(self.dropout * n)).reshape(n, 1, 1)
            blocks = torch.where(dropped, torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device), blocks)
        return blocks

    @torch.no_grad()
    def rotation(self) -> Rotation:
        """The present rotation (without dropout) as a frozen :class:`~oftsurgery.Rotation` with its own tensors."""
        generator, scale = self._generator(write_back=False), self.scale
        return Rotation(generator.clone(), self.cayley, self.side, None if scale is None else scale.detach().clone())

    def extra_repr(self) -> str:
        n, elements = self.weight.shape
        return f"{n} blocks of {rotations.block_size_of(elements)}, {self.side} side"
